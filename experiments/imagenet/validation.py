"""Measure losses and errors in training and in validation, for curves.csv (section 4.5)."""
from typing import Any, Dict, Sequence

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


def training_means(rows: Sequence[Dict[str, float]]) -> Dict[str, float]:
    """Return the means of loss and error over rows of log.csv, NaN where there is none."""
    loss, accuracy = [float(np.mean([row[name] for row in rows])) if rows else float("nan")
                      for name in (nets.FINAL_LOSS, nets.ACCURACY)]
    return {"training_loss": loss, "training_error": 1 - accuracy}
