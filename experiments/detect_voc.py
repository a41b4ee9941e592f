"""Train any net for PASCAL VOC detection with Fast R-CNN, and score it (section 4.1; tables 2, 3).

    python experiments/detect_voc.py train models/caffenet/deploy.prototxt caffenet.caffemodel \\
        build/detection --voc VOCdevkit/VOC2007 --proposals voc_2007_trainval.mat
    python experiments/detect_voc.py test models/caffenet/deploy.prototxt \\
        build/detection/final.caffemodel --voc VOCdevkit/VOC2007 \\
        --proposals voc_2007_test.mat --out build/detection/result.json

Training follows the paper: all layers learn in 150,000 iterations of 2 images in five sizes, at a
learning rate of 0.001 (or 0.002 or 0.01, whichever is best), times 0.1 every 50,000 iterations. All
else is Fast R-CNN's default (Girshick 2015): momentum 0.9, weight decay 0.0005, and the batches.
Testing uses a single size. NET is the plain classification net.
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

from ddinit import argument_types, files, processes, results
from ddinit.argument_types import count, positive
from ddinit.caffemodel import load_weights
from ddinit.net import use_device
from ddinit.prototxt import build_net, caffe_messages, read_definition
from detection import batches, detections, nets, proposals
from training import options, run_folder
from training.loop import Folding, Plan, run
from training.prefetch import Prefetcher
from training.starts import check_filled
from voc.average_precision import detection_ap
from voc.folders import Objects, Voc

MOMENTUM = 0.9
WEIGHT_DECAY = 0.0005
DROP = 0.1  # of the learning rate, every --step iterations
TRAINING_SPLIT, TEST_SPLIT = "trainval", "test"


def run_training(arguments: argparse.Namespace, gpu: Optional[int]) -> int:
    """Train as the command line says; return the exit status. It runs in a child process."""
    processes.log_to_stderr()
    table_folder = os.path.join(arguments.folder, ".rois")
    try:
        return run(training_plan(arguments, gpu, table_folder))
    finally:
        shutil.rmtree(table_folder, ignore_errors=True)


def training_plan(arguments: argparse.Namespace, gpu: Optional[int], table_folder: str) -> Plan:
    """Return the plan of a training run, having written its ROIs into `table_folder`."""
    voc = Voc(arguments.voc)
    skeleton = nets.skeleton_of(read_definition(arguments.net))
    weights = None if arguments.weights == "none" else arguments.weights
    if weights is None:  # checked before hours of selective search
        kept = caffe_messages().NetParameter(layer=[*skeleton.trunk, *skeleton.head])
        check_filled(kept, [layer.name for layer in kept.layer])
    images = voc.images(TRAINING_SPLIT)
    table = batches.collect(voc, images, proposals.load(voc, images, arguments))
    if len(table.paths) < len(images):
        logging.info("%d of %d images are left out, because all their objects are difficult",
                     len(images) - len(table.paths), len(images))
    means, deviations = batches.target_statistics(table, len(voc.classes))
    batches.save_table(table, table_folder)
    data = batches.layer_parameters(
        table_folder, table, means, deviations, arguments.scales, arguments.max_size,
        arguments.seed, arguments.workers, arguments.background_overlap)
    return Plan(
        net=nets.training_net(skeleton, len(voc.classes), data),
        solver=solver_parameters(arguments), folder=arguments.folder,
        iterations=arguments.iterations, seed=arguments.seed, weights=weights,
        fresh=nets.FRESH, snapshot_every=arguments.snapshot, resume=arguments.resume,
        gpu=gpu, settings=_settings(arguments, voc),
        folding=folding(means, deviations))


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
    """Return what folds `means` and `deviations` (classes + 1, 4) of the targets into bbox_pred.

    Its output is normalized in training and not in files: W' = deviation W, b' = deviation b +
    mean.
    """
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


class Scored(NamedTuple):
    """The images of a split, their objects and detections, and seconds per image."""
    images: List[str]
    objects: List[Objects]
    detections: List[Any]
    seconds: float


def run_test(arguments: argparse.Namespace, gpu: Optional[int]) -> int:
    """Score a net as the command line says; return the exit status. It runs in a child process."""
    processes.log_to_stderr()
    files.check_writable(arguments.out)
    voc = Voc(arguments.voc)
    use_device(gpu)
    scored = detect(arguments, voc)
    precision = detection_ap(scored.detections, scored.objects, len(voc.classes))
    stem = os.path.splitext(arguments.out)[0]
    detections.write_comp4(stem + "_comp4", TEST_SPLIT, voc.classes, scored.images,
                          scored.detections)
    if arguments.draw is not None:
        detections.draw(arguments.draw, voc, scored.images, scored.detections)
    results.write_json(arguments.out, {
        **precision.report(voc.classes), "counts": counts(voc.classes, scored.objects),
        "images": len(scored.images), "seconds_per_image": scored.seconds,
        "scale": arguments.scales, "max_size": arguments.max_size,
        "definition_sha256": run_folder.sha256(arguments.net),
        "weights_sha256": run_folder.sha256(arguments.weights),
        **proposals.described(arguments), **results.provenance(None)})
    print("%s: %d classes, %d images, %.3f s each" % (
        precision.described(), len(voc.classes), len(scored.images), scored.seconds))
    return 0


def detect(arguments: argparse.Namespace, voc: Voc) -> Scored:
    """Return what the net detects in the test images."""
    skeleton, net = _testing_net(arguments, len(voc.classes))
    images, objects, proposed = _test_images(arguments, voc)
    sizes = [(item.width, item.height) for item in objects]
    feed = Prefetcher(batches.make_testing_images, (
        [voc.image_path(image) for image in images], sizes, arguments.scales,
        arguments.max_size), arguments.workers,
        slot_bytes=batches.largest_image_bytes(np.array(sizes), [arguments.scales],
                                               arguments.max_size))
    collected = detections.Collected(len(voc.classes), len(images))
    started = time.monotonic()
    feed.start(0)
    tqdm.set_lock(threading.RLock())  # its default, a semaphore, outlives a process that aborts
    try:
        for number in tqdm(range(len(images)), unit="image", disable=None):
            (pixels,), (width, height) = feed.next(), sizes[number]
            scale = batches.scale_of(width, height, arguments.scales, arguments.max_size)
            scores, moved = detections.scored_rois(net, skeleton.image, skeleton.stride, pixels,
                                                  scale, proposed[number])
            if not (np.isfinite(scores).all() and np.isfinite(moved).all()):
                raise ValueError("%s: the scores of image %s are not finite"
                                 % (arguments.weights, images[number]))
            collected.add(scores, moved, width, height)
    finally:
        feed.close()
    found_in = collected.detections()
    return Scored(images, objects, found_in, (time.monotonic() - started) / len(images))


def _test_images(arguments: argparse.Namespace,
                 voc: Voc) -> Tuple[List[str], List[Objects], List[np.ndarray]]:
    """Return the images to score, their objects and their proposals, which fit each other."""
    split = voc.images(TEST_SPLIT)
    proposed = proposals.load(voc, split, arguments, arguments.limit)
    images = split[:arguments.limit]
    objects = [voc.objects(image) for image in images]
    for image, item, rows in zip(images, objects, proposed):
        batches.check_inside(rows, item.width, item.height, image)
    return images, objects, proposed


def _testing_net(arguments: argparse.Namespace, classes: int) -> Tuple[nets.Skeleton, Any]:
    skeleton = nets.skeleton_of(read_definition(arguments.net))
    net = build_net(nets.testing_net(skeleton, classes))
    missing = load_weights(net, arguments.weights)
    if missing:
        raise ValueError("%s: the file has no layer '%s'. Weights of this net are needed that "
                         "detect_voc.py has trained." % (arguments.weights, missing[0]))
    return skeleton, net


def counts(classes: Sequence[str], objects: Sequence[Objects]) -> Dict[str, Any]:
    """Return how many objects of each class there are, by name."""
    numbers = np.concatenate([item.classes for item in objects])
    difficult = np.concatenate([item.difficult for item in objects])
    return {name: {"objects": int(((numbers == number) & ~difficult).sum()),
                   "difficult": int(((numbers == number) & difficult).sum())}
            for number, name in enumerate(classes)}


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Train or test; return the exit status: 2 after an error, 130 or 143 after a signal."""
    return processes.command_line(options.run, parse(argv), "detect_voc.py")


def parse(argv: Optional[Sequence[str]]) -> argparse.Namespace:
    """Return what a command line asks for."""
    return options.parse(argv, "detect_voc.py", __doc__ or "", ("train a net", _add_train),
                         ("score a net that was trained", _add_test))


def _add_train(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    parser.set_defaults(function=run_training)
    options.add_run(parser)
    _add_common(parser)
    add("--iterations", type=count, default=150000, metavar="N", help="default: %(default)d")
    add("--lr", type=positive, default=0.001, metavar="RATE",
        help="learning rate (default: %(default)g)")
    add("--step", type=count, default=50000, metavar="N",
        help="iterations between divisions of the rate by 10 (default: %(default)d)")
    add("--scales", type=count, nargs="+", default=[480, 576, 688, 864, 1200], metavar="PIXELS",
        help="shorter sides of the images, of which one is drawn each time (default: 480 576 688 "
             "864 1200)")
    add("--max-size", type=count, default=2000, metavar="PIXELS",
        help="longest side of an image (default: %(default)d)")
    add("--background-overlap", type=_background_overlap, metavar="LOW",
        default=batches.BACKGROUND_OVERLAP,
        help="ROIs that overlap an object by LOW up to 0.5 are background, and those that overlap "
             "it less are not trained on (default: %(default)g)")
    options.add_seed(parser)
    options.add_snapshots(parser, 10000)


def _background_overlap(text: str) -> float:
    number = argument_types.finite(text)
    if not 0 <= number < batches.OBJECT_OVERLAP:
        raise argparse.ArgumentTypeError("'%s' is not from 0 to below %g"
                                         % (text, batches.OBJECT_OVERLAP))
    return number


def _add_test(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    parser.set_defaults(function=run_test)
    options.add_trained(parser)
    _add_common(parser)
    add("--scales", type=count, default=600, metavar="PIXELS",
        help="shorter side of the images (default: %(default)d)")
    add("--max-size", type=count, default=1000, metavar="PIXELS",
        help="longest side of an image (default: %(default)d)")
    add("--limit", type=count, metavar="N", help="score only the first N images")
    add("--out", required=True, metavar="FILE.json",
        help="result; FILE_comp4/ beside it receives the detections for the development kit")
    add("--draw", metavar="DIR", help="folder for pictures of the images and their detections")


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--voc", required=True, metavar="DIR",
                        help="VOC folder, such as VOCdevkit/VOC2007")
    proposals.add_arguments(parser)
    options.add_computing(parser)


if __name__ == "__main__":
    sys.exit(main())
