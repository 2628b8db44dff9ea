# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Singular values and gains, on every kind of leaf and every mesh."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import wlab
from wlab import probe
from wlab.quant import quantize_tree


@pytest.fixture
def params() -> Any:
    shapes = {
        "blocks": {
            "norm": {"scale": (3, 8)},
            "query": {"kernel": (3, 8, 2, 5)},
            "up": {"kernel": (3, 8, 12)},
        },
        "embed": {"embedding": (11, 8)},
        "out": {"bias": (8,)},
    }
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def numpy_values(x: Any, shape: tuple[int, ...]) -> np.ndarray:
    return np.linalg.svd(np.asarray(x, np.float64).reshape(shape), compute_uv=False)


def test_values_of_stacked_and_split_kernels(params: Any):
    got = probe.top_singular_values(params, 3)
    assert set(got) == {"blocks/query/kernel", "blocks/up/kernel", "embed/embedding"}
    query = numpy_values(params["blocks"]["query"]["kernel"], (3, 8, 10))
    np.testing.assert_allclose(got["blocks/query/kernel"], query[:, :3], rtol=1e-5)
    embed = numpy_values(params["embed"]["embedding"], (11, 8))
    np.testing.assert_allclose(got["embed/embedding"], embed[:3], rtol=1e-5)
    rms = probe.rms_singular_values(params, which="*query*")
    want = np.sqrt(np.mean(query**2, -1))
    np.testing.assert_allclose(rms["blocks/query/kernel"], want, rtol=1e-5)


def test_iterations_come_from_below(params: Any):
    exact, few, many = jax.jit(
        lambda p: [probe.top_singular_values(p, 2, iters=n) for n in (None, 2, 300)]
    )(params)
    for path in exact:
        np.testing.assert_allclose(many[path], exact[path], rtol=1e-4)
        assert (np.asarray(few[path]) <= np.asarray(exact[path]) * (1 + 1e-6)).all()


def test_dtypes_and_structured_weights(params: Any):
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    for value in jax.eval_shape(probe.top_singular_values, narrow).values():
        assert value.dtype == jnp.float32

    @jax.jit
    def both(params: Any) -> Any:
        packed = quantize_tree(params, "int8")
        forms = packed, wlab.materialise(packed)
        return [probe.top_singular_values(form) for form in forms]

    got, want = both(params)
    for path in want:
        np.testing.assert_allclose(got[path], want[path], rtol=1e-6)


def test_mesh(params: Any, mesh: jax.sharding.Mesh):
    double = jax.tree.map(lambda x: 2 * np.asarray(x), params)
    report = lambda a, b: probe.gain_report(a, b, iters=4)  # noqa: E731
    want = jax.jit(report)(params, double)
    specs = {
        (3, 8, 12): jax.P(None, "data", "model"),
        (3, 8, 2, 5): jax.P(None, "data"),
    }
    with jax.set_mesh(mesh):
        placed = jax.tree.map(
            lambda x: jax.device_put(x, specs.get(x.shape, jax.P())), (params, double)
        )
        got = jax.jit(report)(*placed)
    for path, gain in want.items():
        for a, b in zip(got[path], gain, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5)


def test_report_compares_widths(params: Any):
    base = {"w": {"kernel": jnp.eye(4)}}
    wide = {"w": {"kernel": 3 * jnp.eye(8)}}
    gain = probe.gain_report(wide, base)["w/kernel"]
    assert gain.top_ratio == pytest.approx(3)
    assert gain.rms_ratio == pytest.approx(3)


def test_gain_of_a_sublayer():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 7)), jnp.float32)
    np.testing.assert_allclose(probe.sublayer_gain(x, 3 * x), 3, rtol=1e-6)
    rows = probe.sublayer_gain(x, jnp.concatenate([x, x], -1), axis=-1)
    np.testing.assert_allclose(rows, np.ones(5), rtol=1e-6)
    assert probe.sublayer_gain(jnp.zeros(3), jnp.zeros(3)) == 1
    assert probe.sublayer_gain(x.astype(jnp.bfloat16), x).dtype == jnp.float32


def test_bad_input_is_told(params: Any):
    with pytest.raises(ValueError, match=r"'embed/embedding'.* has 8 singular values"):
        probe.top_singular_values(params, 9, which="embed*")
    with pytest.raises(ValueError, match=r"'out/bias' of shape \(8,\) is no matrix"):
        probe.top_singular_values(params, which="*bias")
    with pytest.raises(ValueError, match="in one of the models only"):
        probe.gain_report(params, {"embed": params["embed"]})
    other = {"blocks": {"up": {"kernel": jnp.ones((2, 8, 12))}}}
    with pytest.raises(ValueError, match=r"'blocks/up/kernel' is stacked \(3,\)"):
        probe.gain_report(params, other, which="*up*")
