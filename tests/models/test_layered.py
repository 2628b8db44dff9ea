# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""The decoder in parts has the decoder's own loss and gradients."""

import dataclasses
from typing import Any

import chex
import jax
import numpy as np
import pytest

import wlab
from wlab.core import layered_value_and_grad
from wlab.models import layered
from wlab.models.decoder import (
    Decoder,
    DecoderConfig,
    RopeScaling,
    apply_with_losses,
)
from wlab.train import next_token_loss

SMALL = DecoderConfig(
    vocab=31, width=16, depth=3, heads=2, kv_heads=1, head_dim=8, hidden=24
)
FORMS: dict[str, dict[str, Any]] = {
    "scan, remat, head, options": {
        "scan": True,
        "remat": True,
        "tied": False,
        "rope_scaling": RopeScaling(4.0, 4),
        "window": 3,
        "qkv_bias": True,
        "qk_norm": True,
        "activation": "gelu_tanh",
        "norm_offset": True,
        "embedding_scale": 4.0,
    },
    "experts": {"scan": True, "experts": 3},
    "written out": {"attention_scale": 0.2, "output_scale": 0.5},
}


tokens = np.random.default_rng(1).integers(0, SMALL.vocab, (2, 10), np.int32)


def loss(logits: jax.Array, tokens: jax.Array, routers: Any = None) -> Any:
    value = next_token_loss(logits, tokens)
    if routers is None:
        return value
    return value + 0.1 * routers["balance_loss"] + 0.1 * routers["z_loss"], routers


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_loss_and_gradients_are_the_models_own(form: dict[str, Any]):
    model = Decoder(dataclasses.replace(SMALL, **form))
    params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]

    def whole(params: Any) -> Any:
        if model.config.experts:
            logits, routers = apply_with_losses(model, params, tokens[:, :-1])
            return loss(logits, tokens, routers)
        return loss(model.apply({"params": params}, tokens[:, :-1]), tokens), {}

    want, grads = jax.jit(jax.value_and_grad(whole, has_aux=True))(params)
    fn = jax.jit(layered_value_and_grad(layered(model, loss)))
    got, all_of_them = fn(params, tokens)
    chex.assert_trees_all_close(got, want, rtol=1e-6)
    chex.assert_trees_all_close(all_of_them, grads, rtol=1e-5, atol=1e-6)
    _, some = fn(params, tokens, chosen=np.array([2, 0]))
    grads = jax.device_get(grads)
    blocks = grads.get("blocks") or jax.tree.map(
        lambda *x: np.stack(x), *(grads[f"blocks_{i}"] for i in range(3))
    )
    chosen = jax.tree.map(lambda x: x[np.array([2, 0])], blocks)
    chex.assert_trees_all_close(some.layers, chosen, rtol=1e-5, atol=1e-6)
    ends = {name: some.rest[name] for name in ("embed", "final_norm")}
    want_ends = {name: grads[name] for name in ends}
    chex.assert_trees_all_close(ends, want_ends, rtol=1e-5, atol=1e-6)


def test_a_packed_decoder_has_gradients_of_what_is_dense():
    model = Decoder(dataclasses.replace(SMALL, scan=True))

    @jax.jit
    def start(key: jax.Array) -> Any:
        params = model.init(key, tokens)["params"]
        packed = wlab.quant.quantize_tree(params, "int8")
        return packed, wlab.materialise(packed)

    packed, dense = start(jax.random.key(0))
    fn = jax.jit(layered_value_and_grad(layered(model, loss)))
    _, got = fn(packed, tokens, chosen=np.array([1]))
    _, want = fn(dense, tokens, chosen=np.array([1]))
    assert got.layers["mlp"]["up"]["kernel"] is None
    for name in ("mlp_norm", "attention_norm"):
        chex.assert_trees_all_close(got.layers[name], want.layers[name], rtol=1e-4)
