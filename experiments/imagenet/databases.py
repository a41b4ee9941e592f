"""Read labeled images from an LMDB of Caffe's Datum messages, by their numbers."""
import functools
import os
from typing import Any, Callable, Sequence, Tuple

import lmdb
import numpy as np

from ddinit.prototxt import caffe_messages
from training.batches import decoded


class LmdbImages:
    """The images of a database of data/make_lmdb.py.

    An image whose label is not one of `classes` is broken.
    """

    def __init__(self, path: str, classes: int) -> None:
        self._path = path
        self._environment, self._keys = _opened(os.path.realpath(path))
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


@functools.lru_cache(maxsize=None)
def _opened(path: str) -> Tuple[lmdb.Environment, Sequence[bytes]]:
    """Return the open database, of which LMDB allows one in each process, and its keys.

    Raises ValueError where there is no database, or an empty one.
    """
    if not os.path.isfile(os.path.join(path, "data.mdb")):
        raise ValueError("%s: not an LMDB, because there is no data.mdb in it" % path)
    try:
        # No lock file: the folder may be read-only, and nobody writes while we read.
        environment = lmdb.open(path, readonly=True, lock=False, readahead=False)
    except lmdb.Error as error:
        raise ValueError("%s: not an LMDB (%s)" % (path, error)) from error
    with environment.begin() as transaction:
        keys = list(transaction.cursor().iternext(keys=True, values=False))
    if not keys:
        raise ValueError("%s: the database is empty" % path)
    return environment, keys
