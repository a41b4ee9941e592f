"""Boxes of Fast R-CNN (Girshick 2015): regression targets, suppression, duplicates.

Everywhere in the detection code a box is a row (x1, y1, x2, y2) of pixel indices from 0 whose last
column and row belong to the box, as in PASCAL VOC: a box is x2 - x1 + 1 pixels wide.

    PYTHONPATH=experiments python -c "import boxes; \\
        print(boxes.suppressed([[0, 0, 9, 9], [0, 0, 9, 8]], [1, 2], 0.3))"

Overlap is `average_precision.overlaps`.
"""
import math
from typing import Any, Tuple

import numba
import numpy as np

# A predicted box is at most this many times its ROI: exp() of an untrained net stays finite.
LARGEST_GROWTH = 1000.0 / 16.0


def targets(rois: Any, truths: Any) -> np.ndarray:
    """Return what bbox_pred shall say to move each ROI onto its truth, (n, 4) for (n, 4) each.

    (t_x, t_y, t_w, t_h) = ((x' - x) / w, (y' - y) / h, log(w' / w), log(h' / h)) with centres
    (x, y) and sizes (w, h) of the ROI, primed of the truth (Girshick et al. 2014, appendix C).
    """
    centres, sizes = _centres_and_sizes(as_boxes(rois))
    true_centres, true_sizes = _centres_and_sizes(as_boxes(truths))
    return np.hstack([(true_centres - centres) / sizes, np.log(true_sizes / sizes)])


def moved(rois: Any, deltas: Any) -> np.ndarray:
    """Return the boxes (n, 4 k) that bbox_pred's output `deltas` (n, 4 k) makes of ROIs (n, 4).

    The inverse of `targets`, for k classes at once.
    """
    deltas = np.asarray(deltas, np.float64)
    steps = deltas.reshape(len(deltas), -1, 4)
    centres, sizes = _centres_and_sizes(as_boxes(rois))
    new_centres = steps[:, :, :2] * sizes[:, None] + centres[:, None]
    growth = np.exp(np.minimum(steps[:, :, 2:], math.log(LARGEST_GROWTH)))
    new_sizes = growth * sizes[:, None]
    corners = [new_centres - 0.5 * new_sizes, new_centres + 0.5 * new_sizes - 1]
    return np.concatenate(corners, axis=2).reshape(deltas.shape)


def clipped(boxes: np.ndarray, width: float, height: float) -> np.ndarray:
    """Return boxes (n, 4 k) with every corner moved into an image of this size in pixels."""
    limits = np.array([width - 1, height - 1, width - 1, height - 1], np.float64)
    corners = boxes.reshape(len(boxes), -1, 4)
    return np.clip(corners, 0, limits).reshape(boxes.shape)


def mirrored(boxes: np.ndarray, width: float) -> np.ndarray:
    """Return boxes (n, 4) of an image of `width` pixels as they lie in its mirror image."""
    return np.stack([width - 1 - boxes[:, 2], boxes[:, 1],
                     width - 1 - boxes[:, 0], boxes[:, 3]], axis=1)


def suppressed(boxes: Any, scores: Any, threshold: float) -> np.ndarray:
    """Return the indices of boxes (n, 4) that greedy non-maximum suppression keeps, best first.

    A box goes where one that is kept has a higher score (among equals: the lower index) and
    overlaps it by at least `threshold`.
    """
    order = np.argsort(-np.asarray(scores), kind="stable")
    return order[_greedy(np.ascontiguousarray(as_boxes(boxes)[order]), float(threshold))]


def distinct(rois: np.ndarray, spatial_scale: float) -> Tuple[np.ndarray, np.ndarray]:
    """Return (index, inverse): rois[index] are all that ROI pooling tells apart.

    `rois` (n, 5) are image number and corners; rois[index][inverse] pools like `rois`.
    """
    cells = rounded(rois[:, 1:] * spatial_scale)
    rows = np.hstack([rois[:, :1].astype(np.int64), cells])
    low, high = rows.min(axis=0, initial=0), rows.max(axis=0, initial=0)
    keys = np.ravel_multi_index(tuple((rows - low).T), tuple(high - low + 1))
    _, index, inverse = np.unique(keys, return_index=True, return_inverse=True)
    return index, inverse


def rounded(values: np.ndarray) -> np.ndarray:
    """Return the nearest integers, halves away from zero: numpy rounds halves to even, C not."""
    return np.trunc(values + np.copysign(0.5, values)).astype(np.int64)


def as_boxes(boxes: Any) -> np.ndarray:
    """Return boxes as float64 (n, 4): readers store them unsigned, where subtracting would wrap.

    Raises ValueError where they have another shape.
    """
    array = np.asarray(boxes)
    if array.size == 0:
        return np.zeros((0, 4))
    if array.ndim != 2 or array.shape[1] != 4:
        raise ValueError("boxes must be rows of 4 corners, not an array %s" % (array.shape,))
    return array.astype(np.float64, copy=False)


def _centres_and_sizes(boxes: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
    sizes = boxes[:, 2:] - boxes[:, :2] + 1
    return boxes[:, :2] + 0.5 * sizes, sizes


@numba.njit(cache=True)
def _greedy(boxes: np.ndarray, threshold: float) -> np.ndarray:
    """Positions of the boxes that stay, of boxes sorted by falling score."""
    count = len(boxes)
    gone = np.zeros(count, np.bool_)
    areas_of = (boxes[:, 2] - boxes[:, 0] + 1) * (boxes[:, 3] - boxes[:, 1] + 1)
    kept = np.empty(count, np.int64)
    found = 0
    for i in range(count):
        if gone[i]:
            continue
        kept[found] = i
        found += 1
        for j in range(i + 1, count):
            width = min(boxes[i, 2], boxes[j, 2]) - max(boxes[i, 0], boxes[j, 0]) + 1
            height = min(boxes[i, 3], boxes[j, 3]) - max(boxes[i, 1], boxes[j, 1]) + 1
            if width > 0 and height > 0:
                shared = width * height
                if shared >= threshold * (areas_of[i] + areas_of[j] - shared):
                    gone[j] = True
    return kept[:found]
