# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""LISA against the authors' callback and torch's AdamW, with the draws it recorded.

All arrays are the values after each step. Rows of layers that are not active must be
those of the step before, to the bit.
"""

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tests.parity import Computed, compiled
from wlab.optim import lisa

_NAMES = ("layers_w", "layers_b", "embed", "head")
INPUTS = (*_NAMES, *(f"g_{name}" for name in _NAMES), "hyper", "active")
TOLERANCE = 1e-12


def compute(inputs: Mapping[str, np.ndarray]) -> dict[str, Computed]:
    out = _runs(inputs)
    for name, one in out.items():
        _check_frozen(name.partition("_")[2], inputs, np.asarray(one.value))
    return out


@compiled
def _runs(inputs: Mapping[str, np.ndarray]) -> dict[str, Computed]:
    out: dict[str, Computed] = {}
    for tag, state in {"keep": "keep", "reset": "reset_all"}.items():
        made = _run(inputs, state)  # type: ignore[arg-type]
        for name, values in _flat(made).items():
            out[f"{tag}_{name}"] = Computed(values, TOLERANCE)
    return out


def _run(inputs: Mapping[str, np.ndarray], state: Literal["keep", "reset_all"]) -> Any:
    lr, b1, b2, eps, wd, k, interval = inputs["hyper"]
    tx = lisa(
        lr,
        "layers",
        int(k),
        int(interval),
        state=state,
        b1=b1,
        b2=b2,
        eps=eps,
        weight_decay=wd,
    )
    params = _tree({name: inputs[name] for name in _NAMES})
    grads = _tree({name: inputs[f"g_{name}"] for name in _NAMES})
    chosen = np.stack([np.flatnonzero(row) for row in inputs["active"]])

    def step(carry: Any, xs: Any) -> Any:
        params, held = carry
        g, rows = xs
        updates, held = tx.update(g, held, params, chosen=rows)
        params = optax.apply_updates(params, updates)
        return (params, held), params

    carry = (params, tx.init(params))
    _, made = jax.lax.scan(step, carry, (grads, jnp.asarray(chosen)))
    return made


def _tree(x: Mapping[str, np.ndarray]) -> Any:
    arrays = {name: jnp.asarray(value) for name, value in x.items()}
    layers = {"w": arrays["layers_w"], "b": arrays["layers_b"]}
    return {"layers": layers, "embed": arrays["embed"], "head": arrays["head"]}


def _flat(tree: Any) -> dict[str, jax.Array]:
    layers = {f"layers_{name}": x for name, x in tree["layers"].items()}
    return layers | {"embed": tree["embed"], "head": tree["head"]}


def _check_frozen(
    name: str, inputs: Mapping[str, np.ndarray], values: np.ndarray
) -> None:
    if not name.startswith("layers"):
        return
    before = np.concatenate([inputs[name][None], values[:-1]])
    frozen = ~inputs["active"]
    if not np.array_equal(values[frozen], before[frozen]):
        raise ValueError(f"{name}: layers that are not active have moved")
