# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""QuantLRM against AWQ and rounding to nearest, on a decoder that was fine-tuned.

A decoder that has learnt Python's sources is fine-tuned on its documentation, in steps
so small that many weights, which are stored in bfloat16, stay what they were. What
moved and what did not takes the place of the activations in AWQ's search
(arXiv 2602.02581).

The thought behind it, that the channels with the smallest and the largest updates both
matter more than those between, is tried by itself: some channels of each kernel are
left as they are and the others rounded.
"""

import dataclasses
import functools
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from wlab import data, train
from wlab.core import as_matrices, describe, from_matrices, is_weight, map_with_path
from wlab.quant import MinMax, quantlrm_model, update_sizes
from wlab.recipes import Arm, Finding, Metric, Report, Run
from wlab.recipes import _compress as compress
from wlab.recipes._compress import Base, below, held_out_loss, size_of
from wlab.recipes.awq import awq, block_error, groups_of, rounded

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["QUICK", "Config", "figure", "run"]


@dataclasses.dataclass(frozen=True)
class Config(compress.Config):
    """A decoder, how it is fine-tuned and how it is compressed.

    Attributes:
      only: names of the arms to run, in any case, or parts of them; () for all.
      text: what the decoder learns first: pydoc, stdlib or python (both).
      width: of the decoder; a multiple of 32.
      depth: of the decoder.
      base_steps: steps of AdamW on that text.
      base_batch: sequences in a step.
      length: bytes of a sequence.
      calibration: sequences of pydoc that methods see; a multiple of 8.
      bits: of a weight, for each arm in turn.
      group: input channels that share a range.
      seeds: how many decoders, each with its own calibration sequences.
      tune_steps: steps of Adam on pydoc.
      tune_rate: their learning rate; so small that 20 to 80 % of the weights keep
        their value in bfloat16.
      kept: the share of channels that are not rounded, where some are kept.
    """

    text: Any = "stdlib"
    base_steps: int = 600
    base_batch: int = 8
    bits: tuple[int, ...] = (3,)
    tune_steps: int = 100
    tune_rate: float = 5e-6
    kept: float = 0.1


_BRIEF: Any = dataclasses.asdict(compress.BRIEF)
QUICK = dataclasses.replace(
    Config(**_BRIEF),
    only=("RTN, 3 bits", "QuantLRM"),
    text="pydoc",
    tune_steps=2,
    tune_rate=1e-4,
)

_KEPT = ("smallest", "largest", "middle", "both ends")

METRICS = {
    "loss": compress.METRICS["loss"],
    "lost": compress.METRICS["lost"],
    "size": compress.METRICS["size"],
    "block": Metric("error of a block", "%", format=".3f"),
    "zeros": Metric("updates of zero", "%", lower_is_better=None, format=".1f"),
    "seconds": compress.METRICS["seconds"],
}


class _Tuned(NamedTuple):
    """A fine-tuned decoder, and what it was."""

    now: Base  # with parameters as they are stored, and data of the new text
    before: Any


def run(
    config: Config,
    *,
    out: pathlib.Path | None = None,
    progress: bool = True,
    resume: bool = False,
) -> Report:
    """Train decoders, fine-tune them, compress them in every way, compare.

    Args:
      config: the setting.
      out: where report.json and report.png go; None: nowhere.
      progress: whether to show a bar on a terminal.
      resume: whether to go on with the run that `out` holds.

    Returns:
      The report.
    """
    if config.width % 32 or config.seeds < 1 or config.calibration % 8:
        raise ValueError(
            f"width={config.width} is a multiple of 32, "
            f"calibration={config.calibration} of 8, and seeds={config.seeds} positive"
        )
    if not 0 < config.kept < 1:
        raise ValueError(f"kept={config.kept} is a share of channels, between 0 and 1")
    sides = _sides(config)
    bars = train.Progress(show=None if progress else False)
    figures: dict[str, list[dict[str, Any]]] = {}
    with Run("quantlrm", config, out, resume=resume) as kept, bars:
        for seed in range(config.seeds):
            for name, made in _seed(config, seed, sides, kept, bars).items():
                figures.setdefault(name, []).append(made)
        arms = [
            Arm(
                name,
                {key: [x[key] for x in made] for key in made[0]},
                baseline=name.startswith(("before", "fine-tuned", "RTN, ", "AWQ")),
            )
            for name, made in figures.items()
        ]
        report = Report(
            recipe="quantlrm",
            title="A decoder over bytes that was fine-tuned in small steps, compressed",
            claim="Both the smallest and the largest updates of fine-tuning mark the "
            "channels that matter, and guide a search better than activations do.",
            config=dataclasses.asdict(config),
            seeds=range(config.seeds),
            metrics=METRICS,
            arms=arms,
            started=kept.watch.started,
            seconds=kept.watch.seconds,
            findings=_findings(config, {arm.name: arm for arm in arms}),
        )
        if out is not None:
            report.save(out, figure=figure)
    return report


def figure(report: Report) -> "Figure":
    """What each arm loses: its seeds as points, their mean as a line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    out = Figure(figsize=(11, 6), dpi=100, layout="constrained")
    FigureCanvasAgg(out)
    axes = out.subplots()
    out.suptitle(report.title, fontsize=15)
    arms = [arm for arm in report.arms if "lost" in arm.figures][::-1]
    for row, arm in enumerate(arms):
        lost = arm.figures["lost"]
        colour = "#0072B2" if arm.name.startswith("QuantLRM") else "0.35"
        axes.plot(lost, [row] * len(lost), "o", color=colour, markersize=7, alpha=0.6)
        axes.plot(arm.mean("lost"), row, "|", color=colour, markersize=26, mew=3)
    axes.set_yticks(range(len(arms)), [arm.name for arm in arms])
    lost = report.metrics["lost"]
    axes.set_xlabel(f"{lost.title} of the fine-tuned decoder", fontsize=13)
    axes.axvline(0, color="0.4", linestyle=":")
    axes.set_ylim(-0.6, len(arms) - 0.4)
    axes.grid(alpha=0.25)
    axes.tick_params(labelsize=12)
    axes.spines[["top", "right"]].set_visible(False)
    return out


def _findings(config: Config, arms: Mapping[str, Arm]) -> Sequence[Finding]:
    zeros = arms["fine-tuned"].figures["zeros"]
    found: list[Finding | None] = [
        Finding(
            "20 to 80 % of the updates are exactly zero",
            all(20 <= x <= 80 for x in zeros),
            ", ".join(f"{x:.1f} %" for x in zeros),
        )
    ]
    for b in config.bits:
        ours, ends = f"QuantLRM, {b} bits", _kept_name(config, "both ends", b)
        middle = _kept_name(config, "middle", b)
        for name in (f"RTN, {b} bits", f"AWQ, {b} bits"):
            claim = f"QuantLRM loses no more than {name}"
            found.append(below(claim, arms, "lost", ours, name))
        claim = f"{b} bits: keeping both ends loses no more than keeping the middle"
        if (one := below(claim, arms, "lost", ends, middle)) is not None:
            seeds = zip(*(arms[x].figures["lost"] for x in (ends, middle)), strict=True)
            agree = [a <= b for a, b in seeds]
            text = f"{one.figures}; in {sum(agree)} of {len(agree)} seeds"
            found.append(dataclasses.replace(one, figures=text))
    return [x for x in found if x is not None]


# --- Decoders ---------------------------------------------------------------------


def _seed(
    config: Config, seed: int, sides: Mapping[str, Any], kept: Run, bars: train.Progress
) -> dict[str, dict[str, Any]]:
    """All arms of one decoder."""
    bar = bars.add(f"base {seed}", config.base_steps)
    tune = bars.add(f"fine-tune {seed}", config.tune_steps)

    # Made again by whoever goes on with the run and needs it.
    @functools.cache
    def get() -> _Tuned:
        base = compress.train_base(config, seed, kept, bar)
        return _fine_tune(config, base, kept, tune)

    def before() -> dict[str, Any]:
        tuned = get()
        return _read(tuned, tuned.before)

    def after() -> dict[str, Any]:
        tuned = get()
        sizes = _updates(tuned)
        zeros = sum(int((x == 0).sum()) for x in sizes.values())
        share = 100 * zeros / sum(x.size for x in sizes.values())
        return _read(tuned, tuned.now.params) | {"zeros": share}

    out = {
        "before fine-tuning": kept.once(f"before {seed}", before),
        "fine-tuned": kept.once(f"after {seed}", after),
    }
    whole = out["fine-tuned"]["loss"]
    for name, make in sides.items():
        made = kept.once(f"{name} {seed}", lambda make=make: make(get()))
        out[name] = made | {"lost": made["loss"] - whole}
    return out


def _read(tuned: _Tuned, params: Any) -> dict[str, Any]:
    return {
        "loss": held_out_loss(tuned.now, params),
        "size": _size(params),
    }


def _fine_tune(config: Config, base: Base, kept: Run, bar: Any) -> _Tuned:
    """The decoder on the other text; both in the numbers of bfloat16, as float32."""
    text = data.text("pydoc")
    before = _rounded_to_stored(base.params)
    tx = optax.adam(config.tune_rate)

    def loss(params: Any, batch: jax.Array) -> jax.Array:
        logits: Any = base.model.apply({"params": params}, batch[:, :-1])
        return train.next_token_loss(logits, batch)

    size = {"batch": config.base_batch, "length": config.length}
    state, _ = kept.fit(
        f"fine-tune {base.seed}",
        train.make_train_step(loss, tx),
        train.init_state(before, tx),
        data.windows(text.train, seed=base.seed, **size),
        steps=config.tune_steps,
        every=max(1, config.tune_steps // 20),
        progress=bar,
    )
    size = {"batch": 8, "length": config.length}
    rows = iter(data.windows(text.train, seed=1000 + base.seed, **size))
    calibration = [next(rows)[:, :-1] for _ in range(config.calibration // 8)]
    held_out = data.valid_windows(text.valid, batch=16, length=config.length, limit=16)
    now = base._replace(
        params=_rounded_to_stored(state.params),
        calibration=np.stack(calibration),
        held_out=jnp.asarray(held_out),
    )
    return _Tuned(now, before)


def _size(params: Any) -> float:
    """Bits of a weight, where what is dense is stored in bfloat16."""

    def stored(x: Any) -> Any:
        return x if is_weight(x) else jnp.asarray(x, jnp.bfloat16)

    return size_of(jax.tree.map(stored, params, is_leaf=is_weight))


def _stored(params: Any) -> Any:
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params)


def _rounded_to_stored(params: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(jnp.float32), _stored(params))


def _updates(tuned: _Tuned) -> dict[str, jax.Array]:
    now = tuned.now
    ends = tuple(f"/{path}" for path in now.kernels or ["kernel"])
    return update_sizes(
        now.params,
        tuned.before,
        which=lambda path, _: path.startswith("blocks") and path.endswith(ends),
        dtype=jnp.bfloat16,
    )


# --- Arms -------------------------------------------------------------------------


def _sides(config: Config) -> dict[str, Any]:
    """A function from a fine-tuned decoder to figures, for each name."""

    def plain(make: Any, b: int) -> Any:
        def one(tuned: _Tuned) -> dict[str, Any]:
            start = time.perf_counter()
            tree, own = make(tuned, b, config.group)
            jax.block_until_ready(tree)
            seconds = time.perf_counter() - start
            loss, size = held_out_loss(tuned.now, tree), _size(tree)
            return {"loss": loss, "size": size, "seconds": seconds} | own

        return one

    out = {}
    for b in config.bits:
        out[f"RTN, {b} bits"] = plain(lambda t, *a: rounded(t.now, *a), b)
        out[f"AWQ, {b} bits"] = plain(lambda t, *a: awq(t.now, *a), b)
        out[f"QuantLRM, {b} bits"] = plain(_quantlrm, b)
        for which in _KEPT:
            make = functools.partial(_keeping, config.kept, which)
            out[_kept_name(config, which, b)] = plain(make, b)
    for part in config.only:
        if not any(part.lower() in name.lower() for name in out):
            raise ValueError(f"no arm is named {part!r}: there are {'; '.join(out)}")
    wanted = [part.lower() for part in config.only] or [""]
    return {
        name: make
        for name, make in out.items()
        if any(part in name.lower() for part in wanted)
    }


def _kept_name(config: Config, which: str, b: int) -> str:
    return f"RTN, {b} bits, {which} {100 * config.kept:g} % kept"


def _quantlrm(tuned: _Tuned, b: int, group: int) -> Any:
    now = tuned.now
    groups = groups_of(now, tied=True)
    made = quantlrm_model(
        compress.parts_of(now),
        now.params,
        tuned.before,
        now.calibration,
        groups,
        bits=b,
        group=group,
        dtype=jnp.bfloat16,
    )
    return made, block_error(now, made)


def _keeping(share: float, which: str, tuned: _Tuned, b: int, group: int) -> Any:
    """Rounded to nearest but for some channels, which stay as they are stored."""
    packed, _ = rounded(tuned.now, b, group)
    sizes = _updates(tuned)
    made = _kept(tuned.now.params, sizes, _KEPT.index(which), share, b, group)
    channels = [
        (_few(share, x.shape[-2]) / x.shape[-2], x.size) for x in sizes.values()
    ]
    more = 16 * sum(part * n for part, n in channels) / sum(n for _, n in channels)
    return made, block_error(tuned.now, made) | {"size": _size(packed) + more}


def _few(share: float, n: int) -> int:
    """How many of `n` channels are kept: an even number, half of it at either end."""
    return max(2, 2 * round(share * n / 2))


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _kept(
    params: Any, sizes: Any, order: jax.Array, share: float, b: int, group: int
) -> Any:
    known = {leaf.path: leaf for leaf in describe(params)}

    def one(path: str, w: jax.Array) -> jax.Array:
        if path not in sizes:
            return w
        view: Any = known[path].view
        whole = as_matrices(w, view)
        n = whole.shape[-2]
        rank = jnp.argsort(jnp.argsort(sizes[path].mean(-1), axis=-1), axis=-1)
        few = _few(share, n)
        from_middle = jnp.abs(rank - (n - 1) / 2)
        stays = jnp.stack(
            [
                rank < few,
                rank >= n - few,
                from_middle < few / 2,
                from_middle > (n - few - 1) / 2,
            ]
        )[order]
        near = MinMax(b).round(whole, group)
        return from_matrices(jnp.where(stays[..., None], whole, near), view, w.shape)

    return map_with_path(one, params)
