"""Read lists of image files, and show queries beside their nearest neighbors (figure 2)."""
import os
import re
from typing import List, Sequence

import cv2
import numpy as np

from ddinit import files

SIDE = 96  # pixels of the square of a picture
GAP = 4  # pixels between pictures; three times as many after a query


def read_paths(path: str, root: str) -> List[str]:
    """Return the image paths in a list of lines 'path' or 'path label', below `root`.

    Raises ValueError naming a file that cannot be read or is empty.
    """
    lines = [line.strip() for line in files.read_text(path).splitlines() if line.strip()]
    if not lines:
        raise ValueError("%s: the list is empty" % path)
    return [os.path.join(root, re.sub(r"\s+\d+$", "", line)) for line in lines]


def write_montage(path: str, rows: Sequence[Sequence[str]]) -> None:
    """Write the montage of rows of image files as a PNG."""
    with files.replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(cv2.imencode(".png", montage(rows))[1].tobytes())


def montage(rows: Sequence[Sequence[str]]) -> np.ndarray:
    """Return a picture uint8 (height, width, 3) with a row of images for each row of paths.

    The first image of a row, the query, is set apart.
    """
    across = len(rows[0])
    canvas = np.full((len(rows) * (SIDE + GAP) - GAP, across * (SIDE + GAP) + GAP, 3), 255,
                     np.uint8)
    for number, row in enumerate(rows):
        top = number * (SIDE + GAP)
        for place, path in enumerate(row):
            left = place * (SIDE + GAP) + (2 * GAP if place else 0)
            picture = _shrunk(path, SIDE)
            height, width = picture.shape[:2]
            above, before = top + (SIDE - height) // 2, left + (SIDE - width) // 2
            canvas[above:above + height, before:before + width] = picture
    return canvas


def _shrunk(path: str, side: int) -> np.ndarray:
    """Return an image, uint8 BGR (height, width, 3), whose longer side is `side` pixels."""
    image = cv2.imread(path, cv2.IMREAD_COLOR)
    if image is None:
        raise ValueError("%s is not an image that OpenCV can read" % path)
    scale = side / max(image.shape[:2])
    size: List[int] = [max(1, round(length * scale)) for length in image.shape[1::-1]]
    return cv2.resize(image, (size[0], size[1]), interpolation=cv2.INTER_AREA)
