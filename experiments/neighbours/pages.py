"""Show queries and their nearest neighbors: a montage and an HTML page (figure 2)."""
import hashlib
import html
import os
from typing import Any, Dict, List, Sequence

import cv2
import numpy as np

from ddinit import files

SIDE = 96  # pixels of a picture's square in the montage
GAP = 4  # pixels between pictures; three times as many after a query
PICTURE = 160  # pixels of the longer side of a picture on the page
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>%(name)s: nearest neighbors</title>
<style>
body { font-family: sans-serif; margin: 2em; }
td { padding: 4px; text-align: center; vertical-align: bottom; font-size: small; }
td:first-child { padding-right: 24px; }
img { max-width: %(side)dpx; max-height: %(side)dpx; }
</style>
</head>
<body>
<h1>%(name)s</h1>
<p>Each row: a query, then its nearest neighbors and the cosine of their features.</p>
<table>
%(rows)s
</table>
</body>
</html>
"""


def write(folder: str, name: str, rows: Sequence[Dict[str, Any]]) -> None:
    """Write folder/NAME.png, folder/NAME.html and the page's folder/pictures/*.jpg.

    `rows` hold 'query', a path, and 'neighbours', dictionaries of 'image' and 'cosine'.
    """
    images = [[row["query"]] + [found["image"] for found in row["neighbours"]] for row in rows]
    with files.replacing(os.path.join(folder, name + ".png")) as temporary:
        encoded = cv2.imencode(".png", montage(images))[1]
        with open(temporary, "wb") as file:
            file.write(encoded.tobytes())
    os.makedirs(os.path.join(folder, "pictures"), exist_ok=True)
    text = PAGE % {"name": html.escape(name), "side": PICTURE,
                   "rows": "\n".join(_row(folder, row) for row in rows)}
    with files.replacing(os.path.join(folder, name + ".html")) as temporary, \
            open(temporary, "w", encoding="utf-8") as file:
        file.write(text)


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


def _row(folder: str, row: Dict[str, Any]) -> str:
    cells = [_cell(folder, row["query"], "query")]
    cells += [_cell(folder, found["image"], "%.3f" % found["cosine"])
              for found in row["neighbours"]]
    return "<tr>%s</tr>" % "".join(cells)


def _cell(folder: str, path: str, caption: str) -> str:
    digest = hashlib.sha256(os.path.abspath(path).encode("utf-8")).hexdigest()
    name = "pictures/%s.jpg" % digest[:16]
    target = os.path.join(folder, name)
    if not os.path.exists(target):
        with files.replacing(target) as temporary, open(temporary, "wb") as file:
            file.write(cv2.imencode(".jpg", _shrunk(path, PICTURE))[1].tobytes())
    shown = html.escape(os.path.basename(path))
    return '<td><img src="%s" alt="%s" title="%s"><br>%s</td>' % (name, shown, shown, caption)


def _shrunk(path: str, side: int) -> np.ndarray:
    """Return an image, uint8 BGR (height, width, 3), whose longer side is `side` pixels."""
    image = cv2.imread(path, cv2.IMREAD_COLOR)
    if image is None:
        raise ValueError("%s is not an image that OpenCV can read" % path)
    scale = side / max(image.shape[:2])
    size: List[int] = [max(1, round(length * scale)) for length in image.shape[1::-1]]
    return cv2.resize(image, (size[0], size[1]), interpolation=cv2.INTER_AREA)
