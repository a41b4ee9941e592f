"""Provide Fast R-CNN's two layers that stock Caffe lacks, as Caffe Python layers (Girshick 2015).

ROIPooling pools the part of a feature map in each region of interest (ROI) into a grid of fixed
size. SmoothL1Loss is the loss of the box regression. Both run forward and backward on any pycaffe.
"""
import json
from typing import Any, Tuple

import numba
import numpy as np

from ddinit.prototxt import import_caffe
from detection import boxes

caffe: Any = import_caffe()


class ROIPooling(caffe.Layer):
    """Maps (n, channels, h, w) and ROIs (r, 5) to (r, channels, side, side).

    A ROI is (image number, x1, y1, x2, y2) in pixels of the net's input. `param_str` is JSON with
    `side` and with `spatial_scale`, the cells of the maps per pixel.
    """

    def setup(self, bottom: Any, top: Any) -> None:
        parameters = json.loads(self.param_str)
        self.side = int(parameters["side"])
        self.spatial_scale = float(parameters["spatial_scale"])
        self.where = np.empty(0, np.int32)

    def reshape(self, bottom: Any, top: Any) -> None:
        top[0].reshape(bottom[1].shape[0], bottom[0].shape[1], self.side, self.side)

    def forward(self, bottom: Any, top: Any) -> None:
        cells = cells_of(bottom[1].data, self.spatial_scale, len(bottom[0].data))
        self.images = cells[:, 0]
        self.where = np.empty(top[0].data.shape, np.int32)
        pool(bottom[0].data, cells, top[0].data, self.where)

    def backward(self, top: Any, propagate_down: Any, bottom: Any) -> None:
        if propagate_down[0]:
            unpool(top[0].diff, self.images, self.where, bottom[0].diff)


class SmoothL1Loss(caffe.Layer):
    """sum(w_out f(w_in (prediction - target))) / r of four blobs of one shape (r, ...).

    f(d) = sigma^2 d^2 / 2 where |d| < 1 / sigma^2, |d| - 1 / (2 sigma^2) elsewhere.
    """

    def setup(self, bottom: Any, top: Any) -> None:
        self.knee = 1.0 / float(json.loads(self.param_str)["sigma"]) ** 2
        self.slope = np.empty(0, np.float32)

    def reshape(self, bottom: Any, top: Any) -> None:
        shapes = [tuple(bottom[i].shape) for i in range(4)]
        if len(set(shapes)) > 1:
            raise ValueError("SmoothL1Loss needs bottoms of one shape, not of %s." % shapes)
        top[0].reshape()

    def forward(self, bottom: Any, top: Any) -> None:
        prediction, target, inside, outside = [bottom[i].data for i in range(4)]
        value, slope = smooth_l1(inside * (prediction - target), self.knee)
        count = max(len(prediction), 1)
        self.slope = slope * inside * outside / np.float32(count)
        top[0].data[...] = np.sum(value * outside, dtype=np.float64) / count

    def backward(self, top: Any, propagate_down: Any, bottom: Any) -> None:
        for i, sign in enumerate((1, -1)):
            if propagate_down[i]:
                np.multiply(self.slope, np.float32(sign) * top[0].diff, out=bottom[i].diff)


def smooth_l1(difference: np.ndarray, knee: float) -> Tuple[np.ndarray, np.ndarray]:
    """Return f(d) and f'(d) of differences; f is quadratic up to `knee`, which is 1 / sigma^2."""
    size = np.abs(difference)
    knee = difference.dtype.type(knee)
    value = np.where(size < knee, difference ** 2 / (2 * knee), size - knee / 2)
    return value, np.clip(difference / knee, -1, 1)


def cells_of(rois: np.ndarray, spatial_scale: float, images: int) -> np.ndarray:
    """Return ROIs (r, 5) as int64 rows of the image number and the corners on the maps.

    Raises ValueError where a ROI is not finite, or not in one of `images` images.
    """
    rois = rois.reshape(len(rois), -1)
    if rois.shape[1] != 5:
        raise ValueError("ROIs have to have 5 numbers, not %d." % rois.shape[1])
    numbers = rois[:, 0]
    if not np.isfinite(rois).all() or (numbers < 0).any() or (numbers >= images).any():
        raise ValueError("A ROI is not finite, or not in one of the %d images." % images)
    corners = boxes.rounded(rois[:, 1:].astype(np.float64) * spatial_scale)
    return np.hstack([numbers[:, None].astype(np.int64), corners])


def pool(maps: np.ndarray, cells: np.ndarray, top: np.ndarray, where: np.ndarray) -> None:
    """Write the maxima of ROIs into `top` (r, channels, side, side), their indices into `where`.

    Bin i covers rows floor(i h / side) to ceil((i + 1) h / side) - 1 of the h = last - first + 1
    rows (at least 1) of a ROI, clipped to the map, and the same for columns. The maximum of an
    empty bin is 0 and its index -1; among equals the first in reading order counts.
    """
    # With channels last, neighboring numbers are independent and the compiler vectorizes.
    _pool(np.ascontiguousarray(maps.transpose(0, 2, 3, 1)), cells, top, where)


def unpool(top_diff: np.ndarray, images: np.ndarray, where: np.ndarray,
           maps_diff: np.ndarray) -> None:
    """Write the gradient of the maps, where each maximum's gradient is added at its index."""
    rois, channels = where.shape[:2]
    _unpool(top_diff.reshape(rois, channels, -1), images, where.reshape(rois, channels, -1),
            maps_diff.reshape(maps_diff.shape[:2] + (-1,)))


@numba.njit(cache=True)
def _bins(first: int, last: int, limit: int, starts: np.ndarray, ends: np.ndarray) -> None:
    """Set the first rows of the bins and the rows after their last ones, clipped to 0..limit."""
    side = len(starts)
    length = max(last - first + 1, 1)
    for i in range(side):
        starts[i] = min(max(first + i * length // side, 0), limit)
        ends[i] = min(max(first + ((i + 1) * length + side - 1) // side, 0), limit)


@numba.njit(cache=True)
def _maximum(maps: np.ndarray, rows: Any, columns: Any, best: np.ndarray,
             where: np.ndarray) -> None:
    """Set the maximum of each channel, and its index, over a block of (height, width, channels)."""
    channels = len(best)
    if rows[1] <= rows[0] or columns[1] <= columns[0]:
        best[:] = 0
        where[:] = -1
        return
    best[:] = maps[rows[0], columns[0]]
    where[:] = rows[0] * maps.shape[1] + columns[0]
    for y in range(rows[0], rows[1]):
        for x in range(columns[0], columns[1]):
            place = np.int32(y * maps.shape[1] + x)
            cell = maps[y, x]
            for c in range(channels):
                higher = cell[c] > best[c]
                best[c] = cell[c] if higher else best[c]
                where[c] = place if higher else where[c]


@numba.njit(parallel=True, cache=True)
def _pool(maps: np.ndarray, cells: np.ndarray, top: np.ndarray, where: np.ndarray) -> None:
    side = top.shape[2]
    for r in numba.prange(len(cells)):
        edges = np.empty((4, side), np.int64)
        _bins(cells[r, 2], cells[r, 4], maps.shape[1], edges[0], edges[1])
        _bins(cells[r, 1], cells[r, 3], maps.shape[2], edges[2], edges[3])
        best = np.empty(maps.shape[3], maps.dtype)
        places = np.empty(maps.shape[3], np.int32)
        for i in range(side):
            for j in range(side):
                _maximum(maps[cells[r, 0]], (edges[0, i], edges[1, i]),
                         (edges[2, j], edges[3, j]), best, places)
                top[r, :, i, j] = best
                where[r, :, i, j] = places


@numba.njit(parallel=True, cache=True)
def _unpool(top_diff: np.ndarray, images: np.ndarray, where: np.ndarray,
            maps_diff: np.ndarray) -> None:
    """Add gradients in parallel over channels, because ROIs overlap and would collide."""
    maps_diff[:] = 0
    for c in numba.prange(where.shape[1]):
        for r in range(where.shape[0]):
            for i in range(where.shape[2]):
                if where[r, c, i] >= 0:
                    maps_diff[images[r], c, where[r, c, i]] += top_diff[r, c, i]
