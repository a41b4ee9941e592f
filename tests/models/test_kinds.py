"""models/kinds.py: Caffe builds every kind, which has what its paper is known for."""
import os
import re

import pytest
from google.protobuf import text_format

import kinds
from ddinit import processes
from ddinit.prototxt import caffe_messages, import_caffe

DEFINITIONS = kinds.definitions()


def _built(folder):
    """Blob shapes and addresses of the weights in every network, as Caffe builds it."""
    caffe = import_caffe()
    nets = {}
    for kind in DEFINITIONS:
        net = caffe.Net(os.path.join(folder, kind + ".prototxt"), caffe.TEST)
        nets[kind] = (list(net.outputs),
                      {name: tuple(blob.shape) for name, blob in net.blobs.items()},
                      {name: blobs[0].data.ctypes.data for name, blobs in net.params.items()})
    return nets


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("kinds") / "new")
    assert kinds.main([path]) == 0
    return path


@pytest.fixture(scope="module")
def built(folder):
    return processes.in_child(_built, folder)


def layers_of(kind, kind_of_layer=None):
    net = text_format.Parse(DEFINITIONS[kind], caffe_messages().NetParameter())
    return [layer for layer in net.layer if kind_of_layer in (None, layer.type)]


def numbers(kind):
    """How many layers of each type a network has."""
    types = [layer.type for layer in layers_of(kind)]
    return {name: types.count(name) for name in types}


def test_a_folder_gets_one_definition_for_each_kind(folder):
    assert sorted(os.listdir(folder)) == sorted(kind + ".prototxt" for kind in DEFINITIONS)
    assert len(DEFINITIONS) >= 14
    for kind, text in DEFINITIONS.items():
        with open(os.path.join(folder, kind + ".prototxt"), encoding="utf-8") as file:
            assert file.read() == text


@pytest.mark.parametrize("kind", DEFINITIONS)
def test_caffe_builds_every_kind_for_images_of_32_to_112_pixels(built, kind):
    outputs, shapes, weights = built[kind]
    assert outputs and weights
    assert shapes["data"][1] in (1, 3)
    assert all(32 <= side <= 112 for side in shapes["data"][2:])


@pytest.mark.parametrize("kind", DEFINITIONS)
def test_a_definition_names_its_source_and_no_two_layers_alike(kind):
    head = DEFINITIONS[kind].partition("\n\n")[0]
    assert re.search(r"\b(19|20)\d\d\b|Krizhevsky", head)
    assert head.endswith("# Written by models/kinds.py: change it there.")
    names = [layer.name for layer in layers_of(kind)]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("kind, expected", {
    "lenet": {"Convolution": 2, "InnerProduct": 2, "ReLU": 1},
    "cifar10_quick": {"Convolution": 3, "InnerProduct": 2, "ReLU": 3, "Pooling": 3},
    "cifar10_full": {"Convolution": 3, "InnerProduct": 1, "LRN": 2},
    "caffenet_small": {"Convolution": 5, "InnerProduct": 3, "LRN": 2},
    "vgg16": {"Convolution": 13, "InnerProduct": 3, "Pooling": 5},
    "googlenet": {"Convolution": 59, "InnerProduct": 5, "Concat": 9, "LRN": 2},
    "nin": {"Convolution": 9, "Pooling": 3},
    "squeezenet": {"Convolution": 26, "Concat": 8},
    "age_gender": {"Convolution": 3, "InnerProduct": 3, "LRN": 2},
    "mobilenet": {"Convolution": 28, "BatchNorm": 27, "Scale": 27},
    "resnet": {"Convolution": 53, "BatchNorm": 53, "Scale": 53, "Eltwise": 16},
    "resnet_folded": {"Convolution": 53, "Eltwise": 16},
    "resnet_two_outputs": {"Convolution": 53, "BatchNorm": 53, "Eltwise": 16},
    "densenet": {"Convolution": 27, "BatchNorm": 27, "Concat": 12},
    "unet": {"Convolution": 11, "Deconvolution": 2, "Crop": 2, "Concat": 2},
    "fcn8s": {"Convolution": 18, "Deconvolution": 3, "Crop": 3, "Eltwise": 2},
    "hed": {"Convolution": 19, "Deconvolution": 4, "Crop": 5, "Concat": 1},
    "pose": {"PReLU": 42, "Concat": 16},
    "siamese": {"Slice": 1, "Convolution": 4, "InnerProduct": 6},
    "recursive": {"Convolution": 5, "InnerProduct": 1},
    "lstm": {"LSTM": 1, "Convolution": 2, "InnerProduct": 2},
    "autoencoder": {"InnerProduct": 8, "Sigmoid": 7},
}.items())
def test_a_network_has_the_layers_that_its_paper_is_known_for(kind, expected):
    types = numbers(kind)
    assert {name: types.get(name, 0) for name in expected} == expected


def test_no_network_lacks_a_test_of_its_layers():
    marks = test_a_network_has_the_layers_that_its_paper_is_known_for.pytestmark
    assert {kind for kind, _ in marks[0].args[1]} == set(DEFINITIONS)


def test_folding_leaves_no_normalization_and_gives_convolutions_biases():
    assert not {"BatchNorm", "Scale"} & set(numbers("resnet_folded"))
    assert all(layer.convolution_param.bias_term
               for layer in layers_of("resnet_folded", "Convolution"))
    assert not any(layer.convolution_param.bias_term
                   for layer in layers_of("resnet", "Convolution"))


def test_depthwise_convolutions_have_one_group_for_each_channel():
    depthwise = [layer.convolution_param for layer in layers_of("mobilenet", "Convolution")
                 if layer.name.endswith("/dw")]
    assert len(depthwise) == 13
    assert all(layer.group == layer.num_output > 1 for layer in depthwise)


def test_outputs_are_those_of_the_papers(built):
    for kind, count in (("resnet_two_outputs", 2), ("age_gender", 2), ("resnet", 100)):
        outputs, shapes, _ = built[kind]
        assert outputs == ["prob"] and shapes["prob"][1:] == (count,)
    assert len(built["googlenet"][0]) == 3
    outputs, shapes, _ = built["hed"]
    assert outputs == ["dsn1", "dsn2", "dsn3", "dsn4", "dsn5", "fuse"]
    assert {shapes[name][1:] for name in outputs} == {(1, 64, 64)}
    assert built["fcn8s"][1]["score"][1:] == (21, 64, 64)
    assert built["unet"][1]["score"][1:] == (2, 52, 52)
    assert built["autoencoder"][1]["decode1neuron"][1:] == (32 * 32,)


def test_layers_that_share_weights_have_the_same_memory(built):
    weights = built["siamese"][2]
    assert all(weights[name] == weights[name + "_p"]
               for name in ("conv1", "conv2", "ip1", "ip2", "feat"))
    weights = built["recursive"][2]
    assert len({weights["tied%d" % number] for number in (1, 2, 3, 4)}) == 1
    assert len(set(weights.values())) == 3


def test_the_last_concat_of_pose_joins_a_chain_and_one_that_reads_it():
    layers = {layer.name: layer for layer in layers_of("pose")}
    assert list(layers["net_output"].bottom) == ["joints1", "limbs1"]
    assert "limbs1" in layers["joints1_in"].bottom


def test_interpolations_are_fixed_and_bilinear():
    for layer in layers_of("fcn8s", "Deconvolution") + layers_of("hed", "Deconvolution"):
        assert [parameter.lr_mult for parameter in layer.param] == [0]
        assert layer.convolution_param.weight_filler.type == "bilinear"
