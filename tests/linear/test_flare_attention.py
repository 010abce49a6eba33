"""`flare_attention`."""

import numpy as np
import pytest

import longattn as la
import tolerances
from longattn.linear import agent_attention, flare_attention, flare_gather, flare_read
from longattn.reference import linear as reference
from random_arrays import DTYPES, LAYOUTS, normal

oracle = reference.flare_attention


def arrays(rng, batch=2, heads=3, latents=5, tokens=70, dim=8, dtype=np.float32, layout="contiguous"):
    k, v = (normal(rng, (batch, heads, tokens, dim), dtype, layout) for _ in "kv")
    return normal(rng, (heads, latents, dim), dtype), k, v


def compare(rng, r, k, v, **options):
    out = flare_attention(r, k, v, **options)
    expected = oracle(r, k, v, **options)
    assert out.dtype == k.dtype and out.shape == expected.shape
    one = tolerances.attention(
        np.asarray(k, np.float32), np.asarray(r, np.float32), np.asarray(v, np.float32), scale=1.0
    )
    both = tolerances.Tolerance(3 * one.atol, 3 * one.rtol, 0.0)
    tolerances.stored(both, k.dtype).check(out, expected)
    return out


@pytest.mark.parametrize("tokens", [1, 3, 70, 600])
def test_reference(rng, isa, tokens):
    compare(rng, *arrays(rng, tokens=tokens, latents=32), scale=0.7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("qk_norm", [False, True])
def test_dtypes(rng, dtype, qk_norm):
    compare(rng, *arrays(rng, dtype=dtype), qk_norm=qk_norm)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(rng, layout):
    compare(rng, *arrays(rng, layout=layout))


def test_masks(rng):
    r, k, v = arrays(rng)
    keep = rng.random((2, 70)) < 0.6
    out = compare(rng, r, k, v, mask=keep)
    v[0][:, ~keep[0]] = 1e6
    np.testing.assert_array_equal(flare_attention(r, k, v, mask=keep), out)


def test_threads_and_out(rng, threads):
    r, k, v = arrays(rng, tokens=700)
    out = flare_attention(r, k, v)
    given = np.empty_like(out)
    assert flare_attention(r, k, v, out=given) is given
    np.testing.assert_array_equal(given, out)
    np.testing.assert_array_equal(flare_attention(r, k[0], v[0]), out[0])


def test_no_tokens(rng):
    r, k, v = arrays(rng, tokens=0)
    assert flare_attention(r, k, v).shape == (2, 3, 0, 8)


def test_bad_input(rng):
    r, k, v = arrays(rng)
    for args, match in (
        ((r[:2], k, v), "latents: got shape"),
        ((r[:, :0], k, v), "latents: got shape"),
        ((r, k, v[:, :, 1:]), "v: got shape"),
    ):
        with pytest.raises(ValueError, match=match):
            flare_attention(*args)


# Identities


def implied(rng, **given):
    r, k, _ = arrays(rng, batch=1, **given)
    tokens = k.shape[2]
    eye = np.broadcast_to(np.eye(tokens, dtype=np.float32), (1, k.shape[1], tokens, tokens))
    return flare_attention(r, k, eye)[0]


def test_rows_are_shares(rng):
    weights = implied(rng, tokens=40)
    assert (weights >= 0).all()
    tolerances.check_linear(weights.sum(axis=-1), np.ones((3, 40)), 8, 80)


def test_rank(rng):
    """Singular values beyond the latents are rounding."""
    values = np.linalg.svd(implied(rng, tokens=40, latents=4), compute_uv=False)
    assert (values[:, 4:] < 1e-5 * values[:, :1]).all() and (values[:, 3] > 1e-4).all()


def test_one_latent(rng):
    r, k, v = arrays(rng, latents=1)
    out = flare_attention(r, k, v)
    expected = la.attention(np.broadcast_to(r, (2, *r.shape)), k, v, scale=1.0)
    np.testing.assert_allclose(out, np.broadcast_to(expected, out.shape), rtol=1e-5, atol=1e-6)


def test_it_is_agent_attention(rng):
    r, k, v = arrays(rng)
    agents = np.broadcast_to(r, (2, *r.shape))
    np.testing.assert_array_equal(
        flare_attention(r, k, v, scale=0.5), agent_attention(k, k, v, agents=agents, scale=0.5)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"qk_norm": True, "scale": 0.4}], ids=str)
def test_tokens_gathered_in_parts_are_gathered(rng, dtype, options):
    r, k, v = arrays(rng, dtype=dtype)
    keep = rng.random((2, 70)) < 0.6
    state = None
    for part in (slice(0, 1), slice(1, 50), slice(50, 50), slice(50, 70)):
        state = flare_gather(r, k[:, :, part], v[:, :, part], mask=keep[:, part], initial_state=state, **options)
    one = flare_gather(r, k, v, mask=keep, **options)
    np.testing.assert_allclose(state.gathered, one.gathered, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(state.logs, one.logs, rtol=1e-5, atol=1e-5)
    expected = oracle(r, k, v, mask=keep, **options)
    for rows in (slice(0, 1), slice(30, 70)):
        out = flare_read(r, k[:, :, rows], state, **options)
        assert out.dtype == dtype
        near = {4: 2e-5, 2: 2.0**-7}[out.dtype.itemsize]
        np.testing.assert_allclose(out.astype(np.float64), expected[:, :, rows], atol=near * np.abs(expected).max())


def test_states_of_other_latents(rng):
    r, k, v = arrays(rng)
    state = flare_gather(r, k, v)
    for match, call in (
        ("state: got", lambda: flare_gather(r[:, 1:], k, v, initial_state=state)),
        ("state: got", lambda: flare_gather(r, k, v[..., 1:], initial_state=state)),
        ("state: got", lambda: flare_read(r[:, 1:], k, state)),
        ("out: got shape", lambda: flare_attention(r, k, v, out=np.empty((2, 3, 70, 9), np.float32))),
    ):
        with pytest.raises(ValueError, match=match):
            call()
    with pytest.raises(TypeError, match="state: got tuple, expected a FlareState"):
        flare_read(r, k, (1, 2))
