"""Weights into nets, checked before Caffe, which aborts on shapes that differ.

    left = load_weights(caffe_net, "caffenet.caffemodel", fresh=["fc8"])

    python magic_init.py models/caffenet_tiny/deploy.prototxt new.caffemodel -d 'photos/*' \\
        --load old.caffemodel
"""
from typing import Any, List, Sequence, Tuple

from ddinit import caffemodel


def load_weights(net: Any, path: str, fresh: Sequence[str] = ()) -> List[str]:
    """Copy a caffemodel into a caffe.Net by layer name; return the net's layers left as they are.

    Layers in `fresh` are left.  Raises ValueError naming the layer and both shapes where they
    differ, and where no layer of the file is in the net.
    """
    stored = caffemodel.read(path)
    loaded = [name for name in net.params if name in stored and name not in fresh]
    if not loaded:
        raise ValueError("%s: none of its layers (%s...) is one of the net's (%s...)"
                         % (path, ", ".join(list(stored)[:3]), ", ".join(list(net.params)[:3])))
    for name in loaded:
        wanted = [tuple(blob.shape) for blob in net.params[name]]
        shapes = [blob.shape for blob in stored[name]]
        if [_plain_shape(shape) for shape in shapes] != [_plain_shape(s) for s in wanted]:
            raise ValueError("%s: layer '%s' has weights of shape %s, the net wants %s" % (
                path, name, _shapes(shapes), _shapes(wanted)))
    for name in loaded:
        for blob, numbers in zip(net.params[name], stored[name]):
            blob.data[...] = numbers.reshape(blob.data.shape)
    return [name for name in net.params if name not in loaded]


def copy_weights(source: Any, target: Any) -> None:
    """Copy parameters between two caffe.Nets by layer name.

    A copy, not Caffe's sharing: nets that share weights can crash when they end.
    """
    for name, blobs in target.params.items():
        if name not in source.params:
            raise ValueError("layer '%s' of the measured net is not in the training net" % name)
        for blob, trained in zip(blobs, source.params[name]):
            blob.data[...] = trained.data


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


def _plain_shape(shape: Sequence[int]) -> Tuple[int, ...]:
    """A shape without leading ones: old files write every blob with four axes."""
    lengths = list(shape)
    while len(lengths) > 1 and lengths[0] == 1:
        del lengths[0]
    return tuple(lengths)


def _shapes(shapes: Sequence[Sequence[int]]) -> str:
    return " and ".join("x".join(str(length) for length in shape) or "1" for shape in shapes)
