"""`transient_global_attention` and `local_global_attention`: a window and summaries of blocks in one softmax."""

import numpy as np
import pytest

import longattn as la
import tolerances
from longattn.reference import sparse as reference
from longattn.sparse import local_global_attention, t5_relative_table, transient_global_attention
from random_arrays import BF16, DTYPES, F32, LAYOUTS, normal, qkv


def tolerance_of(q, k, v, kg, vg, offset=0.0, scale=1.0):
    """Attention over all keys and global tokens."""
    dtype = np.result_type(k.dtype, np.float32)
    keys, values = (np.concatenate([a.astype(dtype), b.astype(dtype)], axis=-2) for a, b in ((k, kg), (v, vg)))
    # Both are of the keys' dtype, which matters to how weights are rounded.
    return tolerances.attention(q, keys.astype(k.dtype), values.astype(v.dtype), scale=scale, offset=offset)


def check(q, k, v, kg, vg, **options):
    out, lse = local_global_attention(q, k, v, kg, vg, return_lse=True, **options)
    assert out.dtype == q.dtype and out.shape == (*q.shape[:-1], v.shape[-1])
    expected, expected_lse = reference.local_global_attention(q, k, v, kg, vg, return_lse=True, **options)
    offset = max(np.abs(options[name]).max() if name in options else 0 for name in ("local_bias", "side_bias"))
    tolerance = tolerance_of(q, k, v, kg, vg, offset, options.get("scale", 1.0))
    tolerance.check(out, expected, lse, expected_lse)


def inputs(rng, length=50, count=None, heads=4, kv_heads=2, **options):
    q, k, v = qkv(rng, heads=heads, kv_heads=kv_heads, rows=length, keys=length, spread=0.3, **options)
    count = length // 8 if count is None else count
    kg, vg = (np.ascontiguousarray(normal(rng, (*x.shape[:2], count, x.shape[3]), x.dtype)) for x in (k, v))
    return q, k, v, kg, vg


@pytest.mark.parametrize("length", [1, 7, 8, 16, 50, 71])
@pytest.mark.parametrize("radius", [0, 5, 100])
def test_reference(rng, isa, length, radius):
    biases = {"local_bias": normal(rng, (4, 13)), "side_bias": normal(rng, (4, 5))}
    check(*inputs(rng, length, batch=2, value_dim=12), radius=radius, block=8, **biases)


@pytest.mark.parametrize("count", [0, 1, 3, 6, 7, 30])
def test_any_number_of_global_tokens(rng, isa, count):
    arrays = inputs(rng, 53, count)
    check(*arrays, radius=5, block=8)
    check(*arrays, radius=5, block=8, side_bias=normal(rng, (4, 7)))
    check(*arrays, radius=5, block=8, side_bias=normal(rng, (4, 61)), local_bias=normal(rng, (4, 1)), scale=0.25)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_dtypes_and_groups(rng, isa, dtype, kv_heads):
    arrays = inputs(rng, 60, heads=6, kv_heads=kv_heads, q_dtype=dtype, dim=32)
    check(*arrays, radius=9, block=8, side_bias=normal(rng, (6, 9)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(rng, layout):
    check(*inputs(rng, 40, layout=layout), radius=9, block=8)


def test_rank_3_out_and_torch(rng):
    arrays = tuple(x[0] for x in inputs(rng))
    out = np.full(arrays[0].shape, np.nan, np.float32)
    given, lse = local_global_attention(*arrays, radius=5, block=8, out=out, return_lse=True)
    assert given is out and lse.shape == (4, 50)
    torch = pytest.importorskip("torch")
    tensor = local_global_attention(*(torch.from_numpy(x) for x in arrays), radius=5, block=8)
    np.testing.assert_array_equal(tensor.numpy(), out)


def layer(rng, batch=2, length=70, width=24, heads=4, kv_heads=4, dim=8, dtype=F32):
    x = normal(rng, (batch, length, width), dtype)
    wq, wk, wv = (normal(rng, (width, n * dim), F32, spread=0.15) for n in (heads, kv_heads, kv_heads))
    weights = {
        "g_weight": 1 + normal(rng, (width,), spread=0.1),
        "local_table": normal(rng, (32, heads)),
        "side_table": normal(rng, (32, heads)),
        "wo": normal(rng, (heads * dim, width), spread=0.2),
    }
    return {"x": x, "wq": wq, "wk": wk, "wv": wv, "heads": heads} | weights


def layer_tolerance(arguments):
    x, heads = np.asarray(arguments["x"], np.float32), arguments["heads"]
    dim = arguments["wq"].shape[1] // heads
    q, k, v = (x @ arguments[name] for name in ("wq", "wk", "wv"))
    q, k, v = (a.reshape(*a.shape[:2], -1, dim).swapaxes(1, 2) for a in (q, k, v))
    largest = max(np.abs(arguments[name]).max() if name in arguments else 0 for name in ("local_table", "side_table"))
    one = tolerances.attention(q, k, v, scale=1.0, offset=largest)
    weights = (arguments[name] for name in ("wq", "wk", "wv", "g_weight"))
    one = tolerances.summarised(one, x, *weights, wo=arguments.get("wo"), heads=heads)
    return tolerances.stored(one, arguments["x"].dtype)


@pytest.mark.parametrize("length", [3, 8, 20, 70])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_the_layer(rng, length, kv_heads):
    arguments = layer(rng, length=length, kv_heads=kv_heads)
    options = {"radius": 9, "block": 8, "max_distance": 20}
    out = transient_global_attention(**arguments, **options)
    expected = reference.transient_global_attention(**arguments, **options)
    layer_tolerance(arguments).check(out, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_layer_in_other_dtypes(rng, dtype):
    arguments = layer(rng, dtype=dtype)
    del arguments["wo"]
    out = transient_global_attention(**arguments, radius=9)
    assert out.dtype == dtype and out.shape == (2, 70, 32)
    layer_tolerance(arguments).check(out, reference.transient_global_attention(**arguments, radius=9))


@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (8, 20), (16, 300)])
def test_buckets(buckets, max_distance):
    spread = t5_relative_table(np.arange(buckets, dtype=np.float32)[:, None], max_distance=max_distance)
    reach = range(-max_distance, max_distance + 1)
    expected = [reference.t5_bucket(d, buckets, max_distance) for d in reach]
    np.testing.assert_array_equal(spread[0], expected)
    assert spread[0, 0] == buckets // 2 - 1 and spread[0, -1] == buckets - 1


def test_buckets_are_those_of_t5():
    torch, t5 = pytest.importorskip("torch"), pytest.importorskip("transformers.models.t5.modeling_t5")
    bucket = t5.T5Attention._relative_position_bucket(
        torch.arange(-128, 129), bidirectional=True, num_buckets=32, max_distance=128
    )
    spread = t5_relative_table(np.arange(32, dtype=np.float32)[:, None])
    np.testing.assert_array_equal(spread[0], bucket.numpy())


# Identities


def test_without_global_tokens_it_is_windowed_attention(rng, isa):
    q, k, v, *_ = inputs(rng)
    none = k[:, :, :0]
    expected, expected_lse = la.attention(q, k, v, window=(7, 7), scale=1.0, return_lse=True)
    out, lse = local_global_attention(q, k, v, none, none, radius=7, return_lse=True)
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(lse, expected_lse)
    arguments = layer(rng, length=15)
    del arguments["side_table"]
    short = transient_global_attention(**arguments, radius=4, block=16)  # shorter than a block
    layer_tolerance(arguments).check(short, reference.transient_global_attention(**arguments, radius=4, block=16))


def test_a_wide_radius_is_attention_with_t5_bias(rng, isa):
    q, k, v, *_ = inputs(rng)
    table = normal(rng, (32, 4))
    spread = t5_relative_table(table)
    out = local_global_attention(q, k, v, k[:, :, :0], v[:, :, :0], radius=49, local_bias=spread)
    buckets = [[reference.t5_bucket(j - i, 32, 128) for j in range(50)] for i in range(50)]
    expected = la.attention(q, k, v, bias=np.moveaxis(table[np.array(buckets)], -1, 0), scale=1.0)
    tolerances.same_storage(q, k, v, scale=1.0, offset=np.abs(table).max()).check(out, expected)


def test_two_passes_equal_one_softmax_over_a_mask(rng, isa):
    """The form with one softmax over window and global tokens, as a mask over all of them."""
    q, k, v, kg, vg = inputs(rng, 64)
    local, side = normal(rng, (4, 127)), normal(rng, (4, 9))
    keys, values = np.concatenate([k, kg], axis=2), np.concatenate([v, vg], axis=2)
    i, j, b = np.arange(64)[:, None], np.arange(64), np.arange(8)
    bias = np.concatenate([local[:, j - i + 63], side[:, np.clip(b - i // 8 + 4, 0, 8)]], axis=-1)
    mask = np.concatenate([np.abs(i - j) <= 11, np.ones((64, 8), bool)], axis=1)
    expected, expected_lse = la.attention(q, keys, values, bias=bias, mask=mask, scale=1.0, return_lse=True)
    options = {"radius": 11, "block": 8, "local_bias": local, "side_bias": side}
    out, lse = local_global_attention(q, k, v, kg, vg, return_lse=True, **options)
    tolerance_of(q, k, v, kg, vg, np.abs(bias).max()).check(out, np.asarray(expected, np.float64), lse, expected_lse)


@pytest.mark.parametrize("padding", [1, 6, 30])
def test_padding_changes_nothing(rng, padding):
    arguments = layer(rng, batch=3, length=44)
    options = {"radius": 9, "block": 8}
    whole = transient_global_attention(**arguments, **options)
    noise = np.concatenate([arguments["x"], normal(rng, (3, padding, 24))], axis=1)
    padded = transient_global_attention(**(arguments | {"x": noise}), **options, lengths=np.array([44, 44, 44]))
    layer_tolerance(arguments).check(padded[:, :44], np.asarray(whole, np.float64))
    assert (padded[:, 44:] == 0).all()
    ragged = transient_global_attention(**(arguments | {"x": noise}), **options, lengths=np.array([44, 0, 21]))
    alone = transient_global_attention(**(arguments | {"x": arguments["x"][2:, :21]}), **options)
    layer_tolerance(arguments).check(ragged[2:, :21], np.asarray(alone, np.float64))
    assert (ragged[1] == 0).all() and (ragged[2, 21:] == 0).all()


# Bad input


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"radius": -1}, ValueError, r"radius: got -1"),
        ({"block": 0}, ValueError, r"block: got 0"),
        ({"scale": float("inf")}, ValueError, r"scale: got inf"),
        ({"local_bias": np.zeros((4, 4), F32)}, ValueError, r"local_bias: got shape \(4, 4\), expected \(4, '2 \* n"),
        ({"side_bias": np.zeros((3, 5), F32)}, ValueError, r"side_bias: got shape \(3, 5\)"),
        ({"kg": np.zeros((1, 2, 6, 8), F32)}, ValueError, r"kg: got shape \(1, 2, 6, 8\), expected \(1, 2, 'N', 16\)"),
        ({"vg": np.zeros((1, 2, 5, 16), F32)}, ValueError, r"vg: got length 5, expected 6 as in kg"),
        ({"vg": np.zeros((1, 2, 6, 16), BF16)}, TypeError, r"vg: got dtype bfloat16, expected float32 as kg"),
        ({"k": np.zeros((1, 2, 49, 16), F32), "v": np.zeros((1, 2, 49, 16), F32)}, ValueError, r"k: got length 49"),
    ],
)
def test_bad_arguments(rng, change, error, message):
    named = dict(zip(("q", "k", "v", "kg", "vg"), inputs(rng), strict=True))
    with pytest.raises(error, match=message):
        local_global_attention(**(named | change))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": np.zeros((70, 24), F32)}, ValueError, r"x: got shape \(70, 24\), expected \[B, L, E\]"),
        ({"heads": 5}, ValueError, r"wq: got shape \(24, 32\), expected \[E, heads \* D\] with 5 heads"),
        ({"wk": np.zeros((24, 30), F32)}, ValueError, r"wk: got shape \(24, 30\)"),
        ({"wk": np.zeros((24, 24), F32)}, ValueError, r"q: got 4 heads, expected a positive multiple of the 3"),
        ({"wv": np.zeros((23, 32), F32)}, ValueError, r"wv: got shape \(23, 32\), expected \[24, columns\]"),
        ({"wo": np.zeros((31, 24), F32)}, ValueError, r"wo: got shape \(31, 24\)"),
        ({"g_weight": np.zeros(23, F32)}, ValueError, r"g_weight: got shape \(23,\)"),
        ({"eps": -1.0}, ValueError, r"eps: got -1.0"),
        ({"local_table": np.zeros((30, 4), F32)}, ValueError, r"table: got shape \(30, 4\)"),
        ({"side_table": np.zeros((32, 3), F32)}, ValueError, r"side_table: got 3 heads, expected 4"),
        ({"max_distance": 8}, ValueError, r"max_distance: got 8, expected at least 9"),
        ({"lengths": np.array([70, 71])}, ValueError, r"lengths: got \[70, 71\], expected 2 numbers from 0 to 70"),
        ({"lengths": np.array([70.0, 7])}, TypeError, r"lengths: got dtype float64"),
    ],
)
def test_bad_layers(rng, change, error, message):
    with pytest.raises(error, match=message):
        transient_global_attention(**(layer(rng) | change))
