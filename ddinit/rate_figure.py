"""The paper's figure 1 for any net: change rate per layer (a) and its variation within layers (b).

    python magic_init.py models/caffenet_tiny/deploy.prototxt out.caffemodel -d 'photos/*' \\
        -cs --report out.json
    python rate_figure.py out.json out.png

`--figure out.png` of the first command does the same as the second.
"""
import os
import sys
from typing import Any, Mapping, Optional, Sequence

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ddinit import files, processes, results


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
    with files.replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)



def draw_report(report: Mapping[str, Any], path: str) -> None:
    """Draw the content of a report of magic_init.py (see `report.as_json`) into a PNG.

    Raises ValueError where it is no such content.
    """
    if "layers" not in report or "calibrated" not in report:
        raise ValueError("not a report that magic_init.py --report wrote")
    layers = [layer for layer in report["layers"] if layer["rate_before"] is not None]
    labels = {"before": "before", "after": "after"} if report["calibrated"] else {
        "after": "as initialised"}
    rates, variations = ({label: [layer["%s_%s" % (quantity, when)] for layer in layers]
                          for when, label in labels.items()}
                         for quantity in ("rate", "variation"))
    draw(path, os.path.basename(report["output"]), [layer["name"] for layer in layers], rates,
         variations)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Draw the report that the command line names; return the exit status."""
    parser = processes.Parser(prog="rate_figure", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("report", help="JSON file that magic_init.py --report wrote")
    parser.add_argument("figure", help="PNG file to write")
    return processes.command_line(
        lambda arguments: draw_report(results.read_json(arguments.report), arguments.figure),
        parser.parse_args(argv), parser.prog)


if __name__ == "__main__":
    sys.exit(main())
