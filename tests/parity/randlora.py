# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""RandLoRA against Hugging Face's peft with recorded bases, in float64."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.parity import Computed, compiled
from wlab import lift, materialise
from wlab.peft import randlora

LAYERS = ("up", "down", "sq")
INPUTS = (
    *("basis_A", "basis_B", "r", "alpha"),
    *(f"{tag}_{n}" for tag in LAYERS for n in ("W", "lambda", "gamma", "x", "g")),
)
KERNEL = "dense/kernel"


@compiled
def compute(inputs: Mapping[str, np.ndarray]) -> dict[str, Computed]:
    rank, alpha = int(inputs["r"]), float(inputs["alpha"])
    bases = {
        "a": jnp.asarray(inputs["basis_A"][:, 0]),
        "b": jnp.asarray(inputs["basis_B"]),
    }
    out: dict[str, Computed] = {}
    for tag in LAYERS:
        w, lam, gamma, x, g = (
            jnp.asarray(inputs[f"{tag}_{n}"])
            for n in ("W", "lambda", "gamma", "x", "g")
        )
        base = {"dense": {"kernel": w.T}}

        def attached(train: Any, pairing: Any, base: Any = base) -> Any:
            method = randlora(rank, alpha=alpha, pairing=pairing)
            start = method.init(0, base)
            adapter = start._replace(train={KERNEL: train}, frozen={"": bases})
            return method.attach(adapter, base)["dense"]["kernel"]

        def loss(train: Any, attached: Any = attached, x: Any = x, g: Any = g):
            return jnp.sum(lift(jnp.matmul)(x, attached(train, "hf")) * g)

        train = {"lam": lam, "gamma": gamma}
        grads = jax.grad(loss)(train)
        for name, pairing in (("delta", "hf"), ("delta_paper", "paper")):
            kernel = materialise(attached(train, pairing))
            out[f"{tag}_{name}"] = Computed(kernel.T - w, 1e-9)
        y = lift(jnp.matmul)(x, attached(train, "hf"))
        out[f"{tag}_y"] = Computed(y, 1e-9)
        out[f"{tag}_grad_lambda"] = Computed(grads["lam"], 1e-9)
        out[f"{tag}_grad_gamma"] = Computed(grads["gamma"], 1e-9)
        begun = randlora(rank).init(0, base).train[KERNEL]["gamma"]
        out[f"{tag}_gamma_init"] = Computed(begun, 1e-6)
    return out
