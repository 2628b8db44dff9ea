# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""ECO: its invariants, its memory, and what it does with bad input."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import wlab
from tests import parity
from wlab.quant import Quantized, quantize_tree

SHAPES = {
    "blocks_0/attention/query/kernel": (8, 2, 3),
    "blocks_0/attention/out/kernel": (2, 3, 8),
    "blocks_0/mlp/up/kernel": (8, 11),
}


pack = jax.jit(quantize_tree, static_argnames=("grid", "granularity"))
dense = jax.jit(wlab.materialise)


def normal(rng: np.random.Generator, *shape: int) -> jax.Array:
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


@pytest.fixture
def params() -> Any:
    """A small transformer's kinds of leaves, off the grid."""
    rng = np.random.default_rng(0)
    block: dict[str, Any] = {}
    for path, shape in SHAPES.items():
        *parts, leaf = path.split("/")[1:]
        node = block
        for part in parts:
            node = node.setdefault(part, {})
        node[leaf] = normal(rng, *shape)
    block["attention_norm"] = {"scale": jnp.ones(8)}
    block["mlp"]["up"]["bias"] = jnp.zeros(11)
    return {
        "blocks_0": block,
        "embed": {"embedding": normal(rng, 13, 8)},
        "head": {"kernel": normal(rng, 8, 13)},
    }


def train(tx: Any, params: Any, steps: int = 5) -> tuple[Any, Any]:
    """Parameters and state after a run, in one program."""
    rng = np.random.default_rng(1)
    grads = jax.tree.map(
        lambda w: rng.normal(size=(steps, *w.shape)).astype(w.dtype),
        jax.eval_shape(wlab.materialise, params),
    )

    def step(carry: Any, grads: Any) -> Any:
        params, state = carry
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    @jax.jit
    def run(params: Any, grads: Any) -> Any:
        return jax.lax.scan(step, (params, tx.init(params)), grads)[0]

    return run(params, grads)


# --- Against the reference -------------------------------------------------------


@pytest.mark.parametrize("form", ["packed", "dense"])
@pytest.mark.parametrize("grid", ["fp8", "int4"])
@pytest.mark.parametrize("optimiser", ["sgdm", "adam", "adamw_wd", "sgdmw_virtual"])
def test_the_transform_follows_the_reference(optimiser: str, grid: str, form: str):
    """The same trajectories through `tx.update` and `optax.apply_updates`."""
    with jax.enable_x64(True):
        with np.load(parity.golden("eco")) as file:
            golden = dict(file)
        lr, b1, b2, eps, wd = golden["hyper"].tolist()
        name = {"fp8": "fp8_e4m3", "int4": "int4"}[grid]
        granularity = {"fp8": "row", "int4": "tensor"}[grid]
        make = {
            "sgdm": lambda **k: wlab.optim.eco_sgd(lr, b1, **k),
            "adam": lambda **k: wlab.optim.eco(lr, b1, b2, eps, **k),
            "adamw_wd": lambda **k: wlab.optim.eco(
                lr, b1, b2, eps, wd, injection="decayed", **k
            ),
            "sgdmw_virtual": lambda **k: wlab.optim.eco_sgd(
                lr, b1, wd, injection="virtual", **k
            ),
        }[optimiser]
        tx = make(grid=name, granularity=granularity)

        def step(carry: Any, g: jax.Array) -> Any:
            params, state = carry
            updates, state = tx.update({"kernel": g.T}, state, params)
            params = optax.apply_updates(params, updates)
            w = wlab.materialise(params)["kernel"]
            return (params, state), (w.T, state.mu["kernel"].T)

        @jax.jit
        def run(w0: jax.Array, grads: jax.Array) -> Any:
            # The reference has outputs in rows: a Flax kernel is its transpose.
            params = quantize_tree({"kernel": w0.T}, name, granularity=granularity)
            if form == "dense":
                params = wlab.materialise(params)
            return jax.lax.scan(step, (params, tx.init(params)), grads)[1]

        w, m = run(golden["w0"], golden["grads"])
        tag = f"{optimiser}_{grid}_rtn"
        np.testing.assert_allclose(w, golden[f"{tag}_w"], rtol=0, atol=1e-12)
        np.testing.assert_allclose(m, golden[f"{tag}_m"], rtol=0, atol=1e-10)


def test_exact_feedback_follows_master_weights_under_a_schedule():
    with jax.enable_x64(True):
        schedule = optax.warmup_cosine_decay_schedule(0.0, 0.1, 4, 12)
        tx = wlab.optim.eco_sgd(
            schedule, 0.9, 0.2, grid="int4", granularity="row", injection="exact"
        )
        rng = np.random.default_rng(0)

        def step(carry: Any, given: Any) -> Any:
            params, state, master, m = carry
            t, g = given
            updates, state = tx.update({"kernel": g}, state, params)
            params = optax.apply_updates(params, updates)
            m = 0.9 * m + 0.1 * g
            eta = jnp.asarray(schedule(t.astype(jnp.int32)), jnp.float64)
            master = (1 - eta * 0.2) * master - eta * m
            want = wlab.quant.quantize(master, "int4", axis=-1).values()
            got = params["kernel"].values()
            owed = got + state.residual["kernel"]
            return (params, state, master, m), (got, want, owed, master)

        @jax.jit
        def run(start: jax.Array, grads: jax.Array) -> Any:
            params = quantize_tree({"kernel": start}, "int4")
            master = params["kernel"].values()
            carry = (params, tx.init(params), master, jnp.zeros_like(master))
            return jax.lax.scan(step, carry, (jnp.arange(12), grads))[1]

        got, want, owed, master = run(
            rng.normal(size=(6, 5)), rng.normal(size=(12, 6, 5))
        )
        np.testing.assert_allclose(got, want, atol=1e-12)
        np.testing.assert_allclose(owed, master, atol=1e-12)


# --- Forms, chains and wrappers --------------------------------------------------


def optimisers(**options: Any) -> dict[str, Any]:
    return {
        "eco": wlab.optim.eco(0.03, weight_decay=0.1, **options),
        "eco_sgd": wlab.optim.eco_sgd(0.3, weight_decay=0.1, **options),
        "eco_muon": wlab.optim.eco_muon(0.03, weight_decay=0.1, **options),
    }


# Each pair of name, grid and rounding.
@pytest.mark.parametrize(
    ("name", "grid", "rounding"),
    [
        ("eco", "int8", "stochastic"),
        ("eco", "int4", "nearest"),
        ("eco_sgd", "fp8_e4m3", "stochastic"),
        ("eco_sgd", "int4", "nearest"),
        ("eco_muon", "int8", "nearest"),
        ("eco_muon", "int4", "stochastic"),
    ],
)
def test_packed_and_dense_agree_and_stay_on_the_grid(
    name: str, grid: str, rounding: Any, params: Any
):
    granularity = "tensor" if grid == "int4" else "row"
    tx = optimisers(grid=grid, rounding=rounding)[name]
    tx = optax.chain(optax.clip_by_global_norm(1.0), tx)

    @jax.jit
    def run(params: Any) -> Any:
        packed = quantize_tree(params, grid, granularity=granularity)
        left, _ = train(tx, packed)
        right, _ = train(tx, wlab.materialise(packed))
        again = quantize_tree(right, grid, granularity=granularity)
        return wlab.materialise(left), right, wlab.materialise(again)

    left, right, again = run(params)
    chex.assert_trees_all_close(left, right, rtol=0, atol=3e-5)
    chex.assert_trees_all_close(again, right, rtol=1e-6, atol=1e-6)
    pairs = zip(jax.tree.leaves(right), jax.tree.leaves(params), strict=True)
    assert not any(np.array_equal(a, b) for a, b in pairs)


def test_which_leaves_are_quantised(params: Any):
    packed = pack(params, "fp8_e4m3")
    named = wlab.core.leaves_with_paths(packed)
    assert {p for p, w in named if isinstance(w, Quantized)} == set(SHAPES)
    tx = wlab.optim.eco(1e-2, select="*up/kernel")
    state = tx.init(params)
    held = {p for p, _ in wlab.core.leaves_with_paths(state.mu)}
    assert held == {"blocks_0/mlp/up/kernel"}


def test_other_leaves_are_adamw(params: Any):
    tx = wlab.optim.eco(1e-2, weight_decay=0.1)
    got, _ = train(tx, params)
    want, _ = train(optax.adamw(1e-2, 0.9, 0.98, 1e-9, weight_decay=0.1), params)
    for path in ("embed", "head"):
        chex.assert_trees_all_equal(got[path], want[path])


def test_mask_keeps_leaves_from_decay(params: Any):
    mask = wlab.core.select(params, ["*", "!*up/kernel"])
    tx = wlab.optim.eco_sgd(0.1, 0.9, 1.0, mask, grid="int8")

    @jax.jit
    def first(params: Any) -> Any:
        return tx.update(optax.tree.zeros_like(params), tx.init(params), params)[0]

    updates = first(params)
    updates = dict(wlab.core.leaves_with_paths(updates))
    up, query = "blocks_0/mlp/up/kernel", "blocks_0/attention/query/kernel"
    before = dict(wlab.core.leaves_with_paths(params))
    # One step of the grid at most without decay, a tenth of the weight with it.
    assert np.abs(updates[up]).max() < np.abs(before[up]).max() / 127
    assert np.abs(updates[query]).max() > np.abs(before[query]).max() / 20


def test_inject_hyperparams(params: Any):
    packed = pack(params, "fp8_e4m3")
    tx = optax.inject_hyperparams(wlab.optim.eco)(learning_rate=3e-2)
    got, state = train(tx, packed)
    want, _ = train(wlab.optim.eco(3e-2), packed)
    assert float(state.hyperparams["learning_rate"]) == pytest.approx(3e-2)
    chex.assert_trees_all_close(*map(dense, (got, want)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_multi_steps_on_the_dense_form(params: Any, rounding: Any):
    inner = wlab.optim.eco(3e-2, rounding=rounding)
    tx = optax.MultiSteps(inner, 2)

    @jax.jit
    def both(start: Any) -> Any:
        start = wlab.materialise(start)
        held, state = start, tx.init(start)
        grads = [jax.tree.map(fn, start) for fn in (jnp.sin, jnp.cos)]
        for g in grads:
            updates, state = tx.update(g, state, held)
            held = optax.apply_updates(held, updates)
        mean = jax.tree.map(lambda a, b: (a + b) / 2, *grads)
        updates, _ = inner.update(mean, inner.init(start), start)
        return held, optax.apply_updates(start, updates)

    held, want = both(pack(params, "fp8_e4m3"))
    chex.assert_trees_all_close(held, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: optax.MultiSteps(tx, 2),
        lambda tx: optax.chain(tx, optax.scale(0.5)),
        lambda tx: optax.chain(tx, optax.add_decayed_weights(0.1)),
        lambda tx: optax.chain(optax.add_decayed_weights(0.1), tx),
        lambda tx: optax.contrib.schedule_free(tx, 1e-2),
    ],
)
def test_wrappers_that_compute_with_packed_leaves_are_told(params: Any, wrap: Any):
    """An error that names the dense form, not wrong codes."""
    packed = pack(params, "fp8_e4m3")
    tx = wrap(wlab.optim.eco(1e-2))

    def step(params: Any) -> Any:
        grads = wlab.materialise(params)
        updates, _ = tx.update(grads, tx.init(params), params)
        return optax.apply_updates(params, updates)

    with pytest.raises(TypeError, match=r"dense form.*wlab\.materialise"):
        jax.eval_shape(step, packed)


def test_wrappers_that_only_choose_carry_packed_leaves(params: Any):
    packed = pack(params, "fp8_e4m3")
    want, _ = train(wlab.optim.eco(1e-2), packed)
    for wrap in (
        lambda tx: optax.masked(tx, wlab.core.map_with_path(lambda *_: True, packed)),
        lambda tx: optax.named_chain(("clip", optax.clip(1e3)), ("eco", tx)),
    ):
        got, _ = train(wrap(wlab.optim.eco(1e-2)), packed)
        chex.assert_trees_all_close(got, want, rtol=1e-5, atol=1e-5)


def test_bfloat16_parameters_feed_back_their_own_rounding():
    """What bfloat16 takes from the grid's value is owed too."""
    w = np.random.default_rng(0).normal(size=(16, 8)).astype(jnp.bfloat16)
    start = {"kernel": jnp.asarray(w)}
    tx = wlab.optim.eco_sgd(0.1, grid="int8")

    @jax.jit
    def step(start: Any) -> Any:
        g = {"kernel": jnp.ones((16, 8), jnp.bfloat16)}
        updates, state = tx.update(g, tx.init(start), start)
        return optax.apply_updates(start, updates), state

    new, state = step(start)
    assert state.mu["kernel"].dtype == jnp.float32
    assert new["kernel"].dtype == jnp.bfloat16
    before, after = (np.asarray(x["kernel"], np.float32) for x in (start, new))
    want = 0.1 + (1 - 1 / 0.9) / 0.1 * (before - 0.1 * 0.1 - after)
    np.testing.assert_allclose(state.mu["kernel"], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "rate"),
    [
        ("eco", 0.0),
        ("eco", lambda count: 0.0 * count),
        ("eco_sgd", lambda count: 0.0 * count),
        ("eco_muon", 0.0),
    ],
)
def test_learning_rate_zero_moves_and_injects_nothing(
    name: str, rate: Any, params: Any
):
    packed = pack(params, "fp8_e4m3")
    got, state = train(getattr(wlab.optim, name)(rate), packed, steps=2)
    chex.assert_tree_all_finite(state)
    chex.assert_trees_all_close(*map(dense, (got, packed)), rtol=1e-6)


def test_stochastic_rounding_depends_on_key_step_and_path_only(params: Any):
    packed = pack(params, "fp8_e4m3")

    def codes(tx: Any, tree: Any) -> Any:
        new, _ = train(tx, tree, steps=2)
        return {
            p: w.codes
            for p, w in wlab.core.leaves_with_paths(new)
            if isinstance(w, Quantized)
        }

    def tx(key: Any) -> Any:
        return wlab.optim.eco_sgd(0.3, rounding="stochastic", key=key)

    one, same, other = (codes(tx(k), packed) for k in (0, jax.random.key(0), 1))
    chex.assert_trees_all_equal(one, same)
    assert any(not np.array_equal(one[p], other[p]) for p in one)
    twins = {name: {"kernel": packed["head"]["kernel"]} for name in "ab"}

    @jax.jit
    def first(twins: Any) -> Any:
        twins = quantize_tree(twins, "fp8_e4m3")
        grads = jax.tree.map(jnp.cos, wlab.materialise(twins))
        return tx(0).update(grads, tx(0).init(twins), twins)[0]

    a, b = (first(twins)[name]["kernel"].codes for name in "ab")
    assert not np.array_equal(a, b)


# --- Memory ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grid", "granularity", "wanted"),
    [("fp8_e4m3", "row", 9.0), ("int8", "row", 9.0), ("int4", "tensor", 8.5)],
)
def test_bytes_a_parameter_in_the_compiled_step(
    grid: str, granularity: Any, wanted: float
):
    """Weights, momentum and second moment, with everything donated."""
    n_in, n_out = 512, 384
    kernel = {"kernel": jax.ShapeDtypeStruct((n_in, n_out), jnp.float32)}
    params = jax.eval_shape(
        lambda p: quantize_tree(p, grid, granularity=granularity), kernel
    )
    tx = wlab.optim.eco(1e-3, grid=grid)
    state = jax.eval_shape(tx.init, params)

    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, kernel)
    memory = lowered.compile().memory_analysis()
    size = n_in * n_out
    scales = 4 * (n_out if granularity == "row" else 1)
    small = 64  # counters, one by one
    held = memory.argument_size_in_bytes - 4 * size
    assert wanted * size + scales <= held <= wanted * size + scales + small
    assert held - small <= memory.alias_size_in_bytes <= held
    # XLA on CPU keeps three arrays of the leaf's size while it works on it.
    assert memory.temp_size_in_bytes <= 12.5 * size
    assert wlab.core.bits.size_in_bits((params, state)) / 8 == pytest.approx(
        held, abs=small
    )


# --- Bad input -------------------------------------------------------------------


def test_values_out_of_range_are_errors_when_built():
    with pytest.raises(ValueError, match="'fp8_e4m4'; near: fp8_e4m3"):
        wlab.optim.eco(1e-3, grid="fp8_e4m4")
    with pytest.raises(ValueError, match=r"b1=0\.0 must lie between 0 and 1"):
        wlab.optim.eco(1e-3, b1=0.0)
    with pytest.raises(ValueError, match="neither 'nearest' nor 'stochastic'"):
        wlab.optim.eco(1e-3, rounding="up")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="injection 'some' is none of"):
        wlab.optim.eco(1e-3, injection="some")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="depends on the next gradient"):
        wlab.optim.eco(1e-3, injection="exact")
    with pytest.raises(ValueError, match="symmetric grid, not 'uint4'"):
        wlab.optim.eco(1e-3, grid="uint4")


def test_trees_that_do_not_fit_are_errors_that_name_the_leaf(params: Any):
    tx = wlab.optim.eco(1e-3)
    packed = pack(params, "int8")
    with pytest.raises(ValueError, match=r"kernel' of shape .* packed on int8"):
        tx.init(packed)
    with pytest.raises(ValueError, match="select= is for dense parameters"):
        wlab.optim.eco(1e-3, grid="int8", select="*").init(packed)
    with pytest.raises(ValueError, match="matches no leaf; near: "):
        wlab.optim.eco(1e-3, select="*kernels").init(params)
    with pytest.raises(ValueError, match="which is not granularity='tensor'"):
        wlab.optim.eco(1e-3, grid="int8", granularity="tensor").init(packed)
    params["blocks_0"]["mlp"]["up"]["kernel"] = jnp.full((8, 11), jnp.nan)
    with pytest.raises(ValueError, match=r"'blocks_0/mlp/up/kernel' .* 88 NaN"):
        tx.init(params)


def test_gradients_that_do_not_fit_are_errors_that_name_the_leaf(params: Any):
    packed = pack(params, "fp8_e4m3")
    tx = wlab.optim.eco(1e-3)
    state = jax.eval_shape(tx.init, packed)
    grads = dense(packed)
    with pytest.raises(ValueError, match=r"call update\(\.\.\., params\)"):
        jax.eval_shape(tx.update, grads, state)
    with pytest.raises(ValueError, match=r"take the gradient at wlab\.materialise"):
        jax.eval_shape(tx.update, packed, state, packed)
    grads["blocks_0"]["mlp"]["up"]["kernel"] = jnp.ones((2, 2))
    with pytest.raises(
        ValueError, match=r"'blocks_0/mlp/up/kernel' is of shape \(2, 2"
    ):
        jax.eval_shape(tx.update, grads, state, packed)


def test_nan_gradients_stay_visible(params: Any):
    packed = pack(params, "fp8_e4m3")
    tx = wlab.optim.eco(1e-2)

    @jax.jit
    def first(params: Any) -> Any:
        grads = optax.tree.full_like(wlab.materialise(params), jnp.nan)
        updates, _ = tx.update(grads, tx.init(params), params)
        return wlab.materialise(optax.apply_updates(params, updates))

    assert all(np.isnan(w).all() for w in jax.tree.leaves(first(packed)))


def test_a_row_of_zeros_stays_a_row_of_zeros():
    w = np.ones((6, 3), np.float32)
    w[:, 1] = 0
    tx = wlab.optim.eco_sgd(0.1)

    @jax.jit
    def first(params: Any) -> Any:
        packed = quantize_tree(params, "fp8_e4m3")
        zero = optax.tree.zeros_like(params)
        updates, state = tx.update(zero, tx.init(packed), packed)
        new = optax.apply_updates(packed, updates)["kernel"]
        return new.scale, new.values(), state.mu

    scale, values, mu = first({"kernel": w})
    assert (np.asarray(scale)[:, 1] == 1).all()
    assert (np.asarray(values)[:, 1] == 0).all()
    chex.assert_tree_all_finite(mu)
