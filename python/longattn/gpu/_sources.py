"""Texts of the CUDA sources: what a source needs goes before it, so that compiling needs no include directory."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

from longattn._checks import one_of

#: Files of each source, in order, after `common.cuh`.
_FILES = {
    "codes": ("codes.cu",),
    "decode": ("attention.cuh", "decode.cuh", "decode.cu"),
    "decode_int8": ("attention.cuh", "decode.cuh", "decode_int8.cu"),
    "hash": ("choice.cuh", "hash.cu"),
    "merge": ("merge.cu",),
    "neighbourhood": ("attention.cuh", "prefill.cuh", "neighbourhood.cuh", "neighbourhood.cu"),
    "neighbourhood_f32": ("attention.cuh", "prefill_f32.cuh", "neighbourhood.cuh", "neighbourhood_f32.cu"),
    "prefill": ("attention.cuh", "ranges.cuh", "prefill.cuh", "prefill.cu"),
    "prefill_f32": ("attention.cuh", "ranges.cuh", "prefill_f32.cuh", "prefill_f32.cu"),
    "prefill_int8": ("attention.cuh", "ranges.cuh", "prefill.cuh", "prefill_int8.cu"),
    "recurrence": ("recurrence.cu",),
    "recurrence_f32": ("recurrence_f32.cu",),
    "recurrence_step": ("recurrence_step.cu",),
    "signatures": ("choice.cuh", "signatures.cu"),
}
#: Sources that are compiled a second time for options of scores, so that these cost nothing where there are none, and
#: what `SCORE_OPTIONS` is then (attention.cuh).
_WITH_OPTIONS = {
    "decode": 1,
    "decode_int8": 1,
    "neighbourhood": 2,
    "neighbourhood_f32": 2,
    "prefill": 1,
    "prefill_f32": 1,
    "prefill_int8": 1,
}
_OPTIONS = "_options"

#: Sources, each a translation unit of its own.
NAMES = (*_FILES, *(name + _OPTIONS for name in _WITH_OPTIONS))


def with_options(name: str) -> str:
    """The variant of a source whose kernels look at options of scores."""
    return name + _OPTIONS


@cache
def source(name: str) -> str:
    """The whole text of a source, ready to compile.

    Raises:
        ValueError: no source of this name.
    """
    one_of(name, "name", NAMES)
    plain = name.removesuffix(_OPTIONS)
    folder = files("longattn.gpu") / "cuda"
    defines = "" if plain == name else f"#define SCORE_OPTIONS {_WITH_OPTIONS[plain]}\n"
    return defines + "".join((folder / file).read_text() for file in ("common.cuh", *_FILES[plain]))
