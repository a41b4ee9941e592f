"""Weights into nets, checked before Caffe, which aborts on shapes that differ; and out of them.

    left = load_weights(caffe_net, "caffenet.caffemodel", fresh=["fc8"])
    save_weights(caffe_net, definition, "new.caffemodel")

    python magic_init.py models/caffenet_tiny/deploy.prototxt new.caffemodel -d 'photos/*' \\
        --load old.caffemodel
"""
import os
import tempfile
from typing import Any, List, Sequence, Tuple

import numpy as np
from google.protobuf.message import DecodeError

import definitions
from definitions import caffe_messages

# Bytes of a caffemodel that go to the disk at once.
PIECE = 1 << 22


def load_weights(net: Any, path: str, fresh: Sequence[str] = ()) -> List[str]:
    """Copy a caffemodel into a caffe.Net by layer name; return the net's layers left as they are.

    Layers in `fresh` are left.  Raises ValueError naming the layer and both shapes where they
    differ, and where no layer of the file is in the net.
    """
    shapes = definitions.read_weights(path)
    loaded = [name for name in net.params if name in shapes and name not in fresh]
    if not loaded:
        raise ValueError("%s: none of its layers (%s...) is one of the net's (%s...)"
                         % (path, ", ".join(list(shapes)[:3]), ", ".join(list(net.params)[:3])))
    for name in loaded:
        wanted = [tuple(blob.shape) for blob in net.params[name]]
        if [_plain_shape(shape) for shape in shapes[name]] != [_plain_shape(s) for s in wanted]:
            raise ValueError("%s: layer '%s' has weights of shape %s, the net wants %s" % (
                path, name, _shapes(shapes[name]), _shapes(wanted)))
    if any(name in shapes for name in fresh):
        with tempfile.NamedTemporaryFile(suffix=".caffemodel") as file:
            file.write(_without(path, fresh))
            file.flush()
            net.copy_from(file.name)
    else:
        net.copy_from(path)
    return [name for name in net.params if name not in loaded]


def save_weights(net: Any, definition: Any, path: str) -> None:
    """Write a caffe.Net built from `definition` as a caffemodel, straight from its blobs.

    The file is protobuf's encoding of a NetParameter, as caffe.Net.save writes it but for the
    Split layers.  That makes two copies of all weights in memory first and takes several times as
    long (CaffeNet, 244 MB: 2.0 s for 0.3 s).
    """
    with open(path, "wb", buffering=0) as file:
        _write(file, _field(1, definition.name.encode()))
        for layer in definition.layer:
            parts = [layer.SerializeToString()]
            for blob in net.params.get(layer.name, ()):
                numbers: Any = np.ascontiguousarray(blob.data).reshape(-1).view(np.uint8).data
                shape = caffe_messages().BlobShape(dim=blob.shape).SerializeToString()
                packed = [_prefix(5, len(numbers)), numbers, _field(7, shape)]
                parts += [_prefix(7, sum(map(len, packed)))] + packed
            _write(file, _prefix(100, sum(map(len, parts))))
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
    """What precedes a field's bytes: its number with wire type 2, and their count."""
    return _varint(number << 3 | 2) + _varint(length)


def _varint(value: int) -> bytes:
    """An unsigned integer, seven bits a byte, lowest first; all bytes but the last have bit 7."""
    encoded = bytearray()
    while value > 127:
        encoded.append(value & 127 | 128)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def copy_weights(source: Any, target: Any) -> None:
    """Copy parameters between two caffe.Nets by layer name.

    A copy, not Caffe's sharing: nets that share weights can crash when they end.
    """
    for name, blobs in target.params.items():
        if name not in source.params:
            raise ValueError("layer '%s' of the measured net is not in the training net" % name)
        for blob, trained in zip(blobs, source.params[name]):
            blob.data[...] = trained.data


def check_filled(net: Any, names: Sequence[str]) -> None:
    """Raise ValueError naming the first layer of `names` whose weights nothing sets.

    Caffe would leave them 0, which no training leaves again.
    """
    for layer in net.layer:
        parameters = {"Convolution": layer.convolution_param,
                      "InnerProduct": layer.inner_product_param}.get(layer.type)
        if parameters is not None and layer.name in names \
                and not parameters.HasField("weight_filler"):
            raise ValueError("layer '%s': neither the weights nor a weight_filler of the "
                             "definition set it" % layer.name)


def _without(path: str, names: Sequence[str]) -> bytes:
    """A caffemodel's bytes without the layers called `names`."""
    weights = caffe_messages().NetParameter()
    with open(path, "rb") as file:
        try:
            weights.ParseFromString(file.read())
        except DecodeError as error:
            raise ValueError("%s: cut short or not a caffemodel" % path) from error
    for field in (weights.layer, weights.layers):
        for index in reversed(range(len(field))):
            if field[index].name in names:
                del field[index]
    return weights.SerializeToString()


def _plain_shape(shape: Sequence[int]) -> Tuple[int, ...]:
    """A shape without leading ones: old files write every blob with four axes."""
    lengths = list(shape)
    while len(lengths) > 1 and lengths[0] == 1:
        del lengths[0]
    return tuple(lengths)


def _shapes(shapes: Sequence[Sequence[int]]) -> str:
    return " and ".join("x".join(str(length) for length in shape) or "1" for shape in shapes)
