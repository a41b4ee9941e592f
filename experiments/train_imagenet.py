"""Trains a net to classify the images of an LMDB, as the paper trains on ImageNet (section 4.5).

    python experiments/train_imagenet.py models/caffenet/deploy.prototxt none build/reference \\
        --train build/train.lmdb --val build/val.lmdb
    python experiments/train_imagenet.py models/googlenet/deploy.prototxt kmeans.caffemodel \\
        build/kmeans --preset googlenet --zero-last --train build/train.lmdb --val build/val.lmdb

The presets are the paper's.  caffenet: SGD at 0.01, times 0.1 every 100,000 of 320,000 iterations,
momentum 0.9, weight decay 5e-4, batches of 256.  googlenet: Caffe's 'quick' solver, 0.01 falling
with the square root of the remaining part of 2,400,000 iterations, weight decay 2e-4, batches of
32.  Images are random crops and mirrored half of the time; validation takes the central crop.

OUTDIR/curves.csv: iteration, training_loss and training_error (means over the iterations since
the row before, of the last classifier, on the batches trained on), validation_loss and
validation_error (of the whole validation set).
"""
import argparse
import logging
import os
import sys
from typing import Any, List, NamedTuple, Optional, Sequence

import imagenet_net
import run_folder
import training_options
from ddinit import argument_types, processes
from ddinit.argument_types import count, natural, positive
from ddinit.caffe_net import choose_device
from ddinit.prototxt import caffe_messages, read_definition
from image_batches import MEAN, Crops
from imagenet_curves import Curves
from lmdb_images import LmdbImages
from training import Measurement, Plan, exit_status, train
from training_net import image_source_layer

DATASET = "lmdb_images.LmdbImages"
MOMENTUM = 0.9


class Preset(NamedTuple):
    """A solver of the paper, and what the net that it belongs to is like."""

    learning_rate: float
    policy: str
    weight_decay: float
    iterations: int
    batch_size: int
    validate_every: int
    lrn: bool
    outputs: int


CAFFENET = Preset(0.01, "step", 5e-4, 320000, 256, 1000, lrn=True, outputs=1)
GOOGLENET = Preset(0.01, "poly", 2e-4, 2400000, 32, 4000, lrn=True, outputs=3)
PRESETS = {
    "caffenet": CAFFENET,
    "caffenet-nolrn": CAFFENET._replace(lrn=False),
    "googlenet": GOOGLENET,
    "googlenet-single": GOOGLENET._replace(outputs=1),
}
STEP, STEP_FACTOR = 100000, 0.1  # of the policy "step"
POWER = 0.5  # of the policy "poly"


# ---------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------

def run_training(arguments: argparse.Namespace, gpus: List[int]) -> int:
    """Train as the command line says; return the exit status.  Runs in a child process."""
    processes.log_to_stderr()
    curves = validation(arguments)
    plan = training_plan(arguments, gpus, curves)
    try:
        outcome = train(plan)
    finally:
        curves.close()
    if outcome.stopped_by is None:
        logging.info("wrote %s", os.path.join(plan.folder, "final.caffemodel"))
    return exit_status(outcome, plan)


def validation(arguments: argparse.Namespace) -> Curves:
    """Return what measures the validation set."""
    net = imagenet_net.classifier(read_definition(arguments.net), arguments.batch_size,
                                  arguments.classes)
    return Curves(arguments.folder, arguments.validate_every, net,
                  os.path.abspath(arguments.val), arguments.classes, crops_of(net, arguments),
                  arguments.workers)


def training_plan(arguments: argparse.Namespace, gpus: List[int], curves: Curves) -> Plan:
    """Return the plan of a run.  Raises ValueError where the net is not the preset's."""
    share, rest = divmod(arguments.batch_size, max(1, len(gpus)))
    if rest:
        raise ValueError("batches of %d images cannot be shared by %d GPUs"
                         % (arguments.batch_size, len(gpus)))
    net = imagenet_net.classifier(read_definition(arguments.net), share,
                                  arguments.classes, arguments.zero_last)
    check_preset(net, arguments.preset, arguments.net)
    data = {"path": os.path.abspath(arguments.train), "classes": arguments.classes}
    source = image_source_layer("data", (net.image.blob, "label"), DATASET, data,
                                crops_of(net, arguments), share, arguments.seed,
                                arguments.workers)
    return Plan(
        net=imagenet_net.training_definition(net, source), solver=solver_parameters(arguments),
        folder=arguments.folder, iterations=arguments.iterations, seed=arguments.seed,
        weights=None if arguments.weights == "none" else arguments.weights,
        fresh=net.last_layers if arguments.zero_last else [],
        snapshot_every=arguments.snapshot, resume=arguments.resume, gpus=gpus,
        settings=repeating(arguments), measurement=Measurement(
            imagenet_net.validation_definition(curves.net), arguments.validate_every,
            curves.measure))


def repeating(arguments: argparse.Namespace) -> Any:
    """Return what else a run is repeated with."""
    return {"paths": {"definition": os.path.abspath(arguments.net),
                      "train": os.path.abspath(arguments.train),
                      "val": os.path.abspath(arguments.val)},
            "definition_sha256": run_folder.sha256(arguments.net), "preset": arguments.preset,
            "train_images": len(LmdbImages(arguments.train, arguments.classes).labels),
            "classes": arguments.classes, "batch_size": arguments.batch_size,
            "learning_rate": arguments.lr, "zero_last": arguments.zero_last,
            "mean": list(arguments.mean), "validate_every": arguments.validate_every}


def crops_of(net: imagenet_net.Classifier, arguments: argparse.Namespace) -> Crops:
    """Return how the net's images are cut out of the database's: unscaled."""
    channels, height, width = net.image.shape[1:]
    if channels != len(arguments.mean):
        raise ValueError("%s: takes %d channels, --mean has %d"
                         % (arguments.net, channels, len(arguments.mean)))
    return Crops(height, width, min_scale=1.0, max_scale=1.0, mean=tuple(arguments.mean))


def check_preset(net: imagenet_net.Classifier, name: str, path: str) -> None:
    """Raise ValueError where a net is another variant than the one that a preset is for."""
    preset = PRESETS[name]
    lrn = any(layer.type == "LRN" for layer in net.layers)
    if lrn and not preset.lrn:
        raise ValueError("%s: has local response normalisations, preset %s is for a net without: "
                         "models/caffenet_nolrn" % (path, name))
    if len(net.outputs) > 1 and preset.outputs == 1:
        raise ValueError("%s: has the classifiers %s, preset %s is for a net with one"
                         % (path, ", ".join(net.outputs), name))


def solver_parameters(arguments: argparse.Namespace) -> Any:
    """Return the preset's solver at the learning rate of the command line."""
    preset = PRESETS[arguments.preset]
    solver = caffe_messages().SolverParameter(
        type="SGD", base_lr=arguments.lr, lr_policy=preset.policy, momentum=MOMENTUM,
        weight_decay=preset.weight_decay)
    if preset.policy == "step":
        solver.gamma, solver.stepsize = STEP_FACTOR, STEP
    else:
        solver.power = POWER
    return solver


# ---------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------

def main(argv: Optional[Sequence[str]] = None) -> int:
    """Train; return the exit status: 2 after an error, 130 and 143 after a signal."""
    return processes.command_line(_run, parse(argv), "train_imagenet.py")


def parse(argv: Optional[Sequence[str]]) -> argparse.Namespace:
    """Return what a command line asks for, completed by its preset."""
    arguments = _parser().parse_args(argv)
    preset = PRESETS[arguments.preset]
    for name, value in (("lr", preset.learning_rate), ("iterations", preset.iterations),
                        ("batch_size", preset.batch_size),
                        ("validate_every", preset.validate_every)):
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    return arguments


def _run(arguments: argparse.Namespace) -> int:
    gpus = arguments.gpu or []
    for gpu in gpus:
        choose_device(False, gpu)
    if not gpus:
        chosen = choose_device(arguments.cpu, None)
        gpus = [] if chosen is None else [chosen]
    return processes.in_child(run_training, arguments, gpus)


def _parser() -> argparse.ArgumentParser:
    parser = processes.Parser(prog="train_imagenet.py",
                            description=__doc__.splitlines()[0])
    add = parser.add_argument
    training_options.add_run(parser, "curves.csv, log.csv, run.json, snapshots and "
                                     "final.caffemodel")
    add("--train", required=True, metavar="LMDB", help="database of data/make_lmdb.py")
    add("--val", required=True, metavar="LMDB", help="another one, to measure on")
    add("--classes", type=count, default=1000, metavar="N", help="default %(default)d")
    add("--preset", choices=sorted(PRESETS), default="caffenet",
        help="the paper's solver for this net (default %(default)s)")
    add("--zero-last", action="store_true",
        help="let the classification layers start at 0, as the paper does for its own "
             "initialisations")
    add("--iterations", type=count, metavar="N", help="default: the preset's")
    add("--batch-size", type=count, metavar="N", help="images an iteration, of all GPUs together "
                                                      "(default: the preset's)")
    add("--lr", type=positive, metavar="RATE", help="initial learning rate (default: the preset's)")
    add("--mean", type=float, nargs="+", default=list(MEAN), metavar="VALUE",
        help="to subtract, blue green red (default: 104 117 123)")
    add("--validate-every", type=count, metavar="N",
        help="iterations between two rows of curves.csv (default: the preset's)")
    training_options.add_snapshots(parser, 10000)
    training_options.add_seed(parser)
    argument_types.add_workers(parser)
    device = parser.add_mutually_exclusive_group()
    device.add_argument("--cpu", action="store_true", help="compute on the CPU")
    device.add_argument("--gpu", type=natural, nargs="+", metavar="ID",
                        help="compute on these GPUs; several need a Caffe with NCCL (default: "
                             "GPU 0 where this Caffe can, else the CPU)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
