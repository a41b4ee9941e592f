"""Compute features of images in batches, and keep them on the disk (figure 2).

A feature is the content of a blob after a forward pass in the TEST phase, as one row of numbers.
The rows of a list of images are in files of some thousand rows, so that they may exceed the memory,
and a run that was killed continues with the file it was at.
"""
import hashlib
import json
import os
import threading
from typing import Any, Callable, List, NamedTuple, Optional, Sequence

import cv2
import numpy as np
from tqdm import tqdm

from ddinit import files, processes
from ddinit.caffemodel import load_weights
from ddinit.images import read_image
from ddinit.net import use_device
from ddinit.prototxt import build_net, image_layers, read_definition, working_definition
from training.batches import MEAN
from training.prefetch import Batch, Prefetcher
from training.run_folder import sha256

PART_ROWS = 4096
BROKEN_PART = 0.01  # of a list; more broken images, and more than ten, are an error


class FeatureNet(NamedTuple):
    """The source of features: a definition, its caffemodel, a blob, and how the net is run."""

    net: str
    weights: str
    layer: str
    batch_size: int = 32
    mean: Sequence[float] = MEAN
    workers: int = 1
    gpu: Optional[int] = None


def cached_features(source: FeatureNet, images: Sequence[str], cache: str) -> List[np.ndarray]:
    """Return the features of images in their order, as memory-mapped parts float32 (rows, d).

    What is not in `cache` is computed. The row of an image that cannot be read is NaN. Raises
    ValueError naming a wrong layer or file, and where too many images are broken.
    """
    folder = os.path.join(cache, _key(source, images))
    os.makedirs(folder, exist_ok=True)
    paths = [os.path.join(folder, "part_%05d.npy" % number)
             for number in range(-(-len(images) // _rows(source)))]
    missing = [number for number, path in enumerate(paths) if not os.path.exists(path)]
    if missing:
        processes.in_child(_compute, source, list(images), paths, missing[0])
    return [np.load(path, mmap_mode="r") for path in paths]


def _rows(source: FeatureNet) -> int:
    """Return the number of rows of a part, which is whole batches."""
    return max(1, PART_ROWS // source.batch_size) * source.batch_size


def _key(source: FeatureNet, images: Sequence[str]) -> str:
    """Return a name from all that features depend on: weights, definition, layer and images."""
    files = []
    for path in images:
        try:
            status = os.stat(path)
        except OSError:  # reported when it is read
            files.append((os.path.abspath(path), 0, 0))
        else:
            files.append((os.path.abspath(path), status.st_size, status.st_mtime_ns))
    text = json.dumps([sha256(source.weights), sha256(source.net), source.layer,
                       list(source.mean), _rows(source), files])
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:20]


def feature_definition(path: str, layer: str, batch_size: int) -> Any:
    """Return the NetParameter in `path`, cut after the blob `layer`, and its image input.

    The blob is as the whole net leaves it, after layers that work in place. Raises ValueError with
    the blobs of the net where `layer` is not one of them.
    """
    layers, image = image_layers(read_definition(path), batch_size)
    assert image is not None  # because batch_size asks for one
    working = working_definition(layers, [image])
    last = [number for number, one in enumerate(working.layer) if layer in one.top]
    if not last or layer == image.blob:
        blobs = dict.fromkeys(top for one in working.layer for top in one.top if top != image.blob)
        raise ValueError("%s: the net has no blob '%s' to take features from. It has %s."
                         % (path, layer, ", ".join(blobs)))
    del working.layer[last[-1] + 1:]
    for one in working.layer:
        one.ClearField("loss_weight")
    return working, image


def _compute(source: FeatureNet, images: Sequence[str], paths: Sequence[str], first: int) -> None:
    """Write the parts from number `first` on."""
    processes.log_to_stderr()
    tqdm.set_lock(threading.RLock())
    use_device(source.gpu)
    definition, image = feature_definition(source.net, source.layer, source.batch_size)
    if image.shape[1] != len(source.mean):
        raise ValueError("%s takes images with %d channels, but the mean has %d values."
                         % (source.net, image.shape[1], len(source.mean)))
    net = build_net(definition)
    absent = load_weights(net, source.weights)
    if absent:
        raise ValueError("%s: the file has no weights for layer '%s' of %s"
                         % (source.weights, absent[0], source.net))
    rows, size = _rows(source), source.batch_size
    batches = Prefetcher(make_batches, (list(images), image.shape, list(source.mean)),
                         source.workers, 4 * int(np.prod(image.shape)) + 8 * size,
                         broken_limit=max(10, int(BROKEN_PART * len(images))))
    batches.start(first * rows // size)
    try:
        with tqdm(total=len(images), initial=first * rows, unit=" images", disable=None) as bar:
            for number in range(first, len(paths)):
                count = min(rows, len(images) - number * rows)
                features = _part(net, image.blob, source.layer, batches, count, bar)
                with files.replacing(paths[number]) as temporary, open(temporary, "wb") as file:
                    np.save(file, features)
    finally:
        batches.close()


def _part(net: Any, data: str, layer: str, batches: Prefetcher, count: int,
          bar: Any) -> np.ndarray:
    """Return the features of the next `count` images, float32 (count, d)."""
    features: List[np.ndarray] = []
    for start in range(0, count, len(net.blobs[data].data)):
        pixels, read = batches.next()
        net.blobs[data].data[...] = pixels
        net.forward()
        blob = np.array(net.blobs[layer].data).reshape(len(pixels), -1)
        blob[~read] = np.nan
        features.append(blob[:count - start])
        bar.update(len(features[-1]))
    return np.concatenate(features)


def make_batches(images: Sequence[str], shape: Sequence[int],
                 mean: Sequence[float]) -> Callable[[int], Batch]:
    """Return the function from a batch number to pixels less the mean, and to which were read.

    Batch k begins with image k * shape[0]. It is called in workers.
    """
    cv2.setNumThreads(1)  # the cores belong to Caffe and the other workers
    size, channels, height, width = shape
    offset = np.asarray(mean, np.float32).reshape(-1, 1, 1)

    def batch_of(number: int) -> Batch:
        pixels = np.zeros(shape, np.float32)
        read = np.zeros(size, bool)
        broken = []
        for place, path in enumerate(images[number * size:(number + 1) * size]):
            try:
                np.subtract(read_image(path, height, width, channels == 1), offset,
                            out=pixels[place])
                read[place] = True
            except ValueError as error:
                broken.append(str(error))
        return Batch([pixels, read], broken)

    return batch_of

