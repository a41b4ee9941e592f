"""What detection's own parts cost beside the net: ROI pooling, and reading images and ROIs.

2,000 ROIs are pooled on a map of 256 x 40 x 60 in turns with the convolutions that make such a map
in CaffeNet; then training iterations wait for data from photographs, with and without 40 times as
many images in the training set.

    python experiments/bench_detection.py --voc VOCdevkit/VOC2007 --out build/bench_detection.json
"""
import argparse
import logging
import os
import statistics
import sys
import tempfile
import time
from typing import Any, Callable, Dict, List, Optional, Sequence

import numpy as np

import detection_batches
import detection_net
from ddinit import argument_types, files, processes, results
from ddinit.argument_types import count
from ddinit.caffe_net import choose_device, use_device
from ddinit.prototxt import build_net, caffe_messages, read_definition
from detection_batches import RoiTable
from voc import Voc

MODELS = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "models")
ROIS, CHANNELS, HEIGHT, WIDTH, STRIDE = 2000, 256, 40, 60, 16  # of the pooling
PROPOSALS = 2000  # an image, at random: what finds them does not matter here
WARM_UP = 2  # iterations: the first batch is waited for, blobs are made
SCALES, MAX_SIZE = [480, 576, 688], 2000
TIMES = 40  # as many images


def measure(arguments: argparse.Namespace, gpu: Optional[int]) -> Dict[str, Any]:
    """Return seconds and megabytes of everything that the command reports.  Runs in a child."""
    processes.log_to_stderr()
    use_device(gpu)
    found: Dict[str, Any] = {"pooling": measure_pooling(arguments.rounds)}
    with tempfile.TemporaryDirectory(prefix="bench.") as folder:
        table = random_table(Voc(arguments.voc))
        for name, larger in (("loader", 1), ("loader_of_more", TIMES)):
            detection_batches.save_table(repeated(table, larger), folder)
            found[name] = measure_loader(arguments, table, folder)
            found[name]["images"] = len(table.paths) * larger
            logging.info("%d images: %s", found[name]["images"], found[name])
    return found


# ---------------------------------------------------------------------------------------------
# ROI pooling
# ---------------------------------------------------------------------------------------------

def measure_pooling(rounds: int) -> Dict[str, float]:
    """Return median seconds of ROI pooling and of CaffeNet's convolutions, measured in turns."""
    rng = np.random.default_rng(0)
    pooling = _net_of([], [("conv5", (1, CHANNELS, HEIGHT, WIDTH)), ("rois", (ROIS, 5))])
    pooling.blobs["conv5"].data[...] = rng.standard_normal((1, CHANNELS, HEIGHT, WIDTH))
    corners = rng.uniform(0, [WIDTH * STRIDE, HEIGHT * STRIDE], (ROIS, 2, 2))
    pooling.blobs["rois"].data[:, 1:] = np.sort(corners, axis=1).reshape(ROIS, 4)
    skeleton = detection_net.skeleton_of(
        read_definition(os.path.join(MODELS, "caffenet", "deploy.prototxt")))
    # Centred layers of stride 2 map n cells to n // 2 + 1: these sides give HEIGHT and WIDTH.
    sides = (1, 3, (HEIGHT - 1) * STRIDE, (WIDTH - 1) * STRIDE)
    trunk = _net_of(skeleton.trunk, [("data", sides)])
    shape = trunk.blobs["conv5"].data.shape
    if shape != (1, CHANNELS, HEIGHT, WIDTH):
        raise ValueError("conv5 is %s" % (shape,))
    trunk.blobs["data"].data[...] = rng.standard_normal(sides) * 50
    seconds = _in_turns({"roi_pooling": pooling.forward, "convolutions": trunk.forward}, rounds)
    return {**seconds, "ratio": seconds["roi_pooling"] / seconds["convolutions"]}


def _net_of(layers: Sequence[Any], inputs: Sequence[Any]) -> Any:
    """A caffe.Net of these layers, or of ROI pooling where there are none."""
    net = caffe_messages().NetParameter()
    for name, shape in inputs:
        layer = net.layer.add(name=name, type="Input", top=[name])
        layer.input_param.shape.add(dim=shape)
    net.layer.extend(layers)
    if not layers:
        detection_net.add_roi_pooling(net, "roi_pool5", "conv5", "pool5", 6, 1 / STRIDE)
    return build_net(net)


def _in_turns(functions: Dict[str, Callable[[], Any]], rounds: int) -> Dict[str, float]:
    taken: Dict[str, List[float]] = {name: [] for name in functions}
    for turn in range(rounds + WARM_UP):
        for name, function in functions.items():
            started = time.perf_counter()
            function()
            if turn >= WARM_UP:
                taken[name].append(time.perf_counter() - started)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


# ---------------------------------------------------------------------------------------------
# Reading images and ROIs
# ---------------------------------------------------------------------------------------------

def random_table(voc: Voc) -> RoiTable:
    """Return the training images of a folder with PROPOSALS random proposals each."""
    rng = np.random.default_rng(0)
    images = voc.images("trainval")
    found = []
    for image in images:
        size = voc.objects(image)
        corners = rng.uniform(0, [size.width - 1, size.height - 1], (PROPOSALS, 2, 2))
        found.append(np.sort(corners, axis=1).reshape(-1, 4).astype(np.float32))
    return detection_batches.collect(voc, images, found)


def repeated(table: RoiTable, times: int) -> RoiTable:
    """Return a table with every image `times` times."""
    def ends(first: np.ndarray) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(np.tile(np.diff(first), times))])
    return RoiTable(table.paths * times, np.tile(table.sizes, (times, 1)),
                    np.tile(table.proposals, (times, 1)), ends(table.proposal_ends),
                    np.tile(table.objects, (times, 1)), np.tile(table.classes, times),
                    ends(table.object_ends))


def measure_loader(arguments: argparse.Namespace, table: RoiTable,
                   folder: str) -> Dict[str, float]:
    """Return mean seconds of an iteration and of its wait for data, and the workers' memory."""
    classes = int(table.classes.max())
    skeleton = detection_net.skeleton_of(read_definition(arguments.net))
    data = detection_batches.layer_parameters(
        folder, table, np.zeros((classes + 1, 4)), np.ones((classes + 1, 4)), SCALES, MAX_SIZE,
        seed=0, workers=arguments.workers)
    net = build_net(detection_net.training_net(skeleton, classes, data))
    source, last = net.layers[0], len(net.layers) - 1
    source.begin(0)
    waited, taken = [], []
    for _ in range(arguments.rounds + WARM_UP):
        started = time.perf_counter()
        net._forward(0, 0)
        waited.append(time.perf_counter() - started)
        net._forward(1, last)
        net.backward()
        taken.append(time.perf_counter() - started)
    memory = [_private_megabytes(process) for process in source.batches.process_ids()]
    source.close()
    waiting, whole = statistics.mean(waited[WARM_UP:]), statistics.mean(taken[WARM_UP:])
    return {"iteration": whole, "waiting": waiting, "ratio": waiting / (whole - waiting),
            "worker_mb": max(memory, default=0.0)}


def _private_megabytes(process: int) -> float:
    """Memory of a process without pages of files, which the system takes back when it must."""
    with open("/proc/%d/status" % process) as file:
        fields = dict(line.split(":", 1) for line in file)
    return sum(int(fields[name].split()[0]) for name in ("RssAnon", "RssShmem")) / 1024


# ---------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------

def run(arguments: argparse.Namespace) -> int:
    """Measure, print and write; return the exit status."""
    if arguments.out is not None:
        files.check_writable(arguments.out)
    gpu = choose_device(arguments.cpu, arguments.gpu)
    found = processes.in_child(measure, arguments, gpu)
    pooling = found["pooling"]
    print("%d ROIs are pooled in %.3f s, the convolutions before take %.3f s" % (
        ROIS, pooling["roi_pooling"], pooling["convolutions"]))
    for loader in (found["loader"], found["loader_of_more"]):
        print("%d images: an iteration takes %.3f s, of which it waits %.4f s for data (%.1f%% of "
              "the rest); a worker holds %.0f MB" % (
                  loader["images"], loader["iteration"], loader["waiting"],
                  100 * loader["ratio"], loader["worker_mb"]))
    if arguments.out is not None:
        results.write_json(arguments.out, {**found, **results.provenance(0)})
    return 0


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Measure what the command line asks for; return the exit status."""
    parser = processes.Parser(prog="bench_detection.py",
                              description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--voc", required=True, metavar="DIR", help="folder in VOC's layout")
    add("--net", default=os.path.join(MODELS, "caffenet", "deploy.prototxt"), metavar="NET",
        help="net that reads the images (default models/caffenet)")
    add("--rounds", type=count, default=10, metavar="N",
        help="of each measurement (default %(default)d)")
    add("--out", metavar="FILE.json", help="result, for later comparison")
    argument_types.add_workers(parser)
    argument_types.add_device(parser)
    return processes.command_line(run, parser.parse_args(argv), parser.prog)


if __name__ == "__main__":
    sys.exit(main())
