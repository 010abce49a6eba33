"""`extended_frame_attention`: each frame sees a set of frames."""

import numpy as np
import pytest

import longattn as la
from longattn.vision import anchored_frames, extended_frame_attention
from longattn.vision.extended_frame_attention import METHOD
from random_arrays import F32, normal
from vision_checks import check, check_kinds, raises, same


def arguments(rng, shape=(2, 4, 5, 12)):
    return tuple(normal(rng, shape) for _ in range(3))


def dense(q, k, v):
    rows = (x.reshape(len(x), -1, 3, 4).swapaxes(1, 2) for x in (q, k, v))
    return la.attention(*rows).swapaxes(1, 2).reshape(q.shape)


@pytest.mark.parametrize("frames", [None, [[0], [0, 1], [0, 1, 2], [0, 2, 3]], [[0, 3], [], [1, 2], [3]]])
@pytest.mark.parametrize("hidden", [False, True])
def test_reference(rng, isa, threads, frames, hidden):
    kept = rng.random((2, 4, 5)) < 0.6 if hidden else None
    check(METHOD, *arguments(rng), frames, heads=3, scale=0.6, kept=kept)


def test_kinds(rng):
    check_kinds(METHOD, *arguments(rng), anchored_frames(4), heads=3)


def test_frames_by_themselves(rng):
    q, k, v = arguments(rng)
    frames = [[i] for i in range(4)]
    expected = dense(*(x.reshape(8, 5, 12) for x in (q, k, v))).reshape(q.shape)
    same(METHOD, extended_frame_attention(q, k, v, frames, heads=3), expected, q, k, v, frames, heads=3)


def test_all_frames(rng):
    q, k, v = arguments(rng)
    same(METHOD, extended_frame_attention(q, k, v, heads=3), dense(q, k, v), q, k, v, heads=3)


def test_equal_frames(rng):
    q, k, v = (np.repeat(x[:, :1], 4, axis=1) for x in arguments(rng))
    expected = dense(*(x.reshape(8, 5, 12) for x in (q, k, v))).reshape(q.shape)
    same(METHOD, extended_frame_attention(q, k, v, anchored_frames(4), heads=3), expected, q, k, v, heads=3)


def test_anchored_frames():
    assert anchored_frames(4, anchor=1) == [[0, 1], [0, 1], [1, 2], [1, 2, 3]]
    with pytest.raises(ValueError, match=r"anchor: got 4"):
        anchored_frames(4, anchor=4)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"frames": [[0]] * 3}, ValueError, r"frames: got 3 sets, expected 4"),
        ({"frames": [[1, 0]] * 4}, ValueError, r"frames\[0\]: got \[1, 0\], expected ascending"),
        ({"frames": [[0], [4], [0], [0]]}, ValueError, r"frames\[1\]: got 4"),
        ({"k": np.zeros((2, 4, 6, 12), F32)}, ValueError, r"k: got shape \(2, 4, 6, 12\)"),
        ({"kept": np.ones((2, 4, 5))}, TypeError, r"kept: got dtype float64"),
        ({"kept": np.ones((2, 20), bool)}, ValueError, r"kept: got shape \(2, 20\)"),
    ],
)
def test_bad_arguments(rng, change, error, message):
    q, k, v = arguments(rng)
    raises(METHOD, error, message, {"q": q, "k": k, "v": v, "heads": 3}, **change)
