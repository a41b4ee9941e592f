"""Draw the batches that Fast R-CNN is trained on (Girshick 2015, section 2.3).

A batch is 2 images and 64 ROIs of each, and a function of (seed, batch number) alone. All numbers
are Fast R-CNN's: up to a quarter of the ROIs overlap an object by 0.5 or more, and the others by
0.1 (the parameter `background_overlap`) up to 0.5. Each epoch shows every image once as it is and
once mirrored, in a random one of several sizes. The objects themselves are ROIs as well. Difficult
objects are ignored.
"""
import os
from typing import Any, Callable, Dict, List, NamedTuple, Sequence, Tuple

import cv2
import numpy as np

from ddinit import files
from detection import boxes
from training.batches import decoded, first_readable
from training.prefetch import Batch
from voc.folders import Voc
from voc.overlap import overlaps

MEAN = np.array([102.9801, 115.9465, 122.7717], np.float32)  # BGR, for all nets
IMAGES = 2  # per batch
ROIS = 64  # per image
FOREGROUND = 16  # most ROIs of an image that show objects
OBJECT_OVERLAP = 0.5  # the lowest overlap of a ROI that shows an object
BACKGROUND_OVERLAP = 0.1  # the lowest overlap of a ROI that is background
BEYOND = 1.0  # pixels by which rounding may make a proposal exceed its image


class RoiTable(NamedTuple):
    """The images of a training set, with the rows of all images one after the other.

    paths           of n image files
    sizes           int64 (n, 2), width and height
    proposals       float32 (m, 4)
    proposal_ends   int64 (n + 1,); image i has the rows [proposal_ends[i], proposal_ends[i + 1])
    objects         float32 (t, 4)
    classes         int64 (t,) of the objects, from 1; 0 is the background
    object_ends     int64 (n + 1,), as proposal_ends
    """
    paths: List[str]
    sizes: np.ndarray
    proposals: np.ndarray
    proposal_ends: np.ndarray
    objects: np.ndarray
    classes: np.ndarray
    object_ends: np.ndarray


class Rois(NamedTuple):
    """The ROIs of an image, each with the object that it overlaps most.

    boxes     float64 (r, 4)
    overlap   (r,), with the object
    truth     (r, 4), box of the object
    classes   (r,), class of the object
    """
    boxes: np.ndarray
    overlap: np.ndarray
    truth: np.ndarray
    classes: np.ndarray


def collect(voc: Voc, images: Sequence[str], proposals: Sequence[np.ndarray]) -> RoiTable:
    """Return the table of a split and its proposals, without images that show no object.

    Raises ValueError naming an image with a proposal outside of it, and where no image is left.
    """
    kept = []
    for image, proposed in zip(images, proposals):
        annotated = voc.objects(image)
        check_inside(proposed, annotated.width, annotated.height, image)
        if not annotated.difficult.all():
            kept.append((voc.image_path(image), annotated, proposed))
    if not kept:
        raise ValueError("%s: none of the %d images has an object that is not difficult"
                         % (voc.root, len(images)))
    paths, objects, candidates = zip(*kept)
    sure = [~annotated.difficult for annotated in objects]
    return RoiTable(
        list(paths), np.array([(item.width, item.height) for item in objects]),
        np.concatenate(candidates).astype(np.float32), _ends(candidates),
        np.concatenate([item.boxes[use] for item, use in zip(objects, sure)]).astype(np.float32),
        np.concatenate([item.classes[use] + 1 for item, use in zip(objects, sure)]),
        _ends([item.boxes[use] for item, use in zip(objects, sure)]))


def check_inside(proposals: np.ndarray, width: int, height: int, image: str) -> None:
    """Raise ValueError where one of the proposals (n, 4) is empty or exceeds its image."""
    wrong = ((proposals[:, :2] < -BEYOND).any(axis=1)
             | (proposals[:, 2] > width - 1 + BEYOND) | (proposals[:, 3] > height - 1 + BEYOND)
             | (proposals[:, 2:] < proposals[:, :2]).any(axis=1)
             | ~np.isfinite(proposals).all(axis=1))
    if wrong.any():
        raise ValueError("Image %s: the proposal (%s), counted from 0, is empty or exceeds the "
                         "image of %d x %d pixels." % (
                             image, ", ".join("%g" % corner for corner in proposals[wrong][0]),
                             width, height))


def rois_of(table: RoiTable, index: int) -> Rois:
    """Return the ROIs of an image: its objects and its proposals."""
    rows = slice(table.object_ends[index], table.object_ends[index + 1])
    objects, classes = table.objects[rows].astype(np.float64), table.classes[rows]
    candidates = table.proposals[table.proposal_ends[index]:table.proposal_ends[index + 1]]
    rois = np.concatenate([objects, candidates.astype(np.float64)])
    shared = overlaps(rois, objects)
    best = shared.argmax(axis=1)
    return Rois(rois, shared.max(axis=1), objects[best], classes[best])


def target_statistics(table: RoiTable, classes: int) -> Tuple[np.ndarray, np.ndarray]:
    """Return means and standard deviations (classes + 1, 4) of the regression targets by class.

    They are over all ROIs that show an object of the class, and over their mirror images, in which
    the first target changes its sign. Without such ROIs they are 0 and 1.
    """
    counts = np.zeros((classes + 1, 1))
    sums, squares = np.zeros((classes + 1, 4)), np.zeros((classes + 1, 4))
    for index in range(len(table.paths)):
        rois = rois_of(table, index)
        shown = rois.overlap >= OBJECT_OVERLAP
        wanted = boxes.targets(rois.boxes[shown], rois.truth[shown])
        np.add.at(counts, rois.classes[shown], 1)
        np.add.at(sums, rois.classes[shown], wanted * [0, 1, 1, 1])
        np.add.at(squares, rois.classes[shown], wanted ** 2)
    means = sums / np.maximum(counts, 1)
    deviations = np.sqrt(np.maximum(squares / np.maximum(counts, 1) - means ** 2, 0))
    return means, np.where(deviations > 1e-6, deviations, 1.0)


def save_table(table: RoiTable, folder: str) -> None:
    """Write a table into a folder, from which processes share it by `open_table`."""
    os.makedirs(folder, exist_ok=True)
    for name, value in table._asdict().items():
        path = os.path.join(folder, name + ".npy")
        with files.replacing(path) as temporary, open(temporary, "wb") as file:
            np.save(file, np.asarray(value))


def open_table(folder: str) -> RoiTable:
    """Return a saved table, whose rows are read when they are used."""
    columns = {name: np.load(os.path.join(folder, name + ".npy"), mmap_mode="r")
               for name in RoiTable._fields}
    return RoiTable(**{**columns, "paths": columns["paths"].tolist()})


def _ends(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum([len(part) for part in parts])]).astype(np.int64)


def read_image(path: str, width: int, height: int) -> np.ndarray:
    """Return an image, uint8 BGR (height, width, 3), which has to have the annotated size.

    Raises ValueError naming a file that cannot be read or has another size.
    """
    try:
        with open(path, "rb") as file:
            image = decoded(file.read(), path)
    except OSError as error:
        raise ValueError("%s: cannot read the image (%s)" % (path, error.strerror)) from error
    if image.shape[:2] != (height, width):
        raise ValueError("%s: the image has %d x %d pixels, but its annotation says %d x %d"
                         % (path, image.shape[1], image.shape[0], width, height))
    return image


def scale_of(width: int, height: int, shortest: int, longest: int) -> float:
    """Return the factor that makes the shorter side of an image `shortest` pixels long.

    It is less where the longer side would exceed `longest` pixels.
    """
    return min(shortest / min(width, height), longest / max(width, height))


def scaled_size(width: int, height: int, scale: float) -> Tuple[int, int]:
    """Return width and height of an image scaled by `scale`."""
    return max(round(width * scale), 1), max(round(height * scale), 1)


def scaled(image: np.ndarray, scale: float) -> np.ndarray:
    """Return (image - MEAN) resized by `scale`, float32 (3, height, width)."""
    height, width = image.shape[:2]
    resized = cv2.resize(image.astype(np.float32) - MEAN, scaled_size(width, height, scale),
                         interpolation=cv2.INTER_LINEAR)
    return np.ascontiguousarray(resized.transpose(2, 0, 1))


def largest_image_bytes(sizes: np.ndarray, scales: Sequence[int], longest: int) -> int:
    """Return the bytes of the largest image that `scaled` makes of sizes (n, 2)."""
    return max(12 * int(np.prod(scaled_size(width, height, scale_of(width, height, shortest,
                                                                      longest))))
               for width, height in np.unique(sizes, axis=0).tolist() for shortest in scales)


class DetectionBatches:
    """Batches of a table as a function of the batch number.

    The arrays of a batch are IMAGES images float32 (3, height, width), and as float32 the ROIs
    (r, 5) in their pixels, labels (r,), regression targets and their weights (r, 4 (classes + 1)),
    with r <= 128. Targets are normalized by the means and deviations of their class. ROIs that
    overlap an object by `background_overlap` up to OBJECT_OVERLAP are background. A broken image is
    replaced by the next one of its epoch, up to `broken_limit` in a row.
    """

    def __init__(self, table: RoiTable, means: np.ndarray, deviations: np.ndarray,
                 scales: Sequence[int], max_size: int, seed: int,
                 background_overlap: float = BACKGROUND_OVERLAP, broken_limit: int = 10) -> None:
        self.table = table
        self.means = np.asarray(means, np.float64)
        self.deviations = np.asarray(deviations, np.float64)
        self.scales = list(scales)
        self.max_size = max_size
        self.seed = seed
        self.background_overlap = background_overlap
        self.broken_limit = broken_limit

    def __call__(self, number: int) -> Batch:
        """Return the batch."""
        broken: List[str] = []
        images, parts = [], []
        for place in range(IMAGES):
            image, rows = self._image(number * IMAGES + place, broken)
            rows[0] = np.hstack([np.full((len(rows[0]), 1), place), rows[0]])
            images.append(image)
            parts.append(rows)
        columns = [np.concatenate(column).astype(np.float32) for column in zip(*parts)]
        return Batch(images + columns, broken)

    def _image(self, position: int, broken: List[str]) -> Tuple[np.ndarray, List[np.ndarray]]:
        """Return the image at a position in the sequence of epochs, and the columns of its ROIs."""
        index, mirror, pixels = self._read(position, broken)
        rng = np.random.default_rng([self.seed, 1, position])
        width, height = self.table.sizes[index].tolist()
        scale = scale_of(width, height, self.scales[rng.integers(len(self.scales))],
                         self.max_size)
        rois = rois_of(self.table, index)
        chosen, labels = self._sample(rois, rng)
        rows, truth = rois.boxes[chosen], rois.truth[chosen]
        if mirror:
            pixels = pixels[:, ::-1]
            rows, truth = boxes.mirrored(rows, width), boxes.mirrored(truth, width)
        wanted, weights = self._targets(rows, truth, labels)
        return scaled(pixels, scale), [rows * scale, labels, wanted, weights]

    def _read(self, position: int, broken: List[str]) -> Tuple[int, bool, np.ndarray]:
        """Return the index of an image, whether it is mirrored, and the image."""
        count = 2 * len(self.table.paths)
        epoch, place = divmod(position, count)
        order = np.random.default_rng([self.seed, 0, epoch]).permutation(count)
        places = np.arange(place, place + min(self.broken_limit + 1, count))
        number, pixels = first_readable(self._image_of, order.take(places, mode="wrap"), broken)
        return number // 2, bool(number % 2), pixels

    def _image_of(self, number: int) -> np.ndarray:
        """Return an image; each has two numbers in an epoch, for itself and its mirror image."""
        width, height = self.table.sizes[number // 2].tolist()
        return read_image(self.table.paths[number // 2], width, height)

    def _sample(self, rois: Rois, rng: np.random.Generator) -> Tuple[np.ndarray, np.ndarray]:
        """Return the indices of at most ROIS ROIs, objects first, and labels (0: background)."""
        shown = np.flatnonzero(rois.overlap >= OBJECT_OVERLAP)
        near = np.flatnonzero((rois.overlap < OBJECT_OVERLAP)
                              & (rois.overlap >= self.background_overlap))
        shown = rng.choice(shown, min(FOREGROUND, len(shown)), replace=False)
        near = rng.choice(near, min(ROIS - len(shown), len(near)), replace=False)
        labels = np.concatenate([rois.classes[shown], np.zeros(len(near), np.int64)])
        return np.concatenate([shown, near]), labels

    def _targets(self, rows: np.ndarray, truth: np.ndarray,
                 labels: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
        """Return targets and weights (r, 4 (classes + 1)), which are 0 but for the class of a ROI.
        """
        wanted = np.zeros((len(rows), len(self.means), 4))
        weights = np.zeros_like(wanted)
        shown = np.flatnonzero(labels)
        classes = labels[shown]
        wanted[shown, classes] = (boxes.targets(rows[shown], truth[shown])
                                  - self.means[classes]) / self.deviations[classes]
        weights[shown, classes] = 1
        return wanted.reshape(len(rows), -1), weights.reshape(len(rows), -1)


def layer_parameters(folder: str, table: RoiTable, means: np.ndarray, deviations: np.ndarray,
                     scales: Sequence[int], max_size: int, seed: int, workers: int,
                     background_overlap: float = BACKGROUND_OVERLAP) -> Dict[str, Any]:
    """Return the parameters of roi_data.RoiData for a table that is saved in `folder`."""
    return {"folder": os.path.abspath(folder), "means": means.tolist(),
            "deviations": deviations.tolist(), "scales": list(scales), "max_size": max_size,
            "seed": seed, "workers": workers, "background_overlap": background_overlap,
            "broken_limit": 10,
            "image_bytes": largest_image_bytes(table.sizes, scales, max_size)}


def make_training_batches(folder: str, means: Sequence, deviations: Sequence,
                          scales: Sequence[int], max_size: int, seed: int,
                          background_overlap: float, broken_limit: int) -> DetectionBatches:
    """Return the batches of a saved table; called in workers."""
    cv2.setNumThreads(1)  # the cores belong to Caffe and the other workers
    return DetectionBatches(open_table(folder), np.asarray(means), np.asarray(deviations), scales,
                            max_size, seed, background_overlap, broken_limit)


def make_testing_images(paths: Sequence[str], sizes: Sequence[Tuple[int, int]], shortest: int,
                        longest: int) -> Callable[[int], Batch]:
    """Return the function from an image's number to the scaled image; called in workers."""
    cv2.setNumThreads(1)

    def image_of(number: int) -> Batch:
        if number >= len(paths):  # asked for ahead, but never used
            return Batch([], [])
        width, height = sizes[number]
        image = read_image(paths[number], width, height)
        return Batch([scaled(image, scale_of(width, height, shortest, longest))], [])
    return image_of
