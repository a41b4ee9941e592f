"""The Snakefile: what its configurations may say, which jobs it makes, what a change reruns."""
import copy
import os
import re
import subprocess
import sys
import time

import jsonschema
import pytest
import yaml

from tables import report

EXPERIMENTS = os.path.dirname(report.SCHEMA)
TOP = os.path.dirname(EXPERIMENTS)


def configuration(name):
    with open(os.path.join(EXPERIMENTS, name + ".yaml")) as file:
        return yaml.safe_load(file)


@pytest.fixture
def workflow(tmp_path):
    """workflow(config, target, ...) runs snakemake in an empty folder that has the models.

    `changes` are settings that replace the configuration's.
    """
    os.symlink(os.path.join(TOP, "models"), str(tmp_path / "models"))
    changed = tmp_path / "changes.yaml"

    def run(name, *arguments, dry=True, changes=None):
        changed.write_text(yaml.safe_dump(changes or {}))
        command = [sys.executable, "-m", "snakemake", "--snakefile",
                   os.path.join(EXPERIMENTS, "Snakefile"), "--directory", str(tmp_path),
                   "--configfile", os.path.join(EXPERIMENTS, name + ".yaml"), str(changed)]
        command += ["--dry-run"] if dry else ["--cores", "1"]
        done = subprocess.run(command + list(arguments), stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, universal_newlines=True, cwd=TOP)
        return done.returncode, done.stdout
    return run


def jobs(output):
    """The numbers of jobs by rule in what a dry run says."""
    return {rule: int(number) for rule, number in re.findall(r"^(\w+) +(\d+)$", output, re.M)}


# ---------------------------------------------------------------------------------------------
# Configurations
# ---------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def schema():
    with open(os.path.join(EXPERIMENTS, "config.schema.yaml")) as file:
        return yaml.safe_load(file)


def places_of_mappings(value, path=()):
    """Paths to every mapping in a configuration whose keys are fixed."""
    if isinstance(value, dict) and path[-1:] != ("rename",):
        yield path
        for key, item in value.items():
            yield from places_of_mappings(item, path + (key,))


@pytest.mark.parametrize("name", ["paper", "tiny"])
def test_configurations_fit_and_an_unknown_key_anywhere_is_rejected(schema, name):
    config = configuration(name)
    jsonschema.validate(config, schema)
    places = list(places_of_mappings(config))
    assert len(places) > 10
    for place in places:
        changed = copy.deepcopy(config)
        inner = changed
        for key in place:
            inner = inner[key]
        inner["iteration"] = 3
        with pytest.raises(jsonschema.ValidationError, match="'iteration' was unexpected"):
            jsonschema.validate(changed, schema)


@pytest.mark.parametrize("path, value", [
    (("device",), "gpu"), (("classification", "iterations"), 0),
    (("classification", "learning_rates", "SGD"), ["1e-3"]), (("detection", "seeds"), []),
    (("pretrained", "wang", "net"), "alexnet"), (("data", "proposals"), "edge-boxes"),
])
def test_values_that_mean_nothing_are_rejected(schema, path, value):
    config = configuration("paper")
    inner = config
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(config, schema)


def test_the_workflow_names_a_wrong_setting(workflow):
    status, output = workflow("tiny", "all", changes={"iterations": 3})
    assert status != 0 and "'iterations' was unexpected" in output


# ---------------------------------------------------------------------------------------------
# Jobs
# ---------------------------------------------------------------------------------------------

def test_tiny_runs_every_rule(workflow):
    status, output = workflow("tiny", "--quiet", "rules", "--", "all")
    found = jobs(output)
    assert status == 0, output
    # tables 1 and 2 and the architectures hold 24 + 6 + 4 runs, two of them twice; table 3 has
    # three pretrained models (a fourth is missing), two of them rescaled too
    # and two nets choose among two learning rates
    assert found["train_classification"] == found["test_classification"] == 32 + 5 + 2 * 2
    assert found["train_detection"] == found["test_detection"] == 6 + 5
    with open(os.path.join(EXPERIMENTS, "Snakefile")) as file:
        rules = set(re.findall(r"^ *rule (\w+):", file.read(), re.M))
    fetched = {"fetch_voc", "fetch_proposals"}
    targets = {"table1", "table2", "table3", "architectures", "figure1", "figure2", "figure3",
               "figure4"}
    assert rules - fetched - targets == {
        rule for rule in found if not rule.startswith("neighbours_") and rule != "total"}


@pytest.mark.parametrize("target, expected", [
    # 24 cells with three seeds each; Adam, in half of them, chooses between two rates
    ("table1", {"train_classification": 24 * 3 + 12 * 2, "choose_rate": 12, "hold_back": 1,
                "fetch_voc": 1, "tables": 1}),
    # detection: one of three rates, and one seed
    ("table2", {"train_classification": 6 * 3, "train_detection": 6 * (3 + 1), "choose_rate": 6,
                "fetch_proposals": 1}),
    # no pretrained model is there: ours alone
    ("table3", {"train_classification": 3, "train_detection": 3 + 1, "tables": 1}),
    ("architectures", {"train_classification": 4 * 3, "initialize": 4 * 3, "tables": 1}),
    ("figure1", {"initialize": 5, "draw_figure1": 1}),
])
def test_the_paper_takes_these_jobs(workflow, target, expected):
    status, output = workflow("paper", "--quiet", "rules", "--", target)
    found = jobs(output)
    assert status == 0, output
    assert {rule: found.get(rule) for rule in expected} == expected


def test_imagenet_figures_need_imagenet_and_say_so(workflow, tmp_path):
    status, output = workflow("paper", "--quiet", "rules", "--", "figure3")
    assert status != 0 and "datasets/ILSVRC2012/train.txt" in output
    folder = tmp_path / "datasets" / "ILSVRC2012"
    folder.mkdir(parents=True)
    for split in ("train", "val"):
        (folder / (split + ".txt")).write_text("image.jpg 0\n")
    status, output = workflow("paper", "--quiet", "rules", "--", "figure3", "figure4")
    assert status == 0, output
    assert jobs(output)["train_imagenet"] == 7 and jobs(output)["lmdb"] == 2


def test_a_pretrained_model_that_is_there_adds_its_rows(workflow, tmp_path):
    folder = tmp_path / "datasets" / "pretrained" / "agrawal"
    folder.mkdir(parents=True)
    for name in ("deploy.prototxt", "agrawal.caffemodel"):
        (folder / name).write_text("")
    status, output = workflow("paper", "--quiet", "rules", "--", "table3")
    found = jobs(output)
    assert status == 0, output
    assert found["convert"] == 1 and found["rescale"] == 3  # a seed each
    assert found["train_classification"] == 3 * 3
    assert found["train_detection"] == 3 * (3 + 1)


def test_a_changed_setting_reruns_what_depends_on_it_alone(workflow):
    target = "build/tiny/start/caffenet/xavier/none/seed0.caffemodel"
    status, output = workflow("tiny", target, dry=False)
    assert status == 0, output
    assert "Nothing to be done" in workflow("tiny", target)[1]
    other = {"figure1": {"images": 5}, "classification": {"iterations": 5}, "threads": 2}
    assert "Nothing to be done" in workflow("tiny", target, changes=other)[1]
    found = jobs(workflow("tiny", target, changes={"initialization": {"images": 8}})[1])
    assert found == {"sample_voc": 1, "initialize": 1, "total": 2}


# ---------------------------------------------------------------------------------------------
# Clusters and GPUs
# ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("profile, words", [
    ("slurm", ["slurm_extra=--gres=gpu:1", "runtime=1440", "mem_mb=16000"]),
    ("gpus", ["gpus=1", "on_free_gpu"])])
def test_profiles_ask_for_a_gpu_a_job(workflow, profile, words):
    status, output = workflow("paper", "--profile", os.path.join(EXPERIMENTS, "profiles", profile),
                              "--printshellcmds", "--", "table2")
    assert status == 0, output
    job = output[output.index("rule train_detection:"):].split("\n\n[")[0]
    assert all(word in job for word in words)


def test_every_job_of_a_machine_gets_a_gpu_of_its_own(tmp_path):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 0\necho 1\n")
    tool.chmod(0o755)
    environment = {"PATH": "%s:%s" % (tmp_path, os.environ["PATH"]), "TMPDIR": str(tmp_path)}
    command = [os.path.join(EXPERIMENTS, "profiles", "gpus", "on_free_gpu"), "sh", "-c",
               "echo $CUDA_VISIBLE_DEVICES >> used; while ! test -e stop; do sleep 0.05; done"]
    used = tmp_path / "used"
    started = []
    for number in (1, 2):
        started.append(subprocess.Popen(command, env=environment, cwd=str(tmp_path)))
        while not used.exists() or len(used.read_text().split()) < number:
            time.sleep(0.02)
    third = subprocess.run(command, env=environment, cwd=str(tmp_path), stderr=subprocess.PIPE)
    (tmp_path / "stop").write_text("")
    assert [process.wait() for process in started] == [0, 0]
    assert third.returncode == 1 and b"all GPUs are in use" in third.stderr
    assert used.read_text().split() == ["0", "1"]
    assert subprocess.run(command, env=environment, cwd=str(tmp_path)).returncode == 0
    assert used.read_text().split() == ["0", "1", "0"]
