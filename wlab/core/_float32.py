# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Sums and states in float32 at least, whatever the parameters have."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from wlab.core._lift import is_weight


def accumulated(x: jax.Array) -> jax.Array:
    """The array in float32 at least."""
    return jnp.asarray(x).astype(jnp.promote_types(jnp.result_type(x), jnp.float32))


def in_float32(
    tx: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """The transform with states and sums in float32 at least.

    Args:
        tx: any transform.

    Returns:
        The transform. It sees updates and parameters of float32 at least, structured
        weights as they are, and its updates have the dtype of those that come in.

    Examples:
        >>> narrow = {"w": jnp.ones(2, jnp.bfloat16)}
        >>> state = in_float32(optax.trace(0.9)).init(narrow)
        >>> state.trace["w"].dtype.name
        'float32'
    """
    tx = optax.with_extra_args_support(tx)

    def wide(tree: Any) -> Any:
        return jax.tree.map(
            lambda x: x if is_weight(x) else accumulated(x), tree, is_leaf=is_weight
        )

    def narrow(u: Any, g: Any) -> Any:
        return u if is_weight(u) else u.astype(jnp.result_type(g))

    def init(params: Any) -> Any:
        return tx.init(wide(params))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        params = None if params is None else wide(params)
        out, state = tx.update(wide(updates), state, params, **extra)
        return jax.tree.map(narrow, out, updates, is_leaf=is_weight), state

    return optax.GradientTransformationExtraArgs(init, update)
