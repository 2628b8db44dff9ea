# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""A host reads its rows of every global batch, whatever the threads do."""

import threading
import time

import grain
import numpy as np
import pytest

from wlab.data import _pipeline


def rows(n, read=None, wait=None):
    def take(index, element):
        if read is not None:
            read.append(index)
        if wait is not None:
            time.sleep(wait(index))
        return element

    return grain.MapDataset.range(n).map_with_index(take).repeat()


def first(n, dataset, **options):
    iterator = _pipeline.host_batches(dataset, **options)
    got = np.stack([next(iterator) for _ in range(n)])
    iterator.close()
    return got


@pytest.mark.parametrize("hosts", [1, 2, 3, 6])
def test_the_parts_of_a_batch_lie_side_by_side(hosts):
    want = np.arange(30).reshape(5, 6) % 7
    options = {"batch": 6, "threads": 0}
    parts = [first(5, rows(7), shard=(h, hosts), **options) for h in range(hosts)]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), want)


def test_no_other_hosts_row_is_read():
    read = []
    first(3, rows(100, read), batch=4, shard=(1, 2), threads=0)
    assert read == [2, 3, 6, 7, 10, 11]


def test_the_order_is_not_the_threads():
    # The earlier a row, the longer its reading: threads that race would turn them.
    slow = rows(40, wait=lambda index: 0.02 if index % 8 == 0 else 0)
    got = first(5, slow, batch=4, shard=(0, 1), threads=4)
    np.testing.assert_array_equal(got, np.arange(20).reshape(5, 4))


def test_threads_read_ahead_and_not_too_far():
    read = []
    iterator = _pipeline.host_batches(
        rows(1000, read), batch=1, shard=(0, 1), threads=2
    )
    next(iterator)
    deadline = time.monotonic() + 10
    while len(read) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    # One is out, and two for each thread are waiting.
    assert sorted(read) == [0, 1, 2, 3, 4]
    iterator.close()


def test_without_threads_the_caller_reads():
    seen = []
    dataset = rows(9).map(lambda x: seen.append(threading.current_thread()) or x)
    first(2, dataset, batch=2, shard=(0, 1), threads=0)
    assert set(seen) == {threading.main_thread()}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 0}, "batch=0 must be positive"),
        ({"batch": 6, "shard": (0, 4)}, "batch=6.*take a multiple of 4"),
        ({"shard": (2, 2)}, r"shard=\(2, 2\).*jax.process_index"),
        ({"shard": (-1, 2)}, "the number from 0"),
        ({"threads": -1}, "threads=-1"),
    ],
)
def test_sizes_are_checked(options, message):
    options = {"batch": 4, "shard": (0, 1), "threads": 0} | options
    with pytest.raises(ValueError, match=message):
        _pipeline.host_batches(rows(9), **options)
