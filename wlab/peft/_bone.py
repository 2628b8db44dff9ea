# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
r"""Bone and Bat: one trained block for all row blocks of a weight (reparameterisation).

A kernel :math:`K` (in, out) is cut along its inputs into blocks of r rows. Bone (later
named MiSS) adds one block :math:`D` (r, out) to each of them,

.. math::

    y = x K + \Bigl(\sum_j x_{jr:(j+1)r}\Bigr) D

so that the input is folded to r numbers. Bat, the method of the paper's first version,
also guides the change by the weight: with :math:`W_{ab}` the r x r block of the
transposed kernel at output block a and input block b,

.. math::

    W'_{ab} = W_{ab} + W_{ab} D_a + D_a

References:
    Kang, `Bone: Block-Affine Adaptation of Large Language Models
    <https://arxiv.org/abs/2409.15371>`_, 2024.
"""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from einops import rearrange

from wlab.core import Operator, Reparam, Select, Views
from wlab.peft._matrices import Attach, Init, Method, Target, added, matrices, reparam

Variant = Literal["bone", "bat", "mini"]


def bone(
    rank: int = 64,
    *,
    variant: Variant = "bone",
    axis: Literal["out", "in"] = "out",
    mini_rank: int | None = None,
    select: Select | None = None,
    views: Views | None = None,
) -> Reparam:
    """Block affine adaptation; the model is unchanged at the start.

    Trained for each matrix, float32, from zero: ``d`` of shape (r, out) for "bone",
    (r, mini_rank) for "mini", and (out / r, r, r), or (in / r, r, r) with
    ``axis="in"``, for "bat"; with the stacked axes in front. A target becomes an
    `Operator` for "bone" and "mini", whose inputs are folded, and an array for "bat".

    Args:
        rank: rows of a block. "bone" and "mini" take inputs that it does not divide:
            the last block is cut short.
        variant: "bone", "bat", or "mini": bone with a block that repeats along the
            outputs.
        axis: of "bat": whether blocks along the outputs, or along the inputs, have
            each a D of their own.
        mini_rank: columns of "mini"; divides the outputs.
        select: which leaves; None: the kernels of linear layers.
        views: which axes are inputs and outputs, where names do not tell.

    Returns:
        A `Reparam`, whose label is "d".

    Raises:
        ValueError: if `rank` is not positive or above a target's inputs; for "bat"
            where it does not divide a target's two sides; for "mini" where `mini_rank`
            does not divide the outputs; for a convolution or an embedding.

    Examples:
        >>> params = {"dense": {"kernel": jnp.ones((6, 4))}}
        >>> method = bone(rank=4)
        >>> adapter = method.init(jax.random.key(0), params)
        >>> jax.tree.map(jnp.shape, adapter.train)
        {'dense/kernel': {'d': (4, 4)}}
    """
    if rank < 1:
        raise ValueError(f"bone: rank={rank} is not positive")
    if variant not in ("bone", "bat", "mini"):
        raise ValueError(f"bone: variant={variant!r} is none of 'bone', 'bat', 'mini'")
    if axis not in ("out", "in"):
        raise ValueError(f"bone: axis={axis!r} is neither 'out' nor 'in'")
    if (mini_rank is None) == (variant == "mini"):
        raise ValueError("bone: mini_rank= goes with variant='mini', and only with it")

    def check(target: Target) -> None:
        if target.role in ("conv", "embedding"):
            raise ValueError(
                f"bone: {target} is the {target.role} of a model, and rows of linear "
                "layers are folded; leave it out of select="
            )
        if rank > target.n_in:
            raise ValueError(
                f"bone: rank {rank} is above the {target.n_in} inputs of {target}"
            )
        if variant == "bat" and (target.n_in % rank or target.n_out % rank):
            raise ValueError(
                f"bone: blocks of {rank} do not divide {target}, which is "
                f"{target.n_in} x {target.n_out}: take a rank that divides both, or "
                "variant='bone'"
            )
        if variant == "mini" and target.n_out % (mini_rank or 1):
            raise ValueError(
                f"bone: mini_rank {mini_rank} does not divide the {target.n_out} "
                f"outputs of {target}"
            )

    def init(given: Init) -> tuple[dict[str, Any], dict[str, Any]]:
        t = given.target
        shape = {
            "bone": (rank, t.n_out),
            "mini": (rank, mini_rank or 0),
            "bat": ((t.n_out if axis == "out" else t.n_in) // rank, rank, rank),
        }[variant]
        return {"d": jnp.zeros((*t.stack, *shape))}, {}

    def attach(given: Attach) -> Any:
        d, t = given.train["d"], given.target
        if variant == "bat":
            w = matrices(given.base, t)
            return added(given, bat_delta(w, d.astype(w.dtype), axis=axis))
        action = Fold(rank, t.n_out)
        return Operator(given.base, action, d, view=t.view, scale=given.scale)

    axes: dict[str, tuple[str | None, ...]] = {
        "d": {
            "bone": (None, "out"),
            "mini": (None, None),
            "bat": (axis, None, None),
        }[variant]
    }
    return reparam(Method(init, attach, axes, check=check), select=select, views=views)


@dataclasses.dataclass(frozen=True)
class Fold:
    """The action of Bone: inputs folded to `rank` numbers, then a block [rank, m].

    The block is repeated along the outputs where m is less than `n_out`.
    """

    rank: int
    n_out: int

    def __call__(self, d: jax.Array, shared: Any, x: jax.Array) -> jax.Array:
        """`x` [..., n_in] to [..., n_out]."""
        short = -x.shape[-1] % self.rank
        if short:
            x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, short)])
        folded = x.reshape(*x.shape[:-1], -1, self.rank).sum(-2)
        return jnp.tile(folded @ d, self.n_out // d.shape[-1])

    def dense(self, d: jax.Array, shared: Any, n_in: int, n_out: int) -> jax.Array:
        """The block, one below the other."""
        blocks = math.ceil(n_in / self.rank)
        return jnp.tile(d, (blocks, n_out // d.shape[-1]))[:n_in]


def bat_delta(
    w: jax.Array, d: jax.Array, *, axis: Literal["out", "in"] = "out"
) -> jax.Array:
    """What Bat adds to kernels.

    Args:
        w: kernels [..., n_in, n_out].
        d: blocks [..., n_out / r, r, r], or [..., n_in / r, r, r] for ``axis="in"``.
        axis: whose blocks have each a D of their own.

    Returns:
        [..., n_in, n_out].
    """
    r = d.shape[-1]
    # Input block b, place i in it; output block a, place j in it.
    blocks = rearrange(w, "... (b i) (a j) -> ... b i a j", i=r, j=r)
    letter = "a" if axis == "out" else "b"
    guided = jnp.einsum(
        f"...biaj,...{letter}ik->...bkaj", blocks, d, precision="highest"
    )
    plain = jnp.swapaxes(d, -1, -2)  # [..., block, k, j]
    if axis == "out":
        plain = rearrange(plain, "... a k j -> ... 1 k a j")
    else:
        plain = rearrange(plain, "... b k j -> ... b k 1 j")
    return rearrange(guided + plain, "... b k a j -> ... (b k) (a j)")
