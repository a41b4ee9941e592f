"""BatchNorm that normalises by its batch, for builds of Caffe whose own does not.

Caffe's BatchNorm subtracts a channel's mean over the batch and divides by its standard deviation
in training, and uses running averages of both in tests (Ioffe & Szegedy 2015; paper, section 4.1).
The CPU wheel's layer knows the tests only: in training it uses numbers that nobody set.
`training_net.repaired` puts this Python layer in its place; it keeps the same three blobs, so that
the weights load into BatchNorm again.

    layer {
      name: "bn" type: "Python" bottom: "x" top: "x"
      python_param { module: "batch_statistics" layer: "BatchStatistics" param_str: "{}" }
    }

    PYTHONPATH=experiments python -c "import batch_statistics as b; print(b.BatchStatistics)"
"""
import json
from typing import Any, Sequence

import numpy as np

from ddinit.prototxt import import_caffe

caffe: Any = import_caffe()


class BatchStatistics(caffe.Layer):
    """y = (x - mean) / sqrt(variance + eps) per channel of x (n, channels, ...).

    Blobs, as BatchNorm's: running sums of means (channels,), of unbiased variances (channels,) and
    of their weights (1,), which fade by `moving_average_fraction` each step.
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
        centred = x - mean[:, None].astype(np.float32)
        variance = np.einsum("ncp,ncp->c", centred, centred, dtype=np.float64) / _count(x)
        self._add(mean, variance * _count(x) / max(1, _count(x) - 1))
        self.deviation = np.sqrt(variance + self.eps).astype(np.float32)[:, None]
        self.normalised = centred / self.deviation  # kept: layers behind may work in place
        _rows(top[0].data)[...] = self.normalised

    def _add(self, mean: np.ndarray, variance: np.ndarray) -> None:
        for blob, value in zip((self.blobs[0], self.blobs[1], self.blobs[2]),
                               (mean, variance, 1.0)):
            blob.data[...] = self.fraction * blob.data + value

    def backward(self, top: Sequence[Any], propagate_down: Sequence[bool],
                 bottom: Sequence[Any]) -> None:
        """dx = (dy - mean(dy) - y mean(dy y)) / deviation, means over batch and positions."""
        if not propagate_down[0]:
            return
        dy = _rows(top[0].diff)
        slope = np.einsum("ncp,ncp->c", dy, self.normalised) / np.float32(_count(dy))
        change = dy - dy.mean((0, 2))[:, None]
        change -= self.normalised * slope[:, None]
        change /= self.deviation
        _rows(bottom[0].diff)[...] = change


def _rows(blob: np.ndarray) -> np.ndarray:
    """A view (n, channels, positions) of a blob."""
    return blob.reshape(blob.shape[0], blob.shape[1], -1)


def _count(rows: np.ndarray) -> int:
    """Numbers per channel."""
    return rows.shape[0] * rows.shape[2]
