"""Tolerances of recurrences, features and whole layers."""

import numpy as np

from tolerances.arithmetic import ROUNDOFF, SAFETY, U, _largest, _row_norm


def device_recurrence(actual, expected, actual_state, expected_state):
    """Assert that an output and a final state of `longattn.gpu.chunked_recurrence` are close.

    A state is a sum over the rows, of numbers of the size of its largest, each rounded to float32 some times on the way
    (64 covers the solve of a chunk); outputs are read from states and rounded to their dtype. With 16-bit inputs what
    goes into a product is rounded to that dtype before: the decayed keys twice, the update, the solve, the state as it
    is read, of either sign in every chunk of 16 rows.
    """
    size = max(1.0, np.abs(expected_state).max())
    roundoff, smallest = ROUNDOFF[actual.dtype]
    rows = max(expected.shape[2], 1)
    products = 2 * roundoff * np.sqrt(-(-rows // 16)) if actual.dtype.itemsize == 2 else 0.0
    allowed = (64 * U * np.sqrt(rows) + products) * size
    np.testing.assert_allclose(actual_state, expected_state, atol=allowed, err_msg="state")
    actual = np.asarray(actual, np.float64)
    np.testing.assert_allclose(actual, expected, rtol=roundoff, atol=allowed + smallest, err_msg="output")


def check_features(actual, expected, q, k, w_enc, bias=0.0, layers=1):
    """Assert that scores by features are close, whose activations are float32 sums and, of keys, rounded to float16.

    An activation is at most the norms' product, plus the bias; a score has as many terms as there are features.
    """
    terms = w_enc.shape[-1]
    longest = _row_norm(np.swapaxes(w_enc, -1, -2))
    of_query, of_key = (_row_norm(x) * longest + bias for x in (q, k))
    rarity = np.log(2 * k.shape[-2] + 2)
    size = layers * rarity * q.shape[-2] * of_query * np.sqrt(terms) * of_key
    np.testing.assert_allclose(actual, expected, rtol=0, atol=(2.0**-11 + SAFETY * U * np.sqrt(terms)) * size)


def check_linear(actual, expected, size, terms):
    """Assert that sums of products, without a softmax, are close.

    Args:
        actual: sums that were computed in float32.
        expected: their references.
        size: sums of the terms' magnitudes.
        terms: how many numbers are added one after another, products of a few factors each.
    """
    actual = np.asarray(actual)
    roundoff, smallest = ROUNDOFF[actual.dtype]
    allowed = SAFETY * U * (np.sqrt(terms) + 8) * np.asarray(size) + roundoff * np.abs(expected) + smallest + 1e-37
    error = np.abs(actual.astype(np.float64) - expected)
    assert (error <= allowed).all(), f"{(error / allowed).max():.2f} times the error that is allowed"


def check_layer(actual, expected, depth=1):
    """Assert that the output of a layer of a few float32 products, gates and scans is close.

    Each of them errs by some `U` of the size of its terms, which for random weights is that of the outputs, and passes
    on what came before; `SAFETY` times 64 of those to a layer leaves room for sums that cancel.

    Args:
        actual: outputs in any storage dtype.
        expected: their references.
        depth: layers, one after another.
    """
    actual = np.asarray(actual)
    roundoff, smallest = ROUNDOFF[actual.dtype]
    assert actual.shape == expected.shape
    allowed = 64 * SAFETY * depth * U * (1 + _largest(expected)) + roundoff * np.abs(expected) + smallest
    error = np.abs(actual.astype(np.float64) - expected)
    assert (error <= allowed).all(), f"{(error / allowed).max():.2f} times the error that is allowed"
