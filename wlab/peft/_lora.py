# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
r"""LoRA and its kin: a weight plus a trained product of low rank (reparameterisation).

.. math::

    W' = W + s\,A B, \qquad s = \alpha / r

with :math:`A` of shape (in, r) and :math:`B` of shape (r, out), which starts at zero.
Rank-stabilised: :math:`s = \alpha / \sqrt r`. PiSSA starts :math:`A_0 B_0` at the
leading singular triplets of :math:`W` and trains around the rest,
:math:`W' = W + s (A B - A_0 B_0)`. DoRA trains the length of each output's weights
apart from their direction: with :math:`V = W + s A B`,

.. math::

    W'_{:,o} = m_o\, V_{:,o} / \lVert V_{:,o} \rVert

in which no gradient passes through the norm. LoRA+ is the same adapter with a higher
learning rate for B: `lora_plus`.

References:
    Hu, Shen, Wallis, Allen-Zhu, Li, Wang, Wang and Chen, `LoRA: Low-Rank Adaptation of
    Large Language Models <https://arxiv.org/abs/2106.09685>`_, 2021.

    Kalajdzievski, `A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA
    <https://arxiv.org/abs/2312.03732>`_, 2023.

    Liu, Wang, Yin, Molchanov, Wang, Cheng and Chen, `DoRA: Weight-Decomposed Low-Rank
    Adaptation <https://arxiv.org/abs/2402.09353>`_, 2024.

    Meng, Wang and Zhang, `PiSSA: Principal Singular Values and Singular Vectors
    Adaptation of Large Language Models <https://arxiv.org/abs/2404.02948>`_, 2024.

    Hayou, Ghosh and Yu, `LoRA+: Efficient Low Rank Adaptation of Large Models
    <https://arxiv.org/abs/2402.12354>`_, 2024.
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from wlab.core import (
    LowRank,
    MatrixView,
    Operator,
    Reparam,
    Select,
    Views,
    lift,
    linalg,
)
from wlab.peft._matrices import Attach, Init, Method, Target, reparam

Start = Literal["kaiming", "gaussian", "pissa"]
_EPS = 1e-12  # of a norm: a column of zeros stays zero


def lora(
    rank: int = 8,
    *,
    alpha: float | None = None,
    rank_stabilized: bool = False,
    start: Start = "kaiming",
    niter: int | None = None,
    dora: bool = False,
    select: Select | None = None,
    views: Views | None = None,
) -> Reparam:
    """Low-rank adaptation of matrices; with `dora`, of their directions.

    A target becomes a `wlab.LowRank` (in an `Operator` that scales its outputs for
    DoRA): its products cost those of the base and two skinny ones, and no gradient of
    the size of the base exists. Convolutions and embeddings are taken where `select`
    names them; of an embedding, B is drawn and A starts at zero.

    Trained for each matrix: ``a`` of shape stack + in + (r,), ``b`` of shape
    stack + out + (r,), and ``magnitude`` of shape stack + (out,) for DoRA; float32.

    Args:
        rank: number of terms r.
        alpha: the scale s is alpha / rank; None: 1.
        rank_stabilized: s is alpha / sqrt(rank) instead; `alpha` is then `rank` by
            default.
        start: of A. "kaiming": uniform in +-1/sqrt(in); "gaussian": normal with
            standard deviation 1/rank; "pissa": both factors from the singular value
            decomposition of the base, which stays as it is.
        niter: for "pissa", how many power iterations of a randomised decomposition;
            None: an exact one.
        dora: whether outputs have a trained magnitude.
        select: which leaves; None: the kernels of linear layers.
        views: which axes are inputs and outputs, where names do not tell.

    Returns:
        A `Reparam`, whose labels are "a", "b" and "magnitude".

    Raises:
        ValueError: if `rank` is not positive, or above a target's smaller side; for
            a start that is none; and as all methods of `wlab.peft` do.

    Examples:
        >>> params = {"dense": {"kernel": jnp.ones((6, 4)), "bias": jnp.zeros(4)}}
        >>> method = lora(rank=2)
        >>> adapter = method.init(jax.random.key(0), params)
        >>> jax.tree.map(jnp.shape, adapter.train)
        {'dense/kernel': {'a': (6, 2), 'b': (4, 2)}}
        >>> method.attach(adapter, params)["dense"]["kernel"].shape
        (6, 4)
    """
    if rank < 1:
        raise ValueError(f"lora: rank={rank} is not positive")
    if start not in ("kaiming", "gaussian", "pissa"):
        raise ValueError(
            f"lora: start={start!r} is none of 'kaiming', 'gaussian', 'pissa'"
        )
    alpha = float(rank) if alpha is None else alpha
    s = alpha / (math.sqrt(rank) if rank_stabilized else rank)

    def check(target: Target) -> None:
        if rank > min(target.n_in, target.n_out):
            raise ValueError(
                f"lora: rank {rank} is above the smaller side of {target}, which is "
                f"{target.n_in} x {target.n_out}: take a lower rank, or leave it out"
            )

    def init(given: Init) -> tuple[dict[str, Any], dict[str, Any]]:
        t = given.target
        frozen: dict[str, Any] = {}
        if start == "pissa":
            a, b = principal_factors(
                given.weight(), rank, s, niter=niter, key=given.key
            )
            frozen = {"a": a, "b": b}
        else:
            a, b = _drawn(given, rank, start)
        a = a.reshape(*t.stack, *t.inputs, rank)
        b = b.reshape(*t.stack, *t.outputs, rank)
        train = {"a": a, "b": b}
        if frozen:
            frozen = {"a": a, "b": b}
        if dora:
            square = jnp.sum(given.weight() ** 2, axis=-2)
            frozen["square"] = square  # of the base's columns, for the norm
            train["magnitude"] = jnp.sqrt(square)
        return train, frozen

    def attach(given: Attach) -> Any:
        t, scale = given.target, s * jnp.asarray(given.scale)
        a, b = given.train["a"], given.train["b"]
        if "a" in given.frozen:
            a = jnp.concatenate([a, given.frozen["a"].astype(a.dtype)], -1)
            b = jnp.concatenate([b, -given.frozen["b"].astype(b.dtype)], -1)
        weight = LowRank._make(given.base, a, b, scale, t.view)
        if not dora:
            return weight
        norm = column_norms(given.base, a, b, scale, t.view, given.frozen["square"])
        gain = given.train["magnitude"] / jax.lax.stop_gradient(norm)
        return Operator(weight, None, (), view=t.view, gain=gain)

    return reparam(
        Method(
            init,
            attach,
            {"a": ("ins", None), "b": ("outs", None), "magnitude": ("out",)},
            check=check,
        ),
        select=select,
        views=views,
    )


def lora_plus(
    method: Reparam,
    learning_rate: optax.ScalarOrSchedule,
    ratio: float = 16.0,
    *,
    make: Callable[[Any], optax.GradientTransformation] = optax.adam,
) -> optax.GradientTransformation:
    """LoRA+: the output factors and magnitudes learn `ratio` times as fast.

    Args:
        method: from `lora`.
        learning_rate: of A; a number or a schedule.
        ratio: of B's rate to A's, at least 1.
        make: the optimiser of a learning rate.

    Returns:
        A transform of `adapter.train`.

    Raises:
        ValueError: if `ratio` is below 1.
    """
    if ratio < 1:
        raise ValueError(f"lora_plus: ratio={ratio} is below 1: B learns faster, not A")

    def faster(step: Any) -> Any:
        rate = learning_rate(step) if callable(learning_rate) else learning_rate
        return ratio * rate

    quick = make(faster if callable(learning_rate) else faster(0))
    slow = make(learning_rate)
    return optax.partition({"a": slow, "b": quick, "magnitude": quick}, method.labels)


def principal_factors(
    w: jax.Array,
    rank: int,
    scale: float = 1.0,
    *,
    niter: int | None = None,
    key: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Factors whose scaled product is the best approximation of a matrix, by rank.

    Args:
        w: matrices [..., n_in, n_out].
        rank: number of terms.
        scale: s of `lora`.
        niter: power iterations of a randomised decomposition; None: exact.
        key: what a randomised one draws from.

    Returns:
        a [..., n_in, r] and b [..., n_out, r] with ``scale * a @ b.T`` the
        approximation. Signs of singular vectors are arbitrary.
    """
    if niter is None:
        u, s, vt = linalg.svd(w)
    else:
        if key is None:
            raise ValueError("principal_factors: a randomised decomposition needs key=")
        n_in, n_out = w.shape[-2:]
        k = min(rank + 8, n_in, n_out)
        q = jax.random.normal(key, (*w.shape[:-2], n_out, k), w.dtype)
        q = linalg.qr(w @ q).q
        for _ in range(niter):
            q = linalg.qr(jnp.swapaxes(w, -1, -2) @ q).q
            q = linalg.qr(w @ q).q
        small, s, vt = linalg.svd(jnp.swapaxes(q, -1, -2) @ w)
        u = q @ small
    root = jnp.sqrt(s[..., :rank] / scale)
    b = jnp.swapaxes(vt[..., :rank, :], -1, -2)
    return u[..., :rank] * root[..., None, :], b * root[..., None, :]


def column_norms(
    base: Any,
    a: jax.Array,
    b: jax.Array,
    scale: jax.Array,
    view: MatrixView,
    square: jax.Array,
) -> jax.Array:
    """Lengths of the columns of ``base + scale * a b``, whose dense sum is not formed.

    Args:
        base: array or Weight of shape stack + in + out, as `view` has it.
        a: stack + in + (r,).
        b: stack + out + (r,).
        scale: a number, or stack.
        view: of the base.
        square: squared column lengths of the base, stack + (n_out,).

    Returns:
        stack + (n_out,), float32 at least; never zero.
    """
    n = len(base.shape)
    stack = view.stack(n)
    ins, outs = (tuple(i % n for i in side) for side in view)
    size = a.shape[: len(stack)]

    def cross_of(w: Any, a: jax.Array) -> jax.Array:
        return jnp.einsum(
            w,
            list(range(n)),
            a,
            [*stack, *ins, n],
            [*stack, *outs, n],
            precision="highest",
            preferred_element_type=square.dtype,
        )

    cross = lift(cross_of)(base, a)  # stack + outs + (r,)
    rank = a.shape[-1]
    flat_a = a.reshape(*size, -1, rank).astype(square.dtype)
    flat_b = b.reshape(*size, -1, rank).astype(square.dtype)
    gram = jnp.einsum("...ir,...is->...rs", flat_a, flat_a, precision="highest")
    s = jnp.asarray(scale, square.dtype)
    s = s.reshape(*s.shape, *(1,) * (square.ndim - s.ndim))
    once = jnp.sum(cross.reshape(flat_b.shape) * flat_b, -1)
    twice = jnp.einsum(
        "...or,...rs,...os->...o", flat_b, gram, flat_b, precision="highest"
    )
    return jnp.sqrt(jnp.maximum(square + 2 * s * once + s**2 * twice, _EPS**2))


def _drawn(given: Init, rank: int, start: Start) -> tuple[jax.Array, jax.Array]:
    t = given.target
    lookup = t.role == "embedding"
    n_drawn, n_zero = (t.n_out, t.n_in) if lookup else (t.n_in, t.n_out)
    shape = (*t.stack, n_drawn, rank)
    if start == "gaussian" or lookup:
        drawn = jax.random.normal(given.key, shape) / (1 if lookup else rank)
    else:
        bound = 1 / math.sqrt(n_drawn)
        drawn = jax.random.uniform(given.key, shape, minval=-bound, maxval=bound)
    zero = jnp.zeros((*t.stack, n_zero, rank))
    return (zero, drawn) if lookup else (drawn, zero)
