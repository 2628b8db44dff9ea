# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Gradient transformations, to be chained with those of optax."""

from wlab.optim import _mup as mup  # noqa: F401
from wlab.optim import _synapse as synapse  # noqa: F401
from wlab.optim._active import active_layers as active_layers
from wlab.optim._classp import ClasspState as ClasspState
from wlab.optim._classp import classp as classp
from wlab.optim._classp import classp_open_fraction as classp_open_fraction
from wlab.optim._classp import classp_task_schedule as classp_task_schedule
from wlab.optim._classp import scale_by_classp as scale_by_classp
from wlab.optim._drop import DropState as DropState
from wlab.optim._drop import Sampling as Sampling
from wlab.optim._drop import drop as drop
from wlab.optim._drop import sample_start as sample_start
from wlab.optim._drop_muon import MuonState as MuonState
from wlab.optim._drop_muon import drop_muon as drop_muon
from wlab.optim._eco import EcoState as EcoState
from wlab.optim._eco import eco as eco
from wlab.optim._eco import eco_muon as eco_muon
from wlab.optim._eco import eco_sgd as eco_sgd
from wlab.optim._frugal import frugal as frugal
from wlab.optim._frugal import scale_by_frugal as scale_by_frugal
from wlab.optim._leaves import eco_granularity as eco_granularity
from wlab.optim._lisa import LisaState as LisaState
from wlab.optim._lisa import lisa as lisa
from wlab.optim._lisa import sample_layers as sample_layers
from wlab.optim._mup import mup_adamw as mup_adamw
