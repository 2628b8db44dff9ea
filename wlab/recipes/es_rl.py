# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Evolution of policies: EGGROLL against dense noise in problems of control.

A policy of three hidden layers with norms is searched in CartPole and Pendulum and,
where gymnax is installed, in Acrobot and MountainCarContinuous, at equal numbers of
episodes. Settings are those of the paper's tables (arXiv 2511.16652, appendix N) for
the first two, with a smaller population and fewer generations: ranks of 4, fitness by
ranks, and learning rates and noise that decay.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import optax

from wlab.data import control
from wlab.models.policy import Policy
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
    """The problems and the search.

    Attributes:
      environments: "CartPole" and "Pendulum", or names of gymnax; empty: these two and,
        where gymnax is installed, two of its own.
      population: members of a generation, each with one episode, the same for all.
      generations: of every arm.
      widths: of the policy.
      rank: of EGGROLL's noise.
      episodes: of the policy without noise, at every measurement.
      points: measurements along a run.
      seeds: how many.
    """

    environments: tuple[str, ...] = ()
    population: int = 128
    generations: int = 100
    widths: tuple[int, ...] = (32, 32, 32)
    rank: int = 4
    episodes: int = 32
    points: int = 10
    seeds: int = 3


QUICK = Config(
    environments=("CartPole",),
    population=32,
    generations=6,
    widths=(8,),
    episodes=8,
    points=3,
    seeds=1,
)


class _Setting(NamedTuple):
    """How a problem is searched."""

    rate: float
    rate_decay: float
    sigma: float
    sigma_decay: float
    adam: bool

    def search(self, name: str, rank: int, population: int) -> Search:
        rate = optax.exponential_decay(self.rate, 1, self.rate_decay)
        sigma = optax.exponential_decay(self.sigma, 1, self.sigma_decay)
        tx = optax.adam(rate) if self.adam else optax.sgd(rate)
        return Search(name, rank, sigma, tx, population, "ranks")


# Of the paper's search where it is told; those of gymnax take Pendulum's optimiser.
_SETTINGS = {
    "CartPole": _Setting(0.1, 0.9995, 0.2, 0.999, adam=False),
    "Pendulum": _Setting(0.01, 0.995, 0.05, 0.995, adam=True),
}
_OTHER = _Setting(0.01, 0.995, 0.2, 0.999, adam=True)
_OWN = {"CartPole": control.cartpole, "Pendulum": control.pendulum}
_GYMNAX = ("Acrobot-v1", "MountainCarContinuous-v0")


def run(
    config: Config,
    *,
    out: pathlib.Path | None = None,
    progress: bool = True,
    resume: bool = False,
) -> Report:
    """Search policies with low-rank and with dense noise and compare returns.

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
    problems = {name: _environment(name) for name in _names(config)}
    ours = f"EGGROLL rank {config.rank}"
    arms = {ours: config.rank, DENSE: 0} | ({EVOSAX: 0} if has_evosax() else {})
    bars = Progress(show=None if progress else False)
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    with Run("es-rl", config, out, resume=resume) as kept, bars:
        for problem, env in problems.items():
            bar = bars.add(problem, len(arms) * config.seeds)
            for arm, rank in arms.items():
                for seed in range(config.seeds):
                    once = functools.partial(
                        _learn, config, problem, env, arm, rank, seed
                    )
                    made = kept.once(f"{problem} {arm} {seed}", once)
                    found.setdefault((problem, arm), []).append(made)
                    done = sum(len(x) for key, x in found.items() if key[0] == problem)
                    bar(done, {"return": made["curve"][-1]})
        report = Report(
            recipe="es-rl",
            title=(
                f"Policies of {'x'.join(map(str, config.widths))}, "
                f"{config.generations} generations of {config.population} episodes"
            ),
            claim=(
                "Noise of low rank finds policies as good as dense noise does, at "
                "equal numbers of episodes."
            ),
            config=dataclasses.asdict(config),
            seeds=range(config.seeds),
            metrics={
                problem: Metric(f"return, {problem}", "", False, ".1f")
                for problem in problems
            }
            | {"seconds": Metric("time of all searches", "s", format=".1f")},
            arms=[_arm(config, list(problems), name, found) for name in arms],
            started=kept.watch.started,
            seconds=kept.watch.seconds,
            findings=_findings(list(problems), ours, found),
        )
        if out is not None:
            report.save(out, figure=figure)
    return report


def figure(report: Report) -> "Figure":
    """Return over episodes in the first problem, and against the time of all."""
    first = next(iter(report.metrics))
    return curves_and_tradeoff(
        report,
        curve=first,
        x_metric="seconds",
        y_metric=first,
        x_label="thousand episodes",
    )


def _names(config: Config) -> tuple[str, ...]:
    if config.environments:
        return config.environments
    try:
        control.gymnax(_GYMNAX[0])
    except ModuleNotFoundError:
        return tuple(_OWN)
    return (*_OWN, *_GYMNAX)


def _environment(name: str) -> control.Environment:
    return _OWN[name]() if name in _OWN else control.gymnax(name)


def _learn(
    config: Config,
    problem: str,
    env: control.Environment,
    arm: str,
    rank: int,
    seed: int,
) -> dict[str, Any]:
    policy = Policy(env.actions, config.widths)
    first = env.observe(env.reset(jax.random.key(0)))
    params = jax.jit(policy.init)(jax.random.key(seed), first)
    held = jax.random.split(jax.random.key(10_000 + seed), config.episodes)

    def earned(params: Any, key: jax.Array) -> jax.Array:
        def act(seen: jax.Array) -> jax.Array:
            return policy.apply(params, seen)  # type: ignore[return-value]

        return control.rollout(env, act, key)

    how = _SETTINGS.get(problem, _OTHER).search(arm, rank, config.population)
    return search(
        how,
        params,
        earned,
        lambda params: jax.vmap(lambda key: earned(params, key))(held).mean(),
        generations=config.generations,
        points=config.points,
        seed=seed,
    )


def _arm(
    config: Config,
    problems: list[str],
    name: str,
    found: Mapping[tuple[str, str], list[dict[str, Any]]],
) -> Arm:
    each = config.generations / config.points * config.population / 1e3
    steps = [each * i for i in range(config.points + 1)]
    runs = {problem: found[problem, name] for problem in problems}
    seconds = [[x["seconds"] for x in made] for made in runs.values()]
    return Arm(
        name,
        {p: [x["curve"][-1] for x in made] for p, made in runs.items()}
        | {"seconds": [sum(x) for x in zip(*seconds, strict=True)]},
        curves={
            p: Curve(steps, [x["curve"] for x in made]) for p, made in runs.items()
        },
        baseline=name in (DENSE, EVOSAX),
    )


def _findings(
    problems: list[str],
    ours: str,
    found: Mapping[tuple[str, str], list[dict[str, Any]]],
) -> list[Finding]:
    """Of each problem, whether ours is not worse than dense noise by the seeds."""
    out = []
    for problem in problems:
        ends = {
            name: [x["curve"][-1] for x in found[problem, name]]
            for name in (ours, DENSE)
        }
        starts = [x["curve"][0] for x in found[problem, ours]]
        mean = {name: sum(x) / len(x) for name, x in ends.items()}
        # Within the seeds of the other, or above them.
        worse = max(ends[ours]) < min(ends[DENSE])
        better = min(ends[ours]) > max(ends[DENSE])
        word = "better" if better else "worse" if worse else "equal, by the seeds"
        text = f"{mean[ours]:.1f}, dense {mean[DENSE]:.1f}: {word}"
        out.append(Finding(f"{problem}: not worse than dense noise", not worse, text))
        learnt = mean[ours] > sum(starts) / len(starts)
        out.append(
            Finding(
                f"{problem}: it learns",
                learnt,
                f"{mean[ours]:.1f}, at first {sum(starts) / len(starts):.1f}",
            )
        )
    return out
