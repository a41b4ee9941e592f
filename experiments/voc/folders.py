"""Read folders in PASCAL VOC's layout, with any classes.

A folder holds

    ImageSets/Main/SPLIT.txt         an image id on each line
    ImageSets/Main/CLASS_SPLIT.txt   lines `id flag`: -1 absent, 1 present, 0 only difficult objects
    JPEGImages/ID.jpg
    Annotations/ID.xml               boxes, for detection

as in section 4 of the development kit of the VOC 2007 challenge (Everingham et al.).
"""
import collections
import logging
import math
import os
import xml.etree.ElementTree as ElementTree
from typing import Dict, List, NamedTuple, Set

import numpy as np

from ddinit import files

STANDARD_SPLITS = ("train", "val", "trainval", "test")
FLAGS = {"-1": -1, "0": 0, "1": 1, "+1": 1}
# Pixels by which a box may exceed its image: tools that count from 0 write 0 where VOC has 1.
TOLERANCE = 1.0


class Objects(NamedTuple):
    """The annotated objects of an image.

    boxes           float64 (n, 4): x1, y1, x2, y2 in pixels from 0, both ends inside of the box
    classes         int64 (n,), indices into `Voc.classes`
    difficult       bool (n,)
    width, height   of the image in pixels
    """
    boxes: np.ndarray
    classes: np.ndarray
    difficult: np.ndarray
    width: int
    height: int


class VocLists:
    """The lists of a VOC folder: the images of each split, and the classes that they show.

    `classes` are the sorted classes of all CLASS_SPLIT.txt. All errors are ValueErrors that name
    the file.
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
            raise ValueError("%s: there are no classes, because there is no CLASS_SPLIT.txt"
                             % self._lists)

    def images(self, split: str) -> List[str]:
        """Return the ids in SPLIT.txt in their order; without it, in the list of the first class.
        """
        path = self._list_path(split)
        if not os.path.isfile(path):
            path = self._list_path("%s_%s" % (self.classes[0], split))
            return list(_read_flags(path))
        ids = [line.split()[0] for line in _lines(path)]
        if not ids:
            raise ValueError("%s: the list is empty" % path)
        image, count = collections.Counter(ids).most_common(1)[0]
        if count > 1:
            raise ValueError("%s: image %s is listed twice" % (path, image))
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
                raise ValueError("%s: there is no line for image %s" % (path, missing))
            if len(flags) > len(ids):
                extra = next(iter(flags.keys() - set(ids)))
                raise ValueError("%s: image %s is not in the split" % (path, extra))
            labels[:, column] = [flags[image] for image in ids]
        return labels

    def _list_path(self, stem: str) -> str:
        return os.path.join(self._lists, stem + ".txt")


class Voc(VocLists):
    """A VOC folder with its images and annotations."""

    def __init__(self, root: str) -> None:
        super().__init__(root)
        self._warned: Set[str] = set()

    def image_path(self, image: str) -> str:
        """Return the path of the image with the id `image`."""
        path = os.path.join(self.root, "JPEGImages", image + ".jpg")
        if not os.path.isfile(path):
            raise ValueError("%s: the image does not exist" % path)
        return path

    def read_bytes(self, image: str) -> bytes:
        """Return the encoded image (JPEG) with the id `image`."""
        path = self.image_path(image)
        try:
            with open(path, "rb") as file:
                return file.read()
        except OSError as error:
            raise ValueError("%s: cannot read the image (%s)" % (path, error.strerror)) from error

    def objects(self, image: str) -> Objects:
        """Return the annotated objects of the image with the id `image`, difficult ones included.

        A box that exceeds the image by a pixel is clipped with a warning. Raises ValueError where
        the annotation is missing, has no object, or has a class that no list names or a box that is
        empty or outside of the image.
        """
        path = os.path.join(self.root, "Annotations", image + ".xml")
        annotation = _read_xml(path)
        width = int(_number(annotation, "size/width", path))
        height = int(_number(annotation, "size/height", path))
        elements = annotation.findall("object")
        if not elements:
            raise ValueError("%s: the annotation has no object" % path)
        boxes = np.array([self._box(item, width, height, path) for item in elements])
        classes = np.array([self._class_index(item, path) for item in elements])
        difficult = np.array([(item.findtext("difficult") or "0").strip() == "1"
                              for item in elements])
        return Objects(boxes, classes, difficult, width, height)

    def _class_index(self, item: ElementTree.Element, path: str) -> int:
        name = (item.findtext("name") or "").strip()
        if name not in self.classes:
            raise ValueError("%s: class '%s' is not one of the classes of %s (%s)" % (
                path, name, self._lists, ", ".join(self.classes)))
        return self.classes.index(name)

    def _box(self, item: ElementTree.Element, width: int, height: int, path: str) -> List[float]:
        """Return x1, y1, x2, y2 from 0, as floats, because unsigned numbers wrap at 0 - 1."""
        corners = [_number(item, "bndbox/" + key, path) for key in ("xmin", "ymin", "xmax", "ymax")]
        box = [corner - 1.0 for corner in corners]
        inside = [min(max(edge, 0.0), limit - 1.0)
                  for edge, limit in zip(box, (width, height, width, height))]
        shown = "box %s" % " ".join("%g" % corner for corner in corners)
        if max(abs(edge - cut) for edge, cut in zip(box, inside)) > TOLERANCE:
            raise ValueError("%s: %s is outside of the image of %d x %d pixels" % (
                path, shown, width, height))
        if inside[2] < inside[0] or inside[3] < inside[1]:
            raise ValueError("%s: %s is empty" % (path, shown))
        if inside != box and path not in self._warned:
            self._warned.add(path)
            logging.warning("%s: %s exceeds the image of %d x %d by a pixel and is clipped",
                            path, shown, width, height)
        return inside


def _splits(stems: List[str]) -> Set[str]:
    """Return the splits: the stems that end others after an underscore, and those of VOC."""
    ends = {stem for stem in stems if any(other.endswith("_" + stem) for other in stems)}
    return ends.union(STANDARD_SPLITS)


def _class_of(stem: str, splits: Set[str]) -> str:
    """Return the class in the stem CLASS_SPLIT, or '' for a split: 'a_b' for 'a_b_test'."""
    if stem in splits:
        return ""
    matching = [split for split in splits if stem.endswith("_" + split)]
    return stem[:-1 - len(max(matching, key=len))] if matching else ""


def _read_flags(path: str) -> Dict[str, int]:
    """Return the flags in a CLASS_SPLIT.txt by image id, in their order."""
    flags: Dict[str, int] = {}
    for number, line in enumerate(_lines(path), 1):
        fields = line.split()
        if len(fields) != 2 or fields[1] not in FLAGS:
            raise ValueError("%s: entry %d is '%s', not an image id and -1, 0 or 1" % (
                path, number, line))
        if fields[0] in flags:
            raise ValueError("%s: image %s is listed twice" % (path, fields[0]))
        flags[fields[0]] = FLAGS[fields[1]]
    if not flags:
        raise ValueError("%s: the list is empty" % path)
    return flags


def _lines(path: str) -> List[str]:
    return [line.strip() for line in files.read_text(path).splitlines() if line.strip()]


def _read_xml(path: str) -> ElementTree.Element:
    try:
        return ElementTree.parse(path).getroot()
    except OSError as error:
        raise ValueError("%s: cannot read the annotation (%s)" % (path, error.strerror)) from error
    except ElementTree.ParseError as error:
        raise ValueError("%s: the annotation is not XML (%s)" % (path, error)) from error


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
    """Return what to say of a folder without ImageSets/Main."""
    for below in ("VOC2007", os.path.join("VOCdevkit", "VOC2007")):
        if os.path.isdir(os.path.join(root, below, "ImageSets", "Main")):
            return ": not a VOC folder. Did you mean %s?" % os.path.join(root, below)
    return ": not a VOC folder, because there is no ImageSets/Main in it"
