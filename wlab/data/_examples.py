# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Batches of examples that are dicts of arrays, as images with their classes are."""

from collections.abc import Callable
from typing import Any, SupportsIndex

import grain
from grain.sources import RandomAccessDataSource

from wlab.data._pipeline import host_batches

__all__ = ["Column", "batches", "column"]


def batches(
    examples: RandomAccessDataSource[Any],
    *,
    batch: int,
    seed: int,
    transform: Callable[[Any], Any] | None = None,
    shard: tuple[int, int] = (0, 1),
    threads: int = 4,
) -> grain.DatasetIterator[Any]:
    """Batches of examples in random order, for ever.

    Every example is seen once in an epoch, and the order changes with the epoch; a
    batch may end one epoch and begin the next. The batches do not depend on `threads`
    nor on the number of hosts: host `h` of `H` yields rows
    `[h * batch / H, (h + 1) * batch / H)` of the batch that one host alone would yield,
    and reads no other. A state saved by any host can be restored on any number.

    Args:
        examples: trees of arrays by number: `tfds_source`, a list, or any object with
            a length and an index.
        batch: examples in a batch, of all hosts together.
        seed: of the order.
        transform: what is done to each example before it joins the batch, as a resize
            to one shape. It must give the same for the same example.
        shard: this host's number and how many hosts there are.
        threads: how many threads read ahead; 0 reads when asked.

    Returns:
        An iterator over trees of numpy arrays, a leaf `[batch / hosts, ...]`. Its
        `get_state()`, which can be written as JSON, and `set_state(state)` save and
        restore its position.

    Raises:
        ValueError: if there are no examples, or `batch` cannot be shared out among the
            hosts; at the batch, if its examples differ in shape or structure.

    Examples:
        >>> import numpy as np
        >>> examples = [{"x": np.full(3, i), "y": i} for i in range(10)]
        >>> first = next(batches(examples, batch=4, seed=0))
        >>> first["x"].shape, first["y"].shape
        ((4, 3), (4,))
    """
    if not len(examples):
        raise ValueError("there are no examples: pass a source that is not empty")
    dataset = grain.MapDataset.source(examples).seed(seed).shuffle().repeat()
    if transform is not None:
        dataset = dataset.map(transform)
    return host_batches(dataset, batch=batch, shard=shard, threads=threads)


class Column:
    """One feature of examples, by number; see `column`."""

    def __init__(self, examples: RandomAccessDataSource[Any], name: str):
        self._examples = examples
        self._name = name

    def __len__(self) -> int:
        """How many examples there are."""
        return len(self._examples)

    def __getitem__(self, index: SupportsIndex) -> Any:
        """The feature of one example, which is read now."""
        number = range(len(self))[index.__index__()]
        return self._examples[number][self._name]


def column(examples: RandomAccessDataSource[Any], name: str) -> Column:
    """One feature of examples that are dicts: the texts of a dataset, for `pack`.

    Args:
        examples: dicts by number, as of `tfds_source`.
        name: the feature.

    Returns:
        The feature by number, each read when asked for.

    Raises:
        ValueError: if there are no examples, or they have no such feature.

    Examples:
        >>> column([{"text": b"one"}, {"text": b"two"}], "text")[1]
        b'two'
    """
    if not len(examples):
        raise ValueError("there are no examples: pass a source that is not empty")
    features = examples[0]
    if not isinstance(features, dict) or name not in features:
        have = sorted(features) if isinstance(features, dict) else type(features)
        raise ValueError(f"the examples have no feature {name!r}, but {have}")
    return Column(examples, name)
