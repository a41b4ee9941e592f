"""Every layer type of this Caffe, run on x and on s x: scales.TABLE says what comes out.

A case is a layer with bottoms x (and y, of the same shape; or others, which keep their scale).
Both are made of two blocks of channels that Scale layers multiply, so that their scales are free:

    uniform     x and y times s
    blocks      the first channels of x and y times s, the others times t
    bottoms     x times s, y times t

`carries` lists what the table must let through.  Whatever it lets through must be what Caffe
computes; and where it lets no uniform scale through, Caffe's layer must really not be homogeneous,
or the case says why the table is more careful.

The same cases show whether `separable` is right: a layer that it says computes each image by itself
must give for one image alone what it gives for it in a batch.
"""
from typing import Any, Dict, List, NamedTuple, Optional

import numpy as np
import pytest
from toy_nets import fill, image_input, layer, parsed

from ddinit.net import WorkingNet, affine_view
from ddinit.processes import in_child
from ddinit.prototxt import image_layers, import_caffe, output_blobs, separable
from ddinit.scales import TABLE, Form, ScaleGraph

# Layers that feed a net: nothing comes in, what they give keeps its scale, 1.
SOURCES = {"Data", "DummyData", "HDF5Data", "ImageData", "Input", "MemoryData", "WindowData",
           "Parameter", "ContinuationIndicator"}
# Losses and scores: cut off before scales are asked for (image_layers).
CUT = {"Accuracy", "ContrastiveLoss", "CtcLoss", "EuclideanLoss", "HDF5Output", "HingeLoss",
       "InfogainLoss", "LabelsequenceAccuracy", "MultinomialLogisticLoss",
       "SigmoidCrossEntropyLoss", "Silence", "SoftmaxWithLoss"}
# Whatever code: never in the table, so that its blobs keep their scales.
OPEN = {"Python"}

SHAPE = (3, 6, 4, 5)  # of x and y
CUT_AT = 2  # channels of their first block
STEPS = {"s": 2.0, "t": 8.0}  # powers of 2: no rounding


class Case(NamedTuple):
    """A layer type with parameters, and the scales that the table lets through it."""
    type: str
    parameters: str = ""
    carries: str = "uniform"
    bottoms: str = "x"
    tops: str = "top"
    others: str = ""  # Input layers of other bottoms
    shape: tuple = SHAPE
    positive: bool = False  # what x and y hold
    careful: str = ""  # why the table is stricter than Caffe's layer

    @property
    def label(self) -> str:
        return " ".join([self.type, self.parameters.replace("_param", ""), self.bottoms,
                         "" if self.shape == SHAPE else str(self.shape)]).replace("  ", " ")

    @property
    def modes(self) -> List[str]:
        used = self.bottoms.split()
        return ["uniform"] + ["blocks"] * ("x" in used) + ["bottoms"] * ("y" in used)


ALL = "uniform blocks"
TWO = "x y"
TYPES = set(import_caffe().layer_type_list())
INDEX = image_input(3, name="index")
CASES = [
    Case("AbsVal", carries=ALL),
    Case("ArgMax", "argmax_param { axis: 1 }"),
    Case("ArgMax", "argmax_param { top_k: 2 }"),
    Case("ArgMax", "argmax_param { axis: 1 out_max_val: true top_k: 2 }"),
    Case("ArgMax", "argmax_param { axis: 2 out_max_val: true }"),
    Case("ArgMax", "argmax_param { out_max_val: true top_k: 2 }"),
    Case("BNLL", carries=""),
    Case("BatchNorm"),
    Case("BatchNorm", "batch_norm_param { eps: 0.5 }"),
    Case("BatchNorm", "batch_norm_param { use_global_stats: false eps: 0.5 }"),
    Case("BatchReindex", bottoms="x index", others=INDEX, carries=ALL),
    Case("Bias"),
    Case("Bias", "bias_param { axis: 2 num_axes: 2 }"),
    Case("Bias", bottoms=TWO, parameters="bias_param { axis: 0 }"),
    Case("Clip", "clip_param { min: -0.5 max: 0.5 }", carries=""),
    Case("Concat", bottoms=TWO, carries=ALL + " bottoms"),
    Case("Concat", "concat_param { axis: -3 }", bottoms=TWO, carries=ALL + " bottoms"),
    Case("Concat", "concat_param { concat_dim: 1 }", bottoms=TWO, carries=ALL + " bottoms"),
    Case("Concat", "concat_param { axis: 2 }", bottoms=TWO),
    Case("Concat", "concat_param { axis: 0 }", bottoms=TWO),
    Case("Convolution", "convolution_param { num_output: 4 kernel_size: 3 pad: 2 }", carries=ALL),
    Case("Convolution", "convolution_param { num_output: 4 kernel_size: 2 group: 2 dilation: 2 }",
         carries=ALL),
    Case("Convolution", "convolution_param { num_output: 6 kernel_size: 1 group: 6 "
         "bias_term: false }", carries=ALL),
    Case("Convolution", "convolution_param { num_output: 4 kernel_size: 2 }", bottoms=TWO,
         tops="top two"),
    Case("Convolution", "convolution_param { num_output: 3 kernel_size: 2 axis: 2 }",
         shape=(2, 3, 4, 5, 5)),
    Case("Crop", "crop_param { axis: 2 offset: 1 }", bottoms="x size",
         others=image_input(3, 6, 2, 3, name="size"), carries=ALL),
    Case("Crop", "crop_param { axis: 1 offset: 1 }", bottoms="x size",
         others=image_input(3, 4, 2, 3, name="size")),
    Case("Crop", "crop_param { axis: -1 }", bottoms="x size",
         others=image_input(3, 6, 4, 3, name="size"), carries=ALL),
    Case("Deconvolution", "convolution_param { num_output: 4 kernel_size: 3 stride: 2 }",
         carries=ALL),
    Case("Deconvolution", "convolution_param { num_output: 4 kernel_size: 2 group: 2 }",
         carries=ALL),
    Case("Dropout", "dropout_param { dropout_ratio: 0.3 }", carries=ALL),
    Case("ELU", "elu_param { alpha: 0 }", carries=ALL),
    Case("ELU", carries=""),
    Case("Eltwise", "eltwise_param { operation: SUM coeff: 2 coeff: -0.5 }", bottoms=TWO,
         carries=ALL),
    Case("Eltwise", "eltwise_param { operation: MAX }", bottoms=TWO, carries=ALL),
    Case("Eltwise", "eltwise_param { operation: PROD }", bottoms=TWO,
         carries="uniform bottoms"),
    Case("Eltwise", "eltwise_param { operation: PROD }", bottoms="x x"),
    Case("Embed", "embed_param { num_output: 4 input_dim: 7 }", bottoms="index", others=INDEX,
         carries="uniform"),
    Case("Exp", carries=""),
    Case("Filter", bottoms="x y index", others=INDEX, tops="top two",
         carries=ALL + " bottoms"),
    Case("Flatten", carries=ALL),
    Case("Flatten", "flatten_param { axis: 2 }", carries=ALL),
    Case("Flatten", "flatten_param { axis: 0 end_axis: 1 }"),
    Case("Flatten", "flatten_param { axis: 0 }"),
    Case("Im2col", "convolution_param { kernel_size: 3 pad: 1 }", carries=ALL),
    Case("InnerProduct", "inner_product_param { num_output: 5 }", carries=ALL),
    Case("InnerProduct", "inner_product_param { num_output: 5 }", shape=(3, 6), carries=ALL),
    Case("InnerProduct", "inner_product_param { num_output: 5 transpose: true }", carries=ALL),
    Case("InnerProduct", "inner_product_param { num_output: 5 axis: 2 bias_term: false }"),
    Case("InnerProduct", "inner_product_param { num_output: 5 axis: -1 }"),
    Case("LRN", "lrn_param { local_size: 3 alpha: 5 beta: 0.75 k: 2 }"),
    Case("LRN", "lrn_param { local_size: 3 alpha: 5 norm_region: WITHIN_CHANNEL }"),
    Case("LSTM", "recurrent_param { num_output: 3 }", bottoms="x go", carries="",
         others=image_input(3, 6, name="go"), shape=(3, 6, 4)),
    Case("LSTMUnit", bottoms="x four go", carries="", shape=(1, 6, 2),
         others=image_input(1, 6, 8, name="four") + image_input(1, 6, name="go"),
         tops="top two"),
    Case("Log", positive=True, carries=""),
    Case("MVN", carries=ALL),
    Case("MVN", "mvn_param { across_channels: true }"),
    Case("MVN", "mvn_param { normalize_variance: false }", carries=ALL),
    Case("MVN", "mvn_param { normalize_variance: false across_channels: true }"),
    Case("PReLU", carries=ALL),
    Case("PReLU", "prelu_param { channel_shared: true }", carries=ALL),
    Case("Permute", "permute_param { order: 0 order: 1 order: 3 order: 2 }", carries=ALL),
    Case("Permute", "permute_param { order: 0 order: 2 order: 3 order: 1 }"),
    Case("Permute", "permute_param { order: 1 order: 0 }"),
    Case("Permute", "permute_param { order: 0 order: 1 }", carries=ALL),
    Case("Permute", "permute_param { order: 1 }"),
    Case("Pooling", "pooling_param { pool: MAX kernel_size: 3 stride: 2 pad: 1 }", carries=ALL),
    Case("Pooling", "pooling_param { pool: MAX kernel_size: 2 }", tops="top mask", carries=ALL),
    Case("Pooling", "pooling_param { pool: AVE kernel_size: 3 stride: 2 pad: 1 }", carries=ALL),
    Case("Pooling", "pooling_param { pool: AVE global_pooling: true }", carries=ALL),
    # STOCHASTIC pooling has no forward pass on the CPU
    Case("Power", "power_param { scale: 3 }", carries=ALL),
    Case("Power", "power_param { power: 2 }", carries=ALL),
    Case("Power", "power_param { power: -0.5 scale: 2 }", positive=True, carries=ALL),
    Case("Power", "power_param { power: 0 }", carries=ALL),
    Case("Power", "power_param { shift: 1 }", carries=""),
    Case("RNN", "recurrent_param { num_output: 3 }", bottoms="x go", carries="",
         others=image_input(3, 6, name="go"), shape=(3, 6, 4)),
    Case("ReLU", carries=ALL),
    Case("ReLU", "relu_param { negative_slope: 0.3 }", carries=ALL),
    Case("Reduction", "reduction_param { operation: SUM axis: 1 coeff: 2 }"),
    Case("Reduction", "reduction_param { operation: MEAN axis: 2 }"),
    Case("Reduction", "reduction_param { operation: ASUM }"),
    Case("Reduction", "reduction_param { operation: SUMSQ axis: 1 }"),
    Case("Reshape", "reshape_param { shape { dim: 0 dim: -1 } }", carries=ALL),
    Case("Reshape", "reshape_param { shape { dim: 0 dim: 3 dim: 2 dim: -1 } }", carries=ALL),
    Case("Reshape", "reshape_param { shape { dim: 0 dim: 2 dim: -1 } }"),
    Case("Reshape", "reshape_param { shape { dim: -1 dim: 2 dim: 4 } }"),
    Case("Reshape", "reshape_param { shape { dim: 1 } num_axes: 0 }"),
    Case("Reverse", "reverse_param { axis: 0 }", carries=ALL),
    Case("Reverse", "reverse_param { axis: 1 }"),
    Case("Reverse", "reverse_param { axis: 3 }", carries=ALL),
    Case("SPP", "spp_param { pyramid_height: 2 }"),
    Case("SPP", "spp_param { pyramid_height: 1 pool: AVE }"),
    Case("Scale", "scale_param { bias_term: true }", carries=ALL),
    Case("Scale", "scale_param { axis: 2 num_axes: 1 }"),
    Case("Scale", "scale_param { axis: 1 num_axes: -1 }"),
    Case("Scale", "scale_param { axis: 0 }", bottoms=TWO, carries="uniform bottoms"),
    Case("Scale", "scale_param { axis: 0 bias_term: true }", bottoms=TWO,
         carries="uniform bottoms"),
    Case("Sigmoid", carries=""),
    Case("Slice", "slice_param { slice_point: 1 slice_point: 4 }", tops="top two three",
         carries=ALL),
    Case("Slice", "slice_param { slice_dim: 1 }", tops="top two", carries=ALL),
    Case("Slice", "slice_param { axis: 2 }", tops="top two", carries=ALL),
    Case("Slice", "slice_param { axis: 0 }", tops="top two three", carries=ALL),
    Case("Softmax", carries=""),
    Case("Split", tops="top two", carries=ALL),
    Case("Swish", carries=""),
    Case("TanH", carries=""),
    Case("Threshold", careful="true for a threshold of 0 alone, and its gradient is 0", carries=""),
    Case("Threshold", "threshold_param { threshold: 0.5 }", carries=""),
    Case("Tile", "tile_param { tiles: 3 axis: 2 }", carries=ALL),
    Case("Tile", "tile_param { tiles: 3 }"),
]
RUN = [case for case in CASES if case.type in TYPES]  # Caffes differ in a few types


class Outcome(NamedTuple):
    """What the table says of a mode, and what Caffe computes: factors per channel, by top.

    `said` is None where the table's equations forbid the mode; `found` is None where the output
    is no multiple of what it was.
    """
    said: Optional[Dict[str, List[float]]]
    found: Optional[Dict[str, List[float]]]


def scaled_blob(name: str, shape: tuple) -> str:
    """A blob of two blocks of channels, each multiplied by a Scale layer of its own."""
    text = image_input(*shape, name=name + "_raw")
    text += layer(name + "_cut", "Slice", name + "_raw", "%s_a %s_b" % (name, name),
                  "slice_param { slice_point: %d }" % CUT_AT)
    for block in (name + "_a", name + "_b"):
        text += layer(block + "_scaled", "Scale", block)
    return text + layer(name, "Concat", "%s_a_scaled %s_b_scaled" % (name, name))


def net_of(case: Case) -> Any:
    blobs = [name for name in ("x", "y") if name in case.bottoms.split()]
    return parsed("".join(scaled_blob(name, case.shape) for name in blobs) + case.others
                  + layer("layer", case.type, case.bottoms, case.tops, case.parameters))


def graph_of(definition: Any) -> ScaleGraph:
    working = WorkingNet(definition, [])
    working.outputs = []  # so that nothing but the layer holds scales
    fill(working)
    for one in working.layers:
        if one.type == "Scale" and one.name.endswith("_scaled"):
            one.weights[...] = 1
    return ScaleGraph(working)


def feed(case: Case, working: WorkingNet) -> None:
    rng = np.random.default_rng(7)
    for one in working.layers:
        if one.type == "Input":
            data = working.blob(one.tops[0]).data
            data[...] = rng.standard_normal(data.shape)
            if case.positive:
                data[...] = np.abs(data) + 0.1
            if one.name == "index":
                data[...] = (1, 0, 2) if case.type == "BatchReindex" else (1, 0, 1)
            if one.name == "go":
                data[...] = 1


def scales_of(graph: ScaleGraph, mode: str) -> np.ndarray:
    """Values of the free log scales (variables,) that put a mode's scales on x and y."""
    factors = {"uniform": ("s", "s", "s", "s"), "blocks": ("s", "t", "s", "t"),
               "bottoms": ("s", "s", "t", "t")}[mode]
    values = np.full(graph.variables, np.log(0.25))  # of layers with weights: another scale
    for blob, first, second in (("x", *factors[:2]), ("y", *factors[2:])):
        for form, factor in zip([form for _, form in graph.blobs.get(blob, [])], (first, second)):
            for variable in form:
                values[variable] = np.log(STEPS[factor])
    return values


def value(form: Form, log_scales: np.ndarray) -> float:
    return sum(factor * log_scales[variable] for variable, factor in form.items())


def rescaled(case: Case, graph: ScaleGraph, log_scales: np.ndarray) -> WorkingNet:
    """The net with the scales applied, as the table's docstrings say: not by the product's code."""
    definition = net_of(case)
    for one in definition.layer:
        if one.name in graph.adjusted:
            scale = np.exp(value(graph.adjusted[one.name], log_scales))
            one.lrn_param.alpha /= scale ** 2
            one.batch_norm_param.eps *= scale ** 2
    changed = graph_of(definition)
    for one, old in zip(changed.working.layers, graph.working.layers):
        for blob, source in zip(one.blobs, old.blobs):
            blob.data[...] = source.data
        if one.name in graph.adjusted and len(one.blobs):
            scale = np.exp(value(graph.adjusted[one.name], log_scales))
            one.blobs[0].data[...] *= scale
            if one.type == "BatchNorm":
                one.blobs[1].data[...] *= scale ** 2
    for scaled, old in zip(changed.affine, graph.affine):
        weights = affine_view(scaled.layer, scaled.layer.weights, scaled.in_channels)
        out = np.exp(value(old.scale_out, log_scales))
        for block in old.blocks:
            weights[block.groups, :, block.inputs] *= out / np.exp(value(block.scale_in,
                                                                         log_scales))
        if scaled.layer.has_bias:
            scaled.layer.blobs[1].data[...] *= out
    return changed.working


def outputs(case: Case, working: WorkingNet) -> Dict[str, np.ndarray]:
    feed(case, working)
    working.net._forward(0, len(working.layers) - 1)
    return {top: np.array(working.blob(top).data) for top in case.tops.split()}


def factors(before: np.ndarray, after: np.ndarray) -> Optional[List[float]]:
    """By what each channel was multiplied; None where it was not. NaN for channels of zeros."""
    if before.ndim < 2:
        before, after = before.reshape(-1, 1), after.reshape(-1, 1)
    found = []
    for channel in range(before.shape[1]):
        one, two = before[:, channel].astype(np.float64), after[:, channel].astype(np.float64)
        energy = (one * one).sum()
        factor = (one * two).sum() / energy if energy else np.nan
        if energy and not np.allclose(two, factor * one, rtol=1e-3, atol=1e-4 * np.abs(two).max()):
            return None
        if not energy and two.any():
            return None
        found.append(float(factor))
    return found


def outcome(case: Case, mode: str) -> Outcome:
    graph = graph_of(net_of(case))
    log_scales = scales_of(graph, mode)
    said = None
    if all(abs(value(equation, log_scales)) < 1e-9 for equation, _ in graph.equations):
        said = {top: [float(np.exp(value(form, log_scales))) for count, form in graph.blobs[top]
                      for _ in range(count)] for top in case.tops.split()}
    before = outputs(case, graph.working)
    after = outputs(case, rescaled(case, graph, log_scales))
    found: Optional[Dict[str, List[float]]] = {}
    for top in before:
        of_top = factors(before[top], after[top])
        if of_top is None:
            return Outcome(said, None)
        found[top] = of_top
    return Outcome(said, found)


def alone_as_together(case: Case) -> Optional[bool]:
    """Whether every image alone comes to what it does in the batch; None if that is not claimed."""
    definition = net_of(case)
    if not separable(definition.layer):
        return None
    working = graph_of(definition).working
    together = outputs(case, working)
    inputs = [one.tops[0] for one in working.layers if one.type == "Input"]
    images = {name: np.array(working.blob(name).data) for name in inputs}
    for number in range(len(images[inputs[0]])):
        for name in inputs:
            working.blob(name).reshape(1, *images[name].shape[1:])
            working.blob(name).data[...] = images[name][number]
        working.net.reshape()
        working.forward()
        for top, expected in together.items():
            found = working.blob(top).data
            if found.shape[0] != 1 or not np.allclose(found[0], expected[number], atol=1e-5):
                return False
    return True


def all_outcomes() -> Dict[str, Any]:
    """Run every case in every mode, and image by image (in a child: Caffe may abort)."""
    return {case.label: ({mode: outcome(case, mode) for mode in case.modes},
                         alone_as_together(case)) for case in RUN}


@pytest.fixture(scope="module")
def outcomes():
    return in_child(all_outcomes)


def test_every_layer_type_of_this_caffe_is_either_run_here_or_has_a_reason_not_to():
    listed = [SOURCES, CUT, OPEN, {case.type for case in CASES}]
    assert set().union(*listed) >= TYPES
    assert sum(len(part) for part in listed) == len(set().union(*listed))
    assert set(TABLE) <= {case.type for case in CASES} | SOURCES


def test_cases_have_labels_of_their_own():
    assert len({case.label for case in CASES}) == len(CASES)


@pytest.mark.parametrize("kind", sorted(CUT & TYPES))
def test_losses_and_scores_are_cut_off(kind):
    definition = parsed(image_input(1, 3, 4, 4, name="data") + layer("relu", "ReLU", "data")
                        + layer("score", kind, "relu relu"))
    layers, _ = image_layers(definition, 2)
    assert [one.name for one in layers] == ["relu"]
    assert output_blobs(layers) == ["relu"]


@pytest.mark.parametrize("case", RUN, ids=[case.label for case in RUN])
def test_the_table_says_what_the_layer_makes_of_scaled_input(case, outcomes):
    found, _ = outcomes[case.label]
    let_through = [mode for mode in case.modes if found[mode].said is not None]
    assert let_through == case.carries.split()
    for mode in let_through:
        assert found[mode].found is not None, mode
        for top, said in found[mode].said.items():
            measured = np.array(found[mode].found[top])
            assert len(said) == len(measured)
            live = ~np.isnan(measured)
            np.testing.assert_allclose(measured[live], np.array(said)[live], rtol=1e-3)
            assert live.any() or top == "mask"
    if "uniform" not in let_through:
        assert found["uniform"].found is None or case.careful


# Types of which some parameters or bottoms make images meet, or whose first axis is not theirs.
MEETING = {"ArgMax", "BatchReindex", "Clip", "Filter", "LSTM", "LSTMUnit", "RNN", "Reduction",
           "Reverse"}


@pytest.mark.parametrize("case", RUN, ids=[case.label for case in RUN])
def test_what_counts_as_separable_computes_every_image_by_itself(case, outcomes):
    _, alone = outcomes[case.label]
    assert alone is not False
    first_axis = any(word in case.parameters for word in (
        "axis: 0", "dim: -1 dim", "num_axes: 0", "order: 1 order: 0", "{ order: 1 }",
        "use_global_stats: false"))
    from_the_end = "axis: -" in case.parameters and "axis: -1" not in case.parameters
    assert (alone is None) == (case.type in MEETING or first_axis or from_the_end), case.label
