# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""`Quantized` weights: their rules under lift, in models, on disk and on a mesh."""

import functools
import pathlib
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import wlab
from wlab.core import LowRank, MatrixView, is_weight, leaves_with_paths
from wlab.models.decoder import Decoder, DecoderConfig
from wlab.quant import Quantized, quantize, quantize_tree
from wlab.train import Checkpoints

SHAPE = (4, 6, 2, 5)  # stacked, input, two outputs
ROW = (0, 2, 3)


def normal(*shape: int, seed: int = 0, dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def make() -> dict[str, Quantized]:
    """Every kind of scale, with and without zero points."""
    w = normal(*SHAPE)
    return {
        "row": quantize(w, "fp8_e4m3", axis=ROW),
        "row_zero": quantize(w, "uint4", axis=ROW),
        "tensor": quantize(w, "int8"),
        "tensor_zero": quantize(w, "uint2"),
        "group": quantize(w, "int4", axis=ROW, group=4),  # of 6: a ragged last one
        "group_zero": quantize(w, "uint8", axis=ROW, group=3),
        "last": quantize(w, "int3", axis=0, group=2),  # of 5, along the last axis
    }


@pytest.fixture(scope="module")
def forms() -> tuple[dict[str, Quantized], dict[str, jax.Array]]:
    return jax.jit(lambda: (make(), wlab.materialise(make())))()


@pytest.fixture
def dense_shapes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the weights that were made dense while a function was traced."""
    seen: list[tuple[int, ...]] = []
    inner = Quantized.materialise

    def recording(self: Quantized) -> jax.Array:
        seen.append(self.shape)
        return inner(self)

    monkeypatch.setattr(Quantized, "materialise", recording)
    return seen


ALL = set(jax.eval_shape(make))
UNGROUPED = {"row", "row_zero", "tensor", "tensor_zero"}
INPUT_GROUPS = {"group", "group_zero"}
WHOLE = {"tensor", "tensor_zero"}
IN, OUT = np.array([[0, 5], [2, 2]], np.int32), np.array([7, -2, 1, -9], np.int32)


@pytest.mark.parametrize(
    ("fn", "structured"),
    [
        # transpose
        (lambda w: w.T, ALL),
        (lambda w: w.transpose(2, 0, 3, 1), ALL),
        # reshape: axes that share scales alike, merged and split
        (lambda w: w.reshape(4, 6, 10), ALL - {"last"}),
        (lambda w: w.reshape(24, 2, 5), ALL - {"group"}),
        (lambda w: w.reshape(4, 2, 3, 10), UNGROUPED | {"group_zero"}),
        (lambda w: w.reshape(2, 2, 6, 2, 5), ALL),
        (lambda w: w.reshape(-1), WHOLE),
        # axes of size one
        (lambda w: w[None, :, :, None], ALL),
        (lambda w: jnp.squeeze(w[:1], 0), ALL),
        (lambda w: w[1], ALL),
        (lambda w: w.reshape(1, 4, 6, 1, 2, 5, 1), ALL),
        # windows
        (lambda w: w[1:3, :, :, ::2], ALL - {"last"}),
        (lambda w: w[:, 1:6:2], ALL - INPUT_GROUPS),
        (lambda w: w[..., -1], ALL - {"last"}),
        (lambda w: lax.dynamic_slice(w, (2, 0, 1, 0), (3, 6, 1, 5)), ALL),
        (lambda w: lax.dynamic_index_in_dim(w, 3, 1, False), ALL - INPUT_GROUPS),
        # other dtypes
        (lambda w: w.astype(jnp.bfloat16), ALL),
        (lambda w: w.astype(jnp.float16).astype(jnp.bfloat16), set()),
        (lambda w: w.astype(int), set()),
        # loops
        (lambda w: lax.scan(lambda c, w: (c, w.T), 0, w)[1], ALL),
        (
            lambda w: lax.scan(lambda c, w: (c, w.T), 0, w.swapaxes(0, 1))[1],
            ALL - INPUT_GROUPS,
        ),
        (lambda w: jax.vmap(lambda w: w.T)(w), ALL),
        # no rule: the dense array
        (lambda w: w[::-1] * 2, set()),
    ],
)
def test_structural_rules_are_exact(fn: Any, structured: set[str], forms: Any):
    """Bit for bit what the dense array gives; and structured where it can be."""
    packed, dense = forms

    def call(tree: Any) -> Any:
        return {name: fn(w) for name, w in tree.items()}

    kinds = jax.eval_shape(wlab.lift(call), packed)
    kept = {name for name, w in kinds.items() if isinstance(w, Quantized)}
    assert kept == structured
    got, want = jax.jit(
        lambda p, d: (wlab.materialise(wlab.lift(call)(p)), call(d)),
    )(packed, dense)
    chex.assert_trees_all_equal_shapes_and_dtypes(got, want)
    for name in ALL:
        np.testing.assert_array_equal(got[name], want[name], err_msg=name)


@pytest.mark.parametrize(
    ("fn", "looked_up"),
    [
        (lambda w: jnp.take(w, IN, axis=0, mode="clip"), ALL),
        (lambda w: jnp.take(w, OUT, axis=0), ALL),  # NaN out of bounds
        (lambda w: jnp.take(w, OUT, axis=1, mode="fill"), ALL - INPUT_GROUPS),
        (lambda w: jnp.take(w, OUT, axis=2, mode="clip"), ALL),
        (lambda w: jnp.take(w, IN, axis=1, mode="wrap"), ALL - INPUT_GROUPS),
        (lambda w: jnp.take(w, OUT, axis=-1, mode="fill", fill_value=3.0), set()),
        (lambda w: w[:, IN % 2], ALL - INPUT_GROUPS),
        (lambda w: w[..., IN % 2], ALL - {"last"}),
        (lambda w: w.at[IN % 4].get(mode="promise_in_bounds"), ALL),
        (lambda w: w[IN, 1], set()),  # not whole slices
        (lambda w: w.astype(jnp.bfloat16)[OUT], ALL),
    ],
)
def test_look_up_is_exact(fn: Any, looked_up: set[str], forms: Any, dense_shapes: list):
    """Also out of bounds; only what is looked up is made dense."""
    packed, dense = forms
    for name in ALL:
        dense_shapes.clear()
        jax.eval_shape(wlab.lift(fn), packed[name])
        assert (name in looked_up) == (not dense_shapes), name

    def both(p: Any, d: Any) -> Any:
        return {n: wlab.lift(fn)(w) for n, w in p.items()}, jax.tree.map(fn, d)

    got, want = jax.jit(both)(packed, dense)
    for name in ALL:
        np.testing.assert_array_equal(got[name], want[name], err_msg=name)
        assert got[name].dtype == want[name].dtype


def test_a_scan_has_scales_for_every_index(forms: Any):
    """Also where one scale was shared: every array is cut along axis 0."""
    for name, q in forms[0].items():
        leaves = jax.eval_shape(lambda q: q.scannable(), q)
        assert {x.shape[0] for x in jax.tree.leaves(leaves)} == {SHAPE[0]}, name


def test_a_rounded_value_stays_rounded():
    """bfloat16 weights seen as float32 are those of bfloat16, not of the scales."""
    narrow = wlab.lift(lambda w: w.astype(jnp.bfloat16))

    @jax.jit
    def each(w: jax.Array) -> Any:
        q = quantize(w, "int8", axis=-1)
        seen = [
            wlab.lift(lambda w, d=d: w.astype(d))(q) for d in (jnp.float32, jnp.float16)
        ]
        return seen, narrow(q), q.values(), q.materialise()

    seen, same, values, dense = jax.device_get(each(normal(7, 5, dtype=jnp.bfloat16)))
    for got in seen:
        np.testing.assert_array_equal(got, dense.astype(got.dtype))
    assert isinstance(same, Quantized)
    assert values.dtype == jnp.float32
    assert (values != dense.astype(np.float32)).any()


def test_vmap_over_members(forms: Any):
    """A batch of packed weights, each with scales of its own."""
    x = normal(3, 5)
    w = normal(4, 5, 6)

    @jax.jit
    def both(w: jax.Array) -> Any:
        q = jax.vmap(lambda w: quantize(w, "int4", axis=-1))(w)
        return jax.vmap(wlab.lift(lambda w: x @ w.T.T))(q), x @ q.materialise()

    np.testing.assert_allclose(*both(w), rtol=1e-6)


# --- Models ----------------------------------------------------------------------


class Mixed(nn.Module):
    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        embed = nn.Embed(11, 8)
        x = nn.Conv(8, (3,))(embed(tokens))
        x = x + nn.MultiHeadDotProductAttention(num_heads=2)(nn.LayerNorm()(x))
        return embed.attend(nn.DenseGeneral(8)(nn.silu(nn.Dense(12)(x))))


DECODER = Decoder(
    DecoderConfig(
        **{"vocab": 11, "width": 8, "depth": 3, "heads": 2, "kv_heads": 1},
        **{"head_dim": 4, "hidden": 12, "scan": True, "remat": True},
    )
)


def parameters(model: nn.Module) -> Any:
    tokens = np.zeros((1, 4), np.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: (0.3 * rng.normal(size=x.shape)).astype("f"), shapes)


@pytest.mark.parametrize(
    ("model", "grid", "options"),
    [
        (Mixed(), "fp8_e4m3", {"select": ["*kernel", "*embedding"]}),
        (Mixed(), "uint4", {"select": ["*kernel", "*embedding"], "group": 3}),
        (DECODER, "fp8_e4m3", {"select": ["*kernel", "*embedding"]}),
        (DECODER, "int4", {"granularity": "tensor"}),
    ],
    ids=["mixed-row", "mixed-group", "decoder-row", "decoder-tensor"],
)
def test_flax_models_run_packed(model: nn.Module, grid: str, options: Any):
    params = parameters(model)
    tokens = np.arange(10, dtype=np.int32).reshape(2, 5)

    @jax.jit
    def both(params: Any) -> Any:
        packed = quantize_tree(params, grid, **options)
        assert sum(is_weight(w) for _, w in leaves_with_paths(packed)) >= 7
        dense = wlab.materialise(packed)
        got = wlab.lift(model.apply)(packed, tokens)
        return got, model.apply(dense, tokens), model.apply(params, tokens)

    got, want, unrounded = jax.device_get(both(params))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    assert abs(want - unrounded).max() > 1e-2


def test_an_embedding_table_is_not_made_dense(dense_shapes: list):
    pack = jax.jit(lambda w: quantize(w, "int4", axis=0, view=MatrixView.of(1, 1)))
    table = pack(normal(50, 4))
    tokens = np.array([[3, 49, 0]], np.int32)
    model = nn.Embed(50, 4)
    apply = wlab.lift(lambda t, x: model.apply({"params": {"embedding": t}}, x))
    program = jax.make_jaxpr(apply)(table, tokens)
    assert not dense_shapes
    floats = {
        v.aval.shape
        for eqn in program.jaxpr.eqns
        for v in eqn.outvars
        if jnp.issubdtype(v.aval.dtype, jnp.floating) and v.aval.ndim
    }
    assert (1, 3, 4) in floats and (50, 4) not in floats
    both = jax.jit(lambda t: (apply(t, tokens), t.materialise()[tokens]))
    np.testing.assert_array_equal(*both(table))


def test_low_rank_terms_over_a_packed_base(dense_shapes: list):
    """Fine-tuning over frozen codes: the output, and the gradient of the factors."""
    pack = functools.partial(quantize, axis=(1, 2), view=MatrixView.of(1, 2))
    base = jax.jit(lambda w: pack(w, "int4"))(normal(8, 2, 3))
    factors = (normal(8, 2, seed=1), normal(2, 3, 2, seed=2))
    x = normal(5, 8, seed=3)

    def loss(factors: Any, dense: bool) -> jax.Array:
        w: Any = LowRank(base, *factors, 0.5)
        w = w.materialise() if dense else w
        y = wlab.lift(lambda w, x: jnp.einsum("bi,ihk->bhk", x, w))(w, x)
        return jnp.sum(jnp.tanh(y))

    both = [
        jax.jit(jax.value_and_grad(loss), static_argnums=1)(factors, d) for d in (0, 1)
    ]
    chex.assert_trees_all_close(*both, rtol=1e-5, atol=1e-6)
    assert set(dense_shapes) == {(8, 2, 3)}


# --- As a tree -------------------------------------------------------------------


def test_size_in_bits(forms: Any):
    n, rows = 4 * 6 * 2 * 5, 4 * 2 * 5
    wanted = {
        "row": 8 * n + 32 * rows,
        "row_zero": 4 * n + 2 * 32 * rows,
        "tensor": 8 * n + 32,
        "tensor_zero": 2 * n + 2 * 32,
        "group": 4 * n + 32 * rows * 2,
        "group_zero": 8 * n + 2 * 32 * rows * 2,
        "last": 3 * n + 32 * 4 * 3,  # what the codes carry: they are stored in four
    }
    assert {name: q.size_in_bits for name, q in forms[0].items()} == wanted


def test_codes_refuse_floats_and_nothing_else():
    q = jax.jit(lambda w: quantize(w, "int4", axis=-1))(normal(4, 3))
    for fn in (
        lambda x: 0.5 * x.astype(jnp.float32),
        lambda x: x.astype(jnp.bfloat16),
        lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32),
    ):
        with pytest.raises(TypeError, match=r"\(4, 3\) are bit .*wlab\.materialise"):
            jax.tree.map(fn, q)
    for fn in (
        lambda x: None,
        lambda x: True,
        lambda x: 3,
        lambda x: x.shape,
        lambda x: x - x,
        jnp.zeros_like,
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype),
        lambda x: jax.P(None),
    ):
        out = jax.tree.map(fn, q)
        assert isinstance(out, Quantized)
        assert out.grid == q.grid and out.block == q.block
    assert jax.tree.structure(jax.tree.map(lambda x: x, q)) == jax.tree.structure(q)


def test_arithmetic_is_refused_with_the_remedy():
    q = jax.jit(lambda w: quantize(w, "int4", axis=-1))(normal(4, 3))
    for operation in (lambda: q * 2, lambda: jnp.ones((2, 4)) @ q, lambda: q - q):
        with pytest.raises(TypeError, match=r"wlab\.lift.*wlab\.materialise"):
            operation()


def test_checkpoints_bring_packed_trees_back(forms: Any, tmp_path: pathlib.Path):
    packed, _ = forms
    template = jax.eval_shape(lambda: packed)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, packed)
        _, back, _ = checkpoints.restore(template)
    assert jax.tree.structure(back) == jax.tree.structure(packed)
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(packed), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


# --- On a mesh -------------------------------------------------------------------


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_a_sharded_kernel_is_quantised_as_a_whole_one(
    rounding: Any, mesh: jax.sharding.Mesh, key: jax.Array
):
    """Blocks that cross devices have the scale of the block, and the same noise."""
    w = normal(8, 16)

    @jax.jit
    def pack(w: jax.Array) -> Any:
        options: Any = {"rounding": rounding, "key": key}
        packed = [quantize(w, "int4", axis=axis, **options) for axis in (-1, 0, None)]
        packed += [quantize(w, "int4", axis=-1, group=n, **options) for n in (3, 4)]
        return [(q, q.materialise()) for q in packed]

    whole = pack(w)
    with jax.set_mesh(mesh):
        sharded = pack(jax.device_put(w, jax.P("data", "model")))
    specs = [(None, "model"), ("data", None), (None, None)] + 2 * [(None, "model")]
    for (a, dense), (b, want), spec in zip(sharded, whole, specs, strict=True):
        np.testing.assert_array_equal(a.codes, b.codes)
        np.testing.assert_array_equal(a.scale, b.scale)
        np.testing.assert_array_equal(dense, want)
        if mesh.are_all_axes_explicit:
            for x in (a.codes, dense):
                assert x.sharding.spec == jax.P("data", "model")
            assert a.scale.sharding.spec == jax.P(*spec)
