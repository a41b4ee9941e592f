"""study_detection.py: every step runs and is not repeated."""
import json
import os

import cv2
import numpy as np

import study_detection
from detection import proposals
from voc.folders import Voc


def fill_cache(voc_folder, cache):
    """Keep boxes all over each image as if they had been searched for, which takes a second."""
    voc = Voc(voc_folder)
    side, k = study_detection.SEARCH[1::2]
    search = proposals.Search(side=int(side), base_k=int(k))
    rows = [[x, y, x + 39, y + 39] for x in range(0, 120, 20) for y in range(0, 80, 20)]
    cache.mkdir()
    for image in voc.images("trainval") + voc.images("test"):
        path, _ = proposals._cached(voc.image_path(image), search, str(cache))
        np.save(path, np.array(rows, np.float32))


def test_both_initializations_are_trained_tested_and_tabulated_once(voc_folder, tmp_path, capfd):
    assert len(Voc(voc_folder).images("trainval")) < study_detection.IMAGES  # all are used then
    out = tmp_path / "out"
    fill_cache(study_detection.lighter(Voc(voc_folder), str(out / "VOC2007")),
               tmp_path / "cache")
    command = ["--voc", voc_folder, "--out", str(out), "--cache", str(tmp_path / "cache"),
               "--iterations", "2", "--seeds", "1", "--jobs", "1"]
    assert study_detection.main(command) == 0
    trials = json.loads((out / "study.json").read_text())["trials"]
    assert [one["method"] for one in trials] == ["reference", "ours-kmeans"]
    assert all(0 <= one[measure] <= 1 for one in trials for measure in study_detection.MEASURES)
    table = (out / "study.md").read_text()
    assert table in capfd.readouterr().out
    assert "| mAP, 11 points | mAP, area |" in table and table.count("| 0.003 |") == 2
    made = os.stat(out / "tests/ours-kmeans/lr0.003/seed0/result.json").st_mtime_ns
    assert study_detection.main(command) == 0
    assert os.stat(out / "tests/ours-kmeans/lr0.003/seed0/result.json").st_mtime_ns == made


def test_the_table_has_means_errors_and_divergences():
    trials = [{"method": "reference", "learning_rate": 0.01, "seed": 0, "diverged": 3}]
    trials += [{"method": "ours-kmeans", "learning_rate": 0.01, "seed": seed,
                "mAP_11_points": value, "mAP_area": 0.1} for seed, value in ((0, 0.2), (1, 0.4))]
    lines = study_detection.table(trials).splitlines()
    assert lines[2] == "| Gaussian, as in CaffeNet | 0.01 |  |  | 1 |"
    assert lines[3] == ("| ours, k-means, both scalings | 0.01 | 0.300 ± 0.100 | 0.100 ± 0.000 "
                        "| 0 |")


def test_lighter_images_are_bright_and_keep_their_annotations(voc_folder, tmp_path):
    voc = Voc(voc_folder)
    path = voc.image_path(voc.images("test")[0])
    dark = cv2.imread(path) // 4
    assert cv2.imwrite(path, dark)
    for _ in range(2):  # a folder that is there already is made again
        lighter = Voc(study_detection.lighter(voc, str(tmp_path / "lighter")))
    assert lighter.classes == voc.classes
    for split in ("trainval", "test"):
        assert lighter.images(split) == voc.images(split)
        for image in voc.images(split):
            assert os.path.isfile(lighter.image_path(image))
    pixels = cv2.imread(lighter.image_path(voc.images("test")[0]))
    assert pixels.shape == dark.shape
    assert np.percentile(pixels.max(axis=2), 99) > 240 > 64 > np.percentile(dark.max(axis=2), 99)


def test_a_step_that_fails_ends_the_study_in_a_line(tmp_path, capfd):
    assert study_detection.main(["--voc", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "not a VOC folder" in capfd.readouterr().err
