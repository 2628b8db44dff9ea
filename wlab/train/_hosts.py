# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Several hosts as one run: how they meet, and how they end when one is lost."""

import atexit
import logging
import os
import socket
import subprocess
import sys
import time
import warnings
from types import TracebackType

import jax

__all__ = ["start_hosts"]

_ADDRESS, _COUNT, _INDEX = (
    "JAX_COORDINATOR_ADDRESS",
    "JAX_NUM_PROCESSES",
    "JAX_PROCESS_ID",
)


def start_hosts(*, timeout: int = 300, heartbeat: int = 100) -> tuple[int, int]:
    """Makes this process one of the hosts of a run; alone, it does nothing.

    Call it first in the program, before anything that makes jax look for devices. The
    hosts find each other by what the launcher says: SLURM's `srun`, Open MPI's
    `mpirun`, a TPU pod slice or an indexed Kubernetes job. Elsewhere set on each host

    - ``JAX_COORDINATOR_ADDRESS``: the address of host 0 and a free port there, such as
      ``10.0.0.1:8476``; the same on all,
    - ``JAX_NUM_PROCESSES``: how many hosts there are,
    - ``JAX_PROCESS_ID``: which one this is, from 0.

    These come before the launcher's, and the address may be set alone beside one. A
    launcher that starts a process for each GPU makes each of them a host.

    When a host is lost or fails, the others cannot go on. They end too, within about
    `heartbeat` seconds, and say how to start again.

    Args:
        timeout: seconds in which all hosts must have come.
        heartbeat: seconds of silence after which a host counts as lost.

    Returns:
        This host's number and how many hosts there are, for the `shard` of
        `wlab.data.windows` and others. A second call returns the same.

    Raises:
        ValueError: if the settings are incomplete or do not fit together.
        TimeoutError: if host 0 cannot be reached at the address that was set.
        RuntimeError: if jax has looked for devices already.

    Examples:
        >>> start_hosts()
        (0, 1)
    """
    if timeout < 1 or heartbeat < 1:
        raise ValueError(f"timeout={timeout} and heartbeat={heartbeat} must be >= 1")
    if not jax.distributed.is_initialized() and not _start(timeout, heartbeat):
        return 0, 1
    return jax.process_index(), jax.process_count()


def _start(timeout: int, heartbeat: int) -> bool:
    """Meets the other hosts; False if there are none."""
    address, count, index = _settings()
    expected = count or _launched()
    if expected == 1:
        return False
    end = time.monotonic() + timeout
    if address and index:
        _reach(address, index, count, end)
    words = None
    if expected:
        words = _LastWords()
        words.say(
            f"wlab: not all of {expected} hosts met at {address or 'host 0'} within "
            f"{timeout} s. Start them all, each with a number of its own; they must "
            "reach that address and port"
        )
    try:
        jax.distributed.initialize(
            address,
            count,
            index,
            initialization_timeout=max(1, round(end - time.monotonic())),
            heartbeat_timeout_seconds=heartbeat,
        )
    except Exception as error:
        if words is not None:
            words.take_back()
        if "must be called before" in str(error):
            if _alone(address, expected):
                return False
            raise RuntimeError(
                "jax has looked for devices already, and found this host's only: call "
                "start_hosts first, before any computation, jax.devices or "
                "jax.device_put"
            ) from error
        if "must be defined" in str(error) or "should be defined" in str(error):
            if address:
                raise _incomplete([_ADDRESS], [_COUNT, _INDEX]) from error
            return False  # no launcher that jax knows
        raise
    index, count = jax.process_index(), jax.process_count()
    if count == 1:
        return False
    words = words or _LastWords()
    words.say(
        f"wlab: host {index} of {count} has stopped, because it was ended or another "
        "host was lost or failed: the lines above and the other hosts' say more. No "
        "host goes on without the others. Start all of them again with the same "
        "command: a run that saves Checkpoints and begins with wlab.train.resume goes "
        "on from the latest one"
    )
    _end_with(words)
    return True


def _settings() -> tuple[str | None, int | None, int | None]:
    """What the user set: address, count and index, all of them or less."""
    set_ = {n: v for n in (_ADDRESS, _COUNT, _INDEX) if (v := os.environ.get(n))}
    numbers: dict[str, int] = {}
    for name in (_COUNT, _INDEX):
        if name in set_:
            if not set_[name].isdecimal():
                raise ValueError(f"{name}={set_[name]!r} must be a number, 0 or more")
            numbers[name] = int(set_[name])
    count, index = numbers.get(_COUNT), numbers.get(_INDEX)
    missing = [n for n in (_ADDRESS, _COUNT, _INDEX) if n not in set_]
    if numbers and missing and not (count == 1 and not index):
        raise _incomplete(list(set_), missing)
    if count is not None and not (index or 0) < count:
        raise ValueError(
            f"{_INDEX}={index} and {_COUNT}={count}: the hosts are numbered from 0 to "
            f"{_COUNT} - 1"
        )
    address = set_.get(_ADDRESS)
    if address and not address.rpartition(":")[2].isdecimal():
        raise ValueError(
            f"{_ADDRESS}={address!r} has no port: write it as 10.0.0.1:8476, with any "
            "free port of host 0"
        )
    return address, count, index


def _incomplete(given: list[str], missing: list[str]) -> ValueError:
    return ValueError(
        f"{' and '.join(given)} set, but not {' and '.join(missing)}: set all three on "
        "every host, or none where a launcher (srun, mpirun, a TPU pod) says them"
    )


def _launched() -> int | None:
    """How many processes Open MPI or SLURM started; None for neither."""
    if "OMPI_MCA_orte_hnp_uri" in os.environ:
        return int(os.environ["OMPI_COMM_WORLD_SIZE"])
    tasks = int(os.environ.get("SLURM_NTASKS", 1))
    if "SLURM_STEP_NODELIST" in os.environ:
        return tasks
    if tasks > 1:
        warnings.warn(
            f"SLURM has {tasks} tasks for this job, but srun did not start this "
            "process: it runs alone. Write srun in front of its command",
            RuntimeWarning,
            stacklevel=4,
        )
    return None


def _alone(address: str | None, expected: int | None) -> bool:
    """Whether nothing speaks of other hosts, where jax can no longer be asked."""
    indexed = "JOB_COMPLETION_INDEX" in os.environ  # a Kubernetes job's pod
    return not (address or expected or indexed) and jax.process_count() == 1


def _reach(address: str, index: int, count: int | None, end: float) -> None:
    """Waits until host 0 listens: jax itself would abort the process."""
    name, _, port = address.rpartition(":")
    began = time.monotonic()
    while True:
        left = max(0.1, end - time.monotonic())
        try:
            socket.create_connection((name.strip("[]"), int(port)), left).close()
            return
        except OSError as error:
            if time.monotonic() + 0.5 > end:
                raise TimeoutError(
                    f"host {index} of {count} found no host 0 at {_ADDRESS}={address} "
                    f"within {time.monotonic() - began:.0f} s ({error}): start host 0, "
                    "and see that this host reaches that address and port"
                ) from error
        time.sleep(0.5)


class _LastWords:
    """A line for stderr if this process ends without taking it back.

    When a host is lost jax aborts the others, from a thread of its own and without a
    word to Python. So a shell holds the line, and learns of the end by the end of its
    input.
    """

    def __init__(self):
        script = (
            "while read -r line; do last=$line; done; "
            '[ -z "$last" ] || printf "%s\\n" "$last" >&2'
        )
        self._shell = subprocess.Popen(
            ["sh", "-c", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            start_new_session=True,  # Ctrl-C is for the run
        )

    def say(self, line: str) -> None:
        """Sets the line in place of the one before."""
        assert self._shell.stdin is not None
        print(line, file=self._shell.stdin, flush=True)

    def take_back(self) -> None:
        """Ends the shell without a line."""
        self._shell.communicate("\n")


def _end_with(words: _LastWords) -> None:
    """Takes the words back at the end of the program, unless an error ends it.

    After an error the process ends at once: otherwise jax waits for the others, and
    they for this one.
    """
    before = sys.excepthook
    failed = False

    def note(
        kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        nonlocal failed
        failed = True
        before(kind, error, trace)

    def end() -> None:
        if not failed:
            words.take_back()
            return
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)

    sys.excepthook = note
    atexit.register(end)
