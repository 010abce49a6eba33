"""What every memory that learns while it reads is tested for."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

import tolerances
from random_arrays import DTYPES, F32, LAYOUTS, lay


@dataclass(frozen=True)
class Case:
    """A function, its oracle, and how its arguments are made.

    Attributes:
        call: the function.
        reference: its oracle, which returns matrices in place of a state.
        gates: further positional or keyword arguments per row by name, made of uniform numbers.
        options: others, of `dim` and `value_dim` and a generator.
        square: whether values are as wide as keys.
    """

    call: Callable[..., Any]
    reference: Callable[..., Any]
    gates: dict[str, Callable[[Any], Any]]
    options: Callable[..., dict[str, Any]] = field(default=lambda rng, heads, dim, value_dim: {})
    square: bool = False

    def arguments(self, rng, *, batch=1, heads=(2, 2), length=40, dim=8, value_dim=12, dtype=F32, layout="contiguous"):
        """Random arguments by name."""
        value_dim = dim if self.square else value_dim
        shapes = {"q": (heads[0], dim), "k": (heads[1], dim), "v": (heads[1], value_dim)}
        found = {}
        for name, (n, width) in shapes.items():
            x = rng.standard_normal((batch, n, length, width)) / (1 if name == "v" else np.sqrt(width))
            found[name] = lay(x.astype(dtype), layout)
        for name, make in self.gates.items():
            found[name] = make(rng.random((batch, heads[1], length))).astype(F32)
        return {**found, **self.options(rng, heads[1], dim, value_dim)}

    def check(self, arguments, **options):
        """Assert that a call agrees with the oracle, outputs and matrices, and return its results."""
        out, state = self.call(**arguments, **options)
        assert out.dtype == arguments["q"].dtype
        names = list(arguments)
        for i, actual in enumerate((out, *state.weights)):

            def oracle(*values, i=i):
                found, matrices = self.reference(**dict(zip(names, values, strict=True)), **options)
                return matrices[i - 1] if i else found

            expected, allowed = tolerances.perturbed(oracle, tuple(arguments.values()), {}, actual.dtype)
            assert actual.shape == expected.shape
            error = np.abs(actual.astype(np.float64) - expected)
            assert (error <= allowed).all(), f"{(error / allowed).max():.2f} times the error that is allowed"
        return out, state

    def rows(self, arguments, rows):
        """The arguments of some rows."""
        return {name: x[:, :, rows] if name in ("q", "k", "v", *self.gates) else x for name, x in arguments.items()}


class Memory:
    """Tests of a `case`; a module's class inherits them."""

    case: Case

    @pytest.mark.parametrize("length, chunk_size", [(1, 16), (7, 1), (40, 16), (70, 64)])
    def test_reference(self, rng, isa, length, chunk_size):
        self.case.check(self.case.arguments(rng, length=length), chunk_size=chunk_size)

    @pytest.mark.parametrize("dim, value_dim", [(1, 1), (3, 20), (33, 2), (17, 40)])
    def test_dims(self, rng, isa, dim, value_dim):
        self.case.check(self.case.arguments(rng, length=20, dim=dim, value_dim=value_dim), chunk_size=8)

    @pytest.mark.parametrize("chunk_size", [3, 48, 50, 1000])
    def test_chunk_sizes(self, rng, threads, chunk_size):
        self.case.check(self.case.arguments(rng, heads=(1, 1), length=110), chunk_size=chunk_size)

    def test_heads_and_batches(self, rng, isa):
        self.case.check(self.case.arguments(rng, batch=2, heads=(4, 2), length=20))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_dtypes(self, rng, isa, dtype):
        self.case.check(self.case.arguments(rng, heads=(1, 1), length=20, dtype=dtype))

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_layouts(self, rng, layout):
        arguments = self.case.arguments(rng, length=20, layout=layout)
        out, state = self.case.call(**arguments)
        copies = {name: np.ascontiguousarray(x) if name in "qkv" else x for name, x in arguments.items()}
        same, last = self.case.call(**copies)
        np.testing.assert_array_equal(out, same)
        np.testing.assert_array_equal(state.live, last.live)

    @pytest.mark.parametrize("split", [0, 1, 16, 23, 48, 69, 70])
    def test_parts_are_the_whole(self, rng, split):
        arguments = self.case.arguments(rng, length=70)
        out, last = self.case.call(**arguments)
        first, state = self.case.call(**self.case.rows(arguments, slice(0, split)))
        rest = {**self.case.rows(arguments, slice(split, None))}
        rest.pop("weights", None)
        second, state = self.case.call(**rest, initial_state=state)
        np.testing.assert_allclose(np.concatenate([first, second], axis=2), out, rtol=1e-4, atol=2e-5)
        np.testing.assert_allclose(state.live, last.live, rtol=1e-4, atol=2e-5)
        assert state.position == last.position == 70 % 16

    def test_steps_are_the_rows_of_a_prefill(self, rng, isa):
        arguments = self.case.arguments(rng, length=40)
        out, last = self.case.call(**arguments)
        rows, state = [], None
        for t in range(40):
            one = self.case.rows(arguments, slice(t, t + 1))
            if state is not None:
                one.pop("weights", None)
            row, state = self.case.call(**one, initial_state=state)
            rows.append(row)
        np.testing.assert_allclose(np.concatenate(rows, axis=2), out, rtol=1e-4, atol=2e-5)
        np.testing.assert_allclose(state.live, last.live, rtol=1e-4, atol=2e-5)

    def test_states_in_place(self, rng):
        """A state's own arrays or another's receive the next one, and all is as without."""
        arguments = self.case.arguments(rng, length=40)
        cut = [self.case.rows(arguments, slice(*part)) for part in ((0, 20), (20, 21), (21, 32), (32, 40))]
        _, state = self.case.call(**cut[0])
        _, other = self.case.call(**cut[0])
        own = other
        for rows in cut[1:]:
            rows.pop("weights", None)
            expected, state = self.case.call(**rows, initial_state=state)
            out, last = self.case.call(**rows, initial_state=own, out_state=own)
            assert last.live is own.live and last.step is own.step and last.frozen is own.frozen
            np.testing.assert_array_equal(out, expected)
            for name in ("live", "step", "frozen"):
                np.testing.assert_array_equal(getattr(last, name), getattr(state, name))
            assert last.position == state.position
            own = last
        _, first = self.case.call(**cut[0])
        before = first.live.copy()
        _, last = self.case.call(**cut[1], initial_state=first, out_state=own)
        assert last.live is own.live
        np.testing.assert_array_equal(first.live, before)
        np.testing.assert_array_equal(self.case.call(**cut[1], initial_state=first)[1].live, last.live)

    def test_states_that_cannot_receive(self, rng):
        arguments = self.case.arguments(rng, length=20)
        _, state = self.case.call(**arguments)
        before = [x.copy() for x in (state.live, state.frozen)]
        fixed = state.live.copy()
        fixed.flags.writeable = False
        for change, match in (
            ({"live": state.live[..., 1:]}, "out_state: got live"),
            ({"frozen": state.frozen.astype(np.float64)}, "out_state: got frozen float64"),
            ({"live": fixed}, "out_state: got live float32 .*, expected a contiguous, writable"),
            ({"frozen": state.live}, "out_state: got (live|frozen) that shares memory"),
        ):
            with pytest.raises(ValueError, match=match):
                self.case.call(**arguments, out_state=replace(state, **change))
        with pytest.raises(TypeError, match="out_state: got ndarray"):
            self.case.call(**arguments, out_state=state.live)
        for x, y in zip(before, (state.live, state.frozen), strict=True):
            np.testing.assert_array_equal(x, y)

    def test_without_a_batch_and_out(self, rng):
        arguments = self.case.arguments(rng, length=20)
        out, state = self.case.call(**arguments)
        alone = {name: x[0] if name in ("q", "k", "v", *self.case.gates) else x for name, x in arguments.items()}
        to = np.empty_like(out[0])
        single, last = self.case.call(**alone, out=to)
        assert single is to
        np.testing.assert_array_equal(single, out[0])
        np.testing.assert_array_equal(last.live, state.live)

    def test_no_rows(self, rng):
        arguments = self.case.arguments(rng, length=20)
        _, state = self.case.call(**arguments)
        none = self.case.rows(arguments, slice(0, 0))
        none.pop("weights", None)
        out, last = self.case.call(**none, initial_state=state)
        assert out.shape[2] == 0 and last.position == state.position
        np.testing.assert_array_equal(last.live, state.live)

    def test_threads(self, rng, threads):
        arguments = self.case.arguments(rng, batch=3, length=60)
        out, state = self.case.call(**arguments)
        for b in range(3):
            every = {"q", "k", "v", *self.case.gates}
            single = {n: x[b : b + 1] if n in every else x for n, x in arguments.items()}
            alone, last = self.case.call(**single)
            np.testing.assert_array_equal(alone[0], out[b])
            np.testing.assert_array_equal(last.live[0], state.live[b])

    def test_a_row_that_is_not_finite_spoils_none_before_it(self, rng):
        arguments = self.case.arguments(rng, length=60)
        out, _ = self.case.call(**arguments)
        arguments["v"] = arguments["v"].copy()
        arguments["v"][0, 0, 30, 0] = np.nan
        spoilt, _ = self.case.call(**arguments)
        np.testing.assert_allclose(spoilt[:, :, :30], out[:, :, :30], rtol=1e-4, atol=2e-5)
        # Rows of the chunk may read the weights with which it began.
        assert np.isnan(spoilt[0, 0, 32:, 0]).all() and np.isfinite(spoilt[0, 1]).all()

    def test_wrong_arguments(self, rng):
        arguments = self.case.arguments(rng, length=20)
        _, state = self.case.call(**arguments)

        def bad(match, error=ValueError, **changes):
            with pytest.raises(error, match=match):
                self.case.call(**{**arguments, **changes})

        bad("chunk_size: got 0", chunk_size=0)
        bad("chunk_size: got 1.5", TypeError, chunk_size=1.5)
        bad("out: got shape", out=np.empty((1, 1), F32))
        bad("q: got dtype", TypeError, q=arguments["q"].astype(np.int32))
        bad("q: got shape", q=arguments["q"][0, 0])
        bad("q: got 3 heads", q=np.repeat(arguments["q"], 2, axis=1)[:, :3])
        bad("k: got shape", k=arguments["k"][..., :-1])
        bad("v: got shape", v=arguments["v"][:, :, :-1])
        bad("got head_dim 0", v=arguments["v"][..., :0])
        for name in self.case.gates:
            bad(f"{name}: got shape", **{name: arguments[name][..., :-1]})
            for wrong in (np.nan, -0.1, np.inf):
                changed = arguments[name].copy()
                changed[0, 0, 3] = wrong
                bad(f"{name}: got a number outside", **{name: changed})
        rest = {name: x for name, x in arguments.items() if name != "weights"}
        with pytest.raises(ValueError, match="initial_state: got weights"):
            self.case.call(**self.case.rows(rest, slice(0, 5)), initial_state=state, chunk_size=2)
        with pytest.raises(TypeError, match="initial_state: got ndarray"):
            self.case.call(**rest, initial_state=state.live)
