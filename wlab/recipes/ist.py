# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""IST: a quarter of the layers' adapters is trained in each step.

A residual net of eight layers reads digits; two of its layers are damaged, and LoRA on
every layer mends it: all layers in every step, two of them by importance (arXiv
2410.11772), two at random, or the two that were damaged. Then importance, learned with
all adapters trained, is held against what the suppression of one layer costs.
"""

import dataclasses
import functools
import pathlib
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import wlab
from wlab import data, peft
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
    """The net, the damage and the mending.

    Attributes:
      layers: of the residual net.
      width: of it.
      rank: of LoRA.
      damaged: layers whose kernels get a low-rank perturbation.
      steps: of Adam that mend.
      rate: learning rate.
      batch: digits in a step.
      probe: digits in the batch of a trial.
      interval: steps between two updates of importance.
      updates: of importance, for the comparison with what a layer is worth.
      points: measurements along a run.
      seeds: how many.
    """

    layers: int = 8
    width: int = 64
    rank: int = 4
    damaged: tuple[int, ...] = (2, 5)
    steps: int = 300
    rate: float = 3e-3
    batch: int = 256
    probe: int = 16
    interval: int = 10
    updates: int = 60
    points: int = 10
    seeds: int = 3


QUICK = Config(
    layers=4,
    width=32,
    damaged=(2,),
    steps=60,
    batch=64,
    updates=10,
    points=3,
    seeds=1,
)
_ALL, _IST, _RST, _ORACLE = "all layers", "IST", "RST, at random", "the damaged ones"


def run(
    config: Config,
    *,
    out: pathlib.Path | None = None,
    progress: bool = True,
    resume: bool = False,
) -> Report:
    """Mend a damaged net with some of its adapters.

    Args:
      config: the setting.
      out: where report.json and report.png go; None: nowhere.
      progress: whether to show a bar on a terminal.
      resume: whether to go on with the run that `out` holds.

    Returns:
      The report.
    """
    if config.steps % config.points or config.seeds < 1:
        raise ValueError(
            f"steps={config.steps} must be a multiple of points={config.points}, and "
            f"seeds={config.seeds} positive"
        )
    if max(config.damaged) >= config.layers:
        raise ValueError(f"damaged={config.damaged} of {config.layers} layers")
    bars = Progress(show=None if progress else False)
    with Run("ist", config, out, resume=resume) as kept, bars:
        bar, arms = bars.add("arms", 4), []
        for done, name in enumerate((_ALL, _IST, _RST, _ORACLE), 1):
            made = kept.once(name, functools.partial(_mend, config, name))
            bar(done, {"loss": float(np.mean(made["figures"]["loss"]))})
            steps = np.linspace(0, config.steps, config.points + 1).tolist()
            arms.append(
                Arm(
                    name,
                    made["figures"],
                    curves={"loss": Curve(steps, made["curve"])},
                    baseline=name != _IST,
                )
            )
        worth = kept.once("worth", functools.partial(_worth, config))
        report = Report(
            recipe="ist",
            title=f"A net of {config.layers} layers, two of them damaged",
            claim=(
                "A quarter of the layers in each step, drawn by importance, mends what "
                "all of them mend."
            ),
            config=dataclasses.asdict(config),
            seeds=range(config.seeds),
            metrics={
                "loss": Metric("training loss", "", format=".4f"),
                "accuracy": Metric("accuracy", "", False, ".1%"),
                "touched": Metric("layers trained in a step", "", None, ".0f"),
            },
            arms=arms,
            started=kept.watch.started,
            seconds=kept.watch.seconds,
            findings=_findings({arm.name: arm for arm in arms}, worth["correlation"]),
        )
        if out is not None:
            report.save(out, figure=figure)
    return report


def figure(report: Report) -> "Figure":
    """The loss over training, and the accuracy against the layers of a step."""
    return curves_and_tradeoff(
        report, curve="loss", x_metric="touched", y_metric="accuracy", log_y=False
    )


def _findings(arms: dict[str, Arm], correlation: list[float]) -> list[Finding]:
    ours, whole, chance = (arms[n] for n in (_IST, _ALL, _RST))
    return [
        Finding(
            "a quarter of the layers in each step is within 2 points of all of them",
            ours.mean("accuracy") >= whole.mean("accuracy") - 0.02,
            f"{ours.mean('accuracy'):.1%}, all {whole.mean('accuracy'):.1%}",
        ),
        Finding(
            "importance goes with what a layer's suppression costs (rank correlation "
            "above 0.4)",
            float(np.mean(correlation)) > 0.4,
            ", ".join(f"{x:.2f}" for x in correlation),
        ),
        Finding(
            "importance mends better than chance (a tie in the card's trial)",
            ours.mean("loss") < chance.mean("loss"),
            f"{ours.mean('loss'):.4f}, at random {chance.mean('loss'):.4f}",
        ),
    ]


@functools.cache
def _digits() -> Any:
    split = jax.tree.map(jnp.asarray, data.digits())
    return split._replace(
        train_x=split.train_x.reshape(-1, 64), valid_x=split.valid_x.reshape(-1, 64)
    )


def _net(params: Any, x: jax.Array) -> jax.Array:
    """A residual net; its layers are stacked."""

    def layer(x: jax.Array, kernel: Any) -> tuple[jax.Array, None]:
        return x + jax.nn.relu(x @ kernel), None

    x = x @ params["first"]["kernel"]
    x, _ = jax.lax.scan(layer, x, params["ScanLayers"]["kernel"])
    return x @ params["head"]["kernel"]


def _loss(params: Any, i: jax.Array) -> jax.Array:
    split = _digits()
    logits = wlab.lift(_net)(params, split.train_x[i])
    return optax.softmax_cross_entropy_with_integer_labels(
        logits, split.train_y[i]
    ).mean()


def _index(key: jax.Array, n: int) -> jax.Array:
    return jax.random.randint(key, (n,), 0, len(_digits().train_y))


def _damaged(config: Config, key: jax.Array) -> Any:
    """A trained net with a low-rank perturbation in some of its layers."""
    n, d = config.layers, config.width
    keys = jax.random.split(key, 6)
    params = {
        "first": {"kernel": jax.random.normal(keys[0], (64, d)) / 8},
        "ScanLayers": {
            "kernel": jax.random.normal(keys[1], (n, d, d)) * (0.5 / d**0.5)
        },
        "head": {"kernel": jax.random.normal(keys[2], (d, 10)) / d**0.5},
    }
    tx = optax.adam(1e-3)

    def step(carry: Any, key: jax.Array) -> tuple[Any, None]:
        params, state = carry
        grads = jax.grad(_loss)(params, _index(key, 256))
        updates, state = tx.update(grads, state)
        return (optax.apply_updates(params, updates), state), None

    carry = (params, tx.init(params))
    params = jax.lax.scan(step, carry, jax.random.split(keys[3], 400))[0][0]
    a, b = (jax.random.normal(k, (n, d, 2)) for k in jax.random.split(keys[4]))
    hit = jnp.zeros(n).at[jnp.asarray(config.damaged)].set(1)
    change = jnp.einsum("ldr,ler,l->lde", a, b, hit) / d
    kernel = params["ScanLayers"]["kernel"] + 1.5 * change
    return params | {"ScanLayers": {"kernel": kernel}}


@functools.cache
def _bases(config: Config) -> Any:
    """The damaged nets of all seeds."""
    keys = jax.vmap(_key)(jnp.arange(config.seeds))
    return jax.jit(jax.vmap(functools.partial(_damaged, config)))(keys)


def _key(seed: jax.Array) -> jax.Array:
    return jax.random.fold_in(jax.random.key(1), seed)


def _method(config: Config) -> peft.Reparam:
    return peft.lora(config.rank, select="ScanLayers/kernel")


def _mend(config: Config, name: str) -> dict[str, Any]:
    """Trains the adapters of all seeds at once."""
    method, n = _method(config), config.layers
    few = len(config.damaged)
    adam = optax.adam(config.rate)
    tx = peft.ist(adam, few / n, select="ScanLayers/*")
    split = _digits()

    def one(seed: jax.Array, base: Any) -> Any:
        key = _key(seed)
        adapter = method.init(key, base)

        def tree_of(train: Any, scale: Any = None) -> Any:
            if scale is not None:
                scale = {"ScanLayers/kernel": scale}
            return method.attach(adapter._replace(train=train), base, scale)

        def step(carry: Any, given: Any) -> tuple[Any, None]:
            train, state, known = carry
            key, count = given
            keys = jax.random.split(key, 3)
            grads = jax.grad(
                lambda t: _loss(tree_of(t), _index(keys[0], config.batch))
            )(train)
            if name in (_IST, _RST):
                extra = {"importance": known.importance} if name == _IST else {}
                updates, state = tx.update(grads, state, train, **extra)
            else:
                if name == _ORACLE:
                    hit = jnp.zeros(n).at[jnp.asarray(config.damaged)].set(1)
                    grads = jax.tree.map(lambda g: g * hit[:, None, None], grads)
                updates, state = adam.update(grads, state)
            train = optax.apply_updates(train, updates)
            if name == _IST:
                probe = _index(keys[1], config.probe)
                due = (count % config.interval == 0) & (count > 0)
                seen = peft.ist_probe(
                    keys[2], known, lambda scale: _loss(tree_of(train, scale), probe)
                )
                known = jax.tree.map(lambda a, b: jnp.where(due, a, b), seen, known)
            return (train, state, known), None

        def stretch(carry: Any, given: Any) -> tuple[Any, jax.Array]:
            carry, _ = jax.lax.scan(step, carry, given)
            return carry, whole(carry[0])

        def whole(train: Any) -> jax.Array:
            return _loss(tree_of(train), jnp.arange(len(split.train_y)))

        inner = tx if name in (_IST, _RST) else adam
        carry = (adapter.train, inner.init(adapter.train), peft.ist_init(n))
        keys = jax.random.split(jax.random.fold_in(key, 2), config.steps)
        given = (keys, jnp.arange(config.steps))
        given = jax.tree.map(lambda x: x.reshape(config.points, -1), given)
        first = whole(adapter.train)
        carry, rest = jax.lax.scan(stretch, carry, given)
        logits = wlab.lift(_net)(tree_of(carry[0]), split.valid_x)
        accuracy = (jnp.argmax(logits, -1) == split.valid_y).mean()
        return jnp.concatenate([first[None], rest]), accuracy

    seeds = jnp.arange(config.seeds)
    curve, accuracy = jax.device_get(jax.jit(jax.vmap(one))(seeds, _bases(config)))
    touched = n if name == _ALL else few
    figures = {"loss": curve[:, -1], "accuracy": accuracy, "touched": [touched]}
    return {"figures": figures, "curve": curve}


def _worth(config: Config) -> dict[str, Any]:
    """Rank correlation of learned importance with the cost of a layer's suppression."""
    method, n = _method(config), config.layers
    adam = optax.adam(config.rate)

    def one(seed: jax.Array, base: Any) -> Any:
        key = _key(seed)
        adapter = method.init(key, base)

        def loss(train: Any, i: jax.Array, scale: Any = None) -> jax.Array:
            if scale is not None:
                scale = {"ScanLayers/kernel": scale}
            tree = method.attach(adapter._replace(train=train), base, scale)
            return _loss(tree, i)

        def step(carry: Any, key: jax.Array) -> tuple[Any, None]:
            train, state = carry
            grads = jax.grad(loss)(train, _index(key, config.batch))
            updates, state = adam.update(grads, state)
            return (optax.apply_updates(train, updates), state), None

        keys = jax.random.split(jax.random.fold_in(key, 3), config.steps)
        carry = (adapter.train, adam.init(adapter.train))
        train = jax.lax.scan(step, carry, keys)[0][0]

        def update(state: Any, key: jax.Array) -> tuple[Any, None]:
            i = _index(key, 256)
            return peft.ist_probe(key, state, lambda s: loss(train, i, s)), None

        keys = jax.random.split(jax.random.fold_in(key, 4), config.updates)
        known = jax.lax.scan(update, peft.ist_init(n), keys)[0].importance
        every = jnp.arange(len(_digits().train_y))
        held = 1 - 0.75 * jnp.eye(n)
        cost = jax.vmap(lambda scale: loss(train, every, scale))(held)

        def ranks(x: jax.Array) -> jax.Array:
            return jnp.argsort(jnp.argsort(x)).astype(jnp.float32)

        return jnp.corrcoef(ranks(known), ranks(cost))[0, 1]

    seeds = jnp.arange(config.seeds)
    found = jax.device_get(jax.jit(jax.vmap(one))(seeds, _bases(config)))
    return {"correlation": found}
