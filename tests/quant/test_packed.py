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
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("width", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_the_same_array_in_as_many_bits(width, symmetric):
    @jax.jit
    def make(w):
        made = jax.vmap(lambda w: rtn(w, bits=width, group=8, symmetric=symmetric))(w)
        packed = pack(made)
        part = packed.slice([1, 0, 0], [1, 24, 20])
        dense = [x.materialise() for x in (made, packed, part)]
        return made, packed, packed.unpack(), dense

    made, packed, again, (want, got, part) = make(_weights())
    np.testing.assert_array_equal(got, want)
    words = packed.words.shape
    assert words == (3, 24, -(-20 * width // 8))
    assert bits.size_in_bits(packed) <= bits.size_in_bits(made)
    np.testing.assert_array_equal(part, want[1:2])
    assert jax.tree.structure(again) == jax.tree.structure(made)
    jax.tree.map(np.testing.assert_array_equal, again.codes, made.codes)


@pytest.mark.parametrize("grid", ["fp8_e4m3", "fp4_e2m1", "int4"])
def test_other_grids(grid):
    @jax.jit
    def both(w):
        made = quantize(w, grid)
        return pack(made).materialise(), made.materialise()

    np.testing.assert_array_equal(*both(_weights((24, 20))))


def test_three_bits_cost_three_bits_and_what_is_stored_with_them():
    w = _weights((256, 64))
    made = jax.eval_shape(lambda w: pack(rtn(w, bits=3, group=None)), w)
    codes = bits.size_in_bits(made.words)
    assert codes == 3 * w.size
    # A float32 scale and a zero point of three bits for each output.
    assert bits.size_in_bits(made) == codes + 64 * 35


def test_packed_weights_run_where_quantized_ones_do(tmp_path):
    x = np.ones((2, 24), np.float32)

    def run(w, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w) @ w.T, None), x, w)[0]

    @jax.jit
    def everything(w, x):
        made = jax.vmap(lambda w: rtn(w, bits=3, group=8))(w)
        packed = pack(made)
        return packed, wlab.lift(run)(packed, x), run(made.materialise(), x)

    packed, got, want = everything(_weights(), x)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    half = wlab.lift(lambda w: w.astype(jnp.bfloat16))(packed)
    assert isinstance(half, Packed) and half.dtype == jnp.bfloat16
    with train.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"w": packed})
        _, got, _ = checkpoints.restore({"w": packed})
    assert jax.tree.structure(got["w"]) == jax.tree.structure(packed)
    jax.tree.map(np.testing.assert_array_equal, got["w"], packed)


def test_weights_inside_others_are_packed():
    w = _weights((16, 8))
    x = np.random.default_rng(1).normal(size=(32, 16)).astype(np.float32)

    @jax.jit
    def make(w, x):
        made = gptq(w, x.T @ x, bits=3, group=4, block=4, act_order=True)
        packed = pack_tree({"a": made, "b": x})
        return packed, packed["a"].materialise(), made.materialise()

    packed, *dense = make(w, x)
    leaves = jax.tree.leaves(packed, is_leaf=lambda v: isinstance(v, Packed))
    assert sum(isinstance(v, Packed) for v in leaves) == 1
    assert not any(isinstance(v, Quantized) for v in leaves)
    np.testing.assert_array_equal(*dense)


def test_packed_weights_are_divided_over_a_mesh(mesh):
    w = _weights((24, 64))
    packed = jax.jit(lambda w: pack(rtn(w, bits=3, group=8)))(w)
    specs = packed.specs(jax.P(None, "model"))
    placed = jax.tree.map(
        lambda x, s: jax.device_put(x, jax.NamedSharding(mesh, s)), packed, specs
    )
    assert {s.data.shape for s in placed.words.addressable_shards} == {(24, 12)}
    with sharding.on_mesh(mesh):
        dense = jax.jit(lambda w: w.materialise())(placed)
    want = jax.jit(lambda w: w.materialise())(packed)
    np.testing.assert_array_equal(dense, want)
