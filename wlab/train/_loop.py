# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""The loop around a train step: it never waits for the device it feeds."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental.multihost_utils import reached_preemption_sync_point

from wlab.core import sharding
from wlab.train._checkpoint import Checkpoints
from wlab.train._metrics import MetricsWriter
from wlab.train._resume import packed
from wlab.train._step import StepFn, TrainState, jit_step
from wlab.train._stop import listening

__all__ = ["fit"]


def fit(
    step: StepFn,
    state: TrainState,
    batches: Iterable[Any],
    *,
    steps: int,
    every: int = 10,
    evaluate: Callable[[Any], Mapping[str, Any]] | None = None,
    evaluate_every: int | None = None,
    metrics: MetricsWriter | None = None,
    progress: Callable[[int, Mapping[str, np.ndarray]], None] | None = None,
    checkpoints: Checkpoints | None = None,
    history: Mapping[str, np.ndarray] | None = None,
) -> tuple[TrainState, dict[str, np.ndarray]]:
    """Runs a step until a number of steps is done.

    The step is compiled once and writes over the state that it is given. The host
    stays ahead of the device: metrics are copied in the background and read one
    interval later.

    Args:
        step: from `make_train_step`, or the same under `jax.vmap`.
        state: from `init_state`, `create_state` or a checkpoint; it is used up. Where
            it lives on a mesh it stays there, and the batches are divided over it.
        batches: one batch a step; of several hosts each has its own rows. If they have
            `get_state`, as those of `wlab.data.windows`, checkpoints hold their
            position in `meta["data"]`.
        steps: the run ends when `state.step` has reached this number, so that a
            restored run does the rest only.
        every: metrics are kept at the multiples of this number and at the last step;
            they are those of that step's batch.
        evaluate: `evaluate(params)` returns further metrics, whose names get "valid_"
            in front.
        evaluate_every: evaluates at the multiples of this number and at the last step;
            by default at the last step only.
        metrics: where to write every record; of several processes the first does.
        progress: called with the step and the metrics of every record, such as a bar
            of `Progress`.
        checkpoints: where to save, as often as they say, and at the last step. Then
            Ctrl-C and SIGTERM let the step end and save it first; a second one stops
            at once.
        history: of the steps before, from `resume`; it is put in front of what is
            returned.

    Returns:
        The last state, and the history: arrays `[records]` (with the seeds' axis behind
        for a step under `jax.vmap`), "step" beside the step's metrics and "valid_step"
        beside those of `evaluate`.

    Raises:
        ValueError: if the batches end before the steps are done, or the states of
            several seeds have done different numbers of steps.
        KeyboardInterrupt: after Ctrl-C or SIGTERM.
    """
    done = np.unique(jax.device_get(state.step))
    if len(done) != 1:
        raise ValueError(
            f"the seeds have done {done.tolist()} steps: a run needs them at the same "
            "step"
        )
    mesh = sharding.mesh_of(state)
    run = jit_step(step, state)
    # The others of several processes have the same numbers, and no file.
    first = jax.process_index() == 0
    log = _Log(metrics if first else None, progress if first else None, history or {})
    iterator = iter(batches)
    several = jax.process_count() > 1
    with listening(checkpoints is not None and not several) as stop:
        for i in range(int(done[0]) + 1, steps + 1):
            try:
                batch = next(iterator)
            except StopIteration:
                log.flush()
                raise ValueError(
                    f"the batches ended before step {i} of {steps}: pass batches "
                    "without end, as wlab.data.windows does, or ask for fewer steps"
                ) from None
            with sharding.on_mesh(mesh):
                state, measured = run(state, sharding.place_batch(batch, mesh))
            last = i == steps
            if i % every == 0 or last:
                log.flush()
                log.add(i, measured, prefix="")
            if evaluate and (last or (evaluate_every and i % evaluate_every == 0)):
                log.add(i, evaluate(state.params), prefix="valid_")
            if checkpoints is None:
                continue
            # Several hosts agree on the step after which all of them stop.
            asked = stop.asked or (several and reached_preemption_sync_point(i))
            saves = last or asked or checkpoints.due(i)
            if saves:
                # What is saved must not be ahead of what is written.
                log.flush()
                checkpoints.save(i, state, _meta(batches, log))
            if asked or (saves and stop.asked):
                _stopped(checkpoints, i, steps)
    log.flush()
    return state, log.history()


def _meta(batches: Any, log: "_Log") -> dict[str, Any]:
    """What a checkpoint holds beside the state."""
    position = getattr(batches, "get_state", None)
    data = {"data": position()} if position else {}
    return data | {"history": packed(log.history())}


def _stopped(checkpoints: Checkpoints, step: int, steps: int) -> NoReturn:
    """Ends a run that was asked to stop, when its state is on the disk."""
    checkpoints.wait()
    saved = checkpoints.latest_step()
    raise KeyboardInterrupt(
        f"stopped after step {step} of {steps}; {checkpoints.directory} holds step "
        f"{saved}"
    )


class _Log:
    """Records that are on their way from the device, and those that have arrived."""

    def __init__(
        self,
        writer: MetricsWriter | None,
        progress: Callable[[int, Mapping[str, np.ndarray]], None] | None,
        before: Mapping[str, np.ndarray],
    ):
        self._writer = writer
        self._progress = progress
        self._coming: list[tuple[int, dict[str, Any], str]] = []
        self._columns = {name: list(column) for name, column in before.items()}

    def add(self, step: int, values: Mapping[str, Any], *, prefix: str) -> None:
        """Starts the copy of a record to the host."""
        record = {prefix + name: value for name, value in values.items()}
        for leaf in jax.tree.leaves(record):
            if isinstance(leaf, jax.Array):
                leaf.copy_to_host_async()
        self._coming.append((step, record, f"{prefix}step"))

    def flush(self) -> None:
        """Waits for the records on their way and hands them on."""
        for step, record, step_name in self._coming:
            values = {name: np.asarray(value) for name, value in record.items()}
            for name, value in ({step_name: step} | values).items():
                self._columns.setdefault(name, []).append(value)
            if self._writer is not None:
                self._writer.write(step, values)
            if self._progress is not None:
                self._progress(step, values)
        self._coming.clear()

    def history(self) -> dict[str, np.ndarray]:
        return {name: np.asarray(column) for name, column in self._columns.items()}
