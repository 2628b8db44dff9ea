# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Parity with reference vectors: ``python -m tests.parity SLUG [FILE.npz]``.

Each method has a module here of its slug's name (dashes as underscores) with

- ``INPUTS``: the names of the arrays that a file gives, and ``NUMBERED``, where there
  are others as many as a file's sizes say: a pattern of their names;
- ``compute(inputs) -> dict``: each output array by name, as `Expected` from the code
  under test.

Every other array of the file is an output and must be compared.
"""

import functools
import importlib
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"


class Computed(NamedTuple):
    """An output array as the code under test computes it."""

    value: Any
    tolerance: float  # of the largest difference, over the largest magnitude


class Row(NamedTuple):
    """How one output array of a file compares."""

    name: str
    error: float  # largest difference over largest magnitude; inf if not comparable
    tolerance: float
    note: str = ""

    @property
    def ok(self) -> bool:
        """Whether the array agrees."""
        return self.error <= self.tolerance


def compiled(
    compute: Callable[[Mapping[str, Any]], dict[str, Computed]],
) -> Callable[[Mapping[str, np.ndarray]], dict[str, Computed]]:
    """All that a module computes as one program.

    Its arguments are the inputs of floats with two axes or more. All others, such as
    sizes, choices and hyperparameters, are known while it is traced.
    """

    @functools.wraps(compute)
    def run(inputs: Mapping[str, np.ndarray]) -> dict[str, Computed]:
        import jax  # The command chooses float64 before.

        traced = {
            name: x for name, x in inputs.items() if x.ndim > 1 and x.dtype.kind == "f"
        }
        return jax.jit(lambda traced: compute({**inputs, **traced}))(traced)

    return run


def slugs() -> list[str]:
    """The methods that have a parity module."""
    here = pathlib.Path(__file__).parent
    names = (
        p.stem for p in here.glob("*.py") if not p.stem.startswith(("__", "test_"))
    )
    return sorted(name.replace("_", "-") for name in names)


def golden(slug: str) -> pathlib.Path:
    """The reference vectors that the project carries."""
    return GOLDEN / f"{slug}.npz"


def compare(slug: str, arrays: Mapping[str, np.ndarray]) -> list[Row]:
    """Run the method on a file's inputs and compare every output that it holds."""
    module = importlib.import_module(f"tests.parity.{slug.replace('-', '_')}")
    missing = [name for name in module.INPUTS if name not in arrays]
    if missing:
        raise ValueError(f"inputs missing from the file: {', '.join(missing)}")
    numbered = re.compile(getattr(module, "NUMBERED", r"(?!)"))
    inputs = {
        name: array
        for name, array in arrays.items()
        if name in module.INPUTS or numbered.fullmatch(name)
    }
    computed = module.compute(inputs)
    return [
        _row(name, arrays[name], computed.get(name))
        for name in arrays
        if name not in inputs
    ]


def _row(name: str, wanted: np.ndarray, got: Computed | None) -> Row:
    if got is None:
        return Row(name, np.inf, 0.0, "nothing computes this array")
    value, tolerance = np.asarray(got.value), float(got.tolerance)
    if value.shape != wanted.shape:
        note = f"shape {value.shape}, wanted {wanted.shape}"
        return Row(name, np.inf, tolerance, note)
    if not wanted.size:
        return Row(name, 0.0, tolerance)
    scale = float(np.max(np.abs(wanted))) or 1.0
    error = float(np.max(np.abs(value - wanted))) / scale
    return Row(name, np.inf if np.isnan(error) else error, tolerance)
