# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Compressed decoders, for the recipes that hold several methods against each other.

A decoder over bytes is trained on Python's sources and documentation until it knows
them far better than the frequencies of bytes do. Every arm compresses the kernels of
its blocks with the same sequences for calibration; what is compared is the loss on text
that neither training nor calibration has seen, against the bits that are stored.
"""

import dataclasses
import functools
import math
import pathlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from wlab import data, quant, train
from wlab.core import Layered, describe, materialise
from wlab.models import from_hf, layered
from wlab.models.decoder import Decoder, DecoderConfig, tiny
from wlab.recipes import Arm, Finding, Metric, Report, Run
from wlab.recipes._figures import styles

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METRICS = {
    "loss": Metric("held-out text", "bits per byte", format=".4f"),
    "lost": Metric("lost", "bits per byte", format=".4f"),
    "size": Metric("size", "bits per weight", format=".2f"),
    "error": Metric("error of outputs", "%", format=".3f"),
    "seconds": Metric("time", "s", format=".1f"),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """A decoder, and how it is compressed.

    Attributes:
      only: names of the arms to run, in any case, or parts of them; () for all.
      text: what the decoder learns: pydoc, stdlib or python (both).
      width: of the decoder; a multiple of 32.
      depth: of the decoder.
      base_steps: steps of AdamW on the text.
      base_batch: sequences in a step.
      length: bytes of a sequence.
      calibration: sequences of the training text that methods see; a multiple of 8.
      bits: of a weight, for each arm in turn.
      group: input channels that share a range.
      kernels: of a block, those that are compressed; () for all. For GPTQ and its kin.
      seeds: how many decoders, each with its own calibration sequences.
      bases: the folder ``models`` of an earlier run with the same decoders, which are
        not trained again; "" for none.
    """

    only: tuple[str, ...] = ()
    text: Literal["pydoc", "stdlib", "python"] = "python"
    width: int = 128
    depth: int = 4
    base_steps: int = 800
    base_batch: int = 16
    length: int = 128
    calibration: int = 64
    bits: tuple[int, ...] = (2, 3, 4)
    group: int = 32
    kernels: tuple[str, ...] = ()
    seeds: int = 3
    bases: str = ""


BRIEF = Config(
    width=32,
    depth=2,
    base_steps=10,
    base_batch=4,
    length=32,
    calibration=8,
    bits=(3,),
    group=16,
    kernels=("mlp/down/kernel",),
    seeds=1,
)


class Base(NamedTuple):
    """A trained decoder and what methods may look at."""

    model: Decoder
    params: Any
    calibration: np.ndarray  # int32 [steps, 8, length]
    held_out: jax.Array  # int32 [steps, batch, length + 1]
    seed: int
    kernels: Sequence[str] | None = None  # of a block, that are compressed; None: all


class Side(NamedTuple):
    """A method, as a function of a decoder, bits and the channels of a group.

    It returns the compressed parameters, which may hold structured weights, and, by
    name, figures of its own; and the decoder that reads them, if that is another.
    """

    name: str
    make: Callable[[Base, int, int], tuple[Any, ...]]
    bits: Sequence[int] | None = None  # those that it has; None: the config's
    baseline: bool = False


def parts_of(base: Base, model: Decoder | None = None) -> Layered:
    """The decoder in the parts that `wlab.quant.calibrate` takes."""

    def loss(logits: jax.Array, batch: Any) -> jax.Array:
        del batch
        return jnp.mean(logits)

    return layered(model or base.model, loss, inputs=lambda tokens: tokens)


def error_of(errors: Sequence[Any]) -> dict[str, float]:
    """The mean over kernels of what is lost of their outputs, in percent."""
    return {"error": 100 * float(np.mean([e.error for e in errors]))}


def shape(config: Config) -> DecoderConfig:
    """The decoder's config."""
    return tiny(
        width=config.width,
        depth=config.depth,
        hidden=4 * config.width,
        heads=4,
        kv_heads=2,
        head_dim=config.width // 4,
        scan=True,
        remat=False,
    )


def train_base(config: Config, seed: int, kept: Run, bar: Any) -> Base:
    """One decoder; from its checkpoint where the run goes on."""
    model = Decoder(shape(config))
    text = data.text(config.text)
    name = f"base {seed}"
    if config.bases:
        params = _found(model, pathlib.Path(config.bases, f"base-{seed}"))
        bar(config.base_steps, {})
    else:
        params = _trained(
            config, seed, model, text.train, functools.partial(kept.fit, name), bar
        )
    kept.save_model(name, model, params)
    # Other windows than those of training: the order of another seed.
    fresh = data.windows(text.train, batch=8, length=config.length, seed=1000 + seed)
    rows = iter(fresh)
    calibration = [next(rows)[:, :-1] for _ in range(config.calibration // 8)]
    held_out = data.valid_windows(text.valid, batch=16, length=config.length, limit=16)
    return Base(
        model,
        jax.device_get(params),
        np.stack(calibration),
        jnp.asarray(held_out),
        seed,
        config.kernels or None,
    )


def _trained(
    config: Config, seed: int, model: Decoder, text: Any, fit: Any, bar: Any
) -> Any:
    """The parameters after AdamW on the text."""
    rate = optax.warmup_cosine_decay_schedule(
        0.0, 3e-3, max(1, config.base_steps // 20), config.base_steps
    )
    tx = optax.adamw(rate)

    def loss(params: Any, batch: jax.Array) -> jax.Array:
        logits: Any = model.apply({"params": params}, batch[:, :-1])
        return train.next_token_loss(logits, batch)

    begin = jnp.zeros((1, config.length), jnp.int32)
    params = jax.jit(model.init)(jax.random.key(seed), begin)["params"]
    size = {"batch": config.base_batch, "length": config.length}
    state, _ = fit(
        train.make_train_step(loss, tx),
        train.init_state(params, tx),
        data.windows(text, seed=seed, **size),
        steps=config.base_steps,
        every=max(1, config.base_steps // 20),
        progress=bar,
    )
    return state.params


def _found(model: Decoder, folder: pathlib.Path) -> Any:
    """The parameters that an earlier run has left."""
    other, params = from_hf(folder, scan=True)
    names = ("vocab", "width", "depth", "heads", "kv_heads", "head_dim", "hidden")
    differ = [
        f"{name}={theirs} there and {ours} here"
        for name in names
        if (theirs := getattr(other.config, name))
        != (ours := getattr(model.config, name))
    ]
    if differ:
        raise ValueError(
            f"bases: {folder} is another decoder: {', '.join(differ)}; give the "
            "setting of that run"
        )
    return params


def held_out_loss(base: Base, params: Any, model: Decoder | None = None) -> float:
    """Bits per byte on the held-out text."""
    return float(_evaluate(model or base.model)(materialise(params), base.held_out))


def _evaluate(model: Decoder) -> Any:
    if model not in _PROGRAMS:

        def read(params: Any, tokens: jax.Array) -> jax.Array:
            def one(batch: jax.Array) -> jax.Array:
                logits: Any = model.apply({"params": params}, batch[:, :-1])
                return train.next_token_loss(logits, batch)

            return jax.lax.map(one, tokens).mean() / jnp.log(2.0)

        _PROGRAMS[model] = jax.jit(read)
    return _PROGRAMS[model]


_PROGRAMS: dict[Decoder, Any] = {}  # one compiled program for all arms


def size_of(params: Any) -> float:
    """Bits for each weight of the blocks' kernels, scales and all."""
    known = {leaf.path: leaf for leaf in describe(params)}
    kernels = [p for p in known if p.startswith("blocks") and p.endswith("kernel")]
    return quant.bits_per_weight(params, kernels)


def arms_of(
    sides: Sequence[Side], config: Config, kept: Run, bars: train.Progress
) -> list[Arm]:
    """Every side at every number of bits, for every seed; the first is the whole."""
    jobs = [(side, b) for side in sides for b in (side.bits or config.bits)]
    named = [(side, b, f"{side.name}, {b} bits") for side, b in jobs]
    wanted = [part.lower() for part in config.only]
    for part in wanted:
        if not any(part in name.lower() for *_, name in named):
            raise ValueError(
                f"no arm is named {part!r}: there are "
                + ", ".join(name for *_, name in named)
            )
    named = [
        (side, b, name)
        for side, b, name in named
        if not wanted or any(part in name.lower() for part in wanted)
    ]
    figures: dict[str, list[dict[str, Any]]] = {name: [] for *_, name in named}
    whole: list[dict[str, Any]] = []
    for seed in range(config.seeds):
        bar = bars.add(f"base {seed}", config.base_steps)
        base: Base | None = None

        def get(seed: int = seed, bar: Any = bar) -> Base:
            nonlocal base
            if base is None:
                base = train_base(config, seed, kept, bar)
            return base

        def uncompressed() -> dict[str, Any]:
            base = get()
            return {
                "loss": held_out_loss(base, base.params),
                "size": size_of(base.params),
            }

        # The base is trained again by whoever goes on with the run and needs it.
        whole.append(kept.once(f"whole {seed}", uncompressed))
        bar = bars.add(f"compress {seed}", len(named))
        for done, (side, b, name) in enumerate(named, 1):

            def one(side: Side = side, b: int = b) -> dict[str, Any]:
                base = get()
                start = time.perf_counter()
                tree, own, *other = side.make(base, b, config.group)
                jax.block_until_ready(tree)
                seconds = time.perf_counter() - start
                return {
                    "loss": held_out_loss(base, tree, *other),
                    "size": size_of(tree),
                    "seconds": seconds,
                } | own

            made = kept.once(f"{name} {seed}", one)
            made["lost"] = made["loss"] - whole[-1]["loss"]
            figures[name].append(made)
            bar(done, {"loss": made["loss"]})
    out = [_arm("uncompressed", whole, None, True)]
    for side, _, name in named:
        out.append(_arm(name, figures[name], side, side.baseline))
    return out


def _arm(name: str, made: Sequence[Any], side: Side | None, baseline: bool) -> Arm:
    figures = {key: [x[key] for x in made] for key in made[0]}
    if len(set(figures["size"])) == 1:
        figures["size"] = figures["size"][:1]
    method = name if side is None else side.name
    return Arm(name, figures, settings={"method": method}, baseline=baseline)


def report_of(
    recipe: str,
    claim: str,
    config: Any,
    sides: Sequence[Side],
    findings: Callable[[Mapping[str, Arm]], Iterable[Finding | None]],
    *,
    out: pathlib.Path | None,
    progress: bool,
    resume: bool,
    metrics: Mapping[str, Metric] | None = None,
) -> Report:
    """Runs the sides and puts them into a report; the common part of these recipes."""
    if config.width % 32 or config.seeds < 1 or config.calibration % 8:
        raise ValueError(
            f"width={config.width} is a multiple of 32, "
            f"calibration={config.calibration} of 8, and seeds={config.seeds} positive"
        )
    known = METRICS | dict(metrics or {})
    bars = train.Progress(show=None if progress else False)
    with Run(recipe, config, out, resume=resume) as kept, bars:
        arms = arms_of(sides, config, kept, bars)
        used = {name for arm in arms for name in arm.figures}
        report = Report(
            recipe=recipe,
            title=f"A decoder of {_millions(config)} over bytes, compressed after "
            f"training with {config.calibration} sequences of {config.length}",
            claim=claim,
            config=dataclasses.asdict(config),
            seeds=range(config.seeds),
            metrics={name: m for name, m in known.items() if name in used},
            arms=arms,
            started=kept.watch.started,
            seconds=kept.watch.seconds,
            findings=[x for x in findings({a.name: a for a in arms}) if x is not None],
        )
        if out is not None:
            report.save(out, figure=figure)
    return report


def _millions(config: Config) -> str:
    c = shape(config)
    block = c.width * c.head_dim * 2 * (c.heads + c.kv_heads) + 3 * c.width * c.hidden
    return f"{(c.depth * block + c.vocab * c.width) / 1e6:.1f} M weights"


def below(
    statement: str,
    arms: Mapping[str, Arm],
    metric: str,
    ours: str,
    theirs: str,
    factor: float = 1.0,
) -> Finding | None:
    """Whether a figure is below a factor of another arm's; None if one is absent."""
    if not {ours, theirs} <= set(arms):
        return None
    a, b = arms[ours].mean(metric), arms[theirs].mean(metric)
    ratio = a / b if b else math.nan
    return Finding(
        statement, a <= factor * b, f"{a:.4g} against {b:.4g}, a ratio of {ratio:.3f}"
    )


def figure(report: Report) -> "Figure":
    """What is lost against the bits of a weight, one line for each method."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    out = Figure(figsize=(11, 7), dpi=100, layout="constrained")
    FigureCanvasAgg(out)
    axes = out.subplots()
    out.suptitle(report.title, fontsize=15)
    whole, *arms = report.arms
    lines: dict[str, list[Arm]] = {}
    for arm in arms:
        lines.setdefault(str(arm.settings["method"]), []).append(arm)
    look = styles(
        dataclasses.replace(report, arms=[rows[0] for rows in lines.values()])
    )
    for method, rows in lines.items():
        rows = sorted(rows, key=lambda arm: arm.mean("size"))
        x = [arm.mean("size") for arm in rows]
        y = [arm.mean("loss") for arm in rows]
        seeds = np.array([arm.figures["loss"] for arm in rows])
        style: Any = look[rows[0].name]
        axes.plot(x, y, label=method, markersize=8, linewidth=2, **style)
        axes.fill_between(
            x, seeds.min(1), seeds.max(1), color=style["color"], alpha=0.12, linewidth=0
        )
    axes.axhline(whole.mean("loss"), color="0.4", linestyle=":", label=whole.name)
    axes.set_xlabel(report.metrics["size"].title, fontsize=13)
    axes.set_ylabel(report.metrics["loss"].title, fontsize=13)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:.2f}")
    axes.yaxis.set_minor_formatter("{x:.2f}")
    axes.grid(alpha=0.25, which="both")
    axes.tick_params(labelsize=12, which="both")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=12, frameon=False)
    return out
