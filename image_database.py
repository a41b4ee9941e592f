"""Labelled images in an LMDB of Caffe's Datum messages, as Caffe's own Data layer reads them.

A record is either pixels, uint8 (channels, height, width) in BGR, or an encoded image file.

    python -c "import image_database as d; print(len(d.ImageDatabase('build/train.lmdb')))"
"""
import functools
import os
from typing import Any, Iterable, Iterator, List, Tuple

import cv2
import lmdb
import numpy as np

from ddinit.prototxt import caffe_messages

# The most that a database may hold.  It costs address space only, and is written into the file,
# where Caffe finds it again.
MAP_BYTES = 1 << 40


def pixel_record(image: np.ndarray, label: int) -> np.ndarray:
    """Return the Datum of an image uint8 (height, width, channels), as bytes in an array.

    Its pixels are copied once, straight to their place: protobuf would copy them three times.
    """
    height, width, channels = image.shape
    head = _head(channels, height, width)
    tail = caffe_messages().Datum(label=label).SerializeToString()
    record = np.empty(len(head) + image.size + len(tail), np.uint8)
    record[:len(head)] = np.frombuffer(head, np.uint8)
    planes = record[len(head):len(head) + image.size].reshape(channels, height, width)
    cv2.split(image, list(planes))
    record[len(head) + image.size:] = np.frombuffer(tail, np.uint8)
    return record


@functools.lru_cache(maxsize=256)
def _head(channels: int, height: int, width: int) -> bytes:
    """What precedes the pixels in a Datum, whose label follows them."""
    size = channels * height * width
    datum = caffe_messages().Datum(channels=channels, height=height, width=width, data=bytes(size))
    return datum.SerializeToString()[:-size]


def encoded_record(file: bytes, label: int) -> bytes:
    """Return the Datum of an image file's content, which Caffe decodes when it reads it."""
    return caffe_messages().Datum(encoded=True, data=file, label=label).SerializeToString()


def read_record(record: bytes, name: str) -> Tuple[np.ndarray, int]:
    """Return pixels, uint8 (channels, height, width), and label of a Datum.

    Raises ValueError naming the record `name` where it is no Datum or no image.
    """
    try:
        datum = caffe_messages().Datum.FromString(record)
    except Exception as error:  # protobuf's DecodeError is no ValueError
        raise ValueError("%s: not a Datum" % name) from error
    if datum.encoded:
        return _decoded(datum.data, name), datum.label
    shape = (datum.channels, datum.height, datum.width)
    if len(datum.data) != int(np.prod(shape)) or not datum.data:
        raise ValueError("%s: %d bytes are no image of %d x %d x %d"
                         % ((name, len(datum.data)) + shape))
    return np.frombuffer(datum.data, np.uint8).reshape(shape), datum.label


def write_database(path: str, images: Iterable[Tuple[np.ndarray, int]]) -> None:
    """Write images uint8 (channels, height, width) in BGR, and their labels, as a new database.

    For what fits into one transaction; data/make_lmdb.py is for lists of files.
    Raises ValueError naming the folder where it cannot be written.
    """
    try:
        with lmdb.open(path, map_size=MAP_BYTES) as environment, \
                environment.begin(write=True) as transaction:
            for number, (pixels, label) in enumerate(images):
                image = np.ascontiguousarray(pixels.transpose(1, 2, 0))
                transaction.put(b"%08d" % number, pixel_record(image, label).data)
    except lmdb.Error as error:
        raise ValueError("%s: cannot write the database (%s)" % (path, error)) from error


class ImageDatabase:
    """A database open for reading; `len` is its number of records.

    Raises ValueError naming the folder where it holds no LMDB or no record.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        if not os.path.isfile(os.path.join(path, "data.mdb")):
            raise ValueError("%s: no LMDB there (no data.mdb)" % path)
        try:
            # No lock file: the folder may be read-only, and nobody writes while we read.
            self._environment = lmdb.open(path, readonly=True, lock=False, readahead=False)
        except lmdb.Error as error:
            raise ValueError("%s: not an LMDB (%s)" % (path, error)) from error
        self.length: int = self._environment.stat()["entries"]
        if not self.length:
            raise ValueError("%s: the database is empty" % path)

    def __len__(self) -> int:
        return self.length

    def __enter__(self) -> "ImageDatabase":
        return self

    def __exit__(self, *_: Any) -> None:
        self._environment.close()

    def records(self) -> Iterator[Tuple[str, bytes]]:
        """Yield the key and the Datum's bytes of every record, in the order of their keys."""
        with self._environment.begin() as transaction:
            for key, record in transaction.cursor():
                yield key.decode("utf-8", "replace"), record

    def images(self) -> Iterator[Tuple[np.ndarray, int]]:
        """Yield pixels (channels, height, width) and label of every record."""
        for key, record in self.records():
            yield read_record(record, "%s: record %s" % (self.path, key))

    def keys(self) -> List[bytes]:
        """Return all keys, in order; this does not read the records."""
        with self._environment.begin() as transaction:
            return list(transaction.cursor().iternext(keys=True, values=False))

    def image(self, key: bytes) -> Tuple[np.ndarray, int]:
        """Return pixels (channels, height, width) and label of one record.

        Raises ValueError naming the record where there is none or it is no image.
        """
        name = "%s: record %s" % (self.path, key.decode("utf-8", "replace"))
        with self._environment.begin() as transaction:
            record = transaction.get(key)
        if record is None:
            raise ValueError("%s is not there" % name)
        return read_record(record, name)


def _decoded(file: bytes, name: str) -> np.ndarray:
    image = cv2.imdecode(np.frombuffer(file, np.uint8), cv2.IMREAD_COLOR)
    if image is None:
        raise ValueError("%s: not an image that OpenCV can decode" % name)
    return np.stack(cv2.split(image))
