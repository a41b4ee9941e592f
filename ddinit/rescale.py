"""Between layers (paper, section 3.2): change rates, and scales that make them equal.

A backward pass under a random linear loss gives, for every affine layer and every block of its
inputs, the squared gradient and weight.  If blobs get scales that leave the net's function
unchanged (scales.py), a weight block times s_w / s_in has its gradient times s_in / s_w, so every
change rate after rescaling is known in closed form, and the log scales that make the logarithms of
all rates as equal as can be follow by least squares.  On a homogeneous chain this is the fixed
point of Algorithm 2, r_k = (C_k / C)^(1/2), reached at once.

    python magic_init.py models/caffenet_tiny/deploy.prototxt out.caffemodel -d 'photos/*' -cs
"""
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Set

import numpy as np
import scipy.linalg
import scipy.optimize

from ddinit import blas
from ddinit.caffe_net import WorkingNet, address, affine_view
from ddinit.change_rates import ChangeRates, spread
from ddinit.crew import ALONE, Crew
from ddinit.prototxt import blob_and_layer_names, rename_blob, unused
from ddinit.scales import Form, ScaleGraph, plus

# Layers' rates within this factor need no auxiliary Power layer.
GOAL = 1.2
# How much the blocks of one layer count against the means of layers in `solve`; measured in
# models/README.md.
BLOCK_WEIGHT = 0.1
# How much a log scale of an output that may move counts against a layer's log rate in `solve`.
OUTPUT_WEIGHT = 0.1


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


def changed_rates(graph: ScaleGraph, rates: ChangeRates, log_scales: np.ndarray) -> ChangeRates:
    """Return what rates become with log scales (variables,), in closed form."""
    return rates.rescaled(_differences(graph) @ log_scales, _outputs(graph) @ log_scales)


def solve(graph: ScaleGraph, rates: ChangeRates, may_divide: Set[str]) -> Solution:
    """Return the log scales that make the change rates most equal and keep the function.

    Minimises the variance of log C_k over layers, plus BLOCK_WEIGHT times that of log C_kj over
    each layer's blocks weighted by their weights.  While layers' rates are not within GOAL,
    another layer of `may_divide` gets an auxiliary Power layer behind it (section 3.2), the one
    that helps most, or the first by name of those that help as much but for a hundredth: which one
    it is should not hang on noise.
    """
    with blas.one_thread():
        return _solved(_Problem(graph, rates), may_divide)


def _solved(problem: "_Problem", may_divide: Set[str]) -> Solution:
    auxiliary: List[str] = []
    log_scales = problem.minimise(auxiliary, np.zeros(problem.graph.variables))
    while problem.spread(log_scales) > GOAL:
        tried = [(problem.cost(one), name, one) for name in sorted(may_divide - set(auxiliary))
                 for one in [problem.minimise(auxiliary + [name], log_scales, steps=3)]]
        before = problem.cost(log_scales)
        least = min((cost for cost, _, _ in tried), default=before)
        if least > 0.99 * before:
            break
        best = next(row for row in tried if row[0] <= least + 0.01 * (before - least))
        auxiliary.append(best[1])
        log_scales = problem.minimise(auxiliary, best[2])
    return Solution(log_scales, auxiliary)


class ResponseGain:
    """How the LRN layers of a net damp blobs that get scales, from what a crew's nets hold.

    An LRN layer divides by (k + alpha m)^beta, m the mean of x^2 over its neighbouring channels,
    so blobs times s come out times s ((k + alpha m) / (k + alpha s^2 m))^beta.
    """

    def __init__(self, working: WorkingNet, crew: Crew = ALONE) -> None:
        self._bottoms: Dict[str, str] = {}
        self._gains: Dict[str, Callable[[float], float]] = {}
        for layer in working.layers:
            if layer.type == "LRN":
                blob = working.blob(layer.bottoms[0]).data
                energy = np.concatenate(crew.gather(
                    np.square(blob).mean(axis=1, dtype=np.float64)))
                self._bottoms[layer.name] = layer.bottoms[0]
                self._gains[layer.name] = _log_gain(layer.parameters.lrn_param, energy)

    def largest_change(self, graph: ScaleGraph, log_scales: np.ndarray) -> float:
        """Return the largest log scale that a layer's bottom gets, 0 without such layers."""
        return max((abs(value(graph.blobs[bottom][0][1], log_scales))
                    for bottom in self._bottoms.values()), default=0.0)

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


class Step(NamedTuple):
    """Log scales from scratch, the graph they are for, and the largest one that LRN layers see."""
    graph: ScaleGraph
    log_scales: np.ndarray
    at_response: float


def solve_from_scratch(working: WorkingNet, rates: ChangeRates, crew: Crew = ALONE) -> Step:
    """Return the log scales that make the rates most equal in a net whose definition stays.

    LRN layers have a degree that depends on the scales: it is found in turns with these.  Of
    several outputs all but the last, which is the main one, may get a scale of their own, as near
    to 1 as it can be.
    """
    gain = ResponseGain(working, crew)
    degrees = gain.degrees()
    graph = from_scratch(working, degrees)
    log_scales = solve(graph, rates, set()).log_scales
    while degrees:
        before, degrees = degrees, gain.degrees(graph, log_scales)
        graph = from_scratch(working, degrees)
        log_scales = solve(graph, rates, set()).log_scales
        if max(abs(degrees[name] - before[name]) for name in degrees) < 1e-3:
            break
    return Step(graph, log_scales, gain.largest_change(graph, log_scales))


def from_scratch(working: WorkingNet, degrees: Optional[Dict[str, float]] = None) -> ScaleGraph:
    """Return the scales that a net without a function to keep may have."""
    return ScaleGraph(working, degrees or {}, free_outputs=len(working.outputs) > 1)


class _Problem:
    """Nonlinear least squares in the free log scales x, nearly linear: of a pair's weights,
    log C_kj = log C_kj(0) + 2 (D x)_kj, D x = log(s_in / s_w), plus the log scale of outputs.
    """

    def __init__(self, graph: ScaleGraph, rates: ChangeRates) -> None:
        self.graph = graph
        self.rates = rates
        self.differences = _differences(graph)
        self.outputs = _outputs(graph)
        by_pair = rates.by_pair()
        self.live = np.isfinite(by_pair) & (by_pair > 0)
        self.live_layers = rates.sum(self.live) > 0
        share = rates.size / rates.sum(rates.size)[rates.layer]
        self.root = np.sqrt(np.where(self.live, BLOCK_WEIGHT * share, 0.0))

    def minimise(self, auxiliary: Sequence[str], start: np.ndarray, steps: int = 50) -> np.ndarray:
        """Return the log scales of least cost with Power layers behind `auxiliary`."""
        basis = self._free_directions(auxiliary)
        if not basis.shape[1] or not self.live.any():
            return np.zeros(self.graph.variables)
        found = scipy.optimize.least_squares(
            lambda free: self._residuals(basis @ free), basis.T @ start,
            lambda free: self._jacobian(basis @ free) @ basis, max_nfev=steps)
        return basis @ found.x

    def cost(self, log_scales: np.ndarray) -> float:
        return float((self._residuals(log_scales) ** 2).sum())

    def spread(self, log_scales: np.ndarray) -> float:
        return spread(self._rates(log_scales).by_layer())

    def _rates(self, log_scales: np.ndarray) -> ChangeRates:
        return self.rates.rescaled(self.differences @ log_scales, self.outputs @ log_scales)

    def _residuals(self, log_scales: np.ndarray) -> np.ndarray:
        """Layers' log rates less their mean, pairs' less their layer's, outputs' log scales."""
        rates = self._rates(log_scales)
        layers = np.log(np.where(self.live_layers, rates.by_layer(), 1.0))
        pairs = np.log(np.where(self.live, rates.by_pair(), 1.0)) - layers[rates.layer]
        level = layers[self.live_layers].mean()
        return np.concatenate([np.where(self.live_layers, layers - level, 0.0), self.root * pairs,
                               np.sqrt(OUTPUT_WEIGHT) * (self.outputs @ log_scales)])

    def _jacobian(self, log_scales: np.ndarray) -> np.ndarray:
        """Derivatives of the residuals: pairs count in a layer by their share of its squares."""
        rates = self._rates(log_scales)
        squares = rates.gradients.mean(axis=0)  # (outputs, pairs)
        total = squares.sum(axis=0)
        from_output = np.divide(squares, total, out=np.zeros_like(squares), where=total > 0)
        pairs = 2 * self.differences + from_output.T @ self.outputs
        layers = np.zeros((len(self.live_layers), pairs.shape[1]))
        for share, change in ((total, self.differences + from_output.T @ self.outputs),
                              (rates.weights, self.differences)):
            whole = rates.sum(share)[rates.layer]
            share = np.divide(share, whole, out=np.zeros_like(whole), where=whole > 0)
            np.add.at(layers, rates.layer, share[:, None] * change)
        layers[~self.live_layers] = 0
        pairs -= layers[rates.layer]
        level = layers[self.live_layers].mean(axis=0)
        return np.concatenate([np.where(self.live_layers[:, None], layers - level, 0.0),
                               self.root[:, None] * pairs,
                               np.sqrt(OUTPUT_WEIGHT) * self.outputs])

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
    for scaled in graph.owners():
        for block in scaled.blocks:
            row = np.zeros(graph.variables)
            for variable, factor in plus(block.scale_in, scaled.weight_scale, -1.0).items():
                row[variable] = factor
            rows.append(row)
    return np.array(rows)


def _outputs(graph: ScaleGraph) -> np.ndarray:
    """The matrix (outputs, variables) of the outputs' log scales: zeros where these are kept."""
    if not graph.free_outputs:
        return np.zeros((1, graph.variables))
    rows = np.zeros((len(graph.working.outputs), graph.variables))
    for row, name in zip(rows, graph.working.outputs):
        for variable, factor in graph.blobs[name][0][1].items():
            row[variable] = factor
    return rows


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
    taken = blob_and_layer_names(layers)
    powers = []
    for top in list(layers[position].top):
        below = unused(top + "_unscaled", taken)
        rename_blob(layers[:position + 1], top, below)  # in-place layers share it
        power = type(layers[position])(name=unused(name + "_rescale", taken),
                                       type="Power", bottom=[below], top=[top])
        power.power_param.scale = scale
        powers.append(power)
    changed = layers[:position + 1] + powers + layers[position + 1:]
    copies = [type(layer).FromString(layer.SerializeToString()) for layer in changed]
    definition.ClearField("layer")
    definition.layer.extend(copies)
    return ["layer '%s': new Power layer '%s' behind it multiplies by %.6g, so that its weights "
            "can have the scale that gives them their rate" % (name, power.name, scale)
            for power in powers]


def worst_difference(expected: Dict[str, np.ndarray], found: Dict[str, np.ndarray]) -> float:
    """Return the largest difference of output blobs, each over the std of the expected one."""
    worst = 0.0
    for name, blob in expected.items():
        difference = float(np.abs(found[name] - blob).max())
        std = float(blob.std())
        relative = difference / std if std > 0 else (0.0 if difference == 0 else np.inf)
        worst = float(np.maximum(worst, relative))  # NaN stays
    return worst
