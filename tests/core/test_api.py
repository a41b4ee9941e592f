"""The functions on a user's own caffe.Net, in place: what they set, keep, give back and refuse."""
import inspect
import os
import subprocess
import sys

import numpy as np
import pytest
from initialized import (
    AFFINE,
    BODY,
    CONV,
    DATA,
    RELU,
    TOY,
    by_channel,
    own_data_layer,
    pixels,
    rates_on,
    spread_on,
    stored_weights,
    write_images,
)
from toy_nets import image_input, layer

import magic_init
from ddinit import api, between, session, weights
from ddinit.change_rates import measure
from ddinit.prototxt import import_caffe
from ddinit.weights import KINDS

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..")
FC = "inner_product_param { num_output: %d weight_filler { type: 'xavier' } }"
FILLER = "weight_filler { type: 'gaussian' std: 0.1 } "
LRN = DATA + layer("conv1", "Convolution", "data", "", CONV % (8, FILLER)) + RELU % (1, 1, 1) \
    + layer("norm1", "LRN", "conv1", "", "lrn_param { local_size: 3 alpha: 0.5 }") \
    + layer("conv2", "Convolution", "norm1", "", CONV % (8, FILLER)) + RELU % (2, 2, 2) \
    + layer("fc", "InnerProduct", "conv2", "", FC % 60)
# Response normalization that scales of a few hundred do not saturate.
MILD = LRN.replace("alpha: 0.5", "alpha: 0.001")
LOSS = layer("loss", "SoftmaxWithLoss", "fc4 label") \
    + layer("accuracy", "Accuracy", "fc4 label", "", "include { phase: TEST }")
PYTHON = '''
import caffe
import cv2


class Pictures(caffe.Layer):
    """Feeds the pictures of a list in batches of 4, with labels."""

    def setup(self, bottom, top):
        self.paths = self.param_str.split()
        self.at = 0

    def reshape(self, bottom, top):
        top[0].reshape(4, 3, 16, 16)
        top[1].reshape(4)

    def forward(self, bottom, top):
        for row in top[0].data:
            image = cv2.resize(cv2.imread(self.paths[self.at % len(self.paths)]), (16, 16))
            row[...] = image.transpose(2, 0, 1).astype(float) - [[[104]], [[117]], [[123]]]
            self.at += 1
        top[1].data[...] = 0

    def backward(self, top, propagate_down, bottom):
        pass
'''


@pytest.fixture
def prototxt(tmp_path):
    """Write a definition; return its path."""
    def written(text, name="net.prototxt"):
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)
    return written


def net_of(path, phase="TEST", weights=None):
    caffe = import_caffe()
    return caffe.Net(path, getattr(caffe, phase), **({"weights": weights} if weights else {}))


def numbers(net):
    """All parameters of a net, by layer."""
    return {name: [np.array(blob.data) for blob in blobs] for name, blobs in net.params.items()}


def same(one, other):
    return list(one) == list(other) and all(
        np.array_equal(a, b) for name in one for a, b in zip(one[name], other[name]))


def outputs_of(net, inputs, blob="data"):
    """The first top of every layer of a user's net, which has its batches again afterwards."""
    shape = tuple(net.blobs[blob].shape)
    net.blobs[blob].reshape(*inputs.shape)
    net.reshape()
    net.blobs[blob].data[...] = inputs
    found = {}
    for number, name in enumerate(net._layer_names):
        if len(net._bottom_ids(number)):
            net._forward(number, number)
            found[name] = np.array(net.blobs[net._blob_names[net._top_ids(number)[0]]].data)
    net.blobs[blob].reshape(*shape)
    net.reshape()
    return found


def check_normal(outputs, names=AFFINE, beta=0.1, rtol=2e-3):
    for name in names:
        rows = by_channel(outputs[name].astype(np.float64))
        np.testing.assert_allclose(rows.mean(axis=1), beta, atol=2 * rtol, err_msg=name)
        np.testing.assert_allclose(rows.std(axis=1), 1, rtol=rtol, err_msg=name)


def deployed(net, tmp_path):
    """The deploy net with a training net's weights: path of its definition and its net."""
    path, weights = str(tmp_path / "deploy.prototxt"), str(tmp_path / "trained.caffemodel")
    with open(path, "w") as file:
        file.write(TOY)
    net.save(weights)
    return net_of(path, weights=weights)


# ---------------------------------------------------------------------------------------------
# Images
# ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("form", ["pattern", "folder", "list of paths", "pathlib", "list file",
                                  "array"])
def test_images_may_be_given_in_any_form(prototxt, tmp_path, images, form):
    folder = os.path.dirname(images)
    paths = [os.path.join(folder, name) for name in sorted(os.listdir(folder))]
    (tmp_path / "list.txt").write_text("\n".join(paths))
    given = {"pattern": images, "folder": folder, "list of paths": paths,
             "list file": str(tmp_path / "list.txt"), "array": pixels(images).astype(np.float32),
             "pathlib": tmp_path / "list.txt"}
    path = prototxt(TOY)
    net, other = net_of(path), net_of(path)
    magic_init.initialize(net, path, given[form])
    check_normal(outputs_of(net, pixels(images)))
    magic_init.initialize(other, path, images)
    assert same(numbers(net), numbers(other))


@pytest.mark.parametrize("phase", ["TRAIN", "TEST"])
def test_a_deploy_nets_batches_are_those_of_its_blob(prototxt, images, monkeypatch, phase):
    opened = []
    monkeypatch.setattr(api, "open_session", lambda *arguments, **options: opened.append(
        session.open_session(*arguments, **options)) or opened[-1])
    path = prototxt(TOY)
    net = net_of(path, phase)
    magic_init.initialize(net, path, images, batches=2)
    assert (opened[-1].batches.size, opened[-1].count) == (10, 2)
    net.blobs["data"].reshape(6, 3, 16, 16)
    net.reshape()
    magic_init.initialize(net, path, images)
    assert (opened[-1].batches.size, opened[-1].count) == (6, 4)
    # in the TRAIN phase the last layer sees what dropout leaves
    check_normal(outputs_of(net, pixels(images)), AFFINE[:3] if phase == "TRAIN" else AFFINE)
    assert tuple(net.blobs["data"].shape) == (6, 3, 16, 16)


def test_images_have_the_size_to_which_the_user_reshaped_the_net(prototxt, images):
    path = prototxt(DATA + layer("conv1", "Convolution", "data", "", CONV % (4, "")))
    net = net_of(path)
    net.blobs["data"].reshape(4, 3, 20, 22)
    net.reshape()
    magic_init.initialize(net, path, images)
    check_normal(outputs_of(net, pixels(images, 20, 22)), ["conv1"])


def test_mean_and_scale_make_what_the_net_sees(prototxt, images):
    path = prototxt(TOY)
    net = net_of(path)
    magic_init.initialize(net, path, images, mean=(10, 20, 30), scale=0.1)
    check_normal(outputs_of(net, pixels(images, mean=(10, 20, 30), scale=0.1)))
    one, other = net_of(path), net_of(path)
    magic_init.initialize(one, path, images, mean=np.full((3, 5, 5), 50))
    magic_init.initialize(other, path, images, mean=50)
    assert same(numbers(one), numbers(other))


# ---------------------------------------------------------------------------------------------
# Training nets with a data layer of their own
# ---------------------------------------------------------------------------------------------

def training_net(kind, tmp_path, images, monkeypatch):
    """The definition of a net with a data layer of its own, loss, dropout and a fixed layer."""
    if kind == "Python":
        (tmp_path / "pictures_of_a_list.py").write_text(PYTHON)
        monkeypatch.syspath_prepend(str(tmp_path))
        folder = os.path.dirname(images)
        paths = " ".join(os.path.join(folder, name) for name in sorted(os.listdir(folder)))
        source = layer("data", "Python", "", "data label", "python_param { module: "
                       "'pictures_of_a_list' layer: 'Pictures' param_str: '%s' }" % paths)
    else:
        source = own_data_layer(kind, str(tmp_path), images)
    fixed = "param { lr_mult: 0 } param { lr_mult: 0 } convolution_param"
    body = BODY.replace("convolution_param", fixed, 1)
    return source + body + LOSS


@pytest.mark.parametrize("kind", ["ImageData", "Python", "HDF5"])
def test_a_training_net_is_fed_by_its_own_data_layer(prototxt, tmp_path, images, monkeypatch, kind):
    path = prototxt(training_net(kind, tmp_path, images, monkeypatch))
    net = net_of(path, "TRAIN")
    magic_init.initialize(net, path, kind="pca", batches=6)
    deploy = deployed(net, tmp_path)
    check_normal(outputs_of(deploy, pixels(images)))
    assert magic_init.calibrate(net, path, batches=6) is None
    deploy = deployed(net, tmp_path)
    assert spread_on(TOY, str(tmp_path / "trained.caffemodel"), pixels(images)) < 1.4
    rates = magic_init.change_rates(net, path, batches=6)
    assert list(rates) == AFFINE
    assert max(rates.values()) < 1.8 * min(rates.values())
    net.forward()  # and it trains on
    net.backward()
    assert np.isfinite(net.blobs["loss"].data).all()
    assert net.params["fc3"][0].diff.any() and not net.params["conv1"][0].diff.any()


def test_images_take_the_place_of_a_training_nets_data_layer(prototxt, tmp_path, images,
                                                            monkeypatch):
    path = prototxt(training_net("Python", tmp_path, images, monkeypatch))
    net = net_of(path, "TRAIN")
    others = write_images(str(tmp_path / "others"), 12, seed=7)
    before = net.layers[0].at
    magic_init.initialize(net, path, others)
    assert net.layers[0].at == before
    check_normal(outputs_of(deployed(net, tmp_path), pixels(others)))


def test_a_net_of_the_test_phase_is_fed_by_its_own_data_layer(prototxt, tmp_path, images):
    source = own_data_layer("ImageData", str(tmp_path), images)
    train = source.replace("list.txt", "gone.txt").replace(
        "top: 'data'", "include { phase: TRAIN } top: 'data'", 1)
    test = source.replace("top: 'data'", "include { phase: TEST } top: 'data'", 1)
    path = prototxt(train + test + BODY + LOSS)
    net = net_of(path, "TEST")
    magic_init.initialize(net, path, batches=6)
    check_normal(outputs_of(deployed(net, tmp_path), pixels(images)))


# ---------------------------------------------------------------------------------------------
# initialize
# ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_mean_beta_and_variance_1(prototxt, images, kind):
    path = prototxt(TOY)
    net = net_of(path)
    magic_init.initialize(net, path, images, kind=kind, beta=-0.3)
    check_normal(outputs_of(net, pixels(images)), beta=-0.3)


def test_a_seed_repeats_bit_by_bit_and_another_differs(prototxt, images):
    path = prototxt(TOY)
    made = []
    for seed in (3, 3, 4):
        net = net_of(path)
        magic_init.initialize(net, path, images, kind="kmeans", seed=seed)
        assert magic_init.calibrate(net, path, images, seed=seed) is None
        made.append(numbers(net))
    assert same(made[0], made[1]) and not same(made[0], made[2])


def test_only_the_layers_that_are_named_are_set(prototxt, images):
    path = prototxt(TOY.replace("kernel_size: 3", "kernel_size: 3 " + FILLER))
    net = net_of(path)
    before = numbers(net)
    magic_init.initialize(net, path, images, layers=["conv2", "fc4"])
    after = numbers(net)
    assert [name for name in AFFINE if not np.array_equal(before[name][0], after[name][0])] == [
        "conv2", "fc4"]
    check_normal(outputs_of(net, pixels(images)), ["conv2"])


def test_without_within_weights_stay_as_they_are_drawn(prototxt, images):
    path = prototxt(TOY)
    net = net_of(path)
    magic_init.initialize(net, path, images, within=False, beta=0.25)
    for filters, bias in numbers(net).values():
        assert filters.std() == pytest.approx(0.01, rel=0.3)
        assert (bias == 0.25).all()


def test_a_memory_limit_changes_no_bit(prototxt, images):
    path = prototxt(TOY)
    made = []
    for limit in (3000, 0):
        net = net_of(path)
        magic_init.initialize(net, path, images, mem_limit=limit)
        made.append(numbers(net))
    assert same(*made)


# ---------------------------------------------------------------------------------------------
# calibrate
# ---------------------------------------------------------------------------------------------

def test_a_chain_from_scratch_keeps_definition_and_outputs(prototxt, tmp_path, images):
    path = prototxt(TOY)
    net = net_of(path)
    magic_init.initialize(net, path, images, kind="kmeans")
    before = outputs_of(net, pixels(images))["fc4"]
    initialized = numbers(net)
    assert magic_init.calibrate(net, path, images) is None
    assert not same(initialized, numbers(net))
    np.testing.assert_allclose(outputs_of(net, pixels(images))["fc4"], before, atol=1e-3)
    net.save(str(tmp_path / "out.caffemodel"))
    assert spread_on(TOY, str(tmp_path / "out.caffemodel"), pixels(images)) < 1.2


def test_a_net_from_scratch_with_lrn_keeps_its_definition(prototxt, tmp_path, images):
    path = prototxt(MILD)
    net = net_of(path)
    magic_init.initialize(net, path, images)
    assert magic_init.calibrate(net, path, images) is None
    net.save(str(tmp_path / "out.caffemodel"))
    assert spread_on(MILD, str(tmp_path / "out.caffemodel"), pixels(images)) < 1.5


def test_outputs_from_scratch_get_the_std_that_is_asked_for(prototxt, images):
    path = prototxt(MILD)
    net = net_of(path)
    magic_init.initialize(net, path, images)
    magic_init.calibrate(net, path, images, output_std=3)
    assert outputs_of(net, pixels(images))["fc"].std() == pytest.approx(3, rel=0.2)


def loaded(path, tmp_path, phase="TEST"):
    """A net with weights of uneven scales, as a trained one has, the same each time."""
    import_caffe().set_random_seed(1)
    net = net_of(path, phase)
    for number, blobs in enumerate(net.params.values()):
        blobs[0].data[...] *= 4.0 ** (number % 2)
        if len(blobs) > 1:
            blobs[1].data[...] = 0.1
    return net


def test_a_loaded_net_with_lrn_gets_a_definition_that_computes_what_it_did(prototxt, tmp_path,
                                                                          images):
    path = prototxt(LRN)
    net = loaded(path, tmp_path)
    others = pixels(write_images(str(tmp_path / "others"), 6, seed=5))
    before = outputs_of(net, others)["fc"]
    text = magic_init.calibrate(net, path, images)
    assert text is not None and "lrn_param" in text
    changed = prototxt(text, "changed.prototxt")
    net.save(str(tmp_path / "new.caffemodel"))
    new = net_of(changed, weights=str(tmp_path / "new.caffemodel"))
    np.testing.assert_allclose(outputs_of(new, others)["fc"], before, atol=1e-4 * before.std())
    assert np.abs(outputs_of(net, others)["fc"] - before).max() > 0.01 * before.std()
    assert spread_on(text, str(tmp_path / "new.caffemodel"), others) < 1.5


def test_a_loaded_chain_keeps_its_function_and_its_definition(prototxt, tmp_path, images):
    path = prototxt(TOY.replace("kernel_size: 3", "kernel_size: 3 " + FILLER).replace(
        "inner_product_param {", "inner_product_param { " + FILLER))
    net = loaded(path, tmp_path)
    before = outputs_of(net, pixels(images))["fc4"]
    initialized = numbers(net)
    assert magic_init.calibrate(net, path, images) is None
    assert not same(initialized, numbers(net))
    np.testing.assert_allclose(outputs_of(net, pixels(images))["fc4"], before,
                               atol=1e-4 * before.std())


def test_a_training_nets_new_definition_still_trains(prototxt, tmp_path, images):
    text = own_data_layer("ImageData", str(tmp_path), images) + LRN[len(DATA):] \
        + layer("loss", "SoftmaxWithLoss", "fc label")
    path = prototxt(text)
    net = loaded(path, tmp_path, "TRAIN")
    changed = prototxt(magic_init.calibrate(net, path, batches=6), "changed.prototxt")
    net.save(str(tmp_path / "new.caffemodel"))
    new = net_of(changed, "TRAIN", str(tmp_path / "new.caffemodel"))
    new.forward()
    new.backward()
    assert np.isfinite(new.blobs["loss"].data) and new.params["conv1"][0].diff.any()


def test_a_partly_initialized_net_keeps_its_function(prototxt, tmp_path, images):
    path = prototxt(LRN)
    net = loaded(path, tmp_path)
    magic_init.initialize(net, path, images, layers=["fc"])
    before = outputs_of(net, pixels(images))["fc"]
    text = magic_init.calibrate(net, path, images)
    net.save(str(tmp_path / "new.caffemodel"))
    new = net_of(prototxt(text, "changed.prototxt"), weights=str(tmp_path / "new.caffemodel"))
    np.testing.assert_allclose(outputs_of(new, pixels(images))["fc"], before,
                               atol=1e-4 * before.std())


def test_the_function_is_kept_or_not_as_the_user_wants(prototxt, images, tmp_path):
    path = prototxt(MILD)
    fresh, old = net_of(path), loaded(path, tmp_path)
    magic_init.initialize(fresh, path, images)
    assert "LRN" in magic_init.calibrate(fresh, path, images, keep_function=True)
    assert magic_init.calibrate(old, path, images, keep_function=False) is None


def test_weights_loaded_after_initialize_keep_their_function(prototxt, tmp_path, images):
    path = prototxt(LRN)
    net, trained = net_of(path), loaded(path, tmp_path)
    magic_init.initialize(net, path, images)
    trained.save(str(tmp_path / "trained.caffemodel"))
    net.copy_from(str(tmp_path / "trained.caffemodel"))
    assert magic_init.calibrate(net, path, images) is not None


def test_the_papers_schedule_leaves_what_it_must(prototxt, tmp_path, images):
    path = prototxt(TOY)
    spreads = []
    for iterations in (0, 4):
        net = net_of(path)
        magic_init.initialize(net, path, images)
        if iterations:
            magic_init.calibrate(net, path, images, alpha=0.25, iterations=iterations)
        net.save(str(tmp_path / "out.caffemodel"))
        spreads.append(spread_on(TOY, str(tmp_path / "out.caffemodel"), pixels(images)))
    assert np.log(spreads[1]) == pytest.approx(0.75 ** 4 * np.log(spreads[0]), rel=0.1)


@pytest.mark.parametrize("keep_function", [True, False])
@pytest.mark.parametrize("batches, held_back", [(3, 3), (4, 3)])
def test_a_batch_judges_that_was_held_back_where_there_are_images_enough(
        prototxt, tmp_path, images, monkeypatch, keep_function, batches, held_back):
    seen = []
    for module in (between, session):
        monkeypatch.setattr(module, "measure", lambda net, fed, numbers, *rest, **options: (
            seen.append(list(numbers)), measure(net, fed, numbers, *rest, **options))[1])
    path = prototxt(LRN)
    net = loaded(path, tmp_path)
    net.blobs["data"].reshape(6, 3, 16, 16)  # of 24 images
    net.reshape()
    magic_init.calibrate(net, path, images, batches=batches, keep_function=keep_function)
    assert [held_back] in seen
    others = {number for numbers in seen if numbers != [held_back] for number in numbers}
    assert others and others <= set(range(batches))
    if keep_function or batches == 3:
        assert held_back not in others


@pytest.mark.parametrize("count, expected", [(10, [6, 7, 8, 9]), (5, [2, 3, 4]), (4, [2, 3]),
                                             (2, [1]), (1, [0])])
def test_filters_come_from_other_batches_than_the_last_step(prototxt, images, monkeypatch, count,
                                                           expected):
    assert between.last_batches(count) == expected
    used = []
    set_filters = weights.set_filters
    monkeypatch.setattr(weights, "set_filters", lambda *arguments: (
        used.append(arguments[4]), set_filters(*arguments)))
    path = prototxt(TOY)
    net = net_of(path)
    net.blobs["data"].reshape(2, 3, 16, 16)
    net.reshape()
    magic_init.initialize(net, path, images, kind="kmeans", batches=count)
    assert used == [max(1, expected[0])] * 2


# ---------------------------------------------------------------------------------------------
# change_rates
# ---------------------------------------------------------------------------------------------

def test_rates_are_those_of_caffes_gradients_and_leave_the_net_alone(prototxt, tmp_path, images):
    path = prototxt(LRN)
    net = loaded(path, tmp_path)
    net.blobs["data"].data[...] = 7
    net.forward()
    blobs = {name: np.array(blob.data) for name, blob in net.blobs.items()}
    before = numbers(net)
    rates = magic_init.change_rates(net, path, images)
    assert list(rates) == ["conv1", "conv2", "fc"]
    net.save(str(tmp_path / "net.caffemodel"))
    expected = rates_on(LRN, str(tmp_path / "net.caffemodel"), pixels(images))
    assert rates == pytest.approx(expected, rel=0.25)
    assert same(before, numbers(net))
    assert all(np.array_equal(blob, net.blobs[name].data) for name, blob in blobs.items())
    assert magic_init.change_rates(net, path, images) == rates
    assert magic_init.change_rates(net, path, images, seed=1) != rates


def test_literal_rates_are_over_the_sum_of_squared_weights(prototxt, tmp_path, images):
    path = prototxt(LRN)
    net = loaded(path, tmp_path)
    usual, literal = (magic_init.change_rates(net, path, images, literal=literal)
                      for literal in (False, True))
    for name, rate in usual.items():
        assert literal[name] == pytest.approx(rate / np.sqrt(net.params[name][0].data.size))


# ---------------------------------------------------------------------------------------------
# What cannot be done
# ---------------------------------------------------------------------------------------------

FUNCTIONS = [magic_init.initialize, magic_init.calibrate, magic_init.change_rates]


def refusal(function, net, *arguments, **options):
    """The message of an error that leaves the net as it was."""
    before = numbers(net)
    with pytest.raises(ValueError) as error:
        function(net, *arguments, **options)
    assert same(before, numbers(net))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_definition_of_another_net_is_told_with_layer_and_shapes(prototxt, images, function):
    net = net_of(prototxt(TOY))
    wider = prototxt(TOY.replace("num_output: 12", "num_output: 13"), "wider.prototxt")
    message = refusal(function, net, wider, images)
    assert "layer 'fc3'" in message and "[12, 294]" in message and "[13, 294]" in message
    other = prototxt(TOY.replace("'fc4'", "'fc5'"), "other.prototxt")
    assert "layer 'fc5'" in refusal(function, net, other, images)
    biased = prototxt(TOY.replace("num_output: 5", "num_output: 5 bias_term: false"), "b.prototxt")
    message = refusal(function, net, biased, images)
    assert "layer 'fc4'" in message and "[5, 12] and [5]" in message
    deeper = net_of(prototxt(TOY + layer("fc6", "InnerProduct", "fc4", "", FC % 2), "6.prototxt"))
    if function is not magic_init.change_rates:
        assert "layer 'fc6'" in refusal(function, deeper, prototxt(TOY), images)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_images_that_do_not_fit_are_told(prototxt, tmp_path, images, function):
    path = prototxt(TOY)
    net = net_of(path)
    message = refusal(function, net, path, np.zeros((20, 3, 16, 17), np.float32))
    assert "[20, 3, 16, 17]" in message and "'data'" in message and "[3, 16, 16]" in message
    for array in (np.zeros((0, 3, 16, 16)), np.zeros((16, 16, 3))):
        assert "'data'" in refusal(function, net, path, array)
    assert "none/*.jpg: no images there" in refusal(function, net, path,
                                                    str(tmp_path / "none" / "*.jpg"))
    assert "images" in refusal(function, net, path)  # it has no data layer
    assert "images" in refusal(function, net, path, [])


@pytest.mark.parametrize("function", FUNCTIONS)
def test_definitions_and_numbers_that_cannot_be_used_are_told(prototxt, tmp_path, images, function):
    path = prototxt(TOY)
    net = net_of(path)
    assert "gone.prototxt: cannot read" in refusal(function, net, str(tmp_path / "gone.prototxt"),
                                                   images)
    assert "bad.prototxt: not a net definition" in refusal(
        function, net, prototxt("layer {", "bad.prototxt"), images)
    assert "batches is 0" in refusal(function, net, path, images, batches=0)


@pytest.mark.parametrize("options", [
    {"alpha": 0}, {"alpha": 1.5}, {"alpha": float("nan")}, {"iterations": 0}, {"output_std": 0},
    {"output_std": -1}, {"output_std": float("inf")}], ids=str)
def test_steps_that_cannot_be_taken_are_told(prototxt, images, options):
    path = prototxt(TOY)
    message = refusal(magic_init.calibrate, net_of(path), path, images, **options)
    assert repr(list(options.values())[0]) in message


def test_unknown_kinds_and_layers_are_told(prototxt, images):
    path = prototxt(TOY)
    net = net_of(path)
    message = refusal(magic_init.initialize, net, path, images, kind="sift")
    assert "'sift'" in message and "kmeans" in message
    message = refusal(magic_init.initialize, net, path, images, layers=["conv1", "conv9"])
    assert "layer 'conv9'" in message and "conv1, conv2" in message


def test_what_is_not_finite_is_told_with_its_layer(prototxt, images):
    path = prototxt(TOY)
    net = net_of(path)
    array = pixels(images).astype(np.float32)
    array[3] = np.nan
    assert "layer 'conv1': its output is not finite" in refusal(magic_init.initialize, net, path,
                                                                array)


def test_an_output_that_would_differ_is_told_and_the_net_stays_as_it_was(prototxt, tmp_path, images,
                                                                        monkeypatch):
    monkeypatch.setattr(api, "TOLERANCE", -1.0)
    path = prototxt(LRN)
    message = refusal(magic_init.calibrate, loaded(path, tmp_path), path, images)
    assert "outputs differ by" in message and "the net stays as it was" in message


def test_layers_of_one_phase_alone_do_not_leave_a_net_half_set(prototxt, images):
    """A layer with weights that only testing has is no part of the training net."""
    path = prototxt(TOY + layer("extra", "InnerProduct", "fc3", "", "include { phase: TEST } "
                                + FC % 2))
    net = net_of(path, "TEST")
    before = numbers(net)
    try:
        magic_init.initialize(net, path, images)
    except ValueError as error:
        assert "layer 'extra'" in str(error)
        assert same(before, numbers(net))
    else:
        check_normal(outputs_of(net, pixels(images)))


# ---------------------------------------------------------------------------------------------
# The module
# ---------------------------------------------------------------------------------------------

def python(code, **variables):
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **variables},
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True,
                          check=False)


def test_importing_the_module_loads_nothing_that_takes_long_or_may_be_missing():
    found = python("import sys, magic_init\nprint(*[name for name in ('caffe', 'lmdb', 'sklearn', "
                   "'matplotlib', 'skimage', 'h5py') if name in sys.modules])")
    assert (found.stdout, found.stderr) == ("\n", "")


def test_names_and_arguments_are_those_that_users_write():
    assert {"initialize", "calibrate", "change_rates"} <= set(magic_init.__all__)
    for function in FUNCTIONS:
        parameters = inspect.signature(function).parameters
        assert list(parameters)[:3] == ["net", "prototxt", "images"]
        defaults = {name: parameters[name].default for name in ("images", "batches", "seed")}
        assert defaults == {"images": None, "batches": 10, "seed": 0}


def test_results_do_not_depend_on_the_number_of_threads_but_for_rounding(prototxt, tmp_path,
                                                                       images):
    path = prototxt(TOY)
    found = []
    for threads in ("1", "2"):
        output = str(tmp_path / ("out%s.caffemodel" % threads))
        ran = python("import sys, magic_init; sys.exit(magic_init.main(%r))" % [
            path, output, "-d", images, "-bs", "8", "-t", "kmeans", "-cs", "--cpu", "-q"],
            OPENBLAS_NUM_THREADS=threads)
        assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")
        found.append(stored_weights(output))
    for name in AFFINE:
        for one, other in zip(found[0][name], found[1][name]):
            np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4 * np.abs(one).max())


def test_unlike_inputs_of_one_net_are_told(prototxt, images):
    path = prototxt(DATA + image_input(10, 3, 16, 16, name="other") + layer(
        "both", "Concat", "data other") + layer("fc", "InnerProduct", "both", "", FC % 2))
    net = net_of(path)
    for function in FUNCTIONS:
        message = refusal(function, net, path, images)
        assert "exactly one input blob" in message and "'other'" in message
