# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""`BinaryCoded`: a matrix stored as binary codes with two kinds of scales."""

import math
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from wlab.core import MatrixView, Weight
from wlab.core._shapes import window
from wlab.quant._dsq import signs
from wlab.quant._quantized import _Codes


class BinaryCoded(Weight):
    """The matrix ``c[j] * sum_k r[k, group of j, i] * sign_k(codes[j, i])``.

    Make one with `wlab.quant.dsq` or `wlab.quant.d2quant`. Any axes may be stacked in
    front, of all arrays alike.
    """

    codes: jax.Array  # uint2 or uint4 (3 bits), stack + [in, out]
    r: jax.Array  # float32 or as told, stack + [bits, ceil(in / group), out]
    c: jax.Array | None  # float32, stack + [in]; None for ones
    bits: int = eqx.field(static=True)
    group: int = eqx.field(static=True)
    dense_dtype: Any = eqx.field(static=True)  # of the array that this stands for

    @property
    def view(self) -> MatrixView:
        """The last two axes."""
        return MatrixView.of(1, 1)

    @property
    def size_in_bits(self) -> int:
        """Bits that the codes and scales carry."""
        arrays = [self.r] if self.c is None else [self.r, self.c]
        extra = sum(math.prod(x.shape) * x.dtype.itemsize * 8 for x in arrays)
        return math.prod(self.codes.shape) * self.bits + extra

    def aval(self) -> jax.core.ShapedArray:
        """Shape and dtype, for jax."""
        return jax.core.ShapedArray(self.codes.shape, self.dense_dtype)

    def materialise(self) -> jax.Array:
        """The dense array, computed in float32 or wider and rounded once."""
        n = self.codes.shape[-2]
        sign = jnp.stack(signs(self.codes, self.bits, self._wide), -3)
        r = jnp.repeat(self.r.astype(self._wide), self.group, -2)[..., :n, :]
        dense = jnp.sum(sign * r, -3)
        if self.c is not None:
            dense = dense * self.c[..., None]
        return dense.astype(self.dense_dtype)

    @property
    def _wide(self) -> Any:
        return jnp.promote_types(self.r.dtype, jnp.float32)

    def specs(self, spec: jax.P) -> "BinaryCoded":
        """Codes and column scales as the weight; row scales over stack and outputs."""
        entries = [*spec, *[None] * (self.ndim - len(spec))]
        *stack, ins, outs = entries
        parts = [spec, jax.P(*stack, None, ins, outs)]
        if self.c is not None:
            parts.append(jax.P(*stack, ins))
        return jax.tree.unflatten(jax.tree.structure(self), parts)

    # --- cheaper ways ----------------------------------------------------------

    def convert_element_type(self, dtype: Any) -> Any:
        """Standing for another float dtype: the same codes."""
        if not jnp.issubdtype(dtype, jnp.floating):
            return NotImplemented
        if self.dense_dtype != self._wide:
            return NotImplemented  # a value that was rounded stays rounded
        return self._with(dense_dtype=jnp.dtype(dtype))

    def slice(
        self,
        starts: Sequence[Any],
        sizes: Sequence[int],
        strides: Sequence[int] | None = None,
    ) -> Any:
        """A window of the stacked axes."""
        n = self.ndim - 2
        if tuple(sizes[n:]) != self.shape[n:]:
            return NotImplemented

        def cut(x: jax.Array) -> jax.Array:
            own = x.shape[n:]
            return window(
                x,
                [*starts[:n], *(0 for _ in own)],
                [*sizes[:n], *own],
                strides and [*strides[:n], *(1 for _ in own)],
            )

        return self._with(cut)

    def transpose(self, permutation: tuple[int, ...]) -> Any:
        """Exact where only stacked axes change places."""
        n = self.ndim - 2
        if tuple(permutation[n:]) != (n, n + 1):
            return NotImplemented
        return self._with(lambda x: x.transpose(*permutation[:n], *range(n, x.ndim)))

    def reshape(self, shape: tuple[int, ...]) -> Any:
        """Exact where only stacked axes are split or merged."""
        if shape[-2:] != self.shape[-2:]:
            return NotImplemented
        n = self.ndim - 2
        return self._with(lambda x: x.reshape(*shape[:-2], *x.shape[n:]))

    def scannable(self) -> Any:
        """As it is, if axis 0 is a stacked one."""
        return self if self.ndim > 2 else NotImplemented

    def without_c(self) -> "BinaryCoded":
        """The matrix without its column scales: another layer has taken them over."""
        return self._with(c=None)

    def _with(self, each: Any = None, **changes: Any) -> "BinaryCoded":
        """A copy, with a function applied to all arrays, and with other fields."""
        each = each or (lambda x: x)
        fields: dict[str, Any] = {
            "codes": each(self.codes),
            "r": each(self.r),
            "c": None if self.c is None else each(self.c),
            "bits": self.bits,
            "group": self.group,
            "dense_dtype": self.dense_dtype,
        }
        return BinaryCoded(**(fields | changes))


BinaryCoded.codes = _Codes()  # type: ignore[assignment]
