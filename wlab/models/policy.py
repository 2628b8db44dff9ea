# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""A policy for control: layers with a norm and a ReLU, and a linear head."""

from collections.abc import Sequence

import flax.linen as nn
import jax


class Policy(nn.Module):
    """From an observation to the scores of actions, or to numbers.

    Each hidden layer is a product, a layer norm and a ReLU.

    Attributes:
        actions: what the head has.
        widths: of the hidden layers.
    """

    actions: int
    widths: Sequence[int] = (256, 256, 256)

    @nn.compact
    def __call__(self, observation: jax.Array) -> jax.Array:
        """Scores `[..., actions]` of observations `[..., n]`."""
        x = observation
        for width in self.widths:
            x = nn.relu(nn.LayerNorm()(nn.Dense(width)(x)))
        return nn.Dense(self.actions)(x)
