# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Structured weights in unmodified models: linen, nnx, plain functions."""

from collections.abc import Callable
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import wlab
from wlab.core import LowRank, MatrixView, Weight, map_with_path

WIDTH = 12


@pytest.fixture
def dense_shapes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the weights that were made dense while a function was traced."""
    seen: list[tuple[int, ...]] = []
    inner = LowRank.materialise

    def recording(self: LowRank) -> jax.Array:
        seen.append(self.shape)
        return inner(self)

    monkeypatch.setattr(LowRank, "materialise", recording)
    return seen


def normal(rng: np.random.Generator, *shape: int, scale: float = 1.0) -> jax.Array:
    return jnp.asarray(scale * rng.normal(size=shape), jnp.float32)


def made(model: nn.Module, *args: Any) -> Any:
    """Variables for a model, of any values."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0), *args)
    return jax.tree.map(lambda x: normal(rng, *x.shape, scale=0.3), shapes)


def low_rank(params: Any, *, rank: int = 2, base: Callable[..., Any] = lambda w: w):
    """The tree with every matrix perturbed by low-rank terms."""
    views = wlab.core.matrix_views(params)

    def one(path: str, w: jax.Array) -> Any:
        view = views[path]
        if view is None:
            return w
        n_in, n_out = len(view.inputs), len(view.outputs)
        stack = w.shape[: w.ndim - n_in - n_out]
        rng = np.random.default_rng(len(path))
        a = normal(rng, *w.shape[: w.ndim - n_out], rank, scale=0.2)
        b = normal(rng, *stack, *w.shape[w.ndim - n_out :], rank)
        return LowRank(base(w), a, b, 0.5)

    return map_with_path(one, params)


def arrays(tree: Any) -> list[np.ndarray]:
    return [np.asarray(x, np.float32) for x in jax.tree.leaves(tree)]


def agrees(apply: Any, tree: Any, *args: Any, tol: float = 2e-5) -> None:
    """The lifted function and its gradient equal those on dense weights."""

    def on_dense(tree: Any) -> jax.Array:
        return apply(wlab.materialise(tree), *args)

    def on_parts(tree: Any) -> jax.Array:
        return wlab.lift(apply)(tree, *args)

    @jax.jit
    def value_and_grad(tree: Any) -> Any:
        def of(fn: Any) -> Any:
            def loss(tree: Any) -> Any:
                value = fn(tree)
                return jnp.mean(jnp.square(value.astype(jnp.float32))), value

            grads, value = jax.grad(loss, has_aux=True)(tree)
            return value, grads

        return of(on_parts), of(on_dense)

    (got, grads), (want, want_grads) = value_and_grad(tree)
    chex.assert_trees_all_close(got, want, rtol=tol, atol=tol)
    for g, h in zip(arrays(grads), arrays(want_grads), strict=True):
        np.testing.assert_allclose(g, h, rtol=20 * tol, atol=tol)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, _: Any = None) -> tuple[jax.Array, None]:
        h = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=3, name="attention")(h)
        h = nn.silu(nn.Dense(2 * WIDTH)(nn.LayerNorm()(x)))
        return x + nn.DenseGeneral(WIDTH)(h), None


class Plain(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return Block()(x)[0]


class Remat(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.remat(Block)()(x)[0]


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        stack = nn.scan(
            nn.remat(Block),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
        )
        return stack()(x, None)[0]


class Tied(nn.Module):
    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        embed = nn.Embed(20, WIDTH)
        return embed.attend(nn.silu(embed(tokens)))


class Images(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nn.Conv(5, (3, 3))(x))
        return nn.Conv(4, (3, 2), strides=2, padding="VALID")(x)


@pytest.fixture
def x() -> jax.Array:
    return normal(np.random.default_rng(0), 2, 4, WIDTH)


@pytest.mark.parametrize("model", [Plain(), Remat(), Scanned()], ids=repr)
def test_linen_blocks_never_form_the_dense_sum(
    model: nn.Module, x: jax.Array, dense_shapes: list
):
    params = low_rank(made(model, x))
    jax.make_jaxpr(jax.grad(lambda p: wlab.lift(model.apply)(p, x).sum()))(params)
    assert not dense_shapes
    agrees(model.apply, params, x)


def test_embedding_lookup_and_attend(dense_shapes: list):
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 20, (3, 5)))
    params = low_rank(made(Tied(), tokens))
    jax.make_jaxpr(wlab.lift(Tied().apply))(params, tokens)
    assert not dense_shapes
    agrees(Tied().apply, params, tokens)


def test_convolutions(dense_shapes: list):
    images = normal(np.random.default_rng(0), 2, 9, 8, 3)
    params = low_rank(made(Images(), images))
    jax.make_jaxpr(wlab.lift(Images().apply))(params, images)
    assert not dense_shapes
    agrees(Images().apply, params, images)


class NnxModel(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(20, WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(3, WIDTH, decode=False, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 7, rngs=rngs)
        self.conv = nnx.Conv(7, 5, (3,), rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return self.conv(nnx.relu(self.up(self.attention(self.embed(tokens)))))


def test_nnx_split_and_module(dense_shapes: list):
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 20, (3, 5)))

    def call(state: Any, tokens: jax.Array) -> jax.Array:
        return nnx.merge(graph, state, rest)(tokens)

    model = nnx.jit(lambda: NnxModel(nnx.Rngs(0)))()
    graph, state, rest = nnx.split(model, nnx.Param, ...)
    params = low_rank(state)
    jax.make_jaxpr(wlab.lift(call))(params, tokens)
    assert not dense_shapes
    agrees(call, params, tokens)

    @jax.jit
    def three_ways(module: Any, tokens: jax.Array) -> Any:
        want = wlab.materialise(module)(tokens)
        called = wlab.lift(lambda m, t: m(t))(module, tokens)
        return want, wlab.lift(module)(tokens), called

    want, *got = three_ways(low_rank(model), tokens)
    for each in got:
        np.testing.assert_allclose(each, want, rtol=1e-4, atol=1e-4)


def test_the_dense_sum_is_not_in_the_program():
    """Inside the jaxpr of value and gradient, no new array has the weight's shape."""
    w, d = 96, 80
    weight = LowRank(jnp.ones((w, d)), jnp.ones((w, 2)), jnp.ones((d, 2)))

    def loss(factors: Any, x: jax.Array) -> jax.Array:
        tree = {"kernel": LowRank(weight.base, *factors)}
        return jnp.sum(wlab.lift(lambda p, x: x @ p["kernel"])(tree, x) ** 2)

    xs = jnp.ones((5, w))
    program = jax.make_jaxpr(jax.value_and_grad(loss))((weight.a, weight.b), xs)
    made = [v.aval.shape for e in _equations(program.jaxpr) for v in e.outvars]
    assert made
    assert (w, d) not in made
    assert (d, w) not in made


def _equations(jaxpr: Any) -> Any:
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _equations(inner)


STACKED = (4, WIDTH, 6)


@pytest.mark.parametrize(
    ("fn", "shape", "structured"),
    [
        (lambda w, x: jnp.einsum("bsd,hdk->bhsk", x, w), STACKED, True),
        (lambda w, x: x[0] @ w[2] + x[1] @ w[-1], STACKED, True),
        (lambda w, x: jax.vmap(lambda w: x @ w)(w), STACKED, True),
        (lambda w, x: x[..., :6] @ w[1].T, STACKED, True),
        (lambda w, x: x @ w.reshape(2, 2, WIDTH, 6)[1, 0], STACKED, True),
        (lambda w, x: x @ w[0][:, 1:5:2], STACKED, True),
        (lambda w, x: x @ jax.lax.dynamic_index_in_dim(w, 1, 0, False), STACKED, True),
        (lambda w, x: (x @ w.astype(jnp.bfloat16)[3]) * 1.0, STACKED, True),
        (
            lambda w, x: jax.lax.scan(lambda c, w: (c, c @ w), x, w)[1],
            STACKED,
            True,
        ),
        (
            lambda w, x: jax.lax.cond(
                x.sum() > 9e9, lambda h: h @ w[0], lambda h: h @ w[1], x
            ),
            STACKED,
            True,
        ),
        (
            lambda w, x: jax.lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h @ w), x),
            (WIDTH, WIDTH),
            True,
        ),
        (
            lambda w, x: jax.checkpoint(lambda w, x: jnp.tanh(x @ w))(w, x),
            (12, 7),
            True,
        ),
        (lambda w, x: jax.jit(jnp.dot)(x, w), (12, 7), True),
        (lambda w, x: w.T @ x[0].T, (12, 7), True),
        (lambda w, x: x * jnp.exp(w).sum(), (12, 7), False),
        (lambda w, x: jax.lax.scan(lambda c, w: (c, w * 2), x, w)[1], (12, 7), False),
    ],
)
def test_plain_functions(
    fn: Any,
    shape: tuple[int, ...],
    structured: bool,
    x: jax.Array,
    dense_shapes: list,
):
    tree = low_rank({"kernel": jnp.full(shape, 0.1)})
    assert isinstance(tree["kernel"], Weight)

    def call(p: Any, x: jax.Array) -> jax.Array:
        return fn(p["kernel"], x)

    jax.make_jaxpr(wlab.lift(call))(tree, x)
    assert bool(dense_shapes) != structured
    agrees(call, tree, x, tol=2e-2 if "bfloat16" in str(fn.__code__.co_names) else 2e-5)


def test_custom_vjp_functions_see_dense_weights(x: jax.Array):
    @jax.custom_vjp
    def product(w: jax.Array, x: jax.Array) -> jax.Array:
        return x @ w

    def forward(w: jax.Array, x: jax.Array) -> Any:
        return product(w, x), (w, x)

    def backward(saved: Any, g: jax.Array) -> Any:
        w, x = saved
        # Doubled, so that the test sees that this rule is the one in use.
        return 2 * jnp.einsum("bsi,bso->io", x, g), g @ w.T

    product.defvjp(forward, backward)
    tree = low_rank({"kernel": jnp.ones((WIDTH, 7))})
    agrees(lambda p, x: product(p["kernel"], x), tree, x)
    agrees(lambda p, x: jax.jit(product)(p["kernel"], x), tree, x)


def test_nested_weights_dispatch_again(x: jax.Array, dense_shapes: list):
    inner = low_rank({"kernel": jnp.ones((WIDTH, 6))})
    outer = low_rank({"kernel": jnp.ones((WIDTH, 6))}, base=lambda w: inner["kernel"])
    jax.make_jaxpr(wlab.lift(lambda p, x: x @ p["kernel"]))(outer, x)
    assert not dense_shapes
    agrees(lambda p, x: x @ p["kernel"], outer, x)


def test_weights_without_base(x: jax.Array):
    rng = np.random.default_rng(1)
    factors = (normal(rng, *s) for s in ((3, WIDTH, 2), (3, 2, 5, 2), (3,)))
    w = LowRank(None, *factors, stack=1)
    assert w.shape == (3, WIDTH, 2, 5)
    assert w.view == MatrixView((-3,), (-2, -1))
    agrees(lambda p, x: jnp.einsum("bsd,ldhk->lbshk", x, p["w"]), {"w": w}, x)


def test_vmap_over_members_shares_the_base(x: jax.Array):
    rng = np.random.default_rng(1)
    base, factors = normal(rng, WIDTH, 6), normal(rng, 5, WIDTH + 6, 1)

    def member(f: jax.Array, x: jax.Array) -> jax.Array:
        tree = {"kernel": LowRank(base, f[:WIDTH], f[WIDTH:])}
        return wlab.lift(lambda p, x: x @ p["kernel"])(tree, x)

    program = jax.make_jaxpr(jax.vmap(member, (0, None)))(factors, x)
    made = [v.aval.shape for e in _equations(program.jaxpr) for v in e.outvars]
    assert (5, WIDTH, 6) not in made
    got = jax.jit(jax.vmap(member, (0, None)))(factors, x)
    f, w = np.asarray(factors), np.asarray(base)
    deltas = np.einsum("nir,nor->nio", f[:, :WIDTH], f[:, WIDTH:])
    want = np.einsum("bsi,nio->nbso", x, w[None] + deltas)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_bfloat16_base_with_float32_factors_rounds_once(x: jax.Array):
    base = jnp.ones((WIDTH, 6), jnp.bfloat16)
    a, b = jnp.full((WIDTH, 1), 1e-3), jnp.full((6, 1), 1.0)
    w = LowRank(base, a, b)
    assert w.dtype == jnp.bfloat16
    assert w.materialise().dtype == jnp.bfloat16
    # 1.001 rounds to 1 in bfloat16, but a sum of many inputs must feel the factor.
    ones = jnp.ones((1, WIDTH), jnp.bfloat16)
    product = lambda p, x: jnp.matmul(x, p, preferred_element_type=jnp.float32)  # noqa: E731
    got = jax.jit(wlab.lift(product))(w, ones)
    np.testing.assert_allclose(got, WIDTH * 1.001, rtol=1e-5)


def test_no_retracing(x: jax.Array):
    tree = low_rank({"kernel": jnp.ones((WIDTH, 6))})

    @jax.jit
    @chex.assert_max_traces(1)
    def call(p: Any, x: jax.Array) -> jax.Array:
        return wlab.lift(lambda p, x: x @ p["kernel"])(p, x)

    call(tree, x)
    call(jax.tree.map(lambda a: a + 1, tree), x)


def test_mesh(mesh: jax.sharding.Mesh):
    """Equal to one device with Auto and with Explicit axes, contractions included."""
    rng = np.random.default_rng(0)
    x = normal(rng, 8, 16)
    up = LowRank(*(normal(rng, *s) for s in ((16, 4, 6), (16, 2), (4, 6, 2))))
    down = LowRank(*(normal(rng, *s) for s in ((4, 6, 16), (4, 6, 2), (16, 2))))

    def fn(p: Any, x: jax.Array, out: Any = None) -> jax.Array:
        h = jax.nn.relu(jnp.einsum("bd,dhk->bhk", x, p["up"]))
        return jnp.einsum("bhk,hkd->bd", h, p["down"], out_sharding=out)

    want = jax.jit(lambda p: fn(wlab.materialise(p), x))({"up": up, "down": down})
    with jax.set_mesh(mesh):
        put = jax.device_put
        tree = {
            "up": LowRank(
                put(up.base, jax.P(None, "model", None)),
                put(up.a, jax.P(None, None)),
                put(up.b, jax.P("model", None, None)),
            ),
            "down": LowRank(
                put(down.base, jax.P("model", None, None)),
                put(down.a, jax.P("model", None, None)),
                put(down.b, jax.P(None, None)),
            ),
        }
        explicit = mesh.are_all_axes_explicit
        out = jax.P("data", None) if explicit else None
        step = jax.jit(wlab.lift(lambda p, x: fn(p, x, out)))
        got = step(tree, put(x, jax.P("data", None)))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-3)


def test_shapes_that_do_not_fit_are_an_error():
    with pytest.raises(ValueError, match=r"base \(3, 2\).*do not fit"):
        LowRank(jnp.ones((3, 2)), jnp.ones((3, 1)), jnp.ones((4, 1)))
    with pytest.raises(ValueError, match="do not fit"):
        LowRank(jnp.ones((3, 2)), jnp.ones((3, 1)), jnp.ones((2, 2)))
    with pytest.raises(ValueError, match="stack=0"):
        LowRank(jnp.ones((5, 3, 2)), jnp.ones((5, 3, 1)), jnp.ones((5, 2, 1)), stack=0)


def test_arithmetic_outside_lift_is_an_error_with_the_remedy():
    w = LowRank(None, jnp.ones((3, 1)), jnp.ones((2, 1)))
    for operation in (lambda: w + 1, lambda: jnp.ones((3, 2)) - w, lambda: -w):
        with pytest.raises(TypeError, match=r"wlab\.lift.*wlab\.materialise"):
            operation()


def test_a_function_divided_by_hand_sees_dense_values():
    mesh = wlab.core.sharding.make_mesh(data=8)
    w = LowRank(jnp.ones((8, 4)), jnp.ones((8, 2)), jnp.ones((4, 2)))
    x = jnp.arange(16.0).reshape(2, 8)

    def fn(w: jax.Array, x: jax.Array) -> jax.Array:
        return jax.shard_map(
            lambda w, x: jax.lax.psum(x @ w, "data"),
            in_specs=(jax.P("data"), jax.P(None, "data")),
            out_specs=jax.P(),
        )(w, x)

    def place(t: jax.Array, *spec: Any) -> jax.Array:
        return jax.device_put(t, jax.NamedSharding(mesh, jax.P(*spec)))

    expected = np.asarray(x) @ np.full((8, 4), 3.0)
    with jax.set_mesh(mesh):
        w = LowRank(place(w.base, "data"), place(w.a, "data"), place(w.b))
        y = jax.jit(wlab.lift(fn))(w, place(x, None, "data"))
    np.testing.assert_allclose(y, expected)
