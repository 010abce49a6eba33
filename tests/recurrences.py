"""What every recurrence of `longattn.linear` is tested for."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

import tolerances
from longattn import _core
from random_arrays import DTYPES, F32, LAYOUTS, lay, normal

#: Query heads, key heads and heads of values, which have the states.
HEADS = ((2, 2, 2), (4, 2, 2), (2, 2, 4), (2, 1, 2), (6, 1, 3))


@dataclass(frozen=True)
class Case:
    """A function, its oracle, and how its arguments are made.

    Attributes:
        call: the function.
        reference: its oracle.
        names: names of what stands for queries, keys (`None`: made of gates) and values, in the order of the call.
        gates: shapes of further arguments by name: "row", "channel", "column", "head", "key" (like keys) or "weight"
            (a number per head and channel), and what makes them of uniform numbers.
        keys: what makes keys and queries of normal numbers.
        delta: whether the delta rule bounds errors.
        extra: columns of a state beyond those of values.
        features: rows of a state for a head_dim.
        signed: whether features are positive by themselves, and signs of queries and keys matter.
        heads: whether query heads may outnumber those of keys.
        options: further arguments.
    """

    call: Callable[..., Any]
    reference: Callable[..., Any]
    names: tuple[str, str | None, str] = ("q", "k", "v")
    gates: dict[str, tuple[str, Callable[[Any], Any]]] = field(default_factory=dict)
    keys: Callable[[Any], Any] = lambda x: x
    delta: bool = False
    extra: int = 0
    features: Callable[[int], int] = lambda dim: dim
    signed: bool = False
    heads: bool = True
    options: dict[str, Any] = field(default_factory=dict)

    def arguments(
        self, rng, *, batch=1, heads=(2, 2, 2), length=37, dim=8, value_dim=12, dtype=F32, layout="contiguous"
    ):
        """Random arguments by name."""
        q_heads, k_heads, v_heads = heads
        sizes = zip(self.names, (q_heads, k_heads, v_heads), (dim, dim, value_dim), strict=True)
        found = {}
        for name, n, width in sizes:
            if name is not None:
                x = rng.standard_normal((batch, n, length, width))
                found[name] = lay((x if name == self.names[2] else self.keys(x)).astype(dtype), layout)
        for name, (kind, make) in self.gates.items():
            shape = {
                "head": (v_heads,),
                "weight": (v_heads, dim),
                "row": (batch, v_heads, length),
                "channel": (batch, v_heads, length, dim),
                "column": (batch, v_heads, length, value_dim),
                "key": (batch, k_heads, length, dim),
            }[kind]
            found[name] = make(rng.random(shape)).astype(F32)
        return {**found, **self.options}

    def state(self, rng, arguments, sequences=None):
        """A random state that fits."""
        q, v = (arguments[self.names[i]] for i in (0, 2))
        shape = (sequences or v.shape[0], v.shape[1], self.features(q.shape[-1]), v.shape[-1] + self.extra)
        return np.abs(normal(rng, shape)) if self.extra else normal(rng, shape)

    def sizes(self, arguments, state, **options):
        """Sums of the magnitudes of the terms of outputs and of states."""
        first = 0 if state is None else np.abs(np.asarray(state, np.float64))
        q, k, v = (None if n is None else np.abs(np.asarray(arguments[n], np.float64)) for n in self.names)
        if self.delta:
            # The state is multiplied by matrices that lengthen nothing, and grows by a unit key times a value.
            heads = v.shape[1]
            held = np.linalg.norm(first, axis=-2)[:, :, None] if state is not None else 0
            held = held + np.cumsum(v, axis=-2)
            readers = max(q.shape[1], heads)
            length = np.repeat(np.linalg.norm(q, axis=-1), readers // q.shape[1], axis=1)
            return length[..., None] * np.repeat(held, readers // heads, axis=1), held[:, :, -1:]
        positive = {n: x for n, x in zip(self.names, (q, k, v), strict=True) if n is not None}
        if self.signed:
            positive = {self.names[2]: v}
        given = {**arguments, **positive, **options}
        given |= {n: np.abs(arguments[n]) for n, (kind, _) in self.gates.items() if kind in ("key", "weight")}
        if "skip" in given:
            given["skip"] = np.abs(given["skip"])
        out, last = self.reference(**given, initial_state=None if state is None else first)
        return out * (1 + bool(self.extra)), last

    def check(self, arguments, state=None, **options):
        """Assert that a call agrees with the oracle, and return its results."""
        before = None if state is None else state.copy()
        out, last = self.call(**arguments, initial_state=state, **options)
        plain = {name: x for name, x in options.items() if name == "cu_seqlens"}
        expected, expected_last = self.reference(**arguments, initial_state=before, **plain)
        size, last_size = self.sizes(arguments, before, **plain)
        terms = arguments[self.names[0]].shape[-1] + 2 * out.shape[-2]
        assert out.dtype == arguments[self.names[0]].dtype and last.dtype == np.float32
        assert out.shape == expected.shape and last.shape == expected_last.shape
        tolerances.check_linear(out, expected, size, terms)
        tolerances.check_linear(last, expected_last, last_size, terms)
        return out, last


class Recurrence:
    """Tests of a `case`; a module's class inherits them."""

    case: Case

    def rows(self, arguments, rows):
        """The arguments of some rows."""
        names = [n for n in self.case.names if n is not None]
        found = {name: arguments[name][:, :, rows] for name in names}
        kinds = {name: kind for name, (kind, _) in self.case.gates.items()}
        every = ("head", "weight")
        found |= {n: arguments[n] if kind in every else arguments[n][:, :, rows] for n, kind in kinds.items()}
        return {**arguments, **found}

    @pytest.mark.parametrize("length", [1, 2, 13, 65, 150])
    def test_reference(self, rng, isa, length):
        arguments = self.case.arguments(rng, batch=2, length=length)
        self.case.check(arguments)
        self.case.check(arguments, self.case.state(rng, arguments))

    @pytest.mark.parametrize("chunk_size", [1, 2, 12, 31, 64, 100, 252, 256])
    def test_chunk_sizes(self, rng, chunk_size):
        arguments = self.case.arguments(rng, length=275, dim=5, value_dim=7)
        self.case.check(arguments, self.case.state(rng, arguments), chunk_size=chunk_size)

    @pytest.mark.parametrize("dim, value_dim", [(1, 1), (3, 40), (33, 2), (70, 129)])
    @pytest.mark.parametrize("length", [1, 50])
    def test_dims(self, rng, isa, dim, value_dim, length):
        arguments = self.case.arguments(rng, length=length, dim=dim, value_dim=value_dim)
        self.case.check(arguments, self.case.state(rng, arguments))

    def test_steps_are_the_rows_of_a_prefill(self, rng):
        arguments = self.case.arguments(rng, batch=2, length=20)
        out, last = self.case.call(**arguments)
        state = np.zeros_like(last)
        size, _ = self.case.sizes(arguments, None)
        for t in range(20):
            row, given = self.case.call(**self.rows(arguments, slice(t, t + 1)), initial_state=state, out_state=state)
            assert given is state
            tolerances.check_linear(row, out[:, :, t : t + 1], 2 * size[:, :, t : t + 1], 60)

    @pytest.mark.parametrize("split", [0, 1, 48, 70, 99, 100])
    def test_states_hand_over(self, rng, split):
        arguments = self.case.arguments(rng, length=100)
        out, last = self.case.call(**arguments)
        first, state = self.case.call(**self.rows(arguments, slice(0, split)))
        second, state = self.case.call(**self.rows(arguments, slice(split, None)), initial_state=state)
        size, last_size = self.case.sizes(arguments, None)
        tolerances.check_linear(np.concatenate([first, second], axis=2), out, 2 * size, 200)
        tolerances.check_linear(state, last, 2 * last_size, 200)

    @pytest.mark.parametrize("length", [1, 40])
    @pytest.mark.parametrize("heads", HEADS, ids=str)
    def test_heads(self, rng, heads, length):
        if not self.case.heads:
            heads = (heads[1], heads[1], heads[2])
        if self.case.names[1] is None and heads[0] % heads[2]:
            heads = (heads[2],) * 3
        arguments = self.case.arguments(rng, heads=heads, length=length)
        self.case.check(arguments, self.case.state(rng, arguments))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("length", [1, 60])
    def test_dtypes(self, rng, isa, dtype, length):
        self.case.check(self.case.arguments(rng, length=length, dtype=dtype))

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_layouts(self, rng, layout):
        self.case.check(self.case.arguments(rng, batch=2, length=60, layout=layout))

    def test_without_a_batch(self, rng):
        arguments = self.case.arguments(rng, length=30)
        out, last = self.case.call(**arguments)
        alone = {name: x[0] if getattr(x, "ndim", 0) > 2 else x for name, x in arguments.items()}
        single, state = self.case.call(**alone)
        np.testing.assert_array_equal(single, out[0])
        np.testing.assert_array_equal(state, last[0])

    @pytest.mark.parametrize("bounds", [[0, 30], [0, 0, 1, 50, 51, 130], [0, 1, 2, 3], [0, 64, 64, 128]], ids=str)
    def test_packed_sequences(self, rng, bounds):
        arguments = self.case.arguments(rng, length=bounds[-1])
        state = self.case.state(rng, arguments, len(bounds) - 1)
        out, last = self.case.call(**arguments, initial_state=state, cu_seqlens=np.array(bounds))
        for n, (start, end) in enumerate(pairwise(bounds)):
            part, after = self.case.call(**self.rows(arguments, slice(start, end)), initial_state=state[n : n + 1])
            np.testing.assert_array_equal(out[:, :, start:end], part)
            np.testing.assert_array_equal(last[n : n + 1], after)

    def test_no_rows(self, rng):
        arguments = self.case.arguments(rng, length=0)
        state = self.case.state(rng, arguments)
        out, last = self.case.call(**arguments, initial_state=state)
        assert out.shape[2] == 0
        np.testing.assert_array_equal(last, state)
        _, last = self.case.call(**arguments)
        assert not last.any()

    @pytest.mark.parametrize("length", [1, 70])
    def test_threads_and_columns(self, rng, length):
        """Few heads, so that threads share the columns of a state."""
        arguments = self.case.arguments(rng, heads=(1, 1, 1), length=length, dim=40, value_dim=100)
        state = self.case.state(rng, arguments)
        before, results = _core.num_threads(), []
        for n in (1, 2, 3, 8):
            _core.set_num_threads(n)
            own = state.copy()
            results.append(self.case.call(**arguments, initial_state=own, out_state=own))
        _core.set_num_threads(before)
        for out, last in results[1:]:
            np.testing.assert_array_equal(out, results[0][0])
            np.testing.assert_array_equal(last, results[0][1])

    def test_a_row_that_is_not_finite_spoils_none_before_it(self, rng):
        arguments = self.case.arguments(rng, length=60)
        out, _ = self.case.call(**arguments)
        name = self.case.names[2]
        arguments[name] = arguments[name].copy()
        arguments[name][0, 0, 30, 3] = np.nan
        spoilt, _ = self.case.call(**arguments)
        size, _ = self.case.sizes(self.rows(arguments, slice(0, 30)), None)
        tolerances.check_linear(spoilt[:, :, :30], out[:, :, :30], 2 * size, 120)
        assert np.isnan(spoilt[0, 0, 30:, 3]).all() and np.isfinite(spoilt[0, 1]).all()

    def test_out(self, rng):
        arguments = self.case.arguments(rng, batch=2, length=30)
        out, last = self.case.call(**arguments)
        to, state = np.full_like(out, 7), np.full_like(last, 7)
        given = self.case.call(**arguments, out=to, out_state=state)
        assert given[0] is to and given[1] is state
        np.testing.assert_array_equal(to, out)
        np.testing.assert_array_equal(state, last)

    def test_wrong_arguments(self, rng):
        arguments = self.case.arguments(rng)
        q, _, v = self.case.names
        state = self.case.state(rng, arguments)

        def bad(match, error=ValueError, **changes):
            with pytest.raises(error, match=match):
                self.case.call(**{**arguments, **changes})

        bad("chunk_size: got 0", chunk_size=0)
        bad("chunk_size: got 1.5", TypeError, chunk_size=1.5)
        bad("initial_state: got shape", initial_state=state[:, :, :-1])
        bad("out_state: got shape", out_state=state[:, :1])
        bad("out_state: got dtype", TypeError, out_state=state.astype(np.float64))
        bad("out_state: got an array that overlaps initial_state", initial_state=state, out_state=state[:, ::-1])
        bad("cu_seqlens: got bounds", cu_seqlens=np.array([0, 5]))
        bad("out: got shape", out=np.empty((1, 1, 1, 1), np.float32))
        bad(f"{q}: got dtype", TypeError, **{q: arguments[q].astype(np.int32)})
        bad("got shape|got rank|got length", **{v: arguments[v][:, :, :-1]})
        bad("got head_dim 0|got shape", **{v: arguments[v][..., :0]})
        parameters = inspect.signature(self.case.call).parameters
        public = self.case.call.__module__.startswith("longattn.")
        for name in (*self.case.names, *self.case.gates) if public else ():
            if name is not None and parameters[name].default is inspect.Parameter.empty:
                bad(f"{name}: got None", TypeError, **{name: None})
        for name in self.case.gates:
            bad(f"{name}: got shape", **{name: arguments[name][..., :-1]})
            if self.case.gates[name][0] != "key":
                wrong = arguments[name].copy()
                wrong[(0,) * wrong.ndim] = np.nan
                bad(f"{name}: got", **{name: wrong})
