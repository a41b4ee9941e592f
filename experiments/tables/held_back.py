"""Make a VOC folder that trains on `train` of another and tests on its `val`.

OUT/ImageSets/Main has the images of VOC's train as trainval and those of its val as test. Images
and annotations are links to VOC's. OUT/trainval.mat and OUT/test.mat are the parts of the
selective-search file of VOC's trainval.
"""
import argparse
import os
from typing import Any, Sequence

import numpy as np
import scipy.io

from ddinit import files
from detection.proposals import read_mat
from tables import formats
from voc.folders import Voc

SPLITS = {"trainval": "train", "test": "val"}  # of the new folder: of the old one
FLAGS = {-1: "-1", 0: " 0", 1: " 1"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add VOC, OUT and --proposals."""
    parser.add_argument("voc", metavar="VOC", help="VOC folder with the splits train and val")
    parser.add_argument("out", metavar="OUT", help="folder to write; made where it is missing")
    parser.add_argument("--proposals", metavar="FILE.mat",
                        help="selective-search file of VOC's trainval")


def run(arguments: argparse.Namespace) -> None:
    """Write the folder. Raises ValueError where VOC lacks a list."""
    voc = Voc(arguments.voc)
    lists = os.path.join(arguments.out, "ImageSets", "Main")
    os.makedirs(lists, exist_ok=True)
    boxes_of = {}
    if arguments.proposals is not None:
        known = voc.images("trainval")
        boxes_of = dict(zip(known, read_mat(arguments.proposals, known)))
    for split, source in SPLITS.items():
        images, labels = voc.images(source), voc.labels(source)
        for name, column in zip(voc.classes, labels.T):
            formats.write(os.path.join(lists, "%s_%s.txt" % (name, split)), "".join(
                "%s %s\n" % pair for pair in zip(images, map(FLAGS.get, column))))
        if arguments.proposals is not None:
            _write_mat(os.path.join(arguments.out, split + ".mat"), images,
                       [boxes_of[image] for image in images])
        formats.write(os.path.join(lists, split + ".txt"), "".join(
            image + "\n" for image in images))
    for name in ("JPEGImages", "Annotations"):
        link = os.path.join(arguments.out, name)
        if not os.path.lexists(link):
            os.symlink(os.path.join(os.path.abspath(arguments.voc), name), link)


def _write_mat(path: str, images: Sequence[str], boxes: Sequence[np.ndarray]) -> None:
    """Write boxes x1, y1, x2, y2 from 0 as selective-search files have them: y1, x1, y2, x2 from 1.
    """
    cells: Any = np.empty((1, len(images)), object)
    for number, rows in enumerate(boxes):
        cells[0, number] = rows[:, [1, 0, 3, 2]] + 1
    with files.replacing(path) as temporary, open(temporary, "wb") as file:
        scipy.io.savemat(file, {"boxes": cells, "images": np.array(
            [[image] for image in images], object)}, do_compression=True)

