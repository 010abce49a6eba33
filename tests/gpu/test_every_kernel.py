"""No kernel without a test: each, of every dtype and head size, runs checked in the emulator against a reference."""

import pytest

from emu import emulator
from emu.device import EmulatorDevice, kernels_of
from gpu import (
    test_attention,
    test_chunked_recurrence,
    test_coded_rows,
    test_hash_topk,
    test_lists,
    test_neighborhood_attention,
    test_signatures,
)
from longattn.gpu._sources import NAMES
from random_arrays import DTYPES, F32

pytestmark = pytest.mark.skipif(not emulator.available(), reason="the emulator needs g++ on x86-64")
DIMS = (64, 128, 256)
ORDERS = dict(zip(DTYPES, emulator.ORDERS, strict=True))


def attention(rng, device, dtype, dim):
    """Decode of a row, of a group, prefill with rows that see nothing, options of each."""
    for heads, rows, keys in ((1, 1, 37), (8, 1, 0), (4, 3, 37), (1, 70, 35)):
        q, k, v = test_attention.arrays(rng, dtype, heads=heads, kv_heads=1, rows=rows, keys=keys, dim=dim)
        test_attention.check(device, q, k, v, causal=True)
        hides = {"mask": rng.random((rows, keys)) < 0.5, "sinks": rng.standard_normal(heads)}
        if keys:
            test_attention.check_options(device, q, k, v, hides)


def lists(rng, device, dtype, dim):
    """Blocks of 64 and of 128 rows; merged parts."""
    test_lists.test_merge_of_disjoint_sets_is_attention_over_all(rng, device, dtype)
    test_attention.check(device, *test_attention.arrays(rng, dtype, heads=1, kv_heads=1, rows=70, keys=70, dim=dim))
    if dim == 64:
        test_lists.test_blocks_are_a_mask(rng, device, dtype, 64, True)
    elif dtype != F32:
        test_lists.test_blocks_with_other_heads(rng, device, dtype, 1, dim, 64)


def neighbourhood(rng, device, dtype, dim):
    q, k, v = test_neighborhood_attention.arrays(rng, dtype, (5, 7), dim=dim)
    test_neighborhood_attention.check(device, q, k, v, window=3)
    test_neighborhood_attention.check(device, q, k, v, window=3, softcap=2.0)


def codes(rng, device, dtype, dim):
    """Encoding by every rule, choices, decode over 8-bit codes."""
    test_coded_rows.test_codes_are_those_of_a_store(rng, device, dtype, dim)
    test_signatures.test_codes_are_those_of_the_reference(rng, device, dtype, dim)
    test_signatures.test_rows_have_the_largest_estimates(rng, device, dtype, dim, 2, 100)
    test_hash_topk.test_codes_are_signs_of_products(rng, device, dtype, dim, 64)
    for words in (1, 2, 4, 8):
        test_hash_topk.test_rows_are_those_of_a_stable_sort(rng, device, words, 30, 7)
    if dtype != F32:
        test_coded_rows.test_decode(rng, device, dtype, dim, 4)
        test_coded_rows.test_positions_windows_and_options(rng, device, dtype, dim)
        test_coded_rows.test_prefill(rng, device, dtype, dim, 1)
        if dim < 256:
            test_coded_rows.test_blocks_of_codes(rng, device, 64, dtype, dim)


def recurrence(rng, device, dtype, dim):
    for delta in (True, False):
        for length in (2, 18):
            arrays = test_chunked_recurrence.arrays(rng, dtype, heads=1, length=length, dim=dim, delta=delta)
            test_chunked_recurrence.check(device, *arrays)


class Recorder(EmulatorDevice):
    """Knows what it started, with the sources."""

    def __init__(self, order):
        super().__init__(order)
        self.found = set()

    def kernel(self, source_name, name):
        self.found.add((source_name, name))
        return super().kernel(source_name, name)


def test_every_kernel_runs(rng):
    found = set()
    for dtype in DTYPES:
        for dim in DIMS:
            device = Recorder(ORDERS[dtype])
            for part in (attention, lists, neighbourhood, codes, recurrence):
                part(rng, device, dtype, dim)
            found |= device.found
    everything = {(source, kernel) for source in NAMES for kernel in kernels_of(source)}
    assert len(everything) > 100
    assert everything - found == set()
