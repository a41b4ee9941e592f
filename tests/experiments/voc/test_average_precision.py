"""Average precision: hand-computed curves, scikit-learn, pycocotools and a slow obvious version."""
import contextlib
import io

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from sklearn.metrics import average_precision_score

from voc.average_precision import (
    Detections,
    area,
    classification_ap,
    curve,
    detection_ap,
    eleven_point,
)
from voc.folders import Objects
from voc.overlap import overlaps

# ---------------------------------------------------------------------------------------------
# Curves
# ---------------------------------------------------------------------------------------------

def test_eleven_point_of_a_hand_computed_curve():
    # Answers right, wrong, right, wrong, wrong of two positives: recall 1/2, 1/2, 1, 1, 1 with
    # precision 1, 1/2, 2/3, 1/2, 2/5.  Recalls 0 to 0.5 see 1, recalls 0.6 to 1 see 2/3.
    recall, precision = curve(np.array([True, False, True, False, False]), 2)
    np.testing.assert_allclose(recall, [0.5, 0.5, 1, 1, 1])
    np.testing.assert_allclose(precision, [1, 1 / 2, 2 / 3, 1 / 2, 2 / 5])
    assert eleven_point(recall, precision) == pytest.approx((6 * 1 + 5 * 2 / 3) / 11)
    assert area(recall, precision) == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)


@pytest.mark.parametrize("found", range(11))
@pytest.mark.parametrize("positives", [10, 20, 70, 130, 4110])
def test_a_recall_exactly_on_a_bin_reaches_it(found, positives):
    right = np.ones(found * positives // 10, bool)  # found/10 of the positives, then no more
    recall, precision = curve(right, positives)
    assert eleven_point(recall, precision) == pytest.approx((found + 1 if found else 0) / 11)


def test_a_recall_just_below_a_bin_does_not_reach_it():
    recall, precision = curve(np.ones(299, bool), 1000)
    assert eleven_point(recall, precision) == pytest.approx(3 / 11)


def test_interpolated_precision_is_the_best_at_a_greater_recall():
    # Wrong first, then all four positives: precision climbs to 4/5, which every recall sees.
    recall, precision = curve(np.array([False, True, True, True, True]), 4)
    assert eleven_point(recall, precision) == pytest.approx(4 / 5)


# ---------------------------------------------------------------------------------------------
# Classification
# ---------------------------------------------------------------------------------------------

def test_area_is_that_of_scikit_learn_without_ties():
    rng = np.random.default_rng(0)
    labels = rng.choice([-1, 0, 1], size=(300, 6), p=[0.7, 0.1, 0.2])
    scores = rng.normal(size=labels.shape) + 0.7 * labels
    found = classification_ap(scores, labels)
    for column in range(6):
        counts = labels[:, column] != 0
        wanted = average_precision_score(labels[counts, column] > 0, scores[counts, column])
        assert found.area[column] == pytest.approx(wanted, abs=1e-12)
    assert found.mean_area == pytest.approx(found.area.mean())
    assert found.mean_eleven_point == pytest.approx(found.eleven_point.mean())


def test_equal_scores_are_one_answer_for_the_area_and_negatives_first_for_11_points():
    # Two negatives and a positive of score 1, then a positive of score 0.  Area: precision 1/3 at
    # recall 1/2 and 2/4 at 1.  11 points: precision 1/3 at recall 1/2 and 1/2 at recall 1.
    labels = np.array([[1], [-1], [-1], [1]])
    found = classification_ap(np.array([[1.0], [1], [1], [0]]), labels)
    assert found.area[0] == pytest.approx(0.5 * 1 / 3 + 0.5 * 2 / 4)
    assert found.eleven_point[0] == pytest.approx(1 / 2)


def test_a_constant_score_earns_the_part_of_positives():
    labels = np.array([[1], [-1], [-1], [1], [-1]])
    found = classification_ap(np.zeros((5, 1)), labels)
    assert found.area[0] == found.eleven_point[0] == pytest.approx(2 / 5)


def test_difficult_images_count_neither_way():
    labels = np.array([[1], [0], [-1], [1]])
    scores = np.array([[0.9], [0.8], [0.7], [0.6]])
    found = classification_ap(scores, labels)
    without = classification_ap(scores[[0, 2, 3]], labels[[0, 2, 3]])
    assert found == without
    assert found.area[0] == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)


def test_a_class_without_positives_is_nan_and_left_out_of_the_mean():
    labels = np.array([[0, 1, -1], [0, -1, -1]])
    found = classification_ap(np.array([[1.0, 2.0, 3.0], [2.0, 1.0, 0.0]]), labels)
    assert np.isnan(found.area).tolist() == [True, False, True]
    assert found.mean_area == 1 and found.mean_eleven_point == 1
    assert np.isnan(classification_ap(np.zeros((2, 1)), labels[:, :1]).mean_area)


def test_scores_may_be_float32():
    labels = np.array([[1], [-1], [1]])
    scores = np.array([[3], [0], [-3]], np.float32)
    assert classification_ap(scores, labels).area[0] == pytest.approx(0.5 + 0.5 * 2 / 3)


@pytest.mark.parametrize("scores, labels, message", [
    (np.zeros((3, 2)), np.ones((2, 3)), "do not fit labels"),
    (np.zeros(3), np.ones(3), "do not fit labels"),
    (np.array([[np.nan], [1.0]]), np.ones((2, 1)), "scores of 1 images are not finite"),
    (np.zeros((2, 1)), np.full((2, 1), 2), "Labels have to be -1, 0 or 1"),
])
def test_wrong_scores_and_labels_are_errors(scores, labels, message):
    with pytest.raises(ValueError, match=message):
        classification_ap(scores, labels)


# ---------------------------------------------------------------------------------------------
# Detection
# ---------------------------------------------------------------------------------------------

def _objects(boxes, classes=None, difficult=None):
    count = len(boxes)
    return Objects(np.reshape(boxes, (count, 4)).astype(float),
                   np.zeros(count, int) if classes is None else np.array(classes),
                   np.zeros(count, bool) if difficult is None else np.array(difficult), 500, 400)


def _detections(boxes, scores, classes=None):
    return Detections(np.reshape(boxes, (len(scores), 4)).astype(float), np.array(scores, float),
                      np.zeros(len(scores), int) if classes is None else np.array(classes))


def test_overlap_counts_both_ends_as_inside():
    # 10 x 10 and 10 x 10 pixels that share 5 x 10: 50 / 150.
    found = overlaps([[0, 0, 9, 9]], [[5, 0, 14, 9], [0, 0, 9, 9], [10, 0, 19, 9]])
    np.testing.assert_allclose(found, [[1 / 3, 1, 0]])


def test_overlap_of_one_half_is_not_enough():
    truth = [_objects([[0, 0, 9, 9]])]
    assert detection_ap([_detections([[0, 0, 9, 4]], [1])], truth, 1).area[0] == 0
    assert detection_ap([_detections([[0, 0, 9, 5]], [1])], truth, 1).area[0] == 1


def test_a_second_detection_of_an_object_is_wrong():
    truth = [_objects([[0, 0, 9, 9], [50, 50, 59, 59]])]
    found = detection_ap([_detections(
        [[0, 0, 9, 8], [0, 0, 9, 9], [50, 50, 59, 59]], [0.9, 0.8, 0.7])], truth, 1)
    # right, wrong, right of two: the envelope is 1 up to recall 1/2 and 2/3 after it.
    assert found.area[0] == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    assert found.eleven_point[0] == pytest.approx((6 * 1 + 5 * 2 / 3) / 11)


def test_a_detection_belongs_to_the_object_it_overlaps_most_even_if_that_is_taken():
    truth = [_objects([[0, 0, 9, 9], [0, 0, 9, 7]])]
    found = detection_ap([_detections([[0, 0, 9, 9], [0, 0, 9, 9]], [0.9, 0.8])], truth, 1)
    assert found.area[0] == pytest.approx(0.5)


def test_difficult_objects_are_neither_right_nor_wrong():
    truth = [_objects([[0, 0, 9, 9], [50, 50, 59, 59]], difficult=[True, False])]
    boxes = [[0, 0, 9, 9], [0, 0, 9, 8], [50, 50, 59, 59]]
    assert detection_ap([_detections(boxes, [0.9, 0.8, 0.7])], truth, 1).area[0] == 1
    only_difficult = [_objects([[0, 0, 9, 9]], difficult=[True])]
    assert np.isnan(detection_ap([_detections(boxes, [3, 2, 1])], only_difficult, 1).area[0])


def test_equal_scores_keep_their_order():
    truth = [_objects([[0, 0, 9, 9]])]
    boxes = [[50, 50, 59, 59], [0, 0, 9, 9]]
    assert detection_ap([_detections(boxes, [0.5, 0.5])], truth, 1).area[0] == pytest.approx(0.5)
    assert detection_ap([_detections(boxes[::-1], [0.5, 0.5])], truth, 1).area[0] == 1


def test_no_detection_is_zero_and_no_image_is_nan():
    truth = [_objects([[0, 0, 9, 9]])]
    assert detection_ap([_detections(np.zeros((0, 4)), [])], truth, 1).eleven_point[0] == 0
    assert np.isnan(detection_ap([], [], 2).mean_area)


@pytest.mark.parametrize("found, message", [
    ([], "detections in 0 images, but objects in 1"),
    ([Detections(np.zeros((2, 4)), np.zeros(1), np.zeros(1))], "image 0 have 1 scores, but boxes"),
    ([Detections(np.zeros((1, 4)), np.array([np.nan]), np.zeros(1))], "image 0 is not finite"),
])
def test_wrong_detections_are_errors(found, message):
    with pytest.raises(ValueError, match=message):
        detection_ap(found, [_objects([[0, 0, 9, 9]])], 1)


def _random_images(seed, apart):
    """Objects of 3 classes in 40 images, and detections near them and elsewhere.

    With `apart`, objects of a class lie too far from each other for a detection to overlap two by
    a half, and no object is found twice where it is difficult.
    """
    rng = np.random.default_rng(seed)
    found, truth = [], []
    for _ in range(40):
        count = int(rng.integers(0, 7))
        corners = rng.uniform(0, 200, (count, 2))
        if apart:
            corners = np.stack([np.arange(count) * 120.0, corners[:, 1]], axis=1)
        boxes = np.hstack([corners, corners + rng.uniform(40, 100, (count, 2))])
        classes, difficult = rng.integers(0, 3, count), rng.random(count) < 0.2
        near = np.repeat(np.arange(count), rng.integers(0, 3, count))
        if apart:
            near = np.array([place for at, place in enumerate(near)
                             if not (difficult[place] and at and near[at - 1] == place)], int)
        moved = boxes[near] + rng.normal(0, 9, (len(near), 4))
        away = rng.uniform(0, 200, (5, 2))
        away = np.hstack([away, away + rng.uniform(10, 100, (5, 2))]) + (1000 if apart else 0)
        truth.append(_objects(boxes, classes, difficult))
        found.append(_detections(np.vstack([moved, away]), rng.normal(size=len(moved) + 5),
                                 np.concatenate([classes[near], rng.integers(0, 3, 5)])))
    return found, truth


def _slow(found, truth, index):
    """The devkit's rules one detection after another, in plain Python."""
    answers = []
    for image, one in enumerate(found):
        for box, score, kind in zip(one.boxes, one.scores, one.classes):
            if kind == index:
                answers.append((-score, image, box))
    taken, right, wrong = set(), 0, 0
    points = []
    positives = sum(int(kind == index and not hard) for one in truth
                    for kind, hard in zip(one.classes, one.difficult))
    for _, image, box in sorted(answers, key=lambda answer: answer[0]):
        best, owner = 0.5, None
        for place, other in enumerate(truth[image].boxes):
            if truth[image].classes[place] != index:
                continue
            wide = min(box[2], other[2]) - max(box[0], other[0]) + 1
            high = min(box[3], other[3]) - max(box[1], other[1]) + 1
            if wide <= 0 or high <= 0:
                continue
            union = ((box[2] - box[0] + 1) * (box[3] - box[1] + 1)
                     + (other[2] - other[0] + 1) * (other[3] - other[1] + 1) - wide * high)
            if wide * high / union > best:
                best, owner = wide * high / union, place
        if owner is not None and truth[image].difficult[owner]:
            continue
        if owner is None or (image, owner) in taken:
            wrong += 1
        else:
            taken.add((image, owner))
            right += 1
        points.append((right, right / (right + wrong)))
    bins = [max([precision for got, precision in points if got * 10 >= step * positives],
                default=0) for step in range(11)]
    steps = [max([precision for got, precision in points if got >= step], default=0)
             for step in range(1, positives + 1)]
    return sum(bins) / 11, sum(steps) / positives


@pytest.mark.parametrize("seed", range(3))
def test_detection_agrees_with_a_slow_version(seed):
    found, truth = _random_images(seed, apart=False)
    result = detection_ap(found, truth, 3)
    for index in range(3):
        eleven, whole = _slow(found, truth, index)
        assert 0.1 < whole < 0.95
        assert result.eleven_point[index] == pytest.approx(eleven, abs=1e-12)
        assert result.area[index] == pytest.approx(whole, abs=1e-12)


def _coco_ap(found, truth, recalls):
    """The AP of each class by pycocotools at IoU 0.5, interpolated at `recalls`.

    COCO's conventions differ from VOC's in three ways.  Widths are x2 - x1: it gets widths + 1.
    A detection whose best object is taken goes to the next best, and a second detection of a
    difficult object is wrong: `_random_images(apart=True)` has neither.  Difficult objects are
    those whose `area` is out of the evaluated range.
    """
    def rectangle(box):
        return [box[0], box[1], box[2] - box[0] + 1, box[3] - box[1] + 1]

    annotations = [{"id": 0, "image_id": image, "category_id": int(kind), "iscrowd": 0,
                    "bbox": rectangle(box), "area": 1e12 if hard else 1.0}
                   for image, one in enumerate(truth)
                   for box, kind, hard in zip(one.boxes, one.classes, one.difficult)]
    for number, annotation in enumerate(annotations, 1):
        annotation["id"] = number
    answers = [{"image_id": image, "category_id": int(kind), "bbox": rectangle(box),
                "score": float(score)} for image, one in enumerate(found)
               for box, score, kind in zip(one.boxes, one.scores, one.classes)]
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {"images": [{"id": image} for image in range(len(truth))],
                        "annotations": annotations, "categories": [{"id": k} for k in range(3)]}
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(answers), "bbox")
        evaluation.params.iouThrs = np.array([0.5])
        evaluation.params.recThrs = np.asarray(recalls)
        evaluation.params.maxDets = [10000]
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation.eval["precision"][0, :, :, 0, 0].mean(axis=0)


@pytest.mark.parametrize("seed", range(3))
def test_eleven_point_of_detections_agrees_with_pycocotools(seed):
    found, truth = _random_images(seed, apart=True)
    result = detection_ap(found, truth, 3)
    assert (result.eleven_point < 0.95).all()
    np.testing.assert_allclose(result.eleven_point, _coco_ap(found, truth, np.arange(11) / 10),
                               atol=1e-12)
    # At recalls this dense, COCO's mean is the area.
    np.testing.assert_allclose(result.area, _coco_ap(found, truth, np.linspace(1e-6, 1, 20001)),
                               atol=1e-3)
