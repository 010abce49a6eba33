"""Windows with a radius per head and a centre per query."""

import itertools

import numpy as np
import pytest

import longattn as la
import tolerances
from longattn.reference import dense as reference
from longattn.sparse.windowed_attention import METHOD
from random_arrays import DTYPES, LAYOUTS, normal, qkv

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


def sequences_mask(q, k, bounds_q, bounds_k, radius, centre=None, causal=False):
    """As `mask_of`, of sequences one after another; `centre` is `[Lq]`."""
    mask = np.zeros((1, q.shape[1], q.shape[2], k.shape[2]), bool)
    for own, seen in zip(itertools.pairwise(bounds_q), itertools.pairwise(bounds_k), strict=True):
        rows, keys = slice(*own), slice(*seen)
        centres = None if centre is None else centre[rows]
        mask[:, :, rows, keys] = mask_of(q[:, :, rows], k[:, :, keys], radius, centres, causal)
    return mask


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


def test_a_radius_of_everything_is_dense(rng, isa):
    q, k, v = qkv(rng, batch=2, rows=60, keys=80)
    for causal in (False, True):
        out = windowed(q, k, v, radius=80, causal=causal)
        tolerances.same_storage(q, k, v).check(out, la.attention(q, k, v, causal=causal))


def test_options(rng, isa):
    q, k, v = qkv(rng, batch=2, rows=60, keys=80, spread=2.0)
    bounds = np.array([0, 25, 60]), np.array([0, 50, 80])
    for given in ({"radius": (3, 9)}, {"radius": np.array([[0, 4], [9, 1], [30, 30], [2, 2]])}):
        more = {"scale": 0.4, "softcap": 4.0, "sinks": rng.standard_normal(4)}
        out, lse = windowed(q, k, v, **given, **more, return_lse=True)
        expected = METHOD.reference(q, k, v, **given, **more, return_lse=True)
        tolerances.attention(q, k, v, scale=0.4).check(out, expected[0], lse, expected[1])
        packed = {"cu_seqlens_q": bounds[0], "cu_seqlens_k": bounds[1], "causal": True}
        one = [x[0] for x in (q, k, v)]
        expected = METHOD.reference(*one, **given, **packed)
        tolerances.attention(*one).check(windowed(*one, **given, **packed), expected)


def test_queries_without_keys(rng, isa):
    q, k, v = qkv(rng, rows=20, keys=30)
    centre = np.where(np.arange(20) % 3 == 0, 1000, np.arange(20))
    out, lse = check(q, k, v, radius=2, centre=centre)
    assert (out[:, :, ::3] == 0).all() and np.isneginf(lse[:, :, ::3]).all()


@pytest.mark.parametrize(
    "radius",
    [2**63 - 1, (2**63 - 1, 2**62), np.full(4, 2**63 - 1), np.full(4, 2**64 - 1, np.uint64), np.full(4, 255, np.uint8)],
    ids=str,
)
def test_a_radius_may_be_any_integer(rng, radius):
    q, k, v = qkv(rng, rows=60, keys=80)
    tolerances.same_storage(q, k, v).check(windowed(q, k, v, radius=radius), la.attention(q, k, v))


@pytest.mark.parametrize("centre", [2**63 - 1, -(2**63), np.uint64(2**64 - 1)], ids=str)
def test_a_centre_may_be_any_integer(rng, centre):
    q, k, v = qkv(rng, rows=60, keys=60)
    for bounds in (None, np.array([0, 30, 60])):
        assert not windowed(q, k, v, radius=9, centre=np.full(60, centre), cu_seqlens_q=bounds).any()


def test_one_query(rng, isa):
    q, k, v = qkv(rng, rows=1, keys=300)
    check(q, k, v, radius=np.array([1, 20, 300, 5]), centre=np.array([150]))


BOUNDS_Q, BOUNDS_K = np.array([0, 40, 40, 41, 150]), np.array([0, 45, 50, 60, 170])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("with_centre", [False, True])
def test_packed_sequences(rng, isa, causal, with_centre):
    q, k, v = qkv(rng, rows=150, keys=170)
    radius, centre = np.array([0, 7, 3, 40]), rng.integers(-5, 60, 150) if with_centre else None
    given = {"radius": radius, "centre": centre, "causal": causal}
    out, lse = windowed(q, k, v, **given, cu_seqlens_q=BOUNDS_Q, cu_seqlens_k=BOUNDS_K, return_lse=True)
    mask = sequences_mask(q, k, BOUNDS_Q, BOUNDS_K, radius, centre, causal)
    expected, expected_lse = reference.attention(q, k, v, mask=mask, return_lse=True)
    tolerances.attention(q, k, v).check(out, expected, lse, expected_lse)


def test_packed_sequences_are_sequences_by_themselves(rng):
    q, k, v = (x[0] for x in qkv(rng, rows=150, keys=150))
    out = windowed(q, k, v, radius=(9, 4), cu_seqlens_q=BOUNDS_Q)
    for first, last in itertools.pairwise(BOUNDS_Q):
        if last > first:
            own = (x[:, first:last] for x in (q, k, v))
            tolerances.same_storage(q, k, v).check(out[:, first:last], windowed(*own, radius=(9, 4)))


def check_gradients(rng, q, k, v, mask, *, scale=None, softcap=0.0, sinks=None, with_lse=True, **given):
    scores = {"scale": scale, "softcap": softcap, "sinks": sinks}
    out, lse = windowed(q, k, v, return_lse=True, **scores, **given)
    d_out = normal(rng, out.shape, out.dtype)
    d_lse = normal(rng, lse.shape) if with_lse else None
    options = {**scores, "d_lse": d_lse, "return_d_sinks": sinks is not None}
    found = la.sparse.windowed_attention_backward(d_out, q, k, v, out, lse, **options, **given)
    expected = reference.attention(q, k, v, mask=mask, return_lse=True, **scores)
    theirs = reference.attention_backward(d_out, q, k, v, *expected, mask=mask, **options)
    eyes = np.broadcast_to(np.eye(k.shape[-2]), (*k.shape[:-1], k.shape[-2]))
    given = {} if sinks is None else {"sink_weights": np.exp(sinks[:, None] - expected[1]), "offset": abs(sinks).max()}
    weights = reference.attention(q, k, eyes, mask=mask, **scores)
    factor = float(np.max(scale)) if isinstance(scale, np.ndarray) else scale
    allowed = tolerances.attention_backward(q, k, v, d_out, weights=weights, d_lse=d_lse, scale=factor, **given)
    assert [x.dtype for x in found[:3]] == [x.dtype for x in (q, k, v)]
    allowed.check(found, theirs)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("per", ["one", "head", "both"])
def test_gradients(rng, isa, causal, per):
    q, k, v = qkv(rng, batch=2, heads=4, kv_heads=2, rows=60, keys=75, dim=24, value_dim=20)
    # Around the query's own place, so that every query sees a key: without one the lse has no gradient.
    own = np.arange(15, 75)
    centre = {"one": own, "head": own - np.arange(4)[:, None], "both": own - np.arange(8).reshape(2, 4, 1)}[per]
    radius = np.array([[9, 12], [9, 9], [20, 7], [9, 30]])
    given = {"radius": radius, "centre": centre, "causal": causal}
    check_gradients(rng, q, k, v, mask_of(q, k, **given), **given)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_dtypes_and_layouts(rng, dtype, layout):
    q, k, v = qkv(rng, batch=2, rows=40, keys=45, dim=16, q_dtype=dtype, layout=layout)
    radius = np.array([3, 8, 1, 0])
    check_gradients(rng, q, k, v, mask_of(q, k, radius), radius=radius)


def test_gradients_of_packed_sequences(rng, isa):
    q, k, v = qkv(rng, rows=150, keys=170, spread=2)
    radius = np.array([0, 7, 3, 40])
    mask = sequences_mask(q, k, BOUNDS_Q, BOUNDS_K, radius)
    given = {"radius": radius, "cu_seqlens_q": BOUNDS_Q, "cu_seqlens_k": BOUNDS_K}
    check_gradients(rng, q, k, v, mask, scale=0.3, softcap=1.5, **given)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_gradients_of_sinks(rng, isa, kv_heads):
    q, k, v = qkv(rng, batch=2, heads=4, kv_heads=kv_heads, rows=60, keys=75, dim=24)
    given = {"radius": np.array([[9, 12], [0, 0], [20, 7], [9, 30]]), "sinks": normal(rng, (4,)).astype(float)}
    mask = mask_of(q, k, given["radius"])
    check_gradients(rng, q, k, v, mask, scale=0.3, softcap=2.0, **given)
    check_gradients(rng, q, k, v, mask, scale=rng.random((4, 60)).astype(np.float32), **given)
    # Rows without keys have a log-sum-exp that is the sink's, and a gradient of that alone.
    centre = np.where(np.arange(60) % 3 == 0, 1000, np.arange(60))
    given |= {"radius": 2, "centre": centre}
    check_gradients(rng, q, k, v, mask_of(q, k, 2, centre), **given)


def test_gradients_of_sinks_over_packed_sequences(rng, isa):
    q, k, v = qkv(rng, rows=150, keys=170)
    radius = np.array([0, 7, 3, 40])
    given = {"radius": radius, "cu_seqlens_q": BOUNDS_Q, "cu_seqlens_k": BOUNDS_K, "sinks": rng.standard_normal(4)}
    check_gradients(rng, q, k, v, sequences_mask(q, k, BOUNDS_Q, BOUNDS_K, radius), **given)


@pytest.mark.parametrize("batch", [None, 2])
def test_float64(rng, batch):
    q, k, v = (x.astype(float) if batch else x[0].astype(float) for x in qkv(rng, batch=batch or 1, rows=60, keys=75))
    given = {"radius": np.array([0, 7, 3, 40]), "causal": True, "softcap": 3.0, "sinks": rng.standard_normal(4)}
    given["centre"] = rng.integers(-20, 90, q.shape[:-1])
    out, lse = windowed(q, k, v, **given, return_lse=True)
    expected, expected_lse = METHOD.reference(q, k, v, **given, return_lse=True)
    assert out.dtype == lse.dtype == np.float64
    np.testing.assert_allclose(out, expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-12, atol=1e-12)
    found = la.sparse.windowed_attention_backward(out, q, k, v, out, lse, **given, return_d_sinks=True)
    single = (x.astype(np.float32) for x in (out, q, k, v, out, lse))
    close = la.sparse.windowed_attention_backward(*single, **given, return_d_sinks=True)
    for ours, theirs in zip(close, found, strict=True):
        assert theirs.dtype == np.float64
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_gradients_without_keys_are_zeros(rng, isa):
    q, k, v = qkv(rng, rows=20, keys=30)
    centre = np.where(np.arange(20) % 3 == 0, 1000, np.arange(20))
    given = {"radius": 2, "centre": centre}
    check_gradients(rng, q, k, v, mask_of(q, k, 2, centre), with_lse=False, **given)


def test_gradients_on_any_number_of_threads(rng):
    q, k, v = qkv(rng, batch=2, rows=300, keys=300)
    out, lse = windowed(q, k, v, radius=np.array([3, 30, 30, 9]), return_lse=True)
    before, found = la.get_num_threads(), []
    for threads in (1, 2):
        la.set_num_threads(threads)
        options = {"radius": np.array([3, 30, 30, 9])}
        found.append(la.sparse.windowed_attention_backward(out, q, k, v, out, lse, **options))
    la.set_num_threads(before)
    assert all(np.array_equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"radius": -1}, ValueError, "radius: got -1"),
        ({"radius": 2.5}, TypeError, "radius: got 2.5"),
        ({"radius": np.array([1, 2])}, ValueError, "radius: got shape"),
        ({"radius": np.array([1.0] * 4)}, TypeError, "radius: got dtype float64"),
        ({"radius": 1, "centre": np.zeros(4, int)}, ValueError, "centre: got shape"),
        ({"radius": 1, "centre": np.zeros(5)}, TypeError, "centre: got dtype float64"),
        ({"radius": 1, "cu_seqlens_k": np.array([0, 37])}, ValueError, "cu_seqlens_k: got bounds without"),
        ({"radius": 1, "cu_seqlens_q": np.array([0, 5])}, ValueError, "cu_seqlens_k: got bounds from 0 to 5"),
        (
            {"radius": 1, "cu_seqlens_q": np.array([0, 2, 5]), "cu_seqlens_k": np.array([0, 37])},
            ValueError,
            "cu_seqlens_k: got 1 sequences, expected 2",
        ),
    ],
)
def test_bad_input(rng, given, error, words):
    with pytest.raises(error, match=words):
        windowed(*qkv(rng), **given)


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"return_d_sinks": True}, ValueError, "return_d_sinks: got True without sinks"),
        ({"sinks": np.zeros(3)}, ValueError, "sinks: got shape"),
        ({"sinks": np.zeros(4, int)}, TypeError, "sinks: got dtype int64"),
        ({"q": np.zeros((1, 4, 5, 16))}, TypeError, "q: got dtype float64"),
    ],
)
def test_bad_input_of_gradients(rng, given, error, words):
    q, k, v = qkv(rng)
    out, lse = windowed(q, k, v, radius=1, return_lse=True)
    arrays = {"d_out": out, "q": q, "k": k, "v": v, "out": out, "lse": lse, "radius": 1}
    with pytest.raises(error, match=words):
        la.sparse.windowed_attention_backward(**(arrays | given))


def test_a_batch_of_packed_sequences(rng):
    with pytest.raises(ValueError, match="cu_seqlens_q: got a batch of 2"):
        windowed(*qkv(rng, batch=2), radius=1, cu_seqlens_q=np.array([0, 5]), cu_seqlens_k=np.array([0, 37]))
