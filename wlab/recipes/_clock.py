# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""The time of a step, from the records of a run."""

import itertools
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np


class StepClock:
    """Passes records on to a bar, and times the steps between them.

    Args:
      bar: What `wlab.train.Progress.add` returned.
      done: Steps of the bar before this run.

    Examples:
      >>> clock = StepClock(lambda step, metrics: print("bar at", step), done=10)
      >>> clock(5, {"loss": 1.0})
      bar at 15
      >>> clock.milliseconds()
      nan
    """

    def __init__(self, bar: Callable[[int, Mapping[str, Any]], None], done: int = 0):
        self._bar = bar
        self._done = done
        self._marks: list[tuple[int, float]] = []

    def __call__(self, step: int, metrics: Mapping[str, Any]) -> None:
        self._bar(self._done + step, metrics)
        if "loss" in metrics:
            self._marks.append((step, time.perf_counter()))

    def milliseconds(self) -> float:
        """Returns the time of a step; NaN where there are less than two records."""
        # The median: some of the intervals hold an evaluation.
        times = [
            (t1 - t0) / (s1 - s0)
            for (s0, t0), (s1, t1) in itertools.pairwise(self._marks)
        ]
        return 1e3 * float(np.median(times)) if times else float("nan")
