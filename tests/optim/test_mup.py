# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""muP's rules over width: classes, multipliers, chains, and the decoder's widths."""

import dataclasses
import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import wlab
from wlab.core import leaves_with_paths
from wlab.models.decoder import Decoder, DecoderConfig
from wlab.optim import mup
from wlab.quant import Quantized, quantize_tree

BASE = DecoderConfig(
    vocab=19, width=16, depth=2, heads=2, kv_heads=1, head_dim=4, hidden=24
)
TOKENS = np.arange(10).reshape(2, 5)


def model(width: int, *, grow: Any = "heads", **overrides: Any) -> Decoder:
    base = dataclasses.replace(BASE, **overrides)
    return Decoder(mup.decoder_configs(base, [width], grow=grow)[width])


@functools.cache
def shapes(width: int, **overrides: Any) -> Any:
    init = model(width, **overrides).init
    return jax.eval_shape(init, jax.random.key(0), TOKENS)["params"]


def values(tree: Any, seed: int) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), tree)


@functools.cache
def made(width: int, **overrides: Any) -> Any:
    return values(shapes(width, **overrides), 0)


def classes(width: int, **overrides: Any) -> Any:
    return mup.classify(
        shapes(width, **overrides), shapes(16, **overrides), shapes(32, **overrides)
    )


def gradients(params: Any) -> Any:
    """With the sign of the weights, so that steps and decay do not cancel."""
    sizes = values(params, 1)
    return jax.tree.map(lambda g, w: np.abs(g) * np.sign(w), sizes, params)


def first(tx: Any) -> Any:
    """The first updates, of gradients and parameters, in one program."""
    return jax.jit(lambda g, p: tx.update(g, tx.init(p), p)[0])


@jax.jit
def pack(params: Any) -> Any:
    return quantize_tree(params, "fp8_e4m3")


def paths(tree: Any) -> dict[str, Any]:
    return dict(leaves_with_paths(tree))


# --- Classes ---------------------------------------------------------------------


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("grow", ["heads", "head_dim"])
def test_classes_of_the_decoder(scan: bool, grow: str):
    """Matrices are the kernels of blocks; every axis that may grow counts."""
    found = paths(classes(64, scan=scan, grow=grow, tied=False))
    for path, width in found.items():
        block = path.startswith("blocks") and path.endswith("kernel")
        assert width.kind == ("matrix" if block else "vector"), path
        if block:
            assert width.fan_in == width.fan_out == 4, path
    assert found["head/kernel"].fan_in == 4 and found["head/kernel"].fan_out == 1
    assert found["embed/embedding"].fan_out == 4


def test_convolutions_grow_in_channels_and_scalars_do_not():
    def tree(d: int) -> Any:
        return {
            "Conv_0": {"kernel": np.zeros((3, 3, d, 2 * d)), "bias": np.zeros(2 * d)},
            "stem": {"kernel": np.zeros((3, 3, 1, d))},
            "temperature": np.zeros(()),
        }

    found = paths(mup.classify(tree(12), tree(4)))
    assert found["Conv_0/kernel"].kind == "matrix"
    assert found["Conv_0/kernel"].fan_in == 3
    assert found["stem/kernel"].kind == found["Conv_0/bias"].kind == "vector"
    assert found["temperature"].kind == "scalar"


def test_overrides_take_the_first_pattern_that_matches():
    given = {"*query/kernel": "vector", "*/kernel": "scalar"}
    found = paths(mup.classify(shapes(32), shapes(16), overrides=given))  # type: ignore[arg-type]
    assert found["blocks_0/attention/query/kernel"].kind == "vector"
    assert found["blocks_0/attention/key/kernel"].kind == "scalar"
    assert found["blocks_0/attention/query/kernel"].fan_in == 2


def test_packed_trees_have_the_same_classes():
    packed = jax.eval_shape(lambda p: quantize_tree(p, "int8"), made(32))
    want = paths(classes(32))
    assert paths(mup.classify(packed, shapes(16))) == want


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": 3}, r"'blocks_2/attention/key/kernel' of base is not in the param"),
        ({"depth": 1}, r"'blocks_1/attention/key/kernel' is not in base"),
        ({"scan": True, "depth": 3}, r"is not in base|of base"),
        ({"vocab": 20}, r"'embed/embedding': shape \(19, 32\), base \(20, 16\)"),
    ],
)
def test_another_depth_or_vocabulary_is_told(change: dict, message: str):
    with pytest.raises(ValueError, match=message):
        mup.classify(shapes(32), shapes(16, **change), shapes(32, **change))


def test_another_depth_of_stacked_layers_is_told():
    message = r"leaf 'blocks/.*kernel': shape \(2, .*axis 0, which is stacked.*depth"
    with pytest.raises(ValueError, match=message):
        mup.classify(shapes(32, scan=True), shapes(16, scan=True, depth=3))


def test_other_bad_classes_are_told():
    with pytest.raises(ValueError, match=r"same shapes as the base's.*pass delta="):
        mup.classify(shapes(16), shapes(16))
    with pytest.raises(ValueError, match=r"pattern '\*quary\*' matches no leaf"):
        mup.classify(shapes(32), shapes(16), overrides={"*quary*": "vector"})
    with pytest.raises(ValueError, match="class 'matrx' of"):
        mup.classify(shapes(32), shapes(16), overrides={"*": "matrx"})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="differ in their number of axes"):
        mup.classify({"w": np.zeros((2, 2))}, {"w": np.zeros(2)})


# --- Multipliers -----------------------------------------------------------------


@pytest.mark.parametrize("q", [2, 4])
def test_multipliers_of_the_rule(q: int):
    found = classes(16 * q)
    lr, wd = map(paths, mup.multipliers(found))
    for path, width in paths(found).items():
        if width.kind == "matrix":
            assert lr[path] == 1 / q
            assert wd[path] == pytest.approx(q**0.5)
            assert lr[path] * wd[path] == pytest.approx(q**-0.5)
        else:
            assert (lr[path], wd[path]) == (1, 0)


def test_doubling_twice_composes():
    twice = paths(classes(64))
    first = paths(mup.classify(shapes(32), shapes(16)))
    second = paths(mup.classify(shapes(64), shapes(32)))
    for path, width in twice.items():
        assert width.fan_in == first[path].fan_in * second[path].fan_in
        assert width.kind == first[path].kind == second[path].kind
    for exps in ((-1.0, 0.5), (-0.7, 1.3)):
        a, b, c = (
            [np.array(jax.tree.leaves(m)) for m in mup.multipliers(tree, *exps)]
            for tree in (
                classes(64),
                mup.classify(shapes(32), shapes(16)),
                mup.classify(shapes(64), shapes(32)),
            )
        )
        np.testing.assert_allclose(a[0], b[0] * c[0], rtol=1e-6)


def test_at_the_base_it_is_adamw_with_a_mask():
    params, found = made(16), classes(16)
    mask = jax.tree.map(lambda w: w.kind == "matrix", found)
    got = mup.mup_adamw(1e-2, 0.3, found)
    want = optax.adamw(1e-2, 0.9, 0.95, 1e-12, weight_decay=0.3, mask=mask)
    steps = [first(tx) for tx in (got, want)]
    for grads in (gradients(params), jax.tree.map(np.ones_like, params)):
        ups = [step(grads, params) for step in steps]
        chex.assert_trees_all_close(*ups, rtol=1e-6)


def test_zero_gradients_decay_matrices_only():
    params, found = made(64), classes(64)
    tx = mup.mup_adamw(0.1, 0.5, found)
    zero = jax.tree.map(np.zeros_like, params)
    updates = paths(first(tx)(zero, params))
    for path, width in paths(found).items():
        w = paths(params)[path]
        keep = 1 - (0.1 / 4) * (0.5 * 2) if width.kind == "matrix" else 1
        after = w + np.asarray(updates[path])
        np.testing.assert_allclose(after, keep * w, rtol=1e-6)


def test_exponents_are_independent_and_may_be_traced():
    params, found = made(32), classes(32)
    grads = gradients(params)

    @jax.jit
    def step(lr_exp: Any, wd_exp: Any) -> Any:
        tx = mup.mup_adamw(0.1, 0.5, found, lr_exp=lr_exp, wd_exp=wd_exp)
        return tx.update(grads, tx.init(params), params)[0]

    path = "blocks_0/mlp/up/kernel"
    w, g = paths(params)[path], paths(grads)[path]
    for lr_exp, wd_exp in ((-1.0, 0.5), (0.0, 1.0), (-0.5, 0.0)):
        want = -0.1 * 2**lr_exp * (np.sign(g) + 0.5 * 2**wd_exp * w)
        got = paths(step(lr_exp, wd_exp))[path]
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


def test_inject_hyperparams_and_schedules():
    params, found = made(32), classes(32)
    grads = gradients(params)
    plain = mup.mup_adamw(0.1, 0.5, found)
    make = functools.partial(mup.mup_adamw, classes=lambda _: found)
    injected = optax.inject_hyperparams(make, static_args=("classes",))(
        learning_rate=lambda count: 0.1, weight_decay=0.5
    )
    ups = [first(t)(grads, params) for t in (plain, injected)]
    chex.assert_trees_all_close(*ups, rtol=1e-5)


def test_moments_are_float32_for_narrow_parameters():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), made(32))
    tx = mup.mup_adamw(0.1, 0.5, classes(32))
    updates, state = jax.eval_shape(lambda p: tx.update(p, tx.init(p), p), params)
    assert {x.dtype for x in jax.tree.leaves(state) if x.ndim} == {jnp.dtype("f4")}
    new = jax.eval_shape(optax.apply_updates, params, updates)
    assert {x.dtype for x in jax.tree.leaves(new)} == {jnp.dtype(jnp.bfloat16)}


# --- Chains ----------------------------------------------------------------------


def test_the_transforms_in_a_chain_of_optax():
    params, found = made(32), classes(32)
    grads = gradients(params)
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.trace(0.9),
        mup.add_decayed_weights(0.5, found),
        mup.scale_by_mup(found),
        optax.scale_by_learning_rate(0.1),
    )
    updates = first(tx)(grads, params)
    norm = np.sqrt(sum(np.sum(g**2) for g in jax.tree.leaves(grads)))
    path = "blocks_1/mlp/down/kernel"
    w, g = paths(params)[path], paths(grads)[path] / norm
    want = -0.05 * (g + 0.5 * 2**0.5 * w)
    np.testing.assert_allclose(paths(updates)[path], want, rtol=1e-5, atol=1e-8)
    head = "embed/embedding"
    want = -0.1 * paths(grads)[head] / norm
    np.testing.assert_allclose(paths(updates)[head], want, rtol=1e-5, atol=1e-8)


def test_masked_leaves_pass_through():
    params, found = made(32), classes(32)
    mask = wlab.core.select(params, "*mlp*")
    tx = optax.masked(mup.scale_by_mup(found), mask)
    grads = gradients(params)
    updates = first(tx)(grads, params)
    for path, u in paths(updates).items():
        factor = 0.5 if "mlp/" in path and "kernel" in path else 1
        np.testing.assert_allclose(u, factor * paths(grads)[path])


def test_partition_equals_the_transforms():
    params, found = made(32), classes(32)
    grads = gradients(params)
    got = mup.partition(
        lambda lr, wd: optax.adamw(0.1 * lr, 0.9, 0.95, 1e-12, weight_decay=0.5 * wd),
        found,
    )
    want = mup.mup_adamw(0.1, 0.5, found)
    ups = [first(t)(grads, params) for t in (got, want)]
    chex.assert_trees_all_close(*ups, rtol=1e-5)


@pytest.mark.parametrize("method", ["adam", "sgd"])
def test_eco_over_packed_weights_takes_the_multipliers(method: str):
    """clip -> ECO: each leaf's own learning rate and decay, one norm for the tree.

    Bit for bit what the whole tree gets behind the same clip from ECO with a leaf's
    learning rate and decay. Of SGD, since Adam hardly sees how much was clipped.
    """
    found = classes(32, scan=True)
    packed = pack(made(32, scan=True))
    grads = gradients(made(32, scan=True))

    def eco(lr: float, wd: float) -> optax.GradientTransformation:
        if method == "sgd":
            return wlab.optim.eco_sgd(3.0 * lr, weight_decay=0.02 * wd)
        return wlab.optim.eco(0.01 * lr, weight_decay=0.5 * wd)

    def run(tx: Any, clip: float = 1.0) -> Any:
        tx = optax.chain(optax.clip_by_global_norm(clip), tx)

        @jax.jit
        def step(params: Any, state: Any, scale: float) -> Any:
            updates, state = tx.update(optax.tree.scale(scale, grads), state, params)
            return optax.apply_updates(params, updates), state

        params, state = packed, jax.jit(tx.init)(packed)
        for scale in (1.0, 0.1, 3.0):
            params, state = step(params, state, scale)
        return params

    made_by = []

    def make(lr: float, wd: float) -> optax.GradientTransformation:
        made_by.append((lr, wd))
        return eco(lr, wd)

    rest = optax.sgd(1.0)
    got = paths(run(mup.partition(make, found, rest=rest)))
    assert set(made_by) == {(0.5, 2**0.5)}
    matrix, vector = paths(run(eco(0.5, 2**0.5))), paths(run(rest_only(eco, rest)))
    for path, width in paths(found).items():
        want = matrix if width.kind == "matrix" else vector
        assert isinstance(got[path], Quantized) == (width.kind == "matrix")
        chex.assert_trees_all_equal(got[path], want[path])
    if method == "sgd":
        looser = paths(run(mup.partition(eco, found, rest=rest), clip=2.0))
        assert not any(
            np.array_equal(a, b)
            for a, b in zip(
                *(jax.tree.leaves(jax.jit(wlab.materialise)(t)) for t in (got, looser)),
                strict=True,
            )
        )


def rest_only(eco: Any, rest: Any) -> optax.GradientTransformation:
    """The optimiser of the leaves that are not packed, beside any ECO."""

    return optax.partition(
        {"packed": eco(1.0, 1.0), "rest": rest},
        lambda tree: wlab.core.map_with_path(
            lambda p, _: "packed" if p.endswith("kernel") else "rest", tree
        ),
    )


def test_packed_weights_cannot_be_scaled_and_the_error_says_what_can():
    packed, grads = pack(made(32)), made(32)
    for tx in (
        optax.chain(wlab.optim.eco(0.1), mup.scale_by_mup(classes(32))),
        mup.add_decayed_weights(0.1, classes(32)),
    ):
        with pytest.raises(TypeError, match=r"'blocks_0/.*Quantized.*mup\.partition"):
            jax.eval_shape(first(tx), grads, packed)


def test_a_leaf_without_a_class_is_told():
    found = classes(32)
    with pytest.raises(ValueError, match=r"leaf 'new' of shape \(3,\) has no class"):
        mup.scale_by_mup(found).init({"new": jnp.zeros(3)})
    with pytest.raises(ValueError, match="needs the parameters"):
        mup.add_decayed_weights(0.1, found).update(shapes(32), optax.EmptyState())


# --- The decoder's widths --------------------------------------------------------


def test_decoder_configs():
    configs = mup.decoder_configs(BASE, [16, 32, 24], grow="head_dim")
    assert list(configs) == [16, 32, 24]
    c = configs[32]
    assert (c.head_dim, c.heads, c.hidden, c.depth) == (8, 2, 48, 2)
    assert c.attention_scale == pytest.approx(4**0.5 / 8)
    assert (c.output_scale, c.init_width) == (0.5, 16)
    wide = mup.decoder_configs(BASE, [32])[32]
    assert (wide.heads, wide.kv_heads, wide.head_dim) == (4, 2, 4)
    assert wide.attention_scale is None


@pytest.mark.parametrize(("grow", "tied"), [("heads", True), ("head_dim", False)])
def test_at_the_base_the_decoder_is_what_it_was(grow: Any, tied: bool):
    """To the rounding of attention's scale, one over the root of 4."""
    plain = Decoder(dataclasses.replace(BASE, tied=tied, depth=1))
    scaled = model(16, grow=grow, tied=tied, depth=1)

    @jax.jit
    def run(key: jax.Array) -> Any:
        variables = [m.init(key, TOKENS) for m in (plain, scaled)]
        return variables, [m.apply(variables[0], TOKENS) for m in (plain, scaled)]

    variables, logits = run(jax.random.key(0))
    chex.assert_trees_all_equal(*variables)
    np.testing.assert_allclose(*logits, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tied", [True, False])
def test_init_and_output_are_those_of_the_functions_for_any_model(tied: bool):
    scaled = model(64, tied=tied, depth=1)
    plain = Decoder(
        dataclasses.replace(scaled.config, init_width=None, output_scale=1.0)
    )
    found = classes(64, tied=tied, depth=1)
    variables = jax.jit(plain.init)(jax.random.key(0), TOKENS)
    want = jax.jit(scaled.init)(jax.random.key(0), TOKENS)["params"]
    got = mup.scale_init(variables["params"], found)
    chex.assert_trees_all_close(got, want, rtol=1e-6)

    @jax.jit
    def run(got: Any, want: Any) -> Any:
        logits = mup.output_multiplier(found) * plain.apply({"params": got}, TOKENS)
        return logits, scaled.apply({"params": want}, TOKENS)

    logits, want_logits = run(got, want)
    np.testing.assert_allclose(logits, want_logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("base", "width", "grow", "message"),
    [
        (BASE, 20, "heads", "width 20 from a base of width 16 and heads=2 gives no"),
        (BASE, 20, "head_dim", "head_dim=4 gives no whole even head_dim"),
        (BASE, -16, "heads", "gives no whole hidden"),
        (BASE, 32, "depth", "grow='depth' is neither"),
        (dataclasses.replace(BASE, experts=2), 32, "heads", "open"),
    ],
)
def test_bad_widths_are_told(base: Any, width: int, grow: Any, message: str):
    with pytest.raises(ValueError, match=message):
        mup.decoder_configs(base, [width], grow=grow)


def test_no_single_output_is_told():
    with pytest.raises(ValueError, match="0 widths of a head"):
        mup.output_multiplier({"w": mup.Width("matrix", 2.0, 2.0)})
