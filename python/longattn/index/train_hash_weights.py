"""Learned weights of sign codes: those that tell the keys a query attends to from the others."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import FLOATS, Array, as_numpy
from longattn._checks import function, integer, real
from longattn.index._index import check_seed

Floats = NDArray[np.float32]

#: Most bits of a code.
MAX_BITS = 512

#: Share of a query's keys that count as its own, and the labels of the best and the last of them.
TOP, BEST, LAST = 0.1, 20.0, 1.0


def train_hash_weights(
    queries: Array,
    keys: Array,
    code_bits: int = 128,
    *,
    epochs: int = 15,
    batch: int = 32,
    sample: int = 1024,
    learning_rate: float = 0.1,
    momentum: float = 0.9,
    sharpness: float = 0.1,
    similarity: float = 0.01,
    balance: float = 1.0,
    orthogonality: float = 2.0,
    seed: int = 0,
    progress: Callable[[int, int, float], None] | None = None,
) -> Floats:
    """Weights of `Hashes`, learned from the queries and keys of a prefill.

    With the relaxed code `h(x) = 2 / (1 + exp(-sharpness * x W)) - 1`, a query q and n keys whose labels `y_j` fall
    linearly from 20 to 1 over the 10 % of largest `q . k_j` and are -1 for the others, the loss of one KV head is

        similarity * mean_j y_j |h(q) - h(k_j)|^2  +  balance * |sum_j (h(q) + h(k_j)) / (n * code_bits)|^2
            +  orthogonality * |W^T W - I|_F,

    averaged over the queries of a batch, which share a random sample of keys. Stochastic gradient descent with
    momentum; float32.

    Args:
        queries: `[Hq, Nq, D]` as they are when attention sees them, at most as many heads as a group per KV head;
            those of a group train its KV head's weights together. float32, float16 or bfloat16.
        keys: `[Hkv, Nk, D]`, likewise.
        code_bits: bits of a code, at most 512.
        epochs: passes over the queries.
        batch: queries per step.
        sample: keys per step, at most as many as there are.
        learning_rate: of the descent.
        momentum: of the descent, at least 0 and below 1.
        sharpness: how near the relaxed code is to a sign.
        similarity: weight of the loss's first term.
        balance: weight of its second term: every bit should be 1 half the time.
        orthogonality: weight of its third term: no two bits should be alike.
        seed: seed of the first weights and of the order of queries and keys.
        progress: called as `progress(head, epoch, loss)` after each epoch with the mean loss of its steps.

    Returns:
        float32 `[Hkv, D, code_bits]`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes that do not fit each other, no queries or keys, numbers that are not finite, or an argument
            out of range.

    Cost:
        About `6 * D * code_bits * (sample + batch) + 6 * code_bits * sample * batch` operations a step: some seconds
        per KV head with the defaults and 4,096 queries.

    References:
        P. Gong et al., "HATA: Trainable and Hardware-Efficient Hash-Aware Top-k Attention for Scalable Large Model
        Inference", 2025.
    """
    qs, ks = _vectors(queries, "queries"), _vectors(keys, "keys")
    (heads, count, dim), kv_heads = qs.shape, len(ks)
    if heads % kv_heads or ks.shape[2] != dim:
        raise ValueError(
            f"keys: got {kv_heads} heads of width {ks.shape[2]}, expected a divisor of the {heads} heads of queries, "
            f"of width {dim}"
        )
    code_bits = integer(code_bits, "code_bits", 1, MAX_BITS)
    epochs, batch, sample = integer(epochs, "epochs", 1), integer(batch, "batch", 1), integer(sample, "sample", 2)
    rates = [
        _positive(value, name, zero)
        for value, name, zero in (
            (learning_rate, "learning_rate", False),
            (sharpness, "sharpness", False),
            (similarity, "similarity", True),
            (balance, "balance", True),
            (orthogonality, "orthogonality", True),
        )
    ]
    if not 0 <= real(momentum, "momentum") < 1:
        raise ValueError(f"momentum: got {momentum}, expected at least 0 and below 1")
    if progress is not None:
        function(progress, "progress")
    seed = check_seed(seed)
    rate, terms = rates[0], rates[1:]
    weights = np.empty((kv_heads, dim, code_bits), np.float32)
    for head in range(kv_heads):
        rng = np.random.default_rng([seed, head])
        group = qs.reshape(kv_heads, -1, count, dim)[head].reshape(-1, dim)
        w = _orthonormal(rng, dim, code_bits)
        velocity = np.zeros_like(w)
        for epoch in range(epochs):
            losses = []
            for some in np.array_split(rng.permutation(len(group)), -(-len(group) // batch)):
                chosen = rng.choice(ks.shape[1], min(sample, ks.shape[1]), replace=False)
                q, k = group[some], ks[head, chosen]
                loss, gradient = loss_and_gradient(w, q, k, labels(q @ k.T), *terms)
                velocity = momentum * velocity + gradient
                w = (w - rate * velocity).astype(np.float32)
                losses.append(loss)
            if progress is not None:
                progress(head, epoch, float(np.mean(losses)))
        weights[head] = w
    return weights


def labels(logits: NDArray[np.floating]) -> Floats:
    """Labels `[queries, keys]` of logits: 20 to 1 over each query's 10 % of best keys, at least one, -1 elsewhere."""
    keys = logits.shape[1]
    own = max(1, round(TOP * keys))
    order = np.argsort(-logits, axis=1, kind="stable")[:, :own]
    marked = np.full(logits.shape, -1, np.float32)
    np.put_along_axis(marked, order, np.linspace(BEST, LAST, own, dtype=np.float32)[None], axis=1)
    return marked


def loss_and_gradient(
    w: NDArray[np.floating],
    q: NDArray[np.floating],
    k: NDArray[np.floating],
    y: NDArray[np.floating],
    sharpness: float,
    similarity: float,
    balance: float,
    orthogonality: float,
) -> tuple[float, NDArray[np.floating]]:
    """Loss of queries `[b, D]` and keys `[n, D]` with labels `[b, n]`, and its gradient by the weights `[D, bits]`.

    In the dtype of the arguments.
    """
    b, n, bits = len(q), len(k), w.shape[1]
    # 2 sigmoid(z) - 1 = tanh(z / 2)
    hq, hk = np.tanh(0.5 * sharpness * (q @ w)), np.tanh(0.5 * sharpness * (k @ w))
    of_query, of_key = y.sum(axis=1, keepdims=True), y.sum(axis=0)[:, None]
    mixed = y @ hk
    pull = similarity / (b * n)
    apart = (of_query * hq**2).sum() + (of_key * hk**2).sum() - 2 * (hq * mixed).sum()
    d_hq = 2 * pull * (of_query * hq - mixed)
    d_hk = 2 * pull * (of_key * hk - y.T @ hq)
    lean = (n * hq + hk.sum(axis=0)) / (n * bits)
    d_hq += 2 * balance / b / bits * lean
    d_hk += 2 * balance / b / (n * bits) * lean.sum(axis=0)
    gram = w.T @ w
    gram[np.diag_indices(bits)] -= 1
    skew = float(np.sqrt((gram**2).sum()))
    loss = pull * apart + balance / b * (lean**2).sum() + orthogonality * skew
    gradient = 0.5 * sharpness * (q.T @ (d_hq * (1 - hq**2)) + k.T @ (d_hk * (1 - hk**2)))
    if skew > 0:
        gradient += 2 * orthogonality / skew * (w @ gram)
    return float(loss), gradient


def _orthonormal(rng: np.random.Generator, dim: int, bits: int) -> Floats:
    """Random columns, orthonormal in blocks of at most `dim`."""
    blocks = [np.linalg.qr(rng.standard_normal((dim, dim)))[0] for _ in range(-(-bits // dim))]
    return np.concatenate(blocks, axis=1)[:, :bits].astype(np.float32)


def _vectors(values: Array, name: str) -> Floats:
    given = as_numpy(values, name)
    if given.dtype not in FLOATS:
        raise TypeError(f"{name}: got dtype {given.dtype}, expected float32, float16 or bfloat16")
    if given.ndim != 3 or 0 in given.shape:
        raise ValueError(f"{name}: got shape {given.shape}, expected [heads, rows, head_dim], none of them 0")
    vectors = np.ascontiguousarray(given, np.float32)
    if not np.isfinite(vectors).all():
        raise ValueError(f"{name}: got NaN or infinity, expected finite numbers")
    return vectors


def _positive(value: object, name: str, zero: bool) -> float:
    number = real(value, name)
    if not (number >= 0 if zero else number > 0) or number == np.inf:
        raise ValueError(
            f"{name}: got {value}, expected a {'finite number of 0 or more' if zero else 'positive number'}"
        )
    return number
