# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""AWQ against the official arithmetic on one block, in float64.

The size of a group is known from the shape of one output alone, which is therefore an
input here, and compared apart.
"""

import functools
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.parity import Computed
from wlab import materialise
from wlab.quant import ScaleGroup, awq_clip, awq_scale, minmax

ATTENTION = tuple(f"self_attn.{name}_proj" for name in ("q", "k", "v", "o"))
MLP = tuple(f"mlp.{name}_proj" for name in ("gate", "up", "down"))
LINEARS = (*ATTENTION, *MLP)
NORMS = ("input_layernorm", "post_attention_layernorm")
INPUTS = ("x", "n_heads", *(f"W_{name}.weight" for name in (*LINEARS, *NORMS)))
NUMBERED = r"w\d+g_clip_mlp\.down_proj"


def compute(inputs: Mapping[str, np.ndarray]) -> dict[str, Computed]:
    x = jnp.asarray(inputs["x"], float)
    params: dict[str, Any] = {}
    for name in LINEARS:
        params[name] = {"kernel": jnp.asarray(inputs[f"W_{name}.weight"].T, float)}
    for name in NORMS:
        params[name] = {"scale": jnp.asarray(inputs[f"W_{name}.weight"], float)}
    heads = int(inputs["n_heads"])
    y, seen = jax.jit(block, static_argnums=2)(params, x, heads)
    out = {"y": Computed(y[:2], 1e-6)}
    for name, bound in inputs.items():
        if re.fullmatch(NUMBERED, name):
            tag = name.partition("_")[0]
            bits = int(tag[1:-1])
            group = len(params["mlp.down_proj"]["kernel"]) // bound.shape[1]
            found, got = quantised(params, x, y, seen, heads, bits, group)
            if not np.max(np.abs(got - bound)) <= 1e-9 * np.max(np.abs(bound)):
                raise ValueError(f"{name} does not agree with the reference")
            out |= {f"{tag}_{name}": row for name, row in found.items()}
    return out


def quantised(
    params: Any,
    x: jax.Array,
    y: jax.Array,
    seen: dict[str, jax.Array],
    heads: int,
    bits: int,
    group: int,
) -> tuple[dict[str, Computed], np.ndarray]:
    """Every output of one setting, and the bounds at which one kernel is clipped."""
    options: Any = {"bits": bits, "group": group}
    groups = groups_of(heads)
    inputs = {f"{name}/kernel": x for name, x in seen.items()}

    @jax.jit
    def run(params: Any, inputs: Any) -> Any:
        found = awq_scale(params, inputs, groups, **options)
        clipped = awq_clip(found.params, inputs, groups, scales=found.scales, **options)
        three = [rounded(p, **options) for p in (params, found.params, clipped)]
        kernels = {name: three[-1][name]["kernel"] for name in LINEARS}
        values = {name: w.values() for name, w in kernels.items()}
        many = jax.tree.map(lambda *w: jnp.stack(w), *map(materialise, three))
        outputs = jax.lax.map(lambda p: block(p, x, heads)[0], many)
        errors = jnp.mean((outputs - y[None]) ** 2, (1, 2, 3))
        return found, clipped, kernels, values, errors

    found, clipped, kernels, values, errors = jax.tree.map(
        np.asarray, run(params, inputs)
    )
    out = {"blockerr": Computed(errors, 1e-9)}
    for one in groups:
        name = one.previous[0].partition("/")[0]
        out[f"scale_{name}"] = Computed(found.scales[one.paths[0]], 1e-9)
    bounds = {}
    for name in LINEARS:
        kernel = found.params[name]["kernel"]
        out[f"fused_{name}.weight"] = Computed(kernel.T, 1e-6)
        out[f"deq_{name}"] = Computed(values[name].T, 1e-6)
        for part in ("scale", "zero"):
            out[f"q{part}_{name}"] = Computed(getattr(kernels[name], part).T, 1e-9)
        # What is left of the largest weight of each group is its bound.
        w = clipped[name]["kernel"].T
        bounds[name] = np.abs(w).reshape(len(w), -1, group).max(-1, keepdims=True)
        out[f"clip_{name}"] = Computed(bounds[name], 1e-9)
    for name in NORMS:
        weight = found.params[name]["scale"]
        out[f"fused_{name}.weight"] = Computed(weight, 1e-6)
    return out, bounds["mlp.down_proj"]


def groups_of(heads: int) -> tuple[ScaleGroup, ...]:
    """The four groups of a block with norms and a gated layer."""

    def kernels(*names: str) -> tuple[str, ...]:
        return tuple(f"{name}/kernel" for name in names)

    return (
        ScaleGroup(
            kernels(*ATTENTION[:3]),
            ("input_layernorm/scale",),
            inspect=lambda p, x: attention(p, x, heads)[0],
        ),
        ScaleGroup(kernels(ATTENTION[3]), kernels(ATTENTION[2]), "linear"),
        ScaleGroup(
            kernels(*MLP[:2]),
            ("post_attention_layernorm/scale",),
            inspect=lambda p, x: gated(p, x)[0],
        ),
        ScaleGroup(kernels(MLP[2]), kernels(MLP[1]), "linear"),
    )


def rounded(params: Any, bits: int, group: int) -> Any:
    """All kernels as codes."""
    pack = functools.partial(minmax, bits=bits, group=group)
    new = {name: {"kernel": pack(params[name]["kernel"])} for name in LINEARS}
    return params | new


def block(
    params: Any, x: jax.Array, heads: int
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """One block, and what its kernels read."""

    def norm(name: str, x: jax.Array) -> jax.Array:
        size = jnp.mean(x**2, -1, keepdims=True) + 1e-6
        return x / jnp.sqrt(size) * params[name]["scale"][None, None]

    n = norm(NORMS[0], x)
    attended, mixed = attention(params, n, heads)
    h = x + attended
    m = norm(NORMS[1], h)
    out, hidden = gated(params, m)
    reads = {name: n for name in ATTENTION[:3]} | {name: m for name in MLP[:2]}
    return h + out, reads | {ATTENTION[3]: mixed, MLP[2]: hidden}


def attention(params: Any, x: jax.Array, heads: int) -> tuple[jax.Array, jax.Array]:
    """Causal, without positions; and what its last kernel reads."""
    q, k, v = (
        (x @ params[name]["kernel"]).reshape(*x.shape[:2], heads, -1)
        for name in ATTENTION[:3]
    )
    logits = jnp.einsum("bthk,bshk->bhts", q, k) / q.shape[-1] ** 0.5
    mask = jnp.tril(jnp.ones(logits.shape[-2:], bool))
    weights = jax.nn.softmax(jnp.where(mask[None, None], logits, -jnp.inf), -1)
    mixed = jnp.einsum("bhts,bshk->bthk", weights, v).reshape(*x.shape[:2], -1)
    return mixed @ params[ATTENTION[3]]["kernel"], mixed


def gated(params: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two layers, one of which gates the other; and what the last kernel reads."""
    gate, up = (x @ params[name]["kernel"] for name in MLP[:2])
    hidden = jax.nn.silu(gate) * up
    return hidden @ params[MLP[2]]["kernel"], hidden
