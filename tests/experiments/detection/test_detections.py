"""detection/detections.py: which detections are kept, and their files."""
import cv2
import numpy as np

from detection import detections
from detection.detections import Collected
from voc.average_precision import Detections
from voc.folders import Voc


def spread(count):
    """Boxes of 10 x 10 pixels that do not touch, float64 (count, 4)."""
    x = np.arange(count) * 20.0
    return np.stack([x, x * 0, x + 9, x * 0 + 9], axis=1)


def for_classes(rows, classes):
    """The same boxes for the background and every class."""
    return np.tile(rows, (1, classes + 1))


def scores_of(*columns):
    """Scores (n, classes + 1); the background's play no part."""
    return np.stack([np.zeros(len(columns[0]))] + [np.asarray(one, float) for one in columns], 1)


def test_detections_are_boxes_of_each_class_the_surest_first_without_the_background():
    collected = Collected(classes=2, images=1)
    rows = spread(3)
    collected.add(scores_of([0.1, 0.9, 0.5], [0.6, 0.2, 0.3]), for_classes(rows, 2), 1000, 100)
    (found,) = collected.detections()
    assert found.classes.tolist() == [0, 0, 0, 1, 1, 1]
    assert found.scores.tolist() == [0.9, 0.5, 0.1, 0.6, 0.3, 0.2]
    np.testing.assert_array_equal(found.boxes, rows[[1, 2, 0, 0, 2, 1]])


def test_each_class_has_its_own_boxes_and_they_end_at_the_image_s_border():
    collected = Collected(classes=1, images=1)
    moved = np.array([[1.0, 1, 2, 2, -5, 3, 500, 40]])
    collected.add(scores_of([0.5]), moved, 100, 50)
    assert collected.detections()[0].boxes.tolist() == [[0, 3, 99, 40]]


def test_the_best_of_overlapping_detections_stays_in_its_class():
    collected = Collected(classes=2, images=1)
    rows = np.array([[0.0, 0, 9, 9], [1, 0, 10, 9]])
    collected.add(scores_of([0.2, 0.8], [0.7, 0.1]), for_classes(rows, 2), 100, 100)
    (found,) = collected.detections()
    assert found.scores.tolist() == [0.8, 0.7]
    assert found.classes.tolist() == [0, 1]


def test_an_image_has_at_most_100_detections_of_a_class():
    collected = Collected(classes=1, images=10)
    scores = np.random.RandomState(0).rand(150)
    collected.add(scores_of(scores), for_classes(spread(150), 1), 10000, 100)
    assert collected.detections()[0].scores.tolist() == sorted(scores, reverse=True)[:100]


def test_a_class_has_at_most_40_detections_per_image_the_surest_of_all():
    rng = np.random.RandomState(0)
    images = [rng.rand(90) * strength for strength in (1, 0.5, 0.9)]
    collected = Collected(classes=1, images=3)
    for scores in images:
        collected.add(scores_of(scores), for_classes(spread(90), 1), 10000, 100)
    limit = np.sort(np.concatenate(images))[-120]
    for found, scores in zip(collected.detections(), images):
        assert found.scores.tolist() == sorted(scores[scores >= limit], reverse=True)


def test_comp4_files_hold_a_line_a_detection_counted_from_1(tmp_path):
    found = [Detections(np.array([[0.0, 1, 2.25, 3]]), np.array([0.5]), np.array([1])),
             Detections(np.array([[9.0, 9, 19, 19], [0, 0, 1, 1]]), np.array([0.25, 0.125]),
                        np.array([0, 1]))]
    detections.write_comp4(str(tmp_path), "test", ["disc", "square"], ["000001", "000002"], found)
    assert (tmp_path / "comp4_det_test_disc.txt").read_text() == (
        "000002 0.250000 10.0 10.0 20.0 20.0\n")
    assert (tmp_path / "comp4_det_test_square.txt").read_text() == (
        "000001 0.500000 1.0 2.0 3.2 4.0\n000002 0.125000 1.0 1.0 2.0 2.0\n")


def test_pictures_show_sure_detections_in_colour_and_objects_in_white(voc_folder, tmp_path):
    voc = Voc(voc_folder)
    image = voc.images("test")[0]
    rows = np.array([[100.0, 20, 150, 60], [5, 80, 60, 115]])
    found = Detections(rows, np.array([0.9, 0.4]), np.array([0, 0]))
    detections.draw(str(tmp_path / "drawn"), voc, [image], [found])
    drawn = cv2.imread(str(tmp_path / "drawn" / (image + ".jpg"))).astype(int)
    before = cv2.imread(voc.image_path(image)).astype(int)
    sure, unsure, truth = [np.abs(drawn - before)[int(y), int(x)].max() for x, y in (
        (150, 40), (60, 97), voc.objects(image).boxes[0][[0, 1]])]
    assert sure > 40 and truth > 40 and unsure < 30
