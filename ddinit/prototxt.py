"""Net definitions: reading every dialect of prototxt, and the definition that we measure on.

Caffe itself upgrades old dialects and applies phase rules while it builds a net, and shows neither
to Python.  Here both are done on the protobuf message, so that a definition can be edited, checked
before Caffe may abort on it, and written back in today's dialect.

    python -c "from ddinit import prototxt as p; print(p.read_definition('models/caffenet/deploy.prototxt'))"
"""
import importlib
import os
import sys
import tempfile
import types
from typing import Any, Callable, Dict, Iterable, List, NamedTuple, Optional, Sequence, Set, Tuple

from google.protobuf import text_format

from ddinit import blas
from ddinit.files import replacing

# Layers that feed a net; Input is fed by us, the others feed themselves.
SOURCES = {"Input", "Data", "ImageData", "HDF5Data", "MemoryData", "DummyData", "WindowData"}
# Layers that only turn an output into a score: cut off, as everything called ...Loss is.
SCORES = {"Accuracy", "LabelsequenceAccuracy", "Silence", "HDF5Output"}
# Cut off where nothing reads them: the paper's random loss sits on what they are given.
LAST_ONLY = {"Softmax", "ArgMax"}
# Layers that compute each image of a batch by itself, where their axis is not the first.
BY_IMAGE = {"Input", "AbsVal", "BatchNorm", "Bias", "BNLL", "Concat", "Convolution", "Crop",
            "Deconvolution", "Dropout", "Eltwise", "ELU", "Embed", "Exp", "Flatten", "Im2col",
            "InnerProduct", "Log", "LRN", "MVN", "Permute", "Pooling", "Power", "PReLU", "ReLU",
            "Reshape", "Scale", "Sigmoid", "Slice", "Softmax", "Split", "SPP", "Swish", "TanH",
            "Threshold", "Tile"}
# V1 types whose names today are not the same letters in CamelCase.
V1_TYPE_NAMES = {"HDF5_DATA": "HDF5Data", "HDF5_OUTPUT": "HDF5Output", "LRN": "LRN", "MVN": "MVN",
                 "RELU": "ReLU", "TANH": "TanH", "BNLL": "BNLL", "ABSVAL": "AbsVal",
                 "ARGMAX": "ArgMax", "SOFTMAX_LOSS": "SoftmaxWithLoss", "IM2COL": "Im2col"}


class Input(NamedTuple):
    """What a net wants to be fed: the blob's name and its shape (n, channels, height, width)."""
    blob: str
    shape: Tuple[int, ...]


def import_caffe(own_blas: bool = False) -> Any:
    """Return the caffe module, imported without glog's chatter; with `own_blas` just as it comes.

    The only import that is not at the top of a file: glog reads its level when Caffe is loaded,
    BLAS is lent to it before, and a command's parent process must not load Caffe at all.
    """
    if "caffe" not in sys.modules and not own_blas:
        blas.lend_to_caffe()
    os.environ.setdefault("GLOG_minloglevel", "2")
    sys.modules.setdefault("caffe.io", _CaffeIo("caffe.io"))
    import caffe
    return caffe


class _CaffeIo(types.ModuleType):
    """Stands for caffe.io until something of it is used, as a Python layer may.

    Importing it takes as long as all else of Caffe, for the whole of scikit-image, and fails
    where that is newer than Caffe expects.
    """

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if sys.modules.get("caffe.io") is self:
            del sys.modules["caffe.io"]
        return getattr(importlib.import_module("caffe.io"), name)


def caffe_messages() -> Any:
    """Return the module of Caffe's protobuf messages."""
    return import_caffe().proto.caffe_pb2


def read_definition(path: str) -> Any:
    """Return the NetParameter in the prototxt at `path`, in today's dialect.

    Legacy `input:` fields become Input layers and V1 `layers` become `layer`.
    Raises ValueError naming the file and line where it cannot be read or parsed.
    """
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except OSError as error:
        raise ValueError("%s: cannot read the definition (%s)" % (path, error.strerror)) from error
    except UnicodeDecodeError as error:
        raise ValueError("%s: not a net definition: it is not text" % path) from error
    definition = caffe_messages().NetParameter()
    try:
        text_format.Merge(text, definition)
    except text_format.ParseError as error:
        raise ValueError("%s: not a net definition: line %s" % (path, error)) from error
    try:
        upgraded = upgrade(definition)
    except ValueError as error:
        raise ValueError("%s: %s" % (path, error)) from error
    if not upgraded.layer:
        raise ValueError("%s: the definition has no layers" % path)
    return upgraded


def write_definition(definition: Any, path: str, comment: str = "") -> None:
    """Write `definition` as prototxt, whole or not at all, below the lines of `comment`."""
    heading = "".join("# %s\n" % line for line in comment.splitlines())
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(heading + text_format.MessageToString(definition))


def upgrade(definition: Any) -> Any:
    """Return a copy of `definition` without V1 layers and legacy inputs (Caffe's own upgrade).

    Raises ValueError for V0 layers, for a mixture of dialects and for inputs without a shape.
    """
    if definition.layer and definition.layers:
        raise ValueError("the definition mixes `layer` and the old `layers`: use one of them")
    if any(old.HasField("layer") for old in definition.layers):
        raise ValueError("the definition has V0 layers (`layers { layer { ... } }`): run Caffe's "
                         "upgrade_net_proto_text on it first")
    messages = caffe_messages()
    upgraded = messages.NetParameter()
    upgraded.CopyFrom(definition)
    for field in ("input", "input_shape", "input_dim", "layers", "layer"):
        upgraded.ClearField(field)
    for name, shape in zip(definition.input, _legacy_shapes(definition)):
        layer = upgraded.layer.add(name=name, type="Input", top=[name])
        layer.input_param.shape.add(dim=shape)
    upgraded.layer.extend(definition.layer)
    upgraded.layer.extend(_upgraded_layer(old) for old in definition.layers)
    for layer in upgraded.layer:
        if layer.type == "BatchNorm" and len(layer.param) == 3:  # as its first version wanted
            for parameter in layer.param:
                parameter.lr_mult = parameter.decay_mult = 0
    return upgraded


def working_definition(definition: Any, batch_size: Optional[int]) -> Tuple[Any, Optional[Input]]:
    """Return the net to measure on, and the image input where we feed it.

    It holds `image_layers`; every output carries loss weight 1, which makes Caffe propagate the
    gradient that we put there; every parameter learns (lr_mult 1), because gradients of fixed
    layers count too.  Scale layers do not work in place: going backward, they would overwrite what
    another pass needs.  With `batch_size`, images are fed through an Input layer in place of the
    net's own data layers; without, the net feeds itself and the second value is None.
    Raises ValueError as `image_layers` does.
    """
    layers, image = image_layers(definition, batch_size)
    working = caffe_messages().NetParameter(name=definition.name)
    if image is not None:
        layer = working.layer.add(name=image.blob, type="Input", top=[image.blob])
        layer.input_param.shape.add(dim=image.shape)
    working.layer.extend(layers)
    for layer in working.layer:
        _plain(layer)
    _scale_apart(working.layer)
    if image is not None:
        image = image._replace(blob=working.layer[0].top[0])
    for name in output_blobs(working.layer):
        writer = [layer for layer in working.layer if name in layer.top][-1]
        writer.loss_weight[:] = [float(top == name) for top in writer.top]
    return working, image


def _scale_apart(layers: Sequence[Any]) -> None:
    """Let Scale layers that work in place read a blob of their own; what they write keeps its name.
    """
    taken = blob_and_layer_names(layers)
    for position, layer in enumerate(layers):
        if layer.type == "Scale" and layer.bottom[0] in layer.top:
            below = unused(layer.bottom[0] + "_unscaled", taken)
            rename_blob(layers[:position], layer.bottom[0], below)
            layer.bottom[0] = below


def rename_blob(layers: Iterable[Any], old: str, new: str) -> None:
    """Give a blob another name in all layers that read or write it."""
    for layer in layers:
        for names in (layer.bottom, layer.top):
            names[:] = [new if name == old else name for name in names]


def blob_and_layer_names(layers: Iterable[Any]) -> Set[str]:
    """Return the names of layers and blobs."""
    return {name for layer in layers for name in (layer.name, *layer.bottom, *layer.top)}


def unused(name: str, taken: Set[str]) -> str:
    """Return a name that is not taken, `name` or with a number behind it; now it is."""
    number = 0
    free = name
    while free in taken:
        number += 1
        free = "%s_%d" % (name, number)
    taken.add(free)
    return free


def spare_weight_gradients(definition: Any, spared: Callable[[Any], bool]) -> None:
    """Set lr_mult to 0 in layers that are `spared` and that Caffe's backward pass crosses anyway.

    Caffe goes back to the first layers that learn and no further, so those keep theirs.
    """
    crossed: Set[str] = set()
    for layer in definition.layer:
        below = crossed.intersection(layer.bottom)
        if spared(layer) and below:
            while len(layer.param) < _blob_count(layer):
                layer.param.add()
            for parameter in layer.param:
                parameter.lr_mult = 0
        if spared(layer) or below:
            crossed.update(layer.top)


def _blob_count(layer: Any) -> int:
    """How many parameter blobs a convolution or fully connected layer has."""
    parameters = (layer.inner_product_param if layer.type == "InnerProduct"
                  else layer.convolution_param)
    return 1 + parameters.bias_term


def image_layers(definition: Any, batch_size: Optional[int]) -> Tuple[List[Any], Optional[Input]]:
    """Return the layers of the TRAIN phase without losses, accuracies and last softmaxes, as the
    definition has them, and the image input.

    With `batch_size` the layers that feed the net are left out too; without, they are kept and the
    second value is None.
    Raises ValueError where no or more than one image input would have to be fed, where a layer
    needs more than the images, and where no layer is left.
    """
    state = caffe_messages().NetState()
    state.CopyFrom(definition.state)
    state.phase, state.level = caffe_messages().TRAIN, 0  # the level that pycaffe gives a net
    layers = [layer for layer in definition.layer if _included(layer, state)]
    if not any(is_source(layer) for layer in layers):
        layers = [layer for layer in definition.layer
                  if _included(layer, state) or is_source(layer)]
    image = None
    if batch_size is not None:
        image, sources = _image_input(layers, batch_size)
        layers = [layer for layer in layers if layer not in sources]
    elif any(layer.type == "Input" for layer in layers):
        raise ValueError("the definition has no data layer of its own: give images with --data")
    _check_bottoms(layers, definition)
    kept = _without_scores(layers, {image.blob} if image else set())
    if not output_blobs(kept):
        raise ValueError("no layer of the definition computes anything but losses and scores")
    return kept, image


def output_blobs(layers: Iterable[Any]) -> List[str]:
    """Return the blobs that layers compute from other blobs and nothing reads, in order."""
    unread: Dict[str, None] = {}
    for layer in layers:
        for bottom in layer.bottom:
            unread.pop(bottom, None)
        if layer.bottom and not is_source(layer):
            unread.update(dict.fromkeys(layer.top))
    return list(unread)


def is_source(layer: Any) -> bool:
    """Whether a layer feeds data into the net."""
    return layer.type in SOURCES or (layer.type == "Python" and not layer.bottom)


def check_types(definition: Any) -> None:
    """Raise ValueError naming the first layer that this Caffe cannot make.

    Its type is unknown, its Python class is missing, or no layer before it makes its bottom.
    """
    known = set(import_caffe().layer_type_list())
    made: Set[str] = set()
    for layer in definition.layer:
        if layer.type not in known:
            raise ValueError("layer '%s': this Caffe has no layer type '%s'"
                             % (layer.name, layer.type))
        if layer.type == "Python":
            _check_python(layer)
        missing = [bottom for bottom in layer.bottom if bottom not in made]
        if missing:
            raise ValueError("layer '%s': no layer before it makes its bottom '%s'"
                             % (layer.name, missing[0]))
        made.update(layer.top)


def _check_bottoms(layers: Iterable[Any], definition: Any) -> None:
    """Raise ValueError where a layer wants a blob that no layer of any phase makes: a misspelling.

    Scores may: deploy definitions have no labels.
    """
    made = {top for layer in definition.layer for top in layer.top}
    for layer in layers:
        for bottom in layer.bottom:
            if bottom not in made and not _is_score(layer):
                raise ValueError("layer '%s': no layer makes its bottom '%s'"
                                 % (layer.name, bottom))


def _check_python(layer: Any) -> None:
    """Raise ValueError where a Python layer's class cannot be had: Caffe would not say which."""
    module, name = layer.python_param.module, layer.python_param.layer
    try:
        getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError("layer '%s': no Python layer '%s' in module '%s' (%s)"
                         % (layer.name, name, module, error)) from error


def _image_input(layers: List[Any], batch_size: int) -> Tuple[Input, List[Any]]:
    """The one blob to feed images to, and the source layers that it replaces."""
    sources = [layer for layer in layers if is_source(layer)]
    found = []
    unfit = []
    for layer in sources:
        for number, top in enumerate(layer.top if layer.type == "Input" else layer.top[:1]):
            shape = _source_shape(layer, number)
            if len(shape) == 4 and shape[1] in (1, 3):
                found.append(Input(top, tuple(shape)))
            elif layer.type == "Input" and _read_by_kept_layers(top, layers):
                unfit.append(Input(top, tuple(shape)))
    if len(found) != 1 or unfit:
        raise ValueError("images need exactly one input blob with 1 or 3 channels, this net has %s"
                         % (", ".join("'%s' %s" % (blob, list(shape))
                                      for blob, shape in found + unfit) or "none"))
    return Input(found[0].blob, (batch_size,) + found[0].shape[1:]), sources


def _read_by_kept_layers(blob: str, layers: List[Any]) -> bool:
    return any(blob in layer.bottom and not _is_score(layer) for layer in layers)


def _source_shape(layer: Any, number: int) -> List[int]:
    """Shape of a source layer's top; of a database only if no crop size tells it."""
    if layer.type in ("Input", "DummyData"):
        return _declared_shape(layer, number)
    if layer.type == "MemoryData":
        parameters = layer.memory_data_param
        return [parameters.batch_size, parameters.channels, parameters.height, parameters.width]
    crop = layer.transform_param.crop_size
    grey = len(layer.transform_param.mean_value) == 1 or (
        layer.type == "ImageData" and not layer.image_data_param.is_color)
    if crop:
        return [1, 1 if grey else 3, crop, crop]
    if layer.type == "ImageData" and layer.image_data_param.new_height:
        return [1, 1 if grey else 3, layer.image_data_param.new_height,
                layer.image_data_param.new_width]
    return _built_shape(layer)


def _declared_shape(layer: Any, number: int) -> List[int]:
    """Shape of a top that the definition tells, once for all tops or for each."""
    parameters = layer.input_param if layer.type == "Input" else layer.dummy_data_param
    shapes = [list(shape.dim) for shape in parameters.shape]
    if layer.type == "DummyData" and not shapes:
        shapes = [list(shape) for shape in zip(parameters.num, parameters.channels,
                                               parameters.height, parameters.width)]
    if len(shapes) not in (1, len(layer.top)):
        raise ValueError("layer '%s': it gives %d shapes for %d tops"
                         % (layer.name, len(shapes), len(layer.top)))
    return shapes[number if len(shapes) > 1 else 0]


def _built_shape(layer: Any) -> List[int]:
    """Shape that Caffe gives a data layer whose definition does not tell it."""
    lone = caffe_messages().NetParameter()
    lone.layer.add().CopyFrom(layer)
    _plain(lone.layer[0])
    net = build_net(lone)
    return list(net.blobs[layer.top[0]].shape)


def build_net(definition: Any) -> Any:
    """Return a caffe.Net of `definition` in the TEST phase (dropout off, stored statistics on).

    Raises ValueError for what can be checked first; Caffe aborts on the rest.
    """
    check_types(definition)
    caffe = import_caffe()
    with tempfile.NamedTemporaryFile("w", suffix=".prototxt") as file:
        file.write(text_format.MessageToString(definition))
        file.flush()
        return caffe.Net(file.name, caffe.TEST)


def mixing_layer(definition: Any) -> Optional[str]:
    """Return the first layer in which images of one batch may meet, or whose parameters fix how
    many there are; None where a batch may be computed in parts."""
    for layer in definition.layer:
        if layer.type not in BY_IMAGE or _works_on_batch(layer):
            return "%s (%s)" % (layer.name, layer.type)
    return None


def _works_on_batch(layer: Any) -> bool:
    """Whether a layer of BY_IMAGE works along the first axis, that of images."""
    if layer.type == "Reshape":
        parameters = layer.reshape_param
        return parameters.axis == 0 and bool(parameters.shape.dim) and parameters.shape.dim[0] > 0
    if layer.type == "Permute":
        return list(layer.permute_param.order)[:1] not in ([], [0])
    if layer.type == "BatchNorm":
        parameters = layer.batch_norm_param
        return parameters.HasField("use_global_stats") and not parameters.use_global_stats
    # an axis counted from the end may be the first
    axes = [getattr(parameters, name) for field, parameters in layer.ListFields()
            for name in ("axis", "concat_dim", "slice_dim")
            if field.name.endswith("_param") and hasattr(parameters, name)]
    return any(axis == 0 or axis < -1 for axis in axes)


def _included(layer: Any, state: Any) -> bool:
    """Caffe's rule: no exclude matches, and one include matches where there is any."""
    if layer.include:
        return any(_matches(rule, state) for rule in layer.include)
    return not any(_matches(rule, state) for rule in layer.exclude)


def _matches(rule: Any, state: Any) -> bool:
    """Whether a rule holds in a state of phase, level and stages."""
    return ((not rule.HasField("phase") or rule.phase == state.phase)
            and (not rule.HasField("min_level") or rule.min_level <= state.level)
            and (not rule.HasField("max_level") or rule.max_level >= state.level)
            and set(rule.stage) <= set(state.stage)
            and not set(rule.not_stage) & set(state.stage))


def _without_scores(layers: List[Any], fed: Set[str]) -> List[Any]:
    """The layers that are neither scores nor work on blobs that only cut layers made.

    Raises ValueError where a layer mixes the two kinds of blobs.
    """
    kept: List[Any] = []
    made = set(fed)
    for layer in layers:
        missing = [bottom for bottom in layer.bottom if bottom not in made]
        if _is_score(layer) or (missing and len(missing) == len(layer.bottom)):
            continue
        if missing and layer.type == "Python" and not any(
                _read_by_kept_layers(top, layers) for top in layer.top):
            continue  # measures something against labels
        if missing:
            raise ValueError("layer '%s': images alone do not give its bottom '%s'"
                             % (layer.name, missing[0]))
        kept.append(layer)
        made.update(layer.top)
    while True:
        ends = set(output_blobs(kept))
        last = [layer for layer in kept if layer.type in LAST_ONLY and set(layer.top) <= ends]
        if not last:
            return kept
        kept = [layer for layer in kept if layer not in last]


def _is_score(layer: Any) -> bool:
    return (layer.type.endswith("Loss") or layer.type in SCORES
            or (layer.type == "Python" and any(layer.loss_weight)))


def _plain(layer: Any) -> None:
    """Drop what only matters in training: phases, rates, loss weights; random fillers are slow."""
    for field in ("include", "exclude", "phase", "loss_weight", "propagate_down"):
        layer.ClearField(field)
    for parameter in layer.param:
        if layer.type == "BatchNorm":  # Caffe refuses to learn statistics
            parameter.lr_mult = 0
        else:
            parameter.ClearField("lr_mult")
    for field in ("convolution_param", "inner_product_param", "embed_param"):
        if layer.HasField(field):
            getattr(layer, field).ClearField("weight_filler")


def _upgraded_layer(old: Any) -> Any:
    """A V1 layer in today's message; fields of the same name mean the same."""
    messages = caffe_messages()
    layer = messages.LayerParameter(name=old.name, bottom=old.bottom, top=old.top,
                                    type=_type_name(old))
    for field, value in old.ListFields():
        new = messages.LayerParameter.DESCRIPTOR.fields_by_name.get(field.name)
        if new is None or field.name in ("name", "type", "bottom", "top", "param"):
            continue
        if field.label == field.LABEL_REPEATED:
            getattr(layer, field.name).extend(value)
        elif field.message_type:
            getattr(layer, field.name).CopyFrom(value)
        else:
            setattr(layer, field.name, value)
    for field, values in (("name", old.param), ("lr_mult", old.blobs_lr),
                          ("decay_mult", old.weight_decay), ("share_mode", old.blob_share_mode)):
        for number, value in enumerate(values):
            if number == len(layer.param):
                layer.param.add()
            setattr(layer.param[number], field, value)
    _move_transform(layer)
    return layer


def _legacy_shapes(definition: Any) -> List[List[int]]:
    """The shapes of `input:` blobs, from `input_shape` or four `input_dim` for each."""
    shapes = [list(shape.dim) for shape in definition.input_shape]
    if not shapes:
        dims = list(definition.input_dim)
        shapes = [dims[start:start + 4] for start in range(0, len(dims), 4)]
        if len(dims) % 4:
            raise ValueError("an input needs 4 input_dim, the definition has %d in all" % len(dims))
    if len(shapes) != len(definition.input):
        raise ValueError("the definition has %d inputs and %d shapes for them"
                         % (len(definition.input), len(shapes)))
    return shapes


def _type_name(old: Any) -> str:
    name = old.DESCRIPTOR.fields_by_name["type"].enum_type.values_by_number[old.type].name
    if name == "NONE" or not old.HasField("type"):
        raise ValueError("layer '%s': the old definition gives it no type" % old.name)
    return V1_TYPE_NAMES.get(name, "".join(word.capitalize() for word in name.split("_")))


def _move_transform(layer: Any) -> None:
    """Old data layers keep scale, mean, crop and mirror in their own message."""
    for field in ("data_param", "image_data_param", "window_data_param"):
        if not layer.HasField(field):
            continue
        parameters = getattr(layer, field)
        for name in ("scale", "mean_file", "crop_size", "mirror"):
            if parameters.HasField(name):
                setattr(layer.transform_param, name, getattr(parameters, name))
                parameters.ClearField(name)
