# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""A whole population run at once, or in parts."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from wlab.core import Strategy, lift
from wlab.es._members import Member


def evaluate(
    strategy: Strategy,
    fn: Callable[..., Any],
    state: Any,
    params: Any,
    population: int | jax.Array,
    *args: Any,
    in_axes: int | Sequence[Any] | None = 0,
    chunk: int | None = None,
    noise: Any = None,
) -> Any:
    """What a function makes of every member of a population.

    The two members of a pair share one draw of noise, and all share the product with
    the common weights.

    Args:
        strategy: how members differ.
        fn: `fn(tree, *args)`, of one member's parameters, which `lift` makes a function
            of structured leaves; it returns its fitness, or any pytree of arrays.
        state: of the strategy.
        params: of which the members are perturbations.
        population: the number of members, or the numbers of the pairs, integer
            `[members / 2]`, such as those of one device.
        *args: further arguments of `fn`, with an axis of members where `in_axes` says.
        in_axes: as in `jax.vmap`, for `args`: 0 where each member has its own, None
            where all share one. A number holds for all arguments.
        chunk: members that are run at a time; None: all.
        noise: of the pairs, from `draw_pairs`; None: drawn again.

    Returns:
        What `fn` returns, with an axis of members in front, pairs side by side.

    Raises:
        ValueError: for an odd population, a chunk that does not divide it, or an
            argument that has no axis of its members.

    Examples:
        >>> from wlab import es
        >>> strategy, params = es.eggroll(0.1), {"w": jnp.zeros((3, 2))}
        >>> state = strategy.init(jax.random.key(0), params)
        >>> fn = lambda tree, x: (x @ tree["w"]).sum()
        >>> evaluate(strategy, fn, state, params, 4, jnp.ones(3), in_axes=None).shape
        (4,)
    """
    if isinstance(population, int):
        if population < 2 or population % 2:
            raise ValueError(
                f"population={population}: members come in antithetic pairs, so an "
                "even number of them"
            )
        pairs = jnp.arange(population // 2, dtype=jnp.int32)
    else:
        pairs = population
    n = pairs.shape[0]
    axes = _axes(in_axes, args)
    paired = [_paired(x, axis, n) for x, axis in zip(args, axes, strict=True)]
    lifted = lift(fn)
    signs = jnp.array([1, -1], jnp.int32)

    def both(pair: jax.Array, own: Any, shared: Sequence[Any]) -> Any:
        """The two members of a pair."""
        kept, its = own

        def one(sign: jax.Array, its: Sequence[Any]) -> Any:
            tree = strategy.perturb(state, params, Member(pair, sign), kept)
            return lifted(tree, *_merge(its, shared))

        return jax.vmap(one)(signs, its)

    given = list(zip(paired, axes, strict=True))
    own = [None if axis is None else x for x, axis in given]
    shared = [x if axis is None else None for x, axis in given]
    run = jax.vmap(both, (0, 0, None))
    if chunk is None or chunk >= 2 * n:
        out = run(pairs, (noise, own), shared)
    else:
        if chunk < 2 or chunk % 2 or (2 * n) % chunk:
            raise ValueError(
                f"chunk={chunk} does not divide the {2 * n} members into whole pairs: "
                "take an even divisor"
            )
        out = jax.lax.map(
            lambda part: both(part[0], part[1], shared),
            (pairs, (noise, own)),
            batch_size=chunk // 2,
        )
    return jax.tree.map(lambda x: x.reshape(2 * n, *x.shape[2:]), out)


def draw_pairs(
    strategy: Strategy, state: Any, params: Any, population: int | jax.Array
) -> Any:
    """The noise of every pair, to be kept for `evaluate` and `update`.

    Args:
        strategy: whose noise it is.
        state: of the strategy.
        params: arrays or structured weights, or their shapes.
        population: the number of members, or the numbers of pairs.

    Returns:
        What `strategy.draw` returns, with an axis of pairs in front.
    """
    if isinstance(population, int):
        population = jnp.arange(population // 2, dtype=jnp.int32)
    return jax.vmap(lambda pair: strategy.draw(state, params, Member(pair, 1)))(
        population
    )


def _axes(in_axes: Any, args: Sequence[Any]) -> list[int | None]:
    axes = list(in_axes) if isinstance(in_axes, Sequence) else [in_axes] * len(args)
    if len(axes) != len(args) or any(axis not in (0, None) for axis in axes):
        raise ValueError(
            f"in_axes={in_axes!r} for {len(args)} arguments: 0 or None for each"
        )
    return axes


def _paired(x: Any, axis: int | None, n: int) -> Any:
    """An argument with its members' axis split into pairs and signs."""
    if axis is None:
        return x

    def split(leaf: Any) -> Any:
        if jnp.ndim(leaf) < 1 or leaf.shape[0] != 2 * n:
            raise ValueError(
                f"an argument of shape {jnp.shape(leaf)} has no axis of {2 * n} "
                "members in front: give in_axes=None if all members share it"
            )
        return leaf.reshape(n, 2, *leaf.shape[1:])

    return jax.tree.map(split, x)


def _merge(own: Sequence[Any], shared: Sequence[Any]) -> list[Any]:
    return [b if a is None else a for a, b in zip(own, shared, strict=True)]
