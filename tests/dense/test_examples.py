"""The examples in the docstrings run and give what they show."""

import doctest

from longattn import dense


def test_docstring_examples():
    result = doctest.testmod(dense)
    assert result.attempted > 0
    assert result.failed == 0
