"""experiments/kinds_table.py measures networks, says which steps failed, and continues."""
import csv
import os

import cv2
import numpy as np
import pytest

import kinds
import kinds_table
import layer_text
from ddinit import results

BATCH = 4


def write_images(folder, seed):
    """Write smooth noise as 2 * BATCH images; return the pattern that matches them."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    for number in range(2 * BATCH):
        noise = cv2.GaussianBlur(rng.standard_normal((40, 40, 3)), (0, 0), 1.5)
        pixels = np.clip(250 * noise + rng.uniform(60, 190, 3), 0, 255).astype(np.uint8)
        assert cv2.imwrite(str(folder / ("%d.png" % number)), pixels)
    return str(folder / "*.png")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    parent = tmp_path_factory.mktemp("images")
    return [write_images(parent / name, seed) for seed, name in enumerate(("init", "measure"))]


@pytest.fixture(scope="module")
def table(images, tmp_path_factory):
    """What the script made of a small network with BatchNorm and of one that Caffe refuses."""
    folder = tmp_path_factory.mktemp("table")
    (folder / "nets").mkdir()
    small = layer_text.deploy([
        *kinds.conv_bn("conv1", "data", 4, 3), layer_text.relu("relu1", "conv1"),
        kinds.unfilled("conv2", "conv1", 4, 3, group=2), layer_text.relu("relu2", "conv2"),
        kinds.dense("ip1", "conv2", 5)], side=16)
    for name, layers in (("small", small), ("unbuilt", [*small[:-1], layer_text.layer(
            "other", "NoSuchType", "ip1")])):
        (folder / "nets" / (name + ".prototxt")).write_text(
            layer_text.definition(name, "", layers))
    options = ["--nets", str(folder / "nets"), "--data", images[0], "--measure", images[1],
               "--out", str(folder / "out.json"), "--batch-size", str(BATCH), "--batches", "2"]
    assert kinds_table.main(options) == 0
    return folder, options


def test_the_table_has_spreads_differences_and_seconds(table):
    folder, _ = table
    row = results.read_json(str(folder / "out.json"))["nets"]["small"]
    assert kinds_table.errors(row) == {}
    assert row["filled"]["layers"] == 4  # Scale is one of them
    assert row["gaussian"]["spread"] < row["filled"]["spread"]
    assert row["rescaled"]["spread"] < 2 < row["legacy"]["spread"]
    assert row["rescaled"]["difference"] < 1e-3
    for step in ("gaussian", "kmeans", "rescaled", "kmeans_rescaled"):
        assert 0 < row[step]["work"] < row[step]["seconds"]
        assert set(row[step]["rates"]) == set(row["filled"]["rates"])
    assert row["forward"]["seconds"] > 0
    with open(str(folder / "out.csv"), newline="") as file:
        header, *rows = csv.reader(file)
    assert header == list(kinds_table.COLUMNS) and [line[0] for line in rows] == ["small",
                                                                                 "unbuilt"]
    assert float(rows[0][2]) == row["filled"]["spread"]


def test_a_network_that_fails_is_a_row_that_says_why(table):
    folder, _ = table
    row = results.read_json(str(folder / "out.json"))["nets"]["unbuilt"]
    assert {"prepared", "gaussian", "kmeans"} <= set(kinds_table.errors(row))
    assert "NoSuchType" in row["gaussian"]["error"]
    assert kinds_table.cell(row, "Gaussian") is None
    text = (folder / "out.md").read_text()
    assert "failed" in text and "unbuilt, gaussian: magic_init: error: " in text


def test_the_same_command_measures_only_what_is_missing(table, monkeypatch):
    folder, options = table
    measured = []
    monkeypatch.setattr(kinds_table, "measure_net", lambda path, arguments: measured.append(
        os.path.basename(path)) or {"prepared": {"error": "again"}})
    before = results.read_json(str(folder / "out.json"))["nets"]["small"]
    assert kinds_table.main(options) == 0
    assert measured == ["unbuilt.prototxt"]
    assert results.read_json(str(folder / "out.json"))["nets"]["small"] == before


def test_results_of_other_settings_are_not_mixed(table, capsys):
    _, options = table
    assert kinds_table.main(options + ["--seed", "1"]) == 2
    assert "holds results of other settings" in capsys.readouterr().err


def test_a_command_line_without_images_or_networks_is_one_line(table, images, capsys, tmp_path):
    _, options = table
    assert kinds_table.main(options + ["--data", str(tmp_path / "*.jpg")]) == 2
    assert "no images there" in capsys.readouterr().err
    assert kinds_table.main(options + ["--nets", str(tmp_path)]) == 2
    assert "no *.prototxt" in capsys.readouterr().err
