# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Codes that share bytes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import wlab
from wlab import train
from wlab.core import bits, sharding
from wlab.quant import Packed, Quantized, gptq, pack, pack_tree, quantize, rtn


def _weights(shape=(3, 24, 20)):
    return jax.random.normal(jax.random.key(0), shape)


@pytest.mark.parametrize("width", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_the_same_array_in_as_many_bits(width, symmetric):
    def one(w):
        return rtn(w, bits=width, group=8, symmetric=symmetric)

    made = jax.vmap(one)(_weights())
    packed = jax.jit(pack)(made)
    np.testing.assert_array_equal(packed.materialise(), made.materialise())
    words = packed.words.shape
    assert words == (3, 24, -(-20 * width // 8))
    assert bits.size_in_bits(packed) <= bits.size_in_bits(made)
    part = packed.slice([1, 0, 0], [1, 24, 20])
    np.testing.assert_array_equal(part.materialise(), made.materialise()[1:2])
    again = packed.unpack()
    assert jax.tree.structure(again) == jax.tree.structure(made)
    jax.tree.map(np.testing.assert_array_equal, again.codes, made.codes)


@pytest.mark.parametrize("grid", ["fp8_e4m3", "fp4_e2m1", "int4"])
def test_other_grids(grid):
    made = quantize(_weights((24, 20)), grid)
    np.testing.assert_array_equal(pack(made).materialise(), made.materialise())


def test_three_bits_cost_three_bits_and_what_is_stored_with_them():
    w = _weights((256, 64))
    made = pack(rtn(w, bits=3, group=None))
    codes = bits.size_in_bits(made.words)
    assert codes == 3 * w.size
    # A float32 scale and a zero point of three bits for each output.
    assert bits.size_in_bits(made) == codes + 64 * 35


def test_packed_weights_run_where_quantized_ones_do(tmp_path):
    made = jax.vmap(lambda w: rtn(w, bits=3, group=8))(_weights())
    x = jnp.ones((2, 24))

    def run(w, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w) @ w.T, None), x, w)[0]

    packed = pack(made)
    want = run(made.materialise(), x)
    np.testing.assert_allclose(jax.jit(wlab.lift(run))(packed, x), want, rtol=1e-5)
    half = wlab.lift(lambda w: w.astype(jnp.bfloat16))(packed)
    assert isinstance(half, Packed) and half.dtype == jnp.bfloat16
    with train.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"w": packed})
        _, got, _ = checkpoints.restore({"w": packed})
    assert jax.tree.structure(got["w"]) == jax.tree.structure(packed)
    np.testing.assert_array_equal(got["w"].materialise(), packed.materialise())


def test_weights_inside_others_are_packed():
    w = _weights((16, 8))
    x = jax.random.normal(jax.random.key(1), (32, 16))
    made = gptq(w, x.T @ x, bits=3, group=4, block=4, act_order=True)
    packed = pack_tree({"a": made, "b": x})
    leaves = jax.tree.leaves(packed, is_leaf=lambda v: isinstance(v, Packed))
    assert sum(isinstance(v, Packed) for v in leaves) == 1
    assert not any(isinstance(v, Quantized) for v in leaves)
    np.testing.assert_array_equal(packed["a"].materialise(), made.materialise())


def test_packed_weights_are_divided_over_a_mesh(mesh):
    w = _weights((24, 64))
    packed = pack(rtn(w, bits=3, group=8))
    specs = packed.specs(jax.P(None, "model"))
    placed = jax.tree.map(
        lambda x, s: jax.device_put(x, jax.NamedSharding(mesh, s)), packed, specs
    )
    assert {s.data.shape for s in placed.words.addressable_shards} == {(24, 12)}
    with sharding.on_mesh(mesh):
        dense = jax.jit(lambda w: w.materialise())(placed)
    np.testing.assert_array_equal(dense, packed.materialise())
