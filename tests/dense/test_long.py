"""131,072 keys against a float64 oracle that goes through them in blocks, and stopping long work."""

import _thread
import signal
import threading
import time

import numpy as np
import pytest

import longattn as la
import tolerances
from longattn.reference import dense as reference
from random_arrays import BF16, qkv

KEYS = 131_072


def blockwise(q, k, v, block=16_384):
    """Causal attention of the last rows: only the last block needs the mask."""
    last = KEYS - block
    parts = [
        reference.attention(q, k[:, :, n : n + block], v[:, :, n : n + block], causal=n == last, return_lse=True)
        for n in range(0, KEYS, block)
    ]
    return reference.merge(parts)


def test_131072_keys(rng, threads):
    """Flat heads, peaked heads, and a key near the end that takes half of the mass."""
    q, k, v = qkv(rng, heads=4, kv_heads=2, rows=3, keys=KEYS, dim=64, value_dim=32, q_dtype=BF16)
    q[0, 1] *= np.asarray(6, BF16)
    k[0, 1, -5] = np.asarray(8 * np.log(KEYS) / 64, BF16) * q[0, 3, 1]
    out, lse = la.attention(q, k, v, causal=True, return_lse=True)
    expected, expected_lse = blockwise(q, k, v)
    tolerances.attention(q, k, v).check(out, expected, lse, expected_lse)


def test_ctrl_c_stops_long_work(rng):
    """An interrupt ends, within a second or so, what would take a minute."""
    q, k, v = qkv(rng, heads=16, kv_heads=16, rows=16_384, keys=16_384, dim=128, q_dtype=BF16)
    timer = threading.Timer(0.3, _thread.interrupt_main)
    # Processes in the background may have been started without a handler.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        timer.start()
        begin = time.perf_counter()
        with pytest.raises(KeyboardInterrupt):
            la.attention(q, k, v)
        assert time.perf_counter() - begin < 5
        timer.join()
    finally:
        signal.signal(signal.SIGINT, handler)
    small = [x[:, :, :10] for x in (q, k, v)]  # and the library goes on
    assert np.isfinite(np.asarray(la.attention(*small), np.float32)).all()
