# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Every window once an epoch, in an order that can be saved and taken up again."""

import itertools
import json

import numpy as np
import pytest

from wlab import data
from wlab.data import _windows

TEXT = np.arange(107, dtype=np.uint8)  # ten windows of ten, and a rest of seven


def take(iterator, n):
    return np.stack(list(itertools.islice(iterator, n)))


def batches(**overrides):
    return data.windows(TEXT, **({"batch": 2, "length": 9, "seed": 0} | overrides))


def test_an_epoch_holds_every_window_once():
    epoch = take(batches(), 5).reshape(10, 10)
    assert epoch.dtype == np.int32
    np.testing.assert_array_equal(np.sort(epoch[:, 0]), np.arange(0, 100, 10))
    np.testing.assert_array_equal(epoch, epoch[:, :1] + np.arange(10))


def test_order_changes_with_the_epoch_and_the_seed():
    first, second = take(batches(), 10).reshape(2, 10, 10)
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(np.sort(first[:, 0]), np.sort(second[:, 0]))
    np.testing.assert_array_equal(take(batches(), 5), first.reshape(5, 2, 10))
    assert not np.array_equal(take(batches(seed=1), 5), first.reshape(5, 2, 10))


def test_a_batch_may_be_larger_than_the_text():
    assert take(batches(batch=25), 2).shape == (2, 25, 10)
    assert take(batches(batch=1), 2).shape == (2, 1, 10)


def test_a_restored_iterator_goes_on_alike():
    iterator = batches()
    take(iterator, 7)
    state = json.loads(json.dumps(iterator.get_state()))
    want = take(iterator, 6)
    fresh = batches()
    take(fresh, 2)
    fresh.set_state(state)
    np.testing.assert_array_equal(take(fresh, 6), want)


def test_too_short_a_text_is_refused():
    with pytest.raises(ValueError, match=r"107 tokens is shorter than one window of 1"):
        batches(length=107)
    assert take(batches(length=106), 1).shape == (1, 2, 107)


def test_tokens_and_sizes_are_checked():
    with pytest.raises(ValueError, match=r"integers of shape \[size\], not float64"):
        data.windows(np.zeros(100), batch=1, length=5, seed=0)
    with pytest.raises(ValueError, match="batch=0"):
        batches(batch=0)


def test_valid_windows_spread_evenly():
    got = data.valid_windows(TEXT, batch=2, length=9, limit=2)
    assert got.dtype == np.int32
    assert got[..., 0].tolist() == [[0, 20], [50, 70]]
    np.testing.assert_array_equal(got[1, 1], np.arange(70, 80))


def test_valid_windows_are_as_many_as_there_are():
    got = data.valid_windows(TEXT, batch=3, length=9, limit=100)
    assert got.shape == (3, 3, 10)
    assert len(np.unique(got[..., 0])) == 9
    with pytest.raises(ValueError, match="10 windows of 10 tokens make no batch of 11"):
        data.valid_windows(TEXT, batch=11, length=9, limit=1)


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_hosts_share_every_batch(hosts):
    want = take(batches(batch=8), 6)  # 48 windows: nearly five epochs
    parts = [take(batches(batch=8, shard=(h, hosts)), 6) for h in range(hosts)]
    assert {part.shape for part in parts} == {(6, 8 // hosts, 10)}
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), want)


def test_a_host_reads_its_own_windows_alone(monkeypatch):
    read = []
    getitem = _windows._Windows.__getitem__
    monkeypatch.setattr(
        _windows._Windows,
        "__getitem__",
        lambda self, index: read.append(index) or getitem(self, index),
    )
    own = take(batches(batch=4, shard=(1, 2)), 2)
    np.testing.assert_array_equal(np.ravel(own[..., 0]), np.array(read) * 10)


@pytest.mark.parametrize("hosts", [1, 4])
def test_a_state_may_move_to_another_number_of_hosts(hosts):
    saved = batches(batch=8, shard=(1, 2))
    take(saved, 3)
    state = json.loads(json.dumps(saved.get_state()))
    whole = batches(batch=8)
    take(whole, 3)
    assert whole.get_state() == state
    moved = [batches(batch=8, shard=(h, hosts)) for h in range(hosts)]
    for iterator in moved:
        iterator.set_state(state)
    parts = [take(iterator, 5) for iterator in moved]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), take(whole, 5))


def test_shares_are_checked():
    with pytest.raises(ValueError, match=r"batch=6.*equally among 4 hosts"):
        batches(batch=6, shard=(0, 4))
    for shard in [(2, 2), (-1, 2), (0, 0)]:
        with pytest.raises(ValueError, match="the number from 0"):
            batches(shard=shard)
