"""Texts of the CUDA sources: `common.cuh` goes before each, so that compiling needs no include directory."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

#: Sources, each a translation unit of its own.
NAMES = ("decode", "hash", "merge", "prefill", "prefill_f32", "recurrence")


@cache
def source(name: str) -> str:
    """The whole text of a source, ready to compile.

    Raises:
        ValueError: no source of this name.
    """
    if name not in NAMES:
        raise ValueError(f"name: got {name!r}, expected one of {NAMES}")
    folder = files("longattn.gpu") / "cuda"
    return (folder / "common.cuh").read_text() + (folder / f"{name}.cu").read_text()
