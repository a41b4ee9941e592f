"""PASCAL VOC detection with Fast R-CNN: trains a net from any weights, and scores it (section 4).

    python experiments/detect_voc.py train models/caffenet/deploy.prototxt caffenet.caffemodel \\
        build/detection --voc VOCdevkit/VOC2007 --proposals voc_2007_trainval.mat
    python experiments/detect_voc.py test models/caffenet/deploy.prototxt \\
        build/detection/final.caffemodel --voc VOCdevkit/VOC2007 \\
        --proposals voc_2007_test.mat --out build/detection/result.json

Training is the paper's: all layers, 150,000 iterations of 2 images, learning rate 0.001 (or 0.002
or 0.01, whichever ends best) times 0.1 every 50,000, images at five sizes; all else is Fast
R-CNN's default (Girshick 2015): momentum 0.9, weight decay 0.0005, and detection_batches.
Testing is at a single size.  NET is the plain classification net (detection_net).
"""
import argparse
import logging
import os
import shutil
import sys
import threading
import time
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
from tqdm import tqdm

import detection
import detection_batches
import detection_net
import proposals
import run_folder
import training_options
from average_precision import AveragePrecision, Detections, detection_ap
from ddinit import argument_types, caffemodel, files, processes, results
from ddinit.argument_types import count, positive
from ddinit.caffe_net import choose_device, use_device
from ddinit.prototxt import build_net, caffe_messages, read_definition
from detection_batches import largest_image_bytes, make_testing_images, scale_of
from prefetch import Prefetcher
from training import Folding, Plan, exit_status, load_weights, train
from voc import Objects, Voc

MOMENTUM = 0.9
WEIGHT_DECAY = 0.0005
DROP = 0.1  # of the learning rate, every --step iterations
TRAINING_SPLIT, TEST_SPLIT = "trainval", "test"


# ---------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------

def run_training(arguments: argparse.Namespace, gpu: Optional[int]) -> int:
    """Train as the command line says; return the exit status.  Runs in a child process."""
    processes.log_to_stderr()
    table_folder = os.path.join(arguments.folder, ".rois")
    try:
        plan = training_plan(arguments, gpu, table_folder)
        outcome = train(plan)
    finally:
        shutil.rmtree(table_folder, ignore_errors=True)
    if outcome.stopped_by is None:
        logging.info("wrote %s", os.path.join(plan.folder, "final.caffemodel"))
    return exit_status(outcome, plan)


def training_plan(arguments: argparse.Namespace, gpu: Optional[int], table_folder: str) -> Plan:
    """Return the plan of a training run, having written its ROIs into `table_folder`."""
    voc = Voc(arguments.voc)
    skeleton = detection_net.skeleton_of(read_definition(arguments.net))
    weights = _starting_weights(arguments, skeleton)
    images = voc.images(TRAINING_SPLIT)
    table = detection_batches.collect(voc, images, proposals.load(voc, images, arguments))
    if len(table.paths) < len(images):
        logging.info("left out %d of %d images: all their objects are difficult",
                     len(images) - len(table.paths), len(images))
    means, deviations = detection_batches.target_statistics(table, len(voc.classes))
    detection_batches.save_table(table, table_folder)
    data = detection_batches.layer_parameters(
        table_folder, table, means, deviations, arguments.scales, arguments.max_size,
        arguments.seed, arguments.workers, arguments.background_overlap)
    native = detection_net.native_types(gpu is not None)
    return Plan(
        net=detection_net.training_net(skeleton, len(voc.classes), data, native),
        solver=solver_parameters(arguments), folder=arguments.folder,
        iterations=arguments.iterations, seed=arguments.seed, weights=weights,
        fresh=detection_net.FRESH, snapshot_every=arguments.snapshot, resume=arguments.resume,
        gpus=[] if gpu is None else [gpu], settings=_settings(arguments, voc),
        folding=folding(means, deviations))


def _starting_weights(arguments: argparse.Namespace,
                      skeleton: detection_net.Skeleton) -> Optional[str]:
    """The caffemodel to start from, seen to be readable before hours of selective search."""
    if arguments.weights != "none":
        caffemodel.read(arguments.weights)
        return str(arguments.weights)
    layer = detection_net.unfilled(skeleton)
    if layer is not None:
        raise ValueError("%s: layer '%s' has no weight_filler, so its weights would start at 0: "
                         "give a caffemodel in place of 'none'" % (arguments.net, layer))
    return None


def _settings(arguments: argparse.Namespace, voc: Voc) -> Dict[str, Any]:
    return {"paths": {"definition": os.path.abspath(arguments.net),
                      "voc": os.path.abspath(arguments.voc)},
            "definition_sha256": run_folder.sha256(arguments.net), "split": TRAINING_SPLIT,
            "classes": voc.classes, "learning_rate": arguments.lr, "step": arguments.step,
            "scales": arguments.scales, "max_size": arguments.max_size,
            "background_overlap": arguments.background_overlap, **proposals.described(arguments)}


def solver_parameters(arguments: argparse.Namespace) -> Any:
    """Return the paper's solver."""
    return caffe_messages().SolverParameter(
        type="SGD", base_lr=arguments.lr, lr_policy="step", gamma=DROP, stepsize=arguments.step,
        momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)


def folding(means: np.ndarray, deviations: np.ndarray) -> Folding:
    """Return what makes bbox_pred's output a target from one normalised by `means` and
    `deviations` (classes + 1, 4), and back: W' = deviation W, b' = deviation b + mean."""
    factor = deviations.reshape(-1).astype(np.float32)
    shift = means.reshape(-1).astype(np.float32)

    def fold(net: Any) -> None:
        weights, bias = net.params["bbox_pred"]
        weights.data[...] *= factor[:, None]
        bias.data[...] = bias.data * factor + shift

    def unfold(net: Any) -> None:
        weights, bias = net.params["bbox_pred"]
        weights.data[...] /= factor[:, None]
        bias.data[...] = (bias.data - shift) / factor
    return Folding(fold, unfold)


# ---------------------------------------------------------------------------------------------
# Testing
# ---------------------------------------------------------------------------------------------

class Scored(NamedTuple):
    """Images of a split, their annotations and what was found in them; seconds an image."""
    images: List[str]
    objects: List[Objects]
    detections: List[Detections]
    seconds: float


def run_test(arguments: argparse.Namespace, gpu: Optional[int]) -> int:
    """Score a net as the command line says; return the exit status.  Runs in a child process."""
    processes.log_to_stderr()
    files.check_writable(arguments.out)
    voc = Voc(arguments.voc)
    use_device(gpu)
    scored = detect(arguments, voc, gpu is not None)
    precision = detection_ap(scored.detections, scored.objects, len(voc.classes))
    stem = os.path.splitext(arguments.out)[0]
    detection.write_comp4(stem + "_comp4", TEST_SPLIT, voc.classes, scored.images,
                          scored.detections)
    if arguments.draw is not None:
        detection.draw(arguments.draw, voc, scored.images, scored.detections)
    results.write_json(arguments.out, {
        **report(voc.classes, precision, scored.objects),
        "images": len(scored.images), "seconds_per_image": scored.seconds,
        "scale": arguments.scales, "max_size": arguments.max_size,
        "definition_sha256": run_folder.sha256(arguments.net),
        "weights_sha256": run_folder.sha256(arguments.weights),
        **proposals.described(arguments), **results.provenance(None)})
    print("mAP %.4f (11 points), %.4f (area): %d classes, %d images, %.3f s each" % (
        precision.mean_eleven_point, precision.mean_area, len(voc.classes), len(scored.images),
        scored.seconds))
    return 0


def detect(arguments: argparse.Namespace, voc: Voc, gpu: bool) -> Scored:
    """Return what the net finds in the test images."""
    skeleton, net = _testing_net(arguments, len(voc.classes), gpu)
    images, objects, found = _test_images(arguments, voc)
    sizes = [(item.width, item.height) for item in objects]
    feed = Prefetcher(make_testing_images, (
        [voc.image_path(image) for image in images], sizes, arguments.scales,
        arguments.max_size), arguments.workers,
        slot_bytes=largest_image_bytes(np.array(sizes), [arguments.scales], arguments.max_size))
    collected = detection.Collected(len(voc.classes), len(images))
    started = time.monotonic()
    feed.start(0)
    tqdm.set_lock(threading.RLock())  # its default, a semaphore, outlives a process that aborts
    try:
        for number in tqdm(range(len(images)), unit="image", disable=None):
            (pixels,), (width, height) = feed.next(), sizes[number]
            scale = scale_of(width, height, arguments.scales, arguments.max_size)
            scores, moved = detection.scored_rois(net, skeleton.image, skeleton.stride, pixels,
                                                  scale, found[number])
            if not (np.isfinite(scores).all() and np.isfinite(moved).all()):
                raise ValueError("%s: the net's scores of image %s are not finite"
                                 % (arguments.weights, images[number]))
            collected.add(scores, moved, width, height)
    finally:
        feed.close()
    detections = collected.detections()
    return Scored(images, objects, detections, (time.monotonic() - started) / len(images))


def _test_images(arguments: argparse.Namespace,
                 voc: Voc) -> Tuple[List[str], List[Objects], List[np.ndarray]]:
    """The images to score, their annotations and their proposals, seen to fit each other."""
    split = voc.images(TEST_SPLIT)
    found = proposals.load(voc, split, arguments, arguments.limit)
    images = split[:arguments.limit]
    objects = [voc.objects(image) for image in images]
    for image, item, rows in zip(images, objects, found):
        detection_batches.check_inside(rows, item.width, item.height, image)
    return images, objects, found


def _testing_net(arguments: argparse.Namespace, classes: int,
                 gpu: bool) -> Tuple[detection_net.Skeleton, Any]:
    skeleton = detection_net.skeleton_of(read_definition(arguments.net))
    native = detection_net.native_types(gpu)
    net = build_net(detection_net.testing_net(skeleton, classes, native))
    missing = load_weights(net, arguments.weights)
    if missing:
        raise ValueError("%s: has no layer '%s': not weights of this net that detect_voc.py "
                         "trained" % (arguments.weights, missing[0]))
    return skeleton, net


def report(classes: Sequence[str], precision: AveragePrecision,
           objects: Sequence[Objects]) -> Dict[str, Any]:
    """Return average precisions by class, their means and how many objects of each there are."""
    numbers = np.concatenate([item.classes for item in objects])
    difficult = np.concatenate([item.difficult for item in objects])
    return {
        "mAP": precision.mean_eleven_point,
        "mAP_area": precision.mean_area,
        "AP": dict(zip(classes, precision.eleven_point)),
        "AP_area": dict(zip(classes, precision.area)),
        "counts": {name: {"objects": int(((numbers == number) & ~difficult).sum()),
                          "difficult": int(((numbers == number) & difficult).sum())}
                   for number, name in enumerate(classes)},
    }


# ---------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------

def main(argv: Optional[Sequence[str]] = None) -> int:
    """Train or test; return the exit status: 2 after an error, 130 and 143 after a signal."""
    arguments = parser().parse_args(argv)
    return processes.command_line(_run, arguments, "detect_voc.py")


def _run(arguments: argparse.Namespace) -> int:
    gpu = choose_device(arguments.cpu, arguments.gpu)
    function = run_training if arguments.command == "train" else run_test
    return int(processes.in_child(function, arguments, gpu))


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    both = processes.Parser(prog="detect_voc.py", description=(__doc__ or "").splitlines()[0])
    commands = both.add_subparsers(dest="command", required=True)
    _add_train(commands.add_parser("train", help="train a net"))
    _add_test(commands.add_parser("test", help="score a net that was trained"))
    return both


def _add_train(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    training_options.add_run(parser)
    _add_common(parser)
    add("--iterations", type=count, default=150000, metavar="N", help="default %(default)d")
    add("--lr", type=positive, default=0.001, metavar="RATE",
        help="learning rate (default %(default)g)")
    add("--step", type=count, default=50000, metavar="N",
        help="iterations after which the rate is divided by 10, each time (default %(default)d)")
    add("--scales", type=count, nargs="+", default=[480, 576, 688, 864, 1200], metavar="PIXELS",
        help="lengths of images' shorter sides, one at random each time (default 480 576 688 864 "
             "1200)")
    add("--max-size", type=count, default=2000, metavar="PIXELS",
        help="longest side of an image (default %(default)d)")
    add("--background-overlap", type=_background_overlap, metavar="LOW",
        default=detection_batches.BACKGROUND_OVERLAP,
        help="ROIs that overlap an object by LOW up to 0.5 are background, others are not trained "
             "on; where objects are small, 0 shows the net what most proposals are like (default "
             "%(default)g)")
    training_options.add_seed(parser)
    training_options.add_snapshots(parser, 10000)


def _background_overlap(text: str) -> float:
    number = argument_types.finite(text)
    if not 0 <= number < detection_batches.OBJECT_OVERLAP:
        raise argparse.ArgumentTypeError("'%s' is not from 0 to below %g"
                                         % (text, detection_batches.OBJECT_OVERLAP))
    return number


def _add_test(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    training_options.add_trained(parser)
    _add_common(parser)
    add("--scales", type=count, default=600, metavar="PIXELS",
        help="length of images' shorter sides (default %(default)d)")
    add("--max-size", type=count, default=1000, metavar="PIXELS",
        help="longest side of an image (default %(default)d)")
    add("--limit", type=count, metavar="N", help="only the first N images of the split")
    add("--out", required=True, metavar="FILE.json",
        help="result; FILE_comp4/ beside it gets the detections as the development kit reads them")
    add("--draw", metavar="DIR", help="folder for the images with what was found in them")


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--voc", required=True, metavar="DIR",
                        help="folder in VOC's layout, as VOCdevkit/VOC2007")
    proposals.add_arguments(parser)
    argument_types.add_workers(parser)
    argument_types.add_device(parser)


if __name__ == "__main__":
    sys.exit(main())
