"""The same bits in every run: on any number of threads, from many callers at once, in a forked child."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import longattn as la
from random_arrays import BF16, F32, normal, qkv
from running import on_threads

SHAPES = {
    "decode": {"heads": 8, "kv_heads": 2, "rows": 1, "keys": 20_011, "dim": 64},
    "decode, one head": {"heads": 1, "kv_heads": 1, "rows": 1, "keys": 30_000, "dim": 40},
    "chunk": {"batch": 2, "heads": 4, "kv_heads": 1, "rows": 37, "keys": 5_000, "dim": 32},
    "prefill": {"heads": 4, "kv_heads": 2, "rows": 700, "keys": 700, "dim": 64},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_attention(rng, isa, shape, dtype):
    q, k, v = qkv(rng, **SHAPES[shape], q_dtype=dtype)
    results = on_threads(lambda: la.attention(q, k, v, causal=True, return_lse=True), (1, 2, 1, 2, 3))
    for out, lse in results[1:]:
        np.testing.assert_array_equal(out.view(np.uint8), results[0][0].view(np.uint8))
        np.testing.assert_array_equal(lse.view(np.uint8), results[0][1].view(np.uint8))


def test_varlen_and_merge(rng, isa):
    lengths = np.array([0, 1, 300, 301, 1000])
    q, k, v = (normal(rng, (1000, heads, 32)) for heads in (4, 2, 2))

    def run():
        out, lse = la.attention_varlen(q, k, v, lengths, lengths, causal=True, return_lse=True)
        return la.merge([(out, lse.T), (2 * out, lse.T + 1)])

    one, two = on_threads(run, (1, 2))
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a.view(np.uint8), b.view(np.uint8))


def test_callers_on_many_threads(rng):
    problems = [qkv(rng, rows=rows, keys=600, dim=40) for rows in (1, 20, 300)] * 4
    expected = [la.attention(*problem, causal=True) for problem in problems]
    with ThreadPoolExecutor(4) as callers:
        results = list(callers.map(lambda problem: la.attention(*problem, causal=True), problems))
    for out, one in zip(results, expected, strict=True):
        np.testing.assert_array_equal(out, one)


FORK = """
import os
import numpy as np
import longattn as la
q, k, v = np.random.default_rng(0).standard_normal((3, 8, 400, 64), dtype=np.float32)
expected = la.attention(q, k, v)
child = os.fork()
same = np.array_equal(la.attention(q, k, v), expected)
if child == 0:
    os._exit(0 if same else 1)
assert same and os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_forked_child():
    subprocess.run([sys.executable, "-c", FORK], check=True, timeout=60)
