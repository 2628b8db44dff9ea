# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Fitness shaping: from the fitness of members to the weights of their noise.

A member whose fitness is not finite has failed: it has weight 0, and the means,
deviations and ranks are those of the others.
"""

from collections.abc import Callable
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp

Shaping: TypeAlias = (
    Literal["normalise", "ranks", "sign", "baseline", "none"]
    | Callable[[jax.Array], jax.Array]
)
SHAPINGS = ("normalise", "ranks", "sign", "baseline", "none")


def shape_fitness(
    fitness: jax.Array, shaping: Shaping = "normalise", group_size: int | None = None
) -> jax.Array:
    """The weights that a shaping gives to members.

    Args:
        fitness: float or integer `[members]`, higher is better; members 2 j and 2 j + 1
            are a pair.
        shaping: "normalise" as `normalise`, "ranks" as `centred_ranks`, "sign" as
            `pair_signs`, "baseline" as `above_baseline`, "none" for the fitness as it
            is, or a function from fitness to weights.
        group_size: members in a row that are compared with each other, such as those
            that answer one prompt; None: all.

    Returns:
        float32 `[members]`, 0 for members whose fitness is not finite.

    Raises:
        ValueError: for an unknown shaping, fitness that is not a vector, or a group
            size that does not divide the population.

    Examples:
        >>> shape_fitness(jnp.array([3.0, 1.0, jnp.nan]), "ranks").tolist()
        [0.5, -0.5, 0.0]
    """
    fitness = jnp.asarray(fitness)
    if fitness.ndim != 1:
        raise ValueError(
            f"fitness has shape {fitness.shape}: one number for each member, such as "
            "the mean over its own examples"
        )
    n = fitness.shape[0]
    check_shaping(shaping)
    check_group(group_size, n)
    fitness = fitness.astype(jnp.float32)
    grouped = fitness.reshape(-1, group_size or n)
    if callable(shaping):
        finite = jnp.isfinite(fitness)
        return jnp.where(finite, shaping(jnp.where(finite, fitness, 0.0)), 0.0)
    if shaping == "ranks":
        return jax.vmap(centred_ranks)(grouped).reshape(-1)
    if shaping == "sign":
        return pair_signs(fitness)
    if shaping == "baseline":
        return jax.vmap(above_baseline)(grouped).reshape(-1)
    if shaping == "none":
        return jnp.where(jnp.isfinite(fitness), fitness, 0.0)
    return normalise(fitness, group_size)


def check_shaping(shaping: Shaping) -> None:
    """Raise for a shaping that there is not."""
    if not callable(shaping) and shaping not in SHAPINGS:
        raise ValueError(
            f"no shaping {shaping!r}: choose of {list(SHAPINGS)} or give a function of "
            "the fitness"
        )


def check_group(group_size: int | None, population: int) -> None:
    """Raise for groups into which a population does not divide."""
    if group_size is not None and (group_size < 1 or population % group_size):
        raise ValueError(
            f"group_size={group_size} does not divide the population of {population} "
            "members: take a divisor, or None for one group"
        )


def normalise(fitness: jax.Array, group_size: int | None = None) -> jax.Array:
    """Fitness less the mean of its group, over the deviation of all.

    The deviation is that of the raw fitness of all members, differences between groups
    included: ``(f - mean_of_group) / sqrt(var(f) + 1e-5)``.

    Args:
        fitness: float32 `[members]`.
        group_size: members of a group; None: all.

    Returns:
        float32 `[members]`.
    """
    finite = jnp.isfinite(fitness)
    grouped = (-1, group_size or fitness.shape[0])
    # The mean of the values that differ least from zero: exact for constant fitness.
    means = _mean(fitness.reshape(grouped), finite.reshape(grouped))
    centred = fitness - jnp.broadcast_to(means, _shape(fitness, grouped)).reshape(-1)
    overall = _mean(fitness[None], finite[None])[0]
    variance = _mean(((fitness - overall) ** 2)[None], finite[None])[0]
    return jnp.where(finite, centred / jnp.sqrt(variance + 1e-5), 0.0)


def centred_ranks(fitness: jax.Array) -> jax.Array:
    """Ranks from -1/2 for the worst to 1/2 for the best; equals share their mean rank.

    Args:
        fitness: float32 `[members]`.

    Returns:
        float32 `[members]`; all 0 where all are equal.
    """
    finite = jnp.isfinite(fitness)
    n = finite.sum()
    # What failed is sorted to the end, behind all ranks.
    ordered = jnp.sort(jnp.where(finite, fitness, jnp.inf))
    below = jnp.searchsorted(ordered, fitness, side="left")
    upto = jnp.searchsorted(ordered, fitness, side="right")
    rank = (below + upto - 1) * 0.5
    return jnp.where(finite, rank / jnp.maximum(n - 1, 1) - 0.5 * (n > 1), 0.0)


def pair_signs(fitness: jax.Array) -> jax.Array:
    """+1 for the better of each pair, -1 for the other, 0 for both if equal.

    Args:
        fitness: `[members]`, pairs side by side.

    Returns:
        float32 `[members]`; 0 for a pair of which a member failed.

    Raises:
        ValueError: for an odd number of members.
    """
    if fitness.shape[0] % 2:
        raise ValueError(
            f"{fitness.shape[0]} members are no pairs: take an even population"
        )
    plus, minus = fitness.reshape(-1, 2).T
    finite = jnp.isfinite(plus) & jnp.isfinite(minus)
    sign = jnp.where(finite, jnp.sign(plus - minus), 0.0)
    return jnp.stack([sign, -sign], axis=1).reshape(-1)


def above_baseline(fitness: jax.Array) -> jax.Array:
    """Fitness less that of the first member, over the deviation of the group.

    The first two members are the parameters without noise, and weigh nothing:
    ``(f - f[0]) / (std(f) + 1e-8)``.

    Args:
        fitness: float32 `[members]` of one group.

    Returns:
        float32 `[members]`; all 0 where the first member failed.
    """
    finite = jnp.isfinite(fitness) & jnp.isfinite(fitness[0])
    mean = _mean(fitness[None], finite[None])[0]
    deviation = jnp.sqrt(_mean(((fitness - mean) ** 2)[None], finite[None])[0])
    z = (fitness - fitness[0]) / (deviation + 1e-8)
    return jnp.where(finite & (jnp.arange(fitness.shape[0]) >= 2), z, 0.0)


def _mean(x: jax.Array, where: jax.Array) -> jax.Array:
    """Means over the last axis, kept, of the values that count; 0 of none.

    It is taken about the first of them, so that equal values have exactly theirs.
    """
    first = jnp.take_along_axis(x, jnp.argmax(where, axis=-1, keepdims=True), axis=-1)
    first = jnp.where(jnp.any(where, axis=-1, keepdims=True), first, 0.0)
    total = jnp.where(where, x - first, 0.0).sum(axis=-1, keepdims=True)
    return first + total / jnp.maximum(where.sum(axis=-1, keepdims=True), 1)


def _shape(x: jax.Array, grouped: tuple[int, int]) -> tuple[int, int]:
    return x.shape[0] // grouped[1], grouped[1]
