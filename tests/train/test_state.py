# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of training on a mesh: the same numbers, and everything stays in its place."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import wlab
from wlab import data, quant, train
from wlab.core import sharding
from wlab.models.decoder import Decoder, tiny

_STEPS = 12


def _model() -> Decoder:
    return Decoder(tiny(width=32, depth=1, hidden=64, heads=2, head_dim=16))


def _make_params(grid: str | None) -> Any:
    model = _model()
    params = model.init(jax.random.key(0), jnp.zeros((8, 16), jnp.int32))["params"]
    return params if grid is None else quant.quantize_tree(params, grid)


def _optimizer(grid: str | None) -> optax.GradientTransformation:
    tx = optax.adamw(1e-3) if grid is None else wlab.optim.eco(1e-3, grid=grid)
    return optax.chain(optax.clip_by_global_norm(1.0), tx)


def _loss(params: Any, batch: jax.Array) -> jax.Array:
    logits = _model().apply({"params": params}, batch[:, :-1])
    assert isinstance(logits, jax.Array)
    return train.next_token_loss(logits, batch)


_dense = jax.jit(wlab.materialise)


def _batches() -> Any:
    text = data.text("pydoc").train
    return data.windows(text, batch=8, length=16, seed=0)


@functools.cache
def _on_one_device(grid: str | None) -> tuple[Any, np.ndarray]:
    tx = _optimizer(grid)
    state = jax.jit(lambda: train.init_state(_make_params(grid), tx))()
    step = train.make_train_step(_loss, tx)
    state, history = train.fit(step, state, _batches(), steps=_STEPS, every=1)
    return jax.device_get(_dense(state.params)), history["loss"]


# Each axis of a mesh, and each kind of axes.
@pytest.mark.parametrize(
    ("grid", "axes", "explicit"),
    [
        (None, {"fsdp": 8}, True),
        (None, {"tensor": 2, "data": 4}, False),
        ("fp8_e4m3", {"fsdp": 2, "tensor": 2}, True),
    ],
)
def test_a_mesh_gives_the_numbers_of_one_device(
    grid: str | None, axes: dict[str, int], explicit: bool
):
    params, losses = _on_one_device(grid)
    mesh = sharding.make_mesh(**{"data": -1} | axes, explicit=explicit)
    tx = _optimizer(grid)
    state = train.create_state(functools.partial(_make_params, grid), tx, mesh)
    places = jax.tree.map(lambda x: x.sharding, state)
    step = train.make_train_step(_loss, tx)
    new, history = train.fit(step, state, _batches(), steps=_STEPS, every=1)
    np.testing.assert_allclose(history["loss"], losses, rtol=1e-5)
    for path, leaf in wlab.core.leaves_with_paths(_dense(new.params)):
        wanted = dict(wlab.core.leaves_with_paths(params))[path]
        np.testing.assert_allclose(jax.device_get(leaf), wanted, atol=2e-4)
    assert jax.tree.map(lambda x: x.sharding, new) == places
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))


def test_no_device_holds_the_whole_state():
    mesh = sharding.make_mesh(fsdp=4, tensor=2)
    state = train.create_state(lambda: _make_params(None), _optimizer(None), mesh)
    for path, leaf in wlab.core.leaves_with_paths(state):
        if path.endswith("kernel"):
            assert leaf.addressable_shards[0].data.size * 8 == leaf.size, path


def test_a_state_on_a_mesh_has_the_numbers_of_one_device():
    mesh = sharding.make_mesh(fsdp=4, tensor=2)
    state = train.create_state(lambda: _make_params("int4"), optax.sgd(0.1), mesh)
    for leaf, wanted in zip(
        jax.tree.leaves(state.params),
        jax.tree.leaves(jax.jit(lambda: _make_params("int4"))()),
        strict=True,
    ):
        np.testing.assert_allclose(
            jax.device_get(leaf).astype(np.float32),
            jax.device_get(wanted).astype(np.float32),
            rtol=1e-6,
        )


def test_the_abstract_state_says_where_the_state_lives():
    mesh = sharding.make_mesh(fsdp=4, tensor=2)
    make = functools.partial(_make_params, "fp8_e4m3")
    rules = [("*mlp/up*", jax.P())]
    tx = _optimizer("fp8_e4m3")
    abstract = train.abstract_state(make, tx, mesh, rules=rules)
    state = train.create_state(make, tx, mesh, rules=rules)
    assert jax.tree.map(lambda x: x.sharding, abstract) == jax.tree.map(
        lambda x: x.sharding, state
    )
    assert state.params["blocks"]["mlp"]["up"]["kernel"].codes.sharding.spec == jax.P()
    assert jax.tree.map(lambda x: (x.shape, x.dtype), abstract) == jax.tree.map(
        lambda x: (x.shape, x.dtype), state
    )


@pytest.mark.parametrize("explicit", [False, True], ids=["auto", "explicit"])
def test_held_out_loss_on_a_mesh(explicit: bool):
    mesh = sharding.make_mesh(data=2, fsdp=4, explicit=explicit)
    held_out = data.valid_windows(data.text("pydoc").valid, batch=8, length=16, limit=2)
    evaluate = train.make_evaluate(_loss, held_out)
    state = train.create_state(lambda: _make_params(None), optax.sgd(0.1), mesh)
    alone = evaluate(jax.jit(lambda: _make_params(None))())
    on_mesh = evaluate(state.params)
    np.testing.assert_allclose(on_mesh["loss"], alone["loss"], rtol=1e-5)


def test_a_batch_that_does_not_divide_is_an_error():
    mesh = sharding.make_mesh(data=8)
    tx = _optimizer(None)
    state = train.create_state(lambda: _make_params(None), tx, mesh)
    batches = data.windows(data.text("pydoc").train, batch=6, length=16, seed=0)
    with pytest.raises(ValueError, match="6 rows over 1 host"):
        train.fit(train.make_train_step(_loss, tx), state, batches, steps=1)
