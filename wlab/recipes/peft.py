# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""All adapters side by side, at two equal budgets of trained numbers.

A decoder over bytes learns the source files of Python's library, and is then adapted to
pydoc's topics by every method, each at the best of its learning rates. What is compared
is the loss on the new text, the loss on the old one (what is forgotten), the numbers
that are trained, the optimiser's bytes, the time of a step and its temporaries.
"""

import dataclasses
import functools
import pathlib
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from wlab import data, peft, train
from wlab.core import Reparam, bits, lift
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
    """A small decoder and how it is adapted.

    Attributes:
      only: names of the arms to run, in any case, or parts of them; () for all.
      source: text of the base: pydoc, stdlib or python (both).
      target: text that it is adapted to.
      width: of the decoder; a multiple of 64.
      depth: of the decoder.
      base_steps: steps of AdamW on the source.
      base_batch: sequences in a batch of the base.
      steps: of Adam on the target.
      batch: sequences in a batch.
      length: bytes of a sequence.
      rates: learning rates that are tried, as multiples of each arm's own.
      evaluations: how often the held-out target is read.
      seeds: how many adapters of each arm.
    """

    only: tuple[str, ...] = ()
    source: Literal["pydoc", "stdlib", "python"] = "stdlib"
    target: Literal["pydoc", "stdlib", "python"] = "pydoc"
    width: int = 64
    depth: int = 4
    base_steps: int = 1500
    base_batch: int = 16
    steps: int = 200
    batch: int = 8
    length: int = 64
    rates: tuple[float, ...] = (0.3, 1.0, 3.0)
    evaluations: int = 5
    seeds: int = 2


QUICK = Config(
    only=("Bone r=4",),
    depth=1,
    base_steps=20,
    base_batch=4,
    steps=10,
    batch=4,
    length=32,
    rates=(1.0,),
    evaluations=2,
    seeds=1,
)


class _Side(NamedTuple):
    method: Reparam
    rate: float
    budget: str = ""
    part: float = 0.0  # of the layers in each step; 0: all in all steps
    baseline: bool = False


def run(
    config: Config,
    *,
    out: pathlib.Path | None = None,
    progress: bool = True,
    resume: bool = False,
) -> Report:
    """Train the base, adapt it by every method, compare.

    Args:
      config: the setting.
      out: where report.json and report.png go; None: nowhere.
      progress: whether to show a bar on a terminal.
      resume: whether to go on with the run that `out` holds.

    Returns:
      The report.
    """
    if config.width % 64 or not config.rates or config.seeds < 1:
        raise ValueError(
            f"width={config.width} is a multiple of 64, rates={config.rates} are not "
            f"empty and seeds={config.seeds} is positive"
        )
    sides = _chosen(config)
    bars = train.Progress(show=None if progress else False)
    with Run("peft", config, out, resume=resume) as kept, bars:
        task = _task(config, kept, bars)
        runs = len(config.rates) + config.seeds - 1
        arms = [_before(task)] + [
            _adapt(task, name, side, bars.add(name, runs * config.steps), kept)
            for name, side in sides.items()
        ]
        report = Report(
            recipe="peft",
            title=f"From {config.source} to {config.target} text in {config.steps} "
            f"steps of {config.batch * config.length} bytes",
            claim=(
                "Few numbers, placed well, adapt a model nearly as well as all of "
                "them, and forget less."
            ),
            config=dataclasses.asdict(config),
            seeds=range(config.seeds),
            metrics={
                "target": Metric("new text", "bits per byte", format=".3f"),
                "source": Metric("old text", "bits per byte", format=".3f"),
                "trained": Metric("trained numbers", "", None, ",.0f"),
                "state": Metric("optimiser", "kB", format=".0f"),
                "ms": Metric("step", "ms", format=".1f"),
                "temporaries": Metric("temporaries", "MB", format=".1f"),
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
    """The loss on the new text over training, and against what is forgotten."""
    return curves_and_tradeoff(
        report, curve="target", x_metric="source", y_metric="target"
    )


def _findings(arms: dict[str, Arm]) -> list[Finding]:
    out = []
    full = arms.get("full fine-tuning")
    before = arms["before"]
    for name, arm in arms.items():
        if full is None or arm in (full, before):
            continue
        gain = before.mean("target") - arm.mean("target")
        most = before.mean("target") - full.mean("target")
        kept = arm.mean("source") < full.mean("source")
        out.append(
            Finding(
                f"{name}: at least 0.7 of what full fine-tuning gains, and less is "
                "forgotten",
                gain >= 0.7 * most and kept,
                f"{gain / most:.2f} of the gain; old text {arm.mean('source'):.3f} "
                f"against {full.mean('source'):.3f}",
            )
        )
    return out


def _chosen(config: Config) -> dict[str, _Side]:
    sides = _sides(config)
    wanted = [part.lower() for part in config.only]
    for part in wanted:
        if not any(part in name.lower() for name in sides):
            raise ValueError(f"no arm is named {part!r}: there are {', '.join(sides)}")
    return {
        name: side
        for name, side in sides.items()
        if not wanted or any(part in name.lower() for part in wanted)
    }


def _sides(config: Config) -> dict[str, _Side]:
    """Every method, at about the numbers of LoRA with rank 2 and with rank 8."""
    small: dict[str, tuple[Reparam, float]] = {
        "LoRA r=2": (peft.lora(2), 1e-2),
        "DoRA r=2": (peft.lora(2, dora=True), 1e-2),
        "PiSSA r=2": (peft.lora(2, start="pissa"), 3e-3),
        "Bone r=4": (peft.bone(4), 3e-3),
        "Bat r=4": (peft.bone(4, variant="bat"), 3e-3),
        "HUT r=2": (peft.hut(2, affine=False, start="normal"), 1e-2),
        "TeRA": (peft.tera(ranks=2.0), 3e-2),
        "RandLoRA r=8": (peft.randlora(8, alpha=8), 1e-2),
        "WaRA r=4": (peft.wara(4), 1e-2),
        "S2FT 10 %": (peft.s2ft(0.1), 3e-3),
        "SNELL q=2": (peft.snella(2, kernel="distance"), 1e-2),
    }
    large: dict[str, tuple[Reparam, float]] = {
        "LoRA r=8": (peft.lora(8), 1e-2),
        "DoRA r=8": (peft.lora(8, dora=True), 1e-2),
        "PiSSA r=8": (peft.lora(8, start="pissa"), 3e-3),
        "Bone r=16": (peft.bone(16), 3e-3),
        "Bat r=16": (peft.bone(16, variant="bat"), 3e-3),
        "HUT r=8": (peft.hut(8, affine=False, start="normal", scale=8**-0.5), 1e-2),
        "RandLoRA r=2": (peft.randlora(2, alpha=2), 1e-2),
        "WaRA r=16": (peft.wara(16), 1e-2),
        "S2FT 60 %": (peft.s2ft(0.6), 3e-3),
        "SNELL q=8": (peft.snella(8, kernel="distance"), 1e-2),
    }
    out = {"full fine-tuning": _Side(peft.full("*"), 1e-3, baseline=True)}
    for budget, found in (("small", small), ("large", large)):
        out |= {
            name: _Side(method, rate, budget, baseline=name.startswith("LoRA"))
            for name, (method, rate) in found.items()
        }
    part = max(1, config.depth // 4) / config.depth
    out["IST, LoRA r=8"] = _Side(peft.lora(8), 1e-2, "large", part)
    return out


class _Task(NamedTuple):
    config: Config
    model: Decoder
    base: Any
    tokens: np.ndarray  # of the target
    held_out: tuple[jax.Array, jax.Array]  # of the target and of the source


def _shape(config: Config) -> DecoderConfig:
    return tiny(
        width=config.width,
        depth=config.depth,
        hidden=4 * config.width,
        heads=4,
        kv_heads=2,
        head_dim=config.width // 4,
        scan=True,
    )


def _loss(model: Decoder, params: Any, batch: jax.Array) -> jax.Array:
    logits: Any = lift(model.apply)({"params": params}, batch[:, :-1])
    return train.next_token_loss(logits, batch)


def _task(config: Config, kept: Run, bars: train.Progress) -> _Task:
    """The base, trained once and kept with the run."""
    model = Decoder(_shape(config))
    old, new = data.text(config.source), data.text(config.target)
    held_out = tuple(
        jnp.asarray(
            data.valid_windows(text.valid, batch=16, length=config.length, limit=8)
        )
        for text in (new, old)
    )
    loss = functools.partial(_loss, model)
    rate = optax.warmup_cosine_decay_schedule(
        0.0, 3e-3, max(1, config.base_steps // 20), config.base_steps
    )
    tx = optax.adamw(rate)
    begin = jnp.zeros((1, config.length), jnp.int32)
    params = jax.jit(model.init)(jax.random.key(0), begin)["params"]
    state, _ = kept.fit(
        "base",
        train.make_train_step(loss, tx),
        train.init_state(params, tx),
        data.windows(old.train, batch=config.base_batch, length=config.length, seed=0),
        steps=config.base_steps,
        every=max(1, config.base_steps // 20),
        progress=bars.add("base", config.base_steps),
    )
    return _Task(config, model, jax.device_get(state.params), new.train, held_out)  # type: ignore[arg-type]


def _bits(task: _Task, tree: Any) -> tuple[Any, Any]:
    """Bits per byte on the held-out target and source."""

    def read(tokens: jax.Array) -> jax.Array:
        losses = jax.lax.map(lambda batch: _loss(task.model, tree, batch), tokens)
        return losses.mean() / jnp.log(2.0)

    return read(task.held_out[0]), read(task.held_out[1])


def _before(task: _Task) -> Arm:
    target, source = jax.device_get(jax.jit(lambda b: _bits(task, b))(task.base))
    return Arm("before", {"target": [target], "source": [source]}, baseline=True)


def _adapt(task: _Task, name: str, side: _Side, bar: Any, kept: Run) -> Arm:
    """The best learning rate on the first seed, and the other seeds with it."""
    config, method = task.config, side.method
    runs = 0

    def make(rate: Any) -> Any:
        inner = optax.adam(rate)
        if side.part:
            return peft.ist(inner, side.part, select="blocks/*")
        return inner

    def once(rate: float, seed: int) -> dict[str, Any]:
        nonlocal runs
        clock = StepClock(bar, runs * config.steps)
        label = f"{name} {rate:g} {seed}"

        def one() -> dict[str, Any]:
            adapter = method.init(jax.random.key(seed), task.base)
            tx = make(rate)

            def tree_of(trained: Any) -> Any:
                return method.attach(adapter._replace(train=trained), task.base)

            def loss(trained: Any, batch: jax.Array) -> jax.Array:
                return _loss(task.model, tree_of(trained), batch)

            def evaluate(trained: Any) -> dict[str, Any]:
                target, source = _bits(task, tree_of(trained))
                return {"target": target, "source": source}

            state = train.init_state(adapter.train, tx)
            held = bits.size_in_bits(state.opt_state) / 8
            batch = jnp.zeros((config.batch, config.length + 1), jnp.int32)
            compiled = jax.jit(jax.grad(loss)).lower(adapter.train, batch).compile()
            memory: Any = compiled.memory_analysis()
            _, history = kept.fit(
                label,
                train.make_train_step(loss, tx),
                state,
                data.windows(
                    task.tokens, batch=config.batch, length=config.length, seed=seed
                ),
                steps=config.steps,
                every=max(1, config.steps // 20),
                evaluate=jax.jit(evaluate),
                evaluate_every=max(1, config.steps // config.evaluations),
                progress=clock,
            )
            return {
                "steps": history["valid_step"],
                "target": history["valid_target"],
                "source": history["valid_source"][-1],
                "trained": sum(x.size for x in jax.tree.leaves(adapter.train)),
                "state": held / 1e3,
                "ms": clock.milliseconds(),
                "temporaries": memory.temp_size_in_bytes / 1e6,
            }

        made = kept.once(label, one)
        runs += 1
        return made

    rates = [side.rate * factor for factor in config.rates]
    tried = {rate: once(rate, 0) for rate in rates}
    best = min(tried, key=lambda rate: _finite(tried[rate]["target"][-1]))
    made = [tried[best], *(once(best, seed) for seed in range(1, config.seeds))]
    figures = {
        key: [x[key] for x in made]
        for key in ("source", "trained", "state", "ms", "temporaries")
    }
    figures["target"] = [x["target"][-1] for x in made]
    for key in ("trained", "state", "temporaries"):
        figures[key] = figures[key][:1]
    return Arm(
        name,
        figures,
        settings={"rate": best, "budget": side.budget},
        curves={"target": Curve(made[0]["steps"], [x["target"] for x in made])},
        baseline=side.baseline,
    )


def _finite(x: float) -> float:
    return x if np.isfinite(x) else np.inf
