"""FLARE: attention routed through a few latent queries per head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import Array, as_numpy
from longattn._checks import attention_inputs, batched, check_float_storage, finite, flag, result_array, returned
from longattn.dense.attention import attention
from longattn.linear.key_statistics import key_mask
from longattn.methods import Method
from longattn.reference import linear as reference


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FlareState:
    """What latents have gathered from tokens so far, float32: all that is read of them, whatever their number.

    Attributes:
        gathered: `Z`, means of the values by the latents' weights `[B, H, M, Dv]`.
        logs: logarithms of the sums of `e^score` `[B, H, M]`; minus infinity before the first token.
    """

    gathered: NDArray[np.float32]
    logs: NDArray[np.float32]


def flare_attention(
    latents: Array,
    k: Array,
    v: Array,
    *,
    scale: float = 1.0,
    qk_norm: bool = False,
    eps: float = 1e-6,
    mask: Array | None = None,
    out: Array | None = None,
) -> Any:
    """`Z = softmax_n(s R K^T) V`, then `Y = softmax_m(s K R^T) Z`: the same scores, normalised both ways.

    There are no queries of tokens: token `n` reads what the latents gathered by the weights that it gave them.

    Args:
        latents: learned queries `R`, `[H, M, D]`; float32, float16 or bfloat16.
        k: keys `[B, H, N, D]`, or `[H, N, D]`; float32, float16 or bfloat16.
        v: values `[B, H, N, Dv]`, or `[H, N, Dv]`; dtype of `k`.
        scale: factor on the scores (not `D ** -0.5`).
        qk_norm: rows of latents and keys are divided by their root mean square over the channels.
        eps: added to the mean square.
        mask: boolean `[N]` or `[B, N]`; False hides the token from the latents. Its own output is computed like any
            other.
        out: array of the result's shape, kind and dtype that receives it.

    Returns:
        The output `[B, H, N, Dv]` (or `[H, N, Dv]`), in the kind and dtype of `k`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        `2 * H * N * M * (D + Dv)` multiply-adds; memory for `H * M * Dv` numbers.

    References:
        V. Puri et al., "FLARE: Fast Low-rank Attention Routing Engine", 2025, arXiv:2508.12594.
    """
    options: dict[str, Any] = {"scale": scale, "qk_norm": qk_norm, "eps": eps}
    if out is not None:
        kn, vn, rn = as_numpy(k, "k"), as_numpy(v, "v"), as_numpy(latents, "latents")
        result_array(out, k, (*kn.shape[:-1], *vn.shape[-1:]), kn.dtype, {"k": kn, "v": vn, "latents": rn})
    return flare_read(latents, k, flare_gather(latents, k, v, mask=mask, **options), out=out, **options)


def flare_gather(
    latents: Array,
    k: Array,
    v: Array,
    *,
    scale: float = 1.0,
    qk_norm: bool = False,
    eps: float = 1e-6,
    mask: Array | None = None,
    initial_state: FlareState | None = None,
) -> FlareState:
    """The first half of `flare_attention`, `Z = softmax_n(s R K^T) V`, over tokens that may come in parts.

    Each call rounds `logs` once to float32, which one token among very many hardly changes: a hundred thousand tokens
    one by one have shares that err by 3e-3, in parts of a hundred by 2e-6.

    Args:
        latents: as of `flare_attention`.
        k: likewise.
        v: likewise.
        scale: likewise.
        qk_norm: likewise.
        eps: likewise.
        mask: likewise, of these tokens.
        initial_state: what a call with other tokens returned, which are gathered, too.

    Returns:
        The state, in whose place no token is needed any more.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        `H * N * M * (D + Dv)` multiply-adds.

    Example:
        >>> import numpy as np, longattn as la
        >>> rng = np.random.default_rng(0)
        >>> latents, k = rng.standard_normal((4, 8, 16)), rng.standard_normal((1, 4, 100, 16))
        >>> latents, k = latents.astype("f"), k.astype("f")
        >>> state = la.linear.flare_gather(latents, k[:, :, :60], k[:, :, :60])
        >>> state = la.linear.flare_gather(latents, k[:, :, 60:], k[:, :, 60:], initial_state=state)
        >>> whole = la.linear.flare_attention(latents, k, k)
        >>> bool(np.allclose(la.linear.flare_read(latents, k[:, :, :1], state), whole[:, :, :1], atol=1e-5))
        True
    """
    kn, _, vn = attention_inputs(k, k, v, ranks=(3, 4))
    if vn.shape[:-1] != kn.shape[:-1]:
        raise ValueError(f"v: got shape {vn.shape}, expected {kn.shape[:-1]} and a head_dim, as in k")
    factor = finite(scale, "scale")
    r4, k4 = _scored(latents, kn, qk_norm, eps)
    v4 = batched(vn, 4)
    if k4.dtype != v4.dtype:
        v4 = v4.astype(np.float32)
    keep = key_mask(mask, k4.shape[0], k4.shape[2])
    before = None
    if initial_state is not None:
        _check(initial_state, (*r4.shape[:3], v4.shape[3]))
        before = initial_state.gathered, initial_state.logs
    column = None if keep is None else keep[:, None, None]
    gathered, logs = attention(r4, k4, v4, scale=factor, mask=column, state=before, return_lse=True)
    return FlareState(gathered=gathered, logs=logs)


def flare_read(
    latents: Array,
    k: Array,
    state: FlareState,
    *,
    scale: float = 1.0,
    qk_norm: bool = False,
    eps: float = 1e-6,
    out: Array | None = None,
) -> Any:
    """The second half of `flare_attention`, `softmax_m(s K R^T) Z`, for tokens that may be others than the gathered.

    Args:
        latents: as of `flare_attention`.
        k: keys of the tokens that read, likewise.
        state: what `flare_gather` returned.
        scale: as of `flare_attention`.
        qk_norm: likewise.
        eps: likewise.
        out: likewise.

    Returns:
        The output `[B, H, N, Dv]` (or `[H, N, Dv]`), in the kind and dtype of `k`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        `H * N * M * (D + Dv)` multiply-adds, whatever the number of tokens that were gathered.
    """
    kn, _, _ = attention_inputs(k, k, k, ranks=(3, 4))
    factor = finite(scale, "scale")
    r4, k4 = _scored(latents, kn, qk_norm, eps)
    _check(state, (*r4.shape[:3], None))
    inputs = {"k": kn, "latents": as_numpy(latents, "latents")}
    result = result_array(out, k, (*kn.shape[:-1], state.gathered.shape[3]), kn.dtype, inputs)
    out4 = batched(result, 4)
    if k4.dtype == out4.dtype:
        attention(k4, r4, state.gathered, scale=factor, out=out4)
    else:
        out4[...] = attention(k4, r4, state.gathered, scale=factor)
    return returned(out, k, result, None)


def _scored(latents: Array, k: NDArray[Any], qk_norm: object, eps: object) -> tuple[NDArray[np.float32], NDArray[Any]]:
    """Latents of each entry of the batch, and keys, as the scores take them."""
    rn = as_numpy(latents, "latents")
    check_float_storage(rn, "latents")
    heads, dim = k.shape[-3], k.shape[-1]
    if rn.ndim != 3 or rn.shape[0] != heads or rn.shape[1] == 0 or rn.shape[2] != dim:
        raise ValueError(f"latents: got shape {rn.shape}, expected [{heads}, M, {dim}], M at least 1")
    small, normalised, k4 = finite(eps, "eps", 0), flag(qk_norm, "qk_norm"), batched(k, 4)
    r4 = np.broadcast_to(rn.astype(np.float32), (k4.shape[0], *rn.shape))
    return (_unit(r4, small), _unit(k4, small)) if normalised else (r4, k4)


def _check(state: object, shape: tuple[int | None, ...]) -> None:
    """A state of these latents; `None` is any number of channels."""
    if not isinstance(state, FlareState):
        raise TypeError(f"state: got {type(state).__name__}, expected a FlareState")
    z, logs = state.gathered, state.logs
    expected = (*shape[:3], shape[3] if shape[3] is not None or z.ndim != 4 else z.shape[3])
    if z.shape != expected or logs.shape != shape[:3] or z.dtype != np.float32 or logs.dtype != np.float32:
        raise ValueError(f"state: got {z.dtype} {z.shape} and {logs.shape}, expected float32 {expected}")


def _unit(x: NDArray[Any], eps: float) -> NDArray[np.float32]:
    """Float32 rows over their root mean square."""
    wide = x.astype(np.float32)
    found: NDArray[np.float32] = wide / np.sqrt((wide * wide).mean(axis=-1, keepdims=True) + np.float32(eps))
    return found


METHOD = Method(
    name="flare_attention",
    family="linear",
    title="FLARE: Fast Low-rank Attention Routing Engine",
    year=2025,
    arxiv="2508.12594",
    function=flare_attention,
    reference=reference.flare_attention,
    exact=True,
    modes=frozenset({"non-causal", "self"}),
    gqa=False,
    step=False,
    checks=(
        "Rows of the implied matrix are non-negative and sum to 1.",
        "Its rank is at most the number of latents.",
        "One latent gives every token `softmax(s r K^T) V`.",
        "It is agent attention with keys as queries and latents as agents.",
        "Tokens gathered in parts give what they give together.",
    ),
    tests="tests/linear/test_flare_attention.py",
    cost="`2 * H * N * M * (D + Dv)` multiply-adds.",
)
