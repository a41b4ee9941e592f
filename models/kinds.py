"""Write small networks of many kinds, to try the command on: one deploy definition for each.

    python models/kinds.py build/kinds

Each function below describes one network.  Its docstring names the paper or the public definition
that it follows and what was shrunk, and becomes the comment at the head of the definition.
Convolutions without a filler have none in the public definition either.  All layer types are
those of BVLC Caffe.  experiments/kinds_table.py initializes and rescales all of them.
"""
import argparse
import functools
import inspect
import os
import sys
from typing import Callable, Dict, List, Optional, Sequence

from generate import CAFFENET_TINY, caffenet, googlenet_body, tower
from layer_text import (
    MSRA,
    XAVIER,
    Enum,
    Layers,
    Message,
    batch_norm,
    convolution,
    definition,
    deploy,
    dropout,
    gaussian,
    images,
    inner_product,
    layer,
    local_response,
    pooling,
    relu,
)

conv = functools.partial(convolution, weights=XAVIER, bias=0)
dense = functools.partial(inner_product, weights=XAVIER, bias=0)
unfilled = functools.partial(convolution, weights=None, bias=0)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Write the definition of every kind; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="folder that receives one KIND.prototxt for each kind")
    folder = parser.parse_args(argv).folder
    os.makedirs(folder, exist_ok=True)
    for name, text in definitions().items():
        with open(os.path.join(folder, name + ".prototxt"), "w", encoding="utf-8") as file:
            file.write(text)
    return 0


def definitions() -> Dict[str, str]:
    """Return the text of every definition by the name of its kind."""
    return {kind.__name__: definition(kind.__name__, inspect.cleandoc(kind.__doc__ or ""), kind(),
                                      writer="models/kinds.py") for kind in KINDS}


# ---------------------------------------------------------------------------------------------
# Parts that several networks share


def conv_relu(name: str, bottom: str, num_output: int, kernel_size: int, stride: int = 1,
              pad: int = 0, weights: Optional[Message] = XAVIER) -> Layers:
    """Return a convolution and a rectifier that works in place."""
    return [conv(name, bottom, num_output, kernel_size, stride, pad, weights=weights),
            relu("relu_" + name, name)]


def conv_bn(name: str, bottom: str, num_output: int, kernel_size: int, stride: int = 1,
            group: int = 1, folded: bool = False) -> Layers:
    """Return a convolution and its BatchNorm and Scale, which a `folded` one holds itself."""
    convolve = functools.partial(convolution, name, bottom, num_output, kernel_size, stride,
                                 kernel_size // 2, group, weights=MSRA)
    if folded:
        return [convolve(bias=0)]
    return [convolve(bias=None), *batch_norm(name + "/bn", name + "/scale", name)]


def concat(name: str, bottoms: List[str]) -> Message:
    """Return a concatenation of channels."""
    return layer(name, "Concat", bottoms)


def add(name: str, bottoms: List[str]) -> Message:
    """Return a sum of blobs."""
    return layer(name, "Eltwise", bottoms, eltwise_param={"operation": Enum("SUM")})


def crop(name: str, bottom: str, like: str, offset: int) -> Message:
    """Return a crop of maps to the size of those in the blob `like`."""
    return layer(name, "Crop", [bottom, like], crop_param={"axis": 2, "offset": offset})


def global_pooling(name: str, bottom: str) -> Message:
    """Return the average over the whole map."""
    return layer(name, "Pooling", bottom,
                 pooling_param={"pool": Enum("AVE"), "global_pooling": True})


def upsampling(name: str, bottom: str, num_output: int, factor: int) -> Message:
    """Return a bilinear interpolation of each channel, which no solver changes."""
    message = convolution(name, bottom, num_output, 2 * factor, factor, group=num_output,
                          weights={"type": "bilinear"}, bias=None, kind="Deconvolution")
    return {**message, "param": [{"lr_mult": 0}]}


def sharing(message: Message, owner: str) -> Message:
    """Return a layer whose weights and biases carry the names of its owner, which share them."""
    return {**message, "param": [{"name": owner + suffix, **multipliers} for suffix, multipliers
                                 in zip(("_w", "_b"), message["param"])]}


def vgg_trunk(widths: Sequence[int], depths: Sequence[int], pad: int = 1,
              weights: Optional[Message] = XAVIER) -> Layers:
    """Return stages of 3x3 convolutions, each but the first after a pooling.

    `pad` is the padding of the first convolution.
    """
    layers: Layers = []
    bottom = "data"
    for stage, (width, depth) in enumerate(zip(widths, depths), 1):
        if stage > 1:
            layers.append(pooling("pool%d" % (stage - 1), bottom, "MAX", 2, 2))
            bottom = "pool%d" % (stage - 1)
        for place in range(1, depth + 1):
            name = "conv%d_%d" % (stage, place)
            layers += conv_relu(name, bottom, width, 3, 1, 1 if layers else pad, weights)
            bottom = name
    return layers


# ---------------------------------------------------------------------------------------------
# Classification: convolutions, poolings, fully connected layers


def lenet() -> Layers:
    """LeNet (LeCun et al. 1998) as Caffe's MNIST example has it, for grey images of 32x32 pixels,
    the size that the paper has.  Nothing was shrunk.
    """
    return deploy([
        conv("conv1", "data", 20, 5),
        pooling("pool1", "conv1", "MAX", 2, 2),
        conv("conv2", "pool1", 50, 5),
        pooling("pool2", "conv2", "MAX", 2, 2),
        dense("ip1", "pool2", 500),
        relu("relu1", "ip1"),
        dense("ip2", "ip1", 10),
    ], side=32, channels=1)


def cifar10_quick() -> Layers:
    """The quick network of Caffe's CIFAR-10 example, after Krizhevsky's cuda-convnet.  Nothing was
    shrunk: two average poolings, and no rectifier between the fully connected layers.
    """
    return deploy([
        conv("conv1", "data", 32, 5, pad=2, weights=gaussian(0.0001)),
        pooling("pool1", "conv1", "MAX", 3, 2),
        relu("relu1", "pool1"),
        *conv_relu("conv2", "pool1", 32, 5, pad=2, weights=gaussian(0.01)),
        pooling("pool2", "conv2", "AVE", 3, 2),
        *conv_relu("conv3", "pool2", 64, 5, pad=2, weights=gaussian(0.01)),
        pooling("pool3", "conv3", "AVE", 3, 2),
        dense("ip1", "pool3", 64, weights=gaussian(0.1)),
        dense("ip2", "ip1", 10, weights=gaussian(0.1)),
    ], side=32)


def cifar10_full() -> Layers:
    """The full network of Caffe's CIFAR-10 example, after Krizhevsky's cuda-convnet.  Nothing was
    shrunk: its local response normalizations work within channels.
    """
    within = {"local_size": 3, "alpha": 5e-05, "beta": 0.75, "norm_region": Enum("WITHIN_CHANNEL")}
    return deploy([
        conv("conv1", "data", 32, 5, pad=2, weights=gaussian(0.0001)),
        pooling("pool1", "conv1", "MAX", 3, 2),
        relu("relu1", "pool1"),
        layer("norm1", "LRN", "pool1", lrn_param=within),
        *conv_relu("conv2", "norm1", 32, 5, pad=2, weights=gaussian(0.01)),
        pooling("pool2", "conv2", "AVE", 3, 2),
        layer("norm2", "LRN", "pool2", lrn_param=within),
        *conv_relu("conv3", "norm2", 64, 5, pad=2, weights=gaussian(0.01)),
        pooling("pool3", "conv3", "AVE", 3, 2),
        dense("ip1", "pool3", 10, weights=gaussian(0.01)),
    ], side=32)


def caffenet_small() -> Layers:
    """CaffeNet (Krizhevsky et al. 2012 as released with Caffe) at an eighth of its width, with 64
    units in place of 4096, for images of 99x99 pixels.
    """
    return deploy(caffenet(CAFFENET_TINY), side=99)


def vgg16() -> Layers:
    """VGG-16 (Simonyan & Zisserman 2015, configuration D) at an eighth of its width, with 256
    units in place of 4096, for images of 64x64 pixels.
    """
    layers = [
        *vgg_trunk((8, 16, 32, 64, 64), (2, 2, 3, 3, 3)),
        pooling("pool5", "conv5_3", "MAX", 2, 2),
    ]
    for name, bottom in (("fc6", "pool5"), ("fc7", "fc6")):
        layers += [dense(name, bottom, 256), relu("relu_" + name, name),
                   dropout("drop_" + name, name, 0.5)]
    return deploy([*layers, dense("fc8", "fc7", 100)], side=64)


def googlenet() -> Layers:
    """GoogLeNet (Szegedy et al. 2015 as released with Caffe) with its nine inception modules and
    two auxiliary classifiers at a quarter of its width, for images of 112x112 pixels.
    """
    layers, bottom = googlenet_body(functools.partial(tower, num_conv=32, num_fc=256, classes=100),
                                    divisor=4)
    return deploy([
        *layers,
        global_pooling("pool5", bottom),
        dropout("pool5/drop", "pool5", 0.4),
        dense("loss3/classifier", "pool5", 100),
    ], side=112)


def nin() -> Layers:
    """Network in Network (Lin et al. 2014) for CIFAR-10 at a quarter of its width: 1x1
    convolutions after each convolution, and the average of the last maps as scores.
    """
    layers: Layers = []
    bottom = "data"
    for stage, (kernel_size, widths) in enumerate(
            ((5, (48, 40, 24)), (5, (48, 48, 48)), (3, (48, 48, 10))), 1):
        for place, width in enumerate(widths):
            name = "cccp%d_%d" % (stage, place) if place else "conv%d" % stage
            size = 1 if place else kernel_size
            layers += conv_relu(name, bottom, width, size, pad=size // 2, weights=gaussian(0.05))
            bottom = name
        if stage < 3:
            pool = "pool%d" % stage
            layers += [pooling(pool, bottom, "MAX" if stage == 1 else "AVE", 3, 2),
                       dropout("drop%d" % stage, pool, 0.5)]
            bottom = pool
    return deploy([*layers, global_pooling("pool3", bottom)], side=32)


def squeezenet() -> Layers:
    """SqueezeNet v1.1 (Iandola et al. 2016) at a quarter of its width, with 100 classes, for images
    of 112x112 pixels.
    """
    layers = [*conv_relu("conv1", "data", 16, 3, stride=2),
              pooling("pool1", "conv1", "MAX", 3, 2)]
    bottom = "pool1"
    for number, (squeeze, expand) in enumerate(((4, 16), (4, 16), (8, 32), (8, 32), (12, 48),
                                                (12, 48), (16, 64), (16, 64)), 2):
        fire = "fire%d" % number
        layers += [
            *conv_relu(fire + "/squeeze1x1", bottom, squeeze, 1),
            *conv_relu(fire + "/expand1x1", fire + "/squeeze1x1", expand, 1),
            *conv_relu(fire + "/expand3x3", fire + "/squeeze1x1", expand, 3, pad=1),
            concat(fire + "/concat", [fire + "/expand1x1", fire + "/expand3x3"]),
        ]
        bottom = fire + "/concat"
        if number in (3, 5):
            layers.append(pooling("pool%d" % number, bottom, "MAX", 3, 2))
            bottom = "pool%d" % number
    return deploy([
        *layers,
        dropout("drop9", bottom, 0.5),
        *conv_relu("conv10", bottom, 100, 1, weights=gaussian(0.01)),
        global_pooling("pool10", "conv10"),
    ], side=112)


def age_gender() -> Layers:
    """The network of Levi & Hassner (2015) for age and gender at an eighth of its width, with the
    two outputs of gender, for images of 112x112 pixels.
    """
    layers: Layers = []
    bottom = "data"
    for stage, (width, kernel_size, stride, pad) in enumerate(
            ((12, 7, 4, 0), (32, 5, 1, 2), (48, 3, 1, 1)), 1):
        layers += conv_relu("conv%d" % stage, bottom, width, kernel_size, stride, pad,
                            weights=gaussian(0.01))
        layers.append(pooling("pool%d" % stage, "conv%d" % stage, "MAX", 3, 2))
        bottom = "pool%d" % stage
        if stage < 3:
            layers.append(local_response("norm%d" % stage, bottom))
            bottom = "norm%d" % stage
    for name, below in (("fc6", bottom), ("fc7", "fc6")):
        layers += [inner_product(name, below, 64, weights=gaussian(0.005), bias=1),
                   relu("relu_" + name, name), dropout("drop_" + name, name, 0.5)]
    return deploy([*layers, dense("fc8", "fc7", 2, weights=gaussian(0.01))], side=112)


# ---------------------------------------------------------------------------------------------
# Classification: batch normalization


def mobilenet() -> Layers:
    """MobileNet v1 (Howard et al. 2017) at a quarter of its width, which the paper has, with 100
    classes, for images of 96x96 pixels.  Depthwise convolutions have one group for each channel.
    """
    layers = [*conv_bn("conv1", "data", 8, 3, stride=2), relu("relu_conv1", "conv1")]
    bottom, depth = "conv1", 8
    for number, (width, stride) in enumerate(
            ((16, 1), (32, 2), (32, 1), (64, 2), (64, 1), (128, 2), (128, 1), (128, 1), (128, 1),
             (128, 1), (128, 1), (256, 2), (256, 1)), 2):
        depthwise, pointwise = "conv%d/dw" % number, "conv%d/sep" % number
        layers += [
            *conv_bn(depthwise, bottom, depth, 3, stride, group=depth),
            relu("relu_" + depthwise, depthwise),
            *conv_bn(pointwise, depthwise, width, 1),
            relu("relu_" + pointwise, pointwise),
        ]
        bottom, depth = pointwise, width
    return deploy([*layers, global_pooling("pool", bottom), conv("fc", "pool", 100, 1)], side=96)


def resnet() -> Layers:
    """ResNet-50 (He et al. 2016) at a quarter of its width, with 100 classes, for images of 64x64
    pixels.  A BatchNorm and a Scale follow each convolution.
    """
    return _resnet(classes=100)


def resnet_folded() -> Layers:
    """ResNet-50 at a quarter of its width (He et al. 2016) with BatchNorm and Scale folded into the
    convolutions, as definitions for deployment have it.
    """
    return _resnet(classes=100, folded=True)


def resnet_two_outputs() -> Layers:
    """ResNet-50 at a quarter of its width (He et al. 2016) with two outputs, as for a question of
    yes or no.
    """
    return _resnet(classes=2)


def _resnet(classes: int, folded: bool = False) -> Layers:
    layers = [*conv_bn("conv1", "data", 16, 7, stride=2, folded=folded),
              relu("relu_conv1", "conv1"), pooling("pool1", "conv1", "MAX", 3, 2)]
    bottom = "pool1"
    for stage, (width, depth) in enumerate(((16, 3), (32, 4), (64, 6), (128, 3)), 2):
        for block in "abcdef"[:depth]:
            name = "res%d%s" % (stage, block)
            first, second, third = (name + "_branch2" + place for place in "abc")
            stride, shortcut = 1, bottom
            if block == "a":
                stride, shortcut = (1 if stage == 2 else 2), name + "_branch1"
                layers += conv_bn(shortcut, bottom, 4 * width, 1, stride, folded=folded)
            layers += [
                *conv_bn(first, bottom, width, 1, stride, folded=folded),
                relu("relu_" + first, first),
                *conv_bn(second, first, width, 3, folded=folded),
                relu("relu_" + second, second),
                *conv_bn(third, second, 4 * width, 1, folded=folded),
                add(name, [shortcut, third]),
                relu("relu_" + name, name),
            ]
            bottom = name
    return deploy([*layers, global_pooling("pool5", bottom), dense("fc", "pool5", classes)],
                  side=64)


def densenet() -> Layers:
    """DenseNet-BC (Huang et al. 2017) with three dense blocks of four layers and growth rate 8, in
    place of 16 layers and 12, for images of 32x32 pixels.
    """
    def normalized(name: str, bottom: str) -> Layers:
        return [*batch_norm(name + "/bn", name + "/scale", bottom, name + "/bn"),
                relu(name + "/relu", name + "/bn")]

    unbiased = functools.partial(convolution, weights=MSRA, bias=None)
    layers = [unbiased("conv1", "data", 16, 3, pad=1)]
    bottom, depth = "conv1", 16
    for block in (1, 2, 3):
        for place in range(1, 5):
            narrow, wide = ("conv%d_%d/x%d" % (block, place, part) for part in (1, 2))
            layers += [
                *normalized(narrow, bottom), unbiased(narrow, narrow + "/bn", 32, 1),
                *normalized(wide, narrow), unbiased(wide, wide + "/bn", 8, 3, pad=1),
                concat("concat%d_%d" % (block, place), [bottom, wide]),
            ]
            bottom, depth = "concat%d_%d" % (block, place), depth + 8
        if block < 3:
            name, depth = "transition%d" % block, depth // 2
            layers += [*normalized(name, bottom), unbiased(name, name + "/bn", depth, 1),
                       pooling("pool%d" % block, name, "AVE", 2, 2)]
            bottom = "pool%d" % block
    return deploy([*layers, *normalized("last", bottom), global_pooling("pool", "last/bn"),
                   dense("fc", "pool", 10)], side=32)


# ---------------------------------------------------------------------------------------------
# Maps: deconvolutions, crops, side outputs


def unet() -> Layers:
    """U-Net (Ronneberger et al. 2015) with two poolings in place of four and an eighth of its
    width, for images of 92x92 pixels.  Convolutions have no padding, so that maps are cropped.
    """
    def twice(name: str, bottom: str, width: int) -> Layers:
        return [*conv_relu(name + "a", bottom, width, 3, weights=MSRA),
                *conv_relu(name + "b", name + "a", width, 3, weights=MSRA)]

    def up(level: int, bottom: str, width: int, skip: str, offset: int) -> Layers:
        name = "up%d" % level
        return [convolution(name, bottom, width, 2, 2, weights=MSRA, bias=0, kind="Deconvolution"),
                relu("relu_" + name, name),
                crop("crop%d" % level, skip, name, offset),
                concat("concat%d" % level, ["crop%d" % level, name])]

    return [
        images(92, 92),
        *twice("down1", "data", 8),
        pooling("pool1", "down1b", "MAX", 2, 2),
        *twice("down2", "pool1", 16),
        pooling("pool2", "down2b", "MAX", 2, 2),
        *twice("bottom", "pool2", 32),
        dropout("drop", "bottomb", 0.5),
        *up(2, "bottomb", 16, "down2b", 4),
        *twice("right2", "concat2", 16),
        *up(1, "right2b", 8, "down1b", 16),
        *twice("right1", "concat1", 8),
        conv("score", "right1b", 2, 1, weights=MSRA),
    ]


def fcn8s() -> Layers:
    """FCN-8s (Long et al. 2015) on VGG-16 at an eighth of its width with a 3x3 fc6, for images of
    64x64 pixels.  The interpolations are fixed, as the authors train them; the first convolution's
    padding of 33 in place of 100 leaves room for the crops.
    """
    layers = vgg_trunk((8, 16, 32, 64, 64), (2, 2, 3, 3, 3), pad=33, weights=None)
    layers.append(pooling("pool5", "conv5_3", "MAX", 2, 2))
    for name, bottom, size in (("fc6", "pool5", 3), ("fc7", "fc6", 1)):
        layers += [*conv_relu(name, bottom, 256, size, weights=None),
                   dropout("drop_" + name, name, 0.5)]
    return [
        images(64, 64),
        *layers,
        unfilled("score_fr", "fc7", 21, 1),
        upsampling("upscore2", "score_fr", 21, 2),
        unfilled("score_pool4", "pool4", 21, 1),
        crop("score_pool4c", "score_pool4", "upscore2", 1),
        add("fuse_pool4", ["upscore2", "score_pool4c"]),
        upsampling("upscore_pool4", "fuse_pool4", 21, 2),
        unfilled("score_pool3", "pool3", 21, 1),
        crop("score_pool3c", "score_pool3", "upscore_pool4", 1),
        add("fuse_pool3", ["upscore_pool4", "score_pool3c"]),
        upsampling("upscore8", "fuse_pool3", 21, 8),
        crop("score", "upscore8", "data", 28),
    ]


def hed() -> Layers:
    """Holistically-nested edge detection (Xie & Tu 2015) at an eighth of its width, for images of
    64x64 pixels: five side outputs and their fusion, without the last sigmoids.
    """
    layers = vgg_trunk((8, 16, 32, 64, 64), (2, 2, 3, 3, 3), pad=35, weights=None)
    sides: Layers = []
    for number, (bottom, offset) in enumerate((("conv1_2", 34), ("conv2_2", 35), ("conv3_3", 36),
                                               ("conv4_3", 40), ("conv5_3", 48)), 1):
        score, cropped = "score-dsn%d" % number, "upscore-dsn%d" % number
        sides.append(unfilled(score, bottom, 1, 1))
        if number > 1:
            sides.append(upsampling("up-dsn%d" % number, score, 1, 2 ** (number - 1)))
            score = "up-dsn%d" % number
        sides += [crop(cropped, score, "data", offset),
                  layer("split-dsn%d" % number, "Split", cropped,
                        ["dsn%d" % number, "dsn%d-to-fuse" % number])]
    return [
        images(64, 64),
        *layers,
        *sides,
        concat("concat-upscore", ["dsn%d-to-fuse" % number for number in range(1, 6)]),
        conv("fuse", "concat-upscore", 1, 1, weights={"type": "constant", "value": 0.2}),
    ]


def pose() -> Layers:
    """The pose network of Cao et al. (2019, OpenPose's body_25) at a tenth of its width, for images
    of 48x48 pixels.  Two stages find the limbs' fields, two more read these and find the joints'
    maps, and the output concatenates what both chains have found.
    """
    def prelu(name: str, bottom: str, width: int, size: int) -> Layers:
        return [unfilled(name, bottom, width, size, pad=size // 2),
                layer("prelu_" + name, "PReLU", name, name)]

    def stage(name: str, bottom: str, num_output: int) -> Layers:
        layers: Layers = []
        for block in "123":
            parts = [name + "_" + block + place for place in "abc"]
            for part, below in zip(parts, [bottom, *parts]):
                layers += prelu(part, below, 10, 3)
            bottom = name + "_" + block
            layers.append(concat(bottom, parts))
        return [*layers, *prelu(name + "_mix", bottom, 24, 1),
                unfilled(name, name + "_mix", num_output, 1)]

    return [
        images(48, 48),
        *conv_relu("conv1_1", "data", 8, 3, pad=1, weights=None),
        *conv_relu("conv1_2", "conv1_1", 8, 3, pad=1, weights=None),
        pooling("pool1", "conv1_2", "MAX", 2, 2),
        *conv_relu("conv2_1", "pool1", 16, 3, pad=1, weights=None),
        pooling("pool2", "conv2_1", "MAX", 2, 2),
        *prelu("conv3_1", "pool2", 24, 3),
        *prelu("features", "conv3_1", 16, 3),
        *stage("limbs0", "features", 6),
        concat("limbs1_in", ["features", "limbs0"]),
        *stage("limbs1", "limbs1_in", 6),
        concat("joints0_in", ["features", "limbs1"]),
        *stage("joints0", "joints0_in", 4),
        concat("joints1_in", ["features", "limbs1", "joints0"]),
        *stage("joints1", "joints1_in", 4),
        concat("net_output", ["joints1", "limbs1"]),
    ]


# ---------------------------------------------------------------------------------------------
# Shared weights, recurrences, sigmoids


def siamese() -> Layers:
    """The siamese network of Caffe's MNIST example (Chopra et al. 2005).  Nothing was shrunk; the
    two pictures of 32x32 pixels lie side by side in one image.
    """
    layers = [
        images(32, 64),
        layer("pair", "Slice", "data", ["left", "right"],
              slice_param={"axis": 3, "slice_point": 32}),
    ]
    for suffix, bottom in (("", "left"), ("_p", "right")):
        conv1, pool1, conv2, pool2, ip1, ip2, feat = (
            name + suffix for name in ("conv1", "pool1", "conv2", "pool2", "ip1", "ip2", "feat"))
        layers += [
            sharing(conv(conv1, bottom, 20, 5), "conv1"),
            pooling(pool1, conv1, "MAX", 2, 2),
            sharing(conv(conv2, pool1, 50, 5), "conv2"),
            pooling(pool2, conv2, "MAX", 2, 2),
            sharing(dense(ip1, pool2, 500), "ip1"),
            relu("relu_" + ip1, ip1),
            sharing(dense(ip2, ip1, 10), "ip2"),
            sharing(dense(feat, ip2, 2), "feat"),
        ]
    return layers


def recursive() -> Layers:
    """The recursive network of Eigen et al. (2014): one convolution is applied four times with the
    same weights.  Layers have 32 channels, for images of 32x32 pixels.
    """
    layers = [*conv_relu("conv", "data", 32, 8, weights=gaussian(0.1)),
              pooling("pool", "conv", "MAX", 2, 2)]
    bottom = "pool"
    for name in ("tied1", "tied2", "tied3", "tied4"):
        convolved, rectifier = conv_relu(name, bottom, 32, 3, pad=1)
        layers += [sharing(convolved, "tied"), rectifier]
        bottom = name
    return deploy([*layers, dense("classifier", bottom, 10)], side=32)


def lstm() -> Layers:
    """A recurrent convolutional network for videos (Donahue et al. 2015) with a small CaffeNet, for
    frames of 64x64 pixels.  A batch is one clip, whose frames are the time steps of the LSTM.
    """
    def reshape(name: str, bottom: str, *dim: int) -> Message:
        return layer(name, "Reshape", bottom, reshape_param={"shape": {"dim": list(dim)}})

    return [
        images(64, 64),
        *conv_relu("conv1", "data", 16, 7, stride=2, weights=gaussian(0.01)),
        pooling("pool1", "conv1", "MAX", 3, 2),
        local_response("norm1", "pool1"),
        *conv_relu("conv2", "norm1", 32, 5, stride=2, weights=gaussian(0.02)),
        pooling("pool2", "conv2", "MAX", 3, 2),
        dense("fc6", "pool2", 64, weights=gaussian(0.04)),
        relu("relu6", "fc6"),
        reshape("frames", "fc6", 0, 1, -1),
        # Markers that public definitions have as an input: 0 where a clip begins, 1 after that.
        layer("sums", "Reduction", "data", reduction_param={"axis": 1}),
        layer("cut", "Slice", "sums", ["first", "later"],
              slice_param={"axis": 0, "slice_point": 1}),
        layer("begins", "Power", "first", power_param={"scale": 0}),
        layer("continues", "Power", "later", power_param={"scale": 0, "shift": 1}),
        layer("clip", "Concat", ["begins", "continues"], concat_param={"axis": 0}),
        reshape("markers", "clip", 0, 1),
        layer("lstm1", "LSTM", ["frames", "markers"], recurrent_param={
            "num_output": 32,
            "weight_filler": {"type": "uniform", "min": -0.01, "max": 0.01},
            "bias_filler": {"type": "constant", "value": 0}}),
        dense("fc8", "lstm1", 10, axis=2),
        layer("prob", "Softmax", "fc8", softmax_param={"axis": 2}),
    ]


def autoencoder() -> Layers:
    """The deep autoencoder (Hinton & Salakhutdinov 2006) of Caffe's MNIST example at a quarter of
    its width, for grey images of 32x32 pixels.  Its 30 codes are linear, all other units sigmoid.
    """
    layers = [images(32, 32, channels=1)]
    bottom = "data"
    for name, width in (("encode1", 256), ("encode2", 128), ("encode3", 64), ("encode4", 30),
                        ("decode4", 64), ("decode3", 128), ("decode2", 256), ("decode1", 1024)):
        layers.append(dense(name, bottom, width,
                            weights={"type": "gaussian", "std": 1, "sparse": 15}))
        bottom = name
        if name != "encode4":
            bottom = name + "neuron"
            layers.append(layer(bottom, "Sigmoid", name))
    return layers


KINDS: List[Callable[[], Layers]] = [
    lenet, cifar10_quick, cifar10_full, caffenet_small, vgg16, googlenet, nin, squeezenet,
    age_gender, mobilenet, resnet, resnet_folded, resnet_two_outputs, densenet, unet, fcn8s, hed,
    pose, siamese, recursive, lstm, autoencoder,
]

if __name__ == "__main__":
    sys.exit(main())
