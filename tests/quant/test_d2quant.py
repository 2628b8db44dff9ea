# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Dual scales, their place in the column loop, and corrected norms."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import wlab
from wlab import core, quant
from wlab.quant import BinaryCoded, _gptq
from wlab.quant._d2quant import dual_uniform_fit
from wlab.quant._dsq import dsq_fit, signs

N, M, G = 64, 24, 16


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


SIZES = np.exp(normal(0, N) / 2)
W = normal(1, N, M) * SIZES[:, None] * np.exp(normal(2, M) / 3)
MIX = normal(3, N, N) / np.float32(N**0.5) + np.eye(N, dtype=np.float32)
X = normal(4, 256, N) @ MIX
H = X.T @ X
fit = jax.jit(dsq_fit, static_argnums=1)
dsq = jax.jit(functools.partial(quant.dsq, group=G, bits=2))
dual_uniform = jax.jit(functools.partial(quant.dual_uniform, group=G, bits=3))
d2quant = jax.jit(
    functools.partial(quant.d2quant, group=G, bits=2), static_argnames="block"
)


def error(q: Any, w: jax.Array) -> jax.Array:
    return jnp.sum((wlab.materialise(q) - w) ** 2)


@jax.jit
def dense(q: Any) -> jax.Array:
    return q.materialise()


@jax.jit
def off(q: Any, own: jax.Array) -> jax.Array:
    """Of the outputs."""
    return jnp.sum((own @ W - X @ q.materialise()) ** 2)


@jax.jit
def values(found: Any, codes: jax.Array) -> jax.Array:
    sign = jnp.stack(signs(codes, len(found.r), found.r.dtype))
    return found.c[:, None] * jnp.sum(found.r[:, None] * sign, 0)


@pytest.mark.parametrize("bits", [2, 3])
def test_rounds_only_lower_the_error(bits: int):
    errors = [float(error(values(*fit(W, bits, n)), W)) for n in range(9)]
    assert (np.diff(errors) <= 1e-5 * errors[0]).all()
    assert errors[-1] < 0.9 * errors[0]


@pytest.mark.parametrize("bits", [2, 3])
def test_symmetries(bits: int):
    found, codes = fit(W, bits, 15)
    minus, flipped = fit(-W, bits, 15)
    codes = np.asarray(codes)
    np.testing.assert_array_equal(flipped, 2**bits - 1 - codes)
    larger, same = fit(4 * W, bits, 15)
    np.testing.assert_array_equal(same, codes)
    for other, times in ((minus, 1), (larger, 4)):
        np.testing.assert_allclose(other.r, found.r, rtol=1e-5)
        np.testing.assert_allclose(other.c, times * np.asarray(found.c), rtol=1e-5)
    turned, moved = fit(W[:, ::-1], bits, 15)
    np.testing.assert_array_equal(np.asarray(moved)[:, ::-1], codes)
    np.testing.assert_allclose(np.asarray(turned.r)[:, ::-1], found.r, rtol=1e-4)


def test_rows_whose_signs_coincide_and_empty_channels():
    """Their equations have no one solution; what comes out is finite all the same."""
    w = np.ones((N, M), np.float32)
    w[1], w[:, 2], w[:, 3] = 0, 0, -2
    for bits in (2, 3):
        for x in (w, np.zeros_like(w)):
            found, codes = fit(x, bits, 15)
            off = np.abs(np.asarray(values(found, codes)) - x)
            assert np.isfinite(off).all() and off.max() < 0.75


def test_better_than_a_uniform_grid():
    @jax.jit
    def nearest(w: jax.Array) -> Any:
        return [error(quant.rtn(w, bits=b, group=None), w) for b in (2, 3)]

    for bits, plain in zip((2, 3), nearest(W), strict=True):
        assert error(values(*fit(W, bits, 15)), W) < 0.6 * plain


def test_compensation_lowers_the_error_of_outputs():
    own = X + np.float32(0.3) * normal(5, *X.shape)
    d = (own - X).T @ X
    plain = d2quant(W, H, 0 * H)
    assert off(plain, own) < 0.9 * off(dsq(W), own)
    assert off(d2quant(W, H, d), own) < off(plain, own)


def test_row_scales_of_half_the_bits():
    """They are rounded before the codes are chosen, which are of the levels kept."""

    @jax.jit
    def made(w: jax.Array, h: jax.Array) -> Any:
        half = {"bits": 2, "group": G, "scale_dtype": jnp.float16}
        return quant.dsq(w, **half), quant.d2quant(w, h, **half)

    plain = dsq(W), d2quant(W, H)
    for half, whole in zip(made(W, H), plain, strict=True):
        assert half.r.dtype == jnp.float16 and half.c.dtype == jnp.float32
        scales = half.r.size * 16
        assert half.size_in_bits == whole.size_in_bits - scales
        assert dense(half).dtype == jnp.float32
        assert off(half, X) < 1.02 * off(whole, X)
    half, _ = made(W, H)
    r = np.repeat(np.asarray(half.r, np.float32), G, 1)[:, :N]
    signs_of_all = np.array([[-1, -1], [-1, 1], [1, -1], [1, 1]])
    levels = np.asarray(half.c)[:, None] * np.einsum("lk,kio->lio", signs_of_all, r)
    near = np.take_along_axis(levels, np.abs(levels - W).argmin(0)[None], 0)[0]
    np.testing.assert_allclose(dense(half), near, rtol=1e-6)
    with pytest.raises(TypeError, match="scales are floats"):
        quant.dsq(W, scale_dtype=jnp.int8)


def test_the_order_of_groups():
    diagonal = np.array([1.0, 5.0, 2.0, 2.0, 3.0, 9.0, 0.5])
    gar_order = jax.jit(_gptq.gar_order, static_argnums=1)
    assert gar_order(diagonal, 2).tolist() == [5, 4, 1, 0, 2, 3, 6]
    assert gar_order(np.ones(6), 3).tolist() == [0, 1, 2, 3, 4, 5]
    assert gar_order(np.ones(2), 3).tolist() == [0, 1]


def test_the_order_does_not_show():
    """Without correlation each group is fitted alone: any order gives the same."""
    order = np.random.default_rng(6).permutation(N)
    h = np.diag(1 + order.astype(np.float32))
    want, got = dsq(W), d2quant(W, h, 0 * h)
    np.testing.assert_allclose(dense(got), dense(want), atol=1e-4)
    np.testing.assert_allclose(got.c, want.c, rtol=1e-3)
    np.testing.assert_allclose(got.r, want.r, rtol=1e-3)


@pytest.mark.parametrize("block", [4, 32])
def test_groups_of_several_blocks_and_a_rest(block: int):
    n = 40
    q = d2quant(W[:n], H[:n, :n], block=block)
    assert q.shape == (n, M) and q.r.shape == (2, 3, M)
    lost = [
        np.sum((X[:, :n] @ (np.asarray(dense(x)) - W[:n])) ** 2)
        for x in (q, dsq(W[:n]))
    ]
    assert lost[0] < 0.9 * lost[1]


def test_coded_kernels_run_and_map():
    many = np.stack([W, 2 * W])
    stacked = jax.jit(jax.vmap(functools.partial(quant.dsq, group=G)))(many)
    one = dsq(2 * W)
    np.testing.assert_array_equal(np.asarray(stacked.codes)[1], one.codes)
    whole = np.asarray(dense(stacked))
    np.testing.assert_allclose(whole[1], dense(one), rtol=1e-5)

    def over(w: Any) -> jax.Array:
        return jax.lax.scan(lambda c, w: (c, X @ w), 0, w)[1]

    got, want = jax.jit(lambda *w: [wlab.lift(over)(x) for x in w])(stacked, whole)
    np.testing.assert_allclose(got, want, atol=1e-3)
    picked = jax.jit(wlab.lift(lambda w: w[1]))(stacked)
    assert isinstance(picked, BinaryCoded)
    np.testing.assert_array_equal(dense(picked), whole[1])
    assert one.codes.dtype == jnp.uint2
    assert one.size_in_bits == 2 * N * M + 32 * (2 * N // G * M + N)
    code = functools.partial(quant.dsq, bits=3, group=G)
    narrow = jax.eval_shape(code, W.astype(jnp.bfloat16))
    assert narrow.dtype == jnp.bfloat16 and narrow.codes.dtype == jnp.uint4
    with pytest.raises(TypeError, match="bit patterns"):
        jax.tree.map(lambda x: x.astype(float), one)
    spec = one.specs(jax.P("data", "model"))
    assert jax.tree.leaves(spec, is_leaf=lambda x: isinstance(x, jax.P)) == [
        jax.P("data", "model"),
        jax.P(None, "data", "model"),
        jax.P("data"),
    ]


def test_the_program_does_not_grow():
    def size(n: int) -> int:
        fn = functools.partial(quant.d2quant, group=32)
        return str(jax.make_jaxpr(fn)(np.zeros((n, 8)), np.eye(n))).count(" = ")

    assert size(64) == size(256)


def test_absorbed_scales_leave_the_function():
    x, gate = X[:, :8], normal(7, 8, N)
    up = jnp.asarray(gate[::-1])
    bias = np.linspace(-1, 1, N, dtype=np.float32)

    @jax.jit
    def run(down: Any, first: Any) -> Any:
        def mlp(up: Any, down: Any, bias: Any) -> jax.Array:
            return (jax.nn.silu(x @ gate) * (x @ up + bias[None])) @ down

        if isinstance(down, BinaryCoded):
            dense = down.materialise()
        else:
            dense = down.scale[:, None] * down.weight.materialise()
        moved = quant.absorb(down, first, bias)
        got = mlp(*wlab.materialise((moved.up, moved.down)), moved.bias)
        return got, mlp(wlab.materialise(first), dense, bias), moved

    coded, dual = dsq(W), dual_uniform(W)
    packed = jax.jit(functools.partial(quant.rtn, bits=4, group=4))(up)
    for down, first in (
        (coded, up),
        (dual, core.Permuted(packed, np.arange(8)[::-1])),
    ):
        got, want, moved = run(down, first)
        np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-3)
        assert type(moved.up) is type(first)
    with pytest.raises(ValueError, match="no column scales"):
        jax.eval_shape(lambda: quant.absorb(quant.absorb(coded, up).down, up))


def test_a_uniform_grid_with_two_scales():
    @jax.jit
    def errors(w: jax.Array) -> Any:
        def dense(q: Any) -> jax.Array:
            return q.scale[:, None] * q.weight.materialise()

        plain = quant.rtn(w, bits=3, group=G, symmetric=True)
        dual = dual_uniform(w)
        found = dual_uniform_fit(w, 3, G)
        best = dual_uniform_fit(w, 3, G, keep_best=True)
        values = best.c[:, None] * best.codes * jnp.repeat(best.scale, G, 0)
        solved = quant.dual_uniform(w, H, bits=3, group=G, block=G)
        lost = [jnp.sum((X @ (dense(q) - w)) ** 2) for q in (solved, dual)]
        kept = error(dense(dual), w), error(values, w)
        return error(plain, w), kept, lost, found.errors, best.errors

    plain, (dual, least), lost, rounds, bests = errors(W)
    assert dual < 0.9 * plain and lost[0] < 0.9 * lost[1]
    np.testing.assert_allclose(rounds[-1], dual, rtol=1e-4)
    np.testing.assert_allclose(least, bests.min(), rtol=1e-4)


def test_corrected_norms():
    a, b = normal(5, 2, 3, 40, 6)
    b += np.arange(6, dtype=np.float32)
    w = normal(6, 6, 4)
    mask = np.arange(40) < np.array([40, 40, 0])[:, None]

    @jax.jit
    def run(a: jax.Array, b: jax.Array) -> Any:
        start = quant.dac_init(6)
        shift = quant.dac_add(start, a, b)
        bias = quant.dac_bias(shift)
        nothing = quant.dac_bias(quant.dac_add(start, a, a))
        parts = quant.dac_add(quant.dac_add(start, a[:1], b[:1]), a[1:], b[1:])
        some = quant.dac_add(start, a, b, mask)
        return shift, bias, nothing, parts, some, quant.dac_fold(jnp.ones(4), w, bias)

    shift, bias, nothing, parts, some, folded = jax.device_get(run(a, b))
    moved = b + bias[None, None]
    np.testing.assert_allclose((a - moved).mean((0, 1)), 0, atol=1e-5)
    before, after = (((a - x) ** 2).mean((0, 1)) for x in (b, moved))
    np.testing.assert_allclose(before - after, shift.mean**2, atol=1e-4)
    np.testing.assert_array_equal(nothing, 0)
    # Batch by batch, and without what is padded.
    for x, y in zip(parts, shift, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(some.mean, (a - b)[:2].mean((0, 1)), atol=1e-5)
    # In the biases of the layers behind, it is the same.
    np.testing.assert_allclose(moved @ w + 1, b @ w + folded, atol=1e-4)


def test_which_channels_are_corrected():
    cases: list[tuple[dict[str, float], list[float]]] = [
        ({}, [0.1, -2, 10]),
        ({"strength": 0.5, "clip": 3.0}, [0.05, -1, 3]),
        ({"keep": 1 / 3}, [0, 0, 10]),
        ({"explained": 0.5}, [0, -2, 10]),
        ({"snr": 3.0}, [0, 0, 10]),
    ]

    @jax.jit
    def run(mean: jax.Array) -> Any:
        shift = quant.Shift(jnp.float32(4), mean, jnp.array([4.0, 4.0, 4.0]))
        return [quant.dac_bias(shift, **options) for options, _ in cases]

    got = jax.device_get(run(np.array([0.1, -2.0, 20.0], np.float32)))
    np.testing.assert_allclose(got, [want for _, want in cases], rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: quant.dsq(W, bits=4), "2 or 3"),
        (lambda: quant.dsq(W[0]), "no matrix"),
        (lambda: quant.d2quant(W, H, group=24, block=16), "divide the other"),
        (lambda: quant.dual_uniform(W, bits=9), "2 to 8"),
        (lambda: quant.absorb(dsq(W), W), "do not fit"),
        (lambda: quant.dac_bias(quant.dac_init(3), keep=0), "above 0"),
    ],
)
def test_bad_input_is_told(make: Any, message: str):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(make)


# --- A whole model ---------------------------------------------------------------


def gated(layer: Any, x: jax.Array, batch: Any) -> jax.Array:
    """What attention would be, and a gated layer, behind norms that have biases."""
    del batch
    x = x + jax.nn.silu(x) @ layer["attention"]["out"]["kernel"]
    y = normed(layer["mlp_norm"], x)
    mlp = {name: node["kernel"] for name, node in layer["mlp"].items()}
    return x + (jax.nn.silu(y @ mlp["gate"]) * (y @ mlp["up"])) @ mlp["down"]


def normed(norm: Any, x: jax.Array) -> jax.Array:
    size = jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6)
    return x / size + norm["bias"][None]


def end(params: Any, x: jax.Array) -> jax.Array:
    return normed(params["final_norm"], x)


PARTS = core.Layered(lambda params, x: x, gated, lambda params, x, batch: x)


@pytest.fixture(scope="module")
def model() -> Any:
    """Parameters, batches, and what D2Quant makes of them."""

    def kernel(i: int, *shape: int) -> Any:
        return {"kernel": normal(i, 2, *shape) / np.float32(shape[0] ** 0.5)}

    layers = {
        "attention": {"out": kernel(0, 16, 16)},
        "mlp_norm": {"bias": np.full((2, 16), 0.1, np.float32)},
        "mlp": {
            "gate": kernel(1, 16, 32),
            "up": kernel(2, 16, 32),
            "down": kernel(3, 32, 16),
        },
    }
    ends = {"final_norm": {"bias": np.zeros(16, np.float32)}}
    params = jax.device_put({"layers": layers} | ends)
    batches = 1 + normal(4, 2, 48, 16)
    padded = np.pad(batches, [(0, 0), (0, 8), (0, 0)], constant_values=5.0)
    select = ["attention/out/kernel", "mlp/down/kernel"]  # fewer programs
    made = quant.d2quant_model(
        PARTS,
        params,
        padded,
        bits=2,
        group=16,
        end=end,
        mask=lambda batch: jnp.arange(len(batch)) < 48,
        select=select,
    )
    return params, batches, made


def test_norms_are_right_on_the_mean_of_the_calibration_tokens(model: Any):
    """Each block's against the same block's weights, the last against all of them."""
    params, batches, made = model

    @jax.jit
    def shifts(params: Any, made: Any) -> Any:
        exact_end = {"final_norm": {"bias": jnp.zeros(16)}}
        made = wlab.materialise(made)
        last, params, made = made, params["layers"], made["layers"]
        x, out = batches.reshape(-1, 16), []
        for i in range(2):
            exact, now = jax.tree.map(lambda w, i=i: w[i], (params, made))
            reads = [
                normed(layer["mlp_norm"], x + jax.nn.silu(x) @ w["out"]["kernel"])
                for layer in (exact, now)
                for w in [layer["attention"]]
            ]
            out.append(jnp.stack([reads[0].mean(0), reads[1].mean(0)]))
            teacher = gated(now | {"mlp": exact["mlp"]}, x, None)
            x = gated(now, x, None)
        out.append(jnp.stack([end(exact_end, teacher).mean(0), end(last, x).mean(0)]))
        return out

    for want, got in jax.device_get(shifts(params, made.params)):
        np.testing.assert_allclose(got, want, atol=1e-5)
    biases = np.asarray(made.params["layers"]["mlp_norm"]["bias"])
    assert np.abs(biases - 0.1).max() > 0.01
    assert np.abs(np.asarray(made.params["final_norm"]["bias"])).max() > 0.01


def test_dual_scales_of_a_model_are_absorbed(model: Any):
    params, _, made = model
    layers = made.params["layers"]
    down, up = layers["mlp"]["down"]["kernel"], layers["mlp"]["up"]["kernel"]
    assert isinstance(down, BinaryCoded) and down.c is None
    exact = jax.device_get(params["layers"]["mlp"])
    assert np.abs(np.asarray(up) / exact["up"]["kernel"] - 1).max() > 0.1
    assert all(e.error < e.nearest and e.rows == 96 for e in made.errors)
    # Stacked, and with a kernel before that is quantised itself.
    y = X[:, :16]

    @jax.jit
    def run(up: jax.Array, down: jax.Array) -> Any:
        coded = jax.vmap(dsq)(down)
        packed = jax.vmap(functools.partial(quant.rtn, group=G))(up)
        before = {"mlp": {"up": {"kernel": packed}, "down": {"kernel": coded}}}
        after = quant.absorb_tree(before)
        outs = []
        for tree in (before, after, quant.absorb_tree(after)):
            first, second = wlab.materialise(
                [tree["mlp"][name]["kernel"] for name in ("up", "down")]
            )
            outs.append((y[None] @ first) @ second)
        return outs, after

    (want, *others), after = run(exact["up"]["kernel"], exact["down"]["kernel"])
    for got in others:
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    assert after["mlp"]["down"]["kernel"].c is None
    assert after["mlp"]["up"]["kernel"].codes.dtype == jnp.uint4


def test_models_that_cannot_be_corrected_are_told(model: Any):
    params, batches, _ = model
    with pytest.raises(ValueError, match="not in one module"):
        quant.d2quant_model(PARTS, params, batches, up="a/kernel", down="b/kernel")
    experts = quant.dac()
    with pytest.raises(ValueError, match="name their router"):
        experts.statistics(jnp.zeros((2, 3, 4)), jnp.zeros((2, 3, 4)), None)
