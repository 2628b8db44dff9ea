# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""The step is the optimiser's, for trees of all kinds, and writes in place."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from wlab.core import LowRank
from wlab.optim import eco
from wlab.quant import Quantized, quantize_tree
from wlab.train import (
    Checkpoints,
    TrainState,
    init_state,
    jit_step,
    make_evaluate,
    make_train_step,
)


def params(key=None):
    key = jax.random.key(0) if key is None else key
    a, b = jax.random.split(key)
    return {
        "w": jax.random.normal(a, (5, 4)),
        "b": jax.random.normal(b, (4,), jnp.bfloat16),
    }


def batch(seed=1):
    x, y = jax.random.split(jax.random.key(seed))
    return jax.random.normal(x, (8, 5)), jax.random.normal(y, (8, 4))


def loss_fn(params, batch):
    x, y = batch
    error = x @ params["w"] + params["b"].astype(jnp.float32)[None] - y
    return jnp.mean(error**2), {"worst": jnp.abs(error).max()}


def plain_loss(params, batch):
    return loss_fn(params, batch)[0]


def test_equals_optax_by_hand():
    tx = optax.adamw(1e-2)
    step = jax.jit(make_train_step(loss_fn, tx))
    state = init_state(params(), tx)
    want, opt_state = params(), tx.init(params())
    for i in range(3):
        grads = jax.grad(plain_loss)(want, batch(i))
        loss = plain_loss(want, batch(i))
        updates, opt_state = tx.update(grads, opt_state, want)
        want = optax.apply_updates(want, updates)
        state, metrics = step(state, batch(i))
        np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
    chex.assert_trees_all_close(state.params, want, rtol=1e-5)
    chex.assert_trees_all_close(state.opt_state, opt_state, rtol=1e-5)
    assert state.step == 3 and state.step.dtype == jnp.int32


def test_metrics():
    tx = optax.sgd(0.1)
    _, metrics = make_train_step(loss_fn, tx)(init_state(params(), tx), batch())
    assert set(metrics) == {"loss", "grad_norm", "worst"}
    grads = jax.grad(plain_loss)(params(), batch())
    flat = np.concatenate([np.asarray(g, np.float32).ravel() for g in grads.values()])
    assert metrics["grad_norm"].dtype == jnp.float32
    np.testing.assert_allclose(metrics["grad_norm"], np.linalg.norm(flat), rtol=1e-6)
    _, metrics = make_train_step(plain_loss, tx)(init_state(params(), tx), batch())
    assert set(metrics) == {"loss", "grad_norm"}


def test_loss_and_gradients_reach_the_optimiser():
    seen = {}

    def update(updates, state, params=None, *, value, grad, **extra):
        seen.update(value=value, grad=grad, extra=extra, params=params)
        return updates, state

    tx = optax.GradientTransformationExtraArgs(lambda params: (), update)
    make_train_step(loss_fn, optax.chain(optax.identity(), tx))(
        init_state(params(), tx)._replace(opt_state=((), ())), batch()
    )
    np.testing.assert_allclose(seen["value"], plain_loss(params(), batch()), rtol=1e-6)
    chex.assert_trees_all_close(
        seen["grad"], jax.grad(plain_loss)(params(), batch()), rtol=1e-5
    )
    chex.assert_trees_all_equal(seen["params"], params())
    assert seen["extra"] == {}


def test_a_tree_with_a_structured_weight_sees_dense_gradients():
    a, b = jnp.full((5, 2), 0.1), jnp.ones((4, 2))
    structured = params() | {"w": LowRank(params()["w"], a, b)}
    dense = params() | {"w": structured["w"].materialise()}
    seen = {}

    def update(updates, state, params=None):
        seen.update(updates=updates, params=params)
        return jax.tree.map(jnp.zeros_like, params), state

    tx = optax.GradientTransformation(lambda params: (), update)
    state, metrics = make_train_step(loss_fn, tx)(init_state(structured, tx), batch())
    np.testing.assert_allclose(metrics["loss"], plain_loss(dense, batch()), rtol=1e-6)
    chex.assert_trees_all_close(
        seen["updates"], jax.grad(plain_loss)(dense, batch()), rtol=1e-5
    )
    assert isinstance(seen["params"]["w"], LowRank)
    chex.assert_trees_all_equal(state.params, structured)


@pytest.mark.parametrize(
    "make", [optax.adamw, optax.contrib.schedule_free_adamw, optax.contrib.muon]
)
def test_the_whole_state_is_donated(make):
    tx = make(1e-3)
    start = params()
    state = init_state(start, tx)
    step = jit_step(make_train_step(loss_fn, tx))
    analysis = step.lower(state, batch()).compile().memory_analysis()
    held = sum(x.nbytes for x in jax.tree.leaves(state))
    assert analysis.alias_size_in_bytes >= held
    after, _ = step(state, batch())
    assert all(x.is_deleted() for x in jax.tree.leaves(state))
    assert not any(x.is_deleted() for x in jax.tree.leaves((after, start)))


def test_a_state_holds_no_buffer_twice_and_none_of_the_callers():
    ours = params()
    keeps = optax.GradientTransformation(
        lambda params: (params, params), lambda u, s, p=None: (u, s)
    )
    state = init_state(ours, keeps)
    leaves = [*jax.tree.leaves(state), *jax.tree.leaves(ours)]
    assert len({x.unsafe_buffer_pointer() for x in leaves}) == len(leaves)
    chex.assert_trees_all_equal(state.opt_state, (ours, ours))
    jit_step(make_train_step(loss_fn, keeps))(state, batch())
    chex.assert_trees_all_equal(ours, params())


def test_init_takes_keys_codes_and_abstract_values():
    tree = {
        "key": jax.random.key(3),
        "codes": jnp.arange(8).astype(jnp.uint4),
        "weak": jnp.asarray(1.0),
    }
    assert tree["weak"].weak_type
    tx = optax.GradientTransformation(lambda p: p | {"weak": jnp.asarray(2.0)}, None)
    state = init_state(tree, tx)
    for got in (state.params, state.opt_state):
        assert got["key"].dtype == tree["key"].dtype
        assert got["codes"].dtype == jnp.uint4
        assert not got["weak"].weak_type
    tx = optax.adam(1e-3)
    abstract = jax.eval_shape(lambda p: init_state(p, tx), params())
    chex.assert_trees_all_equal_shapes_and_dtypes(abstract, init_state(params(), tx))


@pytest.mark.parametrize(
    "tx",
    [
        optax.adamw(optax.cosine_decay_schedule(1e-3, 10)),
        optax.MultiSteps(optax.adam(1e-3), 2).gradient_transformation(),
        optax.inject_hyperparams(optax.sgd)(learning_rate=1e-3),
    ],
)
def test_compiles_once(tx):
    chex.clear_trace_counter()
    step = jit_step(chex.assert_max_traces(make_train_step(loss_fn, tx), 1))
    state = init_state(params(), tx)
    for i in range(3):
        state, _ = step(state, batch(i))
    assert state.step == 3


def test_seeds_under_vmap_equal_single_runs():
    tx = optax.adamw(1e-2)
    step = make_train_step(loss_fn, tx)
    keys = jax.random.split(jax.random.key(5), 2)
    both = jax.vmap(lambda k: init_state(params(k), tx))(keys)
    batches = jax.tree.map(lambda *x: jnp.stack(x), batch(1), batch(2))
    together = jax.jit(jax.vmap(step))
    for _ in range(3):
        both, metrics = together(both, batches)
    for i in range(2):
        state = init_state(params(keys[i]), tx)
        for _ in range(3):
            state, single = jax.jit(step)(state, batch(i + 1))
        mine = jax.tree.map(lambda x, i=i: x[i], (both, metrics))
        chex.assert_trees_all_close(mine, (state, single), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda p, b: p["w"][0], r"the loss has shape \[4\]: take its mean"),
        (lambda p, b: (p["w"].sum(), {"loss": 0}), r"itself measures \['loss'\]"),
    ],
)
def test_a_loss_of_the_wrong_form_is_refused(loss, message):
    tx = optax.sgd(0.1)
    with pytest.raises(ValueError, match=message):
        make_train_step(loss, tx)(init_state(params(), tx), batch())


def test_evaluate_is_the_mean_over_batches():
    a, b = jnp.full((5, 2), 0.1), jnp.ones((4, 2))
    structured = params() | {"w": LowRank(params()["w"], a, b)}
    dense = params() | {"w": structured["w"].materialise()}
    batches = jax.tree.map(lambda *x: np.stack(x), batch(1), batch(2), batch(3))
    got = make_evaluate(loss_fn, batches)(structured)
    each = [loss_fn(dense, batch(i)) for i in (1, 2, 3)]
    assert set(got) == {"loss", "worst"}
    np.testing.assert_allclose(got["loss"], np.mean([e[0] for e in each]), rtol=1e-5)
    np.testing.assert_allclose(
        got["worst"], np.mean([e[1]["worst"] for e in each]), rtol=1e-5
    )


def test_state_is_a_pytree_with_names():
    state = TrainState(jnp.zeros((), jnp.int32), {"w": jnp.ones(2)}, ())
    names = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(state)
    ]
    assert names == ["step", "params/w"]


def test_packed_weights_train_in_place(tmp_path):
    """Codes and scales are what is stepped, donated and saved."""
    dense = {"layer": {"kernel": jax.random.normal(jax.random.key(0), (16, 8))}}
    packed = quantize_tree(dense, "int4")
    assert isinstance(packed["layer"]["kernel"], Quantized)
    tx = eco(3e-2, grid="int4")
    x = jax.random.normal(jax.random.key(1), (32, 16))
    y = jnp.tanh(x[:, :8])

    def fitting(params, batch):
        return jnp.mean((batch[0] @ params["layer"]["kernel"] - batch[1]) ** 2)

    state = init_state(packed, tx)
    types = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state)
    step = jit_step(make_train_step(fitting, tx))
    analysis = step.lower(state, (x, y)).compile().memory_analysis()
    losses = []
    for _ in range(40):
        state, metrics = step(state, (x, y))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] / 2
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state) == types
    # Narrow codes count as whole bytes in `nbytes`, as they do not in the program.
    floats = [x for x in jax.tree.leaves(state) if x.dtype == jnp.float32]
    assert analysis.alias_size_in_bytes >= sum(x.nbytes for x in floats)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(40, state)
        _, restored, _ = checkpoints.restore(jax.eval_shape(lambda: state))
    assert isinstance(restored.params["layer"]["kernel"], Quantized)
    chex.assert_trees_all_equal(restored, state)
