# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Linear algebra on leaves that are sharded in any way.

The dense factorisations, Newton-Schulz and sorting need whole matrices (or whole rows);
a mesh with Explicit axis types refuses them on a sharded one. `sharding_safe` is
the one way round that: gather what must be whole, spread the work over the stacked
matrices where it can, compute, and hand back the type that went in. All functions
below but `kth_largest`, which only counts, are made with it.

Matrix functions take real floating arrays of shape `(..., m, n)`, compute in float32
(float64 stays float64), and cast their results back to the dtype of the input.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, ParamSpec, TypeVar, cast

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.typing import ArrayLike

_Params = ParamSpec("_Params")
_Result = TypeVar("_Result")
_JORDAN = (3.4445, -4.7750, 2.0315)  # Muon's quintic, steepest at zero.

_Spec = list[tuple[str, ...]]  # The mesh axes of each array axis.


class SVD(NamedTuple):
    """Singular value decomposition `x = (u * s) @ vt`, with `k = min(m, n)`."""

    u: jax.Array  # (..., m, k), dtype of x
    s: jax.Array  # (..., k), dtype of x, descending
    vt: jax.Array  # (..., k, n), dtype of x


class QR(NamedTuple):
    """Reduced QR decomposition `x = q @ r`, with `k = min(m, n)`."""

    q: jax.Array  # (..., m, k), dtype of x
    r: jax.Array  # (..., k, n), dtype of x, upper triangular


class Eigh(NamedTuple):
    """Eigendecomposition `x = (v * w) @ v.T` of a symmetric matrix."""

    w: jax.Array  # (..., n), dtype of x, ascending
    v: jax.Array  # (..., n, n), dtype of x, eigenvectors in columns


class TopK(NamedTuple):
    """The k largest entries of each row, in descending order."""

    values: jax.Array  # (..., k), dtype of x
    indices: jax.Array  # (..., k), int32


def _route(
    shape: tuple[int, ...], sharding: NamedSharding, whole: set[int]
) -> list[_Spec]:
    """The specs from the one in `sharding` to one in which the `whole` axes are whole.

    A mesh axis that held a part of each matrix moves to a stack axis where the sizes
    divide: each device then computes some of the matrices, not all. One mesh axis moves
    at a time: XLA makes that an all-to-all, but a gather of several at once.
    """
    sizes = sharding.mesh.shape
    spec = [
        () if entry is None else entry if isinstance(entry, tuple) else (entry,)
        for entry in sharding.spec
    ]
    route = [spec]
    for axis in sorted(whole):
        for name in reversed(spec[axis]):
            for stack in sorted(set(range(len(shape))) - whole):
                names = (*route[-1][stack], name)
                if shape[stack] % math.prod(sizes[n] for n in names) == 0:
                    step = list(route[-1])
                    step[axis] = tuple(n for n in step[axis] if n != name)
                    step[stack] = names
                    route.append(step)
                    break
    route.append([() if i in whole else names for i, names in enumerate(route[-1])])
    return route


def sharding_safe(
    fn: Callable[_Params, _Result], *, whole: Sequence[int] = (-2, -1)
) -> Callable[_Params, _Result]:
    """Makes `fn` work on an array sharded in any way, on any mesh or none.

    On a mesh with Explicit axes the array is resharded so that its `whole` axes are
    whole on every device, and the mesh axes which that frees divide its stack axes if
    they can. `fn` then runs with these mesh axes as Auto, where no rule of sharding
    in types can refuse it, and its results are resharded back. Nothing moves if only
    stack axes are sharded. On a mesh with Auto axes the `whole` axes are constrained
    to be replicated, and the compiler chooses the rest.

    Args:
        fn: A function of an array `x`, and of any further positional arrays, to a
            pytree of arrays. It treats the axes of `x` that are not in `whole` as a
            batch. What it closes over must not be sharded: pass that as an argument.
        whole: The axes of `x` that `fn` does not treat as a batch.

    Returns:
        `fn` with the same arguments. A result of the shape of `x` has the sharding type
        of `x`. In another result an axis with the place and size of an axis of `x` has
        that axis' spec (only if it is a stack axis, where the ranks differ), and the
        others are replicated.

    Raises:
        ValueError: From the returned function, if `x` lacks one of the `whole` axes.
    """
    name = getattr(fn, "__name__", "this function")

    @functools.wraps(fn)
    def wrapped(*args: _Params.args, **kwargs: _Params.kwargs) -> _Result:
        x, *others = (jnp.asarray(arg) for arg in cast(tuple[ArrayLike, ...], args))
        if any(not -x.ndim <= axis < x.ndim for axis in whole):
            raise ValueError(
                f"{name} needs axes {tuple(whole)} of its argument, which has shape "
                f"{x.shape}; reshape the leaf, or leave it out."
            )
        axes = {axis % x.ndim for axis in whole}
        call: Callable[..., Any] = functools.partial(fn, **kwargs)
        sharding = jax.typeof(x).sharding
        mesh = sharding.mesh

        if AxisType.Explicit in mesh.axis_types:
            outs = jax.eval_shape(
                call,
                *(jax.ShapeDtypeStruct(arg.shape, arg.dtype) for arg in (x, *others)),
            )

            def like_x(out: Any, spec: _Spec) -> NamedSharding:
                """The sharding for `out` while `x` has `spec`."""
                entries = [
                    spec[i]
                    if i < x.ndim
                    and out.shape[i] == x.shape[i]
                    and (out.ndim == x.ndim or i not in axes)
                    else None
                    for i in range(out.ndim)
                ]
                return NamedSharding(mesh, jax.P(*entries))

            def for_outs(spec: _Spec) -> Any:
                return jax.tree.map(lambda out: like_x(out, spec), outs)

            explicit = tuple(
                axis
                for axis, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
                if kind == AxisType.Explicit
            )
            route = _route(x.shape, sharding, axes)
            for spec in route[1:]:
                x = jax.reshard(x, like_x(x, spec))
            out = jax.sharding.auto_axes(
                call, axes=explicit, out_sharding=for_outs(route[-1])
            )(x, *others)
            for spec in reversed(route[:-1]):
                out = jax.reshard(out, for_outs(spec))
            return cast(_Result, out)

        if set(mesh.axis_types) == {AxisType.Auto}:
            entries = [
                None if i in axes else jax.P.UNCONSTRAINED for i in range(x.ndim)
            ]
            # Behind a barrier, or the compiler would gather what `x` is computed from
            # too: a momentum, which is stored.
            x = jax.lax.with_sharding_constraint(
                jax.lax.optimization_barrier(x), NamedSharding(mesh, jax.P(*entries))
            )
        return call(x, *others)

    return wrapped


def _computable(x: jax.Array, name: str) -> jax.Array:
    """`x` in the dtype to compute in."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"{name} takes a real floating array, got {x.dtype} of shape {x.shape}; "
            "cast the leaf to float32, or leave it out."
        )
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


def _transpose(x: jax.Array) -> jax.Array:
    return jnp.swapaxes(x, -1, -2)


@sharding_safe
def svd(x: ArrayLike, /) -> SVD:
    """Reduced singular value decomposition of each matrix.

    Args:
        x: Array of shape `(..., m, n)`.

    Returns:
        The factors `u`, `s`, `vt`. Each pair of singular vectors is defined only up to
        a common sign.

    Examples:
        >>> u, s, vt = svd(jnp.diag(jnp.array([1.0, 3.0])))
        >>> print(s)
        [3. 1.]
    """
    x = jnp.asarray(x)
    factors = jnp.linalg.svd(_computable(x, "svd"), full_matrices=False)
    return SVD(*(factor.astype(x.dtype) for factor in factors))


@sharding_safe
def qr(x: ArrayLike, /) -> QR:
    """Reduced QR decomposition of each matrix.

    Args:
        x: Array of shape `(..., m, n)`.

    Returns:
        The factors `q` and `r`. The diagonal of `r` may have either sign.
    """
    x = jnp.asarray(x)
    factors = jnp.linalg.qr(_computable(x, "qr"))
    return QR(*(factor.astype(x.dtype) for factor in factors))


@sharding_safe
def cholesky(x: ArrayLike, /) -> jax.Array:
    """Lower Cholesky factor of each symmetric positive definite matrix.

    Args:
        x: Array of shape `(..., n, n)`; its symmetric part is what counts.

    Returns:
        `l` with `x = l @ l.T`, of the shape and sharding of `x`. All NaN for a matrix
        that is not positive definite to the precision of the computation.
    """
    x = jnp.asarray(x)
    return jnp.linalg.cholesky(_computable(x, "cholesky")).astype(x.dtype)


@sharding_safe
def eigh(x: ArrayLike, /) -> Eigh:
    """Eigenvalues and eigenvectors of each symmetric matrix.

    Args:
        x: Array of shape `(..., n, n)`; its symmetric part is what counts.

    Returns:
        The eigenvalues `w`, ascending, and the eigenvectors, the columns of `v`, each
        defined only up to its sign.
    """
    x = jnp.asarray(x)
    factors = jnp.linalg.eigh(_computable(x, "eigh"))
    return Eigh(*(factor.astype(x.dtype) for factor in factors))


@sharding_safe
def sqrtm_psd(x: ArrayLike, /) -> jax.Array:
    """Symmetric square root of each symmetric positive semidefinite matrix.

    Eigenvalues below zero, which rounding makes out of zeros, count as zero. An
    eigenvalue that is small beside the largest, `w`, is accurate to about
    `eps * max(w)`, hence its root to the square root of that.

    Args:
        x: Array of shape `(..., n, n)`; its symmetric part is what counts.

    Returns:
        `r` with `r = r.T` and `r @ r = x`, of the shape and sharding of `x`.

    Examples:
        >>> print(sqrtm_psd(jnp.diag(jnp.array([4.0, 9.0]))))
        [[2. 0.]
         [0. 3.]]
    """
    x = jnp.asarray(x)
    w, v = jnp.linalg.eigh(_computable(x, "sqrtm_psd"))
    scaled = v * jnp.sqrt(jnp.maximum(w, 0.0))[..., None, :]
    root = jnp.matmul(scaled, _transpose(v), precision=jax.lax.Precision.HIGHEST)
    return root.astype(x.dtype)


def sort(x: ArrayLike, axis: int = -1) -> jax.Array:
    """`x` sorted along `axis`, ascending, NaN last; its shape, dtype and sharding."""
    return sharding_safe(functools.partial(jnp.sort, axis=axis), whole=(axis,))(x)


def top_k(x: ArrayLike, k: int) -> TopK:
    """The `k` largest entries along the last axis.

    For a threshold over a whole leaf or tree see `kth_largest`, which does not gather.

    Args:
        x: Array of shape `(..., n)`, of a real dtype.
        k: How many, at most `n`.

    Returns:
        The values in descending order, and their int32 places. Among equals the first
        ones win.
    """

    def largest(x: jax.Array) -> TopK:
        return TopK(*jax.lax.top_k(x, k))

    return sharding_safe(largest, whole=(-1,))(jnp.asarray(x))


def _newton_schulz(x: jax.Array, c: jax.Array) -> tuple[jax.Array, None]:
    """One step `c0 x + c1 (x x^T) x + c2 (x x^T)^2 x`."""
    gram = x @ _transpose(x)
    return c[0] * x + (c[1] * gram + c[2] * (gram @ gram)) @ x, None


def orthogonalize(
    x: ArrayLike,
    steps: int = 5,
    coefficients: ArrayLike | Sequence[Any] = _JORDAN,
    *,
    eps: float = 1e-7,
) -> jax.Array:
    """Newton-Schulz orthogonalisation of each matrix, as in Muon.

    Brings every singular value near 1 and leaves the singular vectors. Works on the
    smaller Gram matrix, for all stacked matrices in one loop. Matrix products have the
    precision of the backend's default, which is less than float32 on accelerators: set
    `jax.default_matmul_precision` for more.

    Args:
        x: Array of shape `(..., m, n)`.
        steps: Number of iterations; none leaves `x` divided by its Frobenius norm.
        coefficients: Of the odd quintic polynomial, of shape `(3,)` for all steps, or
            `(steps, 3)`. The default, steepest at zero, brings singular values above
            0.002 of the norm into [0.68, 1.21] in 5 steps, and no nearer in more.
        eps: Added to the norm, so that zero stays zero.

    Returns:
        An array of the shape, dtype and sharding of `x`.

    Raises:
        ValueError: If the coefficients are of another shape.

    References:
        Jordan et al., `Muon <https://kellerjordan.github.io/posts/muon/>`_, 2024
    """
    table = jnp.asarray(coefficients)
    if table.shape not in ((3,), (steps, 3)):
        raise ValueError(
            f"orthogonalize takes coefficients of shape (3,) or (steps, 3) = "
            f"({steps}, 3), got {table.shape}."
        )

    def iterate(x: jax.Array, table: jax.Array) -> jax.Array:
        y = _computable(x, "orthogonalize")
        tall = x.shape[-2] > x.shape[-1]
        y = _transpose(y) if tall else y
        y = y / (jnp.linalg.norm(y, axis=(-2, -1), keepdims=True) + eps)
        rows = jnp.broadcast_to(jnp.atleast_2d(table), (steps, 3)).astype(y.dtype)
        y, _ = jax.lax.scan(_newton_schulz, y, rows)
        return (_transpose(y) if tall else y).astype(x.dtype)

    return sharding_safe(iterate)(jnp.asarray(x), table)


def _sort_key(x: jax.Array) -> jax.Array:
    """Unsigned integers in the order of the floats `x`; NaN is the largest."""
    bits = jax.lax.bitcast_convert_type(x, f"uint{jnp.finfo(x.dtype).bits}")
    top = jnp.asarray(1 << (jnp.finfo(x.dtype).bits - 1), bits.dtype)
    key = jnp.where(bits < top, bits | top, ~bits)
    return jnp.where(jnp.isnan(x), ~jnp.zeros_like(bits), key)


@jax.jit
def _kth_largest(leaves: list[jax.Array], k: jax.Array) -> jax.Array:
    dtype = leaves[0].dtype
    width = jnp.finfo(dtype).bits
    word = jnp.dtype(f"uint{width}")

    def bit(i: jax.Array, found: jax.Array) -> jax.Array:
        """Sets the next lower bit if still k keys are as large."""
        # Tied to the loop, or XLA would hold the keys of all leaves in memory at once.
        held, found = jax.lax.optimization_barrier((leaves, found))
        trial = found | jnp.left_shift(jnp.ones((), word), (width - 1 - i).astype(word))
        count = sum(
            jnp.sum(_sort_key(leaf) >= trial, dtype=jnp.uint32) for leaf in held
        )
        return jnp.where(count >= k, trial, found)

    found = jax.lax.fori_loop(0, width, bit, jnp.zeros((), word))
    top = jnp.asarray(1 << (width - 1), word)
    return jax.lax.bitcast_convert_type(
        jnp.where(found >= top, found ^ top, ~found), dtype
    )


def kth_largest(tree: Any, k: int | jax.Array) -> jax.Array:
    """The k-th largest entry among all entries of all leaves, exactly.

    The threshold of a global top-k mask, `leaf >= kth_largest(tree, k)`, which holds
    more than k entries where there are ties. Found by bisection on the float's bit
    pattern: one count of the whole tree for each bit of the dtype, so nothing
    is sorted, concatenated or gathered, and leaves may be sharded in any way.

    Args:
        tree: An array or a pytree of floating arrays. Leaves of unlike dtypes are
            compared in the dtype that they promote to. NaN counts as the largest.
        k: From 1 to the number of entries. A traced `k` is clipped into that range.

    Returns:
        A scalar of the dtype of the leaves, equal to the k-th entry of their descending
        sort.

    Raises:
        TypeError: If a leaf is not floating.
        ValueError: If `k` is out of range, or there are 2**32 entries or more.

    Examples:
        >>> print(kth_largest({"a": jnp.array([3.0, 1.0]), "b": jnp.array([2.0])}, 2))
        2.0
    """
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    for path, leaf in jax.tree.leaves_with_path(tree):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            at = jax.tree_util.keystr(path, simple=True, separator="/")
            raise TypeError(
                f"kth_largest takes floating leaves, got {jnp.result_type(leaf)} of "
                f"shape {jnp.shape(leaf)} at {at!r}; leave it out of the tree."
            )
    size = sum(leaf.size for leaf in leaves)
    if not 0 < size < 2**32:
        raise ValueError(
            f"kth_largest takes from 1 to 2**32 - 1 entries, got {size}; give it "
            "a tree with some, or parts of this one."
        )
    if not isinstance(k, jax.core.Tracer) and not 1 <= k <= size:
        raise ValueError(f"kth_largest takes k from 1 to {size}, got {k}.")
    dtype = jnp.result_type(*leaves)
    return _kth_largest(
        [leaf.astype(dtype) for leaf in leaves],
        jnp.clip(jnp.asarray(k), 1, size).astype(jnp.uint32),
    )
