"""Check that a GPU computes what the CPU does, on CaffeNet and generated photographs.

    python experiments/gpu_check.py --out build/gpu_check.json

Both devices start from the same k-means weights, which the CPU makes. What is compared: the change
rates of all layers before and after the step between layers, the outputs of a network that is
rescaled with its function kept, and the losses of a short training without dropout, whose random
numbers differ between devices. The exit status is 0 where all agree, 1 where something does not,
and 2 where there is no GPU or Caffe is built for the CPU only. The time that the initialization
takes on each device is shown beside the paper's.
"""
import argparse
import logging
import os
import subprocess
import sys
import tempfile
from typing import Any, Dict, List, NamedTuple, Optional, Sequence

from ddinit import argument_types, change_rates, files, processes, results
from ddinit.images import find_images
from ddinit.net import choose_device
from ddinit.rewrite import worst_difference
from devices.measurement import (
    BATCH_SIZE,
    BATCHES,
    CLASSES,
    DISTURBANCE,
    JUDGED,
    Task,
    measure,
)

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
NET = os.path.join(ROOT, "models", "caffenet", "deploy.prototxt")
# The largest differences: of rates and losses over the first device's, of outputs over their std.
RATES, OUTPUTS, LOSSES = 0.02, 1e-3, 1e-2
SPREAD = 1.2  # of the change rates after the step between layers
PAPER_SECONDS = 54  # table 3: CaffeNet, k-means, on a Titan X


class Check(NamedTuple):
    """A value on both devices, and the figure that has to be at most `bound`."""
    name: str
    first: float
    second: float
    figure: float
    bound: float

    @property
    def agrees(self) -> bool:
        return bool(self.figure <= self.bound)  # NaN does not agree


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Compare the devices that the command line asks for; return the exit status."""
    parser = processes.Parser(prog="gpu_check", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--out", metavar="FILE", help="JSON file to write")
    add("--gpu", type=argument_types.natural, default=0, metavar="ID", help="default: 0")
    add("--devices", nargs=2, choices=("cpu", "gpu"), default=["cpu", "gpu"],
        help="the devices to compare (default: cpu gpu)")
    add("--net", default=NET, metavar="NET", help="deploy definition (default: CaffeNet's)")
    add("--data", metavar="GLOB", help="photographs, of which every %dth shows the same class "
                                       "(default: generated ones)" % CLASSES)
    add("--seed", type=argument_types.natural, default=0, metavar="N", help="default: 0")
    add("--spread", type=argument_types.positive, default=SPREAD, metavar="FACTOR",
        help="the rates after calibration lie within it (default: %(default)g)")
    add("--disturb", metavar="LAYER", help="multiply this layer's weights by %g on the second "
                                           "device, to see the check fail" % DISTURBANCE)
    arguments = parser.parse_args(argv)
    processes.log_to_stderr()
    return processes.command_line(run, arguments, parser.prog)


def run(arguments: argparse.Namespace) -> int:
    """Let each device compute in a child process, and compare; return the exit status."""
    if arguments.out is not None:
        files.check_writable(arguments.out)
    gpu = choose_device(False, arguments.gpu) if "gpu" in arguments.devices else None
    names = ["CPU" if name == "cpu" else "GPU %d" % arguments.gpu for name in arguments.devices]
    with tempfile.TemporaryDirectory(prefix="gpu_check.") as folder:
        images = find_images(arguments.data or generated(os.path.join(folder, "photographs")))
        if len(images) < BATCH_SIZE:
            raise ValueError("There are %d photographs, but at least %d are needed."
                             % (len(images), BATCH_SIZE))
        cut = len(images) * BATCHES // (BATCHES + JUDGED)
        task = Task(arguments.net, images[:cut], images[cut:], folder, arguments.seed,
                    arguments.disturb)
        measured = []
        for name, device in zip(names, arguments.devices):
            logging.info("computing on the %s", name)
            measured.append(processes.in_child(measure, task, gpu if device == "gpu" else None))
    checks = compare(measured[0], measured[1], arguments.spread)
    print(report(names, measured, checks))
    agrees = all(check.agrees for check in checks)
    if arguments.out is not None:
        results.write_json(arguments.out, {
            "agrees": agrees, "devices": names, "net": arguments.net, "images": len(images),
            "checks": [{**check._asdict(), "agrees": check.agrees} for check in checks],
            "times": [one["times"] for one in measured], "paper_seconds": PAPER_SECONDS,
            **results.provenance(arguments.seed)})
    return 0 if agrees else 1


def generated(folder: str) -> str:
    """Generate photographs to initialize from and to judge on; return their pattern."""
    subprocess.run([sys.executable, os.path.join(ROOT, "data", "photographs.py"), folder,
                    "--count", str(BATCH_SIZE * (BATCHES + JUDGED))], check=True)
    return os.path.join(folder, "*.jpg")


# ---------------------------------------------------------------------------------------------
# The comparison
# ---------------------------------------------------------------------------------------------

def compare(first: Dict[str, Any], second: Dict[str, Any], spread: float = SPREAD) -> List[Check]:
    """Return what was compared of two devices' measurements."""
    checks = []
    for when in ("before", "after"):
        for layer, rate in first["rates"][when].items():
            other = second["rates"][when][layer]
            checks.append(Check("change rate %s, layer '%s'" % (when, layer), rate, other,
                                relative(rate, other), RATES))
    spreads = [change_rates.spread(one["rates"]["after"]) for one in (first, second)]
    checks.append(Check("spread of the rates after", spreads[0], spreads[1], max(spreads),
                        spread))
    for name, output in first["outputs"].items():
        other = second["outputs"][name]
        checks.append(Check("std of output '%s', rescaled" % name, output.std(), other.std(),
                            worst_difference({name: output}, {name: other}), OUTPUTS))
    for iteration, (loss, other) in enumerate(zip(first["losses"], second["losses"]), 1):
        checks.append(Check("loss, iteration %d" % iteration, loss, other, relative(loss, other),
                            LOSSES))
    return checks


def relative(first: float, second: float) -> float:
    """Return how far the second value is from the first, as a part of that."""
    if first == second:
        return 0.0
    return abs(second - first) / abs(first) if first else float("inf")


def report(names: Sequence[str], measured: Sequence[Dict[str, Any]],
           checks: Sequence[Check]) -> str:
    """Return the table of what was compared, the times, and what does not agree."""
    lines = ["%-34s %10s %10s %10s %8s" % ("", *names, "difference", "at most")]
    lines += ["%-34s %10.4g %10.4g %10.2g %8g" % check for check in checks]
    lines += ["%s: %.1f s for k-means weights and both scalings, %d %% of them in Caffe's passes"
              % (name, one["times"]["seconds"],
                 100 * one["times"]["in_caffe"] / one["times"]["seconds"])
              for name, one in zip(names, measured)]
    lines.append("The paper reports %d s for CaffeNet on a Titan X." % PAPER_SECONDS)
    wrong = [check for check in checks if not check.agrees]
    lines += ["%s and %s do not agree: %s is %.4g and %.4g (%.2g, at most %g)"
              % (names[0], names[1], check.name, check.first, check.second, check.figure,
                 check.bound) for check in wrong]
    return "\n".join(lines + ([] if wrong else ["%s and %s agree." % tuple(names)]))


if __name__ == "__main__":
    sys.exit(main())
