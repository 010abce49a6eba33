"""`lasp2_linear_attention`, its gradients, and the hybrid's softmax attention."""

import numpy as np
import pytest

import longattn as la
import tolerances
from longattn.linear import lasp2_hybrid_attention, lasp2_linear_attention, lasp2_linear_attention_backward
from longattn.reference import linear as reference
from random_arrays import DTYPES, F32, LAYOUTS, normal, qkv

WORKERS = pytest.mark.parametrize("workers", [1, 2, 5])
CAUSAL = pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])


def positive(x):
    return np.maximum(x, 0) + np.float32(0.1)


def magnitudes(q, k, v, **options):
    """What the output would be, were all terms positive: normalised ones by the true mass."""
    options = {name: x for name, x in options.items() if name in ("causal", "log_decay")}
    return reference.lasp2_linear_attention(*(np.abs(np.asarray(x, np.float64)) for x in (q, k, v)), **options)


def check(q, k, v, **options):
    out, state = lasp2_linear_attention(q, k, v, return_state=True, **options)
    assert out.dtype == q.dtype and out.shape == (*q.shape[:-1], v.shape[-1])
    expected, expected_state = reference.lasp2_linear_attention(q, k, v, return_state=True, **options)
    terms = q.shape[-1] + k.shape[-2]
    tolerances.check_linear(out, expected, magnitudes(q, k, v, **options), terms)
    sums = [np.abs(np.asarray(x, np.float64)) for x in (k, v)]
    tolerances.check_linear(state, expected_state, sums[0].swapaxes(-1, -2) @ sums[1], terms)


def gates(rng, kind, batch, heads, length):
    if kind == "none":
        return None
    shape = {"head": (heads,), "token": (heads, length), "batch": (batch, heads, length)}[kind]
    return -rng.random(shape, np.float32)


@WORKERS
@pytest.mark.parametrize("kind", ["none", "head", "token", "batch"])
@pytest.mark.parametrize("length", [1, 3, 64, 65, 150])
def test_reference(rng, workers, kind, length):
    """Stretches of more and of less than a block, and workers without rows."""
    q, k, v = qkv(rng, batch=2, heads=4, kv_heads=2, rows=length, keys=length, value_dim=12)
    check(q, k, v, workers=workers, log_decay=gates(rng, kind, 2, 2, length))


@WORKERS
@pytest.mark.parametrize("length", [1, 3, 70])
def test_bidirectional(rng, workers, length):
    check(*qkv(rng, batch=2, rows=length, keys=length, value_dim=12), workers=workers, causal=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(rng, dtype):
    check(*qkv(rng, heads=6, kv_heads=2, rows=90, keys=90, q_dtype=dtype), workers=3)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(rng, layout):
    check(*qkv(rng, rows=40, keys=40, layout=layout), workers=3)


@CAUSAL
def test_normalised_features(rng, causal):
    q, k, v = qkv(rng, rows=50, keys=50)
    options = {"workers": 3, "causal": causal, "phi": positive, "normalize": True}
    out = lasp2_linear_attention(q, k, v, **options)
    expected = reference.lasp2_linear_attention(q, k, v, **options)
    mapped = positive(q), positive(k), np.abs(v)
    size = magnitudes(*mapped, causal=causal) / magnitudes(*mapped[:2], np.ones_like(v[..., :1]), causal=causal)
    tolerances.check_linear(out, expected, 2 * size, 70)


def test_strong_decays_do_not_overflow(rng):
    """Decays are differences of logarithms that only fall."""
    q, k, v = qkv(rng, rows=200, keys=200)
    gate = np.full((2, 200), -30, np.float32)
    check(q, k, v, workers=3, log_decay=gate)
    d_out = normal(rng, q.shape)
    for x in lasp2_linear_attention_backward(d_out, q, k, v, workers=3, log_decay=gate):
        assert np.isfinite(x).all()


def test_rank_3_stats_and_torch(rng):
    q, k, v = (x[0] for x in qkv(rng, rows=40, keys=40))
    out, state, stats = lasp2_linear_attention(q, k, v, return_state=True, return_stats=True)
    assert state.shape == (2, 16, 16) and state.dtype == np.float32
    np.testing.assert_array_equal(stats.sent, 3 * (2 * 16 * 16 * 4 + 2 * 4))  # states and decays
    torch = pytest.importorskip("torch")
    tensor = lasp2_linear_attention(*(torch.from_numpy(x) for x in (q, k, v)))
    np.testing.assert_array_equal(tensor.numpy(), out)


def test_the_same_bits_in_every_run(rng):
    q, k, v = qkv(rng, rows=90, keys=90)
    one = lasp2_linear_attention(q, k, v)
    for _ in range(3):
        np.testing.assert_array_equal(lasp2_linear_attention(q, k, v), one)


# Identities


@CAUSAL
def test_workers_do_not_matter(rng, causal):
    q, k, v = qkv(rng, rows=150, keys=150)
    mask = np.tri(150) if causal else np.ones((150, 150))
    k2, v2 = (np.repeat(x, 2, axis=1).astype(np.float64) for x in (k, v))
    quadratic = ((q.astype(np.float64) @ k2.swapaxes(-1, -2)) * mask) @ v2
    for workers in (1, 2, 3, 7, 150):
        out = lasp2_linear_attention(q, k, v, workers=workers, causal=causal)
        tolerances.check_linear(out, quadratic, magnitudes(q, k, v, causal=causal), 170)


@WORKERS
def test_a_decay_of_1_is_the_plain_form(rng, workers):
    q, k, v = qkv(rng, rows=90, keys=90)
    plain = lasp2_linear_attention(q, k, v, workers=workers)
    np.testing.assert_array_equal(
        lasp2_linear_attention(q, k, v, workers=workers, log_decay=np.zeros(2, np.float32)), plain
    )


@CAUSAL
@pytest.mark.parametrize("workers", [1, 3, 50])
def test_the_hybrid_is_softmax_attention(rng, isa, causal, workers):
    q, k, v = qkv(rng, batch=2, heads=6, kv_heads=2, rows=40, keys=40)
    options = {"workers": workers, "causal": causal}
    out, lse, stats = lasp2_hybrid_attention(q, k, v, return_lse=True, return_stats=True, **options)
    expected, expected_lse = la.attention(q, k, v, causal=causal, return_lse=True)
    tolerances.same_storage(q, k, v).check(out, expected, lse, expected_lse)
    assert stats.sent.sum() == (workers - 1) * (k.nbytes + v.nbytes)


@pytest.mark.parametrize("normalize", [False, True])
def test_steps_are_the_whole(rng, normalize):
    q, k, v = (x[0] for x in qkv(rng, rows=30, keys=30, value_dim=12))
    gate = gates(rng, "token", 1, 2, 30)
    options = {"phi": positive, "normalize": normalize}
    whole, last = lasp2_linear_attention(q, k, v, log_decay=gate, return_state=True, **options)
    state, steps = None, []
    for rows in (slice(0, 11), *(slice(n, n + 1) for n in range(11, 30))):
        part, state = lasp2_linear_attention(
            q[:, rows], k[:, rows], v[:, rows], workers=1, log_decay=gate[:, rows], state=state, return_state=True,
            **options,
        )  # fmt: skip
        steps.append(part)
    mapped = positive(q), positive(k)
    size = magnitudes(*mapped, v, log_decay=gate)
    if normalize:
        size = 2 * size / magnitudes(*mapped, np.ones_like(v[..., :1]), log_decay=gate)
    tolerances.check_linear(np.concatenate(steps, axis=1), whole.astype(np.float64), 2 * size, 50)
    values = np.concatenate([v, np.ones((2, 30, 1), F32)], axis=-1) if normalize else v
    tolerances.check_linear(state, last.astype(np.float64), 2 * positive(k).swapaxes(-1, -2) @ np.abs(values), 50)


@WORKERS
@pytest.mark.parametrize(("causal", "kind"), [(False, "none"), (True, "none"), (True, "token")])
@pytest.mark.parametrize("length", [3, 90])
def test_gradients(rng, workers, causal, kind, length):
    q, k, v = qkv(rng, batch=2, heads=4, kv_heads=2, rows=length, keys=length, value_dim=12)
    d_out = normal(rng, (2, 4, length, 12))
    options = {"causal": causal, "log_decay": gates(rng, kind, 2, 2, length)}
    gradients = lasp2_linear_attention_backward(d_out, q, k, v, workers=workers, **options)
    exact = reference.lasp2_linear_attention_backward(d_out, q, k, v, **options)
    sizes = reference.lasp2_linear_attention_backward(*(np.abs(x) for x in (d_out, q, k, v)), **options)
    for ours, expected, size in zip(gradients, exact, sizes, strict=True):
        tolerances.check_linear(ours, expected, size, 2 * length + 16)


# Bad input


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"workers": 0}, ValueError, r"workers: got 0"),
        ({"log_decay": np.zeros(3, F32)}, ValueError, r"log_decay: got shape \(3,\), expected \(2,\)"),
        ({"log_decay": np.ones(2, F32)}, ValueError, r"log_decay: got numbers above 0 or not finite"),
        ({"log_decay": np.full(2, -np.inf, F32)}, ValueError, r"log_decay: got numbers above 0 or not finite"),
        ({"log_decay": np.zeros(2, F32), "causal": False}, ValueError, r"log_decay: got decays with causal=False"),
        ({"state": np.zeros((1, 2, 16, 15), F32)}, ValueError, r"state: got shape \(1, 2, 16, 15\)"),
        ({"state": np.zeros((1, 2, 16, 16), F32), "causal": False}, ValueError, r"state: got one with causal=False"),
        ({"phi": lambda x: x[..., :5, :]}, ValueError, r"phi: got float32"),
        ({"normalize": 1}, TypeError, r"normalize: got 1"),
        ({"q": np.zeros((1, 4, 29, 16), F32)}, ValueError, r"k: got length 30, expected 29 as in q"),
    ],
)
def test_bad_arguments(rng, change, error, message):
    q, k, v = qkv(rng, rows=30, keys=30)
    with pytest.raises(error, match=message):
        lasp2_linear_attention(**({"q": q, "k": k, "v": v} | change))


def test_bad_arguments_of_the_others(rng):
    q, k, v = qkv(rng, rows=30, keys=30)
    with pytest.raises(ValueError, match=r"d_out: got shape \(1, 4, 30, 8\), expected \(1, 4, 30, 16\)"):
        lasp2_linear_attention_backward(q[..., :8], q, k, v)
    with pytest.raises(ValueError, match=r"k: got length 30, expected 20 as in q"):
        lasp2_hybrid_attention(q[:, :, :20], k, v)
    with pytest.raises(ValueError, match=r"workers: got -1"):
        lasp2_hybrid_attention(q, k, v, workers=-1)
