# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""A folder as a sequence of documents, of which only the sizes are in memory."""

import os
import pathlib
from collections.abc import Mapping
from typing import NamedTuple, SupportsIndex

import numpy as np

from wlab.data._text import check_size, held_out, text_paths

__all__ = ["DocumentSplit", "Documents", "documents"]


class Documents:
    """Files, or parts of files, by number. Each is read when asked for.

    Attributes:
        names: the files' names within the folder.
        lengths: int64, the documents' sizes in bytes, `[number of documents]`.
    """

    names: tuple[str, ...]
    lengths: np.ndarray

    def __init__(
        self,
        paths: Mapping[str, pathlib.Path],
        parts: Mapping[str, tuple[int, int]],
    ):
        self.names = tuple(name for name, (a, b) in parts.items() if b > a)
        self._paths = [paths[name] for name in self.names]
        self._starts = [parts[name][0] for name in self.names]
        sizes = [parts[name][1] - parts[name][0] for name in self.names]
        self.lengths = np.array(sizes, np.int64)

    def __len__(self) -> int:
        """How many documents there are."""
        return len(self._paths)

    def __getitem__(self, index: SupportsIndex) -> bytes:
        """The bytes of one document."""
        number = range(len(self))[index.__index__()]
        return self.span(number, 0, int(self.lengths[number]))

    def span(self, number: int, start: int, stop: int) -> bytes:
        """Bytes `[start, stop)` of one document; the rest of it is not read.

        Raises:
            OSError: if the file cannot be read.
            ValueError: if the file has become shorter, or there is a 0 byte.
        """
        path = self._paths[number]
        try:
            with path.open("rb") as file:
                file.seek(self._starts[number] + start)
                content = file.read(stop - start)
        except OSError as error:
            raise OSError(f"{path} cannot be read: {error.strerror}") from error
        if len(content) != stop - start:
            raise ValueError(
                f"{path} has become shorter since documents() was called: call it again"
            )
        if b"\0" in content:
            raise ValueError(
                f"{path} holds a 0 byte, so it is not text: move it elsewhere"
            )
        return content


class DocumentSplit(NamedTuple):
    """The documents of a folder, split.

    Attributes:
        train: the documents to learn from.
        valid: the documents held out.
    """

    train: Documents
    valid: Documents


def documents(path: str | os.PathLike[str]) -> DocumentSplit:
    """A user's own text as documents for `pack`, for folders larger than the memory.

    The files, and what is held out of them, are those of `text_files`. Only their sizes
    are looked at now; that a file cannot be read or is not text is found when it is
    read.

    Args:
        path: a file or a folder.

    Returns:
        The documents, split.

    Raises:
        FileNotFoundError: if there is nothing at `path`.
        ValueError: if there is no text.
    """
    paths = text_paths(path)
    sizes = {name: file.stat().st_size for name, file in paths.items()}
    check_size(sizes, path)
    train, valid = held_out(sizes)
    return DocumentSplit(Documents(paths, train), Documents(paths, valid))
