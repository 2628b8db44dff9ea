# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Leaves that are trained whole, beside adapters (reparameterisation)."""

from typing import Any

import jax
import jax.numpy as jnp

from wlab.core import Reparam, Select, is_weight
from wlab.peft._matrices import Attach, Init, Method, reparam


def full(select: Select) -> Reparam:
    """Trains a dense change of any leaf, from zero.

    Args:
        select: which leaves; of any shape.

    Returns:
        A `Reparam`, whose label is "delta"; float32 as large as the leaves.

    Raises:
        ValueError: if `select` matches nothing.

    Examples:
        >>> params = {"norm": {"scale": jnp.ones(3)}}
        >>> adapter = full("norm*").init(0, params)
        >>> jax.tree.map(jnp.shape, adapter.train)
        {'norm/scale': {'delta': (3,)}}
    """

    def init(given: Init) -> tuple[dict[str, Any], dict[str, Any]]:
        return {"delta": jnp.zeros(given.target.shape)}, {}

    def attach(given: Attach) -> Any:
        base = given.base.materialise() if is_weight(given.base) else given.base
        delta = given.train["delta"]
        wide = jnp.promote_types(base.dtype, delta.dtype)
        # One number for all layers would need their axis, which a bias does not show.
        scale = jnp.asarray(given.scale)
        scale = scale.reshape(*scale.shape, *(1,) * (delta.ndim - scale.ndim))
        new = base.astype(wide) + delta * scale
        return jax.lax.convert_element_type(new, base.dtype)

    method = Method(init, attach, {"delta": ("leaf",)}, needs_matrix=False)
    return reparam(method, select=select)
