"""Scales drawn at random from those that the equations allow leave what a net computes as it is."""
import numpy as np
import pytest
from toy_nets import (
    SIZE,
    fill,
    free_scales,
    image_input,
    layer,
    random_graph,
    working_net,
)

from ddinit.between import Solution, apply_to_weights, value
from ddinit.net import WorkingNet
from ddinit.rewrite import rewritten, worst_difference
from ddinit.scales import ScaleGraph

CONV = "convolution_param { num_output: %d kernel_size: 3 pad: 1 }"
SHARED = "param { name: 'w' } param { name: 'b' } " + CONV


def rescaled(working, log_scales):
    """The net after rescaling, as its definition and weights would be written."""
    definition, _ = rewritten(working.definition, ScaleGraph(working), Solution(log_scales, []))
    other = WorkingNet(definition, working.inputs)
    fill(other)
    apply_to_weights(ScaleGraph(other), log_scales)
    return other


def compare(working, log_scales):
    """Check that each blob of the rescaled net is its scale times what it was."""
    other = rescaled(working, log_scales)
    data = np.random.default_rng(3).standard_normal(working.blob("data").data.shape)
    for net in (working, other):
        net.blob("data").data[...] = data
    graph = ScaleGraph(working)
    for one, two in zip(working.layers, other.layers):
        working.net._forward(one.position, one.position)
        other.net._forward(two.position, two.position)
        if one.bottoms and set(one.tops) <= set(one.bottoms):
            continue  # the graph knows a blob as its last layer leaves it
        for top in one.tops:
            in_place = [later for later in working.layers
                        if later.position > one.position and top in later.tops]
            if in_place:
                continue
            start = 0
            for count, form in graph.blobs[top]:
                scale = np.exp(value(form, log_scales))
                expected = scale * working.blob(top).data[:, start:start + count]
                found = other.blob(top).data[:, start:start + count]
                start += count
                np.testing.assert_allclose(found, expected, rtol=2e-3,
                                           atol=2e-3 * (np.abs(expected).max() + 1e-6))
    for name in working.outputs:
        assert worst_difference({name: working.blob(name).data},
                                {name: other.blob(name).data}) < 1e-3


@pytest.mark.parametrize("seed", range(24))
def test_random_graphs_compute_what_they_did(seed):
    working = working_net(random_graph(seed))
    basis = free_scales(ScaleGraph(working))
    log_scales = basis @ np.random.default_rng(seed).standard_normal(basis.shape[1])
    compare(working, log_scales)


def test_random_graphs_leave_some_scales_free():
    free = [free_scales(ScaleGraph(working_net(random_graph(seed)))).shape[1] for seed in range(24)]
    assert sum(count > 0 for count in free) >= 12


@pytest.mark.parametrize("net, free", [
    # every hidden blob of a chain
    (layer("a", "Convolution", "data", "", CONV % 4) + layer("relu", "ReLU", "a", "a")
     + layer("b", "Convolution", "a", "", CONV % 4) + layer("c", "Convolution", "b", "", CONV % 4),
     2),
    # both branches of a Concat by themselves
    (layer("a", "Convolution", "data", "", CONV % 4) + layer("b", "Convolution", "data", "",
                                                             CONV % 2)
     + layer("both", "Concat", "a b") + layer("c", "Convolution", "both", "", CONV % 4), 2),
    # a sum wants one scale
    (layer("a", "Convolution", "data", "", CONV % 4) + layer("b", "Convolution", "data", "",
                                                             CONV % 4)
     + layer("sum", "Eltwise", "a b") + layer("c", "Convolution", "sum", "", CONV % 4), 1),
    # and so does a residual block that ends where it began
    (layer("a", "Convolution", "data", "", CONV % 4) + layer("b", "Convolution", "a", "", CONV % 4)
     + layer("sum", "Eltwise", "a b") + layer("c", "Convolution", "sum", "", CONV % 4), 1),
    # one weight for two inputs: their scales are one, and that of the shared output is 1
    (layer("p", "Convolution", "data", "", CONV % 4) + layer("a", "Convolution", "p", "",
                                                             SHARED % 4)
     + layer("b", "Convolution", "a", "", SHARED % 4), 0),
    # a sigmoid keeps its input; what is before that is free
    (layer("a", "Convolution", "data", "", CONV % 4) + layer("b", "Convolution", "a", "", CONV % 4)
     + layer("s", "Sigmoid", "b", "b") + layer("c", "Convolution", "b", "", CONV % 4), 1),
    # BatchNorm: what comes in is free, what goes out is not
    (layer("a", "Convolution", "data", "", CONV % 4) + layer("n", "BatchNorm", "a", "a")
     + layer("c", "Convolution", "a", "", CONV % 4), 1),
    # a bias alone is shared: the outputs of both layers have one scale
    (layer("p", "Convolution", "data", "", "param { name: 'v' } param { name: 'b' } " + CONV % 4)
     + layer("q", "Convolution", "data", "", "param { name: 'w' } param { name: 'b' } " + CONV % 4)
     + layer("both", "Concat", "p q") + layer("c", "Convolution", "both", "", CONV % 4), 1),
    # Biases, and statistics, that two layers share
    (layer("p", "Convolution", "data", "", CONV % 4) + layer("q", "Convolution", "data", "",
                                                             CONV % 4)
     + layer("pb", "Bias", "p", "", "param { name: 'b' }")
     + layer("qb", "Bias", "q", "", "param { name: 'b' }")
     + layer("both", "Concat", "pb qb") + layer("c", "Convolution", "both", "", CONV % 4), 1),
    # weights that two layers share, of inputs whose blocks end at different channels
    ("".join(layer(name, "Convolution", "data", "", CONV % count)
             for name, count in (("p", 2), ("q", 4), ("r", 3), ("s", 3)))
     + layer("pq", "Concat", "p q") + layer("rs", "Concat", "r s")
     + layer("a", "Convolution", "pq", "", SHARED % 4) + layer("b", "Convolution", "rs", "",
                                                               SHARED % 4)
     + layer("both", "Concat", "a b") + layer("c", "Convolution", "both", "", CONV % 4), 2),
], ids=["chain", "concat", "sum", "residual", "shared weights", "sigmoid", "batch norm",
        "shared bias", "shared Bias layers", "shared unlike blocks"])
def test_free_scales_are_counted_and_each_keeps_the_function(net, free):
    working = working_net(image_input(2, 3, SIZE, SIZE) + net)
    basis = free_scales(ScaleGraph(working))
    assert basis.shape[1] == free
    for direction in basis.T:
        compare(working, 1.5 * direction)
