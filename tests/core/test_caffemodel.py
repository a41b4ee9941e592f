"""The caffemodel file: what we write Caffe reads, and what Caffe and protobuf write we read."""
import numpy as np
import pytest
from toy_nets import parsed

from ddinit import caffemodel
from ddinit.prototxt import build_net, caffe_messages
from ddinit.trained_weights import load_weights

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


@pytest.fixture
def toy():
    definition = parsed(NET)
    return definition, build_net(definition)


def same(net, other):
    return all(np.array_equal(blob.data, read.data) for name, blobs in net.params.items()
               for blob, read in zip(blobs, other.params[name]))


# ---------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("piece", [caffemodel.PIECE, 1000])
def test_written_weights_are_read_by_caffe_bit_by_bit(tmp_path, toy, piece, monkeypatch):
    monkeypatch.setattr(caffemodel, "PIECE", piece)
    definition, net = toy
    path = str(tmp_path / "saved.caffemodel")
    caffemodel.write(net, definition, path)
    other = build_net(definition)
    assert not same(net, other)
    other.copy_from(path)
    assert same(net, other)


def test_written_message_is_caffes_own_without_its_split_layers(tmp_path, toy):
    definition, net = toy
    messages = []
    for name, save in (("ours", lambda path: caffemodel.write(net, definition, path)),
                       ("caffes", net.save)):
        save(str(tmp_path / name))
        messages.append(caffe_messages().NetParameter())
        messages[-1].ParseFromString((tmp_path / name).read_bytes())
    ours, caffes = messages
    assert ours.name == caffes.name == "toy"
    blobs = {layer.name: list(layer.blobs) for layer in caffes.layer if layer.type != "Split"}
    assert len(caffes.layer) == len(blobs) + 1
    assert {layer.name: list(layer.blobs) for layer in ours.layer} == blobs


# ---------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------

def stored(folder, weights):
    """The path of a file that protobuf writes."""
    path = folder / "net.caffemodel"
    path.write_bytes(weights.SerializeToString())
    return str(path)


def shapes(path):
    return {name: [blob.shape for blob in blobs]
            for name, blobs in caffemodel.read(path).items()}


def test_weights_that_caffe_saved_are_read_bit_by_bit(tmp_path, toy):
    definition, net = toy
    path = str(tmp_path / "saved.caffemodel")
    net.save(path)
    assert shapes(path) == {"conv": [(40, 3, 5, 5), (40,)], "one": [(30, 1000)],
                            "two": [(4, 1000), (4,)]}
    other = build_net(definition)
    assert load_weights(other, path) == []
    assert same(net, other)


def test_layers_that_stay_fresh_keep_their_own_weights(tmp_path, toy):
    definition, net = toy
    path = str(tmp_path / "saved.caffemodel")
    net.save(path)
    other = build_net(definition)
    before = other.params["two"][0].data.copy()
    assert load_weights(other, path, fresh=["two"]) == ["two"]
    assert np.array_equal(other.params["two"][0].data, before)
    assert np.array_equal(other.params["one"][0].data, net.params["one"][0].data)


def test_weights_of_every_dialect_give_their_numbers(tmp_path):
    weights = caffe_messages().NetParameter()
    blob = weights.layer.add(name="new").blobs.add(data=range(6), diff=[7.0] * 6)
    blob.shape.dim.extend([2, 3])
    weights.layer.add(name="relu")
    found = caffemodel.read(stored(tmp_path, weights))
    assert list(found) == ["new"]
    assert found["new"][0].tolist() == [[0, 1, 2], [3, 4, 5]]
    weights = caffe_messages().NetParameter()
    weights.layers.add(name="old").blobs.add(num=2, channels=3, height=1, width=1, data=range(6))
    weights.layers.add().layer.CopyFrom(caffe_messages().V0LayerParameter(name="oldest"))
    weights.layers[1].layer.blobs.add(num=1, channels=1, height=1, width=4,
                                      double_data=[0.1, 0.2, 0.3, 0.4])
    found = caffemodel.read(stored(tmp_path, weights))
    assert found["old"][0].shape == (2, 3, 1, 1) and found["old"][0].sum() == 15
    assert found["oldest"][0].shape == (1, 1, 1, 4)
    assert found["oldest"][0].ravel().tolist() == [0.1, 0.2, 0.3, 0.4]


def test_numbers_may_come_one_by_one_and_in_parts(tmp_path):
    numbers = np.arange(4, dtype="<f4")
    one_by_one = b"".join(b"\x2d" + number.tobytes() for number in numbers)  # field 5, 4 bytes
    in_parts = b"".join(b"\x2a\x08" + numbers[part:part + 2].tobytes() for part in (0, 2))
    for encoded in (one_by_one, in_parts):
        weights = caffe_messages().NetParameter()
        weights.layer.add(name="fc").blobs.add().MergeFromString(encoded)
        weights.layer[0].blobs[0].shape.dim.extend([2, 2])
        blob = encoded + b"\x3a\x04\x0a\x02\x02\x02"  # field 7, the shape
        layer = b"\x0a\x02fc\x3a" + bytes([len(blob)]) + blob
        path = tmp_path / "net.caffemodel"
        path.write_bytes(b"\xa2\x06" + bytes([len(layer)]) + layer)
        message = caffe_messages().NetParameter.FromString(path.read_bytes())
        assert message == weights
        assert caffemodel.read(str(path))["fc"][0].tolist() == [[0, 1], [2, 3]]


def test_truncated_foreign_missing_and_mismatched_weights_are_one_line(tmp_path):
    weights = caffe_messages().NetParameter()
    blob = weights.layer.add(name="conv").blobs.add(data=[0.5] * 6)
    blob.shape.dim.extend([2, 4])
    with pytest.raises(ValueError, match="layer 'conv': 6 numbers do not fill the shape"):
        caffemodel.read(stored(tmp_path, weights))
    whole = weights.SerializeToString()
    for length in range(1, len(whole)):
        cut = tmp_path / "cut"
        cut.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="cut: (cut short|not a caffemodel)"):
            caffemodel.read(str(cut))
    foreign, empty = (tmp_path / name for name in ("foreign", "empty"))
    foreign.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)))
    empty.write_bytes(b"")
    for path, message in ((foreign, "not a caffemodel"), (empty, "no layers in it"),
                          (tmp_path / "none", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(ValueError) as error:
            caffemodel.read(str(path))
        assert str(error.value).startswith(str(path) + ": ")
        assert message in str(error.value)
