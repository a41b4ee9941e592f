"""The commands that the documentation shows: found in Markdown, docstrings and comments.

    python tests/shown_commands.py

prints them, each behind the file that shows it.
"""
import ast
import os
import re
import shlex
import textwrap
from typing import List

ROOT = os.path.realpath(os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?:^    .*\n)(?:(?:^    .*|^)\n)*", re.MULTILINE)
PROGRAMS = ("python", "make", "pip", "snakemake", "docker")
STARTS = re.compile(r"(?:[A-Z_]+=\S+ +)*(?:%s)(?!\S)" % "|".join(PROGRAMS))
# Blocks of Markdown that are no commands, by how they begin.
LISTINGS = ("ImageSets/Main/trainval.txt, test.txt ",)


def documents() -> List[str]:
    """Every file of the repository that may show commands: not tests, and no package."""
    found = []
    for folder, folders, names in os.walk(ROOT):
        folders[:] = [name for name in folders if not name.startswith(".")
                      and name not in ("build", "datasets", "ddinit", "tests", "__pycache__")]
        found += [os.path.relpath(os.path.join(folder, name), ROOT) for name in names
                  if name.endswith((".md", ".py", "Snakefile", "Dockerfile", "config.yaml"))]
    return sorted(found)


def shown(path: str) -> List[str]:
    """The commands that a file shows, each as a shell takes it, in their order.

    Raises ValueError naming a line in a block of a Markdown file that is no command.
    """
    with open(os.path.join(ROOT, path), encoding="utf-8") as file:
        text = file.read()
    if path.endswith(".md"):
        return _of_markdown(path, text)
    if path.endswith((".py", "Snakefile")):
        # a Snakefile is Python up to its first rule
        source = text if path.endswith(".py") else text[:text.index('"""\n', 3) + 4]
        text = ast.get_docstring(ast.parse(source), clean=False) or ""
    else:
        text = re.sub(r"^#", " ", "".join(re.findall(r"^#.*\n", text, re.MULTILINE)),
                      flags=re.MULTILINE)
    return [command for block in INDENTED.findall(text + "\n") for command in _commands(block)
            if STARTS.match(command)]


def python_examples(path: str) -> List[str]:
    """The blocks of Python that a Markdown file shows."""
    with open(os.path.join(ROOT, path), encoding="utf-8") as file:
        return [block for kind, block in FENCED.findall(file.read()) if kind == "python"]


def _of_markdown(path: str, text: str) -> List[str]:
    found = []
    blocks = [block for kind, block in FENCED.findall(text) if kind != "python"]
    rest = FENCED.sub("", text)
    blocks += INDENTED.findall(rest)
    for block in blocks:
        if textwrap.dedent(block).startswith(LISTINGS):
            continue
        for command in _commands(block):
            if not STARTS.match(command):
                raise ValueError("%s: not a command of %s: %s" % (path, PROGRAMS, command))
            found.append(command)
    inline = [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", INDENTED.sub("", rest))]
    return found + [code for code in inline if STARTS.match(code) and code not in found]


def _commands(block: str) -> List[str]:
    r"""The commands of a block: lines, but for those that go on behind a \ or in a quotation."""
    found, begun = [], ""
    for line in textwrap.dedent(block).splitlines():
        begun += line + "\n"
        if line.endswith("\\") or not _whole(begun):
            continue
        if begun.strip():
            found.append(begun.strip())
        begun = ""
    return found + ([begun.strip()] if begun.strip() else [])


def _whole(text: str) -> bool:
    try:
        shlex.split(text, comments=True)
    except ValueError:
        return False
    return True


if __name__ == "__main__":
    for document in documents():
        for line in shown(document):
            print("%s: %s" % (document, line))
