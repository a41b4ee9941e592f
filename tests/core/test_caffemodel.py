"""Weights of every dialect come to the layers they are for; what does not fit is one line."""
import hashlib

import numpy as np
import pytest
from toy_nets import parsed

from ddinit.caffemodel import (
    check_bound,
    definition_beside,
    load_weights,
    mark,
    sha256,
)
from ddinit.processes import ChildDied, in_child
from ddinit.prototxt import build_net, caffe_messages

NET = """name: "toy"
layer { name: "data" type: "Input" top: "data"
  input_param { shape { dim: 2 dim: 3 dim: 9 dim: 9 } } }
layer { name: "conv" type: "Convolution" bottom: "data" top: "conv"
  convolution_param { num_output: 40 kernel_size: 5 weight_filler { type: "xavier" } } }
layer { name: "relu" type: "ReLU" bottom: "conv" top: "conv" }
layer { name: "one" type: "InnerProduct" bottom: "conv" top: "one"
  inner_product_param { num_output: 30 bias_term: false weight_filler { type: "xavier" } } }
layer { name: "two" type: "InnerProduct" bottom: "conv" top: "two"
  inner_product_param { num_output: 4 weight_filler { type: "xavier" } } }
"""
SMALL = """layer { name: "data" type: "Input" top: "data"
  input_param { shape { dim: 2 dim: 3 dim: 1 dim: 1 } } }
layer { name: "conv" type: "Convolution" bottom: "data" top: "conv"
  convolution_param { num_output: 1 kernel_size: 1 } }
layer { name: "fc" type: "InnerProduct" bottom: "data" top: "fc"
  inner_product_param { num_output: 2 } }
"""
# What SMALL's layers have below.
CONV = np.array([1.5, -2, 3], np.float32)
FC = np.arange(6, dtype=np.float32)
BIAS = np.array([7, 8], np.float32)


def net_of(text=NET):
    return build_net(parsed(text))


def numbers(net):
    return {name: [np.array(blob.data) for blob in blobs] for name, blobs in net.params.items()}


def same(one, other):
    return all(np.array_equal(blob, read) for name, blobs in one.items()
               for blob, read in zip(blobs, other[name]))


@pytest.fixture(params=["protobuf", "HDF5"])
def saved(request, tmp_path):
    """A net and the file that Caffe saved it in, under a name that does not tell its format."""
    net = net_of()
    path = str(tmp_path / "saved.weights")
    (net.save if request.param == "protobuf" else net.save_hdf5)(path)
    return net, path


# ---------------------------------------------------------------------------------------------
# Files that Caffe writes
# ---------------------------------------------------------------------------------------------

def test_weights_that_caffe_saved_are_read_bit_by_bit_under_any_name(saved):
    net, path = saved
    other = net_of()
    assert not same(numbers(net), numbers(other))
    assert load_weights(other, path) == []
    assert same(numbers(net), numbers(other))


def test_layers_that_stay_fresh_keep_their_own_weights(saved):
    net, path = saved
    other = net_of()
    before = numbers(other)
    assert load_weights(other, path, fresh=["two"]) == ["two"]
    after = numbers(other)
    assert all(map(np.array_equal, after["two"], before["two"]))
    assert all(map(np.array_equal, after["one"] + after["conv"],
                   numbers(net)["one"] + numbers(net)["conv"]))


def test_layers_that_the_file_does_not_have_are_left_as_they_are(saved):
    net, path = saved
    wider = net_of(NET + 'layer { name: "new" type: "InnerProduct" bottom: "conv" top: "new" '
                   'inner_product_param { num_output: 3 weight_filler { type: "xavier" } } }')
    before = numbers(wider)
    assert load_weights(wider, path) == ["new"]
    assert all(map(np.array_equal, numbers(wider)["new"], before["new"]))
    assert same(numbers(net), numbers(wider))
    narrower = net_of(NET.replace('name: "two"', 'name: "other"'))
    assert load_weights(narrower, path) == ["other"]


def test_weights_that_layers_share_are_read_once(saved, tmp_path):
    shared = NET.replace('name: "conv" type', 'param { name: "w" } param { name: "b" } name: "conv"'
                         ' type') + """layer { name: "again" type: "Convolution" bottom: "data"
        top: "again" param { name: "w" } param { name: "b" }
        convolution_param { num_output: 40 kernel_size: 5 } }"""
    net, other = net_of(shared), net_of(shared)
    for name, save in (("a", net.save), ("b", net.save_hdf5)):
        save(str(tmp_path / name))
        for blob in other.params["conv"]:
            blob.data[...] = 0
        assert load_weights(other, str(tmp_path / name)) == []
        assert same(numbers(net), numbers(other))


# ---------------------------------------------------------------------------------------------
# Dialects
# ---------------------------------------------------------------------------------------------

def stored(folder, weights):
    """The path of a file that protobuf writes."""
    path = folder / "net.caffemodel"
    path.write_bytes(weights.SerializeToString())
    return str(path)


def old_blob(layer, shape, data, field="data"):
    """Add a blob of the days when all had four axes."""
    blob = layer.blobs.add(**dict(zip(("num", "channels", "height", "width"), shape)))
    getattr(blob, field).extend(data.tolist())


def check_small(path):
    net = net_of(SMALL)
    net.params["conv"][1].data[...] = 9
    assert load_weights(net, path) == []
    found = numbers(net)
    np.testing.assert_array_equal(found["conv"][0].ravel(), CONV)
    np.testing.assert_array_equal(found["conv"][1], [0.5])
    np.testing.assert_array_equal(found["fc"][0], FC.reshape(2, 3))
    np.testing.assert_array_equal(found["fc"][1], BIAS)


def fill_old(conv, fc, field="data"):
    old_blob(conv, (1, 3, 1, 1), CONV, field)
    old_blob(conv, (1, 1, 1, 1), np.array([0.5]), field)
    old_blob(fc, (1, 1, 2, 3), FC, field)
    old_blob(fc, (1, 1, 1, 2), BIAS, field)


@pytest.mark.parametrize("field", ["data", "double_data"])
def test_v1_layers_and_four_axes_are_read(tmp_path, field):
    weights = caffe_messages().NetParameter()
    types = caffe_messages().V1LayerParameter
    fill_old(weights.layers.add(name="conv", type=types.CONVOLUTION),
             weights.layers.add(name="fc", type=types.INNER_PRODUCT), field)
    weights.layers.add(name="relu", type=types.RELU)
    check_small(stored(tmp_path, weights))


def test_todays_layers_may_have_old_blobs(tmp_path):
    weights = caffe_messages().NetParameter()
    fill_old(weights.layer.add(name="conv"), weights.layer.add(name="fc"))
    check_small(stored(tmp_path, weights))


def test_todays_shapes_may_begin_with_ones(tmp_path):
    weights = caffe_messages().NetParameter()
    for name, blobs in (("conv", [((1, 3, 1, 1), CONV), ((1,), np.array([0.5]))]),
                        ("fc", [((1, 1, 2, 3), FC), ((1, 2), BIAS)])):
        layer = weights.layer.add(name=name)
        for shape, data in blobs:
            layer.blobs.add(data=data.tolist()).shape.dim.extend(shape)
    check_small(stored(tmp_path, weights))


def test_numbers_may_come_one_by_one_and_in_parts(tmp_path):
    for encode in (lambda data: b"".join(b"\x2d" + number.tobytes() for number in data),
                   lambda data: b"".join(b"\x2a\x04" + number.tobytes() for number in data)):
        weights = caffe_messages().NetParameter()
        for name, blobs in (("conv", [((1, 3, 1, 1), CONV), ((1,), np.float32([0.5]))]),
                            ("fc", [((2, 3), FC), ((2,), BIAS)])):
            layer = weights.layer.add(name=name)
            for shape, data in blobs:
                layer.blobs.add().MergeFromString(encode(data))
                layer.blobs[-1].shape.dim.extend(shape)
        check_small(stored(tmp_path, weights))


def test_v0_layers_inside_v1_layers_are_read(tmp_path):
    weights = caffe_messages().NetParameter()
    conv = weights.layers.add().layer
    conv.name, conv.type = "conv", "conv"
    fc = weights.layers.add().layer
    fc.name, fc.type = "fc", "innerproduct"
    fill_old(conv, fc)
    check_small(stored(tmp_path, weights))


# ---------------------------------------------------------------------------------------------
# What does not fit
# ---------------------------------------------------------------------------------------------

def refusal(net, path):
    before = numbers(net)
    with pytest.raises(ValueError) as error:
        load_weights(net, str(path))
    assert str(error.value).startswith(str(path) + ": ")
    assert "\n" not in str(error.value)
    assert same(before, numbers(net))
    return str(error.value)


@pytest.mark.parametrize("change, message", [
    (("num_output: 30", "num_output: 31"),
     "layer 'one' has weights of shape 30x1000, the net wants 31x1000"),
    (("num_output: 40", "num_output: 41"),
     "layer 'conv' has weights of shape 40x3x5x5 and 40, the net wants 41x3x5x5 and 41"),
    (("bias_term: false", "bias_term: true"),
     "layer 'one' has weights of shape 30x1000, the net wants 30x1000 and 30"),
    (("kernel_size: 5", "kernel_size: 5 group: 1 bias_term: false"),
     "layer 'conv' has weights of shape 40x3x5x5 and 40, the net wants 40x3x5x5"),
], ids=["outputs", "conv", "bias missing", "bias too many"])
def test_shapes_that_differ_are_told_with_their_layer(tmp_path, change, message):
    path = str(tmp_path / "saved.caffemodel")
    net_of().save(path)
    assert message in refusal(net_of(NET.replace(*change)), path)


def test_weights_of_another_net_are_told_with_both_nets_layers(tmp_path):
    path = str(tmp_path / "saved.caffemodel")
    net_of().save(path)
    message = refusal(net_of(SMALL.replace('"conv"', '"first"')), path)
    assert "The file has conv, one, two; the network has first, fc" in message
    assert "another prototxt?" in message


def test_files_cut_short_foreign_or_missing_are_one_line(tmp_path):
    weights = caffe_messages().NetParameter()
    weights.layer.add(name="conv").blobs.add(data=[0.5] * 6).shape.dim.extend([2, 4])
    net = net_of(SMALL)
    assert "layer 'conv': 6 numbers do not fill the shape [2, 4]" in refusal(
        net, stored(tmp_path, weights))
    whole = weights.SerializeToString()
    for length in range(1, len(whole)):
        cut = tmp_path / "cut"
        cut.write_bytes(whole[:length])
        assert "cut short or not a caffemodel" in refusal(net, cut) or length < 3
    foreign, empty = (tmp_path / name for name in ("foreign", "empty"))
    foreign.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)))
    empty.write_bytes(b"")
    for path, message in ((foreign, "not a caffemodel"), (empty, "no layers in it"),
                          (tmp_path / "none", "No such file"), (tmp_path, "Is a directory")):
        assert message in refusal(net, path)


def loaded_small(path):
    return load_weights(net_of(SMALL), path)


def test_an_hdf5_file_that_is_cut_short_or_of_another_net_is_one_line(tmp_path):
    whole, cut = (tmp_path / name for name in ("whole.h5", "cut.h5"))
    net_of().save_hdf5(str(whole))
    cut.write_bytes(whole.read_bytes()[:3000])
    with pytest.raises(ChildDied) as error:
        in_child(loaded_small, str(cut))
    assert "\n" not in str(error.value) and "cut.h5" in str(error.value)
    one = tmp_path / "one.h5"
    net_of(NET.replace('"conv"', '"first"')).save_hdf5(str(one))
    net = net_of(SMALL)
    before = numbers(net)
    with pytest.raises(ValueError, match="one.h5: none of its layers is one of the network's"):
        load_weights(net, str(one))
    assert same(before, numbers(net))


# ---------------------------------------------------------------------------------------------
# Changed definitions and their weights
# ---------------------------------------------------------------------------------------------

@pytest.fixture
def pair(tmp_path):
    """Weights and the definition that was written with them."""
    weights, prototxt = tmp_path / "out.caffemodel", tmp_path / "out.prototxt"
    weights.write_bytes(b"weights")
    prototxt.write_text(mark(str(weights)) + "# changed\n" + SMALL)
    return prototxt, weights


def test_a_mark_is_a_comment_with_the_hash_of_the_weights(pair):
    prototxt, weights = pair
    assert sha256(str(weights)) == hashlib.sha256(b"weights").hexdigest()
    first = prototxt.read_text().splitlines()[0]
    assert first.startswith("# ") and first.endswith(sha256(str(weights)))
    assert parsed(prototxt.read_text()) == parsed(SMALL)


def test_a_definition_is_bound_to_the_weights_beside_it(pair, tmp_path):
    prototxt, weights = pair
    check_bound(str(prototxt), str(weights))
    assert definition_beside(str(weights)) == str(prototxt)
    weights.write_bytes(b"other weights")
    with pytest.raises(ValueError, match="out.prototxt was written for other weights than"):
        check_bound(str(prototxt), str(weights))
    assert definition_beside(str(weights)) is None
    elsewhere = tmp_path / "trained.caffemodel"  # the net goes on training
    elsewhere.write_bytes(b"trained")
    check_bound(str(prototxt), str(elsewhere))
    assert definition_beside(str(elsewhere)) is None


def test_a_definition_of_the_users_own_is_bound_to_nothing(pair):
    prototxt, weights = pair
    prototxt.write_text(SMALL)
    check_bound(str(prototxt), str(weights))
    assert definition_beside(str(weights)) is None
