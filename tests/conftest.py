"""What several tests share: a generated folder in PASCAL VOC's layout."""
import os
from typing import Dict, List, Tuple

import cv2
import numpy as np
import pytest

WIDTH, HEIGHT = 160, 120
BLUE, RED = (200, 60, 40), (40, 50, 210)  # BGR
# Shapes of an image and whether each is difficult; images go through these in turn.
SCENES: List[List[Tuple[str, bool]]] = [
    [("disc", False)],
    [("square", False)],
    [("disc", False), ("square", False)],
    [("square", False), ("disc", True)],
    [("disc", False), ("disc", True)],
]

# Threads of OpenCV do not survive the forks of the tests of databases, which would wait for them.
cv2.setNumThreads(1)


@pytest.fixture
def voc_folder(tmp_path) -> str:
    """The path of a VOC-layout folder: 12 images in trainval, 8 in test, of 160 x 120 pixels.

    Class 'disc' is a red disc, 'square' a blue square, on grey noise; an image holds one or two.
    In two of five images a disc is difficult, in one of them it is the only disc (flag 0).
    """
    root = tmp_path / "VOC2007"
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    rng = np.random.default_rng(2007)
    _write_split(str(root), "trainval", ["%06d" % number for number in range(1, 13)], rng)
    _write_split(str(root), "test", ["%06d" % number for number in range(13, 21)], rng)
    return str(root)


def _write_split(root: str, split: str, images: List[str], rng: np.random.Generator) -> None:
    lines: Dict[str, List[str]] = {"": [], "disc_": [], "square_": []}
    for number, image in enumerate(images):
        scene = SCENES[number % len(SCENES)]
        _write_image(root, image, scene, rng)
        lines[""].append(image)
        for name in ("disc", "square"):
            flags = [0 if difficult else 1 for shape, difficult in scene if shape == name]
            lines[name + "_"].append("%s %2d" % (image, max(flags, default=-1)))
    for prefix, text in lines.items():
        with open(os.path.join(root, "ImageSets", "Main", prefix + split + ".txt"), "w") as file:
            file.write("\n".join(text) + "\n")


def _write_image(root: str, image: str, scene: List[Tuple[str, bool]],
                 rng: np.random.Generator) -> None:
    pixels = rng.integers(90, 166, (HEIGHT, WIDTH, 3)).astype(np.uint8)
    objects = []
    for place, (shape, difficult) in enumerate(scene):
        half = int(rng.integers(18, 29))
        x = int(rng.integers(half, WIDTH // 2 - half)) + place * WIDTH // 2
        y = int(rng.integers(half, HEIGHT - half))
        if shape == "disc":
            cv2.circle(pixels, (x, y), half, RED, -1)
        else:
            cv2.rectangle(pixels, (x - half, y - half), (x + half, y + half), BLUE, -1)
        objects.append("<object><name>%s</name><difficult>%d</difficult><bndbox><xmin>%d</xmin>"
                       "<ymin>%d</ymin><xmax>%d</xmax><ymax>%d</ymax></bndbox></object>" % (
                           shape, difficult, x - half + 1, y - half + 1, x + half + 1,
                           y + half + 1))
    assert cv2.imwrite(os.path.join(root, "JPEGImages", image + ".jpg"), pixels)
    with open(os.path.join(root, "Annotations", image + ".xml"), "w") as file:
        file.write("<annotation><filename>%s.jpg</filename><size><width>%d</width><height>%d"
                   "</height><depth>3</depth></size>%s</annotation>\n" % (
                       image, WIDTH, HEIGHT, "".join(objects)))
