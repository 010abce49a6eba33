"""Kernels compile for every architecture within the limits of a table: registers, spills, needed instructions."""

import json
import re
from pathlib import Path

import pytest

from gpu import nvrtc
from longattn.gpu._sources import NAMES, source

#: By the longest prefix of a kernel's name; with "options: " before it, of a kernel that looks at options of scores.
#: What stands under the name of an architecture holds there.
LIMITS = json.loads((Path(__file__).parent / "kernels.json").read_text())

pytestmark = pytest.mark.skipif(not nvrtc.available(), reason="NVRTC is not installed: pip install --group gpu-check")


def limits_of(name, kernel):
    prefixes = [f"options: {kernel}"] if name.endswith("_options") else []
    for full in (*prefixes, kernel):
        fitting = [prefix for prefix in LIMITS if full.startswith(prefix)]
        if fitting:
            return LIMITS[max(fitting, key=len)]
    raise AssertionError(f"{kernel}: no limits in kernels.json")


def kernels_of(name, architecture):
    """All of a source, but for float16, which takes the registers that bfloat16 takes: for one architecture."""
    text = source(name)
    if architecture != "sm_90":
        text = re.sub(r"^[A-Z_]+\(f16, \d+\)\n|^[A-Z_]+\(f16(, f16)?\)\n", "", text, flags=re.MULTILINE)
    return nvrtc.compiled(name, text, architecture)


@pytest.mark.parametrize("architecture", nvrtc.ARCHITECTURES)
@pytest.mark.parametrize("name", NAMES)
def test_kernels_keep_their_limits(name, architecture):
    kernels = kernels_of(name, architecture)
    assert kernels
    for kernel, made in kernels.items():
        limits = limits_of(name, kernel)
        limits = {**limits, **limits.get(architecture, {})}
        assert made.registers <= limits["registers"], kernel
        assert made.spilled <= limits["spilled"], kernel
        if not made.instructions:  # without cuobjdump
            continue
        for mnemonic in limits["has"]:
            assert made.count(mnemonic) > 0, f"{kernel} has no {mnemonic}"
        for mnemonic in limits["not"]:
            assert made.count(mnemonic) == 0, f"{kernel} has {mnemonic}"


def test_every_limit_is_of_some_kernel():
    used = [limits_of(name, kernel) for name in NAMES for kernel in nvrtc.compiled(name, source(name), "sm_90")]
    for prefix, limits in LIMITS.items():
        assert any(limits is one for one in used), prefix


def test_a_text_that_does_not_compile_is_an_error():
    with pytest.raises(RuntimeError, match="undefined"):
        nvrtc.compiled("wrong", 'extern "C" __global__ void f() { nothing(); }', "sm_90")
