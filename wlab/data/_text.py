# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Text as bytes, with no download: what CPython ships, or a user's own files.

A token is a byte, so the vocabulary is 256 and the loss in bits is bits per byte. The
byte 0 stands between documents.
"""

import hashlib
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

__all__ = ["Corpus", "decode", "encode", "text", "text_files"]

# One part in so many is held out.
_HELD_OUT = 20

# Tests, an editor and other people's packages; the topics that are `pydoc` already.
_NOT_STDLIB = {
    *("test", "tests", "idle_test", "idlelib", "pydoc_data"),
    *("site-packages", "dist-packages", "__pycache__"),
}
# Written when the interpreter was built or installed: they differ by machine.
_BY_MACHINE = ("_sysconfigdata", "sitecustomize", "usercustomize")


class Corpus(NamedTuple):
    """Text as bytes, split by document.

    Attributes:
        train: uint8, the documents to learn from, a 0 byte between two of them.
        valid: uint8, the documents held out, likewise.
        name: which text this is.
        digest: sha256 in hexadecimal of `train` followed by `valid`. The text comes
            with the interpreter, so another version of it may bring another text.
    """

    train: np.ndarray
    valid: np.ndarray
    name: str
    digest: str


def encode(string: str) -> np.ndarray:
    """The tokens of a string: its bytes in UTF-8, uint8.

    Examples:
        >>> encode("né").tolist()
        [110, 195, 169]
    """
    return np.frombuffer(string.encode(), np.uint8)


def decode(tokens: ArrayLike) -> str:
    """The string of some tokens; bytes that are not UTF-8 become the mark U+FFFD.

    Args:
        tokens: integers in [0, 256), of any shape; read in row-major order.

    Raises:
        ValueError: if a token is not a byte.

    Examples:
        >>> decode(encode("weights"))
        'weights'
    """
    array = np.asarray(tokens)
    if array.size and (array.min() < 0 or array.max() > 255):
        raise ValueError(
            f"tokens between {array.min()} and {array.max()} are not bytes: only "
            "tokens in [0, 256) can be decoded"
        )
    return array.astype(np.uint8).tobytes().decode(errors="replace")


def text(name: Literal["pydoc", "stdlib", "python"] = "pydoc") -> Corpus:
    """The text that comes with CPython itself.

    A document is held out when, in the order of the hashes of the documents' names, a
    twentieth of the bytes is not yet reached; documents longer than that twentieth are
    never held out. The order does not depend on the machine, and the same document is
    held out of "python" as of its part.

    Args:
        name: "pydoc" is the language reference's help topics, about 0.5 MB of
            technical English; "stdlib" is the sources of the standard library, about
            10 MB of Python, without its tests, its editor and the few files that
            differ by machine, and without files that are not UTF-8 or contain a 0
            byte; "python" is both.

    Returns:
        The corpus.

    Raises:
        ValueError: if there is no such text.
        FileNotFoundError: if this interpreter comes without its sources.

    Examples:
        >>> from wlab import data
        >>> corpus = data.text("pydoc")
        >>> data.decode(corpus.train).count("class") > 100
        True
    """
    if name == "python":
        parts = [text("pydoc"), text("stdlib")]
        train, valid = (
            _join([getattr(p, side).tobytes() for p in parts])
            for side in ("train", "valid")
        )
        return _corpus(train, valid, name)
    if name not in ("pydoc", "stdlib"):
        raise ValueError(f"no text {name!r}: choose 'pydoc', 'stdlib' or 'python'")
    documents = _topics() if name == "pydoc" else _sources()
    return _corpus(*_split(documents), name)


def text_files(path: str | os.PathLike[str]) -> Corpus:
    """A user's own text: a file, or all files of a folder and the folders in it.

    Hidden files and folders, whose names begin with a dot, do not count. Every file is
    a document, taken byte by byte in any encoding, and is held out by the rule of
    `text`. Where that holds out less than half a twentieth, as in a folder of a few
    long files, it is the last twentieth of every file that is held out.

    Args:
        path: a file or a folder.

    Returns:
        The corpus; its name is the last part of `path`.

    Raises:
        FileNotFoundError: if there is nothing at `path`.
        OSError: if a file cannot be read.
        ValueError: if there is no text, or a file is not text.
    """
    paths = text_paths(path)
    documents = {}
    for name, file in paths.items():
        try:
            content = file.read_bytes()
        except OSError as error:
            raise OSError(f"{file} cannot be read: {error.strerror}") from error
        if b"\0" in content:
            raise ValueError(
                f"{file} holds a 0 byte, so it is not text: move it elsewhere, or pass "
                "the path of one text file"
            )
        documents[name] = content
    check_size({name: len(d) for name, d in documents.items()}, path)
    return _corpus(*_split(documents), pathlib.Path(path).resolve().name)


def text_paths(path: str | os.PathLike[str]) -> dict[str, pathlib.Path]:
    """The files that `text_files` reads, by their names within the folder."""
    root = pathlib.Path(path)
    if not root.exists():
        raise FileNotFoundError(f"there is no file or folder {root}")
    files = [root] if root.is_file() else sorted(_visible(root))
    return {file.relative_to(root).as_posix(): file for file in files}


def _visible(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """All files below a folder that are not hidden."""
    for here, folders, files in os.walk(folder):
        folders[:] = [f for f in folders if not f.startswith(".")]
        yield from (pathlib.Path(here, f) for f in files if not f.startswith("."))


def _topics() -> dict[str, bytes]:
    # Half a megabyte that nobody else needs.
    from pydoc_data import topics

    return {f"pydoc/{name}": topic.encode() for name, topic in topics.topics.items()}


def _sources() -> dict[str, bytes]:
    root = pathlib.Path(os.__file__).parent
    documents = {}
    for here, folders, files in os.walk(root):
        folders[:] = [f for f in folders if f not in _NOT_STDLIB]
        for file in files:
            if not file.endswith(".py") or file.startswith(_BY_MACHINE):
                continue
            source = pathlib.Path(here, file)
            content = source.read_bytes()
            if b"\0" not in content and _is_utf8(content):
                documents[f"stdlib/{source.relative_to(root).as_posix()}"] = content
    if not documents:
        raise FileNotFoundError(
            f"this interpreter has no Python sources in {root}: use text('pydoc') or "
            "text_files(path)"
        )
    return documents


def _is_utf8(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True


def check_size(sizes: Mapping[str, int], path: str | os.PathLike[str]) -> None:
    """Refuses files that are too small for any to be held out."""
    if sum(sizes.values()) < _HELD_OUT:
        raise ValueError(
            f"{os.fspath(path)} holds less than {_HELD_OUT} bytes in {len(sizes)} "
            "files: pass a text file, or a folder with text files in it"
        )


def held_out(
    sizes: Mapping[str, int],
) -> tuple[dict[str, tuple[int, int]], dict[str, tuple[int, int]]]:
    """The rule of `text`: which bytes `[start, stop)` of which documents are on a side.

    Args:
        sizes: of the documents in bytes, by their names.

    Returns:
        The documents to learn from and those held out, in the order of their names.
    """
    sizes = {name: sizes[name] for name in sorted(sizes) if sizes[name]}
    wanted = sum(sizes.values()) // _HELD_OUT
    held: set[str] = set()
    size = 0
    for name in sorted(sizes, key=lambda n: hashlib.sha256(n.encode()).digest()):
        if size < wanted and sizes[name] <= wanted:
            held.add(name)
            size += sizes[name]
    if size < wanted / 2:
        cuts = {name: n - n // _HELD_OUT for name, n in sizes.items()}
        train = {name: (0, cut) for name, cut in cuts.items()}
        valid = {name: (cut, sizes[name]) for name, cut in cuts.items()}
    else:
        train = {name: (0, n) for name, n in sizes.items() if name not in held}
        valid = {name: (0, n) for name, n in sizes.items() if name in held}
    return train, valid


def _split(documents: Mapping[str, bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Trains on most documents and holds the others out, by `text`'s rule."""
    train, valid = (
        _join([documents[name][start:stop] for name, (start, stop) in side.items()])
        for side in held_out({name: len(d) for name, d in documents.items()})
    )
    return train, valid


def _join(documents: list[bytes]) -> np.ndarray:
    return np.frombuffer(b"\0".join(d for d in documents if d), np.uint8)


def _corpus(train: np.ndarray, valid: np.ndarray, name: str) -> Corpus:
    digest = hashlib.sha256(train.tobytes() + valid.tobytes()).hexdigest()
    return Corpus(train, valid, name, digest)
