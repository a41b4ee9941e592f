"""Compute with the boxes of Fast R-CNN (Girshick 2015): targets, suppression, duplicates.

A box is a row (x1, y1, x2, y2) of pixel indices from 0 whose last column and row belong to it, as
in PASCAL VOC, so that it is x2 - x1 + 1 pixels wide.
"""
import math
from typing import Any, Tuple

import cv2
import numpy as np

# A predicted box is at most this many times its ROI: exp() of an untrained net stays finite.
LARGEST_GROWTH = 1000.0 / 16.0
ROUNDING = 1e-6  # of overlaps, which OpenCV computes in float32


def targets(rois: Any, truths: Any) -> np.ndarray:
    """Return the regression targets (n, 4) that move ROIs (n, 4) onto true boxes (n, 4).

    They are ((x' - x) / w, (y' - y) / h, log(w' / w), log(h' / h)) with the center (x, y) and size
    (w, h) of the ROI and, primed, those of the true box (Girshick et al. 2014, appendix C).
    """
    centers, sizes = _centers_and_sizes(as_boxes(rois))
    true_centers, true_sizes = _centers_and_sizes(as_boxes(truths))
    return np.hstack([(true_centers - centers) / sizes, np.log(true_sizes / sizes)])


def moved(rois: Any, deltas: Any) -> np.ndarray:
    """Return the boxes (n, 4 k) to which the outputs `deltas` (n, 4 k) move ROIs (n, 4).

    It is the inverse of `targets`, for k classes at once.
    """
    deltas = np.asarray(deltas, np.float64)
    steps = deltas.reshape(len(deltas), -1, 4)
    centers, sizes = _centers_and_sizes(as_boxes(rois))
    new_centers = steps[:, :, :2] * sizes[:, None] + centers[:, None]
    growth = np.exp(np.minimum(steps[:, :, 2:], math.log(LARGEST_GROWTH)))
    new_sizes = growth * sizes[:, None]
    corners = [new_centers - 0.5 * new_sizes, new_centers + 0.5 * new_sizes - 1]
    return np.concatenate(corners, axis=2).reshape(deltas.shape)


def clipped(boxes: np.ndarray, width: float, height: float) -> np.ndarray:
    """Return boxes (n, 4 k) with all corners moved into an image of this size in pixels."""
    limits = np.array([width - 1, height - 1, width - 1, height - 1], np.float64)
    corners = boxes.reshape(len(boxes), -1, 4)
    return np.clip(corners, 0, limits).reshape(boxes.shape)


def mirrored(boxes: np.ndarray, width: float) -> np.ndarray:
    """Return the boxes (n, 4) in the mirror image of an image of `width` pixels."""
    return np.stack([width - 1 - boxes[:, 2], boxes[:, 1],
                     width - 1 - boxes[:, 0], boxes[:, 3]], axis=1)


def suppressed(boxes: Any, scores: Any, threshold: float) -> np.ndarray:
    """Return the indices of boxes (n, 4) that greedy non-maximum suppression keeps, best first.

    A box is dropped if one that is kept has a higher score, or the same score and a lower index,
    and overlaps it by at least `threshold`.
    """
    rows = as_boxes(boxes)
    if not len(rows):
        return np.zeros(0, np.int64)
    order = np.argsort(-np.asarray(scores), kind="stable")
    sized = np.hstack([rows[:, :2], rows[:, 2:] - rows[:, :2] + 1])[order]
    # OpenCV keeps no box of score 0 and all that overlap by exactly the threshold.
    ranks = np.arange(len(rows), 0, -1)
    kept = cv2.dnn.NMSBoxes(sized.tolist(), ranks.tolist(), 0, threshold - ROUNDING)
    return order[np.ravel(kept)]


def distinct(rois: np.ndarray, spatial_scale: float) -> Tuple[np.ndarray, np.ndarray]:
    """Return (index, inverse) such that rois[index][inverse] are pooled as `rois` are.

    `rois` (n, 5) are the image number and the corners. rois[index] are all that ROI pooling can
    distinguish.
    """
    cells = rounded(rois[:, 1:] * spatial_scale)
    rows = np.hstack([rois[:, :1].astype(np.int64), cells])
    _, index, inverse = np.unique(rows, axis=0, return_index=True, return_inverse=True)
    return index, inverse.ravel()


def rounded(values: np.ndarray) -> np.ndarray:
    """Return the nearest integers, with halves away from zero, as C does and numpy does not."""
    return np.trunc(values + np.copysign(0.5, values)).astype(np.int64)


def as_boxes(boxes: Any) -> np.ndarray:
    """Return boxes as float64 (n, 4), because unsigned numbers would wrap when subtracted.

    Raises ValueError where they have another shape.
    """
    array = np.asarray(boxes)
    if array.size == 0:
        return np.zeros((0, 4))
    if array.ndim != 2 or array.shape[1] != 4:
        raise ValueError("Boxes have to be (n, 4), not %s." % (array.shape,))
    return array.astype(np.float64, copy=False)


def _centers_and_sizes(boxes: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
    sizes = boxes[:, 2:] - boxes[:, :2] + 1
    return boxes[:, :2] + 0.5 * sizes, sizes
