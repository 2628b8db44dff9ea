# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Digits on electronic synapses: what bent device responses cost, by scheme.

A network of one hidden layer learns online, each weight a pair of devices that single
pulses move. Linear devices serve every scheme; where the response bends, pulses in one
direction only keep the most, and unlike devices cost little (arXiv 1707.06381).
"""

import dataclasses
import functools
import pathlib
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from wlab import data
from wlab.optim import synapse
from wlab.recipes import Arm, Curve, Finding, Metric, Report, Stopwatch
from wlab.train import Progress

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True)
class Config:
    """The network, its devices, and the course of learning.

    Attributes:
      curvatures: of the devices' response, inf for a linear one; all run together.
      levels: pulses from an empty to a full conductance.
      w_max: weight of a full conductance.
      hidden: width of the hidden layer.
      epochs: passes over the images, one image at a time.
      images: how many of the 1500 images are learned; None: all.
      thresholds: of input times error, over which there is a pulse, by layer.
      refresh_every: images from one refresh to the next.
      sigma: standard deviation of each device's curvature and levels, in parts of the
        nominal ones, in the arm of unlike devices.
      rates: learning rates of the software's SGD, swept.
      seeds: how many seeds; all run together.
    """

    curvatures: tuple[float, ...] = (float("inf"), 2.0, 1.0, 0.5, 0.2)
    levels: float = 64.0
    w_max: float = 1.0
    hidden: int = 100
    epochs: int = 3
    images: int | None = None
    thresholds: tuple[float, float] = (0.02, 0.1)
    refresh_every: int = 10
    sigma: float = 0.2
    rates: tuple[float, ...] = (0.02, 0.05, 0.1, 0.2)
    seeds: int = 8


QUICK = Config(
    curvatures=(float("inf"), 1.0),
    hidden=48,
    epochs=2,
    images=800,
    rates=(0.1,),
    seeds=2,
)

_SOFTWARE, _UNLIKE = "software SGD", "unidirectional, unlike devices"
_SCHEMES: dict[str, synapse.Scheme] = {
    "unidirectional": "unidirectional",
    "bidirectional pair": "pair",
    "bidirectional single": "single",
}
_OURS, *_OTHERS = _SCHEMES


def run(
    config: Config, *, out: pathlib.Path | None = None, progress: bool = True
) -> Report:
    """Train every scheme on every device, and the same network in software.

    Args:
      config: the setting.
      out: where report.json and report.png go; None: nowhere.
      progress: whether to show a bar on a terminal.

    Returns:
      The report.
    """
    _check(config)
    watch = Stopwatch.start()
    split = data.digits()
    keys = jax.vmap(jax.random.key)(jnp.arange(config.seeds))
    k_start, k_order = jax.vmap(jax.random.split, out_axes=1)(keys)
    # Outside of the compiled runs, whose compilation it would fill.
    examples = jax.jit(jax.vmap(functools.partial(_examples, config, split)))(k_order)
    curvatures = jnp.asarray(config.curvatures)
    arms = {name: (scheme, 0.0) for name, scheme in _SCHEMES.items()}
    arms[_UNLIKE] = (_SCHEMES[_OURS], config.sigma)
    starts = {
        name: jax.jit(jax.vmap(functools.partial(_start, config, *arm)))(k_start)
        for name, arm in arms.items()
    }
    found: dict[str, np.ndarray] = {}
    with Progress(show=None if progress else False) as bars:
        bar = bars.add("arms", steps=len(arms) + 1)
        for name, (scheme, _) in arms.items():
            one = functools.partial(_hardware, config, split, scheme)
            found[name] = _swept(one, curvatures, starts[name], examples)
            bar(len(found), {})
        one = functools.partial(_software, split)
        rates = jnp.asarray(config.rates)
        found[_SOFTWARE] = _swept(one, rates, starts[_OURS], examples)
        bar(len(found), {})
    made = [_arm(config, name, values) for name, values in found.items()]
    report = Report(
        recipe="synapse",
        title=f"Digits on synapses of {config.levels:g} levels, learned online",
        claim=(
            "Linear devices learn as well as software; on bent ones pulses in one "
            "direction keep the most, and unlike devices cost little."
        ),
        config=dataclasses.asdict(config),
        seeds=range(config.seeds),
        metrics={
            **{
                _metric(a): Metric(f"A = {a:g}", "accuracy", False, ".3f")
                for a in config.curvatures
            },
            "accuracy": Metric("held-out accuracy", lower_is_better=False),
        },
        arms=made,
        started=watch.started,
        seconds=watch.seconds,
        findings=_findings(config, {arm.name: arm for arm in made}),
    )
    if out is not None:
        report.save(out, figure=figure)
    return report


def figure(report: Report) -> "Figure":
    """Accuracy over how bent the devices are, seed by seed and in the mean."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from wlab.recipes._figures import styles

    figure = Figure(figsize=(16, 7), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(report.title, fontsize=16)
    left, right = figure.subplots(1, 2, width_ratios=(1.0, 1.3))
    look = styles(report)
    # None is what JSON makes of infinity.
    curvatures = [np.inf if a is None else a for a in report.config["curvatures"]]
    levels = report.config["levels"]
    count = np.arange(levels + 1)
    for a in curvatures:
        device = synapse.Device(a, levels)
        left.plot(count, synapse.response(count, device), lw=2, label=f"A = {a:g}")
    left.set_xlabel("pulses from empty", fontsize=13)
    left.set_ylabel("conductance", fontsize=13)
    places = np.arange(len(curvatures))
    for arm in report.arms:
        values = np.asarray(arm.curves["accuracy"].values)
        style = look[arm.name] | ({"linestyle": ":"} if arm.name == _SOFTWARE else {})
        label = arm.name + " (baseline)" * arm.baseline
        right.plot(places, values.mean(0), **style, lw=2, label=label)
        right.plot(places, values.T, style["marker"], color=style["color"], alpha=0.3)
    right.set_xticks(places, [f"{a:g}" for a in curvatures])
    right.set_xlabel("A of the response: from linear to strongly bent", fontsize=13)
    right.set_ylabel(report.metrics["accuracy"].title, fontsize=13)
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.tick_params(labelsize=12)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=12, frameon=False)
    return figure


def _check(config: Config) -> None:
    for name in ("curvatures", "rates", "thresholds"):
        if not getattr(config, name) or min(getattr(config, name)) <= 0:
            raise ValueError(f"{name}={getattr(config, name)} must be positive numbers")
    for name in ("levels", "w_max", "hidden", "epochs", "refresh_every", "seeds"):
        if getattr(config, name) <= 0:
            raise ValueError(f"{name}={getattr(config, name)} must be positive")
    if config.images is not None and not 0 < config.images <= 1500:
        raise ValueError(f"images={config.images} must lie between 1 and 1500")


def _swept(one: Any, settings: jax.Array, *by_seed: Any) -> np.ndarray:
    """[settings, seeds], all in one compiled run."""
    over_seeds = jax.vmap(one, (None, 0, 0))
    return np.asarray(
        jax.jit(jax.vmap(over_seeds, (0, None, None)))(settings, *by_seed)
    )


def _examples(
    config: Config, split: data.Split, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Images and targets in the order in which they are learned."""
    n = config.images or len(split.train_y)
    x = jnp.asarray(split.train_x[:n].reshape(n, -1))
    t = jax.nn.one_hot(split.train_y[:n], 10)
    keys = jax.random.split(key, config.epochs)
    order = jax.vmap(lambda k: jax.random.permutation(k, n))(keys).reshape(-1)
    return x[order], t[order]


def _accuracy(split: data.Split, weights: Any) -> jax.Array:
    x = jnp.asarray(split.valid_x.reshape(len(split.valid_y), -1))
    found = synapse.hardware_mlp(weights, x).argmax(-1)
    return jnp.mean(found == jnp.asarray(split.valid_y))


def _start(
    config: Config, scheme: synapse.Scheme, sigma: float, key: jax.Array
) -> list[synapse.Synapse]:
    """Conductances, and devices of a curvature of one."""
    nominal: Any = synapse.Device(1.0, config.levels, config.w_max)
    out = []
    for i, shape in enumerate([(65, config.hidden), (config.hidden + 1, 10)]):
        k_start, *ks = jax.random.split(jax.random.fold_in(key, i), 3)
        device = nominal
        if sigma:
            device = tuple(synapse.vary(k, nominal, shape, sigma) for k in ks)
        out.append(synapse.init_conductance(k_start, shape, device, scheme))
    return out


def _hardware(
    config: Config,
    split: data.Split,
    scheme: synapse.Scheme,
    curvature: jax.Array,
    start: list[synapse.Synapse],
    examples: tuple[jax.Array, jax.Array],
) -> jax.Array:
    """Held-out accuracy after learning on the devices."""

    def bent(w: synapse.Synapse) -> synapse.Synapse:
        plus, minus = (d._replace(curvature=d.curvature * curvature) for d in w.device)
        return dataclasses.replace(w, device=(plus, minus))

    weights = synapse.train_online(
        [bent(w) for w in start],
        *examples,
        config.thresholds,
        scheme,
        refresh_every=config.refresh_every,
    )
    return _accuracy(split, weights)


def _software(
    split: data.Split,
    rate: jax.Array,
    start: list[synapse.Synapse],
    examples: tuple[jax.Array, jax.Array],
) -> jax.Array:
    """The same network, start, order and gates, with SGD on ordinary numbers."""

    def step(weights: Any, example: Any) -> Any:
        grads = jax.grad(
            lambda w, x, t: synapse.hardware_loss(synapse.hardware_mlp(w, x), t)
        )(weights, *example)
        return jax.tree.map(lambda w, g: w - rate * g, weights, grads), None

    weights, _ = jax.lax.scan(step, [w.materialise() for w in start], examples)
    return _accuracy(split, weights)


# --- What it shows ----------------------------------------------------------------


def _metric(curvature: float) -> str:
    return f"accuracy_{curvature:g}"


def _arm(config: Config, name: str, found: np.ndarray) -> Arm:
    settings: dict[str, Any] = {}
    if name == _SOFTWARE:
        # It has no devices: its best rate stands beside all of them.
        best = int(np.argmax(found.mean(-1)))
        settings = {"rate": config.rates[best], "means": found.mean(-1).tolist()}
        found = np.broadcast_to(found[best], (len(config.curvatures), config.seeds))
    places = range(len(config.curvatures))
    return Arm(
        name,
        {
            _metric(a): values.tolist()
            for a, values in zip(config.curvatures, found, strict=True)
        },
        settings,
        curves={"accuracy": Curve(places, found.T.tolist())},
        baseline=name in (_SOFTWARE, *_OTHERS),
    )


def _findings(config: Config, arms: dict[str, Arm]) -> list[Finding]:
    linear, bent = float("inf"), config.curvatures

    def mean(name: str, curvature: float) -> float:
        return arms[name].mean(_metric(curvature))

    out = []
    if linear in bent:
        ours, software = mean(_OURS, linear), mean(_SOFTWARE, linear)
        out.append(
            Finding(
                "linear devices, unidirectional: within 0.03 of software SGD",
                ours >= software - 0.03,
                f"{ours:.3f}; {software:.3f} at rate "
                f"{arms[_SOFTWARE].settings['rate']:g}",
            )
        )
    for curvature, margin in ((1.0, 0.04), (0.5, 0.1)):
        if curvature in bent:
            ours = mean(_OURS, curvature)
            others = {name: mean(name, curvature) for name in _OTHERS}
            out.append(
                Finding(
                    f"A = {curvature:g}: unidirectional is {margin:g} better than the "
                    "best of the others",
                    ours - max(others.values()) >= margin,
                    f"{ours:.3f}; "
                    + ", ".join(f"{n} {value:.3f}" for n, value in others.items()),
                )
            )
    if 0.2 in bent:
        best = max((mean(name, 0.2), name) for name in _SCHEMES)
        out.append(
            Finding(
                "A = 0.2: no scheme reaches 0.3",
                best[0] < 0.3,
                f"the best, {best[1]}, {best[0]:.3f}",
            )
        )
    if 1.0 in bent:
        alike, unlike = mean(_OURS, 1.0), mean(_UNLIKE, 1.0)
        out.append(
            Finding(
                "A = 1: unlike devices cost the unidirectional scheme less than 0.03",
                alike - unlike < 0.03,
                f"{unlike:.3f} with a spread of {config.sigma:g}, {alike:.3f} without",
            )
        )
    return out
