# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""The matrix view of a leaf: which axes are read, which written, which stacked.

Every matrix method (orthogonalisation, low-rank factors, quantisation by rows)
needs to see a leaf as a stack of matrices. Flax kernels have several input or
output axes, convolutions have spatial ones, scanned layers a leading one; the view
says which is which, in the way of `optax.contrib.MuonDimensionNumbers`.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import optax

from wlab.core._shapes import reshape_blocks


class MatrixView(NamedTuple):
    """The axes that a matrix reads from and writes to, counted from the right.

    Axes named in neither are stacked: layers, experts. Negative numbers stay true
    when leading axes come and go under vmap, scan and slicing.

    Examples:
        >>> MatrixView.of(1, 2)   # an attention query kernel (width, heads, head_dim)
        MatrixView(inputs=(-3,), outputs=(-2, -1))
    """

    inputs: tuple[int, ...]  # axes that are contracted with the layer's input
    outputs: tuple[int, ...]  # axes that the layer's output has

    @classmethod
    def of(cls, inputs: int, outputs: int) -> "MatrixView":
        """The common layout: stacked axes, then `inputs` axes, then `outputs`."""
        n = inputs + outputs
        return cls(tuple(range(-n, -outputs)), tuple(range(-outputs, 0)))

    def stack(self, ndim: int) -> tuple[int, ...]:
        """The stacked axes of an array with `ndim` axes, counted from the left."""
        named = {a % ndim for a in (*self.inputs, *self.outputs)}
        return tuple(a for a in range(ndim) if a not in named)

    def check(self, shape: tuple[int, ...], path: str = "") -> "MatrixView":
        """Raise unless every axis exists in `shape` and none is named twice."""
        ndim = len(shape)
        axes = (*self.inputs, *self.outputs)
        where = f"leaf {path!r} of shape {shape}" if path else f"shape {shape}"
        for a in axes:
            if not -ndim <= a < ndim:
                raise ValueError(
                    f"{where}: axis {a} of {self} does not exist; axes run from "
                    f"{-ndim} to {ndim - 1}"
                )
        if len({a % ndim for a in axes}) != len(axes):
            raise ValueError(f"{where}: {self} names an axis twice")
        if not self.inputs or not self.outputs:
            raise ValueError(f"{where}: {self} needs an input and an output axis")
        return MatrixView(*(tuple(a % ndim - ndim for a in side) for side in self))

    def transpose(self, permutation: tuple[int, ...]) -> "MatrixView":
        """The view of the array with its axes permuted."""
        n = len(permutation)
        where = {old: new for new, old in enumerate(permutation)}
        return MatrixView(*(tuple(where[a % n] - n for a in side) for side in self))

    def reshape(
        self, old: tuple[int, ...], new: tuple[int, ...]
    ) -> "MatrixView | None":
        """The view after a row-major reshape; None where it mixes the roles of axes."""
        blocks = reshape_blocks(old, new)
        if blocks is None or any(list(side) != sorted(side) for side in self):
            return None
        n = len(old)
        role = dict.fromkeys(range(n), -1)  # -1 for stacked, else the side
        role |= {a % n: side for side, axes in enumerate(self) for a in axes}
        sides: tuple[list[int], list[int]] = ([], [])
        for old_axes, new_axes in blocks:
            roles = {role[i] for i in old_axes if old[i] != 1}
            roles = roles or {role[i] for i in old_axes[:1]} or {-1}
            if len(roles) > 1:
                return None
            (side,) = roles
            if side >= 0:
                sides[side].extend(i - len(new) for i in new_axes)
        if not all(sides):
            return None
        return MatrixView(tuple(sides[0]), tuple(sides[1]))

    def to_optax(self) -> optax.contrib.MuonDimensionNumbers:
        """The same view as `optax.contrib.MuonDimensionNumbers`."""
        return optax.contrib.MuonDimensionNumbers(self.inputs, self.outputs)

    @classmethod
    def from_optax(
        cls, dims: optax.contrib.MuonDimensionNumbers, ndim: int
    ) -> "MatrixView":
        """The view that optax's dimension numbers say for an array of `ndim` axes."""

        def side(axes: int | Sequence[int]) -> tuple[int, ...]:
            axes = (axes,) if isinstance(axes, int) else tuple(axes)
            return tuple(a % ndim - ndim for a in axes)

        return cls(side(dims.reduction_axis), side(dims.output_axis))


class ProductAxes(NamedTuple):
    """How the other operand of a product is laid out for a stack of matrices."""

    forward: bool  # over the inputs; else over the outputs
    order: list[int]  # the operand's axes as stack, free ones, those that are summed
    places: list[int]  # where the axes of a result stack, free, made go as asked
    stack: list[int]  # the operand's axis for each stacked one of the weight
    outs: list[int]  # and for each output axis, if those are summed


def product_axes(
    view: MatrixView, ndim: int, other: int, dimension_numbers: Any, *, left: bool
) -> ProductAxes | None:
    """The axes of a product of a weight over one whole side of its view.

    Args:
        view: the weight's.
        ndim: the weight's number of axes.
        other: the other operand's.
        dimension_numbers: of `jax.lax.dot_general`.
        left: whether the weight is the left operand.

    Returns:
        None for a product over anything but all inputs or all outputs with the
        stacked axes as a batch.
    """
    contract, batch = dimension_numbers
    mine, its = (0, 1) if left else (1, 0)
    stack = view.stack(ndim)
    ins, outs = (tuple(a % ndim for a in side) for side in view)
    pairs = dict(zip(contract[mine], contract[its], strict=True))
    if tuple(sorted(batch[mine])) != stack or set(pairs) not in (set(ins), set(outs)):
        return None
    forward = set(pairs) == set(ins)
    taken, made = (ins, outs) if forward else (outs, ins)
    of_batch = dict(zip(batch[mine], batch[its], strict=True))
    free = [i for i in range(other) if i not in (*batch[its], *contract[its])]
    of_stack = [of_batch[i] for i in stack]
    b, f = len(stack), len(free)
    here = {i: b + f + k for k, i in enumerate(made)}
    own = [here[i] for i in range(ndim) if i in here]
    theirs = list(range(b, b + f))
    lead = [stack.index(i) for i in batch[mine]]
    return ProductAxes(
        forward,
        [*of_stack, *free, *(pairs[i] for i in taken)],
        [*lead, *own, *theirs] if left else [*lead, *theirs, *own],
        of_stack,
        [] if forward else [pairs[i] for i in outs],
    )


def as_matrices(x: jax.Array, view: MatrixView) -> jax.Array:
    """The leaf as a stack of matrices, of shape stack + (inputs, outputs)."""
    ndim = x.ndim
    stack = view.stack(ndim)
    ins, outs = (tuple(a % ndim for a in side) for side in view)
    x = x.transpose(*stack, *ins, *outs)
    lead = x.shape[: len(stack)]
    n_in = math.prod(x.shape[len(stack) : len(stack) + len(ins)])
    return x.reshape(*lead, n_in, -1)


def from_matrices(x: jax.Array, view: MatrixView, shape: tuple[int, ...]) -> jax.Array:
    """The inverse of `as_matrices`, for a leaf of that shape."""
    ndim = len(shape)
    order = (*view.stack(ndim), *(a % ndim for side in view for a in side))
    x = x.reshape([shape[a] for a in order])
    return x.transpose([order.index(a) for a in range(ndim)])
