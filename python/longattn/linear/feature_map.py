"""Feature maps: what rows of queries and keys become before linear attention multiplies them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn import _core
from longattn._arrays import Array, as_numpy
from longattn._checks import check_floating, finite, integer, one_of

#: The maps, each with its formula.
KINDS = {
    "identity": "`x`",
    "relu": "`max(x, 0)`",
    "relu2": "`max(x, 0)^2`",
    "elu1": "`elu(x) + 1`",
    "exp": "`e^x`",
    "silu": "`x / (1 + e^-x)`",
    "softmax": "softmax over the channels",
    "softmax_pair": "softmax over the channels of `x`, then of `-x`",
    "gaussian": "`e^(W x - |x|^2 / 2)`, less the largest exponent",
    "taylor": "1, channels, products of two channels",
}
NORMS = ("none", "length", "standard")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FeatureMap:
    """A map of queries and keys, applied row by row as they are widened to float32: no mapped array exists.

    A row is multiplied by `scale`, normalised, projected, and mapped; then `offset` is added.

    Attributes:
        kind: "identity"; "relu"; "relu2"; "elu1"; "exp"; "silu"; "softmax" and "softmax_pair" (of `x` and of `-x`)
            over channels; "gaussian", positive random features `e^(W x - |x|^2 / 2)`, exponents less their largest,
            which cancels in normalised attention; "taylor", features whose products are `c0 + c1 s + c2 s^2` of the
            rows' product `s`.
        scale: factor on the rows.
        norm: "none", "length" (rows divided by their length) or "standard" (rows less their mean, divided by their
            standard deviation).
        projection: floating `[F, D]` or `[H, F, D]`, `W` in `x <- W x`; "gaussian" needs one.
        offset: added to all features.
        order: of "taylor", 1 or 2.
        coefficients: of "taylor", `(c0, c1, c2)`; `None` is `(1, 1, 1/2)`.

    Raises:
        TypeError: a part of another kind or dtype.
        ValueError: an unknown name or shape, or numbers that are not finite.

    Example:
        >>> import longattn as la
        >>> la.linear.FeatureMap(kind="relu", offset=1e-3).features(64)
        64
    """

    kind: str = "identity"
    scale: float = 1.0
    norm: str = "none"
    projection: Array | None = None
    offset: float = 0.0
    order: int = 2
    coefficients: tuple[float, float, float] | None = None

    def __post_init__(self) -> None:
        one_of(self.kind, "kind", KINDS)
        one_of(self.norm, "norm", NORMS)
        for value, name in ((self.scale, "scale"), (self.offset, "offset")):
            finite(value, name)
        integer(self.order, "order", 1, 2)
        if self.coefficients is not None:
            if len(self.coefficients) != 3:
                raise ValueError(f"coefficients: got {self.coefficients!r}, expected three numbers")
            for value in self.coefficients:
                finite(value, "coefficients")
        if self.kind == "gaussian" and self.projection is None:
            raise ValueError("projection: got None, expected directions for the map 'gaussian'")

    def features(self, dim: int) -> int:
        """Features of a row of `dim` channels."""
        n = dim if self.projection is None else int(self.projection.shape[-2])
        if self.kind == "softmax_pair":
            return 2 * n
        if self.kind == "taylor":
            return 1 + n + (n * (n + 1) // 2 if self.order == 2 else 0)
        return n


def feature_map(phi: str | FeatureMap, name: str = "phi") -> FeatureMap:
    """A map by its name, or itself."""
    if isinstance(phi, FeatureMap):
        return phi
    if not isinstance(phi, str):
        raise TypeError(f"{name}: got {type(phi).__name__}, expected the name of a map or a FeatureMap")
    return _named(one_of(phi, name, KINDS))


@cache
def _named(kind: str) -> FeatureMap:
    return FeatureMap(kind=kind)


def parts(phi: FeatureMap, heads: int, dim: int, *, keys: bool) -> dict[str, Any]:
    """The map as the compiled module takes it, for rows of `heads` heads and `dim` channels."""
    found: dict[str, Any] = {
        "map": phi.kind,
        "scale": float(phi.scale),
        "norm": phi.norm,
        "offset": float(phi.offset),
        "order": int(phi.order),
    }
    if phi.projection is not None:
        found["projection"] = directions(phi.projection, heads, dim)
    if phi.kind == "taylor" and keys:
        found["coefficients"] = tuple(float(c) for c in phi.coefficients or (1.0, 1.0, 0.5))
    return found


def features(x: NDArray[Any], phi: FeatureMap, *, keys: bool = False) -> NDArray[np.float32]:
    """Features `[B, H, L, features]` of rows `[B, H, L, D]`, exponents of "gaussian" as they are."""
    _, heads, _, dim = x.shape
    return _core.write_features(x, parts(phi, heads, dim, keys=keys)).reshape(*x.shape[:3], phi.features(dim))


def directions(projection: Array, heads: int, dim: int) -> NDArray[np.float32]:
    """A projection as contiguous `[F, D]` or `[H, F, D]`."""
    w = as_numpy(projection, "projection")
    check_floating(w, "projection")
    if w.ndim not in (2, 3) or w.shape[-1] != dim or w.shape[-2] == 0 or (w.ndim == 3 and w.shape[0] != heads):
        raise ValueError(f"projection: got shape {w.shape}, expected [F, {dim}] or [{heads}, F, {dim}]")
    return np.ascontiguousarray(w, np.float32)
