"""Compute the average precision of PASCAL VOC for classification and detection (tables 1 to 3).

Both measures in use are given: the mean of the interpolated precision at the 11 recalls 0, 0.1,
..., 1, which VOC2007 defines (Everingham et al., IJCV 2010, sections 4.2.1 and 4.2.2), and the area
under the precision-recall curve. For classification the latter is scikit-learn's, as in the
author's released evaluation; for detection it is the interpolated one of VOC2010 and later.
"""
from typing import Any, Dict, NamedTuple, Sequence, Tuple

import numpy as np
from sklearn.metrics import average_precision_score

from voc.folders import Objects
from voc.overlap import overlaps

RECALLS = np.arange(11) / 10  # correctly rounded, so that a recall of 3/10 reaches 0.3
OVERLAP = 0.5  # a detection is correct above this intersection over union


class AveragePrecision(NamedTuple):
    """Average precision by class, float64 (classes,): with 11 points, and as an area.

    The value of a class without a positive that counts is NaN and left out of the means.
    """
    eleven_point: np.ndarray
    area: np.ndarray

    @property
    def mean_eleven_point(self) -> float:
        return _mean(self.eleven_point)

    @property
    def mean_area(self) -> float:
        return _mean(self.area)

    def described(self) -> str:
        """Return both means with their names, for people."""
        return "mAP %.4f (11 points), %.4f (area)" % (self.mean_eleven_point, self.mean_area)

    def report(self, classes: Sequence[str]) -> Dict[str, Any]:
        """Return both means, and both values of each class, by name."""
        return {"mAP_11_points": self.mean_eleven_point, "mAP_area": self.mean_area,
                "AP_11_points": dict(zip(classes, self.eleven_point.tolist())),
                "AP_area": dict(zip(classes, self.area.tolist()))}


class Detections(NamedTuple):
    """The detections in one image, in any order.

    boxes     (n, 4), x1, y1, x2, y2 as in `voc.folders.Objects`
    scores    (n,)
    classes   int (n,)
    """
    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray


def eleven_point(recall: np.ndarray, precision: np.ndarray) -> float:
    """Return 1/11 sum over r in {0, 0.1, ..., 1} of max precision where recall >= r.

    `recall` ascends; both are float64 (n,). A recall that is never reached contributes 0.
    """
    reached = np.searchsorted(np.asarray(recall, np.float64), RECALLS, side="left")
    return float(np.append(envelope(precision), 0.0)[reached].mean())


def area(recall: np.ndarray, precision: np.ndarray) -> float:
    """Return the area under a curve: the sum over k of (recall_k - recall_(k-1)) precision_k."""
    return float(np.sum(np.diff(recall, prepend=0.0) * np.asarray(precision)))


def envelope(precision: np.ndarray) -> np.ndarray:
    """Return the interpolated precision (n,): the highest one at this recall or above."""
    return np.maximum.accumulate(np.asarray(precision, np.float64)[::-1])[::-1]


def curve(right: np.ndarray, positives: int) -> Tuple[np.ndarray, np.ndarray]:
    """Return recall and precision (n,) after each of n answers, in falling order of their scores.

    `right` is bool (n,); `positives` > 0 is the number of correct answers that exist.
    """
    correct = np.cumsum(right)
    return correct / positives, correct / np.arange(1, len(correct) + 1)


def classification_ap(scores: np.ndarray, labels: np.ndarray) -> AveragePrecision:
    """Return the average precision of scores (images, classes) for labels -1, 0 and 1 (same shape).

    Images with label 0 (difficult) do not count. For the 11 points, negatives come first among
    equal scores, so that a constant score earns nothing. Raises ValueError where the shapes differ,
    a score is not finite or a label has another value.
    """
    scores, labels = np.asarray(scores), np.asarray(labels)
    if scores.ndim != 2 or scores.shape != labels.shape:
        raise ValueError("Scores of shape %s do not fit labels of shape %s; both have to be "
                         "(images, classes)." % (scores.shape, labels.shape))
    wrong = ~np.isfinite(scores).all(axis=1)
    if wrong.any():
        raise ValueError("The scores of %d images are not finite." % wrong.sum())
    if not np.isin(labels, (-1, 0, 1)).all():
        raise ValueError("Labels have to be -1, 0 or 1.")
    by_class = [_one_class(*column) for column in zip(scores.T, labels.T)]
    return _average_precision(by_class)


def _one_class(scores: np.ndarray, labels: np.ndarray) -> Tuple[float, float]:
    counts = labels != 0
    scores, present = scores[counts], labels[counts] > 0
    if not present.any():
        return np.nan, np.nan
    order = np.lexsort((present, -scores))
    recall, precision = curve(present[order], int(present.sum()))
    return eleven_point(recall, precision), float(average_precision_score(present, scores))


def detection_ap(detections: Sequence[Detections], truth: Sequence[Objects],
                 classes: int) -> AveragePrecision:
    """Return the average precision of detections in images with the objects `truth`, (images,).

    A detection belongs to the object of its class that it overlaps most. It is correct where that
    overlap exceeds 0.5 and no detection with a higher score has the same object. A detection of a
    difficult object does not count. Equal scores keep the order of the images. Raises ValueError
    where numbers of images or rows differ, or a value is not finite.
    """
    if len(detections) != len(truth):
        raise ValueError("There are detections in %d images, but objects in %d." % (
            len(detections), len(truth)))
    for image, detected in enumerate(detections):
        _check(detected, image)
    return _average_precision([_detected_class(detections, truth, index)
                               for index in range(classes)])


def _detected_class(detections: Sequence[Detections], truth: Sequence[Objects],
                    index: int) -> Tuple[float, float]:
    """Return both measures of class `index`; objects are numbered over all images, -1 is none."""
    scores, matches, difficult = [], [], []
    numbered = 0
    for detected, objects in zip(detections, truth):
        of_class = np.asarray(detected.classes) == index
        wanted = np.asarray(objects.classes) == index
        scores.append(np.asarray(detected.scores, np.float64)[of_class])
        match = _best_match(np.asarray(detected.boxes)[of_class], objects.boxes[wanted])
        matches.append(np.where(match >= 0, match + numbered, -1))
        difficult.append(objects.difficult[wanted])
        numbered += int(wanted.sum())
    skipped = np.concatenate(difficult) if difficult else np.zeros(0, bool)
    positives = int((~skipped).sum())
    if not positives:
        return np.nan, np.nan
    match = np.concatenate(matches)[np.argsort(-np.concatenate(scores), kind="stable")]
    match = match[(match < 0) | ~skipped[match]]
    right = np.zeros(len(match), bool)
    right[np.unique(match, return_index=True)[1]] = True  # the highest score of each object
    recall, precision = curve(right & (match >= 0), positives)
    return eleven_point(recall, precision), area(recall, envelope(precision))


def _best_match(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the index of the other box that each box (n, 4) overlaps most and above 0.5, or -1."""
    if not len(boxes) or not len(others):
        return np.full(len(boxes), -1)
    shared = overlaps(boxes, others)
    return np.where(shared.max(axis=1) > OVERLAP, shared.argmax(axis=1), -1)


def _check(detected: Detections, image: int) -> None:
    count = len(detected.scores)
    if np.shape(detected.boxes) != (count, 4) or np.shape(detected.classes) != (count,):
        raise ValueError("Detections in image %d have %d scores, but boxes of shape %s and classes "
                         "of shape %s." % (image, count, np.shape(detected.boxes),
                                           np.shape(detected.classes)))
    if not (np.isfinite(detected.scores).all() and np.isfinite(detected.boxes).all()):
        raise ValueError("A detection in image %d is not finite." % image)


def _average_precision(by_class: Sequence[Tuple[float, float]]) -> AveragePrecision:
    columns = np.array(by_class, np.float64).reshape(-1, 2).T
    return AveragePrecision(columns[0], columns[1])


def _mean(values: np.ndarray) -> float:
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if len(defined) else float("nan")
