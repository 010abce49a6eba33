"""Exact attention over numpy arrays: prefill, decode from a growing store, and a merge of two halves.

    python examples/numpy_attention.py

Needs numpy only (longattn brings it along). The results are checked against the formula in float64.
"""

from __future__ import annotations

import numpy as np

import longattn as la
from longattn.reference import dense as reference

HEADS, KV_HEADS, DIM = 8, 2, 64
PROMPT, STEPS = 1000, 4


def main() -> None:
    rng = np.random.default_rng(0)
    q = rng.standard_normal((HEADS, PROMPT + STEPS, DIM), dtype=np.float32)
    k, v = rng.standard_normal((2, KV_HEADS, PROMPT + STEPS, DIM), dtype=np.float32)
    expected = reference.attention(q, k, v, causal=True)

    # Keys and values live in a store: it reserves address space for `capacity` rows and uses memory as they come.
    store = la.KVStore(kv_heads=KV_HEADS, head_dim=DIM, dtype="float32", capacity=1 << 20)

    # Prefill. store.keys and store.values are arrays over the store's own memory, nothing is copied.
    store.append(k[:, :PROMPT], v[:, :PROMPT])
    prompt = la.attention(q[:, :PROMPT], store.keys, store.values, causal=True)
    print(f"prefill of {PROMPT} rows: error {np.abs(prompt - expected[:, :PROMPT]).max():.1e}")

    # Decode: append a row, attend from it. Causality is aligned at the end, so the last query sees the last key.
    for step in range(PROMPT, PROMPT + STEPS):
        now = slice(step, step + 1)
        store.append(k[:, now], v[:, now])
        out = la.attention(q[:, now], store.keys, store.values, causal=True)
        print(f"decode of row {step}: error {np.abs(out - expected[:, now]).max():.1e}")

    # Two halves of the keys, attended apart and merged by their log-sum-exp.
    last, half = q[:, -1:], len(store) // 2
    parts = [
        la.attention(last, store.keys[:, rows], store.values[:, rows], return_lse=True)
        for rows in (slice(0, half), slice(half, None))
    ]
    out, _ = la.merge(parts)
    print(f"two halves merged: error {np.abs(out - expected[:, -1:]).max():.1e}")


if __name__ == "__main__":
    main()
