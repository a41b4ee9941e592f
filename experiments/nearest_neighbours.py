"""Nearest neighbours of images in the feature spaces of several models (paper, figure 2).

    python experiments/nearest_neighbours.py models/caffenet/deploy.prototxt \
        build/kmeans.caffemodel build/doersch.caffemodel --queries queries.txt --pool pool.txt \
        --layer fc7 -k 5 --out build/neighbours

writes OUT/MODEL.png and OUT/MODEL.html, a row of pictures for every query, and
OUT/neighbours.json.  The lists name an image a line; a label behind it is ignored.
"""
import argparse
import logging
import os
import re
import sys
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

import neighbour_pages
from ddinit import argument_types, blas, processes, results
from ddinit.argument_types import count
from ddinit.caffe_net import choose_device
from features import FeatureNet, cached_features
from image_batches import MEAN

log = logging.getLogger("nearest_neighbours")

CHUNK_BYTES = 1 << 26  # of the pool in memory at a time


class Neighbours(NamedTuple):
    """For every query its neighbours, nearest first: `places` (queries, k) in the pool, and their
    cosine `similarity` (queries, k)."""

    places: np.ndarray
    similarity: np.ndarray


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Find and show the neighbours that the command line asks for; return the exit status."""
    parser = processes.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("net", metavar="NET.prototxt", help="definition of all models")
    parser.add_argument("weights", metavar="WEIGHTS.caffemodel", nargs="+", help="a model each")
    parser.add_argument("--queries", metavar="LIST", required=True,
                        help="text file naming the images to find neighbours of")
    parser.add_argument("--pool", metavar="LIST", required=True,
                        help="text file naming the images to find them among")
    parser.add_argument("--root", metavar="DIR", default="",
                        help="folder that the lists' paths start from")
    parser.add_argument("--layer", metavar="BLOB", default="fc7",
                        help="whose output is the feature space (default: fc7)")
    parser.add_argument("-k", metavar="N", type=count, default=5, help="neighbours (default: 5)")
    parser.add_argument("--out", metavar="DIR", required=True, help="folder for the results")
    parser.add_argument("--mean", metavar="VALUE", type=float, nargs="+", default=list(MEAN),
                        help="to subtract, blue green red (default: 104 117 123)")
    parser.add_argument("--batch-size", metavar="IMAGES", type=count, default=32,
                        help="default: 32")
    argument_types.add_workers(parser)
    argument_types.add_device(parser)
    arguments = parser.parse_args(argv)
    processes.log_to_stderr()
    return processes.command_line(lambda given: _run(given, argv), arguments, parser.prog)


def _run(arguments: argparse.Namespace, argv: Optional[Sequence[str]]) -> None:
    queries = read_paths(arguments.queries, arguments.root)
    pool = read_paths(arguments.pool, arguments.root)
    names = model_names(arguments.weights)
    os.makedirs(arguments.out, exist_ok=True)
    gpu = choose_device(arguments.cpu, arguments.gpu)
    models = {}
    for name, weights in zip(names, arguments.weights):
        source = FeatureNet(arguments.net, weights, arguments.layer, arguments.batch_size,
                            arguments.mean, arguments.workers, gpu)
        found = neighbours_of(source, queries, pool, arguments.k,
                              os.path.join(arguments.out, "features"))
        rows = described(queries, pool, found)
        neighbour_pages.write(arguments.out, name, rows)
        models[name] = {"weights": weights, "queries": rows}
        log.info("%s: %s", name, os.path.join(arguments.out, name + ".html"))
    results.write_json(os.path.join(arguments.out, "neighbours.json"), {
        **results.provenance(None, argv), "layer": arguments.layer, "models": models})


def read_paths(path: str, root: str) -> List[str]:
    """Return the image paths in a list of lines 'path' or 'path label', below `root`.

    Raises ValueError naming the file where it cannot be read or is empty.
    """
    try:
        with open(path, encoding="utf-8") as file:
            lines = [line.strip() for line in file if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError("%s: cannot read the list (%s)" % (path, error)) from error
    if not lines:
        raise ValueError("%s: the list is empty" % path)
    return [os.path.join(root, re.sub(r"\s+\d+$", "", line)) for line in lines]


def model_names(weights: Sequence[str]) -> List[str]:
    """Return a name for each caffemodel: its file's, with its folder's where that is not enough.

    Raises ValueError where two models still have the same name.
    """
    stems = [os.path.splitext(os.path.basename(path))[0] for path in weights]
    names = [stem if stems.count(stem) == 1 else "%s_%s" % (
        os.path.basename(os.path.dirname(os.path.abspath(path))), stem)
        for stem, path in zip(stems, weights)]
    for name in names:
        if names.count(name) > 1:
            raise ValueError("two models are called %s: rename one" % name)
    return names


# ---------------------------------------------------------------------------------------------
# Searching
# ---------------------------------------------------------------------------------------------

def neighbours_of(source: FeatureNet, queries: Sequence[str], pool: Sequence[str], k: int,
                  cache: str) -> Neighbours:
    """Return the k nearest images of the pool for every query, never the query's own file.

    Raises ValueError naming a query that cannot be read.
    """
    wanted = np.concatenate(cached_features(source, queries, cache))
    for path, row in zip(queries, wanted):
        if np.isnan(row).any():
            raise ValueError("%s: this query has no feature (a broken image, or NaN in the net)"
                             % path)
    places: Dict[str, List[int]] = {path: [] for path in queries}
    for place, path in enumerate(pool):
        if path in places:
            places[path].append(place)
    own = [np.array(places[path], np.int64) for path in queries]
    return nearest(wanted, cached_features(source, pool, cache), k, own)


def nearest(queries: np.ndarray, pool: Sequence[np.ndarray], k: int,
            excluded: Optional[Sequence[np.ndarray]] = None) -> Neighbours:
    """Return the k rows of the pool with the largest cosine q p / (|q| |p|) for every query.

    `queries` is (queries, d); `pool` are parts (rows, d), of any float type, memory-mapped where
    they exceed memory; `excluded` are for every query the places in the pool that do not count.
    The search is exhaustive, in float32; of equally similar rows the first counts.  A row of NaN is
    nobody's neighbour, and a row of zeros has cosine 0 with all.
    Raises ValueError where the pool has another d or fewer rows than are asked for.
    """
    _check_pool(queries, pool, k)
    unit = _unit(np.asarray(queries, np.float32))
    best = [(np.empty(0, np.int64), np.empty(0, np.float32)) for _ in unit]
    start = 0
    for part in pool:
        rows = max(1, CHUNK_BYTES // (4 * part.shape[1]))
        for first in range(0, len(part), rows):
            cosine = blas.product(unit, _unit(np.asarray(part[first:first + rows], np.float32)).T)
            cosine[np.isnan(cosine)] = -np.inf
            for query, row in enumerate(cosine):
                if excluded is not None:
                    inside = excluded[query] - start
                    row[inside[(inside >= 0) & (inside < len(row))]] = -np.inf
                best[query] = _merged(best[query], row, start, k)
            start += cosine.shape[1]
    for query, (found, similarity) in enumerate(best):
        if len(found) < k or similarity[-1] == -np.inf:
            raise ValueError("query %d: the pool has fewer than %d other images that can be read"
                             % (query, k))
    places = np.array([found for found, _ in best])
    return Neighbours(places, np.array([similarity for _, similarity in best]))


def _check_pool(queries: np.ndarray, pool: Sequence[np.ndarray], k: int) -> None:
    for part in pool:
        if part.shape[1] != queries.shape[1]:
            raise ValueError("features of %d numbers in the pool, of %d in the queries"
                             % (part.shape[1], queries.shape[1]))
    if sum(len(part) for part in pool) < k:
        raise ValueError("%d neighbours asked for in a pool of %d images"
                         % (k, sum(len(part) for part in pool)))


def _unit(rows: np.ndarray) -> np.ndarray:
    """Rows divided by their length; rows of zeros stay."""
    lengths = np.sqrt(np.einsum("ij,ij->i", rows, rows))
    lengths[lengths == 0] = 1
    return rows / lengths[:, None]


def _merged(best: Tuple[np.ndarray, np.ndarray], row: np.ndarray, start: int,
            k: int) -> Tuple[np.ndarray, np.ndarray]:
    """The k best of what was found so far and of `row`, which begins at place `start`."""
    found, similarity = best
    better = np.arange(len(row)) if len(found) < k else np.flatnonzero(row > similarity[-1])
    if not len(better):
        return best
    found = np.concatenate([found, better + start])
    similarity = np.concatenate([similarity, row[better]])
    order = np.lexsort((found, -similarity))[:k]
    return found[order], similarity[order]


def described(queries: Sequence[str], pool: Sequence[str],
              found: Neighbours) -> List[Dict[str, Any]]:
    """Return for every query its path and the paths and similarities of its neighbours."""
    return [{"query": path, "neighbours": [
        {"image": pool[place], "cosine": float(cosine)} for place, cosine in zip(places, cosines)]}
        for path, places, cosines in zip(queries, found.places, found.similarity)]


if __name__ == "__main__":
    sys.exit(main())
