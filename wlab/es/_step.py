# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""The step of a search: a population is run, and the parameters move."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from wlab.core import Strategy
from wlab.es._eggroll import EvolutionState
from wlab.es._population import draw_pairs, evaluate
from wlab.es._transform import evolution_state
from wlab.train import StepFn, TrainState


def make_evolution_step(
    fitness_fn: Callable[[Any, Any], jax.Array],
    strategy: Strategy,
    tx: optax.GradientTransformation,
    population: int,
    *,
    shared: bool = True,
    chunk: int | None = None,
    keep: bool = False,
    mesh: Mesh | None = None,
    axis_name: str = "population",
) -> StepFn:
    """Builds a step that `wlab.train.fit` runs, saves and resumes.

    Args:
        fitness_fn: `fitness_fn(params, batch)` of one member, a scalar to be maximised,
            which need not be differentiable; its parameters may be structured.
        strategy: the same as in `tx`.
        tx: a chain that begins with `scale_by_strategy(strategy)`.
        population: members.
        shared: whether all members see the whole batch; False: each has its own part,
            along a leading axis of members.
        chunk: members that are run at a time on a device; None: all.
        keep: whether noise is kept from the run for the update, and not drawn again.
        mesh: over whose axis `axis_name` the population is divided by hand; the
            strategy has then the same `axis_name`. None: one device, or as the compiler
            divides it.
        axis_name: of the mesh.

    Returns:
        `step(state, batch)`, which returns the next state and the metrics "fitness",
        "fitness_best" (mean and largest of the members that did not fail) and, of a
        search over floats, "failed" and "sigma". The state is that of
        `wlab.train.init_state(params, tx)`.

    Raises:
        ValueError: for a population that the mesh does not divide into pairs.
    """
    tx = optax.with_extra_args_support(tx)
    parts = 1 if mesh is None else mesh.shape[axis_name]
    if population < 2 * parts or population % (2 * parts):
        raise ValueError(
            f"population={population} does not divide into antithetic pairs on "
            f"{parts} devices: take a multiple of {2 * parts}"
        )

    def local(state: TrainState, batch: Any) -> tuple[TrainState, jax.Array]:
        search = evolution_state(state.opt_state)
        n = population // parts // 2
        first = 0 if mesh is None else jax.lax.axis_index(axis_name) * n
        pairs = first + jnp.arange(n, dtype=jnp.int32)
        noise = draw_pairs(strategy, search, state.params, pairs) if keep else None
        fitness = evaluate(
            strategy,
            fitness_fn,
            search,
            state.params,
            pairs,
            batch,
            in_axes=None if shared else 0,
            chunk=chunk,
            noise=noise,
        )
        updates, opt_state = tx.update(
            state.params, state.opt_state, state.params, fitness=fitness, noise=noise
        )
        params = optax.apply_updates(state.params, updates)
        done = jnp.asarray(optax.safe_increment(state.step))
        return TrainState(done, params, opt_state), fitness

    def step(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        run = local
        if mesh is not None:
            by_member = jax.P(axis_name)
            run = jax.shard_map(
                local,
                mesh=mesh,
                in_specs=(jax.P(), jax.P() if shared else by_member),
                out_specs=(jax.P(), by_member),
                axis_names={axis_name},
                # All devices compute the same update, which types cannot tell.
                check_vma=False,
            )
        state, fitness = run(state, batch)
        search = evolution_state(state.opt_state)
        finite = jnp.isfinite(fitness)
        measured = fitness.astype(jnp.float32)
        metrics = {
            "fitness": jnp.mean(measured, where=finite),
            "fitness_best": jnp.max(measured, where=finite, initial=-jnp.inf),
        }
        if isinstance(search, EvolutionState):
            metrics |= {"failed": search.failed, "sigma": search.sigma}
        return state, metrics

    return step
