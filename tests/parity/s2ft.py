# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""S2FT against the authors' permutation and layers on one block, in float64.

Their deltas live in permuted coordinates; ours are on the units themselves, so both the
permuted model and the index form are held to the same outputs.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.parity import Computed, compiled
from wlab import lift
from wlab.peft import Units, co_order, permute, s2ft

WEIGHTS = ("q", "k", "v", "o", "gate", "up", "down")
DELTAS = ("v", "o", "up", "down")
INPUTS = (
    *(f"W_{name}" for name in WEIGHTS),
    *("nheads", "sel_v", "sel_o", "sel_u", "sel_d", "x", "g"),
    *(f"s2_{name}" for name in DELTAS),
)


@compiled
def compute(inputs: Mapping[str, np.ndarray]) -> dict[str, Computed]:
    heads = int(inputs["nheads"])
    width, ff = inputs["W_down"].shape
    each = width // heads
    kernels = {name: jnp.asarray(inputs[f"W_{name}"].T) for name in WEIGHTS}
    for name in ("q", "k", "v"):
        kernels[name] = kernels[name].reshape(width, heads, each)
    kernels["o"] = kernels["o"].reshape(heads, each, width)
    params = {
        "attn": {name: {"kernel": kernels[name]} for name in ("q", "k", "v", "o")},
        "mlp": {name: {"kernel": kernels[name]} for name in ("gate", "up", "down")},
    }
    selected = {n: [int(i) for i in inputs[f"sel_{n}"]] for n in ("v", "o", "u", "d")}
    order_v, of_v, of_o = co_order(selected["v"], selected["o"], heads, ascending=True)
    order_ff, of_up, of_down = co_order(
        selected["u"], selected["d"], ff, ascending=False
    )
    moved = permute(params, {"attn#heads": order_v, "mlp#channels": order_ff})
    rows = np.concatenate([np.arange(h * each, (h + 1) * each) for h in order_v])
    out: dict[str, Any] = {
        "order_rows_v": Computed(rows, 0.0),
        "order_ffn": Computed(np.asarray(order_ff), 0.0),
        "range_v": Computed(np.asarray(of_v) * each, 0.0),
        "range_o": Computed(np.asarray(of_o) * each, 0.0),
        "range_up": Computed(np.asarray(of_up), 0.0),
        "range_down": Computed(np.asarray(of_down), 0.0),
    }
    for part, names in (
        ("attn", ("q", "k", "v", "o")),
        ("mlp", ("gate", "up", "down")),
    ):
        for name in names:
            kernel = moved[part][name]["kernel"]
            flat = kernel.reshape(-1, width) if name == "o" else kernel
            flat = flat.reshape(flat.shape[0], -1).T
            out[f"P_{name}"] = Computed(flat, 0.0)

    units = {
        "attn/v/kernel": Units(jnp.asarray(order_v[slice(*of_v)]), "out"),
        "attn/o/kernel": Units(jnp.asarray(order_v[slice(*of_o)]), "in"),
        "mlp/up/kernel": Units(jnp.asarray(order_ff[slice(*of_up)]), "out"),
        "mlp/down/kernel": Units(jnp.asarray(order_ff[slice(*of_down)]), "in"),
    }
    method = s2ft(units=units)
    start = method.init(0, params)

    def delta(path: str, value: np.ndarray) -> jax.Array:
        shape = start.train[path]["delta"].shape
        # Theirs are (out, in) slices; flattened heads lie side by side in ours.
        return jnp.asarray(value.T).reshape(shape)

    train = {
        f"{part}/{name}/kernel": {
            "delta": delta(f"{part}/{name}/kernel", inputs[f"s2_{name}"])
        }
        for part, name in (("attn", "v"), ("attn", "o"), ("mlp", "up"), ("mlp", "down"))
    }
    x, g = jnp.asarray(inputs["x"]), jnp.asarray(inputs["g"])

    def both(train: Any) -> tuple[jax.Array, jax.Array]:
        return lift(block)(method.attach(start._replace(train=train), params), x)

    grads = jax.grad(lambda t: jnp.sum(sum(both(t)) * g))(train)
    for name, y0, y in zip(("attn", "ffn"), block(params, x), both(train), strict=True):
        out[f"{name}_y0"] = Computed(y0, 1e-9)
        out[f"{name}_y"] = Computed(y, 1e-9)
    for part, name in (("attn", "v"), ("attn", "o"), ("mlp", "up"), ("mlp", "down")):
        value = grads[f"{part}/{name}/kernel"]["delta"]
        flat = value.reshape(
            (-1, value.shape[-1]) if name in ("o", "down") else (value.shape[0], -1)
        )
        out[f"grad_s2_{name}"] = Computed(flat.T, 1e-9)
    return out


def block(params: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Attention without mask, and a gated layer, side by side."""
    attn, mlp = params["attn"], params["mlp"]
    q, k, v = (
        jnp.einsum("btd,dhk->bthk", x, attn[n]["kernel"]) for n in ("q", "k", "v")
    )
    scores = jnp.einsum("bthk,bshk->bhts", q, k) / q.shape[-1] ** 0.5
    mixed = jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(scores, -1), v)
    y = jnp.einsum("bthk,hkd->btd", mixed, attn["o"]["kernel"])
    gate, up = x @ mlp["gate"]["kernel"], x @ mlp["up"]["kernel"]
    return y, (jax.nn.silu(gate) * up) @ mlp["down"]["kernel"]
