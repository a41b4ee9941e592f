"""Give every channel of a layer the same mean and variance (paper, section 3.1, Algorithm 1)."""
import logging
from typing import Any, Callable, List, NamedTuple, Set, Tuple

import numpy as np

from ddinit import weights
from ddinit.between import last_batches
from ddinit.net import (
    AFFINE,
    Layer,
    WorkingNet,
    affine_view,
    geometry,
    is_affine,
    output_axis,
)
from ddinit.walk import BlobStore, Statistics, Stop, walk

log = logging.getLogger("magic_init")

# The walk stops at layers with weights, and at BatchNorm for its statistics.
STOPS = tuple(sorted(AFFINE)) + ("BatchNorm",)
# Unscaled Gaussian weights have this standard deviation, the paper's baseline (section 4.1).
UNSCALED_STD = 0.01
# A variance below this part of the layer's median variance counts as a constant channel,
CONSTANT = 1e-10
# and so does one below this part of the layer's mean squared mean: it is float32's rounding.
ROUNDING = 1e-12


class Plan(NamedTuple):
    """Which layers to initialize, with what weights, and whether to normalize them to what mean."""
    fresh: Set[str]
    kind: str
    within: bool
    beta: float


class Initialized(NamedTuple):
    """What was done to a layer, and how many channels are constant over all images."""
    name: str
    weights: str
    constant: int


def initialize_layers(working: WorkingNet, batches: Any, count: int, plan: Plan,
                      rng: np.random.Generator, limit_bytes: float,
                      step: Callable[[], Any]) -> Tuple[List[Initialized], float]:
    """Run Algorithm 1 on every layer of `plan.fresh` in one pass over `count` batches.

    `step` is called behind every layer.  Returns what was done to all affine layers, and how many
    bytes of blobs went through temporary files because `limit_bytes` was not enough.
    Raises ValueError naming a layer whose output is not finite.
    """
    store = BlobStore(limit_bytes)
    origin = ""
    done = []
    for stop in walk(working, store, count, STOPS, batches.load):  # for each affine layer k
        layer = stop.layer
        sharer = working.shared_with(layer) if is_affine(layer) else None
        fresh = layer.name in plan.fresh and sharer is None
        if stop.statistics is None:
            origin = "shares " + sharer if sharer else "loaded"
            if fresh:
                origin = set_parameters(stop, working, count, plan, rng)  # W_k ~ N(0, I), b_k = 0
            continue
        constant = 0                         # z_0 has passed through the first k layers
        if fresh and plan.within and is_affine(layer):
            constant = normalize(layer, stop.statistics, store, working, plan.beta)
        step()
        if is_affine(layer):
            _check_output(layer, stop.statistics, constant)
            done.append(Initialized(layer.name, origin, constant))
    return done, store.spooled_bytes


def normalize(layer: Layer, measured: Statistics, store: BlobStore, working: WorkingNet,
              beta: float) -> int:
    """Scale a layer that has just run so that its outputs have mean beta and variance 1.

    W(i, :) <- W(i, :) / sigma_i and b_i <- beta - mu_i / sigma_i.  The outputs in `store` follow:
    z = W x + b is affine, so they need no second pass.  Returns how many channels are constant.
    """
    rows = affine_view(layer, layer.weights, 1)
    outputs = rows.shape[0] * rows.shape[1]
    mean, variance = measured.mean, measured.variance       # compute mu_k(i) and sigma_k(i)^2
    axis = output_axis(layer, working.blob(layer.tops[0]).data.ndim)
    if axis != 1 or len(mean) != outputs:  # channels lie elsewhere: one scale for the whole layer
        overall = measured.overall()
        mean, variance = np.full(outputs, overall[0]), np.full(outputs, overall[1])
    factor, shift, constant = normalization(mean, variance, beta)
    rows *= factor.astype(np.float32).reshape(rows.shape[0], rows.shape[1], 1, 1)
    if layer.has_bias:                                      # b_k(i) <- beta - mu_k(i) / sigma_k(i)
        layer.blobs[1].data[...] = (layer.blobs[1].data * factor + shift).astype(np.float32)
    else:
        shift = np.zeros_like(shift)
    if len(factor) != len(measured.mean):
        factor, shift = (np.full(len(measured.mean), value[0]) for value in (factor, shift))
    for top in layer.tops:
        store.change(top, factor, shift)
    return int(constant.sum())


def normalization(mean: np.ndarray, variance: np.ndarray,
                  beta: float) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return factor 1 / sigma and shift beta - mu / sigma per channel, and which are constant.

    Algorithm 1: z * factor + shift has mean beta and variance 1 (channels,).  A constant channel,
    of (nearly) no variance, gets the median factor, so that it stays finite.
    """
    live = variance > max(CONSTANT * np.median(variance), ROUNDING * np.mean(mean ** 2))
    typical = np.median(variance[live]) if live.any() else 1.0
    factor = 1 / np.sqrt(np.where(live, variance, typical))
    return factor, beta - mean * factor, ~live


def set_parameters(stop: Stop, working: WorkingNet, count: int, plan: Plan,
                   rng: np.random.Generator) -> str:
    """Give a layer fresh weights of `plan.kind` and biases of 0; return what they are.

    Data-driven kinds apply to two-dimensional convolutions; all other layers are Gaussian, as in
    the paper, and Scale layers 1.  BatchNorm layers get the statistics of their input.
    """
    layer = stop.layer
    if layer.type == "BatchNorm":
        set_statistics(stop, working, count)
        return "measured"
    if layer.has_bias:
        layer.blobs[1].data[...] = 0 if plan.within else plan.beta
    if layer.type == "Scale":
        layer.weights[...] = 1
        return "ones"
    shape = geometry(layer)
    if plan.kind in weights.SCHEMES and shape is not None and len(shape.kernel) == 2:
        weights.set_filters(stop, working, shape, plan.kind, last_batches(count)[0] or 1, rng)
        return plan.kind
    weights.gaussian(layer.weights, rng, 1.0 if plan.within else UNSCALED_STD)
    if plan.kind in weights.SCHEMES and layer.type != "InnerProduct":
        return "gaussian (%s is for 2-D convolutions)" % plan.kind
    return "gaussian"


def set_statistics(stop: Stop, working: WorkingNet, count: int) -> None:
    """Give a BatchNorm layer mean and variance of its input over all images.

    Training will normalize by its batches' own, which come close to these.
    """
    bottom = working.blob(stop.layer.bottoms[0]).data
    measured = Statistics()
    for batch in range(count):
        stop.load(batch)
        measured.add(bottom)
    mean, variance, correction = stop.layer.blobs[:3]
    mean.data[...] = measured.mean
    variance.data[...] = measured.variance
    correction.data[...] = 1


def _check_output(layer: Layer, statistics: Statistics, constant: int) -> None:
    if not np.isfinite(statistics.overall()).all():
        raise ValueError("layer '%s': its output is not finite (NaN or infinity)" % layer.name)
    if constant:
        log.warning("layer '%s': %d channels are constant over all images; their scale is the "
                    "other channels'", layer.name, constant)
