"""detect_voc.py from a folder to average precision: resumed, and refused."""
import csv
import json
import os
import re

import cv2
import numpy as np
import pytest
import scipy.io

import detect_voc
from ddinit.prototxt import caffe_messages
from voc.folders import Voc

NET = """
    name: "small"
    layer { name: "data" type: "Input" top: "data"
            input_param { shape { dim: 1 dim: 3 dim: 48 dim: 48 } } }
    layer { name: "conv1" type: "Convolution" bottom: "data" top: "conv1"
            convolution_param { num_output: 8 kernel_size: 7 stride: 4
                                weight_filler { type: "gaussian" std: 0.01 } } }
    layer { name: "relu1" type: "ReLU" bottom: "conv1" top: "conv1" }
    layer { name: "pool1" type: "Pooling" bottom: "conv1" top: "pool1"
            pooling_param { pool: MAX kernel_size: 3 stride: 2 } }
    layer { name: "fc6" type: "InnerProduct" bottom: "pool1" top: "fc6"
            inner_product_param { num_output: 24 weight_filler { type: "xavier" } } }
    layer { name: "relu6" type: "ReLU" bottom: "fc6" top: "fc6" }
    layer { name: "drop6" type: "Dropout" bottom: "fc6" top: "fc6" }
    layer { name: "fc7" type: "InnerProduct" bottom: "fc6" top: "fc7"
            inner_product_param { num_output: 5 weight_filler { type: "xavier" } } }
"""
SIZE = ["--scales", "120", "--max-size", "300", "--cpu", "--workers", "0"]


def jittered(voc, split, rng):
    """Proposals of a split: around each object, and anywhere; int16 columns y1 x1 y2 x2 from 1."""
    cells = np.empty((1, len(voc.images(split))), object)
    for number, image in enumerate(voc.images(split)):
        objects = voc.objects(image)
        near = np.repeat(objects.boxes, 12, axis=0)
        near = near + rng.uniform(-8, 8, near.shape)
        corners = np.sort(rng.uniform(0, 1, (40, 2, 2)), axis=1).reshape(-1, 4)
        far = corners * [159, 119, 159, 119]
        rows = np.clip(np.vstack([near, far]), 0, [159, 119, 159, 119]).round()
        cells[0, number] = (rows[:, [1, 0, 3, 2]] + 1).astype(np.uint16)
    return cells


@pytest.fixture
def files(voc_folder, tmp_path):
    """A folder with net.prototxt, trainval.mat and test.mat."""
    rng = np.random.default_rng(0)
    (tmp_path / "net.prototxt").write_text(NET)
    for split in ("trainval", "test"):
        scipy.io.savemat(str(tmp_path / (split + ".mat")),
                         {"boxes": jittered(Voc(voc_folder), split, rng)})
    return tmp_path


def train(files, voc_folder, folder, *more):
    return detect_voc.main(["train", str(files / "net.prototxt"), "none", str(files / folder),
                            "--voc", voc_folder, "--proposals", str(files / "trainval.mat"),
                            *SIZE, *more])


def test(files, voc_folder, weights, *more):
    return detect_voc.main(["test", str(files / "net.prototxt"), str(files / weights),
                            "--voc", voc_folder, "--proposals", str(files / "test.mat"),
                            "--out", str(files / "result.json"), *SIZE, *more])


test.__test__ = False


def test_a_net_that_is_trained_finds_discs_and_squares(files, voc_folder, capfd):
    assert train(files, voc_folder, "run", "--iterations", "120", "--lr", "0.002") == 0
    rows = list(csv.DictReader(open(str(files / "run" / "log.csv"))))
    assert len(rows) == 120 and {"loss", "loss_cls", "loss_bbox"} <= set(rows[0])
    assert not (files / "run" / ".rois").exists()
    assert test(files, voc_folder, "run/final.caffemodel", "--draw", str(files / "drawn")) == 0
    result = json.loads((files / "result.json").read_text())
    assert result["mAP_11_points"] > 0.5
    for measure in ("11_points", "area"):
        assert result["mAP_" + measure] == pytest.approx(
            np.mean(list(result["AP_" + measure].values())))
    assert result["counts"]["disc"]["difficult"] > 0
    assert result["images"] == 8 and result["seconds_per_image"] > 0
    assert capfd.readouterr().out.startswith("mAP %.4f (11 points), %.4f (area)" % (
        result["mAP_11_points"], result["mAP_area"]))
    lines = (files / "result_comp4" / "comp4_det_test_disc.txt").read_text().splitlines()
    image, score, *corners = lines[0].split()
    assert image in Voc(voc_folder).images("test") and 0 < float(score) < 1 and len(corners) == 4
    assert sorted(os.listdir(str(files / "drawn"))) == [
        image + ".jpg" for image in Voc(voc_folder).images("test")]


def weights_of(path):
    """All numbers in a caffemodel, by layer."""
    content = caffe_messages().NetParameter.FromString(path.read_bytes())
    return {layer.name: [list(blob.data) for blob in layer.blobs] for layer in content.layer}


def test_a_resumed_run_ends_with_the_same_weights_as_one_that_never_stopped(files, voc_folder,
                                                                            capfd):
    assert train(files, voc_folder, "whole", "--iterations", "6", "--snapshot", "3") == 0
    assert train(files, voc_folder, "parts", "--iterations", "3", "--snapshot", "3") == 0
    assert train(files, voc_folder, "parts", "--iterations", "6", "--snapshot", "3") == 2
    assert "holds a run already. Continue it with --resume" in capfd.readouterr().err
    assert train(files, voc_folder, "parts", "--iterations", "6", "--snapshot", "3",
                 "--resume") == 0
    whole, parts = [weights_of(files / name / "final.caffemodel") for name in ("whole", "parts")]
    assert whole == parts and whole["bbox_pred"]


def test_the_box_regression_is_folded_into_the_weights_and_back():
    class Blob:
        def __init__(self, data):
            self.data = np.array(data, np.float32)

    class Net:
        params = {"bbox_pred": [Blob([[1, 2], [3, 4], [5, 6], [7, 8]]), Blob([1, 2, 3, 4])]}

    means, deviations = np.array([[0.5, 0, 1, 0]]), np.array([[2, 4, 0.5, 1]])
    features = np.array([0.5, -1])
    weights, bias = Net.params["bbox_pred"]
    normalized = weights.data @ features + bias.data
    folding = detect_voc.folding(means, deviations)
    folding.fold(Net)
    np.testing.assert_allclose(weights.data @ features + bias.data,
                               normalized * deviations[0] + means[0])
    folding.unfold(Net)
    np.testing.assert_allclose(weights.data @ features + bias.data, normalized)


def test_proposals_are_computed_where_no_file_is_given(files, voc_folder):
    search = ["--search-side", "100", "--cache", str(files / "cache"), "--processes", "1"]
    assert detect_voc.main(["train", str(files / "net.prototxt"), "none", str(files / "run"),
                            "--voc", voc_folder, "--iterations", "1", *search, *SIZE]) == 0
    assert detect_voc.main(["test", str(files / "net.prototxt"),
                            str(files / "run" / "final.caffemodel"), "--voc", voc_folder,
                            "--out", str(files / "result.json"), "--limit", "2", *search,
                            *SIZE]) == 0
    assert json.loads((files / "result.json").read_text())["images"] == 2
    assert len(os.listdir(str(files / "cache"))) == 12 + 2


def remove_filler(files, voc_folder):
    path = files / "net.prototxt"
    path.write_text(path.read_text().replace('weight_filler { type: "xavier" }', "", 1))


def shift_box(files, voc_folder):
    path = os.path.join(voc_folder, "Annotations", "000003.xml")
    with open(path) as file:
        text = file.read()
    with open(path, "w") as file:
        file.write(text.replace("<width>160</width>", "<width>30</width>"))


def remove_objects(files, voc_folder):
    with open(os.path.join(voc_folder, "Annotations", "000003.xml"), "w") as file:
        file.write("<annotation><size><width>160</width><height>120</height></size></annotation>")


def remove_class(files, voc_folder):
    for split in ("trainval", "test"):
        os.unlink(os.path.join(voc_folder, "ImageSets", "Main", "square_%s.txt" % split))


def drop_cell(files, voc_folder):
    content = scipy.io.loadmat(str(files / "trainval.mat"))
    scipy.io.savemat(str(files / "trainval.mat"), {"boxes": content["boxes"][:, 1:]})


def move_proposal(files, voc_folder):
    content = scipy.io.loadmat(str(files / "trainval.mat"))
    content["boxes"][0, 4][0] = [1, 1, 2, 900]
    scipy.io.savemat(str(files / "trainval.mat"), {"boxes": content["boxes"]})


@pytest.mark.parametrize("spoil, message", [
    (remove_filler, "layer 'fc6': neither the weights nor a weight_filler"),
    (shift_box, "000003.xml: box .* is outside of the image of 30 x 120 pixels"),
    (remove_objects, "000003.xml: the annotation has no object"),
    (remove_class, "class 'square' is not one of the classes of"),
    (drop_cell, "trainval.mat: the file has proposals for 11 images, but the split has 12"),
    (move_proposal, "Image 000005: the proposal .* exceeds the image of 160 x 120 pixels"),
])
def test_what_is_wrong_with_the_files_is_said_in_a_line(files, voc_folder, capfd, spoil, message):
    spoil(files, voc_folder)
    assert train(files, voc_folder, "run", "--iterations", "2") == 2
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("detect_voc.py: error: ")
    assert re.search(message, last)


def test_where_background_begins_is_a_setting_of_the_run(files, voc_folder, capfd):
    assert train(files, voc_folder, "run", "--iterations", "1", "--background-overlap", "0") == 0
    record = json.loads((files / "run" / "run.json").read_text())
    assert record["repeat"]["background_overlap"] == 0
    assert train(files, voc_folder, "run", "--iterations", "2", "--resume") == 2
    assert "background_overlap" in capfd.readouterr().err
    with pytest.raises(SystemExit) as ended:
        train(files, voc_folder, "run", "--iterations", "2", "--background-overlap", "0.5")
    assert ended.value.code == 2
    assert "'0.5' is not from 0 to below 0.5" in capfd.readouterr().err


def test_a_loss_that_is_not_finite_stops_the_run(files, voc_folder, capfd):
    assert train(files, voc_folder, "run", "--iterations", "40", "--lr", "1e20") == 2
    assert "the loss is" in capfd.readouterr().err


def spoil_weights(path):
    """Make the first number of bbox_pred NaN."""
    content = caffe_messages().NetParameter.FromString(path.read_bytes())
    (layer,) = [layer for layer in content.layer if layer.name == "bbox_pred"]
    layer.blobs[0].data[0] = np.nan
    path.write_bytes(content.SerializeToString())


def test_weights_that_do_not_fit_and_images_that_cannot_be_read_are_named(files, voc_folder,
                                                                          capfd):
    assert train(files, voc_folder, "run", "--iterations", "1") == 0
    weights = (files / "run" / "final.caffemodel").read_bytes()
    spoil_weights(files / "run" / "final.caffemodel")
    assert test(files, voc_folder, "run/final.caffemodel") == 2
    assert "the scores of image 000013 are not finite" in capfd.readouterr().err
    (files / "run" / "final.caffemodel").write_bytes(weights)
    path = Voc(voc_folder).image_path("000014")
    assert cv2.imwrite(path, np.zeros((50, 50, 3), np.uint8))
    assert test(files, voc_folder, "run/final.caffemodel") == 2
    assert "000014.jpg: the image has 50 x 50 pixels, but its annotation says 160 x 120" in (
        capfd.readouterr().err)
    text = (files / "net.prototxt").read_text().replace('"fc6"', '"other6"')
    (files / "net.prototxt").write_text(text)
    assert test(files, voc_folder, "run/final.caffemodel") == 2
    assert "has no layer 'other6'. Weights of this net are needed" in capfd.readouterr().err
