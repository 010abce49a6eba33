"""Sampled and verified retrieval attention: equal draws, no bias, honest errors, all rows where that is needed."""

import dataclasses
import itertools
import json
import re

import numpy as np
import pytest

import longattn as la
import tolerances
from longattn import _core, vectors
from longattn.demo import runner, text
from longattn.reference.retrieval import verified as reference
from longattn.reference.retrieval.signatures import encode
from longattn.retrieval import verified_sparse_attention
from random_arrays import BF16, DTYPES, F32, normal
from random_stores import queries, store, store_of
from running import on_threads

COUNT, WINDOW, SINKS = 12_288, 64, 4
CALL = {"window": WINDOW, "sinks": SINKS}


def tensors(index, path):
    """Everything that an index saves, by name."""
    index.update()
    index.save(path)
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    kinds = {"U8": np.uint8, "U32": np.uint32, "U64": np.uint64, "F32": np.float32, "F64": np.float64}
    found = {}
    for name, entry in header.items():
        if name != "__metadata__":
            start, end = (8 + size + at for at in entry["data_offsets"])
            found[name] = np.frombuffer(data[start:end], kinds[entry["dtype"]]).reshape(entry["shape"])
    return found


def estimates_of(s, index, path):
    """What the index knows of each KV head, for the oracle."""
    saved, made = tensors(index, path), index.parameters
    heads = []
    for h in range(s.kv_heads):
        keys = np.asarray(s.keys[h], np.float64)[: len(index)]
        sums, counts = saved[f"members_sums.{h}"], saved[f"members_counts.{h}"]
        centroids = saved[f"centroids.{h}"][:, : s.value_dim]
        means = np.where(counts[:, None] > 0, sums / np.maximum(counts, 1)[:, None], centroids)
        rows = saved[f"member_rows.{h}"][0]
        norm = float(np.sqrt((np.asarray(s.values[h], np.float64)[:rows] ** 2).sum(axis=-1).mean()))
        codes = encode(keys, made["bits"], made["seed"])
        # Factors are kept in half precision.
        unit = float(saved[f"unit.{h}"][0])
        codes = dataclasses.replace(codes, factors=(codes.factors / unit).astype(np.float16).astype(np.float64) * unit)
        heads.append(reference.HeadEstimates(codes, len(index), saved[f"value_ids.{h}"], means, norm))
    return heads


def groups_of(q, s, heads, **call):
    """The oracle's groups for one query position at the end of the store."""
    size = len(q) // s.kv_heads
    sinks = call.pop("sink_logits", None)
    groups = []
    for h, head in enumerate(heads):
        mine = slice(h * size, (h + 1) * size)
        own = None if sinks is None else sinks[mine]
        groups.append(reference.Group(q[mine, 0], s.keys[h], s.values[h], head, sink_logits=own, **call))
    return groups


def spread(group, rows, chances, correction):
    at = rows - group.candidates[0]
    terms = (group.weights[:, rows] + group.estimated[:, at]) / chances
    return float((terms.sum(axis=-1) / correction.mass).max())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rest", ["verified", "sampled"])
def test_the_oracle_on_equal_draws(rng, isa, tmp_path, dtype, rest):
    """A first sample has the oracle's rows, and its formula's result on them."""
    s = store(rng, 2, COUNT, 32, 20, dtype=dtype)
    index = la.index.Signatures(s)
    heads = estimates_of(s, index, tmp_path / "index")
    q, sink_logits = queries(rng, 6, dim=32, dtype=dtype), normal(rng, (6,), spread=2.0)
    call = {**CALL, "scale": 0.2, "sink_logits": sink_logits}
    top_k = 400
    mode = {"epsilon": 0.9, "relative_to": "values"} if rest == "verified" else {"rest": "sampled", "top_k": top_k}
    got = la.retrieval_attention(q, s, index, seed=7, return_selected=True, **mode, **call)
    if rest == "verified":
        assert got.stats.verified.all()
    for h, group in enumerate(groups_of(q, s, heads, **call)):
        of = reference.key(7, COUNT - 1, h)
        numbers = reference.uniforms(of, group.candidates)
        if rest == "verified":
            chances = reference.probabilities(group.shares, reference.PILOT)
        else:
            top = np.argsort(-group.shares)[: top_k // 2]
            chances = np.ones(len(group.shares))
            others = np.setdiff1d(np.arange(len(chances)), top)
            chances[others] = reference.probabilities(group.shares[others], top_k - top_k // 2)
        drawn = group.candidates[numbers < chances]
        rows = got.stats.selected[h][0].astype(np.int64)
        # Chances round differently: a number between two of them is drawn by one alone.
        assert len(np.setxor1d(drawn, rows)) <= 2
        p = chances[rows - group.candidates[0]]
        found = group.correct(rows, p, reference.hashes(of, rows))
        mine = slice(3 * h, 3 * h + 3)
        out = found.out if rest == "verified" else found.shrunken
        allowed = tolerances.sampled(
            q,
            s.keys,
            s.values,
            spread=spread(group, rows, p, found),
            scale=0.2,
            offset=float(np.abs(sink_logits).max()),
        )
        allowed.check(got.out[mine, 0], out, got.lse[mine, 0], group.unit + np.log(found.mass))
        unit = heads[h].value_norm if rest == "verified" else np.linalg.norm(found.out, axis=-1)
        np.testing.assert_allclose(got.stats.error_estimate[mine, 0], found.sd / unit, rtol=1e-3)
        assert got.stats.keys_sampled[h, 0] == len(rows)
        assert got.stats.keys_attended[h, 0] == len(rows) + COUNT - len(group.candidates)
        missed = 1 - (group.steady[0] + group.weights[:, rows].sum(axis=-1)) / found.mass
        np.testing.assert_allclose(got.stats.missed_mass[mine, 0], missed, atol=1e-4)


@pytest.mark.parametrize("relative_to", ["output", "values"])
def test_the_oracle_grows_its_samples_alike(rng, tmp_path, relative_to):
    s = store(rng, 2, COUNT, 32, 20)
    index = la.index.Signatures(s)
    heads = estimates_of(s, index, tmp_path / "index")
    q, sink_logits = queries(rng, 6, 2, dim=32), normal(rng, (6,))
    norms = np.repeat([head.value_norm for head in heads], 3)[:, None]
    grown = everything = 0
    for epsilon in (0.01, 0.03, 0.06, 0.12, 0.3):
        mode = {"epsilon": epsilon, "delta": 0.02, "relative_to": relative_to, "seed": 3, "sink_logits": sink_logits}
        expected = reference.verified_sparse_attention(q, s.keys, s.values, heads, **mode, **CALL)
        got = verified_sparse_attention(q, s, index, return_selected=True, **mode, **CALL)
        np.testing.assert_allclose(got.stats.error_estimate, expected.error_estimate, rtol=0.02)
        # Almost the same rows: the results differ by a small part of their error.
        unit = norms if relative_to == "values" else np.linalg.norm(expected.out, axis=-1)
        allowed = 0.1 * expected.error_estimate * unit + tolerances.attention(q, s.keys, s.values).atol * np.sqrt(20)
        assert (np.linalg.norm(got.out - expected.out, axis=-1) < allowed).all()
        for h in range(2):
            for i in range(2):
                rows = expected.sampled[h][i]
                assert got.stats.verified[3 * h : 3 * h + 3, i].tolist() == [rows is not None] * 3
                everything += rows is None
                grown += expected.sizes[h, i] > reference.PILOT
                if rows is not None:
                    assert len(np.setxor1d(got.stats.selected[h][i], rows)) <= 0.01 * len(rows)
    assert grown and everything


def test_the_random_numbers_are_even():
    of = reference.key(5, 17, 3)
    numbers = reference.uniforms(of, np.arange(200_000))
    counts = np.histogram(numbers, 64, (0, 1))[0]
    assert ((counts - 3125) ** 2 / 3125).sum() < 120  # chi-squared with 63 degrees of freedom
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.01
    other = reference.uniforms(reference.key(5, 18, 3), np.arange(200_000))
    assert abs(np.corrcoef(numbers, other)[0, 1]) < 0.01
    low = np.bincount(reference.hashes(of, np.arange(200_000)) % np.uint32(32), minlength=32)
    assert ((low - 6250) ** 2 / 6250).sum() < 70


def test_no_bias_and_an_honest_error(rng):
    """Over seeds, the mean is exact attention, and the errors are as large as they are said to be."""
    s = store(rng, 1, COUNT, 32, 20, dtype=BF16)
    index = la.index.Signatures(s)
    q = queries(rng, 4, dim=32)
    exact, exact_lse = la.attention(q, s.keys, s.values, causal=True, return_lse=True)
    seeds = 300
    results = [
        la.retrieval_attention(q, s, index, epsilon=0.9, relative_to="values", seed=seed, **CALL)
        for seed in range(seeds)
    ]
    errors = np.stack([result.out[:, 0] for result in results]) - exact[:, 0]
    squares = (errors**2).sum(axis=-1)
    norm = np.sqrt((np.asarray(s.values[0], np.float64) ** 2).sum(axis=-1).mean())
    claimed = np.stack([result.stats.error_estimate[:, 0] for result in results]) * norm
    assert (claimed > 0).all()
    np.testing.assert_allclose(np.sqrt(squares.mean(axis=0)), np.sqrt((claimed**2).mean(axis=0)), rtol=0.1)
    # The norm of a mean of `seeds` errors, which is about 1 / sqrt(seeds) of one.
    assert (np.linalg.norm(errors.mean(axis=0), axis=-1) < 1.5 * np.sqrt(squares.mean(axis=0) / seeds)).all()
    lse = np.stack([result.lse[:, 0] for result in results]) - exact_lse[:, 0]
    assert (np.abs(lse.mean(axis=0)) < 4 * lse.std(axis=0) / np.sqrt(seeds) + 1e-4).all()
    estimate = la.retrieval_attention(q, s, index, top_k=1, **CALL)
    assert (np.linalg.norm(estimate.out - exact, axis=-1)[:, 0] > np.linalg.norm(errors.mean(axis=0), axis=-1)).all()


LENGTH = 16_384
SETS = [("synthetic", "0"), ("synthetic-flat", "1"), ("synthetic-sharp", "2"), ("minilm", "2.5"), ("minilm", "0.3")]
SETS += [("lm", "3.0"), ("lm", "4.1")]


@pytest.mark.parametrize(("name", "head"), SETS)
def test_violations_are_rare(name, head):
    """No more outputs than `delta` are off by more than `epsilon`, on every set of vectors that is at hand."""
    try:
        made = vectors.load(name, length=LENGTH, groups=40, heads=[head])
    except FileNotFoundError as error:
        pytest.skip(str(error))
    s = store_of(made.keys, made.values, BF16)
    index = la.index.Signatures(s)
    keys, values = (np.asarray(x[0], np.float64) for x in (s.keys, s.values))
    q = np.ascontiguousarray(made.queries.reshape(-1, made.group, made.head_dim)).astype(F32)
    logits = q.astype(np.float64) @ keys.T * made.head_dim**-0.5
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    exact = weights @ values / weights.sum(axis=-1, keepdims=True)
    norms = {"output": np.linalg.norm(exact, axis=-1), "values": np.sqrt((values**2).sum(axis=-1).mean())}
    budgets = [("output", 0.1), ("output", 0.2), ("values", 0.02), ("values", 0.05)]
    for relative_to, epsilon in budgets:
        for delta in (0.05, 0.01):
            mode = {"epsilon": epsilon, "delta": delta, "relative_to": relative_to, "seed": 1}
            results = [la.retrieval_attention(x[:, None], s, index, **mode, **CALL) for x in q]
            errors = np.linalg.norm(np.stack([r.out[:, 0] for r in results]) - exact, axis=-1)
            violated = errors > epsilon * norms[relative_to]
            assert violated.mean() <= delta, (mode, violated.mean())
            verified = np.stack([r.stats.verified[:, 0] for r in results])
            read = np.stack([r.stats.keys_attended[0, 0] for r in results])
            assert ((read == LENGTH) | verified[:, 0]).all()


@pytest.fixture(scope="module")
def read_by_the_small_model():
    """Stores of the demo model's full layers after a text, and the queries of the text's last rows."""
    length, asked = 8192, 384
    model = runner.Model()
    session = runner.Session(model, length)
    tokens = text.haystack(length, 12, seed=7).tokens
    last = {}

    def attend(layer, q, layer_store):
        last[layer] = q.copy()
        return la.attention(q, layer_store.keys, layer_store.values, causal=True)

    for start, end in itertools.pairwise([*range(0, length - asked, 1952), length]):
        session.forward(tokens[start:end], attend)
    return [(session.stores[layer], np.ascontiguousarray(q[:, -asked:])) for layer, q in last.items()]


@pytest.mark.parametrize("delta", [0.05, 0.01])
@pytest.mark.parametrize(("relative_to", "epsilon"), [("output", 0.2), ("values", 0.05)])
def test_violations_over_thousands_of_real_queries(read_by_the_small_model, relative_to, epsilon, delta):
    """A model that is always at hand reads a text: of all its outputs no more than `delta` are off by `epsilon`."""
    violated, verified = [], []
    for layer_store, q in read_by_the_small_model:
        index = la.index.Signatures(layer_store)
        mode = {"epsilon": epsilon, "delta": delta, "relative_to": relative_to, "seed": 3}
        result = la.retrieval_attention(q, layer_store, index, **mode, **CALL)
        exact = la.attention(q.astype(F32), layer_store.keys, layer_store.values, causal=True)
        if relative_to == "output":
            norms = np.linalg.norm(exact, axis=-1)
        else:
            squares = (np.asarray(layer_store.values, np.float64) ** 2).sum(axis=-1).mean(axis=-1)
            norms = np.sqrt(squares).repeat(len(q) // len(squares))[:, None]
        errors = np.linalg.norm(np.asarray(result.out, np.float64) - exact, axis=-1)
        violated.append((errors > epsilon * norms).ravel())
        verified.append(result.stats.verified.ravel())
    outputs = np.concatenate(violated)
    assert len(outputs) >= 2000
    assert outputs.mean() <= delta
    # A good part was sampled, not read whole.
    assert np.concatenate(verified).mean() > 0.1


def test_everything_is_read_where_a_sample_is_too_small(rng, isa):
    """Tiny epsilon, few candidates, codes that weigh badly: exact attention, and the statistics say so."""
    s = store(rng, 2, 5000, 32, 20, dtype=BF16)
    q, sink_logits = queries(rng, 4, dim=32), normal(rng, (4,), spread=3.0)
    out, lse = la.attention(q, s.keys, s.values, causal=True, sinks=sink_logits, return_lse=True)
    for relative_to in ("output", "values"):
        result = verified_sparse_attention(
            q, s, la.index.Signatures(s), epsilon=1e-3, relative_to=relative_to, sink_logits=sink_logits, **CALL
        )
        tolerances.same_storage(q, s.keys, s.values).check(result.out, out, result.lse, lse)
        stats = result.stats
        assert not stats.verified.any() and (stats.keys_attended == 5000).all() and stats.fraction_attended == 1
        assert (stats.keys_sampled == 0).all() and (stats.error_estimate == 0).all() and (stats.missed_mass == 0).all()
    for short in (2000, 600, 100, 1):
        s.truncate(short)
        result = verified_sparse_attention(q, s, la.index.Signatures(s), epsilon=0.9, **CALL)
        exact = la.attention(q, s.keys, s.values, causal=True)
        tolerances.same_storage(q, s.keys, s.values).check(result.out, exact)
        assert not result.stats.verified.any() and (result.stats.keys_attended == short).all()


def test_codes_that_weigh_badly_are_not_trusted(rng):
    """With 1 bit and long queries no sample could promise anything."""
    s = store(rng, 1, COUNT, 32, 20)
    q = queries(rng, 2, dim=32, spread=6.0)
    exact = la.attention(q, s.keys, s.values, causal=True)
    result = verified_sparse_attention(q, s, la.index.Signatures(s, bits=1), epsilon=0.1, **CALL)
    assert not result.stats.verified.any()
    np.testing.assert_allclose(result.out, exact, atol=1e-4)


@pytest.mark.parametrize("scale", [4.0, 8.0, 20.0, 100.0])
def test_logits_that_codes_miss_by_far(scale):
    """Estimates that err by 15 to some hundred nats promise nothing and spoil nothing."""
    for seed in range(6):
        rng = np.random.default_rng(seed)
        s = store(rng, 2, 9000, 16, 8)
        q, index = queries(rng, 4, dim=16), la.index.Signatures(s, bits=1)
        exact = la.attention(q, s.keys, s.values, causal=True, scale=scale)
        norm = np.sqrt(np.square(np.asarray(s.values, np.float64)).sum(-1).mean(-1)).repeat(2)
        call = {"scale": scale, "window": 8, "relative_to": "values", "seed": seed}
        found = la.retrieval_attention(q, s, index, epsilon=0.1, delta=0.05, **call)
        error = np.linalg.norm(found.out - exact, axis=-1)[..., 0] / norm
        assert (error <= 0.1).all(), (error, found.stats.verified)
        sampled = la.retrieval_attention(q, s, index, scale=scale, window=8, top_k=60, rest="sampled")
        assert np.isfinite(sampled.out).all() and np.isfinite(sampled.lse).all()
        if scale >= 8.0:
            np.testing.assert_allclose(sampled.out, exact, rtol=1e-4, atol=1e-4)
            assert (sampled.stats.keys_attended == len(s)).all() and not found.stats.verified.any()


def test_degenerate_stores(rng):
    """Equal keys, values of 0, values that are not finite."""
    keys, values = normal(rng, (1, COUNT, 32)), normal(rng, (1, COUNT, 20))
    q = queries(rng, 2, dim=32)
    same = store_of(np.broadcast_to(keys[:, :1], keys.shape).copy(), values)
    for mode in ({"epsilon": 0.2, "relative_to": "values"}, {"rest": "sampled", "top_k": 500}):
        result = la.retrieval_attention(q, same, la.index.Signatures(same), **mode, **CALL)
        assert np.linalg.norm(result.out - values.mean(axis=1, keepdims=True), axis=-1).max() < 0.2 * np.sqrt(20)
        assert (result.stats.keys_sampled < 2048).all() and (result.stats.keys_sampled > 0).all()
    zero = store_of(keys, np.zeros_like(values))
    for mode in ({"epsilon": 0.1}, {"epsilon": 0.1, "relative_to": "values"}, {"rest": "sampled", "top_k": 500}):
        assert (la.retrieval_attention(q, zero, la.index.Signatures(zero), **mode, **CALL).out == 0).all()
    values[0, 5000] = np.nan
    odd = store_of(keys, values)
    result = verified_sparse_attention(q, odd, la.index.Signatures(odd), **CALL)
    assert np.isnan(result.out).all() and not result.stats.verified.any()


def test_samples_grow_and_keep_their_rows(rng):
    s = store(rng, 2, COUNT, 32, 20)
    index = la.index.Signatures(s)
    q = queries(rng, 4, dim=32)
    last = [np.zeros(0, np.uint32)] * 2
    sizes = []
    for epsilon in (0.5, 0.03, 0.02):
        result = verified_sparse_attention(
            q, s, index, epsilon=epsilon, relative_to="values", return_selected=True, **CALL
        )
        assert result.stats.verified.all()
        for h in range(2):
            assert np.isin(last[h], result.stats.selected[h][0]).all()
            last[h] = result.stats.selected[h][0]
        sizes.append(len(last[0]))
    assert sizes[0] < sizes[1] < sizes[2]
    other = verified_sparse_attention(
        q, s, index, epsilon=0.5, relative_to="values", seed=1, return_selected=True, **CALL
    )
    assert not np.isin(other.stats.selected[0][0], last[0]).all()
    assert not np.array_equal(*(other.stats.selected[h][0] for h in range(2)))


@pytest.mark.parametrize(
    "mode", [{"epsilon": 0.05, "relative_to": "values"}, {"rest": "sampled", "top_k": 3000}], ids=str
)
def test_threads_and_positions_change_nothing(rng, mode):
    """One position of one head, or many: the same bits, on any number of threads and as steps of one each."""
    s = store(rng, 2, COUNT, 32, 20)
    index = la.index.Signatures(s)
    index.update()
    q = queries(rng, 4, 6, dim=32)
    results = on_threads(
        lambda: la.retrieval_attention(q, s, index, return_selected=True, **mode, **CALL), (1, 2, 3, 16)
    )
    for result in results[1:]:
        np.testing.assert_array_equal(result.out, results[0].out)
        np.testing.assert_array_equal(result.lse, results[0].lse)
        for name in ("error_estimate", "verified", "keys_sampled", "missed_mass"):
            np.testing.assert_array_equal(getattr(result.stats, name), getattr(results[0].stats, name))
    last = la.retrieval_attention(q[:, -1:], s, index, return_selected=True, **mode, **CALL)
    np.testing.assert_array_equal(last.out, results[0].out[:, -1:])
    for h in range(2):
        np.testing.assert_array_equal(last.stats.selected[h][0], results[0].stats.selected[h][5])


@pytest.mark.parametrize(
    "mode", [{"epsilon": 0.05, "relative_to": "values"}, {"rest": "sampled", "top_k": 3000}], ids=str
)
def test_instruction_sets_agree(rng, isa, mode):
    s = store(rng, 2, COUNT, 33, 21)
    index = la.index.Signatures(s)
    q = queries(rng, 10, dim=33)
    got = la.retrieval_attention(q, s, index, return_selected=True, **mode, **CALL)
    _core.set_isa("scalar")
    scalar = la.retrieval_attention(q, s, index, return_selected=True, **mode, **CALL)
    for h in range(2):
        rows, others = got.stats.selected[h][0], scalar.stats.selected[h][0]
        assert len(np.setxor1d(rows, others)) <= 0.01 * len(rows)
    distance = np.linalg.norm(got.out - scalar.out, axis=-1)
    assert (distance <= 0.1 * scalar.stats.error_estimate * np.sqrt(21 * 1.09)).all()


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_a_sample_repairs_a_biased_estimate(rng, bits):
    """Where values follow their keys, the mean value of a cluster is not what its rows add up to."""
    keys = normal(rng, (1, COUNT, 32))
    s = store_of(keys, keys.copy())
    index = la.index.Signatures(s, bits=bits)
    q = queries(rng, 4, 8, dim=32, spread=1.0)
    exact = la.attention(q, s.keys, s.values, causal=True)
    errors = {}
    for rest in ("none", "values", "sampled"):
        result = la.retrieval_attention(q, s, index, top_k=400, rest=rest, **CALL)
        assert (result.stats.keys_attended <= 400 + 80 + WINDOW + SINKS + 16).all()
        errors[rest] = np.linalg.norm(result.out - exact, axis=-1).mean()
    assert errors["sampled"] < 0.8 * errors["values"] < 0.8 * errors["none"]


def test_statistics(rng):
    s = store(rng, 2, COUNT, 32, 20)
    q = queries(rng, 6, 3, dim=32)
    stats = verified_sparse_attention(q, s, la.index.Signatures(s), epsilon=0.3, relative_to="values", **CALL).stats
    assert stats.keys_sampled.shape == (2, 3) and stats.keys_sampled.dtype == np.int64
    assert stats.error_estimate.shape == stats.verified.shape == stats.missed_mass.shape == (6, 3)
    assert stats.verified.dtype == bool and stats.verified.all()
    assert (stats.error_estimate > 0).all() and (stats.error_estimate < 0.3).all()
    assert (stats.missed_mass_bound == 1).all() and (stats.index_bytes > 0).all()
    plain = la.retrieval_attention(q, s, la.index.Signatures(s), **CALL).stats
    assert np.isnan(plain.error_estimate).all() and not plain.verified.any() and (plain.keys_sampled == 0).all()
    whole = la.retrieval_attention(q, s, la.index.Signatures(s), top_k=COUNT, **CALL).stats
    assert (whole.error_estimate == 0).all()


RNG = np.random.default_rng(0)
STORE = store(RNG, 2, 600, 16, 8)
INDEX = la.index.Signatures(STORE)
HASHED = la.index.Hashes(STORE, normal(RNG, (2, 16, 32)))
Q = queries(RNG, 4, 3, 16)

BAD = [
    ({"epsilon": 0.0}, ValueError, "epsilon: got 0.0, expected a number between 0 and 1"),
    ({"epsilon": 1}, ValueError, "epsilon: got 1"),
    ({"epsilon": -0.1}, ValueError, "epsilon: got -0.1"),
    ({"epsilon": 1e-60}, ValueError, "epsilon: got 1e-60"),
    ({"epsilon": float("nan")}, ValueError, "epsilon: got nan"),
    ({"epsilon": "0.1"}, TypeError, "epsilon: got '0.1', expected a number"),
    ({"epsilon": True}, TypeError, "epsilon: got True"),
    ({"epsilon": 0.1, "delta": 0.0}, ValueError, "delta: got 0.0, expected a number between 0 and 1"),
    ({"epsilon": 0.1, "delta": 1.0}, ValueError, "delta: got 1.0"),
    ({"epsilon": 0.1, "delta": 1e-30}, ValueError, "delta: got 1e-30"),
    ({"epsilon": 0.1, "delta": "5 %"}, TypeError, "delta: got '5 %'"),
    ({"epsilon": 0.1, "relative_to": "keys"}, ValueError, "relative_to: got 'keys', expected 'output', "),
    ({"epsilon": 0.1, "top_k": 5}, ValueError, "epsilon: got 0.1 beside top_k=5, expected epsilon alone"),
    ({"epsilon": 0.1, "top_p": 0.5}, ValueError, "epsilon: got 0.1 beside top_p=0.5"),
    ({"epsilon": 0.1, "rest": "none"}, ValueError, "epsilon: got 0.1 beside rest='none'"),
    ({"epsilon": 0.1, "index": HASHED}, ValueError, "epsilon: got 0.1 with Hashes that weigh no single rows"),
    ({"delta": 0.1}, ValueError, "delta: got 0.1 without epsilon"),
    ({"relative_to": "values"}, ValueError, "relative_to: got 'values' without epsilon"),
    ({"rest": "sampled", "top_p": 0.5}, ValueError, "rest: got 'sampled' with top_p"),
    ({"rest": "sampled", "index": HASHED}, ValueError, "rest: got 'sampled' with Hashes that weigh no single rows"),
    ({"epsilon": 0.1, "seed": -1}, ValueError, "seed: got -1"),
    ({"epsilon": 0.1, "seed": 1 << 64}, ValueError, "seed: got"),
    ({"epsilon": 0.1, "seed": 1.5}, TypeError, "seed: got 1.5"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=lambda x: str(x)[:50])
def test_bad_inputs(change, error, message):
    call = {"index": INDEX} | change
    with pytest.raises(error, match=re.escape(message)):
        la.retrieval_attention(Q, STORE, call.pop("index"), **call)
