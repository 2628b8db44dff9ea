# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""The tokenizer of a checkpoint, and windows of what it makes."""

import json
import pathlib
import sys

import numpy as np
import pytest

from wlab import data


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    """A tokenizer of words, which puts <s> before a text when asked."""
    made = pytest.importorskip("tokenizers")
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, "weights": 3, "are": 4, "trees": 5}
    tokenizer = made.Tokenizer(made.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = made.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.post_processor = made.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = {"bos_token": {"content": "<s>"}, "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


def test_there_and_back(folder: pathlib.Path):
    made = data.hf_tokenizer(folder)
    assert (made.vocab, made.bos, made.eos) == (6, 1, 2)
    got = made.encode("weights are trees")
    assert got.dtype == np.int32 and got.tolist() == [3, 4, 5]
    assert made.encode(b"are \xff", special=True).tolist() == [1, 4, 0]
    assert made.decode(np.array([[1, 3], [4, 5]])) == "weights are trees"
    assert made.decode([1, 3], special=True) == "<s> weights"
    with pytest.raises(ValueError, match=r"not all in \[0, 6\), the vocabulary"):
        made.decode([6])
    (folder / "tokenizer_config.json").unlink()
    assert data.hf_tokenizer(folder / "tokenizer.json").eos is None


def test_documents_become_windows(folder: pathlib.Path):
    made = data.hf_tokenizer(folder)
    documents = ["weights are trees", b"trees are weights"]
    text = data.join(documents, tokenize=made.encode, separator=made.eos)
    assert text.tolist() == [3, 4, 5, 2, 5, 4, 3]
    assert next(data.windows(text, batch=2, length=2, seed=0)).shape == (2, 3)
    rows = data.pack(
        documents, batch=1, length=3, seed=0, tokenize=made.encode, separator=made.eos
    )
    assert next(rows)[0, -1] == made.eos


def test_what_is_refused(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"pip install wlab\[hf\]"):
        data.hf_tokenizer(tmp_path)
    monkeypatch.undo()
    pytest.importorskip("tokenizers")
    with pytest.raises(FileNotFoundError, match=r"no file .*tokenizer\.json"):
        data.hf_tokenizer(tmp_path)
