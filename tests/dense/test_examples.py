"""The examples in the docstrings run and give what they show."""

import doctest
import importlib
import pkgutil

import pytest

import longattn.dense

MODULES = [
    f"longattn.dense.{module.name}"
    for module in pkgutil.iter_modules(longattn.dense.__path__)
    if not module.name.startswith("_")
]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0
    assert result.failed == 0
