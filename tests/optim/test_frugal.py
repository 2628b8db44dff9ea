# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""FRUGAL: its invariants, its memory, its neighbours, and bad input."""

import functools
import math
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import wlab
from tests import parity
from tests.parity import frugal as reference
from wlab.core import leaves_with_paths, subsets
from wlab.optim import frugal, mup, scale_by_frugal

SLICED = ("columns", "rows", "randk")
BASES = ("svd", "random")
ALL = ("block", *SLICED, "permutation", *BASES)

# Four hidden kernels of one shape, a convolution, attention, and what is not hidden.
SHAPES = {
    **{f"layers_{i}/up/kernel": (8, 12) for i in range(4)},
    "layers_0/up/bias": (12,),
    "conv/kernel": (3, 3, 4, 8),
    "attention/query/kernel": (8, 2, 4),
    "attention/out/kernel": (2, 4, 8),
    "embed/embedding": (11, 8),
    "head/kernel": (8, 11),
}
FEW = {p: s for p, s in SHAPES.items() if not p.startswith(("layers_", "conv"))}
HIDDEN = [p for p in SHAPES if p.endswith("kernel") and p != "head/kernel"]


def tree(seed: int, shapes: Any = None) -> dict[str, np.ndarray]:
    """Leaves by their path, which is a tree as well as a nested one is."""
    rng = np.random.default_rng(seed)
    return {
        path: rng.normal(size=shape).astype(np.float32)
        for path, shape in sorted((shapes or SHAPES).items())
    }


def train(tx: Any, steps: int, params: Any = None) -> tuple[list[Any], list[Any]]:
    """The updates of each step and the states after it; gradients are of seed 10 on."""
    params = tree(0) if params is None else params
    shapes = {path: x.shape for path, x in params.items()}
    grads = [tree(10 + i, shapes) for i in range(steps)]

    def step(carry: Any, grads: Any) -> Any:
        params, state = carry
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), (updates, state)

    @jax.jit
    def run(params: Any, grads: Any) -> Any:
        grads = jax.tree.map(lambda *x: jnp.stack(x), *grads)
        _, out = jax.lax.scan(step, (params, tx.init(params)), grads)
        return [jax.tree.map(lambda x: x[i], out) for i in range(steps)]  # noqa: B023

    updates, states = zip(*run(params, grads), strict=True)
    return [*updates], [*states]


def few(projection: str) -> Any:
    """Parameters with no more kernels than it takes."""
    return tree(0, SHAPES if projection == "block" else FEW)


def bytes_of(tree: Any) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(tree))


# --- Against the authors' code ---------------------------------------------------


@functools.cache
def golden() -> dict[str, np.ndarray]:
    with np.load(parity.golden("frugal")) as file:
        return dict(file)


def worst(got: Any, tag: str) -> float:
    """Largest difference over largest magnitude, of all parameters of a run."""
    names = [f"out{i}" for i in reference.TENSORS]
    pairs = zip([f"p{i}" for i in reference.TENSORS], names, strict=True)
    return max(
        np.abs(np.asarray(got[p]) - golden()[f"{tag}_{name}"]).max()
        / np.abs(golden()[f"{tag}_{name}"]).max()
        for p, name in (*pairs, ("b", "outb"))
    )


@pytest.mark.parametrize("tag", ["col_keep", "randk_no", "svd_sign", "block_desc"])
def test_the_authors_runs_in_float32(tag: str):
    params, _ = reference.trajectory(golden(), tag, jnp.float32)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    assert worst(params, tag) < 2e-6


def test_own_singular_vectors_span_the_authors_space():
    with jax.enable_x64(True):
        params, bases = reference.trajectory(golden(), "svd_sign", reset=True)
        assert worst(params, "svd_sign") < 1e-6
        for i in reference.TENSORS:
            mine, theirs = np.asarray(bases[f"p{i}"]), golden()[f"svd_basis{i}"]
            theirs = np.swapaxes(theirs, 1, 2)
            # Directions in columns where the inputs are the smaller side, else in rows.
            if mine.shape[1] < mine.shape[2]:
                mine, theirs = (np.swapaxes(x, 1, 2) for x in (mine, theirs))
            projectors = [x @ np.swapaxes(x, 1, 2) for x in (mine, theirs)]
            np.testing.assert_allclose(*projectors, rtol=0, atol=5e-5)


def test_signs_of_singular_vectors_do_not_matter():
    flipped = dict(golden())
    for i in reference.TENSORS:
        flipped[f"svd_basis{i}"] = -flipped[f"svd_basis{i}"]
    with jax.enable_x64(True):
        params, _ = reference.trajectory(flipped, "svd_sign")
    assert worst(params, "svd_sign") < 1e-12


# --- What a step is --------------------------------------------------------------


@pytest.mark.parametrize("projection", ["block", "columns", "rows", "randk"])
def test_all_active_is_adamw(projection: Any):
    tx = frugal(1e-2, 1.0, 99, weight_decay=0.1, projection=projection)
    want, _ = train(optax.adamw(1e-2, weight_decay=0.1), 3, few(projection))
    got, _ = train(tx, 3, few(projection))
    chex.assert_trees_all_close(got, want, rtol=1e-5, atol=1e-7)


def test_density_zero_is_signsgd_on_hidden_kernels_and_adam_elsewhere():
    got, states = train(frugal(1e-2, 0), 2)
    want, _ = train(optax.adam(1e-2), 2)
    signs, _ = train(optax.sign_sgd(1e-2), 2)
    for path in SHAPES:
        right = signs if path in HIDDEN else want
        for a, b in zip(got, right, strict=True):
            np.testing.assert_allclose(a[path], b[path], rtol=1e-5, atol=1e-8)
    assert not jax.tree.leaves(states[0][0].inner[0].mu)


def plain(projection: Any, inactive: Any, **options: Any) -> Any:
    """What is projected, or what is left, without any optimiser's doing."""
    return scale_by_frugal(
        0.5,
        2,
        projection=projection,
        inactive=inactive,
        inner=optax.identity(),
        rest=optax.identity(),
        **options,
    )


@pytest.mark.parametrize("projection", ALL)
def test_the_two_parts_make_the_gradient_and_are_orthogonal(projection: Any):
    whole, _ = train(plain(projection, "sgd"), 2, few(projection))
    part, _ = train(plain(projection, "none"), 2, few(projection))
    shapes = {path: u.shape for path, u in whole[0].items()}
    for i in range(2):
        grads = tree(10 + i, shapes)
        exact = 0 if projection not in BASES else 5e-6
        chex.assert_trees_all_close(whole[i], grads, rtol=exact, atol=exact)
        for path in shapes:
            if path not in HIDDEN:
                chex.assert_trees_all_equal(part[i][path], grads[path])
                continue
            found = np.asarray(part[i][path])
            assert abs(np.vdot(grads[path] - found, found)) < 1e-4, path
            if projection != "block":
                assert np.linalg.norm(found) > 0.1, path


@pytest.mark.parametrize("projection", ["block", *SLICED])
def test_without_a_rule_the_rest_of_a_kernel_only_decays(projection: Any):
    tx = frugal(1e-2, 0.5, weight_decay=0.1, projection=projection, inactive="none")
    params = few(projection)
    (got,), _ = train(tx, 1, params)
    for path in (path for path in params if path in HIDDEN):
        still = np.isclose(got[path], -1e-3 * params[path], rtol=1e-6, atol=0)
        if projection == "block":
            assert still.all() or not still.any()
        else:
            assert still.sum() == still.size / 2, path


@pytest.mark.parametrize("projection", ["block", *SLICED, "permutation"])
def test_steps_after_a_new_choice_are_as_large_as_signs(projection: Any):
    """The moments and the bias correction begin anew: m / sqrt(v) is a sign."""
    tx = frugal(
        1e-2, 0.5, 2, proj_lr_scale=0.5, inactive_lr_scale=0.1, projection=projection
    )
    got, _ = train(tx, 3, few(projection))
    hidden = [path for path in got[0] if path in HIDDEN]
    seen = []
    for updates in got:
        sizes = np.concatenate([np.abs(updates[path]).ravel() for path in hidden])
        seen.append({*np.round(sizes.astype(float), 6).tolist()})
    assert seen[0] == seen[2] == {0.0005, 0.005}
    assert len(seen[1]) > 2  # the second step of Adam is no sign


@pytest.mark.parametrize("projection", BASES)
def test_steps_along_a_new_basis_are_signs_of_its_coordinates(projection: Any):
    tx = frugal(1e-2, 0.5, 2, projection=projection, inactive="none")
    got, _ = train(tx, 3, few(projection))
    for i in (0, 2):
        norm = float(np.linalg.norm(got[i]["attention/query/kernel"]))
        assert norm == pytest.approx(1e-2 * math.sqrt(8 * 4), rel=1e-4)


def test_without_reset_moments_and_count_go_on():
    params = few("columns")
    tx = frugal(1e-2, 0.5, 1, projection="columns", reset=False)
    _, states = train(tx, 3, params)
    assert int(states[-1][0].inner[0].count) == 3
    _, states = train(frugal(1e-2, 0.5, 1, projection="columns"), 3, params)
    assert int(states[-1][0].inner[0].count) == 1
    assert int(states[-1][0].rest.count) == 3


def test_kernels_draw_apart():
    shapes = {f"layers_{i}/up/kernel": (64, 4) for i in range(3)}
    shapes["blocks/norm/scale"], shapes["blocks/up/kernel"] = (3, 4), (3, 64, 4)
    _, states = train(frugal(1e-2, 0.25, projection="columns"), 1, tree(0, shapes))
    rows = [x.reshape(-1, 16) for x in jax.tree.leaves(states[0][0].choice)]
    assert len({str(row) for row in np.concatenate(rows).tolist()}) == 6


def test_decay_is_scaled_by_the_learning_rate_alone_and_schedules_go_on():
    params = few("columns")
    zero = jax.tree.map(np.zeros_like, params)
    mask = {path: path != "head/kernel" for path in params}
    tx = frugal(
        optax.linear_schedule(0.1, 0.0, 4), 0.5, 1, weight_decay=0.1, mask=mask,
        proj_lr_scale=0.5, inactive_lr_scale=0.1, projection="columns",
    )  # fmt: skip
    state, step = jax.jit(tx.init)(params), jax.jit(tx.update)
    for i in range(3):
        updates, state = step(zero, state, params)
        rate = 0.1 * (1 - i / 4)
        for path, w in params.items():
            want = -rate * 0.1 * w * mask[path]
            np.testing.assert_allclose(updates[path], want, rtol=1e-5, atol=1e-9)


def test_other_inner_optimisers():
    for inner, first in (
        ("lion", np.sign),
        ("sgdm", lambda g: g),
        (optax.scale(3.0), lambda g: 3 * g),
    ):
        tx = scale_by_frugal(1.0, inner=inner, projection="rows")
        (got,), _ = train(tx, 1, few("rows"))
        want = jax.tree.map(first, tree(10, FEW))
        chex.assert_trees_all_close(got, want, rtol=1e-6)
    tx = scale_by_frugal(1.0, inner="sgdm", b1=0.5, rest=optax.scale(7.0))
    got, _ = train(tx, 2, few("columns"))
    grads = [tree(seed, FEW) for seed in (10, 11)]
    for path, rest, kept in (("head/kernel", 7, 0), ("attention/out/kernel", 1, 0.5)):
        want = rest * grads[1][path] + kept * grads[0][path]
        np.testing.assert_allclose(got[1][path], want, rtol=1e-5, atol=1e-6)


# --- Which is chosen -------------------------------------------------------------


def active_layers(states: Any) -> list[list[int]]:
    return [np.sort(state[0].choice["layers_0/up/kernel"]).tolist() for state in states]


@pytest.mark.parametrize(
    ("order", "want"),
    [
        ("descending", [[2, 3], [0, 1], [2, 3]]),
        ("ascending", [[0, 1], [2, 3], [0, 1]]),
        ("mirror", [[0, 3], [1, 2], [0, 3]]),
        (subsets.largest, None),
    ],
)
def test_orders_of_blocks(order: Any, want: Any):
    """In turn, each kernel once in a cycle; the loudest where the rule says so."""
    got, states = train(frugal(1e-2, 0.5, 1, order=order), 3)
    del got
    if want is None:
        want = []
        for i in range(3):
            norms = [np.linalg.norm(tree(10 + i)[p]) for p in HIDDEN[:4]]
            want.append(sorted(np.argsort(norms)[2:].tolist()))
    assert active_layers(states) == want


def test_random_blocks_change_and_another_seed_is_another_draw():
    runs = [
        active_layers(train(frugal(1e-2, 0.5, 1, key=key), 6)[1]) for key in (0, 0, 1)
    ]
    assert runs[0] == runs[1] != runs[2]
    assert len({str(x) for x in runs[0]}) > 1


def test_selected_leaves_and_those_given_a_view():
    tx = frugal(1e-2, 0.25, projection="columns", select=["*up/kernel", "embed*"])
    state = jax.eval_shape(tx.init, tree(0))[0]
    held = {path for path, _ in leaves_with_paths(state.inner[0].mu)}
    assert held == {*HIDDEN[:4], "embed/embedding"}


# --- Memory ----------------------------------------------------------------------


def wide() -> dict[str, np.ndarray]:
    shapes = {f"layers_{i}/up/kernel": (64, 128) for i in range(4)}
    return tree(
        0, {**shapes, "blocks/norm/scale": (4, 8), "blocks/a/kernel": (4, 64, 96)}
    )


@pytest.mark.parametrize("projection", ALL)
def test_state_in_bytes(projection: Any):
    """8 bytes for each active number, and what says which they are."""
    params = wide()
    hidden = 4 * 64 * 128 + 4 * 64 * 96
    tx = frugal(1e-2, 0.25, projection=projection)
    state = jax.eval_shape(tx.init, params)
    choice = {
        "block": 4 * (1 + 1),
        "columns": 4 * 16 * (4 + 4),
        "rows": 4 * 4 * (32 + 24),
        "randk": hidden // 4 * 4,
        "permutation": 4 * 16 * (4 + 4),
        "svd": 4 * 64 * 16 * (4 + 4),
        "random": 4 * 64 * 16 * (4 + 4),
    }[projection]
    moments = 8 * (hidden // 4 + 4 * 8)
    scalars = 4 * 5  # counts of steps, rounds, Adam twice, and the schedule's none
    found = sum(
        x.size * x.dtype.itemsize
        for x in jax.tree.leaves(state)
        if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    )
    assert found - moments - choice in range(scalars + 1)
    # The compiled step takes and gives no more than that, and makes nothing dense.
    step = jax.jit(tx.update, donate_argnums=1)
    memory = step.lower(params, state, params).compile().memory_analysis()
    dense = bytes_of(params)
    # Without decay the parameters are not read, and are no arguments.
    assert memory.argument_size_in_bytes - dense - found in range(64)
    assert memory.output_size_in_bytes - dense - found in range(2048)
    if projection in ("block", "columns", "rows", "permutation"):
        assert memory.temp_size_in_bytes < 1.6 * dense


def test_moments_are_float32_for_narrow_parameters():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree(0))
    for projection in ("columns", "svd"):
        tx = frugal(1e-2, 0.5, projection=projection)
        state = jax.eval_shape(tx.init, params)
        dtypes = {x.dtype for x in jax.tree.leaves(state[0].inner[0].mu)}
        assert dtypes == {jnp.dtype("float32")}


# --- Meshes, wrappers and chains -------------------------------------------------


@pytest.mark.parametrize(
    ("mesh", "projection"),
    [
        ("auto", "randk"),
        ("explicit", "permutation"),
        ("auto", "svd"),
        ("explicit", "random"),
    ],
    indirect=["mesh"],
)
def test_on_a_mesh(mesh: jax.sharding.Mesh, projection: Any):
    shapes = {"up/kernel": (8, 12), "blocks/norm/scale": (4, 8)}
    shapes |= {"blocks/query/kernel": (4, 8, 2, 3)}
    specs = {"up/kernel": jax.P("data", "model"), "blocks/norm/scale": jax.P()}
    specs |= {"blocks/query/kernel": jax.P("data", None, "model")}
    # The size along singular vectors depends on none of their signs.
    tx = frugal(1e-2, 0.25, 2, projection=projection)
    params, grads = tree(0, shapes), tree(1, shapes)
    state = jax.jit(tx.init)(params)
    step = jax.jit(tx.update)
    want, state = step(grads, state, params)
    want, _ = step(grads, state, params)
    with jax.set_mesh(mesh):
        params, grads = (
            {
                path: jax.device_put(x, jax.NamedSharding(mesh, specs[path]))
                for path, x in some.items()
            }
            for some in (params, grads)
        )
        # Where a compiled one puts its zeros under Auto axes is the compiler's choice.
        explicit = mesh.are_all_axes_explicit
        state = (jax.jit(tx.init) if explicit else tx.init)(params)
        step = jax.jit(tx.update)
        _, after = step(grads, state, params)
        got, after = step(grads, after, params)
    chex.assert_trees_all_close(got, want, rtol=1e-3, atol=1e-6)
    for x, y in zip(jax.tree.leaves(after), jax.tree.leaves(state), strict=True):
        assert x.sharding.is_equivalent_to(y.sharding, x.ndim), x.shape


def test_injected_gap_and_a_density_that_must_not_be():
    make = optax.inject_hyperparams(frugal, static_args=("density", "reset"))
    tx = make(learning_rate=1e-2, density=0.5, update_gap=2, reset=True)
    got, states = train(tx, 3, few("columns"))
    want, _ = train(frugal(1e-2, 0.5, 2), 3, few("columns"))
    chex.assert_trees_all_close(got, want, rtol=1e-5, atol=1e-8)
    assert int(states[-1].hyperparams["update_gap"]) == 2
    with pytest.raises(TypeError, match=r"density=.*static_args="):
        jax.eval_shape(
            optax.inject_hyperparams(frugal)(1e-2, density=0.5).init, tree(0)
        )


@pytest.mark.parametrize("projection", ["block", "columns"])
def test_chain_with_mup(projection: Any):
    """Each leaf has its own decay and learning rate, behind the compact moments."""
    params, base = tree(0, mup_shapes(8)), tree(0, mup_shapes(4))
    classes = mup.classify(params, base)
    tx = optax.chain(
        scale_by_frugal(0.5, 2, projection=projection),
        mup.add_decayed_weights(0.5, classes),
        mup.scale_by_mup(classes),
        optax.scale_by_learning_rate(0.1),
    )
    state, update = jax.jit(tx.init)(params), jax.jit(tx.update)
    zero = jax.tree.map(np.zeros_like, params)
    decays, _ = update(zero, state, params)
    # Twice as wide: half the rate, and decay times the root of two.
    np.testing.assert_allclose(
        decays["layers_0/up/kernel"],
        -0.1 / 2 * 0.5 * math.sqrt(2) * params["layers_0/up/kernel"],
        rtol=1e-5,
    )
    np.testing.assert_array_equal(decays["embed/embedding"], 0)
    updates, _ = update(tree(1, mup_shapes(8)), state, params)
    for path, size in (("layers_0/up/kernel", 0.05), ("embed/embedding", 0.1)):
        moved = np.asarray(updates[path]) - np.asarray(decays[path])
        np.testing.assert_allclose(np.abs(moved), size, rtol=1e-4)


def mup_shapes(width: int) -> dict[str, tuple[int, ...]]:
    shapes = {f"layers_{i}/up/kernel": (width, 2 * width) for i in range(2)}
    return {**shapes, "embed/embedding": (22, width)}


# --- Bad input -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 1.1}, r"density=1\.1 must lie between 0 and 1"),
        ({"density": -0.1}, "must lie between 0 and 1"),
        ({"density": 0, "inactive": "none"}, "would leave the projected kernels"),
        ({"update_gap": 0}, "update_gap=0 must be at least 1"),
        ({"projection": "tiles"}, "projection 'tiles' is none of block, columns"),
        ({"inactive": "off"}, "inactive 'off' is none of"),
        ({"inner": "adagrad"}, "inner 'adagrad' is none of"),
        ({"order": "first"}, "order 'first' is none of random"),
        ({"projection": "svd", "order": "mirror"}, "has a basis: leave it out"),
        ({"select": "blocks*"}, r"pattern 'blocks\*' matches no leaf"),
        (
            {"projection": "columns", "select": "*bias"},
            r"'layers_0/up/bias' of shape \(12,\) is no matrix",
        ),
        ({"projection": "svd", "select": "*bias"}, r"'layers_0/up/bias'.*is no matrix"),
        (
            {"projection": "columns", "inactive": "none", "density": 0.1},
            r"'attention/out/kernel' of shape \(2, 4, 8\): none of its 8 slices",
        ),
        ({"order": "mirror", "density": 0.25}, "takes pairs, and 1 of 4 slices"),
    ],
)
def test_bad_arguments_are_told(options: dict[str, Any], message: str):
    def use() -> None:
        tx = frugal(1e-2, **options)
        jax.eval_shape(lambda p: tx.update(p, tx.init(p), p), tree(0))

    with pytest.raises(ValueError, match=message):
        use()


def test_trees_without_hidden_kernels_or_with_too_few_layers_are_told():
    with pytest.raises(ValueError, match=r"no leaf to project.*select="):
        frugal(1e-2).init(tree(0, {"norm/scale": (3,)}))
    stack = tree(0, {"blocks/norm/scale": (3, 4), "blocks/up/kernel": (3, 4, 4)})
    with pytest.raises(ValueError, match=r"'blocks/up/kernel'.*its 3 layers is none"):
        frugal(1e-2, 0.1).init(stack)
    packed = {"up": {"kernel": wlab.quant.quantize(jnp.eye(4), "int8", axis=-1)}}
    with pytest.raises(TypeError, match=r"'up/kernel'.*Quantized"):
        frugal(1e-2, projection="columns").init(packed)
