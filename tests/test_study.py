"""study.py: its configuration, its data, the choice of rates, and a whole study in seconds."""
import csv
import os
from typing import NamedTuple

import cv2
import numpy as np
import pytest
import tiny_net
import yaml
from scipy import special

import study
import study_data
import study_report
import study_trial
from ddinit import processes, results
from ddinit.prototxt import build_net, read_definition
from image_batches import ArrayImages

CLASSES = 3


class Row(NamedTuple):
    name: str
    scaling: str
    tables: list
    method: str = "ours-gaussian"


@pytest.fixture
def data(tmp_path):
    """The path of 15 training and 6 test images of 3 classes, which their colour tells."""
    rng = np.random.default_rng(3)
    arrays = {}
    for split, count in (("train", 5), ("test", 2)):
        labels = np.repeat(np.arange(CLASSES, dtype=np.uint8), count)
        images = rng.integers(0, 80, (len(labels), 32, 32, 3))
        images[np.arange(len(labels)), :, :, labels] += 150
        arrays.update({split + "_images": images.astype(np.uint8), split + "_labels": labels})
    np.savez(tmp_path / "data.npz", **arrays)
    return str(tmp_path / "data.npz")


@pytest.fixture
def config(tmp_path):
    """A function that writes a configuration with changes and returns its path."""
    tiny_net.write(tmp_path / "tiny.prototxt")
    base = {
        "net": "tiny.prototxt", "validation_images": 3, "initialisation_images": 6,
        "iterations": 8, "batch_size": 4, "momentum": 0.9, "weight_decay": 0.0,
        "clip_gradients": 10, "pad": 2, "measure_every": 4, "learning_rates": [0.001, 1.0e-9],
        "seeds": [0, 5], "initialisations": {
            "Ours": {"method": "ours-gaussian", "scaling": "both", "tables": [1, 2]}}}

    def write(**changes):
        values = {**base, **changes}
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump({
            key: value for key, value in values.items() if value is not None}))
        return str(path)
    return write


# ---------------------------------------------------------------------------------------------
# Configuration
# ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("changes, said", [
    ({"momentun": 0.9}, "unknown key 'momentun'"),
    ({"pad": None}, "'pad' is missing"),
    ({"iterations": 0}, "'iterations' is 0, not above 0"),
    ({"iterations": 2.5}, "'iterations' is 2.5, not a whole number"),
    ({"momentum": "much"}, "'momentum' is 'much', not a number"),
    ({"learning_rates": []}, "'learning_rates' is .*, not a list"),
    ({"learning_rates": [-1]}, "'learning_rates' is -1, not above 0"),
    ({"seeds": [0.5]}, "seeds: 0.5 is not a whole number"),
    ({"initialisations": {"a/b": {}}}, "'a/b': a name is text that can be a folder's"),
    ({"initialisations": {"A": {"method": "gaussian"}}}, "'A' needs the keys"),
    ({"initialisations": {"A": {"method": "he", "scaling": "none", "tables": [1]}}},
     "'A': method and scaling must be of gaussian"),
    ({"initialisations": {"A": {"method": "msra", "scaling": "none", "tables": [3]}}},
     "'A': tables are"),
])
def test_what_is_wrong_in_a_configuration_is_named(config, changes, said):
    with pytest.raises(ValueError, match=said):
        study.read_configuration(config(**changes))


def test_the_shipped_configuration_holds_all_rows_of_both_tables():
    settings, rows = study.read_configuration(os.path.join(study.HERE, "study.yaml"))
    kinds = {(row.method, row.scaling) for row in rows}
    assert {("xavier", "none"), ("msra", "none"), ("reference", "none"), ("gaussian", "none"),
            ("ours-pca", "both")} < kinds
    assert {("ours-kmeans", scaling) for scaling in ("none", "within", "between", "both")} < kinds
    assert {("ours-gaussian", scaling) for scaling in ("within", "between", "both")} < kinds
    assert len(settings["seeds"]) >= 3 and os.path.isfile(settings["net"])


# ---------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------

def test_validation_images_are_balanced_and_not_trained_on():
    labels = np.array([0, 1, 2] * 10 + [2] * 6)
    train, validation = study_data.split(labels, 9)
    assert sorted([*train, *validation]) == list(range(36))
    assert np.bincount(labels[validation]).tolist() == [3, 3, 3]


def test_a_class_without_training_images_is_an_error():
    with pytest.raises(ValueError, match="leave none of class 0 to train on: it has 2"):
        study_data.split(np.array([0, 0, 1, 1, 1]), 4)


def test_images_are_laid_out_in_bgr_and_padded_with_their_borders(tmp_path, data):
    read = study_data.read(data)
    study_data.lay_out(read, 3, 2, str(tmp_path / "out"))
    train, validation = study_data.split(read.train_labels, 3)
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


def test_without_data_it_is_said_what_is_missing(tmp_path, config, capsys):
    np.savez(tmp_path / "half.npz", train_images=np.zeros((1, 2, 2, 3), np.uint8))
    for name, said in (("none.npz", "none.npz: no such file"), ("half.npz", "train_labels")):
        assert study.main(["--data", str(tmp_path / name), "--out", str(tmp_path / "out"),
                           "--config", config()]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
        assert "train_images, train_labels, test_images, test_labels" in error


def test_wrong_arrays_and_sizes_are_named(tmp_path, data, config):
    with np.load(data) as file:
        arrays = dict(file)
    for name, change, said in (
            ("train_images", lambda array: array / 255, "'train_images' is float64"),
            ("test_labels", lambda array: array[1:], "'test_labels' is uint8")):
        np.savez(tmp_path / "bad.npz", **{**arrays, name: change(arrays[name])})
        with pytest.raises(ValueError, match=said):
            study_data.read(str(tmp_path / "bad.npz"))
    small = {name: array[:, :28] if array.ndim == 4 else array for name, array in arrays.items()}
    np.savez(tmp_path / "small.npz", **small)
    settings, rows = study.read_configuration(config())
    with pytest.raises(ValueError, match="images of 28 x 32 pixels"):
        study.prepare(str(tmp_path / "small.npz"), settings, rows, str(tmp_path / "out"))


# ---------------------------------------------------------------------------------------------
# Scores, rates, tables
# ---------------------------------------------------------------------------------------------

def scores_of(definition, path):
    """Scores by the study, and (loss, accuracy) from logits by SciPy."""
    net, image = study_trial.scoring_net(definition)
    built = build_net(net)
    built.params["fc3"][0].data[...] = np.random.default_rng(0).standard_normal((10, 6))
    images = ArrayImages(path, "images", "labels")
    found = study_trial.scores(built, image, images)
    logits = []
    for index in range(len(images.labels)):
        built.blobs["data"].data[0] = images.read(index).transpose(2, 0, 1) - np.reshape(
            [104.0, 117.0, 123.0], (3, 1, 1))
        built.forward()
        logits.append(built.blobs["fc3"].data[0].astype(np.float64))
    losses = -special.log_softmax(logits, axis=1)[range(len(logits)), images.labels.astype(int)]
    return found, losses.mean(), (np.argmax(logits, axis=1) == images.labels).mean()


def test_scores_are_cross_entropy_and_accuracy_of_all_images(tmp_path):
    rng = np.random.default_rng(2)
    np.savez(tmp_path / "images.npz", images=rng.integers(0, 256, (107, 32, 32, 3), np.uint8),
             labels=rng.integers(0, 10, 107))
    found, loss, accuracy = processes.in_child(
        scores_of, tiny_net.write(tmp_path / "tiny.prototxt"), str(tmp_path / "images.npz"))
    assert found.loss == pytest.approx(loss, rel=1e-4)
    assert found.accuracy == pytest.approx(accuracy)


def trial(name, rate, validation, test, seed=0, diverged=None):
    return {"initialisation": name, "learning_rate": rate, "validation_accuracy": validation,
            "test_accuracy": test, "seed": seed, "diverged": diverged}


def test_rates_are_chosen_on_validation_images_not_on_the_test():
    trials = [trial("a", 0.1, 0.5, 0.9), trial("a", 0.2, 0.6, 0.1), trial("b", 0.1, 0.9, 0.9),
              trial("a", 0.3, 0.6, 0.2), trial("a", 0.4, None, None, diverged=3)]
    assert study_report.best_rates("a", trials) == [0.2, 0.3, 0.1]  # the smaller of equals first
    assert study_report.best_rates("c", [trial("c", 1, None, None, diverged=1)]) == []


def test_only_rates_that_all_seeds_tried_count_and_divergence_counts_as_0():
    trials = [trial("a", 0.1, 0.9, 0.9), trial("a", 0.2, 0.5, 0.5), trial("a", 0.3, 0.6, 0.6),
              trial("a", 0.2, 0.4, 0.4, seed=1), trial("a", 0.3, None, None, 1, diverged=2)]
    assert study_report.best_rates("a", trials) == [0.2, 0.3]


def test_the_table_shows_mean_and_error_of_the_chosen_rate():
    rows = [Row("a", "both", [1, 2]), Row("b", "none", [2])]
    trials = [trial("a", 0.1, 0.9, 0.2), trial("a", 0.2, 0.4, 0.3),
              trial("a", 0.2, 0.5, 0.5, seed=1), trial("a", 0.2, None, None, 2, diverged=9),
              trial("b", 0.1, None, None, diverged=1), trial("b", 0.2, None, None, diverged=1)]
    lines = study_report.summary(rows, trials)
    assert lines[0]["learning_rate"] == 0.2
    assert lines[0]["test_accuracy"] == pytest.approx(40)
    assert lines[0]["test_error_of_mean"] == pytest.approx(10)  # |50 - 30| / sqrt 2 / sqrt 2
    assert (lines[0]["trials"], lines[0]["diverged"], lines[1]["diverged"]) == (2, 1, 2)
    text = study_report.markdown(lines)
    assert text.count("| a | both | 0.2 | 45.0 ± 5.0 (1 diverged) | 40.0 ± 10.0 (1 diverged) |"
                      ) == 2  # in both tables
    assert text.count("| b | none | all diverged |") == 1


# ---------------------------------------------------------------------------------------------
# All of it
# ---------------------------------------------------------------------------------------------

def test_a_study_writes_its_results_and_repeats_nothing(tmp_path, data, config, capsys,
                                                        monkeypatch):
    out = tmp_path / "out"
    command = ["--data", data, "--out", str(out), "--config", config(), "--jobs", "1"]
    assert study.main(command) == 0
    assert "| Ours | both |" in capsys.readouterr().out
    found = results.read_json(str(out / "study.json"))
    assert [(one["learning_rate"], one["seed"]) for one in found["trials"][:2]] == [
        (0.001, 0), (1e-9, 0)]
    assert {(one["learning_rate"], one["seed"]) for one in found["trials"][2:]} == {
        (0.001, 5), (1e-9, 5)}
    assert found["rows"][0]["learning_rate"] in (0.001, 1e-9)
    assert all(0 <= one["test_accuracy"] <= 1 for one in found["trials"])
    assert found["settings"]["iterations"] == 8
    with open(out / "study.csv", newline="") as file:
        row = next(csv.DictReader(file))
    assert (row["initialisation"], row["trials"], row["tables"]) == ("Ours", "2", "1 2")
    assert cv2.imread(str(out / "study.png")).shape[0] > 400
    net = read_definition(str(out / "net.prototxt"))
    assert [layer.inner_product_param.num_output for layer in net.layer
            if layer.name == "fc3"] == [CLASSES]

    monkeypatch.setattr(study, "run_trial", None)  # nothing is left to train
    assert study.main(command) == 0
    assert results.read_json(str(out / "study.json"))["trials"] == found["trials"]
    assert study.main([*command[:-4], "--config", config(iterations=9)]) == 2
    assert "holds a trial with iterations 8, not 9" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_is_a_result(tmp_path, data, config):
    settings, rows = study.read_configuration(config())
    made = study.prepare(data, settings, rows, str(tmp_path / "out"))
    weights = str(tmp_path / "huge.caffemodel")
    processes.in_child(write_huge, made.definition, weights)
    asked = study_trial.Trial(made.definition, weights, str(tmp_path / "out" / "data"),
                              str(tmp_path / "trial"), 1.0, 0, made.settings, {})
    found = processes.in_child(study_trial.run_trial, asked)
    assert found["diverged"] == 1 and found["test_accuracy"] is None
    assert study_trial.finished(asked) == results.read_json(str(tmp_path / "trial/result.json"))


def write_huge(definition, path):
    """Write weights whose scores exceed what a float holds."""
    net = build_net(read_definition(definition))
    for blobs in net.params.values():
        blobs[0].data[...] = 1e30 * np.random.default_rng(0).standard_normal(blobs[0].data.shape)
    net.save(path)
