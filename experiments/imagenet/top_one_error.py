"""Compute the error of a classifier on the batch that it trains on, in a Caffe Python layer."""
from typing import Any, Sequence

from ddinit.prototxt import import_caffe
from imagenet.nets import error_rate

caffe: Any = import_caffe()


class TopOneError(caffe.Layer):
    """Bottoms: scores (n, classes) and labels (n,). Top: the part of the images that are wrong.

    Unlike Caffe's Accuracy layer it accepts NaN, which counts as an error.
    """

    def setup(self, bottom: Sequence[Any], top: Sequence[Any]) -> None:
        pass  # there are no parameters

    def reshape(self, bottom: Sequence[Any], top: Sequence[Any]) -> None:
        top[0].reshape()

    def forward(self, bottom: Sequence[Any], top: Sequence[Any]) -> None:
        top[0].data[...] = error_rate(bottom[0].data, bottom[1].data)

    def backward(self, top: Sequence[Any], propagate_down: Sequence[bool],
                 bottom: Sequence[Any]) -> None:
        bottom[0].diff[...] = 0  # Caffe adds it to the gradient of the loss
