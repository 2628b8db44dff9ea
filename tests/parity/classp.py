# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""CLASSP against its author's optimiser and against the paper's pseudo-code.

Each tensor is a tree of its own; gradients are prescribed.
"""

from collections.abc import Mapping

import jax
import numpy as np
import optax

from tests.parity import Computed, compiled
from wlab.optim import classp

_TENSORS = range(3)
_TAGS = (
    *("paper_p1", "paper_p2", "paper_p3_thr0", "paper_noscale"),
    *("official_p1", "official_p2", "official_noscale", "official_thr1"),
)
INPUTS = (
    *(f"{kind}{i}" for i in _TENSORS for kind in "pg"),
    *(f"{tag}_hyper" for tag in _TAGS),
)
TOLERANCE = 1e-12


@compiled
def compute(inputs: Mapping[str, np.ndarray]) -> dict[str, Computed]:
    out = {}
    for tag in _TAGS:
        lr, threshold, eps, power, scaling = inputs[f"{tag}_hyper"].tolist()
        tx = classp(
            lr, threshold, power, eps, bool(scaling), mode=tag.partition("_")[0]
        )

        def step(carry, grads, tx=tx):
            params, state = carry
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), (params, state[0].accum)

        for i in _TENSORS:
            start = jax.numpy.asarray(inputs[f"p{i}"])
            _, (weights, accum) = jax.lax.scan(
                step, (start, tx.init(start)), inputs[f"g{i}"]
            )
            out[f"{tag}_out{i}"] = Computed(weights, TOLERANCE)
            out[f"{tag}_acc{i}"] = Computed(accum, TOLERANCE)
    return out
