# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""muP's learning rates and weight decays against microsoft/mup and the paper's rule.

The reference model has weights as (outputs, inputs) and the shapes that `_shapes` says;
all its sizes follow from the width.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from tests.parity import Computed
from wlab.core import MatrixView, leaves_with_paths
from wlab.optim import mup

INPUTS = ("widths", "base_width", "base_lr", "base_wd", "names")
TOLERANCE = 1e-12

# (learning rate's exponent, decay's exponent, whether vectors decay)
_RULES = {
    "mup_coupled": (-1.0, 1.0, True),
    "mup_decoupled": (-1.0, 0.0, True),
    "rule": (-1.0, 0.5, False),
}


def compute(inputs: Mapping[str, np.ndarray]) -> dict[str, Computed]:
    base_width = int(inputs["base_width"])
    names = [str(name) for name in inputs["names"]]
    base = _shapes(base_width)
    rows: dict[str, list[list[float]]] = {}
    for width in inputs["widths"].tolist():
        classes = mup.classify(
            _shapes(width),
            base,
            _shapes(2 * base_width),
            views={name: MatrixView((-1,), (-2,)) for name in _matrices(base)},
        )
        for rule, (lr_exp, wd_exp, decay_vectors) in _RULES.items():
            found = mup.multipliers(
                classes, lr_exp, wd_exp, decay_vectors=decay_vectors
            )
            for kind, tree in found._asdict().items():
                row = [dict(leaves_with_paths(tree))[name] for name in names]
                rows.setdefault(f"{rule} {kind}", []).append(row)
    kinds = dict(leaves_with_paths(classes))
    lr, wd = float(inputs["base_lr"]), float(inputs["base_wd"])
    out: dict[str, Any] = {
        "is_matrix": [kinds[name].kind == "matrix" for name in names],
        "mup_lr": lr * np.array(rows["mup_coupled learning_rate"]),
        "mup_wd_coupled": wd * np.array(rows["mup_coupled weight_decay"]),
        "mup_wd_decoupled": wd * np.array(rows["mup_decoupled weight_decay"]),
        "rule_lr": lr * np.array(rows["rule learning_rate"]),
        "rule_wd": wd * np.array(rows["rule weight_decay"]),
    }
    made = {name: Computed(np.asarray(x), TOLERANCE) for name, x in out.items()}
    # Compared as numbers: a wrong class is a difference of one.
    is_matrix = np.asarray(out["is_matrix"], float)
    return made | {"is_matrix": Computed(is_matrix, 0.0)}


def _shapes(d: int) -> dict[str, jax.ShapeDtypeStruct]:
    shapes = {
        "embed.weight": (50, d),
        "norm.weight": (d,),
        "norm.bias": (d,),
        "up.weight": (3 * d, d),
        "up.bias": (3 * d,),
        "down.weight": (d, 3 * d),
        "down.bias": (d,),
        "head.weight": (50, d),
        "head.bias": (50,),
    }
    return {n: jax.ShapeDtypeStruct(s, np.float32) for n, s in shapes.items()}


def _matrices(shapes: dict[str, jax.ShapeDtypeStruct]) -> list[str]:
    return [name for name, x in shapes.items() if len(x.shape) == 2]
