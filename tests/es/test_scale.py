# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""A population over devices, and a search that is saved and goes on."""

import pathlib
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import wlab
from wlab import es
from wlab.core import sharding
from wlab.train import Checkpoints, create_state, fit, init_state

N = 16
PARAMS = {
    "hidden": {"kernel": 0.1 * jnp.ones((6, 8)), "bias": jnp.zeros(8)},
    "out": {"kernel": 0.1 * jnp.ones((8, 2))},
}
X = jax.random.normal(jax.random.key(5), (4, 6))


def fitness_fn(params: Any, x: jax.Array) -> jax.Array:
    h = jnp.tanh(x @ params["hidden"]["kernel"] + params["hidden"]["bias"][None])
    return -jnp.square(h @ params["out"]["kernel"] - 1).mean()


def search_of(**options: Any) -> tuple[Any, Any]:
    search = es.eggroll(0.1, **options)
    return search, optax.chain(es.scale_by_strategy(search, 3), optax.adam(0.05))


def mesh_of(n: int, tensor: int = 1, explicit: bool = False) -> jax.sharding.Mesh:
    devices = jax.devices()[: n * tensor]
    return sharding.make_mesh(
        devices=devices, population=n, tensor=tensor, explicit=explicit
    )


def run(n: int = 1, steps: int = 2, tensor: int = 1, **options: Any) -> Any:
    """Parameters after some steps, on so many devices."""
    explicit = options.pop("explicit", False)
    kwargs = {k: options.pop(k) for k in ("chunk", "keep") if k in options}
    mesh = None
    if n > 1:
        mesh = mesh_of(n, tensor, explicit)
        options["axis_name"] = "population"
    search, tx = search_of(**options)
    step = es.make_evolution_step(fitness_fn, search, tx, N, mesh=mesh, **kwargs)
    state = init_state(PARAMS, tx)
    with sharding.on_mesh(mesh):
        if tensor > 1:
            specs = sharding.shardings(PARAMS, mesh)
            state = state._replace(params=jax.device_put(state.params, specs))
        traces: list[int] = []

        def counted(state: Any, x: Any) -> Any:
            traces.append(1)
            return step(state, x)

        compiled = jax.jit(counted)
        for _ in range(steps):
            state, metrics = compiled(state, X)
    chex.assert_trees_all_equal_shapes_and_dtypes(state.params, PARAMS)
    assert len(traces) <= 2  # the first call's state lives elsewhere
    return jax.device_get(state.params), jax.device_get(metrics)


@pytest.fixture(scope="module")
def one() -> Any:
    return run()


def test_it_learns(one: Any):
    params, metrics = one
    after, _ = run(steps=12)
    assert fitness_fn(after, X) > fitness_fn(params, X) > fitness_fn(PARAMS, X)
    assert metrics["failed"] == 0 and metrics["fitness_best"] >= metrics["fitness"]


@pytest.mark.parametrize(
    "options",
    [
        {"n": 2, "tensor": 2, "reduce": "sum", "keep": True, "chunk": 2},
        {"n": 4, "explicit": True},
    ],
    ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items()),
)
def test_devices_change_nothing(one: Any, options: dict[str, Any]):
    params, metrics = run(**options)
    chex.assert_trees_all_close(params, one[0], atol=2e-6)
    np.testing.assert_allclose(metrics["fitness"], one[1]["fitness"], rtol=1e-5)


def test_gathered_fitness_gives_the_same_bits():
    """Every device sums as one would: the update is that of one device to the bit."""
    fitness = jax.random.normal(jax.random.key(1), (N,))
    alone = es.eggroll(0.1)
    state = alone.init(3, PARAMS)
    want, _ = jax.jit(alone.update)(state, PARAMS, fitness)
    mesh = mesh_of(4)
    across = es.eggroll(0.1, axis_name="population")
    got, after = jax.jit(
        jax.shard_map(
            across.update,
            mesh=mesh,
            in_specs=(jax.P(), jax.P(), jax.P("population")),
            out_specs=jax.P(),
            check_vma=False,
        )
    )(state, PARAMS, fitness)
    chex.assert_trees_all_equal(got, want)
    assert int(after.failed) == 0


@pytest.mark.parametrize("reduce", ["gather", "sum"])
def test_numbered_members_and_signs_over_devices(reduce: Any):
    fitness = jax.random.normal(jax.random.key(1), (N,)).at[5].set(jnp.nan)
    mesh = mesh_of(4)
    for options in ({}, {"shaping": "sign"}):
        alone = es.eggroll(0.1, **options)
        state = alone.init(3, PARAMS)
        want, _ = jax.jit(alone.update)(state, PARAMS, fitness)
        across = es.eggroll(0.1, axis_name="population", reduce=reduce, **options)

        def both(state: Any, fitness: Any, members: Any, across: Any = across) -> Any:
            plain, after = across.update(state, PARAMS, fitness)
            return plain, across.update(state, PARAMS, fitness, members)[0], after

        by = jax.P("population")
        plain, numbered, after = jax.jit(
            jax.shard_map(
                both, mesh=mesh, in_specs=(jax.P(), by, by), out_specs=jax.P(),
                check_vma=False,
            )
        )(state, fitness, jnp.arange(N))  # fmt: skip
        chex.assert_trees_all_close(plain, want, atol=3e-7)
        chex.assert_trees_all_close(numbered, want, atol=3e-7)
        assert int(after.failed) == 1


def test_signs_are_sent_packed():
    """With the sign of each pair, a device sends a byte for every five pairs."""
    n = 40
    across = es.eggroll(0.1, axis_name="population", shaping="sign")
    state = across.init(3, PARAMS)
    mapped = jax.shard_map(
        across.update,
        mesh=mesh_of(2),
        in_specs=(jax.P(), jax.P(), jax.P("population")),
        out_specs=jax.P(),
        check_vma=False,
    )
    text = jax.jit(mapped).lower(state, PARAMS, jnp.zeros(n)).as_text()
    gathers = [line for line in text.splitlines() if "all_gather" in line]
    assert len(gathers) == 1 and "tensor<1x2xui8>" in gathers[0].replace(
        "4xui8", "2xui8"
    )


def test_pmap():
    search = es.eggroll(0.1, axis_name="i", reduce="sum")
    alone, _ = search_of()
    state = alone.init(3, PARAMS)

    def one(pairs: jax.Array) -> Any:
        fitness = es.evaluate(search, fitness_fn, state, PARAMS, pairs, X, in_axes=None)
        return search.update(state, PARAMS, fitness)[0]

    @jax.jit
    def whole() -> Any:
        fitness = es.evaluate(alone, fitness_fn, state, PARAMS, N, X, in_axes=None)
        return alone.update(state, PARAMS, fitness)[0]

    got = jax.pmap(one, axis_name="i")(jnp.arange(N // 2).reshape(4, 2))
    want = whole()
    chex.assert_trees_all_close(jax.tree.map(lambda x: x[0], got), want, atol=1e-6)


def batches() -> Any:
    while True:
        yield np.asarray(X)


@pytest.mark.parametrize("devices", [(1, 1), (2, 4)])
def test_it_goes_on_from_a_checkpoint(tmp_path: pathlib.Path, devices: Any):
    """To the numbers of a run that never stopped, on other devices too."""

    def run(folder: str, n: int, steps: int, last: int = 0) -> Any:
        mesh = mesh_of(n) if n > 1 else None
        search, tx = search_of(axis_name="population" if mesh else None)
        step = es.make_evolution_step(fitness_fn, search, tx, N, mesh=mesh)
        state = init_state(PARAMS, tx)
        if mesh is not None:
            state = create_state(lambda: PARAMS, tx, mesh)
        with Checkpoints(tmp_path / folder) as saved:
            if last:
                _, state, _ = saved.restore(state)
                assert int(state.step) == last
            state, history = fit(
                step, state, batches(), steps=steps, every=1, checkpoints=saved
            )
        return jax.device_get(state.params), history

    first, second = devices
    run("a", first, 2)
    resumed, history = run("a", second, 4, last=2)
    whole, all_history = run("b", first, 4)
    if first == second:
        chex.assert_trees_all_equal(resumed, whole)
    chex.assert_trees_all_close(resumed, whole, atol=2e-6)
    np.testing.assert_allclose(
        history["fitness"], all_history["fitness"][2:], rtol=1e-5
    )


def test_seeds_at_once_without_compiling_again():
    search = es.eggroll(0.1)
    keys = jax.random.split(jax.random.key(0), 3)
    states = jax.vmap(lambda k: search.init(k, PARAMS))(keys)
    fitness = jax.random.normal(jax.random.key(1), (3, N))
    traces: list[int] = []

    def counted(*args: Any) -> Any:
        traces.append(1)
        return jax.vmap(search.update, (0, None, 0))(*args)

    update = jax.jit(counted)
    grads, states = update(states, PARAMS, fitness)
    update(states, PARAMS, fitness)
    assert len(traces) == 1
    one = search.init(keys[1], PARAMS)
    alone, _ = jax.jit(search.update)(one, PARAMS, fitness[1])
    chex.assert_trees_all_close(jax.tree.map(lambda x: x[1], grads), alone, atol=3e-7)


def test_ask_and_tell():
    search = es.ask_tell(es.eggroll(0.1), optax.adam(0.05), population_size=N)
    state = search.init(jax.random.key(0), PARAMS)

    @jax.jit
    def generation(state: Any) -> Any:
        numbers = search.ask(state)
        fitness = jax.vmap(lambda i: wlab.lift(fitness_fn)(search.member(state, i), X))(
            numbers
        )
        return search.tell(state, numbers, fitness)

    before = fitness_fn(search.get_mean(state), X)
    for _ in range(5):
        state, metrics = generation(state)
    assert int(state.generation) == 5
    assert fitness_fn(search.get_mean(state), X) > before
    assert metrics["best_fitness"] >= metrics["best_fitness_in_generation"]
    with pytest.raises(ValueError, match="population_size=3"):
        es.ask_tell(es.eggroll(), optax.sgd(1.0), 3)


def test_bad_arguments():
    search, tx = search_of()
    with pytest.raises(ValueError, match=r"population=6 .* take a multiple of 8"):
        es.make_evolution_step(fitness_fn, search, tx, 6, mesh=mesh_of(4))
    with pytest.raises(ValueError, match="learns from fitness"):
        tx.update(None, tx.init(PARAMS), PARAMS)
    with pytest.raises(ValueError, match="reads the parameters"):
        tx.update(None, tx.init(PARAMS), fitness=jnp.zeros(4))
    with pytest.raises(ValueError, match="0 states of a search"):
        es.evolution_state(optax.sgd(1.0).init(PARAMS))
    across = es.eggroll(0.1, axis_name="i")
    state = across.init(0, PARAMS)
    kept = es.draw_pairs(across, state, PARAMS, 4)
    with pytest.raises(ValueError, match="take reduce='sum'"):
        jax.vmap(lambda f: across.update(state, PARAMS, f, noise=kept), axis_name="i")(
            jnp.zeros((2, 4))
        )
