# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""The digits are whole, scaled, fairly split and always the same."""

import numpy as np
from sklearn.datasets import load_digits

from wlab import data


def test_every_digit_is_on_one_side():
    split = data.digits()
    pixels, classes = load_digits(return_X_y=True)
    x = np.concatenate([split.train_x, split.valid_x]).reshape(-1, 64) * 16
    y = np.concatenate([split.train_y, split.valid_y])
    got = sorted(map(tuple, np.column_stack([x, y]).tolist()))
    assert got == sorted(map(tuple, np.column_stack([pixels, classes]).tolist()))


def test_shapes_dtypes_and_range():
    split = data.digits()
    assert split.train_x.shape == (1500, 8, 8, 1)
    assert split.valid_x.shape == (297, 8, 8, 1)
    assert split.train_x.dtype == np.float32 and split.train_y.dtype == np.int32
    assert split.train_x.min() == 0 and split.train_x.max() == 1


def test_classes_have_their_share():
    split = data.digits()
    share = np.bincount(split.valid_y, minlength=10) / len(split.valid_y)
    assert share.min() > 0.07 and share.max() < 0.13


def test_the_split_is_the_same_every_time():
    for a, b in zip(data.digits(), data.digits(), strict=True):
        np.testing.assert_array_equal(a, b)
    assert data.digits().valid_y[:10].tolist() == [0, 7, 0, 1, 0, 1, 4, 5, 1, 2]
