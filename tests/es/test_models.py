# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Populations of models that know nothing of evolution, and what they cost."""

import re
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import wlab
from wlab import es
from wlab.core import LowRank, is_weight
from wlab.es import _perturbed
from wlab.optim import eco, mup, mup_adamw
from wlab.quant import quantize_tree

N = 6
WIDTH = 12


class Block(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, _: Any = None) -> tuple[jax.Array, None]:
        x = x + nn.MultiHeadDotProductAttention(num_heads=3, name="attention")(
            nn.LayerNorm()(x)
        )
        return x + nn.Dense(WIDTH)(nn.silu(nn.Dense(2 * WIDTH)(x))), None


class Language(nn.Module):
    """Scanned blocks under remat, and an embedding that is the head too."""

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        embed = nn.Embed(20, WIDTH)
        stack = nn.scan(
            nn.remat(Block),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=2,
        )
        return embed.attend(stack()(embed(tokens), None)[0])


class Images(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nn.Conv(5, (3, 3), strides=2)(x))
        return nn.Dense(3)(x.mean((-3, -2)))


def linen(model: nn.Module, x: jax.Array) -> tuple[Any, Any]:
    params = jax.jit(model.init)(jax.random.key(0), x)
    return model.apply, params


class Both(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(20, WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(3, WIDTH, decode=False, rngs=rngs)
        self.out = nnx.Linear(WIDTH, 4, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return self.out(self.attention(self.embed(tokens)))


def nnx_model(_: Any, x: jax.Array) -> tuple[Any, Any]:
    graph, _ = nnx.split(nnx.eval_shape(lambda: Both(nnx.Rngs(0))))
    params = jax.jit(lambda key: nnx.state(Both(nnx.Rngs(key))))(jax.random.key(0))
    return lambda p, tokens: nnx.merge(graph, p)(tokens), params


RNG = np.random.default_rng(3)
TOKENS = RNG.integers(0, 20, (N, 2, 5), np.int32)
PICTURES = RNG.standard_normal((N, 2, 7, 7, 2)).astype(np.float32)
MODELS: dict[str, Any] = {
    "language": (linen, Language(), TOKENS),
    "images": (linen, Images(), PICTURES),
    "nnx": (nnx_model, None, TOKENS),
}


@pytest.mark.parametrize("name", MODELS)
def test_members_are_what_dense_weights_give(
    name: str, monkeypatch: pytest.MonkeyPatch
):
    make, model, x = MODELS[name]
    apply, params = make(model, x[0])
    search = es.eggroll(0.1, 2)
    state = jax.jit(search.init)(jax.random.key(1), params)

    @jax.jit
    def dense(i: jax.Array, x: jax.Array) -> jax.Array:
        return apply(wlab.materialise(search.perturb(state, params, i)), x)

    want = np.stack([dense(np.int32(i), x[i]) for i in range(N)])
    # From here on, a weight that is made dense is an error.
    for kind in (_perturbed.Perturbed, LowRank):
        monkeypatch.setattr(kind, "materialise", None)

    @jax.jit
    def runs() -> Any:
        def one(i: jax.Array, x: jax.Array) -> jax.Array:
            return wlab.lift(apply)(search.perturb(state, params, i), x)

        return (
            jax.vmap(one)(jnp.arange(N), x),
            es.evaluate(search, apply, state, params, N, x),
            # Drawn as it is needed, and drawn before: in parts of the population.
            *(
                es.evaluate(search, apply, state, params, N, x, chunk=2, noise=noise)
                for noise in (None, es.draw_pairs(search, state, params, N))
                if name == "images"
            ),
        )

    for got in runs():
        np.testing.assert_allclose(got, want, atol=2e-5)


def test_no_member_has_weights_of_its_own():
    """No buffer of members x inputs x outputs stands in the compiled program."""
    n, d = 8, 48
    model = nn.Sequential([nn.Dense(d, use_bias=False), nn.relu, nn.Dense(d + 16)])
    x = jnp.ones((n, 3, d))
    params = jax.jit(model.init)(jax.random.key(0), x)

    def largest(search: Any) -> int:
        state = search.init(0, params)

        def step(state: Any, params: Any, x: Any) -> Any:
            out = es.evaluate(search, model.apply, state, params, n, x)
            return search.update(state, params, out.mean((1, 2)))

        text = jax.jit(step).lower(state, params, x).compile().as_text()
        shapes = re.findall(r"f32\[([\d,]+)\]", text)
        return max(int(np.prod([int(i) for i in s.split(",")])) for s in shapes)

    # The largest is a weight itself, or its gradient.
    assert largest(es.eggroll(0.1)) == d * (d + 16)
    assert largest(es.open_es(0.1)) >= n // 2 * d * (d + 16)


def test_the_base_is_multiplied_once_for_all():
    n, d = 8, 16
    params = {"w": jnp.ones((d, d))}
    search = es.eggroll(0.1)
    state = search.init(0, params)

    def run(params: Any, x: Any) -> Any:
        return es.evaluate(search, lambda t, x: x @ t["w"], state, params, n, x)

    text = str(jax.make_jaxpr(run)(params, jnp.ones((n, 3, d))))
    assert re.search(rf"f32\[{n // 2},2,3,{d}\] = dot_general", text)


@pytest.mark.parametrize("grid", ["int4", "fp8_e4m3"])
def test_over_a_packed_base(grid: str):
    """The base stays packed, and ECO moves its codes along the pseudo-gradient."""
    apply, params = linen(Images(), PICTURES[0])
    packed = quantize_tree(params, grid)
    search = es.eggroll(0.1)
    tx = optax.chain(es.scale_by_strategy(search), eco(0.3, grid=grid))
    opt_state = tx.init(packed)

    @jax.jit
    def step(packed: Any, opt_state: Any) -> Any:
        state = es.evolution_state(opt_state)
        out = es.evaluate(search, apply, state, packed, N, PICTURES)
        fitness = -jnp.square(out).mean((1, 2))
        updates, opt_state = tx.update(None, opt_state, packed, fitness=fitness)
        return optax.apply_updates(packed, updates), opt_state, out

    moved, _, out = step(packed, opt_state)
    state = es.evolution_state(opt_state)
    tree = wlab.materialise(search.perturb(state, packed, 3))
    np.testing.assert_allclose(out[3], apply(tree, PICTURES[3]), atol=1e-4)
    chex.assert_trees_all_equal_shapes_and_dtypes(moved, packed)
    codes = [
        x.codes for x in jax.tree.leaves(packed, is_leaf=is_weight) if is_weight(x)
    ]
    new = [x.codes for x in jax.tree.leaves(moved, is_leaf=is_weight) if is_weight(x)]
    assert codes and any(np.any(a != b) for a, b in zip(codes, new, strict=True))


def test_with_the_rates_of_mup():
    """A pseudo-gradient is a gradient: widths scale its steps."""

    def params(width: int) -> Any:
        return {"up": {"kernel": jnp.ones((width, width))}, "bias": jnp.ones(width)}

    classes = mup.classify(params(8), params(4))
    search = es.eggroll(0.1)
    steps = {}
    for name, tx in (("mup", mup_adamw(0.1, 0.0, classes)), ("adamw", optax.adam(0.1))):
        chain = optax.chain(es.scale_by_strategy(search), tx)
        state = chain.init(params(8))
        steps[name], _ = chain.update(None, state, params(8), fitness=jnp.arange(4.0))
    np.testing.assert_allclose(
        steps["mup"]["up"]["kernel"], steps["adamw"]["up"]["kernel"] / 2, rtol=1e-4
    )
    np.testing.assert_allclose(steps["mup"]["bias"], steps["adamw"]["bias"], rtol=1e-4)


def test_what_is_packed_may_stay():
    apply, params = linen(Images(), PICTURES[0])
    packed = quantize_tree(params, "int8")
    search = es.eggroll(0.1, select="*bias")
    biases = wlab.core.select(packed, "*bias")
    tx = optax.chain(es.scale_by_strategy(search), optax.masked(optax.sgd(0.1), biases))

    @jax.jit
    def step(packed: Any, opt_state: Any) -> Any:
        state = es.evolution_state(opt_state)
        out = es.evaluate(search, apply, state, packed, N, PICTURES)
        fitness = out.mean((1, 2))
        updates, _ = tx.update(None, opt_state, packed, fitness=fitness)
        return optax.apply_updates(packed, updates)

    moved = step(packed, tx.init(packed))
    for path, leaf in wlab.core.leaves_with_paths(moved):
        before = dict(wlab.core.leaves_with_paths(packed))[path]
        same = jax.tree.map(lambda a, b: bool((a == b).all()), leaf, before)
        assert all(jax.tree.leaves(same)) is not path.endswith("bias")


def test_adapters_alone():
    """A search over low-rank adapters of a frozen, packed base."""
    apply, params = linen(Images(), PICTURES[0])
    base = quantize_tree(params, "int4")
    kernel = params["params"]["Dense_0"]["kernel"]
    adapter = {"a": jnp.zeros((kernel.shape[0], 2)), "b": jnp.ones((3, 2))}

    def model(adapter: Any, x: jax.Array) -> jax.Array:
        tree = jax.tree.map(lambda w: w, base, is_leaf=is_weight)
        old = tree["params"]["Dense_0"]["kernel"]
        tree["params"]["Dense_0"]["kernel"] = LowRank(old, adapter["a"], adapter["b"])
        return wlab.lift(apply)(tree, x)

    search = es.eggroll(0.1)
    state = search.init(0, adapter)
    got = jax.jit(lambda: es.evaluate(search, model, state, adapter, N, PICTURES))()
    tree = wlab.materialise(search.perturb(state, adapter, 4))
    np.testing.assert_allclose(got[4], model(tree, PICTURES[4]), atol=1e-5)
    assert np.std(got[:, 0, 0]) > 0


def test_arguments_of_a_population():
    params = {"w": jnp.ones((3, 2))}
    search = es.eggroll(0.1)
    state = search.init(0, params)

    def fn(tree: Any, x: Any, scale: Any) -> Any:
        return {"sum": (x["x"] @ tree["w"]).sum() * scale, "w": tree["w"][0]}

    x = {"x": jnp.ones((4, 3))}
    out = es.evaluate(search, fn, state, params, 4, x, 2.0, in_axes=(0, None))
    assert out["sum"].shape == (4,) and out["w"].shape == (4, 2)
    some = es.evaluate(
        search, fn, state, params, jnp.array([1]), {"x": x["x"][2:]}, 2.0,
        in_axes=(0, None),
    )  # fmt: skip
    np.testing.assert_allclose(some["sum"], out["sum"][2:], rtol=1e-6)
    run = lambda n, *a, **k: es.evaluate(search, fn, state, params, n, *a, **k)  # noqa: E731
    with pytest.raises(ValueError, match="population=3: members come in antithetic"):
        run(3, x, 2.0, in_axes=None)
    with pytest.raises(ValueError, match=r"shape \(\) has no axis of 4 members"):
        run(4, x, 2.0)
    with pytest.raises(ValueError, match=r"in_axes=.* for 2 arguments"):
        run(4, x, 2.0, in_axes=(0,))
    with pytest.raises(ValueError, match="chunk=3 does not divide the 4 members"):
        run(4, x, 2.0, in_axes=(0, None), chunk=3)
