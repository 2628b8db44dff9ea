# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
r"""EGGROLL: evolution with low-rank noise on every matrix (a strategy).

A member's matrix is the common one plus a product of two skinny ones, so that a
population runs as one product for all members and two small ones for each:

.. math::

    W_i = W + \frac{\sigma s_i}{\sqrt r} A_i B_i^\top, \qquad
    g = -\frac{\sigma}{\sqrt{N r}} \sum_{i=1}^N z_i s_i A_i B_i^\top

where :math:`s_i = \pm 1` is the sign of a member in its antithetic pair, whose noise is
the same, and z the shaped fitness. A and B are Gaussian and follow from a key that is
folded with the epoch and the pair, so nothing of them is kept. The sum has rank
min(N r / 2, m, n). What is no matrix has Gaussian noise of its own shape.

g is not divided by sigma: with z of variance 1 its entries are of the size of sigma,
whatever N, and a learning rate is in units of sigma. Every optax chain takes it.

`open_es` is the same search with Gaussian noise of full shape on every leaf, which is
what EGGROLL replaces.

What differs from the authors' code: keys follow from paths, not from positions, unless
``keys="position"``; noise is fresh at every epoch by default; and embeddings, which
they leave out, are matrices.

References:
    Sarkar, Fellows, Duque, Letcher, Villares, Sims, Wibault, Samsonov, Cope, Liesen,
    Li, Seier, Wolf, Berdica, Mohl, Goldie, Courville, Sevegnani, Whiteson and Foerster,
    `Evolution Strategies at the Hyperscale <https://arxiv.org/abs/2511.16652>`_, 2025.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax import lax

from wlab.core import (
    LowRank,
    Select,
    Strategy,
    Views,
    is_weight,
    map_with_path,
    typed_key,
)
from wlab.es._estimate import weighted_kept, weighted_noise
from wlab.es._leaves import Dense, Searched, by_path, searched
from wlab.es._members import Keys, Place, as_member, fold_all, leaf_keys
from wlab.es._noise import Noise, draw_noise
from wlab.es._perturbed import Perturbed, drawn_factors
from wlab.es._shaping import (
    Shaping,
    check_shaping,
    pair_signs,
    shape_fitness,
)
from wlab.es._ternary import pack_ternary, unpack_ternary

Scalar: TypeAlias = float | jax.Array
Reduce = Literal["gather", "sum"]


class EvolutionState(NamedTuple):
    """What a search carries from epoch to epoch; nothing of a parameter's size."""

    key: jax.Array  # typed key, the same for the whole run
    epoch: jax.Array  # updates done, int32 scalar
    sigma: jax.Array  # size of the noise now, float32 scalar
    failed: jax.Array  # members without finite fitness in the last update, int32


def eggroll(
    sigma: optax.ScalarOrSchedule = 0.1,
    rank: int = 1,
    *,
    noise_reuse: int = 1,
    group_size: int | None = None,
    dense: Dense = "perturb",
    shaping: Shaping = "normalise",
    signs: bool = False,
    select: Select | None = None,
    views: Views | None = None,
    noise: Noise = "normal",
    keys: Keys = "path",
    axis_name: str | None = None,
    reduce: Reduce = "gather",
) -> Strategy:
    """Evolution with low-rank noise on matrices.

    Args:
        sigma: size of the noise, or a schedule over epochs.
        rank: terms in a matrix's noise. Above the smaller side of a matrix it only
            brings the noise nearer to a Gaussian.
        noise_reuse: epochs for which noise is held; 1: fresh at each; 0: the same for
            ever.
        group_size: members in a row whose fitness is compared; None: all.
        dense: whether what is no matrix (biases, norms) has dense noise ("perturb") or
            none, and stays ("freeze").
        shaping: from fitness to weights; see `shape_fitness`. With "baseline" the first
            two members of each group have no noise.
        signs: whether the update takes the signs of the factors only.
        select: which leaves are searched, as in `wlab.core.select`; the others stay.
            None: all of floats.
        views: which axes of a leaf are inputs and outputs, where names do not tell.
        noise: "normal", or "binomial", which is cheaper to draw; see
            `wlab.es.draw_noise`.
        keys: whether a leaf's noise is keyed by its "path" or, as in the authors' code,
            by its "position" in the flattened tree.
        axis_name: inside `jax.shard_map` or `jax.pmap`: the mesh axis among which
            the population is divided. `fitness` is then that of this device's members,
            in the order of devices.
        reduce: with `axis_name`, "gather": every device is told all fitness and sums
            the noise of all members, so that numbers are those of one device; "sum":
            each sums its own members, and the sums are added, which communicates a
            gradient.

    Returns:
        A strategy. `update` returns the pseudo-gradients as arrays of the leaves'
        dtypes, also for structured leaves, zero for what is not searched.

    Raises:
        ValueError: at build time for values out of range; at `init` for a pattern that
            matches nothing or a tree in which nothing is searched; at `update` for an
            odd population or a group size that does not divide it.
        TypeError: at `init` for a selected leaf that holds no floats.

    Examples:
        >>> es = eggroll(sigma=0.1)
        >>> params = {"w": jnp.ones((3, 2))}
        >>> state = es.init(jax.random.key(0), params)
        >>> es.perturb(state, params, 0)["w"].shape
        (3, 2)
        >>> grads, state = es.update(state, params, jnp.array([1.0, 0.0]))
        >>> grads["w"].shape, int(state.epoch)
        ((3, 2), 1)
    """
    if rank < 1:
        raise ValueError(f"rank={rank}: a matrix's noise has at least one term")
    return _strategy(
        sigma,
        rank,
        low_rank=True,
        noise_reuse=noise_reuse,
        group_size=group_size,
        dense=dense,
        shaping=shaping,
        signs=signs,
        select=select,
        views=views,
        kind=noise,
        keys=keys,
        axis_name=axis_name,
        reduce=reduce,
    )


def open_es(
    sigma: optax.ScalarOrSchedule = 0.1,
    *,
    noise_reuse: int = 1,
    group_size: int | None = None,
    shaping: Shaping = "normalise",
    select: Select | None = None,
    noise: Noise = "normal",
    keys: Keys = "path",
    axis_name: str | None = None,
    reduce: Reduce = "gather",
) -> Strategy:
    """Evolution with dense Gaussian noise on every leaf.

    Each member has weights of its own, so a population costs as many dense products and
    as much memory as it has members: it is the baseline of `eggroll`, whose arguments
    these are and whose scale of gradients it shares.

    References:
        Salimans, Ho, Chen, Sidor and Sutskever, `Evolution Strategies as a Scalable
        Alternative to Reinforcement Learning <https://arxiv.org/abs/1703.03864>`_,
        2017.
    """
    return _strategy(
        sigma,
        1,
        low_rank=False,
        noise_reuse=noise_reuse,
        group_size=group_size,
        dense="perturb",
        shaping=shaping,
        signs=False,
        select=select,
        views=None,
        kind=noise,
        keys=keys,
        axis_name=axis_name,
        reduce=reduce,
    )


def _strategy(
    sigma: optax.ScalarOrSchedule,
    rank: int,
    *,
    low_rank: bool,
    noise_reuse: int,
    group_size: int | None,
    dense: Dense,
    shaping: Shaping,
    signs: bool,
    select: Select | None,
    views: Views | None,
    kind: Noise,
    keys: Keys,
    axis_name: str | None,
    reduce: Reduce,
) -> Strategy:
    _check(sigma, noise_reuse, group_size, dense, shaping, kind, keys, reduce)
    baseline = shaping == "baseline"

    def leaves_of(params: Any) -> list[Searched]:
        return searched(
            params, low_rank=low_rank, dense=dense, select=select, views=views
        )

    def keys_of(state: EvolutionState, params: Any, leaves: list[Searched]) -> Any:
        """The keys of this epoch's noise, without the pair."""
        places = [Place(leaf.path, leaf.stack) for leaf in leaves]
        positions = [*(leaf.position for leaf in leaves), len(by_path(params))]
        epoch = state.epoch // noise_reuse if noise_reuse else 0
        return fold_all(leaf_keys(state.key, places, positions, keys), epoch)

    def init(key: jax.Array | int, params: Any) -> EvolutionState:
        leaves_of(params)
        return EvolutionState(
            key=typed_key(key),
            epoch=jnp.zeros((), jnp.int32),
            sigma=_at(sigma, jnp.zeros((), jnp.int32)),
            failed=jnp.zeros((), jnp.int32),
        )

    def scale_of(state: EvolutionState) -> jax.Array:
        return state.sigma * rank**-0.5 if low_rank else state.sigma

    def draw_all(state: EvolutionState, params: Any, member: Any) -> dict[str, Any]:
        """The noise of a member's pair by path: factors, or an array."""
        leaves = leaves_of(params)
        folded = fold_all(keys_of(state, params, leaves), as_member(member).pair)
        return {
            leaf.path: _factors(key, leaf, rank, kind)
            if leaf.view
            else _array(key, leaf, kind)
            for leaf, key in zip(leaves, folded, strict=True)
        }

    def perturb(
        state: EvolutionState,
        params: Any,
        member: Any,
        noise: Any = None,
    ) -> Any:
        leaves = leaves_of(params)
        known = {leaf.path: (i, leaf) for i, leaf in enumerate(leaves)}
        pair, sign = as_member(member)
        folded = fold_all(keys_of(state, params, leaves), pair)
        sign = jnp.asarray(sign, jnp.float32)
        if baseline:
            sign = jnp.where(_no_noise(pair, group_size), 0.0, sign)
        low, full = scale_of(state) * sign, state.sigma * sign

        def one(path: str, leaf: Any) -> Any:
            if path not in known:
                return leaf
            i, found = known[path]
            if found.view is None:
                eps = noise[path] if noise else _array(folded[i], found, kind)
                return _add(leaf, full, eps)
            if noise:
                a, b = noise[path]
                return LowRank._make(leaf, a, b, low, found.view)
            data = jax.random.key_data(folded[i])
            impl = jax.random.key_impl(folded[i])
            return Perturbed(leaf, data, low, rank, found.view, kind, found.dtype, impl)

        return map_with_path(one, params)

    def update(
        state: EvolutionState,
        params: Any,
        fitness: jax.Array,
        members: jax.Array | None = None,
        noise: Any = None,
    ) -> tuple[Any, EvolutionState]:
        leaves = leaves_of(params)
        told = _Told.of(fitness, members, shaping, group_size, axis_name, reduce)
        pairs, weights = told.pairs, told.weights
        if baseline:
            weights = jnp.where(_no_noise(pairs, group_size), 0.0, weights)
        folded = keys_of(state, params, leaves)
        if noise:
            if axis_name and reduce == "gather":
                raise ValueError(
                    "noise that is kept is that of a device's own members: take "
                    "reduce='sum' with it"
                )
            sums = [
                weighted_kept(leaf, noise[leaf.path], weights, signs=signs)
                for leaf in leaves
            ]
        else:
            sums = weighted_noise(
                leaves, folded, pairs, weights, rank=rank, kind=kind, signs=signs
            )
        if axis_name and reduce == "sum":
            sums = lax.psum(sums, axis_name)
        made = {}
        root = jnp.sqrt(jnp.maximum(told.alive, 1).astype(jnp.float32))
        for leaf, total in zip(leaves, sums, strict=True):
            scale = scale_of(state) if leaf.view else state.sigma
            made[leaf.path] = (-(scale / root) * total).astype(leaf.dtype)
        epoch = jnp.asarray(optax.safe_increment(state.epoch))
        state = EvolutionState(
            key=state.key,
            epoch=epoch,
            sigma=_at(sigma, epoch) if callable(sigma) else state.sigma,
            failed=told.population - told.alive,
        )
        return map_with_path(lambda p, x: made.get(p, _nothing(x)), params), state

    return Strategy(init, perturb, update, draw_all)


class _Told(NamedTuple):
    """The fitness of a population, as weights of its pairs' noise."""

    pairs: jax.Array  # integer [n]
    weights: jax.Array  # float32 [n]
    alive: jax.Array  # members with finite fitness, int32 scalar
    population: int

    @classmethod
    def of(
        cls,
        fitness: jax.Array,
        members: jax.Array | None,
        shaping: Shaping,
        group_size: int | None,
        axis_name: str | None,
        reduce: Reduce,
    ) -> "_Told":
        fitness = jnp.asarray(fitness)
        if members is None and fitness.ndim == 1 and fitness.shape[0] % 2:
            raise ValueError(
                f"{fitness.shape[0]} members are no antithetic pairs: take an even "
                "population, or tell their numbers in members="
            )
        if members is not None and jnp.shape(members) != fitness.shape:
            raise ValueError(
                f"fitness {fitness.shape} and members {jnp.shape(members)} are one "
                "number each for every member: give them the same shape"
            )
        mine, n = fitness, fitness.shape[0]
        first = jnp.zeros((), jnp.int32)
        if axis_name is not None:
            index = lax.axis_index(axis_name)
            first = index * (n // 2)
            packed = shaping == "sign" and reduce == "gather" and members is None
            if packed:
                return cls._of_signs(mine, axis_name)
            fitness = lax.all_gather(mine, axis_name, tiled=True)
            if members is not None and reduce == "gather":
                members = lax.all_gather(members, axis_name, tiled=True)
        z = shape_fitness(fitness, shaping, group_size)
        alive = jnp.isfinite(fitness).sum(dtype=jnp.int32)
        population = fitness.shape[0]
        if axis_name is not None and reduce == "sum":
            z = lax.dynamic_slice_in_dim(z, 2 * first, n)
        elif axis_name is not None:
            first = jnp.zeros((), jnp.int32)
        if members is not None:
            pairs, signs = as_member(members)
            return cls(pairs, z * signs, alive, population)
        pairs = first + jnp.arange(z.shape[0] // 2, dtype=jnp.int32)
        plus, minus = z.reshape(-1, 2).T
        return cls(pairs, plus - minus, alive, population)

    @classmethod
    def _of_signs(cls, fitness: jax.Array, axis_name: str) -> "_Told":
        """The signs of all devices' pairs, sent as five to a byte."""
        signs = pair_signs(fitness).reshape(-1, 2)[:, 0].astype(jnp.int8)
        n = signs.shape[0]
        sent = lax.all_gather(pack_ternary(signs), axis_name)
        signs = jax.vmap(lambda packed: unpack_ternary(packed, n))(sent).reshape(-1)
        alive = lax.psum(jnp.isfinite(fitness).sum(dtype=jnp.int32), axis_name)
        pairs = jnp.arange(signs.shape[0], dtype=jnp.int32)
        return cls(pairs, 2.0 * signs, alive, 2 * signs.shape[0])


def _check(
    sigma: Any,
    noise_reuse: int,
    group_size: int | None,
    dense: str,
    shaping: Shaping,
    noise: str,
    keys: str,
    reduce: str,
) -> None:
    if not callable(sigma) and not isinstance(sigma, jax.Array) and sigma < 0:
        raise ValueError(f"sigma={sigma}: the size of the noise is not negative")
    if noise_reuse < 0:
        raise ValueError(
            f"noise_reuse={noise_reuse}: epochs for which noise is held, 0 for ever"
        )
    for name, value, known in (
        ("dense", dense, ("perturb", "freeze")),
        ("noise", noise, ("normal", "binomial")),
        ("keys", keys, ("path", "position")),
        ("reduce", reduce, ("gather", "sum")),
    ):
        if value not in known:
            raise ValueError(f"{name}={value!r}: choose of {list(known)}")
    check_shaping(shaping)
    if group_size is not None and group_size < 1:
        raise ValueError(f"group_size={group_size}: members of a group, or None")
    if shaping == "baseline" and group_size is not None and group_size % 2:
        raise ValueError(
            f"group_size={group_size}: with shaping='baseline' a group begins with the "
            "pair that has no noise, so take an even one"
        )


def _at(sigma: optax.ScalarOrSchedule, epoch: jax.Array) -> jax.Array:
    value: Any = sigma(epoch) if isinstance(sigma, Callable) else sigma  # type: ignore[arg-type]
    return jnp.asarray(value, jnp.float32)


def _no_noise(pair: Any, group_size: int | None) -> jax.Array:
    """Whether a pair is the first of its group."""
    pair = jnp.asarray(pair)
    return (pair % (group_size // 2) if group_size else pair) == 0


def _factors(keys: jax.Array, leaf: Searched, rank: int, noise: Noise) -> Any:
    assert leaf.view is not None
    return drawn_factors(keys, leaf.shape, leaf.view, rank, leaf.dtype, noise)


def _array(keys: jax.Array, leaf: Searched, noise: Noise) -> jax.Array:
    shape = leaf.shape[len(leaf.stack) :]

    def one(key: jax.Array) -> jax.Array:
        return draw_noise(key, shape, leaf.dtype, noise)

    if not leaf.stack:
        return one(keys)
    return jax.vmap(one)(keys.reshape(-1)).reshape(leaf.shape)


def _add(leaf: Any, scale: jax.Array, eps: jax.Array) -> jax.Array:
    """A dense leaf with its noise, summed in float32 and rounded once."""
    dense = leaf.materialise() if is_weight(leaf) else leaf
    acc = jnp.promote_types(dense.dtype, jnp.float32)
    return (dense.astype(acc) + scale * eps.astype(acc)).astype(dense.dtype)


def _nothing(leaf: Any) -> Any:
    """No change: for a structured leaf, of what is stored."""
    return jax.tree.map(jnp.zeros_like, leaf)
