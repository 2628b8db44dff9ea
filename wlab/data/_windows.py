# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Batches of windows over a text: shuffled without end, or fixed for evaluation."""

import grain
import numpy as np

from wlab.data._pipeline import host_batches

__all__ = ["valid_windows", "windows"]


class _Windows:
    """The non-overlapping windows of a text, by number: grain's random access."""

    def __init__(self, tokens: np.ndarray, size: int):
        self._tokens = tokens
        self._size = size

    def __len__(self) -> int:
        return len(self._tokens) // self._size

    def __getitem__(self, index: int) -> np.ndarray:
        start = index * self._size
        return self._tokens[start : start + self._size].astype(np.int32)


def windows(
    tokens: np.ndarray,
    *,
    batch: int,
    length: int,
    seed: int,
    shard: tuple[int, int] = (0, 1),
) -> grain.DatasetIterator[np.ndarray]:
    """Batches of windows in random order, for ever.

    Every window is seen once in an epoch, and the order changes with the epoch; a
    batch may end one epoch and begin the next.

    Several hosts share a batch: host `h` of `H` yields rows
    `[h * batch / H, (h + 1) * batch / H)` of exactly the batch that one host alone
    would yield, and reads no other. A state saved by any host can be restored on any
    number of hosts, for the same `batch`.

    Args:
        tokens: the text, integers, `[size]`; the same on every host.
        batch: windows in a batch, of all hosts together.
        length: tokens that the model reads. A window has one more, so that each of
            them has a next one to predict.
        seed: of the order.
        shard: this host's number and how many hosts there are.

    Returns:
        An iterator over int32 `[batch / hosts, length + 1]`. Its `get_state()`, which
        can be written as JSON, and `set_state(state)` save and restore its position.

    Raises:
        ValueError: if the text is shorter than one window, or `batch` cannot be shared
            out equally among the hosts.

    Examples:
        >>> batches = windows(np.arange(1000), batch=2, length=9, seed=0)
        >>> next(batches).shape
        (2, 10)
        >>> batches.get_state()
        {'next_index': 1}
    """
    source = _source(tokens, batch, length)
    dataset = grain.MapDataset.source(source).seed(seed).shuffle().repeat()
    # The text is in memory: a thread would wait for the interpreter, not for a disk.
    return host_batches(dataset, batch=batch, shard=shard, threads=0)


def valid_windows(
    tokens: np.ndarray, *, batch: int, length: int, limit: int
) -> np.ndarray:
    """The same few batches each time, from windows spread evenly over a text.

    Args:
        tokens: the text, integers, `[size]`.
        batch: windows in a batch.
        length: tokens that the model reads; a window has one more.
        limit: the most batches wanted; fewer if the text has no more whole ones.

    Returns:
        int32, `[n, batch, length + 1]`.

    Raises:
        ValueError: if the text is shorter than one batch.
    """
    source = _source(tokens, batch, length)
    n = min(limit, len(source) // batch)
    if n < 1:
        raise ValueError(
            f"{len(source)} windows of {length + 1} tokens make no batch of {batch}, "
            f"and limit is {limit}: take a smaller batch or length, a longer text, and "
            "a positive limit"
        )
    chosen = np.arange(n * batch) * len(source) // (n * batch)
    return np.stack([source[i] for i in chosen.tolist()]).reshape(n, batch, length + 1)


def _source(tokens: np.ndarray, batch: int, length: int) -> _Windows:
    tokens = np.asarray(tokens)
    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(
            f"tokens must be integers of shape [size], not {tokens.dtype}"
            f"{list(tokens.shape)}"
        )
    if batch < 1 or length < 1:
        raise ValueError(f"batch={batch} and length={length} must be positive")
    if len(tokens) < length + 1:
        raise ValueError(
            f"a text of {len(tokens)} tokens is shorter than one window of {length + 1}"
            ": take a smaller length or a longer text"
        )
    return _Windows(tokens, length + 1)
