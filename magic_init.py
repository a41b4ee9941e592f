"""Data-dependent initialization of Caffe networks (Kraehenbuehl, Doersch, Donahue & Darrell 2016).

Sets a net's weights from a few dozen unlabelled images so that every layer trains at the same
rate: weights from data (section 3.3), outputs of every channel with mean beta and variance 1
(section 3.1, Algorithm 1), change rates equal across layers (section 3.2, Algorithm 2).

    python magic_init.py models/caffenet/deploy.prototxt caffenet.caffemodel \\
        --data 'photos/*.jpg' --type kmeans --calibrate --report caffenet.html

`initialize`, `calibrate` and `change_rates` do the same to a caffe.Net in Python.
"""
import argparse
import logging
import os
import sys
import threading
import time
from typing import Any, Dict, List, Optional, Sequence

import numpy as np
from google.protobuf import text_format
from tqdm import tqdm

from ddinit import argument_types, caffemodel, files, images, net, page, processes, report, results
from ddinit.api import calibrate, change_rates, initialize
from ddinit.argument_types import count, finite, fraction, natural, positive
from ddinit.prototxt import import_caffe
from ddinit.report import LayerRecord, Result
from ddinit.scales import ScaleGraph
from ddinit.session import (
    MEAN,
    TOLERANCE,
    Calibration,
    Feed,
    Options,
    Session,
    calibrate_session,
    open_session,
)
from ddinit.walk import Statistics, stops
from ddinit.weights import KINDS
from ddinit.within import STOPS, UNSCALED_STD, Initialized, Plan, initialize_layers

__all__ = ["calibrate", "change_rates", "initialize", "main"]

log = logging.getLogger("magic_init")

BATCH_SIZE = 16


@np.errstate(invalid="ignore", over="ignore")  # what is not finite is told with its layer
def work(arguments: argparse.Namespace, output: Optional[str]) -> Result:
    """Initialize, rescale or measure as the command line asks and save the weights in `output`.

    Runs in a child process: Caffe may abort.  Raises ValueError for whatever a user can cause.
    """
    processes.keep_freed_memory()
    clock = Clock()
    net.use_device(arguments.device)
    import_caffe().set_random_seed(arguments.seed)
    rng = np.random.default_rng(arguments.seed)
    session = open_session(arguments.prototxt, arguments.data or None, arguments.batch_size,
                           arguments.batches, rng, Feed(arguments.mean, arguments.scale),
                           arguments.size)
    fresh = set(session.working.net.params)
    if arguments.load:
        left = caffemodel.load_weights(session.working.net, arguments.load)
        fresh = fresh if arguments.zero else set(left)
    if arguments.inspect and fresh:
        raise ValueError("%s has no weights for layer '%s': they cannot be inspected"
                         % (arguments.load, sorted(fresh)[0]))
    clock.lap("set up")
    with net.blas_threads(session.working):
        done = initialize_session(session, arguments, fresh, rng)
        clock.lap("within layers")
        calibration = calibrated(session, arguments, done, rng)
        clock.lap("between layers")
    if output is not None:
        session.working.net.save(output)
    clock.lap("saved")
    layers = records(session, done, calibration.statistics)
    before, after, changed = calibration.before, calibration.after, calibration.definition
    return Result(layers, before.by_layer(), after.by_layer(), before.variation(),
                  after.variation(), session.count * session.batches.size, notes(session, fresh),
                  list(calibration.changes),
                  None if changed is None else text_format.MessageToString(changed),
                  calibration.difference, clock.seconds, page.filters_png(session.working),
                  results.provenance(arguments.seed, arguments.argv))


def calibrated(session: Session, arguments: argparse.Namespace, done: Sequence[Initialized],
               rng: np.random.Generator) -> Calibration:
    """Run Algorithm 2 if it is asked for, and otherwise measure the net as it is."""
    if arguments.calibrate:
        options = Options(arguments.alpha, arguments.iterations, arguments.literal,
                          arguments.output_std)
        loaded = any(layer.weights == "loaded" for layer in done)
        return calibrate_session(session, rng, loaded, options)
    statistics: Dict[str, Statistics] = {}
    rates = session.measured(range(session.count), rng, arguments.literal, statistics)
    return Calibration(rates, rates, statistics)


class Clock:
    """The seconds that phases take."""

    def __init__(self) -> None:
        self.seconds: Dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        """Book the seconds since the last call on a phase."""
        now = time.perf_counter()
        self.seconds[phase] = now - self._last
        self._last = now


def initialize_session(session: Session, arguments: argparse.Namespace, fresh: Any,
                       rng: np.random.Generator) -> List[Initialized]:
    """Run Algorithm 1 on the layers in `fresh`; a net without any needs no walk over its layers."""
    working = session.working
    if not fresh:
        return [Initialized(layer.name, "shares " + sharer if sharer else "loaded", 0)
                for layer in working.affine for sharer in [working.shared_with(layer)]]
    total = sum(stops(layer, STOPS) for layer in working.layers)
    quiet = arguments.quiet or not sys.stderr.isatty()
    tqdm.set_lock(threading.RLock())  # its default, a semaphore, outlives a process that aborts
    with tqdm(total=total, desc="within layers", disable=quiet, leave=False) as bar:
        done, spooled = initialize_layers(
            working, session.batches, session.count,
            Plan(fresh, arguments.type, arguments.within, arguments.bias), rng,
            arguments.mem_limit * 1e6 - session.batches.bytes, bar.update)
    if spooled:
        log.info("%.0f MB of blobs went through temporary files (--mem-limit %g)",
                 spooled / 1e6, arguments.mem_limit)
    return done


def records(session: Session, done: Sequence[Initialized],
            statistics: Dict[str, Statistics]) -> List[LayerRecord]:
    """Return what was done to each layer, and what it puts out."""
    layers = {layer.name: layer for layer in session.working.affine}
    entries = []
    for name, weights, constant in done:
        mean, variance = statistics[name].overall()
        entries.append(LayerRecord(name, layers[name].type, weights, layers[name].weights.size,
                                   mean, float(np.sqrt(variance)), constant))
    return entries


def notes(session: Session, fresh: Any) -> List[str]:
    """Return a line on everything in a net that the method leaves alone."""
    working = session.working
    lines = ["layer '%s' (%s) keeps the values of its own filler" % (layer.name, layer.type)
             for layer in working.layers if layer.name in fresh and len(layer.blobs)
             and layer.type not in STOPS]
    return lines + ["layer type %s is not in the table of scales: its blobs keep theirs" % kind
                    for kind in sorted(set(ScaleGraph(working).unknown_types))]


# ---------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------

def main(argv: Optional[Sequence[str]] = None) -> int:
    """Initialize a net as the command line asks; return the exit status."""
    parser = _parser()
    given = list(sys.argv[1:] if argv is None else argv)
    arguments, rest = parser.parse_known_args(_with_joined_mean(given))
    if rest and (arguments.data is None or any(word.startswith("-") for word in rest)):
        parser.error("unrecognized arguments: %s" % " ".join(rest[:3] + ["..."] * (len(rest) > 3)))
    arguments.data = None if arguments.data is None else [arguments.data, *rest]
    arguments.argv = given
    processes.log_to_stderr(logging.WARNING if arguments.quiet else logging.INFO)
    return processes.command_line(run, arguments, parser.prog)


def run(arguments: argparse.Namespace) -> None:
    """Check what can be checked, do the work in a child process, write files and the table."""
    started = time.perf_counter()
    beside = None if arguments.inspect or arguments.output is None else os.path.splitext(
        arguments.output)[0] + ".prototxt"
    _check(arguments, beside)
    if arguments.data is not None:
        arguments.data = images.find_images(arguments.data)
    arguments.device = net.choose_device(arguments.cpu, arguments.gpu)
    if arguments.inspect:
        result = processes.in_child(work, arguments, None)
    else:
        with files.replacing(arguments.output) as temporary:
            result = processes.in_child(work, arguments, temporary)
            if result.difference is not None and not result.difference <= TOLERANCE \
                    and not arguments.force:
                raise ValueError("the rescaled net's outputs differ by %.2g of their std (more "
                                 "than %g): nothing was written; --force writes all the same"
                                 % (result.difference, TOLERANCE))
            if result.definition is not None and beside is not None:
                with files.replacing(beside) as name, open(name, "w", encoding="utf-8") as file:
                    file.write(caffemodel.mark(temporary) + "".join(
                        "# %s\n" % line for line in result.changes) + result.definition)
    result.seconds["in all"] = time.perf_counter() - started
    _tell(result, arguments, beside)
    content = report.as_json(result, arguments)
    if arguments.report:
        report.write(arguments.report, content, result.filters)


def _tell(result: Result, arguments: argparse.Namespace, beside: Optional[str]) -> None:
    """Print the table of layers, and log what else a user should know."""
    for note in result.notes + result.changes:
        log.info("%s", note)
    if not arguments.quiet:
        print("\n".join(report.table(result)))
    if result.difference is not None:
        log.info("on images held back, outputs differ by %.2g of their std from before",
                 result.difference)
    if arguments.inspect or beside is None:
        return
    written = [arguments.output]
    if result.definition is not None:
        written.append(beside)
    elif os.path.exists(beside):
        log.warning("%s is from another run: this one needs no changed definition", beside)
    log.info("wrote %s from %d images in %.1f s", " and ".join(written), result.images,
             result.seconds["in all"])


def _parser() -> argparse.ArgumentParser:
    parser = processes.Parser(prog="magic_init", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("prototxt", help="definition of the net: deploy, train_val or solver, any dialect")
    add("output", nargs="?", help="caffemodel to write; OUTPUT.prototxt is written beside it where "
        "the definition has to change")
    add("-d", "--data", metavar="IMAGES", help="images to initialize from: a pattern, a folder, "
        "a list file (.txt) or several files (default: the net's own data layer)")
    add("-l", "--load", metavar="IN", help="caffemodel or HDF5 file to start from; layers missing "
        "in it are initialized")
    add("-t", "--type", default="gaussian", help="weights: %s (default: gaussian)"
        % ", ".join(KINDS))
    add("-b", "--bias", type=finite, default=0.1, help="mean beta of outputs (default: 0.1)")
    add("-cs", "--calibrate", action="store_true", help="make all layers train at one rate")
    add("--no-within", dest="within", action="store_false", help="leave weights as drawn, "
        "without unit variance within layers; Gaussian ones have std %g then" % UNSCALED_STD)
    add("-z", "--zero", action="store_true", help="initialize loaded layers, too")
    add("--inspect", action="store_true", help="only measure the net with the weights of --load")
    add("-s", "--scale", type=finite, default=1.0, help="factor on images after the mean is "
        "subtracted (default: 1)")
    add("--mean", type=_mean, metavar="MEAN", default=MEAN, help="what to subtract: B G R, "
        "one number, or a mean image as .npy or .binaryproto (default: 104 117 123)")
    add("--size", type=count, nargs=2, metavar=("HEIGHT", "WIDTH"), help="size of the images "
        "in place of what the net's own data layer would give")
    add("-bs", "--batch-size", type=count, default=BATCH_SIZE,
        help="images a batch (default: %(default)d)")
    add("-nit", "--batches", type=count, default=10, help="batches to use (default: 10)")
    add("--alpha", type=fraction, default=1.0, help="damping of a between-layer step, above 0 to "
        "1; the paper takes 0.25 and 10 iterations (default: 1)")
    add("--iterations", type=count, default=10, help="between-layer steps at most (default: 10)")
    add("--output-std", type=positive, metavar="STD", help="standard deviation that --calibrate "
        "gives the outputs of a net from scratch (default: the one that they have, about 1)")
    add("--literal", action="store_true", help="equation 2 to the letter: squared gradients over "
        "the sum of squared weights, not over their mean")
    add("--mem-limit", type=count, default=3000, metavar="MB", help="memory for images and blobs; "
        "what exceeds it goes to temporary files (default: 3000)")
    add("--seed", type=natural, default=0, help="seed of all random numbers (default: 0)")
    argument_types.add_device(parser)
    add("-q", "--quiet", action="store_true", help="only warnings, errors and no table")
    add("--force", action="store_true", help="write a rescaled net whose outputs differ")
    add("--report", metavar="FILE", help="everything that was measured: a page to look at where "
        "FILE ends in .html, otherwise JSON")
    return parser


def _with_joined_mean(words: Sequence[str]) -> List[str]:
    """Return the command line with the one or three numbers behind --mean as one word."""
    if "--mean" not in words:
        return list(words)
    start = list(words).index("--mean") + 1
    stop = start + 1
    while stop < min(len(words), start + 3) and _is_number(words[stop - 1]) \
            and _is_number(words[stop]):
        stop += 1
    return [*words[:start - 1], "--mean=" + ",".join(words[start:stop]), *words[stop:]]


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _mean(text: str) -> Any:
    """Return the mean that a word of the command line stands for: a file's name or numbers."""
    if text.endswith((".npy", ".binaryproto")):
        return text
    numbers = [finite(word) for word in text.split(",")]
    if len(numbers) not in (1, 3):
        raise argparse.ArgumentTypeError("'%s' is not one number or three" % text)
    return numbers


def _check(arguments: argparse.Namespace, beside: Optional[str]) -> None:
    """Raise ValueError for options that contradict each other, and files that cannot be used."""
    if arguments.type.startswith("fast_"):  # the released tool's quicker variants
        arguments.type = arguments.type[len("fast_"):]
    if arguments.type not in KINDS:
        raise ValueError("unknown type '%s': choose from %s" % (arguments.type, ", ".join(KINDS)))
    if arguments.inspect and not arguments.load:
        raise ValueError("--inspect needs the weights to measure: --load FILE")
    if arguments.inspect and (arguments.output or arguments.calibrate):
        raise ValueError("--inspect writes no weights: leave OUTPUT and --calibrate away")
    if arguments.output_std is not None and not arguments.calibrate:
        raise ValueError("--output-std is a part of the step between layers: add --calibrate")
    if arguments.output is None and not arguments.inspect:
        raise ValueError("the OUTPUT to write is missing (see --help)")
    for path in (arguments.prototxt, arguments.load):
        if path is not None and not os.path.isfile(path):
            raise ValueError("%s: no such file" % path)
    _check_outputs(arguments, beside)
    if arguments.load:
        caffemodel.check_bound(arguments.prototxt, arguments.load)


def _check_outputs(arguments: argparse.Namespace, beside: Optional[str]) -> None:
    """Raise ValueError where a file would be written over another one of this command."""
    used = {os.path.realpath(arguments.prototxt)}
    if beside is not None:
        if os.path.realpath(beside) in used:
            raise ValueError("%s would be overwritten if the definition has to change: give OUTPUT "
                             "another name" % beside)
        if os.path.realpath(beside) == os.path.realpath(arguments.output):
            raise ValueError("%s would be overwritten by its own net's definition: give OUTPUT a "
                             "name like new.caffemodel" % arguments.output)
        used.add(os.path.realpath(beside))
    for path in (arguments.output, arguments.report):
        if path is None:
            continue
        files.check_writable(path)
        if os.path.realpath(path) in used:
            raise ValueError("%s would be written over another file of this command" % path)
        used.update(os.path.realpath(name) for name in (path, arguments.load) if name)


if __name__ == "__main__":
    sys.exit(main())
