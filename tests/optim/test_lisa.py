# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""LISA trains a few layers at a time: which, with what state, and what stays."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import wlab
from wlab.core import Layered, layered_value_and_grad, lift
from wlab.optim import lisa, sample_layers
from wlab.quant import quantize_tree

DEPTH, WIDTH = 6, 4
STATES = ["reset_layers", "reset_all", "keep"]


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.float32(0.5) * np.random.default_rng(seed).normal(size=shape).astype("f4")


def stacked(seed: int = 0) -> Any:
    block = {
        "dense": {"kernel": normal(seed, DEPTH, WIDTH, WIDTH)},
        "norm": {"scale": 1 + normal(seed + 1, DEPTH, WIDTH)},
    }
    return {
        "embed": normal(seed + 2, 5, WIDTH),
        "blocks": block,
        "head": normal(seed + 3, WIDTH, 3),
    }


def at(tree: Any, i: Any) -> Any:
    return jax.tree.map(lambda x: np.asarray(x)[i], tree)


def written_out(tree: Any) -> Any:
    blocks = {f"blocks_{i}": at(tree["blocks"], i) for i in range(DEPTH)}
    return {k: x for k, x in tree.items() if k != "blocks"} | blocks


FORMS = {"stacked": (lambda x: x, "blocks"), "written out": (written_out, "blocks_*")}
both_forms = pytest.mark.parametrize(("make", "layers"), FORMS.values(), ids=FORMS)


def layer(tree: Any, i: int) -> Any:
    return at(tree["blocks"], i) if "blocks" in tree else tree[f"blocks_{i}"]


def same(got: Any, want: Any) -> bool:
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


def close(got: Any, want: Any, tol: float = 1e-6) -> None:
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=tol, atol=tol)


def block(layer: Any, x: jax.Array, batch: Any) -> jax.Array:
    del batch
    scale = jnp.broadcast_to(layer["norm"]["scale"], x.shape)
    return x + jnp.tanh((scale * x) @ layer["dense"]["kernel"])


def parts(layers: str) -> Layered:
    def after(params: Any, x: jax.Array, batch: Any) -> jax.Array:
        del batch
        return jnp.mean(jnp.square(x @ params["head"] - 1))

    return Layered(lambda p, batch: p["embed"][batch], lift(block), after, layers)


BATCH = np.arange(7) % 5


@pytest.mark.parametrize("state", STATES)
@both_forms
def test_inactive_layers_stay_to_the_bit(make: Any, layers: str, state: Any):
    """Also under decay; the draw holds for an interval, and all layers have a turn."""
    interval, k = 3, 2
    tx = lisa(0.05, layers, k, interval, state=state, weight_decay=0.1)
    params = make(stacked())
    held = jax.jit(tx.init)(params)
    traces = []

    @jax.jit
    def step(grads: Any, held: Any, params: Any) -> Any:
        traces.append(1)
        updates, held = tx.update(grads, held, params)
        return optax.apply_updates(params, updates), held

    @jax.jit
    def draw(t: Any) -> jax.Array:
        return sample_layers(jax.random.key(0), t, DEPTH, k, interval)

    seen = set()
    for t in range(12):
        active = set(held.active.tolist())
        assert active == set(draw(t).tolist()) and len(active) == k
        seen |= active
        new, held = step(make(stacked(10 + t)), held, params)
        for i in range(DEPTH):
            assert same(layer(new, i), layer(params, i)) == (i not in active)
        assert not same(new["embed"], params["embed"])
        assert not same(new["head"], params["head"])
        params = new
    assert len(traces) == 1 and len(seen) > k


@both_forms
def test_all_layers_and_keep_is_adamw(make: Any, layers: str):
    rate = optax.linear_schedule(0.1, 0.01, 5)
    tx = lisa(rate, layers, DEPTH, 2, state="keep", weight_decay=0.1)
    adamw = optax.adamw(rate, weight_decay=0.1)
    start = make(stacked())

    @jax.jit
    def step(grads: Any, *ends: Any) -> Any:
        new = []
        for each, (params, state) in zip((tx, adamw), ends, strict=True):
            updates, state = each.update(grads, state, params)
            new.append((optax.apply_updates(params, updates), state))
        return new

    ends = [(start, jax.jit(each.init)(start)) for each in (tx, adamw)]
    for t in range(5):
        ends = step(make(stacked(10 + t)), *ends)
    close(ends[0][0], ends[1][0])


def test_ends_move_as_under_adamw():
    tx, adamw = (
        lisa(0.1, "blocks", 1, 2, state="keep"),
        optax.adamw(0.1, weight_decay=0),
    )
    params = stacked()
    ends = {name: params[name] for name in ("embed", "head")}
    held, other = jax.jit(tx.init)(params), jax.jit(adamw.init)(ends)
    step, plain = jax.jit(tx.update), jax.jit(adamw.update)
    for t in range(4):
        grads = stacked(10 + t)
        updates, held = step(grads, held, params)
        want, other = plain({n: grads[n] for n in ends}, other, ends)
        close({n: updates[n] for n in ends}, want)


@pytest.mark.parametrize("state", ["reset_layers", "reset_all"])
@both_forms
def test_what_starts_anew(make: Any, layers: str, state: Any):
    """A first step of Adam is as large as the rate, in every entry."""
    tx = lisa(0.1, layers, 2, 2, state=state)
    params = make(stacked())
    held = jax.jit(tx.init)(params)
    draws = [[0, 1], [1, 4], [1, 4]]  # layer 1 goes on, layer 4 is new
    sizes = []
    for t, chosen in enumerate(np.repeat(draws, 2, axis=0)):
        grads = make(stacked(10 + t))
        updates, held = jax.jit(tx.update)(
            grads, held, params, chosen=jnp.asarray(chosen)
        )
        sizes.append(
            {
                "old": np.abs(layer(updates, 1)["dense"]["kernel"]),
                "new": np.abs(layer(updates, 4)["dense"]["kernel"]),
                "ends": np.abs(updates["head"]),
            }
        )
    third = {name: bool(np.allclose(x, 0.1, atol=1e-5)) for name, x in sizes[2].items()}
    anew = state == "reset_all"
    assert third == {"old": anew, "new": True, "ends": anew}
    fifth = {name: bool(np.allclose(x, 0.1, atol=1e-5)) for name, x in sizes[4].items()}
    assert fifth == dict.fromkeys(fifth, anew)


@pytest.mark.parametrize("state", ["reset_layers", "keep"])
@both_forms
def test_compact_gradients_give_the_same_updates(make: Any, layers: str, state: Any):
    """Of the layers that the state names, in its order; and the run goes on alike."""
    tx = lisa(0.05, layers, 2, 2, state=state, weight_decay=0.01)
    fn = layered_value_and_grad(parts(layers))

    @jax.jit
    def step(got: Any, want: Any) -> Any:
        ends = []
        for (params, held), chosen in ((got, got[1].active), (want, None)):
            _, grads = fn(params, BATCH, chosen=chosen)
            updates, held = tx.update(grads, held, params)
            ends.append((optax.apply_updates(params, updates), held))
        return ends

    params = make(stacked())
    got = want = (params, jax.jit(tx.init)(params))
    for _ in range(5):
        got, want = step(got, want)
    close(got[0], want[0], 1e-5)
    assert same(got[1].active, want[1].active)


@both_forms
def test_state_has_the_bytes_of_the_formula(make: Any, layers: str):
    params, k = make(stacked()), 2
    one = sum(x.size for x in jax.tree.leaves(layer(params, 0)))
    ends = params["embed"].size + params["head"].size
    want = {"keep": DEPTH * one, "reset_all": k * one, "reset_layers": k * one}
    for state, inside in want.items():
        held = jax.eval_shape(lisa(0.1, layers, k, state=state).init, params)
        arrays = [x for x in jax.tree.leaves(held) if x.dtype == jnp.float32]
        assert sum(x.size for x in arrays) * 4 == 8 * (ends + inside)
    grads = jax.eval_shape(
        lambda p: layered_value_and_grad(parts(layers))(p, BATCH, chosen=[0, 1])[1],
        params,
    )
    assert sum(x.size for x in jax.tree.leaves(grads)) == ends + k * one


def test_each_layer_is_drawn_as_often():
    n, depth, k = 4000, 7, 3
    draw = jax.vmap(lambda t: sample_layers(jax.random.key(3), t, depth, k, 1))
    drawn = np.asarray(jax.jit(draw)(np.arange(n)))
    assert (np.diff(drawn, axis=1) > 0).all()
    share = np.bincount(drawn.ravel(), minlength=depth) / n
    bound = 5 * (k / depth * (1 - k / depth) / n) ** 0.5
    np.testing.assert_allclose(share, k / depth, atol=bound)


def test_a_run_that_is_resumed_draws_the_same():
    tx = lisa(0.05, "blocks", 2, 2)
    params = stacked()
    states, step = [jax.jit(tx.init)(params)], jax.jit(tx.update)
    for _ in range(6):
        states.append(step(stacked(9), states[-1], params)[1])
    resumed = states[3]
    for state in states[3:]:
        assert same(resumed.active, state.active)
        resumed = step(stacked(9), resumed, params)[1]


@pytest.mark.parametrize("state", STATES)
def test_bfloat16_parameters_have_float32_moments(state: Any):
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), stacked())
    tx = lisa(0.1, "blocks", state=state)
    updates, held = jax.eval_shape(lambda p: tx.update(p, tx.init(p), p), params)
    assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype(jnp.bfloat16)}
    floats = {x.dtype for x in jax.tree.leaves(held) if x.ndim > 1}
    assert floats == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize(
    ("form", "state"),
    [("stacked", "reset_layers"), ("written out", "reset_all"), ("stacked", "keep")],
)
def test_over_a_packed_base(form: str, state: Any):
    """Codes stay; the norms of the sampled layers and the ends are trained."""
    make, layers = FORMS[form]
    params = jax.jit(lambda p: quantize_tree(p, "int8", select="blocks*kernel"))(
        make(stacked())
    )
    tx = lisa(0.05, layers, 2, 2, state=state, weight_decay=0.1)
    fn = layered_value_and_grad(parts(layers))

    @jax.jit
    def step(params: Any, held: Any) -> Any:
        (loss, _), grads = fn(params, BATCH, chosen=held.active)
        updates, held = tx.update(grads, held, params)
        return optax.apply_updates(params, updates), held, loss

    held, losses, start = jax.jit(tx.init)(params), [], params
    for _ in range(8):
        active = held.active.tolist()
        new, held, loss = step(params, held)
        for i in range(DEPTH):
            before, after = layer(params, i), layer(new, i)
            assert same(after["dense"], before["dense"])
            assert same(after["norm"], before["norm"]) == (i not in active)
        params = new
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    assert jax.tree.structure(params) == jax.tree.structure(start)
    with pytest.raises(ValueError, match=r"is a Quantized.*no step in its codes"):
        jax.eval_shape(lambda p: tx.update(wlab.materialise(p), held, p), params)


def test_another_inner_transform():
    tx = lisa(0.1, "blocks", 2, inner=optax.scale_by_lion())
    params = stacked()
    held = jax.jit(tx.init)(params)
    updates, _ = jax.jit(tx.update)(params, held, params)
    for i in held.active.tolist():
        kernel = layer(updates, i)["dense"]["kernel"]
        np.testing.assert_allclose(np.abs(kernel), 0.1, rtol=1e-6)


def test_bad_arguments_are_told():
    params = stacked()
    for options, message in (
        ({"state": "forget"}, "none of 'reset_layers'"),
        ({"k": 0}, "at least 1"),
        ({"k": 7}, "k=7 of the 6 layers"),
        ({"layers": "stack"}, "matches no leaf"),
    ):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(lisa(0.1, **({"layers": "blocks"} | options)).init, params)
    with pytest.raises(ValueError, match="call update"):
        tx = lisa(0.1, "blocks")
        jax.eval_shape(lambda p: tx.update(p, tx.init(p)), params)
    odd = written_out(params)
    odd["blocks_3"] = {"dense": odd["blocks_3"]["dense"]}
    with pytest.raises(ValueError, match="'blocks_3/dense/kernel' and its siblings"):
        jax.eval_shape(lisa(0.1, "blocks_*").init, odd)
    with pytest.raises(ValueError, match="k=3 of 2 layers"):
        sample_layers(jax.random.key(0), 0, 2, 3, 1)


def test_parameters_of_numpy():
    """As checkpoints give them, before anything is compiled."""
    params = {"blocks": {"w": np.ones((4, 3, 2), np.float32)}}
    params["b"] = np.ones(2, np.float32)
    tx = lisa(0.1, "blocks", k=2)
    updates, _ = tx.update(params, tx.init(params), params)
    moved = np.asarray(updates["blocks"]["w"]).any((1, 2))
    assert moved.sum() == 2 and np.asarray(updates["b"]).all()
