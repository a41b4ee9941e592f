"""Write and read labeled images in an LMDB of Caffe's Datum messages, for Caffe's Data layer.

A record is either pixels, uint8 (channels, height, width) in BGR, or an encoded image file.
"""
import functools
import os
from typing import Any, Iterator, Tuple

import cv2
import lmdb
import numpy as np

from ddinit.prototxt import caffe_messages

# The most that a database may hold. It costs only address space, and is written into the file.
MAP_BYTES = 1 << 40


def pixel_record(image: np.ndarray, label: int) -> np.ndarray:
    """Return the Datum of an image uint8 (height, width, channels), as bytes in an array.

    The pixels are copied once, where protobuf would copy them three times.
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
    """Return the bytes of a Datum before its pixels; the label follows them."""
    size = channels * height * width
    datum = caffe_messages().Datum(channels=channels, height=height, width=width, data=bytes(size))
    return datum.SerializeToString()[:-size]


def encoded_record(file: bytes, label: int) -> bytes:
    """Return the Datum of the content of an image file, which Caffe decodes."""
    return caffe_messages().Datum(encoded=True, data=file, label=label).SerializeToString()


def read_record(record: bytes, name: str) -> Tuple[np.ndarray, int]:
    """Return the pixels, uint8 (channels, height, width), and the label of a Datum.

    Raises ValueError with `name` where it is not a Datum, or not of an image.
    """
    try:
        datum = caffe_messages().Datum.FromString(record)
    except Exception as error:  # protobuf's DecodeError is not a ValueError
        raise ValueError("%s: not a Datum" % name) from error
    if datum.encoded:
        return _decoded(datum.data, name), datum.label
    shape = (datum.channels, datum.height, datum.width)
    if len(datum.data) != int(np.prod(shape)) or not datum.data:
        raise ValueError("%s: %d bytes are not an image of %d x %d x %d"
                         % ((name, len(datum.data)) + shape))
    return np.frombuffer(datum.data, np.uint8).reshape(shape), datum.label


class ImageDatabase:
    """A database that is open for reading; `len` is its number of records.

    Raises ValueError naming the folder where there is no LMDB or no record.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        if not os.path.isfile(os.path.join(path, "data.mdb")):
            raise ValueError("%s: not an LMDB, because there is no data.mdb in it" % path)
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
        """Yield the key and the Datum of each record, in the order of the keys."""
        with self._environment.begin() as transaction:
            for key, record in transaction.cursor():
                yield key.decode("utf-8", "replace"), record


def _decoded(file: bytes, name: str) -> np.ndarray:
    image = cv2.imdecode(np.frombuffer(file, np.uint8), cv2.IMREAD_COLOR)
    if image is None:
        raise ValueError("%s is not an image that OpenCV can decode" % name)
    return np.stack(cv2.split(image))
