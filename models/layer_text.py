"""Describe Caffe's layers, and write them as text in Caffe's own order.

A layer is a dictionary of its fields; `definition` writes a list of layers as a network definition.
"""
from typing import Any, Dict, Iterator, List, Optional, Union

Message = Dict[str, Any]  # a message of text format: a list repeats its field, None leaves it out
Layers = List[Message]
Names = Union[str, List[str]]

XAVIER: Message = {"type": "xavier"}
MSRA: Message = {"type": "msra"}
WEIGHTS = {"lr_mult": 1, "decay_mult": 1}
BIASES = {"lr_mult": 2, "decay_mult": 0}
STATISTICS = {"lr_mult": 0, "decay_mult": 0}


class Enum(str):
    """A name that text format writes without quotes: MAX, LMDB, TRAIN."""


class OneLine(dict):
    """A message that is written on one line, as Caffe's own files write shapes."""


def layer(name: str, kind: str, bottom: Names, top: Names = "", **fields: Any) -> Message:
    """Return a layer; its top is called like itself unless another name is given."""
    return {"name": name, "type": kind, "bottom": bottom, "top": top or name, **fields}


def gaussian(std: float) -> Message:
    """Return the filler of normally distributed weights."""
    return {"type": "gaussian", "std": std}


def convolution(name: str, bottom: str, num_output: int, kernel_size: int, stride: int = 1,
                pad: int = 0, group: int = 1, *, weights: Optional[Message],
                bias: Optional[float], kind: str = "Convolution") -> Message:
    """Return a convolution with the filler `weights` and biases that start at `bias`.

    `weights` of None leave the filler out, as many deploy definitions do, and a `bias` of None
    leaves out the biases.  The `kind` "Deconvolution" makes the transposed convolution.
    """
    return layer(name, kind, bottom, param=_multipliers(bias), convolution_param={
        "num_output": num_output,
        "bias_term": False if bias is None else None,
        "pad": pad or None,
        "kernel_size": kernel_size,
        "stride": stride if stride > 1 else None,
        "group": group if group > 1 else None,
        **_fillers(weights, bias)})


def inner_product(name: str, bottom: str, num_output: int, axis: int = 1, *, weights: Message,
                  bias: float) -> Message:
    """Return a fully connected layer with the filler `weights` and biases that start at `bias`."""
    return layer(name, "InnerProduct", bottom, param=_multipliers(bias), inner_product_param={
        "num_output": num_output, **_fillers(weights, bias), "axis": axis if axis != 1 else None})


def relu(name: str, blob: str) -> Message:
    """Return a rectifier, in place."""
    return layer(name, "ReLU", blob, blob)


def dropout(name: str, blob: str, ratio: float) -> Message:
    """Return a dropout of the fraction `ratio`, in place."""
    return layer(name, "Dropout", blob, blob, dropout_param={"dropout_ratio": ratio})


def pooling(name: str, bottom: str, method: str, kernel_size: int, stride: int, pad: int = 0,
            ) -> Message:
    """Return a pooling by `method`, MAX or AVE."""
    return layer(name, "Pooling", bottom, pooling_param={
        "pool": Enum(method), "kernel_size": kernel_size, "stride": stride, "pad": pad or None})


def local_response(name: str, bottom: str) -> Message:
    """Return the local response normalization of Krizhevsky et al. 2012."""
    return layer(name, "LRN", bottom, lrn_param={"local_size": 5, "alpha": 0.0001, "beta": 0.75})


def batch_norm(name: str, scale_name: str, bottom: str, top: str = "") -> Layers:
    """Return a batch normalization and its scale and shift, in place unless it has a `top`.

    BatchNorm's three blobs are statistics of the data, which no solver may change.
    """
    top = top or bottom
    return [
        layer(name, "BatchNorm", bottom, top, param=[STATISTICS, STATISTICS, STATISTICS]),
        layer(scale_name, "Scale", top, top, param=[{"lr_mult": 1, "decay_mult": 0}, BIASES],
              scale_param={"bias_term": True}),
    ]


def accuracy(name: str, scores: str, top_k: Optional[int] = None) -> Message:
    """Return the validation accuracy of `scores`."""
    return layer(name, "Accuracy", [scores, "label"], include={"phase": Enum("TEST")},
                 accuracy_param={"top_k": top_k} if top_k else None)


def imagenet(crop: int, mean: Message, batch: int) -> Layers:
    """Return the layers that read ImageNet: training in batches of `batch`, and validation."""
    return [
        layer("data", "Data", [], ["data", "label"],
              include={"phase": Enum(phase)},
              transform_param={"mirror": phase == "TRAIN", "crop_size": crop, **mean},
              data_param={"source": "examples/imagenet/ilsvrc12_%s_lmdb" % source,
                          "batch_size": size, "backend": Enum("LMDB")})
        for phase, source, size in (("TRAIN", "train", batch), ("TEST", "val", 50))
    ]


def images(height: int, width: int, channels: int = 3) -> Message:
    """Return an input of 10 images."""
    shape = OneLine(dim=[10, channels, height, width])
    return layer("data", "Input", [], input_param=OneLine(shape=shape))


def deploy(layers: Layers, side: int, channels: int = 3) -> Layers:
    """Return `layers` between an input of 10 images of side x side pixels and a softmax."""
    return [
        images(side, side, channels),
        *layers,
        layer("prob", "Softmax", layers[-1]["top"]),
    ]


def definition(name: str, about: str, layers: Layers, writer: str = "models/generate.py") -> str:
    """Return the text of a network definition; `about` becomes comments at its head."""
    head = [*about.splitlines(), "Written by %s: change it there." % writer]
    body = _lines({"name": name, "layer": layers})
    return "\n".join([*("# " + line for line in head), "", *body, ""])


def _multipliers(bias: Optional[float]) -> Layers:
    return [WEIGHTS] if bias is None else [WEIGHTS, BIASES]


def _fillers(weights: Optional[Message], bias: Optional[float]) -> Message:
    return {"weight_filler": weights,
            "bias_filler": None if bias is None else {"type": "constant", "value": bias}}


def _lines(message: Message, indent: str = "") -> Iterator[str]:
    for field, value in message.items():
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, OneLine):
                yield "%s%s { %s }" % (indent, field, " ".join(_lines(item)))
            elif isinstance(item, dict):
                yield "%s%s {" % (indent, field)
                yield from _lines(item, indent + "  ")
                yield indent + "}"
            elif item is not None:
                yield "%s%s: %s" % (indent, field, _literal(item))


def _literal(value: Union[str, float]) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str) and not isinstance(value, Enum):
        return '"%s"' % value
    return str(value)
