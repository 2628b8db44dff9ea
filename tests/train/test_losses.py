# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""The next-token loss looks one token ahead and weighs as it is told."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wlab.train import bits, next_token_loss

TOKENS = jnp.asarray([[0, 1, 2, 0], [2, 2, 1, 1]])


def by_hand(logits, tokens):
    """Minus the log probability of every target, `[batch, length]`."""
    logits = np.asarray(logits, np.float64)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    rows = range(tokens.shape[1] - 1)
    return np.array([[-logp[b, t, tokens[b, t + 1]] for t in rows] for b in range(2)])


def test_mean_over_the_targets(key):
    logits = jax.random.normal(key, (2, 3, 3))
    got = next_token_loss(logits, TOKENS)
    np.testing.assert_allclose(got, by_hand(logits, TOKENS).mean(), rtol=1e-6)


def test_mask_weighs_the_targets(key):
    logits = jax.random.normal(key, (2, 3, 3))
    mask = jnp.asarray([[1.0, 0.0, 0.5], [0.0, 0.0, 2.0]])
    want = np.average(by_hand(logits, TOKENS), weights=mask)
    np.testing.assert_allclose(next_token_loss(logits, TOKENS, mask), want, rtol=1e-6)
    ones = next_token_loss(logits, TOKENS, jnp.ones((2, 3), bool))
    np.testing.assert_allclose(ones, next_token_loss(logits, TOKENS), rtol=1e-6)


def test_no_weight_at_all_is_no_loss(key):
    logits = jax.random.normal(key, (2, 3, 3))
    masked = lambda z: next_token_loss(z, TOKENS, jnp.zeros((2, 3)))  # noqa: E731
    loss, gradient = jax.value_and_grad(masked)(logits)
    assert loss == 0 and (gradient == 0).all()


def test_narrow_logits_are_summed_in_float32(key):
    logits = jax.random.normal(key, (2, 3, 3)).astype(jnp.bfloat16)
    loss = next_token_loss(logits, TOKENS)
    assert loss.dtype == jnp.float32
    wide = np.asarray(logits, np.float32)
    np.testing.assert_allclose(loss, by_hand(wide, TOKENS).mean(), rtol=1e-6)


@pytest.mark.parametrize("shape", [(2, 4, 3), (1, 3, 3), (2, 3)])
def test_logits_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"apply the model to tokens\[:, :-1\]"):
        next_token_loss(jnp.zeros(shape), TOKENS)


def test_a_mask_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="one weight per target"):
        next_token_loss(jnp.zeros((2, 3, 3)), TOKENS, jnp.ones((2, 4)))


def test_bits():
    np.testing.assert_allclose(bits(np.log(256.0)), 8)
