"""Scales that make change rates equal: by hand on chains, on graphs, and written into nets."""
import re

import numpy as np
import pytest
import scipy.optimize
from toy_nets import (
    fill,
    free_scales,
    held_batches,
    image_input,
    layer,
    net_of,
    parsed,
    working_net,
)

from ddinit import between
from ddinit.between import Options, Solution, apply_to_weights, solve, value
from ddinit.change_rates import measure, spread
from ddinit.prototxt import upgrade
from ddinit.rewrite import rewritten, worst_difference
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


def pictures(count=1, seed=5):
    """Batches of random images, of a contrast that differs from batch to batch."""
    rng = np.random.default_rng(seed)
    contrast = np.array([1, 3, 0.5, 2, 1])[:count].reshape(-1, 1, 1, 1, 1)
    return held_batches(*contrast * rng.standard_normal((count, IMAGES, 3, SIZE, SIZE)))


def alike(count, seed=5):
    """Batches of random images of one contrast."""
    return held_batches(*np.random.default_rng(seed).standard_normal(
        (count, IMAGES, 3, SIZE, SIZE)))


def uneven(text, factors=None):
    """A working net with weights times powers of 3 (or `factors`), run on random images."""
    working = working_net(DATA + text, IMAGES)
    for number, one in enumerate(working.affine):
        factor = 3.0 ** (number % 4) if factors is None else factors[number]
        one.weights[...] *= factor / np.sqrt(one.weights.size)
    run(working)
    return working


def run(working, seed=5):
    working.load(pictures(1, seed), 0)
    working.forward()


def measured(working, seed=6, **options):
    """Rates with the same losses each time: what a rescaling foretells is then exact."""
    return measure(working, pictures(), [0], np.random.default_rng(seed), **options)


def equalize(working, batches, seed=6, **options):
    return between.equalize(working, batches, batches.count, np.random.default_rng(seed),
                            Options(**options))


def rates_of(working, seed=6):
    return np.array(list(measured(working, seed).by_layer().values()))


def spread_of(working, seed=6):
    return spread(measured(working, seed).by_layer())


def names_of(graph):
    return [scaled.layer.name for scaled in graph.affine]


def held(working):
    return {name: np.array(working.blob(name).data) for name in working.outputs}


CHAIN = (conv("one", "data") + in_place("r1", "ReLU", "one")
         + layer("pool", "Pooling", "one", "", "pooling_param { kernel_size: 2 stride: 2 }")
         + conv("two", "pool", 6) + in_place("r2", "ReLU", "two") + fully("three", "two", 10)
         + in_place("r3", "PReLU", "three") + fully("four", "three"))


# ---------------------------------------------------------------------------------------------
# A homogeneous chain: Algorithm 2 as the paper writes it
# ---------------------------------------------------------------------------------------------

def papers_step(working, rates, alpha):
    """One turn of Algorithm 2 on a chain, on plain arrays: r_k = (C_k / C)^(alpha / 2).

    Layer k's weights and biases are multiplied by the scale that its output gets, and what the
    layers below were multiplied by is divided out of the weights above.
    """
    factors = (rates / np.exp(np.log(rates).mean())) ** (alpha / 2)
    scale = 1.0
    for one, factor in zip(working.affine, factors):
        one.weights[...] *= scale * factor / scale
        scale *= factor
        one.blobs[1].data[...] *= scale
    np.testing.assert_allclose(scale, 1, rtol=1e-5)  # so that the output stays as it was


def test_a_chain_gets_the_papers_factors_in_one_step_and_keeps_its_function():
    working, plain = uneven(CHAIN), uneven(CHAIN)
    graph, before = ScaleGraph(working), held(working)
    rates = rates_of(working)
    assert rates.max() / rates.min() > 5
    solution = solve(graph, measured(working), names_of(graph))
    assert solution.auxiliary == []
    apply_to_weights(graph, solution.log_scales)
    papers_step(plain, rates, 1.0)
    for one, other in zip(working.affine, plain.affine):
        for blob, expected in zip(one.blobs, other.blobs):
            np.testing.assert_allclose(blob.data, expected.data, rtol=1e-4)
    run(working)
    assert worst_difference(before, held(working)) < 1e-5
    np.testing.assert_allclose(rates_of(working), np.exp(np.log(rates).mean()), rtol=1e-3)


def test_ten_steps_of_a_quarter_are_the_papers_and_leave_what_they_must():
    working, plain = uneven(CHAIN), uneven(CHAIN)
    before = held(working)
    first = spread_of(working)
    equalize(working, pictures(), alpha=0.25, iterations=10)
    rng = np.random.default_rng(6)
    for _ in range(10):
        rates = measure(plain, pictures(), [0], rng).by_layer()
        papers_step(plain, np.array(list(rates.values())), 0.25)
    for one, other in zip(working.affine, plain.affine):
        np.testing.assert_allclose(one.weights, other.weights, rtol=2e-3)
    run(working)
    assert worst_difference(before, held(working)) < 1e-4
    # r_k = (C_k / C)^(alpha / 2) leaves 1 - alpha of each log rate, but for the losses' noise
    np.testing.assert_allclose(np.log(spread_of(working)), 0.75 ** 10 * np.log(first), atol=0.3)


@pytest.mark.parametrize("outputs", [3, 60])
@pytest.mark.parametrize("alpha", [1.0, 0.25])
def test_a_chain_from_scratch_keeps_its_outputs_whatever_batches_the_steps_see(alpha, outputs):
    """Batches differ in what the net makes of them; this must not change the net."""
    working = uneven(CHAIN.replace("num_output: 3", "num_output: %d" % outputs))
    before = held(working)
    equalize(working, pictures(5), alpha=alpha)
    run(working)
    assert worst_difference(before, held(working)) < 1e-3


def test_equal_rates_stay_as_they_are():
    working = uneven(CHAIN)
    graph = ScaleGraph(working)
    apply_to_weights(graph, solve(graph, measured(working)).log_scales)
    run(working)
    again = solve(graph, measured(working), names_of(graph))
    assert again.auxiliary == []
    np.testing.assert_allclose(again.log_scales, 0, atol=1e-3)


def test_a_layer_without_gradient_does_not_count():
    working = uneven(CHAIN)
    working.affine[0].weights[...] = 0
    working.affine[0].blobs[1].data[...] = 1
    run(working)
    graph, before = ScaleGraph(working), held(working)
    apply_to_weights(graph, solve(graph, measured(working), names_of(graph)).log_scales)
    run(working)
    assert worst_difference(before, held(working)) < 1e-5
    assert spread_of(working) < 1.01


def test_a_net_without_any_gradient_stays_as_it_is():
    working = uneven(CHAIN)
    for one in working.affine:
        one.weights[...] = 0
    graph = ScaleGraph(working)
    solution = solve(graph, measured(working), names_of(graph))
    assert not solution.log_scales.any() and solution.auxiliary == []


def test_equation_2_to_the_letter_is_made_equal_where_it_is_asked_for():
    working = uneven(CHAIN)
    graph = ScaleGraph(working)
    rates = measured(working, literal=True)
    apply_to_weights(graph, solve(graph, rates, names_of(graph)).log_scales)
    assert spread(measured(working, literal=True).by_layer()) < 1.01
    # of weights' mean square, rates then lie apart by the root of the numbers of weights
    sizes = np.array([one.weights.size for one in working.affine])
    found = rates_of(working) / np.sqrt(sizes)
    np.testing.assert_allclose(found, found[0], rtol=1e-2)


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
    """The rescaled net as its definition would be written, its solution and what changed."""
    working = uneven(text)
    before = held(working)
    graph = ScaleGraph(working)
    solution = solve(graph, measured(working), names_of(graph) if may_divide is None
                     else may_divide)
    apply_to_weights(graph, solution.log_scales)
    definition, changes = rewritten(upgrade(parsed(DATA + text)), graph, solution)
    other = net_of(definition, IMAGES)
    old = {one.name: one for one in working.layers}
    for one in other.layers:
        for number, blob in enumerate(one.blobs):
            blob.data[...] = old[one.name].blobs[number].data
    run(other)
    assert worst_difference(before, held(other)) < 1e-4
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
    assert spread_of(uneven(text)) > 2
    other, solution, changes = solved_and_applied(text)
    assert spread_of(other) < goal
    powers = [one for one in other.layers if one.type == "Power"]
    assert len(powers) == len(solution.auxiliary)
    assert sum("Power" in line for line in changes) == len(powers)
    if auxiliary is not None:
        assert len(powers) == auxiliary
    for name in solution.auxiliary[:1]:  # and one fewer would not have done
        worse, _, _ = solved_and_applied(
            text, [one for one in solution.auxiliary if one != name])
        assert spread_of(worse) > between.GOAL


def test_without_power_layers_rates_that_are_held_apart_are_left_apart():
    other, solution, changes = solved_and_applied(TWO_ON_ONE, [])
    assert solution.auxiliary == [] and changes == []
    assert spread_of(other) > between.GOAL


def block_rates(rates, name, counts):
    """The rates of a layer's runs of input channels, of so many channels each."""
    number = rates.layers.index(name)
    gradients = rates.gradients[number].sum(axis=0).ravel()
    edges = np.cumsum(counts)[:-1]
    return np.sqrt([part.sum() / weights.sum() for part, weights in zip(
        np.split(gradients, edges), np.split(rates.weights[number].ravel(), edges))])


def test_blocks_of_a_concat_have_scales_of_their_own_that_weigh_against_layers_rates(monkeypatch):
    found = []
    for weight in (0.01, 10):
        monkeypatch.setattr(between, "BLOCK_WEIGHT", weight)
        working = uneven(INCEPTION)
        graph = ScaleGraph(working)
        scales = solve(graph, measured(working)).log_scales
        top = next(scaled for scaled in graph.affine if scaled.layer.name == "top")
        first, second = [value(block.scale_in, scales) for block in top.blocks]
        assert abs(first - second) > 0.1
        apply_to_weights(graph, scales)
        after = measured(working)
        blocks = block_rates(after, "top", (3, 5))
        found.append((spread(after.by_layer()), blocks.max() / blocks.min()))
    assert found[0][0] < found[1][0] and found[0][1] > found[1][1]


def test_weights_that_layers_share_get_one_factor():
    shared = "param { name: 'w' } param { name: 'b' } "
    working = uneven(conv("p", "data") + conv("q", "data")
                     + layer("a", "Convolution", "p", "", shared + CONV % 4)
                     + layer("b", "Convolution", "q", "", shared + CONV % 4)
                     + layer("cat", "Concat", "a b") + fully("end", "cat"), [1, 3, 1, 1, 9])
    before = held(working)
    graph = ScaleGraph(working)
    rates = measured(working)
    assert list(rates.by_layer()) == ["p", "q", "a", "end"]
    weights = working.affine[2].weights.copy()
    apply_to_weights(graph, solve(graph, rates).log_scales)
    factor = working.affine[2].weights / weights
    np.testing.assert_allclose(factor, factor.flat[0], rtol=1e-5)
    np.testing.assert_array_equal(working.affine[2].weights, working.affine[3].weights)
    run(working)
    assert worst_difference(before, held(working)) < 1e-5


@pytest.mark.parametrize("text", [CHAIN, INCEPTION, TWO_ON_ONE, RESIDUAL],
                         ids=["chain", "concat", "two outputs", "residual"])
@pytest.mark.parametrize("free_outputs", [False, True])
def test_the_jacobian_is_that_of_finite_differences(text, free_outputs):
    working = uneven(text)
    graph = ScaleGraph(working, free_outputs=free_outputs)
    problem = between._Problem(graph, measured(working, by_output=free_outputs))
    point = 0.5 * np.random.default_rng(1).standard_normal(graph.variables)
    columns = [(problem._residuals(point + step) - problem._residuals(point - step)) / 2e-5
               for step in 1e-5 * np.eye(graph.variables)]
    np.testing.assert_allclose(problem._jacobian(point), np.array(columns).T, atol=1e-6)


def test_the_solution_has_the_least_cost():
    working = uneven(INCEPTION)
    graph = ScaleGraph(working)
    rates = measured(working)
    problem = between._Problem(graph, rates)
    basis = problem._basis([])
    found = basis.T @ solve(graph, rates).log_scales
    other = scipy.optimize.minimize(lambda free: problem.cost(basis @ free),
                                    np.full(len(found), 0.3), tol=1e-10)
    assert problem.cost(basis @ found) < other.fun + 1e-6
    np.testing.assert_allclose(found, other.x, atol=1e-2)


def test_the_gain_of_a_power_layer_is_what_it_lowers_the_cost_by():
    """Nearly: the cost is linearized, and a Sigmoid's layers gain the most."""
    working = uneven(SIGMOID)
    graph = ScaleGraph(working)
    problem = between._Problem(graph, measured(working))
    at = problem.minimize([], problem.start([]))
    gains = problem.gains(at, [], names_of(graph))
    for name, gain in gains.items():
        lowered = problem.cost(at) - problem.cost(problem.minimize([name], at))
        assert gain == pytest.approx(lowered, rel=0.5, abs=1e-6)
    assert max(gains.values()) > 0


@pytest.mark.parametrize("text, free_outputs", [
    (INCEPTION, False), (TWO_ON_ONE, False), (TWO_ON_ONE, True)],
    ids=["blocks", "outputs kept", "outputs may move"])
def test_foretold_rates_are_those_of_the_rescaled_net_with_the_same_losses(text, free_outputs):
    working = uneven(text)
    graph = ScaleGraph(working, free_outputs=free_outputs)
    problem = between._Problem(graph, measured(working, by_output=free_outputs))
    basis = free_scales(graph)
    log_scales = basis @ np.random.default_rng(2).uniform(-1, 1, basis.shape[1])
    foretold = np.exp(problem._log_rates(log_scales)[0])
    assert np.ptp(np.log(foretold / rates_of(working))) > 0.3
    apply_to_weights(graph, log_scales)
    found = list(measured(working, by_output=free_outputs).by_layer().values())
    np.testing.assert_allclose(foretold, found, rtol=2e-3)


# ---------------------------------------------------------------------------------------------
# From scratch: definitions stay as they are
# ---------------------------------------------------------------------------------------------

NORMALIZED = (conv("a", "data") + in_place("ra", "ReLU", "a")
              + layer("na", "LRN", "a", "", "lrn_param { local_size: 3 alpha: 0.5 beta: 0.75 }")
              + conv("b", "na") + in_place("rb", "ReLU", "b")
              + layer("nb", "LRN", "b", "", "lrn_param { local_size: 3 alpha: 2 k: 2 }")
              + conv("c", "nb") + fully("end", "c", 60))


def test_steps_settle_a_net_with_response_normalization(monkeypatch):
    monkeypatch.setattr(between, "LAST_BATCHES", 40)  # so that the losses' noise is small
    batches = alike(80)
    for seed in range(3):
        working = uneven(NORMALIZED)
        assert spread_of(working) > 3
        equalize(working, batches, seed)
        judged = measure(working, batches, list(range(20)) * 2, np.random.default_rng(7))
        assert spread(judged.by_layer()) < 1.4


def test_rates_before_the_steps_are_given_back():
    working = uneven(NORMALIZED)
    before = measured(working, images=between.SETTLING_IMAGES).by_layer()
    returned = equalize(working, pictures())
    assert returned.by_layer() == before


@pytest.mark.parametrize("region, local_size, k", [
    ("ACROSS_CHANNELS", 3, 1), ("ACROSS_CHANNELS", 5, 2), ("WITHIN_CHANNEL", 3, 1),
    ("WITHIN_CHANNEL", 3, 4)])  # there Caffe takes 1 for k, whatever the definition says
@pytest.mark.parametrize("log_scale", [0.1, -0.7, 1.5])
def test_the_degree_of_response_normalization_is_caffes(region, local_size, k, log_scale):
    text = conv("a", "data", 6) + layer(
        "n", "LRN", "a", "", "lrn_param { local_size: %d alpha: 0.5 beta: 0.75 k: %d "
        "norm_region: %s }" % (local_size, k, region)) + fully("end", "n")
    working = uneven(text)
    number = next(one.position for one in working.layers if one.name == "n")
    bottom = np.array(working.blob("a").data)
    parameters = working.layers[number].parameters.lrn_param
    means = []
    for scale in (1.0, np.exp(log_scale)):
        working.blob("a").data[...] = scale * bottom
        working.net._forward(number, number)
        means.append(np.abs(working.blob("n").data).mean(dtype=np.float64))
    expected = np.log(means[1] / means[0]) / log_scale
    assert 0.1 < expected < 0.99
    x, e = between.lrn_energy(parameters, bottom)
    found = between.lrn_degree(x, e, parameters.beta, log_scale)
    np.testing.assert_allclose(found, expected, atol=1e-3)


@pytest.mark.parametrize("outputs", [2, 60])
def test_an_output_keeps_its_std_where_response_normalization_bends_it(outputs):
    working = uneven(NORMALIZED.replace("num_output: 60", "num_output: %d" % outputs))
    batches = alike(5)
    before = all_outputs(working, batches).std()
    equalize(working, batches)
    assert all_outputs(working, batches).std() == pytest.approx(before, rel=0.05)


@pytest.mark.parametrize("text", [CHAIN, NORMALIZED], ids=["chain", "LRN"])
@pytest.mark.parametrize("outputs", [1, 3, 60])
def test_outputs_get_the_std_that_is_asked_for(text, outputs):
    text = re.sub(r"(name: '(four|end)'.*num_output: )\d+", r"\g<1>%d" % outputs, text)
    working, batches = uneven(text), alike(5)
    equalize(working, batches, output_std=2.0)
    assert all_outputs(working, batches).std() == pytest.approx(2, rel=0.3)


def all_outputs(working, batches):
    """What the last output is for all batches."""
    found = []
    for number in range(batches.count):
        working.load(batches, number)
        working.forward()
        found.append(np.array(working.blob(working.outputs[-1]).data))
    return np.concatenate(found)


def test_outputs_of_a_net_from_scratch_move_where_they_pull_apart():
    working = uneven(TWO_ON_ONE)
    before, rates = held(working), measured(working)
    equalize(working, pictures())
    run(working)
    after = held(working)
    main, other = working.outputs[-1], working.outputs[0]
    np.testing.assert_allclose(after[main], before[main], rtol=1e-4, atol=1e-6)
    assert abs(np.log(after[other].std() / before[other].std())) > 0.1
    # not wholly equal: OUTPUT_WEIGHT keeps outputs near their scale
    assert spread_of(working) < 0.2 * spread(rates.by_layer())


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
    definition, lines = rewritten(upgrade(parsed(DATA + text)), graph,
                                  Solution(log_scales, list(auxiliary)))
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


def test_statistics_of_batch_normalization_follow_the_scale():
    working = working_net(DATA + conv("a", "data") + in_place("m", "BatchNorm", "a")
                          + fully("c", "a"), IMAGES)
    graph = ScaleGraph(working)
    mean, variance, correction = [blob.data.copy() for blob in working.layers[2].blobs]
    log_scales = np.zeros(graph.variables)
    for form in (graph.affine[0].weight_scale, graph.affine[0].scale_out):
        log_scales[list(form)] = np.log(4)
    apply_to_weights(graph, log_scales)
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
    assert lines == ["layer 'a': a new Power layer 'a_rescale' behind it multiplies by 0.25, so "
                     "that its weights can have the scale that gives them their rate"]


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
        apply_to_weights(ScaleGraph(working), np.full(ScaleGraph(working).variables, 99.0))
    with pytest.raises(ValueError, match="float32"):
        apply_to_weights(ScaleGraph(working), np.full(ScaleGraph(working).variables,
                                                              np.nan))


def test_the_worst_difference_is_over_the_std_of_each_output():
    expected = {"a": np.array([0.0, 2.0]), "b": np.array([0.0, 20.0])}  # std 1 and 10
    assert worst_difference(expected, expected) == 0
    assert worst_difference(
        expected, {"a": np.array([0.0, 2.5]), "b": np.array([3.0, 20.0])}) == 0.5
    nan = worst_difference(expected, {"a": np.array([np.nan, 2.0]), "b": expected["b"]})
    assert not nan <= 1e-3
    constant = {"a": np.ones(3)}
    assert worst_difference(constant, constant) == 0
    assert worst_difference(constant, {"a": np.array([1.0, 1.0, 2.0])}) == np.inf


def test_filled_nets_repeat():
    """What these tests stand on: the same numbers in nets of one definition."""
    one, two = uneven(CHAIN), uneven(CHAIN)
    np.testing.assert_array_equal(one.affine[1].weights, two.affine[1].weights)
    fill(two)
    assert (one.affine[1].weights != two.affine[1].weights).any()
