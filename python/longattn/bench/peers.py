"""torch's ways to attention on a CPU, over the same memory as longattn's arrays."""

from __future__ import annotations

import warnings
from contextlib import suppress
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

import longattn as la
from longattn.bench.harness import Candidate

ENABLE_GQA = "torch SDPA, enable_gqa"
DEFAULT_DECODE = (ENABLE_GQA, "torch SDPA")
"""What a user calls who takes torch's defaults, with and without query groups."""
COPIES = ("torch SDPA, repeat_interleave", "torch matmul, repeat_interleave")
"""Ways that first copy keys and values for every query head of the group."""


def tensor(array: NDArray[Any]) -> Any:
    """A torch tensor that shares the array's memory."""
    import torch

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # nothing writes
        if array.dtype == np.dtype(ml_dtypes.bfloat16):
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)


def to_numpy(result: Any) -> NDArray[np.float32]:
    """float32 copy of a candidate's result, array or tensor."""
    if isinstance(result, np.ndarray):
        return result.astype(np.float32)
    array: NDArray[np.float32] = result.float().numpy()
    return array


def decode(q: NDArray[Any], k: NDArray[Any], v: NDArray[Any]) -> list[Candidate]:
    """Ways to one query row per head: q `[1, Hq, 1, D]`, k and v `[1, Hkv, N, D]`."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    tq, tk, tv = tensor(q), tensor(k), tensor(v)
    _, heads, _, dim = q.shape
    kv_heads = k.shape[1]
    group = heads // kv_heads
    # The group's query rows as rows of one matrix: each K/V byte is read once.
    folded = tq.view(1, kv_heads, group, dim)

    def sdpa_folded() -> Any:
        return sdpa(folded, tk, tv).reshape(1, heads, 1, dim)

    def sdpa_gqa() -> Any:
        return sdpa(tq, tk, tv, enable_gqa=True)

    def sdpa_repeated() -> Any:
        return sdpa(tq, tk.repeat_interleave(group, 1), tv.repeat_interleave(group, 1))

    def matmul_folded() -> Any:
        weights = torch.softmax(torch.matmul(folded, tk.mT).float() * dim**-0.5, -1).to(tv.dtype)
        return torch.matmul(weights, tv).reshape(1, heads, 1, dim)

    def matmul_repeated() -> Any:
        keys, values = tk.repeat_interleave(group, 1), tv.repeat_interleave(group, 1)
        weights = torch.softmax(torch.matmul(tq, keys.mT).float() * dim**-0.5, -1).to(values.dtype)
        return torch.matmul(weights, values)

    ways = [
        Candidate(DEFAULT_DECODE[group == 1], sdpa_gqa),
        Candidate("torch matmul, group folded", matmul_folded),
    ]
    if group > 1:
        ways += [
            Candidate("torch SDPA, group folded", sdpa_folded),
            Candidate(COPIES[0], sdpa_repeated),
            Candidate(COPIES[1], matmul_repeated),
        ]
    return ways


def prefill(q: NDArray[Any], k: NDArray[Any], v: NDArray[Any]) -> list[Candidate]:
    """Ways to causal attention of a whole sequence: q, k, v `[1, H, N, D]`."""
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    tq, tk, tv = tensor(q), tensor(k), tensor(v)
    return [Candidate("torch SDPA", lambda: sdpa(tq, tk, tv, is_causal=True))]


def sparse(q: NDArray[Any], k: NDArray[Any], v: NDArray[Any], mask: la.BlockMask, *, masked: bool) -> list[Candidate]:
    """Ways to attention over square blocks of keys, `[1, H, N, D]`; `masked`: also with a mask of all pairs."""
    import torch
    from torch.nn.attention.flex_attention import BlockMask, flex_attention
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    tq, tk, tv = tensor(q), tensor(k), tensor(v)
    block = mask.block_k
    dense = torch.from_numpy(mask.blocks())
    counts = dense.sum(dim=-1, dtype=torch.int32)
    order = torch.argsort(dense.to(torch.int8), dim=-1, descending=True, stable=True).to(torch.int32)

    def kept(b: Any, h: Any, i: Any, j: Any) -> Any:
        return dense[0, h, i // block, j // block]

    blocks = BlockMask.from_kv_blocks(
        torch.zeros_like(counts), torch.zeros_like(order), counts, order, BLOCK_SIZE=(block, block), mask_mod=kept,
        seq_lengths=mask.lengths,
    )  # fmt: skip
    # Another block size or dtype would be compiled for any shape, which fails on a CPU.
    compiled = torch.compile(flex_attention, dynamic=False)

    def flex() -> Any:
        return compiled(tq, tk, tv, block_mask=blocks)

    # Compiled by a call that is not timed; what it fails with comes again.
    with suppress(RuntimeError):
        flex()
    ways = [Candidate("torch flex_attention", flex)]
    if masked:
        pairs = torch.repeat_interleave(torch.repeat_interleave(dense, block, 2), block, 3)
        pairs = pairs[:, :, : q.shape[2], : k.shape[2]]
        ways.append(Candidate("torch SDPA, masked", lambda: sdpa(tq, tk, tv, attn_mask=pairs)))
    return ways
