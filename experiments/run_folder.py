"""The folder of a training run: snapshots that are whole, a log that goes on after a kill.

    OUTDIR/train_val.prototxt, solver.prototxt   what was trained
    OUTDIR/run.json                              everything needed to repeat it
    OUTDIR/log.csv, curves.csv, curve.png        losses by iteration, measured values
    OUTDIR/snapshot_N.caffemodel, .solverstate   the last two, to resume from
    OUTDIR/final.caffemodel                      the trained net

    PYTHONPATH=experiments python -c "import run_folder; \\
        print(run_folder.last_snapshot('build/reference'))"
"""
import csv
import glob
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
from typing import Any, Dict, List, Optional, Sequence, Tuple

from matplotlib.figure import Figure

from ddinit import files, results
from ddinit.prototxt import caffe_messages

KEPT_SNAPSHOTS = 2


class Snapshot:
    """`iteration` and the two files that Caffe resumes from."""

    def __init__(self, folder: str, iteration: int) -> None:
        self.iteration = iteration
        self.weights = os.path.join(folder, "snapshot_%d.caffemodel" % iteration)
        self.state = os.path.join(folder, "snapshot_%d.solverstate" % iteration)


# ---------------------------------------------------------------------------------------------
# Snapshots
# ---------------------------------------------------------------------------------------------

def snapshots(folder: str) -> List[Snapshot]:
    """Return the whole snapshots in `folder`, oldest first.

    The state is renamed last, so a snapshot whose state has its name is whole.
    """
    found = []
    for path in glob.glob(os.path.join(glob.escape(folder), "snapshot_*.solverstate")):
        number = re.fullmatch(r"snapshot_(\d+)\.solverstate", os.path.basename(path))
        if number:
            snapshot = Snapshot(folder, int(number.group(1)))
            if os.path.exists(snapshot.weights):
                found.append(snapshot)
    return sorted(found, key=lambda snapshot: snapshot.iteration)


def last_snapshot(folder: str) -> Optional[Snapshot]:
    """Return the newest whole snapshot in `folder`, None where there is none."""
    found = snapshots(folder)
    return found[-1] if found else None


def save_snapshot(solver: Any, folder: str) -> Snapshot:
    """Write the solver's weights and state whole and forget all but the last two snapshots.

    Caffe writes them into the hidden folder of `snapshot_prefix`; they appear in `folder` when
    they are complete and on the disk.  Raises ValueError where the disk has no room for them.
    """
    snapshot = Snapshot(folder, solver.iter)
    _check_room(solver, folder)
    solver.snapshot()
    written = "%s_iter_%d" % (snapshot_prefix(folder), solver.iter)
    _point_to_weights(written + ".solverstate", os.path.basename(snapshot.weights))
    for source, target in ((written + ".caffemodel", snapshot.weights),
                           (written + ".solverstate", snapshot.state)):
        _to_disk(source)
        os.replace(source, target)
    for old in snapshots(folder)[:-KEPT_SNAPSHOTS]:
        os.unlink(old.state)
        os.unlink(old.weights)
    return snapshot


def restore_snapshot(solver: Any, snapshot: Snapshot) -> None:
    """Load weights, momentum and the iteration into `solver`, wherever the folder is by now."""
    with tempfile.TemporaryDirectory(prefix="resume.") as temporary:
        state = os.path.join(temporary, "state.solverstate")
        shutil.copyfile(snapshot.state, state)
        _point_to_weights(state, os.path.abspath(snapshot.weights))
        solver.restore(state)
    if solver.iter != snapshot.iteration:
        raise ValueError("%s: holds iteration %d" % (snapshot.state, solver.iter))


def snapshot_prefix(folder: str) -> str:
    """Return where Caffe writes a snapshot before it is whole."""
    return os.path.join(_hidden(folder), "new")


def make_hidden(folder: str) -> None:
    """Make the hidden folder of `snapshot_prefix`, without what a killed run left there."""
    remove_hidden(folder)
    os.makedirs(_hidden(folder))


def remove_hidden(folder: str) -> None:
    """Remove the hidden folder of `snapshot_prefix`, where there is one."""
    shutil.rmtree(_hidden(folder), ignore_errors=True)


def _hidden(folder: str) -> str:
    return os.path.join(os.path.abspath(folder), ".snapshot")


def _check_room(solver: Any, folder: str) -> None:
    """Caffe would abort half-way, without saying that the disk is full."""
    weights = sum(blob.count for blobs in solver.net.params.values() for blob in blobs)
    needed, free = 2 * 4 * weights, shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError("%s: the disk is full: a snapshot takes %.1f MB, %.1f MB are free"
                         % (folder, needed / 2 ** 20, free / 2 ** 20))


def _point_to_weights(state: str, weights: str) -> None:
    """Change the caffemodel's name in a solverstate.

    Of a field that occurs twice protobuf takes the last value, so that a few bytes at the end do
    it without reading hundreds of megabytes of momentum.
    """
    with open(state, "ab") as file:
        file.write(caffe_messages().SolverState(learned_net=weights).SerializeToString())


def _to_disk(path: str) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


# ---------------------------------------------------------------------------------------------
# Tables that grow by a row at a time
# ---------------------------------------------------------------------------------------------

class Table:
    """A CSV file with a row per iteration, flushed row by row.

    Opened again it keeps the rows up to `iteration`: those after the snapshot that a run resumes
    from, and a last row cut short by a kill, are computed again.
    """

    def __init__(self, path: str, iteration: int) -> None:
        self.path = path
        rows = [row for row in read_table(path) if row["iteration"] <= iteration]
        self.columns: Optional[List[str]] = list(rows[0]) if rows else None
        self.last = rows[-1] if rows else {}
        if rows:
            results.write_csv(path, list(rows[0]), [_cells(row.values()) for row in rows])
        elif os.path.exists(path):
            os.unlink(path)
        self._file = open(path, "a", newline="", encoding="utf-8")

    def add(self, row: Dict[str, float]) -> None:
        """Append a row; the first row of a table names its columns.

        Raises ValueError where a row has other columns than the table.
        """
        if self.columns is None:
            self.columns = list(row)
            csv.writer(self._file).writerow(self.columns)
        if list(row) != self.columns:
            raise ValueError("%s: has the columns %s, not %s"
                             % (self.path, ", ".join(self.columns), ", ".join(row)))
        csv.writer(self._file).writerow(_cells(row.values()))
        self._file.flush()

    def to_disk(self) -> None:
        """Make sure that the rows survive whatever a snapshot survives."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def read_table(path: str) -> List[Dict[str, float]]:
    """Return the rows of a table by column name; a missing file and a row cut short are none."""
    if not os.path.exists(path):
        return []
    rows = []
    with open(path, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            try:
                rows.append({name: float(cell) for name, cell in row.items()})
            except (TypeError, ValueError):
                break
    return rows


def _cells(values: Any) -> List[Any]:
    return [int(value) if isinstance(value, float) and value.is_integer() else value
            for value in values]


# ---------------------------------------------------------------------------------------------
# What to repeat a run with, and what to look at
# ---------------------------------------------------------------------------------------------

def sha256(path: str) -> str:
    """Return the SHA-256 of a file in hexadecimal.

    Raises ValueError naming the file where it cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            for block in iter(lambda: file.read(1 << 20), b""):
                digest.update(block)
    except OSError as error:
        raise ValueError("%s: cannot read it (%s)" % (path, error.strerror)) from error
    return digest.hexdigest()


def check_same_run(folder: str, repeat: Dict[str, Any]) -> None:
    """Raise ValueError naming the first setting in which run.json differs from `repeat`.

    Files may have moved since: "paths" do not count.
    """
    path = os.path.join(folder, "run.json")
    if not os.path.exists(path):
        return
    before = results.read_json(path).get("repeat", {})
    for name, value in json.loads(json.dumps(repeat)).items():
        if name != "paths" and before.get(name) != value:
            raise ValueError("%s: cannot resume with %s %s, the run began with %s"
                             % (folder, name, value, before.get(name)))


def is_finished(folder: str, iterations: int) -> bool:
    """Whether a run of that many iterations ended here and its weights are still there."""
    path = os.path.join(folder, "run.json")
    if not os.path.exists(path) or not os.path.exists(os.path.join(folder, "final.caffemodel")):
        return False
    record = results.read_json(path)
    return bool(record.get("finished")) and record.get("iteration") == iterations


def measured(folder: str) -> List[Dict[str, float]]:
    """Return the rows of curves.csv, none where nothing was measured."""
    return read_table(os.path.join(folder, "curves.csv"))


def draw_curve(folder: str) -> None:
    """Draw log.csv, and curves.csv where there is one, as curve.png."""
    log = read_table(os.path.join(folder, "log.csv"))
    curves = measured(folder)
    if not log:
        return
    names = [name for name in curves[0] if name != "iteration"] if curves else []
    figure = Figure(figsize=(7, 3 + 2 * len(names)))
    axes = figure.subplots(1 + len(names), 1, squeeze=False, sharex=True)
    iterations = [row["iteration"] for row in log]
    losses = [row["loss"] for row in log]
    window = min(len(losses), max(10, len(losses) // 50))
    axes[0, 0].plot(iterations, losses, color="0.8", linewidth=0.8, label="each")
    axes[0, 0].plot(*_averaged(iterations, losses, window), label="mean of %d iterations" % window)
    axes[0, 0].set_ylabel("training loss")
    axes[0, 0].legend()
    for axis, name in zip(axes[1:, 0], names):
        axis.plot([row["iteration"] for row in curves], [row[name] for row in curves],
                  marker=".")
        axis.set_ylabel(name)
    axes[-1, 0].set_xlabel("iteration")
    figure.tight_layout()
    with files.replacing(os.path.join(folder, "curve.png")) as temporary:
        figure.savefig(temporary, format="png", dpi=100)


def _averaged(iterations: Sequence[float], losses: Sequence[float],
              window: int) -> Tuple[List[float], List[float]]:
    """Means of blocks of `window` losses, at each block's middle."""
    starts = range(0, len(losses) - window + 1, window)
    return ([iterations[start + window // 2] for start in starts],
            [math.fsum(losses[start:start + window]) / window for start in starts])
