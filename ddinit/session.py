"""Put a net to measure on beside the batches that it sees, and run the steps of the method on it.

The public functions on a caffe.Net (api.py) and the command (magic_init.py) share these.
"""
import logging
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple, Union

import numpy as np

from ddinit import between
from ddinit.between import Options
from ddinit.change_rates import FEW_OUTPUTS, ChangeRates, measure, outputs_per_image, spread
from ddinit.images import (
    HeldBatches,
    ImageBatches,
    batches_of,
    find_images,
    read_batches,
)
from ddinit.net import WorkingNet
from ddinit.prototxt import (
    Input,
    build_net,
    caffe_messages,
    fixed_batch,
    image_layers,
    is_source,
    read_definition,
    working_definition,
)
from ddinit.rewrite import rewritten, worst_difference
from ddinit.scales import ScaleGraph
from ddinit.walk import Statistics

log = logging.getLogger("magic_init")

Images = Union[str, Sequence[str], np.ndarray]
# The mean color of ImageNet's photographs in BGR, as Caffe's own definitions have it.
MEAN = (104.0, 117.0, 123.0)
# A rescaled net's outputs may differ by this part of their std.
TOLERANCE = 1e-3
# The rates of a net that is rescaled are measured on so many images, of the last batches.
RESCALING_IMAGES = 64
# Rates of a net from scratch further apart are worth a changed definition, or a warning.
APART = 1.5


class Feed(NamedTuple):
    """What an image becomes before a net sees it: (image - mean) * scale."""
    mean: Any = MEAN
    scale: float = 1.0


class Session:
    """A net to measure on and its batches.

    Batches 0 to `count` - 1 are for statistics and rates.  Batch `check` is held back for judging
    where there are images enough, and otherwise the last of these.
    """

    def __init__(self, definition: Any, inputs: Sequence[Input], batches: Any, count: int,
                 fed: bool, size: Optional[Sequence[int]] = None) -> None:
        self.definition = definition
        self.inputs = list(inputs)
        self.batches = batches
        self.count = min(count, batches.count)
        self.check = batches.count - 1
        self._fed = fed
        self._size = size
        self.working = self.build(definition)

    def build(self, definition: Any) -> WorkingNet:
        """Return the net to measure on of a definition with the same inputs."""
        layers, _ = image_layers(definition, 0 if self._fed else None, self._size)
        if not self._fed:
            layers = [layer for layer in layers if not is_source(layer)]
        return WorkingNet(working_definition(layers, self.inputs, definition.name), self.inputs)

    def rebuild(self, definition: Any) -> None:
        """Go on with the same weights in another definition, whose layers have the same names.

        The net goes before the new one comes: two of VGG-16 take 4 GB.
        """
        weights = {name: [np.array(blob.data) for blob in blobs]
                   for name, blobs in self.working.net.params.items()}
        del self.working
        self.working = self.build(definition)
        for name, blobs in self.working.net.params.items():
            for blob, values in zip(blobs, weights.pop(name)):
                blob.data[...] = values

    def rate_batches(self) -> List[int]:
        """Return the batches for the rates of a loaded net, without the one held back."""
        return [number for number in range(self.count) if number != self.check] or [0]

    def judge(self, rng: np.random.Generator, literal: bool,
              statistics: Dict[str, Statistics]) -> ChangeRates:
        """Return the change rates on the batch held back, and on others where outputs are few."""
        numbers = [self.check]
        if outputs_per_image(self.working) < FEW_OUTPUTS:
            numbers += self.rate_batches()[::-1]
        return self.measured(numbers, rng, literal, statistics)

    def measured(self, numbers: Sequence[int], rng: np.random.Generator, literal: bool,
                 statistics: Dict[str, Statistics]) -> ChangeRates:
        """Return the change rates on some batches, and add what layers put out to `statistics`.

        Raises ValueError naming a layer whose output is not finite.
        """
        rates = measure(self.working, self.batches, numbers, rng, literal=literal,
                        statistics=statistics)
        for name, seen in statistics.items():
            if not np.isfinite(seen.overall()).all():
                raise ValueError("layer '%s': its output is not finite (NaN or infinity)" % name)
        return rates


def open_session(prototxt: str, images: Optional[Images], batch_size: Optional[int],
                 batches: int, rng: np.random.Generator, feed: Feed,
                 size: Optional[Sequence[int]] = None, net: Any = None) -> Session:
    """Return a session on a net, whose weights are not set yet.

    Parameters
    ----------
    prototxt : path of its definition
    images : files (see `find_images`) or an array (n, channels, height, width) of what the net
        sees; None where its own data layers feed it
    batch_size : images a batch; None for the net's own, 16 for the command's usual
    batches : how many batches to use
    size : (height, width) of the images in place of what a data layer would give
    net : the user's caffe.Net, whose input has the shape and whose data layers are read

    Raises ValueError naming layer and shapes where these do not fit.
    """
    definition = read_definition(prototxt)
    session = (_open_self_fed(definition, batches, net) if images is None else
               _open_fed(definition, images, batch_size, batches, rng, feed, size, net))
    if not session.working.affine:
        raise ValueError("%s: no layer of the net has weights to initialize" % prototxt)
    return session


def _open_fed(definition: Any, images: Images, batch_size: Optional[int], batches: int,
              rng: np.random.Generator, feed: Feed, size: Optional[Sequence[int]],
              net: Any) -> Session:
    """Return a session on images that replace the net's own data layers."""
    shapes = _source_shapes(net) if net is not None else {}
    size = next((shape[2:] for shape in shapes.values() if len(shape) == 4), size)
    layers, image = image_layers(definition, batch_size or 0, size)
    assert image is not None
    image = Input(image.blob, tuple(shapes.get(image.blob, image.shape)))
    fixed = fixed_batch(layers)
    if fixed is not None and batch_size:
        fixed_image = image_layers(definition, 0, size)[1]
        assert fixed_image is not None
        batches = -(-batches * batch_size // fixed_image.shape[0])
        image = fixed_image
        log.info("layer '%s' writes out the number of images in a batch: it stays %d", fixed,
                 image.shape[0])
    if isinstance(images, np.ndarray):
        return _open_array(definition, images, image, batches, rng, size)
    paths = find_images(images)
    if fixed is not None and len(paths) < image.shape[0]:
        raise ValueError("layer '%s' wants %d images a batch, and there are %d"
                         % (fixed, image.shape[0], len(paths)))
    rows, count = batches_of(len(paths), image.shape[0], batches)
    if fixed is not None:
        rows, count = image.shape[0], min(batches, len(paths) // image.shape[0])
    whole = min(len(paths) // rows, count + 1) * rows
    chosen = [paths[number] for number in rng.permutation(len(paths))[:whole]]
    image = Input(image.blob, (rows,) + tuple(image.shape[1:]))
    return Session(definition, [image], ImageBatches(chosen, image, *feed), count, True, size)


def _open_array(definition: Any, images: np.ndarray, image: Input, batches: int,
                rng: np.random.Generator, size: Any) -> Session:
    """Return a session on images that are in memory as the net shall see them."""
    if images.ndim != 4 or images.shape[1:] != tuple(image.shape[1:]) or not len(images):
        raise ValueError("the images have the shape %s, blob '%s' of the net wants n x %s" % (
            list(images.shape), image.blob, list(image.shape[1:])))
    rows, count = batches_of(len(images), image.shape[0], batches)
    order = rng.permutation(len(images))
    held = [{image.blob: np.asarray(images[order[start:start + rows]], np.float32)}
            for start in range(0, len(images) - rows + 1, rows)][:count + 1]
    image = Input(image.blob, (rows,) + tuple(image.shape[1:]))
    return Session(definition, [image], HeldBatches(held), count, True, size)


def _open_self_fed(definition: Any, batches: int, net: Any) -> Session:
    """Return a session whose batches come from the data layers of `net` or of the definition."""
    layers, _ = image_layers(definition, None)
    if net is None:
        feeder = caffe_messages().NetParameter()
        feeder.layer.extend(layer for layer in layers if is_source(layer))
        for layer in feeder.layer:
            for field in ("include", "exclude"):
                layer.ClearField(field)
        try:
            net = build_net(feeder)
        except ValueError as error:
            raise ValueError("%s: give images with --data instead" % error) from error
    names = [name for number, name in enumerate(net._layer_names)
             if not len(net._bottom_ids(number))]
    if all(net.layers[list(net._layer_names).index(name)].type == "Input" for name in names):
        raise ValueError("the net has no data layer of its own: give it images")
    held = read_batches(net, names, batches + 1)
    read = {bottom for layer in layers for bottom in layer.bottom}
    computed = {top for layer in layers if not layer.bottom and not is_source(layer)
                for top in layer.top}
    inputs = [Input(name, tuple(net.blobs[name].shape)) for name in held.names
              if name in read - computed]
    return Session(definition, inputs, held.only([blob for blob, _ in inputs]), batches, False)


def _source_shapes(net: Any) -> Dict[str, Tuple[int, ...]]:
    """Return the shapes of the blobs of a caffe.Net that no layer computes from others."""
    return {net._blob_names[top]: tuple(net.blobs[net._blob_names[top]].shape)
            for number in range(len(net._layer_names)) if not len(net._bottom_ids(number))
            for top in net._top_ids(number)}


# ---------------------------------------------------------------------------------------------
# The steps
# ---------------------------------------------------------------------------------------------

class Calibration(NamedTuple):
    """Change rates before and after, judged on the batch held back.

    `definition` is the changed definition, None where it stays as it is, `changes` says what
    changed in it, and `difference` is that of the outputs before and after, over their std.
    """
    before: ChangeRates
    after: ChangeRates
    statistics: Dict[str, Statistics]
    definition: Any = None
    changes: Sequence[str] = ()
    difference: Optional[float] = None


def calibrate_session(session: Session, rng: np.random.Generator, keep_function: bool,
                      options: Options) -> Calibration:
    """Make all layers train at one rate; `keep_function` of a net with loaded weights, exactly.

    A net from scratch keeps its definition, unless layers hold its rates apart so that it needs
    auxiliary Power layers.  Warns of rates that are apart all the same.
    """
    if keep_function and options.output_std is not None:
        raise ValueError("the outputs of a net whose function is kept keep their scale: "
                         "output_std (--output-std) is for nets from scratch")
    if keep_function:
        done = rescale_exactly(session, rng, options)
    else:
        done = _calibrate_from_scratch(session, rng, options)
    _warn_of_rates_apart(done.after.by_layer())
    return done


def _calibrate_from_scratch(session: Session, rng: np.random.Generator,
                            options: Options) -> Calibration:
    before = between.equalize(session.working, session.batches, session.count, rng, options)
    statistics: Dict[str, Statistics] = {}
    done = Calibration(before, session.judge(rng, options.literal, statistics), statistics)
    if options.alpha < 1 or spread(done.after.by_layer()) < APART:
        return done
    changed = rescale_exactly(session, rng, options, from_scratch=True)
    if not changed.changes:
        return done
    return changed._replace(before=before, difference=None)  # there was no function to keep


def _warn_of_rates_apart(rates: Dict[str, float]) -> None:
    live = {name: rate for name, rate in rates.items() if rate > 0 and np.isfinite(rate)}
    if spread(live) > APART:
        middle = np.exp(np.mean(np.log(list(live.values()))))
        log.warning("change rates are still apart on the images held back: %s", ", ".join(
            "layer '%s' has %.2g times the mean rate" % (name, rate / middle)
            for name, rate in live.items() if abs(np.log(rate / middle)) > np.log(APART) / 2))
    idle = [name for name, rate in rates.items() if rate == 0]
    if idle:
        log.warning("the weights of %s get no gradient: rates of 0 do not count",
                    ", ".join("layer '%s'" % name for name in idle))


def rescale_exactly(session: Session, rng: np.random.Generator, options: Options,
                    from_scratch: bool = False) -> Calibration:
    """Give blobs the scales that make all change rates equal, without changing the function.

    The outputs on the batch held back are compared with those before, and rates are measured there,
    in a net of the changed definition where it has to change.  The session goes on with that.  A
    net from scratch stays as it is if it needs no auxiliary Power layer.
    """
    wanted = -(-RESCALING_IMAGES // session.batches.size)
    rates = measure(session.working, session.batches, session.rate_batches()[-wanted:], rng,
                    literal=options.literal)
    graph = ScaleGraph(session.working)
    solution = between.solve(graph, rates, [scaled.layer.name for scaled in graph.affine])
    if from_scratch and not solution.auxiliary:
        return Calibration(rates, rates, {})
    expected = _outputs(session)
    solution = solution._replace(log_scales=options.alpha * solution.log_scales)
    between.apply_to_weights(graph, solution.log_scales)
    definition, changes = rewritten(session.definition, graph, solution)
    del graph  # so that the net can go
    if changes:
        session.rebuild(definition)
    difference = worst_difference(expected, _outputs(session))
    statistics: Dict[str, Statistics] = {}
    after = session.judge(rng, options.literal, statistics)
    return Calibration(rates, after, statistics, definition if changes else None, changes,
                       difference)


def _outputs(session: Session) -> Dict[str, np.ndarray]:
    """Return what the net puts out for the batch held back."""
    session.working.load(session.batches, session.check)
    session.working.forward()
    return {name: np.array(session.working.blob(name).data) for name in session.working.outputs}
