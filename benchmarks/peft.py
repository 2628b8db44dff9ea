# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""What adapters cost: ``uv run python benchmarks/peft.py``.

A stack of dense layers, one optimiser step each, all contenders in turn in one process:
full fine-tuning, every adapter, eight adapters in one vmap; then the forward pass of a
structured tree against that of the merged one, and the merge itself.
"""

import argparse
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from _measure import Contender, Row, bandwidth, matmul_rate, race, save, show

import wlab
from wlab import peft
from wlab.core import Reparam

METHODS: dict[str, Reparam] = {
    "lora r=16": peft.lora(16),
    "dora r=16": peft.lora(16, dora=True),
    "pissa r=16": peft.lora(16, start="pissa"),
    "bone r=16": peft.bone(16),
    "bat r=16": peft.bone(16, variant="bat"),
    "hut r=16": peft.hut(16, affine=False),
    "tera": peft.tera(),
    "randlora r=32": peft.randlora(32, alpha=32),
    "wara r=16": peft.wara(16),
    "s2ft 3%": peft.s2ft(0.03, select="*kernel"),
    "snell q=16": peft.snella(16, kernel="distance"),
}
EAGER = ("bat r=16", "hut r=16", "snell q=16")  # whose targets become arrays
TX = optax.adam(1e-3)


def model(params: Any, x: jax.Array) -> jax.Array:
    for layer in params.values():
        x = x + jax.nn.gelu(x @ layer["kernel"])
    return x


def base(width: int, depth: int) -> Any:
    keys = jax.random.split(jax.random.key(0), depth)
    return {
        f"dense_{i}": {"kernel": jax.random.normal(k, (width, width)) / width**0.5}
        for i, k in enumerate(keys)
    }


def loss_of(tree: Any, x: jax.Array) -> jax.Array:
    return jnp.mean(wlab.lift(model)(tree, x) ** 2)


def contender(name: str, method: Reparam, params: Any, many: int = 0) -> Contender:
    """A training step of one adapter, or of many at once; the base is an argument."""
    adapter = method.init(jax.random.key(1), params)
    train = adapter.train
    if many:
        train = jax.tree.map(lambda x: jnp.stack([x] * many), train)
    state = (jax.vmap(TX.init) if many else TX.init)(train)

    def one(train: Any, state: Any, params: Any, x: jax.Array) -> Any:
        def loss(train: Any) -> jax.Array:
            return loss_of(method.attach(adapter._replace(train=train), params), x)

        updates, state = TX.update(jax.grad(loss)(train), state)
        return optax.apply_updates(train, updates), state

    def step(carry: Any, inputs: Any) -> Any:
        train, state, params = carry
        fn = jax.vmap(one, (0, 0, None, None)) if many else one
        train, state = fn(train, state, params, inputs)
        return train, state, params

    count = sum(x.size for x in jax.tree.leaves(params))
    carry = (train, state, jax.tree.map(jnp.copy, params))
    return Contender(name, step, carry, state, count, baseline="full fine-tuning")


def full(params: Any) -> Contender:
    def step(carry: Any, inputs: Any) -> Any:
        params, state = carry
        updates, state = TX.update(jax.grad(loss_of)(params, inputs), state)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(jnp.copy, params)
    state = TX.init(params)
    count = sum(x.size for x in jax.tree.leaves(params))
    return Contender(
        "full fine-tuning",
        step,
        (params, state),
        state,
        count,
        baseline="full fine-tuning",
    )


def forward(name: str, fn: Callable[[Any, jax.Array], jax.Array], tree: Any, base: str):
    def step(carry: Any, inputs: Any) -> Any:
        tree, _ = carry
        return tree, jnp.sum(fn(tree, inputs))

    count = sum(x.size for x in jax.tree.leaves(wlab.materialise(tree)))
    carry = (jax.tree.map(jnp.copy, tree), jnp.zeros(()))
    return Contender(name, step, carry, (), count, baseline=base)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=pathlib.Path)
    args = parser.parse_args()
    params = base(args.width, args.depth)
    x = jax.random.normal(jax.random.key(2), (args.tokens, args.width))
    sections: dict[str, list[Row]] = {}

    roof = bandwidth()
    run = functools.partial(race, repeats=args.repeats, roof=roof)
    steps = [full(params), *(contender(n, m, params) for n, m in METHODS.items())]
    title = f"a step, {args.depth} layers of {args.width}, {args.tokens} tokens"
    sections[title] = run(steps, x)
    show(title, sections[title])

    few = x[: args.tokens // 8]
    lora = METHODS["lora r=16"]
    several = [
        contender("lora r=16, one", lora, params),
        contender("lora r=16, eight in one vmap", lora, params, many=8),
    ]
    for item in several:
        item.baseline = several[0].name
    title = f"eight adapters, {len(few)} tokens"
    sections[title] = run(several, few)
    show(title, sections[title])

    forwards = []
    for name in ("lora r=16", "dora r=16", "bone r=16", "wara r=16", "s2ft 3%"):
        method = METHODS[name]
        tree = method.attach(method.init(jax.random.key(1), params), params)
        merged = f"{name}, merged each time"
        forwards += [
            forward(merged, lambda t, x: model(wlab.materialise(t), x), tree, merged),
            forward(f"{name}, structured", wlab.lift(model), tree, merged),
        ]
    title = f"forward, {args.tokens} tokens"
    sections[title] = run(forwards, x)
    show(title, sections[title])
    if args.out:
        save(args.out, sections, matmul_flops=matmul_rate(), bandwidth=roof)


if __name__ == "__main__":
    main()
