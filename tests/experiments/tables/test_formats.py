"""Test tables and the means of trials."""
import csv
import math

import pytest

from tables import formats


def test_written_csv_reads_back_with_empty_cells_for_none(tmp_path):
    path = str(tmp_path / "table.csv")
    formats.write_csv(path, ["layer", "rate"], [["conv,1", 0.25], ["fc", None]])
    with open(path, newline="", encoding="utf-8") as file:
        assert list(csv.reader(file)) == [["layer", "rate"], ["conv,1", "0.25"], ["fc", ""]]


def test_a_table_that_fails_half_way_keeps_the_old_one(tmp_path):
    path = tmp_path / "table.csv"
    formats.write_csv(str(path), ["a"], [[1]])
    with pytest.raises(ZeroDivisionError):
        formats.write_csv(str(path), ["a"], ([1 // number] for number in (1, 0)))
    assert path.read_text().split() == ["a", "1"]


def test_mean_and_standard_error_by_hand():
    # deviations 0.2, 1.0, -1.2 of the mean 50.6: s^2 = 2.48 / 2, error = sqrt(1.24 / 3)
    mean, error = formats.mean_and_error([50.8, 51.6, 49.4])
    assert mean == pytest.approx(50.6)
    assert error == pytest.approx(math.sqrt(1.24 / 3))
    assert formats.mean_and_error([4.0]) == (4.0, None)
    assert formats.mean_and_error([2.0, 2.0]) == (2.0, 0.0)
    with pytest.raises(ValueError, match="no trials"):
        formats.mean_and_error([])


def test_error_of_numbers_far_from_zero_keeps_its_digits():
    mean, error = formats.mean_and_error([1e9, 1e9 + 1, 1e9 + 2])
    assert mean == 1e9 + 1
    assert error == pytest.approx(1 / math.sqrt(3), rel=1e-9)
