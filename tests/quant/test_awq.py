# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""AWQ and QuantLRM keep what they promise; parity stands in tests/parity."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import wlab
from tests.parity import awq as reference
from wlab import quant
from wlab.core import MatrixView, as_matrices, capture
from wlab.models._scales import decoder_groups
from wlab.models.decoder import DecoderConfig, _Block
from wlab.quant import ScaleGroup
from wlab.quant._minmax import MinMax, split
from wlab.quant._quantlrm import UpdateStats

D, HIDDEN, HEADS, GROUP = 32, 64, 4, 16
OPTIONS: Any = {"bits": 3, "group": GROUP}
GROUPS = reference.groups_of(HEADS)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


W = normal(1, 24, 6)
X = normal(2, 40, 24) * np.geomspace(0.1, 10, 24, dtype=np.float32)


def make(seed: int, spread: float = 1.0) -> tuple[Any, np.ndarray]:
    """A block and inputs whose channels are of unlike size."""
    seeds = iter(range(100 * seed, 100 * seed + 12))
    params = {}
    for name in reference.LINEARS:
        n = HIDDEN if name == "mlp.down_proj" else D
        m = HIDDEN if name in ("mlp.gate_proj", "mlp.up_proj") else D
        params[name] = {"kernel": normal(next(seeds), n, m) / np.float32(n**0.5)}
    for name in reference.NORMS:
        scale = np.exp(np.float32(spread) * normal(next(seeds), D))
        params[name] = {"scale": scale}
    return params, normal(next(seeds), 4, 24, D)


@jax.jit
def run(params: Any, x: jax.Array) -> dict[str, Any]:
    """All steps on one block, and the error of its output after each."""
    y, seen = reference.block(params, x, HEADS)
    inputs = {f"{name}/kernel": a for name, a in seen.items()}
    found = quant.awq_scale(params, inputs, GROUPS, **OPTIONS)
    clipped = quant.awq_clip(
        found.params, inputs, GROUPS, scales=found.scales, **OPTIONS
    )
    trees = [params, found.params, clipped]
    packed = [wlab.materialise(reference.rounded(tree, **OPTIONS)) for tree in trees]
    many = jax.tree.map(lambda *a: jnp.stack(a), *packed, found.params)
    out = jax.lax.map(lambda p: reference.block(p, x, HEADS)[0], many)
    return {
        "y": y,
        "folded": out[3],
        "found": found,
        "clipped": clipped,
        "errors": jnp.mean((out[:3] - y[None]) ** 2, (1, 2, 3)),
    }


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    return jax.device_get([run(*make(seed)) for seed in range(3)])


def test_scales_and_clipping_each_cut_the_error(results: Any):
    plain, scaled, clipped = np.mean([r["errors"] for r in results], 0)
    assert scaled < 0.85 * plain
    assert clipped < 0.95 * scaled


def test_folding_changes_nothing(results: Any):
    for r in results:
        size = np.abs(r["y"]).max()
        np.testing.assert_allclose(r["folded"], r["y"], atol=1e-5 * size)


def test_most_groups_gain_from_scales(results: Any):
    better = [x.min() < x[0] for r in results for x in r["found"].losses.values()]
    assert len(better) == 12 and np.mean(better) > 0.7


def test_queries_and_keys_are_not_clipped(results: Any):
    r = results[0]
    for name in reference.LINEARS:
        same = r["clipped"][name]["kernel"] == r["found"].params[name]["kernel"]
        assert same.all() == (name in ("self_attn.q_proj", "self_attn.k_proj"))


def test_channels_alike_gain_little():
    params, x = make(0, spread=0.0)
    plain, scaled, _ = run(params, x)["errors"]
    assert scaled > 0.8 * plain


def dot(params: Any, x: jax.Array) -> jax.Array:
    return x @ params["kernel"]


@functools.partial(jax.jit, static_argnames=("bits", "group", "normalise"))
def searched(
    w: Any, x: Any, act: Any, bits: int = 3, group: Any = 8, normalise: bool = True
) -> Any:
    return quant.search_scale(
        dot,
        {"kernel": w},
        ["kernel"],
        x,
        act,
        grid=MinMax(bits),
        group=group,
        normalise=normalise,
    )


def test_the_search_follows_its_channels():
    def search(*args: Any, **options: Any) -> Any:
        return jax.device_get(searched(*args, **options))

    act = np.abs(X).mean(0)
    found = search(W, X, act)
    assert found.scale[-1] > found.scale[0]
    rounded = np.asarray(jax.jit(lambda w: MinMax(3).round(w, 8))(W))
    plain = np.mean((X @ (rounded - W)) ** 2)
    np.testing.assert_allclose(found.losses[0], plain, rtol=1e-4)
    assert found.losses.min() < 0.7 * plain
    np.testing.assert_allclose(search(W, X, 7 * act).scale, found.scale, rtol=1e-4)
    # Within a group an order of channels is as good as another.
    order = np.arange(24).reshape(3, 8)[[2, 0, 1]][:, ::-1].reshape(-1)
    turned = search(W[order], X[:, order], act[order])
    np.testing.assert_allclose(turned.scale, found.scale[order], rtol=1e-5)
    # A factor cancels in rounding between extremes.
    other = search(W, X, act, normalise=False)
    np.testing.assert_allclose(other.losses, found.losses, rtol=1e-3)
    fine = search(W, X, act, bits=16, group=None)
    assert fine.losses.max() < 1e-6 * np.mean((X @ W) ** 2)
    hole = W.copy()
    hole[0, 0] = np.nan
    broken = search(hole, X, act)
    assert np.isnan(broken.losses).all() and np.isnan(broken.scale).all()


@pytest.mark.parametrize("group", [8, 10])
def test_clipping_is_the_best_of_ten(group: int | None):
    """Against the outputs of every token, also where the last group is shorter."""
    grid = MinMax(3)
    bound = jax.jit(functools.partial(quant.search_clip, grid=grid, group=group))(W, X)
    size = group or len(W)
    parts = np.asarray(jax.jit(split, static_argnums=1)(W, group), np.float64)
    x = np.pad(np.asarray(X), [(0, 0), (0, -len(W) % size)])
    x = x.reshape(len(X), -1, size)
    most = np.abs(parts).max(1)
    errors = []
    for j in range(10):
        m = (most * (1 - j / 20))[:, None]
        cut = np.clip(parts, -m, m)
        low = cut.min(1, keepdims=True)
        scale = (cut.max(1, keepdims=True) - low) / 7
        zero = np.clip(-np.round(low / scale - 7e-6), 0, 7)
        code = np.clip(np.round(cut / scale - 7e-6) + zero, 0, 7)
        off = scale * (code - zero) - parts
        errors.append(np.mean(np.einsum("tgi,gio->tgo", x, off) ** 2, 0))
    best = np.argmin(errors, 0)
    assert len(np.unique(best)) > 3
    np.testing.assert_allclose(bound, most * (1 - best / 20), rtol=1e-5)


def test_groups_clipped_at_both_ends_round_as_exact_arithmetic_does():
    sizes = np.linspace(0.1, 3, 50, dtype=np.float32)
    w = np.array([-0.3, -0.21, 0.1, 0.3], np.float32) * sizes[:, None]
    grid = MinMax(3)

    @jax.jit
    def fit(w: jax.Array) -> Any:
        found = grid.fit(w, 1)
        return found.zero, grid.codes(w, jax.tree.map(lambda a: a[:, None], found))

    zero, codes = fit(w)
    assert set(np.asarray(zero).tolist()) == {4.0}
    np.testing.assert_array_equal(codes, np.tile([[0.0, 2, 5, 7]], (50, 1)))


@pytest.mark.parametrize(
    ("shape", "view", "group"),
    [
        ((4, 4, 6), MatrixView.of(2, 1), 2),
        ((4, 4, 6), MatrixView.of(2, 1), 8),
        ((4, 4, 6), MatrixView.of(2, 1), None),
        ((16, 2, 3), MatrixView.of(1, 2), 4),
    ],
)
def test_kernels_of_several_axes(
    group: int | None, shape: tuple[int, ...], view: MatrixView
):
    w = normal(3, *shape)

    @jax.jit
    def both(w: jax.Array) -> Any:
        q = quant.minmax(w, bits=3, group=group, view=view)
        flat = as_matrices(w, view)
        one = quant.minmax(flat, bits=3, group=group)
        dense = as_matrices(q.materialise(), view)
        return q, one, dense, MinMax(3).round(flat, group)

    q, one, dense, want = both(w)
    np.testing.assert_allclose(dense, want, atol=1e-6)
    assert q.scale.size == 16 // (group or 16) * 6
    assert q.size_in_bits == one.size_in_bits


# --- what a scale is folded into ---------------------------------------------------


def norm(x: jax.Array) -> jax.Array:
    return x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True))


def fused(p: Any, x: jax.Array) -> jax.Array:
    q, k, v = jnp.split(x @ p["qkv"] + p["bias"][None], 3, -1)
    return (jax.nn.softmax(q @ k.T, -1) @ v) @ p["kernel"]


KINDS: dict[str, tuple[tuple[str, ...], Any]] = {
    "norm": (
        ("scale", "bias"),
        lambda p, x: (norm(x) * p["scale"][None] + p["bias"][None]) @ p["kernel"],
    ),
    "offset_norm": (
        ("scale",),
        lambda p, x: (norm(x) * (1 + p["scale"])[None]) @ p["kernel"],
    ),
    "linear": (
        ("up", "bias"),
        lambda p, x: jax.nn.relu(x @ p["up"] + p["bias"][None]) @ p["kernel"],
    ),
    "linear_last": (("qkv", "bias"), fused),
    "activation": (
        ("divisor",),
        lambda p, x: jax.nn.gelu(x / 3) / p["divisor"][None] @ p["kernel"],
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_fold_is_exact(kind: Any):
    previous, fn = KINDS[kind]
    sizes = {
        "scale": (6,),
        "bias": (18,) if kind == "linear_last" else (6,),
        "up": (6, 6),
        "qkv": (6, 18),
        "divisor": (6,),
        "kernel": (6, 4),
    }
    params = {k: normal(i, *v) for i, (k, v) in enumerate(sizes.items())}
    x = normal(9, 5, 6)
    scale = np.geomspace(0.2, 4, 6, dtype=np.float32)

    @jax.jit
    def fold(params: Any) -> Any:
        new = quant.fold_scale(params, previous, kind, ["kernel"], scale)
        return new, fn(new, x), fn(params, x)

    new, got, want = fold(params)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    changed = {k for k in params if not np.array_equal(new[k], params[k])}
    assert changed == {*previous, "kernel"}


# --- the decoder ---------------------------------------------------------------------

CONFIG = DecoderConfig(
    vocab=8,
    width=16,
    depth=2,
    heads=4,
    kv_heads=2,
    head_dim=4,
    hidden=24,
    norm_offset=True,
    qkv_bias=True,
)
LENGTH = 6


def apply_block(params: Any, x: jax.Array) -> jax.Array:
    return _Block(CONFIG).apply({"params": params}, x)  # type: ignore[return-value]


def test_the_decoder_is_the_same_after_folding():
    x = normal(6, 2, LENGTH, CONFIG.width)
    groups = decoder_groups(CONFIG, LENGTH, tied=True)
    plain = [one._replace(previous=()) for one in groups]

    shapes = jax.eval_shape(_Block(CONFIG).init, jax.random.key(0), x)["params"]
    params = jax.tree.map(
        lambda s: np.random.default_rng(0).normal(0, 0.3, s.shape).astype(s.dtype),
        shapes,
    )

    @jax.jit
    def run(params: Any, x: jax.Array) -> Any:
        y, inputs = capture(apply_block)(params, x)
        parts = [
            one.inspect(params, inputs[one.paths[0]]) for one in groups if one.inspect
        ]
        tied = quant.awq_scale(params, inputs, groups[1:2], bits=3, group=8)
        new = tied.params
        for one in (groups[0], *groups[2:]):
            n = inputs[one.paths[0]].shape[-1]
            scale = jnp.geomspace(0.2, 4, n)
            new = quant.fold_scale(new, one.previous, one.kind, one.paths, scale)
        packed = quant.awq(new, inputs, plain, group=8, clip=False)
        lifted = wlab.lift(apply_block)(packed, x)
        dense = apply_block(wlab.materialise(packed), x)
        return tied, packed, y, x + sum(parts), apply_block(new, x), lifted, dense

    tied, packed, y, summed, folded, lifted, dense = run(params, x)
    size = np.abs(np.asarray(y)).max()
    np.testing.assert_allclose(summed, y, atol=1e-5 * size)
    np.testing.assert_allclose(folded, y, atol=1e-5 * size)
    np.testing.assert_allclose(lifted, dense, atol=1e-5 * size)
    assert packed["attention"]["out"]["kernel"].scale.shape == (2, 1, 16)
    (out,) = tied.scales.values()
    out = np.asarray(out).reshape(2, 2, 4)
    np.testing.assert_array_equal(out[:, 0], out[:, 1])  # of shared heads
    assert np.ptp(out) > 0.01


def test_shared_heads_are_left_alone_without_tied():
    groups = decoder_groups(CONFIG, LENGTH)
    assert [one.paths for one in groups if not one.previous] == [
        ("attention/out/kernel",)
    ]
    with pytest.raises(ValueError, match="some tokens"):
        decoder_groups(dataclasses.replace(CONFIG, experts=2), LENGTH)


ONE = (ScaleGroup(("down",), ("up",), "linear"),)
PAIR = {"up": W.T, "down": W}
SMALL: Any = {"bits": 3, "group": 8}
HOLED = np.where(np.arange(40)[:, None] == 0, np.float32("nan"), X)


def test_stacked_layers_are_a_loop_and_the_whole_its_steps():
    params = {"up": np.stack([W.T, W.T]), "down": np.stack([W, W**3])}
    inputs = {"down": np.stack([X, X[:, ::-1]])}
    whole = functools.partial(quant.awq, groups=ONE, **SMALL)
    both = jax.device_get(jax.jit(jax.vmap(whole))(params, inputs))
    one = jax.jit(whole)

    @jax.jit
    def steps(params: Any, inputs: Any) -> Any:
        found = quant.awq_scale(params, inputs, ONE, **SMALL)
        new = quant.awq_clip(found.params, inputs, ONE, scales=found.scales, **SMALL)
        packed = quant.minmax(new["down"], **SMALL)
        return packed, wlab.lift(jnp.dot)(X, packed) - X @ packed.materialise()

    for i in range(2):
        layer = jax.tree.map(lambda a, i=i: a[i], (params, inputs))
        got, (want, off) = one(*layer), steps(*layer)
        np.testing.assert_array_equal(got["down"].codes, want.codes)
        np.testing.assert_array_equal(both["down"].codes[i], want.codes)
        np.testing.assert_allclose(both["down"].scale[i], want.scale, rtol=1e-5)
        np.testing.assert_allclose(both["up"][i], got["up"], rtol=1e-5)
        assert np.abs(np.asarray(off)).max() < 1e-4
    assert both["down"].codes.dtype == jnp.uint4
    assert both["down"].shape == (2, *W.shape)


def test_narrow_parameters_keep_their_dtype():
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PAIR)
    inputs = {"down": X.astype(jnp.bfloat16)}
    scaled = jax.eval_shape(lambda p: quant.awq_scale(p, inputs, ONE), narrow)
    assert {x.dtype for x in scaled.params.values()} == {jnp.dtype(jnp.bfloat16)}
    assert scaled.losses["down"].dtype == jnp.float32
    packed = jax.eval_shape(lambda p: quant.awq(p, inputs, ONE), narrow)
    assert packed["down"].dtype == packed["up"].dtype == jnp.bfloat16
    assert packed["down"].scale.dtype == jnp.float32


def test_the_program_does_not_grow():
    def size(n: int) -> int:
        params = {"up": np.zeros((4, n)), "down": np.zeros((n, 4))}
        inputs = {"down": np.zeros((2 * n, n))}
        fn = functools.partial(quant.awq, groups=ONE, group=16)
        return str(jax.make_jaxpr(fn)(params, inputs)).count(" = ")

    assert size(32) == size(128)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: quant.awq(PAIR, {"up": X}, ONE), "no input is given for any of down"),
        (lambda: quant.awq(PAIR, {"down": X}, ONE * 2), "in two groups"),
        (lambda: quant.awq(PAIR, {"down": X}, ONE, bits=1), "2 to 8"),
        (lambda: quant.awq(PAIR, {"down": X[:, 1:]}, ONE), "24 channels"),
        (lambda: quant.awq({"down": W}, {"down": X}, ONE), "no leaf 'up'"),
        (lambda: quant.awq(PAIR, {"down": HOLED}, ONE), "all losses"),
        (
            lambda: quant.fold_scale(PAIR, ["up"], "linear", ["down"], np.ones(5)),
            "shape \\(5,\\)",
        ),
        (
            lambda: quant.fold_scale(PAIR, ["up"], "line", ["down"], np.ones(24)),  # type: ignore[arg-type]
            "is none of",
        ),
        (
            lambda: quant.fold_scale(PAIR, ["up"], "norm", ["down"], np.ones(24)),
            "as many entries",
        ),
        (lambda: quant.tie_heads(np.ones(24), (4, 3)), "equally many"),
        (
            lambda: quant.minmax(np.ones((4, 6, 2)), group=4, view=MatrixView.of(2, 1)),
            "borders of input axes",
        ),
        (lambda: quant.minmax(W[0]), "give its view"),
        (lambda: quant.search_clip(W, X[:, 1:], grid=MinMax(3)), "are needed"),
    ],
)
def test_bad_input_is_told(call: Any, message: str):
    with pytest.raises(ValueError, match=message):
        call()


def test_packed_kernels_are_refused():
    packed = PAIR | {"down": jax.eval_shape(lambda: quant.minmax(W, group=8))}
    with pytest.raises(TypeError, match="materialise"):
        quant.awq(packed, {"down": X}, ONE)
    with pytest.raises(TypeError, match="floats"):
        quant.minmax(np.ones((4, 4), np.int32))


# --- QuantLRM ------------------------------------------------------------------------


def sizes(seed: int = 0) -> list[np.ndarray]:
    """Updates of two matrices and of a stack, a third of them zeros."""
    rng = np.random.default_rng(seed)
    return [
        np.where(rng.random(shape) < 0.7, rng.lognormal(size=shape), 0).astype("f")
        for shape in [(6, 5), (4, 7), (2, 3, 5)]
    ]


stats = jax.jit(quant.update_stats, static_argnames="mid")
both_ends = jax.jit(quant.both_ends)
channel_importance = jax.jit(quant.channel_importance)


def test_the_median_is_exact_and_the_middle_that_of_memory():
    for seed in range(4):  # odd and even numbers
        arrays = sizes(seed)
        order = [np.swapaxes(x, -1, -2).reshape(-1) for x in arrays]
        flat = np.concatenate(order)
        flat = flat[flat > 0]
        found = stats(arrays)
        assert float(found.mid) == np.median(flat)
        assert (float(found.low), float(found.high)) == (flat.min(), flat.max())
        stored = stats(arrays, mid="storage")
        n = len(flat)
        want = (flat[(n - 1) // 2] + flat[n // 2]) / 2
        np.testing.assert_allclose(stored.mid, want, rtol=1e-6)


def test_both_ends_count_most():
    arrays = sizes()
    found = stats(arrays)
    low, high, mid = map(float, (found.low, found.high, found.mid))
    ends = np.array([low, high, mid, 0, (mid + high) / 2], np.float32)
    want = [10, 10, 1, 1, 1 + 9 / 4]
    np.testing.assert_allclose(both_ends(ends, found), want, rtol=1e-5)
    y = np.asarray(both_ends(arrays[0], found))
    assert y.min() >= 1 and y.max() <= 10
    tripled = [3 * x for x in arrays]
    scaled = both_ends(tripled[0], stats(tripled))
    np.testing.assert_allclose(scaled, y, rtol=1e-4)


def test_importance_of_channels():
    found = stats(sizes())
    x = sizes()[0]
    importance = np.asarray(channel_importance(x, found))
    assert importance.shape == (6,) and importance.min() >= 1
    turned = channel_importance(x[::-1, ::-1], found)  # channels, and outputs
    np.testing.assert_allclose(np.asarray(turned)[::-1], importance, rtol=1e-6)
    more = channel_importance(np.pad(x, [(0, 0), (0, 1)]), found)
    zeros = np.sum(x == 0, 1)
    want = (importance / (1 + zeros) * 5 + 1) / 6 * (2 + zeros)
    np.testing.assert_allclose(more, want, rtol=1e-5)
    both = channel_importance(np.stack([x, 2 * x]), found)
    np.testing.assert_allclose(np.asarray(both)[0], importance, rtol=1e-6)


def test_two_equal_models_say_nothing():
    none = [0 * x for x in sizes()]
    with pytest.raises(ValueError, match="two models are one"):
        quant.update_stats(none)
    assert np.isnan(channel_importance(none[0], stats(none))).all()
    with pytest.raises(ValueError, match="neither"):
        quant.update_stats(none, "mean")  # type: ignore[arg-type]


def test_updates_are_those_of_the_stored_numbers():
    base = {"down": {"kernel": W}, "norm": {"scale": np.ones(3, np.float32)}}
    new = jax.tree.map(lambda x: x * np.float32(1 + 1e-3), base)

    @jax.jit
    def three(new: Any, base: Any) -> Any:
        short = (jax.tree.map(lambda x: x.astype(jnp.bfloat16), t) for t in (new, base))
        return (
            quant.update_sizes(new, base),
            quant.update_sizes(new, base, dtype=jnp.bfloat16)["down/kernel"],
            quant.update_sizes(*short)["down/kernel"],
        )

    fine, stored, narrow = jax.device_get(three(new, base))
    assert set(fine) == {"down/kernel"} and (fine["down/kernel"] > 0).all()
    np.testing.assert_array_equal(stored, narrow)
    assert 0.3 < float((stored == 0).mean()) < 0.9
    with pytest.raises(ValueError, match="one architecture"):
        quant.update_sizes(new, {"down": {"kernel": W.T}})


def test_quantlrm_is_awq_with_that_importance():
    base = jax.tree.map(lambda x: np.where(x > 0.5, np.float32(1.01) * x, x), PAIR)
    inputs = {"down": X}

    @jax.jit
    def both(params: Any, base: Any, x: jax.Array) -> Any:
        middle = UpdateStats(*(jnp.float32(a) for a in (0.005, 0.03, 0.01)))
        importance = {"down": channel_importance(x, middle)}
        return (
            quant.quantlrm(params, base, inputs, ONE, middle, **SMALL),
            quant.awq(params, inputs, ONE, importance=importance, **SMALL),
        )

    found, same = jax.device_get(both(PAIR, base, np.abs(W - base["down"])))
    np.testing.assert_array_equal(found["down"].codes, same["down"].codes)
    np.testing.assert_allclose(found["up"], same["up"], rtol=1e-5)
    assert (found["up"] != PAIR["up"]).any()
