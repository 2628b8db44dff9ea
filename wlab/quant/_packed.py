# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""`Packed`: a quantised weight whose codes share bytes, so that 3 bits cost 3 bits.

Arrays of 2 and 4 bits take a byte for each code on most backends, and there is no type
of 3. Packed weights are for what is kept: they run wherever a `Quantized` does, which
they become when they are read.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from wlab.core import MatrixView, Select, Weight, bits, leaves_with_paths
from wlab.core import select as select_leaves
from wlab.core._shapes import window
from wlab.quant._binary import BinaryCoded
from wlab.quant._grid import Grid
from wlab.quant._quantized import EACH, Quantized, wide


class Packed(Weight):
    """The array that a `Quantized` of these codes and scales stands for.

    Codes and zero points are packed along the last axis (see `wlab.core.bits.pack`):
    it may be divided over a mesh where every part is whole bytes.
    """

    words: jax.Array  # uint8, the codes; the last axis is ceil(n * bits / 8)
    scale: jax.Array  # float, as in Quantized
    zero: Any  # uint8, packed like the codes; or None
    grid: Grid = eqx.field(static=True)
    block: tuple[int, ...] = eqx.field(static=True)
    columns: int = eqx.field(static=True)  # of the last axis
    dense_dtype: Any = eqx.field(static=True)
    matrix_view: MatrixView | None = eqx.field(static=True)

    @property
    def view(self) -> MatrixView | None:
        """The axes read and written, counted from the right."""
        return self.matrix_view

    def aval(self) -> jax.core.ShapedArray:
        """Shape and dtype, for jax."""
        shape = (*self.words.shape[:-1], self.columns)
        return jax.core.ShapedArray(shape, self.dense_dtype)

    def unpack(self) -> Quantized:
        """The same weight with an array entry for each code."""
        grid = self.grid
        codes = bits.unpack(self.words, grid.bits, self.columns)
        if grid.kind == "int":
            half = 2 ** (grid.bits - 1)
            values = codes.astype(jnp.int32)
            values = jnp.where(values >= half, values - 2 * half, values)
            codes = grid.encode(values.astype(jnp.float32))
        zero = self.zero
        if zero is not None:
            n = self.scale.shape[-1]
            zero = bits.unpack(zero, grid.bits, n).astype(self.scale.dtype)
        return Quantized(
            codes=codes.astype(grid.storage),
            scale=self.scale,
            zero=zero,
            grid=grid,
            block=self.block,
            dense_dtype=self.dense_dtype,
            matrix_view=self.matrix_view,
        )

    def materialise(self) -> jax.Array:
        """The dense array."""
        return self.unpack().materialise()

    def specs(self, spec: jax.P) -> "Packed":
        """Words as the weight itself; scales too, but where one serves a whole axis."""
        entries = [*spec, *[None] * (self.ndim - len(spec))]
        scales = jax.P(
            *(
                None if size == 1 else entry
                for size, entry in zip(self.scale.shape, entries, strict=True)
            )
        )
        parts = [spec, *[scales] * (1 if self.zero is None else 2)]
        return jax.tree.unflatten(jax.tree.structure(self), parts)

    # --- cheaper ways ----------------------------------------------------------

    def convert_element_type(self, dtype: Any) -> Any:
        """Standing for another float dtype: the same codes."""
        if not jnp.issubdtype(dtype, jnp.floating):
            return NotImplemented
        if self.dense_dtype != wide(self.scale):
            return NotImplemented  # a value that was rounded stays rounded
        return dataclasses.replace(self, dense_dtype=np.dtype(dtype))

    def slice(
        self,
        starts: Sequence[Any],
        sizes: Sequence[int],
        strides: Sequence[int] | None = None,
    ) -> Any:
        """A window of axes whose indices have scales of their own; not of the last."""
        n = self.ndim
        extra = n - len(self.block)
        whole = [*(False,) * extra, *(b != EACH for b in self.block[-n + extra :])]
        whole[-1] = True
        if any(w and k != m for w, k, m in zip(whole, sizes, self.shape, strict=True)):
            return NotImplemented

        def cut(x: jax.Array) -> jax.Array:
            return window(
                x,
                [0 if w else lo for w, lo in zip(whole, starts, strict=True)],
                [m if w else k for w, k, m in zip(whole, sizes, x.shape, strict=True)],
                strides
                and [1 if w else s for w, s in zip(whole, strides, strict=True)],
            )

        return self._each(cut)

    def scannable(self) -> Any:
        """As it is, if axis 0 is a stacked one with scales of its own."""
        stacked = len(self.block) < self.ndim or self.block[0] == EACH
        return self if stacked and self.ndim > 1 else NotImplemented

    def _each(self, fn: Callable[[jax.Array], jax.Array]) -> "Packed":
        parts = {"words": fn(self.words), "scale": fn(self.scale)}
        if self.zero is not None:
            parts["zero"] = fn(self.zero)
        return dataclasses.replace(self, **parts)


def pack(w: Quantized) -> Packed:
    """Packs the codes of a weight, and its zero points.

    Args:
        w: its zero points, if it has any, are levels of its grid.

    Returns:
        A weight that stands for the same array, to the bit.

    Examples:
        >>> from wlab.quant import rtn
        >>> pack(rtn(jnp.ones((64, 32)), bits=3, group=None)).words.shape
        (64, 12)
    """
    zero = w.zero
    if zero is not None:
        zero = bits.pack(zero.astype(jnp.uint8), w.grid.bits)
    return Packed(
        words=bits.pack(w.codes, w.grid.bits),
        scale=w.scale,
        zero=zero,
        grid=w.grid,
        block=w.block,
        columns=w.shape[-1],
        dense_dtype=w.dense_dtype,
        matrix_view=w.matrix_view,
    )


def pack_tree(tree: Any) -> Any:
    """The tree with every `Quantized` in it packed, inside other weights too.

    Args:
        tree: parameters with structured leaves.

    Returns:
        A tree that runs wherever the other did.
    """

    def one(w: Any) -> Any:
        return pack(w) if isinstance(w, Quantized) else w

    return jax.tree.map(one, tree, is_leaf=lambda w: isinstance(w, Quantized))


def bits_per_weight(tree: Any, select: Select | None = None) -> float:
    """The bits that are kept for each weight: codes, scales, zero points and orders.

    Args:
        tree: parameters; codes count as many bits as their grid has, as when packed.
        select: the leaves that are counted, as in `wlab.core.select`; None for all.

    Returns:
        A mean over the weights of these leaves.

    Examples:
        >>> from wlab.quant import rtn
        >>> made = rtn(jnp.ones((64, 32)), bits=3, group=None)
        >>> bits_per_weight({"a": made})  # 3, and 35 for each output
        3.546875
    """
    marks = leaves_with_paths(select_leaves(tree, "*" if select is None else select))
    taken = {path for path, mark in marks if mark}
    held = count = 0
    for path, w in leaves_with_paths(tree):
        if path in taken:
            held += _bits_of(w)
            count += math.prod(jnp.shape(w))
    return held / count


def _bits_of(w: Any) -> int:
    def own(x: Any) -> bool:
        return isinstance(x, (Quantized, BinaryCoded))

    total = 0
    for part in jax.tree.leaves(w, is_leaf=own):
        if isinstance(part, BinaryCoded):
            total += part.size_in_bits
        else:
            if isinstance(part, Quantized):
                part = jax.eval_shape(pack, part)
            total += bits.size_in_bits(part)
    return total
