"""`asymmetric_mixed_attention`: templates and a search region."""

import numpy as np
import pytest

import longattn as la
import tolerances
from longattn.vision import asymmetric_mixed_attention
from longattn.vision.asymmetric_mixed_attention import METHOD
from random_arrays import DTYPES, F32, normal
from vision_checks import cast, close, raises, weights


def arguments(rng, c=12, bias=True):
    search, templates = normal(rng, (2, 5, 6, c)), [normal(rng, (2, 4, 4, c)), normal(rng, (2, 3, 3, c))]
    kernels = tuple(normal(rng, (3, 3, c)) / 3 for _ in range(3))
    return search, templates, kernels, *(weights(rng, c, c, bias) for _ in range(3))


def agree(given, options, dtype=F32):
    outs, out, _ = METHOD.function(*given, **options)
    for n, found in enumerate([*outs, *([] if out is None else [out])]):

        def one(*a, n=n, **o):
            parts = METHOD.reference(*a, **o)
            return [*parts[0], *([] if parts[1] is None else [parts[1]])][n]

        assert found.dtype == dtype
        close(found, *tolerances.perturbed(one, given, options, dtype))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
def test_reference(rng, isa, symmetric, stride):
    agree(
        arguments(rng),
        {"heads": 3, "symmetric": symmetric, "stride": stride, "wo": weights(rng, 12, 5, True), "scale": 0.3},
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(rng, dtype):
    agree(cast(arguments(rng), dtype), {"heads": 3}, dtype)


def test_tensors(rng):
    torch = pytest.importorskip("torch")
    search, templates, *rest = arguments(rng)
    outs, out, _ = asymmetric_mixed_attention(search, templates, *rest, heads=3)
    tensors = asymmetric_mixed_attention(
        torch.from_numpy(search), [torch.from_numpy(t) for t in templates], *rest, heads=3
    )
    np.testing.assert_array_equal(tensors[1].numpy(), out)
    np.testing.assert_array_equal(tensors[0][1].numpy(), outs[1])


def test_the_cache(rng, threads):
    search, templates, *rest = arguments(rng)
    _, out, cache = asymmetric_mixed_attention(search, templates, *rest, heads=3)
    none, again, same_cache = asymmetric_mixed_attention(search, [], *rest, heads=3, cache=cache)
    np.testing.assert_array_equal(again, out)
    assert none == [] and all((a == b).all() for a, b in zip(cache, same_cache, strict=True))


def test_templates_only(rng):
    _, templates, *rest = arguments(rng)
    outs, out, _ = asymmetric_mixed_attention(None, templates, *rest, heads=3)
    assert out is None
    with_search, _, _ = asymmetric_mixed_attention(arguments(rng)[0], templates, *rest, heads=3)
    for a, b in zip(outs, with_search, strict=True):
        np.testing.assert_array_equal(a, b)


def test_symmetric_is_attention_of_all(rng):
    search, templates, _, wq, wk, wv = arguments(rng, bias=False)
    delta = np.zeros((3, 3, 12), F32)
    delta[1, 1] = 1
    outs, out, _ = asymmetric_mixed_attention(
        search, templates, (delta,) * 3, wq, wk, wv, heads=3, symmetric=True, stride=1
    )
    rows = np.concatenate([x.reshape(2, -1, 12) for x in (*templates, search)], axis=1)
    expected = la.attention(*((rows @ w).reshape(2, -1, 3, 4).swapaxes(1, 2) for w in (wq, wk, wv))).swapaxes(1, 2)
    found = np.concatenate([x.reshape(2, -1, 12) for x in (*outs, out)], axis=1)
    np.testing.assert_allclose(found, expected.reshape(found.shape), atol=1e-5)


def test_asymmetric_is_a_mask_of_blocks(rng):
    search, templates, _, wq, wk, wv = arguments(rng, bias=False)
    delta = np.zeros((3, 3, 12), F32)
    delta[1, 1] = 1
    outs, out, _ = asymmetric_mixed_attention(search, templates, (delta,) * 3, wq, wk, wv, heads=3, stride=1)
    rows = np.concatenate([x.reshape(2, -1, 12) for x in (*templates, search)], axis=1)
    late = np.arange(55) >= 25
    q, k, v = ((rows @ w).reshape(2, -1, 3, 4).swapaxes(1, 2) for w in (wq, wk, wv))
    expected = la.attention(q, k, v, mask=late[:, None] | ~late[None]).swapaxes(1, 2)
    found = np.concatenate([x.reshape(2, -1, 12) for x in (*outs, out)], axis=1)
    np.testing.assert_allclose(found, expected.reshape(found.shape), atol=1e-5)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"templates": [], "search": None}, ValueError, r"templates: got none and no search region"),
        ({"kernels": (np.zeros((2, 2, 12)),) * 3}, ValueError, r"kernels: got shapes"),
        ({"kernels": 1}, TypeError, r"kernels: got int"),
        ({"search": np.zeros((1, 5, 6, 12), F32)}, ValueError, r"templates: got shape \(1, 5, 6, 12\)"),
        ({"cache": (np.zeros((2, 4, 12)), np.zeros((2, 4, 12)))}, ValueError, r"cache: got one with templates"),
        (
            {"templates": [], "cache": (np.zeros((2, 4, 12)), np.zeros((2, 5, 12)))},
            ValueError,
            r"cache values: got shape",
        ),
        ({"stride": 0}, ValueError, r"stride: got 0"),
    ],
)
def test_bad_arguments(rng, change, error, message):
    names = ("search", "templates", "kernels", "wq", "wk", "wv")
    raises(METHOD, error, message, dict(zip(names, arguments(rng), strict=True)) | {"heads": 3}, **change)
