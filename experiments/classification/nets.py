"""Build the nets of PASCAL VOC classification from any classification net (section 4.1).

What feeds a definition and what scores it is taken off; an image source and a sigmoid
cross-entropy loss are put on. Of several outputs the last is kept, so that GoogLeNet trains
without its intermediate losses (section 4.4).
"""
from typing import Any, List, NamedTuple

from ddinit.prototxt import Input, caffe_messages, image_layers, output_blobs
from training.nets import AFFINE, input_net, needed_for, plain, use_batch_statistics

SUFFIX = "_voc"  # of the last layer's name, so that no caffemodel of another task fits it
# Of the new last layer, as in the author's released evaluation.
WEIGHT_STD = 0.01
BIAS = 0.1


class Classifier(NamedTuple):
    """A net without data and loss.

    layers   LayerParameters
    image    the image input
    scores   blob of class scores (n, classes)
    layer    name of the layer that computes them
    """
    layers: List[Any]
    image: Input
    scores: str
    layer: str


def classifier(definition: Any, batch_size: int, classes: int) -> Classifier:
    """Return the net up to its last output, with a new last layer of `classes` outputs.

    The new layer has the old name followed by SUFFIX; a layer that has it already keeps its name.
    Raises ValueError where the net does not take color images or has no affine layer.
    """
    layers, image = image_layers(definition, batch_size)
    if image is None or image.shape[1] != 3:
        raise ValueError("The net's input '%s' has 1 channel; photographs have 3."
                         % (image.blob if image else ""))
    scores = output_blobs(layers)[-1]
    kept = [plain(layer) for layer in needed_for(layers, scores)]
    affine = [layer for layer in kept if layer.type in AFFINE]
    if not affine:
        raise ValueError("The net has no layer with weights before '%s'." % scores)
    _make_last(affine[-1], classes)
    return Classifier(kept, image, scores, affine[-1].name)


def training_net(net: Classifier, source: Any) -> Any:
    """Return the NetParameter that trains `net` on a source with tops (images, labels).

    The loss is the sum over classes of the sigmoid cross-entropy, averaged over the images. Labels
    are 1 and 0, and -1 where they do not count.
    """
    loss = caffe_messages().LayerParameter(name="loss", type="SigmoidCrossEntropyLoss",
                                           bottom=[net.scores, source.top[1]], top=["loss"])
    loss.loss_param.ignore_label = -1
    loss.loss_param.normalization = caffe_messages().LossParameter.BATCH_SIZE
    whole = caffe_messages().NetParameter(layer=[source, *net.layers, loss])
    use_batch_statistics(whole)
    return whole


def test_net(net: Classifier) -> Any:
    """Return the NetParameter that computes `net.scores` of images put into its Input."""
    return input_net(net.layers, net.image)


def layers_from(net: Classifier, name: str) -> List[str]:
    """Return the names of the layer `name` of a net and of all layers after it.

    Raises ValueError where there is none.
    """
    names = [layer.name for layer in net.layers]
    if name not in names:
        raise ValueError("The net has no layer '%s'; it has %s." % (name, ", ".join(names)))
    return names[names.index(name):]


def _make_last(layer: Any, classes: int) -> None:
    """Give an affine layer `classes` outputs and fillers of its own."""
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
