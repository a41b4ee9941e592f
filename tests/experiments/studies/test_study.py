"""study.py: its configuration, its data, the choice of rates, and a whole study in seconds."""
import csv
import json
import os

import cv2
import numpy as np
import pytest
import tiny_net
import yaml

import study
from ddinit import processes, results
from ddinit.prototxt import build_net, read_definition
from studies import choice, data, report
from study import Row
from tables.configuration import read_configuration

SCHEMA = os.path.join(study.HERE, "study.schema.yaml")
OURS = {"method": "ours-gaussian", "scaling": "both", "tables": [1, 2]}


@pytest.fixture
def config(tmp_path):
    """A function that writes a configuration with changes and returns its path."""
    tiny_net.write(tmp_path / "tiny.prototxt")
    base = {
        "nets": {"caffenet": "tiny.prototxt"}, "validation_images": 3,
        "initialization_images": 6, "epochs": 2, "parts": 2, "batch_size": 4, "pad": 2,
        "validations": 2, "last_std": 0.01,
        "solvers": {"SGD": {"momentum": 0.9}, "Adam": {"momentum2": 0.99}},
        "learning_rates": {"SGD": [0.001, 0.01], "Adam": [0.001]}, "widen": 0, "finalists": 1,
        "seeds": [0, 5], "columns": ["SGD"], "rows": {"Ours": OURS}}

    def write(name="study.yaml", **changes):
        values = {**base, **changes}
        path = tmp_path / name
        path.write_text(yaml.safe_dump({
            key: value for key, value in values.items() if value is not None}))
        return str(path)
    return write


# ---------------------------------------------------------------------------------------------
# Configuration
# ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("changes, said", [
    ({"momentun": 0.9}, "'momentun' was unexpected"),
    ({"pad": None}, "'pad' is a required property"),
    ({"epochs": 0}, "epochs: 0 is less than the minimum of 1"),
    ({"learning_rates": {"SGD": [-1], "Adam": [1]}}, "learning_rates/SGD/0: -1 is less"),
    ({"seeds": [0.5]}, "seeds/0: 0.5 is not of type 'integer'"),
    ({"rows": {"a/b": OURS}}, "'a/b' does not match"),
    ({"rows": {"A": {**OURS, "method": "he"}}}, "rows/A/method: 'he' is not one of"),
    ({"rows": {"A": {**OURS, "tables": [3]}}}, "rows/A/tables/0: 3 is not one of"),
    ({"rows": {"A": {**OURS, "colums": ["Adam"]}}}, "'colums' was unexpected"),
])
def test_what_is_wrong_in_a_configuration_is_named(config, changes, said):
    path = config(**changes)
    with pytest.raises(ValueError, match=said) as error:
        read_configuration([path], SCHEMA)
    assert path in str(error.value)


def test_the_shipped_configuration_holds_all_rows_of_both_tables():
    settings = read_configuration([os.path.join(study.HERE, "study.yaml")], SCHEMA)
    rows = study.rows_of({**settings, "columns": ["SGD", "SGD + BN", "Adam", "Adam + BN"]}, [])
    kinds = {(row.method, row.scaling) for row in rows}
    assert {("xavier", "none"), ("msra", "none"), ("reference", "none"), ("gaussian", "none"),
            ("ours-pca", "both")} < kinds
    assert {("ours-kmeans", scaling) for scaling in ("none", "within", "between", "both")} < kinds
    assert {row.column for row in rows if row.name == "Ours, k-means"} == set(
        study.SOLVER_COLUMNS)
    assert [row.name for row in rows if row.literal] == ["Ours, k-means, equation 2 to the letter"]
    assert settings["solvers"]["Adam"]["momentum2"] == 0.99
    assert settings["epochs"] >= 40 and len(settings["seeds"]) >= 3
    for net in settings["nets"].values():
        assert os.path.isfile(os.path.join(study.HERE, net))
    # every row of the paper's tables 1 and 2 for classification is there, in all its columns
    ours = {(report.paper(row), row.column) for row in rows}
    for name in ("table1", "table2"):
        for cell in report.TABLES[name].cells:
            if cell.run.task == "classification":
                assert cell.paper in {number for number, _ in ours}


def test_a_later_file_replaces_keys_and_the_quick_one_fits():
    paths = [os.path.join(study.HERE, name) for name in ("study.yaml", "study_quick.yaml")]
    settings = read_configuration(paths, SCHEMA)
    assert settings["epochs"] < 5 and settings["seeds"] == [0]
    assert len(settings["rows"]) == len(read_configuration(paths[:1], SCHEMA)["rows"])


# ---------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------

def test_validation_images_are_balanced_and_not_trained_on():
    labels = np.array([0, 1, 2] * 10 + [2] * 6)
    train, validation = data.split(labels, 9)
    assert sorted([*train, *validation]) == list(range(36))
    assert np.bincount(labels[validation]).tolist() == [3, 3, 3]


def test_a_class_without_training_images_is_an_error():
    with pytest.raises(ValueError, match="leave no image of class 0 to train on, which has only"):
        data.split(np.array([0, 0, 1, 1, 1]), 4)


def test_images_are_laid_out_in_bgr_and_padded_with_their_borders(tmp_path, small_images):
    read = data.read(small_images)
    data.lay_out(read, 3, 2, str(tmp_path / "out"))
    train, validation = data.split(read.train_labels, 3)
    with np.load(tmp_path / "out" / "train.npz") as arrays:
        assert arrays["images"].shape == (12, 36, 36, 3)
        bgr = read.train_images[train][..., ::-1]
        assert (arrays["images"][:, 2:-2, 2:-2] == bgr).all()
        assert (arrays["images"][:, 0, 2:-2] == bgr[:, 0]).all()
        assert (arrays["labels"] == read.train_labels[train]).all()
    with np.load(tmp_path / "out" / "validation.npz") as arrays:
        assert (arrays["images"] == read.train_images[validation][..., ::-1]).all()
    files = sorted(os.listdir(tmp_path / "out" / "images"))
    assert files == ["%06d.png" % number for number in train]
    assert (cv2.imread(str(tmp_path / "out" / "images" / files[0])) == bgr[0]).all()


def test_a_folder_of_other_data_is_not_used_for_these(tmp_path, small_images):
    data.prepare(small_images, 3, 2, str(tmp_path / "out"), 32)
    data.prepare(small_images, 3, 2, str(tmp_path / "out"), 32)
    with pytest.raises(ValueError, match="out: .* Use another folder"):
        data.prepare(small_images, 3, 4, str(tmp_path / "out"), 32)


def test_without_data_it_is_said_what_is_missing(tmp_path, config, capsys):
    np.savez(tmp_path / "half.npz", train_images=np.zeros((1, 2, 2, 3), np.uint8))
    for name, said in (("none.npz", "none.npz: the file does not exist"),
                       ("half.npz", "train_labels")):
        assert study.main(["--data", str(tmp_path / name), "--out", str(tmp_path / "out"),
                           "--config", config()]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
        assert "train_images, train_labels, test_images, test_labels" in error


def test_wrong_arrays_and_sizes_are_named(tmp_path, small_images):
    with np.load(small_images) as file:
        arrays = dict(file)
    for name, change, said in (
            ("train_images", lambda array: array / 255, "'train_images' is float64"),
            ("test_labels", lambda array: array[1:], "'test_labels' is uint8")):
        np.savez(tmp_path / "bad.npz", **{**arrays, name: change(arrays[name])})
        with pytest.raises(ValueError, match=said):
            data.read(str(tmp_path / "bad.npz"))
    small = {name: array[:, :28] if array.ndim == 4 else array for name, array in arrays.items()}
    np.savez(tmp_path / "small.npz", **small)
    with pytest.raises(ValueError, match="the images have 28 x 32 pixels"):
        data.prepare(str(tmp_path / "small.npz"), 3, 2, str(tmp_path / "out"), 32)


# ---------------------------------------------------------------------------------------------
# Rates and tables
# ---------------------------------------------------------------------------------------------

A, B = Row("a", "SGD", "ours-kmeans", "both", [1, 2]), Row("b", "Adam", "xavier", "none", [2])


def trial(row, rate, validation, test=None, seed=0, diverged=None):
    return {"row": row.name, "column": row.column, "learning_rate": rate, "seed": seed,
            "validation_accuracy": validation, "test_accuracy": test, "diverged": diverged,
            "folder": "nowhere"}


def test_rates_are_chosen_on_validation_images_not_on_the_test():
    trials = [trial(A, 0.1, 0.5, 0.9), trial(A, 0.2, 0.6, 0.1), trial(B, 0.1, 0.9, 0.9),
              trial(A, 0.3, 0.6, 0.2), trial(A, 0.4, None, diverged=3)]
    assert choice.best_rates(A, trials) == [0.2, 0.3, 0.1]  # the smaller of equals first
    assert choice.best_rates(B, [trial(B, 1, None, diverged=1)]) == []
    assert choice.best_rates(A._replace(column="Adam"), trials) == []


def test_only_rates_that_all_seeds_tried_count_and_divergence_counts_as_0():
    trials = [trial(A, 0.1, 0.9), trial(A, 0.2, 0.5), trial(A, 0.3, 0.6),
              trial(A, 0.2, 0.4, seed=1), trial(A, 0.3, None, seed=1, diverged=2)]
    assert choice.best_rates(A, trials) == [0.2, 0.3]


@pytest.mark.parametrize("accuracies, expected", [
    ([0.5, 0.4, 0.3], [0.0003]), ([0.3, 0.4, 0.5], [0.03]), ([0.3, 0.5, 0.4], []),
    ([None, None, None], [0.0003]), ([0.3, 0.4, None], [])])
def test_the_grid_widens_where_the_best_rate_is_at_an_end(accuracies, expected):
    trials = [trial(A, rate, accuracy, diverged=None if accuracy else 1)
              for rate, accuracy in zip((0.001, 0.003, 0.01), accuracies)]
    assert choice.next_rate(choice.best_rates(A, trials), trials, A) == expected


def test_the_table_shows_mean_and_error_of_the_chosen_rate_and_the_papers_number():
    trials = [trial(A, 0.1, 0.9, 0.2), trial(A, 0.2, 0.4, 0.3), trial(A, 0.2, 0.5, 0.5, seed=1),
              trial(A, 0.2, None, seed=2, diverged=9), trial(B, 0.1, None, diverged=1),
              trial(B, 0.2, None, diverged=1)]
    lines = [report.summary(row, trials) for row in (A, B)]
    assert lines[0]["learning_rate"] == 0.2 and lines[0]["last_rate_tried"]
    assert lines[0]["test_accuracy"] == pytest.approx(40)
    assert lines[0]["test_standard_error"] == pytest.approx(10)  # |50 - 30| / sqrt 2 / sqrt 2
    assert (lines[0]["trials"], lines[0]["diverged"], lines[1]["diverged"]) == (2, 1, 2)
    text = report.markdown(lines)
    assert text.count("| a | both | SGD | 0.2, the last one | 45.0 ± 5.0 (1 diverged) "
                      "| 40.0 ± 10.0 (1 diverged) | 56.6 |") == 2  # in both tables
    assert text.count("| b | none | Adam | all diverged |") == 1


@pytest.mark.parametrize("row, number", [
    (Row("x", "Adam + BN", "ours-gaussian", "between", [1]), 54.5),
    (Row("x", "SGD", "gaussian", "none", [1, 2]), 50.8),
    (Row("x", "SGD", "msra", "none", [2]), 43.3),
    (Row("x", "SGD", "ours-kmeans", "both", [2], literal=True), None),
    (Row("x", "SGD", "ours-kmeans", "both", [2], keep_last=True), None),
    (Row("x", "SGD", "from files", "none", [2]), None)])
def test_the_papers_numbers_are_those_of_its_tables(row, number):
    assert report.paper(row) == number


# ---------------------------------------------------------------------------------------------
# All of it
# ---------------------------------------------------------------------------------------------

def test_a_study_writes_its_results_and_repeats_nothing(tmp_path, small_images, config, capfd,
                                                        monkeypatch):
    out = tmp_path / "out"
    for seed in (0, 5):
        processes.in_child(write_weights, str(tmp_path / "tiny.prototxt"),
                           str(tmp_path / ("other%d.caffemodel" % seed)))
    path = config(rows={"Ours": OURS, "Adam too": {
        "method": "reference", "scaling": "none", "tables": [1], "columns": ["Adam"],
        "keep_last": True}},
        columns=["SGD", "Adam"])
    command = ["--data", small_images, "--out", str(out), "--config", path, "--jobs", "2",
               "--start", "Other=%s/other{seed}.caffemodel" % tmp_path]
    assert study.main(command) == 0
    shown = capfd.readouterr().out
    assert "| Ours | both | SGD |" in shown and "| Other | none | SGD |" in shown
    found = json.loads((out / "study.json").read_text())
    tried = {(one["row"], one["learning_rate"], one["seed"]) for one in found["trials"]}
    best = {row["row"]: row["learning_rate"] for row in found["rows"]}
    assert tried == {("Ours", 0.001, 0), ("Ours", 0.01, 0), ("Ours", best["Ours"], 5),
                     ("Other", 0.001, 0), ("Other", 0.01, 0), ("Other", best["Other"], 5),
                     ("Adam too", 0.001, 0), ("Adam too", 0.001, 5)}
    for one in found["trials"]:
        assert 0 <= one["test_accuracy"] <= 1
        curve = results.read_json(str(out / one["folder"] / "run.json"))
        assert curve["iteration"] == found["iterations"] == 2 * 12 // 4
        assert curve["repeat"]["last_std"] == (None if one["row"] == "Adam too" else 0.01)
    with open(out / "study.csv", newline="") as file:
        rows = {row["row"]: row for row in csv.DictReader(file)}
    assert (rows["Ours"]["trials"], rows["Ours"]["tables"]) == ("2", "1 2")
    for name in ("table1.png", "table2.png"):
        assert cv2.imread(str(out / name)).shape[0] > 200
    net = read_definition(str(out / "caffenet.prototxt"))
    assert [layer.inner_product_param.num_output for layer in net.layer
            if layer.name == "fc3"] == [3]
    adam = results.read_json(str(out / "trials/Adam too/Adam/lr0.001/seed0/run.json"))["solver"]
    assert 'type: "Adam"' in adam and "momentum2: 0.99" in adam and "stepsize: 3" in adam

    monkeypatch.setattr(study.Runner, "run", None)  # nothing is left to run
    assert study.main(command) == 0
    assert json.loads((out / "study.json").read_text())["trials"] == found["trials"]


def write_weights(definition, path):
    net = build_net(read_definition(definition))
    net.params["fc3"][0].reshape(3, 6)  # an output for each class
    net.params["fc3"][1].reshape(3)
    net.save(path)


@pytest.mark.parametrize("options, said", [
    (["--start", "x=missing{seed}.caffemodel"], "missing0.caffemodel: there is no such file"),
    (["--config", "missing.yaml"], "missing.yaml")])
def test_what_is_missing_is_said_before_anything_runs(tmp_path, small_images, config, capsys,
                                                      options, said):
    assert study.main(["--data", small_images, "--out", str(tmp_path / "out"), "--config",
                       config(), *options]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_command_that_fails_ends_the_study_with_its_last_line(tmp_path, small_images, config,
                                                                capsys):
    (tmp_path / "other.caffemodel").write_bytes(b"no weights")
    assert study.main(["--data", small_images, "--out", str(tmp_path / "out"), "--config",
                       config(), "--start", "Other=%s/other.caffemodel" % tmp_path]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "other.caffemodel" in last and "train_imagenet.py: error: " in last
