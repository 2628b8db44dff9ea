# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Which leaves of a tree are searched, and with what noise."""

from typing import Any, Literal, NamedTuple

import jax.numpy as jnp

from wlab.core import (
    MatrixView,
    Select,
    Views,
    describe,
    leaves_with_paths,
)
from wlab.core import select as selected
from wlab.core._tree import stacked_axes

Dense = Literal["perturb", "freeze"]


class Searched(NamedTuple):
    """A leaf that has noise."""

    path: str
    position: int  # among all leaves of the tree
    shape: tuple[int, ...]
    dtype: Any
    view: MatrixView | None  # None: dense noise
    stack: tuple[int, ...]  # sizes of its stacked axes, each layer with its own key

    @property
    def sides(self) -> tuple[int, int]:
        """Sizes of the input and the output side of each matrix."""
        assert self.view is not None
        n_in = n_out = 1
        for i in self.view.inputs:
            n_in *= self.shape[i]
        for i in self.view.outputs:
            n_out *= self.shape[i]
        return n_in, n_out


def searched(
    params: Any,
    *,
    low_rank: bool,
    dense: Dense,
    select: Select | None,
    views: Views | None,
) -> list[Searched]:
    """The leaves that have noise, in the order of the tree.

    Args:
        params: parameters, abstract ones too.
        low_rank: whether matrices have low-rank noise; False: dense, as all others.
        dense: whether what is no matrix has noise at all.
        select: which leaves are searched, as in `wlab.core.select`; None: all of
            floats.
        views: as in `wlab.core.describe`.

    Raises:
        ValueError: for a pattern that matches nothing, or where nothing is left.
        TypeError: for a selected leaf that holds no floats.
    """
    named = leaves_with_paths(params)
    if not named:
        return []
    leaves = describe(params, views=views)
    wanted = (
        None if select is None else dict(leaves_with_paths(selected(params, select)))
    )
    depth = stacked_axes({leaf.path: leaf.shape for leaf in leaves})
    out = []
    for position, leaf in enumerate(leaves):
        path, shape = leaf.path, leaf.shape
        floats = jnp.issubdtype(leaf.dtype, jnp.floating)
        if wanted is not None and wanted[path] and not floats:
            raise TypeError(
                f"leaf {path!r} of shape {shape} holds {leaf.dtype}: noise is for "
                "floats; leave it out of select="
            )
        if not floats or (wanted is not None and not wanted[path]):
            continue
        view = leaf.view
        if view is None and dense == "freeze":
            continue
        stack = shape[: depth[path]]
        if view is not None:
            stack = tuple(shape[i] for i in view.stack(len(shape)))
        out.append(
            Searched(
                path, position, shape, leaf.dtype, view if low_rank else None, stack
            )
        )
    if not out:
        raise ValueError(
            f"no leaf is searched: of {len(named)} leaves none that is selected is a "
            "matrix of floats; take dense='perturb', or name the matrices in views="
        )
    return out


def by_path(params: Any) -> dict[str, Any]:
    """The leaves by path; a structured weight is one."""
    return dict(leaves_with_paths(params))
