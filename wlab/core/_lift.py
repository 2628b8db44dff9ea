# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Structured weights, and `lift`, which runs any function on them.

A structured weight is a pytree node that stands for an array: it has a shape, a
dtype and a dense value, and it may know a cheaper way to be multiplied, looked up
or reshaped. `lift` interprets a function so that these cheaper ways are taken; a
primitive for which a weight has none sees the dense value.

Everything of wlab that touches quax stands in this file.
"""

import abc
import functools
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar, cast

import jax
import jax.extend.core as jexc
import jax.numpy as jnp
import quax
from jax import lax
from jaxtyping import ArrayLike
from quax._compat import unpack_scan_args
from quax._primitives import scan_quax
from quax._trace import _QuaxTrace, _QuaxTracer, core
from quax._values import _dense

from wlab.core._shapes import window
from wlab.core._view import MatrixView

F = TypeVar("F", bound=Callable[..., Any])


class Weight(quax.ArrayValue):
    """A pytree node that stands for an array of a given shape and dtype.

    A subclass says its dense value in `materialise`. Each other method below is a
    cheaper way through one operation; it may return `NotImplemented` (the default),
    and the operation then sees the dense value. The methods take and return what
    the function of the same name in `jax.lax` does; one that returns a `Weight`
    says that the result is exact and still structured.
    """

    @abc.abstractmethod
    def materialise(self) -> jax.Array:
        """The dense array that this weight stands for, of its shape and dtype."""

    @property
    @abc.abstractmethod
    def view(self) -> MatrixView | None:
        """Which axes are read (in) and written (out); the others are stacked."""

    def specs(self, spec: jax.P) -> Any:
        """The specs of this weight's arrays, in its own structure.

        Args:
            spec: the mesh axes that divide each axis of the array it stands for.

        Returns:
            The weight with a `PartitionSpec` in the place of each array; by default
            all are copied. An entry that does not divide its axis is dropped.
        """
        del spec
        return jax.tree.map(lambda _: jax.P(), self)

    def dot_general(
        self, other: jax.Array, dimension_numbers: Any, *, left: bool, **params: Any
    ) -> Any:
        """Product with an array; `left` says that the weight is the left operand."""
        del other, dimension_numbers, left, params
        return NotImplemented

    def conv_general_dilated(self, inputs: jax.Array, **params: Any) -> Any:
        """Convolution of `inputs` with this weight as its kernel."""
        del inputs, params
        return NotImplemented

    def gather(self, indices: jax.Array, **params: Any) -> Any:
        """Look-up of slices, as an embedding does."""
        del indices, params
        return NotImplemented

    def transpose(self, permutation: tuple[int, ...]) -> Any:
        """The weight with its axes permuted."""
        del permutation
        return NotImplemented

    def reshape(self, shape: tuple[int, ...]) -> Any:
        """The weight with its axes split or merged in row-major order."""
        del shape
        return NotImplemented

    def convert_element_type(self, dtype: Any) -> Any:
        """The weight standing for an array of another dtype."""
        del dtype
        return NotImplemented

    def slice(
        self,
        starts: Sequence[Any],
        sizes: Sequence[int],
        strides: Sequence[int] | None = None,
    ) -> Any:
        """A window of the weight; `starts` may be traced if `strides` is None."""
        del starts, sizes, strides
        return NotImplemented

    def scannable(self) -> Any:
        """This weight with every array leading with axis 0, for `lax.scan`."""
        return NotImplemented

    def _no_arithmetic(self, other: Any = None) -> NoReturn:
        del other
        raise TypeError(
            f"{type(self).__name__} of shape {self.shape} stands for an array and has "
            "no arithmetic of its own. Call the function through wlab.lift(fn), or use "
            "the dense form, wlab.materialise(tree)"
        )

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _no_arithmetic
    __truediv__ = __rtruediv__ = __matmul__ = __rmatmul__ = _no_arithmetic
    __pow__ = __rpow__ = __neg__ = _no_arithmetic


def is_weight(x: Any) -> bool:
    """Whether `x` is a structured weight: the `is_leaf` of maps over such trees."""
    return isinstance(x, Weight)


def specs_of(part: Any, spec: jax.P) -> Any:
    """The specs of an array or of a nested weight; see `Weight.specs`."""
    return part.specs(spec) if is_weight(part) else spec


def materialise(tree: Any) -> Any:
    """The tree with every structured weight replaced by its dense array.

    Args:
        tree: any pytree; arrays and other leaves are left as they are.

    Returns:
        A tree of the same outer structure without a `Weight` in it.
    """
    return jax.tree.map(
        lambda w: w.materialise() if is_weight(w) else w, tree, is_leaf=is_weight
    )


def lift(fn: F) -> F:
    """Let a function see structured weights as if they were arrays.

    The function need not know of wlab: a Flax `apply`, an `nnx` call, any function
    of jax. It may be wrapped by jit, grad, vmap and scan, and contain them. An
    operation for which a weight has no cheaper way sees its dense value, so that
    the result is that of `fn(materialise(args))` up to the order of summation.

    Args:
        fn: any function whose arguments are pytrees; or a callable that is one itself,
            such as an nnx module with structured leaves.

    Returns:
        A function of the same signature whose arguments may hold `Weight` leaves.

    Examples:
        >>> import jax.numpy as jnp, wlab
        >>> w = wlab.LowRank(None, jnp.ones((3, 1)), jnp.ones((2, 1)))
        >>> wlab.lift(jnp.dot)(jnp.ones((4, 3)), w).shape
        (4, 2)
    """

    @functools.wraps(fn)
    def lifted(*args: Any, **kwargs: Any) -> Any:
        leaves, structure = jax.tree.flatten((fn, args, kwargs), is_leaf=is_weight)
        if not any(map(is_weight, leaves)):
            return fn(*args, **kwargs)
        made: list[Any] = []

        # quax sees lists only: nnx objects can be rebuilt under a current trace, which
        # there is inside the function but not while quax wraps its arguments.
        def flat(leaves: list[Any]) -> list[Any]:
            f, a, k = jax.tree.unflatten(structure, leaves)
            out, out_structure = jax.tree.flatten(f(*a, **k), is_leaf=is_weight)
            made.append(out_structure)
            return out

        out = quax.quaxify(flat)(leaves)
        return jax.tree.unflatten(made[-1], out)

    return cast(F, lifted)


def dispatch(primitive: Any, *args: Any, **params: Any) -> Any:
    """One primitive on arrays or weights: how a nested weight is reached again."""
    if any(map(is_weight, args)):
        return lift(lambda *a: primitive.bind(*a, **params))(*args)
    return primitive.bind(*args, **params)


def cut(
    w: Any,
    starts: Sequence[Any],
    sizes: Sequence[int],
    strides: Sequence[int] | None = None,
) -> Any:
    """A window of an array or of a weight: how a nested weight is sliced again."""
    if is_weight(w):
        out = w.slice(starts, sizes, strides)
        if out is not NotImplemented:
            return out
        w = w.materialise()
    return window(w, starts, sizes, strides)


def _dense_value(x: Any) -> Any:
    return x.materialise() if isinstance(x, quax.Value) else x


def _or_dense(result: Any, primitive: Any, args: Sequence[Any], params: Any) -> Any:
    """The hook's result, or the primitive on dense values where it declined."""
    if result is not NotImplemented:
        return result
    return primitive.bind(*map(_dense_value, args), **params)


# --- Rules ---------------------------------------------------------------------


@quax.register(lax.dot_general_p)
def _(x: ArrayLike, w: Weight, *, dimension_numbers: Any, **params: Any) -> Any:
    out = w.dot_general(jnp.asarray(x), dimension_numbers, left=False, **params)
    params["dimension_numbers"] = dimension_numbers
    return _or_dense(out, lax.dot_general_p, (x, w), params)


@quax.register(lax.dot_general_p)
def _(w: Weight, x: ArrayLike, *, dimension_numbers: Any, **params: Any) -> Any:
    out = w.dot_general(jnp.asarray(x), dimension_numbers, left=True, **params)
    params["dimension_numbers"] = dimension_numbers
    return _or_dense(out, lax.dot_general_p, (w, x), params)


@quax.register(lax.dot_general_p)
def _(w: Weight, v: Weight, *, dimension_numbers: Any, **params: Any) -> Any:
    dense = v.materialise()
    out = w.dot_general(dense, dimension_numbers, left=True, **params)
    params["dimension_numbers"] = dimension_numbers
    return _or_dense(out, lax.dot_general_p, (w, dense), params)


@quax.register(lax.conv_general_dilated_p)
def _(x: ArrayLike, w: Weight, **params: Any) -> Any:
    out = w.conv_general_dilated(jnp.asarray(x), **params)
    return _or_dense(out, lax.conv_general_dilated_p, (x, w), params)


@quax.register(lax.gather_p)
def _(w: Weight, indices: ArrayLike, **params: Any) -> Any:
    out = w.gather(jnp.asarray(indices), **params)
    return _or_dense(out, lax.gather_p, (w, indices), params)


@quax.register(lax.transpose_p)
def _(w: Weight, *, permutation: Any) -> Any:
    out = w.transpose(tuple(permutation))
    return _or_dense(out, lax.transpose_p, (w,), {"permutation": permutation})


@quax.register(lax.reshape_p)
def _(w: Weight, *, new_sizes: Any, dimensions: Any, **params: Any) -> Any:
    out = NotImplemented
    if dimensions is None and params.get("sharding") is None:
        out = w.reshape(tuple(new_sizes))
    params |= {"new_sizes": new_sizes, "dimensions": dimensions}
    return _or_dense(out, lax.reshape_p, (w,), params)


@quax.register(lax.squeeze_p)
def _(w: Weight, *, dimensions: Any) -> Any:
    drop = {d % w.ndim for d in dimensions}
    out = w.reshape(tuple(n for i, n in enumerate(w.shape) if i not in drop))
    return _or_dense(out, lax.squeeze_p, (w,), {"dimensions": dimensions})


@quax.register(lax.broadcast_in_dim_p)
def _(w: Weight, *, shape: Any, broadcast_dimensions: Any, **params: Any) -> Any:
    # Only the insertion of axes of size one keeps the weight as it is.
    out = NotImplemented
    kept = tuple(shape[d] for d in broadcast_dimensions)
    increasing = list(broadcast_dimensions) == sorted(broadcast_dimensions)
    same_size = kept == w.shape and _size(shape) == w.size
    if increasing and same_size and params.get("sharding") is None:
        out = w.reshape(tuple(shape))
    params |= {"shape": shape, "broadcast_dimensions": broadcast_dimensions}
    return _or_dense(out, lax.broadcast_in_dim_p, (w,), params)


@quax.register(lax.convert_element_type_p)
def _(w: Weight, *, new_dtype: Any, **params: Any) -> Any:
    out = NotImplemented
    if params.get("sharding") is None:
        out = w if new_dtype == w.dtype else w.convert_element_type(new_dtype)
    params["new_dtype"] = new_dtype
    return _or_dense(out, lax.convert_element_type_p, (w,), params)


@quax.register(lax.slice_p)
def _(w: Weight, *, start_indices: Any, limit_indices: Any, strides: Any) -> Any:
    step = strides or (1,) * w.ndim
    sizes = tuple(
        -(-(hi - lo) // s)
        for lo, hi, s in zip(start_indices, limit_indices, step, strict=True)
    )
    out = w.slice(start_indices, sizes, step)
    params = {
        "start_indices": start_indices,
        "limit_indices": limit_indices,
        "strides": strides,
    }
    return _or_dense(out, lax.slice_p, (w,), params)


@quax.register(lax.dynamic_slice_p)
def _(w: Weight, *starts: ArrayLike, slice_sizes: Any) -> Any:
    out = w.slice(starts, tuple(slice_sizes))
    params = {"slice_sizes": slice_sizes}
    return _or_dense(out, lax.dynamic_slice_p, (w, *starts), params)


@quax.register(lax.copy_p)
def _(w: Weight) -> Any:
    return w


def _size(shape: Sequence[int]) -> int:
    out = 1
    for n in shape:
        out *= n
    return out


# `jax.checkpoint` has a primitive of its own, found here by tracing one: it has no
# public name that all supported versions of jax share.
_remat_p = jax.make_jaxpr(jax.checkpoint(lambda x: x * 2.0))(0.0).eqns[0].primitive


@quax.register(_remat_p)
def _(
    *args: Weight | ArrayLike, jaxpr: Any, prevent_cse: Any, policy: Any, **params: Any
) -> Any:
    """Checkpoint the lifted body, so that a weight stays structured inside."""
    del params
    closed = jaxpr if hasattr(jaxpr, "consts") else jexc.ClosedJaxpr(jaxpr, ())
    body = lift(jexc.jaxpr_as_fun(closed))
    return jax.checkpoint(body, prevent_cse=prevent_cse, policy=policy)(*args)


@quax.register(lax.scan_p, precedence=1)
def _(*args: quax.ArrayValue | ArrayLike, jaxpr: Any, **params: Any) -> Any:
    """Scan over a weight only along its stacked axes; otherwise over its value."""
    consts, carry, xs = unpack_scan_args(args, params)

    def prepare(w: Any) -> Any:
        if not is_weight(w):
            return w
        out = w.scannable()
        return w.materialise() if out is NotImplemented else out

    return scan_quax(*consts, *carry, *map(prepare, xs), jaxpr=jaxpr, **params)


def _process_custom_vjp_call(
    trace: Any,
    primitive: Any,
    fun: Any,
    fwd: Any,
    bwd: Any,
    tracers: Any,
    /,
    **params: Any,
) -> Any:
    """A function with its own derivative sees dense values: its rule expects them."""
    with core.set_current_trace(trace.parent_trace):
        arrays = tuple(_dense_value(trace.to_value(t)) for t in tracers)
        avals = tuple(jax.typeof(x) for x in arrays)
        params["subfuns"] = (fun, fwd, bwd)
        outs = primitive.bind_with_trace(trace.parent_trace, arrays, avals, params)
    return [_QuaxTracer(trace, _dense(x)) for x in outs]


# quax has no rule for jax.custom_vjp, which attention kernels are written with.
if "process_custom_vjp_call" not in vars(_QuaxTrace):
    _QuaxTrace.process_custom_vjp_call = _process_custom_vjp_call


def _process_shard_map(
    trace: Any, primitive: Any, fun: Any, tracers: Any, /, **params: Any
) -> Any:
    """A function that is divided by hand sees dense values: its specs are theirs."""
    with core.set_current_trace(trace.parent_trace):
        arrays = tuple(_dense_value(trace.to_value(t)) for t in tracers)
        avals = tuple(jax.typeof(x) for x in arrays)
        params["subfuns"] = (fun,)
        outs = primitive.bind_with_trace(trace.parent_trace, arrays, avals, params)
    return outs.map(lambda x: _QuaxTracer(trace, _dense(x)))


if "process_shard_map" not in vars(_QuaxTrace):
    _QuaxTrace.process_shard_map = _process_shard_map
