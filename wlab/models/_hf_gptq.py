# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Kernels that a checkpoint stores in GPTQ's layout, and what its config says of them.

`wlab.quant.to_gptq` tells of the arrays. Here they meet kernels of any shape, stacked
layers, and the two forms of the config: ``quantization_config`` in ``config.json``, and
``quantize_config.json``.
"""

import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from wlab._version import __version__
from wlab.core import Flattened, MatrixView, Permuted, as_kernel, is_weight
from wlab.quant import Packed, Quantized, from_gptq, to_gptq
from wlab.quant._gptq_layout import BITS, Format
from wlab.quant._gptq_layout import check_sizes as check_sizes
from wlab.quant._quantized import WHOLE

CONFIG = "quantize_config.json"
KEY = "quantization_config"
SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")


class Stored(NamedTuple):
    """What one config says of all kernels."""

    bits: int
    group: int | None  # inputs that share a range; None for all
    symmetric: bool
    ordered: bool  # whether groups may be of channels by activity
    form: Format


def read_config(raw: Mapping[str, Any], folder: pathlib.Path) -> Stored | None:
    """How the kernels of a folder are stored; None for floats.

    Raises:
        ValueError: for another method than GPTQ, or an option of it that is not read.
    """
    given = raw.get(KEY)
    if not given and (folder / CONFIG).exists():
        given = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        given = {"quant_method": "gptq"} | given
    if not given:
        return None
    method = given.get("quant_method")
    form = given.get("checkpoint_format") or given.get("format") or "gptq"
    if method != "gptq" or form not in ("gptq", "gptq_v2"):
        raise ValueError(
            f"{folder}: its tensors are quantised ({KEY}) by {method!r} in format "
            f"{form!r}; of floats and of gptq, in format gptq or gptq_v2, they are read"
        )
    odd = {"lm_head": False, "dynamic": None, "pack_dtype": "int32"}
    for key, usual in odd.items():
        if given.get(key) and given[key] != usual:
            raise ValueError(f"{folder}: {KEY} with {key}={given[key]} is not read")
    bits, group = given.get("bits"), given.get("group_size", -1)
    if bits not in BITS or not isinstance(group, int):
        raise ValueError(
            f"{folder}: {KEY} has bits={bits} and group_size={group}; bits are one of "
            f"{BITS}, and the group is a number, -1 for all inputs"
        )
    return Stored(
        bits,
        None if group <= 0 else group,
        bool(given.get("sym", True)),
        bool(given.get("desc_act", False)),
        form,
    )


def write_config(stored: Stored) -> dict[str, Any]:
    """What readers want to know."""
    return {
        "quant_method": "gptq",
        "bits": stored.bits,
        "group_size": -1 if stored.group is None else stored.group,
        "desc_act": stored.ordered,
        "sym": stored.symmetric,
        "checkpoint_format": stored.form,
        "format": stored.form,
        "pack_dtype": "int32",
        "lm_head": False,
        "meta": {"quantizer": [f"wlab:{__version__}"]},
    }


def load(
    layers: Sequence[Mapping[str, np.ndarray]],
    stored: Stored,
    sides: tuple[int, int],
    view: MatrixView,
    shape: Sequence[int],
    *,
    dtype: Any,
    stack: bool,
    ordered: bool | None = None,
) -> Any:
    """A kernel of one layer, or of all that are stacked.

    Args:
        layers: the arrays of each layer, by suffix.
        stored: what the config says.
        sides: inputs and outputs.
        view: of the kernel of one layer.
        shape: of the kernel of one layer.
        dtype: of the array that it stands for.
        stack: whether layers are stacked; else there is one.
        ordered: whether it is a `Permuted` one; None: where a layer needs that.

    Raises:
        ValueError: for arrays that do not fit together, or are of another shape.
    """
    zeros = _middle(layers, stored) if stored.symmetric else False
    made = []
    for arrays in layers:
        w = from_gptq(
            arrays,
            bits_of=stored.bits,
            group=stored.group,
            form=stored.form,
            symmetric=zeros,
            dtype=dtype,
        )
        if w.shape != sides:
            raise ValueError(f"it has shape {w.shape}, and {sides} by the config")
        made.append(w)
    if ordered is None:
        ordered = any(isinstance(w, Permuted) for w in made)
    if ordered:
        same = jnp.arange(sides[0], dtype=jnp.int32)
        made = [w if isinstance(w, Permuted) else Permuted(w, same) for w in made]
    kernels = [as_kernel(w, view, shape) for w in made]
    if not stack:
        return kernels[0]
    return jax.tree.map(lambda *x: jnp.stack(x), *kernels)


def _middle(layers: Iterable[Mapping[str, np.ndarray]], stored: Stored) -> bool:
    """Whether every zero point is the middle, as those of symmetric grids are."""
    half = 2 ** (stored.bits - 1) - (stored.form == "gptq")
    ones = sum(half << i for i in range(0, 96, stored.bits)) & (2**96 - 1)
    words = [np.uint32(ones >> 32 * i & 0xFFFFFFFF) for i in range(3)]
    for arrays in layers:
        x = np.asarray(arrays["qzeros"]).view(np.uint32)
        if any(np.any(x[:, i::3] != word) for i, word in enumerate(words)):
            return False
    return True


def layer_of(w: Any, i: int) -> Any:
    """One layer of a stacked kernel, still structured."""
    if not is_weight(w):
        return w[i]
    found = w.scannable()
    if found is NotImplemented:
        raise ValueError(
            f"a {type(w).__name__} of shape {tuple(w.shape)} has no layers of its own"
        )
    return jax.tree.map(lambda x: x[i], found)


def matrix_of(w: Any, sides: tuple[int, int]) -> Any:
    """A kernel of one layer as a matrix [in, out], still structured.

    Raises:
        TypeError: for a weight that has no codes.
        ValueError: for one that is no matrix of such codes.
    """
    if isinstance(w, Packed):
        w = w.unpack()
    if isinstance(w, Flattened):
        w = w.base
    inner = w.base if isinstance(w, Permuted) else w
    if not isinstance(inner, (Quantized, Packed)):
        raise TypeError(
            f"a {type(w).__name__} of shape {tuple(w.shape)} and dtype {w.dtype} has "
            "no codes: quantise every kernel of the blocks, or write it dense"
        )
    if tuple(w.shape) != sides:
        w = w.reshape(sides)
    if w is NotImplemented:
        raise ValueError("its ranges are not those of groups of inputs")
    return w


def bits_of(matrix: Any) -> int:
    """Bits of a code of what `matrix_of` returned."""
    return (matrix.base if isinstance(matrix, Permuted) else matrix).grid.bits


def settings(kernels: Mapping[str, Any], form: Format) -> Stored:
    """What a config says of kernels, matrices of one layer by path.

    Raises:
        ValueError: unless all have the same bits, groups and zero points.
    """
    found: dict[Stored, str] = {}
    ordered = False
    for path, w in kernels.items():
        ordered |= isinstance(w, Permuted)
        inner = w.base if isinstance(w, Permuted) else w
        size = inner.block[-2]
        stored = Stored(
            inner.grid.bits,
            None if size == WHOLE else size,
            inner.grid.kind == "int",
            False,
            form,
        )
        found.setdefault(stored, path)
    if len(found) > 1:
        (a, first), (b, second) = [*found.items()][:2]
        raise ValueError(
            f"a GPTQ config says one thing of all kernels, but {first!r} has "
            f"{_words(a)} and {second!r} has {_words(b)}: write it dense, or quantise "
            "all alike"
        )
    (stored,) = found
    return stored._replace(ordered=ordered)


def _words(stored: Stored) -> str:
    kind = "symmetric" if stored.symmetric else "with zero points"
    group = "no groups" if stored.group is None else f"groups of {stored.group}"
    return f"{stored.bits} bits in {group}, {kind}"


def shapes(sides: tuple[int, int], stored: Stored) -> dict[str, jax.ShapeDtypeStruct]:
    """The arrays of a matrix by suffix."""
    n, m = sides
    groups = 1 if stored.group is None else -(-n // stored.group)
    i32 = jnp.int32
    return {
        "qweight": jax.ShapeDtypeStruct((n * stored.bits // 32, m), i32),
        "qzeros": jax.ShapeDtypeStruct((groups, m * stored.bits // 32), i32),
        "scales": jax.ShapeDtypeStruct((groups, m), jnp.float16),
        "g_idx": jax.ShapeDtypeStruct((n,), i32),
    }


def store(w: Any, sides: tuple[int, int], form: Format) -> dict[str, np.ndarray]:
    """The arrays of a kernel of one layer by suffix."""
    return to_gptq(matrix_of(w, sides), form=form)
