# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of the places of trees on a mesh."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

from wlab import core, quant
from wlab.core import sharding
from wlab.models.decoder import Decoder, tiny

P = jax.P


def _params(**overrides: Any) -> Any:
    model = Decoder(tiny(width=64, depth=2, **overrides))
    tokens = jnp.zeros((2, 8), jnp.int32)
    return jax.eval_shape(lambda: model.init(jax.random.key(0), tokens)["params"])


def _packed(w: jax.Array, grid: str, granularity: Any, **kwargs: Any) -> Any:
    tree = {"kernel": w}
    packed = quant.quantize_tree(tree, grid, granularity=granularity, **kwargs)
    return packed["kernel"]


def _specs(tree: Any) -> dict[str, Any]:
    return dict(core.leaves_with_paths(tree))


# --- meshes ----------------------------------------------------------------------


def test_a_mesh_has_the_four_axes_and_takes_the_rest():
    mesh = sharding.make_mesh(fsdp=2, data=-1)
    assert dict(mesh.shape) == {"data": 4, "fsdp": 2, "tensor": 1, "expert": 1}
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert set(sharding.make_mesh(explicit=True).axis_types) == {AxisType.Explicit}
    assert sharding.make_mesh().shape["data"] == 8
    assert sharding.make_mesh(population=8).shape["population"] == 8


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": 3}, "data=3 is for 3 devices, and there are 8"),
        ({"data": 3, "fsdp": -1}, "for 3 devices, and there are 8"),
        ({"data": -1, "fsdp": -1}, "at most one is -1"),
        ({"data": 0}, "sizes are positive"),
    ],
)
def test_a_mesh_that_does_not_divide_the_devices_is_an_error(
    sizes: dict[str, int], message: str
):
    with pytest.raises(ValueError, match=message):
        sharding.make_mesh(**sizes)


# --- parameters ------------------------------------------------------------------


def test_matrices_are_divided_by_their_view():
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    found = _specs(sharding.specs(_params(), mesh))
    assert found["blocks/attention/query/kernel"] == P(None, "fsdp", "tensor")
    assert found["blocks/attention/out/kernel"] == P(None, "tensor", None, "fsdp")
    assert found["blocks/mlp/up/kernel"] == P(None, "fsdp", "tensor")
    assert found["blocks/mlp/down/kernel"] == P(None, "tensor", "fsdp")
    assert found["embed/embedding"] == P("tensor", "fsdp")
    assert found["final_norm/scale"] == P()


def test_experts_are_divided_scanned_or_not():
    mesh = sharding.make_mesh(expert=4, fsdp=2)
    for scan, name in ((True, "blocks"), (False, "blocks_0")):
        found = _specs(sharding.specs(_params(experts=4, scan=scan), mesh))
        assert found[f"{name}/mlp/up/kernel"] == P(*[None] * scan, "expert", "fsdp")
        assert "expert" not in found[f"{name}/mlp/router/kernel"]
        assert "expert" not in found[f"{name}/attention/query/kernel"]


def test_a_size_that_does_not_divide_stays_whole():
    mesh = sharding.make_mesh(tensor=8)
    found = _specs(sharding.specs(_params(), mesh))  # 4 query heads, 2 key heads
    assert found["blocks/attention/query/kernel"] == P()
    assert found["blocks/mlp/up/kernel"] == P(None, None, "tensor")


def test_the_first_rule_that_matches_holds():
    mesh = sharding.make_mesh(fsdp=4, tensor=2)
    rules = [("*mlp/up*", P()), ("*mlp/*", P("tensor", "fsdp"))]
    found = _specs(sharding.specs(_params(), mesh, rules))
    assert found["blocks/mlp/up/kernel"] == P()
    assert found["blocks/mlp/gate/kernel"] == P(None, "tensor", "fsdp")
    assert found["embed/embedding"] == P("tensor", "fsdp")


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (("*mlpp*", P()), r"pattern '\*mlpp\*' matches no leaf; near"),
        (("*mlp/up*", P("model")), r"names \['model'\], and the mesh has the axes"),
        (("*mlp/up*", P("fsdp", "fsdp")), "names a mesh axis twice"),
        (("final*", P("fsdp", None)), "more entries than the leaf has axes"),
        (
            ("*key*", P(None, "fsdp", None)),
            r"'blocks/attention/key/kernel' of shape \(2, 64, 2, 32\): the axis of 2 "
            "does not divide into 4 parts",
        ),
    ],
)
def test_a_rule_that_does_not_fit_is_an_error(rule: Any, message: str):
    mesh = sharding.make_mesh(fsdp=4, tensor=2)
    with pytest.raises(ValueError, match=message):
        sharding.specs(_params(), mesh, [rule])


@pytest.mark.parametrize("explicit", [False, True])
def test_structured_weights_live_where_their_arrays_do(explicit: bool):
    mesh = sharding.make_mesh(fsdp=4, tensor=2, explicit=explicit)
    w = jax.random.normal(jax.random.key(0), (64, 32))
    a, b = jnp.ones((64, 2)), jnp.ones((32, 2))
    params = {
        "rows": _packed(w, "int8", "row"),
        "groups": _packed(w, "int4", "row", group=8),
        "whole": _packed(w, "int4", "tensor"),
        "sum": core.LowRank(_packed(w, "int8", "row"), a, b),
        "terms": core.LowRank(None, a, b),
    }
    found = sharding.specs(params, mesh)
    assert found["rows"].codes == P("fsdp", "tensor")
    assert found["rows"].scale == P(None, "tensor")
    assert found["groups"].scale == P("fsdp", "tensor")
    assert found["whole"].scale == P()
    assert found["sum"].base.codes == P("fsdp", "tensor")
    assert (found["sum"].a, found["sum"].b) == (P("fsdp"), P("tensor"))
    assert (found["terms"].a, found["terms"].b) == (P("fsdp"), P("tensor"))
    placed = jax.device_put(params, sharding.shardings(params, mesh))
    with jax.set_mesh(mesh):
        for name, leaf in params.items():
            np.testing.assert_allclose(
                jax.device_get(core.materialise(placed[name])),
                core.materialise(leaf),
                rtol=1e-6,
            )


def test_the_bytes_of_a_device_are_those_of_its_parts():
    mesh = sharding.make_mesh(fsdp=4, tensor=2)
    w = _packed(jnp.ones((64, 32)), "int4", "row")
    params = {"w": w, "norm": {"scale": jnp.ones(64)}}
    placed = jax.device_put(params, sharding.shardings(params, mesh))
    known = {p.path: p.bytes_per_device for p in sharding.places(params, mesh)}
    assert known["norm/scale"] == 64 * 4
    assert known["w"] == 64 * 32 // 8 // 2 + 32 // 2 * 4  # half a byte a code
    shard = placed["w"].codes.addressable_shards[0].data
    assert shard.shape == (16, 16)


# --- what follows from the parameters ----------------------------------------------


def test_the_state_of_an_optimiser_is_placed_like_the_parameters():
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    params = _params()
    placed = sharding.shardings(params, mesh)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    state = sharding.derive(tx.init, params, placed)
    adam: Any = optax.tree.get(state, "mu")
    assert adam == placed
    assert all(s.mesh is mesh for s in jax.tree.leaves(state))


def test_derive_follows_any_function():
    mesh = sharding.make_mesh(fsdp=8)
    tree = {"w": jnp.ones((8, 4))}
    places = sharding.derive(
        lambda t: (t["w"].sum(1), jnp.zeros(3)), tree, sharding.shardings(tree, mesh)
    )
    assert [s.spec for s in places] == [P("fsdp"), P()]


# --- batches and activations -------------------------------------------------------


def test_a_batch_is_divided_over_three_axes():
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    batch = {"x": np.arange(32).reshape(8, 4), "y": np.arange(8)}
    placed = sharding.place_batch(batch, mesh)
    assert placed["x"].sharding.spec == P(("data", "fsdp"))
    assert placed["x"].addressable_shards[0].data.shape == (2, 4)
    np.testing.assert_array_equal(placed["y"], batch["y"])
    assert sharding.place_batch(placed, mesh)["x"] is placed["x"]
    assert sharding.place_batch(batch, None) is batch


def test_a_batch_that_does_not_divide_is_an_error():
    mesh = sharding.make_mesh(data=8)
    with pytest.raises(ValueError, match=re.escape("has 6 rows over 1 host(s), which")):
        sharding.place_batch(np.zeros((6, 3)), mesh)


def test_constrain_needs_no_mesh_and_drops_what_is_not_there():
    x = jnp.ones((8, 6))
    assert sharding.constrain(x, "data", "tensor") is x
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    with jax.set_mesh(mesh):
        y = jax.jit(lambda x: sharding.constrain(x, sharding.BATCH, "population"))(x)
        z = jax.jit(lambda x: sharding.constrain(x, None, "data"))(jnp.ones((8, 3)))
    assert y.sharding.spec == P(("data", "fsdp"))
    assert z.sharding.spec in (P(), P(None, None))  # 3 does not divide


def test_a_function_without_sharding_rules_runs_under_explicit_axes():
    mesh = sharding.make_mesh(data=4, tensor=2, explicit=True)
    x = jax.device_put(
        jnp.arange(32.0).reshape(8, 4), jax.NamedSharding(mesh, P("data"))
    )

    def gram(x: jax.Array) -> jax.Array:
        return x.T @ x  # contracts the divided axis

    with jax.set_mesh(mesh):
        y = jax.jit(lambda x: sharding.with_auto_axes(gram, P("tensor"))(x))(x)
    assert y.sharding.spec == P("tensor", None)
    np.testing.assert_allclose(y, gram(np.arange(32.0).reshape(8, 4)))
