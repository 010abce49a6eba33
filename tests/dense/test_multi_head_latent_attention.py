"""`multi_head_latent_attention`: the absorbed and the expanded form, apart and packed caches."""

import sys

import numpy as np
import pytest

import longattn as la
import tolerances
from longattn.dense import multi_head_latent_attention as latent_attention
from longattn.reference import dense as reference
from random_arrays import BF16, DTYPES, F16, F32, lay, normal
from running import on_threads

FORMS = pytest.mark.parametrize("absorb", [True, False], ids=["absorbed", "expanded"])


def arguments(rng, *, batch=2, heads=4, rows=3, keys=50, nope=16, rope=8, rank=24, value_dim=20, dtype=F32, cache=None):
    """Queries, cache and weights whose logits and outputs are of order 1."""
    cache = dtype if cache is None else cache
    return {
        "q_nope": normal(rng, (batch, heads, rows, nope), dtype),
        "q_rope": normal(rng, (batch, heads, rows, rope), dtype),
        "latent": normal(rng, (batch, keys, rank), cache),
        "k_rope": normal(rng, (batch, keys, rope), cache),
        "w_uk": normal(rng, (heads, nope, rank), dtype, spread=rank**-0.5),
        "w_uv": normal(rng, (heads, rank, value_dim), dtype, spread=rank**-0.5),
    }


def allowed(a, *, offset=0.0, scale=None):
    return tolerances.stored(tolerances.latent_attention(**a, scale=scale, offset=offset), a["q_nope"].dtype)


def check(a, *, offset=0.0, **options):
    out, lse = latent_attention(**a, return_lse=True, **options)
    assert out.dtype == a["q_nope"].dtype and lse.dtype == np.float32
    options.pop("absorb", None)
    expected, expected_lse = reference.multi_head_latent_attention(**a, return_lse=True, **options)
    assert out.shape == expected.shape
    allowed(a, offset=offset, scale=options.get("scale")).check(out, expected, lse, expected_lse)
    return out, lse


def packed(a):
    return a | {"latent": np.concatenate((a["latent"], a["k_rope"]), axis=-1), "k_rope": None}


@FORMS
@pytest.mark.parametrize(("rows", "keys"), [(1, 1), (1, 200), (9, 45), (40, 40), (5, 3)])
@pytest.mark.parametrize("heads", [1, 5])
def test_reference(rng, isa, *, absorb, rows, keys, heads):
    a = arguments(rng, heads=heads, rows=rows, keys=keys)
    check(a, absorb=absorb, causal=True)
    check(a, absorb=absorb)


@FORMS
@pytest.mark.parametrize(("nope", "rope", "rank", "value_dim"), [(128, 64, 512, 128), (5, 3, 7, 9), (32, 16, 12, 64)])
def test_sizes(rng, isa, *, absorb, nope, rope, rank, value_dim):
    check(arguments(rng, nope=nope, rope=rope, rank=rank, value_dim=value_dim), absorb=absorb, causal=True)


@FORMS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cache", DTYPES, ids=str)
def test_dtypes(rng, isa, *, absorb, dtype, cache):
    check(arguments(rng, dtype=dtype, cache=cache), absorb=absorb, causal=True)


@FORMS
@pytest.mark.parametrize("layout", ["blhd", "sliced", "fused", "reversed", "stepped", "misaligned"])
def test_layouts(rng, absorb, layout):
    a = arguments(rng)
    names = {"q_nope", "q_rope", "w_uk", "w_uv"} | ({"latent", "k_rope"} if layout != "blhd" else set())
    laid = {name: lay(x, layout) if name in names else x for name, x in a.items()}
    expected, expected_lse = latent_attention(**a, absorb=absorb, return_lse=True)
    out, lse = latent_attention(**laid, absorb=absorb, return_lse=True)
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(lse, expected_lse)


@FORMS
def test_options(rng, isa, absorb):
    """Those per head among them, over heads that are expanded one at a time too."""
    a = arguments(rng, heads=4, rows=6, keys=40)
    options = {
        "window": (20, -1),
        "softcap": 4.0,
        "sinks": np.linspace(-1, 2, 4).astype(np.float32),
        "alibi_slopes": np.linspace(0.01, 0.3, 4).astype(np.float32),
        "mask": rng.random((2, 1, 6, 40)) > 0.3,
        "bias": normal(rng, (4, 6, 40)),
        "scale": 0.3,
    }
    check(a, absorb=absorb, causal=True, offset=20, **options)


@pytest.mark.parametrize("at_once", [1, 3])
def test_heads_are_expanded_a_few_at_a_time(rng, monkeypatch, at_once):
    """Sinks and slopes go with their heads, and the bits are those of all heads at once."""
    a = arguments(rng, heads=7, rows=5, keys=33)
    options = {"sinks": normal(rng, 7), "alibi_slopes": abs(normal(rng, 7)), "causal": True, "absorb": False}
    expected, expected_lse = latent_attention(**a, return_lse=True, **options)
    module = sys.modules[latent_attention.__module__]
    monkeypatch.setattr(module, "EXPANDED_BYTES", at_once * 4 * 2 * 33 * (16 + 8 + 20))
    out, lse = latent_attention(**a, return_lse=True, **options)
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(lse, expected_lse)


@FORMS
def test_no_keys_and_no_rows(rng, absorb):
    out, lse = latent_attention(**arguments(rng, keys=0), absorb=absorb, return_lse=True)
    assert (out == 0).all() and (lse == -np.inf).all()
    out, lse = latent_attention(**arguments(rng, rows=0), absorb=absorb, return_lse=True)
    assert out.shape == (2, 4, 0, 20) and lse.shape == (2, 4, 0)


@FORMS
def test_rows_that_see_nothing(rng, absorb):
    out, lse = latent_attention(**arguments(rng, rows=5, keys=2), causal=True, absorb=absorb, return_lse=True)
    assert (out[:, :, :3] == 0).all() and (lse[:, :, :3] == -np.inf).all() and np.isfinite(lse[:, :, 3:]).all()


@FORMS
def test_out(rng, absorb):
    a = arguments(rng, dtype=BF16)
    expected = latent_attention(**a, absorb=absorb)
    out = lay(np.zeros(expected.shape, BF16), "blhd")
    assert latent_attention(**a, absorb=absorb, out=out) is out
    np.testing.assert_array_equal(out, expected)


def test_the_form_with_fewer_multiply_adds_is_taken(rng, monkeypatch):
    module = sys.modules[latent_attention.__module__]
    taken = []
    for name in ("_absorbed", "_expanded"):
        form = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, name=name, form=form: taken.append(name) or form(*args))
    sizes = {"batch": 1, "heads": 2, "nope": 16, "rope": 8, "rank": 64, "value_dim": 16}
    for rows, keys in ((1, 100), (100, 100), (1, 1), (8, 300), (40, 300)):
        for causal in (False, True):
            latent_attention(**arguments(rng, rows=rows, keys=keys, **sizes), causal=causal)
            pairs = sum(min(keys, keys - rows + i + 1) if causal else keys for i in range(rows))
            absorbed = rows * 64 * 32 + pairs * (128 + 8)
            expanded = keys * 64 * 32 + pairs * (16 + 8 + 16)
            assert taken[-1] == ("_absorbed" if absorbed <= expanded else "_expanded")
    assert set(taken) == {"_absorbed", "_expanded"}


def test_a_store_holds_the_packed_cache(rng, isa):
    """One KV head of `R + Dr` numbers, appended step by step and read where it lies."""
    a = packed(arguments(rng, batch=1, rows=1, keys=60, cache=BF16, dtype=F32))
    store = la.KVStore(kv_heads=1, head_dim=32, value_dim=1, dtype="bfloat16", capacity=1000)
    for rows in np.array_split(a["latent"], [1, 10, 40], axis=1):
        store.append(rows, np.zeros((1, rows.shape[1], 1), np.float32))
    out = latent_attention(**a | {"latent": store.keys}, causal=True)
    np.testing.assert_array_equal(out, latent_attention(**a, causal=True))


@FORMS
def test_any_number_of_threads(rng, absorb):
    a = arguments(rng, batch=1, rows=2, keys=5000, cache=BF16)
    results = on_threads(lambda: latent_attention(**a, causal=True, absorb=absorb))
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0])


def test_torch_tensors(rng):
    torch = pytest.importorskip("torch")
    a = arguments(rng)
    tensors = {name: torch.from_numpy(x) for name, x in a.items()}
    out, lse = latent_attention(**tensors, return_lse=True)
    expected, expected_lse = latent_attention(**a, return_lse=True)
    assert isinstance(out, torch.Tensor)
    np.testing.assert_array_equal(out.numpy(), expected)
    np.testing.assert_array_equal(lse.numpy(), expected_lse)


# Identities


@pytest.mark.parametrize("rows", [1, 30])
@pytest.mark.parametrize("cache", [F32, F16, BF16], ids=str)
def test_absorbed_is_expanded(rng, isa, rows, cache):
    a = arguments(rng, rows=rows, keys=90, cache=cache)
    (one, one_lse), (two, two_lse) = (
        latent_attention(**a, absorb=absorb, causal=True, return_lse=True) for absorb in (True, False)
    )
    once = allowed(a)
    twice = tolerances.Tolerance(2 * once.atol, 2 * once.rtol, 2 * once.lse_atol)
    twice.check(one, np.asarray(two, np.float64), one_lse, two_lse)


@FORMS
def test_it_is_attention_over_the_keys_and_values_of_each_head(rng, isa, absorb):
    a = arguments(rng, rows=7, keys=40)
    q = np.concatenate((a["q_nope"], a["q_rope"]), axis=-1)
    shared = np.broadcast_to(a["k_rope"][:, None], (2, 4, 40, 8))
    k = np.concatenate((a["latent"][:, None] @ a["w_uk"].swapaxes(-1, -2), shared), axis=-1)
    v = a["latent"][:, None] @ a["w_uv"]
    expected, expected_lse = la.attention(q, k, v, causal=True, return_lse=True)
    out, lse = latent_attention(**a, absorb=absorb, causal=True, return_lse=True)
    once = allowed(a)
    twice = tolerances.Tolerance(2 * once.atol, 2 * once.rtol, 2 * once.lse_atol)
    twice.check(out, np.asarray(expected, np.float64), lse, expected_lse)


@FORMS
def test_steps_are_the_prefill(rng, isa, absorb):
    a = arguments(rng, rows=20, keys=20)
    whole, whole_lse = latent_attention(**a, causal=True, return_lse=True, absorb=False)
    once = allowed(a)
    twice = tolerances.Tolerance(2 * once.atol, 2 * once.rtol, 2 * once.lse_atol)
    for n in range(1, 21):
        now = slice(n - 1, n)
        queries = {name: a[name][:, :, now] for name in ("q_nope", "q_rope")}
        past = {name: a[name][:, :n] for name in ("latent", "k_rope")}
        step, lse = latent_attention(**a | queries | past, causal=True, return_lse=True, absorb=absorb)
        twice.check(step, np.asarray(whole[:, :, now], np.float64), lse, whole_lse[:, :, now])


@FORMS
@pytest.mark.parametrize("cache", [F32, BF16], ids=str)
def test_a_packed_cache_gives_the_same_bits(rng, isa, absorb, cache):
    a = arguments(rng, rows=5, keys=70, cache=cache)
    expected, expected_lse = latent_attention(**a, absorb=absorb, causal=True, return_lse=True)
    out, lse = latent_attention(**packed(a), absorb=absorb, causal=True, return_lse=True)
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(lse, expected_lse)


def test_a_packed_cache_is_not_copied(rng, monkeypatch):
    """The keys that attention gets lie in the cache, and the values in the keys."""
    module = sys.modules[latent_attention.__module__]
    a, seen = packed(arguments(rng, rows=1)), {}

    def watched(q, k, v, **options):
        seen.update(k=k, v=v)
        return la.attention(q, k, v, **options)

    monkeypatch.setattr(module, "attention", watched)
    latent_attention(**a, absorb=True)
    for x in seen.values():
        assert x.__array_interface__["data"][0] == a["latent"].__array_interface__["data"][0]
        assert x.strides[-2:] == a["latent"].strides[-2:]


# Bad input


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q_nope": np.zeros((4, 3, 16), F32)}, ValueError, r"q_nope: got shape \(4, 3, 16\), expected \[B, H"),
        ({"q_rope": np.zeros((2, 4, 2, 8), F32)}, ValueError, r"q_rope: got shape \(2, 4, 2, 8\), expected \(2, 4, 3"),
        ({"q_rope": np.zeros((2, 4, 3, 8), F16)}, TypeError, r"q_rope: got dtype float16, expected float32 as q_nope"),
        ({"latent": np.zeros((2, 50, 25), F32)}, ValueError, r"latent: got shape \(2, 50, 25\), expected \(2, 50"),
        ({"latent": np.zeros((1, 50, 24), F32)}, ValueError, r"latent: got shape \(1, 50, 24\), expected \(2, 50"),
        ({"latent": np.zeros((2, 50, 24))}, TypeError, r"latent: got dtype float64"),
        ({"latent": np.zeros((2, 50, 24), F16)}, TypeError, r"k_rope: got dtype float32, expected float16 as latent"),
        ({"k_rope": np.zeros((2, 49, 8), F32)}, ValueError, r"k_rope: got shape \(2, 49, 8\), expected \(2, 50, 8\)"),
        ({"k_rope": None}, ValueError, r"latent: got shape \(2, 50, 24\), expected \(2, 50, 32\), latents and k_rope"),
        ({"w_uk": np.zeros((4, 15, 24), F32)}, ValueError, r"w_uk: got shape \(4, 15, 24\), expected \(4, 16, 24\)"),
        ({"w_uv": np.zeros((4, 20, 20), F32)}, ValueError, r"w_uv: got shape \(4, 20, 20\), expected \(4, 24, 20\)"),
        ({"w_uv": np.zeros((4, 24, 0), F32)}, ValueError, r"w_uv: got shape \(4, 24, 0\)"),
        ({"absorb": 1}, TypeError, r"absorb: got 1, expected True or False"),
        ({"causal": None}, TypeError, r"causal: got None"),
        ({"scale": np.inf}, ValueError, r"scale: got inf"),
        ({"state": None}, TypeError, r"state: got one, expected none"),
        ({"sinks": np.zeros(3, F32)}, ValueError, r"sinks: got shape \(3,\)"),
        ({"out": np.zeros((2, 4, 3, 16), F32)}, ValueError, r"out: got shape \(2, 4, 3, 16\), expected \(2, 4"),
    ],
)  # fmt: skip
@FORMS
def test_bad_arguments(rng, absorb, change, error, message):
    with pytest.raises(error, match=message):
        latent_attention(**arguments(rng) | {"absorb": absorb} | change)


def test_out_must_not_overlap(rng):
    a = arguments(rng, value_dim=16)
    with pytest.raises(ValueError, match=r"out: got an array that overlaps q_nope"):
        latent_attention(**a, out=a["q_nope"])
