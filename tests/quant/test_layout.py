# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""GPTQ's layout: against an unpacker that goes code by code, and there and back."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wlab.core import Flattened, MatrixView, Permuted
from wlab.quant import Quantized, from_gptq, gptq, pack, rtn, to_gptq

IN, OUT, GROUP = 64, 32, 16


def stream(words: np.ndarray, bits: int) -> list[int]:
    """The codes in int32 words, read bit by bit, the lowest first."""
    ones = [int(w) >> i & 1 for w in words.astype(np.int64) for i in range(32)]
    return [
        sum(b << i for i, b in enumerate(ones[k : k + bits]))
        for k in range(0, len(ones), bits)
    ]


def dense(arrays: Any, bits: int, form: str) -> np.ndarray:
    """What the arrays stand for, as their readers have it: float32 [in, out]."""
    m = arrays["scales"].shape[1]
    codes = np.array([stream(arrays["qweight"][:, j], bits) for j in range(m)]).T
    zeros = np.array([stream(row, bits) for row in arrays["qzeros"]])
    zeros = zeros + (form == "gptq")
    group = arrays["g_idx"]
    scales = arrays["scales"].astype(np.float32)
    return scales[group] * (codes - zeros[group]).astype(np.float32)


@functools.cache
def inputs() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    w = rng.normal(size=(IN, OUT)).astype(np.float32)
    x = rng.normal(size=(4 * IN, IN)) * np.arange(1, IN + 1)
    return w, (x.T @ x).astype(np.float32)


@functools.cache
def rounded() -> Quantized:
    options: Any = {"bits": 4, "group": GROUP, "scale_dtype": jnp.float16}
    return jax.jit(functools.partial(rtn, **options))(inputs()[0])


@jax.jit
def dense_of(q: Any) -> jax.Array:
    return q.materialise()


CASES = [
    # bits, symmetric, group, act_order, form
    (2, True, GROUP, False, "gptq"),
    (3, True, None, False, "gptq"),
    (4, True, GROUP, True, "gptq"),
    (8, True, None, False, "gptq"),
    (2, False, GROUP, True, "gptq_v2"),
    (3, False, GROUP, False, "gptq_v2"),
    (4, False, GROUP, "groups", "gptq_v2"),
    (8, False, IN, False, "gptq"),
]


@pytest.mark.parametrize(("bits", "symmetric", "group", "order", "form"), CASES)
def test_there_and_back(bits: int, symmetric: bool, group: Any, order: Any, form: Any):
    options: Any = {"bits": bits, "symmetric": symmetric, "group": group}
    options["scale_dtype"] = jnp.float16

    def make(w: jax.Array, h: jax.Array) -> Any:
        if not order:
            return rtn(w, **options)
        return gptq(w, h, act_order=order, block=16, **options)

    made = jax.jit(make)(*inputs())
    arrays = to_gptq(made, form=form)
    np.testing.assert_array_equal(dense(arrays, bits, form), dense_of(made))
    assert (np.diff(arrays["g_idx"]) < 0).any() == (group is not None and order is True)
    again = from_gptq(arrays, bits_of=bits, group=group, form=form, symmetric=symmetric)
    assert jax.tree.structure(again) == jax.tree.structure(made)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(made), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_scales_are_rounded_before_codes():
    w = inputs()[0] * np.float32(1e-3)

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def make(w: jax.Array, dtype: Any, group: int | None = None) -> Any:
        made = rtn(w, bits=8, group=group, scale_dtype=dtype)
        return made.scale.astype(jnp.float32), made.materialise(), made

    wide, *_ = make(w, None, GROUP)
    for dtype in (jnp.float16, jnp.bfloat16):
        scale, got, made = jax.device_get(make(w, dtype, GROUP))
        assert (made.scale.dtype, made.zero.dtype) == (dtype, jnp.uint8)
        # No weight is further off than half of the step that is stored, but at ends.
        off = np.abs(got - w) / np.repeat(scale, GROUP, 0)
        assert np.quantile(off, 0.95) <= 0.5
        assert not np.array_equal(scale, wide)
    # Those that float16 can barely hold, and not.
    for size in (1e-6, 0.0):
        scale, got, _ = jax.device_get(make(w * np.float32(size), jnp.float16))
        assert scale.min() > 0 and np.isfinite(got).all()
    with pytest.raises(TypeError, match="scales are floats"):
        rtn(w, scale_dtype=jnp.int8)


def test_narrow_scales_compute_in_float32():
    made = rounded()
    as_float = np.asarray(made.scale, np.float32), np.asarray(made.zero, np.float32)
    wide = Quantized(
        codes=made.codes,
        scale=jnp.asarray(as_float[0]),
        zero=jnp.asarray(as_float[1]),
        grid=made.grid,
        block=made.block,
        dense_dtype=made.dense_dtype,
        matrix_view=made.matrix_view,
    )
    np.testing.assert_array_equal(dense_of(made), dense_of(wide))
    packed = jax.jit(lambda q: pack(q).materialise())(made)
    np.testing.assert_array_equal(packed, dense_of(wide))
    assert jax.eval_shape(lambda q: q.values(), made).dtype == jnp.float32
    half = made.convert_element_type(jnp.bfloat16)
    assert half.dtype == jnp.bfloat16 and made.size_in_bits < wide.size_in_bits
    # A value that was rounded stays rounded.
    assert half.convert_element_type(jnp.float32) is NotImplemented


def test_other_weights_around_a_matrix():
    made = rounded()
    packed = jax.jit(pack)(made)
    want = to_gptq(made, form="gptq_v2")
    shape = (4, IN // 4, OUT)
    for other in (packed, Flattened(packed, MatrixView.of(2, 1), shape)):
        for name, x in to_gptq(other, form="gptq_v2").items():
            np.testing.assert_array_equal(x, want[name])
    order = np.arange(IN, dtype=np.int32)[::-1]
    turned = to_gptq(Permuted(made, order), form="gptq_v2")
    np.testing.assert_array_equal(
        dense(turned, 4, "gptq_v2"), dense(want, 4, "gptq_v2")[::-1]
    )
    plain = {name: x for name, x in want.items() if name != "g_idx"}
    again = from_gptq(plain, bits_of=4, form="gptq_v2")
    np.testing.assert_array_equal(dense_of(again), dense_of(made))


def test_what_has_no_layout():
    w = inputs()[0]

    @functools.partial(jax.jit, static_argnums=(1, 2, 3))
    def make(w: Any, bits: int, group: Any = None, symmetric: bool = False) -> Any:
        return rtn(w, bits=bits, group=group, symmetric=symmetric)

    made = make(np.abs(w), 4, GROUP)  # zero points of 0
    with pytest.raises(ValueError, match=r"zero points from 0 to.*gptq_v2 has 0 too"):
        to_gptq(made)
    with pytest.raises(TypeError, match=r"a \w+ of shape \(64, 32\) has no codes"):
        to_gptq(w)
    with pytest.raises(ValueError, match="does not fill words of 32 bits"):
        to_gptq(make(w[:, :4], 4))
    with pytest.raises(ValueError, match="bits=5: GPTQ checkpoints have"):
        to_gptq(make(w, 5))
    with pytest.raises(ValueError, match="float16 cannot hold"):
        to_gptq(make(w * np.float32(1e7), 4, None, True))
    arrays = to_gptq(made, form="gptq_v2")
    with pytest.raises(ValueError, match="are not of one matrix at 8 bits"):
        from_gptq(arrays, bits_of=8, form="gptq_v2")
    with pytest.raises(ValueError, match="not groups of 16, or g_idx says otherwise"):
        from_gptq(arrays | {"g_idx": arrays["g_idx"] * 0}, bits_of=4)
    with pytest.raises(ValueError, match="a zero point is not 8"):
        from_gptq(arrays, bits_of=4, symmetric=True)
