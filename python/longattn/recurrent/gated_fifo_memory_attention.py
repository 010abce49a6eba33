"""Attention to everything, to the own chunk, and to a memory of slots that segments are written to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import Array, as_numpy, like
from longattn._checks import check_float_storage, check_floating, check_heads, flag, integer, one_of, real, scale_factor
from longattn._rotary import turned
from longattn.dense.attention import attention
from longattn.dense.attention_varlen import attention_varlen
from longattn.kv import KVStore
from longattn.methods import Method
from longattn.reference import recurrent as reference

Pooling = Literal["mean", "last"]
Combine = Literal["sum", "softmax", "sigmoid"]
Float32 = NDArray[np.float32]


def gated_fifo_memory_attention(
    x: Array,
    wq: Array,
    wk: Array,
    wv: Array,
    memory_weights: tuple[Array, Array, Array, Array] | None = None,
    *,
    heads: int,
    wo: Array | None = None,
    slots: int = 16,
    memory: Array | None = None,
    chunk: int = 64,
    segment: int | None = None,
    previous_chunk: bool = False,
    use_global: bool = True,
    use_local: bool = True,
    pooling: Pooling = "mean",
    combine: Combine = "sum",
    branch_logits: Array | None = None,
    rope_base: float | None = None,
    scale: float | None = None,
    return_memory: bool = False,
) -> Any:
    """Up to three attentions of one layer, added up: to all tokens before, to those of the own chunk, and to a memory.

    The memory is a queue of slots as wide as tokens, read as tokens are, `softmax(scale * q (mem wk)^T) (mem wv)`.
    After each whole segment its summary `u` is written: with the oldest slot `s`,

        g = sigmoid(u wg + s ug + b),   new slot = g * tanh(u wu) + (1 - g) * s

    goes to the end of the queue, and `s` leaves it. A token reads the memory as the segments before its own left it.
    The paper names these parts and gives few formulas; what is open is settled here as follows: the projections of
    tokens serve the memory too, positions are in the queries and keys of tokens only, and branches are added up.

    Args:
        x: layer input `[B, L, E]`; float32, float16 or bfloat16.
        wq: query projection `[E, heads * D]`; any of the three dtypes.
        wk: key projection `[E, Hkv * D]`.
        wv: value projection `[E, Hkv * Dv]`.
        memory_weights: `(wg [E, E], ug [E, E], b [E], wu [E, E])`; needed with slots.
        heads: query heads.
        wo: output projection `[heads * Dv, Eo]`; `None` leaves the heads side by side.
        slots: slots of the memory; 0 is no memory.
        memory: the slots before the first token, floating `[B, slots, E]`, oldest first; `None` is zeros.
        chunk: tokens of a chunk of the local attention, which is causal.
        segment: tokens of a segment that is written to memory; `None` is `chunk`. A segment that is not whole at the
            end is not written.
        previous_chunk: the chunk before is seen as well.
        use_global: whether there is a branch to all tokens before.
        use_local: whether there is a branch to the own chunk.
        pooling: a segment's summary is the mean of its tokens, or the last.
        combine: branches are added up as they are (`"sum"`), weighted by the softmax of their logits, or each by the
            sigmoid of its logit.
        branch_logits: floating `[3]` or `[heads, 3]`, for global, local and memory; `None` is zeros.
        rope_base: base of rotary positions of queries and keys, pairs being dimensions `d` and `d + D / 2`; `None` is
            no positions.
        scale: factor on the logits; `None` is `D ** -0.5`.
        return_memory: also return the slots after the last whole segment.

    Returns:
        `[B, L, heads * Dv]`, or `[B, L, Eo]` with `wo`, in the kind and dtype of `x`; with `return_memory` the pair
        with the slots, float32 `[B, slots, E]`. Projections and branches are float32.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit, or no branch at all.

    Cost:
        `heads * L * (L / 2 + chunk / 2 + slots) * (D + Dv)` multiply-adds per sequence, the projections, those of
        `slots` rows per segment among them, and `4 * E * E` per segment to write.

    References:
        A. Kashyap, "Recurrent Memory-Augmented Transformers with Chunked Attention for Long-Context Language Modeling",
        2025, arXiv:2507.00453.

    Example:
        >>> import numpy as np, longattn.recurrent
        >>> rng = np.random.default_rng(0)
        >>> x = rng.standard_normal((1, 100, 32), dtype=np.float32)
        >>> wq, wk, wv, wg, ug, wu = rng.standard_normal((6, 32, 32), dtype=np.float32) * 0.2
        >>> weights = (wg, ug, np.zeros(32, np.float32), wu)
        >>> call = longattn.recurrent.gated_fifo_memory_attention
        >>> call(x, wq, wk, wv, weights, heads=4, slots=3, chunk=16).shape
        (1, 100, 32)
    """
    xn = as_numpy(x, "x")
    check_float_storage(xn, "x")
    if xn.ndim != 3:
        raise ValueError(f"x: got shape {xn.shape}, expected [B, L, E]")
    layer = _layer(
        xn.shape[2], wq, wk, wv, memory_weights, heads=heads, wo=wo, slots=slots, chunk=chunk, segment=segment,
        previous_chunk=previous_chunk, use_global=use_global, use_local=use_local, pooling=pooling, combine=combine,
        branch_logits=branch_logits, rope_base=rope_base, scale=scale,
    )  # fmt: skip
    return_memory = flag(return_memory, "return_memory")
    batch, length, _ = xn.shape
    memories = _first_memory(memory, (batch, layer.slots, xn.shape[2]))
    wide = np.asarray(xn, np.float32)
    flat = np.zeros((batch, length, layer.heads * layer.value_dim), np.float32)
    for b in range(batch):
        states, memories[b] = _states(wide[b], memories[b].copy(), layer)
        if length:
            flat[b] = _branches(wide[b], states, layer)
    result = flat if layer.wo is None else flat @ layer.wo
    output = like(x, result.astype(xn.dtype, copy=False))
    return (output, like(x, memories)) if return_memory else output


class GatedFifoMemory:
    """Step form of `gated_fifo_memory_attention`, of one sequence: keys and values of all tokens, and the memory.

    Args:
        width: width of a token, `E`.
        wq: as in `gated_fifo_memory_attention`.
        wk: as in `gated_fifo_memory_attention`.
        wv: as in `gated_fifo_memory_attention`.
        memory_weights: as in `gated_fifo_memory_attention`.
        capacity: most tokens.
        options: the other arguments of `gated_fifo_memory_attention`, `heads` among them; not `memory` and
            `return_memory`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.
    """

    def __init__(
        self,
        width: int,
        wq: Array,
        wk: Array,
        wv: Array,
        memory_weights: tuple[Array, Array, Array, Array] | None = None,
        *,
        capacity: int = 1 << 20,
        **options: Any,
    ) -> None:
        size = integer(width, "width", 1)
        self._layer = _layer(size, wq, wk, wv, memory_weights, **options)
        layer = self._layer
        self._store = KVStore(layer.kv_heads, layer.dim, layer.value_dim, "float32", integer(capacity, "capacity", 1))
        self._memory = np.zeros((layer.slots, size), np.float32)
        self._pending = np.zeros((0, size), np.float32)  # tokens of the unfinished segment
        self._slots = _projected(self._memory, layer)

    def append(self, x: Array) -> Array:
        """Appends tokens and returns their output.

        Args:
            x: `[T, E]`; float32, float16 or bfloat16.

        Returns:
            `[T, heads * Dv]` or `[T, Eo]`, in the kind and dtype of `x`.

        Raises:
            TypeError: an argument of another kind or dtype.
            ValueError: another shape, or more tokens than the capacity leaves.
        """
        xn = as_numpy(x, "x")
        check_float_storage(xn, "x")
        if xn.ndim != 2 or xn.shape[1] != self._memory.shape[1]:
            raise ValueError(f"x: got shape {xn.shape}, expected [T, {self._memory.shape[1]}]")
        layer, wide = self._layer, np.asarray(xn, np.float32)
        if len(self._store) + len(wide) > self._store.capacity:
            raise ValueError(f"x: got {len(wide)} tokens after {len(self)}, expected at most {self._store.capacity}")
        flat = np.zeros((len(wide), layer.heads * layer.value_dim), np.float32)
        at = 0
        while at < len(wide):
            start = len(self._store)
            # No further than the ends of the chunk and of the segment.
            stop = at + min(layer.chunk - start % layer.chunk, layer.segment - len(self._pending), len(wide) - at)
            flat[at:stop] = self._run(wide[at:stop])
            at = stop
        result = flat if layer.wo is None else flat @ layer.wo
        return like(x, result.astype(xn.dtype, copy=False))

    def _run(self, x: Float32) -> Float32:
        """Tokens of one chunk and of one segment."""
        layer, start = self._layer, len(self._store)
        q = _split(x @ layer.wq, layer.heads)
        positions = np.arange(start, start + len(x))
        k, v = _split(x @ layer.wk, layer.kv_heads), _split(x @ layer.wv, layer.kv_heads)
        self._store.append(_placed(k, positions, layer), v)
        placed, keys, values = _placed(q, positions, layer), self._store.keys, self._store.values
        first = max(start // layer.chunk * layer.chunk - (layer.chunk if layer.previous_chunk else 0), 0)
        parts: list[Float32 | None] = [None, None, None]
        if layer.use_global:
            parts[0] = attention(placed, keys, values, causal=True, scale=layer.scale)
        if layer.use_local:
            parts[1] = attention(placed, keys[:, first:], values[:, first:], causal=True, scale=layer.scale)
        if layer.slots:
            parts[2] = attention(q, *self._slots, scale=layer.scale)
            self._pending = np.concatenate([self._pending, x])
            if len(self._pending) == layer.segment:
                self._memory = _written(self._memory, _summary(self._pending, layer), layer)
                self._slots, self._pending = _projected(self._memory, layer), self._pending[:0]
        return _combined(parts, layer)

    @property
    def memory(self) -> NDArray[np.float32]:
        """The slots, `[slots, E]`, oldest first."""
        return self._memory.copy()

    def __len__(self) -> int:
        """Tokens."""
        return len(self._store)

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values, slots and the unfinished segment."""
        return self._store.nbytes + self._memory.nbytes + self._pending.nbytes + sum(x.nbytes for x in self._slots)


@dataclass(frozen=True, slots=True)
class _Layer:
    """Checked weights and options."""

    wq: Float32
    wk: Float32
    wv: Float32
    wo: Float32 | None
    memory_weights: tuple[Float32, ...]
    shares: Float32  # of global, local and memory, [3, heads, 1, 1]
    heads: int
    kv_heads: int
    dim: int
    value_dim: int
    slots: int
    chunk: int
    segment: int
    previous_chunk: bool
    use_global: bool
    use_local: bool
    pooling: Pooling
    rope_base: float | None
    scale: float


def _layer(
    width: int,
    wq: Array,
    wk: Array,
    wv: Array,
    memory_weights: Any,
    *,
    heads: int,
    wo: Array | None = None,
    slots: int = 16,
    chunk: int = 64,
    segment: int | None = None,
    previous_chunk: bool = False,
    use_global: bool = True,
    use_local: bool = True,
    pooling: Pooling = "mean",
    combine: Combine = "sum",
    branch_logits: Array | None = None,
    rope_base: float | None = None,
    scale: float | None = None,
) -> _Layer:
    number = integer(heads, "heads", 1)
    q_proj, k_proj, v_proj = (_matrix(w, name, (width, None)) for w, name in ((wq, "wq"), (wk, "wk"), (wv, "wv")))
    if q_proj.shape[1] % number or not q_proj.shape[1]:
        raise ValueError(f"wq: got shape {q_proj.shape}, expected [E, heads * D] with {number} heads")
    dim = q_proj.shape[1] // number
    if k_proj.shape[1] % dim or not k_proj.shape[1]:
        raise ValueError(f"wk: got shape {k_proj.shape}, expected [E, Hkv * D] with D = {dim}")
    kv_heads = k_proj.shape[1] // dim
    check_heads(number, kv_heads, kv_heads)
    if v_proj.shape[1] % kv_heads or not v_proj.shape[1]:
        raise ValueError(f"wv: got shape {v_proj.shape}, expected [E, Hkv * Dv] with {kv_heads} heads")
    value_dim = v_proj.shape[1] // kv_heads
    size, length = integer(slots, "slots", 0), integer(chunk, "chunk", 1)
    weights: tuple[Float32, ...] = ()
    if size:
        if not isinstance(memory_weights, tuple | list) or len(memory_weights) != 4:
            raise TypeError(f"memory_weights: got {type(memory_weights).__name__}, expected (wg, ug, b, wu)")
        names = ("memory_weights[0]", "memory_weights[1]", "memory_weights[2]", "memory_weights[3]")
        shapes = ((width, width), (width, width), (width,), (width, width))
        weights = tuple(_matrix(w, name, shape) for w, name, shape in zip(memory_weights, names, shapes, strict=True))
    used = (flag(use_global, "use_global"), flag(use_local, "use_local"), size > 0)
    if not any(used):
        raise ValueError("use_global: got no branch, expected use_global, use_local or slots")
    one_of(pooling, "pooling", get_args(Pooling))
    base = None if rope_base is None else real(rope_base, "rope_base")
    if base is not None and (not 0 < base < np.inf or dim % 2):
        raise ValueError(f"rope_base: got {rope_base} for head_dim {dim}, expected a positive number and an even width")
    return _Layer(
        wq=q_proj,
        wk=k_proj,
        wv=v_proj,
        wo=None if wo is None else _matrix(wo, "wo", (number * value_dim, None)),
        memory_weights=weights,
        shares=_shares(combine, branch_logits, number, used),
        heads=number,
        kv_heads=kv_heads,
        dim=dim,
        value_dim=value_dim,
        slots=size,
        chunk=length,
        segment=length if segment is None else integer(segment, "segment", 1),
        previous_chunk=flag(previous_chunk, "previous_chunk"),
        use_global=used[0],
        use_local=used[1],
        pooling=pooling,
        rope_base=base,
        scale=scale_factor(scale, dim),
    )


def _shares(combine: object, branch_logits: Array | None, heads: int, used: tuple[bool, ...]) -> Float32:
    one_of(combine, "combine", get_args(Combine))
    logits = np.zeros((heads, 3))
    if branch_logits is not None:
        if combine == "sum":
            raise ValueError("branch_logits: got them with combine='sum', expected None: it has no weights")
        x = as_numpy(branch_logits, "branch_logits")
        check_floating(x, "branch_logits")
        if x.shape not in ((3,), (heads, 3)):
            raise ValueError(f"branch_logits: got shape {x.shape}, expected (3,) or {(heads, 3)}")
        if not np.isfinite(x.astype(np.float64)).all():
            raise ValueError("branch_logits: got NaN or infinity, expected finite numbers")
        logits = logits + x
    if combine == "softmax":
        e = np.exp(logits - logits[:, used].max(axis=1, keepdims=True)) * used
        shares = e / e.sum(axis=1, keepdims=True)
    else:
        shares = np.ones((heads, 3)) if combine == "sum" else 0.5 * (1 + np.tanh(logits / 2))
    return np.ascontiguousarray(shares.T[:, :, None, None], np.float32)


def _first_memory(memory: Array | None, shape: tuple[int, ...]) -> Float32:
    if memory is None:
        return np.zeros(shape, np.float32)
    x = as_numpy(memory, "memory")
    check_floating(x, "memory")
    if x.shape != shape:
        raise ValueError(f"memory: got shape {x.shape}, expected {shape}")
    return np.array(x, np.float32)


def _matrix(weights: Array, name: str, shape: tuple[int | None, ...]) -> Float32:
    x = as_numpy(weights, name, any_strides=True)
    check_float_storage(x, name)
    if x.ndim != len(shape) or any(n is not None and n != m for n, m in zip(shape, x.shape, strict=True)):
        expected = [n if n is not None else "columns" for n in shape]
        raise ValueError(f"{name}: got shape {x.shape}, expected {expected}")
    return np.asarray(x, np.float32)


def _split(x: Float32, heads: int) -> Float32:
    """`[rows, heads * D]` as `[heads, rows, D]`."""
    return x.reshape(x.shape[0], heads, x.shape[1] // heads).swapaxes(0, 1)


def _placed(x: Float32, positions: NDArray[Any], layer: _Layer) -> Float32:
    return x if layer.rope_base is None else turned(x, positions, layer.rope_base)


def _projected(memory: Float32, layer: _Layer) -> tuple[Float32, Float32]:
    """Keys and values `[Hkv, slots, D]` of slots `[slots, E]`."""
    return _split(memory @ layer.wk, layer.kv_heads), _split(memory @ layer.wv, layer.kv_heads)


def _summary(rows: Float32, layer: _Layer) -> Float32:
    last: Float32 = rows[-1]
    return rows.mean(axis=0, dtype=np.float32) if layer.pooling == "mean" else last


def _written(memory: Float32, summary: Float32, layer: _Layer) -> Float32:
    """The queue with a new slot at its end."""
    wg, ug, bias, wu = layer.memory_weights
    oldest = memory[0]
    gate = 0.5 * (1 + np.tanh(0.5 * (summary @ wg + oldest @ ug + bias)))
    new = gate * np.tanh(summary @ wu) + (1 - gate) * oldest
    return np.concatenate([memory[1:], new[None].astype(np.float32)])


def _states(x: Float32, memory: Float32, layer: _Layer) -> tuple[list[Float32], Float32]:
    """The slots that each segment reads, and those after the last whole one."""
    states: list[Float32] = []
    if not layer.slots:
        return states, memory
    for at in range(0, len(x), layer.segment):
        states.append(memory)
        if at + layer.segment <= len(x):
            memory = _written(memory, _summary(x[at : at + layer.segment], layer), layer)
    return states, memory


def _branches(x: Float32, states: list[Float32], layer: _Layer) -> Float32:
    """All rows of one sequence, `[L, heads * Dv]`."""
    length = len(x)
    q = _split(x @ layer.wq, layer.heads)
    k, v = _split(x @ layer.wk, layer.kv_heads), _split(x @ layer.wv, layer.kv_heads)
    positions = np.arange(length)
    placed, keys = _placed(q, positions, layer), _placed(k, positions, layer)
    parts: list[Float32 | None] = [None, None, None]
    if layer.use_global:
        parts[0] = attention(placed, keys, v, causal=True, scale=layer.scale)
    if layer.use_local:
        starts = np.arange(0, length, layer.chunk)
        ends = np.minimum(starts + layer.chunk, length)
        firsts = np.maximum(starts - layer.chunk, 0) if layer.previous_chunk else starts
        if layer.previous_chunk:
            rows: Any = np.concatenate([np.arange(a, b) for a, b in zip(firsts, ends, strict=True)])
        else:
            rows = slice(None)
        parts[1] = attention_varlen(
            placed.swapaxes(0, 1), keys.swapaxes(0, 1)[rows], v.swapaxes(0, 1)[rows], np.append(starts, length),
            np.cumsum(np.append(0, ends - firsts)), causal=True, scale=layer.scale,
        ).swapaxes(0, 1)  # fmt: skip
    if layer.slots:
        slot_k, slot_v = (part.swapaxes(0, 1) for part in _projected(np.concatenate(states), layer))
        bounds = np.append(np.arange(0, length, layer.segment), length)
        parts[2] = attention_varlen(
            q.swapaxes(0, 1), slot_k, slot_v, bounds, layer.slots * np.arange(len(bounds)),
            scale=layer.scale,
        ).swapaxes(0, 1)  # fmt: skip
    return _combined(parts, layer)


def _combined(parts: list[Float32 | None], layer: _Layer) -> Float32:
    """Branches `[heads, rows, Dv]` as `[rows, heads * Dv]`."""
    weighted = [share * part for share, part in zip(layer.shares, parts, strict=True) if part is not None]
    total: Float32 = sum(weighted[1:], weighted[0])
    return total.swapaxes(0, 1).reshape(total.shape[1], -1)


METHOD = Method(
    name="gated_fifo_memory_attention",
    family="recurrent",
    title="Recurrent Memory-Augmented Transformers with Chunked Attention for Long-Context Language Modeling",
    year=2025,
    arxiv="2507.00453",
    function=gated_fifo_memory_attention,
    reference=reference.gated_fifo_memory_attention,
    exact=True,
    modes=frozenset({"causal", "self"}),
    gqa=True,
    checks=(
        "Without slots and local branch it is causal attention.",
        "A chunk of the whole sequence makes the local branch causal attention.",
        "A gate of 1 makes the memory a queue of summaries.",
        "A memory of one slot is read as its value.",
        "Steps of `GatedFifoMemory` give the rows of the whole.",
    ),
    tests="tests/recurrent/test_gated_fifo_memory_attention.py",
    cost="`heads * L * (L / 2 + chunk / 2 + slots) * (D + Dv)` multiply-adds per sequence, and the projections.",
)
