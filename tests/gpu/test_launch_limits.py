"""What a device refuses at the start of a kernel, at the sizes where it does: grids, shared memory, alignment.

Kernels do not run here: launches are looked at.
"""

import numpy as np
import pytest

from emu import emulator
from emu.device import EmulatorDevice, kernels_of
from gpu.test_hash_topk import numpy_topk
from longattn import gpu
from random_arrays import BF16, DTYPES, F16, F32

#: Most bytes of shared memory a block of sm_80, sm_90 and sm_120 may ask for.
SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_120": 99 << 10}


class Dry(EmulatorDevice):
    """Holds launches to the limits of a device, and runs nothing."""

    def __init__(self, shared_limit=SHARED["sm_90"]):
        super().__init__()
        self.shared_limit = shared_limit
        self.sources = set()

    def kernel(self, source_name, name):
        self.sources.add(source_name)

        def launch(grid, block, arguments, shared_bytes):
            x, y, z = (*grid, 1, 1)[:3]
            assert 1 <= x < 2**31 and 1 <= y <= 65535 and 1 <= z <= 65535, f"{name}: grid {grid}"
            assert len(block) == 1 and 1 <= block[0] <= 1024, f"{name}: block {block}"
            assert 0 <= shared_bytes <= self.shared_limit, f"{name}: {shared_bytes} bytes of shared memory"
            self.started.append(name)

        return launch


def zeros(dtype, *shape):
    """An array of any size that takes no memory."""
    return np.broadcast_to(np.zeros(shape[-1], dtype), shape)


def calls(dtype, dim, device):
    """Every public function once, by name."""
    q, one, k = (np.zeros((1, 8, n, dim), dtype) for n in (70, 1, 90))
    keys = k[:, :2]
    rates = np.zeros((1, 8, 70), F32)
    listed = np.zeros((1, 2, 5), np.int32)
    starts, blocks = np.tile(np.array([0, 1, 2], np.int32), (1, 8, 1)), np.zeros(2, np.int32)
    options = {"softcap": 2.0, "device": device}
    made = {
        "prefill": lambda: gpu.attention(q, keys, keys, device=device),
        "prefill with options": lambda: gpu.attention(q, keys, keys, **options),
        "decode": lambda: gpu.attention(one, keys, keys, device=device),
        "decode with options": lambda: gpu.attention(one, keys, keys, **options),
        "blocks": lambda: gpu.block_sparse_attention(q, keys, keys, starts, blocks, device=device),
        "lists": lambda: gpu.index_sparse_attention(one, keys, keys, listed, device=device),
        "grid": lambda: gpu.generalized_neighborhood_attention(q, q, q, window=3, device=device),
        "recurrence": lambda: gpu.chunked_recurrence(q, q, q, None, rates, device=device),
        "steps": lambda: gpu.chunked_recurrence(one, one, one, device=device),
        "hash": lambda: gpu.hash_encode(q, np.zeros((8, dim, 256), F32), device=device),
        "signatures": lambda: gpu.signatures_topk(one, gpu.signatures_encode(q, device=device), 3, device=device),
    }
    if dtype != F32:
        coded = gpu.encode_rows(keys, device=device)
        made["decode of codes"] = lambda: gpu.attention(one, coded, coded, device=device)
        made["prefill of codes"] = lambda: gpu.attention(q, coded, coded, device=device)
    return made


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("architecture", SHARED)
def test_shared_memory_is_there_or_the_call_is_refused_first(dtype, dim, architecture):
    """All of it at head sizes up to 128, and for 16-bit numbers at 256, on data centre devices."""
    device = Dry(SHARED[architecture])
    for name, call in calls(dtype, dim, device).items():
        started = len(device.started)
        try:
            call()
        except ValueError as error:
            assert f"bytes of shared memory a block; this device has {SHARED[architecture]}" in str(error), name
            assert dim == 256 and architecture == "sm_120" and len(device.started) == started, name
        else:
            assert len(device.started) > started, name


@pytest.mark.parametrize("architecture", SHARED)
def test_large_groups_of_queries(architecture):
    """A scan keeps a group's queries in shared memory."""
    device = Dry(SHARED[architecture])
    codes = gpu.SignatureCodes(np.zeros((1, 1, 2, 544), np.uint8), np.zeros((1, 1, 64), F32), np.zeros((64, 64), F32))
    gpu.signatures_topk(np.zeros((1, 1, 128, 64), F16), codes, 3, device=device)
    device.started.clear()
    with pytest.raises(ValueError, match=r"queries: got shape .* bytes of shared memory"):
        gpu.signatures_topk(np.zeros((1, 1, 4096, 64), F16), codes, 3, device=device)
    assert not device.started


def test_many_sequences_and_heads():
    """More than the second and third axis of a grid hold together."""
    device, batch, heads = Dry(), 300, 256
    assert batch * heads > 65535
    codes = np.zeros((batch, heads, 1, 1), np.int32)
    gpu.hash_topk(codes, codes, 1, device=device)
    blocks = np.zeros((batch, heads, 1, 544), np.uint8)
    signatures = gpu.SignatureCodes(blocks, np.zeros((batch, heads, 64), F32), np.zeros((64, 64), F32))
    gpu.signatures_topk(np.zeros((batch, heads, 1, 64), F16), signatures, 1, device=device)
    x = zeros(F16, batch, heads, 1, 64)
    gpu.attention(x, x, x, device=device)
    assert {"hash_scan_1", "choice_rows_u16", "choice_rows_u32", "decode_f16_64"} <= set(device.started)


def test_more_sequences_than_a_grid_has_are_refused():
    device = Dry()
    for shape, message in (((65536, 1, 1, 64), "got 65536 along batch"), ((1, 65536, 1, 64), "got 65536 along heads")):
        x = zeros(F16, *shape)
        for call in (
            lambda x=x: gpu.attention(x, x, x, device=device),
            lambda x=x: gpu.signatures_encode(x, device=device),
            lambda x=x: gpu.encode_rows(x, device=device),
            lambda x=x: gpu.chunked_recurrence(x, x, x, device=device),
        ):
            with pytest.raises(ValueError, match=message):
                call()
    rows, ends = np.zeros((65536, 1, 64), F16), np.arange(65537)
    with pytest.raises(ValueError, match="cu_seqlens_q: got 65536 sequences, expected at most 65535"):
        gpu.attention_varlen(rows, rows, rows, ends, ends, device=device)
    assert not device.started


@pytest.mark.parametrize(("scale", "plain"), [(1e-30, True), (1e-38, True), (1e-39, False)])
@pytest.mark.parametrize("rows", [1, 40])
def test_factors_that_a_device_takes_for_zero(scale, plain, rows):
    """Minus infinity times 0 is no number: such factors go to kernels that do not multiply it."""
    device = Dry()
    q, k = (np.zeros((1, 1, n, 64), F16) for n in (rows, 90))
    gpu.attention(q, k, k, scale=scale, device=device)
    source = {1: "decode", 40: "prefill"}[rows]
    assert device.sources == {*(["merge"] if rows == 1 else []), source if plain else f"{source}_options"}


def test_no_sequences():
    """Nothing is started for them."""
    device = Dry()
    empty = np.zeros((0, 2, 5, 4), np.int32)
    assert gpu.hash_topk(empty, empty, 3, device=device).shape == (0, 2, 3)
    assert not device.started


@pytest.mark.skipif(not emulator.available(), reason="the emulator needs g++ on x86-64")
class TestAlignment:
    """Loads of several bytes: of what no caller has to align the function makes a copy, else it refuses."""

    @pytest.mark.parametrize("words", [1, 2, 4, 8])
    @pytest.mark.parametrize("kind", ["begins anywhere", "heads lie apart"])
    def test_sign_codes(self, rng, words, kind):
        numbers = rng.integers(0, 4, 2 * 40 * words + 2).astype(np.int32)
        if kind == "begins anywhere":
            codes = numbers[1:-1].reshape(1, 2, 40, words)
        else:
            apart = np.lib.stride_tricks.as_strided
            codes = apart(numbers, (1, 2, 40, words), (0, (40 * words + 1) * 4, 4 * words, 4))
        queries = rng.integers(0, 4, (1, 2, 3, words)).astype(np.int32)
        chosen = gpu.hash_topk(queries, codes, 7, device=EmulatorDevice())
        np.testing.assert_array_equal(chosen, numpy_topk(queries, codes, 7))

    def test_scales_and_offsets(self, rng):
        device = EmulatorDevice()
        q, k = (rng.standard_normal((1, 1, n, 64)).astype(F16) for n in (1, 20))
        coded = gpu.encode_rows(k, device=device)
        room = np.zeros(41, F32)
        room[1:] = coded.parameters.ravel()
        moved = gpu.CodedRows(coded.codes, room[1:].reshape(1, 1, 20, 2))
        device.started.clear()
        with pytest.raises(ValueError, match="k: got codes or parameters that do not lie row by row"):
            gpu.attention(q, moved, coded, device=device)
        assert not device.started

    def test_signatures(self, rng):
        device = EmulatorDevice()
        keys = rng.standard_normal((1, 1, 48, 64)).astype(BF16)
        made = gpu.signatures_encode(keys, device=device)
        device.started.clear()
        for codes in (made.codes[:, :, ::2], made.codes[:, :, ::-1]):
            wrong = gpu.SignatureCodes(codes, made.centre, made.turned)
            with pytest.raises(ValueError, match="expected blocks that follow one another"):
                gpu.signatures_topk(keys[:, :, :1], wrong, 3, device=device)
        assert not device.started


@pytest.mark.skipif(not emulator.available(), reason="the emulator needs g++ on x86-64")
def test_dry_launches_are_of_kernels_that_there_are():
    device = Dry()
    for dtype in (F32, BF16):
        for call in calls(dtype, 64, device).values():
            call()
    names = {kernel for source in ("decode", "prefill", "recurrence_f32", "hash") for kernel in kernels_of(source)}
    assert len(names & set(device.started)) > 6
