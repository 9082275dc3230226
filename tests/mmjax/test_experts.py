"""The forms that experts on one device take against each other, and the router's counting."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.layers import experts, router

EXPERTS, TOP_K, D, F = 8, 2, 16, 24


def layer(count):
    """Tokens, shares, visits (one of which does not take place) and the experts' matrices."""
    rng = np.random.default_rng(count)

    def draw(*shape):
        return jnp.asarray(rng.standard_normal(shape) / shape[-2] ** 0.5, jnp.float32)

    expert = np.stack([rng.permutation(EXPERTS)[:TOP_K] for _ in range(count)])
    expert[0, 1] = EXPERTS
    share = jax.nn.softmax(draw(count, TOP_K))
    kernels = experts.Weights(draw(EXPERTS, D, F), draw(EXPERTS, D, F), draw(EXPERTS, F, D))
    return draw(count, D), share, jnp.asarray(expert, jnp.int32), kernels


@pytest.mark.parametrize("count", [1, 3, 17])
def test_all_forms_agree(count):
    tokens, share, expert, kernels = layer(count)
    visits = experts.visit_experts(tokens, expert, kernels)
    sorted_by_expert = experts.weighted_sum(visits, share)
    for form in (experts._visited_experts, experts._every_expert):
        found = form(tokens, share, expert, kernels)
        np.testing.assert_allclose(found, sorted_by_expert, atol=2e-6)


def test_only_visited_experts_get_turns():
    _, share, expert, _ = layer(2)
    weight, turns = experts._turns(share, expert, EXPERTS)
    visited = sorted(set(np.asarray(expert).ravel()) - {EXPERTS})
    assert weight.shape == (4, 2)
    assert turns.tolist() == visited + [EXPERTS] * (4 - len(visited))
    np.testing.assert_array_equal(weight[len(visited) :], 0)


@pytest.mark.parametrize("experts", [4, 32])
def test_counting_picks_what_sorting_does(experts):
    """Equal probabilities among them: the first of equals comes first."""
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, 6, (router.DECODING_TOKENS, experts)) / 8
    probability = jnp.asarray(drawn, jnp.float32)
    top, expert = router._top_k(probability, 3)
    want_top, want_expert = jax.lax.top_k(probability, 3)
    np.testing.assert_array_equal(top, want_top)
    np.testing.assert_array_equal(expert, want_expert)
