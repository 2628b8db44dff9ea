# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""One search by evolution, for the recipes that hold several against each other."""

import importlib.util
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from wlab import es

DENSE, EVOSAX = "dense ES", "evosax Open_ES"


class Search(NamedTuple):
    """How members differ and how the parameters move."""

    name: str  # EGGROLL with its rank, or one of the names above
    rank: int  # 0: dense noise
    sigma: optax.ScalarOrSchedule
    tx: optax.GradientTransformation
    population: int
    shaping: es.Shaping = "normalise"


def has_evosax() -> bool:
    """Whether the peer is installed."""
    return importlib.util.find_spec("evosax") is not None


def search(
    how: Search,
    params: Any,
    fitness: Callable[[Any, jax.Array], jax.Array],
    measure: Callable[[Any], jax.Array],
    *,
    generations: int,
    points: int,
    seed: int,
) -> dict[str, Any]:
    """Searches and measures along the way.

    Args:
        how: the strategy and the optimiser.
        params: where it begins.
        fitness: `fitness(params, key)`, to be maximised; the key is that of the
            generation, so that all members meet the same chance.
        measure: of the parameters without noise, compiled here.
        generations: of the run, a multiple of `points`.
        points: measurements.
        seed: of the noise and of chance.

    Returns:
        "curve" `[points + 1]` with the start in front, and "seconds" of all
        generations, compilation and measurements left out.
    """
    make = _evosax if how.name == EVOSAX else _wlab
    start, step, mean = make(how, params, fitness, seed)
    keys = jax.random.split(jax.random.key(seed + 1), generations)
    keys = keys.reshape(points, -1)

    def stretch(state: Any, keys: jax.Array) -> Any:
        return jax.lax.scan(lambda s, k: (step(s, k), None), state, keys)[0]

    compiled = jax.jit(stretch, donate_argnums=0).lower(start, keys[0]).compile()
    at = jax.jit(lambda state: measure(mean(state)))
    curve, seconds = [float(at(start))], 0.0
    state = start
    for some in keys:
        began = time.perf_counter()
        state = jax.block_until_ready(compiled(state, some))
        seconds += time.perf_counter() - began
        curve.append(float(at(state)))
    return {"curve": curve, "seconds": seconds}


def _wlab(how: Search, params: Any, fitness: Any, seed: int) -> Any:
    strategy = es.open_es(how.sigma, shaping=how.shaping)
    if how.rank:
        strategy = es.eggroll(how.sigma, how.rank, shaping=how.shaping)
    tx = optax.chain(es.scale_by_strategy(strategy, seed), how.tx)
    params = jax.tree.map(jnp.copy, params)

    def step(state: Any, key: jax.Array) -> Any:
        params, opt_state = state
        found = es.evaluate(
            strategy,
            fitness,
            es.evolution_state(opt_state),
            params,
            how.population,
            key,
            in_axes=None,
        )
        updates, opt_state = tx.update(params, opt_state, params, fitness=found)
        return optax.apply_updates(params, updates), opt_state

    return (params, tx.init(params)), step, lambda state: state[0]


def _evosax(how: Search, params: Any, fitness: Any, seed: int) -> Any:
    algorithms: Any = importlib.import_module("evosax.algorithms")
    schedule = how.sigma
    if not callable(schedule):
        schedule = optax.constant_schedule(float(np.asarray(how.sigma)))
    peer = algorithms.Open_ES(
        population_size=how.population,
        solution=params,
        optimizer=how.tx,
        std_schedule=schedule,
    )
    options = peer.default_params
    start = peer.init(jax.random.key(seed), params, options)

    def step(state: Any, key: jax.Array) -> Any:
        ask, tell, chance = jax.random.split(key, 3)
        members, state = peer.ask(ask, state, options)
        found = jax.vmap(lambda tree: fitness(tree, chance))(members)
        # The peer minimises.
        return peer.tell(tell, members, -found, state, options)[0]

    return start, step, peer.get_mean
