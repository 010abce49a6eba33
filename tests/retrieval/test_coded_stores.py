"""Retrieval over stores of codes: indexes of the numbers that the codes stand for, and rows read as codes."""

import numpy as np
import pytest

import index_checks
import longattn as la
import tolerances
from longattn import _core
from random_arrays import F32, normal
from random_stores import queries, rows, store_of
from tolerances.exact import MULTIPLY_BYTES

#: Kinds of index that stores of codes may have, small enough to have several segments.
INDEXES = {
    "signatures": la.index.Signatures,
    "signatures, 1 bit": lambda s: la.index.Signatures(s, bits=1),
    "pages": lambda s: la.index.Pages(s, 16, "mean_variance"),
    "pages, bounds": lambda s: la.index.Pages(s, 16, "bounds"),
    "clusters": lambda s: la.index.Clusters(s, 512, 16, tail=128, score="mean_variance"),
}
FORMATS = [("int8", {}), ("int4", {"group_size": 32}), ("int8", {"channel_scales": True})]
CALL = {"sinks": 3, "window": 70, "return_selected": True}


def _case(rng, kind, options, *, kv_heads=2, count=1500, dim=64, value_dim=40, heads=4):
    keys, values = rows(rng, kv_heads, count, dim, value_dim)
    keys[..., 5] *= 8  # a large channel, as models have them
    coded = store_of(keys, values, kind, **options)
    decoded = store_of(np.asarray(coded.keys), np.asarray(coded.values), F32)
    return queries(rng, heads, 2, dim=dim, spread=0.7), coded, decoded


def _tolerance(q, coded):
    """Of two computations over the same numbers, one of which multiplies codes."""
    k, v = np.asarray(coded.keys, np.float64), np.asarray(coded.values, np.float64)
    kind = coded.dtype
    one_scale = coded.keys.nbytes == coded.kv_heads * len(coded) * (-(-coded.head_dim // 32) * 4 * int(kind[3:]) + 8)
    integers = one_scale and _core.isa() in MULTIPLY_BYTES
    mine = tolerances.coded_attention(q, k, v, channels=coded.channel_scales, integers=integers)
    other = tolerances.attention(q, k, v)
    return tolerances.Tolerance(
        atol=mine.atol + other.atol, rtol=mine.rtol + other.rtol, lse_atol=mine.lse_atol + other.lse_atol
    )


def _check(q, coded, decoded, of_codes, of_numbers, **call):
    results = [
        la.retrieval_attention(q, s, index, **CALL, **call) for s, index in ((coded, of_codes), (decoded, of_numbers))
    ]
    for a, b in zip(*(r.stats.selected for r in results), strict=True):
        for picked, wanted in zip(a, b, strict=True):
            np.testing.assert_array_equal(picked, wanted)
    a, b = results
    _tolerance(q, coded).check(a.out, np.asarray(b.out, np.float64), a.lse, np.asarray(b.lse, np.float64))


@pytest.mark.parametrize("name", INDEXES)
@pytest.mark.parametrize(("kind", "options"), FORMATS, ids=str)
def test_what_a_store_of_the_decoded_numbers_gives(rng, isa, name, kind, options):
    """The same rows are selected, and they are the rows that are read."""
    q, coded, decoded = _case(rng, kind, options)
    of_codes, of_numbers = INDEXES[name](coded), INDEXES[name](decoded)
    for top_k in (1, 90, 400):
        _check(q, coded, decoded, of_codes, of_numbers, top_k=top_k)
    if of_codes.estimates:
        _check(q, coded, decoded, of_codes, of_numbers, top_p=0.6)
    _check(q, coded, decoded, of_codes, of_numbers, top_k=90, rest="none")
    assert len(of_codes) == len(of_numbers)


@pytest.mark.parametrize(("kind", "options"), FORMATS, ids=str)
def test_samples(rng, isa, kind, options):
    q, coded, decoded = _case(rng, kind, options, value_dim=39)
    of_codes, of_numbers = la.index.Signatures(coded), la.index.Signatures(decoded)
    call = {"rest": "sampled", "top_k": 200, "seed": 3}
    a, b = (la.retrieval_attention(q, i.store, i, **CALL, **call) for i in (of_codes, of_numbers))
    for one, other in zip(a.stats.selected, b.stats.selected, strict=True):
        for picked, wanted in zip(one, other, strict=True):
            assert len(np.setxor1d(picked, wanted)) <= 4  # rows whose chance is at their random number
    np.testing.assert_allclose(a.out, b.out, atol=0.02)
    exact = la.attention(q, coded.keys, coded.values, causal=True)
    result = la.retrieval_attention(q, coded, of_codes, epsilon=0.1, delta=0.05, sinks=3, window=70)
    errors = np.linalg.norm(result.out - exact, axis=-1) / np.linalg.norm(exact, axis=-1)
    assert (errors <= 0.1).mean() >= 0.75 and errors.max() < 0.3


@pytest.mark.parametrize("name", INDEXES)
@pytest.mark.parametrize(("kind", "options"), FORMATS, ids=str)
def test_a_budget_of_all_rows_is_attention_over_the_codes(rng, isa, threads, name, kind, options):
    q, coded, _ = _case(rng, kind, options)
    sink_logits = normal(rng, (4,), spread=2.0)
    result = la.retrieval_attention(q, coded, INDEXES[name](coded), top_k=5000, sink_logits=sink_logits, **CALL)
    out, lse = la.attention(q, coded.keys, coded.values, causal=True, sinks=sink_logits, return_lse=True)
    _tolerance(q, coded).check(result.out, np.asarray(out, np.float64), result.lse, np.asarray(lse, np.float64))


@pytest.mark.parametrize("name", INDEXES)
def test_follows_forks_and_files(name, tmp_path):
    if not name.startswith("signatures"):  # their fit depends on how rows came
        index_checks.check_follows(INDEXES[name], dtype="int8")
        index_checks.check_fork(INDEXES[name], dtype="int8")
    index_checks.check_files(INDEXES[name], tmp_path, dtype="int8")


@pytest.mark.parametrize("name", ["signatures", "pages", "clusters"])
@pytest.mark.parametrize("count", [5000, 9000])
def test_growth_in_parts(rng, name, count):
    """More rows than are decoded at once; appended in pieces, and some taken back."""
    keys, values = rows(rng, 1, count, 32, 16)
    coded = store_of(keys[:, :700], values[:, :700], "int8", room=10000)
    index = INDEXES[name](coded)
    numbers = store_of(np.asarray(coded.keys), np.asarray(coded.values), F32, room=10000)
    other = INDEXES[name](numbers)
    q = queries(rng, 2, spread=0.7)
    at = 700
    for upto in (2000, count - 7, count):
        coded.append(keys[:, at:upto], values[:, at:upto])
        numbers.append(np.asarray(coded.keys)[:, at:], np.asarray(coded.values)[:, at:])
        at = upto
        _check(q, coded, numbers, index, other, top_k=50)
    for s in (coded, numbers):
        s.truncate(count - 1000)
    _check(q, coded, numbers, index, other, top_k=50)


def test_probed_budgets(rng):
    q, coded, decoded = _case(rng, "int8", {})
    found = [
        la.retrieval.probe_budgets(q, s, la.index.Signatures(s), error=0.1, rest="none", sinks=3, window=70)
        for s in (coded, decoded)
    ]
    assert found[0].top_k == found[1].top_k
    np.testing.assert_allclose(found[0].error, found[1].error, rtol=0.05)


def test_batches_of_codes_and_numbers(rng):
    q, coded, decoded = _case(rng, "int8", {})
    indexes = [la.index.Signatures(coded), la.index.Signatures(decoded)]
    both = la.retrieval_attention_batch([q, q], [coded, decoded], indexes, top_k=60, **CALL)
    for index, result in zip(indexes, both, strict=True):
        alone = la.retrieval_attention(q, index.store, index, top_k=60, **CALL)
        np.testing.assert_array_equal(result.out, alone.out)


def test_refused(rng):
    _, coded, _ = _case(rng, "int8", {})
    for kind in ("flat", "graph", "inverted_lists", "hashes", "lsh", "collisions", "product_quantisation"):
        with pytest.raises((TypeError, ValueError), match=r"store: got .*int8.*an index that takes codes"):
            la.index.make(kind, coded)
    keys, values = rows(rng, 2, 600, 32)
    keys[1, 77, 3] = np.nan
    for make in INDEXES.values():
        s = store_of(keys, values, "int8")
        with pytest.raises(ValueError, match="NaN or infinity in key 77 of head 1"):
            la.retrieval_attention(queries(rng), s, make(s), top_k=5)
