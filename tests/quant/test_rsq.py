# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Rotations that leave a model as it is, and tokens that count by importance."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wlab import core, quant
from wlab.core import _hadamard
from wlab.models.decoder import Decoder, DecoderConfig

CONFIG = DecoderConfig(
    vocab=17, width=24, depth=2, heads=4, kv_heads=2, head_dim=6, hidden=20
)
TOKENS = jax.random.randint(jax.random.key(0), (2, 8), 0, 17)


# --- Hadamard --------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 40, 72, 128])
def test_transforms_are_orthogonal(n: int):
    h = np.asarray(core.hadamard_matrix(n))
    np.testing.assert_allclose(h @ h.T, np.eye(n), atol=1e-5)
    np.testing.assert_allclose(np.abs(h), n**-0.5, atol=1e-6)


def test_every_table_is_one():
    for k in _hadamard._SIZES:
        table = _hadamard._paley(k)
        if table is None:
            assert k in (156, 172)
            continue
        assert set(np.unique(table)) <= {-1, 1}
        np.testing.assert_array_equal(table.astype(int) @ table.T, k * np.eye(k))


def test_transforms_along_any_axis_and_back():
    x = jax.random.normal(jax.random.key(1), (3, 24, 5)).astype(jnp.bfloat16)
    assert core.hadamard(x, 1).dtype == jnp.bfloat16
    x = x.astype(jnp.float32)
    y = core.hadamard(x, 1)
    np.testing.assert_allclose(
        y, jnp.moveaxis(core.hadamard(jnp.moveaxis(x, 1, 2)), 2, 1)
    )
    np.testing.assert_allclose(core.hadamard(y, 1, transpose=True), x, atol=1e-5)
    np.testing.assert_allclose(jnp.linalg.norm(y), jnp.linalg.norm(x), rtol=1e-5)
    wide = jax.random.normal(jax.random.key(2), (2, 512))
    sylvester = jnp.asarray(_hadamard._sylvester(512), jnp.float32)
    np.testing.assert_allclose(
        core.hadamard(wide), wide @ sylvester / 512**0.5, atol=1e-4
    )
    np.testing.assert_allclose(core.hadamard(core.hadamard(wide)), wide, atol=1e-5)


def test_random_rotations():
    for make in (core.random_hadamard, core.random_orthogonal):
        made = jax.jit(make, static_argnums=1)
        q, other = made(jax.random.key(0), 20), made(jax.random.key(1), 20)
        np.testing.assert_allclose(q @ q.T, jnp.eye(20), atol=1e-5)
        assert float(jnp.abs(q - other).max()) > 0.1
    with pytest.raises(ValueError, match="no Hadamard matrix of size 22"):
        core.hadamard(jnp.ones(22))
    with pytest.raises(ValueError, match="not 3 times"):
        core.hadamard(jnp.ones(20), table=np.ones((3, 3)))


# --- The residual stream -----------------------------------------------------------


def scattered(config: DecoderConfig) -> Any:
    """Parameters with scales of norms that are not one."""
    params = Decoder(config).init(jax.random.key(1), TOKENS)

    def moved(path: str, x: jax.Array) -> jax.Array:
        if not path.endswith("scale"):
            return x
        key = core.fold_path(jax.random.key(2), path)
        return x * jnp.exp(0.5 * jax.random.normal(key, x.shape))

    return core.map_with_path(moved, params)


@pytest.fixture(scope="module")
def params() -> Any:
    return jax.jit(scattered, static_argnums=0)(CONFIG)


@pytest.mark.parametrize(
    "changes",
    [{"tied": False, "scan": True}, {"tied": True, "experts": 2, "depth": 1}],
    ids=["scanned", "experts"],
)
def test_the_model_stays_the_same(changes: dict[str, Any]):
    config = dataclasses.replace(CONFIG, **changes)
    free = Decoder(dataclasses.replace(config, tied=False))
    stream = quant.decoder_stream(experts=config.experts > 0)

    @jax.jit
    def run() -> Any:
        params = scattered(config)
        fused = quant.fuse_norms(params, stream)
        turned = quant.rotate(fused, core.random_hadamard(3, config.width), stream)
        logits = (
            Decoder(config).apply(params, TOKENS),
            *(free.apply(other, TOKENS) for other in (fused, turned)),
        )
        tables = [p["params"]["embed"]["embedding"] for p in (params, turned)]
        return logits, fused, tables

    (want, *others), fused, tables = run()
    for got in others:
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    for path, x in core.leaves_with_paths(fused):
        if path.endswith("scale"):
            np.testing.assert_array_equal(x, 1)
    assert float(np.abs(tables[0] - tables[1]).max()) > 0.1


def test_groups_of_channels_turned_alike(params: Any):
    stream = quant.decoder_stream()
    fused = quant.fuse_norms(params, stream)
    q = core.random_hadamard(3, 8)
    small = quant.rotate(fused, q, stream)
    whole = quant.rotate(fused, jnp.kron(jnp.eye(3), q), stream)
    for a, b in zip(jax.tree.leaves(small), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_a_norm_with_a_bias():
    stream = quant.ResidualStream(
        "embed/e", "head/kernel", (("n/scale", ("r/kernel",)),), ()
    )
    params = {
        "embed": {"e": jnp.ones((3, 4))},
        "head": {"kernel": jnp.ones((4, 3))},
        "n": {"scale": jnp.arange(4.0), "bias": jnp.array([1.0, 2.0, 3.0, 4.0])},
        "r": {
            "kernel": jax.random.normal(jax.random.key(0), (4, 2)),
            "bias": jnp.ones(2),
        },
    }
    x = jnp.array([[0.5, -1.0, 2.0, 0.1]])

    def read(p: Any) -> jax.Array:
        y = x * p["n"]["scale"][None] + p["n"]["bias"][None]
        return y @ p["r"]["kernel"] + p["r"]["bias"][None]

    fused = quant.fuse_norms(params, stream)
    np.testing.assert_allclose(read(fused), read(params), atol=1e-5)
    np.testing.assert_array_equal(fused["n"]["bias"], 0)
    with pytest.raises(ValueError, match="root mean square"):
        quant.rotate(fused, jnp.eye(4), stream)
    del params["r"]["bias"]
    with pytest.raises(ValueError, match="does not have"):
        quant.fuse_norms(params, stream)


def test_bad_streams_are_told(params: Any):
    stream = quant.decoder_stream()
    fused = quant.fuse_norms(params, stream)
    q = jnp.eye(CONFIG.width)
    with pytest.raises(ValueError, match="call fuse_norms first"):
        quant.rotate(params, q, stream)
    with pytest.raises(ValueError, match="not one everywhere"):
        quant.rotate({**params["params"], "head": fused["params"]["head"]}, q, stream)
    with pytest.raises(ValueError, match="does not fit a stream"):
        quant.rotate(fused, jnp.eye(7), stream)
    with pytest.raises(ValueError, match="router"):
        quant.fuse_norms(params, quant.decoder_stream(experts=True))
    with pytest.raises(ValueError, match="no leaf is or ends with"):
        quant.rotate(fused, q, stream._replace(writers=("mlp/sideways/kernel",)))
    kernel = fused["params"]["blocks_0"]["mlp"]["down"]
    kernel["kernel"] = quant.rtn(kernel["kernel"], group=20)
    with pytest.raises(TypeError, match="structured weight"):
        quant.rotate(fused, q, stream)


# --- Tokens ----------------------------------------------------------------------


@jax.jit
def attention(key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries of four heads, keys of two, and their causal probabilities."""
    t = 10
    a, b = jax.random.split(key)
    q = jax.random.normal(a, (3, t, 4, 6))
    k = jax.random.normal(b, (3, t, 2, 6))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, jnp.repeat(k, 2, 2)) / 6**0.5
    mask = jnp.tril(jnp.ones((t, t), bool))[None, None]
    return q, k, jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), -1)


@pytest.mark.parametrize(("chunk", "normalize"), [(4, "linear"), (128, "sqrt")])
def test_attention_in_chunks(chunk: int, normalize: Any):
    q, k, probs = attention(jax.random.key(4))
    got = quant.attention_concentration_of(q, k, chunk=chunk, normalize=normalize)
    want = quant.attention_concentration(probs, normalize=normalize)
    np.testing.assert_allclose(got, want, atol=1e-5)
    np.testing.assert_allclose(probs.sum((1, 2, 3)), 40, rtol=1e-5)


def test_importance_within_its_range():
    _, _, probs = attention(jax.random.key(5))
    r = quant.attention_concentration(probs, 0.1, 0.9)
    np.testing.assert_allclose(r.min(-1), 0.1, atol=1e-6)
    np.testing.assert_allclose(r.max(-1), 0.9, atol=1e-6)
    np.testing.assert_allclose(quant.token_weights(r).mean(-1), 1, rtol=1e-5)
    flat = jnp.full((1, 2, 5, 5), 0.2)
    np.testing.assert_array_equal(quant.attention_concentration(flat), 1)
    same = quant.attention_concentration(probs, 0.5, 0.5)
    np.testing.assert_allclose(same, 0.5)
    x = jax.random.normal(jax.random.key(6), (3, 10, 4))
    assert (
        quant.activation_norm(x).argmax(-1) == jnp.linalg.norm(x, axis=-1).argmax(-1)
    ).all()
    np.testing.assert_array_equal(quant.activation_change(x, x + 1), 1)
    assert quant.first_tokens(2, 4, 1).tolist() == [[1, 0, 0, 0]] * 2


def test_the_weighted_hessian():
    x = jax.random.normal(jax.random.key(7), (3, 10, 4))
    r = jax.random.uniform(jax.random.key(8), (3, 10)) + 0.1
    plain = quant.weighted_hessian(x)
    flat = x.reshape(-1, 4)
    np.testing.assert_allclose(plain, 2 / 3 * flat.T @ flat, rtol=1e-4, atol=1e-5)
    even = quant.weighted_hessian(x, jnp.full((3, 10), 0.3))
    np.testing.assert_allclose(even, plain, rtol=1e-4, atol=1e-5)
    h = quant.weighted_hessian(x, r)
    np.testing.assert_allclose(
        quant.weighted_hessian(x, 5 * r), h, rtol=1e-5, atol=1e-5
    )
    np.testing.assert_allclose(
        quant.weighted_hessian(x[::-1], r[::-1]), h, rtol=1e-5, atol=1e-5
    )
    one = quant.weighted_hessian(x[:1], r[:1].at[0, 1:].set(0))
    np.testing.assert_allclose(one, 20 * jnp.outer(x[0, 0], x[0, 0]), rtol=1e-4)


def test_important_tokens_lose_less():
    """The weighted error falls, and the plain one rises."""

    @jax.jit
    def ratios(seed: jax.Array) -> jax.Array:
        a, b, c = jax.random.split(jax.random.key(seed), 3)
        mix = jax.random.normal(a, (32, 32)) / 32**0.5
        tokens = jax.random.normal(b, (4, 48, 32))
        r = jnp.where(jnp.arange(48) % 8 == 0, 1.0, 0.005)[None].repeat(4, 0)
        x = jnp.where(r[..., None] == 1, tokens @ mix, tokens @ mix.T)
        w = jax.random.normal(c, (32, 16))

        def errors(used: jax.Array) -> jax.Array:
            h = quant.weighted_hessian(x, used)
            q = quant.gptq(w, h, bits=3, group=None, block=32).materialise()
            off = jnp.sum((x @ (q - w)) ** 2, -1)
            return jnp.stack([(off * r).sum(), off.sum()])

        own, even = jax.lax.map(errors, jnp.stack([r, jnp.ones_like(r)]))
        return own / even

    weighted, plain = np.mean([ratios(seed) for seed in range(3)], 0)
    assert weighted < 0.85 and plain > 1


def test_sequences_rolled():
    got = quant.rolled(jnp.arange(8)[None].repeat(2, 0), 4)
    assert got.shape == (8, 8) and got[1].tolist() == [6, 7, 0, 1, 2, 3, 4, 5]
    with pytest.raises(ValueError, match="does not divide"):
        quant.rolled(jnp.zeros((1, 7), int), 2)
