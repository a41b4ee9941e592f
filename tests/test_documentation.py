"""Every command that the documentation shows is run, on small data where it would take hours.

Commands run as they stand, by a shell, in a folder with a newcomer's checkout and data of the
names they use; what makes them short is added behind them.  What cannot be run here is read by the
parser of the program that it starts.
"""
import ast
import concurrent.futures
import importlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from typing import Dict, List, NamedTuple

import numpy as np
import pytest
import snakemake
import yaml
from scipy.io import savemat
from shown_commands import ROOT, documents, python_examples, shown

import gpu_check
import magic_init
from ddinit import processes
from voc.folders import Voc

# What makes commands short, by how they begin.
SHORTER = {
    "magic_init.py --help": "",
    "magic_init.py": "--batch-size 4 --batches 2 --cpu",
    "data/convert_weights.py": "",
    "data/image_mean.py": "",
    "data/make_lmdb.py": "--workers 1",
    "data/make_tiny.py": "",
    "data/make_voc_lmdb.py": "",
    "data/photographs.py": "--count 2",
    "experiments/classify_voc.py train": "--iterations 2 --batch-size 2 --workers 0 --cpu",
    "experiments/classify_voc.py test": "--crops 2 --workers 0 --cpu",
    "experiments/detect_voc.py train":
        "--iterations 2 --scales 120 --max-size 200 --search-side 80 --processes 1 --workers 0"
        " --cpu",
    "experiments/detect_voc.py test":
        "--scales 120 --max-size 200 --search-side 80 --processes 1 --workers 0 --limit 6 --cpu",
    "experiments/figure1.py": "--images 4 --cpu",
    "experiments/figure3.py": "",
    "experiments/figure4.py": "",
    "experiments/initialize.py": "--images 8 --cpu",
    "experiments/nearest_neighbours.py": "--workers 0 --cpu",
    "experiments/proposals.py": "--search-side 80 --processes 1",
    "experiments/study.py": "--config study.yaml --jobs 1",
    "experiments/train_imagenet.py":
        "--classes 3 --iterations 2 --batch-size 2 --validate-every 1 --workers 0 --cpu",
    "experiments/workflow.py sample --voc": "--count 8",
    "experiments/workflow.py sample --list": "--count 3 10",
    "experiments/workflow.py hold-back": "",
    "experiments/workflow.py train": "--iterations 2 --batch-size 2 --workers 0 --cpu",
    "experiments/workflow.py test": "--crops 2 --workers 0 --cpu",
    "experiments/workflow.py choose-rate": "",
    "experiments/workflow.py tables": "",
    "models/generate.py": "--to build/models",
    "models/kinds.py": "",
}
# Scripts that are not run here, and why.
READ_ONLY = {
    "data/fetch.py": "downloads gigabytes",
    "experiments/bench.py": "initializes three nets of full size",
    "experiments/gpu_check.py": "needs a GPU; test_gpu_check.py compares the CPU with itself",
    "experiments/kinds_table.py": "measures 22 networks; test_kinds_table.py runs it on two",
    "experiments/study_curves.py": "trains nine nets; test_study_curves.py runs it in small",
    "experiments/study_detection.py": "trains six nets; test_study_detection.py runs it in small",
}
# What a module's commands find besides what the experiments' README leaves.
BEFORE = {
    "experiments/figure3.py": "cp -r build/reference build/gaussian"
                              " && cp -r build/kmeans build/kmeans_nolrn",
    "experiments/figure4.py": "cp -r build/kmeans build/single",
    "experiments/study.py": "mkdir build/others && cp"
                            " build/study/start/caffenet/*/seed0/start.caffemodel"
                            " build/others/seed0.caffemodel",
    "experiments/train_imagenet.py": "rm -r build/kmeans",
}


SECONDS = 300  # after which a command is no longer waited for


class Ran(NamedTuple):
    """A command that was run: exit status and what it put out."""

    command: str
    status: int
    said: str


def words(command: str) -> List[str]:
    """The words of a command behind the variables that it sets, without its comment."""
    found = shlex.split(command.replace("\\\n", " "), comments=True)
    while re.match(r"[A-Z_]+=", found[0]):
        del found[0]
    return found


def shortening(command: str) -> str:
    """What is put behind a command of Python to run it here.

    Raises KeyError where SHORTER says nothing of it.
    """
    rest = words(command)[1:]
    if rest[0] == "-c":
        return ""
    fitting = [start for start in SHORTER if rest[:len(start.split())] == start.split()]
    if not fitting:
        raise KeyError("no test knows the command: " + command)
    return SHORTER[max(fitting, key=len)]


def is_run(command: str) -> bool:
    """Whether a command is run here; others are read by the program's parser."""
    found = words(command)
    return found[0] == "python" and found[1] not in READ_ONLY


COMMANDS = {path: shown(path) for path in documents()}
MARKDOWN = [path for path in COMMANDS if path.endswith(".md")]
MODULES = [path for path in COMMANDS if path.endswith(".py") and path != "setup.py"]
READ = sorted({command for commands in COMMANDS.values() for command in commands
               if not is_run(command)})


# ---------------------------------------------------------------------------------------------
# A newcomer's folder
# ---------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A folder with everything that the documentation takes for given, under its names."""
    folder = tmp_path_factory.mktemp("given")
    tiny, net = str(folder / "tiny"), os.path.join("models", "caffenet", "deploy.prototxt")
    _checkout(folder)
    _succeed(folder, "python data/make_tiny.py tiny --model " + net)
    photos = sorted(os.listdir(os.path.join(tiny, "VOC2007", "JPEGImages")))[:12]
    for place, ending in (("photos", ".jpg"), ("images", ".JPEG"),
                          ("build/photographs", ".jpg")):
        (folder / place).mkdir(parents=True)
        for name in photos:
            os.link(os.path.join(tiny, "VOC2007", "JPEGImages", name),
                    str(folder / place / (os.path.splitext(name)[0] + ending)))
    for place in ("datasets/VOCdevkit/VOC2007", "VOCdevkit/VOC2007", "VOC2007", "VOC"):
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        os.symlink(os.path.join(tiny, "VOC2007"), str(folder / place))
    (folder / "ILSVRC2012").mkdir()
    for split in ("train", "val"):
        os.symlink(os.path.join(tiny, "imagenet"), str(folder / "ILSVRC2012" / split))
        shutil.copy(os.path.join(tiny, "imagenet", split + ".txt"), str(folder))
    for name, count in (("queries", 2), ("pool", 8)):
        (folder / (name + ".txt")).write_text("\n".join(
            os.path.join("photos", image) for image in photos[:count]))
    _write_weights(folder, net, tiny)
    _write_proposals(folder, os.path.join(tiny, "VOC2007"))
    _write_small_images(folder)
    return folder


def _checkout(folder):
    """Link the repository's files, with small nets in place of the large ones."""
    (folder / "models").mkdir()
    for name in os.listdir(ROOT):
        if name in ("data", "experiments", "docker") or os.path.isfile(os.path.join(ROOT, name)):
            os.symlink(os.path.join(ROOT, name), str(folder / name))
    small = {"caffenet": "caffenet_tiny", "googlenet": "googlenet_cifar"}
    for name in os.listdir(os.path.join(ROOT, "models")):
        os.symlink(os.path.join(ROOT, "models", small.get(name, name)),
                   str(folder / "models" / name))
    (folder / "bin").mkdir()
    python = folder / "bin" / "python"
    python.write_text('#!/bin/sh\nexec "%s" "$@"\n' % sys.executable)
    python.chmod(0o755)


def _write_weights(folder, net, tiny):
    _succeed(folder, "python magic_init.py %s old.caffemodel --data 'photos/*' -bs 4 -nit 1 --cpu"
             " -cs --report out.json" % net)
    _succeed(folder, "python magic_init.py models/googlenet/deploy.prototxt kmeans.caffemodel"
             " --data 'photos/*' -bs 4 -nit 1 --cpu")
    for name in ("OLD", "lenet", "pretrained", "caffenet", "build/doersch"):
        shutil.copy(str(folder / "old.caffemodel"), str(folder / (name + ".caffemodel")))
    for name in ("NET.prototxt", "lenet.prototxt", "NET"):
        shutil.copy(str(folder / net), str(folder / name))
    shutil.copy(str(folder / "old.caffemodel"), str(folder / "WEIGHTS"))
    for name, copy in (("pretrained.prototxt", "deploy_v1.prototxt"),
                       ("pretrained.caffemodel", "theirs.caffemodel")):
        shutil.copy(os.path.join(tiny, name), str(folder / copy))


def _write_proposals(folder, root):
    """Write boxes all over the images as the public selective-search files hold them."""
    boxes = np.array([(y + 1, x + 1, y + 40, x + 40) for x in range(0, 120, 20)
                      for y in range(0, 80, 20)], np.uint16)
    for split in ("trainval", "test"):
        images = Voc(root).images(split)
        cells = np.empty((1, len(images)), object)
        cells[0, :] = [boxes] * len(images)
        savemat(str(folder / ("voc_2007_%s.mat" % split)), {
            "boxes": cells, "images": np.array([[name] for name in images], object)})


def _write_small_images(folder):
    rng = np.random.default_rng(0)
    np.savez(str(folder / "cifar10_mini.npz"), **{
        "%s_%s" % (split, what): value for split, count in (("train", 60), ("test", 20))
        for what, value in (("images", rng.integers(0, 256, (count, 32, 32, 3), np.uint8)),
                            ("labels", np.arange(count, dtype=np.uint8) % 10))})
    shutil.copy(str(folder / "cifar10_mini.npz"), str(folder / "cifar10_5k.npz"))
    with open(os.path.join(ROOT, "experiments", "study.yaml")) as file:
        config = yaml.safe_load(file)
    row = "Ours, Gaussian"
    config.update(nets={"caffenet": os.path.join(ROOT, "models", "caffenet_cifar_half",
                                                 "deploy.prototxt")},
                  validation_images=10, initialization_images=8, epochs=1, batch_size=25,
                  validations=1, learning_rates={"SGD": [0.001], "Adam": [0.001]}, widen=0,
                  seeds=[0], rows={row: config["rows"][row]})
    (folder / "study.yaml").write_text(yaml.safe_dump(config))


def _run(folder, command: str) -> Ran:
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1",
                   "PATH": "%s:%s" % (folder / "bin", os.environ["PATH"])}
    with subprocess.Popen(command, shell=True, cwd=str(folder), env=environment,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          universal_newlines=True, start_new_session=True) as process:
        try:
            said, _ = process.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return Ran(command, -1, "no end after %d s" % SECONDS)
    return Ran(command, process.returncode, said)


def _succeed(folder, command: str) -> None:
    ran = _run(folder, command)
    assert ran.status == 0, ran


def _copy(folder, of):
    """A folder of the same content whose files can be replaced without changing the other's."""
    shutil.copytree(str(of), str(folder), symlinks=True, copy_function=os.link,
                    ignore=shutil.ignore_patterns("tiny"))
    return folder


def test_the_readmes_example_in_python_runs(given, tmp_path):
    folder = _copy(tmp_path / "example", given)
    (example,) = python_examples("README.md")
    (folder / "example.py").write_text(example)
    ran = _run(folder, "python example.py")
    assert ran.status == 0, ran
    rates = ast.literal_eval(ran.said.splitlines()[-1])
    assert list(rates) == ["conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8"]
    assert max(rates.values()) / min(rates.values()) < 1.5
    assert (folder / "build" / "caffenet.caffemodel").stat().st_size > 200000


def _run_all(folder, commands) -> List[Ran]:
    return [_run(folder, re.sub(r"  +#.*", "", command) + " " + shortening(command))
            for command in commands if is_run(command)]


# ---------------------------------------------------------------------------------------------
# Commands that are run
# ---------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def ran(given, tmp_path_factory) -> Dict[str, List[Ran]]:
    """What came of the commands, by document.

    Every Markdown document's commands run one after the other in a folder of their own, each
    module's in one where the experiments' have been run before.  The same command runs once.
    """
    parent = tmp_path_factory.mktemp("ran")
    seen = {command for path in MARKDOWN for command in COMMANDS[path]}
    later = {}
    for path in MODULES:
        later[path] = [command for command in COMMANDS[path] if command not in seen]
        seen.update(later[path])
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        first = {path: pool.submit(
            _run_all, _copy(parent / path.replace("/", "_"), given), COMMANDS[path])
            for path in sorted(MARKDOWN, key=lambda path: path != "experiments/README.md")}
        first["experiments/README.md"].result()
        second = {path: pool.submit(_run_after, path, commands, _copy(
            parent / path.replace("/", "_"), parent / "experiments_README.md"))
            for path, commands in later.items() if commands}
        return {path: job.result() for path, job in {**first, **second}.items()}


def _run_after(path, commands, folder) -> List[Ran]:
    if path in BEFORE:
        _succeed(folder, BEFORE[path])
    return _run_all(folder, commands)


@pytest.mark.parametrize("path", [path for path in COMMANDS if any(
    map(is_run, COMMANDS[path]))])
def test_commands_run(ran, path):
    for one in ran.get(path, []):
        assert one.status == 0, "%s\n%s" % (one.command, one.said)
        assert "Traceback" not in one.said


@pytest.mark.parametrize("path", COMMANDS)
def test_every_command_is_one_that_is_run_or_read(path):
    for command in COMMANDS[path]:
        assert words(command)[0] in READERS
        if is_run(command):
            shortening(command)  # KeyError with the command where it is new


def test_every_script_shows_how_it_is_run():
    scripts = [path for path in MODULES if path.startswith(("experiments/", "data/"))
               and path.count("/") == 1]
    assert {"experiments/study.py", "data/fetch.py"} <= set(scripts)
    for path in scripts:
        if path not in ("data/image_database.py", "data/download.py"):
            assert any(words(command)[1] == path for command in COMMANDS[path]), path


def test_no_shortening_is_left_of_commands_that_are_gone():
    given = [" ".join(words(command)[1:]) for commands in COMMANDS.values()
             for command in commands if words(command)[0] == "python"]
    for start in [*SHORTER, *READ_ONLY]:
        assert any(command.startswith(start) for command in given), start
    assert set(BEFORE) <= set(MODULES)


# ---------------------------------------------------------------------------------------------
# Commands that are read
# ---------------------------------------------------------------------------------------------

def _read_script(found, monkeypatch):
    """A script that downloads or needs an hour: its own parser takes the command."""
    asked = []
    monkeypatch.setattr(processes, "command_line",
                        lambda run, arguments, program: asked.append(arguments) or 0)
    module = importlib.import_module(os.path.splitext(os.path.basename(found[0]))[0])
    assert module.__file__ == os.path.join(ROOT, found[0])
    assert module.main(found[1:]) == 0 and len(asked) == 1
    if found[0] == "data/fetch.py":
        assert set(asked[0].names) <= set(module.read_sources(asked[0].sources))


def _read_make(found, _):
    """`make test` would run this test, others need minutes: make says what it would do."""
    if shutil.which("make") is None:
        pytest.skip("no make here, as in the Docker images: commands of make are for checkouts")
    done = subprocess.run(["make", "--dry-run", "--always-make", *found], cwd=ROOT, check=False,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True)
    assert done.returncode == 0, done.stderr
    for value in (word.partition("=")[2] for word in found if "=" in word):
        assert value in done.stdout


def _read_pip(found, _):
    """Installing would change this environment: setup.py and the Makefile offer what is named."""
    with open(os.path.join(ROOT, "setup.py"), encoding="utf-8") as file:
        setup = file.read()
    if found[-1].startswith("opencv"):  # one wheel of OpenCV in place of the other
        with open(os.path.join(ROOT, "Makefile"), encoding="utf-8") as file:
            assert found[0] in ("install", "uninstall") and found[-1] in setup + file.read()
        return
    assert found[0] == "install"
    extras = re.fullmatch(r"\.(?:\[([a-z,]+)\])?", found[1]).group(1)
    offered = re.findall(r'^        "(\w+)": ', setup, re.MULTILINE)
    assert "dev" in offered
    assert set(extras.split(",") if extras else []) <= set(offered)


def _read_snakemake(found, monkeypatch):
    """The whole workflow: test_workflow.py runs it without its jobs, CI the small one with them."""
    monkeypatch.chdir(ROOT)
    arguments = snakemake.get_argument_parser().parse_args(found)
    if found == ["--dry-run"]:
        return  # text that names the option
    profile = os.path.join(arguments.profile, "config.yaml") if arguments.profile else ""
    for path in [arguments.snakefile, *map(str, arguments.configfile), *filter(None, [profile])]:
        assert os.path.isfile(path)
    with open(arguments.snakefile, encoding="utf-8") as file:
        rules = re.findall(r"^rule (\w+):", file.read(), re.MULTILINE)
    assert arguments.target and set(arguments.target) <= set(rules)


def _read_docker(found, monkeypatch):
    """No Docker here: the Dockerfile has what is built, and the program takes what it is given."""
    with open(os.path.join(ROOT, "Dockerfile"), encoding="utf-8") as file:
        text = file.read()
    if found[0] == "build":
        options = dict(zip(found[1:-1:2], found[2:-1:2]))
        assert found[-1] == "." and set(options) <= {"--target", "--build-arg", "-t"}
        assert options["--target"] in re.findall(r"^FROM \S+ AS (\w+)", text, re.MULTILINE)
        name = options.get("--build-arg", "BASE=").partition("=")[0]
        assert "ARG %s=" % name in text
        return
    assert found[0] == "run"
    rest = found[1:]
    while rest[0].startswith("-"):
        assert rest[0] in ("--rm", "-v", "--gpus")
        volume = rest[1].split(":")[1] if rest[0] == "-v" else "/data"
        assert '"%s"' % volume in text
        del rest[:1 if rest[0] == "--rm" else 2]
    assert rest[0].startswith("magic")
    if rest[1] == "python":
        assert rest[1:] == ["python", "-m", "pytest"]
    elif rest[1] == "gpu-check":
        monkeypatch.setattr(processes, "command_line", lambda *_: 0)
        assert gpu_check.main(rest[2:]) == 0
    else:
        arguments = magic_init._parser().parse_args(rest[1:])
        assert os.path.isfile(os.path.join(ROOT, arguments.prototxt))


READERS = {"python": _read_script, "make": _read_make, "pip": _read_pip,
           "snakemake": _read_snakemake, "docker": _read_docker}


@pytest.mark.parametrize("command", READ)
def test_what_cannot_be_run_is_understood(command, monkeypatch):
    found = words(command)
    READERS[found[0]](found[1:], monkeypatch)
