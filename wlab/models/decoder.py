# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""A decoder-only language model: RMSNorm, rotary positions, grouped queries, SwiGLU.

Options add what the architectures of published checkpoints have more: biases of
queries, keys and values, norms of queries and keys, stretched positions, a window of
attention, scaled embeddings. `wlab.models.from_hf` reads such checkpoints. The gated
layers are dense, or routed experts. Attention sows the queries and keys that it
compares in the collection "intermediates". The weights reach nothing but `nn.Dense`,
`nn.DenseGeneral`, `nn.Embed` and the experts' products, so that structured weights can
take their place. The blocks are either written out one after another (`blocks_0`,
`blocks_1`, ...) or scanned (`blocks`, every parameter with a leading layer axis); both,
with or without rematerialisation, are the same function. On a mesh the activations are
divided over the axes of `wlab.core.sharding`.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from wlab.core import sharding
from wlab.models._experts import Experts
from wlab.models._experts import apply_with_losses as apply_with_losses

__all__ = [
    "Decoder",
    "DecoderConfig",
    "RopeScaling",
    "apply_with_losses",
    "final_norm",
    "tiny",
    "with_norm_bias",
]

_NORMS = ("attention_norm", "mlp_norm", "final_norm")  # of the residual stream


class RopeScaling(NamedTuple):
    """How the wavelengths of rotary positions are stretched for longer sequences.

    With a factor alone all are (Chen et al., 2023, "Extending Context Window of Large
    Language Models via Positional Interpolation"). With a length, only the long ones
    are (Dubey et al., 2024, "The Llama 3 Herd of Models"): those up to `length / high`
    tokens stay, those from `length / low` tokens on grow by the factor, and between
    them the frequency goes from one to the other, linearly in `length` over the
    wavelength.

    Attributes:
        factor: by which the longest wavelengths grow.
        length: of the sequences that the model saw before; None: all wavelengths grow.
        low: see above; used with a length only.
        high: see above; used with a length only.
    """

    factor: float
    length: int | None = None
    low: float = 1.0
    high: float = 4.0


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The shape of a `Decoder`.

    Attributes:
        vocab: number of tokens.
        width: size of the residual stream.
        depth: number of blocks.
        heads: number of query heads.
        kv_heads: number of key and value heads; divides `heads`.
        head_dim: size of a head; even, because rotary positions turn pairs.
        hidden: size of the gated layer inside a block; of each expert's, if there are
            experts.
        rope_base: the wavelengths of the rotary positions grow from `2 pi` tokens to
            almost this many times as much.
        rope_scaling: how these wavelengths are stretched; None for not at all.
        window: a token attends to so many, itself the last; None for all before it.
        qkv_bias: whether queries, keys and values have a bias.
        qk_norm: whether every head's queries and keys go through a norm, whose scale
            the heads share, before they are turned.
        activation: of the gated layer: silu; gelu, or gelu_tanh, which approximates it.
        norm_eps: added to the mean square inside every norm.
        norm_offset: whether a norm multiplies with one plus its scale, which then
            begins as zeros; not those of `qk_norm`.
        norm_bias: whether a norm adds a bias; not those of `qk_norm`. Published models
            have none: it takes up what a compressed model is off by, see
            `wlab.quant.dac`.
        embedding_scale: what the embeddings of the tokens are multiplied with; not
            those of a tied head.
        experts: number of gated layers in a block, among which a router chooses for
            every token; 0 for one layer and no router.
        experts_per_token: how many of them each token goes through.
        capacity: an expert has `ceil(capacity * experts_per_token * length / experts)`
            places for each sequence, and tokens that find none skip it; None for no
            limit.
        tied: whether the head is the embedding's transpose.
        attention_scale: what queries times keys are multiplied with; None for one over
            the root of `head_dim`.
        output_scale: what the logits are multiplied with.
        init_width: embedding and head begin as large as those of this width; None for
            the width itself. The three are what `wlab.optim.mup` sets over widths.
        scan: whether the blocks are one scan over stacked parameters.
        remat: whether a block's activations are computed again in the backward pass.
        dtype: dtype of the activations and matrix products. Softmax, norms, rotary
            angles and logits are float32 whatever it is.
        param_dtype: dtype in which the parameters are stored.
    """

    vocab: int
    width: int
    depth: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    rope_base: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    window: int | None = None
    qkv_bias: bool = False
    qk_norm: bool = False
    activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"
    norm_eps: float = 1e-6
    norm_offset: bool = False
    norm_bias: bool = False
    embedding_scale: float = 1.0
    experts: int = 0
    experts_per_token: int = 2
    capacity: float | None = None
    tied: bool = True
    attention_scale: float | None = None
    output_scale: float = 1.0
    init_width: int | None = None
    scan: bool = False
    remat: bool = False
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def __post_init__(self):
        """Checks the sizes.

        Raises:
            ValueError: if sizes are not positive or do not fit each other.
        """
        for name in (
            *("vocab", "width", "depth", "heads", "kv_heads", "head_dim", "hidden"),
            *("rope_base", "norm_eps", "attention_scale", "output_scale", "init_width"),
            *("window", "embedding_scale"),
        ):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be positive, not {value}")
        if self.heads % self.kv_heads:
            raise ValueError(
                f"heads={self.heads} is not a multiple of kv_heads={self.kv_heads}: "
                "every key head serves the same number of query heads"
            )
        if self.head_dim % 2:
            raise ValueError(
                f"head_dim={self.head_dim} is odd: rotary positions turn pairs of "
                "channels, so choose an even size"
            )
        if self.activation not in _ACTIVATIONS:
            raise ValueError(
                f"activation={self.activation!r}: choose one of "
                f"{', '.join(_ACTIVATIONS)}"
            )
        if self.experts and self.activation != "silu":
            raise ValueError(
                f"activation={self.activation!r} is for one gated layer: experts have "
                "silu"
            )
        scaling = self.rope_scaling
        if scaling and not (
            scaling.factor > 0
            and (scaling.length is None or 0 < scaling.low < scaling.high)
        ):
            raise ValueError(
                f"{scaling}: factor and low must be positive, and high larger than low"
            )
        if self.experts and not 0 < self.experts_per_token <= self.experts:
            raise ValueError(
                f"experts_per_token={self.experts_per_token} cannot be chosen among "
                f"experts={self.experts}"
            )
        if self.experts < 0 or (self.capacity is not None and self.capacity <= 0):
            raise ValueError(
                f"experts={self.experts} is 0 or more, and capacity={self.capacity} is "
                "positive, or None for no limit"
            )
        for name in ("dtype", "param_dtype"):
            if not jnp.issubdtype(getattr(self, name), jnp.floating):
                raise ValueError(f"{name}={getattr(self, name)} is not a float dtype")


def tiny(**overrides: Any) -> DecoderConfig:
    """About a million parameters over bytes: trains on a laptop.

    The blocks are scanned and rematerialised: at this size that takes the least time
    and memory for a step on a CPU.

    Args:
        **overrides: fields of `DecoderConfig` to set otherwise.

    Returns:
        The config.

    Examples:
        >>> from wlab.models.decoder import tiny
        >>> config = tiny(depth=2)
        >>> config.width, config.depth
        (128, 2)
    """
    config = DecoderConfig(
        vocab=256,
        width=128,
        depth=4,
        heads=4,
        kv_heads=2,
        head_dim=32,
        hidden=512,
        scan=True,
        remat=True,
    )
    return dataclasses.replace(config, **overrides)


_ACTIVATIONS = {
    "silu": nn.silu,
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_tanh": nn.gelu,
}


def _stretch(wavelengths: jax.Array, scaling: RopeScaling) -> jax.Array:
    """The wavelengths, in tokens over `2 pi`, as `RopeScaling` says."""
    if scaling.length is None:
        return wavelengths * scaling.factor
    turns = scaling.length / (2 * math.pi * wavelengths)
    kept = jnp.clip((turns - scaling.low) / (scaling.high - scaling.low), 0, 1)
    return wavelengths / ((1 - kept) / scaling.factor + kept)


def _rotate(
    x: jax.Array,
    positions: jax.Array,
    base: float,
    scaling: RopeScaling | None = None,
) -> jax.Array:
    """Turns the pairs (i, i + half) of a head's channels by position-given angles.

    Args:
        x: `[batch, length, heads, head_dim]`.
        positions: `[length]`.
        base: see `DecoderConfig.rope_base`.
        scaling: see `DecoderConfig.rope_scaling`.

    Returns:
        The turned `x`, in its own dtype; angles and turn are float32.
    """
    half = x.shape[-1] // 2
    wavelengths = base ** (jnp.arange(half, dtype=jnp.float32) / half)
    if scaling:
        wavelengths = _stretch(wavelengths, scaling)
    angles = positions.astype(jnp.float32)[:, None] / wavelengths[None, :]
    cos, sin = (f(angles)[None, :, None, :] for f in (jnp.cos, jnp.sin))
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


class _Attention(nn.Module):
    """Causal grouped-query attention with rotary positions."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        rows = _rows(x)

        def project(name: str, heads: int) -> jax.Array:
            made = nn.DenseGeneral(
                (heads, c.head_dim),
                use_bias=c.qkv_bias,
                dtype=c.dtype,
                param_dtype=c.param_dtype,
                name=name,
            )(rows)
            made = made.reshape(*x.shape[:2], heads, c.head_dim)
            return sharding.constrain(made, sharding.BATCH, None, "tensor", None)

        positions = jnp.arange(x.shape[1])

        def turned(name: str, heads: int) -> jax.Array:
            made = project(name, heads)
            if c.qk_norm:
                made = _rms_norm(c, f"{name}_norm")(made)
            return _rotate(made, positions, c.rope_base, c.rope_scaling)

        query, key = turned("query", c.heads), turned("key", c.kv_heads)
        value = project("value", c.kv_heads)
        self.sow("intermediates", "queries", query)
        self.sow("intermediates", "keys", key)
        before = None
        if c.window is not None and c.window < x.shape[1]:
            before = (c.window - 1, 0)
        mixed = jax.nn.dot_product_attention(
            query,
            key,
            value,
            is_causal=True,
            scale=c.attention_scale,
            local_window_size=before,
        )
        out = nn.DenseGeneral(
            c.width,
            axis=(-2, -1),
            use_bias=False,
            dtype=c.dtype,
            param_dtype=c.param_dtype,
            kernel_init=_residual_init(c),
            name="out",
        )(mixed.reshape(-1, c.heads, c.head_dim))
        return out.reshape(x.shape)


class _GatedMLP(nn.Module):
    """`down(activation(gate(x)) * up(x))`."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config

        def dense(size: int, name: str, **kwargs: Any) -> nn.Dense:
            return nn.Dense(
                size,
                use_bias=False,
                dtype=c.dtype,
                param_dtype=c.param_dtype,
                name=name,
                **kwargs,
            )

        rows = _rows(x)
        activation = _ACTIVATIONS[c.activation]
        gated = activation(dense(c.hidden, "gate")(rows)) * dense(c.hidden, "up")(rows)
        gated = sharding.constrain(gated, sharding.BATCH, "tensor")
        out = dense(c.width, "down", kernel_init=_residual_init(c))(gated)
        return out.reshape(x.shape)


class _Block(nn.Module):
    """One pre-norm residual block."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        x = x + _Attention(c, name="attention")(_norm(c, "attention_norm")(x))
        if c.experts:
            mlp: nn.Module = Experts(
                experts=c.experts,
                per_token=c.experts_per_token,
                capacity=c.capacity,
                hidden=c.hidden,
                dtype=c.dtype,
                param_dtype=c.param_dtype,
                down_scale=_residual_scale(c),
                name="mlp",
            )
        else:
            mlp = _GatedMLP(c, name="mlp")
        return _stream(x + mlp(_norm(c, "mlp_norm")(x)))


class Decoder(nn.Module):
    """A causal language model over integer tokens.

    Parameters: `embed/embedding`; per block `attention_norm/scale`,
    `attention/{query,key,value,out}/kernel`, `mlp_norm/scale` and
    `mlp/{gate,up,down}/kernel` (with experts in front: `[experts, in, out]`, and
    `mlp/router/kernel`), under `blocks_0` ... or, with `scan`, under `blocks` with a
    leading layer axis; `final_norm/scale`; `head/kernel` unless the head is tied. With
    `qkv_bias` also `attention/{query,key,value}/bias` `[heads, head_dim]`, with
    `qk_norm` `attention/{query,key}_norm/scale` `[head_dim]`, and with `norm_bias` a
    `bias` beside the scale of each other norm.

    Experts sow the losses of their routers in the collection "losses" and what else is
    known of them in "metrics": see `apply_with_losses`.

    Attributes:
        config: the sizes.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from wlab.models.decoder import Decoder, tiny
        >>> model = Decoder(tiny(depth=1))
        >>> tokens = jnp.zeros((2, 8), jnp.int32)
        >>> variables = model.init(jax.random.key(0), tokens)
        >>> model.apply(variables, tokens).shape
        (2, 8, 256)
    """

    config: DecoderConfig

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Predicts every next token.

        Args:
            tokens: integers, `[batch, length]`.

        Returns:
            float32 logits, `[batch, length, vocab]`; those at position `i` depend on
            `tokens[:, : i + 1]` only.

        Raises:
            ValueError: if `tokens` is not a batch of rows of integers.
        """
        c = self.config
        if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(
                "tokens must be integers of shape [batch, length], not "
                f"{tokens.dtype}{list(tokens.shape)}"
            )
        embed = _embed(c)
        x = _start(c, embed, tokens)
        # Inside a scan nothing can be merged across the two passes, so the barrier
        # that prevents it would only cost time.
        block = nn.remat(_Block, prevent_cse=not c.scan) if c.remat else _Block
        if c.scan:
            x, _ = nn.scan(
                lambda layer, x, _: (layer(x), None),
                variable_axes={"params": 0, "losses": 0, "metrics": 0},
                split_rngs={"params": True},
                length=c.depth,
            )(block(c, name="blocks"), x, None)
        else:
            for i in range(c.depth):
                x = block(c, name=f"blocks_{i}")(x)
        return _logits(c, embed, x)


def with_norm_bias(model: Decoder, params: Any) -> tuple[Decoder, Any]:
    """The same function with biases of norms, which are zero.

    Args:
        model: a decoder.
        params: its parameters, which may hold structured weights.

    Returns:
        The decoder with `norm_bias`, and its parameters.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from wlab.models.decoder import Decoder, tiny, with_norm_bias
        >>> model, tokens = Decoder(tiny(depth=1)), jnp.zeros((1, 4), jnp.int32)
        >>> params = model.init(jax.random.key(0), tokens)["params"]
        >>> model, params = with_norm_bias(model, params)
        >>> sorted(params["final_norm"])
        ['bias', 'scale']
    """
    if model.config.norm_bias:
        return model, params

    def added(node: Any) -> Any:
        if not isinstance(node, Mapping):
            return node
        return {
            name: {**child, "bias": jnp.zeros_like(child["scale"])}
            if name in _NORMS
            else added(child)
            for name, child in node.items()
        }

    config = dataclasses.replace(model.config, norm_bias=True)
    return Decoder(config), added(params)


def final_norm(model: Decoder | DecoderConfig) -> Callable[[Any, jax.Array], Any]:
    """A function ``(params, x)`` from what the last block puts out to the head's input.

    Args:
        model: a decoder, or its config.

    Returns:
        The function; of the parameters it reads ``final_norm`` alone.
    """
    config = model.config if isinstance(model, Decoder) else model
    norm = _norm(config, "final_norm")

    def read(params: Any, x: jax.Array) -> Any:
        return norm.apply({"params": params["final_norm"]}, x)

    return read


def _embed(config: DecoderConfig) -> nn.Embed:
    """The table, which stays float32 in use: a tied head makes logits with it."""
    return nn.Embed(
        config.vocab,
        config.width,
        dtype=jnp.float32,
        param_dtype=config.param_dtype,
        embedding_init=nn.initializers.normal(_end_std(config)),
        name="embed",
    )


def _start(config: DecoderConfig, embed: nn.Embed, tokens: jax.Array) -> jax.Array:
    """What goes into the first block."""
    x = embed(tokens).astype(config.dtype)
    if config.embedding_scale != 1:
        x = x * config.embedding_scale
    return _stream(x)


def _logits(config: DecoderConfig, embed: nn.Embed, x: jax.Array) -> jax.Array:
    """Final norm and head of what comes out of the last block."""
    rows = _rows(_norm(config, "final_norm")(x))
    if config.output_scale != 1:
        rows = rows * config.output_scale
    if config.tied:
        logits = embed.attend(rows)
    else:
        logits = nn.Dense(
            config.vocab,
            use_bias=False,
            dtype=jnp.float32,
            param_dtype=config.param_dtype,
            kernel_init=nn.initializers.variance_scaling(
                config.width * _end_std(config) ** 2, "fan_in", "truncated_normal"
            ),
            name="head",
        )(rows)
    logits = logits.reshape(*x.shape[:2], config.vocab)
    return sharding.constrain(logits, sharding.BATCH, None, "tensor")


def _stream(x: jax.Array) -> jax.Array:
    """The residual stream between blocks: divided by sequences alone."""
    return sharding.constrain(x, sharding.BATCH, None, None)


def _rows(x: jax.Array) -> jax.Array:
    """All positions of all sequences as rows, for the dense layers.

    A weight's gradient then contracts one axis, not two, for which XLA on CPU would
    transpose the activations first: the whole step takes half the time.
    """
    return x.reshape(-1, x.shape[-1])


class _AffineNorm(nn.Module):
    """A root-mean-square norm with an offset of its scale or a bias, in float32."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c, size = self.config, x.shape[-1]
        wide = jnp.promote_types(c.dtype, jnp.float32)
        zeros = nn.initializers.zeros
        start = zeros if c.norm_offset else nn.initializers.ones
        scale = self.param("scale", start, (size,), c.param_dtype)
        normed = nn.RMSNorm(epsilon=c.norm_eps, dtype=wide, use_scale=False)(x)
        factor = jnp.asarray(scale, wide)
        if c.norm_offset:
            factor = 1 + factor
        y = normed * jnp.expand_dims(factor, range(x.ndim - 1))
        if c.norm_bias:
            bias = self.param("bias", zeros, (size,), c.param_dtype)
            y = y + jnp.expand_dims(jnp.asarray(bias, wide), range(x.ndim - 1))
        return y.astype(c.dtype)


def _norm(config: DecoderConfig, name: str) -> nn.Module:
    """The norm of the residual stream."""
    if config.norm_offset or config.norm_bias:
        return _AffineNorm(config, name=name)
    return _rms_norm(config, name)


def _rms_norm(config: DecoderConfig, name: str) -> nn.RMSNorm:
    """A root-mean-square norm; flax computes its statistics in float32."""
    return nn.RMSNorm(
        epsilon=config.norm_eps,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        name=name,
    )


def _end_std(config: DecoderConfig) -> float:
    """Standard deviation with which embedding and head begin."""
    return (config.init_width or config.width) ** -0.5


def _residual_scale(config: DecoderConfig) -> float:
    """Smaller with depth: the sum over all blocks keeps unit variance."""
    return 1 / (2 * config.depth)


def _residual_init(config: DecoderConfig) -> nn.initializers.Initializer:
    """Fan-in scale for the layers that add to the residual stream."""
    return nn.initializers.variance_scaling(
        _residual_scale(config), "fan_in", "truncated_normal"
    )
