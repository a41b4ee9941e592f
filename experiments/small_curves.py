"""Figures 3 and 4 in small: how fast nets learn from our weights and from their fillers.

    python experiments/small_curves.py --data cifar10_mini.npz --out build/small

trains small nets in CaffeNet's and GoogLeNet's image (models/*_cifar*) on 32x32 images, each from
its reference fillers and from weights of magic_init.py, whose last layers start at 0 (paper,
section 4.5).  All curves of a figure have one solver: the paper's for CaffeNet or GoogLeNet in
batches of 32 and at a fixed rate, which is 0.01 times the root of 32 over the paper's batch size.
The seed of a trial is that of weights, data order and dropout.

OUT/figure3_loss.png, figure3_error.png, figure4_*.png; curves.json and curves.csv (means and
standard errors over trials);
OUT/runs holds the runs, which go on or are left alone when the command is given again.
"""
import argparse
import collections
import concurrent.futures
import logging
import multiprocessing
import os
import shutil
import subprocess
import sys
from typing import Any, List, NamedTuple, Optional, Sequence

import cv2
import numpy as np

import curves
import image_database
import study_data
import train_imagenet
from ddinit import processes, results
from ddinit.argument_types import count
from ddinit.prototxt import caffe_messages
from training import train

log = logging.getLogger("small_curves")

TOP = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SIDE, CLASSES = 32, 10  # of the images that the nets are for
BATCH_SIZE = 32
INIT_IMAGES = 160


class Case(NamedTuple):
    """A curve of a figure: a net of models/, and what it starts from; None are its fillers."""

    figure: str
    name: str
    net: str
    preset: str
    kind: Optional[str]


CASES = [
    Case("figure3", "reference", "caffenet_cifar", "caffenet", None),
    Case("figure3", "reference, no LRN", "caffenet_cifar_nolrn", "caffenet-nolrn", None),
    Case("figure3", "ours, Gaussian", "caffenet_cifar", "caffenet", "gaussian"),
    Case("figure3", "ours, k-means", "caffenet_cifar", "caffenet", "kmeans"),
    Case("figure3", "ours, k-means, no LRN", "caffenet_cifar_nolrn", "caffenet-nolrn", "kmeans"),
    Case("figure4", "reference", "googlenet_cifar", "googlenet", None),
    Case("figure4", "reference, single classifier", "googlenet_cifar_single", "googlenet-single",
         None),
    Case("figure4", "ours, k-means", "googlenet_cifar", "googlenet", "kmeans"),
    Case("figure4", "ours, k-means, single classifier", "googlenet_cifar_single",
         "googlenet-single", "kmeans"),
]


class Trial(NamedTuple):
    """A run: its case and seed, and its folder."""

    case: Case
    seed: int
    folder: str


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Train all cases and draw them; return the exit status."""
    parser = processes.Parser(prog="small_curves.py", description=__doc__.splitlines()[0])
    study_data.add_arguments(parser)
    parser.add_argument("--seeds", metavar="N", type=count, default=3,
                        help="trials of each case (default: %(default)d)")
    parser.add_argument("--iterations", metavar="N", type=count, default=300,
                        help="default: %(default)d")
    parser.add_argument("--validate-every", metavar="N", type=count, default=50,
                        help="iterations between two points of a curve (default: %(default)d)")
    arguments = parser.parse_args(argv)
    processes.log_to_stderr()
    return processes.command_line(lambda given: _run(given, argv), arguments, parser.prog)


def _run(arguments: argparse.Namespace, argv: Optional[Sequence[str]]) -> None:
    os.makedirs(os.path.join(arguments.out, "runs"), exist_ok=True)
    prepare_data(arguments.data, arguments.out)
    trials = [Trial(case, seed, os.path.join(arguments.out, "runs", "%s_%s_%d" % (
        case.net, case.kind or "reference", seed)))
        for seed in range(arguments.seeds) for case in CASES]
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # a core for each of the children
    run_all(trials, arguments)
    report(trials, arguments, argv)


# ---------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------

def prepare_data(path: str, out: str) -> None:
    """Write OUT/train.lmdb, OUT/val.lmdb and OUT/images, some of the training images as files.

    Raises ValueError where the file `path` does not hold images that the nets are for.
    """
    data = study_data.read(path)
    height, width = data.train_images.shape[1:3]
    if (height, width) != (SIDE, SIDE) or data.classes > CLASSES:
        raise ValueError("%s: images of %d x %d pixels and %d classes, not of %d x %d and at most "
                         "%d" % (path, height, width, data.classes, SIDE, SIDE, CLASSES))
    for split, images, labels in (("train", data.train_images, data.train_labels),
                                  ("val", data.test_images, data.test_labels)):
        database = os.path.join(out, split + ".lmdb")
        shutil.rmtree(database, ignore_errors=True)
        image_database.write_database(database, (
            (np.ascontiguousarray(image[:, :, ::-1].transpose(2, 0, 1)), int(label))
            for image, label in zip(images, labels)))
    folder = os.path.join(out, "images")
    os.makedirs(folder, exist_ok=True)
    for number, image in enumerate(data.train_images[:INIT_IMAGES]):
        cv2.imwrite(os.path.join(folder, "%04d.png" % number), image[:, :, ::-1])


# ---------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------

def run_all(trials: Sequence[Trial], arguments: argparse.Namespace) -> None:
    """Run trials side by side; whatever ends one of them ends all, after a snapshot."""
    with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
        futures = [pool.submit(run_trial, trial, arguments) for trial in trials]
        try:
            for number, future in enumerate(concurrent.futures.as_completed(futures), 1):
                future.result()
                log.info("%d of %d runs", number, len(trials))
        except BaseException:
            for future in futures:
                future.cancel()
            for child in multiprocessing.active_children():
                child.terminate()
            raise


def run_trial(trial: Trial, arguments: argparse.Namespace) -> None:
    """Initialise and train, or go on with what is there.

    Raises ValueError naming the run where it fails for another reason than that it diverged.
    """
    if ended(trial, arguments.iterations):
        return
    definition = os.path.join(TOP, "models", trial.case.net, "deploy.prototxt")
    weights = "none"
    if trial.case.kind is not None:
        weights = trial.folder + ".caffemodel"
        if not os.path.exists(weights):
            initialise(trial, definition, weights, os.path.join(arguments.out, "images"))
    try:
        processes.in_child(_train, training_options(trial, definition, weights, arguments))
    except ValueError as error:
        if not ended(trial, arguments.iterations):
            raise ValueError("%s: %s" % (trial.folder, error)) from error
        log.warning("%s: %s", trial.folder, error)


def initialise(trial: Trial, definition: str, weights: str, images: str) -> None:
    """Write a trial's first weights.  Raises ValueError with what magic_init.py says."""
    done = subprocess.run(
        [sys.executable, os.path.join(TOP, "magic_init.py"), definition, weights, "--data", images,
         "--type", str(trial.case.kind), "--calibrate", "--seed", str(trial.seed), "--cpu", "-q"],
        stderr=subprocess.PIPE, universal_newlines=True, check=False)
    if done.returncode:
        raise ValueError("%s: %s" % (trial.folder, done.stderr.strip()))


def ended(trial: Trial, iterations: int) -> bool:
    """Whether there is nothing left to do, because a run is finished or has diverged."""
    path = os.path.join(trial.folder, "run.json")
    if not os.path.exists(path):
        return False
    record = results.read_json(path)
    return diverged(trial) or bool(record.get("finished")) and record["iteration"] >= iterations


def diverged(trial: Trial) -> bool:
    """Whether a run ended because its loss was not finite."""
    return results.read_json(os.path.join(trial.folder, "run.json")).get("diverged") is not None


def training_options(trial: Trial, definition: str, weights: str,
                     arguments: argparse.Namespace) -> List[str]:
    """Return the command line of train_imagenet.py for a trial."""
    options = [
        definition, weights, trial.folder, "--preset", trial.case.preset, "--classes",
        str(CLASSES),
        "--train", os.path.join(arguments.out, "train.lmdb"),
        "--val", os.path.join(arguments.out, "val.lmdb"),
        "--iterations", str(arguments.iterations), "--batch-size", str(BATCH_SIZE),
        "--validate-every", str(arguments.validate_every), "--seed", str(trial.seed),
        "--workers", "0", "--snapshot", "100", "--resume", "--cpu"]
    return options if trial.case.kind is None else [*options, "--zero-last"]


def _train(options: Sequence[str]) -> None:
    """Train at a fixed rate.  In a child process."""
    arguments = train_imagenet.parse(options)
    measured = train_imagenet.validation(arguments)
    plan = train_imagenet.training_plan(arguments, [], measured)
    train(plan._replace(solver=fixed_rate(plan.solver, arguments.preset, arguments.batch_size)))


def fixed_rate(solver: Any, preset: str, batch_size: int) -> Any:
    """Return a preset's solver at the rate that it starts with, for smaller batches.

    Gradients' noise grows with the root of what a batch is smaller by; so the rate falls.
    """
    fixed = caffe_messages().SolverParameter()
    fixed.CopyFrom(solver)
    for field in ("gamma", "stepsize", "power"):
        fixed.ClearField(field)
    fixed.lr_policy = "fixed"
    fixed.base_lr *= (batch_size / train_imagenet.PRESETS[preset].batch_size) ** 0.5
    return fixed


# ---------------------------------------------------------------------------------------------
# Results
# ---------------------------------------------------------------------------------------------

def report(trials: Sequence[Trial], arguments: argparse.Namespace,
           argv: Optional[Sequence[str]]) -> None:
    """Draw both figures and write the table of all values at a third and at the end.

    Curves end where the first of their trials diverged.
    """
    rows = []
    for figure in ("figure3", "figure4"):
        mine = [trial for trial in trials if trial.case.figure == figure]
        runs = curves.read_runs([trial.folder for trial in mine],
                                [trial.case.name for trial in mine])
        spans = curves.spans_within(runs, [arguments.iterations // 3])
        for value in curves.VALUES:
            curves.draw(runs, value, spans[-1:],
                        os.path.join(arguments.out, "%s_%s.png" % (figure, value)))
        lost = collections.Counter(trial.case.name for trial in mine if diverged(trial))
        rows += [{"figure": figure, **row, "diverged": lost[row["name"]]}
                 for row in curves.summary(runs, spans)]
    results.write_json(os.path.join(arguments.out, "curves.json"), {
        **results.provenance(None, argv), "rows": rows})
    results.write_csv(os.path.join(arguments.out, "curves.csv"), list(rows[0]),
                      [list(row.values()) for row in rows])


if __name__ == "__main__":
    sys.exit(main())
