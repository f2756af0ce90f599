from __future__ import annotations

import math

import pytest

from muse.report.table import show, table


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (True, "yes"),
        (False, "no"),
        (0, "0"),
        (1234567, "1,234,567"),
        (0.0, "0"),
        (3.14159, "3.142"),
        (-0.000123456, "-0.0001235"),
        (9999.4, "9999"),
        (12345.6, "12,346"),
        (1.5e11, "150,000,000,000"),
        (1.23456e136, "1.235e+136"),
        (math.inf, "inf"),
        (math.nan, "nan"),
        ("cuda", "cuda"),
    ],
)
def test_show(value, text):
    assert show(value) == text


ROWS = [("a", 1.0, None), ("a longer name", 123456, True), ("b", -0.5, False)]


def test_columns_line_up():
    lines = table(("model", "loss", "a wide header"), ROWS).splitlines()
    rule = lines[1]
    assert len(lines) == 2 + len(ROWS)
    assert all(len(line) == len(rule) for line in lines if not line.endswith(" "))
    gaps = [place for place, sign in enumerate(rule) if sign == " "]
    assert all(line[place] == " " for line in lines for place in gaps)
    # The first column is aligned to the left, the others to the right.
    first, *others = rule.split("  ")
    assert all(not line.startswith(" ") for line in lines)
    end = len(first)
    for other in others:
        end += 2 + len(other)
        assert all(line[end - 1] != " " for line in lines)


def test_cells_come_back_in_order():
    lines = table(("model", "loss", "pass"), ROWS).splitlines()
    assert lines[0].split() == ["model", "loss", "pass"]
    for line, row in zip(lines[2:], ROWS, strict=True):
        assert [cell.strip() for cell in line.split("  ") if cell.strip()] == [show(value) for value in row]


def test_a_table_without_rows_is_its_header():
    assert table(("a", "bc"), []).splitlines() == ["a  bc", "-  --"]


def test_no_line_ends_in_blanks():
    lines = table(("a", "b"), [("x", ""), ("", "")]).splitlines()
    assert all(line == line.rstrip() for line in lines)
