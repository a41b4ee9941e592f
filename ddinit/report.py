"""Show what a run has done: the table of layers, the JSON report, the page and figure 1."""
import argparse
from typing import Any, Dict, List, NamedTuple, Optional

from ddinit import page, results
from ddinit.change_rates import spread


class LayerRecord(NamedTuple):
    """What was done to one layer, and its output in the net that is written."""
    name: str
    type: str
    weights: str
    size: int
    mean: float
    std: float
    dead: int


class Result(NamedTuple):
    """What the child process has found, for the parent to show and write.

    Rates and variations are by layer.  `definition` is the text of the changed definition, None
    where it stays as it is; `difference` compares the outputs of the net before and after, over
    their std, on images held back.  `filters` is a PNG of the first convolution's.
    """
    records: List[LayerRecord]
    rates_before: Dict[str, float]
    rates_after: Dict[str, float]
    variations_before: Dict[str, float]
    variations_after: Dict[str, float]
    images: int
    notes: List[str]
    changes: List[str]
    definition: Optional[str]
    difference: Optional[float]
    seconds: Dict[str, float]
    filters: bytes
    provenance: Dict[str, Any]


def table(found: Result) -> List[str]:
    """Return the lines of the change-rate table: what layers got, and equation 2's rates."""
    width = max([len(record.name) for record in found.records] + [5])
    kinds = max([len(record.weights) for record in found.records] + [7])
    form = "%%-%ds  %%-%ds %%9s %%9s %%11s %%11s %%9s" % (width, kinds)
    lines = [form % ("layer", "weights", "mean", "std", "rate before", "rate after", "variation")]
    for record in found.records:
        cells = ["%.3g" % number for number in (record.mean, record.std)]
        cells += ["%.4g" % rates[record.name] if record.name in rates else ""
                  for rates in (found.rates_before, found.rates_after)]
        lines.append(form % (record.name, record.weights, *cells,
                             "%.3g" % found.variations_after[record.name]
                             if record.name in found.variations_after else ""))
    lines.append("largest over smallest rate: %.4g before, %.4g after"
                 % (spread(found.rates_before), spread(found.rates_after)))
    return lines


def as_json(found: Result, arguments: argparse.Namespace) -> Dict[str, Any]:
    """Return everything that was measured, and what is needed to measure it again."""
    layers = []
    for record in found.records:
        layer = record._asdict()
        for key, before, after in (("rate", found.rates_before, found.rates_after),
                                   ("variation", found.variations_before, found.variations_after)):
            layer[key + "_before"] = before.get(record.name)
            layer[key + "_after"] = after.get(record.name)
        layers.append(layer)
    return {**found.provenance, "definition": arguments.prototxt, "output": arguments.output,
            "type": arguments.type, "bias": arguments.bias, "calibrated": arguments.calibrate,
            "images": found.images, "layers": layers,
            "spread_before": spread(found.rates_before), "spread_after": spread(found.rates_after),
            "changes": found.changes, "notes": found.notes, "output_difference": found.difference,
            "seconds": found.seconds}


def write(path: str, content: Dict[str, Any], filters: bytes) -> None:
    """Write what `as_json` returned: as a page where the name ends in .html, otherwise as JSON."""
    if path.endswith((".html", ".htm")):
        page.write(path, content, filters)
    else:
        results.write_json(path, content)
