"""Nets that classify into one of many classes, made from any definition (paper, section 4.5).

What feeds a definition and what scores it is taken off; a softmax loss is put on every output,
those before the last counting 0.3 times (Szegedy et al. 2015), and the training error beside it.

    PYTHONPATH=experiments python -c "import definitions as d, imagenet_net as n; \\
        print(n.classifier(d.read_definition('models/googlenet/deploy.prototxt'), 32, 9).outputs)"
"""
from typing import Any, List, NamedTuple

import numpy as np

import training_net
from ddinit.prototxt import Input, caffe_messages, image_layers, output_blobs

AUXILIARY_WEIGHT = 0.3
FINAL_LOSS, ERROR = "final_loss", "training_error"
# The training loop logs what has a loss weight.  This one changes no float of the loss.
LOGGED_ONLY = 1e-30


class Classifier(NamedTuple):
    """A net without data and losses: its layers, the image input, the blobs of class scores (n,
    classes), the last of which is the net's answer, and the layers that compute them."""
    layers: List[Any]
    image: Input
    outputs: List[str]
    last_layers: List[str]


def error_rate(scores: np.ndarray, labels: np.ndarray) -> float:
    """Return the fraction of rows of scores (n, classes, ...) whose maximum is not the label's.

    NaN counts as wrong.
    """
    rows = scores.reshape(len(scores), -1)
    own = rows[np.arange(len(rows)), labels.reshape(-1).astype(np.int64)]
    return float(1 - np.mean((rows.argmax(1) == labels.reshape(-1)) & np.isfinite(own)))


def softmax_loss(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return -log softmax(scores)[label] in float64 for every row of scores (n, classes, ...)."""
    rows = scores.reshape(len(scores), -1).astype(np.float64)
    with np.errstate(invalid="ignore"):  # infinity minus infinity is NaN, as it should be
        rows -= rows.max(axis=1, keepdims=True)
    own = rows[np.arange(len(rows)), labels.reshape(-1).astype(np.int64)]
    return np.log(np.exp(rows).sum(axis=1)) - own


def classifier(definition: Any, batch_size: int, classes: int, zero_last: bool = False,
               ) -> Classifier:
    """Return the net up to its outputs, each with scores for `classes` classes.

    `zero_last` makes the layers that compute them start at 0 (section 4.5).
    Raises ValueError naming an output that no layer with weights computes.
    """
    layers, image = image_layers(definition, batch_size)
    assert image is not None  # it is, where a batch size is given
    kept = [training_net.plain(layer) for layer in layers]
    outputs = output_blobs(kept)
    last_layers = []
    for output in outputs:
        last = [layer for layer in kept if output in layer.top][0]
        if last.type not in training_net.AFFINE:
            raise ValueError("output '%s' comes from layer '%s' of type %s, which has no scores "
                             "for classes" % (output, last.name, last.type))
        parameters = getattr(last, training_net.AFFINE[last.type])
        parameters.num_output = classes
        if zero_last:
            for filler in (parameters.weight_filler, parameters.bias_filler):
                filler.Clear()
                filler.type, filler.value = "constant", 0
        last_layers.append(last.name)
    return Classifier(kept, image, outputs, last_layers)


def training_definition(net: Classifier, source: Any) -> Any:
    """Return the NetParameter that trains `net` on a source with tops (images, labels).

    It tells the last output's loss as FINAL_LOSS and its error on the batch as ERROR.
    """
    label = source.top[1]
    scores = net.outputs[-1]
    losses = [_loss(output, output + "/loss", label, AUXILIARY_WEIGHT)
              for output in net.outputs[:-1]]
    losses.append(_loss(scores, FINAL_LOSS, label, 1.0))
    error = caffe_messages().LayerParameter(name=ERROR, type="Python", bottom=[scores, label],
                                            top=[ERROR], loss_weight=[LOGGED_ONLY])
    error.python_param.module, error.python_param.layer = "top_one_error", "TopOneError"
    whole = caffe_messages().NetParameter(layer=[source, *net.layers, *losses, error])
    for layer in whole.layer:
        if layer.type == "BatchNorm":  # the batch's own statistics, whatever a deploy file says
            layer.batch_norm_param.ClearField("use_global_stats")
    return whole


def _loss(scores: str, name: str, label: str, weight: float) -> Any:
    return caffe_messages().LayerParameter(name=name, type="SoftmaxWithLoss",
                                           bottom=[scores, label], top=[name],
                                           loss_weight=[weight])


def validation_definition(net: Classifier) -> Any:
    """Return the NetParameter that computes the last output of images put into its Input."""
    return training_net.input_net(training_net.needed_for(net.layers, net.outputs[-1]), net.image)
