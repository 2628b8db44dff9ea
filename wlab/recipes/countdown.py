# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Countdown: reasoning learnt from checked answers, by evolution and by gradients.

A small decoder first learns the form of an answer from random expressions, most of them
wrong. Then it learns from what a checker says of answers it samples: EGGROLL (arXiv
2511.16652) runs a population on the same prompts, greedily, and needs no gradient; the
baseline is the policy gradient with advantages normalised within groups of samples of a
prompt, as GRPO has them, with one update for each batch, so that clipping has nothing
to do. Both are given the same number of generated tokens for an update, and in all.
"""

import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from wlab import es, train
from wlab.data import countdown as task
from wlab.models.decoder import Decoder, tiny
from wlab.recipes import (
    Arm,
    Curve,
    Finding,
    Metric,
    Report,
    Run,
    curves_and_tradeoff,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True)
class Config:
    """The model and how long it learns.

    Attributes:
      width: of the decoder.
      depth: its blocks.
      format_steps: of learning the form of answers.
      format_batch: examples in a batch of it.
      updates: of learning from checked answers, in both ways.
      answers: sampled for an update.
      population: members, among which EGGROLL's answers are divided.
      group: samples of a prompt, in the baseline.
      sigma: sizes of the noise that are tried.
      rates: learning rates of evolution that are tried.
      policy_rates: learning rates of the baseline, of Adam, that are tried.
      further: how often the best is sought past an edge of what is tried.
      points: evaluations along a run.
      seeds: how many, each with its own decoder; one more chooses the settings.
    """

    width: int = 32
    depth: int = 2
    format_steps: int = 600
    format_batch: int = 256
    updates: int = 100
    answers: int = 1024
    population: int = 128
    group: int = 16
    sigma: tuple[float, ...] = (0.01, 0.03)
    rates: tuple[float, ...] = (0.03, 0.1, 0.3)
    policy_rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    further: int = 2
    points: int = 10
    seeds: int = 3


QUICK = Config(
    width=32,
    depth=1,
    format_steps=20,
    format_batch=32,
    updates=2,
    answers=64,
    population=16,
    sigma=(0.03,),
    rates=(0.3,),
    policy_rates=(1e-3,),
    further=0,
    points=2,
    seeds=1,
)

_ES, _POLICY = "EGGROLL", "policy gradient"


def run(
    config: Config,
    *,
    out: pathlib.Path | None = None,
    progress: bool = True,
    resume: bool = False,
) -> Report:
    """Teach the form, then learn from checked answers in both ways.

    Args:
      config: the setting.
      out: where report.json and report.png go; None: nowhere.
      progress: whether to show a bar on a terminal.
      resume: whether to go on with the run that `out` holds.

    Returns:
      The report.
    """
    _check(config)
    bars = train.Progress(show=None if progress else False)
    with Run("countdown", config, out, resume=resume) as kept, bars:
        arms = [
            _arm(config, name, kept, functools.partial(bars.add, name))
            for name in (_ES, _POLICY)
        ]
        report = Report(
            recipe="countdown",
            title=(
                f"Countdown, decoder of width {config.width}, {config.updates} updates "
                f"of {config.answers} answers"
            ),
            claim=(
                "At equal numbers of generated tokens evolution of all weights learns "
                "more from checked answers than the policy gradient with advantages "
                "normalised in groups."
            ),
            config=dataclasses.asdict(config),
            seeds=range(config.seeds),
            metrics={
                "right": _share("right answers to new problems"),
                "form": _share("answers in the right form"),
                "before": _share("right before"),
                "learnt": _share("right answers to problems it learnt from"),
                "seconds": Metric("time of a run", "s", format=".0f"),
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
    """Right answers over generated tokens, and against the time of a run."""
    return curves_and_tradeoff(
        report,
        curve="right",
        x_metric="seconds",
        y_metric="right",
        x_label="million generated tokens",
    )


def _share(label: str) -> Metric:
    return Metric(label, lower_is_better=False, format=".1%")


def _check(config: Config) -> None:
    if config.updates % config.points:
        raise ValueError(
            f"updates={config.updates} is not a multiple of points={config.points}"
        )
    for name in ("population", "group"):
        size = getattr(config, name)
        if size < 2 or config.answers % size:
            raise ValueError(
                f"answers={config.answers} of an update do not divide among "
                f"{name}={size}: take a multiple"
            )
    if not (config.sigma and config.rates and config.policy_rates):
        raise ValueError("sigma, rates and policy_rates: give at least one of each")


# --- Model and answers ------------------------------------------------------------


class _Problems(NamedTuple):
    """Problems on the device."""

    numbers: jax.Array  # int32 [n, 3]
    target: jax.Array  # int32 [n]
    prompt: jax.Array  # int32 [n, PROMPT]

    @classmethod
    def of(cls, problems: task.Countdown) -> "_Problems":
        return cls(*map(jnp.asarray, problems))

    def at(self, index: jax.Array) -> "_Problems":
        return _Problems(*(x[index] for x in self))


def _model(config: Config) -> Decoder:
    return Decoder(
        tiny(
            vocab=len(task.SYMBOLS),
            width=config.width,
            depth=config.depth,
            hidden=3 * config.width,
            heads=4,
            kv_heads=4,
            head_dim=config.width // 4,
            scan=True,
        )
    )


def _logits(model: Decoder, params: Any, tokens: jax.Array) -> jax.Array:
    return model.apply({"params": params}, tokens)  # type: ignore[return-value]


def _answers(
    model: Decoder, params: Any, prompt: jax.Array, key: jax.Array | None
) -> jax.Array:
    """Answers to prompts, `[n, ANSWER]`: sampled with a key, greedy without."""
    n = prompt.shape[0]
    tokens = jnp.concatenate([prompt, jnp.zeros((n, task.ANSWER), jnp.int32)], axis=1)

    def one(tokens: jax.Array, i: jax.Array) -> tuple[jax.Array, None]:
        all_logits = _logits(model, params, tokens)
        logits = jax.lax.dynamic_index_in_dim(all_logits, task.PROMPT - 1 + i, 1, False)
        if key is None:
            chosen = jnp.argmax(logits, axis=-1)
        else:
            chosen = jax.random.categorical(jax.random.fold_in(key, i), logits)
        chosen = chosen.astype(jnp.int32)[:, None]
        tokens = jax.lax.dynamic_update_slice(tokens, chosen, (0, task.PROMPT + i))
        return tokens, None

    tokens, _ = jax.lax.scan(one, tokens, jnp.arange(task.ANSWER))
    return tokens[:, task.PROMPT :]


def _checked(answers: jax.Array, problems: _Problems) -> tuple[jax.Array, jax.Array]:
    """Whether each is right, and in the right form."""
    return jax.vmap(task.verify)(answers, problems.numbers, problems.target)


def _token_losses(
    model: Decoder, params: Any, prompt: jax.Array, answers: jax.Array
) -> jax.Array:
    """Cross entropy of each token of the answers, `[n, ANSWER]`."""
    tokens = jnp.concatenate([prompt, answers], axis=1)
    logits = _logits(model, params, tokens[:, :-1])[:, task.PROMPT - 1 :]
    return optax.softmax_cross_entropy_with_integer_labels(logits, answers)


@functools.partial(jax.jit, static_argnums=0)
def _form(
    config: Config, key: jax.Array, prompts: jax.Array, answers: jax.Array
) -> Any:
    """A decoder that has learnt from batches `[steps, batch, tokens]`."""
    model = _model(config)
    tx = optax.adam(optax.cosine_decay_schedule(3e-3, config.format_steps))

    def step(carry: Any, batch: Any) -> tuple[Any, None]:
        params, state = carry
        grads = jax.grad(lambda p: _token_losses(model, p, *batch).mean())(params)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    params = model.init(key, prompts[0])["params"]
    return jax.lax.scan(step, (params, tx.init(params)), (prompts, answers))[0][0]


def _formed(config: Config, seed: int) -> Any:
    """A decoder that has learnt the form of answers, not what is right."""
    learn, _ = task.problems()
    rng = np.random.default_rng(seed)
    shape = (config.format_steps, config.format_batch)
    index = rng.integers(0, len(learn.target), shape).reshape(-1)
    shown = task.Countdown(*(x[index] for x in learn))
    answers, _ = task.expressions(shown, rng)
    batches = (x.reshape(*shape, -1) for x in (shown.prompt, answers))
    return _form(config, jax.random.key(seed), *batches)


@functools.partial(jax.jit, static_argnums=0)
def _measure(config: Config, params: Any, problems: _Problems) -> Any:
    """The shares of right answers and of those in the right form, greedily."""
    answers = _answers(_model(config), params, problems.prompt, None)
    right, well = _checked(answers, problems)
    return right.mean(), well.mean()


# --- Both ways of learning --------------------------------------------------------


class _Setting(NamedTuple):
    """What is chosen on a seed of its own."""

    rate: float
    sigma: float = 0.0  # of evolution


class _Way(NamedTuple):
    """A way of learning; its settings are in the state, so that it compiles once."""

    update: Callable[[train.TrainState, _Problems, jax.Array], train.TrainState]
    init: Callable[[Any, _Setting, int], train.TrainState]


def _evolution(config: Config) -> _Way:
    """All members answer the same prompts, greedily."""
    model = _model(config)
    strategy = es.eggroll(0.0)
    moves = optax.inject_hyperparams(optax.sgd)(learning_rate=0.0)
    tx = optax.chain(es.scale_by_strategy(strategy), moves)

    def init(params: Any, setting: _Setting, seed: int) -> train.TrainState:
        state = train.init_state(params, tx)
        search, moves = state.opt_state
        search = search._replace(
            sigma=jnp.float32(setting.sigma), key=jax.random.key(seed)
        )
        moves.hyperparams["learning_rate"] = jnp.float32(setting.rate)
        return state._replace(opt_state=(search, moves))

    def fitness(params: Any, problems: _Problems) -> jax.Array:
        answers = _answers(model, params, problems.prompt, None)
        return _reward(*_checked(answers, problems)).mean()

    step = es.make_evolution_step(fitness, strategy, tx, config.population, keep=True)
    prompts = config.answers // config.population

    def update(
        state: train.TrainState, learn: _Problems, key: jax.Array
    ) -> train.TrainState:
        index = jax.random.randint(key, (prompts,), 0, len(learn.target))
        return step(state, learn.at(index))[0]

    return _Way(update, init)


def _policy_gradient(config: Config) -> _Way:
    """Several samples of each prompt, and the gradient of their likelihood."""
    model = _model(config)
    moves = optax.inject_hyperparams(optax.adam)(learning_rate=0.0)
    tx = optax.chain(optax.clip_by_global_norm(1.0), moves)
    groups = config.answers // config.group

    def init(params: Any, setting: _Setting, seed: int) -> train.TrainState:
        del seed
        state = train.init_state(params, tx)
        clip, moves = state.opt_state
        moves.hyperparams["learning_rate"] = jnp.float32(setting.rate)
        return state._replace(opt_state=(clip, moves))

    def update(
        state: train.TrainState, learn: _Problems, key: jax.Array
    ) -> train.TrainState:
        choose, sample = jax.random.split(key)
        index = jax.random.randint(choose, (groups,), 0, len(learn.target))
        problems = learn.at(jnp.repeat(index, config.group))
        answers = _answers(model, state.params, problems.prompt, sample)
        reward = _reward(*_checked(answers, problems)).reshape(groups, config.group)
        deviation = reward.std(1, keepdims=True) + 1e-6
        advantage = ((reward - reward.mean(1, keepdims=True)) / deviation).reshape(-1)

        def loss(params: Any) -> jax.Array:
            losses = _token_losses(model, params, problems.prompt, answers)
            return (advantage * losses.mean(axis=1)).mean()

        grads = jax.grad(loss)(state.params)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return train.TrainState(state.step + 1, params, opt_state)

    return _Way(update, init)


def _reward(right: jax.Array, well: jax.Array) -> jax.Array:
    """The form is worth a little, so that it is not lost."""
    return right + 0.1 * well


@functools.cache
def _way(config: Config, name: str) -> _Way:
    return {_ES: _evolution, _POLICY: _policy_gradient}[name](config)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def _stretch(
    config: Config,
    name: str,
    state: train.TrainState,
    learn: _Problems,
    keys: jax.Array,
) -> train.TrainState:
    """As many updates as there are keys."""
    update = _way(config, name).update
    return jax.lax.scan(lambda s, k: (update(s, learn, k), None), state, keys)[0]


def _learn(config: Config, name: str, setting: _Setting, seed: int) -> dict[str, Any]:
    """One run, from a decoder that knows the form, and its evaluations."""
    learn, valid = map(_Problems.of, task.problems())
    state = _way(config, name).init(_formed(config, seed), setting, seed)
    before = float(_measure(config, state.params, valid)[0])
    each = config.updates // config.points
    keys = jax.random.split(jax.random.key(1000 + seed), (config.points, each))
    found, marks = [], []
    for some in keys:
        state = _stretch(config, name, state, learn, some)
        found.append([float(x) for x in _measure(config, state.params, valid)])
        marks.append(time.perf_counter())
    # The first stretch may compile, and is not counted.
    rest = max(1, config.points - 1)
    return {
        "right": [right for right, _ in found],
        "form": found[-1][1],
        "before": before,
        "learnt": float(_measure(config, state.params, learn)[0]),
        "seconds": (marks[-1] - marks[0]) * config.points / rest,
    }


# --- Arms -------------------------------------------------------------------------


def _arm(
    config: Config,
    name: str,
    kept: Run,
    bar: Callable[[int], Callable[[int, Mapping[str, Any]], None]],
) -> Arm:
    """The best setting on a seed of its own, and all seeds with it."""
    rates = config.rates if name == _ES else config.policy_rates
    sigmas = config.sigma if name == _ES else (0.0,)
    tried: dict[_Setting, float] = {}
    show = bar(len(rates) * len(sigmas) + config.further + config.seeds)
    done = 0

    def once(setting: _Setting, seed: int) -> dict[str, Any]:
        nonlocal done
        label = f"{name} {setting.rate:g} {setting.sigma:g} {seed}"
        made = kept.once(label, lambda: _learn(config, name, setting, seed))
        done += 1
        show(done, {"right": made["right"][-1]})
        return made

    def attempt(setting: _Setting) -> None:
        if setting not in tried:
            tried[setting] = once(setting, config.seeds)["right"][-1]

    for sigma in sigmas:
        for rate in rates:
            attempt(_Setting(rate, sigma))
    for _ in range(config.further):
        best = max(tried, key=tried.__getitem__)
        attempt(_past_the_edge(best, tried))
    best = max(tried, key=tried.__getitem__)
    runs = [once(best, seed) for seed in range(config.seeds)]
    tokens = config.answers * task.ANSWER * config.updates / config.points / 1e6
    return Arm(
        name,
        {
            "right": [x["right"][-1] for x in runs],
            "form": [x["form"] for x in runs],
            "before": [x["before"] for x in runs],
            "learnt": [x["learnt"] for x in runs],
            "seconds": [x["seconds"] for x in runs],
        },
        settings={
            **best._asdict(),
            "tried": [[*s, right] for s, right in tried.items()],
        },
        curves={
            "right": Curve(
                [tokens * i for i in range(config.points + 1)],
                [[x["before"], *x["right"]] for x in runs],
            )
        },
        baseline=name != _ES,
    )


def _past_the_edge(best: _Setting, tried: Collection[_Setting]) -> _Setting:
    """A setting further out than all that were tried, if the best is at an edge."""
    for field in best._fields:
        known = sorted({getattr(setting, field) for setting in tried})
        if len(known) > 1 and getattr(best, field) == known[-1]:
            return best._replace(**{field: known[-1] * known[-1] / known[-2]})
        if len(known) > 1 and getattr(best, field) == known[0]:
            return best._replace(**{field: known[0] * known[0] / known[1]})
    return best


def _findings(arms: Mapping[str, Arm]) -> list[Finding]:
    ours, policy = arms[_ES], arms[_POLICY]
    return [
        Finding(
            "EGGROLL answers more new problems than before it learnt",
            ours.mean("right") > ours.mean("before"),
            f"{ours.mean('right'):.1%}, before {ours.mean('before'):.1%}",
        ),
        Finding(
            "EGGROLL answers more new problems than the policy gradient",
            ours.mean("right") > policy.mean("right"),
            f"{ours.mean('right'):.1%} and {policy.mean('right'):.1%}",
        ),
    ]
