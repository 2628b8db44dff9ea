# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""The noise of one member on one leaf, from its key.

Two kinds, both of mean 0 and variance 1:

- "normal": `jax.random.normal`, in the leaf's dtype.
- "binomial": the number of ones among 32 hashed bits, less 16, over the root of 8: 33
  levels, kurtosis 3 - 1/16. A counter is hashed with the member's key, so that a
  number costs a few integer operations, which compilers fuse into what reads it.
"""

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

Noise = Literal["normal", "binomial"]


def draw_noise(
    key: jax.Array, shape: tuple[int, ...], dtype: Any, kind: Noise
) -> jax.Array:
    """Noise of mean 0 and variance 1.

    Args:
        key: one typed key.
        shape: of the noise.
        dtype: of the noise, a float.
        kind: how it is drawn; see the module.
    """
    if kind == "normal":
        return jax.random.normal(key, shape, dtype)
    data = jax.random.key_data(key).reshape(-1)
    counter = lax.iota(jnp.uint32, math.prod(shape))
    bits = _mix(_mix(counter + data[0]) ^ data[-1])
    ones = lax.population_count(bits).astype(jnp.int32) - 16
    return (ones.astype(jnp.float32) * 8**-0.5).astype(dtype).reshape(shape)


def draw_factors(
    key: jax.Array,
    n_in: int,
    n_out: int,
    rank: int,
    dtype: Any,
    kind: Noise,
    *,
    outputs_first: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """The factors `[n_in, rank]` and `[n_out, rank]` of a matrix's noise.

    They are the parts of one draw; the side whose axes come last in the leaf has its
    first rows.

    Args:
        key: one typed key.
        n_in: size of the input side.
        n_out: size of the output side.
        rank: number of terms.
        dtype: of the factors.
        kind: as in `draw_noise`.
        outputs_first: whether the leaf's output axes come before its input axes.
    """
    both = draw_noise(key, (n_in + n_out, rank), dtype, kind)
    if outputs_first:
        return both[:n_in], both[n_in:]
    return both[n_out:], both[:n_out]


def _mix(x: jax.Array) -> jax.Array:
    """A bijection of 32-bit words in which every bit depends on every other.

    References:
        Wellons, `Hash Function Prospector <https://nullprogram.com/blog/2018/07/31/>`_,
        2018: the constants of its function of lowest bias.
    """
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
