# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Error feedback on one leaf: the identities that it keeps exactly."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import wlab
from wlab.optim import _feedback


def test_the_virtual_sequence_moves_by_the_gradient():
    """theta - eta b / (1 - b) m takes plain gradient steps; with decay likewise."""
    with jax.enable_x64(True):
        b1, eta = 0.9, 0.03
        for lam in (0.0, 0.5):
            keep = 1 - eta * lam
            c = eta * b1 / (keep - b1)
            key = jax.random.key(1)

            def quantise(x: jax.Array) -> jax.Array:
                q = wlab.quant.quantize(x, "int4", axis=-1)
                return q.values()

            theta = quantise(jax.random.normal(key, (6, 5), jnp.float64))
            m = jnp.zeros_like(theta)
            for i in range(20):
                g = jax.random.normal(
                    jax.random.fold_in(key, i), theta.shape, theta.dtype
                )
                before = theta - c * m
                out = _feedback.feedback_step(
                    theta,
                    _feedback.sgd_direction(g, m, b1=b1),
                    quantise,
                    eta=eta,
                    b1=b1,
                    weight_decay=lam,
                    injection="virtual",
                )
                theta, m = out.weight, out.momentum
                moved = keep * before - eta * keep * (1 - b1) / (keep - b1) * g
                np.testing.assert_allclose(theta - c * m, moved, rtol=0, atol=1e-13)


def test_nothing_lost_nothing_injected():
    """With an identity for a quantiser, ECO is its optimiser to the bit."""
    key = jax.random.key(0)
    theta, g, m = jax.random.normal(key, (3, 7, 4))
    v = jnp.abs(m)
    t = jnp.asarray(3)
    moved = _feedback.adam_direction(g, m, v, t, b1=0.9, b2=0.98, eps=1e-9)
    for injection in ("paper", "decayed", "none"):
        out = _feedback.feedback_step(
            theta, moved, lambda x: x, eta=0.1, b1=0.9, injection=injection
        )
        assert (out.momentum == moved.momentum).all()
        assert (out.weight == theta - 0.1 * moved.update).all()
    adam = optax.scale_by_adam(0.9, 0.98, 1e-9)
    state = optax.ScaleByAdamState(jnp.asarray(2), m, v)
    want, _ = adam.update(g, state)
    np.testing.assert_allclose(moved.update, want, rtol=1e-6)


def test_a_weight_that_does_not_move_keeps_all_of_its_step():
    """m' = m / b: nothing of the step is lost, so it is all owed."""
    with jax.enable_x64(True):
        theta = jnp.ones((4, 3))
        g = 1e-3 * jax.random.normal(jax.random.key(0), theta.shape)
        moved = _feedback.sgd_direction(g, jnp.zeros_like(theta), b1=0.9)
        out = _feedback.feedback_step(theta, moved, lambda x: theta, eta=0.1, b1=0.9)
        assert (out.weight == theta).all()
        np.testing.assert_allclose(out.momentum, moved.momentum / 0.9, rtol=1e-10)


@pytest.mark.parametrize(
    ("injection", "wanted"),
    [
        ("paper", lambda b, k, eta, lip: 2 / k),
        (
            "none",
            lambda b, k, eta, lip: ((1 - b**2) + 2 * b * lip * eta) / (lip * eta * k),
        ),
    ],
)
def test_stationary_error_of_a_quadratic(injection: Any, wanted: Any):
    """Independent rounding errors: the stationary variance has a closed form."""
    b, eta, lip = 0.9, 0.1, 0.8
    k = 2 * (1 - b**2) - lip * eta * (1 - b) ** 2

    def step(carry: Any, key: jax.Array) -> Any:
        x, m = carry
        noise = jax.random.normal(key, x.shape)
        out = _feedback.feedback_step(
            x,
            _feedback.sgd_direction(lip * x, m, b1=b),
            lambda y: y + noise,
            eta=eta,
            b1=b,
            injection=injection,
        )
        return (out.weight, out.momentum), jnp.mean(out.weight**2)

    start = (jnp.zeros(4000), jnp.zeros(4000))
    keys = jax.random.split(jax.random.key(0), 1500)
    _, power = jax.jit(lambda: jax.lax.scan(step, start, keys))()
    want = wanted(b, k, eta, lip)
    np.testing.assert_allclose(power[500:].mean(), want, rtol=0.02)


def test_muon_inverse_undoes_the_orthogonalisation(key: jax.Array):
    for shape, view in (
        ((3, 6, 4), wlab.MatrixView.of(1, 1)),
        ((4, 2, 3, 5), wlab.MatrixView.of(3, 1)),
        ((5, 2, 7), wlab.MatrixView.of(1, 2)),
    ):
        m = jax.random.normal(key, shape)
        zero = jnp.zeros(shape)
        moved = _feedback.muon_direction(m / 0.05, zero, view, b1=0.95, ns_steps=5)
        x = wlab.core.as_matrices(moved.momentum, view)
        u, _, vt = jnp.linalg.svd(x, full_matrices=False)
        ratio = (x.shape[-1] / x.shape[-2]) ** 0.5
        exact = wlab.core.from_matrices(ratio * (u @ vt), view, shape)
        back = moved.invert(exact)
        np.testing.assert_allclose(back, moved.momentum, rtol=1e-3, atol=1e-4)
        # Newton-Schulz brings singular values near one.
        norms = jnp.linalg.svd(
            wlab.core.as_matrices(moved.update, view) / ratio, compute_uv=False
        )
        assert norms.min() > 0.5 and norms.max() < 1.5
