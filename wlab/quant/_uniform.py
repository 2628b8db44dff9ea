# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Uniform grids with a fitted range: the quantiser inside calibrated methods.

A range is fitted to a group of a column's weights, and a weight rounds to the nearest
of its levels. The pair (fit, round) is what the column loop of GPTQ is given.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

_TINY = 1e-5  # the least range: of a group of zeros
_STEPS = 80  # ranges that are tried, each a hundredth shorter
_POWER = 2.4  # of the error that chooses among them


class Range(NamedTuple):
    """Level k of a group stands for ``scale * (k - zero)``."""

    scale: jax.Array  # [...]
    zero: jax.Array  # [...], a level; zero where the grid is symmetric


class Uniform(NamedTuple):
    """``2 ** bits`` levels.

    Symmetric ones run from ``-2 ** (bits - 1)`` to ``2 ** (bits - 1) - 1`` and the
    largest magnitude falls on the latter; the others run from 0 and have a zero point.
    """

    bits: int
    symmetric: bool = False
    clip: bool = False  # whether a shorter range is taken where its error is less
    scale_dtype: Any = None  # in which scales are stored: they are rounded to it first

    @property
    def levels(self) -> tuple[int, int]:
        """The lowest and the highest level."""
        if self.symmetric:
            half = 2 ** (self.bits - 1)
            return -half, half - 1
        return 0, 2**self.bits - 1

    def fit(self, w: jax.Array, axis: int = 0) -> Range:
        """The range of a group.

        Args:
            w: float weights; zero is always within their range.
            axis: along which the group lies.

        Returns:
            Scales and zero points without that axis.
        """
        low = jnp.minimum(w.min(axis), 0)
        high = jnp.maximum(w.max(axis), 0)
        whole = self._range(low, high)
        if not self.clip:
            return whole

        def error(found: Range) -> jax.Array:
            part = jax.tree.map(lambda x: jnp.expand_dims(x, axis), found)
            return jnp.sum(jnp.abs(self.values(w, part) - w) ** _POWER, axis)

        def shorter(i: Any, best: Any) -> Any:
            least, kept = best
            p = 1 - i / 100
            # Without a zero point only the magnitude shrinks, which has been raised.
            found = self._range(low, high, p)
            now = error(found)
            better = now < least
            kept = jax.tree.map(lambda a, b: jnp.where(better, a, b), found, kept)
            return jnp.where(better, now, least), kept

        start = jnp.full(low.shape, jnp.inf, w.dtype), whole
        return jax.lax.fori_loop(0, _STEPS, shorter, start)[1]

    def channels(self, found: Range, start: Any, size: int) -> Range:
        """The range of `size` channels of a group, which is the same for each."""
        del start
        return jax.tree.map(
            lambda x: jnp.broadcast_to(x[None], (size, *x.shape)), found
        )

    def codes(self, w: jax.Array, found: Range) -> jax.Array:
        """The nearest levels, of the dtype of `w`."""
        low, high = self.levels
        return jnp.clip(jnp.round(w / found.scale) + found.zero, low, high)

    def decode(self, codes: jax.Array, found: Range) -> jax.Array:
        """What levels stand for."""
        return found.scale * (codes - found.zero)

    def values(self, w: jax.Array, found: Range) -> jax.Array:
        """What the nearest levels stand for."""
        return self.decode(self.codes(w, found), found)

    def clipped(self, w: jax.Array, found: Range) -> jax.Array:
        """The weights, within the range but not rounded."""
        low, high = self.levels
        ends = (found.scale * (level - found.zero) for level in (low, high))
        return jnp.clip(w, *ends)

    def _range(self, low: jax.Array, high: jax.Array, p: Any = 1.0) -> Range:
        if self.symmetric:
            high = jnp.maximum(jnp.maximum(-low, high), _TINY) * p
            scale = as_stored(self.scale_dtype, high / (2 ** (self.bits - 1) - 1))
            return Range(scale, jnp.zeros_like(scale))
        none = (low == 0) & (high == 0)
        low = jnp.where(none, -1.0, low) * p
        high = jnp.where(none, 1.0, high) * p
        scale = as_stored(
            self.scale_dtype, jnp.maximum(high - low, _TINY) / (2**self.bits - 1)
        )
        # A scale that was rounded down would put the zero point past the last level.
        zero = jnp.minimum(jnp.round(-low / scale), 2**self.bits - 1)
        return Range(scale, zero)


def as_stored(dtype: Any, scale: jax.Array) -> jax.Array:
    """The scale that a narrow dtype holds, which is never zero; None: as it is."""
    if dtype is None:
        return scale
    # The barrier keeps XLA from taking the two conversions for none.
    narrow = jax.lax.optimization_barrier(scale.astype(dtype))
    least = jnp.finfo(dtype).smallest_subnormal
    return jnp.maximum(narrow.astype(scale.dtype), least.astype(scale.dtype))
