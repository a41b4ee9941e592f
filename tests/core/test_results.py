"""The result format: whole files, numbers that JSON can hold, and the error of a mean."""
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
