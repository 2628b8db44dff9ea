# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Routing against loops over tokens and experts, with its gradients and batching."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wlab.models import _routing
from wlab.models._routing import dropless, route, with_capacity

TOKENS, WIDTH, HIDDEN, EXPERTS, K = 14, 8, 6, 5, 2


ROUTE = jax.jit(route, static_argnums=1)


def normal(seed, *shape, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def draw(dtype=np.float32):
    shapes = [(EXPERTS, WIDTH, HIDDEN)] * 2 + [(EXPERTS, HIDDEN, WIDTH)]
    # Of fan-in scale, as a model's are: outputs of size one.
    kernels = tuple(
        (normal(i, *s) / s[1] ** 0.5).astype(dtype) for i, s in enumerate(shapes)
    )
    # The last expert is chosen by nobody.
    routed = jax.device_get(ROUTE(normal(4, TOKENS, EXPERTS - 1), K))
    return normal(3, TOKENS, WIDTH, dtype=dtype), *routed[:2], kernels


def dense_loop(x, chosen, weights, kernels, kept=None):
    """Every expert on every token, and of that what was chosen (and kept)."""
    kept = jnp.ones(chosen.shape, bool) if kept is None else kept
    total = jnp.zeros_like(x)
    for e, (gate, up, down) in enumerate(zip(*kernels, strict=True)):
        out = (jax.nn.silu(x @ gate) * (x @ up)) @ down
        part = jnp.where((chosen == e) & kept, weights, 0).sum(axis=-1)
        total += out * part.astype(x.dtype)[:, None]
    return total


def value_and_gradients(fn, *args):
    def loss(x, weights, kernels, chosen):
        return jnp.sin(fn(x, chosen, weights, kernels)).sum(dtype=jnp.float32)

    x, chosen, weights, kernels = args
    grad = jax.value_and_grad(loss, argnums=(0, 1, 2))
    return jax.jit(grad)(x, weights, kernels, chosen)


def first_come(chosen, capacity):
    """Which choices find a place, given in the order of the tokens."""
    taken = np.zeros(EXPERTS, int)
    kept = np.zeros(chosen.shape, bool)
    for t, row in enumerate(np.asarray(chosen)):
        for i, e in enumerate(row):
            kept[t, i] = taken[e] < capacity
            taken[e] += 1
    return kept


def test_dropless_is_a_loop_over_the_experts():
    args = draw()
    got = value_and_gradients(dropless, *args)
    want = value_and_gradients(dense_loop, *args)
    chex.assert_trees_all_close(got, want, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(got[1][2][0][EXPERTS - 1], 0)  # no token, no gradient


def test_dropless_in_bfloat16():
    args = draw(jnp.bfloat16)
    out = jax.jit(dropless)(*args)
    assert out.dtype == jnp.bfloat16
    exact = jax.tree.map(
        lambda a: a.astype(np.float32) if a.dtype == jnp.bfloat16 else a, args
    )
    want = np.asarray(jax.jit(dense_loop)(*exact))
    error = np.abs(np.asarray(out, np.float32) - want).max()
    assert 0 < error < 0.02 * np.abs(want).max()
    _, gradients = value_and_gradients(dropless, *args)
    assert gradients[2][0].dtype == jnp.bfloat16


def test_experts_past_the_last_add_nothing():
    x, chosen, weights, kernels = draw()
    away = np.where(chosen == 0, EXPERTS, chosen)
    got = value_and_gradients(dropless, x, away, weights, kernels)
    want = value_and_gradients(dense_loop, x, away, weights, kernels)
    chex.assert_trees_all_close(got, want, rtol=1e-5, atol=1e-5)


def test_rows_in_no_group_may_come_out_as_anything(monkeypatch):
    x, chosen, weights, kernels = draw()
    away = np.where(chosen == 0, EXPERTS, chosen)
    want = value_and_gradients(dense_loop, x, away, weights, kernels)
    exact = jax.lax.ragged_dot

    def spoil(out, sizes):
        return jnp.where((jnp.arange(len(out)) < sizes.sum())[:, None], out, jnp.nan)

    @jax.custom_vjp
    def careless(rows, kernel, sizes):
        return spoil(exact(rows, kernel, sizes), sizes)

    def forward(rows, kernel, sizes):
        return careless(rows, kernel, sizes), (rows, kernel, sizes)

    def backward(residuals, out):
        *operands, sizes = residuals
        _, pull = jax.vjp(lambda r, k: exact(r, k, sizes), *operands)
        rows, kernel = pull(out)
        return spoil(rows, sizes), kernel, None

    careless.defvjp(forward, backward)
    monkeypatch.setattr(jax.lax, "ragged_dot", careless)
    got = value_and_gradients(dropless, x, away, weights, kernels)
    chex.assert_trees_all_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("capacity", [1, 3, TOKENS])
def test_capacity_is_first_come_first_served(capacity):
    x, chosen, weights, kernels = draw()
    kept = first_come(chosen, capacity)

    def batched(x, chosen, weights, kernels):
        # A second sequence has places of its own.
        two = (jnp.stack([a, a[::-1]]) for a in (x, chosen, weights))
        return with_capacity(*two, kernels, capacity)[0][0]

    def looped(x, chosen, weights, kernels):
        return dense_loop(x, chosen, weights, kernels, kept)

    got = value_and_gradients(batched, x, chosen, weights, kernels)
    want = value_and_gradients(looped, x, chosen, weights, kernels)
    chex.assert_trees_all_close(got, want, rtol=1e-5, atol=1e-5)
    one = (a[None] for a in (x, chosen, weights))
    _, dropped = jax.jit(with_capacity, static_argnums=4)(*one, kernels, capacity)
    np.testing.assert_allclose(dropped, 1 - kept.mean(), atol=1e-6)
    assert (capacity == TOKENS) == (kept.all())


@pytest.mark.parametrize("axis", [0, -1])
def test_dropless_is_batched_over_any_of_its_arguments(axis):
    x, chosen, weights, kernels = draw()
    args = (x, chosen, weights, *kernels)

    def gradient(x, chosen, weights, *kernels):
        return jax.grad(lambda x: jnp.sin(dropless(x, chosen, weights, kernels)).sum())(
            x
        )

    for which in itertools.product((False, True), repeat=6):
        if sum(which) not in (1, 2, 6):
            continue
        two = [
            np.stack([a, a[::-1]], axis) if on else a
            for a, on in zip(args, which, strict=True)
        ]
        axes = [axis if on else None for on in which]
        traced = jax.eval_shape(jax.vmap(gradient, axes), *two)
        assert traced.shape == (2, *x.shape)
        if sum(which) == 6:
            got = jax.jit(jax.vmap(gradient, axes))(*two)
            want = jax.jit(gradient)(*(a[::-1] for a in args))
            np.testing.assert_allclose(got[1], want, rtol=1e-5, atol=1e-5)


def test_vmap_of_vmap_and_vmap_that_does_not_reach():
    x, chosen, weights, kernels = draw()

    def one(x, scale):
        scaled = jax.tree.map(lambda k: k * scale, kernels)
        return dropless(x, chosen, weights, scaled)

    xs, scales = np.stack([x, -x]), np.array([1.0, 0.5, 2.0], np.float32)
    got = jax.jit(jax.vmap(jax.vmap(one, (0, None)), (None, 0)))(xs, scales)
    alone = jax.jit(one)
    np.testing.assert_allclose(got[2, 1], alone(-x, 2.0), rtol=1e-5, atol=1e-5)
    unreached = jax.vmap(lambda s: one(jnp.asarray(x), 1.0) * s)
    rows = f"f32[{TOKENS * K},{WIDTH}] = ragged_dot"
    assert rows in str(jax.make_jaxpr(unreached)(scales))  # done once, not repeated
    got = jax.jit(unreached)(scales)
    want = 2 * np.asarray(alone(x, 1.0))
    np.testing.assert_allclose(got[2], want, rtol=1e-5, atol=1e-5)


def test_forward_and_second_derivatives():
    x, chosen, weights, kernels = draw()

    def loss(x):
        return jnp.sin(dropless(x, chosen, weights, kernels)).sum()

    def reference(x):
        return jnp.sin(dense_loop(x, chosen, weights, kernels)).sum()

    @jax.jit
    def both(x):
        return [
            (jax.jvp(f, (x,), (x,)), jax.jvp(jax.grad(f), (x,), (x,)))
            for f in (loss, reference)
        ]

    chex.assert_trees_all_close(*both(x), rtol=1e-4, atol=1e-4)


def test_route_against_numpy():
    logits = normal(3, 2, 7, EXPERTS)
    got = ROUTE(logits, 2)
    flat = np.asarray(logits, np.float64).reshape(-1, EXPERTS)
    p = np.exp(flat) / np.exp(flat).sum(axis=1, keepdims=True)
    best = np.argsort(-p, axis=1)[:, :2]
    np.testing.assert_array_equal(got.chosen.reshape(-1, 2), best)
    chosen = np.take_along_axis(p, best, axis=1)
    weights = chosen / chosen.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(got.weights.reshape(-1, 2), weights, rtol=1e-5)
    load = np.bincount(best.ravel(), minlength=EXPERTS) / best.size
    np.testing.assert_allclose(got.load, load, rtol=1e-6)
    balance = EXPERTS * (load * p.mean(axis=0)).sum()
    np.testing.assert_allclose(got.balance, balance, rtol=1e-5)
    z = (np.log(np.exp(flat).sum(axis=1)) ** 2).mean()
    np.testing.assert_allclose(got.z, z, rtol=1e-5)


def test_balance_is_one_when_even_and_the_experts_when_not():
    even = 50 * np.eye(4, dtype=np.float32)
    np.testing.assert_allclose(ROUTE(even, 1).balance, 1, rtol=1e-5)
    one = np.float32(50) * (np.arange(4) == 2) * np.ones((4, 1), np.float32)
    np.testing.assert_allclose(ROUTE(one, 1).balance, 4, rtol=1e-5)


def test_one_expert_keeps_its_probability():
    logits = normal(3, 6, EXPERTS)
    got = np.asarray(ROUTE(logits, 1).weights)[:, 0]
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(got, p.max(-1), rtol=1e-6)
    gradient = jax.jit(jax.grad(lambda z: route(z, 1).weights.sum()))(logits)
    assert np.abs(gradient).max() > 0.01


def test_late_tokens_take_no_place_from_early_ones():
    chosen = np.random.default_rng(4).integers(0, 3, (9, 2), np.int32)
    late = np.arange(9)[:, None] >= 5
    places = jax.jit(_routing.places, static_argnums=(1, 2))
    place = np.asarray(places(chosen, 3, 3))
    changed = np.asarray(places(np.where(late, 0, chosen), 3, 3))
    np.testing.assert_array_equal(place[:5], changed[:5])
    kept = place[place < 9]
    assert len(set(kept.tolist())) == len(kept)  # no place is given twice
