"""Each kind of weights against its closed form or an oracle that shares no code with it."""
import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import skimage.data
import sklearn.decomposition
from toy_nets import image_input, layer, working_net

from ddinit import weights
from ddinit.net import Geometry
from ddinit.walk import Stop


def square(side, pad=0):
    """A kernel of one side, moved by 1."""
    return Geometry((side, side), (1, 1), (pad, pad), (1, 1))


def rng(seed=0):
    return np.random.default_rng(seed)


def correlated(count, size, seed=1):
    """Patches whose numbers are correlated, with means far from 0."""
    mixing = rng(seed).standard_normal((size, size))
    return (rng(seed + 1).standard_normal((count, size)) @ mixing + 5).astype(np.float32)


@pytest.fixture(scope="module")
def photo():
    """A photograph as a blob of two images (2, 3, height, width), BGR less the mean."""
    image = skimage.data.astronaut()[:, :, ::-1].astype(np.float32) - 110
    return np.stack([image, image[::-1]]).transpose(0, 3, 1, 2)


# ---------------------------------------------------------------------------------------------
# Gaussian
# ---------------------------------------------------------------------------------------------

def test_gaussian_numbers_are_standard_normal_of_the_asked_std():
    numbers = np.empty((500, 8, 5, 5), np.float32)
    weights.gaussian(numbers, rng(), 0.01)
    assert scipy.stats.kstest(numbers.ravel() / 0.01, "norm").pvalue > 0.01
    assert abs(np.corrcoef(numbers.reshape(500, -1)[:, :50].T) - np.eye(50)).max() < 0.2
    unscaled = np.empty_like(numbers)
    weights.gaussian(unscaled, rng())
    np.testing.assert_allclose(numbers, 0.01 * unscaled, rtol=1e-6)


def test_gaussian_numbers_fill_a_layer_of_caffe_in_place():
    working = working_net(image_input(1, 3, 4, 4) + layer(
        "fc", "InnerProduct", "data", "", "inner_product_param { num_output: 50 }"))
    weights.gaussian(working.affine[0].weights, rng(3))
    expected = np.empty((50, 48), np.float32)
    weights.gaussian(expected, rng(3))
    np.testing.assert_array_equal(working.affine[0].weights, expected)
    weights.gaussian(expected, rng(4))
    assert not np.array_equal(working.affine[0].weights, expected)


# ---------------------------------------------------------------------------------------------
# Patches
# ---------------------------------------------------------------------------------------------

def all_patches(blob, kernel, stride, pad, dilation):
    """im2col in the plainest numpy: every patch of every image."""
    images, _, height, width = blob.shape
    padded = np.pad(blob, ((0, 0), (0, 0), (pad[0],) * 2, (pad[1],) * 2))
    found = []
    for image in range(images):
        for top in range(0, height + 2 * pad[0] - dilation[0] * (kernel[0] - 1), stride[0]):
            for left in range(0, width + 2 * pad[1] - dilation[1] * (kernel[1] - 1), stride[1]):
                rows = top + dilation[0] * np.arange(kernel[0])
                columns = left + dilation[1] * np.arange(kernel[1])
                found.append(padded[image][:, rows][:, :, columns])
    return np.array(found)


@pytest.mark.parametrize("kernel, stride, pad, dilation", [
    ((3, 3), (1, 1), (0, 0), (1, 1)), ((2, 4), (3, 1), (1, 2), (1, 1)),
    ((3, 2), (1, 2), (2, 0), (2, 3)), ((1, 1), (1, 1), (4, 4), (2, 2)),
    ((3, 3), (2, 2), (7, 7), (3, 3)), ((9, 7), (1, 1), (0, 0), (1, 1)),
], ids=str)
def test_patches_are_those_that_a_convolution_reads_and_all_of_them_come(kernel, stride, pad,
                                                                         dilation):
    blob = np.arange(1, 2 * 2 * 9 * 7 + 1, dtype=np.float32).reshape(2, 2, 9, 7)
    expected = all_patches(blob, kernel, stride, pad, dilation)
    patches = weights.sample_patches(blob, 40 * len(expected), rng(),
                                     Geometry(kernel, stride, pad, dilation))
    assert patches.dtype == np.float32
    assert patches.shape[1:] == expected.shape[1:]
    expected, repeats = np.unique(expected.reshape(len(expected), -1), axis=0, return_counts=True)
    found, counts = np.unique(patches.reshape(len(patches), -1), axis=0, return_counts=True)
    np.testing.assert_array_equal(found, expected)
    assert scipy.stats.chisquare(counts, 40.0 * repeats).pvalue > 1e-4 or len(counts) == 1


def test_patches_of_a_group_are_those_of_its_channels():
    blob = rng(1).standard_normal((2, 6, 8, 8)).astype(np.float32)
    for group in range(3):
        part = blob[:, 2 * group:2 * group + 2]
        whole = weights.sample_patches(blob, 30, rng(5), square(3, pad=1))
        patches = weights.sample_patches(part, 30, rng(5), square(3, pad=1))
        np.testing.assert_array_equal(patches, whole[:, 2 * group:2 * group + 2])


def test_a_kernel_that_does_not_fit_is_refused():
    blob = np.zeros((1, 1, 4, 4), np.float32)
    with pytest.raises(ValueError, match="does not fit into .4, 4."):
        weights.sample_patches(blob, 1, rng(), square(5))
    with pytest.raises(ValueError, match="does not fit"):
        weights.sample_patches(blob, 1, rng(), square(3)._replace(dilation=(1, 2)))
    assert weights.sample_patches(blob, 1, rng(), square(6, pad=1)).shape == (1, 1, 6, 6)


def test_as_many_patches_are_drawn_as_filters_and_covariance_need_and_memory_allows(monkeypatch):
    assert weights.patch_count(363, 96, 1) == 9600  # CaffeNet's conv1
    assert weights.patch_count(1200, 128, 2) == 2 ** 22 // 1200  # conv2
    assert weights.patch_count(2304, 384, 1) == 2 * 2304  # conv3
    assert weights.patch_count(9, 2, 1) == 1000
    monkeypatch.setattr(weights, "PATCH_BYTES", 4 * 2304 * 3000)
    assert weights.patch_count(2304, 384, 1) == 3000
    assert weights.patch_count(2304, 2000, 1) == 4000


GROUPED = image_input(4, 3, 6, 6) + layer(
    "six", "Concat", "data data", "", "") + layer(
    "conv", "Convolution", "six", "", "convolution_param { num_output: 4 kernel_size: 2 group: 2 }")


def test_a_layers_filters_come_from_its_own_groups_patches_of_all_batches(monkeypatch):
    working = working_net(GROUPED, 4)
    bottom = working.blob("six").data
    seen = []

    def count_filters(patches, count, _):
        seen.append((np.array(patches), count))
        return np.full((count, patches.shape[1]), len(seen), np.float32)

    def load(batch):  # each number tells its batch and channel
        bottom[...] = 10 * batch + np.arange(6).reshape(1, 6, 1, 1)
    monkeypatch.setitem(weights.SCHEMES, "kmeans", count_filters)
    conv = working.affine[0]
    weights.set_filters(Stop(conv, load, None), working,
                        Geometry((2, 2), (1, 1), (0, 0), (1, 1)), "kmeans", 3, rng())
    wanted = weights.patch_count(12, 2, 2)
    for group, (patches, count) in enumerate(seen):
        assert (patches.shape, count) == ((wanted, 12), 2)
        batches, channels = np.divmod(patches.reshape(wanted, 3, 4), 10)
        np.testing.assert_array_equal(channels, np.broadcast_to(
            np.arange(3 * group, 3 * group + 3).reshape(3, 1), channels.shape))
        assert np.ptp(np.bincount(batches[:, 0, 0].astype(int))) <= 1
    assert len(seen) == 2
    np.testing.assert_array_equal(conv.weights[:, 0, 0, 0], [1, 1, 2, 2])


# ---------------------------------------------------------------------------------------------
# PCA and ZCA
# ---------------------------------------------------------------------------------------------

def outputs_covariance(patches, filters):
    """Covariance (filters, filters) of what the filters make of the patches."""
    products = (patches - patches.mean(axis=0)).astype(np.float64) @ filters.T
    return products.T @ products / len(products)


def test_pca_filters_are_scikit_learns_whitened_components():
    patches = correlated(400, 12)
    filters = weights.pca(patches, 7, rng())
    oracle = sklearn.decomposition.PCA(7, svd_solver="full").fit(patches.astype(np.float64))
    variances = oracle.explained_variance_ * 399 / 400  # theirs divides by n - 1
    expected = oracle.components_ / np.sqrt(variances)[:, None]
    signs = np.sign((filters * expected).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(filters, signs * expected, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(outputs_covariance(patches, filters), np.eye(7), atol=1e-3)


def test_zca_filters_are_rows_of_the_inverse_root_of_the_covariance():
    patches = correlated(400, 12)
    covariance = np.cov(patches.T, bias=True)
    expected = np.linalg.inv(scipy.linalg.sqrtm(covariance).real)
    filters = weights.zca(patches, 12, rng())
    order = [int(np.abs(expected - row).sum(axis=1).argmin()) for row in filters]
    assert sorted(order) == list(range(12))
    np.testing.assert_allclose(filters, expected[order], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(outputs_covariance(patches, filters), np.eye(12), atol=1e-3)


@pytest.mark.parametrize("kind", ["pca", "zca"])
def test_more_filters_than_rank_still_have_outputs_of_variance_1(kind):
    patches = correlated(300, 9)
    patches[:, 4] = 7  # a number that does not vary: rank 8
    patches[:, 6] = patches[:, 2] - patches[:, 3]  # one that follows from others: rank 7
    filters = weights.SCHEMES[kind](patches, 20, rng())
    assert filters.shape == (20, 9)
    variances = np.diag(outputs_covariance(patches, filters))
    assert np.abs(variances[7:] - 1).max() < 2e-3
    assert variances.min() > 0.1  # ZCA rows of dependent numbers share what variance there is
    assert len(np.unique(filters.round(5), axis=0)) == 20


def test_pca_of_fewer_patches_than_numbers():
    patches = correlated(10, 30)
    filters = weights.pca(patches, 12, rng())
    covariance = outputs_covariance(patches, filters)
    np.testing.assert_allclose(covariance[:9, :9], np.eye(9), atol=1e-3)
    np.testing.assert_allclose(np.diag(covariance), 1, atol=1e-3)


def test_a_mean_far_from_zero_does_not_count_as_variance():
    patches = correlated(400, 6)
    near = weights.pca(patches, 6, rng())
    far = weights.pca(patches + 500, 6, rng())
    np.testing.assert_allclose(np.abs(far), np.abs(near), rtol=0.02, atol=1e-3)


# ---------------------------------------------------------------------------------------------
# Whitening, patches and k-means
# ---------------------------------------------------------------------------------------------

def contrast_normalized(patches):
    """Coates & Ng's first step, in float64 and one patch at a time."""
    rows = []
    variances = patches.astype(np.float64).var(axis=1)
    for patch, variance in zip(patches.astype(np.float64), variances):
        rows.append((patch - patch.mean()) / np.sqrt(variance + 0.01 * variances.mean()))
    return np.array(rows) - np.mean(rows, axis=0)


def test_whitened_patches_have_the_identity_as_covariance(monkeypatch):
    monkeypatch.setattr(weights, "REGULARIZER", 1e-6)
    patches = correlated(2000, 12)
    # less their mean, patches have rank 11: one variance stays 0, whichever whitening it is
    white, factor = weights.whitened(patches.copy())
    values = np.linalg.eigvalsh(np.cov(white.T.astype(np.float64), bias=True))
    np.testing.assert_allclose(values[1:], 1, atol=2e-3)
    np.testing.assert_allclose(white @ factor.T, contrast_normalized(patches), atol=1e-3)


def test_regularizer_is_a_part_of_the_mean_variance():
    patches = correlated(500, 12)
    normal = contrast_normalized(patches)
    covariance = normal.T @ normal / len(normal)
    expected = covariance + 0.03 * np.trace(covariance) / 12 * np.eye(12)
    _, factor = weights.whitened(patches)
    lower = np.tril(factor).astype(np.float64)
    np.testing.assert_allclose(lower @ lower.T, expected, atol=1e-4)


@pytest.mark.parametrize("kind", sorted(weights.SCHEMES))
def test_no_scheme_changes_its_patches(kind):
    patches = correlated(100, 9)
    before = patches.copy()
    weights.SCHEMES[kind](patches, 5, rng())
    np.testing.assert_array_equal(patches, before)


def test_random_filters_answer_a_white_patch_with_its_projection():
    patches = correlated(300, 12)
    white, factor = weights.whitened(patches.copy())
    filters = weights.random_patches(patches, 5, rng())
    # a filter is w = L^-T d with |d| = 1 and d a white patch: d = L^T w
    directions = filters @ np.tril(factor)
    np.testing.assert_allclose(np.linalg.norm(directions, axis=1), 1, rtol=1e-4)
    cosines = directions @ (white / np.linalg.norm(white, axis=1, keepdims=True)).T
    np.testing.assert_allclose(cosines.max(axis=1), 1, rtol=1e-4)
    assert len(set(cosines.argmax(axis=1))) == 5


def plain_spherical_kmeans(white, centroids, iterations):
    """Coates & Ng 2012, section 2, one patch at a time."""
    for _ in range(iterations):
        sums = centroids.copy()
        for patch in white:
            products = centroids @ patch
            best = np.abs(products).argmax()
            sums[best] += products[best] * patch
        centroids = sums / np.linalg.norm(sums, axis=1, keepdims=True)
    return centroids


def test_spherical_kmeans_is_the_papers_loop():
    white = rng(1).standard_normal((200, 10)).astype(np.float32)
    start = weights.spherical_kmeans(white, 12, rng(2), iterations=0)
    np.testing.assert_allclose(np.linalg.norm(start, axis=1), 1, rtol=1e-5)
    cosines = start @ white.T / np.linalg.norm(white, axis=1)
    assert sorted(set(cosines.argmax(axis=1))) == sorted(cosines.argmax(axis=1))
    np.testing.assert_allclose(cosines.max(axis=1), 1, rtol=1e-5)
    centroids = weights.spherical_kmeans(white, 12, rng(2), iterations=4)
    expected = plain_spherical_kmeans(white.astype(np.float64), start.astype(np.float64), 4)
    np.testing.assert_allclose(centroids, expected, atol=1e-4)


def test_kmeans_of_fewer_patches_than_centroids_is_finite():
    centroids = weights.spherical_kmeans(rng(1).standard_normal((3, 5)).astype(np.float32), 4,
                                         rng(2))
    np.testing.assert_allclose(np.linalg.norm(centroids, axis=1), 1, rtol=1e-5)


def test_kmeans_finds_planted_clusters_of_either_sign():
    planted = np.linalg.qr(rng(1).standard_normal((20, 6)))[0].T
    chosen = rng(2).integers(0, 6, 900)
    signs = rng(3).choice([-4.0, 4.0], 900)
    white = signs[:, None] * planted[chosen] + 0.3 * rng(4).standard_normal((900, 20))
    centroids = weights.spherical_kmeans(white.astype(np.float32), 24, rng(5))
    cosines = np.abs(centroids @ planted.T)
    assert cosines.max(axis=0).min() > 0.95  # every cluster has a centroid


def test_kmeans_explains_photographs_better_than_chosen_patches(photo):
    patches = weights.sample_patches(photo, 3000, rng(1), square(6)).reshape(3000, -1)
    white, factor = weights.whitened(patches.copy())

    def explained(filters):
        directions = filters @ np.tril(factor)
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        return float((np.abs(white @ directions.T).max(axis=1) ** 2).mean())
    chosen = explained(weights.random_patches(patches, 64, rng(2)))
    assert explained(weights.kmeans(patches, 64, rng(2))) > 1.5 * chosen


def test_more_filters_than_numbers_or_patches_are_all_different():
    for kind in ("kmeans", "rand"):
        filters = weights.SCHEMES[kind](correlated(400, 27), 64, rng())
        assert len(np.unique(filters.round(6), axis=0)) == 64
        filters = weights.SCHEMES[kind](correlated(10, 27), 64, rng())
        assert filters.shape == (64, 27)
        assert np.isfinite(filters).all()
        assert len(np.unique(filters.round(6), axis=0)) == 64


def test_constant_patches_among_others_do_not_become_filters():
    patches = correlated(400, 27)
    patches[::2] = rng(1).uniform(0, 255, (200, 1))
    for kind in ("kmeans", "rand"):
        filters = weights.SCHEMES[kind](patches, 100, rng())
        unit = filters / np.linalg.norm(filters, axis=1, keepdims=True)
        assert np.triu(np.abs(unit @ unit.T), 1).max() < 0.999


@pytest.mark.parametrize("kind", sorted(weights.SCHEMES))
@pytest.mark.parametrize("value", [0, 7, 104.00699])
def test_constant_patches_alone_give_finite_filters_that_are_not_zero(kind, value):
    filters = weights.SCHEMES[kind](np.full((50, 12), value, np.float32), 20, rng())
    assert filters.shape == (20, 12)
    assert np.isfinite(filters).all()
    assert (np.abs(filters).max(axis=1) > 0).all()


@pytest.mark.parametrize("kind", sorted(weights.SCHEMES))
def test_filters_depend_on_the_seed_alone(kind, photo):
    patches = weights.sample_patches(photo, 800, rng(1), square(5)).reshape(800, -1)
    one = weights.SCHEMES[kind](patches, 32, rng(2))
    two = weights.SCHEMES[kind](patches, 32, rng(2))
    np.testing.assert_array_equal(one, two)
    assert one.dtype == np.float32
    if kind != "pca":  # which leaves nothing to chance
        assert not np.array_equal(weights.SCHEMES[kind](patches, 32, rng(3)), one)
