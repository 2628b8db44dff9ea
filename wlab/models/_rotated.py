# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""A decoder as RSQ quantises it: its stream turned, its tokens weighed.

References:
    Sung, Yadav, Li, Yoon and Bansal, `RSQ: Learning from Important Tokens Leads to
    Better Quantized LLMs <https://arxiv.org/abs/2503.01820>`_, 2025.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from wlab.core import leaves_with_paths, lift, map_with_path
from wlab.models.decoder import Decoder, DecoderConfig, _Block
from wlab.quant import (
    attention_concentration_of,
    decoder_stream,
    fuse_norms,
    rotate,
    token_weights,
)


def rotated(
    model: Decoder, params: Any, q: jax.Array | None = None
) -> tuple[Decoder, Any]:
    """The same function with its norms' scales fused and its stream turned.

    Args:
        model: a decoder.
        params: its parameters: arrays.
        q: orthogonal, [width, width], or [size, size] for runs of so many channels:
            `wlab.core.random_hadamard` or `random_orthogonal`. None: norms are fused,
            and that is all.

    Returns:
        The decoder, whose head is its own and whose norms have no offset, and its
        parameters.

    Raises:
        ValueError: for norms with a bias, or a rotation that does not fit.
        TypeError: for structured weights.

    Examples:
        >>> from wlab.core import random_hadamard
        >>> from wlab.models.decoder import tiny
        >>> model, tokens = Decoder(tiny(depth=1)), jnp.zeros((1, 4), jnp.int32)
        >>> params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
        >>> turned, other = rotated(model, params, random_hadamard(1, 128))
        >>> want, got = (
        ...     jax.jit(m.apply)({"params": p}, tokens)
        ...     for m, p in ((model, params), (turned, other))
        ... )
        >>> bool(jnp.allclose(want, got, atol=1e-4))
        True
    """
    config = model.config
    if config.norm_bias:
        raise ValueError("norm_bias: turn a decoder before its norms get biases")
    stream = decoder_stream(experts=config.experts > 0)
    ends = tuple(f"/{path}" for path, _ in stream.norms)
    before = dict(leaves_with_paths(params))

    def offset(path: str, x: jax.Array) -> jax.Array:
        if not f"/{path}".endswith(ends):
            return x
        return 1 + x.astype(jnp.promote_types(x.dtype, jnp.float32))

    def stored(path: str, x: jax.Array) -> jax.Array:
        return x.astype(before[path].dtype) if path in before else x

    if config.norm_offset:
        params = map_with_path(offset, params)
    params = map_with_path(stored, fuse_norms(params, stream))
    if q is not None:
        params = rotate(params, q, stream)
    return Decoder(dataclasses.replace(config, tied=False, norm_offset=False)), params


def decoder_importance(
    model: Decoder | DecoderConfig,
    r_min: float = 0.005,
    r_max: float = 1.0,
    *,
    normalize: Literal["linear", "sqrt"] | None = None,
) -> Callable[[Any, jax.Array, Any], jax.Array]:
    """Tokens by the attention that they receive, for `wlab.quant.calibrate`.

    Args:
        model: a decoder, or its config.
        r_min: as in `wlab.quant.attention_concentration`.
        r_max: as there.
        normalize: as there.

    Returns:
        ``importance(layer, x, batch)``, [batch x length], with a mean of one for each
        sequence.

    Examples:
        RSQ at 3 bits, each row with a range of its own, in full:

        >>> from wlab.core import random_hadamard
        >>> from wlab.models import layered
        >>> from wlab.models.decoder import tiny
        >>> from wlab.quant import calibrate, compressors
        >>> model = Decoder(tiny(depth=1, width=16, hidden=16, heads=2, head_dim=8))
        >>> tokens = jax.random.randint(jax.random.key(0), (1, 4, 8), 0, 256)
        >>> params = jax.jit(model.init)(jax.random.key(1), tokens[0])["params"]
        >>> q = random_hadamard(2, 16)
        >>> model, params = rotated(model, params, q)  # doctest: +SKIP
        >>> parts = layered(model, lambda logits, _: logits.mean(), inputs=lambda t: t)
        >>> method = compressors.gptq(bits=3, group=None, symmetric=True, clip=True)
        >>> made = calibrate(  # doctest: +SKIP
        ...     parts, params, tokens, method, importance=decoder_importance(model)
        ... )
        >>> made.params["blocks"]["mlp"]["up"]["kernel"].grid.name  # doctest: +SKIP
        'int3'
    """
    config = model.config if isinstance(model, Decoder) else model
    block = _Block(config)

    @lift
    def heads(layer: Any, x: jax.Array) -> Any:
        _, seen = block.apply({"params": layer}, x, mutable=["intermediates"])
        return seen["intermediates"]["attention"]

    def importance(layer: Any, x: jax.Array, batch: Any) -> jax.Array:
        del batch
        seen = heads(layer, x)
        r = attention_concentration_of(
            seen["queries"][0],
            seen["keys"][0],
            r_min,
            r_max,
            normalize=normalize,
            scale=config.attention_scale,
            window=config.window,
        )
        return token_weights(r).reshape(-1)

    return importance
