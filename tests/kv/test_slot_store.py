"""`SlotStore`: heads keep rows of their own in slots; attention reads them where they lie."""

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tolerances
from longattn import _core
from longattn.kv import SlotStore
from longattn.reference.dense import attention
from random_arrays import BF16, DTYPES, F16, F32, LAYOUTS, lay, normal


class Model:
    """A store and lists of the rows that each head keeps."""

    def __init__(self, kv_heads=2, dim=16, value_dim=16, dtype=F32, slots=32):
        self.store = SlotStore(kv_heads, dim, value_dim, dtype, slots=slots)
        self.rows = [{} for _ in range(kv_heads)]
        self.folded = [[] for _ in range(kv_heads)]
        self.count = 0

    def append(self, k, v, keep=None, fold=False):
        slots = self.store.append(k, v, keep=keep, fold=fold)
        dtype = self.store.dtype
        for h in range(len(k)):
            for t in range(k.shape[1]):
                row = k[h, t].astype(dtype), v[h, t].astype(dtype)
                if keep is None or keep[h, t]:
                    self.rows[h][self.count + t] = row
                    assert self.store.positions[h, slots[h, t]] == self.count + t
                else:
                    assert slots[h, t] == -1
                    self.folded[h] += [row] * fold
        self.count += k.shape[1]

    def evict(self, wanted, fold=False):
        """Evicts the positions that each head wants gone."""
        positions = self.store.positions
        mask = np.array([np.isin(p, list(gone)) & (p >= 0) for p, gone in zip(positions, wanted, strict=True)])
        assert self.store.evict(mask, fold=fold) == [len(gone) for gone in wanted]
        for h, gone in enumerate(wanted):
            for position in sorted(gone):
                row = self.rows[h].pop(position)
                self.folded[h] += [row] * fold

    def expected(self, q, *, sinks=None, within=None, **options):
        """Output, lse and weights per head and row, by the reference."""
        heads, rows, _ = q.shape
        group = heads // len(self.rows)
        out = np.zeros((heads, rows, self.store.value_dim))
        lse, weights = np.zeros((heads, rows)), {}
        for h in range(heads):
            kept = self.rows[h // group]
            folded = self.folded[h // group]
            for r in range(rows):
                seen = [p for p in kept if p <= self.count - rows + r]
                seen = [p for p in seen if within is None or p in within[h // group]]
                k = [np.asarray(kept[p][0], np.float64) for p in seen]
                v = [np.asarray(kept[p][1], np.float64) for p in seen]
                bias = [0.0] * len(seen)
                if folded:
                    k.append(np.mean([np.asarray(row[0], np.float64) for row in folded], axis=0))
                    v.append(np.mean([np.asarray(row[1], np.float64) for row in folded], axis=0))
                    bias.append(np.log(len(folded)))
                k = np.reshape(k, (1, len(k), q.shape[2]))
                v = np.reshape(v, (1, len(v), self.store.value_dim))
                sink = None if sinks is None else sinks[h : h + 1]
                one = attention(
                    q[h : h + 1, r : r + 1], k, v, bias=np.array(bias)[None, None], sinks=sink, return_lse=True,
                    **options,
                )  # fmt: skip
                out[h, r], lse[h, r] = one[0][0, 0], one[1][0, 0]
                s = options.get("scale", q.shape[2] ** -0.5) * k[0] @ np.asarray(q[h, r], np.float64)
                if options.get("softcap"):
                    s = options["softcap"] * np.tanh(s / options["softcap"])
                for p, w in zip(seen, np.exp(s - lse[h, r]), strict=False):
                    weights[h, r, p] = w
        return out, lse, weights

    def check(self, q, *, reduce="sum", within=None, **options):
        mask = None
        if within is not None:
            mask = np.array([np.isin(p, list(w)) for p, w in zip(self.store.positions, within, strict=True)])
        got = self.store.attend(q, weights=reduce, within=mask, **options)
        out, lse, weights = self.expected(q, within=within, **options)
        every = [np.array([row[i] for rows in self.rows for row in rows.values()] or [np.zeros(1)]) for i in (0, 1)]
        offset = max(np.log(max(map(len, self.folded), default=1) or 1), np.abs(options.get("sinks", 0)).max())
        tolerances.attention(q, *every, scale=options.get("scale"), offset=offset).check(got.out, out, got.lse, lse)
        group = len(q) // len(self.rows)
        expected = np.zeros(got.weights.shape)
        for h, positions in enumerate(self.store.positions):
            for r in range(q.shape[1]):
                for slot, p in enumerate(positions):
                    mine = [weights[h * group + g, r, p] for g in range(group) if (h * group + g, r, p) in weights]
                    expected[h, r, slot] = getattr(np, reduce)(mine) if mine else 0.0
        tolerances.weights(q, every[0], scale=options.get("scale"), offset=offset).check_sums(
            got.weights, expected, np.abs(expected)
        )
        return got


def filled(rng, model, count=20):
    """Rows with gaps that differ by head, slots out of order."""
    heads, dim, value_dim = model.store.kv_heads, model.store.head_dim, model.store.value_dim

    def rows(n):
        return normal(rng, (heads, n, dim)), normal(rng, (heads, n, value_dim))

    model.append(*rows(count))
    model.evict([set(range(h, count, 3)) for h in range(heads)])
    model.append(*rows(5))
    model.append(*rows(1))
    return model


@pytest.mark.parametrize("reduce", ["max", "mean", "sum"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (6, 2), (20, 2), (3, 1)])
def test_attention_and_weights(rng, isa, *, heads, kv_heads, reduce):
    model = filled(rng, Model(kv_heads, dim=20, value_dim=12))
    model.check(normal(rng, (heads, 1, 20)), reduce=reduce)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("q_dtype", DTYPES, ids=str)
def test_dtypes(rng, isa, dtype, q_dtype):
    model = filled(rng, Model(dtype=dtype))
    model.check(normal(rng, (4, 1, 16), q_dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(rng, layout):
    model = Model(4)
    rows = [lay(normal(rng, (4, 9, 16)), layout) for _ in range(2)]
    model.append(*rows)
    model.check(lay(normal(rng, (8, 1, 16)), layout))


def test_several_queries_see_what_lies_before_them(rng, isa):
    model = filled(rng, Model())
    model.check(normal(rng, (4, 4, 16)))


def test_options(rng, isa):
    model = filled(rng, Model())
    q = normal(rng, (4, 2, 16), spread=3.0)
    model.check(q, scale=0.4, softcap=2.0, sinks=normal(rng, (4,)))
    within = [set(list(rows)[::2]) for rows in model.rows]
    got = model.check(q, within=within)
    assert (got.weights[..., 0] == 0).any()


@pytest.mark.parametrize("count", [1, 2, 7])
def test_mean_row_stands_in_for_so_many_copies(rng, isa, count):
    model = filled(rng, Model())
    gone = [set(list(rows)[:count]) for rows in model.rows]
    model.evict(gone, fold=True)
    model.check(normal(rng, (4, 1, 16)))
    model.check(normal(rng, (4, 2, 16)), softcap=1.5, sinks=normal(rng, (4,)))
    for h in range(2):
        key, value, folded = model.store.mean_row(h)
        assert folded == count
        np.testing.assert_allclose(key, np.mean([r[0] for r in model.folded[h]], axis=0, dtype=float), atol=1e-12)
        np.testing.assert_allclose(value, np.mean([r[1] for r in model.folded[h]], axis=0, dtype=float), atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_are_never_kept_are_folded_as_stored(rng, dtype):
    """Rows folded on their way in are those that would have been stored and evicted."""
    k, v = normal(rng, (2, 9, 16)), normal(rng, (2, 9, 16))
    keep = rng.random((2, 9)) < 0.5
    there, later = Model(dtype=dtype), Model(dtype=dtype)
    there.append(k, v, keep=keep, fold=True)
    later.append(k, v)
    later.evict([set(np.flatnonzero(~rows).tolist()) for rows in keep], fold=True)
    for h in range(2):
        for a, b in zip(there.store.mean_row(h), later.store.mean_row(h), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)
    q = normal(rng, (4, 1, 16))
    there.check(q)
    later.check(q)


def test_bias_and_logits(rng, isa):
    model = filled(rng, Model())
    q = normal(rng, (4, 1, 16), spread=2.0)
    bias = normal(rng, (2, 32), spread=4.0)
    plain = model.store.attend(q, logits_of=2)
    lowered = model.store.attend(q, bias=bias, logits_of=2)
    np.testing.assert_array_equal(plain.logits, lowered.logits)
    position = model.store.positions
    for h in range(2):
        slots = np.flatnonzero(position[h] >= 0)
        k = np.array([model.rows[h][p][0] for p in position[h, slots]], np.float64)
        v = np.array([model.rows[h][p][1] for p in position[h, slots]], np.float64)
        for g in range(2):
            s = 0.25 * k @ q[2 * h + g, 0].astype(float)
            if 2 * h + g == 2:
                np.testing.assert_allclose(plain.logits[0, slots], s, atol=1e-5)
            w = np.exp(s + bias[h, slots])
            expected = (w @ v / w.sum())[None, None]
            part = lowered.out[2 * h + g][None]
            tolerances.attention(q, k[None], v[None], offset=20).check(part, expected)
    assert not plain.logits[0, position[1] < 0].any()
    capped = model.store.attend(q, logits_of=2, softcap=0.5)
    np.testing.assert_allclose(capped.logits, 0.5 * np.tanh(plain.logits / 0.5), atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_of_stored_numbers(rng, isa, dtype):
    model = filled(rng, Model(dtype=dtype))
    q = normal(rng, (4, 2, 16), dtype, spread=2.0)
    got = model.store.attend(q, logits_of=1, scale=0.3).logits
    positions = model.store.positions[0]
    k = np.array([model.rows[0][p][0] if p >= 0 else np.zeros(16) for p in positions], np.float64)
    expected = 0.3 * q[1].astype(float) @ k.T
    expected[0, positions == model.count - 1] = 0
    np.testing.assert_allclose(got, expected, atol=2e-6 * np.abs(q.astype(float)).max() * 16)


def test_the_order_of_slots_does_not_matter(rng):
    """Rows that were put in again elsewhere give the same result up to rounding."""
    k, v = normal(rng, (2, 40, 16)), normal(rng, (2, 40, 16))
    straight, scattered = SlotStore(2, 16, dtype=F32, slots=50), SlotStore(2, 16, dtype=F32, slots=50)
    straight.append(k, v)
    scattered.append(k[:, ::-1].copy(), v[:, ::-1].copy())
    scattered.evict(np.isin(scattered.positions, [3, 30, 17]))
    for t in (36, 9, 22):
        scattered.append(k[:, t : t + 1], v[:, t : t + 1])
    q = normal(rng, (4, 1, 16))
    one, other = straight.attend(q), scattered.attend(q)
    tolerances.attention(q, k, v).check(other.out, one.out.astype(float), other.lse, one.lse.astype(float))


def test_long_lists_are_cut_and_threads_do_not_matter(rng, isa):
    model = Model(1, slots=6000)
    model.append(normal(rng, (1, 6000, 16)), normal(rng, (1, 6000, 16)))
    model.evict([set(range(0, 6000, 7))], fold=True)
    q = normal(rng, (3, 1, 16))
    results = []
    for threads in (1, 2):
        _core.set_num_threads(threads)
        results.append(model.store.attend(q, weights="max"))
    _core.set_num_threads(1)
    for field in ("out", "lse", "weights"):
        np.testing.assert_array_equal(getattr(results[0], field), getattr(results[1], field))
    model.check(q)


def test_an_empty_head_gives_zero(rng):
    store = SlotStore(1, 8, dtype=F32, slots=4)
    store.append(normal(rng, (1, 1, 8)), normal(rng, (1, 1, 8)), keep=np.zeros((1, 1), bool))
    got = store.attend(normal(rng, (2, 1, 8)), weights="max")
    assert not got.out.any() and (got.lse == -np.inf).all() and not got.weights.any()
    got = store.attend(normal(rng, (2, 0, 8)), weights="max")
    assert got.out.shape == (2, 0, 8) and got.weights.shape == (1, 0, 4)


def test_nan_in_what_is_gone_does_not_matter(rng):
    k, v = normal(rng, (1, 6, 8)), normal(rng, (1, 6, 8))
    k[0, 2], v[0, 2] = np.nan, np.nan
    store = SlotStore(1, 8, dtype=F32, slots=8)
    store.append(k, v)
    q = normal(rng, (2, 1, 8))
    assert np.isnan(store.attend(q).out).all()
    store.evict(store.positions == 2)
    assert np.isfinite(store.attend(q, weights="max").out).all()


def test_memory(rng):
    store = SlotStore(2, 64, dtype=BF16, slots=1 << 20)
    assert store.nbytes == store.live_bytes == 0
    store.append(normal(rng, (2, 10, 64)), normal(rng, (2, 10, 64)), keep=np.arange(20).reshape(2, 10) < 10)
    assert store.live_bytes == 10 * 2 * 64 * 2
    assert store.nbytes == 2 * 2**21, "a head without rows has no memory"
    store.evict(store.positions == 3, fold=True)
    assert store.live_bytes == 9 * 2 * 64 * 2 + 129 * 8
    store.clear()
    assert (store.appended, store.live, store.folded, store.live_bytes) == (0, [0, 0], [0, 0], 0)


@settings(max_examples=30)
@given(st.data())
def test_random_histories(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    model = Model(kv_heads=3, dim=8, value_dim=4, slots=12)
    for _ in range(data.draw(st.integers(1, 12))):
        free = 12 - max(map(len, model.rows))
        if free and data.draw(st.booleans()):
            count = data.draw(st.integers(1, min(free, 4)))
            keep = rng.random((3, count)) < 0.8 if data.draw(st.booleans()) else None
            fold = data.draw(st.booleans())
            model.append(normal(rng, (3, count, 8)), normal(rng, (3, count, 4)), keep, fold)
        else:
            model.evict([{p for p in rows if rng.random() < 0.3} for rows in model.rows], data.draw(st.booleans()))
        assert model.store.live == [len(rows) for rows in model.rows]
        assert [sorted(p[p >= 0].tolist()) for p in model.store.positions] == [sorted(r) for r in model.rows]
    if model.count:
        model.check(normal(rng, (6, 1, 8)))


def test_appends_and_reads_from_threads(rng):
    store = SlotStore(2, 16, dtype=F32, slots=2000)
    k = np.ones((2, 1, 16), np.float32)
    store.append(k, k)
    bad = []

    def read():
        for _ in range(100):
            out = store.attend(np.ones((4, 1, 16), np.float32)).out
            bad.extend(x for x in [np.abs(out - 1).max()] if x > 1e-5)

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(500):
        store.append(k, k)
    for thread in threads:
        thread.join()
    assert not bad and store.live == [501, 501]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda s, x: s.append(x[:1], x), ValueError, r"k: got shape \(1, 3, 16\), expected \(2, T, 16\)"),
        (lambda s, x: s.append(x, x[:, :2]), ValueError, "v: got 2 rows, expected as many as k has, 3"),
        (lambda s, x: s.append(x.astype(float), x), TypeError, "k: got dtype float64"),
        (lambda s, x: s.append(np.tile(x, (1, 2, 1)), np.tile(x, (1, 2, 1))), ValueError, "2 free slots of 5"),
        (lambda s, x: s.append(x, x, keep=np.ones(3, bool)), ValueError, r"keep: got shape \(3,\), expected \(2, 3\)"),
        (lambda s, x: s.append(x, x, keep=np.ones((2, 3))), TypeError, "keep: got dtype float64, expected bool"),
        (lambda s, x: s.append(x, x, fold=1), TypeError, "fold: got 1"),
        (lambda s, x: s.evict(np.ones((2, 5), bool)), ValueError, "slot 3 of head 0, which is free"),
        (lambda s, x: s.evict(np.ones((2, 4), bool)), ValueError, r"mask: got shape \(2, 4\), expected \(2, 5\)"),
        (lambda s, x: s.attend(x[0]), ValueError, "q: got shape"),
        (lambda s, x: s.attend(x[:, :, :8]), ValueError, "q: got shape"),
        (lambda s, x: s.attend(np.tile(x, (1, 2, 1))), ValueError, "q: got 6 queries, expected at most the 3 rows"),
        (lambda s, x: s.attend(x, weights="min"), ValueError, "weights: got 'min', expected 'max', 'mean', "),
        (lambda s, x: s.attend(x, weights="max", logits_of=0), ValueError, "logits_of: got a head together"),
        (lambda s, x: s.attend(x, logits_of=2), ValueError, "logits_of: got 2, expected 0 to 1"),
        (lambda s, x: s.attend(x, bias=x[0]), ValueError, r"bias: got shape \(3, 16\), expected \(2, 5\)"),
        (lambda s, x: s.attend(x, within=np.ones((2, 5))), TypeError, "within: got dtype float64, expected bool"),
        (lambda s, x: s.attend(x, scale=np.nan), ValueError, "scale: got nan"),
        (lambda s, x: s.attend(x, out=x), ValueError, "out: got an array that overlaps q"),
        (lambda s, x: s.rows(2), ValueError, "head: got 2, expected 0 to 1"),
        (lambda s, x: SlotStore(0, 4, slots=3), ValueError, "kv_heads: got 0"),
        (lambda s, x: SlotStore(1, 4, slots=2**33), ValueError, "slots: got 8589934592, expected fewer"),
        (lambda s, x: SlotStore(1, 4, dtype="int8", slots=3), TypeError, "dtype: got 'int8'"),
        (lambda s, x: SlotStore(1, 2**44, slots=3), MemoryError, "slot store"),
        (lambda s, x: SlotStore(2**40, 4, slots=3), MemoryError, "slot store"),
    ],
)
def test_bad_input(rng, call, error, message):
    store = SlotStore(2, 16, dtype=F32, slots=5)
    x = normal(rng, (2, 3, 16))
    store.append(x, x)
    with pytest.raises(error, match=message):
        call(store, x)
    assert store.live == [3, 3] and store.appended == 3


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
def test_torch(rng, dtype):
    torch = pytest.importorskip("torch")
    store = SlotStore(2, 16, dtype=dtype, slots=5)
    x = torch.ones(2, 3, 16)
    store.append(x, x)
    got = store.attend(torch.ones(4, 1, 16))
    assert isinstance(got.out, torch.Tensor) and torch.allclose(got.out, torch.ones(4, 1, 16))
