"""Images of a VOC folder in one LMDB: read faster than files, and moved as one thing.

OUT.lmdb holds `data.mdb` (Caffe Datum messages with the image files as they are, by image id;
no label) and `ImageSets/Main` (the lists of one split, as in the folder).

    python data/make_voc_lmdb.py --voc datasets/VOCdevkit/VOC2007 --split trainval \\
        build/trainval.lmdb
"""
import contextlib
import functools
import logging
import os
import shutil
from typing import Iterator, Union

import cv2
import lmdb
import numpy as np
from tqdm import tqdm

from ddinit.prototxt import caffe_messages
from image_database import MAP_BYTES
from voc import Voc, VocLists

BATCH = 64  # images per transaction, whose pages LMDB keeps in memory


class VocLmdb(VocLists):
    """The images and labels of a database that `write` made; threads and processes may share it.

    Raises ValueError where `root` holds no such database.
    """

    def __init__(self, root: str) -> None:
        if not os.path.isfile(os.path.join(root, "data.mdb")):
            raise ValueError("%s: no LMDB, there is no data.mdb in it" % root)
        super().__init__(root)

    def read_bytes(self, image: str) -> bytes:
        """Return the encoded image (JPEG) with the id `image`."""
        with _environment(self.root).begin() as transaction:
            record = transaction.get(image.encode())
        if record is None:
            raise ValueError("%s: holds no image %s" % (self.root, image))
        return caffe_messages().Datum.FromString(record).data


def open_voc(path: str) -> Union[Voc, VocLmdb]:
    """Return the reader of a VOC folder, or of an LMDB made from one."""
    return VocLmdb(path) if os.path.isfile(os.path.join(path, "data.mdb")) else Voc(path)


def write(voc: Voc, split: str, out: str) -> None:
    """Write the images and lists of a split as the database `out`, whole or not at all.

    An image that cannot be decoded is stored all the same, with a warning: the loader reports it
    and goes on.  Raises ValueError where `out` exists or the folder lacks a file, OSError where
    the disk is full.
    """
    if os.path.lexists(out):
        raise ValueError("%s exists; remove it first, or give another name" % out)
    images = voc.images(split)
    voc.labels(split)  # whatever is wrong with the lists shows before the work
    with _new_folder(out) as temporary:
        _write_lists(voc, split, os.path.join(temporary, "ImageSets", "Main"))
        try:
            with lmdb.open(temporary, map_size=MAP_BYTES) as environment:
                bar = tqdm(images, unit="image", desc=os.path.basename(out), disable=None)
                for start in range(0, len(images), BATCH):
                    with environment.begin(write=True) as transaction:
                        for image in images[start:start + BATCH]:
                            transaction.put(image.encode(), _record(voc, image))
                            bar.update()
                bar.close()
        except lmdb.Error as error:
            raise OSError("%s: %s" % (out, error)) from error


@contextlib.contextmanager
def _new_folder(path: str) -> Iterator[str]:
    """Yield a new folder beside `path`; rename it to `path` only if the block succeeds."""
    parent, name = os.path.split(os.path.abspath(path))
    if not os.path.isdir(parent):
        raise ValueError("%s: the folder %s does not exist" % (path, parent))
    temporary = os.path.join(parent, ".%s.%d.part" % (name, os.getpid()))
    os.mkdir(temporary)
    try:
        yield temporary
        os.rename(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_lists(voc: Voc, split: str, folder: str) -> None:
    """The lists of the split, with SPLIT.txt also where the folder has none."""
    os.makedirs(folder)
    labels = voc.labels(split)
    images = voc.images(split)
    with open(os.path.join(folder, split + ".txt"), "w", encoding="utf-8") as file:
        file.writelines(image + "\n" for image in images)
    for name, column in zip(voc.classes, labels.T):
        path = os.path.join(folder, "%s_%s.txt" % (name, split))
        with open(path, "w", encoding="utf-8") as file:
            file.writelines("%s %2d\n" % pair for pair in zip(images, column))


def _record(voc: Voc, image: str) -> bytes:
    content = voc.read_bytes(image)
    decoded = None
    if content:
        decoded = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_REDUCED_GRAYSCALE_8)
    if decoded is None:
        logging.warning("%s: not an image that OpenCV can decode", voc.image_path(image))
    return caffe_messages().Datum(encoded=True, data=content).SerializeToString()


@functools.lru_cache(maxsize=None)
def _environment(root: str) -> lmdb.Environment:
    """The open database, of which LMDB allows one a process.

    Without locks and writers it is only a map of the file, which forked processes share.
    """
    try:
        # No lock file: the folder may be read-only, and nobody writes while we read.
        return lmdb.open(root, readonly=True, lock=False, readahead=False)
    except lmdb.Error as error:
        raise ValueError("%s: not an LMDB (%s)" % (root, error)) from error
