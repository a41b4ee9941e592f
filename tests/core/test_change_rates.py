"""Change rates against Caffe's own gradients of single images and outputs, summed exactly."""
import itertools

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
from toy_nets import (
    held_batches,
    image_input,
    layer,
    parsed,
    squared_gradients,
    working_net,
)

from ddinit import change_rates
from ddinit.change_rates import (
    ChangeRates,
    independent_column_rates,
    measure,
    outputs_per_image,
    parts,
    spread,
)
from ddinit.net import affine_view
from ddinit.prototxt import output_blobs
from ddinit.walk import Statistics

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


LAYERS = {
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


@pytest.fixture(autouse=True)
def heavy(monkeypatch):
    """Let no net count as one that is measured image by image because it is small."""
    monkeypatch.setattr(change_rates, "LIGHT", 0)


class Frame:
    """Losses in place of random ones whose mean of eta eta^T is the identity to the last digit.

    They are rows of a Hadamard matrix, of which a pass takes `total` numbers: over `passes` passes
    the mean of a quadratic form is its expectation over eta ~ N(0, I), and over random signs.
    """

    def __init__(self, total):
        self.passes = 1 << (total - 1).bit_length()
        self._numbers = itertools.cycle(scipy.linalg.hadamard(self.passes)[:, :total].ravel())

    def _take(self, shape):
        return np.array([next(self._numbers) for _ in range(int(np.prod(shape)))],
                        np.float32).reshape(shape)

    def choice(self, signs, shape):
        assert sorted(signs) == [-1, 1]
        return self._take(shape)

    def standard_normal(self, shape, dtype):
        return self._take(shape)


def pictures(count=IMAGES, seed=4):
    return np.random.default_rng(seed).standard_normal((count, 3, SIZE, SIZE)).astype(np.float32)


def exact(working, images, **options):
    """Rates over some images with the expectation over eta taken exactly."""
    outputs = outputs_per_image(working)
    few = outputs < change_rates.FEW_OUTPUTS and working.separable
    losses = Frame(outputs if few else outputs * IMAGES)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(change_rates, "FEW_IMAGES", 10 ** 6)
        return measure(working, held_batches(images), [0] * losses.passes, losses, **options)


def with_outputs(text):
    """A net of layers with an InnerProduct of two outputs on each blob that nothing reads."""
    ends = output_blobs(parsed(DATA + text).layer)
    return DATA + text + "".join(layer("end_" + blob, "InnerProduct", blob, "",
                                       "inner_product_param { num_output: 2 }") for blob in ends)


def caffes_squares(text, images):
    return squared_gradients(working_net(text, 1), images)


def by_column(working, name, squares):
    """Sums (columns,) over the weights of each input channel of a layer."""
    one = next(one for one in working.affine if one.name == name)
    return np.einsum("goir->gi", affine_view(one, squares, working.in_channels(one))).ravel()


# ---------------------------------------------------------------------------------------------
# Equations 1 and 2
# ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("few", [50, 0], ids=["image by image", "in batches"])
@pytest.mark.parametrize("kind", LAYERS)
def test_rates_are_those_of_caffes_gradients_of_single_images(kind, few, monkeypatch):
    monkeypatch.setattr(change_rates, "FEW_OUTPUTS", few)
    text = with_outputs(LAYERS[kind])
    working, images = working_net(text, IMAGES), pictures()
    squares = caffes_squares(text, images)
    rates = exact(working, images)
    assert rates.layers == [one.name for one in working.owners()] == list(squares)
    columns = rates.by_column()
    for one in working.owners():
        weights = one.weights.astype(np.float64)
        expected = np.sqrt(squares[one.name].mean() / (weights ** 2).mean())
        np.testing.assert_allclose(rates.by_layer()[one.name], expected, rtol=1e-4)
        sums = by_column(working, one.name, squares[one.name])
        count = weights.size / len(sums)
        np.testing.assert_allclose(columns[one.name],
                                   np.sqrt(sums / count / (weights ** 2).mean()), rtol=1e-4)
        np.testing.assert_allclose(rates.variation()[one.name],
                                   np.sqrt(sums).std() / np.sqrt(sums).mean(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("between", [
    layer("relu", "ReLU", "conv", "conv") + layer("top", "AbsVal", "conv"),
    layer("top", "Reshape", "conv", "", "reshape_param { shape { dim: -1 dim: 2 dim: 2 dim: 2 } }")
    + layer("relu", "ReLU", "top", "top"),
], ids=["plain", "channels folded into the batch"])
def test_rates_are_equation_1_by_finite_differences(between):
    text = DATA + layer("conv", "Convolution", "data", "", CONV % "kernel_size: 3 stride: 2") \
        + between + layer("fc", "InnerProduct", "top", "", FC % "")
    working, images = working_net(text, IMAGES), pictures(seed=2)
    working.blob("data").data[...] = images
    expected = {}
    for one in working.affine:
        # E over eta of (d eta.z / dW)^2 is the sum over outputs z_i of (dz_i / dW)^2
        squares = sum((derivative(working, one.weights, number) ** 2).sum()
                      for number in range(one.weights.size))
        expected[one.name] = np.sqrt(
            squares / IMAGES / (one.weights.astype(np.float64) ** 2).sum())
    rates = exact(working, images).by_layer()
    np.testing.assert_allclose([rates[name] for name in expected], list(expected.values()),
                               rtol=2e-3)


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
    """A net W2 W1 x without biases, and its two matrices."""
    text = image_input(1, 3, 1, 1) + layer(
        "one", "InnerProduct", "data", "", "inner_product_param { num_output: 4 bias_term: false }"
    ) + layer("two", "InnerProduct", "one", "",
              "inner_product_param { num_output: 2 bias_term: false }")
    working = working_net(text, images)
    return working, [one.weights.astype(np.float64) for one in working.affine]


@pytest.mark.parametrize("literal", [False, True])
def test_a_linear_net_has_the_closed_form(literal):
    x = np.random.default_rng(8).standard_normal((IMAGES, 3)) * [1, 2, 4]
    working, (w1, w2) = linear_net(IMAGES)
    rates = exact(working, x.reshape(-1, 3, 1, 1), literal=literal)
    # dz_o / dW1_ij = W2_oi x_j, dz_o / dW2_oi = (W1 x)_i
    first = (w2 ** 2).sum() * (x ** 2).sum(axis=1).mean() / (w1 ** 2).sum()
    second = 2 * ((x @ w1.T) ** 2).sum(axis=1).mean() / (w2 ** 2).sum()
    sizes = np.array([w1.size, w2.size]) if literal else 1
    np.testing.assert_allclose(list(rates.by_layer().values()),
                               np.sqrt(np.array([first, second]) / sizes), rtol=1e-5)


def test_random_losses_come_to_the_expectation():
    working, images = working_net(DATA + LAYERS["behind others"], IMAGES), pictures()
    expected = exact(working, images)
    for few in (50, 0):
        found = measure_with(working, images, few, 400)
        np.testing.assert_allclose(list(found.by_layer().values()),
                                   list(expected.by_layer().values()), rtol=0.08)


def measure_with(working, images, few, passes):
    """Rates from random losses, image by image or in batches."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(change_rates, "FEW_OUTPUTS", few)
        patched.setattr(change_rates, "FEW_IMAGES", 10 ** 6)
        return measure(working, held_batches(images), [0] * passes, np.random.default_rng(1))


def test_every_image_has_a_loss_of_its_own_normal_where_outputs_are_many():
    for kind, few in (("fully connected", True), ("convolution", False)):
        working = working_net(DATA + LAYERS[kind], 200)
        change_rates.put_losses(working, working.outputs, np.random.default_rng(0))
        losses = working.blob("k").diff.reshape(200, -1)
        if few:
            assert set(np.unique(losses)) == {-1, 1}
        else:
            assert scipy.stats.kstest(losses.ravel(), "norm").pvalue > 0.01
        assert len(np.unique(losses, axis=0)) == (8 if few else 200)
        assert np.abs(losses.mean(axis=0)).max() < 0.4


@pytest.mark.parametrize("magnitude", [1e-14, 1e-9, 1e9, 1e14])
@pytest.mark.parametrize("kind", ["convolution", "fully connected", "scale"])
def test_inputs_of_any_magnitude_neither_underflow_nor_overflow(kind, magnitude):
    working = working_net(with_outputs(LAYERS[kind]), IMAGES)
    usual, other = (exact(working, np.float32(factor) * pictures()) for factor in (1, magnitude))
    np.testing.assert_allclose(other.by_layer()["k"], usual.by_layer()["k"] * magnitude, rtol=1e-3)
    np.testing.assert_allclose(other.variation()["k"], usual.variation()["k"], rtol=1e-3)


def test_a_layer_below_weights_of_0_has_rate_0_and_they_have_none():
    working = working_net(DATA + LAYERS["behind others"], IMAGES)
    working.affine[-1].weights[...] = 0
    rates = exact(working, np.ones((IMAGES, 3, SIZE, SIZE)))
    assert rates.by_layer()["k"] == 0
    assert not np.isfinite(rates.by_layer()["top"])
    assert spread(rates.by_layer()) == 1  # neither counts


def test_a_second_measurement_is_right_with_scale_layers_in_place():
    """Caffe's in-place Scale layer overwrites its copy of its input when it goes backward."""
    rates = []
    for scaled in ("conv", "scaled"):
        working = working_net(DATA + convolution("kernel_size: 3").replace("'k'", "'conv'")
                              + layer("scale", "Scale", "conv", scaled)
                              + layer("relu", "ReLU", scaled, scaled)
                              + layer("fc", "InnerProduct", scaled, "", FC % ""), IMAGES)
        images = pictures(seed=1)
        rates += [list(exact(working, images).by_layer().values()) for _ in range(2)]
    for one in rates[1:]:
        np.testing.assert_allclose(one, rates[0], rtol=1e-5)


def test_outputs_told_apart_have_gradients_of_their_own_that_add_up():
    text = blocks(layer("x", "Convolution", "all", "", CONV % "kernel_size: 3"),
                  layer("y", "InnerProduct", "all", "", FC % ""))
    working, images = working_net(DATA + text, IMAGES), pictures()
    together, apart = exact(working, images), exact(working, images, by_output=True)
    assert working.outputs == ["x", "y"]
    for name, one, both in zip(apart.layers, apart.gradients, together.gradients):
        assert len(one) == 2 and len(both) == 1
        np.testing.assert_allclose(one.sum(axis=0), both[0], rtol=1e-4)
        assert one[1].any() == (name != "x") and one[0].any() == (name != "y")
    np.testing.assert_allclose(list(apart.by_layer().values()),
                               list(together.by_layer().values()), rtol=1e-4)


def test_statistics_of_layers_are_gathered_on_the_way():
    text = DATA + LAYERS["behind others"]
    for outputs in (3, 80):
        working = working_net(text.replace("num_output: 3", "num_output: %d" % outputs), IMAGES)
        statistics = {}
        batches = held_batches(pictures(), pictures(seed=5))
        measure(working, batches, [0, 1], np.random.default_rng(1), statistics=statistics)
        assert list(statistics) == ["k", "top"]
        for name, found in statistics.items():
            expected = Statistics()
            for number in (0, 1):
                working.load(batches, number)
                for one in working.layers:
                    working.net._forward(one.position, one.position)
                    if one.name == name:
                        expected.add(working.blob(name).data)
            assert found.count == expected.count
            np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(found.variance, expected.variance, rtol=1e-4)


# ---------------------------------------------------------------------------------------------
# Few outputs
# ---------------------------------------------------------------------------------------------

def net_with(outputs, further=""):
    return working_net(DATA + layer("k", "Convolution", "data", "", CONV % "kernel_size: 3")
                       + layer("top", "InnerProduct", "k", "", "inner_product_param { "
                               "num_output: %d }" % outputs) + further, IMAGES)


def seen_images(working, batches, numbers, images=None):
    """The sizes of all passes, and the images that they see."""
    sizes, found = [], []
    for size in parts(working, batches, numbers, images):
        sizes.append(size)
        assert working.blob("k").data.shape[0] == size
        found.append(np.array(working.blob("data").data))
    return sizes, np.concatenate(found)


@pytest.mark.parametrize("outputs", [1, 2, 10])
def test_few_outputs_are_measured_on_80_images_one_by_one(outputs):
    working = net_with(outputs)
    batches = held_batches(*[pictures(seed=seed) for seed in range(40)])
    sizes, found = seen_images(working, batches, range(40))
    assert sizes == [1] * 80
    expected = np.concatenate([pictures(seed=seed) for seed in range(40)])[:80]
    np.testing.assert_array_equal(found, expected)


def test_few_images_are_all_there_are():
    sizes, _ = seen_images(net_with(2), held_batches(pictures()), [0])
    assert sizes == [1] * IMAGES


@pytest.mark.parametrize("outputs, light", [(2, True), (10, True), (800, False)])
def test_nets_with_few_weights_are_measured_image_by_image_on_all_images(outputs, light,
                                                                        monkeypatch):
    """Numbers of an image: 108 of the input, 64 of the convolution, of which it has 108 weights."""
    monkeypatch.setattr(change_rates, "LIGHT", 2)
    monkeypatch.setattr(change_rates, "FEW_OUTPUTS", 0)
    batches = held_batches(*[pictures(seed=seed) for seed in range(3)])
    working = working_net(DATA + layer("k", "Convolution", "data", "", CONV % "kernel_size: 3")
                          + layer("pool", "Pooling", "k", "", "pooling_param { kernel_size: 4 }")
                          + layer("top", "InnerProduct", "pool", "", "inner_product_param { "
                                  "num_output: %d }" % outputs), IMAGES)
    assert change_rates.is_light(working) == light
    sizes, found = seen_images(working, batches, [2, 0, 1])
    assert sizes == ([1] * 15 if light else [IMAGES] * 3)
    np.testing.assert_array_equal(found, np.concatenate([pictures(seed=seed)
                                                         for seed in (2, 0, 1)]))


def test_many_outputs_are_measured_in_batches():
    sizes, found = seen_images(net_with(50), held_batches(pictures(), pictures(seed=1)), [1, 0])
    assert sizes == [IMAGES, IMAGES]
    np.testing.assert_array_equal(found, np.concatenate([pictures(seed=1), pictures()]))


@pytest.mark.parametrize("meeting", [
    layer("meet", "Reduction", "top", "", "reduction_param { axis: 0 }"),
    layer("meet", "Reshape", "top", "", "reshape_param { shape { dim: -1 dim: 1 } }"),
    layer("meet", "Concat", "top top", "", "concat_param { axis: 0 }"),
    layer("meet", "Flatten", "top", "", "flatten_param { axis: 0 }"),
], ids=["reduced", "folded", "joined", "flattened"])
def test_images_that_meet_are_measured_in_batches_however_few_outputs_there_are(meeting):
    working = net_with(2, meeting)
    sizes, _ = seen_images(working, held_batches(pictures()), [0, 0])
    assert sizes == [IMAGES, IMAGES]
    rates = measure(working, held_batches(pictures()), [0], np.random.default_rng(0))
    assert all(np.isfinite(rate) and rate > 0 for rate in rates.by_layer().values())


@pytest.mark.parametrize("outputs", [2, 60])
@pytest.mark.parametrize("images, expected", [(2, 2), (IMAGES, IMAGES), (8, 8), (100, 15)])
def test_no_more_than_the_first_images_are_seen_if_so_many_are_asked_for(outputs, images,
                                                                        expected):
    batches = held_batches(*[pictures(seed=seed) for seed in range(3)])
    sizes, found = seen_images(net_with(outputs), batches, [2, 0, 1], images)
    whole = np.concatenate([pictures(seed=seed) for seed in (2, 0, 1)])
    assert sum(sizes) == expected
    np.testing.assert_array_equal(found, whole[:expected])


def test_all_batches_are_seen_where_images_meet():
    """The sums over a batch are noisy: few outputs are no reason to take fewer of them."""
    working = net_with(49, layer("meet", "Reshape", "top", "", "reshape_param { shape { dim: -1 "
                                 "dim: 1 } }"))
    sizes, _ = seen_images(working, held_batches(pictures()), range(10))
    assert sizes == [IMAGES] * 10


def test_a_net_takes_whole_batches_again_whatever_it_was_left_with():
    working = net_with(2)
    with pytest.raises(KeyError):
        for _ in parts(working, held_batches(pictures()), [0], None):
            raise KeyError
    working.load(held_batches(pictures()), 0)
    working.forward()
    assert working.blob("top").data.shape == (IMAGES, 2)
    np.testing.assert_array_equal(working.blob("data").data, pictures())


# ---------------------------------------------------------------------------------------------
# Equations 3 and 4, figure 1b
# ---------------------------------------------------------------------------------------------

def by_hand(literal=False):
    """Two layers: the first with two groups of one input and 4 weights each, the second with three
    inputs of 2 weights each and two outputs of the net."""
    return ChangeRates(["one", "two"],
                       [np.array([[[36.0], [64.0]]]), np.array([[[1.0, 8, 0]], [[0, 8, 2]]])],
                       [np.array([[1.0], [3.0]]), np.array([[2.0, 2, 4]])], [4, 2], literal)


def test_rates_by_hand():
    rates = by_hand()
    # equation 2 with means of squares: sqrt(100 / 4), sqrt(19 / 8)
    assert rates.by_layer() == {"one": 5, "two": pytest.approx(np.sqrt(19 / 8))}
    # to the letter, over 8 and 6 weights: E[g^2] = 100 / 8 over a sum of 4, 19 / 6 over one of 8
    assert by_hand(True).by_layer() == pytest.approx({"one": np.sqrt(100 / 8 / 4),
                                                      "two": np.sqrt(19 / 6 / 8)})


def test_columns_by_hand():
    columns = by_hand().by_column()
    # equation 3: E[g^2] of a column's 4 or 2 weights over the mean square of 8 or 6 weights
    np.testing.assert_allclose(columns["one"], np.sqrt(np.array([9, 16]) / (4 / 8)))
    np.testing.assert_allclose(columns["two"], np.sqrt(np.array([0.5, 8, 1]) / (8 / 6)))
    literal = by_hand(True).by_column()
    np.testing.assert_allclose(literal["one"], np.sqrt(np.array([9, 16]) / 4))
    np.testing.assert_allclose(literal["two"], np.sqrt(np.array([0.5, 8, 1]) / 8))


@pytest.mark.parametrize("literal", [False, True])
def test_a_layers_rate_is_the_root_of_its_columns_mean_square(literal):
    rates = exact(working_net(DATA + LAYERS["behind others"], IMAGES), pictures(), literal=literal)
    for name, columns in rates.by_column().items():
        np.testing.assert_allclose(np.sqrt(np.mean(columns ** 2)), rates.by_layer()[name])


def test_variation_is_the_std_of_columns_over_their_mean_whatever_equation_2_divides_by():
    one = np.sqrt([36, 64])
    for literal in (False, True):
        np.testing.assert_allclose(by_hand(literal).variation()["one"], one.std() / one.mean())


def test_variation_of_one_column_is_0_and_of_noise_is_above():
    working = working_net(image_input(1, 1, 1, 1) + layer(
        "fc", "InnerProduct", "data", "", "inner_product_param { num_output: 60 }"), IMAGES)
    rng = np.random.default_rng(1)
    ones = held_batches(np.ones((IMAGES, 1, 1, 1)))
    assert measure(working, ones, [0], rng).variation() == {"fc": 0}
    working = net_with(60)
    rates = measure(working, held_batches(pictures()), [0], rng)
    assert all(value > 0.01 for value in rates.variation().values())


@pytest.mark.parametrize("text", [
    layer("k", "InnerProduct", "data", "", "inner_product_param { num_output: 8 }"),
    convolution("kernel_size: 1"),
], ids=["fully connected", "one by one"])
def test_equation_4_is_exact_where_input_and_gradient_are_independent(text):
    """On the last layer of a net: eta knows nothing of the images."""
    working, images = working_net(DATA + text, IMAGES), pictures()
    images *= np.array([1, 3, 0.5], np.float32).reshape(1, 3, 1, 1)
    rates = exact(working, images, literal=True)
    losses = np.random.default_rng(3).choice([-1, 1], working.blob("k").data.shape)
    found = independent_column_rates(images, losses, working.affine[0].weights)
    np.testing.assert_allclose(found, rates.by_column()["k"], rtol=1e-4)
    assert found.max() > 3 * found.min()


def test_equation_4_by_hand():
    z = np.array([[1.0, 2], [3, 0]])  # mean squares 5 and 2
    y = np.array([[1.0, 1, 1], [2, 0, 1]])  # squared norms 3 and 5
    weights = np.array([[1.0, 0], [0, 1], [1, 1]])
    np.testing.assert_allclose(independent_column_rates(z, y, weights),
                               np.sqrt(np.array([5, 2]) * 4 / (3 * 4)))


def test_spread_counts_rates_that_are_there():
    assert spread(dict(enumerate([1.0, 4.0, 2.0, 0.0, np.nan, np.inf]))) == 4
    assert spread({"a": np.nan, "b": 0.0}) == 1
    assert spread({}) == 1
