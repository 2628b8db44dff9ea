# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Ask and tell: a search as users of evolution libraries know it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from wlab.core import Strategy


class AskTellState(NamedTuple):
    """All that a search carries."""

    mean: Any  # the parameters
    strategy_state: Any
    opt_state: Any
    generation: jax.Array  # int32 scalar
    best_fitness: jax.Array  # of all generations, float32 scalar


class AskTell(NamedTuple):
    """Functions around a strategy and an optimiser."""

    init: Callable[..., AskTellState]
    """`init(key, params)` returns the state."""

    ask: Callable[[AskTellState], jax.Array]
    """`ask(state)` returns the numbers of the members, `[population]`.

    They stand for the members, whose weights are never all there at once: vmap over
    them, and `member` makes each.
    """

    member: Callable[[AskTellState, Any], Any]
    """`member(state, number)` returns a member's parameters, for `wlab.lift`."""

    tell: Callable[..., tuple[AskTellState, dict[str, jax.Array]]]
    """`tell(state, members, fitness)` returns the next state and metrics.

    Fitness is to be maximised.
    """

    get_mean: Callable[[AskTellState], Any]
    """`get_mean(state)` returns the parameters without noise."""


def ask_tell(
    strategy: Strategy, tx: optax.GradientTransformation, population_size: int
) -> AskTell:
    """A strategy and an optimiser as init, ask and tell.

    Args:
        strategy: such as `wlab.es.eggroll(...)`.
        tx: moves the parameters along its pseudo-gradients.
        population_size: members of a generation; even.

    Returns:
        The functions; all of them may be compiled.

    Raises:
        ValueError: for an odd population.

    Examples:
        >>> from wlab import es
        >>> search = ask_tell(es.eggroll(0.1), optax.sgd(0.1), population_size=4)
        >>> state = search.init(jax.random.key(0), {"w": jnp.ones((3, 2))})
        >>> worth = lambda tree: -(tree["w"].materialise() ** 2).sum()
        >>> fitness = jax.vmap(lambda i: worth(search.member(state, i)))(
        ...     search.ask(state)
        ... )
        >>> state, metrics = search.tell(state, search.ask(state), fitness)
        >>> int(state.generation)
        1
    """
    if population_size < 2 or population_size % 2:
        raise ValueError(
            f"population_size={population_size}: members come in antithetic pairs, so "
            "an even number of them"
        )
    tx = optax.with_extra_args_support(tx)

    def init(key: jax.Array | int, params: Any) -> AskTellState:
        return AskTellState(
            mean=params,
            strategy_state=strategy.init(key, params),
            opt_state=tx.init(params),
            generation=jnp.zeros((), jnp.int32),
            best_fitness=jnp.full((), -jnp.inf, jnp.float32),
        )

    def ask(state: AskTellState) -> jax.Array:
        del state
        return jnp.arange(population_size, dtype=jnp.int32)

    def member(state: AskTellState, number: Any) -> Any:
        return strategy.perturb(state.strategy_state, state.mean, number)

    def tell(
        state: AskTellState, members: jax.Array, fitness: jax.Array
    ) -> tuple[AskTellState, dict[str, jax.Array]]:
        grads, search = strategy.update(
            state.strategy_state, state.mean, fitness, members
        )
        updates, opt_state = tx.update(grads, state.opt_state, state.mean)
        finite = jnp.isfinite(fitness)
        # Of integers too, which have no infinity.
        known = jnp.where(finite, fitness.astype(jnp.float32), -jnp.inf)
        best = jnp.max(known, initial=-jnp.inf)
        metrics = {
            "mean_fitness": jnp.mean(fitness, where=finite),
            "best_fitness_in_generation": best,
            "best_fitness": jnp.maximum(best, state.best_fitness),
            "norm": optax.tree.norm(optax.tree.cast(grads, jnp.float32)),
        }
        new = AskTellState(
            mean=optax.apply_updates(state.mean, updates),
            strategy_state=search,
            opt_state=opt_state,
            generation=jnp.asarray(optax.safe_increment(state.generation)),
            best_fitness=metrics["best_fitness"],
        )
        return new, metrics

    return AskTell(init, ask, member, tell, lambda state: state.mean)
