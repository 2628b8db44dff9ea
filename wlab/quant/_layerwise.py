# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
r"""Bits by layer: scores of whole layers, and widths that meet a mean (measures).

A layer (a block of a model) with input :math:`X` and output :math:`Y` matters the more,
the more it changes its input,

.. math::

    \mathrm{LIM} = -\cos(X, Y)

Without data, the share of its weights that lie more than a standard deviation above
their mean counts (ZD), and less is more important. The important layers get the higher
of two widths. The sources leave open over what the cosine is taken, and which weights
are counted together: both are options here.

References:
    Dumitru, Yadav, Maheshwary, Clotan, Madhusudhan and Surdeanu, `Layer-Wise
    Quantization: A Pragmatic and Effective Method for Quantizing LLMs Beyond Integer
    Bit-Levels <https://arxiv.org/abs/2406.17415>`_, 2024.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from wlab.core import describe, find_layers, is_weight, leaves_with_paths

Reduce = Literal["flat", "sequence", "token"]


class LayerInput(NamedTuple):
    """The statistic behind LIM, over batches: ``read(add(init(), x, y))``."""

    init: Callable[[], Any]
    add: Callable[..., Any]  # (state, x, y, mask=None) -> state
    read: Callable[[Any], jax.Array]


def lim(reduce: Reduce = "flat") -> LayerInput:
    """How much a layer changes its input, minus the cosine of the two.

    Args:
        reduce: "flat": one cosine over all numbers; "sequence": the mean of the
            cosines of whole sequences; "token": the mean of those of tokens. The
            cosine with a zero is zero.

    Returns:
        ``init()``; ``add(state, x, y, mask=None)`` with a layer's input and output
        [sequences, tokens, width] and a mask [sequences, tokens] of the tokens that
        count; ``read(state)``, in [-1, 1]. States are sums: those of several devices
        add up. They are kept in float32, or wider if the inputs are.

    Raises:
        ValueError: for another reduction.

    Examples:
        >>> score = lim()
        >>> x = jnp.ones((1, 2, 4))
        >>> float(score.read(score.add(score.init(), x, 3 * x)))
        -1.0
    """
    if reduce not in ("flat", "sequence", "token"):
        raise ValueError(f"lim: reduce={reduce!r} is none of flat, sequence, token")

    def init() -> tuple[jax.Array, ...]:
        return (jnp.zeros(()),) * (3 if reduce == "flat" else 2)

    def add(state: Any, x: jax.Array, y: jax.Array, mask: Any = None) -> Any:
        if x.ndim != 3 or x.shape != y.shape:
            raise ValueError(
                f"lim: an input of shape {x.shape} and an output of shape {y.shape}: "
                "both are [sequences, tokens, width]"
            )
        wide = jnp.promote_types(jnp.result_type(x, y), jnp.float32)
        x, y = x.astype(wide), y.astype(wide)
        axes = () if reduce == "token" else (-1,)
        counted = jnp.ones(x.shape[:2], wide) if mask is None else mask.astype(wide)
        sums = [
            jnp.sum(jnp.sum(a * b, -1) * counted, axes)
            for a, b in ((x, y), (x, x), (y, y))
        ]
        if reduce == "flat":
            new = [jnp.sum(part) for part in sums]
        else:
            real = counted if reduce == "token" else jnp.max(counted, -1)
            new = [jnp.sum(_cosine(*sums)), jnp.sum(real)]
        return tuple(a + b for a, b in zip(state, new, strict=True))

    def read(state: Any) -> jax.Array:
        if reduce == "flat":
            return -_cosine(*state)
        total, count = state
        return -total / jnp.maximum(count, 1)

    return LayerInput(init, add, read)


def _cosine(dot: jax.Array, xx: jax.Array, yy: jax.Array) -> jax.Array:
    norm = jnp.sqrt(xx) * jnp.sqrt(yy)
    ratio = dot / jnp.where(norm > 0, norm, 1)
    return jnp.where(norm > 0, jnp.clip(ratio, -1, 1), 0)


def lim_scores(
    hidden: jax.Array, mask: jax.Array | None = None, *, reduce: Reduce = "flat"
) -> jax.Array:
    """LIM of all layers, from the residual streams between them.

    Args:
        hidden: [layers + 1, sequences, tokens, width]: the input of the first layer,
            then the output of each. For streams that are not kept see `lim`.
        mask: of the tokens that count, [sequences, tokens].
        reduce: as in `lim`.

    Returns:
        Scores [layers], float32 or wider; a higher one is more important.

    Raises:
        ValueError: for another reduction, or streams that have other axes.
    """
    if hidden.ndim != 4 or hidden.shape[0] < 2:
        raise ValueError(
            f"lim_scores: streams of shape {hidden.shape} are not [layers + 1, "
            "sequences, tokens, width]"
        )
    score = lim(reduce)

    def one(i: jax.Array) -> jax.Array:
        return score.read(score.add(score.init(), hidden[i], hidden[i + 1], mask))

    return jax.lax.map(one, jnp.arange(hidden.shape[0] - 1))


def zd_score(
    weights: Any,
    *,
    sided: Literal[1, 2] = 1,
    pool: Literal["concat", "matrix"] = "concat",
) -> jax.Array:
    """The share of a layer's weights that lie far above their mean.

    Args:
        weights: the layer's parameters. Kernels count; norms, biases, embeddings and
            heads do not.
        sided: 1: more than a standard deviation above the mean; 2: or below it.
        pool: "concat": of all kernels together; "matrix": the mean of each one's share.

    Returns:
        A share in [0, 1], float32 or wider; a lower one is more important. Zero where
        all weights are equal.

    Raises:
        TypeError: for structured weights.
        ValueError: if there is no kernel, or for options that are none.

    Examples:
        >>> float(zd_score({"dense": {"kernel": jnp.array([[0.0, 0.0, 0.0, 1.0]])}}))
        0.25
    """
    if sided not in (1, 2) or pool not in ("concat", "matrix"):
        raise ValueError(
            f"zd_score: sided={sided!r} is 1 or 2, pool={pool!r} concat or matrix"
        )
    leaves = dict(leaves_with_paths(weights))
    kernels = []
    for leaf in describe(weights):
        if leaf.view is not None and leaf.role in ("kernel", "conv"):
            if is_weight(leaves[leaf.path]):
                raise _structured("zd_score", leaf.path, leaf.shape)
            kernels.append(jnp.asarray(leaves[leaf.path]))
    if not kernels:
        raise ValueError(
            f"zd_score: none of {sorted(leaves)[:5]} is a kernel; give a layer's "
            "parameters"
        )
    if pool == "matrix":
        return jnp.mean(jnp.stack([_share([x], sided) for x in kernels]))
    return _share(kernels, sided)


def zd_scores(params: Any, layers: str | Sequence[str], **options: Any) -> jax.Array:
    """`zd_score` of all layers of a model.

    Args:
        params: a parameter tree.
        layers: where its layers are, as in `wlab.core.Layered`: the path of stacked
            ones (``blocks``), or with ``*`` for their number (``blocks_*``).
        **options: as in `zd_score`.

    Returns:
        Scores [layers]; a lower one is more important.

    Raises:
        TypeError: as in `zd_score`.
        ValueError: as in `zd_score`, or if there are no such layers.
    """
    found = find_layers(params, layers)
    stack, _ = found.take(params)
    if not found.stacked:
        return jnp.stack([zd_score(layer, **options) for layer in stack])
    for path, leaf in leaves_with_paths(stack):
        if is_weight(leaf):
            raise _structured("zd_scores", path, leaf.shape)
    # One layer at a time: its weights are widened to float32.
    return jax.lax.map(lambda layer: zd_score(layer, **options), stack)


def _structured(name: str, path: str, shape: tuple[int, ...]) -> TypeError:
    return TypeError(
        f"{name}: {path!r} of shape {shape} is a structured weight: score the dense "
        "model before it is quantised"
    )


def _share(parts: Sequence[jax.Array], sided: int) -> jax.Array:
    """In two passes: a difference of mean squares would lose too many digits."""
    wide = jnp.promote_types(jnp.result_type(*parts), jnp.float32)
    parts = [x.astype(wide) for x in parts]
    n = sum(x.size for x in parts)
    mean = sum(jnp.sum(x) for x in parts) / n
    variance = sum(jnp.sum((x - mean) ** 2) for x in parts) / max(n - 1, 1)
    bound = jnp.sqrt(variance)
    far = [x - mean if sided == 1 else jnp.abs(x - mean) for x in parts]
    counts = jnp.stack([jnp.sum(x > bound, dtype=jnp.uint32) for x in far])
    return jnp.where(bound > 0, jnp.sum(counts).astype(wide) / n, 0)


def allocate_bits(
    scores: ArrayLike,
    target: float,
    levels: Sequence[int] = (2, 4),
    *,
    sizes: ArrayLike | None = None,
    higher_is_important: bool = True,
) -> np.ndarray:
    """A width for each layer, such that the mean comes near a target.

    The two levels around the target are used: the most important layers get the
    higher one, as many as bring the mean nearest to it, which is within half a layer.
    A higher target never gives a layer fewer bits.

    Args:
        scores: of the layers, concrete: widths decide about shapes and dtypes.
        target: mean bits of a weight.
        levels: widths to choose from.
        sizes: parameters of each layer; None: all alike.
        higher_is_important: True for LIM, False for ZD. Among equals the first wins.

    Returns:
        Bits, int [layers].

    Raises:
        ValueError: if the target lies outside the levels, or shapes do not fit.

    Examples:
        >>> allocate_bits([-0.5, -0.9, -0.7, -0.6], 3.5).tolist()
        [4, 2, 4, 4]
    """
    known = np.asarray(scores, np.float64)
    widths = sorted(set(levels))
    weight = np.ones(known.shape) if sizes is None else np.asarray(sizes, np.float64)
    if known.ndim != 1 or weight.shape != known.shape or not (weight > 0).all():
        raise ValueError(
            f"allocate_bits: scores of shape {known.shape} and sizes of shape "
            f"{weight.shape}: give one score, and one positive size, for each layer"
        )
    if not np.isfinite(known).all():
        raise ValueError("allocate_bits: a score is not finite; look at its layer")
    if not widths or not widths[0] <= target <= widths[-1]:
        raise ValueError(
            f"allocate_bits: target={target} lies outside the levels {widths}"
        )
    upper = next(i for i, width in enumerate(widths) if target <= width)
    low, high = widths[max(upper - 1, 0)], widths[upper]
    order = np.argsort(-known if higher_is_important else known, kind="stable")
    share = (target - low) / (high - low) if high > low else 1.0
    reached = np.concatenate([[0.0], np.cumsum(weight[order])])
    # How many layers, in order, hold that share of all weights.
    count = round(np.interp(share * reached[-1], reached, np.arange(len(reached))))
    bits = np.full(known.shape, low)
    bits[order[:count]] = high
    return bits
