"""Measure how fast each layer learns (paper, equations 1 to 4), from Caffe's own gradients.

A backward pass under a random linear loss leaves the gradient of a whole batch in each blob's diff.
Every image has a loss of its own, so that the expected square of this sum over images is the sum of
the images' squares.
"""
from typing import Any, Dict, Iterator, List, Optional, Sequence

import numpy as np

from ddinit.net import Layer, WorkingNet, affine_view
from ddinit.walk import Statistics

# Nets with fewer outputs an image are measured image by image: in a sum over a batch the products
# of different images' gradients, which are alike, would be all that one sees.
FEW_OUTPUTS = 50
# So many images are enough then: a measurement of a deep net takes 4 forwards of 160 images.
FEW_IMAGES = 80
# So are nets with fewer weights for each number in an image's blobs, for which it costs little.
LIGHT = 2


class ChangeRates:
    """Squared gradients and weights of all layers with weights of their own, by input channel.

    Parameters
    ----------
    layers : names of the layers
    gradients : for each layer (outputs, groups, inputs / group), the sum over an input channel's
        weights of C_kij^2, equation 1, for the loss on each output of the net; outputs have
        independent losses, so that their squares add up
    weights : for each layer (groups, inputs / group), the sum of its squared weights W_k(i, j)^2
    rows : for each layer, how many weights an input channel has
    literal : divide by the sum of squared weights, as equation 2 is written, and not by their
        mean, as the authors' released tool does
    """

    def __init__(self, layers: Sequence[str], gradients: List[np.ndarray],
                 weights: List[np.ndarray], rows: Sequence[int], literal: bool = False) -> None:
        self.layers = list(layers)
        self.gradients = gradients
        self.weights = weights
        self.rows = list(rows)
        self.literal = literal

    def by_layer(self) -> Dict[str, float]:
        """Return C_k, equation 2 over a whole layer: the root of E[g^2] over ||W_k||^2.

        E[g^2] is the mean over the layer's weights, and so is ||W_k||^2 unless `literal`: ours is
        the released tool's definition, which differs from the letter of equation 2 by the root of
        the number of weights.  It is NaN for weights that are all 0.
        """
        with np.errstate(divide="ignore", invalid="ignore"):
            return {name: float(np.sqrt(gradients.sum() / weights.sum()
                                        / (weights.size * rows if self.literal else 1)))
                    for name, gradients, weights, rows
                    in zip(self.layers, self.gradients, self.weights, self.rows)}

    def by_column(self) -> Dict[str, np.ndarray]:
        """Return C_kj (inputs,) of each layer, equation 3: of the weights of input channel j.

        ||W_k||^2 is that of the whole layer, as in `by_layer`.
        """
        with np.errstate(divide="ignore", invalid="ignore"):
            return {name: np.sqrt(gradients.sum(axis=0).ravel() / weights.sum()
                                  * (1 / rows if self.literal else weights.size))
                    for name, gradients, weights, rows
                    in zip(self.layers, self.gradients, self.weights, self.rows)}

    def variation(self) -> Dict[str, float]:
        """Return figure 1b: the coefficient of variation, std over mean, of each layer's C_kj.

        The authors' script computes it from the same root of a column's mean squared gradient.
        """
        with np.errstate(divide="ignore", invalid="ignore"):
            return {name: float(rates.std() / rates.mean())
                    for name, rates in self.by_column().items()}


def spread(rates: Dict[str, float]) -> float:
    """Return max / min of the rates that are positive and finite, 1 where there are none."""
    live = [rate for rate in rates.values() if np.isfinite(rate) and rate > 0]
    return max(live) / min(live) if live else 1.0


def independent_column_rates(bottom: np.ndarray, top_diff: np.ndarray,
                             weights: np.ndarray) -> np.ndarray:
    """Return C_kj (channels,) after equation 4, from a layer's blobs alone.

    C_kj^2 = E[z_{k-1}(j)^2] E[||y_k||^2] / (N ||W_k||^2): the input z_{k-1} (n, channels, ...) and
    the gradient y_k at the output (n, N, ...) are taken to be independent of each other.
    """
    z = np.square(bottom, dtype=np.float64).reshape(len(bottom), bottom.shape[1], -1)
    y = np.square(top_diff, dtype=np.float64).reshape(len(top_diff), -1).sum(axis=1)
    rows = top_diff.shape[1]
    return np.sqrt(z.mean(axis=(0, 2)) * y.mean() / (rows * np.square(weights).sum()))


# ---------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------

def measure(working: WorkingNet, batches: Any, numbers: Sequence[int], rng: np.random.Generator,
            by_output: bool = False, literal: bool = False, images: Optional[int] = None,
            statistics: Optional[Dict[str, Statistics]] = None) -> ChangeRates:
    """Return the change rates of a net over some batches (equations 1 and 2).

    C_kij^2 = E[(d l / d W_k(i, j))^2] with the loss l = eta z_N, eta drawn anew for each image.
    With `by_output`, each output has passes of its own and the rates tell them apart.  Only the
    first `images` of the batches are seen, if given.  What layers put out is added to `statistics`.
    """
    owners = working.owners()
    groups = [[name] for name in working.outputs] if by_output else [working.outputs]
    totals = [np.zeros((len(groups),) + _gradient(working, layer).shape[::2]) for layer in owners]
    seen = 0
    for size in parts(working, batches, numbers, images):
        seen += size
        forward(working, statistics)
        for position, names in enumerate(groups):
            put_losses(working, names, rng)
            working.backward()
            for total, layer in zip(totals, owners):
                total[position] += squares_by_input(_gradient(working, layer))
    views = [affine_view(layer, layer.weights, working.in_channels(layer)) for layer in owners]
    return ChangeRates([layer.name for layer in owners], [total / seen for total in totals],
                       [squares_by_input(view) for view in views],
                       [view.shape[1] * view.shape[3] for view in views], literal)


def parts(working: WorkingNet, batches: Any, numbers: Sequence[int],
          images: Optional[int]) -> Iterator[int]:
    """Put what one backward pass shall see into the net's inputs, and yield how many images.

    That is a batch, or one image where outputs are few; the net is resized for less than a batch,
    and is left so.
    """
    outputs = outputs_per_image(working)
    singly = working.separable and (outputs < FEW_OUTPUTS or is_light(working))
    left = images or 10 ** 9
    if singly and outputs < FEW_OUTPUTS:
        left = min(left, FEW_IMAGES)
    for number in numbers:
        working.load(batches, number)
        size = working.inputs[0].shape[0]
        if not singly and (left >= size or not working.separable):
            yield size
            left -= size
        else:
            held = [np.array(working.blob(blob).data[:left]) for blob, _ in working.inputs]
            size = 1 if singly else left
            working.resize(size)
            for start in range(0, len(held[0]), size):
                for (blob, _), rows in zip(working.inputs, held):
                    working.blob(blob).data[...] = rows[start:start + size]
                yield size
            left -= len(held[0])
        if left <= 0:
            return


def outputs_per_image(working: WorkingNet) -> int:
    """Return how many numbers the net puts out for an image."""
    images = len(working.blob(working.inputs[0].blob).data)
    return max(1, sum(working.blob(name).data.size for name in working.outputs) // images)


def is_light(working: WorkingNet) -> bool:
    """Return whether a net has few weights beside what it computes for an image."""
    numbers = sum(blob.data.size for blob in working.net.blobs.values())
    images = len(working.blob(working.inputs[0].blob).data)
    return sum(layer.weights.size for layer in working.owners()) < LIGHT * numbers / images


def forward(working: WorkingNet, statistics: Optional[Dict[str, Statistics]] = None) -> None:
    """Run the net; add what its affine layers put out to their `statistics`, if any are wanted."""
    if statistics is None:
        working.forward()
        return
    affine = {layer.position for layer in working.affine}
    for layer in working.layers:
        working.net._forward(layer.position, layer.position)
        if layer.position in affine:
            for top in layer.tops:
                statistics.setdefault(layer.name, Statistics()).add(working.blob(top).data)


def put_losses(working: WorkingNet, names: Sequence[str], rng: np.random.Generator) -> None:
    """Put the gradients eta of random linear losses at the outputs `names`, 0 at all others.

    eta ~ N(0, I) as in the paper; where outputs are few it is a random sign, which has the same
    second moments and makes less noise.
    """
    few = outputs_per_image(working) < FEW_OUTPUTS
    for name in working.outputs:
        diff = working.blob(name).diff
        if name not in names:
            diff[...] = 0
        elif few:
            diff[...] = rng.choice(np.array([-1, 1], np.float32), diff.shape)
        else:
            diff[...] = rng.standard_normal(diff.shape, dtype=np.float32)


def squares_by_input(view: np.ndarray) -> np.ndarray:
    """Return the sums of squares (groups, inputs / group) of a view as `affine_view` returns it."""
    return np.einsum("goir,goir->gi", view, view, dtype=np.float64)


def _gradient(working: WorkingNet, layer: Layer) -> np.ndarray:
    return affine_view(layer, layer.blobs[0].diff, working.in_channels(layer))
