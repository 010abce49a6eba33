"""Public functions on arrays of a GPU, over a stand-in for CuPy: the same calls, and refusals by name."""

import numpy as np
import pytest

import longattn as la
import tolerances
from emu import emulator
from longattn import linear, sparse
from longattn.dense import listed_attention
from longattn.reference import dense as reference
from longattn.reference.linear._recurrence import recurrence
from random_arrays import BF16, F16, F32, qkv

pytestmark = pytest.mark.skipif(not emulator.available(), reason="the emulator needs g++ on x86-64")


def arrays(rng, dtype=F16, *, heads=4, kv_heads=2, rows=1, keys=90, dim=64, batch=1):
    return qkv(
        rng, heads=heads, kv_heads=kv_heads, rows=rows, keys=keys, dim=dim, q_dtype=dtype, kv_dtype=dtype, batch=batch
    )


def check(q, k, v, results, **options):
    expected, expected_lse = reference.attention(q, k, v, return_lse=True, **options)
    out, lse = results
    tolerances.device_attention(q, k, v, offset=3.0).check(out.get(), expected, lse.get(), expected_lse)


def test_merge(rng, cupy):
    q, k, v = arrays(rng, F32)
    there = [cupy.asarray(x) for x in (q, k, v)]
    sets = slice(0, 50), slice(50, None)
    parts = (la.attention(there[0], *(x[:, :, s] for x in there[1:]), return_lse=True) for s in sets)
    results = la.merge(parts)
    assert all(isinstance(x, cupy.ndarray) for x in results)
    check(q, k, v, results)


class TestBlocks:
    @pytest.mark.parametrize(
        ("block_q", "block_k", "heads", "batch"),
        [(64, 64, 4, 1), (128, 64, 2, 2), (192, 128, 1, 1)],
        ids=["a list per head", "per KV head, of a batch", "wide blocks, one for all"],
    )
    def test_masks(self, rng, cupy, block_q, block_k, heads, batch):
        """What one list serves is one list in the memory of the device too; the last blocks are short."""
        q, k, v = arrays(rng, rows=200, keys=170, batch=batch)
        blocks = rng.random((1, heads, -(-200 // block_q), -(-170 // block_k))) < 0.6
        blocks[0, 0, 0] = False
        mask = la.BlockMask.from_blocks(blocks, lengths=(200, 170), block_q=block_q, block_k=block_k)
        dense = np.repeat(mask.to_dense_mask(), 4 // heads, axis=1)
        there = [cupy.asarray(x) for x in (q, k, v)]
        check(q, k, v, la.block_sparse_attention(*there, mask, causal=True, return_lse=True), mask=dense, causal=True)
        sinks = rng.standard_normal(4).astype(np.float32)
        results = la.block_sparse_attention(*there, mask, return_lse=True, sinks=cupy.asarray(sinks), softcap=2.0)
        check(q, k, v, results, mask=dense, sinks=sinks, softcap=2.0)

    def test_refusals(self, rng, cupy):
        there = [cupy.asarray(x) for x in arrays(rng, rows=70)]
        mask = la.BlockMask.from_blocks(np.ones((2, 2), bool), lengths=(70, 90), block_q=64, block_k=64)
        short = la.BlockMask.from_blocks(np.ones((2, 2), bool), lengths=(70, 90), block_q=64, block_k=64, first_q=6)
        small = la.BlockMask.from_blocks(np.ones((2, 3), bool), lengths=(70, 90), block_q=64, block_k=32)
        other = la.BlockMask.from_blocks(np.ones((2, 2), bool), lengths=(70, 91), block_q=64, block_k=64)
        for given, options, message in (
            (mask, {"skip_threshold": 0.1}, "skip_threshold: not offered for arrays of a GPU"),
            (mask, {"out": there[0]}, "out: not offered for arrays of a GPU"),
            (short, {}, "block_mask: got blocks of 64 queries \\(the first of 6\\)"),
            (small, {}, "and 32 keys, expected multiples of 64"),
            (other, {}, "block_mask: got lengths"),
        ):
            with pytest.raises(ValueError, match=message):
                la.block_sparse_attention(*there, given, **options)
        with pytest.raises(ValueError, match=r"q: got \(4, 70, 64\), expected rank 4 on a GPU"):
            la.block_sparse_attention(*(x[0] for x in there), mask)


class TestRows:
    @pytest.mark.parametrize("heads", [1, 2])
    def test_lists(self, rng, cupy, heads):
        q, k, v = arrays(rng, BF16, batch=2)
        counts = np.array([[20, 7][:heads], [0, 31][:heads]])
        chosen = [np.sort(rng.permutation(90)[:n]) for n in counts.ravel()]
        ends = np.cumsum(counts).reshape(counts.shape)
        lists = la.RowLists(
            indptr=np.stack([ends - counts, ends], axis=-1), indices=np.concatenate(chosen), lengths=(1, 90), block_q=1
        )
        there = [cupy.asarray(x) for x in (q, k, v)]
        dense = np.repeat(lists.to_dense_mask(), 4 // heads, axis=1)
        results = sparse.index_sparse_attention(*there, lists, causal=True, return_lse=True, softcap=2.0)
        check(q, k, v, results, mask=dense, softcap=2.0)

    def test_refusals(self, rng, cupy):
        there = [cupy.asarray(x) for x in arrays(rng)]

        def lists(counts, **more):
            ends = np.cumsum(counts)
            bounds = np.stack([ends - counts, ends], axis=-1)[None]
            indices = np.concatenate([np.arange(n) for n in counts])
            return la.RowLists(indptr=bounds, indices=indices, lengths=(1, 90), block_q=1, **more)

        for given, options, message in (
            (lists([3] * 4), {}, "lists: got 1 blocks of queries and 4 heads for 2 rows per KV head"),
            (lists([3], bias=np.zeros(3, np.float32)), {}, "lists: got a bias"),
            (lists([3]), {"window": (3, 0)}, "window: not offered for lists on a GPU"),
            (lists([3]), {"mask": np.ones((1, 90), bool)}, "mask: not offered for lists on a GPU"),
            (lists([3]), {"out": there[0]}, "out: not offered for arrays of a GPU"),
        ):
            with pytest.raises(ValueError, match=message):
                sparse.index_sparse_attention(*there, given, **options)

    def test_listed(self, rng, cupy):
        """Lists of the host, for all heads or for each, of several lengths; lists of the device; none."""
        q, k, v = arrays(rng)
        there = [cupy.asarray(x) for x in (q, k, v)]
        each = np.stack([rng.permutation(90)[:17] for _ in range(2)])
        for rows, heads in (
            (each[0], np.stack([each[0]] * 2)),
            (each, each),
            (list(each), each),
            ([each[0], each[1][:5]], (each[0], each[1][:5])),
            (cupy.asarray(each[None].astype(np.int32)), each),
            (np.zeros(0, int), np.zeros((2, 0), int)),
        ):
            mask = np.zeros((1, 4, 1, 90), bool)
            for h in range(4):
                mask[0, h, 0, heads[h // 2]] = True
            results = listed_attention(*there, rows, return_lse=True, sinks=cupy.asarray(np.ones(4, np.float32)))
            check(q, k, v, results, mask=mask, sinks=np.ones(4))

    def test_listed_refusals(self, rng, cupy):
        there = [cupy.asarray(x) for x in arrays(rng)]
        for rows, options, message in (
            ([90], {}, "rows: got numbers from 90 to 90, expected 0 to 89"),
            (cupy.asarray(np.full((1, 2, 3), 90)), {}, "rows: got numbers from 90 to 90, expected 0 to 89"),
            (cupy.asarray(np.zeros(3, int)), {}, r"rows: got shape \(3,\), expected \[B, Hkv, n\] on a GPU"),
            ([3], {"out": there[0]}, "out: not offered for arrays of a GPU"),
        ):
            with pytest.raises(ValueError, match=message):
                listed_attention(*there, rows, **options)


GATE, RATE = "[B, H, L, D]", "[B, H, L]"
#: By name: what the function takes beside q, k and v, and what must be said for it to go to a GPU.
LINEAR = {
    "linear_attention": ((), {"normalize": False}),
    "lightning_attention": (("slopes",), {}),
    "retention": (("gamma",), {}),
    "gated_linear_attention": ((GATE,), {}),
    "delta_rule_attention": ((RATE,), {}),
    "gated_delta_rule": ((RATE, RATE), {}),
    "kimi_delta_attention": ((GATE, RATE), {"normalize_qk": False}),
}


def linear_inputs(rng, name):
    q, k, v = (rng.standard_normal((1, 2, 20, dim)) for dim in (64, 64, 40))
    q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    made = {
        GATE: -rng.exponential(0.3, (1, 2, 20, 64)),
        "slopes": np.array([0.1, 0.3]),
        "gamma": np.array([0.9, 0.6]),
    }
    more = []
    for i, kind in enumerate(LINEAR[name][0]):
        gate = name == "gated_delta_rule" and i == 0
        rates = -rng.exponential(0.3, (1, 2, 20)) if gate else rng.uniform(0.1, 1, (1, 2, 20))
        more.append(made[kind] if kind != RATE else rates)
    return [x.astype(np.float32) for x in (q, k, v, *more)]


class TestRecurrences:
    @pytest.mark.parametrize("name", LINEAR)
    def test_they_are_those_of_the_cpu(self, rng, cupy, name):
        """And a step from the state is the row after."""
        given, (_, options) = linear_inputs(rng, name), LINEAR[name]
        function = getattr(linear, name)
        out, state = function(*(cupy.asarray(x) for x in given), **options)
        assert isinstance(out, cupy.ndarray) and isinstance(state, cupy.ndarray)
        of_cpu, state_of_cpu = function(*given, **options)
        tolerances.device_recurrence(out.get(), of_cpu, state.get(), state_of_cpu)
        more = [x if x.ndim == 1 else np.ascontiguousarray(x[:, :, :1]) for x in given]
        out, state = function(*(cupy.asarray(x) for x in more), initial_state=state, **options)
        of_cpu, state_of_cpu = function(*more, initial_state=state_of_cpu, **options)
        tolerances.device_recurrence(out.get(), of_cpu, state.get(), state_of_cpu)

    def test_a_constant_gate_is_that_of_every_row(self, rng, cupy):
        q, k, v, slopes = linear_inputs(rng, "lightning_attention")
        out, state = linear.lightning_attention(*(cupy.asarray(x) for x in (q, k, v)), slopes, scale=0.5)
        g = np.broadcast_to(-slopes[None, :, None], (1, 2, 20))
        expected, expected_state = recurrence(q, k, v, g=g, scale=0.5)
        tolerances.device_recurrence(out.get(), expected, state.get(), expected_state)

    @pytest.mark.parametrize("name", LINEAR)
    def test_refusals(self, rng, cupy, name):
        given, (_, options) = [cupy.asarray(x) for x in linear_inputs(rng, name)], LINEAR[name]
        function = getattr(linear, name)
        refused = {"out_state": given[0], "cu_seqlens": np.array([0, 20]), "out": given[2], "chunk_size": 16}
        refused |= dict.fromkeys(options, True)
        if name == "linear_attention":
            refused["feature_map"] = "elu1"
        for option, value in refused.items():
            with pytest.raises(ValueError, match=f"{option}: not offered for arrays of a GPU"):
                function(*given, **{**options, option: value})

    def test_decays_are_checked(self, rng, cupy):
        q, k, v, slopes = (cupy.asarray(x) for x in linear_inputs(rng, "lightning_attention"))
        with pytest.raises(ValueError, match="slopes: got a number below 0"):
            linear.lightning_attention(q, k, v, cupy.asarray(-slopes.get()))
