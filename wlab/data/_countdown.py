# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Countdown: reach a number from three others, with answers that can be checked.

A problem is a prompt ``a,b,c=tt`` whose answer is an expression of the three numbers in
any order with ``+``, ``-`` and ``*`` between them, products first. Prompts and answers
have a fixed length, so that sampling and checking are compiled.
"""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

SYMBOLS = "0123456789+-*,="
"""The token of each symbol is its place here."""

PROMPT = 8
"""Tokens of a prompt."""

ANSWER = 5
"""Tokens of an answer."""

_PLUS, _MINUS, _TIMES = (SYMBOLS.index(s) for s in "+-*")


class Countdown(NamedTuple):
    """Problems; the number of those with the same numbers and target is one."""

    numbers: np.ndarray  # int32 [n, 3], ascending, from 1 to 9
    target: np.ndarray  # int32 [n], from 1 to 99
    prompt: np.ndarray  # int32 [n, PROMPT]


def problems(seed: int = 0, valid: float = 0.2) -> tuple[Countdown, Countdown]:
    """All problems that have an answer, as those to learn from and the others.

    Args:
        seed: of the division.
        valid: the share of the others.

    Returns:
        Problems for training and for validation, with none in both.

    Examples:
        >>> train, valid = problems()
        >>> decode(train.prompt[0]).count(",")
        2
    """
    found = set()
    for numbers in itertools.combinations_with_replacement(range(1, 10), 3):
        for order in itertools.permutations(numbers):
            for ops in itertools.product((_PLUS, _MINUS, _TIMES), repeat=2):
                value = int(_value(*order, *ops))
                if 1 <= value <= 99:
                    found.add((*numbers, value))
    rows = np.array(sorted(found), np.int32)
    rows = np.random.default_rng(seed).permutation(rows)
    prompts = np.array([encode("{},{},{}={:02d}".format(*row)) for row in rows])
    every = Countdown(rows[:, :3], rows[:, 3], prompts)
    held = round(valid * len(rows))
    return (
        Countdown(*(x[held:] for x in every)),
        Countdown(*(x[:held] for x in every)),
    )


def encode(text: str) -> list[int]:
    """The tokens of a text of `SYMBOLS`."""
    return [SYMBOLS.index(s) for s in text]


def decode(tokens: np.ndarray | jax.Array) -> str:
    """The text of tokens; what is no symbol is shown as a question mark."""
    return "".join(SYMBOLS[t] if 0 <= t < len(SYMBOLS) else "?" for t in tokens)


def expressions(
    problems: Countdown, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """An answer in the right form for each problem, right or wrong.

    Args:
        problems: whose numbers are taken.
        rng: chooses their order and the operations.

    Returns:
        int32 `[n, ANSWER]` tokens, and whether each reaches the target.
    """
    n = len(problems.numbers)
    order = rng.permuted(problems.numbers, axis=1)
    ops = rng.choice([_PLUS, _MINUS, _TIMES], (n, 2))
    answer = np.stack([order[:, 0], ops[:, 0], order[:, 1], ops[:, 1], order[:, 2]], 1)
    right = _value(*order.T, *ops.T) == problems.target
    return answer.astype(np.int32), np.asarray(right)


def verify(
    answer: jax.Array, numbers: jax.Array, target: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Whether an answer is right, and whether it is in the right form.

    The form is that of three numbers, which are those of the problem, each as often,
    with an operation between them.

    Args:
        answer: integers `[ANSWER]`; vmap for more.
        numbers: integers `[3]`, ascending.
        target: integer.

    Returns:
        Two booleans.
    """
    a, o, b, p, c = answer
    well = jnp.array_equal(jnp.sort(jnp.stack([a, b, c])), numbers)
    for op in (o, p):
        well &= (op == _PLUS) | (op == _MINUS) | (op == _TIMES)
    return well & (_value(a, b, c, o, p) == target), well


def _value(a, b, c, o, p):  # type: ignore[no-untyped-def]
    """``a o b p c``, products first; of arrays or numbers."""
    where = jnp.where if isinstance(a, jax.Array) else np.where

    def apply(x, op, y):  # type: ignore[no-untyped-def]
        return where(op == _TIMES, x * y, where(op == _PLUS, x + y, x - y))

    right_first = (p == _TIMES) & (o != _TIMES)
    return where(right_first, apply(a, o, b * c), apply(apply(a, o, b), p, c))
