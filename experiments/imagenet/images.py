"""Read labeled images for training and validation, from an LMDB or from an .npz file.

Caffe's own Data layer reads such a database from its first record, with random crops that nothing
can seed, so that a resumed run would see other data. Here an image is read by its number, so that a
batch is a function of (seed, batch). A disk that is slow at random reads needs a database that fits
into memory: `make_lmdb.py --encoded`.
"""
import os
from typing import Callable

import cv2
import numpy as np

from training.batches import Crops, named_dataset, prepared
from training.prefetch import Batch


def dataset_of(path: str) -> str:
    """Return the name of the class that reads `path`, for `batches.named_dataset`."""
    return "imagenet.databases.LmdbImages" if os.path.isdir(path) else "imagenet.arrays.ArrayImages"


def make_central_batches(path: str, classes: int, crops: Crops,
                         batch_size: int) -> Callable[[int], Batch]:
    """Return the function from a batch number to central crops and labels; called in workers.

    The arrays are (m, channels, height, width) and (m,) with m <= batch_size. After the last batch
    the first one follows.
    """
    cv2.setNumThreads(1)
    images = named_dataset(dataset_of(path), {"path": path, "classes": classes})
    count = batches_of(len(images.labels), batch_size)

    def batch_of(number: int) -> Batch:
        first = number % count * batch_size
        indices = range(first, min(first + batch_size, len(images.labels)))
        pixels = [central_crop(images.read(index), crops) for index in indices]
        return Batch([np.stack(pixels), np.array([images.labels[index] for index in indices])], [])

    return batch_of


def batches_of(images: int, batch_size: int) -> int:
    """Return the number of batches of `images` images."""
    return -(-images // batch_size)


def central_crop(image: np.ndarray, crops: Crops) -> np.ndarray:
    """Return the center of an image (h, w, channels) as float32 (channels, height, width).

    Where the border is odd, the crop is half a pixel up and to the left, as Caffe's is.
    Raises ValueError where the image is smaller.
    """
    height, width = image.shape[:2]
    top, left = (height - crops.height) // 2, (width - crops.width) // 2
    if top < 0 or left < 0:
        raise ValueError("An image of %d x %d pixels is smaller than the net's input of %d x %d. "
                         "Make the database with a larger --resize."
                         % (height, width, crops.height, crops.width))
    return prepared(image[top:top + crops.height, left:left + crops.width], crops)
