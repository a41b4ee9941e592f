"""Format and write tables, and average trials."""
import csv
import math
from typing import Any, Iterable, Optional, Sequence, Tuple

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


def write_csv(path: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a table with a line of column names, whole or not at all; None is an empty cell."""
    with files.replacing(path) as temporary, \
            open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)


def mean_and_error(trials: Sequence[float]) -> Tuple[float, Optional[float]]:
    """Return the mean of trials and its standard error s / sqrt(n), None for a single trial.

    Raises ValueError where there is no trial.
    """
    count = len(trials)
    if not count:
        raise ValueError("no trials to average")
    mean = math.fsum(trials) / count
    if count == 1:
        return mean, None
    variance = math.fsum((trial - mean) ** 2 for trial in trials) / (count - 1)
    return mean, math.sqrt(variance / count)
