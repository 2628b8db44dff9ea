# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""The decoder, dense and with experts, is one function on every mesh."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wlab.core import sharding
from wlab.models.decoder import Decoder, DecoderConfig, apply_with_losses
from wlab.train import next_token_loss

SMALL = DecoderConfig(
    vocab=32,
    width=32,
    depth=2,
    heads=4,
    kv_heads=2,
    head_dim=8,
    hidden=48,
    experts=4,
    scan=True,
    remat=True,
)


def small(**overrides):
    return Decoder(dataclasses.replace(SMALL, **overrides))


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(1).integers(0, SMALL.vocab, (8, 13), np.int32)


@pytest.fixture(scope="module")
def params(tokens):
    return jax.jit(small().init)(jax.random.key(0), tokens)["params"]


def loss_of(model):
    def loss_fn(params, tokens):
        if not model.config.experts:
            logits = model.apply({"params": params}, tokens[:, :-1])
            return next_token_loss(logits, tokens), {}
        logits, routers = apply_with_losses(model, params, tokens[:, :-1])
        extra = 0.1 * routers["balance_loss"] + 0.01 * routers["z_loss"]
        return next_token_loss(logits, tokens) + extra, routers

    return loss_fn


def loss_and_gradients(model):
    return jax.jit(jax.value_and_grad(loss_of(model), has_aux=True))


def relative(got, want):
    """The largest error of a leaf, relative to the leaf's largest entry."""
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    errors = [
        np.abs(np.asarray(a) - np.asarray(b)).max() / max(np.abs(b).max(), 1e-9)
        for a, b in jax.device_get(list(pairs))
    ]
    return max(errors)


# What can be sharded in a dense model, and in both kinds of experts.
CASES = [
    ({"experts": 0}, {"fsdp": 4, "tensor": 2}),
    ({}, {"expert": 4, "tensor": 2}),
    ({"capacity": 1.0}, {"data": 2, "fsdp": 2, "expert": 2}),
]


@pytest.fixture(scope="module")
def alone(tokens):
    """Parameters, loss and gradients on one device, of each kind of model."""
    out = {}
    for kind in ({"experts": 0}, {}, {"capacity": 1.0}):
        model = small(**kind)
        params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
        want = loss_and_gradients(model)(params, tokens)
        out[tuple(kind.items())] = params, want
    return out


@pytest.mark.parametrize(("kind", "sizes"), CASES, ids=str)
def test_a_mesh_changes_nothing(tokens, alone, kind, sizes):
    params, want = alone[tuple(kind.items())]
    mesh = sharding.make_mesh(**sizes)
    with jax.set_mesh(mesh):
        there = jax.device_put(params, sharding.shardings(params, mesh))
        batch = sharding.place_batch(tokens, mesh)
        got = loss_and_gradients(small(**kind))(there, batch)
    assert relative(got, want) < 1e-5


def test_on_a_mesh_tokens_are_not_sorted_together(params, tokens):
    """Each device sorts the choices of its own expert group."""
    mesh = sharding.make_mesh(data=4, expert=2)
    with jax.set_mesh(mesh):
        there = jax.device_put(params, sharding.shardings(params, mesh))
        batch = sharding.place_batch(tokens, mesh)
        compiled = jax.jit(small().apply).lower({"params": there}, batch).compile()
    sorts = [x for x in compiled.as_text().splitlines() if " sort(" in x]
    choices = tokens.size * SMALL.experts_per_token
    assert sorts
    assert not any(f"[{choices}]" in line for line in sorts)
    assert any(f"[{choices // 4}]" in line for line in sorts)


def test_bfloat16_on_a_mesh(tokens, params):
    model = small(capacity=1.0, dtype=jnp.bfloat16)
    (want, _), _ = loss_and_gradients(model)(params, tokens)
    with jax.set_mesh(sharding.make_mesh(data=2, tensor=2, expert=2)):
        (got, _), grads = loss_and_gradients(model)(params, tokens)
    np.testing.assert_allclose(got, want, rtol=1e-2)
    chex.assert_tree_all_finite(grads)


def test_experts_must_divide_over_their_axis(tokens):
    model = small(experts=6)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)
    mesh = sharding.make_mesh(data=2, expert=4)
    with (
        jax.set_mesh(mesh),
        pytest.raises(ValueError, match="experts=6 do not divide"),
    ):
        jax.eval_shape(model.apply, params, tokens)
