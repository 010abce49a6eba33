"""`grouped_query_attention`, both head orders, and the conversion of checkpoints."""

import numpy as np
import pytest

import longattn as la
import tolerances
from longattn.dense import grouped_query_attention, mha_to_gqa, multi_query_attention
from longattn.reference import dense as reference
from random_arrays import BF16, DTYPES, F32, LAYOUTS, normal, qkv
from running import on_threads

ORDERS = pytest.mark.parametrize("interleaved", [False, True], ids=["consecutive", "interleaved"])


def check(q, k, v, *, offset=0.0, **options):
    out, lse = grouped_query_attention(q, k, v, return_lse=True, **options)
    assert out.dtype == q.dtype and out.shape == (*q.shape[:-1], v.shape[-1])
    expected, expected_lse = reference.grouped_query_attention(q, k, v, return_lse=True, **options)
    scale = np.max(options["scale"]) if "scale" in options else None
    tolerances.attention(q, k, v, scale=scale, offset=offset).check(out, expected, lse, expected_lse)
    return out, lse


def gathered(x, heads, interleaved):
    """Keys or values of each query head."""
    head = np.arange(heads)
    return x[:, head % x.shape[1] if interleaved else head // (heads // x.shape[1])]


@ORDERS
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (6, 3), (8, 8), (7, 1), (12, 4)])
@pytest.mark.parametrize(("rows", "keys"), [(1, 45), (9, 45), (40, 40)])
def test_reference(rng, isa, *, interleaved, heads, kv_heads, rows, keys):
    q, k, v = qkv(rng, batch=2, heads=heads, kv_heads=kv_heads, rows=rows, keys=keys, dim=24, value_dim=20)
    check(q, k, v, interleaved=interleaved, causal=True)


@ORDERS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(rng, isa, interleaved, dtype):
    check(*qkv(rng, heads=6, kv_heads=2, rows=3, keys=70, dim=32, q_dtype=dtype), interleaved=interleaved)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(rng, isa, layout):
    q, k, v = qkv(rng, batch=2, heads=6, kv_heads=2, rows=5, keys=40, dim=20, layout=layout)
    check(q, k, v, interleaved=True, causal=True)


def test_options_per_query_head(rng, isa):
    """Each query head gets what was given for it, whichever KV head it reads."""
    heads, rows, keys = 6, 4, 50
    q, k, v = qkv(rng, batch=2, heads=heads, kv_heads=2, rows=rows, keys=keys)
    options = {
        "alibi_slopes": np.linspace(0.01, 0.3, heads).astype(np.float32),
        "sinks": rng.standard_normal(heads).astype(np.float32),
        "bias": normal(rng, (heads, 1, keys)),
        "mask": rng.random((2, heads, rows, keys)) > 0.3,
        "softcap": 5.0,
        "window": (20, 3),
    }
    check(q, k, v, interleaved=True, offset=0.3 * keys + 5, **options)
    check(q, k, v, interleaved=True, mask=rng.random((rows, keys)) > 0.3, bias=normal(rng, (1, rows, 1)), offset=4)
    for shape in ((heads,), (heads, rows), (2, heads, rows)):
        check(q, k, v, interleaved=True, scale=rng.random(shape, np.float32))
    segments = (rng.integers(0, 2, (2, rows)), rng.integers(0, 2, (2, keys)))
    check(
        q, k, v, interleaved=True, relative_bias=normal(rng, (heads, 9)), relative_zero=3, segments=segments, offset=4
    )
    earlier = la.attention(q, normal(rng, (2, 1, 7, 16)), normal(rng, (2, 1, 7, 16)), return_lse=True)
    check(q, k, v, interleaved=True, state=earlier)


@ORDERS
def test_rank_3_and_out(rng, isa, interleaved):
    q, k, v = (x[0] for x in qkv(rng, heads=6, kv_heads=3, rows=7, keys=30))
    expected, expected_lse = check(q, k, v, interleaved=interleaved)
    out = np.full(q.shape, np.nan, np.float32)
    given, lse = grouped_query_attention(q, k, v, interleaved=interleaved, out=out, return_lse=True)
    assert given is out
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(lse, expected_lse)


@ORDERS
def test_no_keys(interleaved):
    q, k = np.ones((1, 4, 3, 8), np.float32), np.ones((1, 2, 0, 8), np.float32)
    out, lse = grouped_query_attention(q, k, k, interleaved=interleaved, return_lse=True)
    assert (out == 0).all() and (lse == -np.inf).all()


@ORDERS
def test_steps_are_the_prefill(rng, isa, interleaved):
    q, k, v = qkv(rng, heads=6, kv_heads=2, rows=20, keys=20, dim=32)
    whole = grouped_query_attention(q, k, v, causal=True, interleaved=interleaved)
    tolerance = tolerances.same_storage(q, k, v)
    for n in range(1, 21):
        call = (q[:, :, n - 1 : n], k[:, :, :n], v[:, :, :n])
        step = grouped_query_attention(*call, causal=True, interleaved=interleaved)
        tolerance.check(step, whole[:, :, n - 1 : n])


def test_any_number_of_threads(rng):
    q, k, v = qkv(rng, heads=6, kv_heads=2, rows=2, keys=5000, dim=32)
    results = on_threads(lambda: grouped_query_attention(q, k, v, interleaved=True))
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0])


def test_torch_tensors(rng):
    torch = pytest.importorskip("torch")
    q, k, v = qkv(rng, heads=6, kv_heads=3, rows=3, keys=40)
    sinks = rng.standard_normal(6, np.float32)
    expected, expected_lse = grouped_query_attention(q, k, v, interleaved=True, sinks=sinks, return_lse=True)
    tensors = (torch.from_numpy(x) for x in (q, k, v))
    out, lse = grouped_query_attention(*tensors, interleaved=True, sinks=torch.from_numpy(sinks), return_lse=True)
    assert isinstance(out, torch.Tensor) and isinstance(lse, torch.Tensor)
    np.testing.assert_array_equal(out.numpy(), expected)
    np.testing.assert_array_equal(lse.numpy(), expected_lse)


# Identities


@ORDERS
@pytest.mark.parametrize("rows", [1, 17])
def test_it_is_attention_over_repeated_keys_and_values(rng, isa, interleaved, rows):
    q, k, v = qkv(rng, batch=2, heads=12, kv_heads=3, rows=rows, keys=60, dim=32)
    out, lse = grouped_query_attention(q, k, v, interleaved=interleaved, causal=True, return_lse=True)
    repeated = [gathered(x, 12, interleaved) for x in (k, v)]
    expected, expected_lse = la.attention(q, *repeated, causal=True, return_lse=True)
    tolerances.same_storage(q, k, v).check(out, expected, lse, expected_lse)


@ORDERS
def test_group_of_one_is_multi_head_and_one_kv_head_multi_query(rng, isa, interleaved):
    q, k, v = qkv(rng, heads=4, kv_heads=4, rows=5, keys=40)
    tolerance = tolerances.same_storage(q, k, v)
    tolerance.check(grouped_query_attention(q, k, v, interleaved=interleaved), la.attention(q, k, v))
    one_head = (q, k[:, :1], v[:, :1])
    tolerance.check(grouped_query_attention(*one_head, interleaved=interleaved), multi_query_attention(*one_head))


@pytest.mark.parametrize("mode", ["mean", "first"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_conversion_of_equal_heads_changes_nothing(rng, mode, dtype):
    wk, wv = (np.repeat(normal(rng, (2, width, 20), dtype), 3, axis=0) for width in (8, 5))
    few_k, few_v = mha_to_gqa(wk, wv, 2, mode=mode)
    np.testing.assert_array_equal(np.repeat(few_k, 3, axis=0), wk)
    np.testing.assert_array_equal(np.repeat(few_v, 3, axis=0), wv)
    x = normal(rng, (1, 1, 9, 20))
    q = normal(rng, (1, 6, 9, 8))
    many, few = (
        [(x @ w.astype(np.float32).swapaxes(-1, -2)).astype(np.float32) for w in pair]
        for pair in ((wk, wv), (few_k, few_v))
    )
    tolerances.same_storage(q, *many).check(grouped_query_attention(q, *few), la.attention(q, *many))


def test_permuting_a_group_permutes_the_outputs(rng, isa):
    q, k, v = qkv(rng, heads=6, kv_heads=2, rows=4, keys=50)
    order = np.array([2, 0, 1, 5, 3, 4])
    out, permuted = grouped_query_attention(q, k, v), grouped_query_attention(q[:, order], k, v)
    tolerances.same_storage(q, k, v).check(permuted, out[:, order])
    turned = q.reshape(1, 3, 2, 4, -1)[:, [1, 2, 0]].reshape(q.shape)
    out, permuted = (grouped_query_attention(x, k, v, interleaved=True) for x in (q, turned))
    tolerances.same_storage(q, k, v).check(permuted, out.reshape(1, 3, 2, 4, -1)[:, [1, 2, 0]].reshape(out.shape))


# Conversion


@pytest.mark.parametrize(("heads", "n_kv"), [(6, 1), (6, 2), (6, 6), (8, 4)])
def test_means(rng, heads, n_kv):
    wk, wv = normal(rng, (heads, 4, 10)), normal(rng, (heads, 7, 10))
    for ours, exact in zip(mha_to_gqa(wk, wv, n_kv), reference.mha_to_gqa(wk, wv, n_kv), strict=True):
        np.testing.assert_array_equal(ours, exact.astype(np.float32))


def test_first_and_rank_2(rng):
    wk, wv = normal(rng, (6 * 4, 10), BF16), normal(rng, (6 * 7, 10), BF16)
    first_k, first_v = mha_to_gqa(wk, wv, 3, heads=6, mode="first")
    np.testing.assert_array_equal(first_k, wk.reshape(6, 4, 10)[::2].reshape(12, 10))
    np.testing.assert_array_equal(first_v, wv.reshape(6, 7, 10)[::2].reshape(21, 10))
    assert first_k.dtype == BF16 and not np.may_share_memory(first_k, wk)


def test_random_is_as_large_and_seeded(rng):
    wk, wv = normal(rng, (8, 16, 64), spread=0.02), normal(rng, (8, 16, 64), spread=3.0)
    one, same, other = (mha_to_gqa(wk, wv, 2, mode="random", seed=seed) for seed in (1, 1, 2))
    for given, made, again, differs in zip((wk, wv), one, same, other, strict=True):
        assert made.shape == (2, 16, 64)
        np.testing.assert_array_equal(made, again)
        assert not np.array_equal(made, differs)
        np.testing.assert_allclose(made.std(), given.std(), rtol=0.1)


def test_torch_projections():
    torch = pytest.importorskip("torch")
    wk, wv = torch.randn(2, 4, 8, 16).bfloat16()
    few_k, few_v = mha_to_gqa(wk, wv, 2)
    assert few_k.dtype == torch.bfloat16 and few_v.shape == (2, 8, 16)
    torch.testing.assert_close(few_k.float(), wk.float().reshape(2, 2, 8, 16).mean(1).bfloat16().float())


# Bad input


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"interleaved": 1}, TypeError, r"interleaved: got 1, expected True or False"),
        ({"return_lse": 1}, TypeError, r"return_lse: got 1"),
        ({"sinks": np.zeros(7, np.float32)}, ValueError, r"sinks: got shape \(7,\), expected 6 query heads"),
        ({"alibi_slopes": np.zeros(1, np.float32)}, ValueError, r"alibi_slopes: got shape \(1,\)"),
        ({"bias": np.zeros((5, 3, 40), np.float32)}, ValueError, r"bias: got shape \(5, 3, 40\), expected 6 query"),
        ({"mask": [True]}, TypeError, r"mask: got list"),
        ({"window": 3}, TypeError, r"window: got 3"),
        ({"other": 3}, TypeError, r"other"),
        ({"out": np.zeros((1, 6, 3, 8), np.float32)}, ValueError, r"out: got shape"),
        ({"k": np.zeros((1, 4, 40, 16), np.float32)}, ValueError, r"q: got 6 heads, expected a positive multiple of"),
        ({"k": np.zeros((2, 3, 40, 16), np.float32)}, ValueError, r"k: got batch 2, expected 1"),
        ({"v": np.zeros((1, 2, 40, 16), np.float32)}, ValueError, r"v: got 2 heads, expected 3"),
        ({"v": np.zeros((1, 3, 39, 16), np.float32)}, ValueError, r"v: got length 39, expected 40"),
    ],
)
def test_bad_arguments(rng, change, error, message):
    q, k, v = qkv(rng, heads=6, kv_heads=3, rows=3, keys=40)
    arguments = {"q": q, "k": k, "v": v, "interleaved": True} | change
    with pytest.raises(error, match=message):
        grouped_query_attention(**arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"n_kv": 4}, ValueError, r"n_kv: got 4, expected a divisor of the 6 heads"),
        ({"n_kv": 0}, ValueError, r"n_kv: got 0"),
        ({"n_kv": 2.0}, TypeError, r"n_kv: got 2.0, expected an integer"),
        ({"mode": "median"}, ValueError, r"mode: got 'median', expected 'mean', 'first' or 'random'"),
        ({"heads": 6}, ValueError, r"wk: got shape \(6, 4, 10\), expected \[H \* D, E\] with H = 6"),
        ({"heads": 2.5}, TypeError, r"heads: got 2.5"),
        ({"wk": np.zeros((24, 10), np.float32)}, ValueError, r"wk: got shape \(24, 10\), expected \[H, D, E\]"),
        ({"wv": np.zeros((3, 4, 10), np.float32)}, ValueError, r"wv: got 3 heads, expected 6"),
        ({"wv": np.zeros((6, 4, 10))}, TypeError, r"wv: got dtype float64"),
    ],
)
def test_bad_conversions(change, error, message):
    arguments = {"wk": np.zeros((6, 4, 10), F32), "wv": np.zeros((6, 4, 10), F32), "n_kv": 2} | change
    with pytest.raises(error, match=message):
        mha_to_gqa(**arguments)
