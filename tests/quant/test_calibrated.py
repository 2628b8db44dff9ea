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


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def inputs(seed: int = 0) -> np.ndarray:
    """Correlated ones."""
    mix = normal(seed + 10, N, N) / np.float32(N**0.5) + np.eye(N, dtype=np.float32)
    return normal(seed + 20, 200, N) @ mix


X = inputs()
H = X.T @ X
W = normal(1, N, M)
gptq = jax.jit(quant.gptq, static_argnames=("bits", "group", "block", "act_order"))


@jax.jit
def dense(q: Any) -> jax.Array:
    return q.materialise()


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [False, True])
def test_compensation_beats_rounding(bits: int, symmetric: bool):
    options: Any = {"bits": bits, "group": 16, "symmetric": symmetric, "clip": True}

    @jax.jit
    def errors(x: jax.Array) -> Any:
        made = quant.rtn(W, **options), quant.gptq(W, x.T @ x, block=16, **options)
        return [jnp.sum((x @ (q.materialise() - W)) ** 2) for q in made]

    found = np.array([errors(inputs(seed)) for seed in range(3)])
    assert np.mean(found[:, 1] / found[:, 0]) < 0.8


def test_without_correlation_it_is_rounding():
    h = np.diag(np.arange(1.0, N + 1, dtype=np.float32))

    @jax.jit
    def each(w: jax.Array, h: jax.Array) -> Any:
        options: Any = {"bits": 3, "group": None}
        made = (
            quant.rtn(w, **options),
            quant.gptq(w, h, **options),
            quant.gptq(w, h, act_order=True, **options),
        )
        return [q.materialise() for q in made]

    want, *found = each(W, h)
    for got in found:
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_factors_and_blocks_change_nothing():
    def make(w: np.ndarray, h: np.ndarray, **options: Any) -> np.ndarray:
        return np.asarray(dense(gptq(w, h, bits=4, group=None, **options)))

    q = make(W, H)
    np.testing.assert_allclose(make(W, 7 * H), q, atol=1e-4)
    for block in (8, 16, 48):
        other = make(W, H, block=block)
        assert (abs(other - q) > 1e-4).mean() < 0.02
    np.testing.assert_allclose(make(W[:, ::-1], H)[:, ::-1], q, atol=1e-5)


def test_terms_that_are_nothing():
    @jax.jit
    def codes(h: jax.Array) -> Any:
        options: Any = {"group": 16, "block": 16}
        shift = 0.1 * h
        original: Any = {"alpha2": 0.0, "mode": "original"}
        made = (
            quant.gptq(W, h, **options),
            quant.gptaq(W, h, jnp.zeros_like(h), **options),
            quant.gptaq(W, h, shift, **options),
            quant.rescomp(W, h, shift, **options, **original),
            quant.rescomp(W, h, shift, **options),
        )
        return [q.codes.astype(jnp.int32) for q in made]

    q, same, one, two, moved = jax.device_get(codes(H))
    np.testing.assert_array_equal(q, same)
    np.testing.assert_array_equal(one, two)
    assert (one != q).any()
    assert (moved != one).any()


def test_aiming_at_the_original_outputs():
    """Of inputs that differ GPTAQ makes less of it than GPTQ."""
    own = X + np.float32(0.3) * inputs(5)
    d = (own - X).T @ X

    @jax.jit
    def errors(w: jax.Array) -> Any:
        options: Any = {"bits": 4, "group": 16, "block": 16}
        made = quant.gptaq(w, H, d, **options), quant.gptq(w, H, **options)
        return [jnp.sum((own @ w - X @ q.materialise()) ** 2) for q in made]

    found = np.array([errors(normal(seed, N, M)) for seed in range(3)])
    assert np.mean(found[:, 0] / found[:, 1]) < 0.97


def test_groups_of_channels_in_the_order_of_activity():
    options: Any = {"group": 16, "block": 16, "act_order": True}
    q = gptq(W, H, bits=3, **options)
    assert isinstance(q, Permuted)
    found = jax.jit(lambda w, h: solve(w, h, grid=Uniform(3), **options))(W, H)
    orders = (np.asarray(x.order).reshape(3, 16) for x in (q, found))
    for stored, want in zip(*orders, strict=True):
        assert set(stored.tolist()) == set(want.tolist())
    np.testing.assert_allclose(dense(q), found.values, atol=1e-5)


def test_channels_that_are_never_active():
    x = X.copy()
    x[:, 5] = 0
    got = np.asarray(dense(gptq(W, x.T @ x, bits=4, group=16, block=16)))
    assert not np.any(got[5])
    assert np.isfinite(got).all()


def test_the_factor_and_its_damping():
    u = np.asarray(jax.jit(_factor)(H, np.float32(0))[0])
    np.testing.assert_allclose(u.T @ u @ H, np.eye(N), atol=2e-2)
    assert not np.any(np.tril(u, -1))
    flat = np.ones((N, N), np.float32)  # of rank one
    singular = functools.partial(solve, grid=Uniform(4), damping=0.0, block=16)
    found = jax.jit(singular)(W, flat)
    assert np.isfinite(found.values).all() and float(found.damping) > 0


def test_packed_kernels_run_and_map():
    many = np.stack([W, 2 * W])
    hs = np.stack([H, inputs(3).T @ inputs(3)])
    fn = functools.partial(gptq, bits=4, group=16, block=16)
    stacked = jax.jit(jax.vmap(fn))(many, hs)
    codes = np.asarray(stacked.codes)
    for i in range(2):
        np.testing.assert_array_equal(codes[i], fn(many[i], hs[i]).codes)
    q = fn(W, H)
    got = jax.jit(wlab.lift(jnp.dot))(X, q)
    np.testing.assert_allclose(got, X @ np.asarray(dense(q)), rtol=1e-4, atol=1e-3)
    narrow = fn(W.astype(jnp.bfloat16), H)
    assert narrow.dtype == jnp.bfloat16 and narrow.codes.dtype == jnp.uint4
    three = jax.eval_shape(functools.partial(fn, bits=3), W, H)
    assert three.size_in_bits == 3 * N * M + 2 * 32 * 3 * M


def test_the_program_does_not_grow():
    def size(n: int) -> int:
        w, h = np.zeros((n, 8)), np.eye(n)
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
