"""Build nets that classify into one of many classes from any definition (section 4.5).

What feeds a definition and what scores it is taken off. Every output gets a softmax loss; those
before the last count 0.3 times (Szegedy et al. 2015). The training accuracy is computed beside
them.
"""
from typing import Any, List, NamedTuple, Optional

import numpy as np

from ddinit.prototxt import Input, caffe_messages, image_layers, output_blobs
from training.nets import AFFINE, input_net, needed_for, plain, use_batch_statistics

AUXILIARY_WEIGHT = 0.3
FINAL_LOSS, ACCURACY = "final_loss", "training_accuracy"


class Classifier(NamedTuple):
    """A net without data and losses.

    layers        LayerParameters
    image         the image input
    outputs       blobs of class scores (n, classes); the last one is the answer of the net
    last_layers   names of the layers that compute them
    """
    layers: List[Any]
    image: Input
    outputs: List[str]
    last_layers: List[str]


def error_rate(scores: np.ndarray, labels: np.ndarray) -> float:
    """Return the part of the rows of scores (n, classes, ...) whose maximum is not at the label.

    NaN counts as an error.
    """
    rows = scores.reshape(len(scores), -1)
    of_label = rows[np.arange(len(rows)), labels.reshape(-1).astype(np.int64)]
    return float(1 - np.mean((rows.argmax(1) == labels.reshape(-1)) & np.isfinite(of_label)))


def softmax_loss(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return -log softmax(scores)[label] in float64 for each row of scores (n, classes, ...)."""
    rows = scores.reshape(len(scores), -1).astype(np.float64)
    with np.errstate(invalid="ignore"):  # infinity minus infinity is NaN
        rows -= rows.max(axis=1, keepdims=True)
    of_label = rows[np.arange(len(rows)), labels.reshape(-1).astype(np.int64)]
    return np.log(np.exp(rows).sum(axis=1)) - of_label


def classifier(definition: Any, batch_size: int, classes: int,
               last_std: Optional[float] = None) -> Classifier:
    """Return the net up to its outputs, each with scores for `classes` classes.

    With `last_std`, the layers that compute them start with weights from N(0, last_std^2) and
    biases of 0. Raises ValueError naming an output that no affine layer computes.
    """
    layers, image = image_layers(definition, batch_size)
    assert image is not None  # because we asked for a batch size
    kept = [plain(layer) for layer in layers]
    outputs = output_blobs(kept)
    last_layers = []
    for output in outputs:
        last = [layer for layer in kept if output in layer.top][0]
        if last.type not in AFFINE:
            raise ValueError("Output '%s' is computed by layer '%s' of type %s. A layer with "
                             "weights is needed there, with an output for each class."
                             % (output, last.name, last.type))
        parameters = getattr(last, AFFINE[last.type])
        parameters.num_output = classes
        if last_std is not None:
            for filler, std in ((parameters.weight_filler, last_std), (parameters.bias_filler, 0)):
                filler.Clear()
                filler.type = "gaussian" if std else "constant"  # Caffe refuses a std of 0
                filler.std = std
        last_layers.append(last.name)
    return Classifier(kept, image, outputs, last_layers)


def training_definition(net: Classifier, source: Any) -> Any:
    """Return the NetParameter that trains `net` on a source with tops (images, labels).

    The loss of the last output is called FINAL_LOSS, and its accuracy on the batch ACCURACY.
    """
    label = source.top[1]
    scores = net.outputs[-1]
    losses = [_loss(output, output + "/loss", label, AUXILIARY_WEIGHT)
              for output in net.outputs[:-1]]
    losses.append(_loss(scores, FINAL_LOSS, label, 1.0))
    accuracy = caffe_messages().LayerParameter(name=ACCURACY, type="Accuracy",
                                               bottom=[scores, label], top=[ACCURACY])
    whole = caffe_messages().NetParameter(layer=[source, *net.layers, *losses, accuracy])
    use_batch_statistics(whole)
    return whole


def _loss(scores: str, name: str, label: str, weight: float) -> Any:
    return caffe_messages().LayerParameter(name=name, type="SoftmaxWithLoss",
                                           bottom=[scores, label], top=[name],
                                           loss_weight=[weight])


def validation_definition(net: Classifier) -> Any:
    """Return the NetParameter that computes the last output of images put into its Input."""
    return input_net(needed_for(net.layers, net.outputs[-1]), net.image)
