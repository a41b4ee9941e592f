"""imagenet/curves.py, figure3.py and figure4.py."""
import os
import runpy
import sys

import cv2
import numpy as np
import pytest

import figure3
from ddinit import results
from imagenet import curves
from tables import formats

COLUMNS = ["iteration", "training_loss", "training_error", "validation_loss", "validation_error"]


def write_run(folder, rows):
    """Write a run's curves.csv and return its folder's path."""
    folder.mkdir()
    formats.write_csv(str(folder / "curves.csv"), COLUMNS, rows)
    return str(folder)


@pytest.fixture
def runs(tmp_path):
    """Two trials of one case, the second stopped earlier, and one run of another case."""
    nan = float("nan")
    return [
        write_run(tmp_path / "a1", [[0, nan, nan, 2.0, 0.9], [10, 1.5, 0.7, 1.0, 0.5],
                                    [20, 1.0, 0.4, 0.5, 0.25]]),
        write_run(tmp_path / "a2", [[0, nan, nan, 4.0, 0.9], [10, 2.5, 0.9, 3.0, 0.7]]),
        write_run(tmp_path / "b", [[0, nan, nan, 2.3, 0.9], [20, 2.2, 0.8, 2.1, 0.8]]),
    ]


def test_trials_are_averaged_where_all_of_them_are(runs):
    found = curves.read_runs(runs, ["a", "a", "b"])
    assert list(found) == ["a", "b"]
    validation = curves.curve(found["a"], "validation_loss")
    assert validation.iterations.tolist() == [0, 10]
    assert validation.mean.tolist() == [3, 2]
    np.testing.assert_allclose(validation.error, [1, 1])  # s = sqrt(2), n = 2
    training = curves.curve(found["a"], "training_loss")
    assert training.iterations.tolist() == [10]  # there is none before the first iteration
    assert training.mean.tolist() == [2]
    alone = curves.curve(found["b"], "training_error")
    assert (alone.trials, alone.mean.tolist(), alone.error.tolist()) == (1, [0.8], [0])


def test_runs_are_called_like_their_folders(runs):
    assert list(curves.read_runs(runs)) == ["a1", "a2", "b"]


def test_spans_beyond_the_longest_run_are_left_out(runs):
    found = curves.read_runs(runs)
    assert curves.spans_within(found, [10000, 15, 5]) == [5, 15, 20]


def test_the_summary_tells_the_last_value_within_each_span(runs):
    rows = curves.summary(curves.read_runs(runs, ["a", "a", "b"]), [15, 20])
    by_key = {(row["name"], row["value"], row["iteration"]): row for row in rows}
    assert by_key["a", "validation_error", 10]["mean"] == pytest.approx(0.6)
    assert by_key["a", "validation_error", 10]["error"] == pytest.approx(0.1)
    assert by_key["b", "validation_loss", 20]["mean"] == 2.1
    assert by_key["b", "validation_loss", 0]["error"] is None
    assert ("b", "training_loss", 0) not in by_key


@pytest.mark.parametrize("figure", ["figure3", "figure4"])
def test_the_command_draws_a_row_for_each_span_and_writes_the_numbers(
        runs, tmp_path, figure, monkeypatch):
    script = os.path.join(os.path.dirname(figure3.__file__), figure + ".py")
    monkeypatch.setattr(sys, "argv", [
        script, str(tmp_path / "f.png"), *runs, "--value", "error", "--names", "ours", "ours",
        "reference", "--spans", "10"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(script, run_name="__main__")
    assert ended.value.code == 0
    report = results.read_json(str(tmp_path / "f.json"))
    assert report["value"] == "error"
    assert {row["name"]: row["trials"] for row in report["runs"]} == {"ours": 2, "reference": 1}
    picture = cv2.imread(str(tmp_path / "f.png"))
    assert picture.shape[:2] == (int(90 * (0.8 + 2 * 2.8)), 810)
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 3


@pytest.mark.parametrize("change, message", [
    (lambda folders, names: (folders, names[:2]), "2 names for 3 folders"),
    (lambda folders, names: ([folders[0] + "x"], None), "a1x: the folder has no curves.csv"),
])
def test_runs_that_are_not_there_are_errors(runs, change, message):
    folders, names = change(runs, ["a", "a", "b"])
    with pytest.raises(ValueError, match=message):
        curves.read_runs(folders, names)


def test_another_table_called_curves_is_an_error(tmp_path):
    folder = tmp_path / "voc"
    folder.mkdir()
    formats.write_csv(str(folder / "curves.csv"), ["iteration", "mAP"], [[0, 0.1]])
    with pytest.raises(ValueError, match="has no column training_loss"):
        curves.read_runs([str(folder)])
