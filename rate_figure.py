"""The paper's figure 1 for any net: change rate per layer (a) and its variation within layers (b).

    python magic_init.py models/caffenet_tiny/deploy.prototxt out.caffemodel -d 'photos/*' \\
        -cs --figure out.png
"""
from typing import Mapping, Sequence

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import guarded


def draw(path: str, title: str, layers: Sequence[str], rates: Mapping[str, Sequence[float]],
         variations: Mapping[str, Sequence[float]]) -> None:
    """Write a PNG with a line per entry of `rates` and of `variations`, by label (layers,).

    Rates are on a logarithmic axis, where a flat line means that all layers train at one rate.
    """
    width = min(16.0, max(8.0, 4 + 0.3 * len(layers)))
    figure = Figure(figsize=(width, 4.2))
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    left, right = figure.subplots(1, 2)
    for axes, series, name in (
            (left, rates, "(a) average change rate"),
            (right, variations, "(b) coefficient of variation")):
        for number, (label, values) in enumerate(series.items()):
            axes.plot(range(len(layers)), values, "osD^vPX*"[number % 8] + "-", markersize=4,
                      linewidth=1.3, label=label)
        axes.set_title(name, fontsize=10)
        axes.set_xticks(range(len(layers)))
        axes.set_xticklabels(layers, rotation=90 if len(layers) > 10 else 30,
                             ha="center" if len(layers) > 10 else "right",
                             fontsize=8 if len(layers) <= 24 else 5)
        axes.grid(True, which="both", axis="y", alpha=0.3)
    left.set_yscale("log")
    right.set_ylim(bottom=0)
    left.legend(fontsize=8)
    figure.tight_layout()
    with guarded.replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)

