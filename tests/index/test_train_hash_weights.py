"""Training of hash weights: the gradient, and that it is worth it."""

import re

import numpy as np
import pytest

import longattn as la
from longattn.index.train_hash_weights import labels, loss_and_gradient
from longattn.reference import retrieval as reference
from longattn.vectors import synthetic
from random_arrays import BF16, F32, normal

train = la.index.train_hash_weights


@pytest.mark.parametrize("terms", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0.01, 1, 2)], ids=str)
@pytest.mark.parametrize("bits", [3, 12])
def test_gradient_against_differences(rng, terms, bits):
    w, q, k = (normal(rng, shape, np.float64) for shape in ((7, bits), (4, 7), (30, 7)))
    y = labels(q @ k.T).astype(np.float64)
    _, gradient = loss_and_gradient(w, q, k, y, 0.7, *terms)
    step = 1e-6
    for d in range(7):
        for t in range(bits):
            moved = [w.copy(), w.copy()]
            moved[0][d, t] += step
            moved[1][d, t] -= step
            up, down = (loss_and_gradient(m, q, k, y, 0.7, *terms)[0] for m in moved)
            np.testing.assert_allclose(
                (up - down) / (2 * step), gradient[d, t], rtol=1e-5, atol=1e-7 * abs(gradient).max()
            )


def test_loss_against_its_formula(rng):
    w, q, k = (normal(rng, shape, np.float64) for shape in ((6, 5), (3, 6), (40, 6)))
    y = labels(q @ k.T).astype(np.float64)
    expected = reference.hash_loss(w, q, k, 0.3, 0.01, 1.0, 2.0)
    np.testing.assert_allclose(loss_and_gradient(w, q, k, y, 0.3, 0.01, 1.0, 2.0)[0], expected, rtol=1e-10)


def test_no_gradient_at_orthonormal_weights(rng):
    w = np.linalg.qr(rng.standard_normal((8, 8)))[0]
    _, gradient = loss_and_gradient(np.eye(8), normal(rng, (2, 8)), normal(rng, (9, 8)), np.zeros((2, 9)), 1.0, 0, 0, 1)
    assert (gradient == 0).all() and np.isfinite(w).all()


def test_labels():
    y = labels(np.array([np.arange(40.0), -np.arange(40.0)]))
    np.testing.assert_allclose(y[0, -4:], [1, 1 + 19 / 3, 1 + 38 / 3, 20], rtol=1e-6)
    np.testing.assert_array_equal(y[1], y[0][::-1])
    assert (y[0, :36] == -1).all()
    assert labels(np.ones((1, 3))).tolist() == [[20, -1, -1]]


def mass_found(head, weights, top_k=64):
    """Mass of the rows selected by codes over that of the best ones, over the query groups."""
    keys, _, q, _ = head
    found = []
    k_bits = keys @ weights > 0
    for of_group in q:
        logits = of_group @ keys.T * 128**-0.5
        share = np.exp(logits - logits.max(axis=-1, keepdims=True))
        share = (share / share.sum(axis=-1, keepdims=True)).mean(axis=0)
        distance = ((of_group @ weights > 0)[:, None] != k_bits[None]).sum(axis=-1).sum(axis=0)
        found.append(share[np.argsort(distance, kind="stable")[:top_k]].sum() / np.sort(share)[-top_k:].sum())
    return float(np.mean(found))


def test_trained_weights_beat_random_ones():
    losses = []
    for number in (0, 3):
        head = synthetic.head("synthetic", number, 6144, 24, 0)
        keys, _, _, prefill = head
        queries = np.ascontiguousarray(prefill.transpose(1, 0, 2))
        call = {"epochs": 4, "similarity": 0.1, "seed": 1, "progress": lambda *told: losses.append(told)}
        trained = train(queries, keys[None], 64, **call)
        assert trained.shape == (1, 128, 64) and trained.dtype == F32
        random = [mass_found(head, la.index.random_weights(1, 128, 64, seed=seed)[0]) for seed in range(3)]
        assert mass_found(head, trained[0]) > 1.2 * max(random), (mass_found(head, trained[0]), random)
    assert [told[:2] for told in losses] == [(0, epoch) for epoch in range(4)] * 2


def test_the_loss_falls(rng):
    losses = []
    k = normal(rng, (1, 400, 16))
    q = normal(rng, (1, 200, 16)) * np.repeat(np.float32([3, 0]), (4, 12))  # four of the dimensions matter
    call = {"epochs": 8, "learning_rate": 0.01, "similarity": 1.0, "sharpness": 1.0, "sample": 400}
    weights = train(q, k, 4, **call, progress=lambda *told: losses.append(told[2]))[0]
    assert losses[-1] < losses[0] - 0.5 and np.argmin(losses) > 3, losses
    assert np.linalg.norm(weights[:4]) > 2 * np.linalg.norm(weights[4:])


def test_seeds_and_heads(rng):
    q, k = normal(rng, (4, 40, 16)), normal(rng, (2, 200, 16))
    run = {"epochs": 2, "batch": 8, "sample": 100}
    first = train(q, k, 24, **run)
    np.testing.assert_array_equal(first, train(q, k, 24, **run))
    assert not np.array_equal(first, train(q, k, 24, **run, seed=1))
    # A head's weights do not depend on the other heads' numbers.
    other_q, other_k = q.copy(), k.copy()
    other_q[2:] *= 2
    other_k[1] += 1
    np.testing.assert_array_equal(first[0], train(other_q, other_k, 24, **run)[0])
    # More bits than dimensions, other dtypes, a sample beyond the keys.
    wide = train(q.astype(BF16), k.astype(BF16), 40, epochs=1, sample=10_000)
    assert wide.shape == (2, 16, 40) and np.isfinite(wide).all()


Q, K = np.ones((4, 6, 8), F32), np.ones((2, 9, 8), F32)

BAD = [
    ({"queries": Q[0]}, ValueError, "queries: got shape (6, 8), expected [heads, rows, head_dim]"),
    ({"queries": Q[:, :0]}, ValueError, "queries: got shape (4, 0, 8)"),
    ({"queries": Q * np.nan}, ValueError, "queries: got NaN or infinity"),
    ({"queries": Q.astype(np.float64)}, TypeError, "queries: got dtype float64"),
    ({"queries": Q.tolist()}, TypeError, "queries: got list"),
    ({"keys": K[..., :7]}, ValueError, "keys: got 2 heads of width 7, expected a divisor of the 4 heads"),
    ({"keys": np.ones((3, 9, 8), F32)}, ValueError, "keys: got 3 heads"),
    ({"keys": K[:, :0]}, ValueError, "keys: got shape (2, 0, 8)"),
    ({"code_bits": 0}, ValueError, "code_bits: got 0, expected 1 to 512"),
    ({"code_bits": 1.5}, TypeError, "code_bits: got 1.5"),
    ({"epochs": 0}, ValueError, "epochs: got 0"),
    ({"batch": 0}, ValueError, "batch: got 0"),
    ({"sample": 1}, ValueError, "sample: got 1"),
    ({"learning_rate": 0}, ValueError, "learning_rate: got 0, expected a positive number"),
    ({"learning_rate": float("inf")}, ValueError, "learning_rate: got inf"),
    ({"momentum": 1}, ValueError, "momentum: got 1, expected at least 0 and below 1"),
    ({"sharpness": -1}, ValueError, "sharpness: got -1"),
    ({"balance": float("nan")}, ValueError, "balance: got nan, expected a number"),
    ({"orthogonality": "2"}, TypeError, "orthogonality: got '2', expected a number"),
    ({"seed": -1}, ValueError, "seed: got -1"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=lambda x: re.sub(r"\s+", " ", str(x))[:40])
def test_bad_arguments(change, error, message):
    with pytest.raises(error, match=re.escape(message)):
        train(**({"queries": Q, "keys": K} | change))
