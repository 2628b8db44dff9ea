# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Batches of dicts: every example once an epoch, on any number of hosts."""

import itertools
import json

import jax
import numpy as np
import pytest

from wlab import data

EXAMPLES = [
    {"image": np.full((2, 3, 1), i, np.uint8), "label": i % 3} for i in range(11)
]


def take(iterator, n):
    """The first batches, each leaf `[n, batch, ...]`."""
    return jax.tree.map(lambda *x: np.stack(x), *itertools.islice(iterator, n))


def batches(examples=EXAMPLES, **overrides):
    return data.batches(examples, **({"batch": 4, "seed": 0} | overrides))


def test_an_epoch_holds_every_example_once():
    got = take(batches(batch=1), 22)
    assert got["image"].shape == (22, 1, 2, 3, 1) and got["image"].dtype == np.uint8
    numbers = got["image"][..., 0, 0, 0].reshape(2, 11)
    np.testing.assert_array_equal(np.sort(numbers), [np.arange(11)] * 2)
    assert not np.array_equal(*numbers)
    # An image keeps its class.
    np.testing.assert_array_equal(got["label"].ravel(), numbers.ravel() % 3)


def test_order_depends_on_the_seed():
    assert not np.array_equal(
        take(batches(), 2)["image"], take(batches(seed=1), 2)["image"]
    )


@pytest.mark.parametrize("threads", [0, 3])
@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_hosts_share_every_batch(hosts, threads):
    want = take(batches(threads=0), 9)  # more than three epochs
    parts = [take(batches(shard=(h, hosts), threads=threads), 9) for h in range(hosts)]
    joined = jax.tree.map(lambda *x: np.concatenate(x, axis=1), *parts)
    jax.tree.map(np.testing.assert_array_equal, joined, want)


@pytest.mark.parametrize("hosts", [1, 4])
@pytest.mark.parametrize("steps", [0, 1, 2, 3, 6])
def test_a_state_may_move_to_another_number_of_hosts(hosts, steps):
    saved = batches(shard=(1, 2))
    list(itertools.islice(saved, steps))
    state = json.loads(json.dumps(saved.get_state()))
    want = take(batches(), steps + 4)["image"][steps:]
    parts = []
    for host in range(hosts):
        moved = batches(shard=(host, hosts))
        next(moved)
        moved.set_state(state)
        parts.append(take(moved, 4)["image"])
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), want)


def test_a_transform_makes_one_shape():
    odd = [np.full(i + 1, i) for i in range(6)]
    with pytest.raises(ValueError, match="same structure"):
        next(batches(odd))
    got = take(batches(odd, transform=lambda x: {"x": x[:1] * 2.0}), 3)
    np.testing.assert_array_equal(
        np.sort(got["x"].reshape(2, 6)), [[0, 2, 4, 6, 8, 10]] * 2
    )


def test_mistakes():
    with pytest.raises(ValueError, match="no examples"):
        batches([])
    with pytest.raises(ValueError, match=r"batch=4.*among 3 hosts"):
        batches(shard=(0, 3))


def test_a_column_is_one_feature():
    labels = data.column(EXAMPLES, "label")
    assert list(labels) == [i % 3 for i in range(11)]
    assert len(labels) == 11 and labels[-1] == 1
    with pytest.raises(IndexError):
        labels[11]


def test_a_column_that_is_not_there():
    with pytest.raises(ValueError, match=r"'text', but \['image', 'label'\]"):
        data.column(EXAMPLES, "text")
    with pytest.raises(ValueError, match="no feature 'text', but <class 'bytes'>"):
        data.column([b"x"], "text")
    with pytest.raises(ValueError, match="no examples"):
        data.column([], "text")
