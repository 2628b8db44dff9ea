# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
r"""LISA: AdamW on the ends and a few random layers at a time (a transform).

What is in no layer (embedding, final norm, head) is trained always. Of the L layers,
:math:`\gamma` are drawn every K steps, uniformly and without replacement, and trained
whole; the others keep their weights, without update and decay, until they are drawn.
Gradients and moments exist for the active layers alone.

Where the authors start AdamW anew in every interval, for the ends as well, here a layer
that is drawn twice in a row goes on and so do the ends; ``state="reset_all"`` is
theirs, and ``"keep"`` is that of their published code, which holds stale moments of all
layers.

References:
    Pan, Liu, Diao, Pi, Zhang, Han and Zhang, `LISA: Layerwise Importance Sampling for
    Memory-Efficient Large Language Model Fine-Tuning
    <https://arxiv.org/abs/2403.17919>`_, NeurIPS 2024.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from wlab.core import (
    LayerGrads,
    find_layers,
    in_float32,
    is_weight,
    leaves_with_paths,
    map_with_path,
    subset,
    subsets,
    typed_key,
)
from wlab.optim._drop import drop

Scalar = float | jax.Array


class LisaState(NamedTuple):
    """State of `lisa`."""

    count: jax.Array  # int32, steps taken
    active: jax.Array  # int32 [k], the layers that are active in the next step
    inner: Any  # of the moments, float32


def sample_layers(
    key: jax.Array, step: ArrayLike, n_layers: int, k: int, interval: ArrayLike
) -> jax.Array:
    """The active layers of a step, a pure function of key and interval.

    Args:
        key: a typed key; every device that has it draws the same.
        step: number of the step, from 0 on.
        n_layers: number of layers.
        k: how many are active.
        interval: steps from one draw to the next.

    Returns:
        int32 `[k]`, ascending, without repetition.

    Raises:
        ValueError: if there are not so many layers.

    Examples:
        >>> key = jax.random.key(0)
        >>> [sample_layers(key, step, 6, 2, 10).tolist() for step in (0, 9, 10)]
        [[0, 2], [0, 2], [0, 3]]
    """
    if not 0 < k <= n_layers:
        raise ValueError(f"k={k} of {n_layers} layers cannot be active")
    key = jax.random.fold_in(key, jnp.asarray(step) // jnp.asarray(interval))
    drawn = jax.random.permutation(key, n_layers)[:k]
    return jnp.sort(drawn).astype(jnp.int32)


def lisa(
    learning_rate: optax.ScalarOrSchedule,
    layers: str | Sequence[str] | None,
    k: int = 2,
    interval: int = 20,
    *,
    state: Literal["reset_layers", "reset_all", "keep"] = "reset_layers",
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    weight_decay: Scalar = 0.0,
    inner: optax.GradientTransformation | None = None,
    key: jax.Array | int = 0,
) -> optax.GradientTransformationExtraArgs:
    """AdamW on k random layers and on what is in no layer.

    The layers of the next step are in the state, so that gradients need be taken of
    these alone; whole gradients are taken, too:

        chosen = state.active
        (loss, _), grads = layered_value_and_grad(parts)(params, batch, chosen=chosen)
        updates, state = tx.update(grads, state, params)

    A choice of your own is ``tx.update(..., chosen=chosen)``; the reset modes look at
    it in the first step of an interval.

    Structured weights stay as they are: over a base that is `wlab.Quantized`, what is
    dense in the sampled layers is trained, such as norms, biases and the factors of an
    adapter. The codes themselves have no moments: `wlab.optim.eco` trains these.

    Args:
        learning_rate: a number or a schedule over all steps; it never begins anew.
        layers: where the layers are, as in `wlab.core.Layered`; None: nowhere, and all
            is active always, as in AdamW.
        k: how many layers are active.
        interval: steps from one draw to the next.
        state: what becomes of moments when layers are drawn. "reset_layers": one that
            was not active before starts at zero, with its own bias correction.
            "reset_all": all start anew, and the ends do. "keep": all layers keep
            theirs, 8 bytes a parameter, each with its own count of steps.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay of what is active.
        inner: another direction than Adam's, without learning rate, such as
            `optax.scale_by_lion()`; decay comes on top.
        key: a random key or a seed for the draws, which are those of `sample_layers`.

    Returns:
        A gradient transformation that takes `chosen` and any other extra arguments. Its
        state has 8 bytes a parameter of the ends and of k layers, unless all are kept.

    Raises:
        ValueError: at build time for values out of range; at `init` for layers that are
            not found or not alike, or have nothing to train; at `update` for a gradient
            of a structured weight; it names the leaf.

    Examples:
        >>> params = {"blocks": jnp.ones((6, 2, 2)), "head": jnp.ones(3)}
        >>> tx = lisa(0.1, "blocks", k=2)
        >>> state = tx.init(params)
        >>> updates, new_state = tx.update(params, state, params)
        >>> state.active.tolist(), jnp.any(updates["blocks"], (1, 2)).tolist()
        ([0, 2], [True, False, True, False, False, False])
    """
    if state not in ("reset_layers", "reset_all", "keep"):
        raise ValueError(
            f"state {state!r} is none of 'reset_layers', 'reset_all', 'keep'"
        )
    if k < 1 or interval < 1:
        raise ValueError(f"k={k} and interval={interval} must be at least 1")
    draw_key = typed_key(key)
    direction = in_float32(
        optax.chain(
            optax.scale_by_adam(b1, b2, eps) if inner is None else inner,
            optax.add_decayed_weights(weight_decay),
        )
    )

    def rule(draw: subsets.Draw) -> jax.Array:
        given = draw.extra.get("chosen")
        if given is not None:
            return jnp.asarray(given)
        return sample_layers(draw_key, draw.step, draw.size, draw.k, interval)

    def cut(tree: Any) -> list[Any]:
        return [] if layers is None else [_pool(tree, layers, k)]

    keep = state == "keep"
    options: dict[str, Any] = {
        "slices": cut,
        "choose": rule,
        "every": interval,
        "reset": "all" if state == "reset_all" else "new",
    }
    rest = direction if state != "reset_all" else _restarted(direction, interval)
    base = subset(direction, k, rest=rest, key=draw_key, **options)
    if keep:
        base = drop(direction, layers, sampling="full", before=(), key=draw_key)

    def upcoming(held: Any, params: Any, count: jax.Array) -> jax.Array:
        """The layers that the next update will choose, in the order of their slots."""
        if layers is None or not leaves_with_paths(params):
            return jnp.zeros(0, jnp.int32)
        if keep:
            depth = find_layers(params, layers).depth
            return sample_layers(draw_key, count, depth, k, interval)
        (chosen,) = subsets.upcoming(held, params, k, **options).values()
        return chosen

    def init(params: Any) -> LisaState:
        count = jnp.zeros([], jnp.int32)
        dense = _dense(params)
        if layers is not None and leaves_with_paths(params):
            _pool(dense, layers, k)  # says what does not fit
        held = base.init(dense)
        return LisaState(count, upcoming(held, dense, count), held)

    def update(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        chosen: ArrayLike | None = None,
        **extra: Any,
    ) -> tuple[Any, Any]:
        if params is None:
            raise ValueError("lisa decays weights: call update(..., params)")
        dense = _dense(params)
        if state.active.size:
            extra["chosen"] = state.active if chosen is None else chosen
        grads = _gradients(updates, params, layers, as_they_are=keep)
        moved, held = base.update(grads, state.inner, dense, **extra)
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        changes = dict(leaves_with_paths(moved))

        def change(path: str, p: Any) -> Any:
            if is_weight(p):
                return jax.tree.map(jnp.zeros_like, p)
            u = changes[path]
            return (-jnp.asarray(rate, _wide(u)) * u.astype(_wide(u))).astype(p.dtype)

        count = jnp.asarray(optax.safe_increment(state.count))
        active = upcoming(held, dense, count)
        return map_with_path(change, params), LisaState(count, active, held)

    return optax.GradientTransformationExtraArgs(init, update)


# --- Trees ------------------------------------------------------------------------


def _dense(params: Any) -> Any:
    """The tree without its structured weights, which stay as they are."""
    return map_with_path(lambda _, x: None if is_weight(x) else x, params)


def _gradients(updates: Any, params: Any, layers: Any, *, as_they_are: bool) -> Any:
    """The gradients of what is dense; those of chosen layers in the place of layers."""
    compact = isinstance(updates, LayerGrads)
    named = leaves_with_paths(updates.rest if compact else updates)
    grads = dict(named)
    for path, leaf in leaves_with_paths(params):
        if is_weight(leaf) and path in grads:
            raise ValueError(
                f"leaf {path!r} of shape {leaf.shape} is a {type(leaf).__name__}, and "
                "there is a gradient of it, but AdamW has no step in its codes: take "
                "gradients of what is dense, as wlab.core.layered_value_and_grad does, "
                "train it with wlab.optim.eco, or materialise it"
            )
    if not compact or as_they_are:
        return updates
    found = find_layers(params, layers)
    rest = found.take(updates.rest)[1]
    stack = updates.layers
    if not found.stacked:
        stack = [stack, *[None] * (found.depth - 1)]
    return found.put(params, stack, rest)


def _pool(tree: Any, layers: str | Sequence[str], k: int) -> Any:
    """The layers as slices; `tree` has no structured weights."""
    found = find_layers(tree, layers)
    shapes = {path: tuple(jnp.shape(x)) for path, x in leaves_with_paths(tree)}
    if not 0 < k <= found.depth:
        raise ValueError(
            f"k={k} of the {found.depth} layers at {layers!r} cannot be active"
        )
    if found.stacked:
        inside = {path: shapes[path] for path in found.leaves}
        (pool,) = subsets.stack_pools(inside, k)
        return pool
    members: list[list[str]] = [[] for _ in range(found.depth)]
    for path, number in found.leaves.items():
        members[number or 0].append(path)
    kinds = [[shapes[path] for path in member] for member in members]
    for member, kind in zip(members, kinds, strict=True):
        if kind != kinds[0] or not kind:
            odd = member or members[0]
            raise ValueError(
                f"the layers at {layers!r} are not alike, or have nothing dense to "
                f"train: {odd[0]!r} and its siblings have shapes {kind}, those of the "
                f"first layer {kinds[0]}; leave the odd one out of layers="
            )
    return subsets.member_pool(members, shapes, k, str(layers))


# --- The direction ----------------------------------------------------------------


def _wide(x: Any) -> Any:
    return jnp.promote_types(jnp.result_type(x), jnp.float32)


class _Restarted(NamedTuple):
    count: jax.Array
    inner: Any


def _restarted(
    tx: optax.GradientTransformationExtraArgs, interval: int
) -> optax.GradientTransformationExtraArgs:
    """The transform, begun anew every few steps."""

    def init(params: Any) -> _Restarted:
        return _Restarted(jnp.zeros([], jnp.int32), tx.init(params))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        due = state.count % interval == 0
        begun = tx.init(updates if params is None else params)
        held = jax.tree.map(lambda a, b: jnp.where(due, a, b), begun, state.inner)
        out, held = tx.update(updates, held, params, **extra)
        return out, _Restarted(jnp.asarray(optax.safe_increment(state.count)), held)

    return optax.GradientTransformationExtraArgs(init, update)
