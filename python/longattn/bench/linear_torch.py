"""Linear and recurrent methods as torch users write them: arguments as of ours, a call back.

Recurrences go in chunks where decays let them (`linear_peers.chunks`), a row at a time elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from longattn.bench import global_linear
from longattn.bench.each_method import Call
from longattn.bench.linear_peers import chunks
from longattn.bench.peers import tensor


def _tensors(*arrays: Any) -> list[Any]:
    return [tensor(np.ascontiguousarray(x)) for x in arrays]


def _quietly(call: Call) -> Call:
    import torch

    def quiet() -> Any:
        with torch.no_grad():
            return call()

    return quiet


def _chunked(delta: bool = False) -> Callable[..., Call]:
    """Arguments `q, k, v`, then gates and, of the delta rule, rates."""

    def plain(q: Any, k: Any, v: Any, *gates: Any, **_: Any) -> Call:
        names = ("g", "beta") if len(gates) == 2 else ("beta",) if delta else ("g",)
        q, k, v, *rest = _tensors(q, k, v, *gates)
        return lambda: chunks(q, k, v, **dict(zip(names, rest, strict=False)), delta=delta)

    return plain


def _of_heads(q: Any, k: Any, v: Any, logs: Any) -> Call:
    q, k, v, logs = _tensors(q, k, v, logs)
    g = logs[:, None].expand(v.shape[:-1])
    return lambda: chunks(q, k, v, g, delta=False)


def _retention(q: Any, k: Any, v: Any, *, scale: float) -> Call:
    return _of_heads(q, k, v, np.log1p(-(2.0 ** -(5.0 + np.arange(v.shape[1])))).astype(np.float32))


def _normalised(q: Any, k: Any, v: Any, eps: float) -> Any:
    """Causal linear attention of mapped queries and keys over the sum of their weights."""
    import torch

    sums = chunks(q, k, torch.cat([v, torch.ones_like(v[..., :1])], -1), delta=False)
    return sums[..., :-1] / (sums[..., -1:] + eps)


def _linear(q: Any, k: Any, v: Any) -> Call:
    q, k, v = _tensors(q, k, v)
    return lambda: _normalised(q, k, v, 1e-6)


def _based(q: Any, k: Any, v: Any) -> Call:
    import torch

    q, k, v = _tensors(q, k, v)

    def features(x: Any) -> Any:
        x = x * x.shape[-1] ** -0.25
        squares = (x[..., :, None] * x[..., None, :]).flatten(-2) / 2**0.5
        return torch.cat([torch.ones_like(x[..., :1]), x, squares], -1)

    return lambda: _normalised(features(q), features(k), v, 1e-6)


def _causal_performer(q: Any, k: Any, v: Any, w: Any) -> Call:
    import torch

    q, k, v, w = _tensors(q, k, v, w)

    def features(x: Any) -> Any:
        x = x * x.shape[-1] ** -0.25
        return torch.exp(x @ w.mT - (x * x).sum(-1, keepdim=True) / 2)

    return lambda: _normalised(features(q), features(k), v, 0.0)


def _hgrn2(q: Any, v: Any, g: Any) -> Call:
    q, v, g = _tensors(q, v, g)
    return lambda: chunks(q, 1 - g.exp(), v, g, delta=False)


def _regla(q: Any, k: Any, v: Any, gate: Any, refine: Any) -> Call:
    q, k, v, gate, r = _tensors(q, k, v, gate, refine)

    def call() -> Any:
        kept = (1 - r) * gate**2 + r * (1 - (1 - gate) ** 2)
        out = chunks(q.exp(), k.exp(), v, kept.log(), delta=False)
        return out / out.square().mean(-1, keepdim=True).sqrt()

    return call


def _rwkv6(q: Any, k: Any, v: Any, g: Any, u: Any) -> Call:
    q, k, v, g, u = _tensors(q, k, v, g, u)

    def call() -> Any:
        # States before a row are those behind it less its own key, before its decay.
        back = (-g).exp()
        own = (q * k * (u[:, None] - back)).sum(-1, keepdim=True)
        return chunks(q * back, k, v, g, delta=False) + own * v

    return call


def _rwkv7(q: Any, k: Any, v: Any, g: Any, a: Any, b: Any) -> Call:
    import torch

    q, k, v, g, a, b = _tensors(q, k, v, g, a, b)

    def call() -> Any:
        state, out = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1]), torch.empty_like(v)
        decays = g.exp()
        for t in range(q.shape[2]):
            read = torch.einsum("bhd,bhde->bhe", a[:, :, t], state)
            state = state * decays[:, :, t, :, None] + b[:, :, t, :, None] * read[:, :, None]
            state += k[:, :, t, :, None] * v[:, :, t, None]
            out[:, :, t] = torch.einsum("bhd,bhde->bhe", q[:, :, t], state)
        return out

    return call


def _slots(q: Any, k: Any, v: Any, g: Any) -> Call:
    import torch

    q, k, v, g = _tensors(q, k, v, g)
    scale = q.shape[-1] ** -0.5

    def call() -> Any:
        shape = (*q.shape[:2], g.shape[-1])
        keys, values, out = q.new_zeros(*shape, q.shape[-1]), q.new_zeros(*shape, v.shape[-1]), torch.empty_like(v)
        decays = g.exp()
        for t in range(q.shape[2]):
            kept = decays[:, :, t, :, None]
            keys = kept * keys + (1 - kept) * k[:, :, t, None]
            values = kept * values + (1 - kept) * v[:, :, t, None]
            weights = (scale * torch.einsum("bhmd,bhd->bhm", keys, q[:, :, t])).softmax(-1)
            out[:, :, t] = torch.einsum("bhm,bhmd->bhd", weights, values)
        return out

    return call


def _duality(x: Any, dt: Any, a: Any, b: Any, c: Any) -> Call:
    x, dt, a, b, c = _tensors(x, dt, a, b, c)

    def call() -> Any:
        q, k = (y.expand(*x.shape[:3], -1) for y in (c, b))
        return chunks(q, k, dt[..., None] * x, dt * a[:, None], delta=False)

    return call


def _flare(latents: Any, k: Any, v: Any) -> Call:
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    r, k, v = _tensors(latents[None], k, v)
    return lambda: sdpa(k, r, sdpa(r, k, v, scale=1.0), scale=1.0)


def _global(formula: str) -> Callable[..., Call]:
    """A formula of `bench global-linear`, with the directions and agents that it draws itself."""
    return lambda q, k, v, *_, **__: global_linear.torch_formulas(q, k, v)[formula]


def _pool(x: Any) -> Call:
    from torch.nn.functional import avg_pool2d

    (x,) = _tensors(x)

    def call() -> Any:
        means = avg_pool2d(x.movedim(3, 1), 3, 1, 1, count_include_pad=False)
        return (means.movedim(1, 3) - x).contiguous()

    return call


def _learned_pool(cls: Any, x: Any, w_q: Any, w_k: Any, w_v: Any, w_o: Any, heads: int) -> Call:
    import torch
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    cls, x, w_q, w_k, w_v, w_o = _tensors(cls[None], x, w_q, w_k, w_v, w_o)

    def call() -> Any:
        rows = torch.cat([cls.expand(len(x), -1, -1), x], dim=1)
        q, k, v = ((y @ w).unflatten(2, (heads, -1)).transpose(1, 2) for y, w in ((cls, w_q), (rows, w_k), (rows, w_v)))
        return cls + 1e-4 * (sdpa(q, k, v).transpose(1, 2).flatten(2) @ w_o)

    return call


_CALLS: dict[str, Callable[..., Call]] = {
    "agent_attention": _global("agent"),
    "based": _based,
    "causal_performer_attention": _causal_performer,
    "delta_rule_attention": _chunked(delta=True),
    "efficient_attention": _global("efficient"),
    "fastmax_attention": _global("fastmax"),
    "flare_attention": _flare,
    "focused_linear_attention": _global("focused"),
    "gated_delta_rule": _chunked(delta=True),
    "gated_linear_attention": _chunked(),
    "gated_slot_attention": _slots,
    "hgrn2": _hgrn2,
    "inline_attention": _global("inline"),
    "kimi_delta_attention": _chunked(delta=True),
    "l2vit_linear_attention": _global("l2vit"),
    "lasp2_linear_attention": _chunked(),
    "learned_aggregation_pool": _learned_pool,
    "lightning_attention": lambda q, k, v, slopes: _of_heads(q, k, v, -slopes),
    "linear_attention": _linear,
    "linear_match_attention": _global("linear match"),
    "magnitude_aware_linear_attention": _global("magnitude-aware"),
    "performer_attention": _global("performer"),
    "pool_token_mixer": _pool,
    "regla": _regla,
    "retention": _retention,
    "rwkv6": _rwkv6,
    "rwkv7": _rwkv7,
    "simplified_linear_attention": _global("simplified"),
    "state_space_duality": _duality,
}


def _without_gradients(make: Callable[..., Call]) -> Callable[..., Call]:
    return lambda *arguments, **options: _quietly(make(*arguments, **options))


#: torch's call of each method, without gradients.
PLAIN: dict[str, Callable[..., Call]] = {name: _without_gradients(make) for name, make in _CALLS.items()}
