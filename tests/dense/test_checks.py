"""Checks that every family shares: what they pass, and the words in which they refuse."""

import re
from fractions import Fraction

import numpy as np
import pytest

from longattn._arrays import reshaped
from longattn._checks import finite, function, integers, items_of, one_of, real

NAN, INF = float("nan"), float("inf")


def test_what_passes():
    assert [real(x, "x") for x in (1, 0.5, np.float32(2), Fraction(1, 2), INF)] == [1.0, 0.5, 2.0, 0.5, INF]
    assert finite(-3, "x") == -3.0 and finite(0, "x", 0) == 0.0
    assert items_of((n for n in (1, 2)), "x", "numbers") == (1, 2)
    assert [a.tolist() for a in items_of(np.eye(2), "x", "rows")] == [[1, 0], [0, 1]]
    assert integers([np.int64(3), 4], "x", 3, 4) == (3, 4)
    assert one_of("b", "x", {"a": 1, "b": 2}) == "b"
    function(len, "x")


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: real(NAN, "tau"), ValueError, "tau: got nan, expected a number"),
        (lambda: real(np.float32(NAN), "tau"), ValueError, "tau: got nan, expected a number"),
        (lambda: real("1", "tau"), TypeError, "tau: got '1', expected a number"),
        (lambda: real(True, "tau"), TypeError, "tau: got True, expected a number"),
        (lambda: real(np.zeros(1), "tau"), TypeError, "tau: got array([0.]), expected a number"),
        (lambda: real(10**400, "tau"), ValueError, "tau: got a number beyond the range of float64"),
        (lambda: finite(NAN, "eps"), ValueError, "eps: got nan, expected a finite float32"),
        (lambda: finite(-INF, "eps"), ValueError, "eps: got -inf, expected a finite float32"),
        (lambda: finite(1e39, "eps"), ValueError, "eps: got 1e+39, expected a finite float32"),
        (lambda: finite(-1, "eps", 0), ValueError, "eps: got -1, expected at least 0"),
        (lambda: items_of(3, "layers", "pairs"), TypeError, "layers: got int, expected a sequence of pairs"),
        (lambda: items_of("ab", "layers", "pairs"), TypeError, "layers: got str, expected a sequence of pairs"),
        (lambda: items_of({}, "layers", "pairs"), TypeError, "layers: got dict, expected a sequence of pairs"),
        (
            lambda: items_of(np.zeros(()), "layers", "pairs"),
            TypeError,
            "layers: got ndarray, expected a sequence of pairs",
        ),
        (lambda: integers(None, "size"), TypeError, "size: got NoneType, expected a sequence of integers"),
        (lambda: integers((2, 1.5), "size"), TypeError, "size: got 1.5, expected an integer"),
        (lambda: integers((2, 0), "size", 1), ValueError, "size: got 0, expected at least 1"),
        (lambda: one_of("c", "mode", ("a", "b")), ValueError, "mode: got 'c', expected 'a' or 'b'"),
        (lambda: one_of([], "mode", {"a": 1}), ValueError, "mode: got [], expected 'a'"),
        (lambda: one_of(np.zeros(2), "mode", "abc"), ValueError, "mode: got array([0., 0.]), expected 'a', 'b' or 'c'"),
        (lambda: one_of(None, "mode", ("a",)), ValueError, "mode: got None, expected 'a'"),
        (lambda: one_of("b", "mode", ("a", None)), ValueError, "mode: got 'b', expected 'a' or None"),
        (lambda: function(3, "phi"), TypeError, "phi: got int, expected a function"),
    ],
)
def test_what_is_refused(call, error, words):
    with pytest.raises(error, match=rf"^{re.escape(words)}"):
        call()


@pytest.mark.parametrize(
    ("shape", "wanted", "found"),
    [
        ((2, 3, 4, 5), (2, -1, 5), (2, 12, 5)),
        ((0, 3, 4, 5), (0, -1, 5), (0, 12, 5)),
        ((0, 3, 4, 10), (0, 12, 2, -1), (0, 12, 2, 5)),
        ((0, 12, 5), (0, 3, -1, 5), (0, 3, 4, 5)),
        ((0, 3, 5), (-1, 5), (0, 5)),
        ((2, 3, 0), (2, -1, 0), (2, 3, 0)),
    ],
)
def test_reshaped(shape, wanted, found):
    assert reshaped(np.zeros(shape), *wanted).shape == found
