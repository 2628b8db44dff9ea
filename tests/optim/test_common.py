# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""What every optimiser must do. A new one enters by a line in `TABLE`."""

import functools
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import wlab
from wlab.core import map_with_path
from wlab.optim import eco, eco_muon, eco_sgd
from wlab.quant import Quantized, quantize_tree
from wlab.train import Checkpoints


class Entry(NamedTuple):
    """An optimiser, and the form of the parameters that it is given."""

    make: Callable[[], optax.GradientTransformation]
    form: Callable[[Any], Any]  # from dense parameters to those that it trains
    left: float  # share of the quadratic's loss that may be left after the run


def packed(grid: str, **options: Any) -> Callable[[Any], Any]:
    return lambda params: quantize_tree(params, grid, **options)


def on_grid(grid: str, **options: Any) -> Callable[[Any], Any]:
    """Dense, with the values of the packed form."""
    return lambda params: wlab.materialise(quantize_tree(params, grid, **options))


TABLE = {
    "eco-fp8": Entry(lambda: eco(0.05), on_grid("fp8_e4m3"), 0.02),
    "eco-fp8-stochastic-packed": Entry(
        lambda: eco(0.05, rounding="stochastic"), packed("fp8_e4m3"), 0.02
    ),
    "eco-int4-packed": Entry(
        lambda: eco(0.05, grid="int4"), packed("int4", granularity="tensor"), 0.1
    ),
    "eco_sgd-int8-packed": Entry(
        lambda: eco_sgd(0.05, grid="int8"), packed("int8"), 0.02
    ),
    "eco_sgd-exact": Entry(
        lambda: eco_sgd(0.05, injection="exact"), on_grid("fp8_e4m3"), 0.02
    ),
    "eco_muon-packed": Entry(lambda: eco_muon(0.05), packed("fp8_e4m3"), 0.1),
    "eco_muon": Entry(lambda: eco_muon(0.05), on_grid("fp8_e4m3"), 0.1),
}

SPECS = {
    "up": {"kernel": jax.P(None, "model"), "bias": jax.P("model")},
    "down": {"kernel": jax.P("data", "model")},
    "blocks": {"kernel": jax.P(None, "data", "model")},
}
SHAPES = {
    "up": {"kernel": (8, 12), "bias": (12,)},
    "down": {"kernel": (12, 8)},
    "blocks": {"kernel": (3, 8, 4)},  # stacked layers
}
STEPS = 60


def random_params(seed: int) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32),
        SHAPES,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def make_step(tx: Any) -> Callable[..., Any]:
    """A step towards the target on the sum of squares."""

    def step(params: Any, state: Any, target: Any) -> Any:
        grads = jax.tree.map(
            lambda w, t: w - t.astype(w.dtype), wlab.materialise(params), target
        )
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def distance(params: Any, target: Any) -> float:
    return float(optax.tree.norm(optax.tree.sub(wlab.materialise(params), target))) ** 2


def copy(tree: Any) -> Any:
    return jax.tree.map(jnp.copy, tree)


class Run:
    """One entry, its compiled step, and a run of it that the tests look at."""

    def __init__(self, entry: Entry):
        self.entry = entry
        self.tx = entry.make()
        self.target = random_params(1)
        self.traces = 0
        step = make_step(self.tx)

        def counted(*args: Any) -> Any:
            self.traces += 1
            return step(*args)

        self.step = jax.jit(counted, donate_argnums=(0, 1))
        self.pack = jax.jit(entry.form)

    def start(self, seed: int = 0) -> tuple[Any, Any]:
        params = self.pack(random_params(seed))
        return copy((params, self.tx.init(params)))

    def go(self, params: Any, state: Any, steps: int) -> tuple[Any, Any]:
        """A run; what is given stays as it is."""
        params, state = copy((params, state))
        for _ in range(steps):
            params, state = self.step(params, state, self.target)
        return params, state


@functools.cache
def run_of(name: str) -> Run:
    return Run(TABLE[name])


@pytest.fixture(params=list(TABLE))
def run(request: pytest.FixtureRequest) -> Run:
    return run_of(request.param)


def assert_same(got: Any, want: Any, tol: float = 0.0) -> None:
    """Equal trees of arrays, keys and narrow integers, to a tolerance."""
    assert jax.tree.structure(got) == jax.tree.structure(want)

    def plain(x: Any) -> np.ndarray:
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x = jax.random.key_data(x)
        return np.asarray(x, np.float64)

    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        np.testing.assert_allclose(plain(a), plain(b), rtol=tol, atol=tol)


def test_converges_on_a_quadratic(run: Run):
    start, state = run.start()
    end, _ = run.go(start, state, STEPS)
    left = distance(end, run.target) / distance(start, run.target)
    print(left)
    assert left < run.entry.left


def test_second_call_does_not_compile_again(run: Run):
    """Nor do shapes, dtypes or weak types of parameters and state ever change."""
    params, state = run.start()
    run.go(params, state, 2)
    assert run.traces == 1
