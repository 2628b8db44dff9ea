# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""A folder's documents are those of `text_files`, each read when it is wanted."""

import itertools
import pathlib

import numpy as np
import pytest

from wlab import data


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "inner").mkdir()
    for i in range(60):
        name = f"inner/{i}.txt" if i % 2 else f"{i}.txt"
        (tmp_path / name).write_bytes(f"document {i} ".encode() * (5 + i % 7))
    (tmp_path / ".hidden").write_bytes(b"\0binary")
    (tmp_path / "empty.txt").touch()
    return tmp_path


def test_the_documents_are_those_of_text_files(folder):
    split, corpus = data.documents(folder), data.text_files(folder)
    for side in ("train", "valid"):
        documents = getattr(split, side)
        want = getattr(corpus, side).tobytes().split(b"\0")
        assert list(documents) == want
        assert documents.lengths.tolist() == [len(d) for d in want]
        for name, content in zip(documents.names, want, strict=True):
            assert (folder / name).read_bytes() == content
        np.testing.assert_array_equal(data.join(documents), getattr(corpus, side))
    assert 3 <= len(split.valid) <= 5 and len(split.train) + len(split.valid) == 60


def test_a_few_long_files_give_their_ends(tmp_path):
    for name in "ab":
        (tmp_path / name).write_bytes(name.encode() * 380 + b"the end of the file")
    (tmp_path / "c").write_bytes(b"too short")
    split, corpus = data.documents(str(tmp_path)), data.text_files(tmp_path)
    assert split.train.names == ("a", "b", "c")
    assert split.valid.names == ("a", "b"), "a twentieth of c is nothing"
    for side in ("train", "valid"):
        want = getattr(corpus, side).tobytes().split(b"\0")
        assert list(getattr(split, side)) == want
    one = data.documents(tmp_path / "a")
    assert one.train[0] + one.valid[0] == (tmp_path / "a").read_bytes()


def test_indices_are_a_sequences(folder):
    documents = data.documents(folder).train
    assert documents[-1] == documents[len(documents) - 1] == list(documents)[-1]
    assert documents[np.int64(2)] == documents[2]
    with pytest.raises(IndexError):
        documents[len(documents)]


def test_packing_a_folder_is_packing_its_texts(folder):
    documents = data.documents(folder).train
    options = {"batch": 4, "length": 31, "seed": 0}
    got = data.pack(documents, **options)
    want = data.pack(list(documents), **options)
    for a, b in itertools.islice(zip(got, want, strict=True), 60):
        np.testing.assert_array_equal(a, b)


def test_a_row_reads_its_part_of_a_long_file_alone(tmp_path, monkeypatch):
    (tmp_path / "long").write_bytes(b"abcd" * 1000)
    documents = data.documents(tmp_path).train
    asked = []
    span = documents.span
    monkeypatch.setattr(
        documents, "span", lambda n, a, b: asked.append(b - a) or span(n, a, b)
    )
    rows = data.pack(documents, batch=1, length=9, seed=0, threads=0)
    assert not asked, "the sizes are known from the files"
    for _ in range(50):
        next(rows)
    assert max(asked) <= 10
    # A tokeniser must have it whole.
    asked.clear()
    rows = data.pack(
        documents, batch=1, length=9, seed=0, threads=0, tokenize=lambda d: [len(d)] * 9
    )
    assert next(rows).tolist() == [[3800] * 9 + [0]]
    assert set(asked) == {3800}


def test_nothing_is_read_before_it_is_wanted(folder, monkeypatch):
    def refused(*_args, **_kwargs):
        raise AssertionError("a file was opened")

    monkeypatch.setattr(pathlib.Path, "open", refused)
    monkeypatch.setattr(pathlib.Path, "read_bytes", refused)
    data.pack(data.documents(folder).train, batch=2, length=9, seed=0)


def test_a_file_that_is_no_text_is_named_when_it_is_read(folder):
    (folder / "binary").write_bytes(b"\x7fELF\0" * 9)
    split = data.documents(folder)
    with pytest.raises(ValueError, match="binary holds a 0 byte, so it is not text"):
        list(itertools.chain(split.train, split.valid))


def test_a_file_that_changed_is_named(folder):
    documents = data.documents(folder).train
    (folder / documents.names[0]).write_bytes(b"shorter")
    with pytest.raises(ValueError, match=r"\.txt has become shorter"):
        documents[0]
    (folder / documents.names[0]).unlink()
    with pytest.raises(OSError, match=r"\.txt cannot be read: No such file"):
        documents[0]


def test_a_users_mistakes(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file or folder"):
        data.documents(tmp_path / "none")
    with pytest.raises(ValueError, match="less than 20 bytes in 0 files"):
        data.documents(tmp_path)
