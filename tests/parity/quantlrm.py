# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""QuantLRM's importance and its search of scales on one kernel, in float64.

The search is given the importance as the file has it, in float32, for an ulp of it is
more than the losses may differ by; it is therefore an input here, and compared apart.
"""

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from tests.parity import Computed, compiled
from wlab.quant import both_ends, channel_importance, search_scale, update_stats
from wlab.quant._minmax import MinMax

INPUTS = ("W", "X")
NUMBERED = r"absdw_\d+|imp_exact_0"


def compute(inputs: Mapping[str, np.ndarray]) -> dict[str, Computed]:
    out = _computed(inputs)
    given, own = inputs["imp_exact_0"], np.asarray(out.pop("imp_exact_0").value)
    if not np.max(np.abs(own - given)) <= 1e-6 * np.max(np.abs(given)):
        raise ValueError("imp_exact_0 does not agree with the reference")
    return out


@compiled
def _computed(inputs: Mapping[str, np.ndarray]) -> dict[str, Computed]:
    names = sorted(
        (name for name in inputs if name.startswith("absdw_")),
        key=lambda name: int(name.rpartition("_")[2]),
    )
    sizes = [jnp.asarray(inputs[name].T) for name in names]
    out: dict[str, Computed] = {}
    for tag, mid in (("exact", "median"), ("code", "storage")):
        stats = update_stats(sizes, mid)
        values = jnp.stack([stats.low, stats.high, stats.mid])
        out[f"stats_{tag}"] = Computed(values, 1e-6)
        for name, x in zip(names, sizes, strict=True):
            i = name.rpartition("_")[2]
            out[f"imp_{tag}_{i}"] = Computed(channel_importance(x, stats), 1e-6)
            if tag == "exact":
                out[f"quad_{i}"] = Computed(both_ends(x, stats).T, 1e-6)
    w, x = jnp.asarray(inputs["W"].T), jnp.asarray(inputs["X"])
    found = search_scale(
        lambda params, x: x @ params["kernel"],
        {"kernel": w},
        ["kernel"],
        x,
        jnp.asarray(inputs["imp_exact_0"], w.dtype),
        grid=MinMax(3),
        group=len(w) // 2,
        normalise=False,
    )
    return out | {
        "losses_w3": Computed(found.losses, 1e-9),
        "best_ratio_idx": Computed(jnp.argmin(found.losses), 0.0),
        "best_scales": Computed(found.scale, 1e-9),
    }
