"""Draw figure 1: the change rates of layers and their variation within layers (equations 1, 2).

    python experiments/figure1.py models/caffenet/deploy.prototxt Reference=none \\
        'k-means=build/kmeans.caffemodel' --data 'photos/*' --figure build/figure1.png

It measures each named initialization on the same images. A flat curve of rates is better, and so
is a low variation. Every image has its own gradient and random loss, as in equation 2. WEIGHTS is a
caffemodel, whose definition is the one beside it (kmeans.prototxt) if there is one, or `none` for
the fillers of NET.
"""
import argparse
import logging
import os
import sys
import tempfile
from typing import Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ddinit import argument_types, change_rates, files, processes, results
from ddinit.caffemodel import load_weights
from ddinit.images import ImageBatches, batches_of, find_images
from ddinit.net import WorkingNet, blas_threads, choose_device, open_net, use_device
from ddinit.session import MEAN
from training.starts import definition_of, write_filled

log = logging.getLogger("figure1")

LARGEST_BATCH = 10  # images
FILLERS = "none"


class Rates(NamedTuple):
    """Change rates C_k and coefficients of variation of C_kij^2 by name of layer."""

    rates: Dict[str, float]
    variations: Dict[str, float]

    @property
    def spread(self) -> float:
        """Return the largest rate over the smallest."""
        return change_rates.spread(self.rates)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Measure the initializations that the command line names; return the exit status."""
    parser = processes.Parser(prog="figure1.py", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("net", metavar="NET", help="network definition, deploy or train_val")
    add("named", metavar="NAME=WEIGHTS", nargs="+", type=_named,
        help="a label, and a caffemodel or 'none' for the fillers of NET")
    add("-d", "--data", metavar="GLOB", required=True, help="images: a pattern or a folder")
    add("--images", metavar="N", type=argument_types.count, default=100,
        help="images to measure on, drawn by the seed (default: %(default)d)")
    add("--seed", metavar="N", type=argument_types.natural, default=0,
        help="random seed of fillers, losses and the choice of images (default: %(default)d)")
    add("--figure", metavar="FILE.png", help="file for the paper's two plots")
    add("--json", metavar="FILE.json", help="file for all that was measured")
    argument_types.add_device(parser)
    arguments = parser.parse_args(argv)
    processes.log_to_stderr()
    return processes.command_line(lambda given: _run(given, argv), arguments, parser.prog)


def _named(text: str) -> Tuple[str, str]:
    name, equals, weights = text.partition("=")
    if not (name and equals and weights):
        raise argparse.ArgumentTypeError("'%s' is not NAME=WEIGHTS" % text)
    return name, weights


def _run(arguments: argparse.Namespace, argv: Optional[Sequence[str]]) -> None:
    for path in (arguments.figure, arguments.json):
        if path is not None:
            files.check_writable(path)
    names = [name for name, _ in arguments.named]
    if len(set(names)) < len(names):
        raise ValueError("Two initializations have the same name: %s." % ", ".join(names))
    paths = find_images(arguments.data)
    wanted = min(arguments.images, len(paths))
    if wanted < arguments.images:
        log.warning("%s: there are only %d images, not %d", arguments.data, len(paths),
                    arguments.images)
    order = np.random.default_rng(arguments.seed).permutation(len(paths))
    chosen = [paths[index] for index in np.sort(order[:wanted])]
    device = choose_device(arguments.cpu, arguments.gpu)
    measured = {name: processes.in_child(measure, arguments.net, weights, chosen, arguments.seed,
                                      device) for name, weights in arguments.named}
    print("\n".join(table(measured)))
    if arguments.json is not None:
        results.write_json(arguments.json, {
            **results.provenance(arguments.seed, argv), "net": arguments.net,
            "data": arguments.data, "images": wanted,
            "initializations": [{"name": name, "weights": weights, "spread": measured[name].spread,
                                 **measured[name]._asdict()}
                                for name, weights in arguments.named]})
    if arguments.figure is not None:
        layers = list(measured[names[0]].rates)
        draw(
            arguments.figure, "%s, %d images" % (os.path.basename(os.path.dirname(
                os.path.abspath(arguments.net))), wanted), layers,
            {name: [curve.rates[layer] for layer in layers] for name, curve in measured.items()},
            {name: [curve.variations[layer] for layer in layers]
             for name, curve in measured.items()})


def measure(net: str, weights: str, paths: Sequence[str], seed: int,
            device: Optional[int]) -> Rates:
    """Return the change rates of a net with weights over images; it runs in a child process.

    Raises ValueError where the weights do not fit, or a layer has none.
    """
    use_device(device)
    size, batches = batches_of(len(paths), LARGEST_BATCH, len(paths))
    working = open_net(net if weights == FILLERS else definition_of(net, weights), size)
    _load(working, net, weights, seed)
    images = ImageBatches(paths, working.inputs[0], MEAN, 1.0)
    with blas_threads(working):
        measured = change_rates.measure(working, images, range(batches),
                                        np.random.default_rng(seed))
    return Rates(measured.by_layer(), measured.variation())


def _load(measured: WorkingNet, net: str, weights: str, seed: int) -> None:
    if weights == FILLERS:
        with tempfile.NamedTemporaryFile(suffix=".caffemodel") as file:
            write_filled(net, file.name, "reference", seed)
            load_weights(measured.net, file.name)
        return
    left = load_weights(measured.net, weights)
    if left:
        raise ValueError("%s: the file has no weights for layer '%s' of the net"
                         % (weights, left[0]))


def table(measured: Dict[str, Rates]) -> List[str]:
    """Return the lines to print: rates, and then variations, with a column for each name."""
    layers = list(next(iter(measured.values())).rates)
    width = max([len(layer) for layer in layers] + [len("max / min")])
    columns = ["%%%ds" % max(10, len(name)) for name in measured]
    form = "  ".join(["%%-%ds" % width, *columns])
    lines = ["change rate", form % ("layer", *measured)]
    lines += [form % (layer, *["%.4g" % curve.rates[layer] for curve in measured.values()])
              for layer in layers]
    lines += [form % ("max / min", *["%.4g" % curve.spread for curve in measured.values()]), "",
              "coefficient of variation", form % ("layer", *measured)]
    lines += [form % (layer, *["%.3g" % curve.variations[layer] for curve in measured.values()])
              for layer in layers]
    return lines


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


if __name__ == "__main__":
    sys.exit(main())
