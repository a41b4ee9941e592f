"""Fast R-CNN from scratch on a small VOC folder: what training makes of the initialisation.

    OPENBLAS_NUM_THREADS=1 python experiments/detection_demo.py --voc VOC2007 \\
        --out build/detection_demo

Initialises models/caffenet_small with k-means and both scalings (paper, sections 3.1 to 3.3) from
the training images, trains it for detection on proposals computed here, and measures mAP on the
test images: with random scores, on the way, and in the end.  OUT gets demo.json, with the
processor seconds of each step, detections.jpg, the caffemodels and the training run.
"""
import argparse
import os
import resource
import shutil
import sys
from typing import Any, Callable, Dict, Optional, Sequence

import cv2
import numpy as np

import argument_types
import definitions
import detect_voc
import detection_net
import guarded
import magic_init
import proposals
import results
from argument_types import count, positive
from training import load_weights
from voc import Voc

NET = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "models",
                   "caffenet_small", "deploy.prototxt")
IMAGES = 160  # that the net is initialised from (paper, section 4)
ROWS, COLUMNS = 4, 3  # test images in the picture
TILE = (320, 240)  # width and height of each in pixels


class Steps:
    """Runs commands one after the other and counts the processor seconds of each."""

    def __init__(self) -> None:
        self.seconds: Dict[str, float] = {}

    def run(self, name: str, main: Callable[[Sequence[str]], int], *arguments: Any) -> None:
        """Run a command's main function; raises SystemExit where it has ended with an error."""
        before = _processor_seconds()
        status = main([str(argument) for argument in arguments])
        self.seconds[name] = round(_processor_seconds() - before, 1)
        if status:
            raise SystemExit(status)


def _processor_seconds() -> float:
    """Of this process and of its children that have ended."""
    used = [resource.getrusage(whose) for whose in (resource.RUSAGE_SELF,
                                                    resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


# ---------------------------------------------------------------------------------------------
# The steps
# ---------------------------------------------------------------------------------------------

def run(arguments: argparse.Namespace) -> int:
    """Carry out the demonstration; return the exit status."""
    voc, out = Voc(arguments.voc), arguments.out
    os.makedirs(out, exist_ok=True)
    guarded.check_writable(os.path.join(out, "demo.json"))
    photographs, initial = [os.path.join(out, name) for name in ("photographs",
                                                                 "initial.caffemodel")]
    link_images(voc, photographs)
    steps = Steps()
    search = ["--search-k", arguments.search_k, "--search-side", arguments.search_side,
              "--cache", arguments.cache]
    steps.run("proposals", proposals.main, arguments.voc, "trainval", "test", *search)
    steps.run("initialisation", magic_init.main, arguments.net, initial, "--data", photographs,
              "--type", "kmeans", "--calibrate", "--batches", IMAGES // 16, "--seed",
              arguments.seed, "--cpu", "--quiet")
    untrained = os.path.join(out, "random_scores.caffemodel")
    guarded.in_child(write_untrained, arguments.net, initial, len(voc.classes), arguments.seed,
                     untrained)
    both = ["--voc", arguments.voc, "--max-size", arguments.max_size, "--cpu", *search]
    measured = []
    for iterations in [0, *arguments.iterations]:
        trained, run_folder = untrained, os.path.join(out, "run")
        if iterations:
            steps.run("training to %d" % iterations, detect_voc.main, "train", arguments.net,
                      initial, run_folder, *both, "--iterations", iterations, "--lr",
                      arguments.lr, "--step", arguments.step, "--scales", *arguments.scales,
                      "--seed", arguments.seed, "--snapshot", iterations, "--resume")
            trained = os.path.join(run_folder, "final.caffemodel")
        result = os.path.join(out, "result_%d.json" % iterations)
        drawn = os.path.join(out, "drawn_%d" % iterations)
        steps.run("testing after %d" % iterations, detect_voc.main, "test", arguments.net,
                  trained, *both, "--scales", arguments.test_scale, "--out", result, "--draw",
                  drawn)
        measured.append({"iterations": iterations, **_scores(result)})
    write_picture(os.path.join(out, "detections.jpg"), drawn, voc.images("test"))
    results.write_json(os.path.join(out, "demo.json"), {
        "measured": measured, "processor_seconds": steps.seconds,
        "processor_minutes": sum(steps.seconds.values()) / 60,
        **results.provenance(arguments.seed)})
    for row in measured:
        print("mAP after %5d iterations: %.4f" % (row["iterations"], row["mAP"]))
    print("%.1f minutes of processor time" % (sum(steps.seconds.values()) / 60))
    return 0


def link_images(voc: Voc, folder: str) -> None:
    """Make a folder of links to the training images: test images play no part in initialising."""
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    for image in voc.images("trainval"):
        path = voc.image_path(image)
        os.symlink(os.path.abspath(path), os.path.join(folder, os.path.basename(path)))


def write_untrained(net: str, weights: str, classes: int, seed: int, path: str) -> None:
    """Write a detection net's weights before training: the scores' are random.

    Runs in a child process.
    """
    definitions.import_caffe().set_random_seed(seed)
    skeleton = detection_net.skeleton_of(definitions.read_definition(net))
    built = definitions.build(detection_net.testing_net(skeleton, classes))
    load_weights(built, weights, detection_net.FRESH)
    with guarded.replacing(path) as temporary:
        built.save(temporary)


def _scores(path: str) -> Dict[str, Any]:
    content = results.read_json(path)
    return {name: content[name] for name in ("mAP", "mAP_area", "AP", "seconds_per_image")}


# ---------------------------------------------------------------------------------------------
# The picture
# ---------------------------------------------------------------------------------------------

def write_picture(path: str, drawn: str, images: Sequence[str]) -> None:
    """Write a grid of pictures that `detect_voc.py test --draw` made, evenly from the split."""
    shown = images[::max(len(images) // (ROWS * COLUMNS), 1)][:ROWS * COLUMNS]
    tiles = [tile(cv2.imread(os.path.join(drawn, image + ".jpg"))) for image in shown]
    tiles += [np.full_like(tiles[0], 255)] * (ROWS * COLUMNS - len(tiles))
    grid = np.vstack([np.hstack(tiles[row:row + COLUMNS])
                      for row in range(0, ROWS * COLUMNS, COLUMNS)])
    with guarded.replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(cv2.imencode(".jpg", grid, [cv2.IMWRITE_JPEG_QUALITY, 75])[1].tobytes())


def tile(image: np.ndarray) -> np.ndarray:
    """Return an image made to fit a TILE with a white border, uint8 (height, width, 3)."""
    width, height = TILE
    scale = min((width - 4) / image.shape[1], (height - 4) / image.shape[0])
    fitted = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    whole = np.full((height, width, 3), 255, np.uint8)
    top, left = (height - fitted.shape[0]) // 2, (width - fitted.shape[1]) // 2
    whole[top:top + fitted.shape[0], left:left + fitted.shape[1]] = fitted
    return whole


# ---------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------

def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the demonstration as the command line says; return the exit status."""
    parser = guarded.Parser(prog="detection_demo.py", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--voc", required=True, metavar="DIR", help="folder in VOC's layout")
    add("--out", required=True, metavar="DIR", help="folder for everything; a run in it is resumed")
    add("--net", default=NET, metavar="NET", help="default models/caffenet_small")
    add("--iterations", type=count, nargs="+", default=[1000, 4000], metavar="N",
        help="after which mAP is measured, ascending (default 1000 4000)")
    add("--lr", type=positive, default=0.003, metavar="RATE", help="default %(default)g")
    add("--step", type=count, default=3000, metavar="N",
        help="iterations after which the rate is divided by 10 (default %(default)d)")
    add("--scales", type=count, nargs="+", default=[300], metavar="PIXELS",
        help="lengths of images' shorter sides in training (default 300)")
    add("--test-scale", type=count, default=300, metavar="PIXELS", help="default %(default)d")
    add("--max-size", type=count, default=600, metavar="PIXELS",
        help="longest side of an image (default %(default)d)")
    add("--search-k", type=count, default=100, metavar="K", help="default %(default)d")
    add("--search-side", type=count, default=500, metavar="PIXELS", help="default %(default)d")
    add("--cache", default=proposals.DEFAULT_CACHE, metavar="DIR", help="default %(default)s")
    add("--seed", type=argument_types.natural, default=0, metavar="N", help="default %(default)d")
    return guarded.command_line(run, parser.parse_args(argv), parser.prog)


if __name__ == "__main__":
    sys.exit(main())
