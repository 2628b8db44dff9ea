# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Files that are there whole, or not at all."""

import contextlib
import os
import pathlib
from collections.abc import Generator


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Generator[pathlib.Path]:
    """Gives a path to write to, which takes the place of `path` when done.

    Whatever ends the process or the machine, the old file or the new is there.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        with part.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
