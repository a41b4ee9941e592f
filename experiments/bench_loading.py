"""Measure how long training iterations wait for their data, which processes load ahead.

    python experiments/bench_loading.py classification --voc datasets/VOCdevkit/VOC2007 --cpu
    python experiments/bench_loading.py detection --voc datasets/VOCdevkit/VOC2007 --cpu

The nets are those of classify_voc.py and detect_voc.py. Proposals are random, because their number
matters here and not their quality.
"""
import argparse
import logging
import os
import statistics
import sys
import tempfile
import time
from typing import Any, Dict, List, Optional, Sequence

import numpy as np

from classification import nets as classification_nets
from classification.images import VocImages
from ddinit import argument_types, files, processes, results
from ddinit.argument_types import count
from ddinit.net import choose_device, use_device
from ddinit.prototxt import build_net, read_definition
from detection import batches
from detection import nets as detection_nets
from training import options
from training.batches import Crops
from training.nets import image_source_layer
from voc.folders import Voc

MODELS = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "models")
BATCH_SIZE = 10  # of classification
PROPOSALS = 2000  # per image
SCALES, MAX_SIZE = [480, 576, 688], 2000  # of detection
WARM_UP = 2  # iterations: the first batch is not loaded ahead


def measure(arguments: argparse.Namespace, gpu: Optional[int]) -> Dict[str, float]:
    """Return mean seconds of an iteration and of its wait, and the memory of a worker in MB.

    It runs in a child process.
    """
    processes.log_to_stderr()
    use_device(gpu)
    with tempfile.TemporaryDirectory(prefix="bench.") as folder:
        make = classification_net if arguments.task == "classification" else detection_net
        net = build_net(make(arguments, folder))
        source, last = net.layers[0], len(net.layers) - 1
        source.begin(0)
        waited: List[float] = []
        taken: List[float] = []
        for number in range(arguments.iterations + WARM_UP):
            started = time.perf_counter()
            net._forward(0, 0)
            waited.append(time.perf_counter() - started)
            net._forward(1, last)
            net.backward()
            taken.append(time.perf_counter() - started)
            logging.info("iteration %d: %.3f s, waited %.4f s", number + 1, taken[-1], waited[-1])
        memory = [private_megabytes(process) for process in source.batches.process_ids()]
        source.close()
    return {"iteration": statistics.mean(taken[WARM_UP:]),
            "waiting": statistics.mean(waited[WARM_UP:]), "worker_mb": max(memory, default=0.0)}


def classification_net(arguments: argparse.Namespace, _: str) -> Any:
    """Return the NetParameter that classify_voc.py trains."""
    data = {"root": os.path.abspath(arguments.voc), "split": "trainval"}
    net = classification_nets.classifier(read_definition(arguments.net), BATCH_SIZE,
                                         len(VocImages(**data).classes))
    return classification_nets.training_net(net, image_source_layer(
        "data", (net.image.blob, "label"), "classification.images.VocImages", data,
        Crops(net.image.shape[2], net.image.shape[3]), BATCH_SIZE, 0, arguments.workers))


def detection_net(arguments: argparse.Namespace, folder: str) -> Any:
    """Return the NetParameter that detect_voc.py trains, with random proposals in `folder`."""
    voc, rng = Voc(arguments.voc), np.random.default_rng(0)
    images, found = voc.images("trainval"), []
    for image in images:
        size = voc.objects(image)
        corners = rng.uniform(0, [size.width - 1, size.height - 1], (PROPOSALS, 2, 2))
        found.append(np.sort(corners, axis=1).reshape(-1, 4).astype(np.float32))
    table = batches.collect(voc, images, found)
    batches.save_table(table, folder)
    shape = (len(voc.classes) + 1, 4)
    data = batches.layer_parameters(folder, table, np.zeros(shape), np.ones(shape), SCALES,
                                    MAX_SIZE, seed=0, workers=arguments.workers)
    return detection_nets.training_net(
        detection_nets.skeleton_of(read_definition(arguments.net)), len(voc.classes), data)


def private_megabytes(process: int) -> float:
    """Return the memory of a process without the pages of files."""
    with open("/proc/%d/status" % process) as file:
        fields = dict(line.split(":", 1) for line in file)
    return sum(int(fields[name].split()[0]) for name in ("RssAnon", "RssShmem")) / 1024


def run(arguments: argparse.Namespace) -> None:
    """Measure, print and write."""
    if arguments.out is not None:
        files.check_writable(arguments.out)
    gpu = choose_device(arguments.cpu, arguments.gpu)
    found = processes.in_child(measure, arguments, gpu)
    print("An iteration takes %.3f s, of which it waits %.4f s for data (%.1f%%). A worker holds "
          "%.0f MB." % (found["iteration"], found["waiting"],
                        100 * found["waiting"] / found["iteration"], found["worker_mb"]))
    if arguments.out is not None:
        results.write_json(arguments.out, {**found, **results.provenance(0)})


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Measure what the command line asks for; return the exit status."""
    parser = processes.Parser(prog="bench_loading.py", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("task", choices=("classification", "detection"))
    add("--voc", required=True, metavar="DIR", help="VOC folder")
    add("--net", default=os.path.join(MODELS, "caffenet", "deploy.prototxt"), metavar="NET",
        help="network definition (default: models/caffenet)")
    add("--iterations", type=count, default=20, metavar="N", help="default: %(default)d")
    add("--out", metavar="FILE.json", help="file for the result")
    options.add_workers(parser)
    argument_types.add_device(parser)
    return processes.command_line(run, parser.parse_args(argv), parser.prog)


if __name__ == "__main__":
    sys.exit(main())
