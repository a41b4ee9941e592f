"""detection/nets.py: the nets of the paper, and what cannot become one."""
import json
import os

import numpy as np
import pytest
from google.protobuf import text_format

import generate
from ddinit import processes
from ddinit.prototxt import build_net, caffe_messages, read_definition
from detection import nets
from training.nets import AFFINE

MODELS = os.path.dirname(os.path.abspath(generate.__file__))


def model(name):
    return read_definition(os.path.join(MODELS, name, "deploy.prototxt"))


def layers_of(net):
    return {layer.name: layer for layer in net.layer}


def parsed(text):
    net = caffe_messages().NetParameter()
    text_format.Merge(text, net)
    return net


SMALL = """
    name: "small"
    layer { name: "data" type: "Input" top: "data"
            input_param { shape { dim: 1 dim: 3 dim: 32 dim: 32 } } }
    layer { name: "conv1" type: "Convolution" bottom: "data" top: "conv1"
            param { lr_mult: 0 } param { lr_mult: 0 }
            convolution_param { num_output: 4 kernel_size: 5 stride: 2
                                weight_filler { type: "xavier" } } }
    %s
    layer { name: "fc" type: "InnerProduct" bottom: "pool" top: "fc"
            inner_product_param { num_output: 3 weight_filler { type: "xavier" } } }
"""
POOL = """layer { name: "pool" type: "Pooling" bottom: "conv1" top: "pool"
                  pooling_param { pool: %s kernel_size: 2 stride: 2 } }"""


def skeleton_of_models():
    return {name: nets.skeleton_of(model(name))._replace(trunk=[], head=[])
            for name in ("caffenet", "caffenet_ungrouped", "caffenet_tiny", "vgg16", "googlenet")}


def test_roi_pooling_has_the_size_that_fc6_wants_and_the_stride_of_the_trunk():
    found = processes.in_child(skeleton_of_models)
    assert {name: (item.side, item.stride) for name, item in found.items()} == {
        "caffenet": (6, 16), "caffenet_ungrouped": (6, 16), "caffenet_tiny": (2, 16),
        "vgg16": (7, 16), "googlenet": (7, 32)}


def test_caffenet_is_padded_as_in_fast_r_cnn_and_nothing_else_of_it_changes():
    definition = model("caffenet")
    net = layers_of(nets.training_net(nets.skeleton_of(definition), 20, {}))
    assert net["conv1"].convolution_param.pad_h == net["conv1"].convolution_param.pad_w == 5
    for name in ("pool1", "pool2"):
        assert net[name].pooling_param.pad_h == net[name].pooling_param.pad_w == 1
    original = layers_of(definition)
    kept = [name for name in original if name not in ("data", "pool5", "fc8", "prob")]
    assert [name for name in net if name in kept] == kept
    for name in set(kept) - {"conv1", "pool1", "pool2"}:
        for layer in (net[name], original[name]):
            layer.ClearField("param")
        assert net[name] == original[name]


def test_the_new_layers_are_those_of_fast_r_cnn():
    net = nets.training_net(nets.skeleton_of(model("caffenet")), 20, {"seed": 3})
    layers = layers_of(net)
    assert list(layers["data"].top) == ["data", "rois", "labels", "bbox_targets",
                                        "bbox_inside_weights", "bbox_outside_weights"]
    assert json.loads(layers["data"].python_param.param_str) == {"seed": 3}
    assert list(layers["roi_pool5"].bottom) == ["conv5", "rois"]
    assert list(layers["roi_pool5"].top) == ["pool5"]
    assert json.loads(layers["roi_pool5"].python_param.param_str) == {"side": 6,
                                                                      "spatial_scale": 1 / 16}
    for name, outputs, deviation in (("cls_score", 21, 0.01), ("bbox_pred", 84, 0.001)):
        parameters = layers[name].inner_product_param
        assert list(layers[name].bottom) == ["fc7"]
        assert parameters.num_output == outputs
        assert parameters.weight_filler.type == "gaussian"
        assert parameters.weight_filler.std == pytest.approx(deviation)
    assert list(layers["loss_bbox"].loss_weight) == list(layers["loss_cls"].loss_weight) == [1]


def test_every_layer_learns_also_one_that_the_definition_froze():
    definition = parsed(SMALL % (POOL % "MAX"))
    net = nets.training_net(nets.skeleton_of(definition), 2, {})
    for layer in net.layer:
        if layer.type in AFFINE:
            assert [blob.lr_mult for blob in layer.param] == [1, 2], layer.name
            assert [blob.decay_mult for blob in layer.param] == [1, 0], layer.name


def test_auxiliary_towers_are_cut_and_an_average_pooling_pools_the_roi():
    net = nets.testing_net(nets.skeleton_of(model("googlenet")), 20)
    names = [layer.name for layer in net.layer]
    assert not [name for name in names if name.startswith(("loss1", "loss2", "loss3"))]
    assert names[-5:] == ["pool5/7x7_s1", "pool5/drop_7x7_s1", "cls_score", "bbox_pred",
                          "cls_prob"]
    pooling = layers_of(net)["pool5/7x7_s1"]
    assert list(pooling.bottom) == list(layers_of(net)["roi_pool5/7x7_s1"].top)


def run_caffenet_tiny(width):
    """Shapes of a tiny CaffeNet's conv5 on a wide image, and its scores of two ROIs."""
    net = build_net(nets.testing_net(
        nets.skeleton_of(model("caffenet_tiny")), 3))
    net.blobs["data"].reshape(1, 3, 160, width)
    net.blobs["rois"].reshape(2, 5)
    net.blobs["data"].data[...] = np.random.RandomState(0).randn(1, 3, 160, width) * 50
    net.blobs["rois"].data[...] = [[0, 0, 0, width - 1, 159], [0, 10, 10, 70, 90]]
    net.forward()
    return (net.blobs["conv5"].data.shape, net.blobs["cls_prob"].data.copy(),
            net.blobs["bbox_pred"].data.shape)


def test_the_testing_net_scores_rois_of_an_image_of_any_size():
    maps, scores, boxes = processes.in_child(run_caffenet_tiny, 320)
    assert maps == (1, 32, 11, 21)  # cells on pixels 0, 16, ..., 160 and 0, ..., 320
    assert boxes == (2, 16)
    np.testing.assert_allclose(scores.sum(axis=1), 1, rtol=1e-5)


@pytest.mark.parametrize("broken, message", [
    (POOL % "MAX" + """layer { name: "sum" type: "Eltwise" bottom: "pool" bottom: "conv1"
                               top: "pool" }""",
     "Layer 'sum' reads 'conv1', which bypasses the last pooling"),
    ("""layer { name: "pool" type: "Power" bottom: "conv1" top: "pool" }""",
     "no Pooling layer that ROI pooling could replace"),
    (POOL % "MAX" + """layer { name: "bbox_pred" type: "ReLU" bottom: "pool" top: "pool" }""",
     "'bbox_pred' is that of a detection net"),
])
def test_a_net_that_cannot_become_a_detection_net_is_refused(broken, message):
    with pytest.raises(ValueError, match=message):
        nets.skeleton_of(parsed(SMALL % broken))


def test_a_net_that_ends_in_no_fully_connected_layer_is_refused():
    definition = parsed(SMALL % (POOL % "MAX"))
    del definition.layer[-1]
    with pytest.raises(ValueError, match="Layer 'pool' is a Pooling. .* InnerProduct layer"):
        nets.skeleton_of(definition)
