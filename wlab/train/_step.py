# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""The train step: a pure function from state and batch to state and metrics."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from wlab.core import Layered, layered_value_and_grad, materialise, sharding

__all__ = [
    "LossFn",
    "StepFn",
    "TrainState",
    "init_state",
    "jit_step",
    "make_evaluate",
    "make_train_step",
]

Metrics: TypeAlias = dict[str, jax.Array]
LossFn: TypeAlias = Callable[[Any, Any], jax.Array | tuple[jax.Array, Metrics]]


class TrainState(NamedTuple):
    """All that a run carries from step to step."""

    step: jax.Array  # steps done, int32 scalar
    params: Any  # any pytree; its leaves may be structured weights
    opt_state: Any  # of the optax transform


StepFn: TypeAlias = Callable[[TrainState, Any], tuple[TrainState, Metrics]]


def init_state(params: Any, tx: optax.GradientTransformation) -> TrainState:
    """The state before the first step.

    Every leaf is a copy, in a buffer of its own: the step may be given the whole state
    to write over, and `params` stays the caller's. Under `jax.jit` the copies cost
    nothing.

    Args:
        params: any pytree of arrays and structured weights.
        tx: the optimiser.

    Returns:
        The state.
    """
    params = jax.tree.map(_fresh, params)
    seen = {id(leaf) for leaf in jax.tree.leaves(params)}

    def own(leaf: Any) -> jax.Array:
        weak = getattr(leaf, "weak_type", False)  # keys have no such thing
        if id(leaf) in seen or not isinstance(leaf, jax.Array) or weak:
            leaf = _fresh(leaf)
        seen.add(id(leaf))
        return leaf

    opt_state = jax.tree.map(own, tx.init(params))
    return TrainState(jnp.zeros((), jnp.int32), params, opt_state)


def _fresh(leaf: Any) -> jax.Array:
    """A copy whose dtype is meant: a weak one would change at the first step."""
    return jnp.array(leaf, dtype=jnp.result_type(leaf), copy=True)


def make_train_step(
    loss_fn: LossFn | Layered,
    tx: optax.GradientTransformation,
    *,
    active: Callable[[Any], Mapping[str, Any]] | None = None,
) -> StepFn:
    """Builds a train step: gradients, optimiser, update.

    The gradients are taken with respect to the dense values of the parameters, so the
    loss sees arrays only. The optimiser sees these dense gradients and the parameters
    as they are stored, and is given `value` (the loss) and `grad` (the gradients)
    as extra arguments.

    Args:
        loss_fn: `loss_fn(params, batch)` returns a scalar, or a scalar and a dict of
            further metrics. A model in layers (`wlab.core.Layered`) may stand for it.
        tx: the optimiser.
        active: for a model in layers, from the optimiser's state to the layers of the
            step, as `wlab.optim.active_layers` tells them. The backward pass is then of
            these only, and the optimiser is given the same arguments.

    Returns:
        `step(state, batch)`, which returns the next state and the metrics "loss",
        "grad_norm" (of all gradients together, float32) and those of `loss_fn`. It is
        pure and not compiled yet: `jax.vmap` it over states of several seeds if you
        like, then pass it to `fit` or `jit_step`.

    Examples:
        >>> step = make_train_step(lambda w, x: ((w - x) ** 2).sum(), optax.sgd(0.5))
        >>> state, metrics = step(init_state(jnp.zeros(2), optax.sgd(0.5)), jnp.ones(2))
        >>> state.params.tolist(), float(metrics["loss"])
        ([1.0, 1.0], 2.0)
    """
    tx = optax.with_extra_args_support(tx)
    if active is not None and not isinstance(loss_fn, Layered):
        raise ValueError(
            "active= names layers, and the loss is one function: give the model in "
            "layers (wlab.core.Layered, wlab.models.layered)"
        )
    if isinstance(loss_fn, Layered):
        grad_fn = layered_value_and_grad(_layers_with_metrics(loss_fn))
    else:
        whole = jax.value_and_grad(_with_metrics(loss_fn), has_aux=True)

        def grad_fn(dense: Any, batch: Any) -> Any:
            specs = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, dense)
            run = sharding.with_auto_axes(whole, ((jax.P(), jax.P()), specs))
            return run(dense, batch)

    def step(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        layers = {} if active is None else active(state.opt_state)
        (loss, extra), grads = grad_fn(materialise(state.params), batch, **layers)
        updates, opt_state = tx.update(
            grads, state.opt_state, state.params, value=loss, grad=grads, **layers
        )
        params = optax.apply_updates(state.params, updates)
        norm = optax.tree.norm(optax.tree.cast(grads, jnp.float32))
        metrics = {"loss": loss, "grad_norm": norm, **extra}
        done = jnp.asarray(optax.safe_increment(state.step))
        return TrainState(done, params, opt_state), metrics

    return step


def jit_step(step: StepFn, state: TrainState | None = None) -> StepFn:
    """Compiles a step that writes the new state over the old one.

    The state passed in is gone after the call: keep the one that comes back.

    Args:
        step: from `make_train_step`.
        state: a state on a mesh, or an abstract one: every step leaves it where it is.

    Returns:
        The compiled step. The mesh of the state must be set when it is called, as
        `fit` does.
    """
    places = None
    if state is not None and sharding.mesh_of(state) is not None:
        places = (jax.tree.map(lambda x: x.sharding, state), None)
    return jax.jit(step, donate_argnums=0, out_shardings=places)


def make_evaluate(loss_fn: LossFn, batches: Any) -> Callable[[Any], Metrics]:
    """Builds the mean of a loss over fixed batches.

    Args:
        loss_fn: as in `make_train_step`.
        batches: a batch, or a pytree of them, with one more axis in front: `[n, ...]`.

    Returns:
        `evaluate(params)`, compiled, which returns the means of "loss" and of the
        further metrics over the `n` batches. On the mesh of the parameters each batch
        is divided as those of training are; every host passes all of it.
    """

    @jax.jit
    def means(params: Any, batches: Any) -> Metrics:
        def mean(dense: Any, batches: Any) -> Metrics:
            def one(batch: Any) -> Metrics:
                loss, extra = _with_metrics(loss_fn)(dense, batch)
                return {"loss": loss, **extra}

            return jax.tree.map(lambda m: m.mean(axis=0), jax.lax.map(one, batches))

        return sharding.with_auto_axes(mean, jax.P())(materialise(params), batches)

    @functools.cache
    def placed(mesh: jax.sharding.Mesh | None) -> Any:
        if mesh is None:
            return jax.tree.map(jnp.asarray, batches)
        spec = sharding.batch_spec(mesh, lead=1)
        return jax.device_put(batches, jax.NamedSharding(mesh, spec))

    def evaluate(params: Any) -> Metrics:
        mesh = sharding.mesh_of(params)
        with sharding.on_mesh(mesh):
            return means(params, placed(mesh))

    return evaluate


def _layers_with_metrics(parts: Layered) -> Layered:
    def after(params: Any, x: Any, batch: Any, *extras: Any) -> Any:
        return _with_metrics(lambda x, b: parts.after(params, x, b, *extras))(x, batch)

    return parts._replace(after=after)


def _with_metrics(loss_fn: LossFn) -> Callable[[Any, Any], tuple[jax.Array, Metrics]]:
    """The loss function that always returns metrics, checked when it is traced."""

    def checked(params: Any, batch: Any) -> tuple[jax.Array, Metrics]:
        made = loss_fn(params, batch)
        loss, extra = made if isinstance(made, tuple) else (made, {})
        if jnp.shape(loss):
            raise ValueError(
                f"the loss has shape {list(jnp.shape(loss))}: take its mean, a scalar "
                "is minimised"
            )
        if taken := {"loss", "grad_norm"} & extra.keys():
            raise ValueError(
                f"the step itself measures {sorted(taken)}: give the metrics of the "
                "loss function other names"
            )
        return loss, extra

    return checked
