# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wlab.data import countdown as task


def test_every_problem_has_an_answer_and_is_on_one_side():
    train, valid = task.problems(seed=1)
    key = lambda p: {(*n, t) for n, t in zip(p.numbers.tolist(), p.target, strict=True)}  # noqa: E731
    assert not key(train) & key(valid)
    total = len(train.target) + len(valid.target)
    assert len(key(train)) + len(key(valid)) == total > 1200
    assert len(valid.target) == round(0.2 * total)
    assert task.decode(train.prompt[0]) == "{},{},{}={:02d}".format(
        *train.numbers[0], train.target[0]
    )


@pytest.mark.parametrize(
    ("text", "target", "right", "well"),
    [
        ("2+3*4", 14, True, True),
        ("4*3+2", 14, True, True),
        ("3-2+4", 5, True, True),
        ("2+3*4", 20, False, True),  # products first
        ("2*3*4", 24, True, True),
        ("2+2*4", 10, False, False),  # a number twice
        ("2+34*", 14, False, False),
        ("2=3*4", 14, False, False),
    ],
)
def test_answers_are_checked(text: str, target: int, right: bool, well: bool):
    found = task.verify(
        jnp.array(task.encode(text)), jnp.array([2, 3, 4]), jnp.int32(target)
    )
    assert tuple(map(bool, found)) == (right, well)


def test_expressions_are_checked_alike():
    train, _ = task.problems()
    answers, right = task.expressions(train, np.random.default_rng(0))
    got, well = jax.jit(jax.vmap(task.verify))(answers, train.numbers, train.target)
    assert np.all(well)
    np.testing.assert_array_equal(got, right)
    assert 0.02 < right.mean() < 0.2
    # And as Python reads them.
    for tokens, target, good in zip(answers[:200], train.target, right, strict=False):
        assert (eval(task.decode(tokens)) == target) == good
