# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""TeRA against its sum over all bonds, in float64."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.parity import Computed, compiled
from wlab import lift, materialise
from wlab.peft import tera
from wlab.peft._tera import Network

KERNEL = "dense/kernel"


INPUTS = ("out_dims", "in_dims", "ranks", "core", "x", "g")
NUMBERED = r"[Ad]\d+"  # factors and vectors, one for each mode


@compiled
def compute(inputs: Mapping[str, np.ndarray]) -> dict[str, Computed]:
    outs, ins = (tuple(map(int, inputs[n])) for n in ("out_dims", "in_dims"))
    ranks = tuple(map(int, inputs["ranks"]))
    n_out, n_in = int(np.prod(outs)), int(np.prod(ins))
    modes = range(len(ranks))
    base = {"dense": {"kernel": jnp.zeros((n_in, n_out), jnp.float64)}}
    method = tera(out_dims=outs, in_dims=ins, ranks=ranks)
    start = method.init(0, base)
    shared = {
        Network(outs, ins, ranks, n_out).name: {
            "core": jnp.asarray(inputs["core"]),
            "a": [jnp.asarray(inputs[f"A{k}"]) for k in modes],
        }
    }
    train = {f"d{k}": jnp.asarray(inputs[f"d{k}"]) for k in modes}

    def attached(train: Any) -> Any:
        adapter = start._replace(train={KERNEL: train}, frozen={"": shared})
        return method.attach(adapter, base)

    def layer(train: Any) -> jax.Array:
        kernel = attached(train)["dense"]["kernel"]
        return lift(jnp.matmul)(jnp.asarray(inputs["x"]), kernel)

    grads = jax.grad(lambda t: jnp.sum(layer(t) * jnp.asarray(inputs["g"])))(train)
    out = {
        "delta": materialise(attached(train))["dense"]["kernel"].T,
        "y_delta": layer(train),
        **{f"grad_{name}": value for name, value in grads.items()},
    }
    return {name: Computed(value, 1e-9) for name, value in out.items()}
