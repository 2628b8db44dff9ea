# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""ECO on a noisy quadratic: how the error grows as the learning rate falls.

Without a memory of what rounding took away, the error of SGD on quantised weights
grows as one over the learning rate: the smaller a step, the surer it is rounded
away. With the residual in the momentum it stays near that of master weights
(arXiv 2601.22101, appendix C).
"""

import dataclasses
import functools
import math
import pathlib
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import wlab
from wlab.recipes import (
    Arm,
    Curve,
    Finding,
    Metric,
    Report,
    Stopwatch,
    curves_and_tradeoff,
)
from wlab.train import Progress

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True)
class Config:
    """The noisy quadratic of SGD with momentum.

    Attributes:
      rates: learning rates; each runs for `time` over its rate steps.
      time: steps times learning rate.
      seeds: how many seeds, each with its own problem, run together.
      rows: outputs of the weight matrix, each with its own scale.
      columns: inputs of the weight matrix.
      noise: standard deviation of the gradient's noise.
      momentum: decay of the momentum.
      grid: number grid of the weights.
    """

    rates: tuple[float, ...] = (0.1, 0.03, 0.01, 0.003)
    time: float = 60.0
    seeds: int = 8
    rows: int = 8
    columns: int = 64
    noise: float = 0.3
    momentum: float = 0.9
    grid: str = "fp8_e4m3"


QUICK = Config(rates=(0.1, 0.02), time=20.0, seeds=2)

# (rounding, injection); None for the full-precision weights beside the quantised ones.
_ARMS: dict[str, tuple[str, str | None]] = {
    "master weights": ("nearest", None),
    "ECO nearest": ("nearest", "paper"),
    "ECO stochastic": ("stochastic", "paper"),
    "naive nearest": ("nearest", "none"),
    "naive stochastic": ("stochastic", "none"),
}


def run(
    config: Config, *, out: pathlib.Path | None = None, progress: bool = True
) -> Report:
    """Run every arm at every learning rate and compare.

    Args:
      config: the setting.
      out: where report.json and report.png go; None: nowhere.
      progress: whether to show a bar on a terminal.

    Returns:
      The report.
    """
    if not config.rates or min(config.rates) <= 0:
        raise ValueError(f"rates={config.rates} must be positive numbers")
    if config.time < 4 * max(config.rates):
        raise ValueError(f"time={config.time} leaves less than four steps")
    wlab.quant.get_grid(config.grid)
    watch = Stopwatch.start()
    rates = sorted(config.rates, reverse=True)
    keys = jax.vmap(jax.random.key)(jnp.arange(config.seeds))
    losses: dict[str, list[list[float]]] = {}
    with Progress(show=None if progress else False) as bars:
        for name, (rounding, injection) in _ARMS.items():
            arm = functools.partial(
                _final_loss, config, rounding=rounding, injection=injection
            )
            arm = jax.jit(jax.vmap(arm, (0, None, None)))
            losses[name] = []
            bar = bars.add(name, steps=len(rates))
            for rate in rates:
                steps = math.ceil(config.time / rate)
                losses[name].append(np.asarray(arm(keys, rate, steps)).tolist())
                bar(len(losses[name]), {"loss": losses[name][-1]})
    metrics = {
        f"loss_{rate:g}": Metric(f"loss at {rate:g}", format=".2e") for rate in rates
    }
    metrics["loss"] = Metric("loss at the end")
    metrics["bytes"] = Metric("bytes a parameter", lower_is_better=True)
    arms = [
        Arm(
            name,
            {
                **{
                    f"loss_{r:g}": values
                    for r, values in zip(rates, by_rate, strict=True)
                },
                "bytes": [_bytes(config, _ARMS[name][1])],
            },
            settings={"rounding": _ARMS[name][0], "injection": _ARMS[name][1]},
            curves={
                "loss": Curve([1 / r for r in rates], np.asarray(by_rate).T.tolist())
            },
            baseline=name.startswith("naive"),
        )
        for name, by_rate in losses.items()
    ]
    report = Report(
        recipe="eco-quadratic",
        title=f"SGD with momentum on a noisy quadratic, weights in {config.grid}",
        claim=(
            "Without feedback the error of rounding grows as the learning rate falls; "
            "ECO keeps it near that of master weights."
        ),
        config=dataclasses.asdict(config),
        seeds=range(config.seeds),
        metrics=metrics,
        arms=arms,
        started=watch.started,
        seconds=watch.seconds,
        findings=_findings(rates, losses),
    )
    if out is not None:
        report.save(out, figure=figure)
    return report


def figure(report: Report) -> "Figure":
    """Loss against one over the learning rate, and against memory at the smallest."""
    smallest = min(report.config["rates"])
    return curves_and_tradeoff(
        report,
        curve="loss",
        x_metric="bytes",
        y_metric=f"loss_{smallest:g}",
        x_label="1 / learning rate",
        log_x=True,
        log_y=True,
    )


def _final_loss(
    config: Config,
    key: jax.Array,
    rate: jax.Array,
    steps: jax.Array,
    *,
    rounding: Any,
    injection: Any,
) -> jax.Array:
    """Mean loss at the quantised weights over the last quarter of a run."""
    shape = (config.columns, config.rows)
    k_curve, k_target, k_start, k_noise, k_round = jax.random.split(key, 5)
    curvature = jax.random.uniform(k_curve, shape, minval=0.3, maxval=1.0)
    target = jax.random.normal(k_target, shape)
    params: Any = {"kernel": jax.random.normal(k_start, shape)}
    quantise = functools.partial(
        wlab.quant.quantize_tree, grid=config.grid, granularity="row"
    )
    if injection is None:
        tx = optax.chain(
            optax.ema(config.momentum, debias=False), optax.scale_by_learning_rate(rate)
        )
    else:
        params = quantise(params)
        tx = wlab.optim.eco_sgd(
            rate,
            config.momentum,
            grid=config.grid,
            granularity="row",
            rounding=rounding,
            injection=injection,
            key=k_round,
        )
    late = steps - steps // 4

    def step(i: jax.Array, carry: Any) -> Any:
        params, state, total = carry
        seen = wlab.materialise(quantise(params) if injection is None else params)
        away = seen["kernel"] - target
        loss = jnp.mean(curvature * jnp.square(away)) / 2
        noise = jax.random.normal(jax.random.fold_in(k_noise, i), shape)
        grads = {"kernel": curvature * away + config.noise * noise}
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return params, state, total + jnp.where(i >= late, loss, 0)

    carry = (params, tx.init(params), jnp.zeros([]))
    # A loop with a bound at run time: one compilation serves every learning rate.
    *_, total = jax.lax.fori_loop(0, steps, step, carry)
    return total / (steps - late)


def _bytes(config: Config, injection: str | None) -> float:
    """Bytes a parameter of weights and optimiser state, counted from their dtypes."""
    params: Any = {"kernel": jnp.zeros((config.columns, config.rows))}
    size = config.columns * config.rows
    if injection is None:
        state: Any = optax.ema(config.momentum).init(params)
    else:
        params = wlab.quant.quantize_tree(params, config.grid, granularity="row")
        tx = wlab.optim.eco_sgd(1.0, grid=config.grid, granularity="row")
        state = tx.init(params)
    return wlab.core.bits.size_in_bits((params, state)) / 8 / size


def _findings(
    rates: list[float], losses: dict[str, list[list[float]]]
) -> list[Finding]:
    mean = {
        name: [float(np.mean(v)) for v in by_rate] for name, by_rate in losses.items()
    }
    last = {name: values[-1] for name, values in mean.items()}
    at = f"at learning rate {rates[-1]:g}"

    def ratio(a: str, b: str) -> float:
        return last[a] / last[b]

    naive = mean["naive nearest"]
    growth = naive[-1] / naive[0]
    eco_growth = mean["ECO nearest"][-1] / mean["ECO nearest"][0]
    return [
        Finding(
            f"naive nearest loses more than 50 times what ECO nearest does, {at}",
            ratio("naive nearest", "ECO nearest") > 50,
            f"{ratio('naive nearest', 'ECO nearest'):.1f} times",
        ),
        Finding(
            f"naive stochastic loses more than 1.5 times as much as ECO's, {at}",
            ratio("naive stochastic", "ECO stochastic") > 1.5,
            f"{ratio('naive stochastic', 'ECO stochastic'):.2f} times",
        ),
        Finding(
            f"ECO stochastic loses less than 1.7 times what master weights do, {at}",
            ratio("ECO stochastic", "master weights") < 1.7,
            f"{ratio('ECO stochastic', 'master weights'):.2f} times",
        ),
        Finding(
            f"naive nearest grows from learning rate {rates[0]:g} to {rates[-1]:g}, "
            "ECO nearest falls",
            growth > 1 > eco_growth,
            f"times {growth:.1f} against times {eco_growth:.2f}",
        ),
    ]
