# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""LoRA, its rank-stabilised form and DoRA against Hugging Face's peft, in float64."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.parity import Computed, compiled
from wlab import lift, materialise
from wlab.core import Adapter
from wlab.peft import lora

INPUTS = ("W", "bias", "x", "g", "A", "B", "alpha", "r", "dora_m")
KERNEL = "dense/kernel"


@compiled
def compute(inputs: Mapping[str, np.ndarray]) -> dict[str, Computed]:
    rank, alpha = int(inputs["r"]), float(inputs["alpha"])
    base = {"dense": {"kernel": jnp.asarray(inputs["W"].T)}}
    a, b = jnp.asarray(inputs["A"].T), jnp.asarray(inputs["B"])
    out: dict[str, Computed] = {}
    for tag in ("lora", "rslora", "dora"):
        method = lora(
            rank, alpha=alpha, rank_stabilized=tag == "rslora", dora=tag == "dora"
        )
        start = method.init(0, base)
        train = {"a": a, "b": b}
        if tag == "dora":
            found = start.train[KERNEL]["magnitude"]
            out["dora_m_init"] = Computed(found, 1e-9)
            train["magnitude"] = jnp.asarray(inputs["dora_m"])
        out |= outputs(method, start, {KERNEL: train}, base, inputs, tag)
    method = lora(rank, alpha=alpha, start="pissa")
    wide = {"dense": {"kernel": base["dense"]["kernel"].astype(jnp.float32)}}
    part = method.init(0, wide).train[KERNEL]
    product = jnp.matmul(part["b"], part["a"].T, precision="highest")
    scale = alpha / rank
    out["pissa_BA"] = Computed(product, 1e-5)
    out["pissa_W_res"] = Computed(inputs["W"] - scale * product, 1e-5)
    out["pissa_scale"] = Computed(scale, 1e-5)
    return out


def outputs(
    method: Any, start: Adapter, train: Any, base: Any, inputs: Any, tag: str
) -> dict[str, Computed]:
    """Output, gradients and merged weight of one layer."""
    x, g, bias = (jnp.asarray(inputs[name]) for name in ("x", "g", "bias"))

    def layer(train: Any) -> jax.Array:
        tree = method.attach(start._replace(train=train), base)
        return lift(jnp.matmul)(x, tree["dense"]["kernel"]) + bias

    grads = jax.grad(lambda t: jnp.sum(layer(t) * g))(train)[KERNEL]
    merged = materialise(method.attach(start._replace(train=train), base))
    found = {
        f"{tag}_y": layer(train),
        f"{tag}_grad_A": grads["a"].T,
        f"{tag}_grad_B": grads["b"],
        f"{tag}_W_merged": merged["dense"]["kernel"].T,
    }
    if "magnitude" in grads:
        found["dora_grad_m"] = grads["magnitude"]
    return {name: Computed(value, 1e-9) for name, value in found.items()}
