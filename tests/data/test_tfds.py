# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Datasets by name, made here and read back, without a network or TensorFlow."""

import io
import itertools
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from wlab import data

# To find a builder's own file tensorflow-datasets imports importlib_resources, a
# package that it does not bring with it.


def png(number):
    file = io.BytesIO()
    Image.fromarray(np.full((4, 5), number, np.uint8)).save(file, "png")
    file.seek(0)
    return file


class WlabTexts(tfds.core.GeneratorBasedBuilder):
    """Twenty texts to learn from and five held out."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {"text": tfds.features.Text(), "number": np.int32}
        features = tfds.features.FeaturesDict(features)
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, _manager):
        return {
            "train": self._generate_examples(0, 20),
            "test": self._generate_examples(20, 25),
        }

    def _generate_examples(self, start, stop):
        for i in range(start, stop):
            yield i, {"text": f"né {i}" * (i % 4), "number": i}


class WlabImages(tfds.core.GeneratorBasedBuilder):
    """Twelve grey images whose class is in their pixels."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(4, 5, 1)),
            "label": tfds.features.ClassLabel(num_classes=3),
        }
        features = tfds.features.FeaturesDict(features)
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, _manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i in range(12):
            yield i, {"image": png(i), "label": i % 3}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("datasets")
    for builder in (WlabTexts, WlabImages):
        builder(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


def test_examples_are_read_by_number(prepared):
    source = data.tfds_source("wlab_texts", "train", data_dir=prepared)
    got = {int(source[i]["number"]): source[i]["text"] for i in range(len(source))}
    assert got == {i: (f"né {i}" * (i % 4)).encode() for i in range(20)}
    half = data.tfds_source("wlab_texts", "train[:50%]", data_dir=str(prepared))
    assert len(half) == 10
    assert len(data.tfds_source("wlab_texts", "train+test", data_dir=prepared)) == 25


def test_texts_are_packed(prepared):
    source = data.tfds_source("wlab_texts", "train", data_dir=prepared)
    texts = data.column(source, "text")
    options = {"batch": 4, "length": 15, "seed": 0}
    want = data.pack(list(texts), **options)
    rows = [data.pack(texts, shard=(h, 2), **options) for h in range(2)]
    for batch, *parts in itertools.islice(zip(want, *rows, strict=True), 12):
        assert batch.dtype == np.int32 and batch.shape == (4, 16)
        np.testing.assert_array_equal(np.concatenate(parts), batch)
    held = data.tfds_source("wlab_texts", "test", data_dir=prepared)
    tokens = data.join(data.column(held, "text"))
    assert "né 23né 23né 23" in data.decode(tokens).split("\0")


def test_images_are_batched(prepared):
    source = data.tfds_source("wlab_images", "train", data_dir=prepared)
    parts = [data.batches(source, batch=4, seed=0, shard=(h, 2)) for h in range(2)]
    seen = []
    for a, b in itertools.islice(zip(*parts, strict=True), 3):
        assert a["image"].shape == (2, 4, 5, 1) and a["image"].dtype == np.uint8
        for part in (a, b):
            numbers = part["image"][:, 0, 0, 0]
            np.testing.assert_array_equal(part["label"], numbers % 3)
            seen += numbers.tolist()
    assert sorted(seen) == list(range(12))
    state = parts[0].get_state()
    want = next(parts[0])
    moved = data.batches(source, batch=4, seed=0, threads=0)
    moved.set_state(state)
    np.testing.assert_array_equal(next(moved)["image"][:2], want["image"])


def test_tensorflow_is_not_imported(prepared):
    script = f"""
import sys
from wlab import data
assert "tensorflow_datasets" not in sys.modules
texts = data.tfds_source("wlab_texts", "train", data_dir={str(prepared)!r})
images = data.tfds_source("wlab_images", "train", data_dir={str(prepared)!r})
next(data.pack(data.column(texts, "text"), batch=2, length=7, seed=0))
next(data.batches(images, batch=2, seed=0))
assert "tensorflow_datasets" in sys.modules
assert "tensorflow" not in sys.modules
print(len(texts), len(images))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["20", "12"], done.stderr


def test_a_dataset_that_is_not_prepared(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"not prepared in .*download=True"):
        data.tfds_source("wlab_texts", "train", data_dir=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_prepared_dataset_with_a_name_like_it_is_proposed(tmp_path):
    (tmp_path / "our_corpus").mkdir()
    with pytest.raises(ValueError, match=r"did you mean 'our_corpus'\?"):
        data.tfds_source("our_corpos", "train", data_dir=tmp_path)


def test_download_prepares_it_once(tmp_path):
    options = {"data_dir": tmp_path, "download": True}
    source = data.tfds_source("wlab_texts", "test", **options)
    assert len(source) == 5
    (files,) = (tmp_path / "wlab_texts").iterdir()
    times = {file: file.stat().st_mtime_ns for file in files.iterdir()}
    assert any("array_record" in file.name for file in times)
    assert len(data.tfds_source("wlab_texts", "train", **options)) == 20
    assert times == {file: file.stat().st_mtime_ns for file in files.iterdir()}


def test_what_only_tensorflow_can_prepare(tmp_path, monkeypatch):
    def needs_tensorflow(_self):
        raise ModuleNotFoundError("No module named 'tensorflow'", name="tensorflow")

    monkeypatch.setattr(WlabTexts, "download_and_prepare", needs_tensorflow)
    with pytest.raises(ModuleNotFoundError, match=r"'tensorflow'.*pass that folder"):
        data.tfds_source("wlab_texts", "train", data_dir=tmp_path, download=True)


def test_a_format_without_numbers(tmp_path):
    WlabTexts(data_dir=tmp_path, file_format="parquet").download_and_prepare()
    for download in (False, True):
        with pytest.raises(ValueError, match=r"as parquet.*as array_record in"):
            data.tfds_source(
                "wlab_texts", "train", data_dir=tmp_path, download=download
            )


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        ("wlab_text", "train", "no dataset 'wlab_text'.*did you mean 'wlab_texts'"),
        ("mnst", "train", "no dataset 'mnst'.*did you mean 'mnist'"),
        ("zzzzzz", "train", "no dataset 'zzzzzz'.*has none prepared$"),
        ("wlab_texts:9.0.0", "train", "version 9.0.0, only: 1.0.0"),
        ("wlab_texts", "trian", r"\['train', 'test'\]: did you mean 'train'"),
        ("wlab_texts", "zzz[:3]", r"no split 'zzz', but \['train', 'test'\]$"),
        ("wlab_texts", "train+tst", "Unknown split 'tst'"),
        ("wlab_texts", "train[:5", "train"),
    ],
)
def test_unknown_names(prepared, name, split, message):
    with pytest.raises(ValueError, match=message):
        data.tfds_source(name, split, data_dir=prepared)
