"""PoolFormer's mixer of tokens: the mean of the neighbours, less the token."""

from __future__ import annotations

from longattn import _core
from longattn._arrays import Array, like
from longattn._checks import integer, result_array
from longattn.linear._channels import storage_rows
from longattn.methods import Method
from longattn.reference import pool as reference


def pool_token_mixer(x: Array, *, size: int = 3, out: Array | None = None) -> Array:
    """The mean over the square around each place, places outside the map not counted, less the place itself.

    What is subtracted cancels the block's residual. Differences are what is added up, so a constant map gives zeros.

    Args:
        x: `[B, H, W, C]`; float32, float16 or bfloat16.
        size: side of the square, odd.
        out: memory for the result.

    Returns:
        `[B, H, W, C]` in the kind and dtype of `x`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: another shape, or an even size.

    Cost:
        `B * H * W * C * size ** 2` additions.

    References:
        W. Yu, M. Luo, P. Zhou, C. Si, Y. Zhou, X. Wang, J. Feng, S. Yan, "MetaFormer Is Actually What You Need for
        Vision", 2021, arXiv:2111.11418.

    Example:
        >>> import numpy as np, longattn.pool
        >>> x = np.ones((1, 7, 7, 4), np.float32)
        >>> float(abs(longattn.pool.pool_token_mixer(x)).max())
        0.0
    """
    xn = storage_rows(x, "x", (None, None, None, None), "[B, H, W, C]")
    side = integer(size, "size", 1)
    if side % 2 == 0:
        raise ValueError(f"size: got {side}, expected an odd number")
    result = result_array(out, x, xn.shape, xn.dtype, {"x": xn})
    _core.neighbour_means(xn, min(side, 2 * max(xn.shape[1:3], default=1) + 1), result)
    return like(x, result) if out is None else out


METHOD = Method(
    name="pool_token_mixer",
    family="pool",
    title="MetaFormer Is Actually What You Need for Vision",
    year=2021,
    arxiv="2111.11418",
    function=pool_token_mixer,
    reference=reference.pool_token_mixer,
    exact=True,
    modes=frozenset({"non-causal", "self"}),
    gqa=False,
    step=False,
    checks=(
        "A constant map gives zeros everywhere.",
        "A square of one place gives zeros.",
        "With the map added it is attention in a window with scores of 0.",
    ),
    tests="tests/pool/test_pool_token_mixer.py",
    cost="`B * H * W * C * size ** 2` additions.",
)
