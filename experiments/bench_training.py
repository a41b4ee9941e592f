"""What reading images costs: a training iteration on photographs against one on nothing.

The same net is stepped on random crops (ImageSource) and on a constant blob (DummyData) in turns,
and the median times are compared.  The processor time of the processes that read is told beside
Caffe's, which means something on a busy machine, too.  Then memory is watched over 300 iterations
of a small net.

    python experiments/bench_training.py --voc datasets/VOCdevkit/VOC2007 \\
        --out build/bench_training.json
"""
import argparse
import logging
import os
import statistics
import sys
import tempfile
import time
from typing import Any, Dict, List, NamedTuple, Optional, Sequence

from google.protobuf import text_format

import classify_voc
import training_net
from ddinit import argument_types, files, processes, results
from ddinit.argument_types import count
from ddinit.caffe_net import choose_device, use_device
from ddinit.prototxt import caffe_messages, import_caffe, read_definition
from image_batches import Crops, VocImages

MODELS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "models")
ROUNDS = 3
WARM_UP = 3  # iterations: the first batches are waited for, blobs are made
MEMORY_ITERATIONS = 300
GREY = 50.0  # of an image without any content, above the mean


class Steps(NamedTuple):
    """Seconds of each iteration; processor seconds of all, of the processes that read and of this
    one."""
    seconds: List[float]
    reading: float
    computing: float


def measure(arguments: argparse.Namespace, gpu: Optional[int]) -> Dict[str, Any]:
    """Return seconds of both kinds of iteration and memory in MB.  Runs in a child."""
    processes.log_to_stderr()
    use_device(gpu)
    seconds: Dict[str, List[float]] = {"images": [], "nothing": []}
    reading = computing = 0.0
    solvers = {kind: _solver(arguments, arguments.net, arguments.batch_size, kind)
               for kind in seconds}
    for turn in range(ROUNDS):
        for kind, solver in solvers.items():
            found = _iterations(solver, arguments.iterations, turn)
            seconds[kind] += found.seconds
            reading += found.reading / (ROUNDS * arguments.iterations)
            computing += found.computing / (2 * ROUNDS * arguments.iterations)
            logging.info("round %d of %d, %s: %.3f s an iteration", turn + 1, ROUNDS, kind,
                         statistics.median(found.seconds))
    medians = {kind: statistics.median(taken) for kind, taken in seconds.items()}
    return {"seconds": medians, "ratio": medians["images"] / medians["nothing"],
            "processor_seconds": {"reading": reading, "caffe": computing},
            "memory_iterations": MEMORY_ITERATIONS, "memory_mb": _memory(arguments)}


def _solver(arguments: argparse.Namespace, model: str, batch_size: int, kind: str) -> Any:
    dataset = {"root": os.path.abspath(arguments.voc), "split": "trainval"}
    classes = VocImages(**dataset).labels.shape[1]
    net = training_net.classifier(read_definition(model), batch_size, classes)
    height, width = net.image.shape[2:]
    if kind == "images":
        source = training_net.image_source_layer(
            "data", (net.image.blob, "label"), classify_voc.DATASET, dataset,
            Crops(height, width), batch_size, 0, arguments.workers)
    else:
        source = caffe_messages().LayerParameter(name="data", type="DummyData",
                                                 top=[net.image.blob, "label"])
        source.dummy_data_param.shape.add(dim=net.image.shape)
        source.dummy_data_param.shape.add(dim=[batch_size, classes])
        # Not 0: powers of numbers are slower than powers of 1, in LRN.
        source.dummy_data_param.data_filler.add(type="constant", value=GREY)
        source.dummy_data_param.data_filler.add(type="constant", value=1)
    parameters = classify_voc.solver_parameters(arguments)
    parameters.net_param.CopyFrom(training_net.training_net(net, source))
    with tempfile.TemporaryDirectory() as folder:
        parameters.snapshot_prefix = os.path.join(folder, "unused")
        path = os.path.join(folder, "solver.prototxt")
        with open(path, "w") as file:
            file.write(text_format.MessageToString(parameters))
        return import_caffe().get_solver(path)


def _iterations(solver: Any, iterations: int, turn: int) -> Steps:
    """Step a solver, with the processes that read for it alone at work."""
    sources = [layer for layer in solver.net.layers if hasattr(layer, "begin")]
    for layer in sources:
        layer.begin(turn * (WARM_UP + iterations))
    solver.step(WARM_UP)
    workers = [process for layer in sources for process in layer.batches.process_ids()]
    reading, computing = _processor_seconds(workers), time.process_time()
    seconds = []
    for _ in range(iterations):
        started = time.perf_counter()
        solver.step(1)
        seconds.append(time.perf_counter() - started)
    steps = Steps(seconds, _processor_seconds(workers) - reading,
                  time.process_time() - computing)
    for layer in sources:
        layer.close()
    return steps


def _processor_seconds(processes: Sequence[int]) -> float:
    """Processor time that processes have used so far."""
    total = 0.0
    for process in processes:
        with open("/proc/%d/stat" % process) as file:
            fields = file.read().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def _memory(arguments: argparse.Namespace) -> List[float]:
    """Resident memory in MB of a small net's training after 50 and 300 more iterations."""
    solver = _solver(arguments, os.path.join(MODELS, "caffenet_tiny", "deploy.prototxt"), 4,
                     "images")
    (source,) = [layer for layer in solver.net.layers if hasattr(layer, "begin")]
    source.begin(0)
    measured = []
    for iterations in (50, MEMORY_ITERATIONS):
        solver.step(iterations)
        processes = [os.getpid(), *source.batches.process_ids()]
        measured.append(sum(_resident(process) for process in processes))
    source.close()
    return measured


def _resident(process: int) -> float:
    with open("/proc/%d/statm" % process) as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2 ** 20


def run(arguments: argparse.Namespace) -> int:
    """Measure, print and write; return the exit status."""
    if arguments.out is not None:
        files.check_writable(arguments.out)
    gpu = choose_device(arguments.cpu, arguments.gpu)
    found = processes.in_child(measure, arguments, gpu)
    print("an iteration on images takes %.3f s, on nothing %.3f s: %+.1f%%" % (
        found["seconds"]["images"], found["seconds"]["nothing"], 100 * (found["ratio"] - 1)))
    reading, caffe = (found["processor_seconds"][part] for part in ("reading", "caffe"))
    print("processor time of an iteration: reading %.3f s, Caffe %.3f s: %.1f%%" % (
        reading, caffe, 100 * reading / caffe))
    print("memory: %.0f MB after 50 iterations, %.0f MB after %d more" % (
        *found["memory_mb"], found["memory_iterations"]))
    if arguments.out is not None:
        results.write_json(arguments.out, {**found, **results.provenance(0)})
    return 0


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Measure as the command line says; return the exit status."""
    parser = processes.Parser(prog="bench_training.py", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--voc", required=True, metavar="DIR", help="folder in VOC's layout or its LMDB")
    add("--net", default=os.path.join(MODELS, "caffenet", "deploy.prototxt"), metavar="NET",
        help="definition (default: models/caffenet)")
    add("--batch-size", type=count, default=10, metavar="N", help="images (default %(default)d)")
    add("--iterations", type=count, default=10, metavar="N",
        help="iterations in each of %d rounds (default %%(default)d)" % ROUNDS)
    add("--out", metavar="FILE", help="JSON file to write")
    argument_types.add_workers(parser)
    argument_types.add_device(parser)
    parser.set_defaults(lr=0.001, solver="SGD")
    return processes.command_line(run, parser.parse_args(argv), "bench_training.py")


if __name__ == "__main__":
    sys.exit(main())
