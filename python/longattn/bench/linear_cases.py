"""Arguments of every method of the families "linear" and "recurrent", for benchmarks that call them all.

`FURTHER` are methods of other families that take linear attention's inputs.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from longattn import linear
from longattn.bench.each_method import Arguments
from longattn.bench.each_method import call_with as _a
from longattn.linear import DiagonalSsm, MambaWeights, MegaWeights, TitansWeights

#: Places of a side of the map whose places are the rows, width of a head, heads.
SIDE, DIM, HEADS = 64, 64, 8
QUICK_SIDE, QUICK_DIM, QUICK_HEADS = 8, 8, 2
#: Random features, agents or slots; states of scans; width of queries and keys of Based.
FEATURES, STATES, NARROW = 64, 16, 16


class Inputs:
    """Random features and weights of a size.

    Attributes:
        places: rows, the places of a square map.
        size: in words.
    """

    def __init__(self, quick: bool = False, *, places: int | None = None, heads: int = 0, dim: int = 0) -> None:
        self.rng = np.random.default_rng(0)
        self.side = QUICK_SIDE if quick else SIDE
        self.places = self.side**2 if places is None else places
        self.n, self.dim = heads or (QUICK_HEADS if quick else HEADS), dim or (QUICK_DIM if quick else DIM)
        self.channels = self.n * self.dim
        self.size = f"{self.places} rows, {self.n} heads of {self.dim}"

    def x(self, *shape: int) -> NDArray[np.float32]:
        """Features."""
        return self.rng.standard_normal(shape, dtype=np.float32)

    def between(self, least: float, most: float, *shape: int) -> NDArray[np.float32]:
        """Uniform numbers."""
        return np.asarray(self.rng.uniform(least, most, shape), np.float32)

    def heads(self, dim: int = 0) -> NDArray[np.float32]:
        """Rows by heads, `[1, H, L, D]`."""
        return self.x(1, self.n, self.places, dim or self.dim)

    def qkv(self, dim: int = 0) -> tuple[NDArray[np.float32], ...]:
        """Queries, keys of length 1 and values."""
        q, k = self.heads(dim), self.heads(dim)
        return q, k / np.linalg.norm(k, axis=-1, keepdims=True), self.heads()

    def gates(self, *width: int) -> NDArray[np.float32]:
        """Log decays, one per row or one for each of its channels."""
        return self.between(-0.1, 0, 1, self.n, self.places, *width)

    def rates(self, most: float = 1.0) -> NDArray[np.float32]:
        """A number per row and head."""
        return self.between(0, most, 1, self.n, self.places)

    def rows(self, channels: int = 0) -> NDArray[np.float32]:
        """Rows `[1, L, C]`."""
        return self.x(1, self.places, channels or self.channels)

    def map(self) -> NDArray[np.float32]:
        """A map `[1, H, W, C]`."""
        return self.x(1, self.side, self.side, self.channels)

    def w(self, inputs: int = 0, outputs: int = 0) -> NDArray[np.float32]:
        """Weights that keep the size of numbers."""
        inputs = inputs or self.channels
        return np.asarray(self.rng.standard_normal((inputs, outputs or self.channels)) / np.sqrt(inputs), np.float32)

    def taps(self, *shape: int) -> NDArray[np.float32]:
        """Convolutions, the channels first."""
        made: NDArray[np.float32] = self.x(*shape) / np.float32(np.sqrt(np.prod(shape[1:])))
        return made

    def directions(self) -> NDArray[np.float32]:
        """Of random features."""
        return linear.random_directions(FEATURES, self.dim, seed=0)

    def mamba(self, width: int = 0) -> MambaWeights:
        """A Mamba block."""
        n = width or self.channels
        return MambaWeights(
            w_in=self.w(n, n), w_gate=self.w(n, n), conv=self.taps(n, 4), w_dt=(self.w(n, 16), self.w(16, n)),
            dt_bias=self.x(n), w_b=self.w(n, STATES), w_c=self.w(n, STATES), a=-np.exp(self.x(n, STATES)),
            skip=self.x(n), w_out=self.w(n, n),
        )  # fmt: skip

    def both(self) -> tuple[MambaWeights, MambaWeights, NDArray[np.float32]]:
        """Mamba blocks for both directions, and what merges them."""
        return self.mamba(), self.mamba(), self.w(2 * self.channels)

    def mega(self) -> MegaWeights:
        """A Mega layer, values twice as wide as the input."""
        n, dim, wide = self.channels, self.dim, 2 * self.channels
        columns = 2 * n + dim + wide
        return MegaWeights(
            ema=self.averages(), omega=self.x(n), w_v=self.w(n, wide), w_m=self.w(n, columns), b_m=self.x(columns),
            gamma_q=self.x(dim), beta_q=self.x(dim), gamma_k=self.x(dim), beta_k=self.x(dim), w_h=self.w(wide, n),
        )  # fmt: skip

    def titans(self) -> TitansWeights:
        """A layer of Titans with a few persistent tokens."""
        return TitansWeights(
            memory=(self.w(), self.w(), self.w()), attention=(self.w(), self.w(), self.w(), self.w()),
            persistent=self.x(4, self.channels),
        )  # fmt: skip

    def averages(self) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
        """Parameters of damped averages."""
        alpha, delta, beta, gamma = self.x(4, self.channels, STATES)
        return alpha, delta, beta, gamma

    def ssm(self) -> DiagonalSsm:
        """A diagonal state space model of each channel."""
        n = self.channels
        rates = -self.between(0.1, 1, n, STATES) + 1j * np.pi * np.arange(STATES)
        b, c = (self.x(n, STATES) + 1j * self.x(n, STATES) for _ in "bc")
        return DiagonalSsm(a=rates, b=b, c=c, dt=self.between(0.01, 0.3, n), skip=self.x(n))


def _agents(i: Inputs) -> Arguments:
    q, k, v = i.qkv()
    return _a(q, k, v, agents=np.ascontiguousarray(q[:, :, :: max(1, i.places // 49)][:, :, :49]))


#: Methods of the families "score", "exact" and "pool" with a row among these.
FURTHER = (
    "local_linear_attention",
    "shared_time_frequency_attention",
    "pool_token_mixer",
    "learned_aggregation_pool",
)
#: Arguments of each method.
CASES: dict[str, Callable[[Inputs], Arguments]] = {
    "adaptive_frequency_filter": lambda i: _a(
        i.x(1, i.channels, i.side, i.side), *(i.x(2, i.n, i.dim, i.dim) / i.dim for _ in range(2))
    ),
    "agent_attention": _agents,
    "based": lambda i: _a(*i.qkv(NARROW)),
    "bidirectional_gated_ssm": lambda i: _a(i.rows(), i.ssm(), i.ssm(), i.w(2 * i.channels), i.w(), i.w()),
    "bidirectional_mamba": lambda i: _a(i.rows(), i.mamba(), i.mamba()),
    "blended_softmax_linear_attention": lambda i: _a(*i.qkv(), 0.5),
    "causal_efficient_attention": lambda i: _a(*i.qkv()),
    "causal_fastmax_attention": lambda i: _a(i.heads(NARROW), i.heads(NARROW), i.heads()),
    "causal_focused_linear_attention": lambda i: _a(*i.qkv()),
    "causal_inline_attention": lambda i: _a(*i.qkv()),
    "causal_l2vit_linear_attention": lambda i: _a(*i.qkv()),
    "causal_magnitude_aware_linear_attention": lambda i: _a(*i.qkv()),
    "causal_performer_attention": lambda i: _a(*i.qkv(), i.directions()),
    "causal_simplified_linear_attention": lambda i: _a(*i.qkv()),
    "delta_rule_attention": lambda i: _a(*i.qkv(), i.rates(), scale=1.0),
    "efficient_attention": lambda i: _a(*i.qkv()),
    "fastmax_attention": lambda i: _a(i.heads(i.dim // 2), i.heads(i.dim // 2), i.heads()),
    "flare_attention": lambda i: _a(i.x(i.n, FEATURES, i.dim), *i.qkv()[1:]),
    "focused_linear_attention": lambda i: _a(*i.qkv()),
    "gated_associative_memory": lambda i: _a(
        i.rows(), i.taps(i.channels, 3), i.x(512, i.channels), i.w(0, 2 * i.channels), heads=i.n
    ),
    "gated_delta_rule": lambda i: _a(*i.qkv(), i.gates(), i.rates(), scale=1.0),
    "gated_fifo_memory_attention": lambda i: _a(
        i.rows(), i.w(), i.w(), i.w(), (i.w(), i.w(), i.x(i.channels), i.w()), heads=i.n
    ),
    "gated_linear_attention": lambda i: _a(*i.qkv(), i.gates(i.dim), scale=1.0),
    "gated_slot_attention": lambda i: _a(*i.qkv(), i.gates(FEATURES)),
    "grouped_linear_attention_local_conv": lambda i: _a(*i.qkv(), i.x(i.n, 4)),
    "hgrn2": lambda i: _a(i.heads(), i.heads(), i.gates(i.dim)),
    "hyena_pixel_conv": lambda i: _a(
        i.map(), i.w(0, 3 * i.channels), i.taps(3 * i.channels, 3, 3),
        i.taps(i.channels, 2 * i.side - 1, 2 * i.side - 1),
    ),
    "inline_attention": lambda i: _a(*i.qkv()),
    "kernelized_rpe_attention": lambda i: _a(*i.qkv(), i.x(i.n, 2 * i.places - 1), i.directions(), causal=True),
    "kimi_delta_attention": lambda i: _a(*i.qkv(), i.gates(i.dim), i.rates(), scale=1.0, normalize_qk=False),
    "l2vit_linear_attention": lambda i: _a(*i.qkv()),
    "lasp2_linear_attention": lambda i: _a(*i.qkv()),
    "lightning_attention": lambda i: _a(*i.qkv(), i.between(0, 0.1, i.n)),
    "linear_attention": lambda i: _a(*(np.abs(x) for x in i.qkv())),
    "learned_aggregation_pool": lambda i: _a(i.rows()[0, :1], i.rows(), *(i.w() for _ in "qkvo"), heads=i.n),
    "linear_match_attention": lambda i: _a(*i.qkv()),
    "local_linear_attention": lambda i: _a(*i.qkv(), 0.1, causal=True, steps=4),
    "magnitude_aware_linear_attention": lambda i: _a(*i.qkv()),
    "mamba_mixer": lambda i: _a(i.rows(), i.mamba()),
    "mega_gated_attention": lambda i: _a(i.rows(), i.mega(), chunk=128),
    "miras_memory": lambda i: _a(*i.qkv(), i.rates(0.1), variant="yaad", delta=1.0),
    "multi_dim_damped_ema": lambda i: _a(i.rows(), *i.averages()),
    "performer_attention": lambda i: _a(*i.qkv(), i.directions()),
    "pool_token_mixer": lambda i: _a(i.map()),
    "regla": lambda i: _a(
        *(0.1 * x for x in i.qkv()), *(i.between(0.5, 1, 1, i.n, i.places, i.dim) for _ in range(2))
    ),
    "retention": lambda i: _a(*i.qkv(), scale=1.0),
    "reverse_attention_gate": lambda i: _a(i.map(), i.x(1, i.side // 2, i.side // 2)),
    "rwkv6": lambda i: _a(*i.qkv(), i.gates(i.dim), i.x(i.n, i.dim)),
    "rwkv7": lambda i: _a(
        *i.qkv(), i.gates(i.dim), *(i.between(-1, 1, 1, i.n, i.places, i.dim) / np.float32(i.dim) for _ in "ab")
    ),
    "selective_scan": lambda i: _a(
        i.rows(), i.rows(), -np.exp(i.x(i.channels, STATES)), i.rows(STATES), i.rows(STATES), softplus=True, z=i.rows()
    ),
    "selective_token_channel_mixer": lambda i: _a(i.rows(), [(i.mamba(), i.mamba(i.places))]),
    "shared_time_frequency_attention": lambda i: _a(
        i.map(), (i.x(i.channels), i.x(i.channels)), *(i.w() for _ in "qkvo"), heads=i.n, time=i.both(),
        frequency=i.both(),
    ),
    "simplified_linear_attention": lambda i: _a(*i.qkv()),
    "span_dynamic_convolution": lambda i: _a(
        i.rows(), i.w(), i.taps(i.channels, 3), i.w(), i.w(), i.w(0, i.n * 9), heads=i.n
    ),
    "state_space_duality": lambda i: _a(
        i.heads(), i.rates(0.1), -i.between(0, 1, i.n), i.x(1, 1, i.places, i.dim), i.x(1, 1, i.places, i.dim)
    ),
    "taipan_selective_attention": lambda i: _a(i.rows(), *i.qkv(), i.x(1, i.places, 2), window=256),
    "titans_memory_as_context": lambda i: _a(i.rows(), 0.1, i.titans(), heads=i.n, segment=256, alpha=0.01, eta=0.5),
    "titans_memory_as_gate": lambda i: _a(i.rows(), 0.1, i.titans(), heads=i.n, window=256, alpha=0.01, eta=0.5),
    "titans_memory_as_layer": lambda i: _a(i.rows(), 0.1, i.titans(), heads=i.n, window=256, alpha=0.01, eta=0.5),
    "titans_neural_memory": lambda i: _a(*i.qkv(), i.rates(0.1), alpha=0.01, eta=0.5),
    "ttt_linear": lambda i: _a(*i.qkv(), i.rates(0.1), np.ones(i.dim, np.float32), np.zeros(i.dim, np.float32)),
}  # fmt: skip
