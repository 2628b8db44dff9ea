# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""RSQ's transforms, importance and Hessians against the authors' code, in float64."""

import re
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from tests.parity import Computed, compiled
from wlab.core import hadamard
from wlab.quant import attention_concentration, weighted_hessian
from wlab.quant._gptq import solve
from wlab.quant._uniform import Uniform

INPUTS = ("exact_full_in_w", "exact_head_out_w", "attn", "X", "W")
NUMBERED = r"had_(x|sign|K)_\d+"
LARGEST = 96  # of the random Hadamard matrices that a file holds


@compiled
def compute(inputs: Mapping[str, np.ndarray]) -> dict[str, Computed]:
    out: dict[str, Computed] = {}
    for name in inputs:
        if found := re.fullmatch(r"had_x_(\d+)", name):
            out |= _transforms(int(found[1]), inputs)
    heads = inputs["attn"].shape[1]
    w = jnp.asarray(inputs["exact_head_out_w"])
    by_head = hadamard(w.reshape(heads, -1, w.shape[-1]), axis=1).reshape(w.shape)
    full = hadamard(jnp.asarray(inputs["exact_full_in_w"]))
    out["exact_full_in_out"] = Computed(full, 1e-9)
    out["exact_head_out_out"] = Computed(by_head, 1e-9)
    return out | _tokens(inputs)


def _transforms(n: int, inputs: Mapping[str, np.ndarray]) -> dict[str, Computed]:
    table = inputs.get(f"had_K_{n}")
    x = jnp.asarray(inputs[f"had_x_{n}"])
    sign = jnp.asarray(inputs[f"had_sign_{n}"])
    q = sign[:, None] * hadamard(jnp.eye(n), table=table)
    return {
        f"had_y_{n}": Computed(hadamard(x, table=table), 1e-9),
        f"had_yt_{n}": Computed(hadamard(x, transpose=True, table=table), 1e-9),
        f"had_Q_{n}": Computed(q if n <= LARGEST else np.zeros(0), 1e-6),
    }


def _tokens(inputs: Mapping[str, np.ndarray]) -> dict[str, Computed]:
    probs, x, w = (jnp.asarray(inputs[name]) for name in ("attn", "X", "W"))
    default = attention_concentration(probs)
    out = {"attncon_default": Computed(default, 1e-9)}
    for kind in ("linear", "sqrt"):
        r = attention_concentration(probs, 0.1, 1.0, normalize=kind)
        out[f"attncon_{kind}"] = Computed(r, 1e-9)
    configs = {
        "pc_sym3_mse": (Uniform(3, symmetric=True, clip=True), None),
        "g_asym2": (Uniform(2), w.shape[1] // 2),
    }
    for kind, r in (("uniform", None), ("rsq", default)):
        h = weighted_hessian(x, r)
        out[f"H_{kind}"] = Computed(h, 1e-9)
        for config, (grid, group) in configs.items():
            q = solve(w.T, h, grid=grid, group=group, block=32, damping=0.01)
            out[f"q_{kind}_{config}"] = Computed(q.values.T, 1e-9)
    return out
