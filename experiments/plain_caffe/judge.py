"""Judge weights with plain Caffe: change rates, outputs and the time of a forward pass.

It shares no measuring code with ddinit, so that it finds what ddinit would measure wrongly. All
functions but `spread_of` use Caffe, so that they run in a child process.
"""
import tempfile
import time
from typing import Any, Dict, Iterable, List, Optional, Sequence, Tuple

import cv2
import numpy as np
from google.protobuf import text_format

from ddinit.prototxt import import_caffe, read_definition

MEAN = (104.0, 117.0, 123.0)  # the command's default, in BGR
AFFINE = {"Convolution", "Deconvolution", "InnerProduct", "Scale"}
RECURRENT = {"LSTM", "RNN"}
BATCH, CLIP = 4, 15  # images in a batch, and frames where a recurrent layer joins them
CERTAIN = 0.015  # the part of the spread that the error of log rates has to fall below
ROUNDS = 16  # the most passes over all images
TINY = 1e-300


def load_images(paths: Sequence[str], channels: int, height: int, width: int) -> np.ndarray:
    """Return images (n, channels, height, width) less their mean color, as the command does.

    The interpolation matters: images without the aliasing of OpenCV's default change the rates of
    first layers by 30 percent.
    """
    grey = channels == 1
    mean = np.dot(MEAN, (0.114, 0.587, 0.299)) if grey else MEAN
    images = np.empty((len(paths), height, width, channels), np.float32)
    for image, path in zip(images, paths):
        pixels = cv2.imread(path, cv2.IMREAD_GRAYSCALE if grey else cv2.IMREAD_COLOR)
        if pixels is None:
            raise ValueError("%s: not an image that OpenCV can read" % path)
        image[...] = cv2.resize(pixels, (width, height)).reshape(image.shape) - mean
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2))


def load_net(prototxt: str, paths: Sequence[str], weights: Optional[str] = None,
             backward: bool = False) -> Any:
    """Return a caffe.Net in TEST phase that holds one batch of images.

    The batch size is set in the definition: LSTM layers cannot change it later.  With `backward`
    the network computes the gradients of all weights, and its outputs are what its last Softmax
    layers would read.
    """
    caffe = import_caffe()
    definition = read_definition(prototxt)
    if backward:
        prepare_backward(definition)
    inputs = [layer for layer in definition.layer if layer.type == "Input"]
    if len(inputs) != 1 or len(inputs[0].top) != 1:
        raise ValueError("%s: this table needs a definition with one Input layer" % prototxt)
    shape = inputs[0].input_param.shape[0]
    shape.dim[0] = len(paths)
    with tempfile.NamedTemporaryFile("w", suffix=".prototxt") as file:
        file.write(text_format.MessageToString(definition))
        file.flush()
        net = caffe.Net(file.name, caffe.TEST)
    if weights is not None:
        net.copy_from(weights)
    net.blobs[inputs[0].top[0]].data[...] = load_images(paths, *shape.dim[1:])
    return net


def prepare_backward(definition: Any) -> None:
    """Let Caffe compute all gradients of a definition, from the inputs of its last softmaxes."""
    read = {blob for layer in definition.layer for blob in layer.bottom}
    kept = [layer for layer in definition.layer
            if layer.type != "Softmax" or layer.top[0] in read]
    copies = [type(layer).FromString(layer.SerializeToString()) for layer in kept]
    for layer in copies:
        for parameter in layer.param:
            parameter.lr_mult = 1
    definition.ClearField("layer")
    definition.layer.extend(copies)
    definition.force_backward = True


def spread_of(rates: Dict[str, float]) -> float:
    """Return the largest change rate over the smallest."""
    return max(rates.values()) / max(min(rates.values()), TINY)


def change_rates(prototxt: str, weights: str,
                 paths: Sequence[str]) -> Tuple[Dict[str, float], float]:
    """Return the change rate of each affine layer on images, and the rates' uncertainty.

    Equation 2: C_k = sqrt(E[g^2] / mean(W_k^2)), with each image's eta ~ N(0, 1) as the
    gradient of the outputs (section 3.2).  The expected square of a batch's gradient is the sum
    of its images' squares; small batches leave less noise from products of different images.
    Rounds end when the largest standard error of a layer's log rate, relative to the other
    layers', is below `CERTAIN` times the spread.
    """
    recurrent = any(layer.type in RECURRENT for layer in read_definition(prototxt).layer)
    size = min(CLIP if recurrent else BATCH, len(paths))
    net = load_net(prototxt, paths[:size], weights, backward=True)
    images = net.blobs[net.inputs[0]].data
    batches = load_images(paths[:len(paths) // size * size], *images.shape[1:])
    rng = np.random.default_rng(0)
    blobs: Dict[str, Any] = {}
    for name, layer in zip(net._layer_names, net.layers):
        known = {blob.data.ctypes.data for blob in blobs.values()}
        if layer.type in AFFINE and len(layer.blobs) \
                and layer.blobs[0].data.ctypes.data not in known:
            blobs[name] = layer.blobs[0]
    norms = np.array([_mean_square(blob.data) for blob in blobs.values()])
    squares: List[np.ndarray] = []
    uncertainty, spread = np.inf, 1.0
    while len(squares) < ROUNDS and uncertainty > CERTAIN * spread:
        squares.append(np.zeros(len(blobs)))
        for batch in batches.reshape(-1, *images.shape):
            images[...] = batch
            squares[-1] += _squared_gradients(net, blobs.values(), rng) / norms
        if len(squares) >= 4:
            uncertainty = _uncertainty(np.array(squares))
            means = np.mean(squares, axis=0)
            spread = np.sqrt(means.max() / max(means.min(), TINY))
    return dict(zip(blobs, np.sqrt(np.mean(squares, axis=0)).tolist())), uncertainty


def _squared_gradients(net: Any, blobs: Iterable[Any], rng: np.random.Generator) -> np.ndarray:
    """Return mean squares of weights' gradients in one pass with random gradients of outputs."""
    for layer in net.layers:
        for blob in layer.blobs:
            blob.diff[...] = 0
    net.forward()
    for name in net.outputs:
        net.blobs[name].diff[...] = rng.standard_normal(net.blobs[name].data.shape)
    net.backward()
    return np.array([_mean_square(blob.diff) for blob in blobs])


def _uncertainty(squares: np.ndarray) -> float:
    """Return the largest standard error of the layers' log rates, from squares (passes, layers)."""
    relative = squares / np.maximum(squares.mean(axis=0), TINY)
    relative -= relative.mean(axis=1, keepdims=True)
    return float(0.5 * relative.std(axis=0, ddof=1).max() / np.sqrt(len(squares)))


def _mean_square(array: np.ndarray) -> float:
    return float(np.mean(np.square(array, dtype=np.float64)))


def forward_seconds(prototxt: str, paths: Sequence[str], batch_size: int, batches: int,
                    weights: Optional[str] = None) -> float:
    """Return F, the seconds of a forward pass of `batches` batches, once warm."""
    size = min(batch_size, len(paths))
    net = load_net(prototxt, paths[:size], weights)
    net.forward()
    started = time.perf_counter()
    for _ in range(min(batches, len(paths) // size)):
        net.forward()
    return time.perf_counter() - started


def output_difference(before: Sequence[str], after: Sequence[str], paths: Sequence[str]) -> float:
    """Return the largest difference of two networks' outputs over the std of the first's.

    Networks are pairs of a prototxt and a caffemodel; the largest over all outputs counts.
    """
    old, new = (load_net(prototxt, paths, weights) for prototxt, weights in (before, after))
    old.forward()
    new.forward()
    differences = []
    for name in old.outputs:
        if name not in new.blobs:
            raise ValueError("the changed definition has no output '%s'" % name)
        expected = np.array(old.blobs[name].data, np.float64)
        differences.append(np.abs(new.blobs[name].data - expected).max() / expected.std())
    return float(max(differences))
