# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""`Operator`: a weight plus a linear map that is known by how it acts.

Folding, permuting, wavelets, tensor networks: such a map costs less to apply than its
matrix does to form. Its transpose is what jax makes of it.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax

from wlab.core._lift import Weight, cut, dispatch, specs_of
from wlab.core._lowrank import _accumulator
from wlab.core._shapes import window
from wlab.core._view import MatrixView, from_matrices, product_axes


class Action(Protocol):
    """How a map acts on vectors; hashable, since it is part of a tree's structure."""

    def __call__(self, parts: Any, shared: Any, x: jax.Array, /) -> jax.Array:
        """The map of `x` [..., n_in], linear in it: [..., n_out]."""
        ...

    def dense(self, parts: Any, shared: Any, n_in: int, n_out: int, /) -> jax.Array:
        """The matrix of the map, [n_in, n_out]."""
        ...


class Operator(Weight):
    """The array ``gain * (base + scale * M)`` with a matrix M known by its action.

    Args:
        base: an array or another `Weight`.
        action: how M acts, or None for none.
        parts: arrays that the action reads, each with the stacked axes in front.
        shared: arrays that it reads without them. A scan over the stacked axes has
            to copy these for each of its steps.
        scale: a number, or an array of shape stack.
        gain: factors of the outputs, of shape stack + (n_out,), or None.
        view: the input and output axes of `base`; each side is flattened, in order,
            before the action sees it.

    The weight has the dtype of its base; sums are taken in float32 at least and
    rounded once.
    """

    base: Any  # array or Weight
    parts: Any  # pytree of arrays, stack + whatever the action reads
    shared: Any  # pytree of arrays, without stack
    scale: jax.Array  # () or stack
    gain: Any  # stack + (n_out,), or None
    action: Action | None = eqx.field(static=True)
    _view: MatrixView = eqx.field(static=True)

    def __init__(
        self,
        base: Any,
        action: Action | None,
        parts: Any,
        *,
        view: MatrixView,
        shared: Any = (),
        scale: Any = 1.0,
        gain: jax.Array | None = None,
    ):
        self.base = base
        self.action = action
        self.parts = parts
        self.shared = shared
        self.scale = jnp.asarray(scale, None if hasattr(scale, "dtype") else float)
        self.gain = gain
        self._view = view

    def _with(self, **changes: Any) -> "Operator":
        fields: dict[str, Any] = {
            "base": self.base,
            "action": self.action,
            "parts": self.parts,
            "shared": self.shared,
            "view": self._view,
            "scale": self.scale,
            "gain": self.gain,
        }
        return type(self)(**(fields | changes))

    @property
    def view(self) -> MatrixView:
        """The axes read and written, counted from the right."""
        return self._view

    def aval(self) -> jax.core.ShapedArray:
        """Shape and dtype, for jax."""
        return jax.core.ShapedArray(self.base.shape, self.base.dtype)

    def materialise(self) -> jax.Array:
        """The dense array, summed in float32 and rounded once."""
        shape = tuple(self.base.shape)
        stack, n_in, n_out = self._sizes()
        acc = _accumulator(self.base.dtype, *self._dtypes())
        base = self.base
        if isinstance(base, Weight):
            # Wide before it is made dense, or it would be rounded twice.
            wide = base.convert_element_type(acc)
            base = base.materialise() if wide is NotImplemented else wide.materialise()
        dense = base.astype(acc)
        if self.action is not None:
            action, shared = self.action, self.shared

            def one(parts: Any) -> jax.Array:
                return action.dense(parts, shared, n_in, n_out)

            delta = _over_stack(one, len(stack))(self.parts).astype(acc)
            scale = self.scale.astype(acc)
            delta = delta * scale.reshape(
                *scale.shape, *(1,) * (delta.ndim - scale.ndim)
            )
            dense = dense + from_matrices(delta, self._view, shape)
        if self.gain is not None:
            dense = dense * self._aligned_gain(len(shape)).astype(acc)
        return dense.astype(self.dtype)

    def specs(self, spec: jax.P) -> "Operator":
        """The base as the weight itself; everything else over the stacked axes only."""
        stack = self._view.stack(len(self.base.shape))
        entries = dict(enumerate(spec))
        lead = jax.P(*(entries.get(i) for i in stack))

        def rest(x: Any) -> jax.P:
            return lead if x.ndim else jax.P()

        return jax.tree.unflatten(
            jax.tree.structure(self),
            [
                *jax.tree.leaves(specs_of(self.base, spec)),
                *(rest(x) for x in jax.tree.leaves(self.parts)),
                *(jax.P() for _ in jax.tree.leaves(self.shared)),
                *(rest(x) for x in jax.tree.leaves((self.scale, self.gain))),
            ],
        )

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
    ) -> Any:
        """The base's product plus the action on the other operand.

        For products over all input axes or all output axes, with the stacked axes as
        a batch; others see the dense value.
        """
        n = len(self.base.shape)
        found = product_axes(self._view, n, other.ndim, dimension_numbers, left=left)
        if found is None:
            return NotImplemented
        forward, order, places, of_stack, of_outs = found
        stack = self._view.stack(n)
        ins, outs = (tuple(a % n for a in side) for side in self._view)
        made = outs if forward else ins
        b, f = len(stack), other.ndim - len(stack) - len(dimension_numbers[0][0])
        dtype = preferred_element_type or jnp.promote_types(other.dtype, self.dtype)
        acc = _accumulator(dtype)
        gain = self.gain

        def act(known: Any, x: jax.Array) -> jax.Array:
            parts, shared, scale, gain = known
            flat = x.astype(jnp.promote_types(x.dtype, jnp.float32)).transpose(order)
            flat = flat.reshape(*flat.shape[: b + f], -1)
            if gain is not None and not forward:
                flat = flat * _spread(gain, b, f)
            fn = self._act(forward)
            y = _over_stack(lambda p, x: fn(p, shared, x), b)(parts, flat).astype(acc)
            y = y * _spread(scale.astype(acc), b, f + 1)
            y = y.reshape(*y.shape[: b + f], *(self.base.shape[i] for i in made))
            return y.transpose(places)

        def scaled(x: jax.Array, axes: Sequence[int], at: Sequence[int]) -> jax.Array:
            """`x` times the gain, whose output axes stand at `at`."""
            shape = [1] * x.ndim
            for i, j in zip((*stack, *outs), (*axes, *at), strict=True):
                shape[j] = self.base.shape[i]
            order = [k for _, k in sorted((j, k) for k, j in enumerate((*axes, *at)))]
            g = gain.reshape([self.base.shape[i] for i in (*stack, *outs)])
            return x * g.transpose(order).reshape(shape).astype(acc)

        operand = other
        if gain is not None and not forward:
            operand = scaled(other.astype(acc), of_stack, of_outs).astype(other.dtype)
        operands = (self.base, operand) if left else (operand, self.base)
        out = dispatch(
            lax.dot_general_p,
            *operands,
            dimension_numbers=dimension_numbers,
            precision=precision,
            preferred_element_type=acc,
            out_sharding=out_sharding,
            **params,
        )
        if self.action is not None:
            with jax.default_matmul_precision(_name(precision)):
                known = (self.parts, self.shared, self.scale, gain)
                delta = _under_mesh(act, out)(known, other)
            out = out + delta
        if gain is not None and forward:
            back = {place: k for k, place in enumerate(places)}
            at = [back[b + f + k] for k in range(len(outs))]
            out = scaled(out, [back[k] for k in range(b)], at)
        return out.astype(dtype)

    def transpose(self, permutation: tuple[int, ...]) -> Any:
        """The base transposed; parts, which see flattened sides, stay."""
        n = len(permutation)
        where = {old: new for new, old in enumerate(permutation)}
        moved = [where[i] for i in self._view.stack(n)]
        if moved != sorted(moved):
            return NotImplemented
        base = dispatch(lax.transpose_p, self.base, permutation=tuple(permutation))
        return self._with(base=base, view=self._view.transpose(permutation))

    def reshape(self, shape: tuple[int, ...]) -> Any:
        """Exact where axes are split or merged within stack, in or out."""
        old = tuple(self.base.shape)
        view = self._view.reshape(old, shape)
        if view is None:
            return NotImplemented
        before = len(self._view.stack(len(old)))
        stack = tuple(shape[i] for i in view.stack(len(shape)))

        def restack(x: jax.Array) -> jax.Array:
            return x.reshape(*stack, *x.shape[before:]) if x.ndim >= before else x

        base = dispatch(
            lax.reshape_p, self.base, new_sizes=shape, dimensions=None, sharding=None
        )
        return self._map(restack)._with(base=base, view=view)

    def convert_element_type(self, dtype: Any) -> Any:
        """The base converted; the rest stays as precise as it is."""
        if not jnp.issubdtype(dtype, jnp.floating):
            return NotImplemented
        base = dispatch(
            lax.convert_element_type_p,
            self.base,
            new_dtype=dtype,
            weak_type=False,
            sharding=None,
        )
        return self._with(base=base)

    def slice(
        self,
        starts: Sequence[Any],
        sizes: Sequence[int],
        strides: Sequence[int] | None = None,
    ) -> Any:
        """A window of the stacked axes."""
        n = len(self.base.shape)
        stack = self._view.stack(n)
        if any(sizes[i] != self.base.shape[i] for i in range(n) if i not in stack):
            return NotImplemented

        def part(x: jax.Array) -> jax.Array:
            if not x.ndim:
                return x
            rest = x.shape[len(stack) :]
            return window(
                x,
                [*(starts[i] for i in stack), *(0 for _ in rest)],
                [*(sizes[i] for i in stack), *rest],
                strides and [*(strides[i] for i in stack), *(1 for _ in rest)],
            )

        return self._map(part)._with(base=cut(self.base, starts, sizes, strides))

    def scannable(self) -> Any:
        """Every array with axis 0 in front, if axis 0 is a stacked one."""
        stack, _, _ = self._sizes()
        if 0 not in self._view.stack(len(self.base.shape)):
            return NotImplemented
        base = self.base
        if isinstance(base, Weight):
            base = base.scannable()
            if base is NotImplemented:
                return NotImplemented
        shared = jax.tree.map(
            lambda x: jnp.broadcast_to(x, (stack[0], *x.shape)), self.shared
        )
        scale = jnp.broadcast_to(self.scale, stack)
        return self._with(base=base, shared=shared, scale=scale)

    # --- inside ----------------------------------------------------------------

    def _sizes(self) -> tuple[tuple[int, ...], int, int]:
        """Sizes of the stacked axes, of all inputs, of all outputs."""
        shape = self.base.shape
        stack = tuple(shape[i] for i in self._view.stack(len(shape)))
        n_in, n_out = (math.prod(shape[i] for i in side) for side in self._view)
        return stack, n_in, n_out

    def _dtypes(self) -> list[Any]:
        return [x.dtype for x in jax.tree.leaves((self.parts, self.gain))]

    def _act(self, forward: bool) -> Callable[..., jax.Array]:
        action = self.action
        assert action is not None
        if forward:
            return action
        _, n_in, _ = self._sizes()

        def back(parts: Any, shared: Any, y: jax.Array) -> jax.Array:
            def forth(x: jax.Array) -> jax.Array:
                return action(parts, shared, x)

            like = jax.ShapeDtypeStruct((*y.shape[:-1], n_in), y.dtype)
            made = jax.eval_shape(forth, like).dtype
            (x,) = jax.linear_transpose(forth, like)(y.astype(made))
            return x

        return back

    def _aligned_gain(self, ndim: int) -> jax.Array:
        """The gain, with an axis of size one for each input axis."""
        shape = tuple(
            1 if i - ndim in self._view.inputs else n
            for i, n in enumerate(self.base.shape)
        )
        return from_matrices(jnp.expand_dims(self.gain, -2), self._view, shape)

    def _map(self, fn: Callable[[jax.Array], jax.Array]) -> "Operator":
        parts, scale, gain = jax.tree.map(fn, (self.parts, self.scale, self.gain))
        return self._with(parts=parts, scale=scale, gain=gain)


def _over_stack(fn: Callable[..., Any], n: int) -> Callable[..., Any]:
    for _ in range(n):
        fn = jax.vmap(fn)
    return fn


def _spread(x: jax.Array, stack: int, free: int) -> jax.Array:
    """With `free` axes of size one behind the stacked ones; a number is left alone."""
    return x.reshape(*x.shape[:stack], *(1,) * free, *x.shape[stack:]) if x.ndim else x


def _name(precision: Any) -> str | None:
    """A `lax.Precision` as the context manager takes it."""
    if isinstance(precision, tuple):
        precision = precision[0]
    return precision.name.lower() if isinstance(precision, lax.Precision) else precision


def _under_mesh(fn: Callable[..., Any], like: jax.Array) -> Callable[..., Any]:
    """`fn`, whose result is divided as `like` where shardings are in types."""
    sharding = jax.typeof(like).sharding
    mesh = sharding.mesh
    if jax.sharding.AxisType.Explicit not in mesh.axis_types:
        return fn
    return jax.sharding.auto_axes(fn, out_sharding=sharding)
