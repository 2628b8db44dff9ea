# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""HUT against its formulas in float64, in Flax's layout."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.parity import Computed, compiled
from wlab.peft import hut

INPUTS = ("W", "M_A", "M_B", "gamma", "beta", "bias", "x", "g")
KERNEL = "dense/kernel"


@compiled
def compute(inputs: Mapping[str, np.ndarray]) -> dict[str, Computed]:
    given = {name: jnp.asarray(inputs[name]) for name in INPUTS}
    base = {"dense": {"kernel": given["W"], "bias": given["bias"]}}
    rank = given["M_A"].shape[1]
    train = {
        "mask_a": given["M_A"],
        "mask_b": given["M_B"],
        "gamma": given["gamma"],
        "beta": given["beta"],
    }

    def attached(train: Any, form: Any) -> Any:
        method = hut(rank, form=form)
        return method.attach(
            method.init(0, base)._replace(train={KERNEL: train}), base
        )["dense"]

    def layer(train: Any, form: Any = "residual") -> jax.Array:
        new = attached(train, form)
        return given["x"] @ new["kernel"] + new["bias"]

    grads = jax.grad(lambda t: jnp.sum(layer(t) * given["g"]))(train)
    merged = attached(train, "residual")
    out = {
        "y": layer(train),
        "y_direct": layer(train, "direct"),
        "W_merged": merged["kernel"],
        "bias_merged": merged["bias"],
        "grad_M_A": grads["mask_a"],
        "grad_M_B": grads["mask_b"],
        "grad_gamma": grads["gamma"],
        "grad_beta": grads["beta"],
    }
    return {name: Computed(value, 1e-9) for name, value in out.items()}
