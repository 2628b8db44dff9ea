# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Kernels rounded with what is known of their inputs: functions from arrays to weights.

Each takes a kernel and statistics and returns a `Quantized` (a `Permuted` one where the
order of activity decides what lies side by side); `jax.vmap` runs them over stacked
layers and experts. Outputs are independent of each other, so that a kernel may
be divided over a mesh along them without communication.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from wlab.core import MatrixView, Permuted
from wlab.quant._gptq import Mode, Solved, gar_order, solve
from wlab.quant._grid import get_grid
from wlab.quant._quantized import EACH, WHOLE, Quantized
from wlab.quant._uniform import Range, Uniform

Order = bool | Literal["groups"]


def rtn(
    w: jax.Array,
    *,
    bits: int = 4,
    group: int | None = 128,
    symmetric: bool = False,
    clip: bool = False,
    scale_dtype: Any = None,
) -> Quantized:
    """Round to nearest: the baseline that needs no calibration.

    Args:
        w: kernel [in, out].
        bits: 2 to 8.
        group: input channels that share a range; None: all of them.
        symmetric: no zero point.
        clip: a shorter range for each group, where its error is less.
        scale_dtype: of the stored scales, such as float16, to which they are rounded
            before anything else is; zero points are then stored as uint8. None: all
            are stored as they are computed.

    Returns:
        The packed kernel, with float32 ranges unless `scale_dtype` says otherwise.

    Raises:
        ValueError: for bits that are none, or a kernel that is no matrix.
        TypeError: for a kernel that holds no floats.

    Examples:
        >>> rtn(jnp.linspace(-1, 1, 8)[:, None], bits=2, group=None).shape
        (8, 1)
    """
    wide, grid = checked(w), _grid(bits, symmetric, clip, scale_dtype)
    n, m = w.shape
    size = n if group is None else group
    count = -(-n // size)
    parts = jnp.pad(wide, [(0, count * size - n), (0, 0)]).reshape(count, size, m)
    found = grid.fit(parts, axis=1)
    each = jax.tree.map(lambda x: jnp.repeat(x, size, 0)[:n], found)
    return _packed(w, grid, grid.codes(wide, each), found, group)


def gptq(
    w: jax.Array,
    h: jax.Array,
    *,
    bits: int = 4,
    group: int | None = 128,
    symmetric: bool = False,
    clip: bool = False,
    scale_dtype: Any = None,
    act_order: Order = False,
    static_groups: bool = False,
    damping: float = 0.01,
    block: int = 128,
) -> Quantized | Permuted:
    """GPTQ: what rounding does to the outputs is made up for by the later channels.

    Args:
        w: kernel [in, out], in Flax's layout.
        h: ``X^T X`` of the layer's inputs, [in, in], float32; a factor does not matter.
        bits: 2 to 8.
        group: input channels that share a range; None: all of them.
        symmetric: no zero point.
        clip: a shorter range for each group, where its error is less.
        scale_dtype: of the stored scales; see `rtn`.
        act_order: the most active channels first. Groups are then of channels in this
            order, and so is what is returned, but with `static_groups`. "groups": the
            most active groups first, and within them these channels; groups stay what
            they are.
        static_groups: fit all ranges before anything moves.
        damping: added to the diagonal, over its mean; raised where it must be.
        block: channels that are compensated one by one before the others are.

    Returns:
        The packed kernel, with float32 ranges unless `scale_dtype` says otherwise; a
        `Permuted` one if its groups are of channels by activity.

    Raises:
        ValueError: for bits that are none, shapes that do not fit, or group and block
            of which neither divides the other.
        TypeError: for a kernel that holds no floats.

    Examples:
        >>> x = jax.random.normal(jax.random.key(0), (64, 8))
        >>> w = jax.random.normal(jax.random.key(1), (8, 4))
        >>> q = gptq(w, x.T @ x, bits=3, group=None)
        >>> lost = jnp.linalg.norm(x @ (q.materialise() - w))
        >>> bool(lost < 0.3 * jnp.linalg.norm(x @ w))
        True
    """
    return gptaq(
        w,
        h,
        None,
        bits=bits,
        group=group,
        symmetric=symmetric,
        clip=clip,
        scale_dtype=scale_dtype,
        act_order=act_order,
        static_groups=static_groups,
        damping=damping,
        block=block,
    )


def gptaq(
    w: jax.Array,
    h: jax.Array,
    d: jax.Array | None,
    *,
    bits: int = 4,
    group: int | None = 128,
    symmetric: bool = False,
    clip: bool = False,
    scale_dtype: Any = None,
    act_order: Order = False,
    static_groups: bool = False,
    damping: float = 0.01,
    block: int = 128,
    alpha: float = 0.25,
    alpha2: float = 0.0,
    mode: Mode = "auto",
) -> Quantized | Permuted:
    """GPTAQ: GPTQ that aims at the outputs of the original model.

    Args:
        w: as in `gptq`, and so are the others that are not named here.
        h: of the inputs that the quantised model sees.
        d: ``(X~ - X)^T X`` with the original model's inputs X~, [in, in].
        bits: as in `gptq`.
        group: as in `gptq`.
        symmetric: as in `gptq`.
        clip: as in `gptq`.
        scale_dtype: as in `rtn`.
        act_order: as in `gptq`.
        static_groups: as in `gptq`.
        damping: as in `gptq`.
        block: as in `gptq`; it changes the result here.
        alpha: strength of the correction.
        alpha2: strength of ResComp's.
        mode: what a block hands on; see `wlab.quant._gptq.solve`.

    Returns:
        As `gptq` does.

    Raises:
        ValueError: as `gptq` does.
        TypeError: as `gptq` does.
    """
    wide = checked(w)
    grid = _grid(bits, symmetric, clip, scale_dtype)
    h = h.astype(wide.dtype)
    d = None if d is None else d.astype(wide.dtype)
    by_group = act_order == "groups" and group is not None
    found: Solved = solve(
        wide,
        h,
        d,
        grid=grid,
        group=group,
        block=min(block, _least_block(w.shape[0], group, block)),
        damping=damping,
        act_order=bool(act_order) and not by_group,
        order=gar_order(jnp.diagonal(h), group) if by_group else None,
        static_groups=static_groups,
        alpha=alpha,
        alpha2=alpha2,
        mode=mode,
    )
    codes, ranges = found.codes, found.range
    if group is None or static_groups or not act_order:
        return _packed(w, grid, codes, ranges, group)
    if by_group:
        ranges = jax.tree.map(lambda x: restored(x, found.order, group), ranges)
        return _packed(w, grid, codes, ranges, group)
    # Within a group the channels are where they were: that is all that a list of the
    # channels' groups can tell, as files have it.
    rank = jnp.argsort(found.order)
    order = jnp.argsort(rank // group, stable=True).astype(found.order.dtype)
    return Permuted(_packed(w, grid, codes[order], ranges, group), order)


def rescomp(
    w: jax.Array, h: jax.Array, d: jax.Array, *, alpha2: float = 0.25, **options: Any
) -> Quantized | Permuted:
    """ResComp: GPTAQ that also feeds back how far compensation has moved a channel.

    Args:
        w: as in `gptaq`.
        h: as in `gptaq`.
        d: as in `gptaq`.
        alpha2: strength of that feedback.
        **options: as in `gptaq`.

    Returns:
        As `gptq` does.
    """
    return gptaq(w, h, d, alpha2=alpha2, **options)


def restored(ranges: jax.Array, order: jax.Array, group: int) -> jax.Array:
    """Ranges [groups, ...] in the order of `gar_order`, back at their groups."""
    return ranges[jnp.argsort(order[::group] // group)]


def _least_block(n: int, group: int | None, block: int) -> int:
    """A small kernel needs no whole block; ranges still begin with one."""
    if group is not None:
        return block
    return max(1, min(block, n))


def checked(w: jax.Array) -> jax.Array:
    """A kernel in the dtype to compute in.

    Raises:
        ValueError: if it is no matrix.
        TypeError: if it holds no floats.
    """
    if not jnp.issubdtype(w.dtype, jnp.floating):
        raise TypeError(
            f"a kernel of shape {w.shape} holds {w.dtype}: floats are rounded"
        )
    if w.ndim != 2:
        raise ValueError(
            f"a kernel of shape {w.shape} is no matrix [in, out]: reshape it, or map "
            "over stacked ones with jax.vmap"
        )
    return w.astype(jnp.promote_types(w.dtype, jnp.float32))


def _grid(bits: int, symmetric: bool, clip: bool, scale_dtype: Any) -> Uniform:
    if not 2 <= bits <= 8:
        raise ValueError(f"bits={bits}: kernels are stored at 2 to 8")
    if scale_dtype is not None and not jnp.issubdtype(scale_dtype, jnp.floating):
        raise TypeError(f"scale_dtype={scale_dtype}: scales are floats")
    return Uniform(bits, symmetric, clip, scale_dtype)


def _packed(
    w: jax.Array, grid: Uniform, codes: jax.Array, found: Range, group: int | None
) -> Quantized:
    stored = get_grid(f"{'int' if grid.symmetric else 'uint'}{grid.bits}")
    scale, zero = found
    if grid.scale_dtype is not None:
        scale, zero = scale.astype(grid.scale_dtype), zero.astype(jnp.uint8)
    return Quantized(
        codes=stored.encode(codes),
        scale=scale,
        zero=None if grid.symmetric else zero,
        grid=stored,
        block=(WHOLE if group is None else group, EACH),
        dense_dtype=np.dtype(w.dtype),
        matrix_view=MatrixView.of(1, 1),
    )
