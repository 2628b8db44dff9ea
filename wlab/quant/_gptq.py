# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
r"""GPTQ, GPTAQ and ResComp: rounding whose error the later weights make up for (maps).

A kernel :math:`W` (in, out) is rounded one input channel after the other. With
:math:`H = X^\top X` of the layer's inputs and :math:`U` upper triangular,
:math:`H^{-1} = U^\top U`, the error of channel i moves the channels that are still to
come,

.. math::

    e_i = (w_i - q_i) / U_{ii}, \qquad
    w_j \leftarrow w_j - U_{ij} e_i + P_{ij} w_i + R_{ij} (w^0_i - w_i) \quad (j > i)

GPTQ has the first term. GPTAQ aims at the outputs of the original model, whose inputs
:math:`\tilde X` differ: with :math:`D = (\tilde X - X)^\top X`,

.. math::

    P = \alpha\, \mathrm{striu}(D\, U^\top)\, U

ResComp also feeds back how far a channel has moved from its original :math:`w^0`,
:math:`R = \alpha_2\, \mathrm{striu}((D + H) U^\top)\, U`.

References:
    Frantar, Ashkboos, Hoefler and Alistarh, `GPTQ: Accurate Post-Training Quantization
    for Generative Pre-trained Transformers <https://arxiv.org/abs/2210.17323>`_, 2022.

    Li, Yin, Lee, Xiao and Panda, `GPTAQ: Efficient Finetuning-Free Quantization for
    Asymmetric Calibration <https://arxiv.org/abs/2504.02692>`_, 2025.

    `Rethinking Residual Errors in Compensation-based LLM Quantization
    <https://arxiv.org/abs/2604.07955>`_, 2026.
"""

import functools
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from wlab.core import linalg

Mode = Literal["original", "moved", "auto"]


class Quantizer(Protocol):
    """How a group of input channels is rounded: what the column loop is given.

    The range of a group is any pytree; `channels` says which part of it a channel
    needs, so that it may hold numbers for each of them.
    """

    @property
    def bits(self) -> int:
        """Of one code."""
        ...

    def fit(self, w: jax.Array, /) -> Any:
        """The range of a group [group, out]; zeros may fill up a last one."""
        ...

    def channels(self, found: Any, start: Any, size: int, /) -> Any:
        """Its part for each of `size` channels from `start`: leaves [size, ...]."""
        ...

    def codes(self, w: jax.Array, here: Any, /) -> jax.Array:
        """The nearest levels of one channel [out], as floats."""
        ...

    def decode(self, codes: jax.Array, here: Any, /) -> jax.Array:
        """What levels of one channel stand for."""
        ...

    def clipped(self, w: jax.Array, here: Any, /) -> jax.Array:
        """The weights of one channel within its levels, but not rounded."""
        ...


class Solved(NamedTuple):
    """A kernel on its grid."""

    values: jax.Array  # [in, out], what the codes stand for
    codes: jax.Array  # [in, out], levels of the grid as floats
    range: Any  # leaves [groups, ...], in the order of rounding but for static groups
    group: jax.Array  # int32 [in], the group of each input channel
    damping: jax.Array  # what was added to the diagonal, over its mean
    order: jax.Array  # int32 [in], the channels in the order of rounding


# One program, also where a notebook calls it.
@functools.partial(
    jax.jit,
    static_argnames=(
        *("grid", "group", "block", "damping", "act_order", "static_groups"),
        *("alpha", "alpha2", "mode"),
    ),
)
def solve(
    w: jax.Array,
    h: jax.Array,
    d: jax.Array | None = None,
    *,
    grid: Quantizer,
    group: int | None = None,
    block: int = 128,
    damping: float = 0.01,
    act_order: bool = False,
    order: jax.Array | None = None,
    static_groups: bool = False,
    alpha: float = 0.25,
    alpha2: float = 0.0,
    mode: Mode = "auto",
) -> Solved:
    """Rounds a kernel with compensation; one compiled program for any size.

    Args:
        w: kernel [in, out], float32 or float64.
        h: ``X^T X`` of the inputs that the quantised model sees, [in, in]; a factor
            does not matter. A channel that is never active has a zero on the diagonal
            and becomes zero.
        d: ``(X~ - X)^T X``, with the same factor and X~ the original model's inputs;
            None for GPTQ.
        grid: levels and how their range is fitted.
        group: input channels that share a range; None: all of them.
        block: channels that are compensated one by one before the others are.
        damping: added to the diagonal of `h`, over its mean; ten times as much where
            the factor is not finite, and so on.
        act_order: the channels with the largest diagonal first; groups are then of
            channels in this order, but for static ones.
        order: another order, int [in]: the channels as they are rounded.
        static_groups: fit the ranges of all groups before, from the original kernel.
        alpha: strength of P.
        alpha2: strength of R.
        mode: what a block hands on to the later ones: its rounded channels
            ("original"), or the ones that were rounded ("moved"); "auto": "moved" for
            ResComp above two bits.

    Returns:
        The codes and ranges.

    Raises:
        ValueError: for shapes that do not fit, two orders, or where neither of `group`
            and `block` divides the other.
    """
    n, m = w.shape
    if h.shape != (n, n) or (d is not None and d.shape != (n, n)):
        raise ValueError(
            f"a kernel of shape {w.shape} needs h (and d) of shape {(n, n)}, not "
            f"{h.shape}: sum over the inputs of this layer"
        )
    if group is not None and (group < 1 or (group % block and block % group)):
        raise ValueError(
            f"group={group} and block={block}: one must divide the other, so that the "
            "ranges of a block are known before its channels are rounded"
        )
    if order is not None and (act_order or order.shape != (n,)):
        raise ValueError(
            f"an order of shape {order.shape} for a kernel of shape {w.shape}: give "
            f"{(n,)} channels, without act_order=True"
        )
    if d is None:
        alpha = alpha2 = 0.0
        d = jnp.zeros_like(h)
    if mode == "auto":
        mode = "moved" if alpha2 and grid.bits > 2 else "original"
    cross = d + h  # before anything is done to either
    # One group of all channels is static, and fitted before anything is done to them.
    static = jax.tree.map(lambda x: x[None], grid.fit(w)) if group is None else None

    diagonal = jnp.diagonal(h)
    dead = diagonal == 0
    h = h + jnp.diag(dead.astype(h.dtype))
    diagonal = jnp.where(dead, 1, diagonal)
    w = jnp.where(dead[:, None], 0, w)
    d = jnp.where(dead[None], 0, d)

    size = n if group is None else group
    n_groups = -(-n // size)
    step = block if group is None else max(block, group)
    padded = -(-n // step) * step
    if group is not None and static_groups:
        whole_groups = jnp.pad(w, [(0, n_groups * size - n), (0, 0)])
        static = jax.vmap(grid.fit)(whole_groups.reshape(n_groups, size, m))
    ordered = act_order or order is not None
    if order is None:
        order = jnp.argsort(-diagonal, stable=True) if act_order else jnp.arange(n)
    if ordered:
        w, d, cross, h = (
            w[order],
            d[order][:, order],
            *(x[order][:, order] for x in (cross, h)),
        )

    u, used = _factor(h, jnp.mean(diagonal) * damping)
    p = r = jnp.zeros((0, 0), w.dtype)
    if alpha:
        p = alpha * _times(jnp.triu(_times(d, u.T), 1), u)
    if alpha2:
        r = alpha2 * _times(jnp.triu(_times(cross, u.T), 1), u)
    extra = padded - n
    u = jnp.pad(u, [(0, extra)] * 2) + jnp.diag(
        (jnp.arange(padded) >= n).astype(u.dtype)
    )
    p, r = (jnp.pad(x, [(0, extra)] * 2) if x.size else x for x in (p, r))
    w = jnp.pad(w, [(0, extra), (0, 0)])
    places = jnp.pad(order, (0, extra), mode="edge")

    def ranges_of(w: jax.Array, i1: Any, held: Any) -> tuple[Any, Any, Any]:
        """Of each channel of a block; what later blocks need; of the groups."""
        if static is not None:
            at = jax.lax.dynamic_slice_in_dim(places, i1, block)
            parts = jax.tree.map(lambda x: x[at // size], static)

            def one(part: Any, j: jax.Array) -> Any:
                return jax.tree.map(lambda x: x[0], grid.channels(part, j, 1))

            return jax.vmap(one)(parts, at % size), held, ()
        if block % size == 0:
            part = jax.lax.dynamic_slice_in_dim(w, i1, block)
            found = jax.vmap(grid.fit)(part.reshape(-1, size, m))
            each = jax.vmap(lambda x: grid.channels(x, 0, size))(found)
            flat = jax.tree.map(lambda x: x.reshape(block, *x.shape[2:]), each)
            return flat, held, found
        held = jax.lax.cond(
            i1 % size == 0,
            lambda: grid.fit(jax.lax.dynamic_slice_in_dim(w, i1, size)),
            lambda: held,
        )
        return grid.channels(held, i1 % size, block), held, held

    def one_block(carry: Any, b: jax.Array) -> Any:
        w, held = carry
        i1 = b * block
        found, held, of_groups = ranges_of(w, i1, held)
        w1 = jax.lax.dynamic_slice_in_dim(w, i1, block)
        w0 = jax.lax.dynamic_slice_in_dim(start, i1, block)

        def rows(x: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(x, i1, block)

        def inside(x: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(rows(x), i1, block, axis=1)

        u1 = inside(u)
        p1, r1 = (inside(x) if x.size else x for x in (p, r))
        own = jnp.diagonal(u1)
        spread = u1 if mode == "original" else jnp.triu(u1, 1)

        def column(i: Any, carry: Any) -> Any:
            w1, q1, c1, e1 = carry
            here = jax.tree.map(lambda x: x[i], found)
            now = w1[i]
            code = grid.codes(now, here)
            q = grid.decode(code, here)
            e = (now - q) / own[i]
            w1 = w1 - spread[i][:, None] * e[None]
            if alpha:
                w1 = w1 + p1[i][:, None] * now[None]
            if alpha2:
                w1 = w1 + r1[i][:, None] * (w0[i] - now)[None]
            return w1, q1.at[i].set(q), c1.at[i].set(code), e1.at[i].set(e)

        zeros = jnp.zeros_like(w1)
        w1, q1, c1, e1 = jax.lax.fori_loop(0, block, column, (w1, zeros, zeros, zeros))
        if mode == "moved":
            last = jax.tree.map(lambda x: x[-1], found)
            w1 = jax.vmap(lambda x: grid.clipped(x, last))(w1)
        later = jnp.arange(padded) >= i1 + block

        def beyond(x: jax.Array, y: jax.Array) -> jax.Array:
            return _times(jnp.where(later[None], rows(x), 0).T, y)

        w = w - beyond(u, e1)
        if alpha:
            w = w + beyond(p, w1)
        if alpha2:
            w = w + beyond(r, w0 - w1)
        return (w, held), (q1, c1, of_groups)

    start = w
    held: Any = ()
    if (
        static is None and block % size
    ):  # a group of several blocks: fitted at its start
        held = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(grid.fit, w[:size])
        )
    _, (q, codes, found) = jax.lax.scan(
        one_block, (w, held), jnp.arange(padded // block)
    )
    q, codes = (x.reshape(padded, m)[:n] for x in (q, codes))
    if static is not None:
        ranges = static
    elif block % size:
        ranges = jax.tree.map(lambda x: x[:: size // block], found)
    else:
        ranges = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:n_groups], found)
    back = jnp.argsort(order)
    of_channel = (jnp.arange(n) if static is not None else back) // size
    return Solved(
        values=q[back],
        codes=codes[back],
        range=ranges,
        group=of_channel.astype(jnp.int32),
        damping=used / jnp.mean(diagonal),
        order=order.astype(jnp.int32),
    )


def gar_order(diagonal: jax.Array, group: int) -> jax.Array:
    """The most active groups first, and in each of them the most active channels.

    Args:
        diagonal: of H, [in]; a channel that is never active counts as one.
        group: channels of a group; what is left over stays at the end.

    Returns:
        The order, int32 [in].

    Examples:
        >>> gar_order(jnp.array([1.0, 2.0, 4.0, 3.0, 9.0]), 2).tolist()
        [2, 3, 1, 0, 4]
    """
    n = len(diagonal)
    whole = n // group * group
    diagonal = jnp.where(diagonal == 0, 1, diagonal)
    inside = diagonal[:whole].reshape(whole // group, group)
    within = jnp.argsort(-inside, axis=1, stable=True)
    groups = jnp.argsort(-jnp.max(inside, 1), stable=True)
    order = (within + jnp.arange(whole, step=group)[:, None])[groups].reshape(-1)
    return jnp.concatenate([order, jnp.arange(whole, n)]).astype(jnp.int32)


def _factor(h: jax.Array, damp: jax.Array) -> tuple[jax.Array, jax.Array]:
    """U with ``h^-1 = U^T U``, and the damping with which it is finite."""
    eye = jnp.eye(len(h), dtype=h.dtype)

    def factor(damp: jax.Array) -> jax.Array:
        low = linalg.cholesky((h + damp * eye)[::-1, ::-1])
        return jax.scipy.linalg.solve_triangular(low, eye, lower=True)[::-1, ::-1]

    def failed(carry: Any) -> jax.Array:
        u, _, tries = carry
        return ~jnp.isfinite(u).all() & (tries < 6)

    def again(carry: Any) -> Any:
        _, damp, tries = carry
        damp = jnp.maximum(10 * damp, 1e-6 * jnp.mean(jnp.diagonal(h)))
        return factor(damp), damp, tries + 1

    u, damp, _ = jax.lax.while_loop(failed, again, (factor(damp), damp, 0))
    return u, damp


def _times(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision="highest")
