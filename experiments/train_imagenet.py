"""Train a net to classify labeled images, as the paper trains on ImageNet (section 4.5).

    python experiments/train_imagenet.py models/caffenet/deploy.prototxt none build/reference \\
        --train build/train.lmdb --val build/val.lmdb
    python experiments/train_imagenet.py models/googlenet/deploy.prototxt kmeans.caffemodel \\
        build/kmeans --preset googlenet --last-std 0 --train build/train.lmdb --val build/val.lmdb

The presets are the solvers of the paper. caffenet: SGD at a rate of 0.01, times 0.1 every 100,000
of 320,000 iterations, momentum 0.9, weight decay 5e-4, batches of 256. googlenet: Caffe's 'quick'
solver, at 0.01 times the square root of the part of the 2,400,000 iterations that remains, weight
decay 2e-4, batches of 32. Training takes random crops, mirrored half of the time; validation takes
the central crop.

OUTDIR/curves.csv holds training_loss and training_error (of the last classifier, means over the
iterations since the row before) and validation_loss and validation_error (of all images of --val).
With --test, OUTDIR/result.json holds the loss and error of the trained net on other images.
"""
import argparse
import logging
import os
import sys
from typing import Any, Dict, List, NamedTuple, Optional, Sequence

from google.protobuf import text_format

from ddinit import files, processes, results
from ddinit.argument_types import count, not_negative, positive
from ddinit.caffemodel import load_weights
from ddinit.prototxt import build_net, caffe_messages, read_definition
from imagenet import nets
from imagenet.images import dataset_of
from imagenet.validation import Scores, training_means
from training import options, run_folder
from training.batches import MEAN, Crops, named_dataset
from training.loop import Measurement, Plan, run
from training.nets import image_source_layer


class Preset(NamedTuple):
    """A solver of the paper, and the batch size and interval of validation that belong to it."""

    solver: Dict[str, Any]
    batch_size: int
    validate_every: int


PRESETS = {
    "caffenet": Preset(
        {"type": "SGD", "base_lr": 0.01, "lr_policy": "step", "gamma": 0.1, "stepsize": 100000,
         "max_iter": 320000, "momentum": 0.9, "weight_decay": 5e-4}, 256, 1000),
    "googlenet": Preset(
        {"type": "SGD", "base_lr": 0.01, "lr_policy": "poly", "power": 0.5, "max_iter": 2400000,
         "momentum": 0.9, "weight_decay": 2e-4}, 32, 4000),
}


def run_training(arguments: argparse.Namespace, gpu: Optional[int]) -> int:
    """Train as the command line says; return the exit status. It runs in a child process."""
    processes.log_to_stderr()
    validation = scores(arguments, arguments.val)
    try:
        status = run(training_plan(arguments, gpu, validation))
    finally:
        validation.close()
    if not status and arguments.test is not None:
        test(arguments)
    return status


def training_plan(arguments: argparse.Namespace, gpu: Optional[int], validation: Scores) -> Plan:
    """Return the plan of a training run."""
    net = nets.classifier(read_definition(arguments.net), arguments.batch_size, arguments.classes,
                          arguments.last_std)
    data = {"path": os.path.abspath(arguments.train), "classes": arguments.classes}
    source = image_source_layer("data", (net.image.blob, "label"), dataset_of(arguments.train),
                                data, crops_of(net, arguments), arguments.batch_size,
                                arguments.seed, arguments.workers)

    def measure(caffe_net: Any, rows: List[Dict[str, float]]) -> Dict[str, float]:
        return {**training_means(rows), **{"validation_" + name: value for name, value
                                           in validation.measure(caffe_net).items()}}

    solver = solver_of(arguments)
    return Plan(
        net=nets.training_definition(net, source), solver=solver, folder=arguments.folder,
        iterations=arguments.iterations, seed=arguments.seed,
        weights=None if arguments.weights == "none" else arguments.weights,
        fresh=[] if arguments.last_std is None else net.last_layers,
        snapshot_every=arguments.snapshot, resume=arguments.resume, gpu=gpu,
        settings=settings(arguments, solver), measurement=Measurement(
            nets.validation_definition(validation.net), arguments.validate_every, measure))


def scores(arguments: argparse.Namespace, path: str) -> Scores:
    """Return what measures loss and error on the images of `path`."""
    net = nets.classifier(read_definition(arguments.net), arguments.batch_size, arguments.classes)
    return Scores(net, os.path.abspath(path), arguments.classes, crops_of(net, arguments),
                  arguments.workers)


def crops_of(net: nets.Classifier, arguments: argparse.Namespace) -> Crops:
    """Return how the images of the net are cut out: unscaled."""
    channels, height, width = net.image.shape[1:]
    if channels != len(arguments.mean):
        raise ValueError("%s takes images with %d channels, but --mean has %d values."
                         % (arguments.net, channels, len(arguments.mean)))
    return Crops(height, width, min_scale=1.0, max_scale=1.0, mean=tuple(arguments.mean))


def solver_of(arguments: argparse.Namespace) -> Any:
    """Return the SolverParameter of the preset or file, at the learning rate that was given."""
    solver = caffe_messages().SolverParameter(**PRESETS[arguments.preset].solver)
    if arguments.solver is not None:
        solver.Clear()
        try:
            text_format.Merge(files.read_text(arguments.solver), solver)
        except text_format.ParseError as error:
            raise ValueError("%s: not a solver (%s)" % (arguments.solver, error)) from error
    if arguments.lr is not None:
        solver.base_lr = arguments.lr
    return solver


def settings(arguments: argparse.Namespace, solver: Any) -> Dict[str, Any]:
    """Return what else a run is repeated with."""
    dataset = named_dataset(dataset_of(arguments.train),
                            {"path": arguments.train, "classes": arguments.classes})
    return {"paths": {"definition": os.path.abspath(arguments.net),
                      "train": os.path.abspath(arguments.train),
                      "val": os.path.abspath(arguments.val)},
            "definition_sha256": run_folder.sha256(arguments.net),
            "solver": text_format.MessageToString(solver),
            "train_images": len(dataset.labels), "classes": arguments.classes,
            "batch_size": arguments.batch_size, "last_std": arguments.last_std,
            "mean": list(arguments.mean), "validate_every": arguments.validate_every}


def test(arguments: argparse.Namespace) -> None:
    """Write the loss and error of the trained net on the images of --test."""
    tested = scores(arguments, arguments.test)
    net = build_net(nets.validation_definition(tested.net))
    load_weights(net, os.path.join(arguments.folder, "final.caffemodel"))
    measured = tested.measure(net)
    tested.close()
    results.write_json(os.path.join(arguments.folder, "result.json"), {
        "test_loss": measured["loss"], "test_error": measured["error"],
        **results.provenance(arguments.seed)})
    logging.info("test error %.4f", measured["error"])


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Train; return the exit status: 2 after an error, 130 or 143 after a signal."""
    return processes.command_line(_run, parse(argv), "train_imagenet.py")


def _run(arguments: argparse.Namespace) -> int:
    _complete(arguments)
    return options.run(arguments)


def parse(argv: Optional[Sequence[str]]) -> argparse.Namespace:
    """Return what a command line asks for."""
    parser = processes.Parser(prog="train_imagenet.py",
                              description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    options.add_run(parser, "curves.csv, log.csv, run.json, snapshots and final.caffemodel")
    add("--train", required=True, metavar="IMAGES", help="LMDB of data/make_lmdb.py, or an .npz "
        "file with images (uint8, n x height x width x 3, BGR) and labels")
    add("--val", required=True, metavar="IMAGES", help="images to measure on while training")
    add("--test", metavar="IMAGES", help="images to measure the trained net on")
    add("--classes", type=count, default=1000, metavar="N", help="default: %(default)d")
    solver = parser.add_mutually_exclusive_group()
    solver.add_argument("--preset", choices=sorted(PRESETS), default="caffenet",
                        help="solver of the paper for this net (default: %(default)s)")
    solver.add_argument("--solver", metavar="FILE.prototxt", help="another solver")
    add("--last-std", type=not_negative, metavar="STD", help="draw the weights of the "
        "classification layers anew from N(0, STD^2), with biases of 0. The paper takes 0 for its "
        "own initializations (section 4.5)")
    add("--iterations", type=count, metavar="N", help="default: max_iter of the solver")
    add("--batch-size", type=count, metavar="N", help="images (default: that of the preset)")
    add("--lr", type=positive, metavar="RATE",
        help="initial learning rate (default: that of the solver)")
    add("--mean", type=float, nargs="+", default=list(MEAN), metavar="VALUE",
        help="values to subtract from blue, green and red (default: 104 117 123)")
    add("--validate-every", type=count, metavar="N",
        help="iterations between two rows of curves.csv (default: that of the preset)")
    options.add_snapshots(parser, 10000)
    options.add_seed(parser)
    options.add_computing(parser)
    parser.set_defaults(function=run_training)
    return parser.parse_args(argv)


def _complete(arguments: argparse.Namespace) -> None:
    """Set what a command line leaves to the preset or solver."""
    preset = PRESETS[arguments.preset]
    arguments.batch_size = arguments.batch_size or preset.batch_size
    arguments.validate_every = arguments.validate_every or preset.validate_every
    arguments.iterations = arguments.iterations or solver_of(arguments).max_iter


if __name__ == "__main__":
    sys.exit(main())
