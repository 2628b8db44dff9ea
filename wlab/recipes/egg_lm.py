# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""EGG on text: an integer language model that learns by evolution, by population.

All weights and activations are int8 and no step holds a float. Populations have equal
numbers of updates; each pair reads a stream of its own, and its recurrent state goes on
from update to update (arXiv 2511.16652, appendices G and H). A population of 4 is what
zeroth-order methods with a pair or two see; larger ones must learn more.
"""

import dataclasses
import functools
import pathlib
import time
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from wlab import data, es
from wlab.models import egg
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
    """The model, the text and the populations.

    Attributes:
      populations: members of each arm.
      width: of the model, a power of 4.
      depth: its blocks.
      updates: of every arm.
      length: bytes that a member reads for an update.
      text: as in `wlab.data.text`.
      sigma_shift: the noise is 2 to the power of minus this.
      decay: powers of two by which the share of moving weights falls.
      points: evaluations along a run.
      valid: bytes of each of 16 held-out windows.
      seeds: how many.
    """

    populations: tuple[int, ...] = (4, 64, 1024)
    width: int = 64
    depth: int = 1
    updates: int = 300
    length: int = 32
    text: str = "pydoc"
    sigma_shift: int = 4
    decay: float = 5.0
    points: int = 15
    valid: int = 512
    seeds: int = 3


QUICK = Config(
    populations=(2, 128), width=16, updates=60, length=8, points=3, valid=64, seeds=1
)


def run(
    config: Config,
    *,
    out: pathlib.Path | None = None,
    progress: bool = True,
    resume: bool = False,
) -> Report:
    """Train every population and compare bits per byte of held-out text.

    Args:
      config: the setting.
      out: where report.json and report.png go; None: nowhere.
      progress: whether to show a bar on a terminal.
      resume: whether to go on with the run that `out` holds.

    Returns:
      The report.
    """
    if config.updates % config.points or config.seeds < 1:
        raise ValueError(
            f"updates={config.updates} must be a multiple of points={config.points}, "
            f"and seeds={config.seeds} positive"
        )
    if len(config.populations) < 2 or any(n % 2 or n < 2 for n in config.populations):
        raise ValueError(
            f"populations={config.populations}: two or more, of antithetic pairs"
        )
    model = egg.Config(config.width, config.depth)
    corpus = data.text(config.text)  # type: ignore[arg-type]
    bars = Progress(show=None if progress else False)
    with Run("egg-lm", config, out, resume=resume) as kept, bars:
        arms = []
        for n in sorted(config.populations):
            bar = bars.add(f"population {n}", config.seeds)
            made = []
            for seed in range(config.seeds):
                once = functools.partial(_learn, config, model, corpus, n, seed)
                made.append(kept.once(f"{n} {seed}", once))
                bar(seed + 1, {"bits": made[-1]["bits"][-1]})
            arms.append(_arm(config, n, made))
        unigram = _unigram(corpus)
        report = Report(
            recipe="egg-lm",
            title=(
                f"EGG of width {config.width}, int8, {config.updates} updates of "
                f"{config.length} bytes a member"
            ),
            claim=(
                "A language model of integers learns by evolution alone, and at equal "
                "numbers of updates larger populations learn more."
            ),
            config=dataclasses.asdict(config) | {"digest": corpus.digest},
            seeds=range(config.seeds),
            metrics={
                "bits": Metric("held-out loss", "bits per byte", format=".3f"),
                "first": Metric("before", "bits per byte", format=".3f"),
                "seconds": Metric("time", "s", format=".1f"),
                "rate": Metric(
                    "speed", "bytes of members a second", False, format=".3g"
                ),
                "told": Metric("told for an update", "bytes", None, format=".0f"),
            },
            arms=arms,
            started=kept.watch.started,
            seconds=kept.watch.seconds,
            findings=_findings(arms, unigram),
        )
        if out is not None:
            report.save(out, figure=figure)
    return report


def figure(report: Report) -> "Figure":
    """Bits per byte over updates, and at the end against the time."""
    return curves_and_tradeoff(
        report, curve="bits", x_metric="seconds", y_metric="bits", x_label="update"
    )


def _learn(
    config: Config, model: egg.Config, corpus: data.Corpus, n: int, seed: int
) -> dict[str, Any]:
    params = egg.init(jax.random.key(seed), model)
    thresholds = es.noise_thresholds(config.updates, config.decay)
    search = es.integer_eggroll(thresholds, config.sigma_shift)
    state = search.init(seed + 1, params)
    text = jnp.asarray(corpus.train, jnp.uint8)
    valid = _windows(corpus.valid, config.valid)

    def score(tree: Any, tokens: jax.Array, memory: jax.Array) -> Any:
        logits, memory = egg.apply(tree, tokens[:-1], memory)
        return egg.log_likelihood(logits, tokens[1:]).sum(), memory

    def update(carry: Any, _: None) -> tuple[Any, None]:
        params, state, memory = carry
        tokens = _streams(config, text, n, state.epoch)
        scores, memory = es.evaluate(search, score, state, params, n, tokens, memory)
        updates, state = search.update(state, params, scores)
        return (optax.apply_updates(params, updates), state, memory), None

    @jax.jit
    def loss(params: Any) -> jax.Array:
        zero = egg.zero_state(model)
        total, _ = jax.vmap(lambda tokens: score(params, tokens, zero))(valid)
        return total

    each = config.updates // config.points
    stretch = jax.jit(
        lambda carry: jax.lax.scan(update, carry, length=each)[0], donate_argnums=0
    )
    memory = jnp.zeros((n, config.depth, config.width), jnp.int8)
    # What is donated is the run's own.
    carry = jax.tree.map(jnp.copy, (params, state, memory))
    compiled = stretch.lower(carry).compile()
    bits, seconds = [_bits(loss(params), valid)], [0.0]
    for _ in range(config.points):
        start = time.perf_counter()
        carry = jax.block_until_ready(compiled(carry))
        seconds.append(seconds[-1] + time.perf_counter() - start)
        bits.append(_bits(loss(carry[0]), valid))
    return {
        "bits": bits,
        "seconds": seconds,
        "sample": _sample(carry[0], model, seed),
    }


def _streams(config: Config, text: jax.Array, n: int, epoch: jax.Array) -> jax.Array:
    """The next bytes of every member, `[members, length + 1]`: the same for a pair."""
    pairs = jnp.arange(n // 2, dtype=jnp.int32)
    begin = pairs * (text.size // (n // 2)) + epoch * config.length
    where = begin[:, None] + jnp.arange(config.length + 1, dtype=jnp.int32)[None]
    return jnp.repeat(text[where % text.size], 2, axis=0)


def _windows(text: np.ndarray, length: int) -> jax.Array:
    """16 windows that begin evenly in a text, `[16, length + 1]`."""
    begin = np.linspace(0, text.size - length - 1, 16).astype(int)
    return jnp.asarray(np.stack([text[i : i + length + 1] for i in begin]), jnp.uint8)


def _bits(total: jax.Array, valid: jax.Array) -> float:
    return -float(np.sum(np.asarray(total, np.int64))) / 16 / (valid.size - len(valid))


def _unigram(corpus: data.Corpus) -> float:
    """Bits per byte of held-out text by the frequencies of bytes in training."""
    counts = np.bincount(corpus.train, minlength=256) + 1.0
    held = np.bincount(corpus.valid, minlength=256) / corpus.valid.size
    return float(-(held * np.log2(counts / counts.sum())).sum())


def _sample(params: Any, model: egg.Config, seed: int, length: int = 200) -> str:
    """Text of the model, at the temperature that it is trained at."""

    def one(carry: Any, key: jax.Array) -> Any:
        token, state = carry
        logits, state = egg.apply(params, token[None], state)
        scores = logits[0].astype(jnp.float32) * (jnp.log(2.0) / 16)
        token = jax.random.categorical(key, scores)
        return (token, state), token

    keys = jax.random.split(jax.random.key(seed), length)
    start = (jnp.zeros((), jnp.int32), egg.zero_state(model))
    tokens = jax.jit(lambda: jax.lax.scan(one, start, keys)[1])()
    return bytes(np.asarray(tokens, np.uint8)).decode("latin-1")


def _arm(config: Config, n: int, made: list[dict[str, Any]]) -> Arm:
    each = config.updates // config.points
    seconds = [x["seconds"][-1] for x in made]
    return Arm(
        f"population {n}",
        {
            "bits": [x["bits"][-1] for x in made],
            "first": [x["bits"][0] for x in made],
            "seconds": seconds,
            "rate": [n * config.length * config.updates / s for s in seconds],
            # Five digits of base 3 to a byte.
            "told": [-(-n // 2 // 5)],
        },
        settings={"sample": made[0]["sample"]},
        curves={
            "bits": Curve(
                [each * i for i in range(config.points + 1)], [x["bits"] for x in made]
            )
        },
        baseline=n == min(config.populations),
    )


def _findings(arms: list[Arm], unigram: float) -> list[Finding]:
    ends = [arm.mean("bits") for arm in arms]
    text = ", ".join(f"{arm.name} {x:.3f}" for arm, x in zip(arms, ends, strict=True))
    return [
        Finding(
            "Larger populations end lower", ends == sorted(ends, reverse=True), text
        ),
        Finding(
            "The largest is 0.7 bits or more below the smallest",
            ends[0] - ends[-1] >= 0.7,
            text,
        ),
        Finding(
            "The largest ends within half a bit of the frequencies of bytes",
            ends[-1] <= unigram + 0.5,
            f"{ends[-1]:.3f}, frequencies {unigram:.3f}",
        ),
    ]
