# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Scores of layers against the formulas in another framework, in float32."""

import re
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from tests.parity import Computed, compiled
from wlab.quant import lim_scores, zd_score

INPUTS = ("hidden",)
NUMBERED = r"w_\d+_\d+"
# Absolute for scores, which are below one; relative to the largest of them here.
ABSOLUTE = 1e-6


@compiled
def compute(inputs: Mapping[str, np.ndarray]) -> dict[str, Computed]:
    hidden = jnp.asarray(inputs["hidden"])
    blocks: dict[int, dict[str, jnp.ndarray]] = {}
    for name, value in inputs.items():
        if found := re.fullmatch(r"w_(\d+)_(\d+)", name):
            blocks.setdefault(int(found[1]), {})[found[2]] = jnp.asarray(value)
    layers = [{k: {"kernel": w} for k, w in blocks[i].items()} for i in sorted(blocks)]
    scores = {
        "lim_flat": lim_scores(hidden),
        "lim_seq_mean": lim_scores(hidden, reduce="sequence"),
        "lim_token_mean": lim_scores(hidden, reduce="token"),
    }
    for sided, word in ((1, "one"), (2, "two")):
        for pool, tag in (("concat", "concat"), ("matrix", "mean_of_mats")):
            scores[f"zd_{word}_sided_{tag}"] = jnp.stack(
                [zd_score(layer, sided=sided, pool=pool) for layer in layers]
            )
    out = {
        name: Computed(x, ABSOLUTE / jnp.maximum(jnp.abs(x).max(), ABSOLUTE))
        for name, x in scores.items()
    }
    orders = {
        "order_lim": -scores["lim_flat"],
        "order_zd_one_sided": scores["zd_one_sided_concat"],
    }
    return out | {
        name: Computed(jnp.argsort(x, stable=True), 0.0) for name, x in orders.items()
    }
