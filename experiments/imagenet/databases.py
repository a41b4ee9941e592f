"""Read labeled images from an LMDB of Caffe's Datum messages, by their numbers."""
import os
from typing import Any, Callable, Tuple

import numpy as np

from ddinit.prototxt import caffe_messages
from training.batches import decoded
from training.databases import open_database


class LmdbImages:
    """The images of a database of data/make_lmdb.py.

    An image whose label is not one of `classes` is broken.
    """

    def __init__(self, path: str, classes: int) -> None:
        self._path = path
        self._environment = open_database(os.path.realpath(path))
        with self._environment.begin() as transaction:
            self._keys = list(transaction.cursor().iternext(keys=True, values=False))
        if not self._keys:
            raise ValueError("%s: the database is empty" % path)
        self._classes = classes
        self._last: Tuple[int, Any] = (-1, None)  # an image is read first, and then its label
        self.labels = _Labels(len(self._keys), self._label)

    def name(self, index: int) -> str:
        """Return how an image is called in messages."""
        return "%s: record %s" % (self._path, self._keys[index].decode("utf-8", "replace"))

    def read(self, index: int) -> np.ndarray:
        """Return an image, uint8 (height, width, channels)."""
        datum = self._datum(index)
        if datum.encoded:
            return decoded(datum.data, self.name(index))
        shape = (datum.channels, datum.height, datum.width)
        if len(datum.data) != int(np.prod(shape)) or not datum.data:
            raise ValueError("%s: %d bytes are not an image of %d x %d x %d"
                             % (self.name(index), len(datum.data), *shape))
        return np.ascontiguousarray(
            np.frombuffer(datum.data, np.uint8).reshape(shape).transpose(1, 2, 0))

    def _label(self, index: int) -> int:
        return self._datum(index).label

    def _datum(self, index: int) -> Any:
        if self._last[0] != index:
            with self._environment.begin() as transaction:
                record = transaction.get(self._keys[index])
            try:
                datum = caffe_messages().Datum.FromString(record)
            except Exception as error:  # protobuf's DecodeError is not a ValueError
                raise ValueError("%s: not a Datum" % self.name(index)) from error
            if not 0 <= datum.label < self._classes:
                raise ValueError("%s: the label is %d, but there are %d classes"
                                 % (self.name(index), datum.label, self._classes))
            self._last = (index, datum)
        return self._last[1]


class _Labels:
    """Labels (n,) that are read one by one: to read all would be to read the whole database."""

    def __init__(self, count: int, label: Callable[[int], int]) -> None:
        self.shape = (count,)
        self._label = label

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int) -> np.float32:
        return np.float32(self._label(index))
