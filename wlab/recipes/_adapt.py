# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Adapters on small tasks, for the recipes that hold several against each other.

Two tasks: a net that reads digits learns to read them turned or inverted; and a matrix
is fitted. Every arm is a reparameterisation, has the best of the same learning rates,
and runs all of them and all seeds in one compiled program.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import wlab
from wlab import data
from wlab.core import Reparam
from wlab.peft._matrices import Attach, Init, Method, reparam
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

KERNELS = ("Dense_0/kernel", "Dense_1/kernel")  # of the net's two hidden layers
Turn = Literal["turned", "inverted"]


@dataclasses.dataclass(frozen=True)
class Config:
    """How adapters are trained.

    Attributes:
      only: names of the arms to run, in any case, or parts of them; () for all.
      steps: of Adam on digits.
      fit_steps: of Adam on a matrix.
      batch: digits in a step.
      rates: learning rates that are tried; the lowest loss at the end decides.
      points: measurements along a run.
      seeds: how many, each with its own net or matrix.
    """

    only: tuple[str, ...] = ()
    steps: int = 400
    fit_steps: int = 3000
    batch: int = 256
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
    points: int = 20
    seeds: int = 3


BRIEF = Config(steps=40, fit_steps=60, batch=64, rates=(3e-2,), points=4, seeds=1)

METRICS = {
    "loss": Metric("training loss", "", format=".3f"),
    "early": Metric("loss after a quarter", "", format=".3f"),
    "accuracy": Metric("accuracy", "", False, ".1%"),
    "source": Metric("accuracy before the change", "", False, ".1%"),
    "residual": Metric("squared error of the fit", "", format=".3f"),
    "trained": Metric("trained numbers", "", None, ".0f"),
}


class Side(NamedTuple):
    """An arm: a method and what sets it apart."""

    name: str
    method: Reparam
    baseline: bool = False
    faster: Mapping[str, float] = {}  # by label: how many times the learning rate


class Task(NamedTuple):
    """What is learned; the bases are stacked over seeds."""

    bases: Any
    loss: Callable[[Any, jax.Array, jax.Array], jax.Array]  # (tree, key, seed)
    measure: Callable[[Any, jax.Array], dict[str, jax.Array]]  # (tree, seed)
    steps: int


class Made(NamedTuple):
    """An arm's course at its best learning rate."""

    rate: float
    curves: dict[str, np.ndarray]  # of each measure, [seeds, points + 1]
    trained: int


def _wanted(sides: Sequence[Side], config: Config, where: str = "") -> Sequence[Side]:
    """The arms that the config names."""
    parts = [part.lower() for part in config.only]
    return [
        side
        for side in sides
        if not parts or any(x in f"{where}: {side.name}".lower() for x in parts)
    ]


def adapt(side: Side, task: Task, config: Config, rates: Sequence[float]) -> Made:
    """Trains one arm at all learning rates and seeds at once.

    Args:
        side: the arm.
        task: what is learned.
        config: points along the run.
        rates: learning rates that are tried.

    Returns:
        The course at the rate whose loss at the end, over seeds, is lowest.

    Raises:
        ValueError: if the steps are no multiple of the points.
    """
    if task.steps % config.points:
        raise ValueError(
            f"steps={task.steps} must be a multiple of points={config.points}"
        )
    method, tx = side.method, optax.scale_by_adam()

    def begin(base: Any, seed: jax.Array) -> Any:
        return method.init(jax.random.fold_in(jax.random.key(7), seed), base)

    def one(
        adapter: Any, base: Any, seed: jax.Array, rate: jax.Array
    ) -> dict[str, jax.Array]:
        speed = jax.tree.map(
            lambda label: side.faster.get(label, 1.0), method.labels(adapter.train)
        )

        def tree_of(train: Any) -> Any:
            return method.attach(adapter._replace(train=train), base)

        def step(carry: Any, key: jax.Array) -> tuple[Any, None]:
            train, state = carry
            grads = jax.grad(lambda t: task.loss(tree_of(t), key, seed))(train)
            updates, state = tx.update(grads, state)
            train = jax.tree.map(
                lambda t, u, s: t - rate * s * u, train, updates, speed
            )
            return (train, state), None

        def stretch(carry: Any, keys: jax.Array) -> tuple[Any, Any]:
            carry, _ = jax.lax.scan(step, carry, keys)
            return carry, task.measure(tree_of(carry[0]), seed)

        keys = jax.random.split(
            jax.random.fold_in(jax.random.key(11), seed), task.steps
        )
        carry = (adapter.train, tx.init(adapter.train))
        first = task.measure(tree_of(adapter.train), seed)
        _, rest = jax.lax.scan(stretch, carry, keys.reshape(config.points, -1))
        return jax.tree.map(
            lambda a, b: jnp.concatenate([jnp.atleast_1d(a), b]), first, rest
        )

    over = jax.vmap(jax.vmap(one, (0, 0, 0, None)), (None, None, None, 0))
    seeds = jnp.arange(config.seeds)
    # Apart from what follows: in one program the factors of zeros are constants, and
    # jaxlib 0.10.2 multiplies them wrongly on a CPU.
    adapters = jax.jit(jax.vmap(begin))(task.bases, seeds)
    found = jax.device_get(
        jax.jit(over)(adapters, task.bases, seeds, jnp.asarray(rates))
    )
    last = found["loss"][:, :, -1].mean(1)
    best = int(np.argmin(np.where(np.isfinite(last), last, np.inf)))
    base = jax.tree.map(lambda x: x[0], task.bases)
    shapes = jax.eval_shape(lambda: method.init(jax.random.key(0), base)).train
    return Made(
        float(rates[best]),
        {name: x[best] for name, x in found.items()},
        sum(x.size for x in jax.tree.leaves(shapes)),
    )


# --- Digits ----------------------------------------------------------------------


class Net(nn.Module):
    """The net of the cards: 64, 128, 128, 10."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`x` [..., 64] to logits [..., 10]."""
        x = nn.relu(nn.Dense(128)(x))
        x = nn.relu(nn.Dense(128)(x))
        return nn.Dense(10)(x)


@functools.cache
def _digits() -> Any:
    split = jax.tree.map(jnp.asarray, data.digits())
    flat = {"train_x": split.train_x, "valid_x": split.valid_x}
    flat = {name: x.reshape(len(x), 8, 8) for name, x in flat.items()}
    return split._replace(**flat)


def _changed(x: jax.Array, turn: Turn) -> jax.Array:
    """Digits a quarter turned, or dark on bright and weaker."""
    return jnp.rot90(x, axes=(-2, -1)) if turn == "turned" else 0.6 * (1 - x)


def _logits(tree: Any, x: jax.Array) -> Any:
    return wlab.lift(Net().apply)({"params": tree}, x.reshape(len(x), 64))


def _cross_entropy(logits: jax.Array, y: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


@functools.cache
def _readers(seeds: int) -> Any:
    """Nets that read upright digits, stacked over seeds."""
    split = _digits()
    tx = optax.adam(3e-3)

    def one(key: jax.Array) -> Any:
        params = Net().init(key, jnp.zeros((1, 64)))["params"]

        def step(carry: Any, key: jax.Array) -> tuple[Any, None]:
            params, state = carry
            i = jax.random.randint(key, (256,), 0, len(split.train_y))

            def loss(p: Any) -> jax.Array:
                return _cross_entropy(_logits(p, split.train_x[i]), split.train_y[i])

            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(
            step, (params, tx.init(params)), jax.random.split(key, 300)
        )[0][0]

    return jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(3), seeds))


def digits_task(config: Config, turn: Turn = "turned") -> Task:
    """Reading changed digits, from nets that read them as they are."""
    split = _digits()
    train_x, valid_x = (_changed(x, turn) for x in (split.train_x, split.valid_x))

    def loss(tree: Any, key: jax.Array, seed: jax.Array) -> jax.Array:
        i = jax.random.randint(key, (config.batch,), 0, len(split.train_y))
        return _cross_entropy(_logits(tree, train_x[i]), split.train_y[i])

    def measure(tree: Any, seed: jax.Array) -> dict[str, jax.Array]:
        def accuracy(x: jax.Array) -> jax.Array:
            return (jnp.argmax(_logits(tree, x), -1) == split.valid_y).mean()

        return {
            "loss": _cross_entropy(_logits(tree, train_x), split.train_y),
            "accuracy": accuracy(valid_x),
            "source": accuracy(split.valid_x),
        }

    return Task(_readers(config.seeds), loss, measure, config.steps)


def on_digits(
    sides: Sequence[Side], config: Config, kept: Run, bars: Any, turn: Turn = "turned"
) -> list[Arm]:
    """Every arm on changed digits: losses, accuracies, trained numbers."""
    sides = _wanted(sides, config)
    task = digits_task(config, turn)
    bar, arms = bars.add("digits", len(sides)), []
    for done, side in enumerate(sides, 1):
        made = kept.once(
            f"digits {side.name}", lambda s=side: _digits_arm(s, task, config)
        )
        bar(done, {"loss": float(np.mean(made["figures"]["loss"]))})
        arms.append(_arm(side, made, "loss"))
    return arms


def _digits_arm(side: Side, task: Task, config: Config) -> dict[str, Any]:
    made = adapt(side, task, config, config.rates)
    quarter = max(1, config.points // 4)
    figures = {name: x[:, -1] for name, x in made.curves.items()}
    figures |= {"early": made.curves["loss"][:, quarter], "trained": [made.trained]}
    return {
        "figures": figures,
        "rate": made.rate,
        "steps": np.linspace(0, task.steps, config.points + 1),
        "curve": made.curves["loss"],
        "courses": made.curves,
    }


def _arm(side: Side, made: dict[str, Any], metric: str) -> Arm:
    return Arm(
        side.name,
        made["figures"],
        settings={"rate": made["rate"]},
        curves={metric: Curve(made["steps"], made["curve"])},
        baseline=side.baseline,
    )


# --- A matrix --------------------------------------------------------------------


def fit_task(
    config: Config, target: Callable[[jax.Array, jax.Array], jax.Array], size: int = 64
) -> Task:
    """Fitting the change of a random matrix.

    Args:
        config: steps and seeds.
        target: from a key and the base [n, n] to the wanted change [n, n].
        size: n.
    """
    keys = jax.random.split(jax.random.key(5), config.seeds)
    bases = jax.vmap(lambda k: jax.random.normal(k, (size, size)))(keys) / size**0.5
    wanted = jax.vmap(target)(jax.random.split(jax.random.key(6), config.seeds), bases)

    def error(tree: Any, seed: jax.Array) -> jax.Array:
        change = wlab.materialise(tree)["w"] - bases[seed]
        return jnp.sum((change - wanted[seed]) ** 2) / jnp.sum(wanted[seed] ** 2)

    return Task(
        {"w": bases},
        lambda tree, key, seed: error(tree, seed),
        lambda tree, seed: {"loss": error(tree, seed)},
        config.fit_steps,
    )


def on_matrix(
    name: str, sides: Sequence[Side], task: Task, config: Config, kept: Run, bars: Any
) -> list[Arm]:
    """Every arm on one target: the relative squared error that is left."""
    sides = _wanted(sides, config, name)
    bar, arms = bars.add(name, len(sides)), []

    def fitted(side: Side) -> dict[str, Any]:
        made = adapt(side, task, config, config.rates)
        return {
            "figures": {
                "residual": made.curves["loss"][:, -1],
                "trained": [made.trained],
            },
            "rate": made.rate,
            "steps": np.linspace(0, task.steps, config.points + 1),
            "curve": made.curves["loss"],
        }

    for done, side in enumerate(sides, 1):
        title = f"{name}: {side.name}"
        made = kept.once(title, lambda s=side: fitted(s))
        bar(done, {"residual": float(np.mean(made["figures"]["residual"]))})
        arms.append(_arm(side._replace(name=title), made, "residual"))
    return arms


# --- The report ------------------------------------------------------------------


def report_of(
    recipe: str,
    title: str,
    claim: str,
    config: Config,
    arms_of: Callable[[Run, Any], list[Arm]],
    findings: Callable[[dict[str, Arm]], list[Finding | None]],
    *,
    out: pathlib.Path | None,
    progress: bool,
    resume: bool,
    figure: Callable[[Report], "Figure"],
) -> Report:
    """Runs the arms and puts them into a report; the common part of these recipes."""
    if min(config.seeds, config.points) < 1 or not config.rates:
        raise ValueError(
            "seeds and points are positive, and there is at least one rate"
        )
    bars = Progress(show=None if progress else False)
    with Run(recipe, config, out, resume=resume) as kept, bars:
        arms = arms_of(kept, bars)
        if not arms:
            raise ValueError(f"only={config.only} names no arm of {recipe}")
        used = {name for arm in arms for name in arm.figures}
        report = Report(
            recipe=recipe,
            title=title,
            claim=claim,
            config=dataclasses.asdict(config),
            seeds=range(config.seeds),
            metrics={name: m for name, m in METRICS.items() if name in used},
            arms=arms,
            started=kept.watch.started,
            seconds=kept.watch.seconds,
            findings=[x for x in findings({a.name: a for a in arms}) if x is not None],
        )
        if out is not None:
            report.save(out, figure=figure)
    return report


def digits_figure(report: Report) -> "Figure":
    """The loss over training, and at the end against the trained numbers."""
    return curves_and_tradeoff(
        report, curve="loss", x_metric="trained", y_metric="accuracy", log_y=False
    )


def matrix_figure(report: Report) -> "Figure":
    """The error over training, and at the end against the trained numbers."""
    return curves_and_tradeoff(
        report, curve="residual", x_metric="trained", y_metric="residual"
    )


def compared(
    statement: str,
    arms: Mapping[str, Arm],
    metric: str,
    ours: str,
    theirs: str,
    holds: Callable[[float, float], bool],
) -> Finding | None:
    """A finding on one metric of two arms; None where one of them did not run."""
    if not {ours, theirs} <= set(arms):
        return None
    a, b = arms[ours].mean(metric), arms[theirs].mean(metric)
    show = METRICS[metric].show
    return Finding(statement, holds(a, b), f"{ours} {show(a)}, {theirs} {show(b)}")


def at_equal_loss(
    sides: Sequence[Side], config: Config, kept: Run, bars: Any, limit: float = 0.15
) -> list[Arm]:
    """Every arm on inverted digits, read where its loss first falls below a limit.

    It has four times the steps, and eight times the measurements, of the config. A
    seed that never falls below is read at its end.
    """
    config = dataclasses.replace(
        config, steps=4 * config.steps, points=8 * config.points
    )
    sides = _wanted(sides, config)
    task = digits_task(config, "inverted")
    bar, arms = bars.add("inverted digits", len(sides)), []

    def read(side: Side) -> dict[str, Any]:
        made = adapt(side, task, config, config.rates)
        below = made.curves["loss"] < limit
        at = np.where(below.any(1), below.argmax(1), config.points)
        figures: dict[str, Any] = {
            name: x[np.arange(config.seeds), at] for name, x in made.curves.items()
        }
        return {
            "figures": figures | {"trained": [made.trained]},
            "rate": made.rate,
            "steps": np.linspace(0, task.steps, config.points + 1),
            "curve": made.curves["loss"],
        }

    for done, side in enumerate(sides, 1):
        made = kept.once(f"inverted {side.name}", lambda s=side: read(s))
        bar(done, {"source": float(np.mean(made["figures"]["source"]))})
        arms.append(_arm(side, made, "loss"))
    return arms


# --- A baseline ------------------------------------------------------------------


def vera(rank: int, select: Any) -> Reparam:
    """VeRA: frozen random factors with trained scalings, the baseline of TeRA.

    Args:
        rank: of the factors.
        select: the leaves.
    """

    def init(given: Init) -> Any:
        t = given.target
        a, b = (
            jax.random.normal(key, (n, rank)) / n**0.5
            for key, n in zip(
                jax.random.split(given.key), (t.n_in, t.n_out), strict=True
            )
        )
        train = {"d": jnp.full(rank, 0.1), "b": jnp.zeros(t.n_out)}
        return train, {"a": a, "b": b}

    def attach(given: Attach) -> Any:
        a = given.frozen["a"] * given.train["d"][None]
        b = given.frozen["b"] * given.train["b"][:, None]
        return wlab.LowRank(given.base, a, b, given.scale)

    method = Method(init, attach, {"d": (None,), "b": ("out",)})
    return reparam(method, select=select)
