"""`trajectory_attention` and `flow_paths`: along the paths of motion."""

import numpy as np
import pytest

import longattn as la
from longattn.reference import vision as reference
from longattn.vision import flow_paths, trajectory_attention, trajectory_lists
from longattn.vision.trajectory_attention import METHOD
from random_arrays import F32, qkv
from vision_checks import check, check_kinds, raises, same

SHAPE = (4, 5, 6)


def patches(rng, shape=SHAPE, batch=2, heads=4, kv_heads=2):
    n = int(np.prod(shape))
    return qkv(rng, batch=batch, heads=heads, kv_heads=kv_heads, rows=n, keys=n, dim=8, value_dim=6)


def motion(rng, shape=SHAPE, batch=None, reach=2):
    lead = () if batch is None else (batch,)
    return rng.integers(-reach, reach + 1, (*lead, shape[0] - 1, 2, *shape[1:])).astype(F32)


@pytest.mark.parametrize("shape", [SHAPE, (2, 1, 3), (1, 3, 3)])
@pytest.mark.parametrize("batch", [None, 2])
def test_reference(rng, isa, threads, shape, batch):
    check(METHOD, *patches(rng, shape), motion(rng, shape, batch), scale=0.6)


def test_kinds(rng):
    check_kinds(METHOD, *patches(rng), motion(rng))


@pytest.mark.parametrize("reach", [0, 1, 3, 9])
def test_paths(rng, reach):
    flow = motion(rng, reach=reach) + 0.3
    paths = flow_paths(flow)
    np.testing.assert_array_equal(paths, reference.flow_paths(flow))
    drawn = [flow_paths(flow, seed=s) for s in (1, 1, 2)]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    if reach in (1, 3):
        assert (drawn[0] != drawn[2]).any()
    for numbers in (paths, *drawn):
        for frame in numbers:  # one patch per frame at most
            assert np.unique(frame).size == frame.size


@pytest.mark.parametrize("batch", [None, 2])
def test_lists(rng, batch):
    flow = motion(rng, batch=batch)
    lists = trajectory_lists(flow)
    each = np.stack([flow_paths(one).ravel() for one in (flow if batch else flow[None])])
    np.testing.assert_array_equal(lists.to_dense_mask(), (each[:, None, :, None] == each[:, None, None]))
    q, k, v = patches(rng)
    out = trajectory_attention(q, k, v, flow)
    np.testing.assert_array_equal(la.sparse_attention(q, k, v, lists), out)
    frames = la.BlockMask.from_blocks(np.eye(4, dtype=bool), lengths=lists.lengths, block_q=30, block_k=30)
    both = lists | frames
    np.testing.assert_array_equal(both.to_dense_mask(), lists.to_dense_mask() | frames.to_dense_mask())


def test_without_motion(rng):
    q, k, v = patches(rng)
    flow = np.zeros((3, 2, 5, 6), F32)
    frames = [
        x.reshape(2, -1, 4, 30, x.shape[-1]).transpose(0, 3, 1, 2, 4).reshape(60, -1, 4, x.shape[-1]) for x in (q, k, v)
    ]
    expected = la.attention(*frames).reshape(2, 30, 4, 4, 6).transpose(0, 2, 3, 1, 4).reshape(2, 4, 120, 6)
    same(METHOD, trajectory_attention(q, k, v, flow), expected, q, k, v, flow)


@pytest.mark.parametrize(("shape", "flow"), [((1, 5, 6), np.zeros((0, 2, 5, 6))), (SHAPE, np.full((3, 2, 5, 6), 9e9))])
def test_alone_it_returns_the_values(rng, shape, flow):
    q, k, v = patches(rng, shape)
    np.testing.assert_allclose(trajectory_attention(q, k, v, flow), np.repeat(v, 2, axis=1), rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"flow": np.zeros((3, 2, 5, 5))}, ValueError, r"q: got 120 rows and 120 keys, expected 100"),
        ({"flow": np.zeros((3, 3, 5, 6))}, ValueError, r"flow: got shape \(3, 3, 5, 6\)"),
        ({"flow": np.zeros((3, 3, 2, 5, 6))}, ValueError, r"flow: got batch 3, expected 2"),
        ({"flow": np.full((3, 2, 5, 6), np.nan)}, ValueError, r"flow: got NaN"),
        ({"flow": np.zeros((3, 2, 5, 6), int)}, TypeError, r"flow: got dtype int64"),
        ({"seed": -1}, ValueError, r"seed: got -1"),
        ({"q": np.zeros((4, 120, 8), F32)}, ValueError, r"k: got shape"),
    ],
)
def test_bad_arguments(rng, change, error, message):
    q, k, v = patches(rng)
    raises(METHOD, error, message, {"q": q, "k": k, "v": v, "flow": motion(rng)}, **change)


def test_bad_paths():
    with pytest.raises(ValueError, match=r"flow: got shape \(1, 3, 2, 5, 6\)"):
        flow_paths(np.zeros((1, 3, 2, 5, 6)))
