# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Files of safetensors: mapped into memory, and written one tensor at a time.

Such a file is the length of its header (eight bytes, little-endian), the header in
JSON (dtype, shape and place of every tensor), and the tensors' bytes in row-major
order. The loaders for numpy know no bfloat16, in which most checkpoints are.
"""

import json
import math
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np

_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class ShapeDtype(Protocol):
    """What has a shape and a dtype: an array, or `jax.ShapeDtypeStruct`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The sizes of the axes."""

    @property
    def dtype(self) -> Any:
        """The dtype of the elements."""


def read(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The tensors of a file, by name.

    Args:
        path: the file.

    Returns:
        Read-only arrays that are views of the file: their bytes are read when used,
        and change if the file is written over.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is cut off or no such file, or for a dtype that numpy and
            ml_dtypes do not have.
    """
    path = pathlib.Path(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(
                f"{path} of {size} bytes is cut off within its header, or no file of "
                "safetensors"
            )
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise ValueError(f"{path} is no file of safetensors: {error}") from error
    header.pop("__metadata__", None)
    start = 8 + length
    end = start + max(
        (entry["data_offsets"][1] for entry in header.values()), default=0
    )
    if size < end:
        raise ValueError(
            f"{path} is cut off: it has {size} bytes, and its header tells of {end}"
        )
    raw = np.asarray(np.memmap(path, np.uint8, "r"))
    return {name: _tensor(raw[start:], e, name, path) for name, e in header.items()}


def _tensor(
    raw: np.ndarray, entry: Mapping[str, Any], name: str, path: pathlib.Path
) -> np.ndarray:
    dtype, shape = _DTYPES.get(entry["dtype"]), tuple(entry["shape"])
    if dtype is None:
        raise ValueError(
            f"{path}: tensor {name!r} of shape {shape} has dtype {entry['dtype']}, "
            f"which is not read: {', '.join(_DTYPES)} are"
        )
    begin, end = entry["data_offsets"]
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(
            f"{path}: tensor {name!r} of shape {shape} and dtype {entry['dtype']} has "
            f"{end - begin} bytes"
        )
    return raw[begin:end].view(dtype).reshape(shape)


def write(
    path: str | os.PathLike[str],
    tensors: Mapping[str, ShapeDtype],
    value: Callable[[str], np.ndarray],
) -> None:
    """Writes a file, of which one tensor at a time is in memory.

    Args:
        path: the file; written over if it is there.
        tensors: shape and dtype of each tensor, by name.
        value: the tensor of a name; called once for each.

    Raises:
        ValueError: for a dtype that such files do not have.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    dtypes = {name: np.dtype(x.dtype) for name, x in tensors.items()}
    # The widest first, so that every tensor is aligned.
    order = sorted(tensors, key=lambda name: (-dtypes[name].itemsize, name))
    at = 0
    for name in order:
        dtype, shape = dtypes[name], tuple(tensors[name].shape)
        if dtype not in _NAMES:
            raise ValueError(
                f"tensor {name!r} of shape {shape} has dtype {dtype}, for which files "
                f"of safetensors have no name: {', '.join(map(str, _NAMES))} have one"
            )
        end = at + math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": _NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [at, end],
        }
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            x = np.ascontiguousarray(value(name), dtypes[name])
            file.write(x.reshape(-1).view(np.uint8).data)
