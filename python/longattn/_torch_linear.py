"""The part of `longattn.torch` with states of fixed size: recurrences of matrix states and the selective scan.

The functions have the arguments, defaults and docstrings of those of `longattn.linear` whose names they have.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from longattn import linear
from longattn._checks import flag
from longattn._torch_operators import Given, Pair, check_tensors, operator
from longattn.linear._recurrence import CHUNK, Common, recurrence

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
    ours: Callable[..., Any],
    *,
    without: Sequence[str] = (),
    backward: str = "recurrence_backward",
    note: str = "",
    states: str = "torch.Tensor",
) -> Callable[[Callable[[Given], Any]], Callable[..., Any]]:
    """Gives a function of arguments by name the signature of `ours`, less what is `without`, and its documentation."""
    dropped = (*WRITTEN, *without)
    kept = [p for p in inspect.signature(ours).parameters.values() if p.name not in dropped]
    positional = [p.name for p in kept if p.kind is p.POSITIONAL_OR_KEYWORD]
    required = [p.name for p in kept if p.default is p.empty]
    defaults = {p.name: p.default for p in kept if p.default is not p.empty}

    def decorate(body: Callable[[Given], Any]) -> Callable[..., Any]:
        def call(*values: Any, **options: Any) -> Any:
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
        returned = f"tuple[torch.Tensor, {states}]"
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
    return _run(x, normaliser=x.pop("eps") if flag(x.pop("normalize"), "normalize") else None)


@_like(linear.lightning_attention)
def lightning_attention(x: Given) -> Pair:
    slopes = x.pop("slopes")
    check_tensors({"slopes": slopes})
    _check_rows(v=x["v"])
    return _run(x, g=_of_heads(-slopes, "slopes", x["v"]))


@_like(linear.retention)
def retention(x: Given) -> Pair:
    v, gamma = x["v"], x.pop("gamma")
    check_tensors({"gamma": gamma})
    _check_rows(v=v)
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
    check_tensors({"g": g, "u": u, "cu_seqlens": ends})
    _check_rows(q=q, k=k, v=v)
    if g.dim() != v.dim():
        raise ValueError(f"g: got shape {tuple(g.shape)}, expected {tuple(k.shape)} as k")
    if not u.is_floating_point():
        raise TypeError(f"u: got dtype {u.dtype}, expected a floating dtype")
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


@_like(linear.rwkv7)
def rwkv7(x: Given) -> Pair:
    return _run(x, channels=True)


@_like(linear.hgrn2, note=" up to rounding: keys `1 - e^g` are made beforehand")
def hgrn2(x: Given) -> Pair:
    g = x["g"]
    check_tensors({"q": x["q"], "v": x["v"], "g": g})
    return _run(x, k=-torch.expm1(g.float()), channels=True)


@_like(
    linear.gated_slot_attention,
    note=" up to rounding: the softmax over slots stands by itself",
    states="tuple[torch.Tensor, torch.Tensor]",
)
def gated_slot_attention(x: Given) -> tuple[torch.Tensor, Pair]:
    """A pass whose columns decay, a softmax, and one whose rows do."""
    q, k, v, g, starts = (x.pop(name) for name in ("q", "k", "v", "g", "initial_state"))
    if starts is not None and (not isinstance(starts, tuple | list) or len(starts) != 2):
        raise TypeError(f"initial_state: got {type(starts).__name__}, expected a pair (keys, values)")
    keys, values = starts or (None, None)
    check_tensors({"q": q, "k": k, "v": v, "g": g, "initial_state": keys, "cu_seqlens": x["cu_seqlens"]})
    if g.dim() != v.dim() or g.shape[-1] == 0 or k.shape[:-1] != v.shape[:-1]:
        raise ValueError(f"g: got shape {tuple(g.shape)}, expected {(*v.shape[:-1], 'slots')} as k and v")
    logits, keys = _slots(q=q, k=k, g=g, initial_state=keys, **x)
    freed = -torch.expm1(g.float())
    x = {**x, "q": logits.softmax(-1), "k": freed, "v": v, "g": g, "initial_state": values, "scale": 1.0}
    out, values = _run(x, channels=True)
    return out.to(q.dtype), (keys, values)


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


@_like(linear.diagonal_scan, backward="diagonal_scan_backward", note=" up to rounding with `silu`, which comes after")
def diagonal_scan(x: Given) -> Pair:
    """Weights may be complex tensors."""
    silu = flag(x.pop("silu"), "silu")
    check_tensors(x)
    out, state = _diagonal(**x)
    return (torch.nn.functional.silu(out) if silu else out), state


def _run(x: Given, *, channels: bool | None = None, **more: Any) -> Pair:
    """The recurrence with these arguments, absent ones absent; `channels`: the rank that log decays must have."""
    given = {
        **dict.fromkeys(("g", "beta", "a", "b", "initial_state", "cu_seqlens", "scale", "normaliser")),
        **{"delta": False, "normalize_qk": False, "chunk_size": CHUNK},
        **x,
        **more,
    }
    named = ("q", "k", "v", "g", "beta", "a", "b", "initial_state", "cu_seqlens")
    check_tensors({name: given[name] for name in named})
    if given["q"].dtype == torch.float64:
        raise TypeError("q: got dtype float64, expected float32, float16 or bfloat16")
    rank = given["q"].dim() - (not channels)
    if channels is not None and given["g"].dim() != rank:
        raise ValueError(f"g: got shape {tuple(given['g'].shape)}, expected rank {rank}")
    return _recurrence(**given)


def _check_rows(**rows: torch.Tensor) -> None:
    """Kinds, dtypes and ranks of what is computed with before an operator sees it."""
    check_tensors(rows)
    for name, x in rows.items():
        if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise TypeError(f"{name}: got dtype {x.dtype}, expected float32, float16 or bfloat16")
        if x.dim() not in (3, 4):
            raise ValueError(f"{name}: got shape {tuple(x.shape)}, expected rank 3 or 4")


def _of_heads(logs: torch.Tensor, name: str, v: torch.Tensor) -> torch.Tensor:
    """A log decay per head as one per row."""
    if logs.shape != v.shape[-3:-2]:
        raise ValueError(f"{name}: got shape {tuple(logs.shape)}, expected {tuple(v.shape[-3:-2])}, one per head of v")
    return logs[:, None].expand(v.shape[:-1])


def _recurred(x: Given) -> Any:
    common = Common(*(x.pop(name, None) for name in Common._fields))
    unit, pair = 1e-6 if x.pop("normalize_qk") else None, _pair(x)
    channels = x["g"] is not None and x["g"].dim() == x["q"].dim()
    return recurrence(**x, common=common, unit=unit, pair=pair, channels=channels)


def _recurred_back(d_out: torch.Tensor, d_state: torch.Tensor, x: Given, results: Pair | None) -> tuple[Any, ...]:
    eps, pair = x.pop("normaliser"), _pair(x)
    found = linear.recurrence_backward(
        d_out,
        d_state,
        **x,
        pair=pair,
        normalize=eps is not None,
        eps=eps or 0.0,
        out=None if results is None else results[0],
    )
    d_pair = found.d_pair or (None, None)
    return found.dq, found.dk, found.dv, found.dg, found.d_beta, *d_pair, found.d_initial_state


def _pair(x: Given) -> tuple[torch.Tensor, torch.Tensor] | None:
    a, b = x.pop("a"), x.pop("b")
    return None if a is None else (a, b)


def _recurred_shapes(x: Given) -> Pair:
    q, v, ends = x["q"], x["v"], x["cu_seqlens"]
    heads = v.shape[-3]
    out = q.new_empty(*q.shape[:-3], max(q.shape[-3], heads), q.shape[-2], v.shape[-1])
    front = q.shape[:-3] if ends is None else (ends.shape[0] - 1,)
    columns = v.shape[-1] + (x["normaliser"] is not None)
    return out, q.new_empty(*front, heads, q.shape[-1], columns, dtype=torch.float32)


_recurrence = operator(
    "recurrence",
    "Tensor q, Tensor k, Tensor v, Tensor? g, Tensor? beta, Tensor? a, Tensor? b, Tensor? initial_state, "
    "Tensor? cu_seqlens, bool delta, float? scale, bool normalize_qk, float? normaliser, SymInt chunk_size",
    _recurred,
    _recurred_back,
    _recurred_shapes,
    gradients=("q", "k", "v", "g", "beta", "a", "b", "initial_state"),
    reads=lambda x: x["normaliser"] is not None,
)


def _slot_logits(x: Given) -> Any:
    g = x["g"]
    common = Common(x["scale"], x["initial_state"], None, x["chunk_size"], x["cu_seqlens"])
    ones = torch.ones(1, dtype=torch.float32).expand(g.shape)
    return recurrence(x["q"], x["k"], ones, common, g=g, columns=True, dtype=np.dtype(np.float32))


def _slot_logits_back(d_out: torch.Tensor, d_state: torch.Tensor, x: Given, _: Pair | None) -> tuple[Any, ...]:
    """Slots with rows as columns are the states of gated linear attention, whose queries here are gradients of logits.

    Its outputs times `q` add up to logits times their gradients: outputs are the gradient of `q`, and the rest are its
    own gradients for that of outputs being `q`.
    """
    q, k, g, start = x["q"], x["k"], x["g"], x["initial_state"]
    options = {name: x[name] for name in ("scale", "chunk_size", "cu_seqlens")}
    if options["scale"] is None:  # of the channels of `q`, not of the slots
        options["scale"] = q.shape[-1] ** -0.5
    start = None if start is None else start.transpose(-1, -2).contiguous()
    freed = -torch.expm1(g.float())
    dq, _state = recurrence(d_out, freed, k, Common(initial_state=start, **options), g=g, channels=True)
    found = linear.recurrence_backward(
        q, d_state.transpose(-1, -2).contiguous(), d_out, freed, k, g=g, initial_state=start, **options
    )
    return dq, found.dv, found.dg - (1 - freed) * found.dk, found.d_initial_state.transpose(-1, -2).contiguous()


def _slot_logits_shapes(x: Given) -> Pair:
    q, g, ends = x["q"], x["g"], x["cu_seqlens"]
    front = q.shape[:-3] if ends is None else (ends.shape[0] - 1,)
    logits = q.new_empty(*q.shape[:-1], g.shape[-1], dtype=torch.float32)
    return logits, q.new_empty(*front, g.shape[-3], q.shape[-1], g.shape[-1], dtype=torch.float32)


_slots = operator(
    "slot_logits",
    "Tensor q, Tensor k, Tensor g, Tensor? initial_state, Tensor? cu_seqlens, float? scale, SymInt chunk_size",
    _slot_logits,
    _slot_logits_back,
    _slot_logits_shapes,
    gradients=("q", "k", "g", "initial_state"),
    reads=lambda x: False,
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


def _plain(x: Given) -> Given:
    """Complex tensors as arrays, which is how `longattn.linear` takes them."""
    return {name: t.resolve_conj().numpy() if t is not None and t.is_complex() else t for name, t in x.items()}


def _diagonal_scanned(x: Given) -> Any:
    out, state = linear.diagonal_scan(**_plain(x))
    return out, torch.from_numpy(state)


def _diagonal_back(d_out: torch.Tensor, d_state: torch.Tensor, x: Given, _: Pair | None) -> tuple[Any, ...]:
    given = _plain({**x, "d_state": d_state})
    found = linear.diagonal_scan_backward(d_out, given.pop("d_state"), **given)
    rest = (found.d_decay, found.db, found.dc, found.d_skip, found.d_initial_state)
    return found.dx, *(None if y is None else torch.from_numpy(np.ascontiguousarray(y)) for y in rest)


def _diagonal_shapes(given: Given) -> Pair:
    x, decay, ends = given["x"], given["decay"], given["cu_seqlens"]
    sequences = x.shape[0] if ends is None else ends.shape[0] - 1
    weights = (decay, given["b"], given["c"], given["initial_state"])
    kind = torch.complex64 if any(w is not None and w.is_complex() for w in weights) else torch.float32
    return x.new_empty(x.shape), x.new_empty(sequences, *decay.shape, dtype=kind)


_diagonal = operator(
    "diagonal_scan",
    "Tensor x, Tensor decay, Tensor b, Tensor c, Tensor? skip, Tensor? initial_state, Tensor? cu_seqlens",
    _diagonal_scanned,
    _diagonal_back,
    _diagonal_shapes,
    gradients=("x", "decay", "b", "c", "skip", "initial_state"),
    reads=lambda x: False,
)
