# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
r"""RSQ: rotate the model, scale its tokens, then quantise (maps and measures).

Three parts, each of use alone. The residual stream of a model is turned by an
orthogonal matrix, which its weights take up, so that no channel stands out. Tokens
count by the attention that they receive,

.. math::

    r_t = \sum_{heads,\,queries} P_{qt}, \qquad
    H = \frac{2}{B} \sum_{b,t} \hat r_t\, x_t x_t^\top, \qquad
    \hat r = T\, \frac{r'}{\sum_t r'_t}

with :math:`r'` the importance brought into a range for each sequence. With this
:math:`H`, `wlab.quant.gptq` does the rest.

References:
    Sung, Yadav, Li, Yoon and Bansal, `RSQ: Learning from Important Tokens Leads to
    Better Quantized LLMs <https://arxiv.org/abs/2503.01820>`_, 2025.

    Ashkboos, Mohtashami, Croci, Li, Cameron, Jaggi, Alistarh, Hoefler and Hensman,
    `QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs
    <https://arxiv.org/abs/2404.00456>`_, 2024.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from wlab.core import (
    MatrixView,
    Views,
    is_weight,
    leaves_with_paths,
    map_with_path,
    matrix_views,
)

Normalize = Literal["linear", "sqrt"]
_HIGHEST = jax.lax.Precision.HIGHEST


# --- Which tokens matter ---------------------------------------------------------


def attention_concentration(
    probs: jax.Array,
    r_min: float = 0.005,
    r_max: float = 1.0,
    *,
    normalize: Normalize | None = None,
) -> jax.Array:
    """The attention that each token receives, within a range for each sequence.

    Args:
        probs: attention probabilities [batch, heads, queries, keys].
        r_min: importance of the token that receives least.
        r_max: of the one that receives most.
        normalize: divide first by the number of queries that can see a token in causal
            attention ("linear"), or by its root ("sqrt").

    Returns:
        Importance [batch, keys], float32 or wider.

    Raises:
        ValueError: for probabilities of other axes.

    Examples:
        >>> p = jnp.array([[[[1.0, 0.0], [0.75, 0.25]]]])
        >>> print(attention_concentration(p, r_min=0.1))
        [[1.  0.1]]
    """
    if probs.ndim != 4 or probs.shape[-1] != probs.shape[-2]:
        raise ValueError(
            f"probabilities of shape {probs.shape} are not [batch, heads, tokens, "
            "tokens]"
        )
    wide = jnp.promote_types(probs.dtype, jnp.float32)
    received = jnp.sum(probs, (1, 2), dtype=wide)
    return rescaled(_normalized(received, normalize), r_min, r_max)


def attention_concentration_of(
    q: jax.Array,
    k: jax.Array,
    r_min: float = 0.005,
    r_max: float = 1.0,
    *,
    normalize: Normalize | None = None,
    scale: float | None = None,
    window: int | None = None,
    chunk: int = 128,
) -> jax.Array:
    """`attention_concentration` of causal attention that is computed here.

    Only sums over queries are kept, and the probabilities of a chunk of them.

    Args:
        q: queries as they are compared, [batch, tokens, heads, head_dim].
        k: keys, [batch, tokens, kv_heads, head_dim], whose number divides the heads.
        r_min: as there.
        r_max: as there.
        normalize: as there.
        scale: of the scores; None for one over the root of head_dim.
        window: a token attends to so many, itself the last; None for all before it.
        chunk: queries at a time.

    Returns:
        As there.

    Raises:
        ValueError: if the shapes do not fit.
    """
    b, t, heads, dim = q.shape
    groups = k.shape[2]
    if k.shape != (b, t, groups, dim) or heads % groups:
        raise ValueError(
            f"queries of shape {q.shape} and keys of shape {k.shape}: both are [batch, "
            "tokens, heads, head_dim], and heads a multiple of the keys'"
        )
    wide = jnp.promote_types(jnp.result_type(q, k), jnp.float32)
    size = min(chunk, t)
    count = -(-t // size)
    q = jnp.pad(q.astype(wide), [(0, 0), (0, count * size - t), (0, 0), (0, 0)])
    q = q.reshape(b, count, size, groups, heads // groups, dim)
    k = k.astype(wide) * (dim**-0.5 if scale is None else scale)
    key_at = jnp.arange(t)

    def some(received: jax.Array, i: jax.Array) -> tuple[jax.Array, None]:
        scores = jnp.einsum("bqghd,bkgd->bghqk", q[:, i], k, precision=_HIGHEST)
        query_at = i * size + jnp.arange(size)
        back = query_at[:, None] - key_at[None]
        seen = (back >= 0) if window is None else (back >= 0) & (back < window)
        # Queries behind the last token see what they may: they do not count.
        seen |= (query_at >= t)[:, None]
        scores = jnp.where(seen[None, None, None], scores, -jnp.inf)
        probs = jax.nn.softmax(scores, -1)
        real = (query_at < t)[None, None, None, :, None]
        return received + jnp.sum(jnp.where(real, probs, 0), (1, 2, 3)), None

    received, _ = jax.lax.scan(some, jnp.zeros((b, t), wide), jnp.arange(count))
    return rescaled(_normalized(received, normalize), r_min, r_max)


def _normalized(received: jax.Array, normalize: Normalize | None) -> jax.Array:
    if normalize is None:
        return received
    if normalize not in ("linear", "sqrt"):
        raise ValueError(f"normalize={normalize!r} is none of linear, sqrt, None")
    t = received.shape[-1]
    seen = jnp.arange(t, 0, -1).astype(received.dtype)
    return received / (seen if normalize == "linear" else jnp.sqrt(seen))[None]


def rescaled(score: jax.Array, r_min: float, r_max: float) -> jax.Array:
    """Scores [batch, tokens] brought into a range, for each sequence.

    A sequence whose scores are all alike, up to rounding, gets ones.
    """
    low = jnp.min(score, -1, keepdims=True)
    high = jnp.max(score, -1, keepdims=True)
    flat = high - low <= 16 * jnp.finfo(score.dtype).eps * jnp.abs(high)
    share = (score - low) / jnp.where(flat, 1, high - low)
    r = jnp.clip(r_min + (r_max - r_min) * share, r_min, r_max)
    return jnp.where(flat, 1, r)


def first_tokens(batch: int, tokens: int, n: int) -> jax.Array:
    """Importance of the first n tokens alone: ones, then zeros, [batch, tokens]."""
    r = (jnp.arange(tokens) < n).astype(jnp.float32)
    return jnp.broadcast_to(r[None], (batch, tokens))


def activation_norm(
    x: jax.Array, r_min: float = 0.005, r_max: float = 1.0
) -> jax.Array:
    """Importance by the norm of a token's activations [batch, tokens, width]."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return rescaled(jnp.linalg.norm(x.astype(wide), axis=-1), r_min, r_max)


def activation_change(
    x: jax.Array, y: jax.Array, r_min: float = 0.005, r_max: float = 1.0
) -> jax.Array:
    """Importance by how far a layer moves a token, from `x` to `y`."""
    wide = jnp.promote_types(jnp.result_type(x, y), jnp.float32)
    return activation_norm(y.astype(wide) - x.astype(wide), r_min, r_max)


def token_frequency(
    tokens: jax.Array,
    counts: jax.Array,
    r_min: float = 0.005,
    r_max: float = 1.0,
    *,
    rare: bool = False,
) -> jax.Array:
    """Importance by how often a token occurs.

    Args:
        tokens: [batch, tokens], integers.
        counts: [vocabulary], in the calibration text: ``jnp.bincount``.
        r_min: of the least important.
        r_max: of the most important.
        rare: whether those that occur the least matter the most.

    Returns:
        [batch, tokens].
    """
    found = counts.astype(jnp.promote_types(counts.dtype, jnp.float32))[tokens]
    return rescaled(-found if rare else found, r_min, r_max)


def token_similarity(
    x: jax.Array, r_min: float = 0.005, r_max: float = 1.0, *, unlike: bool = False
) -> jax.Array:
    """Importance by the mean squared distance to all tokens of the sequence.

    It is computed from means, so that there is no array [tokens, tokens].

    Args:
        x: activations [batch, tokens, width].
        r_min: of the least important.
        r_max: of the most important.
        unlike: whether those that are far from the others matter the most.

    Returns:
        [batch, tokens].
    """
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    # Up to what all tokens share. From the centre, so that little is cancelled.
    far = jnp.sum((x - jnp.mean(x, -2, keepdims=True)) ** 2, -1)
    return rescaled(far if unlike else -far, r_min, r_max)


def token_weights(r: jax.Array) -> jax.Array:
    """Importance [batch, tokens] with a mean of one for each sequence."""
    return r * r.shape[-1] / jnp.sum(r, -1, keepdims=True)


def weighted_hessian(x: jax.Array, r: jax.Array | None = None) -> jax.Array:
    """``2 / batch`` times the sum of weighted ``x x^T``, as `gptq` takes it.

    Args:
        x: inputs of a layer [batch, tokens, width].
        r: importance [batch, tokens]; None: all alike. A factor does not matter.

    Returns:
        [width, width], float32 or wider.
    """
    wide = jnp.promote_types(x.dtype, jnp.float32)
    x = x.astype(wide)
    scaled = x if r is None else x * token_weights(r.astype(wide))[..., None]
    h = jnp.einsum("btc,btd->cd", scaled, x, precision=_HIGHEST)
    return 2 / len(x) * h


def rolled(tokens: jax.Array, factor: int = 8) -> jax.Array:
    """Each sequence in `factor` rotations, so that each part is once in front.

    Args:
        tokens: [batch, length].
        factor: how many, which divides the length.

    Returns:
        [batch * factor, length]; sequence b rolled by ``j length / factor`` is at
        ``b factor + j``.

    Raises:
        ValueError: if `factor` does not divide the length.
    """
    b, t = tokens.shape
    if factor < 1 or t % factor:
        raise ValueError(f"factor={factor} does not divide the length {t}")
    at = jnp.arange(t)[None] - jnp.arange(factor)[:, None] * (t // factor)
    return tokens[:, at % t].reshape(b * factor, t)


# --- Rotation --------------------------------------------------------------------


class ResidualStream(NamedTuple):
    """Who reads and writes the residual stream, by the ends of paths.

    An entry stands for each leaf whose path is it, or ends with it behind a ``/``; what
    is in front of a norm's is in front of its readers'.
    """

    embedding: str  # [vocab, width]
    head: str  # kernel [width, vocab]; where there is none, the embedding's transpose
    norms: tuple[tuple[str, tuple[str, ...]], ...]  # a norm's scale, kernels behind it
    writers: tuple[str, ...]  # kernels whose outputs are added


def decoder_stream(*, experts: bool = False) -> ResidualStream:
    """The stream of `wlab.models.decoder.Decoder`, with or without `scan`.

    Args:
        experts: whether its gated layers are experts with a router.
    """
    mlp = ("mlp/gate/kernel", "mlp/up/kernel")
    if experts:
        mlp = (*mlp, "mlp/router/kernel")
    heads = tuple(f"attention/{name}/kernel" for name in ("query", "key", "value"))
    return ResidualStream(
        embedding="embed/embedding",
        head="head/kernel",
        norms=(
            ("attention_norm/scale", heads),
            ("mlp_norm/scale", mlp),
            ("final_norm/scale", ("head/kernel",)),
        ),
        writers=("attention/out/kernel", "mlp/down/kernel"),
    )


def fuse_norms(
    params: Any,
    stream: ResidualStream,
    *,
    views: Views | None = None,
) -> Any:
    """The same model with the scales (and biases) of norms in the kernels behind them.

    Scales become one. A head that was the embedding's transpose becomes a kernel of its
    own, since the last norm's scale belongs to it alone: the model needs ``tied=False``
    from here on.

    Args:
        params: a parameter tree of arrays.
        stream: who reads what.
        views: which axes are inputs and outputs, where names do not tell.

    Returns:
        The tree, with `stream.head` in it.

    Raises:
        ValueError: for entries that match nothing, sizes that do not fit, or a norm
            with a bias in front of a kernel without one.
        TypeError: for structured weights.
    """
    params = _untied(params, stream)
    leaves = _leaves(params)
    known = matrix_views(params, views=views)
    new = dict(leaves)
    for path, readers in _norms(stream, leaves):
        scale, shift = leaves[path], leaves.get(_bias(path))
        for at in readers:
            kernel = leaves[at]
            axis = _side(at, kernel, known[at], "inputs", scale.shape[-1])
            new[at] = _along(kernel, axis, scale).astype(kernel.dtype)
            if shift is None:
                continue
            if _bias(at) not in leaves:
                raise ValueError(
                    f"{_bias(path)!r} is to be taken up by {_bias(at)!r}, which the "
                    "model does not have"
                )
            bias = leaves[_bias(at)]
            more = _along(kernel, axis, shift).sum(axis)
            new[_bias(at)] = (bias.astype(more.dtype) + more).astype(bias.dtype)
        new[path] = jnp.ones_like(scale)
        if shift is not None:
            new[_bias(path)] = jnp.zeros_like(shift)
    return map_with_path(lambda path, _: new[path], params)


def rotate(
    params: Any,
    q: jax.Array,
    stream: ResidualStream,
    *,
    views: Views | None = None,
) -> Any:
    """The same model with its residual stream turned by an orthogonal matrix.

    What writes the stream is multiplied by `q`, and what reads it by its transpose,
    in float32 (or wider, with a `q` of that dtype), and cast back. Norms must divide by
    the root mean square, and have lost their scales: see `fuse_norms`.

    Args:
        params: a parameter tree of arrays, with a head of its own.
        q: orthogonal, [width, width]; or [size, size], which turns each run of so many
            channels alike.
        stream: who reads and writes.
        views: which axes are inputs and outputs, where names do not tell.

    Returns:
        The tree.

    Raises:
        ValueError: for entries that match nothing, sizes that do not fit, norms that
            have a bias, or scales that are not one.
        TypeError: for structured weights.
    """
    leaves = _leaves(params)
    known = matrix_views(params, views=views)
    new = dict(leaves)
    width = _one(stream.embedding, leaves).shape[-1]
    if not _found(stream.head, leaves):
        raise ValueError(
            f"no leaf is {stream.head!r}: a head that is the embedding's transpose "
            "cannot be turned alone; call fuse_norms first"
        )
    if q.ndim != 2 or q.shape[0] != q.shape[1] or width % q.shape[0]:
        raise ValueError(
            f"a rotation of shape {q.shape} does not fit a stream of width {width}: "
            "it is square, with a size that divides the width"
        )
    turned: dict[str, int] = {}  # axes, by path
    for path, _ in _ends(stream.embedding, leaves):
        turned[path] = leaves[path].ndim - 1
    for path, readers in _norms(stream, leaves):
        if _bias(path) in leaves:
            raise ValueError(
                f"the norm of {path!r} has a bias: only norms that divide by the root "
                "mean square commute with a rotation"
            )
        scale = leaves[path]
        if not isinstance(scale, jax.core.Tracer) and (np.asarray(scale) != 1).any():
            raise ValueError(f"{path!r} is not one everywhere: call fuse_norms first")
        for at in readers:
            turned[at] = _side(at, leaves[at], known[at], "inputs", width)
    for writer in stream.writers:
        for path, _ in _ends(writer, leaves):
            turned[path] = _side(path, leaves[path], known[path], "outputs", width)
            if _bias(path) in leaves:
                turned[_bias(path)] = leaves[_bias(path)].ndim - 1
    for path, axis in turned.items():
        new[path] = _turned(leaves[path], q, axis)
    return map_with_path(lambda path, _: new[path], params)


def _norms(
    stream: ResidualStream, leaves: Mapping[str, Any]
) -> list[tuple[str, list[str]]]:
    """The path of each norm's scale, and of the kernels behind it."""
    out = []
    for norm, readers in stream.norms:
        for path, prefix in _ends(norm, leaves):
            behind = [prefix + reader for reader in readers]
            for at in behind:
                if at not in leaves:
                    raise ValueError(
                        f"{path!r} is read by {at!r}, which the model does not have; "
                        "leave it out of the stream's description"
                    )
            out.append((path, behind))
    return out


def _bias(path: str) -> str:
    """The bias beside a kernel or a scale."""
    return path.rpartition("/")[0] + "/bias"


def _turned(x: jax.Array, q: jax.Array, axis: int) -> jax.Array:
    """``x q`` along an axis; reading is ``q^T x``, which is the same along its axis."""
    wide = jnp.promote_types(jnp.promote_types(x.dtype, jnp.float32), q.dtype)
    size = len(q)
    shape = (*x.shape[:axis], x.shape[axis] // size, size, *x.shape[axis + 1 :])
    y = jnp.tensordot(
        x.astype(wide).reshape(shape), q.astype(wide), (axis + 1, 0), precision=_HIGHEST
    )
    return jnp.moveaxis(y, -1, axis + 1).reshape(x.shape).astype(x.dtype)


def _along(kernel: jax.Array, axis: int, scale: jax.Array) -> jax.Array:
    """The kernel times a scale of its axis; both may have stacked axes in front."""
    wide = jnp.promote_types(jnp.promote_types(kernel.dtype, scale.dtype), jnp.float32)
    stack = scale.ndim - 1
    shape = (
        *scale.shape[:-1],
        *(1,) * (axis - stack),
        scale.shape[-1],
        *(1,) * (kernel.ndim - axis - 1),
    )
    return kernel.astype(wide) * scale.astype(wide).reshape(shape)


def _leaves(params: Any) -> dict[str, Any]:
    leaves = dict(leaves_with_paths(params))
    for path, leaf in leaves.items():
        if is_weight(leaf):
            raise TypeError(
                f"{path!r} of shape {leaf.shape} is a structured weight: fuse "
                "norms and turn streams in the dense model, before it is quantised"
            )
    return leaves


def _found(end: str, leaves: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Paths that are or end with an entry, each with what is in front of it."""
    return [
        (path, path[: len(path) - len(end)])
        for path in leaves
        if path == end or path.endswith("/" + end)
    ]


def _ends(end: str, leaves: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = _found(end, leaves)
    if not found:
        raise ValueError(
            f"no leaf is or ends with {end!r}; there are {sorted(leaves)[:8]} ... "
            "(wlab.explain(params) lists them)"
        )
    return found


def _one(end: str, leaves: Mapping[str, Any]) -> Any:
    (path, _), *others = _ends(end, leaves)
    if others:
        raise ValueError(f"{end!r} is the end of both {path!r} and {others[0][0]!r}")
    return leaves[path]


def _side(
    path: str, kernel: Any, view: MatrixView | None, side: str, width: int
) -> int:
    """The axis of a kernel that reads or writes the stream."""
    axes = () if view is None else getattr(view, side)
    if len(axes) != 1 or kernel.shape[axes[0]] != width:
        raise ValueError(
            f"{path!r} of shape {kernel.shape} has {side} of axes {axes}, not one of "
            f"{width} channels; say which with views="
        )
    return axes[0] % kernel.ndim


def _untied(params: Any, stream: ResidualStream) -> Any:
    """With a head: the embedding's transpose where there is none."""
    leaves = _leaves(params)
    if _found(stream.head, leaves):
        return params
    table = _one(stream.embedding, leaves)
    inside = "params" in params if isinstance(params, Mapping) else False
    root = params["params"] if inside else params
    *modules, name = stream.head.split("/")
    node: Any = root
    if not isinstance(root, Mapping) or modules[0] in root:
        raise ValueError(
            f"the head {stream.head!r} is to become a leaf of its own, which needs a "
            "tree of dicts without that entry; make it before"
        )
    node = {name: table.T}
    for module in reversed(modules):
        node = {module: node}
    root = {**root, **node}
    return {**params, "params": root} if inside else root
