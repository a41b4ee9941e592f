"""PASCAL VOC classification: fine-tunes any net from any weights, and scores it (paper, section 4).

    python experiments/classify_voc.py train models/caffenet/deploy.prototxt caffenet.caffemodel \\
        build/voc --voc datasets/VOCdevkit/VOC2007
    python experiments/classify_voc.py test models/caffenet/deploy.prototxt \\
        build/voc/final.caffemodel --voc datasets/VOCdevkit/VOC2007 --out build/voc/result.json

Training: sigmoid cross-entropy over the classes on one random crop of each image; SGD, 80,000
iterations of 10 images, momentum 0.9, learning rate 0.001 halved every 10,000 (paper); weight
decay 1e-6, gradients clipped at a norm of 10, crops of random scale (the author's released
evaluation).  The net's last layer is replaced by one with an output for each class, called as
before with `_voc` behind it and drawn from N(0, 0.01^2), and learns with the rest.
Testing: scores averaged over 10 random crops, VOC2007's 11-point average precision.
"""
import argparse
import logging
import os
import sys
import threading
from typing import Any, Dict, List, Optional, Sequence

import numpy as np
from tqdm import tqdm

import image_batches
import run_folder
import training_net
import training_options
from average_precision import AveragePrecision, classification_ap
from ddinit import argument_types, caffemodel, files, processes, results
from ddinit.argument_types import count, positive
from ddinit.caffe_net import choose_device, use_device
from ddinit.prototxt import build_net, caffe_messages, read_definition
from ddinit.trained_weights import load_weights
from image_batches import Crops
from prefetch import Prefetcher
from training import Plan, exit_status, train
from voc_lmdb import open_voc

DATASET = "image_batches.VocImages"
MOMENTUM = 0.9
HALVED_EVERY = 10000  # iterations
WEIGHT_DECAY = 1e-6
CLIPPED_AT = 10.0  # norm of the gradient
TRAINING_SPLIT, TEST_SPLIT = "trainval", "test"


# ---------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------

def run_training(arguments: argparse.Namespace, gpu: Optional[int]) -> int:
    """Train as the command line says; return the exit status.  Runs in a child process."""
    processes.log_to_stderr()
    plan = training_plan(arguments, gpu)
    outcome = train(plan)
    if outcome.stopped_by is None:
        logging.info("wrote %s", os.path.join(plan.folder, "final.caffemodel"))
    return exit_status(outcome, plan)


def training_plan(arguments: argparse.Namespace, gpu: Optional[int]) -> Plan:
    """Return the plan of a training run."""
    voc = {"root": os.path.abspath(arguments.voc), "split": TRAINING_SPLIT}
    dataset = image_batches.VocImages(**voc)
    net = training_net.classifier(read_definition(arguments.net),
                                  arguments.batch_size, len(dataset.classes))
    source = training_net.image_source_layer(
        "data", (net.image.blob, "label"), DATASET, voc, _crops(net), arguments.batch_size,
        arguments.seed, arguments.workers)
    weights = None if arguments.weights == "none" else arguments.weights
    fresh = [net.layer]
    if arguments.random_from is not None:
        fresh = training_net.layers_from(net, arguments.random_from)
    if weights is not None and arguments.random_from is None \
            and net.layer in caffemodel.read(weights):
        fresh = []  # trained here: go on with its last layer
    return Plan(
        net=training_net.training_net(net, source), solver=solver_parameters(arguments),
        folder=arguments.folder, iterations=arguments.iterations, seed=arguments.seed,
        weights=weights, fresh=fresh, snapshot_every=arguments.snapshot,
        resume=arguments.resume, gpus=[] if gpu is None else [gpu],
        settings={"paths": {"definition": os.path.abspath(arguments.net), "voc": voc["root"]},
                  "definition_sha256": run_folder.sha256(arguments.net),
                  "split": voc["split"], "classes": dataset.classes,
                  "images": len(dataset.labels), "batch_size": arguments.batch_size,
                  "learning_rate": arguments.lr, "solver_type": arguments.solver,
                  "random_from": arguments.random_from})


def _crops(net: training_net.Classifier) -> Crops:
    height, width = net.image.shape[2:]
    return Crops(height, width)


def solver_parameters(arguments: argparse.Namespace) -> Any:
    """Return the paper's solver."""
    return caffe_messages().SolverParameter(
        type=arguments.solver, base_lr=arguments.lr, lr_policy="step", gamma=0.5,
        stepsize=HALVED_EVERY, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY,
        clip_gradients=CLIPPED_AT)


# ---------------------------------------------------------------------------------------------
# Testing
# ---------------------------------------------------------------------------------------------

def run_test(arguments: argparse.Namespace, gpu: Optional[int]) -> int:
    """Score a net as the command line says; return the exit status.  Runs in a child process."""
    processes.log_to_stderr()
    files.check_writable(arguments.out)
    voc = {"root": os.path.abspath(arguments.voc), "split": TEST_SPLIT}
    reader = open_voc(arguments.voc)
    labels = reader.labels(TEST_SPLIT)
    net = training_net.classifier(read_definition(arguments.net), arguments.crops,
                                  len(reader.classes))
    use_device(gpu)
    caffe_net = build_net(training_net.test_net(net))
    missing = load_weights(caffe_net, arguments.weights)
    if missing:
        raise ValueError("%s: has no layer '%s': not weights of this net that classify_voc.py "
                         "trained" % (arguments.weights, missing[0]))
    scores = averaged_scores(caffe_net, net, voc, len(labels), arguments)
    scored = ~np.isnan(scores).all(1)
    precision = classification_ap(scores[scored], labels[scored])
    results.write_json(arguments.out, {
        **report(reader.classes, precision, labels[scored]),
        "crops": arguments.crops, "images": int(scored.sum()),
        "skipped": [name for name, good in zip(reader.images(TEST_SPLIT), scored) if not good],
        "definition_sha256": run_folder.sha256(arguments.net),
        "weights_sha256": run_folder.sha256(arguments.weights),
        **results.provenance(arguments.seed)})
    print("mAP %.4f (11 points), %.4f (area): %d classes, %d images, %d crops each" % (
        precision.mean_eleven_point, precision.mean_area, len(reader.classes), scored.sum(),
        arguments.crops))
    return 0


def averaged_scores(caffe_net: Any, net: training_net.Classifier, voc: Dict[str, str],
                    images: int, arguments: argparse.Namespace) -> np.ndarray:
    """Return scores (images, classes), averaged over each image's crops; NaN for a broken image.

    Raises ValueError naming the image for which the net's scores are not finite.
    """
    crops = _crops(net)
    feed = Prefetcher(image_batches.make_crops_to_score,
                      (DATASET, voc, crops, arguments.crops, arguments.seed), arguments.workers,
                      slot_bytes=4 * int(np.prod(net.image.shape)))
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
            raise ValueError("%s: the net's scores of image %d of split %s are not finite"
                             % (arguments.weights, image + 1, voc["split"]))
        averaged.append(scores.mean(0, dtype=np.float64))
    feed.close()
    classes = max((len(row) for row in averaged if row is not None), default=0)
    return np.array([np.full(classes, np.nan) if row is None else row for row in averaged])


def report(classes: Sequence[str], precision: AveragePrecision,
           labels: np.ndarray) -> Dict[str, Any]:
    """Return average precisions by class, their means and how many images show each class."""
    return {
        "mAP": precision.mean_eleven_point,
        "mAP_area": precision.mean_area,
        "AP": dict(zip(classes, precision.eleven_point)),
        "AP_area": dict(zip(classes, precision.area)),
        "counts": {name: {"present": (column == 1).sum(), "difficult": (column == 0).sum(),
                          "absent": (column == -1).sum()}
                   for name, column in zip(classes, labels.T)},
    }


# ---------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------

def main(argv: Optional[Sequence[str]] = None) -> int:
    """Train or test; return the exit status: 2 after an error, 130 and 143 after a signal."""
    arguments = _parser().parse_args(argv)
    return processes.command_line(_run, arguments, "classify_voc.py")


def _run(arguments: argparse.Namespace) -> int:
    gpu = choose_device(arguments.cpu, arguments.gpu)
    function = run_training if arguments.command == "train" else run_test
    return processes.in_child(function, arguments, gpu)


def _parser() -> argparse.ArgumentParser:
    parser = processes.Parser(prog="classify_voc.py", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    _add_train(commands.add_parser("train", help="fine-tune a net"))
    _add_test(commands.add_parser("test", help="score a net that was trained"))
    return parser


def _add_train(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    training_options.add_run(parser)
    _add_common(parser)
    add("--iterations", type=count, default=80000, metavar="N", help="default %(default)d")
    add("--batch-size", type=count, default=10, metavar="N", help="images (default %(default)d)")
    add("--lr", type=positive, default=0.001, metavar="RATE",
        help="learning rate, halved every 10,000 iterations (default %(default)g)")
    add("--solver", choices=("SGD", "Adam"), default="SGD", help="default %(default)s")
    training_options.add_snapshots(parser, 5000)
    add("--random-from", metavar="LAYER",
        help="fill this layer and all after it afresh instead of loading them")


def _add_test(parser: argparse.ArgumentParser) -> None:
    training_options.add_trained(parser)
    _add_common(parser)
    parser.add_argument("--crops", type=count, default=10, metavar="N",
                        help="random crops of each image (default %(default)d)")
    parser.add_argument("--out", required=True, metavar="FILE", help="JSON file to write")


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--voc", required=True, metavar="DIR", help="folder in VOC's layout, as "
                        "VOCdevkit/VOC2007, or an LMDB of make_voc_lmdb.py")
    training_options.add_seed(parser)
    argument_types.add_workers(parser)
    argument_types.add_device(parser)


if __name__ == "__main__":
    sys.exit(main())
