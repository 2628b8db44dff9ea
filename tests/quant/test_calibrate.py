# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Compressing a model block by block."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import wlab
from wlab.core import Layered
from wlab.quant import calibrate, compressors, dac, gptq, moments

WIDTH, HIDDEN, DEPTH = 16, 24, 3


class Counted:
    """A gated residual block that counts how often it is traced."""

    def __init__(self):
        self.traces = 0

    def __call__(self, layer, x, batch):
        del batch
        self.traces += 1
        gate, up, down = (layer[name]["kernel"] for name in ("gate", "up", "down"))
        x32 = x.astype(jnp.float32)
        norm = jnp.sqrt(jnp.mean(x32**2, -1, keepdims=True) + 1e-6)
        read = (x32 / norm).astype(x.dtype)
        inner = jax.nn.silu(read @ gate) * (read @ up) + layer["inner"]["bias"][None]
        return x + inner @ down


def _normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _params(dtype=jnp.float32):
    def kernel(seed, *shape):
        w = _normal(seed, DEPTH, *shape) / np.float32(shape[0] ** 0.5)
        return {"kernel": w.astype(dtype)}

    layers = {
        "gate": kernel(0, WIDTH, HIDDEN),
        "up": kernel(1, WIDTH, HIDDEN),
        "down": kernel(2, HIDDEN, WIDTH),
        "inner": {"bias": np.zeros((DEPTH, HIDDEN), dtype)},
    }
    return jax.device_put({"embed": np.ones((), dtype), "layers": layers})


def _parts(block=None):
    return Layered(
        before=lambda params, x: x * params["embed"],
        block=block or Counted(),
        after=lambda params, x, batch: jnp.mean(x),
    )


def _batches(dtype=jnp.float32):
    return (_normal(3, 2, 64, WIDTH) @ _normal(4, WIDTH, WIDTH)).astype(dtype)


METHOD = compressors.gptaq(bits=3, group=8, block=8)
FIXES = (dac("inner/bias", after="up/kernel", reader="down/kernel"),)


@pytest.fixture(scope="module")
def made():
    block = Counted()
    params, batches = _params(), _batches()
    seen = []
    out = calibrate(
        _parts(block),
        params,
        batches,
        METHOD,
        corrections=FIXES,
        on_block=lambda i, layer, errors: seen.append((i, layer)),
    )
    return params, batches, out, block, seen


def _codes(tree):
    leaves = jax.tree.leaves(tree, is_leaf=wlab.core.is_weight)
    return [np.asarray(w.codes) for w in leaves if wlab.core.is_weight(w)]


def _same_codes(a, b):
    for x, y in zip(_codes(a), _codes(b), strict=True):
        np.testing.assert_array_equal(x, y)


def test_every_program_serves_all_blocks(made):
    # Stages and corrections (once for their shapes, once with sums), both streams, and
    # the steps.
    *_, block, _ = made
    deep = Counted()
    longer = jax.tree.map(
        lambda x: np.concatenate([x, x, x]) if x.ndim else x,
        jax.device_get(_params()),
    )
    calibrate(_parts(deep), longer, _batches(), METHOD, corrections=FIXES)
    assert deep.traces == block.traces


def test_the_first_stage_is_gptq_of_its_inputs_and_later_ones_see_it(made):
    params, batches, *_ = made
    options = {"bits": 3, "group": 8, "block": 8}
    got = calibrate(_parts(), params, batches, compressors.gptq(**options)).params
    x = batches.reshape(-1, WIDTH)
    read = x / np.sqrt(np.mean(np.square(x), -1, keepdims=True) + 1e-6)
    first = jax.jit(lambda tree: jax.tree.map(lambda w: w[0], tree))(got["layers"])
    start = jax.tree.map(lambda w: w[0], jax.device_get(params["layers"]))

    @jax.jit
    def compress(w, x):
        return gptq(w, moments(x).h, **options)

    want = compress(start["gate"]["kernel"], read)
    np.testing.assert_array_equal(first["gate"]["kernel"].codes, want.codes)
    dense = jax.device_get(jax.jit(wlab.materialise)(first))
    gate, up = (read @ dense[name]["kernel"] for name in ("gate", "up"))
    want = compress(start["down"]["kernel"], gate / (1 + np.exp(-gate)) * up)
    np.testing.assert_array_equal(first["down"]["kernel"].codes, want.codes)


def test_outputs_are_kept_better_than_by_rounding(made):
    params, _, out, *_ = made
    assert [(e.layer, e.path) for e in out.errors[:3]] == [
        (0, "gate/kernel"),
        (0, "up/kernel"),
        (0, "down/kernel"),
    ]
    assert all(e.error < e.nearest and e.rows == 128 for e in out.errors[:2])
    shapes = jax.tree.map(jnp.shape, params)
    dense = jax.eval_shape(wlab.materialise, out.params)
    assert jax.tree.map(jnp.shape, dense) == shapes


def test_a_stopped_run_goes_on_to_the_same_numbers(made):
    params, batches, out, _, seen = made
    assert [i for i, _ in seen] == [0, 1, 2]
    again = calibrate(
        _parts(),
        params,
        batches,
        METHOD,
        corrections=FIXES,
        done=[layer for _, layer in seen[:2]],
    )
    _same_codes(again.params, out.params)
    assert {e.layer for e in again.errors} == {2}


def test_host_memory_and_lists_of_layers_change_nothing(made):
    params, batches, out, *_ = made
    layers = jax.device_get(params["layers"])
    listed = {
        "embed": params["embed"],
        "layers": [jax.tree.map(lambda x, i=i: x[i], layers) for i in range(DEPTH)],
    }
    got = calibrate(
        _parts(), listed, batches, METHOD, corrections=FIXES, host=True
    ).params["layers"]
    stacked = jax.tree.map(lambda *x: np.stack(x), *jax.device_get(got))
    _same_codes(stacked, out.params["layers"])


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_eight_devices_make_what_one_makes(made, kind):
    params, batches, out, *_ = made
    kind = getattr(jax.sharding.AxisType, kind)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    got = calibrate(_parts(), params, batches, METHOD, corrections=FIXES, mesh=mesh)
    for x, y in zip(_codes(got.params), _codes(out.params), strict=True):
        assert np.mean(x == y) > 0.995  # sums are in another order
    biases = [np.asarray(tree.params["layers"]["inner"]["bias"]) for tree in (got, out)]
    assert np.abs(biases[1]).max() > 1e-3
    np.testing.assert_allclose(*biases, atol=2e-3)


def test_rows_without_weight_are_as_if_they_were_not_there(made):
    params, batches, *_ = made
    method = compressors.gptq(bits=3, group=8, block=8)
    padded = np.concatenate([batches, 5 + 0 * batches[:, :16]], axis=1)

    def real(layer, x, batch):
        del layer, batch
        return (jnp.arange(len(x)) < 64).astype(jnp.float32)

    want = calibrate(_parts(), params, batches, method).params
    got = calibrate(_parts(), params, padded, method, importance=real)
    assert all(e.rows == 128 for e in got.errors)
    for x, y in zip(_codes(got.params), _codes(want), strict=True):
        assert np.mean(x == y) > 0.995


def test_bfloat16_and_methods_by_pattern():
    params, batches = _params(jnp.bfloat16), _batches(jnp.bfloat16)
    methods = {
        "down/*": compressors.rtn(bits=8, group=None),
        "*": compressors.gptq(bits=2, group=None),
    }
    out = calibrate(
        _parts(), params, batches, methods, select=["*kernel", "!up/*"]
    ).params
    layers = out["layers"]
    assert layers["down"]["kernel"].grid.name == "uint8"
    assert layers["gate"]["kernel"].grid.name == "uint2"
    assert layers["gate"]["kernel"].dtype == jnp.bfloat16
    assert isinstance(layers["up"]["kernel"], jax.Array)


def test_experts_see_their_own_rows_and_few_are_rounded_to_nearest():
    def block(layer, x, batch):
        del batch
        mine = jnp.arange(len(x))[None] < jnp.array([len(x), 24])[:, None]
        rows = x[None] * mine[..., None].astype(x.dtype)
        up = layer["experts"]["up"]["kernel"]
        return x + jnp.einsum("eti,eio->eto", rows, up).sum(0)

    w = _normal(0, DEPTH, 2, WIDTH, WIDTH) / 8
    params = {
        "embed": np.ones((), np.float32),
        "layers": {"experts": {"up": {"kernel": w}}},
    }
    params, batches = jax.device_put(params), _batches()
    options = {"bits": 3, "group": 8, "block": 8}
    method = compressors.gptq(**options)
    out = calibrate(_parts(block), params, batches, method, min_rows=64)
    (codes,) = _codes(out.params)
    near = jax.jit(lambda w: wlab.quant.rtn(w, bits=3, group=8))(w[0, 1])
    np.testing.assert_array_equal(codes[0, 1], near.codes)
    assert [e.rows for e in out.errors] == [48] * DEPTH
    x = batches.reshape(-1, WIDTH)
    want = jax.jit(lambda w, x: gptq(w, moments(x).h, **options))(w[0, 0], x)
    np.testing.assert_array_equal(codes[0, 0], want.codes)
    with pytest.raises(ValueError, match=r"experts/up/kernel.*rows of their own"):
        calibrate(
            _parts(block), params, batches, method, importance=lambda p, x, b: x[:, 0]
        )


def test_what_cannot_be_calibrated_is_an_error(made):
    params, batches, *_ = made
    with pytest.raises(ValueError, match="no calibration batches"):
        calibrate(_parts(), params, batches[:0], METHOD)
    bad = batches.copy()
    bad[0, 0, 0] = np.nan
    with pytest.raises(ValueError, match=r"block 0, leaf 'gate/kernel'.*not finite"):
        calibrate(_parts(), params, bad, METHOD)
    with pytest.raises(ValueError, match=r"up/kernel.*matches none"):
        calibrate(_parts(), params, batches, {"gate/*": METHOD, "down/*": METHOD})
    with pytest.raises(ValueError, match=r"after 'out/kernel'.*down/kernel"):
        fixes = [FIXES[0]._replace(after="out/kernel")]
        calibrate(_parts(), params, batches, METHOD, corrections=fixes)
    with pytest.raises(ValueError, match=r"no leaf 'norm/bias'.*with_norm_bias"):
        fix = dac("norm/bias", after="up/kernel", reader="down/kernel")
        calibrate(_parts(), params, batches, METHOD, corrections=[fix])
