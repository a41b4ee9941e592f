"""Initialize and rescale networks of many kinds, and make a table of their change rates.

    python models/kinds.py build/kinds
    python experiments/kinds_table.py --nets build/kinds --data 'photos/init/*' \\
        --measure 'photos/measure/*' --out build/kinds.json

For each definition in a folder, the command `magic_init.py` initializes the network with Gaussian
and with k-means weights, rescales the latter once more, and rescales a network that resembles a
trained one. Plain Caffe judges every file that it writes on other photographs, beside the network
as Caffe's fillers make it: the largest over the smallest change rate of the layers (equation 2).
Results are written after each network (JSON, and the table as CSV and Markdown beside it), and the
same command continues where it was interrupted.
"""
import argparse
import glob
import logging
import os
import subprocess
import sys
import tempfile
import time
from typing import Any, Callable, Dict, List, Optional, Sequence

import numpy as np

from ddinit import argument_types, files, processes, results
from ddinit.images import find_images
from plain_caffe import disturbed, judge
from tables import formats
from training.run_folder import sha256
from training.starts import definition_of

log = logging.getLogger("kinds_table")
COMMAND = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))),
                       "magic_init.py")
SECONDS = 1800  # after which a command counts as failed
Row = Dict[str, Any]  # what was measured of one network

COLUMNS: Dict[str, Callable[[Row], Any]] = {
    "net": lambda row: row["net"],
    "layers": lambda row: row["filled"]["layers"],
    "fillers": lambda row: row["filled"]["spread"],
    "Gaussian": lambda row: row["gaussian"]["spread"],
    "k-means": lambda row: row["kmeans"]["spread"],
    "k-means rescaled": lambda row: row["kmeans_rescaled"]["spread"],
    "legacy": lambda row: row["legacy"]["spread"],
    "rescaled, own images": lambda row: row["rescaled"]["spread_own"],
    "rescaled": lambda row: row["rescaled"]["spread"],
    "output difference": lambda row: max(row["rescaled"]["difference"],
                                         row["rescaled"]["difference_reported"]),
    "k-means, s": lambda row: row["kmeans"]["seconds"],
    "rescaled, s": lambda row: row["rescaled"]["seconds"],
    "F, s": lambda row: row["forward"]["seconds"],
    "k-means, F": lambda row: row["kmeans"]["work"] / row["forward"]["seconds"],
    "rescaled, F": lambda row: row["rescaled"]["work"] / row["forward"]["seconds"],
}


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Measure the networks of the folder that the command line names; return the exit status."""
    parser = processes.Parser(prog="kinds_table", description=__doc__.splitlines()[0])
    parser.add_argument("--nets", required=True, metavar="FOLDER",
                        help="folder of definitions (*.prototxt) with one Input layer")
    parser.add_argument("--data", required=True, metavar="GLOB", help="images to initialize from")
    parser.add_argument("--measure", required=True, metavar="GLOB",
                        help="other images, on which the written files are judged")
    parser.add_argument("--out", required=True, metavar="FILE.json",
                        help="results, continued where the file exists; the table is written "
                             "beside it as FILE.csv and FILE.md")
    parser.add_argument("--batch-size", type=argument_types.count, default=16,
                        help="images in a batch (default: 16)")
    parser.add_argument("--batches", type=argument_types.count, default=10,
                        help="batches to use (default: 10)")
    parser.add_argument("--seed", type=argument_types.natural, default=0,
                        help="seed of weights and disturbances (default: 0)")
    arguments = parser.parse_args(argv)
    processes.log_to_stderr()
    return processes.command_line(run, arguments, parser.prog)


def run(arguments: argparse.Namespace) -> None:
    """Measure each network that the results do not have yet, and write them after each."""
    for pattern in (arguments.data, arguments.measure):
        find_images(pattern)  # raises ValueError where there are none
    nets = sorted(glob.glob(os.path.join(arguments.nets, "*.prototxt")))
    if not nets:
        raise ValueError("%s: no *.prototxt there" % arguments.nets)
    base, extension = os.path.splitext(arguments.out)
    if extension != ".json":
        raise ValueError("%s: the results need a name that ends in .json" % arguments.out)
    files.check_writable(arguments.out)
    settings = {name: getattr(arguments, name)
                for name in ("data", "measure", "batch_size", "batches", "seed")}
    rows = read_rows(arguments.out, settings)
    for path in nets:
        name, digest = os.path.splitext(os.path.basename(path))[0], sha256(path)
        known = rows.get(name)
        if known is not None and known["definition"] == digest and not errors(known):
            log.info("%-20s measured before", name)
            continue
        rows[name] = {"net": name, "definition": digest, **measure_net(path, arguments)}
        results.write_json(arguments.out, {"settings": settings, "nets": rows})
        write_table(base, [rows[key] for key in sorted(rows)])
        log.info("%s", progress(rows[name]))
    log.info("wrote %s, %s.csv and %s.md", arguments.out, base, base)


def read_rows(path: str, settings: Dict[str, Any]) -> Dict[str, Row]:
    """Return the rows that the results at `path` hold, none where there is no such file.

    Raises ValueError where they were made with other settings.
    """
    if not os.path.exists(path):
        return {}
    content = results.read_json(path)
    if content.get("settings") != settings:
        raise ValueError("%s holds results of other settings: %s. Choose another --out, or remove "
                         "the file" % (path, content.get("settings")))
    rows: Dict[str, Row] = content["nets"]
    return rows


def measure_net(prototxt: str, arguments: argparse.Namespace) -> Row:
    """Return everything that the table says of one network; a step that fails leaves an error.

    F is measured before and after the commands, and the lower one counts.
    """
    row: Row = {}

    def step(name: str, function: Callable[..., Any], *values: Any) -> None:
        try:
            row[name] = function(*values)
        except ValueError as error:
            row[name] = {"error": " ".join(str(error).split())}

    with tempfile.TemporaryDirectory(prefix="kinds_table.") as folder:
        filled, legacy, gaussian, kmeans, kmeans_rescaled, rescaled = (
            os.path.join(folder, name + ".caffemodel") for name in (
                "filled", "legacy", "gaussian", "kmeans", "kmeans_rescaled", "rescaled"))
        others, flags = arguments.measure, _flags(arguments)
        step("prepared", processes.in_child, disturbed.prepare, prototxt,
             find_images(arguments.data), arguments.seed, filled, legacy)
        step("forward_before", time_forward, prototxt, legacy, arguments)
        step("filled", judge_file, prototxt, filled, others)
        step("gaussian", initialize, prototxt, gaussian, flags + ["--type", "gaussian"], others)
        step("kmeans", initialize, prototxt, kmeans, flags + ["--type", "kmeans"], others)
        step("kmeans_rescaled", rescale, definition_of(prototxt, kmeans), kmeans, kmeans_rescaled,
             flags, others)
        step("legacy", judge_file, prototxt, legacy, others)
        step("rescaled", rescale, prototxt, legacy, rescaled, flags, others)
        step("forward_after", time_forward, prototxt, legacy, arguments)
    forwards = [row.pop(name) for name in ("forward_before", "forward_after")]
    row["forward"] = min(forwards, key=lambda measured: measured.get("seconds", np.inf))
    return row


def time_forward(prototxt: str, weights: str, arguments: argparse.Namespace) -> Row:
    """Measure F in a child process."""
    return {"seconds": processes.in_child(
        judge.forward_seconds, prototxt, find_images(arguments.data), arguments.batch_size,
        arguments.batches, weights)}


def _flags(arguments: argparse.Namespace) -> List[str]:
    return ["--data", arguments.data, "--calibrate", "--batch-size", str(arguments.batch_size),
            "--batches", str(arguments.batches), "--seed", str(arguments.seed)]


def initialize(prototxt: str, output: str, flags: Sequence[str], others: str) -> Row:
    """Initialize a network from scratch with the command and judge the file that it wrote."""
    report = magic_init(prototxt, output, flags)
    return {**report, **judge_file(definition_of(prototxt, output), output, others)}


def rescale(prototxt: str, weights: str, output: str, flags: Sequence[str], others: str) -> Row:
    """Rescale a network with the command, judge the file, and compare outputs in plain Caffe."""
    report = magic_init(prototxt, output, ["--load", weights, *flags])
    written = definition_of(prototxt, output)
    return {**report, **judge_file(written, output, others),
            "difference": processes.in_child(judge.output_difference, (prototxt, weights),
                                             (written, output), find_images(others))}


def judge_file(prototxt: str, weights: str, others: str) -> Row:
    """Return the change rates on other images and the largest over the smallest of them."""
    if not os.path.exists(weights):
        raise ValueError("not measured, because there is no %s" % os.path.basename(weights))
    rates, uncertainty = processes.in_child(judge.change_rates, prototxt, weights,
                                            find_images(others))
    return {"spread": judge.spread_of(rates), "layers": len(rates),
            "slowest": min(rates, key=rates.__getitem__),
            "fastest": max(rates, key=rates.__getitem__),
            "uncertainty": uncertainty, "rates": rates}


def magic_init(prototxt: str, output: str, flags: Sequence[str]) -> Row:
    """Run the command; return what it took and what it reported.

    `seconds` are the command's from start to end, `work` those of the phases in which it computes.
    Raises ValueError with the command's last line where it fails.
    """
    report = os.path.splitext(output)[0] + ".json"
    started = time.perf_counter()
    try:
        done = subprocess.run(
            [sys.executable, COMMAND, prototxt, output, "--report", report, "--quiet", "--cpu",
             *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True,
            timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise ValueError("the command took more than %d seconds" % SECONDS) from error
    seconds = time.perf_counter() - started
    if done.returncode:
        raise ValueError((done.stderr.splitlines() or ["exit status %d" % done.returncode])[-1])
    content: Row = results.read_json(report)
    phases = content["seconds"]
    return {"seconds": seconds, "phases": phases,
            "work": sum(phases[name] for name in phases if name not in ("set up", "in all")),
            "spread_before_own": content["spread_before"], "spread_own": content["spread_after"],
            "difference_reported": content["output_difference"], "changes": content["changes"],
            "warnings": done.stderr.splitlines()}


def errors(row: Row) -> Dict[str, str]:
    """Return the errors of a network's steps, by step."""
    return {name: value["error"] for name, value in row.items()
            if isinstance(value, dict) and "error" in value}


def cell(row: Row, column: str) -> Any:
    """Return what a column says of a network; None where the step failed that measures it."""
    try:
        return COLUMNS[column](row)
    except (KeyError, TypeError):
        return None


def progress(row: Row) -> str:
    """Return one line that says what was measured of a network."""
    cells = [(column, cell(row, column)) for column in COLUMNS if column != "net"]
    line = "%-20s %s" % (row["net"], "  ".join(
        "%s %.3g" % pair for pair in cells if pair[1] is not None))
    return "; ".join([line] + ["%s FAILED: %s" % pair for pair in errors(row).items()])


def write_table(base: str, rows: Sequence[Row]) -> None:
    """Write the table as `base`.csv and `base`.md."""
    cells = [[cell(row, column) for column in COLUMNS] for row in rows]
    formats.write_csv(base + ".csv", list(COLUMNS), cells)
    table = formats.markdown(list(COLUMNS), [[
        value if isinstance(value, str) else "failed" if value is None else "%.3g" % value
        for value in line] for line in cells])
    formats.write(base + ".md", "\n".join([table, *(
        "%s, %s: %s" % (row["net"], step, message) for row in rows
        for step, message in errors(row).items())]).rstrip() + "\n")


if __name__ == "__main__":
    sys.exit(main())
