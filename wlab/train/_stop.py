# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C and SIGTERM as a wish that a run can hear between two steps."""

import contextlib
import signal
import sys
import threading
from collections.abc import Generator
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """Whether the run was asked to stop."""

    asked = False


@contextlib.contextmanager
def listening(wanted: bool) -> Generator[Stop]:
    """Takes the first Ctrl-C or SIGTERM as a wish; the second ends the process.

    Args:
        wanted: whether to listen; it is possible in the main thread only. A signal
            that is ignored, as ``nohup`` and a shell's background have it, stays so.

    Yields:
        What knows whether the run was asked to stop. The handlers from before are
        back afterwards.
    """
    stop = Stop()
    if not wanted or threading.current_thread() is not threading.main_thread():
        yield stop
        return

    before: dict[int, Any] = {}

    def ask(number: int, frame: FrameType | None) -> None:
        stop.asked = True
        # From here on the system itself acts, whatever Python waits for.
        for each in before:
            signal.signal(each, signal.SIG_DFL)
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        print(
            f"\n{name}: saving after this step; once more stops at once",
            file=sys.stderr,
            flush=True,
        )

    try:
        for each in _SIGNALS:
            if (handler := signal.getsignal(each)) not in (signal.SIG_IGN, None):
                before[each] = handler
                signal.signal(each, ask)
        yield stop
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
