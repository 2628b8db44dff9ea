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
def inputs() -> tuple[jax.Array, jax.Array]:
    w = jax.random.normal(jax.random.key(0), (IN, OUT))
    x = jax.random.normal(jax.random.key(1), (4 * IN, IN)) * jnp.arange(1, IN + 1)[None]
    return w, x.T @ x


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
    np.testing.assert_array_equal(dense(arrays, bits, form), made.materialise())
    assert (np.diff(arrays["g_idx"]) < 0).any() == (group is not None and order is True)
    again = from_gptq(arrays, bits_of=bits, group=group, form=form, symmetric=symmetric)
    assert jax.tree.structure(again) == jax.tree.structure(made)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(made), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_scales_are_rounded_before_codes():
    w = inputs()[0] * 1e-3
    for dtype in (jnp.float16, jnp.bfloat16):
        made, wide = (
            jax.jit(lambda w, d=d: rtn(w, bits=8, group=GROUP, scale_dtype=d))(w)
            for d in (dtype, None)
        )
        assert (made.scale.dtype, made.zero.dtype) == (dtype, jnp.uint8)
        scale = jnp.repeat(made.scale.astype(jnp.float32), GROUP, 0)
        # No weight is further off than half of the step that is stored, but at ends.
        off = jnp.abs(made.materialise() - w) / scale
        assert float(jnp.quantile(off, 0.95)) <= 0.5
        assert not jnp.array_equal(made.scale.astype(jnp.float32), wide.scale)
    # Those that float16 can barely hold, and not.
    for size in (1e-6, 0.0):
        made = rtn(w * size, bits=8, group=None, scale_dtype=jnp.float16)
        assert made.scale.min() > 0 and jnp.isfinite(made.materialise()).all()
    with pytest.raises(TypeError, match="scales are floats"):
        rtn(w, scale_dtype=jnp.int8)


def test_narrow_scales_compute_in_float32():
    made = rtn(inputs()[0], bits=4, group=GROUP, scale_dtype=jnp.float16)
    want = rtn(inputs()[0], bits=4, group=GROUP, scale_dtype=jnp.float16)
    wide = Quantized(
        codes=want.codes,
        scale=want.scale.astype(jnp.float32),
        zero=want.zero.astype(jnp.float32),
        grid=want.grid,
        block=want.block,
        dense_dtype=want.dense_dtype,
        matrix_view=want.matrix_view,
    )
    np.testing.assert_array_equal(made.materialise(), wide.materialise())
    np.testing.assert_array_equal(pack(made).materialise(), wide.materialise())
    assert made.values().dtype == jnp.float32
    half = made.convert_element_type(jnp.bfloat16)
    assert half.dtype == jnp.bfloat16 and made.size_in_bits < wide.size_in_bits
    # A value that was rounded stays rounded.
    assert half.convert_element_type(jnp.float32) is NotImplemented


def test_other_weights_around_a_matrix():
    made = rtn(inputs()[0], bits=4, group=GROUP, scale_dtype=jnp.float16)
    want = to_gptq(made, form="gptq_v2")
    shape = (4, IN // 4, OUT)
    for other in (pack(made), Flattened(pack(made), MatrixView.of(2, 1), shape)):
        for name, x in to_gptq(other, form="gptq_v2").items():
            np.testing.assert_array_equal(x, want[name])
    order = jnp.arange(IN, dtype=jnp.int32)[::-1]
    turned = to_gptq(Permuted(made, order), form="gptq_v2")
    np.testing.assert_array_equal(
        dense(turned, 4, "gptq_v2"), dense(want, 4, "gptq_v2")[::-1]
    )
    plain = {name: x for name, x in want.items() if name != "g_idx"}
    again = from_gptq(plain, bits_of=4, form="gptq_v2")
    np.testing.assert_array_equal(again.materialise(), made.materialise())


def test_what_has_no_layout():
    w = inputs()[0]
    made = rtn(jnp.abs(w), bits=4, group=GROUP)  # zero points of 0
    with pytest.raises(ValueError, match=r"zero points from 0 to.*gptq_v2 has 0 too"):
        to_gptq(made)
    with pytest.raises(TypeError, match=r"a \w+ of shape \(64, 32\) has no codes"):
        to_gptq(w)
    with pytest.raises(ValueError, match="does not fill words of 32 bits"):
        to_gptq(rtn(w[:, :4], bits=4, group=None))
    with pytest.raises(ValueError, match="bits=5: GPTQ checkpoints have"):
        to_gptq(rtn(w, bits=5, group=None))
    with pytest.raises(ValueError, match="float16 cannot hold"):
        to_gptq(rtn(w * 1e7, bits=4, group=None, symmetric=True))
    arrays = to_gptq(made, form="gptq_v2")
    with pytest.raises(ValueError, match="are not of one matrix at 8 bits"):
        from_gptq(arrays, bits_of=8, form="gptq_v2")
    with pytest.raises(ValueError, match="not groups of 16, or g_idx says otherwise"):
        from_gptq(arrays | {"g_idx": arrays["g_idx"] * 0}, bits_of=4)
    with pytest.raises(ValueError, match="a zero point is not 8"):
        from_gptq(arrays, bits_of=4, symmetric=True)
