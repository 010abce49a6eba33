"""Synthetic vectors: shapes, seeds, and the properties that make them hard."""

import numpy as np
import pytest

from longattn import vectors
from longattn.vectors import synthetic

LENGTH = 8192


def top_mass(data, share):
    """Softmax mass of the best `share` of the keys, `[groups, Hq]`."""
    mass = np.empty(data.queries.shape[:2])
    for h in range(data.query_heads):
        logits = data.queries[:, h] @ data.keys[h // data.group].T * data.head_dim**-0.5
        weights = np.exp(logits - logits.max(1, keepdims=True))
        weights /= weights.sum(1, keepdims=True)
        mass[:, h] = np.sort(weights, 1)[:, -round(share * len(data)) :].sum(1)
    return mass


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.mark.parametrize("name", synthetic.NAMES)
def test_shapes_and_dtypes(name):
    data = vectors.load(name, length=777, groups=3, heads=["0", "5"])
    assert data.name == name and data.heads == ("0", "5")
    assert (data.kv_heads, data.query_heads, data.group, data.head_dim, len(data)) == (2, 8, 4, 128, 777)
    assert data.keys.shape == data.values.shape == (2, 777, 128)
    assert data.queries.shape == (3, 8, 128)
    assert data.prefill_queries.shape == (512, 8, 128)
    arrays = (data.keys, data.values, data.queries, data.prefill_queries)
    assert all(array.dtype == np.float32 and np.isfinite(array).all() for array in arrays)


@pytest.mark.parametrize("name", synthetic.NAMES)
def test_a_head_depends_on_its_name_and_the_seed_alone(name):
    alone = vectors.load(name, length=300, groups=2, heads=["3"])
    among = vectors.load(name, length=300, groups=2, heads=["1", "3"])
    for array in ("keys", "values"):
        np.testing.assert_array_equal(getattr(alone, array)[0], getattr(among, array)[1])
    np.testing.assert_array_equal(alone.queries, among.queries[:, 4:])
    other = vectors.load(name, length=300, groups=2, heads=["3"], seed=1)
    assert not np.array_equal(alone.keys, other.keys)
    assert not np.array_equal(among.keys[0], among.keys[1])


@pytest.mark.parametrize("name", synthetic.NAMES)
def test_queries_are_out_of_the_keys_distribution(name):
    data = vectors.load(name, length=LENGTH, groups=50, heads=["0", "1", "2"])
    for h in range(data.kv_heads):
        keys, queries = data.keys[h], data.queries[:, 4 * h : 4 * h + 4].reshape(-1, 128)
        offset, asked = keys.mean(0), queries.mean(0)
        assert np.linalg.norm(offset) > 0.3 * np.linalg.norm(keys, axis=1).mean(), "keys share a large offset"
        cosine = unit(offset) @ unit(asked)
        assert cosine < 0.85, "queries point elsewhere than keys on average"
        # The nearest key, by angle, is farther from a query than from a key that is left out.
        indexed = unit(keys[::16])
        stranger = (unit(queries) @ indexed.T).max(1)
        friend = (unit(keys[8::64]) @ indexed.T).max(1)
        assert np.median(stranger) < 0.9 * np.median(friend)


def test_logits_go_from_flat_to_sharp():
    flat, middle, sharp = (
        top_mass(vectors.load(name, length=LENGTH, groups=20, heads=["0"]), 0.01)
        for name in ("synthetic-flat", "synthetic", "synthetic-sharp")
    )
    assert 0.1 < flat.mean() < 0.45 < middle.mean() < 0.9
    assert sharp[:, 0].mean() > 0.98, "an induction head's exact matches"
    assert sharp[:, 3].mean() < sharp[:, 0].mean(), "the group's last head is its flattest"


def test_flat_queries_are_the_same_queries_halved():
    middle, flat = (vectors.load(name, length=64, groups=2, heads=["0"]) for name in ("synthetic", "synthetic-flat"))
    np.testing.assert_array_equal(middle.keys, flat.keys)
    np.testing.assert_array_equal(middle.queries / 2, flat.queries)


def test_an_induction_query_attends_to_what_follows_its_token():
    data = vectors.load("synthetic-sharp", length=LENGTH, groups=20, heads=["0"])
    logits = data.queries[:, 0] @ data.keys[0].T
    best = logits.argsort(1)[:, -2:]
    keys = data.keys[0][:, synthetic.PARTIAL_ROPE :]
    alike = [np.corrcoef(keys[a], keys[b])[0, 1] for a, b in best]
    assert np.median(alike) > 0.8, "the two best keys hold the same token"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"name": "gaussian"}, "name: got 'gaussian', expected 'synthetic', 'synthetic-flat'"),
        ({"name": "synthetic", "heads": ["8"]}, r"heads: expected some of synthetic's 0, .*\['8'\]"),
        ({"name": "synthetic", "heads": []}, "heads"),
        ({"name": "synthetic", "length": 0}, "length and groups: expected at least 1, got 0"),
        ({"name": "synthetic", "groups": -1}, "length and groups: .*-1"),
    ],
)
def test_bad_arguments(arguments, complaint):
    with pytest.raises(ValueError, match=complaint):
        vectors.load(**arguments)


def test_heads_must_not_be_a_string():
    with pytest.raises(TypeError, match="heads: expected a sequence of names, got the string '0'"):
        vectors.load("synthetic", heads="0")


def test_nothing_to_prepare():
    assert vectors.prepare("synthetic") is None
    with pytest.raises(ValueError, match=r"name: got .*, expected 'synthetic', 'synthetic-flat'"):
        vectors.prepare("gaussian")
