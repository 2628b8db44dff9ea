# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Optimisers side by side: the update alone, and a whole train step.

``python benchmarks/optimizers.py --json results/optimizers-cpu.json``

The first table times the update of a tree of kernels of many shapes, given the
gradients: memory traffic is the limit. The second times the train step of a decoder,
forward and backward included, where ECO is held against AdamW with float32 master
weights under the same quantised forward pass.
"""

import dataclasses
import functools
import pathlib
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from _measure import Contender, bandwidth, matmul_rate, race, save, show

import wlab
from wlab import data, quant, train
from wlab.models.decoder import Decoder, tiny


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the race."""

    scale: Literal["cpu", "gpu", "smoke"] = "cpu"
    """cpu: about 5M parameters; gpu: about 1B; smoke: a test of the script."""
    repeats: int = 20
    """Interleaved repeats."""
    json: pathlib.Path | None = None
    """Where the figures go."""


_WIDTH = {"smoke": 16, "cpu": 384, "gpu": 5120}


def tree(width: int) -> Any:
    """Six shapes of kernels and two vectors, as a transformer block has them."""
    heads = 8
    shapes = {
        "attention": {
            "query": {"kernel": (4, width, heads, width // heads)},
            "key": {"kernel": (4, width, 2, width // heads)},
            "out": {"kernel": (4, heads, width // heads, width)},
        },
        "mlp": {
            "up": {"kernel": (4, width, 3 * width - 5)},
            "down": {"kernel": (4, 3 * width - 5, width)},
            "router": {"kernel": (4, width, 24)},
        },
        "attention_norm": {"scale": (4, width)},
        "mlp_norm": {"scale": (4, width)},
    }
    rng = np.random.default_rng(0)
    leaves, structure = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
    values = [jnp.asarray(rng.standard_normal(s, np.float32)) for s in leaves]
    return {"blocks": jax.tree.unflatten(structure, values)}


def optimizers() -> dict[str, tuple[Any, str | None, float, str]]:
    """Name: transform, grid of the packed weights, least traffic, baseline."""
    eco, eco_muon = wlab.optim.eco, wlab.optim.eco_muon
    muon = functools.partial(
        optax.contrib.muon,
        muon_weight_dimension_numbers=wlab.core.muon_dimension_numbers,
    )
    return {
        "optax.adamw": (optax.adamw(1e-3), None, 28.0, ""),
        "eco fp8 nearest": (eco(1e-3), "fp8_e4m3", 22.0, "optax.adamw"),
        "eco fp8 stochastic": (
            eco(1e-3, rounding="stochastic"),
            "fp8_e4m3",
            22.0,
            "optax.adamw",
        ),
        "eco int4 nearest": (eco(1e-3, grid="int4"), "int4", 21.0, "optax.adamw"),
        "optax.contrib.muon": (muon(1e-3), None, 0.0, ""),
        "eco_muon fp8 nearest": (
            eco_muon(1e-3),
            "fp8_e4m3",
            0.0,
            "optax.contrib.muon",
        ),
    }


def pack(params: Any, grid: str | None) -> Any:
    """The tree on its grid, with the granularity that ECO takes for it."""
    if grid is None:
        return params
    granularity = wlab.optim.eco_granularity(grid)
    return quant.quantize_tree(params, grid, granularity=granularity)


def updates(config: Config, roof: float) -> list[Any]:
    """The update alone."""
    params = tree(_WIDTH[config.scale])
    count = sum(x.size for x in jax.tree.leaves(params))
    grads = jax.tree.map(lambda x: 0.1 * jnp.sin(7 * x), params)

    def contender(name: str, tx: Any, grid: Any, traffic: float, base: str) -> Any:
        held = pack(params, grid)

        def step(carry: Any, grads: Any) -> Any:
            held, state = carry
            change, state = tx.update(grads, state, held)
            return optax.apply_updates(held, change), state

        start = train.init_state(held, tx)
        carry = (start.params, start.opt_state)
        return Contender(name, step, carry, carry, count, traffic, base)

    rows = [contender(name, *row) for name, row in optimizers().items()]
    return race(rows, grads, config.repeats, roof)


def train_steps(config: Config, roof: float) -> list[Any]:
    """The whole step, and the loss after an equal number of steps."""
    small = {"width": 32, "depth": 1, "hidden": 64}
    model = Decoder(tiny(**small) if config.scale == "smoke" else tiny())
    length = 32 if config.scale == "smoke" else 128
    corpus = data.text("pydoc")
    batches = data.windows(corpus.train, batch=8, length=length, seed=0)
    batch = jnp.asarray(next(batches))
    params = model.init(jax.random.key(0), batch[:, :-1])["params"]
    count = sum(x.size for x in jax.tree.leaves(params))
    apply = wlab.lift(lambda params, x: model.apply({"params": params}, x))
    table = optimizers()

    def loss(grid: str, master: bool, params: Any, batch: jax.Array) -> jax.Array:
        if master:
            granularity = wlab.optim.eco_granularity(grid)
            params = quant.fake_quantize_tree(params, grid, granularity=granularity)
        if grid == "fp8_e4m3":
            params = quant.quantize_activations(params, grid)
        return train.next_token_loss(apply(params, batch[:, :-1]), batch)

    def contender(name: str, tx: Any, grid: str, master: bool, base: str) -> Any:
        held = params if master else pack(params, grid)
        tx = optax.chain(optax.clip_by_global_norm(1.0), tx)
        step = train.make_train_step(functools.partial(loss, grid, master), tx)
        start = train.init_state(held, tx)
        state, history = train.fit(
            step,
            start,
            data.windows(corpus.train, batch=8, length=length, seed=0),
            steps=config.repeats,
            every=max(1, config.repeats // 4),
        )
        return Contender(
            name,
            lambda carry, batch: step(carry, batch)[0],
            state,
            (state.params, state.opt_state),
            count,
            baseline=base,
            quality=float(history["loss"][-1]),
        )

    rows = []
    for grid in ("fp8_e4m3", "int4"):
        base = f"adamw, {grid} forward"
        rows.append(contender(base, table["optax.adamw"][0], grid, True, ""))
        rows += [
            contender(name, tx, grid, False, base)
            for name, (tx, packed, *_) in table.items()
            if packed == grid and "muon" not in name
        ]
    rows.append(
        contender(
            "muon, fp8 forward", table["optax.contrib.muon"][0], "fp8_e4m3", True, ""
        )
    )
    tx = table["eco_muon fp8 nearest"][0]
    rows.append(contender("eco_muon fp8", tx, "fp8_e4m3", False, "muon, fp8 forward"))
    return race(rows, batch, config.repeats, roof)


def main(config: Config) -> None:
    """Run both tables."""
    roof, rate = bandwidth(), matmul_rate()
    print(f"triad {roof / 1e9:.1f} GB/s, float32 product {rate / 1e9:.0f} GFLOP/s")
    sections = {
        "update": updates(config, roof),
        "train step": train_steps(config, roof),
    }
    for name, rows in sections.items():
        show(name, rows)
    if config.json is not None:
        save(
            config.json,
            sections,
            config={k: str(v) for k, v in dataclasses.asdict(config).items()},
            triad_bytes_per_s=roof,
            matmul_flop_per_s=rate,
        )


if __name__ == "__main__":
    main(tyro.cli(Config))
