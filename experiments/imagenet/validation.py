"""Measure losses and errors in training and in validation, for curves.csv (section 4.5)."""
import csv
import io
import os
from typing import Any, Dict, List

import numpy as np

from imagenet import nets
from imagenet.images import batches_of, dataset_of, make_central_batches
from training.batches import Crops, named_dataset
from training.prefetch import Prefetcher


class Scores:
    """Mean loss and error of a net on all images of a database or an .npz file.

    net       imagenet.nets.Classifier, whose batch size is used
    path      the images
    classes, crops, workers   as in `images.make_central_batches` and `prefetch.Prefetcher`
    """

    def __init__(self, net: nets.Classifier, path: str, classes: int, crops: Crops,
                 workers: int) -> None:
        self.net = net
        size = net.image.shape[0]
        dataset = named_dataset(dataset_of(path), {"path": path, "classes": classes})
        self._batches = batches_of(len(dataset.labels), size)
        self._feed = Prefetcher(make_central_batches, (path, classes, crops, size),
                                min(workers, self._batches),
                                slot_bytes=4 * int(np.prod(net.image.shape)) + 8 * size + 64)
        self._started = False

    def measure(self, net: Any) -> Dict[str, float]:
        """Return `loss` and `error` of a caffe.Net of `nets.validation_definition`.

        They are NaN where the scores are; then the next loss of the training ends it.
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
            loss += nets.softmax_loss(scores, labels).sum()
            wrong += nets.error_rate(scores, labels) * len(pixels)
            images += len(pixels)
        return {"loss": loss / images, "error": wrong / images}

    def close(self) -> None:
        """End the workers."""
        self._feed.close()


class TrainingScores:
    """Means of the training loss and error in log.csv since the measurement before."""

    def __init__(self, folder: str, every: int) -> None:
        self._log = _Tail(os.path.join(folder, "log.csv"))
        self._every = every

    def measure(self) -> Dict[str, float]:
        """Return `training_loss` and `training_error`, NaN before the first iteration."""
        rows = self._log.new_rows()
        last = rows[-1]["iteration"] if rows else 0
        start = (last - 1) // self._every * self._every  # a resumed run reads older rows as well
        rows = [row for row in rows if row["iteration"] > start]
        return {"training_loss": _mean(rows, nets.FINAL_LOSS),
                "training_error": _mean(rows, nets.ERROR)}


def _mean(rows: List[Dict[str, float]], name: str) -> float:
    return float(np.mean([row[name] for row in rows])) if rows else float("nan")


class _Tail:
    """The rows of a growing table that have not been read yet."""

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
