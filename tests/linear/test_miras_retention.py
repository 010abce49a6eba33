"""Steps of a memory's weights, by how they are kept."""

import numpy as np
import pytest

from longattn.linear import miras_memory, miras_retention, read_lq
from random_arrays import DTYPES


def test_formulas(rng):
    w, g = rng.uniform(0.1, 0.9, (2, 3, 4)), rng.standard_normal((2, 3, 4))
    np.testing.assert_allclose(miras_retention(w, g, 0.1, keep=0.9), 0.9 * w - 0.1 * g, rtol=1e-12)
    moved = 0.9 * w - 0.1 * g
    soft = np.where(moved > 0.3, moved - 0.3, np.where(moved < -0.3, moved + 0.3, 0))
    found = miras_retention(w, g, 0.1, keep=0.9, kind="elastic_net", threshold=0.3)
    np.testing.assert_allclose(found, soft, rtol=1e-12, atol=1e-15)
    logits = np.log(w / (1 - w)) - 0.1 * g
    found = miras_retention(w, g, 0.1, kind="sigmoid")
    np.testing.assert_allclose(found, 1 / (1 + np.exp(-logits)), rtol=1e-12)


def test_thresholds_of_0_and_exponents_of_2_are_plain_steps(rng):
    w, g = rng.standard_normal((2, 3, 4))
    plain = miras_retention(w, g, 0.2, keep=0.5)
    np.testing.assert_array_equal(miras_retention(w, g, 0.2, keep=0.5, kind="elastic_net"), plain)
    np.testing.assert_array_equal(read_lq(miras_retention(w, g, 0.2, keep=0.5, kind="lq"), exponent=2.0), plain)


def test_steps_of_lq_are_monetas(rng):
    """A linear memory, row by row: the gradient of squares with respect to `W` `[D, Dv]`."""
    q, k, v = (rng.standard_normal((1, 5, n)).astype(np.float32) for n in (4, 4, 3))
    start = rng.standard_normal((1, 4, 3)).astype(np.float32)
    out, _ = miras_memory(
        q, k, v, 0.3, variant="moneta", alpha=0.9, loss_exponent=2.0, weights=[start], normalize_qk=False, chunk_size=1,
        steepness=1e6,
    )  # fmt: skip
    a = start[0].astype(np.float64)
    for t in range(5):
        error = k[0, t] @ read_lq(a) - v[0, t]
        a = miras_retention(a, 2 * np.outer(k[0, t], error), 0.3, keep=0.9, kind="lq")
        np.testing.assert_allclose(out[0, t], q[0, t] @ read_lq(a), rtol=1e-3, atol=5e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(rng, dtype):
    w, g = (rng.standard_normal((2, 3, 4)).astype(dtype) for _ in range(2))
    assert miras_retention(w, g, 0.1).dtype == dtype and read_lq(w).dtype == dtype


def test_wrong_arguments(rng):
    w = rng.uniform(0.1, 0.9, (3, 4))

    def bad(match, error=ValueError, gradient=w, rate=0.1, weights=w, **options):
        with pytest.raises(error, match=match):
            miras_retention(weights, gradient, rate, **options)

    bad("kind: got 'l1'", kind="l1")
    bad("gradient: got shape", gradient=w[1:])
    bad("weights: got dtype", TypeError, weights=w.astype(int))
    bad("rate: got -1", rate=-1.0)
    bad("keep: got 2", keep=2.0)
    bad("threshold: got -1", threshold=-1.0)
    bad("exponent: got 1", exponent=1.0)
    bad("weights: got a number outside", weights=w + 1, kind="sigmoid")
    with pytest.raises(ValueError, match="weights: got shape"):
        read_lq(w[0])
