"""The part of `longattn.torch` with states of fixed size: recurrences of matrix states and the selective scan.

The functions have the arguments, defaults and docstrings of those of `longattn.linear` whose names they have.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch

from longattn import linear
from longattn._torch_operators import Given, Pair, check_tensors, operator
from longattn.linear._recurrence import CHUNK, recurrence

#: Arguments that have no meaning under autograd: results that are written somewhere.
WRITTEN = ("out", "out_state")

_DOCUMENTED = """`longattn.linear.{name}` for torch's autograd and `torch.compile`, with equal results{note}.

Args:
{arguments}

    Arrays are CPU tensors. All floating ones may require grad.

Returns:
    `(output, states)` as of that function, both differentiable. So a sequence may be cut into parts that hand their
    states on.

Raises:
    TypeError: an argument of another kind or dtype, or one that is missing or unknown.
    ValueError: shapes or values that do not fit, or a tensor outside CPU memory.
    RuntimeError: from a second backward pass: gradients of gradients are not computed.

Cost:
    Forward as `longattn.linear.{name}`, backward as `longattn.linear.{backward}`. The arguments are saved, and the
    output where it is divided by the sum of its weights.
"""


def _like(
    ours: Callable[..., Any], *, without: Sequence[str] = (), backward: str = "recurrence_backward", note: str = ""
) -> Callable[[Callable[[Given], Pair]], Callable[..., Pair]]:
    """Gives a function of arguments by name the signature of `ours`, less what is `without`, and its documentation."""
    dropped = (*WRITTEN, *without)
    kept = [p for p in inspect.signature(ours).parameters.values() if p.name not in dropped]
    positional = [p.name for p in kept if p.kind is p.POSITIONAL_OR_KEYWORD]
    required = [p.name for p in kept if p.default is p.empty]
    defaults = {p.name: p.default for p in kept if p.default is not p.empty}

    def decorate(body: Callable[[Given], Pair]) -> Callable[..., Pair]:
        def call(*values: Any, **options: Any) -> Pair:
            name = body.__name__
            if len(values) > len(positional):
                raise TypeError(f"{name}: got {len(values)} positional arguments, expected at most {len(positional)}")
            given = {**dict(zip(positional, values, strict=False)), **options}
            for argument in options:
                if argument in positional[: len(values)] or (argument not in positional and argument not in defaults):
                    raise TypeError(f"{argument}: got it twice or unasked, expected the arguments of {name}")
            for argument in required:
                if given.get(argument) is None:
                    raise TypeError(f"{argument}: got None, expected a torch tensor")
            return body({**defaults, **given})

        call.__name__, call.__qualname__, call.__module__ = body.__name__, body.__qualname__, body.__module__
        listed = _arguments(ours, dropped)
        call.__doc__ = _DOCUMENTED.format(name=ours.__name__, arguments=listed, backward=backward, note=note)
        tensors = [p.replace(annotation=str(p.annotation).replace("Array", "torch.Tensor")) for p in kept]
        returned = "tuple[torch.Tensor, torch.Tensor]"
        vars(call)["__signature__"] = inspect.Signature(tensors, return_annotation=returned)
        return call

    return decorate


def _arguments(function: Callable[..., Any], dropped: Sequence[str]) -> str:
    """The lines of a docstring's `Args`, less some."""
    text = inspect.getdoc(function) or ""
    section = text.partition("Args:\n")[2].partition("\n\n")[0]
    entries = re.split(r"\n(?=    \w+: )", section)
    return "\n".join(entry for entry in entries if entry.partition(":")[0].strip() not in dropped)


@_like(linear.linear_attention, without=("feature_map",))
def linear_attention(x: Given) -> Pair:
    return _run(x, normaliser=x.pop("eps") if x.pop("normalize") else None)


@_like(linear.lightning_attention)
def lightning_attention(x: Given) -> Pair:
    slopes = x.pop("slopes")
    check_tensors({"slopes": slopes, "v": x["v"]})
    return _run(x, g=_of_heads(-slopes, "slopes", x["v"]))


@_like(linear.retention)
def retention(x: Given) -> Pair:
    v, gamma = x["v"], x.pop("gamma")
    check_tensors({"v": v, "gamma": gamma})
    if gamma is None:
        exponents = -5.0 - torch.arange(v.shape[-3], dtype=torch.float64)
        logs = torch.log1p(-torch.exp2(exponents)).float()
    else:
        logs = gamma.log()
    return _run(x, g=_of_heads(logs, "gamma", v))


@_like(linear.gated_linear_attention)
def gated_linear_attention(x: Given) -> Pair:
    return _run(x, channels=True)


@_like(linear.delta_rule_attention)
def delta_rule_attention(x: Given) -> Pair:
    return _run(x, delta=True)


@_like(linear.gated_delta_rule)
def gated_delta_rule(x: Given) -> Pair:
    return _run(x, delta=True, channels=False)


@_like(linear.kimi_delta_attention)
def kimi_delta_attention(x: Given) -> Pair:
    return _run(x, delta=True, channels=True)


@_like(linear.rwkv6, note=" up to rounding: the two parts of an output are added in another order")
def rwkv6(x: Given) -> Pair:
    """States before a row are those after it where keys, values and decays come a row later.

    So a sequence has one row more, whose output is none, and whose key, value and decay, being the first, are zeros.
    """
    q, k, v, g, u, ends = (x.pop(name) for name in ("q", "k", "v", "g", "u", "cu_seqlens"))
    check_tensors({"q": q, "k": k, "v": v, "g": g, "u": u, "cu_seqlens": ends})
    heads, length = v.shape[-3], v.shape[-2]
    if u.shape != (heads, k.shape[-1]):
        raise ValueError(f"u: got shape {tuple(u.shape)}, expected {(heads, k.shape[-1])}")
    at, sequences = torch.arange(length), 1
    if ends is not None:
        sequences = ends.shape[0] - 1
        at = at + torch.searchsorted(ends[1:].long(), at, right=True)
        ends = ends + torch.arange(sequences + 1)

    def spread(rows: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        room = rows.new_zeros(*rows.shape[:-2], length + sequences, rows.shape[-1])
        return room.index_copy(-2, where, rows)

    later = {name: spread(rows, at + 1) for name, rows in (("k", k), ("v", v), ("g", g))}
    # The sum of both parts is rounded once.
    before, state = _run({**x, **later, "q": spread(q.float(), at), "cu_seqlens": ends}, channels=True)
    readers = before.shape[-3]
    of_rows = (rows.float().repeat_interleave(readers // rows.shape[-3], -3) for rows in (q, k, u[:, None], v))
    queries, keys, weights, values = of_rows
    own = (queries * keys * weights).sum(-1, keepdim=True)
    return (before.index_select(-2, at) + x["scale"] * own * values).to(q.dtype), state


@_like(linear.state_space_duality)
def state_space_duality(given: Given) -> Pair:
    x, dt, a, b, c, skip = (given.pop(name) for name in ("x", "dt", "a", "b", "c", "skip"))
    check_tensors({"x": x, "dt": dt, "a": a, "b": b, "c": c, "skip": skip})
    if a.shape != x.shape[-3:-2]:
        raise ValueError(f"a: got shape {tuple(a.shape)}, expected {tuple(x.shape[-3:-2])}, one per head of x")
    out, state = _run({**given, "q": c, "k": b, "v": x, "g": dt * a[:, None], "beta": dt, "scale": 1.0})
    if skip is not None:
        out = (out + skip[:, None, None] * x).to(out.dtype)
    return out, state


@_like(linear.selective_scan, backward="selective_scan_backward")
def selective_scan(x: Given) -> Pair:
    check_tensors({name: value for name, value in x.items() if name != "softplus"})
    return _scan(**x)


def _run(x: Given, *, channels: bool | None = None, **more: Any) -> Pair:
    """The recurrence with these arguments, absent ones absent; `channels`: the rank that log decays must have."""
    given = {
        **dict.fromkeys(("g", "beta", "initial_state", "cu_seqlens", "scale", "normaliser")),
        **{"delta": False, "normalize_qk": False, "chunk_size": CHUNK},
        **x,
        **more,
    }
    check_tensors({name: given[name] for name in ("q", "k", "v", "g", "beta", "initial_state", "cu_seqlens")})
    rank = given["q"].dim() - (not channels)
    if channels is not None and given["g"].dim() != rank:
        raise ValueError(f"g: got shape {tuple(given['g'].shape)}, expected rank {rank}")
    return _recurrence(**given)


def _of_heads(logs: torch.Tensor, name: str, v: torch.Tensor) -> torch.Tensor:
    """A log decay per head as one per row."""
    if logs.shape != v.shape[-3:-2]:
        raise ValueError(f"{name}: got shape {tuple(logs.shape)}, expected {tuple(v.shape[-3:-2])}, one per head of v")
    return logs[:, None].expand(v.shape[:-1])


def _recurred(x: Given) -> Any:
    unit = 1e-6 if x.pop("normalize_qk") else None
    return recurrence(**x, unit=unit, channels=x["g"] is not None and x["g"].dim() == x["q"].dim())


def _recurred_back(d_out: torch.Tensor, d_state: torch.Tensor, x: Given, results: Pair | None) -> tuple[Any, ...]:
    eps = x.pop("normaliser")
    found = linear.recurrence_backward(
        d_out,
        d_state,
        **x,
        normalize=eps is not None,
        eps=eps or 0.0,
        out=None if results is None else results[0],
    )
    return found.dq, found.dk, found.dv, found.dg, found.d_beta, found.d_initial_state


def _recurred_shapes(x: Given) -> Pair:
    q, v, ends = x["q"], x["v"], x["cu_seqlens"]
    heads = v.shape[-3]
    out = q.new_empty(*q.shape[:-3], max(q.shape[-3], heads), q.shape[-2], v.shape[-1])
    front = q.shape[:-3] if ends is None else (ends.shape[0] - 1,)
    columns = v.shape[-1] + (x["normaliser"] is not None)
    return out, q.new_empty(*front, heads, q.shape[-1], columns, dtype=torch.float32)


_recurrence = operator(
    "recurrence",
    "Tensor q, Tensor k, Tensor v, Tensor? g, Tensor? beta, Tensor? initial_state, Tensor? cu_seqlens, bool delta, "
    "float? scale, bool normalize_qk, float? normaliser, SymInt chunk_size",
    _recurred,
    _recurred_back,
    _recurred_shapes,
    gradients=("q", "k", "v", "g", "beta", "initial_state"),
    reads=lambda x: x["normaliser"] is not None,
)


def _scanned(x: Given) -> Any:
    out, state = linear.selective_scan(**x)
    return out, torch.from_numpy(state)


def _scanned_back(d_out: torch.Tensor, d_state: torch.Tensor, x: Given, _: Pair | None) -> tuple[Any, ...]:
    found = linear.selective_scan_backward(d_out, d_state, **x)
    last = found.d_skip, found.d_dt_bias, found.dz, found.d_initial_state
    return found.dx, found.d_dt, found.da, found.db, found.dc, *last


def _scanned_shapes(given: Given) -> Pair:
    x, a, ends = given["x"], given["a"], given["cu_seqlens"]
    sequences = x.shape[0] if ends is None else ends.shape[0] - 1
    return x.new_empty(x.shape), x.new_empty(sequences, x.shape[2], a.shape[1], dtype=torch.float32)


_scan = operator(
    "selective_scan",
    "Tensor x, Tensor dt, Tensor a, Tensor b, Tensor c, Tensor? skip, Tensor? dt_bias, bool softplus, Tensor? z, "
    "Tensor? initial_state, Tensor? cu_seqlens",
    _scanned,
    _scanned_back,
    _scanned_shapes,
    gradients=("x", "dt", "a", "b", "c", "skip", "dt_bias", "z", "initial_state"),
    reads=lambda x: False,
)
