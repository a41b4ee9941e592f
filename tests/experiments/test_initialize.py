"""The initializations of tables 1 and 2: what fillers draw, and how magic_init is asked."""
import os

import numpy as np
import pytest
import tiny_net
from tiny_net import stored_weights

import initialize
import magic_init
from ddinit.images import read_image
from ddinit.prototxt import build_net, read_definition
from training import starts

NONE, CALIBRATED = ["--no-within"], ["--calibrate"]


def filled(tmp_path, method, seed=0):
    """What a method draws for the tiny net: conv1 (4, 3, 8, 8), fc2 (6, 196), fc3 (10, 6)."""
    path = str(tmp_path / ("%s.caffemodel" % method))
    starts.write_filled(tiny_net.write(tmp_path / "tiny.prototxt"), path, method, seed)
    return stored_weights(path)


@pytest.fixture
def asked(monkeypatch):
    """The command lines that magic_init was called with."""
    calls = []

    def main(command):
        calls.append(command)
        data = command[command.index("--data") + 1]
        calls.append(sorted(os.listdir(data)) if os.path.isdir(data) else data)
        return 0
    monkeypatch.setattr(magic_init, "main", main)
    return calls


# ---------------------------------------------------------------------------------------------
# Fillers
# ---------------------------------------------------------------------------------------------

def test_gaussian_weights_have_std_001_and_no_biases(tmp_path):
    for weight, bias in filled(tmp_path, "gaussian").values():
        assert weight.std() == pytest.approx(0.01, rel=5 / np.sqrt(weight.size))
        assert (bias == 0).all()


def test_xavier_weights_are_uniform_with_variance_1_over_fan_in(tmp_path):
    for weight, _ in filled(tmp_path, "xavier").values():
        bound = np.sqrt(3 / weight[0].size)
        assert 0.9 * bound < np.abs(weight).max() <= bound * (1 + 1e-6)
        assert weight.var() == pytest.approx(1 / weight[0].size, rel=4 / np.sqrt(weight.size))


def test_msra_weights_have_variance_2_over_fan_in_in_convolutions_only(tmp_path):
    drawn = filled(tmp_path, "msra")
    assert drawn["conv1"][0].std() == pytest.approx(np.sqrt(2 / 192), rel=0.1)
    assert drawn["fc2"][0].std() == pytest.approx(0.01, rel=0.1)


def test_reference_weights_are_the_definitions_own_fillers(tmp_path):
    text = tiny_net.DEFINITION.replace(
        'num_output: 6 weight_filler { type: "xavier" }',
        'num_output: 6 weight_filler { type: "gaussian" std: 3 } bias_filler { value: 7 }')
    (tmp_path / "own.prototxt").write_text(text)
    starts.write_filled(str(tmp_path / "own.prototxt"), str(tmp_path / "own"), "reference", 0)
    weight, bias = stored_weights(str(tmp_path / "own"))["fc2"]
    assert weight.std() == pytest.approx(3, rel=0.1)
    assert (bias == 7).all()


def test_reference_without_a_filler_is_an_error_that_names_the_layer(tmp_path):
    text = tiny_net.DEFINITION.replace('num_output: 6 weight_filler { type: "xavier" }',
                                       "num_output: 6")
    (tmp_path / "bare.prototxt").write_text(text)
    with pytest.raises(ValueError, match="layer 'fc2'"):
        starts.write_filled(str(tmp_path / "bare.prototxt"), str(tmp_path / "bare"),
                                "reference", 0)


def test_the_seed_decides_what_is_drawn(tmp_path):
    first, again, other = (filled(tmp_path, "gaussian", seed)["fc2"][0] for seed in (1, 1, 2))
    assert (first == again).all() and (first != other).any()


# ---------------------------------------------------------------------------------------------
# Ours, and scalings
# ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("method, kind", [
    ("ours-gaussian", "gaussian"), ("ours-pca", "pca"), ("ours-kmeans", "kmeans")])
@pytest.mark.parametrize("scaling, flags", [
    ("none", NONE), ("within", []), ("between", NONE + CALIBRATED), ("both", CALIBRATED)])
def test_magic_init_is_asked_for_weights_and_scalings(tmp_path, asked, method, kind, scaling,
                                                      flags):
    output = str(tmp_path / "out.caffemodel")
    assert initialize.main(["net.prototxt", output, "--method", method, "--scaling", scaling,
                            "--data", "photos/*.jpg", "--images", "20", "--seed", "3"]) == 0
    assert asked[0] == ["net.prototxt", output, "--data", "photos/*.jpg", "--batch-size", "10",
                        "--batches", "2", "--seed", "3", "--type", kind, *flags]


def test_equation_2_to_the_letter_is_asked_of_magic_init(tmp_path, asked):
    initialize.main(["net.prototxt", str(tmp_path / "out"), "--method", "ours-pca", "--literal",
                     "--data", "photos"])
    assert asked[0][-4:] == ["--type", "pca", "--calibrate", "--literal"]


def test_the_scale_of_outputs_is_asked_of_magic_init(tmp_path, asked):
    initialize.main(["net.prototxt", str(tmp_path / "out"), "--method", "ours-pca", "--output-std",
                     "0.03", "--data", "photos"])
    assert asked[0][-5:] == ["--type", "pca", "--calibrate", "--output-std", "0.03"]


def test_gaussian_weights_are_scaled_as_ours(tmp_path, asked):
    for method in ("gaussian", "ours-gaussian"):
        initialize.main(["net.prototxt", str(tmp_path / "out"), "--method", method, "--scaling",
                         "between", "--data", "photos"])
    assert asked[0] == asked[2]


def test_ours_are_scaled_both_ways_unless_told(tmp_path, asked):
    initialize.main(["net.prototxt", str(tmp_path / "out"), "--method", "ours-pca",
                     "--data", "photos"])
    assert asked[0][-3:] == ["--type", "pca", "--calibrate"]


def test_fillers_are_scaled_between_layers_as_loaded_weights(tmp_path, asked):
    output = str(tmp_path / "out")
    assert initialize.main([tiny_net.write(tmp_path / "tiny.prototxt"), output, "--method",
                            "xavier", "--scaling", "between", "--data", "photos", "--cpu"]) == 0
    assert asked[0][-3] == "--load" and asked[0][-1] == "--calibrate"
    assert "--cpu" in asked[0] and "--type" not in asked[0]


@pytest.mark.parametrize("scaling", ["within", "both"])
def test_fillers_are_not_scaled_within_layers(tmp_path, capsys, scaling):
    assert initialize.main(["net.prototxt", str(tmp_path / "out"), "--method", "msra", "--scaling",
                            scaling, "--data", "photos"]) == 2
    assert "cannot be scaled within layers" in capsys.readouterr().err


def test_images_are_drawn_from_the_training_split_by_the_seed(tmp_path, voc_folder, asked):
    for seed in (0, 0, 1):
        initialize.main(["net.prototxt", str(tmp_path / "out"), "--method", "ours-pca",
                         "--voc", voc_folder, "--images", "6", "--seed", str(seed)])
    first, again, other = asked[1::2]
    assert first == again != other
    assert len(first) == 6 and set(first) <= {"%06d.jpg" % number for number in range(1, 13)}


def test_too_few_images_are_an_error_with_their_number(tmp_path, voc_folder, capsys):
    assert initialize.main(["net.prototxt", str(tmp_path / "out"), "--method", "ours-pca",
                            "--voc", voc_folder, "--images", "13"]) == 2
    assert "there are only 12 training images, not 13" in capsys.readouterr().err


def test_outputs_of_an_initialized_net_have_mean_beta_and_unit_variance(tmp_path, voc_folder):
    definition = tiny_net.write(tmp_path / "tiny.prototxt")
    output = str(tmp_path / "out.caffemodel")
    assert initialize.main([definition, output, "--method", "ours-pca", "--scaling", "within",
                            "--voc", voc_folder, "--images", "12", "--cpu"]) == 0
    net = build_net(read_definition(definition))
    net.copy_from(output)
    images = [read_image("%s/JPEGImages/%06d.jpg" % (voc_folder, number), 32, 32)
              for number in range(1, 13)]
    net.blobs["data"].reshape(12, 3, 32, 32)
    net.blobs["data"].data[...] = np.stack(images) - np.reshape([104.0, 117, 123], (3, 1, 1))
    net.forward(end="conv1")
    assert net.blobs["conv1"].data.std((0, 2, 3)) == pytest.approx(np.ones(4), abs=0.02)
    assert net.blobs["conv1"].data.mean((0, 2, 3)) == pytest.approx(np.full(4, 0.1), abs=0.02)
