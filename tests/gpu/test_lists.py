"""Attention over lists of rows and of blocks, and merges of parts: the CPU's functions and those of `longattn.gpu`."""

import numpy as np
import pytest

import longattn as la
import tolerances
from emu.device import EmulatorDevice
from gpu.conftest import CPU, function_of, get, put, tolerance_of
from gpu.test_attention import OPTIONS, arrays, as_taken, largest, placed
from gpu.test_coded_rows import coded
from longattn import gpu
from longattn.reference import dense as reference
from random_arrays import BF16, DTYPES, F16, F32


def check(device, q, k, v, out, lse, *, seen=None, values=None, **options):
    """Output and lse against the reference over keys and values whose numbers are known."""
    expected, expected_lse = reference.attention(q, k, v, return_lse=True, mask=seen, **options)
    offset = np.max(options.get("alibi_slopes", 0.0)) * max(q.shape[2], k.shape[2]) + np.max(options.get("sinks", 0.0))
    offset += sum(largest(options[name]) for name in ("bias", "relative_bias") if name in options)
    held = v
    if "state" in options:
        held = np.append(v.astype(np.float64).ravel(), np.nan_to_num(options["state"][0])).astype(v.dtype)[:, None]
        offset += largest(options["state"][1])
    scale = None if options.get("scale") is None else float(np.max(options["scale"]))
    tolerance = tolerance_of(device, q, k, held, scale=scale, offset=offset, together=8)
    tolerance.check(get(out), expected, get(lse), expected_lse)


def over_rows(device, q, k, v, rows, lengths=None, **options):
    """Over lists `[B, Hkv, n]`, of which the first `lengths` count."""
    there = {name: placed(device, x) for name, x in options.items()}
    if device is CPU:
        counts = np.full(rows.shape[:2], rows.shape[2]) if lengths is None else per_head(lengths, rows.shape[1])
        lists = [rows[b, h, :n] for (b, h), n in np.ndenumerate(counts)]
        return la.dense.listed_attention(q, k, v, lists, return_lse=True, **there)
    more = () if lengths is None else (put(device, lengths),)
    placed_rows = [x if isinstance(x, gpu.CodedRows) else put(device, x) for x in (q, k, v)]
    return gpu.index_sparse_attention(*placed_rows, put(device, rows), *more, return_lse=True, device=device, **there)


def per_head(lengths, heads):
    """Lengths `[B]` or `[B, H]` as the latter."""
    return np.broadcast_to(np.reshape(lengths, (len(lengths), -1)), (len(lengths), heads))


def chosen_by(rows, lengths, heads, keys):
    """Lists as a mask `[B, Hq, 1, Lk]`."""
    mask = np.zeros((len(rows), rows.shape[1], 1, keys), bool)
    for (b, h), n in np.ndenumerate(per_head(lengths, rows.shape[1])):
        mask[b, h, 0, rows[b, h, :n]] = True
    return np.repeat(mask, heads // rows.shape[1], axis=1)


def row_lists(rng, kv_heads, keys, most, lengths):
    """Rows in any order; beyond the lengths nothing is read."""
    lists = np.stack([[rng.permutation(keys)[:most] for _ in range(kv_heads)] for _ in lengths]).astype(np.int32)
    for (b, h), n in np.ndenumerate(per_head(lengths, kv_heads)):
        lists[b, h, n:] = -1
    return lists


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("group", "dim"), [(1, 64), (4, 128), (8, 256), (8, 64)])
def test_rows_are_read_where_they_lie(rng, anywhere, dtype, group, dim):
    """Lengths in the middle of a block, whole, and none."""
    lengths = np.array([77, 30, 0], np.int32)
    q, k, v = arrays(rng, dtype, batch=3, heads=2 * group, kv_heads=2, rows=1, keys=90, dim=dim)
    lists = row_lists(rng, 2, 90, 77, lengths)
    out, lse = over_rows(anywhere, q, k, v, lists, lengths)
    check(anywhere, q, k, v, out, lse, seen=chosen_by(lists, lengths, 2 * group, 90))
    assert np.isneginf(get(lse)[2]).all() and not get(out)[2].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("group", "dim"), [(1, 64), (8, 64), (4, 128), (2, 256)])
def test_lists_of_a_length_per_head(rng, anywhere, dtype, group, dim):
    """None, one, in the middle of a split and more than one split, side by side."""
    lengths = np.array([[0, 300], [17, 1]], np.int32)
    q, k, v = arrays(rng, dtype, batch=2, heads=2 * group, kv_heads=2, rows=1, keys=310, dim=dim)
    lists = row_lists(rng, 2, 310, 300, lengths)
    out, lse = over_rows(anywhere, q, k, v, lists, lengths)
    check(anywhere, q, k, v, out, lse, seen=chosen_by(lists, lengths, 2 * group, 310))
    assert np.isneginf(get(lse)[0, :group]).all() and not get(out)[0, :group].any()
    sinks = rng.standard_normal(2 * group).astype(np.float32)
    out, lse = over_rows(anywhere, q, k, v, lists, lengths, softcap=2.0, sinks=sinks)
    check(anywhere, q, k, v, out, lse, seen=chosen_by(lists, lengths, 2 * group, 310), softcap=2.0, sinks=sinks)


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_lists_of_codes_of_a_length_per_head(rng, device, dtype):
    lengths = np.array([[70, 5], [0, 33]], np.int32)
    q, k, v = arrays(rng, dtype, batch=2, heads=8, kv_heads=2, rows=1, keys=90, dim=64)
    (keys, k_decoded), (values, v_decoded) = coded(device, k), coded(device, v)
    lists = row_lists(rng, 2, 90, 70, lengths)
    out, lse = (get(x) for x in over_rows(device, q, keys, values, lists, lengths))
    seen = chosen_by(lists, lengths, 8, 90)
    expected, expected_lse = reference.attention(q, k_decoded, v_decoded, return_lse=True, mask=seen)
    tolerances.device_coded_attention(q, k_decoded, v_decoded).check(out, expected, lse, expected_lse)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_options_over_rows(rng, anywhere, dtype):
    q, k, v = arrays(rng, dtype, heads=4, kv_heads=2, rows=1, keys=90, dim=64)
    lists = row_lists(rng, 2, 90, 40, [40])
    sinks = rng.standard_normal(4).astype(np.float32)
    options = {"softcap": 0.7, "sinks": sinks, "scale": 0.2}
    out, lse = over_rows(anywhere, q, k, v, lists, **options)
    check(anywhere, q, k, v, out, lse, seen=chosen_by(lists, [40], 4, 90), **options)


@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
def test_states_over_rows(rng, device, dtype):
    """And scales per head, which the CPU's function of lists does not take."""
    q, k, v = arrays(rng, dtype, heads=4, kv_heads=2, rows=1, keys=90, dim=64)
    lists = row_lists(rng, 2, 90, 40, [40])
    state = rng.standard_normal((1, 4, 1, 64)).astype(np.float32), rng.standard_normal((1, 4, 1)).astype(np.float32)
    options = {"state": state, "scale": rng.uniform(0.05, 0.2, 4).astype(np.float32)}
    out, lse = over_rows(device, q, k, v, lists, **options)
    check(device, q, k, v, out, lse, seen=chosen_by(lists, [40], 4, 90), **options)


@pytest.mark.parametrize(("group", "dim", "dtype"), [(1, 128, F16), (8, 64, BF16), (4, 256, BF16)])
def test_rows_of_codes(rng, anywhere, group, dim, dtype):
    """8-bit codes of listed rows, with options; an empty list."""
    q, k, v = arrays(rng, dtype, batch=1, heads=2 * group, kv_heads=2, rows=1, keys=70, dim=dim)
    options = {"softcap": 3.0, "sinks": rng.standard_normal(2 * group).astype(np.float32)}
    if anywhere is CPU:
        store = la.KVStore(kv_heads=2, head_dim=dim, dtype="int8", capacity=80)
        store.append(k[0], v[0])
        keys, values = store.keys, store.values
        decoded = [np.asarray(x)[None].astype(np.float64) for x in (keys, values)]
        q_taken, drop = q[0], 0
    else:
        (keys, k_decoded), (values, v_decoded) = coded(anywhere, k), coded(anywhere, v)
        decoded, q_taken, drop = [k_decoded, v_decoded], q, None
    for count in (40, 0):
        lists = row_lists(rng, 2, 70, 40, [count])
        lengths = np.array([count], np.int32)
        out, lse = over_rows(anywhere, q_taken, keys, values, lists, lengths, **options)
        out, lse = (get(x) if drop is None else x[None] for x in (out, lse))
        seen = chosen_by(lists, lengths, 2 * group, 70)
        expected, expected_lse = reference.attention(q, *decoded, return_lse=True, mask=seen, **options)
        tolerance = tolerances.device_coded_attention(q, *decoded, offset=largest(options["sinks"]))
        tolerance.check(out, expected, lse, expected_lse)


def block_lists(rng, heads, length, keys, query_block, density):
    """Random lists as `starts` and `blocks`, the mask they stand for, and that of the blocks."""
    of_rows, of_keys = -(-length // query_block), -(-keys // 64)
    chosen = rng.random((1, heads, of_rows, of_keys)) < density
    chosen[:, 0, 0] = False  # rows that see nothing
    counts = chosen.sum(-1).reshape(heads, of_rows)
    ends = np.cumsum(counts).reshape(heads, of_rows)
    starts = np.concatenate([(ends[:, :1] - counts[:, :1]), ends], axis=1)[None].astype(np.int32)
    mask = np.repeat(np.repeat(chosen, query_block, 2), 64, 3)[:, :, :length, :keys]
    return starts, np.append(np.nonzero(chosen)[3], 0).astype(np.int32), mask, chosen


def check_blocks(device, rng, q, k, v, query_block=64, **options):
    heads, length, keys = q.shape[1], q.shape[2], k.shape[2]
    starts, blocks, mask, chosen = block_lists(rng, heads, length, keys, query_block, 0.5)
    options = {name: as_taken(x) for name, x in options.items()}
    there = {name: placed(device, x) for name, x in options.items()}
    if device is CPU:
        of_blocks = la.BlockMask.from_blocks(chosen, lengths=(length, keys), block_q=query_block, block_k=64)
        out, lse = la.block_sparse_attention(q, k, v, of_blocks, return_lse=True, **there)
    else:
        out, lse = gpu.block_sparse_attention(
            *(put(device, x) for x in (q, k, v, starts, blocks)),
            query_block=query_block,
            return_lse=True,
            device=device,
            **there,
        )
    seen = mask & options.pop("mask", np.True_)
    check(device, q, k, v, out, lse, seen=seen, **options)
    if not {"sinks", "state"} & set(options):
        assert np.isneginf(get(lse)[:, 0, :query_block]).all() and not get(out)[:, 0, :query_block].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("query_block", [64, 128])
@pytest.mark.parametrize("causal", [True, False])
def test_blocks_are_a_mask(rng, anywhere, dtype, query_block, causal):
    q, k, v = arrays(rng, dtype, heads=2, kv_heads=1, rows=150, keys=220, dim=64)
    if anywhere is not CPU and dtype == F32 and query_block == 128:
        with pytest.raises(ValueError, match="query_block: got 128, expected one of"):
            check_blocks(anywhere, rng, q, k, v, query_block)
        return
    check_blocks(anywhere, rng, q, k, v, query_block, causal=causal)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("group", "dim", "query_block"), [(4, 128, 64), (1, 256, 64), (1, 128, 128), (8, 64, 64)])
def test_blocks_with_other_heads(rng, anywhere, dtype, group, dim, query_block):
    if dtype == F32 and query_block == 128:
        query_block = 64
    rows = query_block + 6
    check_blocks(anywhere, rng, *arrays(rng, dtype, heads=group, kv_heads=1, rows=rows, keys=90, dim=dim), query_block)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize(
    "option", ["all, in a window", "all that hides", "mask by key", "scale by head", "bias that hides"]
)
def test_options_over_blocks(rng, anywhere, dtype, option):
    q, k, v = arrays(rng, dtype, heads=2, kv_heads=1, rows=70, keys=90, dim=64)
    check_blocks(anywhere, rng, q, k, v, **OPTIONS[option](rng, 1, 2, 70, 90))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merge_of_disjoint_sets_is_attention_over_all(rng, anywhere, dtype):
    """From float32 parts, and from those of the storage dtype, which are rounded already; any iterable."""
    q, k, v = arrays(rng, dtype, heads=4, kv_heads=2, rows=1, keys=150, dim=64)
    attend, merge = function_of(anywhere, la.attention, gpu.attention), function_of(anywhere, la.merge, gpu.merge)
    expected, expected_lse = reference.attention(q, k, v, return_lse=True)
    for kind in (np.dtype(np.float32), dtype):
        parts = []
        for rows in (slice(0, 4), slice(4, 120), slice(120, 150), slice(150, 150)):
            taken = (np.ascontiguousarray(x, kind) for x in (q, k[:, :, rows], v[:, :, rows]))
            parts.append(attend(*(put(anywhere, x) for x in taken), return_lse=True))
        merged, lse = merge(iter(parts))
        assert get(merged).dtype == kind
        # A part of the storage dtype has been rounded: the merge is that of the rounded ones.
        of_parts, of_parts_lse = reference.merge([tuple(map(get, part)) for part in parts])
        tolerance = tolerance_of(anywhere, *(x.astype(kind) for x in (q, k, v)), together=8)
        tolerance.check(get(merged), of_parts, get(lse), of_parts_lse)
        if kind == F32:
            tolerance.check(get(merged), expected, get(lse), expected_lse)
    if anywhere is not CPU:
        as_float, _ = gpu.merge(parts, dtype="float32", device=anywhere)
        np.testing.assert_array_equal(get(as_float).astype(dtype), get(merged))


class TestBadInput:
    def test_rows(self, rng):
        q, k, v = arrays(rng, F32, batch=2, heads=2, kv_heads=2, rows=1, keys=8, dim=64)
        device, rows = EmulatorDevice(), np.zeros((2, 2, 4), np.int32)
        over, below = rows.copy(), rows.copy()
        over[1, 0, 3], below[0, 1, 0] = 8, -1
        for given, error, message in (
            ((rows[:, :1],), ValueError, r"rows: got shape \(2, 1, 4\), expected \[2, 2, n\]"),
            ((over,), ValueError, "rows: got numbers from 0 to 8, expected 0 to 7"),
            ((below,), ValueError, "rows: got numbers from -1 to 0, expected 0 to 7"),
            ((rows.tolist(), [4, 5]), ValueError, "lengths: got numbers from 4 to 5, expected 0 to 4"),
            ((rows, np.zeros(3, int)), ValueError, r"lengths: got shape \(3,\), expected \[2\] or \[2, 2\]"),
            ((rows, np.full((2, 2), 5)), ValueError, "lengths: got numbers from 5 to 5, expected 0 to 4"),
            ((over, np.array([[4, 4], [4, 3]])), ValueError, "rows: got numbers from 0 to 8, expected 0 to 7"),
            ((rows * 0.5,), TypeError, "rows: got dtype float64, expected integers"),
        ):
            with pytest.raises(error, match=message):
                gpu.index_sparse_attention(q, k, v, *given, device=device)
        for lengths in (np.array([4, 3]), np.array([[4, 4], [3, 4]])):  # what does not count is not read
            gpu.index_sparse_attention(q, k, v, over, lengths, device=device)
        with pytest.raises(ValueError, match="q: got 17 rows per KV head, expected at most 16"):
            gpu.index_sparse_attention(np.repeat(q, 17, 2), k, v, rows, device=device)

    def test_rows_on_the_device(self, rng):
        """Looked at where that is asked for: it waits."""
        torch = pytest.importorskip("torch")
        q, k, v = (torch.from_numpy(x) for x in arrays(rng, F32, heads=2, kv_heads=2, rows=1, keys=8, dim=64))
        device = EmulatorDevice()
        for name, given in (
            ("rows", (torch.full((1, 2, 3), 8),)),
            ("lengths", (np.zeros((1, 2, 3), int), torch.tensor([4]))),
        ):
            with pytest.raises(ValueError, match=f"{name}: got numbers from"):
                gpu.index_sparse_attention(q, k, v, *given, check=True, device=device)
        starts, blocks = torch.tensor([[[0, 1], [1, 2]]]), torch.tensor([0, 1])
        with pytest.raises(ValueError, match="blocks: got numbers from 0 to 1, expected 0 to 0"):
            gpu.block_sparse_attention(q, k, v, starts, blocks, check=True, device=device)
        assert not device.started

    def test_blocks(self, rng):
        q, k, v = arrays(rng, F16, heads=2, kv_heads=2, rows=70, keys=100, dim=64)
        device, starts, blocks = EmulatorDevice(), np.array([[[0, 1, 2], [2, 2, 3]]]), np.array([0, 1, 1])
        for changed, error, message in (
            ({"starts": np.zeros((1, 2, 4), int)}, ValueError, "starts: got shape"),
            ({"starts": starts + 2}, ValueError, "starts: got numbers from 2 to 5, expected 0 to 3"),
            ({"starts": starts[..., ::-1]}, ValueError, "starts: got bounds that fall"),
            ({"blocks": blocks[None]}, ValueError, "blocks: got shape"),
            ({"blocks": blocks + 1}, ValueError, "blocks: got numbers from 1 to 2, expected 0 to 1"),
            ({"blocks": blocks - 1}, ValueError, "blocks: got numbers from -1 to 0, expected 0 to 1"),
            ({"blocks": blocks * 1.0}, TypeError, "blocks: got dtype float64, expected integers"),
            ({"query_block": 32}, ValueError, "query_block: got 32, expected one of"),
            (
                {"query_block": 128, "starts": starts[..., 1:], "softcap": 2.0},
                ValueError,
                "query_block: got 128 with options of the scores",
            ),
            ({"softcap": -1.0}, ValueError, "softcap: got -1.0"),
            ({"mask": np.zeros((2, 8), bool)}, ValueError, "mask: got shape"),
        ):
            with pytest.raises(error, match=message):
                gpu.block_sparse_attention(q, k, v, device=device, **{"starts": starts, "blocks": blocks, **changed})
        assert not device.started
        gpu.block_sparse_attention(q, k, v, starts, np.append(blocks, 9), device=device)  # what no list has

    def test_parts(self, rng):
        device, out, lse = EmulatorDevice(), np.zeros((1, 2, 3, 64), np.float32), np.zeros((1, 2, 3), np.float32)
        for parts, error, message in (
            ([], ValueError, "parts: got none"),
            ([out], TypeError, r"parts\[0\]: got ndarray, expected a pair"),
            ([(out, lse), (out.astype(F16), lse)], TypeError, r"parts\[1\] o: got dtype float16, expected float32"),
            ([(out, lse), (out[:, :1], lse)], ValueError, r"parts\[1\] o: got shape"),
            ([(out, lse[:, :1])], ValueError, r"parts\[0\] lse: got shape"),
            ([(out, lse.astype(F16))], TypeError, r"parts\[0\] lse: got dtype float16"),
            ([(out.astype(int), lse)], TypeError, r"parts\[0\] o: got int64"),
        ):
            with pytest.raises(error, match=message):
                gpu.merge(parts, device=device)
        with pytest.raises(ValueError, match="dtype: got 'int8', expected 'float32', 'float16' or 'bfloat16'"):
            gpu.merge([(out, lse)], dtype="int8", device=device)
        assert not device.started
