# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Gradients of some layers: the numbers of `jax.grad`, at the cost of those layers."""

import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from wlab.core import (
    Layered,
    LowRank,
    MatrixView,
    find_layers,
    is_weight,
    layered_value_and_grad,
    lift,
    materialise,
)
from wlab.quant import quantize

DEPTH, WIDTH = 4, 8


def normal(seed: int, *shape: int, dtype: Any = jnp.float32) -> np.ndarray:
    return (0.3 * np.random.default_rng(seed).normal(size=shape)).astype(dtype)


def stacked(dtype: Any = jnp.float32) -> Any:
    """Two ends, of which one is used at both, and a stack of layers."""
    make = functools.partial(normal, dtype=dtype)
    layers = {"up": make(0, DEPTH, WIDTH, 12), "down": make(1, DEPTH, 12, WIDTH)}
    layers["gain"] = 1 + make(2, DEPTH, WIDTH)
    return {"embed": make(3, 5, WIDTH), "layers": layers, "norm": make(4, WIDTH)}


def at(tree: Any, i: int) -> Any:
    return jax.tree.map(lambda x: x[i], tree)


def listed(params: Any) -> Any:
    layers = params["layers"]
    return params | {"layers": [at(layers, i) for i in range(DEPTH)]}


def named(params: Any) -> Any:
    """Layers apart in the tree, in an order that is not that of their names."""
    out = {f"block_{i + 9}": x for i, x in enumerate(listed(params)["layers"])}
    return out | {k: x for k, x in params.items() if k != "layers"}


FORMS = {
    "stacked": (lambda x: x, "layers"),
    "listed": (listed, "layers"),
    "named": (named, "block_*"),
}


def before(params: Any, batch: Any) -> Any:
    return {"x": params["embed"][batch["tokens"]]}


def block(layer: Any, x: Any, batch: Any) -> Any:
    hidden = jnp.tanh((x["x"] * batch["mask"]) @ layer["up"])
    gain = jnp.broadcast_to(layer["gain"], x["x"].shape)
    return {"x": gain * (x["x"] + hidden @ layer["down"])}


def after(params: Any, x: Any, batch: Any) -> Any:
    logits = (x["x"] * jnp.broadcast_to(params["norm"], x["x"].shape)) @ params[
        "embed"
    ].T
    loss = jnp.mean(jax.nn.logsumexp(logits.astype(jnp.float32), -1))
    return loss, {"largest": logits.max()}


PARTS = Layered(before, block, after)


def batch_of(dtype: Any = jnp.float32) -> Any:
    mask = (np.random.default_rng(5).random((6, WIDTH)) < 0.8).astype(dtype)
    return {"tokens": np.arange(6, dtype=np.int32) % 5, "mask": mask}


BATCH = batch_of()


def layers_of(tree: Any, form: str) -> Any:
    """The layers, stacked."""
    if form == "stacked":
        return tree["layers"]
    layers = (
        tree["layers"]
        if form == "listed"
        else [tree[f"block_{i + 9}"] for i in range(DEPTH)]
    )
    return jax.tree.map(lambda *x: jnp.stack(x), *layers)


def whole(parts: Layered, form: str = "stacked", stop: bool = False) -> Any:
    """The loss in one piece; `stop` takes away what comes before the layers."""

    def loss(params: Any, batch: Any) -> Any:
        stack = layers_of(params, form)
        x = parts.before(params, batch)
        x = jax.lax.stop_gradient(x) if stop else x
        extras = []
        for i in range(DEPTH):
            x = parts.block(at(stack, i), x, batch)
            if parts.extras:
                x, extra = x
                extras.append(extra)
        if parts.extras:
            return parts.after(params, x, batch, jnp.stack(extras))
        return parts.after(params, x, batch)

    return loss


def close(got: Any, want: Any, tol: float = 1e-6) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        np.testing.assert_allclose(a, b, rtol=tol, atol=tol)


@functools.cache
def reference(form: str, stop: bool, parts: Layered = PARTS) -> Any:
    """Loss and gradients of a whole backward pass."""
    loss = whole(parts, form, stop)
    params = FORMS[form][0](stacked())
    return jax.jit(jax.value_and_grad(loss, has_aux=True))(params, BATCH)


def expected(form: str, start: int, parts: Layered = PARTS) -> Any:
    """What `start` promises."""
    value, grads = reference(form, start > 0, parts)
    grads = dict(grads)
    zeros = functools.partial(jax.tree.map, np.zeros_like)
    if form == "stacked":
        keep = np.arange(DEPTH) >= start
        grads["layers"] = jax.tree.map(
            lambda x: x * keep.reshape(-1, *[1] * (x.ndim - 1)).astype(x.dtype),
            jax.tree.map(np.asarray, grads["layers"]),
        )
    elif form == "listed":
        layers = grads["layers"]
        grads["layers"] = [*zeros(layers[:start]), *layers[start:]]
    else:
        for i in range(start):
            grads[f"block_{i + 9}"] = zeros(grads[f"block_{i + 9}"])
    return value, grads


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_every_cut_gives_the_numbers_of_a_whole_pass(form: str, remat: bool):
    """One compilation serves all; a cut that is known gives the same."""
    make, path = FORMS[form]
    params = make(stacked())
    fn = layered_value_and_grad(PARTS._replace(layers=path, remat=remat))
    traces = []

    @jax.jit
    def traced(params: Any, start: jax.Array) -> Any:
        traces.append(0)
        return fn(params, BATCH, start=start)

    for start in range(DEPTH):
        close(traced(params, jnp.int32(start)), expected(form, start))
    assert len(traces) == 1
    known = jax.jit(lambda p: fn(p, BATCH, start=2))(params)
    close(known, expected(form, 2))
    close(jax.jit(fn)(params, BATCH), expected(form, 0))


@pytest.mark.parametrize("form", ["stacked", "listed"])
def test_numbers_are_equal_to_the_bit(form: str):
    """Operation by operation, where no compiler sums in another order."""
    params = jax.tree.map(jnp.asarray, FORMS[form][0](stacked()))
    with jax.disable_jit():
        fn = layered_value_and_grad(PARTS)
        _, got = fn(params, BATCH, start=jnp.int32(0))
        want = jax.grad(lambda p: whole(PARTS, form)(p, BATCH)[0])(params)
    got, want = (layers_of(tree, form) for tree in (got, want))
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize("end", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_chosen_layers_have_compact_gradients(form: str, end: bool):
    make, path = FORMS[form]
    params = make(stacked())
    traces: list[int] = []
    grads_of = layered_value_and_grad(PARTS._replace(layers=path))

    @jax.jit
    def fn(params, batch, chosen):
        traces.append(1)
        return grads_of(params, batch, chosen=chosen, before=end)

    value, want = reference(form, not end)
    for chosen in ([2, 0], [1, 3], [3, 2]):
        got_value, got = fn(params, BATCH, chosen=np.array(chosen))
        close(got_value, value)
        layers = jax.tree.map(np.asarray, layers_of(want, form))
        close(got.layers, at(layers, chosen))
        close(got.rest["embed"], want["embed"])
        close(got.rest["norm"], want["norm"])
        assert len(jax.tree.leaves(got.rest)) == 2
    assert len(traces) == 1


def test_before_lets_the_ends_train_with_frozen_layers():
    params = stacked()
    fn = layered_value_and_grad(PARTS)
    _, got = jax.jit(lambda p, s: fn(p, BATCH, start=s, before=True))(params, 2)
    _, want = reference("stacked", False)
    close(got["embed"], want["embed"])
    close(got["layers"]["up"][2:], want["layers"]["up"][2:])
    assert not np.any(got["layers"]["up"][:2])


@pytest.mark.parametrize("form", ["stacked", "listed"])
def test_extras_of_each_layer_reach_the_loss(form: str):
    def noisy(layer: Any, x: Any, batch: Any) -> Any:
        x = block(layer, x, batch)
        return x, jnp.mean(jnp.square(x["x"]))

    def total(params: Any, x: Any, batch: Any, extras: Any) -> Any:
        loss, metrics = after(params, x, batch)
        return loss + 0.1 * jnp.sum(jnp.stack(list(extras))), metrics

    parts = Layered(before, noisy, total, extras=True)
    params = FORMS[form][0](stacked())
    fn = jax.jit(layered_value_and_grad(parts))
    for start in (0, 2):
        want = expected(form, start, parts)
        close(fn(params, BATCH, start=jnp.int32(start)), want)


@pytest.mark.parametrize("form", ["stacked", "listed"])
def test_bfloat16_keeps_its_dtype(form: str):
    params = FORMS[form][0](stacked(jnp.bfloat16))
    batch = batch_of(jnp.bfloat16)
    fn = layered_value_and_grad(PARTS)
    _, got = jax.jit(fn)(params, batch, start=jnp.int32(1))
    want = jax.jit(jax.grad(lambda p: whole(PARTS, form)(p, batch)[0]))(params)
    got, want = (layers_of(tree, form)["down"][1:] for tree in (got, want))
    close(got, want, 2e-2)


@pytest.mark.parametrize("form", ["stacked", "listed"])
def test_seeds_under_vmap_have_cuts_of_their_own(form: str):
    params = FORMS[form][0](stacked())
    fn = layered_value_and_grad(PARTS)
    starts = np.array([3, 0, 2], np.int32)
    got = jax.jit(jax.vmap(lambda s: fn(params, BATCH, start=s)))(starts)
    one = jax.jit(lambda s: fn(params, BATCH, start=s))
    rows = [one(s) for s in starts]
    close(got, jax.tree.map(lambda *x: np.stack(x), *rows))


@pytest.mark.parametrize(
    ("form", "mesh"), [("stacked", "explicit"), ("listed", "auto")], indirect=["mesh"]
)
def test_mesh(form: str, mesh: jax.sharding.Mesh):
    """One device's numbers; gradients are sharded as their parameters."""
    spec = {"up": (None, "model"), "down": ("model", None), "gain": (None,)}
    lead = (None,) if form == "stacked" else ()
    params = FORMS[form][0](stacked())
    layer = {k: jax.P(*lead, *v) for k, v in spec.items()}
    specs = {
        "embed": jax.P(None, "model"),
        "norm": jax.P(),
        "layers": layer if form == "stacked" else [layer] * DEPTH,
    }
    fn = layered_value_and_grad(PARTS)
    want = jax.jit(fn)(params, BATCH, start=jnp.int32(1))
    compact = jax.jit(fn)(params, BATCH, chosen=jnp.array([1, 3]))
    with jax.set_mesh(mesh):
        put = lambda x, s: jax.device_put(x, jax.NamedSharding(mesh, s))  # noqa: E731
        placed = jax.tree.map(put, params, specs)
        batch = {
            "tokens": put(BATCH["tokens"], jax.P()),
            "mask": put(BATCH["mask"], jax.P()),
        }
        got = jax.jit(fn)(placed, batch, start=jnp.int32(1))
        close(got, want)
        if jax.sharding.AxisType.Explicit in mesh.axis_types:
            for g, p in zip(
                jax.tree.leaves(got[1]), jax.tree.leaves(placed), strict=True
            ):
                assert jax.typeof(g).sharding.spec == jax.typeof(p).sharding.spec
        close(jax.jit(fn)(placed, batch, chosen=jnp.array([1, 3])), compact)


@pytest.mark.parametrize("form", ["stacked", "listed"])
def test_structured_weights_are_constants(form: str):
    """The layers' kernels packed or low-rank, their gains trained."""
    dense = stacked()
    factors = normal(6, DEPTH, 12, 2), normal(7, DEPTH, WIDTH, 2)

    def packed(layer: Any, a: jax.Array, b: jax.Array) -> Any:
        up = quantize(layer["up"], "int8", view=MatrixView.of(1, 1))
        return layer | {"up": up, "down": LowRank(layer["down"], a, b)}

    parts = PARTS._replace(block=lift(block))

    @jax.jit
    def both(dense: Any, factors: Any) -> Any:
        layers = packed(dense["layers"], *factors)
        params = dense | {"layers": layers}
        if form == "listed":
            every = (dense["layers"], *factors)
            params["layers"] = [packed(*at(every, i)) for i in range(DEPTH)]
        plain = dense | {"layers": layers_of(materialise(params), form)}
        got = layered_value_and_grad(parts)(params, BATCH, start=jnp.int32(1))
        fn = jax.value_and_grad(whole(PARTS, stop=True), has_aux=True)
        return got, fn(plain, BATCH)

    ((loss, _), got), ((want_loss, _), want) = both(dense, factors)
    close(loss, want_loss, 1e-5)
    if form == "stacked":
        assert got["layers"]["up"] is None and got["layers"]["down"] is None
        gains = np.asarray(got["layers"]["gain"])
    else:
        assert got["layers"][1]["up"] is None
        gains = np.stack([layer["gain"] for layer in got["layers"]])
    close(gains[1:], np.asarray(want["layers"]["gain"])[1:], 1e-5)
    assert not any(map(is_weight, jax.tree.leaves(got, is_leaf=is_weight)))


def test_nnx_state_is_a_tree_like_any_other():
    nodes = {
        "embed": nnx.Param(stacked()["embed"]),
        "norm": nnx.Param(stacked()["norm"]),
        "layers": nnx.Dict({k: nnx.Param(x) for k, x in stacked()["layers"].items()}),
    }
    state = nnx.state(nnx.Dict(nodes))

    def plain(fn: Any) -> Any:
        pure = lambda t: t.to_pure_dict() if isinstance(t, nnx.State) else dict(t)  # noqa: E731
        return lambda tree, *args: fn(
            jax.tree.map(
                lambda x: x[...] if isinstance(x, nnx.Variable) else x,
                pure(tree),
                is_leaf=lambda x: isinstance(x, nnx.Variable),
            ),
            *args,
        )

    parts = Layered(plain(before), plain(block), plain(after))
    _, got = jax.jit(layered_value_and_grad(parts))(state, BATCH, start=jnp.int32(2))
    _, want = expected("stacked", 2)
    assert isinstance(got, nnx.State)
    close(jax.tree.leaves(got), jax.tree.leaves(want))


def test_flops_fall_with_the_cut():
    """Layers written out, so that XLA counts each of them."""
    params = listed(stacked())
    fn = layered_value_and_grad(PARTS)

    def flops(start: int) -> float:
        jitted = jax.jit(lambda p: fn(p, BATCH, start=start))
        return jitted.lower(params).compile().cost_analysis()["flops"]

    found = [flops(start) for start in range(DEPTH)]
    assert found == sorted(found, reverse=True)
    assert found[-1] < 0.6 * found[0]


def test_frozen_layers_cost_no_time_at_run_time():
    """The cut is traced: the time falls all the same."""
    depth, width = 8, 192
    params = {"layers": normal(0, depth, width, width) / 8}
    parts = Layered(
        lambda params, batch: batch,
        lambda w, x, batch: jnp.tanh(x @ w),
        lambda params, x, batch: jnp.sum(x**2),
    )
    x = normal(1, 512, width)
    fn = jax.jit(layered_value_and_grad(parts))

    def once(start: int) -> float:
        begun = time.perf_counter()
        jax.block_until_ready(fn(params, x, start=jnp.int32(start)))
        return time.perf_counter() - begun

    times = {start: min(once(start) for _ in range(12)) for start in (0, depth - 1)}
    assert times[depth - 1] < 0.75 * times[0]


def test_weights_are_not_kept_twice():
    """What a backward pass needs of a layer's weights is read where they are."""
    depth, width = 8, 128
    params = {"layers": normal(0, depth, width, width)}
    parts = Layered(
        lambda params, batch: batch,
        lambda w, x, batch: jnp.tanh(x @ w),
        lambda params, x, batch: jnp.sum(x**2),
    )
    fn = jax.jit(layered_value_and_grad(parts))
    compiled = fn.lower(params, jnp.ones((2, width)), start=jnp.int32(0)).compile()
    weights = depth * width * width * 4
    assert compiled.memory_analysis().temp_size_in_bytes < 0.5 * weights


def test_layers_are_found():
    made = stacked()
    assert find_layers(made, "layers").depth == DEPTH
    assert find_layers(made, "layers").stacked
    index = find_layers(named(made), "block_*")
    assert index.depth == DEPTH and not index.stacked
    assert index.leaves["block_12/up"] == 3 and "norm" not in index.leaves
    index = find_layers({"conv": made, "dense": made["layers"]}, ["dense", "conv"])
    assert index.depth == 2
    assert (index.leaves["dense/up"], index.leaves["conv/norm"]) == (0, 1)
    abstract = jax.eval_shape(lambda: listed(made))
    assert find_layers(abstract, "layers").leaves["layers/3/gain"] == 3


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "both": ({"start": 1, "chosen": [1]}, "not both"),
    "start": ({"start": DEPTH}, "start=4 is out of range"),
    "negative": ({"start": -1}, "out of range"),
    "repeated": ({"chosen": [1, 1]}, "each at most once"),
    "beyond": ({"chosen": [0, DEPTH]}, "not a choice among layers 0 to 3"),
    "none": ({"chosen": jnp.zeros(0, jnp.int32)}, "names 0 layers"),
    "kind": ({"chosen": [0.5]}, "give integers"),
}


@pytest.mark.parametrize(("choice", "message"), BAD.values(), ids=BAD)
def test_a_bad_choice_is_told(choice: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        layered_value_and_grad(PARTS)(stacked(), BATCH, **choice)


def test_bad_models_are_told():
    params = stacked()

    def run(parts: Layered, params: Any = params, **choice: Any) -> None:
        jax.eval_shape(
            lambda p: layered_value_and_grad(parts)(p, BATCH, **choice), params
        )

    with pytest.raises(ValueError, match="matches no leaf; near"):
        run(PARTS._replace(layers="blocks_*"))
    with pytest.raises(ValueError, match="matches no leaf"):
        run(PARTS._replace(layers=["embed", "nothing"]))
    with pytest.raises(ValueError, match="block= is a sequence"):
        run(PARTS._replace(block=[block] * DEPTH))
    with pytest.raises(ValueError, match="3 functions for the 4 layers"):
        run(PARTS._replace(block=[block] * 3), listed(params))
    with pytest.raises(TypeError, match="int32"):
        run(PARTS._replace(before=lambda params, batch: batch["tokens"]))
    with pytest.raises(ValueError, match="take its mean"):
        run(PARTS._replace(after=lambda params, x, batch: x["x"]))
    uneven = params | {"layers": params["layers"] | {"gain": jnp.ones((3, WIDTH))}}
    with pytest.raises(ValueError, match="is no stack: leaf 'layers/down'"):
        run(PARTS, uneven)
    gap = named(params)
    del gap["block_10"]
    with pytest.raises(ValueError, match="have no gaps"):
        run(PARTS._replace(layers="block_*"), gap)
    odd = listed(params)
    odd["layers"][2] = odd["layers"][2] | {"up": jnp.ones((WIDTH, 3))}
    with pytest.raises(ValueError, match=r"'up' is .* in layer 0 and .* in layer 2"):
        run(PARTS, odd, chosen=[1])
