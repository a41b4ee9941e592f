"""Generate small replacements for all data of the paper's experiments, in seconds.

    python data/make_tiny.py build/tiny/data

It writes below the folder
    VOC2007/                       a VOC folder: colored shapes on noise, with boxes
    imagenet/{train,val}.txt       lists 'path label' of images of one shape each, in imagenet/
    normalized.prototxt            NET with BatchNorm and Scale after its affine layers
    plain.prototxt                 NET without local response normalization
    pretrained.{prototxt,caffemodel}  NET with random weights, and with a fully connected layer
                                   written as a convolution
experiments/tiny.yaml runs every rule of the paper's workflow on them.
"""
import argparse
import logging
import os
import sys
from typing import Any, Dict, Iterable, List, NamedTuple, Optional, Sequence, Tuple

import cv2
import numpy as np

from ddinit import files, processes
from ddinit.prototxt import (
    build_net,
    caffe_messages,
    import_caffe,
    read_definition,
    write_definition,
)

log = logging.getLogger("make_tiny")

# Classes and their colors (B, G, R); an image of 160 x 120 pixels shows one or two objects.
COLORS = {"disc": (40, 50, 210), "square": (200, 60, 40), "triangle": (50, 190, 60)}
WIDTH, HEIGHT = 160, 120
VOC_IMAGES = {"train": 12, "val": 12, "test": 12}
IMAGENET_IMAGES = {"train": 36, "val": 12}
IMAGENET_SIDE = 72


class Shape(NamedTuple):
    """An object: its class, and its box in pixels from 0 with both ends inside."""

    name: str
    left: int
    top: int
    right: int
    bottom: int


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Write everything below the folder that the command line names; return the exit status."""
    parser = processes.Parser(prog="make_tiny.py", description=__doc__.splitlines()[0])
    parser.add_argument("folder", metavar="DIR", help="folder to write to")
    parser.add_argument("--model", metavar="NET.prototxt",
                        default=os.path.join("models", "caffenet_tiny", "deploy.prototxt"),
                        help="net to derive others from (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N",
                        help="random seed (default: %(default)d)")
    processes.log_to_stderr()
    return processes.command_line(run, parser.parse_args(argv), parser.prog)


def run(arguments: argparse.Namespace) -> None:
    """Write everything."""
    rng = np.random.default_rng(arguments.seed)
    os.makedirs(arguments.folder, exist_ok=True)
    write_voc(os.path.join(arguments.folder, "VOC2007"), rng)
    write_imagenet(os.path.join(arguments.folder, "imagenet"), rng)
    for name, change in (("normalized", normalized), ("plain", without_lrn)):
        write_definition(change(read_definition(arguments.model)),
                         os.path.join(arguments.folder, name + ".prototxt"))
    processes.in_child(write_pretrained, arguments.model,
                       os.path.join(arguments.folder, "pretrained"), arguments.seed)
    log.info("wrote %s", arguments.folder)


# ---------------------------------------------------------------------------------------------
# Images
# ---------------------------------------------------------------------------------------------

def write_voc(root: str, rng: np.random.Generator) -> None:
    """Write a VOC folder with train, val, trainval and test."""
    for folder in ("Annotations", "JPEGImages", os.path.join("ImageSets", "Main")):
        os.makedirs(os.path.join(root, folder), exist_ok=True)
    number = 0
    training: Dict[str, List[Shape]] = {}
    for split, count in VOC_IMAGES.items():
        contents: Dict[str, List[Shape]] = {}
        for _ in range(count):
            number += 1
            image = "%06d" % number
            pixels = _noise(HEIGHT, WIDTH, rng)
            names = rng.choice(list(COLORS), size=int(rng.integers(1, 3)), replace=False)
            halves = [(0, WIDTH // 2), (WIDTH // 2, WIDTH)][:len(names)]
            contents[image] = [_draw(pixels, str(name), span, rng)
                               for name, span in zip(names, halves)]
            _write_image(os.path.join(root, "JPEGImages", image + ".jpg"), pixels)
            _write_annotation(root, image, contents[image])
        _write_split(root, split, contents)
        if split != "test":
            training.update(contents)
    _write_split(root, "trainval", training)


def write_imagenet(root: str, rng: np.random.Generator) -> None:
    """Write folders of images with one shape each, and a list 'path label' for each folder."""
    for split, count in IMAGENET_IMAGES.items():
        os.makedirs(os.path.join(root, split), exist_ok=True)
        lines = []
        for number in range(count):
            label = number % len(COLORS)
            pixels = _noise(IMAGENET_SIDE, IMAGENET_SIDE, rng)
            _draw(pixels, list(COLORS)[label], (0, IMAGENET_SIDE), rng)
            path = os.path.join(split, "%04d.jpg" % number)
            _write_image(os.path.join(root, path), pixels)
            lines.append("%s %d" % (path, label))
        _write_lines(os.path.join(root, split + ".txt"), lines)


def _noise(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    return rng.integers(90, 166, (height, width, 3)).astype(np.uint8)


def _draw(pixels: np.ndarray, name: str, span: Tuple[int, int],
          rng: np.random.Generator) -> Shape:
    """Draw a shape between two columns of an image."""
    height, width = pixels.shape[0], span[1] - span[0]
    half = int(rng.integers(height // 7, min(height, width) // 3))
    x = int(rng.integers(span[0] + half, span[1] - half))
    y = int(rng.integers(half, height - half))
    shape = Shape(name, x - half, y - half, x + half, y + half)
    if name == "disc":
        cv2.circle(pixels, (x, y), half, COLORS[name], -1)
    elif name == "square":
        cv2.rectangle(pixels, (shape.left, shape.top), (shape.right, shape.bottom),
                      COLORS[name], -1)
    else:
        corners = [(x, shape.top), (shape.left, shape.bottom), (shape.right, shape.bottom)]
        cv2.fillConvexPoly(pixels, np.array(corners, np.int32), COLORS[name])
    return shape


def _write_image(path: str, pixels: np.ndarray) -> None:
    if not cv2.imwrite(path, pixels):
        raise OSError("%s: cannot write the image" % path)


def _write_annotation(root: str, image: str, shapes: Sequence[Shape]) -> None:
    objects = ["<object><name>%s</name><difficult>0</difficult><bndbox><xmin>%d</xmin>"
               "<ymin>%d</ymin><xmax>%d</xmax><ymax>%d</ymax></bndbox></object>"
               % (shape.name, shape.left + 1, shape.top + 1, shape.right + 1, shape.bottom + 1)
               for shape in shapes]
    _write_lines(os.path.join(root, "Annotations", image + ".xml"), [
        "<annotation><filename>%s.jpg</filename><size><width>%d</width><height>%d</height>"
        "<depth>3</depth></size>%s</annotation>" % (image, WIDTH, HEIGHT, "".join(objects))])


def _write_split(root: str, split: str, contents: Dict[str, List[Shape]]) -> None:
    folder = os.path.join(root, "ImageSets", "Main")
    _write_lines(os.path.join(folder, split + ".txt"), list(contents))
    for name in COLORS:
        _write_lines(os.path.join(folder, "%s_%s.txt" % (name, split)), [
            "%s %2d" % (image, 1 if any(shape.name == name for shape in shapes) else -1)
            for image, shapes in contents.items()])


def _write_lines(path: str, lines: Sequence[str]) -> None:
    with files.replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")


# ---------------------------------------------------------------------------------------------
# Nets
# ---------------------------------------------------------------------------------------------

def normalized(definition: Any) -> Any:
    """Return a net with BatchNorm and Scale after every affine layer but the last."""
    layers = _copies(definition.layer)
    affine = [layer for layer in layers if layer.type in ("Convolution", "InnerProduct")]
    del definition.layer[:]
    for layer in layers:
        definition.layer.extend([layer])
        if layer in affine[:-1]:
            blob = layer.top[0]
            definition.layer.add(name=layer.name + "_bn", type="BatchNorm", bottom=[blob],
                                 top=[blob])
            scale = definition.layer.add(name=layer.name + "_scale", type="Scale", bottom=[blob],
                                         top=[blob])
            scale.scale_param.bias_term = True
    return definition


def without_lrn(definition: Any) -> Any:
    """Return a net without its LRN layers, whose readers read their bottoms instead."""
    layers = [layer for layer in _copies(definition.layer) if layer.type != "LRN"]
    instead = {layer.top[0]: layer.bottom[0] for layer in definition.layer if layer.type == "LRN"}
    for layer in layers:
        layer.bottom[:] = [instead.get(blob, blob) for blob in layer.bottom]
    del definition.layer[:]
    definition.layer.extend(layers)
    return definition


def _copies(layers: Iterable[Any]) -> List[Any]:
    """Return copies, which remain when the layers of the definition are cleared."""
    copies = [caffe_messages().LayerParameter() for _ in layers]
    for copy, layer in zip(copies, layers):
        copy.CopyFrom(layer)
    return copies


def write_pretrained(model: str, stem: str, seed: int) -> None:
    """Write STEM.prototxt, which is `model` with fc6 as a convolution, and a random caffemodel."""
    caffe = import_caffe()
    caffe.set_random_seed(seed)
    definition = read_definition(model)
    net = build_net(definition)
    layer = next(layer for layer in definition.layer if layer.name == "fc6")
    _, _, height, width = net.blobs[layer.bottom[0]].shape
    connected = layer.inner_product_param
    layer.name, layer.type = "fc6-conv", "Convolution"
    layer.convolution_param.num_output = connected.num_output
    layer.convolution_param.kernel_h, layer.convolution_param.kernel_w = height, width
    layer.convolution_param.weight_filler.CopyFrom(connected.weight_filler)
    layer.convolution_param.bias_filler.CopyFrom(connected.bias_filler)
    layer.ClearField("inner_product_param")
    write_definition(definition, stem + ".prototxt")
    with files.replacing(stem + ".caffemodel") as temporary:
        build_net(definition).save(temporary)


if __name__ == "__main__":
    sys.exit(main())
