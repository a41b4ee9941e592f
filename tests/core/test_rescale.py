"""Scales that make change rates equal: by hand on chains, on graphs, and written into nets."""
import numpy as np
import pytest
import scipy.optimize
from toy_nets import fill, image_input, layer, parsed, working_net

from ddinit import change_rates, rescale
from ddinit.caffe_net import WorkingNet
from ddinit.change_rates import spread
from ddinit.prototxt import upgrade, working_definition
from ddinit.scales import ScaleGraph

SIZE = 8
IMAGES = 6
DATA = image_input(1, 3, SIZE, SIZE)
CONV = "convolution_param { num_output: %d kernel_size: 3 pad: 1 }"


def conv(name, bottom, outputs=4, top=""):
    return layer(name, "Convolution", bottom, top, CONV % outputs)


def fully(name, bottom, outputs=3):
    return layer(name, "InnerProduct", bottom, "", "inner_product_param { num_output: %d }"
                 % outputs)


def in_place(name, kind, blob, parameters=""):
    return layer(name, kind, blob, blob, parameters)


def uneven(text, factors=None):
    """A working net with weights times powers of 3 (or `factors`), run on random images."""
    working = working_net(DATA + text, IMAGES)
    for number, one in enumerate(working.affine):
        factor = 3.0 ** (number % 4) if factors is None else factors[number]
        one.weights[...] *= factor / np.sqrt(one.weights.size)
    run(working)
    return working


def run(working, seed=5):
    working.blob("data").data[...] = np.random.default_rng(seed).standard_normal(
        working.blob("data").data.shape)
    working.forward()


def measured(graph, seed=6):
    return change_rates.measure(graph, np.random.default_rng(seed))


def names_of(graph):
    return {scaled.layer.name for scaled in graph.affine}


def held(working):
    return {name: np.array(working.blob(name).data) for name in working.outputs}


CHAIN = (conv("one", "data") + in_place("r1", "ReLU", "one")
         + layer("pool", "Pooling", "one", "", "pooling_param { kernel_size: 2 stride: 2 }")
         + conv("two", "pool", 6) + in_place("r2", "ReLU", "two") + fully("three", "two", 10)
         + in_place("r3", "PReLU", "three") + fully("four", "three"))


# ---------------------------------------------------------------------------------------------
# A homogeneous chain: Algorithm 2 in closed form
# ---------------------------------------------------------------------------------------------

def test_a_chain_gets_the_paragraphs_factors_in_one_step_and_keeps_its_function():
    working = uneven(CHAIN)
    graph, before = ScaleGraph(working), held(working)
    weights = [one.weights.copy() for one in working.affine]
    biases = [one.blobs[1].data.copy() for one in working.affine]
    rates = measured(graph)
    assert spread(rates.by_layer()) > 5
    solution = rescale.solve(graph, rates, names_of(graph))
    assert solution.auxiliary == []
    rescale.apply_to_weights(graph, solution.log_scales)
    expected = np.sqrt(rates.by_layer() / np.exp(np.log(rates.by_layer()).mean()))
    found = [one.weights.ravel()[0] / old.ravel()[0] for one, old in zip(working.affine, weights)]
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    np.testing.assert_allclose(np.prod(found), 1, rtol=1e-4)
    for one, old, product in zip(working.affine, biases, np.cumprod(found)):
        np.testing.assert_allclose(one.blobs[1].data, old * product, rtol=1e-4)
    run(working)
    assert rescale.worst_difference(before, held(working)) < 1e-5
    np.testing.assert_allclose(measured(graph).by_layer(), np.exp(np.log(rates.by_layer()).mean()),
                               rtol=1e-3)


def test_the_papers_schedule_comes_to_the_same_scales():
    working = uneven(CHAIN)
    graph = ScaleGraph(working)
    rates = first = measured(graph)
    at_once = rescale.solve(graph, rates, set()).log_scales
    total = np.zeros(graph.variables)
    for _ in range(10):
        step = 0.25 * rescale.solve(graph, rates, set()).log_scales
        rescale.apply_to_weights(graph, step)
        total += step
        run(working)
        rates = measured(graph)
    left = 0.75 ** 10  # r_k = (C_k / C)^(alpha / 2) leaves 1 - alpha of each log rate
    np.testing.assert_allclose(total, at_once * (1 - left), atol=2e-3)
    np.testing.assert_allclose(np.log(spread(rates.by_layer())),
                               left * np.log(spread(first.by_layer())), atol=2e-3)


def test_equal_rates_stay_as_they_are():
    working = uneven(CHAIN)
    graph = ScaleGraph(working)
    rescale.apply_to_weights(graph, rescale.solve(graph, measured(graph), set()).log_scales)
    run(working)
    again = rescale.solve(graph, measured(graph), names_of(graph))
    assert again.auxiliary == []
    np.testing.assert_allclose(again.log_scales, 0, atol=1e-3)


def test_a_layer_without_gradient_does_not_count():
    working = uneven(CHAIN)
    working.affine[0].weights[...] = 0
    working.affine[0].blobs[1].data[...] = 1
    run(working)
    graph, before = ScaleGraph(working), held(working)
    solution = rescale.solve(graph, measured(graph), names_of(graph))
    rescale.apply_to_weights(graph, solution.log_scales)
    run(working)
    assert rescale.worst_difference(before, held(working)) < 1e-5
    assert spread(measured(graph).by_layer()) < 1.01


def test_a_net_without_any_gradient_stays_as_it_is():
    working = uneven(CHAIN)
    for one in working.affine:
        one.weights[...] = 0
    graph = ScaleGraph(working)
    solution = rescale.solve(graph, measured(graph), names_of(graph))
    assert not solution.log_scales.any() and solution.auxiliary == []


# ---------------------------------------------------------------------------------------------
# Graphs
# ---------------------------------------------------------------------------------------------

INCEPTION = (conv("stem", "data", 4) + in_place("r", "ReLU", "stem") + conv("a", "stem", 3)
             + in_place("ra", "ReLU", "a") + conv("b1", "stem", 2) + conv("b", "b1", 5)
             + in_place("rb", "ReLU", "b") + layer("cat", "Concat", "a b")
             + layer("pool", "Pooling", "cat", "", "pooling_param { kernel_size: 2 stride: 2 }")
             + conv("top", "pool", 6) + fully("end", "top"))
RESIDUAL = (conv("stem", "data") + in_place("rs", "ReLU", "stem") + conv("x", "stem")
            + in_place("bn", "BatchNorm", "x")
            + in_place("sc", "Scale", "x", "scale_param { bias_term: true }")
            + in_place("rx", "ReLU", "x") + conv("y", "x") + layer("sum", "Eltwise", "stem y")
            + in_place("rr", "ReLU", "sum") + fully("end", "sum"))
TWO_ON_ONE = conv("stem", "data") + in_place("r", "ReLU", "stem") + conv("box", "stem", 2) \
    + fully("class", "stem", 5)
SIGMOID = conv("one", "data") + in_place("s1", "Sigmoid", "one") + conv("two", "one") \
    + in_place("s2", "Sigmoid", "two") + fully("three", "two")


def solved_and_applied(text, may_divide=None):
    """The rescaled net as its definition would be written, its solution and what changed; and
    what the net's outputs were before."""
    working = uneven(text)
    before = held(working)
    graph = ScaleGraph(working)
    solution = rescale.solve(graph, measured(graph), names_of(graph) if may_divide is None
                             else may_divide)
    rescale.apply_to_weights(graph, solution.log_scales)
    definition = upgrade(parsed(DATA + text))
    changes = rescale.apply_to_definition(definition, graph, solution)
    other = WorkingNet(*working_definition(definition, IMAGES))
    old = {one.name: one for one in working.layers}
    for one in other.affine + [one for one in other.layers if one.type in ("BatchNorm", "PReLU")]:
        for number, blob in enumerate(one.blobs):
            blob.data[...] = old[one.name].blobs[number].data
    run(other)
    assert rescale.worst_difference(before, held(other)) < 1e-4
    return other, solution, changes


@pytest.mark.parametrize("text, auxiliary, goal", [
    (CHAIN, 0, 1.01),
    (INCEPTION, 0, 1.2),
    (conv("a", "data") + conv("b", "data") + layer("sum", "Eltwise", "a b") + fully("end", "sum"),
     None, 1.2),
    (TWO_ON_ONE, 1, 1.2),
    (SIGMOID, 2, 1.2),
    (RESIDUAL, None, 1.2),
    (conv("a", "data") + layer("n", "LRN", "a", "", "lrn_param { local_size: 3 alpha: 3 }")
     + conv("b", "n") + fully("c", "b"), 0, 1.01),
    (conv("a", "data") + layer("s", "Slice", "a", "s1 s2", "slice_param { slice_point: 1 }")
     + conv("b", "s1") + conv("c", "s2") + layer("m", "Eltwise", "b c", "", "eltwise_param { "
                                                 "operation: MAX }") + fully("d", "m"), None, 1.2),
    (conv("a", "data") + layer("k", "Deconvolution", "a", "", CONV % 4)
     + layer("p", "InnerProduct", "k", "", "inner_product_param { num_output: 5 transpose: true }")
     + fully("d", "p"), 0, 1.05),
], ids=["chain", "concat", "sum", "two outputs on one blob", "sigmoids", "residual", "LRN",
        "slice and maximum", "deconvolution, transposed"])
def test_graphs_get_one_rate_by_the_fewest_power_layers_and_compute_the_same(text, auxiliary, goal):
    assert spread(measured(ScaleGraph(uneven(text))).by_layer()) > 2
    other, solution, changes = solved_and_applied(text)
    assert spread(measured(ScaleGraph(other)).by_layer()) < goal
    powers = [one for one in other.layers if one.type == "Power"]
    assert len(powers) == len(solution.auxiliary)
    assert sum("Power" in line for line in changes) == len(powers)
    if auxiliary is not None:
        assert len(powers) == auxiliary
    for name in solution.auxiliary[:1]:  # and one fewer would not have done
        worse, _, _ = solved_and_applied(text, set(solution.auxiliary) - {name})
        assert spread(measured(ScaleGraph(worse)).by_layer()) > rescale.GOAL


def test_without_power_layers_rates_that_are_held_apart_are_left_apart():
    other, solution, changes = solved_and_applied(TWO_ON_ONE, set())
    assert solution.auxiliary == [] and changes == []
    assert spread(measured(ScaleGraph(other)).by_layer()) > rescale.GOAL


def test_blocks_of_a_concat_have_scales_of_their_own_that_weigh_against_layers_rates(monkeypatch):
    graph = ScaleGraph(uneven(INCEPTION))
    rates = measured(graph)
    top = next(scaled for scaled in graph.affine if scaled.layer.name == "top")
    pairs = [number for number, owner in enumerate(rates.layer)
             if graph.owners()[owner] is top]
    found = []
    for weight in (0.01, 10):
        monkeypatch.setattr(rescale, "BLOCK_WEIGHT", weight)
        scales = rescale.solve(graph, rates, set()).log_scales
        first, second = [rescale.value(block.scale_in, scales) for block in top.blocks]
        assert abs(first - second) > 0.1
        after = rescale.changed_rates(graph, rates, scales)
        found.append((spread(after.by_layer()), spread(after.by_pair()[pairs])))
    assert found[0][0] < found[1][0] and found[0][1] > found[1][1]


def test_weights_that_layers_share_get_one_factor():
    shared = "param { name: 'w' } param { name: 'b' } "
    working = uneven(conv("p", "data") + conv("q", "data")
                     + layer("a", "Convolution", "p", "", shared + CONV % 4)
                     + layer("b", "Convolution", "q", "", shared + CONV % 4)
                     + layer("cat", "Concat", "a b") + fully("end", "cat"), [1, 3, 1, 1, 9])
    before = held(working)
    graph = ScaleGraph(working)
    rates = measured(graph)
    assert len(rates.by_layer()) == 4
    solution = rescale.solve(graph, rates, set())
    weights = working.affine[2].weights.copy()
    rescale.apply_to_weights(graph, solution.log_scales)
    factor = working.affine[2].weights / weights
    np.testing.assert_allclose(factor, factor.flat[0], rtol=1e-5)
    np.testing.assert_array_equal(working.affine[2].weights, working.affine[3].weights)
    run(working)
    assert rescale.worst_difference(before, held(working)) < 1e-5


@pytest.mark.parametrize("text", [CHAIN, INCEPTION, TWO_ON_ONE, RESIDUAL],
                         ids=["chain", "concat", "two outputs", "residual"])
@pytest.mark.parametrize("free_outputs", [False, True])
def test_the_jacobian_is_that_of_finite_differences(text, free_outputs):
    graph = ScaleGraph(uneven(text), free_outputs=free_outputs)
    problem = rescale._Problem(graph, measured(graph))
    point = 0.5 * np.random.default_rng(1).standard_normal(graph.variables)
    columns = [(problem._residuals(point + step) - problem._residuals(point - step)) / 2e-5
               for step in 1e-5 * np.eye(graph.variables)]
    np.testing.assert_allclose(problem._jacobian(point), np.array(columns).T, atol=1e-6)


def test_the_solution_has_the_least_cost():
    working = uneven(INCEPTION)
    graph = ScaleGraph(working)
    problem = rescale._Problem(graph, measured(graph))
    basis = problem._free_directions([])
    found = basis.T @ rescale.solve(graph, problem.rates, set()).log_scales
    other = scipy.optimize.minimize(lambda free: problem.cost(basis @ free),
                                    np.full(len(found), 0.3), tol=1e-10)
    assert problem.cost(basis @ found) < other.fun + 1e-6
    np.testing.assert_allclose(found, other.x, atol=1e-2)


# ---------------------------------------------------------------------------------------------
# From scratch: definitions stay as they are
# ---------------------------------------------------------------------------------------------

NORMALISED = (conv("a", "data") + in_place("ra", "ReLU", "a")
              + layer("na", "LRN", "a", "", "lrn_param { local_size: 3 alpha: 0.5 beta: 0.75 }")
              + conv("b", "na") + in_place("rb", "ReLU", "b")
              + layer("nb", "LRN", "b", "", "lrn_param { local_size: 3 alpha: 2 k: 2 }")
              + conv("c", "nb") + fully("end", "c"))


def test_response_normalisation_is_measured_again_until_rates_are_equal():
    working = uneven(NORMALISED)
    assert spread(measured(rescale.from_scratch(working)).by_layer()) > 3
    spreads = []
    for turn in range(4):
        step = rescale.solve_from_scratch(working, measured(rescale.from_scratch(working), turn))
        rescale.apply_to_weights(step.graph, step.log_scales)
        run(working)
        spreads.append(spread(measured(rescale.from_scratch(working), turn).by_layer()))
    assert spreads[-1] < 1.05
    assert step.at_response < rescale.solve_from_scratch(
        uneven(NORMALISED), measured(rescale.from_scratch(uneven(NORMALISED)))).at_response


def test_the_degree_of_response_normalisation_is_caffes():
    working = uneven(NORMALISED)
    gain = rescale.ResponseGain(working)
    before = working.blob("na").data.astype(np.float64)
    energy = (before ** 2).sum()
    working.blob("a").data[...] *= np.exp(0.1)
    number = next(one.position for one in working.layers if one.name == "na")
    working.net._forward(number, number)
    after = working.blob("na").data.astype(np.float64)
    found = 0.5 * np.log((after ** 2).sum() / energy) / 0.1
    assert 0.3 < found < 0.97
    np.testing.assert_allclose(gain.degrees()["na"], found, atol=0.1)


def test_outputs_of_a_net_from_scratch_move_where_they_pull_apart():
    working = uneven(TWO_ON_ONE)
    before = held(working)
    graph = rescale.from_scratch(working)
    assert graph.free_outputs
    rates = measured(graph)
    step = rescale.solve_from_scratch(working, rates)
    rescale.apply_to_weights(step.graph, step.log_scales)
    run(working)
    after = held(working)
    main, other = working.outputs[-1], working.outputs[0]
    np.testing.assert_allclose(after[main], before[main], rtol=1e-4, atol=1e-6)
    assert abs(np.log(after[other].std() / before[other].std())) > 0.1
    # not wholly equal: OUTPUT_WEIGHT keeps outputs near their scale
    assert spread(measured(graph).by_layer()) < 0.1 * spread(rates.by_layer())


def test_the_single_output_of_a_net_from_scratch_stays():
    working = uneven(CHAIN)
    before = held(working)
    step = rescale.solve_from_scratch(working, measured(rescale.from_scratch(working)))
    assert step.at_response == 0
    rescale.apply_to_weights(step.graph, step.log_scales)
    run(working)
    assert rescale.worst_difference(before, held(working)) < 1e-5


# ---------------------------------------------------------------------------------------------
# Applying by hand
# ---------------------------------------------------------------------------------------------

def applied(text, scales, auxiliary=()):
    """A definition changed for blobs with scales {affine layer: scale}, and the lines about it."""
    working = working_net(DATA + text, IMAGES)
    graph = ScaleGraph(working)
    log_scales = np.zeros(graph.variables)
    for scaled in graph.affine:
        forms = (scaled.weight_scale,) if scaled.layer.name in auxiliary else (
            scaled.weight_scale, scaled.scale_out)
        for form in forms:
            log_scales[list(form)] = np.log(scales.get(scaled.layer.name, 1.0))
    definition = upgrade(parsed(DATA + text))
    lines = rescale.apply_to_definition(definition, graph,
                                        rescale.Solution(log_scales, list(auxiliary)))
    return {one.name: one for one in definition.layer}, lines


def test_alpha_and_eps_follow_the_scale_of_what_comes_in():
    text = conv("a", "data") + layer("n", "LRN", "a", "", "lrn_param { alpha: 8 }") \
        + conv("b", "n") + layer("m", "BatchNorm", "b", "", "batch_norm_param { eps: 0.5 }") \
        + fully("c", "m")
    layers, lines = applied(text, {"a": 2.0, "b": 3.0})
    assert layers["n"].lrn_param.alpha == 2  # 8 / 2^2
    np.testing.assert_allclose(layers["m"].batch_norm_param.eps, 4.5)  # 0.5 * 3^2
    assert len(lines) == 2
    assert "'n'" in lines[0] and "8 -> 2" in lines[0]
    assert "'m'" in lines[1] and "0.5 -> 4.5" in lines[1]


def test_nothing_is_changed_where_scales_are_1():
    text = conv("a", "data") + layer("n", "LRN", "a") + fully("c", "n")
    layers, lines = applied(text, {})
    assert lines == []
    assert list(layers.values()) == list(upgrade(parsed(DATA + text)).layer)


def test_statistics_of_batch_normalisation_follow_the_scale():
    working = working_net(DATA + conv("a", "data") + in_place("m", "BatchNorm", "a")
                          + fully("c", "a"), IMAGES)
    graph = ScaleGraph(working)
    mean, variance, correction = [blob.data.copy() for blob in working.layers[2].blobs]
    log_scales = np.zeros(graph.variables)
    for form in (graph.affine[0].weight_scale, graph.affine[0].scale_out):
        log_scales[list(form)] = np.log(4)
    rescale.apply_to_weights(graph, log_scales)
    found = [blob.data for blob in working.layers[2].blobs]
    np.testing.assert_allclose(found[0], 4 * mean, rtol=1e-6)
    np.testing.assert_allclose(found[1], 16 * variance, rtol=1e-6)
    np.testing.assert_array_equal(found[2], correction)


def test_a_power_layer_leaves_the_blobs_name_to_those_who_read_it():
    text = conv("a", "data") + in_place("s", "Sigmoid", "a") + fully("b", "a")
    layers, lines = applied(text, {"a": 4.0}, ["a"])
    assert list(layers) == ["data", "a", "a_rescale", "s", "b"]
    assert layers["a"].top == ["a_unscaled"]
    power = layers["a_rescale"]
    assert (power.type, power.bottom, power.top) == ("Power", ["a_unscaled"], ["a"])
    assert power.power_param.scale == 0.25
    assert (power.power_param.power, power.power_param.shift) == (1, 0)
    assert (layers["s"].bottom, layers["s"].top, layers["b"].bottom) == (["a"], ["a"], ["a"])
    assert lines == ["layer 'a': new Power layer 'a_rescale' behind it multiplies by 0.25, so that "
                     "its weights can have the scale that gives them their rate"]


def test_a_power_layer_behind_an_in_place_layer_renames_the_blob_below_it():
    text = conv("a", "data") + in_place("k", "Scale", "a") + in_place("s", "Sigmoid", "a") \
        + fully("b", "a")
    layers, _ = applied(text, {"k": 2.0}, ["k"])
    assert list(layers) == ["data", "a", "k", "k_rescale", "s", "b"]
    assert (layers["a"].top, layers["k"].bottom, layers["k"].top) == (
        ["a_unscaled"], ["a_unscaled"], ["a_unscaled"])
    assert (layers["k_rescale"].bottom, layers["k_rescale"].top) == (["a_unscaled"], ["a"])
    assert (layers["s"].bottom, layers["b"].bottom) == (["a"], ["a"])


def test_every_top_of_a_layer_gets_its_power_layer():
    text = layer("copy", "AbsVal", "data") + layer("a", "Convolution", "data copy", "p q", CONV % 2)
    layers, lines = applied(text, {"a": 2.0}, ["a"])
    assert [one for one in layers if "rescale" in one] == ["a_rescale", "a_rescale_1"]
    assert (layers["a_rescale"].top, layers["a_rescale_1"].top) == (["p"], ["q"])
    assert layers["a"].top == ["p_unscaled", "q_unscaled"]
    assert len(lines) == 2


def test_names_that_the_definition_has_already_are_not_taken_twice():
    text = conv("a", "data", top="a_unscaled") + layer("a_rescale", "Sigmoid", "a_unscaled", "a") \
        + conv("b", "a") + in_place("s", "Sigmoid", "b") + fully("c", "b")
    layers, _ = applied(text, {"a": 2.0, "b": 2.0}, ["a", "b"])
    assert len(layers) == 8  # all names differ
    tops = [top for one in layers.values() for top in one.top if one.name != "s"]
    assert len(set(tops)) == len(tops)


def test_scales_beyond_float32_are_an_error():
    working = uneven(CHAIN)
    with pytest.raises(ValueError, match="float32"):
        rescale.apply_to_weights(ScaleGraph(working), np.full(ScaleGraph(working).variables, 99.0))
    with pytest.raises(ValueError, match="float32"):
        rescale.apply_to_weights(ScaleGraph(working), np.full(ScaleGraph(working).variables,
                                                              np.nan))


def test_the_worst_difference_is_over_the_std_of_each_output():
    expected = {"a": np.array([0.0, 2.0]), "b": np.array([0.0, 20.0])}  # std 1 and 10
    assert rescale.worst_difference(expected, expected) == 0
    assert rescale.worst_difference(
        expected, {"a": np.array([0.0, 2.5]), "b": np.array([3.0, 20.0])}) == 0.5
    nan = rescale.worst_difference(expected, {"a": np.array([np.nan, 2.0]), "b": expected["b"]})
    assert not nan <= 1e-3
    constant = {"a": np.ones(3)}
    assert rescale.worst_difference(constant, constant) == 0
    assert rescale.worst_difference(constant, {"a": np.array([1.0, 1.0, 2.0])}) == np.inf


def test_filled_nets_repeat():
    """What these tests stand on: the same numbers in nets of one definition."""
    one, two = uneven(CHAIN), uneven(CHAIN)
    np.testing.assert_array_equal(one.affine[1].weights, two.affine[1].weights)
    fill(two)
    assert (one.affine[1].weights != two.affine[1].weights).any()
