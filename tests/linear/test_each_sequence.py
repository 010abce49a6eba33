"""Sequences one after another: each as it is alone."""

from itertools import pairwise

import numpy as np
import pytest

from longattn import linear
from random_arrays import F32, normal


def case(rng, name):
    """Rows by name, options, and the arrays of a state; none where it is one array."""
    q, k, v = (normal(rng, (1, 2, 30, n)) for n in (8, 8, 6))
    qkv = {"q": q, "k": k, "v": v}
    return {
        "causal_inline_attention": (qkv, {}, ("states", "values")),
        "causal_efficient_attention": (qkv, {}, ("means", "logs")),
        "causal_simplified_linear_attention": (qkv, {"weight": normal(rng, (6, 3))}, ("states", "before")),
        "grouped_linear_attention_local_conv": (qkv, {"group_size": 4}, ("sums", "keys", "values")),
        "titans_neural_memory": ({**qkv, "theta": rng.random((1, 2, 30)).astype(F32)}, {}, ("live", "frozen")),
        "multi_dim_damped_ema": (
            {"x": normal(rng, (1, 30, 6))},
            {parameter: normal(rng, (6, 4)) for parameter in ("alpha", "delta", "beta", "gamma")},
            (),
        ),
    }[name]


NAMES = (
    "causal_inline_attention", "causal_efficient_attention", "causal_simplified_linear_attention",
    "grouped_linear_attention_local_conv", "titans_neural_memory", "multi_dim_damped_ema",
)  # fmt: skip


def part(rows, first, last):
    return {name: x[:, first:last] if name == "x" else x[:, :, first:last] for name, x in rows.items()}


@pytest.mark.parametrize("bounds", [[0, 30], [0, 0, 1, 12, 30, 30]], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_each_is_as_it_is_alone(rng, name, bounds):
    function = getattr(linear, name)
    rows, options, arrays = case(rng, name)
    out, states = linear.each_sequence(function, rows, np.array(bounds), **options)
    again, further = linear.each_sequence(function, rows, np.array(bounds), initial_states=states, **options)
    assert len(states) == len(further) == len(bounds) - 1
    for n, (first, last) in enumerate(pairwise(bounds)):
        own = part(rows, first, last)
        expected, state = function(**own, **options)
        np.testing.assert_array_equal(out[..., first:last, :], expected)
        expected, state = function(**own, initial_state=state, **options)
        np.testing.assert_array_equal(again[..., first:last, :], expected)
        for x, y in [(getattr(further[n], x), getattr(state, x)) for x in arrays] or [(further[n], state)]:
            np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("bounds", [[0, 9, 30], [0, 30, 30]], ids=str)
def test_recurrences_do_the_same_themselves(rng, bounds):
    rows, _, _ = case(rng, "causal_inline_attention")
    out, states = linear.each_sequence(linear.retention, rows, np.array(bounds))
    expected, last = linear.retention(**rows, cu_seqlens=np.array(bounds))
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(np.concatenate(states), last)


def test_functions_without_states_and_rows_without_a_batch(rng):
    rows, _, _ = case(rng, "causal_inline_attention")
    whole, nothing = linear.each_sequence(linear.inline_attention, rows, np.array([0, 9, 30]))
    assert nothing == [None, None]
    alone, _ = linear.each_sequence(linear.inline_attention, {n: x[0] for n, x in rows.items()}, np.array([0, 9, 30]))
    np.testing.assert_array_equal(alone, whole[0])


def test_no_sequences(rng):
    rows, _, _ = case(rng, "causal_inline_attention")
    out, states = linear.each_sequence(linear.causal_inline_attention, part(rows, 0, 0), np.array([0]))
    assert out.shape == (1, 2, 0, 6) and states == []


def test_tensors(rng):
    torch = pytest.importorskip("torch")
    rows, _, _ = case(rng, "causal_inline_attention")
    expected, _ = linear.each_sequence(linear.causal_inline_attention, rows, np.array([0, 9, 30]))
    tensors = {name: torch.from_numpy(x) for name, x in rows.items()}
    out, _ = linear.each_sequence(linear.causal_inline_attention, tensors, torch.tensor([0, 9, 30]))
    np.testing.assert_array_equal(out.numpy(), expected)


def test_wrong_arguments(rng):
    rows, _, _ = case(rng, "causal_inline_attention")
    call, bounds = linear.causal_inline_attention, np.array([0, 9, 30])
    two = {n: np.repeat(x, 2, axis=0) for n, x in rows.items()}
    for arguments, options, error, message in (
        ((3, rows, bounds), {}, TypeError, "function: got int"),
        ((call, [1], bounds), {}, TypeError, "rows: got none called v or x"),
        ((call, {"v": np.zeros(3, F32)}, bounds), {}, ValueError, "v: got shape"),
        ((call, {**rows, "k": rows["k"][:, :, 1:]}, bounds), {}, ValueError, "k: got shape .*, expected 30 rows"),
        ((call, two, bounds), {}, ValueError, "cu_seqlens: got it with a batch of 2"),
        ((call, rows, np.array([0, 9])), {}, ValueError, "cu_seqlens: got bounds"),
        ((call, rows, np.array([0.0, 30.0])), {}, TypeError, "cu_seqlens: got dtype"),
        ((call, rows, bounds), {"initial_states": [None]}, ValueError, "initial_states: got 1, expected 2"),
    ):
        with pytest.raises(error, match=message):
            linear.each_sequence(*arguments, **options)
