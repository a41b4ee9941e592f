"""detection/roi_layers.py: a slow reference, finite differences, nets of Caffe."""
import math

import numpy as np
import pytest

from ddinit import processes
from ddinit.prototxt import build_net, caffe_messages
from detection import nets, roi_layers


def slow_pool(maps, rois, side, scale):
    """ROI pooling as written down: Python loops and exact fractions; also the maxima's places."""
    top = np.zeros((len(rois), maps.shape[1], side, side))
    where = np.full(top.shape, -1)
    height, width = maps.shape[2:]
    for r, roi in enumerate(rois):
        x1, y1, x2, y2 = [int(math.copysign(math.floor(abs(corner * scale) + 0.5), corner))
                          for corner in roi[1:]]
        rows, columns = max(y2 - y1 + 1, 1), max(x2 - x1 + 1, 1)
        for c in range(maps.shape[1]):
            for i in range(side):
                for j in range(side):
                    cells = [(y, x)
                             for y in range(y1 + i * rows // side,
                                            y1 + -(-(i + 1) * rows // side))
                             for x in range(x1 + j * columns // side,
                                            x1 + -(-(j + 1) * columns // side))
                             if 0 <= y < height and 0 <= x < width]
                    if cells:
                        best = max(cells, key=lambda cell: (maps[int(roi[0]), c][cell],
                                                            -cell[0], -cell[1]))
                        top[r, c, i, j] = maps[int(roi[0]), c][best]
                        where[r, c, i, j] = best[0] * width + best[1]
    return top, where


def some_rois(rng, count, images=2, side=200):
    """ROIs inside, across and wholly outside an image of 176 x 128 pixels, some inside out."""
    rois = np.empty((count, 5), np.float32)
    rois[:, 0] = rng.randint(0, images, count)
    rois[:, 1:] = rng.randint(-40, side, (count, 4))
    rois[1::2, 1:] = np.sort(rois[1::2, 1:].reshape(-1, 2, 2), axis=1).reshape(-1, 4)
    return rois


def pooled(maps, rois, side, scale):
    cells = roi_layers.cells_of(rois, scale, len(maps))
    top = np.empty((len(rois), maps.shape[1], side, side), np.float32)
    where = np.empty(top.shape, np.int32)
    roi_layers.pool(maps, cells, top, where)
    return top, where, cells


@pytest.mark.parametrize("side", [1, 6, 7])
def test_pooling_agrees_with_the_slow_reference(side):
    rng = np.random.RandomState(side)
    maps = rng.randint(-3, 4, (2, 5, 8, 11)).astype(np.float32)  # many equal maxima
    rois = some_rois(rng, 60)
    top, where, _ = pooled(maps, rois, side, 1 / 16)
    expected, places = slow_pool(maps, rois, side, 1 / 16)
    np.testing.assert_array_equal(top, expected)
    np.testing.assert_array_equal(where, places)


def test_corners_round_half_away_from_zero():
    # 8 / 16 = 0.5 is column 1 (numpy's round would say 0), 24 / 16 = 1.5 is 2, 40 / 16 = 2.5 is 3.
    cells = roi_layers.cells_of(np.array([[0, 8, 24, 40, -8]], np.float32), 1 / 16, 1)
    assert cells.tolist() == [[0, 1, 2, 3, -1]]


def test_a_bin_outside_the_map_gives_0_and_no_gradient():
    maps = -np.ones((1, 1, 4, 4), np.float32)
    rois = np.array([[0, 0, 0, 127, 15]], np.float32)  # columns 0 to 8 of a map of 4
    top, where, cells = pooled(maps, rois, 2, 1 / 16)
    assert top[0, 0, 0].tolist() == [-1, 0]
    assert where[0, 0, 0].tolist() == [0, -1]
    gradient = np.full_like(maps, np.nan)
    roi_layers.unpool(np.ones_like(top), cells[:, 0], where, gradient)
    assert gradient.sum() == 2


def test_gradients_of_rois_at_one_place_add_up():
    maps = np.zeros((2, 3, 4, 4), np.float32)
    maps[1, :, 2, 1] = 1
    rois = np.array([[1, 0, 0, 63, 63]] * 5, np.float32)
    top, where, cells = pooled(maps, rois, 1, 1 / 16)
    gradient = np.empty_like(maps)
    roi_layers.unpool(np.full_like(top, 2), cells[:, 0], where, gradient)
    expected = np.zeros_like(maps)
    expected[1, :, 2, 1] = 10
    np.testing.assert_array_equal(gradient, expected)


@pytest.mark.parametrize("row", [[2, 0, 0, 9, 9], [-1, 0, 0, 9, 9], [0, np.nan, 0, 9, 9]])
def test_a_roi_of_no_image_is_refused(row):
    with pytest.raises(ValueError, match="not finite, or not in one of the 2 images"):
        roi_layers.cells_of(np.array([row], np.float32), 1 / 16, 2)


def test_smooth_l1_is_quadratic_within_the_knee_and_linear_beyond():
    value, slope = roi_layers.smooth_l1(np.array([0.1, -0.25, 0.5, -2.0]), knee=0.25)
    np.testing.assert_allclose(value, [0.02, 0.125, 0.375, 1.875])
    np.testing.assert_allclose(slope, [0.4, -1, 1, -1])


# ---------------------------------------------------------------------------------------------
# As layers of a net
# ---------------------------------------------------------------------------------------------

def net_of(inputs, add, *arguments):
    """A net of inputs (name, shape) and the layer that add(net, ...) adds, with gradients."""
    definition = caffe_messages().NetParameter(force_backward=True)
    for name, shape in inputs:
        added = definition.layer.add(name=name, type="Input", top=[name])
        added.input_param.shape.add(dim=shape)
    add(definition, *arguments)
    return build_net(definition)


def differences(net, blob, value, step):
    """Central differences of `value()` by every number in a blob."""
    data = net.blobs[blob].data
    gradient = np.empty(data.size)
    for i in range(data.size):
        kept = data.flat[i]
        data.flat[i] = kept + step
        above = value()
        data.flat[i] = kept - step
        below = value()
        data.flat[i] = kept
        gradient[i] = (above - below) / (2 * step)
    return gradient.reshape(data.shape)


def run_pooling_net():
    """Gradient of a random linear loss on pooled maps: Caffe's, and by central differences."""
    rng = np.random.RandomState(0)
    net = net_of([("maps", (2, 2, 5, 6)), ("rois", (4, 5))],
                 nets.add_roi_pooling, "pool", "maps", "pooled", 2, 0.25)
    data = net.blobs["maps"].data
    data[...] = rng.permutation(data.size).reshape(data.shape)  # no two maxima within a step
    net.blobs["rois"].data[...] = [[0, 0, 0, 12, 12], [1, 4, 4, 23, 19], [1, 9, 2, 30, 30],
                                   [0, 8, 8, 8, 8]]
    loss = rng.randn(4, 2, 2, 2)
    numeric = differences(net, "maps", lambda: (net.forward()["pooled"] * loss).sum(), 0.25)
    net.forward()
    net.blobs["pooled"].diff[...] = loss
    net.backward()
    top, _ = slow_pool(data, net.blobs["rois"].data, 2, 0.25)
    return net.blobs["maps"].diff.copy(), numeric, net.blobs["pooled"].data.copy(), top


def test_the_pooling_layer_in_a_net_is_the_reference_and_its_gradient_that_of_differences():
    gradient, numeric, found, expected = processes.in_child(run_pooling_net)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(gradient, numeric, atol=1e-4)
    assert np.abs(gradient).max() > 0.5


def run_loss_net():
    """Loss and gradients of a smooth L1 layer of weight 1 on 3 ROIs: Caffe's and differences."""
    rng = np.random.RandomState(0)
    names = ["prediction", "target", "inside", "outside"]
    net = net_of([(name, (3, 4)) for name in names], nets.add_smooth_l1_loss, "loss",
                 names)
    for name in names:
        net.blobs[name].data[...] = rng.uniform(0.5, 3, (3, 4))
    net.blobs["target"].data[0] = net.blobs["prediction"].data[0] - 0.3  # the quadratic part
    net.blobs["inside"].data[0] = 1
    net.blobs["inside"].data[2, 1] = 0
    values = [net.blobs[name].data.astype(np.float64) for name in names]
    loss = float(net.forward()["loss"])
    net.backward()
    gradients = [net.blobs[name].diff.copy() for name in names[:2]]
    numeric = [differences(net, name, lambda: float(net.forward()["loss"]), 1e-2)
               for name in names[:2]]
    return values, loss, gradients, numeric


def test_the_loss_layer_is_the_formula_and_its_gradients_those_of_differences():
    (prediction, target, inside, outside), loss, gradients, numeric = processes.in_child(
        run_loss_net)
    difference = inside * (prediction - target)
    values = [outside.flat[i] * (d * d / 2 if abs(d) < 1 else abs(d) - 0.5)
              for i, d in enumerate(difference.flat)]
    assert loss == pytest.approx(sum(values) / 3, rel=1e-6)
    for gradient, expected in zip(gradients, numeric):
        np.testing.assert_allclose(gradient, expected, atol=2e-3)
        assert np.abs(gradient).max() > 0.1


def run_unequal_loss_net():
    names = ["prediction", "target", "inside", "outside"]
    net_of([(name, (3, 4 + (name == "target"))) for name in names],
           nets.add_smooth_l1_loss, "loss", names)


def test_a_loss_of_unequal_shapes_is_refused():
    with pytest.raises(ValueError, match="needs bottoms of one shape"):
        processes.in_child(run_unequal_loss_net)
