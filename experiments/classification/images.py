"""Read the images of PASCAL VOC for classification, to train on and to score."""
from typing import Any, Dict

import cv2
import numpy as np

from training.batches import Crops, decoded, named_dataset, random_crop
from training.prefetch import Batch
from voc.databases import open_voc

IGNORED = -1.0  # the label of a class of which an image shows only difficult objects


class VocImages:
    """A split of a VOC folder or of its LMDB.

    `labels` (n, classes) are 1, 0, or IGNORED where only difficult objects show the class.
    """

    def __init__(self, root: str, split: str) -> None:
        self._root = root
        self._voc = open_voc(root)
        self._ids = self._voc.images(split)
        self.classes = self._voc.classes
        flags = self._voc.labels(split)
        self.labels = np.select([flags == 1, flags == -1], [1.0, 0.0], IGNORED).astype(np.float32)

    def name(self, index: int) -> str:
        return "image %s of %s" % (self._ids[index], self._root)

    def read(self, index: int) -> np.ndarray:
        return decoded(self._voc.read_bytes(self._ids[index]), self.name(index))


class CropsToScore:
    """Random crops of each image in turn, whose scores are averaged: a batch for each image.

    The batch of a broken image is empty.
    """

    def __init__(self, dataset: Any, crops: Crops, count: int, seed: int) -> None:
        self.dataset = dataset
        self.crops = crops
        self.count = count
        self.seed = seed

    def __call__(self, number: int) -> Batch:
        """Return the crops (count, channels, height, width) of image `number`."""
        try:
            image = self.dataset.read(number)
        except ValueError as error:
            return Batch([np.empty(0, np.float32)], [str(error)])
        rng = np.random.default_rng([self.seed, 2, number])
        return Batch([np.stack([random_crop(image, self.crops, rng)
                                for _ in range(self.count)])], [])


def make_crops_to_score(dataset: str, arguments: Dict[str, Any], crops: Crops, count: int,
                        seed: int) -> CropsToScore:
    """Return the crops of a data set's images; called in workers."""
    cv2.setNumThreads(1)
    return CropsToScore(named_dataset(dataset, arguments), crops, count, seed)
