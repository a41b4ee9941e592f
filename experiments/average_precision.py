"""Average precision of PASCAL VOC for classification and detection (paper, tables 1 to 3).

VOC2007's measure is the mean of the interpolated precision at the 11 recalls 0, 0.1, ..., 1; the
area under the curve stands beside it.  Source: Everingham et al., The PASCAL Visual Object
Classes (VOC) Challenge, IJCV 2010, sections 4.2.1 and 4.2.2.

    PYTHONPATH=experiments python -c "import average_precision as a; print(a.envelope([0.5, 1]))"
"""
from typing import NamedTuple, Sequence, Tuple

import numpy as np

from voc import Objects

RECALLS = np.arange(11) / 10  # correctly rounded, so that a recall of 3/10 reaches 0.3
OVERLAP = 0.5  # a detection is right above this intersection over union


class AveragePrecision(NamedTuple):
    """AP by class, float64 (classes,): VOC2007's 11-point measure and the area.

    A class without a positive that counts has no AP: NaN, left out of the means.
    """
    eleven_point: np.ndarray
    area: np.ndarray

    @property
    def mean_eleven_point(self) -> float:
        return _mean(self.eleven_point)

    @property
    def mean_area(self) -> float:
        return _mean(self.area)


class Detections(NamedTuple):
    """What was found in one image, in any order.

    boxes: (n, 4), x1, y1, x2, y2 as in `voc.Objects`; scores: (n,); classes: ints (n,).
    """
    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray


# ---------------------------------------------------------------------------------------------
# Curves
# ---------------------------------------------------------------------------------------------

def eleven_point(recall: np.ndarray, precision: np.ndarray) -> float:
    """Return 1/11 sum over r in {0, 0.1, ..., 1} of max precision where recall >= r.

    `recall` ascends; both are float64 (n,).  A recall that is never reached contributes 0.
    (The devkit compares with multiples of a rounded 0.1 and so misses 3/10, 6/10 and 7/10.)
    """
    reached = np.searchsorted(np.asarray(recall, np.float64), RECALLS, side="left")
    return float(np.append(envelope(precision), 0.0)[reached].mean())


def area(recall: np.ndarray, precision: np.ndarray) -> float:
    """Return sum_k (recall_k - recall_(k-1)) precision_k, with recall_0 = 0.

    The step-wise area, not interpolated; with `envelope(precision)` it is that of VOC2010.
    """
    return float(np.sum(np.diff(recall, prepend=0.0) * np.asarray(precision)))


def envelope(precision: np.ndarray) -> np.ndarray:
    """Return the interpolated precision (n,): the highest at this recall or a greater one."""
    return np.maximum.accumulate(np.asarray(precision, np.float64)[::-1])[::-1]


def curve(right: np.ndarray, positives: int) -> Tuple[np.ndarray, np.ndarray]:
    """Return recall and precision (n,) after each of n answers, the surest first.

    `right` is bool (n,); `positives` > 0 is the number of right answers that exist.
    """
    found = np.cumsum(right)
    return found / positives, found / np.arange(1, len(found) + 1)


# ---------------------------------------------------------------------------------------------
# Classification
# ---------------------------------------------------------------------------------------------

def classification_ap(scores: np.ndarray, labels: np.ndarray) -> AveragePrecision:
    """Return the AP of scores (images, classes) for labels (images, classes) of -1, 0 and 1.

    Label 0, difficult, counts neither way.  Among equal scores the negatives come first, so that
    a constant score earns nothing.  The area is that of scikit-learn's average_precision_score.
    Raises ValueError where the shapes differ, a score is NaN or a label is something else.
    """
    scores, labels = np.asarray(scores), np.asarray(labels)
    if scores.ndim != 2 or scores.shape != labels.shape:
        raise ValueError("scores of shape %s do not fit labels of shape %s; both are (images, "
                         "classes)" % (scores.shape, labels.shape))
    if np.isnan(scores).any():
        raise ValueError("the scores of %d images hold NaN" % np.isnan(scores).any(1).sum())
    if not np.isin(labels, (-1, 0, 1)).all():
        raise ValueError("labels are -1, 0 or 1")
    by_class = [_one_class(*column) for column in zip(scores.T, labels.T)]
    return _average_precision(by_class)


def _one_class(scores: np.ndarray, labels: np.ndarray) -> Tuple[float, float]:
    counts = labels != 0
    scores, present = scores[counts], labels[counts] > 0
    if not present.any():
        return np.nan, np.nan
    order = np.lexsort((present, -scores))
    recall, precision = curve(present[order], int(present.sum()))
    return eleven_point(recall, precision), area(recall, precision)


# ---------------------------------------------------------------------------------------------
# Detection
# ---------------------------------------------------------------------------------------------

def detection_ap(detections: Sequence[Detections], truth: Sequence[Objects],
                 classes: int) -> AveragePrecision:
    """Return the AP of detections in images whose objects are `truth`, both (images,).

    A detection belongs to the object of its class that it overlaps most.  It is right where that
    overlap exceeds 0.5 and no surer detection has the object; a second detection of an object is
    wrong; one of a difficult object counts neither way.  Equal scores keep the order of images,
    and of detections in them.  The area is that of the envelope, as in VOC2010 and later.
    Raises ValueError where the counts of images or of rows differ, or a number is not finite.
    """
    if len(detections) != len(truth):
        raise ValueError("detections of %d images do not fit objects of %d images" % (
            len(detections), len(truth)))
    for image, found in enumerate(detections):
        _check(found, image)
    return _average_precision([_detected_class(detections, truth, index)
                               for index in range(classes)])


def overlaps(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the intersection over union (n, m) of boxes (n, 4) and others (m, 4).

    Both ends are inside a box, so that it is x2 - x1 + 1 pixels wide.
    """
    boxes, others = np.asarray(boxes, np.float64), np.asarray(others, np.float64)
    first = np.maximum(boxes[:, None, :2], others[None, :, :2])
    last = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    shared = np.clip(last - first + 1, 0, None).prod(axis=2)
    sizes = [(group[:, 2:] - group[:, :2] + 1).prod(axis=1) for group in (boxes, others)]
    return shared / (sizes[0][:, None] + sizes[1][None, :] - shared)


def _detected_class(detections: Sequence[Detections], truth: Sequence[Objects],
                    index: int) -> Tuple[float, float]:
    """The AP of class `index`.  Objects of all images are numbered through; -1 is none."""
    scores, matches, difficult = [], [], []
    numbered = 0
    for found, objects in zip(detections, truth):
        of_class = np.asarray(found.classes) == index
        wanted = np.asarray(objects.classes) == index
        scores.append(np.asarray(found.scores, np.float64)[of_class])
        match = _best_match(np.asarray(found.boxes)[of_class], objects.boxes[wanted])
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
    right[np.unique(match, return_index=True)[1]] = True  # the surest of each object
    recall, precision = curve(right & (match >= 0), positives)
    return eleven_point(recall, precision), area(recall, envelope(precision))


def _best_match(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """For each box (n, 4) the place of the other it overlaps most and above 0.5, or -1."""
    if not len(boxes) or not len(others):
        return np.full(len(boxes), -1)
    shared = overlaps(boxes, others)
    return np.where(shared.max(axis=1) > OVERLAP, shared.argmax(axis=1), -1)


def _check(found: Detections, image: int) -> None:
    count = len(found.scores)
    if np.shape(found.boxes) != (count, 4) or np.shape(found.classes) != (count,):
        raise ValueError("detections in image %d: %d scores, but boxes of shape %s and classes of "
                         "shape %s" % (image, count, np.shape(found.boxes),
                                       np.shape(found.classes)))
    if not (np.isfinite(found.scores).all() and np.isfinite(found.boxes).all()):
        raise ValueError("detections in image %d: a score or box is not finite" % image)


def _average_precision(by_class: Sequence[Tuple[float, float]]) -> AveragePrecision:
    columns = np.array(by_class, np.float64).reshape(-1, 2).T
    return AveragePrecision(columns[0], columns[1])


def _mean(values: np.ndarray) -> float:
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if len(defined) else float("nan")
