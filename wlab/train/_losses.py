# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Losses that more than one recipe needs."""

import math

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

__all__ = ["bits", "next_token_loss"]


def next_token_loss(
    logits: jax.Array, tokens: jax.Array, mask: jax.Array | None = None
) -> jax.Array:
    """Mean cross entropy of every next token.

    The model has read `tokens[:, :-1]`; the targets are `tokens[:, 1:]`.

    Args:
        logits: `[batch, length, vocab]`, made from `tokens[:, :-1]`.
        tokens: integers, `[batch, length + 1]`.
        mask: weights of the targets, `[batch, length]`; by default all count alike.
            With no weight at all the loss is 0.

    Returns:
        The loss in nats per token, a float32 scalar.

    Raises:
        ValueError: if the shapes do not fit.

    Examples:
        >>> loss = next_token_loss(jnp.zeros((1, 3, 256)), jnp.zeros((1, 4), int))
        >>> float(bits(loss))
        8.0
    """
    targets = tokens[:, 1:]
    if logits.ndim != 3 or logits.shape[:2] != targets.shape:
        raise ValueError(
            f"logits of shape {list(logits.shape)} do not predict the next tokens of "
            f"tokens of shape {list(tokens.shape)}: apply the model to tokens[:, :-1] "
            "and pass all of tokens here"
        )
    losses = optax.softmax_cross_entropy_with_integer_labels(
        logits.astype(jnp.float32), targets
    )
    if mask is None:
        return losses.mean()
    if mask.shape != targets.shape:
        raise ValueError(
            f"mask has shape {list(mask.shape)}, but the targets have "
            f"{list(targets.shape)}: give it one weight per target"
        )
    mask = mask.astype(jnp.float32)
    total = mask.sum()
    return jnp.sum(losses * mask) / jnp.where(total == 0, 1, total)


def bits(nats: ArrayLike) -> jax.Array:
    """Bits from nats: a loss in nats per byte becomes bits per byte."""
    return jnp.asarray(nats) / math.log(2)
