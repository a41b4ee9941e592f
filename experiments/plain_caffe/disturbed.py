"""Make networks that resemble trained ones, with disturbed weights and statistics of images."""
from typing import Any, Callable, Sequence, Set

import numpy as np

from ddinit.prototxt import import_caffe
from plain_caffe.judge import AFFINE, RECURRENT, load_net

DISTURBANCE = 5  # weights of a network like a trained one are off by a factor up to this
IMAGES = 32  # that BatchNorm's statistics and the disturbed weights come from


def prepare(prototxt: str, paths: Sequence[str], seed: int, filled: str, legacy: str) -> bool:
    """Write two caffemodels: the network as its fillers make it, and one like a trained one.

    Weights that no filler sets are xavier.  BatchNorm has statistics of the images in both.
    """
    import_caffe().set_random_seed(seed)
    rng = np.random.default_rng(seed)
    net = load_net(prototxt, paths[:IMAGES])
    for layer in net.layers:
        if layer.type in AFFINE and not layer.blobs[0].data.any():
            bound = np.sqrt(3 / layer.blobs[0].data[0].size)
            layer.blobs[0].data[...] = rng.uniform(-bound, bound, layer.blobs[0].data.shape)
    forward_with_statistics(net)
    net.save(filled)
    disturbed: Set[int] = set()
    forward_with_statistics(net, lambda index: disturb(net, index, rng, disturbed))
    net.save(legacy)
    return True


def forward_with_statistics(net: Any, before: Callable[[int], None] = lambda index: None) -> None:
    """Run a network layer by layer, and give BatchNorm the mean and variance of its input.

    `before` is called with the index of each layer before it runs.
    """
    for index, layer in enumerate(net.layers):
        before(index)
        if layer.type == "BatchNorm":
            bottom = first_blob(net, net._bottom_ids(index))
            axes = tuple(axis for axis in range(bottom.ndim) if axis != 1)
            mean, variance, correction = layer.blobs
            mean.data[...] = bottom.mean(axes, dtype=np.float64)
            variance.data[...] = bottom.var(axes, dtype=np.float64)
            correction.data[...] = 1
        net._forward(index, index)


def disturb(net: Any, index: int, rng: np.random.Generator, disturbed: Set[int]) -> None:
    """Give a layer weights and biases as if training had changed its scale.

    The std of an affine layer's outputs becomes a factor f between 1/sqrt(5) and sqrt(5), drawn
    log-uniformly, so that weights between two of them are off by 1/5 to 5; its biases have a std
    of 0.3 f.  A recurrent layer, whose outputs are bounded, gets weights of std f / sqrt(fan-in).
    Shared weights, at addresses in `disturbed`, change once.
    """
    layer = net.layers[index]
    if layer.type not in AFFINE | RECURRENT:
        return
    weights = layer.blobs[0].data
    if weights.ctypes.data in disturbed:
        return
    disturbed.add(weights.ctypes.data)
    factor = DISTURBANCE ** rng.uniform(-0.5, 0.5)
    if layer.type in RECURRENT:
        for blob in layer.blobs:
            fan_in = blob.data[0].size if blob.data.ndim > 1 else 10
            blob.data[...] = factor * rng.standard_normal(blob.data.shape) / np.sqrt(fan_in)
        return
    if len(layer.blobs) > 1:
        layer.blobs[1].data[...] = 0
    bottom = first_blob(net, net._bottom_ids(index))
    inputs = np.array(bottom)
    net._forward(index, index)
    deviation = float(first_blob(net, net._top_ids(index)).std(dtype=np.float64))
    bottom[...] = inputs  # a Scale layer may work in place
    if not deviation > 0:
        raise ValueError("layer '%s': its outputs are constant" % net._layer_names[index])
    weights *= factor / deviation
    if len(layer.blobs) > 1:
        biases = layer.blobs[1].data
        biases[...] = factor * 0.3 * rng.standard_normal(biases.shape)


def first_blob(net: Any, numbers: Sequence[int]) -> np.ndarray:
    """Return the data of the first of a layer's bottoms or tops, given by their numbers."""
    data: np.ndarray = net.blobs[net._blob_names[numbers[0]]].data
    return data
