# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Sums over the pairs of a population, a limited number at a time."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def sum_in_chunks(
    some: Callable[[jax.Array, jax.Array], jax.Array],
    pairs: jax.Array,
    weights: jax.Array,
    at_once: int,
) -> jax.Array:
    """The sum over pairs, a limited number at a time.

    Args:
        some: `some(pairs, weights)`, the sum over these; a weight of 0 adds nothing.
        pairs: integer `[n]`.
        weights: `[n]`.
        at_once: how many `some` is given at most.

    Returns:
        What `some` returns, of all pairs.
    """
    n = pairs.shape[0]
    at_once = max(1, at_once)
    if n <= at_once:
        return some(pairs, weights)
    # Equal parts; the last one is filled up with pairs of no weight.
    parts = -(-n // at_once)
    extra = (0, parts * -(-n // parts) - n)
    cut = tuple(jnp.pad(x, extra).reshape(parts, -1) for x in (pairs, weights))
    like = jax.eval_shape(some, *(x[0] for x in cut))
    zero = jnp.zeros(like.shape, like.dtype)
    return jax.lax.scan(lambda sum_, part: (sum_ + some(*part), None), zero, cut)[0]
