# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Values -1, 0 and 1, five to a byte: 1.6 bits each, for what is communicated."""

import jax
import jax.numpy as jnp

_POWERS = (1, 3, 9, 27, 81)


def pack_ternary(values: jax.Array) -> jax.Array:
    """Five values to a byte, as digits of base 3.

    Args:
        values: integers -1, 0 or 1, `[n]`.

    Returns:
        uint8 `[ceil(n / 5)]`.
    """
    n = values.shape[0]
    digits = jnp.pad(values.astype(jnp.int32) + 1, (0, -n % 5)).reshape(-1, 5)
    return (digits * jnp.array([_POWERS], jnp.int32)).sum(axis=1).astype(jnp.uint8)


def unpack_ternary(packed: jax.Array, n: int) -> jax.Array:
    """The values that `pack_ternary` packed.

    Args:
        packed: uint8 `[ceil(n / 5)]`.
        n: how many values there were.

    Returns:
        int8 `[n]`.
    """
    digits = packed.astype(jnp.int32)[:, None] // jnp.array([_POWERS], jnp.int32) % 3
    return (digits.reshape(-1)[:n] - 1).astype(jnp.int8)
