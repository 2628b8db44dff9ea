# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""WaRA against its transforms over features and tokens, in float64."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.parity import Computed, compiled
from wlab import lift, materialise
from wlab.peft import wara

INPUTS = ("A", "B", "x", "band_A", "band_B", "r")
BANDS = ("LL", "LH", "HL", "HH")
KERNEL = "dense/kernel"


@compiled
def compute(inputs: Mapping[str, np.ndarray]) -> dict[str, Computed]:
    a, b, x = (jnp.asarray(inputs[name]) for name in ("A", "B", "x"))
    rank = a.shape[0]
    base = {"dense": {"kernel": jnp.zeros((2 * a.shape[1], 2 * b.shape[0]), a.dtype)}}
    trained: dict[str, Any] = {
        "shared": {"a_all1": a.T, "b_all1": b},
        "subband": {
            f"{name}_{band}1": jnp.asarray(x[i].T if name == "a" else x[i])
            for name, x in (("a", inputs["band_A"]), ("b", inputs["band_B"]))
            for i, band in enumerate(BANDS)
        },
    }
    out: dict[str, jax.Array] = {}
    for mode, train in trained.items():
        method = wara(rank, mode=mode)  # type: ignore[arg-type]
        adapter = method.init(0, base)._replace(train={KERNEL: train})
        kernel = method.attach(adapter, base)["dense"]["kernel"]
        out[f"delta_{mode}"] = materialise(kernel).T
        out[f"y_{mode}"] = lift(jnp.matmul)(x, kernel)
    return {name: Computed(value, 1e-9) for name, value in out.items()}
