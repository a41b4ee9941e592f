"""Small images with labels from an .npz file, for study.py and small_curves.py.

    PYTHONPATH=experiments python -c "import study_data; \\
        print(study_data.read('cifar10_mini.npz').train_images.shape)"
"""
import argparse
import os
from typing import NamedTuple, Tuple

import cv2
import numpy as np

from ddinit.argument_types import count

ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")
SPLIT_SEED = 0  # the split is the same for all trials: it is part of the data


class Data(NamedTuple):
    """Images uint8 (n, height, width, 3) in RGB and their labels (n,), 0 to classes - 1."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray

    @property
    def classes(self) -> int:
        """One more than the largest label."""
        return int(max(self.train_labels.max(), self.test_labels.max())) + 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --data, --out and --jobs, which all experiments on such images have."""
    parser.add_argument("--data", metavar="FILE.npz", required=True,
                        help="train_images and test_images, uint8 (n, height, width, 3) in RGB; "
                             "train_labels and test_labels (n), from 0")
    parser.add_argument("--out", metavar="DIR", required=True, help="folder for the results")
    parser.add_argument("--jobs", metavar="N", type=count, default=os.cpu_count(),
                        help="trainings at a time (default: one per core)")


def read(path: str) -> Data:
    """Return the data in a file.  Raises ValueError naming the file and what it lacks."""
    wanted = "what is needed is an .npz with %s, images uint8 (n, height, width, 3) in RGB, " \
             "labels from 0" % ", ".join(ARRAYS)
    if not os.path.isfile(path):
        raise ValueError("%s: no such file: %s" % (path, wanted))
    try:
        with np.load(path) as file:
            data = Data(*[file[name] for name in ARRAYS])
    except (OSError, KeyError, ValueError) as error:
        raise ValueError("%s: %s: %s" % (path, error, wanted)) from error
    for name in ("train", "test"):
        images, labels = getattr(data, name + "_images"), getattr(data, name + "_labels")
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 \
                or not len(images) or images.shape[1:] != data.train_images.shape[1:]:
            raise ValueError("%s: '%s_images' is %s %s: %s"
                             % (path, name, images.dtype, images.shape, wanted))
        if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu" or labels.min() < 0:
            raise ValueError("%s: '%s_labels' is %s %s: %s"
                             % (path, name, labels.dtype, labels.shape, wanted))
    return data


def split(labels: np.ndarray, held_back: int) -> Tuple[np.ndarray, np.ndarray]:
    """Return indices of the images to train on and of `held_back` images to validate on.

    The latter hold equally many of each class, as far as the number allows.  Raises ValueError
    where a class would have none left to train on.
    """
    rng = np.random.default_rng(SPLIT_SEED)
    classes = np.unique(labels)
    chosen = []
    for place, label in enumerate(classes):
        of_class = np.flatnonzero(labels == label)
        share = held_back * (place + 1) // len(classes) - held_back * place // len(classes)
        if share >= len(of_class):
            raise ValueError("%d validation images leave none of class %d to train on: it has %d"
                             % (held_back, label, len(of_class)))
        chosen.append(rng.permutation(of_class)[:share])
    validation = np.sort(np.concatenate(chosen))
    return np.setdiff1d(np.arange(len(labels)), validation), validation


def lay_out(data: Data, held_back: int, pad: int, folder: str) -> None:
    """Write train.npz, validation.npz, test.npz and images/ below `folder`, in BGR.

    train.npz holds the images with `pad` more pixels on every side, repeated from their borders;
    images/ are the same images as files, as they are.
    """
    train, validation = split(data.train_labels, held_back)
    bgr = data.train_images[..., ::-1]
    padded = np.pad(bgr[train], [(0, 0), (pad, pad), (pad, pad), (0, 0)], mode="edge")
    parts = {"train": (padded, data.train_labels[train]),
             "validation": (bgr[validation], data.train_labels[validation]),
             "test": (data.test_images[..., ::-1], data.test_labels)}
    os.makedirs(os.path.join(folder, "images"), exist_ok=True)
    for name, (images, labels) in parts.items():
        np.savez(os.path.join(folder, name + ".npz"), images=np.ascontiguousarray(images),
                 labels=labels)
    for number in train:
        cv2.imwrite(os.path.join(folder, "images", "%06d.png" % number), bgr[number])
