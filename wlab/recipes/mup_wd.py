# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Weight decay over width: what keeps the gain of a layer, and the learning rate.

First a residual block with a norm, trained on a teacher until its weights are steady:
how does the largest singular value of its matrices go with width, for decay that grows
as a power of it? Then a small decoder on text at several widths and learning rates:
does the best learning rate of the narrowest serve the others (arXiv 2510.15262)?
"""

import dataclasses
import functools
import math
import pathlib
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from wlab import data, probe, train
from wlab.models.decoder import Decoder, DecoderConfig, tiny
from wlab.optim import mup
from wlab.recipes import Arm, Curve, Finding, Metric, Report, Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True)
class Config:
    """Both experiments; the first of the widths is the base.

    Attributes:
      widths: of the residual block, ascending.
      steps: optimiser steps of the block; they must be many times one over learning
        rate times decay at every width, or the start shows.
      batch: examples in a batch of the block.
      learning_rate: of the block's matrices at the base.
      vector_rate: of its vectors.
      weight_decay: of its matrices at the base.
      seeds: how many seeds, of both experiments.
      decoder_widths: of the decoder, ascending; none leaves it out.
      decoder_depth: its number of blocks.
      decoder_steps: optimiser steps of the decoder.
      decoder_batch: sequences in a batch.
      decoder_length: tokens (bytes) of a sequence.
      decoder_rates: learning rates at the base, ascending; all of them train together.
      decoder_decay: weight decay at the base.
    """

    widths: tuple[int, ...] = (32, 64, 128, 256)
    steps: int = 1500
    batch: int = 128
    learning_rate: float = 1e-2
    vector_rate: float = 2e-3
    weight_decay: float = 1.0
    seeds: int = 2
    decoder_widths: tuple[int, ...] = (32, 64, 128)
    decoder_depth: int = 2
    decoder_steps: int = 150
    decoder_batch: int = 4
    decoder_length: int = 64
    decoder_rates: tuple[float, ...] = (0.002, 0.004, 0.008, 0.016, 0.032, 0.064)
    decoder_decay: float = 0.1


QUICK = Config(
    widths=(16, 64),
    steps=60,
    decoder_widths=(16, 32),
    decoder_depth=1,
    decoder_steps=10,
    decoder_batch=2,
    decoder_length=16,
    decoder_rates=(0.004, 0.016),
)

# Exponents of learning rate and weight decay, and a factor of the latter.
_RULES: dict[str, tuple[float, float, float]] = {
    "both fixed": (0.0, 0.0, 1.0),
    "decay ~ 1": (-1.0, 0.0, 1.0),
    "decay ~ sqrt(width)": (-1.0, 0.5, 1.0),
    "decay ~ width": (-1.0, 1.0, 1.0),
    "decay ~ 4 sqrt(width)": (-1.0, 0.5, 4.0),
}
_OURS, _PLAIN = "decay ~ sqrt(width)", "both fixed"
_MATRICES = ("up", "down")


def run(
    config: Config,
    *,
    out: pathlib.Path | None = None,
    progress: bool = True,
    resume: bool = False,
) -> Report:
    """Train the block under every rule, and the decoder under the plain one and ours.

    Args:
      config: the setting.
      out: where report.json, report.png and the metrics go; None: nowhere.
      progress: whether to show bars on a terminal.
      resume: whether to go on with the run that `out` holds.

    Returns:
      The report.
    """
    _check(config)
    bars = train.Progress(show=None if progress else False)
    tops: dict[int, Any] = {}
    losses: dict[str, dict[int, np.ndarray]] = {}
    with Run("mup-wd", config, out, resume=resume) as kept, bars:
        bar = bars.add("block", steps=len(config.widths))
        for done, width in enumerate(config.widths, 1):
            tops[width] = kept.once(
                f"block {width}", functools.partial(_block_tops, config, width)
            )
            bar(done, {})
        for width in config.decoder_widths:
            for rule in (_PLAIN, _OURS):
                if rule == _OURS and width == config.decoder_widths[0]:
                    found = losses[_PLAIN][width]  # at the base no rule changes a thing
                else:
                    found = _decoder_losses(config, rule, width, kept, bars)
                losses.setdefault(rule, {})[width] = found
        arms = _arms(config, tops, losses)
        report = Report(
            recipe="mup-wd",
            title="The largest singular value over width, and the best learning rate",
            claim=(
                "With learning rate ~ 1/width, decay ~ sqrt(width) keeps the largest "
                "singular value of each matrix, and learning rate and decay carry over."
            ),
            config=dataclasses.asdict(config),
            seeds=range(config.seeds),
            metrics=_metrics(config),
            arms=arms,
            started=kept.watch.started,
            seconds=kept.watch.seconds,
            findings=_findings(config, {arm.name: arm for arm in arms}, tops, losses),
        )
        if out is not None:
            report.save(out, figure=figure)
    return report


def figure(report: Report) -> "Figure":
    """Largest singular values over width, and loss over learning rate by width."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from wlab.recipes._figures import styles

    widths = report.config["decoder_widths"]
    figure = Figure(figsize=(16, 7), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(report.title, fontsize=16)
    panels = figure.subplots(1, 3 if widths else 1, squeeze=False)[0]
    look = styles(report)
    for arm in report.arms:
        curve = np.asarray(arm.curves["top"].values)
        slope = (arm.mean("slope_up") + arm.mean("slope_down")) / 2
        panels[0].plot(
            arm.curves["top"].steps,
            curve.mean(0),
            **look[arm.name],
            linewidth=2,
            label=f"{arm.name}: slope {slope:+.2f}",
        )
    panels[0].set(xscale="log", yscale="log")
    panels[0].set_xlabel("width", fontsize=13)
    panels[0].set_ylabel(report.metrics["top"].title, fontsize=13)
    panels[0].set_xticks(report.config["widths"], map(str, report.config["widths"]))
    ticks = [0.1, 0.2, 0.5, 1, 2, 5, 10]
    low, high = panels[0].get_ylim()
    ticks = [tick for tick in ticks if low <= tick <= high]
    panels[0].set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    panels[0].minorticks_off()
    found = {}
    for panel, name in zip(panels[1:], (_PLAIN, _OURS), strict=False):
        for index, width in enumerate(widths):
            curve = report.arm(name).curves[f"loss_{width}"]
            mean = np.asarray(curve.values).mean(0)
            colour = f"C{index}"
            panel.plot(curve.steps, mean, "o-", color=colour, label=f"width {width}")
            best = int(np.argmin(mean))
            panel.plot(curve.steps[best], mean[best], "*", color=colour, ms=20)
            found[name, width] = mean
        title = "AdamW, nothing scaled" if name == _PLAIN else "muP and decay ~ sqrt"
        panel.set_title(f"Decoder, {title} (star: best)", fontsize=13)
        rates = report.config["decoder_rates"]
        panel.set_xscale("log")
        panel.set_xticks(rates, [f"{rate:g}" for rate in rates])
        panel.minorticks_off()
        panel.set_xlabel("learning rate at the base", fontsize=13)
        panel.set_ylabel("held-out bits per byte", fontsize=13)
    if found:
        values = np.concatenate(list(found.values()))
        values = values[np.isfinite(values)]
        for panel in panels[1:]:
            low = values.min()
            panel.set_ylim(low - 0.1, min(values.max(), low + 2.5) + 0.1)
    for panel in panels:
        panel.grid(alpha=0.25)
        panel.tick_params(labelsize=12)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(fontsize=11, frameon=False)
    return figure


def _check(config: Config) -> None:
    for name in ("widths", "decoder_widths"):
        widths = getattr(config, name)
        if list(widths) != sorted(set(widths)):
            raise ValueError(f"{name}={widths} must ascend: the first is the base")
    if len(config.widths) < 2 or min(config.widths) < 2:
        raise ValueError(f"widths={config.widths}: a slope needs two or more")
    if config.seeds < 1 or config.steps < 1:
        raise ValueError("seeds and steps must be positive")
    if config.decoder_widths and (
        config.decoder_steps < 10 or not config.decoder_rates
    ):
        raise ValueError("the decoder needs decoder_rates and 10 decoder_steps or more")
    for width in config.decoder_widths:
        _decoder_config(config, _OURS, width)
    if min(config.decoder_rates, default=1.0) <= 0:
        raise ValueError(f"decoder_rates={config.decoder_rates} must be positive")


# --- The residual block -----------------------------------------------------------


def _block_shapes(width: int) -> Any:
    shapes = {
        "embed": {"kernel": (32, width)},
        "norm": {"scale": (width,)},
        "up": {"kernel": (width, width)},
        "down": {"kernel": (width, width)},
        "head": {"kernel": (width, 16)},
    }
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def _block(params: Any, x: jax.Array, output_scale: float) -> jax.Array:
    """``h = E x; h += relu(g rn(h) @ up) @ down; rn(h) @ head``."""

    def norm(h: jax.Array) -> jax.Array:
        return h * jax.lax.rsqrt(jnp.mean(h**2, -1, keepdims=True) + 1e-8)

    w = {name: next(iter(layer.values())) for name, layer in params.items()}
    h = x @ w["embed"]
    h = h + jax.nn.relu((w["norm"][None, :] * norm(h)) @ w["up"]) @ w["down"]
    return output_scale * norm(h) @ w["head"]


def _block_tops(config: Config, width: int) -> dict[str, Any]:
    """Largest and RMS singular values at the end: [rules, seeds] of each matrix."""
    base = config.widths[0]
    shapes = [_block_shapes(n) for n in (width, base, 2 * base)]
    classes = mup.classify(*shapes)
    vectors = jax.tree.map(lambda w: w.kind != "matrix", classes)
    output_scale = mup.output_multiplier(classes)
    # The head begins as the base's, and the logits are divided by q.
    deviations = {"embed": 32**-0.5, "up": width**-0.5, "down": width**-0.5}
    deviations["head"] = 1 / base

    def one(rule: jax.Array, key: jax.Array) -> dict[str, jax.Array]:
        lr_exp, wd_exp, factor = rule
        tx = optax.chain(
            optax.scale_by_adam(0.9, 0.95, 1e-12),
            mup.add_decayed_weights(config.weight_decay * factor, classes, wd_exp),
            mup.scale_by_mup(classes, lr_exp),
            optax.masked(
                optax.scale(config.vector_rate / config.learning_rate), vectors
            ),
            optax.scale_by_learning_rate(config.learning_rate),
        )
        k_init, k_first, k_second, k_data = jax.random.split(key, 4)
        teacher = (
            jax.random.normal(k_first, (32, 64)) / 32**0.5,
            jax.random.normal(k_second, (64, 16)) / 64**0.5,
        )
        keys: Any = optax.tree.split_key_like(k_init, shapes[0])
        params = {
            name: jax.tree.map(
                lambda k, s, name=name: (
                    jnp.ones(s.shape)
                    if name == "norm"
                    else deviations[name] * jax.random.normal(k, s.shape)
                ),
                keys[name],
                layer,
            )
            for name, layer in shapes[0].items()
        }

        def loss(params: Any, key: jax.Array) -> jax.Array:
            k_x, k_noise = jax.random.split(key)
            x = jax.random.normal(k_x, (config.batch, 32))
            y = jax.nn.relu(1.5 * x @ teacher[0]) @ teacher[1]
            y = y + 0.3 * jax.random.normal(k_noise, y.shape)
            return jnp.mean((_block(params, x, output_scale) - y) ** 2)

        def step(carry: Any, i: jax.Array) -> tuple[Any, jax.Array]:
            params, state = carry
            value, grads = jax.value_and_grad(loss)(
                params, jax.random.fold_in(k_data, i)
            )
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), value

        (params, _), losses = jax.lax.scan(
            step, (params, tx.init(params)), jnp.arange(config.steps)
        )
        which = [f"{name}/kernel" for name in _MATRICES]
        tops = probe.top_singular_values(params, which=which)
        bulks = probe.rms_singular_values(params, which=which)
        late = losses[-max(1, config.steps // 10) :].mean()
        made = {f"top_{name}": tops[f"{name}/kernel"][0] for name in _MATRICES}
        made |= {f"rms_{name}": bulks[f"{name}/kernel"] for name in _MATRICES}
        return made | {"loss": late}

    keys = jax.vmap(jax.random.key)(jnp.arange(config.seeds))
    over_seeds = jax.vmap(one, (None, 0))
    return dict(jax.jit(jax.vmap(over_seeds, (0, None)))(_rules(), keys))


def _rules() -> jax.Array:
    return jnp.asarray(list(_RULES.values()))


def _slope(widths: tuple[int, ...], tops: np.ndarray) -> float:
    return float(np.polyfit(np.log(widths), np.log(tops), 1)[0])


# --- The decoder ------------------------------------------------------------------


def _decoder_config(config: Config, rule: str, width: int) -> DecoderConfig:
    base = config.decoder_widths[0]
    small = tiny(
        width=base,
        depth=config.decoder_depth,
        heads=2,
        kv_heads=1,
        head_dim=base // 2,
        hidden=2 * base,
        remat=False,
    )
    wide = mup.decoder_configs(small, [width])[width]
    if rule == _OURS:
        return wide
    return dataclasses.replace(wide, output_scale=1.0, init_width=None)


def _decoder_losses(
    config: Config, rule: str, width: int, kept: Run, bars: train.Progress
) -> np.ndarray:
    """Held-out bits at the end, [seeds, learning rates]."""
    model = Decoder(_decoder_config(config, rule, width))
    corpus = data.text("pydoc")
    held_out = data.valid_windows(
        corpus.valid, batch=16, length=config.decoder_length, limit=8
    )
    base = config.decoder_widths[0]
    params, small, other = (
        jax.eval_shape(
            Decoder(_decoder_config(config, rule, n)).init,
            jax.random.key(0),
            held_out[0, :, :-1],
        )["params"]
        for n in (width, base, 2 * base)
    )
    classes = mup.classify(params, small, other)
    lr_exp, wd_exp, _ = _RULES[rule]
    steps = config.decoder_steps
    shape = optax.warmup_cosine_decay_schedule(0.1, 1.0, steps // 10, steps, 0.1)

    def optimiser(rate: Any) -> optax.GradientTransformation:
        # The rate is in the state, so that the runs of all rates are one.
        return optax.chain(
            optax.clip_by_global_norm(1.0),
            mup.mup_adamw(
                shape, config.decoder_decay, classes, lr_exp=lr_exp, wd_exp=wd_exp
            ),
            optax.inject_hyperparams(optax.scale)(step_size=rate),
        )

    def loss(params: Any, batch: jax.Array) -> jax.Array:
        logits: Any = model.apply({"params": params}, batch[:, :-1])
        return train.next_token_loss(logits, batch)

    rates = jnp.asarray(config.decoder_rates)
    step = jax.vmap(train.make_train_step(loss, optimiser(1.0)), (0, None))
    evaluate = train.make_evaluate(loss, held_out)

    @jax.jit
    def start(key: jax.Array) -> train.TrainState:
        params = model.init(key, held_out[0, :, :-1])["params"]
        return jax.vmap(lambda rate: train.init_state(params, optimiser(rate)))(rates)

    def one(name: str, seed: int) -> dict[str, Any]:
        batches = data.windows(
            corpus.train,
            batch=config.decoder_batch,
            length=config.decoder_length,
            seed=seed,
        )
        state, _ = kept.fit(
            name,
            step,
            start(jax.random.key(seed)),
            batches,
            steps=steps,
            every=max(1, steps // 10),
        )
        ends = [
            evaluate(jax.tree.map(lambda x, i=i: x[i], state.params))["loss"]
            for i in range(len(rates))
        ]
        return {"bits": train.bits(jnp.stack(ends))}

    bar = bars.add(f"decoder {width}, {rule}", steps=config.seeds)
    out = []
    for seed in range(config.seeds):
        name = f"decoder {rule} {width} {seed}"
        out.append(kept.once(name, functools.partial(one, name, seed))["bits"])
        bar(seed + 1, {})
    return np.asarray(out)


# --- What it shows ----------------------------------------------------------------


def _metrics(config: Config) -> dict[str, Metric]:
    out = {
        "slope_up": Metric("slope, up", lower_is_better=None, format="+.2f"),
        "slope_down": Metric("slope, down", lower_is_better=None, format="+.2f"),
        "rms_slope": Metric("slope, RMS value", lower_is_better=None, format="+.2f"),
        "block_loss": Metric("block, widest", "loss", format=".3f"),
        "top": Metric("largest singular value (mean of both matrices)"),
    }
    if config.decoder_widths:
        out |= {
            "shift": Metric(
                "best rate moves", "octaves", lower_is_better=None, format="+.1f"
            ),
            "carried": Metric(
                "widest at the base's best", "bits per byte", format=".3f"
            ),
            "best": Metric("widest at its best", "bits per byte", format=".3f"),
        }
    for width in config.decoder_widths:
        out[f"loss_{width}"] = Metric(f"bits per byte at width {width}")
    return out


def _arms(
    config: Config, tops: dict[int, Any], losses: dict[str, dict[int, np.ndarray]]
) -> list[Arm]:
    arms = []
    for index, (name, rule) in enumerate(_RULES.items()):
        by_width = {
            field: np.array([tops[w][field][index] for w in config.widths]).T
            for field in tops[config.widths[0]]
        }
        figures = {
            f"slope_{m}": [_slope(config.widths, row) for row in by_width[f"top_{m}"]]
            for m in _MATRICES
        }
        bulk = np.sqrt(by_width["rms_up"] * by_width["rms_down"])
        figures["rms_slope"] = [_slope(config.widths, row) for row in bulk]
        figures["block_loss"] = by_width["loss"][:, -1].tolist()
        mean = np.sqrt(by_width["top_up"] * by_width["top_down"])
        curves = {"top": Curve(config.widths, mean.tolist())}
        if config.decoder_widths and name in losses:
            found = losses[name]
            for width, values in found.items():
                curves[f"loss_{width}"] = Curve(config.decoder_rates, values.tolist())
            first, last = (found[config.decoder_widths[i]] for i in (0, -1))
            at = int(np.argmin(first.mean(0)))
            figures |= {
                "shift": [
                    _octaves(config, a, b) for a, b in zip(first, last, strict=True)
                ],
                "carried": last[:, at].tolist(),
                "best": last[:, int(np.argmin(last.mean(0)))].tolist(),
            }
        settings = dict(zip(("lr_exp", "wd_exp", "factor"), rule, strict=True))
        arms.append(Arm(name, figures, settings, curves, baseline=name == _PLAIN))
    return arms


def _octaves(config: Config, first: np.ndarray, last: np.ndarray) -> float:
    """How far the best of the learning rates moves, in powers of two."""
    rates = config.decoder_rates
    return math.log2(rates[int(np.argmin(last))] / rates[int(np.argmin(first))])


def _findings(
    config: Config,
    arms: dict[str, Arm],
    tops: dict[int, Any],
    losses: dict[str, dict[int, np.ndarray]],
) -> list[Finding]:
    slopes = {
        name: [arm.mean(f"slope_{m}") for m in _MATRICES] for name, arm in arms.items()
    }
    none, root, full = (slopes[f"decay ~ {x}"] for x in ("1", "sqrt(width)", "width"))

    def show(*pairs: list[float]) -> str:
        return "; ".join(", ".join(f"{x:+.2f}" for x in pair) for pair in pairs)

    names = list(_RULES)
    ours, strong = names.index(_OURS), names.index("decay ~ 4 sqrt(width)")
    ratios = [
        float(np.mean(t[f"top_{m}"][strong]) / np.mean(t[f"top_{m}"][ours]))
        for t in tops.values()
        for m in _MATRICES
    ]
    out = [
        Finding(
            "decay ~ sqrt(width): the slopes of up and down are within 0.15 of zero",
            max(map(abs, root)) < 0.15,
            show(root),
        ),
        Finding(
            "they are nearer to zero than with decay ~ 1 and with decay ~ width",
            all(
                abs(b) < min(abs(a), abs(c))
                for a, b, c in zip(none, root, full, strict=True)
            ),
            show(none, root, full),
        ),
        Finding(
            "decay ~ 1 lets them grow (over 0.15), decay ~ width makes them fall "
            "(under -0.1)",
            min(none) > 0.15 and max(full) < -0.1,
            show(none, full),
        ),
        Finding(
            "four times the decay halves the largest singular value, within a quarter",
            all(0.375 <= ratio <= 0.625 for ratio in ratios),
            f"times {min(ratios):.2f} to {max(ratios):.2f} over widths and matrices",
        ),
    ]
    if not config.decoder_widths:
        return out
    shift, carried, best = (
        {name: arms[name].mean(m) for name in losses}
        for m in ("shift", "carried", "best")
    )
    lost = {name: carried[name] - best[name] for name in losses}
    grid = max(
        (
            math.log2(b / a)
            for a, b in zip(
                config.decoder_rates, config.decoder_rates[1:], strict=False
            )
        ),
        default=0.0,
    )
    wide = config.decoder_widths[-1]
    return [
        *out,
        Finding(
            "decoder: the best learning rate stays within one point of the grid",
            abs(shift[_OURS]) <= grid + 1e-6,
            f"{shift[_OURS]:+.1f} octaves; with nothing scaled {shift[_PLAIN]:+.1f}",
        ),
        Finding(
            f"decoder: width {wide} loses less by taking the base's best rate than "
            "with nothing scaled",
            lost[_OURS] < lost[_PLAIN],
            f"{lost[_OURS]:.3f} against {lost[_PLAIN]:.3f} bits per byte",
        ),
        Finding(
            f"decoder: with the base's best rate, width {wide} ends lower than with "
            "nothing scaled",
            carried[_OURS] < carried[_PLAIN],
            f"{carried[_OURS]:.3f} against {carried[_PLAIN]:.3f} bits per byte",
        ),
    ]
