# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Keys of leaves by their paths."""

import jax
import jax.numpy as jnp
import numpy as np

import wlab
from wlab.core import fold_path


def test_every_path_has_its_own_key(key: jax.Array):
    paths = [f"blocks_{i}/{name}/kernel" for i in range(20) for name in ("up", "down")]
    data = {tuple(jax.random.key_data(fold_path(key, p)).tolist()) for p in paths}
    assert len(data) == len(paths)
    other = jax.random.key(1)
    assert fold_path(key, "up") != fold_path(other, "up")
    assert (
        fold_path(key, "up")
        == fold_path(key, "up")
        == jax.jit(lambda k: fold_path(k, "up"))(key)
    )


def test_other_leaves_change_nothing(key: jax.Array):
    """Names, order and number of the other leaves; nor does the kind of container."""
    w = jax.random.normal(jax.random.key(7), (6, 5))

    def codes(tree: dict) -> np.ndarray:
        q = wlab.quant.quantize_tree(tree, "int4", rounding="stochastic", key=key)
        return np.asarray(q["up"]["kernel"].codes, np.uint8)

    alone = codes({"up": {"kernel": w}})
    among = codes(
        {"a": {"kernel": jnp.ones((3, 3))}, "up": {"bias": w[0], "kernel": w}}
    )
    np.testing.assert_array_equal(alone, among)
    renamed = wlab.quant.quantize_tree(
        {"down": {"kernel": w}}, "int4", rounding="stochastic", key=key
    )
    assert (np.asarray(renamed["down"]["kernel"].codes, np.uint8) != alone).any()
