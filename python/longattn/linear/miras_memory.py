"""Miras: test-time memories with other losses and other ways to keep weights (Moneta, Yaad, Memora)."""

from __future__ import annotations

from collections.abc import Sequence

from longattn._arrays import Array, as_numpy
from longattn._checks import one_of, real
from longattn.linear._documented import documented
from longattn.linear._fast_weight import CHUNK, MemoryState, fast_weight, gate
from longattn.methods import Method
from longattn.reference import linear as reference

VARIANTS = ("moneta", "yaad", "memora")
HUBER = {"signs": "signs", "norm": "length", "each": "each"}


@documented
def miras_memory(
    q: Array,
    k: Array,
    v: Array,
    eta: Array | float,
    *,
    variant: str,
    alpha: Array | float | None = None,
    delta: Array | float | None = None,
    weights: Sequence[Array] | None = None,
    loss_exponent: float = 3.0,
    norm_exponent: float = 4.0,
    steepness: float = 10.0,
    huber: str = "signs",
    read: str = "token",
    total: float = 1.0,
    residual: tuple[Array, Array, float] | None = None,
    activation: str = "gelu",
    normalize_qk: bool = True,
    scale: float = 1.0,
    chunk_size: int = CHUNK,
    initial_state: MemoryState | None = None,
    out_state: MemoryState | None = None,
    out: Array | None = None,
) -> tuple[Array, MemoryState]:
    """Memories of the Miras framework, `y_t = M(q_t)` with the weights `W_t` that keys and values have taught.

    With `e_t = M(k_t) - v_t`, for a linear memory (for others the gradient goes back through the layers):

    - "moneta": `A_t = alpha_t A_(t-1) - eta_t k_t d_t^T` with `d = p tanh(steepness e) (e^2 + 1e-6)^((p - 1) / 2)` and
      `W = A / |A|_r^(r - 2)`, `p` being `loss_exponent` and `r` `norm_exponent`.
    - "yaad": `W_t = alpha_t W_(t-1) - eta_t k_t d_t^T`, where `d` is `e` while `|e| <= delta_t`, else `delta_t` times
      the signs of `e` (`huber="signs"`) or times `e / |e|` ("norm"); "each" cuts `e` off number by number.
    - "memora": `Z_t = alpha_t Z_(t-1) - eta_t k_t e_t^T`, `W = total * softmax(Z)` over the inputs of each output. That
      is `W_t` from `alpha_t log W_(t-1)` less the step, as the logarithm of a softmax is its argument less a constant.

    Gradients of the rows of a chunk are taken at the weights with which it began: the chunk's size is part of the
    definition. Chunks are counted from the first row of all, over all calls. With `read="token"` a row reads its own
    weights, which for Moneta and Memora takes as many operations as they have numbers; with "chunk" Moneta's norm is
    that of the chunk's start, and Memora reads the weights of that start. UNSURE in the paper: what Memora reads inside
    a chunk, the axis of its softmax, and a factor of 2 of the gradient of squares, which is `e` here.

    Args:
        q: queries `[B, Hq, L, D]`, or `[Hq, L, D]`; float32, float16 or bfloat16. `Hq` is a multiple of `H`, whose
            memories are read by groups of query heads.
        k: keys `[B, H, L, D]`; any of the three dtypes.
        v: values `[B, H, L, Dv]`; any of the three dtypes.
        eta: rates, at least 0, floating `[B, H, L]` or one number.
        variant: "moneta", "yaad" or "memora".
        alpha: what is kept, 0 to 1, floating `[B, H, L]` or one number; `None` is 1.
        delta: thresholds of "yaad", at least 0, floating `[B, H, L]` or one number.
        weights: matrices before the first row (`A`, `W` or `Z`), floating `[D, hidden]`, .., `[hidden, Dv]`, each with
            `[H]` or `[B, H]` in front or the same for all; `None` is one `[D, Dv]` of zeros.
        loss_exponent: `p` of "moneta", at least 1.
        norm_exponent: `r` of "moneta", at least 2, where nothing is divided.
        steepness: of the smooth sign.
        huber: "signs", "norm" or "each".
        read: "token" or "chunk".
        total: what the weights of an output add up to with "memora", above 0.
        residual: `(gain, shift, eps)`: the memory is `x + norm(..)`, with factors and summands `[H, Dv]` that stay as
            they are.
        activation: between layers, "silu" or "gelu".
        normalize_qk: divide rows of `q` and `k` by `sqrt(sum of squares + 1e-6)` first.
        scale: factor of queries.
        chunk_size: rows whose gradients are taken at the same weights.
        initial_state: what an earlier call with the same options returned, in place of `weights`.
        out_state: {memory}
        out: array for the output.

    Returns:
        `(output, state)`: the output in the kind and dtype of `q`, and the memory after the last row, with which a
        later call goes on at any row. Arithmetic is float32, the same bits for any number of threads. A row that holds
        NaN or an infinity spoils rows after it and none before.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        About `5 * H * L * P` multiply-adds for `P` numbers of weights, and of the rows of a tile `C <= 48` with each
        other `H * L * C` times the widths of the layers; `read="token"` of Moneta and Memora goes row by row.

    References:
        A. Behrouz et al., "It's All Connected: A Journey Through Test-Time Memorization, Attentional Bias, Retention,
        and Online Optimization", 2025, arXiv:2504.13173.
    """
    one_of(variant, "variant", VARIANTS)
    one_of(huber, "huber", HUBER)
    one_of(read, "read", ("token", "chunk"))
    one_of(activation, "activation", ("silu", "gelu"))
    if (delta is not None) != (variant == "yaad"):
        raise ValueError(f"delta: got {'one' if delta is not None else 'none'}, expected it with 'yaad' alone")
    p, r = _at_least(loss_exponent, "loss_exponent", 1.0), _at_least(norm_exponent, "norm_exponent", 2.0)
    sharp, mass = _at_least(steepness, "steepness", 0.0), _at_least(total, "total", 1e-30)
    loss, retention = ("square", 0.5, 0.0), ("plain", 0.0, False)
    if variant == "moneta":
        loss = ("power", p, sharp)
        retention = ("norm", r, read == "token") if r != 2 else retention
    elif variant == "yaad":
        loss = (HUBER[huber], 0.0, 0.0)
    else:
        retention = ("softmax", mass, read == "token")
    keys = as_numpy(k, "k")
    keep = None if alpha is None or keys.ndim not in (3, 4) else gate(alpha, "alpha", keys, high=1.0)
    if residual is not None and (not isinstance(residual, tuple | list) or len(residual) != 3):
        raise TypeError(f"residual: got {type(residual).__name__}, expected (gain, shift, eps)")
    return fast_weight(
        q,
        k,
        v,
        eta,
        rate_name="eta",
        weights=weights,
        initial_state=initial_state,
        out_state=out_state,
        keep=keep,
        threshold=delta,
        activation=activation,
        residual=residual,
        loss=loss,
        retention=retention,
        chunk_size=chunk_size,
        normalize_qk=normalize_qk,
        scale=scale,
        out=out,
    )


def _at_least(value: object, name: str, least: float) -> float:
    number = real(value, name)
    if not least <= number < 1e30:
        raise ValueError(f"{name}: got {value}, expected at least {least:g}")
    return number


METHOD = Method(
    name="miras_memory",
    family="recurrent",
    title="It's All Connected: A Journey Through Test-Time Memorization, Attentional Bias, Retention, and Online "
    "Optimization",
    year=2025,
    arxiv="2504.13173",
    function=miras_memory,
    reference=reference.miras_memory,
    exact=True,
    modes=frozenset({"causal", "self"}),
    gqa=True,
    checks=(
        "It is the loop over tokens, with gradients at the weights of the chunk's start.",
        "Yaad without a threshold is the memory of Titans without momentum.",
        "Memora by logits is Memora by its weights, whose outputs' weights add up to `total`.",
        "With exponents of 1 steps have one size, with exponents of 2 Moneta is the memory of Titans.",
        "Cut at any row, the parts give the whole.",
    ),
    tests="tests/linear/test_miras_memory.py",
    cost="About `5 * H * L * P` multiply-adds for `P` numbers of weights, and of the rows of a tile `C <= 48` with "
    'each other `H * L * C` times the widths of the layers; `read="token"` of Moneta and Memora goes row by row.',
)
