# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Changing a model block by block, with the inputs of the original one."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wlab.core import Layered
from wlab.quant import (
    ScaleGroup,
    awq,
    awq_model,
    map_blocks,
    minmax,
    quantlrm,
    quantlrm_model,
    update_sizes,
    update_stats,
)

WIDTH, HIDDEN, DEPTH = 16, 24, 3
OPTIONS: Any = {"bits": 3, "group": 8, "n_grid": 4, "clip": False}
GROUPS = (ScaleGroup(("down/kernel",), ("up/kernel",), "linear"),)


class Counted:
    """A gated residual block that counts how often it is traced."""

    def __init__(self):
        self.traces = 0

    def __call__(self, layer: Any, x: jax.Array, batch: Any) -> jax.Array:
        del batch
        self.traces += 1
        read = normed(layer, x)
        gate, up, down = (layer[name]["kernel"] for name in ("gate", "up", "down"))
        return x + (jax.nn.silu(read @ gate) * (read @ up)) @ down


def normed(layer: Any, x: jax.Array) -> jax.Array:
    root = jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6)
    return (x / root) * layer["norm"]["scale"][None]


def make(depth: int = DEPTH) -> Any:
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        w = rng.normal(size=(DEPTH, *shape)) / shape[0] ** 0.5
        return np.tile(w, (depth // DEPTH, 1, 1)).astype(np.float32)

    layers = {
        "norm": {"scale": np.exp(normal(1, WIDTH)[:, 0])},
        "gate": {"kernel": normal(WIDTH, HIDDEN)},
        "up": {"kernel": normal(WIDTH, HIDDEN)},
        "down": {"kernel": normal(HIDDEN, WIDTH)},
    }
    return {"embed": np.float32(2), "layers": layers}


def parts_of(block: Any) -> Layered:
    return Layered(
        before=lambda params, x: x * params["embed"],
        block=block,
        after=lambda params, x, batch: jnp.mean(x),
    )


def listed(params: Any) -> Any:
    n = len(params["layers"]["norm"]["scale"])
    layers = [jax.tree.map(lambda x, i=i: x[i], params["layers"]) for i in range(n)]
    return params | {"layers": layers}


BATCHES = np.random.default_rng(1).normal(size=(2, 20, WIDTH)).astype(np.float32)
BLOCK = Counted()
PARTS = parts_of(BLOCK)
PARAMS = make()
TUNED = jax.tree.map(lambda x: x + np.sin(100 * x) / np.float32(1000), PARAMS)


def test_blocks_see_the_original_stream():
    seen = []

    def note(i: int, layer: Any, inputs: Any) -> Any:
        seen.append((i, layer, inputs))
        return layer | {"down": {"kernel": 0 * layer["down"]["kernel"]}}

    new = map_blocks(PARTS, PARAMS, BATCHES, note)
    assert jax.tree.map(jnp.shape, new) == jax.tree.map(jnp.shape, PARAMS)
    assert not new["layers"]["down"]["kernel"].any() and new["embed"] == 2
    x = 2 * BATCHES.reshape(-1, WIDTH)
    step = jax.jit(BLOCK)
    for i, (number, layer, inputs) in enumerate(seen):
        assert number == i and type(number) is int
        np.testing.assert_allclose(inputs.x, x, rtol=1e-4, atol=1e-4)
        kernels = inputs.kernels
        assert set(kernels) == {f"{name}/kernel" for name in ("gate", "up", "down")}
        assert kernels["gate/kernel"] is kernels["up/kernel"]  # held once
        want = normed(layer, x)
        np.testing.assert_allclose(kernels["up/kernel"], want, rtol=1e-4, atol=1e-4)
        assert kernels["down/kernel"].shape == (40, HIDDEN)
        x = step(layer, x, None)
    assert len(seen) == DEPTH


def test_every_program_serves_all_blocks():
    counts = []
    for depth in (DEPTH, 3 * DEPTH):
        block, traced = Counted(), []

        @jax.jit
        def half(i: Any, layer: Any, inputs: Any, traced: Any = traced) -> Any:
            traced.append(i)
            return jax.tree.map(lambda w: w * inputs.x.mean(), layer)

        map_blocks(parts_of(block), make(depth), BATCHES, half)
        counts.append((block.traces, len(traced)))
    assert counts[0] == counts[1] and counts[0][1] == 1


def test_lists_and_other_trees_are_mapped_alike():
    def add(i: int, layer: Any, inputs: Any, other: Any) -> Any:
        assert list(inputs.kernels) == select
        same = jax.tree.map(lambda a, b: (a == b[i]).all(), other, TUNED["layers"])
        assert all(jax.tree.leaves(same))
        size = inputs.kernels["down/kernel"].mean()
        return jax.tree.map(lambda a, b: a + size * b + i, layer, other)

    select = ["down/kernel"]
    got = map_blocks(PARTS, PARAMS, BATCHES, add, TUNED, select=select)
    want = map_blocks(
        PARTS, listed(PARAMS), list(BATCHES), add, listed(TUNED), select=select
    )
    for a, b in zip(*map(jax.tree.leaves, (listed(got), want)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def found() -> Any:
    """Both methods on the whole model, and what each block reads."""
    sizes = update_sizes(TUNED, PARAMS, which=lambda path, _: "down" in path)
    stats = update_stats(sizes)
    alone = []

    @jax.jit
    def by_hand(layer: Any, old: Any, seen: Any) -> Any:
        plain = awq(layer, seen, GROUPS, **OPTIONS)
        return plain, quantlrm(layer, old, seen, GROUPS, stats, **OPTIONS)

    def note(i: int, layer: Any, inputs: Any, old: Any) -> Any:
        alone.append(by_hand(layer, old, inputs.kernels))
        return layer

    map_blocks(PARTS, TUNED, BATCHES, note, PARAMS)
    return (
        alone,
        awq_model(PARTS, TUNED, BATCHES, GROUPS, **OPTIONS),
        quantlrm_model(PARTS, TUNED, PARAMS, BATCHES, GROUPS, **OPTIONS),
    )


def test_models_are_their_blocks(found: Any):
    alone, *models = found
    for which, model in enumerate(models):
        for i, blocks in enumerate(alone):
            got = jax.tree.map(lambda x, i=i: x[i], model["layers"])
            a, b = (tree["down"]["kernel"] for tree in (got, blocks[which]))
            assert np.mean(np.asarray(a.codes) == np.asarray(b.codes)) > 0.99
            want = blocks[which]["up"]["kernel"]
            np.testing.assert_allclose(got["up"]["kernel"], want, rtol=1e-4)
    codes = [np.asarray(m["layers"]["down"]["kernel"].codes) for m in models]
    assert (codes[0] != codes[1]).any()


def test_what_cannot_be_mapped_is_an_error():
    def same(i: int, layer: Any, inputs: Any) -> Any:
        return layer

    def mixed(i: int, layer: Any, inputs: Any) -> Any:
        w = layer["up"]["kernel"]
        return layer | {"up": {"kernel": minmax(w, bits=2 + i, group=None)}}

    with pytest.raises(ValueError, match="no batches"):
        map_blocks(PARTS, PARAMS, BATCHES[:0], same)
    with pytest.raises(ValueError, match="different functions"):
        map_blocks(parts_of([Counted(), Counted()]), PARAMS, BATCHES, same)
    with pytest.raises(ValueError, match=r"\[3, 6\] blocks"):
        map_blocks(PARTS, PARAMS, BATCHES, same, make(6))
    with pytest.raises(ValueError, match=r"3 forms.*materialise.*list"):
        map_blocks(PARTS, PARAMS, BATCHES, mixed, select=["up/kernel"])
    list_of = map_blocks(PARTS, listed(PARAMS), BATCHES, mixed, select=["up/kernel"])
    names = [layer["up"]["kernel"].grid.name for layer in list_of["layers"]]
    assert names == ["uint2", "uint3", "uint4"]
    bad = BATCHES.copy()
    bad[1, 0, 0] = np.nan
    with pytest.raises(ValueError, match=r"block 0: .*kernel.* not finite"):
        awq_model(PARTS, TUNED, bad, GROUPS, **OPTIONS)
    with pytest.raises(ValueError, match="two models are one"):
        quantlrm_model(PARTS, PARAMS, PARAMS, BATCHES, GROUPS, **OPTIONS)
