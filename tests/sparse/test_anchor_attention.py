"""`anchor_attention` and `Anchor` against their float64 reference, and its identities."""

import numpy as np
import pytest

import longattn as la
import tolerances
from longattn.reference import dense
from longattn.reference import sparse as reference
from longattn.sparse import Anchor, anchor_attention
from longattn.sparse._selecting import selector_inputs
from random_arrays import BF16, DTYPES, LAYOUTS, qkv

SMALL = {"block": 16, "step": 3}


def chosen_keys(selector, q, k, scale=None):
    """Booleans `[B, H, groups, Lk]`."""
    q, k = selector_inputs(q, k)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    *_, largest = selector.attend_to_anchor(q, k, k[..., :1], factor)
    dense = selector.stripes(q, k, largest, factor).to_dense_mask()
    return dense[:, :, :: selector.block * selector.step]


def check(q, k, v, *, theta, scale=None, **options):
    """Chosen keys are those of the reference but for margins within rounding; outputs are exact over them."""
    selector = Anchor(theta=theta, **options)
    sizes = {name: value for name, value in options.items() if name != "group_reduce"}
    anchor, margins = reference.anchor_margins(q, k, scale=scale, **sizes)
    ours = chosen_keys(selector, q, k, scale)
    if options.get("group_reduce") == "any":
        margins = margins.reshape(q.shape[0], k.shape[1], -1, *margins.shape[2:]).max(axis=2)
    slack = tolerances.attention(q, k, v, scale=scale).lse_atol
    candidate = margins > -np.inf
    assert (ours >= (candidate & (margins + theta > slack))).all()
    assert (ours <= (candidate & (margins + theta >= -slack))).all()
    out, lse = anchor_attention(q, k, v, theta=theta, scale=scale, return_lse=True, **options)
    rows = np.repeat(ours, selector.block * selector.step, axis=2)[:, :, : q.shape[2]]
    mask = anchor | np.repeat(rows, q.shape[1] // rows.shape[1], axis=1)
    expected, expected_lse = dense.attention(q, k, v, mask=mask, scale=scale, return_lse=True)
    tolerances.attention(q, k, v, scale=scale).check(out, expected, lse, expected_lse)
    return ours, candidate


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (6, 2)])
@pytest.mark.parametrize(("rows", "keys"), [(300, 300), (100, 260), (97, 401), (50, 40)])
@pytest.mark.parametrize("group_reduce", [None, "any"])
def test_reference(rng, isa, heads, kv_heads, rows, keys, group_reduce):
    q, k, v = qkv(rng, batch=2, heads=heads, kv_heads=kv_heads, rows=rows, keys=keys, dim=24, value_dim=20, spread=2.0)
    _, margins = reference.anchor_margins(q, k, **SMALL)
    if not (margins > -np.inf).any():
        margins = np.zeros(1)
    for share in (0.5, 0.9):
        theta = -float(np.quantile(margins[margins > -np.inf], share))
        ours, candidate = check(q, k, v, theta=theta, group_reduce=group_reduce, **SMALL)
    if candidate.any():
        assert 0.05 < ours.sum() / candidate.sum() < 0.5


def test_reference_function(rng, isa):
    """At a threshold that no key comes near."""
    q, k, v = qkv(rng, rows=200, keys=200, spread=2.0)
    _, margins = reference.anchor_margins(q, k, **SMALL)
    candidates = np.sort(margins[margins > -np.inf])
    middle = slice(len(candidates) // 4, len(candidates) // 2)
    at = np.argmax(np.diff(candidates)[middle]) + middle.start
    theta = -float(candidates[at : at + 2].mean())
    for group_reduce in (None, "any"):
        options = {**SMALL, "theta": theta, "group_reduce": group_reduce, "return_lse": True}
        expected, expected_lse = reference.anchor_attention(q, k, v, **options)
        tolerances.attention(q, k, v).check(*_outer(anchor_attention(q, k, v, **options), expected, expected_lse))


def _outer(ours, expected, expected_lse):
    return ours[0], expected, ours[1], expected_lse


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_dtypes_and_layouts(rng, isa, dtype, layout):
    check(*qkv(rng, rows=120, keys=120, q_dtype=dtype, layout=layout), theta=4.0, **SMALL)


@pytest.mark.parametrize("init_blocks", [0, 1, 4])
def test_initial_blocks_and_scale(rng, isa, threads, init_blocks):
    check(*qkv(rng, rows=200, keys=200), theta=3.0, scale=0.4, init_blocks=init_blocks, **SMALL)


def test_the_selector_chooses_the_same(rng, isa):
    q, k, v = qkv(rng, rows=150, keys=190, q_dtype=BF16)
    out, stats = anchor_attention(q, k, v, theta=4.0, return_stats=True, **SMALL)
    other, lists = la.sparse_attention(q, k, v, Anchor(theta=4.0, **SMALL), causal=True, return_stats=True)
    tolerances.same_storage(q, k, v).check(out, other)
    assert stats.attended == lists.attended and stats.density == pytest.approx(lists.density)
    assert 0 < stats.scored == lists.scored


# Identities


def test_any_key_is_near_enough(rng, isa):
    q, k, v = qkv(rng, rows=200, keys=230)
    out, lse = anchor_attention(q, k, v, theta=float("inf"), return_lse=True, **SMALL)
    expected, expected_lse = la.attention(q, k, v, causal=True, return_lse=True)
    tolerances.same_storage(q, k, v).check(out, expected, lse, expected_lse)


def test_no_key_is_near_enough(rng, isa):
    q, k, v = qkv(rng, rows=200, keys=200)
    position, j = np.arange(200)[:, None], np.arange(200)
    mask = (j <= position) & ((j < 16) | (j >= position // 48 * 48))
    out = anchor_attention(q, k, v, theta=-float("inf"), **SMALL)
    tolerances.same_storage(q, k, v).check(out, la.attention(q, k, v, mask=mask))


def test_one_group_is_causal_attention(rng, isa):
    q, k, v = qkv(rng, rows=48, keys=48)
    out = anchor_attention(q, k, v, theta=0.0, **SMALL)
    tolerances.same_storage(q, k, v).check(out, la.attention(q, k, v, causal=True))


def test_where_lists_are_cut_does_not_matter(rng, isa):
    """A single head's lists are cut into pieces, many heads' are not."""
    q, k, v = qkv(rng, heads=1, kv_heads=1, rows=64, keys=6000)
    options = {"block": 16, "step": 4, "theta": 6.0}
    alone = anchor_attention(q, k, v, **options)
    many = anchor_attention(*(np.repeat(x, 40, axis=1) for x in (q, k, v)), **options)
    tolerances.same_storage(q, k, v).check(many, np.repeat(alone, 40, axis=1))


def test_no_key_is_used_twice(rng):
    q, k, _ = qkv(rng, rows=200, keys=230)
    selector = Anchor(theta=4.0, **SMALL)
    both = selector.anchor(q, k).to_dense_mask() & np.repeat(chosen_keys(selector, q, k), 48, axis=2)[:, :, :200]
    assert not both.any()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"block": 0}, ValueError, r"block: got 0"),
        ({"step": 0}, ValueError, r"step: got 0"),
        ({"theta": float("nan")}, ValueError, r"theta: got nan"),
        ({"theta": "a"}, TypeError, r"theta: got 'a'"),
        ({"init_blocks": -1}, ValueError, r"init_blocks: got -1"),
        ({"group_reduce": "all"}, ValueError, r"group_reduce: got 'all', expected 'any' or None"),
        ({"return_stats": 1}, TypeError, r"return_stats: got 1"),
        ({"out": np.zeros((1, 4, 9, 15), np.float32)}, ValueError, r"out: got shape"),
    ],
)
def test_bad_arguments(rng, change, error, message):
    q, k, v = qkv(rng, rows=9, keys=9)
    with pytest.raises(error, match=message):
        anchor_attention(q, k, v, **change)


def test_out_and_rank_3(rng):
    q, k, v = (x[0] for x in qkv(rng, rows=100, keys=100))
    out = np.empty_like(q)
    given, lse, stats = anchor_attention(q, k, v, **SMALL, out=out, return_lse=True, return_stats=True)
    assert given is out and lse.shape == (4, 100) and 0 < stats.density <= 1
    np.testing.assert_array_equal(out, anchor_attention(q, k, v, **SMALL))
