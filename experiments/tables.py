"""The paper's tables with its numbers, ours and the difference side by side (paper, section 4).

    python experiments/tables.py table2 --config experiments/paper.yaml --out build/tables

writes OUT/table2.md, .html, .tex and .csv from whatever runs there are by now: a cell that was not
run says so.  Ours is the mean average precision (11-point, %) over the seeds with its standard
error.  Where several learning rates were tried, images of the training set have chosen, never the
test set (choose_rate.py); the paper does not say how its own were chosen.  The CSV holds the rate.
"""
import argparse
import os
import sys
from html import escape
from typing import List, NamedTuple, Optional, Sequence, Tuple

import yaml  # type: ignore[import-untyped]

from cells import TABLES, Cell, Places, Table
from ddinit import files, processes, results

CSV_COLUMNS = ("row", "column", "paper", "ours", "difference", "standard_error", "seeds",
               "learning_rate", "note")
CHOICE = "Learning rates: of several, the best on val after training on train with one seed."


class Entry(NamedTuple):
    """A cell and what came out: `trials` in %, one for each seed that was run and did not diverge,
    at the learning rate `rate`."""

    cell: Cell
    trials: Sequence[float]
    seeds: int
    rate: Optional[str]
    note: str

    @property
    def mean(self) -> Optional[float]:
        """Mean of the trials in %, None where there is none."""
        return results.mean_and_error(self.trials)[0] if self.trials else None

    @property
    def error(self) -> Optional[float]:
        """Standard error of the mean, None of fewer than two trials."""
        return results.mean_and_error(self.trials)[1] if self.trials else None

    @property
    def difference(self) -> Optional[float]:
        """Ours less the paper's, in points of %."""
        return None if self.mean is None else self.mean - self.cell.paper


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Write the tables that the command line names; return the exit status."""
    parser = processes.Parser(prog="tables.py", description=__doc__.splitlines()[0])
    parser.add_argument("tables", nargs="+", choices=sorted(TABLES), metavar="TABLE",
                        help="which: %(choices)s")
    parser.add_argument("--config", required=True, metavar="FILE.yaml",
                        help="the configuration that the runs were made with")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write to")
    arguments = parser.parse_args(argv)
    processes.log_to_stderr()
    return processes.command_line(run, arguments, parser.prog)


def run(arguments: argparse.Namespace) -> None:
    """Write the tables."""
    places = Places(read_configuration(arguments.config))
    os.makedirs(arguments.out, exist_ok=True)
    for name in arguments.tables:
        entries = [entry(cell, places) for cell in TABLES[name].cells]
        path = os.path.join(arguments.out, name)
        _write(path + ".md", markdown(TABLES[name], entries))
        _write(path + ".html", html(TABLES[name], entries))
        _write(path + ".tex", latex(TABLES[name], entries))
        results.write_csv(path + ".csv", CSV_COLUMNS, [_csv_row(one) for one in entries])


def read_configuration(path: str) -> dict:
    """Return a configuration.  Raises ValueError naming the file where it is no YAML mapping."""
    try:
        with open(path, encoding="utf-8") as file:
            config = yaml.safe_load(file)
    except (OSError, yaml.YAMLError) as error:
        raise ValueError("%s: cannot read the configuration (%s)" % (path, error)) from error
    if not isinstance(config, dict) or "output" not in config:
        raise ValueError("%s: not a configuration of the experiments" % path)
    return config


def entry(cell: Cell, places: Places) -> Entry:
    """Return what the runs of a cell gave so far."""
    seeds = len(places.seeds(cell.run))
    missing = places.missing(cell.run)
    if missing is not None:
        return Entry(cell, [], seeds, None, "not run: %s is missing" % missing)
    trials, diverged = _trials([places.result(cell.run, seed) for seed in places.seeds(cell.run)])
    notes = ["diverged" if diverged == seeds else "%d of %d seeds diverged" % (diverged, seeds)] \
        if diverged else []
    if not trials:
        return Entry(cell, [], seeds, places.rate(cell.run), ", ".join(notes) or "not run")
    if len(trials) + diverged < seeds:
        notes.insert(0, "%d of %d seeds" % (len(trials) + diverged, seeds))
    return Entry(cell, trials, seeds, places.rate(cell.run), ", ".join(notes))


def _trials(paths: Sequence[str]) -> Tuple[List[float], int]:
    """Return mAP in % of the runs that there are, and how many of them diverged."""
    found = [results.read_json(path) for path in paths if os.path.exists(path)]
    return ([100 * one["mAP"] for one in found if "mAP" in one],
            sum("diverged" in one for one in found))


# ---------------------------------------------------------------------------------------------
# Formats
# ---------------------------------------------------------------------------------------------

def markdown(table: Table, entries: Sequence[Entry]) -> str:
    """Return a table whose cells read 'paper / ours ± standard error (difference)'."""
    lines = ["%s; mean average precision in %%." % table.title, "",
             "Cells: paper / ours ± standard error over seeds (difference). " + _seeds(entries), "",
             CHOICE, "",
             "| | %s |" % " | ".join(table.columns),
             "| --- |" + " --- |" * len(table.columns)]
    for row in table.rows:
        texts = [_text(_at(entries, row, column), "±") for column in table.columns]
        lines.append("| %s | %s |" % (row, " | ".join(texts)))
    return "\n".join(lines) + "\n"


def latex(table: Table, entries: Sequence[Entry]) -> str:
    """Return the same as a tabular, which needs no package."""
    lines = ["%% %s; mean average precision in %%." % table.title,
             "% paper / ours, standard error over seeds, (difference)", "% " + CHOICE,
             r"\begin{tabular}{l%s}" % ("c" * len(table.columns)), r"\hline",
             " & ".join([""] + [_escaped(column) for column in table.columns]) + r" \\", r"\hline"]
    for row in table.rows:
        texts = [_escaped(_text(_at(entries, row, column), r"$\pm$")) for column in table.columns]
        lines.append(" & ".join([_escaped(row)] + texts) + r" \\")
    return "\n".join(lines + [r"\hline", r"\end{tabular}"]) + "\n"


def html(table: Table, entries: Sequence[Entry]) -> str:
    """Return the same as a page."""
    lines = ["<!DOCTYPE html>", '<meta charset="utf-8">', "<title>%s</title>" % escape(table.title),
             "<style>body{font-family:sans-serif} table{border-collapse:collapse}",
             "td,th{padding:.3em .8em;border-bottom:1px solid #ccc;text-align:left}</style>",
             "<h1>%s</h1>" % escape(table.title),
             "<p>Mean average precision in %: paper / ours ± standard error over seeds "
             "(difference). " + _seeds(entries) + "</p>", "<p>%s</p>" % CHOICE, "<table>",
             _html_row("th", [""] + list(table.columns))]
    for row in table.rows:
        texts = [_text(_at(entries, row, column), "±") for column in table.columns]
        lines.append(_html_row("td", [row] + texts))
    return "\n".join(lines + ["</table>"]) + "\n"


def _html_row(tag: str, texts: Sequence[str]) -> str:
    return "<tr>%s</tr>" % "".join("<%s>%s</%s>" % (tag, escape(text), tag) for text in texts)


def _at(entries: Sequence[Entry], row: str, column: str) -> Optional[Entry]:
    return next((one for one in entries if (one.cell.row, one.cell.column) == (row, column)), None)


def _text(found: Optional[Entry], plus_minus: str) -> str:
    if found is None:
        return "-"
    if found.mean is None or found.difference is None:
        return "%.1f / %s" % (found.cell.paper, found.note.split(":")[0])
    error = "" if found.error is None else " %s %.1f" % (plus_minus, found.error)
    note = " [%s]" % found.note if found.note else ""
    return "%.1f / %.1f%s (%+.1f)%s" % (found.cell.paper, found.mean, error, found.difference, note)


def _seeds(entries: Sequence[Entry]) -> str:
    counts = sorted({one.seeds for one in entries})
    return "Seeds: %s." % ", ".join(str(count) for count in counts)


def _escaped(text: str) -> str:
    return text.replace("&", r"\&").replace("%", r"\%").replace("_", r"\_")


def _csv_row(found: Entry) -> List[object]:
    cell = found.cell
    numbers = [None if number is None else round(number, 4)
               for number in (found.mean, found.difference, found.error)]
    return [cell.row, cell.column, cell.paper, *numbers, len(found.trials), found.rate, found.note]


def _write(path: str, text: str) -> None:
    with files.replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(text)


if __name__ == "__main__":
    sys.exit(main())
