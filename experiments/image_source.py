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

from data_layer import DataLayer
from image_batches import Crops, make_batches, named_dataset
from prefetch import ALIGNMENT, Prefetcher


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
        pass  # shapes stay as they are

    def forward(self, bottom: Sequence[Any], top: Sequence[Any]) -> None:
        images, labels = self.next_batch()
        top[0].data[...] = images
        top[1].data[...] = labels
