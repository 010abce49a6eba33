"""`regional_cross_attention` and regions of boxes."""

import numpy as np
import pytest

import longattn as la
from longattn.vision import box_regions, fourier_boxes, region_texts
from longattn.vision.regional_cross_attention import METHOD, regional_cross_attention
from random_arrays import F32, normal
from vision_checks import check, check_kinds, raises, same

BOXES = np.array([[0.0, 0.0, 0.6, 0.7], [0.4, 0.3, 1.0, 1.0], [0.1, 0.5, 0.5, 0.9]])


def case(rng, shape=(9, 11), tokens=7, kv_heads=2):
    regions, members = box_regions(BOXES, shape)
    q = normal(rng, (2, 4, *shape, 16))
    k, v = (normal(rng, (2, kv_heads, len(members), tokens, n)) for n in (16, 12))
    return q, k, v, regions


@pytest.mark.parametrize("with_null", [False, True])
@pytest.mark.parametrize("ragged", [False, True])
def test_reference(rng, isa, threads, ragged, with_null):
    q, k, v, regions = case(rng)
    options = {"null": normal(rng, (4, 12))} if with_null else {}
    if ragged:
        options["lengths"] = rng.integers(0, 8, (2, k.shape[2]))
    check(METHOD, q, k, v, regions, **options)
    check(METHOD, q, k, v, np.stack([regions, regions[::-1]]), **options, scale=0.3)


def test_kinds(rng):
    q, k, v, regions = case(rng)
    check_kinds(METHOD, q, k, v, regions, null=normal(rng, (4, 12)))


def flat(x):
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


def test_one_box_over_everything(rng, isa):
    q, k, v, _ = case(rng)
    regions, members = box_regions(np.array([[0.0, 0, 1, 1]]), (9, 11))
    assert members.tolist() == [[True]]
    out = regional_cross_attention(q, k[:, :, :1], v[:, :, :1], regions)
    expected = la.attention(flat(q), k[:, :, 0], v[:, :, 0]).reshape(out.shape)
    same(METHOD, out, expected, q, k[:, :, :1], v[:, :, :1], regions)


def test_disjoint_boxes_and_masks(rng, isa):
    boxes = np.array([[0.0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1]])
    regions, members = box_regions(boxes, (8, 10))
    q, k, v, _ = case(rng, (8, 10))
    k, v = k[:, :, :2], v[:, :, :2]
    assert members.tolist() == [[True, False], [False, True]]
    out = regional_cross_attention(q, k, v, regions)
    mask = np.repeat(regions.reshape(-1, 1) == np.arange(2), 7, axis=1)
    expected = la.attention(flat(q), flat(k), flat(v), mask=mask).reshape(out.shape)
    same(METHOD, out, expected, q, k, v, regions)


def test_all_regions_masked_and_added(rng, isa):
    q, k, v, regions = case(rng)
    out = regional_cross_attention(q, k, v, regions)
    every = [la.attention(flat(q), k[:, :, r], v[:, :, r]).reshape(out.shape) for r in range(k.shape[2])]
    expected = sum((regions == r)[..., None] * part for r, part in enumerate(every))
    same(METHOD, out, expected, q, k, v, regions)


def test_the_order_of_boxes(rng):
    q, _, _, regions = case(rng)
    _, members = box_regions(BOXES, (9, 11))
    other, others = box_regions(BOXES[::-1], (9, 11))
    tokens = normal(rng, (3, 5, 16))
    outs = []
    for numbers, of, given in ((regions, members, tokens), (other, others, tokens[::-1])):
        text, lengths = region_texts(given, of)
        k = np.broadcast_to(text, (2, 2, *text.shape))
        outs.append(regional_cross_attention(q, k, k, numbers, lengths=lengths))
    # Sums over a text's tokens come in another order.
    np.testing.assert_allclose(outs[0], outs[1], atol=2e-6)


def test_regions():
    regions, members = box_regions(BOXES, (20, 20))
    centres = (np.arange(20) + 0.5) / 20
    for y, x in np.ndindex(20, 20):
        cy, cx = centres[y], centres[x]
        over = [bool(b[0] <= cx < b[2] and b[1] <= cy < b[3]) for b in BOXES]
        assert members[regions[y, x]].tolist() == over if any(over) else regions[y, x] == -1
    assert len(np.unique(members, axis=0)) == len(members) and members.any(axis=1).all()
    regions, members = box_regions(np.zeros((0, 4)), (3, 4))
    assert (regions == -1).all() and members.shape == (0, 0)


def test_texts(rng):
    tokens, members = normal(rng, (3, 5, 4)), np.array([[True, False, True], [False, False, True], [False] * 3])
    text, lengths = region_texts(tokens, members, lengths=np.array([2, 5, 3]))
    assert lengths.tolist() == [5, 3, 0] and text.shape == (3, 5, 4)
    np.testing.assert_array_equal(text[0], np.concatenate([tokens[0, :2], tokens[2, :3]]))
    np.testing.assert_array_equal(text[1, :3], tokens[2, :3])
    assert (text[1, 3:] == 0).all() and (text[2] == 0).all()


def test_fourier_boxes():
    found = fourier_boxes(BOXES, frequencies=3)
    assert found.shape == (3, 24)
    np.testing.assert_allclose(found[:, 8:12], np.sin(2 * np.pi * BOXES), atol=1e-6)
    np.testing.assert_allclose(found[:, 20:], np.cos(4 * np.pi * BOXES), atol=1e-6)
    assert fourier_boxes(BOXES[:0]).shape == (0, 64)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"regions": np.full((9, 11), 9)}, ValueError, r"regions: got numbers from 9 to 9"),
        ({"regions": np.zeros((9, 10), int)}, ValueError, r"regions: got shape \(9, 10\)"),
        ({"regions": np.zeros((9, 11))}, TypeError, r"regions: got dtype float64"),
        ({"lengths": np.array([8] * 5)}, ValueError, r"lengths: got"),
        ({"null": np.zeros((4, 11), F32)}, ValueError, r"null: got shape \(4, 11\)"),
        ({"v": np.zeros((2, 2, 1, 7, 12), F32)}, ValueError, r"v: got \(1, 7\) regions"),
        ({"k": np.zeros((1, 2, 5, 7, 16), F32)}, ValueError, r"k: got batch 1"),
    ],
)
def test_bad_arguments(rng, change, error, message):
    q, k, v, regions = case(rng)
    raises(METHOD, error, message, {"q": q, "k": k, "v": v, "regions": regions}, **change)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: box_regions(np.zeros((2, 3)), (4, 4)), ValueError, r"boxes: got shape \(2, 3\)"),
        (lambda: box_regions(np.full((2, 4), np.nan), (4, 4)), ValueError, r"boxes: got NaN"),
        (lambda: box_regions(np.zeros((2, 4)), (0, 4)), ValueError, r"shape: got 0"),
        (lambda: region_texts(np.zeros((2, 3), F32), np.ones((1, 2), bool)), ValueError, r"tokens: got shape"),
        (lambda: region_texts(np.zeros((2, 3, 4), F32), np.ones((1, 3), bool)), ValueError, r"members: got bool"),
        (lambda: fourier_boxes(np.zeros((2, 4)), frequencies=0), ValueError, r"frequencies: got 0"),
    ],
)
def test_bad_regions(call, error, message):
    with pytest.raises(error, match=message):
        call()
