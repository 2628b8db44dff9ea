# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""What every compressor keeps to, on any Flax model's blocks."""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import wlab
from wlab.core import Layered, MatrixView, is_weight, leaves_with_paths
from wlab.quant import calibrate, compressors

RNG = np.random.default_rng(0)
DEPTH = 2


class Case(NamedTuple):
    """A block, its stacked parameters, and batches."""

    block: Any
    layers: Any
    batches: Any
    views: Any = None


class Linears(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.up = nnx.Linear(16, 24, rngs=rngs)
        self.down = nnx.Linear(24, 16, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.down(jnp.tanh(self.up(x)))


class Convolutions(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        inner = jnp.tanh(nn.Conv(8, (3, 3), name="conv")(x))
        return x + nn.Conv(8, (1, 1), name="mix")(inner)


class Heads(nn.Module):
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kinds = {"dtype": self.dtype, "param_dtype": self.dtype}
        attend = nn.MultiHeadDotProductAttention(num_heads=2, name="attend", **kinds)
        return x + attend(x)


def inputs(*shape: int) -> np.ndarray:
    # Channels that go together, as those of a model do.
    mix = RNG.standard_normal((shape[-1], shape[-1]))
    return (RNG.standard_normal((2, *shape)) @ mix).astype(np.float32)


def nnx_blocks() -> Case:
    graph, _ = nnx.split(Linears(nnx.Rngs(0)))

    @jax.jit
    def begin(keys: jax.Array) -> Any:
        return jax.vmap(lambda key: nnx.split(Linears(nnx.Rngs(key)))[1])(keys)

    layers = begin(jax.random.split(jax.random.key(0), DEPTH))
    return Case(lambda w, x, _: nnx.merge(graph, w)(x), layers, inputs(40, 16))


def linen_blocks(model: Any, batches: Any, views: Any = None) -> Case:
    def begin(key: jax.Array) -> Any:
        return model.init(key, batches[0])["params"]

    keys = jax.random.split(jax.random.key(1), DEPTH)
    layers = jax.jit(jax.vmap(begin))(keys)
    return Case(lambda w, x, _: model.apply({"params": w}, x), layers, batches, views)


CASES = {
    "nnx": nnx_blocks,
    # The path of a convolution by the name of mix does not tell that it is one.
    "convolutions": functools.partial(
        linen_blocks,
        Convolutions(),
        inputs(2, 5, 6, 8),
        {"mix/kernel": MatrixView.of(3, 1)},
    ),
    "heads": functools.partial(linen_blocks, Heads(), inputs(3, 14, 16)),
    "bf16": functools.partial(
        linen_blocks,
        Heads(jnp.bfloat16),
        inputs(3, 14, 16).astype(jnp.bfloat16),
    ),
}
GROUPS = {"bits": 3, "group": 8, "block": 8}


@pytest.mark.parametrize(
    ("case", "method"),
    [
        ("nnx", compressors.gptq(**GROUPS)),
        ("nnx", compressors.d2quant(bits=2, group=8)),
        ("convolutions", compressors.rtn(bits=3, group=8)),
        ("convolutions", compressors.gptaq(**GROUPS, act_order="groups")),
        ("heads", compressors.rescomp(**GROUPS)),
        ("bf16", compressors.gptq(**GROUPS, act_order=True)),
    ],
    ids=["gptq", "d2quant", "rtn", "gptaq", "rescomp", "gptq-bf16"],
)
def test_any_model_is_compressed(case: str, method: Any):
    block, layers, batches, views = CASES[case]()
    parts = Layered(before=lambda _, x: x, block=block, after=lambda *_: jnp.zeros(()))
    params = {"layers": layers}
    made = calibrate(parts, params, batches, method, views=views)

    before, after = (dict(leaves_with_paths(tree)) for tree in (params, made.params))
    assert before.keys() == after.keys()
    for path, leaf in after.items():
        assert is_weight(leaf) == path.endswith("kernel"), path
        assert (leaf.shape, leaf.dtype) == (before[path].shape, before[path].dtype)
    assert len(made.errors) == DEPTH * sum(path.endswith("kernel") for path in after)
    ratios = [e.error / e.nearest for e in made.errors]
    assert np.mean(ratios) < 0.95 or np.allclose(ratios, 1), ratios

    # It runs as it is, as what it stands for does.
    def run(layers: Any) -> jax.Array:
        return jax.lax.scan(
            lambda x, w: (wlab.lift(block)(w, x, None), None), batches[0], layers
        )[0]

    got, want = jax.jit(lambda p: (run(p), run(wlab.materialise(p))))(
        made.params["layers"]
    )
    np.testing.assert_allclose(
        got.astype(np.float32),
        want.astype(np.float32),
        atol=0.1 if case == "bf16" else 1e-4,
    )


def test_a_convolution_whose_path_does_not_tell():
    case = CASES["convolutions"]()
    parts = Layered(before=lambda _, x: x, block=case.block, after=lambda *_: 0.0)
    method = compressors.rtn(bits=3, group=8)
    with pytest.raises(ValueError, match=r"'mix/kernel' of shape .*: a con"):
        calibrate(parts, {"layers": case.layers}, case.batches, method)
