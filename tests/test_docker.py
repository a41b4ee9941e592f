"""The Dockerfile and the scripts that it runs, as far as they can be checked without Docker."""
import os
import re
import subprocess

import pytest
from shown_commands import ROOT

DOCKER = os.path.join(ROOT, "docker")


@pytest.fixture(scope="module")
def dockerfile():
    with open(os.path.join(ROOT, "Dockerfile"), encoding="utf-8") as file:
        return re.sub(r"\\\n|^#.*\n", "", file.read(), flags=re.MULTILINE)


def run(script, *arguments, **environment):
    return subprocess.run([os.path.join(DOCKER, script), *arguments], check=False, cwd=ROOT,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True,
                          env={**os.environ, **environment})


def test_all_targets_share_the_lines_that_install_and_start_the_program(dockerfile):
    for instruction in ("COPY . ", "USER magic", "VOLUME ", "WORKDIR ", "ENTRYPOINT "):
        assert len(re.findall("^" + instruction, dockerfile, re.MULTILINE)) == 1
    for target in ("given", "cpu", "gpu"):
        stage = re.search(r"^FROM common AS %s\n((?:(?!FROM).*\n)*)" % target, dockerfile,
                          re.MULTILINE)
        assert "import caffe" in stage.group(1)


def test_every_file_that_is_copied_alone_exists(dockerfile):
    for sources in re.findall(r"^COPY (docker/.*) \S+$", dockerfile, re.MULTILINE):
        assert all(os.path.isfile(os.path.join(ROOT, source)) for source in sources.split())


def test_every_option_of_the_build_is_one_that_the_script_reads(dockerfile):
    with open(os.path.join(DOCKER, "build_caffe"), encoding="utf-8") as file:
        read = set(re.findall(r"\$\{([A-Z]+):-", file.read()))
    assert read == set(re.findall(r"^ARG ([A-Z]+)$", dockerfile, re.MULTILINE))


@pytest.mark.parametrize("arguments", [(), ("cpu",), ("tpu", "folder")])
def test_a_build_without_a_kind_and_a_folder_changes_nothing(arguments):
    done = run("build_caffe", *arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "usage: build_caffe cpu|gpu ROOT\n"


@pytest.mark.parametrize("arguments, output", [
    (["echo", "a b"], "a b\n"), (["/bin/echo", "a"], "a\n"),
    (["net.prototxt", "-d", "a b"], "<net.prototxt><-d><a b>"),
    (["models/caffenet/deploy.prototxt"], "<models/caffenet/deploy.prototxt>"),
    (["--help"], "<--help>"), ([], "<>"),
])
def test_the_entry_point_starts_a_program_or_magic_init(tmp_path, arguments, output):
    program = tmp_path / "magic-init"
    program.write_text("#!/bin/sh\nprintf '<%s>' \"$@\"\n")
    program.chmod(0o755)
    done = run("entrypoint", *arguments, PATH="%s:%s" % (tmp_path, os.environ["PATH"]))
    assert (done.returncode, done.stdout, done.stderr) == (0, output, "")


def test_the_entry_point_checks_a_gpu(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    python.chmod(0o755)
    done = run("entrypoint", "gpu-check", "--out", "/output/a b.json",
               PATH="%s:%s" % (tmp_path, os.environ["PATH"]))
    script, *arguments = done.stdout.splitlines()
    assert os.path.samefile(script, os.path.join(ROOT, "experiments", "gpu_check.py"))
    assert (done.returncode, arguments) == (0, ["--out", "/output/a b.json"])
