# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""EGGROLL and dense evolution against the authors' noisers, in float32.

The reference has weights as (outputs, inputs), leaves in the order S, W, bias, and
keys by position.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import wlab
from tests.parity import Computed, compiled
from wlab import es
from wlab.core import MatrixView
from wlab.es._members import Place, leaf_keys

INPUTS = (
    *("W", "S", "bias", "x", "xt", "raw_scores", "seed", "pop", "rank", "sigma"),
    *("lr", "noise_reuse", "epoch", "group_size"),
)
TOLERANCE = 1e-5
_VIEWS = {name: MatrixView((-1,), (-2,)) for name in ("S", "W")}


@compiled
def compute(inputs: Mapping[str, np.ndarray]) -> dict[str, Computed]:
    n, rank = int(inputs["pop"]), int(inputs["rank"])
    reuse = int(inputs["noise_reuse"])
    group = int(inputs["group_size"]) or None  # 0: all are one group
    sigma, lr = float(inputs["sigma"]), float(inputs["lr"])
    params = {name: jnp.asarray(inputs[name]) for name in ("S", "W", "bias")}
    scores = jnp.asarray(inputs["raw_scores"])
    key = jax.random.key(int(inputs["seed"]))
    common: dict[str, Any] = dict(noise_reuse=reuse, group_size=group, keys="position")
    search = es.eggroll(sigma, rank, views=_VIEWS, **common)
    state = search.init(key, params)._replace(epoch=jnp.int32(inputs["epoch"]))
    out: dict[str, Any] = {}

    places = [Place("S", params["S"].shape[:1]), Place("W", ()), Place("bias", ())]
    made = leaf_keys(key, places, [0, 1, 2, 3], "position")
    for name, k in zip(("S", "W", "bias"), made, strict=True):
        out[f"key_{name}"] = jax.random.key_data(k)

    members = jnp.arange(n)

    def noise(member: jax.Array) -> dict[str, jax.Array]:
        tree = search.perturb(state, params, member)
        w, s = tree["W"].low_rank(), tree["S"].low_rank()
        # The reference folds sign and scale into the outputs' factor.
        return {
            "A_W": w.b * w.scale,
            "B_W": w.a,
            "A_S1": s.b[1] * s.scale,
            "B_S1": s.a[1],
            "bias_noisy": tree["bias"],
        }

    out |= jax.vmap(noise)(members)

    def products(tree: Any, x: jax.Array, xt: jax.Array) -> Any:
        return x @ tree["W"].T, xt @ tree["W"]

    x, xt = jnp.asarray(inputs["x"]), jnp.asarray(inputs["xt"])
    out["mm_out"], out["Tmm_out"] = es.evaluate(
        search, products, state, params, n, x, xt
    )
    out["fitness_global"] = es.shape_fitness(scores)
    out["fitness_group"] = es.shape_fitness(scores, group_size=group)

    grads, _ = search.update(state, params, scores)
    for name in params:
        out[f"grad_{name}"] = grads[name]
        out[f"sgd_new_{name}"] = params[name] - lr * grads[name]
    for name, x2 in _two_steps(search, state, params, scores, lr).items():
        out[f"adamw2_{name}"] = x2

    dense = es.open_es(sigma, **common)
    out["openes_mm_out"] = es.evaluate(
        dense, lambda tree, x: x @ tree["W"].T, state, params, n, x
    )
    for name, g in dense.update(state, params, scores)[0].items():
        out[f"openes_grad_{name}"] = g
    signs = es.eggroll(sigma, rank, views=_VIEWS, signs=True, **common)
    out["sign_grad_W"] = signs.update(state, params, scores)[0]["W"]
    exact = ("key_S", "key_W", "key_bias")
    return {
        name: Computed(value, 0.0 if name in exact else TOLERANCE)
        for name, value in out.items()
    }


def _two_steps(
    search: wlab.core.Strategy, state: Any, params: Any, scores: jax.Array, lr: float
) -> Any:
    tx = optax.chain(es.scale_by_strategy(search), optax.adamw(lr, b1=0.9, b2=0.999))
    opt_state = (state, *tx.init(params)[1:])
    # Both steps perturb the same weights: the noise does not depend on them.
    for _ in range(2):
        updates, opt_state = tx.update(None, opt_state, params, fitness=scores)
        params = optax.apply_updates(params, updates)
    return params
