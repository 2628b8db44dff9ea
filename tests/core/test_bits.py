# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Packed codes come back, in the stated order of bits; sizes are counted in bits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wlab.core import bits


def codes_of(shape: tuple[int, ...], width: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 2**width, shape).astype(np.uint8)


def stream(codes: np.ndarray, width: int, axis: int) -> np.ndarray:
    """The bytes by numpy: every code's bits, lowest first, in one row."""
    codes = np.moveaxis(codes, axis, -1)
    single = (codes[..., None] >> np.arange(width)) & 1
    single = single.reshape(*codes.shape[:-1], -1)
    return np.moveaxis(np.packbits(single, axis=-1, bitorder="little"), -1, axis)


@functools.partial(jax.jit, static_argnames=("width", "axis"))
def there_and_back(codes: np.ndarray, width: int, axis: int) -> tuple:
    words = bits.pack(codes, width, axis=axis)
    return words, bits.unpack(words, width, codes.shape[axis], axis=axis)


def test_the_order_of_bits_is_little_endian() -> None:
    # 0b101, 0b011, 0b110: bits 1,0,1 | 1,1,0 | 0,1,1 fill byte 0 from its lowest bit.
    words = bits.pack(np.array([0b101, 0b011, 0b110]), 3)
    np.testing.assert_array_equal(words, [0b10011101, 0b1])
    assert words.dtype == jnp.uint8
    np.testing.assert_array_equal(bits.pack(jnp.array([1, 2, 3]), 4), [0x21, 0x03])
    np.testing.assert_array_equal(bits.pack(jnp.array([True, False, True]), 1), [5])


# Few shapes: each of them compiles.
@settings(max_examples=40, deadline=None)
@given(
    width=st.integers(1, 8),
    size=st.sampled_from([0, 1, 3, 7, 8, 17]),
    axis=st.sampled_from([-1, 0, 1]),
    seed=st.integers(0, 2**16),
)
def test_unpack_is_the_inverse_of_pack(
    width: int, size: int, axis: int, seed: int
) -> None:
    shape = [2, 3, 2]
    shape[axis] = size
    codes = codes_of(tuple(shape), width, seed)
    words, back = there_and_back(codes, width, axis)
    np.testing.assert_array_equal(words, stream(codes, width, axis))
    assert back.dtype == jnp.uint8
    np.testing.assert_array_equal(back, codes)


@pytest.mark.parametrize("width", range(1, 9))
def test_every_width_at_an_odd_size(width: int) -> None:
    codes = codes_of((3, 13), width)
    words, back = there_and_back(codes, width, -1)
    assert words.shape == (3, -(-13 * width // 8))
    np.testing.assert_array_equal(words, stream(codes, width, -1))
    np.testing.assert_array_equal(back, codes)


def test_only_the_low_bits_count() -> None:
    signed = jnp.array([-1, -4, 3], jnp.int4)
    codes = bits.unpack(bits.pack(signed, 3), 3, 3)
    np.testing.assert_array_equal(codes, [7, 4, 3])


def test_under_jit_and_vmap() -> None:
    codes = codes_of((4, 5, 11), 5)
    expected = bits.pack(codes, 5, axis=1)
    compiled = jax.jit(bits.pack, static_argnums=1, static_argnames="axis")
    np.testing.assert_array_equal(compiled(codes, 5, axis=1), expected)
    mapped = jax.vmap(lambda c: bits.pack(c, 5, axis=0))(codes)
    np.testing.assert_array_equal(mapped, expected)
    back = jax.jit(jax.vmap(lambda w: bits.unpack(w, 5, 5, axis=0)))(mapped)
    np.testing.assert_array_equal(back, codes)


def test_on_a_mesh(mesh: jax.sharding.Mesh) -> None:
    codes = codes_of((4, 32, 3), 3)
    sharding = jax.NamedSharding(mesh, jax.P("model", "data", None))
    sharded = jax.device_put(codes, sharding)
    words = jax.jit(lambda c: bits.pack(c, 3, axis=1))(sharded)
    back = jax.jit(lambda w: bits.unpack(w, 3, 32, axis=1))(words)
    np.testing.assert_array_equal(jax.device_get(words), stream(codes, 3, 1))
    np.testing.assert_array_equal(jax.device_get(back), codes)
    # Shards of whole bytes are packed where they are.
    assert words.sharding.is_equivalent_to(sharding, 3)
    assert back.sharding.is_equivalent_to(sharding, 3)


def test_what_bad_input_gets() -> None:
    with pytest.raises(TypeError, match=r"float32 of shape \(2,\)"):
        bits.pack(jnp.ones(2), 4)
    with pytest.raises(TypeError, match="int32"):
        bits.unpack(jnp.ones(2, jnp.int32), 4, 4)
    for width in (0, 9):
        with pytest.raises(ValueError, match=f"bits={width}"):
            bits.pack(jnp.ones(2, jnp.uint8), width)
        with pytest.raises(ValueError, match=f"bits={width}"):
            bits.unpack(jnp.ones(2, jnp.uint8), width, 2)
    with pytest.raises(ValueError, match="5 codes of 4 bits take 3 bytes"):
        bits.unpack(jnp.ones(2, jnp.uint8), 4, 5)


@pytest.mark.parametrize(
    ("dtype", "width"),
    [
        ("int2", 2),
        ("uint2", 2),
        ("int4", 4),
        ("uint4", 4),
        ("float4_e2m1fn", 4),
        ("int8", 8),
        ("bool", 8),
        ("float8_e4m3fn", 8),
        ("float8_e8m0fnu", 8),
        ("bfloat16", 16),
        ("float32", 32),
        ("complex64", 64),
    ],
)
def test_the_width_of_a_dtype(dtype: str, width: int) -> None:
    array = jnp.zeros((3, 5), dtype)
    abstract = jax.ShapeDtypeStruct((3, 5), jnp.dtype(dtype))
    for leaf in (array, abstract):
        assert bits.size_in_bits(leaf) == 15 * width
        assert bits.nbytes(leaf) == -(-15 * width // 8)


def test_the_size_of_a_tree() -> None:
    tree = {
        "codes": jnp.zeros((3, 3), jnp.int4),
        "scale": [jax.ShapeDtypeStruct((3,), jnp.bfloat16), None],
        "host": np.zeros(2, np.float64),
        "key": jax.random.key(0),
        "keys": jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 3)),
        "count": 7,
    }
    assert bits.size_in_bits(tree) == 36 + 48 + 128 + 64 + 192 + 32
    assert bits.nbytes(tree) == 5 + 6 + 16 + 8 + 24 + 4
    # The reason for this function: a byte for each half of a byte.
    assert tree["codes"].nbytes == 9
    assert bits.size_in_bits({}) == bits.nbytes({}) == 0


def test_the_size_is_exact_beyond_32_bits() -> None:
    huge = jax.ShapeDtypeStruct((2**20, 2**20 + 1), jnp.int4)
    assert bits.size_in_bits(huge) == 4 * 2**20 * (2**20 + 1)
