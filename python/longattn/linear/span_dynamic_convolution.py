"""ConvBERT's convolution: taps made from each token and the span around it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import Array, as_numpy, like
from longattn._checks import flag, integer
from longattn.dense.attention import attention
from longattn.linear._channels import Float32, optional, parameter, product, storage_rows
from longattn.linear.convolution import causal_conv1d, depthwise_conv1d, dynamic_conv
from longattn.methods import Method
from longattn.reference import linear as reference


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SpanState:
    """What a causal call needs of the tokens before.

    Attributes:
        inputs: the last ones, which the span reaches, float32 `[B, K' - 1, C]`.
        values: the last ones, which the taps reach, float32 `[B, heads, K - 1, D]`.
        attention: keys, values (float32 `[B, heads, n, D]`) and which are seen (bool `[B, n]`) of the heads of
            attention, of all tokens; `None` where there are none.
    """

    inputs: Float32
    values: Float32
    attention: tuple[Float32, Float32, NDArray[np.bool_]] | None = None


def span_dynamic_convolution(
    x: Array,
    wq: Array,
    depthwise: Array,
    pointwise: Array,
    wv: Array,
    wf: Array,
    *,
    heads: int,
    span_bias: Array | None = None,
    tap_bias: Array | None = None,
    attention_weights: tuple[Array, Array] | None = None,
    mask: Array | None = None,
    causal: bool = False,
    initial_state: SpanState | None = None,
    return_state: bool = False,
) -> Any:
    """Convolution with taps from the product of a query and a key that is aware of the span around the token.

    With `q = x wq`, `k = conv(x) pointwise + span_bias` and `v = x wv`, taps of token i and head h are the softmax of
    `((q * k) wf + tap_bias)[i, h]`, and

        y[i, h] = sum_t taps[i, h, t] * v[i + t - (K - 1) / 2, h]

    Taps of what lies outside the sequence are lost, not shared out. With `attention_weights` the same queries also go
    through softmax attention, whose heads come first in the result.

    Args:
        x: `[B, L, C]`; float32, float16 or bfloat16.
        wq: query projection, floating `[C, heads * D]`.
        depthwise: convolution of the span, floating `[C, K']`.
        pointwise: what makes keys of it, floating `[C, heads * D]`.
        wv: value projection, floating `[C, heads * D]`.
        wf: what makes taps, floating `[heads * D, heads * K]`; K is odd.
        heads: heads of the convolution.
        span_bias: floating `[heads * D]`.
        tap_bias: floating `[heads * K]`.
        attention_weights: key and value projection `([C, heads * D], [C, heads * D])` of attention heads beside those
            of the convolution, as many of them.
        mask: bool `[B, L]`, false where a token is padding: its values are zeros, and no attention head sees it.
            Published code masks its attention only.
        causal: taps reach back only, the span likewise, and attention is causal.
        initial_state: what a call with the tokens before returned; with `causal` only.
        return_state: also return the state after the last token; with `causal` only.

    Returns:
        `[B, L, heads * D]`, twice as wide with `attention_weights`, in the kind and dtype of `x`; or with
        `return_state` the pair of this and `SpanState`, with which a call of one token is the decode step. The state
        does not grow but by keys and values of attention.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit, or a state without `causal`.

    Cost:
        `B * L * heads * D * (3 C + heads * K + K)` multiply-adds, and with heads of attention `2 C` more and those of
        attention.

    References:
        Z. Jiang, W. Yu, D. Zhou, Y. Chen, J. Feng, S. Yan, "ConvBERT: Improving BERT with Span-based Dynamic
        Convolution", 2020, arXiv:2008.02496.
    """
    xn = storage_rows(x, "x", (None, None, None), "[B, L, C]")
    batch, length, channels = xn.shape
    number, back = integer(heads, "heads", 1), flag(causal, "causal")
    query = parameter(wq, "wq", (channels, None), "[C, heads * D]")
    width = query.shape[1]
    if width % number or not width:
        raise ValueError(f"wq: got shape {query.shape}, expected [C, heads * D] with {number} heads")
    span = parameter(depthwise, "depthwise", (channels, None), "[C, K']")
    mixing = parameter(pointwise, "pointwise", (channels, width), "[C, heads * D]")
    value = parameter(wv, "wv", (channels, width), "[C, heads * D]")
    taps = parameter(wf, "wf", (width, None), "[heads * D, heads * K]")
    count = taps.shape[1] // number
    if taps.shape[1] % number or count % 2 == 0:
        raise ValueError(f"wf: got shape {taps.shape}, expected [heads * D, heads * K] with an odd K")
    added = optional(span_bias, "span_bias", (width,), "[heads * D]")
    logit_bias = optional(tap_bias, "tap_bias", (number * count,), "[heads * K]")
    both = None
    if attention_weights is not None:
        if not isinstance(attention_weights, tuple | list) or len(attention_weights) != 2:
            raise TypeError(f"attention_weights: got {type(attention_weights).__name__}, expected (wk, wv)")
        both = [
            parameter(w, f"attention_weights[{i}]", (channels, width), "[C, heads * D]")
            for i, w in enumerate(attention_weights)
        ]
    seen = _mask(mask, (batch, length))
    handed = flag(return_state, "return_state")
    if not back and (handed or initial_state is not None):
        raise ValueError("causal: got False with a state, expected True")
    before = (batch, span.shape[1] - 1, channels), (batch, number, count - 1, width // number)
    start = _start(initial_state, *before, attends=both is not None)
    wide = np.ascontiguousarray(xn, np.float32)
    q, v = product(wide, query), product(wide, value)
    inputs = start.inputs
    if back:
        around, inputs = causal_conv1d(wide, span, initial_state=inputs)
    else:
        around = depthwise_conv1d(wide, span)
    k = product(around, mixing)
    k = k if added is None else k + added
    logits = (q * k) @ taps
    logits = logits if logit_bias is None else logits + logit_bias
    if seen is not None:
        v = v * seen[..., None]
    by_head = _split(v, number)
    y = dynamic_conv(
        by_head, _split(logits, number), softmax=True, causal=back, initial_state=start.values if back else None
    )
    result, reached = _join(y), None
    if both is not None:
        keys, values = (_split(product(wide, w), number) for w in both)
        if start.attention is not None:
            keys, values = (np.concatenate(x, axis=2) for x in zip(start.attention[:2], (keys, values), strict=True))
            own = np.ones((batch, length), bool) if seen is None else seen
            seen = np.concatenate([start.attention[2], own], axis=1)
        shown = None if seen is None else seen[:, None, None]
        attended = attention(_split(q, number), keys, values, causal=back, mask=shown)
        result = np.concatenate([_join(attended), result], axis=2)
        reached = keys, values, np.ones((batch, keys.shape[2]), bool) if seen is None else seen
    out = like(x, result.astype(xn.dtype, copy=False))
    if not handed:
        return out
    kept = np.concatenate([start.values, by_head], axis=2)[:, :, length:].copy()
    return out, SpanState(inputs=inputs, values=kept, attention=reached)


def _start(
    state: object, inputs: tuple[int, int, int], values: tuple[int, int, int, int], *, attends: bool
) -> SpanState:
    """The state before the first token, checked; zeros where there is none."""
    if state is None:
        return SpanState(inputs=np.zeros(inputs, np.float32), values=np.zeros(values, np.float32))
    if not isinstance(state, SpanState):
        raise TypeError(f"initial_state: got {type(state).__name__}, expected a SpanState")
    if attends != (state.attention is not None):
        raise ValueError("initial_state: got one of a call with other attention_weights, expected the same")
    expected: list[tuple[str, Float32, tuple[int, ...]]] = [
        ("inputs", state.inputs, inputs),
        ("values", state.values, values),
    ]
    if state.attention is not None:
        keys, theirs, seen = state.attention
        shape = (*values[:2], keys.shape[2] if keys.ndim == 4 else 0, values[3])
        expected += [("keys of attention", keys, shape), ("values of attention", theirs, shape)]
        if seen.shape != shape[::2] or seen.dtype != np.bool_:
            raise ValueError(f"initial_state: got a mask {seen.dtype} {seen.shape}, expected bool {shape[::2]}")
    for name, x, wanted in expected:
        if x.shape != wanted or x.dtype != np.float32:
            raise ValueError(f"initial_state: got {name} {x.dtype} {x.shape}, expected float32 {wanted}")
    return state


def _split(x: Float32, heads: int) -> Float32:
    """`[B, L, heads * D]` as `[B, heads, L, D]`."""
    return x.reshape(*x.shape[:2], heads, -1 if x.size else x.shape[2] // heads).swapaxes(1, 2)


def _join(x: NDArray[Any]) -> NDArray[Any]:
    """`[B, heads, L, D]` as `[B, L, heads * D]`."""
    return x.swapaxes(1, 2).reshape(x.shape[0], x.shape[2], x.shape[1] * x.shape[3])


def _mask(mask: Array | None, shape: tuple[int, int]) -> NDArray[np.bool_] | None:
    if mask is None:
        return None
    x = as_numpy(mask, "mask", any_strides=True)
    if x.dtype != np.bool_:
        raise TypeError(f"mask: got dtype {x.dtype}, expected bool")
    if x.shape != shape:
        raise ValueError(f"mask: got shape {x.shape}, expected {shape}")
    return x


METHOD = Method(
    name="span_dynamic_convolution",
    family="linear",
    title="ConvBERT: Improving BERT with Span-based Dynamic Convolution",
    year=2020,
    arxiv="2008.02496",
    function=span_dynamic_convolution,
    reference=reference.span_dynamic_convolution,
    exact=True,
    modes=frozenset({"causal", "non-causal", "self"}),
    gqa=False,
    checks=(
        "Causal, steps and parts that hand the state on give the tokens of one call.",
        "Taps from zeros give the moving average of the values.",
        "Taps that are all at the centre return the values.",
        "A single tap returns the values whatever its logit.",
        "Inside the sequence it is attention in a window with the logits as bias.",
    ),
    tests="tests/linear/test_span_dynamic_convolution.py",
    cost="`B * L * heads * D * (3 C + heads * K + K)` multiply-adds.",
)
