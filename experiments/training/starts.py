"""Make the weights that trainings start from: what fillers draw, and the definition of a file."""
from typing import Any, Sequence

from ddinit.caffemodel import definition_beside
from ddinit.prototxt import build_net, image_layers, import_caffe, read_definition
from training.nets import AFFINE, input_net, plain

FILLED = ("gaussian", "reference", "xavier", "msra")
GAUSSIAN_STD = 0.01  # of figure 1's random weights


def definition_of(net: str, weights: str) -> str:
    """Return the definition that was written with `weights`, or `net` where there is none.

    magic_init.py writes one where scaling between layers has to change the definition.
    """
    return definition_beside(weights) or net


def write_filled(net: str, output: str, method: str, seed: int) -> None:
    """Write the weights that Caffe's fillers draw for a method of FILLED.

    It has to run in a child process.
    """
    layers, image = image_layers(read_definition(net), 1)
    assert image is not None  # because we asked for a batch of 1
    whole = input_net([plain(layer) for layer in layers], image)
    for layer in whole.layer:
        if method != "reference" and layer.type in AFFINE:
            _set_fillers(getattr(layer, AFFINE[layer.type]), layer.type, method)
    check_filled(whole, [layer.name for layer in whole.layer])
    import_caffe().set_random_seed(seed)
    build_net(whole).save(output)


def check_filled(net: Any, names: Sequence[str]) -> None:
    """Raise ValueError naming the first layer of `names` whose weights nothing sets.

    Caffe would leave them 0, which no training leaves again.
    """
    for layer in net.layer:
        parameters = {"Convolution": layer.convolution_param,
                      "InnerProduct": layer.inner_product_param}.get(layer.type)
        if parameters is not None and layer.name in names \
                and not parameters.HasField("weight_filler"):
            raise ValueError("layer '%s': neither the weights nor a weight_filler of the "
                             "definition set it" % layer.name)


def _set_fillers(parameters: Any, kind: str, method: str) -> None:
    parameters.ClearField("bias_filler")
    parameters.ClearField("weight_filler")
    if method == "gaussian" or (method == "msra" and kind == "InnerProduct"):
        parameters.weight_filler.type = "gaussian"
        parameters.weight_filler.std = GAUSSIAN_STD
    else:
        parameters.weight_filler.type = method
