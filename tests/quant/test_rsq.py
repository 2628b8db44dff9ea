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
from wlab.models import decoder_importance, rotated, with_norm_bias
from wlab.models.decoder import Decoder, DecoderConfig, _rotate

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


SHAPES = {1: (3, 24, 5), 2: (2, 512)}  # by seed


def test_transforms_along_any_axis_and_back():
    x, wide = (np.random.default_rng(i).normal(size=n) for i, n in SHAPES.items())

    @jax.jit
    def run(x: jax.Array, wide: jax.Array) -> Any:
        y = core.hadamard(x, 1)
        moved = jnp.moveaxis(core.hadamard(jnp.moveaxis(x, 1, 2)), 2, 1)
        back = core.hadamard(y, 1, transpose=True)
        once = core.hadamard(wide)
        return y, moved, back, once, core.hadamard(once)

    y, moved, back, once, twice = run(x.astype(np.float32), wide.astype(np.float32))
    np.testing.assert_allclose(y, moved, atol=1e-6)
    np.testing.assert_allclose(back, x, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(y), np.linalg.norm(x), rtol=1e-5)
    sylvester = _hadamard._sylvester(512).astype(float)
    np.testing.assert_allclose(once, wide @ sylvester / 512**0.5, atol=1e-4)
    np.testing.assert_allclose(twice, wide, atol=1e-5)
    narrow = jax.ShapeDtypeStruct((3, 24, 5), jnp.bfloat16)
    assert jax.eval_shape(lambda x: core.hadamard(x, 1), narrow).dtype == jnp.bfloat16


def test_random_rotations():
    @jax.jit
    def made(key: jax.Array) -> Any:
        return core.random_hadamard(key, 20), core.random_orthogonal(key, 20)

    pairs = (jax.device_get(made(jax.random.key(i))) for i in range(2))
    for q, other in zip(*pairs, strict=True):
        np.testing.assert_allclose(q @ q.T, np.eye(20), atol=1e-5)
        assert np.abs(q - other).max() > 0.1
    with pytest.raises(ValueError, match="no Hadamard matrix of size 22"):
        core.hadamard(jnp.ones(22))
    with pytest.raises(ValueError, match="not 3 times"):
        core.hadamard(jnp.ones(20), table=np.ones((3, 3)))


# --- The residual stream -----------------------------------------------------------


def scattered(config: DecoderConfig) -> Any:
    """Parameters with scales of norms that are not one."""
    shapes = jax.eval_shape(Decoder(config).init, jax.random.key(1), TOKENS)
    rng = np.random.default_rng(2)

    def one(path: str, x: Any) -> jax.Array:
        noise = rng.normal(size=x.shape)
        if not path.endswith("scale"):
            return jnp.asarray(noise / x.shape[-1] ** 0.5, x.dtype)
        return jnp.asarray(np.exp(0.5 * noise) - config.norm_offset, x.dtype)

    return core.map_with_path(one, shapes)


@pytest.fixture(scope="module")
def params() -> Any:
    return scattered(CONFIG)


@pytest.fixture(scope="module")
def fused(params: Any) -> Any:
    return jax.jit(quant.fuse_norms, static_argnums=1)(params, quant.decoder_stream())


@pytest.mark.parametrize(
    "changes",
    [
        {"tied": False, "scan": True, "norm_offset": True},
        {"tied": True, "experts": 2, "depth": 1},
    ],
    ids=["scanned", "experts"],
)
def test_the_model_stays_the_same(changes: dict[str, Any]):
    """Turned, and then with norms that have a bias."""
    config = dataclasses.replace(CONFIG, **changes)
    params = scattered(config)
    made = []

    @jax.jit
    def run(params: Any) -> Any:
        q = core.random_hadamard(3, config.width)
        model, turned = with_norm_bias(*rotated(Decoder(config), params, q))
        made.append(model)
        want = Decoder(config).apply(params, TOKENS)
        return want, model.apply(turned, TOKENS), turned

    want, got, turned = run(params)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    for path, x in core.leaves_with_paths(turned):
        if path.endswith(("scale", "norm/bias")):
            np.testing.assert_array_equal(x, 1 if path.endswith("scale") else 0)
    tables = [p["params"]["embed"]["embedding"] for p in (params, turned)]
    assert float(np.abs(tables[0] - tables[1]).max()) > 0.1
    with pytest.raises(ValueError, match="before its norms get biases"):
        rotated(made[0], turned)


def test_groups_of_channels_turned_alike(fused: Any):
    @jax.jit
    def run(fused: Any) -> Any:
        stream = quant.decoder_stream()
        q = core.random_hadamard(3, 8)
        small = quant.rotate(fused, q, stream)
        return small, quant.rotate(fused, jnp.kron(jnp.eye(3), q), stream)

    for a, b in zip(*map(jax.tree.leaves, run(fused)), strict=True):
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

    @jax.jit
    def read(p: Any) -> jax.Array:
        y = x * p["n"]["scale"][None] + p["n"]["bias"][None]
        return y @ p["r"]["kernel"] + p["r"]["bias"][None]

    fused = jax.jit(quant.fuse_norms, static_argnums=1)(params, stream)
    np.testing.assert_allclose(read(fused), read(params), atol=1e-5)
    np.testing.assert_array_equal(fused["n"]["bias"], 0)
    with pytest.raises(ValueError, match="root mean square"):
        quant.rotate(fused, jnp.eye(4), stream)
    del params["r"]["bias"]
    with pytest.raises(ValueError, match="does not have"):
        quant.fuse_norms(params, stream)


def test_bad_streams_are_told(params: Any, fused: Any):
    stream = quant.decoder_stream()
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

    def structured(path: str, x: Any) -> Any:
        return core.Permuted(x, jnp.arange(20)) if path.endswith("down/kernel") else x

    with pytest.raises(TypeError, match="structured weight"):
        quant.rotate(core.map_with_path(structured, fused), q, stream)


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

    @jax.jit
    def run(q: jax.Array, k: jax.Array, probs: jax.Array) -> Any:
        of = quant.attention_concentration_of
        want = quant.attention_concentration(probs, normalize=normalize)
        return of(q, k, chunk=chunk, normalize=normalize), want

    np.testing.assert_allclose(*run(q, k, probs), atol=1e-5)
    np.testing.assert_allclose(np.asarray(probs).sum((1, 2, 3)), 40, rtol=1e-5)


def test_importance_of_a_decoders_tokens(params: Any):
    """From the queries and keys that a block makes of its inputs."""
    config = dataclasses.replace(CONFIG, window=5, attention_scale=0.7)
    layer = params["params"]["blocks_1"]
    x = jax.random.normal(jax.random.key(3), (2, 8, config.width))

    @jax.jit
    def run(layer: Any, x: jax.Array) -> Any:
        got = decoder_importance(config, 0.1)(layer, x, None)
        size = jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + config.norm_eps)
        y = x / size * layer["attention_norm"]["scale"][None, None]
        q, k = (
            _rotate(
                jnp.einsum("btd,dhe->bthe", y, layer["attention"][name]["kernel"]),
                jnp.arange(8),
                config.rope_base,
            )
            for name in ("query", "key")
        )
        scores = 0.7 * jnp.einsum("bqhd,bkhd->bhqk", q, jnp.repeat(k, 2, 2))
        back = jnp.arange(8)[:, None] - jnp.arange(8)[None]
        seen = ((back >= 0) & (back < 5))[None, None]
        probs = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), -1)
        r = quant.attention_concentration(probs, 0.1)
        return got, quant.token_weights(r).reshape(-1)

    np.testing.assert_allclose(*run(layer, x), rtol=1e-4)


def test_importance_within_its_range():
    _, _, probs = attention(jax.random.key(5))
    x = np.random.default_rng(6).normal(size=(3, 10, 4)).astype(np.float32)

    @jax.jit
    def run(probs: jax.Array, x: jax.Array) -> Any:
        r = quant.attention_concentration(probs, 0.1, 0.9)
        flat = quant.attention_concentration(jnp.full((1, 2, 5, 5), 0.2))
        same = quant.attention_concentration(probs, 0.5, 0.5)
        change = quant.activation_change(x, x + 1)
        return r, quant.token_weights(r), flat, same, quant.activation_norm(x), change

    r, weights, flat, same, norm, change = jax.device_get(run(probs, x))
    np.testing.assert_allclose(r.min(-1), 0.1, atol=1e-6)
    np.testing.assert_allclose(r.max(-1), 0.9, atol=1e-6)
    np.testing.assert_allclose(weights.mean(-1), 1, rtol=1e-5)
    np.testing.assert_array_equal(flat, 1)
    np.testing.assert_allclose(same, 0.5)
    assert (norm.argmax(-1) == np.linalg.norm(x, axis=-1).argmax(-1)).all()
    np.testing.assert_array_equal(change, 1)
    assert quant.first_tokens(2, 4, 1).tolist() == [[1, 0, 0, 0]] * 2


def test_importance_of_tokens_that_are_rare_or_unlike():
    rng = np.random.default_rng(8)
    tokens = rng.integers(0, 6, (3, 10))
    x = (100 + rng.normal(size=(3, 10, 4))).astype(np.float32)
    counts = np.bincount(tokens.ravel(), minlength=7)

    @jax.jit
    def run(tokens: jax.Array, counts: jax.Array, x: jax.Array) -> Any:
        often = quant.token_frequency(tokens, counts, 0.1)
        rare = quant.token_frequency(tokens, counts, 0.1, rare=True)
        like = quant.token_similarity(x, 0.1)
        return often, rare, like, quant.token_similarity(x, 0.1, unlike=True)

    often, rare, like, unlike = jax.device_get(run(tokens, counts, x))
    far = ((x[:, :, None] - x[:, None]) ** 2).sum(-1).mean(-1)

    def want(score: np.ndarray) -> np.ndarray:
        low, high = score.min(-1, keepdims=True), score.max(-1, keepdims=True)
        return 0.1 + 0.9 * (score - low) / (high - low)

    np.testing.assert_allclose(often, want(counts[tokens]), rtol=1e-5)
    np.testing.assert_allclose(often + rare, 1.1, rtol=1e-5)
    np.testing.assert_allclose(unlike, want(far), rtol=1e-4)
    np.testing.assert_allclose(like + unlike, 1.1, rtol=1e-5)


def test_the_weighted_hessian():
    rng = np.random.default_rng(7)
    x = rng.normal(size=(3, 10, 4)).astype(np.float32)
    r = rng.uniform(0.1, 1, (3, 10)).astype(np.float32)

    @jax.jit
    def run(x: jax.Array, r: jax.Array) -> Any:
        of = quant.weighted_hessian
        plain = of(x), of(x, jnp.full((3, 10), 0.3))
        alike = of(x, r), of(x, 5 * r), of(x[::-1], r[::-1])
        return plain, alike, of(x[:1], r[:1].at[0, 1:].set(0))

    plain, alike, one = jax.device_get(run(x, r))
    flat = x.reshape(-1, 4)
    for h in plain:
        np.testing.assert_allclose(h, 2 / 3 * flat.T @ flat, rtol=1e-4, atol=1e-5)
    for h in alike[1:]:
        np.testing.assert_allclose(h, alike[0], rtol=1e-5, atol=1e-5)
    assert np.abs(alike[0] - plain[0]).max() > 0.1
    np.testing.assert_allclose(one, 20 * np.outer(x[0, 0], x[0, 0]), rtol=1e-4)


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
