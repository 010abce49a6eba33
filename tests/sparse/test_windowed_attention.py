"""Windows with a radius per head and a centre per query."""

import numpy as np
import pytest

import longattn as la
import tolerances
from longattn.reference import dense as reference
from random_arrays import DTYPES, LAYOUTS, qkv

windowed = la.sparse.windowed_attention


def mask_of(q, k, radius, centre=None, causal=False):
    """What each query sees, `[B, Hq, Lq, Lk]`."""
    batch, heads, rows = q.shape[:3]
    keys = k.shape[2]
    position = np.arange(keys - rows, keys)
    centre = np.broadcast_to(position if centre is None else centre, (batch, heads, rows))
    sides = np.broadcast_to(np.reshape(radius, (-1, 1)) if np.ndim(radius) == 1 else radius, (heads, 2))
    offset = np.arange(keys) - centre[..., None]
    seen = (offset >= -sides[:, 0, None, None]) & (offset <= sides[:, 1, None, None])
    return seen & (np.arange(keys) <= position[:, None]) if causal else seen


def check(q, k, v, *, causal=False, **given):
    out, lse = windowed(q, k, v, causal=causal, return_lse=True, **given)
    mask = mask_of(q, k, given["radius"], given.get("centre"), causal)
    expected, expected_lse = reference.attention(q, k, v, mask=mask, return_lse=True)
    tolerances.attention(q, k, v).check(out, expected, lse, expected_lse)
    return out, lse


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("per", ["one", "head", "both"])
def test_reference(rng, isa, causal, per):
    q, k, v = qkv(rng, batch=2, heads=4, kv_heads=2, rows=150, keys=170, dim=24, value_dim=20)
    check(q, k, v, radius=9, causal=causal)
    centre = np.sort(rng.integers(-20, 190, (150,)))
    if per != "one":
        centre = np.sort(rng.integers(-20, 190, (4, 150) if per == "head" else (2, 4, 150)), axis=-1)
    check(q, k, v, radius=np.array([0, 7, 7, 40]), centre=centre, causal=causal)
    check(q, k, v, radius=np.array([[0, 1], [9, 2], [5, 5], [100, 0]]), centre=centre, causal=causal)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_dtypes_and_layouts(rng, dtype, layout):
    q, k, v = qkv(rng, batch=2, rows=40, keys=45, dim=16, q_dtype=dtype, layout=layout)
    check(q, k, v, radius=np.array([3, 8, 1, 0]), centre=rng.integers(0, 45, 40))


def test_one_radius_is_a_window(rng, isa):
    q, k, v = qkv(rng, rows=100, keys=120)
    expected = la.attention(q, k, v, window=(5, 3))
    tolerances.same_storage(q, k, v).check(windowed(q, k, v, radius=(5, 3)), expected)


def test_queries_without_keys(rng, isa):
    q, k, v = qkv(rng, rows=20, keys=30)
    centre = np.where(np.arange(20) % 3 == 0, 1000, np.arange(20))
    out, lse = check(q, k, v, radius=2, centre=centre)
    assert (out[:, :, ::3] == 0).all() and np.isneginf(lse[:, :, ::3]).all()


def test_one_query(rng, isa):
    q, k, v = qkv(rng, rows=1, keys=300)
    check(q, k, v, radius=np.array([1, 20, 300, 5]), centre=np.array([150]))


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"radius": -1}, ValueError, "radius: got -1"),
        ({"radius": 2.5}, TypeError, "radius: got 2.5"),
        ({"radius": np.array([1, 2])}, ValueError, "radius: got shape"),
        ({"radius": np.array([1.0] * 4)}, TypeError, "radius: got dtype float64"),
        ({"radius": 1, "centre": np.zeros(4, int)}, ValueError, "centre: got shape"),
        ({"radius": 1, "centre": np.zeros(5)}, TypeError, "centre: got dtype float64"),
    ],
)
def test_bad_input(rng, given, error, words):
    with pytest.raises(error, match=words):
        windowed(*qkv(rng), **given)
