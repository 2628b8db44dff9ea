# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Codes of 1 to 8 bits packed into bytes, and the true size of a tree in bits.

The order of bits is little-endian throughout: of a row of codes, code `i` occupies the
bits `[i * bits, (i + 1) * bits)` of a stream, its lowest bit first, and bit `j` of the
stream is the bit of value `2 ** (j % 8)` in byte `j // 8`. Codes of 3, 5, 6 and 7 bits
cross the borders of bytes; zeros fill the last byte.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


def _group(bits: int) -> tuple[int, int]:
    """How many codes fill how many bytes without a rest."""
    if not 1 <= bits <= 8:
        raise ValueError(f"codes have from 1 to 8 bits, got bits={bits}.")
    common = math.gcd(bits, 8)
    return 8 // common, bits // common


def _shift(x: jax.Array, by: int) -> jax.Array:
    """Bytes shifted towards the high end, or the low end where `by` is negative."""
    return x << by if by >= 0 else x >> -by


def _regroup(
    x: jax.Array, old: int, new: int, bits: tuple[int, int], size: int, axis: int
) -> jax.Array:
    """Reads each `old` entries along `axis` as a stream, and writes it as `new` ones.

    An entry takes `bits[0]` bits of the stream when read and `bits[1]` when written.
    """
    axis = range(x.ndim)[axis]
    x = jnp.moveaxis(x, axis, -1)
    fill = -x.shape[-1] % old
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, fill)])
    x = x.reshape(*x.shape[:-1], x.shape[-1] // old, old)
    entries = []
    for i in range(new):
        entry = jnp.zeros(x.shape[:-1], jnp.uint8)
        for j in range(old):
            offset = j * bits[0] - i * bits[1]
            if -bits[0] < offset < bits[1]:
                entry = entry | _shift(x[..., j], offset)
        entries.append(entry)
    x = jnp.stack(entries, axis=-1)
    x = x.reshape(*x.shape[:-2], x.shape[-2] * new)
    return jnp.moveaxis(x[..., :size], -1, axis)


def pack(codes: ArrayLike, bits: int, *, axis: int = -1) -> jax.Array:
    """Packs unsigned codes into bytes along one axis.

    Args:
        codes: Array of integers or booleans. The lowest `bits` bits of each count, so
            signed codes go in as two's complement.
        bits: Bits per code, from 1 to 8.
        axis: The axis along which codes share bytes. It may be sharded where every
            shard fills whole bytes with whole codes.

    Returns:
        Array of uint8 of the shape of `codes` but for the axis, which has
        `ceil(size * bits / 8)` bytes. `unpack` needs that size.

    Raises:
        TypeError: If the codes are not integers.
        ValueError: If `bits` is out of range.

    Examples:
        >>> print(pack(jnp.array([1, 2, 3]), 4))
        [33  3]
    """
    codes = jnp.asarray(codes)
    if not (codes.dtype == jnp.bool_ or jnp.issubdtype(codes.dtype, jnp.integer)):
        raise TypeError(
            f"pack takes integer codes, got {codes.dtype} of shape {codes.shape}; "
            "quantise the leaf first."
        )
    old, new = _group(bits)
    codes = codes.astype(jnp.uint8) & jnp.uint8(2**bits - 1)
    size = -(-codes.shape[axis] * bits // 8)
    return _regroup(codes, old, new, (bits, 8), size, axis)


def unpack(words: ArrayLike, bits: int, size: int, *, axis: int = -1) -> jax.Array:
    """Reads the codes that `pack` wrote.

    Args:
        words: Array of uint8, from `pack`.
        bits: Bits per code, from 1 to 8.
        size: How many codes the axis had.
        axis: The axis along which codes share bytes.

    Returns:
        Array of uint8 codes of the shape of `words` but for the axis, which has `size`.

    Raises:
        TypeError: If the words are not uint8.
        ValueError: If `bits` is out of range, or the axis does not hold `size` codes.

    Examples:
        >>> print(unpack(jnp.array([33, 3], jnp.uint8), 4, 3))
        [1 2 3]
    """
    words = jnp.asarray(words)
    new, old = _group(bits)
    if words.dtype != jnp.uint8:
        raise TypeError(f"unpack takes words of uint8, got {words.dtype}.")
    if words.shape[axis] != -(-size * bits // 8):
        raise ValueError(
            f"{size} codes of {bits} bits take {-(-size * bits // 8)} bytes, but axis "
            f"{axis} of the words has {words.shape[axis]} of shape {words.shape}; give "
            "the bits, size and axis that they were packed with."
        )
    codes = _regroup(words, old, new, (8, bits), size, axis)
    return codes & jnp.uint8(2**bits - 1)


def _bits_of(leaf: Any) -> int:
    """The bits of one array, abstract array, or scalar."""
    dtype = leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return _bits_of(jax.eval_shape(jax.random.key_data, leaf))
    if jnp.issubdtype(dtype, jnp.integer):
        width = jnp.iinfo(dtype).bits
    elif jnp.issubdtype(dtype, jnp.floating):
        width = jnp.finfo(dtype).bits
    else:  # Booleans are stored as bytes; complex numbers are two floats.
        width = 8 * jnp.dtype(dtype).itemsize
    return width * math.prod(jnp.shape(leaf))


def size_in_bits(tree: Any) -> int:
    """The bits that all leaves of a tree hold, by the widths of their dtypes.

    Unlike `.nbytes`, which counts a byte for each int4: 4 bits for int4 and
    float4, 8 for a boolean, and for a typed key those of its data.

    Args:
        tree: A pytree of arrays, `jax.ShapeDtypeStruct` or scalars. Structured leaves
            count what they hold.

    Returns:
        The number of bits, exact at any size.

    Examples:
        >>> size_in_bits({"w": jnp.zeros((3, 5), jnp.int4), "s": jnp.float32(1)})
        92
    """
    return sum(_bits_of(leaf) for leaf in jax.tree.leaves(tree))


def nbytes(tree: Any) -> int:
    """The bytes that all leaves of a tree take, each leaf rounded up to whole bytes.

    Args:
        tree: As for `size_in_bits`.

    Returns:
        The number of bytes.

    Examples:
        >>> nbytes({"w": jnp.zeros((3, 5), jnp.int4), "s": jnp.float32(1)})
        12
    """
    return sum(-(-_bits_of(leaf) // 8) for leaf in jax.tree.leaves(tree))
