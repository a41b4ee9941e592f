"""The Fast R-CNN net of a classification net, by its layers' names (Girshick 2015, section 2.2).

The last pooling becomes ROI pooling to the same size, the classifier becomes `cls_score` and
`bbox_pred`; auxiliary towers are cut.  All other layers keep their names and shapes, so that the
classification net's caffemodels drop in.  Strided layers are padded to be centred, which puts
cell i of the map on pixel stride * i: in CaffeNet conv1 by 5 and pool1 and pool2 by 1, as in
Fast R-CNN's own definition.

    python experiments/detection_net.py models/caffenet/deploy.prototxt train --classes 20
"""
import argparse
import json
import sys
from typing import Any, Collection, Dict, List, NamedTuple, Optional, Sequence, Tuple

from google.protobuf import text_format

from ddinit import processes
from ddinit.argument_types import count
from ddinit.prototxt import (
    Input,
    build_net,
    caffe_messages,
    image_layers,
    import_caffe,
    output_blobs,
    read_definition,
)

TRAINED = ("Convolution", "Deconvolution", "InnerProduct")
RATES = ((1.0, 1.0), (2.0, 0.0))  # lr_mult and decay_mult of weights and of biases
FRESH = ("cls_score", "bbox_pred")  # the layers that no classification net has
LABELS = ("labels", "bbox_targets", "bbox_inside_weights", "bbox_outside_weights")


class Skeleton(NamedTuple):
    """What of a classification net called `name` detection keeps.

    trunk, head: LayerParameters before and behind the ROI pooling; image, feature: the blobs by
    which images enter and that the new classifiers read; pooling: name of the layer that the ROI
    pooling stands for; maps, pooled: what it reads and makes; side: of its output (side x side);
    stride: pixels per cell of the maps.
    """
    name: str
    trunk: List[Any]
    head: List[Any]
    image: str
    feature: str
    pooling: str
    maps: str
    pooled: str
    side: int
    stride: int


# ---------------------------------------------------------------------------------------------
# The nets
# ---------------------------------------------------------------------------------------------

def training_net(skeleton: Skeleton, classes: int, data: Dict[str, Any],
                 native: Collection[str] = ()) -> Any:
    """Return the NetParameter to train, for `classes` classes and the background.

    `data` are detection_batches.layer_parameters, `native` what native_types returns.
    """
    net = caffe_messages().NetParameter(name=skeleton.name)
    source = net.layer.add(name="data", type="Python", top=[skeleton.image, "rois", *LABELS])
    source.python_param.module = "detection_data"
    source.python_param.layer = "RoiData"
    source.python_param.param_str = json.dumps(data)
    _add_layers(net, skeleton, classes, native)
    net.layer.add(name="loss_cls", type="SoftmaxWithLoss", bottom=["cls_score", "labels"],
                  top=["loss_cls"], loss_weight=[1])
    add_smooth_l1_loss(net, "loss_bbox", ("bbox_pred",) + LABELS[1:], native)
    return net


def testing_net(skeleton: Skeleton, classes: int, native: Collection[str] = ()) -> Any:
    """Return the NetParameter that scores ROIs: outputs 'cls_prob' (ROIs, classes + 1), the
    background first, and 'bbox_pred' (ROIs, 4 (classes + 1)).

    Its inputs, the image and 'rois', are reshaped to whatever there is to score.
    """
    net = caffe_messages().NetParameter(name=skeleton.name)
    for blob, shape in ((skeleton.image, (1, 3, 224, 224)), ("rois", (1, 5))):
        layer = net.layer.add(name=blob, type="Input", top=[blob])
        layer.input_param.shape.add(dim=shape)
    _add_layers(net, skeleton, classes, native)
    net.layer.add(name="cls_prob", type="Softmax", bottom=["cls_score"], top=["cls_prob"])
    return net


def unfilled(skeleton: Skeleton) -> Optional[str]:
    """Return the first layer whose weights start at 0 without a caffemodel, None without one."""
    for layer in skeleton.trunk + skeleton.head:
        if layer.type in TRAINED:
            parameters = (layer.inner_product_param if layer.type == "InnerProduct"
                          else layer.convolution_param)
            filler = parameters.weight_filler
            if filler.type == "constant" and not filler.value:
                return str(layer.name)
    return None


def _add_layers(net: Any, skeleton: Skeleton, classes: int, native: Collection[str]) -> None:
    net.layer.extend(skeleton.trunk)
    add_roi_pooling(net, "roi_" + skeleton.pooling, skeleton.maps, skeleton.pooled, skeleton.side,
                    1.0 / skeleton.stride, native)
    net.layer.extend(skeleton.head)
    for name, outputs, deviation in zip(FRESH, (classes + 1, 4 * (classes + 1)), (0.01, 0.001)):
        layer = net.layer.add(name=name, type="InnerProduct", bottom=[skeleton.feature],
                              top=[name])
        layer.inner_product_param.num_output = outputs
        layer.inner_product_param.weight_filler.type = "gaussian"
        layer.inner_product_param.weight_filler.std = deviation
    for layer in net.layer:
        if layer.type in TRAINED:
            _set_rates(layer)


def _set_rates(layer: Any) -> None:
    """Every layer learns, also those that a definition froze; shared parameters stay shared."""
    names = [parameter.name for parameter in layer.param]
    layer.ClearField("param")
    for number, (rate, decay) in enumerate(RATES):
        parameter = layer.param.add(lr_mult=rate, decay_mult=decay)
        if number < len(names) and names[number]:
            parameter.name = names[number]
    has_bias = (layer.inner_product_param if layer.type == "InnerProduct"
                else layer.convolution_param).bias_term
    if not has_bias:
        del layer.param[1]


# ---------------------------------------------------------------------------------------------
# The layers that stock Caffe lacks
# ---------------------------------------------------------------------------------------------

def native_types(gpu: bool) -> Collection[str]:
    """Return those of the two types ROIPooling and SmoothL1Loss that the loaded Caffe can train
    with: none on the CPU, where the forks that have them abort ('Not Implemented Yet')."""
    if not gpu:
        return set()
    return {"ROIPooling", "SmoothL1Loss"} & set(import_caffe().layer_type_list())


def add_roi_pooling(net: Any, name: str, maps: str, top: str, side: int, spatial_scale: float,
                    native: Collection[str] = ()) -> None:
    """Add a layer that pools `maps` below the blob 'rois' to (side, side) to a NetParameter."""
    layer = net.layer.add(name=name, bottom=[maps, "rois"], top=[top])
    if "ROIPooling" in native:
        text_format.Merge('type: "ROIPooling" roi_pooling_param { pooled_h: %d pooled_w: %d '
                          "spatial_scale: %r }" % (side, side, spatial_scale), layer)
    else:
        _python_layer(layer, "ROIPooling", {"side": side, "spatial_scale": spatial_scale})


def add_smooth_l1_loss(net: Any, name: str, bottoms: Sequence[str],
                       native: Collection[str] = ()) -> None:
    """Add a smooth L1 loss (sigma 1) of weight 1 to a NetParameter.

    `bottoms` are prediction, target, inside and outside weights.
    """
    layer = net.layer.add(name=name, bottom=bottoms, top=[name], loss_weight=[1])
    if "SmoothL1Loss" in native:
        text_format.Merge('type: "SmoothL1Loss" smooth_l1_loss_param { sigma: 1 }', layer)
    else:
        _python_layer(layer, "SmoothL1Loss", {"sigma": 1})


def _python_layer(layer: Any, name: str, parameters: Dict[str, Any]) -> None:
    layer.type = "Python"
    layer.python_param.module = "roi_layers"
    layer.python_param.layer = name
    layer.python_param.param_str = json.dumps(parameters)


# ---------------------------------------------------------------------------------------------
# Taking a classification net apart
# ---------------------------------------------------------------------------------------------

def skeleton_of(definition: Any) -> Skeleton:
    """Return what detection keeps of a classification net.

    Raises ValueError naming the layer where it does not end in a fully connected classifier
    behind one last pooling that everything goes through.
    """
    layers, image = image_layers(definition, 1)
    assert image is not None
    if image.shape[1] != 3:
        raise ValueError("the net '%s' reads images of one channel, Fast R-CNN feeds colour"
                         % definition.name)
    layers = [_unphased(layer) for layer in _main_path(layers)]
    classifier = layers.pop()
    if classifier.type != "InnerProduct":
        raise ValueError("layer '%s': Fast R-CNN puts its classifiers in the place of a last "
                         "InnerProduct layer, this is a %s" % (classifier.name, classifier.type))
    _check_names(layers)
    place = _last_pooling(layers)
    pooling = layers[place]
    maps, pooled = pooling.bottom[0], pooling.top[0]
    trunk, head = layers[:place], layers[place + 1:]
    if pooling.pooling_param.pool == pooling.pooling_param.MAX:
        side = _side(layers[:place + 1], image, pooled)
    else:  # GoogLeNet averages whole maps: it shall average as many cells of a ROI
        side = _side(trunk, image, maps)
        pooled = "roi_" + maps
        pooling.bottom[0] = pooled
        head.insert(0, pooling)
    for layer in trunk:
        _centre(layer)
    return Skeleton(definition.name, trunk, head, image.blob, classifier.bottom[0], pooling.name,
                    maps, pooled, side, _strides(trunk, image.blob)[maps])


def _main_path(layers: Sequence[Any]) -> List[Any]:
    """The layers that the net's last output depends on."""
    needed = {output_blobs(layers)[-1]}
    path = []
    for layer in reversed(layers):
        if needed & set(layer.top):
            path.append(layer)
            needed.update(layer.bottom)
    return path[::-1]


def _unphased(layer: Any) -> Any:
    """A copy of a layer that is there in training and in testing."""
    copied = type(layer)()
    copied.CopyFrom(layer)
    for field in ("include", "exclude", "phase"):
        copied.ClearField(field)
    return copied


def _check_names(layers: Sequence[Any]) -> None:
    for layer in layers:
        if layer.name in FRESH or "rois" in layer.top:
            raise ValueError("layer '%s' belongs to a detection net: give the classification net"
                             % layer.name)


def _last_pooling(layers: Sequence[Any]) -> int:
    """Position of the last pooling, which everything must go through."""
    places = [place for place, layer in enumerate(layers) if layer.type == "Pooling"]
    if not places:
        raise ValueError("the net has no Pooling layer that ROI pooling could stand for")
    pooling = layers[places[-1]]
    made = {pooling.top[0]}
    for layer in layers[places[-1] + 1:]:
        past = [bottom for bottom in layer.bottom if bottom not in made]
        if past:
            raise ValueError("layer '%s' reads '%s' past the last pooling '%s', which ROI pooling "
                             "would stand for" % (layer.name, past[0], pooling.name))
        made.update(layer.top)
    return places[-1]


def _side(layers: Sequence[Any], image: Input, blob: str) -> int:
    """Height and width that a blob has in the classification net itself: fc6's weights fit it."""
    net = caffe_messages().NetParameter()
    net.layer.add(name=image.blob, type="Input", top=[image.blob]).input_param.shape.add(
        dim=image.shape)
    net.layer.extend(layers)
    for layer in net.layer:
        if layer.HasField("convolution_param"):
            layer.convolution_param.ClearField("weight_filler")  # random numbers take time
    height, width = build_net(net).blobs[blob].data.shape[2:]
    if height != width:
        raise ValueError("blob '%s' is %d x %d in the classification net; ROI pooling needs a "
                         "square" % (blob, height, width))
    return int(height)


# ---------------------------------------------------------------------------------------------
# Geometry
# ---------------------------------------------------------------------------------------------

def _centre(layer: Any) -> None:
    """Pad a strided layer so that its output i is centred on its input stride * i."""
    for axis in (0, 1):
        kernel, stride, pad = _window(layer, axis)
        if stride > 1 and pad < (kernel - 1) // 2:
            _set_pad(layer, axis, (kernel - 1) // 2)


def _window(layer: Any, axis: int) -> Tuple[int, int, int]:
    """Kernel size, stride and padding of a layer along the height (0) or width (1)."""
    if layer.type == "Convolution":
        dilation = list(layer.convolution_param.dilation) or [1]
        kernel, stride, pad = [_pair(layer.convolution_param, name, default)[axis]
                               for name, default in (("kernel_size", 1), ("stride", 1),
                                                     ("pad", 0))]
        return dilation[min(axis, len(dilation) - 1)] * (kernel - 1) + 1, stride, pad
    if layer.type == "Pooling":
        kernel, stride, pad = [_pair(layer.pooling_param, name, default)[axis]
                               for name, default in (("kernel_size", 1), ("stride", 1),
                                                     ("pad", 0))]
        return kernel, stride, pad
    return 1, 1, 0


def _pair(parameters: Any, name: str, default: int) -> Tuple[int, int]:
    """A size given once, by axis (repeated) or as ..._h and ..._w, as (height, width)."""
    stem = name.replace("_size", "")
    if parameters.HasField(stem + "_h") or parameters.HasField(stem + "_w"):
        return getattr(parameters, stem + "_h"), getattr(parameters, stem + "_w")
    value = getattr(parameters, name)
    values = [value] if isinstance(value, int) else list(value) or [default]
    return values[0], values[-1]


def _set_pad(layer: Any, axis: int, pad: int) -> None:
    parameters = (layer.convolution_param if layer.type == "Convolution"
                  else layer.pooling_param)
    pads = list(_pair(parameters, "pad", 0))
    pads[axis] = pad
    parameters.ClearField("pad")
    parameters.pad_h, parameters.pad_w = pads


def _strides(layers: Sequence[Any], image: str) -> Dict[str, int]:
    """Pixels per cell of every blob that `layers` make of the image.

    Raises ValueError where a layer joins blobs of different strides, or height and width differ.
    """
    strides = {image: 1}
    for layer in layers:
        joined = {strides[bottom] for bottom in layer.bottom}
        steps = {_window(layer, axis)[1] for axis in (0, 1)}
        if len(joined) != 1 or len(steps) != 1 or layer.type == "Deconvolution":
            raise ValueError("layer '%s': cannot tell how many pixels its cells are apart"
                             % layer.name)
        strides.update((top, max(joined) * max(steps)) for top in layer.top)
    return strides


# ---------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------

def main(argv: Optional[Sequence[str]] = None) -> int:
    """Print the detection net of a classification net; return the exit status."""
    parser = processes.Parser(prog="detection_net.py",
                            description=(__doc__ or "").splitlines()[0])
    parser.add_argument("net", metavar="NET.prototxt", help="classification net")
    parser.add_argument("phase", choices=("train", "test"))
    parser.add_argument("--classes", type=count, default=20, metavar="N",
                        help="classes without the background (default: %(default)s)")
    arguments = parser.parse_args(argv)
    return processes.command_line(lambda given: processes.in_child(_run, given), arguments,
                                parser.prog)


def _run(arguments: argparse.Namespace) -> None:
    skeleton = skeleton_of(read_definition(arguments.net))
    net = (training_net(skeleton, arguments.classes, {}) if arguments.phase == "train"
           else testing_net(skeleton, arguments.classes))
    print(text_format.MessageToString(net), end="")


if __name__ == "__main__":
    sys.exit(main())
