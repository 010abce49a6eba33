"""What keeps some tokens of an image, from its formulas: all weights at once, in float64, chosen one by one."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from longattn.reference.vision.layers import Float64, softmax, wide

Int64 = NDArray[np.int64]


def weights(q: Any, k: Any, scale: float | None = None, seen: Any = True) -> Float64:
    """Softmax weights `[..., Hq, Lq, Lk]` of keys that are seen."""
    q, k = wide(q), wide(k)
    k = np.repeat(k, q.shape[-3] // k.shape[-3], axis=-3)
    s = (q.shape[-1] ** -0.5 if scale is None else scale) * (q @ k.swapaxes(-1, -2))
    return softmax(np.where(seen, s, -np.inf))


def best(values: Any, count: int) -> list[int]:
    """Numbers of the largest, ascending; of equal ones the first."""
    return sorted(sorted(range(len(values)), key=lambda i: -values[i])[:count])


def gwpr_token_ranking(
    q: ArrayLike,
    k: ArrayLike,
    *,
    ratio: float,
    iterations: int = 10,
    tol: float = 1e-4,
    damping: float = 1.0,
    head_weights: ArrayLike | None = None,
    cross: bool = False,
    scale: float | None = None,
) -> tuple[Float64, Int64, Int64]:
    """See `longattn.vision.gwpr_token_ranking`: importance, kept tokens, and which of them each copies."""
    p = weights(q, k, scale)
    batch, heads, tokens, _ = p.shape
    shares = np.ones(heads) if head_weights is None else wide(head_weights)
    a = np.einsum("bhij,h->bij", p, shares / shares.sum())
    s = np.full((batch, tokens), 1 / tokens)
    for _ in range(iterations):
        after = np.einsum("bij,bi->bj", a, s)
        if cross:
            after = np.einsum("bij,bj->bi", a, after)
        after = damping * after / after.sum(axis=1, keepdims=True) + (1 - damping) / tokens
        change, s = np.abs(after - s).sum(axis=1).max(), after
        if change < tol:
            break
    kept = np.array([best(row, tokens - int(ratio * tokens)) for row in s])
    source = np.zeros((batch, tokens), np.int64)
    for b in range(batch):
        like = a[b]
        if cross:
            x = wide(q)[b].swapaxes(0, 1).reshape(tokens, -1)
            x = x / np.linalg.norm(x, axis=1, keepdims=True)
            like = x @ x.T
        for i in range(tokens):
            same = np.flatnonzero(kept[b] == i)
            source[b, i] = same[0] if same.size else np.argmax(like[i, kept[b]])
    return s, kept, source


def hierarchical_attention_pruning(
    object_layer: Any,
    deep_layer: Any,
    *,
    budget: int,
    width: int,
    alpha: float = 0.1,
    prefix: int = 1,
    scale: float | None = None,
) -> Int64:
    """See `longattn.vision.hierarchical_attention_pruning`."""
    middle, deep = (weights(q, k, scale).mean(axis=(1, 2))[:, prefix:] for q, k in (object_layer, deep_layer))
    return np.array([pick_hierarchical(a, b, budget, width, alpha) for a, b in zip(middle, deep, strict=True)])


def pick_hierarchical(middle: Float64, deep: Float64, budget: int, width: int, alpha: float) -> list[int]:
    """See `longattn.vision.pick_hierarchical`."""
    n = len(middle)
    order = sorted(range(n), key=lambda i: -middle[i])
    anchors = order[: round(budget * alpha / 5)]
    kept = list(anchors)
    around = {min(max(i + d, 0), n - 1) for i in anchors for d in (-1, 1, -width, width)}
    kept += [i for i in order if i in around and i not in anchors]
    kept = kept[:budget]
    kept += [i for i in sorted(range(n), key=lambda i: -deep[i]) if i not in kept][: budget - len(kept)]
    return sorted(kept)


def pyramid_token_pruning(
    region_scores: ArrayLike,
    token_scores: ArrayLike,
    instruction_scores: ArrayLike | None = None,
    *,
    keep: float,
    alpha: float = 0.5,
    tau: float = 1.0,
) -> Int64:
    """See `longattn.vision.pyramid_token_pruning`."""
    s = wide(token_scores)
    regions, tokens = s.shape
    budgets = split_budget(softmax(wide(region_scores) / tau), round(keep * s.size), tokens)
    mixed = s / s.sum(axis=1, keepdims=True)
    if instruction_scores is not None:
        t = wide(instruction_scores)
        mixed = alpha * mixed + (1 - alpha) * t / t.sum(axis=1, keepdims=True)
    return np.array([r * tokens + j for r in range(regions) for j in best(mixed[r], budgets[r])], np.int64)


def split_budget(shares: Any, total: int, capacity: int) -> list[int]:
    """See `longattn.vision.split_budget`."""
    quota = [0.0] * len(shares)
    free = list(range(len(shares)))
    while free:
        given = [float(shares[i]) for i in free]
        given = given if sum(given) > 0 else [1.0] * len(free)
        left = total - sum(quota[i] for i in range(len(quota)) if i not in free)
        for i, share in zip(free, given, strict=True):
            quota[i] = left * share / sum(given)
        full = [i for i in free if quota[i] > capacity]
        if not full:
            break
        for i in full:
            quota[i] = capacity
        free = [i for i in free if i not in full]
    budgets = [int(x + 1e-9) for x in quota]
    room = [i for i in range(len(quota)) if budgets[i] < capacity]
    for i in sorted(room, key=lambda i: -round(quota[i] - budgets[i], 9))[: total - sum(budgets)]:
        budgets[i] += 1
    return budgets


def attention_adaptive_pooling(
    assignment: ArrayLike,
    self_layers: Any,
    cross_layers: Any,
    *,
    threshold: float = 0.1,
    uncertainty: float = 1.0,
    least: int = 256,
    scale: float | None = None,
) -> tuple[Int64, Int64]:
    """See `longattn.vision.attention_adaptive_pooling`."""
    z = wide(assignment)[:-1, :-1]
    kept = []
    for image in range(2):
        sure = z.sum(axis=1 - image) >= threshold * uncertainty
        stays = sure.copy()
        for layers in (self_layers, cross_layers):
            mass = weights(layers[image][0], layers[image][1], scale).sum(axis=(0, 1))
            if sure.any():
                stays |= mass >= sorted(mass[sure])[(int(sure.sum()) - 1) // 2]
        every = len(sure) <= least or not sure.any()
        kept.append(np.flatnonzero(np.ones_like(stays) if every else stays))
    return kept[0], kept[1]


def text_guided_vision_pruning(
    q: ArrayLike,
    k: ArrayLike,
    text: ArrayLike,
    image: ArrayLike,
    *,
    keep: int,
    prior: ArrayLike | None = None,
    softmax: bool = False,
    scale: float | None = None,
) -> Int64:
    """See `longattn.vision.text_guided_vision_pruning`."""
    places = np.asarray(image)
    found = vision_scores(q, k, text, image, prior=prior, softmax=softmax, scale=scale)
    return np.array([places[best(row, keep)] for row in found])


def vision_scores(
    q: ArrayLike,
    k: ArrayLike,
    text: ArrayLike,
    image: ArrayLike,
    *,
    prior: ArrayLike | None = None,
    softmax: bool = False,
    scale: float | None = None,
) -> Float64:
    """See `longattn.vision.vision_scores`."""
    length = np.shape(q)[2]
    p = weights(q, k, scale, np.tri(length, dtype=bool)).mean(axis=1)
    words, places = np.asarray(text), np.asarray(image)
    own = p[:, words][:, :, words].sum(axis=1)
    w = own / own.sum(axis=1, keepdims=True) if prior is None else wide(prior)
    if softmax:
        w = np.exp(w) / np.exp(w).sum(axis=1, keepdims=True)
    return np.asarray(np.einsum("bt,btv->bv", w, p[:, words][:, :, places]))


def zeroth_order_token_pruning(
    x: ArrayLike,
    projector: Any,
    *,
    keep: int,
    directions: int = 16,
    step: float = 0.01,
    power: float = 1.0,
    seed: int = 0,
) -> Int64:
    """See `longattn.vision.zeroth_order_token_pruning`; `projector` is a function of float64."""
    sensitivity = projector_sensitivity(x, projector, directions=directions, step=step, seed=seed)
    return np.array([diverse_topk(s, projector(row), keep, power) for s, row in zip(sensitivity, wide(x), strict=True)])


def projector_sensitivity(
    x: ArrayLike, projector: Any, *, directions: int = 16, step: float = 0.01, seed: int = 0
) -> Float64:
    """See `longattn.vision.projector_sensitivity`."""
    x = wide(x)
    drawn = np.random.default_rng(seed).standard_normal((directions, x.shape[2]))
    out = np.zeros(x.shape[:2])
    for b, n in np.ndindex(*out.shape):
        norm = np.linalg.norm(x[b, n]) / np.sqrt(x.shape[2])
        h = step * norm if norm > 0 else step
        ends = (np.linalg.norm(projector(x[b, n] + h * u) - projector(x[b, n] - h * u)) for u in drawn)
        out[b, n] = sum(ends) / directions / (2 * h)
    return out


def diverse_topk(values: Float64, vectors: Float64, count: int, power: float = 1.0) -> list[int]:
    """See `longattn.vision.diverse_topk`."""
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    chosen = [int(np.argmax(values))][:count]
    while len(chosen) < count:
        near = (unit @ unit[chosen].T).max(axis=1)
        gain = (values / values.max()) ** power * np.maximum(1 - near, 0)
        gain[chosen] = -np.inf
        chosen.append(int(np.argmax(gain)))
    return sorted(chosen)
