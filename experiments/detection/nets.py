"""Build the Fast R-CNN net of a classification net (Girshick 2015, section 2.2).

The last pooling becomes ROI pooling to the same size, and the classifier becomes `cls_score` and
`bbox_pred`; auxiliary classifiers are cut off. All other layers keep their names and shapes, so
that caffemodels of the classification net can be loaded. Strided layers are padded until cell i of
their output is centered on input stride * i: in CaffeNet conv1 by 5 and pool1 and pool2 by 1, as in
Fast R-CNN's own definition.
"""
import json
from typing import Any, Dict, List, NamedTuple, Sequence, Tuple

from ddinit.prototxt import Input, build_net, caffe_messages, image_layers, output_blobs
from training.nets import AFFINE, input_net, needed_for, plain

RATES = ((1.0, 1.0), (2.0, 0.0))  # lr_mult and decay_mult of weights and of biases
FRESH = ("cls_score", "bbox_pred")  # the layers that no classification net has
LABELS = ("labels", "bbox_targets", "bbox_inside_weights", "bbox_outside_weights")


class Skeleton(NamedTuple):
    """The parts of a classification net that detection keeps.

    name         of the net
    trunk, head  LayerParameters before and after the ROI pooling
    image        blob of the image input
    feature      blob that the new classifiers read
    pooling      name of the layer that ROI pooling replaces
    maps, pooled   blobs that ROI pooling reads and writes
    side         ROI pooling makes side x side cells
    stride       pixels per cell of the maps
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


def training_net(skeleton: Skeleton, classes: int, data: Dict[str, Any]) -> Any:
    """Return the NetParameter to train, for `classes` classes and the background.

    `data` are those of `batches.layer_parameters`.
    """
    net = caffe_messages().NetParameter(name=skeleton.name)
    source = net.layer.add(name="data", type="Python", top=[skeleton.image, "rois", *LABELS])
    source.python_param.module = "detection.roi_data"
    source.python_param.layer = "RoiData"
    source.python_param.param_str = json.dumps(data)
    _add_layers(net, skeleton, classes)
    net.layer.add(name="loss_cls", type="SoftmaxWithLoss", bottom=["cls_score", "labels"],
                  top=["loss_cls"], loss_weight=[1])
    add_smooth_l1_loss(net, "loss_bbox", ("bbox_pred",) + LABELS[1:])
    return net


def testing_net(skeleton: Skeleton, classes: int) -> Any:
    """Return the NetParameter that scores ROIs.

    Its inputs, the image and 'rois', are reshaped for each image. Its outputs are 'cls_prob' (ROIs,
    classes + 1), with the background first, and 'bbox_pred' (ROIs, 4 (classes + 1)).
    """
    net = caffe_messages().NetParameter(name=skeleton.name)
    for blob, shape in ((skeleton.image, (1, 3, 224, 224)), ("rois", (1, 5))):
        layer = net.layer.add(name=blob, type="Input", top=[blob])
        layer.input_param.shape.add(dim=shape)
    _add_layers(net, skeleton, classes)
    net.layer.add(name="cls_prob", type="Softmax", bottom=["cls_score"], top=["cls_prob"])
    return net


def _add_layers(net: Any, skeleton: Skeleton, classes: int) -> None:
    net.layer.extend(skeleton.trunk)
    add_roi_pooling(net, "roi_" + skeleton.pooling, skeleton.maps, skeleton.pooled, skeleton.side,
                    1.0 / skeleton.stride)
    net.layer.extend(skeleton.head)
    for name, outputs, deviation in zip(FRESH, (classes + 1, 4 * (classes + 1)), (0.01, 0.001)):
        layer = net.layer.add(name=name, type="InnerProduct", bottom=[skeleton.feature],
                              top=[name])
        layer.inner_product_param.num_output = outputs
        layer.inner_product_param.weight_filler.type = "gaussian"
        layer.inner_product_param.weight_filler.std = deviation
    for layer in net.layer:
        if layer.type in AFFINE:
            _set_rates(layer)


def _set_rates(layer: Any) -> None:
    """Let a layer learn even if its definition has frozen it; shared parameters stay shared."""
    names = [parameter.name for parameter in layer.param]
    layer.ClearField("param")
    for number, (rate, decay) in enumerate(RATES):
        parameter = layer.param.add(lr_mult=rate, decay_mult=decay)
        if number < len(names) and names[number]:
            parameter.name = names[number]
    if not getattr(layer, AFFINE[layer.type]).bias_term:
        del layer.param[1]


def add_roi_pooling(net: Any, name: str, maps: str, top: str, side: int,
                    spatial_scale: float) -> None:
    """Add a layer to a NetParameter that pools `maps` in each of 'rois' to (side, side)."""
    _add_python(net, name, "ROIPooling", [maps, "rois"], top,
                {"side": side, "spatial_scale": spatial_scale})


def add_smooth_l1_loss(net: Any, name: str, bottoms: Sequence[str]) -> None:
    """Add a smooth L1 loss (sigma 1) of weight 1 to a NetParameter.

    `bottoms` are the prediction, the target, and the inside and outside weights.
    """
    _add_python(net, name, "SmoothL1Loss", bottoms, name, {"sigma": 1}, loss_weight=[1])


def _add_python(net: Any, name: str, kind: str, bottoms: Sequence[str], top: str,
                parameters: Dict[str, Any], **fields: Any) -> None:
    layer = net.layer.add(name=name, type="Python", bottom=bottoms, top=[top], **fields)
    layer.python_param.module = "detection.roi_layers"
    layer.python_param.layer = kind
    layer.python_param.param_str = json.dumps(parameters)


def skeleton_of(definition: Any) -> Skeleton:
    """Return the parts of a classification net that detection keeps.

    Raises ValueError naming the layer where the net does not end in a fully connected classifier
    after one last pooling that everything passes.
    """
    layers, image = image_layers(definition, 1)
    assert image is not None  # because we asked for a batch of 1
    if image.shape[1] != 3:
        raise ValueError("The net '%s' reads images of one channel; Fast R-CNN needs color."
                         % definition.name)
    layers = [plain(layer) for layer in needed_for(layers, output_blobs(layers)[-1])]
    classifier = layers.pop()
    if classifier.type != "InnerProduct":
        raise ValueError("Layer '%s' is a %s. Fast R-CNN needs an InnerProduct layer as the last "
                         "one, which its classifiers replace." % (classifier.name, classifier.type))
    _check_names(layers)
    place = _last_pooling(layers)
    pooling = layers[place]
    maps, pooled = pooling.bottom[0], pooling.top[0]
    trunk, head = layers[:place], layers[place + 1:]
    if pooling.pooling_param.pool == pooling.pooling_param.MAX:
        side = _side(layers[:place + 1], image, pooled)
    else:  # GoogLeNet averages whole maps, so it has to average as many cells of a ROI
        side = _side(trunk, image, maps)
        pooled = "roi_" + maps
        pooling.bottom[0] = pooled
        head.insert(0, pooling)
    for layer in trunk:
        _center(layer)
    return Skeleton(definition.name, trunk, head, image.blob, classifier.bottom[0], pooling.name,
                    maps, pooled, side, _strides(trunk, image.blob)[maps])


def _check_names(layers: Sequence[Any]) -> None:
    for layer in layers:
        if layer.name in FRESH or "rois" in layer.top:
            raise ValueError("Layer '%s' is that of a detection net. The classification net is "
                             "needed." % layer.name)


def _last_pooling(layers: Sequence[Any]) -> int:
    """Return the index of the last pooling, which everything has to pass."""
    places = [place for place, layer in enumerate(layers) if layer.type == "Pooling"]
    if not places:
        raise ValueError("The net has no Pooling layer that ROI pooling could replace.")
    pooling = layers[places[-1]]
    computed = {pooling.top[0]}
    for layer in layers[places[-1] + 1:]:
        past = [bottom for bottom in layer.bottom if bottom not in computed]
        if past:
            raise ValueError("Layer '%s' reads '%s', which bypasses the last pooling '%s', so that "
                             "ROI pooling cannot replace it." % (layer.name, past[0], pooling.name))
        computed.update(layer.top)
    return places[-1]


def _side(layers: Sequence[Any], image: Input, blob: str) -> int:
    """Return the height and width of a blob in the classification net, which fit fc6's weights."""
    net = input_net(layers, image)
    for layer in net.layer:
        if layer.HasField("convolution_param"):
            layer.convolution_param.ClearField("weight_filler")  # random numbers take time
    height, width = build_net(net).blobs[blob].data.shape[2:]
    if height != width:
        raise ValueError("Blob '%s' is %d x %d in the classification net, but ROI pooling needs a "
                         "square." % (blob, height, width))
    return int(height)


def _center(layer: Any) -> None:
    """Pad a strided layer so that its output i is centered on its input stride * i."""
    for axis in (0, 1):
        kernel, stride, pad = _window(layer, axis)
        if stride > 1 and pad < (kernel - 1) // 2:
            _set_pad(layer, axis, (kernel - 1) // 2)


def _window(layer: Any, axis: int) -> Tuple[int, int, int]:
    """Return kernel size, stride and padding of a layer along the height (0) or width (1)."""
    if layer.type not in ("Convolution", "Pooling"):
        return 1, 1, 0
    parameters = _window_parameters(layer)
    kernel, stride, pad = [_pair(parameters, name, default)[axis] for name, default in (
        ("kernel_size", 1), ("stride", 1), ("pad", 0))]
    dilation = list(getattr(parameters, "dilation", [])) or [1]
    return dilation[min(axis, len(dilation) - 1)] * (kernel - 1) + 1, stride, pad


def _window_parameters(layer: Any) -> Any:
    return layer.convolution_param if layer.type == "Convolution" else layer.pooling_param


def _pair(parameters: Any, name: str, default: int) -> Tuple[int, int]:
    """Return a size (height, width) that is given once, for each axis, or as ..._h and ..._w."""
    stem = name.replace("_size", "")
    if parameters.HasField(stem + "_h") or parameters.HasField(stem + "_w"):
        return getattr(parameters, stem + "_h"), getattr(parameters, stem + "_w")
    value = getattr(parameters, name)
    values = [value] if isinstance(value, int) else list(value) or [default]
    return values[0], values[-1]


def _set_pad(layer: Any, axis: int, pad: int) -> None:
    parameters = _window_parameters(layer)
    pads = list(_pair(parameters, "pad", 0))
    pads[axis] = pad
    parameters.ClearField("pad")
    parameters.pad_h, parameters.pad_w = pads


def _strides(layers: Sequence[Any], image: str) -> Dict[str, int]:
    """Return the pixels per cell of each blob that `layers` compute from the image.

    Raises ValueError where a layer joins blobs of different strides, or its own two differ.
    """
    strides = {image: 1}
    for layer in layers:
        joined = {strides[bottom] for bottom in layer.bottom}
        steps = {_window(layer, axis)[1] for axis in (0, 1)}
        if len(joined) != 1 or len(steps) != 1 or layer.type == "Deconvolution":
            raise ValueError("Layer '%s': its cells are not a fixed number of pixels apart."
                             % layer.name)
        strides.update((top, max(joined) * max(steps)) for top in layer.top)
    return strides
