"""Every dialect of definition reads as Caffe itself reads it; what cannot be read is one line."""
import subprocess
import sys

import pytest

from ddinit.processes import ChildDied, in_child
from ddinit.prototxt import (
    build_net,
    caffe_messages,
    check_databases,
    check_types,
    fixed_batch,
    image_layers,
    import_caffe,
    output_blobs,
    read_definition,
    upgrade,
    working_definition,
    write_definition,
)

INPUT = 'layer { name: "data" type: "Input" top: "data" input_param { shape { %s } } }' % (
    "dim: 2 dim: 3 dim: 8 dim: 8")
CONV = ('layer { name: "%s" type: "Convolution" bottom: "%s" top: "%s" '
        'convolution_param { num_output: 4 kernel_size: 3 } }')
V1 = '''name: "old" input: "data" input_dim: 1 input_dim: 3 input_dim: 12 input_dim: 12
layers { name: "conv" type: CONVOLUTION bottom: "data" top: "conv" blobs_lr: 1 blobs_lr: 2
  weight_decay: 1 weight_decay: 0 param: "shared" blob_share_mode: PERMISSIVE
  convolution_param { num_output: 4 kernel_size: 3 group: 1
                      weight_filler { type: "gaussian" std: 0.01 } } }
layers { name: "relu" type: RELU bottom: "conv" top: "conv" relu_param { negative_slope: 0.1 } }
layers { name: "norm" type: LRN bottom: "conv" top: "norm" lrn_param { local_size: 3 } }
layers { name: "drop" type: DROPOUT bottom: "norm" top: "norm"
         dropout_param { dropout_ratio: 0.3 } }
layers { name: "absent" type: SIGMOID bottom: "norm" top: "absent" include { phase: TRAIN } }
layers { name: "fc" type: INNER_PRODUCT bottom: "norm" top: "fc"
         inner_product_param { num_output: 3 } exclude { phase: TRAIN } }
layers { name: "prob" type: SOFTMAX bottom: "fc" top: "prob" }'''


def write(folder, text, name="net.prototxt"):
    path = folder / name
    path.write_text(text)
    return str(path)


def read(folder, *layers):
    return read_definition(write(folder, "\n".join(layers)))


def names(layers):
    return [layer.name for layer in layers]


def messages():
    return caffe_messages()


def working_of(definition, batch_size, size=None):
    """The net to measure on with images fed to it, and their input."""
    layers, image = image_layers(definition, batch_size, size)
    return working_definition(layers, [image]), image


def saved_by_caffe(path, folder):
    """Layers of the net as Caffe read them (its splits left out) and the shapes of its blobs."""
    caffe = import_caffe()
    net = caffe.Net(path, caffe.TEST)
    net.save(folder + "/saved.caffemodel")
    saved = messages().NetParameter()
    with open(folder + "/saved.caffemodel", "rb") as file:
        saved.ParseFromString(file.read())
    layers = []
    for layer in saved.layer:
        del layer.blobs[:]
        if layer.type not in ("Split", "Input"):
            layers.append(str(layer))
    return layers, {name: tuple(blob.shape) for name, blob in net.blobs.items()}


def both_saved_by_caffe(first, second, folder):
    return saved_by_caffe(first, folder), saved_by_caffe(second, folder)


# ---------------------------------------------------------------------------------------------
# Reading and upgrading
# ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text", [
    V1,
    'input: "data" input: "more" input_shape { dim: 2 dim: 3 dim: 8 dim: 8 } '
    'input_shape { dim: 2 dim: 3 }' + CONV % ("c", "data", "c")
    + 'layer { name: "quiet" type: "Silence" bottom: "more" }',
    INPUT + CONV % ("c", "data", "c")
    + 'layer { name: "n" type: "BatchNorm" bottom: "c" top: "n" param { lr_mult: 1 } '
      'param { lr_mult: 1 decay_mult: 2 } param { lr_mult: 0 } }'
    + 'layer { name: "m" type: "BatchNorm" bottom: "n" top: "m" param { lr_mult: 0 } }',
], ids=["V1", "legacy inputs", "BatchNorm"])
def test_upgraded_definition_is_what_caffe_makes_of_the_original(tmp_path, text):
    original = write(tmp_path, text)
    upgraded = str(tmp_path / "upgraded.prototxt")
    write_definition(read_definition(original), upgraded)
    with open(upgraded) as file:
        assert "layers {" not in file.read()
    theirs, ours = both_saved_by_caffe(original, upgraded, str(tmp_path))
    assert ours == theirs
    assert theirs[0]


def test_every_v1_type_is_a_layer_type_of_this_caffe():
    types = messages().V1LayerParameter.DESCRIPTOR.fields_by_name["type"].enum_type
    known = set(import_caffe().layer_type_list())
    upgraded = {}
    for name, number in types.values_by_name.items():
        if name == "NONE":
            continue
        old = messages().NetParameter()
        old.layers.add(name="x", type=number.number, bottom=["a"], top=["b"])
        upgraded[name] = upgrade(old).layer[0].type
    assert set(upgraded.values()) <= known
    assert len(set(upgraded.values())) == len(upgraded) >= 39


def test_v1_data_layers_keep_their_transformation_and_v2_ones_are_left_alone():
    old = messages().NetParameter()
    layer = old.layers.add(name="d", type=messages().V1LayerParameter.IMAGE_DATA, top=["data"])
    layer.image_data_param.source = "list.txt"
    layer.image_data_param.crop_size = 227
    layer.image_data_param.mirror = True
    layer.image_data_param.scale = 0.5
    layer.image_data_param.mean_file = "mean.binaryproto"
    new = upgrade(old).layer[0]
    assert (new.transform_param.crop_size, new.transform_param.mirror) == (227, True)
    assert (new.transform_param.scale, new.transform_param.mean_file) == (0.5, "mean.binaryproto")
    assert not new.image_data_param.HasField("crop_size")
    current = messages().NetParameter()  # Caffe ignores the old place in a `layer`
    current.layer.add(name="d", type="Data", top=["data"]).data_param.crop_size = 7
    assert not upgrade(current).layer[0].HasField("transform_param")


def test_upgrade_leaves_its_argument_alone(tmp_path):
    definition = read(tmp_path, V1)
    before = definition.SerializeToString()
    upgrade(definition)
    working_of(definition, 2)
    assert definition.SerializeToString() == before


@pytest.mark.parametrize("text, message", [
    ("layer {", "line 1:"),
    ('layer { nome: "x" }', 'has no field named "nome"'),
    ('layer { name: "x" type: "ReLU" relu_param { negative_slope: "a" } }', "line 1:"),
    ("", "the definition has no layers"),
    ("name: 'lonely'", "the definition has no layers"),
    ('input: "a" input: "b" input_dim: 1 input_dim: 3 input_dim: 8 input_dim: 8 ' + INPUT,
     "2 inputs and 1 shapes"),
    ('input: "a" input_dim: 1 input_dim: 3 input_dim: 8 ' + INPUT, "4 input_dim"),
    ('input: "a"' + INPUT, "1 inputs and 0 shapes"),
    ('layers { name: "x" bottom: "data" }', "layer 'x': the old definition gives it no type"),
    ('layers { layer { name: "x" type: "relu" } bottom: "data" }', "upgrade_net_proto_text"),
    ('layers { name: "x" type: RELU } layer { name: "y" type: "ReLU" }', "mixes"),
], ids=["cut short", "unknown field", "wrong value", "empty file", "no layers", "few shapes",
        "three dimensions", "no shape", "no type", "V0", "mixed"])
def test_unreadable_definition_is_one_line_that_names_the_file(tmp_path, text, message):
    path = write(tmp_path, text)
    with pytest.raises(ValueError) as error:
        read_definition(path)
    assert str(error.value).startswith(path + ": ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_folder_or_binary_definition_is_one_line(tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x80" * 9)
    (tmp_path / "picture").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)))
    for path, message in ((tmp_path / "none", "No such file"), (tmp_path, "Is a directory"),
                          (tmp_path / "binary", "not a net definition"),
                          (tmp_path / "picture", "not a net definition")):
        with pytest.raises(ValueError) as error:
            read_definition(str(path))
        assert str(error.value).startswith(str(path) + ": ")
        assert message in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be-bom", "gbk",
                                      "latin-1", "cr lf"])
def test_definitions_of_any_encoding_are_read(tmp_path, encoding):
    comment = {"gbk": "# \u8fd9\u662f\u6d4b\u8bd5\n", "latin-1": "# Gr\u00f6\u00dfe\n"}.get(
        encoding, "# \u00f6 \u6d4b\n")
    text = comment + INPUT + CONV % ("c", "data", "c")
    content = {"utf-16-be-bom": b"\xfe\xff" + text.encode("utf-16-be"),
               "cr lf": text.replace("\n", "\r\n").encode()}
    path = tmp_path / "net.prototxt"
    path.write_bytes(content[encoding] if encoding in content else text.encode(encoding))
    assert names(read_definition(str(path)).layer) == ["data", "c"]


# ---------------------------------------------------------------------------------------------
# Solvers
# ---------------------------------------------------------------------------------------------

NET = INPUT + CONV % ("c", "data", "c")


@pytest.mark.parametrize("solver", [
    "net: 'net.prototxt'", "net: 'models/of/another/computer/net.prototxt'",
    "train_net: 'net.prototxt' test_net: 'gone' test_iter: 1",
    "net_param { %s }" % NET, "train_net_param { %s } net: 'gone'" % NET,
    "base_lr: 0.1 type: 'Adam' net: 'net.prototxt'",
], ids=["beside", "elsewhere", "train_net", "inside", "inside to train", "with options"])
def test_a_solvers_net_is_read_in_its_place(tmp_path, solver):
    write(tmp_path, NET)
    path = write(tmp_path, solver, "solver.prototxt")
    assert names(read_definition(path).layer) == ["data", "c"]


def test_a_solvers_net_may_be_relative_to_where_the_command_runs(tmp_path, monkeypatch):
    (tmp_path / "solvers").mkdir()
    path = write(tmp_path / "solvers", "net: 'nets/net.prototxt'", "solver.prototxt")
    with pytest.raises(ValueError, match="its net nets/net.prototxt is not there"):
        read_definition(path)
    (tmp_path / "nets").mkdir()
    write(tmp_path / "nets", NET)
    monkeypatch.chdir(tmp_path)
    assert names(read_definition(path).layer) == ["data", "c"]


def test_a_solver_that_names_a_solver_or_none_is_one_line(tmp_path):
    for text, message in (("base_lr: 0.1", "it names no net"), ("net: 'gone'", "is not there"),
                          ("net: 'net.prototxt'", "is not there"),  # itself
                          ("net_param { layer { nome: 'x' } }", "not a net definition")):
        with pytest.raises(ValueError) as error:
            read_definition(write(tmp_path, text))
        assert message in str(error.value) and "net.prototxt" in str(error.value)


# ---------------------------------------------------------------------------------------------
# The net to measure on
# ---------------------------------------------------------------------------------------------

TRAIN_DATA = ('layer { name: "train" type: "Data" top: "data" top: "label" '
              'include { phase: TRAIN } data_param { source: "a" batch_size: 64 } '
              'transform_param { crop_size: 8 } }')
TEST_DATA = TRAIN_DATA.replace("train", "test").replace("TRAIN", "TEST")
LOSS = 'layer { name: "%s" type: "SoftmaxWithLoss" bottom: "%s" bottom: "label" top: "%s" }'
ACCURACY = ('layer { name: "accuracy" type: "Accuracy" bottom: "c" bottom: "label" '
            'top: "accuracy" include { phase: TEST } }')


def test_train_val_becomes_what_images_can_be_fed_to(tmp_path):
    definition = read(tmp_path, TRAIN_DATA, TEST_DATA, CONV % ("c", "data", "c"),
                      LOSS % ("loss", "c", "loss"), ACCURACY)
    working, image = working_of(definition, 5)
    assert image == ("data", (5, 3, 8, 8))
    assert names(working.layer) == ["data", "c"]
    assert list(working.layer[0].input_param.shape[0].dim) == [5, 3, 8, 8]
    assert list(working.layer[1].loss_weight) == [1.0]


def test_without_images_the_net_feeds_itself_as_in_training(tmp_path):
    definition = read(tmp_path, TRAIN_DATA, TEST_DATA, CONV % ("c", "data", "c"),
                      LOSS % ("loss", "c", "loss"), ACCURACY)
    layers, image = image_layers(definition, None)
    assert image is None
    assert names(layers) == ["train", "c"]
    assert layers[0].data_param.batch_size == 64
    with pytest.raises(ValueError, match="give images with --data"):
        image_layers(read(tmp_path, INPUT, CONV % ("c", "data", "c")), None)


def test_data_layers_of_the_test_phase_alone_still_feed(tmp_path):
    definition = read(tmp_path, TEST_DATA, CONV % ("c", "data", "c"))
    assert names(image_layers(definition, None)[0]) == ["test", "c"]


def test_every_output_carries_a_loss_and_softmaxes_at_the_end_are_cut(tmp_path):
    relu = 'layer { name: "relu" type: "ReLU" bottom: "a" top: "a" }'
    softmax = 'layer { name: "%s" type: "Softmax" bottom: "%s" top: "%s" }'
    slices = 'layer { name: "s" type: "Slice" bottom: "a" top: "s1" top: "s2" }'
    definition = read(tmp_path, INPUT, CONV % ("a", "data", "a"), relu, slices,
                      CONV % ("b", "s2", "b"), softmax % ("attention", "b", "attention"),
                      CONV % ("d", "attention", "d"), softmax % ("p", "d", "p"),
                      'layer { name: "best" type: "ArgMax" bottom: "p" top: "best" }')
    working, image = working_of(definition, 1)
    assert image == ("data", (1, 3, 8, 8))
    assert names(working.layer) == ["data", "a", "relu", "s", "b", "attention", "d"]
    assert output_blobs(working.layer) == ["s1", "d"]
    assert {layer.name: list(layer.loss_weight) for layer in working.layer
            if layer.loss_weight} == {"s": [1.0, 0.0], "d": [1.0]}


def test_in_place_layers_do_not_read_away_an_output(tmp_path):
    relu = 'layer { name: "relu" type: "ReLU" bottom: "b" top: "b" }'
    definition = read(tmp_path, INPUT, CONV % ("a", "data", "a"), CONV % ("b", "a", "b"), relu,
                      'layer { name: "pool" type: "Pooling" bottom: "a" top: "pool" '
                      'pooling_param { kernel_size: 2 } }')
    assert output_blobs(definition.layer) == ["b", "pool"]
    working, _ = working_of(definition, 2)
    assert sorted(outputs_of_net(str(working))) == ["b", "pool"]


def test_scale_layers_in_place_read_a_blob_of_their_own_and_what_others_read_keeps_its_name(
        tmp_path):
    one = 'layer { name: "%s" type: "%s" bottom: "%s" top: "%s" }'
    definition = read(tmp_path, INPUT, one % ("s", "Scale", "data", "data"),
                      CONV % ("a", "data", "a"), one % ("n", "BatchNorm", "a", "a"),
                      one % ("s1", "Scale", "a", "a"), one % ("relu", "ReLU", "a", "a"),
                      one % ("s2", "Scale", "a", "a"), one % ("s3", "Scale", "a", "b"))
    working, image = working_of(definition, 2)
    assert image == ("data", (2, 3, 8, 8))
    assert [(layer.name, list(layer.bottom), list(layer.top)) for layer in working.layer] == [
        ("data", [], ["data"]), ("s", ["data"], ["data_unscaled"]),
        ("a", ["data_unscaled"], ["a_unscaled"]), ("n", ["a_unscaled"], ["a_unscaled"]),
        ("s1", ["a_unscaled"], ["a_unscaled_1"]), ("relu", ["a_unscaled_1"], ["a_unscaled_1"]),
        ("s2", ["a_unscaled_1"], ["a"]), ("s3", ["a"], ["b"])]
    assert outputs_of_net(str(working)) == ["b"]


def outputs_of_net(text):
    return list(build_net(parsed(text)).outputs)


def parsed(text):
    from google.protobuf import text_format
    return text_format.Parse(text, messages().NetParameter())


def test_what_matters_in_training_only_is_dropped(tmp_path):
    definition = read(tmp_path, INPUT, '''
      layer { name: "c" type: "Convolution" bottom: "data" top: "c" phase: TRAIN loss_weight: 3
              propagate_down: false param { lr_mult: 0 name: "w" } param { lr_mult: 2 }
              convolution_param { num_output: 4 kernel_size: 3 weight_filler { type: "xavier" }
                                  bias_filler { type: "constant" value: 1 } } }
      layer { name: "n" type: "BatchNorm" bottom: "c" top: "n" param { lr_mult: 0 } }''')
    working, _ = working_of(definition, 2)
    conv = working.layer[1]
    assert [conv.param[0].lr_mult, conv.param[1].lr_mult, conv.param[0].name] == [1, 1, "w"]
    assert not conv.HasField("phase")
    assert not conv.loss_weight
    assert not conv.propagate_down
    assert not conv.convolution_param.HasField("weight_filler")
    assert conv.convolution_param.bias_filler.value == 1
    assert outputs_of_net(str(working)) == ["n"]  # BatchNorm refuses lr_mult 1


@pytest.mark.parametrize("rule, kept", [
    ("include { phase: TRAIN }", True), ("include { phase: TEST }", False),
    ("exclude { phase: TRAIN }", False), ("exclude { phase: TEST }", True),
    ("include { phase: TEST } include { phase: TRAIN }", True),
    ("include { phase: TRAIN stage: 'mine' }", True), ("include { stage: 'other' }", False),
    ("include { not_stage: 'mine' }", False), ("include { not_stage: 'other' }", True),
    ("include { min_level: 1 }", False), ("include { max_level: 0 }", True),
    ("phase: TEST", True),  # says how the layer computes, not whether it is there
])
def test_phases_levels_and_stages_are_caffes(tmp_path, rule, kept):
    optional = (CONV % ("b", "data", "b")).replace("bottom", rule + " bottom", 1)
    definition = read(tmp_path, 'state { stage: "mine" }', INPUT, CONV % ("a", "data", "a"),
                      optional)
    working, _ = working_of(definition, 1)
    assert ("b" in names(working.layer)) == kept


def test_labels_are_dropped_with_what_only_they_feed(tmp_path):
    definition = read(
        tmp_path, TRAIN_DATA, 'layer { name: "half" type: "Power" bottom: "label" top: "half" }',
        CONV % ("c", "data", "c"), LOSS.replace('"label"', '"half"') % ("loss", "c", "loss"))
    assert names(working_of(definition, 1)[0].layer) == ["data", "c"]


@pytest.mark.parametrize("layers, message", [
    ([INPUT.replace("dim: 3", "dim: 7"), CONV % ("c", "data", "c")],
     "this net has 'data' [2, 7, 8, 8]"),
    ([CONV % ("c", "data", "c")], "this net has none"),
    ([INPUT, INPUT.replace('"data"', '"two"'), CONV % ("c", "two", "c"),
      CONV % ("d", "data", "d")],
     "this net has 'data' [2, 3, 8, 8], 'two' [2, 3, 8, 8]"),
    ([INPUT.replace('top: "data"', 'top: "data" top: "index"')
      .replace("} } }", "} shape { dim: 2 } } }"), CONV % ("c", "data", "c"),
      'layer { name: "b" type: "BatchReindex" bottom: "c" bottom: "index" top: "b" }'],
     "this net has 'data' [2, 3, 8, 8], 'index' [2]"),
    ([TRAIN_DATA, CONV % ("c", "data", "c"),
      'layer { name: "b" type: "BatchReindex" bottom: "c" bottom: "label" top: "b" }'],
     "layer 'b': images alone do not give its bottom 'label'"),
    (['layer { name: "data" type: "Input" top: "data" }', CONV % ("c", "data", "c")],
     "layer 'data': it gives 0 shapes for 1 tops"),
    ([INPUT, 'layer { name: "loss" type: "SoftmaxWithLoss" bottom: "data" bottom: "data" }'],
     "no layer of the definition computes anything"),
], ids=["seven channels", "no source", "two images", "second top", "mixed with labels",
        "no shape", "no net"])
def test_nets_that_images_cannot_feed_are_refused(tmp_path, layers, message):
    with pytest.raises(ValueError) as error:
        image_layers(read(tmp_path, *layers), 2)
    assert message in str(error.value)


@pytest.mark.parametrize("source, shape", [
    ('"ImageData" image_data_param { source: "x" new_height: 9 new_width: 7 }', (2, 3, 9, 7)),
    ('"ImageData" image_data_param { source: "x" is_color: false } '
     'transform_param { crop_size: 6 }', (2, 1, 6, 6)),
    ('"MemoryData" memory_data_param { batch_size: 4 channels: 1 height: 5 width: 6 }',
     (2, 1, 5, 6)),
    ('"DummyData" dummy_data_param { shape { dim: 4 dim: 3 dim: 5 dim: 6 } }', (2, 3, 5, 6)),
    ('"DummyData" dummy_data_param { num: 4 channels: 3 height: 5 width: 6 }', (2, 3, 5, 6)),
], ids=["ImageData", "grey ImageData", "MemoryData", "DummyData", "legacy DummyData"])
def test_sources_tell_the_size_of_the_images_they_would_feed(tmp_path, source, shape):
    definition = read(tmp_path, 'layer { name: "data" top: "data" type: %s }' % source,
                      CONV % ("c", "data", "c"))
    assert image_layers(definition, 2)[1] == ("data", shape)


@pytest.mark.parametrize("source, shape", [
    ('"Data" data_param { source: "x" batch_size: 7 }', (7, 3, 12, 14)),
    ('"ImageData" image_data_param { source: "x" is_color: false }', (1, 1, 12, 14)),
    ('"Data" data_param { source: "x" } transform_param { mean_value: 1 }', (1, 1, 12, 14)),
    ('"Python" python_param { module: "absent" layer: "Own" }', (1, 3, 12, 14)),
    ('"Private" top: "label"', (1, 3, 12, 14)),
], ids=["database", "grey list", "grey mean", "Python", "private"])
def test_the_size_stands_in_where_a_source_is_not_there(tmp_path, source, shape):
    text = 'layer { name: "data" top: "data" type: %s }' % source + CONV % ("c", "data", "c")
    assert image_layers(read(tmp_path, text), 0, (12, 14))[1] == ("data", shape)
    with pytest.raises(ValueError, match="layer 'data': .*--size HEIGHT WIDTH"):
        image_layers(read(tmp_path, text), 0)


DUMMY = 'layer { name: "%s" type: "DummyData" top: "%s" dummy_data_param { shape { %s } } }'
RESHAPE = ('layer { name: "r" type: "Reshape" bottom: "c" top: "r" reshape_param { %s } }')


def test_made_blobs_stay_beside_images_where_something_reads_them(tmp_path):
    constant, unread = (DUMMY % (name, name, "dim: 2 dim: 4 dim: 6 dim: 6")
                        for name in ("constant", "unread"))
    definition = read(tmp_path, INPUT, constant, unread, CONV % ("c", "data", "c"),
                      'layer { name: "sum" type: "Eltwise" bottom: "c" bottom: "constant" '
                      'top: "sum" }')
    layers, image = image_layers(definition, 0)
    assert image == ("data", (2, 3, 8, 8))
    assert names(layers) == ["constant", "c", "sum"]
    assert fixed_batch(layers) == "constant"


@pytest.mark.parametrize("parameters, fixed", [
    ("shape { dim: 2 dim: -1 }", True), ("shape { dim: 0 dim: -1 }", False),
    ("shape { dim: -1 dim: 144 }", False), ("shape { dim: 2 dim: 72 } axis: 1", False),
    ("shape { dim: 1 } num_axes: 0", True)])
def test_reshape_layers_that_write_out_the_batch_are_found(tmp_path, parameters, fixed):
    layers = read(tmp_path, INPUT, CONV % ("c", "data", "c"), RESHAPE % parameters).layer
    assert fixed_batch(layers) == ("r" if fixed else None)
    assert fixed_batch(layers[:2]) is None


# ---------------------------------------------------------------------------------------------
# Building
# ---------------------------------------------------------------------------------------------

def shapes_of(text):
    return {name: tuple(blob.shape) for name, blob in build_net(parsed(text)).blobs.items()}


@pytest.mark.parametrize("layer, message", [
    ('name: "x" type: "Convolutoin"', "layer 'x': this Caffe has no layer type 'Convolutoin'"),
    ('name: "x" type: "ReLU" bottom: "dta"', "layer 'x': no layer before it makes its bottom"),
    ('name: "x" type: "Python" bottom: "data" python_param { module: "no_such" layer: "L" }',
     "layer 'x': no Python layer 'L' in module 'no_such'"),
    ('name: "x" type: "Python" bottom: "data" python_param { module: "json" layer: "L" }',
     "layer 'x': no Python layer 'L' in module 'json'"),
], ids=["type", "bottom", "module", "class"])
def test_what_caffe_would_abort_on_is_said_first(layer, message):
    with pytest.raises(ValueError) as error:
        check_types(parsed(INPUT + "layer { %s }" % layer))
    assert message in str(error.value)


@pytest.mark.parametrize("kind, parameters", [
    ("Data", "data_param"), ("ImageData", "image_data_param"), ("HDF5Data", "hdf5_data_param"),
    ("WindowData", "window_data_param")])
def test_a_database_or_list_that_is_not_there_is_named_before_caffe_looks(kind, parameters,
                                                                         tmp_path):
    text = "layer { name: 'shop' type: '%s' top: 'data' %s { source: '%s' batch_size: 2 } }"
    with pytest.raises(ValueError, match="layer 'shop': its source gone is not there .*from /"):
        build_net(parsed(text % (kind, parameters, "gone")))
    with pytest.raises(ValueError, match="layer 'shop': its source '' is not there"):
        build_net(parsed(text % (kind, parameters, "")))
    check_databases(parsed(text % (kind, parameters, tmp_path)))


def test_what_only_caffe_can_see_is_one_line_too():
    too_big = (CONV % ("c", "data", "c")).replace("kernel_size: 3", "kernel_size: 30 group: 5")
    with pytest.raises(ChildDied) as error:
        in_child(shapes_of, INPUT + too_big)
    assert "Caffe stopped: Check failed" in str(error.value)
    assert "\n" not in str(error.value)


def test_python_layers_run_and_losses_among_them_are_cut(tmp_path):
    (tmp_path / "doubling.py").write_text(
        "import caffe\n\nclass Doubling(caffe.Layer):\n"
        "    def setup(self, bottom, top):\n        pass\n\n"
        "    def reshape(self, bottom, top):\n        top[0].reshape(*bottom[0].shape)\n\n"
        "    def forward(self, bottom, top):\n        top[0].data[...] = 2 * bottom[0].data\n")
    python = ('layer { name: "%s" type: "Python" bottom: "c" %s top: "%s" '
              'python_param { module: "doubling" layer: "Doubling" } %s }')
    definition = read(tmp_path, INPUT, CONV % ("c", "data", "c"), python % ("twice", "", "twice",
                                                                            ""),
                      python % ("lossy", "", "lossy", "loss_weight: 1"))
    working, _ = working_of(definition, 2)
    assert names(working.layer) == ["data", "c", "twice"]
    sys.path.insert(0, str(tmp_path))
    try:
        assert shapes_of(str(working))["twice"] == (2, 4, 6, 6)
    finally:
        sys.path.remove(str(tmp_path))


def test_written_definition_reads_back_and_carries_its_comment(tmp_path):
    definition = read(tmp_path, INPUT, CONV % ("c", "data", "c"))
    path = str(tmp_path / "out.prototxt")
    write_definition(definition, path, "two\nlines")
    assert read_definition(path) == definition
    with open(path) as file:
        assert file.read().startswith("# two\n# lines\n")


def test_caffe_is_imported_without_scikit_image_until_its_io_is_used():
    code = ("import sys\nfrom ddinit.prototxt import import_caffe\n"
            "caffe = import_caffe()\n"
            "assert 'skimage' not in sys.modules\n"
            "import caffe.io\n"
            "print(caffe.io.datum_to_array(caffe.io.array_to_datum(__import__('numpy').ones("
            "(1, 2, 2), 'uint8'))).sum())\n"
            "assert 'skimage' in sys.modules\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout.strip(), done.returncode) == ("4", 0), done.stderr
