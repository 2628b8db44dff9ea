# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""A strategy as the first link of an optax chain (a transform)."""

from typing import Any

import jax
import optax

from wlab.core import Strategy
from wlab.es._eggroll import EvolutionState, eggroll
from wlab.es._integer import IntegerState


def scale_by_strategy(
    strategy: Strategy, key: jax.Array | int = 0
) -> optax.GradientTransformationExtraArgs:
    """Pseudo-gradients of a strategy, whatever the updates that come in.

    Its `update` takes `fitness=`, and `members=` and `noise=` as the strategy's does.
    Its state is the strategy's, so that `strategy.perturb(state[0], params, member)` is
    a member where the transform comes first in a chain.

    Args:
        strategy: such as `eggroll(...)`.
        key: random key or seed of the search.

    Returns:
        A gradient transformation with extra arguments.

    Raises:
        ValueError: at `update` without `fitness=` or `params`.
    """

    def init(params: Any) -> Any:
        return strategy.init(key, params)

    def update(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        fitness: jax.Array | None = None,
        members: jax.Array | None = None,
        noise: Any = None,
        **extra: Any,
    ) -> tuple[Any, Any]:
        del updates, extra
        if params is None:
            raise ValueError(
                "an evolution strategy reads the parameters: call "
                "tx.update(updates, state, params, fitness=...)"
            )
        if fitness is None:
            raise ValueError(
                "an evolution strategy learns from fitness: call tx.update(updates, "
                "state, params, fitness=...); the updates may be None"
            )
        return strategy.update(state, params, fitness, members, noise)

    return optax.GradientTransformationExtraArgs(init, update)


def scale_by_eggroll(
    *args: Any, key: jax.Array | int = 0, **kwargs: Any
) -> optax.GradientTransformationExtraArgs:
    """`scale_by_strategy` of `eggroll`, whose arguments it takes.

    Examples:
        >>> import jax.numpy as jnp
        >>> tx = optax.chain(scale_by_eggroll(sigma=0.1), optax.sgd(0.1))
        >>> params = {"w": jnp.ones((3, 2))}
        >>> updates, _ = tx.update(
        ...     None, tx.init(params), params, fitness=jnp.array([1.0, 0.0])
        ... )
        >>> updates["w"].shape
        (3, 2)
    """
    return scale_by_strategy(eggroll(*args, **kwargs), key)


def evolution_state(opt_state: Any) -> Any:
    """The state of the search in that of a chain, `EvolutionState` or `IntegerState`.

    Raises:
        ValueError: if there is none, or more than one.
    """

    def searches(x: Any) -> bool:
        return isinstance(x, (EvolutionState, IntegerState))

    found = list(filter(searches, jax.tree.leaves(opt_state, is_leaf=searches)))
    if len(found) != 1:
        raise ValueError(
            f"the optimiser's state holds {len(found)} states of a search and not one: "
            "begin the chain with wlab.es.scale_by_strategy"
        )
    return found[0]
