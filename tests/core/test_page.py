"""The page of a run: valid HTML that needs no other file and shows every layer."""
import base64
import html.parser
import os
import re
from xml.etree import ElementTree

import cv2
import numpy as np
import pytest
from initialized import AFFINE, DATA, TOY, bytes_of, run, write_images
from toy_nets import image_input, layer, working_net

import magic_init
from ddinit import page

VOID = {"meta", "img", "br", "link", "input", "hr"}

pytestmark = pytest.mark.usefixtures("in_process")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(str(tmp_path_factory.mktemp("images")), 8)


class Reader(html.parser.HTMLParser):
    """The elements of a page: it fails where tags are not closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.text, self.rows = [], [], "", []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def written(capsys, folder, images, definition, *options):
    """The page that a run on a definition writes, and what it left."""
    path = os.path.join(str(folder), "page.html")
    found = run(capsys, folder, definition, "-d", images, "-bs", "4", *options, "--report", path,
                report=False)
    assert found.status == 0, found.err
    with open(path, encoding="utf-8") as file:
        return file.read(), found


# ---------------------------------------------------------------------------------------------
# What a run writes
# ---------------------------------------------------------------------------------------------

def test_a_page_is_whole_html_that_refers_to_nothing_outside(capsys, tmp_path, images):
    text, _ = written(capsys, tmp_path, images, TOY, "-cs", "-t", "kmeans")
    assert text.startswith("<!DOCTYPE html>")
    read = Reader(text)
    assert read.elements[0] == ("html", {"lang": "en"})
    tags = {tag for tag, _ in read.elements}
    assert {"head", "title", "body", "svg", "table"} <= tags
    assert not tags & {"script", "link", "iframe", "object", "embed"}
    for _, attributes in read.elements:
        for name, value in attributes.items():
            if name in ("src", "href", "data", "action"):
                assert value.startswith("data:")
    assert not re.search(r"https?://|@import|url\(", text.replace(
        'xmlns="http://www.w3.org/2000/svg"', ""))
    for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ElementTree.fromstring(svg)


def test_a_page_holds_every_layer_and_what_was_measured(capsys, tmp_path, images):
    text, found = written(capsys, tmp_path, images, TOY, "-cs")
    read = Reader(text)
    heads, *rows = read.rows
    assert [row[0] for row in rows] == AFFINE
    table = {line.split()[0]: line.split() for line in found.out.splitlines()[1:5]}
    for row in rows:
        name, kind, weights, size, mean, std, before, after, _, variation = row
        told = table[name]
        assert (kind, weights) == ("InnerProduct" if "fc" in name else "Convolution", "gaussian")
        assert int(size.replace(",", "")) > 0
        assert (mean, std, variation) == (told[2], told[3], told[6])
        assert float(before.replace(",", "")) == pytest.approx(float(told[4]), rel=0.01)
        assert float(after.replace(",", "")) == pytest.approx(float(told[5]), rel=0.01)
    assert heads[0] == "layer" and "rate before" in heads and "rate after" in heads
    spread = re.search(r"([\d.e+]+) before, ([\d.e+]+) after$", found.out.strip().splitlines()[-1])
    assert spread.group(1) in read.text and spread.group(2) in read.text
    assert "-cs" in read.text and "Seed 0" in read.text and "caffe" in read.text
    for name in AFFINE:  # both plots name them, too
        assert read.text.count(name) >= 3


def test_plots_have_a_point_for_every_layer_before_and_after(capsys, tmp_path, images):
    text, _ = written(capsys, tmp_path, images, TOY, "-cs")
    plots = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(plots) == 2
    for plot in plots:
        root = ElementTree.fromstring(plot)
        _, _, width, height = map(float, root.get("viewBox").split())
        lines = root.findall("polyline")
        assert len(lines) == 2 and len({line.get("stroke") for line in lines}) == 2
        for line in lines:
            points = [tuple(map(float, point.split(","))) for point in line.get("points").split()]
            assert len(points) == len(AFFINE)
            assert all(0 <= x <= width and 0 <= y <= height for x, y in points)
    heights = [[float(point.split(",")[1]) for point in line.get("points").split()]
               for line in ElementTree.fromstring(plots[0]).findall("polyline")]
    assert np.ptp(heights[1]) < 0.3 * np.ptp(heights[0])  # the rates are flat afterwards


def test_an_uncalibrated_page_has_one_line_and_no_before(capsys, tmp_path, images):
    text, _ = written(capsys, tmp_path, images, TOY)
    assert [len(ElementTree.fromstring(plot).findall("polyline"))
            for plot in re.findall(r"<svg.*?</svg>", text, re.DOTALL)] == [1, 1]
    assert "rate before" not in Reader(text).rows[0]
    assert "The definition stays as it is." in Reader(text).text


def test_a_page_tells_what_changed_in_the_definition(capsys, tmp_path, images):
    definition = TOY.replace("'ReLU'", "'Sigmoid'")
    text, _ = written(capsys, tmp_path, images, definition, "-cs")
    read = Reader(text)
    assert "What changed in the definition" in read.text and "new Power layer" in read.text
    assert len(read.all("li")) == read.text.count("new Power layer") > 0
    beside = (tmp_path / "out.prototxt").read_text()
    assert beside.count('type: "Power"') == len(read.all("li"))


def test_names_with_the_signs_of_html_are_shown_as_they_are(capsys, tmp_path, images):
    text, _ = written(capsys, tmp_path, images, TOY.replace("'conv1'", "'a<b>&c'"))
    read = Reader(text)
    assert read.rows[1][0] == "a<b>&c"
    assert not read.all("b>") and "a<b>" not in text


def test_an_html_report_may_end_in_htm_and_json_is_the_rest(capsys, tmp_path, images):
    for name, start in (("page.htm", b"<!DOCTYPE"), ("page.json", b"{"), ("page.txt", b"{")):
        found = run(capsys, tmp_path, TOY, "-d", images, "-bs", "4", "-nit", "1", "--report",
                    str(tmp_path / name), report=False)
        assert found.status == 0
        assert bytes_of(str(tmp_path / name)).startswith(start)


def test_inspecting_writes_nothing_but_the_page(capsys, tmp_path, images):
    whole = run(capsys, tmp_path, TOY, "-d", images, "-bs", "4", "-t", "pca")
    prototxt = str(tmp_path / "net.prototxt")
    before = {name: bytes_of(str(tmp_path / name)) for name in os.listdir(str(tmp_path))}
    capsys.readouterr()
    assert magic_init.main([prototxt, "--inspect", "--load", whole.output, "-d", images, "-bs",
                            "4", "--cpu", "--report", str(tmp_path / "page.html")]) == 0
    captured = capsys.readouterr()
    assert [line.split()[:2] for line in captured.out.splitlines()[1:5]] == [
        [name, "loaded"] for name in AFFINE]
    assert "wrote" not in captured.err
    after = {name: bytes_of(str(tmp_path / name)) for name in os.listdir(str(tmp_path))}
    assert Reader(after.pop("page.html").decode()).rows[1][2] == "loaded"
    assert after == before


def test_inspecting_a_changed_definition_needs_the_weights_it_was_written_with(capsys, tmp_path,
                                                                             images):
    text = TOY.replace("'ReLU'", "'Sigmoid'")
    run(capsys, tmp_path, text, "-d", images, "-bs", "4", "-cs")
    page_of = ["--inspect", "-d", images, "-bs", "4"]
    prototxt, weights = str(tmp_path / "out.prototxt"), str(tmp_path / "out.caffemodel")
    assert magic_init.main([prototxt, *page_of, "--load", weights, "--cpu", "-q"]) == 0
    with open(weights, "ab") as file:
        file.write(b"\x0a\x00")
    assert magic_init.main([prototxt, *page_of, "--load", weights, "--cpu", "-q"]) == 2
    assert "was written for other weights" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------
# Filters
# ---------------------------------------------------------------------------------------------

def picture(text):
    """The picture in a page."""
    (source,) = [element["src"] for element in Reader(text).all("img")]
    assert source.startswith("data:image/png;base64,")
    return cv2.imdecode(np.frombuffer(base64.b64decode(source.split(",", 1)[1]), np.uint8),
                        cv2.IMREAD_UNCHANGED)


def test_filters_are_those_that_are_written_over_their_largest_weight(capsys, tmp_path, images):
    text, found = written(capsys, tmp_path, images, TOY)
    working = working_net(TOY)
    working.net.copy_from(found.output)
    filters = working.affine[0].weights
    shown = picture(text).astype(float)
    across = (shown.shape[1] - 1) // 4  # of 3 numbers and a white line each
    for number, one in enumerate(filters):
        y, x = number // across * 4 + 1, number % across * 4 + 1
        np.testing.assert_allclose(shown[y:y + 3, x:x + 3].transpose(2, 0, 1),
                                   127.5 + 127.5 * one / np.abs(one).max(), atol=1.01)
    assert (shown[0] == 255).all() and (shown[:, 0] == 255).all()


@pytest.mark.parametrize("text", [
    DATA + layer("fc", "InnerProduct", "data", "", "inner_product_param { num_output: 2 }"),
    DATA + layer("c", "Convolution", "data", "", "convolution_param { num_output: 2 "
                 "kernel_size: 1 }"),
    DATA + layer("six", "Concat", "data data") + layer(
        "c", "Convolution", "six", "", "convolution_param { num_output: 2 kernel_size: 3 }"),
], ids=["fully connected", "one by one", "not of the images"])
def test_nets_without_filters_to_look_at_have_none(text):
    assert page.filters_png(working_net(text)) == b""


def test_grey_filters_and_filters_of_0_are_grey():
    working = working_net(image_input(1, 1, 8, 8) + layer(
        "c", "Convolution", "data", "", "convolution_param { num_output: 300 kernel_size: 3 }"))
    working.affine[0].weights[0] = 0
    shown = cv2.imdecode(np.frombuffer(page.filters_png(working), np.uint8), cv2.IMREAD_UNCHANGED)
    assert shown.ndim == 2
    assert (np.abs(shown[1:4, 1:4].astype(int) - 127) <= 1).all()
    assert shown.size <= 17 * (page.MOST_FILTERS + 40)  # not all 300 of them


# ---------------------------------------------------------------------------------------------
# Numbers that are missing
# ---------------------------------------------------------------------------------------------

def content(**changes):
    """What `report.as_json` returns for two layers, one of which has no rate of its own."""
    layers = [{"name": name, "type": "Convolution", "weights": "loaded", "size": 9, "mean": 0.1,
               "std": 1.0, "dead": 0, "rate_before": rate, "rate_after": rate,
               "variation_before": 0.5, "variation_after": 0.4}
              for name, rate in (("one", 2.0), ("two", None))]
    return {"definition": "net.prototxt", "output": None, "calibrated": True, "layers": layers,
            "images": 3, "spread_before": 3.0, "spread_after": 1.0, "changes": [], "notes": [],
            "output_difference": None, "seconds": {}, "command": ["magic_init"], "seed": 0,
            "versions": {}, **changes}


@pytest.mark.parametrize("rate", [None, 0.0, float("nan"), float("inf")])
def test_rates_that_are_none_leave_gaps(tmp_path, rate):
    given = content()
    given["layers"][0]["rate_before"] = rate
    page.write(str(tmp_path / "page.html"), given, b"")
    read = Reader((tmp_path / "page.html").read_text())
    assert [row[0] for row in read.rows[1:]] == ["one", "two"]
    bars = [element["style"] for element in read.all("span") if element["class"] == "bar"]
    assert len(bars) == 1
    assert re.match(r"width:[\d.]+%;", bars[0])


def test_a_page_without_any_rate_is_a_page(tmp_path):
    given = content()
    for one in given["layers"]:
        one["rate_before"] = one["rate_after"] = None
    page.write(str(tmp_path / "page.html"), given, b"")
    assert len(Reader((tmp_path / "page.html").read_text()).rows) == 3


@pytest.mark.parametrize("values", [[1e-12, 1e9], [1.0, 1.0], [0.3], [1e-5, 1e-5]], ids=str)
@pytest.mark.parametrize("logarithmic", [True, False])
def test_axes_hold_all_values_and_a_few_ticks(values, logarithmic):
    places = [np.log10(value) if logarithmic else value for value in values]
    low, high, ticks = page._axis(places, logarithmic)
    assert low < high and low <= min(places) and max(places) <= high
    assert 1 <= len(ticks) <= 10
    assert all(low <= tick <= high for tick in ticks)


def test_an_old_page_stays_where_a_new_one_fails(tmp_path, monkeypatch):
    (tmp_path / "page.html").write_text("old")
    with pytest.raises(KeyError):
        page.write(str(tmp_path / "page.html"), content(layers=[{}]), b"")
    assert (tmp_path / "page.html").read_text() == "old"
    assert os.listdir(str(tmp_path)) == ["page.html"]


def test_a_table_has_a_line_a_layer_and_gaps_for_what_is_shared(capsys, tmp_path, images):
    shared = "param { name: 'w' } param { name: 'b' } convolution_param { num_output: 2 " \
        "kernel_size: 3 }"
    text = DATA + layer("one", "Convolution", "data", "", shared) + layer(
        "two", "Convolution", "data", "", shared) + layer("both", "Concat", "one two")
    page_text, found = written(capsys, tmp_path, images, text)
    assert found.out.splitlines()[2].split() == ["two", "shares", "one"] + found.out.splitlines()[
        2].split()[3:5]
    assert Reader(page_text).rows[2][2] == "shares one"
