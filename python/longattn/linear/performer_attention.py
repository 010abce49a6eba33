"""Linear attention with random features of the softmax kernel."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import Array
from longattn._checks import finite, flag, integer, one_of
from longattn.linear._global import attend, inputs
from longattn.linear.feature_map import FeatureMap, directions, parts
from longattn.methods import Method
from longattn.reference import linear as reference


def performer_attention(
    q: Array,
    k: Array,
    v: Array,
    projection: Array,
    *,
    kernel: str = "softmax",
    scale: float | None = None,
    eps: float = 0.0,
    mask: Array | None = None,
    out: Array | None = None,
) -> Any:
    """Normalised linear attention whose features are random: an estimate of softmax attention.

    With `kernel="softmax"`, `phi(x) = e^(W x - |x|^2 / 2)` of `x = sqrt(scale) q` or `sqrt(scale) k`, whose products
    are, in the mean over Gaussian `W`, `e^(scale q k)`. Exponents are taken less their largest, per query and per head
    of keys, which cancels. With "relu", `phi(x) = relu(W x) + 1e-3`.

    Args:
        q: queries `[B, Hq, Lq, D]`, or `[Hq, Lq, D]`; float32, float16 or bfloat16.
        k: keys `[B, Hkv, Lk, D]`, or `[Hkv, Lk, D]`; any of the three dtypes.
        v: values `[B, Hkv, Lk, Dv]`, or `[Hkv, Lk, Dv]`; dtype of `k`.
        projection: `W`, floating `[F, D]`, shared by the heads; `random_directions` draws it.
        kernel: "softmax" or "relu".
        scale: factor on the products, above 0; `None` is `D ** -0.5`.
        eps: added to the denominator.
        mask: boolean `[Lk]` or `[B, Lk]`; True lets the key count.
        out: array of the result's shape, kind and dtype that receives it.

    Returns:
        The output `[B, Hq, Lq, Dv]` (or `[Hq, Lq, Dv]`), in the kind and dtype of `q`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        `(Hq * Lq + Hkv * Lk) * F * (D + Dv)` multiply-adds.

    References:
        K. Choromanski et al., "Rethinking Attention with Performers", 2020, arXiv:2009.14794.

    Example:
        >>> import numpy as np, longattn as la
        >>> q, k, v = np.random.default_rng(0).standard_normal((3, 4, 100, 16), dtype=np.float32)
        >>> w = la.linear.random_directions(64, 16, seed=0)
        >>> la.linear.performer_attention(q, k, v, w).shape
        (4, 100, 16)
    """
    qn, kn, _ = arrays = inputs(q, k, v)
    dim = qn.shape[3]
    factor = dim**-0.5 if scale is None else finite(scale, "scale")
    if factor <= 0:
        raise ValueError(f"scale: got {scale}, expected above 0")
    one_of(kernel, "kernel", ("softmax", "relu"))
    w = directions(projection, kn.shape[1], dim)
    if w.ndim != 2:
        raise ValueError(f"projection: got shape {w.shape}, expected [F, {dim}]")
    kind, offset = ("gaussian", 0.0) if kernel == "softmax" else ("relu", 1e-3)
    phi = FeatureMap(kind=kind, scale=factor**0.5, projection=w, offset=offset)
    maps = parts(phi, qn.shape[1], dim, keys=False), parts(phi, kn.shape[1], dim, keys=True)
    return attend(q, arrays, maps, ("divide", finite(eps, "eps", 0), 0.0), mask=mask, out=out)


def random_directions(features: int, dim: int, *, seed: int, orthogonal: bool = True) -> NDArray[np.float32]:
    """Gaussian directions for random features, by default orthogonal in blocks of `dim`, which lowers their variance.

    Args:
        features: how many.
        dim: their length.
        seed: of the random numbers.
        orthogonal: make those of a block orthogonal; their lengths stay those of Gaussian vectors.

    Returns:
        float32 `[features, dim]`.

    Raises:
        TypeError: an argument of another kind.
        ValueError: a number below 1.

    Cost:
        `features * dim ** 2` operations.
    """
    count, size = integer(features, "features", 1), integer(dim, "dim", 1)
    rng = np.random.default_rng(integer(seed, "seed", 0))
    blocks = []
    for first in range(0, count, size):
        drawn = rng.standard_normal((size, size))
        if flag(orthogonal, "orthogonal"):
            turned, upper = np.linalg.qr(drawn)
            lengths = np.linalg.norm(rng.standard_normal((size, size)), axis=1, keepdims=True)
            drawn = (turned * np.sign(np.diag(upper))).T * lengths
        blocks.append(drawn[: count - first])
    return np.concatenate(blocks).astype(np.float32)


METHOD = Method(
    name="performer_attention",
    family="linear",
    title="Rethinking Attention with Performers",
    year=2020,
    arxiv="2009.14794",
    function=performer_attention,
    reference=reference.performer_attention,
    exact=False,
    modes=frozenset({"non-causal", "self", "cross"}),
    gqa=True,
    step=False,
    checks=(
        "With more features it comes nearer to softmax attention.",
        "A constant added to all exponents of keys changes nothing.",
        "Equal values return that value.",
        "Orthogonal directions are orthogonal within a block.",
    ),
    tests="tests/linear/test_performer_attention.py",
    cost="`(Hq * Lq + Hkv * Lk) * F * (D + Dv)` multiply-adds.",
)
