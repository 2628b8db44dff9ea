# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""The members of a population by number, and the keys of their noise."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from wlab.core._keys import fold_paths

Keys = Literal["path", "position"]


class Member(NamedTuple):
    """A member of a population: its antithetic pair, and which of the two it is.

    Members 2 j and 2 j + 1 are pair j with signs +1 and -1. Under `jax.vmap` over
    signs inside one over pairs, the two share one draw of noise; over numbers of
    members, each makes its own.
    """

    pair: Any  # number of the pair, integer scalar
    sign: Any  # +1 or -1


def as_member(member: Any) -> Member:
    """The pair and the sign of a member given by its number, or as both."""
    if isinstance(member, Member):
        return member
    member = jnp.asarray(member)
    if not jnp.issubdtype(member.dtype, jnp.integer):
        raise TypeError(
            f"a member of a population is an integer, not {member.dtype}: number them "
            "from 0"
        )
    return Member(member // 2, 1 - 2 * (member % 2))


class Place(NamedTuple):
    """A leaf whose noise is keyed."""

    path: str
    stack: tuple[int, ...]  # sizes of its stacked axes


def leaf_keys(
    key: jax.Array, places: list[Place], n_leaves: list[int], keys: Keys
) -> list[jax.Array]:
    """The key of each leaf, or of each of its stacked layers.

    Args:
        key: typed key of the run.
        places: the leaves.
        n_leaves: the positions of these among all leaves of the tree, and at the end
            the number of all.
        keys: by "path", so that other leaves may come, go and be renamed; or by
            "position" in the flattened tree.

    Returns:
        For each leaf, keys of the shape of its stacked axes.
    """
    if not places:
        return []
    if keys == "path":
        each = fold_paths(key, [place.path for place in places])
    else:
        *positions, total = n_leaves
        each = jax.random.split(key, total)[jnp.array(positions)]
    return [
        jax.random.split(each[i], place.stack) if place.stack else each[i]
        for i, place in enumerate(places)
    ]


def fold_all(keys: list[jax.Array], number: Any) -> list[jax.Array]:
    """A number folded into every key, in one computation."""
    if not keys:
        return []
    flat = jnp.concatenate([k.reshape(-1) for k in keys])
    folded = jax.vmap(jax.random.fold_in, (0, None))(flat, number)
    out, start = [], 0
    for k in keys:
        out.append(folded[start : start + k.size].reshape(k.shape))
        start += k.size
    return out
