# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""The quantised leaves of a parameter tree, as an optimiser finds and moves them.

Packed leaves (`Quantized`) and dense ones whose values lie on a grid look alike from
here: a plan says how each is quantised, and a change brings the stored leaf to a new
value on the grid through `optax.apply_updates`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from wlab.core import MatrixView, Select, Views, is_weight, leaves_with_paths
from wlab.quant import (
    Granularity,
    Grid,
    Quantized,
    block_scale,
    get_grid,
    matrix_block,
    quantizable,
    quantize_blocks,
)


class Plan(NamedTuple):
    """How one leaf is quantised."""

    grid: Grid
    block: tuple[int, ...]
    view: MatrixView


def eco_granularity(grid: str | Grid) -> Granularity:
    """The scales that ECO's paper gives a grid.

    One for each matrix with integers of four bits and fewer, one for each output with
    FP8 and wider integers.
    """
    grid = get_grid(grid)
    return "tensor" if grid.kind == "int" and grid.bits <= 4 else "row"


def plans(
    params: Any,
    *,
    grid: Grid,
    granularity: Granularity | None,
    select: Select | None,
    views: Views | None,
) -> dict[str, Plan]:
    """How each quantised leaf is quantised, by path.

    Raises:
        ValueError: where packed leaves and the arguments disagree, or as
            `wlab.quant.quantize_tree` does; it names the leaf.
        TypeError: for a selected leaf that is no float array.
    """
    named = leaves_with_paths(params)
    packed = {p: leaf for p, leaf in named if isinstance(leaf, Quantized)}
    if not named:
        return {}
    if not packed:
        granularity = granularity or eco_granularity(grid)
        chosen = quantizable(params, select, views)
        for path, leaf in named:
            if path in chosen and is_weight(leaf):
                raise TypeError(
                    f"leaf {path!r} of shape {leaf.shape} is a {type(leaf).__name__}: "
                    "ECO trains arrays and Quantized weights; leave it out of select="
                )
        ndim = {p: jnp.ndim(leaf) for p, leaf in named}
        return {
            p: Plan(grid, matrix_block(view, ndim[p], granularity), view)
            for p, view in chosen.items()
        }
    if select is not None:
        raise ValueError(
            f"select= is for dense parameters; here {len(packed)} leaves are packed "
            "(Quantized), and they are what ECO trains: leave select= out, or choose "
            "them in wlab.quant.quantize_tree"
        )
    out = {}
    for path, leaf in packed.items():
        if leaf.grid != grid:
            raise ValueError(
                f"leaf {path!r} of shape {leaf.shape} is packed on {leaf.grid.name}, "
                f"but grid={grid.name!r}: give both the same grid"
            )
        view = leaf.view or MatrixView.of(1, 1)
        if granularity is not None:
            block = matrix_block(view, leaf.ndim, granularity)
            if block != leaf._blocks:
                raise ValueError(
                    f"leaf {path!r} of shape {leaf.shape} is packed with scales of "
                    f"shape {leaf.scale.shape}, which is not granularity="
                    f"{granularity!r}: leave it out or pack the tree with it"
                )
        out[path] = Plan(grid, leaf._blocks, view)
    return out


def requantise(
    leaf: Any, x: jax.Array, plan: Plan, noise: jax.Array | None
) -> tuple[Any, jax.Array]:
    """The change that brings a stored leaf to q(x), and q(x) as it will be stored."""
    scale, _ = block_scale(x, plan.grid, plan.block)
    if not isinstance(leaf, Quantized):
        q = quantize_blocks(x, plan.grid, plan.block, noise, scale=scale)
        # Rounded as the parameter's dtype will round it, so that this is fed back too.
        weight = q.values().astype(leaf.dtype).astype(x.dtype)
        return weight - leaf.astype(x.dtype), weight
    # Quantised against the scale that the addition of the difference will give. It
    # falls no further than that sum can hold: not to zero, as from the 1 of a row of
    # zeros to the first tiny step.
    scale = jnp.maximum(scale, leaf.scale * jnp.finfo(leaf.scale.dtype).eps)
    change = scale - leaf.scale
    scale = leaf.scale + change
    q = quantize_blocks(x, plan.grid, plan.block, noise, scale=scale, view=leaf.view)
    difference = Quantized(
        codes=q.codes - leaf.codes,
        scale=change,
        zero=None,
        grid=leaf.grid,
        block=leaf.block,
        dense_dtype=leaf.dense_dtype,
        matrix_view=leaf.matrix_view,
    )
    return difference, q.values()


def uniform(key: jax.Array, like: jax.Array) -> jax.Array:
    """Uniform noise, drawn where the leaf lives if its mesh axes are Explicit."""
    sharding = jax.typeof(like).sharding
    if sharding.mesh.empty or sharding.mesh.are_all_axes_auto:
        sharding = None
    return jax.random.uniform(key, like.shape, like.dtype, out_sharding=sharding)


def checked_gradient(path: str, grads: dict[str, Any], leaf: Any) -> jax.Array:
    """The gradient of a leaf; an error that names the leaf where it does not fit."""
    g = grads.get(path)
    if isinstance(g, Quantized) or (g is None and isinstance(leaf, Quantized)):
        raise ValueError(
            f"leaf {path!r} of shape {leaf.shape} is packed: take the gradient at "
            "wlab.materialise(params), as an array of that shape"
        )
    if g is None or jnp.shape(g) != tuple(leaf.shape):
        got = "missing" if g is None else f"of shape {jnp.shape(g)}"
        raise ValueError(
            f"the gradient of leaf {path!r} is {got}; the leaf has shape {leaf.shape}"
        )
    return g
