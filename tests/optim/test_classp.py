# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""CLASSP: its gates, its sums, its course over tasks, and what it reduces to."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from wlab.optim import (
    ClasspState,
    classp,
    classp_open_fraction,
    classp_task_schedule,
    scale_by_classp,
)

SHAPES = {"dense": {"kernel": (5, 4), "bias": (4,)}, "conv": {"kernel": (2, 2, 3, 2)}}


def random_tree(seed: int, scale: float = 1.0) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(scale * rng.normal(size=shape), jnp.float32),
        SHAPES,
        is_leaf=lambda x: isinstance(x, tuple),
    )


GRADS = [random_tree(seed) for seed in (1, 2, 3, 4)]


def go(tx: Any, grads: Any = GRADS, params: Any = None) -> Any:
    """Parameters and state after each of the gradients."""
    params = random_tree(0) if params is None else params
    state, out = tx.init(params), []
    for g in grads:
        updates, state = tx.update(g, state, params)
        params = optax.apply_updates(params, updates)
        out.append((params, state))
    return out


def accum(state: Any) -> Any:
    return state[0].accum


# --- What it reduces to ----------------------------------------------------------


def test_without_scaling_or_threshold_it_is_sgd():
    got = go(classp(0.3, -1.0, apply_scaling=False))
    want = go(optax.sgd(0.3))
    chex.assert_trees_all_close(got[-1][0], want[-1][0], rtol=1e-6)
    total = jax.tree.map(lambda *g: sum(map(jnp.abs, g)), *GRADS)
    chex.assert_trees_all_close(accum(got[-1][1]), total, rtol=1e-6)


def test_with_squares_it_is_adagrad_from_zero():
    got = go(classp(0.3, -1.0, power=2.0, eps=1e-3))
    want = go(optax.adagrad(0.3, initial_accumulator_value=0.0, eps=1e-3))
    chex.assert_trees_all_close(got[-1][0], want[-1][0], rtol=1e-5)


def test_first_step_is_the_learning_rate_whatever_the_gradient():
    for size in (1e-3, 1.0, 100.0):
        grads = random_tree(1, size)
        updates, _ = classp(0.2, -1.0).update(grads, classp(0.2).init(grads))
        want = jax.tree.map(lambda g: -0.2 * g / (1e-5 + jnp.abs(g)), grads)
        chex.assert_trees_all_close(updates, want, rtol=1e-5)


@pytest.mark.parametrize("power", [1.0, 1.5, 2.0, 3.0])
@pytest.mark.parametrize("traced", [False, True])
def test_any_power_static_or_traced(power: float, traced: bool):
    run = lambda p: go(classp(0.1, 0.5, p, 1e-4))[-1][0]  # noqa: E731
    got = jax.jit(run)(power) if traced else run(power)
    want: Any = random_tree(0)
    sums = jax.tree.map(np.zeros_like, want)
    for g in GRADS:
        open_ = jax.tree.map(lambda x: np.square(x) > 0.5, g)
        sums = jax.tree.map(
            lambda a, x, o: a + np.where(o, np.abs(x) ** power, 0), sums, g, open_
        )
        want = jax.tree.map(
            lambda w, a, x, o: w - np.where(o, 0.1 * x / (1e-4 + a) ** (1 / power), 0),
            *(want, sums, g, open_),
        )
    chex.assert_trees_all_close(got, want, rtol=1e-4, atol=1e-6)


# --- Gates and sums --------------------------------------------------------------


@pytest.mark.parametrize("scaling", [False, True])
def test_what_is_under_the_threshold_stays_to_the_bit(scaling: bool):
    runs = go(classp(0.2, 0.5, apply_scaling=scaling))
    before = (random_tree(0), jax.tree.map(jnp.zeros_like, random_tree(0)))
    for g, (params, state) in zip(GRADS, runs, strict=True):
        after = (params, accum(state))
        for old, new in zip(before, after, strict=True):
            for x, a, b in zip(*map(jax.tree.leaves, (g, old, new)), strict=True):
                shut = np.square(np.asarray(x)) <= 0.5
                assert shut.size < 20 or 0 < shut.sum() < shut.size
                np.testing.assert_array_equal(np.asarray(a)[shut], np.asarray(b)[shut])
                assert (np.asarray(a)[~shut] != np.asarray(b)[~shut]).all()
        before = after


def test_the_gate_is_strict_and_of_the_square():
    g = jnp.array([0.5, -0.5, 0.500001, 0.3])
    updates, _ = classp(1.0, 0.25).update(g, classp(1.0).init(g))
    np.testing.assert_array_equal(updates != 0, [False, False, True, False])


def test_an_infinite_threshold_is_the_identity():
    params, state = go(classp(0.2, jnp.inf))[-1]
    chex.assert_trees_all_equal(params, random_tree(0))
    assert not any(leaf.any() for leaf in jax.tree.leaves(accum(state)))


def test_sums_grow_and_updates_oppose_gradients():
    tx = classp(0.2, 0.1)
    params = random_tree(0)
    state = tx.init(params)
    for g in GRADS:
        old = accum(state)
        updates, state = tx.update(g, state, params)
        chex.assert_tree_all_finite(updates)
        assert all(
            bool((b >= a).all())
            for a, b in zip(*map(jax.tree.leaves, (old, accum(state))), strict=True)
        )
        assert all(
            bool((u * x <= 0).all())
            for u, x in zip(*map(jax.tree.leaves, (updates, g)), strict=True)
        )


def test_every_entry_is_on_its_own():
    order = np.random.default_rng(0).permutation(20)
    g = GRADS[0]["dense"]["kernel"].ravel()
    tx = classp(0.2, 0.3)
    moved = go(tx, [g, 2 * g], jnp.zeros(20))[-1][0]
    permuted = go(tx, [g[order], 2 * g[order]], jnp.zeros(20))[-1][0]
    np.testing.assert_array_equal(moved[order], permuted)


def test_zero_gradients_without_eps_and_threshold_give_zero():
    zero = jnp.zeros(3)
    tx = classp(0.2, -1.0, eps=jnp.float32(0))
    updates, _ = tx.update(zero, tx.init(zero))
    np.testing.assert_array_equal(updates, zero)


def test_official_mode_gates_whole_tensors_and_stacked_layers_apart():
    g = {
        "blocks": {
            "norm": {"scale": jnp.zeros((2, 3))},
            "up": {"kernel": jnp.zeros((2, 3, 4)).at[1, 0, 0].set(1e-3)},
        },
        "head": {"kernel": jnp.zeros((3, 2)).at[0, 0].set(1e-3)},
    }
    for threshold, moves in ((0.5, True), (1.0, False)):
        tx = classp(0.1, threshold, mode="official")
        state = tx.init(g)
        _, state = tx.update(jax.tree.map(lambda x: 0 * x + 0.5, g), state)
        first = accum(state)
        _, state = tx.update(g, state)
        change = jax.tree.map(lambda a, b: b - a, first, accum(state))
        assert bool(change["head"]["kernel"].any()) == moves
        assert classp_open_fraction(g, threshold, mode="official") == pytest.approx(
            (12 + 6) / (6 + 24 + 6) if moves else 0
        )


def test_open_fraction():
    g = {"a": jnp.array([0.1, 2.0]), "b": jnp.full((2, 3), 0.5, jnp.bfloat16)}
    assert classp_open_fraction(g, 0.2) == pytest.approx(7 / 8)
    assert classp_open_fraction(g, 0.25) == pytest.approx(1 / 8)
    assert classp_open_fraction(g, -1.0) == 1


# --- Over tasks ------------------------------------------------------------------


def test_schedules_switch_at_the_boundary_and_the_sums_go_on():
    tasks = classp_task_schedule(
        [2], learning_rate=[0.2, 0.1], threshold=-1.0, apply_scaling=[False, True]
    )
    tx = classp(**tasks)
    first = classp(0.2, -1.0, apply_scaling=False)
    second = classp(0.1, -1.0)
    params: Any = random_tree(0)
    state = first.init(params)
    for i, g in enumerate(GRADS):
        updates, state = (first if i < 2 else second).update(g, state, params)
        params = optax.apply_updates(params, updates)
    got, got_state = go(tx)[-1]
    chex.assert_trees_all_close(got, params, rtol=1e-6)
    chex.assert_trees_all_close(accum(got_state), accum(state), rtol=1e-6)
    assert isinstance(got_state[0], ClasspState) and got_state[0].count == 4


def test_schedules_pass_through_inject_hyperparams():
    tasks = classp_task_schedule(
        [2], learning_rate=[0.2, 0.1], threshold=[-1.0, 0.2], apply_scaling=[0.0, 1.0]
    )
    want, _ = go(classp(**tasks))[-1]
    tx = optax.inject_hyperparams(classp)(**tasks)
    got, state = go(tx)[-1]
    chex.assert_trees_all_close(got, want, rtol=1e-6)
    assert state.hyperparams["threshold"] == pytest.approx(0.2)


def test_traced_hyperparameters_are_not_compiled_again():
    params = random_tree(0)
    traces = []

    @jax.jit
    def step(lr: Any, threshold: Any, scaling: Any, state: Any) -> Any:
        traces.append(1)
        return classp(lr, threshold, apply_scaling=scaling).update(GRADS[0], state)

    for lr, threshold, scaling in ((0.1, 0.5, False), (0.2, -1.0, True)):
        tx = classp(lr, threshold, apply_scaling=scaling)
        got = step(lr, threshold, scaling, tx.init(params))
        chex.assert_trees_all_close(got, tx.update(GRADS[0], tx.init(params)))
    assert len(traces) == 1


def test_narrow_parameters_have_wide_sums():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), random_tree(0))
    tx = scale_by_classp(1e-6)
    state = tx.init(params)
    for _ in range(3):
        grads = jax.tree.map(lambda x: jnp.full_like(x, 1.0), params)
        grads["dense"]["bias"] = jnp.full((4,), 2e-3, jnp.bfloat16)
        updates, state = tx.update(grads, state)
    assert {x.dtype for x in jax.tree.leaves(state.accum)} == {jnp.dtype("f4")}
    assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_allclose(state.accum["dense"]["bias"], 6e-3, rtol=1e-2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: classp(0.1, mode="any"), "mode 'any' is neither"),
        (lambda: classp_open_fraction({}, 0.1, mode="any"), "mode 'any' is neither"),
        (lambda: classp(0.1, power=0.0), "power=0.0 must be positive"),
        (lambda: classp(0.1, eps=-1.0), "eps=-1.0 must be positive"),
        (lambda: classp_task_schedule([3, 3], x=0.1), r"\[3, 3\] must ascend"),
        (lambda: classp_task_schedule([0], x=0.1), "must ascend from a step over"),
        (
            lambda: classp_task_schedule([3], threshold=[0.1, 0.2, 0.3]),
            r"threshold=\[0.1, 0.2, 0.3\]: 1 boundaries part 2 tasks",
        ),
    ],
)
def test_bad_values_are_told(make: Any, message: str):
    with pytest.raises(ValueError, match=message):
        make()
