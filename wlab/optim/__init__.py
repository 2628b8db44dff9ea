# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Gradient transformations, to be chained with those of optax."""

from wlab.optim._eco import EcoState as EcoState
from wlab.optim._eco import eco as eco
from wlab.optim._eco import eco_muon as eco_muon
from wlab.optim._eco import eco_sgd as eco_sgd
from wlab.optim._leaves import eco_granularity as eco_granularity
