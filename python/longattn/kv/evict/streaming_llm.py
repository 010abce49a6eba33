"""StreamingLLM: the first rows and the last ones."""

from __future__ import annotations

from typing import Any

import numpy as np

from longattn._arrays import Array, as_numpy, like
from longattn._checks import integer, per_head, shape_of
from longattn.dense.attention import attention
from longattn.kv.evict.policy import Mask, Policy
from longattn.methods import Method
from longattn.reference import kv as reference


class StreamingLLM(Policy):
    """Keeps the first `sinks` rows and the last `window`: what many heads attend to whatever the text.

    A query at position `i` sees key `j` iff `j < sinks` or `i - j < window`, in prompts as in steps. Keys keep the
    rotation of their own positions; the paper's alternative, positions counted inside the cache, would have keys
    stored unrotated.

    Args:
        sinks: first rows that are kept.
        window: last rows that are kept, the query's own among them.

    Raises:
        TypeError: a number is no integer.
        ValueError: a window below 1, or sinks below 0.

    References:
        G. Xiao, Y. Tian, B. Chen, S. Han, M. Lewis, "Efficient Streaming Language Models with Attention Sinks", 2023,
        arXiv:2309.17453.
    """

    def __init__(self, sinks: int = 4, window: int = 1020) -> None:
        self.sinks = integer(sinks, "sinks", 0)
        self.window = integer(window, "window", 1)

    def capacity(self, prompt: int) -> int:
        """`sinks + window`."""
        return self.sinks + self.window

    def prefill(self, q: Array, k: Array, v: Array, options: dict[str, Any], **info: Any) -> tuple[Array, Mask | None]:
        """Sink and window attention over the prompt."""
        given = {name: options[name] for name in ("scale", "softcap")}
        out = sink_window_attention(q, k, v, self.sinks, self.window, sink_logits=options.get("sinks"), **given)
        return out, self.keep(q, k, options)

    def keep(self, q: Array, k: Array, options: dict[str, Any]) -> Mask | None:
        """What the next row may see."""
        heads, length = k.shape[0], k.shape[1]
        j = np.arange(length)
        return np.broadcast_to((j < self.sinks) | (j > length - self.window), (heads, length))

    def choose(self, step: int) -> Mask | None:
        """The row that leaves the window."""
        return self.live & (self.positions >= self.sinks) & (self.positions <= step + 1 - self.window)


def sink_window_attention(
    q: Array,
    k: Array,
    v: Array,
    sinks: int,
    window: int,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    sink_logits: Array | None = None,
) -> Array:
    """Causal attention over the first `sinks` keys and the last `window`, in one softmax.

    Args:
        q: queries `[B, Hq, Lq, D]`, or `[Hq, Lq, D]`, those of the last `Lq` keys; float32, float16 or bfloat16.
        k: keys `[B, Hkv, Lk, D]`, or `[Hkv, Lk, D]`; likewise.
        v: values `[B, Hkv, Lk, Dv]`, or `[Hkv, Lk, Dv]`; dtype of `k`.
        sinks: first keys that every later query sees.
        window: last keys that a query sees, its own among them.
        scale: factor on the dot products; `None` is `D ** -0.5`.
        softcap: as in `longattn.attention`.
        sink_logits: floating `[Hq]`, as `sinks` of `longattn.attention`.

    Returns:
        The output, in the shape, kind and dtype of `q` (last axis `Dv`).

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        `Hq * Lq * (sinks + window) * (D + Dv)` multiply-adds.
    """
    sinks, window = integer(sinks, "sinks", 0), integer(window, "window", 1)
    for x, name in ((q, "q"), (k, "k"), (v, "v")):
        if len(shape_of(x, name)) not in (3, 4):
            raise ValueError(f"{name}: got shape {shape_of(x, name)}, expected rank 3 or 4")
    if sink_logits is not None:
        per_head(sink_logits, "sink_logits", q.shape[-3])
    rows, keys = q.shape[-2], k.shape[-2]
    options: dict[str, Any] = {"scale": scale, "softcap": softcap}
    if sinks == 0 or keys <= sinks:
        sides = (-1, -1) if sinks else (window - 1, -1)
        return attention(q, k, v, causal=True, window=sides, sinks=sink_logits, **options)
    # Queries up to the last sink see sinks only; those after it all of them, and a window of the others.
    early = min(max(sinks - (keys - rows), 0), rows)
    tail = q[..., early:, :]
    first_keys, first_values = k[..., :sinks, :], v[..., :sinks, :]
    # In float32, so that the part is not rounded before it is merged.
    wide = as_numpy(tail, "q").astype(np.float32)
    first = attention(wide, as_numpy(first_keys, "k"), as_numpy(first_values, "v"), return_lse=True, **options)
    rest = attention(
        tail,
        k[..., sinks:, :],
        v[..., sinks:, :],
        causal=True,
        window=(window - 1, -1),
        state=first,
        sinks=sink_logits,
        **options,
    )
    if early == 0:
        return rest
    head = attention(q[..., :early, :], first_keys, first_values, causal=True, sinks=sink_logits, **options)
    return like(q, np.concatenate([as_numpy(head, "out"), as_numpy(rest, "out")], axis=-2))


METHOD = Method(
    name="streaming_llm",
    family="kv",
    title="Efficient Streaming Language Models with Attention Sinks",
    year=2023,
    arxiv="2309.17453",
    function=StreamingLLM,
    reference=reference.StreamingLLM,
    exact=False,
    modes=frozenset({"causal", "self"}),
    gqa=True,
    checks=(
        "Steps and prefill give attention with the mask of sinks and window.",
        "A window as long as the text gives dense attention.",
        "The kept rows are the first `sinks` and the last `window` at every step.",
        "With a mean row, the result is attention over the kept rows and so many copies of the mean of the others.",
    ),
    tests="tests/kv/test_streaming_llm.py",
    cost="A step reads `sinks + window` rows; bookkeeping is one comparison per slot.",
)
