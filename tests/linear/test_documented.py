"""Documentation that recurrences share: written out in every docstring that asks for it."""

import inspect
import re

import pytest

from longattn import linear
from longattn.linear._documented import ENTRIES, documented

FUNCTIONS = [f for _, f in inspect.getmembers(linear, inspect.isfunction)]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_no_name_is_left_in_braces(function):
    assert not re.search(r"\{\w+\}$", inspect.getdoc(function), re.MULTILINE)


def test_entries_are_written_out_at_the_indentation_of_their_line():
    @documented
    def function():
        """A line.

        Args:
            v: {values}
            other: {unknown}

        Cost:
            {cost}
        """

    lines = inspect.getdoc(function).splitlines()
    assert " ".join(line.strip() for line in lines[3:5]) == f"v: {ENTRIES['values']}"
    assert lines[4].startswith("        `") and lines[5] == "    other: {unknown}"
    assert " ".join(line.strip() for line in lines[8:]) == ENTRIES["cost"]
    assert all(line.startswith("    ") for line in lines[8:])


def test_without_docstrings_nothing_happens():
    assert documented(lambda: None).__doc__ is None
