# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""EGG: a recurrent language model of integers only.

Weights and activations are int8 from -127 to 127, sums int32, and 16 stands for 1.
There is no activation function: clipping is the only non-linearity. A block is a gated
recurrent layer and two products, each behind a norm by the mean magnitude:

- product: ``clip((u W^T) >> log2(16 sqrt(n)))``, of n inputs;
- norm: ``clip(u w // max(mean |u|, 1))``;
- gates: ``f = clip(Wf u + Uf s + bf)``, ``g = ((f + 127) s) >> 8``,
  ``h = clip(Wh u + Uh g + bh)``, ``s' = s + (((f + 127) (h - s)) >> 8)``.

Bytes are the tokens, and byte 0 begins a text: it clears the state. Matrices are of
shape (outputs, inputs), those of blocks stacked over layers.

The norm of the reference divides by zero where the magnitudes sum to less than the
width; here the divisor is 1 then, unless ``least=0`` is asked for.

References:
    Sarkar et al., `Evolution Strategies at the Hyperscale
    <https://arxiv.org/abs/2511.16652>`_, 2025, appendix G.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from wlab.core import Noisy

VOCAB = 256
ONE = 16
"""The integer that stands for 1."""

_BITS = 4  # of the fraction


@dataclasses.dataclass(frozen=True)
class Config:
    """The shape of the model.

    Attributes:
        width: of the residual stream, a power of 4, so that all divisions are shifts.
        depth: its blocks.
    """

    width: int = 256
    depth: int = 6

    def __post_init__(self):
        """Checks the sizes.

        Raises:
            ValueError: for a width that is no power of 4, or no block.
        """
        if (
            self.width < 4
            or self.width.bit_count() != 1
            or self.width.bit_length() % 2 == 0
        ):
            near = 4 ** max(1, round(math.log(max(self.width, 1), 4)))
            raise ValueError(
                f"width={self.width} is no power of 4, of which roots are shifts: take "
                f"{near}"
            )
        if self.depth < 1:
            raise ValueError(f"depth={self.depth}: a model has a block or more")


def init(key: jax.Array, config: Config) -> Any:
    """Weights of standard deviation 1, norms of 1 and biases of 0, in int8.

    Args:
        key: a typed random key.
        config: the shape.
    """
    d, n = config.width, config.depth
    shapes = {
        "blocks": {
            "att": {name: (n, d, d) for name in ("Uf", "Uh", "Wf", "Wh")},
            "mlp": {"in": (n, 4 * d, d), "out": (n, d, 4 * d)},
        },
        "emb": (VOCAB, d),
        "head": (VOCAB, d),
    }
    leaves, structure = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
    keys = jax.random.split(key, len(leaves))
    params = jax.tree.unflatten(
        structure,
        [
            jnp.clip(jnp.round(ONE * jax.random.normal(k, s)), -127, 127).astype(
                jnp.int8
            )
            for k, s in zip(keys, leaves, strict=True)
        ],
    )
    blocks = params["blocks"]
    blocks["att"] |= {name: jnp.zeros((n, d), jnp.int8) for name in ("bf", "bh")}
    for name in ("ln1", "ln2"):
        blocks[name] = {"scale": jnp.full((n, d), ONE, jnp.int8)}
    params["ln_out"] = {"scale": jnp.full((d,), ONE, jnp.int8)}
    return params


def zero_state(config: Config) -> jax.Array:
    """The state before a text, int8 `[depth, width]`."""
    return jnp.zeros((config.depth, config.width), jnp.int8)


def apply(
    params: Any, tokens: jax.Array, state: jax.Array, *, least: int = 1
) -> tuple[jax.Array, jax.Array]:
    """The logits of what follows each token.

    Args:
        params: from `init`; matrices may be `wlab.core.Noisy`.
        tokens: integers `[length]` below 256; vmap for several texts.
        state: int8 `[depth, width]`, from `zero_state` or the call before.
        least: the least divisor of a norm; 0 is what the reference does.

    Returns:
        int8 logits `[length, 256]` and the state behind the last token.

    Raises:
        TypeError: for tokens that are no integers.
        ValueError: for tokens or a state of another shape.
    """
    depth, width = params["blocks"]["ln1"]["scale"].shape
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise TypeError(f"tokens of {tokens.dtype}: the bytes of a text are integers")
    if tokens.ndim != 1 or state.shape != (depth, width):
        raise ValueError(
            f"tokens of shape {tokens.shape} and a state of {state.shape}: give one "
            f"text and {(depth, width)}, and vmap over texts"
        )

    def layer(x: jax.Array, layer: Any) -> tuple[jax.Array, jax.Array]:
        return block(x, *layer, least=least)

    def one(state: jax.Array, token: jax.Array) -> tuple[jax.Array, jax.Array]:
        state = jnp.where(token == 0, jnp.int8(0), state)
        x = embed(params["emb"], token)
        x, state = jax.lax.scan(layer, x, (params["blocks"], state))
        return state, product(norm(x, params["ln_out"]["scale"], least), params["head"])

    state, logits = jax.lax.scan(one, state, tokens.astype(jnp.int32))
    return logits, state


def block(
    x: jax.Array, params: Any, state: jax.Array, *, least: int = 1
) -> tuple[jax.Array, jax.Array]:
    """One block on a vector, int8 `[width]`; returns it and the layer's new state."""
    read = norm(x, params["ln1"]["scale"], least)
    state = gru(read, state, params["att"])
    x = _clip(_wide(x) + _wide(state))
    hidden = product(norm(x, params["ln2"]["scale"], least), params["mlp"]["in"])
    x = _clip(_wide(x) + _wide(product(hidden, params["mlp"]["out"])))
    return x, state


def gru(u: jax.Array, state: jax.Array, params: Any) -> jax.Array:
    """The gated recurrent layer: its output is its new state, int8 `[width]`."""
    s = _wide(state)

    def gate(w: str, x: jax.Array, v: str, y: jax.Array, b: str) -> jax.Array:
        total = _wide(product(x, params[w])) + _wide(product(y, params[v]))
        return _wide(_clip(total + _wide(params[b])))

    f = gate("Wf", u, "Uf", state, "bf")
    g = ((f + 127) * s) >> 8
    h = gate("Wh", u, "Uh", g.astype(jnp.int8), "bh")
    return (s + (((f + 127) * (h - s)) >> 8)).astype(jnp.int8)


def norm(u: jax.Array, weight: jax.Array, least: int = 1) -> jax.Array:
    """A vector over its mean magnitude, times a weight, int8 `[width]`."""
    size = jnp.abs(_wide(u)).sum(dtype=jnp.int32) >> _log2(u.shape[-1])
    product = _wide(u) * _wide(weight)
    if not least:
        return _clip(jnp.floor_divide(product, size))
    return _over(product, jnp.maximum(size, least)).astype(jnp.int8)


def _over(x: jax.Array, size: jax.Array) -> jax.Array:
    """``clip(x // size)`` of int32, exactly for sizes from 1 to 127.

    One division for a vector, by which its elements are multiplied: processors divide
    integers one by one. The largest product is 254 * 2^22, and the error of the
    inverse stays below one step.
    """
    inverse = (2**22 + size - 1) // size
    return ((jnp.clip(x, -127 * size, 127 * size) + 127 * size) * inverse >> 22) - 127


def product(u: jax.Array, weight: Any) -> jax.Array:
    """A vector times a matrix, over 16 and the root of the inputs; int8 `[outputs]`."""
    dense = weight.weight if isinstance(weight, Noisy) else weight
    total = _dot(u, dense)
    if isinstance(weight, Noisy):
        hidden = (_wide(u)[:, None] * _wide(weight.b)).sum(0, dtype=jnp.int32)
        noise = (hidden[None, :] * _wide(weight.a)).sum(1, dtype=jnp.int32)
        total = total + (noise >> weight.shift)
    return _clip(total >> (_BITS + _log2(math.isqrt(u.shape[-1]))))


def embed(table: Any, token: jax.Array) -> jax.Array:
    """The row of a token, int8 `[width]`."""
    if not isinstance(table, Noisy):
        return table[token]
    noise = (_wide(table.a[token])[None, :] * _wide(table.b)).sum(1, dtype=jnp.int32)
    return _clip(_wide(table.weight[token]) + (noise >> table.shift))


def log_likelihood(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """The log-likelihood of each target, in sixteenths of a bit.

    Args:
        logits: int8 `[..., 256]`; 16 is a factor of two.
        targets: integers `[...]`.

    Returns:
        int32 `[...]`; bits are ``-result / 16``.
    """
    q = _wide(logits) + 128
    total = jnp.asarray(EXP2)[q].sum(-1, dtype=jnp.int32)
    # The logarithm without a table of all sums: it steps at a few hundred of them.
    log2 = (
        jnp.searchsorted(jnp.asarray(_STEPS), total, side="right").astype(jnp.int32) - 1
    )
    index = targets.astype(jnp.int32)[..., None]
    return jnp.take_along_axis(q, index, axis=-1)[..., 0] - log2


def _log2_of_sum(total: int) -> int:
    return int(ONE * math.log2(total / ONE))


def _steps() -> np.ndarray:
    """The least sum of each logarithm, from 0 to that of the largest sum."""
    found = []
    for value in range(_log2_of_sum(VOCAB * int(EXP2[-1])) + 1):
        least = round(ONE * 2 ** (value / ONE))
        while _log2_of_sum(least) >= value and least > ONE:
            least -= 1
        while _log2_of_sum(least) < value:
            least += 1
        found.append(least)
    return np.array(found, np.int32)


EXP2 = np.array([int(ONE * 2 ** (i / ONE)) for i in range(VOCAB)], np.int32)
"""2 to the power of i sixteenths, times 16."""

_STEPS = _steps()


def _log2(n: int) -> int:
    return n.bit_length() - 1


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.int32)


def _clip(x: jax.Array) -> jax.Array:
    return jnp.clip(x, -127, 127).astype(jnp.int8)


def _dot(u: jax.Array, weight: jax.Array) -> jax.Array:
    """``u W^T`` in int32, of operands in int8."""
    return jnp.einsum("i,oi->o", u, weight, preferred_element_type=jnp.int32)
