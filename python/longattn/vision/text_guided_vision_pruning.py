"""Image tokens kept by how the text attends to them, each word by how the text attends to it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import Array, like
from longattn._checks import flag, integer
from longattn.dense._query_key import query_key_inputs
from longattn.dense.prob_reduce import prob_reduce
from longattn.methods import Method
from longattn.pictures import example, kept_pairs
from longattn.reference import vision as reference
from longattn.vision.token_budgets import scores, token_numbers


def text_guided_vision_pruning(
    q: Array,
    k: Array,
    text: Array,
    image: Array,
    *,
    keep: int,
    prior: Array | None = None,
    softmax: bool = False,
    scale: float | None = None,
) -> NDArray[np.int64]:
    """The image tokens of a prompt to keep after a layer, by its causal attention.

    A word's weight is what the words of the text give it, from itself on; an image token's score is the sum of what
    the words give it, by their weights. Weights are the softmax over all tokens that a word sees, averaged over heads.
    `vision_scores` gives the scores.

    Args:
        q: queries of all tokens `[B, Hq, L, D]`; float32, float16 or bfloat16.
        k: keys `[B, Hkv, L, D]`; any of the three dtypes.
        text: integers `[T]`, ascending: places of the words.
        image: integers `[V]`, ascending: places of the image's tokens.
        keep: image tokens that stay, at most `V`.
        prior: floating `[B, T]`, weights of the words in place of those from the text; `None` is those.
        softmax: take a softmax of the words' weights.
        scale: factor on the logits; `None` is `D ** -0.5`.

    Returns:
        Int64 `[B, keep]`: places of the image tokens that stay, ascending; of equal scores the first. Those left out
        go from hidden states and from the caches of later layers; positions of the others do not change.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        `3 * Hq * T * L * D` multiply-adds; no weights are stored.

    References:
        W. Zhang et al., "AdaptInfer: Adaptive Token Pruning for Vision-Language Model Inference with Dynamical Text
        Guidance", 2025, arXiv:2508.06084.

    Example:
        >>> import numpy as np, longattn.vision
        >>> q, k = np.random.default_rng(0).standard_normal((2, 1, 4, 60, 16), dtype=np.float32)
        >>> image, text = np.arange(5, 41), np.arange(41, 60)
        >>> longattn.vision.text_guided_vision_pruning(q, k, text, image, keep=9).shape
        (1, 9)
    """
    found = np.asarray(vision_scores(q, k, text, image, prior=prior, softmax=softmax, scale=scale))
    count = integer(keep, "keep", 0, found.shape[1])
    kept = np.sort(np.argsort(-found, axis=1, kind="stable")[:, :count], axis=1)
    return token_numbers(image, "image", np.asarray(k).shape[2])[kept]


def vision_scores(
    q: Array,
    k: Array,
    text: Array,
    image: Array,
    *,
    prior: Array | None = None,
    softmax: bool = False,
    scale: float | None = None,
) -> Array:
    """How much the text attends to each image token; see `text_guided_vision_pruning`.

    Args:
        q: as there.
        k: as there.
        text: as there.
        image: as there.
        prior: as there.
        softmax: as there.
        scale: as there.

    Returns:
        Float32 `[B, V]` in the kind of `q`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        `3 * Hq * T * L * D` multiply-adds.
    """
    qn, kn = query_key_inputs(q, k)
    if qn.ndim != 4 or kn.shape[2] != qn.shape[2]:
        raise ValueError(f"q: got shapes {qn.shape} and {kn.shape}, expected [B, H, L, D] of one length")
    length = qn.shape[2]
    words, places = token_numbers(text, "text", length), token_numbers(image, "image", length)
    if np.isin(words, places).any():
        raise ValueError("text: got places that image has, too, expected others")
    rows, heads = qn[:, :, words], qn.shape[1]
    # A word sees the tokens up to itself.
    seen = np.arange(length) <= words[:, None]
    turned = flag(softmax, "softmax")
    lse = None
    if prior is None:
        first = prob_reduce(rows, kn, column_mass=True, mask=seen, scale=scale)
        lse = first.lse
        weights = np.asarray(first.column_mass)[:, :, words].mean(axis=1, dtype=np.float64)
        weights /= weights.sum(axis=1, keepdims=True)
    else:
        weights = scores(prior, "prior", (len(qn), len(words)))
    if turned:
        weights = np.exp(weights - weights.max(axis=1, keepdims=True))
        weights /= weights.sum(axis=1, keepdims=True)
    given = np.repeat(weights[:, None], heads, axis=1).astype(np.float32)
    mass = prob_reduce(rows, kn, column_mass=True, query_weights=given, mask=seen, lse=lse, scale=scale).column_mass
    return like(q, np.asarray(mass)[:, :, places].mean(axis=1, dtype=np.float64).astype(np.float32))


def attention_shift(layer_scores: Array) -> NDArray[np.float64]:
    """How much the scores of image tokens change from each layer to the next, averaged over examples.

    Where this falls after having been large, pruning hurts least: the paper prunes right after such layers, which it
    finds once for a model.

    Args:
        layer_scores: floating `[layers, B, V]`: `vision_scores` of every layer.

    Returns:
        Float64 `[layers - 1]`: mean over examples of the sum of absolute changes.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: another shape, or numbers that are not finite.

    Cost:
        A pass over the scores.
    """
    x = scores(layer_scores, "layer_scores", (None, None, None))
    if x.shape[0] < 2 or not x.shape[1]:
        raise ValueError(f"layer_scores: got shape {x.shape}, expected at least 2 layers and 1 example")
    return np.asarray(np.abs(np.diff(x, axis=0)).sum(axis=2).mean(axis=1))


METHOD = Method(
    name="text_guided_vision_pruning",
    family="vision",
    title="AdaptInfer: Adaptive Token Pruning for Vision-Language Model Inference with Dynamical Text Guidance",
    year=2025,
    arxiv="2508.06084",
    function=text_guided_vision_pruning,
    reference=reference.text_guided_vision_pruning,
    exact=True,
    modes=frozenset({"causal", "self"}),
    gqa=True,
    step=False,
    checks=(
        "Keeping as many as there are is the identity.",
        "Equal weights of the words give the mean attention of the text to the image.",
        "A text of one word is the rule of the last token.",
    ),
    tests="tests/vision/test_text_guided_vision_pruning.py",
    cost="`3 * Hq * T * L * D` multiply-adds; no weights are stored.",
    mask=lambda: np.tril(
        kept_pairs(
            np.concatenate(
                [
                    np.arange(4),
                    text_guided_vision_pruning(*example(64), np.arange(48, 64), np.arange(4, 48), keep=14)[0],
                    np.arange(48, 64),
                ]
            ),
            64,
        )
    ),
)
