# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""SNELL, SNELLA and their allocation against the authors' code, in float64."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.parity import Computed, compiled
from wlab import peft
from wlab.peft._snella import Kernel, kernel_of, sparsify

TAGS: dict[str, Kernel] = {
    "klora": "distance",
    "snell": "distance",
    "mixk": "mix",
    "snella": "mix",
}


INPUTS = (
    *("x", "g", "In_Qs", "Out_Qs", "thres", "alpha", "gamma", "beta"),
    *("alloc_shapes", "alloc_cfg", "ipt_steps", "alloc_volumes"),
)
NUMBERED = r"ipt_\d+_.*_[pg]"  # the factors of each step and layer


@compiled
def compute(inputs: Mapping[str, np.ndarray]) -> dict[str, Computed]:
    return kernels(inputs) | allocation(inputs)


def kernels(inputs: Mapping[str, np.ndarray]) -> dict[str, Computed]:
    x, g = jnp.asarray(inputs["x"]), jnp.asarray(inputs["g"])
    train = {"p": jnp.asarray(inputs["In_Qs"]), "q": jnp.asarray(inputs["Out_Qs"])}
    mix = {n: jnp.asarray(inputs[n]).reshape(()) for n in ("alpha", "gamma", "beta")}
    limit = jnp.asarray(inputs["thres"]).reshape(())
    out: dict[str, Any] = {}
    for tag, kind in TAGS.items():
        given = train | (mix if kind == "mix" else {})
        sparse = tag in ("snell", "snella")

        def change(t: Any, kind: Any = kind, sparse: bool = sparse) -> jax.Array:
            k = kernel_of(t, kernel=kind)
            return sparsify(k, limit) if sparse else k

        def loss(t: Any, change: Any = change) -> jax.Array:
            return jnp.sum((x @ change(t)) * g)

        grads = jax.grad(loss)(given)
        out[f"{tag}_K"] = kernel_of(given, kernel=kind)
        if sparse:
            out[f"{tag}_S"] = change(given)
        out[f"{tag}_y"] = x @ change(given)
        out[f"{tag}_grad_In"], out[f"{tag}_grad_Out"] = grads["p"], grads["q"]
        if kind == "mix":
            for name in mix:
                out[f"{tag}_grad_{name}"] = grads[name].reshape(1)
    return {name: Computed(value, 1e-9) for name, value in out.items()}


def allocation(inputs: Mapping[str, np.ndarray]) -> dict[str, Computed]:
    shapes = inputs["alloc_shapes"].astype(int)
    ratio, warmup, final, every, b1, b2, total = map(float, inputs["alloc_cfg"])
    layers = sorted(
        {m[1] for n in inputs if (m := re.match(r"ipt_0_(.*)_In_Qs_p", n))},
        key=lambda name: [int(x) for x in re.findall(r"\d+", name)],
    )

    def factors(step: int, which: str) -> Any:
        return {
            layer: {
                ours: jnp.asarray(inputs[f"ipt_{step}_{layer}_{name}_{which}"])
                for ours, name in (("p", "In_Qs"), ("q", "Out_Qs"))
            }
            for layer in layers
        }

    state = peft.allocator_init(factors(0, "p"))
    scores: dict[str, jax.Array] = {}
    for step in range(int(inputs["ipt_steps"])):
        state, scores = peft.importance(
            state,
            factors(step, "p"),
            factors(step, "g"),
            mean_decay=b1,
            spread_decay=b2,
        )
    sizes = {layer: int(np.prod(s)) for layer, s in zip(layers, shapes, strict=True)}
    found = [peft.allocate(scores, sizes, v) for v in inputs["alloc_volumes"]]
    whole = float(sum(sizes.values()))
    # The target as the authors' loop adds it up: the volumes are cut to integers.
    target = 0.0
    for size in sizes.values():
        target += (1 - ratio) * size
    plan = [
        peft.budget(
            step,
            initial=whole,
            target=target,
            total=int(total),
            warmup=int(warmup),
            final=int(final),
            every=int(every),
        )
        for step in range(int(total) + 1)
    ]
    return {
        "ipt_scores_raw": Computed([scores[layer] for layer in layers], 1e-9),
        "alloc_thres": Computed([[t[layer] for layer in layers] for t in found], 1e-6),
        "sched_volume": Computed([p.volume for p in plan], 1e-9),
        "sched_mask": Computed(jnp.array([p.due for p in plan], int), 0.0),
    }
