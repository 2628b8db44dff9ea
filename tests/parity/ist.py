# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""IST's importance against the authors' callback; theirs is the negative of ours."""

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from tests.parity import Computed, compiled
from wlab import peft

INPUTS = ("n_layers", "selections", "losses", "beta")
NUMBERED = r"(rl_)?lr"  # either name


@compiled
def compute(inputs: Mapping[str, np.ndarray]) -> dict[str, Computed]:
    state = peft.ist_init(int(inputs["n_layers"]))
    scores = []
    for held, losses in zip(inputs["selections"], inputs["losses"], strict=True):
        rate = float(inputs.get("lr", inputs.get("rl_lr", 10.0)))
        state = peft.ist_update(state, jnp.asarray(held), jnp.asarray(losses), rate)
        scores.append(-state.importance)
    return {"scores": Computed(jnp.stack(scores), 1e-5)}
