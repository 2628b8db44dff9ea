# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Dual scales, their place in the column loop, and corrected norms."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import wlab
from wlab import quant
from wlab.quant import BinaryCoded, _gptq
from wlab.quant._d2quant import dual_uniform_fit
from wlab.quant._dsq import dsq_fit, signs

N, M, G = 64, 24, 16
KEYS = jax.random.split(jax.random.key(0), 8)
# Channels and outputs of unlike sizes.
SIZES = jnp.exp(0.5 * jax.random.normal(KEYS[0], (N,)))
W = jax.random.normal(KEYS[1], (N, M)) * SIZES[:, None]
W = W * jnp.exp(0.3 * jax.random.normal(KEYS[2], (M,)))[None]
MIX = jax.random.normal(KEYS[3], (N, N)) / N**0.5 + jnp.eye(N)
X = jax.random.normal(KEYS[4], (256, N)) @ MIX
H = X.T @ X
fit = jax.jit(dsq_fit, static_argnums=(1, 2))
rtn, dsq, dual_uniform = (
    jax.jit(functools.partial(fn, group=G), static_argnames="bits")
    for fn in (quant.rtn, quant.dsq, quant.dual_uniform)
)
d2quant = jax.jit(
    functools.partial(quant.d2quant, group=G), static_argnames=("bits", "block")
)


@jax.jit
def error(q: Any, w: jax.Array) -> jax.Array:
    return jnp.sum((wlab.materialise(q) - w) ** 2)


@jax.jit
def off(q: Any, own: jax.Array) -> jax.Array:
    """Of the outputs."""
    return jnp.sum((own @ W - X @ q.materialise()) ** 2)


@jax.jit
def values(found: Any, codes: jax.Array) -> jax.Array:
    sign = jnp.stack(signs(codes, len(found.r), found.r.dtype))
    return found.c[:, None] * jnp.sum(found.r[:, None] * sign, 0)


@pytest.mark.parametrize("bits", [2, 3])
def test_rounds_only_lower_the_error(bits: int):
    def error(steps: jax.Array) -> jax.Array:
        return jnp.sum((W - values(*dsq_fit(W, bits, steps))) ** 2)

    errors = jax.jit(jax.vmap(error))(jnp.arange(9))
    assert (np.diff(errors) <= 1e-5 * float(errors[0])).all()
    assert float(errors[-1]) < 0.9 * float(errors[0])


@pytest.mark.parametrize("bits", [2, 3])
def test_symmetries(bits: int):
    found, codes = fit(W, bits, 15)
    minus, flipped = fit(-W, bits, 15)
    np.testing.assert_array_equal(flipped, 2**bits - 1 - codes)
    larger, same = fit(4 * W, bits, 15)
    np.testing.assert_array_equal(same, codes)
    for other, times in ((minus, 1), (larger, 4)):
        np.testing.assert_allclose(other.r, found.r, rtol=1e-5)
        np.testing.assert_allclose(other.c, times * found.c, rtol=1e-5)
    turned, moved = fit(W[:, ::-1], bits, 15)
    np.testing.assert_array_equal(moved[:, ::-1], codes)
    np.testing.assert_allclose(turned.r[:, ::-1], found.r, rtol=1e-4)


def test_rows_whose_signs_coincide_and_empty_channels():
    """Their equations have no one solution; what comes out is finite all the same."""
    w = jnp.ones((4, 6)).at[1].set(0).at[:, 2].set(0).at[:, 3].set(-2)
    for bits in (2, 3):
        for x in (w, jnp.zeros((4, 6))):
            found, codes = fit(x, bits, 15)
            off = jnp.abs(values(found, codes) - x)
            assert np.isfinite(off).all() and float(off.max()) < 0.75


def test_better_than_a_uniform_grid():
    for bits in (2, 3):
        plain = error(rtn(W, bits=bits), W)
        assert error(dsq(W, bits=bits), W) < 0.6 * plain


def test_compensation_lowers_the_error_of_outputs():
    own = X + 0.3 * jax.random.normal(KEYS[5], X.shape)
    d = (own - X).T @ X
    plain = d2quant(W, H, jnp.zeros_like(H), bits=2)
    assert off(plain, own) < 0.9 * off(dsq(W, bits=2), own)
    assert off(d2quant(W, H, d, bits=2), own) < off(plain, own)
    np.testing.assert_array_equal(d2quant(W, H, bits=2).codes, plain.codes)


def test_the_order_of_groups():
    diagonal = jnp.array([1.0, 5.0, 2.0, 2.0, 3.0, 9.0, 0.5])
    gar_order = jax.jit(_gptq.gar_order, static_argnums=1)
    assert gar_order(diagonal, 2).tolist() == [5, 4, 1, 0, 2, 3, 6]
    assert gar_order(jnp.ones(6), 3).tolist() == [0, 1, 2, 3, 4, 5]
    assert gar_order(jnp.ones(2), 3).tolist() == [0, 1]


def test_the_order_does_not_show():
    """Without correlation each group is fitted alone: any order gives the same."""
    h = jnp.diag(jax.random.permutation(KEYS[6], jnp.arange(1.0, N + 1)))
    want, got = dsq(W, bits=2), d2quant(W, h, bits=2)
    np.testing.assert_allclose(got.materialise(), want.materialise(), atol=1e-4)
    np.testing.assert_allclose(got.c, want.c, rtol=1e-3)
    np.testing.assert_allclose(got.r, want.r, rtol=1e-3)


@pytest.mark.parametrize("block", [4, 32])
def test_groups_of_several_blocks_and_a_rest(block: int):
    n = 40
    w = W.at[n:].set(0)
    q = d2quant(W[:n], H[:n, :n], bits=2, block=block)
    assert q.shape == (n, M) and q.r.shape == (2, 3, M)
    filled = jnp.pad(q.materialise(), [(0, N - n), (0, 0)])
    plain = jnp.pad(dsq(W[:n], bits=2).materialise(), [(0, N - n), (0, 0)])
    assert jnp.sum((X @ (filled - w)) ** 2) < 0.9 * jnp.sum((X @ (plain - w)) ** 2)


def test_coded_kernels_run_and_map():
    many = jnp.stack([W, 2 * W])
    stacked = jax.jit(jax.vmap(functools.partial(quant.dsq, group=G)))(many)
    one = dsq(2 * W, bits=2)
    np.testing.assert_array_equal(stacked.codes[1], one.codes)
    dense = stacked.materialise()
    np.testing.assert_allclose(dense[1], one.materialise(), rtol=1e-5)

    def over(w: Any) -> jax.Array:
        return jax.lax.scan(lambda c, w: (c, X @ w), 0, w)[1]

    np.testing.assert_allclose(wlab.lift(over)(stacked), over(dense), atol=1e-3)
    picked = wlab.lift(lambda w: w[1])(stacked)
    assert isinstance(picked, BinaryCoded)
    np.testing.assert_array_equal(picked.materialise(), dense[1])
    assert one.codes.dtype == jnp.uint2
    assert one.size_in_bits == 2 * N * M + 32 * (2 * N // G * M + N)
    code = functools.partial(quant.dsq, bits=3, group=G)
    narrow = jax.eval_shape(code, W.astype(jnp.bfloat16))
    assert narrow.dtype == jnp.bfloat16 and narrow.codes.dtype == jnp.uint4
    with pytest.raises(TypeError, match="bit patterns"):
        jax.tree.map(lambda x: x.astype(float), one)
    spec = one.specs(jax.P("data", "model"))
    assert jax.tree.leaves(spec, is_leaf=lambda x: isinstance(x, jax.P)) == [
        jax.P("data", "model"),
        jax.P(None, "data", "model"),
        jax.P("data"),
    ]


def test_the_program_does_not_grow():
    def size(n: int) -> int:
        fn = functools.partial(quant.d2quant, group=32)
        return str(jax.make_jaxpr(fn)(jnp.zeros((n, 8)), jnp.eye(n))).count(" = ")

    assert size(64) == size(256)


def test_absorbed_scales_leave_the_function():
    up = jax.random.normal(KEYS[7], (8, N))
    x, gate = X[:, :8], up[::-1]
    bias = jnp.linspace(-1, 1, N)

    @jax.jit
    def mlp(up: Any, down: Any, bias: Any) -> jax.Array:
        return (jax.nn.silu(x @ gate) * (x @ up + bias[None])) @ down

    dual = dual_uniform(W, bits=4)
    packed = quant.rtn(up, bits=4, group=4)
    for down, first in (
        (dsq(W, bits=2), up),
        (dsq(W, bits=2), packed),
        (dual, wlab.core.Permuted(packed, jnp.arange(8)[::-1])),
    ):
        if isinstance(down, BinaryCoded):
            dense = down.materialise()
        else:
            dense = down.scale[:, None] * down.weight.materialise()
        moved = quant.absorb(down, first, bias)
        got = mlp(*wlab.materialise((moved.up, moved.down)), moved.bias)
        want = mlp(wlab.materialise(first), dense, bias)
        np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-3)
        assert type(moved.up) is type(first)
    with pytest.raises(ValueError, match="no column scales"):
        quant.absorb(quant.absorb(dsq(W, bits=2), up).down, up)


def test_a_uniform_grid_with_two_scales():
    def dense(q: Any) -> jax.Array:
        return q.scale[:, None] * q.weight.materialise()

    plain = quant.rtn(W, bits=3, group=G, symmetric=True)
    dual = dual_uniform(W, bits=3)
    assert error(dense(dual), W) < 0.9 * error(plain, W)
    find = jax.jit(dual_uniform_fit, static_argnums=(1, 2), static_argnames="keep_best")
    found = find(W, 3, G)
    np.testing.assert_allclose(found.errors[-1], error(dense(dual), W), rtol=1e-4)
    best = find(W, 3, G, keep_best=True)
    values = best.c[:, None] * best.codes * jnp.repeat(best.scale, G, 0)
    np.testing.assert_allclose(error(values, W), best.errors.min(), rtol=1e-4)
    solve = functools.partial(quant.dual_uniform, bits=3, group=G, block=G)
    solved = jax.jit(solve)(W, H)
    lost = [jnp.sum((X @ (dense(q) - W)) ** 2) for q in (solved, dual)]
    assert lost[0] < 0.9 * lost[1]


def test_corrected_norms():
    a, b = jax.random.normal(KEYS[5], (2, 3, 40, 6))
    b = b + jnp.arange(6.0)[None, None]
    add = jax.jit(quant.dac_add)
    start = quant.dac_init(6)
    shift = add(start, a, b)
    bias = quant.dac_bias(shift)
    a, b, moved = (np.asarray(x) for x in (a, b, b + bias[None, None]))
    np.testing.assert_allclose((a - moved).mean((0, 1)), 0, atol=1e-5)
    before, after = (((a - x) ** 2).mean((0, 1)) for x in (b, moved))
    np.testing.assert_allclose(before - after, shift.mean**2, atol=1e-4)
    np.testing.assert_array_equal(quant.dac_bias(add(start, a, a)), 0)
    # Batch by batch, and without what is padded.
    parts = add(add(start, a[:1], b[:1]), a[1:], b[1:])
    for x, y in zip(parts, shift, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)
    mask = np.arange(40)[None] < np.array([40, 40, 0])[:, None]
    some = add(start, a, b, mask)
    np.testing.assert_allclose(some.mean, (a - b)[:2].mean((0, 1)), atol=1e-5)
    # In the biases of the layers behind, it is the same.
    w = np.asarray(jax.random.normal(KEYS[6], (6, 4)))
    folded = quant.dac_fold(jnp.ones(4), jnp.asarray(w), bias)
    np.testing.assert_allclose(moved @ w + 1, b @ w + np.asarray(folded), atol=1e-4)


def test_which_channels_are_corrected():
    shift = quant.Shift(
        jnp.float32(4), jnp.array([0.1, -2.0, 20.0]), jnp.array([4.0, 4.0, 4.0])
    )
    cases: list[tuple[dict[str, float], list[float]]] = [
        ({}, [0.1, -2, 10]),
        ({"strength": 0.5, "clip": 3.0}, [0.05, -1, 3]),
        ({"keep": 1 / 3}, [0, 0, 10]),
        ({"explained": 0.5}, [0, -2, 10]),
        ({"snr": 3.0}, [0, 0, 10]),
    ]
    for options, want in cases:
        np.testing.assert_allclose(quant.dac_bias(shift, **options), want, rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: quant.dsq(W, bits=4), "2 or 3"),
        (lambda: quant.dsq(W[0]), "no matrix"),
        (lambda: quant.d2quant(W, H, group=24, block=16), "divide the other"),
        (lambda: quant.dual_uniform(W, bits=9), "2 to 8"),
        (lambda: quant.absorb(quant.dsq(W, group=G), W), "do not fit"),
        (lambda: quant.dac_bias(quant.dac_init(3), keep=0), "above 0"),
    ],
)
def test_bad_input_is_told(make: Any, message: str):
    with pytest.raises(ValueError, match=message):
        make()
