"""Between layers (paper, section 3.2): change rates, and scales that make them equal.

A backward pass under a random linear loss gives, for every affine layer and every block of its
inputs, the squared gradient and weight.  If blobs get scales that leave the net's function
unchanged (scales.py), a weight block times s_w / s_in has its gradient times s_in / s_w, so every
change rate after rescaling is known in closed form, and the log scales that make the logarithms of
all rates as equal as can be follow by least squares.  On a homogeneous chain this is the fixed
point of Algorithm 2, r_k = (C_k / C)^(1/2), reached at once.

    python magic_init.py models/caffenet_tiny/deploy.prototxt out.caffemodel -d 'photos/*' -cs
"""
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Set, Tuple

import numpy as np
import scipy.linalg
import scipy.optimize

import gradients
from caffe_net import WorkingNet, address, affine_view, sum_of_squares
from scales import AffineScales, Form, ScaleGraph, plus

# Layers' rates within this factor need no auxiliary Power layer.
GOAL = 1.2
# How much the blocks of one layer count against the means of layers in `solve`; measured in
# models/README.md.
BLOCK_WEIGHT = 0.1
# Random numbers that a measurement of change rates draws at least.
LOSSES = 8000


class ChangeRates:
    """Squared gradients and weights of all (layer, input block) pairs of a net.

    `layer` (pairs,) tells a pair's affine layer, `size` (pairs,) counts its weights, `weights`
    (pairs,) is their sum of squares; `gradients` and `fourths` (draws, pairs) are the moments of
    gradients.Moments, a row for each batch measured.
    """

    def __init__(self, layer: np.ndarray, size: np.ndarray, weights: np.ndarray,
                 gradients: np.ndarray, fourths: np.ndarray) -> None:
        self.layer = layer
        self.size = size
        self.weights = weights
        self.gradients = gradients
        self.fourths = fourths

    def rescaled(self, log_factors: np.ndarray) -> "ChangeRates":
        """Rates of the same images after weight blocks became W / exp(log_factors) (pairs,)."""
        factor = np.exp(2 * log_factors)
        return ChangeRates(self.layer, self.size, self.weights / factor, self.gradients * factor,
                           self.fourths * factor ** 2)

    def weighted(self, factors: np.ndarray) -> "ChangeRates":
        """Rates whose squared gradients count `factors` (layers,) times."""
        factor = factors[self.layer]
        return ChangeRates(self.layer, self.size, self.weights, self.gradients * factor,
                           self.fourths * factor ** 2)

    def joined(self, other: "ChangeRates") -> "ChangeRates":
        """These rates with the draws of `other`, measured at the same scales."""
        return ChangeRates(self.layer, self.size, self.weights,
                           np.concatenate([self.gradients, other.gradients]),
                           np.concatenate([self.fourths, other.fourths]))

    def by_layer(self) -> np.ndarray:
        """Return C_k = sqrt(E[g^2] / mean(W_k^2)) (layers,), equation 2; NaN without weights."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.sqrt(self._sum(self.gradients.mean(axis=0)) / self._sum(self.weights))

    def by_pair(self) -> np.ndarray:
        """Return the same for each pair by itself (pairs,)."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.sqrt(self.gradients.mean(axis=0) / self.weights)

    def variation(self) -> np.ndarray:
        """Return the coefficient of variation of C_kij^2 over a layer's weights (layers,).

        Equation 2 and figure 1b: std over mean, from the fourth moments of each draw.
        """
        size = self._sum(self.size.astype(np.float64))
        fourth = np.array([self._sum(draw) for draw in self.fourths]) / size
        second = np.array([self._sum(draw) for draw in self.gradients]) / size
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = fourth.sum(axis=0) / (second ** 2).sum(axis=0)
        return np.sqrt(np.maximum(ratio - 1, 0))

    def uncertainty(self) -> float:
        """Return the largest standard error of the layers' log rates over draws.

        A factor common to all layers does not count; infinite for a single draw.
        """
        draws = len(self.gradients)
        if draws < 2:
            return np.inf
        with np.errstate(divide="ignore"):
            logs = np.log([self._sum(draw) for draw in self.gradients]) / 2
        logs = logs[:, np.isfinite(logs).all(axis=0)]
        if not logs.size:
            return 0.0
        logs -= logs.mean(axis=1, keepdims=True)
        return float(logs.std(axis=0, ddof=1).max() / np.sqrt(draws))

    def _sum(self, values: np.ndarray) -> np.ndarray:
        return np.bincount(self.layer, values)


def spread(rates: np.ndarray) -> float:
    """Return max / min of the rates that are positive and finite, 1 where there are none."""
    live = rates[np.isfinite(rates) & (rates > 0)]
    return float(live.max() / live.min()) if len(live) else 1.0


def owners(affine: Sequence[AffineScales]) -> List[AffineScales]:
    """Return the affine layers that hold weights of their own: the first of those that share."""
    first: Dict[int, AffineScales] = {}
    for scaled in affine:
        first.setdefault(address(scaled.layer.blobs[0]), scaled)
    return list(first.values())


# ---------------------------------------------------------------------------------------------
# Measuring (equations 1 and 2)
# ---------------------------------------------------------------------------------------------

def measure(graph: ScaleGraph, rng: np.random.Generator) -> ChangeRates:
    """Run a backward pass from what the net's blobs hold and return the change rates, one draw.

    Every image gets its own random loss eta ~ N(0, I) at every output.  Where outputs are few, the
    mean over several passes is taken, until LOSSES random numbers were drawn.
    """
    working = graph.working
    size = sum(working.blob(name).data.size for name in working.outputs)
    passes = -(-LOSSES // size)
    second, fourth = sum(_one_pass(graph, rng) for _ in range(passes)) / passes
    pairs = [(number, affine_view(scaled.layer, scaled.layer.weights, scaled.in_channels)[
        block.groups, :, block.inputs]) for number, scaled in enumerate(owners(graph.affine))
        for block in scaled.blocks]
    return ChangeRates(np.array([number for number, _ in pairs]),
                       np.array([part.size for _, part in pairs]),
                       np.array([sum_of_squares(part) for _, part in pairs]),
                       second[None], fourth[None])


def _one_pass(graph: ScaleGraph, rng: np.random.Generator) -> np.ndarray:
    """Second and fourth moments (2, pairs) of the weight gradients of one backward pass."""
    working = graph.working
    for name in working.outputs:
        diff = working.blob(name).diff
        diff[...] = rng.standard_normal(diff.shape, dtype=np.float32)
    for scaled in graph.affine:
        if not gradients.per_image(scaled.layer.parameters):
            scaled.layer.blobs[0].diff[...] = 0  # Caffe adds to what is there
    working.net._backward(len(working.layers) - 1, 0)
    found = [gradients.moments(scaled, working) for scaled in owners(graph.affine)]
    return np.array([np.concatenate([one.second for one in found]),
                     np.concatenate([one.fourth for one in found])])


# ---------------------------------------------------------------------------------------------
# Solving
# ---------------------------------------------------------------------------------------------

class Solution(NamedTuple):
    """Log scales (variables,), and the affine layers that need an auxiliary Power layer."""
    log_scales: np.ndarray
    auxiliary: List[str]


def value(form: Form, log_scales: np.ndarray) -> float:
    """Return the log scale that a form stands for."""
    return float(sum(factor * log_scales[variable] for variable, factor in form.items()))


def log_factors(graph: ScaleGraph, log_scales: np.ndarray) -> np.ndarray:
    """Return log(s_in / s_w) of every pair (pairs,), as `ChangeRates.rescaled` takes it."""
    return _differences(graph) @ log_scales


def solve(graph: ScaleGraph, rates: ChangeRates, may_divide: Set[str]) -> Solution:
    """Return the log scales that make the change rates most equal and keep the function.

    Minimises the variance of log C_k over layers, plus BLOCK_WEIGHT times that of log C_kj over
    each layer's blocks weighted by their weights.  While layers' rates are not within GOAL,
    another layer of `may_divide` gets an auxiliary Power layer behind it (section 3.2), the one
    that helps most.
    """
    problem = _Problem(graph, rates)
    auxiliary: List[str] = []
    log_scales = problem.minimise(auxiliary)
    while problem.spread(log_scales) > GOAL:
        tried = [(problem.cost(one), name, one) for name in sorted(may_divide - set(auxiliary))
                 for one in [problem.minimise(auxiliary + [name])]]
        best = min(tried, key=lambda row: row[:2], default=None)
        if best is None or best[0] > 0.99 * problem.cost(log_scales):
            break
        auxiliary.append(best[1])
        log_scales = best[2]
    return Solution(problem.refined(log_scales, auxiliary), auxiliary)


class ResponseGain:
    """How the LRN layers of a net damp blobs that get scales, from what the net's blobs hold.

    An LRN layer divides by (k + alpha m)^beta, m the mean of x^2 over its neighbouring channels,
    so blobs times s come out times s ((k + alpha m) / (k + alpha s^2 m))^beta.
    """

    def __init__(self, working: WorkingNet) -> None:
        self._bottoms: Dict[str, str] = {}
        self._gains: Dict[str, Callable[[float], float]] = {}
        for layer in working.layers:
            if layer.type == "LRN":
                blob = working.blob(layer.bottoms[0]).data
                energy = np.square(blob).mean(axis=1, dtype=np.float64)
                self._bottoms[layer.name] = layer.bottoms[0]
                self._gains[layer.name] = _log_gain(layer.parameters.lrn_param, energy)

    def degrees(self, graph: Optional[ScaleGraph] = None,
                log_scales: Optional[np.ndarray] = None) -> Dict[str, float]:
        """Return d of each layer: where its bottom's scale is s, its top's is about s^d."""
        if graph is None or log_scales is None:
            return {name: gain(0.1) / 0.1 for name, gain in self._gains.items()}
        logs = {name: value(graph.blobs[bottom][0][1], log_scales)
                for name, bottom in self._bottoms.items()}
        logs = {name: one if abs(one) > 0.1 else 0.1 for name, one in logs.items()}
        return {name: self._gains[name](one) / one for name, one in logs.items()}


def _log_gain(parameters: Any, energy: np.ndarray) -> Callable[[float], float]:
    def log_gain(log_scale: float) -> float:
        grown = parameters.k + parameters.alpha * energy * np.exp(2 * log_scale)
        damping = np.log(grown / (parameters.k + parameters.alpha * energy))
        return log_scale - parameters.beta * float(damping.mean())
    return log_gain


def solve_from_scratch(working: WorkingNet, rates: ChangeRates) -> Tuple[ScaleGraph, np.ndarray]:
    """Return the log scales that make the rates most equal in a net whose LRN layers stay.

    Their degree depends on the scales: it is found in turns with these, for the graph returned.
    """
    gain = ResponseGain(working)
    degrees = gain.degrees()
    graph = ScaleGraph(working, degrees)
    log_scales = solve(graph, rates, set()).log_scales
    while degrees:
        before, degrees = degrees, gain.degrees(graph, log_scales)
        graph = ScaleGraph(working, degrees)
        log_scales = solve(graph, rates, set()).log_scales
        if max(abs(degrees[name] - before[name]) for name in degrees) < 1e-3:
            break
    return graph, log_scales


class _Problem:
    """Least squares in the free log scales x: log C_kj = log C_kj(0) + 2 (D x)_kj - level."""

    def __init__(self, graph: ScaleGraph, rates: ChangeRates) -> None:
        self.graph = graph
        self.rates = rates
        self.differences = _differences(graph)
        by_pair = rates.by_pair()
        self.live = np.isfinite(by_pair) & (by_pair > 0)
        self.logs = np.log(np.where(self.live, by_pair, 1.0))
        share = rates.size / np.bincount(rates.layer, rates.size)[rates.layer]
        self.root = np.sqrt(np.where(self.live, share, 0.0))

    def minimise(self, auxiliary: Sequence[str]) -> np.ndarray:
        """The minimum over pairs, each layer's sharing its weight 1: linear least squares."""
        basis = self._free_directions(auxiliary)
        matrix = np.column_stack([2 * self.differences @ basis, -np.ones(len(self.logs))])
        if not len(self.logs) or not basis.shape[1]:
            return np.zeros(self.graph.variables)
        found = np.linalg.lstsq(matrix * self.root[:, None], -self.logs * self.root, rcond=1e-10)[0]
        return basis @ found[:-1]

    def refined(self, log_scales: np.ndarray, auxiliary: Sequence[str]) -> np.ndarray:
        """The minimum over layers' means, from the minimum over pairs."""
        basis = self._free_directions(auxiliary)
        if not basis.shape[1] or not self.live.any():
            return log_scales
        start = basis.T @ log_scales
        found = scipy.optimize.least_squares(
            lambda free: self._residuals(basis @ free), start, x_scale=1.0, max_nfev=50)
        return basis @ found.x

    def cost(self, log_scales: np.ndarray) -> float:
        return float((self._residuals(log_scales) ** 2).sum())

    def spread(self, log_scales: np.ndarray) -> float:
        return spread(self.rates.rescaled(self.differences @ log_scales).by_layer())

    def _residuals(self, log_scales: np.ndarray) -> np.ndarray:
        moved = self.differences @ log_scales
        by_layer = self.rates.rescaled(moved).by_layer()
        live = np.isfinite(by_layer) & (by_layer > 0)
        layers = np.log(np.where(live, by_layer, 1.0))
        level = layers[live].mean() if live.any() else 0.0
        pairs = self.logs + 2 * moved - layers[self.rates.layer]
        return np.concatenate([np.where(live, layers - level, 0.0),
                               np.sqrt(BLOCK_WEIGHT) * self.root * pairs])

    def _free_directions(self, auxiliary: Sequence[str]) -> np.ndarray:
        """An orthonormal basis (variables, free) of log scales that keep the function."""
        equations = list(self.graph.equations)
        for scaled in self.graph.affine:
            if scaled.layer.name not in auxiliary:
                equations.append(plus(scaled.weight_scale, scaled.scale_out, -1.0))
        matrix = np.zeros((len(equations), self.graph.variables))
        for row, form in zip(matrix, equations):
            for variable, factor in form.items():
                row[variable] = factor
        return scipy.linalg.null_space(matrix, rcond=1e-10)


def _differences(graph: ScaleGraph) -> np.ndarray:
    """The matrix (pairs, variables) of log(s_in / s_w) in the free log scales."""
    rows = []
    for scaled in owners(graph.affine):
        for block in scaled.blocks:
            row = np.zeros(graph.variables)
            for variable, factor in plus(block.scale_in, scaled.weight_scale, -1.0).items():
                row[variable] = factor
            rows.append(row)
    return np.array(rows)


# ---------------------------------------------------------------------------------------------
# Applying
# ---------------------------------------------------------------------------------------------

def apply_to_weights(graph: ScaleGraph, log_scales: np.ndarray) -> None:
    """Rescale a net's parameters in place: W s_w / s_in, b s_w, statistics of BatchNorm, Bias.

    Raises ValueError where a scale is beyond what float32 holds.
    """
    if not np.all(np.abs(log_scales) < 80):
        raise ValueError("the change rates differ by more than float32 weights can make up for")
    done: Set[int] = set()  # layers may share weights, biases or both
    for scaled in graph.affine:
        layer = scaled.layer
        weights = affine_view(layer, layer.weights, scaled.in_channels)
        for block in scaled.blocks if address(layer.blobs[0]) not in done else []:
            change = plus(scaled.weight_scale, block.scale_in, -1.0)
            weights[block.groups, :, block.inputs] *= np.float32(np.exp(value(change, log_scales)))
        if layer.has_bias and address(layer.blobs[1]) not in done:
            layer.blobs[1].data[...] *= np.float32(np.exp(value(scaled.weight_scale, log_scales)))
        done.update(address(blob) for blob in layer.blobs)
    for layer in graph.working.layers:
        if layer.name in graph.adjusted and done.isdisjoint(address(one) for one in layer.blobs):
            scale = np.exp(value(graph.adjusted[layer.name], log_scales))
            if layer.type == "BatchNorm":
                layer.blobs[0].data[...] *= np.float32(scale)
                layer.blobs[1].data[...] *= np.float32(scale ** 2)
            elif layer.type in ("Bias", "Scale"):
                layer.blobs[0].data[...] *= np.float32(scale)
            done.update(address(blob) for blob in layer.blobs)


def apply_to_definition(definition: Any, graph: ScaleGraph, solution: Solution) -> List[str]:
    """Change a definition so that it computes with the rescaled weights what it did before.

    Returns what was changed and why, a line each; none where the definition may stay as it is.
    """
    changes = []
    log_scales = solution.log_scales
    for layer in definition.layer:
        form = graph.adjusted.get(layer.name)
        scale = np.exp(value(form, log_scales)) if form is not None else 1.0
        if abs(scale - 1) < 1e-6:
            continue
        if layer.type == "LRN":
            old = layer.lrn_param.alpha
            layer.lrn_param.alpha = old / scale ** 2
            changes.append("layer '%s': LRN alpha %.6g -> %.6g, its input is %.6g times what it was"
                           % (layer.name, old, layer.lrn_param.alpha, scale))
        elif layer.type == "BatchNorm":
            old = layer.batch_norm_param.eps
            layer.batch_norm_param.eps = old * scale ** 2
            changes.append("layer '%s': BatchNorm eps %.6g -> %.6g, its input is %.6g times what it"
                           " was" % (layer.name, old, layer.batch_norm_param.eps, scale))
    for scaled in graph.affine:
        if scaled.layer.name in solution.auxiliary:
            scale = np.exp(value(plus(scaled.scale_out, scaled.weight_scale, -1.0), log_scales))
            changes += _add_power(definition, scaled.layer.name, float(scale))
    return changes


def _add_power(definition: Any, name: str, scale: float) -> List[str]:
    """Put a Power layer behind the layer `name`; its tops keep their names above it."""
    layers = list(definition.layer)
    position = next(number for number, layer in enumerate(layers) if layer.name == name)
    powers = []
    for number, top in enumerate(layers[position].top):
        suffix = "_%d" % number if number else ""
        power = type(layers[position])(name=name + "_rescale" + suffix, type="Power",
                                       bottom=[top + "_unscaled"], top=[top])
        power.power_param.scale = scale
        layers[position].top[number] = top + "_unscaled"
        powers.append(power)
    changed = layers[:position + 1] + powers + layers[position + 1:]
    copies = [type(layer).FromString(layer.SerializeToString()) for layer in changed]
    definition.ClearField("layer")
    definition.layer.extend(copies)
    return ["layer '%s': new Power layer '%s' behind it multiplies by %.6g, so that its weights "
            "can have the scale that gives them their rate" % (name, power.name, scale)
            for power in powers]


def dividable(graph: ScaleGraph, outputs_too: bool) -> Set[str]:
    """Return the affine layers behind which a Power layer may stand.

    With `outputs_too` all; else those whose top a layer that is not homogeneous keeps at scale 1.
    """
    return {scaled.layer.name for scaled in graph.affine
            if outputs_too or _kept_by_layer(graph, scaled)}


def _kept_by_layer(graph: ScaleGraph, scaled: AffineScales) -> bool:
    return any(graph.pinned_by.get(variable, "the output").startswith("layer")
               for variable in scaled.scale_out)


def worst_difference(expected: Dict[str, np.ndarray], found: Dict[str, np.ndarray]) -> float:
    """Return the largest difference of output blobs, each over the std of the expected one."""
    worst = 0.0
    for name, blob in expected.items():
        difference = float(np.abs(found[name] - blob).max())
        std = float(blob.std())
        relative = difference / std if std > 0 else (0.0 if difference == 0 else np.inf)
        worst = relative if not relative <= worst else worst
    return worst
