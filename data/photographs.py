"""Cut crops out of the photographs in scikit-image and scikit-learn, for the demo and the tests.

    python data/photographs.py build/photographs --count 160 --seed 0

These are six photographs, whose statistics come close to those of a real collection of photographs,
but no more than that.
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

# The side of the smallest crop, as a part of the shorter side of its photograph.
SMALLEST = 0.4


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Write the crops that the command line asks for; return the exit status."""
    parser = processes.Parser(prog="photographs.py",
                              description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", metavar="DIR", help="folder for 0000.jpg, 0001.jpg, ...")
    parser.add_argument("--count", type=int, default=160, help="number of crops (default: 160)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
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
    """Return the photographs (height, width, 3) in BGR."""
    pictures = [skimage.data.astronaut(), skimage.data.coffee(), skimage.data.chelsea(),
             skimage.data.rocket(), *sklearn.datasets.load_sample_images().images]
    return [np.ascontiguousarray(image[:, :, ::-1]) for image in pictures]


def random_crop(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return a square crop of random size and place, mirrored half of the time."""
    shorter = min(image.shape[:2])
    side = int(shorter * rng.uniform(SMALLEST, 1))
    top, left = (int(rng.integers(0, size - side + 1)) for size in image.shape[:2])
    crop = image[top:top + side, left:left + side]
    return np.ascontiguousarray(crop[:, ::-1] if rng.random() < 0.5 else crop)


if __name__ == "__main__":
    sys.exit(main())
