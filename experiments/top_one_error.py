"""A Caffe Python layer that tells a classifier's error on the batch it trains on.

    python experiments/train_imagenet.py --help
"""
from typing import Any, Sequence

from ddinit.prototxt import import_caffe
from imagenet_net import error_rate

caffe: Any = import_caffe()


class TopOneError(caffe.Layer):
    """Bottoms: scores (n, classes) and labels (n); top: the fraction of images whose greatest
    score is not their label's.  Unlike Caffe's Accuracy it stands NaN, which counts as wrong."""

    def setup(self, bottom: Sequence[Any], top: Sequence[Any]) -> None:
        pass  # no parameters

    def reshape(self, bottom: Sequence[Any], top: Sequence[Any]) -> None:
        top[0].reshape()

    def forward(self, bottom: Sequence[Any], top: Sequence[Any]) -> None:
        top[0].data[...] = error_rate(bottom[0].data, bottom[1].data)

    def backward(self, top: Sequence[Any], propagate_down: Sequence[bool],
                 bottom: Sequence[Any]) -> None:
        bottom[0].diff[...] = 0  # Caffe adds it to the loss's gradient
