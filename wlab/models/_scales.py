# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""The decoder's kernels in the groups that `wlab.quant.awq` scales together."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from wlab.models.decoder import DecoderConfig, _Attention, _GatedMLP
from wlab.quant import ScaleGroup


def decoder_groups(
    config: DecoderConfig, length: int, *, tied: bool = False
) -> tuple[ScaleGroup, ...]:
    """All kernels of one block of a `Decoder`, with what comes before them.

    Args:
        config: the decoder's.
        length: tokens of a sequence: inputs are rows [sequences x length, in], or have
            these two axes apart.
        tied: where several query heads share a value head, whether the output kernel is
            scaled too, by scales that are tied over these heads (as QuantLRM does); it
            is only rounded and clipped otherwise (as AWQ does).

    Returns:
        Four groups, with paths inside a block (``attention/query/kernel``).

    Raises:
        ValueError: for a decoder with experts, each of which sees some tokens only.

    Examples:
        >>> from wlab.models.decoder import tiny
        >>> for group in decoder_groups(tiny(), length=16):
        ...     print(group.previous, len(group.paths))
        ('attention_norm/scale',) 3
        () 1
        ('mlp_norm/scale',) 2
        ('mlp/up/kernel',) 1
    """
    if config.experts:
        raise ValueError(
            f"experts={config.experts} see some tokens each: list the groups of such a "
            "block by hand, with the inputs of each expert"
        )
    # Losses of trials that are rounded to a narrower dtype would be compared by chance.
    dtype = jnp.promote_types(config.dtype, jnp.float32)
    config = dataclasses.replace(config, dtype=dtype)
    shared = config.kv_heads < config.heads
    norm: Any = "offset_norm" if config.norm_offset else "norm"
    ends = ("scale", "bias") if config.norm_bias else ("scale",)
    value = ["kernel", "bias"] if config.qkv_bias else ["kernel"]
    values = tuple(f"attention/value/{name}" for name in value)
    return (
        ScaleGroup(
            tuple(f"attention/{name}/kernel" for name in ("query", "key", "value")),
            tuple(f"attention_norm/{end}" for end in ends),
            norm,
            inspect=_part(_Attention(config), "attention", length),
        ),
        ScaleGroup(
            ("attention/out/kernel",),
            () if shared and not tied else values,
            "linear",
            heads=(config.heads, config.kv_heads) if shared else None,
        ),
        ScaleGroup(
            ("mlp/gate/kernel", "mlp/up/kernel"),
            tuple(f"mlp_norm/{end}" for end in ends),
            norm,
            inspect=_part(_GatedMLP(config), "mlp", length),
        ),
        ScaleGroup(("mlp/down/kernel",), ("mlp/up/kernel",), "linear"),
    )


def _part(
    module: nn.Module, name: str, length: int
) -> Callable[[Any, jax.Array], jax.Array]:
    """The function of one part of a block."""

    def apply_fn(params: Any, x: jax.Array) -> jax.Array:
        x = x.reshape(-1, length, x.shape[-1])
        return module.apply({"params": params[name]}, x)  # type: ignore[return-value]

    return apply_fn
