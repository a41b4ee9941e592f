"""Contracts of experiments/detection_demo.py: every step runs, is counted and can be gone on."""
import json
import os

import cv2
import numpy as np

import detection_demo
import proposals
from voc import Voc


def fill_cache(voc_folder, cache):
    """Keep boxes all over each image as if they had been searched for, which takes a second."""
    voc = Voc(voc_folder)
    search = proposals.Search(side=detection_demo.SEARCH_SIDE, base_k=detection_demo.SEARCH_K)
    rows = [[x, y, x + 39, y + 39] for x in range(0, 120, 20) for y in range(0, 80, 20)]
    cache.mkdir()
    for image in voc.images("trainval") + voc.images("test"):
        path, _ = proposals._cached(voc.image_path(image), search, str(cache))
        np.save(path, np.array(rows, np.float32))


def test_the_demonstration_measures_before_and_after_training_and_draws(voc_folder, tmp_path,
                                                                        capfd):
    out = tmp_path / "out"
    fill_cache(detection_demo.lightened(Voc(voc_folder), str(out / "VOC2007")), tmp_path / "cache")
    command = ["--voc", voc_folder, "--out", str(out), "--cache", str(tmp_path / "cache")]
    assert detection_demo.main([*command, "--iterations", "1", "2"]) == 0
    content = json.loads((out / "demo.json").read_text())
    assert [row["iterations"] for row in content["measured"]] == [0, 1, 2]
    assert all(0 <= row["mAP"] <= 1 for row in content["measured"])
    assert list(content["processor_seconds"]) == [
        "lightening", "proposals", "initialisation", "random scores", "testing after 0",
        "training to 1", "testing after 1", "training to 2", "testing after 2", "picture"]
    assert content["processor_seconds"]["training to 1"] > 0
    width, height = detection_demo.TILE
    assert cv2.imread(str(out / "detections.jpg")).shape == (
        detection_demo.ROWS * height, detection_demo.COLUMNS * width, 3)
    assert "minutes of processor time" in capfd.readouterr().out


def test_lightened_images_are_bright_and_keep_their_annotations(voc_folder, tmp_path):
    voc = Voc(voc_folder)
    path = voc.image_path(voc.images("test")[0])
    dark = cv2.imread(path) // 4
    assert cv2.imwrite(path, dark)
    for _ in range(2):  # a folder that is there already is made again
        lighter = Voc(detection_demo.lightened(voc, str(tmp_path / "lighter")))
    assert lighter.classes == voc.classes
    for split in ("trainval", "test"):
        assert lighter.images(split) == voc.images(split)
        for image in voc.images(split):
            assert os.path.isfile(lighter.image_path(image))
    pixels = cv2.imread(lighter.image_path(voc.images("test")[0]))
    assert pixels.shape == dark.shape
    assert np.percentile(pixels.max(axis=2), 99) > 240 > 64 > np.percentile(dark.max(axis=2), 99)


def test_a_step_that_fails_ends_the_demonstration(tmp_path, capfd):
    assert detection_demo.main(["--voc", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "no VOC folder" in capfd.readouterr().err
    assert detection_demo.main(["--voc", str(tmp_path), "--out", str(tmp_path / "out"),
                                "--iterations", "4", "2"]) == 2
    assert "--iterations must ascend" in capfd.readouterr().err
