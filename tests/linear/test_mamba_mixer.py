"""Mamba blocks: `mamba_mixer`, `bidirectional_mamba`, `selective_token_channel_mixer`."""

from dataclasses import replace

import numpy as np
import pytest

import tolerances
from longattn.linear import MambaState, bidirectional_mamba, mamba_mixer, selective_token_channel_mixer
from longattn.reference import linear as reference
from random_arrays import DTYPES, F32, normal
from random_layers import mamba

check = tolerances.check_layer


@pytest.mark.parametrize("length", [0, 1, 2, 23])
@pytest.mark.parametrize("options", [{}, {"gate": False, "rank": 0}, {"conv": 1, "out": 9}], ids=str)
def test_block(rng, isa, length, options):
    weights, x = mamba(rng, **options), normal(rng, (2, length, 6))
    y, state = mamba_mixer(x, weights)
    check(y, reference.mamba_mixer(x, weights))
    assert state.nbytes == 4 * 2 * 10 * (options.get("conv", 3) - 1 + 4)


@pytest.mark.parametrize("change", [{"conv": None}, {"w_out": None}, {"skip": None}, {"dt_bias": None}], ids=str)
def test_parts_that_may_be_missing(rng, change):
    weights, x = replace(mamba(rng), **change), normal(rng, (2, 20, 6))
    check(mamba_mixer(x, weights)[0], reference.mamba_mixer(x, weights))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(rng, dtype):
    weights, x = mamba(rng), normal(rng, (2, 20, 6), dtype)
    y, _ = mamba_mixer(x, weights)
    assert y.dtype == dtype
    check(y, reference.mamba_mixer(x, weights))


def test_steps_are_the_whole(rng, isa):
    weights, x = mamba(rng), normal(rng, (2, 20, 6))
    state, parts = None, []
    for first, last in ((0, 1), (1, 2), (2, 9), (9, 10), (10, 20)):
        y, state = mamba_mixer(x[:, first:last], weights, initial_state=state)
        parts.append(y)
    check(np.concatenate(parts, axis=1), reference.mamba_mixer(x, weights))


def test_torch(rng):
    torch = pytest.importorskip("torch")
    weights, x = mamba(rng), normal(rng, (1, 9, 6))
    y, _ = mamba_mixer(torch.from_numpy(x), weights)
    np.testing.assert_array_equal(y.numpy(), mamba_mixer(x, weights)[0])


# Both directions


@pytest.mark.parametrize("options", [{}, {"inner": True}, {"merge": "concat"}], ids=str)
@pytest.mark.parametrize("length", [1, 22])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bidirectional(rng, options, length, dtype):
    forward, backward, x = mamba(rng), mamba(rng), normal(rng, (2, length, 6), dtype)
    check(bidirectional_mamba(x, forward, backward, **options),
          reference.bidirectional_mamba(x, forward, backward, **options))  # fmt: skip


def test_bidirectional_merged(rng, isa):
    forward, backward, x = mamba(rng), mamba(rng, inner=12), normal(rng, (2, 20, 6))
    options = {"merge": "concat", "w_merge": normal(rng, (12, 5), spread=0.3)}
    check(bidirectional_mamba(x, forward, backward, **options),
          reference.bidirectional_mamba(x, forward, backward, **options), depth=2)  # fmt: skip


def test_a_backward_block_of_zeros_leaves_causal_mamba(rng, isa):
    forward, x = mamba(rng), normal(rng, (2, 20, 6))
    other = mamba(rng)
    causal, _ = mamba_mixer(x, forward)
    np.testing.assert_array_equal(bidirectional_mamba(x, forward, replace(other, w_out=np.zeros((10, 6), F32))), causal)
    nothing = replace(other, skip=np.zeros(10, F32), w_c=np.zeros((10, 4), F32))
    np.testing.assert_array_equal(bidirectional_mamba(x, forward, nothing, inner=True), causal)


@pytest.mark.parametrize("inner", [False, True])
def test_equal_weights_and_a_palindrome_give_a_palindrome(rng, isa, inner):
    weights, half = mamba(rng), normal(rng, (2, 10, 6))
    x = np.concatenate([half, half[:, ::-1]], axis=1)
    y = bidirectional_mamba(x, weights, weights, inner=inner)
    np.testing.assert_allclose(y, y[:, ::-1], rtol=1e-4, atol=1e-5)


# Tokens and channels


def layers(rng, count=2, length=12, width=6):
    return [(mamba(rng, width), mamba(rng, length, inner=7)) for _ in range(count)]


@pytest.mark.parametrize("directions", ["forward", "both", "cross"])
@pytest.mark.parametrize("averaged", [False, True])
def test_token_channel_mixer(rng, directions, averaged):
    stack, x = layers(rng), normal(rng, (2, 12, 6))
    options = {"directions": directions, "size": (3, 4)}
    if averaged:
        options["averaging"] = tuple(0.5 * rng.standard_normal((2, 3 if i == 2 else 2)) for i in range(4))
    check(selective_token_channel_mixer(x, stack, **options),
          reference.selective_token_channel_mixer(x, stack, **options), depth=4)  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_token_channel_dtypes(rng, isa, dtype):
    stack, x = layers(rng, 1), normal(rng, (2, 12, 6), dtype)
    y = selective_token_channel_mixer(x, stack)
    assert y.dtype == dtype
    check(y, reference.selective_token_channel_mixer(x, stack), depth=2)


def test_without_averaging_it_is_a_plain_stack(rng):
    stack, x = layers(rng), normal(rng, (2, 12, 6))
    y = x
    for token, channel in stack:
        y = mamba_mixer(y, token)[0]
        across = np.ascontiguousarray(y.swapaxes(1, 2))
        y = np.asarray(reference.selective_token_channel_mixer(y, [(token, channel)], averaging=(
            np.zeros((1, 1)), np.zeros((1, 1)), np.zeros((1, 2)), np.ones((1, 1))
        )), F32)  # fmt: skip
        assert y.shape == across.swapaxes(1, 2).shape
    check(selective_token_channel_mixer(x, stack), y.astype(np.float64), depth=8)


def test_averages_that_pass_tokens_on_are_a_stack_of_mixers_of_tokens(rng):
    stack, x = layers(rng), normal(rng, (2, 12, 6))
    nothing = np.zeros((2, 2))
    averaging = (np.eye(2), nothing, np.eye(2, 3, 1), nothing)
    tokens = mamba_mixer(mamba_mixer(x, stack[0][0])[0], stack[1][0])[0]
    only = (np.zeros((1, 1)), np.zeros((1, 1)), np.zeros((1, 2)), np.ones((1, 1)))
    expected = reference.selective_token_channel_mixer(tokens, [stack[1]], averaging=only)
    check(selective_token_channel_mixer(x, stack, averaging=averaging), expected, depth=8)


def test_scanning_the_transposed_map_swaps_rows_and_columns(rng):
    token, channel = mamba(rng, conv=1), mamba(rng, 12, inner=7)
    x = normal(rng, (2, 12, 6))
    turned = np.ascontiguousarray(x.reshape(2, 3, 4, 6).swapaxes(1, 2)).reshape(2, 12, 6)
    order = np.arange(12).reshape(3, 4).T.reshape(-1)
    other = replace(channel, w_in=channel.w_in[order], w_gate=channel.w_gate[order], w_out=channel.w_out[:, order])
    one = selective_token_channel_mixer(x, [(token, channel)], directions="cross", size=(3, 4))
    two = selective_token_channel_mixer(turned, [(token, other)], directions="cross", size=(4, 3))
    check(two, one[:, order].astype(np.float64), depth=4)


# Bad input


def test_bad_blocks(rng):
    weights, x = mamba(rng), normal(rng, (2, 9, 6))
    for change, error, message in (
        ({"w_in": x[0]}, ValueError, r"weights.w_in: got shape \(9, 6\), expected \[C, E\]"),
        ({"a": -weights.a}, ValueError, "a: got a rate that is above 0"),
        ({"a": weights.a[:9]}, ValueError, "weights.a: got shape"),
        ({"w_dt": (weights.w_b,)}, ValueError, "weights.w_dt: got 1 matrices"),
        ({"w_dt": (weights.w_b, weights.w_b)}, ValueError, r"weights.w_dt\[1\]: got shape \(10, 4\)"),
        ({"w_b": None}, TypeError, "weights.w_b: got None"),
        ({"conv": weights.w_b.T}, ValueError, "weights.conv: got shape"),
    ):
        with pytest.raises(error, match=message):
            mamba_mixer(x, replace(weights, **change))
    with pytest.raises(TypeError, match="weights: got dict, expected MambaWeights"):
        mamba_mixer(x, {})
    with pytest.raises(TypeError, match="initial_state: got ndarray"):
        mamba_mixer(x, weights, initial_state=x)
    with pytest.raises(ValueError, match="initial_state: got shape"):
        mamba_mixer(x, weights, initial_state=MambaState(np.zeros((2, 2, 9), F32), np.zeros((2, 10, 4), F32)))


def test_rows_that_make_no_steps(rng):
    weights, x = mamba(rng), normal(rng, (2, 9, 6))
    x[1, 3, 2] = np.nan
    for call in (mamba_mixer, lambda x, weights: bidirectional_mamba(x, weights, weights)):
        with pytest.raises(ValueError, match="x: got rows whose step sizes are NaN or infinite"):
            call(x, weights)


def test_bad_directions(rng):
    one, two, x = mamba(rng), mamba(rng, inner=12), normal(rng, (2, 9, 6))
    for arguments, options, message in (
        ((one, two), {"inner": True}, "backward.a: got 12 channels, expected 10"),
        ((one, one), {"merge": "mean"}, "merge: got 'mean'"),
        ((one, one), {"w_merge": np.zeros((12, 6), F32)}, "w_merge: got one"),
        ((one, mamba(rng, out=7)), {}, "backward: got outputs"),
        ((one, one), {"merge": "concat", "w_merge": np.zeros((11, 6), F32)}, r"w_merge: got shape \(11, 6\)"),
    ):
        with pytest.raises(ValueError, match=message):
            bidirectional_mamba(x, *arguments, **options)


def test_bad_stacks(rng):
    stack, x = layers(rng), normal(rng, (2, 12, 6))
    for change, error, message in (
        ({"layers": []}, TypeError, r"layers: got \[\]"),
        ({"layers": [stack[0][::-1]]}, ValueError, r"layers\[0\] token.w_in"),
        ({"layers": [(mamba(rng, out=7), stack[0][1])]}, ValueError, r"layers\[0\] token: got outputs of width 7"),
        ({"directions": "down"}, ValueError, "directions: got 'down'"),
        ({"directions": "cross"}, TypeError, "size: got None"),
        ({"directions": "cross", "size": (5, 3)}, ValueError, "size: got 5 x 3"),
        ({"averaging": (1, 2)}, TypeError, "averaging: got tuple"),
        ({"averaging": (np.zeros((2, 3)),) * 4}, ValueError, r"averaging\[0\]: got shape \(2, 3\)"),
    ):
        with pytest.raises(error, match=message):
            selective_token_channel_mixer(x, **({"layers": stack} | change))
