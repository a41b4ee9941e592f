"""The command on nets of all kinds: old dialects, data layers of their own, graphs; and rescaling
trained nets so that plain Caffe computes what it did before."""
import os

import cv2
import numpy as np
import pytest
from initialised import (
    AFFINE,
    BODY,
    CONV,
    DATA,
    RELU,
    TOY,
    by_channel,
    here,
    pixels,
    plain_outputs,
    run,
    stored_weights,
    write_images,
)
from toy_nets import image_input, layer, working_net

import image_database
import magic_init
from ddinit import change_rates, processes
from ddinit.prototxt import import_caffe
from ddinit.scales import ScaleGraph

FC = "inner_product_param { num_output: %d }"


@pytest.fixture(autouse=True)
def in_process(monkeypatch):
    monkeypatch.setattr(processes, "in_child", here)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(str(tmp_path_factory.mktemp("images")), 12)


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
    found = run(capsys, tmp_path, text, "-d", images, "-bs", "6", "-nit", "2", "-cs")
    assert found.status == 0, found.err
    assert list(found.layers) == names
    assert found.report["spread_after"] < 1.1
    assert run(capsys, tmp_path, text, "-d", images, "-bs", "6", "-nit", "2").status == 0
    (tmp_path / "deploy.prototxt").write_text(deploy)
    normal(plain_outputs(str(tmp_path / "deploy.prototxt"), found.output, pixels(images)), names)


def test_one_channel_gets_grey_images(capsys, tmp_path, images):
    text = image_input(1, 1, 12, 14) + layer("conv1", "Convolution", "data", "", CONV % (4, ""))
    found = run(capsys, tmp_path, text, "-d", images, "-bs", "6", "-nit", "2", "-s", "0.5")
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


def write_hdf5(path, data):
    """Write a dataset 'data' with Caffe's own HDF5Output layer, which takes two blobs."""
    caffe = import_caffe()
    definition = path + ".prototxt"
    shape = " ".join("dim: %d" % one for one in data.shape)
    with open(definition, "w") as file:
        file.write(layer("in", "Input", "", "a b", "input_param { shape { %s } shape { dim: %d } }"
                         % (shape, len(data)))
                   + layer("out", "HDF5Output", "a b", "", "hdf5_output_param { file_name: '%s' }"
                           % path).replace("top: 'out'", ""))
    net = caffe.Net(definition, caffe.TEST)
    net.blobs["a"].data[...] = data
    net.forward()
    del net  # closes the file


def data_layer(kind, folder, images):
    """The prototxt of a layer that feeds the images in batches of 4."""
    if kind == "LMDB":
        path = os.path.join(folder, "lmdb")
        image_database.write_database(path, [(one, 0) for one in raw(images)])
        return layer("data", "Data", "", "data label", "transform_param { mean_value: 104 "
                     "mean_value: 117 mean_value: 123 } data_param { source: '%s' batch_size: 4 "
                     "backend: LMDB }" % path)
    if kind == "ImageData":
        listing = os.path.join(folder, "list.txt")
        names = sorted(os.listdir(os.path.dirname(images)))
        with open(listing, "w") as file:
            file.write("".join("%s 0\n" % os.path.join(os.path.dirname(images), name)
                               for name in names))
        return layer("data", "ImageData", "", "data label", "transform_param { mean_value: 104 "
                     "mean_value: 117 mean_value: 123 } image_data_param { source: '%s' "
                     "batch_size: 4 new_height: 16 new_width: 16 }" % listing)
    path = os.path.join(folder, "images.h5")
    write_hdf5(path, pixels(images).astype(np.float32))
    with open(os.path.join(folder, "h5.txt"), "w") as file:
        file.write(path + "\n")
    return layer("data", "HDF5Data", "", "data", "hdf5_data_param { source: '%s' batch_size: 4 }"
                 % os.path.join(folder, "h5.txt"))


@pytest.mark.parametrize("kind", ["LMDB", "ImageData", "HDF5"])
def test_without_images_the_nets_own_data_layer_feeds_it(capsys, tmp_path, images, kind):
    text = data_layer(kind, str(tmp_path), images) + BODY
    if kind != "HDF5":
        text += layer("loss", "SoftmaxWithLoss", "fc4 label")
    found = run(capsys, tmp_path, text, "-nit", "3", "-t", "kmeans", name="plain")
    assert found.status == 0, found.err
    assert found.report["images"] == 12  # batches of the layer's own size
    (tmp_path / "deploy.prototxt").write_text(TOY)
    normal(plain_outputs(str(tmp_path / "deploy.prototxt"), found.output, pixels(images)), AFFINE)
    calibrated = run(capsys, tmp_path, text, "-nit", "3", "-cs")
    assert calibrated.report["spread_after"] < 1.1
    rescaled = run(capsys, tmp_path, text, "-nit", "3", "-cs", "-l", found.output, name="rescaled")
    assert rescaled.status == 0, rescaled.err
    assert rescaled.report["output_difference"] < 1e-4


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


def test_batch_normalisation_gets_the_statistics_of_its_input(capsys, tmp_path, images):
    found = run(capsys, tmp_path, RESIDUAL, "-d", images, "-bs", "6", "-nit", "2")
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


@pytest.mark.parametrize("text, goal", [(TWO_OUTPUTS, 1.2), (RESIDUAL, 2), (INCEPTION, 1.2),
                                        (SIGMOID, 1.25)],
                         ids=["two outputs", "residual", "concat", "sigmoids"])
def test_graphs_from_scratch_train_at_one_rate(capsys, tmp_path, images, text, goal):
    seed = "4" if text == RESIDUAL else "0"  # with which BatchNorm holds rates apart
    found = run(capsys, tmp_path, text, "-d", images, "-bs", "6", "-nit", "2", "-cs", "-t", "pca",
                "--seed", seed)
    assert found.status == 0, found.err
    assert found.report["spread_after"] < goal
    assert os.path.exists(str(tmp_path / "out.prototxt")) == (text in (SIGMOID, RESIDUAL))
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
    found = run(capsys, tmp_path, text, "-d", images, "-bs", "6", "-nit", "2", "-cs", "-l", old)
    assert found.status == 0, found.err
    assert found.report["spread_before"] > 2
    assert found.report["spread_after"] < goal  # on the six images held back
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
        working = working_net(file.read(), len(inputs))
    for one in working.layers:
        for blob, values in zip(one.blobs, stored_weights(found.output).get(one.name, [])):
            blob.data[...] = values
    working.blob("data").data[...] = inputs
    working.forward()
    rates = change_rates.measure(ScaleGraph(working), np.random.default_rng(5))
    assert change_rates.spread(rates.by_layer()) < 1.5 * goal


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
    assert found.report["spread_after"] < 1.1
