# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""The state of a run on a mesh: where it lives, and how it is made there."""

from collections.abc import Callable
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from wlab.core import sharding
from wlab.train._step import TrainState, init_state

__all__ = ["abstract_state", "create_state"]


def abstract_state(
    make_params: Callable[[], Any],
    tx: optax.GradientTransformation,
    mesh: Mesh,
    *,
    rules: sharding.Rules = (),
) -> TrainState:
    """Shapes, dtypes and places of the state of a run; nothing is computed.

    Parameters are placed by `wlab.core.sharding.specs`, the optimiser's state where
    the types of its `init` say.

    Args:
        make_params: makes the parameters, packed ones too, such as
            ``lambda: model.init(key, tokens)["params"]``.
        tx: the optimiser.
        mesh: where the run lives.
        rules: patterns over paths and specs, for what shall be placed otherwise.

    Returns:
        A state of `jax.ShapeDtypeStruct`, which `Checkpoints.restore` takes as its
        template.

    Raises:
        ValueError: for a rule that does not fit; see `wlab.core.sharding.specs`.
    """
    params = jax.eval_shape(make_params)
    placed = sharding.shardings(params, mesh, rules)
    places = sharding.derive(lambda p: init_state(p, tx), params, placed)
    shapes = jax.eval_shape(lambda p: init_state(p, tx), params)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, places
    )


def create_state(
    make_params: Callable[[], Any],
    tx: optax.GradientTransformation,
    mesh: Mesh,
    *,
    rules: sharding.Rules = (),
) -> TrainState:
    """The state before the first step, made on the mesh.

    Every device computes its own part, so that no device and no host ever holds the
    whole. The numbers are those of one device.

    Args:
        make_params: as in `abstract_state`.
        tx: the optimiser.
        mesh: where the run lives.
        rules: as in `abstract_state`.

    Returns:
        The state, in the places that `abstract_state` says.

    Examples:
        >>> mesh = sharding.make_mesh(devices=jax.devices()[:1])
        >>> ones = lambda: {"w": jax.numpy.ones((4, 2))}
        >>> create_state(ones, optax.adam(1e-3), mesh).params["w"].shape
        (4, 2)
    """
    places = jax.tree.map(
        lambda x: x.sharding, abstract_state(make_params, tx, mesh, rules=rules)
    )
    out = jax.tree.map(lambda s: s.spec, places)

    def make() -> TrainState:
        state = sharding.with_auto_axes(lambda: init_state(make_params(), tx), out)
        return state()

    with jax.set_mesh(mesh):
        return jax.jit(make, out_shardings=places)()
