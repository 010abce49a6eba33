"""What the tests of vision methods share: comparison with the reference, in each dtype, and as tensors."""

import numpy as np
import pytest

import tolerances
from random_arrays import BF16, DTYPES, F32
from running import on_threads


def close(actual, expected, allowed):
    """Assert that a result has the expected shape and lies within what is allowed, element by element."""
    assert actual.shape == expected.shape
    error = np.abs(np.asarray(actual, np.float64) - expected)
    assert np.isfinite(np.asarray(actual, np.float64)).all()
    allowed = np.broadcast_to(allowed, error.shape)
    assert (error <= allowed).all(), f"{(error / allowed).max():.2f} times the error that is allowed"


def check(method, *arguments, terms=64, **options):
    """The result of a method, after comparing it with its reference."""
    out = method.function(*arguments, **options)
    assert out.dtype == arguments[0].dtype
    close(out, *tolerances.perturbed(method.reference, arguments, options, out.dtype, terms))
    return out


def same(method, actual, expected, *arguments, terms=64, **options):
    """Assert that two results of ours agree as far as the arguments of one of them allow."""
    _, allowed = tolerances.perturbed(method.reference, arguments, options, np.asarray(actual).dtype, terms)
    close(np.asarray(actual), np.asarray(expected, np.float64), 2 * allowed)


def cast(x, dtype):
    """Floats of arguments in another dtype, also inside tuples and dicts."""
    if isinstance(x, np.ndarray) and x.dtype == F32:
        return x.astype(dtype)
    if isinstance(x, tuple | list):
        return type(x)(cast(one, dtype) for one in x)
    if isinstance(x, dict):
        return {name: cast(one, dtype) for name, one in x.items()}
    return x


def tensors(x, torch):
    """Float32 arrays as tensors."""
    if isinstance(x, np.ndarray) and x.dtype == F32:
        return torch.from_numpy(np.ascontiguousarray(x))
    if isinstance(x, tuple | list):
        return type(x)(tensors(one, torch) for one in x)
    if isinstance(x, dict):
        return {name: tensors(one, torch) for name, one in x.items()}
    return x


def check_kinds(method, *arguments, terms=64, **options):
    """The method in each dtype, from strided memory, as tensors, and on two threads."""
    out = method.function(*arguments, **options)
    for dtype in DTYPES:
        check(method, *cast(arguments, dtype), terms=terms, **cast(options, dtype))
    strided = np.repeat(arguments[0], 2, axis=-1)[..., ::2]
    np.testing.assert_array_equal(method.function(strided, *arguments[1:], **options), out)
    for other in on_threads(lambda: method.function(*arguments, **options), (1, 2)):
        np.testing.assert_array_equal(other, out)
    torch = pytest.importorskip("torch")
    result = method.function(*tensors(arguments, torch), **tensors(options, torch))
    assert isinstance(result, torch.Tensor)
    np.testing.assert_array_equal(result.numpy(), out)
    halves = cast((arguments, options), BF16)
    wide = cast(halves[0][0], F32) if halves[0][0].dtype == F32 else np.asarray(halves[0][0], np.float32)
    result = method.function(
        torch.from_numpy(wide).bfloat16(), *tensors(arguments[1:], torch), **tensors(options, torch)
    )
    assert result.dtype == torch.bfloat16 and result.shape == out.shape


def weights(rng, inputs, outputs, bias=False):
    """A projection that keeps the size of numbers; with a bias, a pair."""
    matrix = (rng.standard_normal((inputs, outputs)) / np.sqrt(inputs)).astype(F32)
    return (matrix, (0.3 * rng.standard_normal(outputs)).astype(F32)) if bias else matrix


def raises(method, error, message, arguments, **change):
    """Assert that a change of the arguments is refused with this message."""
    with pytest.raises(error, match=message):
        method.function(**(arguments | change))
