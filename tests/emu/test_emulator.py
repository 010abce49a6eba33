"""The emulator's own tests: every planted mistake is found, and nothing else is."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from emu import emulator

SOURCE = Path(emulator.HERE) / "planted.cu"
COMMON = Path(emulator.HERE).parents[1] / "python" / "longattn" / "gpu" / "cuda" / "common.cuh"

pytestmark = pytest.mark.skipif(not emulator.available(), reason="the emulator needs g++ on x86-64")

#: What the report of each planted mistake must say.
MISTAKES = {
    "barrier_skipped": "48 threads wait, 16 have ended",
    "two_barriers": "wait at different __syncthreads",
    "shuffle_in_a_branch": "deadlock: thread .* waits in __shfl_xor_sync",
    "shuffles_in_two_branches": "the warp has diverged: __shfl_xor_sync at line .* meets __shfl_xor_sync",
    "shuffle_from_outside_the_mask": "reads lane 20, which is not in mask 0000ffff",
    "lane_outside_its_mask": "lane 16 is not in its own mask 0000ffff",
    "misaligned_load": "load of 16 bytes is not aligned",
    "misaligned_copy": "asynchronous copy of 16 bytes is not aligned",
    "misaligned_small_copy": "asynchronous copy of 8 bytes is not aligned",
    "misaligned_word": "access that is not aligned, byte 2 of argument 0",
    "nothing_written": "read of shared memory that nothing has written, byte 252 of shared memory",
    "input_written": "write to a read-only array, byte 0 of argument 0",
    "blocks_add_to_one_place": "race: (read|two writes) without a barrier.*block 1, thread 0 after block 0, thread 0",
    "block_reads_anothers_result": "race: read without a barrier after a write.*block 1.* after block 0",
    "block_overwrites_what_another_read": "race: write without a barrier after a read",
    "no_warp_barrier": "race|nothing has written",
    "warp_barrier_for_a_block": "race|nothing has written",
    "overwritten_while_others_read": "race",
    "count_without_atomics": "race: (read|write) without a barrier",
    "read_past_the_end": "read out of bounds, byte 256 of argument 0, by block 0, thread 63",
    "write_past_the_end": "write out of bounds, byte 512 of argument 0",
    "shared_past_the_end": "write out of bounds, byte 1024 of shared memory",
    "copy_not_waited_for": "read before an asynchronous copy was waited for",
    "wait_for_the_wrong_group": "read before an asynchronous copy was waited for",
    "copy_never_waited_for": "asynchronous copies it never waited for",
    "copy_seen_without_a_barrier": "race|nothing has written|before an asynchronous copy",
    "matrix_rows_not_aligned": "row is not aligned to 16 bytes",
}


@pytest.fixture(scope="module", params=["planted", "fixed"])
def kernels(request):
    text = COMMON.read_text() + SOURCE.read_text()
    return request.param, emulator.Module(text, defines=["FIXED"] if request.param == "fixed" else [])


def start(module, name, order):
    kernel = module.kernel(name)
    # Arrays that end where a mistake would leave them: 64 threads, of which "write past the end" starts 128.
    source, out = (
        np.arange(64, dtype=np.float32),
        np.zeros(128, np.int32 if name == "count_without_atomics" else np.float32),
    )
    source.flags.writeable = False
    if not name.startswith(("read_past", "input_")):
        source = np.arange(256, dtype=np.float32)
        source.flags.writeable = False
    threads = 128 if name == "write_past_the_end" else 64
    blocks = 2 if name.startswith("block") else 1
    arguments = (source, out) if len(kernel.signature) == 2 else (out,)
    kernel((blocks,), (threads,), arguments, shared_mem=1024, order=order)
    return out


def test_every_planted_kernel_has_an_expectation():
    assert set(re.findall(r"^KERNEL\((\w+)\)", SOURCE.read_text(), re.MULTILINE)) == set(MISTAKES)


@pytest.mark.parametrize("order", emulator.ORDERS)
@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_found_and_only_they(kernels, name, order):
    kind, module = kernels
    if kind == "fixed":
        start(module, name, order)
        return
    with pytest.raises(emulator.EmulatorError) as found:
        start(module, name, order)
    if order == 0:
        assert re.search(MISTAKES[name], str(found.value)), str(found.value)


def test_reports_name_the_line():
    module = emulator.Module(COMMON.read_text() + SOURCE.read_text())
    text = (COMMON.read_text() + SOURCE.read_text()).splitlines()
    with pytest.raises(emulator.EmulatorError) as found:
        start(module, "input_written", 0)
    line = int(re.search(r"line (\d+)", str(found.value)).group(1))
    assert "const_cast<float*>(in)" in text[line - 1]


def test_arguments_are_checked_against_the_parameters():
    module = emulator.Module(
        COMMON.read_text()
        + 'extern "C" __global__ void f(float* p, int i, float x, i64 n) { p[i] = x + n; }\nKERNEL(f)\n'
    )
    kernel = module.kernel("f")
    assert kernel.signature == "pifl"
    out = np.zeros(4, np.float32)
    good = (out, np.int32(2), np.float32(1.5), np.int64(3))
    kernel((1,), (1,), good)
    assert out.tolist() == [0, 0, 4.5, 0]
    for i, wrong in enumerate(([1.0], 2, 1.5, np.int32(3))):
        with pytest.raises(TypeError, match=f"argument {i}"):
            kernel((1,), (1,), (*good[:i], wrong, *good[i + 1 :]))
    with pytest.raises(ValueError, match="expected 4"):
        kernel((1,), (1,), good[:3])
    with pytest.raises(ValueError, match="grid"):
        kernel((1, 70000), (1,), good)
    with pytest.raises(ValueError, match="no kernel"):
        module.kernel("g")


def test_matrix_loads_count_bank_conflicts():
    text = """
extern "C" __global__ void f(u32* out, int pitch) {
  DYNAMIC_SHARED(shared);
  for (int i = threadIdx.x; i < 8192; i += 32) shared[i] = 0;
  __syncthreads();
  u32 parts[4];
  load_matrices(parts, shared + threadIdx.x * pitch);
  out[threadIdx.x] = parts[0];
}
KERNEL(f)
"""
    kernel = emulator.Module(COMMON.read_text() + text).kernel("f")
    for pitch, conflicts in ((128, 4 * 7), (144, 0), (256, 4 * 7), (32, 4 * 1)):
        kernel((1,), (32,), (np.zeros(32, np.uint32), np.int32(pitch)), shared_mem=8192)
        assert kernel.matrix_loads == (4, conflicts), pitch


@pytest.mark.parametrize("pair", ["f16", "bf16"])
def test_matrix_product_is_that_of_the_ptx_manual(pair):
    """Fragments loaded by rows, multiplied, stored by the manual's places: a plain product."""
    text = f"""
typedef {pair} T;
extern "C" __global__ void f(const T* a, const T* b, float* d) {{
  DYNAMIC_SHARED(shared);
  T* s = reinterpret_cast<T*>(shared);  // a [16, 16], then b [16, 8] in rows of 16 bytes
  for (int i = threadIdx.x; i < 256; i += 32) s[i] = a[i];
  for (int i = threadIdx.x; i < 128; i += 32) s[256 + i] = b[i];
  __syncwarp();
  int lane = threadIdx.x;
  u32 x[4], y[4];
  load_matrices(x, s + (lane & 15) * 16 + (lane >> 4) * 8);
  load_matrices_transposed(y, s + 256 + (lane & 15) * 8);
  float sum[4] = {{}};
  multiply(sum, x, y[0], y[1], T{{}});
  for (int j = 0; j < 4; j++) d[((lane >> 2) + 8 * (j >> 1)) * 8 + (lane & 3) * 2 + (j & 1)] = sum[j];
}}
KERNEL(f)
"""
    kernel = emulator.Module(COMMON.read_text() + text).kernel("f")
    random = np.random.default_rng(0)
    a, b = random.integers(-8, 8, (16, 16)), random.integers(-8, 8, (16, 8))

    def bits(x):
        x = x.astype(np.float32)
        return x.astype(np.float16).view(np.uint16) if pair == "f16" else (x.view(np.uint32) >> 16).astype(np.uint16)

    d = np.zeros((16, 8), np.float32)
    kernel((1,), (32,), (bits(a), bits(b), d), shared_mem=1024)
    np.testing.assert_array_equal(d, a @ b)
