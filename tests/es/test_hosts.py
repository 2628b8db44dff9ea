# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""A population over two real processes on this machine."""

import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest

from tests.es import _host_worker as worker


def test_two_hosts_have_the_numbers_of_one(tmp_path: pathlib.Path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    settings = {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": "2",
    }
    command = [sys.executable, worker.__file__, str(tmp_path)]
    hosts = [
        subprocess.Popen(
            command, env=os.environ | settings | {"JAX_PROCESS_ID": str(i)}
        )
        for i in range(2)
    ]
    try:
        assert [host.wait(timeout=120) for host in hosts] == [0, 0]
    finally:
        for host in hosts:
            host.kill()
    alone = worker.search(None)
    for i in range(2):
        found = np.load(tmp_path / f"{i}.npz")
        for reduce in ("gather", "sum"):
            for name, want in alone.items():
                got = found[f"{reduce} {name}"]
                np.testing.assert_allclose(got, want, atol=2e-6)
                assert not np.allclose(got, worker.PARAMS[name])


def test_an_odd_population_is_told():
    with pytest.raises(ValueError, match="population=7 does not divide"):
        worker.es.make_evolution_step(
            worker.fitness, worker.es.eggroll(), worker.optax.sgd(1.0), 7
        )
