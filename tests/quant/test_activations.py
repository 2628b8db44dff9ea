# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Activations rounded row by row in models that know nothing of it."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import wlab
from wlab.core import leaves_with_paths
from wlab.models.decoder import Decoder, DecoderConfig
from wlab.quant import (
    GRIDS,
    Quantized,
    QuantizedInput,
    quantize_activations,
    quantize_tree,
)

GRID = "int4"


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def rounded(x: Any, contracted: int | tuple[int, ...] = -1) -> jax.Array:
    """Each row by its largest magnitude to -7..7, written out."""
    scale = abs(x).max(axis=contracted, keepdims=True) / 7.0
    return jnp.round(x / jnp.where(scale == 0, 1.0, scale)) * scale


def wrapped(tree: Any) -> set[str]:
    named = leaves_with_paths(tree)
    return {path for path, leaf in named if isinstance(leaf, QuantizedInput)}


def test_a_product_sees_rows_rounded_and_the_gradient_passes_straight():
    x, w = normal(2, 5, 4), normal(4, 3, seed=1)
    x[0, 0] = 0.0  # a row of zeros stays one
    tree = quantize_activations({"kernel": w}, GRID)
    assert wrapped(tree) == {"kernel"}
    cotangent = normal(2, 5, 3, seed=2)

    @jax.jit
    def both(tree: Any, x: jax.Array) -> Any:
        call = wlab.lift(lambda p, x: x @ p["kernel"])
        got, vjp = jax.vjp(call, tree, x)
        return got, vjp(cotangent), rounded(x)

    got, (g_tree, g_x), rows = jax.device_get(both(tree, x))
    np.testing.assert_allclose(got, rows @ w, rtol=1e-5, atol=1e-6)
    assert abs(got - x @ w).max() > 0.02
    # As if rounding were the identity: inside, and at each row's largest magnitude.
    np.testing.assert_allclose(g_x, cotangent @ w.T, rtol=1e-5, atol=1e-6)
    # The kernel's gradient is that at the rounded input, which the product has seen.
    want = np.einsum("bti,bto->io", rows, cotangent)
    np.testing.assert_allclose(g_tree["kernel"].inner, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("equation", "shapes", "contracted"),
    [
        ("btd,dhk->bthk", ((2, 3, 4), (4, 2, 3)), -1),
        ("bthk,hkd->btd", ((2, 3, 2, 4), (2, 4, 5)), (-2, -1)),
        ("dhk,btd->hkbt", ((2, 3, 4), (4, 2, 3)), -1),  # the weight on the left
        ("ebd,edf->ebf", ((3, 2, 4), (3, 4, 5)), -1),  # a batch of experts
        ("btf,df->btd", ((2, 3, 4), (5, 4)), -1),  # transposed, as a tied head
    ],
)
def test_products_with_several_axes(equation: str, shapes: Any, contracted: Any):
    x, w = normal(*shapes[0]), normal(*shapes[1], seed=1)
    tree = quantize_activations({"w": w}, GRID)
    left = equation.index("b") > 3

    def call(p: Any, x: jax.Array) -> jax.Array:
        return jnp.einsum(equation, *((p["w"], x) if left else (x, p["w"])))

    @jax.jit
    def both(tree: Any, x: jax.Array) -> Any:
        return wlab.lift(call)(tree, x), call({"w": w}, rounded(x, contracted))

    got, want = both(tree, x)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_the_kernel_may_be_moved_first():
    """Transposed, reshaped, cut and converted, it still has its input rounded."""
    x, w = normal(2, 4), normal(3, 4, 2, 3, seed=1)

    def call(p: Any, x: jax.Array) -> jax.Array:
        kernel = p["w"][1].reshape(4, 6)[:, 1:5].T.astype(jnp.bfloat16)
        y = x @ jax.lax.dynamic_index_in_dim(p["w"], 2, 0, False)[:, 1]
        return (kernel @ x.T).T.astype(jnp.float32), y

    @jax.jit
    def three(p: Any, x: jax.Array) -> Any:
        got = wlab.lift(call)(quantize_activations(p, GRID), x)
        return got, call(p, rounded(x)), call(p, x)

    got, want, plain = jax.device_get(three({"w": w}, x))
    for a, b, c, tol in zip(got, want, plain, (2e-2, 1e-5), strict=True):
        np.testing.assert_allclose(a, b, rtol=tol, atol=tol)
        assert abs(b - c).max() > 2 * tol


def test_a_convolution_sees_pixels_rounded():
    model = nn.Conv(3, (3, 2), strides=2)
    x = normal(2, 5, 6, 4)

    @jax.jit
    def both(key: jax.Array, x: jax.Array) -> Any:
        params = model.init(key, x)
        got = wlab.lift(model.apply)(quantize_activations(params, GRID), x)
        return got, model.apply(params, rounded(x))

    got, want = both(jax.random.key(0), x)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_bfloat16_activations_stay_bfloat16():
    x, w = normal(3, 4).astype(jnp.bfloat16), normal(4, 2, seed=1)
    tree = quantize_activations({"w": w.astype(jnp.bfloat16)}, "fp8_e4m3")
    got = jax.eval_shape(wlab.lift(lambda p, x: x @ p["w"]), tree, x)
    assert got.dtype == jnp.bfloat16


# --- Which leaves ----------------------------------------------------------------


def test_packed_leaves_are_wrapped_by_default_and_else_kernels():
    params = {
        "up": {"kernel": normal(4, 3), "bias": normal(3)},
        "down": {"kernel": normal(3, 4)},
        "embed": {"embedding": normal(5, 4)},
        "head": {"kernel": normal(4, 5)},
    }
    assert wrapped(quantize_activations(params, GRID)) == {"up/kernel", "down/kernel"}
    pack = functools.partial(quantize_tree, grid="int8")
    packed = jax.jit(functools.partial(pack, select=["up/kernel", "head/kernel"]))(
        params
    )
    tree = quantize_activations(packed, GRID)
    assert wrapped(tree) == {"up/kernel", "head/kernel"}
    assert isinstance(tree["up"]["kernel"].inner, Quantized)
    assert tree["up"]["kernel"].view == packed["up"]["kernel"].view
    tree = quantize_activations(packed, GRID, select="down*")
    assert wrapped(tree) == {"down/kernel"}
    # As arrays they are what they were.
    dense = wlab.materialise(quantize_activations(params, GRID))
    np.testing.assert_array_equal(dense["up"]["kernel"], params["up"]["kernel"])
    for bad, message in (("*kernels", "matches no leaf"), ("up/bias", "is no matrix")):
        with pytest.raises(ValueError, match=message):
            quantize_activations(params, GRID, select=bad)
    with pytest.raises(ValueError, match="no grid is named 'int40'; near: int4"):
        quantize_activations(params, "int40")


# --- Models ----------------------------------------------------------------------

CONFIG = DecoderConfig(
    **{"vocab": 11, "width": 8, "depth": 2, "heads": 2, "kv_heads": 1},
    **{"head_dim": 4, "hidden": 12, "scan": True, "remat": True},
)
TOKENS = np.arange(12, dtype=np.int32).reshape(2, 6) % 11


def decoder_params() -> Any:
    shapes = jax.eval_shape(Decoder(CONFIG).init, jax.random.key(0), TOKENS)
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: (0.3 * rng.normal(size=x.shape)).astype("f"), shapes)


class RoundedDense(nn.Dense):
    def __call__(self, x: jax.Array) -> jax.Array:
        return super().__call__(rounded(x))


class RoundedGeneral(nn.DenseGeneral):
    def __call__(self, x: jax.Array) -> jax.Array:
        axes = (self.axis,) if isinstance(self.axis, int) else tuple(self.axis)
        return super().__call__(rounded(x, axes))


def test_the_scanned_decoder(monkeypatch: pytest.MonkeyPatch):
    """Against the same model with layers that round by hand; packed weights too."""
    params = decoder_params()
    apply = Decoder(CONFIG).apply

    def mean_square(logits: jax.Array) -> jax.Array:
        return jnp.mean(jnp.square(logits))

    @jax.jit
    def lifted(params: Any, tokens: jax.Array) -> Any:
        packed = quantize_tree(params, "fp8_e4m3")
        assert len(wrapped(quantize_activations(packed, GRID))) == 7
        return wlab.lift(apply)(quantize_activations(packed, GRID), tokens)

    @jax.jit
    @jax.value_and_grad
    def loss(params: Any) -> jax.Array:
        tree = quantize_activations(params, GRID)
        return mean_square(wlab.lift(apply)(tree, TOKENS))

    got, (value, grads) = jax.device_get((lifted(params, TOKENS), loss(params)))

    # A token that comes later changes nothing before it: no scale is shared.
    changed = TOKENS.copy()
    changed[:, 4] = 3
    later = np.asarray(lifted(params, changed))
    np.testing.assert_array_equal(later[:, :4], got[:, :4])
    assert (later[:, 4:] != got[:, 4:]).any()

    plain = jax.device_get(jax.jit(apply)(params, TOKENS))
    monkeypatch.setattr(nn, "Dense", RoundedDense)
    monkeypatch.setattr(nn, "DenseGeneral", RoundedGeneral)
    by_hand = jax.jit(lambda p, tokens: apply(p, tokens))  # not the function above
    pack = jax.jit(lambda p: wlab.materialise(quantize_tree(p, "fp8_e4m3")))
    dense = pack(params)
    np.testing.assert_allclose(got, by_hand(dense, TOKENS), rtol=1e-4, atol=1e-5)
    want = jax.device_get(by_hand(params, TOKENS))
    np.testing.assert_allclose(value, np.mean(want**2), rtol=1e-5)
    assert abs(want - plain).max() > 1e-2
    assert all((g != 0).any() for g in jax.tree.leaves(grads))


def test_nnx_linear():
    graph, state = nnx.split(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
    x = normal(2, 4)

    @jax.jit
    def both(state: Any, x: jax.Array) -> Any:
        tree = quantize_activations(quantize_tree(state, "int8"), GRID)
        got = wlab.lift(lambda s, x: nnx.merge(graph, s)(x))(tree, x)
        return got, rounded(x) @ wlab.materialise(tree)["kernel"].get_value()

    np.testing.assert_allclose(*both(state, x), rtol=1e-5, atol=1e-6)


def test_any_grid_of_floats_too():
    x, w = normal(3, 4), normal(4, 2, seed=1)

    @jax.jit
    def both(w: jax.Array, x: jax.Array) -> Any:
        got = wlab.lift(lambda p, x: x @ p)(quantize_activations(w, "fp8_e4m3"), x)
        scale = abs(x).max(axis=-1, keepdims=True) / 448.0
        return got, (GRIDS["fp8_e4m3"].round(x / scale) * scale) @ w

    np.testing.assert_allclose(*both(w, x), rtol=1e-5, atol=1e-6)
