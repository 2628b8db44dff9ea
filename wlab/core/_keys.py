# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Random keys for the leaves of a tree, by path and not by position."""

import zlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp


def fold_path(key: jax.Array, path: str) -> jax.Array:
    """The key of one leaf: renaming or reordering other leaves leaves it unchanged.

    Args:
        key: a typed key, `jax.random.key(seed)`.
        path: the leaf's normalised path.
    """
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def fold_paths(key: jax.Array, paths: Sequence[str]) -> jax.Array:
    """The keys of many leaves, as `fold_path` gives them, in one computation.

    Args:
        key: typed random key.
        paths: the leaves' normalised paths.

    Returns:
        Keys `[len(paths)]`.
    """
    hashes = jnp.array([zlib.crc32(path.encode()) for path in paths], jnp.uint32)
    return jax.vmap(jax.random.fold_in, (None, 0))(key, hashes)


def typed_key(key: jax.Array | int) -> jax.Array:
    """A typed key: a copy of the one that is given, or that of a seed."""
    if isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        # It goes into states, which are donated: the caller's must live on.
        return jnp.copy(key)
    return jax.random.key(key)
