# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""The beams: structured weights, lift, paths and views of trees, linear algebra."""

from wlab.core import _bits as bits  # noqa: F401
from wlab.core import _linalg as linalg  # noqa: F401
from wlab.core import _sharding as sharding  # noqa: F401
from wlab.core import _ste as ste  # noqa: F401
from wlab.core import _subset as subsets  # noqa: F401
from wlab.core._capture import capture as capture
from wlab.core._capture import keep as keep
from wlab.core._capture import paths_by_stage as paths_by_stage
from wlab.core._capture import uses as uses
from wlab.core._flattened import Flattened as Flattened
from wlab.core._flattened import as_kernel as as_kernel
from wlab.core._float32 import in_float32 as in_float32
from wlab.core._hadamard import hadamard as hadamard
from wlab.core._hadamard import hadamard_matrix as hadamard_matrix
from wlab.core._hadamard import random_hadamard as random_hadamard
from wlab.core._hadamard import random_orthogonal as random_orthogonal
from wlab.core._keys import fold_path as fold_path
from wlab.core._keys import typed_key as typed_key
from wlab.core._layered import Layered as Layered
from wlab.core._layered import LayerGrads as LayerGrads
from wlab.core._layered import Layers as Layers
from wlab.core._layered import find_layers as find_layers
from wlab.core._layered import layered_value_and_grad as layered_value_and_grad
from wlab.core._lift import Weight as Weight
from wlab.core._lift import is_weight as is_weight
from wlab.core._lift import lift as lift
from wlab.core._lift import materialise as materialise
from wlab.core._lowrank import LowRank as LowRank
from wlab.core._noisy import Noisy as Noisy
from wlab.core._operator import Operator as Operator
from wlab.core._permuted import Permuted as Permuted
from wlab.core._reparam import Adapter as Adapter
from wlab.core._reparam import Reparam as Reparam
from wlab.core._strategy import Strategy as Strategy
from wlab.core._subset import Draw as Draw
from wlab.core._subset import SubsetState as SubsetState
from wlab.core._subset import subset as subset
from wlab.core._tree import Leaf as Leaf
from wlab.core._tree import Pattern as Pattern
from wlab.core._tree import Select as Select
from wlab.core._tree import Views as Views
from wlab.core._tree import describe as describe
from wlab.core._tree import explain as explain
from wlab.core._tree import leaves_with_paths as leaves_with_paths
from wlab.core._tree import map_with_path as map_with_path
from wlab.core._tree import matrix_views as matrix_views
from wlab.core._tree import muon_dimension_numbers as muon_dimension_numbers
from wlab.core._tree import path_of as path_of
from wlab.core._tree import select as select
from wlab.core._view import MatrixView as MatrixView
from wlab.core._view import as_matrices as as_matrices
from wlab.core._view import from_matrices as from_matrices
