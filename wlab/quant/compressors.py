# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""`Compressor`: what a method reads of a kernel's inputs, and what it makes of it.

`wlab.quant.calibrate` runs one over the layers of a model. The functions of arrays that
these stand for are in `wlab.quant`, with the same options.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from wlab.quant import _calibrated, _d2quant
from wlab.quant._statistics import Moments, moments

__all__ = ["Compressor", "d2quant", "gptaq", "gptq", "rescomp", "rtn"]


class Compressor(NamedTuple):
    """Pure functions from a kernel and its inputs to a weight that takes less room."""

    statistics: Callable[..., Moments]
    """`statistics(x, original, weights)`: sums over the rows of inputs [rows, in];
    see `wlab.quant.moments`."""

    compress: Callable[[jax.Array, Moments], Any]
    """`compress(w, sums)` returns a weight in the place of a kernel [in, out]."""

    nearest: Callable[[jax.Array], Any]
    """`nearest(w)`: the same grid without calibration, of the same structure where
    `compress` serves kernels with too few inputs."""

    original: bool = False
    """Whether the inputs of the original model are read as well."""

    independent: bool = True
    """Whether each output of a kernel is compressed by itself, so that kernels that
    read the same inputs may be one."""


def rtn(**options: Any) -> Compressor:
    """Round to nearest; takes the options of `wlab.quant.rtn`."""
    nearest = functools.partial(_calibrated.rtn, **options)
    return Compressor(_plain, lambda w, sums: nearest(w), nearest)


def gptq(**options: Any) -> Compressor:
    """GPTQ; takes the options of `wlab.quant.gptq`."""

    def compress(w: jax.Array, sums: Moments) -> Any:
        return _calibrated.gptq(w, sums.h, **options)

    return Compressor(_plain, compress, _nearest(options))


def gptaq(**options: Any) -> Compressor:
    """GPTAQ; takes the options of `wlab.quant.gptaq`."""

    def compress(w: jax.Array, sums: Moments) -> Any:
        return _calibrated.gptaq(w, sums.h, sums.cross, **options)

    return Compressor(moments, compress, _nearest(options), original=True)


def rescomp(**options: Any) -> Compressor:
    """ResComp; takes the options of `wlab.quant.rescomp`."""

    def compress(w: jax.Array, sums: Moments) -> Any:
        assert sums.cross is not None
        return _calibrated.rescomp(w, sums.h, sums.cross, **options)

    return Compressor(moments, compress, _nearest(options), original=True)


def d2quant(**options: Any) -> Compressor:
    """D2Quant's dual scales; takes the options of `wlab.quant.d2quant`."""

    def compress(w: jax.Array, sums: Moments) -> Any:
        return _d2quant.d2quant(w, sums.h, sums.cross, **options)

    shared = ("bits", "group", "scale_dtype")
    kept = {name: options[name] for name in shared if name in options}
    nearest = functools.partial(_d2quant.dsq, **kept)
    # The scale of an input channel is one for all outputs of a kernel.
    return Compressor(moments, compress, nearest, original=True, independent=False)


def _plain(x: jax.Array, original: Any, weights: jax.Array | None) -> Moments:
    del original
    return moments(x, None, weights)


def _nearest(options: dict[str, Any]) -> Callable[[jax.Array], Any]:
    grid = ("bits", "group", "symmetric", "clip", "scale_dtype")
    kept = {name: options[name] for name in grid if name in options}
    return functools.partial(_calibrated.rtn, **kept)
