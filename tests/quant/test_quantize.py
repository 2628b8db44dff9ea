# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Quantisation of arrays and of trees, and what bad input gets."""

import functools
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import wlab
from wlab.core import MatrixView, leaves_with_paths
from wlab.models.decoder import Decoder, DecoderConfig
from wlab.quant import (
    GRIDS,
    Quantized,
    check_finite,
    fake_quantize,
    fake_quantize_tree,
    matrix_block,
    quantize,
    quantize_tree,
)

CONFIG = DecoderConfig(
    vocab=11, width=8, depth=3, heads=2, kv_heads=1, head_dim=4, hidden=12, scan=True
)


def normal(*shape: int, seed: int = 0, dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


@jax.jit
def dense(q: Any) -> jax.Array:
    return wlab.materialise(q)


round_to = jax.jit(lambda name, x: GRIDS[name].round(x), static_argnums=0)


def oracle(w: Any, grid: str, axis: Any, group: int | None = None) -> np.ndarray:
    """The dense value, block by block in a loop, in float32."""
    w = np.asarray(w, np.float32)
    axes = () if axis is None else np.atleast_1d(axis) % w.ndim
    last = max(i for i in range(w.ndim) if i not in axes)
    scaled, scale = np.zeros_like(w), np.zeros_like(w)
    for index in np.ndindex(*(w.shape[i] for i in axes)):
        for start in range(0, w.shape[last], group or w.shape[last]):
            where: list[Any] = [slice(None)] * w.ndim
            where[last] = slice(start, start + (group or w.shape[last]))
            for i, at in zip(axes, index, strict=True):
                where[i] = at
            block = w[tuple(where)]
            scale[tuple(where)] = abs(block).max() / np.float32(GRIDS[grid].largest)
            scaled[tuple(where)] = block / scale[tuple(where)]
    return np.asarray(round_to(grid, scaled)) * scale


@pytest.mark.parametrize(
    ("grid", "shape", "axis", "group", "scales"),
    [
        ("int4", (5, 7), -1, None, (1, 7)),
        ("fp8_e4m3", (5, 7), 0, None, (5, 1)),
        ("int8", (5, 7), None, None, (1, 1)),
        ("int4", (7, 3), -1, 3, (3, 3)),  # the last group has one row
        ("fp4_e2m1", (5, 7), None, 4, (1, 2)),
        ("fp8_e5m2", (3, 5, 2, 3), (0, 2, 3), None, (3, 1, 2, 3)),
        ("int3", (2, 7, 3), (0, -1), 2, (2, 4, 3)),
        ("int4", (5, 3), -1, 100, (1, 3)),
        ("int4", (9,), None, 4, (3,)),
    ],
)
def test_blocks(grid: str, shape: Any, axis: Any, group: int | None, scales: Any):
    w = normal(*shape)

    @jax.jit
    def both(w: jax.Array) -> Any:
        q = quantize(w, grid, axis=axis, group=group)
        return q, q.materialise()

    q, got = both(w)
    assert q.scale.shape == scales and q.scale.dtype == jnp.float32
    assert q.shape == shape and q.codes.dtype == GRIDS[grid].storage
    assert q.zero is None
    want = oracle(w, grid, axis, group)
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_known_numbers():
    w = np.array([[127.0, -12.7], [-64.5, 6.35]], np.float32)

    @jax.jit
    def both(w: jax.Array) -> Any:
        q = quantize(w, "int8", axis=-1)
        return q.scale, GRIDS["int8"].decode(q.codes)

    scale, codes = both(w)
    np.testing.assert_allclose(scale, [[1.0, 0.1]], rtol=1e-6)
    np.testing.assert_array_equal(codes, [[127, -127], [-64, 64]])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("grid", ["fp8_e4m3", "fp8_e5m2", "fp4_e2m1", "int8", "int3"])
def test_error_is_half_a_step_and_codes_come_back(grid: str, dtype: Any):
    w = normal(33, 5, dtype=dtype)

    @jax.jit
    def pack(w: jax.Array) -> Any:
        q = quantize(w, grid, axis=-1)
        return q, q.codes.astype(jnp.int32), q.materialise(), q.values()

    q, codes, got, values = pack(w)
    assert q.dtype == got.dtype == dtype
    # Float32 arithmetic, whatever the dtype of the weight.
    x = w.astype(np.float32)
    wide, same, *_ = pack(x)
    np.testing.assert_array_equal(codes, same)
    np.testing.assert_array_equal(q.scale, wide.scale)
    z = x / np.asarray(q.scale)
    if GRIDS[grid].kind == "int":
        step = np.ones_like(z)
    else:
        low = GRIDS[grid].exponent
        step = 2.0 ** (np.floor(np.log2(abs(z).clip(2.0**low))) - GRIDS[grid].mantissa)
    error = abs(np.asarray(values) - x)
    assert (error <= np.asarray(q.scale) * step / 2 * (1 + 1e-5)).all()
    again, same, *_ = pack(got)
    np.testing.assert_array_equal(same, codes)
    np.testing.assert_allclose(
        again.scale, q.scale, rtol=1e-6 if dtype == jnp.float32 else 2.0**-8
    )


@pytest.mark.parametrize("grid", ["uint2", "uint4", "uint8"])
def test_unsigned_grids_have_a_zero_point(grid: str):
    """Zero is a value, both ends are, and all lies within half a step."""
    w = np.asarray(normal(20, 4)).copy()
    w[:, 0] += 9.0  # all above zero
    w[:, 1] -= 9.0
    w[0] = 0.0
    q = jax.jit(lambda w: quantize(w, grid, axis=-1))(w)
    scale, zero, got = map(np.asarray, (q.scale, q.zero, dense(q)))
    assert zero.shape == (1, 4)
    np.testing.assert_array_equal(zero, np.round(zero))
    assert (abs(got - w) <= 0.5001 * scale).all() and (got[0] == 0).all()
    span = w.max(axis=0, keepdims=True) - w.min(axis=0, keepdims=True)
    np.testing.assert_allclose(scale, span / GRIDS[grid].largest, rtol=1e-6)


def test_float64_stays_float64():
    with jax.enable_x64(True):
        w = normal(6, 3, dtype=np.float64)
        q = jax.jit(lambda w: quantize(w, "int8", axis=-1))(w)
        assert q.scale.dtype == dense(q).dtype == jnp.float64
        largest = abs(w).max(axis=0, keepdims=True)
        np.testing.assert_allclose(q.scale, largest / 127, rtol=1e-15)


@pytest.mark.parametrize("grid", ["int4", "uint4", "fp8_e4m3", "fp8_e5m2"])
def test_zeros_nan_and_infinity_keep_to_their_block(grid: str):
    @functools.partial(jax.jit, static_argnums=1)
    def rounded(w: jax.Array, group: int | None = None) -> Any:
        q = quantize(w, grid, axis=-1, group=group)
        return q.materialise(), q.scale

    w = np.asarray(normal(6, 5))
    clean, _ = rounded(w)
    bad = w.copy()
    bad[:, 1] = 0.0
    bad[2, 2], bad[3, 3], bad[0, 4] = np.nan, np.inf, -np.inf
    got, scale = rounded(bad)
    assert np.asarray(scale)[0, 1] == 1 and (np.asarray(got)[:, 1] == 0).all()
    assert np.isnan(got)[:, 2:].all()
    np.testing.assert_array_equal(np.asarray(got)[:, 0], np.asarray(clean)[:, 0])
    # In groups only the group that holds it.
    got, _ = rounded(bad, 2)
    want = np.repeat(~np.isfinite(bad).reshape(3, 2, 5).all(axis=1), 2, axis=0)
    np.testing.assert_array_equal(np.isnan(got), want)


def test_extremes_of_float32():
    """A scale that would underflow is 1; large numbers stay finite."""
    w = np.array([[1e-42, 3e38]] * 3, np.float32)
    half = np.full((3, 2), 65504.0, np.float16)

    @jax.jit
    def both(w: jax.Array, half: jax.Array) -> Any:
        q = quantize(w, "fp8_e4m3", axis=-1)
        return q.materialise(), q.scale, quantize(half, "int4").materialise()

    got, scale, same = jax.device_get(both(w, half))
    np.testing.assert_allclose(got, [[0, 3e38]] * 3, rtol=1e-6)
    assert scale[0, 0] == 1
    np.testing.assert_array_equal(same, half)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
def test_no_elements(shape: tuple[int, int]):
    @jax.jit
    def there_and_back(w: jax.Array) -> Any:
        made = [quantize(w, "int8", axis=-1, group=group) for group in (None, 2)]
        return [q.materialise() for q in made]

    assert {w.shape for w in there_and_back(np.zeros(shape, np.float32))} == {shape}


def test_stochastic_rounding_has_the_mean_of_the_weight(key: jax.Array):
    w = normal(5, 3)
    keys = jax.random.split(key, 2000)

    def draw(key: jax.Array) -> jax.Array:
        q = quantize(w, "int4", axis=-1, rounding="stochastic", key=key)
        return q.materialise()

    draws = np.asarray(jax.jit(jax.vmap(draw))(keys))
    scale = np.asarray(jax.jit(lambda w: quantize(w, "int4", axis=-1).scale)(w))
    error = scale / 2 / np.sqrt(len(keys))  # at most: halfway
    assert (abs(draws.mean(axis=0) - w) <= 4 * error).all()
    assert (abs(draws - w[None]) < scale[None] * (1 + 1e-5)).all()
    assert (draws.std(axis=0) > 0).sum() >= 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid": "int5e"}, "no grid is named 'int5e'; near: int5"),
        ({"axis": 2}, r"axis 2 does not exist in shape \(4, 3\); axes run from -2 to"),
        ({"axis": (0, -3)}, "axis -3 does not exist"),
        ({"group": 1}, "group=1 must be at least 2"),
        ({"axis": (0, 1), "group": 2}, r"leaves no axis of \(4, 3\) to group"),
        ({"rounding": "up"}, "'up' is neither 'nearest' nor 'stochastic'"),
        ({"rounding": "stochastic"}, r"needs key=jax\.random\.key"),
    ],
)
def test_bad_arguments(options: Any, message: str):
    with pytest.raises(ValueError, match=message):
        quantize(normal(4, 3), **{"grid": "int4", **options})


def test_only_float_arrays_are_quantised():
    with pytest.raises(TypeError, match=r"dtype int32 and shape \(4, 3\)"):
        quantize(jnp.ones((4, 3), int), "int4")
    with pytest.raises(TypeError, match=r"is a Quantized.*wlab\.materialise"):
        jax.eval_shape(lambda w: quantize(quantize(w, "int4"), "int4"), normal(4, 3))


def test_vmap_and_stacks():
    w = normal(3, 5, 4)
    pack = functools.partial(quantize, grid="int8")
    stacked = jax.jit(jax.vmap(lambda w: pack(w, axis=-1)))(w)
    whole = jax.jit(lambda w: pack(w, axis=(0, -1)))(w)
    chex.assert_trees_all_equal(
        (stacked.codes, stacked.scale), (whole.codes, whole.scale)
    )
    assert stacked.block != whole.block  # blocks count from the right
    np.testing.assert_array_equal(dense(stacked), dense(whole))
    single = jax.jit(jax.vmap(pack))(w)
    assert single.scale.shape == (3, 1, 1)
    want = dense(jax.jit(pack)(w[1]))
    np.testing.assert_array_equal(np.asarray(dense(single))[1], want)


# --- Straight through ------------------------------------------------------------


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_fake_quantize_has_the_gradient_of_the_identity(rounding: Any, key: jax.Array):
    w = normal(6, 4)
    cotangent = normal(6, 4, seed=1)
    options = {"axis": -1, "rounding": rounding, "key": key}

    @jax.jit
    def both(w: jax.Array, cotangent: jax.Array) -> Any:
        got, vjp = jax.vjp(lambda w: fake_quantize(w, "int4", **options), w)
        return got, vjp(cotangent)[0], quantize(w, "int4", **options).materialise()

    got, gradient, want = both(w, cotangent)
    np.testing.assert_array_equal(got, want)
    # Everywhere, also at the largest magnitudes, which lie on the bounds of the grid.
    np.testing.assert_array_equal(gradient, cotangent)
    round_rows = functools.partial(fake_quantize, grid="int4", axis=-1)
    assert jax.eval_shape(round_rows, w.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_fake_quantize_tree(key: jax.Array):
    params = {"up": {"kernel": normal(4, 3), "bias": normal(3)}}
    options: Any = {"granularity": "tensor", "rounding": "stochastic", "key": key}

    @jax.jit
    def everything(params: Any) -> Any:
        got = fake_quantize_tree(params, "int4", **options)
        want = wlab.materialise(quantize_tree(params, "int4", **options))
        grads = jax.grad(
            lambda p: sum(
                (2 * x).sum() for x in jax.tree.leaves(fake_quantize_tree(p, "int4"))
            )
        )(params)
        return got, want, grads

    got, want, grads = jax.device_get(everything(params))
    chex.assert_trees_all_equal(got, want)
    assert (got["up"]["kernel"] != params["up"]["kernel"]).any()
    chex.assert_trees_all_equal(grads, jax.tree.map(lambda w: w * 0 + 2, params))


# --- Trees -----------------------------------------------------------------------


def scales(tree: Any) -> dict[str, tuple[int, ...]]:
    return {
        path: leaf.scale.shape
        for path, leaf in leaves_with_paths(tree)
        if isinstance(leaf, Quantized)
    }


def abstract_decoder() -> Any:
    tokens = jnp.zeros((1, 4), jnp.int32)
    return jax.eval_shape(Decoder(CONFIG).init, jax.random.key(0), tokens)


def pack(tree: Any, grid: str, **options: Any) -> Any:
    return jax.eval_shape(lambda t: quantize_tree(t, grid, **options), tree)


def test_the_decoder_has_a_scale_for_each_output_of_each_layer():
    params = abstract_decoder()
    packed = pack(params, "fp8_e4m3")
    assert scales(packed) == {
        "blocks/attention/query/kernel": (3, 1, 2, 4),
        "blocks/attention/key/kernel": (3, 1, 1, 4),
        "blocks/attention/value/kernel": (3, 1, 1, 4),
        "blocks/attention/out/kernel": (3, 1, 1, 8),
        "blocks/mlp/gate/kernel": (3, 1, 12),
        "blocks/mlp/up/kernel": (3, 1, 12),
        "blocks/mlp/down/kernel": (3, 1, 8),
    }
    views = wlab.core.matrix_views(params)
    for path, leaf in leaves_with_paths(packed):
        if isinstance(leaf, Quantized):
            assert leaf.view == views[path]
    assert packed["params"]["embed"] == params["params"]["embed"]
    one = pack(params, "int4", granularity="tensor")
    assert set(scales(one).values()) == {(3, 1, 1, 1), (3, 1, 1)}
    grouped = scales(pack(params, "int4", group=3))
    assert grouped["blocks/mlp/up/kernel"] == (3, 3, 12)
    assert grouped["blocks/attention/out/kernel"] == (3, 1, 2, 8)


def test_init_and_quantise_without_values():
    """As for parameters too large to hold twice: one function, evaluated in shapes."""
    model = nn.Dense(3)

    def init(key: jax.Array) -> Any:
        return quantize_tree(model.init(key, jnp.ones((1, 4))), "int4")

    shapes = jax.eval_shape(init, jax.random.key(0))
    real = jax.jit(init)(jax.random.key(0))
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes, real)
    assert shapes["params"]["kernel"].size_in_bits == 4 * 12 + 32 * 3


def test_constants_inside_jit_are_checked_too():
    params = {"kernel": normal(4, 3)}
    got = jax.jit(lambda: quantize_tree(params, "int4"))()
    want = jax.jit(functools.partial(quantize_tree, grid="int4"))(params)
    chex.assert_trees_all_equal(got, want)
    params["kernel"] *= np.float32("nan")
    with pytest.raises(ValueError, match=r"'kernel' .* 12 NaN"):
        jax.eval_shape(lambda: quantize_tree(params, "int4"))


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.conv = nnx.Conv(8, 5, (3, 2), rngs=rngs)


def test_nnx_state():
    state = nnx.state(nnx.eval_shape(lambda: Net(nnx.Rngs(0))), nnx.Param)
    packed = pack(state, "int8")
    assert isinstance(packed, nnx.State)
    assert scales(packed) == {
        "attention/query/kernel": (1, 2, 4),
        "attention/key/kernel": (1, 2, 4),
        "attention/value/kernel": (1, 2, 4),
        "attention/out/kernel": (1, 1, 8),
        "conv/kernel": (1, 1, 1, 5),
    }
    dense = jax.eval_shape(wlab.materialise, packed)
    chex.assert_trees_all_equal_shapes_and_dtypes(dense, state)
    fake = jax.eval_shape(lambda t: fake_quantize_tree(t, "int8"), state)
    chex.assert_trees_all_equal_shapes_and_dtypes(fake, state)


def test_selection_and_views():
    params = {
        "head": {"kernel": normal(4, 3)},
        "embed": {"embedding": normal(5, 4)},
        "odd": normal(2, 3, 4),
    }
    assert set(scales(pack(params, "int8"))) == {"odd"}
    chosen = pack(params, "int8", select=["head*", "embed*"])
    assert scales(chosen) == {"head/kernel": (1, 3), "embed/embedding": (1, 4)}
    turned = pack(params, "int8", views={"odd": MatrixView((0,), (1, 2))})
    assert scales(turned)["odd"] == (1, 3, 4)


@pytest.mark.parametrize(
    ("tree", "options", "error", "message"),
    [
        ({}, {}, ValueError, "empty tree"),
        ({"a": None}, {}, ValueError, "empty tree"),
        ({"bias": jnp.ones(3)}, {}, ValueError, "no leaf looks like the kernel"),
        ({"w": jnp.ones((2, 2))}, {"select": "k*"}, ValueError, "'k\\*' matches no"),
        ({"w": jnp.ones((2, 2))}, {"views": {"k": None}}, ValueError, "matches no"),
        (
            {"up": {"bias": jnp.ones(3)}},
            {"select": "*"},
            ValueError,
            r"'up/bias' of shape \(3,\) is no matrix .role bias.; .*views=",
        ),
        (
            {"up": {"kernel": jnp.ones((2, 2), int)}},
            {},
            TypeError,
            r"'up/kernel' of shape \(2, 2\) has dtype int32: only floats",
        ),
        (
            {"up": {"kernel": jnp.ones((2, 2)).at[0].set(jnp.inf)}},
            {},
            ValueError,
            r"'up/kernel' of shape \(2, 2\) holds 2 NaN or infinite",
        ),
        (
            {"w": jnp.ones((2, 2))},
            {"granularity": "column"},
            ValueError,
            "granularity 'column' is neither 'row' nor 'tensor'",
        ),
        ({"w": jnp.ones((2, 2))}, {"rounding": "stochastic"}, ValueError, "needs key"),
        ({"w": jnp.ones((2, 2))}, {"group": 0}, ValueError, "group=0 must be"),
        (
            {"up": {"kernel": quantize(jnp.ones((2, 2)), "int4")}},
            {},
            TypeError,
            r"'up/kernel' of shape \(2, 2\) is a Quantized.*wlab\.materialise",
        ),
    ],
)
def test_trees_that_cannot_be_quantised(
    tree: Any, options: Any, error: Any, message: str
):
    with pytest.raises(error, match=message):
        quantize_tree(tree, "int4", **options)
    with pytest.raises(error, match=message):
        fake_quantize_tree(tree, "int4", **options)


def test_check_finite_and_matrix_block():
    check_finite("w", normal(3, 2))
    check_finite("w", np.zeros((0, 2)))
    with pytest.raises(ValueError, match=r"'w' of shape \(2,\) holds 1 NaN"):
        check_finite("w", np.array([1.0, np.nan]))
    assert matrix_block(MatrixView.of(2, 1), 4, "row") == (1, 0, 0, 1)
    assert matrix_block(MatrixView.of(2, 1), 4, "tensor") == (1, 0, 0, 0)
    assert matrix_block(MatrixView.of(2, 1), 4, "row", 8) == (1, 0, 8, 1)


def test_the_model_sees_the_dense_values(key: jax.Array):
    model = nn.Dense(3)
    x = normal(2, 4)

    @jax.jit
    def both(key: jax.Array) -> Any:
        packed = quantize_tree(model.init(key, x), "fp8_e4m3")
        got = wlab.lift(model.apply)(packed, x)
        return got, model.apply(wlab.materialise(packed), x)

    np.testing.assert_array_equal(*both(key))
