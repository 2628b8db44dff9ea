# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""What every pipeline ends with: this host's rows of every global batch."""

from typing import Any

import grain

__all__ = ["host_batches"]


def host_batches(
    dataset: grain.MapDataset[Any],
    *,
    batch: int,
    shard: tuple[int, int],
    threads: int,
) -> grain.DatasetIterator[Any]:
    """Iterates over one host's rows of the batches of a dataset without end.

    Args:
        dataset: the rows, by number.
        batch: rows in a batch of all hosts together.
        shard: this host's number and how many hosts there are.
        threads: how many threads read ahead, each a batch; 0 reads when asked.

    Returns:
        The iterator. Its state counts batches, so it is the same on every host and
        for any number of hosts.

    Raises:
        ValueError: if the shard or a size makes no sense.
    """
    host, hosts = shard
    if not 0 <= host < hosts:
        raise ValueError(
            f"shard={shard} must be (this host's number, how many hosts there are), "
            "the number from 0: (jax.process_index(), jax.process_count())"
        )
    if batch < 1:
        raise ValueError(f"batch={batch} must be positive")
    if batch % hosts:
        raise ValueError(
            f"batch={batch}, the rows of all hosts together, cannot be shared out "
            f"equally among {hosts} hosts: take a multiple of {hosts}"
        )
    if threads < 0:
        raise ValueError(f"threads={threads} must not be negative")
    # In batches of one host's size, the parts of a global batch lie side by side.
    parts = dataset.batch(batch // hosts, drop_remainder=True)[host::hosts]
    # Two batches a thread: grain's own buffer of 500 is too much for images.
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    return iter(parts.to_iter_dataset(options))
