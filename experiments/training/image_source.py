"""Feed nets from a Prefetcher: the Caffe Python layers of training data.

A definition holds an ImageSource as

    layer {
      name: "data" type: "Python" top: "data" top: "label"
      python_param { module: "training.image_source" layer: "ImageSource" param_str: "{...}" }
    }

which `nets.image_source_layer` writes.
"""
import json
from typing import Any, List, Sequence

import numpy as np

from ddinit.prototxt import import_caffe
from training.batches import Crops, make_batches, named_dataset
from training.prefetch import ALIGNMENT, Prefetcher

caffe: Any = import_caffe()


class DataLayer(caffe.Layer):
    """A layer whose batch k is a function of (seed, k).

    `setup` of a subclass sets `self.batches`, and `forward` takes `self.next_batch()`. The training
    loop calls `begin` and `close`; Caffe's own tools call neither. A Python error reaches whoever
    steps the solver.
    """

    batches: Prefetcher
    started = False

    def begin(self, batch: int) -> None:
        """Start at the batch that follows the first `batch` batches of a run."""
        self.batches.start(batch)
        self.started = True

    def close(self) -> None:
        """End the workers."""
        self.batches.close()
        self.started = False

    def next_batch(self) -> List[np.ndarray]:
        """Return the arrays of the next batch, from the run's first where `begin` was not called.
        """
        if not self.started:
            self.begin(0)
        return self.batches.next()

    def backward(self, *_: Any) -> None:
        """Do nothing: data has no gradient."""


class ImageSource(DataLayer):
    """Tops: images (n, channels, height, width) and labels (n, ...)."""

    def setup(self, bottom: Sequence[Any], top: Sequence[Any]) -> None:
        settings = json.loads(self.param_str)
        dataset = named_dataset(settings["dataset"], settings["arguments"])
        crops = Crops(**settings["crops"])
        batch_size = settings["batch_size"]
        top[0].reshape(batch_size, len(crops.mean), crops.height, crops.width)
        top[1].reshape(batch_size, *dataset.labels.shape[1:])
        self.batches = Prefetcher(make_batches, (
            settings["dataset"], settings["arguments"], settings["crops"], batch_size,
            settings["seed"], settings["broken_limit"]), settings["workers"],
            slot_bytes=4 * (top[0].count + top[1].count) + ALIGNMENT,
            broken_limit=settings["broken_limit"])

    def reshape(self, bottom: Sequence[Any], top: Sequence[Any]) -> None:
        pass  # shapes never change

    def forward(self, bottom: Sequence[Any], top: Sequence[Any]) -> None:
        images, labels = self.next_batch()
        top[0].data[...] = images
        top[1].data[...] = labels
