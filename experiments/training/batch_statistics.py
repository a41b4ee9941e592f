"""Normalize by the batch, for builds of Caffe whose BatchNorm layer does not.

In training, BatchNorm subtracts the mean of a channel over the batch and divides by its standard
deviation; in tests it uses running averages of both (Ioffe & Szegedy 2015; section 4.1). The layer
of Caffe's CPU wheel only implements the tests. `nets.repaired` puts this Python layer in its place.
It keeps the same three blobs, so that its weights load into BatchNorm again.
"""
import json
from typing import Any, Sequence

import numpy as np

from ddinit.prototxt import import_caffe

caffe: Any = import_caffe()


class BatchStatistics(caffe.Layer):
    """y = (x - mean) / sqrt(variance + eps) for each channel of x (n, channels, ...).

    The blobs are those of BatchNorm: running sums of the means (channels,), of the unbiased
    variances (channels,) and of their weights (1,), which fade by `moving_average_fraction` in each
    step.
    """

    def setup(self, bottom: Sequence[Any], top: Sequence[Any]) -> None:
        settings = json.loads(self.param_str or "{}")
        self.eps = settings.get("eps", 1e-5)
        self.fraction = settings.get("moving_average_fraction", 0.999)
        if not len(self.blobs):
            channels = bottom[0].data.shape[1]
            for length in (channels, channels, 1):
                self.blobs.add_blob(length)
                self.blobs[len(self.blobs) - 1].data[...] = 0

    def reshape(self, bottom: Sequence[Any], top: Sequence[Any]) -> None:
        top[0].reshape(*bottom[0].data.shape)

    def forward(self, bottom: Sequence[Any], top: Sequence[Any]) -> None:
        x = _rows(bottom[0].data)
        mean = x.mean((0, 2), dtype=np.float64)
        centered = x - mean[:, None].astype(np.float32)
        variance = np.einsum("ncp,ncp->c", centered, centered, dtype=np.float64) / _count(x)
        self._add(mean, variance * _count(x) / max(1, _count(x) - 1))
        self.deviation = np.sqrt(variance + self.eps).astype(np.float32)[:, None]
        self.normalized = centered / self.deviation  # kept: later layers may work in place
        _rows(top[0].data)[...] = self.normalized

    def _add(self, mean: np.ndarray, variance: np.ndarray) -> None:
        for blob, value in zip((self.blobs[0], self.blobs[1], self.blobs[2]),
                               (mean, variance, 1.0)):
            blob.data[...] = self.fraction * blob.data + value

    def backward(self, top: Sequence[Any], propagate_down: Sequence[bool],
                 bottom: Sequence[Any]) -> None:
        """Set dx = (dy - mean(dy) - y mean(dy y)) / deviation; means are over batch and positions.
        """
        if not propagate_down[0]:
            return
        dy = _rows(top[0].diff)
        slope = np.einsum("ncp,ncp->c", dy, self.normalized) / np.float32(_count(dy))
        change = dy - dy.mean((0, 2))[:, None]
        change -= self.normalized * slope[:, None]
        change /= self.deviation
        _rows(bottom[0].diff)[...] = change


def _rows(blob: np.ndarray) -> np.ndarray:
    """Return a view (n, channels, positions) of a blob."""
    return blob.reshape(blob.shape[0], blob.shape[1], -1)


def _count(rows: np.ndarray) -> int:
    """Return the number of values in each channel."""
    return rows.shape[0] * rows.shape[2]
