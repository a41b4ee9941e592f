"""training/trials.py and the steps `train` and `test` of workflow.py."""
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

import workflow
from training import trials

# A training command in small: appends to a log, and writes run.json as the training loop does.
TRAINING = """
import json, sys
folder, weights, ending = sys.argv[1:4]
assert sys.argv[-1] == "--resume"
with open(folder + "/log.csv", "a") as log:
    log.write("x")
record = {"finished": ending == "finished"}
if ending == "diverged":
    record["diverged"] = 7
with open(folder + "/run.json", "w") as file:
    json.dump(record, file)
sys.exit({"finished": 0, "diverged": 2, "killed": 1}[ending])
"""


@pytest.fixture
def train(tmp_path):
    """train(ending, ...) runs the small command in tmp_path/run: status, outcome, log's length."""
    script, folder = tmp_path / "train.py", tmp_path / "run"
    script.write_text(TRAINING)
    weights = tmp_path / "start.caffemodel"
    weights.write_text("weights")

    def run(ending, *options):
        words = [sys.executable, str(script), str(folder), str(weights), ending, *options]
        status = workflow.main(["train", str(folder), "--", *words])
        outcome = folder / "outcome.json"
        return (status, json.loads(outcome.read_text()) if outcome.exists() else None,
                len((folder / "log.csv").read_text()))
    return run


def test_a_run_that_ends_is_recorded(train):
    assert train("finished") == (0, {}, 1)


def test_a_killed_run_continues_also_on_another_device(train):
    assert train("killed") == (1, None, 1)
    assert train("killed", "--gpu", "1", "--workers", "3") == (1, None, 2)
    assert train("killed", "--cpu") == (1, None, 3)


def test_another_setting_starts_afresh(train):
    assert train("killed", "--lr", "0.1") == (1, None, 1)
    assert train("killed", "--lr", "0.01") == (1, None, 1)


def test_other_weights_of_the_same_name_start_afresh(train, tmp_path):
    assert train("killed") == (1, None, 1)
    (tmp_path / "start.caffemodel").write_text("others")
    assert train("killed") == (1, None, 1)


def test_a_run_that_had_ended_starts_afresh_when_it_is_wanted_again(train):
    assert train("finished")[2] == 1
    assert train("finished") == (0, {}, 1)


def test_divergence_is_an_outcome_and_there_is_nothing_to_test(train, tmp_path):
    assert train("diverged") == (0, {"diverged": 7}, 1)
    result = tmp_path / "result.json"
    assert workflow.main(["test", str(tmp_path / "run"), str(result), "--", "false"]) == 0
    assert json.loads(result.read_text()) == {"diverged": 7}


def test_a_run_that_ended_is_tested_by_the_command(train, tmp_path):
    train("finished")
    folder, result = str(tmp_path / "run"), tmp_path / "result.json"
    assert workflow.main(["test", folder, str(result), "--", "touch", str(result)]) == 0
    assert result.exists()
    assert workflow.main(["test", folder, str(result), "--", "false"]) == 1


def test_testing_what_was_not_trained_is_one_line(tmp_path, capsys):
    assert workflow.main(["test", str(tmp_path), str(tmp_path / "x"), "--", "true"]) == 2
    error = capsys.readouterr().err
    assert "outcome.json" in error and error.count("\n") == 1


@pytest.mark.parametrize("words", [["train", "folder"], ["tables", "table1", "--config", "c",
                                                         "--out", "o", "--", "true"]])
def test_only_trials_take_a_command(words, capsys):
    with pytest.raises(SystemExit) as ended:
        workflow.main(words)
    assert ended.value.code == 2 and "take a command after --" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------
# Many commands
# ---------------------------------------------------------------------------------------------

def test_a_step_is_done_until_its_command_or_its_files_change(tmp_path):
    given, folder = tmp_path / "given.txt", str(tmp_path / "step")
    given.write_text("a")
    command = ["env", "cp", str(given), os.path.join(folder, "copy.txt")]
    assert not trials.is_done(folder, command)
    assert trials.make(trials.Runner(), folder, command) == 0
    assert trials.is_done(folder, command)
    assert not trials.is_done(folder, [*command, "--force"])
    given.write_text("b")
    assert not trials.is_done(folder, command)
    assert trials.make(trials.Runner(), folder, ["false"]) == 1
    assert os.listdir(folder) == []


def test_what_a_command_prints_is_kept_in_a_file(tmp_path):
    output = str(tmp_path / "output.log")
    runner = trials.Runner(GREETING="hello")
    assert runner.run(["sh", "-c", "echo $GREETING; echo why >&2; exit 3"], output) == 3
    assert trials.last_line(output) == "why"
    with open(output) as file:
        assert file.read() == "hello\nwhy\n"


def test_commands_run_together_and_an_error_stops_those_that_have_not_begun():
    runner, begun = trials.Runner(), []
    both = threading.Barrier(2, timeout=30)
    assert runner.all([both.wait, both.wait], 2, "waits") in ([0, 1], [1, 0])

    def fail():
        raise ValueError("broken")
    with pytest.raises(ValueError, match="broken"):
        runner.all([fail, *[lambda: begun.append(time.sleep(0.05))] * 50], 1, "tasks")
    assert len(begun) < 50


def test_a_signal_reaches_running_commands_and_no_other_starts(tmp_path):
    code = """
import sys
from training import trials
runner = trials.Runner()
with runner.signals():
    print(runner.run(["sh", "-c", "echo begun; exec sleep 60"]), runner.run(["echo", "second"]))
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE,
                               universal_newlines=True, env=environment)
    assert process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=30)[0] == "143 143\n"
