"""experiments/gpu_check.py: the CPU agrees with itself, and not with a copy that is disturbed."""
import cv2
import numpy as np
import pytest
import tiny_net

import gpu_check
import photographs
from ddinit import results
from ddinit.processes import ChildDied

LAYERS = ["conv1", "fc2", "fc3"]


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """The options that compare the CPU with itself on a tiny net and a few photographs."""
    folder = tmp_path_factory.mktemp("gpu_check")
    net = tiny_net.DEFINITION.replace('"xavier"', '"gaussian" std: 0.1')
    (folder / "net.prototxt").write_text(net)
    rng = np.random.default_rng(0)
    for number, image in enumerate(photographs.photographs() * 8):
        small = cv2.resize(photographs.random_crop(image, rng), (48, 48))
        assert cv2.imwrite(str(folder / ("%02d.png" % number)), small)
    return ["--devices", "cpu", "cpu", "--net", str(folder / "net.prototxt"),
            "--data", str(folder / "*.png"), "--spread", "1.5"]


def test_the_cpu_agrees_with_itself(options, tmp_path, capfd):
    out = str(tmp_path / "check.json")
    assert gpu_check.main([*options, "--out", out]) == 0
    found = results.read_json(out)
    assert found["agrees"] and all(check["figure"] == 0 for check in found["checks"]
                                   if not check["name"].startswith("spread"))
    names = [check["name"] for check in found["checks"]]
    assert names[:6] == ["change rate %s, layer '%s'" % (when, layer)
                         for when in ("before", "after") for layer in LAYERS]
    assert names[-1] == "loss, iteration 20" and "std of output 'fc3', rescaled" in names
    for times in found["times"]:
        assert 0 < times["in_caffe"] < times["seconds"]
    said = capfd.readouterr().out
    assert "CPU and CPU agree." in said and "54 s" in said


def test_a_disturbed_copy_of_the_weights_does_not_agree(options, capfd):
    assert gpu_check.main([*options, "--disturb", "fc2"]) == 1
    wrong = [line for line in capfd.readouterr().out.splitlines() if "do not agree" in line]
    text = "\n".join(wrong)
    assert "change rate before, layer 'fc2'" in text and "at most 0.02" in text
    assert "std of output 'fc3', rescaled" in text
    assert "change rate after" not in text  # the step between layers undoes it


@pytest.mark.parametrize("more, message", [
    (["--disturb", "nowhere"], "The net has no layer 'nowhere' with weights"),
    (["--data", "nowhere/*.jpg"], "nowhere/*.jpg: no images there"),
])
def test_what_cannot_be_compared_is_one_line(options, capfd, more, message):
    assert gpu_check.main([*options, *more]) == 2
    assert message in capfd.readouterr().err.splitlines()[-1]


def test_without_a_gpu_there_is_one_line(options, monkeypatch, capfd):
    def in_child(*_):
        raise ChildDied("Caffe stopped: Cannot use GPU in CPU-only Caffe: check mode.")
    monkeypatch.setattr("ddinit.net.in_child", in_child)
    assert gpu_check.main([]) == 2
    said = capfd.readouterr()
    assert said.out == "" and said.err == (
        "gpu_check: error: GPU 0 cannot be used: Caffe stopped: Cannot use GPU in CPU-only Caffe:"
        " check mode.\n")


def measured(rate=1.0, output=1.0, loss=1.0):
    """What a device measures of a net with one layer."""
    return {"rates": {"before": {"conv1": rate}, "after": {"conv1": 2.0, "fc2": 2.2}},
            "outputs": {"fc2": output * np.arange(4.0)}, "losses": [1.5, loss],
            "times": {"seconds": 2.0, "in_caffe": 1.0}}


@pytest.mark.parametrize("other, wrong", [
    ({}, []),
    ({"rate": 1.015, "output": 1.0003, "loss": 0.992}, []),
    ({"rate": 1.03}, ["change rate before, layer 'conv1'"]),
    ({"rate": float("nan")}, ["change rate before, layer 'conv1'"]),
    ({"output": 1.002}, ["std of output 'fc2', rescaled"]),
    ({"loss": 1.02}, ["loss, iteration 2"]),
])
def test_each_figure_has_its_bound(other, wrong):
    checks = gpu_check.compare(measured(), measured(**other))
    assert [check.name for check in checks if not check.agrees] == wrong
    said = gpu_check.report(["CPU", "GPU 0"], [measured(), measured(**other)], checks)
    assert ("CPU and GPU 0 agree." in said) == (not wrong)
    assert all("do not agree: " + name in said for name in wrong)


def test_rates_that_are_too_far_apart_fail_on_both_devices():
    apart = measured()
    apart["rates"]["after"]["fc2"] = 3.0
    wrong = [check for check in gpu_check.compare(apart, apart) if not check.agrees]
    assert [(check.name, check.figure) for check in wrong] == [("spread of the rates after", 1.5)]
