# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
r"""Gradients over a stack of layers that do not pay for what is frozen.

A model's loss is given in three parts: what comes before the layers, the layers, and
what comes after them. The forward pass runs all of it. The backward pass stops at a
layer that is known at run time only, and forms weight gradients of the active layers
only:

.. math::

    x_{i+1} = f(W_i, x_i), \qquad
    g_i = g_{i+1}\,\partial f / \partial x_i, \qquad
    G_i = g_{i+1}\,\partial f / \partial W_i \;\text{ for active } i

Masking the gradients of a whole backward pass gives the same numbers and saves nothing,
for then the compiler must keep all of it. Here stacked layers keep what each layer's
backward pass needs in arrays with a layer axis, and a loop with a bound at run time
goes back over them; layers in a list have a `lax.cond` each. Either is one program for
all choices, which gives the numbers of `jax.grad`.
"""

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from wlab.core import _sharding as sharding
from wlab.core._lift import is_weight
from wlab.core._tree import leaves_with_paths, matching, path_of

Metrics = dict[str, jax.Array]


class Layered(NamedTuple):
    """A model's loss as `after(params, layers(before(params, batch)), batch)`.

    What goes from layer to layer, `x`, is a pytree of float arrays. All functions see
    the whole batch, so a mask or positions need not travel in `x`.

    Attributes:
        before: `before(params, batch)` returns the first layer's input.
        block: `block(layer, x, batch)` returns the next layer's input, where `layer`
            is one layer's part of the parameters. A sequence gives each layer of a
            list its own function. It may be lifted (`wlab.lift`), for layers with
            structured weights.
        after: `after(params, x, batch)` returns the loss, a scalar, or the loss and a
            dict of metrics.
        layers: the path of the layers in the parameters, as `wlab.explain` shows it:
            of one subtree whose arrays all have a leading layer axis; of a list; or
            with ``*`` for the number in the names of several (``blocks_*``). Or the
            paths of all layers, in their order.
        extras: whether `block` returns a pair, whose second half (a router's losses,
            say) reaches `after(params, x, batch, extras)`: stacked layers' with a
            leading layer axis, those of a list as a list.
        remat: whether only each layer's input is kept, and the rest of its forward
            pass is run again where its backward pass needs it.
    """

    before: Callable[[Any, Any], Any]
    block: Callable[..., Any] | Sequence[Callable[..., Any]]
    after: Callable[..., Any]
    layers: str | Sequence[str] = "layers"
    extras: bool = False
    remat: bool = False


class LayerGrads(NamedTuple):
    """Gradients of chosen layers alone, and of what is in no layer."""

    layers: Any  # like one layer; arrays lead with an axis of the chosen layers
    rest: Any  # like the parameters, with None in the place of the layers


class Layers(NamedTuple):
    """Where the layers of a tree are, and how it is taken apart at them."""

    depth: int  # number of layers
    stacked: bool  # whether the leaves of the layers lead with a layer axis
    leaves: dict[str, int | None]  # path of each such leaf to its layer; None: stacked
    outer: Any  # structure of the tree with each part of the stack as a leaf
    parts: tuple[int, ...]  # which leaves of `outer` those are, in the layers' order
    split: bool  # whether the one part is a list, whose children are the layers

    def take(self, tree: Any) -> tuple[Any, list[Any]]:
        """The layers (a stacked tree, or a list of trees), and the other leaves."""
        leaves = self.outer.flatten_up_to(tree)
        rest = [x for i, x in enumerate(leaves) if i not in self.parts]
        stack = [leaves[i] for i in self.parts]
        if self.split:
            stack = [child for _, child in _children(stack[0])]
        return (stack[0] if self.stacked else stack), rest

    def put(self, like: Any, stack: Any, rest: Sequence[Any] | None) -> Any:
        """A tree like another with other layers and other leaves; None: with none."""
        parts: list[Any] = [stack] if self.stacked else stack
        if stack is None:
            parts = [None] * len(self.parts)
        elif self.split:
            node = self.outer.flatten_up_to(like)[self.parts[0]]
            order = [i for i, _ in _children(node)]
            treedef = jax.tree.structure(node, is_leaf=lambda x: x is not node)
            children = [None] * len(order)
            for place, child in zip(order, stack, strict=True):
                children[place] = child
            parts = [jax.tree.unflatten(treedef, children)]
        values = dict(zip(self.parts, parts, strict=True))
        n = self.outer.num_leaves
        others = iter([None] * n if rest is None else rest)
        whole = [values[i] if i in values else next(others) for i in range(n)]
        return jax.tree.unflatten(self.outer, whole)


def find_layers(params: Any, layers: str | Sequence[str]) -> Layers:
    """Finds the layers of a tree.

    Args:
        params: a parameter tree, abstract ones too.
        layers: as in `Layered`.

    Raises:
        ValueError: if there is no such stack, its leaves have leading axes of unequal
            sizes, or its numbers have gaps; the message names the leaf.

    Examples:
        >>> params = {"layers": [{"w": jnp.ones(2)}, {"w": jnp.ones(2)}]}
        >>> found = find_layers(params, "layers")
        >>> found.depth, found.leaves
        (2, {'layers/0/w': 0, 'layers/1/w': 1})
    """
    return _find(params, layers)


def layered_value_and_grad(parts: Layered) -> Callable[..., tuple[Any, Any]]:
    """Loss and gradients of a layered model, at the cost of its active layers.

    The function that comes back is `fn(params, batch, *, start, chosen, before)` and
    returns `(loss, metrics), grads`.

    - With `start` alone, layers from `start` on are active: the backward pass ends
      there. `grads` is like `params`, zero for the layers below. Without `start` and
      `chosen` all layers are active.
    - With `chosen`, integers `[k]` without repetition, these layers are active.
      `grads` is a `LayerGrads` whose layers' arrays are `[k, ...]`, in the order of
      `chosen`: stacked layers, or a list of layers that are all alike.
    - `before` says whether what comes before the layers is trained, for which the
      backward pass must go through all layers. By default it is with `chosen`, as it is
      with `start` where that is 0. Where it is not, the gradient of a leaf
      that both ends use, such as a tied embedding, is that of its use after the layers.

    `start` and `chosen` may be traced: a change compiles nothing. With a `start` that
    is a Python number the program holds no more than it needs. Leaves that are
    structured weights or no floats are constants, and have None for a gradient.

    Under `jax.vmap` over `start` or `chosen` the branches become selections and the
    loop runs as long as any member's: the numbers stay, the saving shrinks.

    Args:
        parts: the model.

    Returns:
        The function. It runs under jit and vmap, and on a mesh of any axis types.

    Raises:
        ValueError: from the function, for a stack that cannot be found, a choice out
            of range, layers that are not alike where they must be, or a loss that is
            no scalar.
        TypeError: from the function, if what goes between layers is not float.

    Examples:
        >>> parts = Layered(
        ...     before=lambda params, batch: batch,
        ...     block=lambda w, x, batch: jnp.tanh(x @ w),
        ...     after=lambda params, x, batch: jnp.sum(x**2),
        ... )
        >>> params = {"layers": 0.5 * jnp.ones((3, 2, 2))}
        >>> _, grads = layered_value_and_grad(parts)(params, jnp.ones((4, 2)), start=2)
        >>> jnp.any(grads["layers"] != 0, axis=(1, 2)).tolist()
        [False, False, True]
    """

    def value_and_grad(
        params: Any,
        batch: Any,
        *,
        start: ArrayLike | None = None,
        chosen: ArrayLike | Sequence[int] | None = None,
        before: bool | None = None,
    ) -> tuple[tuple[jax.Array, Metrics], Any]:
        found = _find(params, parts.layers)
        if start is not None and chosen is not None:
            raise ValueError("give start= or chosen=, not both: each names the layers")
        if chosen is None:
            start = 0 if start is None else _checked_start(start, found)
        else:
            chosen = _checked_chosen(jnp.asarray(chosen), found)
            before = True if before is None else before

        def run(params: Any, batch: Any, chosen: Any, start: Any) -> Any:
            return _run(parts, found, params, batch, start, chosen, before)

        args = (params, batch, chosen)
        if isinstance(start, int):  # stays a number: it shapes the program
            run = functools.partial(run, start=start)
        else:
            args = (*args, start)
        specs = ((jax.P(), jax.P()), _grad_specs(found, params, chosen is not None))
        return sharding.with_auto_axes(run, specs)(*args)

    return value_and_grad


# --- Where the layers are --------------------------------------------------------


def _children(node: Any) -> list[tuple[int, Any]]:
    """The children of a list by number, each with its place; [] for no list."""
    flat, _ = jax.tree_util.tree_flatten_with_path(
        node, is_leaf=lambda x: x is not node
    )
    if is_weight(node) or any(len(path) != 1 for path, _ in flat):
        return []
    names = [path_of(path) for path, _ in flat]
    if not all(name.isdecimal() for name in names):
        return []
    order = sorted(range(len(flat)), key=lambda i: int(names[i]))
    if [int(names[i]) for i in order] != list(range(len(flat))):
        return []
    return [(i, flat[i][1]) for i in order]


def _find(params: Any, layers: str | Sequence[str]) -> Layers:
    """The parts of the tree that are layers."""
    if isinstance(layers, str):
        names = re.compile(re.escape(layers).replace(r"\*", r"(\d+)"))
    else:
        names = re.compile("|".join(map(re.escape, layers)))

    def part(path: Any, node: Any) -> bool:
        return is_weight(node) or bool(path and names.fullmatch(path_of(path)))

    flat, outer = jax.tree_util.tree_flatten_with_path(
        params, is_leaf=part, is_leaf_takes_path=True
    )
    paths = [path_of(path) for path, _ in flat]
    matches = {i: m for i, path in enumerate(paths) if (m := names.fullmatch(path))}
    named = leaves_with_paths(params)
    split = stacked = False
    if not isinstance(layers, str):
        for name in layers:
            if name not in paths:
                matching(name, [path for path, _ in named])  # says what comes near
                raise ValueError(f"layers= names {name!r}, which is no subtree")
        hits = [paths.index(name) for name in layers]
    elif not matches or not named:
        matching(layers, [path for path, _ in named])
        raise ValueError(
            f"layers={layers!r} names leaves and not a stack: give the path of the "
            "subtree that holds the layers, or '*' for the number of one"
        )
    elif "*" in layers:
        numbers = {i: tuple(map(int, m.groups())) for i, m in matches.items()}
        hits = sorted(matches, key=numbers.__getitem__)
        first = numbers[hits[0]]
        want = [(*first[:-1], first[-1] + j) for j in range(len(hits))]
        if [numbers[i] for i in hits] != want:
            raise ValueError(
                f"layers={layers!r} finds {', '.join(paths[i] for i in hits)}: the "
                "numbers of a stack have no gaps; name one stack"
            )
    else:
        hits = [*matches]
        split = bool(_children(flat[hits[0]][1]))
        stacked = not split
    roots = [paths[i] for i in hits]
    if split:
        roots = [f"{roots[0]}/{i}" for i in range(len(_children(flat[hits[0]][1])))]
    inside = [
        (path, leaf, number)
        for number, root in enumerate(roots)
        for path, leaf in named
        if path == root or path.startswith(f"{root}/")
    ]
    depth = len(roots)
    if stacked:
        depth = _common_depth(roots[0], [(path, leaf) for path, leaf, _ in inside])
    at = {path: None if stacked else number for path, _, number in inside}
    return Layers(depth, stacked, at, outer, tuple(hits), split)


def _common_depth(layers: str, inside: list[tuple[str, Any]]) -> int:
    """The size of the layer axis that all leaves of a stack must have."""
    if not inside:
        raise ValueError(f"the stack at layers={layers!r} has no leaf")
    sizes = [(path, tuple(jnp.shape(leaf))) for path, leaf in inside]
    path, shape = sizes[0]
    for other, other_shape in sizes:
        if not other_shape or not shape or other_shape[0] != shape[0]:
            raise ValueError(
                f"layers={layers!r} is no stack: leaf {path!r} has shape {shape} and "
                f"{other!r} has {other_shape}, and stacked layers share their first "
                "axis; for layers one by one give a list, or '*' for their number"
            )
    return shape[0]


def _checked_start(start: ArrayLike, found: Layers) -> Any:
    """A Python number where one is given, else an array; in range."""
    depth = found.depth
    if isinstance(start, jax.core.Tracer):
        return jnp.clip(jnp.asarray(start, jnp.int32), 0, depth - 1)
    if not 0 <= int(start) < depth:  # type: ignore[arg-type]
        raise ValueError(
            f"start={start} is out of range: the stack has {depth} layers, so the "
            f"first active one is 0 to {depth - 1}"
        )
    return start if isinstance(start, jax.Array) else int(start)  # type: ignore[arg-type]


def _checked_chosen(chosen: jax.Array, found: Layers) -> jax.Array:
    """Layers that are in range and not repeated, as far as they are known."""
    depth = found.depth
    if chosen.ndim != 1 or not jnp.issubdtype(chosen.dtype, jnp.integer):
        raise ValueError(
            f"chosen is {chosen.dtype}{list(chosen.shape)}: give integers [k], the "
            "numbers of the active layers"
        )
    if not 0 < chosen.size <= depth:
        raise ValueError(
            f"chosen names {chosen.size} layers, and the stack has {depth}: choose 1 "
            f"to {depth}"
        )
    if not isinstance(chosen, jax.core.Tracer):
        known = chosen.tolist()
        if min(known) < 0 or max(known) >= depth or len(set(known)) < len(known):
            raise ValueError(
                f"chosen={known} is not a choice among layers 0 to {depth - 1}: each "
                "at most once"
            )
    return chosen


# --- What is trained in a tree ---------------------------------------------------


def _has_gradient(leaf: Any) -> bool:
    return not is_weight(leaf) and jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


def _split(tree: Any) -> tuple[Any, Any]:
    """The leaves that have gradients and the constants, with None for the others."""

    def part(trained: bool) -> Any:
        return jax.tree.map(
            lambda x: x if _has_gradient(x) == trained else None,
            tree,
            is_leaf=is_weight,
        )

    return part(True), part(False)


def _join(mine: Any, constants: Any) -> Any:
    """The tree that `_split` took apart."""
    return jax.tree.map(
        lambda a, b: b if a is None else a,
        mine,
        constants,
        is_leaf=lambda x: x is None or is_weight(x),
    )


def _grad_specs(found: Layers, params: Any, compact: bool) -> Any:
    """The specs of the gradients: those of the parameters."""

    def spec(leaf: Any) -> Any:
        return jax.P(*jax.typeof(jnp.asarray(leaf)).sharding.spec)

    stack, rest = found.take(params)
    layers, rest = (jax.tree.map(spec, _split(tree)[0]) for tree in (stack, rest))
    if not compact:
        return found.put(params, layers, rest)
    if found.stacked:
        layers = jax.tree.map(lambda p: jax.P(None, *p[1:]), layers, is_leaf=_is_spec)
    else:
        layers = jax.tree.map(lambda p: jax.P(None, *p), layers[0], is_leaf=_is_spec)
    return LayerGrads(layers, found.put(params, None, rest))


def _is_spec(x: Any) -> bool:
    return isinstance(x, jax.P)


# --- Forward and back ------------------------------------------------------------


class _Choice(NamedTuple):
    """Which layers are visited on the way back, and which are active."""

    low: Any  # the last layer that the backward pass visits
    start: Any  # the first active layer; None: `chosen` says
    chosen: jax.Array | None
    end: Any  # whether what comes before the layers is reached
    every: bool  # whether each visited layer is active

    def active(self, i: Any) -> Any:
        """Whether layer i has weight gradients, if the pass comes to it."""
        return i >= self.start if self.chosen is None else jnp.any(self.chosen == i)

    def write(self, grads: Any, i: Any, new: Any) -> Any:
        """The gradients of all layers with those of layer i, if it is active."""
        if self.chosen is None:
            return _set(grads, i, new)
        slot, active = jnp.argmax(self.chosen == i), self.active(i)
        old = _at(grads, slot)
        new = jax.tree.map(functools.partial(jnp.where, active), new, old)
        return _set(grads, slot, new)


def _choice(start: Any, chosen: jax.Array | None, before: bool | None) -> _Choice:
    if before:
        return _Choice(0, start, chosen, True, chosen is None and _is_zero(start))
    if chosen is not None:
        return _Choice(jnp.min(chosen), None, chosen, False, False)
    return _Choice(start, start, None, before is None and start == 0, True)


def _is_zero(start: Any) -> bool:
    return isinstance(start, int) and start == 0


def _run(
    parts: Layered,
    found: Layers,
    params: Any,
    batch: Any,
    start: Any,
    chosen: jax.Array | None,
    before: bool | None,
) -> tuple[tuple[jax.Array, Metrics], Any]:
    """The loss and its gradients; see `layered_value_and_grad`."""
    stack, rest = found.take(params)
    mine, others = _split(rest)

    def with_rest(mine: list[Any]) -> Any:
        return found.put(params, stack, _join(mine, others))

    x, to_rest = jax.vjp(lambda r: parts.before(with_rest(r), batch), mine)
    _check_between(x)
    choice = _choice(start, chosen, before)
    passed = (_stacked if found.stacked else _listed)(
        parts, found.depth, stack, batch, x, choice
    )

    def loss_fn(mine: list[Any], x: Any, extras: Any) -> tuple[jax.Array, Metrics]:
        args = (extras,) if parts.extras else ()
        made = parts.after(with_rest(mine), x, batch, *args)
        loss, metrics = made if isinstance(made, tuple) else (made, {})
        if jnp.shape(loss):
            raise ValueError(
                f"the loss has shape {list(jnp.shape(loss))}: take its mean, a scalar "
                "is minimised"
            )
        return loss, metrics

    loss, back, metrics = jax.vjp(loss_fn, mine, passed.x, passed.extras, has_aux=True)
    g_rest, g, g_extras = back(jnp.ones_like(loss))
    g, g_layers = passed.back(g, g_extras)
    if choice.end is not False:
        (more,) = _when(choice.end, to_rest, g)
        g_rest = jax.tree.map(jnp.add, g_rest, more)
    if chosen is None:
        return (loss, metrics), found.put(params, g_layers, g_rest)
    return (loss, metrics), LayerGrads(g_layers, found.put(params, None, g_rest))


def _check_between(x: Any) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(x):
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            where = jax.tree_util.keystr(path) or "x"
            raise TypeError(
                f"before() returns {leaf.dtype}{list(leaf.shape)} at {where}: floats "
                "go between layers; the rest is in the batch, which block() gets too"
            )


def _when(condition: Any, fn: Callable[..., Any], *args: Any) -> Any:
    """`fn(*args)`, or zeros of its kind; one of them alone if that is known."""

    def zeros(*args: Any) -> Any:
        return jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(fn, *args)
        )

    if isinstance(condition, bool):
        return (fn if condition else zeros)(*args)
    return lax.cond(condition, fn, zeros, *args)


def _only_x(back: Callable[[Any], Any], ct: Any) -> Any:
    """The gradient of a layer's input; zeros, which cost nothing, for its weights."""
    new, g = back(ct)
    return jax.tree.map(jnp.zeros_like, new), g


def _at(tree: Any, i: Any) -> Any:
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, i, 0, False), tree)


def _set(tree: Any, i: Any, new: Any) -> Any:
    return jax.tree.map(
        lambda x, y: lax.dynamic_update_index_in_dim(x, y.astype(x.dtype), i, 0),
        tree,
        new,
    )


class _Passed(NamedTuple):
    """The forward pass through the layers, and the way back."""

    x: Any
    extras: Any
    back: Callable[[Any, Any], tuple[Any, Any]]  # to the gradients of x and the layers


def _vjp(
    parts: Layered, fn: Callable[..., Any], loop: bool, batch: Any, layer: Any, x: Any
) -> tuple[Any, Any, Callable[[Any], Any]]:
    """One layer's output, what it adds to the extras, and its backward pass."""
    mine, constants = _split(layer)

    def run(mine: Any, x: Any) -> Any:
        made = fn(_join(mine, constants), x, batch)
        return made if parts.extras else (made, ())

    # Inside a loop nothing can be merged across the two passes.
    wrapped = jax.checkpoint(run, prevent_cse=not loop) if parts.remat else run
    (x, extra), back = jax.vjp(wrapped, mine, x)
    return x, extra, back


def _stacked(
    parts: Layered, depth: int, stack: Any, batch: Any, x: Any, choice: _Choice
) -> _Passed:
    """Layers with a leading layer axis: loops."""
    fn = parts.block
    if not callable(fn):
        raise ValueError(
            f"the layers at {parts.layers!r} are stacked, so one function is all "
            "theirs: block= is a sequence"
        )
    stack = jax.tree.map(_sliceable, stack, is_leaf=is_weight)
    ways: list[Any] = []  # how what `run` keeps makes a backward pass again

    def run(i: Any, x: Any) -> tuple[Any, Any, list[jax.Array]]:
        """Layer i: its results, and what must be kept for its way back."""
        layer = _at(stack, i)
        x, extra, back = _vjp(parts, fn, True, batch, layer, x)
        arrays, structure = jax.tree.flatten(back)
        # The weights, and what is no layer's own, are there anyway.
        known = [id(a) for a in jax.tree.leaves((layer, batch))]
        where = [known.index(id(a)) if id(a) in known else None for a in arrays]
        ways[:] = [(where, structure)]
        return x, extra, [a for a, j in zip(arrays, where, strict=True) if j is None]

    # Below `low` nothing need be kept: two loops that meet there.
    low = choice.low
    first = low if isinstance(low, int) else 0
    shapes = jax.eval_shape(lambda x: run(0, x)[1:], x)
    extras, kept = (
        jax.tree.map(lambda a, n=n: lax.empty((n, *a.shape), a.dtype), made)
        for made, n in zip(shapes, (depth, depth - first), strict=True)
    )

    def frozen(i: Any, carry: Any) -> Any:
        x, extras = carry
        x, extra, _ = run(i, x)
        return x, _set(extras, i, extra)

    def active(i: Any, carry: Any) -> Any:
        x, extras, kept = carry
        x, extra, arrays = run(i, x)
        return x, _set(extras, i, extra), _set(kept, i - first, arrays)

    x, extras = lax.fori_loop(0, low, frozen, (x, extras))
    x, extras, kept = lax.fori_loop(low, depth, active, (x, extras, kept))

    def back(g: Any, g_extras: Any) -> tuple[Any, Any]:
        ((where, structure),) = ways
        rows = depth if choice.chosen is None else choice.chosen.shape[0]
        grads = jax.tree.map(
            lambda w: jnp.zeros((rows, *w.shape[1:]), w.dtype), _split(stack)[0]
        )

        def step(carry: Any) -> Any:
            i, g, grads = carry
            known = jax.tree.leaves((_at(stack, i), batch))
            mine = iter(_at(kept, i - first))
            arrays = [next(mine) if j is None else known[j] for j in where]
            one = jax.tree.unflatten(structure, arrays)
            ct = (g, _at(g_extras, i))
            if choice.every:
                new, g = one(ct)
            else:
                x_only = functools.partial(_only_x, one)
                new, g = lax.cond(choice.active(i), one, x_only, ct)
            return i - 1, g, choice.write(grads, i, new)

        _, g, grads = lax.while_loop(
            lambda carry: carry[0] >= low,
            step,
            (jnp.asarray(depth - 1, jnp.int32), g, grads),
        )
        return g, grads

    return _Passed(x, extras, back)


def _sliceable(w: Any) -> Any:
    """A constant of stacked layers, every array of which leads with the layer axis."""
    if not is_weight(w):
        return w
    out = w.scannable()
    return w.materialise() if out is NotImplemented else out


def _listed(
    parts: Layered, depth: int, stack: list[Any], batch: Any, x: Any, choice: _Choice
) -> _Passed:
    """Layers one by one: a branch for each."""
    fns = [parts.block] * depth if callable(parts.block) else list(parts.block)
    if len(fns) != depth:
        raise ValueError(
            f"block= has {len(fns)} functions for the {depth} layers at "
            f"{parts.layers!r}: give one for each, or one for all"
        )
    if choice.chosen is not None:
        _check_alike(parts.layers, stack)
    inputs, extras, backs = [], [], []
    for fn, layer in zip(fns, stack, strict=True):
        inputs.append(x)
        x, extra, one = _vjp(parts, fn, False, batch, layer, x)
        extras.append(extra)
        backs.append(one)

    def layer_back(i: int, ct: Any) -> Any:
        def stop(ct: Any) -> Any:
            return jax.tree.map(jnp.zeros_like, (_split(stack[i])[0], inputs[i]))

        one = backs[i]
        x_only = functools.partial(_only_x, one)
        visited = i >= choice.low
        active = visited if choice.every else choice.active(i)
        if isinstance(visited, bool) and not visited:
            return stop(ct)
        if isinstance(active, bool) and active:
            return one(ct)
        if isinstance(visited, bool):
            return x_only(ct) if active is False else lax.cond(active, one, x_only, ct)
        if choice.every:
            return lax.cond(active, one, stop, ct)
        # Active layers are visited, so the sum tells all three cases.
        at = jnp.asarray(visited, jnp.int32) + jnp.asarray(active, jnp.int32)
        return lax.switch(at, [stop, x_only, one], ct)

    def back(g: Any, g_extras: Any) -> tuple[Any, Any]:
        grads: list[Any] = [None] * depth
        compact: Any = None
        if choice.chosen is not None:
            k = choice.chosen.shape[0]
            compact = jax.tree.map(
                lambda w: jnp.zeros((k, *w.shape), w.dtype), _split(stack[0])[0]
            )
        for i in reversed(range(depth)):
            grads[i], g = layer_back(i, (g, g_extras[i]))
            if compact is not None:
                compact = choice.write(compact, i, grads[i])
        return g, grads if compact is None else compact

    return _Passed(x, extras, back)


def _check_alike(layers: Any, stack: list[Any]) -> None:
    """Raises unless the layers of a list could be stacked."""

    def kinds(layer: Any) -> dict[str, Any]:
        return {
            path: (tuple(jnp.shape(x)), jnp.result_type(x))
            for path, x in leaves_with_paths(layer)
        }

    first = kinds(stack[0])
    for number, layer in enumerate(stack[1:], 1):
        if (other := kinds(layer)) != first:
            path = next(p for p in [*first, *other] if first.get(p) != other.get(p))
            raise ValueError(
                f"chosen= gives compact gradients, for layers that are alike: "
                f"{path!r} is {first.get(path)} in layer 0 and {other.get(path)} in "
                f"layer {number} of {layers!r}; use start=, or leave that layer out"
            )
