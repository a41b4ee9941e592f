"""Tell how scales run through a net (paper, section 3.2), exactly on any graph of layers.

Every block of channels of every blob gets a scale s > 0, known by its logarithm.  The rescaled net
computes s times what the blob held; where input and output scales are 1, the net's function is
unchanged, and the gradient at a blob is divided by its scale exactly.  A layer type is one row of
`TABLE`: a rule that says which scales its tops have when its bottoms have theirs, and which
equations between scales must hold.  All scales are linear forms in free log scales, so that all
change rates after rescaling are known from one backward pass, and are made equal by least squares.
"""
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from ddinit.net import Layer, WorkingNet, address, channels

# A linear form in the free log scales: {variable: coefficient}; {} is the scale 1.
Form = Dict[int, float]
# The scales of a blob: runs of channels and their form, in order.
Blocks = List[Tuple[int, Form]]


class WeightBlock(NamedTuple):
    """Weights that join one input block to a layer's output: indices into `affine_view`."""
    groups: slice
    inputs: slice
    scale_in: Form


class AffineScales(NamedTuple):
    """An affine layer: its weights become W * s_w / s_in per block, its bias b * s_w.

    `weight_scale` is s_w; `scale_out`, the scale of its top, is the same unless an auxiliary
    Power layer divides the one by the other.
    """
    layer: Layer
    blocks: List[WeightBlock]
    in_channels: int
    weight_scale: Form
    scale_out: Form


def plus(first: Form, second: Form, factor: float = 1.0) -> Form:
    """Return first + factor * second."""
    total = dict(first)
    for variable, coefficient in second.items():
        total[variable] = total.get(variable, 0.0) + factor * coefficient
    return {variable: value for variable, value in total.items() if value}


class ScaleGraph:
    """The free log scales of a net and the equations between them.

    With `degrees`, LRN layers stay as they are and have that degree (name: d, f(s x) = s^d f(x));
    with `free_outputs`, outputs may change their scale, but for the net's last.  Outputs otherwise
    get the log scale in `output_logs` (by name), 0 where they have none.
    `affine` lists the layers with weights, `adjusted` what else changes with scales, by layer:
    LRN (alpha / s^2), BatchNorm (mean * s, variance and eps * s^2), Bias and Scale with two
    bottoms (b * s).
    """

    def __init__(self, working: WorkingNet, degrees: Optional[Dict[str, float]] = None,
                 free_outputs: bool = False,
                 output_logs: Optional[Dict[str, float]] = None) -> None:
        self.working = working
        self.degrees = degrees or {}
        self.free_outputs = free_outputs
        self.variables = 0
        self.equations: List[Tuple[Form, float]] = []  # each form has that value
        self.affine: List[AffineScales] = []
        self.adjusted: Dict[str, Form] = {}
        self.unknown_types: List[str] = []
        self.blobs: Dict[str, Blocks] = {}
        for layer in working.layers:
            self._add(layer)
        for name in working.outputs:
            if free_outputs and name != working.outputs[-1]:
                self.unify(self.blobs[name])
            else:
                self.pin(self.blobs[name], (output_logs or {}).get(name, 0.0))
        self._tie_shared_weights()

    def _add(self, layer: Layer) -> None:
        if layer.type == "Split" and not layer.tops:
            return  # Caffe's own: its tops go by their bottom's name
        bottoms = [self.blobs[name] for name in layer.bottoms]
        if not layer.bottoms:
            rule: Rule = fixed
        elif layer.type in TABLE:
            rule = TABLE[layer.type]
        else:
            self.unknown_types.append(layer.type)
            rule = fixed
        for name, blocks in zip(layer.tops, rule(self, layer, bottoms)):
            self.blobs[name] = blocks

    def shape(self, name: str) -> Tuple[int, ...]:
        return tuple(self.working.blob(name).shape)

    def channels(self, name: str) -> int:
        return channels(self.shape(name))

    def free(self) -> Form:
        """Return a new free log scale."""
        self.variables += 1
        return {self.variables - 1: 1.0}

    def equal(self, first: Form, second: Form, log_ratio: float = 0.0) -> None:
        """Demand that two scales are the same, or that one is exp(log_ratio) times the other."""
        difference = plus(first, second, -1.0)
        if difference:
            self.equations.append((difference, log_ratio))

    def pin(self, blocks: Blocks, log_scale: float = 0.0) -> None:
        """Demand that a blob keeps its scale, 1, or gets another one."""
        for _, form in blocks:
            self.equal(form, {}, log_scale)

    def unify(self, blocks: Blocks) -> Form:
        """Demand one scale for all channels of a blob and return it."""
        for _, form in blocks[1:]:
            self.equal(form, blocks[0][1])
        return blocks[0][1]

    def owners(self) -> List[AffineScales]:
        """Return the affine layers with weights of their own: the first of those that share."""
        first: Dict[int, AffineScales] = {}
        for scaled in self.affine:
            first.setdefault(address(scaled.layer.blobs[0]), scaled)
        return list(first.values())

    def _tie_shared_weights(self) -> None:
        first: Dict[int, AffineScales] = {}
        biases: Dict[int, Form] = {}  # and statistics
        for scaled in self.affine:
            owner = first.setdefault(address(scaled.layer.blobs[0]), scaled)
            if owner is not scaled:
                if [block[:2] for block in owner.blocks] != [block[:2] for block in scaled.blocks]:
                    for one in (owner, scaled):
                        self.unify([(1, block.scale_in) for block in one.blocks])
                for mine, theirs in zip(scaled.blocks, owner.blocks):
                    self.equal(plus(scaled.weight_scale, mine.scale_in, -1.0),
                               plus(owner.weight_scale, theirs.scale_in, -1.0))
            if scaled.layer.has_bias:
                self.equal(biases.setdefault(address(scaled.layer.blobs[1]), scaled.weight_scale),
                           scaled.weight_scale)
        for layer in self.working.layers:
            if layer.name in self.adjusted and len(layer.blobs):
                form = self.adjusted[layer.name]
                self.equal(biases.setdefault(address(layer.blobs[0]), form), form)


# ---------------------------------------------------------------------------------------------
# The table: how each layer type carries scale
# ---------------------------------------------------------------------------------------------

Rule = Callable[[ScaleGraph, Layer, List[Blocks]], List[Blocks]]


def whole(graph: ScaleGraph, layer: Layer, form: Form) -> List[Blocks]:
    """All tops of a layer with one scale."""
    return [[(graph.channels(top), form)] for top in layer.tops]


def fixed(graph: ScaleGraph, layer: Layer, bottoms: List[Blocks]) -> List[Blocks]:
    """Not homogeneous, or not in the table: bottoms and tops keep their scale, 1."""
    for blocks in bottoms:
        graph.pin(blocks)
    return whole(graph, layer, {})


def through(graph: ScaleGraph, layer: Layer, bottoms: List[Blocks]) -> List[Blocks]:
    """f(s x) = s f(x) in each channel by itself."""
    return [list(bottoms[0]) for _ in layer.tops]


def through_uniform(graph: ScaleGraph, layer: Layer, bottoms: List[Blocks]) -> List[Blocks]:
    """f(s x) = s f(x), with channels mixed: one scale across them."""
    return whole(graph, layer, graph.unify(bottoms[0]))


def absorbed(graph: ScaleGraph, layer: Layer, bottoms: List[Blocks]) -> List[Blocks]:
    """f(s x) = f(x)."""
    graph.unify(bottoms[0])
    return whole(graph, layer, {})


def selected(graph: ScaleGraph, layer: Layer, bottoms: List[Blocks]) -> List[Blocks]:
    """Images chosen or reordered by a last bottom, which keeps its scale (Filter, BatchReindex)."""
    graph.pin(bottoms[-1])
    return [list(blocks) for blocks in bottoms[:len(layer.tops)]]


def pooled(graph: ScaleGraph, layer: Layer, bottoms: List[Blocks]) -> List[Blocks]:
    """Pooling: through; the second top of MAX holds positions."""
    return [list(bottoms[0])] + [[(graph.channels(top), {})] for top in layer.tops[1:]]


def affine(graph: ScaleGraph, layer: Layer, bottoms: List[Blocks]) -> List[Blocks]:
    """z = W x + b: any scale in, any scale out (Convolution, Deconvolution, InnerProduct)."""
    blocks = bottoms[0]
    for other in bottoms[1:]:  # one layer applied to several bottoms
        graph.equal(graph.unify(other), graph.unify(blocks))
    in_channels = sum(count for count, _ in blocks)
    groups = 1
    if layer.type in ("Convolution", "Deconvolution"):
        groups = layer.parameters.convolution_param.group
        if layer.parameters.convolution_param.axis != 1:
            in_channels = graph.shape(layer.bottoms[0])[layer.parameters.convolution_param.axis]
            blocks = [(in_channels, graph.unify(blocks))]
    elif layer.parameters.inner_product_param.axis != 1:
        in_channels = layer.weights.size // layer.parameters.inner_product_param.num_output
        blocks = [(in_channels, graph.unify(blocks))]
    per_group = in_channels // groups
    weight_blocks = []
    for start, stop, form in _runs(blocks, [per_group * group for group in range(1, groups)]):
        group = start // per_group
        weight_blocks.append(WeightBlock(slice(group, group + 1), slice(
            start - group * per_group, stop - group * per_group), form))
    return _affine(graph, layer, weight_blocks, in_channels)


def embedded(graph: ScaleGraph, layer: Layer, bottoms: List[Blocks]) -> List[Blocks]:
    """Embed: an affine layer on indices, which keep their scale."""
    graph.pin(bottoms[0])
    return _affine(graph, layer, [WeightBlock(slice(None), slice(None), {})], 1)


def scaled_channels(graph: ScaleGraph, layer: Layer, bottoms: List[Blocks]) -> List[Blocks]:
    """Scale: with one bottom a weight per channel, with two their product."""
    if len(bottoms) == 2:
        tops = _product(graph, layer, bottoms)
        if len(layer.blobs):  # a bias
            graph.adjusted[layer.name] = tops[0][0][1]
        return tops
    count = layer.weights.size
    blocks = bottoms[0]
    if layer.parameters.scale_param.axis != 1 or sum(size for size, _ in blocks) != count:
        blocks = [(count, graph.unify(blocks))]
    return _affine(graph, layer, [WeightBlock(slice(start, stop), slice(None), form)
                                  for start, stop, form in _runs(blocks, [])], count)


def largest(graph: ScaleGraph, layer: Layer, bottoms: List[Blocks]) -> List[Blocks]:
    """ArgMax: positions, which absorb, or values, or without an axis one channel of each."""
    parameters = layer.parameters.argmax_param
    if not parameters.out_max_val:
        return absorbed(graph, layer, bottoms)
    if parameters.HasField("axis"):
        return through_uniform(graph, layer, bottoms)
    return [[(1, {}), (1, graph.unify(bottoms[0]))]]


def added_bias(graph: ScaleGraph, layer: Layer, bottoms: List[Blocks]) -> List[Blocks]:
    """Bias: with one bottom b * s, with two a sum."""
    form = graph.unify([block for blocks in bottoms for block in blocks])
    if len(bottoms) == 1:
        graph.adjusted[layer.name] = form
    return whole(graph, layer, form)


def rectified(graph: ScaleGraph, layer: Layer, bottoms: List[Blocks]) -> List[Blocks]:
    """ELU: through only where it is ReLU (alpha 0)."""
    if layer.parameters.elu_param.alpha == 0:
        return through(graph, layer, bottoms)
    return fixed(graph, layer, bottoms)


def powered(graph: ScaleGraph, layer: Layer, bottoms: List[Blocks]) -> List[Blocks]:
    """Power (a x)^p: degree p; with a shift not homogeneous."""
    parameters = layer.parameters.power_param
    if parameters.shift != 0:
        return fixed(graph, layer, bottoms)
    return [[(count, plus({}, form, parameters.power)) for count, form in bottoms[0]]]


def local_response(graph: ScaleGraph, layer: Layer, bottoms: List[Blocks]) -> List[Blocks]:
    """LRN x (k + alpha / n sum x^2)^-beta: through, exactly, when alpha becomes alpha / s^2."""
    if layer.name in graph.degrees:
        form = graph.unify(bottoms[0])
        return whole(graph, layer, plus({}, form, graph.degrees[layer.name]))
    graph.adjusted[layer.name] = graph.unify(bottoms[0])
    return through_uniform(graph, layer, bottoms)


def batch_normalized(graph: ScaleGraph, layer: Layer, bottoms: List[Blocks]) -> List[Blocks]:
    """BatchNorm: absorbs, exactly, when mean and variance and eps follow the input's scale."""
    graph.adjusted[layer.name] = graph.unify(bottoms[0])
    return whole(graph, layer, {})


def mean_variance(graph: ScaleGraph, layer: Layer, bottoms: List[Blocks]) -> List[Blocks]:
    """MVN: absorbs; without normalizing the variance through."""
    parameters = layer.parameters.mvn_param
    if parameters.normalize_variance:
        return (absorbed if parameters.across_channels else absorbed_by_channel)(
            graph, layer, bottoms)
    return (through_uniform if parameters.across_channels else through)(graph, layer, bottoms)


def absorbed_by_channel(graph: ScaleGraph, layer: Layer, bottoms: List[Blocks]) -> List[Blocks]:
    """f(s x) = f(x) in each channel by itself."""
    return whole(graph, layer, {})


def concatenated(graph: ScaleGraph, layer: Layer, bottoms: List[Blocks]) -> List[Blocks]:
    """Concat: the bottoms' blocks side by side; along another axis one scale."""
    if _axis(layer.parameters.concat_param, graph.shape(layer.bottoms[0])) == 1:
        return [_merged([block for blocks in bottoms for block in blocks])]
    return whole(graph, layer, graph.unify([block for blocks in bottoms for block in blocks]))


def sliced(graph: ScaleGraph, layer: Layer, bottoms: List[Blocks]) -> List[Blocks]:
    """Slice: each top its part of the blocks; along another axis all of them."""
    if _axis(layer.parameters.slice_param, graph.shape(layer.bottoms[0])) != 1:
        return [list(bottoms[0]) for _ in layer.tops]
    ends = np.cumsum([graph.channels(top) for top in layer.tops])
    tops: List[Blocks] = [[] for _ in layer.tops]
    for start, stop, form in _runs(bottoms[0], [int(end) for end in ends]):
        tops[int(np.searchsorted(ends, start, side="right"))].append((stop - start, form))
    return tops


def combined(graph: ScaleGraph, layer: Layer, bottoms: List[Blocks]) -> List[Blocks]:
    """Eltwise: SUM and MAX want one scale of all bottoms, PROD multiplies them."""
    operations = layer.parameters.eltwise_param
    if operations.operation == operations.PROD:
        return _product(graph, layer, bottoms)
    cuts = sorted({stop for blocks in bottoms for _, stop, _ in _runs(blocks, [])})
    aligned = [_runs(blocks, cuts) for blocks in bottoms]
    for runs in zip(*aligned):
        for _, _, form in runs[1:]:
            graph.equal(form, runs[0][2])
    return [[(stop - start, form) for start, stop, form in aligned[0]]]


def reduced(graph: ScaleGraph, layer: Layer, bottoms: List[Blocks]) -> List[Blocks]:
    """Reduction: SUM, MEAN, ASUM of degree 1, SUMSQ of degree 2."""
    parameters = layer.parameters.reduction_param
    degree = 2.0 if parameters.operation == parameters.SUMSQ else 1.0
    return whole(graph, layer, plus({}, graph.unify(bottoms[0]), degree))


def reshaped(graph: ScaleGraph, layer: Layer, bottoms: List[Blocks]) -> List[Blocks]:
    """Flatten, Reshape, Im2col: an image's numbers keep their order and so their blocks."""
    before, after = graph.shape(layer.bottoms[0]), graph.shape(layer.tops[0])
    ordered = len(before) > 1 and len(after) > 1 and (
        before[0] == after[0] or layer.type == "Im2col")
    size_before = int(np.prod(before[2:])) if layer.type != "Im2col" else after[1] // before[1]
    size_after = int(np.prod(after[2:])) if layer.type != "Im2col" else 1
    ends = [stop * size_before for _, stop, _ in _runs(bottoms[0], [])] if ordered else []
    if not ordered or any(end % size_after for end in ends):
        return through_uniform(graph, layer, bottoms)
    counts = np.diff([0] + ends) // size_after
    return [[(int(count), form) for count, (_, form) in zip(counts, bottoms[0])]]


def permuted(graph: ScaleGraph, layer: Layer, bottoms: List[Blocks]) -> List[Blocks]:
    """Permute: through where the channels stay the second axis."""
    order = list(layer.parameters.permute_param.order)
    stays = all(order[axis] == axis for axis in range(min(2, len(order))))
    return (through if stays and len(order) != 1 else through_uniform)(graph, layer, bottoms)


def along_axis(graph: ScaleGraph, layer: Layer, bottoms: List[Blocks]) -> List[Blocks]:
    """Tile, Reverse: through; over the channels with one scale."""
    field = layer.parameters.tile_param if layer.type == "Tile" else layer.parameters.reverse_param
    axis = field.axis % len(graph.shape(layer.bottoms[0]))
    return (through_uniform if axis == 1 else through)(graph, layer, bottoms)


def cropped(graph: ScaleGraph, layer: Layer, bottoms: List[Blocks]) -> List[Blocks]:
    """Crop: through for the first bottom; the second only gives its shape."""
    axis = layer.parameters.crop_param.axis % len(graph.shape(layer.bottoms[0]))
    return (through if axis > 1 else through_uniform)(graph, layer, bottoms[:1])


TABLE: Dict[str, Rule] = {
    "AbsVal": through, "ReLU": through, "PReLU": through, "Dropout": through, "ELU": rectified,
    "Pooling": pooled, "SPP": through_uniform, "LRN": local_response, "Power": powered,
    "Convolution": affine, "Deconvolution": affine, "InnerProduct": affine, "Embed": embedded,
    "Scale": scaled_channels, "Bias": added_bias, "BatchNorm": batch_normalized,
    "MVN": mean_variance, "Eltwise": combined, "Concat": concatenated, "Slice": sliced,
    "Flatten": reshaped, "Reshape": reshaped, "Im2col": reshaped, "Permute": permuted,
    "Tile": along_axis, "Reverse": along_axis, "Crop": cropped, "Reduction": reduced,
    "Filter": selected, "BatchReindex": selected, "ArgMax": largest,
    "Split": through,
    "BNLL": fixed, "Clip": fixed, "Exp": fixed, "Log": fixed, "Sigmoid": fixed, "Softmax": fixed,
    "Swish": fixed, "TanH": fixed, "Threshold": fixed, "LSTM": fixed, "LSTMUnit": fixed,
    "RNN": fixed, "ContinuationIndicator": fixed,
}


def _affine(graph: ScaleGraph, layer: Layer, blocks: List[WeightBlock],
            in_channels: int) -> List[Blocks]:
    scaled = AffineScales(layer, blocks, in_channels, graph.free(), graph.free())
    graph.affine.append(scaled)
    return whole(graph, layer, scaled.scale_out)


def _product(graph: ScaleGraph, layer: Layer, bottoms: List[Blocks]) -> List[Blocks]:
    total: Form = {}
    for blocks in bottoms:
        total = plus(total, graph.unify(blocks))
    return whole(graph, layer, total)


def _axis(parameters: Any, shape: Sequence[int]) -> int:
    """The axis of a Concat or Slice, which old definitions give another name."""
    for old in ("concat_dim", "slice_dim"):
        if old in parameters.DESCRIPTOR.fields_by_name and parameters.HasField(old):
            return int(getattr(parameters, old))
    return int(parameters.axis) % len(shape)


def _runs(blocks: Blocks, cuts: Sequence[int]) -> List[Tuple[int, int, Form]]:
    """Blocks as (start, stop, form), cut further at the channels in `cuts`."""
    runs = []
    start = 0
    for count, form in blocks:
        inside = [cut for cut in cuts if start < cut < start + count]
        edges = [start] + sorted(set(inside)) + [start + count]
        runs += [(one, two, form) for one, two in zip(edges, edges[1:])]
        start += count
    return runs


def _merged(blocks: Blocks) -> Blocks:
    """Neighbouring blocks of one form as one."""
    merged: Blocks = []
    for count, form in blocks:
        if merged and merged[-1][1] == form:
            merged[-1] = (merged[-1][0] + count, form)
        else:
            merged.append((count, form))
    return merged
