"""Gradients of attention over blocks, with every option of scores, and over packed sequences."""

import numpy as np
import pytest

import longattn as la
import tolerances
from longattn.reference import dense as reference
from random_arrays import DTYPES, F32, LAYOUTS, normal, qkv
from random_lists import over_heads, random_mask
from running import on_threads

backward = la.sparse.block_sparse_attention_backward

#: Options by name, for 4 heads, 60 rows and 75 keys.
OPTIONS = {
    "plain": lambda rng: {},
    "causal": lambda rng: {"causal": True, "window": (30, -1)},
    "softcap": lambda rng: {"scale": 0.3, "softcap": 1.5},
    "scales": lambda rng: {"scale": rng.random((4, 60)).astype(F32)},
    "bias": lambda rng: {"bias": normal(rng, (4, 60, 75))},
    "mask": lambda rng: {"mask": rng.random((2, 1, 60, 75)) < 0.7},
    "alibi": lambda rng: {"alibi_slopes": rng.random(4).astype(F32) / 8, "causal": True},
    "relative": lambda rng: {"relative_bias": normal(rng, (4, 21)), "relative_zero": 10},
    "segments": lambda rng: {"segments": (rng.integers(0, 2, 60), rng.integers(0, 2, (2, 75)))},
    "until": lambda rng: {"visible_until": rng.integers(10, 90, 75)},
    "sinks": lambda rng: {"sinks": normal(rng, (4,)), "softcap": 2.0},
    "many": lambda rng: {
        "sinks": normal(rng, (4,)), "causal": True, "bias": normal(rng, (60, 75)), "scale": 0.2, "softcap": 3.0,
        "alibi_slopes": rng.random((2, 4)).astype(F32) / 8,
    },
}  # fmt: skip


def oracle(q, k, v, d_out, seen, d_lse, options):
    """Gradients by the formula, and what ours may be off."""
    given = dict(options)
    mask = seen & given.pop("mask", True)
    sinks = given.get("sinks")
    expected = reference.attention(q, k, v, mask=mask, return_lse=True, **given)
    found = reference.attention_backward(
        d_out, q, k, v, *expected, mask=mask, d_lse=d_lse, return_d_sinks=sinks is not None, **given
    )
    eyes = np.broadcast_to(np.eye(k.shape[-2]), (*k.shape[:-1], k.shape[-2]))
    weights = reference.attention(q, k, eyes, mask=mask, **given)
    with np.errstate(over="ignore", invalid="ignore"):
        of_sinks = None if sinks is None else np.exp(np.asarray(sinks, np.float64)[:, None] - expected[1])
    scale = given.get("scale")
    scale = float(np.max(scale)) if isinstance(scale, np.ndarray) else scale
    offset = sum(float(np.abs(given[n]).max()) for n in ("bias", "sinks", "relative_bias") if n in given)
    offset += 75 * float(given["alibi_slopes"].max()) if "alibi_slopes" in given else 0.0
    allowed = tolerances.attention_backward(
        q, k, v, d_out, weights=weights, sink_weights=of_sinks, d_lse=d_lse, scale=scale, offset=offset
    )
    return found, allowed


def check(rng, q, k, v, block_mask, *, with_lse=False, **options):
    out, lse = la.block_sparse_attention(q, k, v, block_mask, return_lse=True, **options)
    d_out, d_lse = normal(rng, out.shape, out.dtype), normal(rng, lse.shape) if with_lse else None
    wanted = {"return_d_sinks": True} if "sinks" in options else {}
    found = backward(d_out, q, k, v, out, lse, block_mask, d_lse=d_lse, **options, **wanted)
    seen = over_heads(block_mask.to_dense_mask(), q.shape[0], q.shape[1])
    expected, allowed = oracle(q, k, v, d_out, seen, d_lse, options)
    assert [x.dtype for x in found[:3]] == [x.dtype for x in (q, k, v)]
    allowed.check(found, expected)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("block", [(16, 16), (60, 25)])
def test_options(rng, isa, name, block):
    q, k, v = qkv(rng, batch=2, heads=4, kv_heads=2, rows=60, keys=75, dim=24, value_dim=20)
    mask = random_mask(rng, heads=2, lengths=(60, 75), block_q=block[0], block_k=block[1])
    check(rng, q, k, v, mask, **OPTIONS[name](rng))


@pytest.mark.parametrize("sinks", [False, True])
def test_gradients_of_the_lse(rng, isa, sinks):
    q, k, v = qkv(rng, batch=2, rows=60, keys=75)
    # Every query sees a key: without one the lse has no gradient.
    blocks = rng.random((4, 5)) < 0.4
    blocks[:, 2] = True
    mask = la.BlockMask.from_blocks(blocks, lengths=(60, 75), block_q=16, block_k=16)
    check(rng, q, k, v, mask, with_lse=True, **({"sinks": normal(rng, (4,))} if sinks else {}))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_dtypes_and_layouts(rng, dtype, layout):
    q, k, v = qkv(rng, batch=2, rows=60, keys=75, q_dtype=dtype, layout=layout)
    mask = random_mask(rng, heads=4, lengths=(60, 75), block_q=16, block_k=16)
    check(rng, q, k, v, mask, causal=True, sinks=normal(rng, (4,)))


def test_long_lists(rng, isa):
    q, k, v = qkv(rng, heads=2, kv_heads=1, rows=300, keys=700, dim=16)
    mask = random_mask(rng, heads=2, lengths=(300, 700), block_q=128, block_k=50)
    check(rng, q, k, v, mask, causal=True, bias=normal(rng, (700,)))


BOUNDS_Q, BOUNDS_K = np.array([0, 40, 40, 41, 150]), np.array([0, 45, 50, 60, 170])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("block", [(16, 16), (33, 20), (150, 64)])
def test_packed_sequences(rng, isa, causal, block):
    """Of each sequence by itself, with what of the mask lies in it."""
    q, k, v = qkv(rng, heads=4, kv_heads=2, rows=150, keys=170, dim=24)
    mask = random_mask(rng, heads=2, lengths=(150, 170), block_q=block[0], block_k=block[1])
    options = {"causal": causal, "scale": 0.3, "sinks": normal(rng, (4,)), "softcap": 2.0}
    bounds = {"cu_seqlens_q": BOUNDS_Q, "cu_seqlens_k": BOUNDS_K}
    out, lse = la.block_sparse_attention(q, k, v, mask, return_lse=True, **options, **bounds)
    d_out = normal(rng, out.shape)
    *found, d_sinks = backward(d_out, q, k, v, out, lse, mask, **options, **bounds, return_d_sinks=True)
    seen, total = over_heads(mask.to_dense_mask(), 1, 4), np.zeros(4)
    for r, c in zip(map(slice, BOUNDS_Q, BOUNDS_Q[1:]), map(slice, BOUNDS_K, BOUNDS_K[1:]), strict=False):
        if r.start == r.stop:
            assert not found[1][:, :, c].any() and not found[2][:, :, c].any()
            continue
        own = q[:, :, r], k[:, :, c], v[:, :, c]
        expected, allowed = oracle(*own, d_out[:, :, r], seen[:, :, r, c], None, options)
        parts = (found[0][:, :, r], found[1][:, :, c], found[2][:, :, c], expected[3])
        allowed.check(parts, expected)
        total += expected[3]
    np.testing.assert_allclose(d_sinks, total, rtol=1e-4, atol=1e-4)


def test_any_number_of_threads(rng):
    q, k, v = qkv(rng, batch=2, rows=300, keys=300)
    mask = random_mask(rng, lengths=(300, 300), block_q=64, block_k=32)
    sinks = normal(rng, (4,))
    out, lse = la.block_sparse_attention(q, k, v, mask, sinks=sinks, return_lse=True)
    found = on_threads(lambda: backward(out, q, k, v, out, lse, mask, sinks=sinks, return_d_sinks=True))
    for other in found[1:]:
        for ours, theirs in zip(found[0], other, strict=True):
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"block_mask": None}, TypeError, r"block_mask: got NoneType"),
        ({"return_d_sinks": True}, ValueError, r"return_d_sinks: got True without sinks"),
        ({"skip_threshold": 0.1}, ValueError, r"skip_threshold: got one"),
        ({"cu_seqlens_k": np.array([0, 40])}, ValueError, r"cu_seqlens_k: got bounds without cu_seqlens_q"),
        ({"cu_seqlens_q": np.array([0, 39])}, ValueError, r"cu_seqlens_q: got bounds from 0 to 39"),
        (
            {"cu_seqlens_q": np.array([0, 40]), "bias": np.zeros(40, F32)},
            ValueError,
            r"bias: got one with cu_seqlens_q",
        ),
        ({"unknown": 1}, TypeError, r"unknown"),
    ],
)
def test_bad_arguments(rng, change, error, message):
    q, k, v = qkv(rng, rows=40, keys=40)
    mask = random_mask(rng, lengths=(40, 40))
    out, lse = la.block_sparse_attention(q, k, v, mask, return_lse=True)
    given = {"d_out": out, "q": q, "k": k, "v": v, "out": out, "lse": lse, "block_mask": mask}
    with pytest.raises(error, match=message):
        backward(**(given | change))


def test_a_batch_of_packed_sequences(rng):
    q, k, v = qkv(rng, batch=2, rows=40, keys=40)
    with pytest.raises(ValueError, match=r"cu_seqlens_q: got a batch of 2, expected 1"):
        la.block_sparse_attention(q, k, v, random_mask(rng, lengths=(40, 40)), cu_seqlens_q=np.array([0, 40]))
