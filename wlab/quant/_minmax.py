# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Uniform grids between a group's extremes: the quantiser of AWQ (a map).

Unlike that of `wlab.quant._uniform`, which always holds zero, the range runs from the
least to the largest weight of a group, and its zero point is clipped to the levels: a
group of positive weights loses its top end, as in the released arithmetic.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from wlab.core import MatrixView, as_matrices, from_matrices
from wlab.quant._grid import get_grid
from wlab.quant._quantized import EACH, WHOLE, Quantized, spread
from wlab.quant._uniform import Range

_TINY = 1e-5  # the least range: of a group of equal weights


class MinMax(NamedTuple):
    """``2 ** bits`` levels from the least to the largest weight of a group.

    A group that was clipped at both ends has its lowest weights just between two
    levels, where the noise of the arithmetic would choose: `tie` moves them down, by
    this part of the range, to where exact arithmetic has them.
    """

    bits: int
    tie: float = 1e-6  # 0: the released arithmetic

    def fit(self, w: jax.Array, axis: int = 0) -> Range:
        """Scales and zero points of groups that lie along an axis, without it."""
        low = w.min(axis)
        scale = jnp.maximum(w.max(axis) - low, _TINY) / self._highest
        zero = -jnp.round(low / scale - self._shift)
        return Range(scale, jnp.clip(zero, 0, self._highest))

    def codes(self, w: jax.Array, found: Range) -> jax.Array:
        """The nearest levels, of the dtype of `w`."""
        level = jnp.round(w / found.scale - self._shift) + found.zero
        return jnp.clip(level, 0, self._highest)

    def values(self, w: jax.Array, found: Range) -> jax.Array:
        """What the nearest levels stand for."""
        return found.scale * (self.codes(w, found) - found.zero)

    def round(self, w: jax.Array, group: int | None) -> jax.Array:
        """Kernels [..., in, out] as their codes will stand for them.

        Args:
            w: float32 or float64.
            group: input channels that share a range; None: all of them.
        """
        parts = split(w, group)
        return join(self.values(parts, _beside(self.fit(parts, -2))), w.shape[-2])

    @property
    def _highest(self) -> int:
        return 2**self.bits - 1

    @property
    def _shift(self) -> float:
        return self.tie * self._highest


def minmax(
    w: jax.Array,
    *,
    bits: int = 4,
    group: int | None = 128,
    tie: float = 1e-6,
    view: MatrixView | None = None,
) -> Quantized:
    """Round a kernel to the nearest level between the extremes of its groups.

    Args:
        w: kernel [in, out]; or one of any axes, with its `view`.
        bits: 2 to 8.
        group: input channels that share a range; None: all of them.
        tie: see `MinMax`.
        view: which axes are inputs and outputs; stacked ones are apart.

    Returns:
        The packed kernel, with float32 ranges.

    Raises:
        ValueError: for bits that are none, a kernel that is no matrix, or a group that
            does not fall on the borders of the input axes.
        TypeError: for a kernel that holds no floats.

    Examples:
        >>> q = minmax(jnp.array([[-1.0], [0.2], [0.9], [2.0]]), bits=2, group=None)
        >>> q.materialise().ravel().tolist()
        [-1.0, 0.0, 1.0, 2.0]
    """
    if not jnp.issubdtype(w.dtype, jnp.floating):
        raise TypeError(
            f"a kernel of shape {w.shape} holds {w.dtype}: floats are rounded"
        )
    check_bits(bits)
    if view is None:
        if w.ndim != 2:
            raise ValueError(
                f"a kernel of shape {w.shape} is no matrix [in, out]: give its view="
            )
        view = MatrixView.of(1, 1)
    view = view.check(w.shape)
    grid, stored = MinMax(bits, tie), get_grid(f"uint{bits}")
    wide = as_matrices(w, view).astype(jnp.promote_types(w.dtype, jnp.float32))
    parts = split(wide, group)
    found = grid.fit(parts, -2)
    codes = join(grid.codes(parts, _beside(found)), wide.shape[-2])

    block = [EACH] * w.ndim
    sizes = [w.shape[axis] for axis in view.inputs]
    lengths = spread(sizes, min(group or math.prod(sizes), math.prod(sizes)))
    if lengths is None:
        raise ValueError(
            f"group={group} does not fall on the borders of input axes of sizes "
            f"{sizes}: take a divisor of the last or a multiple of it"
        )
    for axis, length in zip(view.inputs, lengths, strict=True):
        block[axis] = length
    shape = tuple(
        1 if b == WHOLE else -(-n // b) for n, b in zip(w.shape, block, strict=True)
    )
    return Quantized(
        codes=stored.encode(from_matrices(codes, view, w.shape)),
        scale=from_matrices(found.scale, view, shape),
        zero=from_matrices(found.zero, view, shape),
        grid=stored,
        block=tuple(block),
        dense_dtype=np.dtype(w.dtype),
        matrix_view=view,
    )


def check_bits(bits: int) -> None:
    """Raise for numbers of bits that codes are not stored at."""
    if not 2 <= bits <= 8:
        raise ValueError(f"bits={bits}: kernels are stored at 2 to 8")


def split(w: jax.Array, group: int | None) -> jax.Array:
    """Kernels [..., in, out] in groups, [..., groups, group, out].

    A last group that is shorter is filled with its own edge: its extremes stay.
    """
    *stack, n, m = w.shape
    size = n if group is None else min(group, n)
    if size < 1:
        raise ValueError(f"group={group} must be at least 1")
    w = jnp.pad(w, [*[(0, 0)] * len(stack), (0, -n % size), (0, 0)], mode="edge")
    return w.reshape(*stack, -1, size, m)


def join(parts: jax.Array, n: int) -> jax.Array:
    """The inverse of `split`, for `n` input channels."""
    *stack, _, _, m = parts.shape
    return parts.reshape(*stack, -1, m)[..., :n, :]


def _beside(found: Range) -> Range:
    """Ranges [..., groups, out] that broadcast against the groups."""
    return Range(*(x[..., None, :] for x in found))
