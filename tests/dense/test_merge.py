"""`merge` of partial results."""

from itertools import pairwise

import numpy as np
import pytest

import longattn as la
import tolerances
from longattn.reference import dense as reference
from random_arrays import BF16, DTYPES, F16, F32, normal, qkv


def parts_of(rng, count, shape=(2, 3, 7, 20), dtype=F32, spread=5.0):
    return [
        (normal(rng, shape, dtype), (spread * rng.standard_normal(shape[:-1])).astype(np.float32)) for _ in range(count)
    ]


def check(parts):
    out, lse = la.merge(parts)
    assert out.shape == parts[0][0].shape and out.dtype == parts[0][0].dtype
    assert lse.shape == parts[0][1].shape and lse.dtype == np.float32
    expected, expected_lse = reference.merge(parts)
    tolerances.merge(*map(list, zip(*parts, strict=True))).check(out, expected, lse, expected_lse)
    return out, lse


@pytest.mark.parametrize("count", [1, 2, 3, 9])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 7, 20), (5, 4, 16), (1, 1, 1, 1), (1, 2, 1, 131)], ids=str)
def test_parts(rng, isa, count, dtype, shape):
    check(parts_of(rng, count, shape, dtype))


def test_one_part_is_itself(rng, isa):
    ((o, lse),) = parts = parts_of(rng, 1, dtype=BF16)
    out, total = la.merge(parts)
    np.testing.assert_array_equal(out, o)
    np.testing.assert_allclose(total, lse, rtol=2 * tolerances.U)


@pytest.mark.parametrize("cuts", [(60,), (1, 2, 119), (0, 40, 40, 120), (16, 32, 64, 100)], ids=str)
@pytest.mark.parametrize("rows", [1, 20])
@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
def test_split_keys_merge_to_the_whole(rng, isa, cuts, rows, dtype):
    """Also where a part is empty, and where some rows see no key of a part."""
    q, k, v = qkv(rng, batch=2, rows=rows, keys=120, dim=32, q_dtype=dtype)
    mask = rng.random((rows, 120)) > 0.7
    mask[0, :64] = False
    whole, whole_lse = la.attention(q, k, v, mask=mask, return_lse=True)
    bounds = (0, *cuts, 120)
    parts = [
        la.attention(q, k[:, :, a:b], v[:, :, a:b], mask=mask[:, a:b], return_lse=True) for a, b in pairwise(bounds)
    ]
    out, lse = la.merge(parts)
    tolerances.same_storage(q, k, v).check(out, np.asarray(whole, np.float64), lse, whole_lse)


def test_sinks_belong_to_one_part(rng, isa):
    q, k, v = qkv(rng, rows=3, keys=80)
    sinks = np.array([1.0, -1.0, 5.0, 0.0], np.float32)
    whole, whole_lse = la.attention(q, k, v, sinks=sinks, return_lse=True)
    first = la.attention(q, k[:, :, :30], v[:, :, :30], sinks=sinks, return_lse=True)
    out, lse = la.merge([first, la.attention(q, k[:, :, 30:], v[:, :, 30:], return_lse=True)])
    tolerances.same_storage(q, k, v, offset=5.0).check(out, whole, lse, whole_lse)


def test_associative(rng, isa):
    a, b, c = parts_of(rng, 3)
    flat, flat_lse = la.merge([a, b, c])
    tolerance = tolerances.merge([a[0]] * 3, [x[1] for x in (a, b, c)])
    for nested in (la.merge([la.merge([a, b]), c]), la.merge([a, la.merge([b, c])]), la.merge([c, a, b])):
        tolerance.check(nested[0], flat, nested[1], flat_lse)


def test_unseen_parts_do_not_count(rng, isa):
    a, b = parts_of(rng, 2)
    unseen = (np.full_like(a[0], np.nan), np.full_like(a[1], -np.inf))
    with_it, without = la.merge([unseen, a, unseen, b]), la.merge([a, b])
    np.testing.assert_array_equal(with_it[0], without[0])
    np.testing.assert_array_equal(with_it[1], without[1])
    out, lse = la.merge([unseen, unseen])
    assert (out == 0).all() and (lse == -np.inf).all()


@pytest.mark.parametrize("gap", [80.0, 1e4, 3e38])
def test_huge_gaps(rng, isa, gap):
    (o1, lse1), (o2, lse2) = parts_of(rng, 2)
    out, lse = la.merge([(o1, lse1), (o2, np.full_like(lse2, gap))])
    np.testing.assert_allclose(out, o2, rtol=4 * tolerances.U)
    np.testing.assert_array_equal(lse, np.full_like(lse, gap))
    check([(o1, lse1), (o2, np.full_like(lse2, -gap))])


def test_nan_propagates(rng, isa):
    (o1, lse1), second = parts_of(rng, 2, shape=(2, 4, 8))
    o1[0, 1, 3] = np.nan
    lse1[1, 2] = np.nan
    out, lse = la.merge([(o1, lse1), second])
    bad = np.zeros((2, 4, 8), bool)
    bad[0, 1, 3] = bad[1, 2] = True
    np.testing.assert_array_equal(np.isnan(out), bad)
    np.testing.assert_array_equal(np.isnan(lse), np.isnan(lse1))


def test_strided_parts(rng, isa):
    parts = parts_of(rng, 3)
    turned = [(o.transpose(2, 1, 0, 3).copy().transpose(2, 1, 0, 3), lse[..., ::-1].copy()[..., ::-1])
              for o, lse in parts]  # fmt: skip
    for a, b in zip(la.merge(parts), la.merge(turned), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 2, 0, 4), (2, 0, 4)], ids=str)
def test_empty(rng, shape):
    out, lse = la.merge(parts_of(rng, 2, shape))
    assert out.shape == shape and lse.shape == shape[:-1]


def test_any_iterable_of_parts(rng):
    parts = parts_of(rng, 2)
    np.testing.assert_array_equal(la.merge(iter(parts))[0], la.merge(parts)[0])
