"""Sign codes on a GPU: equal to numpy's, bit by bit and row by row."""

import numpy as np
import pytest

from emu.device import EmulatorDevice
from gpu.conftest import get, put
from longattn import gpu
from longattn.reference import dense as reference
from random_arrays import BF16, DTYPES, F32


def numpy_codes(x, weights):
    """Codes of float64 products, and the products."""
    products = np.einsum("bhnd,hdt->bhnt", x.astype(np.float64), weights.astype(np.float64))
    bits = (products > 0).reshape(*x.shape[:3], -1, 32)
    words = (bits * (1 << np.arange(32, dtype=np.uint64))).sum(-1).astype(np.uint32)
    return words.view(np.int32), products


def numpy_topk(queries, codes, k):
    differ = np.bitwise_count((queries[:, :, :, None] ^ codes[:, :, None]).view(np.uint32)).sum((2, 4), dtype=np.int64)
    return np.sort(np.argsort(differ, axis=-1, kind="stable")[..., :k], axis=-1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("dim", "bits"), [(64, 32), (128, 128), (64, 256), (256, 64)])
def test_codes_are_signs_of_products(rng, device, dtype, dim, bits):
    x = rng.standard_normal((2, 3, 21, dim)).astype(dtype)
    weights = rng.standard_normal((3, dim, bits)).astype(np.float32)
    codes = get(gpu.hash_encode(put(device, x), put(device, weights), device=device))
    expected, products = numpy_codes(x, weights)
    wrong = np.unpackbits((codes ^ expected).view(np.uint8), axis=-1, bitorder="little").reshape(products.shape)
    assert codes.shape == (2, 3, 21, bits // 32)
    assert not (wrong & (np.abs(products) > 1e-4)).any()


@pytest.mark.parametrize("words", [1, 2, 4, 8])
@pytest.mark.parametrize(("rows", "k"), [(1, 1), (300, 1), (300, 17), (300, 300), (4500, 100)])
def test_rows_are_those_of_a_stable_sort(rng, device, words, rows, k):
    """Few distinct codes, so that most scores are ties."""
    queries = rng.integers(0, 4, (2, 2, 4, words)).astype(np.int32)
    codes = rng.integers(0, 4, (2, 2, rows, words)).astype(np.int32)
    chosen = get(gpu.hash_topk(put(device, queries), put(device, codes), k, device=device))
    np.testing.assert_array_equal(chosen, numpy_topk(queries, codes, k))


@pytest.mark.parametrize("group", [1, 3, 8])
def test_random_codes_and_strides(rng, device, group):
    queries, codes = (
        rng.integers(-(2**31), 2**31, (2, 2, n, 4), dtype=np.int64).astype(np.int32) for n in (group, 5000)
    )
    longer = put(device, codes)[:, :, :3001]
    chosen = get(gpu.hash_topk(put(device, queries), longer, 64, device=device))
    np.testing.assert_array_equal(chosen, numpy_topk(queries, codes[:, :, :3001], 64))


def test_a_decode_step_by_codes(rng, device):
    """Encode, choose, attend to what was chosen: attention over those rows."""
    q, k, v = (rng.standard_normal(shape).astype(BF16) for shape in ((1, 8, 1, 64), (1, 2, 500, 64), (1, 2, 500, 64)))
    weights = rng.standard_normal((2, 64, 128)).astype(np.float32)
    keys, values, matrix = (put(device, x) for x in (k, v, weights))
    asked = gpu.hash_encode(put(device, q.reshape(1, 2, 4, 64)), matrix, device=device)
    rows = gpu.hash_topk(asked, gpu.hash_encode(keys, matrix, device=device), 40, device=device)
    out = get(gpu.index_sparse_attention(put(device, q), keys, values, rows, device=device))
    chosen = [np.take_along_axis(x, get(rows)[..., None], axis=2) for x in (k, v)]
    expected = reference.attention(q, *chosen)
    np.testing.assert_allclose(out.astype(np.float64), expected, atol=2.0**-7)


def test_bad_input(rng):
    device = EmulatorDevice()
    x, weights = rng.standard_normal((1, 2, 5, 64)).astype(F32), np.zeros((2, 64, 32), np.float32)
    codes = gpu.hash_encode(x, weights, device=device)
    for wrong, message in (
        (weights[:, :, :31], "31 bits"),
        (weights[:1], "weights: got"),
        (weights.astype(np.float16), "weights: got float16"),
    ):
        with pytest.raises(ValueError, match=message):
            gpu.hash_encode(x, wrong, device=device)
    for k in (0, 6):
        with pytest.raises(ValueError, match=f"k: got {k}"):
            gpu.hash_topk(codes, codes, k, device=device)
    with pytest.raises(ValueError, match="queries: got shape"):
        gpu.hash_topk(codes[:, :1], codes, 2, device=device)
    with pytest.raises(ValueError, match="codes: got float32"):
        gpu.hash_topk(codes, x, 2, device=device)
    with pytest.raises(ValueError, match="9600 bits in a group"):
        gpu.hash_topk(np.zeros((1, 2, 300, 1), np.int32), codes, 2, device=device)
