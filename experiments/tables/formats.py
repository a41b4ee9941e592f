"""Format tables of text, and write text files."""
from typing import Sequence

from ddinit import files


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| %s |\n" % " | ".join(line) for line in lines)


def write(path: str, text: str) -> None:
    """Write a text file, whole or not at all."""
    with files.replacing(path) as temporary, \
            open(temporary, "w", encoding="utf-8", errors="surrogateescape") as file:
        file.write(text)
