# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Any dataset of tensorflow-datasets, by name, read without TensorFlow."""

import difflib
import os
from collections.abc import Iterable
from typing import Any

from grain.sources import RandomAccessDataSource

__all__ = ["tfds_source"]

_FORMAT = "array_record"


def tfds_source(
    name: str,
    split: str,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    download: bool = False,
) -> RandomAccessDataSource[dict[str, Any]]:
    """The examples of a dataset of tensorflow-datasets, by number.

    Texts go to `pack(column(source, "text"), ...)`, images to `batches(source, ...)`.
    TensorFlow is not used. Only array_record files can be read by number. To prepare
    some datasets, not to read them, tensorflow-datasets itself needs TensorFlow: those
    that it encodes from arrays, as "mnist".

    Args:
        name: the dataset, as `"imdb_reviews"`, `"name/config"` or `"name:version"`.
        split: as `"train"` or `"train[:90%]"`.
        data_dir: where the prepared files are, `~/tensorflow_datasets` by default.
        download: whether to download and prepare the dataset if it is not there. On
            several hosts with one disk, let one of them do it first.

    Returns:
        An object with a length and an index; an example is a dict of numpy arrays,
        numbers and bytes, read when asked for.

    Raises:
        FileNotFoundError: if the dataset is not prepared and `download` is False.
        ValueError: if there is no such dataset or split, or it is prepared in another
            format.
        ModuleNotFoundError: if it cannot be prepared without a package that is not
            installed, as TensorFlow.
    """
    # It takes long to import, and only this function needs it.
    import tensorflow_datasets as tfds

    where = None if data_dir is None else os.fspath(data_dir)
    try:
        builder = tfds.builder(name, data_dir=where)
    except tfds.core.DatasetNotFoundError as error:
        known = tfds.list_builders(with_community_datasets=False)
        if where is not None and os.path.isdir(where):
            known += os.listdir(where)
        raise ValueError(
            f"tensorflow-datasets has no dataset {name!r}, and {where or 'its folder'} "
            f"has none prepared{_near(name.split('/')[0].split(':')[0], known)}"
        ) from error
    except AssertionError as error:  # of an unknown version
        raise ValueError(str(error)) from error
    if not builder.is_prepared():
        if not download:
            raise FileNotFoundError(
                f"dataset {name!r} is not prepared in {builder.data_path}: pass "
                "download=True, or the data_dir where it is"
            )
        builder = tfds.builder(name, data_dir=where, file_format=_FORMAT)
        try:
            builder.download_and_prepare()
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"tensorflow-datasets cannot prepare {name!r} without a package that "
                f"is not installed ({error}): install it, or prepare the dataset where "
                f"it is, with file_format={_FORMAT!r}, and pass that folder as "
                "data_dir: reading needs no such package",
                name=error.name,
            ) from error
    return _opened(builder, name, split)


# tensorflow-datasets wraps the builder's functions, which hides their types.
def _opened(builder: Any, name: str, split: str) -> Any:
    """The examples of a prepared dataset."""
    formats = sorted(f.value for f in builder.info.available_file_formats())
    if _FORMAT not in formats:
        raise ValueError(
            f"dataset {name!r} in {builder.data_path} is prepared as "
            f"{' and '.join(formats)}, which cannot be read by number here: prepare it "
            f"as {_FORMAT} in another data_dir (download=True does so)"
        )
    part = split.split("[")[0].strip()
    splits = list(builder.info.splits)
    if "+" not in split and part not in ("all", *splits):
        raise ValueError(
            f"dataset {name!r} has no split {part!r}, but {splits}{_near(part, splits)}"
        )
    return builder.as_data_source(split, file_format=_FORMAT)


def _near(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, known)
    return f": did you mean {' or '.join(map(repr, close))}?" if close else ""
