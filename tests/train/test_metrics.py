# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Metrics files are strict JSON lines, whole at any moment."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from wlab.train import MetricsWriter, read_metrics


def test_round_trip_of_numbers_of_all_kinds(tmp_path):
    path = tmp_path / "deep" / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        writer.write(
            np.int64(3),
            {
                "python": 0.1,
                "numpy": np.float32(0.5),
                "jax": jnp.float32(2.0),
                "narrow": jnp.bfloat16(1.5),
                "count": jnp.int32(7),
                "flag": True,
                "seeds": jnp.asarray([1.0, 2.0]),
                "arm": "eco",
            },
        )
    (record,) = read_metrics(path)
    assert record == {
        "step": 3,
        "python": 0.1,
        "numpy": 0.5,
        "jax": 2.0,
        "narrow": 1.5,
        "count": 7,
        "flag": True,
        "seeds": [1.0, 2.0],
        "arm": "eco",
    }
    assert type(record["count"]) is int


def test_values_that_are_not_finite_are_null(tmp_path):
    path = tmp_path / "m.jsonl"
    with MetricsWriter(path) as writer:
        writer.write(1, {"loss": jnp.nan, "seeds": np.array([1.0, np.inf, -np.inf])})

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    record = json.loads(path.read_text(), parse_constant=refuse)
    assert record == {"step": 1, "loss": None, "seeds": [1.0, None, None]}


def test_every_record_is_on_the_disk_at_once(tmp_path):
    path = tmp_path / "m.jsonl"
    with MetricsWriter(path) as writer:
        for step in (1, 2):
            writer.write(step, {"loss": 0.5})
            assert [r["step"] for r in read_metrics(path)] == list(range(1, step + 1))


def test_a_new_writer_starts_anew_unless_it_appends(tmp_path):
    path = tmp_path / "m.jsonl"
    for step, append in ((1, False), (2, True), (3, True)):
        with MetricsWriter(path, append=append) as writer:
            writer.write(step, {})
    assert [r["step"] for r in read_metrics(path)] == [1, 2, 3]
    with MetricsWriter(path) as writer:
        writer.write(4, {})
    assert [r["step"] for r in read_metrics(path)] == [4]


def test_a_line_torn_by_a_kill_does_no_harm(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1}]
    with MetricsWriter(path, append=True) as writer:
        writer.write(2, {})
    assert read_metrics(path) == [{"step": 1}, {"step": 2}]


@pytest.mark.parametrize("line", ['{"step": 1', "[1]"])
def test_a_line_that_is_no_record_is_named(tmp_path, line):
    path = tmp_path / "m.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    with pytest.raises(ValueError, match=r"m.jsonl, line 2 is not"):
        read_metrics(path)


def test_what_is_no_metric_is_refused(tmp_path):
    path = tmp_path / "m.jsonl"
    with (
        MetricsWriter(path) as writer,
        pytest.raises(TypeError, match="metric 'params' is dict"),
    ):
        writer.write(1, {"params": {"w": 1}})
    assert path.read_text() == ""
