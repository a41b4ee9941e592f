"""Tell what Caffe knows about a net: its layers, their weights, and where a kernel lies."""
import contextlib
import ctypes
import glob
import os
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
from threadpoolctl import threadpool_limits

from ddinit.processes import ChildDied, in_child
from ddinit.prototxt import (
    Input,
    build_net,
    image_layers,
    import_caffe,
    output_blobs,
    read_definition,
    separable,
    working_definition,
)

# A layer with fewer products an image than this gains nothing from a second thread of BLAS.
SMALL_LAYER = 30e6
# Layers z = W x + b whose weights train; Scale with one bottom is one weight a channel.
AFFINE = {"Convolution", "Deconvolution", "InnerProduct", "Embed", "Scale"}


def choose_device(cpu: bool, gpu: Optional[int]) -> Optional[int]:
    """Return the GPU to use, None for the CPU.

    Without a wish it is GPU 0 where a child process can use it.
    Raises ValueError where a GPU that was asked for cannot be used.
    """
    if cpu:
        return None
    if gpu is None and not glob.glob("/dev/nvidia[0-9]*") and not os.path.exists("/dev/dxg"):
        return None  # there is no NVIDIA driver: spare the probe's second
    try:
        in_child(use_device, gpu or 0)
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


# ---------------------------------------------------------------------------------------------
# Nets and layers
# ---------------------------------------------------------------------------------------------

class Layer(NamedTuple):
    """A layer of a net.

    `bottoms` and `tops` are names of blobs; the copies that Caffe's Split layers make go by the
    name of their original.
    """
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
    """A pycaffe net to measure on, with the layer parameters of its definition.

    `inputs` are the blobs that are fed, `layers` all layers in order, `affine` those with weights
    of an AFFINE type, and `outputs` the blobs that the paper's random linear loss sits on.
    """

    def __init__(self, definition: Any, inputs: Sequence[Input]) -> None:
        self.definition = definition
        self.inputs = list(inputs)
        self.net = build_net(definition)
        self.outputs = output_blobs(definition.layer)
        self.layers = self._read_layers()
        self.affine = [layer for layer in self.layers if is_affine(layer)]
        self.separable = separable(definition.layer)

    def _read_layers(self) -> List[Layer]:
        net, unsplit = self.net, list(self.definition.layer)
        original: Dict[str, str] = {}
        layers = []
        for index, name in enumerate(net._layer_names):
            bottoms, tops = ([net._blob_names[blob] for blob in blobs(index)]
                             for blobs in (net._bottom_ids, net._top_ids))
            bottoms = [original.get(blob, blob) for blob in bottoms]
            parameters = None
            if unsplit and unsplit[0].name == name:
                parameters = unsplit.pop(0)
            else:  # a Split that Caffe put in
                original.update((top, bottoms[0]) for top in tops)
                tops = []
            layers.append(Layer(index, name, net.layers[index].type, bottoms, tops,
                                net.layers[index].blobs, parameters))
        return layers

    def blob(self, name: str) -> Any:
        return self.net.blobs[name]

    def load(self, batches: Any, number: int) -> None:
        """Put a batch into the net's inputs."""
        self.resize(self.inputs[0].shape[0])
        batches.load(number, self.net)

    def resize(self, images: int) -> None:
        """Make the net take so many images at a time; its layers must be `separable` for that."""
        if len(self.blob(self.inputs[0].blob).data) != images:
            for blob, shape in self.inputs:
                self.blob(blob).reshape(images, *shape[1:])
            self.net.reshape()

    def forward(self) -> None:
        """Run the whole net on what its inputs hold."""
        self.net._forward(0, len(self.layers) - 1)

    def backward(self) -> None:
        """Pass the gradients that the outputs hold back to all weights, whose own are cleared."""
        self.net.clear_param_diffs()
        self.net._backward(len(self.layers) - 1, 0)

    def owners(self) -> List[Layer]:
        """Return the affine layers with weights of their own: the first of those that share."""
        first: Dict[int, Layer] = {}
        for layer in self.affine:
            first.setdefault(address(layer.blobs[0]), layer)
        return list(first.values())

    def shared_with(self, layer: Layer) -> Optional[str]:
        """Return the first layer with the same weights (`param { name }`), None for that itself."""
        weights = address(layer.blobs[0])
        owner = next(affine for affine in self.affine if address(affine.blobs[0]) == weights)
        return None if owner is layer else owner.name

    def in_channels(self, layer: Layer) -> int:
        """Return how many channels of an affine layer's bottom have weights of their own."""
        shape = tuple(self.blob(layer.bottoms[0]).shape)
        if layer.type in ("Convolution", "Deconvolution"):
            return shape[layer.parameters.convolution_param.axis]
        if layer.type == "InnerProduct" and layer.parameters.inner_product_param.axis != 1:
            return int(layer.weights.size // layer.parameters.inner_product_param.num_output)
        if layer.type in ("Embed", "Scale"):
            return 1 if layer.type == "Embed" else int(layer.weights.size)
        return channels(shape)


def open_net(path: str, batch_size: int) -> WorkingNet:
    """Return the net to measure on of the definition at `path`, whose images will be fed.

    Raises ValueError as `image_layers` does.
    """
    definition = read_definition(path)
    layers, image = image_layers(definition, batch_size)
    assert image is not None  # because batch_size asks for one
    return WorkingNet(working_definition(layers, [image], definition.name), [image])


@contextlib.contextmanager
def blas_threads(working: WorkingNet) -> Iterator[None]:
    """Keep BLAS to one thread while the block runs, where a net's layers are all small.

    Threads that wait for each other's little spin, and take many times as long beside other work
    (experiments/results/speed.md).
    """
    products = 0.0
    for layer in working.affine:
        shape = working.blob(layer.tops[0]).shape
        places = np.prod(shape[1:]) / shape[output_axis(layer, len(shape))]
        products = max(products, layer.weights.size * places)
    del working  # the block may replace it by another one
    # The wheel's BLAS is a part of Caffe's own library, where threadpoolctl does not look.
    caffes = ctypes.CDLL(import_caffe()._caffe.__file__)
    if products >= SMALL_LAYER or not hasattr(caffes, "openblas_set_num_threads"):
        yield
        return
    before = caffes.openblas_get_num_threads()
    with threadpool_limits(1, "blas"):
        caffes.openblas_set_num_threads(1)
        try:
            yield
        finally:
            caffes.openblas_set_num_threads(before)


def copy_weights(source: Any, target: Any) -> None:
    """Copy parameters between two caffe.Nets by layer name.

    They are copied, not shared by Caffe: nets that share weights can crash when they end.
    Raises ValueError naming a layer of the target that the source does not have.
    """
    for name, blobs in target.params.items():  # all of them before any changes
        if name not in source.params:
            raise ValueError("layer '%s' of one net is not in the other" % name)
        given, wanted = ([list(blob.shape) for blob in each]
                         for each in (source.params[name], blobs))
        if given != wanted:
            raise ValueError("layer '%s' has weights of shape %s in one net and %s in the other"
                             % (name, *(" and ".join(map(str, each)) for each in (given, wanted))))
    for name, blobs in target.params.items():
        for blob, other in zip(blobs, source.params[name]):
            blob.data[...] = other.data


def is_affine(layer: Layer) -> bool:
    """Return whether a layer is z = W x + b with weights that train.

    Scale with two bottoms is not.
    """
    return (layer.type in AFFINE and len(layer.blobs) > 0
            and not (layer.type == "Scale" and len(layer.bottoms) > 1))


def address(blob: Any) -> int:
    """Return where a blob's data lies: it is equal for layers that share it."""
    return blob.data.__array_interface__["data"][0]


def channels(shape: Sequence[int]) -> int:
    """Return how many channels a blob of this shape has; without a channel axis it has one."""
    return shape[1] if len(shape) > 1 else 1


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


# ---------------------------------------------------------------------------------------------
# Convolutions
# ---------------------------------------------------------------------------------------------

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
