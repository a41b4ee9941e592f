"""VOC classification: the nets that are derived, and both commands from end to end."""
import json
import os

import cv2
import numpy as np
import pytest
import tiny_net
from google.protobuf import text_format
from tiny_net import stored_weights

import classify_voc
import generate
from classification import nets
from classification.images import CropsToScore, VocImages
from ddinit.prototxt import Input, build_net, caffe_messages, output_blobs, read_definition
from training import batches, run_folder
from training.batches import Crops
from voc import average_precision
from voc.folders import Voc

MODELS = os.path.dirname(os.path.abspath(generate.__file__))


def derived(model, classes=20):
    path = os.path.join(MODELS, model + ".prototxt")
    return nets.classifier(read_definition(path), 10, classes)


def command(folder, start, *options):
    definition = tiny_net.write(folder.parent / "tiny.prototxt")
    return ["train", definition, str(start), str(folder), "--batch-size", "4", "--workers", "0",
            "--cpu", *map(str, options)]


def trained(folder, *options, start="none", iterations=2):
    """Train the tiny net as the command does, in this process; return the exit status."""
    arguments = command(folder, start, "--iterations", iterations, *options)
    return classify_voc.run_training(classify_voc.parse(arguments), None)


# ---------------------------------------------------------------------------------------------
# Nets
# ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("model", ["caffenet/deploy", "caffenet/train_val", "caffenet_bn/deploy"])
def test_the_last_layer_gets_a_new_name_and_an_output_for_each_class(model):
    net = derived(model)
    assert net.layer == "fc8_voc" and net.layers[-1].name == "fc8_voc"
    assert net.layers[-1].inner_product_param.num_output == 20
    assert net.layers[-1].inner_product_param.weight_filler.std == pytest.approx(0.01)
    assert net.image.shape == (10, 3, 227, 227)
    assert [layer.name for layer in net.layers][:3][-1] in ("relu1", "pool1", "conv1/scale")


def test_a_deploy_and_a_train_val_definition_give_the_same_net():
    assert derived("caffenet/deploy").layers == derived("caffenet/train_val").layers


def test_a_net_with_intermediate_losses_keeps_its_last_output_only():
    net = derived("googlenet/train_val")
    names = [layer.name for layer in net.layers]
    assert net.layer == "loss3/classifier_voc"
    assert not [name for name in names if name.startswith(("loss1", "loss2"))]
    assert output_blobs(net.layers) == [net.scores]
    assert names[:-1] == [layer.name for layer in derived("googlenet_single/deploy").layers[:-1]]


def test_a_convolution_can_be_the_last_layer():
    net = nets.classifier(text_format.Parse("""
layer { name: "in" type: "Input" top: "in" input_param { shape { dim: 1 dim: 3 dim: 8 dim: 8 } } }
layer { name: "conv" type: "Convolution" bottom: "in" top: "conv"
  convolution_param { num_output: 9 kernel_size: 1 group: 3 } }
layer { name: "pool" type: "Pooling" bottom: "conv" top: "pool"
  pooling_param { pool: AVE global_pooling: true } }
""", caffe_messages().NetParameter()), 2, 5)
    caffe_net = build_net(nets.test_net(net))
    assert caffe_net.blobs[net.scores].data.shape == (2, 5, 1, 1)


def test_batch_normalization_trains_on_the_batchs_own_statistics():
    definition = text_format.Parse(tiny_net.DEFINITION.replace("Dropout", "BatchNorm").replace(
        "dropout_param { dropout_ratio: 0.5 }", "batch_norm_param { use_global_stats: true }"),
        caffe_messages().NetParameter())
    net = nets.classifier(definition, 2, 5)
    source = caffe_messages().LayerParameter(top=["data", "label"])
    (layer,) = [layer for layer in nets.training_net(net, source).layer
                if layer.type == "BatchNorm"]
    assert not layer.batch_norm_param.HasField("use_global_stats")


def test_the_loss_is_the_sum_over_classes_and_mean_over_images_without_ignored_labels():
    rng = np.random.default_rng(0)
    scores = rng.normal(0, 3, (4, 3)).astype(np.float32)
    labels = np.array([[1, 0, -1], [0, 0, 1], [-1, -1, -1], [1, 1, 0]], np.float32)
    messages = caffe_messages()
    net = nets.Classifier([], Input("scores", (4, 3)), "scores", "fc")
    source = text_format.Parse("""name: "in" type: "Input" top: "scores" top: "label"
input_param { shape { dim: 4 dim: 3 } }""", messages.LayerParameter())
    caffe_net = build_net(nets.training_net(net, source))
    caffe_net.blobs["scores"].data[...] = scores
    caffe_net.blobs["label"].data[...] = labels
    caffe_net.forward()
    each = np.log1p(np.exp(-np.where(labels == 1, scores, -scores)))
    assert caffe_net.blobs["loss"].data == pytest.approx(each[labels >= 0].sum() / 4, rel=1e-5)


def test_layers_from_one_on_are_those_behind_it_in_the_definition():
    net = derived("caffenet/deploy")
    assert nets.layers_from(net, "drop7") == ["drop7", "fc8_voc"]
    with pytest.raises(ValueError, match="no layer 'fc9'; it has conv1, relu1"):
        nets.layers_from(net, "fc9")


def test_adam_is_that_of_the_authors_evaluation():
    arguments = classify_voc.parse(["train", "net", "none", "out", "--voc", "voc", "--solver",
                                    "Adam"])
    solver = classify_voc.solver_parameters(arguments)
    assert [solver.momentum, solver.momentum2] == pytest.approx([0.9, 0.99])


def test_the_solver_is_the_papers():
    arguments = classify_voc.parse(["train", "net", "none", "out", "--voc", "voc"])
    solver = classify_voc.solver_parameters(arguments)
    assert (arguments.iterations, arguments.batch_size) == (80000, 10)
    assert (solver.type, solver.lr_policy, solver.stepsize) == ("SGD", "step", 10000)
    assert [solver.base_lr, solver.gamma, solver.momentum, solver.weight_decay,
            solver.clip_gradients] == pytest.approx([0.001, 0.5, 0.9, 1e-6, 10])


# ---------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------

def test_training_learns_what_the_images_show(tmp_path, voc_folder):
    voc = Voc(voc_folder)
    for split in ("trainval", "test"):
        for image, flags in zip(voc.images(split), voc.labels(split)):
            pixels = np.zeros((40, 40, 3), np.uint8)
            pixels[..., :2] = 200 * (flags == 1)  # a colour for each class
            cv2.imwrite(voc.image_path(image), pixels)
    assert trained(tmp_path / "run", "--voc", voc_folder, iterations=150) == 0
    losses = [row["loss"] for row in run_folder.read_table(str(tmp_path / "run" / "log.csv"))]
    assert np.mean(losses[-30:]) < 0.7 * np.mean(losses[:10])
    assert scored(tmp_path / "run", voc_folder) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["mAP_11_points"] == result["mAP_area"] == 1


def test_layers_of_the_weights_are_kept_but_the_last_and_those_from_random_from(tmp_path,
                                                                                voc_folder):
    standing = ("--voc", voc_folder, "--lr", 1e-12)
    first = tmp_path / "first.caffemodel"
    net = build_net(read_definition(tiny_net.write(tmp_path / "t.prototxt")))
    net.params["conv1"][0].data[...] = 0.01
    net.params["fc2"][0].data[...] = 0.02
    net.save(str(first))
    assert trained(tmp_path / "all", *standing, start=first) == 0
    assert trained(tmp_path / "half", *standing, "--random-from", "drop1", start=first) == 0
    kept, half = (stored_weights(tmp_path / run / "final.caffemodel") for run in ("all", "half"))
    assert set(kept) == {"conv1", "fc2", "fc3_voc"} and kept["fc3_voc"][0].shape == (2, 6)
    assert kept["conv1"][0] == pytest.approx(0.01) and kept["fc2"][0] == pytest.approx(0.02)
    assert half["conv1"][0] == pytest.approx(0.01) and half["fc2"][0].std() > 0.01
    record = json.loads((tmp_path / "half" / "run.json").read_text())["repeat"]
    assert record["random_from"] == "drop1" and record["classes"] == ["disc", "square"]


def test_weights_trained_here_go_on_with_their_last_layer(tmp_path, voc_folder):
    assert trained(tmp_path / "first", "--voc", voc_folder, iterations=3) == 0
    start = tmp_path / "first" / "final.caffemodel"
    assert trained(tmp_path / "next", "--voc", voc_folder, "--lr", 1e-12, start=start) == 0
    assert stored_weights(tmp_path / "next" / "final.caffemodel")["fc3_voc"][0] == pytest.approx(
        stored_weights(start)["fc3_voc"][0])


@pytest.mark.parametrize("options, complaint", [
    (["--lr", "1e20"], "In iteration 2 the loss is"),
    (["--random-from", "fc9"], "no layer 'fc9'"),
    (["--voc", "elsewhere"], "elsewhere: not a VOC folder"),
])
def test_errors_are_one_line_and_status_2(tmp_path, voc_folder, capsys, options, complaint):
    assert classify_voc.main(command(tmp_path / "run", "none", "--voc", voc_folder,
                                     *options)) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith("classify_voc.py: error: ") and complaint in said[-1]
    assert not any("Traceback" in line for line in said)


def test_broken_images_are_named_and_too_many_stop_with_one_line(tmp_path, voc_folder, capsys):
    for number in range(1, 12):
        with open("%s/JPEGImages/%06d.jpg" % (voc_folder, number), "wb") as file:
            file.write(b"no image")
    assert classify_voc.main(command(tmp_path / "run", "none", "--voc", voc_folder)) == 2
    said = capsys.readouterr().err.splitlines()
    assert "broken" in said[-1] and "image 0000" in said[-1]


@pytest.mark.parametrize("options", [
    ["--iterations", "0"], ["--lr", "-1"], ["--lr", "nan"], ["--batch-size", "x"],
    ["--seed", "-1"], ["--solver", "Newton"], ["--cpu", "--gpu", "0"]])
def test_absurd_numbers_are_usage_errors(options, capsys):
    with pytest.raises(SystemExit) as stopped:
        classify_voc.main(["train", "net", "none", "out", "--voc", "voc", *options])
    assert stopped.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


# ---------------------------------------------------------------------------------------------
# Testing
# ---------------------------------------------------------------------------------------------

def scored(folder, voc_folder, *options):
    """Score the tiny net with the command; return the exit status."""
    return classify_voc.main(["test", str(folder.parent / "tiny.prototxt"),
                              str(folder / "final.caffemodel"), "--voc", voc_folder, "--workers",
                              "0", "--cpu", "--out", str(folder / "result.json"),
                              *map(str, options)])


def test_scores_are_averaged_over_crops_and_reported_by_class(tmp_path, voc_folder):
    assert trained(tmp_path / "run", "--voc", voc_folder, iterations=20) == 0
    assert scored(tmp_path / "run", voc_folder, "--crops", 3, "--seed", 7) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    expected = _scored_by_hand(tmp_path, voc_folder, 3, 7)
    assert list(result["AP_11_points"].values()) == pytest.approx(expected.eleven_point.tolist())
    assert list(result["AP_area"].values()) == pytest.approx(expected.area.tolist())
    assert list(result["AP_11_points"]) == ["disc", "square"]
    assert result["mAP_11_points"] == pytest.approx(expected.mean_eleven_point)
    assert result["mAP_area"] == pytest.approx(expected.mean_area)
    assert (result["crops"], result["seed"], result["images"], result["skipped"]) == (3, 7, 8, [])
    assert result["counts"]["square"] == {"present": 5, "difficult": 0, "absent": 3}
    assert result["counts"]["disc"] == {"present": 5, "difficult": 1, "absent": 2}


def _scored_by_hand(tmp_path, voc_folder, crops, seed):
    net = build_net(read_definition(str(tmp_path / "tiny.prototxt")))
    trained_weights = stored_weights(tmp_path / "run" / "final.caffemodel")
    for name in ("conv1", "fc2"):
        for blob, values in zip(net.params[name], trained_weights[name]):
            blob.data[...] = values
    dataset = VocImages(voc_folder, "test")
    batch_of = CropsToScore(dataset, Crops(32, 32), crops, seed)
    scores = []
    for image in range(8):
        net.blobs["data"].reshape(crops, 3, 32, 32)
        net.blobs["data"].data[...] = batch_of(image).arrays[0]
        net.forward()
        weight, bias = trained_weights["fc3_voc"]
        scores.append((net.blobs["fc2"].data @ weight.T + bias).mean(0))
    return average_precision.classification_ap(np.array(scores), Voc(voc_folder).labels("test"))


def test_a_broken_test_image_is_left_out_and_listed(tmp_path, voc_folder, capfd):
    assert trained(tmp_path / "run", "--voc", voc_folder) == 0
    os.unlink(voc_folder + "/JPEGImages/000015.jpg")
    assert scored(tmp_path / "run", voc_folder) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["images"], result["skipped"]) == (7, ["000015"])
    assert "skipped: %s/JPEGImages/000015.jpg: the image does not exist" % voc_folder in (
        capfd.readouterr().err)


def test_weights_without_the_trained_layer_are_an_error_that_names_it(tmp_path, voc_folder,
                                                                      capsys):
    (tmp_path / "run").mkdir()
    net = build_net(read_definition(tiny_net.write(tmp_path / "tiny.prototxt")))
    net.save(str(tmp_path / "run" / "final.caffemodel"))
    assert scored(tmp_path / "run", voc_folder) == 2
    assert "has no layer 'fc3_voc'" in capsys.readouterr().err


def test_an_image_is_shown_as_it_is_decoded(tmp_path):
    image = np.arange(5 * 4 * 3, dtype=np.uint8).reshape(5, 4, 3)
    encoded = cv2.imencode(".png", image)[1].tobytes()
    assert (batches.decoded(encoded, "a") == image).all()
    with pytest.raises(ValueError, match="a is not an image"):
        batches.decoded(b"", "a")
