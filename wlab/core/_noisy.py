# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""`Noisy`: an integer matrix with noise that rounds apart from it."""

from typing import NamedTuple

import jax


class Noisy(NamedTuple):
    """A matrix of integers, or a stack of them, with low-rank noise beside it.

    A vector u is multiplied as ``u W^T + (((u b) a^T) >> shift)`` in int32. That is no
    product with a sum of matrices, so it is no structured weight: the model does it.
    """

    weight: jax.Array  # int8, stack + (outputs, inputs)
    a: jax.Array  # int8, stack + (outputs, rank)
    b: jax.Array  # int8, stack + (inputs, rank)
    shift: jax.Array  # int32, of the shape of stack
