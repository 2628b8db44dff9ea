# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Sums of the noise of many pairs, each with its weight.

Leaves with matrices of one shape are one computation, whatever their number, so that
the time to compile does not grow with the depth of a model.
"""

import functools
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from wlab.core import MatrixView, from_matrices
from wlab.es._chunks import sum_in_chunks
from wlab.es._leaves import Searched
from wlab.es._noise import Noise, draw_factors, draw_noise
from wlab.es._perturbed import outputs_first

# Numbers of noise that a sum makes at a time.
_AT_ONCE = 1 << 24


def weighted_noise(
    leaves: Sequence[Searched],
    keys: Sequence[jax.Array],
    pairs: jax.Array,
    weights: jax.Array,
    *,
    rank: int,
    kind: Noise,
    signs: bool,
) -> list[jax.Array]:
    """``sum_p weights[p] E_p`` of every leaf, the noise made again from its keys.

    Args:
        leaves: what is searched.
        keys: of each leaf, of the shape of its stacked axes, the epoch folded in.
        pairs: integer `[pairs]`, the numbers that are folded into these.
        weights: float32 `[pairs]`.
        rank: of the noise of matrices, whose E is ``a b^T`` without its scale.
        kind: how it is drawn.
        signs: whether only the signs of the factors count.

    Returns:
        float32, of the leaves' shapes.
    """

    def matrices(key: jax.Array, leaf: Searched) -> jax.Array:
        if leaf.view is None:
            return _dense(key, leaf, pairs, weights, kind)
        return _low_rank(key, leaf, pairs, weights, rank, kind, signs)

    out: list[Any] = [None] * len(leaves)
    for group in _alike([_form(leaf) for leaf in leaves]):
        first = leaves[group[0]]
        together = jnp.concatenate([keys[i].reshape(-1) for i in group])
        one = functools.partial(matrices, leaf=first)
        made = _map_keys(one, together, _numbers(first, rank) * pairs.size)
        start = 0
        for i in group:
            n = keys[i].size
            part = made[start : start + n].reshape(*leaves[i].stack, *made.shape[1:])
            out[i] = _as_leaf(part, leaves[i])
            start += n
    return out


def weighted_kept(
    leaf: Searched, noise: Any, weights: jax.Array, *, signs: bool
) -> jax.Array:
    """``sum_p weights[p] E_p`` of one leaf from noise that was kept.

    Args:
        leaf: whose noise it is.
        noise: what `draw` made, with an axis of pairs in front.
        weights: float32 `[pairs]`.
        signs: as in `weighted_noise`.

    Returns:
        float32, of the leaf's shape.
    """
    if leaf.view is None:
        return jnp.tensordot(weights, noise.astype(jnp.float32), axes=1)
    n_in, n_out = leaf.sides
    n = weights.shape[0]
    a, b = noise
    a = a.reshape(n, math.prod(leaf.stack), n_in, -1)
    b = b.reshape(n, math.prod(leaf.stack), n_out, -1)
    made = jax.vmap(functools.partial(_product, weights=weights, signs=signs), 1)(a, b)
    return _as_leaf(made.reshape(*leaf.stack, n_in, n_out), leaf)


def _form(leaf: Searched) -> Hashable:
    """What leaves must share to be one computation."""
    if leaf.view is None:
        return None, leaf.shape[len(leaf.stack) :], leaf.dtype
    return outputs_first(leaf.view), leaf.sides, leaf.dtype


def _alike(forms: Sequence[Hashable]) -> list[list[int]]:
    groups: dict[Hashable, list[int]] = {}
    for i, form in enumerate(forms):
        groups.setdefault(form, []).append(i)
    return list(groups.values())


def _map_keys(
    fn: Callable[[jax.Array], jax.Array],
    keys: jax.Array,
    numbers: int,
) -> jax.Array:
    """`fn` of every key, as many at a time as the numbers that each draws allow."""
    if keys.size == 1:
        return fn(keys[0])[None]
    at_once = min(keys.size, max(1, _AT_ONCE // max(1, numbers)))
    if at_once == keys.size:
        return jax.vmap(fn)(keys)
    return jax.lax.map(fn, keys, batch_size=at_once if at_once > 1 else None)


def _numbers(leaf: Searched, rank: int) -> int:
    """How many numbers the noise of one member on one layer of the leaf is."""
    if leaf.view is None:
        return math.prod(leaf.shape[len(leaf.stack) :])
    return sum(leaf.sides) * rank


def _low_rank(
    key: jax.Array,
    leaf: Searched,
    pairs: jax.Array,
    weights: jax.Array,
    rank: int,
    kind: Noise,
    signs: bool,
) -> jax.Array:
    n_in, n_out = leaf.sides
    assert leaf.view is not None
    last = outputs_first(leaf.view)

    def some(pairs: jax.Array, weights: jax.Array) -> jax.Array:
        a, b = jax.vmap(
            lambda pair: draw_factors(
                jax.random.fold_in(key, pair),
                *(n_in, n_out, rank, leaf.dtype, kind),
                outputs_first=last,
            )
        )(pairs)
        return _product(a, b, weights=weights, signs=signs)

    return sum_in_chunks(some, pairs, weights, _AT_ONCE // (rank * (n_in + n_out)))


def _dense(
    key: jax.Array, leaf: Searched, pairs: jax.Array, weights: jax.Array, kind: Noise
) -> jax.Array:
    shape = leaf.shape[len(leaf.stack) :]

    def some(pairs: jax.Array, weights: jax.Array) -> jax.Array:
        def one(pair: jax.Array) -> jax.Array:
            return draw_noise(jax.random.fold_in(key, pair), shape, leaf.dtype, kind)

        noise = jax.vmap(one)(pairs)
        return jnp.tensordot(weights, noise.astype(jnp.float32), axes=1)

    return sum_in_chunks(some, pairs, weights, _AT_ONCE // max(1, math.prod(shape)))


def _product(
    a: jax.Array, b: jax.Array, *, weights: jax.Array, signs: bool
) -> jax.Array:
    """``sum_p weights[p] a[p] b[p]^T`` in one product, `[n_in, n_out]`."""
    if signs:
        a, b = jnp.sign(a), jnp.sign(b)
    a = weights[:, None, None] * a.astype(jnp.float32)
    return jnp.einsum("pir,pjr->ij", a, b.astype(jnp.float32))


def _as_leaf(x: jax.Array, leaf: Searched) -> jax.Array:
    view: MatrixView | None = leaf.view
    return x if view is None else from_matrices(x, view, leaf.shape)
