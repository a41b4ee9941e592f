"""The command that each base module's docstring shows works as it stands there."""
import ast
import glob
import json
import os
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest

import image_database
import magic_init

ROOT = os.path.realpath(os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
MODULES = sorted(os.path.basename(path) for path in glob.glob(os.path.join(ROOT, "*.py"))
                 if os.path.basename(path) != "setup.py")
RUN_ALL = """
import json, sys, traceback
for name, code in json.loads(sys.argv[1]):
    try:
        exec(code, {})
    except BaseException:
        sys.exit("%s: %s" % (name, traceback.format_exc()))
"""


def commands(module):
    """The commands of a module's docstring, as lists of words; lines that end in \\ go on."""
    with open(os.path.join(ROOT, module), encoding="utf-8") as file:
        text = ast.get_docstring(ast.parse(file.read()), clean=False).replace("\\\n", " ")
    return [shlex.split(line) for line in re.findall(r"^ +(python .*)$", text, re.MULTILINE)]


def test_every_base_module_shows_a_command():
    assert {"magic_init.py", "weights.py", "scales.py"} <= set(MODULES)
    assert [module for module in MODULES if not commands(module)] == []


def test_one_liners_run(tmp_path):
    """In one process, which loads Caffe once, in a folder with the nets and a small database."""
    os.symlink(os.path.join(ROOT, "models"), str(tmp_path / "models"))
    (tmp_path / "build").mkdir()
    image_database.write_database(str(tmp_path / "build" / "train.lmdb"),
                                  [(np.zeros((3, 4, 5), np.uint8), 7)])
    lines = [(module, words[2]) for module in MODULES for words in commands(module)
             if words[1] == "-c"]
    assert len(lines) >= 6
    found = subprocess.run([sys.executable, "-c", RUN_ALL, json.dumps(lines)], cwd=str(tmp_path),
                           env={**os.environ, "PYTHONPATH": ROOT}, timeout=100,
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                           universal_newlines=True, check=False)
    assert found.returncode == 0, found.stderr
    assert len(found.stdout.splitlines()) >= len(lines)


@pytest.mark.parametrize("module", MODULES)
def test_command_lines_are_understood_and_name_nets_that_are_there(module):
    for words in commands(module):
        if words[1] == "-c":
            continue
        assert words[1] == "magic_init.py"
        arguments = magic_init._parser().parse_args(words[2:])
        assert os.path.isfile(os.path.join(ROOT, arguments.prototxt))
        assert arguments.output.endswith(".caffemodel")
