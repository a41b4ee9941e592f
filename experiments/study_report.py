"""What came out of study.py: every trial, a table, and learning curves.

    python experiments/study.py --data cifar10_mini.npz --out build/study
"""
import os
from typing import Any, Dict, List, Optional, Sequence

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import curves
import run_folder
from ddinit import files, results
from study_trial import training_losses

COLUMNS = ("initialisation", "method", "scaling", "tables", "learning_rate", "trials", "diverged",
           "test_accuracy", "test_error_of_mean", "validation_accuracy",
           "validation_error_of_mean")


def best_rates(name: str, trials: Sequence[Dict[str, Any]]) -> List[float]:
    """Return the learning rates of the trials of `name`, best first, among those tried most often.

    Best is the mean validation accuracy, of equals the smaller rate; a diverged trial counts as 0
    and rates of which all trials diverged are left out.
    """
    tried: Dict[float, List[Optional[float]]] = {}
    for trial in trials:
        if trial["initialisation"] == name:
            tried.setdefault(trial["learning_rate"], []).append(trial["validation_accuracy"])
    most = max((len(found) for found in tried.values()), default=0)
    means = {rate: sum(value or 0.0 for value in found) / most for rate, found in tried.items()
             if len(found) == most and any(value is not None for value in found)}
    return sorted(means, key=lambda rate: (-means[rate], rate))


def summary(rows: Sequence[Any], trials: Sequence[Dict[str, Any]]) -> List[Dict[str, Any]]:
    """Return a line of COLUMNS for every row of the study at its best rate, accuracies in %.

    Diverged trials are counted, not averaged.
    """
    lines = []
    for row in rows:
        mine = [trial for trial in trials if trial["initialisation"] == row.name]
        rate = next(iter(best_rates(row.name, mine)), None)
        chosen = [one for one in mine if one["learning_rate"] == rate]
        ended = [one for one in chosen if one["diverged"] is None]
        line = {"initialisation": row.name, "method": row.method, "scaling": row.scaling,
                "tables": " ".join(map(str, row.tables)), "learning_rate": rate,
                "trials": len(ended), "diverged": len((chosen or mine)) - len(ended)}
        for part in ("test", "validation"):
            values = [100 * one[part + "_accuracy"] for one in ended]
            mean, error = results.mean_and_error(values) if values else (None, None)
            line.update({part + "_accuracy": mean, part + "_error_of_mean": error})
        lines.append(line)
    return lines


def markdown(lines: Sequence[Dict[str, Any]]) -> str:
    """Return the lines of each of the paper's tables as a Markdown table."""
    text = []
    for table, title in ((2, "Initialisations (table 2)"), (1, "Scalings (table 1)")):
        mine = [line for line in lines if str(table) in line["tables"].split()]
        if mine:
            text += ["| %s | scaling | learning rate | validation accuracy | test accuracy |"
                     % title, "|---|---|---|---|---|"]
            text += ["| %s | %s | %s | %s | %s |" % (
                line["initialisation"], line["scaling"],
                "all diverged" if line["learning_rate"] is None else line["learning_rate"],
                _cell(line, "validation"), _cell(line, "test")) for line in mine] + [""]
    return "\n".join(text)


def _cell(line: Dict[str, Any], part: str) -> str:
    mean, error = line[part + "_accuracy"], line[part + "_error_of_mean"]
    if mean is None:
        return ""
    text = "%.1f" % mean if error is None else "%.1f ± %.1f" % (mean, error)
    return text + " (%d diverged)" % line["diverged"] if line["diverged"] else text


def write(rows: Sequence[Any], trials: Sequence[Dict[str, Any]], measure_every: int, out: str,
          provenance: Dict[str, Any]) -> None:
    """Write study.json, study.csv, study.md and study.png into `out`."""
    lines = summary(rows, trials)
    results.write_json(os.path.join(out, "study.json"), {
        **provenance, "rows": lines, "trials": trials})
    results.write_csv(os.path.join(out, "study.csv"), COLUMNS,
                      [[line[column] for column in COLUMNS] for line in lines])
    path = os.path.join(out, "study.md")
    with files.replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(markdown(lines))
    draw(rows, lines, trials, measure_every, out)


# ---------------------------------------------------------------------------------------------
# Learning curves
# ---------------------------------------------------------------------------------------------

def draw(rows: Sequence[Any], lines: Sequence[Dict[str, Any]],
         trials: Sequence[Dict[str, Any]], measure_every: int, out: str) -> None:
    """Draw training loss and validation accuracy at the chosen rates, a row for each table."""
    tables = [table for table in (2, 1) if any(table in row.tables for row in rows)]
    figure = Figure(figsize=(10, 0.4 + 3.6 * len(tables)))
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(tables), 2, squeeze=False)
    for table, (left, right) in zip(tables, axes):
        for row, line in zip(rows, lines):
            folders = [one["folder"] for one in trials
                       if one["initialisation"] == row.name and one["diverged"] is None
                       and one["learning_rate"] == line["learning_rate"]]
            if table in row.tables and folders:
                _draw_row(left, right, row.name, [os.path.join(out, one) for one in folders],
                          measure_every, "--" if row.scaling == "none" else "-")
        left.set_ylabel("training loss")
        right.set_ylabel("validation accuracy (%)")
        left.set_title("table %d" % table, fontsize=10)
        for axis in (left, right):
            axis.set_xlabel("iteration")
            axis.grid(alpha=0.3)
        left.legend(fontsize=7, loc="upper right")
    figure.tight_layout()
    with files.replacing(os.path.join(out, "study.png")) as temporary:
        figure.savefig(temporary, format="png", dpi=75)


def _draw_row(left: Any, right: Any, name: str, folders: Sequence[str], every: int,
              style: str) -> None:
    losses = curves.curve([training_losses(folder, every) for folder in folders],
                          "training_loss")
    accuracy = curves.curve([run_folder.measured(folder) for folder in folders],
                            "validation_accuracy")
    for axis, one, factor in ((left, losses, 1), (right, accuracy, 100)):
        line, = axis.plot(one.iterations, factor * one.mean, style, label=name, linewidth=1.3)
        axis.fill_between(one.iterations, factor * (one.mean - one.error),
                          factor * (one.mean + one.error), color=line.get_color(), alpha=0.2,
                          linewidth=0)
