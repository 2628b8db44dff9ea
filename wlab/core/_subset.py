# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
r"""Only k of n slices are active now: an inner transform on them alone (a transform).

The slices are stacked layers, the columns, rows or entries of matrices, or whole
leaves. Which of them are active is chosen at run time, anew every few steps; shapes
are static. A step gathers the k slices, :math:`g_S`, lets the inner transform, whose
state is of size k and not n, make their updates, and puts these back among the others:

.. math::

    u_S = \mathrm{inner}(g_S), \qquad u_{\bar S} = \mathrm{outside}(g_{\bar S})

So a choice that changes compiles nothing again, and moments exist for the active
slices only. Layer-wise sampling (LISA, 2024), block and column selection (FRUGAL,
2024) and sparse fine-tuning (S2FT, 2024) are this transform with a rule of choice.

A rule is a function of a `Draw` that returns k distinct numbers below n:

    def loudest(draw):
        return jax.lax.top_k(draw.norms, draw.k)[1]
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from wlab.core import _sharding as sharding
from wlab.core._float32 import in_float32
from wlab.core._keys import fold_paths, typed_key
from wlab.core._lift import is_weight
from wlab.core._pools import Along as Along
from wlab.core._pools import Axes as Axes
from wlab.core._pools import Choose as Choose
from wlab.core._pools import Count as Count
from wlab.core._pools import Draw as Draw
from wlab.core._pools import Members as Members
from wlab.core._pools import Pool as Pool
from wlab.core._pools import Side as Side
from wlab.core._pools import ascending as ascending
from wlab.core._pools import at_random as at_random
from wlab.core._pools import choose_all, like, pools_of, whole
from wlab.core._pools import descending as descending
from wlab.core._pools import hidden_kernels as hidden_kernels
from wlab.core._pools import in_proportion as in_proportion
from wlab.core._pools import largest as largest
from wlab.core._pools import matrix_pool as matrix_pool
from wlab.core._pools import member_pool as member_pool
from wlab.core._pools import natural as natural
from wlab.core._pools import stack_pools as stack_pools
from wlab.core._tree import Select, Views, leaves_with_paths, map_with_path

Cut = Callable[[Any], Sequence[Pool]]
Reset = Literal["all", "new", "none", "keep"]
Slices = Literal["layers", "leaves"] | Side | Cut


class SubsetState(NamedTuple):
    """State of `subset`."""

    count: jax.Array  # int32, steps taken
    rounds: jax.Array  # int32, choices made
    key: jax.Array  # typed key of the choices
    choice: Any  # what is active, of each pool at its first leaf: int32 [..., k]
    inner: optax.OptState  # of the inner transform: of the active slices only
    rest: optax.OptState  # of the leaves in no pool


def subset(
    inner: optax.GradientTransformation,
    k: Count,
    *,
    slices: Slices = "layers",
    choose: Choose = at_random,
    every: int | jax.Array = 1,
    reset: Reset = "all",
    outside: Callable[[jax.Array], jax.Array] | None = None,
    rest: optax.GradientTransformation | None = None,
    select: Select | None = None,
    views: Views | None = None,
    key: jax.Array | int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Applies an inner transform to k of n slices, chosen anew every few steps.

    The choice is made before the update, in the first step and then after each `every`
    steps, from the current gradients. The random key of a choice depends on `key`,
    the pool's name and the round, so every device draws the same, and so does a run
    that is restored. The inner transform sees gradients, and parameters, in float32
    (float64 stays), in a tree like the parameters that has the active slices in the
    place of their leaf; a learning rate with a schedule belongs behind this transform,
    as the inner step count may begin anew.

    Gradients of layers may hold the k chosen ones only, ``[k, ...]`` in the order of
    the choice, where the parameters have ``[n, ...]`` (for layers that are written out:
    in the place of the first layer, and none for the others). `upcoming` tells the
    choice before they are taken. This needs `params`.

    On a mesh the active slices are gathered from the devices that hold them, whole
    along the axis they are chosen from and divided as their leaf along the others.

    Args:
        inner: the transform of the active slices, such as `optax.scale_by_adam()`.
        k: how many, or a function of how many there are. 0 needs `outside`.
        slices: of what. "layers": stacked ones (a leading axis, as under `nn.scan`) or
            ones written out (``blocks_0``, ``blocks_1``, ..., alike in all shapes); all
            leaves of a layer share one choice, and stacks of other lengths or under
            other top-level names choose apart. "columns", "rows": the inputs, or the
            outputs, of each matrix; "entries": of each matrix, with 4 more bytes of
            state for each index. Matrices draw apart, those stacked in one leaf as
            well. "leaves": whole leaves; those of one shape share slots of it, and if
            there are several shapes, all share flat slots of the largest one's size.
            Or a function from a tree to its pools.
        choose: the rule of choice.
        every: steps from one choice to the next; may be traced.
        reset: what a new choice does to the inner state. "all": it begins anew, bias
            correction too; "none": it goes on, slot by slot, whatever slice is there
            now; "new": slices drawn again go on and the others begin anew, each with
            its own step count. With "new" the inner transform is mapped over the
            slices and sees one; with the others it sees all k along an axis. "keep":
            as "new", and each of the n slices has a state of its own, which waits
            while the slice is not active: states of size n, work for k.
        outside: the update of what is not active, entry by entry from the gradient;
            None: zero.
        rest: the transform of the leaves that are in no slice, structured weights
            among them as they are; None leaves their gradients as they are.
        select: which leaves are sliced, as in `wlab.core.select`. With "layers" each of
            them is a stack along its first axis. None: all layers found; or kernels
            of linear layers and convolutions.
        views: which axes of a leaf are inputs and outputs, where names do not tell.
        key: a random key or a seed for the choices.

    Returns:
        A gradient transformation that takes any extra arguments and hands them to
        the rule, to `inner` and to `rest`.

    Raises:
        ValueError: for a bad argument; at `init` for a pattern that matches nothing, a
            stack that is not found, k above n, k of 0 without `outside`; the message
            names the leaf, its shape and what to do.
        TypeError: for a leaf that is a structured weight.

    Examples:
        >>> params = {"blocks": jnp.zeros((6, 2, 2)), "head": jnp.zeros(3)}
        >>> tx = subset(
        ...     optax.scale_by_adam(),
        ...     k=2,
        ...     select="blocks",
        ...     choose=ascending,
        ...     every=5,
        ... )
        >>> state = tx.init(params)
        >>> state.inner.mu["blocks"].shape
        (2, 2, 2)
        >>> updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state)
        >>> updates["blocks"][:, 0, 0].round(3).tolist()
        [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    """
    _check_arguments(k, every, reset)
    base = in_float32(inner)
    others = optax.identity() if rest is None else in_float32(rest)
    cut = functools.partial(
        _checked_pools,
        k=k,
        slices=slices,
        select=select,
        views=views,
        outside=outside is not None,
    )

    def inner_of(pools: Sequence[Pool]) -> optax.GradientTransformationExtraArgs:
        return _each_slot(base, pools) if reset in ("new", "keep") else base

    def start(params: Any) -> Any:
        pools, leaves = cut(params), dict(leaves_with_paths(params))
        choice = {pool.paths[0]: pool.start(leaves) for pool in pools}
        active = _at(_take(pools, leaves, choice), params)
        if reset == "keep":
            active = _at(_take(pools, leaves, _everything(pools, choice)), params)
        return SubsetState(
            count=jnp.zeros([], jnp.int32),
            rounds=jnp.zeros([], jnp.int32),
            key=typed_key(key),
            choice=_at(choice, params),
            inner=inner_of(pools).init(active),
            rest=others.init(_at(_free(pools, leaves), params)),
        )

    def init(params: Any) -> Any:
        return _placed(start, params)

    def update(
        updates: Any, state: Any, params: Any = None, **extra: Any
    ) -> tuple[Any, Any]:
        tree = updates if params is None else params
        pools, leaves = cut(tree), dict(leaves_with_paths(tree))
        grads = dict(leaves_with_paths(updates))
        complete = {p.paths[0]: _is_whole(p, grads, leaves) for p in pools}
        given = {path: grads if known else None for path, known in complete.items()}
        due, old, choice = _choices(pools, state, choose, every, reset, given, extra)

        def tree_of(values: Mapping[str, Any]) -> Any:
            return _at(values, tree)

        taken: dict[str, jax.Array] = {}
        for pool in pools:
            if complete[pool.paths[0]]:
                taken |= pool.take(grads, choice[pool.paths[0]])
            elif outside is None:
                taken |= {path: grads[path] for path in pool.homes}
            else:
                raise ValueError(
                    f"the gradient of {pool.name!r} holds {pool.k} chosen slices, and "
                    "outside= moves the others by theirs: give whole gradients"
                )
        active = tree_of(taken)
        held = None if params is None else tree_of(_take(pools, leaves, choice))
        tx, inner_state = inner_of(pools), state.inner
        waiting: dict[str, Any] = {}
        if reset == "keep":
            waiting = _subtrees(active, inner_state)
            inner_state = tree_of({p: _slots(x, choice[p]) for p, x in waiting.items()})
        elif reset != "none":
            # By selection: a branch would copy the state in every step.
            begun = tx.init(active if held is None else held)
            if reset == "all":
                inner_state = _where(due, begun, inner_state)
            else:
                begun, kept = _subtrees(active, begun), _subtrees(active, inner_state)
                fresh = {path: choice[path] != old[path] for path in begun}
                inner_state = tree_of(
                    {p: _where(fresh[p], begun[p], kept[p]) for p in begun}
                )
        active, inner_state = tx.update(active, inner_state, held, **extra)
        if reset == "keep":
            moved_states = _subtrees(active, inner_state)
            inner_state = tree_of(
                {
                    p: _into_slots(waiting[p], choice[p], x)
                    for p, x in moved_states.items()
                }
            )
        slices = dict(leaves_with_paths(active))

        free = tree_of(_free(pools, grads))
        free_params = None if params is None else tree_of(_free(pools, leaves))
        free, rest_state = optax.with_extra_args_support(others).update(
            free, state.rest, free_params, **extra
        )
        new = dict(leaves_with_paths(free))
        for pool in pools:
            known = complete[pool.paths[0]]
            moved = pool.put(
                slices,
                choice[pool.paths[0]],
                grads if known else leaves,
                outside if known and outside is not None else jnp.zeros_like,
            )
            for path, u in moved.items():
                new[path] = u.astype(grads[path if known else pool.homes[0]].dtype)
        # A gradient that is not there, of a leaf that is frozen, is no update.
        out = map_with_path(lambda path, _: new.get(path), tree)
        return out, SubsetState(
            count=jnp.asarray(optax.safe_increment(state.count)),
            rounds=state.rounds + due,
            key=state.key,
            choice=tree_of(choice),
            inner=inner_state,
            rest=rest_state,
        )

    return optax.GradientTransformationExtraArgs(init, update)


def upcoming(
    state: SubsetState,
    params: Any,
    k: Count,
    *,
    slices: Slices = "layers",
    choose: Choose = at_random,
    every: int | jax.Array = 1,
    reset: Reset = "all",
    select: Select | None = None,
    views: Views | None = None,
) -> dict[str, jax.Array]:
    """What the next update will choose, before there are gradients.

    So that gradients need be taken of the active slices only, as
    `wlab.core.layered_value_and_grad` does with ``chosen=``. It is a pure function of
    the state's key and counts, and of the rule, which must not look at gradients.

    Args:
        state: of the transform that `subset` made.
        params: the parameters, abstract ones too.
        k: as given to `subset`, and so are the others.
        slices: as in `subset`.
        choose: as in `subset`.
        every: as in `subset`.
        reset: as in `subset`.
        select: as in `subset`.
        views: as in `subset`.

    Returns:
        For each pool, by its name (``blocks[6]`` for a stack of six layers below
        ``blocks``, ``blocks_*`` for layers that are written out, the path of a
        matrix), its choice, int32 ``[..., k]``.

    Raises:
        ValueError: as `subset` does; for a rule that looks at gradients.

    Examples:
        >>> params = {"blocks": jnp.zeros((6, 2, 2))}
        >>> options = dict(k=2, select="blocks", choose=descending, every=5)
        >>> state = subset(optax.scale_by_adam(), **options).init(params)
        >>> {name: x.tolist() for name, x in upcoming(state, params, **options).items()}
        {'blocks[6]': [5, 4]}
    """
    _check_arguments(k, every, reset)
    # Whether a choice of none is an error is for `subset` to say.
    pools = _checked_pools(
        params, k=k, slices=slices, select=select, views=views, outside=True
    )
    given = dict.fromkeys(pool.paths[0] for pool in pools)
    choice = _choices(pools, state, choose, every, reset, given, {})[2]
    return {pool.name: choice[pool.paths[0]] for pool in pools}


# --- The choice ------------------------------------------------------------------


def _choices(
    pools: Sequence[Pool],
    state: SubsetState,
    rule: Choose,
    every: int | jax.Array,
    reset: Reset,
    grads: Mapping[str, Any],
    extra: Mapping[str, Any],
) -> tuple[jax.Array, dict[str, jax.Array], dict[str, jax.Array]]:
    """Whether a choice is due, the one before and the one now, by first leaf."""
    due = state.count % jnp.asarray(every).astype(jnp.int32) == 0
    old = dict(leaves_with_paths(state.choice))

    live = [pool for pool in pools if pool.k]

    def drawn() -> dict[str, jax.Array]:
        keys = fold_paths(state.key, [pool.name for pool in live])
        keys = jax.vmap(jax.random.fold_in, (0, None))(keys, state.rounds)
        draws = [
            Draw(
                name=pool.name,
                size=pool.size,
                k=pool.k,
                key=key,
                round=state.rounds,
                step=state.count,
                norms=None,
                previous=old[pool.paths[0]],
                extra=extra,
            )
            for pool, key in zip(live, keys, strict=True)
        ]
        found = choose_all(live, rule, draws, [grads[p.paths[0]] for p in live])
        out = dict(old)
        for draw, now, pool in zip(draws, found, live, strict=True):
            if reset == "new":
                now = _in_old_slots(draw.previous, now)
            out[pool.paths[0]] = now
        return out

    now = jax.lax.cond(due, drawn, lambda: old)
    return due, old, {p: whole(x) if _is_index(x) else x for p, x in now.items()}


def _is_index(choice: jax.Array) -> bool:
    return jnp.issubdtype(choice.dtype, jnp.integer)


def _in_old_slots(old: jax.Array, new: jax.Array) -> jax.Array:
    """The new choice, in which what was active before keeps its slot."""

    def one(old: jax.Array, new: jax.Array) -> jax.Array:
        stays = jnp.isin(old, new)
        # Those that come, in order, to the slots that are free, in order.
        comes = new[jnp.argsort(jnp.isin(new, old), stable=True)]
        free = jnp.cumsum(~stays) - 1
        return jnp.where(stays, old, comes[jnp.maximum(free, 0)])

    for _ in range(old.ndim - 1):
        one = jax.vmap(one)
    return one(old, new)


# --- Checks ----------------------------------------------------------------------


def _check_arguments(k: Count, every: int | jax.Array, reset: str) -> None:
    if isinstance(every, int) and every < 1:
        raise ValueError(f"every={every} must be at least 1 step")
    if isinstance(k, int) and k < 0:
        raise ValueError(f"k={k} must not be negative")
    if reset not in ("all", "new", "none", "keep"):
        raise ValueError(f"reset {reset!r} is none of 'all', 'new', 'none', 'keep'")


def _checked_pools(
    tree: Any, *, k: Count, slices: Slices, outside: bool, **options: Any
) -> list[Pool]:
    """The pools of a tree; none for a tree without leaves."""
    leaves = dict(leaves_with_paths(tree))
    if not leaves:
        return []
    if callable(slices):
        pools = [*slices(tree)]
    else:
        pools = pools_of(tree, k=k, slices=slices, **options)
    for pool in pools:
        where = f"leaf {pool.paths[0]!r} of shape {jnp.shape(leaves[pool.paths[0]])}"
        if len(pool.paths) > 1:
            where = f"{pool.name!r} ({where} and {len(pool.paths) - 1} others)"
        if not 0 <= pool.k <= pool.size:
            raise ValueError(
                f"{where}: k={pool.k} of {pool.size} slices cannot be active; k is at "
                f"most {pool.size}"
            )
        if not pool.k and not outside:
            raise ValueError(
                f"{where}: none of its {pool.size} slices would be active, and it "
                "would never move; take a larger k or share, leave it out of select=, "
                "or say with outside= what moves it"
            )
        for path in pool.paths:
            if is_weight(leaves[path]):
                raise TypeError(
                    f"leaf {path!r} of shape {leaves[path].shape} is a "
                    f"{type(leaves[path]).__name__}: slices are taken of arrays; name "
                    "others with select="
                )
    return pools


def _is_whole(pool: Pool, grads: Mapping[str, Any], leaves: Mapping[str, Any]) -> bool:
    """Whether a pool's gradients are whole; else they are the chosen slices alone."""

    def shape(path: str) -> Any:
        return jnp.shape(grads[path]) if path in grads else None

    wrong = [path for path in pool.paths if shape(path) != jnp.shape(leaves[path])]
    if not wrong:
        return True
    slots = jax.eval_shape(lambda x: pool.take(x, pool.start(x)), leaves)
    if slots and all(shape(path) == slots[path].shape for path in pool.homes):
        return False
    path = wrong[0]
    got = f"of shape {shape(path)}" if path in grads else "missing"
    raise ValueError(
        f"the gradient of leaf {path!r} is {got}; the leaf has shape "
        f"{jnp.shape(leaves[path])}"
    )


# --- The inner transform ---------------------------------------------------------


def _each_slot(
    tx: optax.GradientTransformationExtraArgs, pools: Sequence[Pool]
) -> optax.GradientTransformationExtraArgs:
    """The transform mapped over slots: a tree of states, one at the home of each pool.

    It is handed one slice and so counts the steps of each.
    """

    def parts(pool: Pool, *trees: Any) -> list[dict[str, jax.Array]]:
        found = [dict(leaves_with_paths(tree)) for tree in trees if tree is not None]
        return [{path: leaves[path] for path in pool.homes} for leaves in found]

    def mapped(fn: Callable[..., Any], pool: Pool) -> Callable[..., Any]:
        for _ in range(pool.lead + 1):
            fn = jax.vmap(fn)
        return fn

    live = [pool for pool in pools if pool.k]

    def init(params: Any) -> Any:
        states = {}
        for pool in live:
            (held,) = parts(pool, params)
            first = held[pool.homes[0]]
            # Mapped over the same devices, which a count does not tell by itself.
            states[pool.paths[0]] = jax.tree.map(
                lambda x, first=first, n=pool.lead + 1: like(x, first, n),
                mapped(tx.init, pool)(held),
            )
        return _at(states, params)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        states, moved, after = _subtrees(updates, state), {}, {}
        run = functools.partial(tx.update, **extra)
        for pool in live:
            g, *p = parts(pool, updates, params)
            home = pool.paths[0]
            out, after[home] = mapped(run, pool)(g, states[home], *p)
            moved |= out
        return _at(moved, updates), _at(after, updates)

    return optax.GradientTransformationExtraArgs(init, update)


def _everything(pools: Sequence[Pool], choice: Mapping[str, Any]) -> dict[str, Any]:
    """The choice of all slices of each pool."""
    out = {}
    for pool in pools:
        old = choice[pool.paths[0]]
        if not _is_index(old):
            raise ValueError(
                "reset='keep' goes with slices that are numbered, not with the "
                f"entries of {pool.name!r}"
            )
        every = jnp.arange(pool.size, dtype=old.dtype)
        out[pool.paths[0]] = jnp.broadcast_to(every, (*old.shape[:-1], pool.size))
    return out


def _slots(states: Any, choice: jax.Array) -> Any:
    """The chosen slices' states, of all slices'."""

    def take(x: jax.Array, i: jax.Array) -> jax.Array:
        return x[i]

    for _ in range(choice.ndim - 1):
        take = jax.vmap(take)
    return jax.tree.map(lambda x: take(x, choice), states)


def _into_slots(states: Any, choice: jax.Array, new: Any) -> Any:
    """All slices' states, with those of the chosen ones replaced."""

    def put(x: jax.Array, i: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.asarray(x).at[i].set(y)

    for _ in range(choice.ndim - 1):
        put = jax.vmap(put)
    return jax.tree.map(lambda x, y: put(x, choice, y), states, new)


def _where(fresh: jax.Array, new: Any, old: Any) -> Any:
    """Leaf by leaf, over the leading axes that `fresh` has."""

    def pick(new: jax.Array, old: jax.Array) -> jax.Array:
        if not fresh.ndim:
            return jax.lax.select(fresh, new, old)
        mask = jnp.expand_dims(fresh, [*range(fresh.ndim, new.ndim)])
        mask = like(jnp.broadcast_to(mask, new.shape), new)
        return jnp.where(mask, new, like(old, new))

    return jax.tree.map(pick, new, old)


# --- Trees -----------------------------------------------------------------------


def _at(values: Mapping[str, Any], tree: Any) -> Any:
    """A tree like another one that has values at some places, and no others."""

    def here(path: str, _: Any) -> Any:
        return values[path] if path in values else optax.MaskedNode()

    return map_with_path(here, tree)


def _subtrees(tree: Any, other: Any) -> dict[str, Any]:
    """What stands in another tree at the leaves of a tree, where anything does."""
    out: dict[str, Any] = {}

    def find(path: str, _: Any, subtree: Any) -> None:
        if not isinstance(subtree, optax.MaskedNode):
            out[path] = subtree

    map_with_path(find, tree, other)
    return out


def _take(
    pools: Iterable[Pool],
    leaves: Mapping[str, jax.Array],
    choice: Mapping[str, jax.Array],
) -> dict[str, jax.Array]:
    out: dict[str, jax.Array] = {}
    for pool in pools:
        out |= pool.take(leaves, choice[pool.paths[0]])
    return out


def _placed(fn: Callable[[Any], Any], tree: Any) -> Any:
    """A function's result, divided like its argument, on a mesh of Auto axes too."""
    leaves = jax.tree.leaves(tree)
    if not leaves or any(sharding.mesh_of(x) is None for x in leaves):
        return fn(tree)
    placed = jax.tree.map(lambda x: x.sharding, tree)
    return jax.device_put(fn(tree), sharding.derive(fn, tree, placed))


def _free(pools: Iterable[Pool], leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves that are in no pool."""
    held = {path for pool in pools for path in pool.paths}
    return {path: leaf for path, leaf in leaves.items() if path not in held}
