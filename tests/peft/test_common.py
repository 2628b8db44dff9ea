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


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32) / 4


PARAMS = {
    "q": {"kernel": normal(1, WIDTH, HEADS, EACH)},
    "out": {"kernel": normal(2, HEADS, EACH, WIDTH)},
    "up": {"kernel": normal(3, WIDTH, HIDDEN), "bias": normal(4, HIDDEN)},
    "down": {"kernel": normal(5, HIDDEN, WIDTH)},
}
X = normal(6, 7, WIDTH)
NARROW = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)


def model(params: Any, x: jax.Array) -> jax.Array:
    """A function that knows nothing of adapters."""
    h = jnp.einsum("td,dhk->thk", x, params["q"]["kernel"])
    x = x + jnp.einsum("thk,hkd->td", jnp.tanh(h), params["out"]["kernel"])
    up = x @ params["up"]["kernel"] + params["up"]["bias"][None]
    return x + jnp.tanh(up) @ params["down"]["kernel"]


@functools.cache
def start(name: str) -> Any:
    """From a key: the adapter, and the model that it makes."""
    method = CASES[name].method

    @jax.jit
    def begin(key: jax.Array, params: Any) -> Any:
        adapter = method.init(key, params)
        return adapter, wlab.materialise(method.attach(adapter, params))

    return lambda seed: begin(jax.random.key(seed), PARAMS)


@functools.cache
def moved(name: str, seed: int = 0) -> Any:
    """An adapter some way from its start."""
    adapter, *_ = start(name)(seed)
    rng = np.random.default_rng(seed + 1)
    train = jax.tree.map(
        lambda x: x + 0.1 * rng.normal(size=x.shape).astype(x.dtype),
        jax.device_get(adapter.train),
    )
    return adapter._replace(train=train)


def run(name: str, adapter: Any, params: Any = PARAMS, x: Any = X) -> jax.Array:
    return wlab.lift(model)(CASES[name].method.attach(adapter, params), x)


class Result(NamedTuple):
    out: jax.Array
    grads: Any  # of the adapter
    base: Any  # gradients of the base


@functools.cache
def both(name: str) -> Any:
    """A step with the attached and with the merged model, and its traces."""
    method = CASES[name].method
    traces: list[str] = []

    def result(adapter: Any, params: Any, x: jax.Array, merged: bool) -> Result:
        def loss(train: Any, params: Any) -> Any:
            now = adapter._replace(train=train)
            if merged:
                out = model(peft.merge(method, now, params), x)
            else:
                out = run(name, now, params, x)
            return jnp.mean(out**2), out

        gradients = jax.grad(loss, argnums=(0, 1), has_aux=True)
        grads, out = gradients(adapter.train, params)
        return Result(out, *grads)

    @jax.jit
    def step(adapter: Any, params: Any, x: jax.Array) -> tuple[Result, Result]:
        traces.append(name)
        return result(adapter, params, x, False), result(adapter, params, x, True)

    return step, traces


def step(name: str, adapter: Any, x: Any = X) -> tuple[Result, Result]:
    return both(name)[0](adapter, PARAMS, x)


cases = pytest.mark.parametrize("name", CASES)
# One of each way in which a target is put together.
FORMS = ("lora", "dora", "bone", "tera", "randlora", "wara", "s2ft", "hut", "snella")
forms = pytest.mark.parametrize("name", (*FORMS, "join"))


@cases
def test_counts_and_start(name: str):
    method, count, identity = CASES[name][:3]
    adapter, merged = start(name)(0)
    assert sum(x.size for x in jax.tree.leaves(adapter.train)) == count
    assert {x.dtype for x in jax.tree.leaves(adapter.train)} == {jnp.dtype("float32")}
    chex.assert_trees_all_equal_structs(adapter.train, method.labels(adapter.train))
    if identity == 0:
        chex.assert_trees_all_equal(merged, PARAMS)
    elif identity < 1:
        chex.assert_trees_all_close(merged, PARAMS, atol=identity)
    # Abstract parameters say what is trained.
    abstract = jax.eval_shape(lambda: method.init(jax.random.key(0), PARAMS))
    chex.assert_trees_all_equal_shapes_and_dtypes(abstract.train, adapter.train)


@cases
def test_structured_and_dense_agree_in_one_program(name: str):
    attached, merged = step(name, moved(name))
    np.testing.assert_allclose(attached.out, merged.out, atol=2e-6)
    step(name, moved(name, 1))
    assert len(both(name)[1]) == 1
    # The base is not what it was, or the test would say nothing.
    base = jax.device_get(jax.jit(model)(PARAMS, X))
    assert np.abs(np.asarray(merged.out) - base).max() > 1e-3


@pytest.mark.parametrize("name", ["dora", "s2ft"])
def test_it_runs_without_being_compiled(name: str):
    adapter = moved(name)
    want = step(name, adapter)[0].out
    np.testing.assert_allclose(run(name, adapter), want, atol=2e-6)


@cases
def test_gradients(name: str):
    attached, merged = step(name, moved(name))
    chex.assert_trees_all_close(attached.grads, merged.grads, rtol=1e-4, atol=1e-6)
    first = step(name, start(name)(0)[0])[0].grads
    chex.assert_tree_all_finite(first)
    parts = (
        first.values()
        if name != "join"
        else [p for f in first.values() for p in f.values()]
    )
    for part in parts:
        assert any(np.asarray(g).any() for g in jax.tree.leaves(part))


@cases
def test_the_base_has_no_gradient(name: str):
    for found in step(name, moved(name)):
        for path in ("q", "up"):
            assert not np.asarray(found.base[path]["kernel"]).any()


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
    stacked, frozen = (
        jax.tree.map(lambda *x: np.stack(x), *parts)
        for parts in ([a.train for a in many], [a.frozen for a in many])
    )

    def one(train: Any, frozen: Any, x: jax.Array) -> jax.Array:
        return run(name, many[0]._replace(train=train, frozen=frozen), x=x)

    # Each row with an adapter of its own: serving.
    rows = np.stack([X, X + 1])
    got = jax.jit(jax.vmap(one))(stacked, frozen, rows)
    want = [step(name, a, x)[0].out for a, x in zip(many, rows, strict=True)]
    np.testing.assert_allclose(got, np.stack(want), atol=5e-6)


@functools.cache
def packed_base() -> Any:
    pack = functools.partial(quant.quantize_tree, grid="int8", select="*kernel")
    return jax.jit(pack)(PARAMS)


@forms
def test_bfloat16_and_packed_bases(name: str):
    method = CASES[name].method

    @jax.jit
    def everything(adapter: Any, narrow: Any, packed: Any) -> Any:
        wide = jax.tree.map(lambda x: x.astype(jnp.float32), narrow)
        merges = [peft.merge(method, adapter, base) for base in (narrow, wide)]
        bases = (packed, wlab.materialise(packed))
        outputs = [run(name, adapter, base) for base in bases]
        again = peft.merge(method, adapter, packed, requantize=True)
        return merges, outputs, again

    merges, outputs, again = everything(moved(name), NARROW, packed_base())
    merged, want = jax.device_get(merges)
    assert {x.dtype for x in jax.tree.leaves(merged)} == {jnp.dtype("bfloat16")}
    # Rounded once: as the sum in float32 of the bfloat16 base.
    chex.assert_trees_all_equal(
        merged, jax.tree.map(lambda x: x.astype(jnp.bfloat16), want)
    )
    np.testing.assert_allclose(*outputs, atol=3e-6)
    assert isinstance(again.params["q"]["kernel"], quant.Quantized)
    assert 0 < float(again.errors["q/kernel"]) < 0.02


@forms
def test_stacked_layers(name: str):
    """A scan over stacked layers is the loop over them, each with its own adapter."""
    method = CASES[name].method
    stacked = {"ScanLayers": jax.tree.map(lambda x: np.stack([x, 1.5 * x]), PARAMS)}
    if name == "join":
        method = peft.join(
            peft.lora(3, select="*q*"), peft.bone(5, select="*up*kernel")
        )
    elif name == "s2ft":
        method = peft.s2ft(0.2, select="*kernel")

    def scanned(tree: Any, x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, p: (model(p, x), None), x, tree)[0]

    @jax.jit
    def scan_and_loop(key: jax.Array, stacked: Any, x: jax.Array) -> Any:
        adapter = method.init(key, stacked)
        train = jax.tree.map(lambda x: x + 0.05, adapter.train)
        tree = method.attach(adapter._replace(train=train), stacked)["ScanLayers"]
        got = wlab.lift(scanned)(tree, x)
        dense = wlab.materialise(tree)
        for i in range(2):
            x = model(jax.tree.map(lambda w, i=i: w[i], dense), x)
        return got, x

    got, want = scan_and_loop(jax.random.key(0), stacked, X)
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=5e-6)


@pytest.mark.parametrize(
    ("name", "mesh"),
    [*((name, "auto") for name in FORMS), ("lora", "explicit")],
    indirect=["mesh"],
)
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
    want = step(name, adapter)[1].out
    auto = sharding.with_auto_axes

    with jax.set_mesh(mesh):
        fn = functools.partial(run, name)
        if jax.sharding.AxisType.Explicit in mesh.axis_types:
            fn = auto(fn, jax.P())
        got = jax.jit(fn)(there, placed)
    np.testing.assert_allclose(got, want, atol=5e-6)


@pytest.mark.parametrize("name", [*FORMS, "pissa"])
def test_round_trip(name: str, tmp_path: Any):
    adapter = moved(name)
    peft.save(tmp_path / "adapter", adapter)
    back = peft.load(tmp_path / "adapter", CASES[name].method, PARAMS)
    chex.assert_trees_all_equal(back.train, adapter.train)
    chex.assert_trees_all_close(back.frozen, adapter.frozen, atol=1e-6)


@pytest.mark.parametrize("name", [*FORMS, "bat", "pissa", "full", "join"])
def test_unmerge(name: str):
    method, adapter = CASES[name].method, moved(name)
    merged = jax.jit(functools.partial(peft.merge, method))(adapter, PARAMS)
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
        return nn.Dense(8)(x)


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.attention = nnx.MultiHeadAttention(2, 12, decode=False, rngs=rngs)
        self.dense = nnx.Linear(12, 8, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.dense(self.attention(x))


FLAX = {name: CASES[name].method for name in (*FORMS, "s2ft-columns")}
FLAX["bat"] = peft.bone(2, variant="bat")


@functools.cache
def flax_models() -> tuple[Any, Any]:
    """Two functions of parameters and input, each with its parameters."""
    module = Block()
    init = jax.jit(module.init)
    params = init(jax.random.key(0), np.zeros((2, 5, 12), np.float32))["params"]
    graph, state = nnx.split(Net(nnx.Rngs(0)))

    def linen(params: Any, x: jax.Array) -> jax.Array:
        return module.apply({"params": params}, x)

    def with_nnx(state: Any, x: jax.Array) -> jax.Array:
        return nnx.merge(graph, state)(x)

    return (linen, with_nnx), (params, state)


@pytest.mark.parametrize("name", FLAX)
def test_flax_models(name: str):
    method = FLAX[name]
    fns, trees = flax_models()

    @jax.jit
    def everything(key: jax.Array, trees: Any, x: jax.Array) -> Any:
        found = []
        for fn, tree in zip(fns, trees, strict=True):
            adapter = method.init(key, tree)
            train = jax.tree.map(lambda x: x + 0.05, adapter.train)
            attached = method.attach(adapter._replace(train=train), tree)
            dense = wlab.materialise(attached)
            found.append((wlab.lift(fn)(attached, x), fn(dense, x)))
        return found

    for got, want in everything(jax.random.key(1), trees, normal(8, 2, 5, 12)):
        np.testing.assert_allclose(got, want, atol=2e-5)


@cases
def test_an_empty_tree_has_no_target(name: str):
    with pytest.raises(ValueError, match=r"no target|nothing to select"):
        CASES[name].method.init(0, {})


def test_adapters_learn():
    """The optimiser sees the adapter alone, and the loss falls for every method."""
    target = jax.jit(model)(jax.tree.map(lambda x: 0.5 * x, PARAMS), X)
    tx = optax.adam(1e-2)

    @functools.partial(jax.jit, static_argnums=0)
    def losses(name: str, adapter: Any) -> jax.Array:
        def loss(train: Any) -> jax.Array:
            out = run(name, adapter._replace(train=train))
            return jnp.mean((out - target) ** 2)

        def step(carry: Any, _: None) -> Any:
            train, state = carry
            value, grads = jax.value_and_grad(loss)(train)
            updates, state = tx.update(grads, state)
            return (optax.apply_updates(train, updates), state), value

        train = adapter.train
        return jax.lax.scan(step, (train, tx.init(train)), length=30)[1]

    for name in ("lora", "bone", "randlora", "s2ft"):
        found = losses(name, start(name)(0)[0])
        assert found[-1] < 0.7 * found[0], name
