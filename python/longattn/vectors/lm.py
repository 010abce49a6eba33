"""Queries, keys and values of the demo language model's full layers, while it looks for needles and reads on.

The context is 131,072 tokens of held-out source text with needles in it. Half of the query groups are decode
steps that answer a question (its last token and the answer's digits), half read ordinary text that follows.
The few tokens of the question itself are not among the keys: every group asks the same context. Further
queries are those of the question's other tokens and of the text before those. The layers have no position
encoding. Cached (0.15 GB).
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

import longattn as la
from longattn.demo import runner, text
from longattn.vectors.recording import Arrays, Progress, Source

KEYS, NEEDLES, CHUNK = 131_072, 40, 1024
TEXT_QUERIES = 200
PREFILL_EVERY = 256
SEED = 11  # not a haystack that the demo shows


def key() -> str:
    """Another model, another recording."""
    weights = runner.MODEL / "model.safetensors"
    if not weights.is_file():
        raise FileNotFoundError(f"vectors 'lm': the demo model's weights are not at {weights}")
    return f"lm-v2-{hashlib.sha256(weights.read_bytes()).hexdigest()[:12]}"


def record(progress: Progress) -> tuple[Arrays, Mapping[str, Any]]:
    """Prefill the context exactly, then ask; some minutes on two cores."""
    model = runner.Model()
    session = runner.Session(model, KEYS + CHUNK)
    asked = _Tap()
    context = text.haystack(KEYS + CHUNK, NEEDLES, seed=SEED, clear_tail=CHUNK)

    for start in range(0, KEYS, CHUNK):
        progress(start, KEYS)
        session.forward(context.tokens[start : start + CHUNK], asked)
    progress(KEYS, KEYS)
    prefill = asked.take()[:, KEYS // 8 :: PREFILL_EVERY]
    keys, values = (
        np.concatenate([getattr(store, part) for store in session.stores.values()]) for part in ("keys", "values")
    )

    mark = session.mark()
    for needle in context.needles:
        session.forward(np.concatenate([needle.question, text.tokens(needle.code[:-1])]), asked)
        asked.keep_last(2 * len(needle.code))
        session.rewind(mark)
    questions = asked.take()
    questions = questions.reshape(len(questions), len(context.needles), 2, -1, *questions.shape[2:])
    before, answers = (questions[:, :, i].reshape(len(questions), -1, *questions.shape[4:]) for i in range(2))
    session.forward(context.tokens[KEYS:], asked)
    text_before, ordinary = np.split(asked.take(), [-TEXT_QUERIES], axis=1)

    arrays = {
        "keys": keys,
        "values": values,
        "queries": np.concatenate([answers, ordinary], 1),
        "prefill_queries": prefill,
        "further_queries": np.concatenate([before, text_before], 1),
    }
    kept = {name: array.astype(np.float16) for name, array in arrays.items()}
    if not all(np.isfinite(array).all() for array in kept.values()):
        raise OverflowError("the model's activations do not fit into float16")
    heads = [f"{layer}.{i}" for layer in session.stores for i in range(model.kv_heads)]
    return kept, {
        "heads": heads,
        "versions": {"python": platform.python_version(), "longattn": la.__version__},
    }


class _Tap:
    """Exact attention that keeps the queries of every full layer."""

    def __init__(self) -> None:
        self._kv_heads = 0
        self._seen: dict[int, list[NDArray[np.float32]]] = {}

    def __call__(self, layer: int, q: NDArray[np.float32], store: Any) -> NDArray[np.float32]:
        self._kv_heads = store.kv_heads
        self._seen.setdefault(layer, []).append(q.copy())
        out: NDArray[np.float32] = la.attention(q, store.keys, store.values, causal=True)
        return out

    def keep_last(self, count: int) -> None:
        """Forgets all but the last `count` queries of the newest call."""
        for calls in self._seen.values():
            calls[-1] = calls[-1][:, -count:]

    def take(self) -> NDArray[np.float32]:
        """What was seen since the last time, `[layers * kv_heads, positions, group, head_dim]`."""
        layers = [np.concatenate(calls, 1) for _, calls in sorted(self._seen.items())]
        self._seen = {}
        return np.concatenate([q.reshape(self._kv_heads, -1, *q.shape[1:]).transpose(0, 2, 1, 3) for q in layers])


SOURCE = Source(name="lm", key=key, default_heads=None, record=record)
