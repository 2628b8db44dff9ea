# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""ECO on real text: a language model trained with quantised weights only.

A decoder over bytes is trained from scratch with AdamW. Weights in FP8 have a scale
for each output and go with activations in FP8, as in the paper's pretraining; weights
in INT4 have one scale for each matrix. Each grid is compared with full-precision
master weights under the same quantised forward pass, and with rounding the weights at
every step without any memory of what is lost (arXiv 2601.22101, table 1).
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
import optax

import wlab
from wlab import data, quant, train
from wlab.models.decoder import Decoder, tiny
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
      grids: number grids of the weights; fp8 grids quantise activations too.
      seeds: how many seeds, one after another.
      steps: optimiser steps of each arm.
      batch: sequences in a batch.
      length: tokens (bytes) of a sequence.
      learning_rate: the peak, after a warm-up over a tenth of the steps; a cosine
        then brings it down to a tenth of it.
      weight_decay: of AdamW, for every arm.
      text: pydoc, stdlib or python (both).
      width: of the decoder.
      depth: of the decoder.
      evaluations: how often the held-out text is read.
    """

    grids: tuple[str, ...] = ("fp8_e4m3",)
    seeds: int = 1
    steps: int = 300
    batch: int = 8
    length: int = 128
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    text: str = "python"
    width: int = 96
    depth: int = 3
    evaluations: int = 8


QUICK = Config(steps=12, batch=2, length=32, width=32, depth=1, evaluations=2)

_RULES: dict[str, dict[str, Any]] = {
    "ECO nearest": {"rounding": "nearest", "injection": "paper"},
    "ECO stochastic": {"rounding": "stochastic", "injection": "paper"},
    "naive nearest": {"rounding": "nearest", "injection": "none"},
    "naive stochastic": {"rounding": "stochastic", "injection": "none"},
}


class _Plan(NamedTuple):
    """One arm before it runs."""

    name: str
    grid: str | None  # None: full precision
    rule: str | None  # None: full-precision (master) weights


class _Task(NamedTuple):
    """What the arms of a grid share."""

    loss: train.LossFn
    evaluate: Callable[[Any], Mapping[str, Any]]


def run(
    config: Config,
    *,
    out: pathlib.Path | None = None,
    progress: bool = True,
    resume: bool = False,
) -> Report:
    """Train every arm on the same batches and compare on held-out text.

    Args:
        config: the setting.
        out: where report.json, report.png and the metrics go; None: nowhere.
        progress: whether to show bars on a terminal.
        resume: whether to go on with the run that `out` holds.

    Returns:
        The report.
    """
    plans = _plans(config)
    corpus = data.text(config.text)  # type: ignore[arg-type]
    model = Decoder(
        tiny(width=config.width, depth=config.depth, hidden=4 * config.width)
    )
    held_out = data.valid_windows(
        corpus.valid, batch=config.batch, length=config.length, limit=16
    )
    # Compiled once: the arms of a grid differ in their optimiser only.
    init = jax.jit(lambda key: model.init(key, held_out[0, :, :-1])["params"])

    @functools.cache
    def pack(grid: str) -> Callable[[Any], Any]:
        granularity = wlab.optim.eco_granularity(grid)
        return jax.jit(
            functools.partial(quant.quantize_tree, grid=grid, granularity=granularity)
        )

    @functools.cache
    def task(grid: str | None, master: bool) -> _Task:
        loss = _loss(model, grid, master)
        return _Task(loss, train.make_evaluate(loss, held_out))

    arms = []
    bars = train.Progress(show=None if progress else False)
    with Run("eco", config, out, resume=resume) as kept, bars:
        for plan in plans:

            def start(seed: int, plan: _Plan = plan) -> Any:
                params = init(jax.random.key(seed))
                return params if plan.rule is None else pack(plan.grid)(params)

            arms.append(
                _train(
                    config,
                    plan,
                    task(plan.grid, plan.rule is None),
                    start,
                    corpus.train,
                    bars.add(plan.name, config.steps * config.seeds),
                    kept,
                )
            )
        report = Report(
            recipe="eco",
            title=f"AdamW on {corpus.train.size / 1e6:.1f} MB of {config.text} text, "
            f"{config.steps} steps of {config.batch * config.length} bytes",
            claim=(
                "Without master weights, ECO trains quantised weights nearly as well "
                "as with them, and rounding alone does not."
            ),
            config=dataclasses.asdict(config) | {"digest": corpus.digest},
            seeds=range(config.seeds),
            metrics={
                "bits_per_byte": Metric("held-out loss", "bits per byte", format=".4f"),
                "bytes": Metric("weights and state", "bytes a parameter", format=".2f"),
                "kernel_bytes": Metric(
                    "of the kernels", "bytes a parameter", format=".2f"
                ),
                "ms": Metric("step", "ms", lower_is_better=None, format=".0f"),
            },
            arms=arms,
            started=kept.watch.started,
            seconds=kept.watch.seconds,
            findings=[f for grid in config.grids for f in _findings(grid, arms)],
        )
        if out is not None:
            report.save(out, figure=figure)
    return report


def figure(report: Report) -> "Figure":
    """Held-out loss over training, and at the end against memory."""
    final = [np.mean(arm.figures["bits_per_byte"]) for arm in report.arms]
    starts = [np.mean(arm.curves["bits_per_byte"].values, 0) for arm in report.arms]
    finite = [x for x in final if np.isfinite(x)] or [8.0]
    # From the second reading on: the first would flatten all that follows.
    top = max(
        (float(np.nanmax(x[1:])) for x in starts if len(x) > 2),
        default=float(max(finite)),
    )
    low = float(min(finite))
    return curves_and_tradeoff(
        report,
        curve="bits_per_byte",
        x_metric="bytes",
        y_metric="bits_per_byte",
        y_limits=(low - 0.05 * (top - low), top) if top > low else None,
    )


def _plans(config: Config) -> list[_Plan]:
    """The arms of the comparison; bad grids are told before anything runs."""
    plans = [_Plan("FP32", None, None)]
    if not config.grids or config.seeds < 1 or config.evaluations < 1:
        raise ValueError("grids, seeds and evaluations must not be empty or zero")
    if config.steps < 10:
        raise ValueError(f"steps={config.steps} must be at least 10")
    for grid in config.grids:
        if quant.get_grid(grid).kind == "uint":
            raise ValueError(f"grid {grid} has no sign: take fp8_e4m3, int8 or int4")
        plans.append(_Plan(f"{grid} master weights", grid, None))
        plans.extend(_Plan(f"{grid} {rule}", grid, rule) for rule in _RULES)
    return plans


def _train(
    config: Config,
    plan: _Plan,
    task: _Task,
    start: Callable[[int], Any],
    tokens: np.ndarray,
    bar: Callable[[int, Mapping[str, Any]], None],
    kept: Run,
) -> Arm:
    """One arm over its seeds; the step is compiled once for all of them."""
    tx = _optimizer(config, plan)
    step = train.make_train_step(task.loss, tx)

    def one(name: str, seed: int) -> dict[str, Any]:
        params = start(seed)
        state = train.init_state(params, tx)
        sizes = _sizes(state)
        clock = StepClock(bar, seed * config.steps)
        batches = data.windows(
            tokens, batch=config.batch, length=config.length, seed=seed
        )
        _, history = kept.fit(
            name,
            step,
            state,
            batches,
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
            "sizes": sizes,
        }

    done = []
    for seed in range(config.seeds):
        name = f"{plan.name} {seed}"
        done.append(kept.once(name, functools.partial(one, name, seed)))
        bar((seed + 1) * config.steps, {})
    curves = [run["curve"] for run in done]
    # A seed resumed at its very end has no speed of its own.
    speeds = [run["ms"] for run in done if np.isfinite(run["ms"])]
    if 0 < len(speeds) < len(done):
        speeds = [float(np.median(speeds))]
    return Arm(
        plan.name,
        {"bits_per_byte": [curve[-1] for curve in curves]}
        | ({"ms": speeds} if speeds else {})
        | {name: [size] for name, size in done[-1]["sizes"].items()},
        settings={"grid": plan.grid, **(_RULES[plan.rule] if plan.rule else {})},
        curves={"bits_per_byte": Curve(done[-1]["steps"], curves)},
        baseline=plan.rule is not None and plan.rule.startswith("naive"),
    )


def _loss(model: Decoder, grid: str | None, master: bool) -> train.LossFn:
    """The next-token loss under a quantised forward pass."""
    apply = wlab.lift(lambda params, tokens: model.apply({"params": params}, tokens))

    def loss(params: Any, batch: jax.Array) -> jax.Array:
        if grid is not None and master:
            granularity = wlab.optim.eco_granularity(grid)
            params = quant.fake_quantize_tree(params, grid, granularity=granularity)
        if grid is not None and grid.startswith("fp8"):
            params = quant.quantize_activations(params, grid)
        logits: Any = apply(params, batch[:, :-1])
        return train.next_token_loss(logits, batch)

    return loss


def _optimizer(config: Config, plan: _Plan) -> optax.GradientTransformation:
    """AdamW as in the paper, with or without ECO."""
    peak = config.learning_rate
    schedule = optax.warmup_cosine_decay_schedule(
        0.01 * peak, peak, config.steps // 10, config.steps, 0.1 * peak
    )
    rates = {"b1": 0.9, "b2": 0.98, "eps": 1e-9, "weight_decay": config.weight_decay}
    if plan.rule is None:
        tx = optax.adamw(schedule, **rates)
    else:
        assert plan.grid is not None
        tx = wlab.optim.eco(
            schedule,
            **rates,
            grid=plan.grid,
            **_RULES[plan.rule],
        )
    return optax.chain(optax.clip_by_global_norm(1.0), tx)


def _sizes(state: train.TrainState) -> dict[str, float]:
    """Bytes a parameter of what is kept between steps: of all, and of the kernels."""
    leaves = wlab.core.leaves_with_paths(state.params)
    count = sum(leaf.size for _, leaf in leaves)
    bits = wlab.core.bits.size_in_bits((state.params, state.opt_state))
    kernels = [leaf for path, leaf in leaves if path.endswith("kernel")]
    elements = sum(leaf.size for leaf in kernels)
    # Two moments in float32 beside each weight, in every arm.
    held = wlab.core.bits.size_in_bits(kernels) + 64 * elements
    return {"bytes": bits / 8 / count, "kernel_bytes": held / 8 / elements}


def _findings(grid: str, arms: list[Arm]) -> list[Finding]:
    """What the paper claims, beside what this run shows."""
    loss = {arm.name: arm.mean("bits_per_byte") for arm in arms}
    master = loss[f"{grid} master weights"]
    eco_near, eco_sr, naive_near, naive_sr = (loss[f"{grid} {rule}"] for rule in _RULES)
    gap, naive_gap = eco_sr - master, naive_sr - master
    out = [
        Finding(
            f"{grid}: ECO stochastic ends below naive stochastic",
            eco_sr < naive_sr,
            f"{eco_sr:.4f} against {naive_sr:.4f}",
        ),
        Finding(
            f"{grid}: its distance to master weights is at most 0.75 of the naive one",
            gap <= 0.75 * naive_gap,
            f"{gap:+.4f} against {naive_gap:+.4f}",
        ),
    ]
    if grid.startswith("fp8"):
        out.append(
            Finding(
                f"{grid}: ECO nearest ends at least 0.1 below naive nearest",
                eco_near <= naive_near - 0.1,
                f"{eco_near:.4f} against {naive_near:.4f}",
            )
        )
    return out
