"""Channel group attention: channels as tokens, whose features are the places."""

from __future__ import annotations

import numpy as np

from longattn._arrays import Array, reshaped
from longattn._checks import one_of, scale_factor
from longattn.dense.attention import attention
from longattn.methods import Method
from longattn.pictures import layer_seen
from longattn.reference import vision as reference
from longattn.vision._inputs import Float32, Linear, Weights, features, head_count, optional_linear, returned

#: Which projection is what: of scores' rows, of their columns, and of the values.
ROLES = ("paper", "release")


def channel_group_attention(
    x: Array,
    wq: Weights,
    wk: Weights,
    wv: Weights,
    *,
    groups: int,
    wo: Weights | None = None,
    scale: float | None = None,
    roles: str = "paper",
) -> Array:
    """Attention between the channels of a group, over all tokens.

    For each group of `d` channels, `S = softmax(scale * q^T k)` is `[d, d]` and the output `v S^T`: every channel is
    a mean of the group's channels, weighted by how alike they are over the whole image. The other half of the paper's
    block is attention in windows, `longattn.vision.grouped_attention` (there with `mask_pad=False`).

    Args:
        x: tokens `[B, N, C]`; float32, float16 or bfloat16.
        wq: weights `[C, C]`, or a pair `(matrix, bias)`.
        wk: weights, likewise.
        wv: weights, likewise.
        groups: groups of channels; a divisor of `C`.
        wo: output projection `[C, Co]`, or a pair; `None` is none.
        scale: factor on the logits; `None` is `(C / groups) ** -0.5`. Later models have `N ** -0.5`.
        roles: "paper": as above; "release": the published weights name the same matrices otherwise: scores are of
            `wk` and `wv`, values of `wq`.

    Returns:
        `[B, N, C]`, or `[B, N, Co]` with `wo`, in the kind and dtype of `x`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        `2 * N * C ** 2 / groups` multiply-adds, linear in `N`, and the projections.

    References:
        M. Ding et al., "DaViT: Dual Attention Vision Transformers", 2022, arXiv:2204.03645.

    Example:
        >>> import numpy as np, longattn.vision
        >>> rng = np.random.default_rng(0)
        >>> x = rng.standard_normal((1, 49, 16), dtype=np.float32)
        >>> wq, wk, wv = rng.standard_normal((3, 16, 16), dtype=np.float32)
        >>> longattn.vision.channel_group_attention(x, wq, wk, wv, groups=4).shape
        (1, 49, 16)
    """
    xn = features(x, "x", 3, "[B, N, C]")
    channels = xn.shape[-1]
    number = head_count(groups, {"x": channels}, "groups")
    one_of(roles, "roles", ROLES)
    projections = [Linear.of(w, name, channels, channels) for w, name in ((wq, "wq"), (wk, "wk"), (wv, "wv"))]
    project = optional_linear(wo, "wo", channels)
    factor = scale_factor(scale, channels // number)
    if roles == "release":
        projections = [*projections[1:], projections[0]]
    rows = [reshaped(_transposed(p, xn), len(xn), number, channels // number, -1) for p in projections]
    if xn.shape[1] == 0:
        return returned(x, xn if project is None else project(xn))
    out = reshaped(attention(*rows, scale=factor), len(xn), channels, -1).swapaxes(1, 2)
    return returned(x, out if project is None else project(out))


def _transposed(projection: Linear, x: Float32) -> Float32:
    """The projection of `[B, N, C]` as `[B, C, N]`."""
    y: Float32 = projection.matrix.T @ x.swapaxes(1, 2)
    return y if projection.bias is None else np.add(y, projection.bias[:, None], out=y)


METHOD = Method(
    name="channel_group_attention",
    family="vision",
    title="DaViT: Dual Attention Vision Transformers",
    year=2022,
    arxiv="2204.03645",
    function=channel_group_attention,
    reference=reference.channel_group_attention,
    exact=True,
    modes=frozenset({"non-causal", "self"}),
    gqa=False,
    step=False,
    checks=(
        "Groups of one channel give the value projection.",
        "A permutation of the tokens permutes the output.",
        "The scores of a sequence are the sums of those of its pieces.",
        "The window step with a window of the whole image is attention.",
    ),
    tests="tests/vision/test_channel_group_attention.py",
    cost="`2 * N * C ** 2 / groups` multiply-adds, linear in `N`, and the projections.",
    # Of as many tokens as channels, each with a channel of its own.
    mask=lambda: layer_seen(lambda x, *w: np.asarray(channel_group_attention(x, *w, groups=4)).swapaxes(1, 2), (64,)),
    axes=("channels", "channels"),
)
