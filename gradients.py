"""Gradients of single images (paper, equations 1 and 2), layer by layer.

Caffe sums the weight gradients of a batch.  Its expected square is right when every image has its
own random loss, but the products of different images' gradients make it noisy: of convolutions and
fully connected layers we therefore compute each image's own weight gradient from the blobs, as a
matrix product of the layer's input and the gradient at its output.  Caffe's backward pass is
spared that work (`definitions.spare_weight_gradients`).

    python magic_init.py models/caffenet_tiny/deploy.prototxt out.caffemodel -d 'photos/*' -cs
"""
from typing import Any, NamedTuple

import numpy as np

from caffe_net import Geometry, WorkingNet, affine_view, geometry
from scales import AffineScales


class Moments(NamedTuple):
    """Moments of a layer's weight gradients g, per input block (blocks,).

    `second` is the sum over weights of E[g^2] and `fourth` that of E[g^2]^2, E the mean over
    images and losses.  Given an image, g is linear in the loss's Gaussian eta, so E[g^4] is 3
    E[g^2]^2, which makes both unbiased.
    """
    second: np.ndarray
    fourth: np.ndarray


def per_image(layer: Any) -> bool:
    """Whether the gradients of a layer (its message) are computed image by image.

    Those of other affine layers, of layers with several bottoms and of shared weights are Caffe's
    sum over a batch.
    """
    if len(layer.bottom) != 1 or any(parameter.name for parameter in layer.param):
        return False
    if layer.type == "InnerProduct":
        return layer.inner_product_param.axis == 1
    return layer.type == "Convolution" and layer.convolution_param.axis == 1


def moments(scaled: AffineScales, working: WorkingNet) -> Moments:
    """Return the moments of a layer's weight gradients after a backward pass of one batch."""
    layer = scaled.layer
    if not per_image(layer.parameters):
        images = len(working.blob(layer.tops[0]).diff)
        return _of_sum(scaled, images)
    bottom, top = working.blob(layer.bottoms[0]).data, working.blob(layer.tops[0]).diff
    if not top.any() or not np.isfinite(top).all():
        nothing = np.full(len(scaled.blocks), float(np.abs(top).max()))
        return Moments(nothing, nothing)
    scale = 1 / float(np.abs(top).max())  # squares of small numbers would underflow
    found = (_of_products if layer.type == "InnerProduct" else _of_convolution)(
        scaled, bottom, top * np.float32(scale))
    return Moments(found.second / scale ** 2, found.fourth / scale ** 4)


def _of_products(scaled: AffineScales, bottom: np.ndarray, top: np.ndarray) -> Moments:
    """Fully connected: g_n = y_n x_n^T, whose moments are products of those of y and x."""
    images = len(bottom)
    rows = bottom.reshape(images, scaled.in_channels, -1)
    squares = top.reshape(images, -1).astype(np.float64) ** 2
    gram = squares @ squares.T
    second, fourth = [], []
    for block in scaled.blocks:
        inputs = rows[:, block.inputs].reshape(images, -1).astype(np.float64) ** 2
        products = gram * (inputs @ inputs.T)
        second.append(squares.sum(axis=1) @ inputs.sum(axis=1) / images)
        fourth.append((products.sum() - 2 / 3 * np.trace(products)) / images ** 2)
    return Moments(np.array(second), np.array(fourth))


def _of_convolution(scaled: AffineScales, bottom: np.ndarray, top: np.ndarray) -> Moments:
    """Convolution: g_n = y_n im2col(x_n)^T, summed over positions."""
    shape = geometry(scaled.layer)
    assert shape is not None
    groups = scaled.layer.parameters.convolution_param.group
    images, outputs = top.shape[:2]
    total = np.zeros((groups, outputs // groups, scaled.in_channels // groups,
                      int(np.prod(shape.kernel))), np.float32)
    quartic = np.zeros(len(scaled.blocks))
    for image, error in zip(bottom, top):
        columns = im2col(image, shape).reshape(groups, -1, error[0].size)
        squares = error.reshape(groups, outputs // groups, -1) @ columns.transpose(0, 2, 1)
        squares *= squares
        squares = squares.reshape(total.shape)
        total += squares
        for number, block in enumerate(scaled.blocks):
            quartic[number] += _squared(squares[block.groups, :, block.inputs])
    parts = [total[block.groups, :, block.inputs] for block in scaled.blocks]
    second = np.array([part.sum(dtype=np.float64) for part in parts]) / images
    fourth = (np.array([_squared(part) for part in parts]) - 2 / 3 * quartic) / images ** 2
    return Moments(second, fourth)


def im2col(image: np.ndarray, shape: Geometry) -> np.ndarray:
    """Return what a convolution multiplies its weights with: (channels * kernel, positions).

    `image` is (channels, height, width) or has any other number of spatial axes.
    """
    padded = np.pad(image, [(0, 0)] + [(pad, pad) for pad in shape.pad])
    places = [(size - dilation * (kernel - 1) - 1) // stride + 1 for size, kernel, stride, dilation
              in zip(padded.shape[1:], shape.kernel, shape.stride, shape.dilation)]
    steps = padded.strides[1:]
    view = np.lib.stride_tricks.as_strided(
        padded, (len(image),) + shape.kernel + tuple(places),
        padded.strides[:1] + tuple(step * dilation for step, dilation in zip(steps, shape.dilation))
        + tuple(step * stride for step, stride in zip(steps, shape.stride)), writeable=False)
    return view.reshape(-1, int(np.prod(places)))


def _of_sum(scaled: AffineScales, images: int) -> Moments:
    """Other layers: the gradient that Caffe summed over a batch of independent losses."""
    diff = affine_view(scaled.layer, scaled.layer.blobs[0].diff, scaled.in_channels)
    parts = [diff[block.groups, :, block.inputs].astype(np.float64) ** 2
             for block in scaled.blocks]
    return Moments(np.array([part.sum() for part in parts]) / images,
                   np.array([(part ** 2).sum() for part in parts]) / 3 / images ** 2)


def _squared(array: np.ndarray) -> float:
    """The sum of squares; BLAS adds up many partial sums, which float32 can hold."""
    flat = array.reshape(-1)
    return float(np.dot(flat, flat))
