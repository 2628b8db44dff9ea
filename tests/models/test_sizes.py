# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Named sizes, exact counts, and formulas against what XLA plans."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wlab.models.decoder import Decoder, tiny
from wlab.models.sizes import (
    SIZES,
    activation_bytes,
    get_size,
    parameter_counts,
    train_flops,
)
from wlab.train import next_token_loss


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("experts", [0, 4])
def test_counts_are_those_of_the_initialised_model(tied, experts):
    config = tiny(tied=tied, experts=experts, depth=2, hidden=64)
    tokens = jnp.zeros((1, 4), jnp.int32)
    params = Decoder(config).init(jax.random.key(0), tokens)["params"]
    counts = parameter_counts(config)
    assert counts.total == sum(x.size for x in jax.tree.leaves(params))
    assert counts.total == sum(counts.by_kind.values())
    assert counts.embedding == params["embed"]["embedding"].size
    blocks = params["blocks"]
    kernels = [blocks["mlp"][name]["kernel"].size for name in ("gate", "up", "down")]
    assert counts.by_kind["mlp"] == sum(kernels)
    assert counts.by_kind.get("head", 0) == (0 if tied else 256 * 128)
    assert counts.by_kind.get("router", 0) == 2 * 128 * experts
    # Two of the four experts see a token.
    assert counts.total - counts.active == (sum(kernels) // 2 if experts else 0)


def test_named_sizes_are_about_what_they_say():
    wanted = {"30m": 30e6, "100m": 100e6, "800m": 800e6, "2b": 2e9, "2b-moe": 2e9}
    for name, about in wanted.items():
        assert parameter_counts(get_size(name)).total == pytest.approx(about, rel=0.1)
    assert get_size("tiny") == tiny()
    # The number of parameters that the model of this shape is known to have.
    assert parameter_counts(get_size("8b")).total == 8_030_261_248
    for name, config in SIZES.items():
        assert (config.scan, config.remat) == (True, True)
        narrow = name not in ("tiny", "30m")
        assert (config.dtype == jnp.bfloat16) == narrow
    with pytest.raises(TypeError):
        SIZES["mine"] = tiny()


def test_overrides_and_a_name_that_is_near():
    assert get_size("8b", depth=2).depth == 2
    with pytest.raises(ValueError, match=r"no size '2b_moe' \(did you mean '2b-moe'"):
        get_size("2b_moe")


def compile_step(config, batch, length):
    model = Decoder(config)
    tokens = jax.ShapeDtypeStruct((batch, length + 1), jnp.int32)
    params = jax.eval_shape(
        lambda: model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    )

    def loss(params, tokens):
        logits = model.apply({"params": params}, tokens[:, :-1])
        return next_token_loss(logits, tokens)

    return jax.jit(jax.value_and_grad(loss)).lower(params, tokens).compile()


@pytest.mark.parametrize("wide", [{}, {"vocab": 2048, "heads": 8}])
def test_flops_are_those_that_xla_counts(wide):
    config = tiny(scan=False, remat=False, depth=2, **wide)
    counted = compile_step(config, 4, 128).cost_analysis()["flops"]
    np.testing.assert_allclose(counted, train_flops(config, 4, 128), rtol=0.03)


def test_flops_count_the_chosen_experts_only():
    dense = tiny(hidden=256)
    routed = dataclasses.replace(dense, experts=8, hidden=128)
    more = train_flops(routed, 2, 16) - train_flops(dense, 2, 16)
    router = 6 * 128 * 8 * dense.depth * 2 * 16
    assert more == router


@pytest.mark.parametrize(
    ("overrides", "batch", "length"),
    [
        ({}, 8, 128),
        ({"vocab": 8192}, 8, 128),
        ({"depth": 16, "hidden": 1024}, 8, 128),
        ({"experts": 4, "hidden": 128}, 8, 128),
        ({"experts": 8, "hidden": 128, "capacity": 1.25}, 8, 128),
    ],
    ids=str,
)
def test_activations_are_within_a_factor_of_what_xla_plans(overrides, batch, length):
    config = tiny(**overrides)
    analysis = compile_step(config, batch, length).memory_analysis()
    ratio = analysis.temp_size_in_bytes / activation_bytes(config, batch, length)
    assert 0.5 < ratio < 2


def test_activations_need_scanned_and_rematerialised_blocks():
    assert math.isclose(
        activation_bytes(tiny(), 8, 64), 2 * activation_bytes(tiny(), 4, 64)
    )
    with pytest.raises(ValueError, match=r"scan=True, remat=False"):
        activation_bytes(tiny(remat=False), 8, 64)
