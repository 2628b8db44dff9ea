# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""The inputs of weights, of any function."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import wlab
from wlab.core import Flattened, MatrixView, as_kernel, as_matrices, capture, uses


def second(x):
    return x.T @ x


class _Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        heads = nn.MultiHeadDotProductAttention(2, name="attention")(x)
        return x + nn.Dense(8, name="down")(jax.nn.silu(heads)), None


class _Net(nn.Module):
    """Convolution, scanned and rematerialised blocks with attention, a tied head."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 2), strides=(2, 1), padding="SAME", name="conv")(x)
        x = x.reshape(x.shape[0], -1, 8)
        blocks = nn.scan(
            nn.remat(_Block),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
        )
        x, _ = blocks(name="layers")(x, None)
        return x, nn.Dense(3, name="head")(x)


@pytest.fixture(scope="module")
def net():
    x = jax.random.normal(jax.random.key(0), (2, 5, 4, 3))
    params = jax.jit(_Net().init)(jax.random.key(1), x)["params"]
    return params, x


def _apply(params, x):
    return _Net().apply({"params": params}, x)


def test_statistics_are_those_of_the_inputs_through_scan_remat_and_convolution(net):
    params, x = net
    (last, out), kept = jax.jit(capture(_apply))(params, x)
    kept, params = jax.device_get((kept, params))
    np.testing.assert_allclose(out, _apply(params, x)[1], atol=1e-5)
    # The head reads what the last block put out.
    np.testing.assert_allclose(kept["head/kernel"], last.reshape(-1, 8), rtol=1e-6)
    # A convolution is a product of the windows that it sees with its kernel.
    windows = kept["conv/kernel"] @ params["conv"]["kernel"].reshape(-1, 8)
    straight = nn.Conv(8, (3, 2), strides=(2, 1), padding="SAME").apply(
        {"params": params["conv"]}, x
    )
    np.testing.assert_allclose(
        windows + params["conv"]["bias"], straight.reshape(-1, 8), atol=1e-5
    )
    # Every block's output, from the captured inputs of its last layer.
    first = kept["layers/attention/query/kernel"]
    assert first.shape == (3, 24, 8)
    down = params["layers"]["down"]
    for i in range(2):
        made = kept["layers/down/kernel"][i] @ down["kernel"][i] + down["bias"][i]
        np.testing.assert_allclose(first[i] + made, first[i + 1], atol=1e-5)
    # Kernels with two input axes flatten them; sums are sums over rows.
    assert kept["layers/attention/out/kernel"].shape == (3, 24, 8)
    _, sums = jax.jit(capture(_apply, "*out/kernel", second))(params, x)
    rows = kept["layers/attention/out/kernel"]
    np.testing.assert_allclose(
        sums["layers/attention/out/kernel"],
        jnp.einsum("lti,ltj->lij", rows, rows),
        rtol=1e-5,
        atol=1e-5,
    )


def test_stages_are_the_weights_that_read_one_array(net):
    params, x = net
    found = uses(_apply, jax.eval_shape(lambda p: p, params), x)
    stage = {use.path: use.stage for use in found}
    attention = [stage[f"layers/attention/{n}/kernel"] for n in ("query", "key")]
    assert attention[0] == attention[1] != stage["layers/attention/out/kernel"]
    assert found[0].path == "conv/kernel"
    assert found[-1].path == "head/kernel"
    assert {use.rows for use in found} == {24}


def test_structured_and_bfloat16_weights_are_captured_as_they_are(net):
    params, x = net
    params = wlab.quant.quantize_tree(params, "int8", select="*head/kernel")
    half = jax.tree.map(
        lambda w: w.astype(jnp.bfloat16) if w.dtype == jnp.float32 else w, params
    )
    _, kept = jax.jit(capture(_apply, ["head/kernel", "layers/down/kernel"]))(half, x)
    assert kept["layers/down/kernel"].dtype == jnp.float32
    last, _ = wlab.lift(_apply)(half, x)
    np.testing.assert_allclose(
        kept["head/kernel"], last.reshape(-1, 8), rtol=2e-2, atol=2e-2
    )


def test_nnx_and_uses_that_add_up():
    class Twice(nnx.Module):
        def __init__(self):
            self.once = nnx.Linear(4, 4, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.once(jnp.tanh(self.once(x)))

    graph, state = nnx.split(Twice())
    x = jax.random.normal(jax.random.key(0), (6, 4))

    def run(state, x):
        return nnx.merge(graph, state)(x)

    _, sums = jax.jit(capture(run, "once/kernel", second))(state, x)
    module = nnx.merge(graph, state)
    inner = jnp.tanh(module.once(x))
    np.testing.assert_allclose(
        sums["once/kernel"], second(x) + second(inner), rtol=1e-5
    )


def test_stacked_products_have_statistics_of_each_matrix():
    x = jax.random.normal(jax.random.key(0), (3, 5, 4))
    params = {"experts": {"gate": {"kernel": jnp.ones((3, 4, 2))}}}

    def run(params, x):
        return jnp.einsum("ebi,eio->ebo", x, params["experts"]["gate"]["kernel"])

    _, kept = capture(run)(params, x)
    np.testing.assert_array_equal(kept["experts/gate/kernel"], x)


def test_what_cannot_be_captured_is_an_error():
    def transposed(params, x):
        return x @ params["a"]["kernel"].T

    params = {"a": {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)}}
    with pytest.raises(ValueError, match=r"a/kernel.*inputs are not known"):
        capture(transposed)(params, jnp.ones((2, 4)))
    with pytest.raises(ValueError, match=r"a/bias.*is no matrix"):
        capture(transposed, "a/bias")(params, jnp.ones((2, 4)))

    def twice(params, x):
        w = params["a"]["kernel"]
        return (x @ w).sum() + (x[:1] @ w).sum()

    with pytest.raises(ValueError, match=r"a/kernel.*\[1, 2\] rows"):
        capture(twice)(params, jnp.ones((2, 3)))


@pytest.mark.parametrize(
    ("shape", "view"),
    [
        ((4, 6, 5), MatrixView.of(2, 1)),
        ((3, 8, 2, 4), MatrixView.of(1, 2)),
        ((2, 4, 6, 5), MatrixView.of(2, 1)),
    ],
)
def test_flattened_kernels_multiply_as_they_would_dense(shape, view):
    dense = jax.random.normal(jax.random.key(0), shape)
    matrices = as_matrices(dense, view)
    w = Flattened(matrices, view, shape)
    np.testing.assert_array_equal(w.materialise(), dense)
    stack = len(view.stack(len(shape)))
    ins = [a % len(shape) for a in view.inputs]
    x = jax.random.normal(
        jax.random.key(1), (*shape[:stack], 7, *(shape[a] for a in ins))
    )
    at = [stack + 1 + i for i in range(len(ins))]
    batch = list(range(stack))

    def product(x, w):
        return jax.lax.dot_general(x, w, ((at, ins), (batch, batch)))

    np.testing.assert_allclose(
        wlab.lift(product)(x, w), product(x, dense), rtol=1e-5, atol=1e-5
    )
    turned = wlab.lift(lambda w: w.astype(jnp.bfloat16).swapaxes(-1, -2))(w)
    assert isinstance(turned, Flattened) and turned.dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        turned.materialise(), dense.astype(jnp.bfloat16).swapaxes(-1, -2)
    )
    if stack:
        one = wlab.lift(lambda w: jax.lax.map(lambda w: w[..., :1].sum(), w))(w)
        np.testing.assert_allclose(
            one, dense[..., :1].reshape(shape[0], -1).sum(1), rtol=1e-5
        )
        assert isinstance(w.slice([0] * len(shape), [1, *shape[1:]]), Flattened)


def test_a_matrix_becomes_a_kernel_as_cheaply_as_it_can():
    w = jax.random.normal(jax.random.key(0), (24, 5))
    view = MatrixView.of(2, 1)
    whole = wlab.quant.rtn(w, bits=8, group=None)
    assert isinstance(as_kernel(whole, view, (4, 6, 5)), wlab.quant.Quantized)
    groups = wlab.quant.rtn(w, bits=8, group=8)
    kernel = as_kernel(groups, view, (4, 6, 5))
    assert isinstance(kernel, Flattened)
    np.testing.assert_array_equal(
        kernel.materialise(), groups.materialise().reshape(4, 6, 5)
    )
