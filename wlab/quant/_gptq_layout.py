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

import math
from collections.abc import Mapping
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from wlab.core import Flattened, MatrixView, Permuted
from wlab.quant._grid import get_grid
from wlab.quant._packed import Packed
from wlab.quant._quantized import EACH, WHOLE, Quantized

Format = Literal["gptq", "gptq_v2"]
BITS = (2, 3, 4, 8)  # that readers have


def to_gptq(w: Any, *, form: Format = "gptq") -> dict[str, np.ndarray]:
    """The arrays of one matrix.

    Scales are rounded to float16: give ``scale_dtype=jnp.float16`` to the method that
    makes the weight, and they are that already.

    Args:
        w: a `Quantized` [in, out] on a grid of integers with ranges along the inputs
            alone, packed or not; or `Permuted` or `Flattened` around one.
        form: how zero points are stored. Readers of "gptq" add one without a thought
            of overflow, so that it has no zero point of 0.

    Returns:
        qweight, qzeros, scales and g_idx.

    Raises:
        TypeError: for a weight of another kind.
        ValueError: for a grid or ranges that the layout does not have, or sizes that do
            not fill words.

    Examples:
        >>> from wlab.quant import rtn
        >>> made = to_gptq(rtn(jnp.ones((64, 32)), bits=3, group=32, symmetric=True))
        >>> {name: x.shape for name, x in made.items()}
        {'qweight': (6, 32), 'qzeros': (2, 3), 'scales': (2, 32), 'g_idx': (64,)}
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
                f"a {type(w).__name__} of shape {tuple(w.shape)} has no codes in "
                "groups: only Quantized matrices have a GPTQ layout"
            )
    if w.ndim != 2 or w.grid.kind == "float" or w._blocks[1] != EACH:
        raise ValueError(
            f"a weight of shape {w.shape} on {w.grid.name} with blocks {w.block}: the "
            "GPTQ layout is of a matrix [in, out] of integers with a range for each "
            "output"
        )
    n, m = w.shape
    b = w.grid.bits
    check_sizes(n, m, b)
    size = n if w._blocks[0] == WHOLE else w._blocks[0]
    codes = np.asarray(w.codes).astype(np.int32)
    middle = 0 if w.grid.kind == "uint" else 2 ** (b - 1)
    if middle:
        # Of patterns in two's complement, the sign flipped.
        codes = (codes + middle) % 2**b
    group = np.arange(n, dtype=np.int32) // max(size, 1)
    if order is not None:
        back = np.argsort(order)
        codes, group = codes[back], group[back]
    scale = np.asarray(w.scale, np.float32)
    zero = np.full(scale.shape, float(middle), np.float32)
    if w.zero is not None:
        zero = zero + np.asarray(w.zero, np.float32)
    least = 1 if form == "gptq" else 0
    if np.any(zero != np.round(zero)) or zero.min() < least or zero.max() >= 2**b:
        raise ValueError(
            f"a weight of shape {w.shape} at {b} bits has zero points from "
            f"{zero.min():g} to {zero.max():g}: format {form!r} has whole ones from "
            f"{least} to {2**b - 1}" + "; gptq_v2 has 0 too" * least
        )
    with np.errstate(over="ignore"):
        scales = scale.astype(np.float16)
    if not np.isfinite(scales).all():
        raise ValueError(
            f"a weight of shape {w.shape} has scales up to {scale.max():g}, which "
            "float16 cannot hold"
        )
    return {
        "qweight": _words(codes, b, 0),
        "qzeros": _words(zero.astype(np.int32) - least, b, 1),
        "scales": scales,
        "g_idx": group,
    }


def from_gptq(
    arrays: Mapping[str, np.ndarray],
    *,
    bits_of: int,
    group: int | None = None,
    form: Format = "gptq",
    symmetric: bool = False,
    dtype: Any = jnp.float32,
) -> Quantized | Permuted:
    """The weight that stored arrays stand for.

    Args:
        arrays: qweight, qzeros, scales and, unless groups lie side by side, g_idx.
        bits_of: of a code: 2, 3, 4 or 8.
        group: inputs that share a range; None: what the arrays tell, which of a single
            range is that all do.
        form: how zero points are stored.
        symmetric: whether all zero points are the middle, and are left out.
        dtype: of the array that the weight stands for.

    Returns:
        A matrix [in, out]; `Permuted` where groups do not lie side by side. Its scales
        have the dtype that is stored, and zero points are uint8.

    Raises:
        ValueError: for arrays that do not fit together.

    Examples:
        >>> from wlab.quant import rtn
        >>> made = rtn(jnp.ones((64, 32)), bits=4, group=32, scale_dtype=jnp.float16)
        >>> again = from_gptq(to_gptq(made, form="gptq_v2"), bits_of=4, form="gptq_v2")
        >>> bool(jnp.array_equal(again.materialise(), made.materialise()))
        True
    """
    if bits_of not in BITS:
        raise ValueError(f"bits_of={bits_of}: GPTQ checkpoints have {BITS}")
    scales = np.asarray(arrays["scales"])
    groups, m = scales.shape
    n = arrays["qweight"].shape[0] * 32 // bits_of
    shapes = {name: tuple(np.shape(x)) for name, x in arrays.items()}
    wanted = {
        "qweight": (n * bits_of // 32, m),
        "qzeros": (groups, m * bits_of // 32),
        "scales": (groups, m),
        "g_idx": (n,),
    }
    if shapes != {name: wanted[name] for name in shapes}:
        raise ValueError(f"{shapes} are not of one matrix at {bits_of} bits: {wanted}")
    codes = _codes(arrays["qweight"], bits_of, 0)
    zero = _codes(arrays["qzeros"], bits_of, 1)
    if form == "gptq":
        zero = (zero + 1) % 2**bits_of
    middle = 2 ** (bits_of - 1)
    if symmetric and np.any(zero != middle):
        raise ValueError(f"a zero point is not {middle}, that of a symmetric grid")
    size = -(-n // groups) if group is None else group
    index = np.asarray(arrays.get("g_idx", np.arange(n) // size))
    order = np.argsort(index, kind="stable").astype(np.int32)
    if -(-n // size) != groups or np.any(index[order] != np.arange(n) // size):
        raise ValueError(
            f"{n} inputs in {groups} groups are not groups of {size}, or g_idx says "
            "otherwise"
        )
    aligned = np.array_equal(order, np.arange(n))
    grid = get_grid(f"{'int' if symmetric else 'uint'}{bits_of}")
    if symmetric:  # two's complement, in the bits of the grid's storage
        codes = (codes - middle) % 2**grid._width
    made = Quantized(
        codes=jnp.asarray((codes if aligned else codes[order]).astype(grid.storage)),
        scale=jnp.asarray(scales),
        zero=None if symmetric else jnp.asarray(zero.astype(np.uint8)),
        grid=grid,
        block=(WHOLE if group is None and groups == 1 else size, EACH),
        dense_dtype=np.dtype(dtype),
        matrix_view=MatrixView.of(1, 1),
    )
    return made if aligned else Permuted(made, jnp.asarray(order))


def check_sizes(n: int, m: int, b: int) -> None:
    """Raises unless a matrix [n, m] can be stored at `b` bits."""
    if b not in BITS:
        raise ValueError(f"bits={b}: GPTQ checkpoints have {BITS}")
    if n * b % 32 or m * b % 32:
        raise ValueError(
            f"a matrix of shape {(n, m)} at {b} bits does not fill words of 32 bits "
            "along both axes, as the GPTQ layout does"
        )


def _words(codes: np.ndarray, b: int, axis: int) -> np.ndarray:
    """Codes packed along an axis into words of 32 bits."""
    codes = np.moveaxis(codes, axis, -1).astype(np.uint32)
    words = b // math.gcd(b, 32)  # that a round number of codes fills
    codes = codes.reshape(*codes.shape[:-1], -1, 32 * words // b)
    out = np.zeros((*codes.shape[:-1], words), np.uint32)
    for i in range(codes.shape[-1]):
        at, by = divmod(i * b, 32)
        out[..., at] |= codes[..., i] << np.uint32(by)
        if by + b > 32:
            out[..., at + 1] |= codes[..., i] >> np.uint32(32 - by)
    out = out.reshape(*out.shape[:-2], -1).view(np.int32)
    return np.ascontiguousarray(np.moveaxis(out, -1, axis))


def _codes(words: np.ndarray, b: int, axis: int) -> np.ndarray:
    """What `_words` packed, as int32."""
    x = np.ascontiguousarray(np.moveaxis(np.asarray(words), axis, -1), np.int32)
    x = x.view(np.uint32)
    words_ = b // math.gcd(b, 32)
    x = x.reshape(*x.shape[:-1], -1, words_)
    out = np.empty((*x.shape[:-1], 32 * words_ // b), np.uint32)
    for i in range(out.shape[-1]):
        at, by = divmod(i * b, 32)
        code = x[..., at] >> np.uint32(by)
        if by + b > 32:
            code = code | x[..., at + 1] << np.uint32(32 - by)
        out[..., i] = code & np.uint32(2**b - 1)
    out = out.reshape(*out.shape[:-2], -1).astype(np.int32)
    return np.moveaxis(out, -1, axis)
