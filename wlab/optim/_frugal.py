# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
r"""FRUGAL: an optimiser with state for a part of each gradient only (a transform).

The gradient of the hidden kernels is split in two. A chosen subspace, of the share
`density`, gets an optimiser with state, such as Adam; the residual gets a rule without
state, such as its sign. So every update has full rank, and state is held for the
subspace only; all other parameters get the same optimiser whole.

.. math::

    g_\downarrow = P g, \qquad r = g - P^\top g_\downarrow, \qquad
    \theta' = (1 - \eta\lambda)\,\theta
        - \eta\,\rho\,\bigl(P^\top \mathrm{adam}(g_\downarrow)
        + \rho_0\,\mathrm{sign}(r)\bigr)

where :math:`\rho` and :math:`\rho_0` scale the projected parameters and their residual.
Every `update_gap` steps, before the update, P is chosen anew, and the state begins
anew, bias correction too, so that the first step after it is as large as a sign step.

P selects whole kernels ("block": stacked layers, or kernels of one shape), columns,
rows or entries of each, or projects on singular vectors of the gradient, random
orthogonal ones, or random axes of the smaller side. Columns are a kernel's inputs.

What differs from the paper: in "block" the share is taken of the layers of each stack
and of the kernels of each shape, so that slots of that shape hold any of them with no
compilation; only kernels whose shape is too rare are chosen from all together, and
share slots of the largest one's size. Bases are kept in float32 (float64 stays), SGDM's
buffer begins at zero, and decoupled weight decay applies to all inner optimisers.

References:
    Zmushko, Beznosikov, Takac and Horvath, `FRUGAL: Memory-Efficient Optimization by
    Reducing State Overhead for Scalable Training <https://arxiv.org/abs/2411.07837>`_,
    ICML 2025.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from wlab.core import (
    Draw,
    Leaf,
    MatrixView,
    Select,
    Views,
    as_matrices,
    describe,
    from_matrices,
    leaves_with_paths,
    linalg,
    subset,
    subsets,
)
from wlab.core import select as selected

Scalar = float | jax.Array
Projection = Literal[
    "block", "columns", "rows", "randk", "svd", "random", "permutation"
]
Inactive = Literal["sign", "sgd", "none"]
Order = Literal["random", "descending", "ascending", "mirror"]
Inner = Literal["adamw", "lion", "sgdm"]


def frugal(
    learning_rate: optax.ScalarOrSchedule,
    density: float = 0.25,
    update_gap: int | jax.Array = 200,
    b1: Scalar = 0.9,
    b2: Scalar | None = None,
    eps: Scalar = 1e-8,
    weight_decay: Scalar = 0.0,
    proj_lr_scale: Scalar = 1.0,
    inactive_lr_scale: Scalar = 1.0,
    mask: Any = None,
    *,
    projection: Projection = "block",
    inactive: Inactive = "sign",
    inner: Inner | optax.GradientTransformation = "adamw",
    order: Order | subsets.Choose = "random",
    reset: bool = True,
    select: Select | None = None,
    views: Views | None = None,
    rest: optax.GradientTransformation | None = None,
    key: jax.Array | int = 0,
) -> optax.GradientTransformationExtraArgs:
    """AdamW, Lion or SGDM on a share of the hidden kernels' gradients, signs elsewhere.

    State in bytes for each parameter of the hidden kernels, in float32 with Adam: 8
    times the density for block, columns, rows and permutation; 12 times for "randk",
    whose indices count; for "svd" and "random" the basis comes on top, 4 r / n for rank
    r and n the larger side. Other parameters have 8.

    Args:
        learning_rate: a number or a schedule; its count never begins anew.
        density: share of each projected kernel (of the kernels, in "block") that the
            inner optimiser sees; 0 leaves all to the rule of the residual. As in the
            authors' code, columns, rows and entries are rounded down, kernels and ranks
            to nearest; a kernel with so few that none is left is the residual's too,
            but a whole stack of layers without an active one is an error.
        update_gap: steps between choices of the subspace; may be traced.
        b1: decay of Adam's or Lion's first moment, or SGDM's momentum.
        b2: decay of the second moment; None: 0.999 for Adam and 0.99 for Lion.
        eps: added to the root of Adam's second moment.
        weight_decay: decoupled, times the learning rate; no other factor scales it.
        proj_lr_scale: of the learning rate of the projected kernels.
        inactive_lr_scale: of the residual's, times the one before; the paper takes 1
            for pretraining and 0.1 for fine-tuning.
        mask: which leaves decay, as in `optax.adamw`; None: all.
        projection: the subspace.
        inactive: the rule of the residual: "sign", "sgd" (the residual itself) or
            "none", which is BAdam for "block" and GaLore for "svd".
        inner: the optimiser of the subspace, or a transform that gives its direction
            without the learning rate, such as `optax.scale_by_adam()`.
        order: how kernels, columns, rows or entries are chosen: at random, cyclically
            from the last or from the first on, in pairs from both ends ("mirror", of an
            even number), or by a rule as `wlab.core.subset` takes it.
        reset: whether a new subspace begins with zero moments and bias correction;
            False keeps them, as coordinates of the new one.
        select: which leaves are projected, as in `wlab.core.select`; None: kernels of
            linear layers and convolutions, so that embeddings, head, norms and biases
            are not.
        views: which axes of a leaf are inputs and outputs, where names do not tell.
        rest: the direction of the other leaves; None: that of `inner`.
        key: a random key or a seed for the choices.

    Returns:
        A gradient transformation that takes any extra arguments.

    Raises:
        ValueError: at build time for values out of range, such as a density of 0 with
            "none"; at `init` for a pattern that matches nothing or a kernel that could
            never move; it names the leaf.
        TypeError: for a traced density, or a projected leaf that is a structured
            weight.

    Examples:
        >>> params = {"up": {"kernel": jnp.ones((8, 12)), "bias": jnp.ones(12)}}
        >>> tx = frugal(1e-3, density=0.25, projection="columns")
        >>> state = tx.init(params)
        >>> held = [x.shape for x in jax.tree.leaves(state) if x.ndim == 2]
        >>> held  # the moments of two of eight columns
        [(2, 12), (2, 12)]
        >>> updates, state = tx.update(params, state, params)
        >>> bool(jnp.allclose(updates["up"]["kernel"], -1e-3))
        True
    """
    direction = scale_by_frugal(
        density,
        update_gap,
        b1,
        b2,
        eps,
        proj_lr_scale,
        inactive_lr_scale,
        projection=projection,
        inactive=inactive,
        inner=inner,
        order=order,
        reset=reset,
        select=select,
        views=views,
        rest=rest,
        key=key,
    )
    return optax.chain(
        direction,
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def scale_by_frugal(
    density: float = 0.25,
    update_gap: int | jax.Array = 200,
    b1: Scalar = 0.9,
    b2: Scalar | None = None,
    eps: Scalar = 1e-8,
    proj_lr_scale: Scalar = 1.0,
    inactive_lr_scale: Scalar = 1.0,
    *,
    projection: Projection = "block",
    inactive: Inactive = "sign",
    inner: Inner | optax.GradientTransformation = "adamw",
    order: Order | subsets.Choose = "random",
    reset: bool = True,
    select: Select | None = None,
    views: Views | None = None,
    rest: optax.GradientTransformation | None = None,
    key: jax.Array | int = 0,
) -> optax.GradientTransformationExtraArgs:
    """The direction of `frugal`, without learning rate and weight decay.

    Args:
        density: as in `frugal`.
        update_gap: as in `frugal`.
        b1: as in `frugal`.
        b2: as in `frugal`.
        eps: as in `frugal`.
        proj_lr_scale: as in `frugal`.
        inactive_lr_scale: as in `frugal`.
        projection: as in `frugal`.
        inactive: as in `frugal`.
        inner: as in `frugal`.
        order: as in `frugal`.
        reset: as in `frugal`.
        select: as in `frugal`.
        views: as in `frugal`.
        rest: as in `frugal`.
        key: as in `frugal`.

    Returns:
        A gradient transformation that takes any extra arguments; its state is a
        `wlab.core.SubsetState`.

    Raises:
        ValueError: as `frugal` does.
        TypeError: as `frugal` does.
    """
    if not isinstance(density, int | float):
        raise TypeError(
            f"density={density} sets the shapes of the state and must be a Python "
            "number: under optax.inject_hyperparams name it in static_args="
        )
    if not 0 <= density <= 1:
        raise ValueError(f"density={density} must lie between 0 and 1, both included")
    if not density and inactive == "none":
        raise ValueError(
            "density=0 with inactive='none' would leave the projected kernels where "
            "they are: take a density above 0, or inactive='sign'"
        )
    if isinstance(update_gap, int) and update_gap < 1:
        raise ValueError(f"update_gap={update_gap} must be at least 1 step")
    if projection not in _CUTS:
        raise ValueError(f"projection {projection!r} is none of {', '.join(_CUTS)}")
    if inactive not in ("sign", "sgd", "none"):
        raise ValueError(f"inactive {inactive!r} is none of 'sign', 'sgd', 'none'")
    if not callable(order) and order not in _ORDERS:
        raise ValueError(f"order {order!r} is none of {', '.join(_ORDERS)}, or a rule")
    if order != "random" and projection in _BASES:
        raise ValueError(
            f"order= chooses among kernels, columns, rows or entries; projection "
            f"{projection!r} has a basis: leave it out"
        )
    if isinstance(inner, str):
        inner = _direction(inner, b1, b2, eps)

    def outside(r: jax.Array) -> jax.Array:
        rule = jnp.sign(r) if inactive == "sign" else r
        return jnp.asarray(proj_lr_scale * inactive_lr_scale, r.dtype) * rule

    def cut(tree: Any) -> Sequence[subsets.Pool]:
        leaves = describe(tree, views=views)
        if select is None:
            chosen = subsets.hidden_kernels(leaves)
        else:
            mask = leaves_with_paths(selected(tree, select))
            chosen = {path for path, taken in mask if taken}
        taken = [leaf for leaf in leaves if leaf.path in chosen]
        if not taken:
            raise ValueError(
                f"no leaf to project: none of the {len(leaves)} is the kernel of a "
                "linear layer or convolution; name them with select="
            )
        return _CUTS[projection](taken, density)

    return subset(
        optax.chain(inner, _scaled(proj_lr_scale)),
        0,
        slices=cut,
        choose=order if callable(order) else _ORDERS[order],
        every=update_gap,
        reset="all" if reset else "none",
        outside=None if inactive == "none" else outside,
        rest=inner if rest is None else rest,
        key=key,
    )


def _direction(
    inner: str, b1: Scalar, b2: Scalar | None, eps: Scalar
) -> optax.GradientTransformation:
    """What the learning rate multiplies, with zero moments to begin with."""
    if inner == "adamw":
        return optax.scale_by_adam(b1, 0.999 if b2 is None else b2, eps)
    if inner == "lion":
        return optax.scale_by_lion(b1, 0.99 if b2 is None else b2)
    if inner == "sgdm":
        return optax.trace(b1)
    raise ValueError(f"inner {inner!r} is none of 'adamw', 'lion', 'sgdm'")


def _scaled(factor: Scalar) -> optax.GradientTransformation:
    def scale(u: Any, _: Any) -> jax.Array:
        return jnp.asarray(factor, u.dtype) * u

    return optax.stateless_with_tree_map(scale)


# --- Subspaces that are a choice of slices ---------------------------------------


def _mirror(draw: Draw) -> jax.Array:
    """Pairs from both ends: j and n - 1 - j, with j going on from pair to pair."""
    if draw.k % 2:
        raise ValueError(
            f"order='mirror' takes pairs, and {draw.k} of {draw.size} slices of "
            f"{draw.name!r} are active: choose a density that makes it even"
        )
    half = draw.k // 2
    j = (draw.round * half + jnp.arange(half)) % max(draw.size // 2, 1)
    return jnp.concatenate([j, draw.size - 1 - j])


_ORDERS: dict[str, subsets.Choose] = {
    "random": subsets.at_random,
    "descending": subsets.descending,
    "ascending": subsets.ascending,
    "mirror": _mirror,
}


def _blocks(leaves: Sequence[Leaf], density: float) -> list[subsets.Pool]:
    """Layers of stacks, kernels of one shape, and the kernels whose shape is rare."""

    def share(n: int) -> int:
        return round(n * density)

    shapes = {leaf.path: leaf.shape for leaf in leaves}
    # Experts in a leading axis are kernels as well.
    stacks = {
        leaf.path: leaf.shape
        for leaf in leaves
        if leaf.view is not None and 0 in leaf.view.stack(len(leaf.shape))
    }
    pools: list[subsets.Pool] = [*subsets.stack_pools(stacks, share)]
    for pool in pools:
        if density and not pool.k:
            path = pool.paths[0]
            raise ValueError(
                f"leaf {path!r} of shape {shapes[path]}: {density} of its "
                f"{pool.size} layers is none; take a density above {0.5 / pool.size}, "
                "or projection='columns'"
            )
    by_shape: dict[tuple[int, ...], list[str]] = {}
    for path in sorted((p for p in shapes if p not in stacks), key=subsets.natural):
        by_shape.setdefault(shapes[path], []).append(path)
    rare: list[str] = []
    for paths in by_shape.values():
        if share(len(paths)):
            members = [(path,) for path in paths]
            pools.append(subsets.member_pool(members, shapes, share))
        else:
            rare.extend(paths)
    if rare:
        members = [(path,) for path in sorted(rare, key=subsets.natural)]
        pools.append(subsets.member_pool(members, shapes, share))
    return pools


def _slices(side: subsets.Side) -> Callable[..., list[subsets.Pool]]:
    def cut(leaves: Sequence[Leaf], density: float) -> list[subsets.Pool]:
        return [
            subsets.matrix_pool(leaf, side, lambda n: int(n * density))
            for leaf in leaves
        ]

    return cut


def _permutation(leaves: Sequence[Leaf], density: float) -> list[subsets.Pool]:
    """Axes of the smaller side."""
    out: list[subsets.Pool] = []
    for leaf in leaves:
        n_in, n_out = _sizes(leaf)
        side = "columns" if n_in <= n_out else "rows"
        out.append(subsets.matrix_pool(leaf, side, lambda n: round(n * density)))
    return out


# --- Subspaces that have a basis -------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Basis(subsets.Pool):
    """The smaller side of each matrix of one leaf, projected on k directions."""

    view: MatrixView
    kind: Literal["svd", "random"]
    left: bool  # whether the inputs are the smaller side

    @property
    def paths(self) -> tuple[str, ...]:
        return (self.name,)

    def start(self, leaves: Mapping[str, jax.Array]) -> jax.Array:
        """No direction yet, of the place and type of one."""

        def zeros(x: jax.Array) -> jax.Array:
            x = as_matrices(x, self.view)
            dtype = jnp.promote_types(x.dtype, jnp.float32)
            n = x.shape[-2] if self.left else x.shape[-1]
            side = (n, self.k) if self.left else (self.k, n)
            return jnp.zeros((*x.shape[:-2], *side), dtype)

        return self._safe(zeros)(leaves[self.name])

    def choose(
        self, rule: Any, draw: Draw, grads: Mapping[str, jax.Array] | None
    ) -> jax.Array:
        """Singular vectors of the gradient, or orthogonal ones at random."""
        del rule
        assert grads is not None

        def basis(g: jax.Array, key: jax.Array) -> jax.Array:
            x = as_matrices(g, self.view)
            n = x.shape[-2] if self.left else x.shape[-1]
            if self.kind == "random":
                shape = (*x.shape[:-2], n, self.k)
                q = jnp.linalg.qr(jax.random.normal(key, shape)).Q
                q = q if self.left else jnp.swapaxes(q, -1, -2)
                return q.astype(x.dtype)
            # In float32 whatever the dtype, as the paper's code does.
            u, _, vt = jnp.linalg.svd(x.astype(jnp.float32), full_matrices=False)
            q = u[..., :, : self.k] if self.left else vt[..., : self.k, :]
            return q.astype(x.dtype)

        return self._safe(basis)(grads[self.name], draw.key)

    def take(
        self, leaves: Mapping[str, jax.Array], choice: jax.Array
    ) -> dict[str, jax.Array]:
        """``[*stack, r, out]`` where inputs are the smaller side, else transposed."""
        if not self.k:
            return {}
        return {self.name: self._safe(self._down)(leaves[self.name], choice)}

    def put(
        self,
        slices: Mapping[str, jax.Array],
        choice: jax.Array,
        leaves: Mapping[str, jax.Array],
        outside: Callable[[jax.Array], jax.Array],
    ) -> dict[str, jax.Array]:
        """The updates back in the leaf's axes, and `outside` of the residual."""
        g = leaves[self.name]
        if not self.k:
            return {self.name: outside(g)}

        def put(g: jax.Array, u: jax.Array, basis: jax.Array) -> jax.Array:
            r = g - self._up(self._down(g, basis), basis, g.shape)
            return self._up(u, basis, g.shape) + outside(r)

        return {self.name: self._safe(put)(g, slices[self.name], choice)}

    @property
    def _safe(self) -> Callable[..., Any]:
        """Whole matrices on each device, which the products and the SVD need."""
        whole = (*self.view.inputs, *self.view.outputs)
        return lambda fn: linalg.sharding_safe(fn, whole=whole)

    def _down(self, g: jax.Array, basis: jax.Array) -> jax.Array:
        x = as_matrices(g, self.view).astype(basis.dtype)
        basis = jnp.swapaxes(basis, -1, -2)
        return _product(basis, x) if self.left else _product(x, basis)

    def _up(self, u: jax.Array, basis: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        x = _product(basis, u) if self.left else _product(u, basis)
        return from_matrices(x, self.view, shape)


def _product(x: jax.Array, y: jax.Array) -> jax.Array:
    # In full: the residual is to be orthogonal to what was projected.
    return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)


def _sizes(leaf: Leaf) -> tuple[int, int]:
    """Inputs and outputs of a leaf's matrices; an error where it is none."""
    if leaf.view is None:
        raise ValueError(
            f"leaf {leaf.path!r} of shape {leaf.shape} is no matrix: leave it out of "
            "select=, or give it a view in views="
        )
    n_in, n_out = (math.prod(leaf.shape[a] for a in axes) for axes in leaf.view)
    return n_in, n_out


def _bases(kind: Literal["svd", "random"]) -> Callable[..., list[subsets.Pool]]:
    def cut(leaves: Sequence[Leaf], density: float) -> list[subsets.Pool]:
        out: list[subsets.Pool] = []
        for leaf in leaves:
            n = min(_sizes(leaf))
            assert leaf.view is not None
            left = n == _sizes(leaf)[0]
            k = round(n * density)
            out.append(_Basis(leaf.path, n, k, leaf.view, kind, left))
        return out

    return cut


_BASES = ("svd", "random")
_CUTS: dict[str, Callable[..., Sequence[subsets.Pool]]] = {
    "block": _blocks,
    "columns": _slices("columns"),
    "rows": _slices("rows"),
    "randk": _slices("entries"),
    "svd": _bases("svd"),
    "random": _bases("random"),
    "permutation": _permutation,
}
