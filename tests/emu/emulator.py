"""The emulator from Python: compiles a kernel source for the CPU, starts its kernels, raises what the checks found."""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.array_utils import byte_bounds

HERE = Path(__file__).parent
PARTS = ("schedule.cpp", "warp.cpp", "check.cpp")
HEADERS = ("emulator.h", "runtime.h")
#: Thread orders: forwards, backwards, shuffled.
ORDERS = (0, 1, 2)

_FLAGS = ("-std=c++17", "-O2", "-g1", "-fPIC", "-ffp-contract=off", "-DLONGATTN_EMULATOR", f"-I{HERE}")
# The pragmas and attributes of device code.
_KERNEL_FLAGS = (*_FLAGS, "-w", "-fsanitize=thread", "--param", "tsan-instrument-func-entry-exit=0")
_LETTERS = {"f": np.float32, "i": np.int32, "u": np.uint32, "l": np.int64}
_MESSAGE_BYTES = 512


class EmulatorError(RuntimeError):
    """A kernel did what no kernel may do; the message has a line for each finding."""


def available() -> bool:
    """Whether this machine can compile and run kernels: an x86-64 Linux with g++."""
    return os.uname().machine == "x86_64" and shutil.which("g++") is not None


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:1])} failed:\n{done.stderr[-4000:]}")


def cached(key: str, make: Any) -> Path:
    """A file made once for a key, safe beside other processes."""
    folder = Path(
        os.environ.get("LONGATTN_EMULATOR_CACHE", Path(tempfile.gettempdir()) / f"longattn-emulator-{os.getuid()}")
    )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / key
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=folder) as made:
            make(Path(made) / key)
            (Path(made) / key).replace(path)
    return path


@cache
def _runtime() -> tuple[Path, ...]:
    """Object files of the emulator itself."""
    text = b"".join((HERE / name).read_bytes() for name in (*HEADERS, *PARTS))
    digest = hashlib.sha256(text).hexdigest()[:16]
    return tuple(
        cached(
            f"{Path(name).stem}-{digest}.o",
            lambda to, name=name: _run("g++", *_FLAGS, "-c", str(HERE / name), "-o", str(to)),
        )
        for name in PARTS
    )


class Module:
    """Kernels of one source text, compiled."""

    def __init__(self, text: str, *, defines: Sequence[str] = ()) -> None:
        flags = (*_KERNEL_FLAGS, *(f"-D{name}" for name in defines))
        runtime = _runtime()
        key = "|".join((*flags, *map(str, runtime), text))
        digest = hashlib.sha256(key.encode()).hexdigest()[:16]

        def compile_to(to: Path) -> None:
            source, compiled = to.with_suffix(".cu"), to.with_suffix(".o")
            source.write_text(text)
            _run("g++", *flags, "-x", "c++", "-c", str(source), "-o", str(compiled))
            _run("g++", "-shared", "-Wl,--no-undefined", str(compiled), *map(str, runtime), "-o", str(to))

        self.path = cached(f"kernels-{digest}.so", compile_to)
        self.library = ctypes.CDLL(str(self.path))
        self.library.emu_reports.restype = ctypes.c_char_p

    def kernel(self, name: str) -> Kernel:
        """The kernel of this name."""
        return Kernel(self, name)

    def kernels(self) -> set[str]:
        """The names of all."""
        symbols = subprocess.run(["nm", "-D", str(self.path)], capture_output=True, text=True, check=True).stdout
        return set(re.findall(r" emu_kernel_(\w+)", symbols))

    def place(self, report: str) -> str:
        """A report with the line of the source in place of an address."""
        text, _, address = report.rpartition(" @")
        if not text:
            return report
        lines = subprocess.run(
            ["addr2line", "-i", "-e", str(self.path), f"0x{int(address, 16) - 1:x}"],
            capture_output=True,
            text=True,
            check=False,
        ).stdout
        # Inlined from the inside out: the first line that is not the emulator's own.
        found = [m.group(1) for m in re.finditer(r"(?:kernels-\w+|\w+)\.cu:(\d+)", lines)]
        return f"{text}, line {found[-1] if found else '?'}"


class Kernel:
    """Started like a `cupy.RawKernel`: `kernel(grid, block, arguments, shared_mem=bytes)`."""

    def __init__(self, module: Module, name: str) -> None:
        self.module, self.name = module, name
        try:
            self.entry = getattr(module.library, f"emu_kernel_{name}")
            signature = getattr(module.library, f"emu_signature_{name}")
        except AttributeError:
            raise ValueError(f"no kernel {name!r} in this source") from None
        signature.restype = ctypes.c_char_p
        self.signature = signature().decode()
        #: 8 x 8 matrices loaded by the last launch, and how often banks made a load wait.
        self.matrix_loads = (0, 0)

    def _argument(self, i: int, letter: str, value: Any) -> Any:
        if letter == "p":
            if value is None:
                return ctypes.c_void_p(0)
            if not isinstance(value, np.ndarray):
                raise TypeError(f"{self.name}, argument {i}: got {type(value).__name__}, expected an array or None")
            low, high = byte_bounds(value)
            if value.size:
                self.module.library.emu_argument(
                    ctypes.c_void_p(low), ctypes.c_size_t(high - low), i, int(value.flags.writeable)
                )
            return ctypes.c_void_p(value.ctypes.data)
        expected = _LETTERS[letter]
        if type(value) is not expected:
            raise TypeError(
                f"{self.name}, argument {i}: got {type(value).__name__}, expected numpy.{expected.__name__}"
            )
        return np.array(value)

    def __call__(
        self,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        arguments: tuple[Any, ...],
        *,
        shared_mem: int = 0,
        order: int = 0,
        seed: int = 1,
    ) -> None:
        """Runs the grid.

        Raises:
            TypeError: an argument of another type than the kernel's parameter.
            ValueError: another number of arguments, or a grid that no device takes.
            EmulatorError: what the checks found.
        """
        grid, block = (*grid, 1, 1)[:3], (*block, 1, 1)[:3]
        if len(arguments) != len(self.signature):
            raise ValueError(f"{self.name}: got {len(arguments)} arguments, expected {len(self.signature)}")
        if min(grid) < 1 or max(grid[1:]) > 65535 or min(block) < 1 or np.prod(block) > 1024:
            raise ValueError(f"{self.name}: got grid {grid} and block {block}")
        library = self.module.library
        library.emu_reset()
        kept = [
            self._argument(i, letter, value)
            for i, (letter, value) in enumerate(zip(self.signature, arguments, strict=True))
        ]
        pointers = (ctypes.c_void_p * len(kept))(
            *(k.ctypes.data if isinstance(k, np.ndarray) else ctypes.addressof(k) for k in kept)
        )
        message = ctypes.create_string_buffer(_MESSAGE_BYTES)
        loads = (ctypes.c_ulong * 2)()
        failed = library.emu_launch(
            self.entry,
            pointers,
            (ctypes.c_uint * 3)(*grid),
            (ctypes.c_uint * 3)(*block),
            ctypes.c_size_t(shared_mem),
            order,
            seed,
            message,
            ctypes.c_size_t(_MESSAGE_BYTES),
            loads,
        )
        self.matrix_loads = (loads[0], loads[1])
        findings = [self.module.place(line) for line in library.emu_reports().decode().splitlines()]
        if failed:
            findings.append(message.value.decode(errors="replace"))
        if findings:
            raise EmulatorError(f"{self.name}: " + "; ".join(findings))
