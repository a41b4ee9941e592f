"""Measure how much boxes overlap."""
import numpy as np


def overlaps(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the intersection over union (n, m) of boxes (n, 4) and others (m, 4).

    Both ends belong to a box, so that it is x2 - x1 + 1 pixels wide.
    """
    boxes, others = np.asarray(boxes, np.float64), np.asarray(others, np.float64)
    first = np.maximum(boxes[:, None, :2], others[None, :, :2])
    last = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    shared = np.clip(last - first + 1, 0, None).prod(axis=2)
    sizes = [(group[:, 2:] - group[:, :2] + 1).prod(axis=1) for group in (boxes, others)]
    return shared / (sizes[0][:, None] + sizes[1][None, :] - shared)
