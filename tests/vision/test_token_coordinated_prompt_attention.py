"""`token_coordinated_prompt_attention`: prompts that each token has chosen."""

import numpy as np
import pytest

import longattn as la
from longattn.vision.token_coordinated_prompt_attention import (
    METHOD,
    match_prompts,
    token_coordinated_prompt_attention,
)
from random_arrays import F32, normal, qkv
from vision_checks import check, check_kinds, raises, same


def case(rng, tokens=18, sizes=((6, 2), (5, 3)), counts=(3, 2)):
    q, k, v = qkv(rng, batch=2, heads=4, kv_heads=2, rows=tokens, keys=tokens, value_dim=12)
    pools = tuple((normal(rng, (2, m, n, 16)), normal(rng, (2, m, n, 12))) for m, n in sizes)
    x = normal(rng, (2, tokens, 8))
    of_cls, _ = match_prompts(x[:, :1], normal(rng, (sizes[0][0], 8)), counts[0])
    of_image, _ = match_prompts(x[:, 1:], normal(rng, (sizes[1][0], 8)), counts[1])
    return q, k, v, *pools, of_cls[:, 0], of_image


@pytest.mark.parametrize("mode", ["pre", "post"])
@pytest.mark.parametrize("counts", [(3, 2), (0, 0), (6, 5), (1, 0)])
def test_reference(rng, isa, threads, mode, counts):
    given = case(rng, counts=counts)
    check(METHOD, *given, mode=mode)
    check(METHOD, *given, mode=mode, open_pools=True, scale=0.3)


@pytest.mark.parametrize("mode", ["pre", "post"])
def test_kinds(rng, mode):
    check_kinds(METHOD, *case(rng), mode=mode)


def with_prompts(k, pair):
    return np.concatenate([k, *(np.repeat(x.reshape(1, 2, -1, x.shape[3]), 2, axis=0) for x in pair)], axis=2)


@pytest.mark.parametrize("mode", ["pre", "post"])
def test_open_pools_are_visual_prompt_tuning(rng, isa, mode):
    given = case(rng)
    q, k, v, (ck, cv), (ik, iv) = given[:5]
    out = token_coordinated_prompt_attention(*given, mode=mode, open_pools=True)
    expected = la.attention(q, with_prompts(k, (ck, ik)), with_prompts(v, (cv, iv)))
    same(METHOD, out, expected, *given, mode=mode, open_pools=True)


def test_no_prompts_is_the_image_alone(rng, isa):
    given = case(rng, counts=(0, 0))
    out = token_coordinated_prompt_attention(*given, mode="pre")
    same(METHOD, out, la.attention(*given[:3]), *given, mode="pre")
    empty = case(rng, sizes=((0, 2), (0, 3)), counts=(0, 0))
    out = token_coordinated_prompt_attention(*empty, mode="post")
    same(METHOD, out, la.attention(*empty[:3]), *empty, mode="post")


def test_post_is_pre_times_what_is_seen(rng, isa):
    given = case(rng)
    q, k, v, (ck, _), (ik, _) = given[:5]
    # With values of 1, the output is the weight that is seen.
    ones = [np.ones_like(v), *((keys, np.ones((*keys.shape[:3], 12), F32)) for keys in (ck, ik))]
    seen = token_coordinated_prompt_attention(q, k, *ones, *given[5:], mode="post")
    assert seen.min() > 0.1 and seen.max() < 0.99
    pre = token_coordinated_prompt_attention(*given, mode="pre")
    same(METHOD, token_coordinated_prompt_attention(*given), pre * seen, *given)


def test_match_prompts(rng):
    x, keys = rng.standard_normal((2, 7, 8)), rng.standard_normal((6, 8))
    chosen, distance = match_prompts(x, keys, 4)
    for b, t in np.ndindex(2, 7):
        cosine = keys @ x[b, t] / np.linalg.norm(keys, axis=1) / np.linalg.norm(x[b, t])
        assert chosen[b, t].tolist() == sorted(np.argsort(-cosine)[:4])
        np.testing.assert_allclose(distance[b, t], 1 - cosine[chosen[b, t]], atol=1e-6)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"mode": "both"}, ValueError, r"mode: got 'both'"),
        ({"open_pools": 1}, TypeError, r"open_pools: got 1"),
        ({"cls_prompts": 3}, TypeError, r"cls_prompts: got int"),
        ({"cls_prompts": (np.zeros((2, 6, 2, 15), F32),) * 2}, ValueError, r"cls_prompts\[0\]: got shape"),
        ({"cls_chosen": np.array([[0, 0], [1, 2]])}, ValueError, r"cls_chosen: got numbers out of range or twice"),
        ({"cls_chosen": np.array([[0, 6], [1, 2]])}, ValueError, r"cls_chosen: got numbers out of range or twice"),
        ({"image_chosen": np.zeros((2, 16, 1), int)}, ValueError, r"image_chosen: got shape \(2, 16, 1\)"),
        ({"image_chosen": np.zeros((2, 17, 1))}, TypeError, r"image_chosen: got dtype float64"),
    ],
)
def test_bad_arguments(rng, change, error, message):
    names = ("q", "k", "v", "cls_prompts", "image_prompts", "cls_chosen", "image_chosen")
    raises(METHOD, error, message, dict(zip(names, case(rng), strict=True)), **change)


def test_bad_matches(rng):
    with pytest.raises(ValueError, match=r"keys: got shape \(6, 7\)"):
        match_prompts(normal(rng, (2, 3, 8)), normal(rng, (6, 7)), 2)
    with pytest.raises(ValueError, match=r"count: got 7"):
        match_prompts(normal(rng, (2, 3, 8)), normal(rng, (6, 8)), 7)
