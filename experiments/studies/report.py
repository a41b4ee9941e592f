"""Report a study: every trial, tables with means and standard errors, and learning curves."""
import os
from typing import Any, Dict, Optional, Sequence

from ddinit import results
from imagenet import curves
from studies.choice import best_rates, is_extreme, trials_of
from tables import formats
from tables.cells import SOLVER_COLUMNS, TABLES

COLUMNS = ("row", "column", "scaling", "tables", "learning_rate", "last_rate_tried", "trials",
           "diverged", "validation_accuracy", "validation_standard_error", "test_accuracy",
           "test_standard_error", "paper_mAP")
TITLES = {1: "Scalings (table 1)", 2: "Initializations (table 2)"}


def write(rows: Sequence[Any], trials: Sequence[Dict[str, Any]], out: str,
          provenance: Dict[str, Any]) -> None:
    """Write study.json, study.csv, study.md, table1.png and table2.png into `out`."""
    lines = [summary(row, trials) for row in rows]
    results.write_json(os.path.join(out, "study.json"), {
        **provenance, "rows": lines, "trials": trials})
    formats.write_csv(os.path.join(out, "study.csv"), COLUMNS,
                      [[line[column] for column in COLUMNS] for line in lines])
    formats.write(os.path.join(out, "study.md"), markdown(lines))
    for table in TITLES:
        draw(table, [row for row in rows if table in row.tables], trials, out)


def summary(row: Any, trials: Sequence[Dict[str, Any]]) -> Dict[str, Any]:
    """Return the values of COLUMNS of a row at its best learning rate, with accuracies in %.

    Trials that diverged are counted, but not averaged.
    """
    rate = next(iter(best_rates(row, trials)), None)
    chosen = [trial for trial in trials_of(row, trials) if rate in (trial["learning_rate"], None)]
    ended = [trial for trial in chosen if trial["diverged"] is None]
    line = {"row": row.name, "column": row.column, "scaling": row.scaling,
            "tables": " ".join(map(str, row.tables)), "learning_rate": rate,
            "last_rate_tried": rate is not None and is_extreme(row, rate, trials),
            "trials": len(ended), "diverged": len(chosen) - len(ended), "paper_mAP": paper(row)}
    for part in ("validation", "test"):
        values = [100 * trial[part + "_accuracy"] for trial in ended]
        mean, error = formats.mean_and_error(values) if values else (None, None)
        line.update({part + "_accuracy": mean, part + "_standard_error": error})
    return line


def paper(row: Any) -> Optional[float]:
    """Return the mean average precision in % that the paper has for a row, or None."""
    net, solver = SOLVER_COLUMNS[row.column]
    method = "ours-gaussian" if row.method == "gaussian" else row.method
    wanted = ("classification", net, method, row.scaling, solver)
    selected = [cell.paper for number in row.tables for cell in TABLES["table%d" % number].cells
             if tuple(cell.run) == wanted
                and not (row.literal or row.keep_last or row.output_std)]
    return selected[0] if selected else None


def markdown(lines: Sequence[Dict[str, Any]]) -> str:
    """Return the lines of each of the paper's tables as a Markdown table."""
    parts = []
    for table, title in TITLES.items():
        rows = [[line["row"], line["scaling"], line["column"], _rate(line),
                 _accuracy(line, "validation"), _accuracy(line, "test"),
                 "" if line["paper_mAP"] is None else "%.1f" % line["paper_mAP"]]
                for line in lines if str(table) in line["tables"].split()]
        if rows:
            parts.append(formats.markdown(
                [title, "scaling", "solver", "learning rate", "validation accuracy in %",
                 "test accuracy in %", "paper's mAP"], rows))
    return "\n".join(parts)


def _rate(line: Dict[str, Any]) -> str:
    if line["learning_rate"] is None:
        return "all diverged"
    return "%g%s" % (line["learning_rate"], ", the last one" * line["last_rate_tried"])


def _accuracy(line: Dict[str, Any], part: str) -> str:
    mean, error = line[part + "_accuracy"], line[part + "_standard_error"]
    if mean is None:
        return ""
    text = "%.1f" % mean if error is None else "%.1f ± %.1f" % (mean, error)
    return text + " (%d diverged)" % line["diverged"] if line["diverged"] else text


def draw(table: int, rows: Sequence[Any], trials: Sequence[Dict[str, Any]], out: str) -> None:
    """Draw the errors in training and validation of a table's rows at their best rates."""
    folders, names = [], []
    for row in rows:
        rate = next(iter(best_rates(row, trials)), None)
        for trial in trials_of(row, trials):
            if trial["learning_rate"] == rate and trial["diverged"] is None:
                folders.append(os.path.join(out, trial["folder"]))
                names.append(row.name if row.column == "SGD" else "%s, %s"
                             % (row.name, row.column))
    if folders:
        selected = curves.read_runs(folders, names)
        curves.draw(selected, "error", curves.spans_within(selected, []),
                    os.path.join(out, "table%d.png" % table))
