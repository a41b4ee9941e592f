"""bench_loading.py measures both tasks, and writes what it prints."""
import os

import pytest

import bench_loading
from ddinit import results


@pytest.mark.parametrize("task", ["classification", "detection"])
def test_waiting_is_a_part_of_an_iteration(voc_folder, tmp_path, capsys, monkeypatch, task):
    for name, small in (("PROPOSALS", 100), ("SCALES", [120]), ("MAX_SIZE", 200),
                        ("BATCH_SIZE", 2)):
        monkeypatch.setattr(bench_loading, name, small)
    out = str(tmp_path / "bench.json")
    net = os.path.join(bench_loading.MODELS, "caffenet_tiny", "deploy.prototxt")
    assert bench_loading.main([task, "--voc", voc_folder, "--net", net, "--iterations", "1",
                               "--cpu", "--workers", "1", "--out", out]) == 0
    found = results.read_json(out)
    assert 0 < found["waiting"] < found["iteration"] and 1 < found["worker_mb"] < 1000
    assert "An iteration takes %.3f s, of which it waits" % found["iteration"] in (
        capsys.readouterr().out)
