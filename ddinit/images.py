"""Feed images to a net: from files, from an array, or from the net's own data layers."""
import concurrent.futures
import glob
import logging
import os
from typing import Any, Dict, List, Sequence, Tuple, Union

import cv2
import numpy as np

from ddinit.files import read_text
from ddinit.prototxt import Input, caffe_messages

log = logging.getLogger("magic_init")

GREY = (0.114, 0.587, 0.299)  # of blue, green and red
LISTS = (".txt", ".lst", ".list")


def find_images(wanted: Union[str, "os.PathLike[str]", Sequence[Any]]) -> List[str]:
    """Return the files that a pattern, a folder, a list file or several of these stand for.

    A list file (.txt) has an image a line, perhaps with a label behind it, relative to where the
    command runs or to the list's own folder.
    Raises ValueError naming what has no images.
    """
    if isinstance(wanted, os.PathLike):
        wanted = os.fspath(wanted)
    if not isinstance(wanted, str):
        if not len(wanted):
            raise ValueError("the list of images is empty")
        return [path for pattern in wanted for path in find_images(pattern)]
    if os.path.isfile(wanted):
        return _listed(wanted) if wanted.endswith(LISTS) else [wanted]
    pattern = os.path.join(glob.escape(wanted), "*") if os.path.isdir(wanted) else wanted
    paths = sorted(path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path))
    if not paths:
        raise ValueError("%s: no images there" % pattern)
    return paths


def _listed(path: str) -> List[str]:
    """Return the images that a list file names."""
    folder = os.path.dirname(path)
    paths = []
    for line in filter(None, map(str.strip, read_text(path).splitlines())):
        names = [line] + line.rsplit(None, 1)[:1]  # without a label behind it
        places = [os.path.join(start, name) for name in names for start in ("", folder)]
        there = next((place for place in places if os.path.isfile(place)), None)
        if there is None:
            raise ValueError("%s: its image %s is not there" % (path, line))
        paths.append(there)
    if not paths:
        raise ValueError("%s: the list names no images" % path)
    return paths


def read_image(path: str, height: int, width: int, grey: bool = False) -> np.ndarray:
    """Return an image as uint8 (channels, height, width), BGR or one grey channel.

    An image whose file is cut short is read as far as it goes, with a warning.
    Raises ValueError naming the file where OpenCV cannot decode it.
    """
    with open(path, "rb") as file:
        content = file.read()
    cut = is_cut_short(content)
    if cut:  # OpenCV decodes no JPEG in memory that has no end
        content += b"\xff\xd9"
    image = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_GRAYSCALE if grey
                         else cv2.IMREAD_COLOR) if content else None
    if image is None:
        raise ValueError("%s: not an image that OpenCV can read" % path)
    if cut:
        log.warning("%s: the image file is cut short, a part of it is missing", path)
    image = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
    return image[None] if grey else np.ascontiguousarray(image.transpose(2, 0, 1))


def is_cut_short(content: bytes) -> bool:
    """Return whether the bytes of a JPEG or PNG file lack their end.

    A JPEG's end marker comes after the start of its last scan, whose data cannot hold either.
    """
    if content.startswith(b"\xff\xd8"):
        return content.rfind(b"\xff\xd9") < content.rfind(b"\xff\xda")
    return content.startswith(b"\x89PNG") and b"IEND" not in content[-64:]


def read_mean(path: str) -> np.ndarray:
    """Return a mean image or color (channels, height, width) from a .npy or .binaryproto file.

    Raises ValueError naming the file where it is neither.
    """
    try:
        if path.endswith(".npy"):
            mean = np.load(path, allow_pickle=False).astype(np.float32)
        else:
            blob = caffe_messages().BlobProto()
            with open(path, "rb") as file:
                blob.ParseFromString(file.read())
            shape = list(blob.shape.dim) or [blob.num, blob.channels, blob.height, blob.width]
            mean = np.array(blob.data, np.float32).reshape(shape)
    except OSError as error:
        raise ValueError("%s: cannot read the mean (%s)" % (path, error.strerror)) from error
    except Exception as error:  # protobuf and numpy raise what they like
        raise ValueError("%s: not a mean image as .npy or .binaryproto" % path) from error
    mean = mean.reshape(mean.shape[-3:]) if mean.shape[:-3] == (1,) else mean
    mean = mean.reshape(-1, 1, 1) if mean.ndim == 1 else mean[None] if mean.ndim == 2 else mean
    if mean.ndim != 3 or len(mean) not in (1, 3):
        raise ValueError("%s: a mean has 1 or 3 channels, this one has the shape %s"
                         % (path, list(mean.shape)))
    return mean


def mean_for(mean: Union[str, float, Sequence[float], np.ndarray],
             shape: Sequence[int]) -> np.ndarray:
    """Return what to subtract from images (channels, height, width) of a net: that broadcasts.

    `mean` is a number, a color in BGR, a mean image (channels, height, width) or the file of one.
    """
    values = read_mean(mean) if isinstance(mean, str) else np.atleast_1d(
        np.asarray(mean, np.float32))
    if values.ndim == 1:
        values = values.reshape(-1, 1, 1)
    if values.ndim != 3:
        raise ValueError("the mean has the shape %s: it is a number, a color or a mean image "
                         "(channels, height, width)" % list(values.shape))
    if values.shape[1:] != (1, 1):
        values = np.stack([cv2.resize(channel, (shape[2], shape[1])) for channel in values])
    if shape[0] == 1 and len(values) == 3:
        values = np.tensordot(GREY, values, 1)[None].astype(np.float32)
    if len(values) not in (1, shape[0]):
        raise ValueError("the mean has %d channels, the net's input %d" % (len(values), shape[0]))
    return values


class ImageBatches:
    """Batches of image files, decoded by threads ahead of their use and kept as bytes.

    `load(batch, net)` puts (image - mean) * scale into the net's input.
    """

    def __init__(self, paths: Sequence[str], image: Input, mean: Any, scale: float) -> None:
        self.size, channels, height, width = image.shape
        self.count = len(paths) // self.size
        self.bytes = len(paths) * channels * height * width
        self._blob = image.blob
        self._mean = mean_for(mean, image.shape[1:])
        self._scale = np.float32(scale)
        pool = concurrent.futures.ThreadPoolExecutor(os.cpu_count())
        self._images = [pool.submit(read_image, path, height, width, channels == 1)
                        for path in paths[:self.count * self.size]]

    def load(self, batch: int, net: Any) -> None:
        """Put a batch into the net."""
        into = net.blobs[self._blob].data
        images = self._images[batch % self.count * self.size:]
        for row, image in zip(into, images):
            np.subtract(image.result(), self._mean, out=row)
        if self._scale != 1:
            into *= self._scale


class HeldBatches:
    """Batches (by blob) that are in memory, such as those that a net's data layers have read."""

    def __init__(self, batches: Sequence[Dict[str, np.ndarray]]) -> None:
        self.count = len(batches)
        self.size = len(next(iter(batches[0].values())))
        self.bytes = sum(blob.nbytes for batch in batches for blob in batch.values())
        self.names = list(batches[0])
        self._batches = list(batches)

    def only(self, names: Sequence[str]) -> "HeldBatches":
        """Return the same batches with no other blobs than `names`."""
        return HeldBatches([{name: batch[name] for name in names} for batch in self._batches])

    def load(self, batch: int, net: Any) -> None:
        """Put a batch into the net."""
        for name, blob in self._batches[batch % self.count].items():
            net.blobs[name].data[...] = blob


def read_batches(net: Any, names: Sequence[str], count: int) -> HeldBatches:
    """Return `count` batches that the data layers `names` of a caffe.Net read."""
    positions = [list(net._layer_names).index(name) for name in names]
    tops = [net._blob_names[top] for position in positions for top in net._top_ids(position)]
    batches = []
    for _ in range(count):
        for position in positions:
            net._forward(position, position)
        batches.append({top: np.array(net.blobs[top].data) for top in tops})
    return HeldBatches(batches)


def batches_of(images: int, batch_size: int, batches: int) -> Tuple[int, int]:
    """Return size and number of batches that use as many images as were asked for and are there.

    >>> batches_of(20, 16, 10)
    (10, 2)
    """
    count = min(batches, -(-images // batch_size))
    return min(batch_size, images // count), count
