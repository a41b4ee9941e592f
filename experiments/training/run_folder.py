"""Keep the files of a training run: whole snapshots, and tables that survive a kill.

    OUTDIR/train_val.prototxt, solver.prototxt   what was trained
    OUTDIR/run.json                              everything needed to repeat the run
    OUTDIR/log.csv, curves.csv, curve.png        losses by iteration, measured values
    OUTDIR/snapshot_N.caffemodel, .solverstate   the last two, to resume from
    OUTDIR/final.caffemodel                      the trained net
"""
import csv
import glob
import hashlib
import json
import os
import re
import shutil
import tempfile
from typing import Any, Dict, List, Optional

from ddinit import results
from ddinit.prototxt import caffe_messages
from tables import formats

KEPT_SNAPSHOTS = 2


class Snapshot:
    """An iteration, and the two files from which Caffe resumes there."""

    def __init__(self, folder: str, iteration: int) -> None:
        self.iteration = iteration
        self.weights = os.path.join(folder, "snapshot_%d.caffemodel" % iteration)
        self.state = os.path.join(folder, "snapshot_%d.solverstate" % iteration)


def snapshots(folder: str) -> List[Snapshot]:
    """Return the whole snapshots in `folder`, the oldest first.

    The state is renamed last, so that a snapshot whose state has its final name is whole.
    """
    whole = []
    for path in glob.glob(os.path.join(glob.escape(folder), "snapshot_*.solverstate")):
        number = re.fullmatch(r"snapshot_(\d+)\.solverstate", os.path.basename(path))
        if number:
            snapshot = Snapshot(folder, int(number.group(1)))
            if os.path.exists(snapshot.weights):
                whole.append(snapshot)
    return sorted(whole, key=lambda snapshot: snapshot.iteration)


def last_snapshot(folder: str) -> Optional[Snapshot]:
    """Return the newest whole snapshot in `folder`, or None."""
    whole = snapshots(folder)
    return whole[-1] if whole else None


def save_snapshot(solver: Any, folder: str) -> Snapshot:
    """Write the weights and the state of a solver; delete all but the last two snapshots.

    Caffe writes into the hidden folder of `snapshot_prefix`; the files appear in `folder` once they
    are complete and on the disk. Raises ValueError where the disk has no room for them.
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
    """Load weights, momentum and iteration into `solver`, wherever the folder is by now."""
    with tempfile.TemporaryDirectory(prefix="resume.") as temporary:
        state = os.path.join(temporary, "state.solverstate")
        shutil.copyfile(snapshot.state, state)
        _point_to_weights(state, os.path.abspath(snapshot.weights))
        solver.restore(state)
    if solver.iter != snapshot.iteration:
        raise ValueError("%s holds iteration %d, which its name contradicts."
                         % (snapshot.state, solver.iter))


def snapshot_prefix(folder: str) -> str:
    """Return the path at which Caffe writes a snapshot before it is whole."""
    return os.path.join(_hidden(folder), "new")


def make_hidden(folder: str) -> None:
    """Make an empty hidden folder for `snapshot_prefix`."""
    remove_hidden(folder)
    os.makedirs(_hidden(folder))


def remove_hidden(folder: str) -> None:
    """Remove the hidden folder of `snapshot_prefix`, if there is one."""
    shutil.rmtree(_hidden(folder), ignore_errors=True)


def _hidden(folder: str) -> str:
    return os.path.join(os.path.abspath(folder), ".snapshot")


def _check_room(solver: Any, folder: str) -> None:
    """Raise ValueError where a snapshot does not fit: Caffe would abort without saying why."""
    weights = sum(blob.count for blobs in solver.net.params.values() for blob in blobs)
    needed, free = 2 * 4 * weights, shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError("%s: the disk is full. A snapshot takes %.1f MB, but %.1f MB are free."
                         % (folder, needed / 2 ** 20, free / 2 ** 20))


def _point_to_weights(state: str, weights: str) -> None:
    """Change the name of the caffemodel in a solverstate.

    Protobuf takes the last value of a field that occurs twice, so that a few bytes at the end are
    enough.
    """
    with open(state, "ab") as file:
        file.write(caffe_messages().SolverState(learned_net=weights).SerializeToString())


def _to_disk(path: str) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


class Table:
    """A CSV file with a row for each iteration, flushed row by row.

    A table that is opened again keeps its rows up to `iteration`. Later rows, and a last row that a
    kill cut short, are computed again.
    """

    def __init__(self, path: str, iteration: int) -> None:
        self.path = path
        rows = [row for row in read_table(path) if row["iteration"] <= iteration]
        self.columns: Optional[List[str]] = list(rows[0]) if rows else None
        self.last = rows[-1] if rows else {}
        if rows:
            formats.write_csv(path, list(rows[0]), [_cells(row.values()) for row in rows])
        elif os.path.exists(path):
            os.unlink(path)
        self._file = open(path, "a", newline="", encoding="utf-8")

    def add(self, row: Dict[str, float]) -> None:
        """Append a row; the first row names the columns.

        Raises ValueError where a row has other columns than the table.
        """
        if self.columns is None:
            self.columns = list(row)
            csv.writer(self._file).writerow(self.columns)
        if list(row) != self.columns:
            raise ValueError("%s has the columns %s; a row with %s does not fit."
                             % (self.path, ", ".join(self.columns), ", ".join(row)))
        csv.writer(self._file).writerow(_cells(row.values()))
        self._file.flush()

    def to_disk(self) -> None:
        """Write all rows to the disk, so that they survive whatever a snapshot survives."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def read_table(path: str) -> List[Dict[str, float]]:
    """Return the rows of a table by column name, but for a last row that was cut short.

    A missing file has no rows.
    """
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
        raise ValueError("%s: cannot read the file (%s)" % (path, error.strerror)) from error
    return digest.hexdigest()


def check_same_run(folder: str, repeat: Dict[str, Any]) -> None:
    """Raise ValueError with the first setting in which run.json differs from `repeat`.

    Files may have moved since, so that "paths" do not count.
    """
    path = os.path.join(folder, "run.json")
    if not os.path.exists(path):
        return
    before = results.read_json(path).get("repeat", {})
    for name, value in json.loads(json.dumps(repeat)).items():
        if name != "paths" and before.get(name) != value:
            raise ValueError("%s: cannot resume with %s %s, because the run began with %s. Use "
                             "another folder." % (folder, name, value, before.get(name)))


def is_finished(folder: str, iterations: int) -> bool:
    """Return whether a run of that many iterations has ended and its weights are still there."""
    path = os.path.join(folder, "run.json")
    if not os.path.exists(path) or not os.path.exists(os.path.join(folder, "final.caffemodel")):
        return False
    record = results.read_json(path)
    return bool(record.get("finished")) and record.get("iteration") == iterations


def measured(folder: str) -> List[Dict[str, float]]:
    """Return the rows of curves.csv."""
    return read_table(os.path.join(folder, "curves.csv"))
