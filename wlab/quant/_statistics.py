# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Sums over the inputs of a kernel: what calibrated methods know of them.

All are sums over rows, so that those of microbatches, devices and hosts add up in any
order. They are computed in float32 at full precision, whatever dtype the inputs have.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Moments(NamedTuple):
    """Second moments of the inputs X of a kernel, weighted by row."""

    h: jax.Array  # [in, in], X^T X
    cross: jax.Array | None  # [in, in], (X~ - X)^T X with the original model's X~
    count: jax.Array  # (), rows that are not all zero and have a weight


def moments(
    x: jax.Array, original: jax.Array | None = None, weights: jax.Array | None = None
) -> Moments:
    """The second moments of a batch.

    Args:
        x: inputs [rows, in] that the quantised model sees.
        original: those of the original model for the same rows, or None.
        weights: of the rows [rows], not negative; zero for padding. None: all 1.

    Returns:
        Sums, float32 (float64 for float64 inputs).
    """
    wide = jnp.promote_types(x.dtype, jnp.float32)
    x = x.astype(wide)
    used = jnp.any(x != 0, axis=1)
    weighted = x
    if weights is not None:
        used &= weights > 0
        # A product, not a root on either side: one rounding, and zero stays zero.
        weighted = x * weights.astype(wide)[:, None]
    h = _product(x, weighted)
    cross = None
    if original is not None:
        cross = _product(original.astype(wide) - x, weighted)
    return Moments(h, cross, used.sum().astype(wide))


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum("ti,tj->ij", a, b, precision="highest")
