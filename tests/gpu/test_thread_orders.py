"""The order in which threads run changes no bit of any kernel's results, those with atomics first of all."""

import numpy as np
import pytest

from emu import emulator
from emu.device import EmulatorDevice
from gpu import test_chunked_recurrence
from gpu.test_attention import OPTIONS, arrays, as_taken, earlier
from gpu.test_lists import block_lists
from longattn import gpu
from random_arrays import DTYPES, F32

pytestmark = pytest.mark.skipif(not emulator.available(), reason="the emulator needs g++ on x86-64")


def attention(rng, dtype, device):
    for rows, keys in ((1, 300), (5, 90), (40, 90)):  # several splits, rows of one tile, tiles
        q, k, v = arrays(rng, dtype, heads=4, kv_heads=2, rows=rows, keys=keys, dim=64)
        yield from gpu.attention(q, k, v, return_lse=True, device=device)
        yield gpu.attention(q, k, v, mask=rng.random(keys) < 0.5, device=device)


def packed(rng, dtype, device):
    q, k, v = (x[0].swapaxes(0, 1) for x in arrays(rng, dtype, heads=2, kv_heads=2, rows=80, keys=80, dim=64))
    ends = np.array([0, 10, 80])
    yield from gpu.attention_varlen(q, k, v, ends, ends, causal=True, return_lse=True, device=device)


def hashes(rng, dtype, device):
    """Counts by atomics, of few distinct codes: many ties."""
    x = rng.standard_normal((1, 2, 70, 64)).astype(dtype)
    codes = gpu.hash_encode(x, rng.standard_normal((2, 64, 64)).astype(np.float32), device=device)
    yield codes
    yield gpu.hash_topk(codes[:, :, :4], codes, 9, device=device)
    few = rng.integers(0, 3, (1, 2, 2100, 4)).astype(np.int32)  # two blocks of rows
    yield gpu.hash_topk(few[:, :, :2], few, 33, device=device)


def signatures(rng, dtype, device):
    keys = rng.standard_normal((1, 1, 2112, 64)).astype(dtype)
    keys[:, :, 1000:1600] = keys[:, :, 400:1000]  # equal scores
    made = gpu.signatures_encode(keys, device=device)
    yield from (made.codes, made.centre)
    yield gpu.signatures_topk(keys[:, :, :3], made, 40, device=device)


def codes(rng, dtype, device):
    q, k, v = arrays(rng, dtype, heads=4, kv_heads=2, rows=1, keys=290, dim=64)
    coded = [gpu.encode_rows(x, device=device) for x in (k, v)]
    for one in coded:
        yield from (one.codes, one.parameters)
    if dtype != F32:
        yield from gpu.attention(q, *coded, return_lse=True, device=device)
        yield gpu.attention(q, *coded, softcap=2.0, window=(200, 0), device=device)


def lists(rng, dtype, device):
    q, k, v = arrays(rng, dtype, heads=4, kv_heads=2, rows=1, keys=90, dim=64)
    rows = np.stack([rng.permutation(90)[:50] for _ in range(2)])[None]
    yield from gpu.index_sparse_attention(q, k, v, rows, return_lse=True, device=device)
    q, k, v = arrays(rng, dtype, heads=2, kv_heads=1, rows=70, keys=130, dim=64)
    starts, blocks, _, _ = block_lists(rng, 2, 70, 130, 64, 0.5)
    yield from gpu.block_sparse_attention(q, k, v, starts, blocks, return_lse=True, device=device)
    options = {name: as_taken(x) for name, x in OPTIONS["all, in a window"](rng, 1, 2, 70, 130).items()}
    yield gpu.block_sparse_attention(q, k, v, starts, blocks, device=device, **options)


def merges(rng, dtype, device):
    parts = [earlier(rng, 1, 2, 7) for _ in range(3)]
    yield from gpu.merge([(o.astype(dtype), lse.astype(np.float32)) for o, lse in parts], device=device)


def neighbourhood(rng, dtype, device):
    q, k, v = (rng.standard_normal((1, heads, 9, 8, 64)).astype(dtype) for heads in (2, 1, 1))
    for options in ({}, {"softcap": 2.0}):
        yield from gpu.generalized_neighborhood_attention(q, k, v, window=3, return_lse=True, device=device, **options)


def recurrence(rng, dtype, device):
    for delta in (True, False):
        for length in (3, 35):
            given = test_chunked_recurrence.arrays(rng, dtype, length=length, delta=delta)
            yield from gpu.chunked_recurrence(*given, device=device)


FAMILIES = (hashes, signatures, codes, attention, packed, lists, merges, neighbourhood, recurrence)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_bits(dtype, family):
    first, *others = (list(family(np.random.default_rng(0), dtype, EmulatorDevice(n))) for n in emulator.ORDERS)
    for other in others:
        for one, another in zip(first, other, strict=True):
            assert one.tobytes() == another.tobytes()
