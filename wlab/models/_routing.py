# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Routed experts: every token goes through a few of many gated layers.

A router, in float32, gives each token a probability over the experts; the `k` best
compute, and their outputs are summed with weights (Shazeer et al., 2017, "Outrageously
Large Neural Networks: The Sparsely-Gated Mixture-of-Experts Layer").

Dropless, the tokens are sorted by expert and multiplied in groups of any size, so that
no expert has a limit (Gale et al., 2022, "MegaBlocks"). With a capacity, every expert
has the same number of places for each sequence, and tokens that find none pass by in
the residual stream (Lepikhin et al., 2020, "GShard"; Fedus et al., 2021, "Switch
Transformers"). Places are given by position, a token's choices one after another, not
all first choices before the second ones as in GShard: so what happens to a token
never depends on later ones.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.interpreters import batching

from wlab.core import sharding

__all__ = ["Route", "dropless", "places", "route", "with_capacity"]


class Route(NamedTuple):
    """Where the tokens go."""

    chosen: jax.Array  # [..., k] int32, the best expert first
    weights: jax.Array  # [..., k] float32
    balance: jax.Array  # load-balancing loss, float32 scalar
    z: jax.Array  # z-loss, float32 scalar
    load: jax.Array  # [experts] float32, the part of all choices, which sums to 1


def route(logits: jax.Array, k: int) -> Route:
    r"""The `k` experts of every token, and how evenly they are used.

    The load-balancing loss is

    .. math:: E \sum_e f_e p_e

    with :math:`f_e` the part of all choices that fall on expert `e` and :math:`p_e`
    its mean probability (Fedus et al., 2021, "Switch Transformers", equation 4, there
    for k = 1). It is 1 where all experts are used alike. The z-loss is the mean
    squared log-sum-exp of the logits, which keeps them small (Zoph et al., 2022,
    "ST-MoE").

    The weights are the probabilities of the chosen, scaled to sum to one. For `k = 1`
    that would be the constant 1 and leave the router no gradient: there the
    probability itself is the weight, as in Switch Transformers.

    Args:
        logits: `[..., experts]`, float32.
        k: experts for each token.

    Returns:
        The route.
    """
    experts = logits.shape[-1]
    probabilities = jax.nn.softmax(logits)
    weights, chosen = jax.lax.top_k(probabilities, k)
    if k > 1:
        weights = weights / weights.sum(axis=-1, keepdims=True)
    tokens = math.prod(logits.shape[:-1])
    load = _counts(chosen.reshape(-1), experts).astype(jnp.float32) / (tokens * k)
    mean = probabilities.reshape(tokens, experts).mean(axis=0)
    z = jnp.square(jax.nn.logsumexp(logits, axis=-1)).mean()
    return Route(chosen, weights, experts * jnp.dot(load, mean), z, load)


def _counts(chosen: jax.Array, experts: int) -> jax.Array:
    """How often each expert is chosen; numbers past the last one count nowhere."""
    return jnp.zeros(experts, jnp.int32).at[chosen].add(1, mode="drop")


def dropless(
    x: jax.Array,
    chosen: jax.Array,
    weights: jax.Array,
    kernels: tuple[jax.Array, jax.Array, jax.Array],
) -> jax.Array:
    """Every token through all of its experts.

    Args:
        x: `[tokens, width]`.
        chosen: `[tokens, k]`; a number past the last expert is computed nowhere and
            adds nothing.
        weights: `[tokens, k]`.
        kernels: gate and up `[experts, width, hidden]`, down
            `[experts, hidden, width]`.

    Returns:
        The weighted sum over each token's experts, `[tokens, width]`.
    """
    tokens, k = chosen.shape
    experts = kernels[0].shape[0]
    order = jnp.argsort(chosen.reshape(-1), stable=True)
    sizes = _counts(chosen.reshape(-1), experts)
    take = {"mode": "promise_in_bounds"}
    rows = x.at[order // k].get(**take)
    gate, up, down = kernels
    hidden = nn.silu(_grouped(rows, gate, sizes)) * _grouped(rows, up, sizes)
    out = _grouped(hidden, down, sizes)
    back = jnp.argsort(order)
    each = out.at[back].get(unique_indices=True, **take).reshape(tokens, k, -1)
    return jnp.einsum("tkd,tk->td", each, weights.astype(x.dtype))


def _grouped(rows: jax.Array, kernel: jax.Array, sizes: jax.Array) -> jax.Array:
    """Groups of rows, one after another, each times its own matrix.

    Rows in no group come out as zeros, and so do their gradients: `ragged_dot` does not
    promise either.
    """
    grouped = (jnp.arange(rows.shape[0]) < sizes.sum())[:, None]
    rows = jnp.where(grouped, rows, 0)
    return jnp.where(grouped, jax.lax.ragged_dot(rows, kernel, sizes), 0)


def _batch_anywhere(rule: Callable[..., Any]) -> Callable[..., Any]:
    """Extends the rule that `jax.vmap` has for `ragged_dot`.

    In jax it raises unless all three operands are batched along axis 0. Here an
    operand batched along another axis is moved, one that is not is repeated, and with
    none batched, as in a layer that a vmap around it does not reach, nothing is done.
    A vmap of a vmap goes one after another: jax does not lower more than one batch.
    """

    def batch(axis_data: Any, args: Any, dims: Any, **params: Any) -> Any:
        if all(dim is None for dim in dims):
            return _ragged_dot_p.bind(*args, **params), None
        args = [
            jnp.broadcast_to(x, (axis_data.size, *x.shape))
            if dim is None
            else jnp.moveaxis(x, dim, 0)
            for x, dim in zip(args, dims, strict=True)
        ]
        if args[2].ndim > 2:
            return jax.lax.map(lambda a: _ragged_dot_p.bind(*a, **params), args), 0
        return rule(axis_data, args, (0, 0, 0), **params)

    return batch


# Found by tracing, since the primitive has no public name; nothing is computed, which
# would keep several hosts from meeting later.
_ragged_dot_p = (
    jax.make_jaxpr(jax.lax.ragged_dot)(
        jax.ShapeDtypeStruct((1, 1), jnp.float32),
        jax.ShapeDtypeStruct((1, 1, 1), jnp.float32),
        jax.ShapeDtypeStruct((1,), jnp.int32),
    )
    .eqns[0]
    .primitive
)
batching.fancy_primitive_batchers[_ragged_dot_p] = _batch_anywhere(
    batching.fancy_primitive_batchers[_ragged_dot_p]
)


def places(chosen: jax.Array, experts: int, capacity: int) -> jax.Array:
    """The place of each choice among all places of one sequence.

    Args:
        chosen: `[length, k]`.
        experts: their number.
        capacity: places of each expert.

    Returns:
        `[length, k]`: `expert * capacity + i` for the expert's `i`-th token, and
        `experts * capacity`, which is no place, for those that come too late.
    """
    flat = chosen.reshape(-1)
    hits = jax.nn.one_hot(flat, experts, dtype=jnp.int32)
    before = jnp.cumsum(hits, axis=0) - hits
    rank = jnp.take_along_axis(before, flat[:, None], axis=1)[:, 0]
    place = jnp.where(rank < capacity, flat * capacity + rank, experts * capacity)
    return place.reshape(chosen.shape)


def with_capacity(
    x: jax.Array,
    chosen: jax.Array,
    weights: jax.Array,
    kernels: tuple[jax.Array, jax.Array, jax.Array],
    capacity: int,
) -> tuple[jax.Array, jax.Array]:
    """Tokens through those of their experts that have a place for them.

    Args:
        x: `[batch, length, width]`.
        chosen: `[batch, length, k]`.
        weights: `[batch, length, k]`.
        kernels: as in `dropless`.
        capacity: places of each expert for each sequence.

    Returns:
        The weighted sum over each token's experts, `[batch, length, width]`, and the
        part of all choices that were dropped.
    """
    batch, length, width = x.shape
    experts = kernels[0].shape[0]
    total = experts * capacity
    place = jax.vmap(lambda c: places(c, experts, capacity))(chosen)

    def dispatch(x: jax.Array, place: jax.Array) -> jax.Array:
        tokens = jnp.broadcast_to(jnp.arange(length)[:, None], place.shape)
        source = jnp.full(total, length).at[place].set(tokens, mode="drop")
        return x.at[source].get(mode="fill", fill_value=0)

    placed = jax.vmap(dispatch)(x, place).reshape(batch, experts, capacity, width)
    # First where the sequences are, then where the experts are: an all-to-all.
    rows = tuple(name for name in sharding.BATCH if name != "expert")
    placed = sharding.constrain(placed, sharding.BATCH, None, None, None)
    placed = sharding.constrain(placed, rows, "expert", None, None)
    gate, up, down = kernels
    hidden = nn.silu(jnp.einsum("becd,edh->bech", placed, gate))
    hidden = hidden * jnp.einsum("becd,edh->bech", placed, up)
    hidden = sharding.constrain(hidden, rows, "expert", None, "tensor")
    out = jnp.einsum("bech,ehd->becd", hidden, down)
    out = sharding.constrain(out, rows, "expert", None, None)
    out = sharding.constrain(out, sharding.BATCH, None, None, None)

    def combine(out: jax.Array, place: jax.Array) -> jax.Array:
        return out.at[place].get(mode="fill", fill_value=0)

    each = jax.vmap(combine)(out.reshape(batch, total, width), place)
    y = jnp.einsum("blkd,blk->bld", each, weights.astype(x.dtype))
    return y, (place == total).mean(dtype=jnp.float32)
