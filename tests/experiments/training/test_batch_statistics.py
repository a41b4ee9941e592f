"""The stand-in for BatchNorm: closed forms, finite differences, and BatchNorm itself in tests."""
import numpy as np
import pytest
from google.protobuf import text_format

from ddinit.prototxt import build_net, caffe_messages, import_caffe
from training import nets

NET = """
force_backward: true
layer { name: "x" type: "Input" top: "x" input_param { shape { dim: 4 dim: 3 dim: 2 dim: 5 } } }
layer { name: "copy" type: "Power" bottom: "x" top: "z" }
layer { name: "bn" type: "BatchNorm" bottom: "z" top: "%s"
  batch_norm_param { eps: 0.01 moving_average_fraction: 0.5 %s } }
"""


def parsed(top="y", options=""):
    return text_format.Parse(NET % (top, options), caffe_messages().NetParameter())


@pytest.fixture
def blind(monkeypatch):
    """A Caffe whose BatchNorm does not see its batch."""
    monkeypatch.setattr(nets, "normalizes_by_batch", lambda: False)


def stand_in(top="y"):
    net = build_net(nets.repaired(parsed(top)))
    net.blobs["x"].data[...] = np.random.default_rng(0).normal(5, 3, (4, 3, 2, 5))
    return net


def normalized(x):
    mean, variance = (f((0, 2, 3), keepdims=True) for f in (x.mean, x.var))
    return (x - mean) / np.sqrt(variance + 0.01)


@pytest.mark.parametrize("top", ["y", "z"])
def test_each_channel_is_normalized_over_batch_and_positions_also_in_place(blind, top):
    net = stand_in(top)
    net.forward()
    expected = normalized(net.blobs["x"].data.astype(np.float64))
    assert net.blobs[top].data == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("top", ["y", "z"])
def test_gradients_are_those_of_finite_differences(blind, top):
    net = stand_in(top)
    rng = np.random.default_rng(1)
    x, dy = net.blobs["x"].data.astype(np.float64), rng.normal(0, 1, (4, 3, 2, 5))
    net.forward()
    net.blobs[top].diff[...] = dy
    net.backward()
    for place in [(0, 0, 0, 0), (3, 2, 1, 4), (1, 1, 0, 2)]:
        moved = []
        for step in (1e-4, -1e-4):
            shifted = x.copy()
            shifted[place] += step
            moved.append((normalized(shifted) * dy).sum())
        assert net.blobs["x"].diff[place] == pytest.approx((moved[0] - moved[1]) / 2e-4, abs=1e-4)


def test_averages_kept_are_what_batchnorm_uses_in_tests(blind, tmp_path):
    net = stand_in()
    x = []
    for shift in (0, 1):
        net.blobs["x"].data[...] += shift
        x.append(net.blobs["x"].data.astype(np.float64))
        net.forward()
    net.save(str(tmp_path / "bn.caffemodel"))
    mean, variance = (sum(weight * f(batch, (0, 2, 3)) for weight, batch in zip((0.5, 1), x)) / 1.5
                      for f in (np.mean, lambda *a: np.var(*a, ddof=1)))
    tested = build_net(parsed())
    tested.copy_from(str(tmp_path / "bn.caffemodel"))
    tested.blobs["x"].data[...] = x[0]
    tested.forward()
    expected = (x[0] - mean.reshape(1, 3, 1, 1)) / np.sqrt(variance + 0.01).reshape(1, 3, 1, 1)
    assert tested.blobs["y"].data == pytest.approx(expected, abs=1e-5)


def test_its_sums_are_not_learnt(blind):
    (layer,) = [layer for layer in nets.repaired(parsed()).layer if layer.name == "bn"]
    assert layer.type == "Python"
    assert [(parameter.lr_mult, parameter.decay_mult) for parameter in layer.param] == [(0, 0)] * 3


def test_frozen_statistics_stay_batchnorms(blind):
    frozen = parsed(options="use_global_stats: true")
    assert nets.repaired(frozen) == frozen


def test_nothing_is_replaced_where_batchnorm_works(monkeypatch):
    monkeypatch.setattr(nets, "normalizes_by_batch", lambda: True)
    assert nets.repaired(parsed()) == parsed()


def test_in_training_a_net_normalizes_by_its_batch_with_whatever_caffe_there_is(tmp_path):
    with open(str(tmp_path / "net.prototxt"), "w") as file:
        file.write(text_format.MessageToString(nets.repaired(parsed())))
    caffe = import_caffe()
    net = caffe.Net(str(tmp_path / "net.prototxt"), caffe.TRAIN)
    net.blobs["x"].data[...] = np.random.default_rng(2).normal(-3, 7, (4, 3, 2, 5))
    net.forward()
    assert net.blobs["y"].data == pytest.approx(
        normalized(net.blobs["x"].data.astype(np.float64)), abs=1e-4)
