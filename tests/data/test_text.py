# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Corpora are split by document, the same way every time, and lose nothing."""

import hashlib
import os
import pathlib
import sysconfig
import time

import numpy as np
import pytest

from wlab import data
from wlab.data import _text


def documents(tokens):
    return tokens.tobytes().split(b"\0")


def test_pydoc_holds_every_topic_once():
    from pydoc_data import topics

    corpus = data.text("pydoc")
    train, valid = documents(corpus.train), documents(corpus.valid)
    assert sorted(train + valid) == sorted(t.encode() for t in topics.topics.values())
    assert corpus.train.dtype == corpus.valid.dtype == np.uint8
    assert corpus.name == "pydoc"


@pytest.mark.parametrize("name", ["pydoc", "stdlib", "python"])
def test_about_a_twentieth_is_held_out(name):
    corpus = data.text(name)
    share = len(corpus.valid) / (len(corpus.train) + len(corpus.valid))
    assert 0.045 < share < 0.1
    assert len(documents(corpus.valid)) >= 3
    assert not set(documents(corpus.train)) & set(documents(corpus.valid))


def test_digest_names_the_bytes():
    corpus = data.text("pydoc")
    want = hashlib.sha256(corpus.train.tobytes() + corpus.valid.tobytes()).hexdigest()
    assert corpus.digest == want == data.text("pydoc").digest
    assert corpus.digest != data.text("stdlib").digest


def test_stdlib_is_the_library_alone():
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    corpus = data.text("stdlib")
    held = set(documents(corpus.train)) | set(documents(corpus.valid))
    for file in ("json/decoder.py", "dataclasses.py", "asyncio/tasks.py"):
        assert (root / file).read_bytes() in held
    pydoc = root / "pydoc_data" / "topics.py"
    assert pydoc.read_bytes() not in held
    names = _text._sources()
    assert not [n for n in names if {"test", "tests", "idlelib"} & {*n.split("/")}]
    assert not [n for n in names if "site-packages" in n or "_sysconfigdata" in n]


def test_files_that_are_not_utf8_or_hold_a_zero_are_left_out(tmp_path, monkeypatch):
    (tmp_path / "os.py").write_text("plain = 1\n")
    (tmp_path / "latin.py").write_bytes("é = 1\n".encode("latin-1"))
    (tmp_path / "zero.py").write_bytes(b"a\0b")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "inner.py").write_text("left = 1\n")
    monkeypatch.setattr(os, "__file__", str(tmp_path / "os.py"))
    assert _text._sources() == {"stdlib/os.py": b"plain = 1\n"}
    (tmp_path / "os.py").unlink()
    with pytest.raises(FileNotFoundError, match="no Python sources"):
        data.text("stdlib")


def test_python_is_both_with_the_same_documents_held_out():
    whole = data.text("python")
    parts = [data.text("pydoc"), data.text("stdlib")]
    for side in ("train", "valid"):
        want = b"\0".join(getattr(part, side).tobytes() for part in parts)
        assert getattr(whole, side).tobytes() == want


def test_reading_is_quick():
    data.text("pydoc")
    start = time.perf_counter()
    data.text("pydoc")
    assert time.perf_counter() - start < 1


def test_the_split_depends_on_names_not_on_order():
    texts = {f"document {i}": bytes([65 + i % 26]) * (50 + i) for i in range(60)}
    turned = dict(reversed(texts.items()))
    for a, b in zip(_text._split(texts), _text._split(turned), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_long_document_is_never_held_out():
    texts = {"long": b"x" * 5000} | {f"{i}": b"y" * 50 for i in range(100)}
    train, valid = _text._split(texts)
    assert b"x" not in valid.tobytes() and train.tobytes().count(b"x") == 5000
    assert 500 <= len(valid) <= 560


def test_no_such_text():
    with pytest.raises(ValueError, match="'pydoc', 'stdlib' or 'python'"):
        data.text("shakespeare")


def test_a_users_file_gives_its_end_to_validation(tmp_path):
    file = tmp_path / "book.txt"
    file.write_bytes(bytes(range(1, 201)))
    corpus = data.text_files(file)
    assert corpus.train.tolist() == list(range(1, 191))
    assert corpus.valid.tolist() == list(range(191, 201))
    assert corpus.name == "book.txt"


def test_a_users_folder_is_split_by_document(tmp_path):
    (tmp_path / "inner").mkdir()
    texts = {f"inner/{i}.txt": f"document {i} ".encode() * 9 for i in range(60)}
    for name, content in texts.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / ".hidden").write_bytes(b"\0binary")
    (tmp_path / "empty.txt").touch()
    corpus = data.text_files(str(tmp_path))
    train, valid = documents(corpus.train), documents(corpus.valid)
    assert sorted(train + valid) == sorted(texts.values())
    assert 3 <= len(valid) <= 5


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (None, FileNotFoundError, "there is no file or folder"),
        (b"", ValueError, "less than 20 bytes"),
        (b"\x7fELF\0" * 9, ValueError, "holds a 0 byte, so it is not text"),
    ],
)
def test_a_users_mistakes(tmp_path, content, error, message):
    file = tmp_path / "text"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(error, match=message):
        data.text_files(file)


def test_an_unreadable_file_is_named(tmp_path, monkeypatch):
    file = tmp_path / "text"
    file.touch()

    def denied(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(pathlib.Path, "read_bytes", denied)
    with pytest.raises(OSError, match=r"text cannot be read: Permission denied"):
        data.text_files(file)


def test_decode_inverts_encode():
    string = "weights → Gewichte, 重み"
    tokens = data.encode(string)
    assert tokens.dtype == np.uint8 and data.decode(tokens) == string
    assert data.decode(tokens.astype(np.int32).reshape(1, -1)) == string
    assert data.decode([0xFF, 65]) == "\ufffdA"
    with pytest.raises(ValueError, match="are not bytes"):
        data.decode([65, 256])
