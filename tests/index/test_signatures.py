"""Codes of keys against their specification, what an index costs, and what it refuses."""

import gc
import json
import re
import sys

import numpy as np
import pytest

import longattn as la
from longattn.reference import retrieval as reference
from random_arrays import BF16, DTYPES
from random_stores import queries, rows, store, store_of
from resident import resident


@pytest.mark.parametrize("seed", [0, 1, 2**64 - 1])
def test_reference_rotation(seed):
    matrix = reference.rotation(24, seed)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(24), atol=1e-12)
    assert abs(matrix).max() < 0.9


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_reference_codes_are_unbiased_over_rotations_and_spread_as_predicted(rng, bits):
    keys, q = rng.standard_normal((40, 32)), rng.standard_normal(32)
    truth = keys @ q
    z = []
    for seed in range(60):
        codes = reference.encode(keys, bits, seed)
        z.append((reference.estimate(q, codes) - truth) / (codes.deviations * np.linalg.norm(q)))
    z = np.array(z)
    # Keys of one rotation share part of their error, rotations share none.
    assert abs(z.mean()) < 4 * z.mean(axis=1).std() / 60**0.5
    assert 0.9 < np.sqrt((z**2).mean()) < 1.1
    assert abs(z).max() < 5.5


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_reference_codes_are_the_nearest_points(rng, bits):
    """No grid point beats the chosen one by much: the steps that are tried are close enough together."""
    x = rng.standard_normal((50, 16))
    codes = reference.encode(x, bits)
    turned = (x - codes.centre) @ codes.rotation.T
    chosen = (codes.points * turned).sum(-1) / np.linalg.norm(codes.points, axis=-1) / np.linalg.norm(turned, axis=-1)
    top = (2**bits - 1) / 2
    best = np.zeros(50)
    for step in np.geomspace(0.05, 5, 400):
        scaled = turned / np.sqrt((turned**2).mean(-1, keepdims=True)) / step
        points = np.clip(np.round(scaled - 0.5) + 0.5, -top, top)
        cosine = (points * turned).sum(-1) / np.linalg.norm(points, axis=-1) / np.linalg.norm(turned, axis=-1)
        best = np.maximum(best, cosine)
    assert (chosen <= best + 1e-12).all()
    assert (1 - chosen).mean() <= {1: 1.0 + 1e-9, 2: 1.03, 4: 1.15}[bits] * (1 - best).mean()


#: (head_dim, rows)
WIDTHS = [(1, 520), (3, 600), (20, 1000), (64, 1024), (128, 530), (200, 512)]


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize(("dim", "count"), WIDTHS)
def test_codes_follow_the_reference(rng, isa, bits, dim, count):
    """The errors of the codes, the rows they rank first, and the mass they say is missed."""
    s = store(rng, 2, count, dim, 8, dtype=BF16)
    index = la.index.Signatures(s, bits=bits, seed=5)
    q = queries(rng, 2, 1, dim)
    call = {"top_k": 40, "sinks": 4, "window": 32}
    result = la.retrieval_attention(q, s, index, return_selected=True, **call)
    coded = count // 16 * 16
    assert len(index) == coded
    oracle = reference.attention(q, s.keys, s.values, result.stats.selected, coded, sinks=4, window=32)
    among = reference.candidates(count, coded, 4, 32)
    for h in range(2):
        codes = reference.encode(s.keys[h, :coded], bits, 5)
        np.testing.assert_allclose(index.sigma()[h], codes.sigma, rtol=2e-3, atol=2e-6)
        logits = reference.estimate(q[h, 0] * dim**-0.5, codes)[among]
        picked = result.stats.selected[h][0] - 4
        # The 40 largest, up to what factors in float16 and float32 sums round (a code may also tie).
        scale = np.abs(codes.factors).max() * np.linalg.norm(q[h]) * dim**-0.5 * 2**bits * dim**0.5
        assert logits[picked].min() >= np.sort(logits)[-40] - 2e-3 * scale
        norm = np.linalg.norm(q[h]) * dim**-0.5
        weights = reference.unread_log_weights(logits, codes.sigma * norm)
        unread = np.setdiff1d(np.arange(len(among)), picked)
        left = np.logaddexp.reduce(weights[unread])
        expected = 1 / (1 + np.exp(oracle.lse[h, 0] - left))
        np.testing.assert_allclose(result.stats.missed_mass[h, 0], expected, atol=5e-3)


def test_seeds_and_dtypes(rng, isa):
    """The same rows and seed give the same codes, another seed others; the store's dtype decides what is coded."""
    keys, values = rows(rng, 2, 700)
    q = queries(rng, 4)
    seen = []
    for seed in (0, 0, 1, 2**64 - 1):
        s = store_of(keys, values)
        result = la.retrieval_attention(q, s, la.index.Signatures(s, bits=1, seed=seed), top_k=40, window=16)
        seen.append(result.out)
    np.testing.assert_array_equal(seen[0], seen[1])
    assert not np.array_equal(seen[0], seen[2]) and not np.array_equal(seen[2], seen[3])
    sigmas = []
    for dtype in DTYPES:
        index = la.index.Signatures(store_of(keys, values, dtype))
        index.update()
        sigmas.append(index.sigma())
    np.testing.assert_allclose(sigmas[1:], sigmas[:1] * 2, rtol=1e-2)


def test_more_bits_err_less(rng):
    s = store(rng, 2, 2000, 64)
    sigmas = []
    for bits in (1, 2, 4):
        index = la.index.Signatures(s, bits=bits)
        assert index.sigma().shape == (0,)
        index.update()
        sigmas.append(index.sigma())
    assert (sigmas[0] > 1.8 * sigmas[1]).all() and (sigmas[1] > 2.5 * sigmas[2]).all()


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_memory_is_as_documented(rng, bits):
    s = store(rng, 2, 6000, 64)
    index = la.index.Signatures(s, bits=bits)
    matrices = index.nbytes
    assert matrices == 4 * 64 * 64
    index.update()
    rows_bytes = 2 * 6000 * (bits * 8 + 3)
    clusters = 2 * 187 * 64 * 4  # one number per cluster and column; a few of them are kept
    assert rows_bytes + 2 * clusters <= index.nbytes - matrices <= rows_bytes + 8 * clusters
    assert len(index) == 6000
    assert repr(index) == f"Signatures(bits={bits}, seed=0, rows=6000, nbytes={index.nbytes})"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_million_tokens_stay_within_memory_computed_beforehand(rng):
    heads, dim, rows_, chunk, bits = 2, 32, 1_000_000, 50_000, 4
    s = la.KVStore(heads, dim, dtype="bfloat16", capacity=1 << 20)
    k, v = rng.standard_normal((2, heads, chunk, dim), dtype=np.float32).astype(s.dtype)
    index = la.index.Signatures(s, bits=bits)
    gc.collect()
    before = resident()
    for _ in range(rows_ // chunk):
        s.append(k, v)
        index.update()
    codes = heads * rows_ * (bits * dim // 8 + 3)
    clusters = heads * 256 * (28 * dim + 8)
    assert len(index) == rows_
    assert codes <= index.nbytes <= codes + clusters + 4 * dim * dim + heads * dim * 4
    # Codes grow by an eighth at a time, 131,072 rows are coded at once, and clusters are fitted to a sample in float32.
    planned = s.nbytes + codes * 9 // 8 + heads * 131_072 * (bits * dim // 8 + 3) + clusters + heads * 16_384 * dim * 4
    assert resident() - before < planned + (32 << 20)


def test_an_index_waits_for_rows_worth_coding(rng):
    s = store(rng, count=511)
    index = la.index.Signatures(s)
    index.update()
    assert len(index) == 0 and index.sigma().size == 0 and index.store is s and index.bits == 4
    s.append(*rows(rng, count=1))
    index.update()
    assert len(index) == 512
    for add, coded in ((15, 512), (1, 528), (33, 560)):
        s.append(*rows(rng, count=add))
        index.update()
        assert len(index) == coded


def test_widths_that_are_refused(rng):
    s = la.KVStore(1, 1025, 1, dtype="float32", capacity=16)
    with pytest.raises(ValueError, match="store: got head_dim 1025, expected at most 1024"):
        la.index.Signatures(s)


STORE = la.KVStore(2, 8, capacity=64)
W = np.ones((2, 8, 32), np.float32)

BAD = [
    ({"store": "store"}, TypeError, "store: got str, expected a KVStore"),
    ({"store": None}, TypeError, "store: got NoneType"),
    ({"bits": 3}, ValueError, "bits: got 3, expected 1, 2 or 4"),
    ({"bits": 0}, ValueError, "bits: got 0"),
    ({"bits": 8}, ValueError, "bits: got 8"),
    ({"bits": -1}, ValueError, "bits: got -1"),
    ({"bits": 4.0}, TypeError, "bits: got 4.0, expected an integer"),
    ({"bits": True}, TypeError, "bits: got True, expected an integer"),
    ({"bits": "4"}, TypeError, "bits: got '4'"),
    ({"seed": -1}, ValueError, "seed: got -1, expected 0 to"),
    ({"seed": 2**64}, ValueError, "seed: got 18446744073709551616"),
    ({"seed": 0.5}, TypeError, "seed: got 0.5, expected an integer"),
    ({"seed": None}, TypeError, "seed: got None"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=lambda x: re.sub(r"\s+", " ", str(x))[:50])
def test_bad_arguments(change, error, message):
    arguments = {"store": STORE} | change
    with pytest.raises(error, match=re.escape(message)):
        la.index.Signatures(**arguments)


def test_clusters_hold_rows_of_like_weight(rng, tmp_path):
    """Values of noise say nothing; rows of one key weigh alike and belong together."""
    kinds = rng.integers(0, 8, 4096)
    s = store_of(rows(rng, 1, 8, 32)[0][:, kinds], rows(rng, 1, 4096, 32)[1])
    index = la.index.Signatures(s)
    index.update()
    index.save(tmp_path / "index")
    data = (tmp_path / "index").read_bytes()
    size = int.from_bytes(data[:8], "little")
    start, end = json.loads(data[8 : 8 + size])["value_ids.0"]["data_offsets"]
    clusters = np.frombuffer(data[8 + size + start : 8 + size + end], np.uint8)
    alike = sum(np.bincount(kinds[clusters == c]).max() for c in np.unique(clusters))
    assert alike > 0.97 * len(kinds)
