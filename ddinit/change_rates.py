"""Change rates (paper, equations 1 and 2) from the gradients of single images.

C_k, the change rate of layer k, is the root of the mean squared gradient over the mean squared
weight, for a random linear loss eta on every output of every image.

Caffe sums the weight gradients of a batch.  Its expected square is right when every image has its
own random loss, but the products of different images' gradients make it noisy: of convolutions and
fully connected layers we therefore compute each image's own weight gradient from the blobs, as a
matrix product of the layer's input and the gradient at its output.  Caffe's backward pass is
spared that work (`spare_weight_gradients`).

    python magic_init.py models/caffenet_tiny/deploy.prototxt out.caffemodel -d 'photos/*' -cs
"""
from typing import Any, List, NamedTuple, Optional, Sequence

import numpy as np
import scipy.special

from ddinit import blas
from ddinit.caffe_net import Geometry, WorkingNet, affine_view, geometry, sum_of_squares, windows
from ddinit.crew import ALONE, Crew
from ddinit.scales import AffineScales, ScaleGraph

# Random numbers eta that a measurement draws at least, and one of those that follow the first from
# scratch: small nets take less time for it.  Rates of caffenet_tiny on its own 16 images, judged
# with 100,000, lie within 1.163 so, within 1.130 with 2,000 a step (means of eight seeds).
LOSSES = 2000
LOSSES_OF_A_STEP = 500


class ChangeRates:
    """Squared gradients and weights of all (layer, input block) pairs of a net.

    `layer` (pairs,) tells a pair's affine layer, `size` (pairs,) counts its weights, `weights`
    (pairs,) is their sum of squares.  `gradients` (images, outputs, pairs) are sums over a pair's
    weights of g^2, g an image's gradient of the loss on one output; outputs have independent
    losses, so that their squares add up.  `products` (draws, pairs), for each batch measured, are
    sums over weights of the mean of g_n^2 g_m^2 over different images n and m.
    """

    def __init__(self, layer: np.ndarray, size: np.ndarray, weights: np.ndarray,
                 gradients: np.ndarray, products: np.ndarray) -> None:
        self.layer = layer
        self.size = size
        self.weights = weights
        self.gradients = gradients
        self.products = products

    def rescaled(self, log_factors: np.ndarray, log_outputs: Any = 0.0) -> "ChangeRates":
        """Rates of the same images when weight blocks become W / exp(log_factors) (pairs,).

        Outputs that become exp(log_outputs) (outputs,) times what they were keep their loss, so
        the gradients that come from them grow alike.
        """
        factor = np.exp(2 * log_factors)
        output = np.exp(2 * np.asarray(log_outputs)).reshape(-1, 1)
        return self._changed(self.weights / factor, self.gradients * factor * output)

    def weighted(self, factors: np.ndarray) -> "ChangeRates":
        """Rates whose squared gradients count `factors` (layers,) times."""
        return self._changed(self.weights, self.gradients * factors[self.layer])

    def _changed(self, weights: np.ndarray, gradients: np.ndarray) -> "ChangeRates":
        return ChangeRates(self.layer, self.size, weights, gradients, self.products_at(gradients))

    def products_at(self, gradients: np.ndarray) -> np.ndarray:
        """Return `products` of other squared gradients that vary as much within each pair."""
        before, after = (_mean_products(one.sum(axis=1)) for one in (self.gradients, gradients))
        return self.products * np.divide(after, before, out=np.zeros_like(after),
                                         where=before > 0)

    def joined(self, other: "ChangeRates") -> "ChangeRates":
        """These rates with the images of `other`, measured at the same scales."""
        gradients = np.concatenate([self.gradients, other.gradients])
        products = [one.products_at(gradients) for one in (self, other)]
        return ChangeRates(self.layer, self.size, self.weights, gradients,
                           np.concatenate(products))

    def by_layer(self) -> np.ndarray:
        """Return C_k = sqrt(E[g^2] / mean(W_k^2)) (layers,), equation 2; NaN without weights."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.sqrt(self.sum(self._squares()) / self.sum(self.weights))

    def by_pair(self) -> np.ndarray:
        """Return the same for each pair by itself (pairs,)."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.sqrt(self._squares() / self.weights)

    def variation(self) -> np.ndarray:
        """Return the coefficient of variation of C_kij^2 over a layer's weights (layers,).

        Equation 2 and figure 1b: std over mean of E[g^2].  Products of different images' squares
        estimate squares of means without bias.
        """
        size = self.sum(self.size.astype(np.float64))
        fourth = self.sum(self.products.mean(axis=0)) / size
        second = _mean_products(self._by_image() / size)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.sqrt(np.maximum(fourth / second - 1, 0))

    def uncertainty(self) -> float:
        """Return the largest standard error, over images, of the layers' log rates.

        What is common to all layers does not count; infinite for a single image.
        """
        images = self._by_image()
        if len(images) < 2:
            return np.inf
        means = images.mean(axis=0)
        relative = images[:, means > 0] / means[means > 0]
        if not relative.size:
            return 0.0
        relative -= relative.mean(axis=1, keepdims=True)
        return float(relative.std(axis=0, ddof=1).max() / np.sqrt(len(images))) / 2

    def noise(self) -> float:
        """Return the log of the spread that rates of equal layers have by measurement error alone.

        It is the expected range of as many normal numbers as there are layers (Blom 1958), of
        standard deviation `uncertainty`.
        """
        layers = max(np.count_nonzero(self.sum(self._squares())), 2)
        return float(2 * scipy.special.ndtri((layers - 0.375) / (layers + 0.25))) \
            * self.uncertainty()

    def _by_image(self) -> np.ndarray:
        """Sums of g^2 (images, layers)."""
        return np.array([self.sum(image) for image in self.gradients.sum(axis=1)])

    def shares(self) -> np.ndarray:
        """Return the share of each output in the squared gradients (outputs, pairs)."""
        squares = self.gradients.mean(axis=0)
        total = squares.sum(axis=0)
        return np.divide(squares, total, out=np.full_like(squares, 1 / len(squares)),
                         where=total > 0)

    def sum(self, values: np.ndarray) -> np.ndarray:
        """Return the sums of values (pairs,) over each layer's blocks (layers,)."""
        return np.bincount(self.layer, values)

    def _squares(self) -> np.ndarray:
        """Sums over weights of E[g^2] (pairs,)."""
        return self.gradients.mean(axis=0).sum(axis=0)


def spread(rates: np.ndarray) -> float:
    """Return max / min of the rates that are positive and finite, 1 where there are none."""
    live = rates[np.isfinite(rates) & (rates > 0)]
    return float(live.max() / live.min()) if len(live) else 1.0


# ---------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------

def measure(graph: ScaleGraph, rng: np.random.Generator,
            known: Optional[ChangeRates] = None, crew: Crew = ALONE,
            losses: int = LOSSES) -> ChangeRates:
    """Run backward passes from what the net's blobs hold and return the change rates.

    Every image gets its own random loss eta ~ N(0, I) at every output.  Where outputs are few, the
    mean over several passes is taken, until `losses` random numbers were drawn.  Outputs that may
    be rescaled get passes of their own.  With `known` rates of the net as it is, from other
    images, the outputs' shares and the variation within pairs are taken from there.  The images
    of a crew are those of all its processes, which get the same rates.
    """
    working = graph.working
    size = sum(working.blob(name).data.size for name in working.outputs) * crew.size
    passes = range(-(-losses // size))
    found = mean_moments([_one_pass(graph, working.outputs, rng, known is None, crew)
                          for _ in passes])
    gradients, products = found.squares[:, None], found.products[None]
    if known is not None:
        gradients = gradients * known.shares()
        products = known.products_at(gradients)
    elif graph.free_outputs:
        gradients = np.stack([
            mean_moments([_one_pass(graph, [name], rng, False, crew) for _ in passes]).squares
            for name in working.outputs], axis=1)
    pairs = [(number, affine_view(scaled.layer, scaled.layer.weights, scaled.in_channels)[
        block.groups, :, block.inputs]) for number, scaled in enumerate(graph.owners())
        for block in scaled.blocks]
    return ChangeRates(np.array([number for number, _ in pairs]),
                       np.array([part.size for _, part in pairs]),
                       np.array([sum_of_squares(part) for _, part in pairs]),
                       gradients, products)


class Moments(NamedTuple):
    """Moments of weight gradients g_n of images n, per input block of a layer.

    `squares` (images, blocks) are sums over weights of g_n^2, `products` (blocks,) those of the
    mean of g_n^2 g_m^2 over different images.
    """
    squares: np.ndarray
    products: np.ndarray


def mean_moments(passes: Sequence[Moments]) -> Moments:
    """Return the mean of moments over passes."""
    return Moments(np.mean([one.squares for one in passes], axis=0),
                   np.mean([one.products for one in passes], axis=0))


def joined_moments(parts: Sequence[Moments]) -> Moments:
    """Return the moments of all images of a batch from those of its parts.

    Products of images in different parts are not known: within a block they are to those of their
    sums of squares as products of images in the same part are.
    """
    if len(parts) == 1:
        return parts[0]
    squares = np.concatenate([part.squares for part in parts])
    known = sum(_mean_products(part.squares) for part in parts)
    products = sum(part.products for part in parts)
    ratio = np.divide(products, known, out=np.zeros_like(products), where=known > 0)
    return Moments(squares, ratio * _mean_products(squares))


def _mean_products(squares: np.ndarray) -> np.ndarray:
    """The means of s_n s_m over n != m of sums of squares s (images, ...), which estimate E[s]^2
    without bias; s^2 of a single image.
    """
    if len(squares) == 1:
        return squares[0] ** 2
    return _between_images(squares.sum(axis=0) ** 2, (squares ** 2).sum(axis=0), len(squares))


def _one_pass(graph: ScaleGraph, names: Sequence[str], rng: np.random.Generator,
              products: bool, crew: Crew) -> Moments:
    """Moments of all pairs from one backward pass, with losses on some outputs."""
    working = graph.working
    for name in working.outputs:
        diff = working.blob(name).diff
        diff[...] = 0
        if name in names:
            rows = len(diff) * crew.size
            losses = rng.standard_normal((rows,) + diff.shape[1:], dtype=np.float32)
            diff[...] = losses[crew.own(rows)]
    for scaled in graph.affine:
        if not per_image(scaled.layer.parameters):
            scaled.layer.blobs[0].diff[...] = 0  # Caffe adds to what is there
    working.backward()
    found = [moments(scaled, working, products) for scaled in graph.owners()]
    images = len(working.blob(working.layers[0].tops[0]).data)
    found = [one if len(one.squares) == images else _of_rows(one, images) for one in found]
    return joined_moments(crew.gather(Moments(
        np.concatenate([one.squares for one in found], axis=1),
        np.concatenate([one.products for one in found]))))


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


def moments(scaled: AffineScales, working: WorkingNet, products: bool = True) -> Moments:
    """Return the moments of a layer's weight gradients after a backward pass of one batch.

    Without `products` these may be left at 0, which spares time.
    """
    layer = scaled.layer
    bottom, top = working.blob(layer.bottoms[0]).data, working.blob(layer.tops[0]).diff
    images = len(top)
    if not per_image(layer.parameters):
        return _of_sum(scaled, images)
    peak = largest(top)
    if peak == 0 or not np.isfinite(peak):
        return Moments(np.full((images, len(scaled.blocks)), peak),
                       np.full(len(scaled.blocks), peak))
    if layer.type == "InnerProduct":
        found = _of_products(scaled, bottom, top * np.float32(1 / peak))
    else:
        size = largest(bottom) or 1.0
        found = _of_convolution(scaled, bottom, top * np.float32(1 / peak / size), products)
        peak *= size  # fourth powers of what is far from 1 are beyond float32
    return Moments(found.squares * peak ** 2, found.products * peak ** 4)


def _of_rows(found: Moments, images: int) -> Moments:
    """Moments by image where a layer sees another number of rows: a Reshape may fold channels, or
    regions, into the batch.

    Rows have their own losses as long as nothing above joins them again; images get equal parts.
    """
    share = len(found.squares) / images
    return Moments(np.tile(found.squares.sum(axis=0) / images, (images, 1)),
                   found.products * share ** 2)


def _of_products(scaled: AffineScales, bottom: np.ndarray, top: np.ndarray) -> Moments:
    """Fully connected: g_n = y_n x_n^T, whose moments are products of those of y and x."""
    images = len(bottom)
    rows = bottom.reshape(images, scaled.in_channels, -1)
    errors = top.reshape(images, -1).astype(np.float64) ** 2
    gram = errors @ errors.T
    squares, products = [], []
    for block in scaled.blocks:
        inputs = rows[:, block.inputs].reshape(images, -1).astype(np.float64) ** 2
        square = gram * (inputs @ inputs.T)
        squares.append(errors.sum(axis=1) * inputs.sum(axis=1))
        products.append(_between_images(square.sum(), np.trace(square), images))
    return Moments(np.array(squares).T, np.array(products))


def _of_convolution(scaled: AffineScales, bottom: np.ndarray, top: np.ndarray,
                    products: bool) -> Moments:
    """Convolution: g_n = y_n im2col(x_n)^T, summed over positions, image by image."""
    shape = geometry(scaled.layer)
    assert shape is not None
    groups = scaled.layer.parameters.convolution_param.group
    images, outputs = top.shape[:2]
    layout = (groups, outputs // groups, scaled.in_channels // groups, int(np.prod(shape.kernel)))
    squares, fourths = np.zeros((2, images, len(scaled.blocks)))
    total = np.zeros(layout, np.float32)

    def by_block(gradient: np.ndarray) -> List[float]:
        return [_squared(gradient[block.groups, :, block.inputs]) for block in scaled.blocks]

    for image in range(images):
        columns = im2col(bottom[image:image + 1], shape).reshape(groups, -1, top[0, 0].size)
        errors = top[image].reshape(groups, -1, top[0, 0].size)
        gradient = np.stack([blas.product(error, column.T)
                             for error, column in zip(errors, columns)]).reshape(layout)
        squares[image] = by_block(gradient)
        if products:
            gradient *= gradient
            fourths[image] = by_block(gradient)
            total += gradient
    return Moments(squares, _between_images(np.array(by_block(total)), fourths.sum(axis=0), images))


def _between_images(of_sum: Any, of_each: Any, images: int) -> Any:
    """The mean of q_n q_m over n != m from (sum q_n)^2 and sum q_n^2; q Gaussian for one image."""
    if images == 1:
        return of_sum / 3
    return (of_sum - of_each) / (images * (images - 1))


def _of_sum(scaled: AffineScales, images: int) -> Moments:
    """Other layers: Caffe's gradient g summed over a batch, as if all images had equal parts.

    Losses are independent, so E[g^2] is the sum of the images'; g is Gaussian: E[g^4] = 3 E[g^2]^2.
    """
    diff = affine_view(scaled.layer, scaled.layer.blobs[0].diff, scaled.in_channels)
    parts = [diff[block.groups, :, block.inputs].astype(np.float64) ** 2
             for block in scaled.blocks]
    squares = np.array([part.sum() for part in parts]) / images
    return Moments(np.tile(squares, (images, 1)),
                   np.array([(part ** 2).sum() for part in parts]) / 3 / images ** 2)


def im2col(images: np.ndarray, shape: Geometry) -> np.ndarray:
    """Return what a convolution multiplies its weights with: (n, channels * kernel, positions).

    `images` are (n, channels, height, width) or have any other number of spatial axes.
    """
    seen = windows(images, shape)
    return seen.reshape(len(images), images.shape[1] * int(np.prod(shape.kernel)), -1)


def largest(array: np.ndarray) -> float:
    """The largest absolute value."""
    return float(max(array.max(), -array.min()))


def _squared(array: np.ndarray) -> float:
    """The sum of squares; BLAS adds up many partial sums, which float32 can hold."""
    flat = array.reshape(-1)
    return float(np.dot(flat, flat))
