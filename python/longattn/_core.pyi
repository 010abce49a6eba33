"""The compiled core. Arguments are numpy arrays that the public functions have already checked."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn.dense._options import Options

# threads and instruction sets

def set_num_threads(n: int) -> None: ...
def num_threads() -> int: ...
def shares_openmp() -> bool: ...
def isa() -> str: ...
def available_isas() -> list[str]: ...
def set_isa(name: str) -> None: ...
def cpu_features() -> dict[str, bool]: ...

# dense attention

def attention(
    q: NDArray[Any],
    k: NDArray[Any],
    v: NDArray[Any],
    out: NDArray[Any],
    lse: NDArray[np.float32],
    options: Options,
) -> None: ...
def attention_varlen(
    q: NDArray[Any],
    k: NDArray[Any],
    v: NDArray[Any],
    out: NDArray[Any],
    lse: NDArray[np.float32],
    cu_seqlens_q: NDArray[np.int64],
    cu_seqlens_k: NDArray[np.int64],
    options: Options,
) -> None: ...
def merge(
    outs: list[NDArray[Any]],
    lses: list[NDArray[np.float32]],
    out: NDArray[Any],
    lse: NDArray[np.float32],
) -> None: ...

# gradient of the output; queries, keys, values; output, log-sum-exp, the gradient of this; and where gradients go

_Forward = tuple[
    NDArray[Any],
    NDArray[Any],
    NDArray[Any],
    NDArray[Any],
    NDArray[Any],
    NDArray[np.float32],
    NDArray[np.float32] | None,
]
_Gradients = tuple[NDArray[Any], NDArray[Any], NDArray[Any]]

def attention_backward(
    arrays: _Forward, results: _Gradients, d_sinks: NDArray[np.float32] | None, options: Options
) -> None: ...
def attention_varlen_backward(
    arrays: _Forward,
    results: _Gradients,
    d_sinks: NDArray[np.float32] | None,
    cu_seqlens_q: NDArray[np.int64],
    cu_seqlens_k: NDArray[np.int64],
    options: Options,
) -> None: ...
def attention_double(
    q: NDArray[np.float64],
    k: NDArray[np.float64],
    v: NDArray[np.float64],
    options: Options,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]: ...
def attention_backward_double(
    d_out: NDArray[np.float64],
    q: NDArray[np.float64],
    k: NDArray[np.float64],
    v: NDArray[np.float64],
    out: NDArray[np.float64],
    lse: NDArray[np.float64],
    d_lse: NDArray[np.float64] | None,
    options: Options,
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]: ...

# weights that are looked at, not multiplied by values

def attention_weights(
    q: NDArray[Any],
    k: NDArray[Any],
    rows: list[int],
    lse: NDArray[np.float32] | None,
    out: NDArray[np.float32],
    options: Options,
) -> None: ...
def prob_reduce(
    q: NDArray[Any],
    k: NDArray[Any],
    options: Options,
    *,
    given_lse: NDArray[np.float32] | None = None,
    lse: NDArray[np.float32] | None = None,
    column_mass: NDArray[np.float32] | None = None,
    query_weights: NDArray[np.float32] | None = None,
    column_max: NDArray[np.float32] | None = None,
    segment_mass: NDArray[np.float32] | None = None,
    segment_ids: NDArray[np.int32] | None = None,
    entropy: NDArray[np.float32] | None = None,
    distance_moments: NDArray[np.float32] | None = None,
    distance_limit: float | None = None,
    row_max: NDArray[np.float32] | None = None,
    row_max_key: NDArray[np.int64] | None = None,
) -> None: ...
def selective_attention(
    q: NDArray[Any],
    k: NDArray[Any],
    v: NDArray[Any],
    out: NDArray[Any],
    lse: NDArray[np.float32],
    state: NDArray[np.float32],
    selector_head: int,
    protect_first: int,
    scale: float,
    softcap: float,
) -> None: ...
def weighted_attention(
    q: NDArray[Any],
    k: NDArray[Any],
    v: NDArray[Any],
    out: NDArray[Any],
    options: Options,
    *,
    signed: tuple[float, float, bool, bool] | None = None,
    contrast: float = 1.0,
) -> None: ...

# key-value stores

class Rows:
    """Rows of a store as an object that numpy borrows; bfloat16 as uint16."""

    @property
    def __array_interface__(self) -> dict[str, Any]: ...

class CodedRows:
    """Rows of a store that keeps codes."""

    @property
    def shape(self) -> tuple[int, int, int]: ...
    @property
    def dtype(self) -> str: ...
    @property
    def nbytes(self) -> int: ...
    def decode(self, head: int, start: int, out: NDArray[np.float32]) -> None: ...

class KVStore:
    """Keys and values of one sequence."""

    def __init__(
        self,
        kv_heads: int,
        head_dim: int,
        value_dim: int,
        dtype: str,
        capacity: int,
        group_size: int | None,
        first_rows_scale: bool,
        channel_scales: NDArray[np.float32] | None,
    ) -> None: ...
    def append(self, k: NDArray[Any], v: NDArray[Any]) -> int: ...
    def truncate(self, length: int) -> None: ...
    def fork(self) -> KVStore: ...
    def save(self, path: str) -> None: ...
    @staticmethod
    def load(path: str, capacity: int | None) -> KVStore: ...
    def __len__(self) -> int: ...
    @property
    def keys(self) -> Rows | CodedRows: ...
    @property
    def values(self) -> Rows | CodedRows: ...
    @property
    def channel_scales(self) -> list[float] | None: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def value_dim(self) -> int: ...
    @property
    def dtype(self) -> str: ...
    @property
    def capacity(self) -> int: ...
    @property
    def nbytes(self) -> int: ...

class PrefixTree:
    """Keys and values of many sequences that share their beginnings."""

    def __init__(
        self, kv_heads: int, head_dim: int, value_dim: int, dtype: str, chunk_size: int, capacity: int
    ) -> None: ...
    def add(self, tokens: NDArray[np.int64], k: NDArray[Any], v: NDArray[Any]) -> int: ...
    def extend(self, sequence: int, tokens: NDArray[np.int64], k: NDArray[Any], v: NDArray[Any]) -> None: ...
    def append(
        self, sequences: list[int] | None, tokens: NDArray[np.int64], k: NDArray[Any], v: NDArray[Any]
    ) -> None: ...
    def fork(self, sequence: int, n: int) -> list[int]: ...
    def remove(self, sequence: int) -> None: ...
    def stored(self, tokens: NDArray[np.int64]) -> int: ...
    def length(self, sequence: int) -> int: ...
    def tokens(self, sequence: int) -> list[int]: ...
    def copy_rows(self, sequence: int, k: NDArray[Any], v: NDArray[Any]) -> None: ...
    def sequences(self) -> list[int]: ...
    def order(self) -> list[int]: ...
    def usage(self) -> tuple[int, int]: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def value_dim(self) -> int: ...
    @property
    def dtype(self) -> str: ...
    @property
    def chunk_size(self) -> int: ...
    @property
    def capacity(self) -> int: ...
    @property
    def nbytes(self) -> int: ...

def chunk_attention(
    q: NDArray[Any],
    tree: PrefixTree,
    sequences: list[int] | None,
    out: NDArray[Any],
    lse: NDArray[np.float32],
    scale: float,
    softcap: float,
    sinks: NDArray[np.float32] | None,
    shared: bool,
) -> None: ...

class SlotStore:
    """The kept rows of one sequence, in slots."""

    def __init__(self, kv_heads: int, head_dim: int, value_dim: int, dtype: str, slots: int) -> None: ...
    def append(
        self,
        k: NDArray[Any],
        v: NDArray[Any],
        keep: NDArray[np.uint8] | None,
        fold: bool,
        slots: NDArray[np.int64],
    ) -> None: ...
    def evict(self, mask: NDArray[np.uint8], fold: bool) -> list[int]: ...
    def clear(self) -> None: ...
    def attend(
        self,
        q: NDArray[Any],
        out: NDArray[Any],
        lse: NDArray[np.float32],
        scale: float,
        softcap: float,
        sinks: NDArray[np.float32] | None,
        within: NDArray[np.uint8] | None,
        bias: NDArray[np.float32] | None,
        reduce: str | None,
        logits_of: int | None,
        observed: NDArray[np.float32],
    ) -> None: ...
    def positions(self, to: NDArray[np.int64]) -> None: ...
    def copy_rows(self, head: int, k: NDArray[Any], v: NDArray[Any]) -> list[int]: ...
    def copy_mean(self, head: int, key: NDArray[np.float64], value: NDArray[np.float64]) -> int: ...
    @property
    def appended(self) -> int: ...
    @property
    def live(self) -> list[int]: ...
    @property
    def folded(self) -> list[int]: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def value_dim(self) -> int: ...
    @property
    def slots(self) -> int: ...
    @property
    def dtype(self) -> str: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def live_bytes(self) -> int: ...

def listed_attention(
    q: NDArray[Any],
    k: NDArray[Any],
    v: NDArray[Any],
    lists: list[NDArray[np.uint32]],
    out: NDArray[Any],
    lse: NDArray[np.float32],
    scale: float,
    softcap: float,
    sinks: NDArray[np.float32] | None,
) -> None: ...
def rank_union(scores: NDArray[np.float32], first: int, last: int, count: int) -> NDArray[np.uint32]: ...

class VirtualKVStore:
    """Keys and values of a batch of requests in all layers."""

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        head_dim: int,
        value_dim: int,
        dtype: str,
        max_requests: int,
        max_tokens: int,
        granule: int,
        deferred_reclaim: bool,
        eager: int,
        background: bool,
    ) -> None: ...
    def alloc(self) -> int: ...
    def free(self, request: int) -> None: ...
    def ensure(self, request: int, tokens: int) -> None: ...
    def tokens(self, request: int) -> int: ...
    def view(self, request: int, layer: int) -> tuple[Rows, Rows]: ...
    def write(self, request: int, layer: int, start: int, k: NDArray[Any], v: NDArray[Any]) -> None: ...
    def reclaim(self) -> None: ...
    def settle(self) -> None: ...
    def slots(self) -> tuple[int, int]: ...
    @property
    def committed_bytes(self) -> int: ...
    @property
    def reserved_bytes(self) -> int: ...

# indexes and retrieval

class Index:
    """An index over the rows of a store."""

    @staticmethod
    def load(path: str, store: KVStore) -> Index: ...
    def __len__(self) -> int: ...
    def fork(self, store: KVStore) -> Index: ...
    def parameters(self) -> str: ...
    def save(self, path: str) -> None: ...
    def update(self) -> None: ...
    @property
    def estimates(self) -> bool: ...
    @property
    def kind(self) -> str: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def weighs_rows(self) -> bool: ...

def flat(store: KVStore) -> Index: ...
def graph(
    store: KVStore,
    queries: NDArray[np.float32] | None,
    neighbours: int,
    max_degree: int,
    query_neighbours: int,
    beam: int,
    ef: int,
    kk_metric: str,
    index_per: str,
    search_by: str,
    tail_max: int,
    seed: int,
) -> Index: ...
def inverted_lists(store: KVStore, lists: int | None, nprobe: int, probe_rows: int | None, seed: int) -> Index: ...
def clusters(
    store: KVStore,
    segment: int,
    tail: int,
    keys_per_cluster: int,
    iterations: int,
    spherical: bool,
    score: str,
    coded: bool,
    seed: int,
) -> Index: ...
def clusters_members(index: Index, head: int) -> list[list[int]]: ...
def pages(store: KVStore, page_size: int, score: str, landmark: int) -> Index: ...
def product_quantisation(
    store: KVStore,
    subvectors: int,
    bits: int,
    seed: int,
    bases: tuple[NDArray[np.float32], NDArray[np.float32]] | None,
) -> Index: ...

class FeaturePostings:
    """Inverted lists of features."""

    def __init__(self, features: int) -> None: ...
    def __len__(self) -> int: ...
    def add(self, features: NDArray[np.uint32], activations: NDArray[np.float32]) -> None: ...
    def counts(self) -> list[int]: ...
    def search(
        self,
        features: NDArray[np.uint32],
        sums: NDArray[np.float32],
        idf: bool,
        stop_share: float,
        scores: NDArray[np.float32],
    ) -> int: ...
    @property
    def nbytes(self) -> int: ...

def encode_features(
    x: NDArray[Any],
    weights: NDArray[np.float32],
    bias: NDArray[np.float32],
    centre: NDArray[np.float32],
    relu: bool,
    features: NDArray[np.uint32],
    activations: NDArray[np.float32],
) -> None: ...
def features(
    store: KVStore,
    weights: NDArray[np.float32],
    bias: NDArray[np.float32],
    centre: NDArray[np.float32],
    top_k: int,
    relu: bool,
    idf: bool,
    stop_share: float,
    scale: float,
) -> Index: ...
def signatures(store: KVStore, bits: int, seed: int) -> Index: ...
def collisions(store: KVStore, seed: int, collision_ratio: float | None, candidate_ratio: float | None) -> Index: ...
def hashes(store: KVStore, weights: NDArray[np.float32], use_norm: bool) -> Index: ...
def lsh_tables(store: KVStore, tables: int, bits: int, seed: int) -> Index: ...
def signatures_sigma(index: Index) -> list[float]: ...
def retrieval_attention(
    sequences: list[tuple[NDArray[Any], Index, NDArray[Any], NDArray[np.float32], list[int] | None, bool]],
    top_p: float,
    sinks: int,
    window: int,
    scale: float,
    sink_logits: NDArray[np.float32] | None,
    keep_selected: bool,
    sampling: tuple[int, tuple[float, bool, tuple[float, float]] | None] | None,
) -> list[dict[str, list[Any]]]: ...

# the machine's limits

def read_bandwidth(bytes: int, threads: int) -> float: ...
def fma_peak(threads: int) -> float: ...

# sparse attention: where lists of all heads begin, their numbers, (batch, heads), and where blocks of queries begin

_HeadLists = tuple[NDArray[np.int64], NDArray[np.uint32], tuple[int, int], NDArray[np.int64]]

def block_sparse(
    q: NDArray[Any],
    k: NDArray[Any],
    v: NDArray[Any],
    out: NDArray[Any],
    lse: NDArray[np.float32],
    lists: _HeadLists,
    key_bounds: NDArray[np.int64],
    sequences: tuple[NDArray[np.int64], NDArray[np.int64]] | None,
    options: Options,
) -> None: ...
def block_sparse_backward(
    arrays: _Forward,
    results: _Gradients,
    d_sinks: NDArray[np.float32] | None,
    lists: _HeadLists,
    key_bounds: NDArray[np.int64],
    sequences: tuple[NDArray[np.int64], NDArray[np.int64]] | None,
    options: Options,
) -> None: ...

# keys, dilation, step and uint32 [n, 4] of three axes; sizes, zeros, table and numbers by axis of a bias

_GridAxes = list[tuple[int, int, int, NDArray[np.uint32]]]
_GridBias = tuple[Any, ...] | None
_Ranges = tuple[list[NDArray[np.uint32]], NDArray[np.uint32]]

def neighbourhood(
    q: NDArray[Any],
    k: NDArray[Any],
    v: NDArray[Any],
    out: NDArray[Any],
    lse: NDArray[np.float32],
    axes: _GridAxes,
    bias: _GridBias,
    options: Options,
) -> None: ...
def windowed(
    q: NDArray[Any],
    k: NDArray[Any],
    v: NDArray[Any],
    out: NDArray[Any],
    lse: NDArray[np.float32],
    ranges: _Ranges,
    options: Options,
) -> None: ...
def windowed_backward(
    arrays: _Forward,
    results: _Gradients,
    d_sinks: NDArray[np.float32] | None,
    ranges: _Ranges,
    options: Options,
) -> None: ...
def neighbourhood_scores(
    q: NDArray[Any],
    k: NDArray[Any],
    scores: NDArray[np.float32],
    axes: _GridAxes,
    bias: _GridBias,
    sizes: list[int],
    options: Options,
) -> None: ...
def neighbourhood_values(
    weights: NDArray[Any], v: NDArray[Any], out: NDArray[Any], axes: _GridAxes, sizes: list[int]
) -> None: ...
def neighbourhood_spread(
    weights: NDArray[Any],
    rows: NDArray[Any],
    out: NDArray[Any],
    d_bias: NDArray[np.float32] | None,
    axes: _GridAxes,
    bias: _GridBias,
    sizes: list[int],
    factor: float,
) -> None: ...
def neighbourhood_backward(
    arrays: _Forward,
    results: _Gradients,
    d_sinks: NDArray[np.float32] | None,
    d_bias: NDArray[np.float32] | None,
    axes: _GridAxes,
    bias: _GridBias,
    options: Options,
) -> None: ...
def index_sparse(
    q: NDArray[Any],
    k: NDArray[Any],
    v: NDArray[Any],
    out: NDArray[Any],
    lse: NDArray[np.float32],
    lists: _HeadLists,
    bias: NDArray[np.float32] | None,
    max: NDArray[np.float32] | None,
    options: Options,
) -> None: ...

# selectors; lists come back as (indptr, indices) of all heads one after another

_Lists = tuple[NDArray[np.int64], NDArray[np.uint32]]

def block_means(
    x: NDArray[Any], bounds: NDArray[np.int64], centre: NDArray[np.float32] | None, likeness: bool
) -> tuple[NDArray[np.float32], NDArray[np.float32]]: ...
def listed_means(x: NDArray[Any], bounds: NDArray[np.int64], indices: NDArray[np.uint32]) -> NDArray[np.float32]: ...
def pooled_blocks(
    q: NDArray[np.float32],
    k: NDArray[np.float32],
    scale: float,
    whole_rows: NDArray[np.bool_],
    always: NDArray[np.bool_],
    limits: NDArray[np.int64],
    share: NDArray[np.float32],
    by_count: bool,
    sinks: int,
) -> _Lists: ...
def block_mass(
    q: NDArray[Any],
    k: NDArray[Any],
    scale: float,
    row_bounds: NDArray[np.int64],
    blocks: tuple[NDArray[np.int64], NDArray[np.int64]],
    limits: NDArray[np.int64],
    shifts: int,
    weigh: bool,
    shared: bool,
) -> NDArray[np.float32]: ...
def line_mass(q: NDArray[Any], k: NDArray[Any], scale: float) -> tuple[NDArray[np.float32], NDArray[np.float32]]: ...
def choose(
    scores: NDArray[np.float32],
    columns: int,
    limits: NDArray[np.int64],
    forced: tuple[NDArray[np.int64], NDArray[np.int64]],
    marks: NDArray[np.bool_],
    share: NDArray[np.float32],
    numbers: tuple[int, int, int, int],
    together: int,
    counts: bool,
    spread: bool,
) -> _Lists: ...
def best_forced(
    q: NDArray[Any],
    k: NDArray[Any],
    limits: NDArray[np.int64],
    forced: tuple[NDArray[np.int64], NDArray[np.int64]],
    most: int,
) -> _Lists: ...
def block_deviations(x: NDArray[Any], bounds: NDArray[np.int64], means: NDArray[np.float32]) -> NDArray[np.float32]: ...
def line_lists(columns: _Lists, distances: _Lists, bounds: NDArray[np.int64]) -> _Lists: ...
def best_of_rows(q: NDArray[Any], k: NDArray[Any], share: float, least: int, options: Options) -> _Lists: ...
def chunk_keys(
    q: NDArray[np.float32],
    k: NDArray[np.float32],
    bounds: NDArray[np.int64],
    limits: NDArray[np.int64],
    budget: int,
    first: int,
    last: int,
) -> _Lists: ...
def stripes(
    q: NDArray[np.float32],
    k: NDArray[Any],
    scale: float,
    thresholds: NDArray[np.float32],
    step: int,
    starts: NDArray[np.int64],
    ends: NDArray[np.int64],
    shared: bool,
) -> _Lists: ...
def rounded_blocks(
    q: NDArray[Any],
    k: NDArray[Any],
    scale: float,
    query_bounds: NDArray[np.int64],
    block: int,
    judged: tuple[NDArray[np.int64], NDArray[np.int64]],
    limits: NDArray[np.int64],
    thresholds: NDArray[np.float32],
    mean_queries: NDArray[np.float32],
    levels: float,
) -> _Lists: ...
def hash_order(x: NDArray[Any], directions: NDArray[np.float32], gray: bool) -> NDArray[np.uint32]: ...
def hash_lists(
    order: NDArray[np.uint32], heads: int, block: int, samples: NDArray[np.uint32], own: bool
) -> tuple[_Lists, NDArray[np.float32]]: ...

# scans and convolutions

def selective_scan(
    x: NDArray[Any],
    dt: NDArray[Any],
    a: NDArray[np.float32],
    b: NDArray[Any],
    c: NDArray[Any],
    state: NDArray[np.float32],
    out: NDArray[Any],
    *,
    skip: NDArray[np.float32] | None = None,
    dt_bias: NDArray[np.float32] | None = None,
    softplus: bool = False,
    z: NDArray[Any] | None = None,
    cu_seqlens: NDArray[np.int64] | None = None,
) -> None: ...
def selective_scan_backward(
    x: NDArray[Any],
    dt: NDArray[Any],
    a: NDArray[np.float32],
    b: NDArray[Any],
    c: NDArray[Any],
    initial_state: NDArray[np.float32],
    d_out: NDArray[Any],
    dx: NDArray[np.float32],
    d_dt: NDArray[np.float32],
    da: NDArray[np.float32],
    db: NDArray[np.float32],
    dc: NDArray[np.float32],
    d_skip: NDArray[np.float32],
    d_dt_bias: NDArray[np.float32],
    d_state: NDArray[np.float32],
    *,
    skip: NDArray[np.float32] | None = None,
    dt_bias: NDArray[np.float32] | None = None,
    softplus: bool = False,
    z: NDArray[Any] | None = None,
    dz: NDArray[np.float32] | None = None,
    cu_seqlens: NDArray[np.int64] | None = None,
) -> None: ...
def diagonal_scan(
    x: NDArray[Any],
    decay_less_1: list[NDArray[np.float32]],
    b: list[NDArray[np.float32]],
    c: list[NDArray[np.float32]],
    state: NDArray[np.float32],
    out: NDArray[Any],
    *,
    skip: NDArray[np.float32] | None = None,
    silu: bool = False,
    cu_seqlens: NDArray[np.int64] | None = None,
) -> None: ...
def diagonal_scan_backward(
    x: NDArray[Any],
    decay_less_1: list[NDArray[np.float32]],
    b: list[NDArray[np.float32]],
    c: list[NDArray[np.float32]],
    initial_state: NDArray[np.float32],
    d_out: NDArray[Any],
    dx: NDArray[np.float32],
    d_decay: list[NDArray[np.float32]],
    db: list[NDArray[np.float32]],
    dc: list[NDArray[np.float32]],
    d_skip: NDArray[np.float32],
    d_state: NDArray[np.float32],
    *,
    skip: NDArray[np.float32] | None = None,
    cu_seqlens: NDArray[np.int64] | None = None,
) -> None: ...
def depthwise(
    x: NDArray[Any],
    weights: NDArray[np.float32],
    centre: Sequence[int],
    out: NDArray[Any],
    *,
    bias: NDArray[np.float32] | None = None,
    before: NDArray[Any] | None = None,
    silu: bool = False,
    cu_seqlens: NDArray[np.int64] | None = None,
    stride: Sequence[int] = (1, 1),
    depth: Sequence[int] = (1, 1, 1, 0, 1),
) -> None: ...
def dynamic_convolution(
    v: NDArray[Any],
    w: NDArray[Any],
    centre: int,
    softmax: bool,
    out: NDArray[Any],
    *,
    before: NDArray[Any] | None = None,
) -> None: ...
def neighbour_means(x: NDArray[Any], size: int, out: NDArray[Any]) -> None: ...
def toeplitz(
    x: NDArray[Any], kernel: NDArray[np.float64], zero: int, per_channel: bool, double: bool, out: NDArray[Any]
) -> None: ...
def toeplitz_attention(
    q: NDArray[Any],
    k: NDArray[Any],
    v: NDArray[Any],
    kernel: NDArray[np.float64],
    zero: int,
    double: bool,
    out: NDArray[np.float32],
) -> None: ...
def pointwise_function(name: str, x: NDArray[np.float32], factor: NDArray[np.float32] | None = None) -> None: ...

# grids

def sample(
    x: NDArray[Any],
    extent: list[int],
    coords: NDArray[np.float32],
    axes: int,
    groups: int,
    taps: int,
    weights: NDArray[np.float32] | None,
    unit: bool,
    align_corners: bool,
    border: bool,
    out: NDArray[np.float32],
) -> None: ...
def path_bias(
    along_x: NDArray[np.float64],
    along_y: NDArray[np.float64],
    extent: list[int],
    first_y: bool,
    lines: tuple[int, int],
    out: NDArray[np.float32],
) -> None: ...

# linear attention

def recurrence(
    q: NDArray[Any],
    k: NDArray[Any] | None,
    v: NDArray[Any],
    g: NDArray[Any] | None,
    beta: NDArray[Any] | None,
    delta: bool,
    scale: float,
    unit: float | None,
    normaliser: float | None,
    skip: NDArray[np.float32] | None,
    initial_state: NDArray[np.float32] | None,
    cu_seqlens: NDArray[np.int64] | None,
    chunk_size: int,
    out: NDArray[Any],
    out_state: NDArray[np.float32],
    *,
    columns: bool | None = None,
    bonus: NDArray[np.float32] | None = None,
    pair: tuple[NDArray[Any], NDArray[Any]] | None = None,
    squares: bool = False,
    maps: tuple[dict[str, Any] | None, dict[str, Any] | None] = (None, None),
    names: tuple[str, str, str, str, str] | None = None,
) -> None: ...
def recurrence_double(
    q: NDArray[np.float64],
    k: NDArray[np.float64] | None,
    v: NDArray[np.float64],
    g: NDArray[np.float64] | None,
    by_row: bool,
    beta: NDArray[np.float64] | None,
    delta: bool,
    scale: float,
    unit: float | None,
    normaliser: float | None,
    skip: NDArray[np.float64] | None,
    cu_seqlens: NDArray[np.int64] | None,
    out: NDArray[np.float64],
    out_state: NDArray[np.float64],
    *,
    columns: bool | None = None,
    bonus: NDArray[np.float64] | None = None,
    pair: tuple[NDArray[np.float64], NDArray[np.float64]] | None = None,
) -> None: ...
def refined_gates(x: NDArray[Any], by: NDArray[Any], floor: float, out: NDArray[np.float32]) -> None: ...
def decay_gates(
    x: NDArray[Any],
    rates: NDArray[np.float32],
    bias: NDArray[np.float32],
    bound: float | None,
    out: NDArray[np.float32],
) -> None: ...
def normalised_rows(
    x: NDArray[Any],
    centred: bool,
    eps: float,
    gain: NDArray[np.float32],
    shift: NDArray[np.float32],
    logs: NDArray[np.float64],
    out: NDArray[Any],
) -> None: ...
def scaled_rows(x: NDArray[Any], logs: NDArray[np.float64], out: NDArray[Any]) -> None: ...
def key_scales(
    k: NDArray[Any],
    g: NDArray[np.float32],
    cu_seqlens: NDArray[np.int64] | None,
    scales: NDArray[np.float64],
    beta: NDArray[np.float32],
    logs: NDArray[np.float64],
) -> None: ...
def fast_weight(
    q: NDArray[Any],
    k: NDArray[Any],
    v: NDArray[Any],
    rate: NDArray[np.float32],
    keep: NDArray[np.float32] | None,
    momentum: NDArray[np.float32] | None,
    threshold: NDArray[np.float32] | None,
    widths: list[int],
    activation: str,
    residual: tuple[NDArray[np.float32], NDArray[np.float32], float] | None,
    loss: tuple[str, float, float],
    retention: tuple[str, float, bool],
    before: bool,
    chunk: int,
    position: int,
    unit: float | None,
    scale: float,
    bias: bool,
    out: NDArray[Any],
    live: NDArray[np.float32],
    step: NDArray[np.float32],
    frozen: NDArray[np.float32],
) -> None: ...
def recurrence_backward(
    q: NDArray[Any],
    k: NDArray[Any],
    v: NDArray[Any],
    g: NDArray[Any] | None,
    beta: NDArray[Any] | None,
    delta: bool,
    scale: float,
    unit: float | None,
    normaliser: float | None,
    initial_state: NDArray[np.float32] | None,
    cu_seqlens: NDArray[np.int64] | None,
    chunk_size: int,
    d_out: NDArray[Any],
    d_state: NDArray[np.float32] | None,
    out: NDArray[Any] | None,
    dq: NDArray[np.float32],
    dk: NDArray[np.float32],
    dv: NDArray[np.float32],
    dg: NDArray[np.float32] | None,
    d_beta: NDArray[np.float32] | None,
    d_initial_state: NDArray[np.float32],
    *,
    pair: tuple[NDArray[Any], ...] | None = None,
    d_pair: tuple[NDArray[np.float32], ...] | None = None,
) -> None: ...
def key_statistics(
    k: NDArray[Any], v: NDArray[Any], map: dict[str, Any], keep: NDArray[np.bool_] | None
) -> list[NDArray[np.float32]]: ...
def read_statistics(
    q: NDArray[Any],
    map: dict[str, Any],
    statistics: list[NDArray[np.float32]],
    heads: int,
    read_out: tuple[str, float, float],
    factors: NDArray[np.float32] | None,
    add: NDArray[Any] | None,
    out: NDArray[Any],
) -> None: ...
def running_softmax(x: NDArray[Any], logs: NDArray[np.float64], out: NDArray[np.float32]) -> None: ...
def running_read(
    read: NDArray[np.float32],
    v: NDArray[Any],
    sums: NDArray[np.float32],
    count: int,
    read_out: tuple[str, float, float],
    factors: NDArray[np.float32] | None,
    out: NDArray[Any],
) -> None: ...
def feature_norms(x: NDArray[Any], map: dict[str, Any]) -> list[NDArray[np.float32]]: ...
def write_features(x: NDArray[Any], map: dict[str, Any]) -> NDArray[np.float32]: ...
