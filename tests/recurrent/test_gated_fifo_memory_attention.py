"""`gated_fifo_memory_attention` and its step form."""

from itertools import pairwise

import numpy as np
import pytest

import longattn as la
import tolerances
from longattn.recurrent import GatedFifoMemory, gated_fifo_memory_attention
from longattn.reference import recurrent as reference
from random_arrays import DTYPES, F32, normal


def layer(rng, batch=2, length=37, width=12, heads=4, kv_heads=2, dim=6, value_dim=5, dtype=F32):
    return {
        "x": normal(rng, (batch, length, width), dtype),
        "wq": normal(rng, (width, heads * dim), spread=0.4),
        "wk": normal(rng, (width, kv_heads * dim), spread=0.4),
        "wv": normal(rng, (width, kv_heads * value_dim), spread=0.4),
        "memory_weights": tuple(
            normal(rng, shape, spread=0.3) for shape in ((width, width), (width, width), (width,), (width, width))
        ),
        "heads": heads,
        "slots": 3,
        "chunk": 8,
    }


def tolerance(arguments):
    """Slots are rows, too, of numbers between those of the first memory and 1 (or -1)."""
    x = np.asarray(arguments["x"], np.float32)
    rows = np.concatenate([x.reshape(-1, x.shape[2]), np.ones((1, x.shape[2]), np.float32)])
    weights = (arguments[name] for name in ("wq", "wk", "wv"))
    one = tolerances.added_branches(
        rows, *weights, arguments.get("wo"), heads=arguments["heads"], branches=3, scale=arguments.get("scale")
    )
    return tolerances.stored(one, arguments["x"].dtype)


def check(arguments):
    out, memory = gated_fifo_memory_attention(**arguments, return_memory=True)
    expected, expected_memory = reference.gated_fifo_memory_attention(**arguments, return_memory=True)
    assert out.dtype == arguments["x"].dtype and out.shape == expected.shape
    tolerance(arguments).check(out, expected)
    check_memory(memory, expected_memory)


def check_memory(memory, expected):
    """A slot is a few sums of `E` products, through functions of slopes of at most 1, and of slots before."""
    tolerances.check_linear(memory, expected, np.full(memory.shape, 10.0), 8 * memory.shape[-1])


@pytest.mark.parametrize("length", [1, 7, 8, 16, 37])
@pytest.mark.parametrize("previous_chunk", [False, True])
@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_reference(rng, length, previous_chunk, pooling):
    check(layer(rng, length=length) | {"previous_chunk": previous_chunk, "pooling": pooling})


@pytest.mark.parametrize("combine", ["softmax", "sigmoid"])
@pytest.mark.parametrize(
    "off", [{}, {"use_global": False}, {"use_local": False}, {"slots": 0}, {"slots": 0, "use_global": False}], ids=str
)
def test_branches(rng, combine, off):
    check(layer(rng) | {"combine": combine, "branch_logits": rng.standard_normal((4, 3))} | off)
    check(layer(rng) | off)


@pytest.mark.parametrize("segment", [1, 3, 8, 20, 100])
def test_segments_and_positions(rng, segment):
    memory = normal(rng, (2, 3, 12))
    check(layer(rng) | {"segment": segment, "rope_base": 100.0, "memory": memory, "wo": normal(rng, (20, 9))})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(rng, isa, dtype):
    check(layer(rng, dtype=dtype) | {"scale": 0.3})


def test_torch(rng):
    torch = pytest.importorskip("torch")
    arguments = layer(rng)
    out, memory = gated_fifo_memory_attention(**arguments, return_memory=True)
    tensor, slots = gated_fifo_memory_attention(
        **(arguments | {"x": torch.from_numpy(arguments["x"])}), return_memory=True
    )
    np.testing.assert_array_equal(tensor.numpy(), out)
    np.testing.assert_array_equal(slots.numpy(), memory)


# Identities


def projections(arguments):
    x, heads = arguments["x"], arguments["heads"]
    dim = arguments["wq"].shape[1] // heads
    kv_heads = arguments["wk"].shape[1] // dim
    sizes = (("wq", heads), ("wk", kv_heads), ("wv", kv_heads))
    return [(x @ arguments[n]).reshape(*x.shape[:2], h, -1).swapaxes(1, 2) for n, h in sizes]


def test_only_the_global_branch_is_causal_attention(rng, isa):
    arguments = layer(rng) | {"slots": 0, "use_local": False}
    expected = la.attention(*projections(arguments), causal=True).swapaxes(1, 2).reshape(2, 37, -1)
    tolerance(arguments).check(gated_fifo_memory_attention(**arguments), expected.astype(np.float64))


@pytest.mark.parametrize("chunk", [37, 64])
def test_a_chunk_of_everything_is_causal_attention(rng, isa, chunk):
    arguments = layer(rng) | {"slots": 0, "use_global": False, "chunk": chunk}
    expected = la.attention(*projections(arguments), causal=True).swapaxes(1, 2).reshape(2, 37, -1)
    tolerance(arguments).check(gated_fifo_memory_attention(**arguments), expected.astype(np.float64))


def test_a_gate_of_1_makes_a_queue_of_summaries(rng):
    arguments = layer(rng, length=32)
    wg, ug, _, wu = arguments["memory_weights"]
    arguments["memory_weights"] = (wg, ug, np.full(12, 1e4, np.float32), wu)
    _, memory = gated_fifo_memory_attention(**arguments, return_memory=True)
    means = arguments["x"].astype(np.float64).reshape(2, 4, 8, 12).mean(axis=2)[:, 1:]
    tolerances.check_linear(memory, np.tanh(means @ wu), 1 + np.abs(means) @ np.abs(wu), 24)


def test_one_slot_is_read_as_its_value(rng):
    arguments = layer(rng, length=8) | {"slots": 1, "use_global": False, "use_local": False}
    memory = normal(rng, (2, 1, 12))
    out = gated_fifo_memory_attention(**arguments, memory=memory)
    value = np.repeat((memory @ arguments["wv"]).reshape(2, 1, 2, 5), 2, axis=2).reshape(2, 1, 20)
    tolerance(arguments).check(out, np.broadcast_to(value, (2, 8, 20)).astype(np.float64))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"previous_chunk": True, "segment": 5, "rope_base": 50.0}], ids=["plain", "all"]
)
@pytest.mark.parametrize("chunks", [(1,) * 37, (3, 20, 1, 13)], ids=["1", "some"])
def test_steps_are_the_whole(rng, dtype, options, chunks):
    arguments = layer(rng, batch=1, dtype=dtype) | options
    whole, memory = gated_fifo_memory_attention(**arguments, return_memory=True)
    x = arguments.pop("x")
    steps = GatedFifoMemory(12, **arguments)
    parts = [steps.append(x[0, a:b]) for a, b in pairwise(np.cumsum((0, *chunks)))]
    allowed = tolerance(arguments | {"x": x})
    allowed = tolerances.Tolerance(atol=2 * allowed.atol, rtol=2 * allowed.rtol, lse_atol=0)
    allowed.check(np.concatenate(parts), whole[0].astype(np.float64))
    check_memory(steps.memory, memory[0].astype(np.float64))
    assert len(steps) == 37 and steps.nbytes > steps.memory.nbytes


# Bad input


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": np.zeros((37, 12), F32)}, ValueError, r"x: got shape \(37, 12\), expected \[B, L, E\]"),
        ({"heads": 5}, ValueError, r"wq: got shape \(12, 24\), expected \[E, heads \* D\] with 5 heads"),
        ({"wk": np.zeros((12, 13), F32)}, ValueError, r"wk: got shape \(12, 13\)"),
        ({"wv": np.zeros((12, 11), F32)}, ValueError, r"wv: got shape \(12, 11\)"),
        ({"wq": np.zeros((11, 24), F32)}, ValueError, r"wq: got shape \(11, 24\), expected \[12, 'columns'\]"),
        ({"memory_weights": None}, TypeError, r"memory_weights: got NoneType, expected \(wg, ug, b, wu\)"),
        ({"memory_weights": (np.zeros(12, F32),) * 4}, ValueError, r"memory_weights\[0\]: got shape \(12,\)"),
        ({"memory": np.zeros((2, 4, 12), F32)}, ValueError, r"memory: got shape \(2, 4, 12\), expected \(2, 3, 12\)"),
        ({"slots": 0, "use_global": False, "use_local": False}, ValueError, r"use_global: got no branch"),
        ({"slots": -1}, ValueError, r"slots: got -1"),
        ({"chunk": 0}, ValueError, r"chunk: got 0"),
        ({"segment": 0}, ValueError, r"segment: got 0"),
        ({"pooling": "max"}, ValueError, r"pooling: got 'max'"),
        ({"combine": "mean"}, ValueError, r"combine: got 'mean'"),
        ({"branch_logits": np.zeros(3)}, ValueError, r"branch_logits: got them with combine='sum'"),
        ({"branch_logits": np.zeros(2), "combine": "softmax"}, ValueError, r"branch_logits: got shape \(2,\)"),
        ({"rope_base": -1.0}, ValueError, r"rope_base: got -1.0"),
        ({"wo": np.zeros((19, 3), F32)}, ValueError, r"wo: got shape \(19, 3\)"),
        ({"use_local": 1}, TypeError, r"use_local: got 1"),
    ],
)
def test_bad_arguments(rng, change, error, message):
    with pytest.raises(error, match=message):
        gated_fifo_memory_attention(**(layer(rng) | change))


def test_bad_steps(rng):
    arguments = layer(rng)
    x = arguments.pop("x")
    steps = GatedFifoMemory(12, **arguments, capacity=10)
    with pytest.raises(ValueError, match=r"x: got shape \(2, 37, 12\), expected \[T, 12\]"):
        steps.append(x)
    with pytest.raises(ValueError, match=r"x: got 37 tokens after 0, expected at most 10"):
        steps.append(x[0])
    assert len(steps) == 0
