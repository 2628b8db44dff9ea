# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Drop-Muon is Muon on a suffix; what is frozen is so to the bit and costs nothing."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import wlab
from wlab.core import (
    Layered,
    LayerGrads,
    layered_value_and_grad,
    leaves_with_paths,
    linalg,
)
from wlab.optim import _drop_muon as module
from wlab.optim import (
    active_layers,
    drop,
    drop_muon,
    eco_muon,
    sample_start,
)
from wlab.quant import quantize_tree

DEPTH = 4


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def first(tx: Any, grads: Any, params: Any, **extra: Any) -> Any:
    """Updates and state of the first step, in one program."""
    return jax.jit(lambda g, p: tx.update(g, tx.init(p), p, **extra))(grads, params)


def stacked(seed: int = 0) -> Any:
    block = {
        "up": {"kernel": normal(seed, DEPTH, 8, 6), "bias": normal(seed + 1, DEPTH, 6)},
        "query": {"kernel": normal(seed + 2, DEPTH, 8, 2, 3)},
        "gate": {"kernel": normal(seed + 3, DEPTH, 8, 6)},
    }
    return {
        "embed": {"embedding": normal(seed + 4, 5, 8)},
        "blocks": block,
        "head": {"kernel": normal(seed + 5, 8, 3)},
    }


def at(tree: Any, i: int) -> Any:
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


def momentum(state: Any, i: int) -> Any:
    """Of layer i: its part of the state."""
    if isinstance(state.layers, tuple) and not hasattr(state.layers, "mu"):
        return [x for x in jax.tree.leaves(state.layers[i])]
    return at(jax.tree.leaves(state.layers), i)


@both_forms
def test_frozen_layers_keep_weights_and_state_to_the_bit(make: Any, layers: str):
    tx = drop_muon(0.05, weight_decay=0.1, layers=layers)
    params, grads = make(stacked()), make(stacked(10))
    state = jax.jit(tx.init)(params)

    @jax.jit
    def step(params: Any, state: Any, start: Any) -> Any:
        updates, state = tx.update(grads, state, params, start=start)
        return optax.apply_updates(params, updates), state

    params, state = step(params, state, 0)
    for start in (1, 3, 2):
        new, new_state = step(params, state, start)
        for i in range(DEPTH):
            frozen = i < start
            assert same(layer(new, i), layer(params, i)) == frozen
            assert same(momentum(new_state, i), momentum(state, i)) == frozen
        assert same(new["embed"], params["embed"])  # its gradient is that of cut 0
        assert not same(new["head"], params["head"])
        params, state = new, new_state
    new, _ = step(params, state, 0)
    assert not same(new["embed"], params["embed"])


@both_forms
def test_cut_zero_is_muon(make: Any, layers: str):
    """Against optax's Muon, whose correction of the bias the iteration undoes."""
    tx = drop_muon(0.1, layers=layers, nesterov=False, sampling="full")
    theirs = optax.contrib.scale_by_muon(
        nesterov=False,
        weight_dimension_numbers={"w": optax.contrib.MuonDimensionNumbers()},
    )
    params = make(stacked())
    zero = {"w": np.zeros((8, 6), np.float32)}
    state, other = jax.jit(tx.init)(params), jax.jit(theirs.init)(zero)
    step, their_step = jax.jit(tx.update), jax.jit(theirs.update)
    for seed in (10, 20, 30):
        assert active_layers(state)["start"] == 0
        grads = make(stacked(seed))
        updates, state = step(grads, state, params)
        want, other = their_step({"w": layer(grads, 2)["up"]["kernel"]}, other)
        got = layer(updates, 2)["up"]["kernel"]
        np.testing.assert_allclose(got, -0.1 * np.asarray(want["w"]), atol=1e-6)


def test_stacked_and_written_out_layers_move_alike():
    starts = (2, 0, 3)
    ends = []
    for make, layers in FORMS.values():
        tx = drop_muon(0.05, layers=layers)
        params = make(stacked())
        state, step = jax.jit(tx.init)(params), jax.jit(tx.update)
        for seed, start in enumerate(starts):
            grads = make(stacked(10 * seed + 10))
            updates, state = step(grads, state, params, start=start)
            params = jax.tree.map(np.add, params, updates)
        ends.append(params)
    for (_, a), (_, b) in zip(
        leaves_with_paths(written_out(ends[0])), leaves_with_paths(ends[1]), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=1e-5)


@both_forms
def test_chosen_layers_with_compact_gradients(make: Any, layers: str):
    tx = drop_muon(0.05, layers=layers)
    params, grads = make(stacked()), make(stacked(10))
    chosen = np.array([3, 1])
    stack = stacked(10)["blocks"]
    rest = {k: x for k, x in grads.items() if not k.startswith("blocks")}
    rest |= {k: None for k in grads if k.startswith("blocks")}
    compact = LayerGrads(at(stack, chosen), rest)
    want = first(tx, grads, params, chosen=chosen)
    got = first(tx, compact, params, chosen=chosen)
    got, want = ((u, s.layers, s.rest) for u, s in (got, want))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    for i in range(DEPTH):
        assert np.any(layer(got[0], i)["up"]["kernel"]) == (i in (1, 3))
    with pytest.raises(ValueError, match="chosen="):
        first(tx, compact, params)


def test_a_suffix_trains_with_the_gradients_of_the_suffix():
    """The cut of the state goes to the gradients, and comes back."""
    params = {"layers": 0.5 * normal(0, DEPTH, 8, 8)}
    parts = Layered(
        lambda params, batch: batch,
        lambda w, x, batch: jnp.tanh(x @ w),
        lambda params, x, batch: jnp.mean((x - 0.3) ** 2),
    )
    tx = optax.chain(optax.identity(), drop_muon(0.05, layers="layers"))

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        start = active_layers(state)["start"]
        fn = layered_value_and_grad(parts)
        (loss, _), grads = fn(params, normal(1, 16, 8), start=start)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss, start

    state = jax.jit(tx.init)(params)
    losses, starts = [], []
    for _ in range(40):
        old = params
        params, state, loss, start = step(params, state)
        new, before = (np.asarray(x["layers"]) for x in (params, old))
        assert same(new[:start], before[:start])
        losses.append(float(loss))
        starts.append(int(start))
    assert losses[-1] < 0.2 * losses[0]
    assert set(starts) == set(range(DEPTH))
    # Only key and count decide: a run that is restored draws the same.
    key = jax.random.key(0)
    draw = jax.vmap(lambda t: sample_start(key, t, DEPTH))
    assert starts == jax.jit(draw)(np.arange(40)).tolist()


def test_the_probability_of_each_layer():
    """i / b with a uniform cut, for layer i of b; the cut is never the empty set."""
    depth, n = 5, 20_000
    key = jax.random.key(1)

    def draw(steps: int, **options: Any) -> np.ndarray:
        one = jax.vmap(lambda t: sample_start(key, t, depth, **options))
        return np.asarray(jax.jit(one)(np.arange(steps)))

    starts = draw(n)
    active = (starts[:, None] <= np.arange(depth)[None, :]).mean(0)
    want = (np.arange(depth) + 1) / depth
    np.testing.assert_allclose(active, want, atol=4 * 0.5 / n**0.5)
    for progress, weights in ((0.0, [2, 1.5, 1, 0.5, 0]), (1.0, [0, 0.5, 1, 1.5, 2])):
        starts = draw(n, kind="epoch_shift", progress=progress)
        got = np.bincount(starts, minlength=depth) / n
        want = np.exp(weights) / np.exp(weights).sum()
        np.testing.assert_allclose(got, want, atol=0.015)
    starts = draw(99, kind=jnp.array([0.0, 0.5, 0.0, 0.0, 0.5]))
    assert set(starts.tolist()) == {1, 4}


@pytest.mark.parametrize("name", module._COEFFICIENTS)
def test_newton_schulz_presets(name: str):
    table, steps = module._table(name, 5)
    fn = functools.partial(linalg.orthogonalize, steps=steps, coefficients=table)
    x = np.asarray(normal(3, 12, 7))
    u, _, vt = np.linalg.svd(x, full_matrices=False)

    @jax.jit
    def run(x: jax.Array, uv: jax.Array) -> Any:
        return fn(x), fn(100 * x), fn(x.T), fn(jnp.zeros((4, 3))), fn(uv)

    y, larger, turned, zero, again = map(np.asarray, run(x, u @ vt))
    s = np.linalg.svd(y, compute_uv=False)
    assert s.min() > 0.4 and s.max() < 1.3
    np.testing.assert_allclose(larger, y, atol=1e-4)
    np.testing.assert_allclose(turned, y.T, atol=1e-5)
    assert not zero.any()
    s = np.linalg.svd(again, compute_uv=False)
    assert s.min() > 0.6 and s.max() < 1.3


def test_sharp_operator():
    m = np.asarray(normal(0, 9, 5))
    sharp_of = jax.jit(module._sharp)
    sharp = np.asarray(sharp_of(m))
    nuclear = np.linalg.svd(m, compute_uv=False).sum()
    np.testing.assert_allclose(np.sum(m * sharp), nuclear**2, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(sharp, 2), nuclear, rtol=1e-5)
    assert not np.any(sharp_of(np.zeros((3, 4), np.float32)))


def test_descent_inequality():
    """f = sum a/2 |X - B|^2 is smooth in the spectral norm with L = a min(m, n)."""
    shapes, a = [(6, 4), (5, 5), (3, 8)], [0.5, 2.0, 1.0]
    b = [normal(i, *shape) for i, shape in enumerate(shapes)]
    smooth = [a[i] * min(shape) for i, shape in enumerate(shapes)]

    def f(layers: Any) -> Any:
        return sum(
            c / 2 * jnp.sum((w - x) ** 2) for c, w, x in zip(a, layers, b, strict=True)
        )

    options = {"layers": "layers", "step": "sharp", "scale": "none", "nesterov": False}

    @jax.jit
    def step(layers: Any, start: Any) -> Any:
        """How far f falls, and the least that the layers from the cut on promise."""
        params = {"layers": layers}
        grads = jax.grad(lambda p: f(p["layers"]))(params)
        moved, gained = list(layers), jnp.zeros(())
        for i, rate in enumerate(smooth):
            # One rate a layer, as in the theory; the momentum is the gradient.
            tx = drop_muon(1 / rate, 0.0, **options)
            updates, _ = tx.update(grads, tx.init(params), params, start=start)
            moved[i] = moved[i] + updates["layers"][i]
            norm = jnp.linalg.svd(grads["layers"][i], compute_uv=False).sum()
            gained += jnp.where(i >= start, norm**2 / (2 * rate), 0)
        return f(layers) - f(moved), gained

    for seed in range(5):
        layers = [normal(seed + 7 + i, *s) for i, s in enumerate(shapes)]
        for start in range(3):
            fall, gained = step(layers, start)
            assert float(fall) >= float(gained) * (1 - 1e-5)


def test_momentum_may_begin_with_the_first_gradient():
    params, grads = {"layers": [normal(0, 4, 3)]}, {"layers": [normal(1, 4, 3)]}
    tx = drop_muon(0.1, layers="layers", init_momentum="gradient")
    _, state = first(tx, grads, params, start=0)
    assert same(state.layers[0].mu["layers"][0], grads["layers"][0])


def test_layers_of_several_kinds_are_named_in_their_order():
    """A convolution is a matrix from all its inputs; its momentum stays, too."""
    params = {
        "conv": {"kernel": normal(0, 3, 3, 2, 4), "bias": jnp.zeros(4)},
        "dense": {"kernel": normal(1, 16, 8)},
        "head": {"kernel": normal(2, 8, 3)},
    }
    tx = drop_muon(0.1, layers=("conv", "dense"))
    state, step = jax.jit(tx.init)(params), jax.jit(tx.update)
    updates, new = step(params, state, params, start=1)
    assert not any(map(np.any, jax.tree.leaves(updates["conv"])))
    assert same(new.layers[0], state.layers[0]) and np.any(updates["dense"]["kernel"])
    updates, _ = step(params, state, params, start=0)
    kernel = np.reshape(updates["conv"]["kernel"], (18, 4))
    s = np.linalg.svd(kernel, compute_uv=False)
    np.testing.assert_allclose(s, 0.1, rtol=0.35)


def test_factors_of_shape():
    want = {
        "muon": 1.0,
        "spectral": (6 / 8) ** 0.5,
        "rms": 0.2 * 8**0.5,
    }
    params, grads = ({"blocks": stacked(seed)["blocks"]} for seed in (0, 10))

    def kernel(scale: Any) -> Any:
        tx = drop_muon(0.1, layers="blocks", scale=scale)
        updates, _ = first(tx, grads, params, start=0)
        return np.asarray(updates["blocks"]["up"]["kernel"])

    plain = kernel("none")
    for scale, factor in want.items():
        np.testing.assert_allclose(kernel(scale), factor * plain, rtol=1e-5)
    wide = {"layers": [normal(0, 2, 8)]}
    tx = drop_muon(0.1, layers="layers")
    updates, _ = first(tx, wide, wide, start=0)
    s = np.linalg.svd(updates["layers"][0], compute_uv=False)
    np.testing.assert_allclose(s, 0.2, rtol=0.35)


def test_frozen_layers_have_no_orthogonalisation():
    """The loop over layers has its bound at run time, lists have a branch each."""

    def primitives(jaxpr: Any, inside: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
        out = []
        for eqn in jaxpr.eqns:
            here = (*inside, eqn.primitive.name)
            out.append(here)
            for param in jax.tree.leaves(
                list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
            ):
                if hasattr(param, "jaxpr"):
                    out += primitives(param.jaxpr, here)
                elif hasattr(param, "eqns"):
                    out += primitives(param, here)
        return out

    for (make, layers), outer in zip(FORMS.values(), ("while", "cond"), strict=True):
        tx = drop_muon(0.1, layers=layers)
        params = make(stacked())
        state = jax.eval_shape(tx.init, params)
        made = jax.make_jaxpr(lambda s, z, p, tx=tx: tx.update(p, z, p, start=s))(
            0, state, params
        )
        products = [p for p in primitives(made.jaxpr) if p[-1] == "dot_general"]
        assert products and all(outer in path for path in products)


@both_forms
def test_over_quantised_weights(make: Any, layers: str):
    """Drop over ECO's Muon: codes, scales and momentum of frozen layers stay."""
    pack = lambda p: quantize_tree(p, "fp8_e4m3", select="blocks*kernel")  # noqa: E731
    params = jax.jit(pack)(make(stacked()))
    tx = drop(eco_muon(0.05, rounding="stochastic"), layers, rest=optax.adamw(0.05))
    state = jax.jit(tx.init)(params)
    grads = make(stacked(10))

    @jax.jit
    def step(params: Any, state: Any, start: Any) -> Any:
        updates, state = tx.update(grads, state, params, start=start)
        return optax.apply_updates(params, updates), state

    for start in (0, 2):
        new, new_state = step(params, state, start)
        for i in range(DEPTH):
            frozen = i < start
            assert same(layer(new, i), layer(params, i)) == frozen
            assert (
                same(momentum_of_eco(new_state, i), momentum_of_eco(state, i)) == frozen
            )
        params, state = new, new_state


def momentum_of_eco(state: Any, i: int) -> Any:
    if isinstance(state.layers, tuple) and not hasattr(state.layers, "mu"):
        return jax.tree.leaves(state.layers[i].mu)
    return at(jax.tree.leaves(state.layers.mu), i)


def test_stacked_layers_draw_their_rounding_apart():
    same_layers = jax.tree.map(
        lambda x: np.broadcast_to(np.asarray(x)[:1], x.shape), stacked()
    )
    tx = drop(
        eco_muon(0.05, grid="int4", rounding="stochastic"),
        "blocks",
        rest=optax.sgd(0.1),
    )

    @jax.jit
    def step(params: Any) -> Any:
        packed = quantize_tree(params, "int4", select="blocks*kernel")
        updates, _ = tx.update(params, tx.init(packed), packed, start=0)
        return optax.apply_updates(packed, updates)["blocks"]["up"]["kernel"].codes

    codes = step(same_layers)
    assert not np.array_equal(codes[0], codes[1])


def test_bad_arguments_are_told():
    params = stacked()
    for options, message in (
        ({"step": "lmoo"}, "neither 'lmo' nor 'sharp'"),
        ({"scale": "big"}, "none of muon, spectral"),
        ({"coefficients": "jordan"}, "none of muon, dion, polar_express"),
        ({"coefficients": [1.0, 2.0]}, r"give \[3\] or"),
        ({"beta": 1.0}, "between 0 and 1"),
        ({"sampling": "epoch_shift"}, "needs progress="),
        ({"sampling": "even"}, "none of 'uniform'"),
        ({"sampling": [0.5, 0.5]}, "one for each of 4 layers"),
        ({"layers": "stack"}, "matches no leaf"),
        ({"select": "*bias"}, "'blocks/up/bias' of shape"),
    ):
        with pytest.raises(ValueError, match=message):
            drop_muon(0.1, **({"layers": "blocks"} | options)).init(params)
    tx = drop_muon(0.1, layers="blocks")
    state = tx.init(params)
    with pytest.raises(ValueError, match="start=4 is out of range"):
        tx.update(params, state, params, start=4)
    with pytest.raises(ValueError, match="not both"):
        tx.update(params, state, params, start=1, chosen=[1])
    with pytest.raises(ValueError, match="call update"):
        tx.update(params, state)
    with pytest.raises(ValueError, match="holds 0 states"):
        active_layers(optax.sgd(0.1).init(params))
    packed = quantize_tree(params, "int8")
    with pytest.raises(TypeError, match=r"is a Quantized.*drop\(eco_muon"):
        drop_muon(0.1, layers="blocks").init(packed)
    factors = normal(0, 3, 4, 4), normal(1, 3, 4, 2), normal(2, 3, 4, 2)
    low = {"blocks": {"k": wlab.LowRank(*factors)}}
    with pytest.raises(ValueError, match=r"'blocks/k' .* write the layers out"):
        drop(optax.sgd(0.1), "blocks").init(low)
