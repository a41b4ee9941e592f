"""The one reader of PASCAL VOC-layout folders, with any classes (paper, section 4).

A folder holds `ImageSets/Main/SPLIT.txt` (one image id a line), `ImageSets/Main/CLASS_SPLIT.txt`
(lines `id flag`: -1 absent, 1 present, 0 only difficult objects), `JPEGImages/ID.jpg` and
`Annotations/ID.xml`.  Source: The PASCAL Visual Object Classes Challenge 2007, development kit,
section 4 (Everingham et al.).

    python voc.py datasets/VOCdevkit/VOC2007
"""
import argparse
import collections
import logging
import math
import os
import sys
import xml.etree.ElementTree as ElementTree
from typing import Dict, List, NamedTuple, Optional, Sequence, Set

import numpy as np

from ddinit import processes

STANDARD_SPLITS = ("train", "val", "trainval", "test")
FLAGS = {"-1": -1, "0": 0, "1": 1, "+1": 1}
# Pixels by which a box may stick out: tools that count from 0 write 0 where VOC has 1.
TOLERANCE = 1.0


class Objects(NamedTuple):
    """The annotated objects of an image that is `width` x `height` pixels.

    boxes: float64 (n, 4), x1, y1, x2, y2 in pixels counted from 0, both ends inside the box;
    classes: int64 (n,), positions in `Voc.classes`; difficult: bool (n,).
    """
    boxes: np.ndarray
    classes: np.ndarray
    difficult: np.ndarray
    width: int
    height: int


class VocLists:
    """The lists of a VOC-layout folder: which images a split has, and what they show.

    `classes` are the sorted names of all CLASS_SPLIT.txt.  Whatever a file lacks is a ValueError
    that names the file.
    """

    def __init__(self, root: str) -> None:
        self.root = root
        self._lists = os.path.join(root, "ImageSets", "Main")
        if not os.path.isdir(self._lists):
            raise ValueError(root + _hint(root))
        stems = sorted(name[:-4] for name in os.listdir(self._lists) if name.endswith(".txt"))
        splits = _splits(stems)
        self.classes: List[str] = sorted({_class_of(stem, splits) for stem in stems} - {""})
        if not self.classes:
            raise ValueError("%s: holds no CLASS_SPLIT.txt, so there are no classes" % self._lists)

    def images(self, split: str) -> List[str]:
        """Return the ids in SPLIT.txt in their order, or in the first class's list without it."""
        path = self._list_path(split)
        if not os.path.isfile(path):
            path = self._list_path("%s_%s" % (self.classes[0], split))
            return list(_read_flags(path))
        ids = [line.split()[0] for line in _lines(path)]
        if not ids:
            raise ValueError("%s: lists no image" % path)
        image, count = collections.Counter(ids).most_common(1)[0]
        if count > 1:
            raise ValueError("%s: lists image %s twice" % (path, image))
        return ids

    def labels(self, split: str) -> np.ndarray:
        """Return int8 labels (images, classes): -1 absent, 1 present, 0 difficult.

        Rows are in the order of `images(split)`, columns in that of `classes`.
        """
        ids = self.images(split)
        labels = np.empty((len(ids), len(self.classes)), np.int8)
        for column, name in enumerate(self.classes):
            path = self._list_path("%s_%s" % (name, split))
            flags = _read_flags(path)
            missing = next((image for image in ids if image not in flags), None)
            if missing is not None:
                raise ValueError("%s: has no line for image %s" % (path, missing))
            if len(flags) > len(ids):
                extra = next(iter(flags.keys() - set(ids)))
                raise ValueError("%s: image %s is not in the split" % (path, extra))
            labels[:, column] = [flags[image] for image in ids]
        return labels

    def _list_path(self, stem: str) -> str:
        return os.path.join(self._lists, stem + ".txt")


class Voc(VocLists):
    """A VOC-layout folder with its images and annotations."""

    def __init__(self, root: str) -> None:
        super().__init__(root)
        self._warned: Set[str] = set()

    def image_path(self, image: str) -> str:
        """Return the path of the image with the id `image`."""
        path = os.path.join(self.root, "JPEGImages", image + ".jpg")
        if not os.path.isfile(path):
            raise ValueError("%s: the image is missing" % path)
        return path

    def read_bytes(self, image: str) -> bytes:
        """Return the encoded image (JPEG) with the id `image`."""
        path = self.image_path(image)
        try:
            with open(path, "rb") as file:
                return file.read()
        except OSError as error:
            raise ValueError("%s: cannot read it (%s)" % (path, error.strerror)) from error

    def objects(self, image: str) -> Objects:
        """Return the annotated objects of the image with the id `image`, difficult ones included.

        A box that sticks out of the image by a pixel is cut to it with a warning.  Raises
        ValueError where the annotation is missing, holds no object, a class that no list names,
        or a box that is empty or outside the image.
        """
        path = os.path.join(self.root, "Annotations", image + ".xml")
        annotation = _read_xml(path)
        width = int(_number(annotation, "size/width", path))
        height = int(_number(annotation, "size/height", path))
        found = annotation.findall("object")
        if not found:
            raise ValueError("%s: holds no object" % path)
        boxes = np.array([self._box(item, width, height, path) for item in found])
        classes = np.array([self._class_index(item, path) for item in found])
        difficult = np.array([(item.findtext("difficult") or "0").strip() == "1"
                              for item in found])
        return Objects(boxes, classes, difficult, width, height)

    def _class_index(self, item: ElementTree.Element, path: str) -> int:
        name = (item.findtext("name") or "").strip()
        if name not in self.classes:
            raise ValueError("%s: class '%s' is not among those of %s (%s)" % (
                path, name, self._lists, ", ".join(self.classes)))
        return self.classes.index(name)

    def _box(self, item: ElementTree.Element, width: int, height: int, path: str) -> List[float]:
        """x1, y1, x2, y2 counted from 0; floats, because unsigned numbers would wrap at 0 - 1."""
        corners = [_number(item, "bndbox/" + key, path) for key in ("xmin", "ymin", "xmax", "ymax")]
        box = [corner - 1.0 for corner in corners]
        inside = [min(max(edge, 0.0), limit - 1.0)
                  for edge, limit in zip(box, (width, height, width, height))]
        shown = "box %s" % " ".join("%g" % corner for corner in corners)
        if max(abs(edge - cut) for edge, cut in zip(box, inside)) > TOLERANCE:
            raise ValueError("%s: %s is outside the image of %d x %d pixels" % (
                path, shown, width, height))
        if inside[2] < inside[0] or inside[3] < inside[1]:
            raise ValueError("%s: %s is empty" % (path, shown))
        if inside != box and path not in self._warned:
            self._warned.add(path)
            logging.warning("%s: %s is a pixel outside the image of %d x %d; cut to it",
                            path, shown, width, height)
        return inside


# ---------------------------------------------------------------------------------------------
# Lists and annotations
# ---------------------------------------------------------------------------------------------

def _splits(stems: List[str]) -> Set[str]:
    """The stems that end other stems after an underscore, and those of VOC itself."""
    ends = {stem for stem in stems if any(other.endswith("_" + stem) for other in stems)}
    return ends.union(STANDARD_SPLITS)


def _class_of(stem: str, splits: Set[str]) -> str:
    """The class in the stem CLASS_SPLIT, '' for a stem that is a split; 'a_b_test' is 'a_b'."""
    if stem in splits:
        return ""
    matching = [split for split in splits if stem.endswith("_" + split)]
    return stem[:-1 - len(max(matching, key=len))] if matching else ""


def _read_flags(path: str) -> Dict[str, int]:
    """The lines `id flag` of a CLASS_SPLIT.txt, in their order."""
    flags: Dict[str, int] = {}
    for number, line in enumerate(_lines(path), 1):
        fields = line.split()
        if len(fields) != 2 or fields[1] not in FLAGS:
            raise ValueError("%s: entry %d is '%s', not an image id and -1, 0 or 1" % (
                path, number, line))
        if fields[0] in flags:
            raise ValueError("%s: lists image %s twice" % (path, fields[0]))
        flags[fields[0]] = FLAGS[fields[1]]
    if not flags:
        raise ValueError("%s: lists no image" % path)
    return flags


def _lines(path: str) -> List[str]:
    try:
        with open(path, encoding="utf-8") as file:
            return [line.strip() for line in file if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ValueError("%s: cannot read the list of images (%s)" % (path, reason)) from error


def _read_xml(path: str) -> ElementTree.Element:
    try:
        return ElementTree.parse(path).getroot()
    except OSError as error:
        raise ValueError("%s: cannot read the annotation (%s)" % (path, error.strerror)) from error
    except ElementTree.ParseError as error:
        raise ValueError("%s: not XML: %s" % (path, error)) from error


def _number(element: ElementTree.Element, tag: str, path: str) -> float:
    text = element.findtext(tag)
    if text is None:
        raise ValueError("%s: <%s> is missing" % (path, tag.replace("/", "><")))
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError("%s: <%s> is '%s', not a number" % (
            path, tag.replace("/", "><"), text.strip()))
    return number


def _hint(root: str) -> str:
    """What to say of a folder without ImageSets/Main: where in it the data set may be."""
    for below in ("VOC2007", os.path.join("VOCdevkit", "VOC2007")):
        if os.path.isdir(os.path.join(root, below, "ImageSets", "Main")):
            return ": no VOC folder; did you mean %s?" % os.path.join(root, below)
    return ": no VOC folder, there is no ImageSets/Main in it"


# ---------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------

def main(argv: Optional[Sequence[str]] = None) -> int:
    """Describe the folder that the command line names; return the exit status."""
    parser = processes.Parser(prog="voc.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("voc", metavar="DIR", help="folder in VOC's layout")
    return processes.command_line(_describe, parser.parse_args(argv), parser.prog)


def _describe(arguments: argparse.Namespace) -> None:
    """Print how many images of each split show each class."""
    voc = Voc(arguments.voc)
    for split in STANDARD_SPLITS:
        if os.path.isfile(os.path.join(voc.root, "ImageSets", "Main", split + ".txt")):
            labels = voc.labels(split)
            print("%s: %d images" % (split, len(labels)))
            for name, column in zip(voc.classes, labels.T):
                print("  %-12s %5d present %5d difficult" % (
                    name, (column == 1).sum(), (column == 0).sum()))


if __name__ == "__main__":
    sys.exit(main())
