"""Attention of a template and a search region, in which the template may not see the search region."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import Array, reshaped
from longattn._checks import flag, items_of, scale_factor
from longattn.methods import Method
from longattn.reference import vision as reference
from longattn.vision._inputs import Float32, Linear, Weights, grid, head_count, numbers, optional_linear, returned
from longattn.vision.convolution import depthwise_convolution
from longattn.vision.partition import attend


def asymmetric_mixed_attention(
    search: Array | None,
    templates: Sequence[Array],
    kernels: tuple[Array, Array, Array],
    wq: Weights,
    wk: Weights,
    wv: Weights,
    *,
    heads: int,
    stride: int = 2,
    wo: Weights | None = None,
    symmetric: bool = False,
    scale: float | None = None,
    cache: tuple[Array, Array] | None = None,
) -> tuple[list[Array], Array | None, tuple[Array, Array]]:
    """Mixed attention of a tracker: one attention extracts features and relates template and search region.

    Queries, keys and values are projections of depth-wise convolutions of each part, those of keys and values with a
    stride. The search region's queries see the keys of all parts. The templates' see only those of the templates, so
    that these, and their outputs, do not depend on the search region and are computed once per tracked target: pass
    the `cache` that came back, and no templates. With `symmetric` all see all.

    Args:
        search: the search region `[B, H, W, C]`, or `None`; float32, float16 or bfloat16.
        templates: the templates, `[B, H', W', C]` each.
        kernels: convolutions of queries, keys and values, floating `[k, k, C]` each, odd `k`.
        wq: query weights `[C, heads * D]`, or a pair `(matrix, bias)`.
        wk: key weights, likewise.
        wv: value weights `[C, heads * Dv]`, likewise.
        heads: heads.
        stride: of the keys' and values' convolutions.
        wo: output projection, or `None`.
        symmetric: the templates see the search region.
        scale: factor on the logits; `None` is `D ** -0.5`. The published tracker has `(heads * D) ** -0.5`.
        cache: keys and values of the templates of an earlier call, in place of `templates`; not with `symmetric`.

    Returns:
        The templates' outputs, the search region's output (`None` without one), each as a grid in the kind and dtype of
        its input, and the templates' projected keys and values, float32 `[B, tokens, heads * D]` and
        `[B, tokens, heads * Dv]`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        `(Nt ** 2 + Ns * (Nt + Ns)) / stride ** 2 * heads * (D + Dv)` multiply-adds for `Nt` and `Ns` tokens, without
        the first term where there is a cache, and the projections.

    References:
        Y. Cui et al., "MixFormer: End-to-End Tracking with Iterative Mixed Attention", 2022, arXiv:2203.11082.

    Example:
        >>> import numpy as np, longattn.vision
        >>> rng = np.random.default_rng(0)
        >>> search, template = (rng.standard_normal((1, n, n, 8), dtype=np.float32) for n in (8, 4))
        >>> kernels, w = (np.ones((3, 3, 8)),) * 3, rng.standard_normal((3, 8, 8), dtype=np.float32)
        >>> outs, out, cache = longattn.vision.asymmetric_mixed_attention(search, [template], kernels, *w, heads=2)
        >>> again = longattn.vision.asymmetric_mixed_attention(search, [], kernels, *w, heads=2, cache=cache)
        >>> bool((again[1] == out).all())
        True
    """
    templates = items_of(templates, "templates", "arrays")
    every = [*templates, *([] if search is None else [search])]
    if not every:
        raise ValueError("templates: got none and no search region, expected at least one")
    grids = [grid(x, "search" if x is search else f"templates[{n}]") for n, x in enumerate(every)]
    batch, channels = len(grids[0]), grids[0].shape[-1]
    for g in grids:
        if len(g) != batch or g.shape[-1] != channels:
            raise ValueError(f"templates: got shape {g.shape}, expected batch {batch} and {channels} channels in all")
    if not isinstance(kernels, tuple | list) or len(kernels) != 3:
        raise TypeError(f"kernels: got {type(kernels).__name__}, expected three arrays")
    taps = [numbers(k, f"kernels[{n}]", (None, None, channels)) for n, k in enumerate(kernels)]
    if any(k.shape[0] % 2 == 0 or k.shape[1] % 2 == 0 for k in taps):
        raise ValueError(f"kernels: got shapes {[k.shape for k in taps]}, expected odd sizes")
    q_of = Linear.of(wq, "wq", channels)
    k_of = Linear.of(wk, "wk", channels, q_of.outputs)
    v_of = Linear.of(wv, "wv", channels)
    number = head_count(heads, {"wq": q_of.outputs, "wv": v_of.outputs})
    project = optional_linear(wo, "wo", v_of.outputs)
    factor = scale_factor(scale, q_of.outputs // number)
    mixed = flag(symmetric, "symmetric")
    if cache is not None and (mixed or len(templates)):
        raise ValueError("cache: got one with templates or symmetric=True, expected neither")
    rows = [
        [
            w(reshaped(np.asarray(depthwise_convolution(g, kernel, stride=step)), batch, -1, channels))
            for w, kernel, step in zip((q_of, k_of, v_of), taps, (1, stride, stride), strict=True)
        ]
        for g in grids
    ]
    count = len(templates)
    if cache is None:
        known = _joined(rows[:count], batch, (k_of.outputs, v_of.outputs))
    else:
        known = _cached(cache, batch, (k_of.outputs, v_of.outputs))
    own = [] if search is None else rows[count:]
    k, v = (np.concatenate([a, *(part[n] for part in own)], axis=1) for n, a in ((1, known[0]), (2, known[1])))

    def out(n: int, keys: Float32, values: Float32) -> Array:
        found = attend(rows[n][0], keys, values, heads=number, scale=factor)
        found = found if project is None else project(found)
        return returned(every[n], reshaped(found, *grids[n].shape[:3], -1))

    seen = (k, v) if mixed else known
    outs = [out(n, *seen) for n in range(count)]
    return outs, None if search is None else out(count, k, v), known


def _joined(rows: list[list[Float32]], batch: int, widths: tuple[int, int]) -> tuple[Float32, Float32]:
    parts = [[part[n] for part in rows] or [np.zeros((batch, 0, widths[n - 1]), np.float32)] for n in (1, 2)]
    return np.concatenate(parts[0], axis=1), np.concatenate(parts[1], axis=1)


def _cached(cache: object, batch: int, widths: tuple[int, int]) -> tuple[Float32, Float32]:
    if not isinstance(cache, tuple | list) or len(cache) != 2:
        raise TypeError(f"cache: got {type(cache).__name__}, expected a pair (keys, values)")
    k = numbers(cache[0], "cache keys", (batch, None, widths[0]))
    return k, numbers(cache[1], "cache values", (batch, k.shape[1], widths[1]))


def _example() -> NDArray[np.bool_]:
    """What a template of 6 x 6 and a search region of 10 x 10 see: their features are the identity."""
    x, rng = np.eye(136, dtype=np.float32), np.random.default_rng(0)
    template, search = x[:36].reshape(1, 6, 6, 136), x[36:].reshape(1, 10, 10, 136)
    taps = np.zeros((3, 3, 136), np.float32)
    taps[1, 1] = 1
    wq, wk = 0.3 * rng.standard_normal((2, 136, 136), dtype=np.float32)
    outs, out, _ = asymmetric_mixed_attention(search, [template], (taps,) * 3, wq, wk, x, heads=1)
    rows = [np.asarray(part).reshape(-1, 136) for part in (*outs, out)]
    mask: NDArray[np.bool_] = np.concatenate(rows) != 0
    return mask


METHOD = Method(
    name="asymmetric_mixed_attention",
    family="vision",
    title="MixFormer: End-to-End Tracking with Iterative Mixed Attention",
    year=2022,
    arxiv="2203.11082",
    function=asymmetric_mixed_attention,
    reference=reference.asymmetric_mixed_attention,
    exact=True,
    modes=frozenset({"non-causal", "self", "cross"}),
    gqa=False,
    step=False,
    checks=(
        "With the templates' cache the search region's output has the same bits.",
        "Without a search region it is attention of the templates.",
        "Symmetric, it is attention of all tokens.",
        "Asymmetric, it is attention with a mask of blocks.",
    ),
    tests="tests/vision/test_asymmetric_mixed_attention.py",
    cost="`(Nt ** 2 + Ns * (Nt + Ns)) / stride ** 2 * heads * (D + Dv)` multiply-adds, and the projections.",
    mask=_example,
)
