"""Kernels compile for every architecture within the limits of a table: registers, spills, needed instructions."""

import json
from pathlib import Path

import pytest

from gpu import nvrtc
from longattn.gpu._sources import NAMES, source

#: By the longest prefix of a kernel's name.
LIMITS = json.loads((Path(__file__).parent / "kernels.json").read_text())

pytestmark = pytest.mark.skipif(not nvrtc.available(), reason="NVRTC is not installed: pip install --group gpu-check")


def limits_of(kernel):
    fitting = [prefix for prefix in LIMITS if kernel.startswith(prefix)]
    assert fitting, f"{kernel}: no limits in kernels.json"
    return LIMITS[max(fitting, key=len)]


@pytest.mark.parametrize("architecture", nvrtc.ARCHITECTURES)
@pytest.mark.parametrize("name", NAMES)
def test_kernels_keep_their_limits(name, architecture):
    text = source(name)
    kernels = nvrtc.compiled(name, text, architecture)
    assert kernels
    for kernel, made in kernels.items():
        limits = limits_of(kernel)
        assert made.registers <= limits["registers"], kernel
        assert made.spilled <= limits["spilled"], kernel
        if not made.instructions:  # without cuobjdump
            continue
        for mnemonic in limits["has"]:
            assert made.count(mnemonic) > 0, f"{kernel} has no {mnemonic}"
        for mnemonic in limits["not"]:
            assert made.count(mnemonic) == 0, f"{kernel} has {mnemonic}"


def test_every_limit_is_of_some_kernel():
    kernels = {kernel for name in NAMES for kernel in nvrtc.compiled(name, source(name), "sm_90")}
    for prefix in LIMITS:
        assert any(kernel.startswith(prefix) for kernel in kernels), prefix


def test_a_text_that_does_not_compile_is_an_error():
    with pytest.raises(RuntimeError, match="undefined"):
        nvrtc.compiled("wrong", 'extern "C" __global__ void f() { nothing(); }', "sm_90")
