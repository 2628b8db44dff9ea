# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Random keys for the leaves of a tree, by path and not by position."""

import zlib

import jax


def fold_path(key: jax.Array, path: str) -> jax.Array:
    """The key of one leaf: renaming or reordering other leaves leaves it unchanged.

    Args:
        key: a typed key, `jax.random.key(seed)`.
        path: the leaf's normalised path.
    """
    return jax.random.fold_in(key, zlib.crc32(path.encode()))
