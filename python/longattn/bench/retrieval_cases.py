"""Arguments of every method that reads, keeps or scores keys, for benchmarks that call them all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

import longattn as la
from longattn.bench.each_method import Arguments, Call
from longattn.bench.each_method import call_with as _a
from longattn.kv import KVStore, PrefixTree, VirtualKVStore
from longattn.retrieval.ways import Kept

#: Rows of a prompt, keys of a decoding step, width of a head, query heads, KV heads, channels of a layer.
ROWS, KEYS, DIM, HEADS, KV_HEADS, CHANNELS = 2048, 32768, 64, 8, 2, 256
QUICK_ROWS, QUICK_KEYS, QUICK_DIM = 192, 512, 16
#: Sequences of a batch that share a prefix.
SEQUENCES = 4


class Inputs:
    """Random queries, keys and values of a size.

    Attributes:
        places: keys of a decoding step.
        size: in words.
    """

    def __init__(self, quick: bool) -> None:
        self.rng = np.random.default_rng(0)
        self.rows, self.places, self.dim = (QUICK_ROWS, QUICK_KEYS, QUICK_DIM) if quick else (ROWS, KEYS, DIM)
        self.size = f"{HEADS}/{KV_HEADS} heads of {self.dim}, steps on {self.places} keys, prompts of {self.rows}"

    def x(self, *shape: int) -> NDArray[np.float32]:
        """Random numbers."""
        return self.rng.standard_normal(shape, dtype=np.float32)

    def w(self, rows: int, columns: int) -> NDArray[np.float32]:
        """Weights that keep the size of numbers."""
        return np.asarray(self.x(rows, columns) / np.sqrt(rows), np.float32)

    def prompt(self, kv_heads: int = KV_HEADS) -> list[NDArray[np.float32]]:
        """Queries, keys and values of a prompt, `[H, L, D]`."""
        return [self.x(heads, self.rows, self.dim) for heads in (HEADS, kv_heads, kv_heads)]

    def step(self) -> list[NDArray[np.float32]]:
        """A query, and keys and values that were there before it."""
        return [self.x(HEADS, 1, self.dim), *(self.x(KV_HEADS, self.places, self.dim) for _ in range(2))]

    def store(self) -> tuple[NDArray[np.float32], KVStore]:
        """A query and a store."""
        q, k, v = self.step()
        store = KVStore(kv_heads=KV_HEADS, head_dim=self.dim, dtype="float32", capacity=self.places)
        store.append(k, v)
        return q, store

    @property
    def share(self) -> int:
        """Rows that a method may read of a step's keys, 2 per cent; of quick runs a quarter."""
        return max(self.places // 50, 128)


def _indexed(kind: str, /, **given: Any) -> Callable[[Inputs], Arguments]:
    """A step through an index; `index` holds the index's own parameters."""
    parameters = given.pop("index", {})

    def case(i: Inputs) -> Arguments:
        q, store = i.store()
        made = la.index.make(kind, store, **parameters)
        made.update()
        options = {name: i.share if value == "share" else value for name, value in given.items()}
        return _a(q, store, made, **options)

    return case


def _kept(policy: str, **parameters: Any) -> Callable[[Inputs], Arguments]:
    """A step over what a policy keeps of a prompt."""

    def case(i: Inputs) -> Arguments:
        q, k, v = i.prompt()
        rows = i.rows // 4
        made = Kept(policy, policy, parameters).compressed(k, v, q[:, -64:], rows=rows, sinks=4, window=32, room=1)
        return _a(made, i.x(HEADS, 1, i.dim))

    return case


def _attend(cache: Any, q: NDArray[np.float32]) -> Any:
    return cache.attend(q)


def _virtual(i: Inputs) -> Arguments:
    store = VirtualKVStore(1, KV_HEADS, i.dim, dtype="float32", max_requests=2, max_tokens=i.places)
    q, k, v = i.step()
    request = store.alloc()
    store.ensure(request, i.places)
    k, v = (np.ascontiguousarray(x.swapaxes(0, 1)) for x in (k, v))
    store.write(request, 0, 0, k, v)
    return _a(store, request, i.places - 1, q, k[-1:], v[-1:])


def _write_and_attend(store: VirtualKVStore, request: int, row: int, q: Any, k: Any, v: Any) -> Any:
    """A decoding step of one layer: its row is written and all rows are attended to."""
    store.write(request, 0, row, k, v)
    keys, values = store.view(request, 0)
    return la.attention(q, keys.swapaxes(0, 1), values.swapaxes(0, 1))


def _chunks(i: Inputs) -> Arguments:
    """Sequences that are equal but for their last eighth."""
    tree = PrefixTree(KV_HEADS, i.dim, dtype="float32", capacity=2 * i.places)
    _, k, v = i.step()
    tokens, own = np.arange(i.places), i.places // 8
    tree.add_seq(tokens, k, v)
    for sequence in range(1, SEQUENCES):
        mine = tokens.copy()
        mine[-own:] += sequence * i.places
        tree.add_seq(mine, *(i.x(KV_HEADS, i.places - tree.stored(mine), i.dim) for _ in range(2)))
    return _a(i.x(SEQUENCES, HEADS, i.dim), tree)


def _spans(i: Inputs) -> Arguments:
    bounds = np.arange(0, i.places - 63, 64)
    spans = np.stack([bounds, bounds + 64], axis=1)
    return _a(*i.step(), spans, bounds[:, None] + np.array([7, 40]), sinks=4, window=64, budget=i.share)


def _heads_scored(i: Inputs) -> Arguments:
    tokens = i.rng.integers(0, 50, i.places)
    top = i.rng.integers(0, i.places, (64, 8, HEADS))
    return _a(top, tokens, i.rng.integers(0, 50, 64), (i.places // 2, i.places // 2 + 32))


def _frames(i: Inputs) -> Arguments:
    side, channels = (16, CHANNELS) if i.rows == ROWS else (4, 32)
    projections = [i.w(channels, channels) for _ in range(4)]
    return _a(i.x(1, 8, 5 + side**2, channels), *projections, heads=4, grid=(side, side), keyframes=[0, 4])


def _layer(i: Inputs) -> Arguments:
    projections = [i.w(CHANNELS, HEADS * i.dim) for _ in range(3)]
    return _a(i.x(1, i.rows, CHANNELS), *projections, i.w(HEADS * i.dim, CHANNELS), heads=HEADS)


def _gradients(i: Inputs) -> Arguments:
    q, k, v = i.prompt()
    out, lse = la.attention(q, k, v, causal=True, return_lse=True)
    return _a(i.x(*out.shape), q, k, v, out, lse, causal=True)


def _ragged(i: Inputs) -> Arguments:
    q, k, v = (np.ascontiguousarray(x.swapaxes(0, 1)) for x in i.prompt())
    lengths = np.array([0, i.rows // 4, i.rows], np.int32)
    return _a(q, k, v, lengths, lengths, causal=True)


def _latents(i: Inputs) -> Arguments:
    rank, narrow = 4 * i.dim, i.dim // 2
    queries = [i.x(1, HEADS, 1, width) for width in (i.dim, narrow)]
    weights = [np.asarray(i.x(HEADS, *shape) / np.sqrt(rank), np.float32) for shape in ((i.dim, rank), (rank, i.dim))]
    return _a(*queries, *(i.x(1, i.places, width) for width in (rank, narrow)), *weights)


def _partial(i: Inputs) -> Arguments:
    return _a([(i.x(HEADS, i.rows, i.dim), i.x(HEADS, i.rows)) for _ in range(4)])


def _sound(i: Inputs) -> Arguments:
    """Half a second of a spectrogram, say."""
    size, channels = (48, 64) if i.rows == ROWS else (6, 16)
    norm = (np.ones(channels, np.float32), np.zeros(channels, np.float32))
    return _a(i.x(1, size, size, channels), norm, *(i.w(channels, channels) for _ in range(4)), heads=4)


#: What is called where a method is a class, or has a call of its own.
CALLS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(
        (
            "a_vl_cache",
            "heavy_hitter",
            "lazy_eviction",
            "razor_attention",
            "selective_attention_budget",
            "snap_kv",
            "streaming_llm",
        ),
        _attend,
    ),
    "virtual_kv_store": _write_and_attend,
}

CASES: dict[str, Callable[[Inputs], Arguments]] = {
    # diagnostics, distributed
    "echo_induction_scores": lambda i: _a(*i.prompt()[:2], i.rows // 4),
    "qada_head_gate": lambda i: _a(*i.step(), local=i.share),
    "retrieval_head_score": _heads_scored,
    "burst_attention": lambda i: _a(*i.prompt(), causal=True),
    # exact
    "attention": lambda i: _a(*i.prompt(), causal=True),
    "attention_backward": _gradients,
    "attention_varlen": _ragged,
    "fixed_head_size_attention": _layer,
    "grouped_query_attention": lambda i: _a(*i.prompt(), causal=True),
    "merge": _partial,
    "multi_head_latent_attention": _latents,
    "multi_query_attention": lambda i: _a(*i.prompt(1), causal=True),
    "shared_time_frequency_attention": _sound,
    # hash
    "hata_topk_attention": _indexed("hashes", top_k="share", window=64),
    "hyper_attention": lambda i: _a(
        *i.prompt(HEADS), causal=True, min_seq_len=i.rows // 2, block_size=32, sample_size=32
    ),
    "magicpig_attention": _indexed("lsh"),
    "pariskv_attention": _indexed("collisions", top_k="share"),
    # kv
    "a_vl_cache": _kept("a_vl_cache"),
    "attention_gate_evict": lambda i: _a(*i.prompt(), i.rng.random((KV_HEADS, i.rows)) < 0.5),
    "chunk_attention": _chunks,
    "descriptor_attention": _frames,
    "heavy_hitter": _kept("heavy_hitter"),
    "lazy_eviction": _kept("lazy_eviction"),
    "nats_attention": lambda i: _a(*i.prompt(), i.rng.integers(0, 3, (KV_HEADS, i.rows)), window=64),
    "razor_attention": _kept("razor_attention"),
    "selective_attention_budget": _kept("selective_attention_budget"),
    "snap_kv": _kept("snap_kv"),
    "streaming_llm": _kept("streaming_llm"),
    "virtual_kv_store": _virtual,
    # pool
    "core_context_attention": lambda i: _a(*i.prompt(), group=16, window=i.rows // 128 * 16),
    "learned_aggregation_pool": lambda i: _a(
        i.x(1, CHANNELS), i.x(1, i.rows, CHANNELS), *(i.w(CHANNELS, CHANNELS) for _ in range(4)), heads=4
    ),
    "pool_token_mixer": lambda i: _a(i.x(1, 32, i.rows // 32, CHANNELS)),
    # position
    "generalized_gaussian_bias_attention": lambda i: _a(*i.prompt(), inverse_scale=0.01),
    "head_scaled_nope_attention": lambda i: _a(*i.prompt(), 1.2),
    # retrieval
    "landmark_attention": lambda i: _a(*i.prompt(), top_k=4),
    "ltri_span_attention": _spans,
    "pqcache_attention": _indexed("product_quantisation", index={"bits": 8}),
    "quest_attention": _indexed("pages", index={"page_size": 16, "score": "bounds"}, token_budget="share"),
    "retrieval_attention": _indexed("signatures", top_k="share", window=64),
    "retro_infer_attention": _indexed("clusters"),
    "s3_feature_retrieve": lambda i: _a(i.x(16, i.dim), i.x(i.places, i.dim), i.w(i.dim, 1024), top_k=16),
    "verified_sparse_attention": _indexed("signatures", epsilon=0.2, relative_to="values", window=64),
    # score
    "local_linear_attention": lambda i: _a(i.x(1, i.rows // 16, 16), *(i.x(1, i.rows // 4, 16) for _ in range(2)), 1.0),
    "selective_attention": lambda i: _a(*i.prompt(HEADS)),
}


def _dense(q: Any, k: Any, v: Any, **options: Any) -> Call:
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    q4, k4, v4 = (torch.from_numpy(x)[None] for x in (q, k, v))
    return lambda: scaled_dot_product_attention(q4, k4, v4, is_causal=True, enable_gqa=True)


#: Exact methods beside torch's attention to all keys.
PLAIN: dict[str, Callable[..., Call]] = dict.fromkeys(
    ("attention", "burst_attention", "grouped_query_attention", "multi_query_attention"), _dense
)
