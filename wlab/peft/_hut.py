# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
r"""HUT: a weight times a trained mask of low rank, entry by entry (reparameterisation).

.. math::

    W' = W \odot (1 + s\,M_A M_B), \qquad
    h = \gamma \odot (x W' + b) + \beta

or, in the direct form, :math:`W' = W \odot M_A M_B` with a product that starts at one.
The change is of full rank with few numbers, and zeros of the weight stay zero.

A reconstruction: the paper's two matrices, product and scale-and-shift are known, how
it combines the two is not; the residual form is also known as HiRA.

References:
    Zhang, Zhao, Chen and Li, `HUT: A More Computation Efficient Fine-Tuning Method With
    Hadamard Updated Transformation <https://arxiv.org/abs/2409.13501>`_, 2024.
"""

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp

from wlab.core import Reparam, Select, Views
from wlab.peft._matrices import Attach, Init, Method, dense, matrices, reparam, scaled

Form = Literal["residual", "direct"]


def hut(
    rank: int = 8,
    *,
    form: Form = "residual",
    start: Literal["kaiming", "normal"] = "kaiming",
    affine: bool = True,
    scale: float = 1.0,
    select: Select | None = None,
    views: Views | None = None,
) -> Reparam:
    """The Hadamard updated transformation; the model is unchanged at the start.

    Trained for each matrix, float32: ``mask_a`` (in, r), ``mask_b`` (r, out) and, with
    `affine`, ``gamma`` (out,) and, where the layer has a bias, ``beta`` (out,); with
    the stacked axes in front. A layer without a bias has no beta, since there is no
    leaf that could hold it. A target becomes an array.

    Args:
        rank: of the mask.
        form: "residual" or "direct", as above.
        start: of M_A. "kaiming": uniform in +-1/sqrt(in); "normal": standard deviation
            one. In the direct form the first column is one, and so is the first row of
            M_B, whose others are zero.
        affine: whether outputs are scaled and shifted as well.
        scale: s of the residual form; ``rank ** -0.5`` tames a normal start.
        select: which leaves; None: the kernels of linear layers.
        views: which axes are inputs and outputs, where names do not tell.

    Returns:
        A `Reparam`, whose labels are the names above.

    Raises:
        ValueError: if `rank` is not positive, for a form or a start that is none, and
            as all methods of `wlab.peft` do.

    Examples:
        >>> params = {"dense": {"kernel": jnp.ones((6, 4)), "bias": jnp.zeros(4)}}
        >>> method = hut(rank=2)
        >>> sorted(method.init(jax.random.key(0), params).train["dense/kernel"])
        ['beta', 'gamma', 'mask_a', 'mask_b']
    """
    if rank < 1:
        raise ValueError(f"hut: rank={rank} is not positive")
    if form not in ("residual", "direct"):
        raise ValueError(f"hut: form={form!r} is neither 'residual' nor 'direct'")
    if start not in ("kaiming", "normal"):
        raise ValueError(f"hut: start={start!r} is neither 'kaiming' nor 'normal'")

    def init(given: Init) -> tuple[dict[str, Any], dict[str, Any]]:
        t = given.target
        shape = (*t.stack, t.n_in, rank)
        if start == "kaiming":
            bound = 1 / math.sqrt(t.n_in)
            a = jax.random.uniform(given.key, shape, minval=-bound, maxval=bound)
        else:
            a = jax.random.normal(given.key, shape)
        b = jnp.zeros((*t.stack, rank, t.n_out))
        if form == "direct":
            a, b = a.at[..., 0].set(1), b.at[..., 0, :].set(1)
        train = {"mask_a": a, "mask_b": b}
        if affine:
            train["gamma"] = jnp.ones((*t.stack, t.n_out))
            if t.bias is not None:
                train["beta"] = jnp.zeros((*t.stack, t.n_out))
        return train, {}

    def attach(given: Attach) -> Any:
        w = matrices(given.base, given.target)
        train = jax.tree.map(lambda x: x.astype(w.dtype), given.train)
        mask = jnp.matmul(train["mask_a"], train["mask_b"], precision="highest")
        change = scaled(given, mask * scale if form == "residual" else mask - 1)
        new = w * (1 + change)
        if affine:
            new = new * (1 + scaled(given, train["gamma"] - 1))[..., None, :]
        return dense(given, new)

    def bias(given: Attach) -> Any:
        old = given.base.astype(jnp.promote_types(given.base.dtype, jnp.float32))
        if not affine:
            return given.base
        gamma = (1 + scaled(given, given.train["gamma"] - 1)).reshape(old.shape)
        beta = scaled(given, given.train["beta"]).reshape(old.shape)
        return (gamma * old + beta).astype(given.base.dtype)

    axes: dict[str, tuple[str | None, ...]] = {
        "mask_a": ("in", None),
        "mask_b": (None, "out"),
        "gamma": ("out",),
        "beta": ("out",),
    }
    return reparam(Method(init, attach, axes, bias=bias), select=select, views=views)
