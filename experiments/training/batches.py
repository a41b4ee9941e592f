"""Draw training batches: which images each holds, and a random crop of every one (section 4.1).

A batch is a function of (seed, batch number) alone. The images come in a new random order in each
epoch. As in the author's released evaluation, a crop of c x c pixels shows a square of s * c source
pixels, with s uniform in [0.5, 2] as far as the image is large enough, at a uniformly random place,
mirrored half of the time and interpolated linearly.

A data set is an object with `labels` (n, ...) float32, `name(index)` and `read(index)`, which
returns a uint8 image (height, width, channels) or raises ValueError where the image is broken.
"""
import importlib
from typing import Any, Callable, Dict, List, NamedTuple, Sequence, Tuple

import cv2
import numpy as np

from training.prefetch import Batch

MEAN = (104.0, 117.0, 123.0)  # BGR, as the reference nets subtract it


class Crops(NamedTuple):
    """How crops are taken.

    height, width          size of a crop in pixels
    min_scale, max_scale   source pixels per pixel of the crop
    mirror                 whether half of the crops are mirrored
    mean, factor           a crop is (image - mean) * factor; the mean is BGR, or one value for
                           images with one channel
    """
    height: int
    width: int
    min_scale: float = 0.5
    max_scale: float = 2.0
    mirror: bool = True
    mean: Sequence[float] = MEAN
    factor: float = 1.0


def named_dataset(name: str, arguments: Dict[str, Any]) -> Any:
    """Return the data set `module.Class` made from its arguments.

    The definition of a net and the worker processes know a data set by its name.
    """
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)(**arguments)


def decoded(encoded: bytes, name: str) -> np.ndarray:
    """Return an encoded image as uint8 BGR (height, width, 3).

    Raises ValueError with `name` where OpenCV cannot decode it.
    """
    image = None
    if encoded:
        image = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR)
    if image is None:
        raise ValueError("%s is not an image that OpenCV can read" % name)
    return image


def random_crop(image: np.ndarray, crops: Crops, rng: np.random.Generator) -> np.ndarray:
    """Return a random crop of a uint8 image (h, w, channels) as float32 (channels, height, width).

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
    """Return where a crop starts: on a whole pixel where the crop is not scaled."""
    return float(rng.integers(0, int(room) + 1)) if scale == 1.0 else rng.uniform(0, room)


def prepared(image: np.ndarray, crops: Crops) -> np.ndarray:
    """Return a uint8 image (height, width[, channels]) as float32 (image - mean) * factor.

    Channels come first. Raises ValueError where their number is not that of the mean's.
    """
    planes = cv2.split(image)
    if len(planes) != len(crops.mean):
        raise ValueError("The image has %d channels, but the mean has %d."
                         % (len(planes), len(crops.mean)))
    blob = np.empty((len(planes),) + image.shape[:2], np.float32)
    for plane, mean, row in zip(planes, crops.mean, blob):
        np.subtract(plane, np.float32(mean), out=row)
    if crops.factor != 1.0:
        blob *= np.float32(crops.factor)
    return blob


def first_readable(read: Callable[[int], Any], order: np.ndarray,
                   broken: List[str]) -> Tuple[int, Any]:
    """Return the first index in `order` that can be read, and what `read` returns for it.

    `broken` receives the messages of the others. Raises ValueError where all are broken.
    """
    for index in order:
        try:
            return int(index), read(int(index))
        except ValueError as error:
            broken.append(str(error))
    raise ValueError("%d images in a row are broken; the last is %s" % (len(order), broken[-1]))


class ImageBatches:
    """Batches of random crops and labels as a function of the batch number.

    A broken image is replaced by the next one of its epoch, up to `broken_limit` in a row.
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
        """Return images (batch_size, channels, height, width) and labels (batch_size, ...)."""
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
        epoch, place = divmod(position, len(self.dataset.labels))
        order = self._epoch_order(epoch, len(self.dataset.labels))
        places = np.arange(place, place + min(self.broken_limit + 1, len(order)))
        return first_readable(self.dataset.read, order.take(places, mode="wrap"), broken)

    def _epoch_order(self, epoch: int, count: int) -> np.ndarray:
        if self._epoch != epoch:
            rng = np.random.default_rng([self.seed, 0, epoch])
            self._epoch, self._order = epoch, rng.permutation(count)
        return self._order


def make_batches(dataset: str, arguments: Dict[str, Any], crops: Dict[str, Any], batch_size: int,
                 seed: int, broken_limit: int) -> ImageBatches:
    """Return the batches that the parameters of an image source describe; called in workers."""
    cv2.setNumThreads(1)  # the cores belong to Caffe and the other workers
    return ImageBatches(named_dataset(dataset, arguments), Crops(**crops), batch_size, seed,
                        broken_limit)
