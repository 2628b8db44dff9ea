# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Real processes on this machine: the numbers of one, and no end in silence."""

import contextlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from wlab import train

WORKER = pathlib.Path(__file__).parent / "_host_worker.py"
LAUNCHERS = ("JAX_COORDINATOR", "JAX_NUM_PROC", "JAX_PROC", "SLURM_", "OMPI_", "TPU_")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def by_hand(count: int) -> list[dict[str, str]]:
    """What a user sets on each host."""
    address = f"127.0.0.1:{free_port()}"
    return [
        {
            "JAX_COORDINATOR_ADDRESS": address,
            "JAX_NUM_PROCESSES": str(count),
            "JAX_PROCESS_ID": str(i),
        }
        for i in range(count)
    ]


def by_slurm(count: int) -> list[dict[str, str]]:
    """What srun sets for each task."""
    port = str(free_port())
    return [
        {
            "JAX_COORDINATOR_PORT": port,
            "SLURM_JOB_ID": "17",
            "SLURM_STEP_NODELIST": "localhost",
            "SLURM_NTASKS": str(count),
            "SLURM_PROCID": str(i),
            "SLURM_LOCALID": str(i),
        }
        for i in range(count)
    ]


class Hosts:
    """Starts hosts, and leaves none behind."""

    def __init__(self, cache: pathlib.Path, stack: contextlib.ExitStack):
        self.cache, self.stack = cache, stack

    def __call__(self, settings, folder, *args, devices=1):
        folder.mkdir(exist_ok=True)
        kept = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHERS)}
        kept |= {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(devices),
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # compiling is most of the time
            "JAX_COMPILATION_CACHE_DIR": str(self.cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        command = [sys.executable, str(WORKER), str(folder), *args]
        hosts = []
        for each in settings:
            host = subprocess.Popen(
                command, env=kept | each, stderr=subprocess.PIPE, text=True
            )
            self.stack.callback(host.wait)
            self.stack.callback(host.kill)
            hosts.append(host)
        return hosts


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    with contextlib.ExitStack() as stack:
        yield Hosts(tmp_path_factory.mktemp("cache"), stack)


def finish(hosts) -> None:
    for host in hosts:
        error = host.communicate(timeout=90)[1]
        assert host.returncode == 0, error
        assert "wlab:" not in error, error


def ended(host, within: float) -> str:
    """What a host says that ends in error, in time."""
    error = host.communicate(timeout=within)[1]
    assert host.returncode != 0, error
    return error


def result(folder: pathlib.Path, index: int):
    told = json.loads((folder / f"end-{index}.json").read_text())
    with np.load(folder / f"end-{index}.npz") as params:
        return told, dict(params)


@pytest.fixture(scope="module")
def alone(hosts, tmp_path_factory):
    """The whole run in one process on one device, with no launcher."""
    folder = tmp_path_factory.mktemp("alone")
    finish(hosts([{}], folder))
    told, params = result(folder, 0)
    assert told["count"] == 1 and len(told["loss"]) == 8
    return told["loss"], params


def assert_equal(folder: pathlib.Path, alone) -> None:
    losses, params = alone
    for index in range(2):
        told, own = result(folder, index)
        assert told["count"] == 2
        np.testing.assert_allclose(told["loss"], losses, rtol=1e-5)
        assert own.keys() == params.keys()
        for path, leaf in own.items():
            np.testing.assert_allclose(
                leaf, params[path], rtol=1e-5, atol=1e-6, err_msg=path
            )


def test_when_one_is_killed_the_other_ends_and_both_resume(hosts, tmp_path, alone):
    """By hand and by SLURM, with the numbers of one host at the end."""
    run = hosts(by_hand(2), tmp_path, "--pause=0.5", devices=2)
    end = time.monotonic() + 60
    while not (tmp_path / "checkpoints" / "4").exists():
        assert time.monotonic() < end
        assert [host.poll() for host in run] == [None, None]
        time.sleep(0.02)
    run[1].send_signal(signal.SIGKILL)
    said = ended(run[0], within=30)
    assert "wlab: host 0 of 2 has stopped" in said.splitlines()[-1]
    assert "another host was lost" in said and "wlab.train.resume" in said
    assert not list(tmp_path.glob("end-*"))
    finish(hosts(by_slurm(2), tmp_path, devices=2))
    assert result(tmp_path, 0)[0]["first"] in (4, 6)
    assert_equal(tmp_path, alone)
    names = {p.name for p in (tmp_path / "checkpoints").iterdir()}
    assert names == {"4", "6", "8"}


def test_when_host_0_fails_the_other_ends(hosts, tmp_path):
    first, second = hosts(by_hand(2), tmp_path, "--fails=0", devices=2)
    said = ended(first, within=60)
    assert "OSError: the disk of this host" in said
    assert "wlab: host 0 of 2 has stopped" in said.splitlines()[-1]
    assert "wlab: host 1 of 2 has stopped" in ended(second, within=30)


def test_hosts_that_never_come(hosts, tmp_path):
    zero = hosts(by_hand(2)[:1], tmp_path, "--timeout=2")[0]
    said = ended(zero, within=60)
    assert "wlab: not all of 2 hosts met at 127.0.0.1:" in said.splitlines()[-1]
    assert "within 2 s" in said


def test_importing_looks_for_no_devices():
    """Otherwise start_hosts could not be called after it."""
    script = (
        "import importlib, pkgutil, jax, wlab\n"
        "for m in pkgutil.walk_packages(wlab.__path__, 'wlab.'):\n"
        "    if m.name == 'wlab.__main__': continue\n"
        "    importlib.import_module(m.name)\n"
        "    try: jax.config.update('jax_num_cpu_devices', 3)\n"
        "    except RuntimeError: raise SystemExit(f'{m.name} does')\n"
        "wlab.train.start_hosts()"
    )
    env = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHERS)}
    env |= {"JAX_PLATFORMS": "cpu", "JAX_COORDINATOR_ADDRESS": "127.0.0.1:8476"}
    env.pop("JAX_NUM_CPU_DEVICES", None)
    run = subprocess.run(
        [sys.executable, "-c", script], env=env, stderr=-1, text=True, timeout=60
    )
    # The address alone: jax knows of no launcher that would say the rest.
    assert "but not JAX_NUM_PROCESSES and JAX_PROCESS_ID" in run.stderr


@pytest.fixture
def environ(monkeypatch):
    """No launcher, and a way to be one."""
    for name in list(os.environ):
        if name.startswith(LAUNCHERS):
            monkeypatch.delenv(name)

    def put(**names):
        for name, value in names.items():
            monkeypatch.setenv(name, value)

    return put


@pytest.mark.parametrize(
    "names",
    [
        {},
        {"JAX_NUM_PROCESSES": "1"},
        by_slurm(1)[0],
        {"OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:1", "OMPI_COMM_WORLD_SIZE": "1"},
    ],
    ids=["nothing", "by-hand", "slurm", "ompi"],
)
def test_one_host_is_nothing_to_start(environ, names):
    environ(**names)
    assert train.start_hosts() == (0, 1) == train.start_hosts()
    assert not jax.distributed.is_initialized()


def test_no_host_0_at_the_address(environ):
    environ(**by_hand(2)[1])
    address = os.environ["JAX_COORDINATOR_ADDRESS"]
    began = time.monotonic()
    with pytest.raises(
        TimeoutError, match=f"host 1 of 2 found no host 0 at .*{address}"
    ):
        train.start_hosts(timeout=1)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"},
            "not JAX_COORDINATOR_ADDRESS",
        ),
        (
            {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_PROCESS_ID": "0"},
            "not JAX_NUM_PROCESSES:",
        ),
        (
            {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2"},
            "not JAX_PROCESS_ID:",
        ),
        ({"JAX_NUM_PROCESSES": "2"}, "COORDINATOR_ADDRESS and JAX_PROCESS_ID"),
        ({"JAX_NUM_PROCESSES": "two"}, "'two' must be a number"),
        (
            {
                "JAX_COORDINATOR_ADDRESS": "a:1",
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": "2",
            },
            "numbered from 0",
        ),
        ({"JAX_COORDINATOR_ADDRESS": "10.0.0.1"}, "has no port"),
    ],
)
def test_settings_that_do_not_fit(environ, names, message):
    environ(**names)
    with pytest.raises(ValueError, match=message):
        train.start_hosts(timeout=1)


def test_called_too_late(environ):
    jax.devices()
    environ(**by_hand(2)[0])
    with pytest.raises(RuntimeError, match="jax has looked for devices already"):
        train.start_hosts(timeout=1)


def test_slurm_without_srun_is_told(environ):
    environ(SLURM_NTASKS="4", SLURM_JOB_ID="17", SLURM_PROCID="0")
    with pytest.warns(RuntimeWarning, match="Write srun in front"):
        assert train.start_hosts() == (0, 1)


def test_times_must_be_positive():
    with pytest.raises(ValueError, match="heartbeat=0"):
        train.start_hosts(heartbeat=0)
