# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Progress bars: one per run, with its loss and its speed."""

from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress
from rich.text import Text

__all__ = ["Progress"]


class _Speed(ProgressColumn):
    """Steps per second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.1f} steps/s")


class Progress:
    """Progress bars on stderr, for one run or for the arms of a comparison.

    Args:
        show: whether to draw them; by default only if stderr is a terminal.

    Examples:
        >>> with Progress(show=False) as progress:
        ...     bar = progress.add("adamw", steps=100)
        ...     bar(10, {"loss": 2.5})
    """

    def __init__(self, *, show: bool | None = None):
        console = Console(stderr=True)
        self._bars = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[loss]}"),
            _Speed(),
            TimeRemainingColumn(),
            console=console,
            disable=not (console.is_terminal if show is None else show),
        )

    def add(
        self,
        name: str,
        steps: int,
        *,
        show: Callable[[Mapping[str, Any]], str] | None = None,
    ) -> Callable[[int, Mapping[str, Any]], None]:
        """Adds a bar.

        Args:
            name: what runs.
            steps: steps until its end.
            show: what to write of the metrics; None: their loss.

        Returns:
            `bar(step, metrics)`, to be called as the run goes on: the `progress` of
            `fit`. It shows metrics["loss"], the mean of it if there are several seeds,
            and keeps the last one shown where a record has none.
        """
        task = self._bars.add_task(name, total=steps, loss="")

        def bar(step: int, metrics: Mapping[str, Any]) -> None:
            self._bars.update(task, completed=step)
            if show is not None:
                self._bars.update(task, loss=show(metrics))
            elif "loss" in metrics:
                self._bars.update(task, loss=f"loss {np.mean(metrics['loss']):.4f}")

        return bar

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bars.stop()
