# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Which layers an optimiser will move in the next step, read from its state."""

from typing import Any

import jax

from wlab.optim._drop import DropState
from wlab.optim._lisa import LisaState


def active_layers(state: Any) -> dict[str, jax.Array]:
    """The layers of the next step, as arguments of the gradient and of the update.

        layers = active_layers(state)
        (loss, _), grads = layered_value_and_grad(parts)(params, batch, **layers)
        updates, state = tx.update(grads, state, params, **layers)

    Args:
        state: of `wlab.optim.drop`, `drop_muon` or `lisa`, alone or in a chain.

    Returns:
        `start`, the first of the active layers, or `chosen`, the active ones.

    Raises:
        ValueError: if the state holds none of these optimisers, or more than one.

    Examples:
        >>> import jax.numpy as jnp
        >>> import optax
        >>> from wlab.optim import lisa
        >>> tx = optax.chain(optax.clip(1.0), lisa(0.1, "blocks", k=2))
        >>> active_layers(tx.init({"blocks": jnp.ones((6, 2, 2))}))["chosen"].shape
        (2,)
    """
    found: list[DropState | LisaState] = []

    def look(x: Any) -> bool:
        if here := isinstance(x, DropState | LisaState):
            found.append(x)
        return here

    jax.tree.leaves(state, is_leaf=look)
    if len(found) != 1:
        raise ValueError(
            f"the optimiser's state holds {len(found)} states of drop, drop_muon or "
            "lisa: give the part of it that belongs to the one in question"
        )
    (one,) = found
    return (
        {"chosen": one.active} if isinstance(one, LisaState) else {"start": one.start}
    )
