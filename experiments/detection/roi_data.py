"""Feed Fast R-CNN's training net with images and ROIs, in a Caffe Python layer."""
import json
from typing import Any, Sequence

import numpy as np

from detection.batches import IMAGES, ROIS, make_training_batches
from training.image_source import DataLayer
from training.prefetch import Prefetcher


class RoiData(DataLayer):
    """Tops: images (2, 3, height, width), ROIs (r, 5), labels (r,), and targets, inside and outside
    weights (r, 4 (classes + 1)).

    A smaller image is in the top left corner; the rest is 0, the mean color.
    """

    def setup(self, bottom: Sequence[Any], top: Sequence[Any]) -> None:
        given = json.loads(self.param_str)
        columns = 4 * len(given["means"])
        for blob, shape in zip(_all(top), ((IMAGES, 3, min(given["scales"]), min(given["scales"])),
                                           (1, 5), (1,), (1, columns), (1, columns),
                                           (1, columns))):
            blob.reshape(*shape)
        rows = 4 * IMAGES * ROIS * (5 + 1 + 2 * columns)
        self.batches = Prefetcher(make_training_batches, (
            given["folder"], given["means"], given["deviations"], given["scales"],
            given["max_size"], given["seed"], given["background_overlap"],
            given["broken_limit"]), given["workers"],
            slot_bytes=IMAGES * given["image_bytes"] + rows + 1024,
            broken_limit=given["broken_limit"])

    def reshape(self, bottom: Sequence[Any], top: Sequence[Any]) -> None:
        pass  # done in forward, once the batch is known

    def forward(self, bottom: Sequence[Any], top: Sequence[Any]) -> None:
        arrays = self.next_batch()
        images, rest = arrays[:IMAGES], arrays[IMAGES:]
        height, width = np.max([image.shape[1:] for image in images], axis=0)
        top[0].reshape(IMAGES, 3, int(height), int(width))
        for row, image in zip(top[0].data, images):
            _place(image, row)
        # The inside and the outside weights are the same.
        for blob, array in zip(_all(top)[1:], rest + rest[-1:]):
            blob.reshape(*array.shape)
            blob.data[...] = array


def _all(top: Sequence[Any]) -> Sequence[Any]:
    """Return the blobs of Caffe's vector type, which only supports indices."""
    return [top[position] for position in range(len(top))]


def _place(image: np.ndarray, row: np.ndarray) -> None:
    """Write an image into the top left corner of a larger one, and 0 elsewhere."""
    height, width = image.shape[1:]
    row[:, :height, :width] = image
    row[:, height:] = 0
    row[:, :height, width:] = 0
