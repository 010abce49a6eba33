"""Causal forms of methods over all keys: each row beside the form over all keys of the rows so far."""

from dataclasses import replace

import numpy as np
import pytest

import tolerances
from longattn import linear
from longattn.reference import linear as reference
from random_arrays import DTYPES, F32, LAYOUTS, lay
from running import on_threads

WEIGHT = {"weight": (6, 3)}

#: Function by name, and options; arrays by their shapes.
CASES = {
    "causal_efficient_attention": {},
    "causal_efficient_attention scaling": {"norm": "scaling"},
    "causal_focused_linear_attention": {"eps": 0.3},
    "causal_focused_linear_attention head": {
        "eps": 0.0, "norm_scope": "head", "power": 2.5, "channel_scale": (16,),
    },
    "causal_focused_linear_attention local": {"eps": 0.0, **WEIGHT},
    "causal_simplified_linear_attention": {"eps": 0.1},
    "causal_simplified_linear_attention local": WEIGHT,
    "causal_magnitude_aware_linear_attention": {},
    "causal_magnitude_aware_linear_attention exp": {"phi": "exp", "scale": 0.7},
    "causal_inline_attention": {},
    "causal_inline_attention relu": {"phi": "relu", "scale": 0.4},
    "causal_l2vit_linear_attention": {"den_min": 5.0, "tau": (2,)},
}  # fmt: skip


def arguments(rng, name, *, batch=1, heads=(2, 2), length=70, dtype=F32):
    """Rows, options, and the oracle's output."""
    given = CASES[name]
    options = {n: rng.standard_normal(x).astype(F32) if isinstance(x, tuple) else x for n, x in given.items()}
    if heads[0] != heads[1]:  # a scale of channels is of as many query heads as heads of keys
        options.pop("channel_scale", None)
    if "tau" in options:
        options["tau"] = np.resize(options["tau"], heads[0])
    if "norm_scope" not in options and "focused" in name and heads[0] != heads[1]:
        options["norm_scope"] = "head"
    shapes = ((batch, heads[0], length, 8), (batch, heads[1], length, 8), (batch, heads[1], length, 6))
    rows = [rng.standard_normal(shape).astype(dtype) for shape in shapes]
    expected = function(name, reference)(*rows, **options)
    return rows, options, expected


def function(name, module=linear):
    return getattr(module, name.split()[0])


def check(out, expected):
    assert out.shape == expected.shape
    tolerances.check_gradients(out, expected, 40 * expected.shape[-2] + 100)


@pytest.mark.parametrize("name", CASES)
def test_reference(rng, isa, name):
    rows, options, expected = arguments(rng, name)
    check(function(name)(*rows, **options)[0], expected)


@pytest.mark.parametrize("name", CASES)
def test_groups_and_batches(rng, name):
    rows, options, expected = arguments(rng, name, batch=2, heads=(4, 2), length=20)
    out, _ = function(name)(*rows, **options)
    check(out, expected)
    alone, _ = function(name)(*(x[1] for x in rows), **options)
    np.testing.assert_array_equal(alone, out[1])


@pytest.mark.parametrize("name", CASES)
def test_parts_and_steps_hand_states_on(rng, name):
    rows, options, expected = arguments(rng, name)
    state, outs = None, []
    for part in (slice(0, 1), slice(1, 50), slice(50, 50), *(slice(t, t + 1) for t in range(50, 60)), slice(60, 70)):
        out, state = function(name)(*(x[:, :, part] for x in rows), **options, initial_state=state)
        outs.append(out)
    check(np.concatenate(outs, axis=2), expected)


@pytest.mark.parametrize("name", CASES)
def test_later_rows_do_not_matter(rng, name):
    rows, options, _ = arguments(rng, name)
    out, _ = function(name)(*rows, **options)
    changed = [np.concatenate([x[:, :, :40], 3 * x[:, :, 40:]], axis=2) for x in rows]
    np.testing.assert_array_equal(function(name)(*changed, **options)[0][:, :, :40], out[:, :, :40])


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_dtypes(rng, name, dtype):
    rows, options, expected = arguments(rng, name, length=20, dtype=dtype)
    out, _ = function(name)(*rows, **options)
    assert out.dtype == dtype
    near = 2.0 ** (-7 if dtype == DTYPES[-1] else -10)
    np.testing.assert_allclose(out.astype(np.float64), expected, atol=near * max(np.abs(expected).max(), 1))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_and_outputs(rng, layout):
    for name in ("causal_efficient_attention", "causal_inline_attention", "causal_simplified_linear_attention local"):
        rows, options, _ = arguments(rng, name, length=30)
        rows = [lay(x, layout) for x in rows]
        expected, _ = function(name)(*(np.array(x) for x in rows), **options)
        out = np.empty_like(expected)
        found, _ = function(name)(*rows, **options, out=out)
        assert found is out
        np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("name", ["causal_efficient_attention", "causal_magnitude_aware_linear_attention"])
def test_threads_do_not_matter(rng, name):
    rows, options, _ = arguments(rng, name, batch=2)
    results = on_threads(lambda: function(name)(*rows, **options)[0])
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0])


@pytest.mark.parametrize("name", CASES)
def test_its_last_row_is_that_over_all_keys(rng, name):
    """With everything that the causal form has not left out."""
    rows, options, _ = arguments(rng, name)
    if "weight" in options:
        rows[2][:, :, -3:] = 0  # what the convolution sees of the last row
    if "focused" in name:
        options["eps"] = 0.0
    out, _ = function(name)(*rows, **options)
    whole = {n: x for n, x in options.items() if n != "weight"}
    expected = getattr(linear, name.split()[0].removeprefix("causal_"))(*rows, **whole)
    np.testing.assert_allclose(out[:, :, -1], expected[:, :, -1], rtol=2e-4, atol=2e-5)


def test_rows_that_sum_to_1_return_equal_values(rng):
    for name in ("causal_efficient_attention", "causal_inline_attention", "causal_magnitude_aware_linear_attention"):
        rows, _, _ = arguments(rng, name, length=100)
        rows[2][...] = 0.75
        options = {"eps": 0.0} if "magnitude" in name else {}
        np.testing.assert_allclose(function(name)(*rows, **options)[0], 0.75, rtol=1e-4)


def test_a_softmax_over_many_positions_keeps_its_shares(rng):
    """A quarter of a million rows, of keys that grow: shares of 1e-6 are not lost beside a sum that is far above 1."""
    length = 250_000
    k = (rng.standard_normal((1, 1, length, 4)) + np.linspace(0, 5, length)[:, None]).astype(F32)
    v = rng.standard_normal((1, 1, length, 2)).astype(F32)
    q = np.zeros((1, 1, length, 4), F32)
    out, state = linear.causal_efficient_attention(q, k, v)
    weights = np.exp(k[0, 0].astype(np.float64))
    means = np.stack([np.cumsum(weights * v[0, 0, :, c, None], 0) / np.cumsum(weights, 0) for c in range(2)], -1)
    expected = means.mean(1)
    for at in (0, 1, 1000, length - 1):
        np.testing.assert_allclose(out[0, 0, at], expected[at], atol=3e-5)
    np.testing.assert_allclose(state.logs[0, 0], np.log(weights.sum(0)), rtol=1e-6)


def test_rows_after_a_million_count(rng):
    """One by one, each adds less to the logarithm of their sum than the last bit of a float32 holds."""
    rows = [np.zeros((1, 1, 1_000_000, n), F32) for n in (1, 1, 1)]
    _, state = linear.causal_efficient_attention(*rows)
    for _ in range(2000):
        _, state = linear.causal_efficient_attention(*(x[:, :, :1] for x in rows), initial_state=state)
    np.testing.assert_allclose(state.logs, np.log(1_002_000), rtol=0, atol=2e-6)


@pytest.mark.parametrize("offset", [0.0, -300.0, 300.0])
def test_a_million_rows_far_from_zero(rng, offset):
    """Sums of logarithms are as in float64, in one call and in calls that hand them on."""
    k = (offset + 3 * rng.standard_normal((1, 1, 1_000_000, 4))).astype(F32)
    v = rng.standard_normal((1, 1, 1_000_000, 2)).astype(F32)
    exact = k[0, 0].astype(np.float64)
    logs = np.log(np.exp(exact - offset).sum(0)) + offset
    means = np.exp(exact - logs).T @ v[0, 0]
    for lengths in ([1_000_000], [400_000, *[1] * 1000, *[1000] * 599]):
        state, at = None, 0
        for length in lengths:
            rows = k[:, :, at : at + length], v[:, :, at : at + length]
            _, state = linear.causal_efficient_attention(np.zeros_like(rows[0]), *rows, initial_state=state)
            at += length
        assert at == 1_000_000
        np.testing.assert_allclose(state.logs[0, 0], logs, rtol=0, atol=1e-6)
        np.testing.assert_allclose(state.means[0, 0], means, rtol=0, atol=2e-6)


def test_no_rows(rng):
    for name in CASES:
        rows, options, _ = arguments(rng, name, length=3)
        out, state = function(name)(*(x[:, :, :0] for x in rows), **options)
        assert out.shape == (1, 2, 0, 6)
        first, _ = function(name)(*rows, **options, initial_state=state)
        np.testing.assert_array_equal(first, function(name)(*rows, **options)[0])


def test_wrong_arguments(rng):
    q, k, v = arguments(rng, "causal_inline_attention", length=5)[0]

    def bad(name, match, error=ValueError, rows=(q, k, v), **options):
        with pytest.raises(error, match=match):
            getattr(linear, f"causal_{name}")(*rows, **options)

    bad("efficient_attention", "norm: got 'soft'", norm="soft")
    bad("efficient_attention", "k: got shape", rows=(q, k[:, :, 1:], v))
    bad("efficient_attention", "q: got shape", rows=(q[:, :, 1:], k, v))
    bad("efficient_attention", "q: got dtype", TypeError, rows=(q.astype(int), k, v))
    bad("efficient_attention", "initial_state: got tuple", TypeError, initial_state=(1,))
    _, state = linear.causal_inline_attention(q, k, v)
    bad("efficient_attention", "initial_state: got RunningStatistics", TypeError, initial_state=state)
    _, state = linear.causal_efficient_attention(q, k, v)
    for name, x in (("logs", state.logs.astype(F32)), ("means", state.means[:, 1:])):
        bad("efficient_attention", f"initial_state: got {name}", initial_state=replace(state, **{name: x}))
    _, state = linear.causal_inline_attention(q, k, v)
    bad("inline_attention", "initial_state: got states", initial_state=state, rows=(q, k, v[..., 1:]))
    bad("inline_attention", "phi: got 'no'", phi="no")
    bad("inline_attention", "scale: got", scale=np.inf)
    bad("focused_linear_attention", "power: got 0", power=0.0)
    bad("focused_linear_attention", "weight: got shape", weight=np.zeros((5, 3), F32))
    bad("simplified_linear_attention", "weight: got shape", weight=np.zeros((6, 0), F32))
    bad("l2vit_linear_attention", "den_min: got -1", den_min=-1.0)
    bad("l2vit_linear_attention", "tau: got shape", tau=np.zeros(3, F32))
    bad("inline_attention", "chunk_size: got 0", chunk_size=0)
