# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Real images inside an installed package: scikit-learn's handwritten digits."""

from typing import NamedTuple

import numpy as np

__all__ = ["Split", "digits"]

_VALID = 297


class Split(NamedTuple):
    """Images with their classes, split.

    Attributes:
        train_x: float32 in [0, 1], `[n, height, width, channels]`.
        train_y: int32, `[n]`.
        valid_x: as `train_x`, held out.
        valid_y: as `train_y`, held out.
    """

    train_x: np.ndarray
    train_y: np.ndarray
    valid_x: np.ndarray
    valid_y: np.ndarray


def digits() -> Split:
    """1797 handwritten digits of 8 x 8 pixels: 1500 to learn from, 297 held out.

    Returns:
        The split, always the same, with every digit in fair share on both sides.

    Examples:
        >>> digits().train_x.shape
        (1500, 8, 8, 1)
    """
    # It takes seconds to import, and only this function needs it.
    from sklearn.datasets import load_digits

    pixels, classes = load_digits(return_X_y=True)
    # A stride coprime to the number of images is a permutation that no library's
    # generator can change.
    order = np.arange(len(classes)) * 1013 % len(classes)
    x = (pixels[order] / 16).astype(np.float32).reshape(-1, 8, 8, 1)
    y = classes[order].astype(np.int32)
    return Split(x[_VALID:], y[_VALID:], x[:_VALID], y[:_VALID])
