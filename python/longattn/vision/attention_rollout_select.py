"""The tokens that an image's class token has looked at through all layers, and attention with them as queries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import Array, as_numpy, like
from longattn._checks import check_floating, dense_inputs, integer, items_of, real
from longattn.dense._query_key import query_key_inputs
from longattn.dense.attention import attention
from longattn.dense.prob_reduce import prob_reduce
from longattn.methods import Method
from longattn.pictures import example, seen
from longattn.reference import vision as reference


def attention_rollout_select(
    layers: Sequence[tuple[Array, Array]],
    q: Array,
    k: Array,
    v: Array,
    *,
    count: int | None = None,
    ratio: float = 0.1,
    scale: float | None = None,
) -> Array:
    """Attention whose queries are the class token and the tokens of most accumulated relevance, over all keys.

    The relevance is that of `attention_rollout`. The share of tokens is 10 % for fine distinctions and 30 % for
    finding persons again, as far as the paper is clear about it.

    Args:
        layers: `(q, k)` of each layer before, from the first, `[B, h, N, D]` each; token 0 is the class token.
        q: queries of this attention `[B, Hq, N, D]`, of all tokens; float32, float16 or bfloat16.
        k: keys `[B, Hkv, N, D]`; any of the three dtypes.
        v: values `[B, Hkv, N, Dv]`; dtype of `k`.
        count: how many tokens besides the class token; `None` is `ratio` of them, rounded, at least 1.
        ratio: see there.
        scale: factor on all logits; `None` is `D ** -0.5`.

    Returns:
        `[B, Hq, 1 + count, Dv]`, in the kind and dtype of `q`: the class token first, then the others in the order of
        the sequence (`relevant_tokens` says which).

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        `2 * layers * h * N ** 2 * D` multiply-adds for the relevance, and `Hq * count * N * (D + Dv)`.

    References:
        H. Zhu et al., "Dual Cross-Attention Learning for Fine-Grained Visual Categorization and Object
        Re-Identification", 2022, arXiv:2205.02151.

    Example:
        >>> import numpy as np, longattn.vision
        >>> q, k, v = np.random.default_rng(0).standard_normal((3, 1, 2, 50, 8), dtype=np.float32)
        >>> longattn.vision.attention_rollout_select([(q, k), (k, q)], q, k, v).shape
        (1, 2, 6, 8)
    """
    qn, kn = query_key_inputs(q, k)
    if qn.ndim != 4 or qn.shape[2] != kn.shape[2]:
        raise ValueError(f"q: got shape {qn.shape}, expected [B, Hq, N, D] with as many tokens as k")
    relevance = np.asarray(attention_rollout(layers, scale=scale))
    tokens = qn.shape[2]
    if relevance.shape != (len(qn), tokens):
        raise ValueError(f"layers: got relevance of shape {relevance.shape}, expected {(len(qn), tokens)} as q")
    chosen = relevant_tokens(relevance, count=count, ratio=ratio)
    rows = np.take_along_axis(qn, chosen[:, None, :, None], axis=2)
    return like(q, np.asarray(attention(rows, kn, v, scale=scale)))


def attention_rollout(layers: Sequence[tuple[Array, Array]], *, scale: float | None = None) -> Array:
    """How much of each token has reached the class token through all layers.

    With `A_l` the mean over heads of a layer's weights and `M_l = (A_l + I) / 2`, row 0 of `M_L .. M_1`: it is carried
    from the last layer down, a row times a matrix that is never stored.

    Args:
        layers: `(q, k)` of each layer, from the first, `[B, h, N, D]` each; float32, float16 or bfloat16.
        scale: factor on the logits; `None` is `D ** -0.5`.

    Returns:
        Float32 `[B, N]` in the kind of the first `q`; each row sums to 1.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        `2 * layers * h * N ** 2 * D` multiply-adds; no matrix is stored.
    """
    pairs = items_of(layers, "layers", "pairs (q, k)")
    if not pairs:
        raise ValueError("layers: got none, expected at least one pair (q, k)")
    checked: list[tuple[NDArray[Any], NDArray[Any]]] = []
    for n, pair in enumerate(pairs):
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise TypeError(f"layers[{n}]: got {type(pair).__name__}, expected a pair (q, k)")
        qn, kn = query_key_inputs(*pair)
        shape = checked[0][0].shape if checked else qn.shape
        if qn.ndim != 4 or qn.shape[0] != shape[0] or {qn.shape[2], kn.shape[2]} != {shape[2]} or not shape[2]:
            raise ValueError(f"layers[{n}]: got shapes {qn.shape} and {kn.shape}, expected [B, h, N, D], N as in all")
        checked.append((qn, kn))
    batch, _, tokens, _ = checked[0][0].shape
    row = np.zeros((batch, tokens))
    row[:, 0] = 1
    for qn, kn in reversed(checked):
        weights = np.broadcast_to(row.astype(np.float32)[:, None], qn.shape[:3])
        sums = np.asarray(prob_reduce(qn, kn, column_mass=True, query_weights=weights, scale=scale).column_mass)
        row = 0.5 * (sums.mean(axis=1, dtype=np.float64) + row)
    return like(pairs[0][0], row.astype(np.float32))


def relevant_tokens(relevance: Array, *, count: int | None = None, ratio: float = 0.1) -> Any:
    """The class token and those of most relevance.

    Args:
        relevance: as `attention_rollout` gives it, `[B, N]`.
        count: how many besides the class token; `None` is `ratio` of them, rounded, at least 1.
        ratio: see there, above 0 and at most 1.

    Returns:
        Int64 `[B, 1 + count]`: 0, then ascending; of equal ones the first.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        A sort.
    """
    r = as_numpy(relevance, "relevance")
    check_floating(r, "relevance")
    if r.ndim != 2 or r.shape[1] < 2:
        raise ValueError(f"relevance: got shape {r.shape}, expected [B, N] with at least 2 tokens")
    others = r.shape[1] - 1
    share = real(ratio, "ratio")
    if not 0 < share <= 1:
        raise ValueError(f"ratio: got {ratio}, expected above 0 and at most 1")
    kept = max(1, round(share * others)) if count is None else integer(count, "count", 0, others)
    best = np.sort(np.argsort(-r[:, 1:], axis=1, kind="stable")[:, :kept] + 1, axis=1)
    return np.concatenate([np.zeros((len(r), 1), np.int64), best], axis=1)


def pair_wise_cross_attention(q: Array, k: Array, v: Array, *, scale: float | None = None) -> Array:
    """Attention of each image to its own tokens and to those of its partner, in one softmax; for training.

    Args:
        q: queries `[B, Hq, N, D]`, `B` even: images `2 i` and `2 i + 1` are partners; float32, float16 or bfloat16.
        k: keys `[B, Hkv, N, D]`; any of the three dtypes.
        v: values `[B, Hkv, N, Dv]`; dtype of `k`.
        scale: factor on the logits; `None` is `D ** -0.5`.

    Returns:
        `[B, Hq, N, Dv]`, in the kind and dtype of `q`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        Twice that of self-attention.
    """
    qn, kn = query_key_inputs(q, k)
    if qn.ndim != 4 or len(qn) % 2:
        raise ValueError(f"q: got shape {qn.shape}, expected [B, Hq, N, D] with an even number of images")
    # Partners' keys come second, by a view of the batch in which neighbours have changed places.
    _, _, vn = dense_inputs(q, k, v, double=False)
    other = np.arange(len(qn)) ^ 1
    keys, values = (np.concatenate([x, x[other]], axis=2) for x in (kn, vn))
    return like(q, np.asarray(attention(qn, keys, values, scale=scale)))


def _example() -> NDArray[np.bool_]:
    """What the chosen tokens see; the others do not ask."""
    q, k = example(64)
    layers = [(q, k), (k, q)]
    mask = np.zeros((64, 64), bool)
    chosen = relevant_tokens(attention_rollout(layers), ratio=0.3)[0]
    mask[chosen] = seen(lambda q, k, v: attention_rollout_select(layers, q, k, v, ratio=0.3), q, k)
    return mask


METHOD = Method(
    name="attention_rollout_select",
    family="vision",
    title="Dual Cross-Attention Learning for Fine-Grained Visual Categorization and Object Re-Identification",
    year=2022,
    arxiv="2205.02151",
    function=attention_rollout_select,
    reference=reference.attention_rollout_select,
    exact=True,
    modes=frozenset({"non-causal", "self"}),
    gqa=True,
    step=False,
    checks=(
        "One layer gives half its weights and half the identity, and rows sum to 1.",
        "Layers that see themselves only leave the class token alone.",
        "With all tokens chosen it is attention.",
        "A pair of equal images gives attention, and so does a partner whose keys do not count.",
    ),
    tests="tests/vision/test_attention_rollout_select.py",
    cost="`2 * layers * h * N ** 2 * D` multiply-adds for the relevance, and `Hq * count * N * (D + Dv)`.",
    mask=_example,
    axes=("tokens", "keys"),
)
