"""Which images a training batch holds, and the random crops of them (paper, section 4.1).

A batch is a function of (seed, batch number) alone: images come in a new random order each epoch,
each as one random crop.  As in the author's released evaluation, a crop of c x c pixels shows a
square of s * c source pixels, s uniform in [0.5, 2] as far as the image is large enough, at a
uniformly random place, mirrored half of the time, interpolated linearly.

Data sets are objects with `labels` (n, ...) float32, `name(index)` and `read(index)`, which
returns an uint8 image (height, width, channels) or raises ValueError where it is broken.

    batch = ImageBatches(VocImages("VOCdevkit/VOC2007", "trainval"), Crops(227, 227), 10, 0)(0)

    PYTHONPATH=experiments python -c "import image_batches as i; \\
        print(i.VocImages('datasets/VOCdevkit/VOC2007', 'trainval').labels.shape)"
"""
import importlib
import os
from typing import Any, Dict, List, NamedTuple, Sequence, Tuple

import cv2
import numpy as np

from prefetch import Batch
from voc_lmdb import open_voc

IGNORED = -1.0  # the label of a class of which an image shows only difficult objects
MEAN = (104.0, 117.0, 123.0)  # BGR, as the reference nets subtract it


class Crops(NamedTuple):
    """How crops are taken: size in pixels; scales in source pixels per pixel of the crop;
    (image - mean) * factor, with the mean in BGR, or one value for images with one channel."""
    height: int
    width: int
    min_scale: float = 0.5
    max_scale: float = 2.0
    mirror: bool = True
    mean: Sequence[float] = MEAN
    factor: float = 1.0


# ---------------------------------------------------------------------------------------------
# Data sets
# ---------------------------------------------------------------------------------------------

class VocImages:
    """A split of a VOC folder or its LMDB; labels (n, classes) are 1, 0, or IGNORED where only
    difficult objects show the class."""

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


class ListedImages:
    """Image files and integer labels from a text file with lines `path label`, as Caffe's tools
    have them; paths are relative to `root`."""

    def __init__(self, path: str, root: str = "") -> None:
        self._root = root
        self._paths: List[str] = []
        labels = []
        try:
            with open(path, encoding="utf-8") as file:
                lines = [line.strip() for line in file if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError("%s: cannot read the list of images (%s)" % (path, error)) from error
        for number, line in enumerate(lines, 1):
            name, _, label = line.rpartition(" ")
            if not name or not label.isdigit():
                raise ValueError("%s: line %d is '%s', not a path and a label"
                                 % (path, number, line))
            self._paths.append(name.strip())
            labels.append(float(label))
        if not lines:
            raise ValueError("%s: lists no image" % path)
        self.labels = np.array(labels, np.float32)

    def name(self, index: int) -> str:
        return os.path.join(self._root, self._paths[index])

    def read(self, index: int) -> np.ndarray:
        path = self.name(index)
        try:
            with open(path, "rb") as file:
                encoded = file.read()
        except OSError as error:
            raise ValueError("%s: cannot read it (%s)" % (path, error.strerror)) from error
        return decoded(encoded, path)


class ArrayImages:
    """Images in an .npz file: uint8 (n, height, width, channels), and their labels (n, ...)."""

    def __init__(self, path: str, images: str, labels: str) -> None:
        try:
            with np.load(path) as arrays:
                self._images = arrays[images]
                self.labels = arrays[labels].astype(np.float32)
        except (OSError, KeyError, ValueError) as error:
            raise ValueError("%s: no arrays '%s' and '%s' in it (%s)"
                             % (path, images, labels, error)) from error
        if self._images.dtype != np.uint8 or self._images.ndim != 4:
            raise ValueError("%s: '%s' is %s %s, not uint8 (n, height, width, channels)"
                             % (path, images, self._images.dtype, self._images.shape))
        if not len(self._images) or len(self._images) != len(self.labels):
            raise ValueError("%s: %d images and %d labels"
                             % (path, len(self._images), len(self.labels)))

    def name(self, index: int) -> str:
        return "image %d" % index

    def read(self, index: int) -> np.ndarray:
        return self._images[index]


def decoded(encoded: bytes, name: str) -> np.ndarray:
    """Return an encoded image as uint8 BGR (height, width, 3).

    Raises ValueError with `name` where OpenCV cannot decode it.
    """
    image = None
    if encoded:
        image = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR)
    if image is None:
        raise ValueError("%s is not one that OpenCV can read" % name)
    return image


def named_dataset(name: str, arguments: Dict[str, Any]) -> Any:
    """Return the data set `module.Class` made from its arguments.

    A name, because a net's definition and worker processes have to know it.
    """
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)(**arguments)


# ---------------------------------------------------------------------------------------------
# Crops and batches
# ---------------------------------------------------------------------------------------------

def random_crop(image: np.ndarray, crops: Crops, rng: np.random.Generator) -> np.ndarray:
    """Return a random crop of an uint8 image (h, w, channels) as float32 (channels, height, width).

    An image smaller than the crop at `min_scale` is shown at the scale at which it fits.
    """
    height, width = image.shape[:2]
    largest = min(crops.max_scale, height / crops.height, width / crops.width)
    scale = rng.uniform(min(crops.min_scale, largest), largest)
    left = _place(width - scale * crops.width, scale, rng)
    top = _place(height - scale * crops.height, scale, rng)
    mirrored = crops.mirror and rng.random() < 0.5
    # Pixel x of the crop shows source position left + scale * (x + 1/2) - 1/2.
    across, start = scale, left + (scale - 1) / 2
    if mirrored:
        across, start = -scale, left + scale * (crops.width - 0.5) - 0.5
    matrix = np.array([[across, 0, start], [0, scale, top + (scale - 1) / 2]])
    shown = cv2.warpAffine(image, matrix, (crops.width, crops.height),
                           flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
                           borderMode=cv2.BORDER_REPLICATE)
    return prepared(shown, crops)


def _place(room: float, scale: float, rng: np.random.Generator) -> float:
    """Where a crop starts, in pixels: on whole pixels where they are not scaled."""
    return float(rng.integers(0, int(room) + 1)) if scale == 1.0 else rng.uniform(0, room)


def prepared(image: np.ndarray, crops: Crops) -> np.ndarray:
    """Return an uint8 image (height, width[, channels]) as float32 (image - mean) * factor,
    channels first.

    Raises ValueError where it has not as many channels as the mean.
    """
    planes = cv2.split(image)
    if len(planes) != len(crops.mean):
        raise ValueError("an image with %d channels, the mean has %d"
                         % (len(planes), len(crops.mean)))
    blob = np.empty((len(planes),) + image.shape[:2], np.float32)
    for plane, mean, row in zip(planes, crops.mean, blob):
        np.subtract(plane, np.float32(mean), out=row)
    if crops.factor != 1.0:
        blob *= np.float32(crops.factor)
    return blob


class ImageBatches:
    """Batches of random crops and labels as a function of the batch number.

    A broken image is replaced by the next one of its epoch's order, up to `broken_limit` in a row.
    """

    def __init__(self, dataset: Any, crops: Crops, batch_size: int, seed: int,
                 broken_limit: int = 10) -> None:
        self.dataset = dataset
        self.crops = crops
        self.batch_size = batch_size
        self.seed = seed
        self.broken_limit = broken_limit
        self._epoch = -1
        self._order = np.empty(0, np.int64)

    def __call__(self, number: int) -> Batch:
        """Return the batch: images (batch_size, channels, height, width), labels (batch_size, ...)
        """
        images = np.empty((self.batch_size, len(self.crops.mean), self.crops.height,
                           self.crops.width), np.float32)
        labels = np.empty((self.batch_size, *self.dataset.labels.shape[1:]), np.float32)
        broken: List[str] = []
        for place in range(self.batch_size):
            position = number * self.batch_size + place
            index, image = self._read(position, broken)
            rng = np.random.default_rng([self.seed, 1, position])
            images[place] = random_crop(image, self.crops, rng)
            labels[place] = self.dataset.labels[index]
        return Batch([images, labels], broken)

    def _read(self, position: int, broken: List[str]) -> Tuple[int, np.ndarray]:
        count = len(self.dataset.labels)
        epoch, place = divmod(position, count)
        order = self._epoch_order(epoch, count)
        for step in range(min(self.broken_limit + 1, count)):
            index = int(order[(place + step) % count])
            try:
                return index, self.dataset.read(index)
            except ValueError as error:
                broken.append(str(error))
        raise ValueError("%d broken images in a row, the last is %s" % (len(broken), broken[-1]))

    def _epoch_order(self, epoch: int, count: int) -> np.ndarray:
        if self._epoch != epoch:
            rng = np.random.default_rng([self.seed, 0, epoch])
            self._epoch, self._order = epoch, rng.permutation(count)
        return self._order


def make_batches(dataset: str, arguments: Dict[str, Any], crops: Dict[str, Any], batch_size: int,
                 seed: int, broken_limit: int) -> ImageBatches:
    """Return the batches that an image source's parameters describe; called in every worker."""
    cv2.setNumThreads(1)  # the cores belong to Caffe and the other workers
    return ImageBatches(named_dataset(dataset, arguments), Crops(**crops), batch_size, seed,
                        broken_limit)


class CropsToScore:
    """Random crops of each image in turn, to average scores over: image `number`'s as a batch.

    The batch of a broken image is empty.
    """

    def __init__(self, dataset: Any, crops: Crops, count: int, seed: int) -> None:
        self.dataset = dataset
        self.crops = crops
        self.count = count
        self.seed = seed

    def __call__(self, number: int) -> Batch:
        """Return the batch: crops (count, channels, height, width)."""
        try:
            image = self.dataset.read(number)
        except ValueError as error:
            return Batch([np.empty(0, np.float32)], [str(error)])
        rng = np.random.default_rng([self.seed, 2, number])
        return Batch([np.stack([random_crop(image, self.crops, rng)
                                for _ in range(self.count)])], [])


def make_crops_to_score(dataset: str, arguments: Dict[str, Any], crops: Crops, count: int,
                    seed: int) -> CropsToScore:
    """Return the crops of a data set's images; called in every worker."""
    cv2.setNumThreads(1)
    return CropsToScore(named_dataset(dataset, arguments), crops, count, seed)
