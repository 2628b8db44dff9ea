# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""wlab, the weight lab: any weight method, any Flax model, one pytree.

Names are loaded when first used, so that ``import wlab`` costs nothing and the
command line answers at once.
"""

import importlib
from typing import TYPE_CHECKING, Any

from wlab._version import __version__ as __version__

if TYPE_CHECKING:
    from wlab import core as core
    from wlab import data as data
    from wlab import es as es
    from wlab import models as models
    from wlab import optim as optim
    from wlab import peft as peft
    from wlab import probe as probe
    from wlab import quant as quant
    from wlab import train as train
    from wlab.core import LowRank as LowRank
    from wlab.core import MatrixView as MatrixView
    from wlab.core import Weight as Weight
    from wlab.core import explain as explain
    from wlab.core import lift as lift
    from wlab.core import materialise as materialise
    from wlab.quant import Quantized as Quantized

_ROOMS = ("core", "data", "es", "models", "optim", "peft", "probe", "quant", "train")
_NAMES = {
    "LowRank": "wlab.core",
    "MatrixView": "wlab.core",
    "Quantized": "wlab.quant",
    "Weight": "wlab.core",
    "explain": "wlab.core",
    "lift": "wlab.core",
    "materialise": "wlab.core",
}

__all__ = ["__version__", *_ROOMS, *_NAMES]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"wlab.{name}")
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    raise AttributeError(f"module 'wlab' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
