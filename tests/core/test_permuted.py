# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""A matrix whose channels are stored in another order."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import wlab
from wlab import quant
from wlab.core import Permuted
from wlab.quant import Quantized

N, M = 12, 5
ORDER = jax.random.permutation(jax.random.key(0), N).astype(jnp.int32)
W = jax.random.normal(jax.random.key(1), (N, M))
X = jax.random.normal(jax.random.key(2), (3, N))


def made(w: jax.Array = W, order: jax.Array = ORDER) -> Permuted:
    return Permuted(w[order], order)


class Probe(Permuted):
    """One that must not be made dense."""

    def materialise(self) -> jax.Array:
        raise AssertionError("dense")


def test_it_stands_for_the_matrix():
    np.testing.assert_array_equal(made().materialise(), W)
    assert made().shape == (N, M) and made().view == wlab.MatrixView.of(1, 1)


def test_products_use_the_base():
    w = Probe(W[ORDER], ORDER)
    for equation, x in (("bn,nm->bm", X), ("nm,bn->mb", X), ("bm,nm->bn", X[:, :M])):
        first = equation.startswith("nm")
        args = (w, x) if first else (x, w)
        want = jnp.einsum(equation, *((W, x) if first else (x, W)))
        got = wlab.lift(lambda a, b, e=equation: jnp.einsum(e, a, b))(*args)
        np.testing.assert_allclose(got, want, atol=1e-5)
    grad = jax.grad(lambda x: wlab.lift(jnp.dot)(x, w).sum())(X)
    np.testing.assert_allclose(grad, jnp.ones((3, M)) @ W.T, atol=1e-5)


def test_stacked_ones_scan_and_map():
    ws = jnp.stack([W, 2 * W])
    orders = jnp.stack([ORDER, ORDER[::-1]])
    many = jax.vmap(made)(ws, orders)
    np.testing.assert_array_equal(many.materialise(), ws)

    def over(w: Any) -> jax.Array:
        return jax.lax.scan(lambda c, w: (c, X @ w), 0, w)[1]

    np.testing.assert_allclose(wlab.lift(over)(many), over(ws), atol=1e-5)
    probe = Probe(many.base, many.order)

    def batched(w: Any) -> jax.Array:
        return jnp.einsum("lbn,lnm->lbm", jnp.stack([X, X]), w)

    np.testing.assert_allclose(wlab.lift(batched)(probe), batched(ws), atol=1e-5)
    second = wlab.lift(lambda w: w[1])(many)
    np.testing.assert_array_equal(wlab.materialise(second), ws[1])
    other = wlab.lift(lambda w: jnp.tanh(w.reshape(1, 2, N, M)).T)(many)
    np.testing.assert_allclose(other, jnp.tanh(ws).reshape(1, 2, N, M).T, atol=1e-6)


def test_groups_by_activity_are_stored_so():
    mix = jax.random.normal(jax.random.key(3), (64, N)) * jnp.arange(1.0, N + 1)[None]
    h = mix.T @ mix
    gptq = jax.jit(
        functools.partial(quant.gptq, group=4, block=4), static_argnames="act_order"
    )
    run = functools.partial(gptq, h=h, act_order=True)
    q = run(W)
    assert isinstance(q, Permuted) and isinstance(q.base, Quantized)
    # A group has the next most active channels, in the order that they had.
    order = np.argsort(-np.diagonal(h), kind="stable")
    np.testing.assert_array_equal(
        q.order.reshape(-1, 4), np.sort(order.reshape(-1, 4), axis=1)
    )
    got = wlab.lift(jnp.dot)(X, q)
    np.testing.assert_allclose(got, X @ q.materialise(), atol=1e-4)
    want = gptq(W[order], h[order][:, order]).materialise()
    np.testing.assert_allclose(q.materialise()[order], want, atol=1e-5)
    narrow = run(W.astype(jnp.bfloat16))
    assert narrow.dtype == jnp.bfloat16 and narrow.materialise().dtype == jnp.bfloat16
    # Whole groups by activity stay side by side.
    by_group = gptq(W, h, act_order="groups")
    assert isinstance(by_group, Quantized)


def test_divided_over_a_mesh(mesh: jax.sharding.Mesh):
    with jax.set_mesh(mesh):
        w = made()
        specs = w.specs(jax.P("data", None))
        placed = jax.tree.map(
            lambda x, s: jax.device_put(x, jax.NamedSharding(mesh, s)), w, specs
        )
        np.testing.assert_array_equal(placed.materialise(), W)
        got = jax.jit(wlab.lift(jnp.dot))(X, placed)
        np.testing.assert_allclose(got, X @ W, atol=1e-5)


def test_bad_input_is_told():
    with pytest.raises(ValueError, match="does not fit"):
        Permuted(W, ORDER[:3])
