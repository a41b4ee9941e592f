"""Data-dependent initialization of Caffe networks (Kraehenbuehl, Doersch, Donahue & Darrell 2016).

Sets a net's weights from a few dozen unlabelled images so that every layer trains at the same
rate: weights from data (section 3.3), outputs of every channel with mean beta and variance 1
(section 3.1, Algorithm 1), change rates equal across layers (section 3.2, Algorithm 2).

    python magic_init.py models/caffenet/deploy.prototxt caffenet.caffemodel \\
        --data 'photos/*.jpg' --type kmeans --calibrate --figure caffenet.png
"""
import argparse
import json
import logging
import os
import sys
import time
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Set, Tuple

import numpy as np
from tqdm import tqdm

import caffe_net
import definitions
import guarded
import rate_figure
import rescale
import results
import weights
from caffe_net import BlobStore, Layer, Statistics, Stop, WorkingNet

log = logging.getLogger("magic_init")

TYPES = ("gaussian", "elwise", "pca", "zca", "kmeans", "rand")
# Layers that the walk stops at: those with weights, and BatchNorm for its statistics.
STOPS = tuple(sorted(caffe_net.AFFINE)) + ("BatchNorm",)
# Unscaled Gaussian weights, the paper's baseline (section 4.1).
UNSCALED_STD = 0.01
# Variance below this part of the layer's median variance counts as a constant channel.
CONSTANT = 1e-10
# Rates within this factor of each other are equal; measuring again would not tell.
EQUAL = 1.05
# A rescaled net's outputs may differ by this part of their std.
TOLERANCE = 1e-3
PATCH_BYTES = 1 << 29


class LayerRecord(NamedTuple):
    """What was done to one layer, and its output over all images (of the written net)."""
    name: str
    type: str
    weights: str
    count: int
    mean: float
    std: float
    dead: int


# ---------------------------------------------------------------------------------------------
# Weights (section 3.3)
# ---------------------------------------------------------------------------------------------

def set_weights(stop: Stop, working: WorkingNet, batches: int, kind: str, within: bool,
                rng: np.random.Generator) -> str:
    """Give a layer fresh weights of a kind in TYPES and biases of 0; return what they are.

    Data-driven kinds apply to two-dimensional convolutions; all other layers are Gaussian, as in
    the paper, and Scale layers 1.
    """
    layer = stop.layer
    if layer.has_bias:
        layer.blobs[1].data[...] = 0
    if layer.type == "Scale":
        layer.weights[...] = 1
        return "ones"
    gaussian = kind in ("gaussian", "elwise")
    geometry = caffe_net.geometry(layer)
    if gaussian or geometry is None:
        weights.gaussian_into(layer.weights, rng, 1.0 if within else UNSCALED_STD)
        if gaussian or layer.type == "InnerProduct":
            return "gaussian"
        return "gaussian (%s is for 2-D convolutions)" % kind
    groups = layer.parameters.convolution_param.group
    filters = layer.weights.reshape((groups, -1) + layer.weights.shape[1:])
    patches = _patches(stop, working, batches, geometry, groups, rng)
    for group in range(groups):
        rows = next(patches)
        found = weights.SCHEMES[kind](rows, filters.shape[1], rng)
        filters[group] = found.reshape(filters[group].shape)
    return kind


def _patches(stop: Stop, working: WorkingNet, batches: int, geometry: caffe_net.Geometry,
             groups: int, rng: np.random.Generator) -> Any:
    """Yield the patches (n, d) that each group of a convolution's filters sees."""
    bottom = working.blob(stop.layer.bottoms[0]).data
    depth = bottom.shape[1] // groups
    dimension = depth * int(np.prod(geometry.kernel))
    count = min(weights.PATCHES_PER_DIMENSION * dimension, PATCH_BYTES // (4 * dimension))
    count = max(count, 2 * stop.layer.weights.shape[0] // groups, 1000)
    for group in range(groups):
        parts = []
        for batch in range(batches):
            stop.load(batch)
            share = count * (batch + 1) // batches - count * batch // batches
            parts.append(weights.sample_patches(bottom[:, group * depth:(group + 1) * depth], share,
                                                rng, *geometry))
        yield np.concatenate(parts).reshape(count, dimension)


# ---------------------------------------------------------------------------------------------
# Within layers (section 3.1, Algorithm 1)
# ---------------------------------------------------------------------------------------------

def normalisation(mean: np.ndarray, variance: np.ndarray,
                  beta: float) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return factor 1 / sigma and shift beta - mu / sigma per channel, and which are constant.

    Algorithm 1: z * factor + shift has mean beta and variance 1 (channels,).  A constant channel,
    of (nearly) no variance, gets the median factor, so that it stays finite.
    """
    live = variance > CONSTANT * np.median(variance)
    typical = np.median(variance[live]) if live.any() else 1.0
    factor = 1 / np.sqrt(np.where(live, variance, typical))
    return factor, beta - mean * factor, ~live


def normalise(stop: Stop, store: BlobStore, working: WorkingNet,
              beta: float) -> Tuple[Statistics, int]:
    """Scale a layer that has just run so that its outputs have mean beta and variance 1.

    W(i, :) <- W(i, :) / sigma_i and b_i <- beta - mu_i / sigma_i.  The outputs in `store` follow:
    z = W x + b is affine, so they need no second pass.  Returns the statistics after it and how
    many channels are constant.
    """
    layer, measured = stop.layer, stop.statistics
    assert measured is not None
    rows = caffe_net.affine_view(layer, layer.weights, 1)
    outputs = rows.shape[0] * rows.shape[1]
    mean, variance = measured.mean, measured.variance
    axis = caffe_net.output_axis(layer, working.blob(layer.tops[0]).data.ndim)
    if axis != 1 or len(mean) != outputs:  # channels lie elsewhere: one scale for the whole layer
        overall = measured.overall()
        mean, variance = np.full(outputs, overall[0]), np.full(outputs, overall[1])
    factor, shift, constant = normalisation(mean, variance, beta)
    rows *= factor.astype(np.float32).reshape(rows.shape[0], rows.shape[1], 1, 1)
    if layer.has_bias:
        layer.blobs[1].data[...] = (layer.blobs[1].data * factor + shift).astype(np.float32)
    else:
        shift = np.zeros_like(shift)
    if len(factor) != len(measured.mean):
        factor, shift = (np.full(len(measured.mean), value[0]) for value in (factor, shift))
    for top in layer.tops:
        store.change(top, factor, shift)
    return measured.changed(factor, shift), int(constant.sum())


def set_statistics(stop: Stop, working: WorkingNet, batches: int) -> None:
    """Give a BatchNorm layer mean and variance of its input over all images.

    Training will normalise by its batches' own, which come close to these.
    """
    bottom = working.blob(stop.layer.bottoms[0]).data
    measured = Statistics()
    for batch in range(batches):
        stop.load(batch)
        measured.add(bottom)
    mean, variance, correction = stop.layer.blobs[:3]
    mean.data[...] = measured.mean
    variance.data[...] = measured.variance
    correction.data[...] = 1


class Plan(NamedTuple):
    """What `initialise` is asked for: layers to set, kind of weights, within-layer scaling."""
    fresh: Set[str]
    kind: str
    within: bool
    beta: float
    batches: int


def initialise(working: WorkingNet, plan: Plan, store: BlobStore, feed: Callable[[int], None],
               rng: np.random.Generator, step: Callable[[], Any]) -> List[LayerRecord]:
    """Algorithm 1 on every layer of `plan.fresh`, in one pass; return what was done to all.

    Other layers only have their outputs measured.  `step` is called behind every layer.
    """
    done: Dict[str, str] = {}
    records = []
    for stop in caffe_net.walk(working, store, plan.batches, STOPS, feed):
        layer = stop.layer
        fresh = layer.name in plan.fresh
        sharer = working.shared_with(layer)
        if stop.statistics is None:
            done[layer.name] = "shares " + sharer if sharer else "loaded"
            if fresh and not sharer:
                done[layer.name] = _set_parameters(stop, working, plan, rng)
            continue
        statistics, dead = stop.statistics, 0
        if fresh and not sharer and plan.within and caffe_net.is_affine(layer):
            statistics, dead = normalise(stop, store, working, plan.beta)
        step()
        if not caffe_net.is_affine(layer):
            continue
        mean, variance = statistics.overall()
        records.append(LayerRecord(layer.name, layer.type, done[layer.name], layer.weights.size,
                                   mean, float(np.sqrt(variance)), dead))
        _check_output(records[-1])
    return records


def _set_parameters(stop: Stop, working: WorkingNet, plan: Plan,
                    rng: np.random.Generator) -> str:
    if stop.layer.type == "BatchNorm":
        set_statistics(stop, working, plan.batches)
        return "measured"
    made = set_weights(stop, working, plan.batches, plan.kind, plan.within, rng)
    if not plan.within and stop.layer.has_bias:
        stop.layer.blobs[1].data[...] = plan.beta
    return made


def _check_output(record: LayerRecord) -> None:
    if not (np.isfinite(record.mean) and np.isfinite(record.std)):
        raise ValueError("layer '%s': its output is not finite (NaN or infinity)" % record.name)
    if record.dead:
        log.warning("layer '%s': %d channels are constant over all images; their scale is the "
                    "other channels'", record.name, record.dead)


# ---------------------------------------------------------------------------------------------
# Between layers (section 3.2, Algorithm 2)
# ---------------------------------------------------------------------------------------------

class Calibration(NamedTuple):
    """Change rates before and after, the log scales that made the difference, and rounds."""
    before: rescale.ChangeRates
    after: rescale.ChangeRates
    solution: rescale.Solution
    rounds: int


def calibrate(graph: Any, forward: Callable[[], None], alpha: float, iterations: int,
              rng: np.random.Generator, step: Callable[[], Any]) -> Calibration:
    """Algorithm 2 on a net that starts from scratch: measure, rescale by alpha, measure again.

    The net holds one batch already; `forward` runs the next.  What earlier rounds measured counts
    in later ones, in closed form.  Ends when all layers' rates are within EQUAL or no closer.
    """
    may_divide = rescale.dividable(graph, outputs_too=False)
    before = measured = rescale.measure(graph, rng)
    total = np.zeros(graph.variables)
    solution = rescale.Solution(total, [])
    after, rounds = before, 0
    while rounds < iterations and (rounds == 0 or rescale.spread(after.by_layer()) > EQUAL):
        solution = rescale.solve(graph, measured, may_divide)
        scales = alpha * solution.log_scales
        rescale.apply_to_weights(graph, scales)
        total = total + scales
        step()
        forward()
        last, after = after, rescale.measure(graph, rng)
        measured = measured.rescaled(rescale.log_factors(graph, scales)).joined(after)
        rounds += 1
        if alpha == 1 and rounds > 1 and (rescale.spread(after.by_layer())
                                          >= rescale.spread(last.by_layer())):
            break
    return Calibration(before, after, solution._replace(log_scales=total), rounds)
