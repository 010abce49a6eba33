"""A causal language model in numpy: SmolLM3 with sliding-window RoPE layers and full layers without position.

Everything but attention is a few lines of numpy; attention, and the keys and values it reads, are
longattn's. The sliding layers keep their last window of keys only. Each full layer has a `KVStore`, and a
`Reader` decides how much of it a token reads.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

import longattn as la
from longattn.retrieval.ways import Kept, Way
from longattn.sparse import Selector

Array = NDArray[np.float32]

MODEL = Path(__file__).parent / "model"


def read_safetensors(path: Path) -> dict[str, Array]:
    """All tensors of a safetensors file (bfloat16 or float32) as float32.

    Raises:
        ValueError: a tensor of another dtype.
    """
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        start, stop = entry["data_offsets"]
        raw = data[end + start : end + stop]
        if entry["dtype"] == "BF16":  # the upper half of a float32
            flat = (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
        elif entry["dtype"] == "F32":
            flat = np.frombuffer(raw, "<f4")
        else:
            raise ValueError(f"{path}: {name} is {entry['dtype']}, expected BF16 or F32")
        tensors[name] = flat.reshape(entry["shape"])
    return tensors


@dataclass(frozen=True)
class Layer:
    """Weights of one decoder layer, matrices as [in, out]."""

    sliding: bool
    rope: bool
    input_norm: Array
    qkv: Array
    qkv_bias: Array
    out: Array
    out_bias: Array
    mlp_norm: Array
    gate_up: Array
    down: Array


class Model:
    """Weights and dimensions of a SmolLM3 checkpoint with biases, as float32."""

    def __init__(self, folder: Path = MODEL) -> None:
        config = json.loads((folder / "config.json").read_text())
        if config["model_type"] != "smollm3" or not config["attention_bias"] or config["tie_word_embeddings"]:
            raise ValueError(f"{folder}: expected a smollm3 model with attention_bias and an untied head")
        weights = read_safetensors(folder / "model.safetensors")
        self.heads: int = config["num_attention_heads"]
        self.kv_heads: int = config["num_key_value_heads"]
        self.head_dim: int = config["head_dim"]
        self.window: int = config["sliding_window"]
        self.eps: float = config["rms_norm_eps"]
        self.parameters = sum(w.size for w in weights.values())
        powers = config["rope_parameters"]["rope_theta"] ** (np.arange(0, self.head_dim, 2) / self.head_dim)
        self.frequencies: Array = 1 / powers.astype(
            np.float32
        )  # rounded here, as transformers does: angles agree bit by bit
        self.embedding = weights["model.embed_tokens.weight"]
        self.layers = [
            self._layer(weights, f"model.layers.{i}.", kind == "sliding_attention", bool(config["no_rope_layers"][i]))
            for i, kind in enumerate(config["layer_types"])
        ]
        self.norm = weights["model.norm.weight"]
        self.head = np.ascontiguousarray(weights["lm_head.weight"].T)

    @staticmethod
    def _layer(weights: dict[str, Array], prefix: str, sliding: bool, rope: bool) -> Layer:
        def joined(names: list[str]) -> Array:
            return np.concatenate([weights[f"{prefix}{name}"] for name in names]).T.copy()

        inputs = [f"self_attn.{name}_proj" for name in "qkv"]
        return Layer(
            sliding,
            rope,
            input_norm=weights[f"{prefix}input_layernorm.weight"],
            qkv=joined([f"{name}.weight" for name in inputs]),
            qkv_bias=joined([f"{name}.bias" for name in inputs]),
            out=joined(["self_attn.o_proj.weight"]),
            out_bias=weights[f"{prefix}self_attn.o_proj.bias"],
            mlp_norm=weights[f"{prefix}post_attention_layernorm.weight"],
            gate_up=joined(["mlp.gate_proj.weight", "mlp.up_proj.weight"]),
            down=joined(["mlp.down_proj.weight"]),
        )

    @property
    def full_layers(self) -> list[int]:
        return [i for i, layer in enumerate(self.layers) if not layer.sliding]

    def rms_norm(self, x: Array, weight: Array) -> Array:
        root: Array = np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(self.eps))
        return x / root * weight

    def rope_tables(self, start: int, stop: int) -> tuple[Array, Array]:
        angles = np.arange(start, stop, dtype=np.float32)[:, None] * self.frequencies
        angles = np.concatenate((angles, angles), axis=-1)
        return np.cos(angles), np.sin(angles)

    def split_heads(self, qkv: Array) -> list[Array]:
        """[T, (Hq + 2 Hkv) D] -> q [Hq, T, D], k [Hkv, T, D], v [Hkv, T, D]."""
        heads = qkv.reshape(len(qkv), -1, self.head_dim).transpose(1, 0, 2)
        return np.split(heads, [self.heads, self.heads + self.kv_heads])


def apply_rope(x: Array, cos: Array, sin: Array) -> Array:
    half = x.shape[-1] // 2
    return x * cos + np.concatenate((-x[..., half:], x[..., :half]), axis=-1) * sin


def swiglu(gate_up: Array) -> Array:
    gate, up = np.split(gate_up, 2, axis=-1)
    activated: Array = gate / (1 + np.exp(-gate)) * up
    return activated


class Reader(Protocol):
    """What a full layer's queries read of its store."""

    def __call__(self, layer: int, q: Array, store: la.KVStore) -> Array:
        """Output [Hq, T, Dv] of q [Hq, T, D], the queries of the store's last T rows."""
        ...


@dataclass(frozen=True)
class Mark:
    """A point of a session to which it can be rewound."""

    length: int
    recent: dict[int, tuple[Array, Array]]


class Session:
    """One sequence: tokens go in by chunks, logits come out, keys and values stay.

    Args:
        model: weights.
        capacity: most tokens it will hold.
        dtype: of the full layers' stores.
    """

    def __init__(self, model: Model, capacity: int, dtype: str = "float32") -> None:
        self.model = model
        self.length = 0
        self.full_attention_s = 0.0  # time spent in the full layers' attention, appends included
        self.stores = {
            i: la.KVStore(kv_heads=model.kv_heads, head_dim=model.head_dim, dtype=dtype, capacity=capacity)
            for i in model.full_layers
        }
        empty = np.zeros((model.kv_heads, 0, model.head_dim), np.float32)
        self._recent = {i: (empty, empty) for i, layer in enumerate(model.layers) if layer.sliding}

    def mark(self) -> Mark:
        return Mark(self.length, dict(self._recent))

    def rewind(self, mark: Mark) -> None:
        """Forgets everything after `mark`."""
        self.length, self._recent = mark.length, dict(mark.recent)
        for store in self.stores.values():
            store.truncate(mark.length)

    def forward(self, tokens: NDArray[np.int64], read: Reader) -> Array:
        """Logits [T, vocabulary] of the next tokens after each of `tokens` [T]."""
        model = self.model
        x = model.embedding[tokens]
        cos, sin = model.rope_tables(self.length, self.length + len(tokens))
        for i, layer in enumerate(model.layers):
            q, k, v = model.split_heads(model.rms_norm(x, layer.input_norm) @ layer.qkv + layer.qkv_bias)
            if layer.rope:
                q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
            attended = self._sliding(i, q, k, v) if layer.sliding else self._full(i, q, k, v, read)
            x = x + attended.transpose(1, 0, 2).reshape(len(x), -1) @ layer.out + layer.out_bias
            x = x + swiglu(model.rms_norm(x, layer.mlp_norm) @ layer.gate_up) @ layer.down
        self.length += len(tokens)
        logits: Array = model.rms_norm(x, model.norm) @ model.head
        return logits

    def _sliding(self, i: int, q: Array, k: Array, v: Array) -> Array:
        before = self.model.window - 1
        k, v = (np.concatenate((old, new), axis=1) for old, new in zip(self._recent[i], (k, v), strict=True))
        self._recent[i] = k[:, -before:].copy(), v[:, -before:].copy()
        out: Array = la.attention(q, k, v, causal=True, window=(before, 0))
        return out

    def _full(self, i: int, q: Array, k: Array, v: Array, read: Reader) -> Array:
        start = time.perf_counter()
        self.stores[i].append(k, v)
        out = read(i, q, self.stores[i])
        self.full_attention_s += time.perf_counter() - start
        return out


def read_all(layer: int, q: Array, store: la.KVStore) -> Array:
    """Exact attention over every key."""
    out: Array = la.attention(q, store.keys, store.values, causal=True)
    return out


@dataclass(frozen=True)
class WindowReader:
    """The first `sinks` and the last `window` keys only."""

    sinks: int
    window: int

    def __call__(self, layer: int, q: Array, store: la.KVStore) -> Array:
        seen = self.window + q.shape[1] - 1
        if len(store) <= self.sinks + seen:
            raise ValueError(f"window: {self.sinks} + {seen} keys are all of the store's {len(store)}")
        keys, values = store.keys, store.values
        first = la.attention(q, keys[:, : self.sinks], values[:, : self.sinks], return_lse=True)
        last = la.attention(
            q, keys[:, -seen:], values[:, -seen:], causal=True, window=(self.window - 1, 0), return_lse=True
        )
        out: Array = la.merge([first, last])[0]
        return out


class PrefillReader:
    """Exact attention that keeps some of the queries, for the indexes that learn from them."""

    EVERY = 128

    def __init__(self) -> None:
        self._kept: dict[int, list[NDArray[Any]]] = {}

    def __call__(self, layer: int, q: Array, store: la.KVStore) -> Array:
        self._kept.setdefault(layer, []).append(np.array(q[:, :: self.EVERY]))
        return read_all(layer, q, store)

    def queries(self, layer: int) -> NDArray[np.float32]:
        """Kept queries of a layer, `[Hq, n, D]`."""
        return np.concatenate(self._kept[layer], axis=1).astype(np.float32)


class KeptReader:
    """The rows that a policy keeps of the prompt, and all that come after it."""

    MOST = 256  # queries of the prompt that the policy judges by

    def __init__(
        self,
        stores: dict[int, la.KVStore],
        prefill: PrefillReader,
        kept: Kept,
        *,
        top_k: int,
        sinks: int,
        window: int,
    ) -> None:
        self.prompts = {}
        for i, store in stores.items():
            queries = prefill.queries(i)
            queries = np.ascontiguousarray(queries[:, :: -(-queries.shape[1] // self.MOST)])
            rows = top_k + sinks + window
            self.prompts[i] = kept.compressed(store.keys, store.values, queries, rows=rows, sinks=sinks, window=window)
        self._length = len(next(iter(stores.values())))
        self.keys_attended = 0  # of single-token steps, over all KV heads and layers
        self.keys_total = 0

    @property
    def fraction_read(self) -> float:
        """Keys read over keys seen."""
        return self.keys_attended / self.keys_total

    def __call__(self, layer: int, q: Array, store: la.KVStore) -> Array:
        prompt, new = self.prompts[layer], q.shape[1]
        if len(store) - new == self._length:  # the first rows behind the prompt
            prompt.rewind()
        prompt.append(store.keys[:, -new:], store.values[:, -new:])
        if new == 1:
            self.keys_attended += sum(prompt.store.live)
            self.keys_total += store.kv_heads * len(store)
        out: Array = prompt.attend(q)
        return out


class SparseReader:
    """Attention from a chunk of the prompt to the keys that a selector chooses; steps read everything."""

    def __init__(self, selector: Selector) -> None:
        self._selector = selector
        self.pairs = 0  # of queries and keys that exact attention would have computed, all heads and layers
        self.attended = 0.0

    @property
    def density(self) -> float:
        """Share of the pairs that was computed."""
        return self.attended / self.pairs if self.pairs else 1.0

    def __call__(self, layer: int, q: Array, store: la.KVStore) -> Array:
        rows, end = q.shape[1], len(store)
        if rows == 1:
            return read_all(layer, q, store)
        out: Array
        out, stats = la.sparse_attention(q, store.keys, store.values, self._selector, causal=True, return_stats=True)
        pairs = sum(range(end - rows + 1, end + 1)) * len(q)
        self.pairs += pairs
        self.attended += stats.density * pairs
        return out


class RetrievalReader:
    """Sinks, window, the `top_k` keys per KV head that an index points at, and its estimate of the rest."""

    def __init__(
        self,
        stores: dict[int, la.KVStore],
        prefill: PrefillReader,
        way: Way,
        *,
        top_k: int,
        sinks: int,
        window: int,
    ) -> None:
        self.options: dict[str, Any] = {"sinks": sinks, "window": window, **way.budget(top_k)}
        self.indexes = {i: way.index(store, prefill.queries(i)) for i, store in stores.items()}
        for index in self.indexes.values():
            index.update()
        self.keys_attended = 0  # of single-token steps, over all KV heads and layers
        self.keys_total = 0

    @property
    def fraction_read(self) -> float:
        """Keys read over keys seen."""
        return self.keys_attended / self.keys_total

    def __call__(self, layer: int, q: Array, store: la.KVStore) -> Array:
        result = la.retrieval_attention(q, store, self.indexes[layer], **self.options)
        if q.shape[1] == 1 and result.stats is not None:
            self.keys_attended += int(np.sum(result.stats.keys_attended))
            self.keys_total += int(np.sum(result.stats.keys_total))
        out: Array = result.out
        return out
