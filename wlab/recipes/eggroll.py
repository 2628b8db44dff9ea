# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""EGGROLL on digits: what noise of low rank costs, and what it saves.

A small net reads handwritten digits and is searched without gradients, with noise of
rank 1, 2 and 4 and with dense noise, at equal numbers of evaluations (arXiv 2511.16652
finds no loss). Size of noise and learning rate are chosen for each arm on a seed of its
own; where evosax is installed its Open_ES runs beside. Adam with gradients shows what
the net can learn.
"""

import dataclasses
import functools
import pathlib
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from wlab import data
from wlab.recipes import (
    Arm,
    Curve,
    Finding,
    Metric,
    Report,
    Run,
    curves_and_tradeoff,
)
from wlab.recipes._search import DENSE, EVOSAX, Search, has_evosax, search
from wlab.train import Progress

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True)
class Config:
    """The net and the search.

    Attributes:
      hidden: units of the one hidden layer.
      ranks: of the noise.
      population: members of a generation.
      generations: of every arm.
      batch: examples that the members of a generation share.
      sigmas: sizes of the noise that are tried.
      rates: learning rates of Adam that are tried.
      points: measurements along a run.
      seeds: how many, each with its own net; one more chooses the settings.
    """

    hidden: int = 64
    ranks: tuple[int, ...] = (1, 2, 4)
    population: int = 512
    generations: int = 200
    batch: int = 256
    sigmas: tuple[float, ...] = (0.03, 0.1, 0.3)
    rates: tuple[float, ...] = (0.003, 0.01, 0.03)
    points: int = 10
    seeds: int = 3


QUICK = Config(
    hidden=16,
    ranks=(1,),
    population=64,
    generations=20,
    batch=64,
    sigmas=(0.1,),
    rates=(0.03,),
    points=4,
    seeds=1,
)

_ADAM = "Adam, gradients"


def run(
    config: Config,
    *,
    out: pathlib.Path | None = None,
    progress: bool = True,
    resume: bool = False,
) -> Report:
    """Search with every kind of noise and compare accuracy on held-out digits.

    Args:
      config: the setting.
      out: where report.json and report.png go; None: nowhere.
      progress: whether to show a bar on a terminal.
      resume: whether to go on with the run that `out` holds.

    Returns:
      The report.
    """
    if config.generations % config.points or min(config.seeds, config.points) < 1:
        raise ValueError(
            f"generations={config.generations} must be a multiple of points="
            f"{config.points}, and seeds={config.seeds} positive"
        )
    if not (config.sigmas and config.rates and config.ranks):
        raise ValueError("ranks, sigmas and rates: give at least one of each")
    names = {f"EGGROLL rank {rank}": rank for rank in config.ranks} | {DENSE: 0}
    if has_evosax():
        names[EVOSAX] = 0
    bars = Progress(show=None if progress else False)
    with Run("eggroll", config, out, resume=resume) as kept, bars:
        tries = len(config.sigmas) * len(config.rates)
        arms = [
            _arm(config, name, rank, kept, bars.add(name, tries + config.seeds))
            for name, rank in names.items()
        ]
        arms.append(_gradients(config, kept))
        report = Report(
            recipe="eggroll",
            title=(
                f"Digits, a net of {config.hidden} hidden units, {config.generations} "
                f"generations of {config.population}"
            ),
            claim=(
                "Evolution with noise of rank 1 learns what evolution with dense noise "
                "does, at equal numbers of evaluations."
            ),
            config=dataclasses.asdict(config),
            seeds=range(config.seeds),
            metrics={
                "accuracy": Metric("accuracy", "", False, ".1%"),
                "seconds": Metric("time of the search", "s", format=".1f"),
            },
            arms=arms,
            started=kept.watch.started,
            seconds=kept.watch.seconds,
            findings=_findings({arm.name: arm for arm in arms}),
        )
        if out is not None:
            report.save(out, figure=figure)
    return report


def figure(report: Report) -> "Figure":
    """Accuracy over evaluations, and at the end against the time."""
    return curves_and_tradeoff(
        report,
        curve="accuracy",
        x_metric="seconds",
        y_metric="accuracy",
        x_label="thousand evaluations",
    )


class _Net(nn.Module):
    hidden: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.reshape(*x.shape[:-3], -1)
        return nn.Dense(10)(nn.relu(nn.Dense(self.hidden)(x)))


@functools.cache
def _digits() -> Any:
    """The split, on the device."""
    return jax.tree.map(jnp.asarray, data.digits())


def _start(config: Config, seed: int) -> Any:
    net = _Net(config.hidden)
    return jax.jit(net.init)(jax.random.key(seed), _digits().train_x[:1])


def _loss(config: Config, params: Any, key: jax.Array) -> jax.Array:
    """Cross entropy of a batch that the key draws."""
    split = _digits()
    index = jax.random.randint(key, (config.batch,), 0, len(split.train_y))
    logits: Any = _Net(config.hidden).apply(params, split.train_x[index])
    return optax.softmax_cross_entropy_with_integer_labels(
        logits, split.train_y[index]
    ).mean()


def _accuracy(config: Config, params: Any) -> jax.Array:
    logits: Any = _Net(config.hidden).apply(params, _digits().valid_x)
    return (jnp.argmax(logits, axis=-1) == _digits().valid_y).mean()


def _arm(config: Config, name: str, rank: int, kept: Run, bar: Any) -> Arm:
    done = 0

    def once(sigma: float, rate: float, seed: int) -> dict[str, Any]:
        nonlocal done
        how = Search(name, rank, sigma, optax.adam(rate), config.population)
        made = kept.once(
            f"{name} {sigma:g} {rate:g} {seed}",
            lambda: search(
                how,
                _start(config, seed),
                lambda params, key: -_loss(config, params, key),
                functools.partial(_accuracy, config),
                generations=config.generations,
                points=config.points,
                seed=seed,
            ),
        )
        done += 1
        bar(done, {"accuracy": made["curve"][-1]})
        return made

    tried = {
        (sigma, rate): once(sigma, rate, config.seeds)["curve"][-1]
        for sigma in config.sigmas
        for rate in config.rates
    }
    sigma, rate = max(tried, key=tried.__getitem__)
    runs = [once(sigma, rate, seed) for seed in range(config.seeds)]
    each = config.generations / config.points * config.population / 1e3
    return Arm(
        name,
        {
            "accuracy": [x["curve"][-1] for x in runs],
            "seconds": [x["seconds"] for x in runs],
        },
        settings={
            "sigma": sigma,
            "rate": rate,
            "tried": [[*setting, x] for setting, x in tried.items()],
        },
        curves={
            "accuracy": Curve(
                [each * i for i in range(config.points + 1)], [x["curve"] for x in runs]
            )
        },
        baseline=name in (DENSE, EVOSAX),
    )


def _gradients(config: Config, kept: Run) -> Arm:
    """What the same net learns from gradients, in as many steps."""
    tx = optax.adam(3e-3)

    def learn(seed: int) -> dict[str, Any]:
        def step(carry: Any, key: jax.Array) -> tuple[Any, None]:
            params, state = carry
            grads = jax.grad(lambda p: _loss(config, p, key))(params)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        @jax.jit
        def whole(params: Any, keys: jax.Array) -> Any:
            return jax.lax.scan(step, (params, tx.init(params)), keys)[0][0]

        keys = jax.random.split(jax.random.key(seed), config.generations)
        params = _start(config, seed)
        jax.block_until_ready(whole(params, keys))  # compiles
        began = time.perf_counter()
        params = jax.block_until_ready(whole(params, keys))
        seconds = time.perf_counter() - began
        return {"accuracy": float(_accuracy(config, params)), "seconds": seconds}

    runs = [
        kept.once(f"{_ADAM} {seed}", functools.partial(learn, seed))
        for seed in range(config.seeds)
    ]
    figures = {key: [x[key] for x in runs] for key in ("accuracy", "seconds")}
    return Arm(_ADAM, figures, settings={"rate": 3e-3}, baseline=True)


def _findings(arms: Mapping[str, Arm]) -> list[Finding]:
    ours = {name: arm for name, arm in arms.items() if name.startswith("EGGROLL")}
    dense = arms[DENSE]
    first = next(iter(ours.values()))
    quicker = dense.mean("seconds") / first.mean("seconds")
    out = [
        Finding(
            f"{name} is within 3 points of dense noise",
            arm.mean("accuracy") >= dense.mean("accuracy") - 0.03,
            f"{arm.mean('accuracy'):.1%}, dense {dense.mean('accuracy'):.1%}",
        )
        for name, arm in ours.items()
    ]
    out.append(
        Finding(
            f"{first.name} takes less time than dense noise",
            quicker > 1,
            f"{quicker:.1f} times as fast",
        )
    )
    if EVOSAX in arms:
        peer = arms[EVOSAX].mean("accuracy")
        text = f"{first.mean('accuracy'):.1%}, evosax {peer:.1%}"
        better = first.mean("accuracy") >= peer - 0.03
        out.append(Finding(f"{first.name} is within 3 points of evosax", better, text))
    return out
