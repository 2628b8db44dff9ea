# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Quantised activations in any model: a weight that quantises what it multiplies.

The model is not touched: its kernels are wrapped, and under `wlab.lift` each product
first rounds its input, with a scale for each row, and passes the gradient straight
through.
"""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
from jax import lax

from wlab.core import MatrixView, Select, Views, Weight, is_weight, map_with_path
from wlab.core._lift import cut, dispatch, specs_of
from wlab.quant._grid import Grid, get_grid
from wlab.quant._quantize import fake_quantize, quantizable
from wlab.quant._quantized import Quantized


class QuantizedInput(Weight):
    """A weight whose products see their other operand rounded to a grid.

    The other operand is rounded to nearest, with one scale for each of its rows: all
    axes but those contracted. As an array this is the inner weight.
    """

    inner: Any  # array or Weight
    grid: Grid = eqx.field(static=True)  # of the activations
    matrix_view: MatrixView | None = eqx.field(static=True)

    @property
    def view(self) -> MatrixView | None:
        """The axes read and written, if they are known."""
        return self.matrix_view

    def aval(self) -> jax.core.ShapedArray:
        """Shape and dtype, for jax."""
        return jax.core.ShapedArray(self.inner.shape, self.inner.dtype)

    def materialise(self) -> jax.Array:
        """The inner weight as an array; only products round activations."""
        inner = self.inner
        return inner.materialise() if isinstance(inner, Weight) else inner

    def specs(self, spec: jax.P) -> Any:
        """The inner weight's specs."""
        parts = jax.tree.leaves(specs_of(self.inner, spec))
        return jax.tree.unflatten(jax.tree.structure(self), parts)

    def dot_general(
        self, other: jax.Array, dimension_numbers: Any, *, left: bool, **params: Any
    ) -> jax.Array:
        """The inner weight's product with the rounded operand."""
        contract, _ = dimension_numbers
        summed = contract[1 if left else 0]
        own = tuple(i for i in range(other.ndim) if i not in summed)
        x = fake_quantize(other, self.grid, axis=own)
        operands = (self.inner, x) if left else (x, self.inner)
        return dispatch(
            lax.dot_general_p, *operands, dimension_numbers=dimension_numbers, **params
        )

    def conv_general_dilated(self, inputs: jax.Array, **params: Any) -> jax.Array:
        """The inner weight's convolution; a pixel's channels share a scale."""
        channels = params["dimension_numbers"].lhs_spec[1]
        own = tuple(i for i in range(inputs.ndim) if i != channels)
        x = fake_quantize(inputs, self.grid, axis=own)
        return dispatch(lax.conv_general_dilated_p, x, self.inner, **params)

    def gather(self, indices: jax.Array, **params: Any) -> Any:
        """The inner weight's look-up; there is no activation in it."""
        return dispatch(lax.gather_p, self.inner, indices, **params)

    def transpose(self, permutation: tuple[int, ...]) -> "QuantizedInput":
        """The inner weight transposed."""
        inner = dispatch(lax.transpose_p, self.inner, permutation=permutation)
        view = self.matrix_view
        return QuantizedInput(inner, self.grid, view and view.transpose(permutation))

    def reshape(self, shape: tuple[int, ...]) -> "QuantizedInput":
        """The inner weight reshaped."""
        inner = dispatch(
            lax.reshape_p, self.inner, new_sizes=shape, dimensions=None, sharding=None
        )
        view = self.matrix_view
        return QuantizedInput(
            inner, self.grid, view and view.reshape(self.shape, shape)
        )

    def convert_element_type(self, dtype: Any) -> "QuantizedInput":
        """The inner weight converted."""
        inner = dispatch(
            lax.convert_element_type_p,
            self.inner,
            new_dtype=dtype,
            weak_type=False,
            sharding=None,
        )
        return QuantizedInput(inner, self.grid, self.matrix_view)

    def slice(
        self,
        starts: Sequence[Any],
        sizes: Sequence[int],
        strides: Sequence[int] | None = None,
    ) -> "QuantizedInput":
        """A window of the inner weight."""
        inner = cut(self.inner, starts, sizes, strides)
        return QuantizedInput(inner, self.grid, self.matrix_view)

    def scannable(self) -> Any:
        """The inner weight with every array leading with axis 0."""
        inner = self.inner
        if isinstance(inner, Weight):
            inner = inner.scannable()
            if inner is NotImplemented:
                return NotImplemented
        return QuantizedInput(inner, self.grid, self.matrix_view)


def quantize_activations(
    params: Any,
    grid: str | Grid,
    *,
    select: Select | None = None,
    views: Views | None = None,
) -> Any:
    """Let a model round the inputs of its layers to a grid, row by row.

    Args:
        params: a parameter tree, packed or dense.
        grid: the grid of the activations, a `Grid` or its name.
        select: of which leaves the inputs are rounded, as in `quantize_tree`; None:
            those that are packed, or if none is, kernels of linear layers and
            convolutions.
        views: as in `quantize_tree`.

    Returns:
        The tree with wrapped leaves, for ``wlab.lift(model.apply)``. Gradients pass
        straight through the rounding.

    Raises:
        ValueError: as `quantize_tree` does.
        TypeError: as `quantize_tree` does.
    """
    grid = get_grid(grid)
    if select is None:
        leaves = jax.tree.leaves(params, is_leaf=is_weight)
        if any(isinstance(leaf, Quantized) for leaf in leaves):
            select = _is_packed
    chosen = quantizable(params, select, views)
    return map_with_path(
        lambda path, leaf: (
            QuantizedInput(leaf, grid, chosen[path]) if path in chosen else leaf
        ),
        params,
    )


def _is_packed(path: str, leaf: Any) -> bool:
    del path
    return isinstance(leaf, Quantized)
