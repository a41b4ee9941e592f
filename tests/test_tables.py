"""tables.py: the paper's numbers, ours and their difference, and what was not run."""
import csv
import json
import os

import pytest
import yaml

import tables
from cells import TABLES, Places, Run

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


def put(config, run, rate, seed, result):
    path = Places(tables.read_configuration(config)).result(run, rate, seed)
    os.makedirs(os.path.dirname(path))
    with open(path, "w") as file:
        json.dump(result, file)


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


def test_the_best_learning_rate_is_shown_with_mean_and_standard_error(config, tmp_path):
    for seed, precision in enumerate((0.55, 0.56, 0.60)):  # mean 57, s = 2.6458, s / sqrt(3)
        put(config, KMEANS, "0.001", seed, {"mAP": precision})
        put(config, KMEANS, "0.01", seed, {"mAP": 0.5})
    markdown, rows, latex = made(config, tmp_path, "table2")
    assert "| Ours (k-means) | 56.6 / 57.0 ± 1.5 (+0.4) | 45.6 / not run |" in markdown
    assert "Ours (k-means) & 56.6 / 57.0 $\\pm$ 1.5 (+0.4) & 45.6 / not run \\\\" in latex
    row = rows["Ours (k-means)", "Classification"]
    assert row["learning_rate"] == "0.001" and row["seeds"] == "3"
    assert float(row["standard_error"]) == pytest.approx(1.5275, abs=1e-4)
    assert float(row["difference"]) == pytest.approx(0.4)


def test_a_cell_with_part_of_its_seeds_says_so(config, tmp_path):
    put(config, KMEANS, "0.001", 1, {"mAP": 0.5})
    markdown, rows, _ = made(config, tmp_path, "table2")
    assert "56.6 / 50.0 (-6.6) [1 of 3 seeds]" in markdown
    assert rows["Ours (k-means)", "Classification"]["standard_error"] == ""


def test_learning_rates_at_which_a_seed_diverged_do_not_count(config, tmp_path):
    put(config, KMEANS, "0.01", 0, {"mAP": 0.9})
    put(config, KMEANS, "0.01", 1, {"diverged": 17})
    put(config, KMEANS, "0.001", 0, {"mAP": 0.5})
    put(config, XAVIER, "0.001", 0, {"diverged": 3})
    markdown, rows, _ = made(config, tmp_path, "table2")
    assert rows["Ours (k-means)", "Classification"]["ours"] == "50.0"
    assert "| Xavier | 51.1 / diverged at every learning rate | 40.4 / not run |" in markdown


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
