# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
r"""Error feedback through the momentum: one step of one quantised leaf.

The array layer of ECO, arXiv 2601.22101 (2026). What the quantiser takes away,
:math:`e = \tilde\theta - \theta'`, is put into the first moment through the inverse of
the map :math:`U_m` from momentum to update, so that the next step finds it.
"""

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from wlab.core import MatrixView, as_matrices, from_matrices, linalg

Scalar = float | jax.Array
Injection = Literal["paper", "decayed", "virtual", "exact", "none"]


class Direction(NamedTuple):
    """Where one leaf's momentum points, and the way back."""

    momentum: jax.Array  # m after the gradient, float32, of the leaf's shape
    second: jax.Array | None  # Adam's second moment, likewise
    update: jax.Array  # U(m): what the learning rate multiplies
    invert: Callable[[jax.Array], jax.Array]  # the inverse of U at this m


def _average(old: jax.Array, new: jax.Array, decay: Scalar) -> jax.Array:
    return decay * old + (1 - decay) * new


def sgd_direction(g: jax.Array, m: jax.Array, *, b1: Scalar) -> Direction:
    """Momentum as an average: ``m = b1 m + (1 - b1) g``; the update is m itself."""
    m = _average(m, g, b1)
    return Direction(m, None, m, lambda e: e)


def adam_direction(
    g: jax.Array,
    m: jax.Array,
    v: jax.Array,
    t: jax.Array,
    *,
    b1: Scalar,
    b2: Scalar,
    eps: Scalar,
) -> Direction:
    """Adam's update with bias correction; `t` counts from 1."""
    m, v = _average(m, g, b1), _average(v, jnp.square(g), b2)
    correction = 1 - jnp.asarray(b1, m.dtype) ** t
    root = jnp.sqrt(v / (1 - jnp.asarray(b2, v.dtype) ** t)) + eps
    return Direction(m, v, m / correction / root, lambda e: correction * root * e)


def muon_direction(
    g: jax.Array, m: jax.Array, view: MatrixView, *, b1: Scalar, ns_steps: int
) -> Direction:
    """Muon's update ``sqrt(out / in) (m m^T)^(-1/2) m`` of each matrix of the leaf."""
    m = _average(m, g, b1)
    n_in, n_out = jax.eval_shape(lambda x: as_matrices(x, view), m).shape[-2:]
    ratio = (n_out / n_in) ** 0.5

    whole = functools.partial(linalg.sharding_safe, whole=(*view.inputs, *view.outputs))

    @whole
    def orthogonal(m: jax.Array) -> jax.Array:
        x = linalg.orthogonalize(as_matrices(m, view), steps=ns_steps)
        return from_matrices(ratio * x, view, m.shape)

    @whole
    def invert(e: jax.Array, m: jax.Array) -> jax.Array:
        # (m m^T)^(1/2) = m msign(m)^T: products only. The cubic iteration takes the
        # orthogonalised matrix, near one already, the rest of the way.
        x, y = as_matrices(m, view), as_matrices(e, view)
        product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
        o = linalg.orthogonalize(x)
        for _ in range(5):
            ot = jnp.swapaxes(o, -1, -2)
            if n_in <= n_out:
                o = 1.5 * o - 0.5 * product(product(o, ot), o)
            else:
                o = 1.5 * o - 0.5 * product(o, product(ot, o))
        ot = jnp.swapaxes(o, -1, -2)
        left = n_in <= n_out
        y = product(product(x, ot), y) if left else product(y, product(ot, x))
        return from_matrices(y / ratio, view, m.shape)

    return Direction(m, None, orthogonal(m), lambda e: invert(e, m))


class Stepped(NamedTuple):
    """What a step makes of one leaf."""

    tilde: jax.Array  # the weight before quantisation, float32
    weight: jax.Array  # the weight on the grid, float32
    momentum: jax.Array  # with the residual put in, float32
    residual: jax.Array  # tilde - weight (exact: what is still owed), float32


def feedback_step(
    theta: jax.Array,
    direction: Direction,
    quantise: Callable[[jax.Array], jax.Array],
    *,
    eta: Scalar,
    b1: Scalar,
    weight_decay: Scalar = 0.0,
    injection: Injection = "paper",
    residual: jax.Array | None = None,
    eta_next: Scalar | None = None,
) -> Stepped:
    """One step of one leaf: move, quantise, and put the residual into the momentum.

    Args:
        theta: the weight on the grid, float32, any shape.
        direction: where the momentum points.
        quantise: rounds a weight to the grid and returns it in float32.
        eta: learning rate of this step; nothing is injected where it is 0.
        b1: decay of the momentum.
        weight_decay: decoupled weight decay.
        injection: see `eco`.
        residual: for "exact", what is owed from the steps before.
        eta_next: for "exact", the learning rate of the next step.
    """
    keep = 1 - eta * weight_decay
    tilde = keep * theta - eta * direction.update
    weight = quantise(tilde)
    e = tilde - weight
    m = direction.momentum
    inverse = _inverse(eta)
    if injection == "exact":
        assert residual is not None and eta_next is not None
        owed = jnp.where(jnp.asarray(eta) > 0, e, residual)
        keep_next = 1 - eta_next * weight_decay
        m = m + keep * inverse * residual - keep_next * _inverse(eta_next) / b1 * owed
        return Stepped(tilde, weight, m, owed)
    if injection != "none":
        factor = {
            "paper": 1 - 1 / b1,
            "decayed": keep * (1 - 1 / b1),
            "virtual": 1 - keep / b1,
        }[injection]
        m = m + factor * inverse * direction.invert(e)
    return Stepped(tilde, weight, m, e)


def _inverse(eta: Scalar) -> jax.Array:
    """1 / eta, and 0 for 0: a step that moves nothing loses nothing."""
    moving = jnp.asarray(eta) > 0
    return jnp.where(moving, 1 / jnp.where(moving, eta, 1), 0)
