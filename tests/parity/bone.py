# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Bone, its odd sizes, mini and Bat against Hugging Face's peft, in float64."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.parity import Computed, compiled
from wlab import lift, materialise
from wlab.peft import bone

TAGS = ("bone", "boneodd", "mini", "bat")
INPUTS = (
    *("r", "mini_r", "batrow_D"),
    *(f"{tag}_{name}" for tag in TAGS for name in ("W", "bias", "x", "g", "D")),
)
KERNEL = "dense/kernel"


@compiled
def compute(inputs: Mapping[str, np.ndarray]) -> dict[str, Computed]:
    rank, mini = int(inputs["r"]), int(inputs["mini_r"])
    methods = {
        "bone": bone(rank),
        "boneodd": bone(rank),
        "mini": bone(rank, variant="mini", mini_rank=mini),
        "bat": bone(rank, variant="bat"),
    }
    out: dict[str, Any] = {}
    for tag, method in methods.items():
        base = {"dense": {"kernel": jnp.asarray(inputs[f"{tag}_W"].T)}}
        x, g, bias = (jnp.asarray(inputs[f"{tag}_{n}"]) for n in ("x", "g", "bias"))
        start = method.init(0, base)

        def attached(
            d: Any, method: Any = method, start: Any = start, base: Any = base
        ):
            return method.attach(start._replace(train={KERNEL: {"d": d}}), base)

        def layer(d: Any, attached: Any = attached, x: Any = x, bias: Any = bias):
            return lift(jnp.matmul)(x, attached(d)["dense"]["kernel"]) + bias

        def loss(d: Any, layer: Any = layer, g: Any = g) -> jax.Array:
            return jnp.sum(layer(d) * g)

        d = jnp.asarray(inputs[f"{tag}_D"])
        out[f"{tag}_y"] = layer(d)
        out[f"{tag}_grad_D"] = jax.grad(loss)(d)
        out[f"{tag}_W_merged"] = materialise(attached(d))["dense"]["kernel"].T
    method = bone(rank, variant="bat", axis="in")
    base = {"dense": {"kernel": jnp.asarray(inputs["bat_W"].T)}}
    train = {KERNEL: {"d": jnp.asarray(inputs["batrow_D"])}}
    tree = method.attach(method.init(0, base)._replace(train=train), base)
    out["batrow_W_merged"] = materialise(tree)["dense"]["kernel"].T
    return {name: Computed(value, 1e-9) for name, value in out.items()}
