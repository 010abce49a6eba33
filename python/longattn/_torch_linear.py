"""The part of `longattn.torch` with states of fixed size: recurrences of matrix states and the selective scan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from longattn import linear
from longattn._torch_sparse import check_tensors, no_second_derivative
from longattn.linear._recurrence import CHUNK, recurrence

Pair = tuple[torch.Tensor, torch.Tensor]


def linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    normalize: bool = True,
    eps: float = 1e-6,
    scale: float = 1.0,
    initial_state: torch.Tensor | None = None,
    chunk_size: int = CHUNK,
    cu_seqlens: torch.Tensor | None = None,
) -> Pair:
    """`longattn.linear.linear_attention` for torch's autograd and `torch.compile`, with equal results.

    Args:
        q: mapped queries `[B, Hq, L, D]`, or `[Hq, L, D]`; float32, float16 or bfloat16. May require grad, as may all
            tensors but `cu_seqlens`.
        k: mapped keys `[B, Hk, L, D]`; any of the three dtypes.
        v: values `[B, H, L, Dv]`; any of the three dtypes.
        normalize: divide outputs by the sum of their weights.
        eps: added to the divisor; a constant.
        scale: factor on products of queries and keys; a constant.
        initial_state: states before the first row, floating `[N, H, D, Dv]`, with `normalize` one column more; `None`
            is zeros.
        chunk_size: rows computed at once.
        cu_seqlens: integers `[N + 1]`, bounds of sequences that lie along the rows of a batch of 1.

    Returns:
        `(output, states)`, both differentiable: the dtype of `q`, and float32. So a sequence may be cut into parts that
        hand their states on.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit, or a tensor outside CPU memory.
        RuntimeError: from a second backward pass: gradients of gradients are not computed.

    Cost:
        Forward as `longattn.linear.linear_attention`, backward as `longattn.linear.recurrence_backward`; the arguments
        are saved, with `normalize` the output too.
    """
    normaliser = eps if normalize else None
    return _run(q, k, v, None, None, initial_state, cu_seqlens, False, scale, False, normaliser, chunk_size)


def lightning_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor,
    *,
    scale: float = 1.0,
    initial_state: torch.Tensor | None = None,
    chunk_size: int = CHUNK,
    cu_seqlens: torch.Tensor | None = None,
) -> Pair:
    """`longattn.linear.lightning_attention` for torch's autograd and `torch.compile`, with equal results.

    Args:
        q: queries, as in `linear_attention`; so are the other arguments that are not named here.
        k: keys.
        v: values.
        slopes: floating `[H]`, at least 0. May require grad.
        scale: factor of outputs.
        initial_state: floating `[N, H, D, Dv]`.
        chunk_size: rows computed at once.
        cu_seqlens: bounds of packed sequences.

    Returns:
        `(output, states)`, both differentiable.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit, or a tensor outside CPU memory.
        RuntimeError: from a second backward pass.

    Cost:
        As `linear_attention`.
    """
    check_tensors({"q": q, "k": k, "v": v, "slopes": slopes})
    g = _of_heads(-slopes, "slopes", v)
    return _run(q, k, v, g, None, initial_state, cu_seqlens, False, scale, False, None, chunk_size)


def retention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gamma: torch.Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    chunk_size: int = CHUNK,
    cu_seqlens: torch.Tensor | None = None,
) -> Pair:
    """`longattn.linear.retention` for torch's autograd and `torch.compile`, with equal results.

    Args:
        q: queries, as in `linear_attention`; so are the other arguments that are not named here.
        k: keys.
        v: values.
        gamma: decays from 0 to 1, floating `[H]`; `None` is the paper's. May require grad.
        scale: factor of outputs; `None` is `D ** -0.5`.
        initial_state: floating `[N, H, D, Dv]`.
        chunk_size: rows computed at once.
        cu_seqlens: bounds of packed sequences.

    Returns:
        `(output, states)`, both differentiable.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit, or a tensor outside CPU memory.
        RuntimeError: from a second backward pass.

    Cost:
        As `linear_attention`.
    """
    check_tensors({"q": q, "k": k, "v": v, "gamma": gamma})
    if gamma is None:
        exponents = -5.0 - torch.arange(v.shape[-3], dtype=torch.float64)
        logs = torch.log1p(-torch.exp2(exponents)).float()
    else:
        logs = gamma.log()
    g = _of_heads(logs, "gamma", v)
    return _run(q, k, v, g, None, initial_state, cu_seqlens, False, scale, False, None, chunk_size)


def gated_linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    *,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    chunk_size: int = CHUNK,
    cu_seqlens: torch.Tensor | None = None,
) -> Pair:
    """`longattn.linear.gated_linear_attention` for torch's autograd and `torch.compile`, with equal results.

    Args:
        q: queries, as in `linear_attention`; so are the other arguments that are not named here.
        k: keys.
        v: values.
        g: log decays, at most 0, floating `[B, H, L, D]`. May require grad.
        scale: factor of outputs; `None` is `D ** -0.5`.
        initial_state: floating `[N, H, D, Dv]`.
        chunk_size: rows computed at once.
        cu_seqlens: bounds of packed sequences.

    Returns:
        `(output, states)`, both differentiable.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit, or a tensor outside CPU memory.
        RuntimeError: from a second backward pass.

    Cost:
        As `linear_attention`.
    """
    _rank(g, "g", q.dim())
    return _run(q, k, v, g, None, initial_state, cu_seqlens, False, scale, False, None, chunk_size)


def delta_rule_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    *,
    scale: float | None = None,
    normalize_qk: bool = False,
    initial_state: torch.Tensor | None = None,
    chunk_size: int = CHUNK,
    cu_seqlens: torch.Tensor | None = None,
) -> Pair:
    """`longattn.linear.delta_rule_attention` for torch's autograd and `torch.compile`, with equal results.

    Args:
        q: queries, as in `linear_attention`; so are the other arguments that are not named here.
        k: keys.
        v: values.
        beta: how much of what is new is written, floating `[B, H, L]`. May require grad.
        scale: factor of outputs; `None` is `D ** -0.5`.
        normalize_qk: divide rows of `q` and `k` by `sqrt(sum of squares + 1e-6)` first.
        initial_state: floating `[N, H, D, Dv]`.
        chunk_size: rows computed at once.
        cu_seqlens: bounds of packed sequences.

    Returns:
        `(output, states)`, both differentiable.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit, or a tensor outside CPU memory.
        RuntimeError: from a second backward pass.

    Cost:
        As `linear_attention`.
    """
    return _run(q, k, v, None, beta, initial_state, cu_seqlens, True, scale, normalize_qk, None, chunk_size)


def gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    *,
    scale: float | None = None,
    normalize_qk: bool = False,
    initial_state: torch.Tensor | None = None,
    chunk_size: int = CHUNK,
    cu_seqlens: torch.Tensor | None = None,
) -> Pair:
    """`longattn.linear.gated_delta_rule` for torch's autograd and `torch.compile`, with equal results.

    Args:
        q: queries, as in `linear_attention`; so are the other arguments that are not named here.
        k: keys.
        v: values.
        g: log decays, at most 0, floating `[B, H, L]`. May require grad.
        beta: how much of what is new is written, floating `[B, H, L]`. May require grad.
        scale: factor of outputs; `None` is `D ** -0.5`.
        normalize_qk: divide rows of `q` and `k` by `sqrt(sum of squares + 1e-6)` first.
        initial_state: floating `[N, H, D, Dv]`.
        chunk_size: rows computed at once.
        cu_seqlens: bounds of packed sequences.

    Returns:
        `(output, states)`, both differentiable.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit, or a tensor outside CPU memory.
        RuntimeError: from a second backward pass.

    Cost:
        As `linear_attention`.
    """
    _rank(g, "g", q.dim() - 1)
    return _run(q, k, v, g, beta, initial_state, cu_seqlens, True, scale, normalize_qk, None, chunk_size)


def kimi_delta_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    *,
    scale: float | None = None,
    normalize_qk: bool = True,
    initial_state: torch.Tensor | None = None,
    chunk_size: int = CHUNK,
    cu_seqlens: torch.Tensor | None = None,
) -> Pair:
    """`longattn.linear.kimi_delta_attention` for torch's autograd and `torch.compile`, with equal results.

    Args:
        q: queries, as in `linear_attention`; so are the other arguments that are not named here.
        k: keys.
        v: values.
        g: log decays, at most 0, floating `[B, H, L, D]`. May require grad.
        beta: how much of what is new is written, floating `[B, H, L]`. May require grad.
        scale: factor of outputs; `None` is `D ** -0.5`.
        normalize_qk: divide rows of `q` and `k` by `sqrt(sum of squares + 1e-6)` first.
        initial_state: floating `[N, H, D, Dv]`.
        chunk_size: rows computed at once.
        cu_seqlens: bounds of packed sequences.

    Returns:
        `(output, states)`, both differentiable.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit, or a tensor outside CPU memory.
        RuntimeError: from a second backward pass.

    Cost:
        As `linear_attention`.
    """
    _rank(g, "g", q.dim())
    return _run(q, k, v, g, beta, initial_state, cu_seqlens, True, scale, normalize_qk, None, chunk_size)


def state_space_duality(
    x: torch.Tensor,
    dt: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    *,
    skip: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
    chunk_size: int = CHUNK,
    cu_seqlens: torch.Tensor | None = None,
) -> Pair:
    """`longattn.linear.state_space_duality` (Mamba-2) for torch's autograd and `torch.compile`.

    Args:
        x: inputs `[B, H, L, P]`, or `[H, L, P]`; float32, float16 or bfloat16. May require grad, as may all tensors but
            `cu_seqlens`.
        dt: step sizes, at least 0 (after softplus and bias), floating `[B, H, L]`.
        a: rate of each head, at most 0, floating `[H]`.
        b: input projections `[B, groups, L, N]`.
        c: output projections, as `b`.
        skip: factor of `x` in the output, floating `[H]`; `None` is 0.
        initial_state: floating `[B, H, N, P]`; `None` is zeros.
        chunk_size: rows computed at once.
        cu_seqlens: bounds of packed sequences.

    Returns:
        `(output, states)`, both differentiable: the dtype of `c`, and float32.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit, or a tensor outside CPU memory.
        RuntimeError: from a second backward pass.

    Cost:
        As `linear_attention`.
    """
    _check({"x": x, "dt": dt, "a": a, "b": b, "c": c}, {"skip": skip})
    if a.shape != x.shape[-3:-2]:
        raise ValueError(f"a: got shape {tuple(a.shape)}, expected {tuple(x.shape[-3:-2])}, one per head of x")
    decays = dt * a[:, None]
    out, state = _run(c, b, x, decays, dt, initial_state, cu_seqlens, False, 1.0, False, None, chunk_size)
    if skip is not None:
        out = (out + skip[:, None, None] * x).to(out.dtype)
    return out, state


def selective_scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    *,
    skip: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    softplus: bool = False,
    z: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> Pair:
    """`longattn.linear.selective_scan` for torch's autograd and `torch.compile`, with equal results.

    Args:
        x: inputs `[B, L, E]`; float32, float16 or bfloat16. May require grad, as may all tensors but `cu_seqlens`.
        dt: step sizes `[B, L, E]`, at least 0 (after `dt_bias`); with `softplus` any numbers.
        a: rates `[E, N]`, finite and at most 0; floating.
        b: input weights `[B, L, N]`.
        c: output weights `[B, L, N]`.
        skip: floating `[E]`; `None` is zeros.
        dt_bias: added to `dt`, floating `[E]`; `None` is zeros.
        softplus: step sizes are `ln(1 + exp(dt + dt_bias))`.
        z: gate `[B, L, E]`.
        initial_state: states before the first token, floating `[B, E, N]`; `None` is zeros.
        cu_seqlens: bounds `[S + 1]` of sequences that a batch of 1 holds.

    Returns:
        `(output, states)`, both differentiable: the dtype of `x`, and float32.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit, or a tensor outside CPU memory.
        RuntimeError: from a second backward pass.

    Cost:
        Forward as `longattn.linear.selective_scan`, backward as `longattn.linear.selective_scan_backward`.
    """
    required = {"x": x, "dt": dt, "a": a, "b": b, "c": c}
    optional = {"skip": skip, "dt_bias": dt_bias, "z": z, "initial_state": initial_state, "cu_seqlens": cu_seqlens}
    _check(required, optional)
    out, state = _scan(x, dt, a, b, c, skip, dt_bias, softplus, z, initial_state, cu_seqlens)
    return out, state


def _check(required: Mapping[str, torch.Tensor], optional: Mapping[str, torch.Tensor | None]) -> None:
    for name, x in required.items():
        if x is None:
            raise TypeError(f"{name}: got None, expected a torch tensor")
    check_tensors({**required, **optional})


def _rank(x: torch.Tensor, name: str, rank: int) -> None:
    check_tensors({name: x})
    if x is None or x.dim() != rank:
        raise ValueError(f"{name}: got {'None' if x is None else f'shape {tuple(x.shape)}'}, expected rank {rank}")


def _of_heads(logs: torch.Tensor, name: str, v: torch.Tensor) -> torch.Tensor:
    """A log decay per head as one per row."""
    if logs.shape != v.shape[-3:-2]:
        raise ValueError(f"{name}: got shape {tuple(logs.shape)}, expected {tuple(v.shape[-3:-2])}, one per head of v")
    return logs[:, None].expand(v.shape[:-1])


def _run(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None,
    beta: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    delta: bool,
    scale: float | None,
    normalize_qk: bool,
    normaliser: float | None,
    chunk_size: int,
) -> Pair:
    _check({"q": q, "k": k, "v": v}, {"g": g, "beta": beta, "initial_state": initial_state, "cu_seqlens": cu_seqlens})
    out, state = _recurrence(
        q, k, v, g, beta, initial_state, cu_seqlens, delta, scale, normalize_qk, normaliser, chunk_size
    )
    return out, state


# The operators: plain arguments in, tensors out. What they are given is checked by the functions they call.


@torch.library.custom_op("longattn::recurrence", mutates_args=(), device_types="cpu")
def _recurrence(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None,
    beta: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    delta: bool,
    scale: float | None,
    normalize_qk: bool,
    normaliser: float | None,
    chunk_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    return recurrence(
        q,
        k,
        v,
        g=g,
        channels=g is not None and g.dim() == q.dim(),
        beta=beta,
        delta=delta,
        scale=scale,
        unit=1e-6 if normalize_qk else None,
        normaliser=normaliser,
        initial_state=initial_state,
        chunk_size=chunk_size,
        cu_seqlens=cu_seqlens,
    )


@torch.library.custom_op("longattn::recurrence_backward", mutates_args=(), device_types="cpu")
def _recurrence_backward(
    d_out: torch.Tensor,
    d_state: torch.Tensor,
    out: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None,
    beta: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    delta: bool,
    scale: float | None,
    normalize_qk: bool,
    normaliser: float | None,
    chunk_size: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    found = linear.recurrence_backward(
        d_out,
        d_state,
        q,
        k,
        v,
        g=g,
        beta=beta,
        delta=delta,
        scale=scale,
        normalize_qk=normalize_qk,
        normalize=normaliser is not None,
        eps=normaliser or 0.0,
        out=out,
        initial_state=initial_state,
        chunk_size=chunk_size,
        cu_seqlens=cu_seqlens,
    )
    pairs = ((found.dg, g), (found.d_beta, beta), (found.d_initial_state, initial_state))
    return found.dq, found.dk, found.dv, *(_present(d, x, q) for d, x in pairs)


@torch.library.custom_op("longattn::selective_scan", mutates_args=(), device_types="cpu")
def _scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    skip: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    softplus: bool,
    z: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    out, state = linear.selective_scan(
        x,
        dt,
        a,
        b,
        c,
        skip=skip,
        dt_bias=dt_bias,
        softplus=softplus,
        z=z,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
    )
    return out, torch.from_numpy(state)


@torch.library.custom_op("longattn::selective_scan_backward", mutates_args=(), device_types="cpu")
def _scan_backward(
    d_out: torch.Tensor,
    d_state: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    skip: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    softplus: bool,
    z: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> tuple[
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
]:
    found = linear.selective_scan_backward(
        d_out,
        d_state,
        x,
        dt,
        a,
        b,
        c,
        skip=skip,
        dt_bias=dt_bias,
        softplus=softplus,
        z=z,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
    )
    pairs = ((found.d_skip, skip), (found.d_dt_bias, dt_bias), (found.dz, z), (found.d_initial_state, initial_state))
    present = (_present(d, of, x) for d, of in pairs)
    return found.dx, found.d_dt, found.da.to(a.dtype), found.db, found.dc, *present


def _present(d: torch.Tensor | None, of: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    """Operators have one number of results: gradients of what is absent are empty."""
    return like.new_empty(0) if d is None or of is None else d.to(of.dtype)


# Shapes and dtypes of the results, for tensors without memory.


@_recurrence.register_fake
def _(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None,
    beta: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    delta: bool,
    scale: float | None,
    normalize_qk: bool,
    normaliser: float | None,
    chunk_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    heads = v.shape[-3]
    out = q.new_empty(*q.shape[:-3], max(q.shape[-3], heads), q.shape[-2], v.shape[-1])
    front = q.shape[:-3] if cu_seqlens is None else (cu_seqlens.shape[0] - 1,)
    columns = v.shape[-1] + (normaliser is not None)
    return out, q.new_empty(*front, heads, q.shape[-1], columns, dtype=torch.float32)


def _fake(x: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    return like.new_empty(0) if x is None else x.new_empty(x.shape)


@_recurrence_backward.register_fake
def _(
    d_out: torch.Tensor, d_state: torch.Tensor, out: torch.Tensor | None, *given: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    q, k, v, g, beta, initial_state = (_fake(x, given[0]) for x in given[:6])
    return q, k, v, g, beta, initial_state


@_scan.register_fake
def _(
    x: torch.Tensor,
    dt: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    skip: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    softplus: bool,
    z: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return x.new_empty(x.shape), x.new_empty(sequences, x.shape[2], a.shape[1], dtype=torch.float32)


@_scan_backward.register_fake
def _(d_out: torch.Tensor, d_state: torch.Tensor, *given: Any) -> tuple[torch.Tensor, ...]:
    of = (*given[:7], given[8], given[9])
    return tuple(_fake(x, given[0]) for x in of)


# Gradients.


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Saves tensors as tensors and the rest as it is; of the results, what the gradient needs."""
    normaliser = inputs[10] if len(inputs) == 12 else None
    given = (*inputs, output[0] if normaliser is not None else None)
    ctx.save_for_backward(*(x for x in given if isinstance(x, torch.Tensor)))
    ctx.others = tuple(None if isinstance(x, torch.Tensor) else (x,) for x in given)


def _saved(ctx: Any) -> list[Any]:
    tensors = iter(ctx.saved_tensors)
    return [next(tensors) if other is None else other[0] for other in ctx.others]


def _wanted(gradients: tuple[torch.Tensor, ...], given: list[Any]) -> list[torch.Tensor | None]:
    return [None if x is None else d for d, x in zip(gradients, given, strict=True)]


def _backward_of_recurrence(ctx: Any, d_out: torch.Tensor, d_state: torch.Tensor) -> tuple[Any, ...]:
    *given, out = _saved(ctx)
    gradients = _recurrence_backward(d_out, d_state, out, *given)
    return *_wanted(gradients, given[:6]), *(None,) * 6


def _backward_of_scan(ctx: Any, d_out: torch.Tensor, d_state: torch.Tensor) -> tuple[Any, ...]:
    *given, _ = _saved(ctx)
    gradients = _scan_backward(d_out, d_state, *given)
    found = _wanted(gradients, [*given[:7], given[8], given[9]])
    return *found[:7], None, *found[7:], None


torch.library.register_autograd("longattn::recurrence", _backward_of_recurrence, setup_context=_save)
torch.library.register_autograd("longattn::selective_scan", _backward_of_scan, setup_context=_save)
torch.library.register_autograd("longattn::recurrence_backward", no_second_derivative)
torch.library.register_autograd("longattn::selective_scan_backward", no_second_derivative)
