"""experiments/train_imagenet.py: the paper's solvers, its nets, and curves that are Caffe's."""
import csv
import json
import os
import shutil

import numpy as np
import pytest
from written_database import write_database

import train_imagenet
from ddinit import processes, results
from ddinit.prototxt import build_net, caffe_messages, read_definition
from imagenet import images, nets
from imagenet.databases import LmdbImages
from training import loop, run_folder
from training.batches import Crops, ImageBatches

NET = """
name: "tiny"
layer { name: "data" type: "Input" top: "data"
        input_param { shape { dim: 10 dim: 3 dim: 8 dim: 8 } } }
layer { name: "conv" type: "Convolution" bottom: "data" top: "conv"
        convolution_param { num_output: 4 kernel_size: 3
                            weight_filler { type: "gaussian" std: 0.01 } } }
layer { name: "relu" type: "ReLU" bottom: "conv" top: "conv" }
layer { name: "side" type: "InnerProduct" bottom: "conv" top: "side"
        inner_product_param { num_output: 4 weight_filler { type: "xavier" } } }
layer { name: "drop" type: "Dropout" bottom: "conv" top: "drop" }
layer { name: "main" type: "InnerProduct" bottom: "drop" top: "main"
        inner_product_param { num_output: 4 weight_filler { type: "xavier" } } }
"""
COLOURS = np.array([[200, 40, 40], [40, 200, 40], [40, 40, 200]])
SIDE = 11  # pixels of the images in the databases, of which the net sees 8


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A net, and databases of noisy images of three colours: 30 to train on, 12 to validate."""
    folder = tmp_path_factory.mktemp("imagenet")
    (folder / "net.prototxt").write_text(NET)
    rng = np.random.default_rng(6)
    for name, count in (("train", 30), ("val", 12)):
        noise = rng.integers(-40, 40, (count, 3, SIDE, SIDE))
        write_database(str(folder / (name + ".lmdb")), [
            ((COLOURS[number % 3][:, None, None] + one).astype(np.uint8), number % 3)
            for number, one in enumerate(noise)])
    return folder


def completed(words):
    arguments = train_imagenet.parse(words)
    train_imagenet._complete(arguments)
    return arguments


def options(data, out, *more):
    return [str(data / "net.prototxt"), "none", str(out), "--train", str(data / "train.lmdb"),
            "--val", str(data / "val.lmdb"), "--classes", "3", "--preset", "googlenet",
            "--batch-size", "6", "--validate-every", "4", "--snapshot", "5", "--lr", "0.0005",
            "--workers", "0", "--cpu", *more]


def read_curves(folder):
    with open(os.path.join(str(folder), "curves.csv"), newline="") as file:
        return [{name: float(cell) for name, cell in row.items()} for row in csv.DictReader(file)]


# ---------------------------------------------------------------------------------------------
# A run
# ---------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """The folder of a run of 10 iterations."""
    out = tmp_path_factory.mktemp("run") / "whole"
    assert train_imagenet.main(options(data, out, "--iterations", "10")) == 0
    return out


def test_curves_have_training_and_validation_loss_and_error(run):
    rows = read_curves(run)
    assert [row["iteration"] for row in rows] == [0, 4, 8, 10]
    assert list(rows[0]) == ["iteration", "training_loss", "training_error", "validation_loss",
                             "validation_error"]
    assert np.isnan(rows[0]["training_loss"])
    assert rows[-1]["validation_loss"] < rows[0]["validation_loss"]
    assert rows[-1]["training_loss"] < rows[1]["training_loss"]


def test_training_values_are_means_of_the_last_classifier_since_the_row_before(run):
    log = run_folder.read_table(str(run / "log.csv"))
    rows = read_curves(run)
    for row, first in zip(rows[1:], (0, 4, 8)):
        between = [one for one in log if first < one["iteration"] <= row["iteration"]]
        assert row["training_loss"] == pytest.approx(
            np.mean([one["final_loss"] for one in between]))
        assert row["training_error"] == pytest.approx(
            1 - np.mean([one["training_accuracy"] for one in between]))
    for one in log:  # the auxiliary loss counts 0.3 times, the accuracy not at all
        assert one["loss"] == pytest.approx(one["final_loss"] + 0.3 * one["side/loss"], rel=1e-6)
        assert round(one["training_accuracy"] * 6, 5) in range(7)


def test_validation_is_what_caffes_own_layers_say(data, run):
    """Caffe's Data, SoftmaxWithLoss and Accuracy layers on the same database and weights."""
    loss, accuracy = processes.in_child(_by_caffe, str(data / "val.lmdb"), str(run))
    last = read_curves(run)[-1]
    assert last["validation_loss"] == pytest.approx(loss, rel=1e-5)
    assert last["validation_error"] == pytest.approx(1 - accuracy, abs=1e-6)


def _by_caffe(path, run):
    messages = caffe_messages()
    trained = read_definition(os.path.join(run, "train_val.prototxt"))
    net = messages.NetParameter()
    source = net.layer.add(name="data", type="Data", top=["data", "label"])
    source.data_param.source, source.data_param.batch_size = path, 12
    source.data_param.backend = source.data_param.LMDB
    source.transform_param.crop_size = 8
    source.transform_param.mean_value.extend([104, 117, 123])
    net.layer.extend(layer for layer in trained.layer
                     if layer.name in ("conv", "relu", "drop", "main"))
    net.layer.add(name="loss", type="SoftmaxWithLoss", bottom=["main", "label"], top=["loss"])
    net.layer.add(name="accuracy", type="Accuracy", bottom=["main", "label"], top=["accuracy"])
    built = build_net(net)
    built.copy_from(os.path.join(run, "final.caffemodel"))
    built.forward()
    return float(built.blobs["loss"].data), float(built.blobs["accuracy"].data)


def test_a_killed_run_goes_on_to_the_same_bytes(data, run, tmp_path):
    """What a kill in iteration 10 leaves: the snapshot of iteration 5, and rows behind it."""
    killed = tmp_path / "killed"
    shutil.copytree(str(run), str(killed))
    for name in ("final.caffemodel", "snapshot_10.caffemodel", "snapshot_10.solverstate"):
        (killed / name).unlink()
    assert train_imagenet.main(options(data, killed, "--iterations", "10", "--resume")) == 0
    for name in ("final.caffemodel", "curves.csv"):
        assert (killed / name).read_bytes() == (run / name).read_bytes()


def test_run_json_holds_what_repeats_the_run(data, run):
    record = results.read_json(str(run / "run.json"))
    assert record["repeat"]["paths"]["train"] == str(data / "train.lmdb")
    assert record["repeat"]["train_images"] == 30
    assert record["repeat"]["batch_size"] == 6
    assert record["finished"]


def test_nan_stops_with_the_iteration_and_one_line(data, tmp_path, capsys):
    assert train_imagenet.main(options(data, tmp_path / "out", "--iterations", "9",
                                       "--lr", "1e30")) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "the loss is" in error
    assert "iteration 2 " in error


def test_a_label_beyond_the_classes_is_named(tmp_path):
    write_database(str(tmp_path / "train.lmdb"), [
        (np.zeros((3, 8, 8), np.uint8), label) for label in [7] * 20])
    database = LmdbImages(str(tmp_path / "train.lmdb"), 3)
    with pytest.raises(ValueError, match="the label is 7, but there are 3 classes"):
        ImageBatches(database, Crops(8, 8), 6, seed=1)(0)


# ---------------------------------------------------------------------------------------------
# Solvers and nets
# ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("preset, iterations, rates", [
    ("caffenet", 320000, {0: 1e-2, 99999: 1e-2, 100000: 1e-3, 200000: 1e-4, 319999: 1e-5}),
    ("googlenet", 2400000, {0: 1e-2, 1200000: 1e-2 * 0.5 ** 0.5, 1800000: 5e-3}),
])
def test_presets_are_the_papers(data, preset, iterations, rates):
    arguments = completed(["net", "none", "out", "--train", "t", "--val", "v", "--preset", preset])
    solver = train_imagenet.solver_of(arguments)
    google = preset == "googlenet"
    assert arguments.iterations == iterations
    assert arguments.batch_size == (32 if google else 256)
    assert solver.momentum == pytest.approx(0.9)
    assert solver.weight_decay == pytest.approx(2e-4 if google else 5e-4)
    for iteration, rate in rates.items():
        assert loop.learning_rate(solver, iteration, iterations) == pytest.approx(rate)


@pytest.mark.parametrize("std, filled", [("0", "constant"), ("0.01", "gaussian")])
def test_last_std_draws_every_classifier_anew_and_does_not_load_it(data, std, filled):
    arguments = completed(options(data, "out", "--last-std", std))
    arguments.weights = "some.caffemodel"
    validation = train_imagenet.scores(arguments, arguments.val)
    plan = train_imagenet.training_plan(arguments, None, validation)
    assert plan.fresh == ["side", "main"]
    for layer in plan.net.layer:
        if layer.name in plan.fresh:
            weights, biases = (layer.inner_product_param.weight_filler,
                               layer.inner_product_param.bias_filler)
            assert (weights.type, weights.value) == (filled, 0)
            assert weights.std == pytest.approx(float(std))
            assert (biases.type, biases.value) == ("constant", 0)
            assert layer.inner_product_param.num_output == 3


def test_the_validation_net_has_no_towers(data):
    net = nets.classifier(read_definition(str(data / "net.prototxt")), 2, 3)
    validation = nets.validation_definition(net)
    assert [layer.name for layer in validation.layer] == ["data", "conv", "relu", "drop", "main"]


def test_another_solver_comes_from_a_file_and_other_images_are_tested(data, tmp_path):
    path = tmp_path / "solver.prototxt"
    path.write_text('type: "Adam" base_lr: 0.002 lr_policy: "fixed" max_iter: 3 momentum2: 0.99')
    rng = np.random.default_rng(1)
    for name in ("train", "test"):
        np.savez(tmp_path / (name + ".npz"), labels=np.arange(9) % 3,
                 images=rng.integers(0, 256, (9, SIDE, SIDE, 3), np.uint8))
    words = options(data, tmp_path / "out", "--test", str(tmp_path / "test.npz"), "--solver",
                    str(path), "--train", str(tmp_path / "train.npz"))
    for name in ("--preset", "--lr"):
        del words[words.index(name):words.index(name) + 2]
    assert train_imagenet.main(words) == 0
    record = results.read_json(str(tmp_path / "out" / "run.json"))
    assert record["iteration"] == 3 and record["repeat"]["train_images"] == 9
    assert "momentum2: 0.99" in record["solver"] and 'type: "Adam"' in record["solver"]
    result = tmp_path / "out" / "result.json"
    first = json.loads(result.read_text())
    assert round(first["test_error"] * 9, 5) in range(10) and first["test_loss"] > 0
    result.unlink()  # a run that was killed before its test
    assert train_imagenet.main([*words, "--resume"]) == 0
    assert json.loads(result.read_text())["test_error"] == first["test_error"]
    path.write_text("type: Adam base")
    assert train_imagenet.main(words) == 2


def test_loss_and_error_of_known_scores():
    scores = np.array([[0, 0], [np.log(3), 0], [1000, 0], [np.nan, 0]])
    labels = np.array([0, 1, 0, 0])
    np.testing.assert_allclose(nets.softmax_loss(scores, labels),
                               [np.log(2), np.log(4), 0, np.nan])
    assert nets.error_rate(scores, labels) == 0.5
    assert nets.error_rate(scores.reshape(4, 2, 1, 1), labels) == 0.5


# ---------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------

def test_a_batch_is_unscaled_crops_of_the_databases_images(data):
    database = LmdbImages(str(data / "train.lmdb"), 3)
    crops = Crops(8, 8, min_scale=1.0, max_scale=1.0, mean=(0, 0, 0))
    batch = ImageBatches(database, crops, 6, seed=1)(2)
    whole = [database.read(index).transpose(2, 0, 1) for index in range(30)]
    for crop, label in zip(*batch.arrays):
        places = [index for index, image in enumerate(whole) if _is_part(crop, image)]
        assert len(places) == 1
        assert label == places[0] % 3


def _is_part(crop, image):
    """Whether a crop, or its mirror image, lies somewhere in an image."""
    size = crop.shape[1]
    places = range(image.shape[1] - size + 1)
    return any(np.array_equal(image[:, top:top + size, left:left + size], one)
               for one in (crop, crop[:, :, ::-1]) for top in places for left in places)


def test_central_crops_are_caffes():
    """11 - 8 leaves 3 pixels: 1 before and 2 behind; Caffe's offset is (11 - 8) / 2 = 1."""
    image = np.arange(11 * 11 * 3, dtype=np.uint8).reshape(11, 11, 3)
    crop = images.central_crop(image, Crops(8, 8, mean=(0, 0, 0)))
    np.testing.assert_array_equal(crop, image[1:9, 1:9].transpose(2, 0, 1))
    with pytest.raises(ValueError, match="11 x 11 pixels is smaller than the net's input of 12"):
        images.central_crop(image, Crops(12, 8, mean=(0, 0, 0)))


def test_validation_batches_go_round_and_leave_out_nothing(data):
    batch_of = images.make_central_batches(str(data / "val.lmdb"), 3, Crops(8, 8), 5)
    assert [len(batch_of(number).arrays[1]) for number in range(4)] == [5, 5, 2, 5]
    np.testing.assert_array_equal(batch_of(3).arrays[0], batch_of(0).arrays[0])
    labels = np.concatenate([batch_of(number).arrays[1] for number in range(3)])
    assert labels.tolist() == [number % 3 for number in range(12)]
