# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""FRUGAL on a small language: what a sign step on the rest of a gradient is worth.

A residual network predicts the next symbol of text from a Markov chain of order two.
All arms have one learning rate and schedule. Those that hold state for a part of the
hidden kernels differ in what they do with the rest of the gradient: nothing, as GaLore
and BAdam, or a sign step, as FRUGAL (arXiv 2411.07837).
"""

import dataclasses
import functools
import pathlib
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from wlab.core import bits, map_with_path
from wlab.optim import frugal
from wlab.recipes import (
    Arm,
    Curve,
    Finding,
    Metric,
    Report,
    Run,
    curves_and_tradeoff,
)
from wlab.train import Progress

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True)
class Config:
    """The text, the network and how long it learns.

    Attributes:
      symbols: of the text; each pair of them has its own distribution of the next.
      concentration: of the Dirichlet distribution that these are drawn from.
      width: of the network.
      depth: hidden layers.
      steps: optimiser steps.
      batch: examples in a batch.
      learning_rate: at its highest, of all arms.
      warmup: steps until then; a cosine follows, down to a tenth.
      density: share of the hidden kernels with state.
      update_gap: steps from one choice of that share to the next.
      seeds: how many seeds, each with its own text and network.
    """

    symbols: int = 32
    concentration: float = 0.3
    width: int = 128
    depth: int = 3
    steps: int = 3000
    batch: int = 128
    learning_rate: float = 1e-3
    warmup: int = 100
    density: float = 0.25
    update_gap: int = 50
    seeds: int = 2


QUICK = Config(symbols=16, width=32, steps=200, batch=64, warmup=20, update_gap=20)

_ADAM, _SIGN = "AdamW", "signSGD"
_BLOCK, _COLUMNS = "FRUGAL block", "FRUGAL columns"
_STATELESS = "FRUGAL density 0"
_BADAM, _BARE, _SVD = "block alone (BAdam)", "columns alone", "svd alone (GaLore)"
_GALORE = "GaLore of optax"
_POINTS = 20  # of each curve


def run(
    config: Config,
    *,
    out: pathlib.Path | None = None,
    progress: bool = True,
    resume: bool = False,
) -> Report:
    """Train every arm and compare the cross entropy on all text.

    Args:
      config: the setting.
      out: where report.json and report.png go; None: nowhere.
      progress: whether to show a bar on a terminal.
      resume: whether to go on with the run that `out` holds.

    Returns:
      The report.
    """
    _check(config)
    names = list(_optimisers(config, 0))
    bars = Progress(show=None if progress else False)
    each = [_seed(config, seed) for seed in range(config.seeds)]
    seeds = jax.tree.map(lambda *x: np.stack(x), *each)
    found: dict[str, Any] = {}
    with Run("frugal", config, out, resume=resume) as kept, bars:
        bar = bars.add("arms", steps=len(names))
        for done, name in enumerate(names, 1):
            train = functools.partial(_curves, config, name, seeds)
            found[name] = kept.once(name, train)["loss"]
            bar(done, {"loss": float(np.mean(found[name], 0)[-1])})
        report = Report(
            recipe="frugal",
            title=(
                f"Text of {config.symbols} symbols, {config.depth} hidden layers, "
                f"state for {config.density:.0%} of them"
            ),
            claim=(
                "With state for a part of the hidden kernels, a sign step on the rest "
                "of the gradient brings the loss close to AdamW's; leaving the rest "
                "out does not."
            ),
            config=dataclasses.asdict(config),
            seeds=range(config.seeds),
            metrics={
                "loss": Metric("cross entropy", "nats", format=".4f"),
                "over": Metric("over the text's entropy", "nats", format=".4f"),
                "bytes": Metric("state, bytes a parameter", format=".2f"),
            },
            arms=[
                _arm(config, name, found[name], np.asarray(seeds.entropy))
                for name in names
            ],
            started=kept.watch.started,
            seconds=kept.watch.seconds,
            findings=_findings(
                {name: float(np.mean(x, 0)[-1]) for name, x in found.items()},
                {name: _bytes(config, name) for name in names},
            ),
        )
        if out is not None:
            report.save(out, figure=figure)
    return report


def figure(report: Report) -> "Figure":
    """Cross entropy over training, and at its end against the bytes of state."""
    return curves_and_tradeoff(
        report, curve="loss", x_metric="bytes", y_metric="loss", x_label="step"
    )


def _check(config: Config) -> None:
    if config.steps % _POINTS or not 0 < config.warmup < config.steps:
        raise ValueError(
            f"steps={config.steps} must be a multiple of {_POINTS}, and more than "
            f"warmup={config.warmup}, which is positive"
        )
    if config.width % 2 or min(config.width, config.symbols) < 2 or config.seeds < 1:
        raise ValueError(
            f"width={config.width} must be even, symbols={config.symbols} two or more, "
            f"seeds={config.seeds} positive"
        )
    if not 0 < config.density <= 1 or not round(config.density * config.depth):
        raise ValueError(
            f"density={config.density} leaves none of {config.depth} layers active: "
            f"take one from {0.5 / config.depth:.3g} to 1"
        )


# --- Text and network -------------------------------------------------------------


class _Seed(NamedTuple):
    """What all arms share; a pair of symbols is one number, row-major."""

    params: Any
    key: Any  # uint32, of the choices
    pairs: Any  # int32 [steps, batch]
    following: Any  # int32 [steps, batch], the symbols to predict
    chance: Any  # float32 [pairs, symbols], of a pair and what follows it
    entropy: Any  # float32, of the next symbol, in nats


def _seed(config: Config, seed: int) -> _Seed:
    """In numpy, which has nothing to compile."""
    rng, n = np.random.default_rng(seed), config.symbols
    after = rng.dirichlet(np.full(n, config.concentration), (n, n))
    often = np.full((n, n), 1 / n**2)
    for _ in range(200):
        often = np.einsum("ab,abc->bc", often, after)
    often, after = often.reshape(-1), after.reshape(n * n, n)
    shape = (config.steps, config.batch)
    pairs = rng.choice(n * n, shape, p=often / often.sum())
    below = np.cumsum(after, 1)[pairs] < rng.random((*shape, 1))
    following = np.minimum(below.sum(-1), n - 1)
    chance = often[:, None] * after
    entropy = -np.sum(chance * np.log(after, where=after > 0, out=np.zeros_like(after)))
    return _Seed(
        _init(config, rng),
        np.uint32(seed),
        pairs.astype(np.int32),
        following.astype(np.int32),
        chance.astype(np.float32),
        np.float32(entropy),
    )


def _init(config: Config, rng: np.random.Generator) -> Any:
    n, d = config.symbols, config.width

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    def linear(outputs: int) -> dict[str, np.ndarray]:
        kernel = normal(d, outputs) / np.float32(d**0.5)
        return {"kernel": kernel, "bias": np.zeros(outputs, np.float32)}

    layers = {
        f"layers_{i}": {"norm": {"scale": np.ones(d, np.float32)}, "mlp": linear(d)}
        for i in range(config.depth)
    }
    # The two symbols of a pair have a table, and a half of the width, each.
    return {"embed": {"embedding": normal(2, n, d // 2)}, **layers, "head": linear(n)}


def _logits(params: Any, pairs: jax.Array) -> jax.Array:
    """Of the next symbol, `[batch, symbols]`."""

    def linear(layer: Any, x: jax.Array) -> jax.Array:
        return x @ layer["kernel"] + layer["bias"][None]

    table = params["embed"]["embedding"]
    first, second = jnp.divmod(pairs, table.shape[1])
    h = jnp.concatenate([table[0, first], table[1, second]], axis=-1)
    for name in sorted(params):
        if name.startswith("layers_"):
            layer = params[name]
            size = jax.lax.rsqrt(jnp.mean(h**2, -1, keepdims=True) + 1e-6)
            x = h * size * layer["norm"]["scale"][None]
            h = h + jax.nn.relu(linear(layer["mlp"], x))
    return linear(params["head"], h)


def _losses(config: Config, name: str, seed: _Seed) -> jax.Array:
    """Cross entropy over all text, and not a sample of it, along the run: [points]."""
    tx = _optimisers(config, jax.random.key(seed.key))[name]

    def loss(params: Any, pairs: jax.Array, following: jax.Array) -> jax.Array:
        logits = _logits(params, pairs)
        return optax.softmax_cross_entropy_with_integer_labels(logits, following).mean()

    def step(carry: Any, batch: Any) -> tuple[Any, None]:
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params, *batch), state, params)
        return (optax.apply_updates(params, updates), state), None

    def stretch(carry: Any, batches: Any) -> tuple[Any, jax.Array]:
        carry, _ = jax.lax.scan(step, carry, batches)
        found = jax.nn.log_softmax(_logits(carry[0], jnp.arange(len(seed.chance))))
        return carry, -jnp.sum(seed.chance * found)

    batches = jax.tree.map(
        lambda x: x.reshape(_POINTS, -1, config.batch), (seed.pairs, seed.following)
    )
    start = (seed.params, tx.init(seed.params))
    return jax.lax.scan(stretch, start, batches)[1]


# --- Arms -------------------------------------------------------------------------


def _optimisers(config: Config, key: Any) -> dict[str, optax.GradientTransformation]:
    rate = optax.warmup_cosine_decay_schedule(
        0.0,
        config.learning_rate,
        config.warmup,
        config.steps,
        0.1 * config.learning_rate,
    )
    ours = functools.partial(frugal, rate, config.density, config.update_gap, key=key)
    galore = optax.contrib.scale_by_galore(
        max(1, round(config.width * config.density)),
        config.update_gap,
        weight_dimension_numbers=_galore_axes,
    )
    return {
        _ADAM: optax.adamw(rate, weight_decay=0.0),
        _BLOCK: ours(),
        _COLUMNS: ours(projection="columns"),
        _STATELESS: frugal(rate, 0.0, config.update_gap),
        _BADAM: ours(inactive="none"),
        _BARE: ours(projection="columns", inactive="none"),
        _SVD: ours(projection="svd", inactive="none"),
        _GALORE: optax.chain(galore, optax.scale_by_learning_rate(rate)),
        _SIGN: optax.sign_sgd(rate),
    }


def _galore_axes(params: Any) -> Any:
    """The leaves that FRUGAL projects, too."""

    def axes(path: str, _: Any) -> Any:
        hidden = path.startswith("layers_") and path.endswith("kernel")
        return optax.contrib.GaLoreDimensionNumbers() if hidden else None

    return map_with_path(axes, params)


def _curves(config: Config, name: str, seeds: _Seed) -> dict[str, Any]:
    """Of all seeds, [seeds, points]."""
    one = functools.partial(_losses, config, name)
    # Under vmap, both sides of the branch that decomposes would run in every step.
    branches = name in (_SVD, _GALORE)
    over_seeds = functools.partial(jax.lax.map, one) if branches else jax.vmap(one)
    return {"loss": np.asarray(jax.jit(over_seeds)(seeds)).tolist()}


def _arm(
    config: Config, name: str, curves: list[list[float]], entropy: np.ndarray
) -> Arm:
    last = np.asarray(curves)[:, -1]
    steps = config.steps // _POINTS * np.arange(1, _POINTS + 1)
    return Arm(
        name,
        {
            "loss": last.tolist(),
            "over": (last - entropy).tolist(),
            "bytes": [_bytes(config, name)],
        },
        curves={"loss": Curve(steps.tolist(), curves)},
        baseline=not name.startswith("FRUGAL"),
    )


def _bytes(config: Config, name: str) -> float:
    """Bytes of state a parameter, by shapes and dtypes."""
    params = _init(config, np.random.default_rng(0))
    state = jax.eval_shape(_optimisers(config, 0)[name].init, params)
    size = sum(x.size for x in jax.tree.leaves(params))
    return bits.size_in_bits(state) / 8 / size


def _findings(loss: dict[str, float], state: dict[str, float]) -> list[Finding]:
    def show(*names: str) -> str:
        return ", ".join(f"{name} {loss[name]:.4f}" for name in names)

    def below(low: str, high: str, by: float = 0.0) -> bool:
        return loss[low] < loss[high] - by

    ours = (_BLOCK, _COLUMNS)
    return [
        Finding(
            "AdamW is not above FRUGAL (to 0.003)",
            all(below(_ADAM, name, -0.003) for name in ours),
            show(_ADAM, *ours),
        ),
        Finding(
            "FRUGAL is not above its density of 0 (to 0.003)",
            all(below(name, _STATELESS, -0.003) for name in ours),
            show(*ours, _STATELESS),
        ),
        Finding(
            "FRUGAL is 0.08 or more below the same subspace without the rest",
            below(_BLOCK, _BADAM, 0.08) and below(_COLUMNS, _BARE, 0.08),
            show(_BLOCK, _BADAM, _COLUMNS, _BARE),
        ),
        Finding(
            "A density of 0 is below GaLore, BAdam and columns alone",
            all(below(_STATELESS, name) for name in (_SVD, _GALORE, _BADAM, _BARE)),
            show(_STATELESS, _SVD, _GALORE, _BADAM, _BARE),
        ),
        Finding(
            "FRUGAL holds less state than AdamW, and columns no more than GaLore",
            all(state[name] < state[_ADAM] for name in ours)
            and state[_COLUMNS] <= min(state[_GALORE], state[_SVD]),
            ", ".join(f"{name} {state[name]:.2f}" for name in (_ADAM, *ours, _GALORE)),
        ),
    ]
