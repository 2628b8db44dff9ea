# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Number grids: the values that a code can stand for, before scaling.

A grid rounds real numbers to its values, writes values as unsigned integers (bit
patterns) and reads them back. Arithmetic is in float32, or wider if the input is.
"""

import difflib
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


class Grid(NamedTuple):
    """A named set of representable numbers.

    ``int`` grids are symmetric, -largest..largest, so that zero is exact and no zero
    point is needed; ``uint`` grids run over 0..largest and go with a zero point;
    ``float`` grids have a sign, an exponent and a mantissa and saturate.
    """

    name: str
    bits: int  # of one code
    kind: Literal["int", "uint", "float"]
    largest: float  # the largest value
    exponent: int = 0  # of the smallest normal number (float)
    mantissa: int = 0  # bits (float)

    @property
    def storage(self) -> Any:
        """The narrowest unsigned dtype that holds a code: uint2, uint4 or uint8."""
        return {2: jnp.uint2, 4: jnp.uint4, 8: jnp.uint8}[self._width]

    def round(self, x: jax.Array, noise: jax.Array | None = None) -> jax.Array:
        """The nearest value of the grid, or a neighbour chosen by chance.

        Args:
            x: numbers in units of the grid, float32 or float64, any shape.
            noise: None to round to nearest (ties to even); or uniform numbers in
                [0, 1) of the shape of `x`: of the two neighbours of `x` the upper
                one is taken where the noise is below the fraction of the way to it,
                so that the mean is `x`.

        Returns:
            Values of the grid, of the dtype of `x`; what lies outside saturates.
        """
        if self.kind != "float":
            low = 0.0 if self.kind == "uint" else -self.largest
            return jnp.clip(_round(x, noise), low, self.largest)
        # Saturate first, so that nothing rounds up past the largest value.
        x = jnp.clip(x, -self.largest, self.largest)
        step = jnp.maximum(_power_of_two(x), 2.0**self.exponent) * 2.0**-self.mantissa
        return jnp.clip(_round(x / step, noise) * step, -self.largest, self.largest)

    def encode(self, values: jax.Array) -> jax.Array:
        """Values of the grid as unsigned codes of dtype `storage`."""
        if self.kind == "uint":
            return values.astype(self.storage)
        if self.name == "fp4_e2m1":
            return _encode_fp4(values).astype(self.storage)
        return lax.bitcast_convert_type(values.astype(self._signed), self.storage)

    def decode(self, codes: jax.Array, dtype: Any = jnp.float32) -> jax.Array:
        """The values that unsigned codes stand for, as `dtype`."""
        if self.kind == "uint":
            return codes.astype(dtype)
        if self.name == "fp4_e2m1":
            return _decode_fp4(codes).astype(dtype)
        return lax.bitcast_convert_type(codes, self._signed).astype(dtype)

    @property
    def _width(self) -> int:
        return 2 if self.bits <= 2 else 4 if self.bits <= 4 else 8

    @property
    def _signed(self) -> Any:
        if self.kind == "float":
            return _FLOATS[self.name]
        return {2: jnp.int2, 4: jnp.int4, 8: jnp.int8}[self._width]


# By hand: not every backend of XLA converts this type inside a larger program.
def _encode_fp4(x: jax.Array) -> jax.Array:
    """Codes of 0, 0.5, 1, 1.5, 2, 3, 4, 6, and 8 more for a sign."""
    size = jnp.abs(x)
    upper = jnp.where(size < 4, size + 2, size / 2 + 4)
    code = jnp.where(size < 2, 2 * size, upper)
    return code.astype(jnp.uint8) | (jnp.signbit(x).astype(jnp.uint8) << 3)


def _decode_fp4(codes: jax.Array) -> jax.Array:
    codes = codes.astype(jnp.uint8)
    code = (codes & 7).astype(jnp.float32)
    upper = jnp.where(code < 6, code - 2, 2 * code - 8)
    size = jnp.where(code < 4, code / 2, upper)
    return jnp.where(codes >= 8, -size, size)


def _power_of_two(x: jax.Array) -> jax.Array:
    """The largest power of two not above |x|: x with its sign and mantissa cleared."""
    info = jnp.finfo(x.dtype)
    word = jnp.dtype(f"uint{info.bits}")
    exponent = np.array(((1 << info.nexp) - 1) << info.nmant, word)
    bits = lax.bitcast_convert_type(x, word) & exponent
    return lax.bitcast_convert_type(bits, x.dtype)


def _round(x: jax.Array, noise: jax.Array | None) -> jax.Array:
    if noise is None:
        return jnp.round(x)
    low = jnp.floor(x)
    return low + (noise < x - low).astype(x.dtype)


_FLOATS = {
    "fp8_e4m3": jnp.float8_e4m3fn,
    "fp8_e5m2": jnp.float8_e5m2,
    "fp4_e2m1": jnp.float4_e2m1fn,
}

GRIDS: dict[str, Grid] = {
    grid.name: grid
    for grid in (
        Grid("fp8_e4m3", 8, "float", 448.0, -6, 3),
        Grid("fp8_e5m2", 8, "float", 57344.0, -14, 2),
        Grid("fp4_e2m1", 4, "float", 6.0, 0, 1),
        *(Grid(f"int{b}", b, "int", 2.0 ** (b - 1) - 1) for b in range(2, 9)),
        *(Grid(f"uint{b}", b, "uint", 2.0**b - 1) for b in range(1, 9)),
    )
}


def get_grid(grid: str | Grid) -> Grid:
    """The grid of that name; a `Grid` is returned as it is.

    Raises:
        ValueError: for a name that is none, with the names that come near.

    Examples:
        >>> get_grid("int4").largest
        7.0
    """
    if isinstance(grid, Grid):
        return grid
    if grid not in GRIDS:
        near = difflib.get_close_matches(str(grid), GRIDS, n=3, cutoff=0.4)
        raise ValueError(
            f"no grid is named {grid!r}; "
            + (f"near: {', '.join(near)}" if near else f"grids: {', '.join(GRIDS)}")
        )
    return GRIDS[grid]
