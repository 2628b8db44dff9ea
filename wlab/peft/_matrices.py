# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""From a method on one matrix to a reparameterisation of a tree.

A method says what it trains for one target and what leaf it puts in its place; here
stand what all methods share: which leaves are targets, keys by path, constants that no
gradient reaches, errors for adapters of another model.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from wlab.core import (
    Adapter,
    MatrixView,
    Reparam,
    Select,
    Views,
    as_matrices,
    describe,
    fold_path,
    from_matrices,
    is_weight,
    leaves_with_paths,
    map_with_path,
    typed_key,
)
from wlab.core import select as selected

SHARED = ""  # the path under which `frozen` holds what all targets share


class Target(NamedTuple):
    """A leaf that a method replaces."""

    path: str
    shape: tuple[int, ...]
    dtype: Any
    role: str  # as in `wlab.core.describe`
    view: MatrixView
    bias: str | None  # path of the bias beside it

    @property
    def stack(self) -> tuple[int, ...]:
        """Sizes of the stacked axes."""
        return tuple(self.shape[i] for i in self.view.stack(len(self.shape)))

    @property
    def inputs(self) -> tuple[int, ...]:
        """Sizes of the input axes."""
        return tuple(self.shape[i] for i in self.view.inputs)

    @property
    def outputs(self) -> tuple[int, ...]:
        """Sizes of the output axes."""
        return tuple(self.shape[i] for i in self.view.outputs)

    @property
    def n_in(self) -> int:
        """Rows of each matrix."""
        return math.prod(self.inputs)

    @property
    def n_out(self) -> int:
        """Columns of each matrix."""
        return math.prod(self.outputs)

    def __str__(self) -> str:
        return f"leaf {self.path!r} of shape {self.shape}"


class Init(NamedTuple):
    """What a method's `init` is given."""

    key: jax.Array  # of this leaf alone
    target: Target
    weight: Callable[[], jax.Array]  # the matrices, float32, stack + (n_in, n_out)
    shared: Any


class Attach(NamedTuple):
    """What a method's `attach` is given."""

    train: Any
    frozen: Any
    base: Any  # array or Weight
    target: Target
    shared: Any
    scale: Any  # a number, or an array of shape stack


class Method(NamedTuple):
    """A reparameterisation of one matrix, or of a stack of them.

    Axes are named by strings: "in" and "out" for a flattened side, "ins" and "outs" for
    its axes one by one, None for any other; the stacked ones come first unsaid.
    """

    init: Callable[[Init], tuple[dict[str, Any], dict[str, Any]]]  # trained, frozen
    attach: Callable[[Attach], Any]
    axes: Mapping[str, tuple[str | None, ...]]  # of each trained array
    shared: Callable[[jax.Array, list[Target]], Any] = lambda key, targets: {}
    check: Callable[[Target], None] = lambda target: None
    bias: Callable[[Attach], Any] | None = None  # `base` is the bias
    roles: tuple[str, ...] = ("kernel",)  # of targets where none are selected
    needs_matrix: bool = True


def reparam(
    method: Method,
    *,
    select: Select | None = None,
    views: Views | None = None,
) -> Reparam:
    """The method on every target of a tree.

    Args:
        method: what happens to one of them.
        select: which leaves, as in `wlab.core.select`. None: the kernels of linear
            layers; not embeddings, head, convolutions, norms and biases.
        views: which axes of a leaf are inputs and outputs, where names do not tell.

    Returns:
        The `Reparam`. Its functions raise ValueError where no leaf is a target, or one
        is no matrix or of a size that the method cannot take; `attach` also for an
        adapter of another model. TypeError for a target that holds no floats.
    """

    def init(key: jax.Array | int, params: Any) -> Adapter:
        key = typed_key(key)
        found = targets(params, method, select, views)
        leaves = dict(leaves_with_paths(params))
        shared = method.shared(fold_path(key, SHARED), found)
        train: dict[str, Any] = {}
        frozen: dict[str, Any] = {SHARED: shared} if jax.tree.leaves(shared) else {}
        for target in found:
            leaf = leaves[target.path]

            def weight(leaf: Any = leaf, target: Target = target) -> jax.Array:
                return matrices(leaf, target)

            train[target.path], kept = method.init(
                Init(fold_path(key, target.path), target, weight, shared)
            )
            if kept:
                frozen[target.path] = kept
        return Adapter(train, frozen, key)

    def attach(adapter: Adapter, params: Any, scale: Any = None) -> Any:
        found = {t.path: t for t in targets(params, method, select, views)}
        _check_same(adapter, found, init, params)
        params = jax.lax.stop_gradient(params)
        frozen = jax.lax.stop_gradient(adapter.frozen)
        leaves = dict(leaves_with_paths(params))
        new: dict[str, Any] = {}
        for path, target in found.items():
            given = Attach(
                adapter.train[path],
                frozen.get(path, {}),
                leaves[path],
                target,
                frozen.get(SHARED, {}),
                scale_of(scale, target),
            )
            new[path] = method.attach(given)
            if method.bias is not None and target.bias is not None:
                biased = given._replace(base=leaves[target.bias])
                new[target.bias] = method.bias(biased)
        return map_with_path(lambda path, leaf: new.get(path, leaf), params)

    def labels(train: Any) -> Any:
        return {path: {name: name for name in part} for path, part in train.items()}

    def specs(adapter: Adapter, params: Any, base: Any) -> Adapter:
        found = targets(params, method, select, views)
        leaves = leaves_with_paths(params)
        # Of a packed leaf the codes are divided as the weight is, and come first.
        divided = jax.tree.leaves(
            jax.tree.map(
                lambda _, spec: [jax.tree.leaves(spec)[0]],
                params,
                base,
                is_leaf=is_weight,
            )
        )
        spec_of = dict(zip((path for path, _ in leaves), divided, strict=True))
        train = {
            t.path: {
                name: _spec(method.axes[name], spec_of[t.path], x.ndim, t)
                for name, x in adapter.train[t.path].items()
            }
            for t in found
        }
        return Adapter(train, jax.tree.map(lambda _: jax.P(), adapter.frozen), jax.P())

    return Reparam(init, attach, labels, specs)


def targets(
    params: Any,
    method: Method,
    select: Select | None,
    views: Views | None,
) -> list[Target]:
    """The leaves that a method replaces, in the order of the tree; see `reparam`."""
    leaves = describe(params, views=views)
    paths = {leaf.path for leaf in leaves}
    if select is None:
        chosen = {leaf.path for leaf in leaves if leaf.role in method.roles}
        if not chosen:
            raise ValueError(
                f"no target: none of {len(leaves)} leaves is a {method.roles[0]} by "
                "its name and shape (wlab.explain(params) lists them); name the leaves "
                "in select=, and their axes in views= where names do not tell"
            )
    else:
        marked = leaves_with_paths(selected(params, select))
        chosen = {path for path, taken in marked if taken}
    out = []
    for leaf in leaves:
        if leaf.path not in chosen:
            continue
        where = f"leaf {leaf.path!r} of shape {leaf.shape}"
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(
                f"{where} holds {leaf.dtype}: only floats are adapted; leave it out "
                "of select="
            )
        view = leaf.view
        if view is None:
            if method.needs_matrix:
                raise ValueError(
                    f"{where} is no matrix: leave it out of select=, train it whole "
                    "with wlab.peft.full, or name its axes in views="
                )
            view = MatrixView((), ())
        bias = leaf.path.rpartition("/")[0] + "/bias"
        target = Target(
            leaf.path,
            leaf.shape,
            leaf.dtype,
            leaf.role,
            view,
            bias.lstrip("/") if bias.lstrip("/") in paths else None,
        )
        method.check(target)
        out.append(target)
    return out


def matrices(leaf: Any, target: Target) -> jax.Array:
    """A leaf's matrices in float32 at least, of shape stack + (n_in, n_out)."""
    dense = leaf.materialise() if is_weight(leaf) else jnp.asarray(leaf)
    wide = dense.astype(jnp.promote_types(dense.dtype, jnp.float32))
    return as_matrices(wide, target.view)


def added(given: Attach, delta: jax.Array) -> jax.Array:
    """The base plus its scaled change, summed in float32 and rounded once.

    Args:
        given: what `attach` was given.
        delta: of shape stack + (n_in, n_out).
    """
    old = matrices(given.base, given.target)
    return dense(given, old + scaled(given, delta))


def scaled(given: Attach, delta: jax.Array) -> jax.Array:
    """A change of shape stack + ... times the scale that `attach` was given."""
    scale = jnp.asarray(given.scale, delta.dtype)
    return delta * scale.reshape(*scale.shape, *(1,) * (delta.ndim - scale.ndim))


def dense(given: Attach, new: jax.Array) -> jax.Array:
    """Matrices put back as the target's leaf, in its dtype."""
    target = given.target
    return from_matrices(new, target.view, target.shape).astype(target.dtype)


def scale_of(scale: Any, target: Target) -> Any:
    """What multiplies a target's change: 1, a number, or by path."""
    if scale is None:
        return 1.0
    value = scale.get(target.path, 1.0) if isinstance(scale, Mapping) else scale
    shape = jnp.shape(value)
    if shape not in ((), target.stack):
        raise ValueError(
            f"scale of shape {shape} for {target}: give a number, or an array of the "
            f"stacked axes, {target.stack}"
        )
    return value


def _check_same(
    adapter: Adapter, found: dict[str, Target], init: Any, params: Any
) -> None:
    """Raise unless the adapter was made for these parameters by this method."""
    if not isinstance(adapter, Adapter):
        raise TypeError(
            f"attach takes the Adapter that init returned, not {type(adapter).__name__}"
        )
    if set(adapter.train) != set(found):
        lacking = sorted(set(found) - set(adapter.train))[:3]
        strange = sorted(set(adapter.train) - set(found))[:3]
        raise ValueError(
            "the adapter is for another model, or for other targets: it lacks "
            f"{lacking} and has {strange}; make it with init on these parameters"
        )
    wanted = jax.eval_shape(init, jax.random.key(0), params).train
    for path, part in wanted.items():
        has = {name: jnp.shape(x) for name, x in adapter.train[path].items()}
        needs = {name: x.shape for name, x in part.items()}
        if has != needs:
            raise ValueError(
                f"the adapter is for another model, or of other sizes: for "
                f"{found[path]} it has {has}, and the method {needs}"
            )


def _spec(
    axes: tuple[str | None, ...], base: jax.P, ndim: int, target: Target
) -> jax.P:
    """Mesh axes of a trained array, from those of its base."""
    entries = [*base, *[None] * (len(target.shape) - len(base))]

    def side(which: tuple[int, ...]) -> list[Any]:
        return [entries[i] for i in which]

    view = target.view
    stack = [entries[i] for i in view.stack(len(target.shape))] if view.inputs else []
    out: list[Any] = stack
    for axis in axes:
        if axis in ("ins", "outs"):
            out = [*out, *side(view.inputs if axis == "ins" else view.outputs)]
        elif axis in ("in", "out"):
            # A flattened side is divided as its first axis, if that alone is.
            first, *rest = side(view.inputs if axis == "in" else view.outputs)
            out = [*out, None if any(rest) else first]
        elif axis == "leaf":
            out = entries
        else:
            out = [*out, None]
    return jax.P(*out[:ndim])
