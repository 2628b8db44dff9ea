# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""`Quantized`: a weight stored as codes of a few bits and scales."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from wlab.core import MatrixView, Weight, linalg
from wlab.core._shapes import (
    gather_axis,
    gather_labels,
    reshape_blocks,
    single_axis_gather,
    window,
)
from wlab.quant._grid import Grid

# How an axis shares scales: one for the whole axis, or one for each index. A larger
# number is the length of a group of neighbours.
WHOLE, EACH = 0, 1


class Quantized(Weight):
    """The array ``(value(codes) - zero) * scale``, each scale shared by a block.

    The codes are unsigned integers (for float grids: bit patterns), so that a
    difference of two such trees is again one, and `optax.apply_updates` adds it
    exactly. Make one with `wlab.quant.quantize`.
    """

    codes: jax.Array  # grid.storage, of the weight's shape
    scale: jax.Array  # float, per axis: 1 (whole), n (each) or ceil(n / group)
    zero: jax.Array | None  # like scale, in units of codes, float or uint8; None: zero
    grid: Grid = eqx.field(static=True)
    block: tuple[int, ...] = eqx.field(static=True)  # WHOLE, EACH or a group length,
    # for the last axes; those in front of them have a scale each
    dense_dtype: Any = eqx.field(static=True)  # of the array that this stands for
    matrix_view: MatrixView | None = eqx.field(static=True)

    @property
    def view(self) -> MatrixView | None:
        """The axes read and written, if they are known."""
        return self.matrix_view

    @property
    def size_in_bits(self) -> int:
        """Bits that the codes, scales and zero points carry."""
        arrays = [self.scale] if self.zero is None else [self.scale, self.zero]
        extra = sum(math.prod(x.shape) * x.dtype.itemsize * 8 for x in arrays)
        return math.prod(self.codes.shape) * self.grid.bits + extra

    def aval(self) -> jax.core.ShapedArray:
        """Shape and dtype, for jax."""
        return jax.core.ShapedArray(self.codes.shape, self.dense_dtype)

    def materialise(self) -> jax.Array:
        """The dense array, computed in float32 at least and rounded once."""
        return self._decode(self.codes, self.scale, self.zero, self._blocks)

    def values(self) -> jax.Array:
        """The dense array in the dtype that it is computed in, before that rounding."""
        return self._replace(dtype=wide(self.scale)).materialise()

    def specs(self, spec: jax.P) -> "Quantized":
        """Codes as the weight itself; scales too, but where one serves a whole axis."""
        entries = [*spec, *[None] * (self.ndim - len(spec))]
        scales = jax.P(
            *(
                None if block == WHOLE else entry
                for block, entry in zip(self._blocks, entries, strict=True)
            )
        )
        parts = [spec, *[scales] * (1 if self.zero is None else 2)]
        return jax.tree.unflatten(jax.tree.structure(self), parts)

    # --- cheaper ways ----------------------------------------------------------

    def gather(self, indices: jax.Array, **params: Any) -> Any:
        """Whole slices along one axis: only what is looked up is made dense."""
        axis = single_axis_gather(self.shape, params)
        blocks = self._blocks
        fill = params.get("fill_value")
        if fill is not None and fill != fill:  # `jnp.take` asks for NaN, the default
            params["fill_value"] = fill = None
        if axis is None or blocks[axis] > EACH or fill is not None:
            return NotImplemented
        n = self.ndim
        batch = list(range(n, n + indices.ndim - 1))
        kept = [i for i in range(n) if i != axis]

        def take(x: jax.Array) -> jax.Array:
            # A shared scale is looked up too: it carries the NaN that marks an index
            # out of bounds, which codes cannot.
            shape = (*x.shape[:axis], self.shape[axis], *x.shape[axis + 1 :])
            return gather_axis(jnp.broadcast_to(x, shape), indices, axis, params)

        dense = self._decode(
            take(self.codes),
            take(self.scale),
            None if self.zero is None else take(self.zero),
            (EACH,) * len(batch) + tuple(blocks[i] for i in kept),
        )
        labels = [*batch, *kept]
        order = gather_labels(kept, batch, params)
        return dense.transpose([labels.index(label) for label in order])

    def transpose(self, permutation: tuple[int, ...]) -> "Quantized":
        """Codes, scales and blocks permuted alike."""
        blocks = self._blocks
        view = self.matrix_view
        return self._replace(
            lambda x: x.transpose(permutation),
            lambda x: x.transpose(permutation),
            tuple(blocks[i] for i in permutation),
            view and view.transpose(permutation),
        )

    def reshape(self, shape: tuple[int, ...]) -> Any:
        """Exact where axes that share scales alike are split or merged."""
        groups = reshape_blocks(self.shape, shape)
        if groups is None:
            return NotImplemented
        blocks = self._blocks
        new_blocks = [WHOLE] * len(shape)
        for old_axes, new_axes in groups:
            kinds = {blocks[i] for i in old_axes if self.shape[i] != 1} or {WHOLE}
            if kinds in ({WHOLE}, {EACH}):
                found: list[int] | None = [*kinds] * len(new_axes)
            else:
                run = _run(*([x[i] for i in old_axes] for x in (self.shape, blocks)))
                found = (
                    None if run is None else spread([shape[i] for i in new_axes], run)
                )
            if found is None:
                return NotImplemented
            for i, kind in zip(new_axes, found, strict=True):
                new_blocks[i] = kind
        new = tuple(
            1 if b == WHOLE else -(-n // b)
            for n, b in zip(shape, new_blocks, strict=True)
        )
        view = self.matrix_view
        return self._replace(
            lambda x: x.reshape(shape),
            lambda x: x.reshape(new),
            tuple(new_blocks),
            view and view.reshape(self.shape, shape),
        )

    def convert_element_type(self, dtype: Any) -> Any:
        """Standing for another float dtype: the same codes."""
        if not jnp.issubdtype(dtype, jnp.floating):
            return NotImplemented
        if self.dense_dtype != wide(self.scale):
            return NotImplemented  # a value that was rounded stays rounded
        return self._replace(dtype=np.dtype(dtype))

    def slice(
        self,
        starts: Sequence[Any],
        sizes: Sequence[int],
        strides: Sequence[int] | None = None,
    ) -> Any:
        """A window of the codes and of the scales."""
        blocks = self._blocks
        for n, size, block in zip(self.shape, sizes, blocks, strict=True):
            if block > EACH and size != n:
                return NotImplemented

        def cut(x: jax.Array) -> jax.Array:
            own = [b == EACH for b in blocks]
            return window(
                x,
                [lo if o else 0 for lo, o in zip(starts, own, strict=True)],
                [k if o else n for k, n, o in zip(sizes, x.shape, own, strict=True)],
                strides and [s if o else 1 for s, o in zip(strides, own, strict=True)],
            )

        return self._replace(lambda x: window(x, starts, sizes, strides), cut)

    def scannable(self) -> Any:
        """Every array with axis 0 in front, each index with its own scale."""
        blocks = self._blocks
        if blocks[0] > EACH:
            return NotImplemented
        n = self.shape[0]
        return self._replace(
            scales=lambda x: jnp.broadcast_to(x, (n, *x.shape[1:])),
            block=(EACH, *blocks[1:]),
        )

    # --- inside ----------------------------------------------------------------

    @property
    def _blocks(self) -> tuple[int, ...]:
        """The block of every axis, also of those stacked since it was made."""
        extra = self.codes.ndim - len(self.block)
        return (EACH,) * extra + self.block[max(0, -extra) :]

    def _decode(
        self,
        codes: jax.Array,
        scale: Any,
        zero: Any,
        blocks: tuple[int, ...],
    ) -> jax.Array:
        scale = scale.astype(wide(scale))  # narrow ones are only stored so
        values = self.grid.decode(codes, scale.dtype)
        if zero is not None:
            zero = zero.astype(scale.dtype)
            values = values - expand(zero, codes.shape, blocks)
        return (values * expand(scale, codes.shape, blocks)).astype(self.dense_dtype)

    def _replace(
        self,
        codes: Any = None,
        scales: Any = None,
        block: tuple[int, ...] | None = None,
        view: Any = False,
        dtype: Any = None,
    ) -> "Quantized":
        """A copy with functions applied to the codes and to scales and zero points."""
        codes = codes or (lambda x: x)
        scales = scales or (lambda x: x)
        return Quantized(
            codes=codes(self.codes),
            scale=scales(self.scale),
            zero=None if self.zero is None else scales(self.zero),
            grid=self.grid,
            block=self._blocks if block is None else block,
            dense_dtype=dtype or self.dense_dtype,
            matrix_view=self.matrix_view if view is False else view,
        )


def spread(sizes: Sequence[int], run: int) -> list[int] | None:
    """The block of each axis where so many neighbours share a scale.

    Args:
        sizes: of axes that are flattened, the last one fastest.
        run: neighbours on the flattened axis.

    Returns:
        The blocks; None where a run does not fall on the borders of the axes.

    Examples:
        >>> spread((4, 8), 16) == [2, WHOLE], spread((4, 8), 4) == [EACH, 4]
        (True, True)
    """
    out: list[int] = []
    for i, n in reversed([*enumerate(sizes)]):
        if run == 1:
            out.append(EACH)
        elif run >= n and run % n == 0:
            out.append(WHOLE)
            run //= n
        elif run < n and (n % run == 0 or i == 0):
            out.append(run)
            run = 1
        else:
            return None
    return out[::-1]


def _run(sizes: Sequence[int], blocks: Sequence[int]) -> int | None:
    """How many neighbours share a scale, the inverse of `spread`."""
    run, closed, ragged = 1, False, False
    for n, block in zip(reversed(sizes), reversed(blocks), strict=True):
        if n == 1:
            continue
        if ragged or (closed and block != EACH):
            return None
        run *= n if block == WHOLE else min(block, n)
        closed = block != WHOLE
        ragged = block > EACH and n % block != 0
    return run


class _Codes:
    """The attribute that holds the codes: it refuses arithmetic on bit patterns.

    A wrapper that averages or scales leaves without knowing them would turn codes into
    meaningless floats and go on; here it stops.
    """

    def __get__(self, weight: Any, owner: Any = None) -> Any:
        return self if weight is None else vars(weight)["codes"]

    def __set__(self, weight: Any, codes: Any) -> None:
        dtype = getattr(codes, "dtype", None)
        if dtype is not None and jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"the codes of a packed (Quantized) weight of shape {codes.shape} are "
                f"bit patterns, but {dtype} was put in their place: something computes "
                "with the leaves of the tree, as optax.MultiSteps, lookahead, averages "
                "of parameters and scaling after ECO do. It needs the dense form: "
                "wlab.materialise(params)"
            )
        vars(weight)["codes"] = codes


# Pytrees are rebuilt attribute by attribute: this sees every way in.
Quantized.codes = _Codes()  # type: ignore[assignment]


def wide(scale: jax.Array) -> np.dtype:
    """The dtype in which codes are decoded."""
    return np.dtype(jnp.promote_types(scale.dtype, jnp.float32))


def expand(
    scale: jax.Array, shape: tuple[int, ...], blocks: tuple[int, ...]
) -> jax.Array:
    """Scales repeated within their groups, ready to broadcast against `shape`."""
    for axis, (n, block) in enumerate(zip(shape, blocks, strict=True)):
        if block > EACH:

            def repeat(s: jax.Array, n: int = n, b: int = block, axis: int = axis):
                return jax.lax.slice_in_dim(jnp.repeat(s, b, axis), 0, n, axis=axis)

            scale = regroup(repeat, scale, axis)
    return scale


def regroup(fn: Callable[[jax.Array], jax.Array], x: jax.Array, axis: int) -> jax.Array:
    """`fn(x)`, which splits or merges `axis`: Explicit mesh axes must leave that."""
    mesh = jax.typeof(x).sharding.mesh
    if mesh.empty or mesh.are_all_axes_auto:
        return fn(x)
    return linalg.sharding_safe(fn, whole=(axis,))(x)
