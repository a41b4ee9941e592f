"""Read small images with labels from an .npz file, and lay them out for training."""
import argparse
import os
from typing import NamedTuple, Tuple

import cv2
import numpy as np

from ddinit import results
from ddinit.argument_types import count
from training.run_folder import sha256

ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")
SPLIT_SEED = 0  # the split is part of the data: all trials have the same


class Data(NamedTuple):
    """Images uint8 (n, height, width, 3) in RGB, and their labels (n,) from 0."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray

    @property
    def classes(self) -> int:
        """The number of classes: one more than the largest label."""
        return int(max(self.train_labels.max(), self.test_labels.max())) + 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --data, --out and --jobs."""
    parser.add_argument("--data", metavar="FILE.npz", required=True,
                        help="train_images and test_images, uint8 (n, height, width, 3) in RGB; "
                             "train_labels and test_labels (n), from 0")
    parser.add_argument("--out", metavar="DIR", required=True, help="folder for the results")
    parser.add_argument("--jobs", metavar="N", type=count, default=os.cpu_count(),
                        help="commands that run at a time (default: one per core)")


def read(path: str) -> Data:
    """Return the data in a file. Raises ValueError naming the file and what is wrong with it."""
    wanted = "The file has to hold %s, with images uint8 (n, height, width, 3) in RGB and labels " \
             "from 0." % ", ".join(ARRAYS)
    if not os.path.isfile(path):
        raise ValueError("%s: the file does not exist. %s" % (path, wanted))
    try:
        with np.load(path) as file:
            data = Data(*[file[name] for name in ARRAYS])
    except (OSError, KeyError, ValueError) as error:
        raise ValueError("%s: %s. %s" % (path, error, wanted)) from error
    for name in ("train", "test"):
        images, labels = getattr(data, name + "_images"), getattr(data, name + "_labels")
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 \
                or not len(images) or images.shape[1:] != data.train_images.shape[1:]:
            raise ValueError("%s: '%s_images' is %s %s. %s"
                             % (path, name, images.dtype, images.shape, wanted))
        if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu" or labels.min() < 0:
            raise ValueError("%s: '%s_labels' is %s %s. %s"
                             % (path, name, labels.dtype, labels.shape, wanted))
    return data


def split(labels: np.ndarray, held_back: int) -> Tuple[np.ndarray, np.ndarray]:
    """Return the indices of the images to train on, and of `held_back` images to validate on.

    The latter have as many images of each class as the number allows. Raises ValueError where a
    class would have no image left to train on.
    """
    rng = np.random.default_rng(SPLIT_SEED)
    classes = np.unique(labels)
    chosen = []
    for place, label in enumerate(classes):
        of_class = np.flatnonzero(labels == label)
        share = held_back * (place + 1) // len(classes) - held_back * place // len(classes)
        if share >= len(of_class):
            raise ValueError("%d validation images leave no image of class %d to train on, which "
                             "has only %d." % (held_back, label, len(of_class)))
        chosen.append(rng.permutation(of_class)[:share])
    validation = np.sort(np.concatenate(chosen))
    return np.setdiff1d(np.arange(len(labels)), validation), validation


def lay_out(data: Data, held_back: int, pad: int, folder: str) -> None:
    """Write train.npz, validation.npz, test.npz and images/ into `folder`, in BGR.

    validation.npz holds `held_back` of the training images, or the test images where that is 0.
    train.npz holds the others with `pad` more pixels on each side, which repeat their borders;
    images/ holds them as files without these.
    """
    bgr = data.train_images[..., ::-1]
    test = (data.test_images[..., ::-1], data.test_labels)
    train, validation = np.arange(len(bgr)), np.arange(0)
    if held_back:
        train, validation = split(data.train_labels, held_back)
    padded = np.pad(bgr[train], [(0, 0), (pad, pad), (pad, pad), (0, 0)], mode="edge")
    parts = {"train": (padded, data.train_labels[train]), "test": test,
             "validation": (bgr[validation], data.train_labels[validation]) if held_back else test}
    os.makedirs(os.path.join(folder, "images"), exist_ok=True)
    for name, (images, labels) in parts.items():
        np.savez(os.path.join(folder, name + ".npz"), images=np.ascontiguousarray(images),
                 labels=labels)
    for number in train:
        cv2.imwrite(os.path.join(folder, "images", "%06d.png" % number), bgr[number])


def prepare(path: str, held_back: int, pad: int, folder: str, side: int) -> Data:
    """Return the data in a file, laid out in `folder` unless it is there already.

    Raises ValueError where the images are not `side` x `side` pixels, or the folder has others.
    """
    data = read(path)
    height, width = data.train_images.shape[1:3]
    if (height, width) != (side, side):
        raise ValueError("%s: the images have %d x %d pixels, but the net takes %d x %d"
                         % (path, height, width, side, side))
    record = {"sha256": sha256(path), "validation_images": held_back, "pad": pad}
    done = os.path.join(folder, "data.json")
    if not os.path.exists(done):
        lay_out(data, held_back, pad, folder)
        results.write_json(done, record)
    if results.read_json(done) != record:
        raise ValueError("%s: the folder is for other images or settings. Use another folder."
                         % folder)
    return data
