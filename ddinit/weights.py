"""Make weights from data (paper, section 3.3): random, PCA, ZCA, patches and k-means.

Every scheme takes patches (n, d) of a layer's input, d = channels x kernel height x kernel width,
and returns filters (m, d).  Sections 3.1 and 3.2 give them their scale.
"""
from typing import Any, Callable, Dict, List, Tuple

import numpy as np
import scipy.linalg
import scipy.sparse

from ddinit.net import Geometry, WorkingNet, windows
from ddinit.walk import Stop

# Of the mean eigenvalue, added to all before whitening.
REGULARIZER = 0.03
# Of the mean patch variance, added before contrast normalization; Coates & Ng add 10 to the
# variance of pixels in 0..255.
CONTRAST = 0.01
# What is 0 is not divided by, but by this.
TINY = 1e-20
# White patches of less than this part of the mean squared length say nothing and are not chosen.
FAINT = 0.1
# Passes over all patches; nets trained no better from more (experiments/results/choices.md).
KMEANS_ITERATIONS = 5
# Patches drawn per number in a patch: enough for a covariance that is regularized anyway.
PATCHES_PER_DIMENSION = 2
# Patches drawn per filter, as far as all of them hold no more than so many numbers.
PATCHES_PER_FILTER = 100
PATCH_NUMBERS = 1 << 22
PATCH_BYTES = 1 << 29  # of all groups of a layer


def gaussian(weights: np.ndarray, rng: np.random.Generator, std: float = 1.0) -> None:
    """Fill a contiguous float32 array with W ~ N(0, std^2) (Algorithm 1, first line)."""
    rng.standard_normal(out=weights.reshape(-1), dtype=np.float32)
    if std != 1:
        weights *= np.float32(std)


def set_filters(stop: Stop, working: WorkingNet, shape: Geometry, kind: str, count: int,
                rng: np.random.Generator) -> None:
    """Give a convolution filters of a kind in SCHEMES from its input in `count` batches."""
    layer = stop.layer
    groups = layer.parameters.convolution_param.group
    filters = layer.weights.reshape((groups, -1) + layer.weights.shape[1:])
    bottom = working.blob(layer.bottoms[0]).data
    depth = bottom.shape[1] // groups
    wanted = patch_count(depth * int(np.prod(shape.kernel)), filters.shape[1], groups)
    parts: List[List[np.ndarray]] = [[] for _ in range(groups)]
    for batch in range(count):
        stop.load(batch)
        share = wanted * (batch + 1) // count - wanted * batch // count
        for group, part in enumerate(parts):
            part.append(sample_patches(bottom[:, group * depth:(group + 1) * depth], share, rng,
                                       shape))
    for group, part in zip(filters, parts):
        drawn = SCHEMES[kind](np.concatenate(part).reshape(wanted, -1), len(group), rng)
        group[...] = drawn.reshape(group.shape)


def patch_count(dimension: int, filters: int, groups: int) -> int:
    """Return how many patches of so many numbers to draw for the filters of each group."""
    wanted = max(PATCHES_PER_DIMENSION * dimension,
                 min(PATCHES_PER_FILTER * filters, PATCH_NUMBERS // dimension))
    return max(min(wanted, PATCH_BYTES // (4 * dimension * groups)), 2 * filters, 1000)


def sample_patches(blob: np.ndarray, count: int, rng: np.random.Generator,
                   geometry: Geometry) -> np.ndarray:
    """Return `count` patches (count, channels, kernel height, kernel width) of a blob.

    They are what a convolution with this geometry multiplies its weights with at random positions
    of random images of `blob` (n, channels, height, width), in the order of the images.
    Raises ValueError where the kernel does not fit into the padded blob.
    """
    parts = []
    for image, number in enumerate(np.bincount(rng.integers(0, len(blob), count),
                                               minlength=len(blob))):
        seen = windows(blob[image:image + 1], geometry)[0]
        rows, columns = (rng.integers(0, places, number) for places in seen.shape[3:])
        parts.append(np.moveaxis(seen[:, :, :, rows, columns], 3, 0))
    return np.concatenate(parts)


# ---------------------------------------------------------------------------------------------
# Schemes
# ---------------------------------------------------------------------------------------------

def pca(patches: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Return (count, d) filters v_i / sqrt(lambda_i): the first principal components, white.

    Where `count` exceeds the rank of the patches, the others are random directions of the white
    space: also of unit variance, but no longer uncorrelated.
    """
    values, vectors = _spectrum(patches)
    white = (vectors / np.sqrt(values)).T
    return _with_random_directions(white[:count], white, count, rng)


def zca(patches: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Return (count, d) rows of the symmetric whitening matrix V diag(lambda^-1/2) V^T.

    Each is centred on one number of the patch that varies, chosen at random; more rows than there
    are such numbers are random directions of the white space.
    """
    values, vectors = _spectrum(patches)
    varying = np.flatnonzero(np.einsum("dk,dk->d", vectors, vectors) > 1e-6)
    rows = rng.permutation(varying)[:count]
    white = (vectors / np.sqrt(values)).T
    return _with_random_directions(vectors[rows] @ white, white, count, rng)


def random_patches(patches: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Return (count, d) filters that are whitened patches chosen at random."""
    white, factor = whitened(patches)
    return _filters(_chosen(white, count, rng), factor)


def kmeans(patches: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Return (count, d) filters that are centroids of spherical k-means on whitened patches.

    After Coates & Ng, 'Learning feature representations with k-means' (2012): contrast-normalized
    and whitened patches x, unit centroids D, s = D x for the best centroid and else 0, and
    D <- X S^T + D, normalized again.
    """
    white, factor = whitened(patches)
    return _filters(spherical_kmeans(white, count, rng), factor)


SCHEMES: Dict[str, Callable[[np.ndarray, int, np.random.Generator], np.ndarray]] = {
    "pca": pca, "zca": zca, "kmeans": kmeans, "rand": random_patches}

# Gaussian and elwise are the same; fast_ variants of the released tool's names are taken, too.
KINDS = ("gaussian", "elwise", *SCHEMES)


def whitened(patches: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
    """Return contrast-normalized white patches x L^-T and the Cholesky factor L.

    L L^T is the regularized covariance.  Any other whitening (ZCA, PCA) is a rotation of this one,
    under which spherical k-means and the filters it gives do not change, and costs far more.
    """
    normal = patches - patches.mean(axis=1, keepdims=True)
    variances = np.einsum("nd,nd->n", normal, normal) / patches.shape[1]
    normal /= np.sqrt(np.maximum(variances + CONTRAST * variances.mean(), TINY))[:, None]
    normal -= normal.mean(axis=0)
    covariance = normal.T @ normal / len(normal)
    mean = np.trace(covariance) / len(covariance)
    covariance.flat[::len(covariance) + 1] += max(REGULARIZER * mean, TINY)
    factor = scipy.linalg.cholesky(covariance, lower=True, overwrite_a=True, check_finite=False)
    white = scipy.linalg.solve_triangular(factor, normal.T, lower=True, overwrite_b=True,
                                          check_finite=False)
    return white.T, factor


def spherical_kmeans(white: np.ndarray, count: int, rng: np.random.Generator,
                     iterations: int = KMEANS_ITERATIONS) -> np.ndarray:
    """Return (count, d) unit centroids of white data (n, d) (Coates & Ng 2012, section 2)."""
    centroids = _chosen(white, count, rng)
    rows = np.arange(len(white))
    for _ in range(iterations):
        products = white @ centroids.T
        best = np.abs(products).argmax(axis=1)
        share = scipy.sparse.csr_matrix((products[rows, best], best, np.arange(len(rows) + 1)),
                                        shape=products.shape)
        centroids = _unit_rows(share.T @ white + centroids)
    return centroids


def _filters(directions: np.ndarray, factor: np.ndarray) -> np.ndarray:
    """Return filters w with w x = <direction, L^-1 x>: rows of directions L^-1."""
    return scipy.linalg.solve_triangular(factor, directions.T, lower=True, trans="T",
                                         check_finite=False).T


def _chosen(white: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Return (count, d) unit rows: patches chosen at random, all different if the patches are.

    Where there are too few of them each is taken several times, with random numbers of half its
    length added; where none varies, all are random directions.
    """
    squares = np.einsum("nd,nd->n", white, white)
    usable = np.flatnonzero(squares > FAINT * squares.mean())
    if not len(usable):
        return _unit_rows(rng.standard_normal((count, white.shape[1]), dtype=np.float32))
    few = len(usable) < count
    rows = _unit_rows(white[rng.choice(usable, count, replace=few)])
    if few:
        noise = rng.standard_normal(rows.shape, dtype=np.float32)
        rows = _unit_rows(rows + 0.5 * _unit_rows(noise))
    return rows


def _unit_rows(rows: Any) -> np.ndarray:
    lengths = np.sqrt(np.einsum("nd,nd->n", rows, rows))
    return rows / np.maximum(lengths, TINY)[:, None]


def _spectrum(patches: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
    """Return the eigenvalues above rounding, largest first, and eigenvectors as columns.

    Patches that do not vary at all count as white.
    """
    centred = patches - patches.mean(axis=0)
    covariance = (centred.T @ centred / len(centred)).astype(np.float64)
    values, vectors = scipy.linalg.eigh(covariance, overwrite_a=True, driver="evd")
    if values[-1] <= 0:
        return np.ones(len(values)), np.eye(len(values))
    kept = values > 1e-6 * values[-1]
    return values[kept][::-1], vectors[:, kept][:, ::-1]


def _with_random_directions(first: np.ndarray, white: np.ndarray, count: int,
                            rng: np.random.Generator) -> np.ndarray:
    """Return `first`, and below it random directions of the white space up to `count` rows."""
    missing = count - len(first)
    directions = _unit_rows(rng.standard_normal((missing, len(white))))
    return np.concatenate([first, directions @ white]).astype(np.float32)
