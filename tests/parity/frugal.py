# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""FRUGAL against the authors' code in float64, with its draws and bases.

Weights have outputs in axis 0. Indices and bases are those in force at each step; for
what the library draws and decomposes itself see tests/optim/test_frugal.py.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tests.parity import Computed
from wlab.core import Draw, MatrixView
from wlab.optim import _frugal, frugal

TENSORS = range(4)
DRAWN = ("col_sign", "row_sgd", "randk_no", "col_keep", "lion_col", "sgdm_col")
INPUTS = (
    *("hyper", "b", "gb"),
    *(f"{name}{i}" for name in ("p", "g", "svd_basis") for i in TENSORS),
    *(f"{tag}_idx{i}" for tag in DRAWN for i in TENSORS),
)
TOLERANCE = 1e-12
VIEW = MatrixView((-1,), (-2,))

RUNS: dict[str, dict[str, Any]] = {
    "col_sign": {"projection": "columns"},
    "col_keep": {"projection": "columns", "reset": False},
    "row_sgd": {"projection": "rows", "inactive": "sgd"},
    "randk_no": {"projection": "randk", "inactive": "none"},
    "svd_sign": {"projection": "svd"},
    "svd_no_keep": {"projection": "svd", "inactive": "none", "reset": False},
    "block_desc": {"order": "descending"},
    "block_asc_sgd": {"order": "ascending", "inactive": "sgd"},
    "lion_col": {"projection": "columns", "inner": "lion"},
    "sgdm_col": {"projection": "columns", "inactive": "sgd"},
}


def compute(inputs: Mapping[str, np.ndarray]) -> dict[str, Computed]:
    out: dict[str, Computed] = {}
    for tag in RUNS:
        params, choices = trajectory(inputs, tag)
        for i in TENSORS:
            out[f"{tag}_out{i}"] = Computed(params[f"p{i}"], TOLERANCE)
            if tag.startswith("block"):
                active = (np.asarray(choices["p0"]) == i).any(1).astype(int)
                out[f"{tag}_active{i}"] = Computed(active, 0.0)
        out[f"{tag}_outb"] = Computed(params["b"], TOLERANCE)
    return out


def trajectory(
    inputs: Mapping[str, np.ndarray], tag: str, dtype: Any = None, **changes: Any
) -> tuple[Any, Any]:
    """Parameters after each step, and the choice in force, of one run."""
    names = [f"p{i}" for i in TENSORS]
    lr, wd, b1, b2, eps, gap, density, *scales = inputs["hyper"].tolist()
    options = {"views": {"p*": VIEW}, "select": "p*", **RUNS[tag]}
    known: dict[str, np.ndarray] = {}
    if tag in DRAWN:
        options["order"] = recorded
        known = {f"p{i}": inputs[f"{tag}_idx{i}"] for i in TENSORS}
    if tag == "randk_no":
        # Entries are counted from the inputs on, and there from the outputs on.
        for name in names:
            rows, columns = np.divmod(known[name], inputs[name].shape[1])
            known[name] = columns * inputs[name].shape[0] + rows
    if tag == "sgdm_col":
        options |= {"inner": momentum(0.9, False), "rest": momentum(0.9, True)}
    if tag.startswith("svd"):
        known = {f"p{i}": np.swapaxes(inputs[f"svd_basis{i}"], 1, 2) for i in TENSORS}
    options |= changes
    tx = frugal(lr, density, int(gap), b1, b2, eps, wd, *scales, **options)

    def cast(tree: Any) -> Any:
        return jax.tree.map(lambda x: jnp.asarray(x, dtype or x.dtype), tree)

    def step(carry: Any, xs: Any) -> Any:
        params, state = carry
        grads, now = xs
        updates, state = tx.update(grads, state, params, recorded=now)
        params = optax.apply_updates(params, updates)
        return (params, state), (params, state[0].choice)

    params = cast({name: inputs[name] for name in (*names, "b")})
    grads = cast({name: inputs[f"g{name[1:]}"] for name in names} | {"b": inputs["gb"]})
    if tag.startswith("svd"):
        known = cast(known)
    bases = mock.patch.dict(_frugal._CUTS, {"svd": recorded_bases})
    if tag.startswith("svd") and not changes:
        with bases:
            return run(step, params, tx, (grads, known))
    return run(step, params, tx, (grads, known))


def run(step: Any, params: Any, tx: Any, xs: Any) -> tuple[Any, Any]:
    return jax.jit(lambda p, xs: jax.lax.scan(step, (p, tx.init(p)), xs)[1])(params, xs)


def recorded(draw: Draw) -> jax.Array:
    return draw.extra["recorded"][draw.name]


@dataclasses.dataclass(frozen=True)
class RecordedBasis(_frugal._Basis):
    """A basis of the authors' code in the place of an own one."""

    def choose(self, rule: Any, draw: Draw, grads: Any) -> jax.Array:
        return recorded(draw)


def recorded_bases(leaves: Any, density: float) -> Sequence[Any]:
    made = _frugal._bases("svd")(leaves, density)
    return [RecordedBasis(**vars(pool)) for pool in made]


def momentum(decay: float, regular: bool) -> optax.GradientTransformation:
    """SGDM as the authors' code begins it: with a gradient or a weight.

    The buffer of a projected tensor begins as its gradient, that of a regular one as
    the parameter.
    """

    def init(params: Any) -> Any:
        buffer = params if regular else optax.tree.zeros_like(params)
        return buffer, jnp.asarray(not regular)

    def update(grads: Any, state: Any, params: Any = None) -> Any:
        del params
        buffer, first = state
        buffer = jax.tree.map(lambda m, g: jnp.where(first, g, m), buffer, grads)
        buffer = jax.tree.map(lambda m, g: decay * m + g, buffer, grads)
        return buffer, (buffer, jnp.asarray(False))

    return optax.GradientTransformation(init, update)
