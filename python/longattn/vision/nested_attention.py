"""Cross-attention in which the values of some keys depend on the query."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import Array
from longattn._checks import dense_inputs, finite, integer, mask_scores, scale_factor
from longattn.dense.attention import attention
from longattn.methods import Method
from longattn.reference import vision as reference
from longattn.vision._inputs import Float32, returned


def nested_attention(
    q: Array,
    k: Array,
    v: Array,
    nested: Mapping[int, tuple[Array, Array]],
    *,
    scale: float | None = None,
    mask: Array | None = None,
    value_norm: float | None = None,
) -> Array:
    """Attention to text whose special keys have values that each query reads from a set of its own.

    The weights `A` are those of plain attention to `k`. For a special key `s` with nested keys and values, query `i`
    gets `u_i = attention(q_i, nested keys, nested values)` in place of `v_s`: the output is
    `sum over plain j of A_ij v_j + sum over special s of A_is u_i`.

    Args:
        q: queries `[B, Hq, Lq, D]`; float32, float16 or bfloat16.
        k: keys `[B, Hkv, Lk, D]`; any of the three dtypes.
        v: values `[B, Hkv, Lk, Dv]`; dtype of `k`.
        nested: for each special key's number its keys `[B, Hkv, m, D]` and values `[B, Hkv, m, Dv]`.
        scale: factor on the logits, of the nested ones too; `None` is `D ** -0.5`.
        mask: booleans, broadcastable to `[B, Hq, Lq, Lk]`: which keys are seen.
        value_norm: rescale each `u_i` to this multiple of the norm of `v_s`; `None` leaves it. What the paper does
            about norms is not stated precisely.

    Returns:
        `[B, Hq, Lq, Dv]`, in the kind and dtype of `q`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        `Hq * Lq * (Lk + sum of m) * (D + Dv)` multiply-adds, and `Lk * D` more per query and special key.

    References:
        O. Patashnik et al., "Nested Attention: Semantic-aware Attention Values for Concept Personalization", 2025,
        arXiv:2501.01407.

    Example:
        >>> import numpy as np, longattn.vision
        >>> rng = np.random.default_rng(0)
        >>> q, k, v = (rng.standard_normal((1, 2, n, 8), dtype=np.float32) for n in (10, 7, 7))
        >>> more = tuple(rng.standard_normal((2, 1, 2, 4, 8), dtype=np.float32))
        >>> longattn.vision.nested_attention(q, k, v, {3: more}).shape
        (1, 2, 10, 8)
    """
    qn, kn, vn = dense_inputs(q, k, v, double=False)
    if qn.ndim != 4:
        raise ValueError(f"q: got shape {qn.shape}, expected [B, Hq, Lq, D]")
    factor = scale_factor(scale, qn.shape[-1])
    seen = None if mask is None else mask_scores(mask, (*qn.shape[:3], kn.shape[2]))
    ratio = None if value_norm is None else finite(value_norm, "value_norm")
    if not isinstance(nested, Mapping):
        raise TypeError(f"nested: got {type(nested).__name__}, expected a mapping of key numbers to keys and values")
    special = {integer(s, "nested", 0, kn.shape[2] - 1): _pair(pair, s, qn, kn, vn) for s, pair in nested.items()}
    rows = np.asarray(qn, np.float32)
    # Values of special keys are zero here; what stands for them comes by their weights.
    plain = np.array(vn)
    plain[:, :, list(special)] = 0
    out, lse = attention(rows, kn, plain, scale=factor, mask=seen, return_lse=True)
    group = qn.shape[1] // kn.shape[1]
    for s, (keys, values) in special.items():
        own = attention(rows, keys, values, scale=factor)
        if ratio is not None:
            norm = np.linalg.norm(np.asarray(vn[:, :, s], np.float32), axis=-1)
            size = np.linalg.norm(own, axis=-1)
            own = own * (ratio * np.repeat(norm, group, axis=1)[..., None] / np.maximum(size, 1e-12))[..., None]
        out += _share(rows, kn, s, lse, factor, seen)[..., None] * own
    return returned(q, out)


def _pair(pair: Any, s: object, q: NDArray[Any], k: NDArray[Any], v: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise TypeError(f"nested[{s}]: got {type(pair).__name__}, expected a pair (keys, values)")
    _, keys, values = dense_inputs(q, *pair, double=False)
    if keys.shape[1] != k.shape[1] or values.shape[-1] != v.shape[-1] or keys.shape[2] == 0:
        raise ValueError(
            f"nested[{s}]: got shapes {keys.shape} and {values.shape}, expected heads and width of k and v"
        )
    return keys, values


def _share(
    q: Float32, k: NDArray[Any], s: int, lse: NDArray[np.float32], scale: float, mask: NDArray[np.bool_] | None
) -> Float32:
    """The weight of one key for every query, `[B, Hq, Lq]`; 0 where it is not seen."""
    own = None if mask is None else mask[..., s : s + 1]
    key = k[:, :, s : s + 1]
    _, logit = attention(q, key, key, scale=scale, mask=own, return_lse=True)
    with np.errstate(invalid="ignore"):
        share: Float32 = np.where(np.isneginf(logit), np.float32(0), np.exp(logit - lse))
    return share


METHOD = Method(
    name="nested_attention",
    family="vision",
    title="Nested Attention: Semantic-aware Attention Values for Concept Personalization",
    year=2025,
    arxiv="2501.01407",
    function=nested_attention,
    reference=reference.nested_attention,
    exact=True,
    modes=frozenset({"non-causal", "cross"}),
    gqa=True,
    step=False,
    checks=(
        "A nested set of one whose value is the key's own gives attention.",
        "Nested values that are all equal count as that value.",
        "Without special keys it is attention.",
        "A special key that is masked has no influence.",
    ),
    tests="tests/vision/test_nested_attention.py",
    cost="`Hq * Lq * (Lk + sum of m) * (D + Dv)` multiply-adds.",
)
