"""Whatever is wrong with its input, the command says in one line which file or layer it is."""
import json
import os
import re
import subprocess
import sys

import cv2
import numpy as np
import pytest
from initialized import (
    BODY,
    CONV,
    DATA,
    RELU,
    TOY,
    bytes_of,
    here,
    remove_layers,
    run,
    write_images,
)
from toy_nets import image_input, layer, parsed

import magic_init
from ddinit import processes
from ddinit.caffemodel import mark
from ddinit.prototxt import build_net, caffe_messages
from ddinit.weights import KINDS

OLD = b"precious"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(str(tmp_path_factory.mktemp("images")), 8)


@pytest.fixture(scope="module")
def caffemodel(tmp_path_factory, images):
    """The path of TOY's weights."""
    folder = tmp_path_factory.mktemp("weights")
    (folder / "net.prototxt").write_text(TOY)
    path = str(folder / "toy.caffemodel")
    assert magic_init.main([str(folder / "net.prototxt"), path, "-d", images, "--cpu", "-q"]) == 0
    return path


@pytest.fixture
def refused(capsys, tmp_path, images, monkeypatch):
    """Run the command and assert that it ends as every error must; return what it said."""
    def run_and_check(definition, *options, data=images):
        monkeypatch.setattr(processes, "in_child", here)  # nothing of this aborts
        output = tmp_path / "out.caffemodel"
        if not output.exists():
            output.write_bytes(OLD)
        found = run(capsys, tmp_path, definition, *options, *(["-d", data] if data else []),
                    report=False)
        lines = found.err.strip().splitlines()
        assert found.status == 2, found.err
        assert found.out == ""
        assert len(lines) == 1 and lines[0].startswith("magic_init: error: "), found.err
        assert "Traceback" not in found.err
        assert output.read_bytes() == OLD
        assert not [name for name in os.listdir(str(tmp_path)) if ".part" in name]
        assert not (tmp_path / "out.prototxt").exists()
        return lines[0]
    return run_and_check


# ---------------------------------------------------------------------------------------------
# Definitions
# ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, message", [
    ("", r"net.prototxt: the definition has no layers"),
    ("layer {", r"net.prototxt: not a net definition: line 1"),
    ("<html></html>", r"net.prototxt: not a net definition: line 1"),
    (TOY.replace("num_output: 12", "num_outputs: 12"), r"net.prototxt: .*line \d+.*num_outputs"),
    (TOY.replace("'Dropout'", "'Dropuot'"), r"layer 'drop3': .*'Dropuot'"),
    (DATA + layer("a", "Convolution", "nowhere", "", CONV % (2, "")), r"layer 'a': .*'nowhere'"),
    (DATA + layer("a", "ReLU", "data"), r"no layer of the net has weights to initialize"),
    (BODY, r"exactly one input blob .* has none"),
    (image_input(1, 7, 8, 8) + layer("a", "Convolution", "data", "", CONV % (2, "")),
     r"exactly one input.*'data' \[1, 7, 8, 8\]"),
    (DATA + image_input(1, 3, 8, 8, name="other") + BODY
     + layer("b", "Convolution", "other", "", CONV % (2, "")),
     r"exactly one input.*'data' .*'other'"),
    (DATA + layer("label", "Input", "", "label") + layer("loss", "SoftmaxWithLoss", "data label"),
     r"net.prototxt|no layer of the definition|label"),
    ("layers { name: 'a' }", r"net.prototxt: layer 'a'.*no type"),
    ("input: 'data' input_dim: 3", r"net.prototxt: .*4 input_dim"),
], ids=["empty", "cut short", "HTML", "unknown field", "unknown type", "unknown bottom",
        "no weights", "no input", "7 channels", "two inputs", "only a loss", "V1 without type",
        "legacy without shape"])
def test_definitions_that_cannot_be_used_are_named(refused, text, message):
    assert re.search(message, refused(text))


UNKNOWN_SIZE = {
    "database": (layer("shop", "Data", "", "data label", "data_param { source: '/nowhere/lmdb' "
                       "batch_size: 9 }"), "layer 'shop': its source /nowhere/lmdb is not there"),
    "list": (layer("shop", "ImageData", "", "data label", "image_data_param { source: 'list' }"),
             "layer 'shop': its source list is not there .relative paths count from /"),
    "type": (layer("reader", "PairedPictures", "", "data label"),
             "layer 'reader': this Caffe has no layer type 'PairedPictures'"),
    "module": (layer("mine", "Python", "", "data label",
                     "python_param { module: 'absent' layer: 'Own' }"),
               "layer 'mine': no Python layer 'Own' in module 'absent' .No module named"),
}


@pytest.mark.parametrize("kind", UNKNOWN_SIZE)
def test_data_layers_that_are_not_there_are_named_with_the_way_out(refused, kind):
    text, message = UNKNOWN_SIZE[kind]
    text += BODY + layer("loss", "SoftmaxWithLoss", "fc4 label")
    said = refused(text)
    assert re.search(message, said)
    assert "only the size of its images is wanted" in said
    assert "--size HEIGHT WIDTH" in said and "Input layer" in said
    said = refused(text, data=None)
    assert re.search(message, said)
    assert "give images with --data" in said


def test_a_database_with_a_crop_needs_no_look_into_it(capsys, tmp_path, images, monkeypatch):
    monkeypatch.setattr(processes, "in_child", here)
    text = UNKNOWN_SIZE["database"][0].replace("data_param", "transform_param { crop_size: 16 } "
                                               "data_param") + BODY
    assert run(capsys, tmp_path, text, "-d", images).status == 0


@pytest.mark.parametrize("solver, message", [
    ("net: 'gone.prototxt'", r"net.prototxt: a solver's definition, and its net gone.prototxt is "
     r"not there: give the net's prototxt"),
    ("base_lr: 0.1", r"net.prototxt: a solver's definition, and it names no net"),
    ("net_param { name: 'x' }", r"net.prototxt: the definition has no layers"),
], ids=["gone", "none", "empty"])
def test_solvers_without_a_net_are_named(refused, solver, message):
    assert re.search(message, refused(solver, "-q"))


def test_a_written_out_batch_that_the_images_do_not_fill_is_told_with_its_layer(refused):
    text = DATA + layer("flat", "Reshape", "data", "", "reshape_param { shape { dim: 10 dim: -1 } }"
                        ) + layer("fc", "InnerProduct", "flat", "",
                                  "inner_product_param { num_output: 2 }")
    assert "layer 'flat' wants 10 images a batch, and there are 8" in refused(
        text, "-q")


def test_a_definition_that_is_not_there_or_no_text_is_named(tmp_path, capsys, images, monkeypatch):
    monkeypatch.setattr(processes, "in_child", here)
    missing = str(tmp_path / "missing.prototxt")
    assert magic_init.main([missing, str(tmp_path / "o.caffemodel"), "-d", images]) == 2
    assert capsys.readouterr().err == "magic_init: error: %s: no such file\n" % missing
    binary = tmp_path / "binary.prototxt"
    binary.write_bytes(b"\xff\xfe\x00\x80")
    assert magic_init.main([str(binary), str(tmp_path / "o.caffemodel"), "-d", images]) == 2
    assert "binary.prototxt: not a net definition" in capsys.readouterr().err
    assert os.listdir(str(tmp_path)) == ["binary.prototxt"]


MEMORY = layer("data", "MemoryData", "", "data label", "memory_data_param { batch_size: 2 "
               "channels: 3 height: 16 width: 16 }") + BODY
LARGE_KERNEL = image_input(1, 3, 2, 2) + layer(
    "a", "Convolution", "data", "", "convolution_param { num_output: 4 kernel_size: 5 }")
# What Caffe aborts on, or only another process can try: definition, options, message
ABORTS = {
    "groups that do not divide": (
        DATA + layer("a", "Convolution", "data", "", CONV % (3, "group: 2")), [],
        "Caffe stopped: .*group"),
    "kernel larger than image": (LARGE_KERNEL, ["--type", "pca"], "Caffe stopped|does not fit"),
    "sum of unlike shapes": (
        DATA + layer("a", "Convolution", "data", "", CONV % (4, ""))
        + layer("s", "Eltwise", "a data")
        + layer("f", "InnerProduct", "s", "", "inner_product_param { num_output: 2 }"), [],
        "Caffe stopped: "),
    "memory without images": (MEMORY, None, "Caffe stopped: .*MemoryData"),
    "absent GPU": (TOY, ["--gpu", "7"], "GPU 7 cannot be used"),
}
RUN_ALL = """
import json, sys, magic_init
sys.exit(any([magic_init.main(line) != 2 for line in json.loads(sys.argv[1])]))
"""


@pytest.fixture(scope="module")
def aborted(tmp_path_factory, images):
    """The lines that all cases of ABORTS put out, run one after the other, and their folder."""
    folder = tmp_path_factory.mktemp("aborts")
    lines = []
    for number, (definition, options, _) in enumerate(ABORTS.values()):
        path = folder / ("%d.prototxt" % number)
        path.write_text(definition)
        output = folder / ("out%d.caffemodel" % number)
        output.write_bytes(OLD)
        lines.append([str(path), str(output)] + ([] if options is None else ["-d", images])
                     + (["--cpu"] if not options or "--gpu" not in options else [])
                     + (options or []))
    found = subprocess.run([sys.executable, "-c", RUN_ALL, json.dumps(lines)], timeout=120,
                           cwd=os.path.dirname(os.path.abspath(magic_init.__file__)),
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                           universal_newlines=True, check=False)
    assert found.returncode == 0, found.stderr
    assert found.stdout == ""
    return dict(zip(ABORTS, found.stderr.strip().splitlines())), folder


@pytest.mark.parametrize("case", ABORTS)
def test_where_caffe_aborts_its_own_words_are_the_error(aborted, case):
    said, folder = aborted
    assert len(said) == len(ABORTS)  # one line each
    assert re.match("magic_init: error: .*(%s)" % ABORTS[case][2], said[case])
    assert len(os.listdir(str(folder))) == 2 * len(ABORTS)  # no half-written file
    output = "out%d.caffemodel" % list(ABORTS).index(case)
    assert (folder / output).read_bytes() == OLD


# ---------------------------------------------------------------------------------------------
# Weights
# ---------------------------------------------------------------------------------------------

def test_caffemodels_that_do_not_fit_are_named(refused, caffemodel, tmp_path):
    wider = TOY.replace("num_output: 12", "num_output: 13")
    message = refused(wider, "-l", caffemodel)
    assert "toy.caffemodel" in message and "'fc3'" in message
    assert "12x294" in message and "13x294" in message
    assert "none of its layers" in refused(re.sub(r"(conv\d|fc\d)", r"x\1", TOY), "-l",
                                                  caffemodel)


@pytest.mark.parametrize("change", ["cut", "text", "empty", "missing", "folder", "image"])
def test_files_that_are_no_caffemodels_are_named(refused, caffemodel, tmp_path, change, images):
    path = tmp_path / "bad.caffemodel"
    with open(caffemodel, "rb") as file:
        whole = file.read()
    if change == "image":
        cv2.imwrite(str(tmp_path / "bad.png"), np.zeros((9, 9, 3), np.uint8))
        (tmp_path / "bad.png").rename(path)
    elif change == "folder":
        path.mkdir()
    elif change != "missing":
        path.write_bytes({"cut": whole[:len(whole) // 2], "text": b"weights", "empty": b""}[change])
    assert "bad.caffemodel" in refused(TOY, "-l", str(path))


def test_hdf5_weights_of_another_net_are_named(refused, tmp_path):
    net = build_net(parsed(TOY))
    path = str(tmp_path / "weights.caffemodel")
    net.save_hdf5(path)
    message = refused(re.sub(r"(conv\d|fc\d)", r"x\1", TOY), "-l", path)
    assert "weights.caffemodel" in message and "xconv1" in message


def test_a_definition_that_was_written_for_other_weights_is_refused(capsys, tmp_path, images,
                                                                  caffemodel):
    prototxt, weights = tmp_path / "old.prototxt", tmp_path / "old.caffemodel"
    weights.write_bytes(bytes_of(caffemodel))
    prototxt.write_text(mark(caffemodel) + TOY)
    command = [str(prototxt), "--load", str(weights), "--inspect", "-q", "--cpu", "-d", images]
    assert magic_init.main(command) == 0
    weights.write_bytes(bytes_of(caffemodel) + b"\x0a\x00")
    capsys.readouterr()
    assert magic_init.main(command) == 2
    assert "old.prototxt was written for other weights than" in capsys.readouterr().err


@pytest.mark.filterwarnings("error::RuntimeWarning")  # a user would see it as further lines
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("options", [(), ("-cs",)], ids=["", "calibrated"])
def test_weights_that_are_not_finite_are_told_with_their_layer(refused, caffemodel, tmp_path, value,
                                                              options):
    net = caffe_messages().NetParameter()
    with open(caffemodel, "rb") as file:
        net.ParseFromString(file.read())
    next(one for one in net.layer if one.name == "fc3").blobs[0].data[5] = value
    path = tmp_path / "nan.caffemodel"
    path.write_bytes(net.SerializeToString())
    message = refused(TOY, "-l", str(path), *options)
    assert "layer 'fc3'" in message and "not finite" in message


# ---------------------------------------------------------------------------------------------
# Images
# ---------------------------------------------------------------------------------------------

def test_images_that_are_missing_or_unreadable_are_named(refused, tmp_path, images):
    pattern = str(tmp_path / "none" / "*.jpg")
    assert pattern in refused(TOY, data=pattern)
    folder = tmp_path / "images"
    folder.mkdir()
    assert "images/*: no images there" in refused(TOY, data=str(folder))
    write_images(str(folder), 3)
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no more")
    assert "broken.jpg: not an image" in refused(TOY, data=str(folder))


def test_lists_and_patterns_without_images_are_named(refused, tmp_path, images):
    listing = tmp_path / "list.txt"
    for text, message in (("", "list.txt: the list names no images"),
                          ("gone.png 3\n", "list.txt: its image gone.png 3 is not there")):
        listing.write_text(text)
        assert message in refused(TOY, data=str(listing))
    assert "gone.png: no images there" in refused(TOY, "-d", images, "gone.png", data=None)


@pytest.mark.parametrize("change, message", [
    ("missing", "mean.npy: cannot read the mean"), ("text", "mean.npy: not a mean image"),
    ("shape", "mean.npy: a mean has 1 or 3 channels, this one has the shape .16, 16, 3."),
    ("five", "mean.npy: a mean has 1 or 3 channels"),
    ("pickle", "mean.npy: not a mean image")])
def test_means_that_are_none_are_named(refused, tmp_path, change, message):
    path = tmp_path / "mean.npy"
    if change == "text":
        path.write_text("mean")
    elif change == "pickle":
        np.save(str(path), np.array([{}]), allow_pickle=True)
    elif change != "missing":
        np.save(str(path), np.zeros({"shape": (16, 16, 3), "five": 5}[change]))
    assert re.search(message, refused(TOY, "--mean", str(path)))


def test_without_images_a_net_has_to_feed_itself(refused):
    assert "--data" in refused(TOY, data=None)


def test_constant_images_leave_finite_weights_and_a_warning(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "in_child", here)
    folder = tmp_path / "grey"
    folder.mkdir()
    for number in range(4):
        cv2.imwrite(str(folder / ("%d.png" % number)), np.full((20, 20, 3), 90, np.uint8))
    for number, kind in enumerate(KINDS):
        found = run(capsys, tmp_path, TOY.replace("pad: 1 ", ""), "-d", str(folder), "-cs", "-t",
                    kind, name="out%d" % number)
        assert found.status == 0, found.err
        assert "layer 'conv1': 8 channels are constant over all images" in found.err
        assert found.layers["conv1"]["dead"] == 8
        net = caffe_messages().NetParameter()
        with open(found.output, "rb") as file:
            net.ParseFromString(file.read())
        assert all(np.isfinite(blob.data).all() for one in net.layer for blob in one.blobs)


def test_a_dead_channel_is_counted_and_the_others_are_normal(capsys, tmp_path, images, monkeypatch):
    monkeypatch.setattr(processes, "in_child", here)
    text = (DATA + layer("cut", "Threshold", "data", "", "threshold_param { threshold: 1e6 }")
            + layer("both", "Concat", "data cut")
            + layer("conv1", "Convolution", "both", "",
                    "convolution_param { num_output: 6 kernel_size: 1 group: 6 }")
            + RELU % (1, 1, 1)
            + layer("fc", "InnerProduct", "conv1", "", "inner_product_param { num_output: 2 }"))
    found = run(capsys, tmp_path, text, "-d", images)
    assert found.layers["conv1"]["dead"] == 3
    assert found.layers["fc"]["dead"] == 0
    assert found.layers["fc"]["std"] == pytest.approx(1, rel=1e-3)


# ---------------------------------------------------------------------------------------------
# Numbers, devices, places
# ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("options", [
    ("-t", "sift"), ("-bs", "0"), ("-bs", "two"), ("-nit", "-1"), ("-b", "nan"), ("-b", "inf"),
    ("-s", "1e99"), ("--alpha", "2"), ("--alpha", "0"), ("--alpha", "nan"), ("--mem-limit", "0"),
    ("--seed", "-1"), ("--seed", "99999999999"), ("--iterations", "0"), ("--mean", "1", "2"),
    ("--gpu", "-1"), ("--nonsense",), ("--mean", "nan", "0", "0")], ids=" ".join)
def test_absurd_options_are_named_by_flag_or_value(refused, options):
    message = refused(TOY, *options)
    assert options[0].strip("-") in message or options[-1] in message


def test_cpu_and_gpu_exclude_each_other(refused):
    assert "--gpu" in refused(TOY, "--gpu", "0")  # run() gives --cpu


@pytest.mark.parametrize("flag", ["output", "--report"])
def test_places_that_cannot_be_written_are_named_before_any_work(tmp_path, capsys, images, flag,
                                                                monkeypatch):
    monkeypatch.setattr(processes, "in_child", lambda *_: pytest.fail("it worked all the same"))
    (tmp_path / "net.prototxt").write_text(TOY)
    bad = str(tmp_path / "nowhere" / "file")
    output = bad if flag == "output" else str(tmp_path / "o.caffemodel")
    options = [] if flag == "output" else [flag, bad]
    for place in (bad, str(tmp_path)):
        options = [place if one == bad else one for one in options]
        output = place if flag == "output" else output
        assert magic_init.main([str(tmp_path / "net.prototxt"), output, "-d", images, "--cpu",
                                *options]) == 2
        assert place in capsys.readouterr().err
    assert os.listdir(str(tmp_path)) == ["net.prototxt"]


def test_weights_are_not_written_under_the_name_of_their_own_definition(capsys, tmp_path, images):
    (tmp_path / "net.prototxt").write_text(TOY)
    assert magic_init.main([str(tmp_path / "net.prototxt"), str(tmp_path / "new.prototxt"), "-d",
                            images, "--cpu", "-q"]) == 2
    assert "give OUTPUT a name like new.caffemodel" in capsys.readouterr().err
    assert os.listdir(str(tmp_path)) == ["net.prototxt"]


def test_a_report_is_not_written_over_the_definition_beside_output(refused, tmp_path):
    assert "out.prototxt would be written over" in refused(TOY, "--report",
                                                           str(tmp_path / "out.prototxt"))


@pytest.mark.parametrize("words, message", [
    (["--inspect"], "--inspect needs the weights to measure"),
    (["out", "--inspect", "--load", "net.prototxt"], "--inspect writes no weights"),
    (["--inspect", "-cs", "--load", "net.prototxt"], "--inspect writes no weights"),
    ([], "the OUTPUT to write is missing"),
    (["out", "--load", "gone"], "gone: no such file"),
    (["out", "surplus"], "unrecognized arguments: surplus"),
    (["out", "-d", "x.png", "--surplus"], "unrecognized arguments: --surplus"),
], ids=" ".join)
def test_commands_that_contradict_themselves_are_told(capsys, tmp_path, monkeypatch, words,
                                                      message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.prototxt").write_text(TOY)
    try:
        assert magic_init.main(["net.prototxt", *words]) == 2
    except SystemExit as end:
        assert end.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and message in said
    assert os.listdir(str(tmp_path)) == ["net.prototxt"]


def test_inspecting_weights_that_lack_a_layer_is_told(capsys, tmp_path, images, caffemodel,
                                                      monkeypatch):
    monkeypatch.setattr(processes, "in_child", here)
    (tmp_path / "net.prototxt").write_text(TOY)
    part = remove_layers(caffemodel, str(tmp_path / "part.caffemodel"), "fc4")
    assert magic_init.main([str(tmp_path / "net.prototxt"), "--inspect", "--load", part, "-d",
                            images, "--cpu"]) == 2
    assert "part.caffemodel has no weights for layer 'fc4'" in capsys.readouterr().err


def test_the_definition_is_never_overwritten(capsys, tmp_path, images):
    (tmp_path / "net.prototxt").write_text(TOY)
    assert magic_init.main([str(tmp_path / "net.prototxt"), str(tmp_path / "net.caffemodel"),
                            "-d", images, "--cpu", "-q"]) == 2
    assert "net.prototxt would be overwritten" in capsys.readouterr().err
    assert (tmp_path / "net.prototxt").read_text() == TOY
    assert magic_init.main([str(tmp_path / "net.prototxt"), str(tmp_path / "net.prototxt"),
                            "-d", images, "--cpu", "-q"]) == 2
    assert (tmp_path / "net.prototxt").read_text() == TOY


def test_no_file_of_a_command_is_written_over_another(refused, tmp_path, caffemodel):
    path = tmp_path / "net.prototxt"
    assert "net.prototxt would be written over" in refused(TOY, "--report", str(path))
    assert path.read_text() == TOY
    assert "out.caffemodel would" in refused(TOY, "--report",
                                               str(tmp_path / "out.caffemodel"))
    assert "toy.caffemodel would" in refused(TOY, "-l", caffemodel, "--report",
                                               caffemodel)


def test_a_caffemodel_may_be_written_over_the_one_it_came_from(capsys, tmp_path, images, caffemodel,
                                                               monkeypatch):
    monkeypatch.setattr(processes, "in_child", here)
    with open(caffemodel, "rb") as file:
        (tmp_path / "out.caffemodel").write_bytes(file.read())
    found = run(capsys, tmp_path, TOY, "-d", images, "-l", str(tmp_path / "out.caffemodel"), "-cs")
    assert found.status == 0
    assert {one["weights"] for one in found.report["layers"]} == {"loaded"}


def test_a_partly_loaded_net_names_what_it_lacks_only_in_the_table(capsys, tmp_path, images,
                                                                  caffemodel, monkeypatch):
    monkeypatch.setattr(processes, "in_child", here)
    part = remove_layers(caffemodel, str(tmp_path / "part.caffemodel"), "fc4")
    found = run(capsys, tmp_path, TOY, "-d", images, "-l", part)
    assert [line.split()[:2] for line in found.out.splitlines()[1:5]] == [
        ["conv1", "loaded"], ["conv2", "loaded"], ["fc3", "loaded"], ["fc4", "gaussian"]]
