"""Figure 1's command: rates against gradients of finite differences, its files, its errors."""
import os

import cv2
import numpy as np
import pytest
import tiny_net

import figure1
from ddinit import caffemodel, processes, results
from ddinit.prototxt import build_net, read_definition
from training import starts

LAYERS = ["conv1", "fc2", "fc3"]
POWER = """layer { name: "scale2" type: "Power" bottom: "fc2_unscaled" top: "fc2"
  power_param { scale: 3 } }
"""


@pytest.fixture
def photos(tmp_path):
    """A pattern for seven images of noise."""
    rng = np.random.default_rng(5)
    for number in range(7):
        assert cv2.imwrite(str(tmp_path / ("%d.png" % number)),
                           rng.integers(0, 256, (32, 32, 3)).astype(np.uint8))
    return str(tmp_path / "*.png")


@pytest.fixture
def net(tmp_path):
    return tiny_net.write(tmp_path / "tiny.prototxt")


def filled(net, path, method="reference", seed=0):
    processes.in_child(starts.write_filled, net, str(path), method, seed)
    return str(path)


def run(tmp_path, *arguments):
    """The JSON that the command writes."""
    path = str(tmp_path / "out.json")
    assert figure1.main([*arguments, "--json", path, "--cpu"]) == 0
    return results.read_json(path)


# ---------------------------------------------------------------------------------------------
# Values
# ---------------------------------------------------------------------------------------------

def last_layer(net, weights, paths):
    """(mean of ||z||^2, mean of W^2 of fc3), z the input of the last layer."""
    built = build_net(read_definition(net))
    built.copy_from(weights)
    built.blobs["data"].reshape(1, 3, 32, 32)
    squares = []
    for path in paths:
        built.blobs["data"].data[0] = cv2.imread(path).transpose(2, 0, 1) - np.reshape(
            figure1.MEAN, (3, 1, 1))
        built.forward()
        squares.append(np.square(built.blobs["fc2"].data, dtype=np.float64).mean())
    return float(np.mean(squares)), float(np.square(built.params["fc3"][0].data).mean())


def test_the_last_layers_rate_is_that_of_its_inputs(tmp_path, net, photos):
    # g = eta z^T with eta ~ N(0, 1), so that C^2 = E[z^2] / E[W^2]: equation 2 by hand.
    weights = filled(net, tmp_path / "a.caffemodel")
    found = run(tmp_path, net, "a=" + weights, "-d", photos)
    paths = [str(tmp_path / ("%d.png" % number)) for number in range(7)]
    energy, square = processes.in_child(last_layer, net, weights, paths)
    assert found["images"] == 7
    assert found["initializations"][0]["rates"]["fc3"] == pytest.approx(
        np.sqrt(energy / square), rel=0.03)


def test_every_affine_layer_has_a_rate_and_a_variation(tmp_path, net, photos):
    one = run(tmp_path, net, "fillers=none", "-d", photos)["initializations"][0]
    assert list(one["rates"]) == list(one["variations"]) == LAYERS
    assert all(rate > 0 for rate in one["rates"].values())
    # Of few images a variation is estimated with so much noise that it may come out as 0.
    assert max(one["variations"].values()) > 0 and min(one["variations"].values()) >= 0
    assert one["spread"] == pytest.approx(max(one["rates"].values()) / min(one["rates"].values()))
    assert (one["name"], one["weights"]) == ("fillers", "none")


def test_none_measures_what_the_definitions_fillers_draw(tmp_path, net, photos):
    weights = filled(net, tmp_path / "a.caffemodel", seed=3)
    both = run(tmp_path, net, "drawn=none", "file=" + weights, "-d", photos, "--seed", "3")
    drawn, file = both["initializations"]
    assert drawn["rates"] == file["rates"] and drawn["variations"] == file["variations"]


def test_a_definition_beside_the_weights_is_theirs(tmp_path, net, photos):
    weights = filled(net, tmp_path / "a.caffemodel")
    before = run(tmp_path, net, "a=" + weights, "-d", photos)["initializations"][0]["rates"]
    # Not in place: Caffe's Power layer computes its gradient from the blob that it overwrites.
    text = tiny_net.DEFINITION.replace('top: "fc2"\n', 'top: "fc2_unscaled"\n', 1).replace(
        'layer { name: "relu2"', POWER + 'layer { name: "relu2"')
    beside = tmp_path / "a.prototxt"
    beside.write_text(text)  # without its mark it may be of any other weights
    assert run(tmp_path, net, "a=" + weights, "-d", photos)["initializations"][0]["rates"] == before
    beside.write_text(caffemodel.mark(weights) + text)
    after = run(tmp_path, net, "a=" + weights, "-d", photos)["initializations"][0]["rates"]
    # Backwards, everything below the new layer sees three times the gradient; fc3 three times z.
    for layer in LAYERS:
        assert after[layer] == pytest.approx(3 * before[layer], rel=0.02)


def test_images_are_drawn_by_the_seed(tmp_path, net, photos):
    weights = filled(net, tmp_path / "a.caffemodel")
    command = (net, "a=" + weights, "-d", photos, "--images", "3", "--seed")
    first, again, other = (run(tmp_path, *command, seed) for seed in ("1", "1", "2"))
    assert first["images"] == 3
    assert first["initializations"] == again["initializations"] != other["initializations"]


# ---------------------------------------------------------------------------------------------
# Output and errors
# ---------------------------------------------------------------------------------------------

def test_table_and_figure_show_every_initialization(tmp_path, net, photos, capsys):
    weights = filled(net, tmp_path / "a.caffemodel")
    figure = str(tmp_path / "figure1.png")
    assert figure1.main([net, "k = 3=" + "none", "a=" + weights, "-d", photos, "--figure", figure,
                         "--cpu"]) == 2  # the name ends at the first '='
    assert figure1.main([net, "fillers=none", "a=" + weights, "-d", photos, "--figure", figure,
                         "--cpu"]) == 0
    rates, variations = capsys.readouterr().out.split("\n\n")
    for part, title in ((rates, "change rate"), (variations, "coefficient of variation")):
        lines = part.splitlines()
        assert lines[0] == title and lines[1].split() == ["layer", "fillers", "a"]
        assert [line.split()[0] for line in lines[2:5]] == LAYERS
    assert rates.splitlines()[-1].startswith("max / min")
    assert cv2.imread(figure).shape[1] > cv2.imread(figure).shape[0] > 300


def error(capsys, *arguments):
    assert figure1.main([*arguments, "--cpu"]) == 2
    return capsys.readouterr().err


def test_what_is_wrong_is_said_in_a_line(tmp_path, net, photos, capsys):
    other = filled(net, tmp_path / "other.caffemodel")
    bare = tmp_path / "bare.prototxt"
    bare.write_text(tiny_net.DEFINITION.replace("num_output: 6", "num_output: 7"))
    assert "'fc2'" in error(capsys, str(bare), "a=" + other, "-d", photos)
    bare.write_text(tiny_net.DEFINITION.replace('"fc3"', '"fc4"'))
    assert "no weights for layer 'fc4'" in error(capsys, str(bare), "a=" + other, "-d",
                                                           photos)
    bare.write_text(tiny_net.DEFINITION.replace('6 weight_filler { type: "xavier" }', "6"))
    assert "'fc2'" in error(capsys, str(bare), "a=none", "-d", photos)
    assert "no images" in error(capsys, net, "a=none", "-d", str(tmp_path / "*.gif"))
    assert "missing.caffemodel" in error(
        capsys, net, "a=" + str(tmp_path / "missing.caffemodel"), "-d", photos)
    assert "the same name" in error(capsys, net, "a=none", "a=none", "-d", photos)
    assert "no/such" in error(capsys, net, "a=none", "-d", photos, "--json", "/no/such/out.json")


def test_a_label_without_weights_is_a_usage_error(net, capsys):
    with pytest.raises(SystemExit) as ended:
        figure1.main([net, "kmeans.caffemodel", "-d", os.devnull])
    assert ended.value.code == 2
    assert "'kmeans.caffemodel' is not NAME=WEIGHTS" in capsys.readouterr().err
