"""`taipan_selective_attention`."""

import numpy as np
import pytest

import longattn as la
import tolerances
from longattn.linear import taipan_selective_attention
from longattn.reference import linear as reference
from random_arrays import BF16, DTYPES, LAYOUTS, normal, qkv

SCOPE = pytest.mark.parametrize("kv_scope", ["selected", "all"])


def arrays(rng, length=50, dtype=np.float32, layout="contiguous"):
    q, k, v = qkv(rng, batch=2, rows=length, keys=length, q_dtype=dtype, layout=layout)
    return normal(rng, (2, length, 64), dtype), q, k, v, normal(rng, (2, length, 2))


def check(actual, expected, q, k, v):
    one = tolerances.attention(*(np.asarray(x, np.float32) for x in (q, k, v)))
    wide = tolerances.Tolerance(4 * one.atol + 16 * tolerances.U, 4 * one.rtol, 0.0)
    # What attended is rounded once more where it is stored before it is mixed.
    twice = tolerances.stored(tolerances.stored(wide, q.dtype), actual.dtype)
    largest = np.abs(np.asarray(v, np.float64)).max(initial=0)
    tolerances.Tolerance(twice.atol + tolerances.ROUNDOFF[q.dtype][0] * largest, twice.rtol, 0.0).check(
        actual, expected
    )


@SCOPE
@pytest.mark.parametrize("length", [1, 2, 50, 300])
def test_reference(rng, isa, kv_scope, length):
    given = arrays(rng, length)
    options = {"kv_scope": kv_scope, "window": 20}
    out, _ = taipan_selective_attention(*given, **options)
    check(out, reference.taipan_selective_attention(*given, **options), *given[1:4])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(rng, dtype):
    given = arrays(rng, dtype=dtype)
    out, _ = taipan_selective_attention(*given)
    assert out.dtype == dtype
    check(out, reference.taipan_selective_attention(*given), *given[1:4])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(rng, layout):
    given = arrays(rng, layout=layout)
    out, _ = taipan_selective_attention(*given)
    check(out, reference.taipan_selective_attention(*given), *given[1:4])


def test_projection_and_shares(rng):
    h, q, k, v, scores = arrays(rng)
    options = {"w_o": normal(rng, (64, 24), spread=0.1), "alpha": rng.random((2, 50), np.float32), "scale": 0.3}
    given = (h[..., :24], q, k, v, scores)
    out, _ = taipan_selective_attention(*given, **options)
    np.testing.assert_allclose(out, reference.taipan_selective_attention(*given, **options), rtol=1e-4, atol=1e-5)


def test_bad_input(rng):
    h, q, k, v, scores = arrays(rng)
    for args, options, match in (
        ((h[:, 1:], q, k, v, scores), {}, "h: got shape"),
        ((h, q, k[:, :, 1:], v[:, :, 1:], scores), {}, "k: got length"),
        ((h, q, k, v, scores[..., :1]), {}, "scores: got shape"),
        ((h[..., :60], q, k, v, scores), {}, "w_o: got none"),
        ((h, q, k, v, scores), {"window": 0}, "window: got 0"),
        ((h, q, k, v, scores), {"kv_scope": "some"}, "kv_scope: got 'some'"),
        ((h, q, k, v, scores), {"alpha": np.full((2, 50), 2, np.float32)}, "alpha: got numbers"),
        ((h, q, k, v, scores), {"initial_state": []}, "initial_state: got 0 states"),
    ):
        with pytest.raises(ValueError, match=match):
            taipan_selective_attention(*args, **options)
    _, state = taipan_selective_attention(h, q, k, v, scores)
    with pytest.raises(ValueError, match="initial_state: got keys"):
        taipan_selective_attention(h, q, k.astype(BF16), v.astype(BF16), scores, initial_state=state)


# Identities


@SCOPE
def test_all_selected_is_causal_attention(rng, kv_scope):
    h, q, k, v, scores = arrays(rng)
    scores[..., 1] = scores[..., 0] + 1
    out, _ = taipan_selective_attention(
        h, q, k, v, scores, alpha=np.ones((2, 50), np.float32), window=50, kv_scope=kv_scope
    )
    dense = la.attention(q, k, v, causal=True).swapaxes(1, 2).reshape(2, 50, 64)
    np.testing.assert_allclose(out, dense, rtol=1e-5, atol=1e-6)


@SCOPE
def test_none_selected_passes(rng, kv_scope):
    h, q, k, v, scores = arrays(rng)
    scores[..., 1] = scores[..., 0]
    out, state = taipan_selective_attention(h, q, k, v, scores, kv_scope=kv_scope)
    np.testing.assert_array_equal(out, h)
    assert state[0][0].shape[1] == (0 if kv_scope == "selected" else 50)


def test_the_others_may_as_well_not_be_there(rng):
    h, q, k, v, scores = arrays(rng)
    out, _ = taipan_selective_attention(h, q, k, v, scores, window=7)
    for b in range(2):
        rows = np.flatnonzero(scores[b, :, 1] > scores[b, :, 0])
        short, _ = taipan_selective_attention(
            *(x[b : b + 1, rows] if x.ndim == 3 else x[b : b + 1, :, rows] for x in (h, q, k, v, scores)), window=7
        )
        np.testing.assert_allclose(out[b, rows], short[0], rtol=1e-5, atol=1e-6)


@SCOPE
def test_a_window_of_1_returns_values(rng, kv_scope):
    h, q, k, v, scores = arrays(rng)
    out, state = taipan_selective_attention(
        h, q, k, v, scores, alpha=np.ones((2, 50), np.float32), window=1, kv_scope=kv_scope
    )
    own = np.repeat(v, 2, axis=1).swapaxes(1, 2).reshape(2, 50, 64)
    expected = np.where((scores[..., 1] > scores[..., 0])[..., None], own, h)
    np.testing.assert_allclose(out, expected, rtol=1e-6)
    assert state[0][0].shape[1] == 0


@SCOPE
def test_steps_are_the_whole(rng, kv_scope):
    given = arrays(rng)
    options = {"window": 8, "kv_scope": kv_scope}
    whole, last = taipan_selective_attention(*given, **options)
    state, parts = None, []
    for rows in (slice(0, 13), *(slice(n, n + 1) for n in range(13, 50))):
        step = (x[:, rows] if x.ndim == 3 else x[:, :, rows] for x in given)
        part, state = taipan_selective_attention(*step, initial_state=state, **options)
        parts.append(part)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(state, last, strict=True):
        np.testing.assert_array_equal(ours[0], theirs[0])
        assert ours[0].shape[1] == 7
