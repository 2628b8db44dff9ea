# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""`Perturbed`: a weight plus low-rank noise that is drawn where it is used.

What is stored is a key for each stacked layer. Under `jax.vmap` over members the base
stays one array for all of them, and under a scan over layers only the factors of the
current layer exist.
"""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax

from wlab.core import LowRank, MatrixView, Weight
from wlab.core._lift import dispatch, specs_of
from wlab.es._noise import Noise, draw_factors


class Perturbed(Weight):
    """The array ``base + scale * sum_r a[..., r] b[..., r]``, a and b drawn from keys.

    Every operation is that of the `LowRank` with these factors.
    """

    base: Any  # array or Weight
    key_data: jax.Array  # uint32, stack + (words of a key,)
    scale: jax.Array  # () or stack
    rank: int = eqx.field(static=True)
    matrix_view: MatrixView = eqx.field(static=True)
    noise: Noise = eqx.field(static=True)
    noise_dtype: Any = eqx.field(static=True)
    impl: Any = eqx.field(static=True)  # of the keys

    @property
    def view(self) -> MatrixView:
        """The axes read and written, counted from the right."""
        return self.matrix_view

    def aval(self) -> jax.core.ShapedArray:
        """Shape and dtype, for jax."""
        return jax.core.ShapedArray(self.base.shape, self.base.dtype)

    def low_rank(self) -> LowRank:
        """The same weight with its factors drawn."""
        keys = jax.random.wrap_key_data(self.key_data, impl=self.impl)
        shape, view = tuple(self.base.shape), self.matrix_view
        a, b = drawn_factors(keys, shape, view, self.rank, self.noise_dtype, self.noise)
        return LowRank._make(self.base, a, b, self.scale, view)

    def materialise(self) -> jax.Array:
        """The dense array, summed in float32 and rounded once."""
        return self.low_rank().materialise()

    def specs(self, spec: jax.P) -> "Perturbed":
        """The base as the weight itself; keys and scale are copied."""
        base = jax.tree.leaves(specs_of(self.base, spec))
        rest = [jax.P(), jax.P()]
        return jax.tree.unflatten(jax.tree.structure(self), [*base, *rest])

    def dot_general(
        self, other: jax.Array, dimension_numbers: Any, *, left: bool, **params: Any
    ) -> Any:
        """The base's product plus two skinny ones."""
        return self.low_rank().dot_general(
            other, dimension_numbers, left=left, **params
        )

    def conv_general_dilated(self, inputs: jax.Array, **params: Any) -> Any:
        """A convolution into r channels, then a product."""
        return self.low_rank().conv_general_dilated(inputs, **params)

    def gather(self, indices: jax.Array, **params: Any) -> Any:
        """Whole slices along one axis: an embedding's rows."""
        return self.low_rank().gather(indices, **params)

    def transpose(self, permutation: tuple[int, ...]) -> Any:
        """The base transposed, with the factors drawn."""
        return self.low_rank().transpose(permutation)

    def reshape(self, shape: tuple[int, ...]) -> Any:
        """As `LowRank` reshapes, with the factors drawn."""
        return self.low_rank().reshape(shape)

    def slice(self, starts: Any, sizes: Any, strides: Any = None) -> Any:
        """A window of the base and of the drawn factors."""
        return self.low_rank().slice(starts, sizes, strides)

    def convert_element_type(self, dtype: Any) -> Any:
        """The base converted; the noise stays as it was drawn."""
        if not jnp.issubdtype(dtype, jnp.floating):
            return NotImplemented
        base = dispatch(
            lax.convert_element_type_p,
            self.base,
            new_dtype=dtype,
            weak_type=False,
            sharding=None,
        )
        return self._with(base, self.scale)

    def scannable(self) -> Any:
        """Every array with axis 0 in front, if axis 0 is a stacked one."""
        stack = self.matrix_view.stack(len(self.base.shape))
        if 0 not in stack:
            return NotImplemented
        base = self.base
        if isinstance(base, Weight):
            base = base.scannable()
            if base is NotImplemented:
                return NotImplemented
        return self._with(base, jnp.broadcast_to(self.scale, self.key_data.shape[:-1]))

    def _with(self, base: Any, scale: jax.Array) -> "Perturbed":
        return Perturbed(
            base,
            self.key_data,
            scale,
            self.rank,
            self.matrix_view,
            self.noise,
            self.noise_dtype,
            self.impl,
        )


def drawn_factors(
    keys: jax.Array,
    shape: tuple[int, ...],
    view: MatrixView,
    rank: int,
    dtype: Any,
    kind: Noise,
) -> tuple[jax.Array, jax.Array]:
    """The factors of a leaf's noise, shaped stack + in + (r,) and stack + out + (r,).

    Args:
        keys: typed keys of the shape of the stacked axes.
        shape: of the leaf.
        view: its input and output axes.
        rank: number of terms.
        dtype: of the factors.
        kind: as in `draw_factors`.
    """
    ins, outs = (tuple(shape[i] for i in side) for side in view)
    n_in, n_out = math.prod(ins), math.prod(outs)

    def one(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        return draw_factors(
            key, n_in, n_out, rank, dtype, kind, outputs_first=outputs_first(view)
        )

    stack = keys.shape
    a, b = jax.vmap(one)(keys.reshape(-1)) if stack else one(keys)
    return a.reshape(*stack, *ins, rank), b.reshape(*stack, *outs, rank)


def outputs_first(view: MatrixView) -> bool:
    """Whether a leaf's output axes come before its input axes."""
    return view.outputs[0] < view.inputs[0]
