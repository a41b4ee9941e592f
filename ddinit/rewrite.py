"""Rewrite the definition of a rescaled net so that it computes what it did before (paper, 3.2)."""
from typing import Any, Dict, List

import numpy as np

from ddinit.between import Solution, value
from ddinit.prototxt import blob_and_layer_names, rename_blob, unused
from ddinit.scales import ScaleGraph, plus


def rewritten(definition: Any, graph: ScaleGraph, solution: Solution) -> Any:
    """Return a copy of a definition that computes with the rescaled weights what it did before.

    Returns also what was changed and why, a line each: none where it may stay as it is.
    """
    copy = type(definition)()
    copy.CopyFrom(definition)
    changes = []
    log_scales = solution.log_scales
    for layer in copy.layer:
        form = graph.adjusted.get(layer.name)
        scale = np.exp(value(form, log_scales)) if form is not None else 1.0
        if abs(scale - 1) < 1e-6:
            continue
        if layer.type == "LRN":
            old = layer.lrn_param.alpha
            new = layer.lrn_param.alpha = old / scale ** 2
            changes.append("layer '%s': LRN alpha %.6g -> %.6g, because its input is %.6g times "
                           "what it was" % (layer.name, old, new, scale))
        elif layer.type == "BatchNorm":
            old = layer.batch_norm_param.eps
            new = layer.batch_norm_param.eps = old * scale ** 2
            changes.append("layer '%s': BatchNorm eps %.6g -> %.6g, because its input is %.6g "
                           "times what it was" % (layer.name, old, new, scale))
    for scaled in graph.affine:
        if scaled.layer.name in solution.auxiliary:
            scale = np.exp(value(plus(scaled.scale_out, scaled.weight_scale, -1.0), log_scales))
            changes += _add_power(copy, scaled.layer.name, float(scale))
    return copy, changes


def _add_power(definition: Any, name: str, scale: float) -> List[str]:
    """Put a Power layer behind the layer `name`; its tops keep their names above it."""
    layers = list(definition.layer)
    position = next(number for number, layer in enumerate(layers) if layer.name == name)
    taken = blob_and_layer_names(layers)
    powers = []
    for top in list(layers[position].top):
        below = unused(top + "_unscaled", taken)
        rename_blob(layers[:position + 1], top, below)  # in-place layers share it
        power = type(layers[position])(name=unused(name + "_rescale", taken), type="Power",
                                       bottom=[below], top=[top])
        power.power_param.scale = scale
        powers.append(power)
    changed = layers[:position + 1] + powers + layers[position + 1:]
    copies = [type(layer).FromString(layer.SerializeToString()) for layer in changed]
    definition.ClearField("layer")
    definition.layer.extend(copies)
    return ["layer '%s': a new Power layer '%s' behind it multiplies by %.6g, so that its weights "
            "can have the scale that gives them their rate" % (name, power.name, scale)
            for power in powers]


def worst_difference(expected: Dict[str, np.ndarray], found: Dict[str, np.ndarray]) -> float:
    """Return the largest difference of output blobs, each over the std of the expected one."""
    worst = 0.0
    for name, blob in expected.items():
        difference = float(np.abs(found[name] - blob).max())
        std = float(blob.std())
        relative = difference / std if std > 0 else (0.0 if difference == 0 else np.inf)
        worst = float(np.maximum(worst, relative))  # NaN stays
    return worst
