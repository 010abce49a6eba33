"""`reverse_attention_gate` and `tri_plane_scan`."""

import numpy as np
import pytest

import tolerances
from longattn.linear import reverse_attention_gate, tri_plane_scan
from longattn.reference import linear as reference
from random_arrays import DTYPES, F32, normal
from random_layers import mamba

check = tolerances.check_layer


@pytest.mark.parametrize(("size", "coarse"), [((7,), (3,)), ((4, 6), (4, 6)), ((4, 6), (9, 2)), ((3, 4, 5), (2, 2, 2))])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reference(rng, isa, size, coarse, dtype):
    f, logits = normal(rng, (2, *size, 5), dtype), normal(rng, (2, *coarse, 1), dtype)
    options = {"weight": normal(rng, (5, 4), spread=0.4), "residual": normal(rng, (2, *size, 4))}
    for given in ({}, options):
        gated, m = reverse_attention_gate(f, logits, **given)
        expected, resized = reference.reverse_attention_gate(f, logits, **given)
        assert gated.dtype == dtype and m.dtype == F32
        check(gated, expected)
        check(m, resized)


def test_resizing_is_that_of_torch(rng):
    torch = pytest.importorskip("torch")
    f, logits = normal(rng, (2, 7, 5, 9, 3)), normal(rng, (2, 3, 6, 4))
    wanted = torch.nn.functional.interpolate(torch.from_numpy(logits)[:, None], (7, 5, 9), mode="trilinear")
    check(reverse_attention_gate(f, logits)[1], wanted[:, 0, ..., None].numpy().astype(np.float64))


def test_logits_of_minus_infinity_leave_the_features(rng, isa):
    f = normal(rng, (2, 4, 6, 5))
    np.testing.assert_array_equal(reverse_attention_gate(f, np.full((2, 4, 6), -np.inf, F32))[0], f)


def test_logits_of_infinity_leave_nothing(rng, isa):
    f = normal(rng, (2, 4, 6, 5))
    np.testing.assert_allclose(reverse_attention_gate(f, np.full((2, 4, 6), np.inf, F32))[0], 0, atol=1e-37)


@pytest.mark.parametrize("reverse", [False, True])
def test_identity_scans_add_up(rng, reverse):
    f = normal(rng, (2, 3, 4, 5, 6))
    np.testing.assert_allclose(tri_plane_scan(f, lambda rows: rows, reverse=reverse), (6 if reverse else 3) * f, 1e-6)


def test_scans_of_every_plane(rng):
    f = normal(rng, (1, 3, 4, 5, 6))
    weights = [mamba(rng) for _ in range(6)]
    expected = np.zeros(f.shape)
    for i, plane in enumerate(((0, 1, 2), (1, 0, 2), (2, 0, 1))):
        laid = f.transpose(0, *(axis + 1 for axis in plane), 4)
        rows = laid.reshape(1, 60, 6)
        y = reference.mamba_mixer(rows, weights[2 * i])
        y = y + reference.mamba_mixer(rows[:, ::-1], weights[2 * i + 1])[:, ::-1]
        back = np.argsort(plane)
        expected += y.reshape(laid.shape).transpose(0, *(axis + 1 for axis in back), 4)
    check(tri_plane_scan(f, weights), expected, depth=4)
    one = tri_plane_scan(f, weights[0], planes=((0, 1, 2),), reverse=False)
    check(one.reshape(1, 60, 6), reference.mamba_mixer(f.reshape(1, 60, 6), weights[0]))


def test_bad_gates(rng):
    f, logits = normal(rng, (2, 4, 6, 5)), normal(rng, (2, 4, 6))
    for arguments, options, message in (
        ((f[0, 0], logits), {}, r"f: got shape \(6, 5\)"),
        ((f, logits[0]), {}, "logits: got shape"),
        ((f, logits[:1]), {}, "logits: got shape"),
        ((f, logits[:, :0]), {}, "logits: got shape"),
        ((f, logits), {"weight": f[0, 0, :3]}, "weight: got shape"),
        ((f, logits), {"residual": f[:, 1:]}, "residual: got shape"),
    ):
        with pytest.raises(ValueError, match=message):
            reverse_attention_gate(*arguments, **options)


def test_bad_volumes(rng):
    f = normal(rng, (1, 3, 4, 5, 6))
    for arguments, options, message in (
        ((f[0], mamba(rng)), {}, r"f: got shape \(3, 4, 5, 6\)"),
        ((f, [mamba(rng)]), {}, "mixer: got 1 weights, expected 6"),
        ((f, lambda rows: rows[:, 1:]), {}, "mixer: got rows"),
        ((f, mamba(rng, out=7)), {}, "mixer: got rows"),
        ((f, mamba(rng)), {"planes": ((0, 1, 1),)}, "planes: got"),
    ):
        with pytest.raises(ValueError, match=message):
            tri_plane_scan(*arguments, **options)
