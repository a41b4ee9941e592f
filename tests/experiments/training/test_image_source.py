"""Batches: a function of seed and number, whoever computes them; crops; broken images."""
import multiprocessing
import os
import signal

import numpy as np
import pytest

import make_voc_lmdb
from classification.images import CropsToScore, VocImages
from ddinit.prototxt import build_net, caffe_messages
from imagenet.arrays import ArrayImages
from training.batches import Crops, ImageBatches, make_batches, random_crop
from training.nets import image_source_layer
from training.prefetch import Batch, Prefetcher
from voc.folders import Voc

CROPS = Crops(24, 32)
VOC = "classification.images.VocImages"


def voc_batches(folder, seed=0, broken_limit=10):
    return (VOC, {"root": folder, "split": "trainval"}, CROPS._asdict(), 5, seed, broken_limit)



# ---------------------------------------------------------------------------------------------
# Batches
# ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("workers", [0, 1, 3])
def test_batches_are_the_same_whoever_computes_them_and_wherever_one_starts(voc_folder, workers):
    batch_of = make_batches(*voc_batches(voc_folder))
    feed = Prefetcher(make_batches, voc_batches(voc_folder), workers, slot_bytes=100000)
    feed.start(2)
    for number in range(2, 8):
        images, labels = feed.next()
        expected = batch_of(number).arrays
        assert (images == expected[0]).all() and (labels == expected[1]).all()
    feed.start(5)
    assert (feed.next()[0] == batch_of(5).arrays[0]).all()
    feed.close()


def test_another_seed_gives_other_batches(voc_folder):
    first, other = (make_batches(*voc_batches(voc_folder, seed))(0).arrays[0] for seed in (0, 1))
    assert (first != other).any()


def test_every_epoch_shows_every_image_once_in_a_new_order(tmp_path):
    path = str(tmp_path / "seven.npz")
    np.savez(path, images=np.zeros((7, 9, 9, 3), np.uint8), labels=np.arange(7))
    batch_of = ImageBatches(ArrayImages(path, 7), Crops(9, 9), 3, seed=0)
    shown = np.concatenate([batch_of(number).arrays[1] for number in range(7)])
    epochs = shown.reshape(3, 7)
    assert (np.sort(epochs) == np.arange(7)).all()
    assert (epochs[0] != epochs[1]).any() and (epochs[1] != epochs[2]).any()


def test_labels_are_1_0_and_minus_1_for_only_difficult(voc_folder):
    dataset = VocImages(voc_folder, "trainval")
    flags = Voc(voc_folder).labels("trainval")
    assert set(np.unique(flags)) == {-1, 0, 1}
    assert (dataset.labels[flags == 1] == 1).all()
    assert (dataset.labels[flags == -1] == 0).all()
    assert (dataset.labels[flags == 0] == -1).all()


def test_a_database_gives_the_batches_of_its_folder(tmp_path, voc_folder):
    database = str(tmp_path / "trainval.lmdb")
    assert make_voc_lmdb.main(["--voc", voc_folder, database]) == 0
    of_folder, of_database = (make_batches(*voc_batches(root)) for root in (voc_folder, database))
    assert (of_folder(1).arrays[0] == of_database(1).arrays[0]).all()


@pytest.mark.parametrize("arrays, complaint", [
    ({"x": np.zeros((2, 4, 4, 3), np.uint8)}, "has no arrays 'images' and 'labels'"),
    ({"images": np.zeros((2, 4, 4, 3), np.uint8), "labels": [0, 2]}, "there are 2 classes"),
    ({"images": np.zeros((2, 4, 4, 3)), "labels": [0, 1]}, "not uint8"),
    ({"images": np.zeros((2, 4, 4, 3), np.uint8), "labels": [0]}, "2 images, but labels")])
def test_arrays_that_are_no_images_are_an_error_that_names_the_file(tmp_path, arrays, complaint):
    np.savez(str(tmp_path / "a.npz"), **arrays)
    with pytest.raises(ValueError, match="a.npz: .*" + complaint):
        ArrayImages(str(tmp_path / "a.npz"), 2)


# ---------------------------------------------------------------------------------------------
# Crops
# ---------------------------------------------------------------------------------------------

def gradient_image(height, width):
    """An image whose first two channels hold each pixel's x and y."""
    image = np.zeros((height, width, 3), np.uint8)
    image[..., 0] = np.arange(width)
    image[..., 1] = np.arange(height)[:, None]
    return image


def test_crops_show_squares_of_half_to_twice_the_size_inside_the_image_mirrored_half_the_time():
    image = gradient_image(100, 200)
    crops = Crops(40, 40, mean=(0, 0, 0))
    scales, mirrored, rows = [], 0, []
    for seed in range(300):
        x, y, _ = random_crop(image, crops, np.random.default_rng(seed))
        across = (x[20, -2] - x[20, 1]) / 37
        down = (y[-2, 20] - y[1, 20]) / 37
        assert abs(across) == pytest.approx(down, abs=0.06)
        assert x.min() >= 0 and x.max() <= 199 and y.max() <= 99
        mirrored += across < 0
        scales.append(down)
        rows.append(y[20, 20])
    assert 0.45 < min(scales) < 0.6 and 1.9 < max(scales) < 2.05
    assert np.mean(scales) == pytest.approx(1.25, abs=0.08)  # uniform in 0.5..2
    assert 120 < mirrored < 180
    assert min(rows) < 20 and max(rows) > 80


def test_a_crop_of_scale_1_is_a_window_of_the_image_or_its_mirror_image():
    image = gradient_image(50, 60)
    crops = Crops(50, 52, min_scale=1, max_scale=1, mean=(1, 2, 3), factor=2.0)
    windows = [(image[:, left:left + 52].transpose(2, 0, 1) - np.reshape([1.0, 2, 3], (3, 1, 1)))
               * 2 for left in range(9)]
    found = set()
    for seed in range(100):
        crop = random_crop(image, crops, np.random.default_rng(seed))
        found.update((left, mirrored) for left, window in enumerate(windows)
                     for mirrored in (False, True)
                     if (crop == (window[..., ::-1] if mirrored else window)).all())
    assert found == {(left, mirrored) for left in range(9) for mirrored in (False, True)}


def test_an_image_smaller_than_the_crop_fills_it():
    image = gradient_image(10, 12)
    x, y, _ = random_crop(image, Crops(40, 40, mean=(0, 0, 0)), np.random.default_rng(0))
    assert y.min() == 0 and y.max() == 9
    assert x.max() - x.min() == pytest.approx(9, abs=1)


def test_crops_to_score_are_the_same_for_one_seed(voc_folder):
    dataset = VocImages(voc_folder, "test")
    first, again, other = (CropsToScore(dataset, CROPS, 4, seed)(2).arrays[0]
                           for seed in (0, 0, 1))
    assert first.shape == (4, 3, 24, 32)
    assert (first == again).all() and (first != other).any() and (first[0] != first[1]).any()


# ---------------------------------------------------------------------------------------------
# What may go wrong
# ---------------------------------------------------------------------------------------------

def broken(voc_folder, *numbers):
    for number in numbers:
        path = os.path.join(voc_folder, "JPEGImages", "%06d.jpg" % number)
        with open(path, "wb") as file:
            file.write(b"no image")


def test_a_broken_image_is_named_once_and_replaced_by_the_next(voc_folder, caplog):
    whole = make_batches(*voc_batches(voc_folder))
    order = [tuple(row) for number in range(3) for row in whole(number).arrays[1]]
    broken(voc_folder, 3)
    feed = Prefetcher(make_batches, voc_batches(voc_folder), 2, slot_bytes=100000)
    feed.start(0)
    labels = [tuple(row) for _ in range(9) for row in feed.next()[1]]
    feed.close()
    assert [record.getMessage() for record in caplog.records] == [
        "skipped: image 000003 of %s is not an image that OpenCV can read" % voc_folder]
    batches = make_batches(*voc_batches(voc_folder))
    assert labels == [tuple(row) for number in range(9) for row in batches(number).arrays[1]]
    assert sum(now != before for now, before in zip(labels, order)) <= 2


def test_more_broken_images_than_allowed_are_an_error_that_names_one(voc_folder):
    broken(voc_folder, 1, 4, 7, 9)
    feed = Prefetcher(make_batches, voc_batches(voc_folder), 1, 100000, broken_limit=3)
    feed.start(0)
    with pytest.raises(ValueError, match="More than 3 images are broken; the last is image 00000"):
        for _ in range(10):
            feed.next()
    feed.close()


def test_a_folder_of_broken_images_is_an_error_and_not_an_endless_search(voc_folder):
    broken(voc_folder, *range(1, 13))
    with pytest.raises(ValueError, match="4 images in a row are broken"):
        make_batches(*voc_batches(voc_folder, broken_limit=3))(0)


def _batches_of_other_shapes():
    return lambda number: Batch([np.full(number, 7.0), np.ones((2, number), np.int32)], [])


def test_a_batch_may_have_any_shape_that_fits():
    feed = Prefetcher(_batches_of_other_shapes, (), 2, slot_bytes=80 + 64 + 80)
    feed.start(0)
    for number in range(6):
        first, second = feed.next()
        assert first.shape == (number,) and second.shape == (2, number)
        assert (first == 7).all() and second.dtype == np.int32
    feed.start(1000)
    with pytest.raises(ValueError, match="does not fit"):
        feed.next()
    feed.close()


def test_a_worker_that_is_killed_is_an_error_and_no_wait(voc_folder):
    feed = Prefetcher(make_batches, voc_batches(voc_folder), 1, 100000)
    feed.start(0)
    feed.next()
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(ValueError, match="worker .* has ended with exit status -9"):
        for _ in range(3):
            feed.next()
    feed.close()


# ---------------------------------------------------------------------------------------------
# The layer
# ---------------------------------------------------------------------------------------------

def source_net(voc_folder, workers=0):
    layer = image_source_layer(
        "data", ("data", "label"), VOC, {"root": voc_folder, "split": "trainval"}, CROPS, 5, 0,
        workers)
    return build_net(caffe_messages().NetParameter(layer=[layer]))


@pytest.mark.parametrize("workers", [0, 1])
def test_the_layer_feeds_a_net_from_the_batch_it_is_told(voc_folder, workers):
    net = source_net(voc_folder, workers)
    batch_of = make_batches(*voc_batches(voc_folder))
    (layer,) = [layer for layer in net.layers if hasattr(layer, "begin")]
    layer.begin(3)
    for number in (3, 4):
        net.forward()
        images, labels = batch_of(number).arrays
        assert (net.blobs["data"].data == images).all()
        assert (net.blobs["label"].data == labels).all()
    layer.close()


def test_a_tool_that_knows_no_begin_gets_the_first_batch(voc_folder):
    net = source_net(voc_folder)
    net.forward()
    assert (net.blobs["data"].data == make_batches(*voc_batches(voc_folder))(0).arrays[0]).all()
