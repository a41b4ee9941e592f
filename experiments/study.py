"""Compare initializations with few labels: tables 1 and 2 of the paper on small images.

    python experiments/study.py --data cifar10_5k.npz --out build/study
    python experiments/study.py --data cifar10_5k.npz --out build/study \\
        --start 'another tool=build/others/seed{seed}.caffemodel'

It trains a small net in CaffeNet's image from every row of experiments/study.yaml, at several
learning rates. As in the authors' released evaluation, the last layer is drawn anew in all rows but
those that keep it. Images that are held back from training choose the rate; the test images choose
nothing. OUT/study.json holds every trial, OUT/study.csv and study.md the means and standard errors
over seeds, and OUT/table1.png and table2.png the learning curves. Trials that have ended are not
repeated when the command is given again, and others continue.
"""
import argparse
import functools
import logging
import os
import sys
from typing import Any, Dict, List, NamedTuple, Optional, Sequence

from ddinit import processes, results
from ddinit.prototxt import caffe_messages, image_layers, read_definition, write_definition
from studies import data, report, runs
from studies.choice import best_rates, next_rate
from tables.cells import SOLVER_COLUMNS
from tables.configuration import read_configuration
from training.nets import AFFINE
from training.run_folder import read_table
from training.starts import definition_of
from training.trials import Runner

log = logging.getLogger("study")

HERE = os.path.dirname(os.path.abspath(__file__))
GAMMA = 0.5  # the learning rate is halved


class Row(NamedTuple):
    """A row of the result in one column, which is a net and a solver.

    weights    pattern of the caffemodels of another tool, with {seed}; None: those of `method`
    keep_last  whether the last layer starts as initialized, and is not drawn anew
    """

    name: str
    column: str
    method: str
    scaling: str
    tables: Sequence[int]
    literal: bool = False
    output_std: Optional[float] = None
    weights: Optional[str] = None
    keep_last: bool = False


class Study(NamedTuple):
    """What all trials share.

    settings   the configuration
    nets       definitions by name, with an output for each class
    classes, iterations   numbers of them
    out        folder of the study
    runner     runs commands
    """

    settings: Dict[str, Any]
    nets: Dict[str, str]
    classes: int
    iterations: int
    out: str
    runner: Runner


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the study; return the exit status."""
    parser = processes.Parser(prog="study.py", description=(__doc__ or "").splitlines()[0])
    data.add_arguments(parser)
    parser.add_argument("--config", metavar="FILE.yaml", nargs="+",
                        default=[os.path.join(HERE, "study.yaml")],
                        help="what to run; later files replace keys of earlier ones (default: "
                             "study.yaml beside this script)")
    parser.add_argument("--start", metavar="NAME=FILE", action="append", type=_start, default=[],
                        help="add a row of weights from caffemodels of another tool; {seed} in "
                             "FILE stands for the seed")
    arguments = parser.parse_args(argv)
    processes.log_to_stderr()
    return processes.command_line(lambda given: _run(given, argv), arguments, parser.prog)


def _start(text: str) -> Sequence[str]:
    name, equals, pattern = text.partition("=")
    if not (name and equals and pattern) or "/" in name or name.startswith("."):
        raise argparse.ArgumentTypeError("'%s' is not NAME=FILE" % text)
    return name, pattern


def _run(arguments: argparse.Namespace, argv: Optional[Sequence[str]]) -> None:
    settings = read_configuration(arguments.config, os.path.join(HERE, "study.schema.yaml"))
    rows = rows_of(settings, arguments.start)
    study = prepare(arguments.data, settings, os.path.dirname(arguments.config[0]), arguments.out)
    with study.runner.signals():
        trials = run_all(study, rows, arguments.jobs)
    report.write(rows, trials, arguments.out, {
        **results.provenance(None, argv), "settings": settings, "iterations": study.iterations})
    with open(os.path.join(arguments.out, "study.md"), encoding="utf-8") as file:
        print(file.read(), end="")


def rows_of(settings: Dict[str, Any], starts: Sequence[Sequence[str]]) -> List[Row]:
    """Return the rows of a configuration in the columns that are run, and those from files.

    Raises ValueError naming a file that does not exist.
    """
    rows = [Row(name, column, row["method"], row["scaling"], row["tables"],
                row.get("literal", False), row.get("output_std"),
                keep_last=row.get("keep_last", False))
            for name, row in settings["rows"].items()
            for column in row.get("columns", ["SGD"]) if column in settings["columns"]]
    for name, pattern in starts:
        for seed in settings["seeds"]:
            if not os.path.isfile(pattern.replace("{seed}", str(seed))):
                raise ValueError("--start: %s: there is no such file"
                                 % pattern.replace("{seed}", str(seed)))
        rows.append(Row(name, "SGD", "from files", "none", [2], weights=pattern))
    return rows


def prepare(path: str, settings: Dict[str, Any], folder: str, out: str) -> Study:
    """Lay out data and nets below `out`. Raises ValueError where they do not fit each other."""
    os.makedirs(out, exist_ok=True)
    nets, images = {}, None
    for name, net in settings["nets"].items():
        definition = read_definition(os.path.join(folder, net))
        layers, image = image_layers(definition, 1)
        assert image is not None  # because we asked for a batch of 1
        if images is None:
            images = data.prepare(path, settings["validation_images"], settings["pad"],
                                  os.path.join(out, "data"), image.shape[2])
        names = [layer.name for layer in layers if layer.type in AFFINE]
        last = next(layer for layer in definition.layer if layer.name == names[-1])
        getattr(last, AFFINE[last.type]).num_output = images.classes
        nets[name] = os.path.join(out, name + ".prototxt")
        write_definition(definition, nets[name])
    assert images is not None  # because the schema requires a net
    trained = len(images.train_labels) - settings["validation_images"]
    iterations = max(1, settings["epochs"] * trained // settings["batch_size"])
    return Study(settings, nets, images.classes, iterations, out, runs.runner())


def run_all(study: Study, rows: Sequence[Row], jobs: int) -> List[Dict[str, Any]]:
    """Return all trials: all rates with the first seed, and the best of them with all seeds."""
    settings, first = study.settings, study.settings["seeds"][0]
    wanted = [(row, rate, first) for row in rows
              for rate in settings["learning_rates"][SOLVER_COLUMNS[row.column][1]]]
    trials: List[Dict[str, Any]] = []
    for _ in range(settings["widen"] + 1):
        trials += run_some(study, wanted, jobs)
        wanted = [(row, rate, first) for row in rows
                  for rate in next_rate(best_rates(row, trials), trials, row)]
    return trials + run_some(study, [
        (row, rate, seed) for seed in settings["seeds"][1:] for row in rows
        for rate in best_rates(row, trials)[:settings["finalists"]]], jobs)


def run_some(study: Study, wanted: Sequence[Any], jobs: int) -> List[Dict[str, Any]]:
    """Return the trials of (row, learning rate, seed), after all that they start from."""
    starts = {(row.name, SOLVER_COLUMNS[row.column][0], seed): row for row, _, seed in wanted}
    study.runner.all([functools.partial(start, study, row, net, seed)
                      for (_, net, seed), row in starts.items()], jobs, "initializations")
    return study.runner.all([
        functools.partial(trial, study, *arguments) for arguments in wanted], jobs, "trials")


def trial(study: Study, row: Row, rate: float, seed: int) -> Dict[str, Any]:
    """Return what came of a training from a row at a learning rate, running what is missing."""
    settings = study.settings
    net, solver = SOLVER_COLUMNS[row.column]
    definition, weights = start(study, row, net, seed)
    folder = os.path.join(study.out, "trials", row.name, row.column, "lr%g" % rate,
                          "seed%d" % seed)
    images = os.path.join(study.out, "data")
    fresh = [] if row.keep_last else ["--last-std", settings["last_std"]]
    outcome = runs.trained(study.runner, folder, runs.script(
        "train_imagenet.py", definition, weights, folder, *fresh,
        "--train", os.path.join(images, "train.npz"),
        "--val", os.path.join(images, "validation.npz"),
        "--test", os.path.join(images, "test.npz"), "--classes", study.classes,
        "--solver", solver_file(study, solver, rate), "--batch-size", settings["batch_size"],
        "--validate-every", -(-study.iterations // settings["validations"]), "--seed", seed,
        "--snapshot", max(1, study.iterations // 4), "--workers", 0, "--cpu"))
    result = {"row": row.name, "column": row.column, "learning_rate": rate, "seed": seed,
             "folder": os.path.relpath(folder, study.out), "diverged": outcome.get("diverged"),
             "validation_accuracy": None, "test_accuracy": None}
    if "diverged" not in outcome:
        last = read_table(os.path.join(folder, "curves.csv"))[-1]
        test = results.read_json(os.path.join(folder, "result.json"))
        result.update(validation_accuracy=1 - last["validation_error"],
                     test_accuracy=1 - test["test_error"])
    return result


def start(study: Study, row: Row, net: str, seed: int) -> Sequence[str]:
    """Return the definition and the caffemodel that a trial starts from."""
    if row.weights is not None:
        weights = row.weights.replace("{seed}", str(seed))
        return definition_of(study.nets[net], weights), weights
    folder = os.path.join(study.out, "start", net, row.name, "seed%d" % seed)
    options = ["--literal"] * row.literal
    if row.output_std is not None:
        options += ["--output-std", str(row.output_std)]
    return runs.initialized(
        study.runner, folder, study.nets[net], "--method", row.method, "--scaling", row.scaling,
        "--data", os.path.join(study.out, "data", "images"),
        "--images", study.settings["initialization_images"], "--seed", seed, *options)


def solver_file(study: Study, kind: str, rate: float) -> str:
    """Return the file of a solver at a learning rate that is halved after equal parts."""
    path = os.path.join(study.out, "%s_lr%g.prototxt" % (kind, rate))
    if not os.path.exists(path):
        write_definition(caffe_messages().SolverParameter(
            type=kind, base_lr=rate, lr_policy="step", gamma=GAMMA,
            stepsize=max(1, -(-study.iterations // study.settings["parts"])),
            max_iter=study.iterations, **study.settings["solvers"][kind]), path)
    return path


if __name__ == "__main__":
    sys.exit(main())
