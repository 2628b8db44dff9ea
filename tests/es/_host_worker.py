# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""One host of a search, started by test_hosts.py."""

import itertools
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from wlab import es, train
from wlab.core import sharding

PARAMS = {"kernel": np.full((6, 3), 0.1, np.float32), "bias": np.zeros(3, np.float32)}
X = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)


def fitness(params: Any, x: jax.Array) -> jax.Array:
    return -jnp.square(x @ params["kernel"] + params["bias"][None] - 1).mean()


def search(mesh: jax.sharding.Mesh | None, **options: Any) -> dict[str, np.ndarray]:
    """The parameters after three steps."""
    name = None if mesh is None else "population"
    strategy = es.eggroll(0.1, axis_name=name, **options)
    tx = optax.chain(es.scale_by_strategy(strategy), optax.adam(0.05))
    step = es.make_evolution_step(fitness, strategy, tx, 8, mesh=mesh)
    params = jax.tree.map(jnp.asarray, PARAMS)
    state = train.init_state(params, tx)
    if mesh is not None:
        state = train.create_state(lambda: params, tx, mesh)
    state, _ = train.fit(step, state, itertools.repeat(X), steps=3)
    return jax.tree.map(lambda x: np.asarray(x.addressable_data(0)), state.params)


def main() -> None:
    index, _ = train.start_hosts(timeout=60, heartbeat=10)
    found = {
        f"{reduce} {name}": x
        for reduce in ("gather", "sum")
        for name, x in search(sharding.make_mesh(population=2), reduce=reduce).items()
    }
    np.savez(f"{sys.argv[1]}/{index}.npz", **found)


if __name__ == "__main__":
    main()
