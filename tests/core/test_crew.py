"""Processes that share a net agree with one that has it alone, and end together."""
import os
import signal
import time

import numpy as np
import pytest
from initialised import DATA, TOY, pixels, plain_outputs, run, stored_weights, write_images
from test_any_net import INCEPTION, RESIDUAL, TWO_OUTPUTS, trained
from test_processes import UNKNOWN_TYPE, Stubborn, building
from toy_nets import layer

from ddinit import change_rates, crew, weights
from ddinit.caffe_net import Geometry
from ddinit.change_rates import Moments
from ddinit.crew import Crew, together
from ddinit.processes import ChildDied, in_child
from ddinit.prototxt import caffe_messages, mixing_layer, read_definition

# ---------------------------------------------------------------------------------------------
# Talking.  The functions that run in a child are found by their names.
# ---------------------------------------------------------------------------------------------

def run_together(size, function, *arguments):
    """What `function` returns in the first process of a crew, itself in a child of this one."""
    return in_child(together, size, function, *arguments)


def talk(own):
    return own.gather(own.rank * 10), own.gather("of %d" % own.rank), own.first


def add_up(own):
    arrays = [np.arange(6, dtype=np.float32).reshape(2, 3) * (own.rank + 1) for _ in range(4)]
    return [own.total(array) for array in arrays] + [
        own.total(np.ones(2 * crew.CHUNK + 7, np.float32))]


def fail(own, rank):
    if own.rank == rank:
        raise FileNotFoundError(2, "gone", "net")
    own.gather(None)
    own.gather(None)


def fail_stubbornly(own):
    if not own.first:
        raise Stubborn("net", 3)
    own.gather(None)


def end(own, number):
    if own.rank == 1:
        os.kill(os.getpid(), number)
    own.gather(None)


def stop_in_caffe(own):
    if own.rank == 1:
        building(UNKNOWN_TYPE)
    own.gather(None)


def leave(own, path):
    own.gather(None)
    if own.rank == 1:
        with open(path, "w") as file:
            file.write(str(os.getpid()))
        own.gather(None)
        time.sleep(60)
    own.gather(None)
    raise ValueError("the first ends")


@pytest.mark.parametrize("size", [1, 2, 3])
def test_values_are_gathered_in_order_of_rank_and_the_first_returns(size):
    numbers, words, first = run_together(size, talk)
    assert numbers == [10 * rank for rank in range(size)]
    assert words == ["of %d" % rank for rank in range(size)]
    assert first


@pytest.mark.parametrize("size", [1, 2, 3])
def test_arrays_add_up(size):
    *found, ones = run_together(size, add_up)
    for total in found:
        np.testing.assert_array_equal(total, [[0, 1, 2], [3, 4, 5]] * np.array(
            size * (size + 1) / 2))
    np.testing.assert_array_equal(ones, [size] * (2 * crew.CHUNK + 7))


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_what_any_process_raises_is_raised(rank):
    with pytest.raises(FileNotFoundError, match="gone: 'net'"):
        run_together(3, fail, rank)


def test_errors_that_cannot_travel_are_told_all_the_same():
    with pytest.raises(ValueError, match="net:3 is wrong"):
        run_together(2, fail_stubbornly)


@pytest.mark.parametrize("number, message", [
    (signal.SIGKILL, "memory ran out"), (signal.SIGABRT, "SIGABRT"), (signal.SIGSEGV, "SIGSEGV")])
def test_all_end_as_the_one_that_was_killed(number, message):
    with pytest.raises(ChildDied, match=message):
        run_together(2, end, number)


def test_the_last_words_of_caffe_are_told_whoever_said_them():
    with pytest.raises(ChildDied, match="Caffe stopped: .*Nonsense"):
        run_together(2, stop_in_caffe)


def test_no_process_outlives_the_first(tmp_path):
    path = str(tmp_path / "pid")
    with pytest.raises(ValueError, match="the first ends"):
        run_together(2, leave, path)
    with open(path) as file:
        member = int(file.read())
    ended = time.monotonic() + 10
    while os.path.exists("/proc/%d/stat" % member) and time.monotonic() < ended:
        with open("/proc/%d/stat" % member) as file:
            if file.read().split(") ")[1][0] == "Z":  # whoever adopted it has not looked yet
                break
        time.sleep(0.05)
    assert time.monotonic() < ended


# ---------------------------------------------------------------------------------------------
# Sharing out
# ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("processors, batch_size, wanted, size", [
    (2, 16, None, 2), (8, 16, None, 4), (3, 16, None, 2), (3, 15, None, 3), (2, 15, None, 1),
    (8, 9, None, 1), (8, 12, None, 3), (1, 16, None, 1), (8, 4, None, 1), (8, 1, None, 1),
    (1, 16, 2, 2), (8, 32, 8, 8), (8, 16, 1, 1), (2, 16, 3, 2)])
def test_a_crew_has_equal_parts_of_four_images_or_more(monkeypatch, processors, batch_size, wanted,
                                                       size):
    monkeypatch.setattr(crew, "processors", lambda: processors)
    assert crew.processes(batch_size, wanted) == size


def test_no_more_threads_are_used_than_the_user_allows(monkeypatch):
    for name in crew.THREAD_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    processors = len(os.sched_getaffinity(0))
    assert crew.threads() == processors
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
    assert crew.threads() == 1
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", str(processors + 5))
    assert crew.threads() == processors


def test_patches_of_parts_are_those_of_the_whole():
    blob = np.random.default_rng(1).standard_normal((8, 3, 7, 7)).astype(np.float32)
    geometry = Geometry((3, 3), (1, 1), (1, 1), (1, 1))
    whole = weights.sample_patches(blob, 40, np.random.default_rng(5), geometry)
    parts = [weights.sample_patches(blob[2 * rank:2 * rank + 2], 40, np.random.default_rng(5),
                                    geometry, Crew(rank, 4)) for rank in range(4)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def draw(own, count):
    weights.PART = 1000  # of this child's module
    drawn = np.full(count, np.nan, np.float32)
    weights.gaussian((count,), np.random.default_rng(3), 2.0, drawn, own)
    return own.gather(drawn)


@pytest.mark.parametrize("count", [700, 5300])
def test_many_numbers_are_drawn_by_parts_and_all_get_the_same_as_one_alone(count):
    found = run_together(3, draw, count)
    alone, = run_together(1, draw, count)
    assert np.isfinite(alone).all() and alone.std() == pytest.approx(2, rel=0.1)
    for drawn in found:
        np.testing.assert_array_equal(drawn, alone)


def make_filters(own, kind, count):
    rng = np.random.default_rng(2)
    patches = (rng.standard_normal((90, 6)) @ rng.standard_normal((6, 6)) + 3).astype(np.float32)
    return own.gather(weights.SCHEMES[kind](patches[own.own(90)], count, rng, own)), patches


@pytest.mark.parametrize("count", [4, 120])  # more filters than patches
@pytest.mark.parametrize("kind", sorted(weights.SCHEMES))
def test_all_get_the_filters_that_all_patches_give(kind, count):
    found, patches = run_together(3, make_filters, kind, count)
    for other in found[1:]:
        np.testing.assert_array_equal(other, found[0])
    assert len(np.unique(found[0], axis=0)) == count
    if kind in ("pca", "zca"):
        (alone,), _ = make_filters(crew.ALONE, kind, count)
        np.testing.assert_allclose(found[0], alone, rtol=2e-3, atol=2e-4)
    else:  # unit vectors of the space in which all patches together are white
        _, factor = weights.whitened(patches)
        np.testing.assert_allclose(np.linalg.norm(found[0] @ np.tril(factor), axis=1), 1, rtol=1e-4)


def test_moments_of_parts_with_equal_variation_are_those_of_the_whole():
    one = Moments(np.array([[1.0, 2.0], [3.0, 2.0]]), np.array([5.0, 8.0]))
    other = Moments(np.array([[2.0, 0.0], [4.0, 0.0]]), np.array([10.0, 0.0]))
    assert change_rates.joined_moments([one]) is one
    found = change_rates.joined_moments([one, other])
    np.testing.assert_array_equal(found.squares, [[1, 2], [3, 2], [2, 0], [4, 0]])
    # s_n s_m within parts: 3 and 8, 4 and 0; over all pairs: (100 - 30) / 12 and (16 - 8) / 12
    np.testing.assert_allclose(found.products, [15 / 11 * 70 / 12, 2 * 8 / 12])


@pytest.mark.parametrize("text, named", [
    (TOY, None), (INCEPTION, None), (RESIDUAL, None),
    (DATA + layer("s", "Slice", "data", "a b", "slice_param { axis: 0 }"), "s (Slice)"),
    (DATA + layer("s", "Slice", "data", "a b", "slice_param { slice_dim: 0 }"), "s (Slice)"),
    (DATA + layer("s", "Slice", "data", "a b"), None),
    (DATA + layer("c", "Concat", "data data", "", "concat_param { axis: -4 }"), "c (Concat)"),
    (DATA + layer("r", "Reshape", "data", "", "reshape_param { shape { dim: 10 dim: -1 } }"),
     "r (Reshape)"),
    (DATA + layer("r", "Reshape", "data", "", "reshape_param { shape { dim: 0 dim: -1 } }"), None),
    (DATA + layer("p", "Permute", "data", "", "permute_param { order: 1 order: 0 }"),
     "p (Permute)"),
    (DATA + layer("p", "Permute", "data", "", "permute_param { order: 0 order: 2 }"), None),
    (DATA + layer("b", "BatchNorm", "data", "",
                  "batch_norm_param { use_global_stats: false }"), "b (BatchNorm)"),
    (DATA + layer("f", "Filter", "data data"), "f (Filter)"),
    (DATA + layer("f", "Python", "data"), "f (Python)")])
def test_layers_in_which_images_may_meet_are_named(text, named, tmp_path):
    if "permute_param" in text and not hasattr(caffe_messages(), "PermuteParameter"):
        pytest.skip("this Caffe has no Permute")
    path = tmp_path / "net.prototxt"
    path.write_text(text)
    assert mixing_layer(read_definition(str(path))) == named


# ---------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A pattern for 32 images."""
    return write_images(str(tmp_path_factory.mktemp("images")), 32)


@pytest.fixture
def shared(capsys, tmp_path, images):
    """Run the command in so many processes on a definition in 3 batches of 8 images."""
    def run_shared(text, processes, *options):
        found = run(capsys, tmp_path, text, "-d", images, "-bs", "8", "-nit", "3",
                    "--processes", str(processes), *options, name="of%d" % processes)
        assert found.status == 0, found.err
        return found
    return run_shared


def close(one, other, part):
    """Assert that two caffemodels hold the same weights but for a part of each blob's largest."""
    expected = stored_weights(other.output)
    for name, blobs in stored_weights(one.output).items():
        for blob, wanted in zip(blobs, expected[name]):
            size = np.abs(wanted).max() + 1e-9
            np.testing.assert_allclose(blob / size, wanted / size, atol=part, err_msg=name)


@pytest.mark.parametrize("text", [TOY, RESIDUAL, INCEPTION, TWO_OUTPUTS],
                         ids=["chain", "residual", "LRN", "two outputs"])
def test_two_processes_write_what_one_writes(shared, text):
    one, two = (shared(text, number, "-cs", "-t", "gaussian") for number in (1, 2))
    assert [found.report["processes"] for found in (one, two)] == [1, 2]
    # gradients of Scale layers are sums over a process's images: two estimates of one mean
    part = 0.03 if text == RESIDUAL else 2e-4
    close(two, one, part)
    for name, row in two.layers.items():
        for key in ("mean", "std", "rate_before", "rate_after"):
            assert row[key] == pytest.approx(one.layers[name][key], rel=5 * part, abs=5 * part)


@pytest.mark.parametrize("text", [TOY, RESIDUAL], ids=["chain", "residual"])
def test_two_processes_rescale_as_one_does(shared, text, tmp_path):
    old = trained(tmp_path, text)
    one, two = (shared(text, number, "-cs", "-l", old) for number in (1, 2))
    close(two, one, 0.05 if text == RESIDUAL else 2e-4)
    assert two.report["output_difference"] < 1e-4
    changed = [[line.split(":")[0] for line in found.report["changes"]] for found in (one, two)]
    assert changed[0] == changed[1]


@pytest.mark.parametrize("kind", ["kmeans", "pca"])
def test_two_processes_give_every_channel_std_1_and_repeat(shared, tmp_path, images, kind):
    found = shared(TOY, 2, "-t", kind)
    first = stored_weights(found.output)
    outputs = plain_outputs(str(tmp_path / "net.prototxt"), found.output, pixels(images)[:24])
    again = stored_weights(shared(TOY, 2, "-t", kind).output)
    for name, blobs in first.items():
        assert all(np.array_equal(*pair) for pair in zip(blobs, again[name]))
        assert outputs[name].std() == pytest.approx(1, rel=0.15)  # on most of its 24 images


def test_a_net_in_which_images_meet_stays_in_one_process(shared):
    text = TOY + layer("pairs", "Slice", "fc4", "left right", "slice_param { axis: 0 }")
    found = shared(text, 2)
    assert found.report["processes"] == 1
    assert "images of a batch may meet in layer pairs (Slice)" in found.err
