"""What a person sees of an initialisation: the change-rate table, the JSON report, figure 1.

    python magic_init.py models/caffenet_tiny/deploy.prototxt out.caffemodel -d 'photos/*' -cs \\
        --report out.json --figure out.png
"""
import argparse
import os
import subprocess
import sys
import tempfile
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import numpy as np

from ddinit import change_rates, results


class LayerRecord(NamedTuple):
    """What was done to one layer, and its output over all images (of the written net)."""
    name: str
    type: str
    weights: str
    size: int
    mean: float
    std: float
    dead: int


class Result(NamedTuple):
    """What the child process has found, for the parent to show and write.

    `rates` and `variations` are (before, after) pairs by layer; `definition` is the text of the
    changed definition, None where it stays as it is; `difference` compares the outputs of the net
    before and after, over their std, on held-back images.
    """
    records: List[LayerRecord]
    rates: Dict[str, Tuple[float, float]]
    variations: Dict[str, Tuple[float, float]]
    images: int
    processes: int
    notes: List[str]
    changes: List[str]
    definition: Any
    difference: Optional[float]
    seconds: Dict[str, float]
    provenance: Dict[str, Any]


def table(found: Result) -> List[str]:
    """Return the lines of the change-rate table: what layers got, and equation 2's rates."""
    width = max([len(record.name) for record in found.records] + [5])
    kinds = max([len(record.weights) for record in found.records] + [7])
    form = "%%-%ds  %%-%ds %%9s %%9s %%11s %%11s %%9s" % (width, kinds)
    lines = [form % ("layer", "weights", "mean", "std", "rate before", "rate after", "variation")]
    for record in found.records:
        rates, variation = found.rates.get(record.name), found.variations.get(record.name)
        cells = ["%.3g" % number for number in (record.mean, record.std)]
        cells += ["%.4g" % rate for rate in rates] if rates else ["", ""]
        lines.append(form % (record.name, record.weights, *cells,
                             "%.3g" % variation[1] if variation else ""))
    lines.append("largest over smallest rate: %.4g before, %.4g after" % spreads(found))
    return lines


def spreads(found: Result) -> Tuple[float, float]:
    """Return the largest over the smallest change rate, before and after."""
    rates = np.array(list(found.rates.values()))
    return change_rates.spread(rates[:, 0]), change_rates.spread(rates[:, 1])


def as_json(found: Result, arguments: argparse.Namespace) -> Dict[str, Any]:
    """Return everything that was measured, and what is needed to measure it again."""
    layers = []
    for record in found.records:
        layer = record._asdict()
        for key, pairs in (("rate", found.rates), ("variation", found.variations)):
            before, after = pairs.get(record.name, (None, None))
            layer.update({key + "_before": before, key + "_after": after})
        layers.append(layer)
    spread_before, spread_after = spreads(found)
    return {**found.provenance, "definition": arguments.prototxt, "output": arguments.output,
            "type": arguments.type, "bias": arguments.bias, "calibrated": arguments.calibrate,
            "images": found.images, "processes": found.processes,
            "layers": layers, "spread_before": spread_before, "spread_after": spread_after,
            "changes": found.changes, "notes": found.notes, "output_difference": found.difference,
            "seconds": found.seconds}


def draw(content: Dict[str, Any], path: str) -> None:
    """Draw figure 1 of the paper from what `as_json` returned, in a process of its own.

    Importing matplotlib takes longer than all else that a command without a figure imports.
    Raises ValueError with that process's last line where it fails.
    """
    with tempfile.TemporaryDirectory(prefix="magic_init.") as folder:
        report = os.path.join(folder, "report.json")
        results.write_json(report, content)
        script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "rate_figure.py")
        done = subprocess.run([sys.executable, script, report, path], stderr=subprocess.PIPE,
                              universal_newlines=True, check=False)
    if done.returncode:
        raise ValueError("%s: no figure: %s" % (path, (done.stderr.splitlines() or ["?"])[-1]))
