# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Number grids, quantised weights, and how they are made."""

from wlab.quant._activations import QuantizedInput as QuantizedInput
from wlab.quant._activations import quantize_activations as quantize_activations
from wlab.quant._calibrated import gptaq as gptaq
from wlab.quant._calibrated import gptq as gptq
from wlab.quant._calibrated import rescomp as rescomp
from wlab.quant._calibrated import rtn as rtn
from wlab.quant._grid import GRIDS as GRIDS
from wlab.quant._grid import Grid as Grid
from wlab.quant._grid import get_grid as get_grid
from wlab.quant._quantize import Granularity as Granularity
from wlab.quant._quantize import Rounding as Rounding
from wlab.quant._quantize import block_scale as block_scale
from wlab.quant._quantize import check_finite as check_finite
from wlab.quant._quantize import fake_quantize as fake_quantize
from wlab.quant._quantize import fake_quantize_tree as fake_quantize_tree
from wlab.quant._quantize import matrix_block as matrix_block
from wlab.quant._quantize import quantizable as quantizable
from wlab.quant._quantize import quantize as quantize
from wlab.quant._quantize import quantize_blocks as quantize_blocks
from wlab.quant._quantize import quantize_tree as quantize_tree
from wlab.quant._quantized import Quantized as Quantized
