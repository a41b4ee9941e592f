"""Data-dependent initialization of Caffe networks (Kraehenbuehl, Doersch, Donahue & Darrell 2016).

Sets a net's weights from a few dozen unlabelled images so that every layer trains at the same
rate: weights from data (section 3.3), outputs of every channel with mean beta and variance 1
(section 3.1, Algorithm 1), change rates equal across layers (section 3.2, Algorithm 2).

    python magic_init.py models/caffenet/deploy.prototxt caffenet.caffemodel \\
        --data 'photos/*.jpg' --type kmeans --calibrate --figure caffenet.png
"""
import argparse
import logging
import os
import sys
import time
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Set, Tuple

import numpy as np
from google.protobuf import text_format

from ddinit import (
    argument_types,
    caffe_net,
    change_rates,
    files,
    processes,
    report,
    rescale,
    results,
    weights,
)
from ddinit.argument_types import count, finite, fraction, natural
from ddinit.caffe_net import BlobStore, Layer, Statistics, Stop, WorkingNet
from ddinit.change_rates import ChangeRates
from ddinit.report import LayerRecord, Result
from ddinit.scales import ScaleGraph
from ddinit.session import STOPS, Session, in_crew
from ddinit.trained_weights import copy_weights, load_weights

log = logging.getLogger("magic_init")

TYPES = ("gaussian", "elwise", "pca", "zca", "kmeans", "rand")
# Unscaled Gaussian weights, the paper's baseline (section 4.1).
UNSCALED_STD = 0.01
# Variance below this part of the layer's median variance counts as a constant channel,
CONSTANT = 1e-10
# and so does one below this part of the layer's mean squared mean: it is float32's rounding.
ROUNDING = 1e-12
# Rates within this factor of each other are equal; measuring again would not tell.
EQUAL = 1.05
# Standard error of layers' log rates, over images, below which measuring of a loaded net ends.
UNCERTAIN = 0.02
# Expected log of the spread of rates by noise alone, below which it ends from scratch.  GoogLeNet's
# rates on other photographs lie within 1.28 with 0.37, 1.26 with 0.26 (means of five seeds).
NOISE = 0.26
# With smaller changes of log scales, layers that are nearly homogeneous (LRN) have the degree that
# their model gives: measurements before count on.
SMALL = 0.3
# Rates further apart are worth a changed definition of a net from scratch.
APART = 1.5
# A rescaled net's outputs may differ by this part of their std.
TOLERANCE = 1e-3


# ---------------------------------------------------------------------------------------------
# Weights (section 3.3)
# ---------------------------------------------------------------------------------------------

def set_weights(stop: Stop, session: Session, kind: str, within: bool) -> str:
    """Give a layer fresh weights of a kind in TYPES and biases of 0; return what they are.

    Data-driven kinds apply to two-dimensional convolutions; all other layers are Gaussian, as in
    the paper, and Scale layers 1.
    """
    layer, rng = stop.layer, session.rng
    if layer.has_bias:
        layer.blobs[1].data[...] = 0
    if layer.type == "Scale":
        layer.weights[...] = 1
        return "ones"
    gaussian = kind in ("gaussian", "elwise")
    geometry = caffe_net.geometry(layer)
    if gaussian or geometry is None or len(geometry.kernel) != 2:
        weights.gaussian(layer.weights.shape, rng, 1.0 if within else UNSCALED_STD,
                         layer.weights, session.crew)
        if gaussian or layer.type == "InnerProduct":
            return "gaussian"
        return "gaussian (%s is for 2-D convolutions)" % kind
    groups = layer.parameters.convolution_param.group
    filters = layer.weights.reshape((groups, -1) + layer.weights.shape[1:])
    patches = _patches(stop, session, geometry, groups)
    for group, seen in zip(filters, patches):
        made = weights.SCHEMES[kind](seen, len(group), rng, session.crew)
        group[...] = made.reshape(group.shape)
    return kind


def _patches(stop: Stop, session: Session, geometry: caffe_net.Geometry,
             groups: int) -> List[np.ndarray]:
    """Return the patches (n, d) that the filters of each group of a convolution see.

    They come from the first half of the batches: filters respond more to what they were made from
    than to other images, and change rates are to be measured on others.
    """
    batches, rng = (session.batches + 1) // 2, session.rng
    bottom = session.working.blob(stop.layer.bottoms[0]).data
    depth = bottom.shape[1] // groups
    dimension = depth * int(np.prod(geometry.kernel))
    count = weights.patch_count(dimension, len(stop.layer.weights) // groups, groups)
    parts: List[List[np.ndarray]] = [[] for _ in range(groups)]
    for batch in range(batches):
        stop.load(batch)
        share = count * (batch + 1) // batches - count * batch // batches
        for group, part in enumerate(parts):
            part.append(weights.sample_patches(bottom[:, group * depth:(group + 1) * depth], share,
                                               rng, geometry, session.crew))
    return [np.concatenate(part).reshape(-1, dimension) for part in parts]


# ---------------------------------------------------------------------------------------------
# Within layers (section 3.1, Algorithm 1)
# ---------------------------------------------------------------------------------------------

def normalisation(mean: np.ndarray, variance: np.ndarray,
                  beta: float) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return factor 1 / sigma and shift beta - mu / sigma per channel, and which are constant.

    Algorithm 1: z * factor + shift has mean beta and variance 1 (channels,).  A constant channel,
    of (nearly) no variance, gets the median factor, so that it stays finite.
    """
    live = variance > max(CONSTANT * np.median(variance), ROUNDING * np.mean(mean ** 2))
    typical = np.median(variance[live]) if live.any() else 1.0
    factor = 1 / np.sqrt(np.where(live, variance, typical))
    return factor, beta - mean * factor, ~live


def normalise(layer: Layer, measured: Statistics, store: BlobStore, working: WorkingNet,
              beta: float) -> Tuple[Statistics, int]:
    """Scale a layer that has just run so that its outputs have mean beta and variance 1.

    W(i, :) <- W(i, :) / sigma_i and b_i <- beta - mu_i / sigma_i.  The outputs in `store` follow:
    z = W x + b is affine, so they need no second pass.  Returns the statistics after it, which
    were `measured` before, and how many channels are constant.
    """
    rows = caffe_net.affine_view(layer, layer.weights, 1)
    outputs = rows.shape[0] * rows.shape[1]
    mean, variance = measured.mean, measured.variance
    axis = caffe_net.output_axis(layer, working.blob(layer.tops[0]).data.ndim)
    if axis != 1 or len(mean) != outputs:  # channels lie elsewhere: one scale for the whole layer
        overall = measured.overall()
        mean, variance = np.full(outputs, overall[0]), np.full(outputs, overall[1])
    factor, shift, constant = normalisation(mean, variance, beta)
    rows *= factor.astype(np.float32).reshape(rows.shape[0], rows.shape[1], 1, 1)
    if layer.has_bias:
        layer.blobs[1].data[...] = (layer.blobs[1].data * factor + shift).astype(np.float32)
    else:
        shift = np.zeros_like(shift)
    if len(factor) != len(measured.mean):
        factor, shift = (np.full(len(measured.mean), value[0]) for value in (factor, shift))
    for top in layer.tops:
        store.change(top, factor, shift)
    return measured.changed(factor, shift), int(constant.sum())


def set_statistics(stop: Stop, session: Session) -> None:
    """Give a BatchNorm layer mean and variance of its input over all images.

    Training will normalise by its batches' own, which come close to these.
    """
    bottom = session.working.blob(stop.layer.bottoms[0]).data
    own = Statistics()
    for batch in range(session.batches):
        stop.load(batch)
        own.add(bottom)
    measured, _ = session.joined(stop._replace(statistics=own))
    mean, variance, correction = stop.layer.blobs[:3]
    mean.data[...] = measured.mean
    variance.data[...] = measured.variance
    correction.data[...] = 1


class Plan(NamedTuple):
    """What `initialise` is asked for: layers to set, kind of weights, within-layer scaling."""
    fresh: Set[str]
    kind: str
    within: bool
    beta: float


def initialise(session: Session, plan: Plan, store: BlobStore,
               step: Callable[[], Any]) -> List[LayerRecord]:
    """Algorithm 1 on every layer of `plan.fresh`, in one pass.

    Other layers only have their outputs measured.  `step` is called behind every layer.  Returns
    what was done to all; the session keeps the energy of each layer's input, batch by batch.
    """
    working = session.working
    done: Dict[str, str] = {}
    records: List[LayerRecord] = []
    for stop in caffe_net.walk(working, store, session.batches, STOPS, session.put):
        layer = stop.layer
        fresh = layer.name in plan.fresh
        sharer = working.shared_with(layer)
        if stop.statistics is None:
            done[layer.name] = "shares " + sharer if sharer else "loaded"
            if fresh and not sharer:
                done[layer.name] = _set_parameters(stop, session, plan)
            continue
        statistics, energy = session.joined(stop)
        dead = 0
        if fresh and not sharer and plan.within and caffe_net.is_affine(layer):
            statistics, dead = normalise(layer, statistics, store, working, plan.beta)
        step()
        if not caffe_net.is_affine(layer):
            continue
        session.energy[layer.name] = energy
        mean, variance = statistics.overall()
        records.append(LayerRecord(layer.name, layer.type, done[layer.name], layer.weights.size,
                                   mean, float(np.sqrt(variance)), dead))
        _check_output(records[-1])
    return records


def _set_parameters(stop: Stop, session: Session, plan: Plan) -> str:
    if stop.layer.type == "BatchNorm":
        set_statistics(stop, session)
        return "measured"
    made = set_weights(stop, session, plan.kind, plan.within)
    if not plan.within and stop.layer.has_bias:
        stop.layer.blobs[1].data[...] = plan.beta
    return made


def _check_output(record: LayerRecord) -> None:
    if not (np.isfinite(record.mean) and np.isfinite(record.std)):
        raise ValueError("layer '%s': its output is not finite (NaN or infinity)" % record.name)
    if record.dead:
        log.warning("layer '%s': %d channels are constant over all images; their scale is the "
                    "other channels'", record.name, record.dead)


# ---------------------------------------------------------------------------------------------
# Between layers (section 3.2, Algorithm 2)
# ---------------------------------------------------------------------------------------------

class Calibration(NamedTuple):
    """Change rates before and after, and the log scales of blobs that made the difference.

    `since` is the part of these that came after the outputs in `Session.seen`.  `definition` is
    the changed definition, None where it stays as it is, `changes` says what changed in it, and
    `difference` is that of the outputs before and after, over their std.
    """
    before: ChangeRates
    after: ChangeRates
    log_scales: np.ndarray
    since: np.ndarray
    definition: Any = None
    changes: Sequence[str] = ()
    difference: Optional[float] = None


def between_layers(session: Session, arguments: argparse.Namespace, loaded: bool,
                   output: str) -> Calibration:
    """Make all layers train at one rate and save the weights in `output`.

    A net with loaded weights keeps its function exactly.  One from scratch keeps its definition:
    it is measured and rescaled in turns, unless layers hold its rates apart so that it needs
    auxiliary Power layers, too.
    """
    working = session.working
    graph = ScaleGraph(working) if loaded else rescale.from_scratch(working)
    unchanged = np.zeros(graph.variables)
    if not arguments.calibrate:
        rates = session.measure(graph, -1)
        done = Calibration(rates, rates, unchanged, unchanged)
    elif loaded:
        rates = measure_enough(session, graph)
        solution = rescale.solve(graph, rates, {scaled.layer.name for scaled in graph.affine})
        measured = Calibration(rates, rates, unchanged, unchanged)
        return rescale_exactly(session, graph, solution, measured, arguments.alpha, output)
    else:
        done, graph = measure_in_turns(session, graph, arguments)
        if change_rates.spread(done.after.by_layer()) > APART:
            inner = {scaled.layer.name for scaled in graph.affine
                     if not set(scaled.layer.tops) & set(working.outputs)}
            solution = rescale.solve(graph, done.after, inner)
            if solution.auxiliary:
                done = rescale_exactly(session, graph, solution, done, arguments.alpha, output)
                return done._replace(difference=None)  # a net from scratch has none to keep
    session.save(output)
    return done


def measure_in_turns(session: Session, graph: ScaleGraph,
                     arguments: argparse.Namespace) -> Tuple[Calibration, ScaleGraph]:
    """Algorithm 2 on a net from scratch: measure, rescale by alpha, measure another batch.

    Between steps that LRN layers hardly notice everything is homogeneous: what was measured
    before counts on, in closed form.  Ends when all layers' rates are within EQUAL or behind such
    a step (but for the first).  Returns also the graph of the last step.
    """
    before = measured = session.measure(graph, -1)
    total = since = np.zeros(graph.variables)
    with session.bar("between layers", arguments.iterations) as bar:
        for turn in range(arguments.iterations):
            step = rescale.solve_from_scratch(session.working, measured, session.crew)
            scales = arguments.alpha * step.log_scales
            rescale.apply_to_weights(step.graph, scales)
            total, since = total + scales, since + scales
            graph = step.graph
            bar.update()
            measured = rescale.changed_rates(graph, measured, scales)
            settled = arguments.alpha * step.at_response < SMALL
            if turn and settled and arguments.alpha == 1 and measured.noise() < NOISE:
                break
            another = session.measure(graph, turn, measured, change_rates.LOSSES_OF_A_STEP)
            since = np.zeros(graph.variables)
            measured = measured.joined(another) if settled else another
            if change_rates.spread(measured.by_layer()) < EQUAL:
                break
    return Calibration(before, measured, total, since), graph


def measure_enough(session: Session, graph: ScaleGraph) -> ChangeRates:
    """Return change rates from as many batches as their layers' ratios need, or all there are.

    The batch held back for the check is left out where there is more than one.
    """
    session.measured = [batch for batch in range(session.batches) if batch != session.check] or [0]
    rates = session.measure(graph, 0)
    with session.bar("between layers", len(session.measured)) as bar:
        for turn in range(1, len(session.measured)):
            if rates.uncertainty() < UNCERTAIN:
                break
            rates = rates.joined(session.measure(graph, turn))
            bar.update()
    return rates


def rescale_exactly(session: Session, graph: ScaleGraph, solution: rescale.Solution,
                    so_far: Calibration, alpha: float, output: str) -> Calibration:
    """Give blobs the scales of a solution without changing the function; save the weights.

    The outputs on images held back are compared with those before, and rates are measured there,
    too, in a net of the changed definition where it has to change.
    """
    session.forward(session.check)
    held = session.working.hold()
    expected = {name: np.array(session.working.blob(name).data)
                for name in session.working.outputs}
    solution = solution._replace(log_scales=alpha * solution.log_scales)
    rescale.apply_to_weights(graph, solution.log_scales)
    definition = type(session.definition)()
    definition.CopyFrom(session.definition)
    changes = rescale.apply_to_definition(definition, graph, solution)
    rescaled = session.working
    if changes:
        rescaled = session.build(definition, session.feed is not None)
        copy_weights(session.working.net, rescaled.net)
    rescaled.replay(held)
    difference = float(np.max(session.crew.gather(rescale.worst_difference(
        expected, {name: rescaled.blob(name).data for name in expected}))))
    after = change_rates.measure(ScaleGraph(rescaled), session.rng, crew=session.crew)
    session.save(output)
    return Calibration(so_far.before, after, so_far.log_scales + solution.log_scales,
                       so_far.since + solution.log_scales, definition if changes else None,
                       changes, difference)


# ---------------------------------------------------------------------------------------------
# The whole of it
# ---------------------------------------------------------------------------------------------

def work(arguments: argparse.Namespace, paths: Sequence[str], output: str) -> Result:
    """Initialise or rescale as the command line asks and save the weights in `output`.

    Runs in a child process: Caffe may abort.  Raises ValueError for whatever a user can cause.
    """
    processes.keep_freed_memory()
    return in_crew(work_together, arguments, paths, output)


def work_together(session: Session, arguments: argparse.Namespace, output: str) -> Result:
    """`work`, by every process of a crew."""
    working = session.working
    if not working.affine:
        raise ValueError("%s: no layer has weights to initialise" % arguments.prototxt)
    fresh = set(working.net.params)
    if arguments.load:
        left = load_weights(working.net, arguments.load)
        fresh = fresh if arguments.zero else set(left)
    notes = session.notes
    notes += [note for layer in working.layers for note in _filler_notes(layer, fresh)]
    plan = Plan(fresh, arguments.type, arguments.within, arguments.bias)
    store = BlobStore(arguments.mem_limit * 1e6 / session.crew.size)
    stops = sum(caffe_net.stops(layer, STOPS) for layer in working.layers)
    with session.bar("within layers", stops) as bar:
        records = initialise(session, plan, store, bar.update)
    spooled = sum(session.crew.gather(store.spooled_bytes))
    if spooled:
        notes.append("%.0f MB of blobs went through a temporary file (--mem-limit %g)"
                     % (spooled / 1e6, arguments.mem_limit))
    session.lap("within layers")
    loaded = any(record.weights == "loaded" for record in records)
    found = between_layers(session, arguments, loaded, output)
    session.lap("between layers")
    graph = ScaleGraph(working)
    _check_gradients(graph, found.before)
    notes += ["layer type %s is not in the table of scales: its blobs keep theirs" % kind
              for kind in sorted(set(graph.unknown_types))]
    names = [scaled.layer.name for scaled in graph.owners()]
    return Result(_written(records, session.seen, graph, found),
                  _pairs(names, found.before.by_layer(), found.after.by_layer()),
                  _pairs(names, found.before.variation(), found.after.variation()),
                  session.batches * session.size, session.crew.size, notes, list(found.changes),
                  None if found.definition is None else text_format.MessageToString(
                      found.definition),
                  found.difference, session.seconds,
                  results.provenance(arguments.seed, arguments.argv))


def _check_gradients(graph: ScaleGraph, rates: ChangeRates) -> None:
    """Warn of layers whose weights get no gradient."""
    names = [scaled.layer.name for scaled, rate in zip(graph.owners(), rates.by_layer())
             if rate == 0]
    if names:
        log.warning("the weights of %s get no gradient: rates of 0 do not count",
                    ", ".join("layer '%s'" % name for name in names))


def _filler_notes(layer: Layer, fresh: Set[str]) -> List[str]:
    """A line for a layer with parameters that no part of the method sets."""
    if layer.name not in fresh or caffe_net.is_affine(layer) or layer.type == "BatchNorm":
        return []
    return ["layer '%s' (%s) keeps the values of its own filler" % (layer.name, layer.type)]


def _written(records: List[LayerRecord], seen: Dict[str, Tuple[float, float]], graph: ScaleGraph,
             found: Calibration) -> List[LayerRecord]:
    """Records with the outputs' mean and std in the net that is written.

    They follow from the blobs' scales.  Where LRN layers stay as they are, that is only so for the
    last small steps, after what was `seen` when rates were last measured.
    """
    log_scales = found.since if seen else found.log_scales
    scales = {one.layer.name: float(np.exp(rescale.value(one.scale_out, log_scales)))
              for one in graph.affine}
    if seen:
        records = [record._replace(mean=seen[record.name][0],
                                   std=float(np.sqrt(seen[record.name][1]))) for record in records]
    return [record._replace(mean=record.mean * scales[record.name],
                            std=record.std * scales[record.name]) for record in records]


def _pairs(names: Sequence[str], before: np.ndarray,
           after: np.ndarray) -> Dict[str, Tuple[float, float]]:
    return {name: (float(one), float(two)) for name, one, two in zip(names, before, after)}


# ---------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------

def main(argv: Optional[Sequence[str]] = None) -> int:
    """Initialise a net as the command line asks; return the exit status."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    arguments.argv = list(sys.argv[1:] if argv is None else argv)
    processes.log_to_stderr(arguments.quiet)
    return processes.command_line(run, arguments, parser.prog)


def run(arguments: argparse.Namespace) -> None:
    """Check what can be checked, do the work in a child process, write files and the table."""
    started = time.perf_counter()
    beside = os.path.splitext(arguments.output)[0] + ".prototxt"
    _check_paths(arguments, beside)
    paths = caffe_net.find_images(arguments.data) if arguments.data else []
    arguments.device = caffe_net.choose_device(arguments.cpu, arguments.gpu)
    with files.replacing(arguments.output) as temporary:
        found = processes.in_child(work, arguments, paths, temporary)
        if found.difference is not None and not found.difference <= TOLERANCE \
                and not arguments.force:
            raise ValueError("the rescaled net's outputs differ by %.2g of their std (more than "
                             "%g): nothing was written; --force writes all the same"
                             % (found.difference, TOLERANCE))
        if found.definition is not None:
            with files.replacing(beside) as name, open(name, "w", encoding="utf-8") as file:
                file.write("".join("# %s\n" % line for line in found.changes) + found.definition)
    found.seconds["in all"] = time.perf_counter() - started
    _tell(found, arguments, beside)
    content = report.as_json(found, arguments)
    if arguments.report:
        results.write_json(arguments.report, content)
    if arguments.figure:
        report.draw(content, arguments.figure)


def _tell(found: Result, arguments: argparse.Namespace, beside: str) -> None:
    """Print the table of layers, and log what else a user should know."""
    for note in found.notes + found.changes:
        log.info("%s", note)
    if not arguments.quiet:
        print("\n".join(report.table(found)))
    if found.difference is not None:
        log.info("on images held back, outputs differ by %.2g of their std from before",
                 found.difference)
    written = [arguments.output]
    if found.definition is not None:
        written.append(beside)
    elif os.path.exists(beside):
        log.warning("%s is from another run: this one needs no changed definition", beside)
    log.info("wrote %s from %d images in %.1f s", " and ".join(written), found.images,
             found.seconds["in all"])


def _parser() -> argparse.ArgumentParser:
    parser = processes.Parser(prog="magic_init", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("prototxt", help="definition of the net: deploy or train_val, any dialect")
    add("output", help="caffemodel to write; OUTPUT.prototxt is written beside it where the "
        "definition has to change")
    add("-d", "--data", metavar="GLOB", help="images to initialise from, a pattern or a folder "
        "(default: the net's own data layer)")
    add("-l", "--load", metavar="IN", help="caffemodel to start from; layers missing in it are "
        "initialised")
    add("-t", "--type", default="gaussian", help="weights: %s (default: gaussian)"
        % ", ".join(TYPES))
    add("-b", "--bias", type=finite, default=0.1, help="mean beta of outputs (default: 0.1)")
    add("-cs", "--calibrate", action="store_true", help="make all layers train at one rate")
    add("--no-within", dest="within", action="store_false", help="leave weights as drawn, "
        "without unit variance within layers; Gaussian ones have std %g then" % UNSCALED_STD)
    add("-z", "--zero", action="store_true", help="initialise loaded layers, too")
    add("-s", "--scale", type=finite, default=1.0, help="factor on images after the mean is "
        "subtracted (default: 1)")
    add("--mean", type=finite, nargs=3, metavar=("B", "G", "R"), default=[104.0, 117.0, 123.0],
        help="mean colour to subtract (default: 104 117 123)")
    add("-bs", "--batch-size", type=count, default=16, help="images a batch (default: 16)")
    add("-nit", "--batches", type=count, default=10, help="batches to use (default: 10)")
    add("--alpha", type=fraction, default=1.0, help="damping of a between-layer step, above 0 to "
        "1; the paper takes 0.25 and 10 iterations (default: 1)")
    add("--iterations", type=count, default=10, help="between-layer steps at most (default: 10)")
    add("--mem-limit", type=count, default=3000, metavar="MB", help="memory for blobs of all "
        "images; what exceeds it goes to a temporary file (default: 3000)")
    add("--processes", type=count, metavar="N", help="processes at most that share the work "
        "on a CPU (default: one a processor, up to 4); filters made from data depend on it")
    add("--seed", type=natural, default=0, help="seed of all random numbers (default: 0)")
    argument_types.add_device(parser)
    add("-q", "--quiet", action="store_true", help="only warnings, errors and no table")
    add("--force", action="store_true", help="write a rescaled net whose outputs differ")
    add("--report", metavar="FILE", help="JSON file for everything that was measured")
    add("--figure", metavar="FILE", help="PNG file for the paper's figure 1 of this net")
    return parser


def _check_paths(arguments: argparse.Namespace, beside: str) -> None:
    """Raise ValueError for unknown types and for files that cannot be read or written."""
    if arguments.type.startswith("fast_"):  # the released tool's quicker variants
        arguments.type = arguments.type[len("fast_"):]
    if arguments.type not in TYPES:
        raise ValueError("unknown type '%s': choose from %s" % (arguments.type, ", ".join(TYPES)))
    for path in (arguments.prototxt, arguments.load):
        if path is not None and not os.path.isfile(path):
            raise ValueError("%s: no such file" % path)
    used = {os.path.realpath(arguments.prototxt)}
    for path in (arguments.output, arguments.report, arguments.figure):
        if path is None:
            continue
        files.check_writable(path)
        if os.path.realpath(path) in used:
            raise ValueError("%s would be written over another file of this command" % path)
        used.update(os.path.realpath(one) for one in (path, arguments.load) if one)
    if os.path.exists(beside) and os.path.samefile(beside, arguments.prototxt):
        raise ValueError("%s would be overwritten if the definition has to change: give OUTPUT "
                         "another name" % beside)


if __name__ == "__main__":
    sys.exit(main())
