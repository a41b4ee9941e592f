"""Weights out of nets: what is written is what Caffe reads (loading: test_definitions.py)."""
import subprocess
import sys

import numpy as np
import pytest
from toy_nets import parsed

import definitions
from trained_weights import save_weights

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
    return definition, definitions.build(definition)


def test_saved_weights_are_read_back_by_caffe_bit_by_bit(tmp_path, toy):
    definition, net = toy
    path = str(tmp_path / "saved.caffemodel")
    save_weights(net, definition, path)
    other = definitions.build(definition)
    other.copy_from(path)
    for name, blobs in net.params.items():
        for blob, read in zip(blobs, other.params[name]):
            assert np.array_equal(blob.data, read.data)
    assert definitions.read_weights(path) == {
        "conv": [(40, 3, 5, 5), (40,)], "one": [(30, 1000)], "two": [(4, 1000), (4,)]}


def test_saved_message_is_caffes_own_without_its_split_layers(tmp_path, toy):
    definition, net = toy
    messages = []
    for name, save in (("ours", lambda path: save_weights(net, definition, path)),
                       ("caffes", net.save)):
        save(str(tmp_path / name))
        messages.append(definitions.caffe_messages().NetParameter())
        messages[-1].ParseFromString((tmp_path / name).read_bytes())
    ours, caffes = messages
    assert ours.name == caffes.name == "toy"
    blobs = {layer.name: list(layer.blobs) for layer in caffes.layer if layer.type != "Split"}
    assert len(caffes.layer) == len(blobs) + 1
    assert {layer.name: list(layer.blobs) for layer in ours.layer} == blobs


def test_caffe_is_imported_without_scikit_image_until_its_io_is_used():
    code = ("import sys, definitions\n"
            "caffe = definitions.import_caffe()\n"
            "assert 'skimage' not in sys.modules\n"
            "import caffe.io\n"
            "print(caffe.io.datum_to_array(caffe.io.array_to_datum(__import__('numpy').ones("
            "(1, 2, 2), 'uint8'))).sum())\n"
            "assert 'skimage' in sys.modules\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout.strip(), done.returncode) == ("4", 0), done.stderr
