"""Kernels compiled for a device that need not be there: NVRTC by ctypes, ptxas' report, instructions from cuobjdump."""

from __future__ import annotations

import ctypes
import hashlib
import json
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from emu.emulator import cached

ARCHITECTURES = ("sm_80", "sm_90", "sm_120")


@dataclass(frozen=True)
class Compiled:
    """What became of a kernel.

    Attributes:
        registers: of a thread.
        spilled: bytes that a thread stores and loads because registers ran out.
        instructions: how often each mnemonic, with its modifiers, stands in the machine code; empty without cuobjdump.
    """

    registers: int
    spilled: int
    instructions: Counter[str]

    def count(self, prefix: str) -> int:
        """Instructions that begin like this."""
        return sum(n for name, n in self.instructions.items() if name.startswith(prefix))


@cache
def _folder() -> Path | None:
    try:
        import nvidia.cu13
    except ImportError:
        return None
    return Path(next(iter(nvidia.cu13.__path__)))


def available() -> bool:
    """Whether the NVRTC wheel of CUDA 13 is installed (`pip install --group gpu-check`)."""
    folder = _folder()
    return folder is not None and any((folder / "lib").glob("libnvrtc.so.13"))


@cache
def _library() -> ctypes.CDLL:
    folder = _folder()
    assert folder is not None
    for builtins in (folder / "lib").glob("libnvrtc-builtins.so.13.*"):
        ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(folder / "lib" / "libnvrtc.so.13"))


@cache
def compiled(name: str, text: str, architecture: str) -> dict[str, Compiled]:
    """Every kernel of a source text, compiled as CuPy would for this architecture; what was found is kept on disk.

    Raises:
        RuntimeError: NVRTC refuses the text; holds its log.
    """
    library = next(iter((_folder() / "lib").glob("libnvrtc.so.13"))).stat()
    key = "|".join((name, text, architecture, str((library.st_size, library.st_mtime_ns)), _tool_name()))

    def write(to: Path) -> None:
        made = _compile(name, text, architecture)
        to.write_text(json.dumps({kernel: (c.registers, c.spilled, c.instructions) for kernel, c in made.items()}))

    kept = cached(f"nvrtc-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json", write)
    found = json.loads(kept.read_text())
    return {
        kernel: Compiled(registers, spilled, Counter(names)) for kernel, (registers, spilled, names) in found.items()
    }


def _compile(name: str, text: str, architecture: str) -> dict[str, Compiled]:
    library, program = _library(), ctypes.c_void_p()
    library.nvrtcCreateProgram(ctypes.byref(program), text.encode(), f"{name}.cu".encode(), 0, None, None)
    options = [f"-arch={architecture}", "-std=c++17", "-ftz=true", "--ptxas-options=-v"]
    code = library.nvrtcCompileProgram(
        program, len(options), (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    )

    def fetch(what: str) -> bytes:
        size = ctypes.c_size_t()
        getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value + 1)
        getattr(library, f"nvrtcGet{what}")(program, buffer)
        return buffer.raw[: size.value]

    log = fetch("ProgramLog").decode(errors="replace")
    if code:
        raise RuntimeError(f"{name} for {architecture}:\n{log[:4000]}")
    instructions = _instructions(fetch("CUBIN"))
    library.nvrtcDestroyProgram(ctypes.byref(program))
    found = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
        log,
        re.DOTALL,
    )
    return {
        kernel: Compiled(int(registers), int(stores) + int(loads), instructions.get(kernel, Counter()))
        for kernel, stores, loads, registers in found
    }


def _tool_name() -> str:
    """Of cuobjdump, or nothing where it is not installed."""
    folder = _folder()
    tool = folder / "bin" / "cuobjdump" if folder else None
    return "" if tool is None or not tool.exists() else str(tool)


def _instructions(cubin: bytes) -> dict[str, Counter[str]]:
    """Mnemonics of every function of a cubin; nothing where cuobjdump is not installed."""
    tool = _tool_name()
    if not tool:
        return {}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=True).stdout
    found = {}
    for part in re.split(r"\n\s*Function : ", text)[1:]:
        name = part.split(None, 1)[0]
        found[name] = Counter(re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9_.]+)", part))
    return found
