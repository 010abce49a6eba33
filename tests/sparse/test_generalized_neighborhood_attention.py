"""Neighbourhood attention on grids of one to three axes, its windows and its tile statistics."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import longattn as la
import tolerances
from longattn import _core
from longattn.reference import sparse as reference
from longattn.sparse._grid import window_axis
from random_arrays import BF16, DTYPES, F32, LAYOUTS, normal
from running import on_threads, running_on

gna = la.sparse.generalized_neighborhood_attention


def grid_qkv(rng, shape, *, batch=1, heads=2, kv_heads=None, dim=8, value_dim=None, dtype=F32, layout="contiguous"):
    kv_heads, value_dim = kv_heads or heads, value_dim or dim
    q = normal(rng, (batch, heads, *shape, dim), dtype, layout)
    k = normal(rng, (batch, kv_heads, *shape, dim), dtype, layout)
    return q, k, normal(rng, (batch, kv_heads, *shape, value_dim), dtype, layout)


def tokens(x):
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


def check(q, k, v, offset=0.0, extra=0, **rule):
    out, lse = gna(q, k, v, return_lse=True, **rule)
    assert out.dtype == q.dtype and out.shape == (*q.shape[:-1], v.shape[-1]) and lse.shape == q.shape[:-1]
    expected, expected_lse = reference.generalized_neighborhood_attention(q, k, v, return_lse=True, **rule)
    keys = tokens(k)
    if extra:
        keys = np.concatenate([keys, rule["extra_k"]], axis=2)
    tolerances.attention(tokens(q), keys, tokens(v), scale=rule.get("scale"), offset=offset, together=8).check(
        out, expected, lse, expected_lse
    )
    return out, lse


def rules_of(length):
    for window, dilation in itertools.product(range(1, length + 1), repeat=2):
        if window * dilation <= length:
            for stride, causal in itertools.product(range(1, window + 1), (False, True)):
                yield window, stride, dilation, causal


@pytest.mark.parametrize("length", range(1, 13))
def test_every_window_of_an_axis(length):
    for window, stride, dilation, causal in rules_of(length):
        axis = window_axis(length, window, stride, dilation, causal)
        for x, (group, start, end, position) in enumerate(axis.intervals.astype(int)):
            found = [group + dilation * u for u in range(start, end)]
            assert found == reference.window_tokens(x, length, window, stride, dilation, causal)
            assert group + dilation * position == x


# NATTEN's rule, in the form it is published in


def natten_window(index, length, kernel, dilation, causal):
    """First token and end (`start`, `end`, in steps of `dilation`) of a window without strides."""
    if causal:
        return max(index // dilation - kernel + 1, 0) * dilation + index % dilation, min(index + dilation, length)
    half = kernel // 2
    if dilation == 1:
        start = max(index - half, 0) + (index + half >= length) * (length - index - half - 1)
    elif index - half * dilation < 0:
        start = index % dilation
    elif index + half * dilation >= length:
        whole = length // dilation * dilation
        rest, place = length - whole, index % dilation
        start = length - rest + place - 2 * half * dilation if place < rest else whole + place - kernel * dilation
    else:
        start = index - half * dilation
    return start, min(start + kernel * dilation, length)


def strided_window(index, length, kernel, stride, causal):
    """First token and end of a window with strides: that of the leader of the group of queries `index` is in."""
    group = index // stride * stride
    if causal:
        leader = min(group + stride - 1, length - 1)
        return max(leader - kernel + 1, 0), index + 1
    leader = min(group + stride // 2, length - 1)
    left, right = kernel // 2, kernel // 2 + kernel % 2 - 1
    start = max(leader - left, 0) + (leader + right >= length) * (length - right - leader - 1)
    return start, start + kernel


@pytest.mark.parametrize("length", range(1, 25))
def test_windows_start_and_end_where_natten_has_them(length):
    seen = 0
    for window, stride, dilation, causal in rules_of(length):
        if stride > 1 or (window % 2 == 0 and not causal):
            continue
        for index, (group, first, last, _) in enumerate(window_axis(length, window, 1, dilation, causal).intervals):
            start, end = natten_window(index, length, window, dilation, causal)
            expected = list(range(start, end, dilation))
            assert [int(group) + dilation * u for u in range(int(first), int(last))] == expected
            assert reference.window_tokens(index, length, window, 1, dilation, causal) == expected
            seen += 1
    assert seen >= length * (length + 1) // 2


@pytest.mark.parametrize("length", range(1, 25))
def test_windows_with_strides_start_and_end_where_natten_has_them(length):
    for window, stride, causal in itertools.product(range(1, length + 1), range(1, length + 1), (False, True)):
        if stride > window:
            continue
        for index, (_, first, last, _) in enumerate(window_axis(length, window, stride, 1, causal).intervals):
            assert (int(first), int(last)) == strided_window(index, length, window, stride, causal)


@pytest.mark.parametrize("length", [1, 2, 5, 8, 11])
def test_kernels_look_at_the_windows_that_natten_has(rng, isa, length):
    """With the identity as values a query's output is other than 0 where its window is."""
    q, k = (normal(rng, (1, 1, length, 4)) for _ in "qk")
    v = np.eye(length, dtype=F32)[None, None]
    for window, stride, dilation, causal in rules_of(length):
        published = stride == 1 and (window % 2 or causal)
        if not published and dilation > 1:
            continue
        seen = np.zeros((length, length), bool)
        for index in range(length):
            start, end = (
                natten_window(index, length, window, dilation, causal)
                if published
                else strided_window(index, length, window, stride, causal)
            )
            seen[index, start:end:dilation] = True
        out = gna(q, k, v, window=window, stride=stride, dilation=dilation, causal=causal)
        np.testing.assert_array_equal(out[0, 0] != 0, seen)


def test_every_rule_on_one_axis(rng):
    q, k, v = grid_qkv(rng, (7,), dim=4)
    for window, stride, dilation, causal in rules_of(7):
        check(q, k, v, window=window, stride=stride, dilation=dilation, causal=causal)


@pytest.mark.parametrize("causal", list(itertools.product((False, True), repeat=2)))
def test_every_rule_on_two_axes(rng, causal):
    q, k, v = grid_qkv(rng, (4, 5), heads=1, dim=4)
    first, second = ([r[:3] for r in rules_of(n) if r[3] == c] for n, c in zip((4, 5), causal, strict=True))
    for one, other in itertools.product(first, second):
        window, stride, dilation = zip(one, other, strict=True)
        check(q, k, v, window=window, stride=stride, dilation=dilation, causal=causal)


@pytest.mark.parametrize("causal", list(itertools.product((False, True), repeat=3)))
def test_every_rule_on_three_axes(rng, causal):
    q, k, v = grid_qkv(rng, (2, 3, 4), heads=1, dim=4)
    rules = [[r[:3] for r in rules_of(n) if r[3] == c] for n, c in zip((2, 3, 4), causal, strict=True)]
    for of_axes in itertools.product(*rules):
        window, stride, dilation = zip(*of_axes, strict=True)
        check(q, k, v, window=window, stride=stride, dilation=dilation, causal=causal)


CASES = [
    ((40,), {"window": 7}),
    ((300,), {"window": 64, "stride": 8, "causal": True}),
    ((56, 56), {"window": 7}),
    ((20, 33), {"window": (13, 6), "stride": (1, 3)}),
    ((17, 30), {"window": (3, 5), "dilation": (4, 2), "causal": (True, False)}),
    ((6, 10, 11), {"window": (3, 5, 7)}),
    ((5, 9, 12), {"window": (2, 3, 6), "stride": (2, 1, 4), "dilation": (2, 3, 1), "causal": (False, False, True)}),
]


@pytest.mark.parametrize(("shape", "rule"), CASES)
def test_larger_grids(rng, isa, shape, rule):
    check(*grid_qkv(rng, shape, heads=2, dim=24, value_dim=20), **rule)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_dtypes_and_layouts(rng, dtype, layout):
    q, k, v = grid_qkv(rng, (12, 13), batch=2, heads=4, kv_heads=2, dim=16, dtype=dtype, layout=layout)
    check(q, k, v, window=5)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1), (200, 1), (15, 5)])
def test_grouped_heads(rng, isa, heads, kv_heads):
    q, k, v = grid_qkv(rng, (6, 7), batch=2, heads=heads, kv_heads=kv_heads, dim=16)
    check(q, k, v, window=3)


def test_bf16_products(rng, isa):
    q, k, v = grid_qkv(rng, (14, 15), heads=2, dim=32, dtype=BF16)
    check(q, k, v, window=7, bias=rng.standard_normal((2, 13, 13)), offset=5.0)


@pytest.mark.parametrize(("shape", "rule"), CASES)
def test_bias(rng, isa, shape, rule):
    q, k, v = grid_qkv(rng, shape, heads=2, dim=8)
    window = reference.spread(rule["window"], len(shape))
    table = rng.standard_normal((2, *(2 * w - 1 for w in window))).astype(np.float32)
    check(q, k, v, bias=table, offset=float(np.abs(table).max()), **rule)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [0, 1, 70])
def test_extra_keys(rng, dtype, count):
    q, k, v = grid_qkv(rng, (9, 10), batch=2, heads=4, kv_heads=2, dim=16, value_dim=12, dtype=dtype)
    extra_k, extra_v = normal(rng, (2, 2, count, 16), dtype), normal(rng, (2, 2, count, 12), dtype)
    check(q, k, v, window=3, extra_k=extra_k, extra_v=extra_v, extra=count)


def test_score_options(rng, isa):
    q, k, v = grid_qkv(rng, (9, 10), heads=2, dim=16)
    sinks = rng.standard_normal(2).astype(np.float32)
    check(q, k, v, window=3, scale=0.4, softcap=2.0, sinks=sinks, offset=3.0)
    factors = rng.standard_normal(2)
    out = gna(q, k, v, window=3, scale=factors)
    expected = np.concatenate([gna(q[:, h : h + 1], k[:, h : h + 1], v[:, h : h + 1], window=3, scale=factors[h])
                               for h in range(2)], axis=1)  # fmt: skip
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)


@settings(max_examples=20 * len(_core.available_isas()))
@given(data=st.data(), seed=st.integers(0, 2**32 - 1), isa=st.sampled_from(_core.available_isas()),
       heads=st.sampled_from([(1, 1), (4, 2), (3, 1)]))  # fmt: skip
def test_random_rules(data, seed, isa, heads):
    shape = tuple(data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=3)))
    rule = {"window": [], "stride": [], "dilation": [], "causal": []}
    for length in shape:
        window = data.draw(st.integers(1, length))
        for name, value in (
            ("window", window),
            ("stride", data.draw(st.integers(1, window))),
            ("dilation", data.draw(st.integers(1, length // window))),
            ("causal", data.draw(st.booleans())),
        ):
            rule[name].append(value)
    q, k, v = grid_qkv(np.random.default_rng(seed), shape, heads=heads[0], kv_heads=heads[1], dim=5)
    with running_on(isa):
        check(q, k, v, **{name: tuple(values) for name, values in rule.items()})


def test_stride_of_the_window_is_blocks(rng, isa):
    q, k, v = grid_qkv(rng, (12, 15), dim=16)
    out = gna(q, k, v, window=(4, 5), stride=(4, 5))
    blocks = [x.reshape(1, 2, 3, 4, 3, 5, 16).transpose(0, 2, 4, 1, 3, 5, 6).reshape(9, 2, 20, 16) for x in (q, k, v)]
    expected = la.attention(*blocks).reshape(1, 3, 3, 2, 4, 5, 16).transpose(0, 3, 1, 4, 2, 5, 6).reshape(out.shape)
    tolerances.same_storage(tokens(q), tokens(k), tokens(v)).check(out, expected)


@pytest.mark.parametrize("shape", [(50,), (7, 9), (3, 4, 5)])
def test_window_of_the_axis_is_dense(rng, isa, shape):
    q, k, v = grid_qkv(rng, shape, heads=4, kv_heads=2, dim=16)
    out, lse = gna(q, k, v, window=shape, return_lse=True)
    expected, expected_lse = la.attention(tokens(q), tokens(k), tokens(v), return_lse=True)
    tolerances.same_storage(tokens(q), tokens(k), tokens(v)).check(
        out, expected.reshape(out.shape), lse, expected_lse.reshape(lse.shape)
    )


@pytest.mark.parametrize("window", [1, 5, 16, 60])
def test_causal_axis_is_a_sliding_window(rng, isa, window):
    q, k, v = grid_qkv(rng, (60,), heads=4, kv_heads=2, dim=16)
    expected = la.attention(q, k, v, causal=True, window=(window - 1, 0))
    tolerances.same_storage(q, k, v).check(gna(q, k, v, window=window, causal=True), expected)


def test_dilation_is_interleaved_grids(rng, isa):
    q, k, v = grid_qkv(rng, (12, 15), dim=16)
    out = gna(q, k, v, window=(3, 4), dilation=3)
    for y, x in itertools.product(range(3), range(3)):
        own = (..., slice(y, None, 3), slice(x, None, 3), slice(None))
        tolerances.same_storage(tokens(q), tokens(k), tokens(v)).check(
            out[own], gna(q[own], k[own], v[own], window=(3, 4))
        )


def test_heads_last_is_a_view(rng):
    q, k, v = (normal(rng, (2, 9, 10, 4, 16)) for _ in range(3))
    out = gna(*(np.moveaxis(x, -2, 1) for x in (q, k, v)), window=5)
    expected = gna(*(np.ascontiguousarray(np.moveaxis(x, -2, 1)) for x in (q, k, v)), window=5)
    np.testing.assert_array_equal(out, expected)


def test_threads_do_not_matter(rng):
    q, k, v = grid_qkv(rng, (30, 31), heads=3, dim=16)
    results = on_threads(lambda: gna(q, k, v, window=7))
    assert all(np.array_equal(results[0], other) for other in results[1:])


def test_nan_reaches_only_those_that_see_it(rng, isa):
    q, k, v = grid_qkv(rng, (12, 12), heads=1, dim=16)
    expected = gna(q, k, v, window=3)
    k, v = k.copy(), v.copy()
    v[0, 0, 5, 5], k[0, 0, 9, 2] = np.nan, np.inf
    out = gna(q, k, v, window=3)
    mask = la.sparse.visible_tokens((12, 12), window=3)
    hit = (mask[:, 5 * 12 + 5] | mask[:, 9 * 12 + 2]).reshape(12, 12)
    assert np.isnan(out[0, 0, mask[:, 65].reshape(12, 12)]).all()
    tolerances.same_storage(tokens(q), tokens(k), tokens(v)).check(out[0, 0, ~hit], expected[0, 0, ~hit])


def test_empty(rng):
    q, k, v = grid_qkv(rng, (0, 4), dim=8)
    assert gna(q, k, v, window=1).shape == (1, 2, 0, 4, 8)


@pytest.mark.parametrize("shape", [(6,), (4, 5), (2, 3, 4)])
def test_visible_tokens(shape):
    rule = {"window": 2, "stride": 2, "causal": (True,) + (False,) * (len(shape) - 1)}
    np.testing.assert_array_equal(la.sparse.visible_tokens(shape, **rule), reference.neighborhood_mask(shape, **rule))


@pytest.mark.parametrize(
    ("shape", "rule"),
    [
        ((24,), {"window": 5}),
        ((8, 12), {"window": (4, 6), "stride": (2, 3)}),
        ((9, 8), {"window": 3, "dilation": (2, 1), "causal": (False, True)}),
    ],
)
@pytest.mark.parametrize("tile", [(1, 1), (2, 3), (4, 4)])
def test_tile_stats_count_tiles(shape, rule, tile):
    stats = la.sparse.gna_tile_stats(shape, **rule, q_tile=tile[0], kv_tile=tile[1])
    visited, perfect = 1, True
    for a, length in enumerate(shape):
        window, stride, dilation, causal = (
            reference.spread(rule.get(name, default), len(shape))[a]
            for name, default in (("window", 0), ("stride", 1), ("dilation", 1), ("causal", False))
        )
        pairs = 0
        for group in range(dilation):
            members = list(range(group, length, dilation))
            for first in range(0, len(members), tile[0]):
                seen = [
                    {y // dilation for y in reference.window_tokens(x, length, window, stride, dilation, causal)}
                    for x in members[first : first + tile[0]]
                ]
                span = set(range(min(map(min, seen)), max(map(max, seen)) + 1))
                for key in range(0, len(members), tile[1]):
                    block = set(range(key, min(key + tile[1], len(members))))
                    if span & block:
                        pairs += 1
                        perfect &= all(block <= one for one in seen)
        visited *= pairs
    assert (stats.visited, stats.perfectly_block_sparse) == (visited, perfect)
    assert stats.speedup_bound == stats.dense / stats.visited


def test_blocks_are_perfectly_block_sparse():
    stats = la.sparse.gna_tile_stats((64, 64), window=16, stride=16, q_tile=8, kv_tile=8)
    assert stats.perfectly_block_sparse and stats.speedup_bound == stats.flop_bound == 16
    assert not la.sparse.gna_tile_stats((64, 64), window=16, q_tile=8, kv_tile=8).perfectly_block_sparse


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"window": 9}, ValueError, "window: got 9 with dilation 1 on axis 0"),
        ({"window": 3, "dilation": 3}, ValueError, "window: got 3 with dilation 3 on axis 0"),
        ({"window": 3, "stride": 4}, ValueError, "stride: got 4 on axis 0"),
        ({"window": 0}, ValueError, "window: got 0"),
        ({"window": (3, 3, 3)}, ValueError, "window: got 3 numbers"),
        ({"window": 3.0}, TypeError, "window: got 3.0"),
        ({"window": 3, "causal": 1}, TypeError, "causal: got 1"),
        ({"window": 3, "causal": (True,)}, ValueError, "causal: got 1 flags"),
        ({"window": 3, "bias": np.zeros((2, 5, 4), np.float32)}, ValueError, "bias: got shape"),
        ({"window": 3, "extra_k": np.zeros((1, 2, 3, 8), np.float32)}, ValueError, "extra_v: got none"),
        ({"window": 3, "q": np.zeros((2, 8, 8), np.float32)}, ValueError, "q: got shape"),
        ({"window": 3, "k": np.zeros((1, 2, 8, 7, 8), np.float32)}, ValueError, "v: got a grid"),
        ({"window": 3, "k": np.zeros((1, 2, 8, 8, 8), np.float64)}, TypeError, "k: got dtype float64"),
    ],
)
def test_bad_input(change, error, words):
    given_ = {name: np.zeros((1, 2, 8, 8, 8), np.float32) for name in "qkv"} | change
    with pytest.raises(error, match=words.replace("(", r"\(")):
        gna(**given_)
