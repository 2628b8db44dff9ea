# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Flax models that the recipes need: real architectures in small files."""

from wlab.models import decoder as decoder
from wlab.models import egg as egg
from wlab.models import policy as policy
from wlab.models import sizes as sizes
from wlab.models._hf import from_hf as from_hf
from wlab.models._hf import hf_names as hf_names
from wlab.models._hf import to_hf as to_hf
from wlab.models._layered import layered as layered
from wlab.models._rotated import decoder_importance as decoder_importance
from wlab.models._rotated import rotated as rotated
from wlab.models._scales import decoder_groups as decoder_groups
from wlab.models.decoder import final_norm as final_norm
from wlab.models.decoder import with_norm_bias as with_norm_bias
