"""Attention of an image's tokens to the image and to learned prompts, each token having its own few of these."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import Array, as_numpy, like, reshaped
from longattn._checks import check_floating, dense_inputs, flag, integer, items_of, one_of, scale_factor
from longattn.dense.attention import attention
from longattn.methods import Method
from longattn.pictures import example
from longattn.reference import vision as reference
from longattn.sparse.index_sparse_attention import index_sparse_attention
from longattn.sparse.row_lists import RowLists

#: What becomes of the weight of prompts that a token does not see.
MODES = ("post", "pre")


def token_coordinated_prompt_attention(
    q: Array,
    k: Array,
    v: Array,
    cls_prompts: tuple[Array, Array],
    image_prompts: tuple[Array, Array],
    cls_chosen: Array,
    image_chosen: Array,
    *,
    mode: str = "post",
    open_pools: bool = False,
    scale: float | None = None,
) -> Array:
    """Attention of a class token and patches to themselves and to the prompts that each has chosen from a pool.

    The class token sees its prompts of one pool, each patch its own of another; prompts are keys and values only.
    `match_prompts` chooses them. With the mode "pre" hidden prompts have no logit. With "post", as in the public code,
    the softmax is over all prompts of both pools, and weights of hidden ones are lost: outputs are those of "pre" times
    the share of the weight that is seen.

    Args:
        q: queries of the class token and the patches `[B, Hq, 1 + n, D]`; float32, float16 or bfloat16.
        k: their keys `[B, Hkv, 1 + n, D]`; any of the three dtypes.
        v: their values `[B, Hkv, 1 + n, Dv]`; dtype of `k`.
        cls_prompts: keys `[Hkv, Mc, lc, D]` and values `[Hkv, Mc, lc, Dv]` of the class token's prompts, `lc` tokens
            each; dtype of `k`.
        image_prompts: those of the patches', `[Hkv, Mi, li, D]` and `[Hkv, Mi, li, Dv]`.
        cls_chosen: integers `[B, kc]`: the class token's prompts, none twice.
        image_chosen: integers `[B, n, ki]`: each patch's, none twice.
        mode: "post" or "pre".
        open_pools: all tokens see all prompts of both pools, whatever was chosen: visual prompt tuning.
        scale: factor on the logits; `None` is `D ** -0.5`.

    Returns:
        `[B, Hq, 1 + n, Dv]`, in the kind and dtype of `q`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        Attention of the tokens to themselves, and `Hq * n * ki * li * (D + Dv)` multiply-adds; "post" scores all
        prompts besides.

    References:
        Z. Liu et al., "Token Coordinated Prompt Attention is Needed for Visual Prompting", 2025, arXiv:2505.02406.

    Example:
        >>> import numpy as np, longattn.vision
        >>> rng = np.random.default_rng(0)
        >>> q, k, v = rng.standard_normal((3, 1, 2, 17, 8), dtype=np.float32)
        >>> pool = rng.standard_normal((2, 2, 5, 1, 8), dtype=np.float32)
        >>> x = rng.standard_normal((1, 17, 16), dtype=np.float32)
        >>> keys = rng.standard_normal((5, 16), dtype=np.float32)
        >>> chosen, _ = longattn.vision.match_prompts(x, keys, 2)
        >>> longattn.vision.token_coordinated_prompt_attention(q, k, v, pool, pool, chosen[:, 0], chosen[:, 1:]).shape
        (1, 2, 17, 8)
    """
    qn, kn, vn = dense_inputs(q, k, v, double=False)
    if qn.ndim != 4 or kn.shape[2] != qn.shape[2] or not qn.shape[2]:
        raise ValueError(f"q: got shapes {qn.shape} and {kn.shape}, expected [B, H, 1 + n, D] of one length")
    batch, _, tokens, dim = qn.shape
    one_of(mode, "mode", MODES)
    every, factor = flag(open_pools, "open_pools"), scale_factor(scale, dim)
    pools = [
        _pool(pair, name, kn, vn) for pair, name in ((cls_prompts, "cls_prompts"), (image_prompts, "image_prompts"))
    ]
    sizes = [pair[0].shape[1:3] for pair in pools]
    of_cls = _chosen(cls_chosen, "cls_chosen", (batch, None), sizes[0][0])[:, None]
    of_image = _chosen(image_chosen, "image_chosen", (batch, tokens - 1, None), sizes[1][0])
    own = attention(qn.astype(np.float32), kn, vn, scale=factor, return_lse=True)
    keys, values = (
        np.repeat(np.concatenate([reshaped(x, x.shape[0], -1, x.shape[3]) for x in parts], axis=1)[None], batch, axis=0)
        for parts in zip(*pools, strict=True)
    )
    count = keys.shape[2]
    if not count or not batch:
        return like(q, own[0].astype(qn.dtype))
    first = sizes[0][0] * sizes[0][1]
    seen = np.full((batch, tokens, count), every)
    if not every:
        _open(seen[:, :1, :first], of_cls, sizes[0])
        _open(seen[:, 1:, first:], of_image, sizes[1])
    counts = seen.sum(axis=2)
    ends = np.concatenate([[0], np.cumsum(counts)])
    indptr = np.stack([ends[b * tokens : (b + 1) * tokens + 1] for b in range(batch)])[:, None]
    indices = np.nonzero(seen)[2].astype(np.uint32)
    lists = RowLists(indptr=indptr, indices=indices, lengths=(tokens, count), block_q=1)
    wide = qn.astype(np.float32)
    out, lse = index_sparse_attention(wide, keys, values, lists, state=own, scale=factor, return_lse=True)
    if mode == "post" and not every:
        # All prompts' share: values do not matter, so a column of them is enough.
        state = own[0][..., :1], own[1]
        _, of_all = attention(wide, keys, values[..., :1], state=state, scale=factor, return_lse=True)
        out = out * np.exp(lse - of_all)[..., None]
    return like(q, np.asarray(out, np.float32).astype(qn.dtype))


def match_prompts(x: Array, keys: Array, count: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The prompts that match each token best, by the cosine of its features and the prompts' keys.

    Args:
        x: features `[B, N, C]`; floating.
        keys: one key per prompt `[M, C]`; floating.
        count: prompts of each token, at most `M`; 9 of 20 in the paper.

    Returns:
        Int64 `[B, N, count]`, ascending, of equal ones the first; and float32 `[B, N, count]`: 1 less the cosine of
        each, whose sum is a term of the training loss.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        `B * N * M * C` multiply-adds by numpy, and a sort of the prompts for each token.
    """
    a, b = as_numpy(x, "x", any_strides=True), as_numpy(keys, "keys", any_strides=True)
    for y, name in ((a, "x"), (b, "keys")):
        check_floating(y, name)
    if a.ndim != 3 or b.ndim != 2 or a.shape[2] != b.shape[1]:
        raise ValueError(f"keys: got shape {b.shape} for x of shape {a.shape}, expected [B, N, C] and [M, C]")
    wanted = integer(count, "count", 0, len(b))
    units = []
    for y in (a, b):
        wide = y.astype(np.float32)
        units.append(wide / np.maximum(np.linalg.norm(wide, axis=-1, keepdims=True), 1e-12))
    cosine = units[0] @ units[1].T
    best = np.sort(np.argsort(-cosine, axis=-1, kind="stable")[..., :wanted], axis=-1)
    return best, 1 - np.take_along_axis(cosine, best, axis=-1)


def _pool(pair: Any, name: str, k: NDArray[Any], v: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    if len(items_of(pair, name, "keys and values")) != 2:
        raise TypeError(f"{name}: got {type(pair).__name__}, expected a pair of keys and values")
    keys, values = (as_numpy(x, f"{name}[{n}]") for n, x in enumerate(pair))
    for n, (x, own) in enumerate(((keys, k), (values, v))):
        if x.dtype != k.dtype:
            raise TypeError(f"{name}[{n}]: got dtype {x.dtype}, expected {k.dtype} as k")
        if x.ndim != 4 or x.shape[0] != own.shape[1] or x.shape[3] != own.shape[3] or x.shape[:3] != keys.shape[:3]:
            raise ValueError(f"{name}[{n}]: got shape {x.shape}, expected [{own.shape[1]}, M, l, {own.shape[3]}]")
    return keys, values


def _chosen(x: Array, name: str, shape: tuple[int | None, ...], prompts: int) -> NDArray[np.int64]:
    a = as_numpy(x, name, any_strides=True)
    if a.dtype.kind not in "iu":
        raise TypeError(f"{name}: got dtype {a.dtype}, expected integers")
    if a.ndim != len(shape) or any(n is not None and m != n for m, n in zip(a.shape, shape, strict=True)):
        raise ValueError(f"{name}: got shape {a.shape}, expected {tuple('k' if n is None else n for n in shape)}")
    ordered = np.sort(a.astype(np.int64), axis=-1)
    if a.size and (ordered.min() < 0 or ordered.max() >= prompts or (np.diff(ordered, axis=-1) == 0).any()):
        raise ValueError(f"{name}: got numbers out of range or twice, expected different ones from 0 to {prompts - 1}")
    return ordered


def _open(seen: NDArray[np.bool_], chosen: NDArray[np.int64], size: tuple[int, ...]) -> None:
    """Marks the tokens of chosen prompts."""
    prompts = np.zeros((*seen.shape[:2], size[0]), bool)
    np.put_along_axis(prompts, chosen, True, axis=2)
    seen[...] = np.repeat(prompts, size[1], axis=2)


def _example() -> NDArray[np.bool_]:
    """A class token and patches, and two pools of prompts."""
    q, k = example(64)
    keys = example(24)[1]
    pools = keys[0, :, :12, None], keys[0, :, 12:, None]
    rng = np.random.default_rng(0)
    chosen = [np.sort(rng.permuted(np.tile(np.arange(12), (64, 1)), axis=1)[:, :5], axis=1)[None]]
    eye = np.eye(64 + 24, dtype=np.float32)
    values = eye[:64][None, None], eye[64:76][None, :, None], eye[76:][None, :, None]
    out = token_coordinated_prompt_attention(
        q, k, values[0], (pools[0], values[1]), (pools[1], values[2]), chosen[0][:, 0], chosen[0][:, 1:]
    )
    mask: NDArray[np.bool_] = np.asarray(out)[0, 0] != 0
    return mask


METHOD = Method(
    name="token_coordinated_prompt_attention",
    family="vision",
    title="Token Coordinated Prompt Attention is Needed for Visual Prompting",
    year=2025,
    arxiv="2505.02406",
    function=token_coordinated_prompt_attention,
    reference=reference.token_coordinated_prompt_attention,
    exact=True,
    modes=frozenset({"non-causal", "self"}),
    gqa=True,
    step=False,
    checks=(
        "With both pools open to all it is attention with the prompts as further keys, in both modes.",
        'Without a chosen prompt and with the mode "pre" it is attention of the image alone.',
        'The mode "post" is "pre" times the weight that is seen.',
    ),
    tests="tests/vision/test_token_coordinated_prompt_attention.py",
    cost="Attention of the tokens to themselves, and `Hq * n * ki * li * (D + Dv)` multiply-adds.",
    mask=_example,
)
