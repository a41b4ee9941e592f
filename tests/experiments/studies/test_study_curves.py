"""study_curves.py: the figures in small from arrays to a table."""
import os

import numpy as np
import pytest

import study_curves
from ddinit import results


def test_the_figures_in_small_from_arrays_to_table(small_images, tmp_path, monkeypatch):
    curves = [one for one in study_curves.CURVES
              if one.name in ("reference", "ours, Gaussian") and one.figure == "figure3"]
    curves[0] = curves[0]._replace(figure="figure4")
    monkeypatch.setattr(study_curves, "CURVES", curves)
    monkeypatch.setattr(study_curves, "IMAGES", 10)
    monkeypatch.setattr(study_curves, "BATCH_SIZE", 4)
    out = tmp_path / "out"
    command = ["--data", small_images, "--out", str(out), "--seeds", "1", "--iterations", "3",
               "--validate-every", "1", "--jobs", "2"]
    assert study_curves.main(command) == 0
    rows = results.read_json(str(out / "curves.json"))["rows"]
    ends = {(row["figure"], row["name"]): row for row in rows
            if row["value"] == "validation_error" and row["iteration"] == 3}
    assert set(ends) == {("figure4", "reference"), ("figure3", "ours, Gaussian")}
    assert all(0 <= row["mean"] <= 1 and row["diverged"] == 0 for row in ends.values())
    assert {path.name for path in out.glob("*.png")} == {
        "%s_%s.png" % (figure, value) for figure in ("figure3", "figure4")
        for value in ("loss", "error")}
    path = out / "runs" / "caffenet_cifar_ours-gaussian_0" / "run.json"
    record = results.read_json(str(path))
    assert record["repeat"]["last_std"] == 0
    assert 'lr_policy: "fixed"' in record["solver"]
    assert "base_lr: 0.00125" in record["solver"]  # 0.01 times the root of 4 over 256
    before = os.stat(path).st_mtime_ns
    assert study_curves.main(command) == 0  # the runs are left alone
    assert os.stat(path).st_mtime_ns == before


@pytest.mark.parametrize("side, classes, said", [
    (28, 10, "the images have 28 x 28 pixels"), (32, 11, "there are 11 classes")])
def test_images_that_the_nets_are_not_for_are_an_error(tmp_path, capsys, side, classes, said):
    path = str(tmp_path / "a.npz")
    images, labels = np.zeros((classes, side, side, 3), np.uint8), np.arange(classes)
    np.savez(path, train_images=images, train_labels=labels, test_images=images,
             test_labels=labels)
    assert study_curves.main(["--data", path, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert path in error and said in error
