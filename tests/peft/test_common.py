# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""What every adapter keeps to. A new method enters by one line."""

import functools
from typing import Any, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import wlab
from wlab import peft, quant
from wlab.core import Reparam, sharding

WIDTH, HEADS, EACH, HIDDEN = 12, 2, 6, 20


class Case(NamedTuple):
    method: Reparam
    count: int  # trained numbers on PARAMS
    identity: float = 0.0  # how far from the base it starts; inf: it does not
    lazy: bool = True  # whether no array of the base's size is made
    additive: bool = True  # whether the change is the same on any base


def sides(*shape: int) -> int:
    return sum(shape)


# Of up (12, 20), down (20, 12), q (12, 2, 6) and out (2, 6, 12).
SIDES = 2 * (12 + 20) + 2 * (12 + 12)
OUTS = 20 + 12 + 12 + 12
CASES = {
    "lora": Case(peft.lora(3), 3 * SIDES),
    "rslora": Case(peft.lora(3, alpha=6, rank_stabilized=True), 3 * SIDES),
    "dora": Case(peft.lora(3, dora=True), 3 * SIDES + OUTS, 1e-6, additive=False),
    "pissa": Case(peft.lora(3, start="pissa"), 3 * SIDES, 1e-6),
    "bone": Case(peft.bone(5), 5 * OUTS),
    "mini": Case(peft.bone(4, variant="mini", mini_rank=2), 4 * 4 * 2),
    "bat": Case(peft.bone(4, variant="bat"), 4 * OUTS, lazy=False, additive=False),
    "bat-in": Case(
        peft.bone(4, variant="bat", axis="in"), 4 * 56, lazy=False, additive=False
    ),
    "hut": Case(
        peft.hut(2), 2 * SIDES + OUTS + 20, lazy=False, additive=False
    ),  # one bias
    "hut-direct": Case(
        peft.hut(2, form="direct", affine=False),
        2 * SIDES,
        1e-6,
        lazy=False,
        additive=False,
    ),
    "tera": Case(peft.tera(), 2 * (4 + 5 + 3 + 4) + 2 * 2 * (3 + 4)),
    "tera-wide": Case(peft.tera(ranks=2.0), 2 * (2 * 16 + 2 * 14)),
    "randlora": Case(peft.randlora(5, alpha=5), 4 * 3 * (5 + 12)),
    "randlora-hf": Case(peft.randlora(5, alpha=5, pairing="hf"), 4 * 3 * (5 + 12)),
    "wara": Case(peft.wara(2), SIDES),
    "wara-db2": Case(peft.wara(2, wavelet="db2"), SIDES),
    "wara-bands": Case(peft.wara(1, mode="subband", levels=2), 3 * SIDES // 2 + SIDES),
    "wara-tiny": Case(peft.wara(2, mode="tiny"), 4 * 4),
    "s2ft": Case(peft.s2ft(0.2, select="*kernel"), 4 * 12 + 2 * 20 + 1 * 72 + 2 * 12),
    "s2ft-columns": Case(
        peft.s2ft(0.5, select="*kernel", columns="*kernel"),
        10 * 12 + 6 * 20 + 1 * 6 * 12 + 6 * 12,
    ),
    "snella": Case(
        peft.snella(4, threshold=0.4), 4 * SIDES + 3 * 4, jnp.inf, lazy=False
    ),
    "snell": Case(
        peft.snella(4, kernel="distance", zero_start=True), 4 * SIDES, 0, lazy=False
    ),
    "full": Case(peft.full("*"), 2 * 240 + 2 * 144 + 20, lazy=False),
    "join": Case(
        peft.join(peft.lora(3, select="q*"), peft.bone(5, select="up*kernel")),
        3 * 24 + 5 * 20,
    ),
}
MIXED = {name: case for name, case in CASES.items() if name != "join"}


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape) / 4


PARAMS = {
    "q": {"kernel": normal(1, WIDTH, HEADS, EACH)},
    "out": {"kernel": normal(2, HEADS, EACH, WIDTH)},
    "up": {"kernel": normal(3, WIDTH, HIDDEN), "bias": normal(4, HIDDEN)},
    "down": {"kernel": normal(5, HIDDEN, WIDTH)},
}
X = normal(6, 7, WIDTH)


def model(params: Any, x: jax.Array) -> jax.Array:
    """A function that knows nothing of adapters."""
    h = jnp.einsum("td,dhk->thk", x, params["q"]["kernel"])
    x = x + jnp.einsum("thk,hkd->td", jnp.tanh(h), params["out"]["kernel"])
    up = x @ params["up"]["kernel"] + params["up"]["bias"][None]
    return x + jnp.tanh(up) @ params["down"]["kernel"]


@functools.cache
def moved(name: str, seed: int = 0) -> Any:
    """An adapter some way from its start."""
    adapter = CASES[name].method.init(jax.random.key(seed), PARAMS)
    leaves, structure = jax.tree.flatten(adapter.train)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    leaves = [
        x + 0.1 * jax.random.normal(k, x.shape)
        for x, k in zip(leaves, keys, strict=True)
    ]
    return adapter._replace(train=jax.tree.unflatten(structure, leaves))


def run(name: str, adapter: Any, params: Any = PARAMS, x: jax.Array = X) -> jax.Array:
    return wlab.lift(model)(CASES[name].method.attach(adapter, params), x)


def gradients(name: str, adapter: Any, params: Any = PARAMS, dense: bool = False):
    def loss(train: Any) -> jax.Array:
        tree = CASES[name].method.attach(adapter._replace(train=train), params)
        out = model(wlab.materialise(tree), X) if dense else wlab.lift(model)(tree, X)
        return jnp.mean(out**2)

    return jax.jit(jax.grad(loss))(adapter.train)


cases = pytest.mark.parametrize("name", CASES)
# One of each way in which a target is put together.
FORMS = ("lora", "dora", "bone", "tera", "randlora", "wara", "s2ft", "hut", "snella")
forms = pytest.mark.parametrize("name", (*FORMS, "join"))


@cases
def test_counts_and_start(name: str):
    method, count, identity = CASES[name][:3]
    adapter = method.init(jax.random.key(0), PARAMS)
    assert sum(x.size for x in jax.tree.leaves(adapter.train)) == count
    assert {x.dtype for x in jax.tree.leaves(adapter.train)} == {jnp.dtype("float32")}
    chex.assert_trees_all_equal_structs(adapter.train, method.labels(adapter.train))
    merged = wlab.materialise(method.attach(adapter, PARAMS))
    if identity == 0:
        chex.assert_trees_all_equal(merged, PARAMS)
    elif identity < 1:
        chex.assert_trees_all_close(merged, PARAMS, atol=identity)
    # Abstract parameters say what is trained, and the key alone what it is.
    abstract = jax.eval_shape(lambda: method.init(jax.random.key(0), PARAMS))
    chex.assert_trees_all_equal_shapes_and_dtypes(abstract.train, adapter.train)
    other = method.init(jax.random.key(0), PARAMS)
    chex.assert_trees_all_equal(adapter.train, other.train)
    chex.assert_trees_all_equal(adapter.frozen, other.frozen)


@cases
def test_structured_dense_and_compiled_agree(name: str):
    adapter = moved(name)
    method = CASES[name].method
    want = model(peft.merge(method, adapter, PARAMS), X)
    np.testing.assert_allclose(run(name, adapter), want, atol=2e-6)
    traces = []

    @jax.jit
    def step(adapter: Any) -> jax.Array:
        traces.append(1)
        return run(name, adapter)

    np.testing.assert_allclose(step(adapter), want, atol=2e-6)
    step(moved(name, 1))
    assert len(traces) == 1
    # The base is not what it was, or the test would say nothing.
    assert float(jnp.abs(want - model(PARAMS, X)).max()) > 1e-3


@cases
def test_gradients(name: str):
    adapter = moved(name)
    got = gradients(name, adapter)
    want = gradients(name, adapter, dense=True)
    chex.assert_trees_all_close(got, want, rtol=1e-4, atol=1e-6)
    start = CASES[name].method.init(jax.random.key(0), PARAMS)
    first = gradients(name, start)
    chex.assert_tree_all_finite(first)
    parts = (
        first.values()
        if name != "join"
        else [p for f in first.values() for p in f.values()]
    )
    for part in parts:
        assert any(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(part))


@cases
def test_the_base_has_no_gradient(name: str):
    method, adapter = CASES[name].method, moved(name)

    def loss(params: Any) -> jax.Array:
        tree = method.attach(adapter, params)
        return sum(jnp.sum(wlab.materialise(tree)[n]["kernel"]) for n in ("q", "up"))

    got = jax.grad(loss)(PARAMS)
    for path in ("q", "up"):
        assert not np.any(got[path]["kernel"])


@pytest.mark.parametrize("name", [n for n, c in MIXED.items() if c.lazy])
def test_no_array_of_the_base_size(name: str):
    """With fewer rows than either side, so that nothing else is as large."""
    adapter = moved(name)

    def loss(train: Any) -> jax.Array:
        return jnp.sum(run(name, adapter._replace(train=train)) ** 2)

    jaxpr = jax.make_jaxpr(jax.grad(loss))(adapter.train)
    sizes = {12 * 20, 12 * 12}
    large = [
        (eqn.primitive.name, v.aval.shape)
        for eqn in _equations(jaxpr.jaxpr)
        for v in eqn.outvars
        if np.prod(v.aval.shape, dtype=int) in sizes
        and eqn.primitive.name
        in ("dot_general", "add", "add_any", "mul", "concatenate", "reduce_sum")
        and set(v.aval.shape) <= {WIDTH, HIDDEN, HEADS, EACH}
    ]
    # RandLoRA's scaled factors and TeRA's core are as large as a weight.
    if not name.startswith(("randlora", "tera")):
        assert not large


def _equations(jaxpr: Any) -> Any:
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            for part in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(part, "jaxpr", part)
                if hasattr(inner, "eqns"):
                    yield from _equations(inner)


@forms
def test_many_adapters_in_one_vmap(name: str):
    many = [moved(name, seed) for seed in (0, 3)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *(a.train for a in many))
    frozen = jax.tree.map(lambda *x: jnp.stack(x), *(a.frozen for a in many))

    def one(train: Any, frozen: Any, x: jax.Array) -> jax.Array:
        return run(name, many[0]._replace(train=train, frozen=frozen), x=x)

    # Each row with an adapter of its own: serving.
    rows = jnp.stack([X, X + 1])
    got = jax.jit(jax.vmap(one))(stacked, frozen, rows)
    want = [run(name, a, x=x) for a, x in zip(many, rows, strict=True)]
    np.testing.assert_allclose(got, jnp.stack(want), atol=5e-6)


@forms
def test_bfloat16_and_packed_bases(name: str):
    method = CASES[name].method
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    adapter = moved(name)
    merged = peft.merge(method, adapter, narrow)
    assert {x.dtype for x in jax.tree.leaves(merged)} == {jnp.dtype("bfloat16")}
    # Rounded once: as the sum in float32 of the bfloat16 base.
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), narrow)
    want = peft.merge(method, adapter, wide)
    chex.assert_trees_all_equal(
        merged, jax.tree.map(lambda x: x.astype(jnp.bfloat16), want)
    )
    packed = quant.quantize_tree(PARAMS, "int8", select="*kernel")
    dense = wlab.materialise(packed)
    np.testing.assert_allclose(
        run(name, adapter, packed), run(name, adapter, dense), atol=3e-6
    )
    again = peft.merge(method, adapter, packed, requantize=True)
    assert isinstance(again.params["q"]["kernel"], quant.Quantized)
    assert 0 < float(again.errors["q/kernel"]) < 0.02


@forms
def test_stacked_layers(name: str):
    """A scan over stacked layers is the loop over them, each with its own adapter."""
    method = CASES[name].method
    layers = [PARAMS, jax.tree.map(lambda x: x * 1.5, PARAMS)]
    stacked = {"ScanLayers": jax.tree.map(lambda *x: jnp.stack(x), *layers)}
    if name == "join":
        method = peft.join(
            peft.lora(3, select="*q*"), peft.bone(5, select="*up*kernel")
        )
    elif name == "s2ft":
        method = peft.s2ft(0.2, select="*kernel")
    adapter = method.init(jax.random.key(0), stacked)
    train = jax.tree.map(lambda x: x + 0.05, adapter.train)
    adapter = adapter._replace(train=train)
    tree = method.attach(adapter, stacked)["ScanLayers"]

    def scanned(tree: Any, x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, p: (model(p, x), None), x, tree)[0]

    dense = wlab.materialise(tree)
    x = X
    for i in range(2):
        x = model(jax.tree.map(lambda w, i=i: w[i], dense), x)
    got = jax.jit(wlab.lift(scanned))(tree, X)
    np.testing.assert_allclose(got, x, rtol=2e-5, atol=5e-6)


@pytest.mark.parametrize("name", FORMS)
def test_over_a_mesh(name: str, mesh: jax.sharding.Mesh):
    method, adapter = CASES[name].method, moved(name)
    rules = [
        ("up/kernel", jax.P(None, "data")),
        ("q/kernel", jax.P("data", "model", None)),
    ]
    mesh = jax.sharding.Mesh(
        mesh.devices, ("data", "model"), axis_types=mesh.axis_types
    )
    placed = jax.device_put(PARAMS, sharding.shardings(PARAMS, mesh, rules))
    where = peft.shardings(method, adapter, PARAMS, mesh, rules)
    there = jax.device_put(adapter, where)
    want = model(peft.merge(method, adapter, PARAMS), X)
    auto = sharding.with_auto_axes

    with jax.set_mesh(mesh):
        fn = functools.partial(run, name)
        if jax.sharding.AxisType.Explicit in mesh.axis_types:
            fn = auto(fn, jax.P())
        got = jax.jit(fn)(there, placed)
    np.testing.assert_allclose(got, want, atol=5e-6)


@pytest.mark.parametrize("name", [n for n in CASES if n not in ("join", "full")])
def test_round_trip(name: str, tmp_path: Any):
    adapter = moved(name)
    peft.save(tmp_path / "adapter", adapter)
    back = peft.load(tmp_path / "adapter", CASES[name].method, PARAMS)
    chex.assert_trees_all_equal(back.train, adapter.train)
    chex.assert_trees_all_close(back.frozen, adapter.frozen, atol=1e-6)


@cases
def test_unmerge(name: str):
    method, adapter = CASES[name].method, moved(name)
    merged = peft.merge(method, adapter, PARAMS)
    if CASES[name].additive:
        back = peft.unmerge(method, adapter, merged)
        chex.assert_trees_all_close(back, PARAMS, atol=1e-6)
    else:
        with pytest.raises(ValueError, match="depends on the base"):
            peft.unmerge(method, adapter, merged)


class Block(nn.Module):
    """As a user writes it."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.LayerNorm()(x)
        x = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=12)(x)
        return nn.Dense(8)(jax.nn.gelu(nn.Dense(20)(x)))


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.attention = nnx.MultiHeadAttention(2, 12, decode=False, rngs=rngs)
        self.dense = nnx.Linear(12, 8, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.dense(self.attention(x))


FLAX = {name: CASES[name].method for name in (*FORMS, "pissa", "s2ft-columns")}
FLAX["bat"] = peft.bone(2, variant="bat")


@pytest.mark.parametrize("name", FLAX)
def test_flax_models(name: str):
    method = FLAX[name]
    x = normal(8, 2, 5, 12)
    module = Block()
    params = module.init(jax.random.key(0), x)["params"]
    net = Net(nnx.Rngs(0))
    graph, state = nnx.split(net)

    def linen(params: Any) -> jax.Array:
        return module.apply({"params": params}, x)

    def with_nnx(state: Any) -> jax.Array:
        return nnx.merge(graph, state)(x)

    for fn, tree in ((linen, params), (with_nnx, state)):
        adapter = method.init(jax.random.key(1), tree)
        train = jax.tree.map(lambda x: x + 0.05, adapter.train)
        adapter = adapter._replace(train=train)
        attached = method.attach(adapter, tree)
        want = fn(wlab.materialise(attached))
        np.testing.assert_allclose(wlab.lift(fn)(attached), want, atol=2e-5)


@cases
def test_an_empty_tree_has_no_target(name: str):
    with pytest.raises(ValueError, match=r"no target|nothing to select"):
        CASES[name].method.init(0, {})


def test_adapters_learn():
    """The optimiser sees the adapter alone, and the loss falls for every method."""
    target = model(jax.tree.map(lambda x: 0.5 * x, PARAMS), X)
    for name in ("lora", "bone", "randlora", "s2ft"):
        method = CASES[name].method
        adapter = method.init(jax.random.key(0), PARAMS)
        tx = optax.adam(1e-2)

        def loss(train: Any, name: str = name, adapter: Any = adapter) -> jax.Array:
            out = run(name, adapter._replace(train=train))
            return jnp.mean((out - target) ** 2)

        @jax.jit
        def step(train: Any, state: Any, loss: Any = loss, tx: Any = tx) -> Any:
            value, grads = jax.value_and_grad(loss)(train)
            updates, state = tx.update(grads, state)
            return optax.apply_updates(train, updates), state, value

        train, state = adapter.train, tx.init(adapter.train)
        losses = []
        for _ in range(30):
            train, state, value = step(train, state)
            losses.append(float(value))
        assert losses[-1] < 0.7 * losses[0], name
