# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Documents of any length in rows of one length, every row reachable by number.

The documents of an epoch, in the epoch's order and each with a separator behind it,
are one long text, and row `r` is its `r`-th piece. The lengths alone say which
documents a row is made of. So nothing has to be read in order, a position is one
number, and it does not matter how many hosts share the rows.
"""

import threading
from collections.abc import Callable
from typing import Any

import grain
import numpy as np
from grain.sources import RandomAccessDataSource
from numpy.typing import ArrayLike

from wlab.data._pipeline import host_batches
from wlab.data._text import encode

__all__ = ["join", "pack", "token_lengths"]

# How many documents a thread measures at a time.
_CHUNK = 256


def pack(
    documents: RandomAccessDataSource[Any],
    *,
    batch: int,
    length: int,
    seed: int,
    separator: int = 0,
    tokenize: Callable[[Any], ArrayLike] | None = None,
    lengths: ArrayLike | None = None,
    shard: tuple[int, int] = (0, 1),
    threads: int = 4,
) -> grain.DatasetIterator[np.ndarray]:
    """Batches of rows packed from whole documents, in random order, for ever.

    In every epoch the documents are put in a new order, each with a separator behind
    it, and cut into rows: a document that does not fit goes on in the next row, and no
    row is padded. The rows are then drawn in random order, so that a batch is not
    made of one long document. Every token is seen once in an epoch, but for the end
    that is shorter than a row; a batch may end one epoch and begin the next. Empty
    documents count for nothing.

    The batches do not depend on `threads` nor on the number of hosts: host `h` of `H`
    yields rows `[h * batch / H, (h + 1) * batch / H)` of exactly the batch that one
    host alone would yield, and reads no other. A state saved by any host can be
    restored on any number of hosts. It holds for the same documents, `batch`, `length`
    and `seed`.

    Args:
        documents: strings, bytes or 1-D integers, by number: a list, `documents`, a
            `column` of `tfds_source`, or any object with a length and an index.
        batch: rows in a batch, of all hosts together.
        length: tokens that the model reads. A row has one more, so that each of them
            has a next one to predict.
        seed: of the order.
        separator: the token between two documents.
        tokenize: the tokens of a document. A string's are its bytes if this is None;
            integers are tokens already. A document that spans many rows is tokenised
            for each of them, so a slow tokeniser is better applied beforehand.
        lengths: what `token_lengths` gives, `[number of documents]`. If this is None
            they are measured, which reads all documents once, unless `documents` has
            them as its attribute `lengths` and they are its bytes.
        shard: this host's number and how many hosts there are.
        threads: how many threads read ahead; 0 reads when asked.

    Returns:
        An iterator over int32 `[batch / hosts, length + 1]`. Its `get_state()`, which
        can be written as JSON, and `set_state(state)` save and restore its position.

    Raises:
        ValueError: if the documents have not the tokens of one row, a document is no
            text, or `batch` cannot be shared out among the hosts.

    Examples:
        >>> rows = pack(["one", "two", "three"], batch=2, length=4, seed=0)
        >>> next(rows).shape
        (2, 5)
        >>> rows.get_state()
        {'next_index': 1}
    """
    if length < 1:
        raise ValueError(f"length={length} must be positive")
    if not -(2**31) <= separator < 2**31:
        raise ValueError(f"separator={separator} is not an int32")
    if lengths is None and tokenize is None:
        lengths = getattr(documents, "lengths", None)
    if lengths is None:
        lengths = token_lengths(documents, tokenize=tokenize, threads=threads)
    rows = _Rows(
        documents, _checked(lengths, documents), length + 1, seed, separator, tokenize
    )
    # The number that grain hands on counts the epochs too.
    dataset = grain.MapDataset.range(len(rows)).map_with_index(lambda i, _: rows[i])
    dataset = dataset.seed(seed).shuffle().repeat()
    return host_batches(dataset, batch=batch, shard=shard, threads=threads)


def token_lengths(
    documents: RandomAccessDataSource[Any],
    *,
    tokenize: Callable[[Any], ArrayLike] | None = None,
    threads: int = 4,
) -> np.ndarray:
    """How many tokens each document has, by reading all of them once.

    Saved to a file, they spare `pack` this reading at every start.

    Args:
        documents: as for `pack`.
        tokenize: as for `pack`.
        threads: how many threads read.

    Returns:
        int64, `[number of documents]`.

    Raises:
        ValueError: if a document is no text.

    Examples:
        >>> token_lengths(["one", "three"]).tolist()
        [3, 5]
    """
    _check_many(documents)
    if not len(documents):
        return np.zeros(0, np.int64)
    dataset = grain.MapDataset.source(documents)
    dataset = dataset.map_with_index(lambda i, d: len(_tokens(d, i, tokenize)))
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    chunks = dataset.batch(_CHUNK).to_iter_dataset(options)
    return np.concatenate(list(chunks)).astype(np.int64)


def join(
    documents: RandomAccessDataSource[Any],
    *,
    separator: int = 0,
    tokenize: Callable[[Any], ArrayLike] | None = None,
) -> np.ndarray:
    """All documents in their order as one text, as `windows` and `valid_windows` read.

    Args:
        documents: as for `pack`; few enough for the memory.
        separator: the token between two documents; empty ones count for nothing.
        tokenize: as for `pack`.

    Returns:
        int32, `[size]`.

    Raises:
        ValueError: if a document is no text.

    Examples:
        >>> join(["ab", "", "c"]).tolist()
        [97, 98, 0, 99]
    """
    _check_many(documents)
    pieces = []
    for number in range(len(documents)):
        tokens = _tokens(documents[number], number, tokenize).astype(np.int32)
        if len(tokens):
            pieces += [tokens, np.array([separator], np.int32)]
    return np.concatenate(pieces[:-1]) if pieces else np.zeros(0, np.int32)


class _Rows:
    """The rows of all epochs, by number."""

    def __init__(
        self,
        documents: RandomAccessDataSource[Any],
        lengths: np.ndarray,
        size: int,
        seed: int,
        separator: int,
        tokenize: Callable[[Any], ArrayLike] | None,
    ):
        self._documents = documents
        self._numbers = np.flatnonzero(lengths)
        self._lengths = lengths
        self._size = size
        self._seed = seed
        self._separator = separator
        self._tokenize = tokenize
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._lock = threading.Lock()
        total = int(lengths.sum()) + len(self._numbers)
        self._n = total // size
        if not self._n:
            raise ValueError(
                f"{len(lengths)} documents with {total} tokens, separators counted, "
                f"make no row of {size}: take a smaller length or more text"
            )

    def __len__(self) -> int:
        """The rows of one epoch."""
        return self._n

    def __getitem__(self, index: int) -> np.ndarray:
        epoch, number = divmod(index, self._n)
        order, ends = self._epoch(epoch)
        row = np.full(self._size, self._separator, np.int32)
        at = number * self._size
        place = int(np.searchsorted(ends, at, side="right"))
        filled = 0
        while filled < self._size:
            document, end = int(order[place]), int(ends[place])
            # The last place of a document is its separator's, which is there already.
            start = int(self._lengths[document]) - (end - 1 - at)
            tokens = self._read(document, start, start + self._size - filled)
            row[filled : filled + len(tokens)] = tokens
            filled += end - at
            at, place = end, place + 1
        return row

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The documents in the epoch's order, and where each ends with its separator.

        Philox is counter-based and its raw bits are the same in every numpy, which
        `Generator.permutation` does not promise.
        """
        with self._lock:
            if epoch not in self._epochs:
                bits = np.random.Philox(key=np.array([self._seed, epoch], np.uint64))
                drawn = bits.random_raw(len(self._numbers))
                order = self._numbers[np.argsort(drawn, kind="stable")]
                # Two are kept: a batch may lie in both.
                while len(self._epochs) > 1:
                    del self._epochs[next(iter(self._epochs))]
                self._epochs[epoch] = order, np.cumsum(self._lengths[order] + 1)
            return self._epochs[epoch]

    def _read(self, document: int, start: int, stop: int) -> np.ndarray:
        length = int(self._lengths[document])
        if start == length:
            return np.zeros(0, np.int32)
        # A long file need not be read whole for one row.
        if self._tokenize is None and hasattr(self._documents, "span"):
            part = self._documents.span(document, start, min(stop, length))
            return _tokens(part, document, None)
        tokens = _tokens(self._documents[document], document, self._tokenize)
        if len(tokens) != length:
            raise ValueError(
                f"document {document} has {len(tokens)} tokens and not {length}, as "
                "the lengths say: measure them again with token_lengths"
            )
        return tokens[start:stop]


def _tokens(
    document: Any, number: int, tokenize: Callable[[Any], ArrayLike] | None
) -> np.ndarray:
    """A document's tokens: 1-D integers that fit int32."""
    if tokenize is not None:
        document = tokenize(document)
    if isinstance(document, str):
        return encode(document)
    if isinstance(document, bytes | bytearray):
        return np.frombuffer(document, np.uint8)
    kind = type(document).__name__
    tokens = np.asarray(document)
    if tokens.ndim == 1 and not tokens.size:
        return np.zeros(0, np.int32)
    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(
            f"document {number} must be a string, bytes or integers of shape [size], "
            f"not {kind} ({tokens.dtype}{list(tokens.shape)}): pass `tokenize`, or for "
            "one feature of examples `column(source, name)`"
        )
    if not np.can_cast(tokens.dtype, np.int32) and (
        tokens.max() > np.iinfo(np.int32).max or tokens.min() < np.iinfo(np.int32).min
    ):
        raise ValueError(f"document {number} has a token that does not fit int32")
    return tokens


def _checked(lengths: ArrayLike, documents: RandomAccessDataSource[Any]) -> np.ndarray:
    _check_many(documents)
    array = np.asarray(lengths)
    if array.shape != (len(documents),) or (
        array.size and (not np.issubdtype(array.dtype, np.integer) or array.min() < 0)
    ):
        raise ValueError(
            f"lengths must be {len(documents)} integers, one for each document and "
            f"none below 0, not {array.dtype}{list(array.shape)}"
        )
    return array.astype(np.int64)


def _check_many(documents: RandomAccessDataSource[Any]) -> None:
    if isinstance(documents, str | bytes | bytearray):
        raise TypeError(
            "documents is one text: pass a sequence of documents, or cut this one with "
            "windows(encode(text), ...)"
        )
