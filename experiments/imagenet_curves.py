"""What curves.csv of an ImageNet run holds: losses and errors in training and in validation.

    python experiments/train_imagenet.py --help
"""
import csv
import io
import os
from typing import Any, Dict, List

import numpy as np

import imagenet_net
from image_batches import Crops
from lmdb_images import LmdbImages, batches_of, make_centre_batches
from prefetch import Prefetcher


class Curves:
    """Measures the validation set, and sums up log.csv since the measurement before.

    `every` is the number of iterations between measurements, `net` the classifier whose validation
    net `measure` will get, `path` the database of validation images.
    """

    def __init__(self, folder: str, every: int, net: imagenet_net.Classifier, path: str,
                 classes: int, crops: Crops, workers: int) -> None:
        self.net = net
        self._log = _Tail(os.path.join(folder, "log.csv"))
        self._every = every
        size = net.image.shape[0]
        self._batches = batches_of(len(LmdbImages(path, classes).labels), size)
        self._feed = Prefetcher(make_centre_batches, (path, classes, crops, size),
                                min(workers, self._batches),
                                slot_bytes=4 * int(np.prod(net.image.shape)) + 8 * size + 64)
        self._started = False

    def measure(self, net: Any) -> Dict[str, float]:
        """Return the named values of a row, from the validation net with the current weights.

        NaN where its scores are; then the loss of the next iteration is, too, and ends the run.
        """
        if not self._started:
            self._feed.start(0)
            self._started = True
        loss = wrong = images = 0.0
        for _ in range(self._batches):
            pixels, labels = self._feed.next()
            net.blobs[self.net.image.blob].data[:len(pixels)] = pixels
            net.forward()
            scores = net.blobs[self.net.outputs[-1]].data[:len(pixels)]
            loss += imagenet_net.softmax_loss(scores, labels).sum()
            wrong += imagenet_net.error_rate(scores, labels) * len(pixels)
            images += len(pixels)
        return {**self._trained(), "validation_loss": loss / images,
                "validation_error": wrong / images}

    def _trained(self) -> Dict[str, float]:
        """Means over the iterations since the measurement before; NaN before the first one."""
        rows = self._log.new_rows()
        last = rows[-1]["iteration"] if rows else 0
        start = (last - 1) // self._every * self._every  # a run that resumed reads older rows too
        rows = [row for row in rows if row["iteration"] > start]
        return {"training_loss": _mean(rows, imagenet_net.FINAL_LOSS),
                "training_error": _mean(rows, imagenet_net.ERROR)}

    def close(self) -> None:
        """End the workers."""
        self._feed.close()


def _mean(rows: List[Dict[str, float]], name: str) -> float:
    return float(np.mean([row[name] for row in rows])) if rows else float("nan")


class _Tail:
    """The rows of a growing table that were not read before."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._heading = ""
        self._read = 0

    def new_rows(self) -> List[Dict[str, float]]:
        if not os.path.exists(self._path):
            return []
        with open(self._path, newline="", encoding="utf-8") as file:
            self._heading = file.readline()
            file.seek(max(self._read, len(self._heading)))
            text = file.read()
            self._read = file.tell()
        return [{name: float(cell) for name, cell in row.items()}
                for row in csv.DictReader(io.StringIO(self._heading + text))]
