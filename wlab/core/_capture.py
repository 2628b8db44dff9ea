# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
r"""What the weights of a model are multiplied with, for any function.

A captured weight is the weight plus a map that is zero for every input, so that the
function stays what it is. The derivative of that zero by an argument of its own is
*defined* as a statistic of the inputs :math:`X` (rows, in),

.. math::

    y = x W + 0(x; p), \qquad \partial_p := s(X)

and one gradient returns :math:`s(X)` of every weight, through jit, scan, remat and
vmap, without a callback and without a change to the model. Uses add up, as gradients
do. Nothing else of a backward pass is needed, and the compiler drops it.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from wlab.core._lift import dispatch, lift
from wlab.core._operator import Operator
from wlab.core._tree import (
    Leaf,
    Select,
    Views,
    describe,
    leaves_with_paths,
    map_with_path,
)
from wlab.core._tree import select as select_leaves

Statistic = Callable[[jax.Array], Any]


class Use(NamedTuple):
    """One product with a captured weight, in the order of the function."""

    path: str
    rows: int  # inputs of one of its matrices
    stage: int  # weights that read the same array in turn share a number


def keep(x: jax.Array) -> jax.Array:
    """The inputs themselves, float32 [rows, in]."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def capture(
    fn: Callable[..., Any],
    select: Select | None = None,
    statistic: Statistic = keep,
    *,
    views: Views | None = None,
) -> Callable[..., tuple[Any, dict[str, Any]]]:
    """Let a function also return statistics of the inputs of chosen weights.

    Args:
        fn: ``fn(params, *args)``: a Flax `apply` on parameters, an nnx call, any
            function of jax. Params may hold structured weights.
        select: the weights, as in `wlab.core.select`; None for all kernels. Biases,
            norms and embeddings, whose product is a lookup, have no inputs.
        statistic: from the inputs [rows, in] of one matrix to a pytree of float arrays
            whose shapes do not depend on the number of rows, except for `keep`'s. Over
            several uses of a weight its results add up.
        views: which axes are inputs and outputs, where names do not tell.

    Returns:
        ``captured(params, *args) -> (out, statistics)`` where `out` is that of `fn` and
        `statistics` is ``{path: statistic}`` whose arrays lead with the stacked axes
        (scanned layers, experts) of their weight. The inputs of a kernel with several
        input axes are flattened in their order, those of a convolution are the windows
        that it sees.

    Raises:
        ValueError: at trace time, for a weight that is no matrix, or that no product
            with an array was seen of (the message names it).

    Examples:
        >>> x = jnp.array([[1.0, 2.0]])
        >>> fn = capture(lambda p, x: x @ p["kernel"], statistic=lambda x: x.T @ x)
        >>> out, stats = fn({"kernel": jnp.ones((2, 3))}, x)
        >>> stats["kernel"].tolist()
        [[1.0, 2.0], [2.0, 4.0]]
    """
    lifted = lift(fn)

    def captured(params: Any, *args: Any) -> tuple[Any, dict[str, Any]]:
        chosen = _chosen(params, select, views)
        shapes = _shapes(lifted, chosen, statistic, params, *args)
        probes = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

        def run(probes: Any) -> Any:
            out = lifted(_tapped(params, chosen, statistic, probes, []), *args)
            floats = [
                jnp.sum(x, dtype=jnp.float32)
                for x in jax.tree.leaves(out)
                if jnp.issubdtype(x.dtype, jnp.floating)
            ]
            return sum(floats, jnp.zeros(())), out

        stats, out = jax.grad(run, has_aux=True)(probes)
        return out, stats

    return captured


def uses(
    fn: Callable[..., Any],
    params: Any,
    *args: Any,
    select: Select | None = None,
    views: Views | None = None,
) -> list[Use]:
    """The products with chosen weights in the order of the function; runs nothing.

    Args:
        fn: as in `capture`.
        params: its parameters, which may be abstract.
        *args: its other arguments, which may be abstract.
        select: as in `capture`.
        views: as in `capture`.

    Returns:
        One entry for each weight's first product. Weights that read the same array
        have the same stage: query, key and value, say.

    Raises:
        ValueError: as `capture` does.
    """
    chosen = _chosen(params, select, views)
    log = _logged(lift(fn), chosen, params, *args)
    out: dict[str, Use] = {}
    stages: list[Any] = []
    for path, other, rows in log:
        number = next((i for i, x in enumerate(stages) if x is other), len(stages))
        if number == len(stages):
            stages.append(other)
        out.setdefault(path, Use(path, rows, number))
    return list(out.values())


class _Tap:
    """The zero map of one weight; it also notes what it is applied to."""

    def __init__(self, path: str, statistic: Statistic, n_out: int, log: list[Any]):
        self.path, self.statistic, self.n_out = path, statistic, n_out
        self.log = log

    def __call__(self, probe: Any, shared: Any, x: jax.Array) -> jax.Array:
        del shared
        self.log.append((self.path, x.reshape(-1, x.shape[-1]).shape))
        return _zero(self.statistic, self.n_out, x, probe)

    def dense(self, probe: Any, shared: Any, n_in: int, n_out: int) -> jax.Array:
        del probe, shared
        return jnp.zeros((n_in, n_out))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _zero(statistic: Statistic, n_out: int, x: jax.Array, probe: Any) -> jax.Array:
    del statistic, probe
    return jnp.zeros((*x.shape[:-1], n_out), x.dtype)


def _zero_fwd(statistic: Statistic, n_out: int, x: jax.Array, probe: Any) -> Any:
    return _zero(statistic, n_out, x, probe), (x, probe)


def _zero_bwd(statistic: Statistic, n_out: int, kept: Any, _: jax.Array) -> Any:
    del n_out
    x, probe = kept
    if not jax.tree.leaves(probe):
        return jnp.zeros_like(x), probe
    made = statistic(x.reshape(-1, x.shape[-1]))
    return jnp.zeros_like(x), jax.tree.map(lambda m, p: m.astype(p.dtype), made, probe)


_zero.defvjp(_zero_fwd, _zero_bwd)


class _Tapped(Operator):
    """The weight itself, with a tap where it is read over all its inputs."""

    def dot_general(
        self, other: jax.Array, dimension_numbers: Any, *, left: bool, **params: Any
    ) -> Any:
        """The base's product; the tap sees the other operand."""
        contract, _ = dimension_numbers
        n = len(self.base.shape)
        if {a % n for a in contract[0 if left else 1]} == {
            a % n for a in self.view.inputs
        }:
            tap = self.action
            assert isinstance(tap, _Tap)
            before = len(tap.log)
            out = super().dot_general(other, dimension_numbers, left=left, **params)
            for i in range(before, len(tap.log)):
                path, shape = tap.log[i][:2]
                tap.log[i] = (path, shape, other)
            if out is not NotImplemented:
                return out
        operands = (self.base, other) if left else (other, self.base)
        return dispatch(
            lax.dot_general_p, *operands, dimension_numbers=dimension_numbers, **params
        )

    def conv_general_dilated(self, inputs: jax.Array, **params: Any) -> Any:
        """The base's convolution; the tap sees the windows."""
        out = dispatch(lax.conv_general_dilated_p, inputs, self.base, **params)
        numbers = params["dimension_numbers"]
        tap = self.action
        assert isinstance(tap, _Tap)
        if params["feature_group_count"] != 1 or params["batch_group_count"] != 1:
            raise ValueError(
                f"leaf {tap.path!r}: a convolution in groups has no one matrix of "
                "inputs: leave it out of `select`"
            )
        rhs = numbers.rhs_spec  # out, in, spatial...
        order = [a % self.ndim for a in self.view.inputs]
        if sorted(order) != sorted(rhs[1:]):
            raise ValueError(
                f"leaf {tap.path!r} of shape {self.shape}: a convolution reads its "
                f"axes {sorted(rhs[1:])}, and its view says {order}, for its path does "
                f"not tell: give views={{{tap.path!r}: MatrixView.of(inputs, 1)}}, or "
                "call the module conv"
            )
        names = ("window_strides", "padding", "lhs_dilation", "rhs_dilation")
        windows = lax.conv_general_dilated_patches(
            inputs,
            [self.shape[a] for a in rhs[2:]],
            dimension_numbers=lax.ConvDimensionNumbers(
                numbers.lhs_spec, rhs, numbers.out_spec
            ),
            **{name: params[name] for name in names},
        )
        # Features of a window are in, spatial..., the kernel's inputs as viewed.
        windows = jnp.moveaxis(windows, numbers.out_spec[1], -1)
        split = [self.shape[a] for a in rhs[1:]]
        windows = windows.reshape(*windows.shape[:-1], *split)
        lead = windows.ndim - len(split)
        to = [lead + list(rhs[1:]).index(a) for a in order]
        windows = windows.transpose(*range(lead), *to)
        windows = windows.reshape(-1, math.prod(split))
        zero = tap(self.parts, self.shared, windows)
        tap.log[-1] = (*tap.log[-1][:2], inputs)
        return out + jnp.sum(zero).astype(out.dtype)


def _chosen(
    params: Any,
    select: Select | None,
    views: Views | None,
) -> dict[str, Leaf]:
    """The leaves to be captured, by path."""
    known = describe(params, views=views)
    if select is None:
        taken = {leaf.path for leaf in known if leaf.role in ("kernel", "conv", "head")}
    else:
        marks = leaves_with_paths(select_leaves(params, select))
        taken = {path for path, mark in marks if mark}
    out = {leaf.path: leaf for leaf in known if leaf.path in taken}
    for leaf in out.values():
        if leaf.view is None:
            raise ValueError(
                f"leaf {leaf.path!r} of shape {leaf.shape} is no matrix, so nothing is "
                "multiplied with it: leave it out of `select`"
            )
    return out


def _tapped(
    params: Any,
    chosen: dict[str, Leaf],
    statistic: Statistic,
    probes: dict[str, Any],
    log: list[Any],
) -> Any:
    def one(path: str, w: Any) -> Any:
        if path not in chosen:
            return w
        leaf = chosen[path]
        assert leaf.view is not None
        n_out = math.prod(leaf.shape[a] for a in leaf.view.outputs)
        tap = _Tap(path, statistic, n_out, log)
        made: Any = _Tapped  # its arguments are Operator's
        return made(w, tap, probes.get(path, ()), view=leaf.view)

    return map_with_path(one, params)


def _logged(
    lifted: Any, chosen: dict[str, Leaf], params: Any, *args: Any
) -> list[tuple[str, Any, int]]:
    """The uses of each weight: path, the array that it read, and its rows."""
    log: list[Any] = []

    def run(params: Any, *args: Any) -> Any:
        return lifted(_tapped(params, chosen, keep, {}, log), *args)

    jax.eval_shape(run, params, *args)
    missed = sorted(set(chosen) - {entry[0] for entry in log})
    if missed:
        raise ValueError(
            f"no product over all inputs of {missed} was seen: their inputs are not "
            "known. Leave them out of `select`, or write the product as a dot, einsum "
            "or convolution with the weight as it is"
        )
    return [(path, other, shape[0]) for path, shape, other in log]


def _shapes(
    lifted: Any, chosen: dict[str, Leaf], statistic: Statistic, params: Any, *args: Any
) -> dict[str, Any]:
    """What the statistics of each weight look like."""
    rows: dict[str, set[int]] = {}
    for path, _, n in _logged(lifted, chosen, params, *args):
        rows.setdefault(path, set()).add(n)
    out = {}
    for path, leaf in chosen.items():
        assert leaf.view is not None
        stack = tuple(leaf.shape[a] for a in leaf.view.stack(len(leaf.shape)))
        n_in = math.prod(leaf.shape[a] for a in leaf.view.inputs)
        made = [
            jax.eval_shape(statistic, jax.ShapeDtypeStruct((n, n_in), jnp.float32))
            for n in sorted(rows[path])
        ]
        if any(m != made[0] for m in made):
            raise ValueError(
                f"leaf {path!r} is read with {sorted(rows[path])} rows at several "
                "places, and the statistic has a shape for each: let it sum over rows"
            )
        out[path] = jax.tree.map(
            lambda s, stack=stack: jax.ShapeDtypeStruct((*stack, *s.shape), s.dtype),
            made[0],
        )
    return out


def paths_by_stage(found: Sequence[Use]) -> list[list[str]]:
    """The paths of each stage, in the order of the function."""
    out: dict[int, list[str]] = {}
    for use in found:
        out.setdefault(use.stage, []).append(use.path)
    return list(out.values())
