# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
r"""Dual scales: binary codes with scales of the outputs and one of each input channel.

A group of input channels of a kernel is

.. math::

    w_{ji} \approx c_j \sum_{k < b} r_{ki} B_{kji}, \qquad B \in \{-1, 1\}

with :math:`2^b` levels that are symmetric and not equally far apart, and of which none
is zero. Scales and codes are fitted in turn, each exactly. The column scale :math:`c`
costs nothing where the layer before can take it over.

References:
    `D2Quant: Accurate Low-bit Post-Training Weight Quantization for LLMs
    <https://arxiv.org/abs/2602.02546>`_, 2026.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from wlab.quant._uniform import as_stored

_EPS = 1e-8  # the least scale
_SINGULAR = 1e-6  # the least pivot of a row's equations, over their diagonal
_RIDGE = 1e-4  # added to that diagonal where a pivot is less


class DualRange(NamedTuple):
    """The scales of a group."""

    r: jax.Array  # [bits, out]
    c: jax.Array  # [group]


class DualScale(NamedTuple):
    """Binary codes of 2 or 3 bits; a code's highest bit is the sign of ``r[0]``."""

    bits: int
    steps: int = 15  # rounds of fitting
    scale_dtype: Any = None  # in which row scales are stored: they are rounded to it

    def fit(self, w: jax.Array) -> DualRange:
        """The scales of a group [group, out]."""
        found, _ = dsq_fit(w, self.bits, self.steps)
        return found._replace(r=as_stored(self.scale_dtype, found.r))

    def nearest(self, w: jax.Array, found: DualRange) -> jax.Array:
        """Codes uint8 of a whole group [group, out]."""
        return _nearest(w, found.r, found.c)

    def channels(self, found: DualRange, start: Any, size: int) -> DualRange:
        """Row scales for each of `size` channels, and their own column scales."""
        r = jnp.broadcast_to(found.r[None], (size, *found.r.shape))
        return DualRange(r, jax.lax.dynamic_slice_in_dim(found.c, start, size))

    def codes(self, w: jax.Array, here: DualRange) -> jax.Array:
        """The nearest levels of one channel [out]; of equals the first."""
        return _nearest(w[None], here.r, here.c[None])[0].astype(w.dtype)

    def decode(self, codes: jax.Array, here: DualRange) -> jax.Array:
        """What codes of one channel stand for."""
        return here.c * _sum(here.r, signs(codes[None], self.bits))[0]

    def clipped(self, w: jax.Array, here: DualRange) -> jax.Array:
        """The weights of one channel, between its outermost levels."""
        most = here.c * jnp.sum(here.r, 0)
        return jnp.clip(w, -most, most)


def dsq_fit(w: jax.Array, bits: int, steps: int = 15) -> tuple[DualRange, jax.Array]:
    """Scales and codes of one group of input channels.

    Args:
        w: weights [group, out], float32 or float64.
        bits: 2 or 3.
        steps: how often scales of rows, scales of columns and codes are each brought
            to their best given the others. The squared error never rises.

    Returns:
        The scales, and codes uint8 [group, out].

    Raises:
        ValueError: for other bits, or weights that are no matrix.
    """
    if bits not in (2, 3):
        raise ValueError(
            f"bits={bits}: binary codes with two scales have 2 or 3 bits; a uniform "
            "grid takes more"
        )
    if w.ndim != 2:
        raise ValueError(f"weights of shape {w.shape} are no group [group, out]")

    c = jnp.maximum(jnp.mean(jnp.abs(w), 1), _EPS)
    total = jnp.maximum(jnp.sum(c**2), _EPS)
    rest, found, codes = w, [], jnp.zeros(w.shape, jnp.uint8)
    for _ in range(bits):
        sign = jnp.where(rest >= 0, 1, -1).astype(w.dtype)
        along = jnp.sum(rest * c[:, None] * sign, 0) / total
        found.append(jnp.maximum(jnp.abs(along), _EPS))
        rest = rest - c[:, None] * found[-1][None] * sign
        codes = 2 * codes + (sign > 0)

    def again(_: Any, carry: Any) -> Any:
        c, codes = carry[0].c, carry[1]
        sign = signs(codes, bits, w.dtype)
        r = _rows(w, c, sign)
        total = _sum(jnp.where(r < 0, -1, 1) * jnp.maximum(jnp.abs(r), _EPS), sign)
        r = jnp.maximum(jnp.abs(r), _EPS)
        fitted = jnp.sum(w * total, 1) / jnp.maximum(jnp.sum(total**2, 1), _EPS)
        c = jnp.maximum(jnp.abs(fitted), _EPS)
        return DualRange(r, c), _nearest(w, r, c)

    start = DualRange(jnp.stack(found), c), codes
    return jax.lax.fori_loop(0, steps, again, start)


def signs(codes: jax.Array, bits: int, dtype: Any = None) -> list[jax.Array]:
    """The signs that codes are made of, as -1 and 1, from the highest bit.

    Args:
        codes: integers, or floats that hold them.
        bits: of a code.
        dtype: of the signs; None: that of `codes`, which are floats then.
    """
    whole = codes.astype(jnp.uint8)
    dtype = codes.dtype if dtype is None else dtype
    return [2 * ((whole >> (bits - 1 - k)) & 1).astype(dtype) - 1 for k in range(bits)]


def _sum(r: jax.Array, sign: list[jax.Array]) -> jax.Array:
    """``sum_k r[k] sign[k]``, [group, out]."""
    first, *others = [x[None] * s for x, s in zip(r, sign, strict=True)]
    for other in others:
        first = first + other
    return first


def _nearest(w: jax.Array, r: jax.Array, c: jax.Array) -> jax.Array:
    """Codes of the levels nearest to `w` [group, out]; one level at a time."""
    bits = len(r)
    least = jnp.full(w.shape, jnp.inf, w.dtype)
    best = jnp.zeros(w.shape, jnp.uint8)
    for code in range(2**bits):
        level = jnp.zeros_like(r[0])
        for k in range(bits):
            level = level + r[k] if code >> (bits - 1 - k) & 1 else level - r[k]
        off = jnp.abs(w - c[:, None] * level[None])
        best = jnp.where(off < least, jnp.uint8(code), best)
        least = jnp.minimum(off, least)
    return best


def _rows(w: jax.Array, c: jax.Array, sign: list[jax.Array]) -> jax.Array:
    """The least-squares scales of each output, [bits, out], of either sign."""
    square = (c**2)[:, None]
    total = jnp.sum(c**2)
    along = [jnp.sum(w * c[:, None] * s, 0) for s in sign]

    def cross(a: int, b: int) -> jax.Array:
        return jnp.sum(square * sign[a] * sign[b], 0)

    if len(sign) == 2:
        p, q = along
        h = cross(0, 1)
        det = jnp.maximum(total**2 - h**2, _EPS)
        return jnp.stack([(total * p - h * q) / det, (total * q - h * p) / det])

    # Elimination, with the diagonal as the unit.
    total = jnp.maximum(total, jnp.finfo(w.dtype).tiny)
    p, q, s = (x / total for x in along)
    a, b, e = (cross(*pair) / total for pair in ((0, 1), (0, 2), (1, 2)))

    def pivots(unit: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        second = unit - a**2 / unit
        slope = (e - a * b / unit) / jnp.where(second > 0, second, 1)
        return second, slope, unit - b**2 / unit - slope**2 * second

    second, _, third = pivots(jnp.ones_like(a))
    # Signs of an output may coincide: then there is no one solution.
    flat = (second < _SINGULAR) | (third < _SINGULAR)
    unit = jnp.where(flat, 1 + _RIDGE, 1).astype(w.dtype)
    second, slope, third = pivots(unit)
    q = q - a / unit * p
    z = (s - b / unit * p - slope * q) / third
    y = q / second - slope * z
    return jnp.stack([(p - a * y - b * z) / unit, y, z])
