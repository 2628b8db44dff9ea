# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Linear algebra on sharded leaves: equal to the unsharded result, and so typed."""

import contextlib
import functools
import re
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from wlab.core import linalg

# Every spec under Explicit axes, where it is a type; further ones under Auto axes.
SHARDED = [
    ("explicit", jax.P("data", None), "jit"),
    ("explicit", jax.P(None, "model"), "jit"),
    ("explicit", jax.P("data", "model"), "jit"),
    ("explicit", jax.P(None, None), "jit"),
    ("explicit", jax.P(None, ("data", "model")), "jit"),
    ("explicit", jax.P("data", None, None), "jit"),
    ("explicit", jax.P(None, "data", "model"), "jit"),
    ("explicit", jax.P("model", None, "data"), "jit"),
    ("auto", jax.P("data", "model"), "jit"),
    ("auto", jax.P(None, ("data", "model")), "jit"),
    ("auto", jax.P(None, "data", "model"), "jit"),
    ("explicit", jax.P("data", "model"), "eager"),
    ("auto", jax.P("data", "model"), "eager"),
    ("explicit", jax.P("model", None, "data"), "eager"),
]
COLLECTIVES = re.compile(
    r"(all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)[\w-]*\("
)

# Every function, with the input it takes: any matrix, or a definite one.
RECTANGULAR: dict[str, Callable[[jax.Array], Any]] = {
    "svd": linalg.svd,
    "qr": linalg.qr,
    "sort rows": linalg.sort,
    "sort columns": lambda x: linalg.sort(x, axis=-2),
    "top_k": lambda x: linalg.top_k(x, 3),
    "orthogonalize": linalg.orthogonalize,
    "kth_largest": lambda x: linalg.kth_largest(x, x.size // 3),
}
DEFINITE: dict[str, Callable[[jax.Array], Any]] = {
    "cholesky": linalg.cholesky,
    "eigh": linalg.eigh,
    "sqrtm_psd": linalg.sqrtm_psd,
}


def all_functions(x: jax.Array, spd: jax.Array) -> dict[str, Any]:
    results = {name: fn(x) for name, fn in RECTANGULAR.items()}
    return results | {name: fn(spd) for name, fn in DEFINITE.items()}


def rectangular(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)


def definite(*shape: int) -> jax.Array:
    x = np.asarray(rectangular(*shape))
    return jnp.asarray(x @ np.swapaxes(x, -1, -2) + 0.1 * np.eye(shape[-2], dtype="f4"))


def inputs(stacked: bool) -> tuple[jax.Array, jax.Array]:
    stack = (8,) if stacked else ()
    return rectangular(*stack, 16, 8), definite(*stack, 8, 8)


@functools.cache
def on_one_device(stacked: bool) -> dict[str, Any]:
    return jax.device_get(jax.jit(all_functions)(*inputs(stacked)))


def same_sharding(x: jax.Array, y: jax.Array) -> bool:
    return jax.typeof(x).sharding == jax.typeof(y).sharding


@pytest.mark.parametrize(("mesh", "spec", "how"), SHARDED, ids=str, indirect=["mesh"])
def test_sharded_equals_unsharded(
    mesh: jax.sharding.Mesh, spec: jax.P, how: str
) -> None:
    compiled = how == "jit"
    x, spd = inputs(len(spec) == 3)
    fn = jax.jit(all_functions) if compiled else all_functions
    expected = on_one_device(len(spec) == 3)
    sharding = jax.NamedSharding(mesh, spec)
    sharded = jax.device_put(x, sharding)
    sharded_spd = jax.device_put(spd, sharding)

    # Inside the mesh's context when compiled, and without any context when eager.
    with jax.set_mesh(mesh) if compiled else contextlib.nullcontext():
        actual = fn(sharded, sharded_spd)

    chex.assert_trees_all_close(jax.device_get(actual), expected, rtol=1e-5, atol=1e-5)
    for name in ("sort rows", "sort columns", "orthogonalize"):
        assert same_sharding(actual[name], sharded), name
    for y in (actual["cholesky"], actual["sqrtm_psd"], actual["eigh"].v):
        assert same_sharding(y, sharded_spd)


def test_unlike_shapes_keep_the_specs_of_the_axes_that_they_share() -> None:
    mesh = jax.make_mesh((4, 2), ("data", "model"))
    x = jax.device_put(
        rectangular(4, 8, 16), jax.NamedSharding(mesh, jax.P("data", None, "model"))
    )
    u, s, vt = jax.jit(linalg.svd)(x)
    assert jax.typeof(u).sharding.spec == jax.P("data", None, None)
    assert jax.typeof(s).sharding.spec == jax.P("data", None)
    assert jax.typeof(vt).sharding.spec == jax.P("data", None, "model")


@pytest.mark.parametrize("name", ["orthogonalize", "svd", "qr", "sort rows"])
def test_leaves_sharded_on_the_stack_axis_need_no_collective(
    mesh: jax.sharding.Mesh, name: str
) -> None:
    sharding = jax.NamedSharding(mesh, jax.P("data", None, None))
    x = jax.device_put(rectangular(8, 16, 8), sharding)
    text = jax.jit(RECTANGULAR[name]).lower(x).compile().as_text()
    assert not COLLECTIVES.findall(text)


def test_matrices_sharded_within_are_moved_once_each_way() -> None:
    mesh = jax.make_mesh((4, 2), ("data", "model"))
    sharding = jax.NamedSharding(mesh, jax.P(None, "data", "model"))
    x = jax.device_put(rectangular(8, 16, 8), sharding)
    text = jax.jit(linalg.orthogonalize).lower(x).compile().as_text()
    # Two mesh axes, there and back; each device then orthogonalises its own matrix.
    assert COLLECTIVES.findall(text) == ["all-to-all"] * 4
    assert "f32[1,8,16]" in text and "f32[8,8,16]" not in text


def test_no_collective_stands_between_the_iterations(mesh: jax.sharding.Mesh) -> None:
    sharding = jax.NamedSharding(mesh, jax.P("data", "model"))
    x = jax.device_put(rectangular(16, 8), sharding)
    text = jax.jit(linalg.orthogonalize).lower(x).compile().as_text()
    # The matrix is gathered along two mesh axes; the products are then local.
    assert COLLECTIVES.findall(text) == ["all-gather"] * 2


def test_the_step_of_an_optimizer_keeps_the_sharding_of_its_weights(
    mesh: jax.sharding.Mesh,
) -> None:
    sharding = jax.NamedSharding(mesh, jax.P("data", "model"))
    x = jax.device_put(rectangular(16, 8), sharding)
    y = jax.jit(lambda w, g: w - 0.1 * linalg.orthogonalize(g))(x, x)
    assert y.sharding.is_equivalent_to(sharding, 2)


def test_under_vmap_scan_and_grad_on_a_mesh(mesh: jax.sharding.Mesh) -> None:
    x = rectangular(4, 16, 8)
    stacked = jax.device_put(x, jax.NamedSharding(mesh, jax.P("data", None, "model")))
    layers = jax.device_put(x, jax.NamedSharding(mesh, jax.P(None, "data", "model")))

    def scan(xs: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda c, w: (c, linalg.orthogonalize(w)), 0.0, xs)[1]

    def loss(w: jax.Array) -> jax.Array:
        return jnp.sum(linalg.orthogonalize(w) ** 3)

    @jax.jit
    def three(stacked: jax.Array, layers: jax.Array) -> Any:
        mapped = jax.vmap(linalg.orthogonalize)(stacked)
        return mapped, scan(layers), jax.grad(loss)(layers)

    plain, grad = jax.jit(lambda x: (linalg.orthogonalize(x), jax.grad(loss)(x)))(x)
    with jax.set_mesh(mesh):
        found = three(stacked, layers)
    wanted, placed = (plain, plain, grad), (stacked, layers, layers)
    for y, expected, source in zip(found, wanted, placed, strict=True):
        assert same_sharding(y, source)
        np.testing.assert_allclose(
            jax.device_get(y), jax.device_get(expected), rtol=1e-4, atol=1e-5
        )


def test_inside_shard_map_nothing_is_moved(mesh: jax.sharding.Mesh) -> None:
    x = jax.device_put(
        rectangular(16, 8), jax.NamedSharding(mesh, jax.P("data", "model"))
    )
    mapped = jax.shard_map(
        linalg.orthogonalize,
        mesh=mesh,
        in_specs=jax.P("data", "model"),
        out_specs=jax.P("data", "model"),
    )
    y = jax.jit(mapped)(x)
    block = jax.jit(linalg.orthogonalize)(np.asarray(rectangular(16, 8))[:4, :4])
    np.testing.assert_allclose(
        jax.device_get(y)[:4, :4], jax.device_get(block), atol=1e-6
    )


def test_an_unsharded_array_in_the_context_of_a_mesh(mesh: jax.sharding.Mesh) -> None:
    x = rectangular(16, 8)
    expected = linalg.svd(x).s
    with jax.set_mesh(mesh):
        np.testing.assert_allclose(linalg.svd(x).s, expected, rtol=1e-6)
        np.testing.assert_allclose(jax.jit(linalg.svd)(x).s, expected, rtol=1e-6)


def test_further_arguments_may_be_sharded(mesh: jax.sharding.Mesh) -> None:
    @linalg.sharding_safe
    def project(x: jax.Array, basis: jax.Array, *, scale: float) -> jax.Array:
        return scale * basis @ (basis.T @ x)

    x, basis = rectangular(16, 8), linalg.qr(rectangular(16, 8)).q
    put = jax.NamedSharding(mesh, jax.P("data", "model"))
    y = jax.jit(lambda x, b: project(x, b, scale=2.0))(
        jax.device_put(x, put), jax.device_put(basis, put)
    )
    np.testing.assert_allclose(
        jax.device_get(y), project(x, basis, scale=2.0), atol=1e-5
    )


def test_why_there_is_a_helper() -> None:
    """The Gram matrix of a sharded leaf, with which Muon begins, has no type."""
    mesh = jax.make_mesh((4, 2), ("data", "model"))
    x = jax.device_put(
        rectangular(16, 8), jax.NamedSharding(mesh, jax.P("data", "model"))
    )

    def gram(x: jax.Array) -> jax.Array:
        return x @ x.T

    with pytest.raises(Exception, match="shard"):
        jax.jit(gram)(x)
    y = jax.jit(linalg.sharding_safe(gram))(x)
    np.testing.assert_allclose(jax.device_get(y), gram(rectangular(16, 8)), atol=1e-5)


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (3, 5, 4), (2, 1, 4, 4)])
def test_factors_have_their_defining_properties(shape: tuple[int, ...]) -> None:
    x = np.asarray(rectangular(*shape), np.float64)
    k = min(shape[-2:])
    spd = definite(*shape)
    factors = jax.jit(
        lambda x, spd: (
            linalg.svd(x),
            linalg.qr(x),
            linalg.cholesky(spd),
            linalg.eigh(spd),
        )
    )(rectangular(*shape), spd)
    svd, qr, low, eigh = jax.tree.map(lambda f: np.asarray(f, np.float64), factors)
    u, s, vt = svd
    assert u.shape == (*shape[:-1], k) and vt.shape == (*shape[:-2], k, shape[-1])
    np.testing.assert_allclose((u * s[..., None, :]) @ vt, x, atol=1e-5)
    np.testing.assert_allclose(s, np.linalg.svd(x, compute_uv=False), atol=1e-5)
    q, r = qr
    np.testing.assert_allclose(q @ r, x, atol=1e-5)
    np.testing.assert_allclose(
        np.swapaxes(q, -1, -2) @ q,
        np.broadcast_to(np.eye(k), (*shape[:-2], k, k)),
        atol=1e-5,
    )
    np.testing.assert_array_equal(r, np.triu(r))
    np.testing.assert_allclose(low @ np.swapaxes(low, -1, -2), spd, atol=1e-4)
    np.testing.assert_array_equal(low, np.tril(low))
    w, v = eigh
    np.testing.assert_allclose(
        (v * w[..., None, :]) @ np.swapaxes(v, -1, -2), spd, atol=1e-4
    )
    assert (np.diff(w) >= 0).all()


def test_square_root_of_a_singular_matrix() -> None:
    x = rectangular(3, 6, 2)
    low_rank = np.einsum("bij,bkj->bik", x, x)
    sqrtm = jax.jit(linalg.sqrtm_psd)
    root = np.asarray(sqrtm(low_rank), np.float64)
    np.testing.assert_allclose(root @ root, low_rank, atol=1e-5)
    np.testing.assert_allclose(root, np.swapaxes(root, -1, -2), atol=1e-6)
    assert np.linalg.eigvalsh(root).min() > -1e-5
    zero = np.zeros((4, 4), np.float32)
    np.testing.assert_array_equal(sqrtm(zero), zero)


@pytest.mark.parametrize("shape", [(16, 8), (8, 16), (3, 8, 8)])
def test_orthogonalize_moves_singular_values_to_one_and_nothing_else(
    shape: tuple[int, ...],
) -> None:
    x = rectangular(*shape)

    @jax.jit
    def three(x: jax.Array) -> Any:
        turned = linalg.orthogonalize(jnp.swapaxes(x, -1, -2))
        return linalg.orthogonalize(x), turned, linalg.orthogonalize(1e3 * x)

    y, turned, larger = map(np.asarray, three(x))
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    inner = np.einsum("...ij,...ik,...lk->...jl", u, y, vt)
    diagonal = np.diagonal(inner, axis1=-2, axis2=-1)
    rest = inner - diagonal[..., None] * np.eye(s.shape[-1])
    assert np.abs(rest).max() < 1e-4
    large = s > 0.002 * np.linalg.norm(s, axis=-1, keepdims=True)
    assert large.sum() >= s.size - 1
    assert diagonal[large].min() > 0.68 and diagonal[large].max() < 1.21
    np.testing.assert_allclose(turned, np.swapaxes(y, -1, -2), atol=1e-5)
    np.testing.assert_allclose(larger, y, atol=1e-5)


@pytest.mark.parametrize("shape", [(4, 64), (64, 4)])
def test_orthogonalize_works_on_the_smaller_gram_matrix(shape: tuple[int, int]) -> None:
    text = str(jax.make_jaxpr(linalg.orthogonalize)(jnp.ones(shape)))
    assert "f32[4,4]" in text and "f32[64,64]" not in text


def test_orthogonalize_follows_the_polynomial_of_each_step() -> None:
    table = np.array([[3.0, -4.0, 2.0], [2.0, -1.5, 0.5], [1.5, -0.5, 0.0]])
    s = np.array([0.9, 0.4, 0.1])
    expected = s / np.linalg.norm(s)
    for a, b, c in table:
        expected = a * expected + b * expected**3 + c * expected**5
    y = linalg.orthogonalize(jnp.diag(jnp.asarray(s)), 3, jnp.asarray(table))
    np.testing.assert_allclose(y, np.diag(expected), atol=1e-6)
    once = linalg.orthogonalize(jnp.diag(jnp.asarray(s)), 0)
    np.testing.assert_allclose(once, np.diag(s / np.linalg.norm(s)), atol=1e-6)
    with pytest.raises(ValueError, match=r"\(5, 3\).*got \(3, 3\)"):
        linalg.orthogonalize(jnp.eye(3), coefficients=jnp.asarray(table))


def test_orthogonalize_equals_muon_of_optax() -> None:
    import optax

    x = rectangular(12, 8)
    tx = optax.contrib.scale_by_muon(beta=0.0, nesterov=False, eps=1e-7)
    expected, _ = tx.update(x, tx.init(x), x)
    np.testing.assert_allclose(linalg.orthogonalize(x), expected, atol=1e-5)


def test_orthogonalize_of_zero_is_zero() -> None:
    np.testing.assert_array_equal(linalg.orthogonalize(jnp.zeros((4, 6))), 0.0)


def test_the_program_does_not_grow_with_the_shape() -> None:
    def equations(n: int) -> int:
        x = jax.ShapeDtypeStruct((2, n, 2 * n), jnp.float32)
        text = str(jax.make_jaxpr(linalg.orthogonalize)(x))
        return text.count(" = ")

    assert equations(4) == equations(64)


def test_narrow_floats_are_computed_in_float32() -> None:
    x = rectangular(16, 8).astype(jnp.bfloat16)
    wide = x.astype(jnp.float32)
    for fn in (linalg.svd, linalg.qr, linalg.orthogonalize):
        narrow = jax.tree.leaves(fn(x))
        for got, exact in zip(narrow, jax.tree.leaves(fn(wide)), strict=True):
            assert got.dtype == jnp.bfloat16
            # One rounding of the float32 result, not an accumulation of many.
            np.testing.assert_array_equal(
                got.astype(jnp.float32), exact.astype(jnp.bfloat16).astype(jnp.float32)
            )


def test_double_precision_is_kept() -> None:
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(0).normal(size=(6, 4)))
        u, s, vt = linalg.svd(x)
        assert s.dtype == jnp.float64
        np.testing.assert_allclose((u * s[None]) @ vt, x, atol=1e-13)


def test_abstract_inputs() -> None:
    x = jax.ShapeDtypeStruct((3, 8, 4), jnp.bfloat16)
    u, s, vt = jax.eval_shape(linalg.svd, x)
    assert (u.shape, s.shape, vt.shape) == ((3, 8, 4), (3, 4), (3, 4, 4))
    assert jax.eval_shape(linalg.orthogonalize, x).dtype == jnp.bfloat16
    assert jax.eval_shape(lambda x: linalg.kth_largest([x, x], 5), x).shape == ()


def test_what_bad_input_gets() -> None:
    with pytest.raises(TypeError, match=r"svd .* int32 of shape \(2, 2\)"):
        linalg.svd(jnp.ones((2, 2), jnp.int32))
    with pytest.raises(ValueError, match=r"eigh needs axes \(-2, -1\).*shape \(3,\)"):
        linalg.eigh(jnp.ones(3))
    with pytest.raises(ValueError, match=r"shape \(2, 3\)"):
        linalg.sort(jnp.ones((2, 3)), axis=2)
    assert jnp.isnan(linalg.cholesky(-jnp.eye(3))).any()


def test_sort_and_top_k() -> None:
    x = jnp.array([[3, 1, 2], [2, 2, 5]], jnp.int8)
    np.testing.assert_array_equal(linalg.sort(x), np.sort(x))
    np.testing.assert_array_equal(linalg.sort(x, axis=0), np.sort(x, axis=0))
    values, indices = linalg.top_k(x, 2)
    np.testing.assert_array_equal(values, [[3, 2], [5, 2]])
    np.testing.assert_array_equal(indices, [[0, 2], [2, 0]])
    assert values.dtype == jnp.int8 and indices.dtype == jnp.int32


@settings(max_examples=60, deadline=None)
@given(
    x=hnp.arrays(
        np.float32,
        24,
        elements=st.floats(width=32, allow_nan=False)
        | st.sampled_from([0.0, -0.0, 1.0, 1e-45, -1e-45, np.inf, -np.inf]),
    ),
    k=st.integers(1, 24),
)
def test_kth_largest_equals_the_sorted_entry(x: np.ndarray, k: int) -> None:
    tree = {"a": x[:10].reshape(2, 5), "b": (x[10:], None)}
    threshold = np.asarray(linalg.kth_largest(tree, k))
    assert threshold == np.sort(x)[::-1][k - 1]
    # Compared by numpy, which keeps subnormal numbers.
    assert (x >= threshold).sum() >= k


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e4m3fn", "float64"])
def test_kth_largest_in_other_dtypes(dtype: str) -> None:
    with jax.enable_x64(dtype == "float64"):
        x = jnp.asarray(np.random.default_rng(0).normal(size=50)).astype(dtype)
        ordered = np.sort(np.asarray(x, np.float64))[::-1]
        for k in (1, 17, 50):
            threshold = linalg.kth_largest(x, k)
            assert threshold.dtype == x.dtype
            assert np.asarray(threshold, np.float64) == ordered[k - 1]


def test_kth_largest_of_rows_with_a_traced_k_and_nan() -> None:
    x = rectangular(3, 10)
    k = jnp.array([1, 4, 99])
    rows = jax.jit(jax.vmap(linalg.kth_largest))(x, k)
    ordered = jnp.sort(x, axis=1, descending=True)
    np.testing.assert_array_equal(rows, ordered[jnp.arange(3), jnp.array([0, 3, 9])])
    nan = jnp.array([1.0, jnp.nan, -jnp.nan, 3.0])
    assert jnp.isnan(linalg.kth_largest(nan, 2))
    assert linalg.kth_largest(nan, 3) == 3.0


def test_kth_largest_gathers_nothing(mesh: jax.sharding.Mesh) -> None:
    x = jax.device_put(
        rectangular(16, 8), jax.NamedSharding(mesh, jax.P("data", "model"))
    )
    text = jax.jit(linalg.kth_largest).lower(x, 5).compile().as_text()
    assert set(COLLECTIVES.findall(text)) == {"all-reduce"}


def test_kth_largest_refuses_what_has_no_order() -> None:
    with pytest.raises(TypeError, match=r"int32 of shape \(2,\) at 'a/0'"):
        linalg.kth_largest({"a": [jnp.arange(2)]}, 1)
    with pytest.raises(ValueError, match="got 0"):
        linalg.kth_largest({}, 1)
    for k in (0, 4):
        with pytest.raises(ValueError, match=f"from 1 to 3, got {k}"):
            linalg.kth_largest(jnp.ones(3), k)
