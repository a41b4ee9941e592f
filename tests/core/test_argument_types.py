"""Numbers on command lines: what is taken, and what is refused in words."""
import argparse

import pytest

from ddinit import argument_types


@pytest.mark.parametrize("kind, text, number", [
    ("count", "1", 1), ("natural", "0", 0), ("positive", "1e-9", 1e-9), ("finite", "-3", -3),
    ("not_negative", "0", 0), ("not_negative", "0.01", 0.01), ("fraction", "1", 1)])
def test_numbers_in_range_are_taken(kind, text, number):
    assert getattr(argument_types, kind)(text) == number


@pytest.mark.parametrize("kind, text, words", [
    ("count", "0", "'0' is not a whole number in 1.."),
    ("count", "1.5", "'1.5' is not a whole number"),
    ("natural", "-1", "'-1' is not a whole number in 0.."),
    ("positive", "0", "'0' is not a positive number"),
    ("positive", "inf", "'inf' is not a positive number"),
    ("finite", "nan", "'nan' is not a number from -1e6 to 1e6"),
    ("not_negative", "-0.1", "'-0.1' is below 0"),
    ("not_negative", "x", "'x' is not a number"),
    ("fraction", "1.1", "'1.1' is above 1")])
def test_other_numbers_are_refused_with_their_text(kind, text, words):
    with pytest.raises(argparse.ArgumentTypeError) as error:
        getattr(argument_types, kind)(text)
    assert words in str(error.value)
