# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
r"""QuantLRM: what fine-tuning did tells which channels matter (a measure and a map).

The sizes of the updates :math:`|W_1 - W_0|` of all matrices of a model together are
mapped to [1, R] so that both the smallest and the largest count most,

.. math::

    y = 1 + (R - 1) \Big( \frac{x - x_{mid}}{x_{end} - x_{mid}} \Big)^2, \qquad
    x_{end} = x_{min} \text{ below the median, else } x_{max},

and an input channel's importance is the mean of its row's :math:`y` times one more than
the number of updates that are exactly zero. It takes the place of the activations'
magnitudes in AWQ's search of scales.

Zeros are those of the stored numbers: float32 master weights have none, so they are
compared in the dtype in which they were stored. The published scripts round to float16
before they count and take the entry in the middle of the file for the median; here
arithmetic is float32, and the median one unless that entry is asked for.

References:
    `QuantLRM: Quantization of Large Reasoning Models via Fine-Tuning Signals
    <https://arxiv.org/abs/2602.02581>`_, 2026.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from wlab.core import (
    Select,
    Views,
    as_matrices,
    leaves_with_paths,
    linalg,
)
from wlab.quant._awq import ScaleGroup, awq
from wlab.quant._quantize import quantizable

Mid = Literal["median", "storage"]


class UpdateStats(NamedTuple):
    """Of the positive entries of all updates; NaN where there is none."""

    low: jax.Array  # float32, the least
    high: jax.Array  # float32, the largest
    mid: jax.Array  # float32, the one in the middle


# --- Arrays ----------------------------------------------------------------------


def update_stats(sizes: Any, mid: Mid = "median") -> UpdateStats:
    """The range and the middle of the positive entries of all arrays together.

    The median is exact and found by counting: nothing is sorted or concatenated, and
    arrays may be sharded in any way.

    Args:
        sizes: a tree of arrays [..., in, out], not negative, float32; with fewer than
            ``2 ** 32`` entries.
        mid: "median"; or "storage", the entry (the mean of two, if their number is
            even) in the middle of their order in memory: leaves as `jax.tree.leaves`
            orders them, stacked matrices, outputs, inputs.

    Returns:
        Three scalars.

    Raises:
        ValueError: where values are known, if none is positive; for a `mid` that is
            none, or too many entries.
        TypeError: for arrays of no floats.

    Examples:
        >>> stats = update_stats([jnp.array([[0.0, 1.0], [4.0, 2.0]])])
        >>> print(*stats)
        1.0 4.0 2.0
    """
    if mid not in ("median", "storage"):
        raise ValueError(f"mid={mid!r} is neither 'median' nor 'storage'")
    leaves = jax.tree.leaves(sizes)
    n = sum(jnp.sum(x > 0, dtype=jnp.uint32) for x in leaves)
    if not isinstance(n, jax.core.Tracer) and not n:
        raise ValueError(
            f"no update in {len(leaves)} arrays is positive: the two models are one, "
            "or were compared in too narrow a dtype"
        )
    some = jnp.maximum(n, 1)
    middle = (some - 1) // 2, some // 2
    if mid == "median":
        # From the largest down: zeros come last.
        pair = [linalg.kth_largest(leaves, some - i) for i in middle]
    else:
        pair = [_stored(leaves, i) for i in middle]
    found = UpdateStats(
        low=_least(jnp.min(jnp.where(x > 0, x, jnp.inf)) for x in leaves),
        high=-_least(-jnp.max(x) for x in leaves),
        mid=(pair[0] + pair[1]) / 2,
    )
    return UpdateStats(*(jnp.where(n > 0, x, jnp.nan) for x in found))


def both_ends(
    sizes: jax.Array, stats: UpdateStats, r: float | jax.Array = 10.0
) -> jax.Array:
    """Sizes mapped to [1, r]: `r` at both ends, 1 in the middle and for zeros.

    Args:
        sizes: not negative, float32, any shape.
        stats: of all updates of the model.
        r: the largest value.

    Examples:
        >>> x = jnp.array([0.0, 1.0, 2.0, 3.0])
        >>> both_ends(x, update_stats([x[None]])).tolist()
        [1.0, 10.0, 1.0, 10.0]
    """
    low, high, mid = stats
    below = (mid - sizes) / jnp.maximum(mid - low, 1e-30)
    above = (sizes - mid) / jnp.maximum(high - mid, 1e-30)
    part = jnp.clip(jnp.where(sizes <= mid, below, above), -1, 1)
    part = jnp.where(sizes > 0, part, 0 * mid)  # NaN if no update is positive
    return 1 + (r - 1) * part**2


def channel_importance(
    sizes: jax.Array, stats: UpdateStats, r: float | jax.Array = 10.0
) -> jax.Array:
    """How much each input channel of a kernel counts, at least 1.

    Args:
        sizes: of its updates, [..., in, out], float32.
        stats: of all updates of the model.
        r: see `both_ends`.

    Returns:
        [..., in], float32.
    """
    zeros = jnp.sum(sizes == 0, axis=-1)
    return both_ends(sizes, stats, r).mean(-1) * (1 + zeros)


# --- Trees -----------------------------------------------------------------------


def update_sizes(
    params: Any,
    base: Any,
    *,
    which: Select | None = None,
    dtype: Any = None,
    views: Views | None = None,
) -> dict[str, jax.Array]:
    """The sizes of all updates of a fine-tuned model, as matrices.

    Args:
        params: its parameters.
        base: those from which it was fine-tuned.
        which: the matrices, as in `wlab.core.select`; None: the kernels of layers, not
            embeddings and head.
        dtype: in which both were stored; None: the leaves'. Numbers too small to be
            normal in it are zeros.
        views: which axes are inputs and outputs, where names do not tell.

    Returns:
        For each path |params - base|, stack + [in, out], float32 at least.

    Raises:
        ValueError: for trees that do not fit each other, or a selection that matches
            nothing or no matrix.
    """
    chosen = quantizable(params, which, views)
    new, old = (dict(leaves_with_paths(tree)) for tree in (params, base))
    out = {}
    for path, view in chosen.items():
        if path not in old or old[path].shape != new[path].shape:
            other = f"of shape {old[path].shape}" if path in old else "missing"
            raise ValueError(
                f"leaf {path!r} of shape {new[path].shape} is {other} in the base: "
                "updates are those of one architecture"
            )
        stored = new[path].dtype if dtype is None else dtype
        after, before = (_as_stored(tree[path], stored) for tree in (new, old))
        out[path] = as_matrices(jnp.abs(after - before), view)
    return out


def quantlrm(
    params: Any,
    base: Any,
    inputs: Mapping[str, jax.Array],
    groups: Sequence[ScaleGroup],
    stats: UpdateStats,
    *,
    bits: int = 3,
    r: float = 10.0,
    dtype: Any = None,
    views: Views | None = None,
    **options: Any,
) -> Any:
    """AWQ on one block, with the importance that its updates say.

    A model without a known base is fine-tuned shortly by the caller: it then is the
    base of that one, and importances come from `channel_importance`, to be handed to
    `wlab.quant.awq` with the original parameters.

    Args:
        params: the fine-tuned block's parameters.
        base: those from which it was fine-tuned.
        inputs: as in `wlab.quant.awq`.
        groups: as in `wlab.quant.awq`; the first kernel's importance serves its group.
        stats: of the whole model, `update_stats(update_sizes(params, base))`: one
            block's own would say something else.
        bits: 2 to 8.
        r: see `both_ends`.
        dtype: see `update_sizes`.
        views: which axes are inputs and outputs, where names do not tell.
        **options: as in `wlab.quant.awq`.

    Returns:
        As `wlab.quant.awq` does.

    Raises:
        ValueError: as `wlab.quant.awq` and `update_sizes` do.
        TypeError: as `wlab.quant.awq` does.
    """
    first = {one.paths[0] for one in groups if one.previous}
    sizes = update_sizes(
        params, base, which=lambda path, _: path in first, dtype=dtype, views=views
    )
    importance = {path: channel_importance(x, stats, r) for path, x in sizes.items()}
    return awq(
        params, inputs, groups, bits=bits, importance=importance, views=views, **options
    )


def _least(values: Any) -> jax.Array:
    return jnp.min(jnp.stack([v.astype(jnp.float32) for v in values]))


def _stored(leaves: list[jax.Array], at: jax.Array) -> jax.Array:
    """The positive entry of that number, counted through memory."""
    found, before = jnp.zeros((), jnp.float32), jnp.zeros((), jnp.uint32)
    for leaf in leaves:
        flat = jnp.swapaxes(leaf, -1, -2).reshape(-1)
        positive = flat > 0
        number = before + jnp.cumsum(positive, dtype=jnp.uint32)
        here = positive & (number == at + jnp.uint32(1))
        found = found + jnp.sum(jnp.where(here, flat, 0))
        before = number[-1]
    return found


def _as_stored(x: jax.Array, dtype: Any) -> jax.Array:
    """Rounded to a dtype, in float32 at least.

    A pair of conversions would be undone by a compiler that may keep excess precision.
    """
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    kept, own = jnp.finfo(dtype), jnp.finfo(x.dtype)
    if kept.nmant >= own.nmant and kept.nexp >= own.nexp:
        return wide
    return jax.lax.reduce_precision(wide, kept.nexp, kept.nmant)
