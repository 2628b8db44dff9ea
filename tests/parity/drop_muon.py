# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Drop-Muon against a float64 reference of Muon on a suffix of the layers.

Weights are in torch's layout, outputs first: here they are transposed on their way in
and out. All arrays of the runs are the values after each step.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tests.parity import Computed, compiled
from wlab.core import linalg
from wlab.optim import _drop_muon, drop_muon

_SIZES = range(4)
INPUTS = (
    *(f"ns_in{i}" for i in _SIZES),
    *("hyper", "starts"),
    *(f"{kind}{i}" for kind in ("w", "gw") for i in _SIZES),
)
TOLERANCE = 1e-10


@compiled
def compute(inputs: Mapping[str, np.ndarray]) -> dict[str, Computed]:
    steps = int(inputs["hyper"][3])
    out: dict[str, Computed] = {}
    for i in _SIZES:
        x = jnp.asarray(inputs[f"ns_in{i}"])
        muon, dion = (
            linalg.orthogonalize(x, coefficients=table, steps=n)
            for table, n in (
                _drop_muon._table("muon", steps),
                _drop_muon._table("dion", steps),
            )
        )
        u, _, vt = linalg.svd(x)
        out[f"ns_f64_{i}"] = Computed(muon, TOLERANCE)
        out[f"ns_dion_f64_{i}"] = Computed(dion, TOLERANCE)
        # The reference rounds to bfloat16 at every operation, which moves it by up to
        # this much; absolutely, while a tolerance is in parts of the largest value.
        single = linalg.orthogonalize(x.astype(jnp.float32), steps)
        out[f"ns_bf16_{i}"] = Computed(single, 0.06 / jnp.abs(single).max())
        out[f"polar_{i}"] = Computed(u @ vt, TOLERANCE)
        out[f"sharp_{i}"] = Computed(_drop_muon._sharp(x), TOLERANCE)
    for tag, options in {
        "drop_nesterov": {"nesterov": True},
        "drop_heavy": {"nesterov": False},
        "paper_sharp": {
            "nesterov": False,
            "step": "sharp",
            "scale": "none",
            "weight_decay": 0.0,
        },
    }.items():
        weights, momenta = _run(inputs, options)
        for i in _SIZES:
            out[f"{tag}_w{i}"] = Computed(weights[i], TOLERANCE)
            if tag != "paper_sharp":
                out[f"{tag}_m{i}"] = Computed(momenta[i], TOLERANCE)
    return out


def _run(inputs: Mapping[str, np.ndarray], options: dict[str, Any]) -> Any:
    lr, mu, wd, steps = inputs["hyper"]
    options = {"weight_decay": wd, "ns_steps": int(steps), **options}
    tx = drop_muon(lr, mu, layers="layers", **options)
    params = {"layers": [_in(jnp.asarray(inputs[f"w{i}"])) for i in _SIZES]}
    grads = {"layers": [jax.vmap(_in)(jnp.asarray(inputs[f"gw{i}"])) for i in _SIZES]}

    def step(carry: Any, xs: Any) -> Any:
        params, state = carry
        g, start = xs
        updates, state = tx.update(g, state, params, start=start)
        params = optax.apply_updates(params, updates)
        held = [one.mu["layers"][i] for i, one in enumerate(state.layers)]
        leaves = map(jax.tree.leaves, (params["layers"], held))
        return (params, state), tuple(leaves)

    xs = (grads, jnp.asarray(inputs["starts"]))
    carry = (params, tx.init(params))
    _, made = jax.lax.scan(step, carry, xs)
    return jax.tree.map(jax.vmap(_out), made)


def _in(w: jax.Array) -> Any:
    """Outputs last; a convolution's kernel is known by its name."""
    if w.ndim == 4:
        return {"conv": {"kernel": w.transpose(2, 3, 1, 0)}}
    return {"dense": {"kernel": w.T}}


def _out(w: jax.Array) -> jax.Array:
    return w.transpose(3, 2, 0, 1) if w.ndim == 4 else w.T
