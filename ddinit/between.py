"""Make all layers train at one rate (paper, section 3.2 and Algorithm 2).

If blobs get scales that leave the net's function unchanged (scales.py), a weight block times
s_w / s_in has its gradient times s_in / s_w.  So every change rate after rescaling is known in
closed form, and the log scales that make the logarithms of all rates equal follow by least squares.
On a homogeneous chain they are those of Algorithm 2, r_k = (C_k / C)^(alpha / 2).
"""
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Set, Tuple

import numpy as np
import scipy.linalg
import scipy.ndimage
import scipy.optimize

from ddinit.change_rates import FEW_OUTPUTS, ChangeRates, measure, outputs_per_image
from ddinit.net import WorkingNet, address, affine_view
from ddinit.scales import Form, ScaleGraph, plus

# Layers' rates within this factor need no auxiliary Power layer.
GOAL = 1.2
# The most that alpha m, which an LRN layer adds to k, may become for its largest input.
LRN_LIMIT = 1e5
# A step that changes the log scale at LRN layers by less than this has settled them.
SETTLED = 0.3
# How many images a step before the last is measured on, and how many batches the last one.
SETTLING_IMAGES = 4
LAST_BATCHES = 4
# How much the blocks of one layer count in `solve` against the means of layers.
BLOCK_WEIGHT = 0.1
# How much a log scale of an output that may move counts in `solve` against a layer's log rate.
OUTPUT_WEIGHT = 0.1


class Options(NamedTuple):
    """How Algorithm 2 runs: damping alpha, steps at most, equation 2 to the letter or not, and the
    standard deviation that the outputs of a net from scratch get (None: the one they have)."""
    alpha: float = 1.0
    iterations: int = 10
    literal: bool = False
    output_std: Optional[float] = None


def equalize(working: WorkingNet, batches: Any, count: int, rng: np.random.Generator,
             options: Options) -> ChangeRates:
    """Run Algorithm 2 on a net from scratch, whose definition stays; return the rates before it.

    With alpha = 1 a step is exact but for LRN layers, whose degree depends on the scale: steps on a
    few images settle these, and the last one is measured on the last of the `count` batches.  A
    smaller alpha is the paper's own damped schedule with a batch each time.
    """
    before = outputs = None
    last = options.alpha == 1 and not any(layer.type == "LRN" for layer in working.layers)
    for iteration in range(options.iterations):                  # repeat
        few = SETTLING_IMAGES if options.alpha == 1 and not last else None
        numbers = last_batches(count) if last else [0] if few else [iteration % count]
        by_output = len(working.outputs) > 1 and not (last and iteration)
        C = measure(working, batches, numbers, rng, by_output, options.literal, few)
        before = before or C                                     # C_k = E_j[C_k,j]
        if outputs_per_image(working) < FEW_OUTPUTS:  # one image is left: its outputs have no std
            working.load(batches, numbers[0])
            working.forward()
        if outputs is None or not few:  # other images have outputs of another scale
            outputs = output_std(working, options.output_std)
        graph, log_scales = solve_from_scratch(working, C, outputs)
        log_r = options.alpha * log_scales                       # r_k = (C_k / C)^(alpha / 2)
        apply_to_weights(graph, log_r)                           # b_k <- r_k b_k, W_k <- r_k W_k,
        if last:                                                 # undone in the layer above
            break                                                # until convergence
        last = options.alpha == 1 and lrn_change(graph, log_scales) < SETTLED
    assert before is not None
    return before


def lrn_change(graph: ScaleGraph, log_scales: np.ndarray) -> float:
    """Return the largest log scale that the input of an LRN layer gets."""
    return max(abs(value(graph.blobs[layer.bottoms[0]][0][1], log_scales))
               for layer in graph.working.layers if layer.type == "LRN")


def last_batches(count: int) -> List[int]:
    """Return the batches, of `count`, that the last step is measured on.

    No filters are made from these as long as there are others: filters respond more to the images
    that they come from, and rates on other images would differ.
    """
    return list(range(max(count - LAST_BATCHES, count // 2), count))


def solve_from_scratch(working: WorkingNet, rates: ChangeRates,
                       outputs: Dict[str, float]) -> Tuple[ScaleGraph, np.ndarray]:
    """Return the scales that a net without a function to keep may have, and those to give it.

    LRN layers stay as they are: they have a degree that depends on the scale of their input, and is
    found in turns with it.  The net's outputs get the standard deviations `outputs`; of several
    whose rates are told apart, all but the last, the main one, are free.
    """
    now = output_std(working)
    logs = {name: float(np.log(std / now[name])) for name, std in outputs.items()
            if std > 0 and now[name] > 0}
    lrn = [layer for layer in working.layers if layer.type == "LRN"]
    bottoms = {layer.name: layer.bottoms[0] for layer in lrn}
    betas = {layer.name: layer.parameters.lrn_param.beta for layer in lrn}
    energies = {layer.name: lrn_energy(layer.parameters.lrn_param,
                                       working.blob(layer.bottoms[0]).data) for layer in lrn}
    at = dict.fromkeys(bottoms, 0.0)
    held: Set[str] = set()
    for _ in range(20):
        degrees = {name: lrn_degree(*energies[name], betas[name], at[name]) for name in bottoms}
        graph = ScaleGraph(working, degrees, len(rates.gradients[0]) > 1, logs)
        for name in held:
            graph.pin(graph.blobs[bottoms[name]], lrn_limit(energies[name][1]))
        log_scales = solve(graph, rates).log_scales
        before = at
        at = {name: value(graph.blobs[bottom][0][1], log_scales)
              for name, bottom in bottoms.items()}
        beyond = {name for name in at if at[name] > lrn_limit(energies[name][1]) + 1e-6}
        if beyond <= held and all(abs(at[name] - before[name]) < 0.01 for name in at):
            break
        held |= beyond
    return graph, log_scales


def lrn_energy(parameters: Any, bottom: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
    """Return |x| and e = alpha m / k of an LRN layer f(x) = x (k (1 + e))^-beta.

    m is the mean of x^2 (n, channels, ...) over neighbouring channels or positions.
    """
    across = parameters.norm_region == parameters.ACROSS_CHANNELS
    size = parameters.local_size
    window = [1, size] + [1] * (bottom.ndim - 2) if across else [1, 1, size, size]
    m = scipy.ndimage.uniform_filter(np.square(bottom), window, mode="constant")
    k = parameters.k if across else 1.0  # as Caffe has it
    return np.abs(bottom), parameters.alpha / k * m


def lrn_degree(x: np.ndarray, e: np.ndarray, beta: float, log_scale: float) -> float:
    """Return d where an LRN layer's output grows by s^d in the mean when its input grows by s."""
    log_s = log_scale if abs(log_scale) > 0.1 else 0.1
    before = (x * (1 + e) ** -beta).sum(dtype=np.float64)
    after = (x * (1 + np.exp(2 * log_s) * e) ** -beta).sum(dtype=np.float64)
    return 1 + float(np.log(after / before)) / log_s if before > 0 else 1.0


def lrn_limit(e: np.ndarray) -> float:
    """Return the largest log scale that an LRN layer's input may get.

    Caffe keeps running sums of squares, whose rounding makes NaN where they are far above k.
    """
    most = float(e.max())
    return float(np.log(LRN_LIMIT / most)) / 2 if most > 0 else 0.0


def output_std(working: WorkingNet, wanted: Optional[float] = None) -> Dict[str, float]:
    """Return the standard deviation of each output of what the net holds, or the one `wanted`."""
    return {name: float(working.blob(name).data.std()) if wanted is None else wanted
            for name in working.outputs}


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


def solve(graph: ScaleGraph, rates: ChangeRates, may_divide: Sequence[str] = ()) -> Solution:
    """Return the log scales that make the change rates most equal and keep the function.

    Minimises the variance of log C_k over layers, plus BLOCK_WEIGHT times that of log C_kj over
    each layer's blocks weighted by their weights.  While layers' rates are not within GOAL, another
    layer of `may_divide` gets an auxiliary Power layer behind it (section 3.2): the one that helps
    most, or the first by name of those that help nearly as much, so that it does not hang on noise.
    """
    problem = _Problem(graph, rates)
    auxiliary: List[str] = []
    log_scales = problem.minimize(auxiliary, problem.start([]))
    while problem.spread(log_scales) > GOAL:
        gains = problem.gains(log_scales, auxiliary, sorted(set(may_divide) - set(auxiliary)))
        most = max(gains.values(), default=0.0)
        if most < 0.01 * problem.cost(log_scales):
            break
        auxiliary.append(next(name for name, gain in gains.items() if gain > 0.99 * most))
        log_scales = problem.minimize(auxiliary, log_scales)
    return Solution(log_scales, auxiliary)


class _Problem:
    """Nonlinear least squares in the free log scales x, nearly linear: of a pair's weights,
    log C_kj = log C_kj(0) + 2 (D x)_kj, D x = log(s_in / s_w), plus the log scale of outputs.

    A pair is a layer and a block of its inputs that has one scale.
    """

    def __init__(self, graph: ScaleGraph, rates: ChangeRates) -> None:
        self.graph = graph
        pairs = [(number, scaled.blocks[place]) for number, scaled in enumerate(graph.owners())
                 for place in range(len(scaled.blocks))]
        self.layer = np.array([number for number, _ in pairs])
        parts = [(block.groups, block.inputs) for _, block in pairs]
        self.weights = np.array([rates.weights[k][part].sum()
                                 for k, part in zip(self.layer, parts)])
        self.gradients = np.array([rates.gradients[k][(slice(None), *part)].sum(axis=(1, 2))
                                   for k, part in zip(self.layer, parts)]).T  # (outputs, pairs)
        size = np.array([rates.weights[k][part].size * rates.rows[k]
                         for k, part in zip(self.layer, parts)], float)
        of_layer = self.sum(size)
        self.log_size = np.log(of_layer) / 2 if rates.literal else np.zeros(len(of_layer))
        self.differences = _rows([plus(block.scale_in, scaled.weight_scale, -1.0)
                                  for scaled in graph.owners() for block in scaled.blocks],
                                 graph.variables)
        outputs = [graph.blobs[name][0][1] for name in graph.working.outputs]
        self.outputs = _rows(outputs, graph.variables) if graph.free_outputs else np.zeros(
            (1, graph.variables))
        squares = self.gradients.sum(axis=0)
        self.live = np.isfinite(squares) & (squares > 0) & (self.weights > 0) & np.isfinite(
            self.weights)
        self.live_layers = self.sum(self.live) > 0
        self.root = np.sqrt(np.where(self.live, BLOCK_WEIGHT * size / of_layer[self.layer], 0.0))

    def sum(self, values: np.ndarray) -> np.ndarray:
        """Return the sums of values (pairs,) over each layer's blocks (layers,)."""
        return np.bincount(self.layer, values)

    def spread(self, x: np.ndarray) -> float:
        """Return the largest over the smallest C_k at log scales x."""
        logs = self._log_rates(x)[0][self.live_layers]
        return float(np.exp(np.ptp(logs))) if len(logs) else 1.0

    def _log_rates(self, x: np.ndarray) -> Any:
        """Return log C_k (layers,) and log C_kj (pairs,) at log scales x."""
        squares, weights = self._rescaled(x)
        squares = squares.sum(axis=0)
        with np.errstate(divide="ignore", invalid="ignore"):
            layers = np.log(self.sum(np.where(self.live, squares, 0))
                            / self.sum(np.where(self.live, weights, 0))) / 2
            pairs = np.log(squares / weights) / 2
        return (np.where(self.live_layers, layers, 0) - self.log_size,
                np.where(self.live, pairs, 0) - self.log_size[self.layer])

    def _rescaled(self, x: np.ndarray) -> Any:
        """Return squared gradients (outputs, pairs) and weights (pairs,) at log scales x."""
        factor = np.exp(2 * self.differences @ x)
        output = np.exp(2 * self.outputs @ x)
        return self.gradients * factor * output[:len(self.gradients), None], self.weights / factor

    def cost(self, x: np.ndarray) -> float:
        return float((self._residuals(x) ** 2).sum())

    def minimize(self, auxiliary: Sequence[str], near: np.ndarray) -> np.ndarray:
        """Return the log scales of least cost with Power layers behind `auxiliary`."""
        start, basis = self.start(auxiliary), self._basis(auxiliary)
        if not basis.shape[1] or not self.live.any():
            return start
        fit = scipy.optimize.least_squares(
            lambda free: self._residuals(start + basis @ free), basis.T @ (near - start),
            lambda free: self._jacobian(start + basis @ free) @ basis, max_nfev=50)
        return start + basis @ fit.x

    def gains(self, x: np.ndarray, auxiliary: Sequence[str],
              names: Sequence[str]) -> Dict[str, float]:
        """Return by how much a Power layer behind each of `names` would lower the cost at x.

        The cost is linearized.  A Power layer gives up one equation and frees one direction, a
        column of the pseudoinverse: the gain is the square of the residuals' part along what it
        adds to the free ones.
        """
        matrix, _, row_of = self._equations(auxiliary)
        directions = np.linalg.pinv(matrix, rcond=1e-10)
        residuals, jacobian = self._residuals(x), self._jacobian(x)
        basis = self._basis(auxiliary)
        known = scipy.linalg.orth(jacobian @ basis) if basis.shape[1] else jacobian[:, :0]
        gains = {}
        for name in names:
            direction = directions[:, row_of[name]]
            added = jacobian @ direction
            added -= known @ (known.T @ added)
            given_up = abs(matrix[row_of[name]] @ direction - 1) < 1e-6
            gains[name] = float((added @ residuals) ** 2 / (added @ added)) \
                if given_up and added @ added > 1e-12 else 0.0
        return gains

    def _residuals(self, x: np.ndarray) -> np.ndarray:
        """Layers' log rates less their mean, pairs' less their layer's, outputs' log scales."""
        layers, pairs = self._log_rates(x)
        level = layers[self.live_layers].mean()
        return np.concatenate([np.where(self.live_layers, layers - level, 0.0),
                               self.root * (pairs - layers[self.layer]),
                               np.sqrt(OUTPUT_WEIGHT) * (self.outputs @ x)])

    def _jacobian(self, x: np.ndarray) -> np.ndarray:
        """Derivatives of the residuals: pairs count in a layer by their share of its squares."""
        squares, weights = self._rescaled(x)
        total = np.where(self.live, squares.sum(axis=0), 0.0)
        from_output = np.divide(squares, total, out=np.zeros_like(squares), where=total > 0)
        of_gradient = self.differences + from_output.T @ self.outputs[:len(squares)]
        pairs = of_gradient + self.differences
        layers = np.zeros((len(self.live_layers), pairs.shape[1]))
        for share, change in ((total, of_gradient),
                              (np.where(self.live, weights, 0.0), self.differences)):
            whole = self.sum(share)[self.layer]
            share = np.divide(share, whole, out=np.zeros_like(whole), where=whole > 0)
            np.add.at(layers, self.layer, share[:, None] * change)
        layers[~self.live_layers] = 0
        level = layers[self.live_layers].mean(axis=0)
        return np.concatenate([np.where(self.live_layers[:, None], layers - level, 0.0),
                               self.root[:, None] * (pairs - layers[self.layer]),
                               np.sqrt(OUTPUT_WEIGHT) * self.outputs])

    def _equations(self, auxiliary: Sequence[str]) -> Any:
        """Return the matrix and right-hand side of what log scales must fulfil, and the row that
        keeps each layer without a Power layer at the scale of its weights."""
        equations = list(self.graph.equations)
        row_of = {}
        for scaled in self.graph.affine:
            if scaled.layer.name not in auxiliary:
                row_of[scaled.layer.name] = len(equations)
                equations.append((plus(scaled.weight_scale, scaled.scale_out, -1.0), 0.0))
        return (_rows([form for form, _ in equations], self.graph.variables),
                np.array([log_scale for _, log_scale in equations]), row_of)

    def start(self, auxiliary: Sequence[str]) -> np.ndarray:
        """Return the smallest log scales that fulfil the equations."""
        matrix, log_scales, _ = self._equations(auxiliary)
        return np.linalg.lstsq(matrix, log_scales, rcond=1e-10)[0]

    def _basis(self, auxiliary: Sequence[str]) -> np.ndarray:
        """Return an orthonormal basis (variables, free) of what the equations leave free."""
        return scipy.linalg.null_space(self._equations(auxiliary)[0], rcond=1e-10)


def _rows(forms: Sequence[Form], variables: int) -> np.ndarray:
    """Return the matrix (forms, variables) of linear forms."""
    rows = np.zeros((len(forms), variables))
    for row, form in zip(rows, forms):
        for variable, factor in form.items():
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
        if layer.name in graph.adjusted and done.isdisjoint(address(blob) for blob in layer.blobs):
            scale = np.exp(value(graph.adjusted[layer.name], log_scales))
            if layer.type == "BatchNorm":
                layer.blobs[0].data[...] *= np.float32(scale)
                layer.blobs[1].data[...] *= np.float32(scale ** 2)
            elif layer.type in ("Bias", "Scale"):
                layer.blobs[0].data[...] *= np.float32(scale)
            done.update(address(blob) for blob in layer.blobs)
