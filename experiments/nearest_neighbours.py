"""Find the nearest neighbors of images in the feature spaces of several models (figure 2).

    python experiments/nearest_neighbours.py models/caffenet/deploy.prototxt \\
        build/kmeans.caffemodel build/doersch.caffemodel --queries queries.txt --pool pool.txt \\
        --layer fc7 -k 5 --out build/neighbours

It writes OUT/MODEL.png, with a row of pictures for each query, and OUT/neighbours.json. The lists
name an image on each line; a label after it is ignored.
"""
import argparse
import logging
import os
import sys
from typing import Any, Dict, List, Optional, Sequence

import numpy as np

from ddinit import argument_types, processes, results
from ddinit.argument_types import count
from ddinit.net import choose_device
from neighbours.features import FeatureNet, Neighbours, cached_features, nearest
from neighbours.pictures import read_paths, write_montage
from training import options
from training.batches import MEAN

log = logging.getLogger("nearest_neighbours")


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Find and show the neighbors that the command line asks for; return the exit status."""
    parser = processes.Parser(prog="nearest_neighbours.py",
                              description=(__doc__ or "").splitlines()[0])
    parser.add_argument("net", metavar="NET.prototxt", help="definition of all models")
    parser.add_argument("weights", metavar="WEIGHTS.caffemodel", nargs="+",
                        help="the models")
    parser.add_argument("--queries", metavar="LIST", required=True,
                        help="text file with the images to find neighbors of")
    parser.add_argument("--pool", metavar="LIST", required=True,
                        help="text file with the images to find them among")
    parser.add_argument("--root", metavar="DIR", default="",
                        help="folder that the lists' paths start from")
    parser.add_argument("--layer", metavar="BLOB", default="fc7",
                        help="blob that is the feature space (default: %(default)s)")
    parser.add_argument("-k", metavar="N", type=count, default=5,
                        help="neighbors (default: %(default)d)")
    parser.add_argument("--out", metavar="DIR", required=True, help="folder for the results")
    parser.add_argument("--mean", metavar="VALUE", type=float, nargs="+", default=list(MEAN),
                        help="values to subtract from blue, green and red (default: 104 117 123)")
    parser.add_argument("--batch-size", metavar="IMAGES", type=count, default=32,
                        help="default: %(default)d")
    options.add_workers(parser)
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
        neighbours = neighbours_of(source, queries, pool, arguments.k,
                                   os.path.join(arguments.out, "features"))
        rows = described(queries, pool, neighbours)
        write_montage(os.path.join(arguments.out, name + ".png"), [
            [row["query"], *[near["image"] for near in row["neighbours"]]] for row in rows])
        models[name] = {"weights": weights, "queries": rows}
        log.info("%s: %s", name, os.path.join(arguments.out, name + ".png"))
    results.write_json(os.path.join(arguments.out, "neighbours.json"), {
        **results.provenance(None, argv), "layer": arguments.layer, "models": models})


def model_names(weights: Sequence[str]) -> List[str]:
    """Return a name for each caffemodel: that of its file, with its folder where it is ambiguous.

    Raises ValueError where two models still have the same name.
    """
    stems = [os.path.splitext(os.path.basename(path))[0] for path in weights]
    names = [stem if stems.count(stem) == 1 else "%s_%s" % (
        os.path.basename(os.path.dirname(os.path.abspath(path))), stem)
        for stem, path in zip(stems, weights)]
    for name in names:
        if names.count(name) > 1:
            raise ValueError("Two models are called %s. Rename one of them." % name)
    return names


def neighbours_of(source: FeatureNet, queries: Sequence[str], pool: Sequence[str], k: int,
                  cache: str) -> Neighbours:
    """Return the k nearest images of the pool for each query, without the query itself.

    Raises ValueError naming a query that cannot be read.
    """
    features = cached_features(source, queries, cache)
    for path, row in zip(queries, features):
        if np.isnan(row).any():
            raise ValueError("%s: this query has no feature, because the image is broken or the "
                             "net computes NaN" % path)
    paths = np.array(pool)
    return nearest(features, cached_features(source, pool, cache), k,
                   [np.flatnonzero(paths == path) for path in queries])


def described(queries: Sequence[str], pool: Sequence[str],
              neighbours: Neighbours) -> List[Dict[str, Any]]:
    """Return the path of each query, and the paths and similarities of its neighbors."""
    return [{"query": path, "neighbours": [
        {"image": pool[place], "cosine": float(cosine)} for place, cosine in zip(places, cosines)]}
        for path, places, cosines in zip(queries, neighbours.places, neighbours.similarity)]


if __name__ == "__main__":
    sys.exit(main())
