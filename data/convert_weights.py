"""Convert the weights of a foreign net to one of our definitions (table 3).

    python data/convert_weights.py deploy_v1.prototxt theirs.caffemodel \\
        models/caffenet/deploy.prototxt build/theirs.caffemodel --rgb-to-bgr --rename fc6-conv=fc6

The foreign net may have a V1 definition or caffemodel, fully connected layers that are written as
convolutions, grouped convolutions that are written as full ones or the other way round, another
color order, mean or scale of its input, one gray channel, and BatchNorm, Scale and Bias layers that
are folded into the affine layer before them. Both nets are run on random inputs, and nothing is
written where a layer differs by more than 1e-3 of its standard deviation. Layers without weights in
the foreign net are left out of the output; magic_init.py --load initializes them.
"""
import argparse
import logging
import sys
from typing import Dict, Iterator, List, NamedTuple, Optional, Sequence, Set, Tuple

import numpy as np

from ddinit import files, processes
from ddinit.caffemodel import load_weights
from ddinit.net import Layer as NetLayer
from ddinit.net import WorkingNet, open_net, use_device
from ddinit.prototxt import caffe_messages

log = logging.getLogger("convert_weights")

# What the experiments subtract from pixels in 0..255 (B, G, R).
TARGET_MEAN = (104.0, 117.0, 123.0)
# Gray of B, G, R (ITU-R BT.601), as OpenCV has it.
GREY = (0.114, 0.587, 0.299)
FOLDED = ("BatchNorm", "Scale", "Bias")
DENSE = ("Convolution", "InnerProduct")
LIMIT = 1e-3  # largest difference that counts as the same function, in standard deviations
IMAGES = 2  # random images to compare on


class Options(NamedTuple):
    """What is known of the foreign net besides its files; `mean` is in its own color order."""

    rgb: bool = False
    mean: Optional[Sequence[float]] = None
    scale: float = 1.0
    fold: bool = False
    renamed: Dict[str, str] = {}
    force: bool = False


class Pair(NamedTuple):
    """A target layer, the foreign layer that fills it, and the layers that are folded into it."""

    source: NetLayer
    target: NetLayer
    folded: List[NetLayer]


class Report(NamedTuple):
    """Lines to show, and the largest difference (layer, part of its standard deviation)."""

    converted: List[str]
    dropped: List[str]
    missing: List[str]
    worst: Optional[Tuple[str, float]]


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Convert what the command line names; return the exit status."""
    parser = processes.Parser(
        prog="convert_weights.py", description="Convert foreign weights to another definition.")
    parser.add_argument("source", metavar="IN.prototxt", help="the foreign definition")
    parser.add_argument("weights", metavar="IN.caffemodel", help="its weights")
    parser.add_argument("target", metavar="TARGET.prototxt", help="the definition to fill")
    parser.add_argument("output", metavar="OUT.caffemodel", help="the weights to write")
    parser.add_argument("--rgb-to-bgr", action="store_true",
                        help="the foreign net takes R, G, B; the target takes B, G, R")
    parser.add_argument("--mean", type=float, nargs="+", metavar="M",
                        help="mean that the foreign net subtracts, per channel in its own order; "
                             "the target subtracts %g %g %g" % TARGET_MEAN)
    parser.add_argument("--scale", type=float, default=1.0, metavar="S",
                        help="factor of the foreign net's input after the mean (default: 1)")
    parser.add_argument("--fold-batchnorm", action="store_true",
                        help="fold BatchNorm, Scale and Bias layers that the target does not have "
                             "into the layer before them")
    parser.add_argument("--rename", nargs="+", action="extend", default=[], metavar="OLD=NEW",
                        help="foreign layer OLD fills the target's layer NEW")
    parser.add_argument("--force", action="store_true",
                        help="write the weights even where the nets differ")
    arguments = parser.parse_args(argv)
    processes.log_to_stderr()
    return processes.command_line(run, arguments, parser.prog)


def run(arguments: argparse.Namespace) -> None:
    """Convert, and log what was done."""
    files.check_writable(arguments.output)
    options = Options(arguments.rgb_to_bgr, arguments.mean, arguments.scale,
                      arguments.fold_batchnorm, read_renames(arguments.rename), arguments.force)
    report = processes.in_child(convert, arguments.source, arguments.weights, arguments.target,
                              arguments.output, options)
    for line in report.converted:
        log.info("%s", line)
    if report.dropped:
        log.info("not in the target, left out: %s", ", ".join(report.dropped))
    if report.missing:
        log.info("without weights, to be initialized: %s", ", ".join(report.missing))
    if report.worst is None:
        log.warning("the nets could not be compared: the sizes of their inputs differ")
    else:
        log.info("largest difference on random inputs: %.2g of the standard deviation, at '%s'",
                 report.worst[1], report.worst[0])


def read_renames(pairs: Sequence[str]) -> Dict[str, str]:
    """Return {old: new} of 'OLD=NEW' strings.  Raises ValueError naming a malformed one."""
    renamed = {}
    for pair in pairs:
        old, equals, new = pair.partition("=")
        if not (old and equals and new):
            raise ValueError("--rename %s: write OLD=NEW" % pair)
        renamed[old] = new
    return renamed


def convert(source_path: str, weights_path: str, target_path: str, output_path: str,
            options: Options) -> Report:
    """Write the source's weights in the target's layers; to be run in a child process.

    Raises ValueError naming file and layer where the weights do not fit, and where the nets do not
    compute the same.
    """
    use_device(None)
    source, target = _net(source_path), _net(target_path)
    _load(source, weights_path)
    pairs, dropped = matched(source, target, options)
    change = colours(source, target, options)
    for pair in pairs:
        _fill(pair, change if pair.source.name in _first_layers(source) else None)
    compared = differences(source, target, pairs, change)
    wrong = [(name, value) for name, value in compared if not value <= LIMIT]
    if wrong and not options.force:
        raise ValueError("%s: layer '%s' computes something else than in %s (difference %.2g of "
                         "its standard deviation); nothing written"
                         % (target_path, wrong[0][0], source_path, wrong[0][1]))
    filled = {pair.target.name for pair in pairs}
    _write(target, filled, output_path)
    missing = [layer.name for layer in target.layers
               if len(layer.blobs) and layer.name not in filled]
    worst = max(compared, key=lambda item: item[1], default=None)
    return Report([_described(pair) for pair in pairs], dropped, missing, worst)


# ---------------------------------------------------------------------------------------------
# Which layer fills which
# ---------------------------------------------------------------------------------------------

def matched(source: WorkingNet, target: WorkingNet,
            options: Options) -> Tuple[List[Pair], List[str]]:
    """Return the pairs of layers, and the source's layers with weights that have no partner.

    Raises ValueError where nothing matches, or a layer should be folded and cannot.
    """
    for old, new in options.renamed.items():
        _known(source, old, "foreign")
        _known(target, new, "target")
    targets = {layer.name: layer for layer in target.layers if len(layer.blobs)}
    folded = _folded_layers(source, targets, options)
    inside = {layer.name for layers in folded.values() for layer in layers}
    pairs, dropped = [], []
    for layer in source.layers:
        if not len(layer.blobs) or layer.name in inside:
            continue
        name = options.renamed.get(layer.name, layer.name)
        if name in targets:
            pairs.append(Pair(layer, targets[name], folded.get(layer.name, [])))
        else:
            dropped.append(layer.name)
    if not pairs:
        raise ValueError("no layer of the foreign net has the name of a target's: --rename OLD=NEW"
                         " (foreign: %s; target: %s)" % (", ".join(dropped), ", ".join(targets)))
    return pairs, dropped


def _known(net: WorkingNet, name: str, whose: str) -> None:
    if not any(layer.name == name and len(layer.blobs) for layer in net.layers):
        raise ValueError("--rename: the %s definition has no layer '%s' with weights"
                         % (whose, name))


def _folded_layers(source: WorkingNet, targets: Dict[str, NetLayer],
                   options: Options) -> Dict[str, List[NetLayer]]:
    """The layers to fold, by the affine layer that they go into.

    Raises ValueError where such a layer follows no affine layer that only it reads.
    """
    folded: Dict[str, List[NetLayer]] = {}
    maker: Dict[str, NetLayer] = {}
    for layer in source.layers:
        made_by = maker.get(layer.bottoms[0]) if len(layer.bottoms) == 1 else None
        maker.update((top, layer) for top in layer.tops)
        name = options.renamed.get(layer.name, layer.name)
        if layer.type not in FOLDED or not len(layer.blobs) or name in targets:
            continue
        if not options.fold:
            raise ValueError("the target has no layer '%s' (%s): --fold-batchnorm folds it into "
                             "the layer before it" % (name, layer.type))
        if made_by is None or made_by.type not in DENSE + ("Deconvolution",):
            raise ValueError("layer '%s' (%s) cannot be folded: it does not follow a convolution "
                             "or fully connected layer" % (layer.name, layer.type))
        if _readers(source, made_by, folded.get(made_by.name, []), layer):
            raise ValueError("layer '%s' (%s) cannot be folded: other layers read '%s' too"
                             % (layer.name, layer.type, layer.bottoms[0]))
        folded.setdefault(made_by.name, []).append(layer)
        maker.update((top, made_by) for top in layer.tops)
    return folded


def _readers(source: WorkingNet, maker: NetLayer, folded: List[NetLayer],
             reader: NetLayer) -> List[str]:
    """Layers other than `reader` that read what `maker` and what is folded into it computed."""
    last = (folded or [maker])[-1]
    blob = reader.bottoms[0]
    names = []
    for layer in source.layers[last.position + 1:]:
        if blob in layer.bottoms and layer is not reader:
            names.append(layer.name)
        if blob in layer.tops:
            break
    return names


def _first_layers(net: WorkingNet) -> Set[str]:
    """The layers that read the image."""
    return {layer.name for layer in net.layers if net.inputs[0].blob in layer.bottoms}


# ---------------------------------------------------------------------------------------------
# Weights
# ---------------------------------------------------------------------------------------------

def _fill(pair: Pair, colours: Optional["Colours"]) -> None:
    """Set a target layer's blobs; `colours` where the layer reads the image."""
    source, target = pair.source, pair.target
    arrays = [np.array(blob.data, np.float64) for blob in source.blobs]
    if pair.folded:
        arrays = with_folded(source, arrays, pair.folded)
    if source.type in DENSE and target.type in DENSE:
        weights = dense(source, arrays[0])
        bias = arrays[1] if len(arrays) > 1 else np.zeros(len(weights))
        if colours is not None:
            weights, bias = colours.turned(source, weights, bias)
        if len(target.blobs) < 2 and np.any(bias):
            raise ValueError("layer '%s' has no bias in the target, and needs one" % target.name)
        arrays = [sparse(target, weights), bias.reshape(-1)][:len(target.blobs)]
    if [array.shape for array in arrays] != [blob.data.shape for blob in target.blobs]:
        raise ValueError("layer '%s' (%s) holds %s in the foreign net and %s in the target" % (
            target.name, source.type, [list(array.shape) for array in arrays],
            [list(blob.data.shape) for blob in target.blobs]))
    for blob, array in zip(target.blobs, arrays):
        blob.data[...] = array


def dense(layer: NetLayer, weights: np.ndarray) -> np.ndarray:
    """Return a layer's weights as (outputs, inputs, positions...), groups spread out with zeros."""
    if layer.type == "InnerProduct":
        transposed = layer.parameters.inner_product_param.transpose
        return weights.T if transposed else weights
    groups = layer.parameters.convolution_param.group
    count, depth = weights.shape[:2]
    full = np.zeros((count, depth * groups) + weights.shape[2:])
    for rows, columns in _group_slices(groups, count, depth * groups):
        full[rows, columns] = weights[rows]
    return full


def sparse(layer: NetLayer, weights: np.ndarray) -> np.ndarray:
    """Return dense weights in the shape of a target layer's.

    Raises ValueError where the sizes differ, or where groups would lose weights that are not 0.
    """
    shape = layer.weights.shape
    if layer.type == "InnerProduct":
        if layer.parameters.inner_product_param.transpose:
            return _reshaped(layer, weights, shape[::-1]).T
        return _reshaped(layer, weights, shape)
    groups = layer.parameters.convolution_param.group
    full = _reshaped(layer, weights, (shape[0], shape[1] * groups) + shape[2:])
    kept = np.zeros(shape)
    for rows, columns in _group_slices(groups, *full.shape[:2]):
        kept[rows] = full[rows, columns]
    if np.count_nonzero(kept) != np.count_nonzero(full):
        raise ValueError("layer '%s' has %d groups in the target, and weights between them in the "
                         "foreign net" % (layer.name, groups))
    return kept


def _group_slices(groups: int, outputs: int, inputs: int) -> List[Tuple[slice, slice]]:
    rows, columns = outputs // groups, inputs // groups
    return [(slice(group * rows, (group + 1) * rows),
             slice(group * columns, (group + 1) * columns)) for group in range(groups)]


def _reshaped(layer: NetLayer, weights: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    other_kernel = weights.ndim == len(shape) and weights.shape != tuple(shape)
    if weights.shape[0] != shape[0] or weights.size != np.prod(shape) or other_kernel:
        raise ValueError("layer '%s': weights of shape %s do not fit the target's %s"
                         % (layer.name, list(weights.shape), list(shape)))
    return weights.reshape(shape)


def with_folded(layer: NetLayer, arrays: List[np.ndarray],
                folded: Sequence[NetLayer]) -> List[np.ndarray]:
    """Return weights W * a and bias b * a + c for each layer a z + c after an affine one."""
    parameters = layer.parameters
    outputs = (parameters.inner_product_param.num_output if layer.type == "InnerProduct"
               else parameters.convolution_param.num_output)
    weights = arrays[0]
    bias = arrays[1].reshape(-1) if len(arrays) > 1 else np.zeros(outputs)
    for later in folded:
        factor, shift = channel_change(later, outputs)
        weights = weights * _over_outputs(layer, weights, factor)
        bias = bias * factor + shift
    return [weights, bias]


def _over_outputs(layer: NetLayer, weights: np.ndarray, factor: np.ndarray) -> np.ndarray:
    """Return a factor for each output channel in a shape that multiplies the weights."""
    if layer.type == "Deconvolution":  # (inputs, outputs / groups, height, width)
        groups = layer.parameters.convolution_param.group
        rows = np.repeat(factor.reshape(groups, -1), len(weights) // groups, axis=0)
        return rows.reshape(weights.shape[:2] + (1,) * (weights.ndim - 2))
    if layer.type == "InnerProduct" and layer.parameters.inner_product_param.transpose:
        return factor
    return factor.reshape((-1,) + (1,) * (weights.ndim - 1))


def channel_change(layer: NetLayer, channels: int) -> Tuple[np.ndarray, np.ndarray]:
    """Return a and c of a layer that computes a z + c in each channel, both (channels,).

    BatchNorm with stored statistics is (z - mean) / sqrt(variance + eps).
    Raises ValueError where the layer's parameters are not one for each channel.
    """
    blobs = [np.array(blob.data, np.float64).reshape(-1) for blob in layer.blobs]
    if layer.type == "BatchNorm":
        count = blobs[2][0]
        mean, variance = (blob * (1 / count if count else 0) for blob in blobs[:2])
        factor = 1 / np.sqrt(variance + layer.parameters.batch_norm_param.eps)
        shift = -mean * factor
    elif layer.type == "Scale":
        factor = blobs[0]
        shift = blobs[1] if len(blobs) > 1 else np.zeros(len(factor))
    else:
        factor, shift = np.ones(len(blobs[0])), blobs[0]
    if len(factor) != channels:
        raise ValueError("layer '%s' (%s) cannot be folded: it has %d parameters for %d channels"
                         % (layer.name, layer.type, len(factor), channels))
    return factor, shift


# ---------------------------------------------------------------------------------------------
# The input: x_foreign = scale * (R x - mean), x_target = x - TARGET_MEAN
# ---------------------------------------------------------------------------------------------

class Colours(NamedTuple):
    """x_foreign = matrix x_target + shift: (foreign channels, target channels) and (foreign,)."""

    matrix: np.ndarray
    shift: np.ndarray

    def turned(self, layer: NetLayer, weights: np.ndarray,
               bias: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
        """Return weights and bias that compute on x_target what these do on x_foreign.

        Raises ValueError where zeros around the image would have to be shifted too.
        """
        if np.any(self.shift) and layer.type == "Convolution" and any(
                layer.parameters.convolution_param.pad):
            raise ValueError("layer '%s' pads the image with zeros: another mean cannot be folded "
                             "into its bias" % layer.name)
        by_channel = weights.reshape(len(weights), len(self.shift), -1)
        turned = np.einsum("nfp,ft->ntp", by_channel, self.matrix)
        shape = weights.shape[:1] + (
            weights.shape[2:] if weights.ndim == 4 else turned.shape[2:])
        return (turned.reshape(shape[:1] + (self.matrix.shape[1],) + shape[1:]),
                bias + np.einsum("nfp,f->n", by_channel, self.shift))

    def foreign(self, images: np.ndarray) -> np.ndarray:
        """Return images (n, target channels, height, width) as the foreign net takes them."""
        return np.einsum("ft,nthw->nfhw", self.matrix, images) + self.shift[:, None, None]


def colours(source: WorkingNet, target: WorkingNet, options: Options) -> Colours:
    """Return how the input of the foreign net follows from that of the target.

    Raises ValueError where the numbers of channels have no common meaning, or a layer other than a
    convolution or fully connected one reads the image that has to be turned.
    """
    depths = [net.inputs[0].shape[1] for net in (source, target)]
    if depths not in ([1, 1], [3, 3], [1, 3]) and (depths[0] != depths[1] or options.mean):
        raise ValueError("the foreign net takes %d channels and the target %d" % tuple(depths))
    if options.rgb and depths != [3, 3]:
        raise ValueError("--rgb-to-bgr: the foreign net takes %d channels, not 3" % depths[0])
    order = np.eye(depths[0])[::-1 if options.rgb else 1]
    matrix = np.array([GREY]) if depths == [1, 3] else order
    means = {1: [np.dot(GREY, TARGET_MEAN)], 3: TARGET_MEAN}
    ours = matrix @ np.array(means.get(depths[1], np.zeros(depths[1])))
    theirs = ours if options.mean is None else np.array(options.mean)
    if len(theirs) != depths[0]:
        raise ValueError("--mean: %d numbers for %d channels" % (len(theirs), depths[0]))
    change = Colours(options.scale * matrix, options.scale * (ours - theirs))
    if not np.array_equal(change.matrix, np.eye(depths[0])) or np.any(change.shift):
        for layer in source.layers:
            if layer.name in _first_layers(source) and layer.type not in DENSE + ("Split",):
                raise ValueError("layer '%s' (%s) reads the image: only convolutions and fully "
                                 "connected layers can be converted to other colors, means and "
                                 "scales" % (layer.name, layer.type))
    return change


# ---------------------------------------------------------------------------------------------
# Both nets on the same images
# ---------------------------------------------------------------------------------------------

def differences(source: WorkingNet, target: WorkingNet, pairs: Sequence[Pair],
                change: Colours) -> List[Tuple[str, float]]:
    """Return for target layers, in order, max |target - source| / std(source) on random images.

    Left out is what depends on layers without weights, and maps of other sizes; nothing is left
    where the two nets' inputs cannot have one size.
    """
    size = _common_size(source, target)
    if size is None:
        return []
    rng = np.random.default_rng(0)
    images = rng.uniform(-110, 140, (IMAGES, change.matrix.shape[1]) + size)
    wanted = {(pair.folded or [pair.source])[-1].position: pair.target.name for pair in pairs}
    theirs = {wanted[position]: blob for position, blob in _tops(
        source, change.foreign(images), set(wanted))}
    comparable = {layer.position: layer.name for layer in _determined(target, set(theirs))}
    found_differences = []
    for position, ours in _tops(target, images, set(comparable)):
        name = comparable[position]
        if ours.size == theirs[name].size:
            reference = theirs[name].reshape(ours.shape)
            spread = reference.std() or 1.0
            found_differences.append((name, float(np.abs(ours - reference).max() / spread)))
    return found_differences


def _common_size(source: WorkingNet, target: WorkingNet) -> Optional[Tuple[int, ...]]:
    """Return a height and width for both nets, or None; a net without InnerProduct takes any."""
    sizes = [tuple(net.inputs[0].shape[2:]) for net in (source, target)]
    if sizes[0] == sizes[1]:
        return sizes[0]
    for net, size in ((target, sizes[0]), (source, sizes[1])):
        if not any(layer.type == "InnerProduct" for layer in net.layers):
            return size
    return None


def _determined(target: WorkingNet, filled: Set[str]) -> List[NetLayer]:
    """Return the filled layers that depend on no layer whose weights are missing."""
    known = {target.inputs[0].blob}
    layers = []
    for layer in target.layers:
        if not layer.bottoms or layer.type == "Split":
            continue
        if known.issuperset(layer.bottoms) and (not len(layer.blobs) or layer.name in filled):
            known.update(layer.tops)
            if len(layer.blobs):
                layers.append(layer)
        else:
            known.difference_update(layer.tops)
    return layers


def _tops(net: WorkingNet, images: np.ndarray,
          positions: Set[int]) -> Iterator[Tuple[int, np.ndarray]]:
    """Run a net on images; yield the first top of the layers at `positions` as they compute it."""
    net.blob(net.inputs[0].blob).reshape(*images.shape)
    net.net.reshape()
    net.blob(net.inputs[0].blob).data[...] = images
    for layer in net.layers:
        net.net._forward(layer.position, layer.position)
        if layer.position in positions:
            yield layer.position, np.array(net.blob(layer.tops[0]).data)


# ---------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------

def _net(path: str) -> WorkingNet:
    try:
        return open_net(path, IMAGES)
    except ValueError as error:
        prefix = "" if str(error).startswith(path) else path + ": "
        raise ValueError(prefix + str(error)) from error


def _load(net: WorkingNet, path: str) -> None:
    """Load a caffemodel.  Raises ValueError where a layer of the net has no or other weights."""
    left = load_weights(net.net, path)
    if left:
        raise ValueError("%s: no weights for layer '%s' of the foreign definition"
                         % (path, left[0]))


def _write(net: WorkingNet, names: Set[str], path: str) -> None:
    """Write the weights of some layers of a net."""
    with files.replacing(path) as temporary:
        net.net.save(temporary)
        with open(temporary, "rb") as file:
            whole = caffe_messages().NetParameter.FromString(file.read())
        kept = caffe_messages().NetParameter(name=whole.name)
        kept.layer.extend(layer for layer in whole.layer
                          if layer.name in names or not layer.blobs)
        with open(temporary, "wb") as file:
            file.write(kept.SerializeToString())


def _described(pair: Pair) -> str:
    folded = "".join(" + %s" % layer.name for layer in pair.folded)
    return "%s <- %s%s" % (pair.target.name, pair.source.name, folded)


if __name__ == "__main__":
    sys.exit(main())
