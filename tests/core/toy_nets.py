"""Toy nets of the tests: from text, with random weights, and random graphs of layers."""
from typing import Any, Dict, List, Tuple

import numpy as np
import scipy.linalg
from google.protobuf import text_format

from ddinit.images import HeldBatches
from ddinit.net import WorkingNet
from ddinit.prototxt import caffe_messages, image_layers, upgrade, working_definition
from ddinit.scales import ScaleGraph, plus

SIZE = 8  # height and width of all blobs of `random_graph`


def parsed(text: str) -> Any:
    """The NetParameter of a prototxt."""
    return text_format.Parse(text, caffe_messages().NetParameter())


def layer(name: str, kind: str, bottoms: str, tops: str = "", parameters: str = "") -> str:
    """The prototxt of a layer; bottoms and tops (by default its name) are words."""
    return "layer { name: '%s' type: '%s' %s %s %s }\n" % (
        name, kind, " ".join("bottom: '%s'" % blob for blob in bottoms.split()),
        " ".join("top: '%s'" % blob for blob in (tops or name).split()), parameters)


def image_input(*shape: int, name: str = "data") -> str:
    """The prototxt of an Input layer."""
    return layer(name, "Input", "", name, "input_param { shape { %s } }" % " ".join(
        "dim: %d" % size for size in shape))


def working_net(text: str, batch_size: int = 2) -> WorkingNet:
    """The net to measure on, with random weights where layers have any."""
    working = net_of(upgrade(parsed(text)), batch_size)
    fill(working)
    return working


def net_of(definition: Any, batch_size: int = 2) -> WorkingNet:
    """The net to measure on of a definition in today's dialect, with no weights yet."""
    layers, image = image_layers(definition, batch_size)
    assert image is not None
    return WorkingNet(working_definition(layers, [image], definition.name), [image])


def fill(working: WorkingNet) -> None:
    """Give all parameters of a net random numbers; variances positive ones."""
    rng = np.random.default_rng(99)
    for one in working.layers:
        for blob in one.blobs:
            blob.data[...] = 0.3 * rng.standard_normal(blob.data.shape)
        if one.type == "BatchNorm":
            _, variance, correction = one.blobs
            variance.data[...] = rng.uniform(0.5, 2, variance.data.shape)
            correction.data[...] = 1


def held_batches(*arrays: np.ndarray, blob: str = "data") -> HeldBatches:
    """Batches (n, channels, height, width) to feed a net with."""
    return HeldBatches([{blob: np.asarray(array, np.float32)} for array in arrays])


def squared_gradients(alone: WorkingNet, images: np.ndarray,
                      draws: int = 0) -> Dict[str, np.ndarray]:
    """The mean over images of E over eta of (d eta z_N / d W)^2, for the weights of each layer.

    That is the sum over outputs of (d z_i / d W)^2: each image and each output has a pass of its
    own, of plain Caffe on a net for one image.  With `draws` so many random eta stand for them.
    """
    totals = {one.name: np.zeros(one.weights.shape) for one in alone.owners()}
    sizes = [alone.blob(name).data.size for name in alone.outputs]
    losses = np.random.default_rng(77).standard_normal((draws, sum(sizes))) if draws else np.eye(
        sum(sizes))
    for image in images:
        alone.blob("data").data[...] = image
        alone.forward()
        for loss in losses:
            for name, part in zip(alone.outputs, np.split(loss, np.cumsum(sizes)[:-1])):
                alone.blob(name).diff.reshape(-1)[...] = part
            alone.backward()
            for one in alone.owners():
                totals[one.name] += one.blobs[0].diff.astype(np.float64) ** 2
    count = len(images) * (draws or 1)
    return {name: total / count for name, total in totals.items()}


def free_scales(graph: ScaleGraph) -> np.ndarray:
    """An orthonormal basis (variables, free) of the log scales that change no output."""
    forms = [form for form, _ in graph.equations] + [
        plus(scaled.weight_scale, scaled.scale_out, -1.0) for scaled in graph.affine]
    matrix = np.array([[form.get(variable, 0.0) for variable in range(graph.variables)]
                       for form in forms])
    return scipy.linalg.null_space(matrix)


def random_graph(seed: int) -> str:
    """The prototxt of a net of a dozen layers on a (2, 3, SIZE, SIZE) input, drawn at random.

    Its layers branch and join, work in place, have groups, and end in several outputs.
    """
    rng = np.random.default_rng(seed)
    text = image_input(2, 3, SIZE, SIZE)
    blobs: Dict[str, int] = {"data": 3}  # channels of what can be read
    fresh: List[str] = ["data"]  # what nothing has read yet: may be changed in place
    for number in range(12):
        name = "l%d" % number
        kind = str(rng.choice(["conv", "conv", "in place", "pool", "concat", "sum", "slice",
                               "fork"]))
        added, made = _random_layer(name, kind, blobs, fresh, rng)
        text += added
        fresh += made
    return text + layer("last", "InnerProduct", list(blobs)[-1], "last",
                        "inner_product_param { num_output: 3 }")


def _random_layer(name: str, kind: str, blobs: Dict[str, int], fresh: List[str],
                  rng: np.random.Generator) -> Tuple[str, List[str]]:
    """A layer's prototxt and the blobs it makes, which are added to `blobs`."""
    bottom = str(rng.choice(list(blobs)))
    if kind == "in place" and fresh:
        bottom = str(rng.choice(fresh))
        types = ["ReLU", "PReLU", "Power", "BatchNorm", "Scale"]
        parameters = {"Power": "power_param { scale: 0.5 }",
                      "Scale": "scale_param { bias_term: true }"}
        drawn = str(rng.choice(types))
        return layer(name, drawn, bottom, bottom, parameters.get(drawn, "")), []
    if kind == "concat":
        other = str(rng.choice(list(blobs)))
        blobs[name] = blobs[bottom] + blobs[other]
        text = layer(name, "Concat", "%s %s" % (bottom, other))
        bottoms = [bottom, other]
    elif kind == "sum":
        others = [blob for blob, count in blobs.items() if count == blobs[bottom]]
        other = str(rng.choice(others))
        blobs[name] = blobs[bottom]
        text = layer(name, "Eltwise", "%s %s" % (bottom, other))
        bottoms = [bottom, other]
    elif kind == "slice" and blobs[bottom] > 1:
        first, second = name + "a", name + "b"
        cut = int(rng.integers(1, blobs[bottom]))
        blobs[first], blobs[second] = cut, blobs[bottom] - cut
        _read([bottom], fresh)
        return layer(name, "Slice", bottom, "%s %s" % (first, second),
                     "slice_param { slice_point: %d }" % cut), [first, second]
    elif kind == "pool":
        blobs[name] = blobs[bottom]
        text = layer(name, *[("Pooling", bottom, name, "pooling_param { kernel_size: 3 pad: 1 }"),
                             ("LRN", bottom, name, "lrn_param { local_size: 3 alpha: 2 }"),
                             ("AbsVal", bottom)][int(rng.integers(3))])
        bottoms = [bottom]
    else:
        groups = 2 if blobs[bottom] % 2 == 0 and rng.random() < 0.5 else 1
        blobs[name] = int(rng.choice([2, 4, 6]))
        text = layer(name, "Convolution", bottom, name, "convolution_param { num_output: %d "
                     "kernel_size: 3 pad: 1 group: %d }" % (blobs[name], groups))
        bottoms = [bottom]
    _read(bottoms, fresh)
    return text, [name]


def _read(bottoms: List[str], fresh: List[str]) -> None:
    fresh[:] = [blob for blob in fresh if blob not in bottoms]
