# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""`Reparam`: what a weight is, as a function of what is trained in its place."""

from collections.abc import Callable
from typing import Any, NamedTuple


class Adapter(NamedTuple):
    """What a reparameterisation adds to a model.

    Only `train` is differentiated and optimised:
    ``jax.grad(lambda t: loss(adapter._replace(train=t)))(adapter.train)``. What is
    frozen follows from `key` and the parameters, so that a checkpoint can do without.
    """

    train: Any  # {path: arrays}, float32
    frozen: Any  # {path: arrays}: bases, indices, what the start took from the base
    key: Any  # typed key that `init` was given


class Reparam(NamedTuple):
    """Pure functions between parameters, what is trained, and the tree that runs.

    They are jitted, differentiated and mapped like any function of pytrees; `jax.vmap`
    over `adapter.train` runs many adapters on one base.
    """

    init: Callable[..., Any]
    """`init(key, params)` returns an `Adapter`; `params` may be abstract where the
    method does not look at the weights."""

    attach: Callable[..., Any]
    """`attach(adapter, params, scale=None)` returns the parameters with every target
    replaced: by a structured weight where that multiplies cheaper, else by an array.

    `params` are held constant. `scale` multiplies what the adapter adds: a number, or
    by path, ``{path: number or array of the stacked axes}``.
    """

    labels: Callable[..., Any]
    """`labels(train)` names the optimiser group of each trained leaf: the second
    argument of `optax.partition`."""

    specs: Callable[..., Any]
    """`specs(adapter, specs_of_params)` returns the mesh axes of each array of the
    adapter, from those of its base."""
