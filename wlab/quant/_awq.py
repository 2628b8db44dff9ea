# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
r"""AWQ: weights of active channels are scaled up before they are rounded (a map).

With :math:`s > 0` on the input channels of a kernel :math:`W` (in, out),
:math:`x W = (x / s)\,(\mathrm{diag}(s)\, W)`: nothing changes in full precision, but
channels with a large :math:`s` lose less to rounding. One exponent is searched for all
kernels that read the same input,

.. math::

    s_c = a_c^{\,i / n}, \quad a_c = \mathrm{mean}\,|x_c|, \qquad
    \min_i\, \mathrm{mean}\, \big( f(x; W) - f(x; \mathrm{diag}(s)^{-1}
    Q(\mathrm{diag}(s)\, W)) \big)^2,

where :math:`f` is the module whose output counts: attention as a whole, say. Then
:math:`1/s` is folded into what comes before, and each group of weights is clipped where
that makes its part of the output better.

Losses are compared in float32 at least. Where the released code skips or asserts, this
goes on: a group of channels that does not divide the input, fewer tokens than 512.

References:
    Lin, Tang, Tang, Yang, Chen, Wang, Xiao, Dang, Gan and Han, `AWQ: Activation-aware
    Weight Quantization for LLM Compression and Acceleration
    <https://arxiv.org/abs/2306.00978>`_, 2023.
"""

import difflib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from wlab.core import (
    MatrixView,
    Views,
    as_matrices,
    from_matrices,
    is_weight,
    leaves_with_paths,
    map_with_path,
    matrix_views,
)
from wlab.quant._minmax import MinMax, check_bits, minmax, split

Kind = Literal["norm", "offset_norm", "linear", "linear_last", "activation"]

_LEAST = 1e-4  # of the scales, before they are normalised
# Queries and keys meet in a product: the error of one alone says little.
_UNCLIPPED = re.compile(
    r"(?i)(^|[/.])w?(q|k|qkv?|query|key|query_key_value)(_?proj)?(_?\d+)?([/.]|$)"
)


class ScaleGroup(NamedTuple):
    """Kernels that read one input, and what comes before them.

    Paths are those of the tree that is given along, as `wlab.explain` lists them.
    Everything that reads the output of `previous` must be in `paths`; tied weights
    cannot be folded into.
    """

    paths: tuple[str, ...]
    previous: tuple[str, ...] = ()  # its weight, then its bias; (): nothing is scaled
    kind: Kind = "norm"  # of `previous`; see `fold_scale`
    inspect: Callable[[Any, Any], jax.Array] | None = None  # (params, inputs) to the
    # output that counts; None: the products of the kernels themselves
    heads: tuple[int, int] | None = None  # query heads, and key and value heads that
    # they share: the scales are tied over what is shared


class ScaleSearch(NamedTuple):
    """What `search_scale` finds."""

    scale: jax.Array  # [in]; NaN where no loss is finite
    losses: jax.Array  # [n_grid], the first is that of rounding alone


class Scaled(NamedTuple):
    """A tree whose kernels are scaled, in full precision."""

    params: Any
    scales: dict[str, jax.Array]  # [in] for each kernel that was scaled
    losses: dict[str, jax.Array]  # [n_grid] for each group, under its first path


# --- Arrays ----------------------------------------------------------------------


def search_scale(
    apply_fn: Callable[[Any, Any], jax.Array],
    params: Any,
    paths: Sequence[str],
    x: Any,
    act: jax.Array,
    *,
    grid: MinMax,
    group: int | None = 128,
    n_grid: int = 20,
    normalise: bool = True,
    views: Views | None = None,
) -> ScaleSearch:
    """The power of `act` by which scaled kernels round best.

    Args:
        apply_fn: the module whose output counts, of params and `x`.
        params: its parameters; it sees floats in float32 at least.
        paths: the kernels that are scaled and rounded in a trial, which all read the
            same channels. Others stay as they are.
        x: the inputs: an array, or any tree that `apply_fn` takes.
        act: [in], how much each channel counts; a factor does not matter.
        grid: levels.
        group: input channels that share a range; None: all of them.
        n_grid: exponents ``i / n_grid`` that are tried, one after the other.
        normalise: the geometric mean of the extreme scales is made 1.
        views: which axes are inputs and outputs, where names do not tell.

    Returns:
        Scales and losses. Nothing can be raised under jit: where all losses are NaN or
        infinite the scales are NaN, and so is all that they are folded into.

    Raises:
        ValueError: for paths that `params` does not have, or sizes that do not fit.
        TypeError: for a kernel that is packed or no floats.

    Examples:
        >>> params = {"kernel": jax.random.normal(jax.random.key(0), (8, 4))}
        >>> x = jnp.ones((2, 8)).at[:, 3].set(30.0)
        >>> dot = lambda p, x: x @ p["kernel"]
        >>> found = search_scale(dot, params, ["kernel"], x, x.mean(0), grid=MinMax(3))
        >>> bool(found.losses.min() < found.losses[0]), int(found.scale.argmax())
        (True, 3)
    """
    leaves, seen = _kernels(params, paths, views)
    act = _wide(act)
    for path, view in seen.items():
        _check_size(path, leaves[path], view.inputs, act)
    params, x = _widened(params), _widened(x)
    want = apply_fn(params, x)
    ratios = jnp.arange(n_grid, dtype=act.dtype) / n_grid

    def scale_at(ratio: jax.Array) -> jax.Array:
        s = jnp.maximum(act**ratio, _LEAST)
        return s / jnp.sqrt(s.max() * s.min()) if normalise else s

    def loss(ratio: jax.Array) -> jax.Array:
        s = scale_at(ratio)[:, None]

        def trial(path: str, leaf: Any) -> Any:
            if path not in seen:
                return leaf
            w = grid.round(as_matrices(leaf, seen[path]) * s, group) / s
            return from_matrices(w, seen[path], leaf.shape)

        got = apply_fn(map_with_path(trial, params), x)
        return jnp.mean((_wide(got) - _wide(want)) ** 2)

    losses = jax.lax.map(loss, ratios)
    finite = jnp.isfinite(losses)
    best = scale_at(ratios[jnp.argmin(jnp.where(finite, losses, jnp.inf))])
    return ScaleSearch(jnp.where(finite.any(), best, jnp.nan), losses)


def search_clip(
    w: jax.Array,
    x: jax.Array,
    *,
    grid: MinMax,
    group: int | None = 128,
    n_grid: int = 20,
    max_shrink: float = 0.5,
    n_token: int = 512,
) -> jax.Array:
    """The magnitude at which each group of a kernel is best clipped.

    The error is that of the group's own part of the output. It is computed from the
    products of its channels among each other, not from those of every token.

    Args:
        w: kernel [in, out].
        x: its inputs [tokens, in].
        grid: levels.
        group: input channels that share a range; None: all of them.
        n_grid: magnitudes fall in steps of 1 over this.
        max_shrink: the part of the largest magnitude that may be clipped at most.
        n_token: about so many tokens are used, evenly spaced.

    Returns:
        The magnitudes, [groups, out], at most the largest of each group.

    Raises:
        ValueError: for sizes that do not fit.
    """
    if w.ndim != 2 or x.ndim != 2 or x.shape[1] != w.shape[0]:
        raise ValueError(
            f"a kernel [in, out] and inputs [tokens, in] are needed, not {w.shape} and "
            f"{x.shape}: flatten the axes, or map over stacked layers with jax.vmap"
        )
    w, x = _wide(w), _wide(x)
    parts = split(w, group)
    n_groups, size, _ = parts.shape
    x = x[:: max(1, len(x) // n_token)]
    x = jnp.pad(x, [(0, 0), (0, n_groups * size - len(w))])  # what is filled up is none
    x = x.reshape(len(x), n_groups, size)
    gram = jnp.einsum("tgi,tgj->gij", x, x, precision="highest") / len(x)
    most = jnp.abs(parts).max(1)

    def error(bound: jax.Array) -> jax.Array:
        clipped = jnp.clip(parts, -bound[:, None], bound[:, None])
        found = jax.tree.map(lambda a: a[:, None], grid.fit(clipped, 1))
        off = grid.values(clipped, found) - parts
        moved = jnp.einsum("gij,gjo->gio", gram, off, precision="highest")
        return jnp.sum(off * moved, 1)

    def shorter(j: Any, best: Any) -> Any:
        least, kept = best
        bound = most * (1 - jnp.asarray(j, most.dtype) / n_grid)
        now = error(bound)
        return jnp.minimum(least, now), jnp.where(now < least, bound, kept)

    steps = int(max_shrink * n_grid)
    start = jnp.full(most.shape, jnp.inf, most.dtype), most
    return jax.lax.fori_loop(0, steps, shorter, start)[1]


def fold_scale(
    params: Any,
    previous: Sequence[str],
    kind: Kind,
    paths: Sequence[str],
    scale: jax.Array,
    *,
    heads: tuple[int, int] | None = None,
    views: Views | None = None,
) -> Any:
    """Kernels times scales, what comes before over them: the same function.

    Args:
        params: a tree.
        previous: paths of the weight that comes before and, where it has one, its bias.
        kind: of what comes before. "norm": its weight multiplies; "offset_norm": one
            plus its weight does; "linear": its outputs are what is read, up to a
            function to which positive factors do not matter, such as ReLU, or a
            product with something else; "linear_last": its last outputs are, as of
            queries, keys and values in one; "activation": a leaf by which the model
            divides.
        paths: the kernels that read it.
        scale: [in] of these kernels, positive.
        heads: query heads and the fewer value heads that they share; the scales are
            then averaged over what is shared, and these go to both sides.
        views: which axes are inputs and outputs, where names do not tell.

    Returns:
        The tree, with its dtypes.

    Raises:
        ValueError: for paths that `params` does not have, or sizes that do not fit.
        TypeError: for a kernel that is packed or no floats.

    Examples:
        >>> params = {"norm": {"scale": jnp.ones(2)}, "up": jnp.ones((2, 1))}
        >>> s = jnp.array([1.0, 4.0])
        >>> new = fold_scale(params, ["norm/scale"], "norm", ["up"], s)
        >>> new["norm"]["scale"].tolist(), new["up"].ravel().tolist()
        ([1.0, 0.25], [1.0, 4.0])
    """
    leaves, seen = _kernels(params, paths, views)
    scale = before = _wide(scale)
    if heads is not None:
        scale = tie_heads(scale, heads)
        each = len(scale) // heads[0]
        before = scale.reshape(heads[1], -1, each)[:, 0].reshape(-1)
    new: dict[str, jax.Array] = {}
    for path, view in seen.items():
        _check_size(path, leaves[path], view.inputs, scale)
        w = as_matrices(_wide(leaves[path]), view) * scale[:, None]
        new[path] = from_matrices(w, view, leaves[path].shape)
    if not previous:
        raise ValueError(f"nothing comes before {', '.join(paths)} to fold into")
    if kind not in get_args(Kind):
        raise ValueError(f"kind={kind!r} is none of {', '.join(get_args(Kind))}")
    first, *biases = previous
    if kind in ("linear", "linear_last"):
        view = _kernels(params, [first], views)[1][first]
        shape = leaves[first].shape
        if kind == "linear_last":
            more = math.prod(shape[axis] for axis in view.outputs) - len(before)
            before = jnp.pad(before, (max(0, more), 0), constant_values=1)
        _check_size(first, leaves[first], view.outputs, before)
        w = as_matrices(_wide(leaves[first]), view) / before[None]
        new[first] = from_matrices(w, view, shape)
    else:
        leaf = _vector(leaves, first, before)
        s = before.reshape(leaf.shape)
        if kind == "norm":
            new[first] = leaf / s
        elif kind == "offset_norm":
            new[first] = (1 + leaf) / s - 1
        else:
            new[first] = leaf * s
    for path in biases:
        leaf = _vector(leaves, path, before)
        new[path] = leaf / before.reshape(leaf.shape)
    return map_with_path(
        lambda path, leaf: new[path].astype(leaf.dtype) if path in new else leaf,
        params,
    )


def tie_heads(scale: jax.Array, heads: tuple[int, int]) -> jax.Array:
    """Scales averaged over the query heads that share a value head.

    Args:
        scale: [query heads x head_dim].
        heads: query heads, and the fewer value heads; as many query heads in a row
            share one.

    Returns:
        The same shape, equal for all that share one.

    Raises:
        ValueError: for numbers of heads that do not fit.
    """
    many, few = heads
    if many % few or len(scale) % many:
        raise ValueError(
            f"{len(scale)} channels are not {many} heads, of which equally many share "
            f"each of {few}"
        )
    each = scale.reshape(few, many // few, -1)
    return jnp.broadcast_to(each.mean(1, keepdims=True), each.shape).reshape(-1)


# --- Trees -----------------------------------------------------------------------


def awq(
    params: Any,
    inputs: Mapping[str, jax.Array],
    groups: Sequence[ScaleGroup],
    *,
    bits: int = 4,
    group: int | None = 128,
    importance: Mapping[str, jax.Array] | None = None,
    clip: bool = True,
    tie: float = 1e-6,
    n_grid: int = 20,
    views: Views | None = None,
) -> Any:
    """AWQ on one block: scales, clipping, rounding.

    It is `awq_scale`, `awq_clip` and `minmax` on the kernels of all groups, one after
    the other. Layers that are stacked in their leaves are mapped over with `jax.vmap`.

    Args:
        params: the block's parameters.
        inputs: what the kernels read in full precision, [..., in] by path, as
            `wlab.core.capture` returns it; of kernels that read the same, one is
            enough. Leading axes are for `inspect`.
        groups: all kernels to quantise. One that nothing can be folded into stands in
            a group without `previous`.
        bits: 2 to 8.
        group: input channels that share a range; None: all of them.
        importance: [in] by path, instead of the mean magnitude of the inputs.
        clip: whether the second search is made.
        tie: see `MinMax`.
        n_grid: exponents, and steps of magnitudes.
        views: which axes are inputs and outputs, where names do not tell.

    Returns:
        The tree with `Quantized` kernels, which runs under `wlab.lift`.

    Raises:
        ValueError: for paths or inputs that are not there, sizes that do not fit, a
            kernel in two groups; and, where values are known, if no loss is finite.
        TypeError: for a kernel that is packed or no floats.
    """
    check_bits(bits)
    options: dict[str, Any] = {"bits": bits, "group": group, "tie": tie, "views": views}
    scaled = awq_scale(
        params, inputs, groups, importance=importance, n_grid=n_grid, **options
    )
    params = scaled.params
    if clip:
        params = awq_clip(
            params, inputs, groups, scales=scaled.scales, n_grid=n_grid, **options
        )
    kernels = _kernels(params, [p for one in groups for p in one.paths], views)[1]
    return map_with_path(
        lambda path, leaf: (
            minmax(leaf, bits=bits, group=group, tie=tie, view=kernels[path])
            if path in kernels
            else leaf
        ),
        params,
    )


def awq_scale(
    params: Any,
    inputs: Mapping[str, jax.Array],
    groups: Sequence[ScaleGroup],
    *,
    bits: int = 4,
    group: int | None = 128,
    importance: Mapping[str, jax.Array] | None = None,
    normalise: bool = True,
    tie: float = 1e-6,
    n_grid: int = 20,
    views: Views | None = None,
) -> Scaled:
    """The scales of all groups, searched in the original block and folded into it.

    Args:
        params: as in `awq`, and so are the others that are not named here.
        inputs: as in `awq`.
        groups: as in `awq`.
        bits: as in `awq`.
        group: as in `awq`.
        importance: as in `awq`.
        normalise: see `search_scale`.
        tie: as in `awq`.
        n_grid: exponents.
        views: as in `awq`.

    Returns:
        The same function with other weights, the scales and the losses.

    Raises:
        ValueError: as `awq` does.
        TypeError: as `awq` does.
    """
    _check_apart(groups)
    folded, scales, losses = params, {}, {}
    for one in groups:
        if not one.previous:
            continue
        x = _input(one, inputs)
        if importance is None:
            act = jnp.abs(_wide(x)).reshape(-1, x.shape[-1]).mean(0)
        else:
            act = _of_group(one, importance, "importance")
        found = search_scale(
            one.inspect or _products(one.paths, views),
            params,
            one.paths,
            x,
            act,
            grid=MinMax(bits, tie),
            group=group,
            n_grid=n_grid,
            normalise=normalise,
            views=views,
        )
        _check_losses(one, found.losses)
        scale = found.scale
        folded = fold_scale(
            folded,
            one.previous,
            one.kind,
            one.paths,
            scale,
            heads=one.heads,
            views=views,
        )
        if one.heads is not None:
            scale = tie_heads(scale, one.heads)
        scales |= dict.fromkeys(one.paths, scale)
        losses[one.paths[0]] = found.losses
    return Scaled(folded, scales, losses)


def awq_clip(
    params: Any,
    inputs: Mapping[str, jax.Array],
    groups: Sequence[ScaleGroup],
    *,
    scales: Mapping[str, jax.Array],
    bits: int = 4,
    group: int | None = 128,
    tie: float = 1e-6,
    n_grid: int = 20,
    views: Views | None = None,
) -> Any:
    """Kernels clipped, each group of weights where its part of the output is best.

    Queries and keys, told by their names, are not.

    Args:
        params: the scaled block.
        inputs: those of the original block, as `awq_scale` took them.
        groups: as in `awq`.
        scales: by which the kernels were multiplied, and their inputs are divided here.
        bits: as in `awq`.
        group: as in `awq`.
        tie: as in `awq`.
        n_grid: steps of magnitudes.
        views: as in `awq`.

    Returns:
        The tree with its dtypes.

    Raises:
        ValueError: as `awq` does.
        TypeError: as `awq` does.
    """
    _check_apart(groups)
    new = {}
    for one in groups:
        leaves, seen = _kernels(params, one.paths, views)
        x = _input(one, inputs)
        x = _wide(x).reshape(-1, x.shape[-1])
        for path, view in seen.items():
            if _UNCLIPPED.search(path):
                continue
            leaf = leaves[path]
            w = as_matrices(_wide(leaf), view)
            # A new array for each kernel: what is shared must be divided once.
            own = x / scales[path][None] if path in scales else x
            _check_size(path, leaf, view.inputs, own[0])
            bound = search_clip(
                w, own, grid=MinMax(bits, tie), group=group, n_grid=n_grid
            )
            size = len(w) if group is None else group
            bound = jnp.repeat(bound, size, 0)[: len(w)]
            w = from_matrices(jnp.clip(w, -bound, bound), view, leaf.shape)
            new[path] = w.astype(leaf.dtype)
    return map_with_path(lambda path, leaf: new.get(path, leaf), params)


def _products(
    paths: Sequence[str], views: Views | None
) -> Callable[[Any, jax.Array], jax.Array]:
    """The outputs of the kernels themselves, side by side."""

    def apply_fn(params: Any, x: jax.Array) -> jax.Array:
        leaves, seen = _kernels(params, paths, views)
        rows = x.reshape(-1, x.shape[-1])
        kernels = [as_matrices(leaves[path], view) for path, view in seen.items()]
        return jnp.concatenate([rows @ w for w in kernels], axis=-1)

    return apply_fn


def _kernels(
    params: Any, paths: Sequence[str], views: Views | None
) -> tuple[dict[str, Any], dict[str, MatrixView]]:
    """All leaves, and the views of those of these paths: each must be one matrix."""
    leaves = dict(leaves_with_paths(params))
    known = matrix_views(params, views=views)
    seen = {}
    for path in paths:
        leaf = _known(leaves, path)
        if is_weight(leaf) or not jnp.issubdtype(leaf.dtype, jnp.floating):
            what = type(leaf).__name__ if is_weight(leaf) else leaf.dtype
            raise TypeError(
                f"leaf {path!r} of shape {leaf.shape} is {what}: kernels of floats are "
                "scaled and rounded; wlab.materialise(params) makes them dense"
            )
        view = known[path]
        if view is None or view.stack(leaf.ndim):
            raise ValueError(
                f"leaf {path!r} of shape {leaf.shape} is not one matrix (view {view}): "
                "map over stacked layers with jax.vmap, or name its axes with views="
            )
        seen[path] = view
    return leaves, seen


def _known(leaves: Mapping[str, Any], path: str) -> Any:
    if path not in leaves:
        near = difflib.get_close_matches(path, leaves, n=3, cutoff=0.3)
        raise ValueError(
            f"the tree has no leaf {path!r}; near: {', '.join(near or leaves)}"
        )
    return leaves[path]


def _vector(leaves: Mapping[str, Any], path: str, scale: jax.Array) -> jax.Array:
    leaf = _known(leaves, path)
    if leaf.size != len(scale):
        raise ValueError(
            f"leaf {path!r} of shape {leaf.shape} comes before kernels that read "
            f"{len(scale)} channels: it needs as many entries"
        )
    return _wide(leaf)


def _check_size(path: str, leaf: Any, axes: tuple[int, ...], scale: jax.Array) -> None:
    n = math.prod(leaf.shape[axis] for axis in axes)
    if scale.shape != (n,):
        raise ValueError(
            f"leaf {path!r} of shape {leaf.shape} has {n} channels along its axes "
            f"{axes}, but there are values of shape {scale.shape} for them: heads that "
            "are shared need heads=(query heads, value heads)"
        )


def _check_apart(groups: Sequence[ScaleGroup]) -> None:
    paths = [path for one in groups for path in one.paths]
    twice = {path for path in paths if paths.count(path) > 1}
    if twice or not paths:
        raise ValueError(
            f"kernels {sorted(twice)} stand in two groups"
            if twice
            else "no kernel stands in a group"
        )


def _check_losses(one: ScaleGroup, losses: jax.Array) -> None:
    if isinstance(losses, jax.core.Tracer):  # the scales are NaN then
        return
    if not jnp.isfinite(losses).any():
        raise ValueError(
            f"all losses of {', '.join(one.paths)} are NaN or infinite: so are inputs "
            "or weights, or numbers overflow in `inspect`"
        )


def _input(one: ScaleGroup, inputs: Mapping[str, jax.Array]) -> jax.Array:
    return _of_group(one, inputs, "input")


def _of_group(one: ScaleGroup, arrays: Mapping[str, jax.Array], what: str) -> jax.Array:
    """What is given for the first of the kernels for which something is."""
    for path in one.paths:
        if path in arrays:
            return arrays[path]
    raise ValueError(
        f"no {what} is given for any of {', '.join(one.paths)}, only for "
        f"{', '.join(arrays)}"
    )


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _widened(tree: Any) -> Any:
    """Floats in float32 at least; structured weights as they are."""

    def one(x: Any) -> Any:
        floats = not is_weight(x) and jnp.issubdtype(x.dtype, jnp.floating)
        return _wide(x) if floats else x

    return jax.tree.map(one, tree, is_leaf=is_weight)
