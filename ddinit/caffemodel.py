"""The caffemodel file: a protobuf NetParameter, read and written without a copy of its numbers.

Protobuf's own reader and writer hold all numbers twice before Caffe has them: 465 MB more for the
244 MB of CaffeNet.  Here arrays are views of the file's bytes, and bytes go from a net's blobs to
the disk.  All dialects are read: `layer` of today, `layers` of V1 and what V0 put into these.

    python magic_init.py models/caffenet_tiny/deploy.prototxt new.caffemodel -d 'photos/*' \\
        --load old.caffemodel
"""
import math
import mmap
import os
from typing import Any, Dict, Iterator, List, Tuple

import numpy as np
from google.protobuf.message import DecodeError

from ddinit.prototxt import caffe_messages

# Bytes that go to the disk at once.
PIECE = 1 << 22
# Numbers of fields: a net's layers of today and of V1; the name and the blobs of these, and of a
# V0 layer, which is field 1 of a V1 layer; the numbers and the shape of a blob.
LAYER, V1_LAYER, V0_LAYER = 100, 2, 1
NAME, BLOBS = {LAYER: 1, V1_LAYER: 4, V0_LAYER: 1}, {LAYER: 7, V1_LAYER: 6, V0_LAYER: 50}
DATA, DOUBLE_DATA, SHAPE = 5, 8, 7
TYPES: Dict[int, Any] = {DATA: np.dtype("<f4"), DOUBLE_DATA: np.dtype("<f8")}
# How a field is encoded.
VARINT, EIGHT_BYTES, BYTES, FOUR_BYTES = 0, 1, 2, 5


# ---------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------

def read(path: str) -> Dict[str, List[np.ndarray]]:
    """Return the blobs of a caffemodel by layer name, as far as a layer has any.

    They are views of the file, which must stay as it is while they are used.
    Raises ValueError naming the file where it is missing, cut short or no caffemodel.
    """
    try:
        with open(path, "rb") as file:
            if not os.fstat(file.fileno()).st_size:
                raise ValueError("%s: not a caffemodel (no layers in it)" % path)
            content = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except OSError as error:
        raise ValueError("%s: cannot read the weights (%s)" % (path, error.strerror)) from error
    try:
        layers = [_layer(value, number) for number, kind, value in _fields(content)
                  if number in (LAYER, V1_LAYER) and kind == BYTES]
        found = {name: [_array(blob, path, name) for blob in blobs]
                 for name, blobs in layers if blobs}
    except (_Malformed, DecodeError) as error:
        raise ValueError("%s: cut short or not a caffemodel" % path) from error
    if not layers:
        raise ValueError("%s: not a caffemodel (no layers in it)" % path)
    return found


class _Malformed(ValueError):
    """Bytes that are not protobuf's encoding of anything."""


def _fields(content: memoryview) -> Iterator[Tuple[int, int, Any]]:
    """Yield number, kind and value of each field of a message: an integer, or its bytes."""
    position = 0
    while position < len(content):
        key, position = _varint_at(content, position)
        number, kind = key >> 3, key & 7
        if kind == VARINT:
            value, position = _varint_at(content, position)
            yield number, kind, value
            continue
        if kind == BYTES:
            length, position = _varint_at(content, position)
        elif kind in (EIGHT_BYTES, FOUR_BYTES):
            length = 8 if kind == EIGHT_BYTES else 4
        else:
            raise _Malformed("kind %d" % kind)
        if position + length > len(content):
            raise _Malformed("cut short")
        yield number, kind, content[position:position + length]
        position += length


def _varint_at(content: memoryview, position: int) -> Tuple[int, int]:
    """Return the integer that starts at a position, and where the next field starts."""
    value = 0
    for shift in range(0, 70, 7):
        if position == len(content):
            raise _Malformed("cut short")
        byte = content[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
    raise _Malformed("an integer of more than ten bytes")


def _layer(content: memoryview, dialect: int) -> Tuple[str, List[memoryview]]:
    """Return the name of a layer and the bytes of its blobs."""
    name, blobs = "", []
    for number, kind, value in _fields(content):
        if kind != BYTES:
            continue
        if dialect == V1_LAYER and number == V0_LAYER:
            return _layer(value, V0_LAYER)
        if number == NAME[dialect]:
            name = bytes(value).decode(errors="replace")
        elif number == BLOBS[dialect]:
            blobs.append(value)
    return name, blobs


def _array(content: memoryview, path: str, layer: str) -> np.ndarray:
    """Return a blob's numbers in its shape; an old one has four lengths."""
    parts: List[np.ndarray] = []
    described = b""
    for number, kind, value in _fields(content):
        if number in TYPES and kind != VARINT:
            if len(value) % TYPES[number].itemsize:
                raise _Malformed("a part of a number")
            parts.append(np.frombuffer(value, TYPES[number]) if len(value) else np.empty(0, "<f4"))
        elif number == SHAPE and kind == BYTES:
            described += _field(number, bytes(value))
        elif kind == VARINT:
            described += _varint(number << 3) + _varint(value)
    blob = caffe_messages().BlobProto.FromString(described)
    legacy = any(blob.HasField(name) for name in ("num", "channels", "height", "width"))
    shape = (blob.num, blob.channels, blob.height, blob.width) if legacy else blob.shape.dim
    numbers = parts[0] if len(parts) == 1 else np.concatenate(parts or [np.empty(0, np.float32)])
    if math.prod(shape) != numbers.size:
        raise ValueError("%s: layer '%s': %d numbers do not fill the shape %s"
                         % (path, layer, numbers.size, list(shape)))
    return numbers.reshape(shape)


# ---------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------

def write(net: Any, definition: Any, path: str) -> None:
    """Write a caffe.Net built from `definition` as a caffemodel, straight from its blobs.

    The file is as caffe.Net.save writes it but for the Split layers.  That makes two copies of all
    weights in memory first and takes several times as long (CaffeNet, 244 MB: 2.0 s for 0.2 s).
    """
    with open(path, "wb", buffering=0) as file:
        _write(file, _field(1, definition.name.encode()))
        for layer in definition.layer:
            parts = [layer.SerializeToString()]
            for blob in net.params.get(layer.name, ()):
                numbers: Any = np.ascontiguousarray(blob.data).reshape(-1).view(np.uint8).data
                shape = caffe_messages().BlobShape(dim=blob.shape).SerializeToString()
                packed = [_prefix(DATA, len(numbers)), numbers, _field(SHAPE, shape)]
                parts += [_prefix(BLOBS[LAYER], sum(map(len, packed)))] + packed
            _write(file, _prefix(LAYER, sum(map(len, parts))))
            for part in parts:
                _write(file, part)


def _write(file: Any, content: Any) -> None:
    """Write bytes, and have the disk take them PIECE by PIECE where the system can be told to.

    Each piece then lies in memory where the last one lay.  New memory for a whole file is what
    takes longest on a virtual machine: 244 MB in 0.16 s instead of 0.87 s, fsync included.
    """
    for start in range(0, len(content), PIECE):
        piece = content[start:start + PIECE]
        offset = file.tell()
        while len(piece):
            piece = piece[file.write(piece):]
        if file.tell() - offset == PIECE and hasattr(os, "posix_fadvise"):
            os.fdatasync(file.fileno())
            os.posix_fadvise(file.fileno(), offset, PIECE, os.POSIX_FADV_DONTNEED)


def _field(number: int, content: bytes) -> bytes:
    """A field of bytes in protobuf's encoding."""
    return _prefix(number, len(content)) + content


def _prefix(number: int, length: int) -> bytes:
    """What precedes a field's bytes: its number with kind BYTES, and their count."""
    return _varint(number << 3 | BYTES) + _varint(length)


def _varint(value: int) -> bytes:
    """An unsigned integer, seven bits a byte, lowest first; all bytes but the last have bit 7."""
    encoded = bytearray()
    while value > 127:
        encoded.append(value & 127 | 128)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
