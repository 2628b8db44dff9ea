# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""`LowRank`: a weight plus a sum of rank-one terms that is never formed.

Low-rank adapters, evolution's perturbations and low-rank corrections of a quantised
weight are all of this form. A product with it costs the product with the base plus
two skinny ones.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax

from wlab.core._lift import Weight, cut, dispatch, specs_of
from wlab.core._shapes import (
    gather_axis,
    gather_labels,
    single_axis_gather,
    window,
)
from wlab.core._view import MatrixView

# Terms that a product with a vector takes one by one.
_FEW = 8


class LowRank(Weight):
    """The array ``base + scale * sum_r a[..., r] b[..., r]``.

    Args:
        base: an array, another `Weight`, or None for zero; of shape
            stack + in + out.
        a: input factors, of shape stack + in + (r,).
        b: output factors, of shape stack + out + (r,).
        scale: a number, or an array of shape stack.
        stack: how many leading axes of the factors are stacked; needed only where
            `base` is None, since it otherwise follows from the shapes.

    The weight has the dtype of its base (of its factors if there is none). Sums are
    taken in float32 at least and rounded once, so that factors in float32 over a base
    in bfloat16 lose nothing before the last step.

    Raises:
        ValueError: if the shapes of base and factors do not fit together.

    Examples:
        >>> w = LowRank(jnp.zeros((3, 2)), jnp.ones((3, 1)), jnp.ones((2, 1)), 0.5)
        >>> w.shape, float(w.materialise().sum())
        ((3, 2), 3.0)
    """

    base: Any  # array or Weight of shape stack + in + out, or None
    a: jax.Array  # stack + in + (r,)
    b: jax.Array  # stack + out + (r,)
    scale: jax.Array  # () or stack
    _view: MatrixView = eqx.field(static=True)

    def __init__(
        self,
        base: Any,
        a: jax.Array,
        b: jax.Array,
        scale: Any = 1.0,
        *,
        stack: int | None = None,
    ):
        if base is not None:
            n_stack = a.ndim + b.ndim - 2 - base.ndim
            if stack is not None and stack != n_stack:
                raise ValueError(
                    f"LowRank: stack={stack}, but base {base.shape}, a {a.shape} and "
                    f"b {b.shape} have {n_stack} stacked axes"
                )
        else:
            n_stack = stack or 0
        n_in, n_out = a.ndim - 1 - n_stack, b.ndim - 1 - n_stack
        lead = a.shape[:n_stack]
        wanted = (*lead, *a.shape[n_stack:-1], *b.shape[n_stack:-1])
        if (
            min(n_stack, n_in - 1, n_out - 1) < 0
            or b.shape[:n_stack] != lead
            or a.shape[-1] != b.shape[-1]
            or (base is not None and tuple(base.shape) != wanted)
        ):
            shape = None if base is None else tuple(base.shape)
            raise ValueError(
                f"LowRank: base {shape}, a {a.shape} and b {b.shape} do not fit: a "
                "must be stack + in + (r,), b stack + out + (r,), base stack + in + out"
            )
        self.base = base
        self.a = a
        self.b = b
        self.scale = jnp.asarray(scale, None if hasattr(scale, "dtype") else float)
        self._view = MatrixView.of(n_in, n_out)

    @classmethod
    def _make(
        cls, base: Any, a: jax.Array, b: jax.Array, scale: Any, view: MatrixView
    ) -> "LowRank":
        """A weight with any view; the factors keep their stacked axes in front."""
        new = object.__new__(cls)
        for name, value in zip(
            ("base", "a", "b", "scale", "_view"), (base, a, b, scale, view), strict=True
        ):
            object.__setattr__(new, name, value)
        return new

    @property
    def view(self) -> MatrixView:
        """The axes read and written, counted from the right."""
        return self._view

    @property
    def rank(self) -> int:
        """The number of rank-one terms."""
        return self.a.shape[-1]

    def aval(self) -> jax.core.ShapedArray:
        """Shape and dtype, for jax."""
        if self.base is not None:
            return jax.core.ShapedArray(self.base.shape, self.base.dtype)
        stack, ins, outs = self._axes()
        sizes = dict(zip((*stack, *ins), self.a.shape[:-1], strict=True))
        sizes |= dict(zip((*stack, *outs), self.b.shape[:-1], strict=True))
        shape = tuple(sizes[i] for i in range(len(sizes)))
        return jax.core.ShapedArray(shape, jnp.result_type(self.a, self.b))

    def materialise(self) -> jax.Array:
        """The dense array, summed in float32 and rounded once."""
        stack, ins, outs = self._axes()
        acc = _accumulator(self.a.dtype, self.b.dtype)
        dense = jnp.einsum(
            self.a.astype(acc),
            [*stack, *ins, self._ndim],
            self._scaled_b(acc),
            [*stack, *outs, self._ndim],
            list(range(self._ndim)),
            precision=lax.Precision.HIGHEST,
        )
        if self.base is None:
            return dense.astype(self.dtype)
        base = self.base.materialise() if isinstance(self.base, Weight) else self.base
        return (base.astype(acc) + dense).astype(self.dtype)

    def specs(self, spec: jax.P) -> "LowRank":
        """The base as the weight itself; each factor over the axes it shares with it.

        The terms, the factors' last axis, stay whole.
        """
        stack, ins, outs = self._axes()
        entries = dict(enumerate(spec))
        a, b, scale = (
            jax.P(*(entries.get(i) for i in axes))
            for axes in ([*stack, *ins], [*stack, *outs], stack[: self.scale.ndim])
        )
        base = [] if self.base is None else jax.tree.leaves(specs_of(self.base, spec))
        return jax.tree.unflatten(jax.tree.structure(self), [*base, a, b, scale])

    # --- cheaper ways ----------------------------------------------------------

    def dot_general(
        self,
        other: jax.Array,
        dimension_numbers: Any,
        *,
        left: bool,
        precision: Any = None,
        preferred_element_type: Any = None,
        out_sharding: Any = None,
        **params: Any,
    ) -> jax.Array:
        """The base's product plus two skinny ones; any axes may be contracted."""
        contract, batch = dimension_numbers
        mine, its = (0, 1) if left else (1, 0)
        n = self._ndim
        # Own axes are labelled 0..n-1, the rank n, the other's free axes above it.
        labels = list(range(n + 1, n + 1 + other.ndim))
        for pairs in (contract, batch):
            for i, j in zip(pairs[its], pairs[mine], strict=True):
                labels[i] = j
        summed = set(contract[mine])
        free = [i for i in range(n) if i not in summed and i not in batch[mine]]
        other_free = [label for label in labels if label > n]
        sides = (free, other_free) if left else (other_free, free)
        out = [*batch[mine], *sides[0], *sides[1]]

        dtype = preferred_element_type or jnp.promote_types(other.dtype, self.dtype)
        acc = _accumulator(dtype)
        delta = self._product(other, labels, out, precision, acc, out_sharding)
        if self.base is None:
            return delta.astype(dtype)
        main = dispatch(
            lax.dot_general_p,
            *((self.base, other) if left else (other, self.base)),
            dimension_numbers=dimension_numbers,
            precision=precision,
            preferred_element_type=acc,
            out_sharding=out_sharding,
            **params,
        )
        return (main + delta).astype(dtype)

    def conv_general_dilated(
        self,
        inputs: jax.Array,
        *,
        dimension_numbers: Any = None,
        feature_group_count: int = 1,
        batch_group_count: int = 1,
        precision: Any = None,
        preferred_element_type: Any = None,
        **params: Any,
    ) -> Any:
        """A convolution into r channels, then a product with `b`."""
        stack, ins, outs = self._axes()
        out_channel = dimension_numbers.rhs_spec[0]
        grouped = feature_group_count != 1 or batch_group_count != 1
        if stack or outs != (out_channel,) or list(ins) != sorted(ins) or grouped:
            return NotImplemented
        dtype = preferred_element_type or jnp.promote_types(inputs.dtype, self.dtype)
        acc = _accumulator(dtype)

        def conv(kernel: Any) -> jax.Array:
            return dispatch(
                lax.conv_general_dilated_p,
                inputs,
                kernel,
                dimension_numbers=dimension_numbers,
                feature_group_count=1,
                batch_group_count=1,
                precision=precision,
                preferred_element_type=acc,
                **params,
            )

        compute = jnp.promote_types(inputs.dtype, self.a.dtype)
        if compute != inputs.dtype:
            inputs = inputs.astype(compute)
        channels = dimension_numbers.out_spec[1]
        a = jnp.moveaxis(self.a.astype(compute), -1, out_channel)
        hidden = jnp.moveaxis(conv(a), channels, -1)
        delta = jnp.matmul(
            hidden, self._scaled_b(acc).T, precision=precision
        )  # [..., out]
        delta = jnp.moveaxis(delta, -1, channels)
        if self.base is None:
            return delta.astype(dtype)
        base = self.base
        if base.dtype != inputs.dtype:
            base = dispatch(
                lax.convert_element_type_p,
                base,
                new_dtype=inputs.dtype,
                weak_type=False,
                sharding=None,
            )
        return (conv(base) + delta).astype(dtype)

    def gather(self, indices: jax.Array, **params: Any) -> Any:
        """Whole slices along one axis: an embedding's rows."""
        axis = single_axis_gather(self.shape, params)
        if axis is None:
            return NotImplemented
        stack, ins, outs = self._axes()
        acc = _accumulator(self.a.dtype, self.b.dtype)
        n = self._ndim
        batch = [n + 1 + i for i in range(indices.ndim - 1)]

        def take(factor: jax.Array, axes: list[int]) -> tuple[jax.Array, list[int]]:
            labels = [*axes, n]
            if axis not in axes:
                return factor, labels
            taken = gather_axis(factor, indices, axes.index(axis), params)
            return taken, [*batch, *(i for i in labels if i != axis)]

        a, a_labels = take(self.a.astype(acc), [*stack, *ins])
        if self.scale.ndim:
            b, b_labels = take(self._scaled_b(acc), [*stack, *outs])
        else:
            # A row of the input side has few numbers: the scale goes there.
            a = a * self.scale.astype(acc)
            b, b_labels = take(self.b.astype(acc), [*stack, *outs])
        out = gather_labels([i for i in range(n) if i != axis], batch, params)
        delta = jnp.einsum(a, a_labels, b, b_labels, out)
        if self.base is None:
            return delta.astype(self.dtype)
        main = dispatch(lax.gather_p, self.base, indices, **params)
        return (main.astype(acc) + delta).astype(self.dtype)

    def transpose(self, permutation: tuple[int, ...]) -> "LowRank":
        """The base transposed; the factors only change their places."""
        where = {old: new for new, old in enumerate(permutation)}
        stack, _, _ = self._axes()
        order = sorted(range(len(stack)), key=lambda i: where[stack[i]])

        def restack(x: jax.Array) -> jax.Array:
            if order == sorted(order) or x.ndim < len(order):
                return x
            return x.transpose(*order, *range(len(order), x.ndim))

        base = self.base
        if base is not None:
            base = dispatch(lax.transpose_p, base, permutation=tuple(permutation))
        a, b, scale = restack(self.a), restack(self.b), restack(self.scale)
        view = self._view.transpose(permutation)
        return LowRank._make(base, a, b, scale, view)

    def reshape(self, shape: tuple[int, ...]) -> Any:
        """Exact where axes are split or merged within stack, in or out."""
        view = self._view.reshape(self.shape, shape)
        if view is None:
            return NotImplemented
        n = len(shape)
        stack, ins, outs = (
            tuple(shape[i] for i in axes)
            for axes in (view.stack(n), view.inputs, view.outputs)
        )
        base = self.base
        if base is not None:
            base = dispatch(
                lax.reshape_p, base, new_sizes=shape, dimensions=None, sharding=None
            )
        scale = self.scale.reshape(stack) if self.scale.ndim else self.scale
        a = self.a.reshape(*stack, *ins, self.rank)
        b = self.b.reshape(*stack, *outs, self.rank)
        return LowRank._make(base, a, b, scale, view)

    def convert_element_type(self, dtype: Any) -> Any:
        """Base and factors each converted: the sum is then rounded only once."""
        if not jnp.issubdtype(dtype, jnp.floating):
            return NotImplemented
        base = self.base
        if base is not None:
            base = dispatch(
                lax.convert_element_type_p,
                base,
                new_dtype=dtype,
                weak_type=False,
                sharding=None,
            )
        a, b = self.a.astype(dtype), self.b.astype(dtype)
        return LowRank._make(base, a, b, self.scale, self._view)

    def slice(
        self,
        starts: Sequence[Any],
        sizes: Sequence[int],
        strides: Sequence[int] | None = None,
    ) -> "LowRank":
        """A window of the base and of each factor."""
        stack, ins, outs = self._axes()

        def part(x: jax.Array, axes: Sequence[int]) -> jax.Array:
            extra = x.shape[len(axes) :]
            return window(
                x,
                [*(starts[i] for i in axes), *(0 for _ in extra)],
                [*(sizes[i] for i in axes), *extra],
                strides and [*(strides[i] for i in axes), *(1 for _ in extra)],
            )

        base = self.base
        if base is not None:
            base = cut(base, starts, sizes, strides)
        return LowRank._make(
            base,
            part(self.a, (*stack, *ins)),
            part(self.b, (*stack, *outs)),
            part(self.scale, stack) if self.scale.ndim else self.scale,
            self._view,
        )

    def scannable(self) -> Any:
        """Every array with axis 0 in front, if axis 0 is a stacked one."""
        stack, _, _ = self._axes()
        if 0 not in stack:
            return NotImplemented
        base = self.base
        if isinstance(base, Weight):
            base = base.scannable()
            if base is NotImplemented:
                return NotImplemented
        scale = jnp.broadcast_to(self.scale, self.a.shape[: len(stack)])
        return LowRank._make(base, self.a, self.b, scale, self._view)

    # --- inside ----------------------------------------------------------------

    @property
    def _ndim(self) -> int:
        sides = len(self._view.inputs) + len(self._view.outputs)
        return self.a.ndim - 1 - len(self._view.inputs) + sides

    def _axes(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Stacked, input and output axes, counted from the left."""
        n = self._ndim
        view = self._view
        ins, outs = (tuple(a % n for a in side) for side in view)
        return view.stack(n), ins, outs

    def _scaled_b(self, dtype: Any) -> jax.Array:
        scale = self.scale.astype(dtype)
        extra = self.b.ndim - scale.ndim
        return self.b.astype(dtype) * scale.reshape(*scale.shape, *(1,) * extra)

    def _product(
        self,
        x: jax.Array,
        labels: list[int],
        out: list[int],
        precision: Any,
        acc: Any,
        out_sharding: Any,
    ) -> jax.Array:
        """Contract `x` with one factor, then with the other, never the two alone."""
        stack, ins, outs = self._axes()
        rank = self._ndim
        compute = jnp.promote_types(x.dtype, self.a.dtype)
        x = x.astype(compute)
        first, second = (self.a, [*stack, *ins]), (self.b, [*stack, *outs])
        if not set(labels) & set(ins) and set(labels) & set(outs):
            first, second = second, first
        keep = set(out) | set(second[1])
        middle = [
            label for label in dict.fromkeys((*labels, *first[1])) if label in keep
        ]

        def product(first_factor: jax.Array, second_factor: jax.Array, r: Any) -> Any:
            """The product with some of the terms; `r` is their label, if any."""
            hidden = jnp.einsum(
                x,
                labels,
                first_factor.astype(compute),
                [*first[1], *r],
                [*middle, *r],
                precision=precision,
                preferred_element_type=acc,
                out_sharding=_explicit_sharding(
                    [*middle, *r], (x, labels), (first_factor, [*first[1], *r])
                ),
            )
            # The scale goes where the fewest numbers are.
            hidden = hidden * self._aligned_scale([*middle, *r], acc)
            return jnp.einsum(
                hidden.astype(compute),
                [*middle, *r],
                second_factor.astype(compute),
                [*second[1], *r],
                out,
                precision=precision,
                preferred_element_type=acc,
                out_sharding=out_sharding,
            )

        rows = math.prod(
            n for n, i in zip(x.shape, labels, strict=True) if i not in first[1]
        )
        if rows == 1 and self.rank <= _FEW:
            # Sums of products, which fuse: as small matrix products, one for each
            # member of a vmap, they would cost more than all the rest.
            terms = [
                product(first[0][..., i], second[0][..., i], ())
                for i in range(self.rank)
            ]
            return functools.reduce(jnp.add, terms)
        return product(first[0], second[0], (rank,))

    def _aligned_scale(self, labels: list[int], dtype: Any) -> jax.Array:
        """The scale, to be multiplied with an array of these axes."""
        scale = self.scale.astype(dtype)
        if not scale.ndim:
            return scale
        stack, _, _ = self._axes()
        order = sorted(range(scale.ndim), key=lambda i: labels.index(stack[i]))
        shape = [1] * len(labels)
        for i in order:
            shape[labels.index(stack[i])] = scale.shape[i]
        return scale.transpose(order).reshape(shape)


def _accumulator(*dtypes: Any) -> Any:
    """The dtype in which sums are taken: float32, or wider if the operands are."""
    return jnp.promote_types(jnp.float32, jnp.result_type(*dtypes))


def _explicit_sharding(
    out: list[int], *operands: tuple[jax.Array, list[int]]
) -> jax.sharding.NamedSharding | None:
    """How a contraction's result is sharded when the mesh axes are Explicit.

    Each axis keeps the mesh axes of the operand it comes from; contracted ones are
    summed over. None where there is nothing to say (no mesh, or Auto axes).
    """
    spec_of: dict[int, Any] = {}
    mesh = None
    for x, labels in operands:
        sharding = jax.typeof(x).sharding
        if sharding.mesh.empty or sharding.mesh.are_all_axes_auto:
            continue
        mesh = sharding.mesh
        for label, spec in zip(labels, sharding.spec, strict=True):
            spec_of[label] = spec_of.get(label) or spec
    if mesh is None:
        return None
    used: set[str] = set()
    specs = []
    for label in out:
        spec = spec_of.get(label)
        names = {spec} if isinstance(spec, str) else set(spec or ())
        specs.append(None if names & used else spec)
        used |= names
    return jax.sharding.NamedSharding(mesh, jax.P(*specs))
