"""Load weights into nets, checked before Caffe, which aborts on shapes that differ."""
import hashlib
import math
import os
import tempfile
import warnings
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np
from google.protobuf.message import DecodeError

from ddinit.files import read_text
from ddinit.prototxt import caffe_messages

HDF5_MARK = b"\x89HDF\r\n\x1a\n"


def load_weights(net: Any, path: str, fresh: Sequence[str] = ()) -> List[str]:
    """Copy a caffemodel into a caffe.Net by layer name; return the net's layers left as they are.

    Protobuf files of every dialect and HDF5 files are read, under any name.  Layers in `fresh` are
    left.  Raises ValueError naming the layer and both shapes where they differ, and where no layer
    of the file is in the net.
    """
    try:
        with open(path, "rb") as file:
            content = file.read()
    except OSError as error:
        raise ValueError("%s: cannot read the weights (%s)" % (path, error.strerror)) from error
    if content.startswith(HDF5_MARK):
        return _load_hdf5(net, path, fresh)
    stored = read_message(content, path)
    del content
    blobs = stored_blobs(stored)
    loaded = [name for name in net.params if name in blobs and name not in fresh]
    if not loaded:
        raise ValueError(
            "%s: none of its layers is one of the network's. The file has %s; the network has %s. "
            "Was the model trained with another prototxt?"
            % (path, _some(blobs), _some(net.params)))
    fits = [_check_layer(net, name, blobs[name], path) for name in loaded]
    if all(fits) and not set(fresh) & set(blobs):
        net.copy_from(path)
        return [name for name in net.params if name not in loaded]
    kept = caffe_messages().NetParameter()  # in today's dialect, with the net's own shapes
    for name in loaded:
        layer = kept.layer.add(name=name)
        for blob, own in zip(blobs[name], net.params[name]):
            copy = layer.blobs.add()
            copy.CopyFrom(blob)
            for field in ("num", "channels", "height", "width", "shape"):
                copy.ClearField(field)
            copy.shape.dim.extend(own.shape)
    with tempfile.NamedTemporaryFile(suffix=".caffemodel") as part:
        part.write(kept.SerializeToString())
        part.flush()
        net.copy_from(part.name)
    return [name for name in net.params if name not in loaded]


def read_message(content: bytes, path: str) -> Any:
    """Return the NetParameter in the bytes of a caffemodel.

    Raises ValueError naming the file where they are cut short or something else.
    """
    try:
        with warnings.catch_warnings(record=True) as told:  # of what is no field
            stored = caffe_messages().NetParameter.FromString(content)
    except DecodeError as error:
        raise ValueError("%s: cut short or not a caffemodel" % path) from error
    if told or not (stored.layer or stored.layers):
        raise ValueError("%s: not a caffemodel (no layers in it)" % path)
    return stored


def stored_blobs(stored: Any) -> Dict[str, List[Any]]:
    """Return the BlobProtos of a NetParameter of any dialect, by the names of layers with any."""
    layers = [(layer.name, layer.blobs) for layer in stored.layer]
    for old in stored.layers:
        inner = old.layer if old.HasField("layer") else old  # what V0 put into a V1 layer
        layers.append((inner.name, inner.blobs))
    return {name: list(blobs) for name, blobs in layers if blobs}


def blob_shape(blob: Any) -> Tuple[int, ...]:
    """Return the shape of a BlobProto; an old one has four lengths."""
    if any(blob.HasField(name) for name in ("num", "channels", "height", "width")):
        return (blob.num, blob.channels, blob.height, blob.width)
    return tuple(blob.shape.dim)


def _load_hdf5(net: Any, path: str, fresh: Sequence[str]) -> List[str]:
    """Let Caffe read an HDF5 file; what it has not set is found by NaN."""
    before = {name: [np.array(blob.data) for blob in blobs] for name, blobs in net.params.items()}
    for blobs in net.params.values():
        for blob in blobs:
            blob.data[...] = np.nan
    net.load_hdf5(path)
    left = [name for name, blobs in net.params.items()
            if name in fresh or np.isnan(blobs[0].data).all()]
    for name in left:
        for blob, old in zip(net.params[name], before[name]):
            blob.data[...] = old
    if len(left) == len(net.params):
        raise ValueError("%s: none of its layers is one of the network's (%s)"
                         % (path, _some(net.params)))
    return left


def _check_layer(net: Any, name: str, blobs: Sequence[Any], path: str) -> bool:
    """Return whether Caffe takes a layer's blobs as they are; the shapes may differ by leading 1s.

    Raises ValueError where they do not fit.
    """
    wanted = [tuple(blob.shape) for blob in net.params[name]]
    shapes = [blob_shape(blob) for blob in blobs]
    for blob, shape in zip(blobs, shapes):
        numbers = len(blob.data) or len(blob.double_data)
        if math.prod(shape) != numbers:
            raise ValueError("%s: layer '%s': %d numbers do not fill the shape %s"
                             % (path, name, numbers, list(shape)))
    if [_plain_shape(shape) for shape in shapes] != [_plain_shape(shape) for shape in wanted]:
        raise ValueError("%s: layer '%s' has weights of shape %s, the net wants %s" % (
            path, name, _shapes(shapes), _shapes(wanted)))
    return all(shape == own or len(shape) == 4 and blob.HasField("num")
               for blob, shape, own in zip(blobs, shapes, wanted))


def _plain_shape(shape: Sequence[int]) -> Tuple[int, ...]:
    """Return a shape without leading ones: old files write every blob with four axes."""
    lengths = list(shape)
    while len(lengths) > 1 and lengths[0] == 1:
        del lengths[0]
    return tuple(lengths)


def _shapes(shapes: Sequence[Sequence[int]]) -> str:
    return " and ".join("x".join(str(length) for length in shape) or "1" for shape in shapes)


def _some(names: Any) -> str:
    """Return the first few of many names."""
    listed = list(names)
    return ", ".join(listed[:4]) + (", ..." if len(listed) > 4 else "")


# ---------------------------------------------------------------------------------------------
# A changed definition and its weights
# ---------------------------------------------------------------------------------------------

MARK = "# magic_init: for weights with SHA-256 "


def mark(weights: str) -> str:
    """Return the first line of a changed definition, which binds it to a file of weights."""
    return MARK + sha256(weights) + "\n"


def check_bound(prototxt: str, weights: str) -> None:
    """Raise ValueError where a changed definition lies beside weights that it is not for.

    A run that was killed between writing the two leaves such a pair.
    """
    if os.path.splitext(prototxt)[0] != os.path.splitext(weights)[0]:
        return
    first = read_text(prototxt).partition("\n")[0]
    if first.startswith(MARK) and first[len(MARK):].strip() != sha256(weights):
        raise ValueError("%s was written for other weights than %s: repeat the run that wrote them"
                         % (prototxt, weights))


def definition_beside(weights: str) -> Optional[str]:
    """Return the changed definition that was written with a file of weights, None without one."""
    prototxt = os.path.splitext(weights)[0] + ".prototxt"
    if not os.path.isfile(prototxt):
        return None
    first = read_text(prototxt).partition("\n")[0]
    return prototxt if first == MARK + sha256(weights) else None


def sha256(path: str) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for part in iter(lambda: file.read(1 << 20), b""):
            digest.update(part)
    return digest.hexdigest()
