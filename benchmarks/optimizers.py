# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Optimisers side by side: the update alone, and a whole train step.

``python benchmarks/optimizers.py --json results/optimizers-cpu.json``

The first table times the update of a tree of kernels of many shapes, given the
gradients: memory traffic is the limit. The second times the update of a thousand small
leaves against that of one as large as all of them. The third times the train step of a
decoder, forward and backward included, where ECO is held against AdamW with float32
master weights under the same quantised forward pass, and Drop-Muon and LISA take
gradients of their active layers only. The last is the rate of Newton-Schulz iterations
beside that of one matrix product.
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
from wlab import data, optim, quant, train
from wlab.models import layered
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
    eco, eco_muon = optim.eco, optim.eco_muon
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
        "frugal columns": (
            optim.frugal(1e-3, projection="columns"),
            None,
            0.0,
            "optax.adamw",
        ),
        "frugal block": (optim.frugal(1e-3), None, 0.0, "optax.adamw"),
        "frugal sign only": (
            optim.frugal(1e-3, 0.0, projection="columns"),
            None,
            0.0,
            "optax.adamw",
        ),
        "mup_adamw": (
            optim.mup_adamw(1e-3, 0.1, _twice_as_wide),
            None,
            28.0,
            "optax.adamw",
        ),
        "optax.adagrad": (optax.adagrad(1e-2), None, 20.0, ""),
        "classp": (
            optim.classp(1e-2, threshold=-1.0, power=2.0),
            None,
            20.0,
            "optax.adagrad",
        ),
        "drop_muon, all layers": (
            optim.drop_muon(1e-3, layers="blocks", sampling="full"),
            None,
            0.0,
            "optax.contrib.muon",
        ),
        "lisa, 1 of 4": (optim.lisa(1e-3, "blocks", k=1), None, 0.0, "optax.adamw"),
    }


def _twice_as_wide(params: Any) -> Any:
    def width(_: str, x: Any) -> Any:
        return optim.mup.Width("matrix" if x.ndim > 2 else "vector", 2.0, 2.0)

    return wlab.core.map_with_path(width, params)


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


def small_leaves(config: Config, roof: float) -> list[Any]:
    """A thousand leaves, and one of their size."""
    n = 16 if config.scale == "smoke" else 1000
    one = {"kernel": jnp.full((8, 8 * n), 0.5)}
    many = {f"layer{i}": {"kernel": jnp.full((8, 8), 0.5)} for i in range(n)}
    rows = []
    chosen = ("optax.adamw", "eco fp8 nearest", "frugal columns", "mup_adamw", "classp")
    for name in chosen:
        tx, grid, *_ = optimizers()[name]
        for label, params in ((f"{name}, one", one), (f"{name}, {n}", many)):
            held = pack(params, grid)
            start = train.init_state(held, tx)
            carry = (start.params, start.opt_state)

            def step(carry: Any, scale: Any, tx: Any = tx, params: Any = params) -> Any:
                held, state = carry
                grads = jax.tree.map(lambda x: scale * x, params)
                change, state = tx.update(grads, state, held)
                return optax.apply_updates(held, change), state

            base = "" if params is one else f"{name}, one"
            rows.append(Contender(label, step, carry, carry, 64 * n, baseline=base))
    return race(rows, jnp.float32(0.1), config.repeats, roof)


def newton_schulz(config: Config, roof: float) -> list[Any]:
    """Five iterations on a square matrix, in float32."""
    rows = []
    for m in (64,) if config.scale == "smoke" else (512, 1024):
        x = jax.random.normal(jax.random.key(0), (m, m))

        def step(carry: Any, _: Any) -> Any:
            return wlab.core.linalg.orthogonalize(carry)

        rows.append(Contender(f"{m} x {m}", step, x, (), m * m))
    return race(rows, jnp.float32(0), config.repeats, roof)


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


def layer_steps(config: Config, roof: float) -> list[Any]:
    """Steps of active layers only: cut by cut for Drop-Muon, one of eight for LISA."""
    depth = 2 if config.scale == "smoke" else 8
    wide = 32 if config.scale == "smoke" else 128
    shape = tiny(width=wide, depth=depth, hidden=4 * wide, tied=False, scan=True)
    model, length = Decoder(shape), 32 if config.scale == "smoke" else 128
    corpus = data.text("pydoc")
    batch = jnp.asarray(
        next(data.windows(corpus.train, batch=8, length=length, seed=0))
    )
    params = model.init(jax.random.key(0), batch[:, :-1])["params"]
    count = sum(x.size for x in jax.tree.leaves(params))
    parts = layered(model, train.next_token_loss)

    def contender(name: str, loss: Any, tx: Any, base: str, active: Any = None) -> Any:
        tx = optax.chain(optax.clip_by_global_norm(1.0), tx)
        step = train.make_train_step(loss, tx, active=active)
        state = train.init_state(params, tx)
        return Contender(
            name,
            lambda carry, batch: step(carry, batch)[0],
            state,
            state.opt_state,
            count,
            baseline=base,
        )

    def loss(params: Any, batch: jax.Array) -> jax.Array:
        logits = model.apply({"params": params}, batch[:, :-1])
        return train.next_token_loss(logits, batch)

    full = optim.drop_muon(1e-3, layers="blocks", sampling="full")
    rows = [
        contender("adamw", loss, optax.adamw(1e-3), ""),
        contender("muon, whole gradients", loss, full, ""),
    ]
    for cut in range(depth):
        only = jax.nn.one_hot(cut, depth)
        rows.append(
            contender(
                f"drop_muon, cut {cut} of {depth}",
                parts,
                optim.drop_muon(1e-3, layers="blocks", sampling=only),
                "muon, whole gradients",
                optim.active_layers,
            )
        )
    lisa = optim.lisa(1e-3, "blocks", k=1)
    rows.append(
        contender(f"lisa, 1 of {depth}", parts, lisa, "adamw", optim.active_layers)
    )
    return race(rows, batch, config.repeats, roof)


def main(config: Config) -> None:
    """Run all tables."""
    roof, rate = bandwidth(), matmul_rate()
    print(f"triad {roof / 1e9:.1f} GB/s, float32 product {rate / 1e9:.0f} GFLOP/s")
    sections = {
        "update": updates(config, roof),
        "small leaves": small_leaves(config, roof),
        "train step": train_steps(config, roof),
        "active layers": layer_steps(config, roof),
        "Newton-Schulz": newton_schulz(config, roof),
    }
    for name, rows in sections.items():
        show(name, rows)
    for row in sections["Newton-Schulz"]:
        m = int(row.name.split()[0])
        share = 5 * 6 * m**3 / (1e-3 * row.ms) / rate
        print(f"Newton-Schulz of {row.name}: {share:.2f} of the rate of a product")
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
