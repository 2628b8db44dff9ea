# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Going on where a run was stopped: its state, its batches and its records."""

import base64
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from wlab.train._checkpoint import Checkpoints
from wlab.train._step import TrainState

__all__ = ["resume", "rewind_metrics"]


def resume(
    checkpoints: Checkpoints, state: TrainState, batches: Any
) -> tuple[TrainState, dict[str, np.ndarray]]:
    """Puts a run where its latest whole checkpoint left it, or at its start.

    Args:
        checkpoints: those that `fit` saved to, or will.
        state: the state at the start; it is used up if there is a checkpoint, whose
            arrays are put where those of the state were.
        batches: those of the start; if they have `set_state`, their position is set.

    Returns:
        The state and the history so far, both for `fit`. Without a checkpoint they are
        the state as it was and no history.

    Raises:
        ValueError: as `Checkpoints.recover`; or if the checkpoint has no position for
            batches that have one.

    Examples:
        >>> import optax, tempfile
        >>> from wlab.train import fit, init_state, make_train_step
        >>> tx = optax.sgd(0.5)
        >>> step = make_train_step(lambda w, x: (w - x) ** 2, tx)
        >>> with Checkpoints(tempfile.mkdtemp()) as checkpoints:
        ...     for steps in 2, 3:  # as if stopped between
        ...         state = init_state(1.0, tx)
        ...         state, history = resume(checkpoints, state, [])
        ...         state, history = fit(
        ...             step, state, [0.0] * 3, steps=steps, every=1, history=history,
        ...             checkpoints=checkpoints,
        ...         )
        >>> history["step"]
        array([1, 2, 3])
    """
    if checkpoints.latest_step() is None:
        return state, {}
    template = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    # Not two states in memory at once.
    jax.tree.map(lambda x: x.delete() if isinstance(x, jax.Array) else None, state)
    step, state, meta = checkpoints.recover(template)
    if hasattr(batches, "set_state"):
        if "data" not in meta:
            raise ValueError(
                f"checkpoint {step} in {checkpoints.directory} does not say where its "
                "batches were: it was saved with batches of another kind"
            )
        batches.set_state(meta["data"])
    return state, unpacked(meta.get("history", {}))


def packed(history: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """A history in values that JSON knows, to the bit."""
    return {
        name: {
            "dtype": column.dtype.name,
            "shape": list(column.shape),
            "base64": base64.b64encode(column.tobytes()).decode(),
        }
        for name, column in history.items()
    }


def unpacked(stored: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The history that `packed` was given."""
    return {
        name: np.frombuffer(
            base64.b64decode(column["base64"]), jax.numpy.dtype(column["dtype"])
        ).reshape(column["shape"])
        for name, column in stored.items()
    }


def rewind_metrics(path: str | os.PathLike[str], step: int) -> None:
    """Cuts off the records after a step, which a resumed run will write again.

    Args:
        path: a file of `MetricsWriter`, or where none is yet.
        step: the last one whose records stay.
    """
    path = pathlib.Path(path)
    if not path.exists():
        return
    end = 0
    for line in path.read_bytes().splitlines(keepends=True):
        if not line.endswith(b"\n") or json.loads(line)["step"] > step:
            break
        end += len(line)
    os.truncate(path, end)
