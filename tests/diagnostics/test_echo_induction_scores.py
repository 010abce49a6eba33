"""Echo and induction scores, and the heads that they choose."""

import numpy as np
import pytest

import tolerances
from longattn.diagnostics import alibi_scope, echo_induction_scores, razor_heads
from longattn.reference import diagnostics as reference
from random_arrays import DTYPES, normal


@pytest.mark.parametrize("period", [1, 2, 7, 20, 39])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (6, 2)])
def test_scores_are_sums_of_weights(rng, isa, *, heads, kv_heads, period):
    q, k = normal(rng, (heads, 40, 16), spread=2.0), normal(rng, (kv_heads, 40, 16))
    got = echo_induction_scores(q, k, period)
    expected = reference.echo_induction_scores(q, k, period)
    for x, y in zip(got, expected, strict=True):
        tolerances.weights(q, k).check_sums(x, y, y)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(rng, dtype):
    q, k = normal(rng, (4, 40, 16), dtype, spread=2.0), normal(rng, (2, 40, 16), dtype)
    for x, y in zip(
        echo_induction_scores(q, k, 9, scale=0.3), reference.echo_induction_scores(q, k, 9, scale=0.3), strict=True
    ):
        tolerances.weights(q, k, scale=0.3).check_sums(x, y, y)


def test_a_head_that_copies_and_one_that_echoes(rng):
    """The keys of one head are its tokens, those of the other the tokens before."""
    tokens = np.tile(rng.permutation(30), 4)
    codes = normal(rng, (30, 64))
    before = np.concatenate([normal(rng, (1, 64)), codes[tokens[:-1]]])
    k = np.stack([codes[tokens], before])
    q = np.stack([codes[tokens]] * 2) * 10
    echo, induction = echo_induction_scores(q, k, 30)
    # The echoing head sees its own key as well, one of two to four alike.
    np.testing.assert_allclose(echo, [np.mean([1 / 2, 2 / 3, 3 / 4]), 0], atol=1e-4)
    np.testing.assert_allclose(induction, [0, 1], atol=1e-4)
    assert razor_heads(echo, induction, 2, echo_share=0.0, induction_share=0.5).tolist() == [False, True]
    assert razor_heads(echo, induction, 2, echo_share=0.5, induction_share=0.0).tolist() == [True, False]


def test_shares_of_all_layers(rng):
    echo, induction = rng.random((3, 8)), rng.random((3, 8))
    found = razor_heads(echo, induction, 4, echo_share=0.05, induction_share=0.2)
    assert found.shape == (3, 4)
    by_hand = np.zeros(24, bool)
    by_hand[np.argsort(-echo, axis=None)[:2]] = True
    by_hand[np.argsort(-induction, axis=None)[:5]] = True
    np.testing.assert_array_equal(found, by_hand.reshape(3, 4, 2).any(axis=2))
    assert razor_heads(echo, induction, 4, echo_share=1.0).all()
    assert not razor_heads(echo, induction, 4, echo_share=0.0, induction_share=0.0).any()


def test_scope_of_alibi_heads(rng):
    wq, wk = normal(rng, (2, 20, 8)), normal(rng, (2, 20, 8))
    gamma, beta = normal(rng, (20,)), normal(rng, (20,))
    got = alibi_scope(wq, wk, gamma, beta, np.array([0.5, 0.25]), eps=0.01)
    for head, slope in enumerate((0.5, 0.25)):
        norm = np.linalg.norm(wq[head].astype(float) @ wk[head].astype(float).T, 2)
        size = (gamma.astype(float) ** 2).sum() + (beta.astype(float) ** 2).sum()
        np.testing.assert_allclose(got[head], (2 * norm * size - np.log(0.01)) / slope, rtol=1e-10)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda q: echo_induction_scores(q, q[:, :5], 2), ValueError, "q: got shape"),
        (lambda q: echo_induction_scores(q, q, 9), ValueError, "period: got 9, expected 1 to 8"),
        (lambda q: echo_induction_scores(q, q.astype(int), 2), TypeError, "k: got dtype int64"),
        (lambda q: razor_heads(np.ones(4), np.ones(3), 2), ValueError, "induction: got shape"),
        (lambda q: razor_heads(np.ones(4), np.ones(4), 3), ValueError, "echo: got 4 heads"),
        (lambda q: razor_heads(np.ones(4), np.ones(4), 2, echo_share=2.0), ValueError, "echo_share: got 2.0"),
        (lambda q: alibi_scope(q, q, q[0, :, 0], q[0, :, 0], np.zeros(2)), ValueError, "slopes: got some"),
        (lambda q: alibi_scope(q, q, q[0, 0], q[0, :, 0], np.ones(2)), ValueError, "gamma: got shape"),
    ],
)
def test_bad_input(rng, call, error, message):
    with pytest.raises(error, match=message):
        call(normal(rng, (2, 9, 8)))
