"""An LMDB of labelled images as a data set of the training loop (paper, section 4.5).

Caffe's own Data layer reads the same database (data/make_lmdb.py), but always from its first
record and with random crops that continue from the last one: a run that resumes would have to
read everything again that it had read before.  Here any image is read by its number, so that what
a batch holds is a function of (seed, batch), in a new order each epoch.  A disk that is slow at
random reads wants a database that fits into memory: `make_lmdb.py --encoded`.

    PYTHONPATH=experiments python -c "import lmdb_images; \\
        print(lmdb_images.LmdbImages('build/val.lmdb', 1000).labels.shape)"
"""
import functools
import os
from typing import Any, Callable, Sequence, Tuple

import cv2
import numpy as np

from image_batches import Crops, prepared
from image_database import ImageDatabase
from prefetch import Batch


class LmdbImages:
    """The images of a database; see image_batches for what a data set is.

    A label that is not one of `classes` is a broken image.
    """

    def __init__(self, path: str, classes: int) -> None:
        self._database, self._keys = _opened(os.path.realpath(path))
        self._classes = classes
        self._last: Tuple[int, Any, int] = (-1, None, 0)  # an image is asked for, then its label
        self.labels = _Labels(len(self._keys), self.label)

    def name(self, index: int) -> str:
        """Return an image's key."""
        return self._keys[index].decode("utf-8", "replace")

    def read(self, index: int) -> np.ndarray:
        """Return an image, uint8 (height, width, channels)."""
        pixels, _ = self._image(index)
        return cv2.merge(list(pixels)) if len(pixels) > 1 else pixels[0][:, :, None]

    def label(self, index: int) -> int:
        """Return an image's class, from 0."""
        return self._image(index)[1]

    def _image(self, index: int) -> Tuple[np.ndarray, int]:
        if self._last[0] != index:
            pixels, label = self._database.image(self._keys[index])
            if not 0 <= label < self._classes:
                raise ValueError("%s: record %s has the label %d, there are %d classes"
                                 % (self._database.path, self.name(index), label, self._classes))
            self._last = (index, pixels, label)
        return self._last[1], self._last[2]


class _Labels:
    """Labels (n,) that are read when they are asked for: all of them would be all of the file."""

    def __init__(self, count: int, label: Callable[[int], int]) -> None:
        self.shape = (count,)
        self._label = label

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int) -> np.float32:
        return np.float32(self._label(index))


@functools.lru_cache(maxsize=None)
def _opened(path: str) -> Tuple[ImageDatabase, Sequence[bytes]]:
    """The open database, of which LMDB allows one a process, and its keys."""
    database = ImageDatabase(path)
    return database, database.keys()


def make_centre_batches(path: str, classes: int, crops: Crops,
                        batch_size: int) -> Callable[[int], Batch]:
    """Return the function that gives the central crops of a database, batch by batch, and their
    labels: arrays (m, channels, height, width) and (m,), m <= batch_size.

    Batch numbers go round and round; the last batch of a round holds what is left.
    Called in a worker.
    """
    cv2.setNumThreads(1)
    images = LmdbImages(path, classes)
    rounds = batches_of(len(images.labels), batch_size)

    def batch_of(number: int) -> Batch:
        first = number % rounds * batch_size
        indices = range(first, min(first + batch_size, len(images.labels)))
        pixels = [central_crop(images.read(index), crops) for index in indices]
        return Batch([np.stack(pixels), np.array([images.label(index) for index in indices])], [])

    return batch_of


def batches_of(count: int, batch_size: int) -> int:
    """Return how many batches `count` images are."""
    return -(-count // batch_size)


def central_crop(image: np.ndarray, crops: Crops) -> np.ndarray:
    """Return the centre of an image (h, w, channels) as float32 (channels, height, width).

    Where the border is odd, the crop lies half a pixel up and to the left, as Caffe's does.
    Raises ValueError where the image is smaller.
    """
    height, width = image.shape[:2]
    top, left = (height - crops.height) // 2, (width - crops.width) // 2
    if top < 0 or left < 0:
        raise ValueError("an image of %d x %d is smaller than the net's %d x %d: make the database "
                         "with a larger --resize" % (height, width, crops.height, crops.width))
    return prepared(image[top:top + crops.height, left:left + crops.width], crops)
