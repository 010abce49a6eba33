"""One row per linear and recurrent method and some near them, beside a plain torch formulation where one is natural."""

from __future__ import annotations

from longattn.bench.each_method import COLUMNS, EachMethod
from longattn.bench.linear_cases import CASES, FURTHER, Inputs
from longattn.bench.linear_torch import PLAIN
from longattn.bench.sections import Section, whole

__all__ = ["COLUMNS", "SECTIONS", "SUMMARY", "add_arguments", "measure", "panels"]

SUMMARY = "every linear and recurrent method at one size, beside plain torch formulations"

_EVERY = EachMethod("linear-methods", ("linear", "recurrent"), Inputs, CASES, PLAIN, dict.fromkeys(FURTHER))
add_arguments, measure, panels = _EVERY.add_arguments, _EVERY.measure, _EVERY.panels

SECTIONS = (
    Section(
        "linear",
        "linear-methods",
        "Linear and recurrent methods",
        "Random features and weights, float32; channels of methods over rows are those of all heads. torch: chunks of "
        "64 rows where decays let them, else a row at a time; or the formula over all keys as products of matrices. "
        "`× torch` of torch's row: its time over ours; `error`: the largest difference of the two results.",
        _EVERY.tables,
        whole("linear-methods", panels),
    ),
)
