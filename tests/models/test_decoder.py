# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""The decoder is causal, one function in all its forms, and cheap to compile."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wlab.core import LowRank, lift, materialise
from wlab.models import decoder
from wlab.models.decoder import Decoder, DecoderConfig, RopeScaling, tiny

SMALL = DecoderConfig(
    vocab=31, width=32, depth=3, heads=4, kv_heads=2, head_dim=8, hidden=48
)


ROTATE = jax.jit(decoder._rotate)


def small(**overrides):
    return Decoder(dataclasses.replace(SMALL, **overrides))


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(1).integers(0, SMALL.vocab, (2, 11), np.int32)


@pytest.fixture(scope="module")
def variables(tokens):
    return jax.jit(small().init)(jax.random.key(0), tokens)


def stacked(variables):
    """The parameters of written-out blocks in the form that a scan has."""
    params = dict(variables["params"])
    blocks = [params.pop(f"blocks_{i}") for i in range(SMALL.depth)]
    return {
        "params": params | {"blocks": jax.tree.map(lambda *b: np.stack(b), *blocks)}
    }


def paths(variables):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(variables["params"])
    }


@functools.cache
def compiled(model):
    return jax.jit(model.apply)


def run(model, variables, tokens):
    return compiled(model)(variables, tokens)


def loss(model, variables, tokens):
    return jnp.sin(model.apply(variables, tokens)).sum()


def loss_and_gradients(model, variables, tokens):
    return jax.jit(jax.value_and_grad(lambda v: loss(model, v, tokens)))(variables)


@pytest.fixture(scope="module")
def written_out(variables, tokens):
    """Loss and gradients of blocks that are neither scanned nor made again."""
    return loss_and_gradients(small(), variables, tokens)


def test_parameter_names_and_shapes(tokens, variables):
    block = {
        "attention/query/kernel": (32, 4, 8),
        "attention/key/kernel": (32, 2, 8),
        "attention/value/kernel": (32, 2, 8),
        "attention/out/kernel": (4, 8, 32),
        "mlp/gate/kernel": (32, 48),
        "mlp/up/kernel": (32, 48),
        "mlp/down/kernel": (48, 32),
        "attention_norm/scale": (32,),
        "mlp_norm/scale": (32,),
    }
    ends = {"embed/embedding": (31, 32), "final_norm/scale": (32,)}
    assert paths(variables) == ends | {
        f"blocks_{i}/{name}": shape for i in range(3) for name, shape in block.items()
    }
    scanned = jax.eval_shape(
        small(scan=True, tied=False).init, jax.random.key(0), tokens
    )
    assert paths(scanned) == ends | {"head/kernel": (32, 31)} | {
        f"blocks/{name}": (3, *shape) for name, shape in block.items()
    }


@pytest.mark.parametrize(
    "form", [{"remat": True}, {"scan": True}, {"scan": True, "remat": True}]
)
def test_scan_and_remat_are_the_same_function(tokens, variables, written_out, form):
    want = written_out
    if form.get("scan"):
        want = (want[0], stacked(want[1]))
        variables = stacked(variables)
    got = loss_and_gradients(small(**form), variables, tokens)
    chex.assert_trees_all_close(got, want, rtol=1e-4, atol=1e-4)


def test_scan_draws_every_layer_anew(tokens):
    params = jax.jit(small(scan=True).init)(jax.random.key(0), tokens)["params"]
    kernel = params["blocks"]["mlp"]["up"]["kernel"]
    assert not np.allclose(kernel[0], kernel[1])


def test_remat_keeps_less_for_the_backward_pass():
    tokens = jnp.zeros((4, 64), jnp.int32)
    held = {}
    for remat in (False, True):
        model = small(scan=True, remat=remat)
        abstract = jax.eval_shape(model.init, jax.random.key(0), tokens)
        step = jax.jit(jax.grad(lambda v, model=model: loss(model, v, tokens)))
        analysis = step.lower(abstract).compile().memory_analysis()
        held[remat] = analysis.temp_size_in_bytes
    assert held[True] < held[False] / 2


def test_logits_do_not_see_the_future(tokens, variables):
    logits = run(small(), variables, tokens)
    changed = np.where(np.arange(11) == 6, (tokens + 1) % SMALL.vocab, tokens)
    after = run(small(), variables, changed)
    np.testing.assert_array_equal(after[:, :6], logits[:, :6])
    # And they do see the past: every later position is moved.
    assert (np.abs(np.asarray(after) - logits)[:, 6:].max(axis=-1) > 1e-4).all()


def test_grouped_queries_equal_repeated_key_heads(tokens, variables):
    params = jax.tree.map(lambda x: x, variables["params"])
    for i in range(SMALL.depth):
        for name in ("key", "value"):
            kernel = params[f"blocks_{i}"]["attention"][name]["kernel"]
            repeated = np.repeat(kernel, 2, axis=1)
            params[f"blocks_{i}"]["attention"][name]["kernel"] = repeated
    got = run(small(kv_heads=4), {"params": params}, tokens)
    np.testing.assert_allclose(got, run(small(), variables, tokens), atol=1e-5)


def test_rotary_scores_depend_on_distance_only():
    drawn = np.random.default_rng(0).normal(size=(2, 1, 5, 1, 8))
    query, against = drawn.astype(np.float32)

    @jax.jit
    def scores(shift):
        positions = jnp.arange(5) + shift
        turned = [decoder._rotate(x, positions, 100.0) for x in (query, against)]
        return jnp.einsum("bthd,bshd->bhts", *turned)

    np.testing.assert_allclose(scores(0), scores(700), atol=1e-4)
    # Distance does matter: a query that is moved alone scores otherwise.
    moved = ROTATE(query, np.arange(5) + 1, 100.0)
    assert not np.allclose(
        np.einsum("bthd,bshd->bhts", moved, against), scores(0), atol=1e-2
    )


def test_rotary_turns_by_the_angle_of_the_position():
    x = np.array([1.0, 1.0, 0.0, 0.0], np.float32).reshape(1, 1, 1, 4)
    got = np.ravel(ROTATE(x, np.array([3]), 100.0))
    # The two pairs have frequencies 1 and 100 ** -0.5.
    want = [np.cos(3), np.cos(0.3), np.sin(3), np.sin(0.3)]
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_rotary_angles_are_float32_for_narrow_activations():
    x = np.ones((1, 1, 1, 2), jnp.bfloat16)
    got = ROTATE(x, np.array([3001]), 100.0)
    assert got.dtype == jnp.bfloat16
    want = [np.cos(3001) - np.sin(3001), np.cos(3001) + np.sin(3001)]
    np.testing.assert_allclose(np.ravel(got).astype(np.float32), want, atol=0.01)


def test_attention_against_numpy(tokens, variables):
    """One attention layer, written out position by position."""
    p = jax.device_get(variables["params"]["blocks_0"]["attention"])
    x = np.random.default_rng(2).normal(size=(1, 5, 32)).astype(np.float32)
    got = jax.jit(decoder._Attention(SMALL).apply)({"params": p}, x)

    def rotated(vector, position):
        half = vector.shape[-1] // 2
        z = vector[:half] + 1j * vector[half:]
        z = z * np.exp(1j * position / 10_000.0 ** (np.arange(half) / half))
        return np.concatenate([z.real, z.imag])

    want = np.zeros((5, 32))
    for t in range(5):
        for h in range(4):
            q = rotated(x[0, t] @ p["query"]["kernel"][:, h], t)
            keys = [
                rotated(x[0, s] @ p["key"]["kernel"][:, h // 2], s)
                for s in range(t + 1)
            ]
            scores = np.exp(np.stack(keys) @ q / np.sqrt(8))
            values = x[0, : t + 1] @ p["value"]["kernel"][:, h // 2]
            mixed = scores / scores.sum() @ values
            want[t] += mixed @ p["out"]["kernel"][h]
    np.testing.assert_allclose(got[0], want, atol=1e-5)


def test_untied_head_can_hold_the_embedding(tokens, variables):
    table = variables["params"]["embed"]["embedding"]
    params = variables["params"] | {"head": {"kernel": table.T}}
    got = run(small(tied=False), {"params": params}, tokens)
    np.testing.assert_allclose(got, run(small(), variables, tokens), atol=1e-5)


def test_bfloat16_compute_and_storage(tokens, variables):
    exact = run(small(), variables, tokens)
    mixed = small(dtype=jnp.bfloat16)
    drawn = jax.eval_shape(mixed.init, jax.random.key(0), tokens)
    assert {x.dtype for x in jax.tree.leaves(drawn)} == {jnp.dtype("float32")}
    narrow = small(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    drawn = jax.eval_shape(narrow.init, jax.random.key(0), tokens)
    assert {x.dtype for x in jax.tree.leaves(drawn)} == {jnp.dtype("bfloat16")}
    stored = jax.tree.map(lambda x: np.asarray(x, jnp.bfloat16), variables)
    for model, params in ((mixed, variables), (narrow, stored)):
        logits = np.asarray(run(model, params, tokens))
        assert logits.dtype == jnp.float32
        assert 0 < np.abs(logits - exact).max() < 0.2
        # The head works in float32: its logits are not values of bfloat16.
        assert (logits != logits.astype(jnp.bfloat16).astype(jnp.float32)).any()


def test_products_are_in_the_compute_dtype(tokens, variables):
    model = small(dtype=jnp.bfloat16)
    jaxpr = str(jax.make_jaxpr(model.apply)(variables, tokens))
    products = [line for line in jaxpr.splitlines() if " = dot_general[" in line]
    inside = [line for line in products if "bf16[" in line.split(" = ")[0]]
    # Seven dense layers a block; the head alone is float32.
    assert len(inside) >= 7 * SMALL.depth


def test_compiles_once(tokens, variables):
    @jax.jit
    @chex.assert_max_traces(n=1)
    def apply(variables, tokens):
        return small().apply(variables, tokens)

    apply(variables, tokens)
    apply(jax.tree.map(lambda x: x + 1, variables), tokens + 0)


def test_length_and_depth_do_not_grow_the_scanned_program():
    def equations(depth):
        model = small(scan=True, depth=depth)
        tokens = jnp.zeros((1, 4), jnp.int32)
        abstract = jax.eval_shape(model.init, jax.random.key(0), tokens)
        return len(str(jax.make_jaxpr(model.apply)(abstract, tokens)).splitlines())

    assert equations(2) == equations(12)


@pytest.mark.parametrize("form", [{}, {"scan": True, "remat": True}])
def test_structured_weights_reach_every_layer(tokens, form):
    model = small(tied=False, **form)
    variables = jax.jit(model.init)(jax.random.key(0), tokens)
    stack = 1 if form else 0

    def low_rank(path, kernel):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if not name.endswith("kernel"):
            return kernel
        inputs = stack * ("blocks" in name) + (2 if "/out/" in name else 1)
        lead = kernel.shape[: stack * ("blocks" in name)]
        rows = kernel.shape[len(lead) : inputs]
        columns = kernel.shape[inputs:]
        a = 0.1 * jax.random.normal(jax.random.key(2), (*lead, *rows, 2))
        b = jax.random.normal(jax.random.key(3), (*lead, *columns, 2))
        return LowRank(kernel, a, b, stack=len(lead))

    @jax.jit
    def both(variables):
        structured = jax.tree_util.tree_map_with_path(low_rank, variables)
        return (
            lift(model.apply)(structured, tokens),
            model.apply(materialise(structured), tokens),
        )

    got, want = both(variables)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    assert not np.allclose(got, run(model, variables, tokens), atol=1e-2)


def test_tiny_is_about_a_million_parameters():
    model = Decoder(tiny())
    tokens = jnp.zeros((1, 8), jnp.int32)
    abstract = jax.eval_shape(model.init, jax.random.key(0), tokens)
    assert 0.8e6 < sum(x.size for x in jax.tree.leaves(abstract)) < 1.2e6
    assert tiny(width=64, scan=False) == dataclasses.replace(
        tiny(), width=64, scan=False
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"heads": 4, "kv_heads": 3}, "not a multiple of kv_heads=3"),
        ({"head_dim": 7}, "head_dim=7 is odd"),
        ({"depth": 0}, "depth must be positive, not 0"),
        ({"vocab": -1}, "vocab must be positive"),
        ({"norm_eps": 0.0}, "norm_eps must be positive"),
        ({"dtype": jnp.int8}, "not a float dtype"),
        ({"window": 0}, "window must be positive"),
        ({"activation": "relu"}, "choose one of silu, gelu, gelu_tanh"),
        ({"activation": "gelu", "experts": 2}, "experts have silu"),
        ({"rope_scaling": RopeScaling(8.0, 64, 4.0, 1.0)}, "high larger than low"),
    ],
)
def test_a_config_that_cannot_be_is_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **overrides)


def test_tokens_that_are_none_are_refused(variables):
    for bad in (jnp.zeros((2, 3)), jnp.zeros(3, jnp.int32)):
        with pytest.raises(ValueError, match="tokens must be integers of shape"):
            small().apply(variables, bad)


@pytest.mark.parametrize("offset", [False, True])
def test_norms_with_a_bias(offset, tokens):
    plain = small(norm_offset=offset)
    shapes = jax.eval_shape(plain.init, jax.random.key(0), tokens)["params"]
    params = jax.tree.map(lambda x: jnp.full(x.shape, 0.25, x.dtype), shapes)
    model, more = decoder.with_norm_bias(plain, params)
    assert decoder.with_norm_bias(model, more)[0] is model
    assert jax.tree.structure(more) == jax.tree.structure(
        jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    )
    more["final_norm"]["bias"] += jnp.arange(SMALL.width)
    x = np.random.default_rng(0).normal(size=(2, 3, SMALL.width)).astype(np.float32)
    want = decoder.final_norm(plain)(params, x) + np.arange(SMALL.width)[None, None]
    np.testing.assert_allclose(decoder.final_norm(model)(more, x), want, rtol=1e-5)
