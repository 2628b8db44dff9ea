# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Packed rows lose no token, and neither threads, hosts nor a restart change them."""

import collections
import itertools
import json

import numpy as np
import pytest

from wlab import data
from wlab.data import _packing

# Token by token different, of all lengths from none to several rows of ten.
SIZES = [3, 0, 12, 1, 35, 7, 9, 10, 2, 0, 5, 20]
ENDS = np.cumsum(SIZES)
DOCUMENTS = [
    np.arange(end - size, end) + 1 for size, end in zip(SIZES, ENDS, strict=True)
]
TOTAL = sum(SIZES) + sum(map(bool, SIZES))  # with a separator for each: 114
ROWS = TOTAL // 10


def take(iterator, n):
    return np.stack(list(itertools.islice(iterator, n)))


def packed(documents=DOCUMENTS, **overrides):
    options = {"batch": 1, "length": 9, "seed": 0, "threads": 0}
    return data.pack(documents, **(options | overrides))


@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_an_epoch_holds_every_token_once_but_its_end(epoch):
    rows = take(packed(), 3 * ROWS)[epoch * ROWS : (epoch + 1) * ROWS, 0]
    assert rows.dtype == np.int32 and rows.shape == (11, 10)
    count = collections.Counter(rows.ravel().tolist())
    separators = count.pop(0)
    assert set(count.values()) == {1}
    assert set(count) <= set(range(1, sum(SIZES) + 1))
    # The end that is shorter than a row: four of 114.
    assert len(count) + separators == ROWS * 10 == TOTAL - 4


def test_documents_are_whole_and_apart():
    """A long one goes on in the next row, at its next token; a 0 follows each."""
    rows = _packing._Rows(DOCUMENTS, np.array(SIZES), 10, 0, 0, None)
    for epoch in range(3):
        text = [rows[i] for i in range(epoch * ROWS, (epoch + 1) * ROWS)]
        joined = np.concatenate(text)
        *pieces, end = np.split(joined, np.flatnonzero(joined == 0) + 1)
        whole = [[*d.tolist(), 0] for d in DOCUMENTS if len(d)]
        assert all(piece.tolist() in whole for piece in pieces)
        assert not len(end) or end.tolist() in [d[: len(end)] for d in whole]
        # What is drawn is these rows, each once.
        drawn = take(packed(), 3 * ROWS)[epoch * ROWS : (epoch + 1) * ROWS, 0]
        assert sorted(drawn.tolist()) == sorted(row.tolist() for row in text)


def test_one_document_in_one_row_after_another():
    document = np.arange(1, 100)
    rows = take(packed([document]), 20)[:, 0]
    for epoch in rows.reshape(2, 10, 10):
        together = epoch[np.argsort(epoch[:, 0])].ravel()
        np.testing.assert_array_equal(together, [*document, 0])


def test_order_changes_with_the_epoch_and_the_seed():
    first, second = take(packed(), 2 * ROWS).reshape(2, ROWS, 10)
    # Not the rows' order alone: the documents stand elsewhere in them.
    assert {*map(tuple, first.tolist())} != {*map(tuple, second.tolist())}
    np.testing.assert_array_equal(take(packed(), ROWS)[:, 0], first)
    other = take(packed(seed=1), ROWS)[:, 0]
    assert {*map(tuple, first.tolist())} != {*map(tuple, other.tolist())}


def test_rows_of_an_epoch_are_drawn_in_random_order():
    rows = take(packed([np.arange(1, 1000)]), 100)[:, 0, 0]
    assert not np.array_equal(rows, np.sort(rows))
    np.testing.assert_array_equal(np.sort(rows), np.arange(1, 1000, 10))


def test_golden_order():
    """The same on every machine and with every version, or no run could go on."""
    rows = take(packed(["one", "two", "three", "four"], length=4), 6)[:, 0]
    want = ["hree\0", "two\0f", "one\0t", "four\0", "\0two\0", "three"]
    assert [data.decode(row) for row in rows] == want


@pytest.mark.parametrize("threads", [0, 1, 4])
@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_hosts_share_every_batch(hosts, threads):
    want = take(packed(batch=8), 5)  # 40 rows: nearly four epochs
    options = {"batch": 8, "threads": threads}
    parts = [take(packed(shard=(h, hosts), **options), 5) for h in range(hosts)]
    assert {part.shape for part in parts} == {(5, 8 // hosts, 10)}
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), want)


@pytest.mark.parametrize("hosts", [1, 4])
@pytest.mark.parametrize("steps", range(0, 9))
def test_a_state_may_move_to_another_number_of_hosts(hosts, steps):
    saved = packed(batch=4, shard=(1, 2), threads=2)
    list(itertools.islice(saved, steps))
    state = json.loads(json.dumps(saved.get_state()))
    whole = packed(batch=4)
    want = take(whole, steps + 4)[steps:]
    moved = [packed(batch=4, shard=(h, hosts), threads=2) for h in range(hosts)]
    for iterator in moved:
        next(iterator)
        iterator.set_state(state)
    parts = [take(iterator, 4) for iterator in moved]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), want)


class Counted:
    """Documents that say which of them were read."""

    def __init__(self, documents):
        self.documents, self.read = documents, []

    def __len__(self):
        return len(self.documents)

    def __getitem__(self, index):
        self.read.append(index)
        return self.documents[index]


def test_a_row_reads_its_own_documents_alone():
    documents = Counted([bytes([i + 1]) * 9 for i in range(50)])
    rows = packed(documents, lengths=[9] * 50, batch=2, shard=(1, 2))
    assert not documents.read
    for row in take(rows, 20).reshape(20, 10):
        assert row.tolist() == [documents.read.pop(0) + 1] * 9 + [0]
    assert not documents.read


def test_a_document_is_not_read_for_its_separator():
    documents = Counted([b"0123456789"])
    rows = _packing._Rows(documents, np.array([10]), 10, 0, 0, None)
    assert len(rows) == 1 and rows[0].tolist() == list(b"0123456789")
    rows = _packing._Rows(documents, np.array([10]), 1, 0, 0, None)
    documents.read.clear()
    assert rows[10].tolist() == [0] and not documents.read


def test_two_epochs_are_kept_in_memory():
    rows = _packing._Rows(DOCUMENTS, np.array(SIZES), 10, 0, 0, None)
    want = [rows[i].tolist() for i in range(5 * ROWS)]
    assert sorted(rows._epochs) == [3, 4]
    assert [rows[i].tolist() for i in range(5 * ROWS)] == want


def test_strings_bytes_and_tokens_are_alike():
    strings = ["né", "plain", "", "three words here"]
    kinds = [
        strings,
        [s.encode() for s in strings],
        [data.encode(s) for s in strings],
        [data.encode(s).tolist() for s in strings],
    ]
    first, *others = (take(packed(kind, length=4), 9) for kind in kinds)
    for other in others:
        np.testing.assert_array_equal(other, first)


def test_a_tokenizer_and_a_separator_of_ones_own():
    def words(string):
        return [1000 * len(word) for word in string.split()]

    rows = take(
        packed(["a bb ccc", "dddd", ""], length=5, tokenize=words, separator=-1), 4
    )
    assert {*map(tuple, rows[:, 0].tolist())} == {
        (1000, 2000, 3000, -1, 4000, -1),
        (4000, -1, 1000, 2000, 3000, -1),
    }


def test_token_lengths_count_every_document():
    documents = ["x" * (i % 7) for i in range(1000)]
    for threads in (0, 3):
        lengths = data.token_lengths(documents, threads=threads)
        assert lengths.dtype == np.int64
        assert lengths.tolist() == [i % 7 for i in range(1000)]
    twice = data.token_lengths(["a", ""], tokenize=lambda s: [1] * 2)
    assert twice.tolist() == [2, 2]
    assert data.token_lengths([]).tolist() == []


def test_given_lengths_spare_the_first_reading():
    documents = Counted(DOCUMENTS)
    rows = packed(documents, lengths=SIZES)
    assert not documents.read
    np.testing.assert_array_equal(take(rows, ROWS), take(packed(), ROWS))


def test_wrong_lengths_are_found():
    with pytest.raises(ValueError, match=r"document 0 has 20 tokens and not 21"):
        take(packed(["x" * 20], lengths=[21]), 1)
    for lengths in ([1], [[1, 2]], [1, -1], [0.5, 2.0]):
        with pytest.raises(ValueError, match="must be 2 integers"):
            packed(["a", "b"], lengths=lengths)


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        (["short"], r"1 documents with 6 tokens, separators counted, make no row of"),
        ([], "0 documents with 0 tokens"),
        (["", ""], "2 documents with 0 tokens"),
        (["long enough a text", {"text": b""}], r"document 1 must be.*not dict.*colum"),
        ([np.zeros(30)], r"document 0 must be .*not ndarray \(float64\[30\]\)"),
        ([np.zeros((3, 5), int)], r"int64\[3, 5\]"),
        (np.arange(50), "document 0 must be"),
        ([np.array([2**31] * 20)], "document 0 has a token that does not fit int32"),
    ],
)
def test_what_is_no_document_is_refused(documents, message):
    with pytest.raises(ValueError, match=message):
        packed(documents)


def test_arguments_are_checked():
    with pytest.raises(TypeError, match="documents is one text"):
        packed("a single text, not documents")
    with pytest.raises(ValueError, match="length=0"):
        packed(length=0)
    with pytest.raises(ValueError, match="separator=4294967296"):
        packed(separator=2**32)
    with pytest.raises(ValueError, match=r"batch=3.*among 2 hosts"):
        packed(batch=3, shard=(0, 2))


def test_join_is_the_documents_in_their_order():
    got = data.join(["ab", "", b"c", np.array([500, 501])], separator=7)
    assert got.dtype == np.int32 and got.tolist() == [97, 98, 7, 99, 7, 500, 501]
    assert data.join(["x y"], tokenize=lambda s: [len(s)]).tolist() == [3]
    assert data.join(["", ""]).shape == (0,)
    held = data.valid_windows(data.join(["abc"] * 9), batch=2, length=4, limit=9)
    assert data.decode(held[0, 0]) == "abc\0a"
