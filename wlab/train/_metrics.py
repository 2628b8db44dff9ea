# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Metrics of a run as a file of JSON lines: one object a line, strict JSON.

JSON has no NaN and no infinity: a value that is not finite is written as null.
"""

import json
import math
import os
import pathlib
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import numpy as np

__all__ = ["MetricsWriter", "read_metrics"]


class MetricsWriter:
    """Writes records to a file, each on its line and on the disk at once.

    Args:
        path: the file; its folder is made if need be.
        append: continues the file, as a restored run does, instead of starting anew.
            A line that a killed run left without its end is cut off first.

    Examples:
        >>> import tempfile
        >>> path = tempfile.mkdtemp() + "/metrics.jsonl"
        >>> with MetricsWriter(path) as writer:
        ...     writer.write(1, {"loss": np.float32(0.5), "grad_norm": np.nan})
        >>> read_metrics(path)
        [{'step': 1, 'loss': 0.5, 'grad_norm': None}]
    """

    def __init__(self, path: str | os.PathLike[str], *, append: bool = False):
        path = pathlib.Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        if append and path.exists():
            content = path.read_bytes()
            os.truncate(path, content.rfind(b"\n") + 1)
        self._file = path.open("a" if append else "w", encoding="utf-8")

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Adds a record.

        Args:
            step: steps done.
            metrics: by name, numbers or arrays (written as lists), of Python, NumPy
                or JAX.

        Raises:
            TypeError: if a value is no number, array or string.
        """
        record = {"step": int(step)}
        record |= {name: _plain(name, value) for name, value in metrics.items()}
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Reads what `MetricsWriter` wrote.

    A last line without its end is what a killed run leaves, and is no record.

    Args:
        path: the file.

    Returns:
        The records in order; a value that was not finite is None.

    Raises:
        ValueError: if a line is not a JSON object.
    """
    lines = pathlib.Path(path).read_text(encoding="utf-8").split("\n")[:-1]
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
        if not isinstance(record, dict):
            raise ValueError(f"{path}, line {number} is not a JSON object: {line}")
        records.append(record)
    return records


def _plain(name: str, value: Any) -> Any:
    """The value in numbers that JSON knows."""
    if isinstance(value, str):
        return value
    array = np.asarray(value)
    if array.dtype.kind not in "biuf":
        # Narrow floats of JAX are numbers, but not to NumPy.
        try:
            array = array.astype(np.float64)
        except (TypeError, ValueError):
            raise TypeError(
                f"metric {name!r} is {type(value).__name__} {value!r}: only numbers, "
                "arrays of numbers and strings can be written"
            ) from None
    return _finite(array.tolist())


def _finite(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
