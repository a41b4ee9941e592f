"""Images by pattern, folder and list; means; batches from files, from arrays and from the net."""
import logging
import os

import cv2
import numpy as np
import pytest
from toy_nets import image_input, layer, parsed

from ddinit.images import (
    HeldBatches,
    ImageBatches,
    batches_of,
    find_images,
    is_cut_short,
    mean_for,
    read_batches,
    read_image,
    read_mean,
)
from ddinit.prototxt import Input, build_net, caffe_messages


def save(path, color, size=(10, 8)):
    """An image of one color (BGR) of size (width, height)."""
    encoded = cv2.imencode(path.suffix, np.full(size[::-1] + (3,), color, np.uint8))[1]
    with open(str(path), "wb") as file:  # OpenCV does not open names that are not UTF-8
        file.write(encoded.tobytes())
    return str(path)


@pytest.fixture
def three(tmp_path):
    """The folder of images a.png, b.png and sub/c.png."""
    (tmp_path / "sub").mkdir()
    for name in ("b.png", "a.png", "sub/c.png"):
        save(tmp_path / name, (1, 1, 1))
    return tmp_path


def relative(paths, folder):
    return [os.path.relpath(path, str(folder)) for path in paths]


# ---------------------------------------------------------------------------------------------
# Finding
# ---------------------------------------------------------------------------------------------

def test_a_folder_and_a_pattern_stand_for_files_sorted_and_without_folders(three):
    assert relative(find_images(str(three)), three) == ["a.png", "b.png"]
    assert relative(find_images(str(three / "**" / "*.png")), three) == [
        "a.png", "b.png", "sub/c.png"]
    assert find_images(str(three / "b.png")) == [str(three / "b.png")]


def test_several_of_these_are_taken_in_their_order(three):
    wanted = [str(three / "sub"), str(three / "a.png"), three / "*.png"]
    assert relative(find_images(wanted), three) == ["sub/c.png", "a.png", "a.png", "b.png"]


def test_a_path_may_be_one_of_pathlib(three):
    assert relative(find_images(three / "sub"), three) == ["sub/c.png"]


def test_names_with_the_signs_of_patterns_are_names_where_such_files_are(tmp_path):
    folder = tmp_path / "photos [1]"
    folder.mkdir()
    save(folder / "a[b].png", (1, 1, 1))
    assert relative(find_images(str(folder / "a[b].png")), folder) == ["a[b].png"]
    assert relative(find_images(str(folder)), folder) == ["a[b].png"]


@pytest.mark.parametrize("wanted", ["*.jpg", "none", "sub/none.png", ""])
def test_what_has_no_images_is_named(three, wanted):
    (three / "sub" / "c.png").unlink()
    with pytest.raises(ValueError, match="no images there") as error:
        find_images(str(three / "sub") if not wanted else str(three / wanted))
    assert str(three) in str(error.value)


@pytest.mark.parametrize("text", [
    "a.png\nsub/c.png\n", "a.png 0\nsub/c.png 17\n", "a.png\t3\r\n\r\n  sub/c.png\t4\r\n",
], ids=["names", "labels", "tabs and CR LF"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("suffix", [".txt", ".lst"])
def test_a_list_names_images_with_and_without_labels(three, text, encoding, suffix):
    path = three / ("list" + suffix)
    path.write_bytes(text.encode(encoding))
    assert relative(find_images(str(path)), three) == ["a.png", "sub/c.png"]


def test_a_list_counts_from_where_the_command_runs_and_from_its_own_folder(three, monkeypatch):
    (three / "lists").mkdir()
    (three / "lists" / "list.txt").write_text("sub/c.png\n../b.png\n%s\n" % (three / "a.png"))
    monkeypatch.chdir(three)
    found = find_images("lists/list.txt")
    assert [os.path.normpath(path) for path in found] == ["sub/c.png", "b.png",
                                                          str(three / "a.png")]


def test_names_in_a_list_may_have_spaces_and_be_no_unicode(tmp_path):
    name = "\u6d4b\u8bd5 1.png".encode("gbk")
    path = os.path.join(os.fsencode(str(tmp_path)), name)
    save(tmp_path / "spare.png", (10, 20, 30))
    os.rename(str(tmp_path / "spare.png"), path)
    save(tmp_path / "two words.png", (1, 2, 3))
    (tmp_path / "list.txt").write_bytes(name + b" 5\ntwo words.png\n")
    found = find_images(str(tmp_path / "list.txt"))
    assert os.fsencode(found[0]) == path
    assert read_image(found[0], 2, 2)[:, 0, 0].tolist() == [10, 20, 30]
    assert os.path.basename(found[1]) == "two words.png"


def test_lists_that_name_nothing_or_what_is_not_there_are_told(three):
    path = three / "list.txt"
    for text, message in (("\n \n", "the list names no images"),
                          ("a.png\ngone.png 4\n", "its image gone.png 4 is not there"),
                          ("sub\n", "its image sub is not there")):
        path.write_text(text)
        with pytest.raises(ValueError) as error:
            find_images(str(path))
        assert str(error.value) == "%s: %s" % (path, message)


# ---------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------

def test_images_are_bgr_of_the_asked_size_and_grey_if_asked(tmp_path):
    path = save(tmp_path / "image.png", (10, 100, 200))
    image = read_image(path, 5, 7)
    assert (image.dtype, image.shape) == (np.uint8, (3, 5, 7))
    assert [channel[0, 0] for channel in image] == [10, 100, 200]
    assert all((channel == channel[0, 0]).all() for channel in image)
    grey = read_image(path, 5, 7, grey=True)
    assert grey.shape == (1, 5, 7)
    assert abs(int(grey[0, 0, 0]) - (0.114 * 10 + 0.587 * 100 + 0.299 * 200)) <= 1


def test_unreadable_images_are_named(tmp_path):
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "empty.jpg").write_bytes(b"")
    for path in ("text.jpg", "empty.jpg"):
        with pytest.raises(ValueError, match="not an image that OpenCV can read") as error:
            read_image(str(tmp_path / path), 4, 4)
        assert str(tmp_path / path) in str(error.value)


def noise(suffix, parameters=()):
    """The bytes of a picture that takes some kilobytes."""
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3)).astype(np.uint8)
    return cv2.imencode(suffix, pixels, list(parameters))[1].tobytes()


@pytest.mark.parametrize("parameters", [[], [cv2.IMWRITE_JPEG_PROGRESSIVE, 1]],
                         ids=["baseline", "progressive"])
@pytest.mark.parametrize("left", [-1, -800, 4000])
def test_a_jpeg_cut_short_is_read_as_far_as_it_goes_with_a_warning(tmp_path, caplog, parameters,
                                                                  left):
    whole, cut = tmp_path / "whole.jpg", tmp_path / "cut.jpg"
    whole.write_bytes(noise(".jpg", parameters))
    cut.write_bytes(noise(".jpg", parameters)[:left])
    with caplog.at_level(logging.WARNING, "magic_init"):
        complete = read_image(str(whole), 60, 80)
        assert caplog.messages == []
        found = read_image(str(cut), 60, 80)
    assert caplog.messages == ["%s: the image file is cut short, a part of it is missing" % cut]
    if not parameters:
        np.testing.assert_array_equal(found[:, :16], complete[:, :16])
    np.testing.assert_array_equal(found, cv2.imread(str(cut)).transpose(2, 0, 1))


def test_a_png_cut_short_is_named_whether_opencv_reads_its_beginning_or_not(tmp_path, caplog):
    path = tmp_path / "cut.png"
    path.write_bytes(noise(".png")[:-800])
    try:
        with caplog.at_level(logging.WARNING, "magic_init"):
            read_image(str(path), 60, 80)
        assert caplog.messages == [
            "%s: the image file is cut short, a part of it is missing" % path]
    except ValueError as error:  # OpenCV 4.11 does not
        assert str(error) == "%s: not an image that OpenCV can read" % path


def test_what_follows_or_lies_within_an_image_is_not_taken_for_its_end():
    jpeg = noise(".jpg")
    thumbnail = b"\xff\xd8\xff\xe1\xff\xff" + noise(".jpg") + jpeg[2:]
    assert not is_cut_short(jpeg + b"\0" * 100)
    assert not is_cut_short(thumbnail)
    assert is_cut_short(thumbnail[:-1000])
    assert not is_cut_short(noise(".png") + b"\n")
    assert not is_cut_short(b"GIF89a and more")


# ---------------------------------------------------------------------------------------------
# Means
# ---------------------------------------------------------------------------------------------

def binaryproto(path, array, old=False):
    blob = caffe_messages().BlobProto(data=np.ravel(array))
    if old:
        blob.num, blob.channels, blob.height, blob.width = array.shape
    else:
        blob.shape.dim.extend(array.shape)
    path.write_bytes(blob.SerializeToString())
    return str(path)


@pytest.mark.parametrize("form", ["npy", "binaryproto", "old binaryproto"])
@pytest.mark.parametrize("shape", [(3, 4, 5), (1, 3, 4, 5), (1, 4, 5)], ids=str)
def test_mean_images_are_read_from_either_format(tmp_path, form, shape):
    image = np.random.default_rng(0).uniform(0, 255, shape).astype(np.float32)
    if form == "npy":
        np.save(str(tmp_path / "mean.npy"), image.astype(np.float64))
        found = read_mean(str(tmp_path / "mean.npy"))
    else:
        four = image.reshape((1,) * (4 - image.ndim) + shape)
        found = read_mean(binaryproto(tmp_path / "mean.binaryproto",
                                      four if "old" in form else image, "old" in form))
    assert found.shape == shape[-3:]
    np.testing.assert_array_equal(found, image.reshape(found.shape))


def test_a_mean_file_may_hold_a_color_or_a_grey_image(tmp_path):
    for array, shape in ((np.array([1.0, 2, 3]), (3, 1, 1)), (np.ones((4, 5)), (1, 4, 5)),
                         (np.array([[[7.0]]]), (1, 1, 1))):
        np.save(str(tmp_path / "mean.npy"), array)
        assert read_mean(str(tmp_path / "mean.npy")).shape == shape


def test_files_that_are_no_means_are_named(tmp_path):
    (tmp_path / "text.npy").write_text("1 2 3")
    (tmp_path / "text.binaryproto").write_text("1 2 3")
    np.save(str(tmp_path / "wide.npy"), np.ones((4, 5, 6, 7)))
    np.save(str(tmp_path / "hwc.npy"), np.ones((4, 5, 3)))
    for name in ("text.npy", "text.binaryproto", "wide.npy", "hwc.npy", "gone.npy"):
        with pytest.raises(ValueError) as error:
            read_mean(str(tmp_path / name))
        assert str(error.value).startswith(str(tmp_path / name) + ": ")


def test_means_broadcast_to_the_nets_images(tmp_path):
    path = binaryproto(tmp_path / "mean.binaryproto",
                       np.stack([np.full((4, 5), value) for value in (10, 20, 30)]))
    images = np.zeros((3, 8, 6))
    for mean, expected in ((5, [5, 5, 5]), ((1, 2, 3), [1, 2, 3]), ([4.0], [4, 4, 4]),
                           (path, [10, 20, 30]), (read_mean(path), [10, 20, 30])):
        found = images - mean_for(mean, images.shape)
        assert found.shape == images.shape
        np.testing.assert_allclose(found[:, 3, 3], -np.array(expected, float))


def test_a_mean_image_is_resized_to_the_nets(tmp_path):
    ramp = np.broadcast_to(np.arange(8, dtype=np.float32), (3, 8, 8))
    np.testing.assert_allclose(mean_for(ramp, (3, 4, 4))[0], np.broadcast_to(
        [0.5, 2.5, 4.5, 6.5], (4, 4)))


def test_grey_nets_get_the_grey_of_a_color_and_one_number_as_it_is():
    grey = 0.114 * 100 + 0.587 * 10 + 0.299 * 20
    np.testing.assert_allclose(mean_for((100, 10, 20), (1, 4, 4)).ravel(), grey, rtol=1e-5)
    np.testing.assert_allclose(mean_for(128, (1, 4, 4)).ravel(), 128)
    image = np.stack([np.full((4, 4), value, np.float32) for value in (100, 10, 20)])
    np.testing.assert_allclose(mean_for(image, (1, 4, 4)), grey, rtol=1e-5)


def test_a_mean_of_other_channels_is_refused():
    with pytest.raises(ValueError, match="the mean has 2 channels, the net's input 3"):
        mean_for((1, 2), (3, 4, 4))


# ---------------------------------------------------------------------------------------------
# Batches
# ---------------------------------------------------------------------------------------------

def net_for(*shape):
    return build_net(parsed(image_input(*shape) + layer("relu", "ReLU", "data")))


@pytest.mark.parametrize("scale", [1, 1 / 256])
def test_files_come_less_the_mean_and_scaled_in_their_order(tmp_path, scale):
    paths = [save(tmp_path / ("%d.png" % number), (number, 50 + number, 100 + number))
             for number in range(5)]
    batches = ImageBatches(paths, Input("data", (2, 3, 4, 6)), (1, 2, 3), scale)
    assert (batches.count, batches.size) == (2, 2)  # the fifth image makes no batch
    net = net_for(2, 3, 4, 6)
    for batch in (1, 0, 3):
        batches.load(batch, net)
        for row, number in zip(net.blobs["data"].data, (batch % 2 * 2, batch % 2 * 2 + 1)):
            for channel, value in enumerate((number - 1, 48 + number, 97 + number)):
                np.testing.assert_allclose(row[channel], value * scale, rtol=1e-6)


def test_grey_nets_get_grey_images_less_the_grey_mean(tmp_path):
    paths = [save(tmp_path / "a.png", (60, 60, 60))]
    net = net_for(1, 1, 4, 4)
    ImageBatches(paths, Input("data", (1, 1, 4, 4)), (100, 10, 20), 1).load(0, net)
    np.testing.assert_allclose(net.blobs["data"].data,
                               60 - (0.114 * 100 + 0.587 * 10 + 0.299 * 20), rtol=1e-5)


def test_a_broken_image_is_an_error_when_its_batch_is_needed(tmp_path):
    paths = [save(tmp_path / "a.png", (1, 2, 3)), str(tmp_path / "broken.png")]
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    batches = ImageBatches(paths, Input("data", (1, 3, 4, 4)), (0, 0, 0), 1)
    net = net_for(1, 3, 4, 4)
    batches.load(0, net)
    with pytest.raises(ValueError, match="broken.png"):
        batches.load(1, net)


def test_an_image_that_vanishes_is_an_error_that_names_it(tmp_path):
    batches = ImageBatches([str(tmp_path / "gone.png")], Input("data", (1, 3, 4, 4)), 0, 1)
    with pytest.raises(OSError, match="gone.png"):
        batches.load(0, net_for(1, 3, 4, 4))


def test_held_batches_are_loaded_round_and_round_and_by_name():
    net = build_net(parsed(image_input(2, 3, name="a") + image_input(2, 1, name="b")
                           + layer("cat", "Concat", "a b")))
    batches = HeldBatches([{"a": np.full((2, 3), number), "b": np.full((2, 1), -number)}
                           for number in range(3)])
    assert (batches.count, batches.size, batches.names) == (3, 2, ["a", "b"])
    batches.load(4, net)
    assert (net.blobs["a"].data == 1).all() and (net.blobs["b"].data == -1).all()
    batches.only(["a"]).load(2, net)
    assert (net.blobs["a"].data == 2).all() and (net.blobs["b"].data == -1).all()


def test_a_nets_own_data_layers_are_read_batch_by_batch():
    net = build_net(parsed(
        layer("made", "DummyData", "", "x y", "dummy_data_param { shape { dim: 4 dim: 2 } "
              "shape { dim: 4 } data_filler { type: 'gaussian' } data_filler { value: 3 } }")
        + layer("relu", "ReLU", "x")))
    batches = read_batches(net, ["made"], 3)
    assert (batches.count, batches.size, batches.names) == (3, 4, ["x", "y"])
    seen = []
    for number in range(3):
        net.blobs["x"].data[...] = 0
        batches.load(number, net)
        seen.append(np.array(net.blobs["x"].data))
        assert (net.blobs["y"].data == 3).all()
    assert (seen[0] != seen[1]).any() and (seen[1] != seen[2]).any()


@pytest.mark.parametrize("arguments, expected", [
    ((20, 16, 10), (10, 2)), ((160, 16, 10), (16, 10)), ((3, 16, 10), (3, 1)),
    ((1000, 16, 10), (16, 10)), ((17, 16, 1), (16, 1)), ((33, 16, 10), (11, 3)),
    ((1, 1, 1), (1, 1))])
def test_as_many_images_are_used_as_were_asked_for_and_are_there(arguments, expected):
    assert batches_of(*arguments) == expected
