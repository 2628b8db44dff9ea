# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
r"""Any transform on the layers from a random cut on (a transform).

A cut is drawn for every step. The layers from it on take a step; those below keep their
weights and their state as they are, so that neither their backward pass nor their
update need be computed. The gradients of a suffix, at the cost of a suffix, are those
of `wlab.core.layered_value_and_grad`.

References:
    Gruntkowska, Maziane, Qu and Richtarik, `Drop-Muon: Update Less, Converge Faster
    <https://arxiv.org/abs/2510.02239>`_, 2025.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.typing import ArrayLike

from wlab.core import (
    LayerGrads,
    Layers,
    Select,
    describe,
    find_layers,
    is_weight,
    leaves_with_paths,
    map_with_path,
    sharding,
    typed_key,
)
from wlab.core import select as selected

Sampling = Literal["uniform", "epoch_shift", "full"] | Sequence[float] | jax.Array


class DropState(NamedTuple):
    """State of `drop` and `drop_muon`."""

    count: jax.Array  # int32, steps taken
    key: jax.Array  # typed key of the cuts
    start: jax.Array  # int32, the first layer that is active in the next step
    layers: Any  # of the inner transform: a state with a layer axis, or one a layer
    rest: Any  # of the transform of what is in no layer


def sample_start(
    key: jax.Array,
    step: ArrayLike,
    depth: int,
    kind: Sampling = "uniform",
    *,
    progress: ArrayLike = 0.0,
    alpha: float = 0.5,
) -> jax.Array:
    """The first active layer of a step, a pure function of key and step.

    Args:
        key: a typed key; every device that has it draws the same.
        step: number of the step.
        depth: number of layers; each draw lies in 0 to ``depth - 1``.
        kind: "uniform", which the paper's experiments use: half of the layers, and half
            of one, are active on average. "epoch_shift": cuts near the input early in
            training and near the output late. "full": always 0, which is Muon. Or the
            probabilities of the cuts, `[depth]`.
        progress: for "epoch_shift", the part of training that is done, 0 to 1.
        alpha: for "epoch_shift", how uneven the draw is.

    Returns:
        An int32 scalar.

    Raises:
        ValueError: for an unknown kind, or probabilities of another length.

    Examples:
        >>> key = jax.random.key(0)
        >>> [int(sample_start(key, step, 4)) for step in range(5)]
        [0, 2, 1, 2, 1]
    """
    if isinstance(kind, str):
        if kind not in ("uniform", "epoch_shift", "full"):
            raise ValueError(
                f"kind {kind!r} is none of 'uniform', 'epoch_shift', 'full', and no "
                "array of probabilities"
            )
        if kind == "full":
            return jnp.zeros([], jnp.int32)
        i = jnp.arange(depth, dtype=jnp.float32)
        logits = jnp.zeros(depth)
        if kind == "epoch_shift":
            logits = alpha * ((1 - progress) * (depth - 1 - i) + progress * i)
    else:
        given = jnp.asarray(kind, jnp.float32)
        if given.shape != (depth,):
            raise ValueError(
                f"the probabilities of the cuts have shape {given.shape}: give one for "
                f"each of {depth} layers"
            )
        logits = jnp.log(given)
    drawn = jax.random.categorical(jax.random.fold_in(key, step), logits)
    return drawn.astype(jnp.int32)


def drop(
    tx: optax.GradientTransformation,
    layers: str | Sequence[str] | None,
    *,
    rest: optax.GradientTransformation | None = None,
    sampling: Sampling = "uniform",
    progress: Callable[[jax.Array], ArrayLike] | None = None,
    before: Select | None = None,
    key: jax.Array | int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Any transform on the layers from a random cut on; see `drop_muon`.

    The transform has a state for each layer and is run for the active layers alone. It
    sees a tree like the parameters that has leaves in one layer only. What it counts
    are the steps in which the layer was active: a schedule inside goes on with these.
    Over quantised weights, such as ``drop(eco_muon(1e-2), "blocks", rest=...)``,
    frozen layers keep codes, scales and momentum to the bit.

    Args:
        tx: the transform of a layer, in which no leaf depends on other layers.
        layers: as in `drop_muon`.
        rest: of what is in no layer; None: `tx`.
        sampling: as in `drop_muon`.
        progress: as in `drop_muon`.
        before: as in `drop_muon`.
        key: as in `drop_muon`.

    Returns:
        A gradient transformation that takes `start`, `chosen` and any other extra
        arguments.

    Raises:
        ValueError: at `init`, as `drop_muon` does, and for stacked structured weights
            that cannot be cut into layers.
    """
    one = optax.with_extra_args_support(tx)
    other = one if rest is None else optax.with_extra_args_support(rest)

    def first(params: Any) -> Any:
        return before_layers(params, before)

    return drop_with(
        lambda _: one, lambda _: other, layers, first, sampling, progress, key
    )


# --- Active layers alone ---------------------------------------------------------


def drop_with(
    layer_tx: Callable[[Any], optax.GradientTransformationExtraArgs],
    rest_tx: Callable[[Any], optax.GradientTransformationExtraArgs],
    layers: str | Sequence[str] | None,
    before: Callable[[Any], set[str]],
    sampling: Sampling,
    progress: Callable[[jax.Array], ArrayLike] | None,
    key: jax.Array | int,
) -> optax.GradientTransformationExtraArgs:
    """The transform; those of layers and rest may depend on the tree."""
    full = isinstance(sampling, str) and sampling == "full"

    def draw(key: jax.Array, count: jax.Array, depth: int) -> jax.Array:
        done = 0.0 if progress is None else progress(count)
        return sample_start(key, count, depth, sampling, progress=done)

    def found_in(params: Any) -> Layers | None:
        if layers is None or is_empty(params):
            return None
        found = find_layers(params, layers)
        if found.stacked:
            _check_stack(found, params)
        return found

    def ends(found: Layers | None, like: Any, tree: Any) -> tuple[Any, Any]:
        """What is in no layer: active always, and with the first layer only."""
        if tree is None:
            return None, None
        first = set() if found is None else before(like)
        if found is not None:
            tree = found.put(like, None, found.take(tree)[1])

        def part(kept: bool) -> Any:
            return map_with_path(lambda p, x: x if (p in first) == kept else None, tree)

        return part(False), part(True)

    def init(params: Any) -> DropState:
        count, held = jnp.zeros([], jnp.int32), typed_key(key)
        found = found_in(params)
        tx, other = layer_tx(params), rest_tx(params)
        if found is None:
            state: Any = tx.init(ends(found, params, params)[1])
        elif found.stacked:
            state = _stack_init(found, tx.init, params)
        else:
            stack, _ = found.take(params)
            each = (_only(found, params, i, x) for i, x in enumerate(stack))
            state = tuple(map(tx.init, each))
        return DropState(
            count=count,
            key=held,
            start=draw(held, count, 1 if found is None else found.depth),
            layers=state,
            rest=tuple(map(other.init, ends(found, params, params))),
        )

    def update(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        start: ArrayLike | None = None,
        chosen: ArrayLike | None = None,
        **extra: Any,
    ) -> tuple[Any, Any]:
        like = updates if params is None else params
        found = found_in(like)
        depth = 1 if found is None else found.depth
        if start is not None and chosen is not None:
            raise ValueError("give start= or chosen=, not both: each names the layers")
        choice = _active(state.start if start is None else start, chosen, depth)
        run, run_rest = (
            functools.partial(make(like).update, **extra)
            for make in (layer_tx, rest_tx)
        )
        compact = isinstance(updates, LayerGrads)
        if compact and (chosen is None or params is None or found is None):
            raise ValueError(
                "gradients of chosen layers alone need the parameters, their layers "
                "and chosen=, which says which they are"
            )
        halves = ends(found, like, updates.rest if compact else updates)
        (g, g_first), (p, p_first) = halves, ends(found, like, params)
        always, always_state = run_rest(g, state.rest[0], p)
        first, first_state = _if(
            choice.first, run_rest, g_first, state.rest[1], p_first
        )
        out = jax.tree.map(
            lambda a, b: b if a is None else a,
            *(always, first),
            is_leaf=lambda x: x is None or is_weight(x),
        )
        layer_state = state.layers
        if found is not None:
            each = _stack_update if found.stacked else _list_update
            grads = updates.layers if compact else found.take(updates)[0]
            stack = None if params is None else found.take(params)[0]
            new, layer_state = each(
                found, run, like, grads, state.layers, stack, choice, compact
            )
            out = found.put(like, new, found.take(out)[1])
        count = jnp.asarray(optax.safe_increment(state.count))
        return out, DropState(
            count=count,
            key=state.key,
            start=state.start if full else draw(state.key, count, depth),
            layers=layer_state,
            rest=(always_state, first_state),
        )

    return optax.GradientTransformationExtraArgs(init, update)


class _Active(NamedTuple):
    """Which layers are active: those from `start` on, or the chosen ones."""

    start: Any
    chosen: jax.Array | None
    first: Any  # whether what comes before the layers is

    def holds(self, i: int) -> Any:
        if self.chosen is None:
            return i >= self.start
        return jnp.any(self.chosen == i)


def _active(start: Any, chosen: Any, depth: int) -> _Active:
    if chosen is not None:
        return _Active(None, jnp.asarray(chosen), True)
    if isinstance(start, int) and not 0 <= start < depth:
        raise ValueError(
            f"start={start} is out of range: of {depth} layers the first active one is "
            f"0 to {depth - 1}"
        )
    return _Active(start, None, start == 0)


def _stack_init(found: Layers, init: Callable[[Any], Any], params: Any) -> Any:
    """A state for each layer, with a layer axis."""
    stack, _ = found.take(params)
    state = jax.vmap(lambda x: init(found.put(params, x, None)))(stack)

    def own_key(x: jax.Array) -> jax.Array:
        if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return x
        return jax.vmap(jax.random.fold_in)(x, jnp.arange(found.depth))

    state = jax.tree.map(own_key, state)
    if sharding.mesh_of(stack) is None:
        return state
    # Where the state of the whole stack would be.
    placed = init(found.put(params, stack, None))
    return jax.tree.map(
        lambda x, y: jax.device_put(x, y.sharding) if x.shape == y.shape else x,
        state,
        placed,
    )


def _stack_update(
    found: Layers,
    run: Any,
    like: Any,
    grads: Any,
    state: Any,
    stack: Any,
    choice: _Active,
    compact: bool,
) -> tuple[Any, Any]:
    """Layers with a layer axis: a loop over the active ones."""
    chosen = choice.chosen

    def body(j: Any, carry: Any) -> Any:
        out, state = carry
        i = j if chosen is None else chosen[j]
        g = _at(grads, j if compact else i)
        p = None if stack is None else found.put(like, _at(stack, i), None)
        new, new_state = run(found.put(like, g, None), _at(state, i), p)
        return _set(out, i, found.take(new)[0]), _set(state, i, new_state)

    def change(g: Any, state: Any, p: Any) -> Any:
        """One layer's update, whose structure packed weights have, not gradients."""
        p = None if p is None else found.put(like, p, None)
        return found.take(run(found.put(like, g, None), state, p)[0])[0]

    source = grads if stack is None else stack
    one = jax.eval_shape(change, *(_at(t, 0) for t in (grads, state, stack)))
    out = jax.tree.map(lambda s, x: jnp.zeros_like(x, dtype=s.dtype), one, source)
    low, high = (choice.start, found.depth) if chosen is None else (0, chosen.shape[0])
    return lax.fori_loop(low, high, body, (out, state))


def _list_update(
    found: Layers,
    run: Any,
    like: Any,
    grads: Any,
    state: Any,
    stack: Any,
    choice: _Active,
    compact: bool,
) -> tuple[Any, Any]:
    """Layers one by one: a branch for each."""
    out, states = [], []
    for i in range(found.depth):
        if compact:
            slot = jnp.argmax(choice.chosen == i)
            g = _at(grads, slot)
        else:
            g = grads[i]
        p = None if stack is None else _only(found, like, i, stack[i])
        new, after = _if(choice.holds(i), run, _only(found, like, i, g), state[i], p)
        out.append(found.take(new)[0][i])
        states.append(after)
    return out, tuple(states)


def _if(active: Any, run: Any, g: Any, state: Any, p: Any) -> tuple[Any, Any]:
    """The transform, or no update and the state as it is: one of them is computed."""

    def keep(g: Any, state: Any, p: Any) -> Any:
        out = jax.eval_shape(lambda *args: run(*args)[0], g, state, p)
        source = g if p is None else p
        return jax.tree.map(
            lambda s, x: jnp.zeros_like(x, dtype=s.dtype), out, source
        ), state

    if isinstance(active, bool):
        return (run if active else keep)(g, state, p)
    return lax.cond(active, run, keep, g, state, p)


def _only(found: Layers, like: Any, i: int, layer: Any) -> Any:
    """A tree that has leaves in one layer of a list only."""
    return found.put(
        like, [layer if j == i else None for j in range(found.depth)], None
    )


def _at(tree: Any, i: Any) -> Any:
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, i, 0, False), tree)


def _set(tree: Any, i: Any, new: Any) -> Any:
    return jax.tree.map(
        lambda x, y: lax.dynamic_update_index_in_dim(x, y, i, 0), tree, new
    )


def _check_stack(found: Layers, params: Any) -> None:
    for path, leaf in leaves_with_paths(params):
        if path in found.leaves and any(
            jnp.shape(x)[:1] != (found.depth,) for x in jax.tree.leaves(leaf)
        ):
            raise ValueError(
                f"leaf {path!r} of shape {jnp.shape(leaf)} is a {type(leaf).__name__} "
                f"whose arrays do not all lead with the {found.depth} layers: write "
                "the layers out, or train its parts as arrays"
            )


def before_layers(params: Any, before: Select | None) -> set[str]:
    """The leaves outside the layers that are active with cut 0 only."""
    if before is not None:
        if before == ():
            return set()
        return {p for p, hit in leaves_with_paths(selected(params, before)) if hit}
    leaves = describe(params)
    if not any(leaf.role == "head" for leaf in leaves):
        return set()
    return {leaf.path for leaf in leaves if leaf.role == "embedding"}


def is_empty(tree: Any) -> bool:
    """Whether a tree has no leaves, placeholders aside."""
    return not leaves_with_paths(tree)
