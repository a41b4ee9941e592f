"""Read every dialect of prototxt, and write the definition that a net is measured with.

Caffe itself upgrades old dialects and applies phase rules while it builds a net, and shows neither
to Python.  Here both are done on the protobuf message, so that a definition can be edited, checked
before Caffe may abort on it, and written back in today's dialect.
"""
import importlib
import logging
import os
import re
import sys
import tempfile
import types
from typing import Any, Dict, Iterable, List, NamedTuple, Optional, Sequence, Set, Tuple

from google.protobuf import text_format

from ddinit.files import read_text, replacing

log = logging.getLogger("magic_init")

# Layers that only turn an output into a score are cut off, as everything called ...Loss is.
SCORES = {"Accuracy", "LabelsequenceAccuracy", "Silence", "HDF5Output"}
# These are cut off where nothing reads them: the random loss sits on what they are given.
LAST_ONLY = {"Softmax", "ArgMax"}
# The message in which a data layer names its database or list, by its type.
DATABASES = {"Data": "data_param", "ImageData": "image_data_param", "HDF5Data": "hdf5_data_param",
             "WindowData": "window_data_param"}
# Layers that make their tops from nothing: they stay where images are fed.
GENERATORS = {"DummyData", "ContinuationIndicator"}
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
    """A blob that is fed from outside: its name and its shape (n, channels, height, width)."""
    blob: str
    shape: Tuple[int, ...]


def import_caffe() -> Any:
    """Return the caffe module, imported without glog's chatter.

    This is the only import that is not at the top of a file: glog reads its level when Caffe is
    loaded, and the parent process of a command must not load Caffe at all.
    """
    os.environ.setdefault("GLOG_minloglevel", "2")
    if "caffe" not in sys.modules:
        sys.modules.setdefault("caffe.io", _CaffeIo("caffe.io"))
    import caffe
    return caffe


class _CaffeIo(types.ModuleType):
    """Stand for caffe.io until something of it is used, as a Python layer may.

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


# ---------------------------------------------------------------------------------------------
# Reading and writing
# ---------------------------------------------------------------------------------------------

def read_definition(path: str) -> Any:
    """Return the NetParameter in the prototxt at `path`, in today's dialect.

    Legacy `input:` fields become Input layers and V1 `layers` become `layer`.  The net of a
    solver's prototxt is read in its place.
    Raises ValueError naming the file and line where it cannot be read or parsed.
    """
    text = read_text(path)
    definition = caffe_messages().NetParameter()
    try:
        text_format.Merge(text, definition)
    except (text_format.ParseError, UnicodeEncodeError) as error:
        solver = _as_solver(text)
        if solver is None:
            raise ValueError("%s: not a net definition: %s%s" % (
                path, "line " if re.match(r"\d", str(error)) else "", error)) from error
        definition = _net_of_solver(solver, path)
    try:
        upgraded = upgrade(definition)
    except ValueError as error:
        raise ValueError("%s: %s" % (path, error)) from error
    if not upgraded.layer:
        raise ValueError("%s: the definition has no layers" % path)
    return upgraded


def _as_solver(text: str) -> Any:
    """Return the SolverParameter in a text, None where it is none."""
    solver = caffe_messages().SolverParameter()
    try:
        text_format.Merge(text, solver)
    except (text_format.ParseError, UnicodeEncodeError):
        return None
    return solver


def _net_of_solver(solver: Any, path: str) -> Any:
    """Return the training net that a solver holds, or that it names relative to where Caffe runs
    or to its own folder."""
    for field in ("train_net_param", "net_param"):
        if solver.HasField(field):
            log.info("%s is a solver's definition: taking the net inside it", path)
            return getattr(solver, field)
    name = solver.train_net or solver.net
    if not name:
        raise ValueError("%s: a solver's definition, and it names no net" % path)
    beside = os.path.join(os.path.dirname(path), name)
    net = next((place for place in (name, beside, os.path.join(os.path.dirname(path),
                  os.path.basename(name))) if os.path.isfile(place)), None)
    if net is None or os.path.samefile(net, path):
        raise ValueError("%s: a solver's definition, and its net %s is not there: give the net's "
                         "prototxt instead" % (path, name))
    log.info("%s is a solver's definition: taking its net %s", path, net)
    return read_definition(net)


def write_definition(definition: Any, path: str, comment: str = "") -> None:
    """Write `definition` as prototxt, whole or not at all, below the lines of `comment`."""
    heading = "".join("# %s\n" % line for line in comment.splitlines())
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(heading + text_format.MessageToString(definition))


def upgrade(definition: Any) -> Any:
    """Return a copy of `definition` without V1 layers and legacy inputs, as Caffe upgrades it.

    Raises ValueError for V0 layers, for a mixture of dialects and for inputs without a shape.
    """
    if definition.layer and definition.layers:
        raise ValueError("the definition mixes `layer` and the old `layers`: use one of them")
    if any(old.HasField("layer") for old in definition.layers):
        raise ValueError("the definition has V0 layers (`layers { layer { ... } }`): run Caffe's "
                         "upgrade_net_proto_text on it first")
    upgraded = caffe_messages().NetParameter()
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


def _upgraded_layer(old: Any) -> Any:
    """Return a V1 layer in today's message; fields of the same name mean the same."""
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
    """Return the shapes of `input:` blobs, from `input_shape` or four `input_dim` for each."""
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
    """Move scale, mean, crop and mirror of old data layers into their own message."""
    for field in ("data_param", "image_data_param", "window_data_param"):
        if not layer.HasField(field):
            continue
        parameters = getattr(layer, field)
        for name in ("scale", "mean_file", "crop_size", "mirror"):
            if parameters.HasField(name):
                setattr(layer.transform_param, name, getattr(parameters, name))
                parameters.ClearField(name)


# ---------------------------------------------------------------------------------------------
# The net to measure on
# ---------------------------------------------------------------------------------------------

def working_definition(layers: Sequence[Any], inputs: Sequence[Input], name: str = "") -> Any:
    """Return the net to measure on: `layers` (see `image_layers`) behind Input layers.

    Every output carries loss weight 1, which makes Caffe propagate the gradient that we put there;
    every parameter learns (lr_mult 1), because gradients of fixed layers count too.  Scale layers
    do not work in place: going backward, they would overwrite what another pass needs.
    """
    working = caffe_messages().NetParameter(name=name)
    for blob, shape in inputs:
        layer = working.layer.add(name=blob, type="Input", top=[blob])
        layer.input_param.shape.add(dim=shape)
    working.layer.extend(layers)
    for layer in working.layer:
        _clear_training_fields(layer)
    _scale_apart(working.layer, [blob for blob, _ in inputs])
    for name in output_blobs(working.layer):
        writer = [layer for layer in working.layer if name in layer.top][-1]
        writer.loss_weight[:] = [float(top == name) for top in writer.top]
    return working


def image_layers(definition: Any, batch_size: Optional[int],
                 size: Optional[Sequence[int]] = None) -> Tuple[List[Any], Optional[Input]]:
    """Return the layers of the TRAIN phase without losses, accuracies and last softmaxes, as the
    definition has them, and the image input.

    With `batch_size` (0 for the definition's own) images will be fed: the net's own data layers are
    left out, too, and `size` (height, width) is that of the images where nothing else tells it.
    Without, the data layers are kept and the second value is None.
    Raises ValueError where no or more than one image input would have to be fed, where a layer
    needs more than the images, and where no layer is left.
    """
    layers = training_layers(definition)
    image = None
    if batch_size is not None:
        image, sources = _image_input(layers, batch_size, size)
        layers = [layer for layer in layers if layer not in sources]
    elif any(layer.type == "Input" for layer in layers):
        raise ValueError("the definition has no data layer of its own: give images with --data")
    _check_bottoms(layers, definition)
    kept = _without_scores(layers, {image.blob} if image else set())
    if not output_blobs(kept):
        raise ValueError("no layer of the definition computes anything but losses and scores")
    return kept, image


def training_layers(definition: Any) -> List[Any]:
    """Return the layers of the TRAIN phase, with the data layers of any where it has none."""
    state = caffe_messages().NetState()
    state.CopyFrom(definition.state)
    state.phase, state.level = caffe_messages().TRAIN, 0  # the level that pycaffe gives a net
    layers = [layer for layer in definition.layer if _included(layer, state)]
    if not any(is_source(layer) for layer in layers):
        layers = [layer for layer in definition.layer
                  if _included(layer, state) or is_source(layer)]
    return layers


def output_blobs(layers: Iterable[Any]) -> List[str]:
    """Return the blobs that layers compute from other blobs and nothing reads, in order."""
    unread: Dict[str, None] = {}
    for layer in layers:
        for bottom in layer.bottom:
            unread.pop(bottom, None)
        if layer.bottom:
            unread.update(dict.fromkeys(layer.top))
    return list(unread)


def is_source(layer: Any) -> bool:
    """Return whether a layer feeds data into the net: it reads no blob and has no weights."""
    return not layer.bottom and layer.type != "Parameter"


def fixed_batch(layers: Iterable[Any]) -> Optional[str]:
    """Return the first layer whose parameters write out how many images a batch has, or None."""
    for layer in layers:
        shape = layer.reshape_param.shape.dim
        if layer.type == "Reshape" and layer.reshape_param.axis == 0 and shape and shape[0] > 0:
            return str(layer.name)
        if layer.type in GENERATORS:
            return str(layer.name)
    return None


def separable(layers: Iterable[Any]) -> bool:
    """Return whether the images of a batch never meet, so that it may be computed in parts."""
    return all(layer.type in BY_IMAGE and not _works_on_batch(layer) for layer in layers)


def _works_on_batch(layer: Any) -> bool:
    """Return whether a layer of BY_IMAGE works along the first axis, that of images."""
    if layer.type == "Reshape":
        shape = layer.reshape_param.shape.dim
        return layer.reshape_param.axis == 0 and bool(shape) and shape[0] != 0
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


def _scale_apart(layers: Sequence[Any], fed: Sequence[str]) -> None:
    """Let Scale layers that work in place read a blob of their own; what they write keeps its
    name, and so does a blob that is fed."""
    taken = blob_and_layer_names(layers)
    for position, layer in enumerate(layers):
        if layer.type != "Scale" or layer.bottom[0] not in layer.top:
            continue
        before, after = layers[:position], layers[position:]
        unscaled = unused(layer.bottom[0] + "_unscaled", taken)
        if layer.bottom[0] in fed:
            below = layer.bottom[0]
            rename_blob(after, below, unscaled)
            layer.bottom[0] = below
        else:
            rename_blob(before, layer.bottom[0], unscaled)
            layer.bottom[0] = unscaled


def rename_blob(layers: Iterable[Any], old: str, new: str) -> None:
    """Give a blob another name in all layers that read or write it."""
    for layer in layers:
        for names in (layer.bottom, layer.top):
            names[:] = [new if name == old else name for name in names]


def blob_and_layer_names(layers: Iterable[Any]) -> Set[str]:
    """Return the names of layers and blobs."""
    return {name for layer in layers for name in (layer.name, *layer.bottom, *layer.top)}


def unused(name: str, taken: Set[str]) -> str:
    """Return `name`, with a number behind it where it is taken, and add it to `taken`."""
    number = 0
    free = name
    while free in taken:
        number += 1
        free = "%s_%d" % (name, number)
    taken.add(free)
    return free


def _clear_training_fields(layer: Any) -> None:
    """Drop what only matters in training: phases, rates, loss weights, and slow random fillers."""
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


def _check_bottoms(layers: Iterable[Any], definition: Any) -> None:
    """Raise ValueError where a layer wants a blob that no layer of any phase makes: a misspelling.

    Scores may: deploy definitions have no labels.
    """
    computed = {top for layer in definition.layer for top in layer.top}
    for layer in layers:
        for bottom in layer.bottom:
            if bottom not in computed and not _is_score(layer):
                raise ValueError("layer '%s': no layer makes its bottom '%s'"
                                 % (layer.name, bottom))


def _without_scores(layers: List[Any], fed: Set[str]) -> List[Any]:
    """Return the layers that are neither scores nor work on blobs that only cut layers make.

    Raises ValueError where a layer mixes the two kinds of blobs.
    """
    kept: List[Any] = []
    computed = set(fed)
    for layer in layers:
        missing = [bottom for bottom in layer.bottom if bottom not in computed]
        if _is_score(layer) or (missing and len(missing) == len(layer.bottom)):
            continue
        if missing and layer.type == "Python" and not any(
                _read_by_kept_layers(top, layers) for top in layer.top):
            continue  # it measures something against labels
        if missing:
            raise ValueError("layer '%s': images alone do not give its bottom '%s'"
                             % (layer.name, missing[0]))
        kept.append(layer)
        computed.update(layer.top)
    while True:
        ends = set(output_blobs(kept))
        last = [layer for layer in kept if layer.type in LAST_ONLY and set(layer.top) <= ends]
        if not last:
            return kept
        kept = [layer for layer in kept if layer not in last]


def _is_score(layer: Any) -> bool:
    return (layer.type.endswith("Loss") or layer.type in SCORES
            or (layer.type == "Python" and any(layer.loss_weight)))


def _included(layer: Any, state: Any) -> bool:
    """Apply Caffe's rule: no exclude matches, and one include matches where there is any."""
    if layer.include:
        return any(_matches(rule, state) for rule in layer.include)
    return not any(_matches(rule, state) for rule in layer.exclude)


def _matches(rule: Any, state: Any) -> bool:
    """Return whether a rule holds in a state of phase, level and stages."""
    return ((not rule.HasField("phase") or rule.phase == state.phase)
            and (not rule.HasField("min_level") or rule.min_level <= state.level)
            and (not rule.HasField("max_level") or rule.max_level >= state.level)
            and set(rule.stage) <= set(state.stage)
            and not set(rule.not_stage) & set(state.stage))


# ---------------------------------------------------------------------------------------------
# The image input
# ---------------------------------------------------------------------------------------------

def _image_input(layers: List[Any], batch_size: int,
                 size: Optional[Sequence[int]]) -> Tuple[Input, List[Any]]:
    """Return the one blob to feed images to, and the source layers that go: all but generators
    that other layers read."""
    sources = [layer for layer in layers if is_source(layer)]
    inputs: List[Input] = []
    unfit: List[Input] = []
    for layer in sources:
        if layer.type == "ContinuationIndicator":
            continue
        for number, top in enumerate(layer.top if layer.type == "Input" else layer.top[:1]):
            shape = _source_shape(layer, number, size)
            if len(shape) == 4 and shape[1] in (1, 3):
                inputs.append(Input(top, tuple(shape)))
            elif layer.type == "Input" and _read_by_kept_layers(top, layers):
                unfit.append(Input(top, tuple(shape)))
    if len(inputs) != 1 or unfit:
        raise ValueError("images need exactly one input blob with 1 or 3 channels, this net has %s"
                         % (", ".join("'%s' %s" % (blob, list(shape))
                                      for blob, shape in inputs + unfit) or "none"))
    replaced = [layer for layer in sources if layer.type not in GENERATORS
                or inputs[0].blob in layer.top
                or not any(_read_by_kept_layers(top, layers) for top in layer.top)]
    image = inputs[0]
    return image._replace(shape=(batch_size or image.shape[0],) + image.shape[1:]), replaced


def _read_by_kept_layers(blob: str, layers: List[Any]) -> bool:
    return any(blob in layer.bottom and not _is_score(layer) for layer in layers)


def _source_shape(layer: Any, number: int, size: Optional[Sequence[int]]) -> List[int]:
    """Return the shape of a source layer's top; Caffe is asked only if the definition and `size`
    do not tell it."""
    if layer.type in ("Input", "DummyData"):
        return _declared_shape(layer, number)
    if layer.type == "MemoryData":
        parameters = layer.memory_data_param
        return [parameters.batch_size, parameters.channels, parameters.height, parameters.width]
    crop = layer.transform_param.crop_size
    grey = len(layer.transform_param.mean_value) == 1 or layer.transform_param.force_gray or (
        layer.type == "ImageData" and not layer.image_data_param.is_color)
    images = [layer.data_param.batch_size or layer.image_data_param.batch_size or 1,
              1 if grey else 3]
    if size is not None:
        return images + list(size)
    if crop:
        return images + [crop, crop]
    if layer.type == "ImageData" and layer.image_data_param.new_height:
        return images + [layer.image_data_param.new_height, layer.image_data_param.new_width]
    lone = caffe_messages().NetParameter()
    lone.layer.add().CopyFrom(layer)
    _clear_training_fields(lone.layer[0])
    try:
        check_types(lone)
        check_databases(lone)
    except ValueError as error:
        raise ValueError("%s; only the size of its images is wanted from it: give it with --size "
                         "HEIGHT WIDTH, or a deploy definition with an Input layer"
                         % error) from error
    return list(build_net(lone).blobs[layer.top[0]].shape)


def _declared_shape(layer: Any, number: int) -> List[int]:
    """Return the shape of a top that the definition tells, once for all tops or for each."""
    parameters = layer.input_param if layer.type == "Input" else layer.dummy_data_param
    shapes = [list(shape.dim) for shape in parameters.shape]
    if layer.type == "DummyData" and not shapes:
        shapes = [list(shape) for shape in zip(parameters.num, parameters.channels,
                                               parameters.height, parameters.width)]
    if len(shapes) not in (1, len(layer.top)):
        raise ValueError("layer '%s': it gives %d shapes for %d tops"
                         % (layer.name, len(shapes), len(layer.top)))
    return shapes[number if len(shapes) > 1 else 0]


# ---------------------------------------------------------------------------------------------
# Building
# ---------------------------------------------------------------------------------------------

def build_net(definition: Any, phase: Optional[int] = None) -> Any:
    """Return a caffe.Net of `definition`, in the TEST phase (dropout off, stored statistics on)
    unless told otherwise.

    Raises ValueError for what can be checked first; Caffe aborts on the rest.
    """
    check_types(definition)
    check_databases(definition)
    caffe = import_caffe()
    with tempfile.NamedTemporaryFile("w", suffix=".prototxt") as file:
        file.write(text_format.MessageToString(definition))
        file.flush()
        return caffe.Net(file.name, caffe.TEST if phase is None else phase)


def check_types(definition: Any) -> None:
    """Raise ValueError naming the first layer that this Caffe cannot make.

    Its type is unknown, its Python class is missing, or no layer before it makes its bottom.  This
    imports the Python modules that the definition names, as Caffe is about to do.
    """
    known = set(import_caffe().layer_type_list())
    computed: Set[str] = set()
    for layer in definition.layer:
        if layer.type not in known:
            raise ValueError("layer '%s': this Caffe has no layer type '%s'"
                             % (layer.name, layer.type))
        if layer.type == "Python":
            _check_python(layer)
        missing = [bottom for bottom in layer.bottom if bottom not in computed]
        if missing:
            raise ValueError("layer '%s': no layer before it makes its bottom '%s'"
                             % (layer.name, missing[0]))
        computed.update(layer.top)


def _check_python(layer: Any) -> None:
    """Raise ValueError where a Python layer's class cannot be had: Caffe would not say which."""
    module, name = layer.python_param.module, layer.python_param.layer
    try:
        getattr(importlib.import_module(module), name)
    except Exception as error:  # the module is the user's: it may fail in any way
        raise ValueError("layer '%s': no Python layer '%s' in module '%s' (%s)"
                         % (layer.name, name, module, error)) from error


def check_databases(definition: Any) -> None:
    """Raise ValueError naming the first data layer whose database or list is not there."""
    for layer in definition.layer:
        if layer.type in DATABASES:
            source = getattr(layer, DATABASES[layer.type]).source
            if not os.path.exists(source):
                raise ValueError("layer '%s': its source %s is not there (relative paths count "
                                 "from %s)" % (layer.name, source or "''", os.getcwd()))
