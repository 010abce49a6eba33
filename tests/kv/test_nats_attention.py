"""Attention by token types: the mask of the rule, in prefill and over a cache of live rows."""

import numpy as np
import pytest

import longattn as la
import tolerances
from eviction import cache_of, decode, dense, sequence
from longattn.kv.evict import Nats, nats_attention, nats_types, nats_visibility
from longattn.reference import kv as reference
from longattn.reference.dense import attention
from random_arrays import DTYPES, LAYOUTS, lay, normal

GLOBAL, LOCAL, WINDOW = 0, 1, 2


def types_of(rng, shape, p=(0.15, 0.45, 0.4)):
    return rng.choice(3, shape, p=p)


@pytest.mark.parametrize("window_for_all", [False, True])
@pytest.mark.parametrize("window", [1, 4, 100])
@pytest.mark.parametrize("shape", [(2, 60), (3, 2, 33)])
def test_the_bound_per_key_is_the_mask(rng, shape, window, window_for_all):
    types = types_of(rng, shape)
    last = nats_visibility(types, window, window_for_all=window_for_all)
    i, j = np.indices((shape[-1], shape[-1]))
    seen = (j <= i) & (i <= last[..., None, :])
    np.testing.assert_array_equal(seen, reference.nats_mask(types, window, window_for_all) & (j <= i))


@pytest.mark.parametrize("batch", [(), (3,)])
@pytest.mark.parametrize("window", [1, 5])
def test_prefill(rng, isa, window, batch):
    q = normal(rng, (*batch, 6, 50, 16), spread=2.0)
    k, v = normal(rng, (*batch, 2, 50, 16)), normal(rng, (*batch, 2, 50, 24))
    types = types_of(rng, (*batch, 2, 50))
    out, lse = nats_attention(q, k, v, types, window=window, return_lse=True)
    expected = reference.nats_attention(q, k, v, types, window=window, return_lse=True)
    tolerances.attention(q, k, v).check(out, expected[0], lse, expected[1])


def test_global_tokens_only_are_causal(rng):
    q, k, v = sequence(rng)
    out = nats_attention(q, k, v, np.full((2, 60), GLOBAL), window=3)
    tolerances.attention(q, k, v).check(out, dense(q, k, v))


def test_window_tokens_only_are_a_window(rng):
    q, k, v = sequence(rng)
    out = nats_attention(q, k, v, np.full((2, 60), WINDOW), window=7)
    tolerances.attention(q, k, v).check(out, attention(q, k, v, causal=True, window=(6, -1)))


@pytest.mark.parametrize("window", [2**62, 2**63 - 1])
def test_a_window_of_everything_is_causal(rng, window):
    """Positions and the window do not wrap around."""
    assert (nats_visibility(np.full((1, 9), WINDOW), window) >= 8).all()


def test_local_tokens_only_are_causal(rng):
    q, k, v = sequence(rng)
    out = nats_attention(q, k, v, np.full((2, 60), LOCAL), window=3)
    tolerances.attention(q, k, v).check(out, dense(q, k, v))


def test_a_local_token_is_still_seen_by_the_next_global_one():
    assert nats_visibility(np.array([LOCAL, LOCAL, GLOBAL, LOCAL]))[:2].tolist() == [2, 2]


@pytest.mark.parametrize("window_for_all", [False, True])
@pytest.mark.parametrize("prompt", [0, 1, 25])
def test_steps_give_the_rows_of_the_prefill(rng, isa, *, prompt, window_for_all):
    q, k, v = sequence(rng, heads=6)
    types = types_of(rng, (2, 60))
    cache = cache_of(Nats(5, window_for_all=window_for_all), k, v)
    out, kept = (
        decode(cache, q, k, v, prompt=prompt, types=types[:, :prompt], per_row=lambda i: {"types": types[:, i : i + 1]})
        if prompt
        else decode(cache, q, k, v, per_row=lambda i: {"types": types[:, i : i + 1]})
    )
    expected = reference.nats_attention(q, k, v, types, window=5, window_for_all=window_for_all)
    tolerances.attention(q, k, v).check(out, expected)
    mask = reference.nats_mask(types, 5, window_for_all)
    for step, heads in enumerate(kept[:-1], start=max(prompt - 1, 0)):
        for head, rows in enumerate(heads):
            seen = np.flatnonzero(mask[head, step + 1, : step + 1])
            assert rows == seen.tolist(), "what is kept is what the next row sees"


def test_several_rows_at_once(rng):
    """The types of a chunk end what came before; its own rows see each other by them."""
    q, k, v = sequence(rng)
    types = types_of(rng, (2, 60))
    policy = Nats(50)
    cache = cache_of(policy, k, v)
    cache.prefill(q[:, :20], k[:, :20], v[:, :20], types=types[:, :20])
    cache.append(k[:, 20:40], v[:, 20:40], types=types[:, 20:40])
    cache.attend(q[:, 39:40])
    mask = reference.nats_mask(types, 50)
    assert [rows.tolist() for rows in cache.kept] == [np.flatnonzero(m[40, :40]).tolist() for m in mask]


def test_a_mean_row_stands_in(rng):
    q, k, v = sequence(rng)
    types = types_of(rng, (2, 60))
    cache = cache_of(Nats(4), k, v, residual="mean")
    decode(cache, q, k, v, per_row=lambda i: {"types": types[:, i : i + 1]})
    assert cache.store.folded == [60 - len(rows) for rows in cache.kept]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(rng, dtype):
    q, k, v = sequence(rng, dtype=dtype)
    types = types_of(rng, (2, 60))
    out = nats_attention(q, k, v, types, window=5)
    assert out.dtype == dtype
    tolerances.attention(q, k, v).check(out, reference.nats_attention(q, k, v, types, window=5))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_and_options(rng, layout):
    q, k, v = (lay(x[None], layout) for x in sequence(rng))
    types = types_of(rng, (1, 2, 60))
    options = {"scale": 0.4, "softcap": 3.0, "sinks": np.array([1.0, -2.0, 0.5, 3.0]), "return_lse": True}
    out, lse = nats_attention(q, k, v, types, window=5, **options)
    expected = reference.nats_attention(q, k, v, types, window=5, **options)
    tolerances.attention(q, k, v, scale=0.4, offset=3).check(out, expected[0], lse, expected[1])


def test_types_from_logits(rng):
    logits = normal(rng, (2, 7, 3, 3))
    types = nats_types(logits)
    assert types.shape == (2, 3, 7)
    np.testing.assert_array_equal(types[1, 2], logits[1, :, 2].argmax(axis=-1))


def test_torch(rng):
    torch = pytest.importorskip("torch")
    q, k, v = (torch.from_numpy(x) for x in sequence(rng))
    types = torch.from_numpy(types_of(rng, (2, 60)))
    out, lse = nats_attention(q, k, v, types, return_lse=True)
    assert isinstance(out, torch.Tensor) and isinstance(lse, torch.Tensor)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda q, k, t: nats_attention(q, k, k, t[:1]), ValueError, r"types: got shape \(1, 9\), expected \(2, 9\)"),
        (lambda q, k, t: nats_attention(q, k, k, t + 1.0), TypeError, "types: got dtype float64, expected integers"),
        (lambda q, k, t: nats_attention(q, k, k, t + 5), ValueError, "types: got numbers from 5 to"),
        (lambda q, k, t: nats_attention(q[:, :3], k, k, t), ValueError, "q: got 3 rows, expected 9"),
        (lambda q, k, t: nats_attention(q, k, k, t, window=0), ValueError, "window: got 0"),
        (lambda q, k, t: nats_attention(q, k, k, np.zeros((), int)), ValueError, r"types: got shape \(\)"),
        (lambda q, k, t: nats_attention(q, k, k, t, return_lse=1), TypeError, "return_lse: got 1, expected True"),
        (lambda q, k, t: nats_types(k), ValueError, r"logits: got shape \(2, 9, 8\)"),
        (lambda q, k, t: cache_of(Nats(), k, k).append(k, k), TypeError, "types: got arguments"),
        (lambda q, k, t: cache_of(Nats(), k, k).append(k, k, types=t[:, :2]), ValueError, r"types: got shape \(2, 2\)"),
        (
            lambda q, k, t: cache_of(la.kv.evict.HeavyHitter(1, 1), k, k).append(k, k, types=t),
            TypeError,
            "types: got an argument that HeavyHitter does not take",
        ),
    ],
)
def test_bad_input(rng, call, error, message):
    with pytest.raises(error, match=message):
        call(normal(rng, (4, 9, 8)), normal(rng, (2, 9, 8)), types_of(rng, (2, 9)))
