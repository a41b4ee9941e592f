"""The VOC reader: what it returns of a generated folder, and what it says of a broken one."""
import logging
import os
import re
import shutil

import cv2
import numpy as np
import pytest

from voc.folders import Voc


def _edit(folder, name, old, new):
    path = os.path.join(folder, name)
    with open(path) as file:
        text = file.read()
    assert old in text
    with open(path, "w") as file:
        file.write(text.replace(old, new, 1))


def _main(folder, name):
    return os.path.join(folder, "ImageSets", "Main", name)


def test_classes_and_images_come_from_the_lists(voc_folder):
    voc = Voc(voc_folder)
    assert voc.classes == ["disc", "square"]
    assert voc.images("test") == ["%06d" % number for number in range(13, 21)]
    assert len(voc.images("trainval")) == 12


def test_labels_are_minus_one_zero_and_one(voc_folder):
    labels = Voc(voc_folder).labels("trainval")
    assert labels.dtype == np.int8 and labels.shape == (12, 2)
    np.testing.assert_array_equal(labels[:5], [[1, -1], [-1, 1], [1, 1], [0, 1], [1, -1]])


def test_boxes_count_from_zero_and_fit_the_objects_in_the_picture(voc_folder):
    voc = Voc(voc_folder)
    for image in voc.images("trainval"):
        found = voc.objects(image)
        pixels = cv2.imread(voc.image_path(image))
        assert pixels.shape == (found.height, found.width, 3)
        assert found.boxes.dtype == np.float64
        for (x1, y1, x2, y2), index in zip(found.boxes.astype(int), found.classes):
            channel = [2, 0][index]  # a disc is red, a square blue
            blue, green = pixels[(y1 + y2) // 2, (x1 + x2) // 2, [channel, 1]].astype(int)
            assert blue - green > 80
            at_edge = pixels[(y1 + y2) // 2, [x1, x2], channel].astype(int)
            assert (at_edge - pixels[(y1 + y2) // 2, [x1, x2], 1] > 40).all()


def test_difficult_objects_are_marked(voc_folder):
    found = Voc(voc_folder).objects("000004")
    assert found.classes.tolist() == [1, 0]
    assert found.difficult.tolist() == [False, True]


def test_a_box_at_the_image_border_becomes_zero(voc_folder):
    path = os.path.join("Annotations", "000001.xml")
    xml = "<xmin>1</xmin><ymin>1.0</ymin><xmax>160</xmax><ymax>120</ymax>"
    with open(os.path.join(voc_folder, path)) as file:
        box = re.search("<xmin>.*</ymax>", file.read()).group()
    _edit(voc_folder, path, box, xml)
    np.testing.assert_array_equal(Voc(voc_folder).objects("000001").boxes, [[0, 0, 159, 119]])


def test_a_box_counted_from_zero_is_cut_with_one_warning_and_does_not_wrap(voc_folder, caplog):
    path = os.path.join(voc_folder, "Annotations", "000001.xml")
    with open(path) as file:
        text = re.sub("<xmin>.*</ymax>", "<xmin>0</xmin><ymin>0</ymin><xmax>50</xmax>"
                      "<ymax>121</ymax>", file.read())
    with open(path, "w") as file:
        file.write(text)
    voc = Voc(voc_folder)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            np.testing.assert_array_equal(voc.objects("000001").boxes, [[0, 0, 49, 119]])
    assert len(caplog.messages) == 1
    assert path in caplog.messages[0] and "0 0 50 121" in caplog.messages[0]


def test_class_names_may_hold_underscores_and_splits_may_be_new(voc_folder):
    for name in ("trainval.txt", "disc_trainval.txt", "square_trainval.txt"):
        shutil.copy(_main(voc_folder, name),
                    _main(voc_folder, name.replace("trainval", "my_few")))
    for split in ("trainval", "test", "my_few"):
        os.rename(_main(voc_folder, "disc_%s.txt" % split),
                  _main(voc_folder, "red_test_disc_%s.txt" % split))
    voc = Voc(voc_folder)
    assert voc.classes == ["red_test_disc", "square"]
    np.testing.assert_array_equal(voc.labels("my_few"), voc.labels("trainval"))


def test_a_split_without_its_own_list_has_the_images_of_the_class_lists(voc_folder):
    before = Voc(voc_folder).images("test")
    os.remove(_main(voc_folder, "test.txt"))
    assert Voc(voc_folder).images("test") == before


def test_bytes_are_those_of_the_file(voc_folder):
    voc = Voc(voc_folder)
    with open(voc.image_path("000002"), "rb") as file:
        assert voc.read_bytes("000002") == file.read()


@pytest.mark.parametrize("name, old, new, message", [
    ("Annotations/000001.xml", "<name>disc", "<name>cube", r"000001\.xml: class 'cube' is not"),
    ("Annotations/000001.xml", "<xmax>", "<xmax>9", r"000001\.xml: box .* is outside of"),
    ("Annotations/000001.xml", "<xmax>", "<xmax>0.", r"000001\.xml: box .* is empty"),
    ("Annotations/000001.xml", "<xmin>", "<xmin>-", r"000001\.xml: box .* is outside of the image"),
    ("Annotations/000001.xml", "<xmin>", "<xmin>x", r"000001\.xml: <bndbox><xmin> is 'x"),
    ("Annotations/000001.xml", "ymin", "ymim", r"000001\.xml: the annotation is not XML"),
    ("Annotations/000001.xml", "<ymin>", "<a/><ymin>nan</ymin><ymin>", r"not a number"),
    ("Annotations/000001.xml", "<width>160</width>", "", r"<size><width> is missing"),
    ("ImageSets/Main/disc_test.txt", "000013  1", "000013  2", r"disc_test\.txt: entry 1"),
    ("ImageSets/Main/disc_test.txt", "000013  1", "000014  1", r"image 000014 is listed twice"),
    ("ImageSets/Main/disc_test.txt", "000013  1\n", "", r"disc_test\.txt: there is no line"),
    ("ImageSets/Main/test.txt", "000013\n", "", r"disc_test\.txt: image 000013 is not in"),
    ("ImageSets/Main/test.txt", "000013", "000014", r"test\.txt: image 000014 is listed twice"),
])
def test_broken_text_is_an_error_naming_the_file(voc_folder, name, old, new, message):
    _edit(voc_folder, name, old, new)
    with pytest.raises(ValueError, match=message):
        voc = Voc(voc_folder)
        voc.labels("test")
        voc.objects("000001")


@pytest.mark.parametrize("name, message", [
    ("Annotations/000001.xml", r"000001\.xml: cannot read the annotation"),
    ("JPEGImages/000001.jpg", r"000001\.jpg: the image does not exist"),
    ("ImageSets/Main/square_trainval.txt", r"square_trainval\.txt: cannot read the file"),
])
def test_a_missing_file_is_an_error_naming_it(voc_folder, name, message):
    os.remove(os.path.join(voc_folder, name))
    voc = Voc(voc_folder)
    with pytest.raises(ValueError, match=message):
        voc.labels("trainval")
        voc.image_path("000001")
        voc.objects("000001")


def test_an_image_without_objects_is_an_error_naming_it(voc_folder):
    path = os.path.join(voc_folder, "Annotations", "000001.xml")
    with open(path, "w") as file:
        file.write("<annotation><size><width>9</width><height>9</height></size></annotation>")
    with pytest.raises(ValueError, match=r"000001\.xml: the annotation has no object"):
        Voc(voc_folder).objects("000001")


def test_a_folder_above_the_data_set_is_an_error_that_names_the_right_one(voc_folder):
    with pytest.raises(ValueError, match="Did you mean .*VOC2007"):
        Voc(os.path.dirname(voc_folder))
    with pytest.raises(ValueError, match="there is no ImageSets/Main"):
        Voc(os.path.join(voc_folder, "JPEGImages"))


def test_an_unknown_split_is_an_error(voc_folder):
    with pytest.raises(ValueError, match=r"disc_val\.txt: cannot read the file"):
        Voc(voc_folder).images("val")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_lists_may_be_in_any_unicode(voc_folder, encoding):
    wanted = Voc(voc_folder).images("test")
    for name in ("test.txt", "disc_test.txt"):
        with open(_main(voc_folder, name)) as file:
            text = file.read()
        with open(_main(voc_folder, name), "w", encoding=encoding) as file:
            file.write(text)
    assert Voc(voc_folder).images("test") == wanted
    assert Voc(voc_folder).labels("test").shape == (8, 2)
