"""Biases of logits from the relative places of tokens in a window."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from longattn._arrays import Array, as_numpy, reshaped
from longattn._checks import check_floating, flag, integers, items_of
from longattn.vision._inputs import Float32, Linear, Weights, layer_norm, norm_weights, numbers


def relative_position_bias(table: Array, size: Sequence[int], key_size: Sequence[int] | None = None) -> Float32:
    """The bias of each pair of a query's and a key's place in their windows, from a table by their difference.

    Args:
        table: floating `[product of (size + key_size - 1), heads]`: row
            `sum over axes of (query - key + key_size - 1) * stride`, the last axis fastest.
        size: places of the queries' window along each axis.
        key_size: those of the keys'; `None` is `size`.

    Returns:
        Float32 `[heads, queries, keys]`, for `bias` of attention.

    Raises:
        TypeError: no array, or no floating dtype.
        ValueError: a shape that does not fit.

    Cost:
        The result.
    """
    sizes = integers(size, "size", 1)
    keys = sizes if key_size is None else integers(key_size, "key_size", 1)
    if len(keys) != len(sizes):
        raise ValueError(f"key_size: got {len(keys)} numbers, expected {len(sizes)} as size")
    spans = [a + b - 1 for a, b in zip(sizes, keys, strict=True)]
    values = numbers(table, "table", (math.prod(spans), None))
    index = np.zeros((1, 1), np.int64)
    for q, k, span in zip(sizes, keys, spans, strict=True):
        one = np.arange(q)[:, None] - np.arange(k) + k - 1
        index = span * index[:, None, :, None] + one[None, :, None, :]
        index = reshaped(index, index.shape[0] * q, -1)
    return np.ascontiguousarray(np.moveaxis(values[index], -1, 0))


def absolute_offset_bias(table: Array, size: Sequence[int]) -> Float32:
    """The bias of each pair of places from a table by the magnitudes of their offsets along each axis.

    Args:
        table: floating `[heads, product of size]`: entry `|dy| * width + |dx|`, which is the order in which a scan
            of all pairs meets the offsets first.
        size: places along each axis.

    Returns:
        Float32 `[heads, tokens, tokens]`.

    Raises:
        TypeError: no array, or no floating dtype.
        ValueError: a shape that does not fit.

    Cost:
        The result.
    """
    sizes = integers(size, "size", 1)
    values = numbers(table, "table", (None, math.prod(sizes)))
    places = np.stack(np.meshgrid(*(np.arange(n) for n in sizes), indexing="ij"), axis=-1).reshape(-1, len(sizes))
    offsets = np.abs(places[:, None] - places[None])
    index = np.zeros(offsets.shape[:2], np.int64)
    for axis, n in enumerate(sizes):
        index = n * index + offsets[..., axis]
    return np.ascontiguousarray(values[:, index])


def dynamic_position_bias(
    size: Sequence[int],
    first: Weights,
    layers: Sequence[tuple[tuple[Array, Array], Weights]],
    *,
    residual: bool = False,
) -> Float32:
    """A table for `relative_position_bias` made by a small network from the offsets themselves.

    `p = first(offset)`, then for each layer `p = linear(relu(norm(p)))`; the last layer has `heads` outputs.

    Args:
        size: places of a window along each of n axes.
        first: weights `[n, c]`, or a pair with the bias.
        layers: pairs of a layer norm `(weight, bias)` and weights `[c, c]`, of the last layer `[c, heads]`.
        residual: add to each layer but the last what goes into it.

    Returns:
        Float32 `[product of (2 * size - 1), heads]`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes that do not fit.

    Cost:
        `product of (2 * size - 1) * c ** 2` multiply-adds per layer; once per size.
    """
    sizes = integers(size, "size", 1)
    if not sizes:
        raise ValueError("size: got none, expected the places along at least one axis")
    layers, adds = items_of(layers, "layers", "pairs (norm, weights)"), flag(residual, "residual")
    lines = [np.arange(1 - n, n, dtype=np.float32) for n in sizes]
    offsets = np.stack(np.meshgrid(*lines, indexing="ij"), axis=-1).reshape(-1, len(sizes))
    p = Linear.of(first, "first", len(sizes))(offsets)
    if not layers:
        raise ValueError("layers: got none, expected at least 1")
    for n, layer in enumerate(layers):
        if not isinstance(layer, tuple | list) or len(layer) != 2:
            raise TypeError(f"layers[{n}]: got {type(layer).__name__}, expected a pair (norm, weights)")
        norm = norm_weights(layer[0], f"layers[{n}] norm", p.shape[1])
        more = Linear.of(layer[1], f"layers[{n}] weights", p.shape[1])(np.maximum(layer_norm(p, *norm), 0))
        p = p + more if adds and n + 1 < len(layers) else more
    return p


def optional_bias(table: Array | None, name: str, size: Sequence[int], heads: int) -> Float32 | None:
    """`relative_position_bias` of a table that may be absent, one bias per head."""
    if table is None:
        return None
    a = as_numpy(table, name, any_strides=True)
    check_floating(a, name)
    expected = (math.prod(2 * n - 1 for n in size), heads)
    if a.shape != expected:
        raise ValueError(f"{name}: got shape {a.shape}, expected {expected}")
    return relative_position_bias(a, size)
