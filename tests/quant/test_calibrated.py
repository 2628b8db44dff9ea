# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""GPTQ and its kin keep what they promise; parity stands in tests/parity."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import wlab
from wlab import quant
from wlab.core import Permuted
from wlab.quant._gptq import _factor, solve
from wlab.quant._uniform import Uniform

N, M = 48, 12
KEY = jax.random.key(0)


def inputs(seed: int = 0, n: int = N) -> jax.Array:
    """Correlated ones."""
    a, b = jax.random.split(jax.random.key(seed))
    mix = jax.random.normal(a, (n, n)) / n**0.5 + jnp.eye(n)
    return jax.random.normal(b, (200, n)) @ mix


X = inputs()
H = X.T @ X
W = jax.random.normal(jax.random.key(1), (N, M))


def error(q: Any, w: jax.Array = W, x: jax.Array = X) -> float:
    return float(jnp.sum((x @ (q.materialise() - w)) ** 2))


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [False, True])
def test_compensation_beats_rounding(bits: int, symmetric: bool):
    ratios = []
    for seed in range(3):
        x = inputs(seed)
        options: Any = {"bits": bits, "group": 16, "symmetric": symmetric, "clip": True}
        plain = error(quant.rtn(W, **options), x=x)
        ratios.append(error(quant.gptq(W, x.T @ x, block=16, **options), x=x) / plain)
    assert np.mean(ratios) < 0.8


def test_without_correlation_it_is_rounding():
    q = quant.gptq(W, jnp.diag(jnp.arange(1.0, N + 1)), bits=3, group=None)
    want = quant.rtn(W, bits=3, group=None)
    np.testing.assert_allclose(q.materialise(), want.materialise(), atol=1e-5)
    ordered = quant.gptq(
        W, jnp.diag(jnp.arange(1.0, N + 1)), bits=3, group=None, act_order=True
    )
    np.testing.assert_allclose(ordered.materialise(), want.materialise(), atol=1e-5)


def test_factors_and_blocks_change_nothing():
    q = quant.gptq(W, H, bits=4, group=None).materialise()
    scaled = quant.gptq(W, 7 * H, bits=4, group=None).materialise()
    np.testing.assert_allclose(scaled, q, atol=1e-4)
    for block in (8, 16, 48):
        other = quant.gptq(W, H, bits=4, group=None, block=block).materialise()
        assert float((jnp.abs(other - q) > 1e-4).mean()) < 0.02
    turned = quant.gptq(W[:, ::-1], H, bits=4, group=None).materialise()
    np.testing.assert_allclose(turned[:, ::-1], q, atol=1e-5)


def test_terms_that_are_nothing():
    d = jnp.zeros_like(H)
    q = quant.gptq(W, H, group=16, block=16)
    same = quant.gptaq(W, H, d, group=16, block=16)
    np.testing.assert_array_equal(q.codes, same.codes)
    shift = 0.1 * H
    one = quant.gptaq(W, H, shift, group=16, block=16)
    two = quant.rescomp(W, H, shift, group=16, block=16, alpha2=0.0, mode="original")
    np.testing.assert_array_equal(one.codes, two.codes)
    assert (one.codes != q.codes).any()
    moved = quant.rescomp(W, H, shift, group=16, block=16)
    assert (moved.codes != one.codes).any()


def test_aiming_at_the_original_outputs():
    """Of inputs that differ GPTAQ makes less of it than GPTQ."""
    own = X + 0.3 * inputs(5)
    d = (own - X).T @ X
    gains = []
    for seed in range(3):
        w = jax.random.normal(jax.random.key(seed), (N, M))

        def off(q: Any, w: jax.Array = w) -> float:
            return float(jnp.sum((own @ w - X @ q.materialise()) ** 2))

        plain = off(quant.gptq(w, H, bits=4, group=16, block=16))
        gains.append(off(quant.gptaq(w, H, d, bits=4, group=16, block=16)) / plain)
    assert np.mean(gains) < 0.97


def test_groups_of_channels_in_the_order_of_activity():
    q = quant.gptq(W, H, bits=3, group=16, block=16, act_order=True)
    assert isinstance(q, Permuted)
    found = solve(W, H, grid=Uniform(3), group=16, block=16, act_order=True)
    for stored, want in zip(
        q.order.reshape(3, 16), found.order.reshape(3, 16), strict=True
    ):
        assert set(stored.tolist()) == set(want.tolist())
    np.testing.assert_allclose(q.materialise(), found.values, atol=1e-5)


def test_channels_that_are_never_active():
    x = X.at[:, 5].set(0)
    q = quant.gptq(W, x.T @ x, bits=4, group=16, block=16)
    assert not np.any(q.materialise()[5])
    assert np.isfinite(q.materialise()).all()


def test_the_factor_and_its_damping():
    u, _ = _factor(H, jnp.float32(0))
    np.testing.assert_allclose(u.T @ u @ H, jnp.eye(N), atol=2e-2)
    assert not np.any(jnp.tril(u, -1))
    flat = jnp.ones((N, N))  # of rank one
    found = solve(W, flat, grid=Uniform(4), damping=0.0, block=16)
    assert np.isfinite(found.values).all() and float(found.damping) > 0


def test_packed_kernels_run_and_map():
    many = jnp.stack([W, 2 * W])
    hs = jnp.stack([H, inputs(3).T @ inputs(3)])
    fn = functools.partial(quant.gptq, bits=4, group=16, block=16)
    stacked = jax.jit(jax.vmap(fn))(many, hs)
    for i in range(2):
        one = fn(many[i], hs[i])
        np.testing.assert_array_equal(stacked.codes[i], one.codes)
    got = wlab.lift(jnp.dot)(X, fn(W, H))
    np.testing.assert_allclose(got, X @ fn(W, H).materialise(), rtol=1e-4, atol=1e-3)
    narrow = fn(W.astype(jnp.bfloat16), H)
    assert narrow.dtype == jnp.bfloat16 and narrow.codes.dtype == jnp.uint4
    bits = quant.gptq(W, H, bits=3, group=16, block=16).size_in_bits
    assert bits == 3 * N * M + 2 * 32 * 3 * M


def test_the_program_does_not_grow():
    def size(n: int) -> int:
        w, h = jnp.zeros((n, 8)), jnp.eye(n)
        fn = functools.partial(quant.gptq, bits=4, group=32, block=32)
        return str(jax.make_jaxpr(fn)(w, h)).count(" = ")

    assert size(64) == size(256)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: quant.rtn(W, bits=1), "2 to 8"),
        (lambda: quant.rtn(W[0]), "no matrix"),
        (lambda: quant.gptq(W, H[:3]), "needs h"),
        (lambda: quant.gptq(W, H, group=24, block=16), "divide the other"),
    ],
)
def test_bad_input_is_told(make: Any, message: str):
    with pytest.raises(ValueError, match=message):
        make()
    with pytest.raises(TypeError, match="floats"):
        quant.rtn(jnp.ones((4, 4), jnp.int32))
