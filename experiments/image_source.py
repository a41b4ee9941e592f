"""The Caffe Python layer that feeds nets with random crops of images, read ahead by processes.

In a definition (see `training_net.image_source_layer`):

    layer {
      name: "data" type: "Python" top: "data" top: "label"
      python_param { module: "image_source" layer: "ImageSource" param_str: "{...JSON...}" }
    }

Caffe imports the module by its name, so this folder has to be on PYTHONPATH where Caffe's own
command reads such a definition; a script in this folder finds it.

    python experiments/classify_voc.py train models/caffenet/deploy.prototxt caffenet.caffemodel \\
        build/voc --voc datasets/VOCdevkit/VOC2007
"""
import json
from typing import Any, Sequence

from definitions import import_caffe
from image_batches import Crops, make_batches, named_dataset
from prefetch import ALIGNMENT, Prefetcher

caffe: Any = import_caffe()


class ImageSource(caffe.Layer):
    """Tops: images (n, channels, height, width) and labels (n, ...).

    Batch k of a run is a function of (seed, k); with several solvers each takes its own batches of
    the same sequence.  Python errors reach whoever steps the solver.
    """

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
        self.started = False

    def begin(self, batch: int) -> None:
        """Start at the batch that follows the first `batch` batches of a run."""
        count = max(1, caffe.solver_count())
        self.batches.start(batch * count + caffe.solver_rank(), count)
        self.started = True

    def close(self) -> None:
        """End the workers."""
        self.batches.close()
        self.started = False

    def reshape(self, bottom: Sequence[Any], top: Sequence[Any]) -> None:
        pass  # shapes stay as they are

    def forward(self, bottom: Sequence[Any], top: Sequence[Any]) -> None:
        if not self.started:  # Caffe's own tools know no begin()
            self.begin(0)
        images, labels = self.batches.next()
        top[0].data[...] = images
        top[1].data[...] = labels

    def backward(self, *_: Any) -> None:
        pass  # data has no gradient
