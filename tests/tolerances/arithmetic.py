"""Unit roundoffs, and what a tolerance is."""

from dataclasses import dataclass

import ml_dtypes
import numpy as np

U = 2.0**-24
U_DOUBLE = 2.0**-53
SAFETY = 4.0
#: Unit roundoff and half the smallest subnormal of each storage dtype.
ROUNDOFF = {
    np.dtype(np.float32): (2.0**-24, 2.0**-150),
    np.dtype(np.float16): (2.0**-11, 2.0**-25),
    np.dtype(ml_dtypes.bfloat16): (2.0**-8, 2.0**-134),
    np.dtype(np.float64): (2.0**-53, 0.0),
}


def unit(dtype):
    """Unit roundoff of the arithmetic that inputs of this dtype get."""
    return U_DOUBLE if dtype == np.float64 else U


@dataclass(frozen=True)
class Tolerance:
    """Allowed `|actual - expected| <= atol + rtol * |expected|` of an output and of its lse."""

    atol: float
    rtol: float
    lse_atol: float
    lse_rtol: float = 2 * U

    def check(self, actual, expected, actual_lse=None, expected_lse=None):
        """Assert that an output and, where given, its lse are close; NaN and infinities must be the same."""
        actual = np.asarray(actual, np.float64)
        np.testing.assert_allclose(actual, expected, rtol=self.rtol, atol=self.atol, err_msg="output")
        if actual_lse is not None:
            actual_lse = np.asarray(actual_lse, np.float64)
            np.testing.assert_allclose(actual_lse, expected_lse, rtol=self.lse_rtol, atol=self.lse_atol, err_msg="lse")


def _row_norm(x):
    x = np.asarray(x, np.float64)
    return float(np.sqrt((_finite(x) ** 2).sum(axis=-1)).max(initial=0.0))


def _largest(x):
    return float(np.abs(_finite(np.asarray(x, np.float64))).max(initial=0.0))


def _finite(x):
    return np.where(np.isfinite(x), x, 0.0)
