# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""The decoder with experts: its forms, structured weights, and losses."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from wlab.core import LowRank, describe, lift, map_with_path, materialise
from wlab.models.decoder import Decoder, DecoderConfig, apply_with_losses
from wlab.quant import quantize
from wlab.train import init_state, make_train_step, next_token_loss

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
BOTH = pytest.mark.parametrize("capacity", [None, 1.0])


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


def test_parameter_names_shapes_and_views(params):
    leaves = {leaf.path: leaf for leaf in describe(params)}
    shapes = {
        "gate/kernel": (2, 4, 32, 48),
        "up/kernel": (2, 4, 32, 48),
        "down/kernel": (2, 4, 48, 32),
        "router/kernel": (2, 32, 4),
    }
    mlp = {p.removeprefix("blocks/mlp/"): x for p, x in leaves.items() if "/mlp/" in p}
    assert {path: leaf.shape for path, leaf in mlp.items()} == shapes
    for path, leaf in mlp.items():
        stack = (0,) if path == "router/kernel" else (0, 1)
        assert leaf.view.stack(len(leaf.shape)) == stack
        assert leaf.role == "kernel"


def test_init_makes_parameters_alone_and_every_expert_anew(tokens, params):
    assert set(jax.eval_shape(small().init, jax.random.key(0), tokens)) == {"params"}
    gate, down = (params["blocks"]["mlp"][n]["kernel"] for n in ("gate", "down"))
    assert not np.allclose(gate[0, 0], gate[0, 1])
    # Fan-in is one expert's: the deviations are those of the dense layers.
    np.testing.assert_allclose(gate.std(), 32**-0.5, rtol=0.05)
    np.testing.assert_allclose(down.std(), (48 * 4) ** -0.5, rtol=0.05)


@pytest.mark.parametrize(
    ("capacity", "form"),
    [(None, {"scan": True}), (1.0, {"remat": True})],
)
def test_scan_and_remat_are_the_same_function(tokens, params, capacity, form):
    want = loss_and_gradients(small(capacity=capacity))(params, tokens)
    form = {"scan": False, "remat": False} | form
    if not form["scan"]:
        blocks = params["blocks"]
        params = {k: v for k, v in params.items() if k != "blocks"} | {
            f"blocks_{i}": jax.tree.map(lambda x, i=i: x[i], blocks) for i in range(2)
        }
    (value, routers), grads = loss_and_gradients(small(capacity=capacity, **form))(
        params, tokens
    )
    if not form["scan"]:
        grads["blocks"] = jax.tree.map(
            lambda *b: jnp.stack(b), *(grads.pop(f"blocks_{i}") for i in range(2))
        )
    chex.assert_trees_all_close(((value, routers), grads), want, rtol=1e-4, atol=1e-5)


@BOTH
def test_logits_do_not_see_the_future(tokens, params, capacity):
    apply = jax.jit(small(capacity=capacity).apply)
    logits = apply({"params": params}, tokens)
    changed = np.where(np.arange(13) < 6, tokens, (tokens + 1) % SMALL.vocab)
    after = apply({"params": params}, changed)
    np.testing.assert_allclose(after[:, :6], logits[:, :6], atol=1e-5)


def test_capacity_that_holds_all_is_dropless(tokens, params):
    def run(model):
        return jax.jit(lambda p: apply_with_losses(model, p, tokens))(params)

    whole, free = run(small())
    assert free["dropped"] == 0
    for capacity, drops in ((2.0, False), (0.5, True)):
        logits, routers = run(small(capacity=capacity))
        assert np.allclose(logits, whole, atol=1e-5) is not drops
        assert (routers["dropped"] > 0.2) == drops
    assert 1 <= free["max_load"] <= SMALL.experts / SMALL.experts_per_token


def test_the_router_computes_in_float32(tokens, params):
    model = small(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    stored = jax.tree.map(lambda x: np.asarray(x, jnp.bfloat16), params)
    jaxpr = str(jax.make_jaxpr(model.apply)({"params": stored}, tokens))
    products = [line for line in jaxpr.splitlines() if " = dot_general[" in line]
    assert any(f"f32[{tokens.size},4]" in line for line in products)
    assert any("bf16[" in x for x in jaxpr.splitlines() if "ragged_dot_general" in x)


def test_several_seeds_at_once(tokens):
    model = small(capacity=1.0)
    init = jax.jit(jax.vmap(lambda seed: model.init(jax.random.key(seed), tokens)))
    each = init(np.arange(2))["params"]
    fn = jax.value_and_grad(loss_of(model), has_aux=True)
    got = jax.jit(jax.vmap(fn, (0, None)))(each, tokens)
    second = jax.tree.map(lambda x: x[1], each)
    want = jax.jit(fn)(second, tokens)
    assert relative(jax.tree.map(lambda x: x[1], got), want) < 1e-5


@pytest.mark.parametrize(("kind", "capacity"), [("low_rank", None), ("quantized", 1.0)])
def test_structured_experts(tokens, params, capacity, kind):
    model = small(capacity=capacity)

    def low_rank(path, x):
        if "/mlp/" not in path:
            return x
        *stack, ins, outs = x.shape
        a = 0.3 * jax.random.normal(jax.random.key(2), (*stack, ins, 2))
        return LowRank(x, a, jax.random.normal(jax.random.key(3), (*stack, outs, 2)))

    def quantized(path, x):
        return quantize(x, "int4", axis=-1) if "/mlp/" in path else x

    form = {"low_rank": low_rank, "quantized": quantized}[kind]

    @jax.jit
    def run(params):
        structured = map_with_path(form, params)
        return (
            lift(model.apply)({"params": structured}, tokens),
            model.apply({"params": materialise(structured)}, tokens),
            model.apply({"params": params}, tokens),
        )

    got, want, plain = run(params)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    assert not np.allclose(got, plain, atol=1e-2)


def test_the_balance_loss_balances(tokens, params):
    """Training on it alone evens out a router that prefers one expert."""
    model = small(experts_per_token=1)
    kernel = params["blocks"]["mlp"]["router"]["kernel"]
    skewed = jax.tree.map(lambda x: x, params)
    skew = np.float32([4, 0, 0, 0])[None, None]
    skewed["blocks"]["mlp"]["router"]["kernel"] = np.asarray(kernel) + skew

    def loss_fn(params, tokens):
        _, routers = apply_with_losses(model, params, tokens)
        return routers["balance_loss"], routers

    tx = optax.adam(1e-2)
    step = jax.jit(make_train_step(loss_fn, tx))
    state = jax.jit(lambda params: init_state(params, tx))(skewed)
    history = []
    for _ in range(30):
        state, metrics = step(state, tokens)
        history.append(float(metrics["balance_loss"]))
    assert history[0] > 1.2
    assert history[-1] < 1.1


def test_a_dense_model_has_no_losses(tokens):
    model = small(experts=0)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    with pytest.raises(ValueError, match="its config has experts=0"):
        jax.eval_shape(lambda p: apply_with_losses(model, p, tokens), params)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"experts_per_token": 5}, "experts_per_token=5 cannot be chosen among"),
        ({"experts_per_token": 0}, "experts_per_token=0 cannot be chosen among"),
        ({"experts": -1}, "experts=-1"),
        ({"capacity": 0.0}, "capacity=0.0 is positive"),
    ],
)
def test_a_config_that_cannot_be_is_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **overrides)
