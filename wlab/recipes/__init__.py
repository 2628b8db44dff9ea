# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""One file per paper: the experiment that shows its claim against its baseline.

A recipe is a module with a frozen dataclass ``Config``, the tiny setting
``QUICK: Config`` and ``run(config, *, out, progress) -> Report``, which saves the
report under ``out`` unless that is None. A recipe that trains for long takes ``resume``
as well and hands its work to :class:`Run`. The names on the command line stand in
:data:`wlab.methods.RECIPES`.
"""

from wlab.recipes._clock import StepClock as StepClock
from wlab.recipes._figures import curves_and_tradeoff as curves_and_tradeoff
from wlab.recipes._report import Arm as Arm
from wlab.recipes._report import Curve as Curve
from wlab.recipes._report import Finding as Finding
from wlab.recipes._report import Metric as Metric
from wlab.recipes._report import Report as Report
from wlab.recipes._run import Run as Run
from wlab.recipes._versions import Stopwatch as Stopwatch
from wlab.recipes._versions import device as device
from wlab.recipes._versions import versions as versions
