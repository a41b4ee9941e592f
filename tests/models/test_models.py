"""models/: the definitions are what generate.py writes, and the nets that were published."""
import glob
import os
import re

import pytest

import generate
from classification import nets
from ddinit import processes
from ddinit.prototxt import caffe_messages, image_layers, import_caffe, read_definition
from training.nets import AFFINE

MODELS = os.path.dirname(os.path.abspath(generate.__file__))
# Parameters, weights and biases, of the public nets: CaffeNet's as in Caffe's model zoo (AlexNet's
# 60 million of Krizhevsky et al. 2012), VGG-16's 138 million of Simonyan & Zisserman 2015, table 2,
# GoogLeNet's 7 million with only its last classifier (Szegedy et al. 2015) and 13.4 million of the
# zoo's bvlc_googlenet with all three.
PUBLISHED = {
    "caffenet": 60965224,
    "caffenet_nolrn": 60965224,
    "caffenet_ungrouped": 62378344,
    "googlenet": 13378280,
    "googlenet_single": 6998552,
    "vgg16": 138357544,
}
# Shapes (channels, height, width) as Krizhevsky et al., Szegedy et al. (table 1) and Simonyan &
# Zisserman give them.
SHAPES = {
    "caffenet": {
        "data": (3, 227, 227), "conv1": (96, 55, 55), "pool1": (96, 27, 27),
        "norm1": (96, 27, 27), "conv2": (256, 27, 27), "pool2": (256, 13, 13),
        "conv3": (384, 13, 13), "conv4": (384, 13, 13), "conv5": (256, 13, 13),
        "pool5": (256, 6, 6), "fc6": (4096,), "fc7": (4096,), "fc8": (1000,)},
    "googlenet": {
        "data": (3, 224, 224), "conv1/7x7_s2": (64, 112, 112), "pool1/3x3_s2": (64, 56, 56),
        "conv2/3x3": (192, 56, 56), "pool2/3x3_s2": (192, 28, 28),
        "inception_3a/output": (256, 28, 28), "inception_3b/output": (480, 28, 28),
        "pool3/3x3_s2": (480, 14, 14), "inception_4a/output": (512, 14, 14),
        "inception_4b/output": (512, 14, 14), "inception_4c/output": (512, 14, 14),
        "inception_4d/output": (528, 14, 14), "inception_4e/output": (832, 14, 14),
        "pool4/3x3_s2": (832, 7, 7), "inception_5a/output": (832, 7, 7),
        "inception_5b/output": (1024, 7, 7), "pool5/7x7_s1": (1024, 1, 1),
        "loss1/ave_pool": (512, 4, 4), "loss2/ave_pool": (528, 4, 4), "loss1/conv": (128, 4, 4),
        "loss2/fc": (1024,), "loss1/classifier": (1000,), "loss3/classifier": (1000,)},
    "vgg16": {
        "data": (3, 224, 224), "conv1_2": (64, 224, 224), "pool1": (64, 112, 112),
        "conv2_2": (128, 112, 112), "pool2": (128, 56, 56), "conv3_3": (256, 56, 56),
        "pool3": (256, 28, 28), "conv4_3": (512, 28, 28), "pool4": (512, 14, 14),
        "conv5_3": (512, 14, 14), "pool5": (512, 7, 7), "fc6": (4096,), "fc7": (4096,),
        "fc8": (1000,)},
}


def shipped():
    """The paths of all definitions below models/."""
    return sorted(os.path.relpath(path, MODELS)
                  for path in glob.glob(os.path.join(MODELS, "*", "*.prototxt")))


def read(path):
    return read_definition(os.path.join(MODELS, path))


def _as_caffe_builds_them(paths):
    """Learned and all parameters, and blob shapes, of nets that Caffe builds from their files."""
    caffe = import_caffe()
    built = {}
    for path in paths:
        net = caffe.Net(os.path.join(MODELS, path), caffe.TEST)
        counts = {name: sum(blob.count for blob in blobs) for name, blobs in net.params.items()}
        learned = sum(count for name, count in counts.items()
                      if net.layer_dict[name].type != "BatchNorm")
        built[path] = learned, {name: tuple(blob.shape)[1:] for name, blob in net.blobs.items()}
    return built


@pytest.fixture(scope="module")
def built():
    return processes.in_child(_as_caffe_builds_them,
                            [path for path in shipped() if path.endswith("deploy.prototxt")])


def test_the_definitions_are_what_generate_writes(tmp_path):
    assert generate.main(["--to", str(tmp_path)]) == 0
    written = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.glob("*/*"))
    assert written == shipped()
    for path in written:
        with open(os.path.join(MODELS, path), "rb") as file:
            assert (tmp_path / path).read_bytes() == file.read(), path


@pytest.mark.parametrize("net", sorted(PUBLISHED))
def test_nets_have_the_published_number_of_parameters(built, net):
    assert built[net + "/deploy.prototxt"][0] == PUBLISHED[net]


@pytest.mark.parametrize("net", sorted(SHAPES))
def test_blobs_have_the_published_shapes(built, net):
    shapes = built[net + "/deploy.prototxt"][1]
    assert {name: shapes[name] for name in SHAPES[net]} == SHAPES[net]


def test_the_parameters_in_a_head_are_those_of_its_net(built):
    for path, (learned, _) in built.items():
        with open(os.path.join(MODELS, path), encoding="utf-8") as file:
            told = re.findall(r"^#.*?([\d,]+) parameters\.$", file.read(), re.MULTILINE)
        assert told == ["{:,}".format(learned)], path


@pytest.mark.parametrize("net", ["caffenet", "caffenet_nolrn", "googlenet", "googlenet_single"])
def test_a_training_net_has_the_layers_of_its_deploy_net(net):
    deploy, _ = image_layers(read(net + "/deploy.prototxt"), 1)
    training, _ = image_layers(read(net + "/train_val.prototxt"), 1)
    assert list(training) == list(deploy)


@pytest.mark.parametrize("net, crop, batch", [
    ("caffenet", 227, 256), ("caffenet_nolrn", 227, 256), ("googlenet", 224, 32),
    ("googlenet_single", 224, 32)])
def test_training_reads_mirrored_crops_in_the_papers_batches(net, crop, batch):
    training, validation = [layer for layer in read(net + "/train_val.prototxt").layer
                            if layer.type == "Data"]
    for layer in (training, validation):
        assert layer.transform_param.crop_size == crop
    assert training.data_param.batch_size == batch
    assert training.transform_param.mirror
    assert not validation.transform_param.mirror


def test_auxiliary_losses_count_three_tenths():
    weights = {layer.name: list(layer.loss_weight)
               for layer in read("googlenet/train_val.prototxt").layer
               if layer.type == "SoftmaxWithLoss"}
    assert {name: [round(weight, 6) for weight in given] for name, given in weights.items()} == {
        "loss1/loss": [0.3], "loss2/loss": [0.3], "loss3/loss3": [1]}


@pytest.mark.parametrize("whole, part, left", [
    ("caffenet", "caffenet_nolrn", {"norm1", "norm2"}),
    ("caffenet_cifar", "caffenet_cifar_nolrn", {"norm1", "norm2"}),
    ("googlenet", "googlenet_single", {
        tower + "/" + name for tower in ("loss1", "loss2")
        for name in ("ave_pool", "conv", "relu_conv", "fc", "relu_fc", "drop_fc", "classifier")}),
    ("googlenet_cifar", "googlenet_cifar_single", {
        tower + "/" + name for tower in ("loss1", "loss2")
        for name in ("conv", "relu_conv", "fc", "relu_fc", "drop_fc", "classifier")}),
])
def test_a_variant_lacks_nothing_but_what_its_name_says(whole, part, left):
    layers = {layer.name: layer for layer in read(whole + "/deploy.prototxt").layer}
    kept = {layer.name: layer for layer in read(part + "/deploy.prototxt").layer}
    assert set(layers) - set(kept) == left
    assert set(kept) <= set(layers)
    for name, layer in kept.items():
        for field in ("type", "param", "convolution_param", "inner_product_param"):
            assert getattr(layer, field) == getattr(layers[name], field)


@pytest.mark.parametrize("dialect", ["deploy", "train_val"])
def test_googlenet_on_voc_trains_without_intermediate_losses(dialect):
    """Section 4.4: one sigmoid cross-entropy on top, and no tower below it."""
    net = nets.classifier(read("googlenet/%s.prototxt" % dialect), 10, 20)
    single = nets.classifier(read("googlenet_single/deploy.prototxt"), 10, 20)
    assert list(net.layers) == list(single.layers)
    names = [layer.name for layer in net.layers]
    assert not [name for name in names if name.startswith(("loss1", "loss2"))]
    assert names[-1] == net.layer == "loss3/classifier_voc"
    assert _losses(net) == ["SigmoidCrossEntropyLoss"]


def test_vgg16_on_voc_trains_all_its_layers_at_once():
    """Section 4.4: no stage-wise pre-training, so every affine layer is there and learns."""
    net = nets.classifier(read("vgg16/deploy.prototxt"), 10, 20)
    affine = [layer for layer in net.layers if layer.type in AFFINE]
    assert len(affine) == 16
    assert affine[-1].name == net.layer == "fc8_voc"
    assert affine[-1].inner_product_param.num_output == 20
    assert all(parameter.lr_mult > 0 for layer in affine for parameter in layer.param)
    assert _losses(net) == ["SigmoidCrossEntropyLoss"]


def _losses(net):
    source = caffe_messages().LayerParameter(
        name="data", type="Python", top=[net.image.blob, "label"])
    trained = nets.training_net(net, source)
    return [layer.type for layer in trained.layer
            if layer.type.endswith("Loss") or list(layer.loss_weight)]
