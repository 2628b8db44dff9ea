# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""The tokens of a checkpoint: a tokenizer in the files of Hugging Face."""

import json
import os
import pathlib
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

__all__ = ["Tokenizer", "hf_tokenizer"]


class Tokenizer:
    """From text to tokens and back; `encode` is what `pack` and `join` tokenise with.

    Attributes:
        vocab: number of tokens; a model may have more, for a round number.
        bos: the token before a text, as some models are trained; None for none.
        eos: the token behind a text, for `separator`; None if no config tells.
    """

    vocab: int
    bos: int | None
    eos: int | None

    def __init__(self, made: Any, bos: int | None, eos: int | None):
        self._made = made
        self.vocab = made.get_vocab_size(with_added_tokens=True)
        self.bos, self.eos = bos, eos

    def encode(self, text: str | bytes, *, special: bool = False) -> np.ndarray:
        """The tokens of a text.

        Args:
            text: a string, or its bytes in UTF-8, as `documents` has them; those that
                are not UTF-8 become the mark U+FFFD.
            special: whether to add the tokens that the model expects around a text.

        Returns:
            int32, `[size]`.
        """
        if isinstance(text, bytes):
            text = text.decode(errors="replace")
        ids = self._made.encode(text, add_special_tokens=special).ids
        return np.array(ids, np.int32)

    def decode(self, tokens: ArrayLike, *, special: bool = False) -> str:
        """The text of some tokens.

        Args:
            tokens: integers of any shape; read in row-major order.
            special: whether tokens that are no text, such as `eos`, are written.

        Raises:
            ValueError: if a token is none of the vocabulary.
        """
        ids = np.asarray(tokens).reshape(-1)
        if ids.size and not (ids.min() >= 0 and ids.max() < self.vocab):
            raise ValueError(
                f"tokens between {ids.min()} and {ids.max()} are not all in "
                f"[0, {self.vocab}), the vocabulary"
            )
        return self._made.decode(ids.tolist(), skip_special_tokens=not special)


def hf_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Reads the tokenizer of a checkpoint, by the package tokenizers.

    Args:
        path: a folder with ``tokenizer.json`` (and ``tokenizer_config.json``, which
            names the first and the last token), or such a file.

    Returns:
        The tokenizer.

    Raises:
        FileNotFoundError: if there is no such file; one of another kind, such as
            ``tokenizer.model``, is not read.
        ImportError: without the package tokenizers.
    """
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError(
            "hf_tokenizer needs the package tokenizers: pip install wlab[hf]"
        ) from error
    file = pathlib.Path(path)
    if file.is_dir():
        file = file / "tokenizer.json"
    if not file.exists():
        raise FileNotFoundError(
            f"there is no file {file}: save the tokenizer anew with a recent version "
            "of transformers"
        )
    made = tokenizers.Tokenizer.from_file(str(file))
    config: dict[str, Any] = {}
    beside = file.with_name("tokenizer_config.json")
    if beside.exists():
        config = json.loads(beside.read_text(encoding="utf-8"))

    def token(name: str) -> int | None:
        content = config.get(name)
        if isinstance(content, dict):
            content = content.get("content")
        return None if content is None else made.token_to_id(content)

    return Tokenizer(made, token("bos_token"), token("eos_token"))
