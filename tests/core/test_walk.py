"""The walk leaves in every blob what a plain forward pass would, and keeps no blob too long."""
import ctypes
import os
import tempfile

import numpy as np
import pytest
from threadpoolctl import threadpool_info
from toy_nets import SIZE, image_input, layer, random_graph, working_net

from ddinit import net
from ddinit.net import affine_view, choose_device
from ddinit.prototxt import import_caffe
from ddinit.walk import BlobStore, Statistics, segments, walk

AFFINE = ("Convolution", "InnerProduct", "Scale", "Deconvolution")
CONV = "convolution_param { num_output: %d kernel_size: 3 pad: 1 }"
BATCHES = 3


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(5).standard_normal((BATCHES, 2, 3, SIZE, SIZE)).astype(np.float32)


def put(images):
    return lambda batch, net: np.copyto(net.blobs["data"].data, images[batch])


def loaded(store, name, batch, shape=(2, 3, 4, 4)):
    """What a store writes into a blob."""
    blob = np.full(shape, -1, np.float32)
    store.load(name, batch, blob)
    return blob


def walked(working, images, store=None, stop_types=AFFINE):
    """Statistics of each layer's output that a walk meets, and all last blobs."""
    found = {}
    store = BlobStore(1e9) if store is None else store
    for stop in walk(working, store, len(images), stop_types, put(images)):
        if stop.statistics is not None:
            found[stop.layer.name] = stop.statistics
    return found


def forwarded(working, images):
    """For each layer the outputs (images, channels, ...) of plain forward passes."""
    found = {}
    for batch in images:
        working.blob("data").data[...] = batch
        for one in working.layers:
            working.net._forward(one.position, one.position)
            for top in one.tops[:1]:
                found.setdefault(one.name, []).append(np.array(working.blob(top).data))
    return {name: np.concatenate(parts) for name, parts in found.items()}


def by_channel(outputs):
    return np.moveaxis(outputs.astype(np.float64), 1, 0).reshape(outputs.shape[1], -1)


# ---------------------------------------------------------------------------------------------
# Statistics
# ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("shape", [(4, 5, 3, 2), (4, 5), (6,), (3, 2, 7), (1, 2, 1, 1)], ids=str)
@pytest.mark.parametrize("mean", [0, 1000])
def test_statistics_are_numpys_over_all_batches(shape, mean):
    parts = (mean + np.random.default_rng(1).standard_normal((3,) + shape)).astype(np.float32)
    statistics = Statistics()
    for part in parts:
        statistics.add(part)
    whole = parts.reshape((-1,) + shape[1:]).astype(np.float64)
    expected = by_channel(whole) if len(shape) > 1 else whole.reshape(1, -1)
    np.testing.assert_allclose(statistics.mean, expected.mean(axis=1), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(statistics.variance, expected.var(axis=1), rtol=1e-4)
    overall = statistics.overall()
    np.testing.assert_allclose(overall, (expected.mean(), expected.var()), rtol=1e-4, atol=1e-5)


def test_statistics_of_a_huge_mean_keep_the_digits_that_float32_has():
    blob = (30000 + np.random.default_rng(1).integers(0, 2, (8, 1, 16, 16))).astype(np.float32)
    statistics = Statistics()
    statistics.add(blob)
    assert statistics.variance[0] == pytest.approx(blob.astype(np.float64).var(), rel=1e-3)
    constant = Statistics()
    constant.add(np.full((8, 1, 16, 16), 12345.678, np.float32))
    assert constant.variance[0] < 1e-4


def test_changed_statistics_are_those_of_the_changed_numbers():
    blob = np.random.default_rng(1).standard_normal((4, 3, 5)).astype(np.float32)
    factor, shift = np.array([2.0, -1.0, 0.5]), np.array([1.0, 0.0, -3.0])
    before, after = Statistics(), Statistics()
    before.add(blob)
    after.add(blob * factor[:, None].astype(np.float32) + shift[:, None].astype(np.float32))
    changed = before.changed(factor, shift)
    np.testing.assert_allclose(changed.mean, after.mean, rtol=1e-5)
    np.testing.assert_allclose(changed.variance, after.variance, rtol=1e-5)


# ---------------------------------------------------------------------------------------------
# The store
# ---------------------------------------------------------------------------------------------

def blob_of(value, shape=(2, 3, 4, 4)):
    return np.full(shape, value, np.float32)


@pytest.mark.parametrize("limit", [1e9, 0, 2 * blob_of(0).nbytes])
def test_store_gives_back_what_was_put_from_memory_or_file(limit):
    store = BlobStore(limit)
    for batch in range(4):
        store.put("a", batch, blob_of(batch))
        store.put("b", batch, blob_of(10 + batch, (2, 5)))
    for batch in (3, 0, 2, 1):
        assert (loaded(store, "a", batch) == batch).all()
        assert (loaded(store, "b", batch, (2, 5)) == 10 + batch).all()
    store.put("a", 1, blob_of(77))
    assert (loaded(store, "a", 1) == 77).all()
    assert (loaded(store, "a", 2) == 2).all()
    assert 0 <= store.free <= limit
    assert (store.spooled_bytes == 0) == (limit == 1e9)


def test_store_copies_and_does_not_touch_what_it_was_given():
    store = BlobStore(1e9)
    blob = blob_of(1)
    store.put("a", 0, blob)
    blob[...] = 2
    assert (loaded(store, "a", 0) == 1).all()


@pytest.mark.parametrize("limit", [1e9, 0])
def test_change_is_made_on_loading_until_it_is_settled(limit):
    store = BlobStore(limit)
    store.put("a", 0, blob_of(2))
    store.put("fc", 0, blob_of(2, (4, 3)))
    for name, shape, axis in (("a", (2, 3, 4, 4), (3, 1, 1)), ("fc", (4, 3), (3,))):
        store.change(name, np.array([1.0, 2.0, 3.0]), np.array([0.0, 1.0, 0.5]))
        expected = np.broadcast_to(np.array([2, 5, 6.5]).reshape(axis), shape)
        for _ in range(2):  # what is kept stays as it was put
            np.testing.assert_array_equal(loaded(store, name, 0, shape), expected)
        store.settle(name)
        assert (loaded(store, name, 0, shape) == 2).all()


def test_dropped_memory_is_used_again_and_what_was_dropped_is_gone():
    store = BlobStore(2 * blob_of(0).nbytes)
    for batch in range(50):
        store.put("a", batch, blob_of(batch))
        store.drop("a", batch - 1)
    assert (loaded(store, "a", 49) == 49).all()
    assert store.spooled_bytes == 0
    store.drop("a", 49)
    store.drop("never", 3)
    assert store.free == 2 * blob_of(0).nbytes
    with pytest.raises(KeyError):
        loaded(store, "a", 49)


def test_temporary_files_are_gone_with_what_they_held(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    store = BlobStore(0)
    for batch in range(5):
        store.put("a", batch, blob_of(batch))
    files = "/proc/self/fd"
    assert os.listdir(str(tmp_path)) == []  # they have no name, so that a killed run leaves none
    assert store.spooled_bytes == 5 * blob_of(0).nbytes
    before = len(os.listdir(files))
    for batch in range(5):
        store.drop("a", batch)
    assert len(os.listdir(files)) == before - 5
    assert store.free == 0


# ---------------------------------------------------------------------------------------------
# Segments and the walk
# ---------------------------------------------------------------------------------------------

CHAIN = (image_input(2, 3, SIZE, SIZE)
         + layer("a", "Convolution", "data", "", CONV % 4) + layer("relu", "ReLU", "a", "a")
         + layer("b", "Convolution", "a", "", CONV % 4)
         + layer("c", "Convolution", "a", "", CONV % 4)
         + layer("sum", "Eltwise", "a b c") + layer("d", "InnerProduct", "sum", "",
                                                    "inner_product_param { num_output: 2 }"))


def test_segments_stop_at_layers_with_weights_and_know_each_blobs_last_reader():
    cut = segments(working_net(CHAIN), AFFINE)
    stops = [segment.stop.name if segment.stop else None for segment in cut]
    assert stops == ["a", None, "b", "c", None, "d"]
    assert [segment.reads for segment in cut] == [
        ["data"], ["a"], ["a"], ["a"], ["a", "b", "c"], ["sum"]]
    assert [segment.keeps for segment in cut] == [["a"], ["a"], ["b"], ["c"], ["sum"], []]
    assert [segment.forgets for segment in cut] == [["data"], [], [], [], ["a", "b", "c"], ["sum"]]


class Watched(BlobStore):
    """A store that remembers the most that it held at a time."""
    peak = 0

    def put(self, name, batch, blob):
        super().put(name, batch, blob)
        self.peak = max(self.peak, len(self._held))

    @property
    def left(self):
        return set(self._held)


def test_a_blob_is_dropped_after_its_last_reader_batch_by_batch(images):
    chain = image_input(2, 3, SIZE, SIZE) + "".join(
        layer("c%d" % number, "Convolution", "c%d" % (number - 1) if number else "data", "",
              CONV % 4) for number in range(6))
    store = Watched(1e9)
    walked(working_net(chain), images, store)
    assert not store.left
    assert store.free == 1e9
    assert store.peak <= BATCHES + 1  # never two layers' blobs of all batches at a time


@pytest.mark.parametrize("seed", range(12))
def test_walk_over_random_graphs_meets_what_plain_passes_do(seed, images):
    working = working_net(random_graph(seed))
    expected = forwarded(working, images)
    for limit in (1e9, 3000):
        store = Watched(limit)
        found = walked(working, images, store)
        assert set(found) == {one.name for one in working.layers
                              if one.type in AFFINE and len(one.blobs)}
        for name, statistics in found.items():
            outputs = by_channel(expected[name])
            np.testing.assert_allclose(statistics.mean, outputs.mean(axis=1), rtol=1e-3,
                                       atol=1e-4)
            np.testing.assert_allclose(statistics.variance, outputs.var(axis=1), rtol=1e-3,
                                       atol=1e-6)
        assert not store.left
    for name in working.outputs:  # the net was left with the last batch
        maker = [one for one in working.layers if name in one.tops][-1]
        if maker.tops[0] == name:
            np.testing.assert_allclose(working.blob(name).data, expected[maker.name][-2:],
                                       rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", range(12))
def test_layers_changed_on_the_way_need_no_second_pass(seed, images):
    """Normalise every convolution as Algorithm 1 does: plain passes then find it done."""
    working = working_net(random_graph(seed))
    store = BlobStore(5000)
    normalized = []
    for stop in walk(working, store, BATCHES, AFFINE, put(images)):
        if stop.statistics is None or stop.layer.type == "Scale":
            continue
        if stop.statistics.variance.min() < 1e-8:
            continue
        factor = 1 / np.sqrt(stop.statistics.variance)
        shift = 0.5 - stop.statistics.mean * factor
        rows = affine_view(stop.layer, stop.layer.weights, 1)
        rows *= factor.astype(np.float32).reshape(rows.shape[:2] + (1, 1))
        stop.layer.blobs[1].data[...] = stop.layer.blobs[1].data * factor + shift
        for top in stop.layer.tops:
            store.change(top, factor, shift)
        normalized.append(stop.layer.name)
    outputs = forwarded(working, images)
    assert normalized
    for name in normalized:
        rows = by_channel(outputs[name])
        np.testing.assert_allclose(rows.mean(axis=1), 0.5, atol=2e-3)
        np.testing.assert_allclose(rows.var(axis=1), 1, rtol=5e-3)


def test_before_a_layer_runs_its_bottoms_can_be_loaded(images):
    working = working_net(CHAIN)
    expected = forwarded(working, images)
    for stop in walk(working, BlobStore(1e9), BATCHES, AFFINE, put(images)):
        bottom = stop.layer.bottoms[0]
        outputs = {"data": images.reshape(-1, 3, SIZE, SIZE), "a": expected["relu"],
                   "sum": expected["sum"]}[bottom]
        for batch in (2, 0) if stop.statistics is None else ():
            stop.load(batch)
            np.testing.assert_allclose(working.blob(bottom).data,
                                       outputs[2 * batch:2 * batch + 2], rtol=1e-5)


def test_input_changed_in_place_is_not_fed_again(images):
    working = working_net(image_input(2, 3, SIZE, SIZE)
                          + layer("twice", "Power", "data", "data", "power_param { scale: 2 }")
                          + layer("a", "Convolution", "data", "", CONV % 4)
                          + layer("b", "Convolution", "data", "", CONV % 4))
    expected = forwarded(working, images)
    found = walked(working, images)
    for name in ("a", "b"):
        np.testing.assert_allclose(found[name].variance, by_channel(expected[name]).var(axis=1),
                                   rtol=1e-4)


def test_layers_of_one_name_are_told_apart(images):
    working = working_net(image_input(2, 3, SIZE, SIZE)
                          + layer("a", "Convolution", "data", "", CONV % 4)
                          + layer("same", "ReLU", "a", "b", "relu_param { negative_slope: 0.5 }")
                          + layer("same", "ReLU", "a", "c", "relu_param { negative_slope: 0.1 }")
                          + layer("sum", "Eltwise", "b c"))
    assert [(one.bottoms, one.tops) for one in working.layers if one.name == "same"] == [
        (["a"], ["b"]), (["a"], ["c"])]
    slopes = [one.parameters.relu_param.negative_slope for one in working.layers
              if one.name == "same"]
    np.testing.assert_allclose(slopes, [0.5, 0.1])


def test_a_split_of_the_users_own_is_a_layer(images):
    working = working_net(image_input(2, 3, SIZE, SIZE)
                          + layer("a", "Convolution", "data", "", CONV % 4)
                          + layer("mine", "Split", "a", "b c")
                          + layer("d", "Convolution", "b", "", CONV % 2))
    assert working.outputs == ["c", "d"]
    expected = forwarded(working, images)
    found = walked(working, images)
    np.testing.assert_allclose(found["d"].mean, by_channel(expected["d"]).mean(axis=1), atol=1e-4)


# ---------------------------------------------------------------------------------------------
# Weights as matrices
# ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind, parameters, multiply", [
    ("Convolution", CONV % 4 + " ", None),
    ("Convolution", "convolution_param { num_output: 4 kernel_size: 3 group: 2 }", None),
    ("Deconvolution", "convolution_param { num_output: 4 kernel_size: 3 group: 2 }", None),
    ("InnerProduct", "inner_product_param { num_output: 5 }", None),
    ("InnerProduct", "inner_product_param { num_output: 5 transpose: true }", None),
    ("Scale", "", None)], ids=["conv", "groups", "deconv", "fc", "transposed fc", "scale"])
def test_affine_view_finds_outputs_and_inputs(kind, parameters, multiply):
    """Scaling input channel 1 and dividing its weights, or scaling output 3's: as expected."""
    working = working_net(image_input(2, 3, 6, 6) + layer("a", "Convolution", "data", "", CONV % 4)
                          + layer("x", kind, "a", "", parameters))
    x = working.layers[-1]
    bottom, top = working.blob("a"), working.blob("x")
    bottom.data[...] = np.random.default_rng(1).standard_normal(bottom.data.shape)
    working.net._forward(x.position, x.position)
    before = np.array(top.data)
    rows = affine_view(x, x.weights, 4)
    groups, outputs, inputs, _ = rows.shape
    assert groups * inputs == 4 and groups * outputs == top.data.shape[1]
    rows[1 // inputs, :, 1 % inputs] /= 3
    bottom.data[:, 1] *= 3
    working.net._forward(x.position, x.position)
    np.testing.assert_allclose(top.data, before, rtol=1e-3, atol=1e-5)
    if len(x.blobs) > 1:
        x.blobs[1].data[...] = 0
        working.net._forward(x.position, x.position)
        before = np.array(top.data)
    rows[3 // outputs, 3 % outputs] *= 2
    working.net._forward(x.position, x.position)
    before[:, 3] *= 2
    np.testing.assert_allclose(top.data, before, rtol=1e-3, atol=1e-5)


# ---------------------------------------------------------------------------------------------
# Devices
# ---------------------------------------------------------------------------------------------

def test_a_gpu_that_is_not_there_is_one_line_and_the_cpu_needs_no_probe():
    assert choose_device(True, None) is None
    assert choose_device(True, 0) is None
    with pytest.raises(ValueError, match="^GPU 97 cannot be used: ") as error:
        choose_device(False, 97)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------
# Threads
# ---------------------------------------------------------------------------------------------

def threads():
    """How many threads the BLAS of Caffe's own library and all others take."""
    caffes = ctypes.CDLL(import_caffe()._caffe.__file__)
    own = [caffes.openblas_get_num_threads()] if hasattr(caffes, "openblas_get_num_threads") else []
    return own + [one["num_threads"] for one in threadpool_info() if one["user_api"] == "blas"]


@pytest.mark.parametrize("error", [None, KeyError])
def test_small_nets_compute_on_one_thread_and_the_number_is_given_back(error):
    working = working_net(CHAIN)
    before = threads()
    assert before
    try:
        with net.blas_threads(working):
            assert set(threads()) == {1}
            if error:
                raise error
    except KeyError:
        assert error
    assert threads() == before


def test_large_nets_take_what_threads_there_are(monkeypatch):
    monkeypatch.setattr(net, "SMALL_LAYER", 8 * 8 * 4 * 4 * 9)  # the products of CHAIN's layer b
    working = working_net(CHAIN)
    before = threads()
    with net.blas_threads(working):
        assert threads() == before
    monkeypatch.setattr(net, "SMALL_LAYER", 8 * 8 * 4 * 4 * 9 + 1)
    with net.blas_threads(working):
        assert set(threads()) == {1}
