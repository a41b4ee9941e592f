"""Show the paper's tables with its numbers, ours and their differences side by side (section 4).

Whatever has been run is shown; the other cells say that they have not been run. Ours is the mean
over seeds, with its standard error, of both average precisions: with the 11 points of VOC2007, and
as the area under the precision-recall curve.
"""
import argparse
import os
from typing import Any, Dict, List, NamedTuple, Optional, Sequence

from ddinit import results
from tables import formats
from tables.cells import TABLES, Cell, Places, Table
from tables.configuration import read_configuration

SCHEMA = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))),
                      "config.schema.yaml")
MEASURES = {"11_points": "11 points", "area": "area"}
CSV_COLUMNS = ["row", "column", "paper", "seeds", "learning_rate", "note"] + [
    "%s_%s" % (number, measure) for measure in MEASURES
    for number in ("ours", "difference", "standard_error")]
CELLS = ("Cells: the mean average precision in % of the paper / ours ± standard error over seeds "
         "(difference to the paper), with 11 points and as the area.")
CHOICE = ("Learning rates: of several, the best one (11 points) on val after training on train "
          "with one seed.")


class Entry(NamedTuple):
    """A cell and what came out.

    trials   average precisions in % by measure, one for each seed that was run without diverging
    seeds    number of seeds that the cell has in the end
    rate     the learning rate, or None before it is chosen
    note     what is missing
    """

    cell: Cell
    trials: Dict[str, List[float]]
    seeds: int
    rate: Optional[str]
    note: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the tables, --config and --out."""
    parser.add_argument("tables", nargs="+", choices=sorted(TABLES), metavar="TABLE",
                        help="%(choices)s")
    parser.add_argument("--config", required=True, metavar="FILE.yaml",
                        help="configuration of the runs")
    parser.add_argument("--out", required=True, metavar="DIR",
                        help="folder for TABLE.md and TABLE.csv")


def run(arguments: argparse.Namespace) -> None:
    """Write the tables."""
    places = Places(read_configuration([arguments.config], SCHEMA))
    os.makedirs(arguments.out, exist_ok=True)
    for name in arguments.tables:
        table = TABLES[name]
        entries = [entry(cell, places) for cell in table.cells]
        notes = [CELLS, "Seeds: %s." % ", ".join(
            map(str, sorted({entry.seeds for entry in entries}))), CHOICE]
        path = os.path.join(arguments.out, name)
        formats.write(path + ".md", "\n\n".join([table.title + ".", *notes, formats.markdown(
            ["", *table.columns], grid(table, entries))]))
        formats.write_csv(path + ".csv", CSV_COLUMNS, [_csv_row(entry) for entry in entries])


def entry(cell: Cell, places: Places) -> Entry:
    """Return what the runs of a cell have given so far."""
    seeds = places.seeds(cell.run)
    missing = places.missing(cell.run)
    if missing is not None:
        return Entry(cell, {}, len(seeds), None, "not run: %s is missing" % missing)
    paths = [places.result(cell.run, seed) for seed in seeds]
    tested = [results.read_json(path) for path in paths if os.path.exists(path)]
    ended = [result for result in tested if "diverged" not in result]
    diverged = len(tested) - len(ended)
    notes = []
    if ended and len(tested) < len(seeds):
        notes.append("%d of %d seeds" % (len(tested), len(seeds)))
    if diverged:
        notes.append("diverged" if diverged == len(seeds)
                     else "%d of %d seeds diverged" % (diverged, len(seeds)))
    if not tested:
        notes.append("not run")
    trials = {measure: [100 * result["mAP_" + measure] for result in ended]
              for measure in MEASURES} if ended else {}
    return Entry(cell, trials, len(seeds), places.rate(cell.run), ", ".join(notes))


def grid(table: Table, entries: Sequence[Entry]) -> List[List[str]]:
    """Return the texts of the rows of a table."""
    texts = {(entry.cell.row, entry.cell.column): _text(entry) for entry in entries}
    return [[row, *[texts.get((row, column), "-") for column in table.columns]]
            for row in table.rows]


def _text(entry: Entry) -> str:
    if not entry.trials:
        return "%.1f / %s" % (entry.cell.paper, entry.note.split(":")[0])
    parts = []
    for measure, name in MEASURES.items():
        mean, error = formats.mean_and_error(entry.trials[measure])
        parts.append("%.1f%s (%+.1f) %s" % (mean, "" if error is None else " ± %.1f" % error,
                                            mean - entry.cell.paper, name))
    note = " [%s]" % entry.note if entry.note else ""
    return "%.1f / %s%s" % (entry.cell.paper, ", ".join(parts), note)


def _csv_row(entry: Entry) -> List[Any]:
    numbers: List[Optional[float]] = []
    for measure in MEASURES:
        if entry.trials:
            mean, error = formats.mean_and_error(entry.trials[measure])
            numbers += [round(mean, 4), round(mean - entry.cell.paper, 4),
                        None if error is None else round(error, 4)]
        else:
            numbers += [None, None, None]
    count = len(next(iter(entry.trials.values()), []))
    cell = entry.cell
    return [cell.row, cell.column, cell.paper, count, entry.rate, entry.note, *numbers]
