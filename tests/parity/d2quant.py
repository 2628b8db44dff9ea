# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""D2Quant against the release in float32, and its uniform form in float64."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from tests.parity import Computed, compiled
from wlab.quant import absorb, d2quant, dac_add, dac_bias, dac_init, dsq, dual_uniform
from wlab.quant._d2quant import dual_uniform_fit
from wlab.quant._dsq import signs
from wlab.quant._gptq import gar_order

INPUTS = ("W_down", "W_up", "block", "ln_out_fp", "ln_out_q", "X_fp", "X_q")


@compiled
def compute(inputs: Mapping[str, np.ndarray]) -> dict[str, Computed]:
    size = int(inputs["block"])
    down, up = jnp.asarray(inputs["W_down"]).T, jnp.asarray(inputs["W_up"]).T
    return _binary(inputs, size) | _uniform(down, up, size) | _shift(inputs)


def _binary(inputs: Mapping[str, np.ndarray], size: int) -> dict[str, Computed]:
    w = jnp.asarray(inputs["W_down"], jnp.float32).T
    own, seen = (
        jnp.asarray(inputs[n], jnp.float32).reshape(-1, len(w)) for n in ("X_fp", "X_q")
    )
    # One program, in float32 whatever the default is.
    h = 2 / len(inputs["X_q"]) * jnp.dot(seen.T, seen, precision="highest")
    d = 2 / len(inputs["X_q"]) * jnp.dot((own - seen).T, seen, precision="highest")
    order = gar_order(jnp.diagonal(h), size)
    groups = order[::size] // size
    out: dict[str, Computed] = {}
    for bits in (2, 3):
        q = dsq(w, bits=bits, group=size)
        dense = q.materialise()
        sign = jnp.stack(signs(q.codes, bits, jnp.int32))
        out |= {
            f"dsq{bits}_r": Computed(q.r.transpose(0, 2, 1), 1e-5),
            f"dsq{bits}_c": Computed(q.c, 1e-5),
            f"dsq{bits}_B": Computed(sign.transpose(0, 2, 1), 0.0),
            f"dsq{bits}_What": Computed(dense.T, 1e-5),
            f"dsq{bits}_sse": Computed(jnp.sum((w - dense) ** 2), 1e-5),
        }
        q = d2quant(w, h, d, bits=bits, group=size)
        out |= {
            f"gptaq_dsq{bits}_Q": Computed(q.materialise().T, 1e-4),
            f"gptaq_dsq{bits}_perm": Computed(order, 0.0),
            f"gptaq_dsq{bits}_r": Computed(q.r[:, groups].transpose(0, 2, 1), 1e-4),
            f"gptaq_dsq{bits}_c": Computed(q.c, 1e-4),
        }
    return out


def _uniform(down: jax.Array, up: jax.Array, size: int) -> dict[str, Computed]:
    out: dict[str, Computed] = {}
    for bits in (4, 3):
        found = dual_uniform_fit(down, bits, size)
        moved = absorb(dual_uniform(down, bits=bits, group=size), up)
        out |= {
            f"s_b{bits}": Computed(found.c, 1e-9),
            f"codes_b{bits}": Computed(found.codes.T, 0.0),
            f"scale_b{bits}": Computed(found.scale.T, 1e-9),
            f"sse_b{bits}": Computed(found.errors, 1e-9),
            f"W_up_absorbed_b{bits}": Computed(moved.up.T, 1e-9),
        }
    return out


def _shift(inputs: Mapping[str, np.ndarray]) -> dict[str, Computed]:
    own, seen = (jnp.asarray(inputs[n], float) for n in ("ln_out_fp", "ln_out_q"))
    shift = dac_add(dac_init(own.shape[-1], own.dtype), own, seen)
    gated = dac_bias(shift, clip=jnp.inf, explained=0.5)
    return {
        "dac_mu": Computed(shift.mean, 1e-9),
        "dac_ratio": Computed(shift.explained, 1e-9),
        "dac_gated": Computed(gated, 1e-9),
        "dac_bias": Computed(dac_bias(shift), 1e-5),
        "dac_snr": Computed(shift.snr, 1e-5),
        "dac_explain": Computed(shift.explained, 1e-5),
    }
