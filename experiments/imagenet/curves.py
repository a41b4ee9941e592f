"""Draw training and validation curves, averaged over trials (figures 3 and 4).

A run is a folder with a curves.csv of train_imagenet.py. Runs of the same name are trials, shown as
their mean and its standard error.
"""
import argparse
import os
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
from matplotlib.figure import Figure

from ddinit import files, processes, results
from ddinit.argument_types import count
from tables import formats
from training.run_folder import read_table

PARTS = ("training", "validation")
VALUES = ("loss", "error")
SPANS = (10000, 100000)  # iterations; the last row of axes shows all of them


class Curve(NamedTuple):
    """A value over iterations (n,): its mean over `trials` runs and standard error, both (n,).

    The error of a single run is 0.
    """

    iterations: np.ndarray
    mean: np.ndarray
    error: np.ndarray
    trials: int


Runs = Dict[str, List[List[Dict[str, float]]]]  # the rows of each trial's curves.csv, by name


def command(figure: str, about: str, argv: Optional[Sequence[str]] = None) -> int:
    """Draw the figure that a command line asks for; return the exit status."""
    parser = processes.Parser(prog="%s.py" % figure, description=about)
    add = parser.add_argument
    add("out", metavar="OUT.png", help="figure to write; OUT.json receives its numbers")
    add("folders", metavar="OUTDIR", nargs="+", help="folder of a run of train_imagenet.py")
    add("--names", metavar="NAME", nargs="+", help="a name for each OUTDIR; trials share a name "
                                                   "(default: the names of the folders)")
    add("--value", choices=VALUES, default="loss", help="default: %(default)s")
    add("--spans", metavar="ITERATIONS", type=count, nargs="*", default=list(SPANS),
        help="numbers of first iterations that are shown, before all of them (default: 10000 "
             "100000)")
    return processes.command_line(lambda given: _run(given, argv), parser.parse_args(argv),
                                  parser.prog)


def _run(arguments: argparse.Namespace, argv: Optional[Sequence[str]]) -> None:
    files.check_writable(arguments.out)
    runs = read_runs(arguments.folders, arguments.names)
    spans = spans_within(runs, arguments.spans)
    draw(runs, arguments.value, spans, arguments.out)
    results.write_json(os.path.splitext(arguments.out)[0] + ".json", {
        **results.provenance(None, argv), "value": arguments.value, "runs": summary(runs, spans)})


def read_runs(folders: Sequence[str], names: Optional[Sequence[str]] = None) -> Runs:
    """Return the curves in folders by name, in the order in which the names first appear.

    Raises ValueError for a folder without curves, and where there are fewer or more names.
    """
    if names is not None and len(names) != len(folders):
        raise ValueError("There are %d names for %d folders." % (len(names), len(folders)))
    runs: Runs = {}
    for number, folder in enumerate(folders):
        rows = read_table(os.path.join(folder, "curves.csv"))
        if not rows:
            raise ValueError("%s: the folder has no curves.csv of train_imagenet.py" % folder)
        for part in PARTS:
            for value in VALUES:
                if "%s_%s" % (part, value) not in rows[0]:
                    raise ValueError("%s: curves.csv has no column %s_%s" % (folder, part, value))
        name = names[number] if names is not None else os.path.basename(os.path.abspath(folder))
        runs.setdefault(name, []).append(rows)
    return runs


def curve(trials: Sequence[Sequence[Dict[str, float]]], column: str) -> Curve:
    """Return the mean of a column over trials, at the iterations that all of them have.

    Values of NaN are left out, such as the training loss before the first iteration.
    """
    by_iteration = [{int(row["iteration"]): row[column] for row in rows
                     if not np.isnan(row[column])} for rows in trials]
    common = sorted(set.intersection(*[set(values) for values in by_iteration]))
    pairs: List[Tuple[float, Optional[float]]] = [
        formats.mean_and_error([values[iteration] for values in by_iteration])
        for iteration in common]
    return Curve(np.array(common, np.int64), np.array([mean for mean, _ in pairs]),
                 np.array([error or 0.0 for _, error in pairs]), len(trials))


def spans_within(runs: Runs, spans: Sequence[int]) -> List[int]:
    """Return the spans that are shorter than the longest run, and the length of that run."""
    longest = max(int(rows[-1]["iteration"]) for trials in runs.values() for rows in trials)
    return [span for span in sorted(set(spans)) if span < longest] + [longest]


def draw(runs: Runs, value: str, spans: Sequence[int], path: str) -> None:
    """Draw a row of axes for each span, with training on the left and validation on the right."""
    figure = Figure(figsize=(9, 0.8 + 2.8 * len(spans)))
    axes = figure.subplots(len(spans), len(PARTS), squeeze=False)
    for column, part in enumerate(PARTS):
        curves = {name: curve(trials, "%s_%s" % (part, value)) for name, trials in runs.items()}
        for span, axis in zip(spans, axes[:, column]):
            for name, averaged in curves.items():
                _draw_curve(axis, name, averaged, span)
            axis.set_xlim(0, span)
            axis.set_xlabel("iteration")
            axis.set_ylabel("%s %s" % (part, value))
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncol=min(3, len(labels)), frameon=False)
    lines = -(-len(labels) // 3)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.28 * lines / figure.get_figheight()))
    with files.replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=90)


def _draw_curve(axis: Any, name: str, averaged: Curve, span: int) -> None:
    shown = averaged.iterations <= span
    label = name if averaged.trials == 1 else "%s (%d trials)" % (name, averaged.trials)
    line, = axis.plot(averaged.iterations[shown], averaged.mean[shown], label=label, linewidth=1.2)
    if averaged.trials > 1:
        axis.fill_between(averaged.iterations[shown], (averaged.mean - averaged.error)[shown],
                          (averaged.mean + averaged.error)[shown], color=line.get_color(),
                          alpha=0.2, linewidth=0)


def summary(runs: Runs, spans: Sequence[int]) -> List[Dict[str, Any]]:
    """Return the mean and standard error of each name and column at the end of each span.

    That is at the last iteration of the span that all trials have. The error of a single trial is
    None.
    """
    rows = []
    for name, trials in runs.items():
        for span in spans:
            for column in ["%s_%s" % (part, value) for value in VALUES for part in PARTS]:
                averaged = curve(trials, column)
                place = int(np.searchsorted(averaged.iterations, span, side="right")) - 1
                if place >= 0:
                    error = float(averaged.error[place]) if averaged.trials > 1 else None
                    rows.append({"name": name, "trials": averaged.trials, "value": column,
                                 "iteration": int(averaged.iterations[place]),
                                 "mean": float(averaged.mean[place]), "error": error})
    return rows
