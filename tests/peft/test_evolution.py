# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Evolution of adapters alone: a population over one base that nobody copies."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import wlab
from wlab import es, peft, quant
from wlab.core import Reparam

MEMBERS, WIDTH, HIDDEN = 16, 12, 20
RNG = np.random.default_rng(0)
X = RNG.standard_normal((7, WIDTH)).astype(np.float32)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(WIDTH)(nn.tanh(nn.Dense(HIDDEN)(x)))


NET = Net()
PARAMS = jax.jit(NET.init)(jax.random.key(0), X)["params"]
WANT = np.tanh(X @ RNG.standard_normal((WIDTH, WIDTH)).astype(np.float32))
SEARCH = es.eggroll(0.1, rank=1)


def fitness(method: Reparam, adapter: Any, base: Any) -> Any:
    """Of the trained part, which may be structured; the model knows nothing of it."""

    def of(train: Any) -> jax.Array:
        tree = method.attach(adapter._replace(train=train), base)
        return -jnp.mean((wlab.lift(NET.apply)({"params": tree}, X) - WANT) ** 2)

    return wlab.lift(of)


def widest(jaxpr: Any) -> set[tuple[int, ...]]:
    """The shapes of all that a program makes, inner programs and all."""
    seen = {tuple(v.aval.shape) for e in jaxpr.eqns for v in e.outvars}
    for inner in jax.core.jaxprs_in_params({"all": [e.params for e in jaxpr.eqns]}):
        seen |= widest(inner)
    return seen


@pytest.mark.parametrize(
    "method",
    [peft.lora(3), peft.bone(4), peft.lora(3, dora=True)],
    ids=["lora", "bone", "dora"],
)
def test_a_population_of_adapters(method: Reparam):
    @jax.jit
    def begin() -> Any:
        adapter = method.init(jax.random.key(1), PARAMS)
        return adapter, SEARCH.init(jax.random.key(2), adapter.train)

    adapter, state = begin()
    fit = fitness(method, adapter, PARAMS)
    members = jnp.arange(MEMBERS)
    tx = optax.adam(0.03)

    @jax.jit
    def step(train: Any, state: Any, moments: Any) -> Any:
        def one(i: jax.Array) -> jax.Array:
            return fit(SEARCH.perturb(state, train, i))

        def dense(i: jax.Array) -> jax.Array:
            return fit(wlab.materialise(SEARCH.perturb(state, train, i)))

        found, want = jax.vmap(one)(members), jax.vmap(dense)(members)
        grads, state = SEARCH.update(state, train, found, members)
        updates, moments = tx.update(grads, moments, train)
        return optax.apply_updates(train, updates), state, moments, found, want

    train, moments = adapter.train, jax.jit(tx.init)(adapter.train)
    means = []
    for _ in range(30):
        train, state, moments, found, want = step(train, state, moments)
        np.testing.assert_allclose(found, want, rtol=1e-5)
        means.append(float(found.mean()))
    assert np.mean(means[-5:]) > 0.7 * means[0]
    assert len(set(np.asarray(found))) == MEMBERS


def test_no_member_has_a_kernel_of_its_own():
    """Also over a packed base, of which there is one."""
    method = peft.lora(3)
    base = jax.jit(lambda: quant.quantize_tree(PARAMS, "int8"))()
    adapter = jax.eval_shape(method.init, jax.random.key(1), base)
    fit = fitness(method, adapter, base)

    def run(train: Any) -> Any:
        state = SEARCH.init(jax.random.key(2), train)
        return jax.vmap(lambda i: fit(SEARCH.perturb(state, train, i)))(jnp.arange(16))

    train = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), adapter.train)
    made = widest(jax.make_jaxpr(run)(train).jaxpr)
    assert (MEMBERS, WIDTH, 3) in made or (MEMBERS, len(X), 3) in made
    for kernel in ((WIDTH, HIDDEN), (HIDDEN, WIDTH)):
        assert (MEMBERS, *kernel) not in made
