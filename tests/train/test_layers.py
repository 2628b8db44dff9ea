# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""A step whose gradients are those of the optimiser's active layers alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from wlab import optim
from wlab.core import leaves_with_paths
from wlab.models import layered
from wlab.models.decoder import Decoder, tiny
from wlab.train import init_state, jit_step, make_train_step, next_token_loss

OPTIMISERS = {
    "drop_muon": lambda layers: optim.drop_muon(1e-2, layers=layers),
    "lisa": lambda layers: optim.lisa(1e-2, layers, k=2, interval=2),
}


@pytest.mark.parametrize(("name", "scan"), [("drop_muon", True), ("lisa", False)])
def test_the_numbers_are_those_of_whole_gradients(name, scan):
    """And one compilation serves all choices of layers."""
    sizes = {"width": 16, "depth": 3, "hidden": 24, "heads": 2, "head_dim": 8}
    # Untied: of a tied embedding, a suffix of the layers gives one of the two uses.
    model = Decoder(tiny(**sizes, kv_heads=1, scan=scan, tied=False))
    tokens = np.random.default_rng(1).integers(0, 256, (5, 2, 9), np.int32)
    params = jax.jit(model.init)(jax.random.key(0), tokens[0, :, :-1])["params"]
    tx = optax.chain(
        optax.clip(1e-3), OPTIMISERS[name]("blocks" if scan else "blocks_*")
    )

    def loss(params, batch):
        logits = model.apply({"params": params}, batch[:, :-1])
        return next_token_loss(logits, batch)

    steps = {
        "whole": make_train_step(loss, tx),
        "layers": make_train_step(
            layered(model, next_token_loss), tx, active=optim.active_layers
        ),
    }
    start = jax.jit(lambda params: init_state(params, tx))
    ends, losses = {}, {}
    for kind, step in steps.items():
        traces = []

        def counted(state, batch, step=step, traces=traces):
            traces.append(1)
            return step(state, batch)

        run, state = jit_step(counted), start(params)
        losses[kind] = []
        for batch in tokens:
            state, metrics = run(state, batch)
            losses[kind].append(float(metrics["loss"]))
        assert len(traces) == 1
        ends[kind] = dict(leaves_with_paths(state.params))
    np.testing.assert_allclose(losses["layers"], losses["whole"], rtol=1e-5)
    for path, leaf in ends["whole"].items():
        np.testing.assert_allclose(ends["layers"][path], leaf, atol=2e-5, err_msg=path)


def test_layers_are_named_by_one_optimiser():
    params = {"blocks": jnp.ones((4, 2, 2)), "head": {"kernel": jnp.ones((2, 2))}}
    lisa = functools.partial(optim.lisa, 0.1, "blocks")
    assert set(optim.active_layers(lisa(state="keep").init(params))) == {"chosen"}
    drop = optim.drop_muon(0.1, layers="blocks")
    assert set(optim.active_layers(drop.init(params))) == {"start"}
    both = optax.chain(drop, lisa())
    with pytest.raises(ValueError, match="holds 2 states"):
        optim.active_layers(both.init(params))
    with pytest.raises(ValueError, match="holds 0 states"):
        optim.active_layers(optax.adam(1.0).init(params))


def test_one_function_has_no_layers_to_name():
    with pytest.raises(ValueError, match=r"wlab\.models\.layered"):
        make_train_step(lambda p, b: 0.0, optax.sgd(1.0), active=optim.active_layers)
