"""Detect objects with a trained Fast R-CNN: from the proposals of an image to its detections.

A single forward pass computes the scores and boxes of a whole image (Girshick 2015, section 3).
ROIs that coincide on the feature maps are computed once.
"""
import heapq
import os
from typing import Any, List, Sequence, Tuple

import cv2
import numpy as np

from ddinit import files
from detection import boxes
from detection.batches import read_image
from voc.average_precision import Detections
from voc.folders import Voc

PER_IMAGE = 100  # most detections of a class in an image
AVERAGE = 40  # most detections of a class per image, averaged over all images
SUPPRESSION = 0.3  # of detections that overlap by this much, only the best is kept
DRAWN_SCORE = 0.5  # lowest score of the detections in pictures
COLORS = [(75, 180, 60), (25, 25, 230), (216, 99, 67), (48, 130, 245), (180, 30, 145),
           (230, 190, 40), (230, 50, 240), (60, 245, 210)]  # BGR, used in turn


def scored_rois(net: Any, image_blob: str, stride: int, image: np.ndarray, scale: float,
                proposals: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
    """Return class probabilities (n, classes + 1) of proposals, and the boxes that they move to.

    net         caffe.Net of nets.testing_net
    image       (3, height, width), the original image scaled by `scale`
    proposals   (n, 4), as the boxes (n, 4 (classes + 1)) in pixels of the original image
    """
    rois = np.hstack([np.zeros((len(proposals), 1)), proposals * scale]).astype(np.float32)
    index, inverse = boxes.distinct(rois, 1.0 / stride)
    net.blobs[image_blob].reshape(1, *image.shape)
    net.blobs["rois"].reshape(len(index), 5)
    net.blobs[image_blob].data[0] = image
    net.blobs["rois"].data[...] = rois[index]
    net.forward()
    scores, deltas = net.blobs["cls_prob"].data, net.blobs["bbox_pred"].data
    return scores[inverse].astype(np.float64), boxes.moved(proposals, deltas[inverse])


class Collected:
    """The detections of a split, added image by image.

    Of each class, the best PER_IMAGE in an image and the best AVERAGE times the number of images
    are kept.
    """

    def __init__(self, classes: int, images: int) -> None:
        self._most = AVERAGE * images
        self._best: List[List[float]] = [[] for _ in range(classes)]
        self._kept: List[List[Tuple[np.ndarray, np.ndarray]]] = []

    def add(self, scores: np.ndarray, moved: np.ndarray, width: int, height: int) -> None:
        """Add the scores (n, classes + 1) and boxes (n, 4 (classes + 1)) of an image."""
        moved = boxes.clipped(moved, width, height).reshape(len(scores), -1, 4)
        candidates = []
        for number, best in enumerate(self._best, 1):
            order = np.argsort(-scores[:, number], kind="stable")[:PER_IMAGE]
            order = order[scores[order, number] > self._threshold(best)]
            for score in scores[order, number].tolist():
                heapq.heappush(best, score)
                if len(best) > self._most:
                    heapq.heappop(best)
            candidates.append((moved[order, number], scores[order, number]))
        self._kept.append(candidates)

    def detections(self) -> List[Detections]:
        """Return the detections of each image after suppression; class 0 is the first class."""
        return [self._suppressed(candidates) for candidates in self._kept]

    def _threshold(self, best: List[float]) -> float:
        return best[0] if len(best) == self._most else -np.inf

    def _suppressed(self, candidates: Sequence[Tuple[np.ndarray, np.ndarray]]) -> Detections:
        parts = []
        for number, ((rows, scores), best) in enumerate(zip(candidates, self._best)):
            sure = scores >= self._threshold(best)
            rows, scores = rows[sure], scores[sure]
            kept = boxes.suppressed(rows, scores, SUPPRESSION)
            parts.append((rows[kept], scores[kept], np.full(len(kept), number)))
        rows, scores, numbers = [np.concatenate(column) for column in zip(*parts)]
        return Detections(rows, scores, numbers)


def write_comp4(folder: str, split: str, classes: Sequence[str], images: Sequence[str],
                detections: Sequence[Detections]) -> None:
    """Write comp4_det_SPLIT_CLASS.txt for each class, as the development kit reads it.

    A line holds an image id, a score, and x1, y1, x2, y2 from 1.
    """
    os.makedirs(folder, exist_ok=True)
    for number, name in enumerate(classes):
        path = os.path.join(folder, "comp4_det_%s_%s.txt" % (split, name))
        with files.replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
            for image, candidates in zip(images, detections):
                for row, score in zip(candidates.boxes[candidates.classes == number] + 1,
                                      candidates.scores[candidates.classes == number]):
                    file.write("%s %.6f %.1f %.1f %.1f %.1f\n" % (image, score, *row))


def draw(folder: str, voc: Voc, images: Sequence[str], detections: Sequence[Detections]) -> None:
    """Write each image as a JPEG, with its objects in white and detections from DRAWN_SCORE on."""
    os.makedirs(folder, exist_ok=True)
    for image, candidates in zip(images, detections):
        truth = voc.objects(image)
        pixels = read_image(voc.image_path(image), truth.width, truth.height)
        sure = candidates.scores >= DRAWN_SCORE
        shown = Detections(*[column[sure] for column in candidates])
        path = os.path.join(folder, image + ".jpg")
        with files.replacing(path) as temporary, open(temporary, "wb") as file:
            drawn = picture(pixels, shown, voc.classes, truth.boxes)
            file.write(cv2.imencode(".jpg", drawn)[1].tobytes())


def picture(image: np.ndarray, detections: Detections, classes: Sequence[str],
            objects: np.ndarray) -> np.ndarray:
    """Return a copy of an image uint8 BGR (height, width, 3) with boxes, classes and scores."""
    drawn = image.copy()
    thin = max(1, round(max(image.shape[:2]) / 500))
    for row in objects:
        _rectangle(drawn, row, (255, 255, 255), thin)
    for row, score, number in reversed(list(zip(*detections))):  # the best on top
        color = COLORS[number % len(COLORS)]
        _rectangle(drawn, row, color, 2 * thin)
        _label(drawn, row, "%s %.2f" % (classes[number], score), color, thin)
    return drawn


def _rectangle(image: np.ndarray, row: np.ndarray, color: Tuple[int, int, int],
               thickness: int) -> None:
    x1, y1, x2, y2 = boxes.rounded(row).tolist()
    cv2.rectangle(image, (x1, y1), (x2, y2), color, thickness)


def _label(image: np.ndarray, row: np.ndarray, text: str, color: Tuple[int, int, int],
           thin: int) -> None:
    """Write text on the upper edge of a box, inside of the image."""
    font, size = cv2.FONT_HERSHEY_SIMPLEX, 0.4 * thin
    (width, height), base = cv2.getTextSize(text, font, size, thin)
    x = int(min(max(row[0], 0), max(image.shape[1] - width, 0)))
    y = int(max(row[1] - base, height))
    cv2.rectangle(image, (x, y - height), (x + width, y + base), color, -1)
    cv2.putText(image, text, (x, y), font, size, (255, 255, 255), thin, cv2.LINE_AA)
