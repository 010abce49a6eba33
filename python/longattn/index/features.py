"""`Features`: inverted lists of sparse features of every key."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from longattn import _core
from longattn._arrays import Array, as_numpy
from longattn._checks import check_floating, flag, integer, real
from longattn.index._index import Index, check_store
from longattn.kv import KVStore


class Features(Index):
    """Sparse features of every key of a store, in inverted lists, by which rows are ranked.

    A key's features are the largest `top_k` of `z = (k - b_dec) @ w_enc + b_enc`, those above 0 only (a sparse
    autoencoder's code). A row's score is `sum_f u_f * idf_f * a_f` over its features `f`, `a_f` being its activation
    and `u_f` the sum of the activations of a query group's heads. It estimates nothing: of use with `top_k` and
    `rest="none"`.

    Args:
        store: the store to index; it is kept alive.
        w_enc: floating `[head_dim, features]`, or `[kv_heads, head_dim, features]`, one for each KV head.
        b_enc: bias, floating `[features]` or `[kv_heads, features]`; `None` is zeros.
        b_dec: subtracted first, floating `[head_dim]` or `[kv_heads, head_dim]`; `None` is zeros.
        top_k: features of a row.
        relu: only features above 0 count.
        idf: weigh a feature that `n` of the `N` rows have by `ln((N - n + 1/2) / (n + 1/2) + 1)`.
        stop_share: features that more than this share of the rows have do not count.
        scale: the factor that attention multiplies logits by, `None` being `head_dim ** -0.5`: features are those of
            the queries themselves.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        Memory: 6 bytes per entry, of which a row has up to `top_k` for each KV head, and 48 per list. Build:
        `head_dim * features` multiply-adds per key and KV head. A pick encodes the queries of a group and reads the
        lists of their features.

    References:
        S^3-Attention, 2026, arXiv:2601.17702.
    """

    __slots__ = ()

    KIND: ClassVar[str] = "features"

    def __init__(
        self,
        store: KVStore,
        w_enc: Array,
        *,
        b_enc: Array | None = None,
        b_dec: Array | None = None,
        top_k: int = 32,
        relu: bool = True,
        idf: bool = True,
        stop_share: float = 1.0,
        scale: float | None = None,
    ) -> None:
        check_store(store)
        weights, bias, centre = encoder_arrays(w_enc, b_enc, b_dec, ranks=(2, 3))
        heads = (1, store.kv_heads)
        if weights.shape[0] not in heads or weights.shape[1] != store.head_dim:
            expected = f"[{store.head_dim}, features] or [{store.kv_heads}, {store.head_dim}, features]"
            raise ValueError(f"w_enc: got shape {weights.shape}, expected {expected}")
        factor = store.head_dim**-0.5 if scale is None else real(scale, "scale")
        self._set(
            _core.features(
                store._handle,
                weights,
                bias,
                centre,
                integer(top_k, "top_k", 1, weights.shape[2]),
                flag(relu, "relu"),
                flag(idf, "idf"),
                real(stop_share, "stop_share"),
                factor,
            ),
            store,
        )


def encoder_arrays(
    w_enc: Array, b_enc: Array | None, b_dec: Array | None, *, ranks: tuple[int, ...]
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """Weights `[heads or 1, D, F]`, bias `[heads or 1, F]` and centre `[heads or 1, D]`, contiguous float32."""
    weights = as_numpy(w_enc, "w_enc", any_strides=True)
    check_floating(weights, "w_enc")
    if weights.ndim not in ranks or not weights.size:
        expected = "[D, F]" if ranks == (2,) else "[D, F] or [heads, D, F]"
        raise ValueError(f"w_enc: got shape {weights.shape}, expected {expected}")
    *outer, dim, features = weights.shape
    found = []
    for given, name, width in ((b_enc, "b_enc", features), (b_dec, "b_dec", dim)):
        x = np.zeros((*outer, width), np.float32) if given is None else as_numpy(given, name, any_strides=True)
        check_floating(x, name)
        if x.shape != (*outer, width):
            raise ValueError(f"{name}: got shape {x.shape}, expected {(*outer, width)}")
        found.append(np.ascontiguousarray(x.reshape(-1, width), np.float32))
    return np.ascontiguousarray(weights.reshape(-1, dim, features), np.float32), found[0], found[1]
