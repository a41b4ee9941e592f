"""The training loop: what it writes, how it goes on after a kill, and how it stops."""
import csv
import json
import os
import shutil
import signal
import subprocess

import numpy as np
import pytest
import tiny_net
from google.protobuf import text_format
from tiny_net import stored_weights

from ddinit import processes
from ddinit.prototxt import caffe_messages
from training import loop, run_folder
from training.loop import Folding, Measurement, Plan

LEARNING_RATES = [
    ('base_lr: 0.1 lr_policy: "fixed"', 0.1),
    ('base_lr: 0.1 lr_policy: "step" gamma: 0.5 stepsize: 10', 0.025),
    ('base_lr: 0.1 lr_policy: "multistep" gamma: 0.5 stepvalue: 25 stepvalue: 26', 0.05),
    ('base_lr: 0.1 lr_policy: "exp" gamma: 0.9', 0.1 * 0.9 ** 25),
    ('base_lr: 0.1 lr_policy: "inv" gamma: 0.04 power: 0.5', 0.1 / 2 ** 0.5),
    ('base_lr: 0.1 lr_policy: "poly" power: 2', 0.1 * 0.75 ** 2),
    ('base_lr: 0.1 lr_policy: "sigmoid" gamma: 0.1 stepsize: 25', 0.05),
]


def solver(text='base_lr: 0.01 lr_policy: "fixed" momentum: 0.9'):
    return text_format.Parse(text, caffe_messages().SolverParameter())


def net(data_std=1.0, second_loss=False):
    """The tiny net, with dropout, on random images and constant labels."""
    definition = text_format.Parse(tiny_net.DEFINITION, caffe_messages().NetParameter())
    text = """
layer { name: "data" type: "DummyData" top: "data" top: "label" dummy_data_param {
  shape { dim: 4 dim: 3 dim: 32 dim: 32 } shape { dim: 4 }
  data_filler { type: "gaussian" std: %g } data_filler { type: "constant" value: 3 } } }
""" % data_std
    whole = text_format.Parse(text, caffe_messages().NetParameter())
    whole.layer.extend(definition.layer[1:-1])
    whole.layer.add(name="loss", type="SoftmaxWithLoss", bottom=["fc3", "label"], top=["loss"])
    if second_loss:
        whole.layer.add(name="more", type="SoftmaxWithLoss", bottom=["fc3", "label"],
                        top=["more"], loss_weight=[0.5])
    return whole


def trained(folder, iterations, **options):
    """Train the net on random data in this process, where nothing of it aborts."""
    given = {"net": net(), "solver": solver(), **options}
    return loop.train(Plan(folder=str(folder), iterations=iterations, **given))


def log_without_seconds(folder):
    with open(os.path.join(str(folder), "log.csv"), newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0][-1] == "seconds"
    return [row[:-1] for row in rows]


def content(path):
    with open(str(path), "rb") as file:
        return file.read()


# ---------------------------------------------------------------------------------------------
# What a run writes
# ---------------------------------------------------------------------------------------------

def test_a_run_leaves_weights_two_snapshots_log_curve_and_what_repeats_it(tmp_path):
    outcome = trained(tmp_path / "run", 7, snapshot_every=2, settings={"tried": 1}, seed=5)
    assert (outcome.iteration, outcome.stopped_by) == (7, None)
    assert sorted(os.listdir(tmp_path / "run")) == [
        "curve.png", "final.caffemodel", "log.csv", "run.json",
        "snapshot_4.caffemodel", "snapshot_4.solverstate", "snapshot_6.caffemodel",
        "snapshot_6.solverstate", "solver.prototxt", "train_val.prototxt"]
    rows = run_folder.read_table(str(tmp_path / "run" / "log.csv"))
    assert [row["iteration"] for row in rows] == [1, 2, 3, 4, 5, 6, 7]
    assert rows[-1]["loss"] == pytest.approx(outcome.loss)
    record = json.loads(content(tmp_path / "run" / "run.json"))
    assert record["repeat"]["tried"] == 1 and record["seed"] == 5 and record["finished"]
    assert record["versions"]["caffe"] and record["iteration"] == 7
    assert content(tmp_path / "run" / "curve.png").startswith(b"\x89PNG")


def test_several_losses_are_logged_each_and_as_their_weighted_sum(tmp_path):
    trained(tmp_path / "run", 2, net=_two_losses())
    for row in run_folder.read_table(str(tmp_path / "run" / "log.csv")):
        assert list(row) == ["iteration", "learning_rate", "loss", "loss_of_loss", "more",
                             "seconds"]
        assert row["loss"] == pytest.approx(row["loss_of_loss"] + 0.5 * row["more"])


def _two_losses():
    whole = net(second_loss=True)
    next(layer for layer in whole.layer if layer.name == "loss").top[:] = ["loss_of_loss"]
    return whole


@pytest.mark.parametrize("text, expected", LEARNING_RATES)
def test_the_logged_rate_follows_caffes_policies(text, expected):
    assert loop.learning_rate(solver(text), 25, 100) == pytest.approx(expected, rel=1e-6)


def test_an_unknown_policy_is_an_error_that_names_it():
    with pytest.raises(ValueError, match="'stairs'"):
        loop.learning_rate(solver('lr_policy: "stairs"'), 0, 10)


def test_measurements_are_made_at_0_every_n_and_at_the_end_with_the_weights_of_then(tmp_path):
    outcome = trained(tmp_path / "run", 5, measurement=_measurement())
    assert [row["iteration"] for row in outcome.measured] == [0, 2, 4, 5]
    bias = stored_weights(tmp_path / "run" / "final.caffemodel")["fc3"][1]
    assert outcome.measured[0]["bias"] == 0
    assert outcome.measured[-1]["bias"] == pytest.approx(float(np.abs(bias).sum()), rel=1e-6)


def _measurement():
    definition = text_format.Parse(tiny_net.DEFINITION, caffe_messages().NetParameter())
    return Measurement(definition, 2, _bias)


def _bias(caffe_net, rows):
    caffe_net.forward()
    return {"bias": np.abs(caffe_net.params["fc3"][1].data).sum()}


def test_folded_weights_are_in_every_file_and_unfolded_ones_are_trained(tmp_path):
    trained(tmp_path / "plain", 6, snapshot_every=3)
    trained(tmp_path / "folded", 6, snapshot_every=3, folding=_folding())
    shutil.copytree(str(tmp_path / "folded"), str(tmp_path / "resumed"))
    _forget_after(tmp_path / "resumed", 3)
    trained(tmp_path / "resumed", 6, snapshot_every=3, folding=_folding(), resume=True)
    for name in ("final.caffemodel", "snapshot_6.caffemodel"):
        plain, folded = (stored_weights(tmp_path / run / name) for run in ("plain", "folded"))
        assert (plain["fc3"][0] * 4 == folded["fc3"][0]).all()
        assert (plain["fc2"][0] == folded["fc2"][0]).all()
        assert content(tmp_path / "resumed" / name) == content(tmp_path / "folded" / name)


def _folding():
    def scale(factor):
        def change(caffe_net):
            caffe_net.params["fc3"][0].data[...] *= factor
        return change
    return Folding(scale(4), scale(0.25))  # powers of 2: exact


def _forget_after(folder, iteration):
    for name in ("final.caffemodel", "snapshot_6.caffemodel", "snapshot_6.solverstate"):
        os.unlink(str(folder / name))
    assert run_folder.last_snapshot(str(folder)).iteration == iteration


def test_a_run_is_the_same_after_others_in_the_same_process_as_alone(tmp_path):
    processes.in_child(trained, tmp_path / "alone", 3)
    for name in ("first", "second"):
        trained(tmp_path / name, 3)
        assert content(tmp_path / name / "final.caffemodel") == content(
            tmp_path / "alone" / "final.caffemodel")


# ---------------------------------------------------------------------------------------------
# What it starts from
# ---------------------------------------------------------------------------------------------

def test_weights_are_loaded_but_for_fresh_layers(tmp_path):
    trained(tmp_path / "first", 3)
    start = str(tmp_path / "first" / "final.caffemodel")
    trained(tmp_path / "next", 1, weights=start, fresh=["fc3"], solver=_standing_still())
    before, after = stored_weights(start), stored_weights(tmp_path / "next" / "final.caffemodel")
    assert (before["fc2"][0] == after["fc2"][0]).all()
    assert not (before["fc3"][0] == after["fc3"][0]).any()
    record = json.loads(content(tmp_path / "next" / "run.json"))
    assert record["repeat"]["weights_sha256"] == run_folder.sha256(start)


def _standing_still():
    return solver('base_lr: 0 lr_policy: "fixed"')


def test_weights_of_other_shapes_are_an_error_that_names_layer_and_shapes(tmp_path):
    trained(tmp_path / "first", 1)
    with pytest.raises(ValueError, match="layer 'fc2' has weights of shape 6x196 and 6, the net "
                                         "wants 7x196 and 7"):
        trained(tmp_path / "next", 1, weights=str(tmp_path / "first" / "final.caffemodel"),
                net=_wider())


def _wider():
    whole = net()
    next(layer for layer in whole.layer if layer.name == "fc2").inner_product_param.num_output = 7
    return whole


def test_weights_of_another_net_are_an_error(tmp_path):
    trained(tmp_path / "first", 1)
    with pytest.raises(ValueError, match="none of its layers is .*The file has conv1"):
        trained(tmp_path / "next", 1, weights=str(tmp_path / "first" / "final.caffemodel"),
                net=_renamed())


def _renamed():
    whole = net()
    for layer in whole.layer:
        layer.name = "my_" + layer.name
    return whole


def test_a_layer_that_nothing_fills_is_an_error_that_names_it(tmp_path):
    with pytest.raises(ValueError, match="layer 'fc2': neither"):
        trained(tmp_path / "run", 1, net=_unfilled())


def _unfilled():
    whole = net()
    next(layer for layer in whole.layer
         if layer.name == "fc2").inner_product_param.ClearField("weight_filler")
    return whole


def test_another_runs_folder_is_not_overwritten(tmp_path):
    trained(tmp_path / "run", 1)
    with pytest.raises(ValueError, match="holds a run already. Continue it with --resume"):
        trained(tmp_path / "run", 1)


def test_resuming_with_other_settings_is_an_error_that_names_the_setting(tmp_path):
    trained(tmp_path / "run", 2, snapshot_every=1, settings={"batch_size": 4})
    with pytest.raises(ValueError, match="batch_size 5, because the run began with 4"):
        trained(tmp_path / "run", 3, settings={"batch_size": 5}, resume=True)


def test_resuming_a_finished_run_does_nothing(tmp_path):
    first = trained(tmp_path / "run", 3, measurement=_measurement())
    before = {name: content(tmp_path / "run" / name) for name in os.listdir(tmp_path / "run")}
    again = trained(tmp_path / "run", 3, measurement=_measurement(), resume=True)
    assert again == first._replace(loss=None)
    assert before == {name: content(tmp_path / "run" / name)
                      for name in os.listdir(tmp_path / "run")}


def test_a_snapshot_cut_short_is_passed_over(tmp_path):
    trained(tmp_path / "run", 4, snapshot_every=2)
    os.unlink(str(tmp_path / "run" / "snapshot_4.caffemodel"))
    assert run_folder.last_snapshot(str(tmp_path / "run")).iteration == 2


def test_a_moved_folder_resumes(tmp_path):
    trained(tmp_path / "run", 4, snapshot_every=2)
    trained(tmp_path / "whole", 6, snapshot_every=2)
    os.rename(str(tmp_path / "run"), str(tmp_path / "moved"))
    trained(tmp_path / "moved", 6, snapshot_every=2, resume=True)
    assert content(tmp_path / "moved" / "final.caffemodel") == content(
        tmp_path / "whole" / "final.caffemodel")
    assert log_without_seconds(tmp_path / "moved") == log_without_seconds(tmp_path / "whole")


def test_a_log_row_cut_short_by_a_kill_is_dropped(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("iteration,loss\n1,0.5\n2,0.4\n3,0")
    table = run_folder.Table(str(path), 2)
    table.add({"iteration": 3, "loss": 0.25})
    table.close()
    assert path.read_text().split() == ["iteration,loss", "1,0.5", "2,0.4", "3,0.25"]


def test_a_full_disk_is_an_error_before_caffe_aborts(tmp_path, monkeypatch):
    usage = shutil.disk_usage(str(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=1000))
    with pytest.raises(ValueError, match="run: the disk is full"):
        trained(tmp_path / "run", 3, snapshot_every=2)
    assert run_folder.last_snapshot(str(tmp_path / "run")) is None


def test_what_a_kill_left_of_a_snapshot_is_removed(tmp_path):
    (tmp_path / "run" / ".snapshot").mkdir(parents=True)
    (tmp_path / "run" / ".snapshot" / "new_iter_9.caffemodel").write_text("half of it")
    trained(tmp_path / "run", 3, snapshot_every=2)
    assert not (tmp_path / "run" / ".snapshot").exists()


# ---------------------------------------------------------------------------------------------
# How it stops
# ---------------------------------------------------------------------------------------------

def test_an_infinite_loss_stops_with_the_iteration(tmp_path):
    with pytest.raises(ValueError, match=r"In iteration \d+ the loss is (nan|inf)"):
        trained(tmp_path / "run", 50, solver=_exploding(), net=_loud())
    assert not (tmp_path / "run" / "final.caffemodel").exists()


def _exploding():
    return solver('base_lr: 1e30 lr_policy: "fixed"')


def _loud():
    return net(data_std=1e6)


def test_a_killed_run_resumes_to_the_same_bits(tmp_path, voc_folder):
    arguments = _voc_run(tmp_path, voc_folder, 150)
    whole = tiny_net.run("classify_voc.py", *arguments(tmp_path / "whole"))
    assert whole.returncode == 0, whole.stderr
    process = subprocess.Popen(tiny_net.command("classify_voc.py", *arguments(tmp_path / "killed")))
    tiny_net.wait_for((tmp_path / "killed" / "snapshot_20.solverstate").exists)
    children = tiny_net.descendants(process.pid)
    process.kill()
    process.wait()
    assert not (tmp_path / "killed" / "final.caffemodel").exists()
    assert len(children) >= 2  # Caffe's process and the one that reads images
    tiny_net.wait_for(lambda: not any(os.path.exists("/proc/%d" % child) for child in children))
    resumed = tiny_net.run("classify_voc.py", *arguments(tmp_path / "killed"), "--resume")
    assert resumed.returncode == 0 and "resuming from iteration" in resumed.stderr
    assert content(tmp_path / "whole" / "final.caffemodel") == content(
        tmp_path / "killed" / "final.caffemodel")
    assert log_without_seconds(tmp_path / "whole") == log_without_seconds(tmp_path / "killed")


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_snapshots_and_stops_with_how_to_go_on(tmp_path, voc_folder, number, status):
    arguments = _voc_run(tmp_path, voc_folder, 100000)
    process = subprocess.Popen(tiny_net.command("classify_voc.py", *arguments(tmp_path / "run")),
                               stderr=subprocess.PIPE, universal_newlines=True)
    tiny_net.wait_for(lambda: len(run_folder.read_table(str(tmp_path / "run" / "log.csv"))) > 4)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == status
    assert "--resume continues the run in %s" % (tmp_path / "run") in said
    last = run_folder.read_table(str(tmp_path / "run" / "log.csv"))[-1]["iteration"]
    assert run_folder.last_snapshot(str(tmp_path / "run")).iteration == last


def test_a_run_stopped_between_snapshots_resumes_to_the_same_bits(tmp_path):
    trained(tmp_path / "whole", 7, snapshot_every=5)
    stopped = trained(tmp_path / "stopped", 7, snapshot_every=5, measurement=Measurement(
        _measurement().net, 3, _stop_at_the_second()))
    assert (stopped.iteration, stopped.stopped_by) == (3, signal.SIGTERM)
    trained(tmp_path / "stopped", 7, snapshot_every=5, resume=True)
    assert content(tmp_path / "whole" / "final.caffemodel") == content(
        tmp_path / "stopped" / "final.caffemodel")


def _stop_at_the_second():
    calls = []

    def measure(*_):
        calls.append(None)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return {"calls": len(calls)}
    return measure


def _voc_run(tmp_path, voc_folder, iterations):
    definition = tiny_net.write(tmp_path / "tiny.prototxt")
    return lambda folder: ("train", definition, "none", folder, "--voc", voc_folder, "--iterations",
                           iterations, "--batch-size", 4, "--snapshot", 10, "--workers", 1, "--cpu")
