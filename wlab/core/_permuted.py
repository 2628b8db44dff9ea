# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""`Permuted`: a matrix whose input channels are stored in another order."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from wlab.core import _linalg as linalg
from wlab.core._lift import Weight, cut, dispatch, is_weight, specs_of
from wlab.core._shapes import window
from wlab.core._view import MatrixView, product_axes


class Permuted(Weight):
    """The matrix ``w`` with ``base[k] = w[order[k]]``, or a stack of such.

    Quantisers that take channels by their activity, in groups with a scale, store them
    so: a product gathers the other operand's channels once, and uses the base.

    Args:
        base: an array or another `Weight`, stack + (in, out).
        order: int32, stack + (in,): each row is a permutation.

    Raises:
        ValueError: if these do not fit together.

    Examples:
        >>> w = Permuted(jnp.array([[1.0], [2.0]]), jnp.array([1, 0]))
        >>> print(w.materialise())
        [[2.]
         [1.]]
    """

    base: Any
    order: jax.Array

    def __init__(self, base: Any, order: jax.Array):
        if base.ndim < 2 or tuple(order.shape) != tuple(base.shape[:-1]):
            raise ValueError(
                f"Permuted: an order of shape {tuple(order.shape)} does not fit a base "
                f"of shape {tuple(base.shape)}: the order is stack + (in,), the base "
                "stack + (in, out)"
            )
        self.base = base
        self.order = order

    @property
    def view(self) -> MatrixView:
        """The last two axes."""
        return MatrixView.of(1, 1)

    def aval(self) -> jax.core.ShapedArray:
        """Shape and dtype, for jax."""
        return jax.core.ShapedArray(self.base.shape, self.base.dtype)

    def materialise(self) -> jax.Array:
        """The dense array: the base's rows at their places."""
        dense = self.base.materialise() if is_weight(self.base) else self.base

        def placed(dense: jax.Array, order: jax.Array) -> jax.Array:
            return jnp.take_along_axis(dense, jnp.argsort(order, -1)[..., None], -2)

        return linalg.sharding_safe(placed, whole=(-2,))(dense, self.order)

    def specs(self, spec: jax.P) -> "Permuted":
        """The base as the weight itself; the order along the stacked axes."""
        entries = [*spec, *[None] * (self.ndim - len(spec))]
        base = jax.tree.leaves(specs_of(self.base, spec))
        leaves = [*base, jax.P(*entries[:-2], None)]
        return jax.tree.unflatten(jax.tree.structure(self), leaves)

    # --- cheaper ways ----------------------------------------------------------

    def dot_general(
        self, other: jax.Array, dimension_numbers: Any, *, left: bool, **params: Any
    ) -> Any:
        """The base's product, with the other operand or the result put in order.

        For products over the inputs or the outputs, with the stacked axes as a batch.
        """
        n = self.ndim
        found = product_axes(self.view, n, other.ndim, dimension_numbers, left=left)
        mesh = jax.typeof(other).sharding.mesh
        if (
            found is None
            or params.pop("out_sharding", None) is not None
            or not (mesh.empty or mesh.are_all_axes_auto)
        ):
            return NotImplemented
        stack = tuple(range(n - 2))

        def gathered(x: jax.Array, order: jax.Array) -> jax.Array:
            return jnp.take(x, order, axis=-1, mode="clip")

        for _ in stack:
            gathered = jax.vmap(gathered)
        x = other.transpose(found.order)
        if found.forward:
            x = gathered(x, self.order)
        mine = n - 2 if found.forward else n - 1
        out = dispatch(
            lax.dot_general_p,
            x,
            self.base,
            dimension_numbers=(((x.ndim - 1,), (mine,)), (stack, stack)),
            out_sharding=None,
            **params,
        )
        if not found.forward:
            out = gathered(out, jnp.argsort(self.order, -1))
        return out.transpose(found.places)

    def reshape(self, shape: tuple[int, ...]) -> Any:
        """Exact where stacked axes are split or merged."""
        if len(shape) < 2 or shape[-2:] != self.shape[-2:]:
            return NotImplemented
        base = dispatch(
            lax.reshape_p, self.base, new_sizes=shape, dimensions=None, sharding=None
        )
        return Permuted(base, self.order.reshape(shape[:-1]))

    def convert_element_type(self, dtype: Any) -> Any:
        """The base in another dtype."""
        if not jnp.issubdtype(dtype, jnp.floating):
            return NotImplemented
        base = dispatch(
            lax.convert_element_type_p,
            self.base,
            new_dtype=dtype,
            weak_type=False,
            sharding=None,
        )
        return Permuted(base, self.order)

    def slice(
        self,
        starts: Sequence[Any],
        sizes: Sequence[int],
        strides: Sequence[int] | None = None,
    ) -> Any:
        """A window of the stacked axes, and of the outputs."""
        if sizes[-2] != self.shape[-2]:
            return NotImplemented
        base = cut(self.base, starts, sizes, strides)
        order = window(
            self.order,
            starts[:-1],
            sizes[:-1],
            None if strides is None else strides[:-1],
        )
        return Permuted(base, order)

    def scannable(self) -> Any:
        """Every array with axis 0 in front, if axis 0 is a stacked one."""
        if self.ndim < 3:
            return NotImplemented
        base = self.base.scannable() if is_weight(self.base) else self.base
        return base if base is NotImplemented else Permuted(base, self.order)
