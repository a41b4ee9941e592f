"""tables/: the paper's numbers, ours and their differences, and how rates are chosen."""
import csv
import json
import os

import numpy as np
import pytest
import scipy.io
import yaml

import make_tiny
import workflow
from detection import proposals
from tables import report
from tables.cells import TABLES, Places, Run
from tables.configuration import read_configuration
from voc.folders import Voc

KMEANS = Run("classification", "caffenet", "ours-kmeans", "both")
XAVIER = Run("classification", "caffenet", "xavier", "none")


@pytest.fixture
def config(tmp_path):
    """A configuration file whose output folder is empty."""
    with open(os.path.join(os.path.dirname(report.SCHEMA), "tiny.yaml")) as file:
        content = yaml.safe_load(file)
    content["output"] = str(tmp_path / "runs")
    content["pretrained"]["agrawal"]["weights"] = "nowhere/agrawal.caffemodel"
    content["classification"].update(seeds=[0, 1, 2], learning_rates={
        "SGD": [0.001, 0.01], "Adam": [0.001]})
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


def places_of(config):
    return Places(read_configuration([config], report.SCHEMA))


def scored(precision, area=None):
    """A result of classify_voc.py or detect_voc.py."""
    return {"mAP_11_points": precision, "mAP_area": precision if area is None else area}


def put(config, run, seed, result):
    path = places_of(config).result(run, seed)
    os.makedirs(os.path.dirname(path))
    with open(path, "w") as file:
        json.dump(result, file)


def choose(config, run, rate):
    with open(places_of(config).chosen(run), "w") as file:
        file.write(rate + "\n")


def made(config, tmp_path, name):
    """The Markdown of a table, and the rows of its CSV by (row, column)."""
    out = tmp_path / "out"
    assert workflow.main(["tables", name, "--config", config, "--out", str(out)]) == 0
    with open(str(out / (name + ".csv")), newline="") as file:
        rows = {(row["row"], row["column"]): row for row in csv.DictReader(file)}
    return (out / (name + ".md")).read_text(), rows


def test_the_papers_tables_are_complete():
    assert {name: len(table.cells) for name, table in TABLES.items()} == {
        "table1": 24, "table2": 12, "table3": 16, "architectures": 4}
    table1 = TABLES["table1"]
    assert table1.cell("both (ours)", "SGD + BN, k-means").paper == 60.0
    assert table1.cell("between-layer (ours)", "Adam + BN, Gaussian").paper == 54.5
    assert table1.cell("within-layer (ours)", "Adam, k-means") is None
    assert TABLES["table2"].cell("MSRA", "Detection").paper == 37.2
    assert TABLES["table3"].cell("Ours + Doersch et al. (2015)", "Classification").paper == 65.3


def test_the_same_run_in_several_tables_is_one_run():
    both = TABLES["table1"].cell("both (ours)", "SGD, k-means").run
    assert both == KMEANS
    assert both == TABLES["table2"].cell("Ours (k-means)", "Classification").run
    assert both == TABLES["table3"].cell("Ours (k-means)", "Classification").run


def test_the_chosen_learning_rate_is_shown_with_mean_and_standard_error(config, tmp_path):
    for seed, precision in enumerate((0.55, 0.56, 0.60)):  # mean 57, s = 2.6458, s / sqrt(3)
        put(config, KMEANS, seed, scored(precision, precision + 0.01))
    choose(config, KMEANS, "0.001")
    markdown, rows = made(config, tmp_path, "table2")
    assert ("| Ours (k-means) | 56.6 / 57.0 ± 1.5 (+0.4) 11 points, 58.0 ± 1.5 (+1.4) area "
            "| 45.6 / not run |") in markdown
    row = rows["Ours (k-means)", "Classification"]
    assert row["learning_rate"] == "0.001" and row["seeds"] == "3"
    assert float(row["standard_error_11_points"]) == pytest.approx(1.5275, abs=1e-4)
    assert float(row["difference_11_points"]) == pytest.approx(0.4)
    assert float(row["difference_area"]) == pytest.approx(1.4)


def test_a_cell_with_part_of_its_seeds_says_so(config, tmp_path):
    put(config, KMEANS, 1, scored(0.5))
    markdown, rows = made(config, tmp_path, "table2")
    assert "56.6 / 50.0 (-6.6) 11 points, 50.0 (-6.6) area [1 of 3 seeds]" in markdown
    assert rows["Ours (k-means)", "Classification"]["standard_error_area"] == ""


def test_seeds_that_diverged_are_told(config, tmp_path):
    put(config, KMEANS, 0, scored(0.5))
    put(config, KMEANS, 1, {"diverged": 17})
    for seed in range(3):
        put(config, XAVIER, seed, {"diverged": 3})
    markdown, rows = made(config, tmp_path, "table2")
    assert rows["Ours (k-means)", "Classification"]["ours_area"] == "50.0"
    assert "50.0 (-6.6) area [2 of 3 seeds, 1 of 3 seeds diverged]" in markdown
    assert "| Xavier | 51.1 / diverged | 40.4 / not run |" in markdown


def test_the_only_learning_rate_needs_no_choice_and_nets_may_have_rates_of_their_own(config):
    places = places_of(config)
    adam = KMEANS._replace(solver="Adam")
    assert places.rate(adam) == "0.001" and places.rate(KMEANS) is None
    places.config["classification"]["learning_rates"]["nets"] = {"vgg16": [0.0005]}
    assert places.rates(KMEANS._replace(net="vgg16")) == ["0.0005"]
    assert places.rates(KMEANS) == ["0.001", "0.01"]


# ---------------------------------------------------------------------------------------------
# How learning rates are chosen
# ---------------------------------------------------------------------------------------------

@pytest.fixture
def choice(tmp_path):
    """choice(**results) chooses among rates by their results; returns status and what it wrote."""
    def run(**given):
        words = []
        for rate, result in given.items():
            path = tmp_path / (rate + ".json")
            path.write_text(json.dumps(result))
            words.append("%s=%s" % (rate.replace("r", "0."), path))
        out = tmp_path / "rate.txt"
        status = workflow.main(["choose-rate", str(out), *words])
        return status, out.read_text() if out.exists() else None
    return run


def test_the_rate_that_did_best_is_chosen(choice):
    assert choice(r1=scored(0.2), r01=scored(0.3, 0.1), r001=scored(0.25)) == (0, "0.01\n")
    assert choice(r1={"diverged": 9}, r01=scored(0.1)) == (0, "0.01\n")
    assert choice(r1={"diverged": 9}, r01={"diverged": 10}) == (0, "0.01\n")


def test_a_result_without_a_precision_is_named(choice, capsys):
    status, written = choice(r1=scored(0.2), r01={})
    assert (status, written) == (2, None)
    assert "r01.json: the result has no mAP_11_points" in capsys.readouterr().err


def test_the_images_held_back_are_those_of_val(tmp_path):
    make_tiny.write_voc(str(tmp_path / "VOC"), np.random.default_rng(0))
    whole, out = Voc(str(tmp_path / "VOC")), tmp_path / "held_back"
    boxes = {image: np.array([[number + 1, 2, number + 30, 40]], np.float64)
             for number, image in enumerate(whole.images("trainval"))}
    cells = np.empty(len(boxes), object)
    cells[:] = list(boxes.values())
    scipy.io.savemat(str(tmp_path / "all.mat"), {"boxes": cells})
    command = ["hold-back", str(tmp_path / "VOC"), str(out)]
    assert workflow.main([*command, "--proposals", str(tmp_path / "all.mat")]) == 0
    assert workflow.main(command) == 0  # again
    held_back = Voc(str(out))
    for split, source in (("trainval", "train"), ("test", "val")):
        images = held_back.images(split)
        assert images == whole.images(source) and held_back.classes == whole.classes
        np.testing.assert_array_equal(held_back.labels(split), whole.labels(source))
        assert os.path.samefile(held_back.image_path(images[0]), whole.image_path(images[0]))
        assert held_back.objects(images[0]).boxes.tolist() == whole.objects(
            images[0]).boxes.tolist()
        for image, rows in zip(images, proposals.read_mat(str(out / (split + ".mat")), images)):
            np.testing.assert_array_equal(rows, boxes[image][:, [1, 0, 3, 2]] - 1)
    assert not set(held_back.images("trainval")) & set(held_back.images("test"))


def test_rows_of_missing_pretrained_models_name_the_file(config, tmp_path):
    markdown, rows = made(config, tmp_path, "table3")
    assert "| Agrawal et al. (2015) | 52.9 / not run | 41.8 / not run |" in markdown
    assert rows["Agrawal et al. (2015)", "Detection"]["note"] == (
        "not run: nowhere/agrawal.caffemodel is missing")


def test_cells_that_the_paper_leaves_out_are_dashes(config, tmp_path):
    markdown, rows = made(config, tmp_path, "table1")
    assert "| within-layer (ours) | 47.6 / not run | 41.2 / not run | - | - | - | - |" in markdown
    assert ("within-layer (ours)", "Adam, Gaussian") not in rows


@pytest.mark.parametrize("text, message", [
    ("a: [", "the file is not YAML"), ("- 1", "not a configuration"),
    ("output: x", "is a required property")])
def test_a_broken_configuration_is_one_line(tmp_path, capsys, text, message):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    assert workflow.main(["tables", "table1", "--config", str(path), "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert str(path) in error and message in error and error.count("\n") == 1


# ---------------------------------------------------------------------------------------------
# Samples
# ---------------------------------------------------------------------------------------------

@pytest.fixture
def images(tmp_path):
    """A list of ten image files with labels."""
    for number in range(10):
        (tmp_path / ("%d.jpg" % number)).write_text(str(number))
    (tmp_path / "list.txt").write_text("".join("%d.jpg %d\n" % (number, number % 2)
                                               for number in range(10)))
    return tmp_path


def test_samples_share_no_image_and_depend_on_the_seed(images, tmp_path):
    command = ["sample", "--list", str(images / "list.txt"), "--root", str(images)]
    for name, seed in (("a", "0"), ("again", "0"), ("other", "1")):
        folder, listed = str(tmp_path / name), str(tmp_path / (name + ".txt"))
        assert workflow.main([*command, "--count", "3", "4", "--seed", seed, "--out", folder,
                              listed]) == 0
    linked = {os.path.realpath(str(tmp_path / "a" / name)) for name in os.listdir(tmp_path / "a")}
    listed = (tmp_path / "a.txt").read_text().split()
    assert len(linked) == 3 and len(set(listed)) == 4 and not linked & set(listed)
    assert os.listdir(tmp_path / "a") == os.listdir(tmp_path / "again")
    assert (tmp_path / "other.txt").read_text() != (tmp_path / "a.txt").read_text()


def test_too_few_images_are_one_line(images, tmp_path, capsys):
    assert workflow.main(["sample", "--list", str(images / "list.txt"), "--count", "11", "--out",
                          str(tmp_path / "out")]) == 2
    assert "there are only 10 images to draw 11 from" in capsys.readouterr().err
