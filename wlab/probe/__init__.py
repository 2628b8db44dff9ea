# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Measures: they look at weights and activations and change nothing."""

from wlab.probe._gain import Gain as Gain
from wlab.probe._gain import gain_report as gain_report
from wlab.probe._gain import rms_singular_values as rms_singular_values
from wlab.probe._gain import sublayer_gain as sublayer_gain
from wlab.probe._gain import top_singular_values as top_singular_values
