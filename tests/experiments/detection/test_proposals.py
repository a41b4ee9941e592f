"""Proposals: the .mat layout, the search, its cache, its errors."""
import os

import cv2
import numpy as np
import pytest
import scipy.io
from skimage import data as photographs

import proposals as script
from detection import proposals
from detection.proposals import Search


def cells(arrays):
    """A MATLAB cell array of these arrays."""
    content = np.empty((1, len(arrays)), object)
    for number, array in enumerate(arrays):
        content[0, number] = array
    return content


def write_mat(path, arrays, **more):
    scipy.io.savemat(str(path), {"boxes": cells(arrays), **more})
    return str(path)


# ---------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------

def test_columns_are_reordered_and_counted_from_0_without_wrapping(tmp_path):
    # y1 x1 y2 x2 from 1, unsigned as the public files are; a 0 must become -1, not 65535.
    path = write_mat(tmp_path / "a.mat", [np.array([[2, 11, 40, 50], [0, 1, 3, 4]], np.uint16),
                                          np.array([[1, 1, 1, 1]], np.uint16)])
    first, second = proposals.read_mat(path, ["000001", "000002"])
    assert first.tolist() == [[10, 1, 49, 39], [0, -1, 3, 2]]
    assert second.tolist() == [[0, 0, 0, 0]]
    assert first.dtype == np.float32


def test_a_file_for_another_number_of_images_is_refused(tmp_path):
    path = write_mat(tmp_path / "a.mat", [np.ones((1, 4))])
    with pytest.raises(ValueError, match="has proposals for 1 images, but the split has 2 images"):
        proposals.read_mat(path, ["000001", "000002"])


def test_a_file_of_other_images_is_refused(tmp_path):
    path = write_mat(tmp_path / "a.mat", [np.ones((1, 4))] * 2,
                     images=cells([np.array(["000001"]), np.array(["000005"])]))
    with pytest.raises(ValueError, match="for image 000005, but image 2 of the split is 000002"):
        proposals.read_mat(path, ["000001", "000002"])


@pytest.mark.parametrize("cell", [np.zeros((0, 4)), np.ones((2, 5)), np.array(["text"])])
def test_an_image_without_boxes_is_named(tmp_path, cell):
    path = write_mat(tmp_path / "a.mat", [np.ones((1, 4)), cell])
    with pytest.raises(ValueError, match="image 000002 has no boxes"):
        proposals.read_mat(path, ["000001", "000002"])


def test_a_file_without_boxes_is_refused_by_what_it_holds(tmp_path):
    path = str(tmp_path / "a.mat")
    scipy.io.savemat(path, {"candidates": np.ones((1, 4))})
    with pytest.raises(ValueError, match="has no variable 'boxes', only candidates"):
        proposals.read_mat(path, ["000001"])


def test_what_is_no_mat_file_is_refused(tmp_path):
    (tmp_path / "a.mat").write_bytes(b"not a MATLAB file" * 20)
    with pytest.raises(ValueError, match="a.mat: not a .mat file"):
        proposals.read_mat(str(tmp_path / "a.mat"), ["000001"])
    with pytest.raises(ValueError, match="b.mat: cannot read the proposals"):
        proposals.read_mat(str(tmp_path / "b.mat"), ["000001"])


# ---------------------------------------------------------------------------------------------
# Search
# ---------------------------------------------------------------------------------------------

SMALL = Search(side=100)


@pytest.fixture
def images(tmp_path):
    """Two photographs as files."""
    paths = []
    for name in ("coffee", "chelsea"):
        path = str(tmp_path / (name + ".png"))
        picture = cv2.resize(getattr(photographs, name)()[:, :, ::-1], (150, 100))
        assert cv2.imwrite(path, picture)
        paths.append(path)
    return paths


def test_a_square_on_a_plain_ground_is_among_its_proposals_in_the_image_s_own_pixels():
    image = np.full((300, 400, 3), 90, np.uint8)
    image[60:160, 200:320] = (30, 60, 220)
    found = proposals.find(image, Search(side=200))
    assert np.abs(found - [200, 60, 319, 159]).max(axis=1).min() <= 2


def test_proposals_are_the_same_each_time_each_once_and_inside():
    image = cv2.resize(photographs.coffee(), (150, 100))
    found = proposals.find(image, SMALL)
    np.testing.assert_array_equal(found, proposals.find(image, SMALL))
    assert len(found) == len(np.unique(found, axis=0)) > 20
    assert found.min() >= 0 and found[:, 2].max() <= 149 and found[:, 3].max() <= 99
    assert (found[:, 2:] - found[:, :2] + 1).min() >= proposals.SMALLEST


def test_computed_proposals_are_kept_and_not_computed_again(images, tmp_path, monkeypatch):
    cache = str(tmp_path / "cache")
    first = list(proposals.compute(images, SMALL, cache, processes=2))
    for path, found in zip(images, first):
        np.testing.assert_array_equal(found, proposals.find(cv2.imread(path), SMALL))
    monkeypatch.setattr(proposals, "_searched", lambda *_: pytest.fail("computed again"))
    for found, again in zip(first, proposals.compute(images, SMALL, cache, 1)):
        np.testing.assert_array_equal(found, again)
    assert len(os.listdir(cache)) == 2


def test_a_broken_file_in_the_cache_is_computed_again(images, tmp_path):
    cache = str(tmp_path / "cache")
    (first,) = proposals.compute(images[:1], SMALL, cache, 1)
    (name,) = os.listdir(cache)
    with open(os.path.join(cache, name), "r+b") as file:
        file.truncate(100)
    (again,) = proposals.compute(images[:1], SMALL, cache, 1)
    np.testing.assert_array_equal(first, again)


def test_other_parameters_and_other_pixels_are_kept_apart(images, tmp_path):
    cache = str(tmp_path / "cache")
    list(proposals.compute(images[:1], SMALL, cache, 1))
    list(proposals.compute(images[:1], SMALL._replace(base_k=100), cache, 1))
    assert cv2.imwrite(images[0], cv2.flip(cv2.imread(images[0]), 1))
    list(proposals.compute(images[:1], SMALL, cache, 1))
    assert len(os.listdir(cache)) == 3


def test_an_image_that_cannot_be_read_or_has_no_regions_is_named(tmp_path):
    broken, tiny = str(tmp_path / "broken.jpg"), str(tmp_path / "tiny.png")
    with open(broken, "wb") as file:
        file.write(b"no image")
    assert cv2.imwrite(tiny, np.zeros((1, 300, 3), np.uint8))
    cache = str(tmp_path / "cache")
    with pytest.raises(ValueError, match="broken.jpg is not an image"):
        list(proposals.compute([broken], SMALL, cache, 1))
    with pytest.raises(ValueError, match="tiny.png: selective search finds no boxes"):
        list(proposals.compute([tiny], SMALL, cache, 1))
    with pytest.raises(ValueError, match="none.jpg: cannot read the image"):
        list(proposals.compute([str(tmp_path / "none.jpg")], SMALL, cache, 1))


def test_the_command_fills_the_cache_of_a_split(voc_folder, tmp_path, capsys):
    cache = str(tmp_path / "cache")
    status = script.main([voc_folder, "test", "--cache", cache, "--search-side", "64",
                             "--processes", "1"])
    assert status == 0
    assert len(os.listdir(cache)) == 8
    assert "test: 8 images with " in capsys.readouterr().out


def test_the_command_says_in_a_line_what_is_wrong(voc_folder, tmp_path, capsys):
    assert script.main([voc_folder, "test", "--search-side", "10"]) == 2
    assert "--search-side has to be at least 16 pixels" in capsys.readouterr().err


def test_an_opencv_without_contrib_modules_is_named_only_where_it_matters(images, tmp_path,
                                                                          monkeypatch):
    cache = str(tmp_path / "cache")
    list(proposals.compute(images[:1], SMALL, cache, 1))
    monkeypatch.delattr(cv2, "ximgproc")
    assert len(list(proposals.compute(images[:1], SMALL, cache, 1))) == 1  # it was kept
    with pytest.raises(ValueError, match="opencv-contrib-python-headless"):
        list(proposals.compute(images, SMALL, cache, 1))
