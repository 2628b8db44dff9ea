# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning a few layers at a time: what LISA reaches, and with how much memory.

A residual network learns to predict the next token from two, of one random source, and
is then fine-tuned on another. Against full fine-tuning stand LISA with its three
treatments of moments, the same number of layers but never drawn anew, the ends alone,
and low-rank adapters with as many bytes of state (arXiv 2403.17919).
"""

import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from wlab import optim
from wlab.core import Layered, LowRank, bits, layered_value_and_grad, lift
from wlab.recipes import (
    Arm,
    Curve,
    Finding,
    Metric,
    Report,
    Stopwatch,
    curves_and_tradeoff,
)
from wlab.train import Progress

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True)
class Config:
    """A source, a network, and a fine-tuning to another source.

    Attributes:
      vocab: number of tokens; a context is a pair of them.
      width: of the network.
      hidden: width inside a layer.
      depth: number of layers.
      batch: examples in a batch.
      pretrain_steps: steps on the first source.
      pretrain_rate: learning rate there.
      steps: steps of fine-tuning.
      rates: learning rates of fine-tuning, each with a cosine to zero, that every arm
        is swept over; the one that is best on average over seeds counts.
      active: layers that LISA trains at a time.
      interval: steps from one draw to the next.
      old: share of the first source in the second.
      seeds: how many seeds, each with its own sources and network.
    """

    vocab: int = 32
    width: int = 64
    hidden: int = 64
    depth: int = 8
    batch: int = 256
    pretrain_steps: int = 1500
    pretrain_rate: float = 2e-3
    steps: int = 1000
    rates: tuple[float, ...] = (3e-3, 1e-2, 3e-2)
    active: int = 2
    interval: int = 50
    old: float = 0.1
    seeds: int = 3


QUICK = Config(
    vocab=10,
    width=24,
    hidden=24,
    depth=4,
    batch=64,
    pretrain_steps=200,
    steps=200,
    active=1,
    interval=20,
    rates=(3e-3,),
    seeds=2,
)

_FULL, _STATIC, _ENDS, _LORA = "full", "static layers", "ends only", "LoRA, equal state"
_LISA: dict[str, Any] = {
    "LISA reset layers": "reset_layers",
    "LISA reset all": "reset_all",
    "LISA keep": "keep",
}
_NEW, _ANEW, _KEEP = _LISA
_ARMS = (_FULL, *_LISA, _STATIC, _ENDS, _LORA)


class _Source(NamedTuple):
    """Next tokens after each pair: probabilities, [vocab * vocab, vocab]."""

    table: jax.Array

    def batch(self, config: Config, key: jax.Array) -> dict[str, jax.Array]:
        k_pair, k_next = jax.random.split(key)
        pair = jax.random.randint(k_pair, (config.batch,), 0, config.vocab**2)
        drawn = jax.random.categorical(k_next, jnp.log(self.table[pair]))
        return {"pair": pair, "next": drawn}


class _Method(NamedTuple):
    """One way of fine-tuning: what is trained, with which gradients and optimiser."""

    trained: Any
    grads: Callable[[Any, Any, Any], Any]  # of what is trained, its state, a batch
    tx: optax.GradientTransformationExtraArgs
    whole: Callable[[Any], Any]  # from what is trained to parameters


def run(
    config: Config, *, out: pathlib.Path | None = None, progress: bool = True
) -> Report:
    """Pretrain once for each seed, fine-tune by every arm and compare.

    Args:
      config: the setting.
      out: where report.json and report.png go; None: nowhere.
      progress: whether to show a bar on a terminal.

    Returns:
      The report.
    """
    _check(config)
    watch = Stopwatch.start()
    found: dict[str, list[list[dict[str, Any]]]] = {
        name: [[] for _ in config.rates] for name in _ARMS
    }
    before = []
    pretrain = jax.jit(functools.partial(_pretrain, config))
    tuners: dict[Any, Any] = {}
    with Progress(show=None if progress else False) as bars:
        bar = bars.add("seeds", steps=config.seeds)
        for seed in range(config.seeds):
            key = jax.random.key(seed)
            params, source = pretrain(key)
            before.append(float(_entropy(config, params, source)))
            for name in _ARMS:
                for runs, rate in zip(found[name], config.rates, strict=True):
                    tuned = _tune(config, name, rate, params, source, key, tuners)
                    runs.append(tuned)
            bar(seed + 1, {"loss": found[_FULL][0][-1]["loss"]})
    best = {name: min(by_rate, key=_mean) for name, by_rate in found.items()}
    arms = [_arm(config, name, best[name]) for name in _ARMS]
    report = Report(
        recipe="lisa",
        title=f"Fine-tuning {config.depth} layers, {config.active} at a time",
        claim=(
            "Training a few random layers at a time comes nearer to full fine-tuning "
            "than fixed ones or the ends alone, with the state of those few."
        ),
        config=dataclasses.asdict(config),
        seeds=range(config.seeds),
        metrics={
            "loss": Metric("cross entropy", "nats", format=".3f"),
            "state": Metric("state", "kB", format=".0f"),
            "grads": Metric("gradients", "kB", format=".0f"),
            "ms": Metric("time of a step", "ms", format=".2f"),
            "rate": Metric("best learning rate", "", None),
        },
        arms=arms,
        started=watch.started,
        seconds=watch.seconds,
        findings=_findings(best, before),
    )
    if out is not None:
        report.save(out, figure=figure)
    return report


def figure(report: Report) -> "Figure":
    """Loss over fine-tuning, and at the end against the bytes of state."""
    return curves_and_tradeoff(report, curve="loss", x_metric="state", y_metric="loss")


def _check(config: Config) -> None:
    if not 0 < config.active <= config.depth:
        raise ValueError(
            f"active={config.active} of depth={config.depth} layers cannot be trained"
        )
    if config.steps % config.interval or config.steps <= 0:
        raise ValueError(
            f"steps={config.steps} must be a multiple of interval={config.interval}"
        )
    if not config.rates or min(config.rates) <= 0 or config.seeds < 1:
        raise ValueError(f"rates={config.rates} and seeds={config.seeds}: positive")


# --- The network ------------------------------------------------------------------


def _init(config: Config, key: jax.Array) -> Any:
    keys = jax.random.split(key, 4)
    lecun = jax.nn.initializers.lecun_normal(batch_axis=0)
    shape = (config.depth, config.width, config.hidden)
    return {
        "embed": jax.random.normal(keys[0], (2, config.vocab, config.width)),
        "layers": {
            "norm": jnp.ones((config.depth, config.width)),
            "up": lecun(keys[1], shape),
            "down": lecun(keys[2], (shape[0], shape[2], shape[1])) / 4,
        },
        "norm": jnp.ones(config.width),
        "head": jax.random.normal(keys[3], (config.width, config.vocab)) / 8,
    }


def _normed(x: jax.Array, scale: jax.Array) -> jax.Array:
    mean = jnp.mean(jnp.square(x), -1, keepdims=True)
    return x * jax.lax.rsqrt(mean + 1e-6) * scale[None]


def _before(params: Any, batch: Any) -> jax.Array:
    vocab = params["embed"].shape[1]
    first, second = batch["pair"] // vocab, batch["pair"] % vocab
    return params["embed"][0][first] + params["embed"][1][second]


def _block(layer: Any, x: jax.Array, batch: Any) -> jax.Array:
    del batch
    inside = jax.nn.silu(_normed(x, layer["norm"]) @ layer["up"])
    return x + inside @ layer["down"]


def _logits(params: Any, x: jax.Array) -> jax.Array:
    return _normed(x, params["norm"]) @ params["head"]


def _after(params: Any, x: jax.Array, batch: Any) -> jax.Array:
    losses = optax.softmax_cross_entropy_with_integer_labels(
        _logits(params, x), batch["next"]
    )
    return losses.mean()


_PARTS = Layered(_before, _block, _after)


@lift
def _predict(params: Any, batch: Any) -> jax.Array:
    """The logits, for all layers in one scan; weights may be structured."""

    def step(x: jax.Array, layer: Any) -> Any:
        return _block(layer, x, batch), None

    x, _ = jax.lax.scan(step, _before(params, batch), params["layers"])
    return _logits(params, x)


def _loss(params: Any, batch: Any) -> jax.Array:
    losses = optax.softmax_cross_entropy_with_integer_labels(
        _predict(params, batch), batch["next"]
    )
    return losses.mean()


# --- The sources ------------------------------------------------------------------


def _source(config: Config, key: jax.Array) -> _Source:
    """Independent random probabilities after each pair: there is much to remember."""
    logits = 2 * jax.random.normal(key, (config.vocab**2, config.vocab))
    return _Source(jax.nn.softmax(logits))


def _entropy(config: Config, params: Any, source: _Source) -> jax.Array:
    """The exact cross entropy, over all pairs."""
    logits = _predict(params, {"pair": jnp.arange(config.vocab**2)})
    return -jnp.mean(jnp.sum(source.table * jax.nn.log_softmax(logits), -1))


def _pretrain(config: Config, key: jax.Array) -> tuple[Any, _Source]:
    """Parameters after the first source, and the second source."""
    k_init, k_first, k_second, k_batch = jax.random.split(key, 4)
    first, second = (_source(config, k) for k in (k_first, k_second))
    rate = optax.cosine_decay_schedule(config.pretrain_rate, config.pretrain_steps)
    tx = optax.adam(rate)
    params = _init(config, k_init)

    def step(t: jax.Array, carry: Any) -> Any:
        params, state = carry
        batch = first.batch(config, jax.random.fold_in(k_batch, t))
        updates, state = tx.update(jax.grad(_loss)(params, batch), state, params)
        return optax.apply_updates(params, updates), state

    carry = (params, tx.init(params))
    params, _ = jax.lax.fori_loop(0, config.pretrain_steps, step, carry)
    mixed = (1 - config.old) * second.table + config.old * first.table
    return params, _Source(mixed)


# --- The arms ---------------------------------------------------------------------


def _method(config: Config, name: str, rate: Any, params: Any, key: Any) -> _Method:
    """How an arm fine-tunes."""
    schedule = optax.cosine_decay_schedule(rate, config.steps)
    adam = optax.with_extra_args_support(optax.adam(schedule))
    grad_fn = layered_value_and_grad(_PARTS)
    if name == _FULL:
        return _Method(params, lambda p, s, b: jax.grad(_loss)(p, b), adam, lambda p: p)
    if name == _ENDS:
        ends = {k: x for k, x in params.items() if k != "layers"}

        def whole(ends: Any) -> Any:
            return ends | {"layers": params["layers"]}

        return _Method(ends, _grads_of(whole), adam, whole)
    if name == _LORA:
        factors, adapted = _adapters(config, params, key)
        return _Method(factors, _grads_of(adapted), adam, adapted)
    options: dict[str, Any] = {"k": config.active, "interval": config.interval}
    if name == _STATIC:
        # One draw for the whole run.
        options["interval"] = config.steps
    tx = optim.lisa(
        schedule, "layers", **options, state=_LISA.get(name, "reset_layers"), key=key
    )

    def chosen_alone(p: Any, state: Any, batch: Any) -> Any:
        return grad_fn(p, batch, chosen=state.active)[1]

    return _Method(params, chosen_alone, tx, lambda p: p)


def _grads_of(whole: Callable[[Any], Any]) -> Callable[[Any, Any, Any], Any]:
    def grads(trained: Any, state: Any, batch: Any) -> Any:
        del state
        return jax.grad(lambda t: _loss(whole(t), batch))(trained)

    return grads


def _adapters(config: Config, params: Any, key: Any) -> tuple[Any, Any]:
    """Factors of all layers' matrices, as many as LISA's state has room for."""
    size = {name: x[0].size for name, x in params["layers"].items()}
    ends = sum(x.size for x in jax.tree.leaves(params)) - config.depth * sum(
        size.values()
    )
    sides = config.width + config.hidden
    room = ends + config.active * sum(size.values())
    rank = max(1, room // (2 * config.depth * sides))
    factors = {}
    for i, name in enumerate(("up", "down")):
        depth, n_in, n_out = params["layers"][name].shape
        a = jax.random.normal(jax.random.fold_in(key, i), (depth, n_in, rank))
        b = jnp.zeros((depth, n_out, rank))
        factors[name] = {"a": a / n_in**0.5, "b": b}

    def adapted(factors: Any) -> Any:
        layers = dict(params["layers"])
        for name, f in factors.items():
            layers[name] = LowRank(layers[name], f["a"], f["b"])
        return params | {"layers": layers}

    return factors, adapted


def _tune(
    config: Config,
    name: str,
    rate: float,
    params: Any,
    source: _Source,
    key: jax.Array,
    tuners: dict[Any, Any],
) -> dict[str, Any]:
    """Fine-tunes by one arm: its loss, its course, its bytes and its time."""

    def tune(params: Any, source: _Source, key: jax.Array, rate: Any) -> jax.Array:
        k_method, k_batch = jax.random.split(jax.random.fold_in(key, 1))
        method = _method(config, name, rate, params, k_method)

        def step(t: jax.Array, carry: Any) -> Any:
            trained, state = carry
            batch = source.batch(config, jax.random.fold_in(k_batch, t))
            grads = method.grads(trained, state, batch)
            updates, state = method.tx.update(grads, state, trained)
            return optax.apply_updates(trained, updates), state

        def interval(carry: Any, t: jax.Array) -> Any:
            carry = jax.lax.fori_loop(t, t + config.interval, step, carry)
            return carry, _entropy(config, method.whole(carry[0]), source)

        carry = (method.trained, method.tx.init(method.trained))
        starts = jnp.arange(0, config.steps, config.interval)
        return jax.lax.scan(interval, carry, starts)[1]

    if name not in tuners:
        compiled = jax.jit(tune).lower(params, source, key, rate).compile()
        tuners[name] = compiled, *_bytes(config, name, params, key)
    compiled, state, grads = tuners[name]
    begun = time.perf_counter()
    course = np.asarray(compiled(params, source, key, rate))
    seconds = time.perf_counter() - begun
    return {
        "rate": rate,
        "loss": float(course[-1]),
        "course": course.tolist(),
        "state": state / 1e3,
        "grads": grads / 1e3,
        "ms": 1e3 * seconds / config.steps,
    }


def _bytes(config: Config, name: str, params: Any, key: Any) -> tuple[float, float]:
    """Bytes of the optimiser's state and of the gradients, from their leaves."""

    def both(params: Any) -> Any:
        method = _method(config, name, 1e-3, params, key)
        state = method.tx.init(method.trained)
        batch = {
            "pair": jnp.zeros(config.batch, jnp.int32),
            "next": jnp.zeros(config.batch, jnp.int32),
        }
        return state, method.grads(method.trained, state, batch)

    state, grads = jax.eval_shape(both, params)
    return bits.size_in_bits(state) / 8, bits.size_in_bits(grads) / 8


# --- What it shows ----------------------------------------------------------------


def _mean(runs: list[dict[str, Any]]) -> float:
    """Of the losses; one that is not finite rules its rate out."""
    mean = float(np.mean([run["loss"] for run in runs]))
    return mean if np.isfinite(mean) else float("inf")


def _arm(config: Config, name: str, runs: list[dict[str, Any]]) -> Arm:
    steps = range(config.interval, config.steps + 1, config.interval)
    return Arm(
        name,
        {
            **{key: [run[key] for run in runs] for key in ("loss", "ms")},
            # The same for all seeds.
            **{key: [runs[0][key]] for key in ("state", "grads", "rate")},
        },
        curves={"loss": Curve(list(steps), [run["course"] for run in runs])},
        baseline=name not in _LISA,
    )


def _findings(
    found: dict[str, list[dict[str, Any]]], before: list[float]
) -> list[Finding]:
    loss = {name: _mean(runs) for name, runs in found.items()}
    state = {name: runs[0]["state"] for name, runs in found.items()}

    def ahead(name: str, other: str, by: float) -> Finding:
        gap = loss[other] - loss[name]
        return Finding(
            f"{name} is better than {other} by {by:g} nats",
            gap >= by,
            f"{loss[name]:.3f} against {loss[other]:.3f}, {gap:+.3f}",
        )

    share = state[_NEW] / state[_FULL]
    return [
        Finding(
            "every arm learns",
            max(loss.values()) < float(np.mean(before)),
            f"before {np.mean(before):.3f}, full {loss[_FULL]:.3f}",
        ),
        ahead(_KEEP, _ENDS, 0.06),
        ahead(_KEEP, _STATIC, 0.02),
        ahead(_ANEW, _ENDS, 0.04),
        ahead(_NEW, _ENDS, 0.04),
        ahead(_NEW, _LORA, 0.0),
        Finding(
            "LISA's state is less than half of full fine-tuning's, unless it keeps all",
            share < 0.5 and abs(state[_KEEP] / state[_FULL] - 1) < 0.01,
            f"{share:.2f} of it",
        ),
    ]
