"""Write one self-contained HTML page about a run: figure 1, the first filters, the layers."""
import base64
import html
import math
import os
import shlex
from typing import Any, Dict, List, Optional, Sequence, Tuple

import cv2
import numpy as np

from ddinit.files import replacing
from ddinit.net import WorkingNet

MOST_FILTERS = 256
WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 560, 300, 52, 84, 14
COLORS = {"before": "#b8860b", "after": "#1f6f8b"}
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; margin: 0 auto; padding: 1em;
  max-width: 72em }
h1 { font-size: 1.35em; margin: .2em 0; overflow-wrap: anywhere } h2 { font-size: 1.08em }
.lead { font-size: 1.1em } .figures { display: flex; flex-wrap: wrap; gap: 1em }
figure { margin: 0; flex: 1 1 20em; min-width: 0 } figcaption { color: #555; font-size: .9em }
svg { width: 100%; height: auto } .filters { image-rendering: pixelated; width: 100%;
  max-width: 34em }
.wide { overflow-x: auto } table { border-collapse: collapse; width: 100%; font-size: .92em }
th, td { padding: .2em .6em; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap }
th:first-child, td:first-child, td.left, th.left { text-align: left }
.bar { display: block; height: .45em; min-width: 1px; border-radius: 2px }
td.bars { min-width: 8em } code, pre { font-size: .88em; background: #f4f4f2; padding: .1em .3em }
pre { white-space: pre-wrap; overflow-wrap: anywhere; padding: .6em }
.key { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .3em }
"""


def write(path: str, content: Dict[str, Any], filters: bytes) -> None:
    """Write the page of a run from what `report.as_json` returned, whole or not at all."""
    title = os.path.basename(content["output"] or content["definition"])
    layers = [layer for layer in content["layers"] if layer["rate_after"] is not None]
    parts = ["<!DOCTYPE html>", '<html lang="en"><head><meta charset="utf-8">',
             '<meta name="viewport" content="width=device-width, initial-scale=1">',
             "<title>%s</title><style>%s</style></head><body>" % (html.escape(title), STYLE),
             "<h1>%s</h1>" % html.escape(title), _lead(content), _legend(content),
             '<div class="figures">',
             _figure("Change rate of each layer (equation 2, figure 1a). A flat line means that "
                     "all layers train at one rate.", layers, "rate", True, content["calibrated"]),
             _figure("Coefficient of variation within each layer (figure 1b). Lower means that a "
                     "layer's weights train more alike.", layers, "variation", False,
                     content["calibrated"]), "</div>"]
    if filters:
        parts += ["<h2>Filters of the first layer</h2>",
                  '<img class="filters" alt="filters of the first layer" '
                  'src="data:image/png;base64,%s">' % base64.b64encode(filters).decode()]
    parts += ["<h2>Layers</h2>", _table(content["layers"], content["calibrated"]),
              _changes(content), _origin(content), "</body></html>\n"]
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write("\n".join(parts))


def filters_png(working: WorkingNet) -> bytes:
    """Return a PNG of the filters of the convolution that reads the images, empty without one.

    Each filter is scaled by its own largest weight; grey is 0.
    """
    fed = {blob for blob, _ in working.inputs}
    first = next((layer for layer in working.layers if layer.type == "Convolution"
                  and layer.bottoms[0] in fed and layer.weights.ndim == 4
                  and layer.weights.shape[1] in (1, 3) and layer.weights.shape[2] > 1), None)
    if first is None:
        return b""
    weights = np.array(first.weights[:MOST_FILTERS])
    count, depth, height, width = weights.shape
    across = math.ceil(math.sqrt(1.6 * count))
    rows = -(-count // across)
    peak = np.abs(weights).max(axis=(1, 2, 3), keepdims=True)
    grey = 127.5 + 127.5 * weights / np.where(peak > 0, peak, 1)
    picture = np.full((rows * (height + 1) + 1, across * (width + 1) + 1, depth), 255, np.uint8)
    for number, filter_ in enumerate(grey):
        y, x = number // across * (height + 1) + 1, number % across * (width + 1) + 1
        picture[y:y + height, x:x + width] = filter_.transpose(1, 2, 0)
    done, encoded = cv2.imencode(".png", picture)
    return bytes(encoded) if done else b""


def _lead(content: Dict[str, Any]) -> str:
    after = "%.4g" % content["spread_after"]
    text = "The largest change rate of a layer is <b>%s</b> times the smallest" % after
    if content["calibrated"]:
        text += ", and was <b>%.4g</b> times before" % content["spread_before"]
    if content["output_difference"] is not None:
        text += ". On images held back the outputs differ from what they were by %.2g of their " \
            "standard deviation" % content["output_difference"]
    return '<p class="lead">%s. Seen: %d images.</p>' % (text, content["images"])


def _legend(content: Dict[str, Any]) -> str:
    names = ("before", "after") if content["calibrated"] else ("after",)
    labels = {"before": "before the step between layers", "after": "after it"
              if content["calibrated"] else "this net"}
    return "<p>%s</p>" % " &nbsp; ".join(
        '<span class="key" style="background:%s"></span>%s' % (COLORS[name], labels[name])
        for name in names)


def _figure(caption: str, layers: Sequence[Dict[str, Any]], key: str, logarithmic: bool,
            both: bool) -> str:
    """Return a plot of a quantity by layer, before and after, as an SVG figure."""
    names = ["before", "after"] if both else ["after"]
    series = {name: [_finite(layer["%s_%s" % (key, name)], logarithmic) for layer in layers]
              for name in names}
    values = [value for line in series.values() for value in line if value is not None]
    if not values:
        return ""
    low, high, ticks = _axis(values, logarithmic)

    def x(number: int) -> float:
        return LEFT + (number + 0.5) * (WIDTH - LEFT) / len(layers)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - BOTTOM - TOP)
    drawn = ['<svg viewBox="0 0 %d %d" role="img">' % (WIDTH, HEIGHT)]
    for tick in ticks:
        drawn.append('<line x1="%d" x2="%d" y1="%.1f" y2="%.1f" stroke="#ddd"/><text x="%d" '
                     'y="%.1f" font-size="11" text-anchor="end" fill="#555">%s</text>' % (
                         LEFT, WIDTH, y(tick), y(tick), LEFT - 5, y(tick) + 4,
                         _number(10 ** tick if logarithmic else tick)))
    step = -(-len(layers) // 40)
    for number, layer in list(enumerate(layers))[::step]:
        drawn.append('<text font-size="11" fill="#444" text-anchor="end" transform="translate('
                     '%.1f %d) rotate(-45)">%s</text>' % (
                         x(number) + 4, HEIGHT - BOTTOM + 14, html.escape(layer["name"][-22:])))
    for name, line in series.items():
        points = [(x(number), y(value)) for number, value in enumerate(line) if value is not None]
        drawn.append('<polyline fill="none" stroke="%s" stroke-width="2" points="%s"/>' % (
            COLORS[name], " ".join("%.1f,%.1f" % point for point in points)))
        drawn += ['<circle cx="%.1f" cy="%.1f" r="3" fill="%s"/>' % (*point, COLORS[name])
                  for point in points]
    return "<figure>%s</svg><figcaption>%s</figcaption></figure>" % ("".join(drawn), caption)


def _axis(values: Sequence[float], logarithmic: bool) -> Tuple[float, float, List[float]]:
    """Return the ends of an axis and its ticks; a logarithmic one counts in powers of ten."""
    if logarithmic:
        least, most = math.floor(min(values)), math.ceil(max(values) + 1e-9)
        ticks = range(least, most + 1, -(-(most - least) // 8))
        return least, most, [float(tick) for tick in ticks]
    high = max(max(values) * 1.05, 1e-3)
    power = 10.0 ** math.floor(math.log10(high))
    step = next(power * factor for factor in (0.1, 0.2, 0.5, 1, 2, 5)
                if high / (power * factor) <= 6)
    return 0.0, high, [step * number for number in range(int(high / step) + 1)]


def _finite(value: Optional[float], logarithmic: bool) -> Optional[float]:
    """Return the place of a value on its axis, None where it has none."""
    if value is None or not math.isfinite(value) or (logarithmic and value <= 0):
        return None
    return math.log10(value) if logarithmic else value


def _table(layers: Sequence[Dict[str, Any]], both: bool) -> str:
    names = ["before", "after"] if both else ["after"]
    places = [_finite(layer["rate_" + name], True) for layer in layers for name in names]
    rates = [place for place in places if place is not None]
    low, high = (min(rates) - 0.3, max(rates) + 0.01) if rates else (0.0, 1.0)
    heads = ["layer", "type", "weights from", "weights", "output mean", "output std",
             *["rate " + name for name in names], "", "variation"]
    rows = ["<tr>%s</tr>" % "".join("<th%s>%s</th>" % (
        ' class="left"' if number < 3 else "", head) for number, head in enumerate(heads))]
    for layer in layers:
        cells = ['<td class="left">%s</td>' % html.escape(layer[key])
                 for key in ("name", "type", "weights")]
        cells += ["<td>%s</td>" % "{:,}".format(layer["size"])]
        cells += ["<td>%s</td>" % _number(layer[key]) for key in (
            "mean", "std", *["rate_" + name for name in names])]
        bars = "".join('<span class="bar" style="width:%.1f%%;background:%s"></span>' % (
            100 * (place - low) / (high - low), COLORS[name]) for name in names
            for place in [_finite(layer["rate_" + name], True)] if place is not None)
        cells += ['<td class="bars">%s</td>' % bars,
                  "<td>%s</td>" % _number(layer["variation_after"])]
        rows.append("<tr>%s</tr>" % "".join(cells))
    return '<div class="wide"><table>%s</table></div><p>Bars are logarithmic.</p>' % "".join(rows)


def _number(value: Optional[float]) -> str:
    """Return a number with three digits, and all of those before the point below a million."""
    if value is None or not math.isfinite(value):
        return ""
    return "{:,.0f}".format(value) if 1000 <= abs(value) < 1e6 else "%.3g" % value


def _changes(content: Dict[str, Any]) -> str:
    lines = content["changes"] + content["notes"]
    if not lines:
        return "<p>The definition stays as it is.</p>"
    heading = "What changed in the definition" if content["changes"] else "Notes"
    return "<h2>%s</h2><ul>%s</ul>" % (heading, "".join(
        "<li>%s</li>" % html.escape(line) for line in lines))


def _origin(content: Dict[str, Any]) -> str:
    command = " ".join(map(shlex.quote, content["command"]))
    versions = ", ".join("%s %s" % pair for pair in content["versions"].items())
    seconds = ", ".join("%s %.1f s" % pair for pair in content["seconds"].items())
    return ("<h2>How to repeat it</h2><pre>%s</pre><p>Seed %s; %s.</p><p>Time: %s.</p>"
            % (html.escape(command), content["seed"], html.escape(versions), html.escape(seconds)))
