"""StreamingLLM: steps and prefill are attention with the mask of sinks and window."""

import numpy as np
import pytest

import tolerances
from eviction import cache_of, check, decode, dense, sequence
from longattn.kv.evict import StreamingLLM
from longattn.reference import kv as reference
from longattn.reference.dense import attention
from random_arrays import DTYPES


def masked(q, k, v, first, window, **options):
    i, j = np.indices((q.shape[1], k.shape[1]))
    return attention(q, k, v, causal=True, mask=(j < first) | (i - j < window), **options)


@pytest.mark.parametrize("prompt", [0, 1, 3, 30, 60])
@pytest.mark.parametrize(("sinks", "window"), [(4, 8), (0, 5), (1, 1), (3, 70), (70, 2)])
def test_steps_and_prefill_are_the_mask(rng, *, sinks, window, prompt):
    q, k, v = sequence(rng)
    out, _ = decode(cache_of(StreamingLLM(sinks, window), k, v), q, k, v, prompt=prompt)
    tolerances.attention(q, k, v).check(out, masked(q, k, v, sinks, window))


def test_options(rng):
    q, k, v = sequence(rng)
    options = {"scale": 0.4, "softcap": 3.0, "sinks": np.array([1.0, -2.0, 0.5, 3.0])}
    out, _ = decode(cache_of(StreamingLLM(2, 9), k, v, **options), q, k, v, prompt=40)
    tolerances.attention(q, k, v, scale=0.4, offset=3.0).check(out, masked(q, k, v, 2, 9, **options))


def test_a_window_as_long_as_the_text_is_dense(rng):
    q, k, v = sequence(rng)
    out, kept = decode(cache_of(StreamingLLM(1, 60), k, v), q, k, v, prompt=20)
    tolerances.attention(q, k, v).check(out, dense(q, k, v))
    assert kept[-1] == [list(range(60))] * 2


def test_what_is_kept(rng):
    q, k, v = sequence(rng)
    cache = cache_of(StreamingLLM(3, 8), k, v)
    _, kept = decode(cache, q, k, v, prompt=20)
    for step, heads in enumerate(kept, start=19):
        assert heads == [[0, 1, 2, *range(step - 6, step + 1)]] * 2
    assert cache.stats.live == [10, 10] and cache.stats.attended == 11
    assert cache.store.slots == 11 and cache.stats.evicted == 2 * 50


@pytest.mark.parametrize("prompt", [0, 25])
def test_with_a_mean_row(rng, isa, prompt):
    q, k, v = sequence(rng, heads=6)
    cache, _, _ = check(StreamingLLM(2, 6), reference.StreamingLLM(2, 6), q, k, v, prompt=prompt, residual="mean")
    assert cache.store.folded == [53, 53] and cache.stats.folded == 106


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(rng, dtype):
    q, k, v = sequence(rng, dtype=dtype, value_dim=24)
    check(StreamingLLM(2, 6), reference.StreamingLLM(2, 6), q, k, v, prompt=30)


def test_several_rows_at_once(rng):
    """Rows of a later chunk see the window as it was when the chunk came."""
    q, k, v = sequence(rng)
    cache = cache_of(StreamingLLM(2, 50), k, v, slots=80)
    cache.prefill(q[:, :30], k[:, :30], v[:, :30])
    cache.append(k[:, 30:], v[:, 30:])
    out = cache.attend(q[:, 30:])
    tolerances.attention(q, k, v).check(out, masked(q, k, v, 2, 60)[:, 30:])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: StreamingLLM(-1), ValueError, "sinks: got -1, expected at least 0"),
        (lambda: StreamingLLM(1, 0), ValueError, "window: got 0, expected at least 1"),
        (lambda: StreamingLLM(1.5), TypeError, "sinks: got 1.5, expected an integer"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
