"""Build nets to train and to test from the layers of any deploy or train_val definition."""
import json
import tempfile
from typing import Any, Dict, List, Sequence, Set

import numpy as np

from ddinit.prototxt import Input, caffe_messages, import_caffe
from training.batches import Crops

AFFINE = {"Convolution": "convolution_param", "Deconvolution": "convolution_param",
          "InnerProduct": "inner_product_param"}

BATCH_PROBE = """
layer { name: "x" type: "Input" top: "x" input_param { shape { dim: 2 dim: 1 dim: 1 dim: 1 } } }
layer { name: "y" type: "BatchNorm" bottom: "x" top: "y" }
"""


def image_source_layer(name: str, tops: Sequence[str], dataset: str, arguments: Dict[str, Any],
                       crops: Crops, batch_size: int, seed: int, workers: int,
                       broken_limit: int = 10) -> Any:
    """Return the LayerParameter of an ImageSource.

    `dataset` is `module.Class` and `arguments` are what the class is called with; the other
    parameters are those of `batches.ImageBatches` and `prefetch.Prefetcher`.
    """
    settings = {"dataset": dataset, "arguments": arguments,
                "crops": {**crops._asdict(), "mean": list(crops.mean)}, "batch_size": batch_size,
                "seed": seed, "workers": workers, "broken_limit": broken_limit}
    layer = caffe_messages().LayerParameter(name=name, type="Python", top=list(tops))
    layer.python_param.module = "training.image_source"
    layer.python_param.layer = "ImageSource"
    layer.python_param.param_str = json.dumps(settings)
    return layer


def input_net(layers: Sequence[Any], image: Input) -> Any:
    """Return the NetParameter of `layers` whose images are put into an Input layer."""
    source = caffe_messages().LayerParameter(name=image.blob, type="Input", top=[image.blob])
    source.input_param.shape.add(dim=image.shape)
    return caffe_messages().NetParameter(layer=[source, *layers])


def needed_for(layers: Sequence[Any], blob: str) -> List[Any]:
    """Return those of `layers` that `blob` is computed from, in their order."""
    needed: Set[str] = {blob}
    kept = []
    for layer in reversed(layers):
        if needed.intersection(layer.top):
            kept.append(layer)
            needed.update(layer.bottom)
    return kept[::-1]


def plain(layer: Any) -> Any:
    """Return a copy of a layer that is there in training and in testing."""
    copy = caffe_messages().LayerParameter()
    copy.CopyFrom(layer)
    for field in ("include", "exclude", "phase"):
        copy.ClearField(field)
    return copy


def use_batch_statistics(net: Any) -> None:
    """Let the BatchNorm layers of a NetParameter decide by the phase: a deploy file fixes them."""
    for layer in net.layer:
        if layer.type == "BatchNorm":
            layer.batch_norm_param.ClearField("use_global_stats")


def repaired(net: Any) -> Any:
    """Return `net` with working BatchNorm layers, where those of this Caffe ignore the batch.

    A Python layer of the same function replaces them. Layers with `use_global_stats: true` are
    meant to ignore the batch and stay.
    """
    if all(layer.type != "BatchNorm" for layer in net.layer) or normalizes_by_batch():
        return net
    changed = caffe_messages().NetParameter()
    changed.CopyFrom(net)
    for layer in changed.layer:
        if layer.type == "BatchNorm" and not layer.batch_norm_param.use_global_stats:
            _replace(layer)
    return changed


def normalizes_by_batch() -> bool:
    """Return whether the BatchNorm of this Caffe maps a batch of 2 and 4 to -1 and 1."""
    with tempfile.NamedTemporaryFile("w", suffix=".prototxt") as file:
        file.write(BATCH_PROBE)
        file.flush()
        net = import_caffe().Net(file.name, import_caffe().TRAIN)
    net.blobs["x"].data[...] = np.reshape([2.0, 4.0], (2, 1, 1, 1))
    net.forward()
    return bool(np.allclose(net.blobs["y"].data.ravel(), [-1, 1], atol=1e-3))


def _replace(layer: Any) -> None:
    parameters = layer.batch_norm_param
    layer.type = "Python"
    layer.python_param.module = "training.batch_statistics"
    layer.python_param.layer = "BatchStatistics"
    layer.python_param.param_str = json.dumps({
        "eps": parameters.eps, "moving_average_fraction": parameters.moving_average_fraction})
    layer.ClearField("batch_norm_param")
    del layer.param[:]
    for _ in range(3):  # running sums are not learned
        layer.param.add(lr_mult=0, decay_mult=0)
