"""Write the network definitions of this folder from one description of each (section 4).

    python models/generate.py

It writes models/*/deploy.prototxt and models/*/train_val.prototxt. Names, shapes, fillers and
learning rate multipliers of the reference networks are those of the public definitions, so that
public caffemodels can be loaded. models/README.md says what each net is for.
"""
import argparse
import logging
import os
import sys
from typing import Callable, Dict, NamedTuple, Optional, Sequence, Tuple

from ddinit import files, processes
from layer_text import (
    MSRA,
    XAVIER,
    Enum,
    Layers,
    accuracy,
    batch_norm,
    convolution,
    definition,
    deploy,
    dropout,
    gaussian,
    imagenet,
    inner_product,
    layer,
    local_response,
    pooling,
    relu,
)

log = logging.getLogger("generate")


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Write the definitions that the command line asks for; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--to", metavar="DIR", default=os.path.dirname(os.path.abspath(__file__)),
                        help="folder that receives NET/*.prototxt (default: this script's)")
    processes.log_to_stderr()
    return processes.command_line(_run, parser.parse_args(argv), parser.prog)


def _run(arguments: argparse.Namespace) -> None:
    for name, text in definitions().items():
        path = os.path.join(arguments.to, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with files.replacing(path) as temporary, open(temporary, "w") as file:
            file.write(text)
        log.info("wrote %s", path)


# ---------------------------------------------------------------------------------------------
# The nets


def definitions() -> Dict[str, str]:
    """Return the text of every definition by its path below this folder."""
    nolrn = caffenet(CAFFENET, lrn=False)
    ungrouped = caffenet([row._replace(group=1) for row in CAFFENET])
    return {
        "caffenet/deploy.prototxt": definition(
            "CaffeNet", ABOUT_CAFFENET, deploy(caffenet(CAFFENET), side=227)),
        "caffenet/train_val.prototxt": definition(
            "CaffeNet", ABOUT_CAFFENET + ABOUT_DATA, caffenet_train_val(caffenet(CAFFENET))),
        "caffenet_nolrn/deploy.prototxt": definition(
            "CaffeNet_noLRN", ABOUT_NOLRN, deploy(nolrn, side=227)),
        "caffenet_nolrn/train_val.prototxt": definition(
            "CaffeNet_noLRN", ABOUT_NOLRN + ABOUT_DATA, caffenet_train_val(nolrn)),
        "caffenet_bn/deploy.prototxt": definition(
            "CaffeNet_BN", ABOUT_BN, deploy(caffenet(CAFFENET, normalize=True), side=227)),
        "caffenet_ungrouped/deploy.prototxt": definition(
            "CaffeNet_ungrouped", ABOUT_UNGROUPED, deploy(ungrouped, side=227)),
        "caffenet_tiny/deploy.prototxt": definition(
            "CaffeNet_tiny", ABOUT_TINY, deploy(caffenet(CAFFENET_TINY), side=99)),
        "caffenet_small/deploy.prototxt": definition(
            "CaffeNet_small", ABOUT_SMALL, deploy(caffenet(CAFFENET_SMALL, drop=False), side=115)),
        "caffenet_cifar/deploy.prototxt": definition(
            "CaffeNet_CIFAR", ABOUT_CIFAR, deploy(caffenet(CAFFENET_CIFAR), side=32)),
        "caffenet_cifar_nolrn/deploy.prototxt": definition(
            "CaffeNet_CIFAR_noLRN", ABOUT_CIFAR_NOLRN,
            deploy(caffenet(CAFFENET_CIFAR, lrn=False), side=32)),
        "caffenet_cifar_half/deploy.prototxt": definition(
            "CaffeNet_CIFAR_half", ABOUT_CIFAR_HALF,
            deploy(caffenet(CAFFENET_CIFAR_HALF), side=32)),
        "caffenet_cifar_half_bn/deploy.prototxt": definition(
            "CaffeNet_CIFAR_half_BN", ABOUT_CIFAR_HALF_BN,
            deploy(caffenet(CAFFENET_CIFAR_HALF, normalize=True), side=32)),
        "googlenet/deploy.prototxt": definition(
            "GoogleNet", ABOUT_GOOGLENET, deploy(googlenet(), side=224)),
        "googlenet/train_val.prototxt": definition(
            "GoogleNet", ABOUT_GOOGLENET + ABOUT_DATA, googlenet_train_val(towers=True)),
        "googlenet_single/deploy.prototxt": definition(
            "GoogleNet_single", ABOUT_SINGLE, deploy(googlenet(towers=False), side=224)),
        "googlenet_single/train_val.prototxt": definition(
            "GoogleNet_single", ABOUT_SINGLE + ABOUT_DATA, googlenet_train_val(towers=False)),
        "googlenet_cifar/deploy.prototxt": definition(
            "GoogleNet_CIFAR", ABOUT_GOOGLENET_CIFAR, deploy(googlenet_cifar(), side=32)),
        "googlenet_cifar_single/deploy.prototxt": definition(
            "GoogleNet_CIFAR_single", ABOUT_GOOGLENET_CIFAR_SINGLE,
            deploy(googlenet_cifar(towers=False), side=32)),
        "vgg16/deploy.prototxt": definition(
            "VGG_ILSVRC_16_layers", ABOUT_VGG16, deploy(vgg16(), side=224)),
        "residual_bn/deploy.prototxt": definition(
            "ResNet_14", ABOUT_RESIDUAL, deploy(residual(), side=32)),
    }


ABOUT_DATA = """\
Reads the databases and the mean file of Caffe's ImageNet example: change `source` and
`mean_file` to yours, or subtract `mean_value` 104, 117 and 123 (blue, green, red) instead.
"""


class Row(NamedTuple):
    """One affine layer of the CaffeNet family; a kernel size of 0 makes it fully connected."""

    name: str
    num_output: int
    kernel_size: int
    stride: int
    pad: int
    group: int
    std: float
    bias: float


ABOUT_CAFFENET = """\
CaffeNet: the reference network of Caffe (bvlc_reference_caffenet), which is the network of
Krizhevsky, Sutskever & Hinton 2012 with pooling before normalization.  Names, shapes and the
hand-tuned fillers are the reference's.  60,965,224 parameters.
"""
CAFFENET = [
    # name, outputs, kernel, stride, pad, group, std, bias
    Row("conv1", 96, 11, 4, 0, 1, 0.01, 0),
    Row("conv2", 256, 5, 1, 2, 2, 0.01, 1),
    Row("conv3", 384, 3, 1, 1, 1, 0.01, 0),
    Row("conv4", 384, 3, 1, 1, 2, 0.01, 1),
    Row("conv5", 256, 3, 1, 1, 2, 0.01, 1),
    Row("fc6", 4096, 0, 1, 0, 1, 0.005, 1),
    Row("fc7", 4096, 0, 1, 0, 1, 0.005, 1),
    Row("fc8", 1000, 0, 1, 0, 1, 0.01, 0),
]

ABOUT_NOLRN = """\
CaffeNet without its two local response normalizations (paper, section 4.5 and figure 3);
everything else is CaffeNet, whose caffemodels load.  60,965,224 parameters.
"""
ABOUT_BN = """\
CaffeNet with batch normalization after every affine layer but the last (paper, table 1).
Everything else is CaffeNet, so that the two differ in nothing but that: the local response
normalizations stay, and so do the biases, although BatchNorm subtracts them, because Caffe
loads a CaffeNet caffemodel only into layers with as many blobs.  60,984,360 parameters.
"""
ABOUT_UNGROUPED = """\
CaffeNet without groups in its convolutions, the architecture of Doersch, Gupta & Efros 2015
(paper, section 4 and table 3).  62,378,344 parameters.
"""

ABOUT_TINY = """\
CaffeNet's layers at a fraction of its width, for trying things: a forward and backward pass of
16 images takes a fraction of a second on one CPU core.  Fillers are CaffeNet's with the standard
deviation times the root of CaffeNet's fan-in over this one's, so that activations spread alike.
57,204 parameters.
"""
CAFFENET_TINY = [
    # name, outputs, kernel, stride, pad, group, std, bias
    Row("conv1", 16, 11, 4, 0, 1, 0.01, 0),
    Row("conv2", 32, 5, 1, 2, 2, 0.025, 1),
    Row("conv3", 48, 3, 1, 1, 1, 0.03, 0),
    Row("conv4", 48, 3, 1, 1, 2, 0.03, 1),
    Row("conv5", 32, 3, 1, 1, 2, 0.03, 1),
    Row("fc6", 64, 0, 1, 0, 1, 0.04, 1),
    Row("fc7", 64, 0, 1, 0, 1, 0.04, 1),
    Row("fc8", 20, 0, 1, 0, 1, 0.08, 0),
]

ABOUT_SMALL = """\
CaffeNet's layers at a fraction of its width and half its stride, for detecting small objects
(experiments/study_detection.py): cells of conv5 are 8 pixels apart.  Without dropout, which such
narrow layers do not need.  Fillers are made as caffenet_tiny's.  197,172 parameters.
"""
CAFFENET_SMALL = [
    # name, outputs, kernel, stride, pad, group, std, bias
    Row("conv1", 16, 7, 2, 0, 1, 0.016, 0),
    Row("conv2", 32, 5, 1, 2, 2, 0.025, 1),
    Row("conv3", 48, 3, 1, 1, 1, 0.03, 0),
    Row("conv4", 48, 3, 1, 1, 2, 0.03, 1),
    Row("conv5", 32, 3, 1, 1, 2, 0.03, 1),
    Row("fc6", 128, 0, 1, 0, 1, 0.014, 1),
    Row("fc7", 64, 0, 1, 0, 1, 0.03, 1),
    Row("fc8", 20, 0, 1, 0, 1, 0.08, 0),
]

ABOUT_CIFAR = """\
A small net in CaffeNet's image for 32x32 color images of 10 classes (CIFAR-10, Krizhevsky 2009).
251,018 parameters.
"""
ABOUT_CIFAR_NOLRN = """\
caffenet_cifar without its two local response normalizations (paper, section 4.5).
251,018 parameters.
"""
CAFFENET_CIFAR = [
    # name, outputs, kernel, stride, pad, group, std, bias
    Row("conv1", 32, 5, 1, 2, 1, 0.01, 0),
    Row("conv2", 64, 5, 1, 2, 2, 0.025, 1),
    Row("conv3", 64, 3, 1, 1, 1, 0.03, 0),
    Row("conv4", 64, 3, 1, 1, 2, 0.03, 1),
    Row("conv5", 64, 3, 1, 1, 2, 0.03, 1),
    Row("fc6", 128, 0, 1, 0, 1, 0.04, 1),
    Row("fc7", 128, 0, 1, 0, 1, 0.04, 1),
    Row("fc8", 10, 0, 1, 0, 1, 0.08, 0),
]

ABOUT_CIFAR_HALF = """\
caffenet_cifar with half as many channels in its convolutions, for studies of many short trainings.
Fillers have caffenet_cifar's standard deviation times the root of its fan-in over this one's, so
that activations spread alike.  109,642 parameters.
"""
ABOUT_CIFAR_HALF_BN = """\
caffenet_cifar_half with batch normalization after every affine layer but the last (paper, table 1).
110,442 parameters.
"""
CAFFENET_CIFAR_HALF = [
    # name, outputs, kernel, stride, pad, group, std, bias
    Row("conv1", 16, 5, 1, 2, 1, 0.01, 0),
    Row("conv2", 32, 5, 1, 2, 2, 0.035, 1),
    Row("conv3", 32, 3, 1, 1, 1, 0.042, 0),
    Row("conv4", 32, 3, 1, 1, 2, 0.042, 1),
    Row("conv5", 32, 3, 1, 1, 2, 0.042, 1),
    Row("fc6", 128, 0, 1, 0, 1, 0.057, 1),
    Row("fc7", 128, 0, 1, 0, 1, 0.04, 1),
    Row("fc8", 10, 0, 1, 0, 1, 0.08, 0),
]


def caffenet(rows: Sequence[Row], lrn: bool = True, normalize: bool = False,
             drop: bool = True) -> Layers:
    """Return CaffeNet's layers from conv1 to fc8, with the affine layers in `rows`.

    `lrn` keeps the local response normalizations and `drop` the dropouts; `normalize` follows
    every affine layer but the last by BatchNorm and Scale.
    """
    layers: Layers = []
    bottom = "data"
    for row in rows:
        weights, number = gaussian(row.std), row.name[-1]
        if row.kernel_size:
            layers.append(convolution(
                row.name, bottom, row.num_output, row.kernel_size, row.stride, row.pad, row.group,
                weights=weights, bias=row.bias))
        else:
            layers.append(inner_product(
                row.name, bottom, row.num_output, weights=weights, bias=row.bias))
        if row is rows[-1]:
            break
        bottom = row.name
        if normalize:
            layers += batch_norm(row.name + "/bn", row.name + "/scale", bottom)
        layers.append(relu("relu" + number, bottom))
        if row.name in ("conv1", "conv2", "conv5"):
            layers.append(pooling("pool" + number, bottom, "MAX", 3, 2))
            bottom = "pool" + number
        if lrn and row.name in ("conv1", "conv2"):
            layers.append(local_response("norm" + number, bottom))
            bottom = "norm" + number
        if drop and not row.kernel_size:
            layers.append(dropout("drop" + number, bottom, 0.5))
    return layers


def caffenet_train_val(layers: Layers) -> Layers:
    """Return the reference's training and validation net around `layers`."""
    mean = {"mean_file": "data/ilsvrc12/imagenet_mean.binaryproto"}
    return [
        *imagenet(crop=227, mean=mean, batch=256),
        *layers,
        accuracy("accuracy", "fc8"),
        layer("loss", "SoftmaxWithLoss", ["fc8", "label"]),
    ]


ABOUT_GOOGLENET = """\
GoogLeNet (Szegedy et al. 2015) as released with Caffe (bvlc_googlenet), with its two auxiliary
classifiers.  Names, shapes and fillers are the reference's.  13,378,280 parameters.
"""
ABOUT_SINGLE = """\
GoogLeNet without its two auxiliary classifiers (paper, section 4.5 and figure 4); everything else
is GoogLeNet, whose caffemodels load.  6,998,552 parameters.
"""
INCEPTION = {
    # outputs of 1x1, 3x3_reduce, 3x3, 5x5_reduce, 5x5, pool_proj: Szegedy et al. 2015, table 1
    "3a": (64, 96, 128, 16, 32, 32),
    "3b": (128, 128, 192, 32, 96, 64),
    "4a": (192, 96, 208, 16, 48, 64),
    "4b": (160, 112, 224, 24, 64, 64),
    "4c": (128, 128, 256, 24, 64, 64),
    "4d": (112, 144, 288, 32, 64, 64),
    "4e": (256, 160, 320, 32, 128, 128),
    "5a": (256, 160, 320, 32, 128, 128),
    "5b": (384, 192, 384, 48, 128, 128),
}
TOWERS = {"4a": "loss1", "4d": "loss2"}  # the auxiliary classifiers after these modules
POOLED = {"3b": "pool3/3x3_s2", "4e": "pool4/3x3_s2"}  # the poolings after these modules


def googlenet_body(classifier: Callable[[str, str], Layers],
                   divisor: int = 1) -> Tuple[Layers, str]:
    """Return GoogLeNet's layers up to its last module, and the name of that one's blob.

    Channels are divided by `divisor`.  `classifier(name, blob)` gives the layers of an auxiliary
    classifier on its pooled blob, none of a net without.
    """
    layers = [
        *rectified("conv1", "7x7_s2", "data", 64 // divisor, 7, stride=2, pad=3),
        pooling("pool1/3x3_s2", "conv1/7x7_s2", "MAX", 3, 2),
        local_response("pool1/norm1", "pool1/3x3_s2"),
        *rectified("conv2", "3x3_reduce", "pool1/norm1", 64 // divisor, 1),
        *rectified("conv2", "3x3", "conv2/3x3_reduce", 192 // divisor, 3, pad=1),
        local_response("conv2/norm2", "conv2/3x3"),
        pooling("pool2/3x3_s2", "conv2/norm2", "MAX", 3, 2),
    ]
    bottom = "pool2/3x3_s2"
    for module, outputs in INCEPTION.items():
        layers += inception("inception_" + module, bottom, [count // divisor for count in outputs])
        bottom = "inception_%s/output" % module
        if module in TOWERS:
            pool = TOWERS[module] + "/ave_pool"
            auxiliary = classifier(TOWERS[module], pool)
            layers += [pooling(pool, bottom, "AVE", 5, 3), *auxiliary] if auxiliary else []
        if module in POOLED:
            layers.append(pooling(POOLED[module], bottom, "MAX", 3, 2))
            bottom = POOLED[module]
    return layers, bottom


def googlenet(towers: bool = True, losses: bool = False) -> Layers:
    """Return GoogLeNet's layers up to its classifiers, or with `losses` up to their losses."""
    def classifier(name: str, pool: str) -> Layers:
        if not towers:
            return []
        return tower(name, pool) + (googlenet_losses(name, "loss", weight=0.3) if losses else [])

    layers, bottom = googlenet_body(classifier)
    layers += [
        pooling("pool5/7x7_s1", bottom, "AVE", 7, 1),
        dropout("pool5/drop_7x7_s1", "pool5/7x7_s1", 0.4),
        inner_product("loss3/classifier", "pool5/7x7_s1", 1000, weights=XAVIER, bias=0),
    ]
    if losses:
        layers += googlenet_losses("loss3", "loss3", weight=1)
    return layers


def rectified(part: str, name: str, bottom: str, num_output: int, kernel_size: int,
              stride: int = 1, pad: int = 0) -> Layers:
    """Return a convolution of GoogLeNet, whose biases start at 0.2, and its ReLU."""
    blob = "%s/%s" % (part, name)
    return [
        convolution(blob, bottom, num_output, kernel_size, stride, pad, weights=XAVIER, bias=0.2),
        relu("%s/relu_%s" % (part, name.replace("_s2", "")), blob),
    ]


def inception(part: str, bottom: str, outputs: Sequence[int]) -> Layers:
    """Return an inception module: four branches whose channels are concatenated."""
    of_1x1, of_3x3_reduce, of_3x3, of_5x5_reduce, of_5x5, of_pool_proj = outputs
    branches = [part + "/" + name for name in ("1x1", "3x3", "5x5", "pool_proj")]
    return [
        *rectified(part, "1x1", bottom, of_1x1, 1),
        *rectified(part, "3x3_reduce", bottom, of_3x3_reduce, 1),
        *rectified(part, "3x3", part + "/3x3_reduce", of_3x3, 3, pad=1),
        *rectified(part, "5x5_reduce", bottom, of_5x5_reduce, 1),
        *rectified(part, "5x5", part + "/5x5_reduce", of_5x5, 5, pad=2),
        pooling(part + "/pool", bottom, "MAX", 3, 1, pad=1),
        *rectified(part, "pool_proj", part + "/pool", of_pool_proj, 1),
        layer(part + "/output", "Concat", branches),
    ]


def tower(part: str, bottom: str, num_conv: int = 128, num_fc: int = 1024,
          classes: int = 1000) -> Layers:
    """Return an auxiliary classifier, without its pooling."""
    return [
        *rectified(part, "conv", bottom, num_conv, 1),
        inner_product(part + "/fc", part + "/conv", num_fc, weights=XAVIER, bias=0.2),
        relu(part + "/relu_fc", part + "/fc"),
        dropout(part + "/drop_fc", part + "/fc", 0.7),
        inner_product(part + "/classifier", part + "/fc", classes, weights=XAVIER, bias=0),
    ]


def googlenet_losses(part: str, name: str, weight: float) -> Layers:
    """Return the loss and the accuracies of a classifier; the loss counts `weight` times."""
    scores = part + "/classifier"
    return [
        layer("%s/%s" % (part, name), "SoftmaxWithLoss", [scores, "label"],
              "%s/%s" % (part, part), loss_weight=weight),
        accuracy(part + "/top-1", scores),
        accuracy(part + "/top-5", scores, top_k=5),
    ]


def googlenet_train_val(towers: bool) -> Layers:
    """Return the reference's training and validation net, with or without its towers."""
    mean = {"mean_value": [104, 117, 123]}
    return [*imagenet(crop=224, mean=mean, batch=32), *googlenet(towers, losses=True)]


ABOUT_GOOGLENET_CIFAR = """\
A small net in GoogLeNet's image for 32x32 color images of 10 classes (CIFAR-10, Krizhevsky 2009):
its first five inception modules at a quarter of their width, with an auxiliary classifier after
the third and the fourth.  270,446 parameters.
"""
ABOUT_GOOGLENET_CIFAR_SINGLE = """\
googlenet_cifar without its two auxiliary classifiers (paper, section 4.5).  128,282 parameters.
"""
CIFAR_DIVISOR = 4  # of the numbers of channels
CIFAR_MODULES = ("3a", "3b", "4a", "4b", "4c")
CIFAR_TOWERS = {"4a": "loss1", "4b": "loss2"}


def googlenet_cifar(towers: bool = True) -> Layers:
    """Return the layers of the small GoogLeNet up to its classifiers.

    Two poolings fewer than GoogLeNet's: maps are 16x16, 8x8 and 4x4 pixels, the last of which
    the auxiliary classifiers take as they are.
    """
    layers = [
        *rectified("conv1", "5x5", "data", 16, 5, pad=2),
        pooling("pool1/3x3_s2", "conv1/5x5", "MAX", 3, 2),
        local_response("pool1/norm1", "pool1/3x3_s2"),
        *rectified("conv2", "3x3_reduce", "pool1/norm1", 16, 1),
        *rectified("conv2", "3x3", "conv2/3x3_reduce", 48, 3, pad=1),
        local_response("conv2/norm2", "conv2/3x3"),
        pooling("pool2/3x3_s2", "conv2/norm2", "MAX", 3, 2),
    ]
    bottom = "pool2/3x3_s2"
    for module in CIFAR_MODULES:
        outputs = [count // CIFAR_DIVISOR for count in INCEPTION[module]]
        layers += inception("inception_" + module, bottom, outputs)
        bottom = "inception_%s/output" % module
        if towers and module in CIFAR_TOWERS:
            layers += tower(CIFAR_TOWERS[module], bottom, num_conv=32, num_fc=128, classes=10)
        if module in POOLED:
            layers.append(pooling(POOLED[module], bottom, "MAX", 3, 2))
            bottom = POOLED[module]
    return [
        *layers,
        pooling("pool5/4x4_s1", bottom, "AVE", 4, 1),
        dropout("pool5/drop_4x4_s1", "pool5/4x4_s1", 0.4),
        inner_product("loss3/classifier", "pool5/4x4_s1", 10, weights=XAVIER, bias=0),
    ]


ABOUT_VGG16 = """\
VGG-16 (Simonyan & Zisserman 2015, configuration D): names and shapes are those of the public
VGG_ILSVRC_16_layers, which has no fillers.  These are Glorot & Bengio's (`xavier`) with biases of
0, which the authors report to train without stage-wise pre-training.  138,357,544 parameters.
"""
VGG16 = [(64, 2), (128, 2), (256, 3), (512, 3), (512, 3)]  # width and depth of the stages


def vgg16() -> Layers:
    """Return VGG-16's layers from conv1_1 to fc8."""
    layers: Layers = []
    bottom = "data"
    for stage, (width, depth) in enumerate(VGG16, 1):
        for place in range(1, depth + 1):
            name = "%d_%d" % (stage, place)
            layers += [
                convolution("conv" + name, bottom, width, 3, pad=1, weights=XAVIER, bias=0),
                relu("relu" + name, "conv" + name),
            ]
            bottom = "conv" + name
        layers.append(pooling("pool%d" % stage, bottom, "MAX", 2, 2))
        bottom = "pool%d" % stage
    for number in ("6", "7"):
        layers += [
            inner_product("fc" + number, bottom, 4096, weights=XAVIER, bias=0),
            relu("relu" + number, "fc" + number),
            dropout("drop" + number, "fc" + number, 0.5),
        ]
        bottom = "fc" + number
    return [*layers, inner_product("fc8", bottom, 1000, weights=XAVIER, bias=0)]


ABOUT_RESIDUAL = """\
A residual net (He et al. 2016, section 4.2) of three stages of two blocks for 32x32 color images
of 10 classes, named as the public ResNet definitions are.  Where a stage halves the map, its
shortcut is a projection; the other shortcuts are identities.  Convolutions have no biases, since
BatchNorm follows.  175,258 parameters.
"""


def residual() -> Layers:
    """Return the layers of the residual net."""
    layers = [
        *normalized_convolution("conv1", "_conv1", "data", 16, 3),
        relu("conv1_relu", "conv1"),
    ]
    bottom = "conv1"
    for stage, width in enumerate((16, 32, 64), 2):
        for block in "ab":
            stride = 2 if stage > 2 and block == "a" else 1
            layers += residual_block("%d%s" % (stage, block), bottom, width, stride)
            bottom = "res%d%s" % (stage, block)
    return [
        *layers,
        layer("pool5", "Pooling", bottom,
              pooling_param={"pool": Enum("AVE"), "global_pooling": True}),
        inner_product("fc10", "pool5", 10, weights=MSRA, bias=0),
    ]


def residual_block(block: str, bottom: str, width: int, stride: int) -> Layers:
    """Return two 3x3 convolutions around which a shortcut leads."""
    name, first, second = "res" + block, "res%s_branch2a" % block, "res%s_branch2b" % block
    layers: Layers = []
    shortcut = bottom
    if stride > 1:
        shortcut = name + "_branch1"
        layers += normalized_convolution(shortcut, block + "_branch1", bottom, width, 1, stride)
    return [
        *layers,
        *normalized_convolution(first, block + "_branch2a", bottom, width, 3, stride),
        relu(first + "_relu", first),
        *normalized_convolution(second, block + "_branch2b", first, width, 3),
        layer(name, "Eltwise", [shortcut, second], eltwise_param={"operation": Enum("SUM")}),
        relu(name + "_relu", name),
    ]


def normalized_convolution(name: str, suffix: str, bottom: str, num_output: int, kernel_size: int,
                           stride: int = 1) -> Layers:
    """Return a convolution that keeps the map's size, up to its stride, and its normalization."""
    return [
        convolution(name, bottom, num_output, kernel_size, stride, pad=kernel_size // 2,
                    weights=MSRA, bias=None),
        *batch_norm("bn" + suffix, "scale" + suffix, name),
    ]


if __name__ == "__main__":
    sys.exit(main())
