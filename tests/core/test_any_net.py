"""The command on nets of all kinds: old dialects, data layers of their own, graphs; and rescaling
trained nets so that plain Caffe computes what it did before."""
import os

import cv2
import numpy as np
import pytest
from initialized import (
    AFFINE,
    BODY,
    CONV,
    DATA,
    RELU,
    TOY,
    by_channel,
    bytes_of,
    own_data_layer,
    pixels,
    plain_outputs,
    run,
    run_file,
    spread_on,
    stored_weights,
    write_images,
)
from toy_nets import image_input, layer, working_net
from written_database import write_database

import magic_init

FC = "inner_product_param { num_output: %d }"

pytestmark = pytest.mark.usefixtures("in_process")


def normal(outputs, names, beta=0.1, rtol=2e-3):
    for name in names:
        rows = by_channel(outputs[name])
        np.testing.assert_allclose(rows.mean(axis=1), beta, atol=2 * rtol, err_msg=name)
        np.testing.assert_allclose(rows.std(axis=1), 1, rtol=rtol, err_msg=name)


# ---------------------------------------------------------------------------------------------
# Dialects
# ---------------------------------------------------------------------------------------------

V1 = """
input: 'data' input_dim: 10 input_dim: 3 input_dim: 16 input_dim: 16
layers { name: 'conv1' type: CONVOLUTION bottom: 'data' top: 'conv1' blobs_lr: 0 blobs_lr: 0
  convolution_param { num_output: 8 kernel_size: 3 } }
layers { name: 'relu1' type: RELU bottom: 'conv1' top: 'conv1' }
layers { name: 'fc3' type: INNER_PRODUCT bottom: 'conv1' top: 'fc3'
  inner_product_param { num_output: 12 } }
layers { name: 'prob' type: SOFTMAX bottom: 'fc3' top: 'prob' }
"""
LEGACY = "input: 'data' input_shape { dim: 1 dim: 3 dim: 16 dim: 16 } " + BODY
TRAIN_VAL = (
    layer("data", "Data", "", "data label", "include { phase: TRAIN } transform_param { crop_size: "
          "16 } data_param { source: 'absent' batch_size: 9 }")
    + layer("data", "Data", "", "data label", "include { phase: TEST } transform_param { crop_size:"
            " 16 } data_param { source: 'absent' batch_size: 9 }") + BODY
    + layer("accuracy", "Accuracy", "fc4 label", "", "include { phase: TEST }")
    + layer("loss", "SoftmaxWithLoss", "fc4 label"))


@pytest.mark.parametrize("text, deploy, names", [
    (V1, V1, ["conv1", "fc3"]), (LEGACY, LEGACY, AFFINE), (TRAIN_VAL, TOY, AFFINE),
    (layer("data", "DummyData", "", "", "dummy_data_param { shape { dim: 2 dim: 3 dim: 16 dim: 16 "
           "} }") + BODY, TOY, AFFINE),
    (layer("data", "MemoryData", "", "data label", "memory_data_param { batch_size: 2 channels: 3 "
           "height: 16 width: 16 }") + BODY, TOY, AFFINE),
], ids=["V1", "legacy input", "train_val", "DummyData", "MemoryData"])
def test_every_dialect_gets_the_same_from_images(capsys, tmp_path, images, text, deploy, names):
    found = run(capsys, tmp_path, text, "-d", images, "-bs", "6", "-nit", "4", "-cs")
    assert found.status == 0, found.err
    assert list(found.layers) == names
    assert spread_on(deploy, found.output, pixels(images)) < 1.3
    assert run(capsys, tmp_path, text, "-d", images, "-bs", "6", "-nit", "4").status == 0
    (tmp_path / "deploy.prototxt").write_text(deploy)
    normal(plain_outputs(str(tmp_path / "deploy.prototxt"), found.output, pixels(images)), names)


def test_one_channel_gets_grey_images(capsys, tmp_path, images):
    text = image_input(1, 1, 12, 14) + layer("conv1", "Convolution", "data", "", CONV % (4, ""))
    found = run(capsys, tmp_path, text, "-d", images, "-bs", "6", "-nit", "4", "-s", "0.5")
    folder = os.path.dirname(images)
    grey = np.array([0.5 * (cv2.resize(cv2.imread(os.path.join(folder, name), cv2.IMREAD_GRAYSCALE),
                                       (14, 12)) - (0.114 * 104 + 0.587 * 117 + 0.299 * 123))
                     for name in sorted(os.listdir(folder))])[:, None]
    normal(plain_outputs(str(tmp_path / "net.prototxt"), found.output, grey), ["conv1"])


# ---------------------------------------------------------------------------------------------
# Data layers of the net's own
# ---------------------------------------------------------------------------------------------

def raw(images):
    """Images as uint8 (channels, SIDE, SIDE), in BGR."""
    return (pixels(images, mean=(0, 0, 0))).astype(np.uint8)


def data_layer(kind, folder, images):
    """The prototxt of a layer that feeds the images in batches of 4."""
    if kind == "LMDB":
        path = os.path.join(folder, "lmdb")
        write_database(path, [(one, 0) for one in raw(images)])
        return layer("data", "Data", "", "data label", "transform_param { mean_value: 104 "
                     "mean_value: 117 mean_value: 123 } data_param { source: '%s' batch_size: 4 "
                     "backend: LMDB }" % path)
    return own_data_layer(kind, folder, images)


@pytest.mark.parametrize("kind", ["LMDB", "ImageData", "HDF5"])
def test_without_images_the_nets_own_data_layer_feeds_it(capsys, tmp_path, images, kind):
    text = data_layer(kind, str(tmp_path), images) + BODY \
        + layer("loss", "SoftmaxWithLoss", "fc4 label")
    found = run(capsys, tmp_path, text, "-nit", "6", "-t", "kmeans", name="plain")
    assert found.status == 0, found.err
    assert found.report["images"] == 24  # batches of the layer's own size
    (tmp_path / "deploy.prototxt").write_text(TOY)
    normal(plain_outputs(str(tmp_path / "deploy.prototxt"), found.output, pixels(images)), AFFINE)
    calibrated = run(capsys, tmp_path, text, "-nit", "6", "-cs")
    assert spread_on(TOY, calibrated.output, pixels(images)) < 1.3
    rescaled = run(capsys, tmp_path, text, "-nit", "6", "-cs", "-l", found.output, name="rescaled")
    assert rescaled.status == 0, rescaled.err
    assert rescaled.report["output_difference"] < 1e-4


@pytest.mark.parametrize("layers", [
    layer("twice", "Power", "data", "data", "power_param { scale: 2 }"),
    layer("noise", "Dropout", "data", "data")], ids=["scaled", "dropped"])
def test_what_a_data_layer_gives_may_be_changed_in_place(capsys, tmp_path, images, layers):
    text = data_layer("ImageData", str(tmp_path), images) + layers + BODY \
        + layer("loss", "SoftmaxWithLoss", "fc4 label")
    found = run(capsys, tmp_path, text, "-nit", "6")
    assert found.status == 0, found.err
    (tmp_path / "deploy.prototxt").write_text(DATA + layers + BODY)
    normal(plain_outputs(str(tmp_path / "deploy.prototxt"), found.output, pixels(images)), AFFINE)


ABSENT = layer("data", "Data", "", "data label", "data_param { source: 'absent' batch_size: 9 }")
PYTHON = layer("data", "Python", "", "data label", "python_param { module: 'absent' layer: 'Own' }")
PRIVATE = layer("data", "PairedPictures", "", "data label")
UNKNOWN_SIZE = [ABSENT, PYTHON, PRIVATE]


@pytest.mark.parametrize("source", UNKNOWN_SIZE, ids=["database", "Python module", "layer type"])
def test_images_stand_for_a_data_layer_that_is_not_there(capsys, tmp_path, images, source):
    text = source + BODY + layer("loss", "SoftmaxWithLoss", "fc4 label")
    found = run(capsys, tmp_path, text, "-d", images, "-bs", "6", "-nit", "4", "--size", "16", "16")
    assert found.status == 0, found.err
    (tmp_path / "deploy.prototxt").write_text(TOY)
    normal(plain_outputs(str(tmp_path / "deploy.prototxt"), found.output, pixels(images)), AFFINE)


@pytest.mark.parametrize("beside", ["the net", "another net", "inside"])
def test_a_solver_stands_for_its_net(capsys, tmp_path, images, beside):
    folder = tmp_path / "solver"
    folder.mkdir()
    text = {"the net": "net: 'models/zoo/net.prototxt' base_lr: 0.1", "another net":
            "train_net: 'net.prototxt' test_net: 'absent' test_iter: 1", "inside":
            "net_param { %s } base_lr: 0.1" % TOY}[beside]
    (folder / "solver.prototxt").write_text(text)
    (folder / "net.prototxt").write_text(TOY)
    options = ["-d", images, "-bs", "6", "-nit", "4"]
    found = run_file(capsys, tmp_path, str(folder / "solver.prototxt"), *options)
    assert found.status == 0, found.err
    assert "a solver's definition" in found.err
    assert bytes_of(found.output) == bytes_of(run(capsys, tmp_path, TOY, *options,
                                                  name="other").output)


FIXED = {
    "Reshape": layer("conv1", "Convolution", "data", "", CONV % (8, "")) + layer(
        "flat", "Reshape", "conv1", "", "reshape_param { shape { dim: 10 dim: -1 } }")
    + layer("fc", "InnerProduct", "flat", "", FC % 7),
    "DummyData": layer("conv1", "Convolution", "data", "", CONV % (8, "")) + layer(
        "ones", "DummyData", "", "", "dummy_data_param { shape { dim: 10 dim: 8 dim: 14 dim: 14 } "
        "data_filler { value: 1 } }") + layer("sum", "Eltwise", "conv1 ones")
    + layer("fc", "InnerProduct", "sum", "", FC % 7),
}


@pytest.mark.parametrize("kind", FIXED)
def test_a_batch_size_that_the_definition_writes_out_is_kept(capsys, tmp_path, images, kind):
    text = DATA + FIXED[kind]
    found = run(capsys, tmp_path, text, "-d", images, "-bs", "6", "-nit", "2", "-cs")
    assert found.status == 0, found.err
    said = {"Reshape": "flat", "DummyData": "ones"}[kind]
    assert "layer '%s' writes out the number of images in a batch: it stays 10" % said in found.err
    assert found.report["images"] == 20
    assert found.report["spread_after"] < 1.5


# ---------------------------------------------------------------------------------------------
# Graphs
# ---------------------------------------------------------------------------------------------

TWO_OUTPUTS = DATA + layer("conv1", "Convolution", "data", "", CONV % (8, "")) + RELU % (1, 1, 1) \
    + layer("box", "Convolution", "conv1", "", CONV % (4, "")) \
    + layer("class", "InnerProduct", "conv1", "", FC % 6) + layer("prob", "Softmax", "class")
RESIDUAL = DATA + layer("conv1", "Convolution", "data", "", CONV % (6, "pad: 1")) \
    + layer("bn1", "BatchNorm", "conv1", "conv1") \
    + layer("scale1", "Scale", "conv1", "conv1", "scale_param { bias_term: true }") \
    + RELU % (1, 1, 1) \
    + layer("conv2", "Convolution", "conv1", "", CONV % (6, "pad: 1 bias_term: false")) \
    + layer("bn2", "BatchNorm", "conv2", "conv2") \
    + layer("scale2", "Scale", "conv2", "conv2", "scale_param { bias_term: true }") \
    + layer("sum", "Eltwise", "conv1 conv2") + layer("relu", "ReLU", "sum", "sum") \
    + layer("fc", "InnerProduct", "sum", "", FC % 7)
INCEPTION = DATA + layer("conv1", "Convolution", "data", "", CONV % (6, "")) + RELU % (1, 1, 1) \
    + layer("norm", "LRN", "conv1", "", "lrn_param { local_size: 3 alpha: 1e-2 }") \
    + layer("a", "Convolution", "norm", "", CONV % (4, "")) \
    + layer("b", "Convolution", "norm", "", CONV % (3, "")) + layer("cat", "Concat", "a b") \
    + layer("relu", "ReLU", "cat", "cat") + layer("fc", "InnerProduct", "cat", "", FC % 7)
SIGMOID = TOY.replace("type: 'ReLU'", "type: 'Sigmoid'")


def stages():
    """Two stages that refine an answer, and an answer that joins both."""
    text = DATA + layer("stem", "Convolution", "data", "", CONV % (8, "pad: 1"))
    bottom = "stem"
    for stage in ("p", "q"):
        for number in range(3):
            name = "%s%d" % (stage, number)
            text += layer(name, "Convolution", bottom, "", CONV % (6, "pad: 1")) \
                + layer(name + "_relu", "ReLU", name, name)
            bottom = name
        text += layer(stage, "Convolution", bottom, "", CONV % (4, "pad: 1"))
        if stage == "p":
            text += layer("both", "Concat", "stem p")
            bottom = "both"
    return text + layer("answer", "Concat", "p q")


# Two answers of unlike nets that a Sigmoid holds apart, too.
TWO_SIGMOIDS = DATA + layer("conv1", "Convolution", "data", "", CONV % (8, "")) \
    + layer("s1", "Sigmoid", "conv1", "conv1") \
    + layer("box", "Convolution", "conv1", "", CONV % (4, "")) \
    + layer("conv2", "Convolution", "conv1", "", CONV % (4, "")) \
    + layer("s2", "Sigmoid", "conv2", "conv2") \
    + layer("class", "InnerProduct", "conv2", "", FC % 60)


# Faint outputs of a Sigmoid make the last layer's rate so small that LRN damps nothing any more.
FAINT = DATA + layer("conv1", "Convolution", "data", "", CONV % (8, "")) \
    + layer("norm1", "LRN", "conv1", "", "lrn_param { local_size: 3 alpha: 3 }") \
    + layer("conv2", "Convolution", "norm1", "", CONV % (8, "")) \
    + layer("s2", "Sigmoid", "conv2", "conv2") \
    + layer("faint", "Power", "conv2", "", "power_param { scale: 1e-4 }") \
    + layer("output", "InnerProduct", "faint", "", FC % 60)


@pytest.mark.parametrize("text", [stages(), TWO_SIGMOIDS, FAINT],
                         ids=["joined answer", "two sigmoids", "faint outputs behind LRN"])
def test_from_scratch_rates_held_apart_get_power_layers(capsys, tmp_path, images, text):
    found = run(capsys, tmp_path, text, "-d", images, "-bs", "2", "-nit", "12", "-cs")
    assert found.status == 0, found.err
    assert any("Power" in line for line in found.report["changes"])
    written = (tmp_path / "out.prototxt").read_text()
    assert spread_on(written, found.output, pixels(images)[:8], draws=60) < 1.5


def test_no_warning_says_that_rates_are_held_apart_where_they_are_not(capsys, tmp_path, images):
    for seed in "0123":
        found = run(capsys, tmp_path, TWO_OUTPUTS, "-d", images, "-bs", "6", "-nit", "4", "-cs",
                    "--seed", seed)
        assert spread_on(TWO_OUTPUTS, found.output, pixels(images)[:12], draws=30) < 1.5
        assert "holds rates apart" not in found.err


def test_batch_normalization_gets_the_statistics_of_its_input(capsys, tmp_path, images):
    found = run(capsys, tmp_path, RESIDUAL, "-d", images, "-bs", "6", "-nit", "4")
    assert found.status == 0, found.err
    outputs = plain_outputs(str(tmp_path / "net.prototxt"), found.output, pixels(images))
    stored = stored_weights(found.output)
    for below, norm in (("conv1", "bn1"), ("conv2", "bn2")):
        mean, variance, correction = stored[norm]
        rows = by_channel(outputs[below])
        np.testing.assert_allclose(mean / correction, rows.mean(axis=1), atol=1e-3)
        np.testing.assert_allclose(variance / correction, rows.var(axis=1), rtol=5e-3)
    normal(outputs, ["conv1", "scale1", "scale2", "fc"], rtol=5e-3)
    assert found.layers["scale1"]["weights"] == "ones"


@pytest.mark.parametrize("text, goal", [(TWO_OUTPUTS, 1.4), (RESIDUAL, 2), (INCEPTION, 1.2),
                                        (SIGMOID, 1.25)],
                         ids=["two outputs", "residual", "concat", "sigmoids"])
def test_graphs_from_scratch_train_at_one_rate(capsys, tmp_path, images, text, goal):
    seed = "4" if text == RESIDUAL else "0"  # with which BatchNorm holds rates apart
    found = run(capsys, tmp_path, text, "-d", images, "-bs", "6", "-nit", "4", "-cs", "-t", "pca",
                "--seed", seed)
    assert found.status == 0, found.err
    beside = tmp_path / "out.prototxt"
    assert beside.exists() == (text in (SIGMOID, RESIDUAL))
    written = beside.read_text() if beside.exists() else text
    assert spread_on(written, found.output, pixels(images), draws=30) < goal
    assert all(np.isfinite(blob).all() for blobs in stored_weights(found.output).values()
               for blob in blobs)


# ---------------------------------------------------------------------------------------------
# Rescaling
# ---------------------------------------------------------------------------------------------

def trained(tmp_path, text):
    """A caffemodel of random weights whose layers' rates lie far apart; its path."""
    working = working_net(text, 1)
    for number, one in enumerate(working.affine):
        one.weights[...] *= 2.0 ** (number % 3) / np.sqrt(one.weights.size)
    path = str(tmp_path / "trained.caffemodel")
    working.net.save(path)
    return path


@pytest.mark.parametrize("text, changed, goal", [
    (TOY, None, 1.5), (TWO_OUTPUTS, "Power", 1.5), (RESIDUAL, "eps", 2), (INCEPTION, "alpha", 1.5),
    (SIGMOID, "Power", 1.5)], ids=["chain", "two outputs", "residual", "LRN", "sigmoids"])
def test_a_rescaled_net_computes_the_same_at_one_rate(capsys, tmp_path, images, text, changed,
                                                     goal):
    old = trained(tmp_path, text)
    found = run(capsys, tmp_path, text, "-d", images, "-bs", "6", "-nit", "4", "-cs", "-l", old)
    assert found.status == 0, found.err
    assert found.report["spread_before"] > 2
    assert found.report["spread_after"] < 2 * goal  # on the six images held back
    assert found.report["output_difference"] < 1e-3
    beside = tmp_path / "out.prototxt"
    assert beside.exists() == (changed is not None)
    definition = str(beside if beside.exists() else tmp_path / "net.prototxt")
    if changed:
        assert any(changed in line for line in found.report["changes"])
        text_of = beside.read_text()
        assert all("# %s\n" % line in text_of for line in found.report["changes"])
    inputs = pixels(write_images(str(tmp_path / "others"), 5, seed=3))
    before = plain_outputs(str(tmp_path / "net.prototxt"), old, inputs)
    after = plain_outputs(definition, found.output, inputs)
    outputs = [name for name in ("fc4", "prob", "fc", "box", "class") if name in before]
    for name in outputs:
        after_name = name + "_rescale" if name + "_rescale" in after else name
        assert np.abs(after[after_name] - before[name]).max() < 1e-3 * before[name].std()
    with open(definition) as file:
        assert spread_on(file.read(), found.output, inputs) < goal


def test_layers_whose_weights_get_no_gradient_are_named(capsys, tmp_path, images):
    working = working_net(TOY, 1)
    working.affine[1].blobs[1].data[...] = -1e6  # its ReLU lets nothing through
    old = str(tmp_path / "dead.caffemodel")
    working.net.save(old)
    found = run(capsys, tmp_path, TOY, "-d", images, "-bs", "6", "-cs", "-l", old)
    assert found.status == 0
    assert "of layer 'conv1', layer 'conv2', layer 'fc3' get no gradient" in found.err
    assert [name for name in AFFINE if found.layers[name]["rate_after"] == 0] == AFFINE[:3]


def test_a_difference_of_outputs_is_refused_but_with_force(capsys, tmp_path, images, monkeypatch):
    monkeypatch.setattr(magic_init, "TOLERANCE", -1.0)
    old = trained(tmp_path, SIGMOID)
    options = ["-d", images, "-bs", "6", "-cs", "-l", old]
    found = run(capsys, tmp_path, SIGMOID, *options)
    assert found.status == 2
    assert "differ by" in found.err and "--force" in found.err
    assert sorted(os.listdir(str(tmp_path))) == ["net.prototxt", "trained.caffemodel"]
    found = run(capsys, tmp_path, SIGMOID, *options, "--force")
    assert found.status == 0
    assert {"out.caffemodel", "out.prototxt"} <= set(os.listdir(str(tmp_path)))


def test_a_definition_from_another_run_is_told_and_left(capsys, tmp_path, images):
    (tmp_path / "out.prototxt").write_text("mine")
    found = run(capsys, tmp_path, TOY, "-d", images, "-bs", "6", "-cs")
    assert "out.prototxt is from another run" in found.err
    assert (tmp_path / "out.prototxt").read_text() == "mine"


def test_a_rescaled_net_can_be_rescaled_again(capsys, tmp_path, images):
    old = trained(tmp_path, SIGMOID)
    options = ["-d", images, "-bs", "6", "-cs"]
    first = run(capsys, tmp_path, SIGMOID, *options, "-l", old, name="first")
    text = (tmp_path / "first.prototxt").read_text()
    second = run(capsys, tmp_path, text, *options, "-l", first.output, name="second")
    assert second.status == 0, second.err
    assert second.report["spread_before"] == pytest.approx(first.report["spread_after"], rel=0.3)
    assert second.report["output_difference"] < 1e-3


def test_layers_that_learn_nothing_count_all_the_same(capsys, tmp_path, images):
    frozen = TOY.replace("convolution_param", "param { lr_mult: 0 } param { lr_mult: 0 } "
                         "convolution_param")
    options = ["-d", images, "-bs", "6", "-cs"]
    one = run(capsys, tmp_path, TOY, *options, name="one")
    two = run(capsys, tmp_path, frozen, *options, name="two")
    for name in AFFINE:
        assert two.layers[name]["rate_after"] == pytest.approx(one.layers[name]["rate_after"])


def test_shared_weights_are_set_once(capsys, tmp_path, images):
    shared = "param { name: 'w' } param { name: 'b' } " + CONV % (4, "pad: 1")
    text = DATA + layer("one", "Convolution", "data", "", shared) \
        + layer("down", "Pooling", "data", "", "pooling_param { kernel_size: 2 stride: 2 }") \
        + layer("two", "Convolution", "down", "", shared) + layer("up", "Flatten", "one") \
        + layer("low", "Flatten", "two") + layer("cat", "Concat", "up low") \
        + layer("fc", "InnerProduct", "cat", "", FC % 3)
    found = run(capsys, tmp_path, text, "-d", images, "-bs", "6", "-cs")
    assert found.status == 0, found.err
    assert found.layers["two"]["weights"] == "shares one"
    stored = stored_weights(found.output)
    for one, other in zip(stored["one"], stored["two"]):
        np.testing.assert_array_equal(one, other)
    assert found.layers["two"]["rate_after"] is None
    assert found.report["spread_after"] < 1.2


def test_channels_may_be_folded_into_the_batch(capsys, tmp_path, images):
    text = DATA + layer("conv1", "Convolution", "data", "", CONV % (4, "")) \
        + layer("fold", "Reshape", "conv1", "", "reshape_param { shape { dim: -1 dim: 2 dim: 14 "
                "dim: 14 } }") + layer("conv2", "Convolution", "fold", "", CONV % (3, "")) \
        + layer("fc", "InnerProduct", "conv2", "", FC % 2)
    found = run(capsys, tmp_path, text, "-d", images, "-bs", "6", "-cs")
    assert found.status == 0, found.err
    assert found.report["spread_after"] < 1.3
