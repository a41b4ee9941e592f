"""trial.py: runs go on where they were killed, start afresh where asked for again, may diverge."""
import json
import sys

import pytest

import trial

# A training command in small: appends to a log, and writes run.json as training.py does.
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
        status = trial.main(["train", str(folder), "--", *words])
        outcome = folder / "outcome.json"
        return (status, json.loads(outcome.read_text()) if outcome.exists() else None,
                len((folder / "log.csv").read_text()))
    return run


def test_a_run_that_ends_is_recorded(train):
    assert train("finished") == (0, {"weights": "final.caffemodel"}, 1)


def test_a_killed_run_goes_on_also_on_another_device(train):
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
    assert train("finished") == (0, {"weights": "final.caffemodel"}, 1)


def test_divergence_is_an_outcome_and_there_is_nothing_to_test(train, tmp_path):
    assert train("diverged") == (0, {"diverged": 7}, 1)
    result = tmp_path / "result.json"
    assert trial.main(["test", str(tmp_path / "run"), str(result), "--", "false"]) == 0
    assert json.loads(result.read_text()) == {"diverged": 7}


def test_a_run_that_ended_is_tested_by_the_command(train, tmp_path):
    train("finished")
    folder, result = str(tmp_path / "run"), tmp_path / "result.json"
    assert trial.main(["test", folder, str(result), "--", "touch", str(result)]) == 0
    assert result.exists()
    assert trial.main(["test", folder, str(result), "--", "false"]) == 1


def test_testing_what_was_not_trained_is_one_line(tmp_path, capsys):
    assert trial.main(["test", str(tmp_path), str(tmp_path / "x"), "--", "true"]) == 2
    error = capsys.readouterr().err
    assert "outcome.json" in error and error.count("\n") == 1
