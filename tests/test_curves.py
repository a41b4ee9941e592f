"""experiments/curves.py, figure3.py, figure4.py and small_curves.py."""
import os
import runpy
import sys

import cv2
import numpy as np
import pytest

import curves
import small_curves
from ddinit import results

COLUMNS = ["iteration", "training_loss", "training_error", "validation_loss", "validation_error"]


def write_run(folder, rows):
    """Write a run's curves.csv and return its folder's path."""
    folder.mkdir()
    results.write_csv(str(folder / "curves.csv"), COLUMNS, rows)
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
    script = os.path.join(os.path.dirname(curves.__file__), figure + ".py")
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
    (lambda folders, names: ([folders[0] + "x"], None), "a1x: no curves.csv"),
])
def test_runs_that_are_not_there_are_errors(runs, change, message):
    folders, names = change(runs, ["a", "a", "b"])
    with pytest.raises(ValueError, match=message):
        curves.read_runs(folders, names)


def test_another_table_called_curves_is_an_error(tmp_path):
    folder = tmp_path / "voc"
    folder.mkdir()
    results.write_csv(str(folder / "curves.csv"), ["iteration", "mAP"], [[0, 0.1]])
    with pytest.raises(ValueError, match="has no column training_loss"):
        curves.read_runs([str(folder)])


# ---------------------------------------------------------------------------------------------
# The figures in small
# ---------------------------------------------------------------------------------------------

@pytest.fixture
def arrays(tmp_path):
    """Forty training and ten test images in CIFAR's format, whose brightness tells the class."""
    rng = np.random.default_rng(4)
    parts = {}
    for split, count in (("train", 40), ("test", 10)):
        labels = (np.arange(count) % 10).astype(np.uint8)
        noise = rng.integers(0, 30, (count, 32, 32, 3))
        parts[split + "_images"] = (noise + 20 * labels[:, None, None, None]).astype(np.uint8)
        parts[split + "_labels"] = labels
    np.savez(str(tmp_path / "small.npz"), **parts)
    return str(tmp_path / "small.npz")


def test_the_figures_in_small_from_arrays_to_table(arrays, tmp_path, monkeypatch):
    cases = [case for case in small_curves.CASES
             if case.name in ("reference", "ours, Gaussian") and case.figure == "figure3"]
    cases[0] = cases[0]._replace(figure="figure4")
    monkeypatch.setattr(small_curves, "CASES", cases)
    monkeypatch.setattr(small_curves, "INIT_IMAGES", 20)
    monkeypatch.setattr(small_curves, "BATCH_SIZE", 4)
    out = tmp_path / "out"
    command = ["--data", arrays, "--out", str(out), "--seeds", "1", "--iterations", "3",
               "--validate-every", "1", "--jobs", "1"]
    assert small_curves.main(command) == 0
    rows = results.read_json(str(out / "curves.json"))["rows"]
    ends = {(row["figure"], row["name"]): row for row in rows
            if row["value"] == "validation_error" and row["iteration"] == 3}
    assert set(ends) == {("figure4", "reference"), ("figure3", "ours, Gaussian")}
    assert all(0 <= row["mean"] <= 1 and row["diverged"] == 0 for row in ends.values())
    assert {path.name for path in out.glob("*.png")} == {
        "%s_%s.png" % (figure, value) for figure in ("figure3", "figure4")
        for value in ("loss", "error")}
    zero = results.read_json(str(out / "runs" / "caffenet_cifar_gaussian_0" / "run.json"))
    assert zero["repeat"]["zero_last"]
    assert 'lr_policy: "fixed"' in zero["solver"]
    assert "base_lr: 0.00125" in zero["solver"]  # 0.01 times the root of 4 over 256
    before = os.stat(out / "runs" / "caffenet_cifar_gaussian_0" / "run.json").st_mtime_ns
    assert small_curves.main(command) == 0  # the runs are left alone
    assert os.stat(
        out / "runs" / "caffenet_cifar_gaussian_0" / "run.json").st_mtime_ns == before


@pytest.mark.parametrize("side, classes", [(28, 10), (32, 11)])
def test_images_that_the_nets_are_not_for_are_an_error(tmp_path, capsys, side, classes):
    path = str(tmp_path / "a.npz")
    images, labels = np.zeros((classes, side, side, 3), np.uint8), np.arange(classes)
    np.savez(path, train_images=images, train_labels=labels, test_images=images,
             test_labels=labels)
    assert small_curves.main(["--data", path, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert path in error and "%d x %d pixels and %d classes" % (side, side, classes) in error
