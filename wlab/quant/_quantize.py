# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Round-to-nearest and stochastic quantisation of arrays and of trees.

A scale is chosen so that the largest magnitude of its block falls on the largest
value of the grid; no calibration. The arithmetic is in float32 at least.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from wlab.core import (
    MatrixView,
    Select,
    Views,
    describe,
    fold_path,
    is_weight,
    leaves_with_paths,
    map_with_path,
    ste,
)
from wlab.core import select as select_leaves
from wlab.quant._grid import Grid, get_grid
from wlab.quant._quantized import EACH, WHOLE, Quantized, expand, regroup

Rounding = Literal["nearest", "stochastic"]
Granularity = Literal["row", "tensor"]


def quantize(
    w: jax.Array,
    grid: str | Grid,
    *,
    axis: int | tuple[int, ...] | None = None,
    group: int | None = None,
    rounding: Rounding = "nearest",
    key: jax.Array | None = None,
    view: MatrixView | None = None,
) -> Quantized:
    """Quantise an array with the scales that its own magnitudes give.

    Args:
        w: float array of any shape.
        grid: a `Grid` or its name.
        axis: the axes along which each index has a scale of its own; the other axes
            share it. None: one scale for the whole array. For a Flax kernel (in, out),
            -1 gives a scale to each output, "row-wise" in the layout (out, in).
        group: share a scale only among so many neighbours along the last of the
            shared axes; the last group may be shorter.
        rounding: "nearest" (ties to even), or "stochastic": one of the two
            neighbours, the nearer the likelier, so that the mean is `w`.
        key: the random key that stochastic rounding needs.
        view: which axes are read and written, kept for later use.

    Returns:
        A `Quantized` of the shape and dtype of `w`. A block of zeros has the scale 1;
        one with a NaN or an infinity becomes NaN throughout, never a number.

    Raises:
        TypeError: if `w` is not a float array, or is a structured weight.
        ValueError: for a grid or rounding that is none, an axis that `w` does not
            have, a group that is not positive, or a missing key.

    Examples:
        >>> q = quantize(jnp.array([[1.0, 7.0], [0.4, -14.0]]), "int4", axis=-1)
        >>> print(q.materialise())
        [[  1.           8.        ]
         [  0.42857146 -14.        ]]
    """
    grid = get_grid(grid)
    _check_dense("an array", w)
    if not jnp.issubdtype(w.dtype, jnp.floating):
        raise TypeError(
            f"quantize: an array of dtype {w.dtype} and shape {w.shape} has no scale; "
            "leave it out of the selection or convert it to a float dtype"
        )
    block = _blocks(w.shape, axis, group)
    noise = _noise(w, rounding, key)
    return quantize_blocks(w, grid, block, noise, view=view)


def quantize_blocks(
    w: jax.Array,
    grid: Grid,
    block: tuple[int, ...],
    noise: jax.Array | None = None,
    *,
    scale: jax.Array | None = None,
    view: MatrixView | None = None,
    dtype: Any = None,
) -> Quantized:
    """`quantize` with everything decided: blocks, and the noise of the rounding.

    Args:
        w: float array.
        grid: the grid.
        block: per axis 0 (shared by the whole axis), 1 (each index its own) or the
            length of a group.
        noise: None for nearest; else uniform numbers in [0, 1) of the shape of `w`.
        scale: scales to use instead of those that `w` gives (symmetric grids).
        view: kept on the result.
        dtype: of the array that the result stands for; that of `w` by default.
    """
    x = w.astype(jnp.promote_types(w.dtype, jnp.float32))
    zero = None
    if scale is None:
        scale, zero = block_scale(x, grid, block)
    z = x / expand(scale, w.shape, block)
    if zero is not None:
        z = z + expand(zero, w.shape, block)
    return Quantized(
        codes=grid.encode(grid.round(z, noise)),
        scale=scale,
        zero=zero,
        grid=grid,
        block=block,
        dense_dtype=np.dtype(dtype or w.dtype),
        matrix_view=view,
    )


def block_scale(
    x: jax.Array, grid: Grid, block: tuple[int, ...]
) -> tuple[jax.Array, jax.Array | None]:
    """The scale of each block, and its zero point if the grid needs one.

    The largest magnitude of a block falls on the largest value of the grid. A block of
    zeros, or one so small that its scale underflows, has the scale 1.
    """
    if grid.kind == "uint":
        low = jnp.minimum(_reduce(x, block, jnp.min), 0)
        span = jnp.maximum(_reduce(x, block, jnp.max), 0) - low
    else:
        low, span = None, _reduce(jnp.abs(x), block, jnp.max)
    scale = span / jnp.asarray(grid.largest, x.dtype)
    scale = jnp.where(scale == 0, jnp.ones_like(scale), scale)
    return scale, None if low is None else jnp.round(-low / scale)


def fake_quantize(
    w: jax.Array,
    grid: str | Grid,
    *,
    axis: int | tuple[int, ...] | None = None,
    group: int | None = None,
    rounding: Rounding = "nearest",
    key: jax.Array | None = None,
) -> jax.Array:
    """The values of `quantize` with the gradient of the identity.

    Arguments as in `quantize`. This is the forward pass of training with full
    precision weights beside the quantised ones, and of quantised activations.
    """
    q = quantize(
        jax.lax.stop_gradient(w),
        grid,
        axis=axis,
        group=group,
        rounding=rounding,
        key=key,
    )
    return ste.straight_through(w, q.materialise())


def quantize_tree(
    params: Any,
    grid: str | Grid,
    *,
    select: Select | None = None,
    granularity: Granularity = "row",
    group: int | None = None,
    rounding: Rounding = "nearest",
    key: jax.Array | None = None,
    views: Views | None = None,
) -> Any:
    """Quantise the matrices of a parameter tree.

    Args:
        params: a tree of arrays (linen's dict, an nnx State, any pytree).
        grid: a `Grid` or its name.
        select: which leaves, as in `wlab.core.select`. None: the kernels of linear
            layers and convolutions; not embeddings, head, norms and biases.
        granularity: "row", a scale for each output (attention heads and their
            dimensions counted apart); or "tensor", one for each matrix. Stacked
            layers never share a scale.
        group: as in `quantize`, along the last input axis.
        rounding: as in `quantize`.
        key: as in `quantize`; each leaf folds in its own path.
        views: which axes of a leaf are inputs and outputs, where names do not tell;
            see `wlab.core.describe`.

    Returns:
        The tree with `Quantized` in place of the selected leaves.

    Raises:
        TypeError: for a selected leaf that is not a float array, or is packed already.
        ValueError: for an empty tree, a pattern that matches nothing, a selected leaf
            that is no matrix or holds NaN or infinity (where values are known).
    """
    grid = get_grid(grid)
    chosen = quantizable(params, select, views)

    def one(path: str, leaf: Any) -> Any:
        if path not in chosen:
            return leaf
        view = chosen[path]
        _check_dense(f"leaf {path!r}", leaf)
        check_finite(path, leaf)
        block = matrix_block(view, leaf.ndim, granularity, group)
        noise = _noise(leaf, rounding, None if key is None else fold_path(key, path))
        return quantize_blocks(leaf, grid, block, noise, view=view)

    return map_with_path(one, params)


def fake_quantize_tree(params: Any, grid: str | Grid, **options: Any) -> Any:
    """The values of `quantize_tree` with the gradient of the identity.

    Args:
        params: a tree of arrays: the weights in full precision.
        grid: a `Grid` or its name.
        **options: as in `quantize_tree`.

    Returns:
        A tree of arrays, for a forward pass that sees quantised weights while the
        optimiser moves those in full precision.
    """
    q = quantize_tree(jax.lax.stop_gradient(params), grid, **options)

    def one(path: str, leaf: Any, w: Any) -> Any:
        del path
        return ste.straight_through(w, leaf.materialise()) if is_weight(leaf) else w

    return map_with_path(one, q, params)


def quantizable(
    params: Any,
    pattern: Select | None,
    views: Views | None = None,
) -> dict[str, MatrixView]:
    """The leaves to quantise and how each is seen as a matrix, by path.

    Raises as `quantize_tree` says.
    """
    leaves = describe(params, views=views)
    if not leaves:
        raise ValueError("quantisation of an empty tree: it has no leaf")
    if pattern is None:
        chosen = {leaf.path for leaf in leaves if leaf.role in ("kernel", "conv")}
        if not chosen:
            raise ValueError(
                "no leaf looks like the kernel of a layer; name the leaves with "
                "select=, and their axes with views= (wlab.explain(params) lists them)"
            )
    else:
        mask = select_leaves(params, pattern)
        marks = dict(leaves_with_paths(mask))
        chosen = {leaf.path for leaf in leaves if marks[leaf.path]}
    out = {}
    for leaf in leaves:
        if leaf.path not in chosen:
            continue
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(
                f"leaf {leaf.path!r} of shape {leaf.shape} has dtype {leaf.dtype}: "
                "only floats are quantised; leave it out of select="
            )
        if leaf.view is None:
            raise ValueError(
                f"leaf {leaf.path!r} of shape {leaf.shape} is no matrix (role "
                f"{leaf.role}); leave it out of select=, or give its axes: "
                f"views={{{leaf.path!r}: MatrixView(inputs=..., outputs=...)}}"
            )
        out[leaf.path] = leaf.view
    return out


def matrix_block(
    view: MatrixView, ndim: int, granularity: Granularity, group: int | None = None
) -> tuple[int, ...]:
    """The blocks of a leaf with that view: see `quantize_tree`."""
    if granularity not in ("row", "tensor"):
        raise ValueError(f"granularity {granularity!r} is neither 'row' nor 'tensor'")
    own = {a % ndim for a in view.stack(ndim)}
    if granularity == "row":
        own |= {a % ndim for a in view.outputs}
    block = [EACH if i in own else WHOLE for i in range(ndim)]
    if group is not None:
        block[view.inputs[-1] % ndim] = _checked_group(group)
    return tuple(block)


def check_finite(path: str, leaf: Any) -> None:
    """Raise if a leaf whose values are known holds NaN or infinity."""
    if is_weight(leaf) or not isinstance(leaf, (jax.Array, np.ndarray)):
        return
    if isinstance(leaf, jax.core.Tracer) or not leaf.size:
        return
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return
    with jax.ensure_compile_time_eval():  # under jit, a constant is known too
        bad = int(jnp.sum(~jnp.isfinite(leaf)))
    if bad:
        raise ValueError(
            f"leaf {path!r} of shape {tuple(leaf.shape)} holds {bad} NaN or infinite "
            "values; a scale cannot be found for them: repair or leave out the leaf"
        )


def _check_dense(name: str, leaf: Any) -> None:
    if is_weight(leaf):
        raise TypeError(
            f"{name} of shape {tuple(leaf.shape)} is a {type(leaf).__name__}, not an "
            "array: quantise its dense form, wlab.materialise(params), or leave it out "
            "of select="
        )


def _reduce(x: jax.Array, block: tuple[int, ...], fn: Any) -> jax.Array:
    """Maximum or minimum with zero over blocks, with the reduced axes kept."""
    for axis, b in enumerate(block):
        if b == EACH:
            continue
        n = x.shape[axis]
        if b == WHOLE or b >= n:
            x = fn(x, axis=axis, keepdims=True, initial=0)  # for axes of size 0 too
            continue
        # A last group that is shorter is filled with its own edge.
        pad = [(0, 0)] * x.ndim
        pad[axis] = (0, -n % b)
        shape = (*x.shape[:axis], -(-n // b), b, *x.shape[axis + 1 :])

        def groups(x: jax.Array, pad: Any = pad, shape: Any = shape, axis: int = axis):
            x = jnp.pad(x, pad, mode="edge") if any(pad[axis]) else x
            return fn(x.reshape(shape), axis=axis + 1)

        x = regroup(groups, x, axis)
    return x


def _blocks(
    shape: tuple[int, ...], axis: int | tuple[int, ...] | None, group: int | None
) -> tuple[int, ...]:
    ndim = len(shape)
    axes = () if axis is None else (axis,) if isinstance(axis, int) else tuple(axis)
    for a in axes:
        if not -ndim <= a < ndim:
            raise ValueError(
                f"quantize: axis {a} does not exist in shape {shape}; axes run from "
                f"{-ndim} to {ndim - 1}"
            )
    own = {a % ndim for a in axes}
    block = [EACH if i in own else WHOLE for i in range(ndim)]
    if group is not None:
        shared = [i for i in range(ndim) if i not in own]
        if not shared:
            raise ValueError(
                f"quantize: axis={axis} leaves no axis of {shape} to group"
            )
        block[shared[-1]] = _checked_group(group)
    return tuple(block)


def _checked_group(group: int) -> int:
    if group < 2:
        raise ValueError(f"quantize: group={group} must be at least 2")
    return group


def _noise(w: jax.Array, rounding: str, key: jax.Array | None) -> jax.Array | None:
    if rounding == "nearest":
        return None
    if rounding != "stochastic":
        raise ValueError(f"rounding {rounding!r} is neither 'nearest' nor 'stochastic'")
    if key is None:
        raise ValueError("rounding='stochastic' needs key=jax.random.key(...)")
    return jax.random.uniform(key, w.shape, jnp.promote_types(w.dtype, jnp.float32))
