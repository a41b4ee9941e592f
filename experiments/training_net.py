"""Nets to train and to test, made from any deploy or train_val definition (paper, section 4).

What feeds a definition and what scores it is taken off; a data source and a loss for the task are
put on.  Of several outputs the last is kept, so that a GoogLeNet trains without its intermediate
losses (section 4.4).

    PYTHONPATH=experiments python -c "import definitions as d, training_net as t; \\
        print(t.classifier(d.read_definition('models/googlenet/deploy.prototxt'), 10, 20).layer)"
"""
import json
import tempfile
from typing import Any, Dict, List, NamedTuple, Sequence, Set

import numpy as np

from ddinit.prototxt import Input, caffe_messages, image_layers, import_caffe, output_blobs
from image_batches import Crops

SUFFIX = "_voc"  # of the last layer's name, so that no caffemodel of another task fits it
AFFINE = {"Convolution": "convolution_param", "Deconvolution": "convolution_param",
          "InnerProduct": "inner_product_param"}
# Of the new last layer, as in the author's released evaluation.
WEIGHT_STD = 0.01
BIAS = 0.1

BATCH_PROBE = """
layer { name: "x" type: "Input" top: "x" input_param { shape { dim: 2 dim: 1 dim: 1 dim: 1 } } }
layer { name: "y" type: "BatchNorm" bottom: "x" top: "y" }
"""


class Classifier(NamedTuple):
    """A net without data and loss: its layers, the image input, the blob of class scores (n,
    classes) and the name of the layer that computes them."""
    layers: List[Any]
    image: Input
    scores: str
    layer: str


def classifier(definition: Any, batch_size: int, classes: int) -> Classifier:
    """Return the net up to its last output, with a new last layer of `classes` outputs.

    The new layer has the old one's name and SUFFIX; a layer that has it already keeps its name.
    Raises ValueError where the net does not take colour images or has no affine layer.
    """
    layers, image = image_layers(definition, batch_size)
    if image is None or image.shape[1] != 3:
        raise ValueError("the net's input '%s' has 1 channel, photographs have 3"
                         % (image.blob if image else ""))
    scores = output_blobs(layers)[-1]
    kept = [plain(layer) for layer in needed_for(layers, scores)]
    affine = [layer for layer in kept if layer.type in AFFINE]
    if not affine:
        raise ValueError("the net has no layer with weights before '%s'" % scores)
    _make_last(affine[-1], classes)
    return Classifier(kept, image, scores, affine[-1].name)


def training_net(net: Classifier, source: Any) -> Any:
    """Return the NetParameter that trains `net` on a source with tops (images, labels).

    The loss is the sum over classes of the sigmoid cross-entropy, averaged over the images; labels
    are 1 and 0, and -1 where they do not count.
    """
    loss = caffe_messages().LayerParameter(name="loss", type="SigmoidCrossEntropyLoss",
                                           bottom=[net.scores, source.top[1]], top=["loss"])
    loss.loss_param.ignore_label = -1
    loss.loss_param.normalization = caffe_messages().LossParameter.BATCH_SIZE
    whole = caffe_messages().NetParameter(layer=[source, *net.layers, loss])
    for layer in whole.layer:
        if layer.type == "BatchNorm":  # the batch's own statistics, whatever a deploy file says
            layer.batch_norm_param.ClearField("use_global_stats")
    return whole


def image_source_layer(name: str, tops: Sequence[str], dataset: str, arguments: Dict[str, Any],
                       crops: Crops, batch_size: int, seed: int, workers: int,
                       broken_limit: int = 10) -> Any:
    """Return the LayerParameter of an ImageSource; `dataset` is `module.Class`."""
    settings = {"dataset": dataset, "arguments": arguments,
                "crops": {**crops._asdict(), "mean": list(crops.mean)}, "batch_size": batch_size,
                "seed": seed, "workers": workers, "broken_limit": broken_limit}
    layer = caffe_messages().LayerParameter(name=name, type="Python", top=list(tops))
    layer.python_param.module = "image_source"
    layer.python_param.layer = "ImageSource"
    layer.python_param.param_str = json.dumps(settings)
    return layer


def test_net(net: Classifier) -> Any:
    """Return the NetParameter that computes `net.scores` of images put into its Input."""
    return input_net(net.layers, net.image)


def input_net(layers: Sequence[Any], image: Input) -> Any:
    """Return the NetParameter of `layers` with images put into an Input."""
    source = caffe_messages().LayerParameter(name=image.blob, type="Input", top=[image.blob])
    source.input_param.shape.add(dim=image.shape)
    return caffe_messages().NetParameter(layer=[source, *layers])


def layers_from(net: Classifier, name: str) -> List[str]:
    """Return the names of the layer `name` of a net and all after it.

    Raises ValueError where there is none.
    """
    names = [layer.name for layer in net.layers]
    if name not in names:
        raise ValueError("the net has no layer '%s', it has %s" % (name, ", ".join(names)))
    return names[names.index(name):]


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
    """Return a copy of a layer without rules of phase, which have done their work."""
    copy = caffe_messages().LayerParameter()
    copy.CopyFrom(layer)
    for field in ("include", "exclude", "phase"):
        copy.ClearField(field)
    return copy


def _make_last(layer: Any, classes: int) -> None:
    """Make an affine layer one for `classes` classes, filled afresh."""
    if not layer.name.endswith(SUFFIX):
        layer.name += SUFFIX
    for parameter in layer.param:
        parameter.ClearField("name")  # shared weights would keep their old shape
    parameters = getattr(layer, AFFINE[layer.type])
    parameters.num_output = classes
    if layer.type != "InnerProduct":
        parameters.ClearField("group")
    for field in ("weight_filler", "bias_filler"):
        parameters.ClearField(field)
    parameters.weight_filler.type = "gaussian"
    parameters.weight_filler.std = WEIGHT_STD
    parameters.bias_filler.type = "constant"
    parameters.bias_filler.value = BIAS


# ---------------------------------------------------------------------------------------------
# BatchNorm
# ---------------------------------------------------------------------------------------------

def repaired(net: Any) -> Any:
    """Return `net`, its BatchNorm layers replaced where this Caffe's do not see their batch.

    Layers with `use_global_stats: true` are meant not to, and stay.
    """
    if all(layer.type != "BatchNorm" for layer in net.layer) or sees_its_batch():
        return net
    changed = caffe_messages().NetParameter()
    changed.CopyFrom(net)
    for layer in changed.layer:
        if layer.type == "BatchNorm" and not layer.batch_norm_param.use_global_stats:
            _see_batch(layer)
    return changed


def sees_its_batch() -> bool:
    """Whether this Caffe's BatchNorm normalises by its batch in training: -1, 1 stays -1, 1."""
    with tempfile.NamedTemporaryFile("w", suffix=".prototxt") as file:
        file.write(BATCH_PROBE)
        file.flush()
        net = import_caffe().Net(file.name, import_caffe().TRAIN)
    net.blobs["x"].data[...] = np.reshape([2.0, 4.0], (2, 1, 1, 1))
    net.forward()
    return bool(np.allclose(net.blobs["y"].data.ravel(), [-1, 1], atol=1e-3))


def _see_batch(layer: Any) -> None:
    parameters = layer.batch_norm_param
    layer.type = "Python"
    layer.python_param.module = "batch_statistics"
    layer.python_param.layer = "BatchStatistics"
    layer.python_param.param_str = json.dumps({
        "eps": parameters.eps, "moving_average_fraction": parameters.moving_average_fraction})
    layer.ClearField("batch_norm_param")
    del layer.param[:]
    for _ in range(3):  # sums are no weights to learn
        layer.param.add(lr_mult=0, decay_mult=0)
