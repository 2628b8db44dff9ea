# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""`Strategy`: how weights are searched without gradients."""

from collections.abc import Callable
from typing import Any, NamedTuple


class Strategy(NamedTuple):
    """Pure functions that perturb parameters and learn from what that was worth.

    Members of a population are numbered; each is the parameters plus noise that
    follows from the state and the number alone, so that nothing of it need be kept.
    Fitness is to be maximised; what `update` returns is to be minimised along, as a
    gradient is.
    """

    init: Callable[..., Any]
    """`init(key, params)` returns the state; `params` may be abstract."""

    perturb: Callable[..., Any]
    """`perturb(state, params, member, noise=None)` returns a member's parameters.

    `member` is a number, which may be traced, or a `wlab.es.Member`. Structured
    leaves are run by `wlab.lift`.
    """

    update: Callable[..., Any]
    """`update(state, params, fitness, members=None, noise=None)` returns
    pseudo-gradients, a tree of the parameters' structure, and the next state."""

    draw: Callable[..., Any]
    """`draw(state, params, member)` returns the noise that the others make again.

    It is the same for both members of an antithetic pair.
    """
