"""detection/boxes.py: boxes computed by hand, inverses, a slow reference."""
import math

import numpy as np
import pytest

from detection import boxes
from voc.overlap import overlaps


def random_boxes(rng, count, side=200):
    corners = np.sort(rng.randint(0, side, (count, 2, 2)), axis=1)
    return corners.reshape(count, 4).astype(np.float64)


def test_targets_of_a_box_moved_and_doubled_are_those_of_the_formula():
    # A ROI of 10 x 20 pixels with its centre at (5, 10), a truth of 20 x 20 with it at (12, 10).
    found = boxes.targets([[0, 0, 9, 19]], [[2, 0, 21, 19]])
    np.testing.assert_allclose(found, [[7 / 10, 0, math.log(2), 0]])


def test_moving_by_the_targets_gives_the_truth_for_every_class_at_once():
    rng = np.random.RandomState(0)
    rois, truths = random_boxes(rng, 50), random_boxes(rng, 50)
    others = random_boxes(rng, 50)
    deltas = np.hstack([boxes.targets(rois, truths), boxes.targets(rois, others)])
    deltas[:, 2::4] = np.minimum(deltas[:, 2::4], math.log(boxes.LARGEST_GROWTH))
    keeps = (deltas[:, [2, 3, 6, 7]] <= math.log(boxes.LARGEST_GROWTH)).all(axis=1)
    moved = boxes.moved(rois, deltas)
    np.testing.assert_allclose(moved[keeps], np.hstack([truths, others])[keeps], atol=1e-9)


def test_a_delta_beyond_all_measure_gives_a_finite_box():
    moved = boxes.moved([[0, 0, 9, 9]], [[0, 0, 1e4, 1e4]])
    np.testing.assert_allclose(moved[0, 2] - moved[0, 0] + 1, 10 * boxes.LARGEST_GROWTH)


def test_clipping_moves_every_corner_into_the_image():
    found = boxes.clipped(np.array([[-5.0, 3, 120, 60, 10, 20, 30, 40]]), width=100, height=50)
    np.testing.assert_array_equal(found, [[0, 3, 99, 49, 10, 20, 30, 40]])


def test_mirroring_swaps_left_and_right_and_undoes_itself():
    box = np.array([[0.0, 5, 9, 7]])
    np.testing.assert_array_equal(boxes.mirrored(box, 100), [[90, 5, 99, 7]])
    np.testing.assert_array_equal(boxes.mirrored(boxes.mirrored(box, 100), 100), box)


def test_boxes_stored_unsigned_do_not_wrap():
    # Column 0 is left of column 5: in uint16 their difference would be 65531.
    rois = np.array([[5, 5, 14, 14]], np.uint16)
    truths = np.array([[0, 5, 9, 14]], np.uint16)
    np.testing.assert_allclose(boxes.targets(rois, truths), [[-0.5, 0, 0, 0]])


@pytest.mark.parametrize("rows", [[1.0, 2, 3, 4], np.zeros((3, 5))])
def test_what_is_no_list_of_boxes_is_refused(rows):
    with pytest.raises(ValueError, match="have to be "):
        boxes.suppressed(rows, [1.0], 0.3)


def slow_suppression(rows, scores, threshold):
    left = sorted(range(len(rows)), key=lambda i: (-scores[i], i))
    kept = []
    while left:
        best = left.pop(0)
        kept.append(best)
        left = [i for i in left if overlaps(rows[[best]], rows[[i]])[0, 0] < threshold]
    return kept


@pytest.mark.parametrize("threshold", [0.1, 0.3, 0.7])
def test_suppression_keeps_what_the_slow_reference_keeps(threshold):
    rng = np.random.RandomState(1)
    rows = random_boxes(rng, 150)
    scores = rng.randint(0, 20, 150) / 20  # many equal scores
    found = boxes.suppressed(rows, scores, threshold)
    assert found.tolist() == slow_suppression(rows, scores, threshold)


def test_suppression_drops_a_box_at_the_threshold_and_keeps_one_below():
    # 10 x 10 pixels against 3 of its columns: an overlap of exactly 3/10, then of 29/100.
    rows = [[0, 0, 9, 9], [0, 0, 2, 9], [0, 0, 28, 0]]
    assert boxes.suppressed(rows[:2], [2, 1], 0.3).tolist() == [0]
    assert boxes.suppressed(rows[:2], [2, 1], 0.301).tolist() == [0, 1]


def test_suppression_of_no_boxes_keeps_none():
    assert boxes.suppressed(np.zeros((0, 4)), [], 0.3).tolist() == []


def test_rounding_moves_halves_away_from_zero():
    values = np.array([0.5, 1.5, 2.5, -0.5, -1.5, 0.49, -0.49, 2.0])
    assert boxes.rounded(values).tolist() == [1, 2, 3, -1, -2, 0, 0, 2]


def test_rois_that_fall_on_the_same_cells_are_one():
    rois = np.array([[0, 0, 0, 160, 160], [0, 7, 7, 167, 167], [0, 8, 0, 160, 160],
                     [1, 0, 0, 160, 160], [0, -8, 0, 160, 160]], np.float32)
    index, inverse = boxes.distinct(rois, 1 / 16)
    assert sorted(index.tolist()) == [0, 2, 3, 4]
    assert index[inverse].tolist() == [0, 0, 2, 3, 4]


def test_no_rois_have_no_distinct_ones():
    index, inverse = boxes.distinct(np.zeros((0, 5), np.float32), 1 / 16)
    assert len(index) == len(inverse) == 0
