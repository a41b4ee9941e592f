"""nearest_neighbours.py: exact neighbors, features that are Caffe's."""

import cv2
import numpy as np
import pytest

import nearest_neighbours
from ddinit import processes, results
from ddinit.prototxt import import_caffe
from neighbours import features
from neighbours.features import nearest

NONE = np.empty(0, int)

NET = """
name: "tiny"
layer { name: "data" type: "Input" top: "data"
        input_param { shape { dim: 10 dim: 3 dim: 12 dim: 12 } } }
layer { name: "conv" type: "Convolution" bottom: "data" top: "conv"
        convolution_param { num_output: 4 kernel_size: 5 stride: 3
                            weight_filler { type: "xavier" } } }
layer { name: "relu" type: "ReLU" bottom: "conv" top: "conv" }
layer { name: "fc" type: "InnerProduct" bottom: "conv" top: "fc"
        inner_product_param { num_output: 6 weight_filler { type: "xavier" } } }
layer { name: "fc_relu" type: "ReLU" bottom: "fc" top: "fc" }
layer { name: "drop" type: "Dropout" bottom: "fc" top: "fc" }
layer { name: "last" type: "InnerProduct" bottom: "fc" top: "last"
        inner_product_param { num_output: 3 weight_filler { type: "xavier" } } }
layer { name: "prob" type: "Softmax" bottom: "last" top: "prob" }
"""


# ---------------------------------------------------------------------------------------------
# Searching
# ---------------------------------------------------------------------------------------------

def test_neighbors_of_vectors_at_known_angles():
    pool = np.array([[1, 0], [0, 2], [3, 3], [-1, 0], [0.3, 0.4]], np.float32)
    neighbors = nearest(np.array([[2, 0], [0, 5]], np.float32), pool, 3, [NONE, NONE])
    assert neighbors.places.tolist() == [[0, 2, 4], [1, 4, 2]]
    np.testing.assert_allclose(
        neighbors.similarity, [[1, np.sqrt(0.5), 0.6], [1, 0.8, np.sqrt(0.5)]], rtol=1e-6)


def test_excluded_rows_do_not_count():
    pool = np.array([[1, 0], [1, 0.1], [1, 0.2], [1, 0.3]], np.float32)
    neighbors = nearest(pool[:2], pool, 2, [np.array([0]), np.array([0, 1])])
    assert neighbors.places.tolist() == [[1, 2], [2, 3]]


def test_a_broken_image_is_nobodys_neighbor_and_a_zero_feature_has_cosine_0():
    pool = np.array([[np.nan, np.nan], [0, 0], [-1, 0], [1, 0]], np.float32)
    neighbors = nearest(np.array([[1, 0]], np.float32), pool, 3, [NONE])
    assert neighbors.places.tolist() == [[3, 1, 2]]
    assert neighbors.similarity.tolist() == [[1, 0, -1]]
    with pytest.raises(ValueError, match="fewer than 4 other images"):
        nearest(np.array([[1, 0]], np.float32), pool, 4, [NONE])
    with pytest.raises(ValueError, match="fewer than 1 other images"):
        nearest(np.array([[1, 0]], np.float32), pool[:1], 1, [NONE])


def test_models_are_called_like_their_files_or_their_folders_too():
    assert nearest_neighbours.model_names(["a/x.caffemodel", "b/y.caffemodel"]) == ["x", "y"]
    assert nearest_neighbours.model_names(["a/final.caffemodel", "b/final.caffemodel"]) == [
        "a_final", "b_final"]
    with pytest.raises(ValueError, match="Two models are called a_x"):
        nearest_neighbours.model_names(["a/x.caffemodel", "./a/x.caffemodel"])


# ---------------------------------------------------------------------------------------------
# Features and pages
# ---------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A net, a caffemodel, nine images of 12 x 12 pixels, a broken one, and lists of them."""
    path = tmp_path_factory.mktemp("neighbours")
    (path / "net.prototxt").write_text(NET)
    rng = np.random.default_rng(3)
    names = ["image %d.png" % number for number in range(9)]
    for name in names:
        cv2.imwrite(str(path / name), rng.integers(0, 256, (12, 12, 3)).astype(np.uint8))
    (path / "broken.png").write_bytes(b"no image")
    (path / "pool.txt").write_text("".join("%s 1\n" % name for name in ["broken.png", *names]))
    (path / "queries.txt").write_text("image 0.png\nimage 4.png\n")
    images = [cv2.imread(str(path / name)) for name in names]
    rows = processes.in_child(_save_and_forward, str(path / "net.prototxt"),
                            str(path / "w.caffemodel"), images)
    np.save(str(path / "expected.npy"), rows)
    return path


def _save_and_forward(net, weights, images):
    """Save random weights; return the whole net's blob 'fc' for images one at a time."""
    caffe = import_caffe()
    caffe.set_random_seed(5)
    built = caffe.Net(net, caffe.TEST)
    built.save(weights)
    rows = []
    for image in images:
        built.blobs["data"].data[...] = image.astype(np.float32).transpose(2, 0, 1) - np.reshape(
            [104, 117, 123], (3, 1, 1))
        built.forward()
        rows.append(np.array(built.blobs["fc"].data[0]))
    return np.array(rows)


@pytest.fixture
def children(monkeypatch):
    """Run what runs in a child here, where nothing can abort; list what was computed."""
    calls = []

    def here(function, *arguments):
        calls.append(arguments[-1])
        return function(*arguments)

    monkeypatch.setattr(features.processes, "in_child", here)
    return calls


def command(folder, *options):
    return nearest_neighbours.main([
        str(folder / "net.prototxt"), str(folder / "w.caffemodel"), "--root", str(folder),
        "--queries", str(folder / "queries.txt"), "--pool", str(folder / "pool.txt"),
        "--layer", "fc", "-k", "3", "--cpu", "--workers", "0", "--batch-size", "4", *options])


def test_the_command_finds_what_caffes_features_say_and_shows_it(folder, capfd):
    out = folder / "out"
    assert command(folder, "--out", str(out)) == 0
    assert "broken.png" in capfd.readouterr().err  # and it is nobody's neighbour
    rows = np.load(str(folder / "expected.npy"))
    assert (rows == 0).any()  # behind the ReLU
    report = results.read_json(str(out / "neighbours.json"))["models"]["w"]["queries"]
    for query, row in zip((0, 4), report):
        cosine = rows @ rows[query] / np.linalg.norm(rows, axis=1) / np.linalg.norm(rows[query])
        cosine[query] = -np.inf  # an image is not its own neighbour
        best = np.argsort(-cosine)[:3]
        assert [found["image"] for found in row["neighbours"]] == [
            str(folder / ("image %d.png" % number)) for number in best]
        np.testing.assert_allclose([found["cosine"] for found in row["neighbours"]], cosine[best],
                                   rtol=1e-5)
    assert cv2.imread(str(out / "w.png")).shape == (2 * 96 + 4, 4 * 100 + 4, 3)


def test_features_are_computed_once(folder, children):
    source = features.FeatureNet(str(folder / "net.prototxt"), str(folder / "w.caffemodel"), "fc",
                                 batch_size=4, workers=0)
    images = [str(folder / ("image %d.png" % number)) for number in range(9)]
    cache = str(folder / "cache")
    first = features.cached_features(source, images, cache)
    np.testing.assert_allclose(first, np.load(str(folder / "expected.npy")), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(features.cached_features(source, images, cache), first)
    assert len(children) == 1
    features.cached_features(source, images[:8], cache)
    features.cached_features(source._replace(layer="last"), images, cache)
    assert len(children) == 3  # another list and another layer are other features


def test_a_query_that_is_broken_is_an_error(folder, tmp_path, children, capsys):
    (tmp_path / "queries.txt").write_text("broken.png\n")
    assert command(folder, "--out", str(tmp_path / "out"), "--queries",
                   str(tmp_path / "queries.txt")) == 2
    assert "broken.png: this query has no feature" in capsys.readouterr().err


def test_a_layer_that_is_not_there_is_an_error_naming_those_that_are(
        folder, tmp_path, children, capsys):
    assert command(folder, "--out", str(tmp_path), "--layer", "fc7") == 2
    error = capsys.readouterr().err
    assert "no blob 'fc7'" in error
    assert "conv, fc, last" in error


def test_weights_without_one_of_the_layers_are_an_error(folder, tmp_path, children, capsys):
    (tmp_path / "net.prototxt").write_text(NET.replace('name: "fc"', 'name: "other"'))
    assert nearest_neighbours.main([
        str(tmp_path / "net.prototxt"), str(folder / "w.caffemodel"), "--root", str(folder),
        "--queries", str(folder / "queries.txt"), "--pool", str(folder / "pool.txt"), "--layer",
        "fc", "--cpu", "--workers", "0", "--out", str(tmp_path)]) == 2
    assert "no weights for layer 'other'" in capsys.readouterr().err
