# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Named sizes of the decoder, and what a size costs, without allocating it."""

import dataclasses
import difflib
import math
import types
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from wlab.core import leaves_with_paths
from wlab.models.decoder import Decoder, DecoderConfig, tiny

__all__ = [
    "SIZES",
    "ParameterCounts",
    "activation_bytes",
    "get_size",
    "parameter_counts",
    "train_flops",
]

_BASE = DecoderConfig(
    vocab=32_768,
    width=384,
    depth=12,
    heads=6,
    kv_heads=2,
    head_dim=64,
    hidden=1024,
    scan=True,
    remat=True,
)
_LARGE = dataclasses.replace(
    _BASE, heads=12, kv_heads=4, head_dim=128, dtype=jnp.bfloat16
)

# Parameters are float32 in all of them, activations bfloat16 from 100m on.
SIZES: Mapping[str, DecoderConfig] = types.MappingProxyType(
    {
        "tiny": tiny(),
        "30m": _BASE,
        "100m": dataclasses.replace(
            _BASE, width=640, depth=18, heads=10, hidden=1792, dtype=jnp.bfloat16
        ),
        "800m": dataclasses.replace(
            _LARGE, width=1536, depth=30, heads=12, hidden=4096
        ),
        "2b": dataclasses.replace(_LARGE, width=2560, depth=28, heads=20, hidden=6912),
        # 2.0 billion parameters, of which 0.43 billion see a token.
        "2b-moe": dataclasses.replace(
            _LARGE,
            width=1536,
            depth=24,
            heads=12,
            hidden=512,
            experts=32,
            experts_per_token=4,
        ),
        # The shape of Llama 3 8B (Dubey et al., 2024, "The Llama 3 Herd of Models").
        "8b": dataclasses.replace(
            _LARGE,
            vocab=128_256,
            width=4096,
            depth=32,
            heads=32,
            kv_heads=8,
            hidden=14_336,
            rope_base=500_000.0,
            norm_eps=1e-5,
            tied=False,
        ),
    }
)


def get_size(name: str, **overrides: Any) -> DecoderConfig:
    """A named size.

    Args:
        name: one of `SIZES`.
        **overrides: fields of `DecoderConfig` to set otherwise.

    Returns:
        The config.

    Raises:
        ValueError: for a name that there is not.

    Examples:
        >>> get_size("8b").width
        4096
    """
    if name not in SIZES:
        near = difflib.get_close_matches(name, SIZES, n=1, cutoff=0.4)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"no size {name!r}{hint}: choose one of {', '.join(SIZES)}")
    return dataclasses.replace(SIZES[name], **overrides)


class ParameterCounts(NamedTuple):
    """How many parameters a model has."""

    total: int
    active: int  # all but the experts that a token is not sent to
    embedding: int  # the table; with a tied head also that
    by_kind: dict[str, int]  # embedding, attention, mlp, router, bias, norm, head


def parameter_counts(config: DecoderConfig) -> ParameterCounts:
    """Counts the parameters that `Decoder(config).init` would make; it makes none.

    Examples:
        >>> counts = parameter_counts(get_size("2b-moe"))
        >>> f"{counts.total:,}", f"{counts.active:,}"
        ('2,014,520,832', '429,073,920')
    """
    params = jax.eval_shape(
        lambda: Decoder(config).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    )["params"]
    kinds: dict[str, int] = {}
    for path, leaf in leaves_with_paths(params):
        kind = _kind(path.split("/"))
        kinds[kind] = kinds.get(kind, 0) + math.prod(leaf.shape)
    total = sum(kinds.values())
    idle = 0
    if config.experts:
        idle = kinds["mlp"] // config.experts
        idle *= config.experts - config.experts_per_token
    return ParameterCounts(total, total - idle, kinds["embedding"], kinds)


def _kind(parts: list[str]) -> str:
    if parts[-1] == "scale":
        return "norm"
    if parts[-1] == "bias":
        return "bias"
    for part, kind in (("embed", "embedding"), ("router", "router")):
        if part in parts:
            return kind
    return next(kind for kind in ("attention", "mlp", "head") if kind in parts)


def train_flops(config: DecoderConfig, batch: int, length: int) -> int:
    r"""Operations of one forward and backward pass, by formula.

    .. math::

        6 N T + 12\, \mathrm{depth} \cdot \mathrm{heads} \cdot \mathrm{head\_dim}
        \cdot \mathrm{length} \cdot T + 6\, \mathrm{width} \cdot \mathrm{vocab} \cdot T

    with `T = batch * length` tokens and `N` the parameters of the blocks' matrices that
    a token meets: the experts it is sent to, not the others. The terms are these
    matrices, attention and the logits. Attention is counted over all pairs of
    positions, as it is computed here, not over the causal half. What is computed
    again under rematerialisation is not counted, nor what a capacity drops.

    Args:
        config: the model.
        batch: sequences.
        length: tokens of each.

    Returns:
        Multiplications and additions together.

    Examples:
        >>> f"{train_flops(get_size('8b'), 1, 8192):.2e}"
        '4.74e+14'
    """
    c, counts = config, parameter_counts(config)
    outside = ("embedding", "bias", "norm", "head")
    blocks = counts.active - sum(counts.by_kind.get(kind, 0) for kind in outside)
    attention = 12 * c.depth * c.heads * c.head_dim * length
    return (6 * blocks + attention + 6 * c.width * c.vocab) * batch * length


def activation_bytes(config: DecoderConfig, batch: int, length: int) -> int:
    """Memory that the activations of a training step take at its peak, by formula.

    For scanned and rematerialised blocks. Kept is the input of each block; to it comes
    the larger of what the head needs, logits and their gradient in float32, and of
    what one block needs in its backward pass: its activations and their gradients,
    with the scores of attention three times in float32 (scores, weights, gradient) and,
    with experts, each token's rows once for every expert it is sent to. On one device,
    without parameters, their gradients and the optimiser: divide by the devices
    that share the batch.

    It is a plan, not a measurement: the compiler fuses some of this away, and takes
    more where it has no narrow arithmetic or no grouped product of its own, as on a
    CPU. XLA's own plan for a CPU is within a factor of 2 of it.

    Args:
        config: the model.
        batch: sequences.
        length: tokens of each.

    Returns:
        The bytes.

    Raises:
        ValueError: if the blocks are not scanned and rematerialised.

    Examples:
        >>> round(activation_bytes(get_size("8b"), 1, 8192) / 2**30)
        28
    """
    c = config
    if not (c.scan and c.remat):
        raise ValueError(
            "activation_bytes counts what scan=True, remat=True keep; this config has "
            f"scan={c.scan}, remat={c.remat}"
        )
    tokens, item = batch * length, jnp.dtype(c.dtype).itemsize
    kept = c.depth * tokens * c.width * item
    head = 2 * 4 * tokens * c.vocab
    copies = c.experts_per_token if c.experts else 1
    if c.experts and c.capacity is not None:
        copies = copies * c.capacity
    rows = 4 * c.width + (2 * c.heads + 2 * c.kv_heads) * c.head_dim
    gated = 3 * c.hidden + (2 * c.width if c.experts else 0)
    scores = 3 * 4 * batch * c.heads * length * length
    block = int(2 * item * tokens * (rows + copies * gated)) + scores
    return kept + max(head, block)
