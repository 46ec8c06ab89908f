"""Numbers and tables of reports: what is undefined is shown as such, and a cell stays a cell."""

import math

import pytest

from prep.text import NONE, markdown_table, number_text, plural


@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_what_is_undefined_is_no_number(value):
    assert number_text(value) == NONE


def test_numbers_have_as_many_digits_as_asked_for():
    assert (number_text(-0.12345), number_text(2, 0), number_text(0.7, 4)) == ("-0.123", "2", "0.7000")


def test_a_bar_in_a_cell_begins_no_other():
    assert markdown_table(["a", "b"], [["1|2", ""]]).splitlines() == [
        "| a | b |",
        "| --- | --- |",
        "| 1\\|2 |  |",
    ]


def test_nouns_follow_their_number():
    assert [plural(number, "view") for number in (0, 1, 2)] == ["0 views", "1 view", "2 views"]
