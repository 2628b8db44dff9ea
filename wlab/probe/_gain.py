# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
r"""Gains of sublayers and singular values of matrices over width (a measure).

The gain of a sublayer is :math:`\mathrm{RMS}(f(x)) / \mathrm{RMS}(x)`. Two models of
different width agree in it if the largest singular values of their matrices do, which
is how the paper checks a rule for the weight decay. The root mean square of all
singular values stands beside the largest: one is the bulk, the other may be a spike.

References:
    Fan, Liu, Zhao, Yuan and Gu, `Robust Layerwise Scaling Rules by Proper Weight Decay
    Tuning <https://arxiv.org/abs/2510.15262>`_, 2025.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from wlab.core import (
    MatrixView,
    Select,
    Views,
    as_matrices,
    describe,
    leaves_with_paths,
    linalg,
    materialise,
    select,
)


class Gain(NamedTuple):
    """Singular values of one matrix in two models, each of the shape of its stack."""

    top: jax.Array  # float32, the largest
    base_top: jax.Array  # float32, that of the other model
    rms: jax.Array  # float32, the root mean square of all
    base_rms: jax.Array  # float32, that of the other model

    @property
    def top_ratio(self) -> jax.Array:
        """How many times the base's the largest is: 1 where the rule fits."""
        return self.top / self.base_top

    @property
    def rms_ratio(self) -> jax.Array:
        """The same of the root mean square."""
        return self.rms / self.base_rms


def top_singular_values(
    params: Any,
    k: int = 1,
    *,
    iters: int | None = None,
    which: Select | None = None,
    views: Views | None = None,
) -> dict[str, jax.Array]:
    """The largest singular values of every matrix, stacked layers side by side.

    Args:
        params: a parameter tree; structured weights count by their dense value.
        k: how many of each, at most the matrix' smaller side.
        iters: None for a singular value decomposition; a number for so many subspace
            iterations from a fixed start, which cost products only and come from
            below.
        which: the leaves, as in `wlab.core.select`; None: all that have a matrix view.
        views: as in `wlab.core.describe`.

    Returns:
        For each leaf's path an array of shape stack + (k,), descending, float32
        (float64 for float64).

    Raises:
        ValueError: if a matrix has fewer than `k`, or a chosen leaf is no matrix.

    Examples:
        >>> params = {"dense": {"kernel": jnp.diag(jnp.array([1.0, 3.0, 2.0]))}}
        >>> top_singular_values(params, 2)["dense/kernel"].tolist()
        [3.0, 2.0]
    """
    out = {}
    for path, x, view in _matrices(params, which, views):

        def largest(x: jax.Array, view: MatrixView = view) -> jax.Array:
            m = as_matrices(x, view)
            if iters is None:
                return jnp.linalg.svd(m, compute_uv=False)[..., :k]
            return _subspace(m, k, iters)

        size = min(jax.eval_shape(lambda x, v=view: as_matrices(x, v), x).shape[-2:])
        if not 1 <= k <= size:
            raise ValueError(
                f"leaf {path!r} of shape {x.shape} has {size} singular values: k={k} "
                "must lie between 1 and that"
            )
        whole = (*view.inputs, *view.outputs)
        out[path] = linalg.sharding_safe(largest, whole=whole)(x)
    return out


def rms_singular_values(
    params: Any,
    *,
    which: Select | None = None,
    views: Views | None = None,
) -> dict[str, jax.Array]:
    """The root mean square of the singular values of every matrix.

    Args:
        params: as in `top_singular_values`.
        which: as in `top_singular_values`.
        views: as in `top_singular_values`.

    Returns:
        For each leaf's path an array of the shape of its stack, float32 (float64 for
        float64).

    Examples:
        >>> rms_singular_values({"kernel": jnp.full((2, 2), 1.0)})["kernel"].item()
        1.4142135381698608
    """
    out = {}
    for path, x, view in _matrices(params, which, views):

        def rms(x: jax.Array, view: MatrixView = view) -> jax.Array:
            m = as_matrices(x, view)
            return jnp.sqrt(jnp.sum(jnp.square(m), (-2, -1)) / min(m.shape[-2:]))

        whole = (*view.inputs, *view.outputs)
        out[path] = linalg.sharding_safe(rms, whole=whole)(x)
    return out


def sublayer_gain(
    x: jax.Array,
    y: jax.Array,
    *,
    axis: int | tuple[int, ...] | None = None,
    eps: float = 1e-8,
) -> jax.Array:
    """How much larger what a sublayer writes is than what it reads.

    Args:
        x: what the sublayer reads, any shape.
        y: what it writes.
        axis: over which the squares are averaged; None: over all.
        eps: added to both mean squares.

    Returns:
        RMS(y) / RMS(x), in float32 at least.

    Examples:
        >>> sublayer_gain(jnp.ones(4), 3 * jnp.ones(8)).item()
        3.0
    """

    def rms(z: jax.Array) -> jax.Array:
        z = z.astype(jnp.promote_types(z.dtype, jnp.float32))
        return jnp.sqrt(jnp.mean(jnp.square(z), axis) + eps)

    return rms(y) / rms(x)


def gain_report(
    params: Any,
    base: Any,
    *,
    iters: int | None = None,
    which: Select | None = None,
    views: Views | None = None,
) -> dict[str, Gain]:
    """Compares the singular values of two models of one structure, matrix by matrix.

    Args:
        params: of one model.
        base: of the other, as of a small proxy.
        iters: as in `top_singular_values`.
        which: as in `top_singular_values`.
        views: as in `top_singular_values`.

    Returns:
        A `Gain` for each leaf's path.

    Raises:
        ValueError: if the models have different matrices or stacks.
    """
    tops, bulks = (
        [measure(tree, which=which, views=views) for tree in (params, base)]
        for measure in (
            lambda tree, **kw: top_singular_values(tree, iters=iters, **kw),
            rms_singular_values,
        )
    )
    if missing := sorted(tops[0].keys() ^ tops[1].keys()):
        raise ValueError(
            f"matrix {missing[0]!r} is in one of the models only ({len(missing)} "
            "such): compare models of one structure"
        )
    out = {}
    for path, top in tops[0].items():
        if top.shape != tops[1][path].shape:
            raise ValueError(
                f"matrix {path!r} is stacked {top.shape[:-1]} in one model and "
                f"{tops[1][path].shape[:-1]} in the other: compare models of one depth"
            )
        pair = (t[path][..., 0] for t in tops)
        out[path] = Gain(*pair, *(b[path] for b in bulks))
    return out


def _matrices(
    params: Any,
    which: Select | None,
    views: Views | None,
) -> list[tuple[str, jax.Array, MatrixView]]:
    """Path, dense value in the dtype to compute in, and view of each matrix."""
    known = {leaf.path: leaf.view for leaf in describe(params, views=views)}
    chosen = {path for path, view in known.items() if view is not None}
    if which is not None:
        chosen = {p for p, hit in leaves_with_paths(select(params, which)) if hit}
    out = []
    for path, x in leaves_with_paths(params):
        if path not in chosen:
            continue
        view = known[path]
        if view is None:
            raise ValueError(
                f"leaf {path!r} of shape {jnp.shape(x)} is no matrix: leave it out of "
                "which=, or give its view in views="
            )
        x = jnp.asarray(materialise(x))
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        out.append((path, x, view))
    return out


def _subspace(m: jax.Array, k: int, iters: int) -> jax.Array:
    """The k largest singular values of each matrix by iteration on its products."""
    mt = jnp.swapaxes(m, -1, -2)
    start = jax.random.normal(jax.random.key(0), (m.shape[-1], k), m.dtype)

    def product(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)

    def step(_: Any, q: jax.Array) -> jax.Array:
        return jnp.linalg.qr(product(mt, product(m, q)))[0]

    q = jnp.broadcast_to(jnp.linalg.qr(start)[0], (*m.shape[:-2], *start.shape))
    q = lax.fori_loop(0, iters, step, q)
    return jnp.linalg.svd(product(m, q), compute_uv=False)
