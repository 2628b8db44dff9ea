# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Small facts about shapes and windows that several structured weights share."""

from collections.abc import Sequence
from typing import Any

import jax
from jax import lax


def reshape_blocks(
    old: Sequence[int], new: Sequence[int]
) -> list[tuple[tuple[int, ...], tuple[int, ...]]] | None:
    """The smallest groups of axes that a row-major reshape maps onto each other.

    Args:
        old: the shape before.
        new: the shape after, of the same size.

    Returns:
        Pairs (old axes, new axes), in order; either side may be empty where only
        axes of size one are dropped or inserted. None if a size is zero.

    Examples:
        >>> reshape_blocks((6, 4, 5), (6, 20))
        [((0,), (0,)), ((1, 2), (1,))]
    """
    if 0 in old or 0 in new:
        return None
    blocks = []
    i = j = 0
    while i < len(old) or j < len(new):
        i0, j0 = i, j
        size_old = size_new = 1
        if i < len(old):
            size_old, i = old[i], i + 1
        if j < len(new) and not (size_old == 1 and new[j] != 1):
            size_new, j = new[j], j + 1
        while size_old != size_new:
            if size_old < size_new:
                size_old, i = size_old * old[i], i + 1
            else:
                size_new, j = size_new * new[j], j + 1
        blocks.append((tuple(range(i0, i)), tuple(range(j0, j))))
    return blocks


def window(
    x: jax.Array,
    starts: Sequence[Any],
    sizes: Sequence[int],
    strides: Sequence[int] | None,
) -> jax.Array:
    """`lax.slice` where `strides` is given, `lax.dynamic_slice` where it is None."""
    if strides is None:
        return lax.dynamic_slice(x, starts, sizes)
    limits = [
        lo + (n - 1) * s + 1 if n else lo
        for lo, n, s in zip(starts, sizes, strides, strict=True)
    ]
    return lax.slice(x, starts, limits, strides)


def single_axis_gather(shape: Sequence[int], params: dict[str, Any]) -> int | None:
    """The axis that a `lax.gather` indexes, if it takes whole slices along it."""
    dims = params["dimension_numbers"]
    if dims.operand_batching_dims or len(dims.start_index_map) != 1:
        return None
    (axis,) = dims.start_index_map
    whole = tuple(1 if i == axis else n for i, n in enumerate(shape))
    if tuple(dims.collapsed_slice_dims) != (axis,) or params["slice_sizes"] != whole:
        return None
    return axis


def gather_axis(
    x: jax.Array, indices: jax.Array, axis: int, params: dict[str, Any]
) -> jax.Array:
    """The slices of `x` along `axis` that a `lax.gather` of another array takes.

    Args:
        x: any array with that axis.
        indices: the gather's indices, [..., 1].
        axis: the axis of `x` that is indexed.
        params: the parameters of the gather, for its mode and fill value.

    Returns:
        An array whose shape is that of the indices without the last axis, then the
        other axes of `x` in order.
    """
    batch = indices.ndim - 1
    dims = lax.GatherDimensionNumbers(
        offset_dims=tuple(range(batch, batch + x.ndim - 1)),
        collapsed_slice_dims=(axis,),
        start_index_map=(axis,),
    )
    # NaN marks an index out of bounds in each factor; any other filling stands in
    # the base alone, so that it is counted once.
    fill = None if params.get("fill_value") is None else 0
    return lax.gather(
        x,
        indices,
        dims,
        tuple(1 if i == axis else n for i, n in enumerate(x.shape)),
        mode=params.get("mode"),
        fill_value=fill,
    )


def gather_labels(
    kept: Sequence[int], batch: Sequence[int], params: dict[str, Any]
) -> list[int]:
    """The labels of a gather's output, in the order in which it returns its axes.

    Args:
        kept: labels of the operand's axes that are not indexed, in order.
        batch: labels of the axes of the indices, in order.
        params: the parameters of the gather.
    """
    offset = params["dimension_numbers"].offset_dims
    whole, looked_up = iter(kept), iter(batch)
    total = len(kept) + len(batch)
    return [next(whole if d in offset else looked_up) for d in range(total)]
