"""What the docstrings of recurrences and of their layers share, written once."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from typing import Any, TypeVar

#: Descriptions by the names that docstrings have in braces; each line begins one of its own.
ENTRIES = {
    "queries": "queries `[B, Hq, L, D]`, or `[Hq, L, D]`; float32, float16 or bfloat16.",
    "keys": "keys `[B, Hk, L, D]`; any of the three dtypes.",
    "values": "values `[B, H, L, Dv]`, `H` a multiple of `Hk`; any of the three dtypes. There is a state per head of "
    "`v`. `Hq` is a multiple of `H`, whose states are read by groups of query heads, or divides it.",
    "beta": "how much of what is new is written, floating `[B, H, L]`, finite. With "
    "`normalize_qk`, from 0 to 2, beyond which states grow. Without it, they do not grow where `beta_t |k_t|^2` is "
    "from 0 to 2 in every row, which is not checked: beyond that, up to infinity.",
    "scale": "factor of outputs; `None` is `D ** -0.5`.",
    "normalize_qk": "divide rows of `q` and `k` by `sqrt(sum of squares + 1e-6)` first.",
    "initial_state": "states before the first row, floating `[N, H, D, Dv]`; `None` is zeros.",
    "out_state": "float32 array for the final states. It may be `initial_state`, which is then updated in place.",
    "chunk_size": "rows computed at once, at most 252 (more means 252); it changes rounding only.",
    "cu_seqlens": "integers `[N + 1]`, bounds of `N` sequences that lie one after another along the rows of a batch of "
    "1; each has a state of its own. `None`: the batch's entries are the sequences.",
    "states": "`(output, states)`: the output in the kind and dtype of `q`, and float32 `[N, H, D, Dv]`, the states "
    "after the last rows. A call of one row with `initial_state` is the decode step: one pass over the state. "
    "Arithmetic is float32, the same bits for any number of threads; float64 rows, to compare with, go one by one in "
    "float64, and so do their states. A row that holds NaN or an infinity spoils rows "
    "after it and none before.",
    "cost": "`2 * Hq * L * D * Dv` multiply-adds of states, and of rows of a chunk `C` with each other "
    "`Hq * L * C * (D + Dv) / 2`; memory beyond inputs and outputs does not depend on `L`.",
    "delta_cost": "`3 * H * L * D * Dv` multiply-adds of states, and of rows of a chunk `C` with each other about "
    "`H * L * C * (D + Dv + C / 6)`; memory beyond inputs and outputs does not depend on `L`.",
    "gpu": "Arrays of a GPU go to `longattn.gpu.chunked_recurrence`, one head of queries per head of keys; "
    "`out_state`, `cu_seqlens`, `chunk_size` and `out` are not offered there.",
    "gpu_delta": "Arrays of a GPU go to `longattn.gpu.chunked_recurrence`, one head of queries per head of keys; "
    "`normalize_qk`, `out_state`, `cu_seqlens`, `chunk_size` and `out` are not offered there.",
    "own_keys": "keys `[B, H, L, D]`; any of the three dtypes.",
    "own_values": "values `[B, H, L, Dv]`; any of the three dtypes. `Hq` is a multiple of `H`.",
    "going_on": "what a call with the rows before returned.",
    "taps": "floating `[Dv, K]`, taps of the convolution, for all heads; the first meets the row itself, the next the "
    "one before it. `None` is none.",
    "running": "`(output, state)`: the output in the kind and dtype of `q`, and `RunningStatistics`. A call of one row "
    "is the decode step.",
    "local": "`(output, state)`: the output in the kind and dtype of `q`, and `LocalState`. A call of one row is the "
    "decode step.",
    "local_cost": "`2 * Hq * L * D * Dv` multiply-adds of states, `Hq * L * K * Dv` of the convolution.",
    "running_cost": "`2 * Hq * L * F * Dv` multiply-adds of states of `F` features, `D` where nothing is said of them; "
    "memory of a float32 array like the output.",
    "raises": "TypeError: an argument of another kind or dtype.\nValueError: shapes or values that do not fit.",
    "layer_rows": "rows `[B, L, C]`; float32, float16 or bfloat16.",
    "layer_rates": "rates of the memory, floating `[B, heads, L]` or one number.",
    "layer_heads": "of the memory and of attention.",
    "layer_window": "keys of a query, its own included.",
    "layer_options": "further ones of `titans_neural_memory`: `weights` of the memory are `memory_weights` here.",
    "layer_states": "`(output, state)`: `[B, L, C]` in the kind and dtype of `x`, and the memory.",
    "layer_cost": "Projections, `B * L * heads * (P + window) * (D + Dv)` multiply-adds of attention, and the memory.",
    "titans": 'A. Behrouz, P. Zhong and V. Mirrokni, "Titans: Learning to Memorize at Test Time", 2024, '
    "arXiv:2501.00663.",
    "memory": "a `MemoryState` whose arrays receive the last one. It may be `initial_state`, which is then updated in "
    "place.",
    "bad_beta": "a beta that is not finite or, with `normalize_qk`, outside 0 to 2.",
}

COST = ENTRIES["cost"]
DELTA_COST = ENTRIES["delta_cost"]

_Function = TypeVar("_Function", bound=Callable[..., Any])
_WIDTH = 120


def documented(function: _Function) -> _Function:
    """Puts the entries of `ENTRIES` where the docstring of `function` names them in braces at the end of a line."""
    if function.__doc__ is not None:  # there are none with python -OO
        function.__doc__ = "\n".join(_whole(line) for line in function.__doc__.split("\n"))
    return function


def _whole(line: str) -> str:
    before, brace, name = line.rstrip().rpartition("{")
    if not brace or not name.endswith("}") or name[:-1] not in ENTRIES:
        return line
    indent = " " * (len(before) - len(before.lstrip()))
    further = indent + 4 * " " if before.strip() else indent
    lines = (before + ENTRIES[name[:-1]]).replace("\n", f"\n{indent}").split("\n")
    options: dict[str, Any] = {"subsequent_indent": further, "break_long_words": False, "break_on_hyphens": False}
    return "\n".join(textwrap.fill(part, _WIDTH, **options) for part in lines)
