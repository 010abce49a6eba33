"""HaloNet's attention: blocks of queries with a rim of keys, on one to three axes."""

import warnings

import numpy as np
import pytest

import longattn as la
import tolerances
from longattn.reference import sparse as reference
from random_arrays import DTYPES, F32, LAYOUTS, normal
from running import on_threads

halo_attention = la.sparse.halo_attention
backward = la.sparse.halo_attention_backward


def image(rng, shape=(16, 16), *, batch=1, heads=4, kv_heads=2, dim=16, value_dim=12, dtype=F32, layout="contiguous"):
    q = normal(rng, (batch, heads, *shape, dim), dtype, layout)
    k = normal(rng, (batch, kv_heads, *shape, dim), dtype, layout)
    return q, k, normal(rng, (batch, kv_heads, *shape, value_dim), dtype, layout)


def tables(rng, shape, block, halo, dim=16):
    sizes = np.broadcast_to(block, len(shape)) + np.broadcast_to(halo, len(shape))
    return [0.3 * rng.standard_normal((2 * size - 1, dim)).astype(np.float32) for size in sizes]


def tokens(x):
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


def check(q, k, v, **options):
    out, lse = halo_attention(q, k, v, return_lse=True, **options)
    expected, expected_lse = reference.halo_attention(q, k, v, return_lse=True, **options)
    # The relative part is at most this; its products err like the logits' own.
    norms = [np.linalg.norm(t, axis=-1).max() for t in options.get("relative", ())]
    offset = 2 * sum(norms) * np.linalg.norm(q.astype(np.float64), axis=-1).max() if norms else 0.0
    tolerances.attention(tokens(q), tokens(k), tokens(v), offset=offset).check(out, expected, lse, expected_lse)
    assert out.dtype == q.dtype
    return out


@pytest.mark.parametrize("mask_pad", [True, False])
@pytest.mark.parametrize(
    ("shape", "block", "halo", "stride"),
    [
        ((16, 16), 8, 3, 1),
        ((16, 24), 8, 3, 2),
        ((13, 10), 4, 2, 1),
        ((13, 10), 4, 5, 2),
        ((9, 9), 3, 0, 3),
        ((13, 10), (4, 3), (2, 5), (2, 3)),
        ((70,), 16, 5, 1),
        ((70,), 12, 20, 4),
        ((5, 6, 7), 3, 2, 1),
        ((4, 9, 6), (2, 4, 3), (1, 0, 4), (2, 2, 1)),
    ],
)
@pytest.mark.parametrize("relative", [False, True])
def test_reference(rng, isa, shape, block, halo, stride, mask_pad, relative):
    q, k, v = image(rng, shape)
    given = {"relative": tables(rng, shape, block, halo)} if relative else {}
    check(q, k, v, block=block, halo=halo, stride=stride, mask_pad=mask_pad, **given)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_dtypes_and_layouts(rng, dtype, layout):
    q, k, v = image(rng, (9, 10), batch=2, dtype=dtype, layout=layout)
    check(q, k, v, block=4, halo=2, relative=tables(rng, (9, 10), 4, 2), scale_rel=True, scale=0.3)


def test_no_halo_is_window_attention(rng, isa):
    q, k, v = image(rng, (12, 15), kv_heads=4)
    out = halo_attention(q, k, v, block=3, halo=0)
    expected = la.sparse.generalized_neighborhood_attention(q, k, v, window=3, stride=3)
    tolerances.same_storage(tokens(q), tokens(k), tokens(v)).check(out, expected)


def test_blocks_of_one_are_neighbourhood_attention_inside(rng, isa):
    q, k, v = image(rng, (11, 12))
    out = halo_attention(q, k, v, block=1, halo=2)
    expected = la.sparse.generalized_neighborhood_attention(q, k, v, window=5)
    inside = (..., slice(2, -2), slice(2, -2), slice(None))
    tolerances.same_storage(tokens(q), tokens(k), tokens(v)).check(out[inside], expected[inside])


def test_block_of_the_image_is_dense(rng, isa):
    q, k, v = image(rng, (9, 9))
    expected = la.attention(tokens(q), tokens(k), tokens(v)).reshape(1, 4, 9, 9, 12)
    tolerances.same_storage(tokens(q), tokens(k), tokens(v)).check(halo_attention(q, k, v, block=9, halo=0), expected)


@pytest.mark.parametrize("stride", [1, 3])
@pytest.mark.parametrize(("block", "halo"), [(3, 2**32), (2**63 - 1, 0), (2**63 - 4, 9), (2**62 - 1, 2**63 - 1)])
def test_any_region_beyond_the_grid_is_dense(rng, block, halo, stride):
    """However far, also beyond integers of 64 bits."""
    q, k, v = image(rng, (7, 5))
    given = {"block": block // stride * stride, "halo": halo, "stride": stride}
    out = halo_attention(q, k, v, **given)
    rows = np.ascontiguousarray(q[:, :, ::stride, ::stride])
    dense = la.attention(tokens(rows), tokens(k), tokens(v))
    tolerances.same_storage(tokens(q), tokens(k), tokens(v)).check(tokens(out), dense)
    near = given | {"block": 12, "halo": 7}
    (_, ours), (_, theirs) = (gradients(np.random.default_rng(1), q, k, v, **rule) for rule in (given, near))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_stride_leaves_out_rows(rng, isa):
    q, k, v = image(rng, (16, 18))
    one, other = (halo_attention(q, k, v, block=6, halo=2, stride=stride) for stride in (1, 3))
    tolerances.same_storage(tokens(q), tokens(k), tokens(v)).check(other, one[:, :, ::3, ::3])


def test_axes_of_one_place_change_nothing(rng, isa):
    q, k, v = image(rng, (40,))
    first = tables(rng, (40,), 8, 3)[0]
    expected = halo_attention(q, k, v, block=8, halo=3, relative=[first])
    none = np.zeros((1, 16), np.float32)
    for shape in ((1, 40), (40, 1), (1, 40, 1)):
        parts = (x.reshape(*x.shape[:2], *shape, x.shape[-1]) for x in (q, k, v))
        block, halo = (tuple(n if length > 1 else m for length in shape) for n, m in ((8, 1), (3, 0)))
        given = [first if length > 1 else none for length in shape]
        out = halo_attention(*parts, block=block, halo=halo, relative=given)
        np.testing.assert_allclose(tokens(out), expected, atol=2e-6)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"stride": 3}, ValueError, "stride: got 3, expected a divisor of the block 8"),
        ({"block": 0}, ValueError, "block: got 0"),
        ({"halo": -1}, ValueError, "halo: got -1"),
        ({"relative": [np.zeros((21, 4), np.float32)]}, ValueError, "relative: got 1 tables, expected 2"),
        ({"relative": [np.zeros((21, 4)), np.zeros((20, 4))]}, ValueError, r"relative\[1\]: got shape"),
        ({"relative": 3}, TypeError, "relative: got int"),
        ({"block": (8, 8, 8)}, ValueError, "block: got 3 numbers, expected 2"),
        ({"q": np.zeros((1, 1, 8, 4), np.float32)}, ValueError, "k: got shape"),
        ({"mask_pad": 1}, TypeError, "mask_pad: got 1"),
        ({"scale": np.ones(1, np.float32)}, TypeError, "scale: got"),
        ({"return_lse": 1, "mask_pad": False}, TypeError, "return_lse: got 1"),
        ({"block": 2**40, "mask_pad": False}, ValueError, "block: got 1099511627776 with a halo of 3 and zeros around"),
        ({"halo": 2**31, "mask_pad": False}, ValueError, "block: got 8 with a halo of 2147483648 and zeros around"),
        ({"block": 2**63 - 1, "halo": 2**63 - 1, "mask_pad": False}, ValueError, "expected at most 4294967295 places"),
    ],
)
def test_bad_input(change, error, words, no_copies):
    given = {name: np.zeros((1, 1, 8, 8, 4), np.float32) for name in "qkv"} | change
    with pytest.raises(error, match=words):
        halo_attention(**given)


@pytest.fixture
def no_copies(monkeypatch):
    """Errors come before keys are copied."""
    monkeypatch.setattr(np, "pad", lambda *_: pytest.fail("keys were copied"))


# Gradients; `tests/torch/test_torch_sparse.py` has them beside those of torch's own operations.


def gradients(rng, q, k, v, **rule):
    """Of a fixed linear form: what it is of output and lse, and the gradients, those of the tables at the end."""
    out, lse = halo_attention(q, k, v, return_lse=True, **rule)
    form = normal(rng, out.shape, out.dtype), normal(rng, lse.shape)
    found = backward(form[0], q, k, v, out, lse, d_lse=form[1], **rule)
    return form, [*found[:3], *(found.d_relative or ())]


@pytest.mark.parametrize("mask_pad", [True, False])
@pytest.mark.parametrize("scale_rel", [True, False])
@pytest.mark.parametrize(
    ("shape", "rule"),
    [
        ((9,), {"block": 4, "halo": 2, "stride": 2, "scale": 0.7}),
        ((7, 5), {"block": (4, 3), "halo": (1, 2), "stride": (2, 3)}),
        ((3, 4), {"block": 9, "halo": 4}),
        ((3, 4, 5), {"block": 2, "halo": (1, 0, 3)}),
    ],
)
def test_gradients_are_slopes_of_the_reference(rng, isa, shape, rule, mask_pad, scale_rel):
    """Along one direction for each of the arguments, by differences in float64."""
    rule = rule | {"mask_pad": mask_pad, "scale_rel": scale_rel}
    arrays = [*image(rng, shape, dim=8, value_dim=6), *tables(rng, shape, rule["block"], rule["halo"], dim=8)]
    form, found = gradients(rng, *arrays[:3], relative=arrays[3:], **rule)

    def value(n, direction):
        given = [x.astype(float) for x in arrays]
        given[n] = given[n] + direction
        results = reference.halo_attention(*given[:3], relative=given[3:], return_lse=True, **rule)
        return sum(float((w * x).sum()) for w, x in zip(form, results, strict=True))

    for n, ours in enumerate(found):
        assert ours.shape == arrays[n].shape and ours.dtype == F32
        step = 1e-5 * rng.standard_normal(ours.shape)
        slope = (value(n, step) - value(n, -step)) / 2e-5
        assert abs(slope - (ours * step).sum() / 1e-5) < 1e-5 * np.linalg.norm(ours)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_dtypes_and_layouts(rng, dtype, layout):
    q, k, v = image(rng, (9, 10), batch=2, dtype=dtype, layout=layout)
    for rule in ({}, {"relative": tables(rng, (9, 10), 4, 2)}, {"stride": 2, "mask_pad": False}):
        ours, theirs = (
            gradients(np.random.default_rng(1), *given, block=4, halo=2, **rule)[1]
            for given in ((q, k, v), [x.copy() for x in (q, k, v)])
        )
        assert [x.dtype for x in ours[:3]] == [dtype] * 3
        assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tables_of_zeros_change_no_gradients(rng, isa, dtype):
    """What goes through further dimensions is the same as without them."""
    q, k, v = image(rng, (9, 10), dtype=dtype)
    none = [np.zeros((11, 16), F32)] * 2
    _, ours = gradients(np.random.default_rng(1), q, k, v, block=4, halo=2, relative=none)
    _, theirs = gradients(np.random.default_rng(1), q, k, v, block=4, halo=2)
    for a, b in zip(ours[:3], theirs, strict=True):
        error = np.linalg.norm(a.astype(float) - b.astype(float)) / np.linalg.norm(b.astype(float))
        assert error < {4: 1e-6, 2: 1e-3 if dtype == np.float16 else 8e-3}[dtype.itemsize]


def test_gradients_without_a_halo_are_those_of_windows(rng, isa):
    q, k, v = image(rng, (12, 15), kv_heads=4)
    out, lse = halo_attention(q, k, v, block=3, halo=0, return_lse=True)
    found = backward(out, q, k, v, out, lse, block=3, halo=0)
    expected = la.sparse.neighborhood_attention_backward(out, q, k, v, out, lse, window=3, stride=3)
    for ours, theirs in zip(found[:3], expected[:3], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert found.d_relative is None


def test_gradients_of_left_out_queries_are_zeros(rng):
    q, k, v = image(rng, (12, 12))
    _, (dq, *_) = gradients(rng, q, k, v, block=6, halo=1, stride=3)
    assert not dq[:, :, np.arange(12) % 3 > 0].any() and not dq[..., np.arange(12) % 3 > 0, :].any()
    assert dq[:, :, ::3, ::3].any(axis=-1).all()


def test_gradients_on_any_number_of_threads(rng):
    q, k, v = image(rng, (20, 21))
    given = {"block": 4, "halo": 2, "relative": tables(rng, (20, 21), 4, 2)}
    found = on_threads(lambda: gradients(np.random.default_rng(1), q, k, v, **given)[1], (1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("relative", [False, True])
def test_gradients_are_nan_where_what_is_seen_is(rng, isa, relative):
    q, k, v = image(rng, (20,))
    given = {"relative": tables(rng, (20,), 4, 2)} if relative else {}
    k[:, 0, 10] = np.nan
    _, found = gradients(rng, q, k, v, block=4, halo=2, **given)
    # The blocks from 8 and from 12 on see place 10, and with it the places 6 to 17.
    queries, keys = np.zeros(20, bool), np.zeros(20, bool)
    queries[8:16], keys[6:18] = True, True
    for gradient, heads, bad in zip(found[:3], (2, 1, 1), (queries, keys, keys), strict=True):
        assert (np.isnan(gradient[:, :heads]).any(axis=-1) == bad).all()
        assert np.isfinite(gradient[:, heads:]).all()


@pytest.mark.parametrize("relative", [False, True])
def test_no_warnings_of_infinite_numbers(rng, relative):
    """Whether the gradients go through numpy or not."""
    q, k, v = (100 * x for x in image(rng, (12,), dtype=np.dtype(np.float16)))
    given = {"block": 4, "halo": 2, "scale": 1.0}
    if relative:
        given["relative"] = [100 * x for x in tables(rng, (12,), 4, 2)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out, lse = halo_attention(q, k, v, return_lse=True, **given)
        found = backward(np.full_like(out, 6e4), q, k, v, out, lse, d_lse=lse, **given)
        assert np.isinf(found.dq).any()
        k[:, 0, 5], q[:, 3, 2] = np.inf, -np.inf
        given |= {"relative": [np.full((11, 16), -1e300)]} if relative else {}
        out, lse = halo_attention(q, k, v, return_lse=True, **given)
        backward(out, q, k, v, out, lse, **given)


@pytest.mark.parametrize("shape", [(0,), (3, 0)])
def test_empty_grids(rng, shape):
    q, k, v = image(rng, shape)
    given = {"block": 4, "halo": 2, "relative": tables(rng, shape, 4, 2)}
    _, found = gradients(rng, q, k, v, **given)
    assert [x.shape for x in found] == [x.shape for x in (q, k, v, *given["relative"])]
    assert not any(x.any() for x in found)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"out": np.zeros((1, 1, 8, 8, 3), np.float32)}, ValueError, "out: got shape"),
        ({"d_out": np.zeros((1, 1, 8, 8, 4), np.float16)}, TypeError, "d_out: got dtype float16"),
        ({"lse": np.zeros((1, 1, 4, 4), np.float32)}, ValueError, r"lse: got shape \(1, 1, 4, 4\), expected"),
        ({"lse": None}, TypeError, "lse: got NoneType"),
        ({"d_lse": np.zeros((1, 1, 8, 8), int)}, TypeError, "d_lse: got dtype int64"),
        ({"stride": 2}, ValueError, r"out: got shape .*, expected \(1, 1, 4, 4, 4\)"),
        ({"relative": [np.zeros((21, 4))]}, ValueError, "relative: got 1 tables, expected 2"),
        ({"scale": np.ones(1, np.float32)}, TypeError, "scale: got"),
        ({"lse": np.zeros(3, np.float32), "mask_pad": False}, ValueError, r"lse: got shape \(3,\)"),
    ],
)
def test_bad_input_of_gradients(change, error, words, no_copies):
    given = {name: np.zeros((1, 1, 8, 8, 4), np.float32) for name in ("q", "k", "v", "out", "d_out")}
    with pytest.raises(error, match=words):
        backward(**(given | {"lse": np.zeros((1, 1, 8, 8), np.float32)} | change))
