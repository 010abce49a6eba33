"""Any head size from 4 to 1,024, odd ones among them, and values of another width."""

import pytest

import longattn as la
import tolerances
from longattn.reference import dense as reference
from random_arrays import BF16, F16, F32, qkv

#: Head size and width of the values.
SIZES = [
    (4, 9),
    (5, 3),
    (7, 64),
    (12, 31),
    (33, 17),
    (80, 96),
    (96, 80),
    (160, 40),
    (192, 128),
    (255, 257),
    (512, 64),
    (576, 512),
    (1024, 1000),
    (64, 1024),
]


@pytest.mark.parametrize(("dim", "value_dim"), SIZES, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 21], ids=["decode", "few rows", "prefill"])
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
def test_head_sizes(rng, isa, *, dim, value_dim, rows, dtype):
    q, k, v = qkv(
        rng, heads=4, kv_heads=2, rows=rows, keys=67, dim=dim, value_dim=value_dim, q_dtype=F32, kv_dtype=dtype
    )
    out, lse = la.attention(q, k, v, causal=True, return_lse=True)
    expected, expected_lse = reference.attention(q, k, v, causal=True, return_lse=True)
    tolerances.attention(q, k, v).check(out, expected, lse, expected_lse)


@pytest.mark.parametrize(("dim", "value_dim"), SIZES, ids=str)
def test_steps_are_the_prefill(rng, isa, dim, value_dim):
    q, k, v = qkv(rng, heads=4, kv_heads=1, rows=12, keys=40, dim=dim, value_dim=value_dim)
    whole, whole_lse = la.attention(q, k, v, causal=True, return_lse=True)
    tolerance = tolerances.same_storage(q, k, v)
    for row, seen in ((0, 29), (5, 34), (11, 40)):
        one = q[:, :, row : row + 1], k[:, :, :seen], v[:, :, :seen]
        step, lse = la.attention(*one, causal=True, return_lse=True)
        tolerance.check(step, whole[:, :, row : row + 1], lse, whole_lse[:, :, row : row + 1])
