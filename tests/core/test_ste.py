# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""The straight-through estimator: exact values, whole gradients, every transform."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quax

from wlab.core import ste


def fake_quantise(x: jax.Array) -> jax.Array:
    return ste.straight_through(x, jnp.round(x), bounds=(-1.0, 1.0))


def loss(x: jax.Array) -> jax.Array:
    """Its gradient is twice the rounded value, where `x` is within the bounds."""
    return jnp.sum(fake_quantise(x) ** 2)


X = jnp.array([0.3, 0.8, 1.0, -1.0, 1.7, -1.2])
GRADIENT = [0.0, 2.0, 2.0, -2.0, 0.0, 0.0]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_value_is_exact(dtype: Any) -> None:
    x = jax.random.normal(jax.random.key(0), (256,)).astype(dtype)
    y = (x * 0.37).astype(dtype)
    # The usual expression is not: its difference has been rounded.
    usual = jax.jit(lambda x, y: x + jax.lax.stop_gradient(y - x))(x, y)
    assert (x + (y - x) != y).any() or (usual != y).any()
    for fn in (ste.straight_through, jax.jit(ste.straight_through)):
        np.testing.assert_array_equal(
            fn(x, y).astype(jnp.float32), y.astype(jnp.float32)
        )
    primal, tangent = jax.jvp(lambda x: ste.straight_through(x, y), (x,), (x,))
    np.testing.assert_array_equal(primal.astype(jnp.float32), y.astype(jnp.float32))
    np.testing.assert_array_equal(tangent.astype(jnp.float32), x.astype(jnp.float32))


def test_the_value_is_exact_where_sums_are_not() -> None:
    x = jnp.array([1e30, jnp.inf, 1.0])
    y = jnp.array([1.0, 2.0, -0.0])
    value = jax.jit(ste.straight_through)(x, y)
    np.testing.assert_array_equal(value, y)
    assert jnp.signbit(value[2])


def test_the_gradient_at_a_bound_is_whole() -> None:
    at = jnp.array([-1.0, 1.0])

    def clipped(x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.clip(x, -1.0, 1.0))

    def through(x: jax.Array) -> jax.Array:
        return jnp.sum(ste.straight_through(x, x, bounds=(-1.0, 1.0)))

    np.testing.assert_array_equal(jax.grad(through)(at), [1.0, 1.0])
    # The reason for this helper.
    np.testing.assert_array_equal(jax.grad(clipped)(at), [0.5, 0.5])
    outside = jnp.array([jnp.nextafter(1.0, 2.0), jnp.nextafter(-1.0, -2.0), jnp.nan])
    np.testing.assert_array_equal(jax.grad(through)(outside), 0.0)


def test_bounds_by_row_and_no_bounds() -> None:
    x = jnp.array([[0.5, 1.5], [0.5, 1.5]])
    high = jnp.array([[1.0], [2.0]])

    def total(x: jax.Array, y: jax.Array, high: jax.Array) -> jax.Array:
        return jnp.sum(ste.straight_through(x, y, bounds=(-high, high)))

    dx, dy, dhigh = jax.grad(total, argnums=(0, 1, 2))(x, 2 * x, high)
    np.testing.assert_array_equal(dx, [[1.0, 0.0], [1.0, 1.0]])
    np.testing.assert_array_equal(dy, 0.0)
    np.testing.assert_array_equal(dhigh, 0.0)
    free = jax.grad(lambda x: jnp.sum(ste.straight_through(x, jnp.sign(x))))(1e9 * x)
    np.testing.assert_array_equal(free, 1.0)


class Plain(quax.ArrayValue):
    """A structured weight that only knows its dense value."""

    dense: jax.Array

    def aval(self) -> jax.core.ShapedArray:
        return jax.core.ShapedArray(self.dense.shape, self.dense.dtype)

    def materialise(self) -> jax.Array:
        return self.dense


def scanned(x: jax.Array) -> jax.Array:
    return jax.lax.scan(lambda c, v: (c + loss(v), None), 0.0, x)[0]


@pytest.mark.parametrize(
    "gradient",
    [
        jax.grad(loss),
        jax.jit(jax.grad(loss)),
        jax.vmap(jax.grad(loss)),
        jax.grad(jax.checkpoint(loss)),
        jax.grad(scanned),
        jax.jacfwd(loss),
        lambda x: jax.vjp(loss, x)[1](jnp.ones(()))[0],
        jax.grad(quax.quaxify(loss)),
        jax.jit(jax.grad(quax.quaxify(jax.jit(loss)))),
        jax.grad(lambda x: quax.quaxify(loss)(Plain(x))),
        jax.grad(lambda x: quax.quaxify(scanned)(Plain(x))),
        lambda x: quax.quaxify(jax.grad(loss))(Plain(x)),
    ],
    ids=[
        "grad",
        "jit",
        "vmap",
        "remat",
        "scan",
        "jacfwd",
        "vjp",
        "quaxify",
        "quaxify of jit",
        "quaxify of a weight",
        "quaxify of a scan",
        "grad inside quaxify",
    ],
)
def test_under_every_transform(gradient: Any) -> None:
    np.testing.assert_array_equal(gradient(X), GRADIENT)


def test_the_hessian_is_that_of_the_identity() -> None:
    hessian = jax.hessian(loss)(X)
    np.testing.assert_array_equal(jnp.diagonal(hessian), [2.0, 2, 2, 2, 0, 0])


def test_no_weight_is_kept_for_the_backward_pass() -> None:
    x = jnp.ones((64, 64))
    _, residuals = jax.vjp(lambda x: ste.straight_through(x, jnp.round(x)), x)
    assert not [r for r in jax.tree.leaves(residuals) if jnp.size(r) >= x.size]


def test_on_a_mesh(mesh: jax.sharding.Mesh) -> None:
    sharding = jax.NamedSharding(mesh, jax.P("data", "model"))
    x = jax.random.normal(jax.random.key(0), (8, 4))
    expected = jax.grad(loss)(x)
    with jax.set_mesh(mesh):
        actual = jax.jit(jax.grad(loss))(jax.device_put(x, sharding))
    np.testing.assert_array_equal(jax.device_get(actual), jax.device_get(expected))
    assert actual.sharding.is_equivalent_to(sharding, 2)


def test_the_dtype_is_that_of_the_first() -> None:
    x = jnp.array([0.3], jnp.bfloat16)
    y = ste.straight_through(x, jnp.array([0.1], jnp.float32))
    assert y.dtype == jnp.bfloat16
    assert y[0] == jnp.bfloat16(0.1)
    codes = ste.straight_through(x, jnp.array([3], jnp.int8))
    assert codes.dtype == jnp.bfloat16 and codes[0] == 3


def test_what_bad_input_gets() -> None:
    with pytest.raises(ValueError, match=r"\(2,\) and \(1,\)"):
        ste.straight_through(jnp.ones(2), jnp.ones(1))
    with pytest.raises(TypeError, match=r"int32 of shape \(2,\)"):
        ste.straight_through(jnp.ones(2, jnp.int32), jnp.ones(2))
