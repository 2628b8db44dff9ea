# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Batches of windows over a text: shuffled without end, or fixed for evaluation."""

import grain
import numpy as np

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
    tokens: np.ndarray, *, batch: int, length: int, seed: int
) -> grain.DatasetIterator[np.ndarray]:
    """Batches of windows in random order, for ever.

    Every window is seen once in an epoch, and the order changes with the epoch; a
    batch may end one epoch and begin the next.

    Args:
        tokens: the text, integers, `[size]`.
        batch: windows in a batch.
        length: tokens that the model reads. A window has one more, so that each of
            them has a next one to predict.
        seed: of the order.

    Returns:
        An iterator over int32 `[batch, length + 1]`. Its `get_state()`, which can be
        written as JSON, and `set_state(state)` save and restore its position.

    Raises:
        ValueError: if the text is shorter than one window.

    Examples:
        >>> batches = windows(np.arange(1000), batch=2, length=9, seed=0)
        >>> next(batches).shape
        (2, 10)
        >>> batches.get_state()
        {'next_index': 1}
    """
    source = _source(tokens, batch, length)
    dataset = grain.MapDataset.source(source).seed(seed).shuffle().repeat()
    dataset = dataset.batch(batch, drop_remainder=True)
    # The text is in memory: a thread would wait for the interpreter, not for a disk.
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    return iter(dataset.to_iter_dataset(options))


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
