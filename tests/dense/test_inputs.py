"""What comes in: bad inputs are refused by name before any work, odd but right ones are taken."""

import re

import ml_dtypes
import numpy as np
import pytest

import longattn as la
from random_arrays import normal, qkv

RNG = np.random.default_rng(0)
NAN, INF = float("nan"), float("inf")


def array(*shape, dtype=np.float32):
    return np.ones(shape, dtype)


class Elsewhere:
    """An array on another device, as DLPack tells it."""

    def __init__(self, device):
        self.device = device

    def __dlpack_device__(self):
        return self.device

    def __dlpack__(self, **_):
        raise AssertionError("memory of another device was asked for")


class Here:
    """An array of some other library, in CPU memory."""

    def __init__(self, values, device=(1, 0)):
        self.values, self.device, self.dtype = values, device, values.dtype

    def __dlpack_device__(self):
        return self.device

    def __dlpack__(self, **options):
        return self.values.__dlpack__(**options)


def readonly(x):
    x.flags.writeable = False
    return x


Q, K, V = array(2, 4, 3, 8), array(2, 2, 5, 8), array(2, 2, 5, 6)
SHARED = array(2, 4, 6, 8)

# Argument, what is wrong with it, error, and what its message says after the argument's name.
BAD_ATTENTION = [
    ("q", [[1.0]], TypeError, "got list, expected a numpy array"),
    ("q", None, TypeError, "got NoneType"),
    ("q", np.float32(1), TypeError, "got numpy.float32"),
    ("q", np.ma.masked_array(Q), TypeError, "got a masked array"),
    ("q", Q.astype(object), TypeError, "got dtype object"),
    ("q", Q.astype("S4"), TypeError, "got dtype |S4"),
    ("q", Q.astype(np.complex64), TypeError, "got dtype complex64"),
    ("q", Q.astype(np.float64), TypeError, "got dtype float64, expected float32, float16 or bfloat16"),
    ("q", Q.astype(np.int32), TypeError, "got dtype int32"),
    ("q", Q.astype(ml_dtypes.float8_e4m3fn), TypeError, "got dtype float8_e4m3fn"),
    ("q", Q.astype(Q.dtype.newbyteorder()), TypeError, "foreign byte order"),
    ("q", Elsewhere((2, 1)), ValueError, "on device CUDA:1, expected CPU memory"),
    ("q", Elsewhere((77, 0)), ValueError, "on device DLPack type 77:0, expected CPU memory"),
    ("q", Here(Q.astype(np.float64)), TypeError, "got dtype float64"),
    ("q", Q[0, 0], ValueError, "got shape (3, 8), expected rank 3 or 4"),
    ("q", Q[None], ValueError, "got shape (1, 2, 4, 3, 8), expected rank 3 or 4"),
    ("q", array(2, 4, 3, 0), ValueError, "got head_dim 0"),
    ("q", array(2, 3, 3, 8), ValueError, "got 3 heads, expected a positive multiple of the 2 heads of k"),
    ("q", array(2, 0, 3, 8), ValueError, "got 0 heads"),
    ("k", K[0], ValueError, "got shape (2, 5, 8), expected rank 4 as q"),
    ("k", array(2, 2, 5, 7), ValueError, "got head_dim 7, expected 8 as in q"),
    ("k", array(3, 2, 5, 8), ValueError, "got batch 3, expected 2 as in q"),
    ("k", K.astype(np.float64), TypeError, "got dtype float64"),
    ("v", V[0], ValueError, "got shape (2, 5, 6), expected rank 4 as q"),
    ("v", array(1, 2, 5, 6), ValueError, "got batch 1, expected 2 as in q"),
    ("v", array(2, 4, 5, 6), ValueError, "got 4 heads, expected 2 as in k"),
    ("v", array(2, 2, 4, 6), ValueError, "got length 4, expected 5 as in k"),
    ("v", array(2, 2, 5, 0), ValueError, "got head_dim 0"),
    ("v", V.astype(np.float16), TypeError, "got dtype float16, expected float32 as k"),
    ("causal", 1, TypeError, "got 1, expected True or False"),
    ("causal", None, TypeError, "got None"),
    ("return_lse", "yes", TypeError, "got 'yes', expected True or False"),
    ("window", 5, TypeError, "got 5, expected a pair (left, right)"),
    ("window", (1, 2, 3), TypeError, "got (1, 2, 3), expected a pair"),
    ("window", (1.0, 2), TypeError, "got (1.0, 2), expected a pair of integers"),
    ("window", (True, 0), TypeError, "got (True, 0), expected a pair of integers"),
    ("scale", 10**400, ValueError, "got a number beyond the range of float64"),
    ("softcap", 10**400, ValueError, "got a number beyond the range of float64"),
    ("window", (-2, 0), ValueError, "got (-2, 0), expected sides of at least 0, or -1"),
    ("window", (0, -7), ValueError, "got (0, -7)"),
    ("scale", NAN, ValueError, "got nan, expected a finite float32"),
    ("scale", INF, ValueError, "got inf"),
    ("scale", 1e39, ValueError, "got 1e+39"),
    ("scale", "1", TypeError, "got '1', expected a number"),
    ("scale", 1j, TypeError, "got 1j"),
    ("softcap", -1.0, ValueError, "got -1.0, expected 0 (off) or a positive"),
    ("softcap", NAN, ValueError, "got nan"),
    ("softcap", INF, ValueError, "got inf"),
    ("softcap", 1e-300, ValueError, "got 1e-300"),
    ("softcap", None, TypeError, "got None, expected a number"),
    ("bias", array(3, 4), ValueError, "got shape (3, 4), expected one that broadcasts to (2, 4, 3, 5)"),
    ("bias", array(1, 2, 4, 3, 5), ValueError, "got shape (1, 2, 4, 3, 5)"),
    ("bias", array(3, 5, dtype=np.int64), TypeError, "got dtype int64, expected a floating dtype"),
    ("bias", array(3, 5, dtype=bool), TypeError, "got dtype bool, expected a floating dtype"),
    ("mask", array(3, 4, dtype=bool), ValueError, "got shape (3, 4), expected one that broadcasts"),
    ("mask", array(3, 5, dtype=np.uint8), TypeError, "got dtype uint8, expected bool"),
    ("mask", array(3, 5), TypeError, "got dtype float32, expected bool"),
    ("alibi_slopes", array(3), ValueError, "got shape (3,), expected (4,) or (2, 4)"),
    ("alibi_slopes", array(1, 4), ValueError, "got shape (1, 4)"),
    ("alibi_slopes", array(4, dtype=int), TypeError, "got dtype int64, expected a floating dtype"),
    ("alibi_slopes", [0.5] * 4, TypeError, "got list"),
    ("sinks", array(2), ValueError, "got shape (2,), expected (4,), one per query head"),
    ("sinks", array(2, 4), ValueError, "got shape (2, 4)"),
    ("sinks", array(4, dtype=int), TypeError, "got dtype int64"),
    ("scale", [0.5] * 4, TypeError, "got [0.5, 0.5, 0.5, 0.5], expected a number"),
    ("scale", array(4, dtype=int), TypeError, "got dtype int64, expected a floating dtype"),
    ("scale", array(2), ValueError, "got shape (2,), expected (4,), (4, 3) or (2, 4, 3)"),
    ("scale", array(), ValueError, "got shape ()"),
    ("scale", array(2, 4, 3, 1), ValueError, "got shape (2, 4, 3, 1)"),
    ("scale", np.array([1, 1, NAN, 1]), ValueError, "no finite float32"),
    ("scale", np.array([1, 1, 1e39, 1]), ValueError, "no finite float32"),
    ("relative_bias", [[0.0]] * 4, TypeError, "got list"),
    ("relative_bias", array(4, 5, dtype=int), TypeError, "got dtype int64, expected a floating dtype"),
    ("relative_bias", array(5), ValueError, "got shape (5,), expected (4, n)"),
    ("relative_bias", array(2, 5), ValueError, "got shape (2, 5), expected (4, n)"),
    ("relative_bias", array(4, 0), ValueError, "got shape (4, 0)"),
    ("relative_zero", 3, ValueError, "got 3 without relative_bias"),
    ("segments", array(3), TypeError, "got ndarray, expected a pair (q_segments, k_segments)"),
    ("segments", (array(3, dtype=int),), TypeError, "got tuple, expected a pair"),
    ("segments", ([0] * 3, array(5, dtype=int)), TypeError, "got list"),
    ("segments", (array(3), array(5, dtype=int)), TypeError, "got dtype float32, expected integers"),
    ("segments", (array(4, dtype=int), array(5, dtype=int)), ValueError, "got shape (4,), expected (3,) or (2, 3)"),
    ("segments", (array(3, dtype=int), array(3, 5, dtype=int)), ValueError, "got shape (3, 5)"),
    ("segments", (array(3, dtype=int) << 40, array(5, dtype=int)), ValueError, "expected them within int32"),
    ("visible_until", [5] * 5, TypeError, "got list"),
    ("visible_until", array(5), TypeError, "got dtype float32, expected integers"),
    ("visible_until", array(5, dtype=bool), TypeError, "got dtype bool, expected integers"),
    ("visible_until", array(4, dtype=int), ValueError, "got shape (4,), expected (5,) or (2, 5)"),
    ("skip_threshold", "0.1", TypeError, "got '0.1', expected a number"),
    ("skip_threshold", None, TypeError, "got None"),
    ("skip_threshold", 1, ValueError, "got 1, expected 0 (off) or a number below 1"),
    ("skip_threshold", 1 - 1e-12, ValueError, "a number below 1"),
    ("skip_threshold", -0.1, ValueError, "got -0.1"),
    ("skip_threshold", NAN, ValueError, "got nan"),
    ("state", array(2, 4, 3, 6), TypeError, "got ndarray, expected a pair (o, lse)"),
    ("state", (array(2, 4, 3, 6),) * 3, TypeError, "got tuple, expected a pair (o, lse)"),
    ("state", ([0.0], array(2, 4, 3)), TypeError, "got list"),
    ("state", (array(2, 4, 3, 6, dtype=int), array(2, 4, 3)), TypeError, "got dtype int64"),
    ("state", (array(2, 4, 3, 6), array(2, 4, 3, dtype=int)), TypeError, "got dtype int64"),
    ("state", (array(2, 4, 3, 8), array(2, 4, 3)), ValueError, "got shape (2, 4, 3, 8), expected (2, 4, 3, 6)"),
    ("state", (array(2, 4, 3, 6), array(2, 4, 3, 1)), ValueError, "got shape (2, 4, 3, 1), expected (2, 4, 3)"),
    ("out", [0.0], TypeError, "got list"),
    ("out", array(2, 4, 3, 8), ValueError, "got shape (2, 4, 3, 8), expected (2, 4, 3, 6)"),
    ("out", array(2, 4, 3, 6, dtype=np.float16), TypeError, "got dtype float16, expected float32"),
    ("out", readonly(array(2, 4, 3, 6)), ValueError, "got a read-only array"),
    ("out", array(2, 4, 3, 12)[..., ::2], ValueError, "expected a contiguous last axis and no"),
    ("out", np.lib.stride_tricks.as_strided(array(2, 4, 3, 6), (2, 4, 3, 6), (0, 72, 24, 4)), ValueError,
     "no repeated memory"),
    ("out", np.lib.stride_tricks.as_strided(array(2, 4, 9, 6), (2, 4, 3, 6), (288, 72, 20, 4)), ValueError,
     "no repeated memory"),
]  # fmt: skip


def refuses(function, argument, error, message):
    with pytest.raises(error) as caught:
        function()
    text = str(caught.value)
    assert re.match(rf"{re.escape(argument)}(\b|:)", text), text
    assert message in text, text


@pytest.mark.parametrize(
    ("argument", "value", "error", "message"), BAD_ATTENTION, ids=lambda x: x if isinstance(x, str) else ""
)
def test_attention_refuses(argument, value, error, message):
    out = np.full((2, 4, 3, 6), 7.0, np.float32)
    arguments = {"q": Q, "k": K, "v": V, "out": out, argument: value}
    refuses(lambda: la.attention(**arguments), argument, error, message)
    assert (out == 7).all()


@pytest.mark.parametrize(
    ("zero", "error", "message"),
    [
        (5, ValueError, "got 5, expected an entry of the table, 0 to 4"),
        (-1, ValueError, "got -1"),
        (1.0, TypeError, "got 1.0, expected an integer"),
    ],
    ids=str,
)
def test_entry_outside_the_table(zero, error, message):
    refuses(
        lambda: la.attention(Q, K, V, relative_bias=array(4, 5), relative_zero=zero), "relative_zero", error, message
    )


@pytest.mark.parametrize(
    ("out", "arrays", "name"),
    [
        (SHARED[:, :, :3], {"q": SHARED[:, :, 2:5]}, "q"),
        (SHARED[:, :, 3:], {"k": SHARED[:, :2, 1:]}, "k"),
        (SHARED[:, :, 3:], {"v": SHARED[:, 1:3, 1:]}, "v"),
        (SHARED[:, :, :3], {"bias": SHARED[0, 0, 2:5, :5]}, "bias"),
        (SHARED[:, :, :3], {"sinks": SHARED[0, 0, 0, :4]}, "sinks"),
        (SHARED[:, :, :3], {"alibi_slopes": SHARED.reshape(-1)[:8].reshape(2, 4)}, "alibi_slopes"),
        (SHARED[:, :, :3], {"scale": SHARED[:, :, :3, 0]}, "scale"),
        (SHARED[:, :, :3], {"relative_bias": SHARED.reshape(-1)[:20].reshape(4, 5)}, "relative_bias"),
        (SHARED[:, :, :3], {"state": (SHARED[:, :, 2:5], array(2, 4, 3))}, "state[0]"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_out_may_not_overlap_an_input(out, arrays, name):
    before = SHARED.copy()
    given = {"q": Q, "k": K, "v": array(2, 2, 5, 8), **arrays, "out": out}
    refuses(lambda: la.attention(**given), "out", ValueError, f"overlaps {name}")
    np.testing.assert_array_equal(SHARED, before)


def test_out_beside_an_input_is_fine():
    buffer = normal(RNG, (2, 8, 3, 8))
    q, out = buffer[0:1], buffer[1:2]
    k, v = array(1, 2, 5, 8), array(1, 2, 5, 8)
    expected = la.attention(q, k, v)
    np.testing.assert_array_equal(la.attention(q, k, v, out=out), expected)


PACKED = {
    "q": array(7, 4, 8), "k": array(9, 2, 8), "v": array(9, 2, 6),
    "cu_seqlens_q": np.array([0, 3, 7]), "cu_seqlens_k": np.array([0, 5, 9]),
}  # fmt: skip

BAD_VARLEN = [
    ("q", array(1, 7, 4, 8), ValueError, "got shape (1, 7, 4, 8), expected rank 3"),
    ("k", array(9, 3, 8), ValueError, "q: got 4 heads, expected a positive multiple of the 3 heads of k"),
    ("v", array(8, 2, 6), ValueError, "got length 8, expected 9 as in k"),
    ("v", array(9, 1, 6), ValueError, "got 1 heads, expected 2 as in k"),
    ("cu_seqlens_q", [0, 3, 7], TypeError, "got list"),
    ("cu_seqlens_q", np.array([0.0, 3.0, 7.0]), TypeError, "got dtype float64, expected integers"),
    ("cu_seqlens_q", np.array([False, True, True]), TypeError, "got dtype bool, expected integers"),
    ("cu_seqlens_q", np.array([[0, 3, 7]]), ValueError, "got shape (1, 3), expected [sequences + 1]"),
    ("cu_seqlens_q", np.array([], int), ValueError, "got shape (0,)"),
    ("cu_seqlens_q", np.array([1, 3, 7]), ValueError, "got bounds from 1 to 7, expected 0 to 7"),
    ("cu_seqlens_q", np.array([0, 3, 8]), ValueError, "got bounds from 0 to 8, expected 0 to 7"),
    (
        "cu_seqlens_k",
        np.array([0, 10, 9]),
        ValueError,
        "got 10, then 9 at 2, expected bounds that never fall",
    ),
    ("cu_seqlens_k", np.array([0, 2**63 + 5, 9], np.uint64), ValueError, "expected bounds that never fall"),
    ("cu_seqlens_k", np.array([0, 2, 5, 9]), ValueError, "got 3 sequences, expected 2 as in cu_seqlens_q"),
    ("alibi_slopes", array(2, 4), ValueError, "got shape (2, 4), expected (4,)"),
    ("scale", array(4, 7), ValueError, "got shape (4, 7), expected (4,), one per query head"),
    ("scale", np.array([1, 1, NAN, 1]), ValueError, "no finite float32"),
    ("relative_bias", array(7, 5), ValueError, "got shape (7, 5), expected (4, n)"),
    ("relative_zero", 0, ValueError, "got 0 without relative_bias"),
    ("skip_threshold", 2.0, ValueError, "got 2.0"),
    ("state", (array(4, 7, 6), array(4, 7)), ValueError, "got shape (4, 7, 6), expected (7, 4, 6)"),
    ("state", (array(7, 4, 6), array(7, 4)), ValueError, "got shape (7, 4), expected (4, 7)"),
    ("sinks", array(5), ValueError, "got shape (5,), expected (4,)"),
    ("window", (-3, 0), ValueError, "got (-3, 0)"),
    ("scale", NAN, ValueError, "got nan"),
    ("softcap", -1, ValueError, "got -1"),
    ("causal", 0, TypeError, "got 0"),
    ("return_lse", 0, TypeError, "got 0"),
    ("out", array(4, 7, 6), ValueError, "got shape (4, 7, 6), expected (7, 4, 6)"),
    ("out", readonly(array(7, 4, 6)), ValueError, "got a read-only array"),
]


@pytest.mark.parametrize(
    ("argument", "value", "error", "message"), BAD_VARLEN, ids=lambda x: x if isinstance(x, str) else ""
)
def test_varlen_refuses(argument, value, error, message):
    out = np.full((7, 4, 6), 7.0, np.float32)
    named = message.split(":")[0] if message.startswith("q:") else argument
    arguments = {**PACKED, "out": out, argument: value}
    refuses(lambda: la.attention_varlen(**arguments), named, error, message)
    assert (out == 7).all()


OUT, LSE = array(2, 3, 4), array(2, 3)

BAD_MERGE = [
    ([], "parts", ValueError, "got none, expected at least one pair"),
    (None, "parts", TypeError, "got NoneType, expected pairs (o, lse)"),
    ([OUT], "parts[0]", TypeError, "got ndarray, expected a pair (o, lse)"),
    ([(OUT, LSE, LSE)], "parts[0]", TypeError, "got tuple, expected a pair"),
    ([(OUT, LSE), (OUT, None)], "parts[1] lse", TypeError, "got NoneType"),
    ([(OUT.astype(np.float64), LSE)], "parts[0] o", TypeError, "got dtype float64"),
    ([(OUT, LSE.astype(int))], "parts[0] lse", TypeError, "got dtype int64, expected a floating dtype"),
    ([(OUT[0], LSE[0])], "parts[0] o", ValueError, "got shape (3, 4), expected [B, H, L, Dv] or [H, L, Dv]"),
    (
        [(OUT, LSE), (OUT[:, :2], LSE[:, :2])],
        "parts[1] o",
        ValueError,
        "got shape (2, 2, 4), expected (2, 3, 4) as in",
    ),
    (
        [(OUT, LSE), (OUT.astype(np.float16), LSE)],
        "parts[1] o",
        TypeError,
        "got dtype float16, expected float32 as in",
    ),
    ([(OUT, LSE[..., None])], "parts[0] lse", ValueError, "got shape (2, 3, 1), expected (2, 3) as in its o"),
]


@pytest.mark.parametrize(
    ("parts", "named", "error", "message"),
    BAD_MERGE,
    ids=[f"{n}-{case[1]}" for n, case in enumerate(BAD_MERGE)],
)
def test_merge_refuses(parts, named, error, message):
    refuses(lambda: la.merge(parts), named, error, message)


@pytest.mark.parametrize("device", [(1, 0), (3, 0)])
def test_other_libraries_arrays_are_borrowed(device):
    q, k, v = qkv(RNG, rows=3, keys=9)
    out = la.attention(*(Here(x, device) for x in (q, k, v)))
    assert type(out) is np.ndarray
    np.testing.assert_array_equal(out, la.attention(q, k, v))


def test_dtypes_that_dlpack_does_not_know():
    q, k, v = qkv(RNG, q_dtype=ml_dtypes.bfloat16)
    refuses(lambda: la.attention(Here(q), k, v), "q", TypeError, "of dtype bfloat16, which numpy cannot borrow")


def test_memory_maps(tmp_path):
    q, k, v = qkv(RNG, rows=3, keys=9)
    np.save(tmp_path / "k.npy", k)
    mapped = np.load(tmp_path / "k.npy", mmap_mode="r")
    out = la.attention(q, mapped, v)
    assert type(out) is np.ndarray
    np.testing.assert_array_equal(out, la.attention(q, k, v))


def test_numbers_of_numpy_are_numbers():
    q, k, v = qkv(RNG, rows=3, keys=9)
    expected = la.attention(q, k, v, scale=0.5, softcap=3.0, causal=True, window=(4, 0))
    given = {
        "scale": np.float32(0.5),
        "softcap": np.float64(3),
        "causal": np.True_,
        "window": [np.int64(4), 0],
    }
    np.testing.assert_array_equal(la.attention(q, k, v, **given), expected)
