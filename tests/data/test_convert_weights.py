"""convert_weights.py keeps a net's function: checked by running both nets from outside."""
import cv2
import numpy as np
import pytest
from google.protobuf import text_format

import convert_weights
from ddinit import caffemodel
from ddinit.prototxt import build_net, caffe_messages, read_definition

NET = """
layer { name: "data" type: "Input" top: "data"
        input_param { shape { dim: 2 dim: %(depth)d dim: 9 dim: 9 } } }
layer { name: "conv1" type: "Convolution" bottom: "data" top: "conv1"
        convolution_param { num_output: 4 kernel_size: 3 stride: 2 pad: %(pad)d } }
%(behind)s
layer { name: "relu1" type: "ReLU" bottom: "conv1" top: "relu1" }
layer { name: "conv2" type: "Convolution" bottom: "relu1" top: "conv2"
        convolution_param { num_output: 6 kernel_size: 3 pad: 1 group: %(group)d } }
layer { name: "relu2" type: "ReLU" bottom: "conv2" top: "conv2" }
%(head)s
"""
FULLY_CONNECTED = """
layer { name: "fc6" type: "InnerProduct" bottom: "conv2" top: "fc6"
        inner_product_param { num_output: 5 } }"""
FULLY_CONVOLUTIONAL = """
layer { name: "fc6-conv" type: "Convolution" bottom: "conv2" top: "fc6-conv"
        convolution_param { num_output: 5 kernel_size: 4 } }"""
NORMALIZED = """
layer { name: "bn1" type: "BatchNorm" bottom: "conv1" top: "conv1"
        batch_norm_param { eps: 0.01 } }
layer { name: "scale1" type: "Scale" bottom: "conv1" top: "conv1"
        scale_param { bias_term: true } }"""


def definition(path, depth=3, pad=0, group=1, behind="", head=FULLY_CONNECTED):
    text = NET % {"depth": depth, "pad": pad, "group": group, "behind": behind, "head": head}
    path.write_text(text)
    return str(path)


def filled(path, seed=0):
    """A caffe.Net with random weights, and the caffemodel with them beside its definition."""
    net = build_net(read_definition(path))
    rng = np.random.default_rng(seed)
    for blobs in net.params.values():
        for blob in blobs:
            blob.data[...] = rng.uniform(0.1, 1, blob.data.shape) * rng.choice(
                [-1, 1], blob.data.shape)
    if "bn1" in net.params:
        net.params["bn1"][1].data[...] = np.abs(net.params["bn1"][1].data)
        net.params["bn1"][2].data[...] = 2
    weights = path.replace(".prototxt", ".caffemodel")
    net.save(weights)
    return net, weights


def loaded(path, weights):
    net = build_net(read_definition(path))
    net.copy_from(weights)
    return net


def output(net, images):
    net.blobs["data"].data[...] = images
    return list(net.forward().values())[0].reshape(len(images), -1).copy()


@pytest.fixture
def images():
    return np.random.default_rng(1).uniform(-100, 100, (2, 3, 9, 9))


@pytest.mark.parametrize("source, target, rename", [
    (FULLY_CONVOLUTIONAL, FULLY_CONNECTED, "fc6-conv=fc6"),
    (FULLY_CONNECTED, FULLY_CONVOLUTIONAL, "fc6=fc6-conv"),
])
def test_fully_connected_layers_become_convolutions_and_back(tmp_path, images, source, target,
                                                             rename):
    theirs = definition(tmp_path / "theirs.prototxt", head=source)
    ours = definition(tmp_path / "ours.prototxt", head=target)
    net, weights = filled(theirs)
    out = str(tmp_path / "out.caffemodel")
    assert convert_weights.main([theirs, weights, ours, out, "--rename", rename]) == 0
    np.testing.assert_allclose(output(loaded(ours, out), images), output(net, images), rtol=1e-4)


def test_old_definitions_and_caffemodels_are_read(tmp_path, images):
    new = definition(tmp_path / "new.prototxt")
    net, _ = filled(new)
    theirs, weights = str(tmp_path / "v1.prototxt"), str(tmp_path / "v1.caffemodel")
    messages = caffe_messages()
    old = messages.NetParameter(input=["data"], input_dim=[2, 3, 9, 9])
    for layer in read_definition(new).layer[1:]:
        v1 = old.layers.add(name=layer.name, bottom=layer.bottom, top=layer.top)
        v1.type = {"Convolution": v1.CONVOLUTION, "InnerProduct": v1.INNER_PRODUCT,
                   "ReLU": v1.RELU}[layer.type]
        v1.convolution_param.CopyFrom(layer.convolution_param)
        v1.inner_product_param.CopyFrom(layer.inner_product_param)
    with open(theirs, "w") as file:
        file.write(text_format.MessageToString(old))
    for v1 in old.layers:
        for blob in net.params.get(v1.name, []):
            shape = (1, 1, 1, 1) + blob.data.shape
            v1.blobs.add(num=shape[-4], channels=shape[-3], height=shape[-2], width=shape[-1],
                         data=blob.data.ravel().tolist())
    with open(weights, "wb") as file:
        file.write(old.SerializeToString())
    out = str(tmp_path / "out.caffemodel")
    assert convert_weights.main([theirs, weights, new, out]) == 0
    np.testing.assert_allclose(output(loaded(new, out), images), output(net, images), rtol=1e-5)


def test_groups_are_spread_out_with_zeros_and_found_again(tmp_path, images):
    grouped = definition(tmp_path / "grouped.prototxt", group=2)
    full = definition(tmp_path / "full.prototxt")
    net, weights = filled(grouped)
    spread, again = str(tmp_path / "spread.caffemodel"), str(tmp_path / "again.caffemodel")
    assert convert_weights.main([grouped, weights, full, spread]) == 0
    kernel = loaded(full, spread).params["conv2"][0].data
    assert kernel.shape == (6, 4, 3, 3)
    assert not kernel[:3, 2:].any() and not kernel[3:, :2].any()
    np.testing.assert_array_equal(kernel[3:, 2:], net.params["conv2"][0].data[3:])
    assert convert_weights.main([full, spread, grouped, again]) == 0
    np.testing.assert_array_equal(output(loaded(grouped, again), images), output(net, images))


def test_weights_between_groups_are_an_error(tmp_path, capsys):
    full = definition(tmp_path / "full.prototxt")
    grouped = definition(tmp_path / "grouped.prototxt", group=2)
    _, weights = filled(full)
    assert convert_weights.main([full, weights, grouped, str(tmp_path / "out")]) == 2
    assert "layer 'conv2' has 2 groups" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_colours_mean_and_scale_of_the_foreign_input_are_folded_into_the_first_layer(tmp_path):
    path = definition(tmp_path / "net.prototxt")
    net, weights = filled(path)
    out = str(tmp_path / "out.caffemodel")
    assert convert_weights.main([path, weights, path, out, "--rgb-to-bgr", "--scale", "0.5",
                                 "--mean", "120", "115", "100"]) == 0
    ours = loaded(path, out)
    np.testing.assert_allclose(ours.params["conv1"][0].data,
                               net.params["conv1"][0].data[:, ::-1] / 2)
    photograph = np.random.default_rng(1).integers(0, 256, (2, 9, 9, 3)).astype(np.float64)  # BGR
    foreign = 0.5 * (photograph[..., ::-1] - (120, 115, 100))
    own = photograph - (104, 117, 123)
    np.testing.assert_allclose(output(ours, own.transpose(0, 3, 1, 2)),
                               output(net, foreign.transpose(0, 3, 1, 2)), rtol=1e-4)


def test_another_mean_cannot_be_folded_where_the_image_is_padded(tmp_path, capsys):
    path = definition(tmp_path / "net.prototxt", pad=1, head="")
    _, weights = filled(path)
    arguments = [path, weights, path, str(tmp_path / "out")]
    assert convert_weights.main(arguments + ["--mean", "0", "0", "0"]) == 2
    assert "layer 'conv1' pads the image" in capsys.readouterr().err
    assert convert_weights.main(arguments + ["--rgb-to-bgr"]) == 0


def test_a_grey_net_takes_colours_as_opencv_turns_them_grey(tmp_path):
    grey = definition(tmp_path / "grey.prototxt", depth=1)
    colour = definition(tmp_path / "colour.prototxt")
    net, weights = filled(grey)
    out = str(tmp_path / "out.caffemodel")
    assert convert_weights.main([grey, weights, colour, out]) == 0
    photographs = np.random.default_rng(1).uniform(-100, 100, (2, 9, 9, 3)).astype(np.float32)
    greys = [cv2.cvtColor(photograph, cv2.COLOR_BGR2GRAY)[None] for photograph in photographs]
    np.testing.assert_allclose(output(loaded(colour, out), photographs.transpose(0, 3, 1, 2)),
                               output(net, np.array(greys)), rtol=1e-3)


def test_normalization_is_folded_into_the_layer_before_it(tmp_path, images):
    theirs = definition(tmp_path / "theirs.prototxt", behind=NORMALIZED)
    ours = definition(tmp_path / "ours.prototxt")
    net, weights = filled(theirs)
    out = str(tmp_path / "out.caffemodel")
    assert convert_weights.main([theirs, weights, ours, out, "--fold-batchnorm"]) == 0
    np.testing.assert_allclose(output(loaded(ours, out), images), output(net, images), rtol=1e-4)


def test_a_transposed_and_a_deconvolution_layer_take_factors_on_their_outputs(tmp_path):
    head = """
    layer { name: "up" type: "Deconvolution" bottom: "conv2" top: "up"
            convolution_param { num_output: 4 kernel_size: 2 stride: 2 group: 2 } }
    %s
    layer { name: "fc" type: "InnerProduct" bottom: "up" top: "fc"
            inner_product_param { num_output: 3 transpose: true } }
    %s"""
    scale = ('layer { name: "%s_scale" type: "Scale" bottom: "%s" top: "%s"'
             ' scale_param { bias_term: true } }')
    theirs = definition(tmp_path / "theirs.prototxt", head=head % (
        scale % (("up",) * 3), scale % (("fc",) * 3)))
    ours = definition(tmp_path / "ours.prototxt", head=head % ("", ""))
    net, weights = filled(theirs)
    out = str(tmp_path / "out.caffemodel")
    assert convert_weights.main([theirs, weights, ours, out, "--fold-batchnorm"]) == 0
    images = np.random.default_rng(1).uniform(-1, 1, (2, 3, 9, 9))
    np.testing.assert_allclose(output(loaded(ours, out), images), output(net, images), rtol=1e-4)


def test_layers_without_a_partner_are_dropped_or_left_out(tmp_path):
    theirs = definition(tmp_path / "theirs.prototxt")
    ours = definition(tmp_path / "ours.prototxt", head=FULLY_CONVOLUTIONAL)
    _, weights = filled(theirs)
    out = str(tmp_path / "out.caffemodel")
    assert convert_weights.main([theirs, weights, ours, out]) == 0
    with open(out, "rb") as file:
        stored = caffemodel.read_message(file.read(), out)
    assert sorted(caffemodel.stored_blobs(stored)) == ["conv1", "conv2"]


def test_nets_that_differ_are_refused_unless_forced(tmp_path, capsys):
    theirs = definition(tmp_path / "theirs.prototxt")
    ours = definition(tmp_path / "ours.prototxt")
    with open(ours) as file:
        text = file.read().replace('"relu1" type: "ReLU"', '"relu1" type: "TanH"')
    (tmp_path / "ours.prototxt").write_text(text)
    _, weights = filled(theirs)
    out = tmp_path / "out.caffemodel"
    assert convert_weights.main([theirs, weights, ours, str(out)]) == 2
    message = capsys.readouterr().err
    assert "ours.prototxt: layer 'conv2' computes something else" in message
    assert message.count("\n") == 1 and not out.exists()
    assert convert_weights.main([theirs, weights, ours, str(out), "--force"]) == 0
    assert out.exists()


RELU_FIRST = """
layer { name: "relu0" type: "ReLU" bottom: "conv1" top: "conv1" }""" + NORMALIZED
READ_TWICE = """
layer { name: "bn1" type: "BatchNorm" bottom: "conv1" top: "other" }
layer { name: "sum" type: "Eltwise" bottom: "conv1" bottom: "other" top: "total" }"""


@pytest.mark.parametrize("behind, options, message", [
    (NORMALIZED, [], "no layer 'bn1' (BatchNorm): --fold-batchnorm folds it"),
    (RELU_FIRST, ["--fold-batchnorm"], "'bn1' (BatchNorm) cannot be folded: it does not follow"),
    (READ_TWICE, ["--fold-batchnorm"], "'bn1' (BatchNorm) cannot be folded: other layers read"),
    ("", ["--rename", "conv1"], "--rename conv1: write OLD=NEW"),
    ("", ["--rename", "conv9=conv1"], "the foreign definition has no layer 'conv9'"),
    ("", ["--mean", "1", "2"], "--mean: 2 numbers for 3 channels"),
])
def test_what_cannot_be_converted_is_said_in_one_line(tmp_path, capsys, behind, options, message):
    theirs = definition(tmp_path / "theirs.prototxt", behind=behind)
    ours = definition(tmp_path / "ours.prototxt")
    _, weights = filled(theirs)
    out = tmp_path / "out.caffemodel"
    assert convert_weights.main([theirs, weights, ours, str(out)] + options) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not out.exists()


def test_weights_that_are_cut_short_or_another_nets_are_named(tmp_path, capsys):
    theirs = definition(tmp_path / "theirs.prototxt")
    smaller = definition(tmp_path / "smaller.prototxt", head="")
    _, weights = filled(smaller)
    arguments = [theirs, weights, theirs, str(tmp_path / "out")]
    assert convert_weights.main(arguments) == 2
    assert "smaller.caffemodel: no weights for layer 'fc6'" in capsys.readouterr().err
    with open(weights, "rb") as file:
        half = file.read()[:500]
    with open(weights, "wb") as file:
        file.write(half)
    assert convert_weights.main(arguments) == 2
    assert "smaller.caffemodel: cut short" in capsys.readouterr().err


def test_stored_statistics_become_a_factor_and_a_shift():
    # stored sums over 2 batches: mean 3, variance 4 - 0.01; (z - 3) / sqrt(4) = z / 2 - 1.5
    class Blob:
        def __init__(self, data):
            self.data = np.array(data, np.float32)
    parameters = caffe_messages().LayerParameter()
    parameters.batch_norm_param.eps = 0.01
    layer = convert_weights.NetLayer(0, "bn", "BatchNorm", ["z"], ["z"], [
        Blob([6.0]), Blob([2 * 3.99]), Blob([2.0])], parameters)
    factor, shift = convert_weights.channel_change(layer, 1)
    np.testing.assert_allclose([factor[0], shift[0]], [0.5, -1.5], rtol=1e-6)
    with pytest.raises(ValueError, match="1 parameters for 2 channels"):
        convert_weights.channel_change(layer, 2)
