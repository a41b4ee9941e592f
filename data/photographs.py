"""Cuts images to initialise from out of the photographs that scikit-image and scikit-learn ship.

For the demo and the tests: six photographs, from which a net's statistics come close to those of a
real collection, but no more than that.

    python data/photographs.py build/photographs --count 160 --seed 0
"""
import argparse
import os
import sys
from typing import List, Optional, Sequence

import cv2
import numpy as np
import skimage.data
import sklearn.datasets

from ddinit import files, processes

# A crop's side, as a part of its photograph's shorter side.
SMALLEST = 0.4


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Write the crops that the command line asks for; return the exit status."""
    parser = processes.Parser(prog="photographs", description=__doc__.splitlines()[0])
    parser.add_argument("out", metavar="DIR", help="folder to write 0000.jpg, 0001.jpg, ... into")
    parser.add_argument("--count", type=int, default=160, help="images to cut (default: 160)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the crops (default: 0)")
    return processes.command_line(_run, parser.parse_args(argv), parser.prog)


def _run(arguments: argparse.Namespace) -> None:
    os.makedirs(arguments.out, exist_ok=True)
    sources = photographs()
    rng = np.random.default_rng(arguments.seed)
    for number in range(arguments.count):
        crop = random_crop(sources[number % len(sources)], rng)
        with files.replacing(os.path.join(arguments.out, "%04d.jpg" % number)) as temporary:
            encoded = cv2.imencode(".jpg", crop, [cv2.IMWRITE_JPEG_QUALITY, 95])[1]
            encoded.tofile(temporary)


def photographs() -> List[np.ndarray]:
    """Return the photographs (height, width, 3) in OpenCV's order, BGR."""
    found = [skimage.data.astronaut(), skimage.data.coffee(), skimage.data.chelsea(),
             skimage.data.rocket(), *sklearn.datasets.load_sample_images().images]
    return [np.ascontiguousarray(image[:, :, ::-1]) for image in found]


def random_crop(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return a square part of random size and place, mirrored half of the time."""
    shorter = min(image.shape[:2])
    side = int(shorter * rng.uniform(SMALLEST, 1))
    top, left = (int(rng.integers(0, size - side + 1)) for size in image.shape[:2])
    crop = image[top:top + side, left:left + side]
    return np.ascontiguousarray(crop[:, ::-1] if rng.random() < 0.5 else crop)


if __name__ == "__main__":
    sys.exit(main())
