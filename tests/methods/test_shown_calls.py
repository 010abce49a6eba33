"""The calls that docstrings show, with arrays laid out otherwise and with arguments that are no good."""

import doctest
import importlib
import inspect
import re
import warnings

import numpy as np
import pytest

from longattn import catalogue
from longattn.methods import methods

#: What an error says: the argument, what came and what was expected.
WORDS = re.compile(r"^[\w .\[\]',]+: .*(got|no parameter).*|.*: got .*", re.DOTALL)

#: Array arguments that may also be lists, and what passes on what it is given without a look at its numbers.
LISTS = {"rows", "top", "tokens", "emitted", "relevance", "index", "heads"}


def shown(method):
    """The first call of the method's function in its example: a function and its bound arguments."""
    if inspect.isclass(method.function):
        return None
    examples = doctest.DocTestParser().get_examples(inspect.getdoc(method.function) or "")
    home, name = catalogue.public_path(method.function).rsplit(".", 1)
    package, calls = importlib.import_module(home), []

    def record(*args, **kwargs):
        calls.append(inspect.signature(method.function).bind(*args, **kwargs))
        return method.function(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(package, name, record)
        scope = {}
        for example in examples:
            exec(example.source, scope)
            if calls:
                return calls[0]
    return None


CALLS = {method.name: call for method in methods() if (call := shown(method)) is not None}


def with_changed(call, changed):
    arguments = {
        name: x.copy() if isinstance(x, np.ndarray) else x for name, x in call.arguments.items() if name not in changed
    }
    bound = inspect.BoundArguments(call.signature, arguments | changed)
    bound.arguments = {name: bound.arguments[name] for name in call.signature.parameters if name in bound.arguments}
    return bound


def outcome(method, bound):
    """The result, or an error's words."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        try:
            return method.function(*bound.args, **bound.kwargs), None
        except (TypeError, ValueError) as error:
            return None, str(error)


of_methods = pytest.mark.parametrize(
    "method", [method for method in methods() if method.name in CALLS], ids=lambda method: method.name
)


def test_more_than_half_of_the_methods_show_a_call():
    assert len(CALLS) > 0.5 * len(methods())


@of_methods
def test_what_is_no_array_is_refused(method):
    call, bad = CALLS[method.name], []
    for name, x in call.arguments.items():
        if not isinstance(x, np.ndarray):
            continue
        others = {
            "a list": x.tolist(),
            "objects": x.astype(object),
            "complex numbers": x.astype(np.complex64),
            "text": np.full(x.shape, "a"),
            "a word": "words",
            "no axes": np.zeros((), x.dtype),
        }
        if name in LISTS:
            del others["a list"]
        for kind, other in others.items():
            _, words = outcome(method, with_changed(call, {name: other}))
            if words is None or not WORDS.match(words):
                bad.append((name, kind, words))
    assert bad == []


@of_methods
def test_what_is_no_number_is_refused(method):
    call, bad = CALLS[method.name], []
    for name, x in call.arguments.items():
        if isinstance(x, bool) or not isinstance(x, int | float):
            continue
        for other in ("words", 1j, True, float("nan"), object(), np.zeros(3, complex)):
            _, words = outcome(method, with_changed(call, {name: other}))
            if words is None or not WORDS.match(words):
                bad.append((name, other, words))
    assert bad == []


def numbers(result):
    """Every array of a result."""
    if isinstance(result, tuple | list):
        return [x for part in result for x in numbers(part)]
    return [result] if isinstance(result, np.ndarray) else []


def backwards(x):
    every = (slice(None, None, -1),) * x.ndim
    return x[every].copy()[every]


def spread(x):
    wide = np.full((*(2 * n for n in x.shape[:-1]), x.shape[-1] + 3), 7, x.dtype)
    rows = (*(slice(None, None, 2),) * (x.ndim - 1), slice(x.shape[-1]))
    wide[rows] = x
    return wide[rows]


def locked(x):
    y = x.copy()
    y.flags.writeable = False
    return y


LAYOUTS = {"column by column": np.asfortranarray, "backwards": backwards, "spread": spread, "read-only": locked}


@of_methods
def test_layouts_do_not_matter(method):
    """A product of matrices in numpy may round in another order, hence not the same bits."""
    call = CALLS[method.name]
    plain = numbers(outcome(method, call)[0])
    for layout, laid in LAYOUTS.items():
        others = {name: laid(x) for name, x in call.arguments.items() if isinstance(x, np.ndarray) and x.ndim}
        result, words = outcome(method, with_changed(call, others))
        assert words is None, layout
        for found, wanted in zip(numbers(result), plain, strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5, err_msg=layout)


@of_methods
def test_a_batch_of_none(method):
    """It gives nothing, or is refused by name."""
    call = CALLS[method.name]
    first = next((x for x in call.arguments.values() if isinstance(x, np.ndarray)), None)
    if first is None or first.ndim < 3:
        pytest.skip("no batch")
    n = len(first)
    cut = {
        name: x[:0] for name, x in call.arguments.items() if isinstance(x, np.ndarray) and x.ndim > 1 and len(x) == n
    }
    result, words = outcome(method, with_changed(call, cut))
    assert words is not None or result is not None
    assert words is None or WORDS.match(words), words
