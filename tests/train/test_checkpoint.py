# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""What is saved comes back to the bit and of its type, or a sentence says why not."""

import os
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from wlab.core import LowRank
from wlab.train import Checkpoints, init_state, make_train_step


def everything():
    """A tree with leaves and nodes of all kinds."""
    codes = jnp.arange(16).astype(jnp.uint4).reshape(4, 4)
    return {
        "bits": [codes, jnp.arange(5).astype(jnp.int2), codes.astype(jnp.int4)],
        "floats": (
            jnp.asarray([0.5, 6, -3, 0], jnp.float4_e2m1fn),
            jnp.asarray([448, 2**-9], jnp.float8_e4m3fn),
            jnp.asarray([1.5, jnp.inf], jnp.bfloat16),
        ),
        "key": jax.random.key(7),
        "keys": jax.random.split(jax.random.key(7, impl="rbg"), (2, 3)),
        "weight": LowRank(jnp.ones((3, 2)), jnp.ones((3, 1)), jnp.ones((2, 1))),
        "adam": optax.adam(1e-3).init({"w": jnp.ones(3)}),
        "masked": optax.masked(optax.sgd(0.1, 0.9), {"a": True, "b": False}).init(
            {"a": jnp.ones(2), "b": jnp.ones(2)}
        ),
        "nothing": None,
        "empty": jnp.zeros((0, 3), jnp.bfloat16),
        "scalar": jnp.asarray(3, jnp.int32),
    }


def plain(tree):
    """The same tree with keys as numbers, for comparison."""
    is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)  # noqa: E731
    return jax.tree.map(lambda x: jax.random.key_data(x) if is_key(x) else x, tree)


@pytest.mark.parametrize("abstract", [True, False])
def test_round_trip_of_every_type(tmp_path, abstract):
    tree = everything()
    template = jax.eval_shape(everything) if abstract else everything()
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(5, tree, {"note": "first", "data": {"next_index": 3}})
    with Checkpoints(tmp_path) as checkpoints:
        step, got, meta = checkpoints.restore(template)
    assert step == 5 and meta == {"note": "first", "data": {"next_index": 3}}
    assert jax.tree.structure(got) == jax.tree.structure(tree)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(tree), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
    chex.assert_trees_all_equal(plain(got), plain(tree))
    np.testing.assert_array_equal(
        jax.random.normal(got["key"]), jax.random.normal(tree["key"])
    )


def test_a_state_may_be_written_over_while_it_is_saved(tmp_path):
    grow = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = grow(jnp.zeros((500, 500)))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"x": x})
        for _ in range(20):
            x = grow(x)
        _, got, _ = checkpoints.restore({"x": x})
    assert (got["x"] == 1).all() and (x == 21).all()


def test_training_goes_on_as_if_never_stopped(tmp_path):
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))
    step = jax.jit(make_train_step(lambda p, x: jnp.mean((x @ p["w"]) ** 2), tx))
    batches = jax.random.normal(jax.random.key(1), (6, 4, 5))

    def init():
        return init_state({"w": jnp.ones((5, 3))}, tx)

    state = init()
    for x in batches:
        state, metrics = step(state, x)
    half = init()
    for x in batches[:3]:
        half, _ = step(half, x)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, half)
        number, half, _ = checkpoints.restore(jax.eval_shape(init))
    assert type(half.opt_state) is type(state.opt_state)
    for x in batches[number:]:
        half, last = step(half, x)
    chex.assert_trees_all_equal((half, last), (state, metrics))


def test_restored_arrays_lie_where_the_template_says(tmp_path, mesh):
    sharding = jax.NamedSharding(mesh, jax.P("data", "model"))
    x = jax.device_put(jnp.arange(64, dtype=jnp.uint4).reshape(8, 8), sharding)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"x": x})
        template = {"x": jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)}
        _, sharded, _ = checkpoints.restore(template)
        template = {"x": jax.ShapeDtypeStruct(x.shape, x.dtype)}
        _, single, _ = checkpoints.restore(template)
    assert sharded["x"].sharding == sharding
    assert len(single["x"].devices()) == 1
    for got in (sharded, single):
        np.testing.assert_array_equal(got["x"], x)


def test_a_template_of_types_needs_the_mesh(tmp_path):
    kinds = (jax.sharding.AxisType.Explicit,) * 2
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=kinds)
    sharding = jax.NamedSharding(mesh, jax.P("data"))
    x = jax.device_put(jnp.arange(8.0), sharding)
    template = jax.eval_shape(lambda x: {"x": x}, x)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"x": x})
        with pytest.raises(ValueError, match=r"restore it within jax\.set_mesh"):
            checkpoints.restore(template)
        with jax.set_mesh(mesh):
            _, got, _ = checkpoints.restore(template)
    assert got["x"].sharding == sharding
    np.testing.assert_array_equal(got["x"], x)


def test_only_the_latest_are_kept(tmp_path):
    with Checkpoints(tmp_path, keep=2, every=5) as checkpoints:
        assert checkpoints.latest_step() is None
        assert [s for s in range(1, 16) if checkpoints.due(s)] == [5, 10, 15]
        for step in (5, 10, 15):
            checkpoints.save(step, {"x": jnp.asarray(float(step))})
        assert checkpoints.latest_step() == 15
        template = {"x": jnp.zeros(())}
        assert checkpoints.restore(template)[1]["x"] == 15
        assert checkpoints.restore(template, step=10)[1]["x"] == 10
        with pytest.raises(
            FileNotFoundError, match=r"no checkpoint of step 5; .*10, 15"
        ):
            checkpoints.restore(template, step=5)


def test_a_directory_without_a_checkpoint(tmp_path):
    with (
        Checkpoints(tmp_path / "new") as checkpoints,
        pytest.raises(FileNotFoundError, match="new holds no checkpoint"),
    ):
        checkpoints.restore({"x": jnp.zeros(2)})


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            {"a": {"x": jnp.zeros((2, 4))}},
            "a/x is float32[2, 3] there and float32[2, 4]",
        ),
        (
            {"a": {"x": jnp.zeros((2, 3), jnp.bfloat16)}},
            "a/x is float32[2, 3] there and bfloat16[2, 3] in the template",
        ),
        ({"a": {}}, "a/x is float32[2, 3] there and absent in the template"),
        (
            {"a": {"x": jnp.zeros((2, 3)), "y": jax.random.key(0)}},
            "a/y is absent there and key<fry>[] in the template",
        ),
    ],
)
def test_a_template_that_differs(tmp_path, template, message):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"a": {"x": jnp.zeros((2, 3))}})
        with pytest.raises(ValueError, match=re.escape(message)):
            checkpoints.restore(template)


def test_many_differences_make_one_short_error(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {f"x{i}": jnp.zeros(2) for i in range(9)})
        with pytest.raises(ValueError, match=r"and 6 more\. Build the template"):
            checkpoints.restore({f"x{i}": jnp.zeros(3) for i in range(9)})


def test_a_step_is_saved_once(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"x": jnp.zeros(2)})
        with pytest.raises(ValueError, match="already holds step 1: restore from it"):
            checkpoints.save(1, {"x": jnp.zeros(2)})


def test_a_relative_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Checkpoints("runs/one") as checkpoints:
        checkpoints.save(1, {"x": jnp.ones(2)})
    assert os.path.isdir(tmp_path / "runs" / "one" / "1")


@pytest.mark.parametrize("bad", [{"keep": 0}, {"every": 0}])
def test_numbers_are_checked(tmp_path, bad):
    with pytest.raises(ValueError, match="must be positive"):
        Checkpoints(tmp_path, **bad)
