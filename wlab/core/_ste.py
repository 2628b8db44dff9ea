# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""The straight-through estimator: one value forwards, another's gradient backwards."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


@jax.custom_jvp
def _second(x: jax.Array, y: jax.Array) -> jax.Array:
    """`y`, with the derivative of `x`."""
    del x
    return y


@_second.defjvp
def _second_jvp(
    primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    return _second(*primals), tangents[0]


def straight_through(
    x: ArrayLike,
    y: ArrayLike,
    *,
    bounds: tuple[ArrayLike, ArrayLike] | None = None,
) -> jax.Array:
    """The value of `y` with the gradient of `x`.

    The value is `y` to the bit, which `x + stop_gradient(y - x)` is not: that
    difference is rounded. The gradient at a bound is 1, as inside; `jnp.clip` would
    give a half there, where a clipped quantiser puts its largest weights.

    Args:
        x: The floating array that receives the gradient.
        y: What it is replaced by, such as its quantised value: an array of the shape
            of `x`, cast to its dtype. It receives no gradient.
        bounds: Optional lowest and highest value of `x`, both inclusive and
            broadcastable to `x`, beyond which the gradient is zero. They receive no
            gradient.

    Returns:
        An array of the shape and dtype of `x`.

    Raises:
        ValueError: If `y` has another shape than `x`.
        TypeError: If `x` is not floating.

    Examples:
        >>> def loss(x):
        ...     return straight_through(x, jnp.round(x), bounds=(-1.0, 1.0)).sum()
        >>> x = jnp.array([0.3, 0.8, 1.0, 1.7])
        >>> print(loss(x), jax.grad(loss)(x))
        4.0 [1. 1. 1. 0.]
    """
    x, y = jnp.asarray(x), jnp.asarray(y)
    if x.shape != y.shape:
        raise ValueError(
            f"straight_through takes two arrays of one shape, got {x.shape} and "
            f"{y.shape}; broadcast the second first."
        )
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"straight_through passes a gradient to a floating array, got {x.dtype} of "
            f"shape {x.shape}; cast it."
        )
    if bounds is not None:
        low, high = bounds
        x = jnp.where((low <= x) & (x <= high), x, jax.lax.stop_gradient(x))
    return _second(x, jax.lax.stop_gradient(y.astype(x.dtype)))
