"""Fast R-CNN from scratch on a small VOC folder: what training makes of the initialisation.

    OPENBLAS_NUM_THREADS=1 python experiments/detection_demo.py --voc VOC2007 \\
        --out build/detection_demo

Lightens the photographs, initialises models/caffenet_small with k-means and both scalings (paper,
sections 3.1 to 3.3) from the training images, trains it for detection on proposals computed here,
and measures mAP on the test images: with random scores, on the way, and in the end.  OUT gets
demo.json, with the processor seconds of each step, detections.jpg, the caffemodels and the
training run.
"""
import argparse
import contextlib
import os
import resource
import shutil
import sys
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence

import cv2
import numpy as np

import detect_voc
import detection
import detection_net
import magic_init
import proposals
from average_precision import Detections
from ddinit import argument_types, files, processes, results
from ddinit.argument_types import count
from ddinit.caffe_net import use_device
from ddinit.prototxt import build_net, import_caffe, read_definition
from detection_batches import read_image, scaled_size
from training import load_weights
from voc import Voc

NET = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "models",
                   "caffenet_small", "deploy.prototxt")
IMAGES = 160  # that the net is initialised from (paper, section 4)
RATE = 0.003
SCALES = (240, 300, 360)  # shorter sides of images in training; the middle one in testing
MAX_SIZE = 600
SEARCH_SIDE, SEARCH_K = 400, 50  # of proposals; a smaller k than usual: objects are small
BACKGROUND_OVERLAP = 0.0  # where objects are small, nearly all proposals lie apart from them
WHITE = 99  # percentile of an image's pixels that lightening makes as bright as can be
ROWS, COLUMNS = 3, 3  # test images in the picture
TILE = (400, 300)  # width and height of each in pixels
SHOWN = 0.95  # the picture shows detections with this score or more


class Steps:
    """Counts the processor seconds of steps that follow one another."""

    def __init__(self) -> None:
        self.seconds: Dict[str, float] = {}

    def run(self, name: str, main: Callable[[Sequence[str]], int], words: List[str]) -> None:
        """Run a command's main function; raises SystemExit where it has ended with an error."""
        with self.counted(name):
            status = main(words)
        if status:
            raise SystemExit(status)

    @contextlib.contextmanager
    def counted(self, name: str) -> Iterator[None]:
        """Count what the block takes as the step `name`."""
        before = _processor_seconds()
        yield
        self.seconds[name] = round(_processor_seconds() - before, 1)


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
    if sorted(arguments.iterations) != arguments.iterations:
        raise ValueError("--iterations must ascend")
    original, out = Voc(arguments.voc), arguments.out
    os.makedirs(out, exist_ok=True)
    files.check_writable(os.path.join(out, "demo.json"))
    steps = Steps()
    with steps.counted("lightening"):
        arguments.voc = lightened(original, os.path.join(out, "VOC2007"))
    voc = Voc(arguments.voc)
    initial = initialise(arguments, voc, steps)
    untrained = os.path.join(out, "random_scores.caffemodel")
    with steps.counted("random scores"):
        processes.in_child(write_untrained, initial, len(voc.classes), arguments.seed, untrained)
    measured = [test(arguments, steps, untrained, 0)]
    for iterations in arguments.iterations:
        trained = train(arguments, steps, initial, iterations)
        measured.append(test(arguments, steps, trained, iterations))
    with steps.counted("picture"):
        processes.in_child(write_picture, test_command(arguments, trained, iterations),
                         os.path.join(out, "detections.jpg"))
    minutes = sum(steps.seconds.values()) / 60
    results.write_json(os.path.join(out, "demo.json"), {
        "measured": measured, "processor_seconds": steps.seconds, "processor_minutes": minutes,
        **results.provenance(arguments.seed)})
    for row in measured:
        print("mAP after %5d iterations: %.4f" % (row["iterations"], row["mAP"]))
    print("%.1f minutes of processor time" % minutes)
    return 0


def initialise(arguments: argparse.Namespace, voc: Voc, steps: Steps) -> str:
    """Find proposals and initialise the net; return the caffemodel's path."""
    photographs = os.path.join(arguments.out, "photographs")
    initial = os.path.join(arguments.out, "initial.caffemodel")
    link_images(voc, photographs)
    steps.run("proposals", proposals.main, [arguments.voc, "trainval", "test",
                                            *_search(arguments)])
    steps.run("initialisation", magic_init.main, [
        NET, initial, "--data", photographs, "--type", "kmeans", "--calibrate", "--batches",
        str(IMAGES // 16), "--seed", str(arguments.seed), "--cpu", "--quiet"])
    return initial


def train(arguments: argparse.Namespace, steps: Steps, initial: str, iterations: int) -> str:
    """Train up to `iterations`, going on with what there is; return the caffemodel's path."""
    folder = os.path.join(arguments.out, "run")
    dropped = max(arguments.iterations[-1] * 3 // 4, 1)
    steps.run("training to %d" % iterations, detect_voc.main, [
        "train", NET, initial, folder, *_data(arguments), "--iterations", str(iterations),
        "--lr", str(RATE), "--step", str(dropped), "--scales", *map(str, SCALES),
        "--background-overlap", str(BACKGROUND_OVERLAP), "--seed", str(arguments.seed),
        "--snapshot", str(iterations), "--resume"])
    return os.path.join(folder, "final.caffemodel")


def test(arguments: argparse.Namespace, steps: Steps, weights: str,
         iterations: int) -> Dict[str, Any]:
    """Return the average precisions of a net after `iterations`."""
    command = test_command(arguments, weights, iterations)
    steps.run("testing after %d" % iterations, detect_voc.main, command)
    content = results.read_json(command[-1])
    return {"iterations": iterations, **{name: content[name] for name in (
        "mAP", "mAP_area", "AP", "seconds_per_image")}}


def test_command(arguments: argparse.Namespace, weights: str, iterations: int) -> List[str]:
    """Return the words of a `detect_voc.py test` command; the last is its result's path."""
    return ["test", NET, weights, *_data(arguments), "--scales", str(SCALES[1]), "--out",
            os.path.join(arguments.out, "result_%d.json" % iterations)]


def _data(arguments: argparse.Namespace) -> List[str]:
    return ["--voc", arguments.voc, "--max-size", str(MAX_SIZE), "--cpu", *_search(arguments)]


def _search(arguments: argparse.Namespace) -> List[str]:
    return ["--search-side", str(SEARCH_SIDE), "--search-k", str(SEARCH_K), "--cache",
            arguments.cache]


def lightened(voc: Voc, folder: str) -> str:
    """Make a VOC folder with the same annotations and lighter images of both splits; return it.

    Each image is multiplied so that WHITE % of its pixels stay below 255 in all channels: the net
    and the proposals do not have to bridge the difference between dark and light photographs.
    """
    os.makedirs(os.path.join(folder, "JPEGImages"), exist_ok=True)
    for name in ("Annotations", "ImageSets"):
        link = os.path.join(folder, name)
        if os.path.islink(link):
            os.unlink(link)
        os.symlink(os.path.abspath(os.path.join(voc.root, name)), link)
    for image in voc.images("trainval") + voc.images("test"):
        truth = voc.objects(image)
        pixels = read_image(voc.image_path(image), truth.width, truth.height)
        white = max(float(np.percentile(pixels.max(axis=2), WHITE)), 1.0)
        lighter = cv2.convertScaleAbs(pixels, alpha=255 / white)
        path = os.path.join(folder, "JPEGImages", image + ".jpg")
        with files.replacing(path) as temporary, open(temporary, "wb") as file:
            file.write(cv2.imencode(".jpg", lighter, [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes())
    return folder


def link_images(voc: Voc, folder: str) -> None:
    """Make a folder of links to the training images: test images play no part in initialising."""
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    for image in voc.images("trainval"):
        path = voc.image_path(image)
        os.symlink(os.path.abspath(path), os.path.join(folder, os.path.basename(path)))


def write_untrained(weights: str, classes: int, seed: int, path: str) -> None:
    """Write a detection net's weights before training: the scores' are random.

    Runs in a child process.
    """
    import_caffe().set_random_seed(seed)
    skeleton = detection_net.skeleton_of(read_definition(NET))
    built = build_net(detection_net.testing_net(skeleton, classes))
    load_weights(built, weights, detection_net.FRESH)
    with files.replacing(path) as temporary:
        built.save(temporary)


# ---------------------------------------------------------------------------------------------
# The picture
# ---------------------------------------------------------------------------------------------

def write_picture(words: Sequence[str], path: str) -> None:
    """Write a grid of the test images with the surest detections; objects are white.

    `words` are those of `test_command`.  Runs in a child process.
    """
    processes.log_to_stderr(quiet=True)
    arguments = detect_voc.parser().parse_args(words)
    voc = Voc(arguments.voc)
    use_device(None)
    scored = detect_voc.detect(arguments, voc, gpu=False)
    surest = [found.scores.max(initial=0) for found in scored.detections]
    order = np.argsort(-np.array(surest), kind="stable")[:ROWS * COLUMNS]
    tiles = [tile(voc, scored, int(index)) for index in order]
    tiles += [np.full_like(tiles[0], 255)] * (ROWS * COLUMNS - len(tiles))
    grid = np.vstack([np.hstack(tiles[row:row + COLUMNS])
                      for row in range(0, ROWS * COLUMNS, COLUMNS)])
    with files.replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(cv2.imencode(".jpg", grid, [cv2.IMWRITE_JPEG_QUALITY, 65])[1].tobytes())


def tile(voc: Voc, scored: detect_voc.Scored, index: int) -> np.ndarray:
    """Return an image with its detections that fits a TILE with a white border, uint8 BGR."""
    found, truth = scored.detections[index], scored.objects[index]
    image = read_image(voc.image_path(scored.images[index]), truth.width, truth.height)
    width, height = TILE
    scale = min((width - 4) / truth.width, (height - 4) / truth.height)
    small = cv2.resize(image, scaled_size(truth.width, truth.height, scale),
                       interpolation=cv2.INTER_AREA)
    sure = found.scores >= SHOWN
    shown = Detections(found.boxes[sure] * scale, found.scores[sure], found.classes[sure])
    drawn = detection.picture(small, shown, voc.classes, truth.boxes * scale)
    whole = np.full((height, width, 3), 255, np.uint8)
    top, left = (height - drawn.shape[0]) // 2, (width - drawn.shape[1]) // 2
    whole[top:top + drawn.shape[0], left:left + drawn.shape[1]] = drawn
    return whole


# ---------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------

def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the demonstration as the command line says; return the exit status."""
    parser = processes.Parser(prog="detection_demo.py", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--voc", required=True, metavar="DIR", help="folder in VOC's layout")
    add("--out", required=True, metavar="DIR", help="folder for everything; a run in it is resumed")
    add("--iterations", type=count, nargs="+", default=[1000, 2000, 4000], metavar="N",
        help="after which mAP is measured, ascending; the learning rate drops after three "
             "quarters of the last (default 1000 2000 4000)")
    add("--cache", default=proposals.DEFAULT_CACHE, metavar="DIR", help="default %(default)s")
    add("--seed", type=argument_types.natural, default=0, metavar="N", help="default %(default)d")
    return processes.command_line(run, parser.parse_args(argv), parser.prog)


if __name__ == "__main__":
    sys.exit(main())
