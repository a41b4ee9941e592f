"""Find where objects may be, for Fast R-CNN to classify: in a file, or by selective search.

The file is the public selective-search .mat of a split (Girshick 2015). Selective search (Uijlings
et al. 2013) is that of OpenCV's contrib modules; its proposals are kept on the disk by image.
"""
import argparse
import concurrent.futures
import hashlib
import io
import logging
import multiprocessing
import os
import threading
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import cv2
import numpy as np
import scipy.io
from tqdm import tqdm

from ddinit import files, processes
from ddinit.argument_types import count
from training.run_folder import sha256
from voc.folders import Voc

COMPUTED = "selective-search"  # in place of the name of a file
DEFAULT_CACHE = os.path.join("build", "proposals")
SMALLEST = 8  # width and height of the smallest proposals, in pixels of the resized image
NO_SEARCH = ("This OpenCV has no selective search, which is in its contrib modules. Replace "
             "opencv-python-headless by opencv-contrib-python-headless (experiments/README.md, "
             "'Detection'), or give the selective-search file of the split with --proposals.")

log = logging.getLogger(__name__)


class Search(NamedTuple):
    """The parameters of a search.

    mode     OpenCV's mode, 'fast' or 'quality'
    side     the longest side of the image that is searched, in pixels
    base_k   scale of the first segmentation; a smaller one finds more and smaller boxes
    """
    mode: str = "fast"
    side: int = 500
    base_k: int = 150


def load(voc: Voc, images: Sequence[str], arguments: argparse.Namespace,
         limit: Optional[int] = None) -> List[np.ndarray]:
    """Return the proposals, float32 (n, 4), of the first `limit` images of a split.

    `arguments` are those of `add_arguments`. Raises ValueError naming a file or image without any.
    """
    search = search_of(arguments)
    if arguments.proposals != COMPUTED:
        return read_mat(arguments.proposals, images)[:limit]
    paths = [voc.image_path(image) for image in images[:limit]]
    return list(compute(paths, search, arguments.cache, arguments.processes))


def described(arguments: argparse.Namespace) -> Dict[str, Any]:
    """Return what the proposals of `load` depend on, as JSON values."""
    if arguments.proposals != COMPUTED:
        return {"proposals_sha256": sha256(arguments.proposals)}
    return {"proposals": {"opencv": cv2.__version__, **search_of(arguments)._asdict()}}


def read_mat(path: str, images: Sequence[str]) -> List[np.ndarray]:
    """Return the boxes (n, 4) of each of `images` in a selective-search .mat.

    The file holds `boxes`, a cell for each image with columns y1, x1, y2, x2 from 1, and often the
    ids of the images in `images`, which have to be ours in our order. Raises ValueError naming the
    file and the image.
    """
    content = _matlab(path)
    cells = np.ravel(content["boxes"])
    if len(cells) != len(images):
        raise ValueError("%s: the file has proposals for %d images, but the split has %d images"
                         % (path, len(cells), len(images)))
    names = [_text(cell) for cell in np.ravel(content.get("images", ()))]
    for number, (name, image) in enumerate(zip(names, images), 1):
        if name != image:
            raise ValueError("%s: cell %d is for image %s, but image %d of the split is %s"
                             % (path, number, name, number, image))
    return [_boxes(cell, path, image) for cell, image in zip(cells, images)]


def _matlab(path: str) -> dict:
    try:
        content = scipy.io.loadmat(path, appendmat=False)
    except OSError as error:
        raise ValueError("%s: cannot read the proposals (%s)" % (path, error.strerror)) from error
    except NotImplementedError as error:
        raise ValueError("%s: MATLAB has written the file with -v7.3. Save it with -v7."
                         % path) from error
    except Exception as error:  # scipy has no exception of its own for broken files
        raise ValueError("%s: not a .mat file (%s)" % (path, error)) from error
    if "boxes" not in content:
        names = [name for name in content if not name.startswith("__")]
        raise ValueError("%s: the file has no variable 'boxes', only %s"
                         % (path, ", ".join(names) or "none"))
    return content


def _text(cell: Any) -> str:
    return str(np.ravel(cell)[0]) if np.size(cell) else ""


def _boxes(cell: Any, path: str, image: str) -> np.ndarray:
    """Return the boxes of a cell with our columns, from 0, as floats so that 0 - 1 is -1."""
    array = np.asarray(cell)
    if array.dtype == object or array.ndim != 2 or array.shape[1] != 4 or not len(array):
        raise ValueError("%s: image %s has no boxes, because its cell is %s %s, not (n, 4) numbers"
                         % (path, image, array.dtype, array.shape))
    return array[:, [1, 0, 3, 2]].astype(np.float32) - 1


def compute(paths: Sequence[str], search: Search, cache: str,
            processes: int) -> Iterator[np.ndarray]:
    """Yield the proposals of each image file in order, computed unless the folder `cache` has them.

    Raises ValueError naming an image that cannot be read or has no proposals, and where this OpenCV
    cannot compute them.
    """
    os.makedirs(cache, exist_ok=True)
    missing = [path for path in paths if _cached(path, search, cache)[1] is None]
    if missing:
        if not hasattr(cv2, "ximgproc"):
            raise ValueError(NO_SEARCH)
        log.info("selective search in %d of %d images, by %d processes", len(missing), len(paths),
                 processes)
        tqdm.set_lock(threading.RLock())  # its default, a semaphore, outlives a process that aborts
        for _ in tqdm(_searched(missing, search, cache, processes), total=len(missing),
                      unit="images", disable=None):
            pass
    for path in paths:
        _, boxes = _cached(path, search, cache)
        if boxes is None:
            raise ValueError("%s: the image has changed while its proposals were computed" % path)
        yield boxes


def find(image: np.ndarray, search: Search) -> np.ndarray:
    """Return the proposals float32 (n, 4) in an image uint8 (height, width, 3), sorted."""
    height, width = image.shape[:2]
    scale = search.side / max(height, width)
    size = max(round(width * scale), 1), max(round(height * scale), 1)
    shrinks = size[0] < width
    resized = cv2.resize(image, size,
                         interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    engine = cv2.ximgproc.segmentation.createSelectiveSearchSegmentation()
    engine.setBaseImage(resized)
    if search.mode == "fast":
        engine.switchToSelectiveSearchFast(search.base_k)
    else:
        engine.switchToSelectiveSearchQuality(search.base_k)
    rectangles = np.asarray(engine.process()).reshape(-1, 4)
    kept = rectangles[(rectangles[:, 2:] >= SMALLEST).all(axis=1)].astype(np.float64)
    back = np.array([width / size[0], height / size[1]])
    corners = np.hstack([kept[:, :2] * back, (kept[:, :2] + kept[:, 2:]) * back - 1])
    return np.unique(corners.astype(np.float32), axis=0)  # OpenCV's order is partly random


def _searched(paths: Sequence[str], search: Search, cache: str,
              processes: int) -> Iterator[None]:
    """Fill the cache for `paths`, and yield after each of them."""
    if processes == 1:
        for path in paths:
            _search_file(path, search, cache)
            yield
        return
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(processes, context, _begin) as pool:
        try:
            yield from pool.map(_search_file, paths, [search] * len(paths), [cache] * len(paths))
        except concurrent.futures.process.BrokenProcessPool as error:
            raise ValueError("A process of the selective search has died, most likely because "
                             "memory ran out. Use fewer --processes.") from error


def _begin() -> None:
    processes.die_with_parent()
    cv2.setNumThreads(1)  # the processes are the parallelism


def _search_file(path: str, search: Search, cache: str) -> None:
    target, _ = _cached(path, search, cache)
    image = cv2.imread(path)
    if image is None:
        raise ValueError("%s is not an image that OpenCV can read" % path)
    boxes = find(image, search)
    if not len(boxes):
        raise ValueError("%s: selective search finds no boxes in this image" % path)
    with files.replacing(target) as temporary, open(temporary, "wb") as file:
        np.save(file, boxes)


def _cached(path: str, search: Search, cache: str) -> Tuple[str, Optional[np.ndarray]]:
    """Return the file for the proposals of an image, and the proposals in it, or None.

    Its name has a digest of the image and of everything else that the proposals depend on.
    """
    digest = hashlib.sha256(repr((search, SMALLEST, cv2.__version__)).encode())
    try:
        with open(path, "rb") as file:
            digest.update(file.read())
    except OSError as error:
        raise ValueError("%s: cannot read the image (%s)" % (path, error.strerror)) from error
    stem = os.path.splitext(os.path.basename(path))[0]
    target = os.path.join(cache, "%s-%s.npy" % (stem, digest.hexdigest()[:16]))
    return target, _saved(target)


def _saved(path: str) -> Optional[np.ndarray]:
    try:
        with open(path, "rb") as file:
            boxes = np.load(io.BytesIO(file.read()), allow_pickle=False)
    except (OSError, EOFError, ValueError):
        return None
    return boxes if boxes.ndim == 2 and boxes.shape[1] == 4 and len(boxes) else None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose proposals and how they are computed."""
    default, add = Search(), parser.add_argument
    add("--proposals", default=COMPUTED, metavar="FILE.mat|%s" % COMPUTED,
        help="selective-search file of the split, or compute them (default: %(default)s)")
    add("--search-mode", choices=("fast", "quality"), default=default.mode,
        help="mode of OpenCV's selective search (default: %(default)s)")
    add("--search-side", type=count, default=default.side, metavar="PIXELS",
        help="longest side of the images that are searched (default: %(default)d)")
    add("--search-k", type=count, default=default.base_k, metavar="K",
        help="scale of the first segmentation; a smaller one finds more and smaller boxes "
             "(default: %(default)d)")
    add("--cache", metavar="DIR", default=DEFAULT_CACHE,
        help="folder for computed proposals (default: %(default)s)")
    add("--processes", type=count, default=os.cpu_count() or 1, metavar="N",
        help="processes that search (default: one per core, %(default)d)")


def search_of(arguments: argparse.Namespace) -> Search:
    """Return the search of the options of `add_arguments`. Raises ValueError if it is too small."""
    if arguments.search_side < 2 * SMALLEST:
        raise ValueError("--search-side has to be at least %d pixels, not %d."
                         % (2 * SMALLEST, arguments.search_side))
    return Search(arguments.search_mode, arguments.search_side, arguments.search_k)
