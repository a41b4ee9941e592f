"""Compare how fast nets learn from our weights and from their fillers: figures 3 and 4 in small.

    python experiments/study_curves.py --data cifar10_mini.npz --out build/small

It trains small nets in the image of CaffeNet and GoogLeNet (models/*_cifar*) on 32x32 images, from
the fillers of the reference and from weights of magic_init.py, whose last layers start at 0
(section 4.5). All curves of a figure have the same solver: that of the paper at a fixed rate, which
is 0.01 times the square root of 32 over the paper's batch size, because batches have 32 images.

OUT/figure3_loss.png, figure3_error.png and figure4_*.png show the curves, OUT/curves.json and
curves.csv hold means and standard errors over seeds. Trials that have ended are not repeated when
the command is given again, and others continue.
"""
import argparse
import collections
import functools
import logging
import os
import sys
from typing import Any, Dict, List, NamedTuple, Optional, Sequence

from ddinit import processes, results
from ddinit.argument_types import count
from ddinit.prototxt import caffe_messages, write_definition
from imagenet import curves
from studies import data, runs
from tables import formats
from training.trials import Runner

log = logging.getLogger("study_curves")

MODELS = os.path.join(os.path.dirname(runs.EXPERIMENTS), "models")
SIDE, CLASSES = 32, 10  # of the images that the nets are for
BATCH_SIZE = 32
IMAGES = 160  # that the nets are initialized from
# Fields of the paper's solvers, and their batch sizes.
SOLVERS = {"figure3": ({"momentum": 0.9, "weight_decay": 5e-4}, 256),
           "figure4": ({"momentum": 0.9, "weight_decay": 2e-4}, 32)}


class Curve(NamedTuple):
    """A curve of a figure: a net of models/, and the method of its weights."""

    figure: str
    name: str
    net: str
    method: str


CURVES = [
    Curve("figure3", "reference", "caffenet_cifar", "reference"),
    Curve("figure3", "reference, no LRN", "caffenet_cifar_nolrn", "reference"),
    Curve("figure3", "ours, Gaussian", "caffenet_cifar", "ours-gaussian"),
    Curve("figure3", "ours, k-means", "caffenet_cifar", "ours-kmeans"),
    Curve("figure3", "ours, k-means, no LRN", "caffenet_cifar_nolrn", "ours-kmeans"),
    Curve("figure4", "reference", "googlenet_cifar", "reference"),
    Curve("figure4", "reference, single classifier", "googlenet_cifar_single", "reference"),
    Curve("figure4", "ours, k-means", "googlenet_cifar", "ours-kmeans"),
    Curve("figure4", "ours, k-means, single classifier", "googlenet_cifar_single", "ours-kmeans"),
]


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Train all nets and draw their curves; return the exit status."""
    parser = processes.Parser(prog="study_curves.py", description=(__doc__ or "").splitlines()[0])
    data.add_arguments(parser)
    parser.add_argument("--seeds", metavar="N", type=count, default=3,
                        help="trials of each curve (default: %(default)d)")
    parser.add_argument("--iterations", metavar="N", type=count, default=300,
                        help="default: %(default)d")
    parser.add_argument("--validate-every", metavar="N", type=count, default=50,
                        help="iterations between two points of a curve (default: %(default)d)")
    arguments = parser.parse_args(argv)
    processes.log_to_stderr()
    return processes.command_line(lambda given: _run(given, argv), arguments, parser.prog)


def _run(arguments: argparse.Namespace, argv: Optional[Sequence[str]]) -> None:
    loaded = data.prepare(arguments.data, 0, 0, os.path.join(arguments.out, "data"), SIDE)
    if loaded.classes > CLASSES:
        raise ValueError("%s: there are %d classes, but the nets are for %d"
                         % (arguments.data, loaded.classes, CLASSES))
    for figure in SOLVERS:
        write_solver(figure, arguments)
    runner = runs.runner()
    with runner.signals():
        trials = runner.all([functools.partial(trial, runner, curve, seed, arguments)
                             for seed in range(arguments.seeds) for curve in CURVES],
                            arguments.jobs, "trials")
    report(trials, arguments, argv)


def write_solver(figure: str, arguments: argparse.Namespace) -> None:
    """Write the solver of a figure: noise grows with the root of what batches are smaller by."""
    fields, batch_size = SOLVERS[figure]
    write_definition(caffe_messages().SolverParameter(
        type="SGD", lr_policy="fixed", base_lr=0.01 * (BATCH_SIZE / batch_size) ** 0.5,
        max_iter=arguments.iterations, **fields), os.path.join(arguments.out, figure + ".prototxt"))


def trial(runner: Runner, curve: Curve, seed: int, arguments: argparse.Namespace,
          ) -> Dict[str, Any]:
    """Return what came of the training of a curve, running what is missing."""
    name = "%s_%s_%d" % (curve.net, curve.method, seed)
    images, weights = os.path.join(arguments.out, "data"), "none"
    definition, last = os.path.join(MODELS, curve.net, "deploy.prototxt"), []
    if curve.method != "reference":
        definition, weights = runs.initialized(
            runner, os.path.join(arguments.out, "start", name), definition, "--method",
            curve.method, "--data", os.path.join(images, "images"), "--images", IMAGES, "--seed",
            seed)
        last = ["--last-std", "0"]
    folder = os.path.join(arguments.out, "runs", name)
    outcome = runs.trained(runner, folder, runs.script(
        "train_imagenet.py", definition, weights, folder, *last, "--classes", CLASSES,
        "--train", os.path.join(images, "train.npz"),
        "--val", os.path.join(images, "validation.npz"),
        "--solver", os.path.join(arguments.out, curve.figure + ".prototxt"),
        "--batch-size", BATCH_SIZE, "--validate-every", arguments.validate_every,
        "--seed", seed, "--snapshot", 100, "--workers", 0, "--cpu"))
    return {"figure": curve.figure, "name": curve.name, "folder": folder, **outcome}


def report(trials: Sequence[Dict[str, Any]], arguments: argparse.Namespace,
           argv: Optional[Sequence[str]]) -> None:
    """Draw both figures, and write the values after a third of the iterations and in the end.

    Curves end where the first of their trials diverged.
    """
    rows: List[Dict[str, Any]] = []
    for figure in SOLVERS:
        mine = [run for run in trials if run["figure"] == figure]
        loaded = curves.read_runs([run["folder"] for run in mine], [run["name"] for run in mine])
        spans = curves.spans_within(loaded, [arguments.iterations // 3])
        for value in curves.VALUES:
            curves.draw(loaded, value, spans[-1:],
                        os.path.join(arguments.out, "%s_%s.png" % (figure, value)))
        lost = collections.Counter(run["name"] for run in mine if "diverged" in run)
        rows += [{"figure": figure, **row, "diverged": lost[row["name"]]}
                 for row in curves.summary(loaded, spans)]
    results.write_json(os.path.join(arguments.out, "curves.json"), {
        **results.provenance(None, argv), "rows": rows})
    formats.write_csv(os.path.join(arguments.out, "curves.csv"), list(rows[0]),
                      [list(row.values()) for row in rows])


if __name__ == "__main__":
    sys.exit(main())
