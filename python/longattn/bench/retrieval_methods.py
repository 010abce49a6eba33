"""One row per method that reads, keeps or scores keys, at one size; exact ones beside torch's attention."""

from __future__ import annotations

from longattn.bench.each_method import COLUMNS, EachMethod
from longattn.bench.retrieval_cases import CALLS, CASES, PLAIN, Inputs
from longattn.bench.sections import Section, whole

__all__ = ["COLUMNS", "FAMILIES", "SECTIONS", "SUMMARY", "add_arguments", "measure", "panels"]

SUMMARY = "every method that retrieves, hashes, keeps, pools or scores keys, at one size"
FAMILIES = ("retrieval", "hash", "kv", "score", "position", "pool", "exact", "diagnostics", "distributed")

_EVERY = EachMethod("retrieval-methods", FAMILIES, Inputs, CASES, PLAIN, calls=CALLS)
add_arguments, measure, panels = _EVERY.add_arguments, _EVERY.measure, _EVERY.panels

SECTIONS = (
    Section(
        "retrieval",
        "retrieval-methods",
        "Every method that retrieves, keeps or scores keys",
        "Random float32 rows. Methods with an index or a store, latent attention and chunks of a prefix tree take a "
        "decoding step, the index ready; policies one over what they kept of a prompt, a quarter; the others a prompt. "
        "Layers count with their projections. `× torch` of torch's row: its time over ours; `error`: the largest "
        "difference of the two results. Quality is in the section of `longattn compare`.",
        _EVERY.tables,
        whole("retrieval-methods", panels),
    ),
)
