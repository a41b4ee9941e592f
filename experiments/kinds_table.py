"""Initialize and rescale networks of many kinds, and make a table of their change rates.

    python models/kinds.py build/kinds
    python experiments/kinds_table.py --nets build/kinds --data 'photos/init/*' \\
        --measure 'photos/measure/*' --out build/kinds.json

For each definition in a folder, the command `magic_init.py` initializes the network with Gaussian
and with k-means weights, rescales the latter once more, and rescales a network that resembles a
trained one.  Plain Caffe judges every file that it writes on other photographs, beside the network
as Caffe's fillers make it: the largest over the smallest change rate of the layers (equation 2).
Results are written after each network (JSON, and the table as CSV and Markdown beside it), and the
same command continues where it was interrupted.
"""
import argparse
import glob
import hashlib
import logging
import os
import subprocess
import sys
import tempfile
import time
from typing import Any, Callable, Dict, Iterable, List, Optional, Sequence, Set, Tuple

import cv2
import numpy as np
from google.protobuf import text_format

from ddinit import argument_types, files, processes, results
from ddinit.prototxt import import_caffe, read_definition
from tables import formats

log = logging.getLogger("kinds_table")
COMMAND = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))),
                       "magic_init.py")
MEAN = (104.0, 117.0, 123.0)  # the command's default, in BGR
AFFINE = {"Convolution", "Deconvolution", "InnerProduct", "Scale"}
RECURRENT = {"LSTM", "RNN"}
DISTURBANCE = 5  # weights of a network like a trained one are off by a factor up to this
PREPARED_ON = 32  # images that BatchNorm's statistics and the disturbed weights come from
JUDGED_TOGETHER, CLIP = 4, 15  # images in a batch of a judgement, and frames where they meet
CERTAIN = 0.015  # standard error of log rates at which a judgement ends,
ROUNDS = 16  # and the most rounds through all images that it takes
TINY = 1e-300
SECONDS = 1800  # after which a command counts as failed
Row = Dict[str, Any]  # what was measured of one network

COLUMNS: Dict[str, Callable[[Row], Any]] = {
    "net": lambda row: row["net"],
    "layers": lambda row: row["filled"]["layers"],
    "fillers": lambda row: row["filled"]["spread"],
    "Gaussian": lambda row: row["gaussian"]["spread"],
    "k-means": lambda row: row["kmeans"]["spread"],
    "k-means rescaled": lambda row: row["kmeans_rescaled"]["spread"],
    "legacy": lambda row: row["legacy"]["spread"],
    "rescaled, own images": lambda row: row["rescaled"]["spread_own"],
    "rescaled": lambda row: row["rescaled"]["spread"],
    "output difference": lambda row: max(row["rescaled"]["difference"],
                                         row["rescaled"]["difference_reported"]),
    "k-means, s": lambda row: row["kmeans"]["seconds"],
    "rescaled, s": lambda row: row["rescaled"]["seconds"],
    "F, s": lambda row: row["forward"]["seconds"],
    "k-means, F": lambda row: row["kmeans"]["work"] / row["forward"]["seconds"],
    "rescaled, F": lambda row: row["rescaled"]["work"] / row["forward"]["seconds"],
}


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Measure the networks of the folder that the command line names; return the exit status."""
    parser = processes.Parser(prog="kinds_table", description=__doc__.splitlines()[0])
    parser.add_argument("--nets", required=True, metavar="FOLDER",
                        help="folder of definitions (*.prototxt) with one Input layer")
    parser.add_argument("--data", required=True, metavar="GLOB", help="images to initialize from")
    parser.add_argument("--measure", required=True, metavar="GLOB",
                        help="other images, on which the written files are judged")
    parser.add_argument("--out", required=True, metavar="FILE.json",
                        help="results, continued where the file exists; the table is written "
                             "beside it as FILE.csv and FILE.md")
    parser.add_argument("--batch-size", type=argument_types.count, default=16,
                        help="images in a batch (default: 16)")
    parser.add_argument("--batches", type=argument_types.count, default=10,
                        help="batches to use (default: 10)")
    parser.add_argument("--seed", type=argument_types.natural, default=0,
                        help="seed of weights and disturbances (default: 0)")
    arguments = parser.parse_args(argv)
    processes.log_to_stderr()
    return processes.command_line(run, arguments, parser.prog)


def run(arguments: argparse.Namespace) -> None:
    """Measure each network that the results do not have yet, and write them after each."""
    for pattern in (arguments.data, arguments.measure):
        if not find_images(pattern):
            raise ValueError("%s: no such images" % pattern)
    nets = sorted(glob.glob(os.path.join(arguments.nets, "*.prototxt")))
    if not nets:
        raise ValueError("%s: no *.prototxt there" % arguments.nets)
    base, extension = os.path.splitext(arguments.out)
    if extension != ".json":
        raise ValueError("%s: the results need a name that ends in .json" % arguments.out)
    files.check_writable(arguments.out)
    settings = {name: getattr(arguments, name)
                for name in ("data", "measure", "batch_size", "batches", "seed")}
    rows = read_rows(arguments.out, settings)
    for path in nets:
        with open(path, "rb") as file:
            digest = hashlib.sha256(file.read()).hexdigest()
        known = rows.get(_name(path))
        if known is not None and known["definition"] == digest and not errors(known):
            log.info("%-20s measured before", _name(path))
            continue
        row = {"net": _name(path), "definition": digest, **measure_net(path, arguments)}
        rows[_name(path)] = row
        results.write_json(arguments.out, {"settings": settings, "nets": rows})
        write_table(base, [rows[name] for name in sorted(rows)])
        log.info("%s", progress(row))
    log.info("wrote %s, %s.csv and %s.md", arguments.out, base, base)


def read_rows(path: str, settings: Dict[str, Any]) -> Dict[str, Row]:
    """Return the rows that the results at `path` hold, none where there is no such file.

    Raises ValueError where they were made with other settings.
    """
    if not os.path.exists(path):
        return {}
    content = results.read_json(path)
    if content.get("settings") != settings:
        raise ValueError("%s holds results of other settings: %s. Choose another --out, or remove "
                         "the file" % (path, content.get("settings")))
    rows: Dict[str, Row] = content["nets"]
    return rows


def _name(path: str) -> str:
    return os.path.splitext(os.path.basename(path))[0]


# ---------------------------------------------------------------------------------------------
# One network


def measure_net(prototxt: str, arguments: argparse.Namespace) -> Row:
    """Return everything that the table says of one network; a step that fails leaves an error.

    F is measured before and after the commands, and the lower one counts.
    """
    row: Row = {}

    def step(name: str, function: Callable[..., Any], *values: Any) -> None:
        try:
            row[name] = function(*values)
        except ValueError as error:
            row[name] = {"error": " ".join(str(error).split())}

    with tempfile.TemporaryDirectory(prefix="kinds_table.") as folder:
        filled, legacy, gaussian, kmeans, kmeans_rescaled, rescaled = (
            os.path.join(folder, name + ".caffemodel") for name in (
                "filled", "legacy", "gaussian", "kmeans", "kmeans_rescaled", "rescaled"))
        others, flags = arguments.measure, _flags(arguments)
        step("prepared", processes.in_child, prepare, prototxt, find_images(arguments.data),
             arguments.seed, filled, legacy)
        step("forward_before", time_forward, prototxt, legacy, arguments)
        step("filled", judge, prototxt, filled, others)
        step("gaussian", initialize, prototxt, gaussian, flags + ["--type", "gaussian"], others)
        step("kmeans", initialize, prototxt, kmeans, flags + ["--type", "kmeans"], others)
        step("kmeans_rescaled", rescale, _definition_of(kmeans, prototxt), kmeans, kmeans_rescaled,
             flags, others)
        step("legacy", judge, prototxt, legacy, others)
        step("rescaled", rescale, prototxt, legacy, rescaled, flags, others)
        step("forward_after", time_forward, prototxt, legacy, arguments)
    forwards = [row.pop(name) for name in ("forward_before", "forward_after")]
    row["forward"] = min(forwards, key=lambda measured: measured.get("seconds", np.inf))
    return row


def time_forward(prototxt: str, weights: str, arguments: argparse.Namespace) -> Row:
    """Measure F in a child process."""
    _check_written(weights)
    return {"seconds": processes.in_child(forward_seconds, prototxt, weights, arguments)}


def _flags(arguments: argparse.Namespace) -> List[str]:
    return ["--data", arguments.data, "--calibrate", "--batch-size", str(arguments.batch_size),
            "--batches", str(arguments.batches), "--seed", str(arguments.seed)]


def initialize(prototxt: str, output: str, flags: Sequence[str], others: str) -> Row:
    """Initialize a network from scratch with the command and judge the file that it wrote."""
    report = magic_init(prototxt, output, flags)
    return {**report, **judge(_definition_of(output, prototxt), output, others)}


def rescale(prototxt: str, weights: str, output: str, flags: Sequence[str], others: str) -> Row:
    """Rescale a network with the command, judge the file, and compare outputs in plain Caffe."""
    _check_written(weights)
    report = magic_init(prototxt, output, ["--load", weights, *flags])
    written = _definition_of(output, prototxt)
    return {**report, **judge(written, output, others),
            "difference": processes.in_child(output_difference, (prototxt, weights),
                                             (written, output), find_images(others))}


def judge(prototxt: str, weights: str, others: str) -> Row:
    """Return the change rates on other images and the largest over the smallest of them."""
    _check_written(weights)
    rates, uncertainty = processes.in_child(change_rates, prototxt, weights, find_images(others))
    return {"spread": max(rates.values()) / max(min(rates.values()), TINY), "layers": len(rates),
            "slowest": min(rates, key=rates.__getitem__),
            "fastest": max(rates, key=rates.__getitem__),
            "uncertainty": uncertainty, "rates": rates}


def magic_init(prototxt: str, output: str, flags: Sequence[str]) -> Row:
    """Run the command; return what it took and what it reported.

    `seconds` are the command's from start to end, `work` those of the phases in which it computes.
    Raises ValueError with the command's last line where it fails.
    """
    report = os.path.splitext(output)[0] + ".json"
    started = time.perf_counter()
    try:
        done = subprocess.run(
            [sys.executable, COMMAND, prototxt, output, "--report", report, "--quiet", "--cpu",
             *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True,
            timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise ValueError("the command took more than %d seconds" % SECONDS) from error
    seconds = time.perf_counter() - started
    if done.returncode:
        raise ValueError((done.stderr.splitlines() or ["exit status %d" % done.returncode])[-1])
    content: Row = results.read_json(report)
    phases = content["seconds"]
    return {"seconds": seconds, "phases": phases,
            "work": sum(phases[name] for name in phases if name not in ("set up", "in all")),
            "spread_before_own": content["spread_before"], "spread_own": content["spread_after"],
            "difference_reported": content["output_difference"], "changes": content["changes"],
            "warnings": done.stderr.splitlines()}


def _check_written(weights: str) -> None:
    """Raise ValueError where an earlier step did not write its file."""
    if not os.path.exists(weights):
        raise ValueError("not measured, because there is no %s" % os.path.basename(weights))


def _definition_of(weights: str, prototxt: str) -> str:
    """Return the definition that the command wrote beside weights, `prototxt` if it wrote none."""
    beside = os.path.splitext(weights)[0] + ".prototxt"
    return beside if os.path.exists(beside) else prototxt


# ---------------------------------------------------------------------------------------------
# Plain Caffe, in child processes


def find_images(pattern: str) -> List[str]:
    """Return the paths that a pattern matches, in order."""
    return sorted(glob.glob(pattern))


def load_images(paths: Sequence[str], channels: int, height: int, width: int) -> np.ndarray:
    """Return images (n, channels, height, width) less their mean colour, as the command does.

    The interpolation matters: images without the aliasing of OpenCV's default change the rates of
    first layers by 30 percent.
    """
    grey = channels == 1
    mean = np.dot(MEAN, (0.114, 0.587, 0.299)) if grey else MEAN
    images = np.empty((len(paths), height, width, channels), np.float32)
    for image, path in zip(images, paths):
        pixels = cv2.imread(path, cv2.IMREAD_GRAYSCALE if grey else cv2.IMREAD_COLOR)
        if pixels is None:
            raise ValueError("%s: not an image that OpenCV can read" % path)
        image[...] = cv2.resize(pixels, (width, height)).reshape(image.shape) - mean
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2))


def load_net(prototxt: str, paths: Sequence[str], weights: Optional[str] = None,
             backward: bool = False) -> Any:
    """Return a caffe.Net in TEST phase that holds one batch of images.

    The batch size is set in the definition: LSTM layers cannot change it later.  With `backward`
    the network computes the gradients of all weights, and its outputs are what its last Softmax
    layers would read.
    """
    caffe = import_caffe()
    definition = read_definition(prototxt)
    if backward:
        prepare_backward(definition)
    inputs = [layer for layer in definition.layer if layer.type == "Input"]
    if len(inputs) != 1 or len(inputs[0].top) != 1:
        raise ValueError("%s: this table needs a definition with one Input layer" % prototxt)
    shape = inputs[0].input_param.shape[0]
    shape.dim[0] = len(paths)
    with tempfile.NamedTemporaryFile("w", suffix=".prototxt") as file:
        file.write(text_format.MessageToString(definition))
        file.flush()
        net = caffe.Net(file.name, caffe.TEST)
    if weights is not None:
        net.copy_from(weights)
    net.blobs[inputs[0].top[0]].data[...] = load_images(paths, *shape.dim[1:])
    return net


def prepare_backward(definition: Any) -> None:
    """Let Caffe compute all gradients of a definition, from the inputs of its last softmaxes."""
    read = {blob for layer in definition.layer for blob in layer.bottom}
    kept = [layer for layer in definition.layer
            if layer.type != "Softmax" or layer.top[0] in read]
    copies = [type(layer).FromString(layer.SerializeToString()) for layer in kept]
    for layer in copies:
        for parameter in layer.param:
            parameter.lr_mult = 1
    definition.ClearField("layer")
    definition.layer.extend(copies)
    definition.force_backward = True


def change_rates(prototxt: str, weights: str,
                 paths: Sequence[str]) -> Tuple[Dict[str, float], float]:
    """Return the change rate of each affine layer on images, and the rates' uncertainty.

    Equation 2: C_k = sqrt(E[g^2] / mean(W_k^2)), with each image's own eta ~ N(0, 1) as the
    gradient of the outputs (section 3.2).  The expected square of a batch's gradient is the sum
    of its images' squares; small batches leave less noise from products of different images.
    Rounds end when the largest standard error of a layer's log rate, relative to the other
    layers', is below `CERTAIN` times the spread.
    """
    recurrent = any(layer.type in RECURRENT for layer in read_definition(prototxt).layer)
    size = min(CLIP if recurrent else JUDGED_TOGETHER, len(paths))
    net = load_net(prototxt, paths[:size], weights, backward=True)
    images = net.blobs[net.inputs[0]].data
    batches = load_images(paths[:len(paths) // size * size], *images.shape[1:])
    rng = np.random.default_rng(0)
    blobs: Dict[str, Any] = {}
    for name, layer in zip(net._layer_names, net.layers):
        known = {blob.data.ctypes.data for blob in blobs.values()}
        if layer.type in AFFINE and len(layer.blobs) \
                and layer.blobs[0].data.ctypes.data not in known:
            blobs[name] = layer.blobs[0]
    norms = np.array([_mean_square(blob.data) for blob in blobs.values()])
    squares: List[np.ndarray] = []
    uncertainty, spread = np.inf, 1.0
    while len(squares) < ROUNDS and uncertainty > CERTAIN * spread:
        squares.append(np.zeros(len(blobs)))
        for batch in batches.reshape(-1, *images.shape):
            images[...] = batch
            squares[-1] += _squared_gradients(net, blobs.values(), rng) / norms
        if len(squares) >= 4:
            uncertainty = _uncertainty(np.array(squares))
            means = np.mean(squares, axis=0)
            spread = np.sqrt(means.max() / max(means.min(), TINY))
    return dict(zip(blobs, np.sqrt(np.mean(squares, axis=0)).tolist())), uncertainty


def _squared_gradients(net: Any, blobs: Iterable[Any], rng: np.random.Generator) -> np.ndarray:
    """Return mean squares of weights' gradients in one pass with random gradients of outputs."""
    for layer in net.layers:
        for blob in layer.blobs:
            blob.diff[...] = 0
    net.forward()
    for name in net.outputs:
        net.blobs[name].diff[...] = rng.standard_normal(net.blobs[name].data.shape)
    net.backward()
    return np.array([_mean_square(blob.diff) for blob in blobs])


def _uncertainty(squares: np.ndarray) -> float:
    """Return the largest standard error of the layers' log rates, from squares (passes, layers)."""
    relative = squares / np.maximum(squares.mean(axis=0), TINY)
    relative -= relative.mean(axis=1, keepdims=True)
    return float(0.5 * relative.std(axis=0, ddof=1).max() / np.sqrt(len(squares)))


def _mean_square(array: np.ndarray) -> float:
    return float(np.mean(np.square(array, dtype=np.float64)))


def prepare(prototxt: str, paths: Sequence[str], seed: int, filled: str, legacy: str) -> bool:
    """Write two caffemodels: the network as its fillers make it, and one like a trained one.

    Weights that no filler sets are xavier.  BatchNorm has statistics of the images in both.
    """
    import_caffe().set_random_seed(seed)
    rng = np.random.default_rng(seed)
    net = load_net(prototxt, paths[:PREPARED_ON])
    for layer in net.layers:
        if layer.type in AFFINE and not layer.blobs[0].data.any():
            bound = np.sqrt(3 / layer.blobs[0].data[0].size)
            layer.blobs[0].data[...] = rng.uniform(-bound, bound, layer.blobs[0].data.shape)
    forward_with_statistics(net)
    net.save(filled)
    disturbed: Set[int] = set()
    forward_with_statistics(net, lambda index: disturb(net, index, rng, disturbed))
    net.save(legacy)
    return True


def forward_with_statistics(net: Any, before: Callable[[int], None] = lambda index: None) -> None:
    """Run a network layer by layer, and give BatchNorm the mean and variance of its input.

    `before` is called with the index of each layer before it runs.
    """
    for index, layer in enumerate(net.layers):
        before(index)
        if layer.type == "BatchNorm":
            bottom = first_blob(net, net._bottom_ids(index))
            axes = tuple(axis for axis in range(bottom.ndim) if axis != 1)
            mean, variance, correction = layer.blobs
            mean.data[...] = bottom.mean(axes, dtype=np.float64)
            variance.data[...] = bottom.var(axes, dtype=np.float64)
            correction.data[...] = 1
        net._forward(index, index)


def disturb(net: Any, index: int, rng: np.random.Generator, disturbed: Set[int]) -> None:
    """Give a layer weights and biases as if training had changed its scale.

    The std of an affine layer's outputs becomes a factor f between 1/sqrt(5) and sqrt(5), drawn
    log-uniformly, so that weights between two of them are off by 1/5 to 5; its biases have a std
    of 0.3 f.  A recurrent layer, whose outputs are bounded, gets weights of std f / sqrt(fan-in).
    Shared weights, at addresses in `disturbed`, change once.
    """
    layer = net.layers[index]
    if layer.type not in AFFINE | RECURRENT:
        return
    weights = layer.blobs[0].data
    if weights.ctypes.data in disturbed:
        return
    disturbed.add(weights.ctypes.data)
    factor = DISTURBANCE ** rng.uniform(-0.5, 0.5)
    if layer.type in RECURRENT:
        for blob in layer.blobs:
            fan_in = blob.data[0].size if blob.data.ndim > 1 else 10
            blob.data[...] = factor * rng.standard_normal(blob.data.shape) / np.sqrt(fan_in)
        return
    if len(layer.blobs) > 1:
        layer.blobs[1].data[...] = 0
    bottom = first_blob(net, net._bottom_ids(index))
    inputs = np.array(bottom)
    net._forward(index, index)
    deviation = float(first_blob(net, net._top_ids(index)).std(dtype=np.float64))
    bottom[...] = inputs  # a Scale layer may work in place
    if not deviation > 0:
        raise ValueError("layer '%s': its outputs are constant" % net._layer_names[index])
    weights *= factor / deviation
    if len(layer.blobs) > 1:
        biases = layer.blobs[1].data
        biases[...] = factor * 0.3 * rng.standard_normal(biases.shape)


def first_blob(net: Any, numbers: Sequence[int]) -> np.ndarray:
    """Return the data of the first of a layer's bottoms or tops, given by their numbers."""
    data: np.ndarray = net.blobs[net._blob_names[numbers[0]]].data
    return data


def forward_seconds(prototxt: str, weights: str, arguments: argparse.Namespace) -> float:
    """Return F, the seconds of one forward of the command's images in its batches, once warm."""
    paths = find_images(arguments.data)
    size = min(arguments.batch_size, len(paths))
    net = load_net(prototxt, paths[:size], weights)
    net.forward()
    started = time.perf_counter()
    for _ in range(min(arguments.batches, len(paths) // size)):
        net.forward()
    return time.perf_counter() - started


def output_difference(before: Sequence[str], after: Sequence[str], paths: Sequence[str]) -> float:
    """Return the largest difference of two networks' outputs over the std of the first's.

    Networks are pairs of a prototxt and a caffemodel; the largest over all outputs counts.
    """
    old, new = (load_net(prototxt, paths, weights) for prototxt, weights in (before, after))
    old.forward()
    new.forward()
    differences = []
    for name in old.outputs:
        if name not in new.blobs:
            raise ValueError("the changed definition has no output '%s'" % name)
        expected = np.array(old.blobs[name].data, np.float64)
        differences.append(np.abs(new.blobs[name].data - expected).max() / expected.std())
    return float(max(differences))


# ---------------------------------------------------------------------------------------------
# The table


def errors(row: Row) -> Dict[str, str]:
    """Return the errors of a network's steps, by step."""
    return {name: value["error"] for name, value in row.items()
            if isinstance(value, dict) and "error" in value}


def cell(row: Row, column: str) -> Any:
    """Return what a column says of a network; None where the step failed that measures it."""
    try:
        return COLUMNS[column](row)
    except (KeyError, TypeError):
        return None


def progress(row: Row) -> str:
    """Return one line that says what was measured of a network."""
    cells = [(column, cell(row, column)) for column in COLUMNS if column != "net"]
    line = "%-20s %s" % (row["net"], "  ".join(
        "%s %.3g" % pair for pair in cells if pair[1] is not None))
    return "; ".join([line] + ["%s FAILED: %s" % pair for pair in errors(row).items()])


def write_table(base: str, rows: Sequence[Row]) -> None:
    """Write the table as `base`.csv and `base`.md."""
    formats.write_csv(base + ".csv", list(COLUMNS),
                      [[cell(row, column) for column in COLUMNS] for row in rows])
    lines = ["| %s |" % " | ".join(COLUMNS),
             "| --- |" + " ---: |" * (len(COLUMNS) - 1)]
    for row in rows:
        values = [cell(row, column) for column in COLUMNS]
        lines.append("| %s |" % " | ".join(
            value if isinstance(value, str) else "failed" if value is None else "%.3g" % value
            for value in values))
    lines += ["", *("%s, %s: %s" % (row["net"], step, message) for row in rows
                    for step, message in errors(row).items())]
    with files.replacing(base + ".md") as temporary, \
            open(temporary, "w", encoding="utf-8") as file:
        file.write("\n".join(lines).rstrip() + "\n")


if __name__ == "__main__":
    sys.exit(main())
