# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Routed experts as a module, alone and on a mesh, and the losses of their routers."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from wlab.core import sharding
from wlab.models._routing import dropless, route, with_capacity

__all__ = ["Experts", "apply_with_losses"]


def _dropless_on_mesh(
    x: jax.Array,
    chosen: jax.Array,
    weights: jax.Array,
    kernels: tuple[jax.Array, jax.Array, jax.Array],
) -> jax.Array:
    """`dropless` for `x` of `[batch, length, width]`, on whatever mesh there is.

    Sorting all tokens of the mesh would bring them all together. Instead each device
    sorts its own; along "expert" the tokens are gathered, every device computes what
    its experts have to say, and the sums go back to where the tokens were.
    """

    def local(x: Any, chosen: Any, weights: Any, kernels: Any) -> jax.Array:
        rows, ids, parts = (a.reshape(-1, a.shape[-1]) for a in (x, chosen, weights))
        return dropless(rows, ids, parts, kernels).reshape(x.shape)

    sizes = _manual_axes(x.shape[0])
    if not sizes:
        return local(x, chosen, weights, kernels)
    experts, _, hidden = kernels[0].shape
    if experts % sizes.get("expert", 1):
        raise ValueError(
            f"experts={experts} do not divide over the mesh's axis expert of "
            f"{sizes['expert']}: choose a multiple, or another mesh"
        )
    expert = "expert" if "expert" in sizes else None
    tensor = "tensor" if hidden % sizes.get("tensor", hidden + 1) == 0 else None

    def shard(x: Any, chosen: Any, weights: Any, *kernels: Any) -> jax.Array:
        if expert:
            x, chosen, weights = (
                jax.lax.all_gather(a, expert, axis=0, tiled=True)
                for a in (x, chosen, weights)
            )
            own = kernels[0].shape[0]
            chosen = chosen - jax.lax.axis_index(expert) * own
            chosen = jnp.where((chosen >= 0) & (chosen < own), chosen, own)
        y = local(x, chosen, weights, kernels)
        y = jax.lax.psum(y, tensor) if tensor else y
        if expert:
            y = jax.lax.psum_scatter(y, expert, scatter_dimension=0, tiled=True)
        return y

    rows = jax.P(tuple(name for name in sharding.BATCH if name in sizes) or None)
    into, outof = jax.P(expert, None, tensor), jax.P(expert, tensor)
    return jax.shard_map(
        shard,
        in_specs=(rows, rows, rows, into, into, outof),
        out_specs=rows,
    )(x, chosen, weights, *kernels)


def _manual_axes(batch: int) -> dict[str, int]:
    """The mesh axes over which `dropless` is divided by hand, with their sizes.

    None where the mesh's axes divide nothing, where the function around has taken one
    of them already, or where the batch does not divide, as when a model is initialised
    with a single sequence.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not mesh.are_all_axes_auto:
        return {}
    sizes = {n: mesh.shape[n] for n in sharding.AXES if mesh.shape.get(n, 1) > 1}
    if batch % math.prod(sizes[n] for n in sharding.BATCH if n in sizes):
        return {}
    return sizes


class _Kernel(nn.Module):
    """One kernel for each expert, `[experts, in, out]`."""

    shape: tuple[int, int, int]
    init_fn: nn.initializers.Initializer
    dtype: DTypeLike
    param_dtype: DTypeLike

    @nn.compact
    def __call__(self) -> jax.Array:
        kernel = self.param("kernel", self.init_fn, self.shape, self.param_dtype)
        return jnp.asarray(kernel, self.dtype)


class Experts(nn.Module):
    """`down(silu(gate(x)) * up(x))` with kernels that depend on the token.

    Parameters: `router/kernel` `[width, experts]` and `{gate,up,down}/kernel`
    `[experts, in, out]`. Where the collection "losses" is mutable, "balance" and "z"
    are sown there, and "dropped" and "max_load" in "metrics": the part of all choices
    that were dropped, and the load of the busiest expert, 1 where all are alike.

    Attributes:
        experts: their number.
        per_token: how many of them each token goes through.
        capacity: None for dropless; otherwise an expert has
            `ceil(capacity * per_token * length / experts)` places for each sequence.
        hidden: size of each expert's gated layer.
        dtype: dtype of the experts' products.
        param_dtype: dtype in which the parameters are stored.
        down_scale: variance of the down kernels, relative to fan-in scale.
    """

    experts: int
    per_token: int
    capacity: float | None
    hidden: int
    dtype: DTypeLike
    param_dtype: DTypeLike
    down_scale: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Mixes the experts' outputs; `x` is `[batch, length, width]`."""
        batch, length, width = x.shape
        router = nn.Dense(
            self.experts,
            use_bias=False,
            dtype=jnp.float32,
            param_dtype=self.param_dtype,
            precision=jax.lax.Precision.HIGHEST,
            name="router",
        )
        logits = router(x.reshape(-1, width)).reshape(batch, length, self.experts)
        routed = route(logits, self.per_token)

        def kernel(name: str, ins: int, outs: int, scale: float) -> jax.Array:
            init = nn.initializers.variance_scaling(
                scale, "fan_in", "truncated_normal", batch_axis=(0,)
            )
            shape = (self.experts, ins, outs)
            return _Kernel(shape, init, self.dtype, self.param_dtype, name=name)()

        kernels = (
            kernel("gate", width, self.hidden, 1.0),
            kernel("up", width, self.hidden, 1.0),
            kernel("down", self.hidden, width, self.down_scale),
        )
        if self.capacity is None:
            y = _dropless_on_mesh(x, routed.chosen, routed.weights, kernels)
            dropped = jnp.zeros(())
        else:
            share = self.capacity * self.per_token * length / self.experts
            # No expert can be asked for more than every token once.
            size = min(math.ceil(share), length)
            y, dropped = with_capacity(x, routed.chosen, routed.weights, kernels, size)
        if not self.is_initializing():  # so that `init` returns parameters alone
            self.sow("losses", "balance", routed.balance)
            self.sow("losses", "z", routed.z)
            self.sow("metrics", "dropped", dropped)
            self.sow("metrics", "max_load", routed.load.max() * self.experts)
        return y


def apply_with_losses(
    model: nn.Module, params: Any, tokens: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The logits of a model with experts, and how its routers do.

    Args:
        model: a `Decoder` with experts.
        params: its parameters.
        tokens: integers, `[batch, length]`.

    Returns:
        The logits, and float32 scalars: "balance_loss", the load-balancing loss, 1
        where all experts are used alike, and "z_loss" of the routers (both defined by
        `route`), and "dropped", the part of all choices for which there was no place,
        each a mean over the blocks; "max_load", the load of the busiest expert of all
        blocks relative to an even one.

    Raises:
        ValueError: if the model has no experts.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from wlab.models.decoder import Decoder, apply_with_losses, tiny
        >>> from wlab.train import next_token_loss
        >>> model = Decoder(tiny(depth=1, experts=4, hidden=64))
        >>> def loss_fn(params, tokens):
        ...     logits, routers = apply_with_losses(model, params, tokens[:, :-1])
        ...     loss = next_token_loss(logits, tokens)
        ...     return loss + 0.01 * routers["balance_loss"], routers
        >>> tokens = jnp.zeros((2, 8), jnp.int32)
        >>> params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
        >>> sorted(jax.jit(loss_fn)(params, tokens)[1])
        ['balance_loss', 'dropped', 'max_load', 'z_loss']
    """
    logits, sown = model.apply(
        {"params": params}, tokens, mutable=["losses", "metrics"]
    )
    return logits, router_metrics(sown)


def router_metrics(sown: Any) -> dict[str, jax.Array]:
    """What all the routers have sown, as scalars; see `apply_with_losses`."""
    found: dict[str, list[jax.Array]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(sown):
        name = next(k.key for k in reversed(path) if hasattr(k, "key"))
        found.setdefault(name, []).append(leaf.reshape(-1))
    if not found:
        raise ValueError(
            "the model has sown no losses: its config has experts=0; use model.apply"
        )
    every = {name: jnp.concatenate(leaves) for name, leaves in found.items()}
    return {
        "balance_loss": every["balance"].mean(),
        "z_loss": every["z"].mean(),
        "dropped": every["dropped"].mean(),
        "max_load": every["max_load"].max(),
    }
