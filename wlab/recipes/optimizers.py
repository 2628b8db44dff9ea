# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""All optimisers side by side, on one language model at equal tokens.

A decoder over bytes is trained from scratch by each of them, on the same batches in the
same order. Every one has its own learning rate: the best of a few on the first seed,
with which the other seeds run. What is compared is the held-out loss, the time of a
step and the bytes that stand between two steps.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import wlab
from wlab import data, optim, quant, train
from wlab.models import layered
from wlab.models.decoder import Decoder, DecoderConfig, tiny
from wlab.recipes import (
    Arm,
    Curve,
    Finding,
    Metric,
    Report,
    Run,
    StepClock,
    curves_and_tradeoff,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True)
class Config:
    """A small decoder on the text that comes with Python.

    Attributes:
      only: names of the arms to run, in any case, or parts of them; () for all.
      rates: the learning rates that are tried, as multiples of each arm's own.
      further: how many more are tried, at most, where the best is the largest or the
        smallest of them.
      seeds: how many seeds, one after another.
      steps: optimiser steps of each run.
      batch: sequences in a batch.
      length: tokens (bytes) of a sequence.
      text: pydoc, stdlib or python (both).
      width: of the decoder.
      depth: of the decoder.
      interval: steps from one choice of layers or columns to the next.
      evaluations: how often the held-out text is read.
    """

    only: tuple[str, ...] = ()
    rates: tuple[float, ...] = (0.3, 1.0, 3.0)
    further: int = 3
    seeds: int = 2
    steps: int = 200
    batch: int = 8
    length: int = 128
    text: str = "python"
    width: int = 64
    depth: int = 4
    interval: int = 20
    evaluations: int = 8


QUICK = Config(
    only=("AdamW", "FRUGAL columns", "Drop-Muon"),
    rates=(1.0,),
    further=0,
    seeds=1,
    steps=10,
    batch=2,
    length=32,
    width=32,
    depth=2,
    evaluations=2,
)


class _Arm(NamedTuple):
    """One optimiser."""

    rate: float  # its learning rate, of which the multiples are tried
    make: Callable[[optax.Schedule], Any]
    grid: str | None = None  # of packed weights
    layers: bool = False  # whether gradients are taken of its active layers only
    baseline: bool = False


def run(
    config: Config,
    *,
    out: pathlib.Path | None = None,
    progress: bool = True,
    resume: bool = False,
) -> Report:
    """Train with every optimiser on the same batches and compare.

    Args:
        config: the setting.
        out: where report.json, report.png and the metrics go; None: nowhere.
        progress: whether to show bars on a terminal.
        resume: whether to go on with the run that `out` holds.

    Returns:
        The report.
    """
    if min(config.seeds, config.evaluations, config.interval, *config.rates) <= 0:
        raise ValueError("seeds, evaluations, interval and rates must be positive")
    if not config.rates:
        raise ValueError("no rates given: name the multiples that are to be tried")
    if config.steps < 10:
        raise ValueError(f"steps={config.steps} must be at least 10")
    shape = _decoder(config)
    arms = _chosen(config, shape)
    corpus = data.text(config.text)  # type: ignore[arg-type]
    model = Decoder(shape)
    held_out = data.valid_windows(
        corpus.valid, batch=config.batch, length=config.length, limit=16
    )
    task = _Task(
        config,
        model,
        corpus.train,
        train.make_evaluate(functools.partial(_loss, model), held_out),
        jax.jit(lambda key: model.init(key, held_out[0, :, :-1])["params"]),
    )
    bars = train.Progress(show=None if progress else False)
    with Run("optimizers", config, out, resume=resume) as kept, bars:
        runs = len(config.rates) + config.further + config.seeds - 1
        done = [
            _train(task, name, arm, bars.add(name, config.steps * runs), kept)
            for name, arm in arms.items()
        ]
        report = Report(
            recipe="optimizers",
            title=f"Optimisers on {corpus.train.size / 1e6:.1f} MB of {config.text} "
            f"text, {config.steps} steps of {config.batch * config.length} bytes",
            claim=(
                "Less state or cheaper steps cost little loss at equal tokens, each "
                "optimiser at the best of its learning rates."
            ),
            config=dataclasses.asdict(config) | {"digest": corpus.digest},
            seeds=range(config.seeds),
            metrics={
                "bits_per_byte": Metric("held-out loss", "bits per byte", format=".4f"),
                "ms": Metric("step", "ms", format=".0f"),
                "state": Metric("state", "bytes a parameter", format=".2f"),
                "bytes": Metric("weights and state", "bytes a parameter", format=".2f"),
                "rate": Metric("learning rate", lower_is_better=None, format=".1e"),
            },
            arms=done,
            started=kept.watch.started,
            seconds=kept.watch.seconds,
            findings=_findings({arm.name: arm for arm in done}),
        )
        if out is not None:
            report.save(out, figure=figure)
    return report


def figure(report: Report) -> "Figure":
    """Held-out loss over training, and at the end against the bytes held."""
    final = [np.mean(arm.figures["bits_per_byte"]) for arm in report.arms]
    low = float(np.nanmin(final))
    return curves_and_tradeoff(
        report,
        curve="bits_per_byte",
        x_metric="bytes",
        y_metric="bits_per_byte",
        y_limits=(low - 0.1, low + 2.0),
    )


def _decoder(config: Config) -> DecoderConfig:
    # Untied: of a tied embedding a suffix of the layers sees one of the two uses.
    return tiny(
        width=config.width,
        depth=config.depth,
        hidden=4 * config.width,
        heads=4,
        kv_heads=2,
        head_dim=config.width // 4,
        tied=False,
        scan=True,
    )


def _arms(config: Config, shape: DecoderConfig) -> dict[str, _Arm]:
    """Every arm; matrices and the others have rates of their own in Muon."""
    every, fp8 = config.interval, "fp8_e4m3"
    muon = functools.partial(
        optax.contrib.muon,
        muon_weight_dimension_numbers=wlab.core.muon_dimension_numbers,
    )
    base = dataclasses.replace(
        shape, width=shape.width // 2, hidden=shape.hidden // 2, heads=2, kv_heads=1
    )
    classes = optim.mup.classify(_abstract(shape), _abstract(base))

    def others(rate: optax.Schedule) -> optax.Schedule:
        return lambda step: 0.15 * rate(step)

    def drop_muon(rate: optax.Schedule) -> Any:
        return optim.drop_muon(rate, layers="blocks", adam_learning_rate=others(rate))

    return {
        "SGD": _Arm(0.3, lambda rate: optax.sgd(rate, momentum=0.9), baseline=True),
        "AdamW": _Arm(3e-3, optax.adamw, baseline=True),
        "Lion": _Arm(3e-4, optax.lion, baseline=True),
        "Muon": _Arm(
            0.02,
            lambda rate: muon(rate, adam_learning_rate=others(rate)),
            baseline=True,
        ),
        "ECO FP8": _Arm(3e-3, lambda rate: optim.eco(rate, rounding="stochastic"), fp8),
        "ECO-Muon FP8": _Arm(
            0.02,
            lambda rate: optim.eco_muon(
                rate, rounding="stochastic", full_precision=optax.adamw(others(rate))
            ),
            fp8,
        ),
        "FRUGAL columns": _Arm(
            3e-3, lambda rate: optim.frugal(rate, 0.25, every, projection="columns")
        ),
        "FRUGAL blocks": _Arm(
            3e-3, lambda rate: optim.frugal(rate, max(0.25, 1 / shape.depth), every)
        ),
        "Drop-Muon": _Arm(0.02, drop_muon, layers=True),
        "LISA": _Arm(
            3e-3,
            lambda rate: optim.lisa(rate, "blocks", max(1, shape.depth // 4), every),
            layers=True,
        ),
        "muP AdamW": _Arm(3e-3, lambda rate: optim.mup_adamw(rate, 0.0, classes)),
        "CLASSP": _Arm(0.03, lambda rate: optim.classp(rate, threshold=-1, power=2)),
    }


def _abstract(shape: DecoderConfig) -> Any:
    def make() -> Any:
        tokens = jnp.zeros((1, 8), jnp.int32)
        return Decoder(shape).init(jax.random.key(0), tokens)["params"]

    return jax.eval_shape(make)


def _chosen(config: Config, shape: DecoderConfig) -> dict[str, _Arm]:
    arms = _arms(config, shape)
    wanted = [part.lower() for part in config.only]
    for part in wanted:
        if not any(part in name.lower() for name in arms):
            raise ValueError(f"no arm is named {part!r}: there are {', '.join(arms)}")
    return {
        name: arm
        for name, arm in arms.items()
        if not wanted or any(part in name.lower() for part in wanted)
    }


class _Task(NamedTuple):
    """What the arms share."""

    config: Config
    model: Decoder
    tokens: np.ndarray
    evaluate: Callable[[Any], Mapping[str, Any]]
    init: Callable[[jax.Array], Any]


def _loss(model: Decoder, params: Any, batch: jax.Array) -> jax.Array:
    logits: Any = model.apply({"params": params}, batch[:, :-1])
    return train.next_token_loss(logits, batch)


def _train(task: _Task, name: str, arm: _Arm, bar: Any, kept: Run) -> Arm:
    """The best learning rate on the first seed, and the other seeds with it."""
    config = task.config
    # The peak is in the state: the step is compiled once for all of them.
    inject = optax.inject_hyperparams(
        lambda peak: arm.make(_schedule(config.steps, peak)),
        hyperparam_dtype=jnp.float32,
    )
    loss: Any = functools.partial(_loss, task.model)
    active = None
    if arm.layers:
        loss = layered(task.model, train.next_token_loss)
        active = optim.active_layers
    step = train.make_train_step(loss, inject(peak=arm.rate), active=active)
    grid = arm.grid
    pack = jax.jit(lambda tree: quant.quantize_tree(tree, grid) if grid else tree)
    runs = 0

    def once(rate: float, seed: int) -> dict[str, Any]:
        nonlocal runs
        label = f"{name} {rate:g} {seed}"
        clock = StepClock(bar, runs * config.steps)

        def one() -> dict[str, Any]:
            params = pack(task.init(jax.random.key(seed)))
            state = train.init_state(params, inject(peak=rate))
            held = [wlab.core.bits.size_in_bits(tree) / 8 for tree in state[1:]]
            _, history = kept.fit(
                label,
                step,
                state,
                data.windows(
                    task.tokens, batch=config.batch, length=config.length, seed=seed
                ),
                steps=config.steps,
                every=max(1, config.steps // 40),
                evaluate=task.evaluate,
                evaluate_every=max(1, config.steps // config.evaluations),
                progress=clock,
            )
            return {
                "steps": history["valid_step"],
                "curve": train.bits(history["valid_loss"]),
                "ms": clock.milliseconds(),
                "held": held,
                "count": sum(
                    x.size for _, x in wlab.core.leaves_with_paths(state.params)
                ),
            }

        made = kept.once(label, one)
        runs += 1
        bar(runs * config.steps, {})
        return made

    rates = sorted(arm.rate * factor for factor in config.rates)
    tried = {rate: once(rate, 0) for rate in rates}
    for _ in range(config.further if len(rates) > 1 else 0):
        best, rates = _best(tried), sorted(tried)
        if best == rates[0]:
            rate = best * rates[0] / rates[1]
        elif best == rates[-1]:
            rate = best * rates[-1] / rates[-2]
        else:
            break
        tried[rate] = once(rate, 0)
    best = _best(tried)
    done = [tried[best], *(once(best, seed) for seed in range(1, config.seeds))]
    weights, state = (x / done[0]["count"] for x in done[0]["held"])
    # A run resumed at its very end has no speed of its own.
    speeds = [x["ms"] for x in (*tried.values(), *done) if np.isfinite(x["ms"])]
    return Arm(
        name,
        {
            "bits_per_byte": [x["curve"][-1] for x in done],
            "state": [state],
            "bytes": [weights + state],
            "rate": [best],
        }
        | ({"ms": [float(np.median(speeds))]} if speeds else {}),
        settings={
            "grid": arm.grid,
            "rates": {r: x["curve"][-1] for r, x in tried.items()},
        },
        curves={"bits_per_byte": Curve(done[0]["steps"], [x["curve"] for x in done])},
        baseline=arm.baseline,
    )


def _best(tried: Mapping[float, Mapping[str, Any]]) -> float:
    """The learning rate with the lowest loss; one that diverged is never it."""
    ends = {r: np.nan_to_num(x["curve"][-1], nan=np.inf) for r, x in tried.items()}
    return min(ends, key=ends.__getitem__)


def _schedule(steps: int, peak: Any) -> optax.Schedule:
    """A warm-up over a tenth of the steps, and a cosine down to a tenth of the peak."""
    shape = optax.warmup_cosine_decay_schedule(0.01, 1.0, steps // 10, steps, 0.1)
    return lambda step: peak * shape(step)


def _findings(arms: Mapping[str, Arm]) -> list[Finding]:
    """What each method claims, where its baseline ran as well."""
    out = []

    def compare(name: str, metric: str, base: str, factor: float, text: str) -> None:
        if name in arms and base in arms and metric in arms[name].figures:
            got, limit = arms[name].mean(metric), factor * arms[base].mean(metric)
            out.append(
                Finding(
                    f"{name}: {text}", got <= limit, f"{got:.4g}, limit {limit:.4g}"
                )
            )

    compare("ECO FP8", "bits_per_byte", "AdamW", 1.02, "within 2% of AdamW's loss")
    for kind in ("FRUGAL columns", "FRUGAL blocks"):
        compare(kind, "bits_per_byte", "AdamW", 1.03, "within 3% of AdamW's loss")
        compare(kind, "state", "AdamW", 0.5, "at most half of AdamW's state")
    compare("Drop-Muon", "ms", "Muon", 1.0, "steps cheaper than Muon's")
    compare("Drop-Muon", "bits_per_byte", "AdamW", 1.0, "ends below AdamW")
    compare("LISA", "state", "AdamW", 0.6, "at most 0.6 of AdamW's state")
    compare("LISA", "ms", "AdamW", 1.0, "steps cheaper than AdamW's")
    return out
