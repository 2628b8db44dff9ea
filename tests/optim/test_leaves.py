# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Stored leaves reach exactly the values that the optimiser means."""

import jax
import jax.numpy as jnp
import optax
import pytest

import wlab
from wlab.optim import _leaves
from wlab.quant import quantize_tree


@pytest.mark.parametrize("grid", ["fp8_e4m3", "fp8_e5m2", "fp4_e2m1", "int8", "int4"])
@pytest.mark.parametrize("granularity", ["row", "tensor"])
def test_a_packed_change_is_added_to_the_bit(grid: str, granularity):
    """Codes wrap and scales are rounded, and yet the sum is what was quantised."""
    key = jax.random.key(0)
    params = {"kernel": jax.random.normal(key, (3, 7, 5))}
    params = quantize_tree(params, grid, granularity=granularity)
    (plan,) = _leaves.plans(
        params,
        grid=wlab.quant.get_grid(grid),
        granularity=granularity,
        select=None,
        views=None,
    ).values()

    @jax.jit
    def step(params, key):
        leaf = params["kernel"]
        ka, kb = jax.random.split(key)
        # Of any magnitude: the difference of the scales is not exact then.
        x = jax.random.normal(ka, leaf.shape) * jnp.exp(4 * jax.random.normal(ka))
        noise = _leaves.uniform(kb, x)
        change, weight = _leaves.requantise(leaf, x, plan, noise)
        return optax.apply_updates(params, {"kernel": change}), weight

    for i in range(30):
        params, weight = step(params, jax.random.fold_in(key, i))
        assert params["kernel"].codes.dtype == plan.grid.storage
        assert (params["kernel"].values() == weight).all()


@pytest.mark.parametrize("grid", ["fp8_e4m3", "int8"])
def test_rows_of_zeros_take_the_tiniest_step(grid: str):
    """From the scale 1 to one that 1 swallows; no division by zero on the way."""
    params = quantize_tree({"kernel": jnp.zeros((3, 2))}, grid)
    tx = wlab.optim.eco_sgd(1e-9, grid=grid)
    state = tx.init(params)
    grads = {"kernel": jnp.array([[1.0, 2.0], [0.0, 1.0], [1.0, -1.0]])}
    for _ in range(2):
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    moved = params["kernel"].values()
    assert (jnp.sign(moved) == -jnp.sign(grads["kernel"])).all()
    assert jnp.isfinite(state.mu["kernel"]).all()
    assert (abs(moved) < 1e-8).all()


def test_the_papers_scales():
    assert wlab.optim.eco_granularity("fp8_e4m3") == "row"
    assert wlab.optim.eco_granularity("int8") == "row"
    assert wlab.optim.eco_granularity("int4") == "tensor"


def test_a_tree_without_leaves_has_no_plan():
    grid = wlab.quant.get_grid("int4")
    none = {"grid": grid, "granularity": None, "select": None, "views": None}
    assert _leaves.plans({}, **none) == {}


def test_a_missing_gradient_names_its_leaf():
    with pytest.raises(ValueError, match="gradient of leaf 'a/b' is missing"):
        _leaves.checked_gradient("a/b", {}, jnp.ones((2, 3)))
