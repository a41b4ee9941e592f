"""detection/batches.py, and the layer that feeds its batches."""
import json
import os

import cv2
import numpy as np
import pytest
from google.protobuf import text_format

from ddinit import processes
from ddinit.prototxt import build_net, caffe_messages
from detection import batches as detection_batches
from detection import boxes, nets
from detection.batches import DetectionBatches
from voc.folders import Voc
from voc.overlap import overlaps

IDENTITY = (np.zeros((3, 4)), np.ones((3, 4)))  # targets as they are


def grid(width, height, side=40, step=20):
    """Proposals: squares all over an image, float32 (n, 4)."""
    return np.array([[x, y, x + side - 1, y + side - 1] for y in range(0, height - side + 1, step)
                     for x in range(0, width - side + 1, step)], np.float32)


@pytest.fixture
def table(voc_folder):
    voc = Voc(voc_folder)
    images = voc.images("trainval")
    return detection_batches.collect(voc, images, [grid(160, 120)] * len(images))


def batches(table, seed=0, scales=(120,), max_size=500, statistics=IDENTITY):
    return DetectionBatches(table, statistics[0], statistics[1], scales, max_size, seed)


def test_difficult_objects_and_images_with_nothing_else_are_left_out(table, voc_folder):
    voc = Voc(voc_folder)
    expected = [voc.objects(image) for image in voc.images("trainval")]
    assert len(table.paths) == sum(not item.difficult.all() for item in expected)
    assert len(table.objects) == sum((~item.difficult).sum() for item in expected)
    assert set(table.classes.tolist()) == {1, 2}


@pytest.mark.parametrize("row", [[-5, 0, 9, 9], [0, 0, 161, 9], [9, 9, 3, 20], [0, 0, np.nan, 9]])
def test_a_proposal_outside_its_image_is_refused_by_name(voc_folder, row):
    voc = Voc(voc_folder)
    images = voc.images("trainval")
    found = [grid(160, 120)] * len(images)
    found[3] = np.array([row], np.float32)
    with pytest.raises(ValueError, match="Image %s: the proposal .* 160 x 120" % images[3]):
        detection_batches.collect(voc, images, found)


def test_a_batch_holds_two_images_and_rois_as_fast_r_cnn_samples_them(table):
    images, rois, labels, _, weights = [], [], [], [], []
    for number in range(6):
        arrays = batches(table)(number).arrays
        images += arrays[:2]
        rois.append(arrays[2])
        labels.append(arrays[3])
        weights.append(arrays[5])
    assert all(image.shape == (3, 120, 160) and image.dtype == np.float32 for image in images)
    for rows, names, weight in zip(rois, labels, weights):
        for place in (0, 1):
            here = names[rows[:, 0] == place]
            assert 0 < (here > 0).sum() <= 16
            assert len(here) <= 64
        columns = np.flatnonzero(weight[0]) if names[0] else []
        assert list(columns) == [4 * names[0] + i for i in range(4)]
        assert weight.sum() == 4 * (names > 0).sum()


def test_objects_overlap_by_half_or_more_and_background_by_a_tenth_or_more(table):
    original = batches(table)
    for position in range(2 * len(table.paths)):
        broken = []
        index, mirror, _ = original._read(position, broken)
        _, (rows, labels, _, _) = original._image(position, broken)
        rows_of = slice(table.object_ends[index], table.object_ends[index + 1])
        truth, classes = table.objects[rows_of], table.classes[rows_of]
        if mirror:
            truth = boxes.mirrored(truth, 160)
        shared = overlaps(rows, truth)
        assert (shared[labels > 0].max(axis=1) >= 0.5).all()
        np.testing.assert_array_equal(labels[labels > 0],
                                      classes[shared[labels > 0].argmax(axis=1)])
        near = shared[labels == 0].max(axis=1)
        assert ((near >= 0.1) & (near < 0.5)).all()


def test_an_epoch_shows_every_image_once_as_it_is_and_once_mirrored(table):
    original, count = batches(table), 2 * len(table.paths)
    first = [original._read(position, [])[:2] for position in range(count)]
    second = [original._read(position, [])[:2] for position in range(count, 2 * count)]
    assert sorted(first) == sorted(second) == [(index, mirror) for index in range(count // 2)
                                               for mirror in (False, True)]
    assert first != second


def test_a_batch_is_a_function_of_seed_and_number(table):
    ones = batches(table)(5).arrays
    again = batches(table)(5).arrays
    others = batches(table, seed=1)(5).arrays
    for one, same in zip(ones, again):
        np.testing.assert_array_equal(one, same)
    assert any(one.shape != other.shape or (one != other).any()
               for one, other in zip(ones, others))


def test_a_mirrored_image_lies_below_its_mirrored_rois(table):
    """The mean colour in each object's ROI is a disc's red or a square's blue."""
    original = batches(table, scales=(240,))
    checked = 0
    for position in range(2 * len(table.paths)):
        image, (rows, labels, _, _) = original._image(position, [])
        x1, y1, x2, y2 = np.round(rows[0]).astype(int)
        inside = image[:, (3 * y1 + y2) // 4:(y1 + 3 * y2) // 4,
                       (3 * x1 + x2) // 4:(x1 + 3 * x2) // 4].mean(axis=(1, 2))
        if labels[0] == 1:
            assert inside[2] > inside[0]  # a disc's red over its blue
        else:
            assert inside[0] > inside[2]
        checked += 1
    assert checked == 2 * len(table.paths)


def test_background_may_begin_at_any_overlap(table):
    shared = []
    for low in (0.0, 0.3):
        source = DetectionBatches(table, *IDENTITY, [120], 500, seed=0, background_overlap=low)
        rois = detection_batches.rois_of(table, 0)
        chosen, labels = source._sample(rois, np.random.default_rng(0))
        shared.append(rois.overlap[chosen[labels == 0]])
    assert shared[0].min() == 0
    assert shared[1].min() >= 0.3 and shared[1].max() < 0.5


def test_targets_undone_give_the_object(table):
    statistics = detection_batches.target_statistics(table, 2)
    arrays = batches(table, statistics=statistics)(0).arrays
    rois, labels, targets = arrays[2], arrays[3].astype(int), arrays[4].reshape(-1, 3, 4)
    for roi, label, row in zip(rois, labels, targets):
        if label:
            delta = row[label] * statistics[1][label] + statistics[0][label]
            found = boxes.moved(roi[None, 1:], delta[None])
            nearest = np.abs(boxes.targets(roi[None, 1:], found) - delta)
            assert nearest.max() < 1e-5
            assert overlaps(found, roi[None, 1:])[0, 0] >= 0.49


def test_statistics_are_those_of_the_targets_and_their_mirror_images(table):
    targets = {1: [], 2: []}
    for index in range(len(table.paths)):
        rois = detection_batches.rois_of(table, index)
        for row, truth, shared, label in zip(rois.boxes, rois.truth, rois.overlap, rois.classes):
            if shared >= 0.5:
                pair = np.stack([row, truth])
                for both in (pair, boxes.mirrored(pair, 160)):
                    targets[label].append(boxes.targets(both[:1], both[1:])[0])
    means, deviations = detection_batches.target_statistics(table, 3)
    for label, rows in targets.items():
        np.testing.assert_allclose(means[label], np.mean(rows, axis=0), atol=1e-9)
        np.testing.assert_allclose(deviations[label], np.std(rows, axis=0), rtol=1e-6)
    assert means[3].tolist() == [0, 0, 0, 0] and deviations[3].tolist() == [1, 1, 1, 1]


def test_images_are_scaled_by_their_shorter_side_up_to_the_longest():
    assert detection_batches.scale_of(500, 375, 600, 1000) == 1.6
    assert detection_batches.scale_of(500, 100, 600, 1000) == 2.0
    assert detection_batches.scale_of(100, 500, 600, 1000) == 2.0
    assert detection_batches.largest_image_bytes(np.array([[500, 375], [500, 100]]), [600],
                                                 1000) == 4 * 3 * 800 * 600


def test_an_image_is_scaled_and_its_mean_subtracted():
    image = np.full((30, 40, 3), (103, 116, 123), np.uint8)
    found = detection_batches.scaled(image, 1.5)
    assert found.shape == (3, 45, 60)
    np.testing.assert_allclose(found[:, 20, 20], [0.0199, 0.0535, 0.2283], atol=1e-4)


def test_a_broken_image_is_replaced_by_the_next_and_reported(table):
    original = batches(table)
    index, _, _ = original._read(0, [])
    os.truncate(table.paths[index], 50)
    broken = []
    other, _, _ = original._read(0, broken)
    assert other != index
    assert broken and broken[0].startswith(table.paths[index])


def test_an_image_of_another_size_than_its_annotation_counts_as_broken(table):
    assert cv2.imwrite(table.paths[0], np.zeros((60, 80, 3), np.uint8))
    with pytest.raises(ValueError, match="has 80 x 60 pixels, but its annotation says 160 x 120"):
        detection_batches.read_image(table.paths[0], 160, 120)


def test_only_broken_images_are_an_error(table):
    for path in table.paths:
        os.truncate(path, 10)
    with pytest.raises(ValueError, match="images in a row are broken"):
        batches(table)(0)


def test_a_saved_table_is_the_same_read_from_disk(table, tmp_path):
    detection_batches.save_table(table, str(tmp_path / "rois"))
    opened = detection_batches.open_table(str(tmp_path / "rois"))
    assert opened.paths == table.paths
    assert isinstance(opened.proposals, np.memmap)
    for one, other in zip(table[1:], opened[1:]):
        np.testing.assert_array_equal(one, other)


def run_layer(parameters, workers):
    """The tops of three forward passes of the layer, from batch 4 on."""
    net = caffe_messages().NetParameter()
    layer = net.layer.add(name="data", type="Python", top=["data", "rois", *nets.LABELS])
    text_format.Merge('module: "detection.roi_data" layer: "RoiData"', layer.python_param)
    layer.python_param.param_str = parameters.replace('"workers": 0', '"workers": %d' % workers)
    built = build_net(net)
    built.layers[0].begin(4)
    found = []
    for _ in range(3):
        built.forward()
        found.append([built.blobs[top].data.copy() for top in layer.top])
    built.layers[0].close()
    return found


@pytest.mark.parametrize("workers", [0, 2])
def test_the_layer_feeds_the_batches_in_their_order(table, tmp_path, workers):
    # Two sizes of images, so that the smaller one of a pair has a border.
    path = table.paths[0]
    assert cv2.imwrite(path, cv2.resize(cv2.imread(path), (100, 120)))
    table.sizes[0] = (100, 120)
    folder = str(tmp_path / "rois")
    detection_batches.save_table(table, folder)
    parameters = detection_batches.layer_parameters(folder, table, *IDENTITY, scales=[120, 60],
                                                    max_size=500, seed=0, workers=0)
    found = processes.in_child(run_layer, json.dumps(parameters), workers)
    for number, tops in enumerate(found, 4):
        expected = batches(table, scales=(120, 60))(number).arrays
        shapes = [image.shape[1:] for image in expected[:2]]
        assert tops[0].shape == (2, 3) + tuple(np.max(shapes, axis=0))
        for row, image in zip(tops[0], expected[:2]):
            height, width = image.shape[1:]
            np.testing.assert_array_equal(row[:, :height, :width], image)
            assert not row[:, height:].any() and not row[:, :, width:].any()
        for top, array in zip(tops[1:], expected[2:] + expected[-1:]):
            np.testing.assert_array_equal(top, array)
