"""`recurrence_backward`: gradients beside the adjoint recurrence, and that beside differences."""

from itertools import pairwise

import numpy as np
import pytest

import tolerances
from longattn.linear import (
    delta_rule_attention,
    gated_delta_rule,
    gated_linear_attention,
    kimi_delta_attention,
    linear_attention,
    recurrence_backward,
    retention,
    rwkv7,
)
from longattn.reference import linear as reference
from longattn.reference.linear._recurrence import recurrence
from random_arrays import BF16, DTYPES, F32, LAYOUTS, lay
from running import on_threads

#: Query heads, key heads and heads of values.
HEADS = ((2, 2, 2), (4, 2, 2), (2, 2, 4), (2, 1, 2), (6, 1, 3))

#: Which gates a mechanism has, and its options.
KINDS = {
    "plain": ((), {}),
    "normalised": ((), {"normalize": True, "scale": 1.0}),
    "factors": (("beta",), {}),
    "rows": (("row",), {}),
    "rows and factors": (("row", "beta"), {"scale": 0.7}),
    "channels": (("channel",), {}),
    "channels and factors": (("channel", "beta"), {}),
    "normalised channels": (("channel",), {"normalize": True, "eps": 0.1}),
    "delta": ((), {"delta": True}),
    "delta rule": (("beta",), {"delta": True, "normalize_qk": True}),
    "gated delta": (("row", "beta"), {"delta": True}),
    "kda": (("channel", "beta"), {"delta": True, "normalize_qk": True}),
    "pair": (("channel", "pair"), {"scale": 1.0}),
}


def arguments(
    rng, kind, *, batch=1, heads=(2, 2, 2), length=37, dim=8, value_dim=12, sequences=None, strength=1.0, dtype=F32
):
    """Random arguments by name, and options."""
    gates, options = KINDS[kind]
    q, k = (rng.standard_normal((batch, n, length, dim)) / dim**0.5 for n in heads[:2])
    if options.get("normalize"):
        q, k = np.abs(q), np.abs(k)
    if options.get("delta"):
        k = k / np.maximum(np.linalg.norm(k, axis=-1, keepdims=True), 1)
    found = {"q": q, "k": k, "v": rng.standard_normal((batch, heads[2], length, value_dim))}
    if "row" in gates:
        found["g"] = -strength * rng.random((batch, heads[2], length))
    if "channel" in gates:
        found["g"] = -strength * rng.random((batch, heads[2], length, dim))
    if "beta" in gates:
        found["beta"] = rng.random((batch, heads[2], length))
    if "pair" in gates:
        reads = k / np.maximum(np.linalg.norm(k, axis=-1, keepdims=True), 1)
        found |= {"a": -reads, "b": reads * rng.random(k.shape)}
    shape = (sequences or batch, heads[2], dim, value_dim + bool(options.get("normalize")))
    found["initial_state"] = rng.standard_normal(shape) * 0.5
    if options.get("normalize"):
        found["initial_state"] = np.abs(found["initial_state"])
    found = {name: x.astype(dtype if name in "qkvab" else F32) for name, x in found.items()}
    return found, options


def joined(found):
    """`a` and `b` as the pair that functions take."""
    rest = {name: x for name, x in found.items() if name not in ("a", "b")}
    return {**rest, "pair": (found["a"], found["b"])} if "a" in found else rest


def forward(found, options, call=recurrence, **more):
    """Output and states of the oracle."""
    given = {name: x for name, x in options.items() if name not in ("normalize_qk", "normalize", "eps")}
    if options.get("normalize_qk"):
        given["unit"] = 1e-6
    if options.get("normalize"):
        given["normaliser"] = options.get("eps", 1e-6)
    return call(**joined(found), **given, **more)


def compare(rng, found, options, *, chunk_size=48, cu_seqlens=None, allowed=None):
    """Gradients of random linear forms of outputs and states, beside the oracle's."""
    plain = {name: x.astype(np.float64) for name, x in found.items()}
    out, state = forward(plain, options, cu_seqlens=cu_seqlens)
    d_out = rng.standard_normal(out.shape).astype(found["q"].dtype)
    d_state = rng.standard_normal(state.shape).astype(F32)
    expected = reference.recurrence_backward(
        d_out.astype(np.float64), d_state, **joined(plain), **options, cu_seqlens=cu_seqlens
    )
    given = {"out": out.astype(found["q"].dtype)} if options.get("normalize") else {}
    ours = recurrence_backward(
        d_out, d_state, **joined(found), **options, **given, chunk_size=chunk_size, cu_seqlens=cu_seqlens
    )
    names = {"q": ours.dq, "k": ours.dk, "v": ours.dv, "g": ours.dg, "beta": ours.d_beta}
    names["initial_state"] = ours.d_initial_state
    names |= dict(zip("ab", ours.d_pair or (None, None), strict=True))
    for name, x in found.items():
        assert names[name].dtype == x.dtype and names[name].shape == x.shape
        if allowed is None:
            terms = 4 * out.shape[2] + found["q"].shape[-1] + out.shape[-1]
            tolerances.check_gradients(names[name], expected[name], terms)
        else:
            largest = np.abs(expected[name]).max()
            np.testing.assert_allclose(names[name].astype(np.float64), expected[name], atol=allowed * largest)
    assert (ours.dg is None) == ("g" not in found) and (ours.d_beta is None) == ("beta" not in found)
    return ours


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("heads", [(2, 2, 2), (4, 2, 2), (2, 1, 2)], ids=str)
def test_the_oracle_is_the_slope(rng, kind, heads):
    """Central differences of the forward oracle, in random directions."""
    found, options = arguments(rng, kind, heads=heads, length=6, dim=3, value_dim=2)
    found = {name: x.astype(np.float64) for name, x in found.items()}
    out, state = forward(found, options)
    d_out, d_state = rng.standard_normal(out.shape), rng.standard_normal(state.shape)
    gradients = reference.recurrence_backward(d_out, d_state, **joined(found), **options)
    for name, x in found.items():
        direction, step = rng.standard_normal(x.shape), 1e-6
        ends = [forward({**found, name: x + sign * step * direction}, options) for sign in (1, -1)]
        slope = sum(((a - b) * d).sum() for a, b, d in zip(*ends, (d_out, d_state), strict=True)) / (2 * step)
        np.testing.assert_allclose((gradients[name] * direction).sum(), slope, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_reference(rng, isa, kind):
    compare(rng, *arguments(rng, kind, length=65))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [1, 2, 13, 150])
def test_lengths(rng, kind, length):
    compare(rng, *arguments(rng, kind, batch=2, length=length))


@pytest.mark.parametrize("kind", ["normalised", "rows and factors", "channels", "kda", "pair"])
@pytest.mark.parametrize("dim, value_dim", [(2, 1), (3, 40), (33, 2), (70, 129)])
def test_dims(rng, isa, kind, dim, value_dim):
    compare(rng, *arguments(rng, kind, length=60, dim=dim, value_dim=value_dim))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_heads(rng, kind, heads):
    compare(rng, *arguments(rng, kind, heads=heads, length=70))


@pytest.mark.parametrize("kind", ["normalised", "rows and factors", "channels", "kda", "pair"])
@pytest.mark.parametrize("chunk_size", [1, 2, 12, 31, 64, 100, 252, 256])
def test_chunk_sizes(rng, kind, chunk_size):
    compare(rng, *arguments(rng, kind, length=275, dim=5, value_dim=7), chunk_size=chunk_size)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bounds", [[0, 0, 1, 50, 51, 130], [0, 1, 2, 3]], ids=str)
def test_packed_sequences(rng, kind, bounds):
    found, options = arguments(rng, kind, length=bounds[-1], sequences=len(bounds) - 1)
    ours = compare(rng, found, options, cu_seqlens=np.array(bounds))
    for n, (start, end) in enumerate(pairwise(bounds)):
        if start == end:
            assert np.isfinite(ours.d_initial_state[n]).all()


@pytest.mark.parametrize("kind", ["plain", "rows", "kda", "normalised", "pair"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(rng, kind, dtype):
    found, options = arguments(rng, kind, length=60, dtype=dtype)
    # The output that the divisor's gradient takes is rounded to the dtype as well.
    rounded = options.get("normalize") and dtype != F32
    compare(rng, found, options, allowed=2e-2 if rounded and dtype == BF16 else 3e-3 if rounded else None)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(rng, layout):
    found, options = arguments(rng, "kda", batch=2, length=60)
    compare(rng, {name: lay(x, layout) if name in "qkvg" else x for name, x in found.items()}, options)


@pytest.mark.parametrize("kind", ["rows", "gated delta", "channels", "kda", "pair"])
def test_strong_and_total_decays(rng, isa, kind):
    """Nothing overflows, and decays of 0 have no gradient."""
    found, options = arguments(rng, kind, length=100, strength=100.0)
    found["g"].reshape(*found["g"].shape[:3], -1)[:, :, ::7] = -np.inf
    ours = compare(rng, found, options)
    assert not ours.dg[:, :, ::7].any()


@pytest.mark.parametrize("kind", ["factors", "delta rule", "kda"])
def test_factors_of_0_and_below(rng, isa, kind):
    found, options = arguments(rng, kind, length=100)
    if options.get("normalize_qk"):  # takes none below 0
        options = {**options, "normalize_qk": False}
        found["k"] /= np.linalg.norm(found["k"], axis=-1, keepdims=True)
    found["beta"][..., ::3] = 0
    found["beta"][..., 1::3] *= -0.3
    compare(rng, found, options)


def test_long_sequences_keep_some_states(rng):
    """More chunks than are kept at once: 1,500 of 128 by 128, and what lies between is made anew."""
    found, options = arguments(rng, "gated delta", heads=(1, 1, 1), length=1500, dim=128, value_dim=128)
    given = {"chunk_size": 2}
    d_out = rng.standard_normal((1, 1, 1500, 128)).astype(F32)
    ours = recurrence_backward(d_out, None, **found, **options, **given)
    expected = recurrence_backward(d_out, None, **found, **options)
    for name in ("dq", "dk", "dv", "dg", "d_beta", "d_initial_state"):
        tolerances.check_gradients(getattr(ours, name), getattr(expected, name).astype(np.float64), 6000)


@pytest.mark.parametrize("kind", ["plain", "kda", "pair"])
def test_threads_do_not_matter(rng, kind):
    found, options = arguments(rng, kind, batch=2, heads=(4, 2, 4), length=130)
    d_out = rng.standard_normal((2, 4, 130, 12)).astype(F32)
    results = on_threads(lambda: recurrence_backward(d_out, None, **joined(found), **options))
    for other in results[1:]:
        for name in ("dq", "dk", "dv", "d_initial_state"):
            np.testing.assert_array_equal(getattr(other, name), getattr(results[0], name))
        for ours, theirs in zip(other.d_pair or (), results[0].d_pair or (), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_without_a_batch(rng):
    found, options = arguments(rng, "kda")
    d_out = rng.standard_normal((1, 2, 37, 12)).astype(F32)
    both = [
        recurrence_backward(d_out, None, **found, **options),
        recurrence_backward(d_out[0], None, **{name: x[0] for name, x in found.items()}, **options),
    ]
    for name in ("dq", "dk", "dv", "dg", "d_beta", "d_initial_state"):
        np.testing.assert_array_equal(getattr(both[0], name)[0], getattr(both[1], name))


def test_no_rows(rng):
    found, options = arguments(rng, "gated delta", length=0)
    d_state = rng.standard_normal(found["initial_state"].shape).astype(F32)
    ours = recurrence_backward(np.zeros((1, 2, 0, 12), F32), d_state, **found, **options)
    np.testing.assert_array_equal(ours.d_initial_state, d_state)
    assert ours.dq.shape == (1, 2, 0, 8)


@pytest.mark.parametrize(
    "call, kind",
    [
        (linear_attention, "normalised"),
        (retention, "rows"),
        (gated_linear_attention, "channels"),
        (delta_rule_attention, "delta rule"),
        (gated_delta_rule, "gated delta"),
        (kimi_delta_attention, "kda"),
        (rwkv7, "pair"),
    ],
)
def test_they_are_the_slopes_of_the_functions(rng, call, kind):
    """One step along the gradient by values, in which all of these are linear."""
    found, options = arguments(rng, kind, length=30)
    if call is retention:
        found["g"] = np.broadcast_to(np.log(np.array([0.9, 0.8], F32))[:, None], (1, 2, 30)).copy()
        given = {**found, "gamma": np.array([0.9, 0.8], F32)}
        del given["g"]
    else:
        given = found
    if call is not kimi_delta_attention and call is not delta_rule_attention:
        options = {name: x for name, x in options.items() if name != "normalize_qk"}
    accepted = {name: x for name, x in options.items() if name != "delta"}
    out, _ = call(**given, **accepted)
    d_out = rng.standard_normal(out.shape).astype(F32)
    extra = {"out": out} if options.get("normalize") else {}
    ours = recurrence_backward(d_out, None, **joined(found), **options, **extra)
    moved, _ = call(**{**given, "v": given["v"] + ours.dv}, **accepted)
    gained = (d_out * (moved.astype(np.float64) - out)).sum()
    np.testing.assert_allclose(gained, (ours.dv.astype(np.float64) ** 2).sum(), rtol=1e-4)


def test_wrong_arguments(rng):
    found, options = arguments(rng, "gated delta")
    d_out = np.zeros((1, 2, 37, 12), F32)

    def bad(match, error=ValueError, d=d_out, d_state=None, **changes):
        with pytest.raises(error, match=match):
            recurrence_backward(d, d_state, **{**found, **options, **changes})

    bad("d_out: got shape", d=d_out[:, :, 1:])
    bad("d_out: got dtype", TypeError, d=d_out.astype(int))
    bad("d_state: got shape", d_state=np.zeros((1, 2, 8, 13), F32))
    bad("d_state: got dtype", TypeError, d_state=np.zeros((1, 2, 8, 12), int))
    bad("normalize: got True with the delta rule", normalize=True)
    bad("out: got None", delta=False, normalize=True, initial_state=None)
    bad("g: got a number above 0", g=-found["g"])
    bad("beta: got a number that is not finite", beta=np.full_like(found["beta"], np.inf))
    bad("chunk_size: got 0", chunk_size=0)
    bad("initial_state: got shape", initial_state=found["initial_state"][:, :, 1:])
    bad("delta: got 1", TypeError, delta=1)
    keys = found["k"]
    bad("pair: got one with another rule", pair=(keys, keys))
    bad("pair: got ndarray", TypeError, pair=keys[:1])
    plain = {"beta": None, "delta": False, "g": np.zeros(keys.shape, F32)}
    bad("b: got shape", pair=(keys, keys[:, :, 1:]), **plain)
    bad("a: got dtype", TypeError, pair=(keys.astype(int), keys), **plain)
