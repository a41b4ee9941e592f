"""Measure the speed, memory and quality of magic_init.py.

    python experiments/bench.py --data 'photos/init/*' --measure 'photos/measure/*' --out bench.json

Times are relative to F, the time of one Caffe forward of as many images as the command takes (160
in batches of 16) in the same run. Plain Caffe measures the change rates (equation 2) on other
photographs.
"""
import argparse
import logging
import os
import subprocess
import sys
import tempfile
import time
from typing import Any, Dict, List, NamedTuple, Optional, Sequence

import numpy as np

from ddinit import argument_types, files, processes, results
from ddinit.images import find_images
from plain_caffe import judge
from training.starts import definition_of

log = logging.getLogger("bench")
MODELS = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "models")
BATCH_SIZE, BATCHES = 16, 10  # of the command


class Case(NamedTuple):
    """A run of the command: its name, the net, and its flags."""
    name: str
    net: str
    flags: Sequence[str]


CASES = [
    Case("caffenet gaussian", "caffenet", ["-t", "gaussian", "-cs"]),
    Case("caffenet kmeans", "caffenet", ["-t", "kmeans", "-cs"]),
    Case("caffenet rescale", "caffenet", ["-cs", "-l", "caffenet gaussian"]),
    Case("googlenet kmeans", "googlenet", ["-t", "kmeans", "-cs"]),
    Case("vgg16 kmeans", "vgg16", ["-t", "kmeans", "-cs"]),
]


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the cases that the command line asks for; return the exit status."""
    parser = processes.Parser(prog="bench.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", required=True, metavar="GLOB", help="images to initialize from")
    parser.add_argument("--measure", required=True, metavar="GLOB",
                        help="other images, to measure change rates on")
    parser.add_argument("--out", required=True, metavar="FILE", help="JSON file to write")
    parser.add_argument("--cases", nargs="+", metavar="CASE", choices=[case.name for case in CASES],
                        default=[case.name for case in CASES[:4]],
                        help="%(choices)s (default: the first four)")
    parser.add_argument("--seed", type=argument_types.natural, default=1,
                        help="random seed of the weights (default: %(default)d)")
    parser.add_argument("--draw", action="store_true",
                        help="draw both sets of images at random from all of them, by the seed")
    arguments = parser.parse_args(argv)
    processes.log_to_stderr()
    return processes.command_line(run, arguments, parser.prog)


def run(arguments: argparse.Namespace) -> None:
    """Time the cases, each beside a forward of its net; write and print the table."""
    files.check_writable(arguments.out)
    arguments.data, arguments.measure = map(find_images, (arguments.data, arguments.measure))
    if arguments.draw:
        images, count = arguments.data + arguments.measure, len(arguments.data)
        order = np.random.default_rng(arguments.seed).permutation(len(images))
        drawn = [images[number] for number in order]
        arguments.data, arguments.measure = drawn[:count], drawn[count:]
    rows: List[Dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="bench.") as folder:
        for case in CASES:
            if case.name in arguments.cases:
                rows.append(time_case(case, arguments, folder))
                log.info("%s", rows[-1])
    results.write_json(arguments.out, rows)
    print("%-20s %8s %8s %9s %8s %8s" % ("case", "F (s)", "time/F", "peak (MB)", "rates", "unseen"))
    for row in rows:
        print("%-20s %8.2f %8.2f %9.0f %8.3f %8.3f" % (
            row["case"], row["forward_seconds"], row["ratio"], row["peak_mb"], row["spread"],
            row["spread_unseen"]))


def time_case(case: Case, arguments: argparse.Namespace, folder: str) -> Dict[str, Any]:
    """Return the seconds, the ratio to F, the peak memory and the spread of rates of one run.

    F is measured before and after the run; the lower value counts.
    """
    net = os.path.join(MODELS, case.net, "deploy.prototxt")
    output = os.path.join(folder, case.name + ".caffemodel")
    report = os.path.join(folder, "report.json")
    flags = [os.path.join(folder, flag + ".caffemodel") if flag in {case.name for case in CASES}
             else flag for flag in case.flags]
    images = arguments.data
    before = processes.in_child(judge.forward_seconds, net, images, BATCH_SIZE, BATCHES)
    command = [sys.executable, os.path.join(os.path.dirname(MODELS), "magic_init.py"), net, output,
               "-d", *images, "--report", report, "--quiet",
               "--seed", str(arguments.seed)] + flags
    started = time.perf_counter()
    peak = _run(command)
    seconds = time.perf_counter() - started
    after = processes.in_child(judge.forward_seconds, net, images, BATCH_SIZE, BATCHES)
    forward = min(before, after)
    rates, _ = processes.in_child(judge.change_rates, definition_of(net, output), output,
                                  arguments.measure)
    content = results.read_json(report)
    return {"case": case.name, "seed": arguments.seed, "forward_seconds": forward,
            "seconds": seconds, "ratio": seconds / forward, "peak_mb": peak / 1e6,
            "spread": content["spread_after"], "spread_unseen": judge.spread_of(rates),
            "phases": content["seconds"]}


def _run(command: Sequence[str]) -> int:
    """Run a command; return the most memory in bytes that one of its processes has held."""
    _, status, usage = os.wait4(subprocess.Popen(command).pid, 0)
    if status:
        raise ValueError("The command has failed: %s" % " ".join(command))
    return 1024 * usage.ru_maxrss


if __name__ == "__main__":
    sys.exit(main())
