"""Draw the curve of a training run."""
import math
import os
from typing import List, Sequence, Tuple

from matplotlib.figure import Figure

from ddinit import files
from training import run_folder


def draw(folder: str) -> None:
    """Draw log.csv, and curves.csv where there is one, as curve.png."""
    log = run_folder.read_table(os.path.join(folder, "log.csv"))
    curves = run_folder.measured(folder)
    if not log:
        return
    names = [name for name in curves[0] if name != "iteration"] if curves else []
    figure = Figure(figsize=(7, 3 + 2 * len(names)))
    axes = figure.subplots(1 + len(names), 1, squeeze=False, sharex=True)
    iterations = [row["iteration"] for row in log]
    losses = [row["loss"] for row in log]
    window = min(len(losses), max(10, len(losses) // 50))
    axes[0, 0].plot(iterations, losses, color="0.8", linewidth=0.8, label="each")
    axes[0, 0].plot(*_averaged(iterations, losses, window), label="mean of %d iterations" % window)
    axes[0, 0].set_ylabel("training loss")
    axes[0, 0].legend()
    for axis, name in zip(axes[1:, 0], names):
        axis.plot([row["iteration"] for row in curves], [row[name] for row in curves],
                  marker=".")
        axis.set_ylabel(name)
    axes[-1, 0].set_xlabel("iteration")
    figure.tight_layout()
    with files.replacing(os.path.join(folder, "curve.png")) as temporary:
        figure.savefig(temporary, format="png", dpi=100)


def _averaged(iterations: Sequence[float], losses: Sequence[float],
              window: int) -> Tuple[List[float], List[float]]:
    """Return the means of blocks of `window` losses, at the middle of each block."""
    starts = range(0, len(losses) - window + 1, window)
    return ([iterations[start + window // 2] for start in starts],
            [math.fsum(losses[start:start + window]) / window for start in starts])
