"""PowerAttention: near blocks, and blocks at distances that are powers of two."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from longattn._arrays import Array
from longattn._checks import flag
from longattn.methods import Method
from longattn.pictures import example, seen
from longattn.reference import sparse as reference
from longattn.sparse._lists import pointers
from longattn.sparse._selecting import aligned_first, block_bounds, keep_integers, only_causal, selector_inputs
from longattn.sparse.block_mask import BlockMask, fitted
from longattn.sparse.composed import Composable
from longattn.sparse.sparse_attention import sparse_attention


@dataclass(frozen=True, slots=True, kw_only=True)
class PowerOfTwo(Composable):
    """The mask of PowerAttention: block `I` of positions sees block `J <= I` where a rule says so.

    The rule: `I - J < n_window`, or `I - J` is a power of two, or `J < n_sink`. It depends on positions alone, so that
    a decode step or a chunk of a prefill gets the rows that it would have in the whole.

    Args:
        block: positions of a block; 1 is the rule for tokens.
        n_window: nearest blocks, the own one included.
        n_sink: first blocks.
        powers: whether blocks at distances 1, 2, 4, ... are seen.

    Raises:
        TypeError: an argument of another kind.
        ValueError: a size below 1 (`n_sink` below 0).
    """

    block: int = 256
    n_window: int = 5
    n_sink: int = 1
    powers: bool = True

    def __post_init__(self) -> None:
        """Checks the sizes."""
        keep_integers(self, block=1, n_window=1, n_sink=0)
        flag(self.powers, "powers")

    def __call__(self, q: Array, k: Array, *, causal: bool = True, scale: float | None = None) -> BlockMask:
        """The mask for these lengths, one list for all heads; numbers in `q` and `k` do not matter."""
        del scale
        only_causal(causal)
        qn, kn = selector_inputs(q, k)
        lengths = (qn.shape[2], kn.shape[2])
        first = aligned_first(lengths, self.block)
        starts = block_bounds(lengths[0], self.block, first)[:-1] + (lengths[1] - lengths[0])
        own = starts // self.block  # of each block of queries
        count = -(-lengths[1] // self.block)
        far = 2 ** np.arange(max(count - 1, 0).bit_length()) if self.powers else np.zeros(0, np.int64)
        back = np.union1d(np.arange(min(self.n_window, count)), far)
        seen = np.concatenate(
            [
                own[:, None] - back,
                np.broadcast_to(np.arange(min(self.n_sink, count)), (len(own), min(self.n_sink, count))),
            ],
            axis=1,
        )
        kept = (seen >= 0) & (seen <= own[:, None])
        codes = np.unique((np.arange(len(own))[:, None] * max(count, 1) + seen)[kept])
        return BlockMask(
            indptr=pointers(codes // max(count, 1), (1, 1, len(own))),
            indices=codes % max(count, 1),
            **fitted(lengths, self.block, self.block, first),
        )


def power_of_two_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    block: int = 256,
    n_window: int = 5,
    n_sink: int = 1,
    powers: bool = True,
    scale: float | None = None,
    **options: Any,
) -> Any:
    """Causal attention over near blocks, blocks at distances that are powers of two, and the first blocks.

    Block `I` of positions sees block `J <= I` if `I - J < n_window`, or `I - J` is a power of two, or `J < n_sink`;
    inside these blocks attention is causal. Through `d` layers information reaches any distance of at most `d` ones in
    binary, so all of `n` blocks are reached in `log2 n` layers. (This is not the "power attention" that raises scores
    to a power.)

    Args:
        q: queries `[B, Hq, Lq, D]`, or `[Hq, Lq, D]`; float32, float16 or bfloat16, those of the last `Lq` keys.
        k: keys `[B, Hkv, Lk, D]`, or `[Hkv, Lk, D]`; any of the three dtypes.
        v: values `[B, Hkv, Lk, Dv]`, or `[Hkv, Lk, Dv]`; dtype of `k`.
        block: positions of a block; 1 is the rule for tokens.
        n_window: nearest blocks, the own one included.
        n_sink: first blocks.
        powers: whether blocks at distances 1, 2, 4, ... are seen.
        scale: factor on the dot products; `None` is `D ** -0.5`.
        options: those of `sparse_attention`: `return_lse`, `return_stats`, `out`, `softcap`, `sinks`, ...

    Returns:
        The output as of `longattn.sparse_attention`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        `Lq * block * (n_window + n_sink + log2(Lk / block)) * (D + Dv)` multiply-adds per query head; nothing to score.

    References:
        "PowerAttention: Exponentially Scaling of Receptive Fields for Effective Sparse Attention", 2025,
        arXiv:2503.03588.

    Example:
        >>> import numpy as np, longattn as la
        >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 500, 16), dtype=np.float32)
        >>> whole = la.sparse.power_of_two_attention(q, k, v, block=32, n_window=2)
        >>> step = la.sparse.power_of_two_attention(q[:, -1:], k, v, block=32, n_window=2)
        >>> np.allclose(step, whole[:, -1:], atol=1e-5)
        True
    """
    selector = PowerOfTwo(block=block, n_window=n_window, n_sink=n_sink, powers=powers)
    return sparse_attention(q, k, v, selector, causal=True, scale=scale, **options)


METHOD = Method(
    name="power_of_two_attention",
    family="sparse",
    title="PowerAttention: Exponentially Scaling of Receptive Fields for Effective Sparse Attention",
    year=2025,
    arxiv="2503.03588",
    function=power_of_two_attention,
    reference=reference.power_of_two_attention,
    exact=True,
    modes=frozenset({"causal", "self"}),
    gqa=True,
    checks=(
        "With as many near blocks as there are it is causal attention.",
        "Without powers it is attention to first and near blocks.",
        "Every earlier block is reached through `ceil(log2 n) + 1` layers.",
        "It is dense attention with the mask that its blocks stand for.",
        "Decode steps give the rows of the prefill.",
    ),
    tests="tests/sparse/test_power_of_two_attention.py",
    cost="`Lq * block * (n_window + n_sink + log2(Lk / block)) * (D + Dv)` multiply-adds per query head.",
    mask=lambda: seen(power_of_two_attention, *example(), block=4, n_window=2),
)
