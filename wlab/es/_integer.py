# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
r"""EGGROLL in integers: a search over int8 weights without any floats (a strategy).

Noise is a slice of a table of integers whose place follows from the leaf's key and the
number of the pair. A pair's fitness is the sign of which member is better, so that a
population tells one ternary digit for each pair. A weight moves by one where the sum

.. math::

    Z = \sum_p f_p A_p B_p^\top, \qquad
    |Z| \cdot 16 \ge t \lfloor\sqrt{P}\rfloor \cdot 256

over the P pairs is larger than chance makes it: t is 16 times the quantile of a normal
distribution that leaves a share alpha of the weights outside.

References:
    Sarkar et al., `Evolution Strategies at the Hyperscale
    <https://arxiv.org/abs/2511.16652>`_, 2025, appendices G and H.
"""

import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from wlab.core import Noisy, Strategy, leaves_with_paths, map_with_path, typed_key
from wlab.core._tree import stacked_axes
from wlab.es._chunks import sum_in_chunks
from wlab.es._members import Keys, Place, as_member, fold_all, leaf_keys

_BITS = 4  # of the noise's fraction
# Numbers of noise that an update reads at a time.
_AT_ONCE = 1 << 24


class IntegerState(NamedTuple):
    """What a search over integers carries."""

    key: jax.Array  # typed key, the same for the whole run
    table: jax.Array  # int8 noise, of which 16 stands for 1
    epoch: jax.Array  # updates done, int32 scalar


class _Leaf(NamedTuple):
    path: str
    shape: tuple[int, ...]
    stack: tuple[int, ...]  # sizes of the stacked axes
    matrix: bool

    @property
    def own(self) -> tuple[int, ...]:
        """The shape of one layer."""
        return self.shape[len(self.stack) :]

    def numbers(self, rank: int) -> int:
        """How many numbers of the table one layer's noise is."""
        return rank * sum(self.own) if self.matrix else 2 * math.prod(self.own)


def noise_thresholds(
    steps: int = 1000, decay: float = 4.0, alpha: float = 1.0
) -> np.ndarray:
    """The threshold t of every step, for a share of moving weights that falls.

    The share is ``alpha / ((2^decay - 1) step / steps + 1)``.

    Args:
        steps: of the run.
        decay: powers of two by which the share falls over the run; below 1 it stays.
        alpha: the share at the first step, above 0, at most 1.

    Returns:
        int32 `[steps]`, computed on the host in float64.

    Raises:
        ValueError: for a share out of range.
    """
    if not 0 < alpha <= 1:
        raise ValueError(f"alpha={alpha}: the share of weights that move is in (0, 1]")
    fall = 2.0**decay - 1 if decay >= 1 else 0.0
    shares = [alpha / (fall * step / steps + 1) for step in range(steps)]
    return np.array([threshold(share) for share in shares], np.int32)


def threshold(alpha: float) -> int:
    """16 times the two-sided normal quantile that leaves a share alpha outside."""
    return int(16 * statistics.NormalDist().inv_cdf(1 - alpha / 2)) if alpha < 1 else 0


def noise_table(key: jax.Array, size: int) -> jax.Array:
    """int8 normal noise of standard deviation 16, truncated toward zero, `[size]`."""
    x = jnp.trunc(16 * jax.random.normal(key, (size,)))
    return jnp.clip(x, -127, 127).astype(jnp.int8)


def integer_eggroll(
    thresholds: Sequence[int] | np.ndarray,
    sigma_shift: int = 4,
    rank: int = 1,
    *,
    noise_reuse: int = 1,
    table_size: int = 1 << 22,
    use_clt: bool = True,
    keys: Keys = "path",
) -> Strategy:
    """Evolution of int8 weights by one at a time.

    No floating-point operation is in `perturb` and `update`. Leaves are int8: matrices
    as (outputs, inputs), with a leading axis of layers where there are norms beside
    them, and vectors, whose noise is dense.

    Args:
        thresholds: one for every epoch, as from `noise_thresholds`; the last one holds
            from then on.
        sigma_shift: the noise is ``2 ** -sigma_shift`` times a normal one.
        rank: terms in a matrix's noise.
        noise_reuse: epochs for which noise is held; 0: for ever.
        table_size: numbers in the table, a power of two; noise of several members
            overlaps the more the smaller it is.
        use_clt: whether the products of the noise are summed, or only their signs.
        keys: as in `wlab.es.eggroll`.

    Returns:
        A strategy. `perturb` returns a tree whose matrices are
        `wlab.core.Noisy`; `update` takes integer fitness of whole pairs side by
        side, also where `members` numbers them, and returns int8 differences, -1, 0 or
        1, for `optax.apply_updates`.

    Raises:
        ValueError: at build time for values out of range; at `init` for a leaf whose
            noise is larger than the table; at `update` for an odd population.
        TypeError: at `init` for a leaf that is not int8; at `update` for fitness that
            is not of integers.

    Examples:
        >>> es = integer_eggroll([0], table_size=64)
        >>> params = {"w": jnp.ones((3, 2), jnp.int8)}
        >>> state = es.init(jax.random.key(0), params)
        >>> updates, state = es.update(state, params, jnp.array([5, 2]))
        >>> updates["w"].dtype
        dtype('int8')
    """
    limits = np.asarray(thresholds)
    whole = np.issubdtype(limits.dtype, np.integer)
    if limits.ndim != 1 or not limits.size or not whole or limits.min() < 0:
        raise ValueError("thresholds: a vector of integers from 0, one for each epoch")
    limits = limits.astype(np.int32)
    if table_size < 2 or table_size.bit_count() != 1:
        raise ValueError(f"table_size={table_size} is no power of two")
    if rank < 1 or sigma_shift < 0 or noise_reuse < 0:
        raise ValueError(
            f"rank={rank} is positive, sigma_shift={sigma_shift} and "
            f"noise_reuse={noise_reuse} are not negative"
        )

    def init(key: jax.Array | int, params: Any) -> IntegerState:
        key = typed_key(key)
        for leaf in _leaves(params):
            if (n := leaf.numbers(rank)) > table_size:
                raise ValueError(
                    f"leaf {leaf.path!r} of shape {leaf.shape} has noise of {n} "
                    f"numbers and the table {table_size}: take a larger table_size"
                )
        table = noise_table(jax.random.fold_in(key, 0x7AB1E), table_size)
        return IntegerState(key, table, jnp.zeros((), jnp.int32))

    def places(state: IntegerState, params: Any) -> dict[str, Any]:
        """By path: the leaf, and where its noise of this epoch begins, without pair."""
        leaves = _leaves(params)
        epoch = state.epoch // noise_reuse if noise_reuse else 0
        folded = fold_all(
            leaf_keys(
                state.key,
                [Place(leaf.path, leaf.stack) for leaf in leaves],
                [*range(len(leaves)), len(leaves)],
                keys,
            ),
            epoch,
        )
        return {
            leaf.path: (leaf, jax.random.key_data(k)[..., 0])
            for leaf, k in zip(leaves, folded, strict=True)
        }

    def read(table: jax.Array, leaf: _Leaf, start: jax.Array, pair: Any) -> Any:
        """The noise of one layer: factors a and b, or a dense array in int32."""
        n = leaf.numbers(rank)
        begin = (start ^ _hash(pair)) & jnp.uint32(table_size - 1)
        # A slice that would pass the end is moved before it.
        values = jax.lax.dynamic_slice(table, (begin.astype(jnp.int32),), (n,))
        if not leaf.matrix:
            two = values.astype(jnp.int32).reshape(*leaf.own, 2)
            return two[..., 0] * two[..., 1]
        outputs, inputs = leaf.own
        values = values.reshape(outputs + inputs, rank)
        return values[inputs:], values[:inputs]

    def layers(table: jax.Array, leaf: _Leaf, starts: jax.Array, pair: Any) -> Any:
        flat = jax.vmap(lambda s: read(table, leaf, s, pair))(starts.reshape(-1))
        return jax.tree.map(lambda x: x.reshape(*leaf.stack, *x.shape[1:]), flat)

    def draw(state: IntegerState, params: Any, member: Any) -> dict[str, Any]:
        pair = as_member(member).pair
        return {
            path: layers(state.table, leaf, starts, pair)
            for path, (leaf, starts) in places(state, params).items()
        }

    def perturb(
        state: IntegerState, params: Any, member: Any, noise: Any = None
    ) -> Any:
        sign = as_member(member).sign
        noise = draw(state, params, member) if noise is None else noise
        shift = _BITS + sigma_shift

        def one(path: str, w: jax.Array) -> Any:
            made = noise[path]
            if isinstance(made, tuple):
                a, b = made
                stack = w.shape[: w.ndim - 2]
                a = a * jnp.asarray(sign).astype(jnp.int8)
                return Noisy(w, a, b, jnp.full(stack, shift, jnp.int32))
            made = made * jnp.asarray(sign).astype(jnp.int32)
            moved = w.astype(jnp.int32) + (made >> shift)
            return jnp.clip(moved, -127, 127).astype(jnp.int8)

        return map_with_path(one, params)

    def update(
        state: IntegerState,
        params: Any,
        fitness: jax.Array,
        members: jax.Array | None = None,
        noise: Any = None,
    ) -> tuple[Any, IntegerState]:
        if noise is not None:
            raise ValueError(
                "a search over integers reads its noise again: leave noise= out"
            )
        signs = fitness_signs(fitness)
        pairs = jnp.arange(signs.shape[0], dtype=jnp.int32)
        if members is not None:
            pairs = as_member(members[::2]).pair.astype(jnp.int32)
        epoch = jnp.minimum(state.epoch, limits.size - 1)
        limit = jnp.asarray(limits)[epoch] * math.isqrt(signs.shape[0])
        limit = limit * (256 if use_clt else 1)
        moved = {}
        for path, (leaf, starts) in places(state, params).items():
            total = jax.vmap(
                lambda s, leaf=leaf: _sums(
                    lambda pair: read(state.table, leaf, s, pair),
                    pairs,
                    signs,
                    leaf.numbers(rank),
                    use_clt,
                )
            )(starts.reshape(-1)).reshape(leaf.shape)
            moved[path] = (total, limit)

        def one(path: str, w: jax.Array) -> jax.Array:
            total, limit = moved[path]
            step = jnp.where(total > 0, 1, -1)
            step = jnp.where(jnp.abs(total) * 16 < limit, 0, step)
            new = jnp.clip(w.astype(jnp.int32) + step, -127, 127)
            return (new - w.astype(jnp.int32)).astype(jnp.int8)

        after = state._replace(epoch=state.epoch + 1)
        return map_with_path(one, params), after

    return Strategy(init, perturb, update, draw)


def fitness_signs(fitness: jax.Array) -> jax.Array:
    """+1 where the first of a pair is better, -1 where the second, 0 if equal.

    Args:
        fitness: integers `[members]`, pairs side by side.

    Returns:
        int8 `[pairs]`.

    Raises:
        ValueError: for an odd population.
        TypeError: for fitness that is not of integers.
    """
    if not jnp.issubdtype(fitness.dtype, jnp.integer):
        raise TypeError(
            f"fitness of {fitness.dtype}: a search over integers compares integers, "
            "such as sums of wlab.models.egg.log_likelihood"
        )
    if fitness.ndim != 1 or fitness.shape[0] % 2:
        raise ValueError(
            f"fitness of shape {fitness.shape} is not of antithetic pairs: give one "
            "number for each of an even population"
        )
    plus, minus = fitness.reshape(-1, 2).T
    return jnp.sign(plus - minus).astype(jnp.int8)


def _sums(
    read: Any, pairs: jax.Array, signs: jax.Array, numbers: int, use_clt: bool
) -> jax.Array:
    """The sum over pairs of their noise times their sign, int32."""

    def some(pairs: jax.Array, signs: jax.Array) -> jax.Array:
        made = jax.vmap(read)(pairs)
        if not isinstance(made, tuple):
            if not use_clt:
                made = jnp.sign(made)
            extra = (1,) * (made.ndim - 1)
            return (made * signs.astype(jnp.int32).reshape(-1, *extra)).sum(0)
        a, b = made if use_clt else jax.tree.map(jnp.sign, made)
        a = a * signs[:, None, None]
        return _outer(a, b)

    return sum_in_chunks(some, pairs, signs, _AT_ONCE // numbers)


def _outer(a: jax.Array, b: jax.Array) -> jax.Array:
    """The sum over pairs of their outer products, in int32."""
    return jnp.einsum("por,pir->oi", a, b, preferred_element_type=jnp.int32)


def _hash(pair: Any) -> jax.Array:
    x = jnp.asarray(pair).astype(jnp.uint32)
    return ((x >> 16) ^ x) * jnp.uint32(0x45D9F3B)


def _leaves(params: Any) -> list[_Leaf]:
    named = leaves_with_paths(params)
    shapes = {path: tuple(leaf.shape) for path, leaf in named}
    depth = stacked_axes(shapes)
    out = []
    for path, leaf in named:
        if leaf.dtype != jnp.int8:
            raise TypeError(
                f"leaf {path!r} of shape {leaf.shape} holds {leaf.dtype}: a search "
                "over integers moves int8"
            )
        shape = shapes[path]
        own = len(shape) - depth[path]
        if own not in (0, 1, 2):
            raise ValueError(
                f"leaf {path!r} of shape {shape} is no vector or matrix, nor a stack "
                "of them: reshape it to (outputs, inputs)"
            )
        out.append(_Leaf(path, shape, shape[: depth[path]], own == 2))
    return out
