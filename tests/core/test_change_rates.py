"""Change rates: gradients of single images against Caffe's own, expectations in closed form."""
import numpy as np
import pytest
import scipy.linalg
from toy_nets import image_input, layer, parsed, working_net

from ddinit import change_rates, rescale
from ddinit.caffe_net import WorkingNet, affine_view
from ddinit.change_rates import ChangeRates, im2col, moments, per_image, spread
from ddinit.prototxt import spare_weight_gradients, upgrade, working_definition
from ddinit.scales import ScaleGraph, plus

SIZE = 6
IMAGES = 5
CONV = "convolution_param { num_output: 4 %s }"
FC = "inner_product_param { num_output: 3 %s }"
SHARED = "param { name: 'w' } param { name: 'b' } "
DATA = image_input(1, 3, SIZE, SIZE)


def convolution(parameters, bottom="data"):
    return layer("k", "Convolution", bottom, "", CONV % parameters)


def wide(parameters):
    """A convolution with four channels below, so that it can have groups."""
    return (layer("below", "Convolution", "data", "", CONV % "kernel_size: 1")
            + convolution(parameters, "below"))


def blocks(*layers):
    """What a Concat of three branches gives, below other layers."""
    return "".join(layer(name, "Convolution", "data", "",
                         "convolution_param { num_output: %d kernel_size: 1 }" % count)
                   for name, count in zip("abc", (2, 3, 1))) + layer(
        "all", "Concat", "a b c") + "".join(layers)


def reshaped(*shape):
    return layer("r", "Reshape", "data", "", "reshape_param { shape { dim: 0 %s } }" % " ".join(
        "dim: %d" % one for one in shape))


BY_IMAGE = {
    "convolution": convolution("kernel_size: 3"),
    "one by one": convolution("kernel_size: 1"),
    "pad": convolution("kernel_size: 3 pad: 2"),
    "stride": convolution("kernel_size: 3 stride: 2"),
    "stride that leaves a rest": convolution("kernel_size: 3 stride: 2 pad_h: 1 pad_w: 0"),
    "dilation": convolution("kernel_size: 2 dilation: 3"),
    "height and width differ": convolution(
        "kernel_h: 2 kernel_w: 4 stride_h: 1 stride_w: 2 pad_h: 0 pad_w: 3"),
    "per axis": convolution("kernel_size: 2 kernel_size: 3 pad: 1 pad: 0 dilation: 1 dilation: 2"),
    "no bias": convolution("kernel_size: 3 bias_term: false"),
    "groups": wide("kernel_size: 3 pad: 1 group: 2"),
    "depthwise": wide("kernel_size: 3 stride: 2 group: 4"),
    "one axis": reshaped(3, SIZE * SIZE) + convolution("kernel_size: 5 stride: 2 pad: 1", "r"),
    "three axes": reshaped(3, 2, 3, SIZE) + convolution(
        "kernel_size: 2 kernel_size: 1 kernel_size: 3 pad: 1", "r"),
    "fully connected": layer("k", "InnerProduct", "data", "", FC % ""),
    "fully connected, transposed": layer("k", "InnerProduct", "data", "", FC % "transpose: true"),
    "fully connected, no bias": layer("k", "InnerProduct", "data", "", FC % "bias_term: false"),
    "blocks": blocks(convolution("kernel_size: 3", "all")),
    "blocks and groups": blocks(convolution("kernel_size: 3 group: 2", "all")),
    "fully connected blocks": blocks(layer("k", "InnerProduct", "all", "", FC % "")),
    "transposed blocks": blocks(layer("k", "InnerProduct", "all", "", FC % "transpose: true")),
    "behind others": convolution("kernel_size: 3") + layer("relu", "ReLU", "k", "k")
    + layer("pool", "Pooling", "k", "", "pooling_param { kernel_size: 2 stride: 2 }")
    + layer("top", "InnerProduct", "pool", "", FC % ""),
}

SUMMED = {
    "scale": layer("k", "Scale", "data", "", "scale_param { bias_term: true }"),
    "deconvolution": layer("k", "Deconvolution", "data", "", CONV % "kernel_size: 3 stride: 2"),
    "deconvolution of groups": blocks(layer("k", "Deconvolution", "all", "",
                                            CONV % "kernel_size: 2 group: 2")),
    "shared weights": layer("k", "Convolution", "data", "", SHARED + CONV % "kernel_size: 3")
    + layer("l", "Convolution", "data", "", SHARED + CONV % "kernel_size: 3"),
    "several bottoms": layer("other", "AbsVal", "data") + layer(
        "k", "Convolution", "data other", "one two", CONV % "kernel_size: 3"),
    "another axis": layer("k", "InnerProduct", "data", "", FC % "axis: 2"),
}


def caffes_gradients(text, name, images, losses):
    """Gradients (images, groups, outputs, inputs, rest) of layer `name`: one image at a time."""
    gradients = []
    for number in range(len(images)):
        alone = working_net(text, 1)
        run(alone, images[number:number + 1],
            {blob: loss[number:number + 1] for blob, loss in losses.items()})
        scaled = next(one for one in ScaleGraph(alone).affine if one.layer.name == name)
        gradients.append(affine_view(scaled.layer, scaled.layer.blobs[0].diff.astype(np.float64),
                                     scaled.in_channels))
    return np.array(gradients)


def run(working, images, losses=None):
    """A forward pass, and a backward pass from losses at outputs."""
    working.blob("data").data[...] = images
    working.forward()
    if losses is not None:
        for name, loss in losses.items():
            working.blob(name).diff[...] = loss
        for one in working.layers:
            for blob in one.blobs:
                blob.diff[...] = 0
        working.net._backward(len(working.layers) - 1, 0)


def measured_and_caffes(text, magnitude=1.0):
    """Moments of each affine layer with weights of its own, and its blocks of Caffe's gradients."""
    rng = np.random.default_rng(4)
    working = working_net(DATA + text, IMAGES)
    images = rng.standard_normal((IMAGES, 3, SIZE, SIZE)).astype(np.float32)
    losses = {name: np.float32(magnitude) * rng.standard_normal(
        working.blob(name).data.shape).astype(np.float32) for name in working.outputs}
    run(working, images, losses)
    for scaled in ScaleGraph(working).owners():
        gradients = caffes_gradients(DATA + text, scaled.layer.name, images, losses)
        yield scaled, moments(scaled, working), [
            gradients[:, block.groups, :, block.inputs].reshape(IMAGES, -1)
            for block in scaled.blocks]


# ---------------------------------------------------------------------------------------------
# Gradients of single images
# ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text", BY_IMAGE.values(), ids=BY_IMAGE.keys())
def test_moments_are_those_of_caffes_gradients_of_single_images(text):
    for scaled, found, gradients in measured_and_caffes(text):
        assert per_image(scaled.layer.parameters)
        squares = np.array([(part ** 2).sum(axis=1) for part in gradients]).T
        np.testing.assert_allclose(found.squares, squares, rtol=1e-4)
        products = [np.mean([(part[one] ** 2 * part[two] ** 2).sum() for one in range(IMAGES)
                             for two in range(IMAGES) if one != two]) for part in gradients]
        np.testing.assert_allclose(found.products, products, rtol=1e-3)


@pytest.mark.parametrize("text", SUMMED.values(), ids=SUMMED.keys())
def test_layers_without_gradients_of_single_images_share_caffes_sum_evenly(text):
    found = {scaled.layer.name: row for scaled, *row in measured_and_caffes(text)}
    measured, gradients = found["k"]
    for number, part in enumerate(gradients):
        of_sum = part.sum(axis=0)
        np.testing.assert_allclose(measured.squares[:, number],
                                   np.full(IMAGES, (of_sum ** 2).sum() / IMAGES), rtol=1e-3)
        np.testing.assert_allclose(measured.products[number],
                                   (of_sum ** 4).sum() / 3 / IMAGES ** 2, rtol=1e-3)


@pytest.mark.parametrize("magnitude", [1e-18, 1e-9, 1e9])
def test_gradients_of_any_magnitude_neither_underflow_nor_overflow(magnitude):
    for name in ("convolution", "fully connected", "behind others"):
        for (_, ours, _), (_, usual, _) in zip(measured_and_caffes(BY_IMAGE[name], magnitude),
                                               measured_and_caffes(BY_IMAGE[name])):
            factor = float(np.float32(magnitude))
            np.testing.assert_allclose(ours.squares, usual.squares * factor ** 2, rtol=1e-4)
            np.testing.assert_allclose(ours.products, usual.products * factor ** 4, rtol=1e-4)


@pytest.mark.parametrize("magnitude", [1e-14, 1e-9, 1e9, 1e14])
@pytest.mark.parametrize("kind", ["convolution", "fully connected", "scale"])
def test_inputs_of_any_magnitude_neither_underflow_nor_overflow(kind, magnitude):
    found = []
    for factor in (1.0, magnitude):
        working = working_net(DATA + {**BY_IMAGE, **SUMMED}[kind], IMAGES)
        rng = np.random.default_rng(4)
        run(working, np.float32(factor) * rng.standard_normal((IMAGES, 3, SIZE, SIZE)))
        found.append(change_rates.measure(ScaleGraph(working), rng))
    np.testing.assert_allclose(found[1].by_layer(), found[0].by_layer() * magnitude, rtol=1e-3)
    np.testing.assert_allclose(found[1].variation(), found[0].variation(), rtol=1e-3)


def test_a_dead_layer_has_rate_0_and_an_infinite_gradient_no_finite_one():
    working = working_net(DATA + BY_IMAGE["behind others"], IMAGES)
    working.layers[-1].weights[...] = 0
    run(working, np.ones((IMAGES, 3, SIZE, SIZE)))
    rates = change_rates.measure(ScaleGraph(working), np.random.default_rng(1)).by_layer()
    assert rates[0] == 0
    assert np.isnan(rates[1]) or np.isinf(rates[1])  # its weights are 0
    working.blob(working.outputs[0]).diff[...] = np.inf
    assert not np.isfinite(moments(ScaleGraph(working).affine[1], working).squares).any()


def test_a_single_image_has_moments():
    working = working_net(DATA + BY_IMAGE["behind others"], 1)
    run(working, np.random.default_rng(1).standard_normal((1, 3, SIZE, SIZE)))
    rates = change_rates.measure(ScaleGraph(working), np.random.default_rng(1))
    assert np.isfinite(rates.by_layer()).all()
    assert np.isfinite(rates.variation()).all()
    assert rates.uncertainty() == np.inf


@pytest.mark.parametrize("shape, geometry", [
    ((2, 3, 5, 7), ((2, 3), (1, 1), (0, 0), (1, 1))),
    ((2, 3, 5, 7), ((2, 3), (2, 3), (1, 2), (2, 1))),
    ((2, 3, 9), ((4,), (2,), (1,), (2,))),
])
def test_im2col_holds_what_the_kernel_sees(shape, geometry):
    images = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    kernel, stride, pad, dilation = geometry
    padded = np.pad(images, [(0, 0), (0, 0)] + [(one, one) for one in pad])
    places = [(size - step * (taps - 1) - 1) // jump + 1 for size, taps, jump, step
              in zip(padded.shape[2:], kernel, stride, dilation)]
    expected = np.empty(shape[:2] + kernel + tuple(places), np.float32)
    for tap in np.ndindex(*kernel):
        for place in np.ndindex(*places):
            at = tuple(one * jump + two * step for one, jump, two, step
                       in zip(place, stride, tap, dilation))
            expected[(slice(None), slice(None)) + tap + place] = padded[(slice(None),) * 2 + at]
    found = im2col(images, change_rates.Geometry(*geometry))
    np.testing.assert_array_equal(found, expected.reshape(shape[0], -1, int(np.prod(places))))


# ---------------------------------------------------------------------------------------------
# Expectations over random losses
# ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("between", [
    layer("relu", "ReLU", "conv", "conv") + layer("top", "AbsVal", "conv"),
    layer("top", "Reshape", "conv", "", "reshape_param { shape { dim: -1 dim: 2 dim: 2 dim: 2 } }")
    + layer("relu", "ReLU", "top", "top"),
], ids=["plain", "channels folded into the batch"])
def test_rates_are_equation_1_by_finite_differences(between):
    text = DATA + layer("conv", "Convolution", "data", "", CONV % "kernel_size: 3 stride: 2") \
        + between + layer("fc", "InnerProduct", "top", "", FC % "")
    working = working_net(text, IMAGES)
    run(working, np.random.default_rng(2).standard_normal((IMAGES, 3, SIZE, SIZE)))
    expected = []
    for one in working.affine:
        # E over eta of (d eta.z / dW)^2 is the sum over outputs z_i of (dz_i / dW)^2
        squares = sum((derivative(working, one.weights, number) ** 2).sum()
                      for number in range(one.weights.size))
        expected.append(np.sqrt(squares / IMAGES / (one.weights.astype(np.float64) ** 2).sum()))
    working.forward()
    rates = change_rates.measure(ScaleGraph(working), np.random.default_rng(3), losses=30000)
    np.testing.assert_allclose(rates.by_layer(), expected, rtol=0.02)


def derivative(working, weights, number, step=2.0 ** -8):
    """Central differences of the outputs by one weight; exact where the net is linear in it."""
    flat, found = weights.reshape(-1), []
    before = flat[number]
    for sign in (1, -1):
        flat[number] = before + sign * step
        working.forward()
        found.append(working.blob(working.outputs[0]).data.astype(np.float64))
    flat[number] = before
    return (found[0] - found[1]) / (2 * step)


def linear_net(images):
    """A net W2 W1 x without biases; images (n, 3, 1, 1) in it."""
    text = image_input(1, 3, 1, 1) + layer(
        "one", "InnerProduct", "data", "", "inner_product_param { num_output: 4 bias_term: false }"
    ) + layer("two", "InnerProduct", "one", "",
              "inner_product_param { num_output: 2 bias_term: false }")
    working = working_net(text, len(images))
    run(working, images.reshape(-1, 3, 1, 1))
    return working, [one.weights.astype(np.float64) for one in working.affine]


def test_a_linear_net_has_the_closed_form():
    x = np.random.default_rng(8).standard_normal((6, 3)) * [1, 2, 4]
    working, (w1, w2) = linear_net(x)
    rates = change_rates.measure(ScaleGraph(working), np.random.default_rng(9), losses=40000)
    # dz_o / dW1_ij = W2_oi x_j, dz_o / dW2_oi = (W1 x)_i
    first = (w2 ** 2).sum() * (x ** 2).sum(axis=1).mean() / (w1 ** 2).sum()
    second = 2 * ((x @ w1.T) ** 2).sum(axis=1).mean() / (w2 ** 2).sum()
    np.testing.assert_allclose(rates.by_layer(), np.sqrt([first, second]), rtol=0.02)
    # E[g_n^2 g_m^2] is the product of E[g_n^2] = sum_o W2_oi^2 x_nj^2 for two images' own losses
    columns = (w2 ** 2).sum(axis=0)
    of_x = x ** 2
    pairs = (of_x.sum(axis=0) ** 2 - (of_x ** 2).sum(axis=0)) / (6 * 5)
    np.testing.assert_allclose(rates.products.mean(axis=0)[0], (columns ** 2).sum() * pairs.sum(),
                               rtol=0.05)


def test_variation_is_that_of_the_mean_squares_over_many_draws():
    text = DATA + layer("conv", "Convolution", "data", "", CONV % "kernel_size: 3 stride: 2") \
        + layer("relu", "ReLU", "conv", "conv") + layer("fc", "InnerProduct", "conv", "", FC % "")
    contrast = np.array([1, 3, 0.3]).reshape(1, 3, 1, 1)
    rng = np.random.default_rng(6)
    working, one = working_net(text, 32), working_net(text, 1)
    means = [0.0 for _ in one.affine]
    for image in rng.standard_normal((1500, 1, 3, SIZE, SIZE)) * contrast:
        run(one, image, {"fc": rng.standard_normal((1, 3))})
        means = [mean + layer_.blobs[0].diff.astype(np.float64) ** 2
                 for mean, layer_ in zip(means, one.affine)]
    expected = [mean.std() / mean.mean() for mean in means]
    found = None
    for _ in range(30):
        run(working, rng.standard_normal((32, 3, SIZE, SIZE)) * contrast)
        rates = change_rates.measure(ScaleGraph(working), rng)
        found = rates if found is None else found.joined(rates)
    np.testing.assert_allclose(found.variation(), expected, rtol=0.1)


def test_a_second_measurement_from_one_forward_pass_is_right_with_scale_layers_in_place():
    """Caffe's in-place Scale layer overwrites its copy of its input when it goes backward."""
    rates = []
    for scaled in ("conv", "scaled"):
        working = working_net(DATA + convolution("kernel_size: 3").replace("'k'", "'conv'")
                              + layer("scale", "Scale", "conv", scaled)
                              + layer("relu", "ReLU", scaled, scaled)
                              + layer("fc", "InnerProduct", scaled, "", FC % ""), IMAGES)
        run(working, np.random.default_rng(1).standard_normal((IMAGES, 3, SIZE, SIZE)))
        rates += [change_rates.measure(ScaleGraph(working), np.random.default_rng(seed)).by_layer()
                  for seed in (1, 1)]
    for one in rates[1:]:
        np.testing.assert_allclose(one, rates[0], rtol=1e-5)


def test_equal_squares_of_all_weights_have_no_variation():
    """One input, one image value, one output: all weights of the layer are one weight."""
    working = working_net(image_input(1, 1, 1, 1) + layer(
        "fc", "InnerProduct", "data", "", "inner_product_param { num_output: 1 }"), 64)
    run(working, np.ones((64, 1, 1, 1)))
    found = change_rates.measure(ScaleGraph(working), np.random.default_rng(1)).variation()
    np.testing.assert_allclose(found, 0, atol=0.3)


# ---------------------------------------------------------------------------------------------
# Rescaled rates
# ---------------------------------------------------------------------------------------------

BRANCHES = blocks(layer("relu", "ReLU", "all", "all"),
                  layer("k", "Convolution", "all", "", CONV % "kernel_size: 3"),
                  layer("fc", "InnerProduct", "k", "", FC % ""))
TWO_OUTPUTS = blocks(layer("x", "Convolution", "all", "", CONV % "kernel_size: 3"),
                     layer("y", "InnerProduct", "all", "", FC % ""))


def random_scales(graph, rng):
    """Log scales that all equations of a graph allow, drawn at random."""
    equations = graph.equations + [plus(scaled.weight_scale, scaled.scale_out, -1.0)
                                   for scaled in graph.affine]
    matrix = np.array([[form.get(variable, 0.0) for variable in range(graph.variables)]
                       for form in equations])
    basis = scipy.linalg.null_space(matrix)
    return basis @ rng.uniform(-1.5, 1.5, basis.shape[1])


@pytest.mark.parametrize("text, free_outputs", [
    (BRANCHES, False), (TWO_OUTPUTS, False), (TWO_OUTPUTS, True)],
    ids=["blocks", "outputs kept", "outputs may move"])
def test_closed_form_rates_are_those_of_the_rescaled_net_with_the_same_losses(text, free_outputs):
    rng = np.random.default_rng(12)
    working = working_net(DATA + text, IMAGES)
    graph = ScaleGraph(working, free_outputs=free_outputs)
    images = rng.standard_normal((IMAGES, 3, SIZE, SIZE))
    run(working, images)
    before = change_rates.measure(graph, np.random.default_rng(13))
    log_scales = random_scales(graph, rng)
    foretold = rescale.changed_rates(graph, before, log_scales)
    rescale.apply_to_weights(graph, log_scales)
    run(working, images)
    found = change_rates.measure(graph, np.random.default_rng(13))
    assert spread(foretold.by_pair() / before.by_pair()) > 1.5
    np.testing.assert_allclose(foretold.by_layer(), found.by_layer(), rtol=2e-3)
    np.testing.assert_allclose(foretold.by_pair(), found.by_pair(), rtol=2e-3)
    np.testing.assert_allclose(foretold.gradients, found.gradients, rtol=2e-3)
    if not free_outputs:  # else nearly: each output's part of a weight's squares may differ
        np.testing.assert_allclose(foretold.variation(), found.variation(), rtol=5e-3)


def test_known_shares_of_outputs_stand_for_passes_of_their_own():
    working = working_net(DATA + TWO_OUTPUTS, IMAGES)
    graph = ScaleGraph(working, free_outputs=True)
    run(working, np.random.default_rng(1).standard_normal((IMAGES, 3, SIZE, SIZE)))
    full = change_rates.measure(graph, np.random.default_rng(2))
    assert full.gradients.shape == (IMAGES, 2, len(full.layer))
    again = change_rates.measure(graph, np.random.default_rng(3), full)
    np.testing.assert_allclose(full.shares().sum(axis=0), 1)
    np.testing.assert_allclose(again.shares(), full.shares(), rtol=1e-6)
    np.testing.assert_allclose(again.by_layer(), full.by_layer(), rtol=0.2)
    names = [graph.owners()[number].layer.name for number in full.layer]
    own = [names.index(name) for name in ("x", "y")]
    np.testing.assert_array_equal(full.shares()[:, own], [[1, 0], [0, 1]])


def test_known_variation_stands_for_that_of_images_with_other_gradients():
    working = working_net(DATA + BRANCHES, IMAGES)
    graph, rng = ScaleGraph(working), np.random.default_rng(1)
    images = rng.standard_normal((IMAGES, 3, SIZE, SIZE))
    run(working, images)
    full = change_rates.measure(graph, np.random.default_rng(2))
    run(working, 3 * images)
    again = change_rates.measure(graph, np.random.default_rng(2), full)
    assert np.all(again.by_layer() > 1.5 * full.by_layer())
    np.testing.assert_allclose(again.variation(), full.variation(), atol=0.15)
    np.testing.assert_allclose(full.joined(again).variation(), full.variation(), atol=0.3)


def test_spared_weight_gradients_change_no_blobs_gradient():
    text = DATA + BRANCHES + layer("extra", "Deconvolution", "all", "", CONV % "kernel_size: 2")
    definition, image = working_definition(upgrade(parsed(text)), IMAGES)
    plain = WorkingNet(definition, image)
    spared_definition = type(definition)()
    spared_definition.CopyFrom(definition)
    spare_weight_gradients(spared_definition, per_image)
    assert spared_definition != definition
    spared = WorkingNet(spared_definition, image)
    images = np.random.default_rng(1).standard_normal((IMAGES, 3, SIZE, SIZE))
    rates = []
    for working in (plain, spared):
        for one in working.layers:
            for number, blob in enumerate(one.blobs):
                blob.data[...] = 0.3 * np.random.default_rng(number).standard_normal(
                    blob.data.shape)
        run(working, images)
        rates.append(change_rates.measure(ScaleGraph(working), np.random.default_rng(2)))
    for name in {top for one in plain.layers if one.type != "Input" for top in one.tops}:
        assert plain.blob(name).diff.any() and (
            plain.blob(name).diff == spared.blob(name).diff).all(), name
    np.testing.assert_allclose(rates[0].by_layer(), rates[1].by_layer(), rtol=1e-6)
    np.testing.assert_allclose(rates[0].variation(), rates[1].variation(), rtol=1e-6)


# ---------------------------------------------------------------------------------------------
# By hand
# ---------------------------------------------------------------------------------------------

def by_hand():
    """Two layers, the first with two blocks of 2 and 6 weights; two images, one output."""
    return ChangeRates(np.array([0, 0, 1]), np.array([2, 6, 4]), np.array([1.0, 3.0, 8.0]),
                       np.array([[[6.0, 10.0, 2.0]], [[2.0, 14.0, 2.0]]]),
                       np.array([[10.0, 50.0, 1.0]]))


def test_rates_by_hand():
    rates = by_hand()
    np.testing.assert_allclose(rates.by_layer(), [2, 0.5])  # sqrt(16 / 4), sqrt(2 / 8)
    np.testing.assert_allclose(rates.by_pair(), [2, 2, 0.5])
    # mean of q^2 over 8 weights 60 / 8 = 7.5, over mean of q squared (16 / 8)^2 = 4
    np.testing.assert_allclose(rates.variation(), [np.sqrt(7.5 / 4 - 1), 0])
    assert rates.uncertainty() == 0  # both images have the same sums


def test_weighted_joined_and_rescaled_rates_by_hand():
    rates = by_hand()
    np.testing.assert_allclose(rates.weighted(np.array([4.0, 9.0])).by_layer(), [4, 1.5])
    np.testing.assert_allclose(rates.weighted(np.array([4.0, 9.0])).variation(), rates.variation())
    twice = rates.joined(rates.weighted(np.array([7.0, 1.0])))
    np.testing.assert_allclose(twice.by_layer(), [4, 0.5])  # mean of 16 and 112 is 64
    # weights halved and gradients doubled: rates times 4
    np.testing.assert_allclose(rates.rescaled(np.log([2.0, 2.0, 1.0])).by_layer(), [8, 0.5])
    np.testing.assert_allclose(rates.rescaled(np.zeros(3), np.log([3.0])).by_layer(), [6, 1.5])


def test_variation_stays_what_it_was_measured_to_be_on_whatever_images_follow():
    rng = np.random.default_rng(3)
    layer, size = np.arange(3), np.full(3, 50)
    known = rng.uniform(0.1, 9, (16, 1, 3))
    # of weights whose squares are x: mean x^2 over (mean x)^2 is 1 + variation^2
    pairs = [known[n, 0] * known[m, 0] for n in range(16) for m in range(16) if n != m]
    products = np.array([[1.01, 1.25, 5.0]]) / 50 * np.mean(pairs, axis=0)
    first = ChangeRates(layer, size, np.ones(3), known, products)
    np.testing.assert_allclose(first.variation(), [0.1, 0.5, 2.0])
    others = rng.uniform(0.1, 9, (5, 1, 3))
    second = ChangeRates(layer, size, np.ones(3), others, first.products_at(others))
    np.testing.assert_allclose(second.variation(), [0.1, 0.5, 2.0])
    np.testing.assert_allclose(first.joined(second).variation(), [0.1, 0.5, 2.0])
    single = ChangeRates(layer, size, np.ones(3), others[:1], first.products_at(others[:1]))
    np.testing.assert_allclose(single.variation(), [0.1, 0.5, 2.0])


def test_uncertainty_is_that_of_layers_against_each_other():
    gradients = np.array([[[1.0, 1.0]], [[3.0, 3.0]]])
    common = ChangeRates(np.array([0, 1]), np.ones(2, int), np.ones(2), gradients,
                         np.ones((1, 2)))
    assert common.uncertainty() == 0
    apart = ChangeRates(np.array([0, 1]), np.ones(2, int), np.ones(2),
                        np.array([[[1.0, 3.0]], [[3.0, 1.0]]]), np.ones((1, 2)))
    # relative squares 0.5, 1.5 against a mean of 1: std 0.7071, of the mean 0.5, of the log half
    np.testing.assert_allclose(apart.uncertainty(), 0.25)


@pytest.mark.parametrize("layers", [2, 8, 64])
def test_noise_is_the_spread_that_errors_alone_are_expected_to_make(layers):
    rng = np.random.default_rng(0)
    gradients = rng.uniform(1, 2, (10, 1, layers))
    dead = np.zeros((10, 1, 3))  # layers without gradients do not count
    rates = ChangeRates(np.arange(layers + 3), np.ones(layers + 3, int), np.ones(layers + 3),
                        np.concatenate([gradients, dead], axis=2), np.ones((1, layers + 3)))
    errors = rates.uncertainty() * rng.standard_normal((20000, layers))
    np.testing.assert_allclose(rates.noise(), np.ptp(errors, axis=1).mean(), rtol=0.05)


def test_noise_of_a_single_image_is_not_known_to_be_small():
    rates = by_hand()._changed(by_hand().weights, by_hand().gradients[:1])
    assert rates.noise() == np.inf


def test_spread_counts_rates_that_are_there():
    assert spread(np.array([1.0, 4.0, 2.0, 0.0, np.nan, np.inf])) == 4
    assert spread(np.array([np.nan, 0.0])) == 1
    assert spread(np.array([])) == 1
