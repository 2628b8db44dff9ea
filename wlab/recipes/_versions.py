# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""What a report says of the run itself: versions, device, time."""

import datetime
import importlib.metadata
import os
import platform
import time
from typing import Any, NamedTuple

import wlab

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "quax")


def versions() -> dict[str, str]:
    """Returns the versions of Python, wlab and what wlab computes with."""
    return {
        "python": platform.python_version(),
        "wlab": wlab.__version__,
        **{name: importlib.metadata.version(name) for name in _PACKAGES},
    }


def device() -> dict[str, Any]:
    """Returns platform, kind and number of jax's devices and of CPU cores."""
    import jax  # here, so that reading a report does not start a backend

    first, *_ = devices = jax.devices()
    return {
        "platform": first.platform,
        "kind": first.device_kind,
        "count": len(devices),
        "cpus": _cpus(),
    }


def _cpus() -> int:
    """Returns the number of cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Stopwatch(NamedTuple):
    """The start of a run.

    Examples:
      >>> watch = Stopwatch.start()
      >>> watch.seconds >= 0
      True
    """

    started: str  # UTC, ISO 8601
    tick: float  # seconds, of a clock that never jumps

    @classmethod
    def start(cls) -> "Stopwatch":
        """Starts one now."""
        now = datetime.datetime.now(datetime.UTC)
        return cls(now.isoformat(timespec="seconds"), time.perf_counter())

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.tick
