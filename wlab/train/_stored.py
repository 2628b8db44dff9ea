# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Leaves in a form that can be written, and back: keys and less than bytes cannot."""

from typing import Any

import jax
import jax.numpy as jnp


def by_path(tree: Any) -> dict[str, Any]:
    """The leaves under their paths."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (
            leaf if hasattr(leaf, "dtype") else jnp.asarray(leaf)
        )
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def type_of(leaf: Any) -> str:
    return f"{leaf.dtype}{list(leaf.shape)}"


def is_key(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jax.dtypes.prng_key)


def _narrow(dtype: Any) -> jnp.dtype | None:
    """The integer whose bit pattern an element has, if it is less than a byte."""
    width = jax.dtypes.itemsize_bits(dtype)
    return jnp.dtype(f"uint{width}") if width in (2, 4) else None


def storable(leaf: Any) -> jax.Array:
    """The leaf as an array that can be written: keys and less than bytes cannot."""
    if is_key(leaf.dtype):
        return jax.random.key_data(leaf)
    if (bits := _narrow(leaf.dtype)) is not None:
        return jax.lax.bitcast_convert_type(leaf, bits).astype(jnp.uint8)
    return leaf


def stored_form(leaf: Any) -> jax.ShapeDtypeStruct:
    """What `storable` makes of such a leaf, and where to put it."""
    form = jax.eval_shape(storable, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    elif isinstance(getattr(sharding, "mesh", None), jax.sharding.AbstractMesh):
        # A type under explicit axes knows the axes, the context knows the devices.
        mesh = jax.sharding.get_mesh()
        if mesh.empty:
            raise ValueError(
                f"the template has a leaf {type_of(leaf)} sharded over "
                f"{sharding.mesh.axis_names} of no mesh: restore it within "
                "jax.set_mesh(mesh)"
            )
        sharding = jax.NamedSharding(mesh, sharding.spec)
    return jax.ShapeDtypeStruct(form.shape, form.dtype, sharding=sharding)


def as_before(stored: jax.Array, dtype: Any, key_impl: str | None) -> jax.Array:
    """The inverse of `storable`."""
    if key_impl is not None:
        return jax.random.wrap_key_data(stored, impl=key_impl)
    if (bits := _narrow(dtype)) is not None:
        return jax.lax.bitcast_convert_type(stored.astype(bits), dtype)
    return stored
