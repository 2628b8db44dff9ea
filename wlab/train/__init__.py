# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Training: losses, the step, the loop, and what a run leaves behind."""

from wlab.train._checkpoint import Checkpoints as Checkpoints
from wlab.train._hosts import start_hosts as start_hosts
from wlab.train._loop import fit as fit
from wlab.train._losses import bits as bits
from wlab.train._losses import next_token_loss as next_token_loss
from wlab.train._metrics import MetricsWriter as MetricsWriter
from wlab.train._metrics import read_metrics as read_metrics
from wlab.train._progress import Progress as Progress
from wlab.train._resume import resume as resume
from wlab.train._resume import rewind_metrics as rewind_metrics
from wlab.train._state import abstract_state as abstract_state
from wlab.train._state import create_state as create_state
from wlab.train._step import LossFn as LossFn
from wlab.train._step import StepFn as StepFn
from wlab.train._step import TrainState as TrainState
from wlab.train._step import init_state as init_state
from wlab.train._step import jit_step as jit_step
from wlab.train._step import make_evaluate as make_evaluate
from wlab.train._step import make_train_step as make_train_step
