# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""The decoder in the parts that `wlab.core.layered_value_and_grad` takes."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

from wlab.core import Layered, lift
from wlab.models._experts import router_metrics
from wlab.models.decoder import (
    Decoder,
    DecoderConfig,
    _Block,
    _embed,
    _logits,
    _start,
)


class _Before(nn.Module):
    config: DecoderConfig

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        return _start(self.config, _embed(self.config), tokens)


class _After(nn.Module):
    config: DecoderConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return _logits(self.config, _embed(self.config), x)


def layered(
    model: Decoder | DecoderConfig,
    loss: Callable[..., Any],
    *,
    inputs: Callable[[Any], jax.Array] = lambda batch: batch[:, :-1],
) -> Layered:
    """The loss of a decoder in parts, for gradients of some of its layers alone.

    Value and gradients are those of ``loss(model.apply({"params": params},
    inputs(batch)), batch)``; the parameters are the model's own, scanned or written
    out, and may hold structured weights.

    Args:
        model: the decoder, or its config.
        loss: `loss(logits, batch)` returns a scalar, or one and a dict of metrics. With
            experts it is `loss(logits, batch, routers)`, where `routers` is the dict
            that `apply_with_losses` returns.
        inputs: the tokens `[batch, length]` that the model reads; by default the batch
            is tokens `[batch, length + 1]`, all but the last of which it reads.

    Returns:
        The parts, whose layers are ``blocks`` or ``blocks_*``.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from wlab.core import layered_value_and_grad
        >>> from wlab.models import layered
        >>> from wlab.models.decoder import Decoder, tiny
        >>> from wlab.train import next_token_loss
        >>> model = Decoder(tiny(depth=2))
        >>> tokens = jnp.zeros((2, 9), jnp.int32)
        >>> params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
        >>> grad_fn = layered_value_and_grad(layered(model, next_token_loss))
        >>> (loss, metrics), grads = jax.jit(grad_fn)(params, tokens, chosen=[1])
        >>> grads.layers["mlp"]["up"]["kernel"].shape
        (1, 128, 512)
    """
    config = model.config if isinstance(model, Decoder) else model
    block = _Block(config)

    @lift
    def before(params: Any, batch: Any) -> Any:
        ends = {"embed": params["embed"]}
        return _Before(config).apply({"params": ends}, inputs(batch))

    @lift
    def layer(params: Any, x: jax.Array, batch: Any) -> Any:
        del batch
        if not config.experts:
            return block.apply({"params": params}, x)
        return block.apply({"params": params}, x, mutable=["losses", "metrics"])

    @lift
    def after(params: Any, x: jax.Array, batch: Any, *extras: Any) -> Any:
        names = ("embed", "final_norm", "head")
        ends = {name: params[name] for name in names if name in params}
        logits = _After(config).apply({"params": ends}, x)
        return loss(logits, batch, *map(router_metrics, extras))

    return Layered(
        before,
        layer,
        after,
        layers="blocks" if config.scan else "blocks_*",
        extras=config.experts > 0,
        remat=config.remat,
    )
