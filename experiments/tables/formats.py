"""Format tables of text, as Markdown, HTML and LaTeX."""
from html import escape
from typing import Sequence

from ddinit import files

STYLE = """<style>body{font-family:sans-serif} table{border-collapse:collapse}
td,th{padding:.3em .8em;border-bottom:1px solid #ccc;text-align:left}</style>"""


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| %s |\n" % " | ".join(line) for line in lines)


def html(title: str, notes: Sequence[str], header: Sequence[str],
         rows: Sequence[Sequence[str]]) -> str:
    """Return a page with a table after a title and paragraphs."""
    lines = ["<!DOCTYPE html>", '<meta charset="utf-8">', "<title>%s</title>" % escape(title),
             STYLE, "<h1>%s</h1>" % escape(title), *["<p>%s</p>" % escape(note) for note in notes],
             "<table>", _html_row("th", header), *[_html_row("td", row) for row in rows],
             "</table>"]
    return "\n".join(lines) + "\n"


def _html_row(tag: str, texts: Sequence[str]) -> str:
    return "<tr>%s</tr>" % "".join("<%s>%s</%s>" % (tag, escape(text), tag) for text in texts)


def latex(notes: Sequence[str], header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a tabular, which needs no package, after comments."""
    lines = [*["% " + note for note in notes],
             r"\begin{tabular}{l%s}" % ("c" * (len(header) - 1)), r"\hline",
             _latex_row(header), r"\hline", *[_latex_row(row) for row in rows], r"\hline",
             r"\end{tabular}"]
    return "\n".join(lines) + "\n"


def _latex_row(texts: Sequence[str]) -> str:
    return " & ".join(_escaped(text) for text in texts) + r" \\"


def _escaped(text: str) -> str:
    for character, instead in (("&", r"\&"), ("%", r"\%"), ("_", r"\_"), ("±", r"$\pm$")):
        text = text.replace(character, instead)
    return text


def write(path: str, text: str) -> None:
    """Write a text file, whole or not at all."""
    with files.replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
