"""The examples in docstrings, which the pages of methods show, run and give what they say."""

import doctest
import importlib
import importlib.util
import re
from pathlib import Path

import pytest

import longattn

PACKAGE = Path(longattn.__file__).parent
TORCH = re.compile(r"^\s+>>> import torch\b", re.MULTILINE)


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        if ">>> " in (text := path.read_text(encoding="utf-8")):
            name = ".".join((PACKAGE.name, *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
            needs_torch = TORCH.search(text) and importlib.util.find_spec("torch") is None
            yield pytest.param(name, marks=[pytest.mark.skip("torch is not installed")] if needs_torch else [])


@pytest.mark.parametrize("name", list(modules()))
def test_examples(name):
    failed, tried = doctest.testmod(importlib.import_module(name))
    assert tried > 0
    assert failed == 0
