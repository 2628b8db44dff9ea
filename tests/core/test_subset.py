# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Subsets: the inner transform on k of n slices, and what happens to the others."""

import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import wlab
from wlab._collectives import collectives
from wlab.core import (
    Layered,
    as_matrices,
    describe,
    from_matrices,
    layered_value_and_grad,
    leaves_with_paths,
    subset,
    subsets,
)

B1, B2, EPS = 0.9, 0.99, 1e-8
ADAM = optax.scale_by_adam(B1, B2, EPS)

STACKED = {
    "blocks/norm/scale": (4, 4),
    "blocks/query/kernel": (4, 4, 2, 3),
    "blocks/up/kernel": (4, 4, 6),
    "embed/embedding": (7, 4),
    "out/kernel": (2, 3, 4),  # two input axes
}
WRITTEN_OUT = {
    **{f"blocks_{i}/up/kernel": (4, 6) for i in range(4)},
    **{f"blocks_{i}/norm/scale": (4,) for i in range(4)},
    "embed/embedding": (7, 4),
}
UNLIKE = {"a/kernel": (4, 6), "b/kernel": (3, 2), "c/kernel": (5, 5), "d/bias": (4,)}

# name: shapes, and the arguments of `subset`
CASES: dict[str, tuple[dict[str, tuple[int, ...]], dict[str, Any]]] = {
    "layers": (STACKED, {"k": 2}),
    "layers-written-out": (WRITTEN_OUT, {"k": 2}),
    "columns": (STACKED, {"k": lambda n: n // 2, "slices": "columns"}),
    "rows": (STACKED, {"k": lambda n: n // 2, "slices": "rows"}),
    "entries": (STACKED, {"k": lambda n: n // 3, "slices": "entries"}),
    "leaves": (WRITTEN_OUT, {"k": 3, "slices": "leaves", "select": "*up/kernel"}),
    "leaves-unlike": (UNLIKE, {"k": 2, "slices": "leaves"}),
}


def tree_of(shapes: dict[str, tuple[int, ...]], seed: int, dtype: Any = None) -> Any:
    rng = np.random.default_rng(seed)
    out: dict[str, Any] = {}
    for path, shape in shapes.items():
        *parts, leaf = path.split("/")
        node = out
        for part in parts:
            node = node.setdefault(part, {})
        node[leaf] = rng.normal(size=shape).astype(dtype or np.float32)
    return out


def masks(params: Any, slices: str, choice: Any) -> dict[str, np.ndarray]:
    """Which entries are active, by path of the leaf; only leaves in pools are there."""
    out: dict[str, np.ndarray] = {}
    chosen = dict(leaves_with_paths(choice))
    leaves = {leaf.path: leaf for leaf in describe(params)}
    if slices == "leaves":
        (picked,) = chosen.values()
        paths = [p for p in leaves if p.endswith("kernel")]
        return {p: np.full(leaves[p].shape, i in picked) for i, p in enumerate(paths)}
    if slices == "layers":
        (picked,) = chosen.values()
        for path, leaf in leaves.items():
            if path.startswith("blocks/"):
                out[path] = np.zeros(leaf.shape, bool)
                out[path][np.asarray(picked)] = True
            elif path.startswith("blocks_"):
                number = int(path.split("/")[0].removeprefix("blocks_"))
                out[path] = np.full(leaf.shape, number in picked)
        return out
    for path, picked in chosen.items():
        leaf = leaves[path]
        mask = np.array(as_matrices(np.zeros(leaf.shape), leaf.view), bool)
        for place in np.ndindex(picked.shape[:-1]):
            at = np.asarray(picked[place])
            assert len({*at.tolist()}) == len(at)
            view = mask[place]
            if slices == "columns":
                view[at, :] = True
            elif slices == "rows":
                view[:, at] = True
            else:
                view[np.unravel_index(at, view.shape)] = True
        out[path] = np.array(from_matrices(jnp.asarray(mask), leaf.view, leaf.shape))
    return out


class Oracle:
    """Adam on whole leaves in numpy, whose moments begin anew where it is said."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]):
        self.m = {p: np.zeros(s) for p, s in shapes.items()}
        self.v = {p: np.zeros(s) for p, s in shapes.items()}
        self.t = {p: np.zeros(s) for p, s in shapes.items()}

    def step(self, path: str, g: Any, active: Any, anew: Any) -> np.ndarray:
        g = np.asarray(g, np.float64)
        for x in (self.m, self.v, self.t):
            x[path] = np.where(anew, 0, x[path])
        t = self.t[path] + 1
        m = B1 * self.m[path] + (1 - B1) * g
        v = B2 * self.v[path] + (1 - B2) * g**2
        self.t[path] = np.where(active, t, self.t[path])
        self.m[path] = np.where(active, m, self.m[path])
        self.v[path] = np.where(active, v, self.v[path])
        return m / (1 - B1**t) / (np.sqrt(v / (1 - B2**t)) + EPS)


def counted(tx: Any) -> tuple[Callable[..., Any], list[int]]:
    traces: list[int] = []

    def update(*args: Any) -> Any:
        traces.append(1)
        return tx.update(*args)

    return jax.jit(update), traces


def first(tx: Any, grads: Any, params: Any = None, **extra: Any) -> Any:
    """Updates and state of the first step, in one program."""
    params = grads if params is None else params
    return jax.jit(lambda g, p: tx.update(g, tx.init(p), p, **extra))(grads, params)


def start(tx: Any, params: Any, mesh: jax.sharding.Mesh) -> Any:
    """A state on a mesh; under Auto axes a compiled one is where the compiler likes."""
    return (jax.jit(tx.init) if mesh.are_all_axes_explicit else tx.init)(params)


@pytest.mark.parametrize(
    ("name", "reset"),
    [
        *((name, "all") for name in CASES),
        *((name, "new") for name in ("layers", "layers-written-out", "columns")),
    ],
)
def test_adam_on_the_active_slices_and_signs_outside(name: str, reset: Any):
    """Against whole moments that are looked at where the choice says."""
    shapes, options = CASES[name]
    every = 2
    tx = subset(ADAM, every=every, reset=reset, outside=jnp.sign, **options)
    params = tree_of(shapes, 0)
    state = jax.jit(tx.init)(params)
    step, traces = counted(tx)
    oracle, before = Oracle(shapes), None
    seen = set()
    for i in range(5):
        grads = tree_of(shapes, 10 + i)
        updates, state = step(grads, state, params)
        active = masks(params, options.get("slices", "layers"), state.choice)
        if i % every:
            chex.assert_trees_all_equal(active, before)
        seen.add(str(state.choice))
        named = dict(leaves_with_paths(grads))
        for path, u in leaves_with_paths(updates):
            g = np.asarray(named[path], np.float64)
            if path not in active:
                want = g
            else:
                on = active[path]
                anew = np.full(g.shape, i % every == 0)
                if reset == "new" and before is not None:
                    anew = on & ~before[path]
                want = np.where(on, oracle.step(path, g, on, anew), np.sign(g))
            np.testing.assert_allclose(u, want, rtol=2e-5, atol=2e-6, err_msg=path)
        before = active
    assert len(seen) > 1 and len(traces) == 1
    assert int(state.rounds) == 3 and int(state.count) == 5


def test_without_reset_moments_stay_in_their_slots():
    params = {"w": {"kernel": np.zeros((6, 3), np.float32)}}
    tx = subset(ADAM, 2, slices="columns", choose=subsets.ascending, reset="none")
    state, inner = jax.jit(tx.init)(params), ADAM.init(jnp.zeros((2, 3)))
    step, adam = jax.jit(tx.update), jax.jit(ADAM.update)
    for i in range(4):
        grads = tree_of({"w/kernel": (6, 3)}, i)
        updates, state = step(grads, state, params)
        at = np.arange(2 * i, 2 * i + 2) % 6
        want, inner = adam(grads["w"]["kernel"][at], inner)
        got = np.asarray(updates["w"]["kernel"])
        np.testing.assert_allclose(got[at], want, rtol=1e-5)
        assert np.count_nonzero(got) == want.size


def test_a_choice_that_returns_goes_on_in_its_slot():
    """Layers 0, 1 then 1, 2: layer 1 keeps its count and its slot."""
    params = {"blocks": np.ones((3, 2), np.float32)}

    def rule(draw: subsets.Draw) -> jax.Array:
        return jnp.where(draw.round == 0, jnp.array([0, 1]), jnp.array([1, 2]))

    tx = subset(ADAM, 2, select="blocks", choose=rule, reset="new")
    state, step = jax.jit(tx.init)(params), jax.jit(tx.update)
    for i in range(2):
        _, state = step(params, state, params)
        assert state.choice["blocks"].tolist() == [[0, 1], [2, 1]][i]
    assert state.inner["blocks"].count.tolist() == [1, 2]


# --- Rules -----------------------------------------------------------------------


def choices(rule: Any, k: int, n: int, steps: int, grads: Any = None) -> np.ndarray:
    tx = subset(ADAM, k, select="blocks", choose=rule)
    grads = {"blocks": np.ones((n, 2), np.float32)} if grads is None else grads

    @jax.jit
    def run(grads: Any) -> jax.Array:
        def step(state: Any, _: Any) -> Any:
            state = tx.update(grads, state)[1]
            return state, state.choice["blocks"]

        return jax.lax.scan(step, tx.init(grads), None, steps)[1]

    return np.asarray(run(grads))


def test_random_choices_are_distinct_and_even():
    found = choices(subsets.at_random, 3, 8, 2000)
    assert (np.diff(found, axis=1) > 0).all()
    share = np.bincount(found.ravel(), minlength=8) / 2000
    sigma = np.sqrt(3 / 8 * 5 / 8 / 2000)
    assert (abs(share - 3 / 8) < 5 * sigma).all()


def test_cyclic_choices_take_turns():
    np.testing.assert_array_equal(
        choices(subsets.ascending, 2, 6, 3), [[0, 1], [2, 3], [4, 5]]
    )
    np.testing.assert_array_equal(
        choices(subsets.descending, 2, 5, 3), [[4, 3], [2, 1], [0, 4]]
    )


def test_choices_by_gradient():
    grads = {"blocks": np.array([[1.0], [5.0], [2.0], [2.0]], np.float32)}
    assert choices(subsets.largest, 1, 4, 1, grads).tolist() == [[1]]
    found = choices(subsets.in_proportion, 1, 4, 3000, grads)
    share = np.bincount(found.ravel(), minlength=4) / 3000
    np.testing.assert_allclose(share, [0.1, 0.5, 0.2, 0.2], atol=0.05)


def test_matrices_and_stacked_layers_draw_apart():
    params = tree_of({"blocks/w": (2, 64, 3), "v": (64, 3)}, 0)
    tx = subset(ADAM, 8, slices="columns", select=["blocks*", "v"])
    state = first(tx, params)[1]
    drawn = [*state.choice["blocks"]["w"].tolist(), state.choice["v"].tolist()]
    assert len({str(x) for x in drawn}) == 3


def test_a_rule_sees_extra_arguments_and_another_seed_draws_anew():
    params = {"blocks": np.ones((16, 2), np.float32)}

    def rule(draw: subsets.Draw) -> jax.Array:
        return draw.extra["layers"]

    tx = subset(ADAM, 2, select="blocks", choose=rule)
    _, state = first(tx, params, layers=jnp.array([3, 9]))
    assert state.choice["blocks"].tolist() == [3, 9]
    drawn = [
        first(tx, params)[1].choice["blocks"].tolist()
        for tx in (subset(ADAM, 4, select="blocks", key=key) for key in (0, 0, 1))
    ]
    assert drawn[0] == drawn[1] != drawn[2]


# --- Knowing the choice before the gradient --------------------------------------


@pytest.mark.parametrize(
    ("name", "reset"), [("layers", "all"), ("layers-written-out", "new")]
)
def test_the_upcoming_choice_is_the_next_one(name: str, reset: Any):
    shapes, options = CASES[name]
    params = tree_of(shapes, 0)
    tx = subset(ADAM, every=2, reset=reset, **options)
    state = jax.jit(tx.init)(params)
    ask = jax.jit(
        lambda state: subsets.upcoming(state, params, every=2, reset=reset, **options)
    )
    step = jax.jit(tx.update)
    for _ in range(3):
        told = ask(state)
        state = step(params, state, params)[1]
        chex.assert_trees_all_equal([*told.values()], jax.tree.leaves(state.choice))
    with pytest.raises(ValueError, match=r"looks at their gradients.*at_random"):
        subsets.upcoming(state, params, choose=subsets.largest, **options)


@pytest.mark.parametrize("written_out", [False, True])
def test_gradients_of_the_chosen_layers_alone(written_out: bool):
    """They give the updates of whole gradients, which are never formed."""
    params: Any = tree_of({"ends": (3,), "layers": (4, 3, 3)}, 0)
    if written_out:
        params["layers"] = [*params["layers"]]
    parts = Layered(
        before=lambda params, batch: batch * params["ends"][None],
        block=lambda w, x, batch: jnp.tanh(x @ w),
        after=lambda params, x, batch: jnp.sum(jnp.square(x)),
    )
    grad = layered_value_and_grad(parts)
    options: Any = {"k": 2, "every": 2, "reset": "new", "select": "layers*"}
    tx = subset(ADAM, rest=ADAM, **options)
    batch = np.arange(6, dtype=np.float32).reshape(2, 3)

    @jax.jit
    def step(params: Any, states: Any) -> Any:
        (chosen,) = subsets.upcoming(states[0], params, **options).values()
        found = grad(params, batch, chosen=chosen)[1]
        some = dict(found.rest)
        some["layers"] = [found.layers, *[None] * 3] if written_out else found.layers
        whole = grad(params, batch)[1]
        pairs = [
            tx.update(g, state, params)
            for g, state in zip((some, whole), states, strict=True)
        ]
        (got, want), states = zip(*pairs, strict=True)
        return optax.apply_updates(params, got), states, got, want, some

    states = (jax.jit(tx.init)(params),) * 2
    for _ in range(3):
        params, states, got, want, some = step(params, states)
        chex.assert_trees_all_close(got, want, rtol=1e-5)
        assert any(np.any(x) for x in jax.tree.leaves(got["layers"]))
    with pytest.raises(ValueError, match="outside= moves the others by theirs"):
        tx = subset(ADAM, outside=jnp.sign, **options)
        jax.eval_shape(tx.update, some, states[0], params)


# --- Where the state lives, and of what ------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_the_state_has_the_size_of_the_choice(name: str):
    shapes, options = CASES[name]
    params = tree_of(shapes, 0, jnp.bfloat16)
    tx = subset(ADAM, reset="all", **options)
    state = jax.eval_shape(tx.init, params)
    choice = jax.jit(tx.init)(params).choice
    active = masks(params, options.get("slices", "layers"), choice)
    want = sum(int(mask.sum()) for mask in active.values())
    if name == "leaves-unlike":
        want = 2 * 25  # slots of the largest
    for moment in (state.inner.mu, state.inner.nu):
        leaves = jax.tree.leaves(moment)
        assert sum(x.size for x in leaves) == want
        assert {x.dtype for x in leaves} == {jnp.dtype("float32")}
    updates, after = jax.eval_shape(tx.update, params, state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)


def test_moments_of_narrow_parameters_do_not_round():
    """A second moment in bfloat16 would never leave its first value."""
    params = {"blocks": np.ones((2, 4), jnp.bfloat16)}
    tx = subset(ADAM, 1, select="blocks", choose=subsets.ascending, every=99)
    state, step = jax.jit(tx.init)(params), jax.jit(tx.update)
    for _ in range(50):
        updates, state = step(params, state, params)
    assert updates["blocks"].dtype == jnp.bfloat16
    np.testing.assert_allclose(state.inner.nu["blocks"], 1 - B2**50, rtol=1e-5)


SPECS = {
    "blocks/norm/scale": jax.P(),
    "blocks/query/kernel": jax.P("data", None, "model"),
    "blocks/up/kernel": jax.P(None, "data", "model"),
    "embed/embedding": jax.P(),
    "out/kernel": jax.P("model", None, "data"),
}


@pytest.mark.parametrize(
    ("mesh", "slices"),
    [
        ("explicit", "layers"),
        ("explicit", "columns"),
        ("auto", "rows"),
        ("auto", "entries"),
    ],
    indirect=["mesh"],
)
def test_on_a_mesh(mesh: jax.sharding.Mesh, slices: str):
    """One device's numbers, and a state that a step leaves where it was."""
    options = {**CASES[slices][1], "every": 2, "reset": "new", "outside": jnp.sign}
    if slices == "layers":
        # Written out: `blocks` shall not depend on the norm that tells the layers.
        options["select"] = "blocks*"
    tx = subset(ADAM, **options)
    params, grads = tree_of(STACKED, 0), tree_of(STACKED, 1)
    state, step = jax.jit(tx.init)(params), jax.jit(tx.update)
    want = []
    for _ in range(3):
        updates, state = step(grads, state, params)
        want.append(updates)

    def place(tree: Any) -> Any:
        return wlab.core.map_with_path(
            lambda p, x: jax.device_put(x, jax.NamedSharding(mesh, SPECS[p])), tree
        )

    with jax.set_mesh(mesh):
        params, grads = place(params), place(grads)
        state = start(tx, params, mesh)
        chex.assert_trees_all_equal(jax.jit(tx.init)(params).choice, state.choice)
        step = jax.jit(tx.update)
        for i in range(3):
            updates, after = step(grads, state, params)
            chex.assert_trees_all_close(updates, want[i], rtol=1e-5, atol=1e-6)
            for x, y in zip(
                jax.tree.leaves(after), jax.tree.leaves(state), strict=True
            ):
                assert x.sharding.is_equivalent_to(y.sharding, x.ndim), (x.shape, i)
            for (p, u), g in zip(
                leaves_with_paths(updates), jax.tree.leaves(grads), strict=True
            ):
                assert u.sharding.is_equivalent_to(g.sharding, u.ndim), p
            state = after


@pytest.mark.parametrize(
    ("mesh", "slices"),
    [
        *(("explicit", slices) for slices in ("layers", "columns", "rows")),
        ("auto", "columns"),
    ],
    indirect=["mesh"],
)
def test_a_mesh_moves_the_active_slices_alone(mesh: jax.sharding.Mesh, slices: str):
    """One sum over the devices that hold parts of them, whatever axis is divided.

    And one gather, where the state is divided along another axis than they came from.
    Under Auto axes it is the compiler who decides how, and it may turn the leaf's own
    part instead.
    """
    spec, active = {
        "layers": (jax.P("data", None, "model"), 2 * 64 * 2 * 16),
        "columns": (jax.P(None, "data"), 8 * 2 * 4 * 16),
        "rows": (jax.P(None, None, "data"), 8 * 2 * 64),
    }[slices]
    tx = subset(ADAM, 2, slices=slices, select="query*", every=2, outside=jnp.sign)
    with jax.set_mesh(mesh):
        w = np.ones((8, 64, 4, 16), np.float32)
        w = jax.device_put(w, jax.NamedSharding(mesh, spec))
        params = {"query": {"kernel": w}}
        state = start(tx, params, mesh)
        text = jax.jit(tx.update).lower(params, state).compile().as_text()
    sent = sum(c.sent for c in collectives(text, 8))
    auto = mesh.axis_types[0] == jax.sharding.AxisType.Auto
    turned = 3 / 4 * w.nbytes / 4 if auto else 0
    assert sent < 3 * 3 / 4 * 4 * active + turned + 200


@pytest.mark.parametrize(
    ("mesh", "slices", "k", "given", "held"),
    [
        ("explicit", "layers", 4, ("data", None, "model"), ("data", None, "model")),
        ("explicit", "columns", 4, (None, "data", "model"), (None, "data", "model")),
        ("explicit", "rows", 4, (None, "model", "data"), (None, "data", "model")),
        # Three do not divide by four devices, but the other axis does.
        ("explicit", "columns", 3, (None, "data", None), (None, None, "data")),
        ("auto", "columns", 3, (None, "data", "model"), (None, None, "model")),
    ],
    indirect=["mesh"],
)
def test_a_device_holds_its_share_of_the_state(
    mesh: Any, slices: str, k: int, given: Any, held: Any
):
    tx = subset(ADAM, k, slices=slices, select="up*", every=2)
    with jax.set_mesh(mesh):
        w = np.ones((8, 16, 24), np.float32)
        w = jax.device_put(w, jax.NamedSharding(mesh, jax.P(*given)))
        params = {"up": {"kernel": w}}
        state = start(tx, params, mesh)
        _, after = jax.jit(tx.update)(params, state, params)
    want = jax.NamedSharding(mesh, jax.P(*held))
    for each in (state, after):
        mu = each.inner.mu["up"]["kernel"]
        assert mu.sharding.is_equivalent_to(want, 3), mu.sharding


def test_under_vmap():
    tx = subset(ADAM, **CASES["columns"][1], reset="new", outside=jnp.sign)
    trees = [tree_of(STACKED, seed) for seed in (0, 1)]

    def stacked(trees: Any) -> Any:
        return jax.tree.map(lambda *x: jnp.stack(x), *trees)

    def step(x: Any) -> Any:
        updates, state = tx.update(x, tx.init(x), x)
        return updates, state.choice

    @jax.jit
    def both(trees: Any) -> Any:
        return jax.vmap(step)(stacked(trees)), stacked([step(x) for x in trees])

    got, want = both(trees)
    chex.assert_trees_all_close(got[0], want[0], rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_equal(got[1], want[1])


# --- What is in no pool ----------------------------------------------------------


def test_the_rest_has_its_own_transform_and_narrow_leaves_wide_state():
    params = tree_of({"blocks/w": (3, 2), "head": (4,)}, 0, jnp.bfloat16)
    tx = subset(ADAM, 1, select="blocks*", rest=optax.trace(0.9))
    state, step = jax.jit(tx.init)(params), jax.jit(tx.update)
    assert state.rest.trace["head"].dtype == jnp.float32
    for _ in range(2):
        updates, state = step(params, state, params)
    np.testing.assert_allclose(
        np.asarray(updates["head"], np.float32),
        1.9 * np.asarray(params["head"], np.float32),
        rtol=1e-2,
    )


def test_structured_weights_stay_outside():
    grads = tree_of({"blocks/w": (3, 4, 4), "head/kernel": (4, 4)}, 0)
    eco = wlab.optim.eco_sgd(0.1, grid="int8")

    @jax.jit
    def steps(grads: Any) -> Any:
        params = {**grads}
        params["head"] = {"kernel": wlab.quant.quantize(jnp.eye(4), "int8", axis=-1)}
        tx = subset(ADAM, 1, select="blocks*", rest=eco)
        updates, _ = tx.update(grads, tx.init(params), params)
        head = {"head": params["head"]}
        want, _ = eco.update({"head": grads["head"]}, eco.init(head), head)
        passing = subset(ADAM, 1, select="blocks*")
        passed, _ = passing.update(updates, passing.init(params), params)
        return params, updates["head"], passed["head"], want["head"]

    params, got, passed, want = steps(grads)
    chex.assert_trees_all_equal(got, want)
    chex.assert_trees_all_equal(passed, want)
    with pytest.raises(TypeError, match=r"'head/kernel'.*Quantized.*select="):
        tx = subset(ADAM, 1, slices="columns", select="head*")
        jax.eval_shape(tx.init, params)


def test_a_frozen_leaf_has_no_gradient_and_no_update():
    params = {"blocks": np.ones((4, 2), np.float32), "frozen": np.ones(3, np.float32)}
    tx = subset(ADAM, 2, select="blocks")
    updates, _ = first(tx, {**params, "frozen": None}, params)
    assert updates["frozen"] is None and np.count_nonzero(updates["blocks"]) == 4


def test_masked_trees_are_smaller_trees():
    params = {"blocks": np.ones((4, 2), np.float32), "other": np.ones(3, np.float32)}
    tx = optax.masked(
        subset(ADAM, 2, select="blocks"), {"blocks": True, "other": False}
    )
    updates, _ = first(tx, params)
    np.testing.assert_array_equal(updates["other"], params["other"])
    assert np.count_nonzero(updates["blocks"]) == 4


# --- Bad input -------------------------------------------------------------------


PARAMS = tree_of(STACKED, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 5}, r"'blocks\[4\]' .*k=5 of 4 slices.*at most 4"),
        ({"k": 5, "slices": "columns"}, r"'blocks/query/kernel' .*\(4, 4, 2, 3\): k=5"),
        ({"k": 0}, "would never move.*outside="),
        ({"k": -1}, "k=-1 must not be negative"),
        ({"k": 1, "every": 0}, "every=0 must be at least 1"),
        ({"k": 1, "reset": "some"}, "reset 'some' is none of"),
        ({"k": 1, "select": "layers*"}, "pattern 'layers\\*' matches no leaf"),
        (
            {"k": 1, "slices": "rows", "select": "*scale"},
            r"'blocks/norm/scale' of shape \(4, 4\) is no matrix and has no rows",
        ),
        (
            {"k": 1, "choose": lambda draw: jnp.arange(draw.size)},
            r"chose int32 of shape \(4,\) for 'blocks\[4\]'; it must return draw.k=1",
        ),
        ({"k": 1, "choose": lambda draw: draw.norms[:1]}, "chose float32"),
    ],
)
def test_bad_arguments_are_told(options: dict[str, Any], message: str):
    def use() -> None:
        first(subset(ADAM, **options), PARAMS)

    with pytest.raises(ValueError, match=message):
        use()


@pytest.mark.parametrize(
    ("shapes", "select", "message"),
    [
        (UNLIKE, None, r"no stack of layers.*near: a/kernel \(4, 6\).*select="),
        ({"a": ()}, "a", "'a' is a scalar and no stack"),
        (
            {"blocks_0/w": (2, 3), "blocks_1/w": (3, 3)},
            "blocks*",
            r"2 layers blocks_\* are not alike.*'blocks_1/w' \(3, 3\).*'leaves'",
        ),
    ],
)
def test_trees_without_such_layers_are_told(shapes: Any, select: Any, message: str):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(subset(ADAM, 1, select=select).init, tree_of(shapes, 0))


def test_gradients_that_do_not_fit_are_told():
    tx = subset(ADAM, 2)
    state = jax.eval_shape(tx.init, PARAMS)
    grads = functools.partial(tree_of, seed=0)
    wrong = grads({**STACKED, "blocks/up/kernel": (3, 4, 6)})
    with pytest.raises(ValueError, match=r"'blocks/up/kernel' is of shape \(3, 4, 6\)"):
        jax.eval_shape(tx.update, wrong, state, PARAMS)
    missing = {**PARAMS, "blocks": {**PARAMS["blocks"], "up": {"kernel": None}}}
    with pytest.raises(ValueError, match="'blocks/up/kernel' is missing"):
        jax.eval_shape(tx.update, missing, state, PARAMS)
