"""The benchmark of detection's own parts measures all of them and writes what it prints."""
import os

import pytest

import bench_detection
from ddinit import results


def test_every_part_is_timed_and_waiting_is_part_of_an_iteration(voc_folder, tmp_path, capsys,
                                                                 monkeypatch):
    for name, small in (("ROIS", 50), ("PROPOSALS", 100), ("SCALES", [120]), ("MAX_SIZE", 200)):
        monkeypatch.setattr(bench_detection, name, small)
    out = str(tmp_path / "bench.json")
    net = os.path.join(bench_detection.MODELS, "caffenet_tiny", "deploy.prototxt")
    assert bench_detection.main(["--voc", voc_folder, "--net", net, "--rounds", "1", "--cpu",
                                 "--workers", "1", "--out", out]) == 0
    found = results.read_json(out)
    assert found["pooling"]["roi_pooling"] > 0 and found["pooling"]["convolutions"] > 0
    for name, images in (("loader", 12), ("loader_of_more", 12 * bench_detection.TIMES)):
        loader = found[name]
        assert loader["images"] == images
        assert 0 < loader["waiting"] < loader["iteration"]
        assert loader["ratio"] == pytest.approx(
            loader["waiting"] / (loader["iteration"] - loader["waiting"]))
        assert 1 < loader["worker_mb"] < 1000
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 3 and printed[2].startswith("480 images: an iteration takes ")
