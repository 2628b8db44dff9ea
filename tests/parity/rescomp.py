# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""GPTQ, GPTAQ and ResComp against the authors' classes, in float64."""

import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from tests.parity import Computed, compiled
from wlab.quant._gptq import solve
from wlab.quant._uniform import Uniform

INPUTS = (
    *("W", "X_fp", "X_q", "batch_tokens", "dead", "blocksize", "group", "percdamp"),
)
# Which entries a run of the reference in float32 agrees with it on: a remark.
NUMBERED = r".*_f32agree"
KINDS: dict[str, dict[str, float]] = {
    "gptq": {},
    "gptaq": {"alpha": 0.25},
    "rescomp": {"alpha": 0.25, "alpha2": 0.25},
}
CONFIGS = (
    *("pc_asym4", "pc_sym4_act", "g_asym3_mse", "g_sym3_act_mse"),
    *("g_asym4_act_static", "pc_asym2", "g_asym2_act_mse"),
)


@compiled
def compute(inputs: Mapping[str, np.ndarray]) -> dict[str, Computed]:
    w, own, seen = (jnp.asarray(inputs[n], float) for n in ("W", "X_fp", "X_q"))
    chunks = -(-len(seen) // int(inputs["batch_tokens"]))
    h = 2 / chunks * seen.T @ seen
    d = 2 / chunks * (own - seen).T @ seen
    out: dict[str, Computed] = {"H": Computed(h, 1e-6), "dXXT": Computed(d, 1e-6)}
    for config in CONFIGS:
        options = _options(config, inputs)
        for kind, strengths in KINDS.items():
            cross = None if kind == "gptq" else d
            q = solve(w.T, h, cross, **options, **strengths).values.T
            name = f"{kind}_{config}"
            out[name] = Computed(q, 1e-9)
            both = seen @ q.T
            for tag, x in (("asymm", own), ("sym", seen)):
                error = jnp.mean((x @ w.T - both) ** 2)
                out[f"{name}_err_{tag}"] = Computed(error, 1e-9)
    return out | _quantisers(w)


def _options(config: str, inputs: Mapping[str, np.ndarray]) -> dict[str, Any]:
    bits = int(re.search(r"\d", config)[0])  # type: ignore[index]
    return {
        "grid": Uniform(bits, symmetric="_sym" in config, clip="mse" in config),
        "group": int(inputs["group"]) if config.startswith("g_") else None,
        "block": int(inputs["blocksize"]),
        "damping": float(inputs["percdamp"]),
        "act_order": "_act" in config,
        "static_groups": "static" in config,
    }


def _quantisers(w: jnp.ndarray) -> dict[str, Computed]:
    odd = w.at[1].set(0).at[2].set(jnp.abs(w[2])).at[4].set(-jnp.abs(w[4]))
    out: dict[str, Computed] = {}
    for kind in ("sym", "asym"):
        for bits in (2, 3, 4, 8):
            for clip in (False, True):
                grid = Uniform(bits, symmetric=kind == "sym", clip=clip)
                found = grid.fit(odd, axis=1)
                column = found._replace(
                    scale=found.scale[:, None], zero=found.zero[:, None]
                )
                name = f"qp_{kind}{bits}{'_mse' if clip else ''}"
                out[f"{name}_scale"] = Computed(column.scale, 1e-9)
                out[f"{name}_zero"] = Computed(column.zero, 1e-9)
                out[f"{name}_deq"] = Computed(grid.values(odd, column), 1e-6)
    whole = Uniform(4).fit(w.reshape(-1))
    for name, x in whole._asdict().items():
        out[f"qp_tensor_asym4_{name}"] = Computed(jnp.full((len(w), 1), x), 1e-9)
    return out
