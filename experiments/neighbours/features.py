"""Compute the features of images, and search among them (figure 2).

A feature is the content of a blob after a forward pass in the TEST phase, as a row of numbers. The
rows of a list of images are kept in a file, so that they are computed only once.
"""
import hashlib
import json
import os
import threading
from typing import Any, Callable, NamedTuple, Optional, Sequence

import cv2
import numpy as np
from sklearn.neighbors import NearestNeighbors
from tqdm import tqdm

from ddinit import files, processes
from ddinit.caffemodel import load_weights
from ddinit.images import read_image
from ddinit.net import use_device
from ddinit.prototxt import build_net, image_layers, read_definition, working_definition
from training.batches import MEAN
from training.prefetch import Batch, Prefetcher
from training.run_folder import sha256

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


class Neighbours(NamedTuple):
    """The neighbors of each query, the nearest first.

    places       (queries, k), indices into the pool
    similarity   (queries, k), cosines
    """

    places: np.ndarray
    similarity: np.ndarray


def nearest(queries: np.ndarray, pool: np.ndarray, k: int,
            excluded: Sequence[np.ndarray]) -> Neighbours:
    """Return the k rows of the pool (n, d) with the largest cosine for each query (queries, d).

    The indices `excluded` of each query do not count, and neither does a row with NaN. Raises
    ValueError where fewer rows remain than are asked for.
    """
    readable = np.flatnonzero(~np.isnan(pool).any(axis=1))
    wanted = min(k + max(len(indices) for indices in excluded), len(readable))
    search = NearestNeighbors(n_neighbors=max(wanted, 1), metric="cosine", algorithm="brute")
    distances, rows = search.fit(pool[readable]).kneighbors(queries) \
        if wanted else (np.empty((len(queries), 0)), np.empty((len(queries), 0), int))
    places = readable[rows]
    kept = [np.flatnonzero(~np.isin(row, indices))[:k] for row, indices in zip(places, excluded)]
    for query, columns in enumerate(kept):
        if len(columns) < k:
            raise ValueError("Query %d: the pool has fewer than %d other images that can be read."
                             % (query, k))
    return Neighbours(np.take_along_axis(places, np.array(kept), 1),
                      1 - np.take_along_axis(distances, np.array(kept), 1))


def cached_features(source: FeatureNet, images: Sequence[str], cache: str) -> np.ndarray:
    """Return the features of images in their order, memory-mapped, float32 (images, d).

    They are computed where the folder `cache` does not have them. The row of an image that cannot
    be read is NaN. Raises ValueError naming a wrong layer or file, and where too many images are
    broken.
    """
    os.makedirs(cache, exist_ok=True)
    path = os.path.join(cache, _key(source, images) + ".npy")
    if not os.path.exists(path):
        processes.in_child(_compute, source, list(images), path)
    features: np.ndarray = np.load(path, mmap_mode="r")
    return features


def _key(source: FeatureNet, images: Sequence[str]) -> str:
    """Return a name from all that features depend on: weights, definition, layer and images."""
    statuses = []
    for path in images:
        status = os.stat(path) if os.path.exists(path) else None  # reported when it is read
        statuses.append((os.path.abspath(path), status and (status.st_size, status.st_mtime_ns)))
    text = json.dumps([sha256(source.weights), sha256(source.net), source.layer,
                       list(source.mean), statuses])
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:20]


def feature_definition(path: str, layer: str, batch_size: int) -> Any:
    """Return the NetParameter in `path`, cut after the blob `layer`, and its image input.

    The blob is as the whole net leaves it, after layers that work in place. Raises ValueError with
    the blobs of the net where `layer` is not one of them.
    """
    layers, image = image_layers(read_definition(path), batch_size)
    assert image is not None  # because batch_size asks for one
    working = working_definition(layers, [image])
    last = [number for number, writer in enumerate(working.layer) if layer in writer.top]
    if not last or layer == image.blob:
        blobs = dict.fromkeys(top for writer in working.layer for top in writer.top
                              if top != image.blob)
        raise ValueError("%s: the net has no blob '%s' to take features from. It has %s."
                         % (path, layer, ", ".join(blobs)))
    del working.layer[last[-1] + 1:]
    for kept in working.layer:
        kept.ClearField("loss_weight")
    return working, image


def _compute(source: FeatureNet, images: Sequence[str], path: str) -> None:
    """Write the features of images; it runs in a child process."""
    processes.log_to_stderr()
    tqdm.set_lock(threading.RLock())  # its default, a semaphore, outlives a process that aborts
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
    size, blob = source.batch_size, net.blobs[source.layer]
    batches = Prefetcher(make_batches, (list(images), image.shape, list(source.mean)),
                         source.workers, 4 * int(np.prod(image.shape)) + 8 * size,
                         broken_limit=max(10, int(BROKEN_PART * len(images))))
    batches.start(0)
    try:
        with files.replacing(path) as temporary:
            rows = np.lib.format.open_memmap(temporary, "w+", np.float32,
                                             (len(images), blob.data[0].size))
            for start in tqdm(range(0, len(images), size), unit=" batches", disable=None):
                pixels, read = batches.next()
                net.blobs[image.blob].data[...] = pixels
                net.forward()
                features = np.where(read[:, None], blob.data.reshape(size, -1), np.nan)
                rows[start:start + size] = features[:len(images) - start]
            rows.flush()
    finally:
        batches.close()


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
