"""What Caffe is like: nets, their layers, the walk over them, and feeding images.

`WorkingNet` is a net that we measure on.  There are two orders of visiting it: `walk` (layer by
layer over all batches; section 3.1 needs the statistics of one layer before the next can run) and
`WorkingNet.forward` (a plain pass over one batch).

    python -c "import caffe_net; print(caffe_net.choose_device(False, None))"
"""
import concurrent.futures
import glob
import os
import tempfile
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Set, Tuple

import cv2
import numpy as np

from ddinit import blas
from ddinit.processes import ChildDied, in_child
from ddinit.prototxt import Input, build_net, import_caffe, output_blobs

# Layers z = W x + b whose weights train; Scale with one bottom is one weight a channel.
AFFINE = {"Convolution", "Deconvolution", "InnerProduct", "Embed", "Scale"}
# Numbers that are squared in one go.  OpenBLAS shares out more than 10,000 among threads, which
# then spin for a while and keep a core from Caffe's: GoogLeNet's walk took a third longer.
CHUNK = 1 << 13


def choose_device(cpu: bool, gpu: Optional[int]) -> Optional[int]:
    """Return the GPU to use, None for the CPU.

    Without a wish, GPU 0 where a child process can use it.
    Raises ValueError where a GPU that was asked for cannot be used.
    """
    if cpu:
        return None
    if gpu is None and not glob.glob("/dev/nvidia[0-9]*") and not os.path.exists("/dev/dxg"):
        return None  # no NVIDIA driver: spare the probe's second
    try:
        in_child(_probe_gpu, gpu or 0)
    except ChildDied as error:
        if gpu is None:
            return None
        raise ValueError("GPU %d cannot be used: %s" % (gpu, error)) from error
    return gpu or 0


def use_device(gpu: Optional[int]) -> None:
    """Make Caffe compute on the device that `choose_device` returned."""
    caffe = import_caffe()
    if gpu is None:
        caffe.set_mode_cpu()
    else:
        caffe.set_mode_gpu()
        caffe.set_device(gpu)


def _probe_gpu(gpu: int) -> None:
    use_device(gpu)


# ---------------------------------------------------------------------------------------------
# Nets and layers
# ---------------------------------------------------------------------------------------------

class Layer(NamedTuple):
    """A layer of a net: `bottoms` and `tops` are names of blobs, with the copies that Caffe's
    Split layers make called by their original's name."""
    position: int
    name: str
    type: str
    bottoms: List[str]
    tops: List[str]
    blobs: Any
    parameters: Any

    @property
    def weights(self) -> np.ndarray:
        return self.blobs[0].data

    @property
    def has_bias(self) -> bool:
        return len(self.blobs) > 1


class WorkingNet:
    """A pycaffe net with the layer parameters of its definition and the blobs that we feed.

    `layers` are all layers in order, `affine` those with weights of AFFINE type, `outputs` the
    blobs on which the paper's random linear loss sits.
    """

    def __init__(self, definition: Any, image: Optional[Input]) -> None:
        self.definition = definition
        self.image = image
        self.net = build_net(definition)
        self.outputs = output_blobs(definition.layer)
        self.layers = self._read_layers()
        self.affine = [layer for layer in self.layers if is_affine(layer)]

    def _read_layers(self) -> List[Layer]:
        net, own = self.net, list(self.definition.layer)
        original: Dict[str, str] = {}
        layers = []
        for index, name in enumerate(net._layer_names):
            bottoms, tops = ([net._blob_names[blob] for blob in blobs(index)]
                             for blobs in (net._bottom_ids, net._top_ids))
            bottoms = [original.get(blob, blob) for blob in bottoms]
            parameters = None
            if own and own[0].name == name:
                parameters = own.pop(0)
            else:  # a Split that Caffe put in
                original.update((top, bottoms[0]) for top in tops)
                tops = []
            layers.append(Layer(index, name, net.layers[index].type, bottoms, tops,
                                net.layers[index].blobs, parameters))
        return layers

    def blob(self, name: str) -> Any:
        return self.net.blobs[name]

    def forward(self) -> None:
        """Run the whole net; one with data layers of its own reads its next batch."""
        self.net._forward(0, len(self.layers) - 1)

    def compute(self) -> None:
        """Run all layers but those that feed the net, from what these hold."""
        for layer in self.layers:
            if layer.bottoms:
                self.net._forward(layer.position, layer.position)

    def backward(self) -> None:
        """Pass the gradients that outputs hold back to all weights."""
        self.net._backward(len(self.layers) - 1, 0)

    def hold(self) -> Dict[str, np.ndarray]:
        """Return copies of what the input and data layers hold, for `replay`."""
        return {top: np.array(self.blob(top).data) for layer in self.layers
                if not layer.bottoms for top in layer.tops}

    def replay(self, held: Dict[str, np.ndarray]) -> None:
        """Run the net on what another one of the same inputs held."""
        for name, blob in held.items():
            self.blob(name).data[...] = blob
        self.compute()

    def shared_with(self, layer: Layer) -> Optional[str]:
        """The first layer that holds the same weights (`param { name }`), None if `layer` does."""
        weights = address(layer.blobs[0])
        for other in self.affine:
            if address(other.blobs[0]) == weights:
                return None if other is layer else other.name
        return None


def is_affine(layer: Layer) -> bool:
    """Whether a layer is z = W x + b with weights that train (Scale with two bottoms is not)."""
    return (layer.type in AFFINE and len(layer.blobs) > 0
            and not (layer.type == "Scale" and len(layer.bottoms) > 1))


def sum_of_squares(array: np.ndarray) -> float:
    """Return the sum of squares in float64, whatever the numbers' magnitude."""
    flat = array.reshape(-1)
    peak = float(max(flat.max(), -flat.min()))
    if peak == 0 or not np.isfinite(peak):
        return peak
    total = 0.0
    for start in range(0, flat.size, CHUNK):
        part = flat[start:start + CHUNK] * np.float32(1 / peak)
        total += float(np.dot(part, part))
    return total * peak ** 2


def address(blob: Any) -> int:
    """Where a blob's data lies: equal for layers that share it."""
    return blob.data.__array_interface__["data"][0]


def affine_view(layer: Layer, array: np.ndarray, in_channels: int) -> np.ndarray:
    """Return a writable view (groups, outputs / group, inputs / group, rest) of weights or diffs.

    `in_channels` counts the channels of the layer's bottom; `rest` are the positions that one
    pair of channels is joined by.  A Scale layer is as many groups of one as it has channels.
    """
    if layer.type == "Convolution":
        groups = layer.parameters.convolution_param.group
        return array.reshape(groups, array.shape[0] // groups, array.shape[1], -1)
    if layer.type == "Deconvolution":
        groups = layer.parameters.convolution_param.group
        split = array.reshape(groups, array.shape[0] // groups, array.shape[1], -1)
        return split.transpose(0, 2, 1, 3)
    if layer.type == "InnerProduct":
        if layer.parameters.inner_product_param.transpose:
            return array.reshape(1, in_channels, -1, array.shape[-1]).transpose(0, 3, 1, 2)
        return array.reshape(1, array.shape[0], in_channels, -1)
    if layer.type == "Embed":
        return array.reshape(1, 1, array.shape[0], array.shape[1]).transpose(0, 3, 1, 2)
    return array.reshape(-1, 1, 1, 1)


def output_axis(layer: Layer, dimensions: int) -> int:
    """Return the axis of an affine layer's output channels in its top of so many dimensions."""
    if layer.type in ("Convolution", "Deconvolution"):
        axis = layer.parameters.convolution_param.axis
    elif layer.type == "InnerProduct":
        axis = layer.parameters.inner_product_param.axis
    elif layer.type == "Scale":
        axis = layer.parameters.scale_param.axis
    else:
        axis = -1
    return int(axis) % dimensions


class Geometry(NamedTuple):
    """Where a convolution's kernel lies: a number per spatial axis, (height, width) for images."""
    kernel: Tuple[int, ...]
    stride: Tuple[int, ...]
    pad: Tuple[int, ...]
    dilation: Tuple[int, ...]


def geometry(layer: Layer) -> Optional[Geometry]:
    """Return the geometry of a convolution over (n, channels, ...), None for all other layers."""
    if layer.type != "Convolution" or layer.parameters.convolution_param.axis != 1:
        return None
    parameters = layer.parameters.convolution_param
    kernel = tuple(layer.weights.shape[2:])

    def each_axis(name: str, default: int) -> Tuple[int, ...]:
        values = list(getattr(parameters, name))
        if not values and name + "_h" in parameters.DESCRIPTOR.fields_by_name \
                and parameters.HasField(name + "_h"):
            values = [getattr(parameters, name + "_h"), getattr(parameters, name + "_w")]
        values = values or [default]
        return tuple(values if len(values) == len(kernel) else values * len(kernel))
    return Geometry(kernel, each_axis("stride", 1), each_axis("pad", 0), each_axis("dilation", 1))


def windows(images: np.ndarray, shape: Geometry) -> np.ndarray:
    """Return a view (n, channels, *kernel, *places) of what a convolution multiplies its weights
    with, zeros outside included.

    `images` are (n, channels, height, width) or have any other number of spatial axes.
    Raises ValueError where the kernel does not fit into a padded image.
    """
    if any(shape.pad):
        images = np.pad(images, [(0, 0), (0, 0)] + [(pad, pad) for pad in shape.pad])
    places = tuple((size - dilation * (kernel - 1) - 1) // stride + 1
                   for size, kernel, stride, dilation
                   in zip(images.shape[2:], shape.kernel, shape.stride, shape.dilation))
    if min(places) < 1:
        raise ValueError("a kernel of %s with dilation %s does not fit into %s, padding included"
                         % (shape.kernel, shape.dilation, images.shape[2:]))
    steps = images.strides[2:]
    return np.lib.stride_tricks.as_strided(
        images, images.shape[:2] + shape.kernel + places,
        images.strides[:2] + tuple(step * one for step, one in zip(steps, shape.dilation))
        + tuple(step * one for step, one in zip(steps, shape.stride)), writeable=False)


def channels(shape: Sequence[int]) -> int:
    """How many channels a blob of this shape has; a blob without a channel axis has one."""
    return shape[1] if len(shape) > 1 else 1


# ---------------------------------------------------------------------------------------------
# Visiting the layers
# ---------------------------------------------------------------------------------------------

class Segment(NamedTuple):
    """Layers first..last that run in one go: one layer to stop at, or all up to the next such.

    `reads` are blobs that earlier segments made, `keeps` those that later ones need and
    `forgets` those that none after this one does.
    """
    first: int
    last: int
    stop: Optional[Layer]
    reads: List[str]
    keeps: List[str]
    forgets: List[str]


def segments(working: WorkingNet, stop_types: Sequence[str]) -> List[Segment]:
    """Cut a net at every layer of `stop_types` that has parameters of its own."""
    runs: List[List[Layer]] = []
    for layer in working.layers:
        if layer.type == "Input":
            continue
        if stops(layer, stop_types) or not runs or stops(runs[-1][0], stop_types):
            runs.append([])
        runs[-1].append(layer)
    reads = []
    for run in runs:
        made: List[str] = []
        needed: List[str] = []
        for layer in run:
            needed += [blob for blob in layer.bottoms if blob not in made]
            made += layer.tops
        reads.append(list(dict.fromkeys(needed)))
    cut = []
    for number, run in enumerate(runs):
        later = {blob for read in reads[number + 1:] for blob in read}
        made = list(dict.fromkeys(top for layer in run for top in layer.tops))
        cut.append(Segment(run[0].position, run[-1].position,
                           run[0] if stops(run[0], stop_types) else None, reads[number],
                           [blob for blob in made if blob in later],
                           [blob for blob in reads[number] if blob not in later]))
    return cut


def stops(layer: Layer, stop_types: Sequence[str]) -> bool:
    """Whether the walk stops at a layer."""
    return layer.type in stop_types and len(layer.blobs) > 0


class Statistics:
    """Mean and variance per channel over images and positions, gathered batch by batch.

    Sums are taken around each image's own mean and joined in float64 (Chan, Golub & LeVeque), so
    that a mean far from 0 costs no digits.
    """

    def __init__(self) -> None:
        self.count = 0.0
        self.mean: np.ndarray = np.zeros(1)
        self.squares: np.ndarray = np.zeros(1)

    def add(self, blob: np.ndarray) -> None:
        """Add a blob (n, channels, ...)."""
        rows = blob.reshape(len(blob), channels(blob.shape), -1)
        if rows.shape[2] == 1:
            rows = np.ascontiguousarray(rows.transpose(2, 1, 0))
        means = rows.mean(axis=2)
        squares = np.zeros(rows.shape[1])
        centred = np.empty_like(rows[0])
        for row, mean in zip(rows, means):
            np.subtract(row, mean[:, None], out=centred)
            squares += np.einsum("cp,cp->c", centred, centred)
        means = means.astype(np.float64)
        mean = means.mean(axis=0)
        squares += rows.shape[2] * ((means - mean) ** 2).sum(axis=0)
        self._join(float(rows.shape[0] * rows.shape[2]), mean, squares)

    def joined(self, other: "Statistics") -> "Statistics":
        """Statistics of both's images."""
        both = Statistics()
        for one in (self, other):
            both._join(one.count, one.mean, one.squares)
        return both

    def _join(self, count: float, mean: np.ndarray, squares: np.ndarray) -> None:
        total = self.count + count
        step = mean - self.mean
        self.squares = self.squares + squares + step ** 2 * (self.count * count / total)
        self.mean = self.mean + step * (count / total)
        self.count = total

    @property
    def variance(self) -> np.ndarray:
        return self.squares / self.count

    def changed(self, factor: np.ndarray, shift: np.ndarray) -> "Statistics":
        """Statistics of z * factor + shift, per channel."""
        changed = Statistics()
        changed.count = self.count
        changed.mean = self.mean * factor + shift
        changed.squares = self.squares * factor ** 2
        return changed

    def overall(self) -> Tuple[float, float]:
        """Return mean and variance over all channels together."""
        mean = float(self.mean.mean())
        return mean, float((self.variance + (self.mean - mean) ** 2).mean())


class BlobStore:
    """Blobs of all batches outside the net: in memory up to a limit, then in a temporary file.

    A blob may carry a change z -> z * factor + shift per channel that is made when it is loaded.
    """

    def __init__(self, limit_bytes: float) -> None:
        self.limit_bytes = limit_bytes
        self.bytes = 0
        self.spooled_bytes = 0
        self._held: Dict[Tuple[str, int], np.ndarray] = {}
        self._spooled: Dict[Tuple[str, int], Tuple[int, Tuple[int, ...]]] = {}
        self._free: Dict[int, List[int]] = {}
        self._change: Dict[str, Tuple[np.ndarray, np.ndarray]] = {}
        self._file: Any = None

    def put(self, name: str, batch: int, blob: np.ndarray) -> None:
        """Keep a copy of `blob`; what was kept under this name and batch is replaced."""
        key = (name, batch)
        held = self._held.get(key)
        if held is not None and held.shape == blob.shape and held.dtype == blob.dtype:
            held[...] = blob
            return
        self.drop(name, batch)
        if self.bytes + blob.nbytes <= self.limit_bytes:
            self._held[key] = np.array(blob)
            self.bytes += blob.nbytes
        else:
            self._spool(key, np.ascontiguousarray(blob, np.float32))

    def change(self, name: str, factor: np.ndarray, shift: np.ndarray) -> None:
        """Make every batch of `name` load as z * factor + shift, per channel."""
        self._change[name] = (np.asarray(factor, np.float32), np.asarray(shift, np.float32))

    def settle(self, name: str) -> None:
        """Forget the change of `name`: what is put from now on holds already."""
        self._change.pop(name, None)

    def load(self, name: str, batch: int, into: np.ndarray) -> np.ndarray:
        """Write what is kept into `into`, with the blob's change, and return it."""
        key = (name, batch)
        if key in self._held:
            source = self._held[key]
        else:
            offset, shape = self._spooled[key]
            self._file.seek(offset)
            source = into.reshape(shape)
            if self._file.readinto(memoryview(source.data).cast("B")) != source.nbytes:
                raise OSError("the temporary file of blobs was cut short")
        change = self._change.get(name)
        if change is None:
            if source is not into:
                into.reshape(source.shape)[...] = source
            return into
        broadcast = (-1,) + (1,) * (into.ndim - 2)
        np.multiply(source, change[0].reshape(broadcast), out=into)
        into += change[1].reshape(broadcast)
        return into

    def drop(self, name: str, batch: int) -> None:
        """Forget a batch of a blob."""
        held = self._held.pop((name, batch), None)
        if held is not None:
            self.bytes -= held.nbytes
        spooled = self._spooled.pop((name, batch), None)
        if spooled is not None:
            size = 4 * int(np.prod(spooled[1]))
            self._free.setdefault(size, []).append(spooled[0])

    def _spool(self, key: Tuple[str, int], blob: np.ndarray) -> None:
        if self._file is None:
            self._file = tempfile.TemporaryFile(prefix="magic_init.")
        places = self._free.get(blob.nbytes)
        offset = places.pop() if places else self._file.seek(0, os.SEEK_END)
        self._file.seek(offset)
        self._file.write(memoryview(blob.data).cast("B"))
        self.spooled_bytes = max(self.spooled_bytes, offset + blob.nbytes)
        self._spooled[key] = (offset, blob.shape)


class Stop(NamedTuple):
    """What `walk` yields: a layer before it runs (`statistics` is None), and after it has.

    `load(batch)` puts a batch of the layer's bottoms into the net.  `energy` (batches,) is the sum
    of squares of the first bottom, batch by batch.
    """
    layer: Layer
    load: Callable[[int], None]
    statistics: Optional[Statistics]
    energy: np.ndarray


def walk(working: WorkingNet, store: BlobStore, batches: int, stop_types: Sequence[str],
         feed: Callable[[int], None]) -> Iterator[Stop]:
    """Run a net layer by layer, each over all batches, stopping at every layer of `stop_types`.

    Before such a layer runs, its parameters can be set from its bottoms; after it has, its tops
    can be given a change in `store` (`BlobStore.change`) before any later layer reads them.
    `feed(batch)` puts a batch into the net's Input blobs.  A blob is kept from the layer that
    makes it to its last reader, batch by batch.
    """
    net = working.net
    kept: Set[str] = set()  # what is not, is to be fed
    for segment in segments(working, stop_types):
        def load(batch: int, segment: Segment = segment) -> None:
            if not kept.issuperset(segment.reads):
                feed(batch)
            for blob in segment.reads:
                if blob in kept:
                    store.load(blob, batch, net.blobs[blob].data)

        if segment.stop is not None:
            yield Stop(segment.stop, load, None, np.zeros(batches))
        products = _products(working, segment.stop, load, batches)
        statistics = Statistics()
        energy = np.zeros(batches)
        for batch in range(batches):
            load(batch)
            if segment.stop is not None:
                energy[batch] = sum_of_squares(net.blobs[segment.stop.bottoms[0]].data)
            for blob in segment.forgets:
                store.drop(blob, batch)
            if segment.stop is not None and batch < len(products):
                net.blobs[segment.stop.tops[0]].data[...] = products[batch]
            else:
                net._forward(segment.first, segment.last)
            if segment.stop is not None:
                for top in segment.stop.tops:
                    statistics.add(net.blobs[top].data)
            for blob in segment.keeps:
                store.put(blob, batch, net.blobs[blob].data)
        kept.update(segment.keeps)
        for blob in segment.keeps:
            store.settle(blob)
        if segment.stop is not None:
            yield Stop(segment.stop, load, statistics, energy)


def _products(working: WorkingNet, layer: Optional[Layer], load: Callable[[int], None],
              batches: int) -> np.ndarray:
    """Return W x + b for all batches but the last, of a fully connected layer with more weights
    than inputs; an empty array for other layers.

    Caffe reads all weights again for every batch, which takes five times as long (CaffeNet's fc6).
    It computes the last batch, whose blobs the net is left to hold.
    """
    if layer is None or layer.type != "InnerProduct":
        return np.empty(0, np.float32)
    parameters = layer.parameters.inner_product_param
    bottom, top = (working.blob(name).data for name in (layer.bottoms[0], layer.tops[0]))
    if parameters.axis != 1 or layer.weights.size < bottom.size * batches:
        return np.empty(0, np.float32)
    inputs = np.empty((batches - 1, bottom.size), np.float32)
    for batch, row in enumerate(inputs):
        load(batch)
        row[...] = bottom.reshape(-1)
    weights = layer.weights if parameters.transpose else layer.weights.T
    outputs = blas.product(inputs.reshape(-1, weights.shape[0]), weights)
    if layer.has_bias:
        outputs += layer.blobs[1].data
    return outputs.reshape((batches - 1,) + top.shape)


# ---------------------------------------------------------------------------------------------
# Feeding images
# ---------------------------------------------------------------------------------------------

def find_images(pattern: str) -> List[str]:
    """Return the files that a glob pattern (or a folder's name) stands for, sorted.

    Raises ValueError naming the pattern where there are none.
    """
    if os.path.isdir(pattern):
        pattern = os.path.join(pattern, "*")
    found = sorted(path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path))
    if not found:
        raise ValueError("%s: no images there" % pattern)
    return found


def read_image(path: str, height: int, width: int, grey: bool = False) -> np.ndarray:
    """Return an image as uint8 (channels, height, width), BGR or one grey channel.

    Raises ValueError naming the file where OpenCV cannot decode it.
    """
    image = cv2.imread(path, cv2.IMREAD_GRAYSCALE if grey else cv2.IMREAD_COLOR)
    if image is None:
        raise ValueError("%s: not an image that OpenCV can read" % path)
    image = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
    return image[None] if grey else np.ascontiguousarray(image.transpose(2, 0, 1))


class ImageFeed:
    """Images of fixed batches, decoded by threads ahead of their use, kept as bytes.

    A batch (n, channels, height, width) is (image - mean) * scale in float32; the mean is given
    in BGR and becomes its grey value for nets with one channel.
    """

    def __init__(self, paths: Sequence[str], shape: Sequence[int], mean: Sequence[float],
                 scale: float) -> None:
        self.size, self.channels, self.height, self.width = shape
        self.batches = len(paths) // self.size
        grey = self.channels == 1
        if grey:
            mean = [float(np.dot(mean, (0.114, 0.587, 0.299)))]
        self._mean = np.asarray(mean, np.float32).reshape(-1, 1, 1)
        self._scale = np.float32(scale)
        self._pool = concurrent.futures.ThreadPoolExecutor(os.cpu_count())
        self._images = [self._pool.submit(read_image, path, self.height, self.width, grey)
                        for path in paths[:self.batches * self.size]]

    def load(self, batch: int, into: np.ndarray) -> None:
        """Write a batch into a blob's data."""
        for row, image in zip(into, self._images[batch * self.size:(batch + 1) * self.size]):
            np.subtract(image.result(), self._mean, out=row)
        if self._scale != 1:
            into *= self._scale
