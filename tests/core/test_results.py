"""The result format: whole files, numbers that JSON can hold, and the error of a mean."""
import csv
import json
import math

import numpy as np
import pytest

from ddinit import results


def test_provenance_names_command_seed_and_versions():
    made = results.provenance(7, ["--seed", "7"])
    assert made["command"][1:] == ["--seed", "7"]
    assert made["seed"] == 7
    assert set(made["versions"]) == {"magic_init", "python", "numpy", "scipy", "cv2", "caffe"}
    assert made["versions"]["numpy"] == np.__version__
    assert json.loads(json.dumps(made)) == made


def test_written_json_reads_back_with_numpy_numbers_as_plain_ones(tmp_path):
    path = str(tmp_path / "result.json")
    results.write_json(path, {
        "float32": np.float32(0.5), "int": np.int64(3), "array": np.arange(4).reshape(2, 2),
        "tuple": (1, None, True), "not finite": [math.nan, math.inf, -math.inf, np.float64("nan")],
        "array with nan": np.array([1.0, np.nan]), 5: "key", "name": "é"})
    assert results.read_json(path) == {
        "float32": 0.5, "int": 3, "array": [[0, 1], [2, 3]], "tuple": [1, None, True],
        "not finite": [None] * 4, "array with nan": [1.0, None], "5": "key", "name": "é"}


def test_a_value_that_json_cannot_hold_keeps_the_old_file(tmp_path):
    path = tmp_path / "result.json"
    results.write_json(str(path), [1])
    with pytest.raises(TypeError):
        results.write_json(str(path), {"object": object()})
    assert results.read_json(str(path)) == [1]
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]


def test_unreadable_json_is_one_line_that_names_the_file(tmp_path):
    (tmp_path / "broken.json").write_text('{"a": ')
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe")
    for name, message in (("none.json", "No such file"), ("broken.json", "not JSON"),
                          ("binary.json", "not JSON"), ("", "Is a directory")):
        path = str(tmp_path / name)
        with pytest.raises(ValueError) as error:
            results.read_json(path)
        assert str(error.value).startswith(path + ": ")
        assert message in str(error.value)


def test_written_csv_reads_back_with_empty_cells_for_none(tmp_path):
    path = str(tmp_path / "table.csv")
    results.write_csv(path, ["layer", "rate"], [["conv,1", 0.25], ["fc", None]])
    with open(path, newline="", encoding="utf-8") as file:
        assert list(csv.reader(file)) == [["layer", "rate"], ["conv,1", "0.25"], ["fc", ""]]


def test_a_table_that_fails_half_way_keeps_the_old_one(tmp_path):
    path = tmp_path / "table.csv"
    results.write_csv(str(path), ["a"], [[1]])
    with pytest.raises(ZeroDivisionError):
        results.write_csv(str(path), ["a"], ([1 // number] for number in (1, 0)))
    assert path.read_text().split() == ["a", "1"]


def test_mean_and_standard_error_by_hand():
    # deviations 0.2, 1.0, -1.2 of the mean 50.6: s^2 = 2.48 / 2, error = sqrt(1.24 / 3)
    mean, error = results.mean_and_error([50.8, 51.6, 49.4])
    assert mean == pytest.approx(50.6)
    assert error == pytest.approx(math.sqrt(1.24 / 3))
    assert results.mean_and_error([4.0]) == (4.0, None)
    assert results.mean_and_error([2.0, 2.0]) == (2.0, 0.0)
    with pytest.raises(ValueError, match="no trials"):
        results.mean_and_error([])


def test_error_of_numbers_far_from_zero_keeps_its_digits():
    mean, error = results.mean_and_error([1e9, 1e9 + 1, 1e9 + 2])
    assert mean == 1e9 + 1
    assert error == pytest.approx(1 / math.sqrt(3), rel=1e-9)
