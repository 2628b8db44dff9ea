# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Muon on all layers or on a random suffix: what it costs to learn the digits.

A deep ReLU network learns handwritten digits until it knows almost all of them. Muon
moves all layers in every step; Drop-Muon those from a random cut on, and pays for the
backward pass and the orthogonalisation of these alone. Each arm's learning rate is
swept, since the arms want different ones (arXiv 2510.02239).
"""

import dataclasses
import functools
import itertools
import pathlib
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from wlab import data, optim
from wlab.core import Layered, layered_value_and_grad
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
    """A deep network on the digits, and what is swept.

    Attributes:
      rates: learning rates, swept for every arm.
      seeds: how many seeds, each with its own network, batches and cuts.
      depth: number of layers, all of which are matrices without biases.
      width: of the hidden layers.
      batch: images in a batch, drawn anew in each step.
      momentum: decay of the averaged momentum.
      target: accuracy on the training images at which a run ends.
      every: steps from one look at the accuracy to the next.
      most_steps: after which a run has failed.
      shift_steps: over which the arm "epoch shift" moves its cuts to deep layers.
    """

    rates: tuple[float, ...] = (0.025, 0.05, 0.07, 0.1)
    seeds: int = 16
    depth: int = 8
    width: int = 128
    batch: int = 1024
    momentum: float = 0.9
    target: float = 0.99
    every: int = 5
    most_steps: int = 400
    shift_steps: int = 200


QUICK = Config(rates=(0.1,), seeds=2, depth=4, width=48, batch=512)

_FULL, _UNIFORM, _SHIFT = "Muon", "Drop-Muon uniform", "Drop-Muon epoch shift"
_ARMS: dict[str, optim.Sampling] = {
    _FULL: "full",
    _UNIFORM: "uniform",
    _SHIFT: "epoch_shift",
}


class _Runs(NamedTuple):
    """Runs of one arm, [rates, seeds]; NaN where the target was not reached."""

    steps: np.ndarray
    gflop: np.ndarray
    seconds: np.ndarray


def run(
    config: Config, *, out: pathlib.Path | None = None, progress: bool = True
) -> Report:
    """Train every arm at every learning rate and compare each at its best.

    Args:
      config: the setting.
      out: where report.json and report.png go; None: nowhere.
      progress: whether to show a bar on a terminal.

    Returns:
      The report.
    """
    _check(config)
    watch = Stopwatch.start()
    split = data.digits()
    images = jnp.asarray(split.train_x.reshape(len(split.train_x), -1))
    classes = jnp.asarray(split.train_y)
    trains = {
        name: jax.jit(functools.partial(_train, config, kind))
        for name, kind in _ARMS.items()
    }
    rows: dict[str, list[tuple[float, float, float]]] = {name: [] for name in _ARMS}
    with Progress(show=None if progress else False) as bars:
        bar = bars.add("runs of each arm", steps=len(config.rates) * config.seeds)
        for train in trains.values():
            train(jax.random.key(0), config.rates[0], images, classes)  # compiles
        for rate, seed in itertools.product(config.rates, range(config.seeds)):
            # In turns, so that a busy machine slows all arms alike.
            for name, train in trains.items():
                rows[name].append(_timed(train, seed, rate, images, classes))
            bar(len(rows[_FULL]), {"steps": rows[_FULL][-1][0]})
    shape = (len(config.rates), config.seeds)
    runs = {
        name: _Runs(*(np.reshape(x, shape) for x in zip(*rows[name], strict=True)))
        for name in _ARMS
    }
    arms = [_arm(config, name, runs[name]) for name in runs]
    report = Report(
        recipe="drop-muon",
        title=f"Digits by {config.depth} layers, batches of {config.batch}: Drop-Muon",
        claim=(
            "Moving a random suffix of the layers takes more steps than moving all, "
            "but each is cheaper: at its best learning rate less is computed."
        ),
        config=dataclasses.asdict(config),
        seeds=range(config.seeds),
        metrics={
            "gflop": Metric("computed to the target", "GFLOP", format=".3g"),
            "steps": Metric("steps to the target", format=".3g"),
            "ms_target": Metric("time to the target", "ms", format=".4g"),
            "ms_step": Metric("time of a step", "ms", format=".3g"),
            "rate": Metric("best learning rate", "", None),
        },
        arms=arms,
        started=watch.started,
        seconds=watch.seconds,
        findings=_findings(config, runs),
    )
    if out is not None:
        report.save(out, figure=figure)
    return report


def figure(report: Report) -> "Figure":
    """Cost against the learning rate, and against steps at each arm's best one."""
    return curves_and_tradeoff(
        report,
        curve="gflop",
        x_metric="steps",
        y_metric="gflop",
        x_label="learning rate",
        log_x=True,
    )


def _check(config: Config) -> None:
    if not config.rates or min(config.rates) <= 0 or config.seeds < 1:
        raise ValueError(f"rates={config.rates} and seeds={config.seeds}: positive")
    if config.depth < 2:
        raise ValueError(f"depth={config.depth} must be two or more")
    if not 0 < config.batch <= 1500:
        raise ValueError(f"batch={config.batch} must be 1 to 1500, of 1500 images")


# --- The network ------------------------------------------------------------------


def _sizes(config: Config) -> list[tuple[int, int]]:
    widths = (64, *[config.width] * (config.depth - 1), 10)
    return list(itertools.pairwise(widths))


def _init(config: Config, key: jax.Array) -> Any:
    he = jax.nn.initializers.he_normal()
    keys = jax.random.split(key, config.depth)
    layers = [he(k, size) for k, size in zip(keys, _sizes(config), strict=True)]
    return {"layers": [{"kernel": w} for w in layers]}


def _parts(config: Config) -> Layered:
    def hidden(layer: Any, x: jax.Array, batch: Any) -> jax.Array:
        del batch
        return jax.nn.relu(x @ layer["kernel"])

    def last(layer: Any, x: jax.Array, batch: Any) -> jax.Array:
        del batch
        return x @ layer["kernel"]

    def loss(params: Any, x: jax.Array, batch: Any) -> jax.Array:
        del params
        losses = optax.softmax_cross_entropy_with_integer_labels(x, batch["y"])
        return losses.mean()

    return Layered(
        before=lambda params, batch: batch["x"],
        block=[hidden] * (config.depth - 1) + [last],
        after=loss,
    )


def _accuracy(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    *hidden, last = (layer["kernel"] for layer in params["layers"])
    for w in hidden:
        x = jax.nn.relu(x @ w)
    return jnp.mean((x @ last).argmax(-1) == y)


def _train(
    config: Config,
    kind: optim.Sampling,
    key: jax.Array,
    rate: jax.Array,
    x: jax.Array,
    y: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Steps to the target, GFLOP spent, and whether it was reached."""
    k_init, k_batch, k_cut = jax.random.split(key, 3)
    tx = optim.drop_muon(
        rate,
        config.momentum,
        layers="layers",
        sampling=kind,
        progress=lambda step: jnp.minimum(step / config.shift_steps, 1.0),
        key=k_cut,
    )
    grad_fn = layered_value_and_grad(_parts(config))
    costs = jnp.asarray([_step_gflop(config, s) for s in range(config.depth)])
    params: Any = _init(config, k_init)

    def step(t: jax.Array, carry: Any) -> Any:
        params, state, spent = carry
        rows = jax.random.choice(
            jax.random.fold_in(k_batch, t), len(x), (config.batch,), replace=False
        )
        # Muon itself has no branches: its cut is known.
        start = 0 if kind == "full" else optim.active_layers(state)["start"]
        batch = {"x": x[rows], "y": y[rows]}
        _, grads = grad_fn(params, batch, start=start)
        updates, state = tx.update(grads, state, params, start=start)
        return optax.apply_updates(params, updates), state, spent + costs[start]

    def some(carry: Any) -> Any:
        t, _, (params, state, spent) = carry
        carry = (params, state, spent)
        carry = jax.lax.fori_loop(t, t + config.every, step, carry)
        return t + config.every, _accuracy(carry[0], x, y), carry

    def on(carry: Any) -> jax.Array:
        t, accuracy, _ = carry
        return (accuracy < config.target) & (t < config.most_steps)

    start = (jnp.int32(0), jnp.zeros([]), (params, tx.init(params), jnp.zeros([])))
    t, accuracy, (_, _, spent) = jax.lax.while_loop(on, some, start)
    return t, spent, accuracy >= config.target


def _timed(
    train: Callable[..., Any], seed: int, rate: float, x: jax.Array, y: jax.Array
) -> tuple[float, float, float]:
    """Steps, GFLOP and seconds of one run; NaN if it failed."""
    key = jax.random.key(seed)
    begun = time.perf_counter()
    steps, gflop, reached = jax.block_until_ready(train(key, rate, x, y))
    seconds = time.perf_counter() - begun
    if not reached:
        return float("nan"), float("nan"), float("nan")
    return float(steps), float(gflop), seconds


def _step_gflop(config: Config, start: int) -> float:
    """A step: all layers forward, the active ones back and orthogonalised."""
    total = 0
    for i, (n_in, n_out) in enumerate(_sizes(config)):
        total += 2 * config.batch * n_in * n_out
        if i >= start:
            m, n = sorted((n_in, n_out))
            total += 4 * config.batch * n_in * n_out
            total += 5 * (4 * m**2 * n + 2 * m**3)
    return total / 1e9


def _compiled_flops(config: Config) -> list[float]:
    """FLOPs of the gradients of each cut, as the compiler counts them."""
    params = jax.eval_shape(functools.partial(_init, config), jax.random.key(0))
    batch = {
        "x": jax.ShapeDtypeStruct((config.batch, 64), jnp.float32),
        "y": jax.ShapeDtypeStruct((config.batch,), jnp.int32),
    }
    grad_fn = layered_value_and_grad(_parts(config))
    out = []
    for start in range(config.depth):
        fn = jax.jit(functools.partial(grad_fn, start=start))
        analysis: Any = fn.lower(params, batch).compile().cost_analysis()
        out.append(analysis["flops"])
    return out


# --- What it shows ----------------------------------------------------------------


def _best(runs: _Runs) -> int:
    """The learning rate of the least cost; a run that failed rules its rate out."""
    means = runs.gflop.mean(-1)
    return int(np.nanargmin(means)) if np.isfinite(means).any() else 0


def _arm(config: Config, name: str, runs: _Runs) -> Arm:
    best = _best(runs)
    milliseconds = 1e3 * runs.seconds[best]
    return Arm(
        name,
        {
            "gflop": runs.gflop[best].tolist(),
            "steps": runs.steps[best].tolist(),
            "ms_target": milliseconds.tolist(),
            "ms_step": (milliseconds / runs.steps[best]).tolist(),
            "rate": [config.rates[best]],
        },
        settings={"sampling": _ARMS[name], "rate": config.rates[best]},
        curves={"gflop": Curve(config.rates, runs.gflop.T.tolist())},
        baseline=name == _FULL,
    )


def _findings(config: Config, runs: dict[str, _Runs]) -> list[Finding]:
    cost = {name: r.gflop.mean(-1) for name, r in runs.items()}
    least = {name: float(cost[name][_best(r)]) for name, r in runs.items()}
    steps = runs[_UNIFORM].steps.mean(-1) / runs[_FULL].steps.mean(-1)
    high = int(np.argmax(config.rates))
    common = float(cost[_FULL][high] / cost[_UNIFORM][high])
    every = [_step_gflop(config, start) for start in range(config.depth)]
    share = float(np.mean(every) / every[0])
    compiled = _compiled_flops(config)
    times = {
        name: float(1e3 * np.mean(r.seconds[_best(r)])) for name, r in runs.items()
    }
    fastest = min((_UNIFORM, _SHIFT), key=times.__getitem__)

    def gain(name: str) -> float:
        return least[_FULL] / least[name]

    return [
        Finding(
            "Drop-Muon with uniform cuts computes at least 1.05 times less to the "
            "target than Muon, each at its best rate",
            gain(_UNIFORM) >= 1.05,
            f"{gain(_UNIFORM):.2f} times",
        ),
        Finding(
            "with cuts that shift it is at least 1.1 times less",
            gain(_SHIFT) >= 1.1,
            f"{gain(_SHIFT):.2f} times",
        ),
        Finding(
            f"at the one high rate {config.rates[high]:g}, uniform cuts compute at "
            "least 1.3 times less",
            common >= 1.3,
            f"{common:.2f} times",
        ),
        Finding(
            "it needs at most 2.3 times the steps at an equal rate, and never fewer "
            "at the lowest",
            bool(np.all(steps <= 2.3) and steps[0] >= 1),
            ", ".join(f"{s:.2f}" for s in steps),
        ),
        Finding(
            "a step of uniform cuts computes less than 0.7 of a step of Muon",
            share < 0.7,
            f"{share:.2f}",
        ),
        Finding(
            "the compiled gradients cost less with every later cut",
            bool(np.all(np.diff(compiled) < 0)),
            ", ".join(f"{c / compiled[0]:.2f}" for c in compiled),
        ),
        Finding(
            "Drop-Muon is there in less time on this machine, each at its best rate",
            times[fastest] < times[_FULL],
            f"{fastest} {times[fastest]:.0f} ms, Muon {times[_FULL]:.0f} ms",
        ),
    ]
