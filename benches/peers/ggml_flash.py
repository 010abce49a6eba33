"""A decode step of longattn beside ggml's flash attention, which llama.cpp runs on a CPU.

GGML_LIB_DIR=/path/to/libraries python benches/peers/ggml_flash.py --threads 1,2 --json ggml.json
"""

from __future__ import annotations

import ctypes
import os
import sys
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from longattn.bench import decode, external
from longattn.bench.harness import Candidate
from longattn.bench.options import Grid

GRID = Grid(
    heads=((32, 8), (32, 32)),
    head_dims=(128,),
    keys=(8192, 32768),
    dtypes=("float32", "float16", "int8", "int4"),
)
# A dtype of longattn to ggml's name for about as many bits, its number in ggml.h, and bytes per 32 elements.
FORMATS = {
    "float32": ("f32", 0, 128),
    "float16": ("f16", 1, 64),
    "bfloat16": ("bf16", 30, 64),
    "int8": ("q8_0", 8, 34),
    "int4": ("q4_0", 2, 18),
}
# Every computation takes its scratch from the context and gives none back: room for some hundred.
SCRATCH = 256 << 20

Pointer, Int, Int64, Size, Float = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_size_t, ctypes.c_float


class InitParams(ctypes.Structure):
    """`ggml_init_params`."""

    _fields_ = (("mem_size", Size), ("mem_buffer", Pointer), ("no_alloc", ctypes.c_bool))


class Ggml:
    """The functions of the libraries in a folder."""

    def __init__(self, folder: Path) -> None:
        suffix = "dylib" if sys.platform == "darwin" else "so"
        base = ctypes.CDLL(str(folder / f"libggml-base.{suffix}"), mode=ctypes.RTLD_GLOBAL)
        cpu = ctypes.CDLL(str(folder / f"libggml-cpu.{suffix}"), mode=ctypes.RTLD_GLOBAL)

        def function(library: ctypes.CDLL, name: str, result: Any, *arguments: Any) -> Any:
            found = getattr(library, name)
            found.restype, found.argtypes = result, arguments
            return found

        self.init = function(base, "ggml_init", Pointer, InitParams)
        self.free = function(base, "ggml_free", None, Pointer)
        self.tensor = function(base, "ggml_new_tensor_4d", Pointer, Pointer, Int, *[Int64] * 4)
        self.data = function(base, "ggml_get_data", Pointer, Pointer)
        self.nbytes = function(base, "ggml_nbytes", Size, Pointer)
        self.quantize = function(base, "ggml_quantize_chunk", Size, Int, Pointer, Pointer, *[Int64] * 3, Pointer)
        self.flash_attention = function(base, "ggml_flash_attn_ext", Pointer, *[Pointer] * 5, *[Float] * 3)
        self.graph = function(base, "ggml_new_graph", Pointer, Pointer)
        self.expand = function(base, "ggml_build_forward_expand", None, Pointer, Pointer)
        self.compute = function(cpu, "ggml_graph_compute_with_ctx", Int, Pointer, Pointer, Int)
        self.version: str = function(base, "ggml_version", ctypes.c_char_p)().decode()
        function(cpu, "ggml_cpu_init", None)()


class Step:
    """One query row per head over keys and values that ggml holds as `dtype`, one head after the other."""

    def __init__(self, ggml: Ggml, case: decode.Case, dtype: str, threads: int) -> None:
        self.ggml, self.threads = ggml, threads
        _, self.number, per_32 = FORMATS[dtype]
        self.stored_bytes = 2 * case.k.size * per_32 // 32
        self.context = ggml.init(InitParams(self.stored_bytes + 8 * case.q.size + SCRATCH, None, False))
        if not self.context:
            raise MemoryError(f"ggml cannot allocate {self.stored_bytes} bytes")
        weakref.finalize(self, ggml.free, self.context)
        q = ggml.tensor(self.context, 0, case.dim, 1, case.query_heads, 1)
        self._copy(q, case.q.astype(np.float32))
        k, v = (self._rows(case, rows) for rows in (case.k, case.v))
        self.out = ggml.flash_attention(self.context, q, k, v, None, case.dim**-0.5, 0.0, 0.0)
        self.steps = ggml.graph(self.context)
        ggml.expand(self.steps, self.out)
        self.shape = (case.query_heads, case.dim)

    def _rows(self, case: decode.Case, rows: np.ndarray) -> Any:
        tensor = self.ggml.tensor(self.context, self.number, case.dim, case.keys, case.kv_heads, 1)
        if self.number in (FORMATS["int8"][1], FORMATS["int4"][1]):
            count = rows.size // case.dim
            self.ggml.quantize(self.number, rows.ctypes.data, self.ggml.data(tensor), 0, count, case.dim, None)
        else:
            self._copy(tensor, rows)
        return tensor

    def _copy(self, tensor: Any, array: np.ndarray) -> None:
        if self.ggml.nbytes(tensor) != array.nbytes:
            raise ValueError(f"ggml's tensor has {self.ggml.nbytes(tensor)} bytes, the array {array.nbytes}")
        ctypes.memmove(self.ggml.data(tensor), array.ctypes.data, array.nbytes)

    def __call__(self) -> np.ndarray:
        status = self.ggml.compute(self.context, self.steps, self.threads)
        if status:
            raise RuntimeError(f"ggml: status {status}")
        numbers = (Float * (self.shape[0] * self.shape[1])).from_address(self.ggml.data(self.out))
        return np.frombuffer(numbers, np.float32).reshape(self.shape).copy()


def load() -> tuple[str, external.Ways]:
    """Version, and flash attention over a case's rows in the formats asked for."""
    folder = os.environ.get("GGML_LIB_DIR")
    if not folder:
        raise ModuleNotFoundError("GGML_LIB_DIR: not set; it names the folder of ggml's libraries (see README.md)")
    ggml = Ggml(Path(folder))

    def ways(case: decode.Case, threads: int, dtypes: Sequence[str]) -> list[decode.Way]:
        # float32 rows are also what is quantised.
        wanted = [case.stored] + [dtype for dtype in decode.CODED if case.stored == "float32"]
        found = []
        for dtype in wanted:
            if dtype in dtypes:
                step = Step(ggml, case, dtype, threads)
                name = f"ggml flash attention, {FORMATS[dtype][0]}"
                found.append(decode.Way(Candidate(name, step), dtype, step.stored_bytes))
        return found

    return ggml.version, ways


if __name__ == "__main__":
    sys.exit(external.main("ggml", GRID, load))
