"""Weights from data (paper, section 3.3): random, PCA, ZCA, patches and k-means.

Every scheme takes patches (n, d) of a layer's input, d = channels x kernel height x kernel width,
and returns filters (m, d).  Sections 3.1 and 3.2 give them their scale.  In a crew each process has
patches of its own part of the images, and all get the filters that all patches together give.

    python -c "import numpy, weights; print(weights.gaussian((2, 3), numpy.random.default_rng(0)))"
"""
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable, Dict, Optional, Sequence, Tuple

import numpy as np
import scipy.linalg
import scipy.sparse

from ddinit import blas
from ddinit.caffe_net import Geometry, windows
from ddinit.crew import ALONE, Crew

# Random numbers are drawn in parts of this size, so that threads share the work and the result
# does not depend on how many there are.
PART = 1 << 21
# Of the mean eigenvalue, added to all before whitening; Coates & Ng use 0.01 to 0.1.  CaffeNet's
# rates on other photographs lie within 1.109 with 0.1, 1.065 with 0.03, 1.070 with 0.01 (means of
# five seeds).
REGULARISER = 0.03
# Of the mean patch variance, added before contrast normalisation; Coates & Ng add 10 to the
# variance of pixels in 0..255.
CONTRAST = 0.01
TINY = 1e-20  # keeps what is 0 from being divided by
# White patches of less than this part of the mean squared length say nothing: not chosen.
FAINT = 0.1
# Passes over all patches, and parts of them after each of which the centroids move.  On CaffeNet's
# conv2 to conv5 the centroids explain at least as much of unseen patches as after 10 whole passes
# (of conv2's energy 0.0108 both, conv3's 0.0045 and 0.0041, conv4's 0.0044 and 0.0042).
KMEANS_ITERATIONS = 2
KMEANS_PARTS = 8
# Patches drawn per number in a patch: enough for a covariance that is regularised anyway.
PATCHES_PER_DIMENSION = 2
# Patches drawn per filter, as far as all of them hold no more than so many numbers: with a tenth of
# these the filters of a first convolution are noise, not edges and colours.
PATCHES_PER_FILTER = 100
PATCH_NUMBERS = 1 << 22
PATCH_BYTES = 1 << 29  # of all groups of a layer


def gaussian(shape: Sequence[int], rng: np.random.Generator, std: float = 1.0,
             out: Optional[np.ndarray] = None, crew: Crew = ALONE) -> np.ndarray:
    """Return float32 weights W ~ N(0, std^2) of any shape (Algorithm 1, first line).

    With `out`, a contiguous array of that shape, they are drawn in place.  Processes of a crew,
    whose `rng` are in the same state, draw a part each of many numbers and get all.
    """
    weights = np.empty(shape, np.float32) if out is None else out
    flat = weights.reshape(-1)
    parts = [flat[start:start + PART] for start in range(0, flat.size, PART)]
    seeds = rng.integers(0, 2 ** 63, size=len(parts))

    def draw(part: np.ndarray, seed: int) -> None:
        np.random.Generator(np.random.SFC64(seed)).standard_normal(out=part, dtype=np.float32)
        if std != 1:
            part *= np.float32(std)
    if len(parts) == 1:
        draw(parts[0], seeds[0])
        return weights
    own = slice(crew.rank, None, crew.size)
    for number, part in enumerate(parts):
        if number % crew.size != crew.rank:
            part[...] = 0
    with ThreadPoolExecutor() as pool:
        list(pool.map(draw, parts[own], seeds[own]))
    crew.total(flat)
    return weights


def patch_count(dimension: int, filters: int, groups: int) -> int:
    """Return how many patches of so many numbers to draw for the filters of each group."""
    wanted = max(PATCHES_PER_DIMENSION * dimension,
                 min(PATCHES_PER_FILTER * filters, PATCH_NUMBERS // dimension))
    return max(min(wanted, PATCH_BYTES // (4 * dimension * groups)), 2 * filters, 1000)


def sample_patches(blob: np.ndarray, count: int, rng: np.random.Generator, geometry: Geometry,
                   crew: Crew = ALONE) -> np.ndarray:
    """Return `count` patches (count, channels, kernel height, kernel width) of a blob.

    They are what a convolution with this geometry multiplies its weights with at random positions
    of random images of `blob` (n, channels, height, width); they come in the order of images.  The
    blobs of a crew hold parts of a batch, of which each process returns its part of the patches.
    Raises ValueError where the kernel does not fit into the padded blob.
    """
    seen = windows(blob, geometry)
    images = len(blob) * crew.size
    own = crew.own(images)
    chosen = np.sort(rng.integers(0, images, count))
    rows, columns = (rng.integers(0, places, count) for places in seen.shape[4:])
    here = slice(*np.searchsorted(chosen, (own.start, own.stop)))
    return seen[chosen[here] - own.start, :, :, :, rows[here], columns[here]]


def pca(patches: np.ndarray, count: int, rng: np.random.Generator,
        crew: Crew = ALONE) -> np.ndarray:
    """Return (count, d) filters v_i / sqrt(lambda_i): the first principal components, white.

    Where `count` exceeds the rank of the patches, the others are random directions of the white
    space: also of unit variance, but no longer uncorrelated.
    """
    values, vectors = _spectrum(patches, crew)
    white = (vectors / np.sqrt(values)).T
    return _with_random_directions(white[:count], white, count, rng)


def zca(patches: np.ndarray, count: int, rng: np.random.Generator,
        crew: Crew = ALONE) -> np.ndarray:
    """Return (count, d) rows of the symmetric whitening matrix V diag(lambda^-1/2) V^T.

    Each is centred on one number of the patch that varies, chosen at random; more rows than there
    are such numbers are random directions of the white space.
    """
    values, vectors = _spectrum(patches, crew)
    varying = np.flatnonzero(np.einsum("dk,dk->d", vectors, vectors) > 1e-6)
    rows = rng.permutation(varying)[:count]
    white = (vectors / np.sqrt(values)).T
    return _with_random_directions(vectors[rows] @ white, white, count, rng)


def random_patches(patches: np.ndarray, count: int, rng: np.random.Generator,
                   crew: Crew = ALONE) -> np.ndarray:
    """Return (count, d) filters that are whitened patches chosen at random."""
    white, factor = whitened(patches, crew)
    return _filters(_chosen(white, count, rng, crew), factor)


def kmeans(patches: np.ndarray, count: int, rng: np.random.Generator,
           crew: Crew = ALONE) -> np.ndarray:
    """Return (count, d) filters that are centroids of spherical k-means on whitened patches.

    After Coates & Ng, 'Learning feature representations with k-means' (2012): contrast-normalised
    and whitened patches x, unit centroids D, s = D x for the best centroid and else 0, and
    D <- X S^T + D, normalised again.
    """
    white, factor = whitened(patches, crew)
    return _filters(spherical_kmeans(white, count, rng, crew=crew), factor)


SCHEMES: Dict[str, Callable[[np.ndarray, int, np.random.Generator, Crew], np.ndarray]] = {
    "pca": pca, "zca": zca, "kmeans": kmeans, "rand": random_patches}


def whitened(patches: np.ndarray, crew: Crew = ALONE) -> Tuple[np.ndarray, np.ndarray]:
    """Return contrast-normalised white patches x L^-T and the Cholesky factor L.

    L L^T is the regularised covariance.  Any other whitening (ZCA, PCA) is a rotation of this one,
    under which spherical k-means and the filters it gives do not change, and costs far more.
    """
    means = patches.mean(axis=1, keepdims=True)
    normal = patches - means
    variances = np.einsum("nd,nd->n", normal, normal) / patches.shape[1]
    contrast = CONTRAST * _mean(variances, crew)
    normal /= np.sqrt(np.maximum(variances + contrast, TINY))[:, None]
    normal -= _mean(normal, crew)
    covariance = crew.total(blas.gram(normal))
    covariance /= sum(crew.gather(len(normal)))
    diagonal = np.einsum("dd->d", covariance)
    np.fill_diagonal(covariance, diagonal + max(REGULARISER * diagonal.mean(), TINY))
    # its transpose lies in memory as LAPACK, which counts columns first, wants a lower triangle
    factor = scipy.linalg.cholesky(covariance.T, lower=True, overwrite_a=True, check_finite=False)
    white = scipy.linalg.blas.strsm(1.0, factor, normal.T, lower=1, overwrite_b=1)
    return white.T, factor


def spherical_kmeans(white: np.ndarray, count: int, rng: np.random.Generator,
                     iterations: int = KMEANS_ITERATIONS,
                     parts: int = KMEANS_PARTS, crew: Crew = ALONE) -> np.ndarray:
    """Return (count, d) unit centroids of white data (n, d) (Coates & Ng 2012, section 2).

    The sum X S^T is kept as that of `parts` of the patches, which are renewed in turn: centroids
    move that many times an iteration (as in Neal & Hinton's incremental EM).  Patches that follow
    each other, which may be of one image, go to different parts.
    """
    centroids = _chosen(white, count, rng, crew)
    sums = np.zeros((parts,) + centroids.shape, np.float32)
    total = np.zeros_like(centroids)
    for step in range(iterations * parts):
        part = sums[step % parts]
        total -= part
        part[...] = crew.total(_joined(white[step % parts::parts], centroids))
        total += part
        centroids = _unit_rows(total + centroids)
    return centroids


def _joined(patches: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Return X S^T (count, d) of some patches."""
    products = blas.product(patches, centroids.T)
    best = np.abs(products).argmax(axis=1)
    rows = np.arange(len(patches))
    share = scipy.sparse.csr_matrix((products[rows, best], best, np.arange(len(rows) + 1)),
                                    shape=products.shape)
    return share.T @ patches


def _filters(directions: np.ndarray, factor: np.ndarray) -> np.ndarray:
    """Filters w with w x = <direction, L^-1 x>: rows of directions L^-1."""
    return scipy.linalg.blas.strsm(1.0, factor, directions.T, lower=1, trans_a=1).T


def _chosen(white: np.ndarray, count: int, rng: np.random.Generator, crew: Crew) -> np.ndarray:
    """Return (count, d) unit rows: patches chosen at random, all different if the patches are.

    Where there are too few of them each is taken several times, with random numbers of half its
    length added; where none varies, all are random directions.
    """
    squares = np.einsum("nd,nd->n", white, white)
    usable = np.flatnonzero(squares > FAINT * _mean(squares, crew))
    shares = np.cumsum([0] + crew.gather(len(usable)))
    if not shares[-1]:
        return _unit_rows(gaussian((count, white.shape[1]), rng))
    few = shares[-1] < count
    bounds = np.rint(shares / shares[-1] * count).astype(int)
    own = np.random.default_rng([rng.integers(2 ** 31), crew.rank])
    wanted = bounds[crew.rank + 1] - bounds[crew.rank]
    rows = _unit_rows(white[own.choice(usable, wanted, replace=few)])
    if few:
        rows = _unit_rows(rows + 0.5 * _unit_rows(gaussian(rows.shape, own)))
    return np.concatenate(crew.gather(rows))


def _mean(rows: np.ndarray, crew: Crew) -> Any:
    """Return the mean of all processes' rows (n, ...)."""
    found = crew.gather((rows.sum(axis=0), len(rows)))
    return sum(total for total, _ in found) / sum(count for _, count in found)


def _unit_rows(rows: np.ndarray) -> np.ndarray:
    lengths = np.sqrt(np.einsum("nd,nd->n", rows, rows))
    return rows / np.maximum(lengths, TINY)[:, None]


def _spectrum(patches: np.ndarray, crew: Crew) -> Tuple[np.ndarray, np.ndarray]:
    """Eigenvalues above rounding, largest first, and eigenvectors as columns.

    Patches that do not vary at all count as white.
    """
    centred = patches - _mean(patches, crew)
    covariance = crew.total(blas.gram(centred)).astype(np.float64)
    covariance /= sum(crew.gather(len(centred)))
    values, vectors = scipy.linalg.eigh(covariance, lower=False, overwrite_a=True, driver="evd")
    kept = values > 1e-6 * values[-1]
    if values[-1] <= 0:
        return np.ones(len(values)), np.eye(len(values))
    return values[kept][::-1], vectors[:, kept][:, ::-1]


def _with_random_directions(first: np.ndarray, white: np.ndarray, count: int,
                            rng: np.random.Generator) -> np.ndarray:
    """`first`, and below it random directions of the white space up to `count` rows."""
    missing = count - len(first)
    directions = _unit_rows(rng.standard_normal((missing, len(white))))
    return np.concatenate([first, directions @ white]).astype(np.float32)
