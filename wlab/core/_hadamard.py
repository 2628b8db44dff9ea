# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Hadamard transforms of any usual size, and random orthogonal matrices.

A size is K times a power of two. The latter's part is the Sylvester matrix, applied in
pieces of up to 64 as small matrix products; for the former there is a Hadamard matrix
by Paley's constructions over a finite field.

References:
    Paley, On Orthogonal Matrices, 1933.

    Ashkboos, Mohtashami, Croci, Li, Cameron, Jaggi, Alistarh, Hoefler and Hensman,
    `QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs
    <https://arxiv.org/abs/2404.00456>`_, 2024.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from wlab.core._keys import typed_key

# In this order: the first that divides a size and leaves a power of two is its K.
_SIZES = (172, 156, 148, 140, 108, 60, 52, 36, 28, 40, 20, 48, 12, 1)
_PIECE = 64


def hadamard(
    x: ArrayLike,
    axis: int = -1,
    *,
    transpose: bool = False,
    table: ArrayLike | None = None,
) -> jax.Array:
    """The orthonormal Hadamard transform along an axis.

    The matrix is that of the K tables times Sylvester's: symmetric, and so its own
    inverse, where K is 1.

    Args:
        x: floats; the axis has K times a power of two entries, with K one of 1, 12, 20,
            28, 36, 40, 48, 52, 60, 108, 140, 148.
        axis: along which.
        transpose: the inverse transform.
        table: another Hadamard matrix [K, K] of -1 and 1 for the part that is no power
            of two.

    Returns:
        An array of the shape and dtype of `x`, computed in float32 or wider.

    Raises:
        ValueError: for a size that has no such K.

    Examples:
        >>> print(hadamard(jnp.array([3.0, 1.0])).round(3))
        [2.828 1.414]
    """
    x = jnp.asarray(x)
    n = x.shape[axis]
    own = _table_of(n) if table is None else jnp.asarray(table)
    k = len(own)
    if n % k or (n // k) & (n // k - 1) or not n:
        raise ValueError(
            f"a Hadamard transform along axis {axis} of shape {x.shape}: {n} is not "
            f"{k} times a power of two; give table= of another size, or pad"
        )
    wide = jnp.promote_types(x.dtype, jnp.float32)
    y = jnp.moveaxis(x, axis, -1).astype(wide)
    lead = y.shape[:-1]
    factors = [jnp.asarray(own.T if transpose else own, wide)] if k > 1 else []
    rest = n // k
    while rest > 1:
        piece = min(rest, _PIECE)
        factors.append(jnp.asarray(_sylvester(piece), wide))
        rest //= piece
    after = n
    y = y.reshape(-1, n)
    for factor in factors:
        size = len(factor)
        after //= size
        y = y.reshape(-1, size, after)
        y = jnp.einsum("ij,bjk->bik", factor, y, precision=jax.lax.Precision.HIGHEST)
    y = y.reshape(*lead, n) / math.sqrt(n)
    return jnp.moveaxis(y.astype(x.dtype), -1, axis)


def hadamard_matrix(n: int, dtype: Any = jnp.float32) -> jax.Array:
    """The matrix whose row i is the transform of the i-th unit vector, [n, n]."""
    return hadamard(jnp.eye(n, dtype=dtype))


def random_hadamard(
    key: jax.Array | int, n: int, dtype: Any = jnp.float32
) -> jax.Array:
    """An orthogonal matrix ``diag(s) H`` with random signs s, [n, n].

    Args:
        key: a key or a seed.
        n: as in `hadamard`.
        dtype: of the result.
    """
    s = jax.random.rademacher(typed_key(key), (n,), dtype)
    return s[:, None] * hadamard_matrix(n, dtype)


def random_orthogonal(
    key: jax.Array | int, n: int, dtype: Any = jnp.float32
) -> jax.Array:
    """A random orthogonal matrix, uniform over all of them, [n, n].

    Args:
        key: a key or a seed.
        n: any size.
        dtype: of the result.
    """
    q, r = jnp.linalg.qr(jax.random.normal(typed_key(key), (n, n), dtype))
    sign = jnp.where(jnp.diagonal(r) < 0, -1, 1).astype(dtype)
    return q * sign[None]


def _table_of(n: int) -> np.ndarray:
    for k in _SIZES:
        if n % k == 0 and not (n // k) & (n // k - 1):
            table = _paley(k)
            if table is not None:
                return table
    known = ", ".join(str(k) for k in sorted(_SIZES) if _paley(k) is not None)
    raise ValueError(
        f"no Hadamard matrix of size {n} is known here: sizes are a power of two times "
        f"one of {known}; give table= for others, or rotate with random_orthogonal"
    )


@functools.cache
def _sylvester(n: int) -> np.ndarray:
    i = np.arange(n)
    return 1 - 2 * (np.bitwise_count(i[:, None] & i[None]) % 2).astype(np.int8)


@functools.cache
def _paley(n: int) -> np.ndarray | None:
    """A Hadamard matrix of that size, int8; None where the constructions have none."""
    if n <= 2:
        return _sylvester(n) if n >= 1 else None
    if n % 4:
        return None
    character = _characters(n - 1) if (n - 1) % 4 == 3 else None
    if character is not None:
        s = np.ones((n, n), np.int8)
        s[1:, 0], s[0, 0], s[1:, 1:] = -1, 0, character
        return s + np.eye(n, dtype=np.int8)
    q = n // 2 - 1
    character = _characters(q) if q % 4 == 1 else None
    if character is not None:
        c = np.ones((q + 1, q + 1), np.int8)
        c[0, 0], c[1:, 1:] = 0, character
        one = np.array([[1, 1], [1, -1]], np.int8)
        other = np.array([[1, -1], [-1, -1]], np.int8)
        return np.kron(c, one) + np.kron(np.eye(q + 1, dtype=np.int8), other)
    half = _paley(n // 2)
    return None if half is None else np.kron(_sylvester(2), half)


def _characters(q: int) -> np.ndarray | None:
    """Of differences in the field of q elements: 1 for squares, -1 for others.

    None where q is neither an odd prime nor the square of one.
    """
    if _is_prime(q):
        square = np.zeros(q, bool)
        square[np.arange(q) ** 2 % q] = True
        i = np.arange(q)
        apart = (i[:, None] - i[None]) % q
    else:
        p = math.isqrt(q)
        if p * p != q or p < 3 or not _is_prime(p):
            return None
        # Elements a + b sqrt(g) with g no square modulo p, numbered a p + b.
        g = next(x for x in range(2, p) if x not in {y * y % p for y in range(p)})
        a, b = np.divmod(np.arange(q), p)
        square = np.zeros(q, bool)
        square[(a * a + g * b * b) % p * p + 2 * a * b % p] = True
        apart = (a[:, None] - a[None]) % p * p + (b[:, None] - b[None]) % p
    found = np.where(square, 1, -1).astype(np.int8)[apart]
    np.fill_diagonal(found, 0)
    return found


def _is_prime(n: int) -> bool:
    return n > 2 and all(n % i for i in range(2, math.isqrt(n) + 1))
