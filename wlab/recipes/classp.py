# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""One task after the other: what CLASSP, EWC and slower SGD keep of the first.

A small network learns handwritten digits, then the same digits with their pixels
permuted, once more for each further task, through one head. Every arm learns the first
task by the same SGD; for the later ones each arm's settings are swept
(arXiv 2405.09637).
"""

import dataclasses
import functools
import itertools
import pathlib
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from wlab import data, optim
from wlab.core import bits
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
    """Tasks in a row, and what is swept.

    Attributes:
      tasks: how many tasks, two or more. Each arm has its best setting after the
        second, where most figures are read, and another at the end, for the curves.
      epochs: passes over the first task.
      later_epochs: passes over each of the others.
      batch: images in a batch.
      hidden: width of the hidden layer.
      learning_rate: of the first task, and of no other.
      sgd_rates: learning rates of SGD after it, swept.
      rates: learning rates of CLASSP, swept.
      threshold: of the squared gradient, in CLASSP's gated arm.
      ewc_rates: learning rates of EWC, swept with `strengths`.
      strengths: of EWC's penalty, swept.
      seeds: how many seeds, each with its own network and permutations.
    """

    tasks: int = 3
    epochs: int = 10
    later_epochs: int = 2
    batch: int = 32
    hidden: int = 256
    learning_rate: float = 0.2
    sgd_rates: tuple[float, ...] = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
    rates: tuple[float, ...] = (0.02, 0.05, 0.1, 0.2, 0.5)
    threshold: float = 1e-5
    ewc_rates: tuple[float, ...] = (0.1, 0.2, 0.5, 1.0)
    strengths: tuple[float, ...] = (3.0, 10.0, 30.0, 100.0, 300.0)
    seeds: int = 4


QUICK = Config(
    tasks=2,
    hidden=64,
    sgd_rates=(0.02, 0.2),
    rates=(0.1, 0.2),
    ewc_rates=(0.2,),
    strengths=(10.0, 30.0),
    seeds=2,
)

_PLAIN, _EWC = "SGD", "EWC"
_OURS, _SQUARES, _GATED = "CLASSP", "CLASSP, p = 2", "CLASSP, gated"


class _Setting(NamedTuple):
    """One point of a sweep; all are arrays, so that one compilation serves a sweep."""

    rate: Any
    strength: Any = 0.0  # of EWC's penalty
    threshold: Any = -1.0  # of CLASSP


def run(
    config: Config, *, out: pathlib.Path | None = None, progress: bool = True
) -> Report:
    """Sweep every arm over its settings and compare the best.

    Args:
      config: the setting.
      out: where report.json and report.png go; None: nowhere.
      progress: whether to show a bar on a terminal.

    Returns:
      The report.
    """
    _check(config)
    watch = Stopwatch.start()
    images = data.digits()
    keys = jax.vmap(jax.random.key)(jnp.arange(config.seeds))
    # Outside of the compiled runs, whose compilation it would fill.
    begun = jax.vmap(functools.partial(_begin, config, len(images.train_y)))(keys)
    sweeps = _sweeps(config)
    found: dict[str, np.ndarray] = {}
    with Progress(show=None if progress else False) as bars:
        bar = bars.add("sweeps", steps=len(sweeps))
        for done, (name, settings) in enumerate(sweeps.items(), 1):
            one = functools.partial(_accuracies, config, images, name)
            over_seeds = jax.vmap(one, (None, 0))
            stacked = _Setting(*map(jnp.asarray, zip(*settings, strict=True)))
            found[name] = np.asarray(
                jax.jit(jax.vmap(over_seeds, (0, None)))(stacked, begun)
            )  # [settings, seeds, after task, of task]
            bar(done, {})
    arms = [_arm(config, name, sweeps[name], found[name]) for name in sweeps]
    report = Report(
        recipe="classp",
        title=f"Digits, then {config.tasks - 1} of their permutations, one network",
        claim=(
            "Weights that slow down by what has moved them keep the first task and "
            "learn the next: better than EWC, with half its memory."
        ),
        config=dataclasses.asdict(config),
        seeds=range(config.seeds),
        metrics={
            "average": Metric("average of two", "accuracy", False, ".3f"),
            "first": Metric("first task", "accuracy", False, ".3f"),
            "second": Metric("second task", "accuracy", False, ".3f"),
            "lost": Metric("first task lost", "accuracy", True, ".3f"),
            "last": Metric(
                "average of all tasks, at the end", "accuracy", False, ".3f"
            ),
            "bytes": Metric("state, bytes a parameter", format=".1f"),
            "so_far": Metric("average of the tasks so far", "accuracy", False),
        },
        arms=arms,
        started=watch.started,
        seconds=watch.seconds,
        findings=_findings(config, {a.name: a for a in arms}, sweeps, found),
    )
    if out is not None:
        report.save(out, figure=figure)
    return report


def figure(report: Report) -> "Figure":
    """Accuracy over the tasks, and memory against accuracy after the second."""
    figure = curves_and_tradeoff(
        report,
        curve="so_far",
        x_metric="bytes",
        y_metric="average",
        x_label="tasks learned",
    )
    figure.axes[0].set_xticks(range(1, report.config["tasks"] + 1))
    return figure


def _check(config: Config) -> None:
    if config.tasks < 2 or config.seeds < 1:
        raise ValueError(
            f"tasks={config.tasks} must be two or more, seeds={config.seeds} positive"
        )
    for name in ("epochs", "later_epochs", "batch", "hidden", "learning_rate"):
        if getattr(config, name) <= 0:
            raise ValueError(f"{name}={getattr(config, name)} must be positive")
    if config.batch > 1500:
        raise ValueError(f"batch={config.batch} is more than the 1500 images")
    for name in ("sgd_rates", "rates", "ewc_rates", "strengths"):
        if not getattr(config, name) or min(getattr(config, name)) <= 0:
            raise ValueError(f"{name}={getattr(config, name)} must be positive numbers")


def _sweeps(config: Config) -> dict[str, list[_Setting]]:
    """The settings that each arm tries."""
    return {
        _PLAIN: [_Setting(rate) for rate in config.sgd_rates],
        _EWC: [
            _Setting(rate, strength)
            for rate, strength in itertools.product(config.ewc_rates, config.strengths)
        ],
        _OURS: [_Setting(rate) for rate in config.rates],
        _SQUARES: [_Setting(rate / 2) for rate in config.rates],
        _GATED: [_Setting(rate, 0.0, config.threshold) for rate in config.rates],
    }


# --- The tasks --------------------------------------------------------------------


def _init(config: Config, key: jax.Array) -> Any:
    sizes = (64, config.hidden, 10)
    layers = {}
    for i, (n, m) in enumerate(itertools.pairwise(sizes)):
        kernel = jax.nn.initializers.he_normal()(jax.random.fold_in(key, i), (n, m))
        layers[f"dense_{i}"] = {"kernel": kernel, "bias": jnp.zeros(m)}
    return layers


def _logits(params: Any, x: jax.Array) -> jax.Array:
    first, second = params["dense_0"], params["dense_1"]
    h = jax.nn.relu(x @ first["kernel"] + first["bias"][None])
    return h @ second["kernel"] + second["bias"][None]


def _loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    logits = _logits(params, x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def _optimiser(
    config: Config, name: str, setting: _Setting, first_steps: int
) -> optax.GradientTransformation:
    rates = [config.learning_rate, setting.rate]
    if name in (_PLAIN, _EWC):
        tasks = optim.classp_task_schedule([first_steps], learning_rate=rates)
        return optax.sgd(tasks["learning_rate"])
    tasks = optim.classp_task_schedule(
        [first_steps],
        learning_rate=rates,
        threshold=[-1.0, setting.threshold],
        apply_scaling=[False, True],
    )
    return optim.classp(**tasks, power=2.0 if name == _SQUARES else 1.0)


class _Begun(NamedTuple):
    """What a seed decides: the same for all arms."""

    params: Any
    pixels: jax.Array  # [task, 64], the first task's as they are
    orders: list[jax.Array]  # for each task [step, batch]
    key: jax.Array  # of the labels that EWC draws


def _begin(config: Config, images: int, key: jax.Array) -> _Begun:
    k_init, k_pixels, k_order, k_fisher = jax.random.split(key, 4)
    pixels = [jnp.arange(64)] + [
        jax.random.permutation(jax.random.fold_in(k_pixels, task), 64)
        for task in range(1, config.tasks)
    ]
    seen = images // config.batch * config.batch
    orders = []
    for task in range(config.tasks):
        epochs = config.later_epochs if task else config.epochs
        keys = jax.random.split(jax.random.fold_in(k_order, task), epochs)
        order = jax.vmap(lambda k: jax.random.permutation(k, images)[:seen])(keys)
        orders.append(order.reshape(-1, config.batch))
    return _Begun(_init(config, k_init), jnp.stack(pixels), orders, k_fisher)


def _accuracies(
    config: Config, images: data.Split, name: str, setting: _Setting, begun: _Begun
) -> jax.Array:
    """Held-out accuracy, [after task, of task], of one run through all tasks."""
    train_x, valid_x = (
        jnp.asarray(x.reshape(-1, 64)) for x in (images.train_x, images.valid_x)
    )
    train_y, valid_y = jnp.asarray(images.train_y), jnp.asarray(images.valid_y)
    tx = _optimiser(config, name, setting, len(begun.orders[0]))
    params = begun.params
    state = tx.init(params)
    fisher, anchor = jax.tree.map(jnp.zeros_like, params), params

    out = []
    for task in range(config.tasks):
        x = train_x[:, begun.pixels[task]]

        def penalised(
            params: Any, x: Any, y: Any, fisher: Any = fisher, anchor: Any = anchor
        ) -> jax.Array:
            pull = jax.tree.map(
                lambda f, w, a: jnp.sum(f * (w - a) ** 2), fisher, params, anchor
            )
            return _loss(params, x, y) + setting.strength / 2 * optax.tree.sum(pull)

        def step(carry: Any, rows: jax.Array, x: Any = x, loss: Any = penalised) -> Any:
            params, state = carry
            grads = jax.grad(loss if name == _EWC else _loss)(
                params, x[rows], train_y[rows]
            )
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        (params, state), _ = jax.lax.scan(step, (params, state), begun.orders[task])
        if name == _EWC:
            fisher = jax.tree.map(
                jnp.add, fisher, _fisher(params, x, jax.random.fold_in(begun.key, task))
            )
            anchor = params
        out.append(
            [
                jnp.mean(_logits(params, valid_x[:, p]).argmax(-1) == valid_y)
                for p in begun.pixels
            ]
        )
    return jnp.asarray(out)


def _fisher(params: Any, x: jax.Array, key: jax.Array) -> Any:
    """Diagonal of the Fisher matrix: mean square of the scores of drawn labels.

    Equal to the mean of squares over examples of the outer products' entries, so that
    no gradient of a single example is formed.
    """
    first, second = params["dense_0"], params["dense_1"]
    h = jax.nn.relu(x @ first["kernel"] + first["bias"][None])
    logits = h @ second["kernel"] + second["bias"][None]
    drawn = jax.nn.one_hot(jax.random.categorical(key, logits), 10)
    d2 = jax.nn.softmax(logits) - drawn
    d1 = (d2 @ second["kernel"].T) * (h > 0)

    def mean_square(a: jax.Array, d: jax.Array) -> Any:
        n = len(a)
        return {"kernel": (a**2).T @ d**2 / n, "bias": jnp.mean(d**2, 0)}

    return {"dense_0": mean_square(x, d1), "dense_1": mean_square(h, d2)}


# --- What it shows ----------------------------------------------------------------


def _averages(found: np.ndarray) -> np.ndarray:
    """Average of the first two tasks after the second, [..., settings, seeds]."""
    return found[..., 1, :2].mean(-1)


def _best(found: np.ndarray) -> int:
    return int(np.argmax(_averages(found).mean(-1)))


def _arm(config: Config, name: str, settings: list[_Setting], found: np.ndarray) -> Arm:
    best, chosen = found[_best(found)], settings[_best(found)]
    # More tasks may want another setting: each arm has its best at the end, too.
    at_end = int(np.argmax(found[:, :, -1].mean((1, 2))))
    so_far = [found[at_end][:, t, : t + 1].mean(-1) for t in range(config.tasks)]
    return Arm(
        name,
        {
            "average": best[:, 1, :2].mean(-1).tolist(),
            "first": best[:, 1, 0].tolist(),
            "second": best[:, 1, 1].tolist(),
            "lost": (best[:, 0, 0] - best[:, 1, 0]).tolist(),
            "last": so_far[-1].tolist(),
            "bytes": [_bytes(config, name)],
        },
        settings={
            "chosen": chosen._asdict(),
            "chosen_at_end": settings[at_end]._asdict(),
            "swept": [s._asdict() for s in settings],
            "averages": _averages(found).mean(-1).tolist(),
            "averages_at_end": found[:, :, -1].mean((1, 2)).tolist(),
        },
        curves={
            "so_far": Curve(range(1, config.tasks + 1), np.stack(so_far, 1).tolist())
        },
        baseline=name in (_PLAIN, _EWC),
    )


def _bytes(config: Config, name: str) -> float:
    """Bytes a parameter that go from task to task beside it, by their dtypes."""
    params = jax.eval_shape(lambda: _init(config, jax.random.key(0)))
    state = jax.eval_shape(_optimiser(config, name, _Setting(0.1), 1).init, params)
    kept = (state, params, params) if name == _EWC else state  # Fisher and anchor
    size = sum(x.size for x in jax.tree.leaves(params))
    return bits.size_in_bits(kept) / 8 / size


def _findings(
    config: Config,
    arms: dict[str, Arm],
    sweeps: dict[str, list[_Setting]],
    found: dict[str, np.ndarray],
) -> list[Finding]:
    mean, last = (
        {name: arm.mean(metric) for name, arm in arms.items()}
        for metric in ("average", "last")
    )

    def show(*names: str) -> str:
        def one(name: str) -> str:
            chosen = arms[name].settings["chosen"]
            spread = ""
            if config.seeds > 2:
                spread = f" ± {arms[name].spread('average'):.3f}"
            rate = f"{name} {mean[name]:.3f}{spread} at rate {chosen['rate']:g}"
            return rate + f", strength {chosen['strength']:g}" * (name == _EWC)

        return "; ".join(map(one, names))

    # The middle of the published range, chosen before and not by its outcome.
    at = min(range(len(config.rates)), key=lambda i: abs(config.rates[i] - 0.1))
    fixed = found[_OURS][at]
    lost = float(np.mean(fixed[:, 0, 0] - fixed[:, 1, 0]))
    plain = found[_PLAIN]
    plain_at = int(np.argmax(plain[:, :, 1, 1].mean(-1)))
    plain_lost = float(np.mean(plain[plain_at, :, 0, 0] - plain[plain_at, :, 1, 0]))
    ours, ewc = (arms[name].mean("bytes") for name in (_OURS, _EWC))
    out = [
        Finding(
            "the best of CLASSP averages 0.02 more than the best of SGD",
            mean[_OURS] - mean[_PLAIN] >= 0.02,
            show(_OURS, _PLAIN),
        ),
        Finding(
            f"CLASSP at rate {config.rates[at]:g} loses at most 0.02 of the first task",
            lost <= 0.02,
            f"{lost:.3f}; SGD at rate {config.sgd_rates[plain_at]:g}, where it learns "
            f"the second task best, {plain_lost:.3f}",
        ),
        Finding(
            "the best of CLASSP averages more than the best of EWC",
            mean[_OURS] > mean[_EWC],
            show(_OURS, _EWC),
        ),
        Finding(
            "it keeps half of what EWC keeps beside the weights",
            ours <= 0.51 * ewc,
            f"{ours:.1f} against {ewc:.1f} bytes a parameter",
        ),
        Finding(
            "all of this is suppression: the gate on top gains under 0.01",
            mean[_GATED] - mean[_OURS] < 0.01,
            show(_GATED, _OURS),
        ),
    ]
    if config.tasks > 2:
        out.append(
            Finding(
                f"after {config.tasks} tasks, each at its best there, CLASSP still "
                "averages more than EWC and SGD",
                last[_OURS] > max(last[_EWC], last[_PLAIN]),
                "; ".join(f"{n} {last[n]:.3f}" for n in (_OURS, _EWC, _PLAIN)),
            )
        )
    return out
