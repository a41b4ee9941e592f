"""Fine-tune any net for PASCAL VOC classification, and score it (section 4.1; tables 1 to 3).

    python experiments/classify_voc.py train models/caffenet/deploy.prototxt caffenet.caffemodel \\
        build/voc --voc datasets/VOCdevkit/VOC2007
    python experiments/classify_voc.py test models/caffenet/deploy.prototxt \\
        build/voc/final.caffemodel --voc datasets/VOCdevkit/VOC2007 --out build/voc/result.json

Training follows the paper: sigmoid cross-entropy over the classes on one random crop of each image,
by SGD with 80,000 iterations of 10 images, momentum 0.9 and a learning rate of 0.001, halved every
10,000 iterations. The author's released evaluation adds a weight decay of 1e-6, gradients clipped
to a norm of 10, and a momentum2 of 0.99 for Adam. The last layer is replaced by one with an output
for each class, whose name ends in `_voc` and whose weights are drawn from N(0, 0.01^2). All layers
learn. Testing averages the scores of 10 random crops.
"""
import argparse
import os
import sys
import threading
from typing import Any, Dict, List, Optional, Sequence

import numpy as np
from tqdm import tqdm

from classification import nets
from classification.images import VocImages, make_crops_to_score
from ddinit import files, processes, results
from ddinit.argument_types import count, positive
from ddinit.caffemodel import load_weights
from ddinit.net import use_device
from ddinit.prototxt import build_net, caffe_messages, read_definition
from training import options, run_folder
from training.batches import Crops
from training.loop import Plan, run
from training.nets import image_source_layer
from training.prefetch import Prefetcher
from voc.average_precision import classification_ap
from voc.databases import open_voc

DATASET = "classification.images.VocImages"
MOMENTUM, MOMENTUM2 = 0.9, 0.99
HALVED_EVERY = 10000  # iterations
WEIGHT_DECAY = 1e-6
CLIPPED_AT = 10.0  # norm of the gradient
TRAINING_SPLIT, TEST_SPLIT = "trainval", "test"


def run_training(arguments: argparse.Namespace, gpu: Optional[int]) -> int:
    """Train as the command line says; return the exit status. It runs in a child process."""
    processes.log_to_stderr()
    return run(training_plan(arguments, gpu))


def training_plan(arguments: argparse.Namespace, gpu: Optional[int]) -> Plan:
    """Return the plan of a training run."""
    voc = {"root": os.path.abspath(arguments.voc), "split": TRAINING_SPLIT}
    dataset = VocImages(**voc)
    net = nets.classifier(read_definition(arguments.net), arguments.batch_size,
                          len(dataset.classes))
    source = image_source_layer("data", (net.image.blob, "label"), DATASET, voc, _crops(net),
                                arguments.batch_size, arguments.seed, arguments.workers)
    # The new last layer is in no caffemodel but those that this command has trained.
    fresh = [] if arguments.random_from is None else nets.layers_from(net, arguments.random_from)
    return Plan(
        net=nets.training_net(net, source), solver=solver_parameters(arguments),
        folder=arguments.folder, iterations=arguments.iterations, seed=arguments.seed,
        weights=None if arguments.weights == "none" else arguments.weights, fresh=fresh,
        snapshot_every=arguments.snapshot, resume=arguments.resume, gpu=gpu,
        settings={"paths": {"definition": os.path.abspath(arguments.net), "voc": voc["root"]},
                  "definition_sha256": run_folder.sha256(arguments.net),
                  "split": voc["split"], "classes": dataset.classes,
                  "images": len(dataset.labels), "batch_size": arguments.batch_size,
                  "learning_rate": arguments.lr, "solver_type": arguments.solver,
                  "random_from": arguments.random_from})


def _crops(net: nets.Classifier) -> Crops:
    height, width = net.image.shape[2:]
    return Crops(height, width)


def solver_parameters(arguments: argparse.Namespace) -> Any:
    """Return the paper's solver."""
    solver = caffe_messages().SolverParameter(
        type=arguments.solver, base_lr=arguments.lr, lr_policy="step", gamma=0.5,
        stepsize=HALVED_EVERY, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY,
        clip_gradients=CLIPPED_AT)
    if arguments.solver == "Adam":
        solver.momentum2 = MOMENTUM2
    return solver


def run_test(arguments: argparse.Namespace, gpu: Optional[int]) -> int:
    """Score a net as the command line says; return the exit status. It runs in a child process."""
    processes.log_to_stderr()
    files.check_writable(arguments.out)
    voc = {"root": os.path.abspath(arguments.voc), "split": TEST_SPLIT}
    reader = open_voc(arguments.voc)
    labels = reader.labels(TEST_SPLIT)
    net = nets.classifier(read_definition(arguments.net), arguments.crops, len(reader.classes))
    use_device(gpu)
    caffe_net = build_net(nets.test_net(net))
    missing = load_weights(caffe_net, arguments.weights)
    if missing:
        raise ValueError("%s: the file has no layer '%s'. Weights of this net are needed that "
                         "classify_voc.py has trained." % (arguments.weights, missing[0]))
    scores = averaged_scores(caffe_net, net, voc, len(labels), arguments)
    scored = ~np.isnan(scores).all(1)
    precision = classification_ap(scores[scored], labels[scored])
    results.write_json(arguments.out, {
        **precision.report(reader.classes),
        "counts": {name: {"present": (column == 1).sum(), "difficult": (column == 0).sum(),
                          "absent": (column == -1).sum()}
                   for name, column in zip(reader.classes, labels[scored].T)},
        "crops": arguments.crops, "images": int(scored.sum()),
        "skipped": [name for name, good in zip(reader.images(TEST_SPLIT), scored) if not good],
        "definition_sha256": run_folder.sha256(arguments.net),
        "weights_sha256": run_folder.sha256(arguments.weights),
        **results.provenance(arguments.seed)})
    print("%s: %d classes, %d images, %d crops of each" % (
        precision.described(), len(reader.classes), scored.sum(), arguments.crops))
    return 0


def averaged_scores(caffe_net: Any, net: nets.Classifier, voc: Dict[str, str], images: int,
                    arguments: argparse.Namespace) -> np.ndarray:
    """Return scores (images, classes), averaged over the crops of each image.

    The scores of a broken image are NaN. Raises ValueError naming an image whose scores are not
    finite.
    """
    feed = Prefetcher(make_crops_to_score,
                      (DATASET, voc, _crops(net), arguments.crops, arguments.seed),
                      arguments.workers, slot_bytes=4 * int(np.prod(net.image.shape)))
    feed.start(0)
    averaged: List[Optional[np.ndarray]] = []
    tqdm.set_lock(threading.RLock())  # its default, a semaphore, outlives a process that aborts
    for image in tqdm(range(images), unit="image", disable=None):
        (batch,) = feed.next()
        if not len(batch):
            averaged.append(None)
            continue
        caffe_net.blobs[net.image.blob].data[...] = batch
        caffe_net.forward()
        scores = caffe_net.blobs[net.scores].data.reshape(arguments.crops, -1)
        if not np.isfinite(scores).all():
            raise ValueError("%s: the scores of image %d of split %s are not finite"
                             % (arguments.weights, image + 1, voc["split"]))
        averaged.append(scores.mean(0, dtype=np.float64))
    feed.close()
    classes = max((len(row) for row in averaged if row is not None), default=0)
    return np.array([np.full(classes, np.nan) if row is None else row for row in averaged])


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Train or test; return the exit status: 2 after an error, 130 or 143 after a signal."""
    return processes.command_line(options.run, parse(argv), "classify_voc.py")


def parse(argv: Optional[Sequence[str]]) -> argparse.Namespace:
    """Return what a command line asks for."""
    return options.parse(argv, "classify_voc.py", __doc__ or "", ("fine-tune a net", _add_train),
                         ("score a net that was trained", _add_test))


def _add_train(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    parser.set_defaults(function=run_training)
    options.add_run(parser)
    _add_common(parser)
    add("--iterations", type=count, default=80000, metavar="N", help="default: %(default)d")
    add("--batch-size", type=count, default=10, metavar="N", help="images (default: %(default)d)")
    add("--lr", type=positive, default=0.001, metavar="RATE",
        help="learning rate, halved every 10,000 iterations (default: %(default)g)")
    add("--solver", choices=("SGD", "Adam"), default="SGD", help="default: %(default)s")
    options.add_snapshots(parser, 5000)
    add("--random-from", metavar="LAYER",
        help="use the fillers of this layer and all after it, instead of WEIGHTS")


def _add_test(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(function=run_test)
    options.add_trained(parser)
    _add_common(parser)
    parser.add_argument("--crops", type=count, default=10, metavar="N",
                        help="random crops of each image (default: %(default)d)")
    parser.add_argument("--out", required=True, metavar="FILE", help="JSON file to write")


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--voc", required=True, metavar="DIR", help="VOC folder, such as "
                        "VOCdevkit/VOC2007, or an LMDB of data/make_voc_lmdb.py")
    options.add_seed(parser)
    options.add_computing(parser)


if __name__ == "__main__":
    sys.exit(main())
