"""Compare initializations for detection on a small VOC folder: a part of table 2 in small.

    python experiments/study_detection.py --voc VOC2007 --out build/detection

It trains models/caffenet_small as Fast R-CNN from the fillers of the reference and from k-means
weights with both scalings, which it initializes from the training images. The photographs are made
lighter first, and proposals are computed by selective search. OUT/study.json holds every trial, and
OUT/study.md the means and standard errors over seeds. Trials that have ended are not repeated when
the command is given again, and others continue.
"""
import argparse
import functools
import os
import sys
from typing import Any, Dict, List, Optional, Sequence

import cv2
import numpy as np

from ddinit import files, processes, results
from ddinit.argument_types import count, positive
from detection.batches import read_image
from detection.proposals import DEFAULT_CACHE
from studies import runs
from tables import formats
from training import trials
from voc.folders import Voc

NET = os.path.join(os.path.dirname(runs.EXPERIMENTS), "models", "caffenet_small",
                   "deploy.prototxt")
METHODS = {"reference": "Gaussian, as in CaffeNet", "ours-kmeans": "ours, k-means, both scalings"}
IMAGES = 160  # that the net is initialized from, or all where there are fewer to train on
SCALES, TEST_SCALE, MAX_SIZE = (240, 300, 360), 300, 600  # of images, in pixels
SEARCH = ["--search-side", "400", "--search-k", "50"]  # a smaller k than usual: objects are small
BACKGROUND_OVERLAP = 0.0  # most proposals overlap no object, because objects are small
WHITE = 99  # percentile of the pixels of an image that stay below 255 when it is made lighter
MEASURES = {"mAP_11_points": "mAP, 11 points", "mAP_area": "mAP, area"}


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the study; return the exit status."""
    parser = processes.Parser(prog="study_detection.py",
                              description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--voc", required=True, metavar="DIR", help="VOC folder")
    add("--out", required=True, metavar="DIR", help="folder for the results")
    add("--iterations", type=count, default=4000, metavar="N",
        help="of which the last quarter has a tenth of the learning rate (default: %(default)d)")
    add("--lr", type=positive, nargs="+", default=[0.003], metavar="RATE",
        help="learning rates, each of which is a row (default: 0.003)")
    add("--seeds", type=count, default=3, metavar="N",
        help="trials of each row (default: %(default)d)")
    add("--cache", default=DEFAULT_CACHE, metavar="DIR",
        help="folder for proposals (default: %(default)s)")
    add("--jobs", type=count, default=os.cpu_count(), metavar="N",
        help="commands that run at a time (default: one per core)")
    arguments = parser.parse_args(argv)
    processes.log_to_stderr()
    return processes.command_line(lambda given: _run(given, argv), arguments, parser.prog)


def _run(arguments: argparse.Namespace, argv: Optional[Sequence[str]]) -> None:
    original = Voc(arguments.voc)
    os.makedirs(arguments.out, exist_ok=True)
    voc = lighter(original, os.path.join(arguments.out, "VOC2007"))
    runner = runs.runner()
    with runner.signals():
        status = runner.run(runs.script("proposals.py", voc, "trainval", "test", *SEARCH,
                                        "--cache", arguments.cache, "--processes",
                                        arguments.jobs))
        if status:
            raise ValueError("The computation of proposals has failed.")
        measured = runner.all([functools.partial(trial, runner, method, rate, seed, voc, arguments)
                            for seed in range(arguments.seeds) for rate in arguments.lr
                            for method in METHODS], arguments.jobs, "trials")
    results.write_json(os.path.join(arguments.out, "study.json"), {
        **results.provenance(None, argv), "trials": measured})
    text = table(measured)
    formats.write(os.path.join(arguments.out, "study.md"), text)
    print(text, end="")


def trial(runner: trials.Runner, method: str, rate: float, seed: int, voc: str,
          arguments: argparse.Namespace) -> Dict[str, Any]:
    """Return what came of a training from a method, running what is missing."""
    name = os.path.join(method, "lr%g" % rate, "seed%d" % seed)
    definition, weights = NET, "none"
    if method != "reference":
        images = min(IMAGES, len(Voc(voc).images("trainval")))
        definition, weights = runs.initialized(
            runner, os.path.join(arguments.out, "start", name), NET, "--method", method, "--voc",
            voc, "--images", images, "--seed", seed)
    data = ["--voc", voc, "--max-size", MAX_SIZE, *SEARCH, "--cache", arguments.cache, "--cpu"]
    folder = os.path.join(arguments.out, "trials", name)
    outcome = runs.trained(runner, folder, runs.script(
        "detect_voc.py", "train", definition, weights, folder, *data,
        "--iterations", arguments.iterations, "--lr", rate,
        "--step", max(arguments.iterations * 3 // 4, 1), "--scales", *SCALES,
        "--background-overlap", BACKGROUND_OVERLAP, "--seed", seed,
        "--snapshot", max(arguments.iterations // 4, 1)))
    measured = {"method": method, "learning_rate": rate, "seed": seed, **outcome}
    if "diverged" not in outcome:
        folder = os.path.join(arguments.out, "tests", name)
        result = os.path.join(folder, "result.json")
        runs.make_once(runner, folder, runs.script(
            "detect_voc.py", "test", definition,
            os.path.join(arguments.out, "trials", name, "final.caffemodel"), *data,
            "--scales", TEST_SCALE, "--out", result))
        content = results.read_json(result)
        measured.update({measure: content[measure] for measure in MEASURES})
    return measured


def table(measured: Sequence[Dict[str, Any]]) -> str:
    """Return the means and standard errors over seeds as a Markdown table."""
    rows = []
    for method, about in METHODS.items():
        for rate in sorted({record["learning_rate"] for record in measured}):
            mine = [record for record in measured
                    if (record["method"], record["learning_rate"]) == (method, rate)]
            ended = [record for record in mine if "diverged" not in record]
            rows.append([about, "%g" % rate, *[_mean([record[measure] for record in ended])
                                               for measure in MEASURES],
                         str(len(mine) - len(ended))])
    return formats.markdown(["initialization", "learning rate", *MEASURES.values(), "diverged"],
                            rows)


def _mean(values: List[float]) -> str:
    if not values:
        return ""
    mean, error = formats.mean_and_error(values)
    return "%.3f" % mean if error is None else "%.3f ± %.3f" % (mean, error)


def lighter(voc: Voc, folder: str) -> str:
    """Make a VOC folder with the same annotations and lighter images; return it.

    Each image is multiplied so that WHITE % of its pixels stay below 255 in all channels.
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
        path = os.path.join(folder, "JPEGImages", image + ".jpg")
        encoded = cv2.imencode(".jpg", cv2.convertScaleAbs(pixels, alpha=255 / white),
                               [cv2.IMWRITE_JPEG_QUALITY, 95])[1]
        with files.replacing(path) as temporary, open(temporary, "wb") as file:
            file.write(encoded.tobytes())
    return folder


if __name__ == "__main__":
    sys.exit(main())
