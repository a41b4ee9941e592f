"""The command from images to caffemodel: what every flag does, told by plain Caffe."""
import json
import os
import re
import subprocess
import sys

import cv2
import numpy as np
import pytest
import skimage.data
from initialized import (
    AFFINE,
    TOY,
    by_channel,
    bytes_of,
    pixels,
    plain_outputs,
    rates_on,
    remove_layers,
    run,
    spread_on,
    stored_weights,
    write_images,
)

import magic_init
from ddinit.prototxt import caffe_messages
from ddinit.weights import KINDS
from ddinit.within import normalization

ROOT = os.path.dirname(os.path.abspath(magic_init.__file__))

pytestmark = pytest.mark.usefixtures("in_process")


@pytest.fixture
def start(capsys, tmp_path, images):
    """Run the command on TOY and all images in 3 batches of 8, with further options."""
    def run_toy(*options, name="out", definition=TOY):
        return run(capsys, tmp_path, definition, "-d", images, "-bs", "8", "-nit", "3", *options,
                   name=name)
    return run_toy


def normal(prototxt, caffemodel, inputs, names, beta=0.1, rtol=2e-3):
    """Assert that every channel of some layers' outputs has mean beta and std 1."""
    outputs = plain_outputs(str(prototxt), caffemodel, inputs)
    for name in names:
        rows = by_channel(outputs[name])
        np.testing.assert_allclose(rows.mean(axis=1), beta, atol=2 * rtol, err_msg=name)
        np.testing.assert_allclose(rows.std(axis=1), 1, rtol=rtol, err_msg=name)


# ---------------------------------------------------------------------------------------------
# Within layers
# ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", KINDS)
def test_outputs_of_every_channel_have_mean_beta_and_std_1(start, tmp_path, images, kind):
    found = start("-t", kind)
    assert found.status == 0
    normal(tmp_path / "net.prototxt", found.output, pixels(images), AFFINE)
    gaussian = kind in ("gaussian", "elwise")
    assert [one["weights"] for one in found.report["layers"]] == [
        "gaussian" if gaussian else kind] * 2 + ["gaussian"] * 2
    for one in found.report["layers"]:
        assert one["mean"] == pytest.approx(0.1, abs=1e-3)
        assert one["std"] == pytest.approx(1, rel=1e-3)
        assert one["dead"] == 0


def test_bias_scale_and_mean_are_used(start, tmp_path, images):
    found = start("-b", "-0.5", "-s", "0.0078125", "--mean", "10", "200", "30")
    inputs = pixels(images, mean=(10, 200, 30), scale=0.0078125)
    normal(tmp_path / "net.prototxt", found.output, inputs, AFFINE, beta=-0.5)
    weights = stored_weights(found.output)["conv1"][0]
    plain = stored_weights(start(name="plain").output)["conv1"][0]
    assert weights.std() > 30 * plain.std()  # inputs are 128 times smaller


def test_convolutions_differ_by_type_and_fully_connected_layers_are_gaussian(start):
    first = {kind: stored_weights(start("-t", kind, name=kind).output)["conv1"][0]
             for kind in KINDS}
    assert (first["gaussian"] == first["elwise"]).all()
    kinds = ["gaussian", "pca", "zca", "kmeans", "rand"]
    for number, one in enumerate(kinds):
        for other in kinds[number + 1:]:
            assert (first[one] != first[other]).any()


def test_pca_filters_are_uncorrelated_on_what_they_see(start, tmp_path, images):
    found = start("-t", "pca")
    rows = by_channel(plain_outputs(str(tmp_path / "net.prototxt"), found.output,
                                    pixels(images))["conv1"])
    correlation = np.corrcoef(rows)[:3, :3]
    assert np.abs(correlation - np.eye(3)).max() < 0.25
    gaussian = by_channel(plain_outputs(str(tmp_path / "net.prototxt"),
                                        start(name="g").output, pixels(images))["conv1"])
    assert np.abs(np.corrcoef(gaussian)[:3, :3] - np.eye(3)).max() > 0.3


def test_names_of_the_released_tools_quick_variants_are_understood(start):
    assert bytes_of(start("-t", "fast_kmeans").output) == bytes_of(
        start("-t", "kmeans", name="other").output)


def test_without_within_weights_are_as_drawn_and_biases_beta(start):
    found = start("--no-within", "-b", "0.25")
    for name, (weights, bias) in stored_weights(found.output).items():
        assert weights.std() == pytest.approx(0.01, rel=0.3), name
        assert (bias == 0.25).all()
    assert found.layers["fc4"]["std"] < 0.1


def test_without_within_data_driven_weights_are_white_as_they_come(start, tmp_path, images):
    found = start("--no-within", "-t", "pca")
    rows = by_channel(plain_outputs(str(tmp_path / "net.prototxt"), found.output,
                                    pixels(images))["conv1"])
    np.testing.assert_allclose(rows.std(axis=1)[:5], 1, rtol=0.3)
    assert np.abs(rows.std(axis=1) - 1).max() > 0.003


# ---------------------------------------------------------------------------------------------
# Between layers
# ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("options", [(), ("--no-within",), ("-t", "kmeans"),
                                     ("--no-within", "-t", "pca")], ids=" ".join)
def test_calibrated_layers_train_at_one_rate_on_other_images(start, tmp_path, images, options):
    other = pixels(write_images(str(tmp_path / "other"), 32, seed=9))
    before, after = start(*options), start("-cs", *options, name="calibrated")
    assert not os.path.exists(str(tmp_path / "calibrated.prototxt"))
    # rates of 5 outputs, from 24 images in all and 16 of them for the last step
    assert spread_on(TOY, after.output, pixels(images)) < 1.3
    assert spread_on(TOY, after.output, other) < 1.4
    assert spread_on(TOY, before.output, other) > 5
    # what the command itself measures has 24 random losses of 5 outputs
    assert after.report["spread_after"] < 1.5
    assert after.report["spread_before"] == pytest.approx(before.report["spread_before"], rel=0.3)


def test_rates_in_the_report_are_those_of_caffes_gradients(start, images):
    for options in ((), ("--literal",)):
        found = start(*options)
        expected = rates_on(TOY, found.output, pixels(images))
        for name, rate in expected.items():
            weights = found.layers[name]["size"] if options else 1
            assert found.layers[name]["rate_after"] == pytest.approx(
                rate / np.sqrt(weights), rel=0.3)


def test_calibration_keeps_a_chains_outputs_and_reports_what_inner_layers_put_out(start, tmp_path,
                                                                                 images):
    before, after = start(), start("-cs", name="calibrated")
    prototxt, inputs = str(tmp_path / "net.prototxt"), pixels(images)
    one, two = [plain_outputs(prototxt, found.output, inputs) for found in (before, after)]
    np.testing.assert_allclose(two["fc4"], one["fc4"], atol=1e-3)
    for name in AFFINE:
        assert after.layers[name]["mean"] == pytest.approx(two[name].mean(), abs=1e-3)
        assert after.layers[name]["std"] == pytest.approx(two[name].std(), rel=1e-3)
    assert np.abs(two["conv1"].std() - 1) > 0.05


@pytest.mark.parametrize("std", ["0.5", "3"])
def test_outputs_get_the_std_that_is_asked_for(start, tmp_path, images, std):
    found = start("-cs", "--output-std", std)
    outputs = plain_outputs(str(tmp_path / "net.prototxt"), found.output, pixels(images))
    assert outputs["fc4"].std() == pytest.approx(float(std), rel=0.2)
    assert spread_on(TOY, found.output, pixels(images)) < 1.3


def test_the_papers_schedule_leaves_what_ten_steps_of_a_quarter_leave(start, images):
    before, at_once = start(name="before"), start("-cs")
    slowly = start("-cs", "--alpha", "0.25", "--iterations", "10", name="slow")
    left = 0.75 ** 10  # of log rates, by the definition of r_k
    inputs = pixels(images)
    assert np.log(spread_on(TOY, slowly.output, inputs)) == pytest.approx(
        left * np.log(spread_on(TOY, before.output, inputs)), abs=0.15)
    ones, others = stored_weights(at_once.output), stored_weights(slowly.output)
    for name in AFFINE:
        assert others[name][0].std() == pytest.approx(ones[name][0].std(), rel=0.25)


def test_neither_step_writes_the_baseline_and_its_rates(start):
    found = start("--no-within")
    assert found.report["spread_before"] == found.report["spread_after"] > 1
    assert found.report["output_difference"] is None


# ---------------------------------------------------------------------------------------------
# Loading
# ---------------------------------------------------------------------------------------------

def test_layers_missing_in_the_loaded_caffemodel_are_initialized_and_no_others(start, tmp_path,
                                                                             images):
    whole = start("--no-within", name="whole")
    part = remove_layers(whole.output, str(tmp_path / "part.caffemodel"), "fc4", "conv2")
    found = start("-l", part, "-t", "pca")
    assert [one["weights"] for one in found.report["layers"]] == [
        "loaded", "pca", "loaded", "gaussian"]
    old, new = stored_weights(whole.output), stored_weights(found.output)
    for name in ("conv1", "fc3"):
        for one, other in zip(old[name], new[name]):
            np.testing.assert_array_equal(one, other)
    normal(tmp_path / "net.prototxt", found.output, pixels(images), ("conv2", "fc4"))


def test_zero_initializes_loaded_layers_too(start, tmp_path, images):
    whole = start("--no-within", name="whole")
    found = start("-l", whole.output, "-z")
    assert {one["weights"] for one in found.report["layers"]} == {"gaussian"}
    normal(tmp_path / "net.prototxt", found.output, pixels(images), AFFINE)


def test_loading_alone_changes_nothing(start):
    whole = start(name="whole")
    found = start("-l", whole.output, name="same")
    assert {one["weights"] for one in found.report["layers"]} == {"loaded"}
    old, new = stored_weights(whole.output), stored_weights(found.output)
    assert all((one == other).all() for name in AFFINE for one, other in zip(old[name], new[name]))


def test_fillers_of_the_definition_are_never_used(start):
    filled = TOY.replace("kernel_size: 3", "kernel_size: 3 weight_filler { type: 'constant' "
                         "value: 7 } bias_filler { type: 'constant' value: 9 }")
    assert bytes_of(start(definition=filled).output) != b""
    one, other = [stored_weights(start(definition=text, name=name).output)
                  for text, name in ((TOY, "a"), (filled, "b"))]
    assert all((one[name][0] == other[name][0]).all() for name in AFFINE)


# ---------------------------------------------------------------------------------------------
# Images, memory, seeds
# ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("size, batches, used", [("8", "2", 16), ("5", "10", 20), ("16", "10", 24),
                                                 ("100", "1", 24), ("1", "3", 3)])
def test_as_many_images_are_used_as_were_asked_for_and_are_there(capsys, tmp_path, images, size,
                                                                batches, used):
    found = run(capsys, tmp_path, TOY, "-d", images, "-bs", size, "-nit", batches)
    assert found.report["images"] == used


def test_a_folder_stands_for_the_images_in_it(start, capsys, tmp_path, images):
    found = run(capsys, tmp_path, TOY, "-d", os.path.dirname(images), "-bs", "8", "-nit", "3",
                name="folder")
    assert bytes_of(found.output) == bytes_of(start().output)


@pytest.mark.parametrize("where", ["unquoted pattern", "list", "list with labels", "parts"])
def test_images_may_be_named_in_many_ways(start, capsys, tmp_path, images, where):
    folder = os.path.dirname(images)
    paths = [os.path.join(folder, name) for name in sorted(os.listdir(folder))]
    listing = tmp_path / "list.txt"
    listing.write_text("".join(path + (" 7" if "labels" in where else "") + "\n"
                               for path in paths))
    words = {"unquoted pattern": paths, "parts": [os.path.join(folder, "00*"),
                                                  os.path.join(folder, "0[12]*")]}
    found = run(capsys, tmp_path, TOY, "-bs", "8", "-d", *words.get(where, [str(listing)]), "-nit",
                "3", name="named")
    assert found.status == 0, found.err
    assert bytes_of(found.output) == bytes_of(start().output)


@pytest.mark.parametrize("form", ["number", "npy", "binaryproto"])
def test_the_mean_may_be_a_number_or_a_file(start, tmp_path, form):
    color = (90, 90, 90) if form == "number" else (10, 200, 30)
    picture = np.broadcast_to(np.reshape(color, (3, 1, 1)), (3, 20, 30)).astype(np.float32)
    blob = caffe_messages().BlobProto(num=1, channels=3, height=20, width=30,
                                      data=picture.ravel())
    np.save(str(tmp_path / "mean.npy"), picture)
    (tmp_path / "mean.binaryproto").write_bytes(blob.SerializeToString())
    word = "90" if form == "number" else str(tmp_path / ("mean." + form))
    assert bytes_of(start("--mean", word).output) == bytes_of(
        start("--mean", *map(str, color), name="color").output)


def test_a_memory_limit_changes_no_bit_and_is_told(start):
    free, tight = start(), start("--mem-limit", "1", name="tight")
    assert free.report["notes"] == []
    assert bytes_of(free.output) == bytes_of(tight.output)
    wide = TOY.replace("num_output: 8", "num_output: 64")
    free = start(definition=wide)
    tight = start("--mem-limit", "1", name="tight", definition=wide)
    assert bytes_of(free.output) == bytes_of(tight.output)
    assert "--mem-limit 1" in tight.err and "--mem-limit" not in free.err


def test_a_seed_repeats_bit_by_bit_and_another_differs(start):
    options = ("-t", "kmeans", "-cs")
    one, same, other = [start(*options, "--seed", seed, name=name)
                        for seed, name in (("3", "a"), ("3", "b"), ("4", "c"))]
    assert bytes_of(one.output) == bytes_of(same.output) != bytes_of(other.output)


# ---------------------------------------------------------------------------------------------
# What a person sees
# ---------------------------------------------------------------------------------------------

def test_the_report_says_what_was_measured_and_how_to_repeat_it(start):
    found = start("-cs", "-t", "rand", "--seed", "5")
    report = found.report
    assert set(report) == {
        "command", "seed", "versions", "definition", "output", "type", "bias", "calibrated",
        "images", "layers", "spread_before", "spread_after", "changes", "notes",
        "output_difference", "seconds"}
    assert set(report["layers"][0]) == {
        "name", "type", "weights", "size", "mean", "std", "dead", "rate_before", "rate_after",
        "variation_before", "variation_after"}
    assert report["seed"] == 5 and "--seed" in report["command"]
    assert [one["size"] for one in report["layers"]] == [8 * 27, 6 * 4 * 9, 12 * 6 * 49, 60]
    assert {"set up", "within layers", "between layers", "in all"} <= set(report["seconds"])
    assert {"magic_init", "python", "numpy", "caffe"} <= set(report["versions"])
    assert all(one["variation_after"] > 0.005 for one in report["layers"])


def test_the_table_has_a_row_for_every_layer(start):
    found = start("-cs", "-t", "zca")
    lines = found.out.splitlines()
    assert lines[0].split() == ["layer", "weights", "mean", "std", "rate", "before", "rate",
                                "after", "variation"]
    assert [line.split()[0] for line in lines[1:5]] == AFFINE
    assert lines[1].split()[1] == "zca"
    for line, one in zip(lines[1:5], found.report["layers"]):
        assert float(line.split()[-2]) == pytest.approx(one["rate_after"], rel=1e-3)
    assert re.match(r"largest over smallest rate: [\d.]+ before, 1\.\d* after$", lines[5])
    assert re.search(r"wrote .*out.caffemodel from 24 images in [\d.]+ s", found.err)


def test_quiet_says_nothing(start):
    found = start("-q", "-cs")
    assert (found.status, found.out, found.err) == (0, "", "")


def test_bars_are_for_terminals(start):
    assert "%|" not in start("-cs").err


def test_the_program_itself_initializes_caffenet_tiny_from_photographs(tmp_path):
    photographs = tmp_path / "photographs"
    photographs.mkdir()
    for name in ("astronaut", "coffee", "chelsea", "rocket"):
        image = getattr(skimage.data, name)()[:, :, ::-1]
        height, width = image.shape[:2]
        for number, (top, left) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
            part = image[top * height // 3:top * height // 3 + height * 2 // 3,
                         left * width // 3:left * width // 3 + width * 2 // 3]
            assert cv2.imwrite(str(photographs / ("%s%d.jpg" % (name, number))), part)
    found = subprocess.run(
        [sys.executable, "magic_init.py", "models/caffenet_tiny/deploy.prototxt",
         str(tmp_path / "tiny.caffemodel"), "--data", str(photographs / "*.jpg"), "--type",
         "kmeans", "--calibrate", "--cpu", "--report",
         str(tmp_path / "tiny.json")], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        universal_newlines=True, timeout=200, check=False)
    assert found.returncode == 0, found.stderr
    assert len(found.stdout.splitlines()) == 10
    with open(str(tmp_path / "tiny.json")) as file:
        report = json.load(file)
    assert report["spread_after"] < 1.25 < report["spread_before"]
    assert sorted(os.listdir(str(tmp_path))) == ["photographs", "tiny.caffemodel", "tiny.json"]
    images = np.array([
        cv2.resize(cv2.imread(str(path)), (99, 99)).astype(np.float64).transpose(2, 0, 1)
        - np.reshape([104, 117, 123], (3, 1, 1)) for path in sorted(photographs.iterdir())])
    with open(os.path.join(ROOT, "models/caffenet_tiny/deploy.prototxt")) as file:
        assert spread_on(file.read(), str(tmp_path / "tiny.caffemodel"), images, 10) < 1.35


def test_normalization_by_hand():
    factor, shift, constant = normalization(
        np.array([2.0, -1.0, 5.0]), np.array([4.0, 4.0, 0.0]), 0.1)
    np.testing.assert_allclose(factor, [0.5, 0.5, 0.5])  # the constant one: as the others
    np.testing.assert_allclose(shift, [-0.9, 0.6, -2.4])
    np.testing.assert_array_equal(constant, [False, False, True])
    factor, shift, constant = normalization(np.zeros(2), np.zeros(2), 0.1)
    np.testing.assert_array_equal(factor, 1)
    assert constant.all()

