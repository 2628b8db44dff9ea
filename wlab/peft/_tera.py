# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
r"""TeRA: a random tensor network with trained vectors alone (reparameterisation).

The change of a weight is folded to a tensor whose modes factor its outputs and inputs,
and is a Tucker network: a random core :math:`G` and random factors :math:`A_k`, frozen
and shared by all layers of one shape, with a trained vector on each bond,

.. math::

    \Delta_{j_1 \dots j_N} = s \sum_{r_1 \dots r_N} G_{r_1 \dots r_N}
        \prod_k d^{(k)}_{r_k} A^{(k)}_{r_k j_k}

The rank of the change does not depend on how many numbers are trained. :math:`d^{(1)}`
starts at zero, the others at one.

How the paper chooses modes, ranks and variances could not be had: they are arguments
here, with defaults that keep the variance of the inputs.

References:
    Gu, Zhou, Iacovides and Mandic, `TeRA: Vector-based Random Tensor Network for
    High-Rank Adaptation of Large Language Models <https://arxiv.org/abs/2509.03234>`_,
    2025.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from wlab.core import Operator, Reparam, Select, Views, fold_path
from wlab.peft._matrices import Attach, Init, Method, Target, reparam


def tera(
    *,
    modes: int = 2,
    out_dims: Sequence[int] | None = None,
    in_dims: Sequence[int] | None = None,
    ranks: float | Sequence[int] = 1.0,
    alpha: float = 1.0,
    select: Select | None = None,
    views: Views | None = None,
) -> Reparam:
    """The vector-based random tensor network; the model is unchanged at the start.

    Trained for each matrix: the vectors ``d0``, ``d1``, ... of shape (R_k,), output
    modes first, with the stacked axes in front; float32. The frozen core has as many
    numbers as a weight where the ranks are the modes, once for each distinct shape;
    it is drawn from the key. A target becomes an `Operator`.

    Args:
        modes: into how many factors, as equal as can be, each side is cut. A side with
            no such factors is padded to the next size that has.
        out_dims: the factors of the outputs instead, for targets of one shape; their
            product may be larger than the side.
        in_dims: the factors of the inputs instead.
        ranks: of the modes; a number multiplies their sizes. 2 is advisable where
            layers are narrow.
        alpha: the scale s.
        select: which leaves; None: the kernels of linear layers.
        views: which axes are inputs and outputs, where names do not tell.

    Returns:
        A `Reparam`, whose label is "d".

    Raises:
        ValueError: if dims are below a target's side, ranks are not one for each mode,
            or anything is not positive; and as all methods of `wlab.peft` do.

    Examples:
        >>> params = {"dense": {"kernel": jnp.ones((12, 8))}}
        >>> adapter = tera().init(jax.random.key(0), params)
        >>> jax.tree.map(jnp.shape, adapter.train["dense/kernel"])
        {'d0': (2,), 'd1': (4,), 'd2': (3,), 'd3': (4,)}
    """
    if modes < 1:
        raise ValueError(f"tera: modes={modes} is not positive")

    def network(target: Target) -> "Network":
        outs = tuple(out_dims or balanced(target.n_out, modes))
        ins = tuple(in_dims or balanced(target.n_in, modes))
        for name, dims, n in (("out", outs, target.n_out), ("in", ins, target.n_in)):
            if min(dims) < 1 or math.prod(dims) < n:
                raise ValueError(
                    f"tera: {name}_dims {dims} do not hold the {n} of {target}"
                )
        dims = (*outs, *ins)
        if isinstance(ranks, (int, float)):
            sizes = tuple(max(1, round(ranks * n)) for n in dims)
        else:
            sizes = tuple(ranks)
        if len(sizes) != len(dims) or min(sizes) < 1:
            raise ValueError(
                f"tera: ranks {sizes} for the modes {dims} of {target}: give one "
                "positive rank for each mode"
            )
        return Network(outs, ins, sizes, target.n_out)

    def check(target: Target) -> None:
        network(target)

    def shared(key: jax.Array, targets: list[Target]) -> Any:
        made: dict[str, Any] = {}
        for target in targets:
            net = network(target)
            if net.name not in made:
                made[net.name] = net.draw(fold_path(key, net.name))
        return made

    def init(given: Init) -> tuple[dict[str, Any], dict[str, Any]]:
        net, stack = network(given.target), given.target.stack
        fill = [jnp.zeros, *[jnp.ones] * (len(net.ranks) - 1)]
        return {
            f"d{k}": make((*stack, n))
            for k, (make, n) in enumerate(zip(fill, net.ranks, strict=True))
        }, {}

    def attach(given: Attach) -> Any:
        t, net = given.target, network(given.target)
        return Operator(
            given.base,
            net,
            [given.train[f"d{k}"] for k in range(len(net.ranks))],
            shared=given.shared[net.name],
            view=t.view,
            scale=alpha * jnp.asarray(given.scale),
        )

    axes: dict[str, tuple[str | None, ...]] = {f"d{k}": (None,) for k in range(26)}
    made = reparam(
        Method(init, attach, axes, shared=shared, check=check),
        select=select,
        views=views,
    )
    return made._replace(labels=lambda train: jax.tree.map(lambda _: "d", train))


@dataclasses.dataclass(frozen=True)
class Network:
    """The action of TeRA on vectors, mode by mode."""

    out_dims: tuple[int, ...]
    in_dims: tuple[int, ...]
    ranks: tuple[int, ...]  # of all modes, outputs first
    n_out: int

    @property
    def name(self) -> str:
        """The same for layers that share a core."""
        return "-".join(
            "x".join(map(str, n)) for n in (self.out_dims, self.in_dims, self.ranks)
        )

    def draw(self, key: jax.Array) -> dict[str, Any]:
        """Core and factors that keep the variance of the inputs while d is one."""
        p = len(self.out_dims)
        core_key, *keys = jax.random.split(key, len(self.ranks) + 1)
        core = jax.random.normal(core_key, self.ranks)
        factors = [
            jax.random.normal(k, (r, n)) / math.sqrt(r if i < p else n)
            for i, (k, r, n) in enumerate(
                zip(keys, self.ranks, (*self.out_dims, *self.in_dims), strict=True)
            )
        ]
        return {"core": core / math.sqrt(math.prod(self.ranks[p:])), "a": factors}

    def __call__(self, d: Any, shared: Any, x: jax.Array) -> jax.Array:
        """`x` [..., n_in] to [..., n_out]."""
        core, factors = shared["core"], shared["a"]
        p = len(self.out_dims)
        lead = x.shape[:-1]
        short = math.prod(self.in_dims) - x.shape[-1]
        x = jnp.pad(x, [(0, 0)] * len(lead) + [(0, short)])
        x = x.reshape(-1, *self.in_dims)
        for k in range(p, len(self.ranks)):
            # The mode in front goes, its rank comes last.
            x = jnp.tensordot(x, factors[k] * d[k][:, None], ((1,), (1,)))
        flat = core.reshape(math.prod(self.ranks[:p]), -1)
        y = (x.reshape(x.shape[0], -1) @ flat.T).reshape(-1, *self.ranks[:p])
        for k in range(p):
            y = jnp.tensordot(y, factors[k] * d[k][:, None], ((1,), (0,)))
        return y.reshape(*lead, -1)[..., : self.n_out]

    def dense(self, d: Any, shared: Any, n_in: int, n_out: int) -> jax.Array:
        """The matrix, from the core: fewer products than those of the unit vectors."""
        out, factors = shared["core"], shared["a"]
        for k in range(len(self.ranks)):
            out = jnp.tensordot(
                out, factors[k] * d[k][:, None], ((0,), (0,)), precision="highest"
            )
        out = out.reshape(math.prod(self.out_dims), math.prod(self.in_dims))
        return out[:n_out, :n_in].T


def balanced(n: int, modes: int) -> tuple[int, ...]:
    """Factors of n, or of the next larger number that has them, as equal as can be.

    Examples:
        >>> balanced(4096, 3), balanced(128, 2), balanced(13, 2)
        ((16, 16, 16), (8, 16), (2, 7))
    """
    if modes == 1 or n < 4:
        return (*(1,) * (modes - 1), n)
    for size in range(n, 2 * n + 1):
        best = _factors(size, modes)
        if min(best) > 1 or size > n + modes:
            return best
    raise AssertionError("a power of two lies between n and 2n")


def _factors(n: int, modes: int) -> tuple[int, ...]:
    """Factors of n from the smallest on, each as near to its equal share as can be."""
    if modes == 1:
        return (n,)
    share = math.floor(round(n ** (1 / modes), 6))
    first = next(f for f in range(share, 0, -1) if n % f == 0)
    return (first, *_factors(n // first, modes - 1))
