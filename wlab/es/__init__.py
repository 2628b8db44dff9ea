# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Evolution strategies: weights searched by what perturbing them is worth."""

from wlab.core import Strategy as Strategy
from wlab.es._ask_tell import AskTell as AskTell
from wlab.es._ask_tell import AskTellState as AskTellState
from wlab.es._ask_tell import ask_tell as ask_tell
from wlab.es._eggroll import EvolutionState as EvolutionState
from wlab.es._eggroll import eggroll as eggroll
from wlab.es._eggroll import open_es as open_es
from wlab.es._integer import IntegerState as IntegerState
from wlab.es._integer import integer_eggroll as integer_eggroll
from wlab.es._integer import noise_thresholds as noise_thresholds
from wlab.es._members import Member as Member
from wlab.es._noise import draw_noise as draw_noise
from wlab.es._perturbed import Perturbed as Perturbed
from wlab.es._population import draw_pairs as draw_pairs
from wlab.es._population import evaluate as evaluate
from wlab.es._shaping import Shaping as Shaping
from wlab.es._shaping import shape_fitness as shape_fitness
from wlab.es._step import make_evolution_step as make_evolution_step
from wlab.es._ternary import pack_ternary as pack_ternary
from wlab.es._ternary import unpack_ternary as unpack_ternary
from wlab.es._transform import evolution_state as evolution_state
from wlab.es._transform import scale_by_eggroll as scale_by_eggroll
from wlab.es._transform import scale_by_strategy as scale_by_strategy
