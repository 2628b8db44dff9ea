# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Which blocks can do with fewer bits, told by how much they change their input.

Some blocks of a residual network are rounded to 2 bits and the others to 4: those first
that change their input least (LIM), most, or that have most outliers (ZD), beside the
mean over all choices of as many blocks, and one width for all (arXiv 2406.17415).

Blocks of unlike widths cannot be stacked. To try all choices in one program, both
roundings of the stacked blocks are kept as dense weights here, and a mask picks from
them; what a choice weighs is counted on the codes, in a list of blocks.
"""

import dataclasses
import functools
import itertools
import pathlib
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from wlab import data
from wlab.core import map_with_path
from wlab.quant import allocate_bits, bits_per_weight, lim_scores, rtn, zd_scores
from wlab.recipes import Arm, Curve, Finding, Metric, Report, Stopwatch
from wlab.recipes._figures import styles
from wlab.train import Progress

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["QUICK", "Config", "figure", "run"]


@dataclasses.dataclass(frozen=True)
class Config:
    """A residual network of gated layers, trained on digits, and its roundings.

    Attributes:
      width: of the residual stream; a multiple of `group`, and so is `hidden`.
      hidden: width inside a block.
      depth: number of blocks, from 2 to 10: all choices among them are tried.
      steps: of AdamW.
      batch: images in a step.
      rate: learning rate, which falls to zero as a cosine.
      low: bits of a weight in the blocks that matter less.
      high: bits in the others.
      group: input channels that share a range.
      seeds: how many networks.
    """

    width: int = 128
    hidden: int = 256
    depth: int = 6
    steps: int = 500
    batch: int = 128
    rate: float = 1e-3
    low: int = 2
    high: int = 4
    group: int = 32
    seeds: int = 3


QUICK = Config(width=32, hidden=32, depth=3, steps=60, group=16, seeds=1)

_LIM, _MOST, _ZD = "LIM, least first", "LIM, most first", "ZD, least first"
_DEEP, _MEAN, _BEST = "deepest first", "mean of all choices", "best choice"


def run(
    config: Config, *, out: pathlib.Path | None = None, progress: bool = True
) -> Report:
    """Train networks, round them in every choice of blocks, compare the orders.

    Args:
      config: the setting.
      out: where report.json and report.png go; None: nowhere.
      progress: whether to show a bar on a terminal.

    Returns:
      The report.
    """
    c = config
    if not 2 <= c.depth <= 10 or not 2 <= c.low < c.high <= 8 or c.seeds < 1:
        raise ValueError(
            f"depth={c.depth} is 2 to 10, low={c.low} and high={c.high} are widths "
            f"from 2 to 8 in this order, and seeds={c.seeds} is positive"
        )
    if c.width % c.group or c.hidden % c.group:
        raise ValueError(
            f"width={c.width} and hidden={c.hidden} are multiples of group={c.group}"
        )
    watch = Stopwatch.start()
    split = data.digits()
    x, y = split.train_x.reshape(len(split.train_x), -1), split.train_y
    valid = split.valid_x.reshape(len(split.valid_x), -1)
    found: list[dict[str, dict[int, float]]] = []
    with Progress(show=None if progress else False) as bars:
        bar = bars.add("networks", c.seeds)
        for seed in range(c.seeds):
            params = _train(c, jax.random.key(seed), x, y)
            found.append(_errors(c, params, x, valid))
            bar(seed + 1, {"error": found[-1][_LIM][1]})
    counts = range(1, c.depth)
    sizes = [_size(c, params, k) for k in counts]
    arms = []
    for name in found[0]:
        seen = [table[name] for table in found]
        curve = [[table[k] for k in counts if k in table] for table in seen]
        steps = [b for k, b in zip(counts, sizes, strict=True) if k in seen[0]]
        arms.append(
            Arm(
                name,
                {f"error_{k}": [table[k] for table in seen] for k in seen[0]},
                curves={"error": Curve(steps, curve)},
                baseline=name in (_MEAN, _DEEP) or name.startswith("all"),
            )
        )
    report = Report(
        recipe="layerwise",
        title=f"A residual network of {c.depth} blocks on digits, some blocks at "
        f"{c.low} bits and the others at {c.high}",
        claim="The blocks that change their input least can do with fewer bits.",
        config=dataclasses.asdict(c),
        seeds=range(c.seeds),
        metrics={
            f"error_{k}": Metric(f"{k} at {c.low} bits", "% of logits", format=".3f")
            for k in counts
        }
        | {"error": Metric("error of logits", "%")},
        arms=arms,
        started=watch.started,
        seconds=watch.seconds,
        findings=_findings(c, {arm.name: arm for arm in arms}),
    )
    if out is not None:
        report.save(out, figure=figure)
    return report


def figure(report: Report) -> "Figure":
    """The error of each order against the bits of a weight."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    out = Figure(figsize=(11, 7), dpi=100, layout="constrained")
    FigureCanvasAgg(out)
    axes = out.subplots()
    out.suptitle(report.title, fontsize=15)
    look = styles(report)
    for arm in report.arms:
        curve = arm.curves["error"]
        values = np.asarray(curve.values)
        style: dict[str, Any] = look[arm.name]
        axes.plot(curve.steps, values.mean(0), label=arm.name, markersize=8, **style)
        if len(curve.steps) > 1:
            band = values.min(0), values.max(0)
            axes.fill_between(
                curve.steps, *band, color=style["color"], alpha=0.1, linewidth=0
            )
    axes.set_xlabel("size (bits per weight, with ranges)", fontsize=13)
    axes.set_ylabel(report.metrics["error"].title, fontsize=13)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.25, which="both")
    axes.tick_params(labelsize=12)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=12, frameon=False)
    return out


def _findings(config: Config, arms: dict[str, Arm]) -> list[Finding]:
    rivals = [(_MEAN, 0.8), (_MOST, 1.0), (_DEEP, 1.0)]

    def below(k: int, ours: str, theirs: str, factor: float) -> Finding:
        a, b = (arms[name].mean(f"error_{k}") for name in (ours, theirs))
        times = "" if factor == 1 else f"{factor} times "
        return Finding(
            f"{k} of {config.depth} blocks at {config.low} bits: {ours!r} loses no "
            f"more than {times}{theirs!r}",
            a <= factor * b,
            f"{a:.4g} % against {b:.4g} %, a ratio of {a / b:.3f}",
        )

    out = []
    for k in range(2, config.depth // 2 + 1) or [1]:
        out += [below(k, _LIM, *rival) for rival in rivals]
        out.append(below(k, _ZD, _MEAN, 1.0))
        if (width := _uniform(config).get(k)) is not None:
            out.append(below(k, _LIM, f"all at {width} bits", 1.0))
    return out


# --- The network ------------------------------------------------------------------


_SHAPES = {
    "gate": lambda c: (c.width, c.hidden),
    "up": lambda c: (c.width, c.hidden),
    "down": lambda c: (c.hidden, c.width),
}


def _init(config: Config, key: jax.Array) -> Any:
    c = config
    normal = jax.nn.initializers.lecun_normal()
    sizes = {name: _SHAPES[name](c) for name in _SHAPES}
    keys = iter(jax.random.split(key, len(sizes) + 2))
    layers: dict[str, Any] = {"norm": {"scale": jnp.ones((c.depth, c.width))}}
    for name, shape in sizes.items():
        each = jax.random.split(next(keys), c.depth)
        kernel = jax.vmap(lambda k, shape=shape: normal(k, shape))(each)
        layers[name] = {"kernel": kernel}
    return {
        "embed": {"kernel": normal(next(keys), (64, c.width))},
        "layers": layers,
        "head": {"kernel": normal(next(keys), (c.width, 10))},
    }


def _apply(params: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The logits, and the streams [depth + 1, images, width]."""

    def block(x: jax.Array, layer: Any) -> tuple[jax.Array, jax.Array]:
        gate, up, down = (layer[name]["kernel"] for name in _SHAPES)
        read = _norm(x) * layer["norm"]["scale"][None]
        x = x + (jax.nn.silu(read @ gate) * (read @ up)) @ down
        return x, x

    x = start = x @ params["embed"]["kernel"]
    x, streams = jax.lax.scan(block, x, params["layers"])
    logits = _norm(x) @ params["head"]["kernel"]
    return logits, jnp.concatenate([start[None], streams])


def _norm(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6)


@functools.partial(jax.jit, static_argnums=0)
def _train(config: Config, key: jax.Array, x: jax.Array, y: jax.Array) -> Any:
    tx = optax.adamw(optax.cosine_decay_schedule(config.rate, config.steps))
    k_init, k_batch = jax.random.split(key)
    params = _init(config, k_init)

    def loss(params: Any, rows: jax.Array) -> jax.Array:
        logits, _ = _apply(params, x[rows])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, y[rows])
        return losses.mean()

    def step(carry: Any, key: jax.Array) -> Any:
        params, state = carry
        rows = jax.random.randint(key, (config.batch,), 0, len(x))
        updates, state = tx.update(jax.grad(loss)(params, rows), state, params)
        return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(k_batch, config.steps)
    return jax.lax.scan(step, (params, tx.init(params)), keys)[0][0]


# --- Its roundings ----------------------------------------------------------------


def _rounded(config: Config, layers: Any, width: int) -> Any:
    """Stacked blocks, whose kernels were rounded, as dense weights."""

    def one(path: str, w: jax.Array) -> jax.Array:
        if not path.endswith("kernel"):
            return w
        made = jax.vmap(lambda w: rtn(w, bits=width, group=config.group).materialise())
        return made(w)

    return map_with_path(one, layers)


@functools.partial(jax.jit, static_argnums=0)
def _tried(config: Config, params: Any, x: Any, valid: Any, masks: Any) -> Any:
    """The errors of choices, those of one width, and the scores of all blocks."""
    c = config
    low, high = (_rounded(c, params["layers"], width) for width in (c.low, c.high))
    want = _apply(params, valid)[0]

    def error(layers: Any) -> jax.Array:
        got = _apply(params | {"layers": layers}, valid)[0]
        return 100 * jnp.sum((got - want) ** 2) / jnp.sum(want**2)

    def choice(mask: jax.Array) -> jax.Array:
        def pick(a: jax.Array, b: jax.Array) -> jax.Array:
            return jnp.where(mask.reshape(-1, *[1] * (a.ndim - 1)), a, b)

        return error(jax.tree.map(pick, low, high))

    streams = _apply(params, x)[1]
    same = {b: error(_rounded(c, params["layers"], b)) for b in _uniform(c).values()}
    return (
        jax.lax.map(choice, masks),
        same,
        lim_scores(streams[:, :, None]),
        zd_scores(params, "layers"),
    )


def _errors(
    config: Config, params: Any, x: Any, valid: Any
) -> dict[str, dict[int, float]]:
    """The error of each order by the number of blocks at the low width, in percent."""
    masks = np.array([*itertools.product((False, True), repeat=config.depth)])
    errors, same, lim, zd = jax.device_get(_tried(config, params, x, valid, masks))
    by_mask = dict(zip(map(tuple, masks.tolist()), errors.tolist(), strict=True))
    orders = {
        _LIM: (lim, True),
        _MOST: (lim, False),
        _ZD: (zd, False),
        _DEEP: (-np.arange(config.depth), True),
    }
    out: dict[str, dict[int, float]] = {}
    for name, (scores, higher) in orders.items():
        out[name] = {
            k: by_mask[tuple(_widths(config, scores, k, higher) == config.low)]
            for k in range(1, config.depth)
        }
    of_size = {
        k: errors[masks.sum(1) == k].astype(np.float64) for k in range(1, config.depth)
    }
    out[_MEAN] = {k: float(e.mean()) for k, e in of_size.items()}
    out[_BEST] = {k: float(e.min()) for k, e in of_size.items()}
    for k, width in _uniform(config).items():
        out[f"all at {width} bits"] = {k: float(same[width])}
    return out


def _widths(config: Config, scores: Any, k: int, higher: bool = True) -> np.ndarray:
    """Bits of each block, of which `k` have the low width."""
    mean = config.high - k * (config.high - config.low) / config.depth
    levels = config.low, config.high
    return allocate_bits(scores, mean, levels, higher_is_important=higher)


def _uniform(config: Config) -> dict[int, int]:
    """The one width that is as large as the mean, by the number of blocks at low."""
    span = config.high - config.low
    return {
        k: config.high - k * span // config.depth
        for k in range(1, config.depth)
        if k * span % config.depth == 0
    }


def _size(config: Config, params: Any, k: int) -> float:
    """Bits of a weight where `k` blocks have the low width, ranges and all."""
    layers = []
    for i, width in enumerate(_widths(config, np.arange(config.depth), k).tolist()):
        kernels = (params["layers"][name]["kernel"][i] for name in _SHAPES)
        layers.append([rtn(w, bits=width, group=config.group) for w in kernels])
    return bits_per_weight(layers)
