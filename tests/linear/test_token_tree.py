"""Recurrences over trees of tokens: every token beside its branch alone."""

import numpy as np
import pytest

from longattn import linear

#: A tree: two roots, chains, branches of branches.
PARENTS = [-1, 0, 1, 1, 3, -1, 5, 0, 4, 4]


def arguments(rng, name, tokens=10):
    q, k, v = (rng.standard_normal((2, 2, tokens, n)).astype(np.float32) for n in (8, 8, 6))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    gate, beta = -rng.random((2, 2, tokens, 8)).astype(np.float32), rng.random((2, 2, tokens)).astype(np.float32)
    found = {"q": q, "k": k, "v": v}
    more = {
        "retention": {},
        "gated_delta_rule": {"g": gate[..., 0], "beta": beta},
        "rwkv7": {"g": gate, "a": -k, "b": k * beta[..., None]},
        "gated_slot_attention": {"g": gate[..., :4]},
        "grouped_linear_attention_local_conv": {},
        "titans_neural_memory": {"theta": beta},
        "causal_inline_attention": {},
    }
    options = {}
    if name == "grouped_linear_attention_local_conv":
        options = {"group_size": 3, "weight": rng.standard_normal((2, 3)).astype(np.float32)}
    return {**found, **more[name]}, options


NAMES = (
    "retention", "gated_delta_rule", "rwkv7", "gated_slot_attention", "grouped_linear_attention_local_conv",
    "titans_neural_memory", "causal_inline_attention",
)  # fmt: skip


def numbers(state):
    """The arrays of a state, flat."""
    if isinstance(state, np.ndarray):
        return [state]
    if isinstance(state, tuple):
        return list(state)
    return [getattr(state, n) for n in state.__slots__ if isinstance(getattr(state, n), np.ndarray)]


def part(rows, tokens):
    return {name: x[:, :, tokens] for name, x in rows.items()}


@pytest.mark.parametrize("name", NAMES)
def test_each_token_sees_its_branch(rng, name):
    function = getattr(linear, name)
    rows, options = arguments(rng, name)
    before, _ = arguments(rng, name, tokens=5)
    _, start = function(**before, **options)
    tree = linear.verify_tree(function, rows, PARENTS, initial_state=start, **options)
    assert tree.out.shape == (2, 2, 10, 6)
    for token in range(len(PARENTS)):
        path = tree.path(token)
        out, state = function(**part(rows, path), initial_state=start, **options)
        np.testing.assert_allclose(tree.out[:, :, token], out[:, :, -1], rtol=2e-5, atol=2e-5)
        for ours, theirs in zip(numbers(tree.accept(token)), numbers(state), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_chain_is_the_sequence(rng, name):
    function = getattr(linear, name)
    rows, options = arguments(rng, name)
    expected, state = function(**rows, **options)
    tree = linear.verify_tree(function, rows, range(-1, 9), **options)
    np.testing.assert_array_equal(tree.out, expected)
    for ours, theirs in zip(numbers(tree.accept(9)), numbers(state), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert tree.path(9) == list(range(10))


def test_tokens_are_computed_once(rng):
    rows, _ = arguments(rng, "retention")
    seen = []

    def counted(**given):
        seen.append(given["v"].shape[2])
        return linear.retention(**given)

    tree = linear.verify_tree(counted, rows, PARENTS)
    assert sum(seen) == len(PARENTS) and len(seen) == 8
    tree.accept(9)
    assert len(seen) == 8  # the end of a chain has its state
    tree.accept(5)
    assert seen[8:] == [1]


def test_without_a_batch_and_as_tensors(rng):
    torch = pytest.importorskip("torch")
    rows, _ = arguments(rng, "gated_delta_rule")
    tree = linear.verify_tree(linear.gated_delta_rule, rows, PARENTS)
    alone = linear.verify_tree(linear.gated_delta_rule, {name: x[1] for name, x in rows.items()}, PARENTS)
    np.testing.assert_array_equal(alone.out, tree.out[1])
    tensors = {name: torch.from_numpy(x) for name, x in rows.items()}
    found = linear.verify_tree(linear.gated_delta_rule, tensors, PARENTS)
    np.testing.assert_array_equal(found.out.numpy(), tree.out)


def test_wrong_arguments(rng):
    rows, _ = arguments(rng, "retention")

    def bad(match, error=ValueError, parents=PARENTS, **changes):
        with pytest.raises(error, match=match):
            linear.verify_tree(linear.retention, {**rows, **changes}, parents)

    bad("parents: got 3 for token 3", parents=[-1, 0, 1, 3, 3, 4, 5, 6, 7, 8])
    bad("parents: got -2", parents=[-2] * 10)
    bad("parents: got none", parents=[])
    bad("q: got shape", parents=PARENTS[:9])
    bad("k: got shape", k=rows["k"][:, :, 1:])
    with pytest.raises(TypeError, match="function: got int"):
        linear.verify_tree(3, rows, PARENTS)
    with pytest.raises(TypeError, match="rows: got none"):
        linear.verify_tree(linear.retention, {"q": rows["q"]}, PARENTS)
    tree = linear.verify_tree(linear.retention, rows, PARENTS)
    with pytest.raises(ValueError, match="token: got 10"):
        tree.accept(10)
