"""An index follows its store: appended, cut back, forked, and used while it grows."""

import threading

import numpy as np
import pytest

import longattn as la
import tolerances
from longattn.reference import retrieval as reference
from random_arrays import BF16, F32, normal
from random_stores import queries, rows, store_of

CALL = {"top_k": 40, "window": 48, "return_selected": True}


def fresh(s, like):
    return la.index.Signatures(s, bits=like.bits)


def same(a, b, values):
    """Two results for one query: the same rows, and the same numbers up to float32's rounding of the sums."""
    for h, of_head in enumerate(a.stats.selected):
        for i, picked in enumerate(of_head):
            np.testing.assert_array_equal(picked, b.stats.selected[h][i])
    np.testing.assert_allclose(a.out, b.out, atol=2e-5 * np.abs(values).max())
    np.testing.assert_allclose(a.lse, b.lse, atol=2e-5)
    np.testing.assert_allclose(a.stats.missed_mass, b.stats.missed_mass, atol=1e-5)


def check_rows(q, s, index, **change):
    """Whatever the codes are, the rows read are exact and the bound holds."""
    call = CALL | change
    result = la.retrieval_attention(q, s, index, rest="none", **call)
    oracle = reference.attention(q, s.keys, s.values, result.stats.selected, len(index), window=call["window"])
    tolerances.attention(q, s.keys, s.values).check(result.out, oracle.out, result.lse, oracle.lse)
    assert (result.stats.missed_mass_bound >= oracle.missed_mass - 1e-6).all()
    np.testing.assert_allclose(result.stats.missed_mass, oracle.missed_mass, atol=[0, 0.2, 0.1, 0, 0.03][index.bits])
    return result


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("chunks", [(1,) * 40, (15, 1, 16, 17, 300), (700,), (0, 3, 0, 600)], ids=lambda c: str(c[:5]))
def test_appending_equals_coding_at_once(rng, isa, bits, chunks):
    """The fit is that of the first 800 rows in both: the codes of later rows do not depend on how they came."""
    keys, values = rows(rng, 2, 800 + sum(chunks))
    s, once = (store_of(keys[:, :800], values[:, :800]) for _ in range(2))
    index, other = la.index.Signatures(s, bits=bits), la.index.Signatures(once, bits=bits)
    other.update()
    once.append(keys[:, 800:], values[:, 800:])
    q = queries(rng)
    index.update()
    at = 800
    for chunk in chunks:
        s.append(keys[:, at : at + chunk], values[:, at : at + chunk])
        at += chunk
        result = la.retrieval_attention(q, s, index, **CALL)
        assert len(index) == at // 16 * 16
    same(result, la.retrieval_attention(q, once, other, **CALL), values)
    np.testing.assert_allclose(index.sigma(), other.sigma(), rtol=1e-6)
    check_rows(q, s, index)


def test_fourfold_growth_fits_anew(rng):
    keys, values = rows(rng, 2, 2112)
    keys[:, 520:] += 6 * normal(rng, (2, 1, 32))  # the mean key moves
    s = store_of(keys[:, :520], values[:, :520])
    index = la.index.Signatures(s, bits=2)
    index.update()
    s.append(keys[:, 520:2047], values[:, 520:2047])
    index.update()
    old = index.sigma()
    assert len(index) == 2032
    s.append(keys[:, 2047:], values[:, 2047:])  # 2112 rows are more than 4 * 512
    q = queries(rng)
    result = la.retrieval_attention(q, s, index, **CALL)
    assert (index.sigma() < 0.8 * old).all()
    at_once = fresh(s, index)
    same(result, la.retrieval_attention(q, s, at_once, **CALL), values)
    np.testing.assert_array_equal(index.sigma(), at_once.sigma())


@pytest.mark.parametrize("bits", [1, 4])
def test_truncate(rng, isa, bits):
    """Cut above, at and below the coded rows and the fitted ones, then grown again with other rows."""
    keys, values = rows(rng, 2, 3000)
    s = store_of(keys[:, :1000], values[:, :1000])
    index = la.index.Signatures(s, bits=bits)
    index.update()
    s.append(keys[:, 1000:1500], values[:, 1000:1500])
    q = queries(rng)
    check_rows(q, s, index)
    at = 1500
    for cut in (1499, 1488, 1487, 1200, 1001, 992, 991, 700, 520, 511, 100, 0):
        s.truncate(cut)
        if cut:
            check_rows(q, s, index)
        count = max(60, 530 - cut)
        s.append(keys[:, at : at + count], values[:, at : at + count])
        at = (at + count) % 2400
        check_rows(q, s, index)
        assert len(index) == (0 if len(s) < 512 else len(s) // 16 * 16)
    at_once = fresh(s, index)  # the last cut was below the fit: nothing of old is left
    same(la.retrieval_attention(q, s, index, **CALL), la.retrieval_attention(q, s, at_once, **CALL), values)


def test_truncate_unseen_by_the_index(rng):
    """Rows that were replaced between two uses are coded anew, though the length is the same."""
    keys, values = rows(rng, 2, 1200)
    other_k, other_v = rows(rng, 2, 400, offset=3.0)
    q = queries(rng)
    for keep in (1000, 800):
        s = store_of(keys[:, :900], values[:, :900])
        index = la.index.Signatures(s)
        index.update()
        s.append(keys[:, 900:], values[:, 900:])
        stale = check_rows(q, s, index)
        s.truncate(keep + 100)
        s.truncate(keep)
        s.append(other_k[:, : 1200 - keep], other_v[:, : 1200 - keep])
        result = check_rows(q, s, index)
        assert any(
            not np.array_equal(a, b)
            for head_a, head_b in zip(stale.stats.selected, result.stats.selected, strict=True)
            for a, b in zip(head_a, head_b, strict=True)
        )
        # The rows found are those that the new keys deserve.
        for h in range(2):
            weights = np.exp((q[2 * h : 2 * h + 2, 0] @ s.keys[h].T).astype(np.float64) * 32**-0.5)
            mean = (weights / weights.sum(-1, keepdims=True)).mean(0)[4 : 1200 - 48]
            assert mean[result.stats.selected[h][0] - 4].sum() > 0.9 * np.sort(mean)[-40:].sum()


def test_many_small_truncates_leave_the_errors_as_they_are(rng):
    """Speculative decoding: a block is appended and dropped again and again."""
    keys, values = rows(rng, 1, 1040)
    s = store_of(keys[:, :1024], values[:, :1024])
    index = la.index.Signatures(s, bits=1)
    index.update()
    before = index.sigma()
    for _ in range(300):
        s.append(keys[:, 1024:], values[:, 1024:])
        index.update()
        s.truncate(1024)
    index.update()
    np.testing.assert_allclose(index.sigma(), before, rtol=0.1)
    assert len(index) == 1024


def test_fork(rng):
    """A fork is another store: an index belongs to one of the two, and neither sees the other's rows."""
    keys, values = rows(rng, 2, 1000)
    s = store_of(keys, values, BF16)
    index = la.index.Signatures(s)
    q = queries(rng, dtype=BF16)
    before = la.retrieval_attention(q, s, index, **CALL)
    copy = s.fork()
    with pytest.raises(ValueError, match="index: got the index of another store"):
        la.retrieval_attention(q, copy, index, **CALL)
    of_copy = fresh(copy, index)
    np.testing.assert_array_equal(la.retrieval_attention(q, copy, of_copy, **CALL).out, before.out)
    copy.append(*rows(rng, 2, 100))
    copy.truncate(900)
    check_rows(q, copy, of_copy)
    np.testing.assert_array_equal(la.retrieval_attention(q, s, index, **CALL).out, before.out)


def test_hash_codes_grow_and_shrink(rng):
    keys = rng.integers(-3, 4, (1, 1500, 16)).astype(np.float32)
    values = normal(rng, (1, 1500, 16))
    weights = rng.integers(-2, 3, (1, 16, 64)).astype(np.float32)
    q = rng.integers(-3, 4, (2, 1, 16)).astype(np.float32)
    s = store_of(keys[:, :600], values[:, :600])
    index = la.index.Hashes(s, weights, use_norm=True)
    for at, cut in ((600, 300), (1100, 1000), (1500, 0), (800, 800)):
        if at > len(s):
            s.append(keys[:, len(s) : at], values[:, len(s) : at])
        result = la.retrieval_attention(q, s, index, scale=0.125, **CALL)
        oracle = reference.hata_topk_attention(
            q, s.keys, s.values, weights, top_k=40, window=48, use_norm=True, scale=0.125, coded=len(index)
        )
        np.testing.assert_array_equal(result.stats.selected[0][0], oracle.selected[0][0])
        s.truncate(cut)
        keys = np.roll(keys, 7, axis=1)


def test_attention_while_another_thread_appends_and_truncates(rng):
    """Every call sees one moment of the store: its statistics and numbers fit some length that the store had."""
    keys, values = rows(rng, 1, 6000, 16)
    s = store_of(keys[:, :600], values[:, :600])
    index = la.index.Signatures(s, bits=2)
    q = queries(rng, 2, 1, 16)
    done = threading.Event()
    failed = []

    def write():
        try:
            for cut in (3000, 900, 2000, 5000):
                while len(s) < cut + 900:
                    n = len(s)
                    s.append(keys[:, n : n + 37], values[:, n : n + 37])
                s.truncate(cut)
        except BaseException as error:
            failed.append(error)
        finally:
            done.set()

    writer = threading.Thread(target=write)
    writer.start()
    calls = []
    while not done.is_set() or len(calls) < 3:
        calls.append(la.retrieval_attention(q, s, index, rest="none", top_k=30, window=64, return_selected=True))
    writer.join()
    assert not failed
    # Rows are always the same at the same place, so the length tells all that a call saw.
    for result in calls[:: max(1, len(calls) // 40)]:
        total = int(result.stats.keys_total[0, 0])
        oracle = reference.attention(
            q, keys[:, :total], values[:, :total], result.stats.selected, total // 16 * 16, window=64
        )
        tolerances.attention(q, keys, values).check(result.out, oracle.out, result.lse, oracle.lse)


def test_update_while_another_thread_attends(rng):
    """Readers of an index wait for its growth and then see all of it."""
    keys, values = rows(rng, 2, 5000)
    s = store_of(keys[:, :1000], values[:, :1000])
    index = la.index.Signatures(s)
    q = queries(rng)
    failed = []

    def attend():
        try:
            for _ in range(20):
                result = la.retrieval_attention(q, s, index, top_k=5000, rest="none")
                total = int(result.stats.keys_total[0, 0])
                expected = la.attention(q, keys[:, :total], values[:, :total])
                np.testing.assert_allclose(result.out, expected, rtol=1e-4, atol=1e-5)
        except BaseException as error:
            failed.append(error)

    readers = [threading.Thread(target=attend) for _ in range(3)]
    for reader in readers:
        reader.start()
    for at in range(1000, 5000, 100):
        s.append(keys[:, at : at + 100], values[:, at : at + 100])
        index.update()
        assert len(index) >= (at + 100) // 16 * 16
    for reader in readers:
        reader.join()
    assert not failed, failed


def test_storage_dtypes_grow_alike(rng):
    keys, values = rows(rng, 1, 1300)
    q = queries(rng, 2)
    for dtype in (F32, BF16):
        s = store_of(keys[:, :700], values[:, :700], dtype)
        index = la.index.Signatures(s)
        index.update()
        s.append(keys[:, 700:], values[:, 700:])
        check_rows(q, s, index)
