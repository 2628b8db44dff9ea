# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""`Flattened`: a kernel of any shape that is stored as a stack of matrices.

A matrix method returns a weight of shape stack + (in, out). Where that weight cannot be
reshaped into the kernel (groups of inputs that run across the axes of heads, an order
of channels), it stays a matrix, and the other operand of a product is flattened.
"""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax

from wlab.core._lift import Weight, cut, dispatch, is_weight, specs_of
from wlab.core._view import MatrixView, from_matrices, product_axes


class Flattened(Weight):
    """The array `from_matrices(base, view, shape)`.

    Args:
        base: weight or array of shape stack + (in, out).
        view: the input and output axes of what it stands for.
        shape: its shape.
    """

    base: Any  # Weight or array, stack + (in, out)
    _view: MatrixView = eqx.field(static=True)
    _tail: tuple[int, ...] = eqx.field(static=True)  # the axes that are not stacked
    _outer: tuple[int, ...] = eqx.field(static=True)  # where those are, from the right

    def __init__(self, base: Any, view: MatrixView, shape: Sequence[int]):
        n = len(shape)
        view = view.check(tuple(shape))
        stack = view.stack(n)
        self.base = base
        self._view = view
        self._outer = tuple(a - n for a in range(n) if a not in stack)
        self._tail = tuple(shape[a] for a in range(n) if a not in stack)

    @property
    def view(self) -> MatrixView:
        """The axes read and written, counted from the right."""
        return self._view

    def aval(self) -> jax.core.ShapedArray:
        """Shape and dtype, for jax."""
        return jax.core.ShapedArray(self._shape(), self.base.dtype)

    def materialise(self) -> jax.Array:
        """The dense array."""
        base = self.base
        dense = base.materialise() if is_weight(base) else base
        return from_matrices(dense, self._view, self._shape())

    def specs(self, spec: jax.P) -> "Flattened":
        """Stacked axes as they are; a side, as its one axis that is divided."""
        shape = self._shape()
        n = len(shape)
        entries = (*spec, *(None,) * (n - len(spec)))

        def side(axes: tuple[int, ...]) -> Any:
            # Row-major: only the first axis of a side divides the flattened one.
            return entries[axes[0] % n]

        lead = [entries[a] for a in self._view.stack(n)]
        base = specs_of(self.base, jax.P(*lead, *map(side, self._view)))
        return jax.tree.unflatten(jax.tree.structure(self), jax.tree.leaves(base))

    def dot_general(
        self, other: jax.Array, dimension_numbers: Any, *, left: bool, **params: Any
    ) -> Any:
        """The matrices' product with the other operand flattened."""
        shape = self._shape()
        n = len(shape)
        if params.pop("out_sharding", None) is not None:
            return NotImplemented
        found = product_axes(self._view, n, other.ndim, dimension_numbers, left=left)
        if found is None:
            return NotImplemented
        b = len(found.stack)
        summed = len(dimension_numbers[0][0])
        flat = other.transpose(found.order)
        flat = flat.reshape(*flat.shape[: other.ndim - summed], -1)
        mine = b if found.forward else b + 1
        lead = tuple(range(b))
        out = dispatch(
            lax.dot_general_p,
            flat,
            self.base,
            dimension_numbers=(((flat.ndim - 1,), (mine,)), (lead, lead)),
            out_sharding=None,
            **params,
        )
        made = self._view.outputs if found.forward else self._view.inputs
        out = out.reshape(*out.shape[:-1], *(shape[a] for a in made))
        return out.transpose(found.places)

    def transpose(self, permutation: tuple[int, ...]) -> Any:
        """The same matrices, seen with other axes."""
        n = len(permutation)
        where = {old: new for new, old in enumerate(permutation)}
        moved = [where[i] for i in self._view.stack(n)]
        if moved != sorted(moved):
            return NotImplemented
        shape = self._shape()
        view = self._view.transpose(permutation)
        return Flattened(self.base, view, [shape[i] for i in permutation])

    def reshape(self, shape: tuple[int, ...]) -> Any:
        """The same matrices where the stacked axes stay and sides are not mixed."""
        old = self._shape()
        view = self._view.reshape(old, shape)
        if view is None:
            return NotImplemented
        before, after = (
            tuple(s[a] for a in v.stack(len(s)))
            for v, s in ((self._view, old), (view, shape))
        )
        return Flattened(self.base, view, shape) if before == after else NotImplemented

    def convert_element_type(self, dtype: Any) -> Any:
        """The matrices converted."""
        if not jnp.issubdtype(dtype, jnp.floating):
            return NotImplemented
        base = dispatch(
            lax.convert_element_type_p,
            self.base,
            new_dtype=dtype,
            weak_type=False,
            sharding=None,
        )
        return Flattened(base, self._view, self._shape())

    def slice(
        self,
        starts: Sequence[Any],
        sizes: Sequence[int],
        strides: Sequence[int] | None = None,
    ) -> Any:
        """A window of the stacked axes."""
        shape = self._shape()
        n = len(shape)
        stack = self._view.stack(n)
        if any(sizes[i] != shape[i] for i in range(n) if i not in stack):
            return NotImplemented
        base = cut(
            self.base,
            [*(starts[i] for i in stack), 0, 0],
            [*(sizes[i] for i in stack), *self.base.shape[-2:]],
            strides and [*(strides[i] for i in stack), 1, 1],
        )
        return Flattened(base, self._view, sizes)

    def scannable(self) -> Any:
        """The matrices with axis 0 in front, if that is a stacked one."""
        if 0 not in self._view.stack(len(self._shape())):
            return NotImplemented
        base = self.base
        if is_weight(base):
            base = base.scannable()
            if base is NotImplemented:
                return NotImplemented
        return Flattened(base, self._view, self._shape())

    def _shape(self) -> tuple[int, ...]:
        """Of what it stands for, also where stacked axes have come or gone."""
        stack = list(self.base.shape[:-2])
        n = len(stack) + len(self._tail)
        tail = dict(zip((a % n for a in self._outer), self._tail, strict=True))
        return tuple(tail[i] if i in tail else stack.pop(0) for i in range(n))


def as_kernel(matrix: Any, view: MatrixView, shape: Sequence[int]) -> Any:
    """A matrix weight of shape stack + (in, out) as a kernel of that shape.

    Reshaped where the weight can be, and `Flattened` where not.
    """
    shape = tuple(shape)
    n = len(shape)
    stack = view.stack(n)
    order = (*stack, *(a % n for side in view for a in side))
    split = matrix.reshape(tuple(shape[a] for a in order))
    if split is not NotImplemented and is_weight(split):
        out = split.transpose(tuple(order.index(a) for a in range(n)))
        if out is not NotImplemented:
            return out
    return Flattened(matrix, view, shape)
