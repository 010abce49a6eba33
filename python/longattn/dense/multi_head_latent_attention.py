"""Multi-head latent attention: keys and values of all heads are made of one short row per token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import Array, as_numpy
from longattn._checks import check_float_storage, flag, result_array, returned, scale_factor
from longattn.dense._head_options import options_of_heads
from longattn.dense.attention import attention
from longattn.methods import Method
from longattn.reference import dense as reference

#: The expanded form makes keys and values of as many heads at a time as fit into this many bytes, one at least.
EXPANDED_BYTES = 1 << 28


def multi_head_latent_attention(
    q_nope: Array,
    q_rope: Array,
    latent: Array,
    k_rope: Array | None,
    w_uk: Array,
    w_uv: Array,
    *,
    causal: bool = False,
    scale: float | None = None,
    absorb: bool | None = None,
    return_lse: bool = False,
    out: Array | None = None,
    **options: Any,
) -> Any:
    """Attention over a latent KV cache: `R` numbers per token from which every head makes its keys and values.

    Head `h` has the keys `[latent w_uk[h]^T, k_rope]` and the values `latent w_uv[h]`; the part `k_rope`, which holds
    the positions, is shared by all heads. Two forms compute the same:

    - *Expanded*: the heads' keys and values are made, then attended to. For prefill.
    - *Absorbed*: `q_nope . (latent w_uk^T) = (q_nope w_uk) . latent`, so the queries go into the space of the latents
      once, and all heads read one KV head of width `R + Dr`, whose values are the first `R` columns of the keys'
      own memory; what comes out goes through `w_uv`. For decode: `R + Dr` numbers are read per token.

    `absorb=None` takes the form with fewer multiply-adds. With `P` visible pairs of query and key per head,

        absorbed: H * (Lq * R * (Dn + Dv) + P * (2 * R + Dr))
        expanded: H * (Lk * R * (Dn + Dv) + P * (Dn + Dr + Dv))

    Args:
        q_nope: the queries' part without positions, `[B, H, Lq, Dn]`; float32, float16 or bfloat16.
        q_rope: their part with positions, already rotated, `[B, H, Lq, Dr]`; dtype of `q_nope`.
        latent: `[B, Lk, R]`; any of the three dtypes. With `k_rope=None` the packed cache `[B, Lk, R + Dr]`, latents
            first, which the absorbed form reads where it lies. `store.keys` of a
            `KVStore(kv_heads=1, head_dim=R + Dr, value_dim=1)` is one of `B = 1`.
        k_rope: the keys' part with positions, rotated, `[B, Lk, Dr]`; dtype of `latent`.
        w_uk: from latents to keys, `[H, Dn, R]`; any of the three dtypes.
        w_uv: from latents to values, `[H, R, Dv]`; likewise.
        causal: as in `longattn.attention`, bottom-right aligned.
        scale: factor on the logits; `None` is `(Dn + Dr) ** -0.5`.
        absorb: True for the absorbed form, False for the expanded one, `None` for the cheaper one.
        return_lse: also return the log-sum-exp of the logits.
        out: array `[B, H, Lq, Dv]` of the kind and dtype of `q_nope` that receives the result; must not overlap any
            input.
        options: other options of `longattn.attention`, such as `window`, `softcap`, `mask` and `sinks`; not `state`.

    Returns:
        The output `[B, H, Lq, Dv]` in the kind and dtype of `q_nope`: `out` itself where it was given. With
        `return_lse`, the pair with lse, float32 `[B, H, Lq]`. Projections are float32, so that both forms agree up
        to float32's rounding whatever the storage.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes that do not fit each other, or what `longattn.attention` refuses.

    Cost:
        As above. Copies: the absorbed form makes its queries, `B * H * Lq * (R + Dr)` float32, and, unless the cache
        is packed, lays latents and `k_rope` side by side, which is one copy of the cache. The expanded form makes
        float32 keys and values of as many heads at a time as fit into 256 MiB (one head at least). Weights that are
        not float32 are converted in each call: keep float32 ones for decode.

    References:
        DeepSeek-AI, "DeepSeek-V2: A Strong, Economical, and Efficient Mixture-of-Experts Language Model", 2024,
        arXiv:2405.04434.

    Example:
        >>> import numpy as np, longattn as la
        >>> rng = np.random.default_rng(0)
        >>> q = rng.standard_normal((1, 16, 1, 128 + 64), dtype=np.float32)
        >>> cache = rng.standard_normal((1, 1000, 512 + 64), dtype=np.float32)  # latents and k_rope side by side
        >>> w_uk = rng.standard_normal((16, 128, 512), dtype=np.float32)
        >>> w_uv = rng.standard_normal((16, 512, 128), dtype=np.float32)
        >>> call = la.dense.multi_head_latent_attention
        >>> call(q[..., :128], q[..., 128:], cache, None, w_uk, w_uv, causal=True).shape
        (1, 16, 1, 128)
    """
    causal, return_lse = flag(causal, "causal"), flag(return_lse, "return_lse")
    parts = _inputs(q_nope, q_rope, latent, k_rope, w_uk, w_uv)
    batch, heads, rows, nope = parts.q_nope.shape
    rope, value_dim = parts.q_rope.shape[-1], parts.w_uv.shape[-1]
    factor = scale_factor(scale, nope + rope)
    absorb = _cheaper_absorbed(parts, causal) if absorb is None else flag(absorb, "absorb")
    if "state" in options:
        raise TypeError("state: got one, expected none: `merge` joins results over parts of the cache")
    inputs: dict[str, NDArray[Any] | None] = {"q_nope": parts.q_nope, "q_rope": parts.q_rope, "latent": parts.latent}
    inputs |= {"k_rope": parts.k_rope, "w_uk": parts.w_uk, "w_uv": parts.w_uv}
    result = result_array(out, q_nope, (batch, heads, rows, value_dim), parts.q_nope.dtype, inputs)
    options |= {"causal": causal, "scale": factor}
    lse = _absorbed(parts, result, options) if absorb else _expanded(parts, result, options)
    return returned(out, q_nope, result, lse if return_lse else None)


@dataclass(frozen=True, slots=True)
class _Parts:
    """The arguments as numpy arrays.

    Attributes:
        packed: the cache with latents and k_rope side by side, `None` where it does not lie so.
        k_rope: a view of `packed` where that exists.
    """

    q_nope: NDArray[Any]
    q_rope: NDArray[Any]
    latent: NDArray[Any]
    k_rope: NDArray[Any]
    packed: NDArray[Any] | None
    w_uk: NDArray[Any]
    w_uv: NDArray[Any]


def _inputs(q_nope: Array, q_rope: Array, latent: Array, k_rope: Array | None, w_uk: Array, w_uv: Array) -> _Parts:
    given = {"q_nope": q_nope, "q_rope": q_rope, "latent": latent, "w_uk": w_uk, "w_uv": w_uv}
    a = {name: as_numpy(x, name) for name, x in given.items()}
    shapes = {"q_nope": "[B, H, Lq, Dn]", "q_rope": "[B, H, Lq, Dr]", "latent": "[B, Lk, R]"}
    shapes |= {"k_rope": "[B, Lk, Dr]", "w_uk": "[H, Dn, R]", "w_uv": "[H, R, Dv]"}
    if k_rope is not None:
        a["k_rope"] = as_numpy(k_rope, "k_rope")
    for name, x in a.items():
        check_float_storage(x, name)
        if x.ndim != shapes[name].count(",") + 1 or x.shape[-1] == 0:
            raise ValueError(f"{name}: got shape {x.shape}, expected {shapes[name]}")

    def expect(name: str, shape: tuple[int, ...], why: str) -> None:
        if a[name].shape != shape:
            raise ValueError(f"{name}: got shape {a[name].shape}, expected {shape}, {why}")

    batch, heads, rows, nope = a["q_nope"].shape
    rope, (_, _, rank), keys = a["q_rope"].shape[-1], a["w_uk"].shape, a["latent"].shape[1]
    expect("q_rope", (batch, heads, rows, rope), "rows as in q_nope")
    expect("w_uk", (heads, nope, rank), "[H, Dn, R] with H and Dn of q_nope")
    expect("w_uv", (heads, rank, a["w_uv"].shape[-1]), "[H, R, Dv] with H and R of w_uk")
    if a["q_rope"].dtype != a["q_nope"].dtype:
        raise TypeError(f"q_rope: got dtype {a['q_rope'].dtype}, expected {a['q_nope'].dtype} as q_nope")
    packed = None
    if k_rope is None:
        expect("latent", (batch, keys, rank + rope), "latents and k_rope side by side (k_rope is None)")
        packed = a["latent"]
        a |= {"latent": packed[..., :rank], "k_rope": packed[..., rank:]}
    else:
        expect("latent", (batch, keys, rank), "[B, Lk, R] with B of q_nope and R of w_uk")
        expect("k_rope", (batch, keys, rope), "rows as in latent and width as in q_rope")
        if a["k_rope"].dtype != a["latent"].dtype:
            raise TypeError(f"k_rope: got dtype {a['k_rope'].dtype}, expected {a['latent'].dtype} as latent")
    return _Parts(packed=packed, **a)


def _cheaper_absorbed(parts: _Parts, causal: bool) -> bool:
    """Whether the absorbed form takes fewer multiply-adds; see `multi_head_latent_attention`."""
    rows, nope = parts.q_nope.shape[-2:]
    keys, rank = parts.latent.shape[-2:]
    rope, value_dim = parts.q_rope.shape[-1], parts.w_uv.shape[-1]
    seeing = min(rows, keys)  # the last rows; the ones before them see no key when causal
    pairs = seeing * keys - seeing * (seeing - 1) // 2 if causal else rows * keys
    projected = rank * (nope + value_dim)
    absorbed = rows * projected + pairs * (2 * rank + rope)
    expanded = keys * projected + pairs * (nope + rope + value_dim)
    return bool(absorbed <= expanded)


def _absorbed(parts: _Parts, result: NDArray[Any], options: dict[str, Any]) -> NDArray[np.float32]:
    """Writes the output to `result`; returns lse."""
    batch, heads, rows, nope = parts.q_nope.shape
    rank = parts.latent.shape[-1]
    cache = parts.packed
    if cache is None:
        cache = np.concatenate((parts.latent, parts.k_rope), axis=-1)
    # Heads first: one matrix product per head over all rows of the batch.
    q = np.empty((heads, batch, rows, cache.shape[-1]), np.float32)
    queries = np.ascontiguousarray(parts.q_nope.swapaxes(0, 1), np.float32).reshape(heads, batch * rows, nope)
    np.matmul(queries, _float32(parts.w_uk), out=q.reshape(heads, batch * rows, cache.shape[-1])[..., :rank])
    q[..., rank:] = parts.q_rope.swapaxes(0, 1)
    mixed = np.empty((heads, batch, rows, rank), np.float32)
    keys = cache[:, None]
    _, lse = attention(
        q.swapaxes(0, 1), keys, keys[..., :rank], return_lse=True, out=mixed.swapaxes(0, 1), **options
    )  # fmt: skip
    out = np.matmul(mixed.reshape(heads, batch * rows, rank), _float32(parts.w_uv))
    result[...] = out.reshape(heads, batch, rows, out.shape[-1]).swapaxes(0, 1)
    of_rows: NDArray[np.float32] = lse
    return of_rows


def _expanded(parts: _Parts, result: NDArray[Any], options: dict[str, Any]) -> NDArray[np.float32]:
    """Writes the output to `result`; returns lse."""
    batch, heads, rows, nope = parts.q_nope.shape
    keys, rope = parts.k_rope.shape[-2:]
    value_dim = parts.w_uv.shape[-1]
    lse = np.empty((batch, heads, rows), np.float32)
    latent = _float32(parts.latent)[:, None]
    at_once = max(1, EXPANDED_BYTES // max(1, 4 * batch * keys * (nope + rope + value_dim)))
    for first in range(0, heads, at_once):
        some = slice(first, min(first + at_once, heads))
        count = some.stop - first
        q = np.empty((batch, count, rows, nope + rope), np.float32)
        q[..., :nope], q[..., nope:] = parts.q_nope[:, some], parts.q_rope[:, some]
        k = np.empty((batch, count, keys, nope + rope), np.float32)
        np.matmul(latent, _float32(parts.w_uk[some]).swapaxes(-1, -2), out=k[..., :nope])
        k[..., nope:] = parts.k_rope[:, None]
        v = np.matmul(latent, _float32(parts.w_uv[some]))
        result[:, some], lse[:, some] = attention(q, k, v, return_lse=True, **options_of_heads(options, some, heads))
    return lse


def _float32(x: NDArray[Any]) -> NDArray[np.float32]:
    return x.astype(np.float32, copy=False)


METHOD = Method(
    name="multi_head_latent_attention",
    family="exact",
    title="DeepSeek-V2: A Strong, Economical, and Efficient Mixture-of-Experts Language Model",
    year=2024,
    arxiv="2405.04434",
    function=multi_head_latent_attention,
    reference=reference.multi_head_latent_attention,
    exact=True,
    modes=frozenset({"causal", "non-causal", "self", "cross"}),
    gqa=False,
    checks=(
        "The absorbed and the expanded form agree.",
        "Both equal multi-head attention over the keys and values that each head makes.",
        "Decode steps give the rows of the prefill.",
        "A packed cache gives the bits of latents and `k_rope` given apart.",
    ),
    tests="tests/dense/test_multi_head_latent_attention.py",
    cost=(
        "Multiply-adds per head, `P` visible pairs: absorbed `Lq * R * (Dn + Dv) + P * (2 * R + Dr)`, expanded "
        "`Lk * R * (Dn + Dv) + P * (Dn + Dr + Dv)`. Absorbed decode reads `R + Dr` numbers per token."
    ),
)
