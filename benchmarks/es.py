# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Evolution side by side: a population's run against inference, and its update.

``python benchmarks/es.py --json results/es-cpu.json``

Each of the first tables runs a population on a net of equal layers, or a decoder,
against plain inference of the same net on the same rows: with factors that are kept or
drawn again, in both kinds of noise, and with dense noise. The next times the update of
what was evaluated. The last is the time to compile an update, which does not grow with
the number of layers of one shape. Where evosax is installed, its Open_ES stands beside.
"""

import dataclasses
import importlib.util
import pathlib
import time
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import tyro
from _measure import Contender, Row, bandwidth, matmul_rate, race, save, show

from wlab import es
from wlab.models.decoder import Decoder, tiny


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the race."""

    scale: Literal["cpu", "gpu", "smoke"] = "cpu"
    """gpu: width 8192 in bfloat16; smoke: a test of the script."""
    repeats: int = 20
    """Interleaved repeats."""
    json: pathlib.Path | None = None
    """Where the figures go."""


class Case(nn.Module):
    """Equal layers with a ReLU."""

    width: int
    depth: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """The output, of the shape of `x`."""
        for _ in range(self.depth):
            x = nn.relu(nn.Dense(self.width, use_bias=False, dtype=x.dtype)(x))
        return x


# Width, depth, members, rows of each, rank.
CASES = {
    "smoke": [(32, 2, 8, 1, 1)],
    "cpu": [
        (1024, 2, 64, 1, 1),
        (1024, 2, 64, 1, 4),
        (256, 2, 32, 32, 1),
        (256, 2, 32, 32, 4),
        (512, 3, 256, 1, 1),
    ],
    "gpu": [(8192, 1, 1024, 1, 1), (8192, 1, 1024, 1, 4), (2048, 4, 256, 64, 1)],
}


def population(
    name: str, apply: Any, params: Any, x: jax.Array, rank: int, dense: bool
) -> list[Contender]:
    """Inference and populations, which carry their output."""
    n = x.shape[0]
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    out = jax.eval_shape(jax.vmap(lambda x: apply(params, x)), x)

    def row(label: str, fn: Any, base: str, *noise: Any) -> Contender:
        # The output goes back in and weighs nothing, so that it is written each time.
        def step(carry: Any, inputs: Any) -> Any:
            previous, noise = carry
            params, x = inputs
            return fn(params, x, *noise) + 0 * previous.ravel()[0], noise

        carry = (jnp.zeros(out.shape, out.dtype), noise)
        return Contender(f"{name}: {label}", step, carry, (), count, baseline=base)

    def infer(params: Any, x: jax.Array) -> jax.Array:
        return apply(params, x.reshape(-1, *x.shape[2:])).reshape(out.shape)

    base = f"{name}: inference"
    rows = [row("inference", infer, "")]
    arms: list[tuple[str, Any]] = [
        (kind, es.eggroll(0.1, rank, noise=kind)) for kind in ("normal", "binomial")
    ]
    if dense:
        arms.append(("dense", es.open_es(0.1)))
    for kind, search in arms:
        state = search.init(jax.random.key(1), params)
        kept = jax.jit(lambda p, s=search, t=state: es.draw_pairs(s, t, p, n))(params)

        def run(params: Any, x: Any, kept: Any = None, s: Any = search, t: Any = state):
            return es.evaluate(s, apply, t, params, n, x, noise=kept)

        rows.append(row(f"{kind}, kept", run, base, kept))
        rows.append(row(f"{kind}, drawn again", run, base))
    return rows


def forward(config: Config, roof: float) -> dict[str, list[Row]]:
    """A table for each case."""
    dtype = jnp.bfloat16 if config.scale == "gpu" else jnp.float32
    out = {}
    for width, depth, n, rows, rank in CASES[config.scale]:
        model = Case(width, depth)
        x = jax.random.normal(jax.random.key(0), (n, rows, width), dtype)
        params = jax.tree.map(
            lambda w: w.astype(dtype), model.init(jax.random.key(1), x[0])
        )
        name = f"D{width} L{depth} N{n} T{rows} r{rank}"
        dense = n * width * width * depth < 3e8 and rank == 1
        made = population(name, model.apply, params, x, rank, dense)
        out[name] = race(made, (params, x), config.repeats, roof)
    # A decoder with attention.
    small = config.scale == "smoke"
    model = Decoder(
        tiny(width=32, depth=1, hidden=64)
        if small
        else tiny(width=256, depth=2, hidden=768, heads=4, head_dim=64)
    )
    n, length = (4, 16) if small else (16, 128)
    tokens = jax.random.randint(jax.random.key(0), (n, 1, length), 0, 256)
    params = model.init(jax.random.key(1), tokens[0])["params"]

    def apply(params: Any, tokens: jax.Array) -> jax.Array:
        return model.apply({"params": params}, tokens)

    name = f"decoder N{n} of {length} tokens"
    made = population(name, apply, params, tokens, 1, dense=False)
    return out | {name: race(made, (params, tokens), config.repeats, roof)}


def update(config: Config, roof: float) -> list[Row]:
    """Pseudo-gradients of the first case, added to themselves."""
    width, depth, n, _, _ = CASES[config.scale][0]
    params = Case(width, depth).init(jax.random.key(1), jnp.ones((1, width)))
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    fitness = jax.random.normal(jax.random.key(2), (n,))
    arms = {
        "eggroll": es.eggroll(0.1),
        "eggroll, rank 4": es.eggroll(0.1, 4),
        "eggroll, binomial": es.eggroll(0.1, noise="binomial"),
        "open_es": es.open_es(0.1),
    }
    rows = []
    for name, search in arms.items():
        state = search.init(jax.random.key(1), params)

        def step(carry: Any, fitness: Any, search: Any = search) -> Any:
            grads, state = carry
            new, state = search.update(state, grads, fitness)
            return new, state

        carry = (jax.tree.map(jnp.copy, params), state)
        base = "" if name == "eggroll" else "eggroll"
        rows.append(Contender(name, step, carry, state, count, baseline=base))
    if importlib.util.find_spec("evosax") is not None:
        rows.append(_evosax(params, n, count))
    return race(rows, fitness, config.repeats, roof)


def _evosax(params: Any, n: int, count: int) -> Contender:
    """Ask and tell of evosax, which makes every member's weights."""
    from evosax.algorithms import Open_ES

    search = Open_ES(population_size=n, solution=params)
    options = search.default_params
    state = search.init(jax.random.key(0), params, options)

    def step(state: Any, fitness: Any) -> Any:
        made, state = search.ask(jax.random.key(1), state, options)
        return search.tell(jax.random.key(2), made, fitness, state, options)[0]

    return Contender("evosax Open_ES", step, state, state, count, baseline="eggroll")


def compilation(config: Config) -> dict[str, float]:
    """Seconds to compile an update of so many layers of one shape."""
    out = {}
    width = 16 if config.scale == "smoke" else 128
    for depth in (2, 8, 32):
        shape = jax.ShapeDtypeStruct((width, width), jnp.float32)
        params = {f"dense_{i}": {"kernel": shape} for i in range(depth)}
        search = es.eggroll(0.1)
        state = jax.eval_shape(search.init, jax.random.key(0), params)
        fitness = jax.ShapeDtypeStruct((64,), jnp.float32)
        start = time.perf_counter()
        jax.jit(search.update).lower(state, params, fitness).compile()
        out[f"{depth} layers"] = time.perf_counter() - start
    return out


def main(config: Config) -> None:
    """Run all tables."""
    # What is measured is the time to compile, too.
    jax.config.update("jax_enable_compilation_cache", False)
    roof, rate = bandwidth(), matmul_rate()
    print(f"triad {roof / 1e9:.1f} GB/s, float32 product {rate / 1e9:.0f} GFLOP/s")
    sections = forward(config, roof) | {"update": update(config, roof)}
    seconds = compilation(config)
    for name, rows in sections.items():
        show(name, rows)
        for row in rows:
            if row.baseline.endswith("inference"):
                print(f"{row.name}: {1 / row.vs_baseline:.2f} of inference")
    for name, s in seconds.items():
        print(f"an update of {name}: {s:.2f} s to compile")
    if config.json is not None:
        save(
            config.json,
            sections,
            config={k: str(v) for k, v in dataclasses.asdict(config).items()},
            compile_seconds=seconds,
            triad_bytes_per_s=roof,
            matmul_flop_per_s=rate,
        )


if __name__ == "__main__":
    main(tyro.cli(Config))
