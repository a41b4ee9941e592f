"""tables.py: the paper's numbers, ours and their difference, and what was not run."""
import csv
import json
import os

import numpy as np
import pytest
import scipy.io
import yaml

import choose_rate
import hold_back
import make_tiny
import proposals
import tables
from cells import TABLES, Places, Run
from voc import Voc

CONFIG = {
    "pretrained": {"agrawal": {"weights": "nowhere/agrawal.caffemodel"}},
    "classification": {"seeds": [0, 1, 2], "learning_rates": {"SGD": [0.001, 0.01],
                                                              "Adam": [0.001]}},
    "detection": {"seeds": [0], "learning_rates": {"SGD": [0.001]}},
}
KMEANS = Run("classification", "caffenet", "ours-kmeans", "both")
XAVIER = Run("classification", "caffenet", "xavier", "none")


@pytest.fixture
def config(tmp_path):
    """A configuration file whose output folder is empty."""
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({**CONFIG, "output": str(tmp_path / "runs")}))
    return str(path)


def put(config, run, seed, result):
    path = Places(tables.read_configuration(config)).result(run, seed)
    os.makedirs(os.path.dirname(path))
    with open(path, "w") as file:
        json.dump(result, file)


def choose(config, run, rate):
    with open(Places(tables.read_configuration(config)).chosen(run), "w") as file:
        file.write(rate + "\n")


def made(config, tmp_path, name):
    """The Markdown, the CSV's rows by (row, column), and the LaTeX of a table."""
    out = tmp_path / "out"
    assert tables.main([name, "--config", config, "--out", str(out)]) == 0
    with open(str(out / (name + ".csv")), newline="") as file:
        rows = {(row["row"], row["column"]): row for row in csv.DictReader(file)}
    return (out / (name + ".md")).read_text(), rows, (out / (name + ".tex")).read_text()


def test_the_papers_tables_are_complete():
    assert {name: len(table.cells) for name, table in TABLES.items()} == {
        "table1": 24, "table2": 12, "table3": 16, "architectures": 4}
    table1 = TABLES["table1"]
    assert table1.cell("both (ours)", "SGD + BN, k-means").paper == 60.0
    assert table1.cell("between-layer (ours)", "Adam + BN, Gaussian").paper == 54.5
    assert table1.cell("within-layer (ours)", "Adam, k-means") is None
    assert TABLES["table2"].cell("MSRA", "Detection").paper == 37.2
    assert TABLES["table3"].cell("Ours + Doersch et al. (2015)", "Classification").paper == 65.3


def test_the_same_run_in_several_tables_is_one_run():
    both = TABLES["table1"].cell("both (ours)", "SGD, k-means").run
    assert both == KMEANS
    assert both == TABLES["table2"].cell("Ours (k-means)", "Classification").run
    assert both == TABLES["table3"].cell("Ours (k-means)", "Classification").run


def test_the_chosen_learning_rate_is_shown_with_mean_and_standard_error(config, tmp_path):
    for seed, precision in enumerate((0.55, 0.56, 0.60)):  # mean 57, s = 2.6458, s / sqrt(3)
        put(config, KMEANS, seed, {"mAP": precision})
    choose(config, KMEANS, "0.001")
    markdown, rows, latex = made(config, tmp_path, "table2")
    assert "| Ours (k-means) | 56.6 / 57.0 ± 1.5 (+0.4) | 45.6 / not run |" in markdown
    assert "Ours (k-means) & 56.6 / 57.0 $\\pm$ 1.5 (+0.4) & 45.6 / not run \\\\" in latex
    row = rows["Ours (k-means)", "Classification"]
    assert row["learning_rate"] == "0.001" and row["seeds"] == "3"
    assert float(row["standard_error"]) == pytest.approx(1.5275, abs=1e-4)
    assert float(row["difference"]) == pytest.approx(0.4)


def test_a_cell_with_part_of_its_seeds_says_so(config, tmp_path):
    put(config, KMEANS, 1, {"mAP": 0.5})
    markdown, rows, _ = made(config, tmp_path, "table2")
    assert "56.6 / 50.0 (-6.6) [1 of 3 seeds]" in markdown
    assert rows["Ours (k-means)", "Classification"]["standard_error"] == ""


def test_seeds_that_diverged_are_told(config, tmp_path):
    put(config, KMEANS, 0, {"mAP": 0.5})
    put(config, KMEANS, 1, {"diverged": 17})
    for seed in range(3):
        put(config, XAVIER, seed, {"diverged": 3})
    markdown, rows, _ = made(config, tmp_path, "table2")
    assert rows["Ours (k-means)", "Classification"]["ours"] == "50.0"
    assert "56.6 / 50.0 (-6.6) [2 of 3 seeds, 1 of 3 seeds diverged]" in markdown
    assert "| Xavier | 51.1 / diverged | 40.4 / not run |" in markdown


def test_the_only_learning_rate_needs_no_choice_and_nets_may_have_rates_of_their_own(config):
    places = Places({**tables.read_configuration(config)})
    adam = KMEANS._replace(solver="Adam")
    assert places.rate(adam) == "0.001" and places.rate(KMEANS) is None
    places.config["classification"]["learning_rates"]["nets"] = {"vgg16": [0.0005]}
    assert places.rates(KMEANS._replace(net="vgg16")) == ["0.0005"]
    assert places.rates(KMEANS) == ["0.001", "0.01"]


# ---------------------------------------------------------------------------------------------
# How learning rates are chosen
# ---------------------------------------------------------------------------------------------

@pytest.fixture
def choice(tmp_path):
    """choice(**results) chooses among rates by their results; returns status and what it wrote."""
    def run(**given):
        words = []
        for rate, result in given.items():
            path = tmp_path / (rate + ".json")
            path.write_text(json.dumps(result))
            words.append("%s=%s" % (rate.replace("r", "0."), path))
        out = tmp_path / "rate.txt"
        status = choose_rate.main([str(out), *words])
        return status, out.read_text() if out.exists() else None
    return run


def test_the_rate_that_did_best_is_chosen(choice):
    assert choice(r1={"mAP": 0.2}, r01={"mAP": 0.3}, r001={"mAP": 0.25}) == (0, "0.01\n")
    assert choice(r1={"diverged": 9}, r01={"mAP": 0.1}) == (0, "0.01\n")
    assert choice(r1={"diverged": 9}, r01={"diverged": 10}) == (0, "0.01\n")


def test_a_result_without_a_precision_is_named(choice, capsys):
    status, written = choice(r1={"mAP": 0.2}, r01={})
    assert (status, written) == (2, None)
    assert "r01.json: holds no mAP" in capsys.readouterr().err


def test_the_images_held_back_are_those_of_val(tmp_path):
    make_tiny.write_voc(str(tmp_path / "VOC"), np.random.default_rng(0))
    whole, out = Voc(str(tmp_path / "VOC")), tmp_path / "held_back"
    boxes = {image: np.array([[number + 1, 2, number + 30, 40]], np.float64)
             for number, image in enumerate(whole.images("trainval"))}
    cells = np.empty(len(boxes), object)
    cells[:] = list(boxes.values())
    scipy.io.savemat(str(tmp_path / "all.mat"), {"boxes": cells})
    assert hold_back.main([str(tmp_path / "VOC"), str(out), "--proposals",
                           str(tmp_path / "all.mat")]) == 0
    assert hold_back.main([str(tmp_path / "VOC"), str(out)]) == 0  # again
    held_back = Voc(str(out))
    for split, source in (("trainval", "train"), ("test", "val")):
        images = held_back.images(split)
        assert images == whole.images(source) and held_back.classes == whole.classes
        np.testing.assert_array_equal(held_back.labels(split), whole.labels(source))
        assert os.path.samefile(held_back.image_path(images[0]), whole.image_path(images[0]))
        assert held_back.objects(images[0]).boxes.tolist() == whole.objects(
            images[0]).boxes.tolist()
        for image, rows in zip(images, proposals.read_mat(str(out / (split + ".mat")), images)):
            np.testing.assert_array_equal(rows, boxes[image][:, [1, 0, 3, 2]] - 1)
    assert not set(held_back.images("trainval")) & set(held_back.images("test"))


def test_rows_of_missing_pretrained_models_name_the_file(config, tmp_path):
    markdown, rows, _ = made(config, tmp_path, "table3")
    assert "| Agrawal et al. (2015) | 52.9 / not run | 41.8 / not run |" in markdown
    assert rows["Agrawal et al. (2015)", "Detection"]["note"] == (
        "not run: nowhere/agrawal.caffemodel is missing")


def test_cells_that_the_paper_leaves_out_are_dashes(config, tmp_path):
    markdown, rows, latex = made(config, tmp_path, "table1")
    assert "| within-layer (ours) | 47.6 / not run | 41.2 / not run | - | - | - | - |" in markdown
    assert ("within-layer (ours)", "Adam, Gaussian") not in rows
    assert "%" in latex.splitlines()[0] and "\\begin{tabular}{lcccccccc}" in latex


@pytest.mark.parametrize("text, message", [
    ("a: [", "cannot read the configuration"), ("- 1", "not a configuration")])
def test_a_broken_configuration_is_one_line(tmp_path, capsys, text, message):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    assert tables.main(["table1", "--config", str(path), "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert str(path) in error and message in error and error.count("\n") == 1
