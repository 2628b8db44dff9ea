# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""The arrays in which GPTQ checkpoints are exchanged, and weights of them.

A linear layer of ``in`` inputs and ``out`` outputs is stored as

- ``qweight`` int32 [in * bits / 32, out]: codes packed along the inputs;
- ``qzeros`` int32 [groups, out * bits / 32]: zero points packed along the outputs, each
  less one (format "gptq") or as they are ("gptq_v2");
- ``scales`` float16 [groups, out]; and ``g_idx`` int32 [in], the group of each input.

Codes run from 0; those of a symmetric grid have a zero point in the middle. Streams of
bits are little-endian, so that codes of 3 bits cross the borders of words.
"""

from collections.abc import Mapping
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from wlab.core import Flattened, MatrixView, Permuted, bits
from wlab.quant._grid import get_grid
from wlab.quant._packed import Packed
from wlab.quant._quantized import EACH, WHOLE, Quantized

Format = Literal["gptq", "gptq_v2"]


def to_gptq(w: Any, *, form: Format = "gptq") -> dict[str, np.ndarray]:
    """The arrays of one matrix.

    Args:
        w: a `Quantized` [in, out] on a grid of integers with ranges along the inputs
            alone, packed or not; or `Permuted` or `Flattened` around one.
        form: how zero points are stored.

    Returns:
        qweight, qzeros, scales and g_idx.

    Raises:
        TypeError: for a weight of another kind.
        ValueError: for a grid or ranges that the layout does not have, or sizes that do
            not fill words.
    """
    order = None
    while not isinstance(w, Quantized):
        if isinstance(w, Flattened):
            w = w.base
        elif isinstance(w, Permuted):
            order, w = np.asarray(w.order), w.base
        elif isinstance(w, Packed):
            w = w.unpack()
        else:
            raise TypeError(
                f"a {type(w).__name__} of shape {w.shape} has no codes in groups: only "
                "Quantized matrices have a GPTQ layout"
            )
    if w.ndim != 2 or w.grid.kind == "float" or w.block[1] != EACH:
        raise ValueError(
            f"a weight of shape {w.shape} on {w.grid.name} with blocks {w.block}: the "
            "GPTQ layout is of a matrix [in, out] of integers with a range for each "
            "output"
        )
    n, m = w.shape
    b = w.grid.bits
    if n * b % 32 or m * b % 32:
        raise ValueError(
            f"a matrix of shape {w.shape} at {b} bits does not fill words of 32 bits "
            "along both axes, as the GPTQ layout does"
        )
    size = n if w.block[0] == WHOLE else w.block[0]
    middle = 0 if w.grid.kind == "uint" else 2 ** (b - 1)
    codes = np.asarray(w.grid.decode(w.codes)).astype(np.int32) + middle
    group = np.arange(n, dtype=np.int32) // size
    if order is not None:
        back = np.argsort(order)
        codes, group = codes[back], group[back]
    scale = np.asarray(w.scale, np.float32)
    zero = np.full(scale.shape, middle, np.int32)
    if w.zero is not None:
        zero = np.asarray(w.zero).astype(np.int32)
    stored = zero - 1 if form == "gptq" else zero
    return {
        "qweight": _words(codes, b, 0),
        "qzeros": _words(stored, b, 1),
        "scales": scale.astype(np.float16),
        "g_idx": group,
    }


def from_gptq(
    arrays: Mapping[str, np.ndarray],
    *,
    bits_of: int,
    form: Format = "gptq",
    dtype: Any = jnp.float32,
) -> Quantized | Permuted:
    """The weight that stored arrays stand for.

    Args:
        arrays: qweight, qzeros, scales and, unless groups lie side by side, g_idx.
        bits_of: of a code: 2, 3, 4 or 8.
        form: how zero points are stored.
        dtype: of the array that the weight stands for.

    Returns:
        A matrix [in, out]; `Permuted` where groups do not lie side by side.

    Raises:
        ValueError: for arrays that do not fit together.
    """
    scales = np.asarray(arrays["scales"])
    groups, m = scales.shape
    n = arrays["qweight"].shape[0] * 32 // bits_of
    if arrays["qweight"].shape[1] != m or arrays["qzeros"].shape[0] != groups:
        raise ValueError(
            f"qweight {arrays['qweight'].shape}, qzeros {arrays['qzeros'].shape} and "
            f"scales {scales.shape} are not of one matrix at {bits_of} bits"
        )
    codes = _codes(arrays["qweight"], bits_of, n, 0)
    zero = _codes(arrays["qzeros"], bits_of, m, 1).astype(np.int32)
    if form == "gptq":
        zero = (zero + 1) % 2**bits_of
    size = -(-n // groups)
    group = np.asarray(arrays.get("g_idx", np.arange(n) // size))
    order = np.argsort(group, kind="stable").astype(np.int32)
    if not np.array_equal(group[order], np.arange(n) // size):
        raise ValueError(
            f"g_idx names groups of unequal sizes: {n} inputs in {groups} groups"
        )
    grid = get_grid(f"uint{bits_of}")
    aligned = np.array_equal(order, np.arange(n))
    made = Quantized(
        codes=grid.encode(jnp.asarray(codes if aligned else codes[order], jnp.float32)),
        scale=jnp.asarray(scales, jnp.float32),
        zero=jnp.asarray(zero, jnp.float32),
        grid=grid,
        block=(WHOLE if groups == 1 else size, EACH),
        dense_dtype=np.dtype(dtype),
        matrix_view=MatrixView.of(1, 1),
    )
    return made if aligned else Permuted(made, jnp.asarray(order))


def _words(codes: np.ndarray, b: int, axis: int) -> np.ndarray:
    """Codes packed along an axis into words of 32 bits."""
    packed = np.asarray(bits.pack(codes & (2**b - 1), b, axis=axis))
    moved = np.ascontiguousarray(np.moveaxis(packed, axis, -1))
    return np.ascontiguousarray(np.moveaxis(moved.view("<i4"), -1, axis))


def _codes(words: np.ndarray, b: int, size: int, axis: int) -> np.ndarray:
    moved = np.ascontiguousarray(np.moveaxis(np.asarray(words), axis, -1))
    packed = np.moveaxis(moved.astype("<i4").view(np.uint8), -1, axis)
    return np.asarray(bits.unpack(packed, b, size, axis=axis))
