# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
r"""RandLoRA: a full-rank sum of random low-rank products (reparameterisation).

With :math:`d` the smaller side of a weight and :math:`n = \lceil d / r \rceil`,

.. math::

    \Delta = s \sum_{j=1}^{n}
        B_j\, \mathrm{diag}(\lambda_j)\, A\, \mathrm{diag}(\gamma_j)

in which the random bases :math:`A` and :math:`B_j` are frozen and shared by all layers,
and :math:`\lambda_j` (r numbers, zero at the start) and :math:`\gamma_j` (d numbers)
are trained. A smaller r trains more: n (r + d) numbers.

References:
    Albert, Zhang, Saratchandran, Rodriguez-Opazo, van den Hengel and Abbasnejad,
    `RandLoRA: Full-rank parameter-efficient fine-tuning of large models
    <https://arxiv.org/abs/2502.00987>`_, 2025.
"""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp

from wlab.core import Operator, Reparam, Select, Views
from wlab.peft._matrices import Attach, Init, Method, Target, reparam

Pairing = Literal["paper", "hf"]
Bases = Literal["uniform", "sparse", "very_sparse"]


def randlora(
    rank: int = 32,
    *,
    alpha: float | None = None,
    pairing: Pairing = "paper",
    bases: Bases = "uniform",
    select: Select | None = None,
    views: Views | None = None,
) -> Reparam:
    """Full-rank adaptation from random bases; the model is unchanged at the start.

    Trained for each matrix, float32: ``lam`` (r, n) and ``gamma`` (n, d), with the
    stacked axes in front. The bases, drawn from the key for the largest sides among the
    targets, are frozen; smaller layers read their first entries. A target becomes an
    `Operator`, whose product costs up to twice the base's.

    Args:
        rank: of each product.
        alpha: the scale s is alpha / rank; None: 20 rank.
        pairing: which column of the bases meets which row: as the paper has it, or as
            the authors' code and Hugging Face's peft, which flatten the two in
            different orders.
        bases: how they are drawn before each is divided by its standard deviation:
            "uniform", or -1, 0 and 1 with probabilities 1/6, 2/3, 1/6 ("sparse"), or
            with the larger ones ``1 / (2 sqrt(d))`` each ("very_sparse").
        select: which leaves; None: the kernels of linear layers.
        views: which axes are inputs and outputs, where names do not tell.

    Returns:
        A `Reparam`, whose labels are "lam" and "gamma".

    Raises:
        ValueError: if `rank` is not positive or above a target's smaller side, for a
            pairing or bases that are none, and as all methods of `wlab.peft` do.

    Examples:
        >>> params = {"dense": {"kernel": jnp.ones((6, 4))}}
        >>> adapter = randlora(rank=3).init(jax.random.key(0), params)
        >>> jax.tree.map(jnp.shape, adapter.train)
        {'dense/kernel': {'gamma': (2, 4), 'lam': (3, 2)}}
    """
    if rank < 1:
        raise ValueError(f"randlora: rank={rank} is not positive")
    if pairing not in ("paper", "hf"):
        raise ValueError(f"randlora: pairing={pairing!r} is neither 'paper' nor 'hf'")
    if bases not in ("uniform", "sparse", "very_sparse"):
        raise ValueError(
            f"randlora: bases={bases!r} is none of 'uniform', 'sparse', 'very_sparse'"
        )
    s = (20.0 * rank if alpha is None else alpha) / rank

    def check(target: Target) -> None:
        if rank > min(target.n_in, target.n_out):
            raise ValueError(
                f"randlora: rank {rank} is above the smaller side of {target}, which "
                f"is {target.n_in} x {target.n_out}"
            )

    def shared(key: jax.Array, targets: list[Target]) -> Any:
        outs, ins = (
            max(getattr(t, side) for t in targets) for side in ("n_out", "n_in")
        )
        return draw_bases(key, rank, outs, ins, bases)

    def init(given: Init) -> tuple[dict[str, Any], dict[str, Any]]:
        t = given.target
        small = min(t.n_in, t.n_out)
        n = math.ceil(small / rank)
        return {
            "lam": jnp.zeros((*t.stack, rank, n)),
            "gamma": jnp.full((*t.stack, n, small), 1 / max(n, small)),
        }, {}

    def attach(given: Attach) -> Any:
        t = given.target
        return Operator(
            given.base,
            RandomSum(pairing, t.n_out),
            given.train,
            shared=given.shared,
            view=t.view,
            scale=s * jnp.asarray(given.scale),
        )

    axes = {"lam": (None, None), "gamma": (None, None)}
    return reparam(
        Method(init, attach, axes, shared=shared, check=check),
        select=select,
        views=views,
    )


def draw_bases(
    key: jax.Array, rank: int, n_out: int, n_in: int, kind: Bases = "uniform"
) -> dict[str, jax.Array]:
    """The bases of a model whose largest sides are these.

    Returns:
        ``a`` (r, d) and ``b`` (D, N, r), with d the smaller side, D the larger and N
        the products that d needs; each of standard deviation one.
    """
    small, large = sorted((n_out, n_in))
    shapes = {"a": (rank, small), "b": (large, math.ceil(small / rank), rank)}
    sparsity = 3.0 if kind == "sparse" else math.sqrt(small)

    def one(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        x = jax.random.uniform(key, shape, minval=-1.0)
        if kind != "uniform":
            x = jnp.where(jnp.abs(x) < 1 - 1 / sparsity, 0.0, jnp.sign(x))
        return x / jnp.std(x, ddof=1)

    keys = jax.random.split(key)
    return {name: one(k, shapes[name]) for name, k in zip("ab", keys, strict=True)}


@dataclasses.dataclass(frozen=True)
class RandomSum:
    """The action of RandLoRA: through the smaller side's factor, then the larger's."""

    pairing: Pairing
    n_out: int

    def __call__(self, train: Any, bases: Any, x: jax.Array) -> jax.Array:
        """`x` [..., n_in] to [..., n_out]."""
        n_in = x.shape[-1]
        a, b = self.factors(train, bases, n_in)
        return (x @ b) @ a if self.n_out < n_in else (x @ a.T) @ b.T

    def dense(self, train: Any, bases: Any, n_in: int, n_out: int) -> jax.Array:
        """The matrix [n_in, n_out]."""
        a, b = self.factors(train, bases, n_in)
        delta = jnp.matmul(b, a, precision="highest")
        return delta if n_out < n_in else delta.T

    def factors(self, train: Any, bases: Any, n_in: int) -> tuple[jax.Array, jax.Array]:
        """The scaled small factor (n r, d) and the large one (D, n r)."""
        small, large = sorted((n_in, self.n_out))
        lam, gamma = train["lam"], train["gamma"]  # (r, n), (n, d)
        rank, n = lam.shape
        a = lam[:, :, None] * bases["a"][:, None, :small] * gamma[None]  # (r, n, d)
        b = bases["b"][:large, :n]  # (D, n, r)
        if self.pairing == "paper":
            a = a.swapaxes(0, 1)
        return a.reshape(n * rank, small), b.reshape(b.shape[0], n * rank)
